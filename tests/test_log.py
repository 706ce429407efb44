"""log.py: records, console lines, backends, summaries and tables. test_report.py: report.html."""
import contextlib
import importlib.util
import json
import math
import os
import resource
import signal
import struct
import sys
import textwrap
import time
import types
from pathlib import Path

import pytest
import torch
import yaml

import configs
import log


def load_config(folder, *more):
    return configs.load([f"out_dir={folder}", *more])[0]


def step_record(step, loss, **more):
    record = {"step": step, "loss": loss, "lr": 1e-3, "grad_norm": 1.0, "tok_per_s": 10.0,
              "mfu": None, "seconds": float(step)}
    return record | more


def write_run(folder, *losses, resumed_step=0):
    """Log a run of one record per loss and one validation at the end -> its folder."""
    total_steps = resumed_step + len(losses)
    logger = log.Logger(load_config(folder), total_steps, resumed_step)
    for step, loss in enumerate(losses, resumed_step + 1):
        logger.step(step_record(step, torch.tensor(loss)))
    logger.validation({"step": total_steps, "val/x/loss": 1.5, "val/x/exact_match": 0.25})
    logger.close()
    return folder


# --------------------------------------------------------------------------------------------------
# the logger

def test_logger_writes_strict_json(tmp_path):
    """Each record is one line of strict JSON; NaN and infinity are null."""
    folder = write_run(tmp_path, 2.0, float("nan"), float("inf"), 1.0)
    text = (folder / "metrics.jsonl").read_text()
    records = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert [record.get("loss") for record in records] == [2.0, None, None, 1.0, None]
    assert records[-1] == {"step": 4, "val/x/loss": 1.5, "val/x/exact_match": 0.25}


def test_logger_reads_tensors_when_the_next_record_arrives(tmp_path, capsys):
    """step() itself reads no tensor: a device may still be computing it."""
    logger = log.Logger(load_config(tmp_path), 2)
    loss = torch.zeros(())
    logger.step(step_record(1, loss))
    assert log.read(tmp_path) == [] and capsys.readouterr().out == ""
    loss.fill_(3.0)
    logger.step(step_record(2, loss))
    assert log.read(tmp_path)[0]["loss"] == 3.0 and "loss  3.0000" in capsys.readouterr().out
    logger.close()
    assert [record["step"] for record in log.read(tmp_path)] == [1, 2]


def test_logger_prints_aligned_lines(tmp_path, capsys):
    """Columns stay in place for small, large and unknown values."""
    logger = log.Logger(load_config(tmp_path), 1000)
    logger.step(step_record(1, 12.5, grad_norm=0.001, tok_per_s=1.0))
    logger.step(step_record(1000, float("nan"), grad_norm=99.0, tok_per_s=999_999.0))
    logger.validation({"step": 1000, "val/x/loss": 2.0, "val/x/exact_match": None})
    logger.close()
    first, last, validation = capsys.readouterr().out.splitlines()
    assert first == ("step     1/1,000  loss 12.5000  lr 1.00e-03  norm  0.001          1 tok/s"
                     "    0%  16:39 left")
    assert last == ("step 1,000/1,000  loss       -  lr 1.00e-03  norm 99.000    999,999 tok/s"
                    "  100%  0:00 left")
    assert validation == "step 1,000/1,000  validation: x loss 2.0000   x exact_match -"


def test_logger_shows_mfu_if_it_is_known(tmp_path, capsys):
    logger = log.Logger(load_config(tmp_path), 2)
    logger.step(step_record(1, 1.0, mfu=0.4567))
    logger.close()
    assert "  mfu 45.7%  " in capsys.readouterr().out


def test_logger_estimates_time_left_from_this_process(tmp_path, capsys):
    """10 of 20 steps were done before, in 1,000 s; 5 more took 50 s, so the last 5 take 50 s."""
    logger = log.Logger(load_config(tmp_path), 20, resumed_step=10, seconds_before=1000.0)
    logger.step(step_record(15, 1.0, seconds=1050.0))
    logger.close()
    assert capsys.readouterr().out.strip().endswith("75%  0:50 left")


def test_logger_drops_records_of_repeated_steps(tmp_path):
    """A resumed run keeps the records up to the step it resumes from, but no damaged last line."""
    folder = write_run(tmp_path, 4.0, 3.0, 2.0)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    write_run(folder, 1.0, resumed_step=2)
    losses = [(record["step"], record.get("loss")) for record in log.read(folder)]
    assert losses == [(1, 4.0), (2, 3.0), (3, 1.0), (3, None)]


def test_logger_of_a_new_run_starts_an_empty_file(tmp_path):
    folder = write_run(tmp_path, 4.0, 3.0)
    log.Logger(load_config(folder), 2).close()
    assert log.read(folder) == []


def test_logger_continues_on_a_full_disk(tmp_path, capsys):
    """Lines for which there was no room are written before the next one."""
    logger = log.Logger(load_config(tmp_path), 3)
    file = logger.file
    logger.file = open("/dev/full", "ab", buffering=0)
    logger.validation({"step": 1, "val/x/loss": 3.0})
    logger.validation({"step": 2, "val/x/loss": 2.0})
    assert capsys.readouterr().out.count("No space left") == 2 and not log.read(tmp_path)
    logger.file = file                                       # somebody has made room
    logger.validation({"step": 3, "val/x/loss": 1.0})
    assert [record["step"] for record in log.read(tmp_path)] == [1, 2, 3]


def test_logger_writes_whole_evaluations_or_none(tmp_path):
    """A disk that fills up in the middle of a line leaves no part of it, which read() would refuse."""
    logger = log.Logger(load_config(tmp_path), 3)
    answers = {"x": [{"prompt": "p" * 5000, "answer": "", "reference": ""}]}
    logger.validation({"step": 1, "val/x/loss": 3.0}, answers)
    size = (tmp_path / "evaluations.jsonl").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1000, limits[1]))
    try:
        logger.validation({"step": 2, "val/x/loss": 2.0}, answers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    logger.validation({"step": 3, "val/x/loss": 1.0}, answers)
    assert [line["step"] for line in log.read(tmp_path, "evaluations.jsonl")] == [1, 3]


def test_logger_names_out_dir_that_cannot_be_created(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(configs.UserError, match="out_dir: .*cannot be created"):
        log.Logger(load_config(tmp_path / "file" / "run"), 1)


def test_null_logger_has_the_methods_of_logger(capsys):
    logger = log.NullLogger()
    logger.print("text")
    logger.step({"step": 1})
    logger.flush()
    logger.validation({"step": 1})
    logger.close()
    public = {name for name in vars(log.Logger) if not name.startswith("_")}
    internal = {"write", "write_evaluation", "format_step", "format_progress"}
    assert public - internal == {name for name in vars(log.NullLogger) if not name.startswith("_")}
    assert capsys.readouterr().out == ""


def test_write_atomic_replaces_the_whole_file(tmp_path):
    path = tmp_path / "config.yaml"
    log.write_atomic(path, "lr: 1\n")
    written = path.stat().st_mtime_ns
    log.write_atomic(path, "lr: 1\n")                        # the same text: not written again
    assert path.stat().st_mtime_ns == written
    log.write_atomic(path, "ü\n")
    assert path.read_bytes() == "ü\n".encode() and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (83.9, "1:23"), (3683, "1:01:23")])
def test_format_duration(seconds, text):
    assert log.format_duration(seconds) == text


# --------------------------------------------------------------------------------------------------
# backends

class ListBackend(log.Backend):
    """Collects what it gets in `calls`, of which each test has its own (see fixture)."""

    def __init__(self, cfg, folder, run_id, about):
        self.id = run_id or folder.name
        self.calls.append((run_id, about["last_step"]))

    def log(self, record):
        self.calls.append(record)

    def log_answers(self, step, answers):
        self.calls.append((step, answers))

    def close(self, status):
        self.calls.append(status)


@pytest.fixture
def backend(monkeypatch):
    """ListBackend under the name "list", without calls."""
    monkeypatch.setattr(ListBackend, "calls", [], raising=False)
    monkeypatch.setattr(ListBackend, "last_step", math.inf)
    monkeypatch.setitem(log.BACKENDS, "list", ListBackend)
    return ListBackend


ANSWERS = {"x": [{"prompt": "2 + 2 = ", "answer": "5", "reference": "4", "exact_match": 0.0}]}


def log_steps(folder, steps, resumed_step=0, status="finished", to="list", **options):
    """One start of a run: a record per step, with `start` as its loss, and two evaluations.

    The evaluations are after steps 2 and 4. status None: the process is killed.
    """
    cfg, _, explicit = configs.load([f"out_dir={folder}", f"log.to=[{to}]", "lr=0.5", "model.n_layers=3"])
    logger = log.Logger(cfg, 6, resumed_step, explicit=explicit, git="0c20973-dirty", **options)
    for step in steps:
        logger.write({"step": step, "loss": 10.0 * resumed_step + step, "mfu": None})
        if step in (2, 4):
            logger.validation({"step": step, "val/x/loss": 10.0 * resumed_step + step}, ANSWERS)
    if status is None:
        if to == "trackio":
            wait_for_trackio(folder)
        os.kill(os.getpid(), signal.SIGKILL)
    logger.close(status)


def test_backends_get_the_known_numbers_of_each_record(tmp_path, backend):
    """A backend is a class in BACKENDS; it gets no nulls, and is closed with the logger."""
    logger = log.Logger(load_config(tmp_path, "log.to=[list]"), 1)
    logger.validation({"step": 1, "val/x/loss": torch.tensor(2.0), "val/y/loss": float("nan")}, ANSWERS)
    logger.close("failed")
    logger.close("failed")
    assert backend.calls == [(None, -1), {"step": 1, "val/x/loss": 2.0}, (1, ANSWERS), "failed"]


def steps_of(calls):
    """The steps that a ListBackend got, those of evaluations as fractions."""
    return [call["step"] + 0.5 * ("val/x/loss" in call) for call in calls if isinstance(call, dict)]


@pytest.mark.parametrize("last_step, steps", [(math.inf, [5]), (2, [3, 4, 4.5, 5]), (-1, [1, 2, 2.5, 3, 4, 4.5, 5])])
def test_tracker_sends_repeated_steps_only_to_a_backend_that_has_lost_them(tmp_path, backend, last_step, steps):
    """Also if the run is killed again before it has repeated all of them."""
    backend.last_step = last_step
    log_steps(tmp_path, [1, 2, 3, 4])
    log_steps(tmp_path, [2], resumed_step=1)
    backend.calls.clear()
    log_steps(tmp_path, [2, 3, 4, 5], resumed_step=1)
    assert backend.calls[0] == (tmp_path.name, 1)
    assert steps_of(backend.calls) == steps


def test_tracker_sends_the_evaluation_that_was_missing(tmp_path, backend):
    """The run was killed after step 4 and before the evaluation that follows it."""
    log_steps(tmp_path, [1, 2, 3])
    logger = log.Logger(load_config(tmp_path, "log.to=[list]"), 6, 3)
    logger.write({"step": 4, "loss": 1.0})
    logger = log.Logger(load_config(tmp_path, "log.to=[list]"), 6, 4)
    logger.validation({"step": 4, "val/x/loss": 1.0})
    assert steps_of(backend.calls) == [1, 2, 2.5, 3, 4, 4.5]


def test_tracker_gets_the_new_evaluation_of_eval_only(tmp_path, backend):
    """The step was evaluated before, perhaps with other settings."""
    log_steps(tmp_path, [1, 2, 3, 4])
    backend.calls.clear()
    logger = log.Logger(load_config(tmp_path, "log.to=[list]", "eval_only=true"), 6, 4)
    record = {"step": 4, "val/x/loss": 7.0, "eval_only": 1}
    logger.validation(record)
    logger.close()
    assert backend.calls == [(tmp_path.name, 4), record, "finished"]


def test_tracker_that_was_added_gets_the_records_so_far(tmp_path, backend, monkeypatch):
    monkeypatch.setitem(log.BACKENDS, "other", type("Other", (ListBackend,), {"calls": []}))
    log_steps(tmp_path, [1, 2, 3], to="other")
    log_steps(tmp_path, [3, 4], resumed_step=2)
    assert steps_of(backend.calls) == [1, 2, 2.5, 3, 4, 4.5]


def test_tracker_of_a_run_that_continues_another_has_one_curve(tmp_path, backend):
    """The records and answers of the other run, up to the step, come first, in a run of its own."""
    old = tmp_path / "old"
    log_steps(old, [1, 2, 3, 4])
    before = [(old / name).read_text() for name in ("metrics.jsonl", "evaluations.jsonl")]
    backend.calls.clear()
    log_steps(tmp_path / "new", [3, 4], resumed_step=2, continued=old)
    assert backend.calls[0] == (None, 2) and backend.calls[4] == (2, ANSWERS)
    assert steps_of(backend.calls) == [1, 2, 2.5, 3, 4, 4.5]
    losses = [(record["step"], record.get("loss")) for record in log.read(tmp_path / "new")]
    assert losses == [(1, 1.0), (2, 2.0), (2, None), (3, 23.0), (4, 24.0), (4, None)]
    evaluations = log.read(tmp_path / "new", "evaluations.jsonl")
    assert [(line["step"], line["answers"]) for line in evaluations] == [(2, ANSWERS), (4, ANSWERS)]
    assert [(old / name).read_text() for name in ("metrics.jsonl", "evaluations.jsonl")] == before


# ---- with the real libraries

def read_wandb(folder):
    """What the offline files of a run hold. Their records are framed as in leveldb's log."""
    import wandb
    from wandb.proto import wandb_internal_pb2
    wandb.teardown()                                         # its service writes what it still has
    found = {"runs": set(), "loss": [], "validation": [], "config": {}}
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        found |= {"loss": [], "validation": []}              # each start has all that is known
        data = path.read_bytes()
        position = 7                                         # after the header
        message = b""
        while position + 7 <= len(data):
            room = 32768 - position % 32768                  # in this block
            if room < 7:
                position += room
                continue
            length, kind = struct.unpack("<HB", data[position + 4:position + 7])
            message += data[position + 7:position + 7 + length]
            position += 7 + length
            if kind in (1, 4):                               # the whole message, or its last part
                add_wandb_record(found, wandb_internal_pb2.Record.FromString(message))
                message = b""
    tables = sorted(folder.glob("wandb/offline-run-*/files/media/table/*.json"))
    found["answers"] = [json.loads(path.read_text())["data"] for path in tables]
    return found | {"runs": len(found["runs"]), "command": found["config"]["command"], "git": found["config"]["git"]}


def add_wandb_record(found, record):
    if record.HasField("run"):
        found["runs"].add(record.run.run_id)
    elif record.HasField("config"):
        found["config"] |= {item.key: json.loads(item.value_json) for item in record.config.update if item.key}
    elif record.HasField("history"):
        row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for name, key in (("loss", "loss"), ("validation", "val/x/loss")):
            if key in row:
                found[name].append((row["step"], row[key]))
    elif record.HasField("summary"):
        values = {item.key: item.value_json for item in record.summary.update}
        found["status"] = json.loads(values.get("status", "null")) or found.get("status")
    elif record.HasField("exit"):
        found["exit_code"] = record.exit.exit_code


def read_mlflow(folder):
    import mlflow
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    run, *others = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    points = {}
    for name, key in (("loss", "loss"), ("validation", "val/x/loss")):
        points[name] = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)]
    files = folder / "mlflow" / run.info.run_id / "artifacts"
    params = {key: yaml.safe_load(value) for key, value in run.data.params.items()}
    return points | {
        "runs": 1 + len(others), "status": run.info.status.lower(), "command": run.data.tags["command"],
        "git": run.data.tags["git"], "config": yaml.safe_load((files / "config.yaml").read_text()) | {"explicit": params},
        "answers": [path.read_text() for path in sorted((files / "answers").iterdir())]}


def read_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder)).Reload()
    texts = {}
    for key in events.Tags()["tensors"]:
        values = [event.tensor_proto.string_val[0].decode() for event in events.Tensors(key)]
        texts[key.removesuffix("/text_summary")] = values
    last = {key: textwrap.dedent(values[-1]) for key, values in texts.items()}
    found = {"runs": 1, "answers": texts["answers"], "command": last["command"], "git": last["git"], "status": last["status"]}
    for name, key in (("loss", "loss"), ("validation", "val/x/loss")):
        found[name] = [(event.step, event.value) for event in events.Scalars(key)]
    found["config"] = yaml.safe_load(last["config"]) | {"explicit": yaml.safe_load(last["explicit"])}
    return found


def read_trackio(folder):
    from trackio.sqlite_storage import SQLiteStorage
    runs = [name for name in SQLiteStorage.get_runs("seven") if name.startswith(folder.name)]
    rows = SQLiteStorage.get_logs("seven", runs[0])
    found = {"runs": len(runs), "config": SQLiteStorage.get_run_config("seven", runs[0]), "status": "finished"}
    for name, key in (("loss", "loss"), ("validation", "val/x/loss")):
        found[name] = [(row["step"], row[key]) for row in rows if key in row]
    found["answers"] = [list(row["answers"]["_value"][0].values()) for row in rows if "answers" in row]
    alerts = SQLiteStorage.get_alerts("seven", runs[0])
    for alert in sorted(alerts, key=lambda alert: alert["timestamp"]):
        found["status"] = alert["title"].removeprefix("run ")
    return found | {"command": found["config"]["command"], "git": found["config"]["git"]}


def wait_for_trackio(folder):
    """Wait until both answers are written, by a thread and after everything else."""
    answers = []
    while len(answers) < 2:
        time.sleep(0.05)
        with contextlib.suppress(IndexError, TypeError):     # nothing is written yet
            answers = read_trackio(Path(folder))["answers"]


def wait_for_next_second():
    """TensorBoard reads a folder's files in the order of their names, which have the second of their start."""
    time.sleep(1 - time.time() % 1)


READERS = {"wandb": read_wandb, "mlflow": read_mlflow, "tensorboard": read_tensorboard, "trackio": read_trackio}


@pytest.fixture(scope="session")
def trackio_folder(tmp_path_factory):
    """trackio reads TRACKIO_DIR when it is imported, so all tests share one."""
    return tmp_path_factory.mktemp("trackio")


@pytest.mark.parametrize("name", list(log.PACKAGES))
def test_tracker_shows_one_run_after_restarts(tmp_path, monkeypatch, script, trackio_folder, name):
    """SIGKILL after step 4; resumed from step 2, failed after step 3; resumed from 2, ended by a signal.

    The real library has one run, one curve, all settings, the answers and the last status.
    """
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(trackio_folder)}
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    for key in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "WANDB_RUN_ID"):
        monkeypatch.delenv(key, raising=False)
    for package in [name] + ["sqlalchemy"] * (name == "mlflow"):
        pytest.importorskip(package, reason=f"{package} is not installed (requirements-dev.txt)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "configs/ft.yaml", "lr=0.5"])
    folder = tmp_path / f"killed-{name}"
    killed = script("-c", f"import sys; sys.path[:0] = {sys.path[:2]}; import test_log; "
                          f"test_log.log_steps({str(folder)!r}, [1, 2, 3, 4], status=None, to={name!r})", **environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    wait_for_next_second()
    log_steps(folder, [3], resumed_step=2, status="failed", to=name)
    found = READERS[name](folder)
    assert found["runs"] == 1 and found["status"] == "failed" and found.get("exit_code", 1) == 1
    wait_for_next_second()
    log_steps(folder, [3, 4, 5, 6], resumed_step=2, status="killed", to=name)
    found = READERS[name](folder)
    # these overwrite, the others skip; each start of wandb offline is a file with the whole curve
    is_redone = name in ("tensorboard", "wandb")
    curve = [(1, 1.0), (2, 2.0), (3, 23.0 if is_redone else 3.0), (4, 24.0 if is_redone else 4.0), (5, 25.0), (6, 26.0)]
    assert found["loss"] == curve
    assert found["validation"] == [(2, 2.0), curve[3]]
    assert found["runs"] == 1 and found["status"] == "killed"
    assert found["git"] == "0c20973-dirty" and found["command"] == "python train.py configs/ft.yaml lr=0.5"
    assert found["config"]["model"]["n_layers"] == 3 and found["config"]["seed"] == 0
    assert found["config"]["explicit"]["lr"] == 0.5 and found["config"]["explicit"]["model.n_layers"] == 3
    assert len(found["answers"]) >= 2 and "2 + 2 = " in str(found["answers"])
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]          # nothing in the working folder


@pytest.mark.parametrize("name", list(log.BACKENDS))
def test_backend_that_is_not_installed_is_named(tmp_path, name):
    """A missing package ends the run at its start and leaves older records as they are."""
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    write_run(tmp_path, 1.0)
    message = f"log.to: {name} is not installed; pip install {name}"
    with pytest.raises(configs.UserError, match=message):
        log.check_backends(load_config(tmp_path, f"log.to=[{name}]"))
    assert len(log.read(tmp_path)) == 2


def test_backend_that_is_unknown_is_named(tmp_path):
    message = "log.to: must be one of wandb, mlflow, tensorboard, trackio; got wandv"
    with pytest.raises(configs.UserError, match=message):
        log.check_backends(load_config(tmp_path, "log.to=[wandv]"))


class FlakyBackend(log.Backend):
    """Collects the steps of its records. The calls whose numbers are in `failing` fail."""
    failing = ()
    calls = 0
    steps = []

    def __init__(self, cfg, folder, run_id, about):
        self.call()

    def call(self):
        type(self).calls += 1
        if self.calls in self.failing:
            raise OSError(f"API request\nnumber {self.calls} failed")

    def log(self, record):
        self.call()
        self.steps.append(record["step"])

    def close(self, status):
        self.call()


@pytest.mark.parametrize("failing, steps", [
    ([4], [1, 2, 3, 4, 5, 6]),                               # one record: sent again with the next
    ([1], [1, 2, 3, 4, 5, 6]),                               # opening: again with the first record
    ([1, 2], [1, 2, 3, 4, 5, 6]),
    ([4, 5], [1, 2, 4, 5, 6]),                               # a record that is refused twice
    ([8], [1, 2, 3, 4, 5, 6]),                               # closing
    (range(1, 99), []), ([], [1, 2, 3, 4, 5, 6])], ids=str)
def test_tracker_that_fails_does_not_end_the_run(tmp_path, monkeypatch, capsys, failing, steps):
    """One warning, in one line; records are retried, and metrics.jsonl has all of them."""
    backend = type("Backend", (FlakyBackend,), {"failing": failing, "steps": []})
    monkeypatch.setitem(log.BACKENDS, "flaky", backend)
    logger = log.Logger(load_config(tmp_path, "log.to=[flaky]"), 6)
    for step in range(1, 7):
        logger.validation({"step": step, "val/x/loss": 1.0})
    logger.close()
    assert backend.steps == steps and len(log.read(tmp_path)) == 6
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == bool(failing)
    if failing:
        assert warnings[0].startswith("warning: log.to: flaky has failed (OSError: API request number ")


def test_tracker_pauses_after_a_slow_failure(tmp_path, monkeypatch):
    """A server that does not answer costs at most a tenth of the time."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(log, "time", types.SimpleNamespace(monotonic=lambda: clock.now))

    class SlowBackend(FlakyBackend):
        failing = [2]
        steps = []

        def log(self, record):
            clock.now += 60 if self.calls == 1 else 0.1
            super().log(record)
    monkeypatch.setitem(log.BACKENDS, "slow", SlowBackend)
    tracker = log.Tracker("slow", {"eval_only": False}, tmp_path, {"last_step": -1}, [], {})
    for step, second in enumerate((0, 100, 599, 601, 602), 1):           # fails until 60: a pause until 600
        clock.now = second
        tracker.log({"step": step}, {})
    assert SlowBackend.steps == [1, 2, 3, 4, 5]              # all are sent when it is over


def test_warn_of_run_id_that_another_run_has_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    log.warn_of_run_id("WANDB_RUN_ID")
    assert "WANDB_RUN_ID: abc123 is set" in capsys.readouterr().err


def test_check_backends_reports_a_missing_wandb_key(tmp_path, monkeypatch):
    """Before tokenizing and loading. wandb.login() knows keys, netrc and offline mode."""
    def login(verify):
        raise Error("No API key configured. Use `wandb login` to log in.")
    Error = type("Error", (Exception,), {})
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = importlib.util.spec_from_loader("wandb", None)
    wandb.login, wandb.Error = login, Error
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log.check_wandb_login.cache_clear()
    with pytest.raises(configs.UserError, match="^log.to: wandb: No API key.*WANDB_MODE=offline"):
        log.check_backends(load_config(tmp_path, "log.to=wandb"))
    wandb.login = lambda verify: True
    log.check_backends(load_config(tmp_path, "log.to=wandb"))


def test_tensorboard_backend_forgets_steps_that_a_resumed_run_repeats(tmp_path):
    """Also a run that starts over in a folder with events."""
    pytest.importorskip("tensorboard")
    for resumed_step, steps in ((0, (1, 2, 3, 4, 5)), (2, (3, 4)), (0, (2,))):
        log_steps(tmp_path, steps, resumed_step, to="tensorboard")
        want = {0: [(step, step) for step in steps], 2: [(1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0)]}
        assert read_tensorboard(tmp_path)["loss"] == want[resumed_step]


def test_wandb_backend_does_not_lose_an_evaluation_after_a_restart(tmp_path, monkeypatch):
    """wandb's own counter is one above the last step, where it would drop it without an error."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    about = {"explicit": {}, "git": "", "command": "", "last_step": -1}
    backend = log.WandbBackend(load_config(tmp_path), tmp_path, None, about)
    backend.run.log({"step": 4, "loss": 4.0}, step=4, commit=True)       # the counter is at 5
    backend.log({"step": 4, "val/x/loss": 0.5})
    backend.log({"step": 5, "loss": 5.0})
    backend.close("finished")
    found = read_wandb(tmp_path)
    assert found["validation"] == [(4, 0.5)] and found["loss"] == [(4, 4.0), (5, 5.0)]
    assert found["exit_code"] == 0 and found["status"] == "finished"


def test_mlflow_backend_uses_the_server_that_is_set(tmp_path, monkeypatch):
    """Names that mlflow refuses are changed; a key that a resume has changed keeps its first value."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    about = {"explicit": {"lr": 1.0, "data.train.a+b": 1}, "git": "", "command": "x", "last_step": -1}
    run_id = None
    for lr in (1.0, 2.0):
        about["explicit"]["lr"] = lr
        backend = log.MlflowBackend(load_config(tmp_path), tmp_path, run_id, about)
        backend.log({"step": int(lr), "val/a+b/loss": lr})
        run_id = backend.id
        backend.close("finished")
    [run] = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run.info.status == "FINISHED" and run.data.params == {"lr": "1.0", "data.train.a_b": "1"}
    history = mlflow.MlflowClient().get_metric_history(run_id, "val/a_b/loss")
    assert [metric.step for metric in history] == [1, 2] and not (tmp_path / "mlflow.db").exists()


# --------------------------------------------------------------------------------------------------
# the profile, the hardware, the best checkpoint

def test_profile_step_writes_a_trace_and_prints_kernels(tmp_path):
    lines = []
    with log.profile_step(tmp_path / "trace.json", torch.device("cpu"), lines.append):
        x = torch.ones(300, 300)
        for _ in range(20):
            x = torch.mm(x, x) / 300
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])
    assert any("20 x  aten::mm" in line for line in lines)
    assert any("outside matrix products and attention" in line for line in lines)


def test_peak_flops_is_none_on_a_cpu():
    assert log.peak_flops(torch.device("cpu"), torch.bfloat16) is None


@pytest.mark.parametrize("name, tflops, fp32_tflops", [
    ("NVIDIA H100 80GB HBM3", 989, 67), ("NVIDIA H100 PCIe", 756, 51), ("NVIDIA H100 NVL", 835, 60),
    ("NVIDIA H200", 989, 67), ("NVIDIA H200 NVL", 835, 60), ("NVIDIA B200", 2250, 75),
    ("NVIDIA A100-SXM4-80GB", 312, 19.5), ("NVIDIA A100 80GB PCIe", 312, 19.5), ("NVIDIA L40S", 362, 91.6),
    ("NVIDIA L4", 121, 30.3), ("NVIDIA GeForce RTX 4090", 165.2, 82.6), ("NVIDIA GeForce RTX 5090", 209.5, 104.8),
    ("Tesla T4", 65, 8.1), ("Tesla V100-SXM2-16GB", 125, 15.7), ("Tesla V100-PCIE-32GB", 112, 14),
    ("AMD Instinct MI300X", 1307, 163.4)])
def test_peak_flops_of_knows_the_names_of_devices(name, tflops, fp32_tflops):
    """As torch.cuda.get_device_name() returns them."""
    assert log.peak_flops_of(name, is_fp32=False) == tflops * 1e12
    assert log.peak_flops_of(name, is_fp32=True) == fp32_tflops * 1e12


@pytest.mark.parametrize("name", [
    "NVIDIA GH200 480GB", "NVIDIA GB200", "NVIDIA L40", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D",
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A10", "NVIDIA T400 4GB", "Tesla V100S-PCIE-32GB", "NVIDIA H800"])
def test_peak_flops_of_another_device_is_not_guessed(name):
    assert log.peak_flops_of(name, is_fp32=False) is None


@pytest.fixture
def clock(monkeypatch):
    """The clock of Meter, in seconds, which the test sets."""
    clock = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(log, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def take_step(meter, clock, step, **seconds):
    """One step of 0.2 s of work that also waits, {cause: seconds}."""
    clock.now += 0.2
    for cause, wait in seconds.items():
        with meter.waiting(cause):
            clock.now += wait
    meter.end_step(step)


def test_meter_measures_shares_without_evaluations(clock):
    meter = log.Meter()
    take_step(meter, clock, 1, data=0.2, evaluation=50.0)
    take_step(meter, clock, 2, save=0.4)
    assert meter.interval.read()[0] == pytest.approx(1.0)
    assert meter.numbers()[:3] == pytest.approx([0.2, 0.4, 0.0])
    meter.start_interval()
    take_step(meter, clock, 3, ranks=0.2)
    assert meter.numbers()[:3] == pytest.approx([0.0, 0.0, 0.5])


def test_compare_ranks_reports_a_slow_step_once_with_its_cause(clock):
    """Three times the median of the steps before, and half a second more."""
    meter = log.Meter()
    texts = {}
    for step in range(1, 41):
        waits = {5: {"data": 9.0}, 20: {"data": 1.3}, 25: {"data": 0.3}, 30: {"save": 2.0, "evaluation": 5.0}, 35: {}}
        take_step(meter, clock, step, **waits.get(step, {}))
        record, texts[step] = log.compare_ranks([[7.0, *meter.numbers()]], meter.slowest)
        meter.start_interval()
        if step == 20:
            keys = ("slow_step", "slow_seconds", "slow_data_wait", "slow_save_wait")
            assert [record[key] for key in keys] == pytest.approx([20, 1.5, 1.3, 0.0])
        assert ("slow_step" in record) == bool(texts[step]) and record["memory"] == 7
    assert {step: text for step, text in texts.items() if text} == {
        20: "step 20 took 1.5 s, 7.5 times the median of the steps before; it waited 1.3 s for data",
        30: "step 30 took 2.2 s, 11.0 times the median of the steps before; it waited 2.0 s for a save"}


def test_compare_ranks_names_the_fullest_and_the_slowest_rank(clock):
    """Rank 1 waits for data, rank 0 for rank 1."""
    meters = [log.Meter(), log.Meter()]
    for step in range(1, 21):
        start = clock.now
        wait = 3.0 if step == 20 else 0.0
        for meter, cause in zip(meters, ("ranks", "data")):
            clock.now = start
            take_step(meter, clock, step, **{cause: wait})
    memory = (5.0, 8.0)
    by_rank = [[memory[rank], *meter.numbers()] for rank, meter in enumerate(meters)]
    record, text = log.compare_ranks(by_rank, meters[0].slowest)
    share = 3.0 / 7.0
    assert record == {
        "memory": 5, "memory_max": 8, "data_wait": 0.0, "data_wait_max": pytest.approx(share), "save_wait": 0.0,
        "save_wait_max": 0.0, "rank_wait": pytest.approx(share), "slowest_rank": 1, "slow_step": 20,
        "slow_seconds": pytest.approx(3.2), "slow_data_wait": pytest.approx(3.0), "slow_save_wait": 0.0,
        "slow_ranks_wait": pytest.approx(3.0)}
    assert text.endswith("it waited 3.0 s for data (rank 1), 3.0 s for other ranks (rank 0)")


def test_peak_memory_grows_with_what_is_held():
    before = log.peak_memory(torch.device("cpu"))
    held = torch.ones(50_000_000)                            # 200 MB
    assert before > 10e6 and log.peak_memory(torch.device("cpu")) >= before
    assert log.peak_memory(torch.device("cpu")) > held.nbytes


def test_sort_steps_by_orders_steps_and_counts_evaluations():
    """The smallest value is best, with max the largest; of equal values the first.

    Step 0 has no checkpoint.
    """
    losses = {0: 0.1, 10: 3.0, 20: 1.0, 30: 1.0, 40: None, 50: 2.0}
    records = [{"step": step, "val/x/loss": loss} for step, loss in losses.items()]
    records += [{"step": 55, "loss": 0.0}]                   # not an evaluation
    assert log.sort_steps_by(records, "val/x/loss") == ([20, 30, 50, 10], 3)
    assert log.sort_steps_by(records, "max val/x/loss") == ([10, 50, 20, 30], 4)
    assert log.sort_steps_by(records, "loss") == ([55], 0)
    assert log.sort_steps_by(records, "val/y/loss") == ([], 0)
    assert log.sort_steps_by([], "val/x/loss") == ([], 0)
    # a run that continues another from step 20
    assert log.sort_steps_by(records, "val/x/loss", first_step=20) == ([30, 50], 2)
    nan = [{"step": step, "val/x/loss": None} for step in (0, 10, 20)]
    assert log.sort_steps_by(nan, "val/x/loss") == ([], 2)       # patience ends such a run, too


def test_was_evaluated_ignores_records_of_training():
    records = [{"step": 0, "val/x/loss": 1.0}, {"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0},
               {"step": 2, "val/x/loss": None}]
    assert [log.was_evaluated(records, step) for step in range(4)] == [True, False, True, False]


def test_describe_status_of_an_evaluation(tmp_path):
    """A folder with nothing but an evaluation was not stopped."""
    run = log.LoggedRun(str(tmp_path), [{"step": 3, "val/x/loss": 1.0}], [], [], {}, "")
    assert log.describe_status(run) == "evaluated"
    run.records.append({"step": 4, "loss": 1.0})         # of an older version, without starts.jsonl
    assert log.describe_status(run) == "stopped"


@pytest.mark.parametrize("best", ["", "val/x/loss", "max val/x/exact_match", "val/y/loss", "loss",
                                  "max grad_norm"])
def test_check_best_accepts_what_is_logged(best):
    cfg = {"best": best, "eval_every": 10, "log_every": 1}
    log.check_best(cfg, ["x", "y"], {"x": ["exact_match"], "y": []})


@pytest.mark.parametrize("change, labels", [
    ({"best": "val/x/los"}, ["x"]),
    ({"best": "min val/x/loss"}, ["x"]),
    ({"best": "val/y/exact_match"}, ["x", "y"]),
    ({"best": "loss", "log_every": 0}, ["x"]),
    ({"eval_every": 0}, ["x"]),
    ({}, [])])
def test_check_best_refuses_what_is_not_logged(change, labels):
    cfg = {"best": "val/x/loss", "eval_every": 10, "log_every": 1} | change
    with pytest.raises(configs.UserError, match="^best: "):
        log.check_best(cfg, labels, {"x": ["exact_match"], "y": []})


# --------------------------------------------------------------------------------------------------
# the reports

@pytest.fixture
def start(tiny):
    """start("lr=1e-2") -> what describe_run needs of a train.Run: real data, a model on meta."""
    def make(*more, resumed_step=0):
        import model as transformer
        import sampler
        import tokenize_data
        cfg, _, _ = tiny(*more)
        tokenizer = tokenize_data.load_tokenizer(cfg)
        data = tokenize_data.load_datasets(cfg, tokenizer, True)
        model_cfg = transformer.resolve_vocab_size(cfg["model"], tokenizer.n_vocab)
        sizes = {name: len(tokens) for name, tokens in data["train"].items()}
        return types.SimpleNamespace(
            cfg=cfg, data=data, model=transformer.build_on_meta(model_cfg),
            device=torch.device("cpu"), steps_per_epoch=sampler.steps_per_epoch(cfg, sizes),
            resumed_step=resumed_step, resume_path=None,
            state=types.SimpleNamespace(step=resumed_step, total_steps=cfg["max_steps"],
                                        changes=[]))
    return make


def test_describe_run_prints_derived_numbers_as_arithmetic(start):
    run = start("micro_tokens=600")
    lines = {}
    for line in log.describe_run(run):
        key, text = line.split(maxsplit=1)
        assert line.index(text) == 10                        # aligned
        lines.setdefault(key, []).append(text)
    assert list(lines) == ["data", "model", "step", "run", "device"]
    tokens = run.data["train"]["chats"]
    lengths = tokens.n_inputs(range(len(tokens)))
    per_step = 4 * lengths.sum() / 36
    assert lines["data"][0].startswith("train.chats: 36 documents") and len(lines["data"]) == 2
    n_params = sum(p.numel() for p in run.model.parameters())
    assert lines["model"] == [f"llama 2 x 32, {n_params:,} parameters, {n_params:,} trained, "
                              "from scratch"]
    assert lines["step"] == [f"4 documents x ~{lengths.mean():.0f} tokens = {per_step:,.0f} "
                             "tokens, in 1 micro-batch of at most 600 tokens"]
    assert lines["run"] == ["36 documents / 4 = 9 steps per epoch; 25 steps = 2.78 epochs = "
                            f"{25 * per_step:,.0f} tokens"]
    assert lines["device"][0].startswith("cpu, ")
    assert lines["device"][0].endswith("computing in float32, trained weights in float32")


def test_describe_run_states_a_batch_size_above_the_number_of_documents(start):
    """Its step has all documents, and the arithmetic is of those."""
    lines = log.describe_run(start("batch_size=100", "micro_tokens=4000"))
    assert [line for line in lines if line.startswith("step      36 documents (batch_size is 100, more than there are) x ")]
    assert [line for line in lines if line.startswith("run       36 documents / 36 = 1 steps per epoch")]


def test_describe_run_counts_micro_batches(start):
    """A step of 452 tokens takes two micro-batches of 400."""
    step, = [line for line in log.describe_run(start()) if line.startswith("step")]
    assert step.endswith("= 452 tokens, in 2 micro-batches of at most 400 tokens")


def test_describe_run_weights_the_sources(start, tmp_path):
    """The mean length counts each source as often as an epoch takes it."""
    path = tmp_path / "short.txt"
    path.write_text("\n\n".join("ten bytes " for _ in range(100)))
    run = start(f"data.train.short.path={path}", "data.train.short.separator=\n\n",
                "data.train.short.weight=0.5")
    lengths = {name: tokens.n_inputs(range(len(tokens)))
               for name, tokens in run.data["train"].items()}
    n_short = round(len(lengths["short"]) / 2)
    n_documents = 36 + n_short
    mean = (lengths["chats"].sum() + n_short * lengths["short"].mean()) / n_documents
    step, length = [line for line in log.describe_run(run) if line.startswith(("step", "run"))]
    assert f"4 documents x ~{mean:.0f} tokens = {4 * mean:,.0f} tokens" in step
    assert f"{n_documents} documents / 4" in length


def test_describe_run_of_a_resumed_run(start):
    """It names the checkpoint, and the scripts that were changed since it was written."""
    run = start(resumed_step=10)
    run.resume_path = "out/run/checkpoints/00000010"
    run.state.changes = [{"step": 5, "what": ["sampler.py"]},
                              {"step": 10, "what": ["model.py", "train.py"]}]
    resume, warning = log.describe_run(run)[-2:]
    assert resume == "resume    out/run/checkpoints/00000010: 10 of 25 steps are done"
    assert warning == "warning   changed since then: model.py, train.py"


def finished_run(folder, step, total_steps, resumed_step, export=True, has_chats=True):
    """What final_summary needs of a train.Run whose folder holds records."""
    keys = ("prompt", "answer", "reference", "exact_match")
    answers = {"chats": [("2 + 2 = ", "4\n", "4", 1.0), ("3 + 3 = ", "7", "6", 0.0), ("1 + 1 = ", "2", "2", 1.0)],
               "other": [("a", "b", "b", 1.0)]}
    answers = {label: [dict(zip(keys, sample)) for sample in samples] for label, samples in answers.items()}
    return types.SimpleNamespace(
        cfg={"out_dir": str(folder), "samples": 2, "checkpoint": {"export": export}},
        answers=answers, resumed_step=resumed_step,
        state=types.SimpleNamespace(step=step, total_steps=total_steps, seconds=83.0,
                                    has_chats=has_chats))


def test_final_summary_shows_answers_metrics_and_time(tmp_path):
    """The first `samples` answers of each label, metrics from first to last, how to chat."""
    folder = tmp_path / "my run"
    logger = log.Logger(load_config(folder), 83)
    logger.validation({"step": 0, "val/chats/loss": 7.0, "val/chats/exact_match": None})
    logger.step(step_record(83, 1.0))
    logger.validation({"step": 83, "val/chats/loss": 0.5, "val/chats/exact_match": 0.75})
    logger.close()
    assert log.final_summary(finished_run(folder, 83, 83, 0)) == [
        "",
        "2 + 2 = 4\n", "    matches the reference", "",
        "3 + 3 = 7", "    expected: 6", "",
        "ab", "    matches the reference", "",
        "chats/exact_match        0.750 -> 0.750",
        "chats/loss               7.000 -> 0.500",
        f"83 steps in 1:23; results are in {folder}",
        f"chat with it: python model.py '{folder}'"]
    of_text = log.final_summary(finished_run(folder, 83, 83, 0, has_chats=False))
    assert of_text[-1] == f'let it continue a text: python model.py \'{folder}\' "..."'
    not_exported = log.final_summary(finished_run(folder, 83, 83, 0, export=False))
    assert not any(line.startswith("chat with it") for line in not_exported)


def test_final_summary_of_a_finished_run_says_that_nothing_was_trained(tmp_path):
    """The numbers of the earlier process are not presented as the result of this one."""
    write_run(tmp_path, 4.0, 3.0, 2.0)
    run = finished_run(tmp_path, 3, 3, resumed_step=3)
    run.answers = {}
    lines = log.final_summary(run)
    assert lines[0] == f"{tmp_path} is finished: all 3 steps are done; nothing was trained"
    assert lines[1:4] == ["recorded when it was trained:",
                          "x/exact_match            0.250 -> 0.250",
                          "x/loss                   1.500 -> 1.500"]
    assert not any("steps in" in line for line in lines)
    # ended earlier by max_seconds or patience
    lines = log.final_summary(finished_run(tmp_path, 3, 9, resumed_step=3))
    assert lines[0] == f"{tmp_path} ended after step 3 in an earlier start; nothing was trained"


def test_reports_of_a_real_run(tiny, capsys):
    """train.main prints both reports; the same command again trains nothing and says so."""
    import train
    cfg, _, explicit = tiny("max_steps=3", "eval_every=1.0", "samples=1")
    train.main(cfg, explicit)
    lines = capsys.readouterr().out.splitlines()
    arithmetic = "run       36 documents / 4 = 9 steps per epoch; 3 steps = 0.33 epochs"
    assert any(line.startswith(arithmetic) for line in lines)
    assert any(line.startswith("chats/loss ") and " -> " in line for line in lines)
    assert any(line.startswith("3 steps in 0:") for line in lines)
    assert any(line.startswith(("    expected: ", "    matches the reference")) for line in lines)
    train.main(cfg, explicit)
    again = capsys.readouterr().out.splitlines()
    assert f"{cfg['out_dir']} is finished: all 3 steps are done; nothing was trained" in again
    assert not any(line.startswith("3 steps in") for line in again)


# --------------------------------------------------------------------------------------------------
# reading and comparing runs

def test_read_names_a_line_that_is_not_a_record(tmp_path):
    """Only the last line may be incomplete."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(configs.UserError, match="line 2"):
        log.read(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n[3]\n')
    with pytest.raises(configs.UserError, match="line 2"):
        log.read(tmp_path)


def test_main_prints_a_table_and_writes_the_report(tmp_path, script):
    a = write_run(tmp_path / "a", 4.0, 3.0, 2.0)
    b = write_run(tmp_path / "b", 5.0, 1.0)
    out = script("log.py", a, b)
    assert out.returncode == 0, out.stderr
    rows = {line.split()[0]: line.split() for line in out.stdout.splitlines() if line}
    assert rows["run"][1:5] == ["step", "loss", "x/exact_match", "x/loss"]
    assert rows[str(a)][1:3] == ["3", "2.0000"] and rows[str(b)][1:3] == ["2", "1.0000"]
    assert rows[str(a)][3:5] == ["0.2500", "1.5000"] and rows[str(a)][-1] == "█▅▁"
    assert rows["report:"] == ["report:", str(a / "report.html")]
    assert (a / "report.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("values, text", [([], ""), ([2.0], "▁"), ([1.0, 1.0], "▁▁"),
                                          ([1.0, 2.0], "▁█")])
def test_sparkline_of_a_few_values(values, text):
    assert log.sparkline(values) == text


def test_sparkline_averages_to_a_bounded_width():
    for n in (32, 33, 1000):
        line = log.sparkline([float(i) for i in range(n)])
        assert 8 < len(line) <= 32
        assert list(line) == sorted(line) and line[0] == "▁" and line[-1] == "█"


def test_main_names_a_folder_without_records(tmp_path, script):
    out = script("log.py", tmp_path)
    assert out.returncode == 1 and "metrics.jsonl" in out.stderr and out.stderr.count("\n") == 1


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_main_prints_help(script, argv):
    out = script("log.py", *argv)
    assert out.returncode == 0 and out.stderr == ""
    assert "python log.py out/ft out/lora" in out.stdout


def test_import_needs_no_torch(script):
    """Comparing runs starts at once: neither torch nor numpy is imported."""
    out = script("-c", "import sys, log; print({'torch', 'numpy'} & set(sys.modules))")
    assert out.stdout == "set()\n", out.stderr
