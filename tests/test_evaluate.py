"""How train.py evaluates, samples, saves and stops."""
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import checkpoint
import configs
import launch
import log
import tokenize_data
import train
from conftest import ROOT


def main(loaded):
    """A whole run from what configs.load() returned; returns its out_dir."""
    cfg, _, explicit = loaded
    train.main(cfg, explicit)
    return Path(cfg["out_dir"])


def setup(loaded):
    cfg, _, explicit = loaded
    return train.setup(cfg, explicit)


def evaluations(out):
    return [record for record in log.read(out) if "val/chats/loss" in record]


def write_chats(path, answers):
    with open(path, "w") as file:
        for i, answer in enumerate(answers):
            question = " ".join(["what"] * (1 + i % 4))
            messages = [{"role": "user", "content": question},
                        {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


# --------------------------------------------------------------------------------------------------
# what is compared

@pytest.mark.parametrize("eval_answer, text, part", [
    ("all", " a\nb ", " a\nb "),
    ("last_line", "a\n b \n\n", "b"),
    ("last_line", "", ""),
    ("#### (.*)", "#### 1\nno\n####  42 \n", "42"),
    ("[0-9]+", "12 or 345.", "345"),
    ("(x)|y", "x y", ""),
    ("#### (.*)", "the answer is 42", "")])
def test_compared_part_of_an_answer(eval_answer, text, part):
    """The whole text, its last line that is not empty, or the first group of the last match."""
    assert train.compared_part(text, eval_answer) == part


def test_eval_answer_that_is_no_regular_expression_is_refused(tiny):
    with pytest.raises(configs.UserError, match="eval_answer: must be all, last_line or a"):
        tiny("eval_answer=#### (.*")


def test_build_prompts_takes_chats_whose_reference_has_an_answer(tiny, tmp_path):
    """If no reference has one, the pattern is refused with the name of the data."""
    write_chats(tmp_path / "val.jsonl", ["so #### 4", "no answer", "#### 5"])
    more = ["data.validation_split=0", f"data.validation.val.path={tmp_path / 'val.jsonl'}"]
    run = setup(tiny(*more, "eval_answer=#### (.*)"))
    references = [run.tokenizer.decode(reference) for _, reference in run.prompts["val"]]
    assert references == ["so #### 4", "#### 5"]
    with pytest.raises(configs.UserError, match="eval_answer: .* matches none of the 3 .* of val"):
        setup(tiny(*more, "eval_answer=answer: (.*)", out="other"))


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """(out_dir, keys) of a finished run whose model answers every question with "so\\n7"."""
    folder = tmp_path_factory.mktemp("learned")
    write_chats(folder / "train.jsonl", ["so\n7"] * 40)
    write_chats(folder / "val.jsonl", ["as\n7"] * 5 + ["as\n8"])
    keys = [f"data.train.a.path={folder / 'train.jsonl'}", "data.tokenizer=bytes",
            f"data.validation.chats.path={folder / 'val.jsonl'}",
            f"data.cache_dir={folder / 'tokens'}", f"out_dir={folder / 'run'}", "model.n_layers=2",
            "model.d_model=32", "model.n_heads=4", "batch_size=8", "max_steps=60", "epochs=0",
            "log_every=10", "eval_every=1.0", "eval_tokens=8", "eval_share=0", "lr=1e-2",
            "save_every=20", "dtype=float32", "samples=1"]
    main(configs.load(keys))
    return folder / "run", keys


def test_eval_only_evaluates_the_newest_checkpoint_and_replaces_its_record(learned, capsys):
    """The rest of metrics.jsonl, config.yaml and the checkpoints stay; nothing is trained."""
    out, keys = learned
    before = log.read(out)
    config = (out / "config.yaml").read_text()
    found = {}
    for eval_answer in ("all", "last_line", "[a-z]+\\n(.)"):
        main(configs.load([*keys, "eval_only=true", f"eval_answer={eval_answer}"]))
        *others, record = log.read(out)
        assert others == before and record["step"] == 60 and record["eval_only"] == 1
        assert record["val/chats/loss"] == before[-1]["val/chats/loss"]
        found[eval_answer] = record["val/chats/exact_match"]
    assert found == {"all": 0, "last_line": 5 / 6, "[a-z]+\\n(.)": 5 / 6}
    assert "step 60 evaluated; the record is in" in capsys.readouterr().out
    assert (out / "config.yaml").read_text() == config
    assert [p.name for p in checkpoint.list_checkpoints(out)] == ["00000040", "00000060"]
    assert [line["step"] for line in log.read(out, "evaluations.jsonl")] == [0, 60, 60]
    samples = log.read(out, "evaluations.jsonl")[-1]["answers"]["chats"]
    assert [(sample["answer"], sample["exact_match"]) for sample in samples[-2:]] == [
        ("so\n7", 1), ("so\n7", 0)]


def test_eval_only_does_not_change_which_checkpoint_is_the_best(tiny, tmp_path):
    """Nor does it count for a run that is resumed, whose best has the losses of its own data."""
    write_chats(tmp_path / "val.jsonl", ["7"] * 4)
    write_chats(tmp_path / "other.jsonl", ["é\n" * 9] * 4)
    keys = ["max_steps=4", "eval_every=2", "data.validation_split=0", "eval_prompts=0",
            "best=val/val/bits_per_byte"]
    data = f"data.validation.val.path={tmp_path}"
    out = main(tiny(*keys, f"{data}/val.jsonl"))
    best = out / "checkpoints" / "best"
    assert best.resolve().name == "00000004"
    main(tiny(*keys, f"{data}/other.jsonl", "eval_only=true"))
    own, last = [record for record in log.read(out) if "val/val/loss" in record][-2:]
    assert last["val/val/loss"] > own["val/val/loss"] and last["step"] == own["step"] == 4
    assert best.resolve().name == "00000004"
    main(tiny(*keys, f"{data}/val.jsonl"))
    assert best.resolve().name == "00000004"


def test_eval_only_of_an_older_checkpoint_takes_another_folder(learned, tmp_path):
    """In the run's own folder it is refused, because the records of later steps would go."""
    out, keys = learned
    older = f"resume={out}/checkpoints/00000040"
    before = (out / "metrics.jsonl").read_text()
    with pytest.raises(configs.UserError, match="of step 40 would delete; resume=.*00000040 out_dir=NEW"):
        main(configs.load([*keys, older, "eval_only=true"]))
    assert (out / "metrics.jsonl").read_text() == before
    for _ in range(2):                                   # the same command again works, too
        new = main(configs.load([*keys, older, "eval_only=true", f"out_dir={tmp_path / 'new'}"]))
        [record] = log.read(new)
        assert record["step"] == 40 and record["val/chats/loss"] > 0
    assert not (new / "checkpoints").exists() and not (new / "hf").exists()
    two = ["eval_only=true", f"out_dir={tmp_path / 'two'}"]
    main(configs.load([*keys, f"resume={out}/checkpoints/00000060", *two]))
    with pytest.raises(configs.UserError, match="two has records .* of step 40 would delete; out_dir=NEW"):
        main(configs.load([*keys, older, *two]))
    assert [record["step"] for record in log.read(tmp_path / "two")] == [60]


@pytest.mark.parametrize("save_every, hint", [(0, "out_dir=NEW"), (2, "resume=.*00000002 out_dir=NEW")])
def test_eval_only_keeps_the_records_of_steps_that_were_not_saved(tiny, save_every, hint):
    keys = ["max_steps=3", f"save_every={save_every}", "checkpoint.save_final=false"]
    out = main(tiny(*keys))
    with pytest.raises(configs.UserError, match=f"of step {save_every} would delete; {hint}"):
        main(tiny(*keys, "eval_only=true"))
    assert log.read(out)[-1]["step"] == 3


def test_eval_only_of_a_model_needs_no_training_data(learned, tmp_path, capsys):
    """On two ranks the numbers are those of one."""
    out, keys = learned
    keys = [f"model.init_from={out / 'hf'}", "eval_only=true", *keys[2:4], "dtype=float32"]
    one = main(configs.load([*keys, f"out_dir={tmp_path / 'one'}"]))
    assert "answers in" in capsys.readouterr().out
    ranks = launch.run_ranks(2, ["train.py", *keys, f"out_dir={tmp_path / 'two'}"])
    assert [done.returncode for done in ranks] == [0, 0], ranks[0].stderr
    [record] = log.read(one)
    [of_two] = log.read(tmp_path / "two")
    assert record["step"] == of_two["step"] == 0
    assert of_two == pytest.approx(record, rel=1e-5)
    for out in (one, tmp_path / "two"):
        [line] = log.read(out, "evaluations.jsonl")
        answers = line["answers"]["chats"]
        assert [sample["answer"] for sample in answers] == ["so\n7"] * 6


# --------------------------------------------------------------------------------------------------
# how much is generated

def test_limit_prompts_by_the_tokens_that_are_trained(tiny, capsys):
    """The number is the same in every evaluation, at least 1, and printed as arithmetic."""
    run = setup(tiny("eval_share=0"))
    assert len(run.prompts["chats"]) == 4
    length = np.mean([len(reference) + 1 for _, reference in run.prompts["chats"]])
    n_tokens = 25 * 4 * run.dataset.mean_length()
    # for 2.5 answers in each of 4 evaluations
    share = 2.5 * train.GENERATION_COST * length * 4 / n_tokens
    capsys.readouterr()
    run = setup(tiny(f"eval_share={share}", out="b"))
    assert len(run.prompts["chats"]) == 2
    assert re.search(r"answers   2 of 4 in each of 4 evaluations: .* \(eval_share=0: all\)",
                     capsys.readouterr().out)
    assert len(setup(tiny("eval_share=1e-9", out="c")).prompts["chats"]) == 1
    assert len(setup(tiny("eval_share=100", out="d")).prompts["chats"]) == 4


def test_mean_length_of_a_dataset(tiny):
    dataset = setup(tiny()).dataset
    assert dataset.mean_length() == pytest.approx(dataset.lengths(range(len(dataset))).mean())


# --------------------------------------------------------------------------------------------------
# samples and bits per byte

def test_evaluate_keeps_all_answers_and_prints_one(tiny, capsys):
    """evaluations.jsonl has each one's answers; the console has the first, in three lines."""
    out = main(tiny("samples=1"))
    lines = log.read(out, "evaluations.jsonl")
    assert [line["step"] for line in lines] == [0, 10, 20, 25]
    printed = capsys.readouterr().out
    for line, record in zip(lines, evaluations(out)):
        samples = line["answers"]["chats"]
        keys = ["prompt", "answer", "reference", "exact_match"]
        assert len(samples) == 4 and all(list(sample) == keys for sample in samples)
        mean = sum(sample["exact_match"] for sample in samples) / 4
        assert record["val/chats/exact_match"] == mean
        assert "\n".join(log.format_sample(samples[0])) in printed
    assert printed.count("    reference  ") == 4


def test_answers_of_a_resumed_run_are_those_of_an_uninterrupted_one(tiny):
    """Those of evaluations that are repeated are dropped first."""
    more = ["save_every=10", "checkpoint.keep=9"]
    whole = main(tiny(*more, out="whole"))
    out = main(tiny(*more))
    for step in (20, 25):
        checkpoint.remove_checkpoint(out / "checkpoints" / f"{step:08}")
    main(tiny(*more))
    answers = [[(line["step"], line["answers"]) for line in log.read(folder, "evaluations.jsonl")]
               for folder in (out, whole)]
    assert answers[0] == answers[1] and len(answers[0]) == 4


def test_format_sample_is_three_short_lines():
    """Of a long prompt the end is shown, of long answers the beginning."""
    lines = log.format_sample({"prompt": "start" + "x \n" * 99 + "end", "answer": "\n\n7\n" * 200,
                               "reference": "7"})
    assert lines[0].startswith("    prompt     ...") and lines[0].endswith("x end")
    assert lines[1].startswith("    answer     7 7 7") and lines[1].endswith("...")
    assert lines[2] == "    reference  7" and all(len(line) < 100 for line in lines)


def test_shorten_lines_leaves_out_the_middle():
    assert log.shorten_lines("a\nb\n") == "a\nb\n"
    lines = log.shorten_lines("\n".join(map(str, range(300)))).split("\n")
    assert lines == [*"01234567", "[284 lines]", *map(str, range(292, 300))]
    assert log.shorten_lines("x" * 1000, width=10) == "xxxxx [990 characters] xxxxx"


def test_validation_losses_in_bits_per_byte(tiny):
    """All nats of the target tokens, by the bytes of their text; control tokens have none."""
    out = main(tiny("max_steps=1"))
    cfg = tiny()[0]
    tokens = tokenize_data.load_datasets(cfg, quiet=True)["validation"]["chats"]
    n_targets = 0
    n_bytes = 0
    for i in range(len(tokens)):
        ids, loss_weights = tokens.document(i)
        targets = ids[1:][loss_weights[1:] > 0]
        n_targets += len(targets)
        n_bytes += int((targets < 256).sum())            # the bytes tokenizer: ids of bytes
    assert 0 < n_bytes < n_targets
    record = evaluations(out)[-1]
    expected = record["val/chats/loss"] * n_targets / math.log(2) / n_bytes
    assert record["val/chats/bits_per_byte"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["data/base", "realdata"])
def test_token_bytes_sum_to_the_bytes_of_a_text(name, request):
    """Of byte-level BPE and of a SentencePiece-like vocabulary, which adds a space at the start."""
    folder = ROOT / name
    if name == "realdata":
        pytest.importorskip("tokenizers", reason="runs SentencePiece-like vocabularies")
        folder = request.getfixturevalue("realdata") / "checkpoints" / "stories260K" / "hf"
    cfg = configs.load([f"data.tokenizer={folder}", "data.train.x.path=x"])[0]
    tok = tokenize_data.load_tokenizer(cfg)
    text = "Once upon a time, über 42 \U0001f600 words.\nThe end"
    n_bytes = tokenize_data.token_bytes(tok)
    ids = tok.encode(text)
    added_space = name == "realdata"
    assert n_bytes[ids].sum() == len(text.encode()) + added_space
    assert n_bytes[tok.special[tok.eos]] == 0


# --------------------------------------------------------------------------------------------------
# progress

def test_progress_prints_a_line_now_and_then(monkeypatch, capsys):
    """Not on a terminal: items, total, time, rate, on stderr; only on rank 0."""
    monkeypatch.setattr(log, "SECONDS_PER_LINE", 0.0)
    assert list(log.progress([5, 6], "export x")) == [5, 6]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"export x:  50% 1/2 \[00:00<00:00, .*it/s\]", lines[0])
    with log.ProgressBar("answer", unit="token") as bar:
        bar.update(7)
    assert capsys.readouterr().err.startswith("answer: 7token [00:00,")
    monkeypatch.setenv("RANK", "1")
    assert list(log.progress(iter([5, 6]), "export x")) == [5, 6]
    monkeypatch.setattr(log, "SECONDS_PER_LINE", 30.0)
    monkeypatch.setenv("RANK", "0")
    assert list(log.progress([5, 6], "export x")) == [5, 6]
    assert capsys.readouterr().err == ""


def test_progress_is_a_bar_on_a_terminal(monkeypatch):
    """With rate and time left; it is removed at the end."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(log, "BAR_DELAY", 0.0)
    for _ in log.progress(range(3), "read weights"):
        time.sleep(0.15)                                 # a bar is drawn every 0.1 s
    text = terminal.getvalue()
    assert "read weights:  67%|" in text and "it/s]" in text
    assert text.rpartition("it/s]\r")[2].strip() == ""


# --------------------------------------------------------------------------------------------------
# saving

def test_save_final_false_writes_no_checkpoint_and_no_export(tiny):
    """Not even after a signal, unless save_every, keep_every or best asks for checkpoints."""
    cfg, _, explicit = tiny("max_steps=3", "checkpoint.save_final=false", "checkpoint.export=null")
    assert cfg["checkpoint"]["export"] is False
    train.main(cfg, explicit)
    out = Path(cfg["out_dir"])
    assert log.read(out)[-1]["step"] == 3
    assert not list(out.glob("checkpoints/*")) and not (out / "hf").exists()
    assert not train.saves_at_stop(cfg)
    for key in ("save_every=2", "best=loss", "checkpoint.keep_every=2"):
        assert train.saves_at_stop(tiny("checkpoint.save_final=false", key)[0])
    out = main(tiny("max_steps=5", "checkpoint.save_final=false", "save_every=2", out="b"))
    assert [p.name for p in checkpoint.list_checkpoints(out)] == ["00000002", "00000004"]


def test_export_without_the_final_checkpoint_is_refused(tiny):
    with pytest.raises(configs.UserError, match="checkpoint.export: must be false with "):
        tiny("checkpoint.save_final=false", "checkpoint.export=true")


def test_keep_every_keeps_checkpoints_for_good(tiny):
    """They are written at their steps, whatever save_every is, and do not count for `keep`."""
    out = main(tiny("max_steps=13", "save_every=3", "checkpoint.keep=1", "checkpoint.keep_every=4"))
    names = [int(p.name) for p in checkpoint.list_checkpoints(out)]
    assert names == [4, 8, 12, 13]


# --------------------------------------------------------------------------------------------------
# stopping

def test_stop_file_ends_a_run_and_the_same_command_resumes_it(tiny, monkeypatch, capsys):
    """The run is saved, the exit status 0, STOP is removed, and the result is bitwise the same."""
    more = ["max_steps=30", "eval_every=0"]
    whole = main(tiny(*more, out="whole"))
    log_step = train.log_step

    def touch_stop(run, *args):
        if run.state.step == 20:
            train.stop_file(run.cfg["out_dir"]).touch()
        log_step(run, *args)
    monkeypatch.setattr(train, "log_step", touch_stop)
    monkeypatch.setattr(train, "local_signal", lambda run, look=train.local_signal: (
        setattr(run, "next_look", 0.0), look(run))[1])    # at each step, not once a second
    with pytest.raises(SystemExit) as e:
        main(tiny(*more))
    out = Path(tiny()[0]["out_dir"])
    assert e.value.code == 0 and not (out / "STOP").exists()
    assert f"stopped by {out}/STOP after step 21, saved; the same command resumes" in (
        capsys.readouterr().out)
    assert [p.name for p in checkpoint.list_checkpoints(out)] == ["00000021"]
    monkeypatch.undo()
    main(tiny(*more))
    losses = [record["loss"] for record in log.read(out)]
    assert losses == [record["loss"] for record in log.read(whole)]


def test_setup_refuses_to_start_while_there_is_a_stop_file(tiny):
    out = Path(tiny()[0]["out_dir"])
    out.mkdir()
    (out / "STOP").touch()
    with pytest.raises(configs.UserError, match="STOP exists, so nothing is trained; remove the"):
        main(tiny())


def test_stop_file_that_comes_too_late_is_removed(learned, monkeypatch):
    """It would refuse the next start."""
    out, keys = learned
    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda run: (evaluate(run), (out / "STOP").touch()))
    main(configs.load([*keys, "eval_only=true"]))
    assert not (out / "STOP").exists() and log.read(out)[-1]["step"] == 60


def test_stop_file_ends_two_ranks_after_the_same_step(tiny, tmp_path):
    """Rank 0 alone looks for the file."""
    argv = configs_argv(tiny("max_steps=5000", "eval_every=0", "log_every=1"))
    out = tmp_path / "run"
    toucher = subprocess.Popen([sys.executable, "-S", "-c", TOUCH, str(out)])
    ranks = launch.run_ranks(2, ["train.py", *argv])
    toucher.kill()
    assert [done.returncode for done in ranks] == [0, 0], ranks[0].stderr
    [folder] = checkpoint.list_checkpoints(out)
    assert log.read(out)[-1]["step"] == int(folder.name) and not (out / "STOP").exists()


TOUCH = """
import pathlib, sys, time
out = pathlib.Path(sys.argv[1])
while not (out / "metrics.jsonl").is_file() or (out / "metrics.jsonl").stat().st_size < 300:
    time.sleep(0.05)
(out / "STOP").touch()
"""


def configs_argv(loaded):
    """The command line that sets what files and command line have set."""
    values = configs.flat(loaded[2])
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in values.items()]


def test_slurm_script_requeues_until_the_run_is_complete(tiny, tmp_path):
    """A stand-in scheduler sends USR1 before the time is up and starts the job again if asked to.

    Both starts are one run.
    """
    commands = tmp_path / "bin"
    commands.mkdir()
    stand_ins = {"srun": 'exec "$@"',
                 "torchrun": f'shift 2; exec {sys.executable} "$@"',
                 "scontrol": f'echo "$@" >> {tmp_path}/scontrol.log'}
    for name, body in stand_ins.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)
    env = os.environ | {"PATH": f"{commands}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    out = tmp_path / "run"
    argv = configs_argv(tiny("max_steps=200", "eval_every=0", "log_every=10"))
    starts = 0
    requests = tmp_path / "scontrol.log"
    while starts == 0 or requests.is_file():
        requests.unlink(missing_ok=True)
        # nice: on a busy machine, too, the signal comes before the end of the run
        job = subprocess.Popen(["nice", "bash", "configs/slurm.sh", out, *argv], cwd=ROOT, env=env)
        starts += 1
        while starts == 1 and len(log.read(out)) < 3 and job.poll() is None:
            time.sleep(0.05)
        if starts == 1:
            job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=60) == 0
        assert not requests.is_file() or requests.read_text() == "requeue 17\n"
        assert starts < 4
    assert starts == 2
    assert [record["step"] for record in log.read(out)] == list(range(10, 201, 10))
    [newest] = checkpoint.list_checkpoints(out)[-1:]
    assert newest.name == "00000200" and checkpoint.read_state(newest)["changes"] == []
