"""One CUDA device, one call of under eight minutes: is it right, how fast is it, where does the time go.

    python tests/bench/gpu.py              --quick: two minutes, the two small models, ours only

Right: logits, loss and gradients of packed rows in bf16 and fp32 on the device against fp32 on the CPU; a step repeated
with deterministic kernels (the default) is bitwise the same; a step makes the device wait once. Fast: tokens a second
(device events, median of the steps behind the first ones), model FLOPs utilization, most memory and the kernels that
took longest, for the shapes of Qwen2.5-0.5B and 1.5B and Llama-3.1-8B with random weights; full fine-tuning and LoRA of
rank 16 on all linear layers; packed chats (lognormal, median 300, at most 4,096) and windows of 4,096; against
transformers (+ peft) with sdpa on the same device: "any order" is ours with shard.deterministic=false; theirs are chats
padded to the longest of 16, bf16 by autocast, fused AdamW, no recompute where it fits. Prints a table and one line of
JSON. Without CUDA it goes through the same lines with a tiny model, so that they are known to run.
"""
import argparse, gc, json, statistics, sys, time, traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

import configs, log, model as M, shard, train

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
QWEN2 = ["model.family=qwen2", "model.n_kv_heads=2", "model.vocab_size=151936", "model.tie_embeddings=true",
         "model.qkv_bias=true", "model.rope_theta=1000000.0"]
MODELS = {
    "0.5B": [*QWEN2, "model.d_model=896", "model.n_layers=24", "model.n_heads=14", "model.d_ff=4864"],
    "1.5B": [*QWEN2, "model.d_model=1536", "model.n_layers=28", "model.n_heads=12", "model.d_ff=8960"],
    "8B": ["model.d_model=4096", "model.n_layers=32", "model.n_heads=32", "model.n_kv_heads=8", "model.d_ff=14336",
           "model.vocab_size=128256", "model.rope_theta=500000.0"]}
TINY = ["model.d_model=64", "model.n_layers=2", "model.n_heads=4", "model.n_kv_heads=2", "model.d_ff=128",
        "model.vocab_size=1000"]
LORA = ["shard.lora.r=16", "shard.lora.alpha=16"]
ROW = 32_768 if CUDA else 2048                                         # tokens in a row


def sync():
    if CUDA:
        torch.cuda.synchronize()


def ours(keys):
    """-> (cfg, model with random weights on the device, its optimizer)"""
    cfg = configs.load([*keys, "model.max_len=4096", f"device={DEVICE.type}"])[0]
    m = cfg["model"]
    shapes = {name: p.shape for name, p in M.build_on_meta(m).named_parameters()}
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random(name, start, end):
        if len(shapes[name]) < 2:
            return torch.full((end - start,), float(name.endswith("weight")), device=DEVICE)
        rows = torch.empty(end - start, *shapes[name][1:], device=DEVICE)
        return rows.normal_(0, 0.02, generator=generator)
    model = shard.parallelize(M.build_on_meta(m), cfg, random)
    return cfg, model, train.make_optimizer(model, cfg)


def row(lengths, vocab, rng, pad_to):
    """A row of random documents of these lengths, the second half of each trained."""
    docs = [rng.integers(0, vocab, n + 1) for n in lengths]
    out = M.pack_prompts([d[:-1].tolist() for d in docs])
    total = out["tokens"].numel()
    trained = torch.cat([torch.arange(n) >= n // 2 for n in lengths])
    targets = torch.where(trained, torch.cat([torch.from_numpy(d[1:]) for d in docs]), -100)
    fill = -total % pad_to
    pad = lambda t, value: torch.nn.functional.pad(t, (0, fill), value=value)
    out |= {"tokens": pad(out["tokens"], 0), "positions": pad(out["positions"], 0), "targets": pad(targets, -100),
            "loss_weights": pad(trained.float(), 0.0), "doc_ids": torch.arange(len(docs)), "max_seqlen": max([fill, *lengths])}
    out["target_index"] = (out["targets"] >= 0).nonzero().squeeze(1)
    return {key: t.to(DEVICE) if torch.is_tensor(t) else t for key, t in out.items()}


def chat_lengths(rng, tokens):
    """Lengths of chats that fill `tokens`, as packing would."""
    lengths = []
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(left, int(np.clip(rng.lognormal(np.log(300), 1.0), 16, 4096 if CUDA else 256))))
    return lengths


# ---- right

def right():
    results = {}
    keys = ["model.d_model=256", "model.n_layers=3", "model.n_heads=4", "model.n_kv_heads=2", "model.vocab_size=999",
            "model.d_ff=512"]
    lengths = [1, 300, 77, 512, 2, 130]

    def numbers(dtype, device, more=()):
        cfg = configs.load([*keys, *more, "model.max_len=4096", f"device={device.type}", f"dtype={dtype}"])[0]
        model = shard.parallelize(M.build_on_meta(cfg["model"]), cfg, M.NewWeights(cfg["model"], 0).read)
        batch = row(lengths, 999, np.random.default_rng(1), 256)
        batch = {key: t.to(device) if torch.is_tensor(t) else t for key, t in batch.items()}
        with torch.no_grad():
            logits = model.logits(batch)[:sum(lengths)].float().cpu()
        loss_sum, weight, _ = model(batch)
        (loss_sum / weight).backward()
        gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
        return logits, float(loss_sum.detach() / weight), gradients

    for more, what in (((), ""), (("shard.recompute=true",), ", recompute"), (tuple(LORA), ", lora")):
        want = numbers("float32", torch.device("cpu"), more)
        for dtype in ("float32", "bfloat16") if CUDA else ("float32",):
            got = numbers(dtype, DEVICE, more)
            off = lambda a, b: float((a - b).norm() / b.norm().clamp(min=1e-12))
            worst = max(off(got[2][name], g) for name, g in want[2].items() if g.norm() > 1e-8)
            off_by = {"logits": off(got[0], want[0]), "loss": abs(got[1] / want[1] - 1), "gradients": worst}
            results[dtype + what] = off_by
            limit = 3e-2 if dtype == "bfloat16" else 1e-3
            assert max(off_by.values()) < limit, (dtype, what, off_by)

    runs = []
    for _ in range(2):
        cfg, model, optimizer = ours([*TINY, "dtype=bfloat16" if CUDA else "dtype=float32"])
        chats = chat_lengths(np.random.default_rng(2), 2048)
        rows = [row(chats, 1000, np.random.default_rng(3), 256) for _ in range(2)]
        for _ in range(3):
            train.train_step(model, optimizer, rows, 1000.0, 1e-3, cfg)
        runs.append({name: p.detach().clone() for name, p in model.named_parameters()})
    results["bitwise repeat"] = all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    if CUDA:
        import warnings
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train.train_step(model, optimizer, rows, 1000.0, 1e-3, cfg)
        torch.cuda.set_sync_debug_mode("default")
        waits = [w for w in caught if "synchroniz" in str(w.message).lower()]
        results["waits in a step"] = [str(w.filename).rsplit("/", 1)[-1] + f":{w.lineno}" for w in waits]
    for key, value in results.items():
        if isinstance(value, dict):
            value = "  ".join(f"{k} {v:.1e}" for k, v in value.items())
        print(f"{key:<32} {value}")
    return results


# ---- fast

def timed(step, count, skip=3):
    """Median seconds of a step, by device events where there are any."""
    times = []
    for n in range(skip + count):
        sync()
        if CUDA:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
        start = time.perf_counter()
        step()
        if CUDA:
            end.record()
        sync()
        times += [begin.elapsed_time(end) / 1e3 if CUDA else time.perf_counter() - start] if n >= skip else []
    return statistics.median(times)


def clean():
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory():
    return torch.cuda.max_memory_allocated() if CUDA else 0


def measure_ours(keys, kind, count, look=False):
    cfg, model, optimizer = ours(keys)
    rng, vocab = np.random.default_rng(0), cfg["model"]["vocab_size"]
    multiple = shard.pad_multiple(DEVICE, model.dtype, ROW)
    window = 4096 if CUDA else 256
    lengths = [chat_lengths(rng, ROW) if kind == "chats" else [window] * (ROW // window) for _ in range(4)]
    rows, turn = [row(n, vocab, rng, multiple) for n in lengths], [0]

    def step():
        turn[0] += 1
        one = rows[turn[0] % len(rows)]
        train.train_step(model, optimizer, [one], float(len(one["target_index"])), 1e-5, cfg)
    seconds = timed(step, count, skip=6)
    tokens = statistics.mean(map(sum, lengths))
    work = statistics.mean(M.flops(model, n, len(r["target_index"])) for n, r in zip(lengths, rows))
    peak = log.peak_flops(DEVICE, model.dtype)
    out = {"tok_per_s": tokens / seconds, "mfu": work / seconds / peak if peak else None,
           "memory_gib": memory() / 2**30}
    if look and CUDA:
        from torch.profiler import ProfilerActivity, profile
        with profile(activities=[ProfilerActivity.CUDA]) as prof:
            step()
            sync()
        spent = lambda e: e.self_device_time_total
        events = sorted((e for e in prof.key_averages() if spent(e) > 0), key=spent, reverse=True)
        total = sum(map(spent, events))
        for e in events[:12]:
            print(f"      {spent(e) / total:6.1%} {spent(e) / 1e3:9.2f} ms {e.count:5} x  {e.key[:90]}")
    return out


def measure_theirs(keys, kind, count):
    import transformers
    torch.use_deterministic_algorithms(False)
    m = configs.load([*keys, "model.max_len=4096", f"device={DEVICE.type}"])[0]["model"]
    big, lora = m["d_model"] >= 4096, any("lora" in key for key in keys)
    kind_of = transformers.Qwen2Config if m["family"] == "qwen2" else transformers.LlamaConfig
    shape = kind_of(hidden_size=m["d_model"], num_hidden_layers=m["n_layers"], num_attention_heads=m["n_heads"],
                    num_key_value_heads=m["n_kv_heads"], intermediate_size=m["d_ff"], vocab_size=m["vocab_size"],
                    max_position_embeddings=4096, tie_word_embeddings=m["tie_embeddings"], rope_theta=m["rope_theta"],
                    attn_implementation="sdpa", use_cache=False)
    torch.set_default_dtype(torch.bfloat16 if big or lora else torch.float32)
    with DEVICE:
        model = transformers.AutoModelForCausalLM.from_config(shape)
    torch.set_default_dtype(torch.float32)
    model.train()
    if lora:
        import peft
        adapters = peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, adapters)
    if big:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if lora:
            model.enable_input_require_grads()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer, rng = torch.optim.AdamW(params, lr=1e-5, fused=True), np.random.default_rng(0)
    longest = 4096 if CUDA else 256
    batches = []
    for _ in range(4):
        lengths = [longest] * 4
        if kind == "chats":
            lengths = [int(np.clip(rng.lognormal(np.log(300), 1.0), 16, longest)) for _ in range(16)]
        ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, n in enumerate(lengths):
            ids[i, :n], mask[i, :n] = torch.from_numpy(rng.integers(0, m["vocab_size"], n)), 1
            labels[i, n // 2:n] = ids[i, n // 2:n]
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        batches.append(({key: t.to(DEVICE) for key, t in batch.items()}, sum(lengths)))
    turn = [0]

    def step():
        turn[0] += 1
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = model(**batches[turn[0] % 4][0]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = timed(step, count)
    return {"tok_per_s": statistics.mean(n for _, n in batches) / seconds, "mfu": None, "memory_gib": memory() / 2**30}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seconds", type=int, default=440, help="begin nothing new after so many")
    args = parser.parse_args()
    started, device = time.perf_counter(), torch.cuda.get_device_name(0) if CUDA else "cpu"
    result = {"device": device, "torch": torch.__version__}
    print(f"{result['device']}, torch {result['torch']}")
    try:
        result["right"] = right()
    except Exception:                                                  # figures of what is wrong still help to mend it
        traceback.print_exc()
        result["right"] = "failed"
    models = {name: MODELS[name] for name in (("0.5B", "1.5B") if args.quick else MODELS)} if CUDA else {"tiny": TINY}
    cells = []
    for name, keys in models.items():
        recompute = ["shard.recompute=true"] if name == "8B" else []
        for how, more in (("full", recompute), ("lora", LORA + recompute)):
            for kind in ("chats", "windows"):
                cells.append((name, how, kind, keys + more))
    result["cells"] = {}
    for name, how, kind, keys in cells:
        for side, measure in (("ours", measure_ours), ("any order", measure_ours), ("transformers", measure_theirs)):
            if side == "any order" and (how, kind) != ("full", "chats"):
                continue
            ours_alone = args.quick or kind == "windows" and name == "8B"
            if side == "transformers" and ours_alone or time.perf_counter() - started > args.seconds:
                continue
            clean()
            try:
                more = {"look": kind == "chats" and how == "full"} if side == "ours" else {}
                keys = keys + ["shard.deterministic=false"] * (side == "any order")
                out = measure(keys, kind, 5 if name == "8B" else 8, **more)
            except Exception as e:                                     # out of memory, say: the rest still counts
                out = {"error": f"{type(e).__name__}: {str(e).splitlines()[0][:150] if str(e) else ''}"}
            result["cells"][f"{name} {how} {kind} {side}"] = out
            text = out.get("error")
            if text is None:
                mfu = f"mfu {out['mfu']:.1%}" if out["mfu"] else ""
                text = f"{out['tok_per_s']:>10,.0f} tokens/s   {mfu:<10}   {out['memory_gib']:6.1f} GiB"
            took = f"({time.perf_counter() - started:.0f} s)"
            print(f"{name:<5} {how:<5} {kind:<8} {side:<13} {text}   {took}", flush=True)
    print(json.dumps(result, default=str))


if __name__ == "__main__":
    main()
