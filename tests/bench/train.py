"""Training on a CPU: ours against nanoGPT, transformers' Trainer and TRL's SFTTrainer, in turn.

    python tests/bench/train.py --nanogpt ../nanoGPT --size 8x512 --rounds 3
    python tests/bench/train.py --chats --rounds 2
    python tests/bench/train.py --chats --lora --rounds 2

Each turn is a process of its own that trains so many steps and says how many tokens a second it took behind the first
few, and the most memory it held. Real tokens: padding is not counted.

--size    nanoGPT's model and step (its model.py, configure_optimizers, clipping) on windows of random tokens, as its
          README runs it on a CPU (fp32, no compile), and at its best (bf16 autocast, compile); ours is its layout,
          without biases of matrices, as its configs have it, through shard.parallelize() and train_step()
--chats   2,000 chats of lognormal length (median 180, at most 1,024), half of each trained, on a Llama of width 512, 8
          layers, 8 heads, 4 of keys and values, 1,408 in the MLP, 32,000 tokens; 8 chats a step. Theirs are given token
          ids and labels. As shipped: what their config's defaults are. Best: no recompute, grouped by length, bf16 or fp32. They
          group 50 steps, the longest chats first: behind a warm-up, any 50 steps hold long and short ones as the data do
--lora    rank 16 on all linear layers

Prints a table and one line of JSON.
"""
import argparse, json, os, resource, statistics, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# layers, width, heads, window, batch
SIZES = {"4x128": (4, 128, 4, 64, 12), "6x384": (6, 384, 6, 256, 64), "8x512": (8, 512, 8, 512, 8)}
VOCAB = {"4x128": 65, "6x384": 65, "8x512": 50_304}
LLAMA = dict(d_model=512, n_layers=8, n_heads=8, n_kv_heads=4, d_ff=1408, vocab_size=32_000, max_len=1024)


def say(times, tokens, skip):
    """What a turn tells the parent: tokens a second behind the first `skip` steps, and its most memory."""
    print(json.dumps({"tok_per_s": sum(tokens[skip:]) / sum(times[skip:]),
                      "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                      "steps": len(times) - skip}))


# ---- the turns

def windows_ours(args, size):
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    import torch
    import configs, model as M, shard, train
    layers, width, heads, block, batch = SIZES[size]
    micro = args.micro or block * batch
    cfg = configs.load([
        "model.family=native", "model.norm=layernorm", "model.positions=learned", "model.glu=false",
        "model.qkv_bias=false", "model.out_bias=false", "model.mlp_bias=false", "model.activation=gelu",
        "model.tie_embeddings=true", f"model.n_layers={layers}", f"model.d_model={width}", f"model.n_heads={heads}",
        f"model.max_len={block}", f"model.vocab_size={VOCAB[size]}", f"micro_tokens={micro}", f"batch_size={batch}"])[0]
    m = cfg["model"]
    model = shard.parallelize(M.build_on_meta(m), cfg, M.NewWeights(m, 0).read)
    optimizer, times, per_row = train.make_optimizer(model, cfg), [], max(1, micro // block)
    for _ in range(args.skip + args.steps):
        start = time.perf_counter()
        x = torch.randint(VOCAB[size], (batch, block + 1))
        rows = []
        for at in range(0, batch, per_row):
            docs = x[at:at + per_row]
            row = M.pack_prompts(docs[:, :-1].tolist())
            n = row["tokens"].numel()
            rows.append(row | {"targets": docs[:, 1:].flatten(), "loss_weights": torch.ones(n),
                               "doc_ids": torch.arange(len(docs)), "target_index": torch.arange(n)})
        loss, *_ = train.train_step(model, optimizer, rows, float(batch * block), 3e-4, cfg)
        float(loss)
        times.append(time.perf_counter() - start)
    say(times, [batch * block] * len(times), args.skip)


def windows_nanogpt(args, size, best):
    sys.path.insert(0, str(args.nanogpt))
    import contextlib, torch
    from model import GPT, GPTConfig
    layers, width, heads, block, batch = SIZES[size]
    model = GPT(GPTConfig(n_layer=layers, n_embd=width, n_head=heads, block_size=block, vocab_size=VOCAB[size],
                          dropout=0.0, bias=False))
    optimizer = model.configure_optimizers(0.1, 3e-4, (0.9, 0.95), "cpu")
    step, times = torch.compile(model) if best else model, []
    ctx = torch.autocast("cpu", torch.bfloat16) if best else contextlib.nullcontext()
    for _ in range(args.skip + args.steps):
        start = time.perf_counter()
        x = torch.randint(VOCAB[size], (batch, block + 1))
        with ctx:
            _, loss = step(x[:, :-1].contiguous(), x[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        float(loss)
        times.append(time.perf_counter() - start)
    say(times, [batch * block] * len(times), args.skip)


def chats(folder):
    """2,000 chats as a .jsonl of bytes, once."""
    import numpy as np
    path, rng = Path(folder) / "chats.jsonl", np.random.default_rng(0)
    if not path.exists():
        lines = []
        for n in np.clip(rng.lognormal(np.log(180), 0.8, 2000), 60, 1024).astype(int):
            text = lambda k: "".join(map(chr, rng.integers(97, 123, max(1, k))))
            turns = [{"role": role, "content": text(n // 2 - 24)} for role in ("user", "assistant")]
            lines.append(json.dumps({"messages": turns}))
        path.write_text("\n".join(lines) + "\n")
    return path


def chats_args(args):
    model = [f"model.{key}={value}" for key, value in LLAMA.items()]
    lora = ["shard.lora.r=16", "shard.lora.alpha=16"] if args.lora else []
    return [f"data.train.chats.path={chats(args.folder)}", "data.tokenizer=bytes",
            f"data.cache_dir={args.folder}/tokens", "batch_size=8", *model, *lora]


def chats_ours(args):
    """The whole command, as a user runs it."""
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, str(ROOT / "train.py"), *chats_args(args), f"max_steps={args.skip + args.steps}",
                   "log_every=1", "eval_every=0", "save_every=0", "checkpoint.export=false", f"out_dir={out}/run",
                   *args.more]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        records = [json.loads(line) for line in open(f"{out}/run/metrics.jsonl")]
    seconds = [0.0] + [r["seconds"] for r in records]
    times, tokens = [b - a for a, b in zip(seconds, seconds[1:])], [r["tokens"] for r in records]
    print(json.dumps({"tok_per_s": sum(tokens[args.skip:]) / sum(times[args.skip:]),
                      "memory": max(r["memory"] for r in records), "steps": args.steps}))


def chats_theirs(args, trl, best):
    sys.path.insert(0, str(ROOT))
    import configs, tokenize_data
    cfg = configs.load(chats_args(args))[0]
    tokens = tokenize_data.load_datasets(cfg, quiet=True)["train"]["chats"]
    documents = [tokens.document(i) for i in range(len(tokens))]
    sys.path.remove(str(ROOT))
    for name in ("model", "train", "log", "shard"):                    # theirs may have modules of these names
        sys.modules.pop(name, None)
    import datasets, torch, transformers
    labels = lambda ids, mask: [int(t) if on else -100 for t, on in zip(ids, mask)]
    rows = [{"input_ids": ids.tolist(), "labels": labels(ids, mask)} for ids, mask in documents]
    data = datasets.Dataset.from_list(rows)
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        hidden_size=LLAMA["d_model"], num_hidden_layers=LLAMA["n_layers"], num_attention_heads=LLAMA["n_heads"],
        num_key_value_heads=LLAMA["n_kv_heads"], intermediate_size=LLAMA["d_ff"], vocab_size=LLAMA["vocab_size"],
        max_position_embeddings=LLAMA["max_len"])
    model = transformers.LlamaForCausalLM(shape)
    if best == "weights":
        model = model.to(torch.bfloat16)
    times, counts, last = [], [], [0.0]

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            last[0] = time.perf_counter()

        def on_step_end(self, *_, **__):
            times.append(time.perf_counter() - last[0])

    common = dict(output_dir=f"{args.folder}/theirs", max_steps=args.skip + args.steps, per_device_train_batch_size=8,
                  save_strategy="no", report_to=[], logging_steps=10_000, use_cpu=True, disable_tqdm=True, seed=0)
    if best:
        named = "train_sampling_strategy" in transformers.TrainingArguments.__dataclass_fields__
        common |= {"train_sampling_strategy": "group_by_length"} if named else {"group_by_length": True}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_tokenizer(), pad_token="<pad>",
                                                     eos_token="<pad>")
    lora = None
    if args.lora:
        import peft
        lora = peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    if trl:
        from trl import SFTConfig, SFTTrainer
        more = {"gradient_checkpointing": False, "bf16": best == "autocast"} if best else {}
        config = SFTConfig(**common, max_length=1024, **more)
        trainer = SFTTrainer(model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=lora,
                             callbacks=[Watch()])
    else:
        model = peft.get_peft_model(model, lora) if lora else model
        config = transformers.TrainingArguments(**common, bf16=best == "autocast")
        collator = transformers.DataCollatorForSeq2Seq(tokenizer)
        trainer = transformers.Trainer(model, config, collator, data, callbacks=[Watch()])
    inner = trainer.data_collator

    def collate(examples):                                             # counted where it is drawn, a step or two ahead
        batch = inner(examples)
        counts.append(int(batch["attention_mask"].sum()) if "attention_mask" in batch else
                      sum(len(e["input_ids"]) for e in examples))
        return batch
    trainer.data_collator = collate
    trainer.train()
    say(times, counts[:len(times)], args.skip)


def bytes_tokenizer():
    from tokenizers import Tokenizer, models
    return Tokenizer(models.WordLevel({"<pad>": 0, "a": 1}, unk_token="a"))


# ---- in turn

def turn(name, args):
    side, _, variant = name.partition(":")
    if side == "ours":
        windows_ours(args, args.size) if args.size else chats_ours(args)
    elif side == "nanogpt":
        windows_nanogpt(args, args.size, variant == "best")
    else:
        chats_theirs(args, side == "trl", variant)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path)
    parser.add_argument("--size", choices=SIZES)
    parser.add_argument("--chats", action="store_true")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--skip", type=int, default=10, help="first steps, not counted")
    parser.add_argument("--micro", type=int, default=0, help="ours: tokens in a row")
    parser.add_argument("--sides", nargs="*", help="some of them only")
    parser.add_argument("--folder", default="")
    parser.add_argument("--turn", help=argparse.SUPPRESS)
    parser.add_argument("more", nargs="*", help="ours: more keys of the config, with --chats")
    args = parser.parse_args()
    if args.turn:
        return turn(args.turn, args)
    if bool(args.size) == args.chats:
        parser.error("one of --size and --chats")
    names = ["ours", "nanogpt:", "nanogpt:best"] if args.size else [
        "ours", "trl:", "trl:autocast", "trl:weights", "trl:fp32",
        "trainer:", "trainer:autocast", "trainer:weights", "trainer:fp32"]
    names = [name for name in names if not args.sides or name in args.sides]
    results = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        folder = args.folder or folder
        for n in range(args.rounds):
            for name in names:
                env = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
                env["TOKENIZERS_PARALLELISM"] = "false"
                command = [sys.executable, __file__, *sys.argv[1:], "--folder", folder, "--turn", name]
                done = subprocess.run(command, capture_output=True, text=True, env=env)
                if done.returncode:
                    sys.exit(f"{name}\n{done.stdout}{done.stderr}")
                results[name].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"round {n + 1}: {name} {results[name][-1]['tok_per_s']:,.0f} tokens/s", file=sys.stderr)
    table = {}
    print("  ".join(f"{key}: {value}" for key, value in machine().items()))
    for name, runs in results.items():
        speeds = [r["tok_per_s"] for r in runs]
        table[name] = {"tok_per_s": round(statistics.median(speeds)), "least": round(min(speeds)),
                       "most": round(max(speeds)),
                       "memory_mb": round(statistics.median(r["memory"] for r in runs) / 1e6), "n": len(runs)}
    for name, row in table.items():
        ratios = [a["tok_per_s"] / b["tok_per_s"] for a, b in zip(results.get("ours", []), results[name])]
        compared = f"   ours is {statistics.median(ratios):.2f} times as fast" if ratios and name != "ours" else ""
        print(f"{name:<17} {row['tok_per_s']:>8,} tokens/s ({row['least']:,} to {row['most']:,})   "
              f"{row['memory_mb']:>6,} MB   n {row['n']}{compared}")
    print(json.dumps({"what": args.size or ("chats, lora" if args.lora else "chats")} | machine() | table))


def machine():
    """The kind of CPU: what it computes in by default, and its instruction set."""
    sys.path.insert(0, str(ROOT))
    import torch
    import shard
    capabilities = torch.cpu.get_capabilities()
    names = [name for name in ("amx_bf16", "avx512_bf16", "avx512_f", "avx2") if capabilities.get(name)]
    dtype = shard.resolve_dtype({"dtype": "auto"}, "cpu")
    return {"dtype": str(dtype).removeprefix("torch."), "instructions": names}


if __name__ == "__main__":
    main()
