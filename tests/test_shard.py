"""shard.py: adapters, precision, and what a run will need."""
import shutil

import pytest
import torch

import configs, model as M, shard, train

M_TINY = configs.load(["model.n_layers=2", "model.d_model=48", "model.n_heads=4", "model.n_kv_heads=2",
                       "model.vocab_size=101"])[0]["model"]


def batch():
    b = M.as_batch([list(range(20)), list(range(30, 70))])
    return b | {"targets": b["tokens"].roll(1), "loss_weights": torch.ones(60), "doc_ids": torch.arange(2)}


def adapted(targets, r=4):
    model = M.build_on_meta(M_TINY)
    shard.add_lora(model, M_TINY, {"r": r, "alpha": 8.0, "targets": targets})
    return M.load_weights(model.to_empty(device="cpu"), shard.with_adapters(model, M.init_reader(M_TINY, 0), 0))


def prepared(*more):
    """-> (cfg, its model, new, as training takes it)"""
    c = configs.load(["model.d_model=32", "model.n_heads=4", "device=cpu", "dtype=float32", *more])[0]
    return c, shard.prepare(M.build_on_meta(c["model"]), c["model"], c, M.init_reader(c["model"], 0))


def test_new_adapters_change_nothing_and_learn_alone():
    plain, model = M.build(M_TINY), adapted([])
    assert torch.equal(plain(batch())[0], model(batch())[0])
    model(batch())[0].backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained and all(".A" in name or ".B." in name for name in trained)
    assert len(trained) == 2 * (2 + 2 + 3 + 4)                       # A of 4 layers, B of q k v, o, gate up, down
    each = (48 + 48) + 2 * (48 + 24) + (48 + 48) + 2 * (48 + 128) + (128 + 48)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 4 * each


def test_merged_adapters_are_the_adapted_model():
    for targets in ([], ["q_proj", "v_proj"], ["k_proj", "gate_proj", "o_proj"]):
        model = adapted(targets)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if ".B." in name:
                    p.normal_(0, 0.1)
        merged, read = M.build(M_TINY, seed=1), shard.merged(model, M.init_reader(M_TINY, 0))
        M.load_weights(merged, lambda name, start, end: read(name))
        assert torch.allclose(merged.logits(batch()), model.logits(batch()), atol=1e-5)
        assert not torch.allclose(merged.logits(batch()), M.build(M_TINY).logits(batch()), atol=1e-3)


def test_adapters_do_not_depend_on_which_others_there_are():
    one, all_ = adapted(["v_proj"]), adapted([])
    assert torch.equal(one.blocks[0].attn.qkv.A, all_.blocks[0].attn.qkv.A[8:12])


def test_bf16_computes_in_bf16_with_gradients_in_fp32():
    model = M.build(M_TINY)
    exact = model(batch())[0]
    model.dtype = torch.bfloat16
    loss = model(batch())[0]
    loss.backward()
    assert abs(float(loss.detach() / exact.detach()) - 1) < 1e-2
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.skipif(not shutil.which("g++"), reason="compiling for a CPU needs a C++ compiler")
def test_compiled_halves_are_the_blocks():
    """Compiled once for all blocks and once more for all lengths; the same step to rounding."""
    def steps(*more):
        c, model = prepared("model.vocab_size=50", *more)
        optimizer, out = train.make_optimizer(model, c), []
        for n in (20, 24, 33, 41):
            row = M.as_batch([list(range(n)), [1, 2, 3]])
            row |= {"targets": row["tokens"].flip(0), "loss_weights": torch.ones(n + 3), "doc_ids": torch.arange(2)}
            out.append([float(x) for x in train.train_step(model, optimizer, [row], float(n), 1e-2, 1.0)[:2]])
        return torch.tensor(out)
    torch._dynamo.reset()
    before, plain, compiled = shard.graphs(), steps(), steps("shard.compile=true")
    assert torch.allclose(plain, compiled, rtol=1e-4) and shard.graphs() - before == 4


def test_equal_layers_share_what_is_compiled_also_under_lora():
    def compiled(layers):
        _, model = prepared("model.vocab_size=70", f"model.n_layers={layers}", "shard.lora.r=2")
        torch._dynamo.reset()
        for block in model.blocks:                                   # traced as by inductor, and then run as it stands
            block.before, block.behind = (torch.compile(half, backend="eager") for half in (block.before, block.behind))
        before = shard.graphs()
        model(batch())[0].backward()
        return shard.graphs() - before
    assert compiled(2) == compiled(10)


def test_blocks_are_computed_again_where_a_step_would_not_fit(monkeypatch):
    c = configs.load(["model.vocab_size=50", "model.d_model=32", "model.n_heads=4", "device=cpu"])[0]
    prepare = lambda: shard.prepare(M.build_on_meta(c["model"]), c["model"], c, M.init_reader(c["model"], 0))
    assert not prepare().recompute
    monkeypatch.setattr(shard, "room", lambda device: 1 << 20)
    assert prepare().recompute
    c["shard"]["recompute"] = False                                  # who says so means it
    assert not prepare().recompute


def test_the_plan_adds_up():
    c = configs.load(["model.vocab_size=1000", "dtype=float32", "device=cpu"])[0]
    total = sum(p.numel() for p in M.build_on_meta(c["model"]).parameters())
    def moment(name, gpus=1, **shards):
        c["shard"]["mesh"] |= shards
        return shard.plan(c["model"], c, gpus)[name]
    one, many = moment("at the update"), moment("at the update", 64, shard=64)
    assert one == {"weights": 4 * total, "moments": 8 * total, "gradients": 4 * total}
    assert many["moments"] == 8 * total // 64
    some, all_ = moment("at the loss", 8, shard=1), moment("at the loss", 8, shard=8)
    assert some["moments"] == 8 * all_["moments"] and some["activations"] == all_["activations"]
    assert "gathered weights" in all_.keys() - some.keys()
    matrices = total - sum(p.numel() for name, p in M.build_on_meta(c["model"]).named_parameters()
                           if p.dim() < 2 or not name.startswith("blocks"))
    for optimizer, bytes_ in (("muon", 8 * total - 4 * matrices), ("sgd", 4 * total)):
        c["optimizer"] = optimizer
        assert moment("at the update", 8)["moments"] == bytes_ // 8
    c["optimizer"] = "adamw"
    c["shard"]["recompute"] = True
    assert moment("at the loss", 8)["activations"] < some["activations"] / 2
    c["shard"]["lora"]["r"] = 4
    assert moment("at the loss", 8)["moments"] < all_["moments"] / 5


def test_the_plan_is_printed_without_a_device(script):
    out = script("shard.py", "configs/ft.yaml", "gpus=64")
    assert out.returncode == 0 and "each of 64 devices" in out.stdout and "moments" in out.stdout, out.stderr
