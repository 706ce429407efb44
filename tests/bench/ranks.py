"""Tokens per second of one run on one process and on several, in turn.

    python tests/bench/ranks.py --ranks 2 --rounds 3 [configs/ft.yaml key=value …]

Each side is a whole `torchrun train.py` of --steps steps without evaluation; its figure is the median of its records'
tok_per_s, the first left out. Prints a table with each side's ratio to one process, and one line of JSON.
"""
import argparse, json, os, statistics, subprocess, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def speed(ranks, argv, steps):
    with tempfile.TemporaryDirectory() as folder:
        keys = [f"max_steps={steps}", "epochs=0", "eval_every=0", "save_every=0", f"log_every={max(1, steps // 10)}",
                "checkpoint.export=false", f"out_dir={folder}/run"]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", ranks, "train.py", *argv, *keys]
        done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, env=os.environ)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        records = [json.loads(line) for line in open(f"{folder}/run/metrics.jsonl")]
        return statistics.median(r["tok_per_s"] for r in records[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("argv", nargs="*", default=["configs/ft.yaml"])
    args = parser.parse_args()
    sides = {"one process": (1, []), f"{args.ranks} replicated": (args.ranks, []),
             f"{args.ranks} sharded": (args.ranks, [f"shard.mesh.shard={args.ranks}"])}
    got = {side: [] for side in sides}
    for _ in range(args.rounds):
        for side, (ranks, how) in sides.items():
            got[side].append(speed(ranks, [*args.argv, *how], args.steps))
    result = {}
    for side, speeds in got.items():
        ratio = statistics.median(a / b for a, b in zip(speeds, got["one process"]))
        row = result[side] = {"tok_per_s": round(statistics.median(speeds)), "least": round(min(speeds)),
                              "most": round(max(speeds)), "ratio": round(ratio, 3), "n": len(speeds)}
        print(f"{side:<14} {row['tok_per_s']:>9,} tok/s ({row['least']:,} to {row['most']:,})   "
              f"{ratio:.2f} of one process   n {row['n']}")
    print(json.dumps({"argv": args.argv, "steps": args.steps} | result))


if __name__ == "__main__":
    main()
