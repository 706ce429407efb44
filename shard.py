"""What is done to a finished model for the device it is on: adapters, precision, recompute; and what it will cost.

    python shard.py configs/ft.yaml              predicted memory on one device, and what fills it
    python shard.py configs/ft.yaml gpus=64      the same, the state sharded over 64

Order: LoRA, then precision and recompute. The model file knows of none of these: a model that comes out of prepare()
is called as before.

    masters     fp32, what the optimizer changes and a checkpoint keeps
    compute     bf16 or fp32; each matmul casts its weight, so gradients arrive in fp32 and add up in fp32
    LoRA        y = W x + (alpha / r) B A x: W stays as it is, A [r, in] and B [out, r] learn       (arXiv:2106.09685)
"""
import json, math, os, sys
from pathlib import Path

import configs

if __name__ == "__main__" and len(sys.argv) < 2:
    sys.exit(__doc__)

import torch
import torch.nn.functional as F
from torch import nn

import model as transformer


# ---------------------------------------------------------------------------------------------------------------------
# device and precision

def pick_device(cfg):
    """cfg -> (torch.device, compute dtype). Raises ValueError where the device isn't there."""
    name = cfg["device"] if cfg["device"] != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda is not available here; device=cpu or auto")
    device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)
    dtype = cfg["dtype"] if cfg["dtype"] != "auto" else "bfloat16" if has_bf16(device) else "float32"
    return device, getattr(torch, dtype)


def has_bf16(device):
    """Does the hardware multiply bf16 matrices faster than fp32 ones?"""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(known.get("amx_bf16") or known.get("avx512_bf16"))


def row_multiple(device, dtype):
    """What a row's length is a multiple of: kernels are prepared, and kept, for every new shape, so there are few."""
    return 256 if device.type == "cuda" else 64 if dtype == torch.bfloat16 else 1


def set_threads():
    """Share the machine's cores among its processes. torchrun's own choice, one thread each, wastes the rest."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if here > 1:
        torch.set_num_threads(max(1, os.cpu_count() // here))


# ---------------------------------------------------------------------------------------------------------------------
# LoRA

class LoRALinear(nn.Module):
    """A frozen linear layer with an adapter for each of its parts (q, k, v: one matmul inside, three layers outside).

    parts  [(their name of the layer, first output, one behind the last)] of those that are adapted

    The adapters' A stand in one matrix [n r, in], so that x is read once for all of them.
    """

    def __init__(self, base, parts, r, alpha):
        super().__init__()
        self.base, self.parts, self.r, self.scale = base.requires_grad_(False), parts, r, alpha / r
        self.A = nn.Parameter(torch.empty(len(parts) * r, base.in_features, device=base.weight.device))
        zeros = (torch.zeros(end - start, r, device=base.weight.device) for _, start, end in parts)
        self.B = nn.ParameterList(nn.Parameter(B) for B in zeros)

    def forward(self, x):                                                                             # [T, in]
        y = self.base(x)
        low = F.linear(x, self.A.to(x.dtype)) * self.scale                                            # [T, n r]
        outs, at = [], 0
        for (_, start, end), B, part in zip(self.parts, self.B, low.split(self.r, -1)):
            if start > at:
                outs.append(y[:, at:start])
            outs.append(y[:, start:end] + F.linear(part, B.to(x.dtype)))
            at = end
        return torch.cat([*outs, y[:, at:]], -1) if len(outs) > 1 or at < y.shape[-1] else outs[0]

    def delta(self):
        """What the adapters add to the base's weight. -> [out, in] in fp32"""
        out = torch.zeros_like(self.base.weight, dtype=torch.float32)
        for (_, start, end), A, B in zip(self.parts, self.A.split(self.r), self.B):
            out[start:end] = B @ A * self.scale
        return out


def add_lora(model, m, lora, seed):
    """Freeze the model and put adapters on its linear layers, in place. Raises ValueError for a target no layer has."""
    model.requires_grad_(False)
    names, known = transformer.weight_names(model, m), set()
    linear = [name for name, module in model.blocks.named_modules(prefix="blocks") if isinstance(module, nn.Linear)]
    for layer in linear:
        base, theirs = model.get_submodule(layer), [t.removesuffix(".weight") for t in names[f"{layer}.weight"]]
        rows = transformer.part_sizes(f"{layer}.weight", m) if len(theirs) > 1 else [base.out_features]
        ends = [sum(rows[:n + 1]) for n in range(len(rows))]
        known |= {t.split(".")[-1] for t in theirs}
        parts = [(t, start, end) for t, start, end in zip(theirs, [0, *ends], ends)
                 if not lora["targets"] or t.split(".")[-1] in lora["targets"]]
        if not parts:
            continue
        adapted = LoRALinear(base, parts, lora["r"], lora["alpha"])
        bound = 1 / math.sqrt(base.in_features)                # kaiming_uniform with a = sqrt(5), as PEFT starts A
        with torch.no_grad():
            for (their, _, _), A in zip(parts, adapted.A.split(lora["r"])):
                A.copy_(torch.empty(A.shape).uniform_(-bound, bound, generator=transformer.seeded(seed, their)))
        parent, _, child = layer.rpartition(".")
        setattr(model.get_submodule(parent), child, adapted)
    if strange := [t for t in lora["targets"] if t not in known]:
        raise ValueError(f"shard.lora.targets: {strange[0]} is none of {', '.join(sorted(known))}")


def merge_lora(model, m):
    """A model with adapters -> a plain one, in fp32, with what they learned added to its weights.

    The base is read again where it came from a folder: the one that was trained on may have been rounded to bf16.
    """
    if not lora_layers(model):
        return model
    plain = transformer.load(m["init_from"], m)[0] if m["init_from"] else transformer.on_meta(m).to_empty(device="cpu")
    with torch.no_grad():
        for name, p in plain.named_parameters():
            layer, _, kind = name.rpartition(".")
            module = model.get_submodule(layer)
            adapted = isinstance(module, LoRALinear)
            if not m["init_from"]:
                p.copy_(getattr(module.base if adapted else module, kind))
            if adapted and kind == "weight":
                p += module.delta().cpu()
    return plain


def lora_layers(model):
    """The layers that have adapters."""
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def save_adapter(model, m, lora, folder, base):
    """The adapters in PEFT's layout: adapter_model.safetensors and adapter_config.json."""
    from safetensors.torch import save_file
    folder, tensors = Path(folder), {}
    folder.mkdir(parents=True, exist_ok=True)
    for module in lora_layers(model):
        for (their, _, _), A, B in zip(module.parts, module.A.split(module.r), module.B):
            for letter, tensor in (("A", A), ("B", B)):
                tensors[f"base_model.model.{their}.lora_{letter}.weight"] = tensor.detach().float().cpu().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = {their.split(".")[-1] for module in lora_layers(model) for their, _, _ in module.parts}
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": lora["r"],
              "lora_alpha": lora["alpha"], "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
              "fan_in_fan_out": bool(configs.families()[m["family"]].get("transposed")),
              "target_modules": sorted(targets)}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------------------------

def prepare(model, m, cfg):
    """A finished model -> the same, ready to train on this run's device, in place."""
    device, dtype = pick_device(cfg)
    if cfg["shard"]["lora"]["r"]:
        add_lora(model, m, cfg["shard"]["lora"], cfg["seed"])
        if dtype == torch.bfloat16:                            # frozen weights need no fp32 master: half the memory
            for name, p in model.named_parameters():
                if not p.requires_grad and p.dim() == 2:
                    p.data = p.data.to(dtype)
    model.dtype, model.recompute = dtype, cfg["shard"]["recompute"]
    return model.to(device)


# ---------------------------------------------------------------------------------------------------------------------
# what it will cost

def plan(m, cfg, gpus=1):
    """Predicted bytes on each of `gpus` devices that share the state -> {part: bytes}. Formulas, no device.

    Activations are those of one row of micro_tokens: what autograd keeps for each block's backward pass.
    """
    model, T, r = transformer.on_meta(m), cfg["micro_tokens"], cfg["shard"]["lora"]["r"]
    size = 4 if cfg["dtype"] == "float32" else 2               # auto: the device it is planned for has bf16
    total = sum(p.numel() for p in model.parameters())
    trained = total
    if r:
        add_lora(model, m, cfg["shard"]["lora"] | {"alpha": 1.0}, 0)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    H, K, E, C, width = m["n_heads"], m["n_kv_heads"], m["head_dim"], m["d_model"], m["d_ff"] * (2 if m["glu"] else 1)
    block = 2 * C * 4 + 4 * C * size + 2 * (H + 2 * K) * E * size + 2 * H * E * size + (width + 2 * m["d_ff"]) * size
    kept = C * size * m["n_layers"] + block if cfg["shard"]["recompute"] else block * m["n_layers"]
    chunk = min(transformer.CHUNK, T * m["vocab_size"])
    return {
        "weights": (total * 4 if not r else (total * size + trained * 4)) // gpus,
        "compute copies": total * size if size < 4 and not r else 0,
        "gradients": trained * 4 // gpus,
        "moments": trained * 8 // gpus,
        "activations": T * kept,
        "logits": chunk * (4 + 4 + 4 + 2 * size),
    }


def main(argv):
    options, argv = configs.take(argv, gpus=1)
    if options["gpus"] < 1:
        raise ValueError(f"gpus: expected at least 1, got {options['gpus']}")
    cfg, _, _ = configs.load(argv)
    m = cfg["model"]
    if m["vocab_size"] is None:
        import tokenize_data
        m = m | {"vocab_size": tokenize_data.load_tokenizer(cfg).n_vocab}
    parts = plan(m, cfg, options["gpus"])
    total = sum(parts.values())
    gpus = options["gpus"]
    print(f"predicted on each of {gpus} device{'s' * (gpus > 1)}, rows of {cfg['micro_tokens']:,} tokens:")
    for name, n in parts.items():
        print(f"  {name:<16} {n / 2**20:>12,.1f} MiB {n / total:>6.1%}  {'#' * round(40 * n / total)}".rstrip())
    print(f"  {'together':<16} {total / 2**20:>12,.1f} MiB")


if __name__ == "__main__":
    configs.run(main, sys.argv[1:])
