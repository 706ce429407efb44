"""experiments/: each one does what its first lines say, and runs on one rank and on two."""
import importlib, json, shutil, sys

import numpy as np
import pytest
from safetensors.numpy import load_file

import configs, launch, sampler, tokenize_data


# ---- feedback.py

@pytest.fixture
def feedback(monkeypatch):
    """The experiment's module, for one test: a run's code includes all modules that are loaded."""
    monkeypatch.setattr(sampler, "SAMPLERS", dict(sampler.SAMPLERS))
    yield importlib.import_module("experiments.feedback")
    del sys.modules["experiments.feedback"]


@pytest.fixture
def feedback_sampler(tiny, feedback):
    """A FeedbackSampler of 36 chats, six of them per step."""
    cfg = tiny("sampler.order=feedback", "batch_size=6")[0]
    return sampler.make_sampler(cfg, sampler.Dataset(tokenize_data.load_datasets(cfg, quiet=True)["train"]))


def draws_per_step(made, steps=600):
    """How often each document is drawn in a step."""
    drawn = np.concatenate([made.documents(step) for step in range(steps)])
    return np.bincount(drawn, minlength=len(made.dataset)) / steps


def test_feedback_is_registered(feedback, feedback_sampler):
    assert isinstance(feedback_sampler, feedback.FeedbackSampler) and feedback_sampler.uses_feedback


def test_feedback_draws_all_documents_equally_before_it_has_seen_a_loss(feedback_sampler):
    n = len(feedback_sampler.dataset)
    assert abs(draws_per_step(feedback_sampler) - 6 / n).max() < 0.06


def test_feedback_draws_in_proportion_to_the_last_loss_per_target(feedback_sampler):
    """update() gets summed losses, in any order of documents."""
    n = len(feedback_sampler.dataset)
    loss = np.where(np.arange(n) % 3 == 0, 3.0, 1.0)
    summed = loss * feedback_sampler.dataset.n_targets(np.arange(n))
    feedback_sampler.update(np.arange(n), {"loss": summed * 5})
    feedback_sampler.update(np.arange(n)[::-1], {"loss": summed[::-1]})
    assert abs(draws_per_step(feedback_sampler) - 6 * loss / loss.sum()).max() < 0.08


def test_feedback_draws_in_proportion_to_the_weights_of_sources(tiny, chats, feedback):
    cfg = tiny("sampler.order=feedback", "batch_size=6", f"data.train.more.path={chats}", "data.train.more.weight=3")[0]
    made = sampler.make_sampler(cfg, sampler.Dataset(tokenize_data.load_datasets(cfg, quiet=True)["train"]))
    drawn = draws_per_step(made)
    assert drawn[36:].sum() / drawn[:36].sum() == pytest.approx(3, rel=0.1)


def test_feedback_update_counts_from_the_next_step_on(feedback_sampler):
    n = len(feedback_sampler.dataset)
    before = feedback_sampler.documents(7)
    loss = np.where(np.arange(n) == 17, 1e6, 1.0)
    feedback_sampler.update(np.arange(n), {"loss": loss})
    assert 17 in feedback_sampler.documents(7) and len(before) == 6


def test_feedback_documents_are_different_and_a_function_of_step_and_state(feedback, feedback_sampler):
    n = len(feedback_sampler.dataset)
    feedback_sampler.update(np.arange(n), {"loss": np.random.default_rng(0).random(n) * 100})
    again = feedback.FeedbackSampler(feedback_sampler.cfg, feedback_sampler.dataset)
    again.load_state_dict(feedback_sampler.state_dict())
    steps = [feedback_sampler.documents(step).tolist() for step in range(20)]
    assert all(len(set(drawn)) == 6 for drawn in steps) and len({tuple(drawn) for drawn in steps}) == 20
    assert [again.documents(step).tolist() for step in range(20)] == steps


def test_feedback_update_ignores_losses_that_are_not_finite(feedback_sampler):
    n = len(feedback_sampler.dataset)
    feedback_sampler.update(np.arange(n), {"loss": np.ones(n)})
    feedback_sampler.update(np.array([0, 1]), {"loss": np.array([np.nan, np.inf])})
    assert np.isfinite(feedback_sampler.loss).all()


def test_feedback_load_state_dict_refuses_other_documents(feedback_sampler):
    with pytest.raises(configs.UserError, match="sampler.order.* 3 documents"):
        feedback_sampler.load_state_dict({"loss": np.zeros(3, np.float32)})


def test_systematic_sample_is_as_drawn_in_its_docstring(feedback):
    """Weights 3 1 2 in the order 1 0 2: a start before 1 selects 1 and 0, a later one 0 and 2."""
    weights = np.array([3.0, 1.0, 2.0])
    keys = [sampler.hash_key(i) for i in range(200)]
    keys = [key for key in keys if sampler.permute(np.arange(3), 3, key).tolist() == [1, 0, 2]]
    drawn = {tuple(feedback.systematic_sample(weights, 2, key).tolist()) for key in keys}
    assert drawn == {(1, 0), (0, 2)}


def test_systematic_sample_fills_up_when_one_weight_is_selected_twice(feedback):
    weights = np.full(10, 1e-6)
    weights[4] = 1.0
    drawn = feedback.systematic_sample(weights, 3, sampler.hash_key(1))
    assert 4 in drawn and len(set(drawn)) == 3
    assert sorted(feedback.systematic_sample(weights, 99, sampler.hash_key(1))) == list(range(10))


def test_systematic_sample_of_a_million_documents_follows_their_weights(feedback):
    weights = np.random.default_rng(0).random(1_000_000)
    drawn = feedback.systematic_sample(weights, 512, sampler.hash_key(3))
    assert len(set(drawn)) == 512
    assert weights[drawn].mean() > 0.6                                    # 2/3 expected; 1/2 if drawn equally


@pytest.fixture(scope="module")
def start_feedback(chats, tmp_path_factory):
    """start_feedback(name, ranks) runs eight steps of the experiment; it returns the run's folder."""
    folder = tmp_path_factory.mktemp("feedback")

    def start(name, ranks):
        command = ["-m", "experiments.feedback", f"data.train.chats.path={chats}", "data.tokenizer=bytes",
                     "data.validation_split=4", f"data.cache_dir={folder / 'tokens'}", f"out_dir={folder / name}",
                     "model.n_layers=2", "model.d_model=32", "model.n_heads=4", "batch_size=6", "micro_tokens=240",
                     "max_steps=8", "epochs=0", "save_every=4", "checkpoint.keep=9", "eval_every=0", "log_every=1",
                     "lr=1e-2", "dtype=float32", "checkpoint.export=false"]
        for out in launch.run_ranks(ranks, command):
            assert out.returncode == 0, out.stderr
        return folder / name
    return start


@pytest.fixture(scope="module")
def one_rank(start_feedback):
    return start_feedback("one", 1)


@pytest.fixture(scope="module")
def two_ranks(start_feedback):
    return start_feedback("two", 2)


def figures(run, key="loss"):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r[key] for r in records if r.get(key) is not None}


def saved_losses(run, step):
    return load_file(run / "checkpoints" / f"{step:08}" / "sampler.safetensors")["loss"]


def test_feedback_run_saves_the_losses_it_has_seen(one_rank):
    seen = [np.isfinite(saved_losses(one_rank, step)).sum() for step in (4, 8)]
    assert len(saved_losses(one_rank, 8)) == 36
    assert 6 <= seen[0] <= 24 and seen[0] <= seen[1] <= 36
    assert list(figures(one_rank)) == list(range(1, 9))


def test_feedback_run_is_the_same_on_two_ranks(one_rank, two_ranks):
    one, two = figures(one_rank), figures(two_ranks)
    assert [two[step] for step in one] == pytest.approx([one[step] for step in one], rel=1e-4)
    for key in ("documents", "tokens"):
        assert figures(one_rank, key) == figures(two_ranks, key)
    np.testing.assert_allclose(saved_losses(two_ranks, 8), saved_losses(one_rank, 8), rtol=1e-4)


@pytest.mark.parametrize("ranks", [1, 2])
def test_feedback_run_resumes_bitwise(one_rank, two_ranks, start_feedback, tmp_path, ranks):
    run = {1: one_rank, 2: two_ranks}[ranks]
    before = tmp_path / "before"
    shutil.copytree(run, before, symlinks=True)
    newest = run / "checkpoints" / "00000008"
    shutil.rmtree(newest)
    (run / "checkpoints" / "latest").unlink()
    (run / "checkpoints" / "latest").symlink_to("00000004")
    start_feedback(run.name, ranks)
    for file in ("model.safetensors", "optimizer.safetensors", "sampler.safetensors"):
        assert (newest / file).read_bytes() == (before / "checkpoints" / "00000008" / file).read_bytes(), file
    assert figures(run) == figures(before)


def test_feedback_without_arguments_prints_how_to_start(script):
    out = script("-m", "experiments.feedback")
    assert out.returncode == 0 and "torchrun -m experiments.feedback configs/ft.yaml" in out.stdout


# ---- majority_vote.py

def start_majority_vote(chats, folder, *more, ranks=1):
    """Returns the finished process of each rank."""
    command = ["-m", "experiments.majority_vote", f"data.train.chats.path={chats}", "data.tokenizer=bytes",
                  f"data.cache_dir={folder / 'tokens'}", f"out_dir={folder / f'ranks{ranks}'}", "model.n_layers=2",
                  "model.d_model=32", "model.n_heads=4", "batch_size=4", "micro_tokens=240", "data.seq_len=240",
                  "max_steps=20", "epochs=0", "save_every=20", "eval_every=0", "log_every=1", "optimizer=sgd",
                  "momentum=0.0", "lr=2e-3", "grad_clip=0.0", "weight_decay=0.0", "dtype=float32",
                  "checkpoint.export=false", *more]
    return launch.run_ranks(ranks, command)


@pytest.mark.parametrize("ranks", [1, 2])
def test_majority_vote_reduces_the_loss(chats, tmp_path, ranks):
    """Every gradient is +1, -1 or 0, so its norm is at most the root of the number of parameters."""
    for out in start_majority_vote(chats, tmp_path, ranks=ranks):
        assert out.returncode == 0, out.stderr
    run = tmp_path / f"ranks{ranks}"
    losses, norms = figures(run), figures(run, "grad_norm")
    n_parameters = sum(t.size for t in load_file(run / "checkpoints" / "00000020" / "model.safetensors").values())
    assert losses[20] < losses[1] - 0.2
    for norm in norms.values():
        squared = norm ** 2
        assert round(squared) <= n_parameters and abs(squared - round(squared)) < 0.1


def test_majority_vote_refuses_a_sharded_model(chats, tmp_path):
    """Under FSDP no rank has the gradient of its own micro-batch, so the vote would be another algorithm."""
    out = start_majority_vote(chats, tmp_path, "shard.mesh.shard=2", ranks=2)[0]
    assert out.returncode != 0 and "error: shard.mesh.shard: gradients per micro-batch" in out.stderr
