"""shard.quantize: NF4 and int8 against values computed by hand, and against bitsandbytes."""
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import configs, model as M, shard, train

ROOT = Path(configs.HERE).parent


def micro_batch():
    batch = M.pack_prompts([list(range(20)), list(range(30, 70))])
    return batch | {"targets": batch["tokens"].roll(1), "loss_weights": torch.ones(60),
                    "doc_ids": torch.arange(2)}


def parallelized(*more):
    """Return (cfg, its model with new weights, ready for training)."""
    cfg = configs.load(["model.d_model=64", "model.n_heads=4", "model.n_layers=2", "device=cpu",
                        "model.vocab_size=101", "dtype=float32", "shard.lora.r=2", *more])[0]
    model = M.build_on_meta(cfg["model"])
    return cfg, shard.parallelize(model, cfg, M.NewWeights(cfg["model"], 0).read)


def dequantized(layer):
    return shard.dequantize(*layer.stored())


# --------------------------------------------------------------------------------------------------
# the formats

def test_quantize_nf4_of_values_computed_by_hand():
    """Codes of table values, of their halves, of zeros; two codes in a byte, the first one above."""
    weight = torch.zeros(2, 128)
    weight[0, :16] = 2 * torch.tensor(shard.NF4)         # absmax 2: codes 0 ... 15
    weight[0, 64:67] = torch.tensor([-0.5, 0.25, 0.1])   # absmax 0.5: -1, 0.5, 0.2
    packed, absmax = shard.quantize_nf4(weight)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 64)
    assert absmax.tolist() == [[2, 0.5], [0, 0]]
    assert packed[0, :9].tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF, 0x77]
    # 0.5 lies between 0.4407 (12) and 0.5626 (13), middle 0.5017; 0.2 between 0.1609 (9) and
    # 0.2461 (10), middle 0.2035
    assert packed[0, 32:35].tolist() == [0x0C, 0x97, 0x77]
    assert packed[1].tolist() == [0x77] * 64             # a block of zeros


def test_quantize_absmax_of_values_computed_by_hand():
    """The mean is subtracted; 255 is the largest of a block, 127 zero; the last block is short."""
    absmax = torch.zeros(2, 130)
    absmax[0, 0] = 260.0                                 # mean 1
    codes, nested_absmax, offset = shard.quantize_absmax(absmax)
    assert offset == 1 and nested_absmax.tolist() == [259, 1]
    assert codes[0, 0] == 255 and shard.dynamic_map()[255] == 1 and shard.dynamic_map()[127] == 0
    # -1/259 = -0.00386; the map has 64 negative values from 0.1 to 1, 32 from 0.01 to 0.1 and 16
    # from 0.001 to 0.01: midpoints 0.00128, 0.00184, ..., the sixth 0.00409, the fifth 0.00353
    assert codes[0, 1] == 64 + 32 + 16 - 6
    assert codes[1, 129] == 0 and shard.dynamic_map()[0] == pytest.approx(-0.99296875)


def test_quantize_int8_of_values_computed_by_hand():
    weight, absmax = shard.quantize_int8(torch.tensor([[1.27, -0.634, 0.0], [0.0, 0.0, 0.0]]))
    assert weight.tolist() == [[127, -63, 0], [0, 0, 0]] and absmax.tolist() == [pytest.approx(1.27), 0]
    restored = shard.dequantize_int8(weight, absmax)
    assert restored.flatten().tolist() == pytest.approx([1.27, -0.63, 0, 0, 0, 0])


@pytest.mark.parametrize("shape", [(128, 192), (1000, 320), (3, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize_nf4_equals_bitsandbytes(shape, dtype):
    """Table, rounding, packing, scales and double quantization, bit for bit, and what comes back.

    Of the scales, its CUDA kernels and its torch code, which takes fp64 tensors on a CPU, find the
    nearest code. Its kernel for fp32 on a CPU looks them up in a coarse table, some 1% one code off."""
    reference = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    weight = weight.to(dtype)
    weight[0, :64] = 0
    weight[-1, 5] = 3
    packed, state = reference.quantize_4bit(weight, blocksize=64, quant_type="nf4",
                                            compress_statistics=True)
    ours, absmax = shard.quantize_nf4(weight.float())
    codes, nested_absmax, offset = shard.quantize_absmax(absmax)
    assert torch.equal(ours.flatten(), packed.flatten())
    assert torch.equal(nested_absmax, state.state2.absmax) and offset == state.offset
    assert torch.equal(shard.dynamic_map(), state.state2.code)
    centered = (absmax - offset).flatten().double()
    exact, _ = torch.ops.bitsandbytes.quantize_blockwise(centered, state.state2.code, 256)
    assert torch.equal(codes.flatten(), exact)
    steps = codes.flatten().int() - state.absmax.int()
    assert steps.abs().max() <= 1 and (steps != 0).float().mean() < 0.02
    state.absmax = exact
    restored = shard.dequantize_nf4(ours, codes, nested_absmax, offset, shard.nf4_pairs(),
                                    shard.dynamic_map())
    assert torch.equal(restored.to(dtype), reference.dequantize_4bit(packed, state))


def test_quantize_int8_equals_bitsandbytes():
    reference = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(200, 96, generator=torch.Generator().manual_seed(0))
    theirs, absmax, _ = reference.int8_vectorwise_quant(weight)
    ours, our_absmax = shard.quantize_int8(weight)
    assert torch.equal(ours, theirs) and torch.equal(our_absmax, absmax)


# --------------------------------------------------------------------------------------------------
# layers

@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("more", [[], ["dtype=bfloat16"], ["shard.recompute=true"],
                                  ["shard.lora.targets=[v_proj]", "model.qkv_bias=true", "model.out_bias=true"]])
def test_parallelize_with_quantize_computes_what_the_dequantized_weights_do(quantize, more):
    """Loss and gradients of the adapters, bit for bit; only they have any."""
    _, model = parallelized(f"shard.quantize={quantize}", *more)
    _, plain = parallelized(*more)
    for name, layer in model.named_modules():
        if isinstance(layer, shard.FrozenLinear):
            plain.get_submodule(name).weight.data.copy_(dequantized(layer))
            if isinstance(layer, shard.LoRALinear):
                for m in (model, plain):
                    m.get_submodule(name).lora_B.data.fill_(0.01)
    losses = [m(micro_batch())[0] for m in (model, plain)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    gradients = [{name: p.grad for name, p in m.named_parameters() if p.grad is not None}
                 for m in (model, plain)]
    assert gradients[0].keys() == gradients[1].keys()
    assert all(shard.is_adapter(name) for name in gradients[0])
    assert all(torch.equal(g, gradients[1][name]) for name, g in gradients[0].items())


@pytest.mark.parametrize("quantize, bits", [("nf4", 4.128), ("int8", 8.5)])
def test_frozen_linear_stores_few_bits_and_comes_near_the_weight(quantize, bits):
    _, model = parallelized(f"shard.quantize={quantize}", "model.d_ff=192")
    layer = model.blocks[0].mlp.up_proj
    stored = [layer.weight, layer.absmax]
    if quantize == "nf4":
        stored += [layer.nested_absmax, layer.offset]
    n_bytes = sum(t.numel() * t.itemsize for t in stored)
    assert 8 * n_bytes / (64 * 192) == pytest.approx(bits, rel=0.01)
    weight = M.NewWeights(model.cfg, 0).read("blocks.0.mlp.up_proj.weight", 0, 192)
    error = (dequantized(layer) - weight).norm() / weight.norm()
    assert error < {"nf4": 0.1, "int8": 0.01}[quantize]
    # a layer with a quantized weight, as all of the blocks have, whatever the adapters' targets are
    _, model = parallelized(f"shard.quantize={quantize}", "shard.lora.targets=[q_proj]")
    for module in model.blocks.modules():
        if isinstance(module, torch.nn.Linear):
            assert not module.weight.is_floating_point()
    assert model.embed.weight.dtype == torch.float32


def test_load_quantized_reads_rows_block_by_block(monkeypatch):
    """No more than ROWS_AT_ONCE rows are read at once, and the parts give the whole."""
    monkeypatch.setattr(M, "ROWS_AT_ONCE", 100)
    weight = torch.randn(250, 128, generator=torch.Generator().manual_seed(0))
    parts = []

    def read_rows(start, end):
        parts.append((start, end))
        return weight[start:end]
    linear = M.Linear(128, 250, bias=False, device="meta")
    layer = shard.FrozenLinear(linear, "nf4").to_empty(device="cpu")
    layer.load_quantized(read_rows)
    assert parts == [(0, 100), (100, 200), (200, 250)]
    packed, absmax = shard.quantize_nf4(weight)
    codes, nested_absmax, offset = shard.quantize_absmax(absmax)
    assert torch.equal(layer.weight, packed) and torch.equal(layer.absmax, codes)
    assert torch.equal(layer.nested_absmax, nested_absmax) and layer.offset == offset


def test_quantized_matmul_keeps_no_dequantized_weight_for_backward():
    _, model = parallelized("shard.quantize=nf4")
    kept = []
    pack = lambda t: kept.append(t) or t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(micro_batch())[0].backward()
    shapes = {(layer.out_features, layer.in_features) for layer in model.blocks.modules()
              if isinstance(layer, torch.nn.Linear)}
    wide = [t.shape for t in kept if t.is_floating_point() and tuple(t.shape) in shapes]
    assert kept and not wide


def test_add_lora_refuses_a_width_that_nf4_does_not_divide():
    with pytest.raises(configs.UserError, match=r"shard.quantize: nf4 .*blocks of 64.*48 long.*int8"):
        parallelized("model.d_model=48", "shard.quantize=nf4")
    parallelized("model.d_model=48", "shard.quantize=int8")


def test_quantize_without_lora_is_refused():
    with pytest.raises(configs.UserError, match="shard.quantize: .*nf4.* without LoRA, which freezes"):
        configs.load(["shard.quantize=nf4"])
    assert configs.load([str(ROOT / "configs" / "qlora.yaml"), "shard.lora.r=0"])[0]["shard"]["quantize"] == "none"


def test_flops_do_not_depend_on_quantization():
    counts = [M.flops(parallelized(f"shard.quantize={quantize}")[1], [20, 40], 50)
              for quantize in ("none", "nf4", "int8")]
    assert counts[0] == counts[1] == counts[2] > 0


def test_quantized_matmul_compiles_without_a_break():
    """As inductor traces it; the traced graph runs as it is."""
    _, model = parallelized("shard.quantize=nf4")
    eager = model(micro_batch())[0]
    eager.backward()
    gradient = model.blocks[0].attn.q_proj.lora_B.grad.clone()
    model.zero_grad()
    torch._dynamo.reset()
    block = model.blocks[0]
    for half in ("pre_attention", "post_attention"):
        compiled = torch.compile(getattr(block, half), backend="aot_eager", dynamic=True, fullgraph=True)
        setattr(block, half, compiled)
    loss = model(micro_batch())[0]
    loss.backward()
    assert torch.allclose(loss, eager)
    assert torch.allclose(block.attn.q_proj.lora_B.grad, gradient, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# runs

def test_qlora_config_trains_and_exports_the_base_as_it_was_read(tmp_path, chats, capsys):
    """Two steps from data/base. hf/ holds the unquantized weights with the adapters added;
    checkpoints hold the adapters alone; the console names the format."""
    base = ROOT / "data" / "base"
    cfg, _, explicit = configs.load([
        str(ROOT / "configs" / "qlora.yaml"), f"model.init_from={base}",
        f"data.train.mine.path={chats}", f"out_dir={tmp_path / 'run'}", "dtype=float32",
        f"data.cache_dir={tmp_path / 'tokens'}", "batch_size=4", "max_steps=2", "device=cpu",
        "save_every=1", "eval_prompts=0", "samples=0", "lr=1e-2", "warmup_steps=0"])
    train.main(cfg, explicit)
    assert "(LoRA of rank 16, the blocks' frozen weights in nf4)" in capsys.readouterr().out
    adapters = load_file(tmp_path / "run" / "checkpoints" / "00000002" / "model.safetensors")
    assert adapters and all(shard.is_adapter(name) for name in adapters)
    exported = load_file(tmp_path / "run" / "hf" / "model.safetensors")
    stored = load_file(base / "model.safetensors")
    assert exported.keys() == stored.keys()
    name = "model.layers.1.mlp.down_proj.weight"
    A, B = (adapters[f"blocks.1.mlp.down_proj.lora_{x}"] for x in "AB")
    delta = 2.0 * B @ A
    assert delta.abs().max() > 1e-4
    assert torch.equal(exported[name], stored[name] + delta)
    for name in ("model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"):
        assert torch.equal(exported[name], stored[name])
