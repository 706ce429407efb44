"""A run killed with SIGKILL many times at random moments, also during saves, ends like an uninterrupted one.

    python tests/bench/crash.py --kills 200

A small model is trained on the embedded chats and saved at every third step. After each kill, every checkpoint with a
final name must verify, and the newest must not be older than before. At the end, losses, gradient norms and learning
rates of all steps and the final weights must be bitwise those of a run that was not killed. Each start is a fork of a
process that has already loaded torch. Prints a summary and one line of JSON; exits with 1 if a check failed.
"""
import argparse, json, os, random, signal, sys, tempfile, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
import checkpoint, configs, log, train

ROOT = Path(__file__).resolve().parents[2]


def start(argv):
    """Call train.main in a fork without its output; return the pid."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        cfg, _, explicit = configs.load(argv)
        train.main(cfg, explicit)
    except BaseException as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--steps", type=int, default=None, help="of the run; left out: ten for each kill")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    steps, rng = args.steps or 10 * args.kills, random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        keys = [f"data.train.chats.path={ROOT / 'data' / 'chats_val.jsonl'}", "data.tokenizer=bytes",
                f"data.cache_dir={folder}/tokens", "model.n_layers=2", "model.d_model=32", "batch_size=2",
                f"max_steps={steps}", "epochs=0", "log_every=1", "eval_every=0", "save_every=3", "dtype=float32",
                "checkpoint.export=false"]
        argv = lambda out: [*keys, f"out_dir={folder}/{out}"]
        begun = time.perf_counter()
        assert os.waitpid(start(argv("whole")), 0)[1] == 0
        took = time.perf_counter() - begun
        assert os.waitpid(start(argv("whole")), 0)[1] == 0           # it is finished: this is only the start-up time
        up = time.perf_counter() - begun - took
        each = (took - up) / steps
        lost, newest, kills, inside, problems = 0, 0, 0, 0, []
        out = Path(folder) / "killed"
        while kills < args.kills and not problems:
            pid, until, done = start(argv("killed")), newest + rng.randint(0, 9), False
            logged = lambda: max((r["step"] for r in log.read(out)), default=0)
            # wait for a number of logged steps, not for a time: other processes may slow it down
            while not done and logged() < until:
                time.sleep(0.2 * each)
                done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                problems.append(f"the run ended by itself, with status {status}")
                break
            time.sleep(rng.uniform(0, 3 * each) if until > newest else rng.uniform(0, up))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            kills += 1
            inside += bool(list((out / "checkpoints").glob(".*.building")))
            try:
                steps_found = [checkpoint.verify(path)["step"] for path in checkpoint.list_checkpoints(out)]
            except configs.UserError as e:
                problems.append(str(e))
                break
            now = max(steps_found, default=0)
            if now < newest:
                problems.append(f"the newest checkpoint went from step {newest} back to {now}")
            lost, newest = max(lost, logged() - now), now
        early = newest
        if not problems and os.waitpid(start(argv("killed")), 0)[1]:
            problems.append("the run could not be ended")
        if not problems:
            of = lambda name: [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in log.read(Path(folder) / name)]
            last = [checkpoint.list_checkpoints(Path(folder) / name)[-1] for name in ("whole", "killed")]
            weights = [(path / "model.safetensors").read_bytes() for path in last]
            problems += [] if of("whole") == of("killed") and len(of("whole")) == steps else ["the records differ"]
            problems += [] if weights[0] == weights[1] else ["the final weights differ"]
    result = {"kills": kills, "inside_a_save": inside, "steps": steps, "killed_until": early, "most_lost": lost,
              "problems": problems, "seconds": round(time.perf_counter() - begun)}
    print(f"{kills} kills, {inside} of them inside a save, in the first {early:,} of {steps:,} steps; "
          f"at most {lost} logged steps were done again; "
          f"{'; '.join(problems) or 'records and final weights are those of the run that was not killed'}")
    print(json.dumps(result))
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
