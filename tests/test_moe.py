"""families/moe.py: routing, the loss that balances experts, adapters, quantization, optimizers."""
import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import configs, log, model as M, shard, train
from families import expert_files, moe
from test_model import apart, documents, grads, noisy, row

SMALL = ["model.family=qwen3_moe", "model.n_layers=2", "model.d_model=64", "model.n_heads=4",
         "model.n_kv_heads=2", "model.vocab_size=101", "model.d_ff=80", "model.d_expert=32",
         "model.n_experts=6", "model.n_experts_per_token=2", "device=cpu", "dtype=float32"]
LENGTHS = (9, 33, 2, 70, 12)


def small(*more):
    """(cfg, a model with new weights that are not special)"""
    cfg = configs.load([*SMALL, *more])[0]
    return cfg, noisy(M.build(cfg["model"])).train()


def parallelized(*more):
    """(cfg, a model as training begins)"""
    cfg = configs.load([*SMALL, *more])[0]
    model = M.build_on_meta(cfg["model"])
    return cfg, shard.parallelize(model, cfg, M.NewWeights(cfg["model"], 0).read).train()


def plain_moe(mlp, x):
    """A mixture of experts as the formula has it, token by token."""
    outputs = []
    for token in x:
        probs = (mlp.router.weight @ token).softmax(0)
        weights, chosen = probs.topk(mlp.n_experts_per_token)
        if mlp.norm_topk_prob:
            weights = weights / weights.sum()
        y = 0
        for weight, e in zip(weights, chosen.tolist()):
            gate, up, down = [layer.weight.chunk(mlp.n_experts)[e] for layer in mlp.experts.children()]
            y = y + weight * (down @ (torch.nn.functional.silu(gate @ token) * (up @ token)))
        outputs.append(y)
    return torch.stack(outputs)


# --------------------------------------------------------------------------------------------------
# routing and experts

@pytest.mark.parametrize("norm", ["true", "false"])
def test_moe_is_its_formula(norm):
    """Output and gradients of a mixture are those of the formula, computed token by token."""
    _, model = small(f"model.norm_topk_prob={norm}")
    mlp = model.blocks[0].mlp
    x = torch.randn(17, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    tensors = [x, *mlp.parameters()]
    results = []
    for y in (mlp(x), plain_moe(mlp, x)):
        results.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
    assert all(apart(got, wanted) < 1e-5 for got, wanted in zip(*results))
    assert mlp(x[:0]).shape == (0, 64)


@pytest.mark.parametrize("widths", [(64, 32), (20, 6), (3, 5)])
def test_grouped_matmul_multiplies_each_experts_rows(widths):
    """With torch's grouped_mm, and with the loop where rows are no multiples of 16 bytes."""
    n_in, n_out = widths
    x = torch.randn(11, n_in, requires_grad=True)
    matrices = torch.randn(4, n_in, n_out, requires_grad=True)
    y = moe.grouped_matmul(x, matrices, torch.tensor([2, 2, 9, 11], dtype=torch.int32))
    wanted = torch.cat([x[:2] @ matrices[0], x[2:9] @ matrices[2], x[9:] @ matrices[3]])
    assert torch.allclose(y, wanted, atol=1e-5)
    for got, want in zip(torch.autograd.grad(y.square().sum(), (x, matrices)),
                         torch.autograd.grad(wanted.square().sum(), (x, matrices))):
        assert torch.allclose(got, want, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# the loss that balances experts

@pytest.mark.parametrize("n", [1, 70])
def test_router_loss_of_one_document_is_that_of_transformers(n):
    """Of one block: transformers averages f and P over blocks first, and we average the losses."""
    reference = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    _, model = small()
    batch = row(documents(101, n + 1))
    with moe.record_routing(model.blocks) as routing:
        model.hidden(batch)
    losses = []
    for probs, experts in routing:
        losses.append(reference.load_balancing_loss_func((probs.detach().log(),), 6, 2))
        got, tokens = moe.router_loss([(probs, experts)], batch, 0.1)
        assert got.item() == pytest.approx(0.1 * n * float(losses[-1]), rel=1e-5)
        assert tokens.sum() == 2 * n
    got, _ = moe.router_loss(routing, batch, 1.0)
    assert got.item() == pytest.approx(n * float(sum(losses)) / 2, rel=1e-5)


def test_router_loss_does_not_depend_on_micro_batches_and_padding():
    """Gradients of documents in one micro-batch, in several, and with padding are equal."""
    _, model = small("model.router_aux_loss_coef=1")
    docs = documents(101, *LENGTHS)
    batch = row(docs)
    padded = dict(batch)
    for key in ("tokens", "targets", "loss_weights", "positions"):
        padded[key] = torch.nn.functional.pad(batch[key], (0, 7), value=1)
    padded["targets"][-7:] = M.IGNORE_INDEX
    results = []
    for batches in ([batch], [row(docs[:2]), row(docs[2:])], [row([doc]) for doc in docs], [padded]):
        for each in batches:
            model(each)[0].backward()
        results.append((model.expert_tokens.clone(), grads(model)))
        model.expert_tokens = 0
    wanted_tokens, wanted = results[0]
    for tokens, gradients in results[1:]:
        assert torch.equal(tokens, wanted_tokens) and tokens.sum() == 2 * 2 * (sum(LENGTHS) - 5)
        assert all(apart(gradients[name], wanted[name]) < 1e-4 for name in wanted)


def test_router_loss_changes_gradients_and_not_the_loss():
    """It adds coef * its gradient, with recomputed activations too; the loss is that of targets."""
    _, model = small("model.router_aux_loss_coef=0")
    batch = row(documents(101, *LENGTHS))
    results = []
    for coef, recompute in ((0.0, 0), (0.5, 0), (0.5, 2)):
        model.cfg = model.cfg | {"router_aux_loss_coef": coef}
        model.recompute = recompute
        loss_sum, _, stats = model(batch)
        loss_sum.backward()
        results.append((float(loss_sum), float(stats["loss"].sum()), grads(model)))
        assert all(block.mlp.routing is None for block in model.blocks)
    with moe.record_routing(model.blocks) as routing:
        model.hidden(batch)
    router = model.blocks[1].mlp.router.weight
    extra = torch.autograd.grad(moe.router_loss(routing, batch, 0.5)[0], router)[0]
    name = "blocks.1.mlp.router.weight"
    assert results[0][:2] == pytest.approx(results[1][:2])
    assert results[0][:2] == pytest.approx(results[2][:2])
    assert apart(results[1][2][name], results[0][2][name] + extra) < 1e-5
    assert all(apart(results[2][2][key], g) < 1e-5 for key, g in results[1][2].items())
    with torch.no_grad():
        assert float(model.eval()(batch)[0]) == pytest.approx(results[0][0])


def test_router_loss_balances_experts():
    """Steps along its gradient bring the fullest expert close to the mean."""
    cfg, model = small("model.router_aux_loss_coef=1")
    batch = row(documents(101, 200, 300)) | {"loss_weights": torch.ones(498)}
    optimizer = torch.optim.Adam([block.mlp.router.weight for block in model.blocks], lr=0.02)
    loads = []
    for _ in range(30):
        loss_sum, weight_sum, _ = model(batch)
        loads.append(float(train.expert_load(model)))
        optimizer.zero_grad()
        (loss_sum / weight_sum).backward()
        optimizer.step()
    assert loads[0] > 1.5 and loads[-1] < 1.3 and model.expert_tokens == 0


# --------------------------------------------------------------------------------------------------
# counting

def test_flops_and_summary_count_the_experts_that_a_token_uses():
    cfg, model = small()
    attention = (4 + 2 * 2) * 16 * 64 + 64 * 64
    per_block = attention + 6 * 64 + 2 * 3 * 64 * 32
    pairs = 6 * 2 * 4 * 16 * 100
    assert M.flops(model, [10], 4) == 6 * 2 * per_block * 10 + 6 * 101 * 64 * 4 + pairs
    total = sum(p.numel() for p in model.parameters())
    active = total - 2 * 4 * 3 * 64 * 32
    lines = M.summary(model)
    assert f"{active:,}" in lines and "(2 of 6 experts)" in lines and "6 experts of 32 gated" in lines


# --------------------------------------------------------------------------------------------------
# optimizers, torch.compile

def test_muon_orthogonalizes_each_expert_by_itself():
    cfg, model = small("optimizer=muon", "weight_decay=0")
    p = model.blocks[0].mlp.experts.gate_proj.weight
    start = p.detach().clone()
    optimizer = train.make_optimizer(model, cfg)
    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    change = (p.detach() - start) / cfg["lr"]
    for of_expert, grad in zip(change.chunk(6), p.grad.chunk(6)):
        wanted = -0.2 * 8 * train.newton_schulz(grad[None])[0]           # 8: sqrt of the larger side
        assert apart(of_expert, wanted) < 0.1            # bf16
        assert torch.linalg.svdvals(of_expert / 1.6)[-1] > 0.5


def test_compile_blocks_leaves_out_the_experts_and_changes_nothing(monkeypatch):
    """Traced as by inductor, but then run as it is, which takes seconds instead of a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    batch = row(documents(101, *LENGTHS))
    results = []
    for compile_it in ("false", "true"):
        _, model = parallelized(f"shard.compile={compile_it}", "model.router_aux_loss_coef=1")
        loss_sum, *_ = model(batch)
        loss_sum.backward()
        results.append((loss_sum, grads(model)))
    assert apart(results[0][0], results[1][0]) < 1e-5
    assert all(apart(results[1][1][name], g) < 1e-4 for name, g in results[0][1].items())


# --------------------------------------------------------------------------------------------------
# adapters and quantization

def save_base(folder, family="qwen3_moe", *more):
    m = configs.load([*SMALL, f"model.family={family}", *more])[0]["model"]
    M.save_pretrained(noisy(M.build(m)).get_parameter, m, folder)
    return folder


def adapted(base, *more):
    """(a model with adapters that are not 0, its lora section)"""
    argv = [f"model.init_from={base}", "device=cpu", "dtype=float32", "shard.lora.r=3", *more]
    cfg = configs.load(argv)[0]
    model = M.build_on_meta(cfg["model"])
    shard.parallelize(model, cfg, M.PretrainedWeights(base, cfg["model"]).read)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                p.normal_(0, 0.1, generator=torch.Generator().manual_seed(p.numel()))
    return model, cfg["shard"]["lora"]


def our_logits(model):
    with torch.no_grad():
        return model.logits(M.pack_prompts(documents(101, 40)))


@pytest.mark.parametrize("family, more", [
    ("qwen3_moe", []), ("qwen3_moe", ["shard.lora.targets=[gate_proj, up_proj, down_proj]"]),
    ("olmoe", ["model.d_expert=80"])])
def test_adapters_of_experts_load_in_peft_and_again(tmp_path, family, more):
    """PEFT computes the same logits with them, and so does the merged model, and a new start."""
    peft = pytest.importorskip("peft", reason="the reference, in requirements-dev.txt")
    transformers = pytest.importorskip("transformers")
    sizes = [key for key in more if key.startswith("model.")]
    base = save_base(tmp_path / "base", family, *sizes)
    keys = [key for key in more if not key.startswith("model.")]
    model, lora_cfg = adapted(base, *keys)
    shard.save_adapter(model, lora_cfg, tmp_path / "adapter", base)
    wanted = our_logits(model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert apart(theirs(torch.tensor(documents(101, 40))).logits[0], wanted) < 1e-5
    merged = shard.MergedWeights(model, M.PretrainedWeights(base, model.cfg).read)
    M.save_pretrained(merged.read, model.cfg, tmp_path / "merged", base)
    plain, _ = M.load(tmp_path / "merged")
    assert apart(our_logits(plain), wanted) < 1e-5
    assert apart(our_logits(M.load(base)[0]), wanted) > 1e-2
    argv = [f"model.init_from={base}", f"shard.lora.init_from={tmp_path / 'adapter'}", "device=cpu", "dtype=float32"]
    cfg = configs.load(argv)[0]
    again = shard.parallelize(M.build_on_meta(cfg["model"]), cfg,
                              M.PretrainedWeights(base, cfg["model"]).read)
    assert torch.equal(our_logits(again), wanted)


def test_add_lora_leaves_out_experts_that_files_have_in_one_tensor(tmp_path):
    base = save_base(tmp_path / "base", "granitemoe", "model.d_expert=80")
    model, _ = adapted(base)
    layers = [name for name, module in model.named_modules() if isinstance(module, shard.LoRALinear)]
    assert len(layers) == 2 * 4 and all(".attn." in name for name in layers)
    with pytest.raises(configs.UserError, match="k_proj, o_proj, q_proj, v_proj; got input_linear"):
        adapted(base, "shard.lora.targets=[input_linear]")


@pytest.mark.parametrize("key, words", [
    ("shard.lora.targets=[gate_proj, up_proj]", "name all or none"), ("shard.lora.rslora=true", "PEFT scales")])
def test_add_lora_refuses_adapters_of_experts_that_peft_computes_otherwise(tmp_path, key, words):
    with pytest.raises(configs.UserError, match=words):
        adapted(save_base(tmp_path / "base"), key)


@pytest.mark.parametrize("kind, d_expert", [("nf4", 64), ("int8", 32)])
def test_quantized_experts_compute_with_their_dequantized_weights(kind, d_expert):
    """Logits and the gradients of adapters."""
    results = []
    for quantize in (kind, "none"):
        _, model = parallelized("shard.lora.r=4", f"shard.quantize={quantize}",
                                f"model.d_expert={d_expert}")
        if quantize == "none":
            with torch.no_grad():
                for name, weight in weights.items():
                    model.get_submodule(name).weight.copy_(weight)
        weights = {name: shard.dequantize(*module.stored()) for name, module in model.named_modules()
                   if isinstance(module, shard.FrozenLinear) and quantize != "none"}
        loss_sum, *_ = model(row(documents(101, *LENGTHS)))
        loss_sum.backward()
        results.append((loss_sum, grads(model)))
    assert apart(results[0][0], results[1][0]) < 1e-5
    assert all(apart(results[1][1][name], g) < 1e-4 for name, g in results[0][1].items() if g.any())


# --------------------------------------------------------------------------------------------------
# runs and files

@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "granitemoe", "gpt_oss"])
def test_a_run_with_experts_logs_their_load_and_exports(tiny, tmp_path, family):
    """Two steps under LoRA, whose export loads. expert_load is between 1 and n_experts / k."""
    base = save_base(tmp_path / "base", family, "model.d_expert=80", "model.vocab_size=300")
    cfg, _, explicit = tiny(f"model.init_from={base}", "model.n_layers=2", "model.d_model=64",
                            "max_steps=2", "checkpoint.export=true", "shard.lora.r=2")
    train.main(cfg, explicit)
    records = [record for record in log.read(cfg["out_dir"]) if "expert_load" in record]
    assert len(records) == 2 and all(1 <= record["expert_load"] <= 3 for record in records)
    assert (Path(cfg["out_dir"]) / "code" / "families" / "moe.py").is_file()
    trained, m = M.load(cfg["out_dir"])
    before, _ = M.load(base)
    assert m["n_experts"] == 6
    changed = [name for name, p in trained.named_parameters()
               if not torch.equal(p, before.get_parameter(name))]
    per_block = 4 if family in ("granitemoe", "gpt_oss") else 7
    assert len(changed) == 2 * per_block and not any("router" in name for name in changed)


@pytest.mark.parametrize("family, change, words", [
    ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers must be"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step must be 1"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv must be null"),
    ("gpt_oss", {"swiglu_alpha": 1.0}, "swiglu_alpha must be 1.702"),
    ("gpt_oss", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config: quantized")])
def test_read_model_refuses_what_experts_do_not_compute(tmp_path, family, change, words):
    more = [] if family == "qwen3_moe" else ["model.d_expert=80"]
    base = save_base(tmp_path, family, *more)
    config = json.loads((base / "config.json").read_text()) | change
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(configs.UserError, match=words):
        M.load(base)


@pytest.mark.parametrize("key, words", [
    ("model.n_experts_per_token=7", "n_experts_per_token: must be at most 6"),
    ("model.n_experts=0", "model.(n_experts_per_token|d_expert): .* has no effect without experts"),
    ("model.glu=false", "model.glu")])
def test_check_model_refuses_experts_that_do_not_exist(key, words):
    with pytest.raises(configs.UserError, match=words):
        configs.load([*SMALL, key])


def test_check_model_refuses_another_activation_with_swiglu_limit():
    """Experts with a limit compute silu's variant, whatever model.activation is."""
    with pytest.raises(configs.UserError, match="model.activation: must be silu"):
        configs.load([*SMALL, "model.swiglu_limit=7.0", "model.activation=relu"])
    with pytest.raises(configs.UserError, match="model.swiglu_limit: .* has no effect without experts"):
        configs.load(["model.swiglu_limit=7.0"])


# --------------------------------------------------------------------------------------------------
# gpt-oss

def save_gpt_oss(folder):
    """A model with random weights, saved by transformers: (it, the folder)."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        "gpt_oss", hidden_size=64, intermediate_size=32, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=101, num_local_experts=4,
        num_experts_per_tok=2, sliding_window=8, pad_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    theirs = noisy(transformers.AutoModelForCausalLM.from_config(config).bfloat16())
    theirs.save_pretrained(folder)
    return theirs


def test_pretrained_weights_reads_mxfp4_as_transformers_does(tmp_path, monkeypatch):
    """Any rows of them; the export is bf16, with the same numbers and without the quantization."""
    reference = pytest.importorskip("transformers.integrations.mxfp4")
    save_gpt_oss(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    wanted = {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "experts.down_proj"))]:
        X, n_in, n_out = tensors.pop(name).shape
        blocks = torch.randint(256, (X, n_out, n_in // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(118, 124, (X, n_out, n_in // 32), generator=generator, dtype=torch.uint8)
        wanted[name] = reference.convert_moe_packed_tensors(blocks, scales)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    decoded = []
    decode = expert_files.decode_mxfp4
    monkeypatch.setattr(expert_files, "decode_mxfp4", lambda x: decoded.append(len(x)) or decode(x))
    model, m = M.load(tmp_path)
    assert sum(decoded) == sum(tensor.shape[0] * tensor.shape[2] for tensor in wanted.values())    # each row once
    name = "model.layers.1.mlp.experts.gate_up_proj"
    up = wanted[name][2][:, 1::2].T.float()              # of expert 2
    parameter = "blocks.1.mlp.experts.up_proj.weight"
    assert torch.equal(model.get_parameter(parameter)[64:96], up)
    assert torch.equal(M.PretrainedWeights(tmp_path, m).read(parameter, 70, 90), up[6:26])
    M.save_pretrained(model.get_parameter, m, tmp_path / "out", tmp_path)
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(exported[name], tensor) for name, tensor in wanted.items())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
