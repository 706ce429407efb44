"""sampler.py: the order is a function of (seed, step), micro-batches are full, balanced and hold what documents say."""
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


# ---- order

@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 17, 256, 1000])
def test_permute_is_a_permutation(n):
    for k in range(5):
        assert sorted(S.permute(np.arange(n), n, S.hash_key(k))) == list(range(n))


def test_permute_looks_random():
    n = 1000
    first = np.array([S.permute(np.array([0, 1]), n, S.hash_key(k)) for k in range(2000)])
    assert abs(first.mean() - (n - 1) / 2) < 25
    assert abs(np.corrcoef(first.T)[0, 1]) < 0.08
    walk = S.permute(np.arange(n), n, S.hash_key(7))
    assert abs(np.corrcoef(walk[:-1], walk[1:])[0, 1]) < 0.1


def test_permute_and_documents_stay_what_they_were():
    """Golden values: a resumed run must draw the documents that the interrupted one would have drawn."""
    assert list(S.permute(np.arange(7), 7, S.hash_key(0, 1, 0))) == [6, 2, 3, 1, 4, 5, 0]
    c, sizes = cfg(batch=6, a=2, b=0.5), {"a": 5, "b": 8}
    assert S.documents(0, c, sizes).tolist() == [11, 1, 0, 10, 4, 3]
    assert S.documents(1, c, sizes).tolist() == [4, 1, 2, 3, 9, 12]
    assert S.documents(1000, c, sizes).tolist() == [5, 9, 3, 10, 1, 3]


def test_documents_and_pack_are_as_drawn_at_the_top_of_the_file():
    steps = [S.documents(step, cfg(a=1), {"a": 7}).tolist() for step in range(6)]
    assert steps == [[3, 2, 6], [4, 5, 1], [0], [3, 5, 0], [2, 6, 1], [4]]
    n = [5, 4, 3, 3, 2, 1]
    drawn = [[[n[i] for i in members] for members in of_rank] for of_rank in S.pack(n, 6, world_size=2)]
    assert drawn == [[[4, 2], [3, 1]], [[5], [3]]]
    assert "3 2 6 | 4 5 1 | 0" in S.__doc__ and "4 2 | 3 1" in S.__doc__


def test_documents_come_once_per_epoch_in_a_new_order():
    c, sizes = cfg(a=1, b=1), {"a": 7, "b": 4}
    epochs = [epoch(c, sizes, e) for e in range(5)]
    assert all(sorted(e) == list(range(11)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 5
    assert [len(S.documents(s, c, sizes)) for s in range(5)] == [3, 3, 3, 2, 3]


def test_documents_drop_last_leaves_out_the_incomplete_step():
    c, sizes = cfg(drop_last="true", a=1, b=1), {"a": 7, "b": 4}
    assert [len(S.documents(s, c, sizes)) for s in range(4)] == [3, 3, 3, 3]
    assert S.steps_per_epoch(c, sizes) == 3
    with pytest.raises(configs.UserError, match="sampler.drop_last.*batch_size=2"):
        S.steps_per_epoch(c, {"a": 1, "b": 1})


def test_documents_depend_on_the_seed():
    c, sizes = cfg(a=1), {"a": 50}
    assert list(epoch(c, sizes, 0)) != list(epoch(c | {"seed": 1}, sizes, 0))


def test_documents_sequential_is_the_order_of_the_files():
    assert list(epoch(cfg(order="sequential", a=1, b=1), {"a": 5, "b": 4}, 1)) == list(range(9))


def test_documents_weights_are_passes_over_a_source():
    """Weight 2: each document twice per epoch. Weight 0.5: half of them, and in the next epoch the other half."""
    c, sizes = cfg(batch=5, a=2, b=0.5), {"a": 6, "b": 8}
    for e in range(2):
        counts = np.bincount(epoch(c, sizes, e), minlength=14)
        assert (counts[:6] == 2).all() and counts[6:].sum() == 4 and counts.max() == 2
    both = np.bincount(np.concatenate([epoch(c, sizes, e) for e in range(2)]), minlength=14)
    assert (both[6:] == 1).all()
    assert S.documents_per_epoch(c, sizes).tolist() == S.documents_per_epoch(c, [6, 8]).tolist() == [12, 4]


def test_documents_weighted_draws_sources_in_proportion():
    c, sizes = cfg(batch=10, order="weighted", a=3, b=1), {"a": 100, "b": 900}
    counts = np.bincount(epoch(c, sizes, 0) >= 100)
    assert counts[0] == 750 and counts[1] == 250


def test_documents_weighted_ignores_the_weight_of_an_empty_source():
    """The others share the epoch; without any document there is an error, and no division by 0."""
    c = cfg(order="weighted", a=1, b=2, c=3)
    assert S.documents_per_epoch(c, {"a": 10, "b": 20, "c": 0}).tolist() == [10, 20, 0]
    with pytest.raises(configs.UserError, match="no documents"):
        S.steps_per_epoch(c, {"a": 0, "b": 0, "c": 0})


def test_documents_are_a_function_of_the_step_alone():
    c, sizes = cfg(a=1, b=2), {"a": 70, "b": 44}
    late = S.documents(1000, c, sizes)
    for s in range(5):
        S.documents(s, c, sizes)
    assert list(S.documents(1000, c, sizes)) == list(late)


def test_documents_of_a_billion_need_no_list():
    c, sizes = cfg(batch=1000, a=1), {"a": 10**9}
    tracemalloc.start()
    assert len(np.unique(S.documents(10**7, c, sizes))) == 1000
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


def test_sampler_imports_no_torch():
    code = "import sampler; print('torch' in __import__('sys').modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=configs.HERE.parent, capture_output=True, text=True)
    assert out.stdout.strip() == "False", out.stderr


# ---- the Sampler interface

@pytest.mark.parametrize("order", ["random", "sequential", "weighted"])
def test_make_sampler_gives_a_stateless_sampler(tiny, order):
    c = tiny(f"sampler.order={order}")[0]
    dataset = S.Dataset(tokenize_data.load_datasets(c, quiet=True)["train"])
    made = S.make_sampler(c, dataset)
    before = [made.documents(step).tolist() for step in range(12)]
    assert before == [S.documents(step, c, dataset.sizes).tolist() for step in range(12)]
    made.update(np.arange(4), {"loss": np.ones(4)})
    assert made.state_dict() == {} and not made.uses_feedback
    made.load_state_dict({})
    assert before == [made.documents(step).tolist() for step in range(12)]


def test_make_sampler_takes_a_registered_class_and_refuses_an_unknown_name(monkeypatch):
    class FirstDocuments(S.Sampler):
        def documents(self, step):
            return np.arange(self.cfg["batch_size"])

    monkeypatch.setitem(S.SAMPLERS, "first", FirstDocuments)
    c = cfg(a=1)
    c["sampler"]["order"] = "first"
    assert S.make_sampler(c, S.Dataset({})).documents(7).tolist() == [0, 1, 2]
    c["sampler"]["order"] = "frist"
    with pytest.raises(configs.UserError, match="sampler.order: must be one of random, sequential, weighted.*; got frist"):
        S.make_sampler(c, S.Dataset({}))


# ---- packing

def lengths(kind, n=2000, most=8192):
    rng = np.random.default_rng(0)
    draw = {"lognormal": rng.lognormal(5.5, 1, n),
            "bimodal": np.where(rng.random(n) < .7, rng.normal(100, 20, n), rng.normal(1500, 300, n)),
            "uniform": rng.uniform(1, 1000, n)}[kind]
    return np.clip(draw, 1, most).astype(int)


def check_packed(packed, n, capacity):
    """Each document once, no micro-batch above the capacity, the same number of micro-batches on every rank."""
    assert sorted(i for of_rank in packed for members in of_rank for i in members) == list(range(len(n)))
    assert all(n[members].sum() <= capacity for of_rank in packed for members in of_rank)
    assert len({len(of_rank) for of_rank in packed}) == 1


@pytest.mark.parametrize("kind", ["lognormal", "bimodal", "uniform"])
@pytest.mark.parametrize("capacity", [8192, 130_000])
def test_pack_fills_few_micro_batches_and_balances_ranks(kind, capacity):
    n, world_size = lengths(kind), 8
    packed = S.pack(n, capacity, world_size)
    check_packed(packed, n, capacity)
    assert len(packed[0]) <= -(-n.sum() // (capacity * world_size)) + 1
    costs = np.array([[S.cost(n[members]).sum() for members in of_rank] for of_rank in packed])
    assert np.mean(costs.mean(0) / costs.max(0)) > 0.98
    assert S.pack(n, capacity, world_size) == packed


def test_pack_of_none_one_and_a_full_micro_batch():
    assert S.pack([], 10, 3) == [[], [], []]
    assert S.pack([4], 10, 3) == [[[0]], [[]], [[]]]
    assert S.pack([10], 10) == [[[0]]]


def test_pack_refuses_a_document_longer_than_the_capacity():
    with pytest.raises(configs.UserError, match="micro_tokens.*11"):
        S.pack([3, 11], 10)


def test_pack_falls_back_to_best_fit():
    """9 | 6 4 | 5 3 2: the cheapest micro-batch first strands the last document, the fullest first does not."""
    n = np.array([2, 9, 6, 5, 4, 3])
    longest_first = [1, 2, 3, 4, 5, 0]
    allowances = S._allowances(S.cost(n), longest_first, 3, 1)
    assert S._pack_balanced(n, S.cost(n), longest_first, 10, allowances) is None
    check_packed(S.pack(n, 10), n, 10)
    assert len(S.pack(n, 10)[0]) == 3


@pytest.mark.parametrize("seed", range(20))
def test_pack_packs_random_lengths(seed):
    rng = np.random.default_rng(seed)
    for _ in range(10):
        n, world_size = rng.integers(1, 33, rng.integers(1, 40)), int(rng.integers(1, 6))
        check_packed(S.pack(n, 32, world_size), n, 32)


# ---- Dataset

@pytest.fixture
def two_sources(tiny, chats):
    """-> (cfg, Dataset of chats and of windows of text)"""
    c = tiny(f"data.train.text.path={chats}.txt", "data.seq_len=100", "batch_size=13")
    text = chats.with_name(chats.name + ".txt")
    text.write_text(" ".join(f"word {i}" for i in range(400)))
    return c[0], S.Dataset(tokenize_data.load_datasets(c[0], quiet=True)["train"])


def test_dataset_counts_through_all_sources(two_sources):
    _, dataset = two_sources
    assert list(dataset.sizes) == ["chats", "text"]
    assert len(dataset) == sum(dataset.sizes.values()) == sum(map(len, dataset.sources.values()))
    first_text = dataset.sizes["chats"]
    source, within = dataset.locate([0, first_text, first_text - 1, len(dataset) - 1])
    assert source.tolist() == [0, 1, 0, 1]
    assert within.tolist() == [0, 0, first_text - 1, dataset.sizes["text"] - 1]
    with pytest.raises(IndexError):
        dataset.locate([len(dataset)])


def test_dataset_lengths_and_n_targets_are_those_of_its_documents(two_sources):
    _, dataset = two_sources
    order = np.random.default_rng(0).permutation(len(dataset))
    documents = [dataset.document(i) for i in order]
    assert dataset.lengths(order).tolist() == [len(ids) - 1 for ids, _ in documents]
    assert dataset.n_targets(order).tolist() == [int(mask[1:].sum()) for _, mask in documents]
    assert dataset.lengths([]).tolist() == dataset.n_targets([]).tolist() == []


def test_dataset_n_targets_of_a_held_out_split(tiny):
    """Training and held-out documents share token files: each Tokens has the counts of its own documents."""
    data = tokenize_data.load_datasets(tiny()[0], quiet=True)
    for kind in ("train", "validation"):
        tokens = data[kind]["chats"]
        assert len(tokens.n_targets) == len(tokens)
        assert tokens.n_targets.tolist() == [int(tokens.document(i)[1][1:].sum()) for i in range(len(tokens))]


def test_dataset_describe_names_source_and_document(two_sources):
    _, dataset = two_sources
    first_text = dataset.sizes["chats"]
    assert dataset.describe(np.array([3, first_text + 2])) == "chats 3, text 2"
    assert dataset.describe([17, 3, 1, 2, 4], limit=2) == "chats 17, chats 3 and 3 more"


def test_load_state_dict_copies_arrays_and_refuses_those_of_other_documents():
    class Counter(S.Sampler):
        def __init__(self, cfg, dataset):
            super().__init__(cfg, dataset)
            self.times = np.zeros(5, np.int64)

        def state_dict(self):
            return {"times": self.times}

    made = Counter(cfg(a=1), S.Dataset({}))
    made.load_state_dict({"times": np.arange(5)})
    assert made.times.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(configs.UserError, match=r"sampler.order: .* times of shape \(3,\), .* times of shape \(5,\)"):
        made.load_state_dict({"times": np.arange(3)})
    with pytest.raises(configs.UserError, match="sampler.order: .* has no times"):
        made.load_state_dict({"loss": np.arange(5)})


# ---- drawing in proportion to weights

def test_fill_unknown_takes_the_mean_of_the_known_values():
    assert S.fill_unknown(np.array([np.nan, 1, 3], np.float32)).tolist() == [2, 1, 3]
    assert S.fill_unknown(np.full(2, np.nan, np.float32)).tolist() == [1, 1]


def test_systematic_sample_is_as_drawn_in_its_docstring():
    """Weights 3 1 2 in the order 1 0 2: a start before 1 selects 1 and 0, a later one 0 and 2."""
    weights = np.array([3.0, 1.0, 2.0])
    keys = [S.hash_key(i) for i in range(200)]
    keys = [key for key in keys if S.permute(np.arange(3), 3, key).tolist() == [1, 0, 2]]
    drawn = {tuple(S.systematic_sample(weights, 2, key).tolist()) for key in keys}
    assert drawn == {(1, 0), (0, 2)}


def test_systematic_sample_fills_up_when_one_weight_is_selected_twice():
    weights = np.full(10, 1e-6)
    weights[4] = 1.0
    drawn = S.systematic_sample(weights, 3, S.hash_key(1))
    assert 4 in drawn and len(set(drawn)) == 3
    assert sorted(S.systematic_sample(weights, 99, S.hash_key(1))) == list(range(10))


def test_systematic_sample_of_a_million_documents_follows_their_weights():
    weights = np.random.default_rng(0).random(1_000_000)
    drawn = S.systematic_sample(weights, 512, S.hash_key(3))
    assert len(set(drawn)) == 512
    assert weights[drawn].mean() > 0.6                                    # 2/3 expected; 1/2 if drawn equally


# ---- micro-batches

def test_load_micro_batches_hold_what_their_documents_say(two_sources):
    c, dataset = two_sources
    indices = S.documents(3, c, dataset.sizes)
    micro_batches, info = S.load_micro_batches(indices, c, dataset)
    assert sorted(i for mb in micro_batches for i in mb["doc_ids"]) == sorted(indices)
    assert info["documents"] == 13
    assert info["tokens"] == sum(mb["cu_seqlens"][-1] for mb in micro_batches) == sum(info["lengths"])
    assert info["target_tokens"] == S.sum_loss_weights(micro_batches) == dataset.n_targets(indices).sum()
    for mb in micro_batches:
        assert mb["cu_seqlens"][-1] <= c["micro_tokens"]
        assert mb["max_seqlen"] == np.diff(mb["cu_seqlens"]).max()
        for index, start, end in zip(mb["doc_ids"], mb["cu_seqlens"], mb["cu_seqlens"][1:]):
            ids, mask = dataset.document(index)
            assert (mb["tokens"][start:end] == ids[:-1]).all()
            assert (mb["positions"][start:end] == np.arange(end - start)).all()
            assert (mb["targets"][start:end] == np.where(mask[1:], ids[1:].astype(int), -100)).all()
            assert (mb["loss_weights"][start:end] == mask[1:]).all()


def test_collate_has_one_encoding_of_what_is_trained(two_sources):
    """Targets and loss_weights, of stated types, which agree about what has a loss."""
    _, dataset = two_sources
    mb = S.collate([1, 0, len(dataset) - 1], dataset)
    dtypes = {"tokens": np.int64, "targets": np.int64, "loss_weights": np.float32, "positions": np.int64,
              "cu_seqlens": np.int32, "doc_ids": np.int64}
    assert {key: value.dtype for key, value in mb.items() if key != "max_seqlen"} == dtypes
    assert ((mb["targets"] == -100) == (mb["loss_weights"] == 0)).all()


def test_collate_pads_outside_every_document(two_sources):
    _, dataset = two_sources
    mb = S.collate([0, 1, 2], dataset, pad_to=256)
    end = mb["cu_seqlens"][-1]
    assert len(mb["tokens"]) % 256 == 0 and len(mb["tokens"]) - end < 256
    assert (mb["targets"][end:] == -100).all() and (mb["loss_weights"][end:] == 0).all()
    assert mb["max_seqlen"] >= len(mb["tokens"]) - end
    assert S.sum_loss_weights([mb]) == S.sum_loss_weights([S.collate([0, 1, 2], dataset)])


def test_collate_of_no_documents_is_an_idle_micro_batch(two_sources):
    _, dataset = two_sources
    mb = S.collate([], dataset, pad_to=128)
    assert mb["cu_seqlens"].tolist() == [0] and len(mb["tokens"]) == len(mb["doc_ids"]) == mb["max_seqlen"] == 0
    assert S.sum_loss_weights([mb]) == 0


def test_loss_weight_follows_an_edit_of_collate(two_sources, monkeypatch):
    """The denominator is read from the arrays that the loss uses; only targets count, and negative weights by size."""
    c, dataset = two_sources
    plain = S.sum_loss_weights(S.load_micro_batches(np.arange(8), c, dataset)[0])
    collate = S.collate

    def edited(indices, dataset, pad_to=1):
        mb = collate(indices, dataset, pad_to)
        mb["loss_weights"] *= -0.5
        mb["loss_weights"][mb["targets"] == -100] = 7
        return mb

    monkeypatch.setattr(S, "collate", edited)
    micro_batches, _ = S.load_micro_batches(np.arange(8), c, dataset)
    assert S.sum_loss_weights(micro_batches) == 0.5 * plain > 0
    assert S.sum_loss_weights([]) == 0


def test_load_micro_batches_reads_the_same_documents_on_any_number_of_ranks(tiny):
    c = tiny("batch_size=13")[0]
    dataset = S.Dataset(tokenize_data.load_datasets(c, quiet=True)["train"])
    indices = S.documents(1, c, dataset.sizes)
    for world_size in (1, 2, 4, 32):
        parts = [S.load_micro_batches(indices, c, dataset, world_size, rank) for rank in range(world_size)]
        drawn = sorted(i for micro_batches, _ in parts for mb in micro_batches for i in mb["doc_ids"])
        assert drawn == sorted(indices)
        assert len({len(micro_batches) for micro_batches, _ in parts}) == 1
        assert len({str(info) for _, info in parts}) == 1                # the same on every rank, without asking
        weight = sum(S.sum_loss_weights(micro_batches) for micro_batches, _ in parts)
        assert weight == parts[0][1]["target_tokens"]
        assert 0 < parts[0][1]["packing"] <= 1


# ---- python sampler.py

def test_script_prints_steps_packing_and_balance(script, tiny, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(configs.dump(tiny()[2]))
    out = script("sampler.py", config, "ranks=3")
    assert out.returncode == 0, out.stderr
    assert "chats: 36 documents, 36 per epoch" in out.stdout and "= 9 steps per epoch" in out.stdout
    assert "1 rank: " in out.stdout and "3 ranks: " in out.stdout and "% full" in out.stdout
    refused = script("sampler.py", config, "ranks=0")
    assert refused.returncode == 1 and refused.stderr == "error: ranks: must be at least 1; got 0\n"
    refused = script("sampler.py", config, "sampler.order=rnd")
    assert refused.returncode and "sampler.order: must be one of random, sequential, weighted" in refused.stderr


def test_script_without_arguments_prints_how_to_start(script):
    for argv in ([], ["--help"]):
        out = script("sampler.py", *argv)
        assert out.returncode == 0 and "python sampler.py configs/ft.yaml" in out.stdout
