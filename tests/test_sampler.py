"""sampler.py: order is arithmetic (law 2), rows are full and even, a row holds what its documents say (law 5)."""
import subprocess, sys, tracemalloc

import numpy as np
import pytest

import configs, sampler as S, tokenize_data


def cfg(batch=3, order="random", drop_last="false", **weights):
    keys = [f"data.train.{name}.{key}" for name, w in weights.items() for key in ("path=x", f"weight={w}")]
    return configs.load([f"batch_size={batch}", f"sampler.order={order}", f"sampler.drop_last={drop_last}", *keys])[0]


def epoch(c, sizes, e):
    n = S.steps_per_epoch(c, sizes)
    return np.concatenate([S.documents(e * n + s, c, sizes) for s in range(n)])


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 17, 256, 1000])
def test_a_permutation_is_one(n):
    for k in range(5):
        assert sorted(S.permuted(np.arange(n), n, S.key(k))) == list(range(n))


def test_permutations_look_random():
    n = 1000
    first = np.array([S.permuted(np.array([0, 1]), n, S.key(k)) for k in range(2000)])
    assert abs(first.mean() - (n - 1) / 2) < 25 and abs(np.corrcoef(first.T)[0, 1]) < 0.08
    walk = S.permuted(np.arange(n), n, S.key(7))
    assert abs(np.corrcoef(walk[:-1], walk[1:])[0, 1]) < 0.1


def test_every_document_once_an_epoch_in_a_new_order_each_time():
    c, sizes = cfg(a=1, b=1), {"a": 7, "b": 4}
    epochs = [epoch(c, sizes, e) for e in range(5)]
    assert all(sorted(e) == list(range(11)) for e in epochs) and len({tuple(e) for e in epochs}) == 5
    assert [len(S.documents(s, c, sizes)) for s in range(5)] == [3, 3, 3, 2, 3]
    c["sampler"]["drop_last"] = True
    assert [len(S.documents(s, c, sizes)) for s in range(4)] == [3, 3, 3, 3] and S.steps_per_epoch(c, sizes) == 3


def test_another_seed_is_another_order_and_sequential_is_the_files():
    c, sizes = cfg(a=1), {"a": 50}
    assert list(epoch(c, sizes, 0)) != list(epoch(c | {"seed": 1}, sizes, 0))
    assert list(epoch(cfg(order="sequential", a=1, b=1), {"a": 5, "b": 4}, 1)) == list(range(9))


def test_weights_are_passes_over_a_source():
    c, sizes = cfg(batch=5, a=2, b=0.5), {"a": 6, "b": 8}
    for e in range(2):
        counts = np.bincount(epoch(c, sizes, e), minlength=14)
        assert (counts[:6] == 2).all() and counts[6:].sum() == 4 and counts.max() == 2
    both = np.bincount(np.concatenate([epoch(c, sizes, e) for e in range(2)]), minlength=14)
    assert (both[6:] == 1).all()                                     # half of it, and then the other half


def test_weighted_draws_sources_in_proportion():
    c, sizes = cfg(batch=10, order="weighted", a=3, b=1), {"a": 100, "b": 900}
    counts = np.bincount(epoch(c, sizes, 0) >= 100)
    assert counts[0] == 750 and counts[1] == 250


def test_a_step_is_a_function_of_the_step_alone():
    c, sizes = cfg(a=1, b=2), {"a": 70, "b": 44}
    late = S.documents(1000, c, sizes)
    for s in range(5):
        S.documents(s, c, sizes)
    assert list(S.documents(1000, c, sizes)) == list(late)
    code = "import sampler; print('torch' in __import__('sys').modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=configs.HERE.parent, capture_output=True, text=True)
    assert out.stdout.strip() == "False", out.stderr


def test_a_billion_documents_need_no_list():
    c, sizes = cfg(batch=1000, a=1), {"a": 10**9}
    tracemalloc.start()
    assert len(np.unique(S.documents(10**7, c, sizes))) == 1000
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


# ---- rows

def lengths(kind, n=2000, most=8192):
    rng = np.random.default_rng(0)
    draw = {"lognormal": rng.lognormal(5.5, 1, n),
            "bimodal": np.where(rng.random(n) < .7, rng.normal(100, 20, n), rng.normal(1500, 300, n)),
            "uniform": rng.uniform(1, 1000, n)}[kind]
    return np.clip(draw, 1, most).astype(int)


@pytest.mark.parametrize("kind", ["lognormal", "bimodal", "uniform"])
@pytest.mark.parametrize("capacity", [8192, 130_000])
def test_rows_are_few_even_and_whole(kind, capacity):
    n, ranks = lengths(kind), 8
    rows = S.pack(n, capacity, ranks)
    assert sorted(i for rank in rows for row in rank for i in row) == list(range(len(n)))
    assert {len(rank) for rank in rows} == {len(rows[0])}
    assert max(n[row].sum() for rank in rows for row in rank) <= capacity
    assert len(rows[0]) <= -(-n.sum() // (capacity * ranks)) + 1
    costs = np.array([[S.cost(n[row]).sum() for row in rank] for rank in rows])
    assert np.mean(costs.mean(0) / costs.max(0)) > 0.98 and S.pack(n, capacity, ranks) == rows


def test_edges_of_packing():
    assert S.pack([], 10, 3) == [[], [], []]
    assert S.pack([4], 10, 3) == [[[0]], [[]], [[]]]
    assert S.pack([10], 10) == [[[0]]]
    with pytest.raises(ValueError, match="micro_tokens.*11"):
        S.pack([3, 11], 10)
    rows = S.pack([6, 6, 6, 4, 4, 4], 10, 1)
    # cheapest-first would need no more here; tight packing must not, either
    assert len(rows[0]) == 3
    for seed in range(200):
        rng = np.random.default_rng(seed)
        n, ranks = rng.integers(1, 33, rng.integers(1, 40)), int(rng.integers(1, 6))
        rows = S.pack(n, 32, ranks)
        assert sorted(i for rank in rows for row in rank for i in row) == list(range(len(n)))
        assert all(n[row].sum() <= 32 for rank in rows for row in rank) and len({len(rank) for rank in rows}) == 1


def test_a_row_holds_what_its_documents_say(tiny):
    c = tiny()[0]
    train = tokenize_data.load_datasets(c, quiet=True)["train"]
    rows, info = S.step_rows(3, c, train)
    wanted = S.documents(3, c, {name: len(t) for name, t in train.items()})
    assert sorted(i for row in rows for i in row["doc_ids"]) == sorted(wanted) and info["documents"] == 4
    assert info["tokens"] == sum(row["cu_seqlens"][-1] for row in rows)
    assert info["weight"] == sum(row["loss_weights"].sum() for row in rows) == info["target_tokens"]
    for row in rows:
        assert row["cu_seqlens"][-1] <= c["micro_tokens"]
        for doc, start, end in zip(row["doc_ids"], row["cu_seqlens"], row["cu_seqlens"][1:]):
            ids, mask = train["chats"].document(doc)
            assert (row["tokens"][start:end] == ids[:-1]).all()
            assert (row["positions"][start:end] == np.arange(end - start)).all()
            assert (row["targets"][start:end] == np.where(mask[1:], ids[1:].astype(int), -100)).all()
        assert (row["trained"] == np.flatnonzero(row["targets"] != -100)).all()
    few, _ = S.step_rows(3, c, train, pad_to=256)
    assert all(len(row["tokens"]) % 256 == 0 for row in few)
    assert all((row["targets"][row["cu_seqlens"][-1]:] == -100).all() for row in few)


def test_ranks_read_the_same_documents_however_many_they_are(tiny):
    c = tiny("batch_size=13")[0]
    train = tokenize_data.load_datasets(c, quiet=True)["train"]
    for ranks in (1, 2, 4, 32):
        parts = [S.step_rows(1, c, train, ranks, rank) for rank in range(ranks)]
        drawn = sorted(i for rows, _ in parts for row in rows for i in row["doc_ids"])
        assert drawn == sorted(S.documents(1, c, {"chats": 36}))
        assert len({len(rows) for rows, _ in parts}) == 1 and len({info["weight"] for _, info in parts}) == 1


def test_feedback_draws_in_proportion_to_the_loss_that_was_seen(tiny):
    cfg = tiny("sampler.order=feedback", "batch_size=6")[0]
    sources = tokenize_data.load_datasets(cfg, quiet=True)["train"]
    n, sizes = len(sources["chats"]), {"chats": len(sources["chats"])}
    seen = S.Seen(cfg, sources)

    def count(steps):
        drawn = np.concatenate([S.documents(s, cfg, sizes, seen) for s in range(steps)])
        return np.bincount(drawn, minlength=n) / steps
    even = count(600)
    assert abs(even - 6 / n).max() < 0.06                              # nothing seen: all alike
    targets = S.targets_of(np.arange(n), list(sources.values()))
    losses = np.where(np.arange(n) % 3 == 0, 3.0, 1.0)
    before = S.documents(7, cfg, sizes, seen)
    seen.tell(np.arange(n)[::-1], (losses * targets)[::-1])
    assert (S.documents(7, cfg, sizes, seen) == before).all()    # told, and not taken in
    seen.take_in()
    drawn = count(600)
    assert abs(drawn - 6 * losses / losses.sum()).max() < 0.08
    again = S.Seen(cfg, sources)
    again.load(seen.state())
    for step in range(20):
        got = S.documents(step, cfg, sizes, seen)
        assert len(set(got)) == 6 and (S.documents(step, cfg, sizes, again) == got).all()
    seen.tell([0, 1], [np.nan, np.inf])
    seen.take_in()
    assert np.isfinite(seen.loss).all() and len(seen.draw(1000, S.key(1))) == n
    with pytest.raises(ValueError, match="sampler.order"):
        again.load({"loss": np.zeros(3), "documents": np.zeros(0), "losses": np.zeros(0)})


def test_feedback_plans_a_million_documents_quickly_enough_to_hide():
    seen = S.Seen.__new__(S.Seen)
    seen.loss, seen.rate = np.random.default_rng(0).random(1_000_000).astype(np.float32), np.ones(1_000_000)
    drawn = seen.draw(512, S.key(3))
    # 2/3 where the loss is uniform, 1/2 without feedback
    assert len(set(drawn)) == 512 and seen.loss[drawn].mean() > 0.6
