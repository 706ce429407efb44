"""families/delta_net.py: the delta rule in chunks, per document, in training and in generation."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
import configs
import log
import model as M
import shard
import train
from families import delta_net
from test_adapters import IDS, apart, load_in_peft, our_logits, randomize, their_logits, trained
from test_model import QWEN3_5, close, documents, grads, noisy, pair, remembering, row

HYBRID = ["model.family=qwen3_5_text", "model.n_kv_heads=2", "model.head_dim=16", "model.tie_embeddings=false",
          "model.linear_num_key_heads=2", "model.linear_num_value_heads=4", "model.linear_key_head_dim=8",
          "model.linear_value_head_dim=12", "model.layer_types=[linear_attention, full_attention]"]
M_HYBRID = configs.load([*HYBRID, "model.n_layers=2", "model.d_model=48", "model.n_heads=4", "model.vocab_size=101",
                         "model.d_ff=80"])[0]["model"]


def token_by_token(q, k, v, g, beta):
    """The rule as it is written, in fp64: y [d, t, Hv, Ev] and the state after the last token."""
    q, k, v, g, beta = (x.double() for x in (q, k, v, g, beta))
    S = q.new_zeros(len(q), q.shape[2], k.shape[3], v.shape[3])
    y = []
    for t in range(q.shape[1]):
        S = S * g[:, t].exp()[..., None, None]
        correction = beta[:, t, :, None] * (v[:, t] - torch.einsum("dhkv,dhk->dhv", S, k[:, t]))
        S = S + torch.einsum("dhk,dhv->dhkv", k[:, t], correction)
        y.append(torch.einsum("dhkv,dhk->dhv", S, q[:, t]) / q.shape[3] ** 0.5)
    return torch.stack(y, 1), S


@pytest.mark.parametrize("n_tokens", [1, 64, 65, 300])
@pytest.mark.parametrize("decay", [0.01, 5.0])
def test_chunked_delta_rule_is_the_rule_token_by_token(n_tokens, decay):
    """Outputs, states and gradients, of sequences shorter and longer than a chunk."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(2, n_tokens, 3, *shape, generator=generator)
    inputs = [delta_net.unit_length(draw(8)), delta_net.unit_length(draw(8)), draw(5), -decay * draw().exp(),
              draw().sigmoid()]
    inputs = [x.requires_grad_() for x in inputs]
    direction = draw(5)
    exact, exact_state = token_by_token(*inputs)
    wanted = torch.autograd.grad((exact * direction).sum() + exact_state.sum(), inputs)
    y, state = delta_net.chunked_delta_rule(*inputs)
    got = torch.autograd.grad((y * direction).sum() + state.sum(), inputs)
    assert close(y, exact, 1e-5) and close(state, exact_state, 1e-5)
    for a, b in zip(got, wanted):                        # a single token's gradient of g is 0
        assert float((a - b).abs().max()) < 1e-4 * max(1, float(b.abs().max()))


def test_packed_documents_of_a_hybrid_model_do_not_see_each_other():
    """Neither state nor convolution crosses a boundary: losses are those of each alone, and a changed neighbor
    changes none of their bits."""
    model = noisy(M.build(M_HYBRID))
    docs = documents(101, 9, 33, 2, 70, 3, 140, 70)
    alone = [model(row([d])) for d in docs]
    sum(a[0] for a in alone).backward()
    want = grads(model)
    loss_sum, _, stats = model(row(docs))
    loss_sum.backward()
    assert close(stats["loss"], torch.cat([a[2]["loss"] for a in alone]), 1e-5)
    assert all(close(g, want[name], 1e-4) for name, g in grads(model).items())
    changed = docs[:1] + documents(101, 33, seed=9) + docs[2:]
    again = model(row(changed))[2]["loss"]
    assert torch.equal(again[2:], stats["loss"][2:]) and torch.equal(again[:1], stats["loss"][:1])
    assert not torch.equal(again[1], stats["loss"][1])


def test_padding_and_idle_micro_batches_of_a_hybrid_model_count_nothing():
    model, batch = noisy(M.build(M_HYBRID)), row(documents(101, 9, 33))
    padded = dict(batch)
    for key in ("tokens", "targets", "loss_weights", "positions"):
        value = M.IGNORE_INDEX if key == "targets" else 0
        padded[key] = torch.nn.functional.pad(batch[key], (0, 100), value=value)
    model(batch)[0].backward()
    want = grads(model)
    model(padded)[0].backward()
    assert all(close(g, want[name], 1e-4) for name, g in grads(model).items())
    empty = {key: torch.zeros(0, dtype=torch.long) for key in ("tokens", "targets", "positions", "doc_ids")}
    empty |= {"loss_weights": torch.zeros(0), "cu_seqlens": torch.zeros(1, dtype=torch.int32), "max_seqlen": 0}
    loss_sum, _, _ = model(empty)
    loss_sum.backward()
    got = grads(model)
    assert loss_sum == 0 and got.keys() == want.keys() and not any(g.any() for g in got.values())


def test_generate_keeps_the_states_of_a_hybrid_model():
    """Each step's logits are those of the whole sequence computed anew, also from a prompt shorter than the
    convolution."""
    model = noisy(M.build(M_HYBRID)).eval()
    prompts = documents(101, 1, 90, 2, 64, seed=3)
    answers = M.generate_all(model, prompts, 20, ())
    for prompt, answer in zip(prompts, answers):
        with torch.no_grad():
            logits = model.logits(M.pack_prompts([prompt + answer]))
        assert logits[len(prompt) - 1:-1].argmax(-1).tolist() == answer


def test_recompute_of_a_hybrid_model_changes_nothing():
    model, batch = noisy(M.build(M_HYBRID)), row(documents(101, 70, 90))
    model(batch)[0].backward()
    want = grads(model)
    model.recompute = 2
    model(batch)[0].backward()
    assert all(torch.equal(g, want[name]) for name, g in grads(model).items())


def test_new_weights_of_a_delta_net_have_decays_that_remember():
    """Norms multiply by 1; a token keeps between 0.2 and 0.999 of the state."""
    block = M.build(M_HYBRID | {"linear_num_value_heads": 64}).blocks[0]
    assert (block.norm1.weight == 0).all() and (block.attn.norm_weight == 1).all()
    kept = (-block.attn.decay.A_log.exp() * torch.nn.functional.softplus(block.attn.decay.dt_bias)).exp()
    assert 0.2 < kept.min() < 0.6 and 0.97 < kept.max() < 1
    assert 0.4 < block.attn.conv_weight.abs().max() < 0.5


def test_new_weights_that_write_to_the_residual_stream_are_narrower_by_depth():
    m = M_HYBRID | {"init_by_depth": True, "d_model": 256}
    wide, narrow = [M.build(m | {"n_layers": n}).blocks[0].attn.out_proj.weight for n in (2, 8)]
    assert float((wide.std() / narrow.std()).detach()) == pytest.approx(2, rel=1e-4)


def test_new_weights_of_an_embedding_may_have_the_names_of_a_delta_nets(monkeypatch):
    class Convolved(torch.nn.Module):
        init_std = 0.0

        def __init__(self, m):
            super().__init__()
            self.conv_weight = torch.nn.Parameter(torch.empty(4, 3))
    monkeypatch.setitem(M.EMBEDDINGS, "convolved", Convolved)
    assert not M.build(M_HYBRID | {"embed": "convolved"}).embedding.conv_weight.any()


@pytest.mark.parametrize("targets", [[], ["in_proj_qkv", "out_proj", "q_proj", "down_proj"]])
def test_adapters_of_both_kinds_of_blocks_load_in_peft(tmp_path, targets):
    """Two steps, then equal logits in PEFT, in the merged model, and in our own."""
    base = tmp_path / "base"
    M.save_pretrained(noisy(M.build(M_HYBRID)).get_parameter, M_HYBRID, base)
    cfg = configs.load([f"model.init_from={base}", "device=cpu", "dtype=float32", "shard.lora.r=4",
                        f"shard.lora.targets={json.dumps(targets)}"])[0]
    model = shard.parallelize(M.build_on_meta(cfg["model"]), cfg, M.weights_reader(cfg["model"], 0).read)
    randomize(trained(model).values(), std=0.02)
    optimizer = train.make_optimizer(model, cfg)
    before = {name: p.clone() for name, p in trained(model).items()}
    for _ in range(2):
        train.train_step(model, optimizer, [row(documents(101, 30, 80))], 108.0, 1e-3, cfg)
    assert all(not torch.equal(p, before[name]) for name, p in trained(model).items())
    shard.save_adapter(model, cfg["shard"]["lora"], tmp_path / "adapter", base)
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    every = ["down_proj", "gate_proj", "in_proj_a", "in_proj_b", "in_proj_qkv", "in_proj_z", "k_proj", "o_proj",
             "out_proj", "q_proj", "up_proj", "v_proj"]
    assert saved["target_modules"] == sorted(targets or every)
    logits = our_logits(model)
    assert apart(logits, their_logits(load_in_peft(base, tmp_path / "adapter"))) < 1e-4
    read = shard.MergedWeights(model, M.weights_reader(model.cfg, 0).read).read
    M.save_pretrained(read, model.cfg, tmp_path / "merged", base)
    assert apart(logits, our_logits(M.load(tmp_path / "merged")[0])) < 1e-4
    assert apart(logits, our_logits(M.load(base)[0])) > 1e-3


def test_a_run_of_a_hybrid_model_does_not_depend_on_its_micro_batches_and_resumes_bitwise(tiny):
    losses = {}
    for out, keys in {"wide": [], "narrow": ["micro_tokens=210"], "in parts": ["save_every=4"]}.items():
        cfg, _, explicit = tiny(*HYBRID, "max_steps=6", "eval_every=0", *keys, out=out)
        train.main(cfg, explicit)
        if out == "in parts":
            [last] = [path for path in checkpoint.list_checkpoints(cfg["out_dir"]) if path.name == "00000006"]
            checkpoint.shutil.rmtree(last)
            train.main(cfg, explicit)
        losses[out] = [r["loss"] for r in log.read(cfg["out_dir"]) if r["step"]]
    assert losses["narrow"] == pytest.approx(losses["wide"], rel=1e-5)
    assert losses["in parts"][-6:] == losses["wide"]


def test_flops_of_a_hybrid_model_are_counted_by_hand():
    model = M.build(M_HYBRID)
    mlp = 3 * 80 * 48
    attention = (4 * 16 * 2 + 2 * 2 * 16 + 4 * 16) * 48  # q and gate, k and v, o
    linear = (2 * 16 + 48 + 48 + 4 + 4 + 48) * 48        # q and k, v, z, b, a, out
    rule = 3 * 4 * 8 * 12 + (2 * 16 + 48) * 4            # reads, corrects, writes; the convolution
    pairs = 12 * 4 * 16 * (10 ** 2 + 20 ** 2) // 2       # of the one block with attention
    assert M.flops(model, [10, 20], 12) == 6 * (2 * mlp + attention + linear + rule) * 30 + 6 * 101 * 48 * 12 + pairs


def test_summary_names_the_parameters_of_both_kinds_of_blocks():
    text = M.summary(M.build_on_meta(M_HYBRID | {"n_layers": 4, "layer_types": M_HYBRID["layer_types"] * 2}))
    lines = [line.split() for line in text.splitlines()]
    assert ["blocks.*.attn.in_proj_qkv.weight", "80x48", "3,840", "x", "2"] in lines
    assert ["blocks.*.attn.gate_proj.weight", "64x48", "3,072", "x", "2"] in lines
    assert ["blocks.*.norm1.weight", "48", "48", "x", "4"] in lines


def test_config_json_of_qwen3_5_is_read_or_refused_by_name():
    def read(**keys):
        needed = dict(model_type="qwen3_5_text", vocab_size=101, hidden_size=64, num_hidden_layers=8,
                      num_attention_heads=4, intermediate_size=96)
        return configs.hf_config.translate(needed | keys, "f")
    every_fourth = [*["linear_attention"] * 3, "full_attention"]
    assert read()["layer_types"] == every_fourth and read()["partial_rotary_factor"] == 0.25
    every_other = ["linear_attention", "full_attention"]
    assert read(full_attention_interval=2)["layer_types"] == every_other
    assert read(full_attention_interval=2, layer_types=every_fourth * 2)["layer_types"] == every_fourth * 2
    rope = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5, "mrope_section": [11, 11, 10],
            "mrope_interleaved": True}
    assert read(rope_parameters=rope)["rope_theta"] == 1e7 and read(rope_parameters=rope)["rope_scaling"] is None
    for keys, name in (({"attn_output_gate": False}, "attn_output_gate"),
                       ({"layer_types": ["mamba"]}, "layer_types"), ({"model_type": "qwen3_5_moe_text"}, "model_type")):
        with pytest.raises(configs.UserError, match=name):
            read(**keys)


def test_weights_for_multi_token_prediction_are_ignored(tmp_path):
    """Qwen3.5's files have some; neither transformers nor this decoder computes with them."""
    ours, m, _, folder = pair("Qwen3.5 (text)")
    for path in (folder / "config.json", folder / "model.safetensors"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"mtp.fc.weight": torch.ones(3, 3)}, tmp_path / "model.safetensors", {"format": "pt"})
    model, _ = M.load(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), ours.parameters(), strict=True))


@pytest.mark.parametrize("keys, words", [
    (["model.linear_key_head_dim=8"], "model.linear_key_head_dim: .*linear_attention in model.layer_types"),
    ([*HYBRID, "model.linear_num_value_heads=3"], "model.linear_num_value_heads: .*multiple of")])
def test_keys_of_delta_nets_are_refused_where_they_fit_nothing(keys, words):
    with pytest.raises(configs.UserError, match=words):
        configs.load(keys)


@pytest.mark.skipif(not torch.cuda.is_available() or not delta_net.flash_kernel(),
                    reason="needs CUDA and flash-linear-attention")
def test_flash_kernel_computes_the_chunked_rule_to_rounding():
    draw = lambda *shape: torch.randn(2, 200, 4, *shape, device="cuda")
    inputs = [delta_net.unit_length(draw(64)), delta_net.unit_length(draw(64)), draw(64), -draw().exp() / 10,
              draw().sigmoid()]
    exact, exact_state = delta_net.chunked_delta_rule(*inputs)
    y, state = delta_net.flash_kernel()(*(x.bfloat16() for x in inputs[:3]), *inputs[3:], output_final_state=True)
    assert close(y.float(), exact, 2e-2) and close(state.float(), exact_state, 2e-2)


# --------------------------------------------------------------------------------------------------
# with a vision tower

VISION = dict(depth=1, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=4, out_hidden_size=48,
              num_position_embeddings=16)


def with_vision_tower(folder, **text):
    """One of transformers' models with a vision tower, saved: its text part has 259 tokens."""
    transformers = pytest.importorskip("transformers", reason="the reference, in requirements-dev.txt")
    text = QWEN3_5 | dict(vocab_size=259, bos_token_id=None, eos_token_id=2) | text
    config = transformers.AutoConfig.for_model("qwen3_5", text_config=text, vision_config=VISION, image_token_id=256,
                                               tie_word_embeddings=text["tie_word_embeddings"])
    config.text_config.rope_parameters |= {"mrope_section": [1, 1, 0], "mrope_interleaved": True}
    theirs = remembering(noisy(transformers.AutoModelForImageTextToText.from_config(config))).eval()
    theirs.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    return theirs


@pytest.mark.parametrize("tied", [False, True])
def test_the_text_part_of_a_model_with_a_vision_tower_is_trained_and_the_rest_carried_along(tmp_path, tied, chats):
    """From base to a LoRA run, its merged export, and its adapter: each is what transformers computes with."""
    transformers = pytest.importorskip("transformers", reason="the reference, in requirements-dev.txt")
    peft = pytest.importorskip("peft", reason="the reference, in requirements-dev.txt")
    base = with_vision_tower(tmp_path / "base", tie_word_embeddings=tied)
    ids = documents(259, 100)
    with torch.no_grad():
        before = base(torch.tensor(ids)).logits[0]
        assert close(M.load(tmp_path / "base")[0].logits(M.pack_prompts(ids)), before, 3e-5)
    cfg, _, explicit = configs.load([
        f"model.init_from={tmp_path / 'base'}", "shard.lora.r=2", "max_steps=2", "lr=0.01", "batch_size=4",
        f"data.train.chats.path={chats}", "data.tokenizer=bytes", f"data.cache_dir={tmp_path / 'tokens'}",
        f"out_dir={tmp_path / 'run'}", "dtype=float32", "save_every=0"])
    train.main(cfg, explicit)
    out = tmp_path / "run"
    merged, info = transformers.AutoModelForImageTextToText.from_pretrained(out / "hf", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    towers = [{name: p for name, p in model.state_dict().items() if ".visual." in name} for model in (base, merged)]
    assert towers[0] and all(torch.equal(p, towers[1][name]) for name, p in towers[0].items())
    assert (out / "hf" / "preprocessor_config.json").read_text() == "{}"
    rope = json.loads((out / "hf" / "config.json").read_text())["text_config"]["rope_parameters"]
    assert rope == base.config.text_config.rope_parameters
    with torch.no_grad():
        logits = M.load(out / "hf")[0].logits(M.pack_prompts(ids))
        assert close(logits, merged.eval()(torch.tensor(ids)).logits[0], 3e-5) and not close(logits, before, 1e-3)
        adapted = peft.PeftModel.from_pretrained(base, out / "adapter").eval()
        assert close(logits, adapted(torch.tensor(ids)).logits[0], 3e-5)


def test_the_text_part_of_a_model_with_a_vision_tower_is_exported_alone_as_another_family(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the reference, in requirements-dev.txt")
    base = with_vision_tower(tmp_path / "base")
    m = configs.load([f"model.init_from={tmp_path / 'base'}", "model.family=qwen3_5_text"])[0]["model"]
    M.save_pretrained(M.load(tmp_path / "base", m)[0].get_parameter, m, tmp_path / "out", tmp_path / "base")
    text = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor(documents(259, 100))
    with torch.no_grad():
        assert torch.equal(text(ids).logits, base(ids).logits)
    assert json.loads((tmp_path / "out" / "config.json").read_text()).keys().isdisjoint({"text_config", "vision_config"})


def test_a_model_with_a_vision_tower_is_refused_where_its_rest_is_not_known(tmp_path):
    """As a new model, without its base, and if it ties the head in the whole and not in its text part."""
    with pytest.raises(configs.UserError, match="model.family: .*only a pretrained model has"):
        configs.load(["model.family=qwen3_5", "model.d_model=64", "model.n_heads=4"])
    with_vision_tower(tmp_path / "base")
    model, m = M.load(tmp_path / "base")
    with pytest.raises(configs.UserError, match="model.init_from: .*gone must exist .*model.visual"):
        M.save_pretrained(model.get_parameter, m, tmp_path / "out", tmp_path / "gone")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    with pytest.raises(configs.UserError, match="text_config.tie_word_embeddings must be true"):
        configs.hf_config.translate(config | {"tie_word_embeddings": True}, "f")


def test_save_pretrained_keeps_the_decay_of_a_bf16_model_in_fp32(tmp_path):
    model = noisy(M.build(M_HYBRID))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"dtype": "bfloat16"}')
    M.save_pretrained(model.get_parameter, M_HYBRID, tmp_path / "out", tmp_path / "base")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    kept = {name for name, t in tensors.items() if t.dtype == torch.float32}
    assert kept == {"model.layers.0.linear_attn.A_log", "model.layers.0.linear_attn.norm.weight"}
    assert torch.equal(tensors["model.layers.0.linear_attn.A_log"], model.blocks[0].attn.decay.A_log)


def test_num_graphs_of_a_hybrid_model_does_not_grow_with_the_layers():
    """The delta rule is outside of what is compiled; equal blocks share a graph of each half."""
    def graphs_of(layers):
        model = M.build(M_HYBRID | {"n_layers": layers, "layer_types": M_HYBRID["layer_types"]})
        torch._dynamo.reset()
        for block in model.blocks:    # traced as by inductor, but then run as it is
            block.pre_attention = torch.compile(block.pre_attention, backend="eager", fullgraph=True)
            block.post_attention = torch.compile(block.post_attention, backend="eager", fullgraph=True)
        before = shard.num_graphs()
        model(row(documents(101, 30, 70)))[0].backward()
        return shard.num_graphs() - before
    assert graphs_of(2) == graphs_of(6) == 4
