"""shard.py with real processes (torchrun, 2 and 4 ranks): laws 1 to 3 across ranks, failures, restarts, nodes.

This file is also what those processes run: torchrun tests/test_ranks.py JOBS.json
"""
import json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import pytest
import torch
from safetensors.torch import load_file

import checkpoint, configs, log, model as M, sampler, shard, tokenize_data, train

ROOT = Path(__file__).resolve().parents[1]


# ---- what a rank does

def forget(out, step):
    """As if a run had ended behind `step`."""
    for folder in checkpoint.found(out):
        if int(folder.name) > step:
            shutil.rmtree(folder)


def ready(argv):
    """A model of a run's config, on this rank's mesh, and its optimizer."""
    cfg = configs.load(argv)[0]
    m, read = train.find_weights(cfg, tokenize_data.load_tokenizer(cfg))
    model = shard.prepare(M.build_on_meta(m), m, cfg, read)
    return cfg, model, train.make_optimizer(model, cfg)


def copy(argv, path, out):
    """A checkpoint, loaded and saved again by however many ranks there are."""
    _, model, optimizer = ready(argv)
    state, more = checkpoint.restore(path, model, optimizer)
    saver = checkpoint.Saver(out, 1, print)
    saver.save(state["step"], model, optimizer, more, state)
    assert saver.wait()


def measure(argv, out):
    """The most bytes of torch's allocations in a step, on rank 0, and what plan() says they are."""
    from torch.profiler import ProfilerActivity, profile, record_function
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        cfg, model, optimizer = ready(argv)
        length, capacity = cfg["data"]["seq_len"], cfg["micro_tokens"]
        rows = []
        for _ in range(cfg["batch_size"] * length // capacity // shard.ranks()):
            ids = torch.arange(capacity) % cfg["model"]["vocab_size"]
            row = M.as_batch([ids[:length].tolist()] * (capacity // length))
            rows.append(row | {"targets": ids, "loss_weights": torch.ones(capacity),
                               "doc_ids": torch.arange(capacity // length), "noise": (0, 0)})
        for _ in range(3):
            with record_function("one step"):
                train.train_step(model, optimizer, rows, 1000.0, 1e-4, 1.0)
    if shard.rank() == 0:
        events = prof.profiler.kineto_results.events()
        begins, now, peaks = sorted(e.start_ns() for e in events if e.name() == "one step"), 0, [0] * 4
        for at, n in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
            now += n
            step = sum(at >= begin for begin in begins)
            peaks[step] = max(peaks[step], now)
        predicted = max(sum(held.values()) for held in shard.plan(cfg["model"], cfg, shard.ranks()).values())
        largest = max(p.numel() for p in model.parameters()) * 4
        held = sum(shard.part(p)[0].numel() for p in model.parameters()) * 4
        Path(out).write_text(json.dumps({"step": sorted(peaks[1:])[1], "predicted": predicted, "load": peaks[0],
                                         "largest": largest, "held": held}))


def fail(which):
    """One rank fails while the others wait for it."""
    if shard.rank() == which:
        time.sleep(1)
        raise RuntimeError("the reason")
    shard.summed([1.0])


def mistake(which):
    if shard.rank() == which:
        shard.mesh_sizes({"shard": {"mesh": {"replicate": 2, "shard": 2}}}, 3)
    shard.summed([1.0])


def turns(folder):
    """Who tokenizes when: rank 0 takes long, the others find it done."""
    def look():
        found = (Path(folder) / "done").exists()
        if shard.rank() == 0:
            time.sleep(4)
            (Path(folder) / "done").touch()
        return found
    seen = shard.gathered(shard.in_turn(look, doing="tokenizing"))
    if shard.rank() == 0:
        threads = [torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")]
        (Path(folder) / "seen.json").write_text(json.dumps([seen, threads]))


def work(_, jobs):
    shard.set_threads()
    for what, *args in json.loads(Path(jobs).read_text()):
        if what == "run":
            train.main(*configs.load(*args))
        elif what == "forget":
            shard.on_first(forget, *args)
        elif what == "keep":
            shard.on_first(shutil.copytree, *args)
        else:
            globals()[what](*args)
        shard.on_first(lambda: None)


if __name__ == "__main__":
    shard.together(work, {"device": "cpu", "dtype": "auto"}, sys.argv[1])


# ---- what is asked of them

LAUNCH = [sys.executable, "-m", "torch.distributed.run"]


def torchrun(ranks, *args, timeout=200, **env):
    command = [*LAUNCH, "--nproc_per_node", ranks, *args]
    return subprocess.run(list(map(str, command)), cwd=ROOT, env=os.environ | env, capture_output=True, text=True,
                          timeout=timeout)


def on(ranks, jobs, folder):
    path = Path(folder) / "jobs.json"
    path.write_text(json.dumps(jobs))
    if ranks == 1:
        work(None, path)
        return
    done = torchrun(ranks, "tests/test_ranks.py", path)
    assert done.returncode == 0, done.stdout + done.stderr


def argv(loaded, **more):
    """A loaded config as a command line again."""
    text = lambda v: f"[{', '.join(map(str, v))}]" if isinstance(v, list) else "null" if v is None else v
    return [f"{k}={text(v)}" for k, v in (configs.flat(loaded[2]) | more).items()]


def figures(out, *keys):
    return {key: [r[key] for r in log.read(out) if r.get(key) is not None] for key in keys}


GPT2 = ["model.family=gpt2", "model.norm=layernorm", "model.positions=learned", "model.glu=false",
        "model.qkv_bias=true", "model.out_bias=true", "model.mlp_bias=true", "model.n_kv_heads=4",
        "model.activation=gelu_new", "data.seq_len=400"]
NEOX = ["model.family=gpt_neox", "model.activation=gelu", "model.n_kv_heads=4", "model.parallel_residual=true",
        "model.qkv_bias=true", "model.out_bias=true", "model.partial_rotary_factor=0.5",
        "model.tie_embeddings=false", "model.pad_vocab_size_multiple=64",
        "model.resid_pdrop=0.1", "model.attn_pdrop=0.1", "model.embd_pdrop=0.1", "model.embed=neftune",
        "model.embed_options.alpha=5"]
OLMO2 = ["model.family=olmo2", "model.loss_options.z_loss=1e-3", "optimizer=muon"]
HALVES, QUARTERS = ["shard.mesh.shard=2"], ["shard.mesh.shard=4"]
BOTH = ["shard.mesh.replicate=2", "shard.mesh.shard=2"]
MODELS = {                                                             # what is trained: keys, tolerance of the loss
    "full": ([], 1e-5), "bf16": (["dtype=bfloat16"], 1e-3), "gpt-2": (GPT2, 1e-5), "lora": (["shard.lora.r=1"], 1e-5),
    "lora, bf16": (["shard.lora.r=1", "dtype=bfloat16"], 1e-3), "muon": (["optimizer=muon"], 1e-3),
    "feedback": (["sampler.order=feedback"], 1e-5), "sgd": (["optimizer=sgd"], 1e-5),
    "neox, noise, padded rows": (NEOX, 1e-5), "olmo2": (OLMO2, 1e-3)}
CELLS = [                                                              # (what, ranks, how)
    ("full", 2, []), ("full", 2, HALVES), ("full", 2, [*HALVES, "shard.reshard_after_forward=false"]),
    ("full", 2, [*HALVES, "shard.recompute=true"]), ("bf16", 2, []), ("bf16", 2, HALVES), ("lora", 2, []),
    ("full", 4, []), ("full", 4, QUARTERS), ("full", 4, BOTH), ("bf16", 4, BOTH), ("gpt-2", 4, QUARTERS),
    ("lora", 4, QUARTERS), ("lora, bf16", 4, BOTH), ("muon", 2, []), ("muon", 4, BOTH), ("sgd", 2, HALVES),
    ("feedback", 2, HALVES), ("feedback", 4, []), ("neox, noise, padded rows", 2, []),
    ("neox, noise, padded rows", 4, BOTH), ("olmo2", 2, HALVES)]
GONE_ON = [                                                            # bitwise
    ("full", 2, []), ("full", 2, HALVES), ("muon", 2, HALVES), ("bf16", 2, HALVES), ("feedback", 2, HALVES),
    ("lora, bf16", 2, [])]
name = lambda cell: f"{cell[0]}, {cell[1]} ranks, {' '.join(cell[2]) or 'replicated'}"


@pytest.fixture(scope="module")
def ten_steps(tmp_path_factory, chats):
    """Every cell's run, and that of one process for each model: ten steps of six chats in several rows, evaluated at
    both ends."""
    folder = tmp_path_factory.mktemp("ten")
    def args(what, out, *more):
        return [f"data.train.chats.path={chats}", "data.validation_split=7", "data.tokenizer=bytes",
                f"data.cache_dir={folder / 'tokens'}", "model.n_layers=2", "model.d_model=32", "model.n_heads=4",
                "model.n_kv_heads=2", "batch_size=6", "micro_tokens=240", "max_steps=10", "epochs=0",
                "log_every=1", "eval_every=10", "save_every=10", "eval_tokens=8", "eval_prompts=5", "lr=1e-3",
                "dtype=float32", "samples=0", "checkpoint.export=false", f"out_dir={folder / out}",
                *MODELS[what][0], *more]
    for ranks in (1, 2, 4):
        cells = [(what, 1, []) for what in MODELS] if ranks == 1 else [cell for cell in CELLS if cell[1] == ranks]
        on(ranks, [("run", args(what, name((what, ranks, how)), *how)) for what, _, how in cells], folder)
    return folder, args


@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_a_step_is_the_same_on_any_mesh(ten_steps, cell):
    folder, (what, _, _) = ten_steps[0], cell
    cells = (what, 1, []), cell
    keys = ("loss", "grad_norm", "documents", "tokens", "val/chats/loss", "val/chats/exact_match")
    one, many = (figures(folder / name(c), *keys) for c in cells)
    tolerance = MODELS[what][1]
    assert len(one["loss"]) == 10 and len(one["val/chats/loss"]) == 2
    for key in ("documents", "tokens", "val/chats/exact_match"):
        assert one[key] == many[key], key
    for key in ("loss", "val/chats/loss", "grad_norm"):
        assert many[key] == pytest.approx(one[key], rel=tolerance * (20 if key == "grad_norm" else 1)), key
    one, many = (load_file(folder / name(c) / "checkpoints" / "00000010" / "model.safetensors") for c in cells)
    assert {key: t.shape for key, t in one.items()} == {key: t.shape for key, t in many.items()}


def test_a_steps_documents_do_not_depend_on_the_ranks(ten_steps):
    cfg = configs.load(ten_steps[1]("full", "x"))[0]
    sources = tokenize_data.load_datasets(cfg)["train"]
    for step in (0, 7):
        whole = sampler.documents(step, cfg, {k: len(t) for k, t in sources.items()})
        for ranks in (1, 2, 4, 9):
            rows = [sampler.step_rows(step, cfg, sources, ranks, rank)[0] for rank in range(ranks)]
            drawn = sorted(int(d) for rank in rows for row in rank for d in row["doc_ids"])
            assert len({len(r) for r in rows}) == 1 and drawn == sorted(whole)


def test_a_run_goes_on_on_other_ranks_and_bitwise_on_the_same(ten_steps):
    """1 -> 2 -> 4 -> 1 ranks, in parts and whole; and the same files whatever number of ranks wrote them."""
    folder, args = ten_steps
    whole, chain = "full, 1 ranks, replicated", "chain"
    step = lambda out, n: folder / out / "checkpoints" / f"{n:08}"
    more = ["save_every=2", "checkpoint.keep=9", "eval_every=0"]
    run = lambda out, *how, what="full": ("run", args(what, out, *more, *how))
    forget_behind = lambda out, n: ("forget", str(folder / out), n)
    copied = lambda out, *how: ("copy", args("full", chain, *how), str(step(chain, 2)), str(folder / out))
    on(1, [run(chain), forget_behind(chain, 2)], folder)
    two = [run(chain, *HALVES), forget_behind(chain, 4), copied("copy2", *HALVES)]
    for cell in GONE_ON:                                               # bitwise: stopped behind step 4 and gone on
        (what, _, how), out = cell, f"gone on, {name(cell)}"
        two += [run(out, *how, what=what), ("keep", str(folder / out), str(folder / f"{out} first")),
                forget_behind(out, 4), run(out, *how, what=what)]
    on(2, two, folder)
    on(4, [run(chain, *BOTH), forget_behind(chain, 6), copied("copy4", *QUARTERS)], folder)
    on(1, [run(chain)], folder)
    assert figures(folder / chain, "loss")["loss"] == pytest.approx(figures(folder / whole, "loss")["loss"], rel=1e-5)
    for file in ("model.safetensors", "optimizer.safetensors"):
        read = lambda path: (path / file).read_bytes()
        assert read(step(chain, 2)) == read(step("copy2", 2)) == read(step("copy4", 2))
    for cell in GONE_ON:
        out, first = f"gone on, {name(cell)}", f"gone on, {name(cell)} first"
        for file in ("model.safetensors", "optimizer.safetensors", "sampler.safetensors"):
            assert (step(out, 10) / file).read_bytes() == (step(first, 10) / file).read_bytes(), (out, file)
        keys = ("loss", "grad_norm", "lr")
        assert figures(folder / out, *keys) == figures(folder / first, *keys)


def test_adapters_of_a_model_in_parts_load_in_peft(ten_steps, tmp_path):
    peft = pytest.importorskip("peft", reason="the reference, in requirements-dev.txt")
    transformers = pytest.importorskip("transformers")
    folder, args = ten_steps
    base = [a for a in args("full", "base", "checkpoint.export=true")]
    on(1, [("run", base)], folder)
    hf = folder / "base" / "hf"
    lora = args("lora", "adapted", "checkpoint.export=true", "shard.lora.r=3", f"model.init_from={hf}",
                f"data.tokenizer={hf}", *QUARTERS)
    lora = [a for a in lora if not re.match(r"model\.(n_|d_)", a)]
    on(4, [("run", lora)], folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(hf)
    theirs = peft.PeftModel.from_pretrained(theirs, folder / "adapted" / "adapter").eval()
    ids = torch.randint(259, (1, 30), generator=torch.Generator().manual_seed(0))
    merged, plain = (M.load(path)[0].logits(M.as_batch(ids.tolist())) for path in (folder / "adapted", hf))
    assert torch.allclose(merged, theirs(ids).logits[0], atol=1e-4) and not torch.allclose(merged, plain, atol=1e-3)


# ---- memory

MEDIUM = ["model.d_model=256", "model.n_layers=4", "model.vocab_size=2048", "micro_tokens=1024", "data.seq_len=128",
          "batch_size=16"]
SHAPES = {
    "narrow, many tokens": ["model.d_model=128", "model.n_layers=4", "model.vocab_size=4096", "micro_tokens=2048",
                            "data.seq_len=256", "batch_size=16"],
    "wide, a small vocabulary": ["model.d_model=256", "model.n_layers=6", "model.n_heads=8", "model.n_kv_heads=2",
                                 "model.vocab_size=320", "micro_tokens=1024", "data.seq_len=256", "batch_size=8"],
    "bf16": [*MEDIUM, "dtype=bfloat16"],
    "dropout, another family": ["model.family=phi", "model.activation=gelu", "model.tie_embeddings=false",
                                "model.d_model=128", "model.n_layers=8", "model.vocab_size=512", "micro_tokens=1024",
                                "data.seq_len=256", "batch_size=8", "model.attn_pdrop=0.1", "model.resid_pdrop=0.1"],
    "lora, computed again": [*MEDIUM, "shard.lora.r=8", "shard.recompute=true"]}


def test_predicted_memory_is_what_a_run_takes(tmp_path):
    """Most bytes of torch's allocations in a step, within a tenth; loading takes what is held, and a tensor or two
    more."""
    base = ["dtype=float32", "device=cpu", "data.tokenizer=bytes"]
    for ranks, how in ((1, []), (2, []), (2, HALVES)):
        places = {what: str(tmp_path / f"{what} {ranks} {len(how)}.json") for what in SHAPES}
        jobs = [("measure", [*base, *more, *how], places[what]) for what, more in SHAPES.items()]
        on(ranks, jobs, tmp_path)
        for what, place in places.items():
            got = json.loads(Path(place).read_text())
            assert got["predicted"] == pytest.approx(got["step"], rel=0.1), (what, ranks, how, got)
            assert ranks == 2 and not how or got["load"] <= got["held"] + 2.5 * got["largest"], (what, ranks, how, got)


def test_predicted_memory_is_shown_for_any_mesh(script):
    one = ["configs/ft.yaml", "device=cpu"]

    def total(*more):
        said = script("shard.py", *one, *more).stdout
        return float(re.search(r"together +([\d,.]+) MiB", said)[1].replace(",", ""))
    assert total("gpus=64", "shard.mesh.shard=64") < total("gpus=64", "shard.mesh.shard=8") < total("gpus=64")
    wrong = script("shard.py", *one, "gpus=6", "shard.mesh.shard=4")
    assert wrong.returncode == 1 and wrong.stderr.count("\n") == 1
    assert "shard.mesh" in wrong.stderr and "6" in wrong.stderr


# ---- the others wait, the cores are shared, the console speaks once

def test_others_wait_for_the_first_and_cores_are_shared(tmp_path):
    (tmp_path / "jobs.json").write_text(json.dumps([("turns", str(tmp_path))]))
    done = torchrun(2, "tests/test_ranks.py", tmp_path / "jobs.json")
    seen, (threads, _) = json.loads((tmp_path / "seen.json").read_text())
    assert seen == [False, True] and done.stdout == "rank 0 is tokenizing, the others wait\n"
    assert threads == max(1, len(os.sched_getaffinity(0)) // 2)


# ---- failures

@pytest.mark.parametrize("what, words", [
    ("fail", "RuntimeError: the reason"), ("mistake", "error: shard.mesh: replicate 2 x shard 2 is not 3 ranks")])
def test_when_one_rank_fails_all_end_and_its_error_is_told(tmp_path, what, words):
    (tmp_path / "jobs.json").write_text(json.dumps([(what, 1)]))
    started = time.monotonic()
    done = torchrun(2, "tests/test_ranks.py", tmp_path / "jobs.json")
    assert done.returncode != 0 and time.monotonic() - started < 30
    told, table = done.stderr.split("FAILED\n")
    # once, and nobody else's consequences
    assert told.count(words) == 1 and "has lost another" not in told and done.stdout == ""
    assert words in table.split("Root Cause")[1] and "rank      : 1" in table.split("Root Cause")[1]


def test_a_mistake_is_told_once_and_a_mesh_that_is_none_at_once(tmp_path, chats):
    args = [f"data.train.chats.path={chats}", "data.tokenizer=bytes", f"data.cache_dir={tmp_path / 'c'}",
            f"out_dir={tmp_path / 'o'}", "dtype=float32", "max_steps=2"]
    done = torchrun(2, "train.py", *args, "shard.mesh.shard=3")
    told = done.stderr.split("FAILED\n")[0]
    assert done.returncode != 0 and told.count("error: shard.mesh: replicate 0 x shard 3 is not 2 ranks") == 1
    assert "Traceback" not in told.split("error: ")[0] and not (tmp_path / "o").exists()


def pids(parent):
    return [int(p) for p in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds a rank's process in /proc")
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_rank_killed_is_started_again_and_the_run_is_the_same(ten_steps, nodes):
    folder, args = ten_steps
    out, more = folder / f"killed{nodes}", ["max_steps=60", "save_every=5", "eval_every=0", *HALVES]
    if not (folder / "unkilled").exists():
        on(2, [("run", args("full", "unkilled", *more))], folder)
    words = ["--nproc_per_node", "2"] if nodes == 1 else [
        "--nnodes", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:29679", "--local_addr", "127.0.0.1"]
    command = [*LAUNCH, *words, "--max-restarts", "2", "train.py", *args("full", out.name, *more)]
    said = [(folder / f"{out.name}.{node}").open("w+") for node in range(nodes)]
    agents = [subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT) for file in said]
    deadline = time.monotonic() + 60
    while len(log.read(out)) < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(pids(agents[-1].pid)[-1], signal.SIGKILL)
    codes = [agent.wait(timeout=60) for agent in agents]
    for file in said:
        file.seek(0)
    text = "".join(file.read() for file in said)
    assert codes == [0] * nodes and len(re.findall(r"^resume ", text, re.M)) == 1, text
    assert len(re.findall(r"^device ", text, re.M)) == 2, text
    assert figures(out, "step", "loss", "grad_norm") == figures(folder / "unkilled", "step", "loss", "grad_norm")


def test_a_signal_ends_all_ranks_behind_the_same_step(ten_steps):
    folder, args = ten_steps
    more = ["max_steps=400", "save_every=0", "eval_every=0", *HALVES]
    command = [*LAUNCH, "--nproc_per_node", "2", "train.py", *args("full", "ended", *more)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if re.match(r"step +20/", line):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.communicate(timeout=60)[0]
    assert "stopped by signal 15 after step" in rest and "saved" in rest
    saved = checkpoint.found(folder / "ended")
    ended = int(re.search(r"after step (\d+)", rest)[1])
    assert len(saved) == 1 and checkpoint.verified(saved[0])["step"] == ended >= 20


# ---- nodes

def spaces():
    """Two network namespaces joined by a wire -> ([command prefix of each], [address of each], undo), or on
    loopback."""
    names, ends, addresses = ["seven0", "seven1"], ["seven-a", "seven-b"], ["10.77.0.1", "10.77.0.2"]
    ip = lambda *words: subprocess.run(["ip", *words], capture_output=True, check=True)
    try:
        for space in names:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
            ip("netns", "add", space)
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for space, end, address in zip(names, ends, addresses):
            ip("link", "set", end, "netns", space)
            for words in (["addr", "add", f"{address}/24", "dev", end], ["link", "set", end, "up"],
                          ["link", "set", "lo", "up"]):
                ip("-n", space, *words)
    except (OSError, subprocess.CalledProcessError):
        return [[], []], ["127.0.0.1"] * 2, ["lo", "lo"], lambda: None
    undo = lambda: [ip("netns", "del", space) for space in names]
    return [["ip", "netns", "exec", space] for space in names], addresses, ends, undo


def test_two_nodes_of_two_are_four_ranks(ten_steps):
    folder, args = ten_steps
    prefixes, addresses, ends, undo = spaces()
    try:
        nodes = []
        for node, (prefix, address, end) in enumerate(zip(prefixes, addresses, ends)):
            words = ["--nnodes", "2", "--node_rank", str(node), "--nproc_per_node", "2",
                     "--master_addr", addresses[0], "--master_port", "29677", "--local_addr", address]
            command = [*prefix, *LAUNCH, *words, "train.py", *args("full", "nodes", *BOTH)]
            nodes.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | {"GLOO_SOCKET_IFNAME": end},
                                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        said = [node.communicate(timeout=120) for node in nodes]
    finally:
        undo()
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "4 ranks (replicate 2 x shard 2)" in said[0][0] and said[1][0] == ""
    keys = ("loss", "grad_norm", "val/chats/loss")
    assert figures(folder / "nodes", *keys) == figures(folder / name(("full", 4, BOTH)), *keys)
