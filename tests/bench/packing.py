"""Packing: micro-batches filled and ranks balanced, at once, against the packers in use.

    python tests/bench/packing.py --instructlab ../training --minitrainer ../mini_trainer

100,000 lognormal lengths (median 300, at most 8,192), micro_tokens 8,192, 3,840 documents per step, 8 and 64 ranks; and
2,000 documents of three kinds. Before them, the order: step 10,000,000 of a billion documents, and every step of an
epoch of ten million documents of uneven length. The peers' packers are taken from checkouts; if numba is not installed
they run as plain Python, which changes only their time. Best fit is what TRL packs by: longest first, each into the
fullest micro-batch that has room, micro-batches dealt to ranks in turn. Prints a table and one line of JSON.

    fill      tokens over the space of all micro-batches on all ranks
    balance   per micro-batch, the costliest rank over the mean
"""
import argparse, importlib.util, json, statistics, sys, time, tracemalloc, types
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import configs, sampler


class Lengths:
    """The part of tokenize_data.Tokens that packing needs."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def n_inputs(self, i):
        return self.values[i]


def order():
    cfg, many = configs.load(["data.train.a.path=a", "batch_size=3840"])[0], 10_000_000
    tracemalloc.start()
    start = time.perf_counter()
    sampler.documents(many, cfg, {"a": 10**9})
    late, peak = (time.perf_counter() - start) * 1e3, tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    source = Lengths(np.clip(np.random.default_rng(0).lognormal(5.7, 1, many), 8, 8192).astype(np.int64))
    dataset = sampler.Dataset({"a": source})
    start, tokens, steps = time.perf_counter(), 0, sampler.steps_per_epoch(cfg, dataset.sizes)
    for step in range(steps):
        tokens += int(dataset.lengths(sampler.documents(step, cfg, dataset.sizes)).sum())
    seconds = time.perf_counter() - start
    assert tokens == source.values.sum()
    print(f"order: step 10,000,000 of a billion documents in {late:.1f} ms and {peak:.1f} MB; "
          f"{steps:,} steps of an epoch of ten million in {seconds:.1f} s")
    return {"late_ms": round(late, 1), "late_mb": round(peak, 1), "epoch_s": round(seconds, 1)}


def peer(path):
    """batch_lengths_to_minibatches_lpt of a checkout, as a packer of all ranks."""
    try:
        importlib.import_module("numba")
    except ImportError:
        sys.modules["numba"] = types.SimpleNamespace(njit=lambda *a, **k: a[0] if a else lambda f: f, int64=int)
    file = next(Path(path).rglob("batch_packer.py"))
    spec = importlib.util.spec_from_file_location("packer", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def pack(lengths, capacity, world_size):
        packed = (module.batch_lengths_to_minibatches_lpt(list(map(int, lengths)), capacity, world_size, rank)
                  for rank in range(world_size))
        return [[[i for i in members if i >= 0] for members in of_rank] for of_rank in packed]
    return pack


def best_fit(lengths, capacity, world_size):
    packed, room = [], np.zeros(0, np.int64)
    for i in np.argsort(-lengths, kind="stable"):
        fits = np.flatnonzero(room >= lengths[i])
        if len(fits):
            fullest = fits[room[fits].argmin()]
        else:
            fullest, room = len(packed), np.append(room, capacity)
            packed.append([])
        packed[fullest].append(int(i))
        room[fullest] -= lengths[i]
    packed += [[]] * (-len(packed) % world_size)
    return [packed[rank::world_size] for rank in range(world_size)]


def cost(members, lengths):
    return sampler.cost(lengths[members]).sum() if len(members) else 0.0


def judge(pack, lengths, capacity, world_size):
    """-> fill, balance, seconds"""
    start = time.perf_counter()
    packed = pack(lengths, capacity, world_size)
    seconds = time.perf_counter() - start
    count = max(map(len, packed))
    costs = np.array([[cost(members, lengths) for members in list(of_rank) + [[]] * (count - len(of_rank))]
                      for of_rank in packed])
    assert sorted(i for of_rank in packed for members in of_rank for i in members) == list(range(len(lengths)))
    assert all(lengths[members].sum() <= capacity for of_rank in packed for members in of_rank if len(members))
    return lengths.sum() / (world_size * count * capacity), costs.max(0).sum() / costs.mean(0).sum(), seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instructlab", type=Path)
    parser.add_argument("--minitrainer", type=Path)
    args = parser.parse_args()
    packers = {"ours": sampler.pack, "best fit": best_fit}
    peers = {"InstructLab": args.instructlab, "mini_trainer": args.minitrainer}
    packers |= {name: peer(path) for name, path in peers.items() if path}
    rng, result = np.random.default_rng(0), {"order": order()}
    lengths = np.clip(rng.lognormal(np.log(300), 1.0, 100_000), 8, 8192).astype(np.int64)
    for ranks in (8, 64):
        for name, pack in packers.items():
            every = 3840 * (1 if name in ("ours", "best fit") else 5)
            steps = [judge(pack, lengths[at:at + 3840], 8192, ranks) for at in range(0, len(lengths) - 3840, every)]
            fill, balance, seconds = (statistics.mean(s[n] for s in steps) for n in range(3))
            result[f"{name}, {ranks} ranks"] = {"fill": round(fill, 4), "balance": round(balance, 4), "n": len(steps)}
            print(f"{ranks:>3} ranks  {name:<13} fill {fill:.4f}   max/mean {balance:.4f}   "
                  f"{seconds * 1e3:7.1f} ms a step   n {len(steps)}")
    kinds = {"lognormal": np.clip(rng.lognormal(5.7, 0.9, 2000), 8, 8192),
             "bimodal": np.where(rng.random(2000) < 0.8, rng.integers(50, 300, 2000), rng.integers(2000, 4096, 2000)),
             "uniform": rng.integers(1, 2048, 2000)}
    for capacity in (130_000, 8192):
        for kind, values in kinds.items():
            values = values.astype(np.int64)
            times = [judge(sampler.pack, values, capacity, 8) for _ in range(5)]
            bound = -(-int(values.sum()) // (capacity * 8))
            count = len(sampler.pack(values, capacity, 8)[0])
            even, ms = 1 / times[0][1], statistics.median(t[2] for t in times) / 2 * 1e3
            result[f"{kind}, {capacity}"] = {"count": count, "bound": bound, "mean/max": round(even, 4)}
            print(f"2,000 {kind:<9} micro_tokens {capacity:>7,}: {count} per rank, bound {bound}, mean/max {even:.4f}, "
                  f"{ms:.1f} ms per 1,000")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
