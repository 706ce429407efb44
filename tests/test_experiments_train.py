"""experiments/: lion.py, dpo.py and pass_at_k.py. tests/test_experiments.py starts every experiment."""
import itertools, json, math, runpy, shutil, sys, types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import configs, launch, log, model as M, sampler, tokenize_data, train
from conftest import ROOT

TINY = ["data.tokenizer=bytes", "model.n_layers=2", "model.d_model=32", "model.n_heads=4", "model.max_len=256",
        "batch_size=6", "micro_tokens=240", "data.seq_len=240", "max_steps=6", "epochs=0", "save_every=3",
        "checkpoint.keep=9", "eval_every=0", "samples=0", "log_every=1", "lr=1e-2", "dtype=float32",
        "checkpoint.export=false"]


def load_config(folder, *words, out="run"):
    return configs.load([*TINY, f"data.cache_dir={folder / 'tokens'}", f"out_dir={folder / out}", *words])


def start(folder, name, ranks, *words, out="run"):
    """Run an experiment; returns the run's records."""
    words = [*TINY, f"data.cache_dir={folder / 'tokens'}", f"out_dir={folder / out}", *words]
    for process in launch.run_ranks(ranks, ["-m", f"experiments.{name}", *words]):
        assert process.returncode == 0, process.stdout + process.stderr
    return log.read(folder / out)


def column(records, key):
    return [record[key] for record in records if record.get(key) is not None]


# ---- lion.py

def test_lion_step_is_algorithm_2_of_the_paper(experiment):
    """Over five steps, for groups with settings of their own, and without a gradient."""
    Lion = experiment("lion").Lion
    draw = torch.Generator().manual_seed(0)
    settings = [{"lr": 0.1, "weight_decay": 0.5}, {"lr": 0.01, "weight_decay": 0.0}]
    params = [torch.randn(5, 3, generator=draw, requires_grad=True) for _ in settings]
    unused = torch.ones(2, requires_grad=True)
    groups = [{"params": [p], **setting} for p, setting in zip(params, settings)]
    groups[1]["params"].append(unused)
    optimizer = Lion(groups, [0.9, 0.99])
    naive = [p.detach().clone().double() for p in params]
    momenta = [torch.zeros_like(p) for p in naive]
    for _ in range(5):
        for i, setting in enumerate(settings):
            gradient = torch.randn(5, 3, generator=draw)
            params[i].grad = gradient
            direction = torch.sign(0.9 * momenta[i] + 0.1 * gradient)
            naive[i] -= setting["lr"] * (direction + setting["weight_decay"] * naive[i])
            momenta[i] = 0.99 * momenta[i] + 0.01 * gradient
        optimizer.step()
    for p, expected in zip(params, naive):
        assert torch.allclose(p.detach().double(), expected, atol=1e-6)
    assert torch.equal(unused.detach(), torch.ones(2))


def test_lion_resumes_a_sharded_run_on_one_rank(chats, tmp_path):
    """Three steps on two shards and three on one rank have the losses of six steps on one rank."""
    words = [f"data.train.chats.path={chats}", "optimizer=lion", "lr=1e-3"]
    one_rank = start(tmp_path, "lion", 1, *words, out="one")
    shards = start(tmp_path, "lion", 2, *words, "shard.mesh.shard=2", out="shards")
    newest = tmp_path / "shards" / "checkpoints" / "00000006"
    shutil.rmtree(newest)
    newest.with_name("latest").unlink()
    newest.with_name("latest").symlink_to("00000003")
    resumed = start(tmp_path, "lion", 1, *words, out="shards")
    assert column(shards, "loss") == pytest.approx(column(one_rank, "loss"), rel=1e-3)
    assert column(resumed, "loss") == pytest.approx(column(one_rank, "loss"), rel=1e-3)
    assert column(resumed, "loss")[-1] < column(resumed, "loss")[0]


# ---- dpo.py

@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A .jsonl of 20 preference pairs of uneven length."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    records = [{"prompt": "red " * (1 + i % 5), "chosen": "blue" * (1 + i % 3), "rejected": "green" * (1 + i % 4)}
               for i in range(20)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def save_base(folder, seed=0):
    """A small pretrained model with the 259 tokens of data.tokenizer=bytes, as TINY describes it."""
    m = configs.load([*TINY, "model.vocab_size=259"])[0]["model"]
    M.save_pretrained(M.build(m, seed).get_parameter, m, folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base") / "base")


def pair_words(pairs, base):
    return [f"data.train.x.path={pairs}", f"model.init_from={base}", "sampler.order=pairs", "data.train_on=last"]


def log_probability(model, dataset, i):
    """log p of a document's targets, from the logits of the document alone."""
    ids, loss_weights = dataset.document(i)
    logits = model.logits(M.pack_prompts([ids[:-1].tolist()]))
    nll = F.cross_entropy(logits, torch.tensor(ids[1:].astype(int)), reduction="none")
    return -(nll * torch.tensor(loss_weights[1:])).sum()


def naive_dpo_loss(model, reference, dataset, pair_indices, beta=0.1):
    """Equation 7 of arXiv:2305.18290."""
    losses = []
    for chosen, rejected in pair_indices:
        ratios = [log_probability(model, dataset, i) - log_probability(reference, dataset, i).detach()
                  for i in (chosen, rejected)]
        losses.append(-F.logsigmoid(beta * ratios[0] - beta * ratios[1]))
    return torch.stack(losses).mean()


def test_dpo_forward_backward_has_the_loss_and_gradient_of_the_formula(experiment, tmp_path, pairs, base):
    """With a policy that differs from the reference, in several micro-batches."""
    dpo = experiment("dpo")
    cfg, _, explicit = load_config(tmp_path, *pair_words(pairs, base), "micro_tokens=80", "data.seq_len=80")
    run = train.setup(cfg, explicit)
    reference_losses = train.reference_losses(run)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in run.model.parameters():
            p += 0.03 * torch.randn(p.shape, generator=draw)
    micro_batches, _, loss_weight = train.load_step(run, 0)
    loss, stats = dpo.dpo_forward_backward(run, reference_losses, run.model, micro_batches, loss_weight, cfg)
    gradients = {name: p.grad.clone() for name, p in run.model.named_parameters()}
    assert len(micro_batches) > 1 and len(stats) == len(micro_batches)

    run.model.zero_grad()
    reference, _ = M.load(base)
    naive = naive_dpo_loss(run.model, reference, run.dataset, run.sampler.documents(0).reshape(-1, 2))
    naive.backward()
    assert float(loss) == pytest.approx(naive.item(), rel=1e-5) and abs(naive.item() - math.log(2)) > 1e-3
    for name, p in run.model.named_parameters():
        assert torch.allclose(gradients[name], p.grad, rtol=1e-3, atol=1e-6), name


def test_dpo_starts_at_ln_2_and_prefers_chosen_answers_on_one_rank_and_on_two(tmp_path, pairs, base):
    """Two ranks log the same losses and gradient norms."""
    words = [*pair_words(pairs, base), "lr=1e-3", "max_steps=8", "micro_tokens=80", "data.seq_len=80"]
    one = start(tmp_path, "dpo", 1, *words, out="one")
    assert column(one, "loss")[0] == pytest.approx(math.log(2), abs=1e-5)
    assert column(one, "loss")[-1] < 0.6 and column(one, "reward_accuracy")[-1] == 1
    assert abs(column(one, "reward_margin")[0]) < 1e-4 and column(one, "reward_margin")[-1] > 0.2
    two = start(tmp_path, "dpo", 2, *words, out="two")
    for key in ("loss", "grad_norm", "reward_margin"):
        assert column(two, key) == pytest.approx(column(one, key), rel=1e-3, abs=1e-5), key


def test_dpo_replaces_the_chats_of_ft_yaml_by_pairs(experiment, tmp_path, monkeypatch):
    """Whatever the file is called; other data stays as it is."""
    experiment("dpo")
    mine = str(shutil.copy(ROOT / "configs" / "ft.yaml", tmp_path / "mine.yaml"))
    started = []
    monkeypatch.setattr(train, "cli", started.append)
    for words, path in (([], "data/pairs.jsonl"), (["data.train.chats.path=x.jsonl"], "x.jsonl")):
        monkeypatch.setattr(sys, "argv", ["dpo.py", mine, *words])
        runpy.run_path(ROOT / "experiments" / "dpo.py", run_name="__main__")
        cfg, _, _ = configs.load(started.pop())
        assert cfg["data"]["train"]["chats"]["path"].endswith(path)
        assert cfg["sampler"]["order"] == "pairs"


def test_reference_losses_are_computed_once_and_anew_for_other_data_or_another_model(
        experiment, tmp_path, pairs, base, monkeypatch):
    experiment("dpo")
    words = pair_words(pairs, base)
    calls = []
    compute = train.document_losses
    monkeypatch.setattr(train, "document_losses", lambda *args: calls.append(args) or compute(*args))

    def losses_of(*words, out):
        cfg, _, explicit = load_config(tmp_path, *words, out=out)
        run = train.setup(cfg, explicit)
        return train.reference_losses(run), run

    first, run = losses_of(*words, out="a")
    reference, _ = M.load(base)
    for i in (0, 1, 17):
        assert first[i] == pytest.approx(-log_probability(reference, run.dataset, i).item(), rel=1e-4)
    again, _ = losses_of(*words, "lr=1e-4", "batch_size=4", out="b")
    assert np.array_equal(first, again) and len(calls) == 1
    other = save_base(tmp_path / "other", seed=1)
    other_model, _ = losses_of(*words, f"model.init_from={other}", out="c")
    assert len(calls) == 2 and not np.allclose(first, other_model)
    fewer, _ = losses_of(*words, "data.validation_split=4", out="d")
    assert len(calls) == 3 and np.allclose(fewer, first[:-4], rtol=1e-5)


def test_reference_losses_need_a_model(experiment, tmp_path, pairs):
    experiment("dpo")
    cfg, _, explicit = load_config(tmp_path, f"data.train.x.path={pairs}", "sampler.order=pairs")
    with pytest.raises(configs.UserError, match="model.init_from=FOLDER"):
        train.reference_losses(train.setup(cfg, explicit))


def write_pairs(folder, *records):
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / "pairs.jsonl"


def documents_of(folder, path, *words):
    cfg = load_config(folder, f"data.train.x.path={path}", "data.train_on=last", *words)[0]
    return tokenize_data.load_datasets(cfg, quiet=True)["train"]["x"]


def test_encode_pair_makes_two_documents_of_texts_messages_and_whole_chats(experiment, tmp_path):
    """The same pair in three forms, with a plain chat before: the chat remains one document."""
    experiment("dpo")
    user = {"role": "user", "content": "q"}
    answers = {key: {"role": "assistant", "content": key} for key in ("chosen", "rejected")}
    path = write_pairs(
        tmp_path, {"messages": [user, answers["chosen"]]},
        {"prompt": "q", "chosen": "chosen", "rejected": "rejected", "score": 1},
        {"prompt": [user], "chosen": [answers["chosen"]], "rejected": [answers["rejected"]]},
        {"chosen": [user, answers["chosen"]], "rejected": [user, answers["rejected"]]},
        {"prompt": "q", "chosen": [user, answers["chosen"]], "rejected": [user, answers["rejected"]],
         "messages": [user]})
    tokens = documents_of(tmp_path, path)
    assert len(tokens) == 9
    decode = tokenize_data.load_tokenizer(configs.load(["data.tokenizer=bytes"])[0]).decode
    for i in range(9):
        ids, loss_weights = tokens.document(i)
        answer = "chosen" if i == 0 or i % 2 == 1 else "rejected"
        assert decode(ids[loss_weights > 0]).startswith(answer), i
        first_ids, first_weights = tokens.document({"chosen": 0, "rejected": 2}[answer])
        assert np.array_equal(ids, first_ids) and np.array_equal(loss_weights, first_weights)


def test_encode_pair_names_the_line_of_a_record_that_it_cannot_read(experiment, tmp_path):
    experiment("dpo")
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    path = write_pairs(tmp_path, pair, pair | {"rejected": 3})
    with pytest.raises(configs.UserError, match="pairs.jsonl, line 2"):
        documents_of(tmp_path, path)
    assert len(documents_of(tmp_path, path, "data.on_error=skip")) == 2       # skipped as a pair
    path.write_text(f"{json.dumps(pair)}\n{{\n")
    with pytest.raises(configs.UserError, match="pairs.jsonl, line 2: not valid JSON"):
        documents_of(tmp_path, path)


def test_pairs_have_token_files_of_their_own(experiment, tmp_path):
    """A record that is also a chat is one document without the experiment."""
    record = {"prompt": "q", "completion": "c", "chosen": "a", "rejected": "b"}
    path = write_pairs(tmp_path, record, record)
    assert len(documents_of(tmp_path, path)) == 2
    experiment("dpo")
    assert len(documents_of(tmp_path, path)) == 4


def pair_sampler(folder, path, *words):
    cfg = load_config(folder, f"data.train.x.path={path}", "sampler.order=pairs", *words)[0]
    return sampler.make_sampler(cfg, sampler.Dataset(tokenize_data.load_datasets(cfg, quiet=True)["train"]))


def test_pair_sampler_draws_each_pair_once_per_epoch(experiment, tmp_path, pairs):
    """20 pairs, three per step: seven steps; 40 documents of a second source keep their pairs, too."""
    experiment("dpo")
    for words, n_documents in (((), 40), ((f"data.train.more.path={pairs}",), 80)):
        made = pair_sampler(tmp_path, pairs, *words)
        n_steps = sampler.steps_per_epoch(load_config(tmp_path, *words, f"data.train.x.path={pairs}")[0],
                                          made.dataset.sizes)
        epochs = [np.concatenate([made.documents(step) for step in range(start, start + n_steps)])
                  for start in (0, n_steps)]
        for drawn in epochs:
            assert sorted(drawn) == list(range(n_documents))
            assert (drawn[0::2] % 2 == 0).all() and (drawn[1::2] == drawn[0::2] + 1).all()
        assert epochs[0].tolist() != epochs[1].tolist()
        assert len(made.documents(0)) == 6


def test_pair_sampler_refuses_data_that_is_not_whole_pairs(experiment, tmp_path, pairs, chats):
    """By name: single chats, answers that are cut off or have no target, half a pair, an odd batch_size."""
    experiment("dpo")
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    for path, words, problem in (
            (chats, (), "data.train.x: its 40 records .* 40 documents"),
            (pairs, ("data.seq_len=40",), "data.train.x: .* cut off by data.seq_len"),
            (pairs, ("data.validation_split=3",), "data.train.x: .* 37 remain after data.validation_split"),
            (pairs, ("batch_size=5",), "batch_size: must be even"),
            (write_pairs(tmp_path, pair, pair | {"chosen": []}), (), "line 2|data.train.x")):
        with pytest.raises(configs.UserError, match=problem):
            pair_sampler(tmp_path, path, *words)


# ---- pass_at_k.py

def test_pass_at_k_estimate_is_the_share_of_choices_that_contain_a_right_answer(experiment):
    estimate = experiment("pass_at_k").estimate
    for n, k in ((1, 1), (5, 1), (6, 3), (8, 4), (4, 4)):
        for c in range(n + 1):
            chosen = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert estimate(n, c, k) == pytest.approx(sum(map(any, chosen)) / len(chosen))


@pytest.fixture(scope="module")
def two_answers(tmp_path_factory):
    """A .jsonl of 12 chats whose answer is A or B, with nothing in the question that decides which."""
    path = tmp_path_factory.mktemp("two_answers") / "chats.jsonl"
    chats = [[{"role": "user", "content": "which?"}, {"role": "assistant", "content": "AB"[i % 2]}] for i in range(12)]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return path


def test_pass_at_k_is_logged_and_decides_about_the_best_checkpoint_on_one_rank_and_on_two(two_answers, tmp_path):
    """One greedy answer is right half of the time, one of four samples 15/16 of the time."""
    words = [f"data.train.chats.path={two_answers}", f"data.validation.seen.path={two_answers}",
             "best=max val/seen/pass_at_4", "max_steps=40", "eval_every=20", "save_every=0", "eval_prompts=6",
             "eval_tokens=3", "log_every=20"]
    values_by_ranks = []
    for ranks in (1, 2):
        records = start(tmp_path, "pass_at_k", ranks, *words, out=f"on{ranks}")
        values = column(records, "val/seen/pass_at_4")
        assert len(values) == 3 and values[0] == 0 and 0.8 < values[2] <= 1
        assert column(records, "val/seen/exact_match")[2] == 0.5
        best = (tmp_path / f"on{ranks}" / "checkpoints" / "best").resolve().name
        assert int(best) == 20 * int(np.argmax(values))
        values_by_ranks.append(values)
    assert values_by_ranks[1] == pytest.approx(values_by_ranks[0], abs=0.1)       # rounding may tip a token


def test_pass_at_k_compares_what_eval_answer_selects(experiment, monkeypatch):
    """Of two prompts one has the right last line in half of its 8 samples, the other in none."""
    module = experiment("pass_at_k")
    samples = iter([[("", f"x\n{i % 2}", "y\n1"), ("", "x\n1", "y\n2")] for i in range(8)])
    monkeypatch.setattr(train, "generate_answers", lambda *args, **options: next(samples))
    cfg = {"seed": 0, "eval_answer": "last_line"}
    run = types.SimpleNamespace(cfg=cfg, state=types.SimpleNamespace(step=1), stop_signal=0)
    assert module.pass_at_k(run, [None, None]) == pytest.approx((1 - 1 / 70) / 2)


def test_best_names_evaluations_among_the_logged_numbers(experiment, two_answers, tmp_path):
    experiment("pass_at_k")
    cfg, _, explicit = load_config(tmp_path, f"data.train.chats.path={two_answers}", "data.validation_split=4",
                                   "eval_every=3", "best=val/chats/pass_at_5")
    with pytest.raises(configs.UserError, match="best: must be one of .*val/chats/exact_match, val/chats/pass_at_4"):
        train.setup(cfg, explicit)


def test_evaluations_without_prompts_are_no_value_for_best(experiment, chats, tmp_path):
    experiment("pass_at_k")
    cfg, _, explicit = load_config(tmp_path, f"data.train.chats.path={chats}", "data.validation_split=4",
                                   "eval_every=3", "eval_prompts=0", "best=max val/chats/pass_at_4")
    with pytest.raises(configs.UserError, match="best: must be one of"):
        train.setup(cfg, explicit)


def test_generate_answers_samples_the_same_for_a_seed_and_prompt(chats, tmp_path, monkeypatch):
    """However many prompts are answered at once, as on other numbers of ranks; another seed, other answers."""
    cfg, _, explicit = load_config(tmp_path, f"data.train.chats.path={chats}", "data.validation_split=6",
                                   "eval_every=3", "eval_tokens=8", "eval_share=0")
    run = train.setup(cfg, explicit)
    prompts = run.prompts["chats"]
    assert len(prompts) == 6
    sampled = train.generate_answers(run, prompts, 1, temperature=1.0)
    assert sampled == train.generate_answers(run, prompts, 1, temperature=1.0)
    assert sampled != train.generate_answers(run, prompts, 2, temperature=1.0)
    assert len({answer for _, answer, _ in sampled}) == 6
    monkeypatch.setattr(train, "PROMPTS_PER_RANK", 4)
    assert sampled == train.generate_answers(run, prompts, 1, temperature=1.0)
    assert train.generate_answers(run, prompts, 1) == train.generate_answers(run, prompts, 2)     # greedy
