"""experiments/: each one does what its first lines say, and runs on one rank and on two.

Add an experiment to EXPERIMENTS. Tests of what only one of them does follow.
"""
import json, math, shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import configs, launch, log, model as M, sampler, tokenize_data, train
from conftest import ROOT


def row(*words, same_loss=True, sharded=True):
    """A row of EXPERIMENTS.

    words      of the command line, added to those of TINY; "FOLDER" in one is the tests' folder
    same_loss  is the loss the same on one rank and on two?
    sharded    does it run with shard.mesh.shard=2? If not, it must raise a UserError for that key
    """
    return SimpleNamespace(words=words, same_loss=same_loss, sharded=sharded)


EXPERIMENTS = {
    "by_gradient": row(),
    "by_loss": row(),
    "clipped": row("grad_clip=0.5", same_loss=False, sharded=False),
    "distill": row("reference_model=FOLDER/base"),
    "dpo": row("data.train.chats.path=FOLDER/pairs.jsonl", "model.init_from=FOLDER/base", "lr=1e-3"),
    "focal": row(),
    "lion": row("lr=1e-3"),
    "majority": row(same_loss=False, sharded=False),
    "ngram_embeddings": row("model.embed_options.rows=64"),
    "pass_at_k": row(),
    "softcap": row("model.score_mod_options.cap=5"),
}
TINY = ["data.train.chats.path=FOLDER/chats.jsonl", "data.validation_split=4", "data.tokenizer=bytes",
        "data.cache_dir=FOLDER/tokens", "model.n_layers=2", "model.d_model=32", "model.n_heads=4", "batch_size=6",
        "micro_tokens=240", "data.seq_len=240", "max_steps=6", "epochs=0", "save_every=3", "checkpoint.keep=9",
        "eval_every=6", "eval_tokens=4", "eval_prompts=2", "samples=0", "log_every=1", "lr=1e-2", "dtype=float32",
        "checkpoint.export=false"]
STATE_FILES = ("model.safetensors", "optimizer.safetensors", "sampler.safetensors")
# in metrics.jsonl, what depends on the clock and on the machine
MEASURED = {"tok_per_s", "mfu", "memory", "seconds", "compiled", "data_wait", "save_wait",
            "memory_max", "data_wait_max", "save_wait_max", "rank_wait", "slowest_rank", "slow_step", "slow_seconds",
            "slow_data_wait", "slow_save_wait", "slow_ranks_wait"}


@pytest.fixture(scope="module")
def start(chats, tmp_path_factory):
    """start(name, ranks, *words, out) -> (the finished process of each rank, the run's folder)"""
    folder = tmp_path_factory.mktemp("experiments")
    shutil.copy(chats, folder / "chats.jsonl")
    pairs = [{"prompt": "red " * (1 + i % 9), "chosen": "blue " * (1 + i % 3), "rejected": "green"} for i in range(20)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    model_words = [word for word in TINY if word.startswith("model.")]
    base_cfg = configs.load([*model_words, "model.vocab_size=259"])[0]["model"]
    M.save_pretrained(M.build(base_cfg).get_parameter, base_cfg, folder / "base")

    def start_experiment(name, ranks, *words, out=None):
        out = folder / (out or f"{name}-{ranks}")
        words = [*TINY, *EXPERIMENTS[name].words, f"out_dir={out}", *words]
        words = [word.replace("FOLDER", str(folder)) for word in words]
        return launch.run_ranks(ranks, ["-m", f"experiments.{name}", *words]), out
    return start_experiment


@pytest.fixture(scope="module")
def finished(start):
    """finished(name, ranks) -> the folder of a run, which is the same run in all tests."""
    runs = {}

    def run_once(name, ranks):
        if (name, ranks) not in runs:
            runs[name, ranks] = succeeded(start(name, ranks))
        return runs[name, ranks]
    return run_once


def succeeded(started):
    """The folder of a run, each of whose ranks ended with exit status 0."""
    processes, run = started
    for process in processes:
        assert process.returncode == 0, process.stdout + process.stderr
    return run


def records(run):
    """metrics.jsonl without what is measured: [{"step", "loss", ...}]"""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in MEASURED} for line in lines]


def figures(run, key="loss"):
    """{step: value}"""
    return {record["step"]: record[key] for record in records(run) if record.get(key) is not None}


def saved(run, step, file="sampler.safetensors"):
    return load_file(run / "checkpoints" / f"{step:08}" / file)


def test_all_experiments_are_in_the_table():
    names = {path.stem for path in (ROOT / "experiments").glob("*.py")} - {"__init__"}
    assert names == set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_runs_on_one_rank_and_on_two_and_resumes_bitwise(name, start, finished):
    """Six steps; on one rank, the checkpoint of the sixth is deleted, and the run is resumed from the third."""
    losses = {ranks: figures(finished(name, ranks)) for ranks in (1, 2)}
    for ranks, launcher in ((1, "python"), (2, "torchrun --nproc_per_node 2")):
        assert list(losses[ranks]) == [1, 2, 3, 4, 5, 6] and all(map(math.isfinite, losses[ranks].values()))
        [first_start, *_] = log.read(finished(name, ranks), "starts.jsonl")
        assert first_start["command"].startswith(f"{launcher} -m experiments.{name} data.train.")
    if EXPERIMENTS[name].same_loss:
        assert losses[2] == pytest.approx(losses[1], rel=1e-4)

    run = finished(name, 1)
    before = records(run)
    checkpoints = run / "checkpoints"
    contents = [(checkpoints / "00000006" / file).read_bytes() for file in STATE_FILES]
    shutil.rmtree(checkpoints / "00000006")
    (checkpoints / "latest").unlink()
    (checkpoints / "latest").symlink_to("00000003")
    succeeded(start(name, 1))
    for file, content in zip(STATE_FILES, contents):
        assert (checkpoints / "00000006" / file).read_bytes() == content, file
    assert records(run) == before


# not those that change a function of logits or scores alone, which shards do not reach
@pytest.mark.parametrize("name", [name for name in EXPERIMENTS
                                  if name not in ("focal", "softcap", "pass_at_k")])
def test_experiment_runs_with_a_sharded_model_or_refuses_it(name, start, finished):
    """The losses are those of two replicated ranks."""
    started = start(name, 2, "shard.mesh.shard=2", out=f"{name}-sharded")
    if EXPERIMENTS[name].sharded:
        assert figures(succeeded(started)) == pytest.approx(figures(finished(name, 2)), rel=1e-4)
    else:
        process = started[0][0]
        assert process.returncode != 0 and "error: shard.mesh.shard: " in process.stderr


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_prints_its_commands_without_arguments(name, script):
    out = script("-m", f"experiments.{name}")
    assert out.returncode == 0, out.stderr
    assert f"torchrun -m experiments.{name} configs/" in out.stdout
    assert f"torchrun --nproc_per_node 2 -m experiments.{name} configs/" in out.stdout


# ---- by_loss.py

@pytest.fixture
def by_loss(tiny, experiment):
    """A LossSampler of 36 chats, six of them per step."""
    experiment("by_loss")
    return make_sampler(tiny("sampler.order=by_loss", "batch_size=6"))


def make_sampler(config):
    cfg = config[0]
    return sampler.make_sampler(cfg, sampler.Dataset(tokenize_data.load_datasets(cfg, quiet=True)["train"]))


def draws_per_step(made, steps=600):
    """How often each document is drawn in a step."""
    drawn = np.concatenate([made.documents(step) for step in range(steps)])
    return np.bincount(drawn, minlength=len(made.dataset)) / steps


def test_by_loss_draws_all_documents_equally_before_it_has_seen_a_loss(by_loss):
    n = len(by_loss.dataset)
    assert abs(draws_per_step(by_loss) - 6 / n).max() < 0.06


def test_by_loss_draws_in_proportion_to_the_last_loss_per_target(by_loss):
    """update() gets summed losses, in any order of documents."""
    n = len(by_loss.dataset)
    loss = np.where(np.arange(n) % 3 == 0, 3.0, 1.0)
    summed = loss * by_loss.dataset.n_targets(np.arange(n))
    by_loss.update(np.arange(n), {"loss": summed * 5})
    by_loss.update(np.arange(n)[::-1], {"loss": summed[::-1]})
    assert abs(draws_per_step(by_loss) - 6 * loss / loss.sum()).max() < 0.08


@pytest.mark.parametrize("name", ["by_loss", "by_gradient"])
def test_sampling_experiment_draws_in_proportion_to_the_weights_of_sources(name, tiny, chats, experiment):
    experiment(name)
    made = make_sampler(tiny(f"sampler.order={name}", "batch_size=6", f"data.train.more.path={chats}",
                             "data.train.more.weight=3"))
    drawn = draws_per_step(made)
    assert drawn[36:].sum() / drawn[:36].sum() == pytest.approx(3, rel=0.1)


def test_by_loss_documents_are_different_and_a_function_of_step_and_state(by_loss):
    n = len(by_loss.dataset)
    by_loss.update(np.arange(n), {"loss": np.random.default_rng(0).random(n) * 100})
    again = type(by_loss)(by_loss.cfg, by_loss.dataset)
    again.load_state_dict(by_loss.state_dict())
    steps = [by_loss.documents(step).tolist() for step in range(20)]
    assert all(len(set(drawn)) == 6 for drawn in steps) and len({tuple(drawn) for drawn in steps}) == 20
    assert [again.documents(step).tolist() for step in range(20)] == steps


def test_by_loss_counts_from_the_next_step_on_and_forgets_a_loss_that_is_not_finite(by_loss):
    n = len(by_loss.dataset)
    by_loss.update(np.arange(n), {"loss": np.where(np.arange(n) == 17, 1e6, 1.0)})
    assert all(17 in by_loss.documents(step) for step in range(9))
    by_loss.update(np.array([17, 3]), {"loss": np.array([np.nan, np.inf])})
    assert not all(17 in by_loss.documents(step) for step in range(9))


def test_by_loss_saves_the_losses_it_has_seen_the_same_on_two_ranks(finished):
    one, two = finished("by_loss", 1), finished("by_loss", 2)
    seen = [np.isfinite(saved(one, step)["loss"]).sum() for step in (3, 6)]
    assert len(saved(one, 6)["loss"]) == 36 and 6 <= seen[0] <= 18 and seen[0] < seen[1] <= 36
    np.testing.assert_allclose(saved(two, 6)["loss"], saved(one, 6)["loss"], rtol=1e-4)
    for key in ("documents", "tokens"):
        assert figures(one, key) == figures(two, key)


# ---- by_gradient.py

def gradient_of(model, micro_batch, normalize=True):
    """The gradient of a micro-batch's loss as one vector."""
    loss_sum, weight_sum, _ = model(micro_batch)
    model.zero_grad()
    (loss_sum / weight_sum if normalize else loss_sum).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def to_torch(micro_batch):
    return train.pin_tensors(micro_batch, torch.device("cpu"))


@pytest.fixture
def by_gradient(tiny, experiment):
    """(a GradientSampler of 36 chats, six of them per step; a model)"""
    experiment("by_gradient")
    config = tiny("sampler.order=by_gradient", "batch_size=6", "model.tie_embeddings=false")
    cfg = config[0]
    model = M.build(train.resolve_model(cfg, tokenize_data.load_tokenizer(cfg))[0], cfg["seed"])
    return make_sampler(config), model


def test_by_gradient_sums_the_squared_norms_of_the_heads_gradients(by_gradient):
    made, model = by_gradient
    for document in range(3):
        micro_batch = sampler.collate([document], made.dataset)
        squares = []
        for target in np.flatnonzero(micro_batch["loss_weights"]):
            alone = np.full_like(micro_batch["targets"], -100)
            alone[target] = micro_batch["targets"][target]
            model.zero_grad()
            model(to_torch(micro_batch | {"targets": alone}))[0].backward()
            squares.append(float(model.head.weight.grad.norm()) ** 2)
        stats = model(to_torch(micro_batch))[2]
        assert float(stats["squared_norm"]) == pytest.approx(sum(squares), rel=1e-4)


def test_by_gradient_is_the_default_gradient_on_average(by_gradient):
    """The summed gradients of the documents of 300 steps, with their weights, are those of as many even draws."""
    made, model = by_gradient
    n = len(made.dataset)
    per_document = torch.stack([gradient_of(model, to_torch(sampler.collate([i], made.dataset)), normalize=False)
                                for i in range(n)])
    made.update(np.arange(n), {"squared_norm": per_document.norm(dim=1).numpy() ** 2})
    total, drawn = torch.zeros_like(per_document[0]), np.zeros(n)
    for step in range(300):
        indices = made.documents(step)
        micro_batch = sampler.collate(indices, made.dataset)
        made.reweight(micro_batch)
        weights = np.maximum.reduceat(micro_batch["loss_weights"], micro_batch["cu_seqlens"][:-1])
        total += torch.from_numpy(weights) @ per_document[indices]
        drawn[indices] += 1
    want = per_document.mean(0) * 6
    assert float((total / 300 - want).norm() / want.norm()) < 0.06
    assert drawn.max() > 1.3 * drawn.min()


def test_by_gradient_update_removes_its_own_weights(by_gradient):
    """The norm that it stores is that of the loss without importance weights."""
    made, model = by_gradient
    n = len(made.dataset)
    made.update(np.arange(n), {"squared_norm": np.linspace(1, 9, n)})
    stored = []
    for _ in range(2):
        micro_batch = sampler.collate([4, 20, 31], made.dataset)
        made.reweight(micro_batch)
        made.update(np.array([4, 20, 31]), {"squared_norm": model(to_torch(micro_batch))[2]["squared_norm"].numpy()})
        stored.append(made.norm[[4, 20, 31]].copy())
    plain = model(to_torch(sampler.collate([4, 20, 31], made.dataset)))[2]["squared_norm"].numpy()
    np.testing.assert_allclose(stored, [plain ** 0.5] * 2, rtol=1e-4)


# ---- clipped.py

@pytest.mark.parametrize("grad_clip", [1e9, 0.3])
def test_clipped_is_the_weighted_mean_of_clipped_gradients(grad_clip, tiny, experiment):
    """A large grad_clip gives the default gradient."""
    default = train.forward_backward
    clipped = experiment("clipped")
    cfg = tiny("micro_tokens=120", "data.seq_len=120", f"grad_clip={grad_clip}")[0]
    dataset = sampler.Dataset(tokenize_data.load_datasets(cfg, quiet=True)["train"])
    model = M.build(train.resolve_model(cfg, tokenize_data.load_tokenizer(cfg))[0], cfg["seed"])
    micro_batches, _ = sampler.load_micro_batches(np.arange(6), cfg, dataset)
    micro_batches.append(sampler.collate([], dataset))                  # an idle one
    weights = [sampler.sum_loss_weights([micro_batch]) for micro_batch in micro_batches]
    micro_batches = [to_torch(micro_batch) for micro_batch in micro_batches]
    want = 0
    for micro_batch, weight in zip(micro_batches[:-1], weights):
        mean = gradient_of(model, micro_batch)
        want += weight / sum(weights) * mean * min(1, grad_clip / float(mean.norm()))
    model.zero_grad()
    loss, document_stats = clipped.forward_backward(model, micro_batches, sum(weights), cfg)
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert len(micro_batches) > 2 and torch.allclose(got, want, atol=1e-6)
    assert float(got.norm()) <= grad_clip * (1 + 1e-5)
    model.zero_grad()
    default_loss, default_stats = default(model, micro_batches, sum(weights), cfg)
    assert loss == default_loss and len(document_stats) == len(default_stats)
    if grad_clip == 1e9:
        assert torch.allclose(got, torch.cat([p.grad.flatten() for p in model.parameters()]), atol=1e-6)


def test_clipped_needs_a_norm(experiment, tiny):
    with pytest.raises(configs.UserError, match="grad_clip: must be above 0"):
        experiment("clipped").forward_backward(None, [], 1.0, tiny("grad_clip=0.0")[0])


# ---- majority.py

@pytest.mark.parametrize("ranks", [1, 2])
def test_majority_reduces_the_loss(ranks, start):
    """Every gradient is +1, -1 or 0, so its norm is at most the root of the number of parameters."""
    run = succeeded(start("majority", ranks, "max_steps=20", "lr=2e-3", "eval_every=0", out=f"vote-{ranks}"))
    losses, norms = figures(run), figures(run, "grad_norm")
    n_parameters = sum(t.size for t in saved(run, 18, "model.safetensors").values())
    assert losses[20] < losses[1] - 0.2
    for norm in norms.values():
        squared = norm ** 2
        assert round(squared) <= n_parameters and abs(squared - round(squared)) < 0.1
