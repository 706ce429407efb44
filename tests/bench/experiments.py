"""Each experiment beside the default, on the embedded task: the table of docs/experiments.md.

    python tests/bench/experiments.py                                 all of experiments/, 300 steps each
    python tests/bench/experiments.py by_loss lion --steps 1000       these, and the default
    python tests/bench/experiments.py --seeds 3                       seeds 0, 1 and 2: means and ranges
    python tests/bench/experiments.py batch_size=16                   words with a "=" are added to every command

Every run fine-tunes data/base with configs/ft.yaml on one rank, so that it starts from the same weights and, with the
default sampler, sees the same documents. The schedule ends with the last step.
"""
import argparse, ast, datetime, json, os, platform, subprocess, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# words that an experiment's command needs to show what it does, such as a learning rate
OPTIONS = {
    "clipped": ["grad_clip=0.5"],
}
HEADER = """# Experiments

What each file of [experiments/](../experiments) does to the embedded task: `configs/ft.yaml`, {steps} steps, {seeds}.
Differences to the default are in parentheses. nll is the validation loss, in nats per target token, as plain cross
entropy whatever the loss of the training; exact_match is the share of validation chats that are answered exactly, of
300 or of `eval_prompts`. A short run of a small model says whether an idea works at all, not whether it is a good one.
All start from data/base, which has never seen a chat. So distill, whose reference it is, and dpo, which expects a model
that answers already, do not learn to answer here; their files have the commands for what they are meant for.

{machine}. Made by `python tests/bench/experiments.py {words}`.

| experiment | what it changes | command | nll | exact_match |
|---|---|---|---|---|
"""


def names():
    return sorted(path.stem for path in (ROOT / "experiments").glob("*.py") if path.stem != "__init__")


def first_line(name):
    """The first line of an experiment's docstring."""
    text = (ROOT / "experiments" / f"{name}.py").read_text()
    return ast.get_docstring(ast.parse(text)).splitlines()[0]


def command_of(name):
    script = ["train.py"] if name == "default" else ["-m", f"experiments.{name}"]
    return [*script, "configs/ft.yaml", *OPTIONS.get(name, [])]


def run(name, steps, seed, out, more):
    """Returns {"nll", "exact_match"} after the last step, or a line that says why there is none."""
    words = [f"max_steps={steps}", "epochs=0", f"seed={seed}", f"eval_every={steps}", "save_every=0", "samples=0",
             "checkpoint.export=false", f"out_dir={out}", *more]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", *command_of(name), *words], cwd=ROOT,
                          capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error: " in line] or done.stderr.splitlines()[-1:]
        return errors[0]
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if "val/chats/loss" in record][-1]
    assert last["step"] == steps, last
    return {"nll": last.get("val/chats/nll", last["val/chats/loss"]), "exact_match": last["val/chats/exact_match"]}


def cell(results, default, key, digits):
    """The mean over seeds, its range, and the difference to the default."""
    values = [result[key] for result in results]
    mean = sum(values) / len(values)
    text = f"{mean:.{digits}f}"
    if len(values) > 1:
        text += f", {min(values):.{digits}f} to {max(values):.{digits}f}"
    if results is not default:
        text += f" ({mean - sum(result[key] for result in default) / len(default):+.{digits}f})"
    return text


def table(results):
    """{name: [result of each seed]} -> the rows of the table."""
    default = results["default"]
    rows = []
    for name, of_seeds in results.items():
        title = "nothing: train.py" if name == "default" else first_line(name)
        link = name if name == "default" else f"[{name}](../experiments/{name}.py)"
        command = " ".join(["torchrun", *command_of(name)])
        errors = [result for result in of_seeds if isinstance(result, str)]
        if errors:
            figures = [f"failed: {errors[0]}", ""]
        else:
            figures = [cell(of_seeds, default, "nll", 4), cell(of_seeds, default, "exact_match", 3)]
        rows.append(f"| {' | '.join([link, title, f'`{command}`', *figures])} |")
    return "\n".join(rows) + "\n"


def machine():
    """A line: the date, the commit, the processor and the number of cores, the version of torch."""
    import torch
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
    changed = subprocess.check_output([*git, "status", "--porcelain", "--untracked-files=no"], text=True).strip()
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = models[0].split(":")[1].strip() if models else processor
    device = f"{processor}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    commit += " with changes" if changed else ""
    return f"{datetime.date.today()}, commit {commit}, {device}, torch {torch.__version__}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="files of experiments/ without .py (all, if none is given); KEY=VALUE")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "experiments.md")
    args = parser.parse_args()
    more = [word for word in args.words if "=" in word]
    chosen = [word for word in args.words if "=" not in word] or names()
    unknown = set(chosen) - set(names())
    if unknown:
        parser.error(f"not in experiments/: {', '.join(sorted(unknown))}")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ["default", *chosen]:
            results[name] = []
            for seed in range(args.seeds):
                out = Path(folder) / f"{name}-{seed}"
                results[name].append(run(name, args.steps, seed, out, more))
                print(name, seed, results[name][-1], flush=True)
    if any(isinstance(result, str) for result in results["default"]):
        sys.exit("the default run failed")
    seeds = "seed 0" if args.seeds == 1 else f"mean and range of seeds 0 to {args.seeds - 1}"
    words = " ".join([*args.words, f"--steps {args.steps}", f"--seeds {args.seeds}"])
    header = HEADER.format(steps=args.steps, seeds=seeds, machine=machine(), words=words)
    args.out.write_text(header + table(results))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
