"""shard.py in one process: LoRA, precision, compilation, predicted memory."""
import json, os, re, shutil

import pytest
import torch

import configs, launch, model as M, shard, train

TINY = configs.load(["model.n_layers=2", "model.d_model=48", "model.n_heads=4",
                     "model.n_kv_heads=2", "model.vocab_size=101"])[0]["model"]


def micro_batch():
    batch = M.pack_prompts([list(range(20)), list(range(30, 70))])
    return batch | {"targets": batch["tokens"].roll(1), "loss_weights": torch.ones(60),
                    "doc_ids": torch.arange(2)}


def lora_section(r=4, alpha=8.0, **more):
    return configs.load([])[0]["shard"]["lora"] | {"r": r, "alpha": alpha, **more}


def model_with_lora(targets, **more):
    model = M.build_on_meta(TINY)
    shard.add_lora(model, lora_section(targets=targets, **more))
    shard.load_weights(model.to_empty(device="cpu"), M.NewWeights(TINY, 0).read, 0)
    return model


def parallelized(*more):
    """Return (cfg, its model with new weights, ready for training)."""
    cfg = configs.load(["model.d_model=32", "model.n_heads=4", "device=cpu", "dtype=float32",
                        *more])[0]
    model = M.build_on_meta(cfg["model"])
    return cfg, shard.parallelize(model, cfg, M.NewWeights(cfg["model"], 0).read)


# --------------------------------------------------------------------------------------------------
# LoRA

def test_add_lora_changes_nothing_at_first_and_trains_adapters_only():
    plain = M.build(TINY)
    model = model_with_lora([])
    assert torch.equal(plain(micro_batch())[0], model(micro_batch())[0])
    model(micro_batch())[0].backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert all(shard.is_adapter(name) for name in trained)
    assert len(trained) == 2 * 2 * 7    # per block: A and B of q, k, v, o, gate, up, down
    in_plus_out = (48 + 48) + 2 * (48 + 24) + (48 + 48) + 2 * (48 + 128) + (128 + 48)
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert n_trained == 2 * 4 * in_plus_out


def test_add_lora_refuses_a_target_that_no_layer_has():
    with pytest.raises(configs.UserError, match="shard.lora.targets: .*q_proj.*; got q_prj"):
        shard.add_lora(M.build_on_meta(TINY), lora_section(targets=["q_prj"]))


@pytest.mark.parametrize("targets", [[], ["q_proj", "v_proj"], ["k_proj", "gate_proj", "o_proj"]])
def test_merged_weights_give_a_plain_model_with_the_same_logits(targets):
    model = model_with_lora(targets)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                p.normal_(0, 0.1)
    merged = M.build(TINY, seed=1)
    read = shard.MergedWeights(model, M.NewWeights(TINY, 0).read).read
    M.load_weights(merged, lambda name, start, end: read(name)[start:end])
    assert torch.allclose(merged.logits(micro_batch()), model.logits(micro_batch()), atol=1e-5)
    plain = M.build(TINY)
    assert not torch.allclose(merged.logits(micro_batch()), plain.logits(micro_batch()), atol=1e-3)


@pytest.mark.parametrize("base, written", [
    (configs.HERE.parent / "data" / "base", str(configs.HERE.parent / "data" / "base")),
    (os.path.relpath(configs.HERE), str(configs.HERE)),
    ("owner/name", "owner/name"), ("", None), (None, None)])
def test_save_adapter_names_the_base(tmp_path, base, written):
    """A folder by its absolute path, a hub id as it is; null if the base is drawn from the seed.

    The weights have the permissions of other files."""
    model = model_with_lora(["q_proj"])
    shard.save_adapter(model, lora_section(), tmp_path, base)
    config_file = tmp_path / "adapter_config.json"
    assert json.loads(config_file.read_text())["base_model_name_or_path"] == written
    weights = tmp_path / "adapter_model.safetensors"
    assert weights.stat().st_mode == config_file.stat().st_mode


def test_init_adapters_draws_an_adapter_whatever_else_is_adapted():
    only_v = model_with_lora(["v_proj"])
    everything = model_with_lora([])
    assert torch.equal(only_v.blocks[0].attn.v_proj.lora_A,
                       everything.blocks[0].attn.v_proj.lora_A)


def randomize_adapters(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                p.normal_(0, 0.1, generator=generator)
    return model


def test_add_lora_with_rslora_divides_alpha_by_the_root_of_r():
    batch = micro_batch()
    by_root = randomize_adapters(model_with_lora([], rslora=True))
    doubled = randomize_adapters(model_with_lora([], alpha=16.0))    # r = 4 = 2 sqrt(r)
    assert torch.equal(by_root.logits(batch), doubled.logits(batch))


def test_lora_dropout_is_of_the_adapters_input_and_in_training_only():
    """Each adapter has noise of its own, the same with other targets."""
    model = randomize_adapters(model_with_lora([], dropout=0.25))
    plain = randomize_adapters(model_with_lora([]))
    batch = micro_batch()
    assert torch.equal(model(batch)[0], plain(batch)[0])    # no noise_seed
    noisy = batch | {"noise_seed": (0, 3)}
    assert not torch.allclose(model(noisy)[0], plain(noisy)[0])
    assert torch.equal(model.eval()(noisy)[0], plain.eval()(noisy)[0])

    layer = model.blocks[1].attn.q_proj
    x = torch.ones(1000, 48)
    seeds = torch.arange(1000, dtype=torch.int32)
    frozen = torch.nn.functional.linear(x, layer.weight)
    dropped = M.dropout(x, 0.25, M.hash_int32(seeds + 3 + layer.place))
    assert torch.allclose(layer(x, seeds), frozen + dropped @ layer.delta().T, atol=1e-5)
    assert (dropped == 0).float().mean() == pytest.approx(0.25, abs=0.01)
    assert dropped.unique().tolist() == pytest.approx([0.0, 4 / 3])
    places = [module.place for module in model.blocks[1].modules()
              if isinstance(module, shard.LoRALinear)]
    assert places == list(range(7))
    assert model_with_lora(["k_proj"]).blocks[0].attn.k_proj.place == places[1]


# --------------------------------------------------------------------------------------------------
# precision, compilation, recomputation

def test_parallelize_in_bf16_keeps_parameters_and_gradients_in_fp32():
    _, model = parallelized("model.vocab_size=101")
    exact = model(micro_batch())[0]
    _, model = parallelized("model.vocab_size=101", "dtype=bfloat16")
    loss = model(micro_batch())[0]
    loss.backward()
    assert 0 < abs(float(loss.detach() / exact.detach()) - 1) < 1e-2
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


def test_parallelize_under_lora_in_bf16_stores_frozen_matrices_in_bf16():
    _, model = parallelized("model.vocab_size=101", "dtype=bfloat16", "shard.lora.r=2")
    for p in model.parameters():
        is_frozen_matrix = not p.requires_grad and p.dim() == 2
        assert p.dtype == (torch.bfloat16 if is_frozen_matrix else torch.float32)


# --------------------------------------------------------------------------------------------------
# frozen parameters

def test_freeze_parameters_computes_no_gradient_and_has_no_optimizer_state():
    """The first matching group decides. Frozen matrices are stored in the compute dtype."""
    groups = ("param_groups=[{match: q_proj, lr: 0.5}, {match: 'embed|blocks', train: false}, "
              "{match: norm}]")
    cfg, model = parallelized("model.vocab_size=101", "dtype=bfloat16", groups)
    optimizer = train.make_optimizer(model, cfg)
    model(micro_batch())[0].backward()
    expected = {f"blocks.{i}.attn.q_proj.weight" for i in range(4)} | {"norm.weight"}
    params = dict(model.named_parameters())
    assert {name for name, p in params.items() if p.grad is not None} == expected
    assert set(optimizer.state) == {params[name] for name in expected}
    assert params["embed.weight"].dtype == torch.bfloat16
    assert params["blocks.0.attn.q_proj.weight"].dtype == torch.float32


@pytest.mark.parametrize("groups, words", [
    ("[{match: head, train: false}]", "param_groups: no parameter matches 'head'"),
    ("[{match: blocks}, {match: blocks.0, train: false}]", "no parameter matches 'blocks.0'"),
    ("[{match: '', train: false}]", "train: false leaves no parameter to train")])
def test_freeze_parameters_refuses_a_pattern_without_effect(groups, words):
    with pytest.raises(configs.UserError, match=words):
        parallelized("model.vocab_size=101", f"param_groups={groups}")


@pytest.mark.skipif(not shutil.which("g++"), reason="compiling for a CPU needs a C++ compiler")
def test_compile_blocks_makes_the_same_steps():
    """A graph of each half serves all blocks and lengths; equal to rounding."""
    def steps(*more):
        cfg, model = parallelized("model.vocab_size=50", "grad_clip=1.0", *more)
        optimizer = train.make_optimizer(model, cfg)
        figures = []
        for n in (20, 24, 33, 41):
            batch = M.pack_prompts([list(range(n)), [1, 2, 3]])
            batch |= {"targets": batch["tokens"].flip(0), "loss_weights": torch.ones(n + 3),
                      "doc_ids": torch.arange(2)}
            loss, grad_norm, *_ = train.train_step(model, optimizer, [batch], float(n), 1e-2, cfg)
            figures.append([float(loss), float(grad_norm)])
        return torch.tensor(figures)
    torch._dynamo.reset()
    graphs_before = shard.num_graphs()
    plain = steps()
    compiled = steps("shard.compile=true")
    assert torch.allclose(plain, compiled, rtol=1e-4)
    assert shard.num_graphs() - graphs_before == 2


@pytest.mark.parametrize("dropout", [0, 0.1])
def test_num_graphs_does_not_grow_with_the_layers_also_under_lora(dropout):
    """Equal blocks share what is compiled."""
    def graphs_of(layers):
        _, model = parallelized("model.vocab_size=70", f"model.n_layers={layers}", "shard.lora.r=2",
                                f"shard.lora.dropout={dropout}")
        torch._dynamo.reset()
        for block in model.blocks:    # traced as by inductor, but then run as it is
            block.pre_attention = torch.compile(block.pre_attention, backend="eager")
            block.post_attention = torch.compile(block.post_attention, backend="eager")
        graphs_before = shard.num_graphs()
        model(micro_batch() | {"noise_seed": (0, 1)})[0].backward()
        return shard.num_graphs() - graphs_before
    assert graphs_of(2) == graphs_of(10)


def test_choose_recompute_takes_as_few_blocks_as_make_a_step_fit(monkeypatch):
    """Numbers and false are respected nevertheless."""
    keys = ["model.vocab_size=50", "model.n_layers=4", "device=cpu"]
    cfg, model = parallelized(*keys)
    assert model.recompute == 0

    def predicted(recompute):
        cfg["shard"]["recompute"] = recompute
        _, held = shard.peak_phase(shard.predict_memory(cfg["model"], cfg))
        return sum(held.values())
    assert predicted(0) > predicted(1) > predicted(3) > predicted(4) == predicted(True)
    for budget, expected in ((predicted(3), 3), (predicted(3) - 1, 4), (1, 4)):
        monkeypatch.setattr(shard, "memory_budget", lambda device, budget=budget: budget)
        assert parallelized(*keys)[1].recompute == expected
    for value, expected in (("false", 0), ("true", 4), ("1", 1), ("2", 2), ("9", 4)):
        assert parallelized(*keys, f"shard.recompute={value}")[1].recompute == expected


@pytest.mark.parametrize("keys", [
    [], ["dtype=bfloat16", "model.resid_pdrop=0.1"],
    ["model.family=qwen3_moe", "model.n_experts=4", "model.d_expert=24"],
    ["model.family=qwen3_5_text", "model.layer_types=[linear_attention, full_attention]"]],
    ids=["llama", "bf16 and dropout", "experts", "delta-net"])
def test_parallelize_with_recompute_changes_no_bit_of_a_gradient(keys):
    def gradients(recompute):
        _, model = parallelized("model.vocab_size=101", *keys, f"shard.recompute={recompute}")
        model.train()(micro_batch() | {"noise_seed": (0, 1)})[0].backward()
        return [p.grad for p in model.parameters()]
    kept, selective, recomputed = map(gradients, ("false", "selective", "true"))
    for gradient, *others in zip(kept, selective, recomputed):
        assert all(torch.equal(gradient, other) for other in others)


def test_parallelize_refuses_selective_recompute_of_compiled_blocks():
    with pytest.raises(configs.UserError, match="shard.recompute: selective has no effect on comp"):
        parallelized("shard.recompute=selective", "shard.compile=true", "model.vocab_size=50")


# --------------------------------------------------------------------------------------------------
# sharded tensors and gradients, as they are on one rank (several: test_ranks.py)

def test_local_shard_of_a_plain_tensor_is_the_tensor():
    t = torch.arange(6.0).view(3, 2)
    local, start, end = shard.local_shard(t)
    assert torch.equal(local, t) and (start, end) == (0, 3)
    assert shard.is_writer(t) and shard.full_tensor(t) is t


def test_all_reduce_gradients_leaves_one_rank_alone():
    _, model = parallelized("model.vocab_size=101")
    shard.all_reduce_gradients(model)
    shard.check_replicas(model)
    assert all(p.grad is None for p in model.parameters())


def test_run_distributed_prints_the_text_of_sys_exit(tmp_path):
    """As Python does: the text on stderr, and exit status 1."""
    code = ("import sys, shard\n"
            "def main(cfg):\n"
            "    sys.exit('the reason')\n"
            "shard.run_distributed(main, {'device': 'cpu', 'dtype': 'float32'})\n")
    (tmp_path / "leave.py").write_text(code)
    for done in launch.run_ranks(2, [tmp_path / "leave.py"], PYTHONPATH=str(configs.HERE.parent)):
        assert done.returncode == 1 and "the reason\n" in done.stderr


# --------------------------------------------------------------------------------------------------
# predicted memory

@pytest.mark.parametrize("key, extra", [("model.attn_softcap=50.0", 0), ("model.attn_sinks=true", 2)])
def test_predict_memory_counts_no_probabilities_where_flex_attention_is_called(key, extra):
    """On CUDA in bf16, compiled: what plain attention takes. Sinks keep the output before and after they reduce it."""
    def activations(*keys, seq_len=1024):
        cfg = configs.load(["model.vocab_size=1000", "device=cuda", "dtype=bfloat16", f"data.seq_len={seq_len}",
                            "model.family=native", "model.max_len=4096", "shard.recompute=false", *keys])[0]
        per_token = shard.block_activation_bytes(shard.StepSize(cfg["model"], cfg, 1))
        return per_token, cfg["model"]["n_heads"] * cfg["model"]["head_dim"]
    plain, width = activations()
    assert activations(key) == activations(key, seq_len=4096) == (plain + extra * width, width)
    for keys in (["shard.compile=false"], ["dtype=float32"], ["model.attn_pdrop=0.1"]):
        assert activations(key, *keys, seq_len=4096)[0] > 2 * activations(key, *keys)[0]


def test_predict_memory_adds_up():
    cfg = configs.load(["model.vocab_size=1000", "dtype=float32", "device=cpu"])[0]
    parameters = list(M.build_on_meta(cfg["model"]).named_parameters())
    total = sum(p.numel() for _, p in parameters)

    def held_at(moment, gpus=1, **mesh):
        cfg["shard"]["mesh"] |= mesh
        return shard.predict_memory(cfg["model"], cfg, gpus)[moment]
    assert held_at("at the update") == {"weights": 4 * total, "optimizer": 8 * total,
                                        "gradients": 4 * total}
    assert held_at("at the update", 64, shard=64)["optimizer"] == 8 * total // 64
    replicated = held_at("at the loss", 8, shard=1)
    sharded = held_at("at the loss", 8, shard=8)
    assert replicated["optimizer"] == 8 * sharded["optimizer"]
    assert replicated["activations"] == sharded["activations"]
    assert replicated["gathered or cast"] == 0 < sharded["gathered or cast"]
    assert held_at("at the all-reduce", 8, shard=1)["gradients"] == 2 * 4 * total

    matrices = sum(p.numel() for name, p in parameters
                   if p.dim() == 2 and name.startswith("blocks"))
    for optimizer, expected in (("muon", 8 * total - 4 * matrices), ("sgd", 4 * total)):
        cfg["optimizer"] = optimizer
        assert held_at("at the update", 8, shard=8)["optimizer"] == expected // 8
    cfg["optimizer"] = "adamw"
    cfg["shard"]["recompute"] = True
    assert held_at("at the loss", 8)["activations"] < sharded["activations"] / 2
    cfg["shard"]["lora"] |= {"r": 4, "alpha": 8.0}
    assert held_at("at the loss", 8)["optimizer"] < sharded["optimizer"] / 5


def test_shard_script_prints_the_predicted_memory(script):
    out = script("shard.py", "configs/ft.yaml", "gpus=64")
    assert out.returncode == 0, out.stderr
    assert "each of 64 devices" in out.stdout and "optimizer" in out.stdout
    assert "shard.recompute=true predicts" in out.stdout
    out = script("shard.py", "configs/ft.yaml", "gpus=8", "device=cuda", "shard.recompute=true")
    assert "8 devices (cuda, replicate 8" in out.stdout
    assert "shard.recompute=true predicts" not in out.stdout


def table_of(capsys, *argv):
    """{(choice, shard.recompute): (GiB, fits, largest micro_tokens)} as printed by shard.py."""
    shard.main(argv)
    out = capsys.readouterr().out
    rows = re.findall(r"^  (\S.*?)  +(true|false) +([\d.,]+)  (yes|no) +(\S+)", out, re.M)
    return {(name, recompute): (float(gib.replace(",", "")), fits, tokens.replace(",", ""))
            for name, recompute, gib, fits, tokens in rows}


# few layers, for speed
SEVEN_BILLION = ["model.d_model=8192", "model.n_layers=8", "model.n_heads=64", "model.n_kv_heads=8",
                 "model.d_ff=28672", "model.vocab_size=32000", "model.tie_embeddings=false",
                 "device=cuda", "batch_size=64", "data.seq_len=1024", "data.tokenizer=bytes"]


def test_shard_script_compares_the_usual_choices(capsys):
    """Full fine-tuning of 7.5 billion weights does not fit 80 GiB; adapters do. The largest
    micro_tokens that fits is followed by one that does not."""
    table = table_of(capsys, *SEVEN_BILLION)
    full, recomputed = table["full fine-tuning", "false"], table["full fine-tuning", "true"]
    assert full[0] > recomputed[0] > 7.5e9 * 16 / 2**30
    assert full[1:] == recomputed[1:] == ("no", "none")
    lora = table["LoRA", "true"]
    assert 7.5e9 * 2 / 2**30 < lora[0] < table["LoRA", "false"][0] and lora[1] == "yes"
    # 64 documents of 1,024 tokens on one device: a step is one micro-batch
    assert lora[2] == "65536"
    largest = int(table["LoRA", "false"][2])
    assert 1024 < largest < 65536 and largest % 1024 == 0
    for micro_tokens, fits in ((largest, "yes"), (largest + 1024, "no")):
        again = table_of(capsys, *SEVEN_BILLION, f"micro_tokens={micro_tokens}")
        assert again["LoRA", "false"][1] == fits
    # a smaller card; more shards
    assert table_of(capsys, *SEVEN_BILLION, "memory=15")["LoRA", "true"][1:] == ("no", "none")
    on_eight = ["gpus=8", "shard.mesh.shard=8", "shard.lora.r=4"]
    sharded = table_of(capsys, *SEVEN_BILLION, *on_eight)
    assert sharded["full fine-tuning", "true"][1] == "yes"
    assert sharded["LoRA", "true"][0] < lora[0] - 5


def test_largest_micro_tokens_below_1024_is_a_power_of_two_and_at_least_a_document():
    cfg = configs.load(["model.vocab_size=1000", "device=cpu", "dtype=float32", "batch_size=64",
                        "data.seq_len=100", "shard.recompute=false"])[0]
    s = shard.StepSize(cfg["model"], cfg, 1)
    for largest in (128, 512, 1024, 3072):
        assert shard.largest_micro_tokens(s, shard.peak_bytes(s, largest)) == largest
    assert shard.largest_micro_tokens(s, shard.peak_bytes(s, 127)) == 0
    assert shard.largest_micro_tokens(s, 2**40) == 7168    # a whole step: 6,400


def test_shard_script_refuses_a_card_without_memory(script):
    out = script("shard.py", "configs/ft.yaml", "device=cpu", "memory=0")
    assert out.stderr == "error: memory: expected GiB above 0, got 0\n"


def test_shard_script_predicts_less_for_more_shards(script):
    def total(*keys):
        out = script("shard.py", "configs/ft.yaml", "device=cpu", "gpus=64", *keys).stdout
        return float(out.split("total")[1].split()[0].replace(",", ""))
    assert total("shard.mesh.shard=64") < total("shard.mesh.shard=8") < total()


def test_shard_script_refuses_an_impossible_mesh_in_one_line(script):
    for key, error in (("shard.mesh.shard=4", "shard.mesh.shard: 6 ranks are not a multiple of 4"),
                       ("shard.mesh={replicate: 2, shard: 2}", "shard.mesh: replicate 2 x shard 2 is not 6 ranks")):
        out = script("shard.py", "configs/ft.yaml", "device=cpu", "gpus=6", key)
        assert out.returncode == 1 and out.stderr.count("\n") == 1
        assert out.stderr.startswith(f"error: {error}")


@pytest.mark.parametrize("args", [[], ["--help"], ["configs/ft.yaml", "-h"]])
def test_shard_script_prints_how_to_start(script, args):
    out = script("shard.py", *args)
    assert out.returncode == 0 and "python shard.py configs/ft.yaml gpus=64" in out.stdout
