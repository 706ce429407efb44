"""shard.py with real processes (2 and 4 ranks, and torchrun): layouts, failures, restarts, nodes.

This file is also what those processes run: tests/test_ranks.py JOBS.json
"""
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import checkpoint
import configs
import launch
import log
import model as M
import sampler
import shard
import tokenize_data
import train

if __name__ == "__main__":
    import experiments.by_loss     # registers sampler.order=by_loss, in the processes of the jobs

    def to_reference(logits, targets, reference_logits):
        """Cross-entropy with the probabilities of the reference model as targets."""
        return torch.nn.functional.cross_entropy(logits, reference_logits.softmax(-1), reduction="none")
    M.LOSSES["to_reference"] = to_reference


# --------------------------------------------------------------------------------------------------
# jobs: what a rank does

def run(argv):
    cfg, _, explicit = configs.load(argv)
    train.main(cfg, explicit)


def forget(out, step):
    """Delete the checkpoints after `step`, as if the run had ended there."""
    for folder in checkpoint.list_checkpoints(out):
        if int(folder.name) > step:
            shutil.rmtree(folder)


def build(argv):
    """Return (cfg, the model on this mesh)."""
    cfg = configs.load(argv)[0]
    model_cfg, read_slice = train.resolve_model(cfg, tokenize_data.load_tokenizer(cfg))
    return cfg, shard.parallelize(M.build_on_meta(model_cfg), cfg, read_slice)


def copy_checkpoint(argv, path, out):
    """Load a checkpoint and save it again, by this number of ranks."""
    cfg, model = build(argv)
    optimizer = train.make_optimizer(model, cfg)
    state, sampler_state = checkpoint.load_checkpoint(path, model, optimizer)
    saver = checkpoint.Saver(out, 1, print)
    saver.save(model, optimizer, sampler_state, state)
    assert saver.wait()


def full_micro_batch(cfg):
    """A micro-batch of micro_tokens tokens in documents of seq_len, all of them targets."""
    length, capacity = cfg["data"]["seq_len"], cfg["micro_tokens"]
    ids = torch.arange(capacity) % cfg["model"]["vocab_size"]
    batch = M.pack_prompts([ids[:length].tolist()] * (capacity // length))
    return batch | {"targets": ids, "loss_weights": torch.ones(capacity),
                    "doc_ids": torch.arange(capacity // length), "noise_seed": (0, 0)}


def measure_memory(argv, out):
    """Measure the peak of torch's allocations in a step on rank 0, and predict it."""
    from torch.profiler import ProfilerActivity, profile, record_function
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        cfg, model = build(argv)
        with record_function("phase"):
            optimizer = train.make_optimizer(model, cfg)
        tokens = cfg["batch_size"] * cfg["data"]["seq_len"]
        n_micro_batches = tokens // cfg["micro_tokens"] // shard.world_size()
        micro_batches = [full_micro_batch(cfg) for _ in range(n_micro_batches)]
        for _ in range(2):
            with record_function("phase"):
                train.train_step(model, optimizer, micro_batches, 1000.0, 1e-4, cfg)
    if shard.rank() != 0:
        return
    kineto = prof.profiler.kineto_results
    phase_starts = sorted(e.start_ns() for e in kineto.events() if e.name() == "phase")
    allocations = []                                     # (time, address, bytes or -bytes)
    unvisited = list(kineto.experimental_event_tree())
    while unvisited:
        event = unvisited.pop()
        unvisited += event.children
        if event.name == "[memory]":
            fields = event.extra_fields
            allocations.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    sizes = {}                                           # of what is held, by address
    held = 0
    peaks = [0] * 4                                      # loading, make_optimizer, two steps
    for at, address, n_bytes in sorted(allocations):
        if n_bytes > 0:
            sizes[address] = n_bytes
        elif sizes.pop(address, None) is None:
            continue                                     # the job before has allocated it
        held += n_bytes
        phase = sum(at >= start for start in phase_starts)
        peaks[phase] = max(peaks[phase], held)
    moment, predicted = shard.peak_phase(
        shard.predict_memory(cfg["model"], cfg, shard.world_size()))
    params = list(model.parameters())
    Path(out).write_text(json.dumps({
        "step": peaks[3], "predicted": sum(predicted.values()), "moment": moment,
        "what": predicted, "load": peaks[0], "largest": 4 * max(p.numel() for p in params),
        "parameters": 4 * sum(shard.local_shard(p)[0].numel() for p in params)}))


def check_gradient_sums(argv):
    """all_reduce_gradients sums .grad, however it came there."""
    _, model = build(argv)
    rank = shard.rank()
    params = [p for p in model.parameters() if p.requires_grad]
    for step in range(2):
        if rank == 0:
            model.zero_grad()                            # .grad is None here, and counts as 0
        else:
            for p in params:
                p.grad = torch.full_like(p, 10.0 * rank)
        params[0].grad = torch.ones_like(params[0])      # on all ranks
        shard.all_reduce_gradients(model)
        expected = 10.0 * sum(range(shard.world_size()))
        assert all(bool((p.grad == expected).all()) for p in params[1:])
        assert bool((params[0].grad == shard.world_size()).all())
        params[1].grad.fill_(0)                          # a view of nothing else
        assert bool((params[2].grad == expected).all())


def check_detects_difference(argv, changed_rank, expected):
    """check_replicas is silent for equal replicas, and then names the rank that was changed."""
    _, model = build(argv)
    shard.check_replicas(model)
    last = [p for p in model.parameters() if p.requires_grad][-1]
    if shard.rank() == changed_rank:
        with torch.no_grad():
            rows, _, _ = shard.local_shard(last)
            rows.view(torch.int32).bitwise_xor_(1)       # the last bit of each number
    with pytest.raises(RuntimeError, match=expected):
        shard.check_replicas(model)


def check_offload(argv, choices):
    """With shard.offload, a step's figures and weights are bitwise those without it."""
    for keys in choices:
        results = []
        for offload in ("none", "all"):
            cfg, model = build([*argv, *keys, f"shard.offload={offload}"])
            optimizer = train.make_optimizer(model, cfg)
            batch = M.pack_prompts([list(range(20)), list(range(30, 70))])
            batch |= {"targets": batch["tokens"].flip(0), "loss_weights": torch.ones(60),
                      "doc_ids": torch.arange(2)}
            figures = []
            for step in range(2):
                loss, norm, *_ = train.train_step(model, optimizer, [batch] * 2, 120.0, 1e-2, cfg)
                figures += [loss, norm]
            assert float(norm) > cfg["grad_clip"]        # they were clipped
            results.append(figures + [shard.full_tensor(p) for p in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*results)), keys


def check_local_shards(mesh_sizes):
    """Writers together write every row of a DTensor once, whatever its shape and placements."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    mesh = dist.init_device_mesh("cpu", mesh_sizes)
    outer = [Replicate()] * (len(mesh_sizes) - 1)
    for shape in ((5, 3), (1, 4), (8,), (7, 1)):
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        for placement in (Shard(0), Replicate()):
            t = distribute_tensor(whole, mesh, [*outer, placement])
            rows, start, end = shard.local_shard(t)
            assert torch.equal(rows, whole[start:end])
            assert torch.equal(shard.full_tensor(t), whole)
            written = range(start, end) if shard.is_writer(t) else []
            all_written = [row for rank in shard.all_gather_object(list(written)) for row in rank]
            assert sorted(all_written) == list(range(len(whole)))
    assert sum(shard.all_gather_object(shard.is_writer(whole))) == 1


def check_order(folder):
    """main_process_first and rank0_only: rank 0 takes long, the others find its work done."""
    marker = Path(folder) / "done"

    def fill():
        found = marker.exists()
        if shard.rank() == 0:
            time.sleep(2)
            marker.touch()
        return found
    found = shard.all_gather_object(shard.main_process_first(fill))
    assert found == [False, *[True] * (shard.world_size() - 1)]
    assert shard.rank0_only(shard.rank) == 0
    assert shard.all_reduce_sum([1.5, shard.rank()]) == [3.0, 1.0]
    assert shard.all_reduce_max([shard.rank() * 7, -shard.rank()]) == [7, 0]
    threads = shard.all_gather_object(torch.get_num_threads())
    assert threads == [max(1, len(os.sched_getaffinity(0)) // 2)] * 2


def fail(how, failing_rank):
    """One rank fails while the others wait for it in a collective, or, if how="hang", elsewhere."""
    if shard.rank() == failing_rank:
        time.sleep(0.5)
        if how == "user error":
            raise configs.UserError("lr: this is wrong; do it right")
        if how == "exit":
            os._exit(7)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "unpack":
            a, b = [1, 2, 3]
        raise RuntimeError("the reason")
    if how == "hang":
        time.sleep(1000)
    shard.all_reduce_sum([1.0])


def stop_in_evaluation(argv, step, failing_rank):
    """One rank gets a signal between two tokens: all stop after this token, and save."""
    tokens = []
    real = train.keep_generating

    def keep_generating(run, *args):
        tokens.append(run.state.step)
        if run.state.step == step and tokens.count(step) == 3 and shard.rank() == failing_rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(run, *args)

    train.keep_generating = keep_generating
    with pytest.raises(SystemExit) as e:
        run(argv)
    train.keep_generating = real
    assert e.value.code == 128 + signal.SIGTERM
    assert shard.all_gather_object(tokens.count(step)) == [3] * shard.world_size()


def run_until_killed(argv, step, killed_rank):
    """A run, one of whose ranks is killed after a step: only once, whatever is started again."""
    log_step = train.log_step

    def log_and_die(run, *args):
        log_step(run, *args)
        marker = Path(f"{run.cfg['out_dir']}.killed")
        if run.state.step == step and shard.rank() == killed_rank and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    train.log_step = log_and_die
    run(argv)


def work(_, jobs):
    shard.set_threads()
    for name, *args in json.loads(Path(jobs).read_text()):
        if name in ("forget", "copytree"):
            shard.rank0_only({"forget": forget, "copytree": shutil.copytree}[name], *args)
        else:
            globals()[name](*args)
        shard.rank0_only(lambda: None)                   # one job after the other


if __name__ == "__main__":
    shard.run_distributed(work, {"device": "cpu", "dtype": "auto"}, sys.argv[1])


# --------------------------------------------------------------------------------------------------
# starting them

LAUNCH = [sys.executable, "-m", "torch.distributed.run"]


def torchrun(ranks, *args):
    done, = launch.run([*LAUNCH[1:], "--nproc_per_node", ranks, *args])
    return done


def write_jobs(folder, jobs):
    path = Path(folder) / "jobs.json"
    path.write_text(json.dumps(jobs))
    return path


def run_jobs(ranks, jobs, folder):
    """Run jobs one after the other on a number of ranks; they must succeed."""
    command = ["tests/test_ranks.py", write_jobs(folder, jobs)]
    finished = launch.run(command) if ranks == 1 else launch.run_ranks(ranks, command)
    assert not any(done.returncode for done in finished), [done.stderr for done in finished]


def figures(out, *keys):
    """{key: its values in metrics.jsonl}"""
    return {key: [r[key] for r in log.read(out) if r.get(key) is not None] for key in keys}


# --------------------------------------------------------------------------------------------------
# layouts: the same run on any mesh

GPT2 = ["model.family=gpt2", "model.norm=layernorm", "model.positions=learned", "model.glu=false",
        "model.qkv_bias=true", "model.out_bias=true", "model.mlp_bias=true", "model.n_kv_heads=4",
        "model.activation=gelu_new", "data.seq_len=400"]
NEOX = ["model.family=gpt_neox", "model.activation=gelu", "model.n_kv_heads=4",
        "model.parallel_residual=true", "model.qkv_bias=true", "model.out_bias=true",
        "model.partial_rotary_factor=0.5", "model.tie_embeddings=false",
        "model.pad_vocab_size_multiple=64", "model.resid_pdrop=0.1", "model.attn_pdrop=0.1",
        "model.embd_pdrop=0.1", "model.embed=neftune", "model.embed_options.alpha=5"]
EXPERTS = ["model.family=qwen3_moe", "model.n_experts=4", "model.d_expert=24",
           "model.router_aux_loss_coef=0.1"]
DELTA_NET = ["model.family=qwen3_5_text", "model.layer_types=[linear_attention, full_attention]"]
GEMMA4 = ["model.family=gemma4_text", "model.layer_types=[sliding_attention, full_attention]",
          "model.n_layers=4", "model.global_head_dim=16", "model.sliding_window=64",
          "model.d_per_layer=16", "model.n_kv_shared_layers=2", "model.double_wide_mlp=true"]
OLMO2 = ["model.family=olmo2", "model.loss_options.z_loss=1e-3", "optimizer=muon"]
BF16_STATE = ["shard.master_dtype=bfloat16", "shard.moment_dtype=bfloat16"]
MODELS = {    # name: (keys, relative tolerance of the loss)
    "full": ([], 1e-5),
    "bf16": (["dtype=bfloat16"], 1e-3),
    "fp16": (["dtype=float16"], 1e-3),
    "gpt-2": (GPT2, 1e-5),
    "lora": (["shard.lora.r=1"], 1e-5),
    "lora, bf16": (["shard.lora.r=1", "dtype=bfloat16"], 1e-3),
    # in bf16, the trained embedding is fp32, and the frozen head is not
    "lora, modules_to_save": ([
        "shard.lora.r=1", "shard.lora.modules_to_save=[embed_tokens]", "dtype=bfloat16",
        "model.tie_embeddings=false"], 1e-3),
    "lora, dropout": (["shard.lora.r=1", "shard.lora.dropout=0.2", "shard.lora.rslora=true"], 1e-5),
    "nf4": (["shard.lora.r=1", "shard.quantize=nf4", "model.d_model=64"], 1e-5),
    "int8, bf16": (["shard.lora.r=1", "shard.quantize=int8", "dtype=bfloat16"], 1e-3),
    "muon": (["optimizer=muon"], 1e-3),
    "by_loss": (["sampler.order=by_loss"], 1e-5),
    "sgd": (["optimizer=sgd"], 1e-5),
    "bf16 state": (["dtype=bfloat16", *BF16_STATE], 1e-3),
    "frozen": (["param_groups=[{match: 'embed|blocks.0|mlp', train: false}]"], 1e-5),
    "reference": (["model.loss=to_reference", f"reference_model={ROOT / 'data' / 'base'}"], 1e-5),
    "neox, noise, padded vocabulary": (NEOX, 1e-5),
    "delta-net": (DELTA_NET, 1e-5),
    "olmo2": (OLMO2, 1e-3),
    "gemma4": (GEMMA4, 1e-5),
    "experts": (EXPERTS, 1e-5),
    "experts, lora, bf16": ([*EXPERTS, "shard.lora.r=1", "dtype=bfloat16"], 1e-3)}
SHARD2 = ["shard.mesh.shard=2"]
SHARD4 = ["shard.mesh.shard=4"]
HYBRID = ["shard.mesh.replicate=2", "shard.mesh.shard=2"]
OFFLOAD = ["shard.offload=all"]
LAYOUTS = [    # (model, ranks, keys)
    ("full", 2, []), ("full", 2, SHARD2),
    ("full", 2, [*SHARD2, "shard.reshard_after_forward=false", "shard.recompute=true"]),
    ("full", 2, [*SHARD2, *OFFLOAD]), ("lora, bf16", 2, OFFLOAD),
    ("full", 2, [*SHARD2, "shard.recompute=selective"]),
    ("bf16", 2, SHARD2), ("fp16", 2, SHARD2), ("bf16 state", 2, []), ("bf16 state", 2, SHARD2),
    ("lora, bf16", 2, []), ("lora, dropout", 2, []), ("lora, modules_to_save", 2, SHARD2),
    ("nf4", 2, SHARD2), ("frozen", 2, SHARD2), ("muon", 2, SHARD2), ("sgd", 2, SHARD2),
    ("by_loss", 2, SHARD2), ("reference", 2, SHARD2), ("neox, noise, padded vocabulary", 2, []),
    ("olmo2", 2, SHARD2), ("delta-net", 2, SHARD2), ("experts", 2, SHARD2),
    ("gemma4", 2, [*SHARD2, "shard.recompute=true"]),
    ("experts, lora, bf16", 2, SHARD2),
    ("full", 4, HYBRID), ("gpt-2", 4, SHARD4), ("lora, bf16", 4, HYBRID), ("int8, bf16", 4, HYBRID),
    ("muon", 4, HYBRID), ("experts", 4, HYBRID), ("neox, noise, padded vocabulary", 4, HYBRID)]
RESUMED = [    # those that are resumed, bitwise
    ("full", 2, []), ("full", 2, [*SHARD2, *OFFLOAD]), ("bf16", 2, SHARD2), ("fp16", 2, SHARD2),
    ("bf16 state", 2, SHARD2), ("lora, bf16", 2, []), ("lora, modules_to_save", 2, SHARD2),
    ("nf4", 2, SHARD2), ("frozen", 2, SHARD2), ("muon", 2, SHARD2), ("by_loss", 2, SHARD2)]


def name_of(layout):
    model, ranks, keys = layout
    return f"{model}, {ranks} ranks, {' '.join(keys) or 'replicated'}"


@pytest.fixture(scope="module")
def six_steps(tmp_path_factory, chats):
    """(folder, function that makes the arguments of a run): six steps of six chats in several
    micro-batches, evaluated at both ends."""
    folder = tmp_path_factory.mktemp("six")

    def make_argv(model, out, *more):
        return [f"data.train.chats.path={chats}", "data.validation_split=7",
                "data.tokenizer=bytes", f"data.cache_dir={folder / 'tokens'}", "model.n_layers=2",
                "model.d_model=32", "model.n_heads=4", "model.n_kv_heads=2", "batch_size=6",
                "micro_tokens=240", "max_steps=6", "epochs=0", "log_every=1", "eval_every=6",
                "save_every=3", "checkpoint.keep=9", "eval_tokens=8", "eval_prompts=5", "eval_share=0", "lr=1e-3", "dtype=float32",
                "samples=0", "checkpoint.export=false", f"out_dir={folder / out}",
                *MODELS[model][0], *more]
    return folder, make_argv


@pytest.fixture(scope="module")
def layout_runs(six_steps):
    """layout_runs(ranks) runs all layouts of this number of ranks, once; on one rank, each model."""
    folder, make_argv = six_steps

    @functools.cache
    def run_layouts(ranks):
        layouts = [(model, 1, []) for model in MODELS]
        if ranks > 1:
            layouts = [layout for layout in LAYOUTS if layout[1] == ranks]
        jobs = [("run", make_argv(layout[0], name_of(layout), *layout[2])) for layout in layouts]
        run_jobs(ranks, jobs, folder)
        return folder
    return run_layouts


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_train_step_is_the_same_on_any_mesh(layout_runs, layout):
    model, ranks, _ = layout
    one_rank_out = layout_runs(1) / name_of((model, 1, []))
    out = layout_runs(ranks) / name_of(layout)
    keys = ("loss", "grad_norm", "documents", "tokens", "val/chats/loss", "val/chats/exact_match")
    one = figures(one_rank_out, *keys)
    many = figures(out, *keys)
    assert len(one["loss"]) == 6 and len(one["val/chats/loss"]) == 2
    for key in ("documents", "tokens", "val/chats/exact_match"):
        assert one[key] == many[key], key
    for record in log.read(out)[1:-1]:                       # without the two evaluations
        assert record["slowest_rank"] in range(ranks) and 0 <= record["rank_wait"] <= 1
        assert record["memory_max"] >= record["memory"] > 1e7
        assert 1 >= record["data_wait_max"] >= record["data_wait"] >= 0
    tolerance = MODELS[model][1]
    for key in ("loss", "val/chats/loss", "grad_norm"):
        rel = 20 * tolerance if key == "grad_norm" else tolerance
        assert many[key] == pytest.approx(one[key], rel=rel), key
    file = Path("checkpoints", "00000006", "model.safetensors")
    shapes = [{name: t.shape for name, t in load_file(folder / file).items()}
              for folder in (one_rank_out, out)]
    assert shapes[0] == shapes[1]


def test_load_micro_batches_of_all_ranks_hold_the_steps_documents(six_steps):
    _, make_argv = six_steps
    cfg = configs.load(make_argv("full", "x"))[0]
    dataset = sampler.Dataset(tokenize_data.load_datasets(cfg)["train"])
    for step in (0, 7):
        expected = sampler.documents(step, cfg, dataset.sizes)
        for ranks in (1, 2, 4, 9):
            loaded = [sampler.load_micro_batches(expected, cfg, dataset, ranks, rank)[0]
                      for rank in range(ranks)]
            drawn = [int(i) for of_rank in loaded for batch in of_rank for i in batch["doc_ids"]]
            assert sorted(drawn) == sorted(expected)
            assert len({len(of_rank) for of_rank in loaded}) == 1


def test_checkpoint_moves_between_numbers_of_ranks(six_steps):
    """A run goes from 1 to 2, 4 and 1 ranks; each number of ranks writes the same files."""
    folder, make_argv = six_steps
    keys = ["save_every=1", "eval_every=0"]

    def run_job(*more):
        return "run", make_argv("full", "chain", *keys, *more)

    def forget_job(step):
        return "forget", str(folder / "chain"), step

    def copy_job(out, *more):
        argv = make_argv("full", "chain", *more)
        return "copy_checkpoint", argv, str(checkpoint_of("chain", 2)), str(folder / out)

    def checkpoint_of(out, step):
        return folder / out / "checkpoints" / f"{step:08}"
    run_jobs(1, [run_job(), ("copytree", str(folder / "chain"), str(folder / "one rank")),
                 forget_job(2)], folder)
    run_jobs(2, [run_job(*SHARD2), forget_job(3), copy_job("copy2", *SHARD2)], folder)
    run_jobs(4, [run_job(*HYBRID), forget_job(4), copy_job("copy4", *SHARD4)], folder)
    run_jobs(1, [run_job()], folder)
    one_rank = figures(folder / "one rank", "loss")["loss"]
    assert len(one_rank) == 6
    assert figures(folder / "chain", "loss")["loss"] == pytest.approx(one_rank, rel=1e-5)
    for file in ("model.safetensors", "optimizer.safetensors"):
        contents = {(checkpoint_of(out, 2) / file).read_bytes()
                    for out in ("chain", "copy2", "copy4")}
        assert len(contents) == 1


def test_resume_on_the_same_ranks_is_bitwise(six_steps, layout_runs):
    """The runs of the layouts are continued from step 3 and end with the same files and figures."""
    folder, make_argv = six_steps
    layout_runs(2)
    jobs = []
    for layout in RESUMED:
        resumed = folder / f"resumed, {name_of(layout)}"
        shutil.copytree(folder / name_of(layout), resumed, symlinks=True)
        jobs += [("forget", str(resumed), 3), ("run", make_argv(layout[0], resumed.name, *layout[2]))]
    run_jobs(2, jobs, folder)
    for layout in RESUMED:
        whole = folder / name_of(layout)
        resumed = folder / f"resumed, {name_of(layout)}"
        for file in ("model.safetensors", "optimizer.safetensors", "sampler.safetensors"):
            contents = [(out / "checkpoints" / "00000006" / file).read_bytes()
                        for out in (whole, resumed)]
            assert contents[0] == contents[1], (resumed, file)
        starts = (resumed / "starts.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in starts] == [0, 3]
        keys = ("loss", "grad_norm", "lr", "val/chats/loss")
        assert figures(resumed, *keys) == figures(whole, *keys)


def test_checkpoint_moves_between_meshes_and_dtypes(six_steps):
    """Two shards in bf16, then one rank in fp32, then two replicas with bf16 weights: one curve."""
    folder, make_argv = six_steps
    legs = [("move 1", 2, [*SHARD2, "dtype=bfloat16"]), ("move 2", 1, ["dtype=float32"]),
            ("move 3", 2, ["dtype=bfloat16", *BF16_STATE])]
    keys = ["save_every=2", "eval_every=0"]
    run_jobs(1, [("run", make_argv("full", "unmoved", *keys))], folder)
    losses = []
    for step, (out, ranks, more) in zip((0, 2, 4), legs):
        if step:
            previous = f"move {step // 2}"
            more = [*more, f"resume={folder / previous / 'checkpoints' / f'{step:08}'}"]
        run_jobs(ranks, [("run", make_argv("full", out, *keys, *more))], folder)
        steps = [(record["step"], record["loss"]) for record in log.read(folder / out)]
        losses += [loss for n, loss in steps if step < n <= step + 2]
    assert losses == pytest.approx(figures(folder / "unmoved", "loss")["loss"], rel=2e-3)


def test_save_adapter_of_a_sharded_model_loads_in_peft(six_steps):
    peft = pytest.importorskip("peft", reason="the reference, in requirements-dev.txt")
    transformers = pytest.importorskip("transformers")
    folder, make_argv = six_steps
    run_jobs(1, [("run", make_argv("full", "base", "checkpoint.export=true"))], folder)
    hf = folder / "base" / "hf"
    argv = make_argv("lora", "adapted", "checkpoint.export=true", "shard.lora.r=3",
                     f"model.init_from={hf}", f"data.tokenizer={hf}", *SHARD4)
    argv = [arg for arg in argv if not re.match(r"model\.(n_|d_)", arg)]
    # a sharded run that starts from this adapter equals one on one rank
    further = [arg for arg in argv if not arg.startswith(("shard.", "out_dir="))]
    further = [*further, f"shard.lora.init_from={folder / 'adapted' / 'adapter'}"]
    sharded = [*further, f"out_dir={folder / 'further4'}", *SHARD4]
    run_jobs(4, [("run", argv), ("run", sharded)], folder)
    run_jobs(1, [("run", [*further, f"out_dir={folder / 'further1'}"])], folder)
    first, on_one, on_four = (figures(folder / out, "loss")["loss"]
                              for out in ("adapted", "further1", "further4"))
    assert on_one == pytest.approx(on_four, rel=1e-5) and on_one != pytest.approx(first, rel=1e-4)
    reference = transformers.AutoModelForCausalLM.from_pretrained(hf)
    reference = peft.PeftModel.from_pretrained(reference, folder / "adapted" / "adapter").eval()
    ids = torch.randint(259, (1, 30), generator=torch.Generator().manual_seed(0))
    merged, plain = (M.load(path)[0].logits(M.pack_prompts(ids.tolist()))
                     for path in (folder / "adapted", hf))
    assert torch.allclose(merged, reference(ids).logits[0], atol=1e-4)
    assert not torch.allclose(merged, plain, atol=1e-3)


# --------------------------------------------------------------------------------------------------
# gradients, replicas, shards, waiting

SMALL = ["model.d_model=32", "model.n_layers=2", "model.n_heads=4", "model.vocab_size=259",
         "data.tokenizer=bytes", "device=cpu", "dtype=float32"]


def test_all_reduce_gradients_and_main_process_first_on_two_ranks(tmp_path):
    """Foreign .grad (zero_grad, p.grad = x) is summed; a changed replica is detected."""
    run_jobs(2, [("check_gradient_sums", SMALL),
                 ("check_detects_difference", SMALL, 1, "rank 1 from rank 0"),
                 ("check_local_shards", [2]),
                 ("check_order", str(tmp_path))], tmp_path)


def test_local_shard_and_check_replicas_on_a_mesh_of_four(tmp_path):
    """Ranks 1 and 3 hold the same rows on a mesh of 2 x 2."""
    run_jobs(4, [("check_local_shards", [4]), ("check_local_shards", [2, 2]),
                 ("check_detects_difference", [*SMALL, *HYBRID], 3, "rank 3 from rank 1")],
             tmp_path)


def test_offload_changes_no_bit_on_one_rank(tmp_path):
    """Gradients of several micro-batches are clipped and added up in host memory."""
    run_jobs(1, [("check_offload", [*SMALL, "grad_clip=0.01"], [
        [], ["dtype=bfloat16"], ["dtype=float16", "optimizer=muon"],
        ["shard.lora.r=2", "shard.quantize=int8"], BF16_STATE,
        ["shard.recompute=selective", "model.family=phi", "model.activation=gelu",
         "model.tie_embeddings=false"]])], tmp_path)


# --------------------------------------------------------------------------------------------------
# memory

SHAPES = {
    "narrow, many tokens": [
        "model.d_model=128", "model.n_layers=2", "model.vocab_size=4096", "micro_tokens=1024",
        "data.seq_len=256", "batch_size=8"],
    "selective, bf16, a small vocabulary": [
        "model.d_model=128", "model.n_layers=3", "model.n_heads=8", "model.n_kv_heads=2",
        "model.vocab_size=320", "micro_tokens=256", "data.seq_len=128", "batch_size=4",
        "dtype=bfloat16", "shard.recompute=selective"],
    "selective, another family": [
        "model.family=phi", "model.activation=gelu", "model.tie_embeddings=false",
        "model.d_model=128", "model.n_layers=4", "model.vocab_size=512", "micro_tokens=512",
        "data.seq_len=256", "batch_size=4", "shard.recompute=selective"],
    "norms before and after, softcap, dropout": [
        "model.family=gemma2", "model.norm_place=both", "model.d_model=128", "model.n_layers=3",
        "model.vocab_size=512", "micro_tokens=512", "data.seq_len=256", "batch_size=4",
        "model.attn_softcap=50.0", "dtype=bfloat16", "model.attn_pdrop=0.1", "model.resid_pdrop=0.1"],
    "lora, dropout, modules_to_save": [
        "model.d_model=256", "model.n_layers=3", "model.vocab_size=2048", "micro_tokens=512",
        "data.seq_len=128", "batch_size=8", "shard.lora.r=8", "shard.lora.dropout=0.1",
        "shard.lora.modules_to_save=[embed_tokens]"],
    "nf4, recompute": [
        "model.d_model=512", "model.n_layers=3", "model.vocab_size=1024", "micro_tokens=128",
        "data.seq_len=64", "batch_size=4", "shard.lora.r=8", "shard.quantize=nf4",
        "shard.recompute=true"],
    "nf4": [
        "model.d_model=256", "model.n_layers=3", "model.vocab_size=1024", "micro_tokens=512",
        "data.seq_len=128", "batch_size=8", "shard.lora.r=8", "shard.quantize=nf4"],
    "bf16 state": [
        "model.d_model=128", "model.n_layers=4", "model.vocab_size=1024", "micro_tokens=256",
        "data.seq_len=128", "batch_size=4", "dtype=bfloat16", *BF16_STATE],
    "bf16 state, fp32": [
        "model.d_model=512", "model.n_layers=3", "model.vocab_size=1024", "micro_tokens=256",
        "data.seq_len=128", "batch_size=4", *BF16_STATE],
    "offloaded": [
        "model.d_model=256", "model.n_layers=3", "model.vocab_size=1024", "micro_tokens=512",
        "data.seq_len=128", "batch_size=8", *OFFLOAD],
    "experts, bf16, lora": [
        "model.family=qwen3_moe", "model.d_model=256", "model.n_layers=2", "model.n_experts=8",
        "model.d_expert=128", "model.vocab_size=512", "micro_tokens=512", "data.seq_len=128",
        "batch_size=8", "dtype=bfloat16", "shard.lora.r=8"],
    "delta-net, recompute": [
        *DELTA_NET, "model.d_model=128", "model.n_layers=4", "model.vocab_size=1024",
        "micro_tokens=256", "data.seq_len=128", "batch_size=4", "shard.recompute=true"],
    "gemma4": [
        *GEMMA4, "model.d_model=128", "model.global_head_dim=64", "model.vocab_size=1024",
        "micro_tokens=512", "data.seq_len=128", "batch_size=8", "dtype=bfloat16"],
    "frozen": [
        "model.d_model=256", "model.n_layers=4", "model.vocab_size=2048", "micro_tokens=512",
        "data.seq_len=128", "batch_size=8", "param_groups=[{match: 'embed|blocks.0', train: false}]"]}
SHARDED = ["lora, dropout, modules_to_save", "nf4", "bf16 state, fp32", "offloaded", "frozen"]


# each takes seconds: alone, those that are not sharded below
@pytest.mark.parametrize("ranks, mesh, shapes", [
    (1, [], [what for what in SHAPES if what not in SHARDED]), (2, [], ["narrow, many tokens"]),
    (2, SHARD2, SHARDED)],
    ids=["1 rank", "replicated", "sharded"])
def test_predict_memory_is_within_a_tenth_of_the_measured_peak(tmp_path, ranks, mesh, shapes):
    """The peak is that of a step. Loading takes the parameters, and a tensor or two more."""
    outs = {what: tmp_path / f"{what}.json" for what in shapes}
    base = ["dtype=float32", "device=cpu", "data.tokenizer=bytes"]
    run_jobs(ranks, [("measure_memory", [*base, *SHAPES[what], *mesh], str(outs[what]))
                     for what in shapes], tmp_path)
    for what, out in outs.items():
        measured = json.loads(out.read_text())
        assert measured["predicted"] == pytest.approx(measured["step"], rel=0.1), (what, measured)
        assert measured["load"] <= measured["parameters"] + 2.5 * measured["largest"], what


# --------------------------------------------------------------------------------------------------
# failures: all ranks end, and torchrun's output ends with the error of the rank that failed

@pytest.mark.parametrize("how, message", [
    ("user error", "error: lr: this is wrong; do it right"),
    ("unpack", "ValueError: too many values to unpack (expected 2)"),
    ("exit", "exitcode  : 7"),
    ("kill", "Signal 9 (SIGKILL) received"),
    ("hang", "RuntimeError: the reason")])
def test_run_distributed_ends_all_ranks_and_reports_the_cause(tmp_path, how, message):
    done = torchrun(2, "tests/test_ranks.py", write_jobs(tmp_path, [("fail", how, 1)]))
    assert done.returncode != 0
    output, summary = done.stderr.split("FAILED\n")
    root_cause = summary.split("Root Cause")[1]
    assert message in root_cause and "rank      : 1" in root_cause
    assert "Connection" not in output and done.stdout == ""    # nothing from the rank that waited
    if how == "user error":
        assert output.count(message) == 1 and "in fail" not in output + summary
    elif how in ("unpack", "hang"):
        assert output.count(message) == 1 and "in fail" in output and "in fail" in root_cause


@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run"]],
                         ids=["python", "torchrun"])
def test_run_distributed_on_one_rank_keeps_the_traceback(tmp_path, launcher):
    for how, message in (("unpack", "ValueError: too many values"), ("user error", "error: lr:")):
        jobs = write_jobs(tmp_path, [("fail", how, 0)])
        done, = launch.run([*launcher, "tests/test_ranks.py", jobs])
        output, _, summary = done.stderr.partition("FAILED\n")
        assert done.returncode != 0 and output.count(message) == 1
        assert ("a, b = [1, 2, 3]" in output) == (how == "unpack")
        if launcher:
            assert message in summary and ("in fail" in summary) == (how == "unpack")


def test_run_distributed_prints_an_error_of_all_ranks_once(tmp_path, chats):
    """Here it is a mesh that is impossible."""
    done = torchrun(2, "train.py", f"data.train.chats.path={chats}", "data.tokenizer=bytes",
                    f"data.cache_dir={tmp_path / 'c'}", f"out_dir={tmp_path / 'o'}",
                    "dtype=float32", "max_steps=2", "shard.mesh.shard=3")
    output, summary = done.stderr.split("FAILED\n")
    assert done.returncode != 0
    assert output.count("error: shard.mesh.shard: 2 ranks are not a multiple of 3") == 1
    assert "error: shard.mesh.shard: 2 ranks" in summary.split("Root Cause")[1]
    assert "Traceback" not in output.split("error: ")[0] and not (tmp_path / "o").exists()


def test_init_distributed_refuses_restarts_on_several_nodes_with_torchruns_store(monkeypatch):
    for key, value in (("TORCHELASTIC_USE_AGENT_STORE", "True"), ("GROUP_WORLD_SIZE", "2"),
                       ("TORCHELASTIC_MAX_RESTARTS", "3")):
        monkeypatch.setenv(key, value)
    with pytest.raises(configs.UserError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        shard.store_of_this_start(dist.HashStore())
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    shard.store_of_this_start(dist.HashStore())


# --------------------------------------------------------------------------------------------------
# restarts and signals

class Nodes:
    """Two network namespaces joined by a wire; without the right to make them, the loopback."""
    names = [f"n{os.getpid()}-0", f"n{os.getpid()}-1"]    # others may run these tests, too
    interfaces = [f"v{os.getpid()}-0", f"v{os.getpid()}-1"]
    addresses = ["10.77.0.1", "10.77.0.2"]

    def __enter__(self):
        self.port = launch.free_port()
        try:
            self.__exit__()
            for name in self.names:
                self.ip("netns", "add", name)
            self.ip("link", "add", self.interfaces[0], "type", "veth",
                    "peer", "name", self.interfaces[1])
            for name, interface, address in zip(self.names, self.interfaces, self.addresses):
                self.ip("link", "set", interface, "netns", name)
                self.ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
                self.ip("-n", name, "link", "set", interface, "up")
                self.ip("-n", name, "link", "set", "lo", "up")
            self.prefixes = [["ip", "netns", "exec", name] for name in self.names]
        except (OSError, subprocess.CalledProcessError):
            self.prefixes = [[], []]
            self.addresses = ["127.0.0.1"] * 2
            self.interfaces = ["lo"] * 2
        return self

    def __exit__(self, *_):
        for name in self.names:
            if shutil.which("ip"):
                subprocess.run(["ip", "netns", "del", name], capture_output=True)

    @staticmethod
    def ip(*words):
        subprocess.run(["ip", *words], capture_output=True, check=True)

    def start(self, node, words, output, **env):
        """Start torchrun on a node; its output goes to a file."""
        command = [*self.prefixes[node], *LAUNCH, "--nnodes", "2",
                   "--local_addr", self.addresses[node], *words]
        env = os.environ | {"GLOO_SOCKET_IFNAME": self.interfaces[node]} | env
        with open(output, "w") as f:
            return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=env, stdout=f,
                                    stderr=subprocess.STDOUT)

    def start_elastic(self, node, words, output):
        """As the README starts several nodes that may be restarted."""
        rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{self.addresses[0]}:{self.port}",
                      "--rdzv_conf", f"is_host={int(node == 0)}"]
        return self.start(node, [*rendezvous, *words], output,
                          TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")


@pytest.fixture(scope="module")
def long_run(six_steps):
    """A run on 2 shards that is not interrupted. Returns a function that makes its arguments."""
    folder, make_argv = six_steps

    def make(out):
        return make_argv("full", out, "max_steps=24", "save_every=4", "eval_every=0", *SHARD2)
    run_jobs(2, [("run", make("unkilled"))], folder)
    return make


def check_restarted_run(folder, out, text, codes):
    """Started twice, resumed once, and the same figures as without the kill."""
    assert codes == [0] * len(codes), text
    assert len(re.findall(r"^device ", text, re.M)) == 2, text
    assert len(re.findall(r"^resum", text, re.M)) == 1, text
    keys = ("step", "loss", "grad_norm")
    assert figures(folder / out, *keys) == figures(folder / "unkilled", *keys)


# The rank is killed in step 9, when the checkpoint of step 4 is complete: the save of step 8 has waited for it.

def test_max_restarts_resumes_after_sigkill(six_steps, long_run):
    """Rank 1 is killed here; on two nodes, rank 0."""
    folder, _ = six_steps
    jobs = write_jobs(folder, [("run_until_killed", long_run("killed1"), 9, 1)])
    done = torchrun(2, "--max-restarts", "2", "tests/test_ranks.py", jobs)
    check_restarted_run(folder, "killed1", done.stdout + done.stderr, [done.returncode])


def test_max_restarts_resumes_after_sigkill_on_two_nodes(six_steps, long_run):
    folder, _ = six_steps
    outputs = [folder / f"killed2.output{node}" for node in range(2)]
    jobs = write_jobs(folder, [("run_until_killed", long_run("killed2"), 9, 0)])
    words = ["--nproc_per_node", "1", "--max-restarts", "2", "tests/test_ranks.py", jobs]
    with Nodes() as nodes:
        agents = [nodes.start_elastic(node, words, outputs[node]) for node in range(2)]
        codes = [agent.wait(timeout=200) for agent in agents]
    text = "".join(output.read_text() for output in outputs)
    check_restarted_run(folder, "killed2", text, codes)


def test_run_distributed_ends_the_other_node_too(tmp_path):
    """Without restarts. The other node says where the cause is printed."""
    jobs = write_jobs(tmp_path, [("fail", "raise", 1)])
    outputs = [tmp_path / f"output{node}" for node in range(2)]
    words = ["--nproc_per_node", "1", "tests/test_ranks.py", jobs]
    with Nodes() as nodes:
        agents = [nodes.start_elastic(node, words, outputs[node]) for node in range(2)]
        codes = [agent.wait(timeout=200) for agent in agents]
    assert all(codes)
    root_causes = [output.read_text().split("Root Cause")[1] for output in outputs]
    assert sum("RuntimeError: the reason" in text for text in root_causes) == 1
    assert sum("If that rank runs on another node" in text for text in root_causes) == 1


def test_train_stops_after_the_same_step_on_all_ranks_at_a_signal(six_steps):
    folder, make_argv = six_steps
    argv = make_argv("full", "ended", "max_steps=20000", "save_every=0", "eval_every=0", *SHARD2)
    process = subprocess.Popen([*LAUNCH, "--nproc_per_node", "2", "train.py", *argv], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if re.match(r"step +8/", line):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.communicate(timeout=60)[0]
    assert "stopped by signal 15 after step" in rest and "saved" in rest
    saved = checkpoint.list_checkpoints(folder / "ended")
    last_step = int(re.search(r"after step (\d+)", rest)[1])
    assert len(saved) == 1 and checkpoint.verify(saved[0])["step"] == last_step >= 8


def test_evaluate_stops_after_the_same_token_on_all_ranks(six_steps, layout_runs):
    """In the first evaluation on replicas, in the last one on shards; the resumed run evaluates again."""
    folder, make_argv = six_steps
    layout_runs(2)
    jobs = []
    for out, step, keys in (("first", 0, []), ("last", 6, SHARD2)):
        argv = make_argv("full", f"stopped {out}", *keys)
        jobs += [("stop_in_evaluation", argv, step, 1), ("run", argv)]
    run_jobs(2, jobs, folder)
    for out, keys in (("first", []), ("last", SHARD2)):
        figure_keys = ("step", "loss", "grad_norm", "val/chats/loss", "val/chats/exact_match")
        whole = figures(folder / name_of(("full", 2, keys)), *figure_keys)
        assert figures(folder / f"stopped {out}", *figure_keys) == whole


def test_init_distributed_gives_up_if_nobody_answers(monkeypatch):
    """Variables that torchrun has left: one line, for the rank that looks for the others and for the one that is
    looked for."""
    import datetime
    monkeypatch.setattr(shard, "JOIN_TIMEOUT", datetime.timedelta(seconds=1))
    env = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29689"}
    for rank in ("1", "0"):
        for key, value in (env | {"RANK": rank, "LOCAL_RANK": rank}).items():
            monkeypatch.setenv(key, value)
        with pytest.raises(configs.UserError, match=f"^MASTER_ADDR: rank {rank} waits for 2 ranks") as e:
            shard.init_distributed({"device": "cpu", "dtype": "float32"})
        assert "127.0.0.1:29689" in str(e.value) and "unset WORLD_SIZE RANK LOCAL_WORLD_SIZE" in str(e.value)


# --------------------------------------------------------------------------------------------------
# nodes

def test_two_nodes_of_two_are_four_ranks(six_steps, layout_runs):
    folder, make_argv = six_steps
    outputs = [folder / f"nodes.output{node}" for node in range(2)]
    with Nodes() as nodes:
        agents = []
        for node in range(2):
            words = ["--node_rank", node, "--nproc_per_node", "2",
                     "--master_addr", nodes.addresses[0], "--master_port", nodes.port,
                     "train.py", *make_argv("full", "nodes", *HYBRID)]
            agents.append(nodes.start(node, words, outputs[node]))
        codes = [agent.wait(timeout=120) for agent in agents]
    texts = [output.read_text() for output in outputs]
    assert codes == [0, 0], texts
    assert "4 ranks (replicate 2 x shard 2)" in texts[0] and "step" not in texts[1]
    keys = ("loss", "grad_norm", "val/chats/loss")
    one_node = layout_runs(4) / name_of(("full", 4, HYBRID))
    assert figures(folder / "nodes", *keys) == figures(one_node, *keys)
