"""What a training step asks of CUDA: kernel launches, waits, compiled graphs and peak memory.

    python tests/bench/cuda_trace.py                     all configurations
    python tests/bench/cuda_trace.py only="bf16,lora"    some of them, by their names
    python tests/bench/cuda_trace.py only=memory         only the memory of large models

It runs on a GPU, and on a stand-in driver that answers every call of CUDA without computing: dispatch, argument checks,
deterministic mode, waits, launches, compilation and the allocator's bytes are real there, numbers and times are not.

Steps: each configuration takes steps of three different lengths, and then one whose launches and waits are counted.
"new graphs" are those of the last two lengths: they should be 0. Memory: the allocator's peak over two steps against
shard.predict_memory(). Prints one line per configuration, and exits with 1 if one raised an exception.
"""
import collections
import contextlib
import ctypes
import gc
import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch

import configs
import gpu
import model as transformer
import shard
import train

SMALL = ["model.d_model=256", "model.n_layers=3", "model.n_heads=4", "model.n_kv_heads=2", "model.vocab_size=999",
         "model.d_ff=512", "micro_tokens=2048", "model.family=native"]
LAYERNORM = ["model.norm=layernorm", "model.qkv_bias=true", "model.out_bias=true", "model.mlp_bias=true",
             "model.glu=false", "model.activation=gelu", "model.n_kv_heads=4"]
ALTERNATING = ["model.sliding_window=64", "model.layer_types=[sliding_attention, full_attention]"]
GEMMA2 = [*ALTERNATING, "model.attn_softcap=50.0", "model.logit_softcap=30.0", "model.norm_place=both"]
GPT_OSS = [*ALTERNATING, "model.attn_sinks=true", "model.n_experts=4", "model.n_experts_per_token=2",
           "model.d_expert=64"]
CONFIGURATIONS = {
    "bf16": [],
    "bf16 eager": ["shard.compile=false"],
    "bf16 any order": ["shard.deterministic=false"],
    "recompute": ["shard.recompute=true"],
    "recompute one block": ["shard.recompute=1"],
    "selective": ["shard.recompute=selective", "shard.compile=false"],
    "lora": gpu.LORA,
    "fp32": ["dtype=float32"],
    "fp32 window": ["dtype=float32", "model.sliding_window=64"],
    "residual dropout": ["model.resid_pdrop=0.1", "model.embd_pdrop=0.1"],
    "attention dropout": ["model.attn_pdrop=0.1"],
    "neftune": ["model.embed=neftune", "model.embed_options={alpha: 5.0}"],
    "muon": ["optimizer=muon"],
    "sgd": ["optimizer=sgd"],
    "window": ["model.sliding_window=64"],
    "norms of q and k": ["model.qk_norm=head"],
    "gpt-2": [*LAYERNORM, "model.positions=learned", "model.tie_embeddings=true"],
    "gpt-neox": [*LAYERNORM, "model.parallel_residual=true", "model.partial_rotary_factor=0.25"],
    "olmo2": ["model.norm_place=after", "model.qk_norm=all"],
    "smollm3": ["model.rope_layers=[1, 1, 0]"],
    "gemma 2": GEMMA2,
    "gemma 2 recompute": [*GEMMA2, "shard.recompute=true"],
    "gemma 2 eager": [*GEMMA2, "shard.compile=false"],
    "gpt-oss": GPT_OSS,
    "label smoothing and z-loss": ["model.loss_options={label_smoothing: 0.1, z_loss: 1e-4}"],
    "dft": ["model.loss=dft"],
    "attention multiplier": ["model.attention_multiplier=0.02"],
    "head of 68": ["model.head_dim=68"],
    "padded vocabulary": ["model.pad_vocab_size_multiple=64"]}
FLEX = ["model.family=native", "shard.compile=true", "shard.recompute=false"]
MEMORY = [    # (model, keys, tokens of a micro-batch); not compiled, if keys do not set it
    ("0.5B", ["shard.recompute=false"], 8192), ("0.5B", ["shard.recompute=false"], 32768),
    ("0.5B", ["shard.recompute=12"], 32768), ("0.5B", ["shard.recompute=true"], 32768),
    ("0.5B", [*gpu.LORA, "shard.recompute=false"], 8192), ("0.5B", [*gpu.LORA, "shard.recompute=true"], 32768),
    ("0.5B", ["shard.recompute=false", "dtype=float32"], 8192),
    ("1.5B", ["shard.recompute=false"], 8192), ("1.5B", ["shard.recompute=true"], 32768),
    ("1.5B", ["shard.recompute=16"], 32768), ("1.5B", [*gpu.LORA, "shard.recompute=true"], 32768),
    ("8B", ["shard.recompute=true"], 8192), ("8B", [*gpu.LORA, "shard.recompute=true"], 32768),
    ("0.5B", FLEX, 8192), ("0.5B", [*FLEX, "model.attn_softcap=50.0"], 8192),
    ("0.5B", [*FLEX, "model.attn_sinks=true"], 8192)]


class LaunchCounter:
    """with LaunchCounter() as counter: ...; then counter.kernels is {name: launches}."""

    def __init__(self):
        self.kernels = collections.Counter()
        library = os.environ.get("LD_PRELOAD", "")
        self.stand_in = ctypes.CDLL(library) if "nullgpu" in library else None

    def __enter__(self):
        torch.cuda.synchronize()
        if self.stand_in:
            self.stand_in.nullgpu_reset()
        else:
            self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self.profile.__enter__()
        return self

    def __exit__(self, *error):
        torch.cuda.synchronize()
        if self.stand_in:
            self.read_stand_in()
            return
        self.profile.__exit__(*error)
        for event in self.profile.key_averages():
            if event.self_device_time_total > 0 and not event.key.startswith("Mem"):
                self.kernels[event.key] += event.count

    def read_stand_in(self):
        with tempfile.NamedTemporaryFile("r") as file:
            self.stand_in.nullgpu_dump(file.name.encode())
            for line in file:
                count, _, call = line.rstrip("\n").partition("\t")
                if call.startswith("K "):
                    self.kernels[call.removeprefix("K ")] += int(count)


@contextlib.contextmanager
def waits():
    """Yields a list, to which the lines are added that wait for the device."""
    places = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "called a synchronizing" in str(warning.message):
            places.append(f"{'/'.join(Path(warning.filename).parts[-2:])}:{warning.lineno}")


def trace_step(keys):
    """Return a dict of what a step of this configuration asks of the device."""
    cfg, _, _ = configs.load([*SMALL, *keys, "model.max_len=1024", "data.seq_len=512", "device=cuda"])
    m = cfg["model"]
    model = shard.parallelize(transformer.build_on_meta(m), cfg, transformer.NewWeights(m, 0).read)
    shard.warm_up(model, cfg)
    optimizer = train.make_optimizer(model, cfg)
    batches = []
    for lengths in ([300, 500], [], [512, 512, 3], [1, 200, 77], [512, 300, 100]):
        batch = gpu.make_batch(lengths, m["vocab_size"], pad_to=256 if lengths else 1)
        if not lengths:                                  # of a rank without documents in an epoch's last step
            batch = empty_batch()
        batches.append(batch | {"noise_seed": (0, len(batches))})

    def step(batch):
        train.train_step(model, optimizer, [batch], 500.0, 1e-3, cfg)
    for batch in batches[:3]:
        step(batch)
    graphs_before = shard.num_graphs()
    step(batches[3])
    torch.cuda.reset_peak_memory_stats()
    with LaunchCounter() as counter:
        step(batches[4])
    with waits() as places:
        step(batches[4])
    with torch.no_grad():
        model.eval()(batches[3])
    text = list(transformer.generate(model, [[1, 2, 3], [4, 5]], max_tokens=4))
    assert len(text) == 4
    names = list(counter.kernels.elements())
    return {"launches": len(names), "triton": sum("triton" in name for name in names),
            "waits": len(places), "new graphs": shard.num_graphs() - graphs_before,
            "MiB": torch.cuda.max_memory_allocated() >> 20, "where": " ".join(sorted(set(places)))}


def empty_batch():
    """A micro-batch without a document and without padding."""
    batch = gpu.make_batch([1], 9, pad_to=1)
    for key in ("tokens", "positions", "targets", "loss_weights", "target_index", "doc_ids"):
        batch[key] = batch[key][:0]
    return batch | {"cu_seqlens": torch.zeros(1, dtype=torch.int32, device="cuda"), "max_seqlen": 0}


def trace_memory(name, keys, n_tokens):
    """The allocator's peak over two steps of windows of 4,096, and shard.py's prediction, in GiB."""
    cfg, model, optimizer = gpu.build(*gpu.MODELS[name], "shard.compile=false", *keys, f"micro_tokens={n_tokens}",
                                      f"batch_size={n_tokens // 4096}")
    phase, held = shard.peak_phase(shard.predict_memory(model.cfg, cfg))
    batch = gpu.make_batch([4096] * (n_tokens // 4096), model.cfg["vocab_size"])
    batch["target_index"] = torch.arange(n_tokens, device="cuda")
    batch["targets"] = batch["tokens"]
    batch["loss_weights"] = torch.ones(n_tokens, device="cuda")
    for _ in range(2):
        train.train_step(model, optimizer, [batch], float(n_tokens), 1e-5, cfg)
    peak = torch.cuda.max_memory_allocated()
    predicted = sum(held.values())
    return {"GiB": peak / 2**30, "reserved": torch.cuda.max_memory_reserved() / 2**30,
            "predicted": predicted / 2**30, "predicted / GiB": predicted / peak, "phase": phase}


def clean():
    gc.collect()
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def print_row(name, values):
    texts = [f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()]
    print(f"{name:<28} {'  '.join(texts)}", flush=True)


def main(argv):
    only = set()
    if argv:
        key, _, names = argv[0].partition("=")
        if key != "only":
            sys.exit(f"{key}: unknown; only=NAME,...")
        only = {name.strip() for name in names.split(",")}
    if not torch.cuda.is_available():
        sys.exit("needs a GPU, or the stand-in driver")
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}")
    jobs = [(name, trace_step, (keys,)) for name, keys in CONFIGURATIONS.items() if not only or name in only]
    if not only or "memory" in only:
        for name, keys, n_tokens in MEMORY:
            title = " ".join([name, f"{n_tokens:,}", *(key.partition(".")[2] for key in keys if "alpha" not in key)])
            jobs.append((title, trace_memory, (name, keys, n_tokens)))
    n_failed = 0
    for name, function, arguments in jobs:
        clean()
        try:
            print_row(name, function(*arguments))
        except Exception as error:
            n_failed += 1
            traceback.print_exc()
            print_row(name, {type(error).__name__: str(error).splitlines()[0][:200]})
    sys.exit(n_failed > 0)


if __name__ == "__main__":
    main(sys.argv[1:])
