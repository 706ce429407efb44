"""LoRA adapters that go in and out: shard.lora.modules_to_save and init_from, with PEFT as the reference."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import configs, model as M, shard

SMALL = ["model.n_layers=2", "model.d_model=48", "model.n_heads=4", "model.vocab_size=101", "model.d_ff=64"]
BASES = {
    "tied": ["model.n_kv_heads=2"],
    "untied": ["model.n_kv_heads=2", "model.tie_embeddings=false", "model.pad_vocab_size_multiple=64"],
    "gpt2": ["model.family=gpt2", "model.norm=layernorm", "model.positions=learned", "model.qkv_bias=true",
             "model.out_bias=true", "model.mlp_bias=true", "model.glu=false", "model.activation=gelu_new"],
    "gpt_neox": ["model.family=gpt_neox", "model.activation=gelu", "model.glu=false", "model.norm=layernorm",
                 "model.parallel_residual=true", "model.qkv_bias=true", "model.out_bias=true", "model.mlp_bias=true",
                 "model.tie_embeddings=false"]}
TARGETS = {"tied": ["q_proj", "down_proj"], "untied": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"],
           "gpt_neox": ["query_key_value", "dense_h_to_4h"]}
IDS = [list(range(3, 40)), [1, 2, 100]]


def save_base(folder, kind):
    m = configs.load([*SMALL, *BASES[kind]])[0]["model"]
    M.save_pretrained(M.build(m).get_parameter, m, folder)
    return folder


def randomize(parameters, std=0.1):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn(p.shape, generator=generator) * std)


def our_model(base, *keys, n_vocab=101):
    """The model of a config, as training begins, and its lora section."""
    cfg = configs.load([f"model.init_from={base}", "device=cpu", "dtype=float32", *keys])[0]
    m = M.resolve_vocab_size(cfg["model"], n_vocab)
    model = M.build_on_meta(m)
    return shard.parallelize(model, cfg, M.weights_reader(m, 0).read), cfg["shard"]["lora"]


def our_logits(model):
    with torch.no_grad():
        return [model.logits(M.pack_prompts([ids])) for ids in IDS]


def their_logits(model):
    with torch.no_grad():
        return [model.eval()(torch.tensor([ids])).logits[0] for ids in IDS]


def apart(a, b):
    return max(float((x - y).abs().max()) for x, y in zip(a, b))


def load_in_peft(base, adapter, n_vocab=101):
    peft = pytest.importorskip("peft", reason="the reference, in requirements-dev.txt")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    if n_vocab > 101:
        theirs.resize_token_embeddings(n_vocab)
    return peft.PeftModel.from_pretrained(theirs, adapter)


def make_in_peft(base, adapter, **options):
    """Save an adapter that PEFT has made, with random numbers. Returns its logits."""
    peft = pytest.importorskip("peft", reason="the reference, in requirements-dev.txt")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    randomize(p for p in theirs.parameters() if p.requires_grad)
    logits = their_logits(theirs)
    theirs.save_pretrained(adapter)
    return logits


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# --------------------------------------------------------------------------------------------------
# modules_to_save

@pytest.mark.parametrize("kind, modules, parameters, in_config", [
    ("tied", "[embed_tokens]", {"embed.weight"}, ["embed_tokens", "lm_head"]),
    ("untied", "[embed_tokens, lm_head]", {"embed.weight", "head.weight"}, ["embed_tokens", "lm_head"]),
    ("untied", "[lm_head]", {"head.weight"}, ["lm_head"]),
    ("gpt2", "[wte, ln_f]", {"embed.weight", "norm.weight", "norm.bias"}, ["lm_head", "ln_f", "wte"])])
def test_modules_to_save_are_trained_saved_and_merged(tmp_path, kind, modules, parameters, in_config):
    """Beside the adapters, with new tokens; PEFT computes the same logits, and so does the merged model."""
    base = save_base(tmp_path / "base", kind)
    n_vocab = 101 if modules == "[lm_head]" else 103
    model, lora = our_model(base, "shard.lora.r=4", f"shard.lora.modules_to_save={modules}", n_vocab=n_vocab)
    assert {name for name in trained(model) if not shard.is_adapter(name)} == parameters
    assert all(p.dtype == torch.float32 for p in trained(model).values())
    randomize(trained(model).values())
    shard.save_adapter(model, lora, tmp_path / "adapter", base)
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["modules_to_save"] == in_config
    logits = our_logits(model)
    assert apart(logits, their_logits(load_in_peft(base, tmp_path / "adapter", n_vocab))) < 1e-4
    merged = M.build(model.cfg, seed=1)
    read = shard.MergedWeights(model, M.weights_reader(model.cfg, 0).read).read
    M.load_weights(merged, lambda name, start, end: read(name)[start:end])
    assert apart(logits, our_logits(merged)) < 1e-4
    assert apart(logits, our_logits(M.load(base, model.cfg)[0])) > 1e-2


def test_modules_to_save_refuses_a_module_that_does_not_exist(tmp_path):
    base = save_base(tmp_path / "base", "tied")
    with pytest.raises(configs.UserError, match="shard.lora.modules_to_save: .*embed_tokens, lm_head, norm; got wte"):
        our_model(base, "shard.lora.r=4", "shard.lora.modules_to_save=[wte]")


# --------------------------------------------------------------------------------------------------
# init_from

@pytest.mark.parametrize("kind, options", [
    ("tied", {"lora_dropout": 0.1, "use_rslora": True, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    ("untied", {"modules_to_save": ["embed_tokens", "lm_head"], "alpha_pattern": {"down_proj": 3}}),
    ("gpt2", {"fan_in_fan_out": True, "alpha_pattern": {"h.1.attn.c_attn": 3}}), ("gpt_neox", {"use_rslora": True})])
def test_load_adapter_from_peft_and_back(tmp_path, kind, options):
    base = save_base(tmp_path / "base", kind)
    want = make_in_peft(base, tmp_path / "in", r=3, lora_alpha=7, target_modules=TARGETS[kind], **options)
    model, lora = our_model(base, f"shard.lora.init_from={tmp_path / 'in'}")
    assert (lora["r"], lora["alpha"], lora["targets"]) == (3, 7.0, sorted(TARGETS[kind]))
    assert lora["dropout"] == options.get("lora_dropout", 0.0) and lora["rslora"] == ("use_rslora" in options)
    assert apart(our_logits(model), want) < 1e-4
    shard.save_adapter(model, lora, tmp_path / "out", base)
    assert apart(their_logits(load_in_peft(base, tmp_path / "out")), want) < 1e-4
    again, _ = our_model(base, f"shard.lora.init_from={tmp_path / 'out'}")
    assert apart(our_logits(again), want) < 1e-4


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("keys", [[], ["shard.lora.rslora=true", "shard.lora.dropout=0.2"]], ids=["", "rslora"])
def test_load_adapter_of_ours_through_peft(tmp_path, kind, keys):
    """The same numbers, also of layers that are one module in the files."""
    base = save_base(tmp_path / "base", kind)
    embedding = {"gpt2": "wte", "gpt_neox": "embed_in"}.get(kind, "embed_tokens")
    model, lora = our_model(base, "shard.lora.r=2", f"shard.lora.modules_to_save=[{embedding}]", *keys)
    randomize(trained(model).values())
    shard.save_adapter(model, lora, tmp_path / "ours", base)
    load_in_peft(base, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again, lora_again = our_model(base, f"shard.lora.init_from={tmp_path / folder}")
        assert trained(again).keys() == trained(model).keys()
        assert all(torch.equal(p, trained(model)[name]) for name, p in trained(again).items())
        assert [lora_again[key] for key in ("r", "alpha", "rslora", "dropout")] == [
            lora[key] for key in ("r", "alpha", "rslora", "dropout")]


def change_json(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_"


@pytest.mark.parametrize("keys, values, change, words", [
    (["shard.lora.r=8"], {}, None, "shard.lora.r: must be 4, as in the adapter .*adapter, or not set; got 8"),
    (["shard.lora.alpha=5"], {}, None, "shard.lora.alpha: must be 8.*got 5"),
    (["shard.lora.rslora=true"], {}, None, "shard.lora.rslora: must be false.*got true"),
    (["shard.lora.targets=[v_proj]"], {}, None, r"shard.lora.targets: must be .*q_proj.*got \['v_proj'\]"),
    ([], {"use_dora": True}, None, "adapter_config.json: use_dora must be false, or missing; got true"),
    ([], {"init_lora_weights": "pissa"}, None, "init_lora_weights must be true"),
    ([], {}, lambda t: t.pop(Q + "A.weight"), "shard.lora.init_from: .*layers.1.self_attn.q_proj.lora_A.weight is missing"),
    ([], {}, lambda t: t.update({Q + "A.weight": torch.ones(5, 48), Q + "B.weight": torch.ones(48, 5)}),
     "layers.1.self_attn.q_proj has rank 5 and does not split into adapters of rank 4"),
    ([], {}, lambda t: t.update({Q + "B.weight": torch.ones(7, 4)}), r"q_proj.lora_B.weight is \[7, 4\]"),
    ([], {}, lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(101, 48)}),
     "lm_head.weight is missing .the head is tied"),
    ([], {}, lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(101, 48),
                                 "base_model.model.lm_head.weight": torch.zeros(101, 48)}),
     "differs from the embedding"),
    ([], {}, lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 48)}),
     "shard.lora.targets: must be some of .*got lm_head")])
def test_init_from_refuses_what_it_cannot_continue(tmp_path, keys, values, change, words):
    """A contradiction by its key, another method by its key of adapter_config.json, a tensor by its name."""
    base = save_base(tmp_path / "base", "tied")
    model, lora = our_model(base, "shard.lora.r=4", "shard.lora.targets=[q_proj]")
    adapter = tmp_path / "adapter"
    shard.save_adapter(model, lora, adapter, base)
    change_json(adapter, **values)
    if change:
        change_tensors(adapter, change)
    with pytest.raises(configs.UserError, match=words) as error:
        our_model(base, f"shard.lora.init_from={adapter}", *keys)
    assert "\n" not in str(error.value)


def test_init_from_with_another_number_of_tokens(tmp_path):
    """Fewer than the adapter has are refused; of more, the new rows start at the base's mean."""
    base = save_base(tmp_path / "base", "tied")
    keys = ["shard.lora.r=4", "shard.lora.modules_to_save=[embed_tokens]"]
    model, lora = our_model(base, *keys, n_vocab=103)
    randomize(trained(model).values())
    shard.save_adapter(model, lora, tmp_path / "adapter", base)
    init_from = f"shard.lora.init_from={tmp_path / 'adapter'}"
    with pytest.raises(configs.UserError, match=r"\[103, 48\], and the model makes it \[101, 48\].*; its tokenizer "
                       "has more tokens: data.tokenizer=.*/adapter"):
        our_model(base, init_from)
    more, _ = our_model(base, init_from, n_vocab=104)
    assert torch.equal(more.embed.weight[:103], model.embed.weight)
    mean = M.load(base)[0].embed.weight.mean(0)
    assert torch.allclose(more.embed.weight[103], mean, atol=1e-6)


def test_init_from_refuses_the_adapter_of_the_same_out_dir(tmp_path):
    """The run would overwrite it."""
    base = save_base(tmp_path / "base", "tied")
    model, lora = our_model(base, "shard.lora.r=4")
    adapter = tmp_path / "run" / "adapter"
    shard.save_adapter(model, lora, adapter, base)
    with pytest.raises(configs.UserError, match="shard.lora.init_from: must be outside of out_dir, .*out_dir=NEW"):
        our_model(base, f"shard.lora.init_from={adapter}", f"out_dir={tmp_path / 'run'}")


def test_init_from_names_what_is_missing(tmp_path):
    base = save_base(tmp_path / "base", "tied")
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(configs.UserError, match="has no adapter_config.json; shard.lora.init_from=.*run/adapter"):
        configs.load([f"model.init_from={base}", f"shard.lora.init_from={run}"])
    with pytest.raises(configs.UserError, match="has no adapter_model.safetensors; name the folder"):
        configs.load([f"model.init_from={base}", f"shard.lora.init_from={run / 'adapter'}"])
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"1234")
    with pytest.raises(configs.UserError, match="adapter_model.safetensors: is damaged or incomplete"):
        configs.load([f"model.init_from={base}", f"shard.lora.init_from={run / 'adapter'}"])
