"""What a run reports: a console line and a record in metrics.jsonl for each logged step.

    python log.py out/ft out/lora       compare runs: a table, and out/ft/report.html for a browser
    python log.py out/ft watch=true     a live view in the terminal, until the run ends

A record is a flat dict of numbers. docs/metrics.md defines them; null is a value that is not
known. With log.to=wandb (or another of BACKENDS, if it is installed) the same records are sent
there.

Logging a step does not wait for the device: the tensors of a record are read when the next record
arrives, and by then they have been computed. print(), validation(), flush() and close() wait.

This module is ordered like a run: backends, the logger, the profile of one step, the reports before
the first step and after the last one, the table, the report and the live view of runs.
"""
import collections
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import operator
import os
import re
import secrets
import shlex
import shutil
import statistics
import sys
import time
from pathlib import Path

from tqdm import tqdm

import configs


# --------------------------------------------------------------------------------------------------
# backends: other places for the records

class Backend:
    """A tracker that gets the records of a run. An experiment can register another in BACKENDS.

    It is created with

    cfg     the config
    folder  of the run
    run_id  the id that the first start of this run has kept; None at the first start
    about   a dict of
              explicit   the keys that were set: {"model.n_layers": 4, ...}
              git        the version of the code, as text
              command    the command line, as text
              last_step  of the records that the run resumes with; -1 without any
    """
    id = None                 # names the run; kept in the run's folder
    last_step = math.inf      # later steps are not in the tracker, even if they were sent

    def log(self, record):
        """record: {"step": number, ...} without unknown values, of a step or of an evaluation."""

    def log_answers(self, step, answers):
        """answers: of an evaluation, see Logger.validation."""

    def close(self, status):
        """status: finished, failed (an exception) or killed (a signal)."""


COLUMNS = ["label", "prompt", "answer", "reference"]     # of a table of answers


class WandbBackend(Backend):
    def __init__(self, cfg, folder, run_id, about):
        import wandb
        self.wandb = wandb
        if run_id is None:
            warn_of_run_id("WANDB_RUN_ID")
        self.run = wandb.init(project=cfg["log"]["project"], name=folder.name, dir=str(folder),
                              id=run_id, resume="allow")
        self.id = self.run.id
        # a resumed run may have changed keys, which config= does not accept
        self.run.config.update(all_settings(cfg, about), allow_val_change=True)
        self.run.define_metric("*", step_metric="step")
        # A process that is killed may not have sent all of its records: the server knows. Offline,
        # each start has a folder of its own, which gets the whole curve (for wandb sync).
        self.last_step = -1 if self.run.offline else self.run.step - 1

    def log(self, record):
        self.log_row(record["step"], record)

    def log_answers(self, step, answers):
        table = self.wandb.Table(columns=COLUMNS, data=as_rows(answers))
        self.log_row(step, {"step": step, "answers": table})

    def log_row(self, step, row):
        """Log a row whose position on the x-axis is row["step"].

        wandb drops rows below its own counter. After a restart the counter is one above the last
        step, and the evaluation of that step may be missing: it becomes a row of its own.
        """
        counter = self.run.step
        is_late = step < counter
        # A late row is complete. Others stay open: an evaluation joins the row of its step.
        self.run.log(row, step=max(step, counter), commit=is_late)

    def close(self, status):
        self.run.summary["status"] = status
        self.run.finish(exit_code=0 if status == "finished" else 1)


class MlflowBackend(Backend):
    """Without MLFLOW_TRACKING_URI, everything is in the run's folder: mlflow.db and mlflow/."""

    def __init__(self, cfg, folder, run_id, about):
        import mlflow
        self.mlflow = mlflow
        project = cfg["log"]["project"]
        self.is_local = not mlflow.is_tracking_uri_set()
        if self.is_local:
            folder = folder.absolute()
            mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
            if mlflow.get_experiment_by_name(project) is None:
                mlflow.create_experiment(project, artifact_location=(folder / "mlflow").as_uri())
        if run_id is None:
            warn_of_run_id("MLFLOW_RUN_ID")
            mlflow.set_experiment(project)
        run = mlflow.start_run(run_id=run_id, run_name=folder.name)
        self.id = run.info.run_id
        # A parameter cannot be changed: of keys that changed at a resume, the first value stays.
        # config.yaml has the new one.
        params = {mlflow_name(key): value for key, value in about["explicit"].items()}
        mlflow.log_params({key: params[key] for key in params.keys() - run.data.params.keys()})
        mlflow.set_tags({"git": about["git"], "command": about["command"]})
        mlflow.log_text(configs.dump(cfg), "config.yaml")

    def log(self, record):
        numbers = {mlflow_name(key): value for key, value in record.items()}
        self.mlflow.log_metrics(numbers, step=record["step"])

    def log_answers(self, step, answers):
        self.mlflow.log_text(as_markdown(answers), f"answers/{step:08}.md")

    def close(self, status):
        self.mlflow.end_run(status.upper())
        if self.is_local:
            self.mlflow.set_tracking_uri(None)   # another run of this process has its own


class TensorboardBackend(Backend):
    def __init__(self, cfg, folder, run_id, about):
        from torch.utils.tensorboard import SummaryWriter
        # the files of earlier starts may hold later steps, which this one repeats
        self.last_step = about["last_step"]
        self.next_step = self.last_step + 1
        self.writer = SummaryWriter(str(folder), purge_step=self.next_step)
        for name, value in all_settings({"config": cfg}, about).items():
            self.add_text(name, as_code(value))

    def add_text(self, name, text):
        self.writer.add_text(name, text, self.next_step)

    def log(self, record):
        self.next_step = record["step"]
        for key, value in record.items():
            self.writer.add_scalar(key, value, record["step"])
        self.writer.flush()

    def log_answers(self, step, answers):
        self.writer.add_text("answers", as_markdown(answers), step)
        self.writer.flush()

    def close(self, status):
        self.add_text("status", status)
        self.writer.close()


class TrackioBackend(Backend):
    def __init__(self, cfg, folder, run_id, about):
        import trackio
        self.trackio = trackio
        # trackio resumes a run by its name, which two folders may share
        self.id = run_id or f"{folder.name}-{secrets.token_hex(3)}"
        self.run = trackio.init(project=cfg["log"]["project"], name=self.id, resume="allow",
                                config=all_settings(cfg, about), embed=False)
        # A thread writes the records: a process that is killed loses the last ones. The next step
        # that trackio would give follows those that it has.
        self.last_step = getattr(self.run, "_next_step", math.inf) - 1

    def log(self, record):
        numbers = {key: value for key, value in record.items() if key != "step"}    # a reserved key
        self.run.log(numbers, step=record["step"])

    def log_answers(self, step, answers):
        table = self.trackio.Table(columns=COLUMNS, data=as_rows(answers))
        self.run.log({"answers": table}, step=step)

    def close(self, status):
        if status != "finished":
            self.run.alert(f"run {status}", level=self.trackio.AlertLevel.ERROR)
        self.trackio.finish()


BACKENDS = {"wandb": WandbBackend, "mlflow": MlflowBackend, "tensorboard": TensorboardBackend,
            "trackio": TrackioBackend}


PACKAGES = tuple(BACKENDS)       # those that need the package of that name; experiments add others


def all_settings(cfg, about):
    """The config, with the keys that were set, the version of the code and the command line."""
    return cfg | {key: about[key] for key in ("explicit", "git", "command")}


def mlflow_name(key):
    """A name that mlflow accepts for a metric or a parameter."""
    return re.sub(r"[^/\w.\- ]", "_", key)


def as_rows(answers):
    """{label: [sample]}, see Logger.validation -> rows of COLUMNS."""
    rows = []
    for label, samples in answers.items():
        rows += [[label, *(sample[key] for key in COLUMNS[1:])] for sample in samples]
    return rows


def as_markdown(answers):
    parts = []
    for label, prompt, answer, reference in as_rows(answers):
        parts += [f"**{label}**", as_code(prompt + answer), f"expected: {reference}"]
    return "\n\n".join(parts)


def as_code(value):
    """A text, or a section as yaml -> a block of code in markdown."""
    text = configs.dump(value) if isinstance(value, dict) else value
    return "    " + text.replace("\n", "\n    ")


def check_backends(cfg):
    """Raise UserError for a backend of log.to that is unknown, not installed or not logged in."""
    for name in cfg["log"]["to"]:
        if name not in BACKENDS:
            known = ", ".join(BACKENDS)
            raise configs.UserError(f"log.to: must be one of {known}; got {name}")
        if name in PACKAGES and importlib.util.find_spec(name) is None:
            raise configs.UserError(f"log.to: {name} is not installed; pip install {name}")
        if name == "wandb":
            check_wandb_login()


@functools.cache
def check_wandb_login():
    import wandb
    try:
        wandb.login(verify=False)            # a prompt on a terminal; nothing in offline mode
    except wandb.Error as error:
        problem = " ".join(str(error).split()).rstrip(".")
        raise configs.UserError(f"log.to: wandb: {problem}; WANDB_API_KEY sets a key, and "
                                "WANDB_MODE=offline needs none") from None


def warn_of_run_id(variable):
    """An environment variable that another run may have left would join this run to that one."""
    if os.environ.get(variable):
        warn(f"{variable}: {os.environ[variable]} is set in the environment, so this run is added "
             f"to that one; unset {variable} for a run of its own")


class Tracker:
    """Sends each record to a backend once. It cannot end the run: its first failure is a warning.

    out_dir/tracker_NAME.json has the id of the backend's run and the last steps that were sent. A
    resumed run first sends the records that the backend does not have yet, which are all of them if
    the folder continues another one. Steps that are done again are not sent again, unless the
    backend has lost or deleted them (Backend.last_step).

    After a failure, what has failed is tried again with the next record; a record that has failed
    twice is given up. After a failure of more than a second, this pauses for nine times as long, so
    that an unreachable server takes a tenth of the time.

    records  those in metrics.jsonl when the run is resumed, [] for a new run
    answers  {step: the answers of its evaluation, see Logger.validation}
    """

    def __init__(self, name, cfg, folder, about, records, answers):
        self.name = name
        self.arguments = (cfg, folder)
        self.about = about
        self.backend = None                      # until it is open
        self.unsent = [(record, answers.get(record["step"], {})) for record in records]
        self.tries = 0                           # to send the first of them
        self.path = folder / f"tracker_{name}.json"
        self.state = {"id": None, "train": -1, "validation": -1}
        if self.path.is_file():
            self.state = json.loads(self.path.read_text(encoding="utf-8"))
        self.paused_until = 0.0                  # of time.monotonic()
        self.has_failed = False
        self.attempt(self.send)

    def log(self, record, answers):
        self.unsent.append((record, answers))
        if time.monotonic() >= self.paused_until:
            self.attempt(self.send)

    def send(self):
        if self.backend is None:
            self.open()
        while self.unsent:
            if self.tries < 2:
                self.tries += 1
                self.send_record(*self.unsent[0])
            del self.unsent[0]
            self.tries = 0
        self.save_state()

    def save_state(self):
        write_atomic(self.path, json.dumps(self.state) + "\n")

    def send_record(self, record, answers):
        kind = "validation" if is_eval_record(record) else "train"
        if record["step"] > self.state[kind] or "eval_only" in record:
            self.backend.log(record)
            self.state[kind] = record["step"]
            if answers and kind == "validation":
                self.backend.log_answers(record["step"], answers)

    def open(self):
        backend = BACKENDS[self.name](*self.arguments, self.state["id"], self.about)
        self.state["id"] = backend.id
        for kind in ("train", "validation"):     # what the backend has lost is sent again
            self.state[kind] = min(self.state[kind], backend.last_step)
        self.backend = backend
        self.save_state()

    def close(self, status):
        if self.backend is not None:
            self.attempt(self.send)
            self.attempt(self.backend.close, status)

    def attempt(self, function, *args):
        start = time.monotonic()
        try:
            function(*args)
        except Exception as error:               # of any kind: backends and networks have many
            now = time.monotonic()
            if now - start > 1:
                self.paused_until = now + 9 * (now - start)
            if not self.has_failed:
                problem = " ".join(f"{type(error).__name__}: {error}".split())
                warn(f"log.to: {self.name} has failed ({problem}); the run continues, and the next "
                     "records are sent; metrics.jsonl has all of them")
            self.has_failed = True


def warn(text):
    print(f"warning: {text}", file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------
# the logger

class Logger:
    """The console, metrics.jsonl and the backends of a run. Creating one opens all three.

    total_steps     steps of the whole run
    resumed_step    the step that the run resumes from; 0 for a new run
    seconds_before  seconds of the earlier starts of the run
    continued       the folder of another run whose records, up to that step, this one begins with
    explicit        the keys that were set (configs.load), for the backends
    git             the version of the code, for the backends; None if it is not known

    Raises UserError if the folder cannot be created. check_backends() checks log.to before.
    """

    def __init__(self, cfg, total_steps, resumed_step=0, seconds_before=0.0, continued=None,
                 explicit={}, git=None):
        folder = Path(cfg["out_dir"])
        self.total_steps = total_steps
        self.resumed_step = resumed_step
        self.seconds_before = seconds_before
        self.pending = None                      # the record of a step that is not written yet
        self.unwritten = b""                     # lines for which the disk had no room
        make_folder(folder)
        source = Path(continued or folder)
        records = records_until(resumed_step, source, "metrics.jsonl")
        evaluations = records_until(resumed_step, source, "evaluations.jsonl")
        self.path = folder / "metrics.jsonl"
        self.evaluations_path = folder / "evaluations.jsonl"
        if cfg["eval_only"]:                     # replaces an earlier one
            records = without_eval_only(records)
            evaluations = without_eval_only(evaluations)
        write_records(self.path, records)
        write_records(self.evaluations_path, evaluations)
        self.file = open(self.path, "ab", buffering=0)
        about = {"explicit": configs.flat(explicit), "git": git or "unknown",
                 "command": command_line(),
                 "last_step": max((record["step"] for record in records), default=-1)}
        records = [without_unknown(record) for record in without_eval_only(records)]
        answers = {line["step"]: line["answers"] for line in evaluations}
        self.trackers = [Tracker(name, cfg, folder, about, records, answers)
                         for name in cfg["log"]["to"]]

    def print(self, text=""):
        """Print a line that is not a record."""
        self.flush()
        print(text, flush=True)

    def step(self, record):
        """Log a training step. It is written by the next call of any method (see the top)."""
        self.flush()
        self.pending = record

    def flush(self):
        """Write and print the pending record, if there is one. Waits for its tensors."""
        record = self.pending
        self.pending = None
        if record is not None:
            record = self.write(record)
            print(self.format_step(record), flush=True)

    def validation(self, record, answers={}, seconds=0.0):
        """Log an evaluation: {"step", "val/LABEL/loss", "val/LABEL/<metric>", ...}.

        answers  {label: [{"prompt", "answer", "reference", "<metric>", ...}]}
        seconds  that it has taken
        """
        self.flush()
        self.write_evaluation(record, seconds, answers)
        record = self.write(record, answers)
        step = record.pop("step")
        fields = [f"{key.removeprefix('val/').replace('/', ' ')} {format_number(value, '.4f')}"
                  for key, value in record.items() if key.startswith("val/")]
        print(f"{self.format_progress(step)}  validation: {'   '.join(fields)}", flush=True)

    def write_evaluation(self, record, seconds, answers):
        """Append to evaluations.jsonl. A full disk does not end the run."""
        evaluation = {key: record[key] for key in ("step", "eval_only") if key in record}
        evaluation |= {"seconds": seconds, "answers": answers}
        line = json.dumps(evaluation) + "\n"
        path = self.evaluations_path
        size = path.stat().st_size if path.is_file() else 0
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(line)
        except OSError as e:
            print(f"{path} cannot be written ({e.strerror}); the run continues", flush=True)
            if path.is_file():
                os.truncate(path, size)          # a part of a line would end the next start

    def write(self, record, answers={}):
        """Append a record to metrics.jsonl, pass it to the backends, return its plain numbers.

        If the disk is full, the run continues, and the line is written with a later one.
        """
        record = {key: to_json(value) for key, value in record.items()}
        line = json.dumps(record, allow_nan=False) + "\n"
        self.unwritten += line.encode()
        try:
            while self.unwritten:                # without a buffer, write() may take a part
                n_bytes = self.file.write(self.unwritten)
                self.unwritten = self.unwritten[n_bytes:]
        except OSError as e:
            print(f"{self.path} cannot be written ({e.strerror}); the run continues", flush=True)
        for tracker in self.trackers:
            tracker.log(without_unknown(record), answers)
        return record

    def close(self, status="finished"):
        """status: see Backend.close. Later calls do nothing."""
        try:
            self.flush()
        except Exception:
            # of a failed run, the last record may be on a device that fails, too
            if status != "failed":
                raise
        self.file.close()
        for tracker in self.trackers:
            tracker.close(status)
        self.trackers = []

    def format_step(self, record):
        step = record["step"]
        # the time left is estimated from the steps of this start
        seconds = record["seconds"] - self.seconds_before
        seconds_per_step = seconds / (step - self.resumed_step)
        seconds_left = seconds_per_step * (self.total_steps - step)
        fields = [
            self.format_progress(step),
            f"loss {format_number(record['loss'], '.4f'):>7}",
            f"lr {format_number(record['lr'], '.2e'):>8}",
            f"norm {format_number(record['grad_norm'], '.3f'):>6}",
            f"{format_number(record['tok_per_s'], ',.0f'):>9} tok/s",
        ]
        if record["mfu"] is not None:
            fields.append(f"mfu {record['mfu']:.1%}")
        fields.append(f"{step / self.total_steps:4.0%}")
        fields.append(f"{format_duration(seconds_left)} left")
        return "  ".join(fields)

    def format_progress(self, step):
        total = f"{self.total_steps:,}"
        return f"step {step:>{len(total)},}/{total}"


class NullLogger:
    """The logger of all ranks but rank 0: it does nothing."""

    def print(self, text=""):
        pass

    def step(self, record):
        pass

    def flush(self):
        pass

    def validation(self, record, answers={}, seconds=0.0):
        pass

    def close(self, status="finished"):
        pass


def make_folder(folder):
    """Create out_dir. Raises UserError if that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        message = f"out_dir: {folder} cannot be created ({e.strerror}); choose another out_dir"
        raise configs.UserError(message) from None


def records_until(step, folder, name):
    """The records up to a step, which a run that resumes from it keeps. Step 0 is a new run: []"""
    records = read(folder, name) if step else []
    return [record for record in records if record["step"] <= step]


def write_records(path, records):
    """Replace a file of records. Without records no file is created."""
    if records or path.is_file():
        write_atomic(path, "".join(json.dumps(record) + "\n" for record in records))


def without_unknown(record):
    return {key: value for key, value in record.items() if value is not None}


def write_atomic(path, text):
    """Write a text file completely or not at all. A file with the same text is left as it is."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def to_json(value):
    """A number, None, or a tensor with one element -> what strict JSON can hold.

    NaN and infinity become None.
    """
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def format_number(value, spec):
    return "-" if value is None else format(value, spec)


def format_duration(seconds):
    """83 -> 1:23, 3683 -> 1:01:23"""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{seconds:02}"
    return f"{minutes}:{seconds:02}"


# --------------------------------------------------------------------------------------------------
# the progress of long operations, on stderr

SECONDS_PER_LINE = 30.0
BAR_DELAY = 1.0              # seconds


def progress(iterable, what, total=None):
    """Yield the items of an iterable, with a ProgressBar.

    total  number of items; None: len(iterable), or not known
    """
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)
    with ProgressBar(what, total) as bar:
        for item in iterable:
            yield item
            bar.update()


class ProgressBar:
    """On a terminal a tqdm bar, elsewhere a line every 30 s; on rank 0 only.

    Both show rate and time left. An operation of less than a second shows nothing, and the bar is
    removed at the end.

    what     a verb and its object, e.g. "export out/ft/hf"
    total    number of units; None: not known
    options  of tqdm: unit, unit_scale
    """

    def __init__(self, what, total=None, quiet=False, **options):
        self.what = what
        self.total = total
        self.options = options
        self.quiet = quiet or os.environ.get("RANK", "0") != "0"
        self.n = 0
        self.start = time.monotonic()
        self.last_line = self.start
        # None: tqdm shows the bar if stderr is a terminal
        self.bar = tqdm(total=total, desc=what, leave=False, delay=BAR_DELAY, **options,
                        disable=True if self.quiet else None)

    def update(self, n=1):
        self.bar.update(n)
        self.n += n
        now = time.monotonic()
        if self.bar.disable and not self.quiet and now - self.last_line >= SECONDS_PER_LINE:
            self.last_line = now
            line = tqdm.format_meter(self.n, self.total, now - self.start, ncols=0,
                                     prefix=self.what, **self.options)
            print(line, file=sys.stderr, flush=True)

    def close(self):
        self.bar.close()

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        self.close()


# --------------------------------------------------------------------------------------------------
# the profile of one step

# names of kernels for matrix products and attention
MATMUL_KERNELS = "gemm|mm$|mkldnn|cutlass|nvjet|xmma|wgmma|flash|fmha|attention|cudnn"


@contextlib.contextmanager
def profile_step(path, device, print_line):
    """Profile the enclosed step: write a trace to `path` and print the most expensive kernels.

    chrome://tracing and Perfetto show the trace. On a CPU the profiler's own allocations fragment
    the heap. Large tensors then need new pages from the operating system, and the operation that
    writes to them first (fill_) looks slower than it is without the profiler.
    """
    from torch.profiler import profile
    system_before = os.times().system
    with profile() as profiler:
        yield
        # measured inside: the end of the profiler takes time, too
        system_ms = (os.times().system - system_before) * 1e3
    profiler.export_chrome_trace(str(path))
    for line in describe_kernels(profiler.key_averages(), device):
        print_line(line)
    print_line(f"the trace is in {path}")
    if device.type != "cuda":
        print_line(f"{system_ms:.0f} ms in the operating system (page faults, allocation), mostly "
                   "caused by the profiler")


def describe_kernels(events, device):
    """The ten most expensive kernels, and the share of time outside matrix products and attention.

    Returns lines of text.
    """
    on_cuda = device.type == "cuda"
    self_time = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    kernels = [(getattr(event, self_time) / 1e3, event.count, event.key) for event in events
               if not on_cuda or event.device_type.name == "CUDA"]    # (ms, calls, name)
    kernels.sort(reverse=True)
    total = sum(ms for ms, _, _ in kernels) or 1
    matmul = sum(ms for ms, _, name in kernels if re.search(MATMUL_KERNELS, name, re.IGNORECASE))
    lines = [f"{ms / total:6.1%} {ms:10.2f} ms {calls:6,} x  {name[:80]}"
             for ms, calls, name in kernels[:10]]
    lines.append(f"{1 - matmul / total:6.1%} of {total:,.2f} ms is outside matrix products and "
                 "attention")
    return lines


# --------------------------------------------------------------------------------------------------
# for the training loop: the hardware, and the best step

# (name of the device in torch: a regular expression; 10^12 FLOP/s of matrix products in bf16 and
# fp16, without sparsity and accumulated in fp32; in fp32, without TF32). The first match counts.
# The sources, at nvidia.com/en-us/data-center/NAME if none is named, print some first numbers with
# sparsity, which is twice as much. They hold at the clock of the data sheet, which a card may
# exceed: others have measured 254 in bf16 on a 5090 and 853 on an H200 NVL
# (github.com/xzwgit/gpu-flops-bench).
PEAK_TFLOPS = (
    (r"H100 PCIe", 756, 51),                         # h100
    (r"H100 NVL", 835, 60),
    (r"H100 \d+GB HBM3", 989, 67),                   # SXM
    (r"H200 NVL", 835, 60),                          # h200
    (r"\bH200", 989, 67),                            # SXM; not GH200
    (r"\bB200", 2250, 75),                           # hgx
    (r"A100[- ]", 312, 19.5),                        # a100; SXM4 and PCIe
    (r"L40S", 362, 91.6),                            # l40s
    (r"\bL4$", 121, 30.3),                           # l4
    (r"RTX 4090$", 165.2, 82.6),                     # Ada whitepaper; not 4090 D, nor of a laptop
    (r"RTX 5090$", 209.5, 104.8),                    # RTX Blackwell whitepaper
    (r"\bT4$", 65, 8.1),                             # tesla-t4; fp16, as there is no bf16
    (r"V100-SXM", 125, 15.7),                        # v100; the same
    (r"V100-PCIE", 112, 14),
    (r"MI300X", 1307, 163.4),                        # AMD Instinct MI300X data sheet
)


def peak_flops(device, dtype):
    """The peak FLOP/s of a device in the dtype of the computation; None if it is not known."""
    import torch
    if device.type != "cuda":
        return None
    return peak_flops_of(torch.cuda.get_device_name(device), is_fp32=dtype == torch.float32)


def peak_flops_of(device_name, is_fp32):
    if "MIG " in device_name:                        # a part of a card
        return None
    for pattern, tflops, fp32_tflops in PEAK_TFLOPS:
        if re.search(pattern, device_name):
            return (fp32_tflops if is_fp32 else tflops) * 1e12
    return None


# what training waits for, and its name in a report
CAUSES = {"data": "data", "save": "a save", "ranks": "other ranks"}
FEWEST_STEPS = 10            # before which no step is slow: compilation, first allocations
SLOW_FACTOR = 3              # a slow step takes this many times the median ...
SLOW_SECONDS = 0.5           # ... and is this much longer


class Meter:
    """Where the time of training goes: since the last record, and in the slowest step since then.

    waits    {cause: seconds so far}. data: waiting for micro-batches; save: for the copy that a
             checkpoint is written from; ranks: for other ranks, in collectives on the host;
             evaluation: all of it, which does not count as time of training
    tokens   trained since the last record
    slowest  the slowest step since the last record, a dict of
               step                its number
               seconds             that it took
               median              of the seconds of the steps before it
               data, save, ranks   seconds that it waited
    """

    def __init__(self):
        self.waits = {"data": 0.0, "save": 0.0, "ranks": 0.0, "evaluation": 0.0}
        self.recent = collections.deque(maxlen=50)       # seconds of the last steps
        self.start()

    def start(self):
        """Training starts, or resumes after something that is not counted."""
        self.start_interval()
        self.start_step()

    def start_interval(self):
        self.tokens = 0
        self.interval = Stopwatch(self.waits)
        self.slowest = {"step": 0, "seconds": 0.0, "median": math.inf} | dict.fromkeys(CAUSES, 0.0)

    def start_step(self):
        self.step = Stopwatch(self.waits)

    @contextlib.contextmanager
    def waiting(self, cause):
        start = time.perf_counter()
        yield
        self.waits[cause] += time.perf_counter() - start

    def end_step(self, step):
        seconds, waits = self.step.read()
        if seconds > self.slowest["seconds"]:
            median = math.inf
            if len(self.recent) >= FEWEST_STEPS:
                median = statistics.median(self.recent)
            self.slowest = {"step": step, "seconds": seconds, "median": median} | waits
        self.recent.append(seconds)
        self.start_step()

    def numbers(self):
        """For compare_ranks: of each cause its share of the time since the last record, and its
        seconds in the slowest step."""
        seconds, waits = self.interval.read()
        shares = [waits[cause] / seconds for cause in CAUSES]
        return shares + [self.slowest[cause] for cause in CAUSES]


class Stopwatch:
    """Seconds since it was created, without evaluations, and those spent waiting (Meter.waits)."""

    def __init__(self, waits):
        self.start = time.perf_counter()
        self.waits = waits
        self.waits_before = dict(waits)

    def read(self):
        """(seconds, {cause: seconds})"""
        waited = {cause: self.waits[cause] - before for cause, before in self.waits_before.items()}
        seconds = time.perf_counter() - self.start - waited.pop("evaluation")
        return seconds, waited


def compare_ranks(by_rank, slowest):
    """The part of a record about memory and waiting, and a text about a slow step or "".

    by_rank  for each rank [peak_memory(), *Meter.numbers()]
    slowest  rank 0's Meter.slowest
    """
    memory, *waits = zip(*by_rank)               # of each a tuple with a number per rank
    data, save, ranks, *slow_waits = waits       # of each cause its share; then its seconds
    record = {"memory": int(memory[0]), "data_wait": data[0], "save_wait": save[0]}
    if len(by_rank) > 1:
        record |= {"memory_max": int(max(memory)), "data_wait_max": max(data),
                   "save_wait_max": max(save), "rank_wait": ranks[0],
                   "slowest_rank": ranks.index(min(ranks))}
    seconds = slowest["seconds"]
    median = slowest["median"]
    if seconds < SLOW_FACTOR * median or seconds < median + SLOW_SECONDS:
        return record, ""
    record |= {"slow_step": slowest["step"], "slow_seconds": seconds}
    causes = []
    for cause, of_ranks in zip(CAUSES, slow_waits):
        # every rank waits for the one that waits for data; only that one names the cause
        wait = of_ranks[0] if cause == "ranks" else max(of_ranks)
        record[f"slow_{cause}_wait"] = wait
        if wait > 0.1 * seconds:
            where = f" (rank {of_ranks.index(wait)})" if len(by_rank) > 1 else ""
            causes.append(f"{wait:.1f} s for {CAUSES[cause]}{where}")
    waited = ", ".join(causes) or "neither for data nor for a save or another rank"
    return record, (f"step {slowest['step']:,} took {seconds:.1f} s, {seconds / median:.1f} times "
                    f"the median of the steps before; it waited {waited}")


def peak_memory(device):
    """The most bytes held so far, by CUDA's allocator or by this process."""
    if device.type == "cuda":
        import torch
        return torch.cuda.max_memory_allocated(device)
    import resource
    max_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max_rss if sys.platform == "darwin" else max_rss * 1024    # elsewhere in KiB


def is_eval_record(record):
    return any(key.startswith("val/") for key in record)


def was_evaluated(records, step):
    """Is an evaluation of the model at exactly this step recorded, other than by eval_only?"""
    return any(record["step"] == step and is_eval_record(record)
               for record in without_eval_only(records))


def without_eval_only(records):
    """The records that training has made. eval_only may evaluate with other data and prompts."""
    return [record for record in records if "eval_only" not in record]


def parse_best(best):
    """"KEY" -> (KEY, False); "max KEY" -> (KEY, True): is a larger value better?"""
    return best.removeprefix("max "), best.startswith("max ")


def sort_steps_by(records, best, first_step=0):
    """Sort the logged steps by a metric: (steps from best to worst, evaluations since the best).

    best: see parse_best. Of equal values the earlier step is better. Steps up to first_step are
    left out, because the run in this folder has trained nothing yet. Steps may have no checkpoint.
    """
    records = without_eval_only(records)
    key, is_maximized = parse_best(best)
    points = [point for point in series(records, key) if point[0] > first_step]
    points.sort(key=operator.itemgetter(1), reverse=is_maximized)    # stable for equal values
    steps = [step for step, _ in points]
    evaluated = {record["step"]: record for record in records if is_eval_record(record)}
    if not steps:                                        # all are NaN, or the metric is new
        return [], sum(step > first_step and key in record for step, record in evaluated.items())
    return steps, sum(step > steps[0] for step in evaluated)


def check_best(cfg, labels, metric_names):
    """Raise UserError unless cfg["best"] is empty or names a number that this run logs.

    labels        of the validation sets
    metric_names  {label: names of the metrics of its answers}
    """
    if not cfg["best"]:
        return
    if not labels or not cfg["eval_every"]:
        raise configs.UserError(f"best: {cfg['best']} needs evaluations, and this run has none; "
                                "set data.validation or data.validation_split, and eval_every")
    names = ["loss", "grad_norm"] if cfg["log_every"] else []
    for label in labels:
        names += [f"val/{label}/{metric}" for metric in ["loss", *metric_names[label]]]
    key, _ = parse_best(cfg["best"])
    if key not in names:
        raise configs.UserError(f"best: must be one of {', '.join(names)}, or max and one of "
                                f"them; got {cfg['best']}")


# --------------------------------------------------------------------------------------------------
# the reports before the first step and after the last one (run: train.Run)
#
# Other scripts are imported inside the functions, so that `python log.py` starts without torch.

def describe_run(run):
    """What is about to be trained, on what and for how long, as arithmetic -> lines."""
    import tokenize_data
    lines = []
    for kind, sources in run.data.items():
        if kind == "train" and run.cfg["eval_only"]:
            continue
        for name, tokens in sources.items():
            lines.append("data      " + tokenize_data.summary(f"{kind}.{name}", tokens))
    lines.append("model     " + describe_model(run))
    if not run.cfg["eval_only"]:
        lines += describe_length(run)
    lines.append("device    " + describe_device(run))
    if run.resume_path:
        lines.append(f"resume    {run.resume_path}: {run.resumed_step:,} of "
                     f"{run.state.total_steps:,} steps are done")
        for change in run.state.changes:
            if change["step"] == run.resumed_step:
                lines.append(f"warning   changed since then: {', '.join(change['what'])}")
    return lines


def describe_model(run):
    import model as transformer
    model_cfg = run.model.cfg
    # not from run.model: a quantized weight has another shape
    n_params = sum(shape.numel() for shape in transformer.parameter_shapes(model_cfg).values())
    n_trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    lora_rank = run.cfg["shard"]["lora"]["r"]
    if lora_rank:
        n_params += n_trained
    text = (f"{model_cfg['family']} {model_cfg['n_layers']} x {model_cfg['d_model']}, "
            f"{n_params:,} parameters, {n_trained:,} trained")
    if lora_rank:
        quantize = run.cfg["shard"]["quantize"]
        stored = "" if quantize == "none" else f", the blocks' frozen weights in {quantize}"
        text += f" (LoRA of rank {lora_rank}{stored})"
    text += f", from {model_cfg['init_from'] or 'scratch'}"
    if run.cfg["shard"]["lora"]["init_from"]:
        text += f" with the adapter {run.cfg['shard']['lora']['init_from']}"
    # run.cfg has the vocabulary size of the pretrained config.json (null without one). model_cfg
    # has the final size, which is larger if the tokenizer has more tokens.
    old_vocab_size = run.cfg["model"]["vocab_size"]
    if old_vocab_size and old_vocab_size < model_cfg["vocab_size"]:
        text += f", with {model_cfg['vocab_size'] - old_vocab_size:,} new tokens"
    return text


def describe_length(run):
    """The tokens of a step, and the steps and epochs of the run -> two lines."""
    import sampler
    import shard
    cfg = run.cfg
    sources = run.data["train"]
    sizes = {name: len(tokens) for name, tokens in sources.items()}
    n_documents = sampler.documents_per_epoch(cfg, sizes)     # of each source
    # the mean length of a document; n tokens are n - 1 inputs
    lengths = [(tokens.offsets[-1] - tokens.offsets[0]) / max(len(tokens), 1) - 1
               for tokens in sources.values()]
    length = n_documents @ lengths / n_documents.sum()
    batch_size = min(cfg["batch_size"], int(n_documents.sum()))
    note = ""
    if batch_size < cfg["batch_size"]:
        note = f" (batch_size is {cfg['batch_size']:,}, more than there are)"
    per_step = batch_size * length
    world_size = shard.world_size()
    n_micro_batches = math.ceil(per_step / cfg["micro_tokens"] / world_size)
    micro_batches = plural(n_micro_batches, "micro-batch", "micro-batches")
    each = " on each rank" if world_size > 1 else ""
    total_steps = run.state.total_steps
    epochs = total_steps / run.steps_per_epoch
    return [
        f"step      {batch_size:,} documents{note} x ~{length:,.0f} tokens = "
        f"{per_step:,.0f} tokens, in {micro_batches} of at most {cfg['micro_tokens']:,} "
        f"tokens{each}",
        f"run       {n_documents.sum():,} documents / {batch_size:,} = "
        f"{run.steps_per_epoch:,} steps per epoch; {total_steps:,} steps = {epochs:.2f} epochs = "
        f"{total_steps * per_step:,.0f} tokens",
    ]


def describe_device(run):
    import shard
    import torch
    if run.device.type == "cuda":
        text = torch.cuda.get_device_name(run.device)
    else:
        text = "cpu, " + plural(torch.get_num_threads(), "thread", "threads")
    world_size = shard.world_size()
    if world_size > 1:
        replicate, shards = shard.mesh_sizes(run.cfg, world_size)
        text = f"{world_size} ranks (replicate {replicate} x shard {shards}), each {text}"
    dtype = str(run.model.dtype).removeprefix("torch.")
    shard_cfg = run.cfg["shard"]
    text += f", computing in {dtype}, trained weights in {shard_cfg['master_dtype']}"
    if shard_cfg["moment_dtype"] != "float32":
        text += f", moments in {shard_cfg['moment_dtype']}"
    if shard_cfg["offload"] != "none":
        text += ", weights, gradients and moments in host memory"
    if run.model.recompute:
        blocks = plural(run.model.recompute, "block", "blocks")
        text += f", {blocks} recomputed in the backward pass"
    return text


def plural(n, one, many):
    return f"{n:,} {one if n == 1 else many}"


def final_summary(run):
    """Sample answers, each metric from first to last, time, and how to chat -> lines.

    If this start trained nothing, the first line says so.
    """
    cfg = run.cfg
    state = run.state
    out_dir = cfg["out_dir"]
    records = read(out_dir)
    metrics = format_metrics(records)
    answers = format_answers(run.answers, cfg["samples"])
    if state.step > run.resumed_step:
        duration = format_duration(state.seconds)
        lines = ["", *answers, *metrics]
        lines.append(f"{state.step:,} steps in {duration}; results are in {out_dir}")
    else:
        lines = [f"{out_dir} is finished: all {state.step:,} steps are done; nothing was trained"]
        if state.step < state.total_steps:    # ended by max_seconds or patience
            lines = [f"{out_dir} ended after step {state.step:,} in an earlier start; nothing was "
                     "trained"]
        lines += answers
        if metrics:
            lines += ["recorded when it was trained:", *metrics]
        lines.append("out_dir=NEW starts another run; resume=never starts this one over")
    if cfg["checkpoint"]["export"]:
        command = f"python model.py {shlex.quote(str(out_dir))}"
        text = f'let it continue a text: {command} "..."'
        lines.append(f"chat with it: {command}" if state.has_chats else text)
    return lines


def format_answers(answers, n_samples):
    """Lines for the first `n_samples` of each label (see Logger.validation)."""
    lines = []
    for samples in answers.values():
        for sample in samples[:n_samples]:
            verdict = f"expected: {shorten_lines(sample['reference'])}"
            if sample.get("exact_match"):
                verdict = "matches the reference"
            lines += [f"{shorten_lines(sample['prompt'])}{shorten_lines(sample['answer'])}",
                      f"    {verdict}", ""]
    return lines


def format_sample(sample):
    """One generated answer -> three lines."""
    prompt = " ".join(sample["prompt"].split())
    lines = [f"    prompt     {prompt if len(prompt) <= 84 else '...' + prompt[-81:]}"]
    for key in ("answer", "reference"):
        text = " ".join(sample[key].split())
        lines.append(f"    {key:<9}  {text if len(text) <= 84 else text[:81] + '...'}")
    return lines


def shorten_lines(text, n_lines=16, width=800):
    """Leave out the middle of a long text; an untrained model may write hundreds of lines."""
    lines = text.split("\n")
    if len(lines) > n_lines:
        half = n_lines // 2
        left_out = f"[{len(lines) - 2 * half} lines]"
        lines = [*lines[:half], left_out, *lines[-half:]]
    for i, line in enumerate(lines):
        if len(line) > width:
            lines[i] = f"{line[:width // 2]} [{len(line) - width} characters] {line[-width // 2:]}"
    return "\n".join(lines)


def format_metrics(records):
    """The first and the last value of each validation metric -> lines."""
    lines = []
    for key in validation_keys(records):
        values = [value for _, value in series(records, key)]
        if values:
            name = key.removeprefix("val/")
            lines.append(f"{name:<24} {values[0]:.3f} -> {values[-1]:.3f}")
    return lines


# --------------------------------------------------------------------------------------------------
# reading and comparing runs

def read(folder, name="metrics.jsonl"):
    """The records of a run, [] if it has none.

    An incomplete last line, which a killed process leaves, is ignored. Raises UserError for any
    other line that is not a record.
    """
    path = Path(folder) / name
    if not path.is_file():
        return []
    records = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for i, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            if i == len(lines):
                break
            record = None
        if not isinstance(record, dict) or "step" not in record:
            raise configs.UserError(f"{path}, line {i}: not the record of a step; remove the line")
        records.append(record)
    return records


def series(records, key):
    """The known values of a key -> [(step, value)]"""
    return [(record["step"], record[key]) for record in records if record.get(key) is not None]


def last_value(records, key):
    points = series(records, key)
    return points[-1][1] if points else None


def validation_keys(records):
    return sorted({key for record in records for key in record if key.startswith("val/")})


def table(runs):
    """{name: records} -> text with the last values of each run in a row."""
    return align(table_rows(runs))


def table_rows(runs):
    """{name: records} -> rows of cells, the first with their names."""
    val_keys = sorted({key for records in runs.values() for key in validation_keys(records)})
    names = [key.removeprefix("val/") for key in val_keys]
    rows = [["run", "step", "loss", *names, "tok/s", "time", "loss, from first to last"]]
    for name, records in runs.items():
        values = [last_value(records, key) for key in ["loss", *val_keys]]
        speeds = [speed for _, speed in series(records, "tok_per_s")]
        median = statistics.median(speeds) if speeds else None
        rows.append([
            name,
            f"{last_value(records, 'step') or 0:,}",
            *[format_number(value, ".4f") for value in values],
            format_number(median, ",.0f"),
            format_duration(last_value(records, "seconds") or 0),
            sparkline([loss for _, loss in series(records, "loss")]),
        ])
    return rows


def align(rows):
    """Rows of cells -> text. The first and the last column are left-aligned, the others right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    lines = []
    for first, *middle, last in rows:
        cells = [cell.rjust(width) for cell, width in zip(middle, widths[1:])]
        lines.append("  ".join([first.ljust(widths[0]), *cells, last]).rstrip())
    return "\n".join(lines)


BARS = "▁▂▃▄▅▆▇█"


def sparkline(values, width=32):
    """Numbers -> a line of at most `width` bars, each the mean of consecutive values."""
    return block_plot(thin(list(enumerate(values)), width), height=1)[0]


def block_plot(points, height, is_log=False):
    """[(step, value)] -> lines of text, the highest first: a bar for each point.

    The lowest value is an eighth of a line.
    """
    values = [math.log(value) if is_log else value for _, value in points]
    low = min(values, default=0)
    span = (max(values, default=0) - low) or 1           # 1: all values are equal
    eighths = [1 + round((value - low) / span * (8 * height - 1)) for value in values]
    lines = []
    for row in reversed(range(height)):
        filled = [min(max(n - 8 * row, 0), 8) for n in eighths]
        lines.append("".join(" " if n == 0 else BARS[n - 1] for n in filled))
    return lines


def thin(points, most):
    """[(step, value)] -> at most `most` points: means of consecutive values, at their last step."""
    size = math.ceil(len(points) / most) or 1
    groups = [points[i:i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], statistics.fmean(value for _, value in group)) for group in groups]


# --------------------------------------------------------------------------------------------------
# files for the report that a run leaves beside its records and evaluations.jsonl

STARTS = "starts.jsonl"              # of each start: first step, time, command, device, code
DOCUMENTS = "documents.txt"          # the first training documents, coloured for a terminal


def record_start(run):
    """Append to starts.jsonl, and write the first training documents to documents.txt.

    A run that continues another one in a new folder begins with that one's starts. A start that has
    nothing to train is not recorded.
    """
    if run.is_complete() or run.cfg["eval_only"]:
        return
    folder = Path(run.cfg["out_dir"])
    starts = []
    if run.resume_path:                                  # RUN/checkpoints/STEP
        starts = read(Path(run.resume_path).resolve().parent.parent, STARTS)
    starts.append({
        "step": run.state.step, "total_steps": run.state.total_steps,
        "time": time.strftime("%Y-%m-%d %H:%M:%S"), "command": command_line(),
        "device": describe_device(run), "git": run.state.git, "versions": run.state.versions})
    write_records(folder / STARTS, starts)
    write_atomic(folder / DOCUMENTS, first_documents(run))


def command_line():
    """The command of this process, or of torchrun for several ranks."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    launcher = ["python"] if ranks == "1" else ["torchrun", "--nproc_per_node", ranks]
    script = [os.path.relpath(sys.argv[0])]
    module = getattr(sys.modules["__main__"], "__spec__", None)
    if module and module.origin == sys.argv[0]:          # python -m experiments.NAME
        script = ["-m", module.name]
    return shlex.join([*launcher, *script, *sys.argv[1:]])


def first_documents(run, n_documents=3, n_tokens=1000):
    """The beginnings of each source's first documents, as tokenize_data.py show=3 prints them."""
    import tokenize_data
    parts = []
    for name, tokens in run.data["train"].items():
        for i in range(min(n_documents, len(tokens))):
            ids, weights = tokens.document(i)
            weights = weights.copy()
            weights[0] = 0                               # the first token is never a target
            parts.append(f"--- {name} {i}: {len(ids):,} tokens, {(weights != 0).sum():,} trained")
            parts.append(tokenize_data.colorize(
                run.tokenizer, ids[:n_tokens], weights[:n_tokens], use_color=True))
    return "\n".join([*parts, ""])


# --------------------------------------------------------------------------------------------------
# reading a run for the report

@dataclasses.dataclass
class LoggedRun:
    name: str
    records: list
    evaluations: list             # one for each recorded evaluation, in the order of steps
    starts: list
    explicit: dict                # the dotted keys of config.yaml
    documents: str


def load_run(folder):
    path = Path(folder)
    records = read(path)
    # A run that was killed repeats steps: of evaluations of one step the last one is recorded.
    evaluated = {record["step"] for record in records if is_eval_record(record)}
    evaluations = {line["step"]: line for line in read(path, "evaluations.jsonl")
                   if line["step"] in evaluated}
    config = path / "config.yaml"
    documents = path / DOCUMENTS
    return LoggedRun(
        name=folder, records=records, starts=read(path, STARTS),
        evaluations=[evaluations[step] for step in sorted(evaluations)],
        explicit=configs.flat(configs.read_file(config)) if config.is_file() else {},
        documents=documents.read_text(encoding="utf-8") if documents.is_file() else "")


def is_running(folder):
    """Does a process hold the lock of this run (checkpoint.lock_folder)?"""
    import fcntl
    try:
        with open(Path(folder) / ".lock", encoding="utf-8") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:                                      # no such file, or no locks
        pass
    return False


def describe_status(run):
    status = "running" if is_running(run.name) else "stopped"
    if not run.starts:                                   # an evaluation, or an older version's run
        is_evaluation = status == "stopped" and all(map(is_eval_record, run.records))
        return "evaluated" if is_evaluation else status
    share = run.records[-1]["step"] / run.starts[-1]["total_steps"]
    return "finished" if share == 1 and status == "stopped" else f"{status}, {share:.0%} done"


# --------------------------------------------------------------------------------------------------
# curves

# borders of a plot in its SVG picture, which is scaled to the window
LEFT = 56
RIGHT = 400
TOP = 8
BOTTOM = 180

N_COLORS = 8                                             # .c0 to .c7 in configs/report.html
MOST_POINTS = 120                                        # of a curve

TITLES = {"loss": "Loss", "lr": "Learning rate", "grad_norm": "Gradient norm",
          "tok_per_s": "Tokens per second", "mfu": "MFU", "memory": "Memory (GiB)"}
# keys without curves: the report shows them otherwise, or they say little
NOT_DRAWN = re.compile("step|seconds|tokens|target_tokens|documents|packing|compiled|skipped|"
                       "eval_only|slow.*|.*_wait(_max)?")
# their axis is logarithmic if the values differ tenfold, and need not begin at 0
LOGARITHMIC = {"loss", "grad_norm"}


def make_plots(runs):
    """The plots of the report: losses, the other validation metrics, and all other keys."""
    keys = sorted({key for run in runs for record in run.records for key in record})
    groups = {"loss": []}                                # {name: keys that share a plot}
    for key in keys:
        if key == "loss" or key.endswith(("/loss", "/nll")):
            groups["loss"].append(key)
        elif key.startswith("val/"):
            groups.setdefault(key.rpartition("/")[2], []).append(key)
    for key in [*TITLES, *keys]:                         # those with titles come first
        name = key.removesuffix("_max")                  # of all ranks; without it: of rank 0
        is_drawn = key != "loss" and not key.startswith("val/") and not NOT_DRAWN.fullmatch(key)
        if is_drawn and key not in groups.setdefault(name, []):
            groups[name].append(key)
    plots = []
    for name, group in groups.items():
        curves = find_curves(runs, group)
        if curves:
            title = TITLES.get(name) or name.capitalize().replace("_", " ")
            plots.append(make_plot(title, curves, name in LOGARITHMIC))
    return plots


def find_curves(runs, keys):
    """One dict for each run and key with known values."""
    curves = []
    val_keys = [key for key in keys if key.startswith("val/")]
    step_keys = [key for key in keys if key not in val_keys]
    for i, run in enumerate(runs):
        for key in keys:
            points = series(run.records, key)
            if key.startswith("memory"):
                points = [(step, value / 2**30) for step, value in points]
            if not points:
                continue
            is_validation = key in val_keys
            label = "train" if key == "loss" else key
            curves.append({
                "label": f"{run.name} {label}" if len(keys) > 1 else run.name,
                "color": i % N_COLORS,                   # tells runs apart, the dash keys
                "is_validation": is_validation,
                "dash": val_keys.index(key) if is_validation else step_keys.index(key),
                "points": thin(points, MOST_POINTS),
                "is_thinned": len(points) > MOST_POINTS})
    return curves


def make_plot(title, curves, may_be_log):
    """What configs/report.html draws. Adds the points' pixels to the curves.

    may_be_log  may the axis be logarithmic, and begin above 0?
    """
    points = [point for curve in curves for point in curve["points"]]
    last_step = max(step for step, _ in points)
    low = min(value for _, value in points)
    high = max(value for _, value in points)
    is_log = may_be_log and low > 0 and high >= 10 * low
    if is_log:
        ticks = log_ticks(low, high)
    else:
        first = low if may_be_log and low < high else min(low, 0)
        ticks = linear_ticks(first, high)
        low = ticks[0]
        high = ticks[-1]
    x_ticks = [tick for tick in linear_ticks(0, last_step) if tick <= last_step and tick % 1 == 0]
    for curve in curves:
        curve["pixels"] = [(rescale(step, 0, last_step, LEFT, RIGHT),
                            rescale(value, low, high, BOTTOM, TOP, is_log))
                           for step, value in curve["points"]]
    return {
        "title": f"{title} (log scale)" if is_log else title,
        "is_thinned": any(curve["is_thinned"] for curve in curves),
        "curves": curves,
        "columns": hover_columns(curves),
        "x_ticks": [(rescale(tick, 0, last_step, LEFT, RIGHT), f"{tick:,.0f}") for tick in x_ticks],
        "y_ticks": [(rescale(tick, low, high, BOTTOM, TOP, is_log), f"{tick:,.12g}")
                    for tick in ticks]}


def linear_ticks(low, high):
    """Round numbers at equal distances; the first is at most `low`, the last at least `high`."""
    rough = (high - low) / 5 or 1
    power = 10 ** math.floor(math.log10(rough))
    size = min(n * power for n in (1, 2, 5, 10) if n * power >= rough)
    first = math.floor(low / size)
    last = max(math.ceil(high / size), first + 1)
    # rounded: 0.3 instead of 0.30000000000000004
    return [float(f"{i * size:.10g}") for i in range(first, last + 1)]


def log_ticks(low, high):
    """1, 2 and 5 times powers of ten between low and high, or only the powers if there are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ("125", "1"):
        ticks = [float(f"{digit}e{power}") for power in powers for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= 7:
            break
    return ticks[::math.ceil(len(ticks) / 7)]


def rescale(value, low, high, start, end, is_log=False):
    """Map the range from low to high to the pixels from start to end."""
    if is_log:
        return rescale(math.log(value), math.log(low), math.log(high), start, end)
    share = (value - low) / ((high - low) or 1)
    return round(start + share * (end - start), 1)


def format_value(value):
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def hover_columns(curves):
    """Columns of the plot, one for each step: the mouse anywhere in it shows the step's values."""
    marks_by_step = {}
    for curve in curves:
        for (step, value), (x, y) in zip(curve["points"], curve["pixels"]):
            text = f"{curve['label'][-50:]}: {format_value(value)}"
            mark = {"x": x, "y": y, "color": curve["color"], "text": text}
            marks_by_step.setdefault(step, []).append(mark)
    steps = sorted(marks_by_step)
    xs = [marks_by_step[step][0]["x"] for step in steps]
    borders = [LEFT - 8, *[(a + b) / 2 for a, b in itertools.pairwise(xs)], RIGHT + 8]
    columns = []
    for step, x, left, right in zip(steps, xs, borders, borders[1:]):
        marks = marks_by_step[step]
        box_width = 8 + 6.2 * max(len(mark["text"]) for mark in marks)
        columns.append({"step": step, "x": x, "left": left, "width": right - left, "marks": marks,
                        "box_width": box_width,
                        # in the other half of the plot
                        "box_left": RIGHT - box_width if x < (LEFT + RIGHT) / 2 else LEFT})
    return columns


# --------------------------------------------------------------------------------------------------
# the other parts of the report

WAITS = {"data_wait": "waiting for data", "save_wait": "waiting for saves",
         "rank_wait": "waiting for other ranks"}


def time_shares(run):
    """What the run's time was spent on -> {what: seconds}. Setup and export are not included."""
    seconds = {"compute": 0.0, "evaluation": evaluation_seconds(run, 0, math.inf)}
    seconds |= dict.fromkeys(WAITS.values(), 0.0)
    last_step = 0
    last_seconds = 0.0
    for record in run.records:
        if is_eval_record(record):
            continue
        evaluation = evaluation_seconds(run, last_step, record["step"])
        elapsed = max(record["seconds"] - last_seconds - evaluation, 0.0)
        seconds["compute"] += elapsed
        for key, what in WAITS.items():
            waited = elapsed * record.get(key, 0.0)
            seconds[what] += waited
            seconds["compute"] -= waited
        last_step = record["step"]
        last_seconds = record["seconds"]
    return {what: part for what, part in seconds.items() if part}


def evaluation_seconds(run, first, end):
    """Seconds of the evaluations after the steps first ... end - 1."""
    return sum(line["seconds"] for line in run.evaluations if first <= line["step"] < end)


def config_rows(runs):
    """Of one run the keys that were set, of several those that differ -> [(key, [values])]"""
    defaults = configs.flat(configs.read_defaults()[0])
    rows = []
    for key in dict.fromkeys(key for run in runs for key in run.explicit):
        values = [run.explicit.get(key, defaults.get(key, "-")) for run in runs]
        texts = [value if isinstance(value, str) else configs.show(value) for value in values]
        is_shown = len(runs) == 1 or len(set(texts)) > 1
        if is_shown and key not in ("out_dir", "resume"):
            rows.append((key, texts))
    return rows


def differing_scripts(runs):
    """The files of code/ that are not the same in all runs."""
    codes = []
    for run in runs:
        folder = Path(run.name) / "code"
        codes.append({str(path.relative_to(folder)): path.read_bytes()
                      for path in folder.rglob("*") if path.is_file()})
    names = sorted(set().union(*codes)) if all(codes) else []
    return [name for name in names if len({code.get(name) for code in codes}) > 1]


def sample_answers(runs, n_prompts=4, n_last=5):
    """The first prompts of each label with their answers in the first and the last evaluations."""
    samples = {}                                         # {(label, prompt, reference): [row]}
    for i, run in enumerate(runs):
        first = run.evaluations[:1]
        others = run.evaluations[1:]
        for line in first + others[-n_last:]:
            for label, answers in line["answers"].items():
                for sample in answers[:n_prompts]:
                    row = {"run": run.name, "color": i % N_COLORS, "step": line["step"],
                           "answer": sample["answer"], "is_match": sample.get("exact_match") == 1}
                    key = (label, sample["prompt"], sample["reference"])
                    samples.setdefault(key, []).append(row)
    return [{"label": label, "prompt": prompt, "reference": reference, "rows": rows}
            for (label, prompt, reference), rows in samples.items()]


# the classes of configs/report.html for the escape sequences of tokenize_data.colorize
TOKEN_CLASSES = {"2": "untrained", "32": "trained", "31": "negative", "0": ""}


def colored_spans(text):
    """Text with the escape sequences of tokenize_data.colorize -> [(CSS classes, text)]"""
    spans = []
    color = ""
    special = ""
    for i, part in enumerate(re.split(r"\x1b\[(\d+)m", text)):
        if i % 2 == 0:                                   # text; every other part is a code
            spans.append((f"{color} {special}".strip(), part))
        elif part in ("7", "27"):
            special = "special" if part == "7" else ""
        else:
            color = TOKEN_CLASSES.get(part, color)
    return [span for span in spans if span[1]]


def report(runs):
    """[LoggedRun] -> report.html as text, from the template configs/report.html."""
    import jinja2
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"value": format_value, "duration": format_duration,
                            "shorten": shorten_lines}
    template = environment.from_string(configs.read_text(configs.HERE / "report.html"))
    records = {run.name: run.records for run in runs}
    documents = {}                                       # {text: runs that have it}
    for run in runs:
        documents.setdefault(run.documents, []).append(run.name)
    return template.render(
        runs=runs, statuses=[describe_status(run) for run in runs],
        summary=[row[:-1] for row in table_rows(records)], plots=make_plots(runs),
        config_rows=config_rows(runs), scripts=differing_scripts(runs),
        samples=sample_answers(runs), times=[time_shares(run) for run in runs],
        documents=[(names, colored_spans(text)) for text, names in documents.items() if text],
        written=time.strftime("%Y-%m-%d %H:%M"),
        n_colors=N_COLORS, left=LEFT, right=RIGHT, top=TOP, bottom=BOTTOM)


# --------------------------------------------------------------------------------------------------
# watching a run in the terminal

def live_view(folder, width, height):
    """The state of a run -> lines of text; its losses are drawn over `height` of them."""
    records = read(folder)
    starts = read(folder, STARTS)
    status = "running" if is_running(folder) else "not running"
    trained = [record for record in records if "lr" in record]
    if not trained:
        return [f"{status}, no step is logged yet: {folder}"]
    last = trained[-1]
    progress = f"step {last['step']:,}"
    if starts:
        total = starts[-1]["total_steps"]
        share = last["step"] / total
        seconds_left = last["seconds"] / last["step"] * (total - last["step"])
        bar = "█" * round(20 * share)
        progress += f"/{total:,}  {bar:░<20} {share:.0%}  {format_duration(seconds_left)} left"
    lines = [f"{status}: {folder}", progress]    # the end of a long line is cut off
    points = thin(series(trained, "loss"), width - 10)
    losses = [loss for _, loss in points]
    if losses:
        labels = [f"{max(losses):8.4g}", *[" " * 8] * (height - 2), f"{min(losses):8.4g}"]
        rows = block_plot(points, height, is_log=min(losses) > 0)
        lines += [f"{label} {row}" for label, row in zip(labels, rows)]
    lines.append(f"loss {format_number(last['loss'], '.4f')}  lr {last['lr']:.2e}  "
                 f"norm {format_number(last['grad_norm'], '.3f')}  {last['tok_per_s']:,.0f} tok/s  "
                 f"{format_duration(last['seconds'])}")
    return lines + format_metrics(records)


def watch(folders):
    """Print the state of the runs, on a terminal again and again until all of them have ended."""
    n_lines = 0
    while True:
        is_over = not any(is_running(folder) for folder in folders)    # the last view is complete
        columns, rows = shutil.get_terminal_size()
        height = min(max(rows // len(folders) - 8, 2), 10)
        lines = [line[:columns - 1] for folder in folders
                 for line in live_view(folder, columns - 1, height)]
        if n_lines:
            print(f"\x1b[{n_lines}F\x1b[J", end="")      # back to the first line, and clear
        print(*lines, sep="\n", flush=True)
        n_lines = len(lines)
        if is_over or not sys.stdout.isatty():
            return
        time.sleep(2)


def main(argv):
    options, folders = configs.pop_options(argv, watch=False)
    folders = [folder.rstrip("/") for folder in folders]
    runs = [load_run(folder) for folder in folders]
    for run in runs:
        is_starting = options["watch"] and is_running(run.name)
        if not run.records and not is_starting:
            beside = [str(path.parent) for path in Path(run.name).parent.glob("*/metrics.jsonl")]
            near = configs.nearest_file(run.name, beside)
            hint = f"; the nearest is {near}" if near else ""
            raise configs.UserError(f"{run.name}: is not the out_dir of a run that has logged: it "
                                    f"has no metrics.jsonl, or an empty one{hint}")
    if not runs:
        raise configs.UserError("log.py: no run is named; python log.py out/ft")
    if options["watch"]:
        watch(folders)
        return
    print(table({run.name: run.records for run in runs}))
    path = Path(folders[0]) / "report.html"
    write_atomic(path, report(runs))
    print(f"\nreport: {path}")


if __name__ == "__main__":
    configs.exit_with_help(__doc__, sys.argv[1:])
    configs.run(main, sys.argv[1:])
