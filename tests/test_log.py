"""log.py: records, console lines, backends, summaries and tables. test_report.py: report.html."""
import importlib.util
import json
import sys
import types

import pytest
import torch

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
    internal = {"write", "format_step", "format_progress"}
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

def test_backends_get_the_known_numbers_of_each_record(tmp_path, monkeypatch):
    """A backend is a class in BACKENDS; it gets no nulls, and is closed with the logger."""
    class ListBackend:
        calls = []

        def __init__(self, cfg, folder):
            self.calls.append(folder)

        def log(self, record):
            self.calls.append(record)

        def close(self):
            self.calls.append("closed")

    monkeypatch.setitem(log.BACKENDS, "list", ListBackend)
    logger = log.Logger(load_config(tmp_path, "log.to=[list]"), 1)
    logger.validation({"step": 1, "val/x/loss": torch.tensor(2.0), "val/y/loss": float("nan")})
    logger.close()
    assert ListBackend.calls == [tmp_path, {"step": 1, "val/x/loss": 2.0}, "closed"]


def test_wandb_backend_continues_the_run_that_it_started(tmp_path, monkeypatch):
    """wandb itself needs an account: this is its interface, init() with an id."""
    ids = []

    def init(id, resume, **_options):
        ids.append(id)
        return types.SimpleNamespace(id=id or "new-id")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for _ in range(2):
        log.WandbBackend(load_config(tmp_path), tmp_path)
    assert ids == [None, "new-id"]


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
    message = "log.to: must be one of wandb, mlflow, tensorboard; got wandv"
    with pytest.raises(configs.UserError, match=message):
        log.check_backends(load_config(tmp_path, "log.to=[wandv]"))


class FlakyBackend:
    """Collects the steps of its records. The calls whose numbers are in `failing` fail."""
    failing = ()
    calls = 0
    steps = []

    def __init__(self, cfg, folder):
        self.call()

    def call(self):
        type(self).calls += 1
        if self.calls in self.failing:
            raise OSError(f"API request\nnumber {self.calls} failed")

    def log(self, record):
        self.call()
        self.steps.append(record["step"])

    def close(self):
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
    tracker = log.Tracker("slow", {}, tmp_path)
    for step, second in enumerate((0, 100, 599, 601, 602), 1):           # fails until 60: a pause until 600
        clock.now = second
        tracker.log({"step": step})
    assert SlowBackend.steps == [3, 4, 5]


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


def test_tensorboard_backend_writes_events(tmp_path):
    pytest.importorskip("tensorboard")
    logger = log.Logger(load_config(tmp_path, "log.to=[tensorboard]"), 1)
    logger.step(step_record(1, torch.tensor(2.0)))
    logger.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.0)]


def test_tensorboard_backend_forgets_steps_that_a_resumed_run_repeats(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    for resumed_step, steps in ((0, (1, 2, 3, 4, 5)), (2, (3, 4)), (0, (1,))):
        logger = log.Logger(load_config(tmp_path, "log.to=[tensorboard]"), 5, resumed_step)
        for step in steps:
            logger.step(step_record(step, torch.tensor(float(resumed_step))))
        logger.close()
        events = EventAccumulator(str(tmp_path)).Reload()
        want = {0: [(step, 0.0) for step in steps], 2: [(1, 0.0), (2, 0.0), (3, 2.0), (4, 2.0)]}
        assert [(event.step, event.value) for event in events.Scalars("loss")] == want[resumed_step]


def test_mlflow_backend_continues_the_run_that_it_started(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file://{tmp_path}/mlruns")
    for step in (1, 2):
        backend = log.MlflowBackend(load_config(tmp_path), tmp_path)
        backend.log({"step": step, "loss": 1.0})
        backend.close()
    [run] = mlflow.search_runs(search_all_experiments=True, output_format="list")
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert [metric.step for metric in history] == [1, 2] and run.info.status == "FINISHED"


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


def test_peak_flops_is_none_if_it_is_not_known():
    assert log.peak_flops(torch.device("cpu"), torch.bfloat16) is None


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
    nan = [{"step": step, "val/x/loss": None} for step in (0, 10, 20)]
    assert log.sort_steps_by(nan, "val/x/loss") == ([], 2)       # patience ends such a run, too


def test_was_evaluated_ignores_records_of_training():
    records = [{"step": 0, "val/x/loss": 1.0}, {"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0},
               {"step": 2, "val/x/loss": None}]
    assert [log.was_evaluated(records, step) for step in range(4)] == [True, False, True, False]


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
    answers = {"chats": [("2 + 2 = ", "4\n", "4"), ("3 + 3 = ", "7", "6"), ("1 + 1 = ", "2", "2")],
               "other": [("a", "b", "b")]}
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
        f'chat with it: python model.py \'{folder}\' "..."']
    of_text = log.final_summary(finished_run(folder, 83, 83, 0, has_chats=False))
    assert of_text[-1] == f'let it continue a text: python model.py \'{folder}\' "..."'
    not_exported = log.final_summary(finished_run(folder, 83, 83, 0, export=False))
    assert not any(line.startswith("chat with it") for line in not_exported)


def test_shorten_gaps_counts_empty_lines():
    assert log.shorten_gaps("a\n\n\nb") == "a\n\n\nb"
    assert log.shorten_gaps("a\n\n\n\nb" + "\n" * 50) == "a\n[3 empty lines]\nb\n[49 empty lines]\n"


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
