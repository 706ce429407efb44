"""checkpoint.py: a checkpoint exists complete or not at all (guarantee 4); runs are not mixed (8).

This file is also what the ranks of its tests run: tests/test_checkpoint.py JOB FOLDER
"""
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import configs
import hub
import launch
import log
import model as M
import shard
import tokenize_data

ROOT = configs.HERE.parent
STATE = {"step": 3, "total_steps": 6, "dtype": "float32", "code": {"model.py": "1"}, "data": {},
         "has_chats": True, "versions": {"torch": "", "python": ""}}


BF16 = ["dtype=bfloat16", "shard.master_dtype=bfloat16", "shard.moment_dtype=bfloat16"]


# --------------------------------------------------------------------------------------------------
# what a rank runs

class Factored(torch.optim.SGD):
    """Keeps one number per row of a matrix, a full moment in bf16, and two kinds of counters."""

    def __init__(self, params):
        super().__init__(params, lr=0.1)
        for p in (p for group in self.param_groups for p in group["params"]):
            rows = p.detach().square()
            self.state[p] = {"step": 7, "ratio": 0.1, "rows": rows,
                             "scale": torch.full((), 0.5), "moment": p.detach().to(torch.bfloat16)}
            if p.dim() == 2:
                self.state[p]["rows"] = rows.mean(1, keepdim=True)


def small_model(shards=1):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3))
    if shards > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        fully_shard(model, mesh=init_device_mesh("cpu", (shards,)))
    return model


def save(out_dir, model, optimizer, step=3, sampler_state={}, **state):
    saver = checkpoint.Saver(out_dir, 9, print)
    saver.save(model, optimizer, sampler_state, STATE | {"step": step} | state)
    return saver.wait()


def move_sharded(folder):
    """Save a factored optimizer's state from two shards; load it, and what one rank saved."""
    model = small_model(shards=2)
    optimizer = Factored(model.parameters())
    checkpoint.check_optimizer_state(optimizer, model)
    assert save(f"{folder}/two", model, optimizer)
    load_sharded(f"{folder}/one")
    load_sharded(f"{folder}/two")
    # a plain tensor of this rank's rows: that it is not the whole is not known
    optimizer.state[model.get_parameter("0.weight")]["rows"] = torch.ones(3, 1)
    with pytest.raises(configs.UserError, match="'rows' of 0.weight .*sharded.*shard.mesh.shard=1"):
        checkpoint.check_optimizer_state(optimizer, model)


def load_sharded(folder):
    model = small_model(shards=2)
    optimizer = Factored(model.parameters())
    expected = {name: shard.full_tensor(p).clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            for t in (p, optimizer.state[p]["rows"], optimizer.state[p]["scale"]):
                t.zero_()
    checkpoint.load_checkpoint(Path(folder) / "checkpoints" / "latest", model, optimizer)
    for name, p in model.named_parameters():
        rows = shard.full_tensor(optimizer.state[p]["rows"])
        squares = expected[name].square()
        assert torch.equal(shard.full_tensor(p), expected[name])
        assert torch.equal(rows, squares.mean(1, keepdim=True) if p.dim() == 2 else squares)
        assert optimizer.state[p]["scale"] == 0.5


def fail_on_rank_1(folder):
    """In each stage of a save in turn; the error must reach rank 0, and the next save works."""
    model = small_model()
    optimizer = Factored(model.parameters())
    warnings = []
    saver = checkpoint.Saver(folder, 9, warnings.append)

    def full_disk(*args):
        raise OSError(28, "No space left on device")
    for step, (stage, failing_rank) in enumerate(
            [("write_shards", 1), ("create_files", 0), ("commit", 0)], 1):
        real = getattr(checkpoint, stage)
        if shard.rank() == failing_rank:
            setattr(checkpoint, stage, full_disk)
        saver.save(model, optimizer, {}, STATE | {"step": step})
        assert not saver.wait()
        assert len(warnings) == step and f"rank {failing_rank}, OSError" in warnings[-1]
        setattr(checkpoint, stage, real)
    saver.save(model, optimizer, {}, STATE | {"step": 4})
    assert saver.wait() and len(warnings) == 3
    assert [p.name for p in checkpoint.list_checkpoints(folder)] == ["00000004"]


if __name__ == "__main__":
    shard.run_distributed(lambda cfg, job, folder: globals()[job](folder),
                          {"device": "cpu", "dtype": "float32"}, *sys.argv[1:])


def on_two_ranks(job, folder):
    for done in launch.run_ranks(2, ["tests/test_checkpoint.py", job, folder]):
        assert done.returncode == 0, done.stdout + done.stderr


# --------------------------------------------------------------------------------------------------
# write

@pytest.fixture
def finished(tiny):
    """A finished run of six steps with checkpoints at 2, 4 and 6: (out_dir, loaded config)."""
    loaded = tiny("max_steps=6", "save_every=2", "checkpoint.keep=9", "eval_every=0")
    run(loaded)
    return Path(loaded[0]["out_dir"]), loaded


def run(loaded):
    import train
    cfg, _, explicit = loaded
    train.main(cfg, explicit)


def again(loaded, *more):
    """A loaded config once more, with other keys."""
    return configs.load([*(f"{k}={v}" for k, v in configs.flat(loaded[2]).items()), *more])


def test_saver_killed_at_any_moment_leaves_complete_checkpoints(tmp_path):
    """A process that only saves is killed at random moments; what has its final name verifies."""
    code = ("import os, sys, torch, checkpoint\n"
            "torch.set_num_threads(1)\n"                # forks have no threads
            "model = torch.nn.Linear(300_000, 1, bias=False)\n"
            "torch.nn.init.ones_(model.weight)\n"
            "optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)\n"
            "model(torch.ones(300_000)).backward()\n"
            "optimizer.step()\n"
            "for step in map(int, sys.stdin):\n"
            "    pid = os.fork()\n"
            "    if pid > 0:\n"
            "        print(pid, flush=True)\n"
            "        os.wait()\n"
            "        print('killed', flush=True)\n"
            "        continue\n"
            "    saver = checkpoint.Saver(sys.argv[1], 2, print)\n"
            "    while True:\n"
            "        step += 1\n"
            "        saver.save(model, optimizer, {}, {'step': step})\n")
    rng = random.Random(0)
    step = 0
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    for _ in range(6):
        print(step, file=process.stdin, flush=True)
        pid = int(process.stdout.readline())
        while step == 0 and not checkpoint.list_checkpoints(tmp_path):
            time.sleep(0.01)                             # the first kill follows the first save
        time.sleep(rng.uniform(0.01, 0.2))
        os.kill(pid, signal.SIGKILL)
        assert process.stdout.readline() == "killed\n"
        checkpoints = checkpoint.list_checkpoints(tmp_path)
        for folder in checkpoints:
            state = checkpoint.verify(folder)
            weights = load_file(folder / "model.safetensors")
            assert len(state["checksums"]) == 3 and weights["weight"].sum() == 300_000
        if checkpoints:
            assert (tmp_path / "checkpoints" / "latest" / "state.json").is_file()
            assert state["step"] >= step
            step = state["step"]
    process.stdin.close()
    assert step > 0 and process.wait() == 0


def test_saver_removes_what_a_killed_process_left(finished):
    """Half-written and half-deleted folders are no checkpoints, and the next start removes them."""
    out_dir, loaded = finished
    for name in (".00000007.building", ".00000002.old"):
        (out_dir / "checkpoints" / name).mkdir()
        (out_dir / "checkpoints" / name / "state.json").write_text("{}")
    names = [p.name for p in checkpoint.list_checkpoints(out_dir)]
    assert names == ["00000002", "00000004", "00000006"]
    run(loaded)
    assert not list((out_dir / "checkpoints").glob(".*"))


def test_saver_on_a_full_disk_keeps_the_run_and_older_checkpoints(tiny, monkeypatch, capsys):
    loaded = tiny("max_steps=6", "save_every=2", "eval_every=0", out="full")
    real = checkpoint.write_shards
    calls = []
    free_space_after = 99

    def full_disk(*args):
        calls.append(args)
        if 1 < len(calls) < free_space_after:
            raise OSError(28, "No space left on device")
        return real(*args)
    monkeypatch.setattr(checkpoint, "write_shards", full_disk)
    with pytest.raises(configs.UserError, match="last steps were not saved"):
        run(loaded)
    out_dir = Path(loaded[0]["out_dir"])
    assert [p.name for p in checkpoint.list_checkpoints(out_dir)] == ["00000002"]
    assert "No space left" in capsys.readouterr().out
    assert not list((out_dir / "checkpoints").glob(".*.building"))    # would keep the disk full
    # the same command: steps 4 and 6 fail again, then there is space for the last attempt
    calls = [None]
    free_space_after = 4
    run(loaded)
    assert [p.name for p in checkpoint.list_checkpoints(out_dir)] == ["00000002", "00000006"]


def test_saver_reports_an_error_in_the_thread(tmp_path, capsys):
    model = small_model()
    (tmp_path / "checkpoints").write_text("a file, where a folder should be")
    assert not save(tmp_path, model, Factored(model.parameters()))
    assert "rank 0, NotADirectoryError" in capsys.readouterr().out


def test_saver_exchanges_errors_between_ranks(tmp_path):
    """An error of any rank in any stage ends the save on all ranks; the next one succeeds."""
    on_two_ranks("fail_on_rank_1", tmp_path)


def test_commit_fsyncs_every_file_before_the_rename(tmp_path, monkeypatch):
    synced = set()
    real_fsync = checkpoint.fsync
    real_replace = os.replace

    def fsync(path):
        synced.add(Path(path).name)
        real_fsync(path)

    def replace(source, target):
        if str(source).endswith(".building"):
            assert {p.name for p in Path(source).iterdir()} | {Path(source).name} <= synced
            synced.add("renamed")
        real_replace(source, target)
    monkeypatch.setattr(checkpoint, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    model = small_model()
    assert save(tmp_path, model, Factored(model.parameters()))
    assert "renamed" in synced


def test_commit_keeps_the_newest_and_the_best(tmp_path):
    model = small_model()
    optimizer = Factored(model.parameters())
    saver = checkpoint.Saver(tmp_path, 2, print)

    def names_after(step):
        saver.save(model, optimizer, {}, STATE | {"step": step})
        assert saver.wait()
        return [int(p.name) for p in checkpoint.list_checkpoints(tmp_path)]
    assert names_after(1) == [1] and names_after(2) == [1, 2]
    checkpoint.set_best(tmp_path, [9, 1])
    assert names_after(3) == [1, 2, 3] and names_after(4) == [1, 3, 4]
    checkpoint.set_best(tmp_path, [])
    assert names_after(5) == [4, 5]
    assert not (tmp_path / "checkpoints" / "best").is_symlink()
    assert (tmp_path / "checkpoints" / "latest").resolve().name == "00000005"


def test_delete_later_checkpoints_at_a_resume(stopped):
    out_dir = Path(stopped()["out_dir"])
    for step in (5, 4):
        checkpoint.delete_later_checkpoints(out_dir, step)
        newest = checkpoint.list_checkpoints(out_dir)[-1]
        assert newest.name == ("00000005" if step == 5 else "00000003")
        assert (out_dir / "checkpoints" / "latest").resolve() == newest.resolve()


# --------------------------------------------------------------------------------------------------
# read

@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_verify_names_a_damaged_file_and_another_checkpoint(finished, damage):
    """It is never half loaded, and the run resumes from the checkpoint that the message names."""
    out_dir, loaded = finished
    path = out_dir / "checkpoints" / "00000006" / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[:1000])
    else:
        path.unlink()
    with pytest.raises(configs.UserError) as e:
        run(loaded)
    text = str(e.value)
    assert str(path) in text and "damaged" in text and "resume=" in text and "\n" not in text
    other = text.split("resume=")[1].split(" ")[0]
    assert other.endswith("00000004")
    run(again(loaded, f"resume={other}"))
    assert checkpoint.verify(out_dir / "checkpoints" / "00000006")["step"] == 6


@pytest.mark.parametrize("text", ["{}", "[]", "", '{"step": 6}', None])
def test_read_state_names_a_damaged_state(finished, script, text):
    out_dir, loaded = finished
    path = out_dir / "checkpoints" / "00000006" / "state.json"
    if text is None:
        text = path.read_text().replace('"step": 6', '"step": 7')
    path.write_text(text)
    with pytest.raises(configs.UserError, match="state.json.*damaged.*resume=.*00000004"):
        run(loaded)
    listing = script("checkpoint.py", "ls", out_dir)
    assert listing.returncode == 0
    assert "damaged" in listing.stdout and "4 of 6" in listing.stdout


def test_read_state_refuses_another_format(tmp_path, monkeypatch):
    model = small_model()
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    save(tmp_path, model, Factored(model.parameters()))
    monkeypatch.undo()
    with pytest.raises(configs.UserError, match="format 1, but this version reads"):
        checkpoint.read_state(tmp_path / "checkpoints" / "latest")
    with pytest.raises(configs.UserError, match="no checkpoint here"):
        checkpoint.read_state(tmp_path)


def test_load_checkpoint_refuses_shapes_that_do_not_fit(tmp_path):
    """The message names each tensor with both shapes, and neither model nor optimizer change."""
    model = small_model()
    save(tmp_path, model, Factored(model.parameters()))
    torch.manual_seed(1)
    other = torch.nn.Sequential(torch.nn.Linear(7, 4), torch.nn.Linear(5, 3))
    before = [p.clone() for p in other.parameters()]
    latest = tmp_path / "checkpoints" / "latest"
    with pytest.raises(configs.UserError) as e:
        checkpoint.load_checkpoint(latest, other, Factored(other.parameters()))
    assert "does not fit the model" in str(e.value) and "\n" not in str(e.value)
    assert f"python {tmp_path}/code/checkpoint.py export {latest} DIR exports it" in str(e.value)
    assert "0.weight: F32 [5, 7] in the checkpoint, F32 [4, 7] in the model" in str(e.value)
    # an optimizer that lacks state: the model, which would fit, does not change either
    same = small_model()
    torch.nn.init.zeros_(same[0].weight)
    with pytest.raises(configs.UserError, match="optimizer: 0.bias/moment: .*missing in the optim"):
        checkpoint.load_checkpoint(latest, same, torch.optim.SGD(same.parameters(), lr=0.1))
    assert not same[0].weight.any()
    assert all(torch.equal(p, old) for p, old in zip(other.parameters(), before))


def test_load_checkpoint_does_not_unpickle(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/boom",)
    model = small_model()
    optimizer = Factored(model.parameters())
    save(tmp_path, model, optimizer)
    path = tmp_path / "checkpoints" / "00000003" / "model.safetensors"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(configs.UserError, match="damaged"):
        checkpoint.load_checkpoint(path.parent, model, optimizer)
    assert not (tmp_path / "boom").exists()


def test_load_checkpoint_restores_any_optimizer_state_in_place(tmp_path):
    """Factored moments, bf16, scalars and Python numbers, into the tensors that exist."""
    model = small_model()
    optimizer = Factored(model.parameters())
    assert save(tmp_path, model, optimizer)
    fresh = small_model()
    torch.nn.init.zeros_(fresh[1].weight)
    loaded = Factored(fresh.parameters())
    tensors = {p: dict(loaded.state[p]) for p in fresh.parameters()}
    for p in fresh.parameters():
        loaded.state[p] |= {"step": 0, "ratio": 0.0}
        for key in ("scale", "rows", "moment"):
            loaded.state[p][key].fill_(3)
    latest = tmp_path / "checkpoints" / "latest"
    state, sampler_state = checkpoint.load_checkpoint(latest, fresh, loaded)
    assert state["step"] == 3 and sampler_state == {}
    for p, q in zip(model.parameters(), fresh.parameters()):
        assert torch.equal(p, q)
        assert loaded.state[q]["ratio"] == 0.1 and loaded.state[q]["step"] == 7
        assert type(loaded.state[q]["step"]) is int
        for key in ("scale", "rows", "moment"):
            value = loaded.state[q][key]
            assert value is tensors[q][key]
            assert torch.equal(value, optimizer.state[p][key])


def test_load_checkpoint_returns_the_sampler_state(tmp_path):
    model = small_model()
    optimizer = Factored(model.parameters())
    arrays = {"loss": np.random.default_rng(0).random(9), "seen": np.zeros((0, 3), np.int32),
              "bits": np.arange(4, dtype=np.uint64), "on": np.array(True)}
    assert save(tmp_path, model, optimizer, sampler_state=arrays)
    _, loaded = checkpoint.load_checkpoint(tmp_path / "checkpoints" / "latest", model, optimizer)
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype and np.array_equal(loaded[name], array)


@pytest.mark.parametrize("first, second", [([], BF16), (BF16, []), ([], ["dtype=float16"]), (["dtype=float16"], [])],
                         ids=["to bf16", "from bf16", "to fp16", "from fp16"])
def test_load_checkpoint_converts_weights_and_moments(tiny, first, second):
    """Compute, master and moment dtypes may change in a run that continues in another folder."""
    keys = ["max_steps=4", "save_every=2", "checkpoint.keep=9", "eval_every=0", "schedule=constant", "lr=1e-3"]
    expected = tiny(*keys, out="whole")
    start = tiny(*keys, *first, out="start")
    path = Path(start[0]["out_dir"]) / "checkpoints" / "00000002"
    moved = tiny(*keys, *second, f"resume={path}", out="moved")
    for loaded in (expected, start, moved):
        run(loaded)
    folder = Path(moved[0]["out_dir"]) / "checkpoints" / "00000004"
    name = "blocks.0.attn.q_proj.weight"
    optimizer = load_file(folder / "optimizer.safetensors")
    dtype = torch.bfloat16 if second == BF16 else torch.float32
    assert load_file(folder / "model.safetensors")[name].dtype == optimizer[f"{name}/exp_avg"].dtype == dtype
    assert optimizer[f"{name}/step"] == 4
    state = checkpoint.read_state(folder)
    assert state["dtype"] == moved[0]["dtype"] and (state["loss_scale"] > 1) == (state["dtype"] == "float16")
    losses = [[record["loss"] for record in log.read(loaded[0]["out_dir"])][-2:] for loaded in (expected, moved)]
    assert losses[1] == pytest.approx(losses[0], rel=5e-3) and losses[1] != losses[0]


def test_load_checkpoint_moves_factored_state_between_layouts(tmp_path):
    """2 shards -> 1 rank and 2 shards, 1 rank -> 2 shards; the files are the same bytes."""
    model = small_model()
    optimizer = Factored(model.parameters())
    assert save(tmp_path / "one", model, optimizer)
    on_two_ranks("move_sharded", tmp_path)
    for file in ("model.safetensors", "optimizer.safetensors", "sampler.safetensors"):
        one, two = (tmp_path / n / "checkpoints" / "latest" / file for n in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
    expected = {p: optimizer.state[p]["rows"].clone() for p in model.parameters()}
    for p in model.parameters():
        optimizer.state[p]["rows"].zero_()
    checkpoint.load_checkpoint(tmp_path / "two" / "checkpoints" / "latest", model, optimizer)
    assert all(torch.equal(optimizer.state[p]["rows"], rows) for p, rows in expected.items())


@pytest.mark.parametrize("value, words", [
    (torch.ones(2, dtype=torch.complex64), "complex64.*use another dtype"),
    (None, "is a NoneType; use a tensor or a number"), ([1, 2], "is a list")])
def test_check_optimizer_state_refuses_what_could_not_be_restored(value, words):
    """At the start of a run: for sharded parameters see move_sharded."""
    model = small_model()
    optimizer = Factored(model.parameters())
    checkpoint.check_optimizer_state(optimizer, model)
    optimizer.state[model[0].weight]["odd"] = value
    with pytest.raises(configs.UserError, match=f"optimizer: state 'odd' of 0.weight .*{words}"):
        checkpoint.check_optimizer_state(optimizer, model)


def test_check_optimizer_state_refuses_state_of_no_parameter():
    model = small_model()
    optimizer = Factored(model.parameters())
    optimizer.state["global"] = {"step": 1}
    with pytest.raises(configs.UserError, match="not a trained parameter"):
        checkpoint.check_optimizer_state(optimizer, model)


# --------------------------------------------------------------------------------------------------
# the resume point

@pytest.fixture
def stopped(tiny):
    """stopped(*keys) -> config of a run whose folder has a config.yaml and checkpoints 3 and 5."""
    def make(*keys, out="run"):
        cfg, _, explicit = tiny(*keys, out=out)
        out_dir = Path(cfg["out_dir"])
        model = small_model()
        optimizer = Factored(model.parameters())
        for step in (3, 5):
            assert save(out_dir, model, optimizer, step, code=checkpoint.code_hashes(),
                        launch=checkpoint.launch_id(),
                        data={"chats": {"source": "a", "options": "b"}})
        (out_dir / "config.yaml").write_text(configs.dump(explicit))
        return cfg
    return make


def names_every_way_on(error):
    text = str(error.value)
    assert "\n" not in text
    return all(way in text for way in ("out_dir=NEW", "resume=never", "resume=latest"))


def test_find_resume_point_is_the_newest_of_the_same_run(stopped, tiny):
    cfg = stopped()
    newest = Path(cfg["out_dir"]) / "checkpoints" / "00000005"
    assert checkpoint.find_resume_point(cfg) == newest
    assert checkpoint.find_resume_point(tiny("resume=latest", "log_every=3")[0]) == newest
    older = newest.with_name("00000003")
    assert checkpoint.find_resume_point(tiny(f"resume={older}")[0]) == older
    assert checkpoint.find_resume_point(tiny("resume=never", "lr=1")[0]) is None
    assert checkpoint.find_resume_point(tiny("lr=1", out="new")[0]) is None
    assert checkpoint.find_resume_point(tiny("resume=latest", out="new")[0]) is None


def test_find_resume_point_refuses_another_config_by_name(stopped, tiny):
    """resume=OUT/checkpoints/latest out_dir=NEW, which the message names, continues with it."""
    cfg = stopped()
    out_dir = cfg["out_dir"]
    for resume in ("auto", "latest"):
        with pytest.raises(configs.UserError, match="lr: 0.01 there, 0.005 here.*seed: 0 th") as e:
            checkpoint.find_resume_point(tiny("lr=5e-3", "seed=2", f"resume={resume}")[0])
        way = f"resume={out_dir}/checkpoints/latest out_dir=NEW"
        assert way in str(e.value) and "resume=never" in str(e.value) and "\n" not in str(e.value)
    path = f"{out_dir}/checkpoints/latest"
    continued, _, explicit = tiny("lr=5e-3", "seed=2", f"resume={path}", out="new")
    assert checkpoint.find_resume_point(continued) == Path(path)
    # started again, with a checkpoint of its own: that one
    shutil.copytree(out_dir, continued["out_dir"], symlinks=True)
    (Path(continued["out_dir"]) / "config.yaml").write_text(configs.dump(explicit))
    own = checkpoint.find_resume_point(continued)
    assert own == Path(continued["out_dir"]) / "checkpoints" / "00000005"
    # a run that was not started from that checkpoint
    stopped(out="other")
    with pytest.raises(configs.UserError, match="resume: .*not started from it.*out_dir=NEW"):
        checkpoint.find_resume_point(tiny(f"resume={path}", out="other")[0])


def test_find_resume_point_of_a_named_checkpoint_checks_the_optimizer(stopped, tiny):
    path = Path(stopped()["out_dir"]) / "checkpoints" / "latest"
    new = tiny(f"resume={path}", "dtype=bfloat16", "shard.master_dtype=bfloat16", out="new")[0]
    assert checkpoint.find_resume_point(new) == path
    words = "resume: .*does not fit .optimizer: .?adamw.? there, .?sgd.? here"
    with pytest.raises(configs.UserError, match=words):
        checkpoint.find_resume_point(tiny(f"resume={path}", "optimizer=sgd", out="new")[0])
    with pytest.raises(configs.UserError, match="no checkpoint here"):
        checkpoint.find_resume_point(tiny(f"resume={path.parent}", out="new")[0])


def test_find_resume_point_refuses_changed_code_by_file_name(stopped, tiny, monkeypatch):
    cfg = stopped()
    out_dir = Path(cfg["out_dir"])
    code = checkpoint.code_hashes() | {"model.py": "edited", "experiments/new.py": "added"}
    monkeypatch.setattr(checkpoint, "code_hashes", lambda: code)
    with pytest.raises(configs.UserError, match=r"\(experiments/new.py, model.py\)") as e:
        checkpoint.find_resume_point(cfg)
    assert names_every_way_on(e) and "sampler.py" not in str(e.value)
    with pytest.raises(configs.UserError, match="model.py"):
        checkpoint.find_resume_point(tiny(f"resume={out_dir}/checkpoints/00000003")[0])
    # the ways on
    newest = out_dir / "checkpoints" / "00000005"
    assert checkpoint.find_resume_point(tiny("resume=latest")[0]) == newest
    assert checkpoint.find_resume_point(tiny("resume=never")[0]) is None
    assert checkpoint.find_resume_point(tiny(out="new")[0]) is None
    # a new run from this checkpoint may have other code
    assert checkpoint.find_resume_point(tiny(f"resume={newest}", out="new")[0]) == newest


@pytest.mark.parametrize("saved_by, restarts, continues", [
    ("an earlier launch", "0", False), ("an earlier launch", "2", False),
    ("this launch", "0", False), ("this launch", "2", True)])
def test_find_resume_point_after_a_restart(
        stopped, tiny, monkeypatch, saved_by, restarts, continues):
    """torchrun --max-restarts starts the same command again. What it has saved itself counts: if it
    died before its first checkpoint, resume=never and resume=PATH mean what they meant at first."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", saved_by)
    newest = Path(stopped()["out_dir"]) / "checkpoints" / "00000005"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this launch")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    older = newest.with_name("00000003")
    assert checkpoint.find_resume_point(tiny("resume=latest")[0]) == newest
    never = checkpoint.find_resume_point(tiny("resume=never")[0])
    named = checkpoint.find_resume_point(tiny(f"resume={older}")[0])
    assert (never, named) == ((newest, newest) if continues else (None, older))


def test_launch_id_is_that_of_torchruns_agent(monkeypatch):
    """Without --rdzv_id torchrun sets "none"; the agent is the parent, also after a restart."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert checkpoint.launch_id() == f"agent {os.getppid()}"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 17")
    assert checkpoint.launch_id() == "job 17"


def test_find_resume_point_refuses_a_folder_that_cannot_be_written(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    for out in ("file", "file/run"):
        with pytest.raises(configs.UserError, match="out_dir: .*file is a file; name another folder"):
            checkpoint.find_resume_point(tiny(out=out)[0])


def test_check_same_data_names_changed_sources_and_the_ways_on(stopped, tiny):
    cfg = stopped()
    path = Path(cfg["out_dir"]) / "checkpoints" / "latest"
    state = checkpoint.read_state(path)
    checkpoint.check_same_data(state, state["data"], cfg)
    changed = {"chats": {"source": "other", "options": "b"}, "more": {"source": "c"}}
    with pytest.raises(configs.UserError, match="data.train.chats: source; data.train.more") as e:
        checkpoint.check_same_data(state, changed, cfg)
    assert names_every_way_on(e) and "options" not in str(e.value)
    assert f"resume={path} out_dir=NEW" in str(e.value)
    # resume=latest, or a new run from this checkpoint
    checkpoint.check_same_data(state, changed, tiny("resume=latest")[0])
    checkpoint.check_same_data(state, changed, tiny(f"resume={path}", out="new")[0])
    with pytest.raises(configs.UserError):
        checkpoint.check_same_data(state, changed, tiny(f"resume={path}")[0])


def test_config_diff_allows_a_longer_run_if_its_past_is_the_same(stopped, tiny):
    """Constant and wsd schedules that count steps can be extended until the decay has begun."""
    wsd = ["schedule=wsd", "warmup_steps=2", "decay_steps=4", "max_steps=9"]
    for n, (keys, more, allowed) in enumerate([
            (["schedule=constant", "warmup_steps=2"], ["max_steps=99"], True),
            (["schedule=constant", "warmup_steps=0.1"], ["max_steps=99"], False),
            (["schedule=constant", "warmup_steps=500", "max_steps=null", "epochs=1"],
             ["epochs=90"], False),
            (["schedule=cosine", "warmup_steps=2"], ["max_steps=99"], False),
            (wsd, ["max_steps=99"], True), (wsd, ["max_steps=8"], False),
            ([*wsd, "decay_steps=0.1"], ["max_steps=99"], False)]):
        cfg = stopped(*keys, out=f"run{n}")
        changed = tiny(*keys, *more, out=f"run{n}")[0]
        lines = list(checkpoint.config_diff(cfg["out_dir"], changed))
        assert bool(lines) is not allowed, (keys, lines)


def test_start_over_deletes_what_a_run_left(stopped):
    out_dir = Path(stopped()["out_dir"])
    checkpoint.save_code(out_dir, 0)
    for name in ("hf", "adapter", "code-at-00000003", "notes"):
        (out_dir / name).mkdir()
    (out_dir / "metrics.jsonl").write_text("")
    for name in ("tracker_wandb.json", "tracker_mlflow.json"):
        (out_dir / name).write_text("abc")
    checkpoint.start_over(out_dir)
    assert sorted(p.name for p in out_dir.iterdir()) == ["config.yaml", "notes"]
    checkpoint.start_over(out_dir / "none")


# --------------------------------------------------------------------------------------------------
# the code of a run

def test_source_files_are_the_scripts_and_the_experiment(script, tmp_path):
    """Also a main script outside of the project. No tests, no installed packages."""
    experiment = tmp_path / "mine.py"
    experiment.write_text("import checkpoint, json, sys\n"
                          "json.dump([sorted(checkpoint.source_files()),\n"
                          "           checkpoint.code_hashes()], sys.stdout)\n")
    done = script(experiment, PYTHONPATH=str(ROOT))
    names, hashes = json.loads(done.stdout)
    for name in ("checkpoint.py", "configs/__init__.py", "configs/defaults.yaml",
                 "configs/families.yaml", "mine.py", "model.py", "shard.py", "tokenize_data.py"):
        assert name in names
    assert "train.py" not in names and "configs/ft.yaml" not in names    # not loaded
    assert all(name == "mine.py" or (ROOT / name).is_file() for name in names)
    assert set(hashes) == set(names) and all(len(h) == 16 for h in hashes.values())
    here = checkpoint.source_files()
    assert "checkpoint.py" in here and not any("test" in name for name in here)


def test_save_code_keeps_the_scripts_of_each_change(tmp_path, monkeypatch):
    scripts = {"a.py": tmp_path / "a.py", "sub/b.yaml": tmp_path / "b.yaml"}
    monkeypatch.setattr(checkpoint, "source_files", lambda: scripts)
    monkeypatch.setattr(checkpoint, "code_hashes", lambda: checkpoint.hash_files(scripts))
    for path in scripts.values():
        path.write_text("1")
    run_dir = tmp_path / "run"

    def saved():
        return {p.parent.name: p.read_text() for p in run_dir.glob("code*/a.py")}
    checkpoint.save_code(run_dir, 0)
    assert (run_dir / "code" / "sub" / "b.yaml").read_text() == "1"
    checkpoint.save_code(run_dir, 4)
    assert saved() == {"code": "1"}
    scripts["a.py"].write_text("2")
    checkpoint.save_code(run_dir, 6)
    checkpoint.save_code(run_dir, 8)
    assert saved() == {"code": "1", "code-at-00000006": "2"}
    checkpoint.save_code(tmp_path / "new", 6)
    assert (tmp_path / "new" / "code" / "a.py").read_text() == "2"


def test_git_describe_is_none_without_a_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "PROJECT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert checkpoint.git_describe() is None
    commit = ["-c", "user.name=a", "-c", "user.email=a", "commit", "--allow-empty", "-qm", "x"]
    for command in (["init", "-q"], commit):
        if not shutil.which("git"):
            pytest.skip("needs git")
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    assert len(checkpoint.git_describe()) >= 7
    monkeypatch.setenv("PATH", "")
    assert checkpoint.git_describe() is None


# --------------------------------------------------------------------------------------------------
# export and command line

def test_ls_and_export_checkpoint(finished, script, tmp_path):
    out_dir, _ = finished
    lines = script("checkpoint.py", "ls", out_dir).stdout.splitlines()[1:]
    assert [line.split()[1] for line in lines] == ["2", "4", "6"]
    assert lines[-1].endswith("complete, latest")
    own_code = out_dir / "code" / "checkpoint.py"        # can do it, whatever has changed since then
    assert script(own_code, "export", out_dir, tmp_path / "newest").returncode == 0
    checkpoint.main(["export", str(out_dir / "checkpoints" / "00000002"), str(tmp_path / "early")])
    for name in ("newest", "early"):
        assert (tmp_path / name / "model.safetensors").is_file()
        assert (tmp_path / name / "tokenizer.json").is_file()
    (tmp_path / "file").write_text("")
    for args, words in ((["export", out_dir, tmp_path / "early"], "not empty"),
                        (["ls"], "checkpoint.py ls RUN"), (["list", out_dir], "export RUN"),
                        (["export", out_dir], "export RUN"), (["ls", out_dir, "all=true"], "ls RUN"),
                        (["export", tmp_path, tmp_path / "x"], "no checkpoint"),
                        (["export", out_dir, tmp_path / "new", "adapter=true"], "all weights were trained"),
                        (["export", out_dir, tmp_path / "file"], "is a file")):
        with pytest.raises(configs.UserError, match=words) as e:
            checkpoint.main([str(arg) for arg in args])
        assert "\n" not in str(e.value)
    wrong = script("checkpoint.py", "export", out_dir, tmp_path / "early")
    assert wrong.returncode == 1 and wrong.stderr.startswith("error: ") and wrong.stderr.count("\n") == 1


def test_ls_shows_loss_size_age_and_what_is_damaged(finished, capsys):
    """Validation losses where there are some, else the training loss; what a killed process left."""
    out_dir, _ = finished
    folder = out_dir / "checkpoints"
    four, six = folder / "00000004", folder / "00000006"
    checkpoint.set_symlink(folder / "best", folder / "00000002")
    (folder / ".00000008.building").mkdir()
    with open(six / "optimizer.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    os.utime(four, (0, time.time() - 3 * 3600))
    records = {record["step"]: record for record in log.read(out_dir) if "loss" in record}
    evaluation = {"step": 4, "val/a/loss": 0.5, "val/b/loss": 0.25, "val/b/nll": 9.0}
    with open(out_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps(evaluation) + "\n")

    def listing(*options):
        checkpoint.main(["ls", *map(str, options)])
        return [re.split("  +", line.strip()) for line in capsys.readouterr().out.splitlines()]
    header, *rows, incomplete = listing(out_dir)
    assert header == ["checkpoint", "step", "loss", "size", "age", "state"]
    assert [row[1] for row in rows] == ["2 of 6", "4 of 6", "6 of 6"]
    assert [row[2] for row in rows] == [f"training {records[2]['loss']:.4f}", "a 0.5000, b 0.2500",
                                        f"training {records[6]['loss']:.4f}"]
    size = sum(path.stat().st_size for path in four.iterdir()) / 1e6
    assert rows[1][3:5] == [f"{size:.1f} MB", "3 h"]
    assert [row[5] for row in rows] == ["complete, best", "complete",
                                        "damaged: optimizer.safetensors, latest"]
    assert incomplete[-1].startswith("incomplete") and len(listing(four)) == 2
    assert listing(out_dir, "verify=false")[3][5] == "complete, latest"
    shutil.rmtree(folder / ".00000008.building")
    assert listing(folder / "latest")[1][5].startswith("damaged: optimizer")


@pytest.mark.parametrize("seconds, text", [(-1, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (3e5, "3 days")])
def test_format_age(seconds, text):
    assert checkpoint.format_age(seconds) == text


def test_export_checkpoint_in_another_dtype(finished, tmp_path, capsys):
    """Each is rounded once, from the fp32 weights."""
    out_dir, _ = finished
    saved = load_file(out_dir / "checkpoints" / "latest" / "model.safetensors")
    for name in checkpoint.EXPORT_DTYPES:
        checkpoint.main(["export", str(out_dir), str(tmp_path / name), f"dtype={name}"])
        tensors = load_file(tmp_path / name / "model.safetensors")
        expected = saved["embed.weight"].to(getattr(torch, name))
        assert torch.equal(tensors["model.embed_tokens.weight"], expected)
        assert {t.dtype for t in tensors.values()} == {expected.dtype}
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == name


def test_save_pretrained_refuses_numbers_that_float16_lacks(tmp_path):
    m = configs.load(["model.vocab_size=9", "model.n_layers=1", "model.d_model=16", "model.n_heads=2"])[0]["model"]
    model = M.build(m)
    with torch.no_grad():
        model.norm.weight[3] = 70000.0
    with pytest.raises(configs.UserError, match="dtype: model.norm.weight.*float16; dtype=bfloat16"):
        M.save_pretrained(model.get_parameter, m, tmp_path, dtype="float16")


@pytest.fixture
def someone_tiny(tmp_path, monkeypatch):
    """(folder of the model someone/tiny on a hub, the hub's log)"""
    constants = pytest.importorskip("huggingface_hub.constants", reason="what uploads to a hub")
    monkeypatch.setenv("HF_ENDPOINT", "restored at the end")
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    repository = tmp_path / "repository"
    log_of_hub = hub.start("models/someone/tiny", repository)
    monkeypatch.setattr(constants, "ENDPOINT", os.environ["HF_ENDPOINT"])
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    return repository, log_of_hub


def test_upload_to_a_hub(finished, tmp_path, someone_tiny, monkeypatch, capsys):
    """A private model with its card; a second export replaces it, and deletes other weights."""
    repository, log_of_hub = someone_tiny

    def export(name, *options):
        folder = tmp_path / name
        checkpoint.main(["export", str(finished[0]), str(folder), "upload=someone/tiny", *options])
        return folder
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(configs.UserError, match="upload: someone/tiny: .*401.*hf auth login"):
        export("refused")
    assert not (tmp_path / "refused").exists() and not repository.exists()
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    first = export("first", "dtype=bfloat16")
    assert "someone/tiny on the hub" in capsys.readouterr().out
    assert log_of_hub[0] == ("private", True)
    for file in first.iterdir():
        assert (repository / file.name).read_bytes() == file.read_bytes()
    assert 'from_pretrained("someone/tiny")' in (repository / "README.md").read_text()
    (repository / "model-00001-of-00002.safetensors").write_text("of a larger model")
    second = export("second")
    assert {file.name for file in repository.iterdir()} == {file.name for file in second.iterdir()}
    log_of_hub.remove(("private", True))                 # the owner has made it public
    with pytest.raises(configs.UserError, match="exists and is public; private=false"):
        export("third")
    assert not (tmp_path / "third").exists()
    export("fourth", "private=false")


@pytest.fixture
def base(tmp_path):
    """A pretrained model of a folder with a card and a license."""
    folder = tmp_path / "bases" / "Small-1M"
    shutil.copytree(ROOT / "data" / "base", folder)
    (folder / "LICENSE").write_text("its license")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: small-license\nlicense_link: LICENSE\n"
                                      "base_model: someone/tiny\ntags:\n- a\n---\n# Small\n")
    return folder


def from_base(tiny, *keys):
    """tiny(*keys), with the shapes and the tokenizer of model.init_from."""
    _, _, explicit = tiny(*keys)
    explicit["model"] = {"init_from": explicit["model"]["init_from"]}
    del explicit["data"]["tokenizer"]
    path = Path(explicit["out_dir"]).with_name("from_base.yaml")
    path.write_text(configs.dump(explicit))
    return configs.load([str(path)])


def read_card(folder):
    """(the metadata that the hub reads, the text) of a model card."""
    hf = pytest.importorskip("huggingface_hub", reason="what reads model cards")
    card = hf.ModelCard.load(folder / "README.md")
    return card.data.to_dict(), card.text


def test_write_card_says_what_a_model_was_trained_from(tiny, base, tmp_path, chats):
    """Base, license, data, settings and evaluation; the same at every export, without paths."""
    before = (base / "README.md").read_text()
    keys = [f"model.init_from={base}"]
    loaded = from_base(tiny, "max_steps=3", "checkpoint.export=true", "eval_every=2", *keys)
    run(loaded)
    out_dir = Path(loaded[0]["out_dir"])
    data, text = read_card(out_dir / "hf")
    assert data == {"base_model": "someone/tiny", "license": "other", "license_name": "small-license",
                    "license_link": "LICENSE", "library_name": "transformers", "pipeline_tag": "text-generation",
                    "tags": ["conversational"]}
    assert (out_dir / "hf" / "LICENSE").read_text() == "its license"
    assert (base / "README.md").read_text() == before
    assert "# someone/tiny, fine-tuned" in text and "3 of 3 steps, computing in float32" in text
    tokens = tokenize_data.load_datasets(loaded[0])["train"]["chats"]
    assert f"- chats: {len(tokens)} documents, {tokens.offsets[-1]:,} tokens\n" in text
    assert "lr: 0.01\n" in text and "data.validation_split: 4\n" in text
    for private in (str(tmp_path), str(chats), "cache_dir"):
        assert private not in text
    last = log.read(out_dir)[-1]
    assert "after step 3" in text and f"| chats/loss | {last['val/chats/loss']:.4f} |" in text
    checkpoint.main(["export", str(out_dir), str(tmp_path / "again")])
    assert (tmp_path / "again" / "README.md").read_text() == (out_dir / "hf" / "README.md").read_text()
    checkpoint.main(["export", str(out_dir / "checkpoints" / "latest"), str(tmp_path / "bf16"), "dtype=bfloat16"])
    transformers = pytest.importorskip("transformers", reason="the card loads the model in it")
    [code] = re.findall("```python\n(.*?)```", text, re.S)
    names = {}
    exec(code.replace("path/to/this/folder", str(tmp_path / "bf16")), names)
    assert names["model"].dtype == torch.bfloat16 and len(names["tokenizer"]) == 259
    assert isinstance(names["model"], transformers.LlamaForCausalLM)


def test_write_card_of_an_adapter(tiny, base, tmp_path):
    """The adapter's card loads it in PEFT; an older checkpoint and a moved base still have cards."""
    keys = [f"model.init_from={base}", "shard.lora.r=2", "checkpoint.export=true", "max_steps=1", "eval_every=0"]
    loaded = from_base(tiny, *keys)
    run(loaded)
    out_dir = Path(loaded[0]["out_dir"])
    data, text = read_card(out_dir / "adapter")
    assert data["library_name"] == "peft" and data["tags"] == ["lora", "conversational"]
    assert data["license"] == "other" and (out_dir / "adapter" / "LICENSE").is_file()
    assert "with LoRA of rank 2" in text and "AutoPeftModelForCausalLM" in text
    pytest.importorskip("peft", reason="the card loads the adapter in it")
    names = {}
    [code] = re.findall("```python\n(.*?)```", text, re.S)
    exec(code.replace("path/to/this/folder", str(out_dir / "adapter")), names)
    assert names["model"].active_adapter == "default"


def test_upload_an_adapter_alone(tiny, base, tmp_path, someone_tiny):
    """The hub gets the adapters and their card; the merged model replaces them."""
    loaded = from_base(tiny, f"model.init_from={base}", "shard.lora.r=2", "max_steps=1", "eval_every=0")
    run(loaded)
    repository, _ = someone_tiny
    for name, options in (("alone", ["adapter=true"]), ("merged", [])):
        folder = tmp_path / name
        checkpoint.main(["export", loaded[0]["out_dir"], str(folder), "upload=someone/tiny", *options])
        uploaded = {file.name: file.read_bytes() for file in repository.iterdir()}
        assert uploaded == {file.name: file.read_bytes() for file in folder.iterdir()}
        assert ("adapter_model.safetensors" in uploaded) == (name == "alone")
        assert ("model.safetensors" in uploaded) == (name == "merged")
        assert 'from_pretrained("someone/tiny")' in uploaded["README.md"].decode()


def test_write_card_of_an_adapter_that_is_continued(tiny, base, tmp_path):
    """The adapter gives the rank, which is not among the keys that were set."""
    keys = [f"model.init_from={base}", "checkpoint.export=true", "max_steps=1", "eval_every=0"]
    loaded = from_base(tiny, *keys, "shard.lora.r=2")
    run(loaded)
    adapter = Path(loaded[0]["out_dir"]) / "adapter"
    run(from_base(tiny, *keys, f"shard.lora.init_from={adapter}", f"out_dir={tmp_path / 'next'}"))
    for folder in ("adapter", "hf"):
        assert "with LoRA of rank 2" in read_card(tmp_path / "next" / folder)[1]


def test_base_metadata_of_folders_and_of_the_hubs_cache(tmp_path):
    cache = tmp_path / "hub" / "models--Qwen--Qwen2.5-0.5B" / "snapshots" / "abc"
    cache.mkdir(parents=True)
    assert checkpoint.base_metadata(str(cache)) == {"base_model": "Qwen/Qwen2.5-0.5B"}
    (cache / "LICENSE").write_text("                  Apache License\n  Version 2.0, January 2004\n")
    assert checkpoint.base_metadata(str(cache)) == {
        "base_model": "Qwen/Qwen2.5-0.5B", "license": "apache-2.0", "license_link": "LICENSE"}
    (cache / "README.md").write_text("---\nlicense: mit\nbase_model: Qwen/older\n---\n")
    assert checkpoint.base_metadata(str(cache)) == {"base_model": "Qwen/Qwen2.5-0.5B", "license": "mit"}
    (cache / "README.md").write_text("---\nlicense: [mit\n---\n")                    # not valid YAML
    assert checkpoint.base_metadata(str(cache))["license"] == "apache-2.0"
    assert checkpoint.base_metadata("") == checkpoint.base_metadata(str(tmp_path / "gone")) == {}


def test_describe_sources_names_datasets_on_the_hub(tmp_path):
    local = tmp_path / "a" / "b.jsonl"
    local.parent.mkdir()
    local.touch()
    train = {"mine": {"path": str(local)}, "theirs": {"path": str(tmp_path / "openai" / "gsm8k@main" / "main")}}
    tokens = type("Tokens", (), {"offsets": np.array([10, 14, 19]), "__len__": lambda self: 2})()
    cfg = {"data_root": str(tmp_path), "data": {"train": train}}
    sources = checkpoint.describe_sources(cfg, dict.fromkeys(train, tokens))
    assert sources == {"mine": {"documents": 2, "tokens": 9, "dataset": ""},
                       "theirs": {"documents": 2, "tokens": 9, "dataset": "openai/gsm8k"}}
    assert [checkpoint.describe_source(name, sources.get(name)) for name in ("mine", "theirs", "older")] == [
        "- mine: 2 documents, 9 tokens", "- theirs: 2 documents, 9 tokens of openai/gsm8k", "- older"]


def test_card_settings_leave_out_paths_and_trackers():
    explicit = {"lr": 0.1, "best": "val/a/loss", "out_dir": "out/x", "resume": "out/y", "log": {"to": ["wandb"]},
                "optimizer_options": {"file": "/home/me/x", "files": ["~/a"], "beta": 0.5},
                "data": {"tokenizer": "gpt2", "train": {"a": {"path": "x.jsonl", "weight": 2.0}}}}
    assert checkpoint.card_settings(explicit) == {
        "lr": 0.1, "best": "val/a/loss", "optimizer_options.beta": 0.5, "data.train.a.weight": 2.0}


def test_write_card_of_a_native_model(tmp_path):
    """transformers does not know its family; without a validation the card says so."""
    model_cfg = configs.load(["model.family=native"])[0]["model"]
    state = STATE | {"config": {"lr": 0.1}, "has_chats": False, "data": {"a": {}}}
    checkpoint.write_card(tmp_path, tmp_path / "checkpoints" / "00000003", state, model_cfg)
    data, text = read_card(tmp_path)
    assert data == {"pipeline_tag": "text-generation"} and "transformers" not in text
    assert "# native of 4 x 128, trained from new weights" in text and "- a\n" in text and "lr: 0.1\n" in text
    assert "## Evaluation\n\nNone.\n" in text and "python model.py path/to/this/folder" in text


def test_lock_folder_does_without_locks(tmp_path, monkeypatch):
    """Some network file systems have none."""
    def lockf(file, operation):
        raise OSError(37, "No locks available")
    monkeypatch.setattr(checkpoint.fcntl, "lockf", lockf)
    checkpoint.lock_folder(tmp_path).close()


def test_lock_folder_refuses_a_disk_without_symbolic_links(tmp_path, monkeypatch):
    """Before the training, whose checkpoints would all fail."""
    checkpoint.lock_folder(tmp_path).close()
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]

    def symlink(*args, **options):
        raise OSError(95, "Operation not supported")
    monkeypatch.setattr(os, "symlink", symlink)
    with pytest.raises(configs.UserError, match="^out_dir: .*Operation not supported.*another disk"):
        checkpoint.lock_folder(tmp_path)


@pytest.mark.parametrize("argv, words", [
    (["export", "out", "dtype=float16"], "export RUN"), (["ls", "out", "new"], "ls RUN"),
    (["export", "out", "new", "dtype=bf16"], "dtype: must be one of float32, bfloat16, float16; got bf16"),
    (["export", "out", "new", "dtype=float16", "adapter=true"], "dtype: adapters are written in float32"),
    (["export", "out", "new", "upload=mine"], "upload: must be OWNER/NAME on the hub; got mine")])
def test_check_arguments_refuses(argv, words):
    with pytest.raises(configs.UserError, match=words):
        checkpoint.check_arguments(*argv)


def test_check_arguments_needs_no_torch(tmp_path, script):
    """A wrong path or a missing argument is reported at once."""
    for args, words in ((["ls"], "checkpoint.py ls RUN"), (["export", tmp_path], "export RUN"),
                        (["ls", tmp_path / "x"], "does not exist"),
                        (["export", tmp_path, tmp_path / "x"], "has no checkpoints")):
        done = script("-X", "importtime", "checkpoint.py", *args)
        assert done.returncode == 1 and words in done.stderr.splitlines()[-1]
        assert "| torch" not in done.stderr


def test_find_resume_point_names_the_checkpoint_of_a_run_folder(stopped, tiny):
    """resume=RUN instead of one of its checkpoints, or a word that is none."""
    cfg = stopped()
    for resume, words in ((cfg["out_dir"], f"resume={cfg['out_dir']}/checkpoints/latest"), ("latests", "ls RUN")):
        with pytest.raises(configs.UserError, match="^resume: ") as e:
            checkpoint.find_resume_point(tiny(f"resume={resume}", out="other")[0])
        assert words in str(e.value)


def test_export_checkpoint_does_not_need_the_loss(finished, script, tmp_path):
    """A run whose experiment registers a loss can be exported without the experiment."""
    out_dir, _ = finished
    path = out_dir / "config.yaml"
    keys = ["model.loss=focal", "model.loss_options={gamma: 2.0}"]
    _, _, explicit = configs.load([str(path), *keys])
    path.write_text(configs.dump(explicit))
    done = script("checkpoint.py", "export", out_dir, tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "hf" / "model.safetensors").is_file()


@pytest.mark.parametrize("args", [[], ["--help"]])
def test_main_without_arguments_prints_how_to_start(script, args):
    done = script("checkpoint.py", *args)
    assert done.returncode == 0 and "python checkpoint.py ls out/ft" in done.stdout


def test_saver_killed_again_and_again_gives_the_same_run(script):
    """tests/bench/crash.py, its quick form."""
    done = script("tests/bench/crash.py", "--kills", "6", "--steps", "120")
    result = json.loads(done.stdout.splitlines()[-1])
    output = done.stdout + done.stderr
    assert done.returncode == 0 and result["kills"] == 6 and not result["problems"], output
