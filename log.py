"""What a run tells: an aligned line on the console and a record in metrics.jsonl for each logged step.

    python log.py out/ft out/lora          compare runs: a table, and their curves in out/ft/curves.svg

Also wandb, mlflow or tensorboard, where log.to names them and they are installed. A number is null where it is not
known; the README's table says what each one is. Values that live on a device are read when the next record comes, so
that logging never makes the device wait.
"""
import contextlib, html, json, math, os, re, sys
from pathlib import Path

import configs


# ---------------------------------------------------------------------------------------------------------------------
# other places to tell: name -> a function of (cfg, folder) that returns a function of a record

def to_wandb(cfg, folder):
    import wandb
    run = wandb.init(project=cfg["log"]["project"], name=Path(folder).name, dir=str(folder), config=cfg, resume="allow")
    return lambda record: run.log({k: v for k, v in record.items() if v is not None}, step=record["step"])


def to_mlflow(cfg, folder):
    import mlflow
    mlflow.set_experiment(cfg["log"]["project"])
    mlflow.start_run(run_name=Path(folder).name)
    return lambda record: mlflow.log_metrics({k: v for k, v in record.items() if v is not None}, step=record["step"])


def to_tensorboard(cfg, folder):
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(str(folder))

    def write(record):
        for key, value in record.items():
            if value is not None:
                writer.add_scalar(key, value, record["step"])
        writer.flush()
    return write


PLACES = {"wandb": to_wandb, "mlflow": to_mlflow, "tensorboard": to_tensorboard}


# ---------------------------------------------------------------------------------------------------------------------
# while a run is on

def number(value):
    """A tensor, a number or None -> what JSON can hold: NaN and infinity are null."""
    value = value.item() if hasattr(value, "item") else value
    return None if value is None or isinstance(value, float) and not math.isfinite(value) else value


def replace(path, text):
    """Write a file whole or not at all, and not where it holds that already."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    beside = path.with_name(f".{path.name}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def clock(seconds):
    """83 -> 1:23, 3683 -> 1:01:23"""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Log:
    """A run's console and metrics.jsonl.

    resumed, before  the step a run goes on from, and its seconds until then. Records of later steps are dropped.
    """

    def __init__(self, cfg, total_steps, resumed=0, before=0.0):
        self.path, self.total, self.pending = Path(cfg["out_dir"]) / "metrics.jsonl", total_steps, None
        self.resumed, self.before, self.width = resumed, before, len(f"{total_steps:,}")
        if strange := [name for name in cfg["log"]["to"] if name not in PLACES]:
            raise ValueError(f"log.to: {strange[0]} is none of {', '.join(PLACES)}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ValueError(f"out_dir: {self.path.parent} can't be made: {e.strerror}") from None
        old = [r for r in read(self.path.parent) if r["step"] <= resumed] if resumed else []
        replace(self.path, "".join(json.dumps(r) + "\n" for r in old))
        self.file, self.unwritten = open(self.path, "ab", buffering=0), b""
        self.places = []
        for name in cfg["log"]["to"]:
            try:
                self.places.append(PLACES[name](cfg, self.path.parent))
            except ImportError:
                raise ValueError(f"log.to: {name} is not installed; pip install {name}") from None

    def say(self, text=""):
        """A line for people only."""
        self.flush()
        print(text, flush=True)

    def step(self, record):
        """A training step's record. It is written when the next one comes: its tensors are then long computed."""
        self.flush()
        self.pending = record

    def flush(self):
        record, self.pending = self.pending, None
        if not record:
            return
        record = self.write(record)
        step = record["step"]
        left = (record["seconds"] - self.before) / (step - self.resumed) * (self.total - step)
        show = lambda key, form: "-" if record[key] is None else format(record[key], form)
        parts = [f"step {step:>{self.width},}/{self.total:,}", f"loss {show('loss', '7.4f')}",
                 f"lr {show('lr', '.2e')}", f"norm {show('grad_norm', '6.3f')}", f"{show('tok_per_s', '9,.0f')} tok/s",
                 f"mfu {show('mfu', '.1%')}", f"{step / self.total:4.0%}", f"{clock(left)} left"]
        print("  ".join(part for part in parts if part != "mfu -"), flush=True)

    def validation(self, record):
        """{"step", "val/LABEL/loss", "val/LABEL/exact_match"}: written, and shown."""
        self.flush()
        record = self.write(record)
        parts = [f"{key.removeprefix('val/').replace('/', ' ')} {'-' if value is None else format(value, '.4f')}"
                 for key, value in record.items() if key.startswith("val/")]
        print(f"step {record['step']:>{self.width},}/{self.total:,}  validation: {'   '.join(parts)}", flush=True)

    def write(self, record):
        record = {key: number(value) for key, value in record.items()}
        self.unwritten += json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten):]
        except OSError as e:                                   # a full disk, say: these lines wait for the next
            print(f"{self.path} can't be written ({e.strerror}); the run goes on", flush=True)
        for place in self.places:
            place(record)
        return record

    def close(self):
        self.flush()
        self.file.close()


@contextlib.contextmanager
def profiled(path, device, say):
    """Around a step: writes a trace for chrome://tracing or Perfetto to `path`, and says what took longest.

    On a CPU the trace's own small allocations break up the places that large tensors had, which then get new pages
    from the operating system: what first touches such a tensor (fill_, say) looks dearer than in other steps.
    """
    from torch.profiler import ProfilerActivity, profile
    cuda, before = device.type == "cuda", os.times().system
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as prof:
        yield
        system = os.times().system - before                    # seconds, of all threads
    prof.export_chrome_trace(str(path))
    cost = lambda event: event.self_device_time_total if cuda else event.self_cpu_time_total     # microseconds
    events = [e for e in prof.key_averages() if cost(e) > 0 and (not cuda or e.device_type.name == "CUDA")]
    total = sum(map(cost, events)) or 1
    heavy = sum(cost(e) for e in events if re.search(HEAVY, e.key, re.IGNORECASE))
    for event in sorted(events, key=cost, reverse=True)[:10]:
        say(f"{cost(event) / total:6.1%} {cost(event) / 1e3:10.2f} ms {event.count:6,} x  {event.key[:80]}")
    say(f"{1 - heavy / total:6.1%} of {total / 1e3:,.2f} ms outside matrix products and attention; all is in {path}")
    if not cuda:
        say(f"{system * 1e3:.0f} ms of processor time for new memory and the like, most of it because of the trace")


HEAVY = "gemm|mm$|mkldnn|cutlass|nvjet|xmma|wgmma|flash|fmha|attention|cudnn"    # their kernels' names


class Silent:
    """What the other ranks have for a Log: the console speaks once."""

    def __getattr__(self, name):
        return lambda *args: None


# ---------------------------------------------------------------------------------------------------------------------
# afterwards

def read(folder):
    """A run's records; a last line that was cut off by the end of the process is left out."""
    path, records = Path(folder) / "metrics.jsonl", []
    lines = path.read_text().splitlines() if path.is_file() else []
    for n, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            if n == len(lines):
                break
            record = None
        if not isinstance(record, dict) or "step" not in record:
            raise ValueError(f"{path}, line {n}: no record of a step")
        records.append(record)
    return records


def table(runs):
    """{name: records} -> text: a row per run with its last figures."""
    vals = sorted({key for records in runs.values() for r in records for key in r if key.startswith("val/")})
    last = lambda records, key: next((r[key] for r in reversed(records) if r.get(key) is not None), None)
    short = [v.removeprefix("val/") for v in vals]
    rows = [["run", "step", "loss", *short, "tok/s", "time", "loss, from first to last"]]
    for name, records in runs.items():
        figures = [last(records, key) for key in ["loss", *vals]]
        speeds = sorted(r["tok_per_s"] for r in records if r.get("tok_per_s"))
        rows.append([name, f"{last(records, 'step') or 0:,}", *["-" if f is None else f"{f:.4f}" for f in figures],
                     f"{speeds[len(speeds) // 2]:,.0f}" if speeds else "-", clock(last(records, "seconds") or 0),
                     spark([r["loss"] for r in records if r.get("loss") is not None])])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    sides = ["<", *[">"] * (len(widths) - 2), "<"]
    aligned = ([f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths)] for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in aligned)


def spark(values, width=32):
    """Numbers as a line of at most `width` bars; a bar is the mean of its share."""
    n = min(width, len(values))
    shares = [values[i * len(values) // n:(i + 1) * len(values) // n] for i in range(n)]
    means = [sum(share) / len(share) for share in shares]
    low, span = min(means, default=0), max(means, default=0) - min(means, default=0)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (mean - low) / span) if span else 0] for mean in means)


COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")


def curves(runs, width=860, height=420):
    """{name: records} -> an SVG picture: training loss as thin lines, validation loss thick and dotted, by step."""
    lines = []                                                 # (colour, label, points, is it validation)
    for colour, (name, records) in zip(COLOURS * len(runs), runs.items()):
        for key in ["loss", *sorted({k for r in records for k in r if k.startswith("val/") and k.endswith("/loss")})]:
            label = name if key == "loss" else f"{name} {key.removesuffix('/loss')}"
            if points := [(r["step"], r[key]) for r in records if r.get(key) is not None]:
                lines.append((colour, label, points, key != "loss"))
    xs, ys = ([point[i] for _, _, points, _ in lines for point in points] or [0] for i in (0, 1))
    left, top, right, bottom = 60, 20, width - 20, height - 40 - 16 * ((len(lines) + 1) // 2)
    x1, y1 = max(*xs, 1), max(*ys, min(ys) + 1e-9)
    y0 = 0 if 0 <= min(ys) < y1 / 4 else min(ys)
    px = lambda x: round(left + (right - left) * x / x1, 1)
    py = lambda y: round(bottom - (bottom - top) * (y - y0) / (y1 - y0), 1)

    def tag(name, text=None, **attributes):
        inside = " ".join(f'{key.replace("_", "-")}="{value}"' for key, value in attributes.items())
        return f"<{name} {inside}/>" if text is None else f"<{name} {inside}>{html.escape(text)}</{name}>"

    out = [tag("rect", width=width, height=height, fill="white"), tag("text", "loss, by step", x=left, y=14)]
    for i in range(5):                                         # the grid
        x, y = x1 * i / 4, y0 + (y1 - y0) * i / 4
        out.append(tag("line", x1=left, x2=right, y1=py(y), y2=py(y), stroke="#ddd"))
        out.append(tag("text", f"{y:.3g}", x=left - 6, y=py(y) + 4, text_anchor="end"))
        out.append(tag("text", f"{x:,.0f}", x=px(x), y=bottom + 18, text_anchor="middle"))
    for i, (colour, label, points, val) in enumerate(lines):
        stroke = {"stroke": colour, "stroke_width": 2.5 if val else 1}
        out.append(tag("polyline", points=" ".join(f"{px(x)},{py(y)}" for x, y in points), fill="none", **stroke))
        out += [tag("circle", cx=px(x), cy=py(y), r=3.5, fill=colour) for x, y in points if val]
        x, y = left + i % 2 * (right - left) // 2, bottom + 40 + 16 * (i // 2)       # the legend, in two columns
        out += [tag("line", x1=x, x2=x + 22, y1=y - 4, y2=y - 4, **stroke), tag("text", label, x=x + 28, y=y)]
    return tag("svg", "@", xmlns="http://www.w3.org/2000/svg", width=width, height=height, font_family="sans-serif",
               font_size=12).replace("@", "\n".join(["", *out, ""])) + "\n"


def main(argv):
    runs = {folder.rstrip("/"): read(folder) for folder in argv}
    for folder, records in runs.items():
        if not records:
            raise ValueError(f"{folder}: no metrics.jsonl there, or nothing in it")
    print(table(runs))
    picture = Path(argv[0]) / "curves.svg"
    picture.write_text(curves(runs))
    print(f"\ncurves: {picture}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    configs.run(main, sys.argv[1:])
