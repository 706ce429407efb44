"""Ours against nanoGPT's own CPU example: tinyshakespeare from scratch, whole commands, in turn.

    python tests/bench/shakespeare.py --nanogpt ../nanoGPT --text tinyshakespeare.txt --rounds 3

nanoGPT runs as its README says for a CPU: 4 layers, width 128, 64 characters, 12 windows, 2,000 steps, no dropout;
ours is configs/pretrain.yaml. Wall seconds are those of the whole process, from start to end; the loss is each side's
last validation loss in nats per character. Prints a table and one line of JSON.
"""
import argparse, json, os, re, shutil, statistics, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
THEIRS = ("config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=100 "
          "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 "
          "--lr_decay_iters=2000 --dropout=0.0").split()


def timed(command, cwd):
    start = time.perf_counter()
    out = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True,
                         env=os.environ | {"PYTHONUNBUFFERED": "1"})
    if out.returncode:
        sys.exit(f"{command}\n{out.stdout}{out.stderr}")
    return time.perf_counter() - start, out.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", required=True, type=Path)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    text, theirs = args.text.resolve(), args.nanogpt.resolve()
    with tempfile.TemporaryDirectory() as folder:
        data = theirs / "data" / "shakespeare_char"
        shutil.copyfile(text, data / "input.txt")
        subprocess.run([sys.executable, "prepare.py"], cwd=data, check=True, capture_output=True)
        rows = {"ours": [], "nanoGPT": []}
        for n in range(args.rounds):
            ours = ["train.py", "configs/pretrain.yaml", f"data.train.text.path={text}", "data.train.text.separator=",
                    f"out_dir={folder}/{n}", f"data.cache_dir={folder}/tokens"]
            seconds, _ = timed(ours, ROOT)
            records = [json.loads(line) for line in open(f"{folder}/{n}/metrics.jsonl")]
            rows["ours"].append((seconds, [r["val/text/loss"] for r in records if "val/text/loss" in r][-1]))
            seconds, out = timed(["train.py", *THEIRS, f"--out_dir={folder}/theirs"], theirs)
            losses = re.findall(r"step \d+: train loss [\d.]+, val loss ([\d.]+)", out)
            rows["nanoGPT"].append((seconds, float(losses[-1])))
            said = "; ".join(f"{side} {r[-1][0]:.1f} s, {r[-1][1]:.4f}" for side, r in rows.items())
            print(f"round {n + 1}: {said}", file=sys.stderr)
    result = {}
    for side, runs in rows.items():
        seconds, losses = zip(*runs)
        row = result[side] = {"seconds": round(statistics.median(seconds), 1), "least": round(min(seconds), 1),
                              "most": round(max(seconds), 1), "val_loss": round(statistics.median(losses), 4),
                              "n": len(runs)}
        print(f"{side:<8} {row['seconds']:7.1f} s ({row['least']} to {row['most']})   "
              f"val loss {row['val_loss']:.4f}   n {row['n']}")
    result["time_ratio"] = round(statistics.median(a[0] / b[0] for a, b in zip(rows["ours"], rows["nanoGPT"])), 3)
    print(f"ours / nanoGPT: {result['time_ratio']} of the time")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
