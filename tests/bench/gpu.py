"""Our trainer on one GPU, in one call of under eight minutes: is it right, and how fast is it?

    python tests/bench/gpu.py
    python tests/bench/gpu.py parts=right,resume        some of the parts
    python tests/bench/gpu.py models=0.5B,1.5B seconds=200

right    logits, loss and gradients in bf16 and fp32 against fp32 on the CPU, for full fine-tuning, LoRA, recompute,
         a window, soft-capped attention with sinks (flex_attention in bf16), fp32 with grouped heads, and a micro-batch
         without documents; how often a step waits for the device
resume   train.py, killed by SIGKILL and resumed with other lengths first, equals an uninterrupted run bitwise
fast     tokens per second, model FLOPs utilization, measured and predicted memory: the shapes of Qwen2.5-0.5B and 1.5B
         and Llama-3.1-8B with random weights; full fine-tuning and LoRA of rank 16 on all linear layers; packed chats
         (lengths lognormal, median 300, at most 4,096) and windows of 4,096. 8B only with LoRA: its full states take
         16 bytes per parameter
kernels  the kernels that took longest in a step of 0.5B
bound    the matrix products of the same step, and nothing else: what a perfect trainer would reach
peers    transformers and peft on the same data: as shipped (padded, sdpa), and packed (flex_attention)

Times are medians of CUDA events. Rows have 32,768 tokens and four different lengths in turn, so that graphs for dynamic
shapes are timed, as in a run. A part that fails prints its traceback, and the next one starts. Every result is printed
at once, as a line for people and as one of JSON, and no part starts after `seconds`. Without CUDA, everything runs with
a tiny model, so that the lines are known to run.
"""
import gc
import json
import math
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torch.nn.functional as F

import configs
import log
import model as transformer
import shard
import train

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
QWEN2 = ["model.family=qwen2", "model.n_kv_heads=2", "model.vocab_size=151936", "model.tie_embeddings=true",
         "model.qkv_bias=true", "model.rope_theta=1000000.0"]
MODELS = {
    "0.5B": [*QWEN2, "model.d_model=896", "model.n_layers=24", "model.n_heads=14", "model.d_ff=4864"],
    "1.5B": [*QWEN2, "model.d_model=1536", "model.n_layers=28", "model.n_heads=12", "model.d_ff=8960"],
    "8B": ["model.d_model=4096", "model.n_layers=32", "model.n_heads=32", "model.n_kv_heads=8", "model.d_ff=14336",
           "model.vocab_size=128256", "model.rope_theta=500000.0", "model.tie_embeddings=false"]}
TINY = ["model.d_model=64", "model.n_layers=2", "model.n_heads=4", "model.n_kv_heads=2", "model.d_ff=128",
        "model.vocab_size=1000"]
LORA = ["shard.lora.r=16", "shard.lora.alpha=16"]
ROW = 32_768 if CUDA else 2048               # tokens of a micro-batch
LONGEST = 4096 if CUDA else 256              # tokens of a document


def sync():
    if CUDA:
        torch.cuda.synchronize()


def build(*keys):
    """Return (cfg, model with random weights on the device, optimizer)."""
    cfg, _, _ = configs.load([*keys, f"model.max_len={LONGEST}", f"data.seq_len={LONGEST}", f"device={DEVICE.type}"])
    m = cfg["model"]
    shapes = {name: p.shape for name, p in transformer.build_on_meta(m).named_parameters()}
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random(name, start, end):
        if len(shapes[name]) < 2:
            return torch.full((end - start,), float(name.endswith("weight")), device=DEVICE)
        rows = torch.empty(end - start, *shapes[name][1:], device=DEVICE)
        return rows.normal_(0, 0.02, generator=generator)
    model = shard.parallelize(transformer.build_on_meta(m), cfg, random)
    shard.warm_up(model, cfg)
    return cfg, model, train.make_optimizer(model, cfg)


def make_batch(lengths, vocab_size, seed=0, pad_to=256, device=DEVICE):
    """A micro-batch of random documents of these lengths. The second half of each is trained."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, vocab_size, n).tolist() for n in lengths]
    batch = transformer.pack_prompts(prompts or [[]], "cpu")
    is_target = torch.cat([torch.arange(n) >= n // 2 for n in lengths or [0]])
    padding = -len(batch["tokens"]) % pad_to if lengths else pad_to
    batch["targets"] = F.pad(batch["tokens"].roll(-1).where(is_target, -100), (0, padding), value=-100)
    batch["loss_weights"] = F.pad(is_target.float(), (0, padding))
    batch["tokens"] = F.pad(batch["tokens"].long(), (0, padding))
    batch["positions"] = F.pad(batch["positions"].long(), (0, padding))
    batch["target_index"] = is_target.nonzero().squeeze(1)
    batch["doc_ids"] = torch.arange(len(lengths))
    batch["max_seqlen"] = max([padding, *lengths])
    if not lengths:
        batch["cu_seqlens"] = torch.zeros(1, dtype=torch.int32)
    return {key: t.to(device) if torch.is_tensor(t) else t for key, t in batch.items()}


def chat_lengths(n_tokens, seed=0):
    """Lengths of chats that fill n_tokens, as packing does."""
    rng = np.random.default_rng(seed)
    lengths = []
    while sum(lengths) < n_tokens:
        length = int(np.clip(rng.lognormal(np.log(300), 1.0), 16, LONGEST))
        lengths.append(min(length, n_tokens - sum(lengths)))
    return lengths


def step_lengths(kind):
    """Lengths of the documents of four micro-batches, which have different numbers of tokens."""
    totals = [ROW, ROW * 15 // 16, ROW * 14 // 16, ROW]
    if kind == "chats":
        return [chat_lengths(total, seed) for seed, total in enumerate(totals)]
    return [[LONGEST] * (total // LONGEST) for total in totals]


def clean():
    """Free what the part before has left, compiled graphs too."""
    torch._dynamo.reset()
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def report(name, values):
    """Print a result for people and as a line of JSON."""
    texts = []
    for key, value in values.items():
        texts.append(f"{key} {value:,.4g}" if isinstance(value, float) else f"{key} {value}")
    print(f"{name:<32} {'   '.join(texts)}", flush=True)
    print(json.dumps({"name": name} | values, default=str), flush=True)


# --------------------------------------------------------------------------------------------------
# right

SMALL = ["model.d_model=256", "model.n_layers=3", "model.n_heads=4", "model.n_kv_heads=2", "model.vocab_size=999",
         "model.d_ff=512", "micro_tokens=2048"]
VARIANTS = {"full": [], "lora": LORA, "recompute one block": ["shard.recompute=1"],
            "recompute": ["shard.recompute=true"], "window": ["model.family=mistral", "model.sliding_window=64"],
            "soft-capping and sinks": [
                "model.family=native", "model.attn_softcap=5.0", "model.attn_sinks=true", "model.sliding_window=64",
                "model.layer_types=[sliding_attention, full_attention]"]}
LENGTHS = [1, 300, 77, 512, 2, 130]


def results_of(keys, dtype, device, lengths):
    """(logits, loss, {name: gradient}), fp32 on the CPU, of a model with the weights of seed 0."""
    cfg, _, _ = configs.load([*SMALL, *keys, "model.max_len=1024", f"device={device.type}", f"dtype={dtype}"])
    m = cfg["model"]
    model = shard.parallelize(transformer.build_on_meta(m), cfg, transformer.NewWeights(m, 0).read)
    batch = make_batch(lengths, m["vocab_size"], device=device)
    with torch.no_grad():
        logits = model.logits(batch)[:sum(lengths)].cpu()
    loss_sum, weight_sum, _ = model(batch)
    loss = loss_sum / weight_sum.clamp(min=1)
    loss.backward()
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return logits, float(loss.detach()), gradients


def distance(a, b):
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


def right():
    for name, keys in VARIANTS.items():
        want_logits, want_loss, want_gradients = results_of(keys, "float32", torch.device("cpu"), LENGTHS)
        for dtype in ("float32", "bfloat16") if CUDA else ("float32",):
            clean()
            logits, loss, gradients = results_of(keys, dtype, DEVICE, LENGTHS)
            worst = max(distance(gradients[key], g) for key, g in want_gradients.items() if g.norm() > 1e-8)
            values = {"logits": distance(logits, want_logits), "loss": abs(loss / want_loss - 1), "gradients": worst}
            values["ok"] = max(values.values()) < (1e-3 if dtype == "float32" else 3e-2)
            report(f"right: {name}, {dtype}", values)
    _, _, gradients = results_of([], "auto", DEVICE, [])
    report("right: no documents", {"ok": all(g.isfinite().all() for g in gradients.values())})
    report("waits in a step", waits(*build(*SMALL)))


def waits(cfg, model, optimizer):
    """The lines at which a step waits for the device."""
    def step(seed):
        batch = make_batch(chat_lengths(1024, seed), cfg["model"]["vocab_size"])
        sync()
        train.train_step(model, optimizer, [batch], 500.0, 1e-3, cfg)
    step(0)
    if not CUDA:
        return {"waits": "needs a GPU"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step(1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]
    return {"waits": [place for place in places if not place.startswith("gpu.py")]}


# --------------------------------------------------------------------------------------------------
# resume

def resume():
    """Kill a run after its first checkpoint; the resumed one must end with the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "configs/ft.yaml", f"device={DEVICE.type}", "max_steps=24",
                   "save_every=8", "eval_every=0", "eval_prompts=0", "log_every=1", "checkpoint.export=false"]
        output = {"cwd": ROOT, "stdout": subprocess.DEVNULL}
        subprocess.run([*command, f"out_dir={folder}/whole"], check=True, **output)
        process = subprocess.Popen([*command, f"out_dir={folder}/killed"], **output)
        while not list(Path(folder, "killed").glob("checkpoints/0*")) and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        subprocess.run([*command, f"out_dir={folder}/killed"], check=True, **output)
        file = "checkpoints/00000024/model.safetensors"
        whole, killed = (Path(folder, run, file).read_bytes() for run in ("whole", "killed"))
    report("resume", {"bitwise": whole == killed})


# --------------------------------------------------------------------------------------------------
# fast

def median_seconds(step, n_steps, skip):
    """Median time of a step, after `skip` of them."""
    seconds = []
    for _ in range(skip + n_steps):
        sync()
        start = time.perf_counter()
        if CUDA:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
        step()
        if CUDA:
            events[1].record()
        sync()
        seconds.append(events[0].elapsed_time(events[1]) / 1000 if CUDA else time.perf_counter() - start)
    return statistics.median(seconds[skip:])


def cells(models):
    for name in models:
        for how, keys in (("full", []), ("lora", LORA)):
            if (name, how) != ("8B", "full"):
                yield f"{name} {how}", name, [*(MODELS[name] if CUDA else TINY), *keys, f"micro_tokens={ROW}"]


def fast(models, is_late):
    for title, name, keys in cells(models):
        if is_late():
            return
        clean()
        try:
            graphs_before = shard.num_graphs()
            run_cell(title, *build(*keys), graphs_before)
        except torch.OutOfMemoryError as error:
            report(title, {"out of memory": str(error)[:100]})


def run_cell(title, cfg, model, optimizer, graphs_before):
    vocab_size = cfg["model"]["vocab_size"]
    pad_to = shard.pad_multiple(DEVICE, model.dtype, ROW)
    _, held = shard.peak_phase(shard.predict_memory(model.cfg, with_recompute(cfg, model)))
    for kind in ("chats", "windows"):
        lengths = step_lengths(kind)
        batches = [make_batch(n, vocab_size, seed, pad_to) for seed, n in enumerate(lengths)]
        turn = 0

        def step():
            nonlocal turn
            batch = batches[turn % len(batches)]
            turn += 1
            train.train_step(model, optimizer, [batch], float(len(batch["target_index"])), 1e-5, cfg)
        seconds = median_seconds(step, n_steps=8, skip=4)
        n_tokens = statistics.mean(map(sum, lengths))
        flops = statistics.mean(transformer.flops(model, n, len(b["target_index"])) for n, b in zip(lengths, batches))
        peak_flops = log.peak_flops(DEVICE, model.dtype)
        report(f"{title} {kind}", {
            "tokens/s": n_tokens / seconds, "mfu": flops / seconds / peak_flops if peak_flops else "unknown",
            "GiB": log.peak_memory(DEVICE) / 2**30, "predicted GiB": sum(held.values()) / 2**30,
            "blocks recomputed": int(model.recompute), "graphs": shard.num_graphs() - graphs_before})


def with_recompute(cfg, model):
    return cfg | {"shard": cfg["shard"] | {"recompute": model.recompute}}


def kernels():
    if not CUDA:
        return
    cfg, model, optimizer = build(*MODELS["0.5B"], f"micro_tokens={ROW}")
    batch = make_batch(chat_lengths(ROW), cfg["model"]["vocab_size"])

    def step():
        train.train_step(model, optimizer, [batch], float(len(batch["target_index"])), 1e-5, cfg)
    for _ in range(3):
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        sync()
    events = [event for event in profile.key_averages() if event.self_device_time_total > 0]
    events.sort(key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events)
    for event in events[:15]:
        share = event.self_device_time_total / total
        report("kernel", {"share": share, "ms": event.self_device_time_total / 1000, "calls": event.count,
                          "kernel": event.key[:80]})


def bound(models):
    """The matrix products of a step of windows without recompute, forward and backward, in bf16."""
    for title, name, keys in cells(models):
        if "lora" in title:
            continue
        clean()
        cfg, _, _ = configs.load([*keys, f"model.max_len={LONGEST}"])
        m = cfg["model"]
        C, E = m["d_model"], m["head_dim"]
        q, kv = m["n_heads"] * E, (m["n_kv_heads"] or m["n_heads"]) * E
        shapes = {(C, q): 2, (C, kv): 2, (C, m["d_ff"]): 3}          # {(in, out): in each block}
        dtype = torch.bfloat16 if CUDA else torch.float32
        seconds = 0.0
        for (n_in, n_out), count in shapes.items():
            seconds += m["n_layers"] * count * product_seconds(ROW, n_in, n_out, dtype)
        seconds += product_seconds(ROW // 2, C, m["vocab_size"], dtype)          # half of the tokens are targets
        report(f"{name} bound", {"tokens/s": ROW / seconds})


def product_seconds(n, n_in, n_out, dtype):
    """Seconds of x W^T and of both its gradients."""
    x = torch.randn(n, n_in, device=DEVICE, dtype=dtype)
    weight = torch.randn(n_out, n_in, device=DEVICE, dtype=dtype)
    dy = torch.randn(n, n_out, device=DEVICE, dtype=dtype)

    def products():
        x @ weight.T
        dy @ weight
        dy.T @ x
    return median_seconds(products, n_steps=5, skip=2)


# --------------------------------------------------------------------------------------------------
# peers

def peers(models, is_late):
    for title, name, keys in cells(models):
        for how in ("as shipped", "packed"):
            if is_late():
                return
            clean()
            try:
                run_peer(f"{title} chats, transformers {how}", keys, how)
            except (torch.OutOfMemoryError, RuntimeError, ValueError) as error:
                report(f"{title} chats, transformers {how}", {"failed": str(error)[:200]})


def build_peer(m, attention, use_lora):
    import transformers
    kind = transformers.Qwen2Config if m["family"] == "qwen2" else transformers.LlamaConfig
    config = kind(hidden_size=m["d_model"], num_hidden_layers=m["n_layers"], num_attention_heads=m["n_heads"],
                  num_key_value_heads=m["n_kv_heads"], intermediate_size=m["d_ff"], vocab_size=m["vocab_size"],
                  max_position_embeddings=LONGEST, tie_word_embeddings=m["tie_embeddings"],
                  attn_implementation=attention, use_cache=False)
    with DEVICE:
        dtype = torch.bfloat16 if use_lora and CUDA else torch.float32
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    if use_lora:
        import peft
        adapters = peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, adapters)
    if m["d_model"] >= 4096:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def padded_batch(lengths, vocab_size):
    """Four documents, padded to the longest."""
    longest = max(lengths)
    rows = [F.pad(torch.arange(n) % vocab_size, (0, longest - n)) for n in lengths]
    is_token = torch.stack([torch.arange(longest) < n for n in lengths])
    is_target = torch.stack([(torch.arange(longest) >= n // 2) & (torch.arange(longest) < n) for n in lengths])
    ids = torch.stack(rows)
    return {"input_ids": ids, "attention_mask": is_token.long(), "labels": ids.where(is_target, -100)}


def packed_batch(lengths, vocab_size):
    """All documents in one row, with positions that start again."""
    ids = torch.cat([torch.arange(n) % vocab_size for n in lengths])[None]
    is_target = torch.cat([torch.arange(n) >= max(1, n // 2) for n in lengths])[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"input_ids": ids, "position_ids": positions, "labels": ids.where(is_target, -100)}


def run_peer(title, keys, how):
    torch.use_deterministic_algorithms(False)
    cfg, _, _ = configs.load([*keys, f"model.max_len={LONGEST}"])
    m = cfg["model"]
    use_lora = any("lora" in key for key in keys)
    is_packed = how == "packed"
    attention = "flex_attention" if is_packed and CUDA else "sdpa"
    model = build_peer(m, attention, use_lora)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-5, fused=True)
    # a step has the tokens of one of our micro-batches: a quarter of a row, or four documents, at a time
    steps = []
    for lengths in step_lengths("chats"):
        size = math.ceil(len(lengths) / 4) if is_packed else 4
        groups = [lengths[i:i + size] for i in range(0, len(lengths), size)]
        make = packed_batch if is_packed else padded_batch
        steps.append([make(group, m["vocab_size"]) for group in groups])
    turn = 0

    def step():
        nonlocal turn
        batches = steps[turn % len(steps)]
        turn += 1
        for batch in batches:
            batch = {key: t.to(DEVICE) for key, t in batch.items()}
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
                loss = model(**batch).loss
            (loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = median_seconds(step, n_steps=4, skip=4 if is_packed else 1)
    n_tokens = statistics.mean(map(sum, step_lengths("chats")))
    report(title, {"tokens/s": n_tokens / seconds, "GiB": log.peak_memory(DEVICE) / 2**30})



# --------------------------------------------------------------------------------------------------

def main(argv):
    options = {"parts": "right,resume,fast,kernels,bound,peers", "models": ",".join(MODELS), "seconds": "440"}
    for argument in argv:
        key, _, value = argument.partition("=")
        if key not in options:
            sys.exit(f"{key}: unknown; {', '.join(options)}")
        options[key] = value
    models = options["models"].split(",") if CUDA else ["0.5B"]
    start = time.perf_counter()

    def is_late():
        return time.perf_counter() - start > float(options["seconds"])
    device = torch.cuda.get_device_name(0) if CUDA else "cpu"
    report("machine", {"device": device, "torch": torch.__version__})
    parts = {"right": right, "resume": resume, "fast": lambda: fast(models, is_late), "kernels": kernels,
             "bound": lambda: bound(models), "peers": lambda: peers(models, is_late)}
    for part in options["parts"].split(","):
        if is_late():
            break
        clean()
        try:
            parts[part]()
        except Exception:
            traceback.print_exc()
            report(part, {"failed": traceback.format_exc(limit=1).splitlines()[-1][:200]})
        report("time", {"after": part, "seconds": time.perf_counter() - start})


if __name__ == "__main__":
    main(sys.argv[1:])
