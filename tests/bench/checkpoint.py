"""How long a save makes the loop wait: ours against a blocking torch.save of the same state, in turn.

    python tests/bench/checkpoint.py --millions 200 --rounds 3 --out /tmp/x

The model has so many million weights, and AdamW's moments (12 bytes per weight). Ours writes in the background; its
time until the files are on disk is shown too, and includes checksums and fsync, which torch.save does not do. Prints a
table and one line of JSON.
"""
import argparse, json, shutil, statistics, sys, tempfile, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

import checkpoint


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default=None)
    args = parser.parse_args()
    model = torch.nn.ModuleList(torch.nn.Linear(1000, 1000, bias=False) for _ in range(args.millions))
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()
    sides = {"ours, stall": [], "ours, to disk": [], "torch.save": []}
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        saver = checkpoint.Saver(folder, 1, print)
        for step in range(args.rounds + 1):
            start = time.perf_counter()
            saver.save(model, optimizer, {}, {"step": step})
            stall = time.perf_counter() - start
            assert saver.wait()
            sides["ours, stall"].append(stall)
            sides["ours, to disk"].append(time.perf_counter() - start)
            start = time.perf_counter()
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, f"{folder}/state.pt")
            sides["torch.save"].append(time.perf_counter() - start)
        first = sides["ours, stall"][0]
        shutil.rmtree(folder, ignore_errors=True)
        Path(folder).mkdir()
    later = {side: seconds[1:] for side, seconds in sides.items()}
    result = {side: {"seconds": round(statistics.median(s), 3), "least": round(min(s), 3), "most": round(max(s), 3),
                     "n": len(s)} for side, s in later.items()}
    ratios = [ours / theirs for ours, theirs in zip(later["ours, stall"], later["torch.save"])]
    result["ratio"] = round(statistics.median(ratios), 3)
    for side in sides:
        r = result[side]
        print(f"{side:<14} {r['seconds']:7.3f} s ({r['least']} to {r['most']})   n {r['n']}")
    print(f"{12 * args.millions / 1000:.1f} GB of state; the loop waits {result['ratio']} of torch.save's time "
          f"(the first time, {first:.3f} s, left out)")
    print(json.dumps({"millions": args.millions} | result))


if __name__ == "__main__":
    main()
