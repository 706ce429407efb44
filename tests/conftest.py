"""Shared by the tests: where real inputs are, how a script is run, and a run small enough for seconds."""
import importlib, json, os, signal, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("GOMP_SPINCOUNT", "5000")                        # as train.py does, before torch is loaded
# Models this small take 1.6 times the processor seconds with two threads, and ten times on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

import configs, launch

signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background jobs ignore it

REALDATA = Path(os.environ.get("REALDATA", ROOT.parent / "shared" / "realdata"))


def pytest_configure(config):
    config.addinivalue_line("markers", "release: checks the published text (the README's numbers and "
                                       "tables); skipped unless the environment variable CI is set")


def pytest_collection_modifyitems(items):
    """Skip the release tests outside of CI, so that an edited checkout stays green."""
    if os.environ.get("CI"):
        return
    for item in items:
        if item.get_closest_marker("release"):
            item.add_marker(pytest.mark.skip(reason="checks the published text; run with CI=true"))


@pytest.fixture(autouse=True)
def signal_handlers():
    """Restore the handlers that a script has set: they would end pytest without its summary."""
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def realdata():
    """Public texts, chats, tokenizers and a trained checkpoint that are not part of the project."""
    if not REALDATA.is_dir():
        pytest.skip(f"needs the folder of real inputs at {REALDATA} (or at $REALDATA)")
    return REALDATA


@pytest.fixture(scope="session")
def script():
    """script("model.py", "data/base") -> the finished process, its output as text.

    The first word may also be "torchrun", or an option of Python.
    """
    def call(*args, cwd=ROOT, timeout=300, **env):
        command = ["-m", "torch.distributed.run", *args[1:]] if args[0] == "torchrun" else args
        if str(command[0]) in ("-c", "-X"):                            # about what is imported
            return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=os.environ | env,
                                  capture_output=True, text=True, timeout=timeout)
        done, = launch.run(command, cwd, timeout, **env)
        return done
    return call


@pytest.fixture
def experiment(monkeypatch):
    """experiment(name) -> its module, for one test: what it registers and replaces is restored."""
    import model, sampler, tokenize_data, train
    for script, names in ((model, ("LOSSES", "EMBEDDINGS", "SCORE_MODS", "TOKEN_STATS")), (sampler, ("SAMPLERS",)),
                          (train, ("OPTIMIZERS", "EVALUATIONS"))):
        for name in names:
            monkeypatch.setattr(script, name, dict(getattr(script, name)))
    for script, name in ((train, "forward_backward"), (train, "train"), (tokenize_data, "encode_record"),
                         (tokenize_data, "FORMAT")):
        monkeypatch.setattr(script, name, getattr(script, name))
    loaded = []

    def load(name):
        loaded.append(f"experiments.{name}")
        return importlib.import_module(loaded[-1])
    yield load
    for name in loaded:                     # a run's code includes all modules that are loaded
        del sys.modules[name]


WORDS = "red green blue black white brown pink grey gold lime navy teal rust sand plum mint".split()


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    """A .jsonl of 40 chats of uneven length, some of several turns."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    lines = []
    for i in range(40):
        turns = []
        for t in range(1 + i % 3):
            asked = " ".join(WORDS[(i + j) % len(WORDS)] for j in range(1 + (i * 7 + t) % 9))
            turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": asked.upper()[:12]}]
        lines.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def tiny(tmp_path, chats):
    """tiny("lr=1e-2") -> (cfg, source, explicit) of a two-block model on the 40 chats: 10 steps an epoch, 25 in all."""
    def load(*more, out="run"):
        return configs.load([
            f"data.train.chats.path={chats}", "data.validation_split=4", "data.tokenizer=bytes",
            f"data.cache_dir={tmp_path / 'tokens'}", f"out_dir={tmp_path / out}",
            "model.n_layers=2", "model.d_model=32", "model.n_heads=4", "model.n_kv_heads=2",
            "batch_size=4", "micro_tokens=400", "max_steps=25", "epochs=0",
            "log_every=1", "eval_every=10", "save_every=0", "eval_tokens=8", "eval_prompts=4", "eval_share=0",
            "lr=1e-2", "dtype=float32", "samples=0", "checkpoint.export=false", *more])
    return load
