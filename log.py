"""What a run tells: an aligned line on the console and a record in metrics.jsonl for each logged step.

    python log.py out/a out/b          compare runs: a table, and their curves in out/a/curves.svg

Also wandb, mlflow or tensorboard, where log.to names them and they are installed. A number is null where it is not
known; the README's table says what each one is. Values that live on a device are read when the next record comes, so
that logging never makes the device wait.
"""
import json, math, sys, time
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


def clock(seconds):
    return f"{seconds // 3600:.0f}:{seconds % 3600 // 60:02.0f}:{seconds % 60:02.0f}" if seconds >= 3600 else f"{seconds // 60:.0f}:{seconds % 60:02.0f}"


class Log:
    """A run's console and metrics.jsonl. `resumed` is the step a run goes on from: later records, of steps done again, go."""

    def __init__(self, cfg, total_steps, resumed=0):
        self.path, self.total, self.pending = Path(cfg["out_dir"]) / "metrics.jsonl", total_steps, None
        if strange := [name for name in cfg["log"]["to"] if name not in PLACES]:
            raise ValueError(f"log.to: {strange[0]} is none of {', '.join(PLACES)}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        old = [r for r in read(self.path.parent) if r["step"] <= resumed] if resumed else []
        self.path.write_text("".join(json.dumps(r) + "\n" for r in old))
        self.file = open(self.path, "a", buffering=1)
        self.places = []
        for name in cfg["log"]["to"]:
            try:
                self.places.append(PLACES[name](cfg, self.path.parent))
            except ImportError:
                raise ValueError(f"log.to: {name} is not installed; pip install {name}") from None
        self.start, self.first = time.perf_counter(), resumed

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
        step, done = record["step"], record["step"] - self.first
        left = (time.perf_counter() - self.start) / done * (self.total - step)
        show = lambda key, form: "-" if record[key] is None else format(record[key], form)
        mfu = f"  mfu {record['mfu']:.1%}" if record["mfu"] is not None else ""
        print(f"step {step:>{len(f'{self.total:,}')},}/{self.total:,}  loss {show('loss', '7.4f')}  lr {record['lr']:.2e}  norm {show('grad_norm', '6.3f')}"
              f"  {show('tok_per_s', '9,.0f')} tok/s{mfu}  {step / self.total:4.0%}  {clock(left)} left", flush=True)

    def validation(self, record):
        """{"step", "val/LABEL/loss", "val/LABEL/exact_match"}: written, and shown."""
        self.flush()
        record = self.write(record)
        parts = [f"{key.removeprefix('val/').replace('/', ' ')} {'-' if value is None else format(value, '.4f' if key.endswith('loss') else '.3f')}"
                 for key, value in record.items() if key.startswith("val/")]
        print(f"step {record['step']:>{len(f'{self.total:,}')},}/{self.total:,}  validation: {'   '.join(parts)}", flush=True)

    def write(self, record):
        record = {key: number(value) for key, value in record.items()}
        self.file.write(json.dumps(record, allow_nan=False) + "\n")
        for place in self.places:
            place(record)
        return record

    def close(self):
        self.flush()
        self.file.close()


# ---------------------------------------------------------------------------------------------------------------------
# afterwards

def read(folder):
    """A run's records; a last line that was cut off by the end of the process is left out."""
    path, records = Path(folder) / "metrics.jsonl", []
    lines = path.read_text().splitlines() if path.is_file() else []
    for n, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if n < len(lines):
                raise ValueError(f"{path}, line {n}: not valid JSON") from None
    return records


def table(runs):
    """{name: records} -> text: a row per run with its last figures."""
    vals = sorted({key for records in runs.values() for r in records for key in r if key.startswith("val/")})
    last = lambda records, key: next((r[key] for r in reversed(records) if r.get(key) is not None), None)
    rows = [["run", "step", "loss", *[v.removeprefix("val/") for v in vals], "tok/s", "time", "loss, from first to last"]]
    for name, records in runs.items():
        steps = [r for r in records if "loss" in r]
        speeds = sorted(r["tok_per_s"] for r in steps if r.get("tok_per_s"))
        figures = [last(records, key) for key in ["loss", *vals]]
        rows.append([name, f"{last(records, 'step') or 0:,}", *["-" if f is None else f"{f:.4f}" for f in figures],
                     f"{speeds[len(speeds) // 2]:,.0f}" if speeds else "-", clock(last(records, "seconds") or 0), spark([r["loss"] for r in steps])])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:<{w}}" if i in (0, len(row) - 1) else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths))).rstrip() for row in rows)


def spark(values, width=32):
    """Numbers as a line of bars, averaged down to `width`."""
    values = [v for v in values if v is not None]
    if not values:
        return ""
    groups = [values[i * len(values) // width:max((i + 1) * len(values) // width, i * len(values) // width + 1)] for i in range(min(width, len(values)))] \
        if len(values) > width else [[v] for v in values]
    means = [sum(g) / len(g) for g in groups]
    low, high = min(means), max(means)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (m - low) / (high - low)) if high > low else 0] for m in means)


COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")


def curves(runs, width=860, height=420):
    """{name: records} -> an SVG picture: training loss as thin lines, validation loss as thick ones with dots, by step."""
    lines = []                                                       # (run's number, label, points, is it validation)
    for n, (name, records) in enumerate(runs.items()):
        keys = ["loss", *sorted({k for r in records for k in r if k.startswith("val/") and k.endswith("/loss")})]
        for key in keys:
            if points := [(r["step"], r[key]) for r in records if r.get(key) is not None]:
                lines.append((n, name if key == "loss" else f"{name} {key.removesuffix('/loss')}", points, key != "loss"))
    xs, ys = ([p[i] for _, _, points, _ in lines for p in points] or [0] for i in (0, 1))
    left, top, right, bottom = 60, 20, width - 20, height - 40 - 16 * ((len(lines) + 1) // 2)
    x1, y0, y1 = max(max(xs), 1), min(ys), max(max(ys), min(ys) + 1e-9)
    px = lambda x: left + (right - left) * x / x1
    py = lambda y: bottom - (bottom - top) * (y - y0) / (y1 - y0)
    escape = lambda s: s.replace("&", "&amp;").replace("<", "&lt;")
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="12">',
           f'<rect width="{width}" height="{height}" fill="white"/>']
    for i in range(5):
        y, x = y0 + (y1 - y0) * i / 4, x1 * i / 4
        out += [f'<line x1="{left}" x2="{right}" y1="{py(y):.1f}" y2="{py(y):.1f}" stroke="#ddd"/>', f'<text x="{left - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{y:.3g}</text>',
                f'<text x="{px(x):.1f}" y="{bottom + 18}" text-anchor="middle">{x:,.0f}</text>']
    for i, (n, label, points, val) in enumerate(lines):
        colour, path = COLOURS[n % len(COLOURS)], " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{2.5 if val else 1}" opacity="{1 if val else .6}"/>')
        out += [f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="3.5" fill="{colour}"/>' for x, y in points] if val else []
        x, y = left + (i % 2) * (right - left) // 2, bottom + 40 + 16 * (i // 2)
        out += [f'<line x1="{x}" x2="{x + 22}" y1="{y - 4}" y2="{y - 4}" stroke="{colour}" stroke-width="{2.5 if val else 1}"/>', f'<text x="{x + 28}" y="{y}">{escape(label)}</text>']
    return "\n".join([*out, f'<text x="{left}" y="14">loss, by step</text>', "</svg>"]) + "\n"


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
