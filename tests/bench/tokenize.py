"""Tokenizing: ours against datasets.map with a fast tokenizer and against tokenizers.encode_batch, on the same inputs.

    python tests/bench/tokenize.py --tokenizer ../qwen2.5 --text ../text.jsonl.gz --chats ../chats.jsonl --rounds 3

text    a .jsonl(.gz) file of {"text": …}, repeated until there are --mb megabytes; every side reads the same .jsonl
chats   any file of chats, repeated until there are --n of them; every side gives ids and the assistant's mask

Sides take turns, whole jobs from the file to ids in memory (theirs) or on the disk (ours); loading the tokenizer is not
counted. datasets.map runs with --processes processes and without its cache; encode_batch with as many threads. For a
chat's mask theirs is transformers.apply_chat_template(return_assistant_tokens_mask) where the template has generation
marks, else a tokenization of each turn's prefix, which is what TRL does. Ids are asserted equal on all documents.
Prints a table and one line of JSON.
"""
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])           # in this folder this file would hide Python's own
else:                                                                # another bench of this folder asked for that one
    import importlib.util, os
    spec = importlib.util.spec_from_file_location(__name__, Path(os.__file__).with_name("tokenize.py"))
    sys.modules[__name__] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[__name__])

import argparse, gzip, json, os, shutil, statistics, tempfile, time

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def ours(path, folder, args, seq_len):
    import configs, tokenize_data
    cfg, _, _ = configs.load([f"data.train.x.path={path}", f"data.tokenizer={args.tokenizer}",
                              f"data.cache_dir={folder}",
                              f"data.processes={args.processes}", f"data.seq_len={seq_len}", "data.bos_token=",
                              "data.eos_token="])
    tok = tokenize_data.load_tokenizer(cfg)
    shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    data = tokenize_data.load_datasets(cfg, tok, quiet=True)["train"]["x"]
    return time.perf_counter() - start, lambda: [[part.tolist() for part in data.document(i)] for i in range(len(data))]


def map_text(path, folder, args, processes):
    import datasets, transformers
    datasets.disable_progress_bars()
    tok = transformers.AutoTokenizer.from_pretrained(args.tokenizer)
    start = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=str(path), cache_dir=str(folder),
                                 download_mode="force_redownload")["train"]
    out = rows.map(lambda batch: {"input_ids": tok(batch["text"], add_special_tokens=False)["input_ids"]}, batched=True,
                   num_proc=processes, load_from_cache_file=False)
    return time.perf_counter() - start, lambda: [[ids, None] for ids in out["input_ids"]]


def batch_text(path, args):
    import tokenizers
    tok = tokenizers.Tokenizer.from_file(str(Path(args.tokenizer) / "tokenizer.json"))
    start, out = time.perf_counter(), []
    os.putenv("TOKENIZERS_PARALLELISM", "true")                # datasets.map, forking, turns it off for good
    with open(path) as f:
        while lines := f.readlines(1 << 20):
            out += [e.ids for e in tok.encode_batch_fast([json.loads(line)["text"] for line in lines],
                                                         add_special_tokens=False)]
    return time.perf_counter() - start, lambda: [[ids, None] for ids in out]


def map_chats(path, folder, args, processes):
    import datasets, transformers
    datasets.disable_progress_bars()
    tok = transformers.AutoTokenizer.from_pretrained(args.tokenizer)
    marks = "{% generation" in tok.chat_template.replace("{%-", "{%")

    def encode(row):
        messages = [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
        if marks:
            out = tok.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            return {"input_ids": out["input_ids"], "mask": out["assistant_masks"]}
        ids, mask = tok.apply_chat_template(messages, return_dict=True)["input_ids"], []
        for i, m in enumerate(messages):
            if m["role"] == "assistant":
                prompt = tok.apply_chat_template(messages[:i], add_generation_prompt=True,
                                                 return_dict=True)["input_ids"]
                turn = tok.apply_chat_template(messages[:i + 1], return_dict=True)["input_ids"]
                mask += [0] * (len(prompt) - len(mask)) + [1] * (len(turn) - len(prompt))
        return {"input_ids": ids, "mask": mask + [0] * (len(ids) - len(mask))}

    start = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=str(path), cache_dir=str(folder),
                                 download_mode="force_redownload")["train"]
    out = rows.map(encode, num_proc=processes, load_from_cache_file=False)
    return time.perf_counter() - start, lambda: [list(pair) for pair in zip(out["input_ids"], out["mask"])]


def same_mask(theirs, mask):
    """Equal, save that a turn's prefix also holds the one token (a newline) that follows what ends the turn."""
    return all(a == b or a and b == 0 and before for a, b, before in zip(theirs, mask, [0, *mask]))


def repeated(path, records, enough):
    """Write records, each pass told apart by a number, until enough(records, bytes) -> (records, bytes of content)"""
    n = size = turn = 0
    with open(path, "w") as f:
        while True:
            for record in records:
                if enough(n, size):
                    return n, size
                mark = f" {turn}" if turn else ""
                if "text" in record:
                    record = {"text": record["text"] + mark}
                    size += len(record["text"].encode())
                else:
                    record = {"messages": [m | {"content": m["content"] + mark} for m in record["messages"]]}
                    size += sum(len(m["content"].encode()) for m in record["messages"])
                f.write(json.dumps(record) + "\n")
                n += 1
            turn += 1


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True,
                        help="a Hugging Face folder with tokenizer.json and a chat template")
    parser.add_argument("--text", required=True)
    parser.add_argument("--chats", required=True)
    parser.add_argument("--mb", type=float, default=50)
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = str(args.processes)
    import tokenize_data
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        with (gzip.open if args.text.endswith(".gz") else open)(args.text, "rt") as f:
            texts = [{"text": json.loads(line)["text"]} for line in f]
        n_texts, size = repeated(folder / "text.jsonl", texts, lambda n, size: size >= args.mb * 1e6)
        chats = [tokenize_data.normalize_record(json.loads(line), args.chats) for line in open(args.chats)]
        n_chats, chat_size = repeated(folder / "chats.jsonl", chats, lambda n, size: n >= args.n)
        p, both = args.processes, []
        result = {"text_mb": round(size / 1e6, 1), "chats": n_chats, "processes": p}
        jobs = {"text": {"ours": lambda: ours(folder / "text.jsonl", folder / "ours", args, 10 ** 8),
                         "datasets.map, 1 process": lambda: map_text(folder / "text.jsonl", folder / "hf", args, None),
                         f"datasets.map, {p} processes":
                             lambda: map_text(folder / "text.jsonl", folder / "hf", args, p),
                         f"encode_batch, {p} threads": lambda: batch_text(folder / "text.jsonl", args)},
                "chats": {"ours": lambda: ours(folder / "chats.jsonl", folder / "ours", args, 10 ** 8),
                          "datasets.map, 1 process":
                              lambda: map_chats(folder / "chats.jsonl", folder / "hf", args, None),
                          f"datasets.map, {p} processes":
                              lambda: map_chats(folder / "chats.jsonl", folder / "hf", args, p)}}
        for kind, sides in jobs.items():
            seconds, first = {side: [] for side in sides}, None
            for turn in range(args.rounds):
                for side, run in sides.items():
                    took, read = run()
                    seconds[side].append(took)
                    if turn == 0:                                    # the same ids from all, and the same masks
                        got = read()
                        if first is None:
                            first = got
                        want = n_texts if kind == "text" else n_chats
                        assert len(got) == len(first) == want, (side, len(got), len(first))
                        for n, ((ids, mask), (known, trained)) in enumerate(zip(got, first)):
                            assert ids == known and (kind == "text" or same_mask(mask, trained)), (side, n)
                        del got
                print(f"{kind}, round {turn + 1}: " + ", ".join(f"{side} {s[-1]:.2f} s" for side, s in seconds.items()),
                      file=sys.stderr, flush=True)
            for side, s in seconds.items():
                ratio = statistics.median(b / a for a, b in zip(seconds["ours"], s))
                both.append((kind, side, statistics.median(s), min(s), max(s), ratio))
                result[f"{kind}, {side}"] = {"seconds": [round(x, 3) for x in s], "ours_is_faster_by": round(ratio, 2)}
    print(f"{size / 1e6:.1f} MB of text in {n_texts:,} documents; {n_chats:,} chats, {chat_size / 1e6:.1f} MB; "
          f"{args.processes} processes, n = {args.rounds}")
    print(f"{'':<6} {'side':<26} {'seconds':>8} {'least':>8} {'most':>8} {'rate':>14}  seconds / ours")
    for kind, side, s, least, most, ratio in both:
        rate = f"{size / 1e6 / s:.1f} MB/s" if kind == "text" else f"{n_chats / s:,.0f} chats/s"
        print(f"{kind:<6} {side:<26} {s:>8.2f} {least:>8.2f} {most:>8.2f} {rate:>14}  {ratio:.2f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
