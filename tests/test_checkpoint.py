"""checkpoint.py: a checkpoint exists whole or not at all (law 4)."""
import json, os, pickle, random, signal, subprocess, sys, time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoint, configs, model as M, train


@pytest.fixture
def finished(tiny):
    loaded = tiny("max_steps=6", "save_every=2", "checkpoint.keep=9", "eval_every=0")
    train.main(*loaded)
    return Path(loaded[0]["out_dir"]), loaded


def test_kill_9_at_any_moment_leaves_whole_checkpoints(tmp_path):
    """A process that does nothing but save is killed at random moments; what bears a final name must verify."""
    code = ("import sys, torch, checkpoint\n"
            "model = torch.nn.Linear(300_000, 1, bias=False)\n"
            "torch.nn.init.ones_(model.weight)\n"
            "optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)\n"
            "model(torch.ones(300_000)).backward()\n"
            "optimizer.step()\n"
            "print('go', flush=True)\n"
            "step, saver = int(sys.argv[2]), checkpoint.Saver(sys.argv[1], 2, print)\n"
            "while True:\n"
            "    step += 1\n"
            "    saver.save(step, model, optimizer, {}, {'total_steps': 0, 'versions': {'torch': ''}})\n")
    rng, step = random.Random(0), 0
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "-c", code, tmp_path, str(step)], cwd=configs.HERE.parent,
                                   stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(rng.uniform(0.01, 0.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        whole = checkpoint.found(tmp_path)
        for folder in whole:
            state = checkpoint.verified(folder)
            assert len(state["checksums"]) == 3 and load_file(folder / "model.safetensors")["weight"].sum() == 300_000
        if whole:
            assert (tmp_path / "checkpoints" / "latest" / "state.json").is_file() and state["step"] >= step
            step = state["step"]
    assert step > 0


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_named_and_never_half_loaded(finished, damage):
    out, loaded = finished
    path = out / "checkpoints" / "00000006" / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    do = {"flip": lambda: path.write_bytes(content), "truncate": lambda: path.write_bytes(content[:1000]),
          "remove": path.unlink}
    do[damage]()
    with pytest.raises(ValueError) as e:
        train.main(*loaded)
    said = str(e.value)
    assert str(path) in said and "damaged" in said and "resume=" in said and "\n" not in said
    mend = said.split("resume=")[1].split(" ")[0]
    assert mend.endswith("00000004")
    train.main(*configs.load([*(f"{k}={v}" for k, v in configs.flat(loaded[2]).items()), f"resume={mend}"]))
    assert checkpoint.verified(out / "checkpoints" / "00000006")["step"] == 6


@pytest.mark.parametrize("text", ["{}", "[]", "", '{"step": 6}', None])
def test_a_damaged_state_is_named_too(finished, script, text):
    out, loaded = finished
    path = out / "checkpoints" / "00000006" / "state.json"
    path.write_text(path.read_text().replace('"step": 6', '"step": 7') if text is None else text)
    with pytest.raises(ValueError, match="state.json.*damaged.*resume=.*00000004"):
        train.main(*loaded)
    listing = script("checkpoint.py", "ls", out)
    assert listing.returncode == 0 and "damaged" in listing.stdout and "step 4 of 6" in listing.stdout


def test_what_a_killed_process_left_is_no_checkpoint_and_goes(finished):
    out, loaded = finished
    for left in (".00000007.building", ".00000002.old"):
        (out / "checkpoints" / left).mkdir()
        (out / "checkpoints" / left / "state.json").write_text("{}")
    assert [p.name for p in checkpoint.found(out)] == ["00000002", "00000004", "00000006"]
    train.main(*loaded)
    assert not list((out / "checkpoints").glob(".*"))


def test_a_checkpoint_whose_shapes_dont_fit_is_refused(finished, tiny):
    out, loaded = finished
    other = tiny("max_steps=6", "eval_every=0", "model.d_ff=192", f"resume={out}/checkpoints/00000004", out="other")
    with pytest.raises(ValueError) as e:
        train.main(*other)
    for words in ("doesn't fit", "blocks.0.mlp.up.weight is [256, 32]", "[384, 32]"):
        assert words in str(e.value)


def test_a_planted_pickle_is_not_run(finished):
    out, _ = finished
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {out}/boom",)
    path = out / "checkpoints" / "00000006" / "model.safetensors"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.verified(path.parent)
    assert not (out / "boom").exists()


def test_a_full_disk_keeps_the_run_and_the_older_checkpoints(finished, tiny, monkeypatch, capsys):
    loaded = tiny("max_steps=6", "save_every=2", "eval_every=0", out="full")
    real, calls = checkpoint.put, []
    def full(*args):
        calls.append(args)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return real(*args)
    monkeypatch.setattr(checkpoint, "put", full)
    with pytest.raises(ValueError, match="last steps were not saved"):
        train.main(*loaded)
    out = Path(loaded[0]["out_dir"])
    assert [p.name for p in checkpoint.found(out)] == ["00000002"] and "No space left" in capsys.readouterr().out
    assert not list((out / "checkpoints").glob(".*.building"))       # what is left of one would keep the disk full
    monkeypatch.setattr(checkpoint, "put", lambda *args: full(*args) if len(calls) < 9 else real(*args))
    del calls[1:]
    calls += [None] * 6                                              # steps 4 and 6 again, and only then is there room
    train.main(*loaded)
    assert [p.name for p in checkpoint.found(out)] == ["00000002", "00000006"]


def test_every_file_of_a_checkpoint_is_on_the_disk_before_it_bears_its_name(tiny, monkeypatch):
    loaded, synced, real = tiny("max_steps=2", "eval_every=0", out="synced"), set(), checkpoint.sync
    monkeypatch.setattr(checkpoint, "sync", lambda path: (synced.add(Path(path).name), real(path)))
    train.main(*loaded)
    assert {p.name for p in checkpoint.found(loaded[0]["out_dir"])[-1].iterdir()} <= synced


@pytest.mark.parametrize("state", [
    lambda p: torch.ones(p.shape[:1]),
    lambda p: torch.full(p.shape, 7, dtype=torch.int32),
    lambda p: torch.ones(p.shape, dtype=torch.bfloat16)])
def test_whatever_an_optimizer_keeps_comes_back_as_it_was(tiny, tmp_path, state):
    class Odd(torch.optim.SGD):
        def step(self):
            super().step()
            for p in (p for group in self.param_groups for p in group["params"]):
                self.state[p]["kept"] = state(p)
    model = M.build(tiny()[0]["model"] | {"vocab_size": 50})
    optimizer = Odd(model.parameters(), lr=0.1)
    optimizer.step()
    saver = checkpoint.Saver(tmp_path, 1, print)
    saver.save(3, model, optimizer, {}, {"total_steps": 3})
    assert saver.wait()
    fresh = M.build(model.cfg, seed=1)
    again = Odd(fresh.parameters(), lr=0.1)
    assert checkpoint.restore(tmp_path / "checkpoints" / "latest", fresh, again)[0]["step"] == 3
    for p, q in zip(model.parameters(), fresh.parameters()):
        kept, back = optimizer.state[p]["kept"], again.state[q]["kept"]
        assert torch.equal(p, q) and torch.equal(kept, back) and kept.dtype == back.dtype


def test_an_error_in_the_background_is_told_and_not_called_saved(tmp_path, capsys):
    model = M.build(configs.load(["model.n_layers=1", "model.vocab_size=9"])[0]["model"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.embed.weight]["odd"] = torch.ones(2, dtype=torch.complex64)
    saver = checkpoint.Saver(tmp_path, 1, print)
    saver.save(1, model, optimizer, {}, {})
    assert not saver.wait() and "complex64" in capsys.readouterr().out and not checkpoint.found(tmp_path)


def test_ls_and_export(finished, script, tmp_path):
    out, _ = finished
    lines = script("checkpoint.py", "ls", out).stdout.splitlines()
    assert [line.split()[2] for line in lines] == ["2", "4", "6"] and lines[-1].endswith("latest")
    for what, folder in ((out, "newest"), (out / "checkpoints" / "00000002", "early")):
        assert script("checkpoint.py", "export", what, tmp_path / folder).returncode == 0
        assert (tmp_path / folder / "model.safetensors").is_file() and (tmp_path / folder / "tokenizer.json").is_file()
    again = script("checkpoint.py", "export", out, tmp_path / "early")
    assert again.returncode == 1 and "not empty" in again.stderr and again.stderr.count("\n") == 1
    (tmp_path / "file").write_text("")
    for args in (["ls"], ["list", out], ["export", out], ["export", tmp_path, tmp_path / "x"],
                 ["export", out, tmp_path / "file"]):
        wrong = script("checkpoint.py", *args)
        assert wrong.returncode == 1 and wrong.stderr.startswith("error: ") and wrong.stderr.count("\n") == 1


def test_killed_again_and_again_a_run_is_the_run_that_was_not(script):
    """tests/bench/crash.py, its quick form."""
    done = script("tests/bench/crash.py", "--kills", "6")
    result = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and result["kills"] == 6 and not result["problems"], done.stdout + done.stderr
