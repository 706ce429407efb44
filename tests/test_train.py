"""train.py with checkpoint.py: one loss (law 1), a stopped run is the same run (law 3), bad input loses nothing."""
import contextlib, json, math, os, re, shutil, signal, subprocess, sys, time, traceback, types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint, configs, launch, log, model as M, sampler, shard, tokenize_data, train
from conftest import ROOT


def records(cfg, *keys):
    """A run's records, each a tuple of the keys; all but the clock's where none is named."""
    if keys:
        return [tuple(r.get(k) for k in keys) for r in log.read(cfg["out_dir"])]
    clocks = ("tok_per_s", "seconds", "memory", "mfu", "data_wait", "save_wait", "compiled")
    return [{k: v for k, v in r.items() if k not in clocks and not k.startswith("slow_")} for r in log.read(cfg["out_dir"])]


def main(loaded):
    """A whole run from what configs.load() returned."""
    cfg, _, explicit = loaded
    train.main(cfg, explicit)


def run(loaded):
    main(loaded)
    return records(loaded[0], "step", "loss", "grad_norm")


def weights(cfg, step):
    folder = Path(cfg["out_dir"]) / "checkpoints" / f"{step:08}"
    return {name: load_file(folder / name) for name in ("model.safetensors", "optimizer.safetensors")}


def losses(rows):
    return torch.tensor([loss for _, loss, _ in rows if loss is not None], dtype=torch.float64)


# ---- guarantee 1: the loss

def test_forward_backward_loss_is_the_mean_over_the_steps_target_tokens(tiny):
    c = tiny("max_steps=1", "eval_every=0")[0]
    rows = run(tiny("max_steps=1", "eval_every=0"))
    tok = tokenize_data.load_tokenizer(c)
    data = tokenize_data.load_datasets(c, tok, quiet=True)["train"]["chats"]
    model = M.build(train.resolve_model(c, tok)[0], c["seed"])
    nll = []
    for i in sampler.documents(0, c, {"chats": len(data)}):
        ids, mask = data.document(i)
        logits = model.logits(M.pack_prompts([ids[:-1].tolist()]))
        each = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:].astype(int)), reduction="none")
        nll += each[torch.tensor(mask[1:]).bool()].tolist()
    assert rows[0][1] == pytest.approx(sum(nll) / len(nll), rel=1e-6)


@pytest.mark.parametrize("more, tolerance", [
    ((), 1e-5), (("dtype=bfloat16",), 1e-3), (("shard.recompute=true",), 1e-5),
    (("shard.lora.r=4", "shard.lora.dropout=0.2"), 1e-5),
    (("shard.master_dtype=bfloat16", "shard.moment_dtype=bfloat16"), 1e-3)])
def test_forward_backward_does_not_depend_on_micro_batches(tiny, more, tolerance):
    """The layout of a step changes rounding and nothing else (guarantee 1)."""
    # steps that don't amplify rounding by themselves
    more = (*more, "max_steps=6", "lr=1e-3")
    want = run(tiny(*more, "micro_tokens=2000", out="whole"))
    got = run(tiny(*more, "micro_tokens=240", out="parts"))
    assert float((losses(got) / losses(want) - 1).abs().max()) < tolerance
    vals = [records(tiny(out=out)[0], "val/chats/loss", "val/chats/exact_match")[-1] for out in ("whole", "parts")]
    assert vals[0][0] == pytest.approx(vals[1][0], rel=tolerance * 10) and vals[0][1] == vals[1][1]


def test_train_logs_tokens_targets_and_packing(tiny):
    loaded = tiny("max_steps=3", "eval_every=0")
    run(loaded)
    for tokens, targets, documents, packing in records(loaded[0], "tokens", "target_tokens", "documents", "packing"):
        assert documents == 4 and 0 < targets < tokens and 0 < packing <= 1
    padded = tiny("max_steps=1", "eval_every=0", "dtype=bfloat16", out="padded")
    run(padded)
    (tokens, packing), = records(padded[0], "tokens", "packing")
    assert packing == pytest.approx(tokens / (-(-tokens // 64) * 64))


# ---- guarantee 3: resuming

GPT2 = ["model.norm=layernorm", "model.positions=learned", "model.family=gpt2", "model.qkv_bias=true",
        "model.out_bias=true", "model.mlp_bias=true", "model.glu=false", "model.n_kv_heads=4",
        "model.activation=gelu_new", "data.seq_len=400"]
TWICE_AND_HALF = ["data.train.more.path=${data.train.chats.path}", "data.train.more.weight=0.5",
                  "data.train.chats.weight=2"]
BF16_MASTERS, BF16_MOMENTS = "shard.master_dtype=bfloat16", "shard.moment_dtype=bfloat16"
FROZEN = "param_groups=[{match: embed, train: false}]"
FROZEN_BLOCK = "param_groups=[{match: 'embed|blocks.0', train: false}]"
CELLS = {    # name: (keys, the step after which the run is interrupted; an epoch has 9 steps)
    "full, in the first epoch": ([], 4), "full, at an epoch's edge": ([], 9), "full, in a later epoch": ([], 20),
    "bf16": (["dtype=bfloat16"], 3), "fp16": (["dtype=float16"], 3), "gpt-2 layout": (GPT2, 3),
    "lora in bf16": (["shard.lora.r=4", "dtype=bfloat16"], 3),
    "lora, dropout, recompute": (["shard.lora.r=4", "shard.lora.dropout=0.2", "shard.recompute=1"], 2),
    "nf4": (["shard.lora.r=4", "shard.quantize=nf4", "model.d_model=64"], 3),
    "one source twice, one half": (TWICE_AND_HALF, 23),
    "constant, in one micro-batch": (["schedule=constant", "micro_tokens=2000"], 3),
    "muon in bf16, groups": (["optimizer=muon", "dtype=bfloat16", "param_groups=[{match: embed, lr: 0.3}]"], 3),
    "sgd": (["optimizer=sgd"], 3),
    "frozen embedding and block in bf16": ([FROZEN_BLOCK, "dtype=bfloat16"], 3),
    "bf16 masters and moments": ([BF16_MASTERS, BF16_MOMENTS], 3),
    "bf16 masters, frozen, in bf16": ([BF16_MASTERS, FROZEN_BLOCK, "dtype=bfloat16"], 3),
    "bf16 moments": ([BF16_MOMENTS], 3)}


@pytest.mark.parametrize("cell", CELLS)
def test_resume_is_bitwise(tiny, cell):
    """A run stopped after any step and resumed equals the run that was not stopped (guarantee 3)."""
    more, k = CELLS[cell]
    more = [*more, f"max_steps={k + 3}", "save_every=1", "checkpoint.keep=100"]
    whole, again = tiny(*more, out="whole"), tiny(*more, out="again")
    run(whole)
    shutil.copytree(whole[0]["out_dir"], again[0]["out_dir"], symlinks=True)
    # as if the process had ended after step k was saved, with later steps already logged
    for folder in checkpoint.list_checkpoints(again[0]["out_dir"])[k:]:
        shutil.rmtree(folder)
    run(again)
    assert records(again[0]) == records(whole[0]) and len(records(whole[0], "loss")) >= k + 3
    for step in (k + 1, k + 3):
        a, b = weights(whole[0], step), weights(again[0], step)
        assert all(torch.equal(a[f][n], b[f][n]) for f in a for n in a[f])
        assert a["model.safetensors"].keys() == b["model.safetensors"].keys()


def test_resume_repeats_an_evaluation_lost_after_its_save(tiny):
    more = ["save_every=5", "eval_every=5", "max_steps=10", "checkpoint.keep=9", "samples=1"]
    whole, again = tiny(*more, out="whole"), tiny(*more, out="again")
    run(whole)
    for step in (5, 10):
        shutil.rmtree(again[0]["out_dir"], ignore_errors=True)
        shutil.copytree(whole[0]["out_dir"], again[0]["out_dir"], symlinks=True)
        for folder in checkpoint.list_checkpoints(again[0]["out_dir"]):
            if int(folder.name) > step:
                shutil.rmtree(folder)
        path = Path(again[0]["out_dir"]) / "metrics.jsonl"           # as if killed right behind the save
        stood = lambda r: r["step"] < step or r["step"] == step and "loss" in r
        lines = path.read_text().splitlines()
        path.write_text("".join(line + "\n" for line in lines if stood(json.loads(line))))
        run(again)
        assert records(again[0]) == records(whole[0])


def test_resume_from_a_named_checkpoint(tiny):
    base = tiny("max_steps=8", "save_every=4", "eval_every=0", out="base")
    run(base)
    four = f"{base[0]['out_dir']}/checkpoints/00000004"
    branch = tiny("max_steps=8", "save_every=2", "eval_every=0", "lr=5e-3", f"resume={four}", out="branch")
    assert [step for step, *_ in run(branch)] == [1, 2, 3, 4, 5, 6, 7, 8]        # with the records of base
    # the same command again: it is finished, and stays so
    assert run(branch) == run(branch)
    with pytest.raises(ValueError, match="lr"):                      # within its own folder a run keeps its keys
        main(tiny("max_steps=8", "save_every=4", "eval_every=0", "lr=5e-3", f"resume={four}", out="base"))
    assert [p.name for p in checkpoint.list_checkpoints(base[0]["out_dir"])] == ["00000004", "00000008"]
    with pytest.raises(ValueError, match="optimizer"):               # what is in it can't go on so
        main(tiny("max_steps=8", "eval_every=0", f"resume={four}", "optimizer=muon", out="strange"))


def test_resume_from_an_own_checkpoint_abandons_the_later_ones(tiny, monkeypatch):
    """At the start and not at the first save: a crash in between must not bring them back."""
    keys = ["max_steps=8", "save_every=2", "eval_every=0", "checkpoint.keep=9"]
    loaded = tiny(*keys)
    first = run(loaded)
    checkpoints = Path(loaded[0]["out_dir"]) / "checkpoints"

    def crash(run):
        raise RuntimeError("before the first save")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(train, "train", crash)
        main(tiny(*keys, f"resume={checkpoints / '00000004'}"))
    assert [p.name for p in checkpoint.list_checkpoints(checkpoints.parent)] == ["00000002", "00000004"]
    assert (checkpoints / "latest").resolve().name == "00000004"
    assert run(loaded) == first


def test_resume_never_starts_over(tiny, monkeypatch):
    """resume=never deletes the run in out_dir. It holds for one start: the folder then resumes as any other."""
    loaded = tiny("max_steps=4", "eval_every=0", "save_every=2", "resume=never", out="once")
    first = run(loaded)
    out_dir = Path(loaded[0]["out_dir"])
    leftover = out_dir / "checkpoints" / "00000009"
    shutil.copytree(out_dir / "checkpoints" / "00000004", leftover)
    assert run(loaded) == first and not leftover.exists()
    assert "\nresume:" not in (out_dir / "config.yaml").read_text()
    shutil.rmtree(out_dir / "checkpoints" / "00000004")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")            # torchrun starts the command again after a crash
    main(loaded)
    assert (out_dir / "checkpoints" / "00000002").is_dir()             # resumed, not started over


def test_train_of_a_finished_run_trains_nothing(tiny, capsys):
    """The same command again says that the run is finished and that nothing was trained."""
    loaded = tiny("max_steps=3", "checkpoint.export=true")
    run(loaded)
    metrics = Path(loaded[0]["out_dir"], "metrics.jsonl")
    before = metrics.read_text()
    run(loaded)
    output = capsys.readouterr().out
    assert metrics.read_text() == before
    assert f"{loaded[0]['out_dir']} is finished: all 3 steps are done; nothing was trained" in output


def test_resume_keeps_the_dtype_chosen_at_the_first_start(tiny, monkeypatch):
    loaded = tiny("dtype=auto", "max_steps=4", "save_every=2", "checkpoint.keep=9")
    monkeypatch.setattr(shard, "has_fast_bf16", lambda device_type: True)
    run(loaded)
    shutil.rmtree(checkpoint.list_checkpoints(loaded[0]["out_dir"])[-1])
    monkeypatch.setattr(shard, "has_fast_bf16", lambda device_type: False)
    run(loaded)
    assert checkpoint.read_state(checkpoint.list_checkpoints(loaded[0]["out_dir"])[-1])["dtype"] == "bfloat16"


def test_train_saves_on_sigterm_and_resumes(tiny, tmp_path):
    whole, again = (tiny("max_steps=100", "eval_every=0", "log_every=1", out=out) for out in ("whole", "again"))
    (tmp_path / "again.yaml").write_text(configs.dump(again[2]))
    # with a small pipe, unbuffered, the run waits for this test after 50 lines
    process = subprocess.Popen([sys.executable, "train.py", tmp_path / "again.yaml"], cwd=configs.HERE.parent,
                               stdout=subprocess.PIPE, bufsize=0, pipesize=4096,
                               env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())})
    for line in process.stdout:
        if line.startswith(b"step") and b"  loss" in line:
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read().decode()
    assert process.wait() == 128 + signal.SIGTERM and "saved" in rest
    step = checkpoint.read_state(checkpoint.list_checkpoints(again[0]["out_dir"])[-1])["step"]
    assert 0 < step < 100
    assert run(again) == run(whole)


def test_train_loses_no_step_to_a_signal_during_evaluation(tiny, monkeypatch):
    whole, again = tiny(out="whole"), tiny(out="again")              # evaluated after 10 steps, saved after the last
    run(whole)
    real = train.evaluate
    def interrupted(run):
        if len(log.read(again[0]["out_dir"])) > 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(run)
    monkeypatch.setattr(train, "evaluate", interrupted)
    with pytest.raises(SystemExit) as e:
        main(again)
    assert e.value.code == 128 + signal.SIGTERM
    assert [p.name for p in checkpoint.list_checkpoints(again[0]["out_dir"])] == ["00000010"]
    monkeypatch.setattr(train, "evaluate", real)
    run(again)
    assert records(again[0]) == records(whole[0])


@pytest.mark.parametrize("place, step, number", [
    ("keep_generating", 0, signal.SIGTERM), ("keep_generating", 25, signal.SIGUSR1),
    ("poll_signals", 0, signal.SIGINT), ("poll_signals", 25, signal.SIGTERM)])
def test_evaluate_ends_at_a_signal_and_is_repeated(tiny, monkeypatch, capsys, place, step, number):
    """In the loss or between two tokens, before the first step or after the last; records are written once."""
    whole = tiny("checkpoint.export=true", out="whole")
    again = tiny("checkpoint.export=true", out="again")
    run(whole)
    calls = []
    real_evaluate = train.evaluate
    real = getattr(train, place)

    def interrupted(run, *args):
        if run.state.step == step and calls:
            calls.append(place)
            os.kill(os.getpid(), number)
        return real(run, *args)

    def evaluate(run):
        if run.state.step == step:
            calls.append("evaluate")
        real_evaluate(run)

    monkeypatch.setattr(train, "evaluate", evaluate)
    monkeypatch.setattr(train, place, interrupted)
    with pytest.raises(SystemExit) as e:
        main(again)
    assert e.value.code == 128 + number and f"stopped by signal {number} after step {step}, saved" in capsys.readouterr().out
    assert calls.count("keep_generating") <= 1
    assert not log.was_evaluated(log.read(again[0]["out_dir"]), step)
    assert checkpoint.list_checkpoints(again[0]["out_dir"])[-1].name == f"{step:08}"
    assert not (Path(again[0]["out_dir"]) / "hf").exists()
    monkeypatch.undo()
    run(again)
    assert records(again[0]) == records(whole[0])
    assert (Path(again[0]["out_dir"]) / "hf" / "model.safetensors").is_file()
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_record_signals_takes_sighup_unless_it_is_ignored():
    """A terminal that is closed sends it, and a run under nohup continues."""
    previous = signal.getsignal(signal.SIGHUP)
    for handler, want in ((lambda *args: None, [signal.SIGHUP]), (signal.SIG_IGN, [])):
        signal.signal(signal.SIGHUP, handler)
        received = []
        with train.record_signals(received):
            signal.raise_signal(signal.SIGHUP)
        assert received == want and signal.getsignal(signal.SIGHUP) == handler
    signal.signal(signal.SIGHUP, previous)


def test_train_waits_for_a_checkpoint_if_an_evaluation_fails(tiny, monkeypatch):
    """The process ends with the error, and would cut off the thread that writes."""
    loaded = tiny("max_steps=2", "save_every=1", "eval_every=1")
    write = checkpoint.Saver.write
    monkeypatch.setattr(checkpoint.Saver, "write", lambda *args: time.sleep(0.5) or write(*args))

    def out_of_memory(run):
        if run.state.step:
            raise MemoryError
    monkeypatch.setattr(train, "evaluate", out_of_memory)
    with pytest.raises(MemoryError):
        main(loaded)
    assert [p.name for p in checkpoint.list_checkpoints(loaded[0]["out_dir"])] == ["00000001"]


def test_resume_after_data_root_has_moved(tiny, tmp_path, chats):
    """Its files have other paths and times, and are the same."""
    for root in ("here", "there"):
        (tmp_path / root).mkdir()
        shutil.copy(chats, tmp_path / root / "chats.jsonl")
        more = [f"data_root={tmp_path / root}", "data.train.chats.path=chats.jsonl", "max_steps=2", "eval_every=0"]
        run(tiny(*more))
        (tmp_path / root / "chats.jsonl").unlink()


def test_export_ends_at_a_signal_and_is_made_by_the_next_start(tiny, monkeypatch):
    """The folder exists complete or not at all, and nothing else is left beside it."""
    loaded = tiny("checkpoint.export=true", "eval_every=0", "max_steps=2")
    out = Path(loaded[0]["out_dir"])
    real = M.save_pretrained

    def interrupted(*args, **options):
        real(*args, **options)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(M, "save_pretrained", interrupted)
    with pytest.raises(SystemExit) as e:
        main(loaded)
    assert e.value.code == 128 + signal.SIGTERM
    assert sorted(p.name for p in out.iterdir()) == [".lock", "checkpoints", "code", "config.yaml", "documents.txt",
                                                     "metrics.jsonl", "starts.jsonl"]
    monkeypatch.undo()
    main(loaded)
    assert (out / "hf" / "model.safetensors").is_file()


def test_export_on_a_full_disk_is_made_by_the_next_start(tiny, monkeypatch):
    """The training is saved, and the message says so."""
    loaded = tiny("checkpoint.export=true", "eval_every=0", "max_steps=2")
    hf = Path(loaded[0]["out_dir"]) / "hf"

    def full_disk(*args, **options):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(M, "save_pretrained", full_disk)
    with pytest.raises(configs.UserError, match=f"^{hf}: .*No space left.*same command exports it again"):
        main(loaded)
    monkeypatch.undo()
    main(loaded)
    assert (hf / "model.safetensors").is_file()


def test_finish_saving_is_not_interrupted(tiny, monkeypatch):
    """A signal during the last save is seen after it; one after that, by the process itself."""
    loaded = tiny("eval_every=0", "max_steps=2")
    real = checkpoint.commit

    def commit(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        real(*args)

    monkeypatch.setattr(checkpoint, "commit", commit)
    with pytest.raises(SystemExit) as e:
        main(loaded)
    assert e.value.code == 128 + signal.SIGTERM
    assert [p.name for p in checkpoint.list_checkpoints(loaded[0]["out_dir"])] == ["00000002"]


def test_evaluate_says_what_it_does(tiny, capsys):
    """The answers may take longer than all steps, and nothing else is printed meanwhile."""
    run(tiny("max_steps=1"))
    lines = capsys.readouterr().out.splitlines()
    [first, _] = [i for i, line in enumerate(lines) if line == "evaluating 4 documents and 4 answers of at most 8 tokens"]
    assert lines[first + 1].startswith("step 0/1  validation: ")


def test_evaluate_logs_plain_nll_beside_another_loss(tiny):
    """Runs with different losses compare by it, and `best` may name it."""
    loaded = tiny("max_steps=1", "model.loss=dft", "eval_prompts=0", "best=val/chats/nll")
    run(loaded)
    loss, nll = records(loaded[0], "val/chats/loss", "val/chats/nll")[0]
    assert 5 < nll < 6 and 0 < loss < 0.1                            # p = 1/259: log(259), and a 259th of it


def test_setup_refuses_a_folder_in_use(tiny):
    """The same command started twice at once; a killed process leaves no lock."""
    loaded = tiny("eval_every=0", "max_steps=1")
    ready, tell = os.pipe()
    child = os.fork()
    if not child:
        _lock = checkpoint.lock_folder(loaded[0]["out_dir"])
        os.write(tell, b".")
        signal.pause()
    os.read(ready, 1)
    with pytest.raises(configs.UserError, match=f"^out_dir: .* is in use by process {child} on .*out_dir=NEW") as e:
        main(loaded)
    assert "\n" not in str(e.value)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert run(loaded) and run(loaded)


def test_train_saves_before_a_due_evaluation_after_a_signal(tiny, monkeypatch):
    """The time between a signal and the end of the process may be short; the resumed run evaluates."""
    whole = tiny(out="whole")
    again = tiny(out="again")
    run(whole)
    evaluated_steps = []
    real_evaluate = train.evaluate
    real_train_step = train.train_step

    def evaluate(run):
        evaluated_steps.append(run.state.step)
        real_evaluate(run)

    def train_step(*args):
        if len(log.read(again[0]["out_dir"])) == 9:      # step 10: the evaluation of 0, and 8 steps
            os.kill(os.getpid(), signal.SIGTERM)
        return real_train_step(*args)

    monkeypatch.setattr(train, "evaluate", evaluate)
    monkeypatch.setattr(train, "train_step", train_step)
    with pytest.raises(SystemExit):
        main(again)
    assert evaluated_steps == [0]
    assert checkpoint.list_checkpoints(again[0]["out_dir"])[-1].name == "00000010"
    monkeypatch.setattr(train, "train_step", real_train_step)
    run(again)
    assert evaluated_steps == [0, 10, 20, 25] and records(again[0]) == records(whole[0])


@pytest.fixture
def slow_down(monkeypatch):
    """slow_down(owner, name): each call of owner.name takes 1000 s more, by the clock."""
    clock = time.perf_counter
    passed = []
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + sum(passed))

    def replace(owner, name):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: passed.append(1000) or function(*args))
    return replace


def test_train_measures_throughput_without_evaluations(tiny, slow_down):
    loaded = tiny("max_steps=12", "eval_every=10")
    slow_down(train, "evaluate")
    main(loaded)
    steps = [row for row in records(loaded[0], "tokens", "tok_per_s") if row[0]]
    assert len(steps) == 12 and all(tokens / tok_per_s < 500 for tokens, tok_per_s in steps)


def test_train_logs_save_wait_also_if_an_evaluation_follows_the_save(tiny, slow_down):
    loaded = tiny("max_steps=4", "save_every=1", "eval_every=1", "log_every=1")
    slow_down(checkpoint.Saver, "save")
    main(loaded)
    waits = [wait for wait, in records(loaded[0], "save_wait") if wait is not None]
    assert len(waits) == 4 and waits[0] == 0 and min(waits[1:]) > 0.5


# ---- the step

def test_adamw_equals_torch_bitwise_without_importing_dynamo(tiny, script):
    c = tiny("lr=1e-2")[0]
    models = [M.build(c["model"] | {"vocab_size": 50}) for _ in range(2)]
    ours = train.make_optimizer(models[0], c)
    pairs = dict(zip(models[0].parameters(), models[1].parameters()))
    groups = [group | {"params": [pairs[p] for p in group["params"]]} for group in ours.param_groups]
    theirs = torch.optim.AdamW(groups, fused=True)
    for n in range(3):
        for p, q in pairs.items():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(n)) if n or p.dim() == 2 else None
            q.grad = None if p.grad is None else p.grad.clone()
        ours.step(), theirs.step()
        assert all(torch.equal(p, q) for p, q in pairs.items())
    ours.zero_grad()
    assert all(p.grad is None for p in pairs)
    code = ("import sys, torch, configs, model as M, train; "
            "c = configs.load(['model.vocab_size=9'])[0]; "
            "train.make_optimizer(M.build(c['model']), c); "
            "print('torch._dynamo' in sys.modules)")
    out = script("-c", code)
    assert out.stdout.strip() == "False", out.stderr


def test_round_stochastically_is_right_on_average():
    """The two neighbours in bf16, with the probabilities of their distances; also below 0."""
    spacing = 2.0 ** -7
    random = M.random_int32(M.hash_int32(torch.arange(400)), 400)
    for sign in (1, -1):
        x = torch.full((400, 400), sign * (1 + 0.3 * spacing))
        for noise in (random, random >> 16, random ^ (random >> 16)):
            rounded = train.round_stochastically(x, noise).float()
            assert set(rounded.unique().tolist()) == {sign * 1.0, sign * (1 + spacing)}
            assert float(rounded.mean() - sign) / (sign * spacing) == pytest.approx(0.3, abs=0.01)
    exact = torch.tensor([0.0, 1.5, -3.0])
    assert torch.equal(train.round_stochastically(exact, torch.full((3,), 0xffff, dtype=torch.int32)).float(), exact)


def test_low_precision_adamw_equals_torch_on_average(tiny):
    """Updates of a hundredth of bf16's spacing add up. Chunks of rows do not change the result."""
    def after(steps, chunk, **dtypes):
        c = tiny("weight_decay=0.1")[0]
        c["shard"] |= dtypes
        start = torch.full((64, 128), 1.0)
        p = torch.nn.Parameter(start.to(getattr(torch, c["shard"]["master_dtype"])))
        group = {"params": [p], "names": ["w"], "lr": 1e-4, "weight_decay": 0.1}
        optimizer = train.adamw([group], c)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shard, "UPDATE_CHUNK", chunk)
            for n in range(steps):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(n)).add(1).to(p.dtype)
                optimizer.step()
        return optimizer, p.detach()
    reference, exact = after(60, 1)
    assert isinstance(reference, train.AdamW)
    for master, moment in (("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")):
        dtypes = {"master_dtype": master, "moment_dtype": moment}
        optimizer, p = after(60, 1 << 20, **dtypes)
        [state] = optimizer.state.values()
        assert str(p.dtype) == f"torch.{master}" and str(state["exp_avg"].dtype) == f"torch.{moment}"
        change = float((exact - 1).mean())
        assert float((p.float() - 1).mean()) == pytest.approx(change, rel=0.05), dtypes
        for key in ("exp_avg", "exp_avg_sq"):
            [expected] = [s[key] for s in reference.state.values()]
            assert float(state[key].float().mean()) == pytest.approx(float(expected.mean()), rel=0.01)
        assert torch.equal(after(60, 300, **dtypes)[1], p)


FP16 = ["dtype=float16", "eval_every=0"]


def test_float16_trains_as_float32_does(tiny):
    """Gradients are unscaled, whatever their scale; the scale is logged."""
    exact = run(tiny("max_steps=10", "lr=1e-3", "eval_every=0", out="exact"))
    loaded = tiny(*FP16, "max_steps=10", "lr=1e-3")
    half = run(loaded)
    assert float((losses(half) / losses(exact) - 1).abs().max()) < 2e-3
    pairs = zip(records(loaded[0], "grad_norm", "loss_scale"), records(tiny(out="exact")[0], "grad_norm"))
    for (norm, scale), (exact_norm,) in pairs:
        assert scale == 65536 and norm == pytest.approx(exact_norm, rel=0.02)


def test_float16_halves_the_loss_scale_on_overflow(tiny, monkeypatch, capsys):
    """Such steps make no update, and are not among the bad_steps."""
    monkeypatch.setattr(train, "FIRST_LOSS_SCALE", 2.0**26)
    loaded = tiny(*FP16, "max_steps=12", "bad_steps=1", "save_every=1", "checkpoint.keep=99")
    run(loaded)
    rows = records(loaded[0], "step", "loss_scale", "skipped", "loss")
    assert [scale for _, scale, _, _ in rows[:2]] == [2.0**26, 2.0**25]
    n_skipped = rows[-1][2]
    assert 2 <= n_skipped < 12 and rows[-1][1] == 2.0**(26 - n_skipped)
    assert all(math.isfinite(loss) for *_, loss in rows)
    assert f"the loss scale is now {2.0**25:g}" in capsys.readouterr().out
    for step, scale, skipped, _ in rows[1:]:
        a, b = (weights(loaded[0], s)["model.safetensors"] for s in (step - 1, step))
        was_skipped = skipped > rows[step - 2][2]
        assert all(torch.equal(a[n], b[n]) for n in a) == was_skipped


def test_adjust_loss_scale_doubles_after_good_steps_and_has_a_least_value():
    state = types.SimpleNamespace(dtype="float16", loss_scale=4.0, good_steps=0)
    for _ in range(1999):
        assert not train.adjust_loss_scale(state, 1.0, True)
    assert state.loss_scale == 4 and not train.adjust_loss_scale(state, 1.0, True) and state.loss_scale == 8
    assert [train.adjust_loss_scale(state, 1.0, False) for _ in range(4)] == [True, True, True, False]
    assert state.loss_scale == 1 and state.good_steps == 0
    state.loss_scale = 8.0
    assert not train.adjust_loss_scale(state, math.nan, False) and state.loss_scale == 8
    other = types.SimpleNamespace(dtype="bfloat16", loss_scale=1.0, good_steps=0)
    assert not train.adjust_loss_scale(other, 1.0, False) and other.loss_scale == 1


def test_bad_steps_counts_float16_overflows_at_the_least_loss_scale(tiny, monkeypatch):
    monkeypatch.setattr(train, "FIRST_LOSS_SCALE", 2.0**32)
    monkeypatch.setattr(train, "LEAST_LOSS_SCALE", 2.0**31)
    with pytest.raises(configs.UserError, match="bad_steps: 3 steps in a row, up to step 4"):
        run(tiny(*FP16, "bad_steps=3"))


def test_unscale_gradients_serves_experiments_with_gradients_per_micro_batch(tiny):
    """micro_batch_gradients yields unscaled gradients, too."""
    c = tiny(*FP16, "model.vocab_size=50")[0]
    model = M.build(c["model"])
    model.dtype = torch.float16
    batch = M.pack_prompts([list(range(20)), [1, 2, 3]])
    batch |= {"targets": batch["tokens"].flip(0), "loss_weights": torch.ones(23), "doc_ids": torch.arange(2)}
    results = []
    for scale in (1.0, 1024.0):
        model.loss_scale = scale
        [(loss, _, gradients)] = train.micro_batch_gradients(model, [batch], 23.0)
        results.append((loss, torch.cat([g.flatten() for g in gradients])))
    assert results[0][0] == results[1][0]
    assert float((results[0][1] - results[1][1]).norm() / results[1][1].norm()) < 0.01


def test_muon_equals_torch_on_every_matrix(tiny):
    c = tiny("optimizer=muon", "lr=1e-2", "weight_decay=0.1")[0]
    model = M.build(c["model"] | {"vocab_size": 50})
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = train.make_optimizer(model, c)
    random = lambda shape, seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    grads = [{name: random(p.shape, n) for name, p in start.items()} for n in range(3)]
    alone = {name: torch.nn.Parameter(p.clone()) for name, p in start.items() if M.is_block_matrix(name, p)}
    assert len(alone) == 7 * c["model"]["n_layers"]
    theirs = torch.optim.Muon(alone.values(), lr=1e-2, weight_decay=0.1, momentum=c["momentum"],
                              adjust_lr_fn="match_rms_adamw")
    embed = torch.nn.Parameter(start["embed.weight"].clone())
    adamw = torch.optim.AdamW([embed], lr=1e-2, betas=c["betas"], eps=c["eps"], weight_decay=0.1)
    for step in grads:
        for name, p in model.named_parameters():
            p.grad = step[name].clone()
        for name, p in alone.items():
            p.grad = step[name].clone()
        embed.grad = step["embed.weight"].clone()
        for o in (optimizer, theirs, adamw):
            o.step()
    for name, p in alone.items():
        assert torch.allclose(model.get_parameter(name), p, atol=2e-4), name
    assert torch.allclose(model.embed.weight, embed, atol=1e-7) and all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("optimizer, lr", [("muon", "1e-2"), ("sgd", "0.3")])
def test_optimizers_reduce_the_loss(tiny, optimizer, lr):
    rows = run(tiny(f"optimizer={optimizer}", f"lr={lr}", "max_steps=40", "eval_every=0"))
    assert rows[-1][1] < rows[0][1] - 1


def test_make_param_groups_applies_lr_and_weight_decay(tiny):
    c = tiny("param_groups=[{match: embed, lr: 0.0, weight_decay: 0.0}, {match: mlp, weight_decay: 0.5}]")[0]
    model = M.build(c["model"] | {"vocab_size": 50})
    of = {id(p): group for group in train.make_optimizer(model, c).param_groups for p in group["params"]}
    said = {name: (of[id(p)]["lr_scale"], of[id(p)]["weight_decay"]) for name, p in model.named_parameters()}
    assert said["embed.weight"] == (0.0, 0.0) and said["blocks.1.mlp.up_proj.weight"] == (1.0, 0.5)
    assert said["blocks.0.attn.q_proj.weight"] == (1.0, c["weight_decay"]) and said["norm.weight"] == (1.0, 0.0)
    run(tiny("param_groups=[{match: embed, lr: 0.0, weight_decay: 0.0}]", "max_steps=3", "save_every=3", out="still"))
    still = weights(tiny(out="still")[0], 3)["model.safetensors"]
    fresh = M.build(tiny()[0]["model"] | {"vocab_size": 259})
    assert torch.equal(still["embed.weight"], fresh.embed.weight)
    assert not torch.equal(still["norm.weight"], fresh.norm.weight)


@pytest.mark.parametrize("more", [[FROZEN], ["param_groups=[{match: lora_A, train: false}]", "shard.lora.r=2"]])
def test_frozen_parameters_keep_their_values_in_checkpoints_and_exports(tiny, more):
    """Full fine-tuning saves them, too. Under LoRA, adapters are saved although they are frozen."""
    loaded = tiny(*more, "max_steps=3", "save_every=3", "eval_every=0", "checkpoint.export=true")
    run(loaded)
    saved = weights(loaded[0], 3)
    fresh = M.build(loaded[0]["model"] | {"vocab_size": 259})
    exported = M.load(Path(loaded[0]["out_dir"]) / "hf")[0]
    assert torch.equal(exported.embed.weight, fresh.embed.weight)
    assert not torch.equal(exported.blocks[0].attn.q_proj.weight, fresh.blocks[0].attn.q_proj.weight)
    trained = {name.rpartition("/")[0] for name in saved["optimizer.safetensors"]}
    frozen = saved["model.safetensors"].keys() - trained
    pattern = loaded[0]["param_groups"][0]["match"]
    assert frozen and frozen == {name for name in saved["model.safetensors"] if pattern in name}


def register_nan_loss(monkeypatch):
    """Register the loss `touchy`: not a number where token 66 ("B") is the target."""
    real = M.cross_entropy
    loss = lambda logits, targets: real(logits, targets) + torch.where(targets == 66, math.nan, 0.0)
    monkeypatch.setitem(M.LOSSES, "touchy", loss)


def test_train_step_skips_a_non_finite_step_and_names_its_documents(tiny, monkeypatch, capsys):
    register_nan_loss(monkeypatch)
    loaded = tiny("model.loss=touchy", "batch_size=1", "max_steps=12", "eval_every=0", "bad_steps=0", "save_every=1",
                  "checkpoint.keep=99")
    run(loaded)
    rows, said = records(loaded[0], "step", "loss", "skipped"), capsys.readouterr().out
    tokens = tokenize_data.load_datasets(loaded[0], quiet=True)["train"]["chats"]
    count = 0
    for step, loss, skipped in rows:
        index = int(sampler.documents(step - 1, loaded[0], {"chats": len(tokens)})[0])
        ids, mask = tokens.document(index)
        hit = bool(((ids[1:] == 66) & (mask[1:] == 1)).any())
        count += hit
        assert (loss is None) == hit and skipped == count and (f"step {step}: loss nan" in said) == hit
        assert not hit or f"not finite: document chats {index}\n" in said
        if step > 1:
            a, b = (weights(loaded[0], s)["model.safetensors"] for s in (step - 1, step))
            assert all(torch.equal(a[n], b[n]) for n in a) == hit
    assert 0 < count < 12
    for folder in checkpoint.list_checkpoints(loaded[0]["out_dir"])[5:]:
        shutil.rmtree(folder)
    run(loaded)
    assert records(loaded[0], "step", "loss", "skipped") == rows


def test_bad_steps_ends_the_run(tiny, monkeypatch):
    monkeypatch.setitem(M.LOSSES, "none", lambda logits, targets: M.cross_entropy(logits, targets) * math.inf)
    with pytest.raises(ValueError, match="bad_steps: 3 steps in a row, up to step 3"):
        run(tiny("model.loss=none", "bad_steps=3", "eval_every=0"))


class Lion(torch.optim.Optimizer):
    """arXiv:2302.06675, as people paste it: its state is created in the first step."""

    def __init__(self, params, lr=1e-4, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"] = torch.zeros_like(p)
                p.add_(torch.lerp(p.grad, state["exp_avg"], group["beta"]).sign_(), alpha=-group["lr"])
                state["exp_avg"].lerp_(p.grad, 1 - group["beta"])


def test_make_optimizer_binds_options_and_creates_state(tiny, monkeypatch):
    """An optimizer of one's own takes optimizer_options, and resumes bitwise though it creates its state late."""
    monkeypatch.setitem(train.OPTIMIZERS, "lion", lambda groups, cfg, beta=0.9: Lion(groups, beta=beta))
    more = ["optimizer=lion", "optimizer_options.beta=0.8", "lr=1e-3", "max_steps=6", "eval_every=0", "save_every=3",
            "checkpoint.keep=9"]
    whole = tiny(*more, out="whole")
    rows = run(whole)
    final = weights(whole[0], 6)
    assert rows[-1][1] < rows[0][1] and any(name.endswith("/exp_avg") for name in final["optimizer.safetensors"])
    shutil.rmtree(Path(whole[0]["out_dir"]) / "checkpoints" / "00000006")
    assert run(whole) == rows
    again = weights(whole[0], 6)
    assert all(torch.equal(final[f][n], again[f][n]) for f in final for n in final[f])
    with pytest.raises(configs.UserError, match="optimizer_options.gamma"):
        main(tiny("optimizer=lion", "optimizer_options.gamma=0.8"))


def test_micro_batch_gradients_add_up_to_forward_backward(tiny):
    c = tiny("micro_tokens=80", "data.seq_len=80")[0]
    tok = tokenize_data.load_tokenizer(c)
    dataset = sampler.Dataset(tokenize_data.load_datasets(c, tok, quiet=True)["train"])
    model = M.build(train.resolve_model(c, tok)[0], c["seed"])
    micro_batches, _ = sampler.load_micro_batches(sampler.documents(0, c, dataset.sizes), c, dataset)
    weight = sampler.sum_loss_weights(micro_batches)
    micro_batches = [train.pin_tensors(mb, torch.device("cpu")) for mb in micro_batches]
    assert len(micro_batches) > 1
    loss, documents = train.forward_backward(model, micro_batches, weight, c)
    want = [p.grad.clone() for p in model.parameters()]
    total = [torch.zeros_like(p) for p in model.parameters()]
    losses_seen = []
    for micro_loss, (doc_ids, stats), gradients in train.micro_batch_gradients(model, micro_batches, weight):
        losses_seen.append(micro_loss)
        assert len(doc_ids) == len(stats["loss"])
        for sum_, gradient in zip(total, gradients):
            sum_ += gradient
    assert sum(losses_seen) == pytest.approx(float(loss), rel=1e-6)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(want, total))


def test_loss_weight_follows_an_edit_of_collate(tiny, monkeypatch):
    """Doubling all loss weights in collate changes nothing: the denominator comes from the same array."""
    more = ["max_steps=3", "eval_every=0"]
    want = run(tiny(*more, out="plain"))
    collate = sampler.collate
    def doubled(*args, **kwargs):
        micro_batch = collate(*args, **kwargs)
        return micro_batch | {"loss_weights": 2 * micro_batch["loss_weights"]}
    monkeypatch.setattr(sampler, "collate", doubled)
    got = run(tiny(*more, out="doubled"))
    assert [loss for _, loss, _ in got] == pytest.approx([loss for _, loss, _ in want], rel=1e-6)


def test_metrics_are_logged_and_can_be_best(tiny, monkeypatch):
    monkeypatch.setitem(train.METRICS, "first_letter", lambda answer, reference: answer[:1] == reference[:1])
    loaded = tiny("max_steps=2", "best=max val/chats/first_letter")
    run(loaded)
    values = [v for v, in records(loaded[0], "val/chats/first_letter") if v is not None]
    assert len(values) == 2 and all(0 <= v <= 1 for v in values)


# ---- edited code and data

@pytest.fixture
def copied(tmp_path, chats):
    """A copy of the scripts that a test may edit: copied(*argv) runs train.py there."""
    for pattern in ("*.py", "configs/*"):
        for path in configs.HERE.parent.glob(pattern):
            if path.is_file():
                (tmp_path / path.parent.relative_to(configs.HERE.parent)).mkdir(exist_ok=True)
                shutil.copy(path, tmp_path / path.relative_to(configs.HERE.parent))
    base = [f"data.train.chats.path={chats}", "data.tokenizer=bytes", "model.n_layers=2", "model.d_model=32",
            "batch_size=4", "micro_tokens=400", "max_steps=4", "epochs=0", "eval_every=0", "save_every=2", "log_every=1",
            "dtype=float32", "checkpoint.export=false", "out_dir=out/run", "checkpoint.keep=9"]

    def start(*more, ranks=1):
        launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--nproc_per_node", ranks]
        done, = launch.run([*launcher, "train.py", *base, *more], cwd=tmp_path)
        return done
    start.folder = tmp_path
    return start


def test_setup_refuses_changed_code_and_names_the_ways_on(copied):
    """The same command after an edit is refused by the file's name; resume=latest continues, resume=never starts over."""
    assert copied().returncode == 0
    run_folder = copied.folder / "out" / "run"
    assert (run_folder / "code" / "model.py").read_text() == (copied.folder / "model.py").read_text()
    with open(copied.folder / "model.py", "a") as f:
        f.write("\nEDITED = True\n")
    refused = copied()
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    assert all(words in refused.stderr for words in ("model.py", "out_dir=", "resume=never", "resume=latest"))
    assert "sampler.py" not in refused.stderr
    shutil.rmtree(run_folder / "checkpoints" / "00000004")
    assert copied("resume=latest").returncode == 0
    state = checkpoint.read_state(run_folder / "checkpoints" / "00000004")
    assert state["changes"] == [{"step": 2, "what": ["model.py"]}]
    assert "EDITED" not in (run_folder / "code" / "model.py").read_text()
    assert "EDITED" in next(run_folder.glob("code-*/model.py")).read_text()
    assert copied().returncode == 0                                   # the new code is this run's code from now on
    with open(copied.folder / "sampler.py", "a") as f:
        f.write("\nEDITED = True\n")
    assert "sampler.py" in copied().stderr
    again = copied("resume=never")
    assert again.returncode == 0 and "step 4/4" in again.stdout
    assert checkpoint.read_state(run_folder / "checkpoints" / "00000004")["changes"] == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_run_shows_the_traceback_of_a_bug_in_an_edited_script(copied, ranks):
    """A ValueError that Python raises in an edited line keeps file, line and traceback."""
    path = copied.folder / "sampler.py"
    text = path.read_text()
    line = "def collate("
    body = text.index('"""\n', text.index('"""', text.index(line)) + 3) + 4
    path.write_text(text[:body] + "    a, b = [1, 2, 3]\n" + text[body:])
    out = copied(ranks=ranks)
    assert out.returncode != 0
    assert "Traceback" in out.stderr and "a, b = [1, 2, 3]" in out.stderr and "too many values to unpack" in out.stderr
    assert re.search(r'sampler.py", line \d+, in collate', out.stderr)


def test_setup_refuses_changed_data_and_names_the_ways_on(tiny, tmp_path, chats):
    path = tmp_path / "mine.jsonl"
    lines = chats.read_text().splitlines(keepends=True)
    path.write_text("".join(lines))
    more = ["max_steps=4", "save_every=2", "eval_every=0", f"data.train.chats.path={path}", "checkpoint.keep=9"]
    run(tiny(*more))
    path.write_text("".join(lines[:-1]))
    with pytest.raises(configs.UserError) as e:
        main(tiny(*more))
    assert all(words in str(e.value) for words in ("chats", "out_dir=", "resume=never", "resume=latest"))
    run(tiny(*more, "resume=latest"))
    run(tiny(*more, "resume=never"))


# ---- when a run ends

def test_max_seconds_ends_the_run(tiny, capsys):
    loaded = tiny("max_steps=100000", "max_seconds=1.5", "eval_every=1.0", "checkpoint.export=true", "log_every=1000")
    run(loaded)
    last = records(loaded[0], "step", "val/chats/loss", "loss")
    step = last[-1][0]
    assert 3 < step < 100000 and last[-1][1] is not None and any(s == step and loss is not None for s, _, loss in last)
    out = Path(loaded[0]["out_dir"])
    assert [p.name for p in checkpoint.list_checkpoints(out)] == [f"{step:08}"]
    assert "max_seconds is reached" in capsys.readouterr().out
    assert (out / "hf" / "model.safetensors").is_file()
    before = (out / "metrics.jsonl").read_text()
    run(loaded)
    assert (out / "metrics.jsonl").read_text() == before


def test_best_checkpoint_is_kept_and_exported_and_patience_ends_the_run(tiny, script):
    more = ["max_steps=40", "eval_every=4", "checkpoint.keep=1", "best=max val/chats/loss", "patience=3",
            "checkpoint.export=true"]
    loaded = tiny(*more)
    run(loaded)
    out = Path(loaded[0]["out_dir"])
    figures = [(loss, step) for step, loss in records(loaded[0], "step", "val/chats/loss") if loss is not None and step]
    best, last = max(figures)[1], figures[-1][1]
    assert last == best + 12 < 40                                      # the wrong way round, it gets worse and worse
    assert [p.name for p in checkpoint.list_checkpoints(out)] == [f"{best:08}", f"{last:08}"]
    assert (out / "checkpoints" / "best").resolve().name == f"{best:08}"
    exported, kept = load_file(out / "hf" / "model.safetensors"), weights(loaded[0], best)["model.safetensors"]
    assert torch.equal(exported["model.embed_tokens.weight"], kept["embed.weight"])
    listing = script("checkpoint.py", "ls", out).stdout.splitlines()[1:]
    assert [line.split()[-1] for line in listing] == ["best", "latest"]
    before = (out / "metrics.jsonl").read_text()
    run(loaded)
    assert (out / "metrics.jsonl").read_text() == before
    seen = [{"step": i, "val/x": x} for i, x in enumerate((9, 1, 2, 2))]
    assert log.sort_steps_by(seen, "max val/x") == ([2, 3, 1], 1) and log.sort_steps_by([], "x") == ([], 0)


def test_resume_after_an_early_end_evaluates_and_exports_again(tiny):
    more = ["max_steps=100000", "eval_every=1.0", "checkpoint.export=true", "log_every=1000", "best=val/chats/loss"]
    loaded = tiny(*more, "max_seconds=1")
    run(loaded)
    out, whole = Path(loaded[0]["out_dir"]), records(loaded[0])
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    # as if killed between the last save and its evaluation
    (out / "metrics.jsonl").write_text("".join(lines[:-1]))
    shutil.rmtree(out / "hf")
    (out / "checkpoints" / "best").unlink()
    run(loaded)
    assert records(loaded[0]) == whole
    assert (out / "checkpoints" / "best").resolve() == (out / "checkpoints" / "latest").resolve()
    first = load_file(out / "hf" / "model.safetensors")
    run(tiny(*more, "max_seconds=2"))
    last = checkpoint.list_checkpoints(out)[-1]
    assert int(last.name) > whole[-1]["step"]
    embed = "model.embed_tokens.weight"
    exported = load_file(out / "hf" / "model.safetensors")
    best = load_file(out / "checkpoints" / "best" / "model.safetensors")
    assert torch.equal(exported[embed], best["embed.weight"]) and not torch.equal(exported[embed], first[embed])


def test_best_can_be_set_for_a_finished_run(tiny):
    more = ["max_steps=8", "eval_every=2", "save_every=2", "checkpoint.keep=9"]
    run(tiny(*more))
    asked = tiny(*more, "best=max val/chats/loss")
    run(asked)
    out, figures = Path(asked[0]["out_dir"]), records(asked[0], "val/chats/loss", "step")
    best = max(f for f in figures if f[0] is not None and f[1])[1]
    assert (out / "checkpoints" / "best").resolve().name == f"{best:08}"
    shutil.rmtree((out / "checkpoints" / "best").resolve())            # its best is gone: the best of what is there
    run(asked)
    assert (out / "checkpoints" / "best" / "state.json").is_file()


def test_profile_writes_a_trace_and_changes_nothing(tiny, capsys):
    loaded = tiny("max_steps=4", "eval_every=0", "profile=3", "save_every=2")
    plain = run(tiny("max_steps=4", "eval_every=0", "save_every=2", out="plain"))
    assert run(loaded) == plain                                        # looking changes nothing
    said, trace = capsys.readouterr().out, json.loads(Path(loaded[0]["out_dir"], "trace.json").read_text())
    assert "outside matrix products and attention" in said and "aten::mm" in said
    assert re.search(r"\d ms in the operating system", said)
    assert any(e.get("name") == "aten::mm" for e in trace["traceEvents"])
    for data, save in records(loaded[0], "data_wait", "save_wait"):
        assert 0 <= data < 1 and 0 <= save < 1


@pytest.mark.parametrize("more", [[], ["shard.lora.r=4", "dtype=bfloat16"], ["optimizer=muon", "shard.recompute=true"],
                                  ["model.resid_pdrop=0.1"]])
def test_train_step_syncs_with_the_device_once(tiny, monkeypatch, more):
    """Numbers read from tensors while a step runs, by who reads them, however many rows and blocks it has."""
    step, reads, here = train.train_step, [], Path(train.__file__).parent

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._local_scalar_dense.default:
                ours = [f.name for f in traceback.extract_stack() if Path(f.filename).parent == here]
                reads[-1].append(ours[-1])
            return function(*args, **kwargs or {})

    def watched(model, optimizer, rows, *args):
        assert len(rows) > 1 and len(model.blocks) > 1
        reads.append([])
        with Watch():
            return step(model, optimizer, rows, *args)

    monkeypatch.setattr(train, "train_step", watched)
    run(tiny("max_steps=3", "eval_every=0", "micro_tokens=80", "data.seq_len=80", *more))
    assert len(reads) == 3
    for names in reads:                                                # how documents lie is asked on a CPU only
        assert [name for name in names if name != "lengths"] == ["train_step"]


def test_continuation_in_another_folder_is_one_curve(tiny):
    """Longer and with another lr: its records begin with those of the old run, up to the checkpoint."""
    more = ["eval_every=2", "save_every=2", "eval_prompts=0", "checkpoint.keep=9"]
    old = tiny(*more, "max_steps=6", out="old")
    run(old)
    whole = log.read(old[0]["out_dir"])
    path = Path(old[0]["out_dir"]) / "checkpoints" / "00000004"
    # lr 0 and patience: the first of equal losses is the best, and only those of this folder count
    new = tiny(*more, "max_steps=30", "lr=0", f"resume={path}", "best=val/chats/loss", "patience=2", out="new")
    for _ in range(2):                                       # the second start trains nothing
        run(new)
        kept = log.read(new[0]["out_dir"])
        assert kept[:7] == whole[:7] and kept[6]["step"] == 4 and "val/chats/loss" in kept[6]
        assert [record["step"] for record in kept[7:]] == [5, 6, 6, 7, 8, 8, 9, 10, 10]
        assert (Path(new[0]["out_dir"]) / "checkpoints" / "best").resolve().name == "00000006"
    assert log.read(old[0]["out_dir"]) == whole


@pytest.mark.parametrize("status", ["finished", "failed", "killed"])
def test_main_tells_trackers_how_the_run_ended(tiny, monkeypatch, status):
    ends = []

    class Ends(log.Backend):
        def __init__(self, cfg, folder, run_id, about):
            ends.append(about)

        def close(self, status):
            ends.append(status)

    def stop(*_):
        if status == "failed":
            raise RuntimeError("a mistake of ours")
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setitem(log.BACKENDS, "ends", Ends)
    if status != "finished":
        monkeypatch.setattr(train, "adjust_loss_scale", stop)
    loaded = tiny("max_steps=2", "eval_every=0", "log.to=[ends]")
    expected = {"finished": contextlib.nullcontext(), "failed": pytest.raises(RuntimeError, match="a mistake"),
                "killed": pytest.raises(SystemExit)}
    with expected[status]:
        main(loaded)
    about, *given = ends
    assert given == [status]
    assert about["explicit"] == configs.flat(loaded[2]) and about["git"] == (checkpoint.git_describe() or "unknown")


def test_wsd_run_can_be_extended_before_its_decay(tiny):
    wsd = ["schedule=wsd", "warmup_steps=2", "decay_steps=4", "eval_every=0", "save_every=4", "checkpoint.keep=9"]
    whole, again = tiny(*wsd, "max_steps=16", out="whole"), lambda n: tiny(*wsd, f"max_steps={n}", out="again")
    run(whole)
    run(again(12))
    with pytest.raises(ValueError, match="max_steps: 12 there, 16 here"):
        run(again(16))                                                 # its rate has gone down already
    shutil.rmtree(checkpoint.list_checkpoints(again(12)[0]["out_dir"])[-1])       # as if it had been stopped after step 8
    assert run(again(16)) == run(whole)
    with pytest.raises(ValueError, match="max_steps"):
        run(again(15))


# ---- evaluation and results

def test_evaluate_measures_exact_match_of_generated_answers(tiny):
    loaded = tiny("max_steps=300", "lr=5e-3", "eval_every=0.5", "model.d_model=64", "data.validation_split=0",
                  "data.validation.seen.path=${data.train.chats.path}", "eval_prompts=20", "eval_tokens=16",
                  "log_every=50")
    run(loaded)
    matches = [v for v, in records(loaded[0], "val/seen/exact_match") if v is not None]
    assert matches[0] == 0 and matches[-1] > 0.5                     # it has learned its 40 chats nearly by heart


def test_finish_leaves_the_folder_the_readme_shows(tiny):
    transformers = pytest.importorskip("transformers", reason="the reference, in requirements-dev.txt")
    loaded = tiny("max_steps=6", "checkpoint.export=true", "save_every=2", "checkpoint.keep=2")
    run(loaded)
    out = Path(loaded[0]["out_dir"])
    assert configs.load([str(out / "config.yaml")])[2] == loaded[2]
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["00000004", "00000006", "latest"]
    assert (out / "checkpoints" / "latest").resolve().name == "00000006"
    assert [p.name for p in out.glob(".*")] == [".lock"]
    for record in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        assert "step" in record and all(v is None or math.isfinite(v) for v in record.values())
    ours, theirs = M.load(out)[0], transformers.AutoModelForCausalLM.from_pretrained(out / "hf").eval()
    ids = torch.randint(259, (1, 40), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ours.logits(M.pack_prompts(ids.tolist())), theirs(ids).logits[0], atol=1e-5)
    tok = tokenize_data.huggingface_tokenizer(out / "hf")
    template = tokenize_data.compile_template(tok.template)
    prompt = tokenize_data.encode_prompt(tok, template, [{"role": "user", "content": "red green"}])
    got = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=20,
                          pad_token_id=0)[0, len(prompt):].tolist()
    stop = theirs.generation_config.eos_token_id
    assert sorted(stop) == [256, 258] and M.generate_all(ours, [prompt], 20, stop)[0] == [i for i in got if i not in stop]


def test_build_eval_prompts_takes_answers_that_end_in_a_line_break(tmp_path):
    """A template's {% generation %} block may hold the line break after the token that ends a turn."""
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}<|im_end|>\n{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "q", "completion": "a"}) + "\n")
    cfg = configs.load([f"data.validation.x.path={tmp_path / 'x.jsonl'}", f"data.train.x.path={tmp_path / 'x.jsonl'}",
                        "data.tokenizer=bytes", f"data.cache_dir={tmp_path / 'cache'}",
                        f"data.chat_template={tmp_path / 't.jinja'}"])[0]
    data = tokenize_data.load_datasets(cfg, quiet=True)
    tok = tokenize_data.load_tokenizer(cfg)
    for dataset in train.group_by_label(cfg, data).values():
        (prompt, answer), = M.build_eval_prompts(dataset, train.answer_stop_ids(cfg, tok), 4, 100)
        assert tok.decode(prompt).endswith("<|im_start|>assistant\n") and tok.decode(answer) == "a"


def test_lora_trains_adapters_only_and_peft_loads_them(tiny):
    peft = pytest.importorskip("peft", reason="the reference, in requirements-dev.txt")
    transformers = pytest.importorskip("transformers")
    base = tiny("max_steps=5", "checkpoint.export=true", out="base")
    run(base)
    folder = f"{base[0]['out_dir']}/hf"
    for targets in ("[]", "[q_proj, v_proj, down_proj]"):
        loaded = tiny(f"model.init_from={folder}", "shard.lora.r=4", f"shard.lora.targets={targets}", "max_steps=5",
                      "checkpoint.export=true", f"data.tokenizer={folder}", out=f"lora{len(targets)}")
        loaded = configs.load(_argv(loaded[2]))
        run(loaded)
        out = Path(loaded[0]["out_dir"])
        saved = weights(loaded[0], 5)["model.safetensors"]
        assert saved and all(name.endswith((".lora_A", ".lora_B")) for name in saved)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
        theirs = peft.PeftModel.from_pretrained(theirs, out / "adapter").eval()
        # the export of a checkpoint writes the same adapters
        checkpoint.export_checkpoint(out, out / "alone", "adapter=true")
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (out / "alone" / name).read_bytes() == (out / "adapter" / name).read_bytes()
        ids = torch.randint(259, (1, 30), generator=torch.Generator().manual_seed(0))
        merged, plain = M.load(out / "hf")[0], M.load(folder)[0]
        got, without = (model.logits(M.pack_prompts(ids.tolist())) for model in (merged, plain))
        assert torch.allclose(got, theirs(ids).logits[0], atol=1e-4) and not torch.allclose(got, without, atol=1e-3)
        assert torch.equal(merged.embed.weight, plain.embed.weight)


def _argv(explicit):
    """Explicit keys as a command line, the model's shape left to the imported folder."""
    flat = configs.flat(explicit)
    text = lambda v: f"[{', '.join(v)}]" if isinstance(v, list) else "null" if v is None else v
    return [f"{k}={text(v)}" for k, v in flat.items() if not k.startswith("model.") or k == "model.init_from"]


def test_lr_at_and_every_n_steps(tiny):
    def lrs(*more, total=100):
        c = configs.load(["lr=1.0", *more])[0]
        return [train.lr_at(s, total, c) for s in range(total)]
    for schedule in ("cosine", "linear", "constant", "wsd"):
        lr = lrs(f"schedule={schedule}", "warmup_steps=10")
        assert lr[0] == pytest.approx(0.1) and lr[9] == 1.0 and max(lr) == 1.0
        assert lr[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1)
    assert lrs("schedule=wsd", "warmup_steps=10", "decay_steps=20")[79] == 1.0 > lrs("schedule=wsd", "warmup_steps=10", "decay_steps=20")[80]
    assert lrs("warmup_steps=0.1") == lrs("warmup_steps=10") and lrs("warmup_steps=1.0")[-1] == 1.0 and lrs("warmup_steps=0")[0] < 1.0
    assert [s for s in range(1, 11) if train.every_n_steps(s, 0.25, 10)] == [3, 5, 8, 10]
    assert [s for s in range(1, 31) if train.every_n_steps(s, 0.1, 30)] == list(range(3, 31, 3))
    assert not train.every_n_steps(10, 0, 10) and train.every_n_steps(10, 3, 10)
    # "never, except at the start and the end", as people write it
    assert [s for s in range(11) if train.every_n_steps(s, 10**10, 10)] == [0, 10]
    assert [train.to_steps(v, 40) for v in (1, 1.0, 0.5, 0, 0.0)] == [1, 40, 20, 0, 0]


# ---- bad input: one line, nothing overwritten

def test_setup_refuses_an_out_dir_with_another_run(tiny):
    run(tiny("max_steps=2", "eval_every=0"))
    out = Path(tiny()[0]["out_dir"])
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for more, words in ((["lr=5e-3"], ["lr: 0.01 there, 0.005 here", "out_dir=NEW"]),
                        (["max_steps=3"], ["max_steps", "resume="]),
                        (["resume=nowhere"], ["nowhere", "no checkpoint"])):
        with pytest.raises(ValueError) as e:
            main(tiny(*(["max_steps=2", "eval_every=0"] + more)))
        assert "\n" not in str(e.value) and all(w in str(e.value) for w in words), str(e.value)
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    # what doesn't change the past may change
    run(tiny("max_steps=2", "eval_every=0", "log_every=2", "micro_tokens=800"))


@pytest.mark.parametrize("more, words", [
    (["micro_tokens=20"], ["micro_tokens", "20", "seq_len"]),
    (["model.vocab_size=100"], ["model.vocab_size", "100", "259"]),
    (["data.train.chats.path=nowhere.jsonl"], ["data.train.chats.path", "nowhere.jsonl"]),
    (["max_steps=0"], ["max_steps", "epochs"]),
    (["shard.lora.r=2", "shard.lora.targets=[q_prj]"], ["q_prj", "q_proj"]),
    (["device=cuda"], ["device", "cuda"]), (["log.to=[paper]"], ["log.to", "paper"]),
    (["model.family=gpt2", "model.activation=gelu_new", "model.n_kv_heads=4", "model.max_len=16", "data.seq_len=64"],
     ["data.seq_len", "model.max_len"]),
    (["model.loss=nope"], ["model.loss", "nope"]), (["schedule=cosin"], ["schedule", "cosine"]),
    (["optimizer=sdg"], ["optimizer", "adamw"]), (["sampler.order=rnd"], ["sampler.order", "random"]),
    (["data.validation_split=40"], ["validation_split"]), (["param_groups=[{match: embd}]"], ["param_groups", "embd"]),
    (["best=val/chats/los"], ["best", "val/chats/loss"]), (["best=val/chats/loss", "eval_every=0"], ["best"]),
    (["shard.lora.r=2", "optimizer=muon"], ["optimizer", "muon", "adamw"]),
    (["model.rope_scaling=5"], ["model.rope_scaling", "5"]),
    (["model.rope_scaling={rope_type: llama3, factor: 8.0}"], ["rope_scaling.low_freq_factor"]),
    (["model.rope_scaling={rope_type: dynamic}"], ["dynamic", "llama3"]),
    (["model.loss_options={label_smoothing: abc}"], ["label_smoothing", "abc"]),
    (["out_dir=README.md/run"], ["out_dir", "README.md"])])
def test_setup_reports_mistakes_in_one_line(tiny, more, words):
    if "device=cuda" in more and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(configs.UserError) as e:
        main(tiny(*more))
    assert "\n" not in str(e.value) and all(w in str(e.value) for w in words), str(e.value)
    assert not (Path(tiny()[0]["out_dir"]) / "checkpoints").exists()


def test_setup_reports_bad_data_with_file_and_line(tmp_path, script):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text: 1}\n')
    out = script("train.py", f"data.train.x.path={tmp_path / 'bad.jsonl'}", "data.tokenizer=bytes",
                 f"data.cache_dir={tmp_path / 'c'}", f"out_dir={tmp_path / 'o'}")
    assert out.returncode == 1 and out.stderr.startswith("error: ") and out.stderr.count("\n") == 1
    assert "bad.jsonl, line 2" in out.stderr and not list(tmp_path.glob("o/[!.]*"))


# ---- inputs that changed under a run

def save_base(folder, seed=0, **keys):
    """A small pretrained model with the 259 tokens of data.tokenizer=bytes."""
    m = configs.load(["model.n_layers=2", "model.d_model=32", "model.n_heads=4", "model.vocab_size=259",
                      "model.max_len=64"])[0]["model"]
    M.save_pretrained(M.build(m, seed).get_parameter, m, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))
    return folder


def from_base(tiny, base, *more, out="run"):
    argv = _argv(tiny("max_steps=4", "save_every=2", "eval_every=0", "checkpoint.export=true", out=out)[2])
    return configs.load([*argv, f"model.init_from={base}", *more])


def test_a_base_that_changed_under_a_run_is_refused_by_name(tiny, tmp_path):
    """At a resume and at an export. A copy is the same base, and so is one with another eos_token_id."""
    base = save_base(tmp_path / "base")
    copy = shutil.copytree(base, tmp_path / "copy")
    main(from_base(tiny, base, "shard.lora.r=2"))
    out = tmp_path / "run"
    wanted = load_file(out / "hf" / "model.safetensors")
    state = checkpoint.read_state(out / "checkpoints" / "latest")
    assert set(state["base"]["model.init_from"]) == {"config.json", "model.safetensors"}
    save_base(base, seed=1)                                            # retrained: the same shapes
    shutil.rmtree(out / "checkpoints" / "00000004")
    (out / "checkpoints" / "latest").unlink()
    with pytest.raises(configs.UserError, match="model.init_from: model.safetensors") as e:
        main(from_base(tiny, base, "shard.lora.r=2"))
    assert "\n" not in str(e.value)
    assert all(way in str(e.value) for way in ("out_dir=NEW", "resume=never", "resume=latest"))
    with pytest.raises(configs.UserError, match="cannot be exported.*model.init_from: model.safetensors.*put the old"):
        checkpoint.export_checkpoint(out, tmp_path / "exported")
    save_base(copy, eos_token_id=7)
    shutil.rmtree(base)                                                # moved, rather
    main(from_base(tiny, copy, "shard.lora.r=2"))
    again = load_file(out / "hf" / "model.safetensors")
    assert all(torch.equal(wanted[name], again[name]) for name in wanted)
    main(from_base(tiny, save_base(base, seed=1), "shard.lora.r=2", "resume=latest"))
    save_base(copy, rope_theta=5.0)
    with pytest.raises(configs.UserError, match="model.init_from: config.json"):
        main(from_base(tiny, copy, "shard.lora.r=2"))


def test_export_after_full_fine_tuning_needs_the_config_of_its_base_only(tiny, tmp_path):
    base = save_base(tmp_path / "base")
    main(from_base(tiny, base))
    save_base(base, seed=1)
    checkpoint.export_checkpoint(tmp_path / "run", tmp_path / "a")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "run/hf/model.safetensors").read_bytes()
    save_base(base, rope_theta=5.0)
    with pytest.raises(configs.UserError, match="cannot be exported.*model.init_from: config.json"):
        checkpoint.export_checkpoint(tmp_path / "run", tmp_path / "b")
    checkpoint.export_checkpoint(tmp_path / "run", tmp_path / "b", "resume=latest")


def test_export_with_another_template_or_tokenizer_is_refused_by_name(tiny, tmp_path):
    template = tmp_path / "chat.jinja"
    text = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
    template.write_text(text)
    loaded = tiny("max_steps=2", "eval_every=0", f"data.chat_template={template}")
    main(loaded)
    out = loaded[0]["out_dir"]
    for keys, what in (([], "template"), (["data.eos_token=<|im_end|>"], "tokenizer, template")):
        template.write_text(text.replace(":", " -"))
        with pytest.raises(configs.UserError, match=rf"cannot be exported.*\({what}\).*data.chat_template="):
            checkpoint.export_checkpoint(out, tmp_path / "hf", *keys)
    template.with_name("copy.jinja").write_text(text)
    checkpoint.export_checkpoint(out, tmp_path / "hf", f"data.chat_template={template.with_name('copy.jinja')}")


def test_lora_refuses_a_vocabulary_that_grows(tiny, tmp_path):
    """More ids than rows, or more than the model's own tokenizer has, even if there are rows for them."""
    base = save_base(tmp_path / "base")
    larger = tokenize_data.bytes_tokenizer()
    larger.special = larger.special | {"<|new|>": 259}
    larger.n_vocab = 260
    (tmp_path / "larger").mkdir()
    tokenize_data.save_tokenizer(larger, tmp_path / "larger", None)
    keys = ["shard.lora.r=2", f"data.tokenizer={tmp_path / 'larger'}"]
    way = r"shard.lora.modules_to_save=\[embed_tokens, lm_head\]"
    with pytest.raises(configs.UserError, match=f"shard.lora.r: .*260 ids.*only 259.*{way}.*shard.lora.r=0"):
        main(from_base(tiny, base, *keys))
    # the way that the message names, and its adapter as a start; resumed, it is bitwise the same run
    new_token = [*keys, "shard.lora.modules_to_save=[embed_tokens, lm_head]", "shard.lora.dropout=0.1"]
    main(from_base(tiny, base, *new_token, out="first"))
    adapter = tmp_path / "first" / "adapter"
    assert len(M.load(tmp_path / "first")[0].embed.weight) == 260
    assert tokenize_data.huggingface_tokenizer(adapter).n_vocab == 260
    further = [keys[1], f"shard.lora.init_from={adapter}"]
    whole = from_base(tiny, base, *further, out="whole")
    main(whole)
    shutil.copytree(tmp_path / "whole", tmp_path / "again", symlinks=True)
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "00000004")
    again = from_base(tiny, base, *further, out="again")
    main(again)
    a, b = weights(whole[0], 4), weights(again[0], 4)
    assert all(torch.equal(a[f][n], b[f][n]) for f in a for n in a[f])
    assert {"embed.weight"} == {n for n in a["model.safetensors"] if not shard.is_adapter(n)}
    # of another run's adapter: refused by name
    main(from_base(tiny, base, *new_token, "seed=1", out="other"))
    change = shutil.copytree(adapter, tmp_path / "moved")
    main(from_base(tiny, base, keys[1], f"shard.lora.init_from={change}", out="again"))
    shutil.copy(tmp_path / "other/adapter/adapter_model.safetensors", change)
    with pytest.raises(configs.UserError, match="shard.lora.init_from: adapter_model.safetensors"):
        main(from_base(tiny, base, keys[1], f"shard.lora.init_from={change}", out="again"))
    tokenize_data.save_tokenizer(tokenize_data.bytes_tokenizer(), base, None)
    m = configs.load([f"model.init_from={base}"])[0]["model"] | {"vocab_size": 300}
    M.save_pretrained(M.build(m).get_parameter, m, base)
    with pytest.raises(configs.UserError, match="shard.lora.r: .*260 ids.*only 259"):
        main(from_base(tiny, base, *keys))
    main(from_base(tiny, base, "shard.lora.r=2", f"data.tokenizer={base}"))
    adapter = tmp_path / "run" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert tokenize_data.huggingface_tokenizer(adapter).n_vocab == 259


def test_setup_warns_of_more_tokens_than_the_model_has_positions(tiny, tmp_path, capsys):
    base = save_base(tmp_path / "base")                                # of 64 positions
    for seq_len, warns in ((64, False), (65, True)):
        loaded = from_base(tiny, base, f"data.seq_len={seq_len}", out=str(seq_len))
        train.resolve_model(loaded[0], tokenize_data.load_tokenizer(loaded[0]))
        warning = capsys.readouterr().err
        assert ("warning: data.seq_len: 65 is more than the 64 positions" in warning) == warns, warning


@pytest.mark.parametrize("more, words", [
    (["reference_model=data/base"], "reference_model: has no effect with model.loss=cross_entropy"),
    (["data.train.chats.shape=text", "data.train_on=last"], "data.train_on: has no effect.*no source holds chats")])
def test_setup_refuses_an_option_without_effect(tiny, tmp_path, monkeypatch, more, words):
    monkeypatch.chdir(configs.HERE.parent)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(40)))
    more = [*more, f"data.train.chats.path={texts}"] if "data.train_on=last" in more else more
    with pytest.raises(configs.UserError, match=words):
        main(tiny("max_steps=1", "eval_every=0", *more))


# ---- configs/sft.yaml, lora.yaml and gpt2.yaml

@pytest.mark.parametrize("name", ["sft", "lora"])
def test_train_on_own_chats_needs_a_model_and_a_file_only(name, chats, tmp_path, capsys):
    """38 chats are one step per epoch, and two are held out. The run ends with what the config announces."""
    loaded = configs.load([str(ROOT / f"configs/{name}.yaml"), f"model.init_from={ROOT / 'data/base'}",
                           f"data.train.mine.path={chats}", f"data.cache_dir={tmp_path / 'tokens'}",
                           f"out_dir={tmp_path / name}", "eval_tokens=4", "eval_every=1.0", "save_every=0"])
    main(loaded)
    out = Path(loaded[0]["out_dir"])
    logged = log.read(out)
    assert [r["step"] for r in logged if "loss" in r] == [1, 2, 3]
    assert [r["step"] for r in logged if "val/mine/loss" in r] == [0, 3]
    assert (out / "hf" / "model.safetensors").is_file()
    assert (out / "adapter" / "adapter_config.json").is_file() == (name == "lora")
    printed = capsys.readouterr().out
    assert "data      validation.mine: 2 documents" in printed
    assert f"chat with it: python model.py {out}" in printed


def test_gpt2_config_is_gpt2_of_124_million_parameters():
    """Embedding and head have 47 rows more than GPT-2's 50,257, to be a multiple of 64."""
    cfg = configs.load([str(ROOT / "configs/gpt2.yaml")])[0]
    model = M.build_on_meta(M.resolve_vocab_size(cfg["model"], 50257))
    assert sum(p.numel() for p in model.parameters()) == 124_439_808 + 47 * 768
    assert cfg["batch_size"] * cfg["data"]["seq_len"] == 491_520


def test_train_from_scratch_with_the_gpt2_config(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    loaded = configs.load([str(ROOT / "configs/gpt2.yaml"), f"data.train.web.path={text}", "data.tokenizer=bytes",
                           "data.seq_len=64", "model.n_layers=2", "model.d_model=32", "model.n_heads=4", "model.max_len=64",
                           "batch_size=8", "micro_tokens=256", "warmup_steps=1", "max_steps=2", "log_every=1",
                           f"data.cache_dir={tmp_path / 'tokens'}", f"out_dir={tmp_path / 'run'}"])
    assert [step for step, loss, _ in run(loaded) if loss is not None] == [1, 2]
    config = json.loads((tmp_path / "run/hf/config.json").read_text())
    assert config["model_type"] == "gpt2" and config["vocab_size"] == 259 and config["activation_function"] == "gelu_new"
    printed = capsys.readouterr().out
    assert "step      8 documents x ~64 tokens = 51" in printed and "let it continue a text: " in printed


# ---- on real inputs

def test_train_resume_and_export_a_real_checkpoint(realdata, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the reference, in requirements-dev.txt")
    folder = realdata / "checkpoints" / "stories260K"
    argv = [f"model.init_from={folder / 'hf'}", f"data.tokenizer={folder / 'tok512.tiktoken'}",
            "data.tokenizer_pattern= ?[^ ]+| ", "data.special_tokens={<s>: 1, </s>: 2}", "data.bos_token=<s>",
            "data.eos_token=</s>", f"data.train.stories.path={realdata / 'text' / 'tinystories_1000.json'}",
            "data.validation_split=60", "data.seq_len=256", f"data.cache_dir={tmp_path / 'c'}", "dtype=float32",
            "batch_size=8", "micro_tokens=2048", "max_steps=30", "lr=1e-3", "log_every=5", "eval_every=15",
            "save_every=10", f"out_dir={tmp_path / 'run'}", "checkpoint.keep=5"]
    loaded = configs.load(argv)
    run(loaded)
    val = [v for v, in records(loaded[0], "val/stories/loss") if v is not None]
    assert val[-1] < val[1] < val[0]
    final = weights(loaded[0], 30)
    for step in (20, 30):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"{step:08}")
    run(loaded)
    again = weights(loaded[0], 30)
    assert all(torch.equal(final[f][n], again[f][n]) for f in final for n in final[f])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf").eval()
    ids = torch.randint(512, (1, 80), generator=torch.Generator().manual_seed(0))
    ours = M.load(tmp_path / "run")[0].logits(M.pack_prompts(ids.tolist()))
    assert torch.allclose(ours, theirs(ids).logits[0], atol=1e-4)


def test_train_on_real_chats_with_path_and_tokenizer_only(realdata, tmp_path):
    hf = realdata / "checkpoints" / "stories260K" / "hf"
    for name, tokenizer in (("gsm8k_train.jsonl", "bytes"), ("fastchat_dummy_conversation.json", hf)):
        loaded = configs.load([f"data.train.x.path={realdata / 'chat' / name}", f"data.tokenizer={tokenizer}",
                               f"data.cache_dir={tmp_path / 'c'}", f"out_dir={tmp_path / name}", "max_steps=2",
                               "log_every=1"])
        if tokenizer != "bytes":
            pytest.importorskip("tokenizers", reason="runs SentencePiece-like vocabularies, in requirements-dev.txt")
        assert [step for step, *_ in run(loaded)] == [1, 2]
