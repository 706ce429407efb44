"""One model over many devices: ranks, mesh, adapters, precision, recompute; and what it will cost.

    torchrun --nproc_per_node 2 train.py configs/ft.yaml lr=1e-4 out_dir=out/two     two processes, the same run
    torchrun --nproc_per_node 2 train.py configs/ft.yaml shard.mesh.shard=2 out_dir=out/halves     each holds a half
    python shard.py configs/ft.yaml gpus=64 shard.mesh.shard=8     predicted memory per device, and what fills it

Ranks stand in a mesh of replicate x shard. Here 2 x 4:

                            shard  ->
    replicate    rank 0   rank 1   rank 2   rank 3      a row holds the whole state (weights, gradients, moments),
        |        rank 4   rank 5   rank 6   rank 7      a quarter on each; a column holds the same quarter
        v

    n x 1  every rank has all of it: the fastest where it fits            1 x n  ZeRO-3, the least memory (FSDP2);
    m x n  both: sharded in a node, say, replicated over nodes (HSDP)            ZeRO-2 with reshard_after_forward=false

What the ranks tell each other in a step, everything else being arithmetic that all of them can do:

    all-gather      along a row: a block's parts become its whole weights, in the computation's dtype, before it runs
                    forward, and, ZeRO-3 having freed them, again before it runs backward
    reduce-scatter  along a row, backward only: the ranks' gradients of a block are summed in fp32, each keeps its part
    all-reduce      along a column, backward only: those sums are summed; under n x 1 it is all there is, once a step,
                    over one tensor that holds every gradient. Forward there is nothing: a loss is a number each rank
                    adds its share to

The model file knows of none of these: a model that comes out of prepare() is called as before.

    masters     fp32, what the optimizer changes and a checkpoint keeps
    compute     bf16 or fp32; each matmul casts its weight, so gradients arrive in fp32 and add up in fp32
    LoRA        y = W x + (alpha / r) B A x: W stays as it is, A [r, in] and B [out, r] learn       (arXiv:2106.09685)
"""
import atexit, ctypes, itertools, json, math, os, sys, threading, time, traceback, uuid, warnings
from pathlib import Path

import configs

if __name__ == "__main__" and len(sys.argv) < 2:
    sys.exit(__doc__)

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.rendezvous import rendezvous

import model as transformer


# ---------------------------------------------------------------------------------------------------------------------
# ranks: one process each, started by torchrun. Without it there is one, and nobody to tell

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def together(main, *args):
    """main(*args) on every rank. When one fails, all end, and the one error that matters is told, once and last."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        configs.run(main, *args)
        return
    try:
        join(*args)
        main(*args)
        dist.barrier()
        code = 0
    except SystemExit as e:
        code = e.code
    except Exception as e:
        mistake, text = configs.ours(e), traceback.format_exc().rstrip()
        if mistake:
            text = f"error: {e}"
        elif any(sign in str(e) for sign in GONE):             # a consequence; the rank that failed says why, if it can
            text = f"rank {rank()} has lost another, whose last words or signal are the reason: {e}"
            time.sleep(1)
        try:
            first = STORE[0].add("failed", 1) == 1
        except IndexError:                                     # nothing to agree by yet: a mistake is everybody's
            first = not mistake or os.environ.get("LOCAL_RANK", "0") == "0"
        except RuntimeError:                                   # it went with its node
            first = False
        if first:
            tell(text)
        os._exit(1)                                            # nothing of what is under way waits for the others
    leave()
    atexit._run_exitfuncs()                                    # as an exit does. But gloo's threads hold tensors, and
    sys.stdout.flush()                                         # abort, at times, an interpreter that winds up
    os._exit(code)                                             # (pytorch/pytorch#179291)


GONE = ("Connection closed by peer", "Connection reset by peer", "remote process exited", "communicator was aborted")


def tell(text):
    """An error, on standard error and to torchrun, whose last words it then is."""
    print(text, file=sys.stderr, flush=True)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))


def join(cfg, *_):
    """Meet the other ranks, by what torchrun has put into the environment."""
    device = pick_device(cfg)[0]
    here, gpu = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), device.type == "cuda"
    if gpu and torch.cuda.device_count() < here:
        raise ValueError(f"torchrun: {here} processes on a node of {torch.cuda.device_count()} GPUs; "
                         f"--nproc_per_node {torch.cuda.device_count()}, or device=cpu")
    if gpu:
        torch.cuda.set_device(device)
    store, rank, ranks = next(rendezvous("env://"))
    store = dist.PrefixStore(this_start(store, rank, ranks), store)
    STORE.append(store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", store=store, rank=rank, world_size=ranks,
                            device_id=device if gpu else None)
    if rank:
        warnings.simplefilter("ignore")                        # the console speaks once
    WATCH.start()


def this_start(store, rank, ranks):
    """A word that the ranks of this start share and no earlier one had. torchrun's restarts leave the old keys there.

    Rank 0 posts a new word. The others answer it with a word of their own, until it answers that: what an earlier
    rank 0 has posted never does.
    """
    mine = uuid.uuid4().hex
    if rank == 0:
        store.set("start", mine)
        for other in range(1, ranks):
            store.set(f"{mine}/{wait_for(f'{mine}/{other}', store)}", "")
        return mine
    while True:
        start = store.get("start").decode()
        store.set(f"{start}/{rank}", mine)
        if store.check([f"{start}/{mine}"]):
            return start
        time.sleep(0.1)


def leave():
    """Part from the others, at the end."""
    LEAVING.set()
    if WATCH.ident:
        WATCH.join()
        dist.destroy_process_group()


STORE = []                                                     # what all ranks write keys to and read them from


def watch():
    """End this rank soon after another has failed, wherever it is stuck: in a kernel that waits for the dead, say."""
    try:
        while not STORE[0].check(["failed"]):
            if LEAVING.wait(1):
                return
    except RuntimeError:                                       # the store's node is gone
        pass
    if not LEAVING.wait(5):
        os._exit(1)


WATCH, LEAVING = threading.Thread(target=watch, daemon=True), threading.Event()


def post(key, text=""):
    """Leave a message for wait_for()."""
    if ranks() > 1:
        STORE[0].set(key, text)


def wait_for(key, store=None):
    """Until some rank posts `key`, however long that takes: a collective would give up -> its text."""
    store = store or STORE[0]
    while not store.check([key]):
        time.sleep(0.05)
    return store.get(key).decode()


TURNS = itertools.count()                                      # every rank counts the same


def on_first(function, *args):
    """function(*args), called on rank 0 alone, however long it takes -> what it returned there, on every rank."""
    if ranks() == 1:
        return function(*args)
    out, key = [None], f"turn{next(TURNS)}"
    if rank() == 0:
        out = [function(*args)]
        post(key)
    else:
        wait_for(key)
    dist.broadcast_object_list(out)
    return out[0]


def in_turn(function, *args, doing):
    """function(*args), which fills a folder: rank 0 first, then one rank of each other node, then the rest.

    A node's folder may be its own, or all nodes'; whoever comes later finds it filled.
    doing  what rank 0 does meanwhile, for those who wait
    """
    if ranks() == 1:
        return function(*args)
    turn, node, first = next(TURNS), os.environ.get("GROUP_RANK", "0"), os.environ.get("LOCAL_RANK", "0") == "0"
    mine, told, started = f"turn{turn}/node{node}", rank() != 1, time.monotonic()
    while rank() and not STORE[0].check([f"turn{turn}/node0" if first else mine]):
        time.sleep(0.05)
        if not told and time.monotonic() - started > 3:
            print(f"rank 0 is {doing}, the others wait", flush=True)
            told = True
    out = function(*args)
    if first:
        post(mine)
    return out


def summed(values):
    """A list of numbers on each rank -> their sums over ranks, in fp64."""
    values = torch.tensor(values, dtype=torch.float64)
    if ranks() > 1:
        dist.all_reduce(values)
    return values.tolist()


def largest(n):
    """An int on each rank -> the largest of them."""
    n = torch.tensor(n)
    if ranks() > 1:
        dist.all_reduce(n, dist.ReduceOp.MAX)
    return int(n)


def gathered(value):
    """Any value on each rank -> [every rank's]"""
    out = [value]
    if ranks() > 1:
        out = [None] * ranks()
        dist.all_gather_object(out, value)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# device and precision

def pick_device(cfg):
    """cfg -> (torch.device, compute dtype). Raises ValueError where the device isn't there."""
    name = cfg["device"] if cfg["device"] != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda is not available here; device=cpu or auto")
    device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)
    dtype = cfg["dtype"] if cfg["dtype"] != "auto" else "bfloat16" if has_bf16(device) else "float32"
    return device, getattr(torch, dtype)


def has_bf16(device):
    """Does the hardware multiply bf16 matrices faster than fp32 ones?"""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(known.get("amx_bf16") or known.get("avx512_bf16"))


def row_multiple(device, dtype, micro_tokens):
    """What a row's length is a multiple of: kernels are prepared, and kept, for every new shape, so there are few.

    A row is no longer than its step needs: on CUDA there are sixteen lengths, or fewer.
    """
    if device.type == "cuda":
        return max(256, -(-micro_tokens // 16))
    return 64 if dtype == torch.bfloat16 else 1


def set_threads():
    """Share the machine's cores among its processes, unless OMP_NUM_THREADS says more than torchrun's own 1."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if here > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // here))


def keep_memory():
    """Let freed memory stay with the process: a page that the kernel gives anew costs more than what is done with it.

    glibc's malloc asks the kernel for every large block and gives it back at once; mallopt(3) has the options. Where
    the C library is another, nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for option, value in ((-4, 0), (-1, -1), (-2, 64 << 20)):  # no mappings, no trimming, the heap grows by 64 MB
        if mallopt:
            mallopt(option, value)


# ---------------------------------------------------------------------------------------------------------------------
# LoRA

class LoRALinear(nn.Module):
    """A frozen linear layer with an adapter for each of its parts (q, k, v: one matmul inside, three layers outside).

    parts  [(their name of the layer, first output, one behind the last)] of those that are adapted

    The adapters' A stand in one matrix [n r, in], so that x is read once for all of them.
    """

    def __init__(self, base, parts, r, alpha):
        super().__init__()
        self.base, self.parts, self.r, self.scale = base.requires_grad_(False), parts, r, alpha / r
        self.spans = [(start, end) for _, start, end in parts]     # without names, so that equal layers share a graph
        self.A = nn.Parameter(torch.empty(len(parts) * r, base.in_features, device=base.weight.device))
        zeros = (torch.zeros(end - start, r, device=base.weight.device) for _, start, end in parts)
        self.B = nn.ParameterList(nn.Parameter(B) for B in zeros)

    def forward(self, x):                                                                             # [T, in]
        low = F.linear(x, self.A.to(x.dtype)) * self.scale                                            # [T, n r]
        rows, at = [], 0                                       # all B in one matrix [out, n r], 0 where they are not:
        for n, ((start, end), B) in enumerate(zip(self.spans, self.B)):    # what is wide is written once, not per part
            rows += [B.new_zeros(start - at, low.shape[1]), F.pad(B, (n * self.r, low.shape[1] - (n + 1) * self.r))]
            at = end
        rows.append(B.new_zeros(self.base.out_features - at, low.shape[1]))
        return self.base(x).addmm_(low, torch.cat(rows).to(x.dtype).T)

    def delta(self):
        """What the adapters add to the base's weight. -> [out, in] in fp32"""
        out = torch.zeros(self.base.weight.shape, device=self.A.device)
        for (_, start, end), A, B in zip(self.parts, self.A.split(self.r), self.B):
            out[start:end] = B @ A * self.scale
        return out


def add_lora(model, m, lora):
    """Freeze the model and put adapters on its linear layers, in place. Raises ValueError for a target no layer has.

    Their values come by with_adapters().
    """
    model.requires_grad_(False)
    names, known = transformer.hf_weight_names(model, m), set()
    linear = [name for name, module in model.blocks.named_modules(prefix="blocks") if isinstance(module, nn.Linear)]
    for layer in linear:
        base, theirs = model.get_submodule(layer), [t.removesuffix(".weight") for t in names[f"{layer}.weight"]]
        rows = transformer.fused_sizes(f"{layer}.weight", m) if len(theirs) > 1 else [base.out_features]
        ends = [sum(rows[:n + 1]) for n in range(len(rows))]
        known |= {t.split(".")[-1] for t in theirs}
        parts = [(t, start, end) for t, start, end in zip(theirs, [0, *ends], ends)
                 if not lora["targets"] or t.split(".")[-1] in lora["targets"]]
        if parts:
            parent, _, child = layer.rpartition(".")
            setattr(model.get_submodule(parent), child, LoRALinear(base, parts, lora["r"], lora["alpha"]))
    if strange := [t for t in lora["targets"] if t not in known]:
        raise ValueError(f"shard.lora.targets: {strange[0]} is none of {', '.join(sorted(known))}")


def with_adapters(model, read, seed):
    """read() of a base's weights -> read() for the model with adapters: A starts as PEFT starts it, B at 0."""
    def read_all(name, start, end):
        if not model.get_parameter(name).requires_grad:
            return read(name.replace(".base.", "."), start, end)
        layer, _, kind = name.rpartition(".")
        if kind != "A":
            return torch.zeros(end - start, *model.get_parameter(name).shape[1:])
        module = model.get_submodule(layer)
        bound = 1 / math.sqrt(module.base.in_features)         # kaiming_uniform with a = sqrt(5)
        drawn = (torch.empty(module.r, module.base.in_features).uniform_(-bound, bound, generator=generator)
                 for generator in (transformer.make_generator(seed, their) for their, _, _ in module.parts))
        return torch.cat(list(drawn))[start:end]
    return read_all


def merged(model, read):
    """read(name) of a plain model's tensors: the base's as read() has them, and on top what the adapters learned."""
    plain = {name.replace(".base.", "."): p for name, p in model.named_parameters() if not p.requires_grad}

    def read_whole(name):
        layer, _, kind = name.rpartition(".")
        out, module = read(name, 0, len(plain[name])), model.get_submodule(layer)
        return out + module.delta() if isinstance(module, LoRALinear) and kind == "weight" else out
    return read_whole


def save_adapter(model, m, lora, folder, base):
    """The adapters in PEFT's layout: adapter_model.safetensors and adapter_config.json."""
    from safetensors.torch import save_file
    folder, tensors = Path(folder), {}
    folder.mkdir(parents=True, exist_ok=True)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    for name, module in layers.items():
        for (their, start, end), A, B in zip(module.parts, module.A.split(module.r), module.B):
            if end - start == module.base.out_features:        # one layer of theirs, maybe in another order
                B = transformer.to_hf(f"{name}.weight", B, m)[f"{their}.weight"]
            for letter, tensor in (("A", A), ("B", B)):
                tensors[f"base_model.model.{their}.lora_{letter}.weight"] = tensor.detach().float().cpu().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = {their.split(".")[-1] for module in layers.values() for their, _, _ in module.parts}
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": lora["r"],
              "lora_alpha": lora["alpha"], "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
              "fan_in_fan_out": bool(configs.families()[m["family"]].get("transposed")),
              "target_modules": sorted(targets)}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# a model in parts

def mesh_sizes(cfg, ranks):
    """-> (replicate, shard), whose product is `ranks`. Raises ValueError where that can't be."""
    replicate, shards = cfg["shard"]["mesh"]["replicate"], cfg["shard"]["mesh"]["shard"]
    shards = shards or (ranks // replicate if replicate else 1)
    replicate = replicate or ranks // shards
    if replicate * shards != ranks:
        raise ValueError(f"shard.mesh: replicate {replicate} x shard {shards} is not {ranks} ranks; "
                         "null stands for what the other leaves")
    return replicate, shards


def split(model, cfg, device, dtype):
    """Lay a model's parameters over the mesh's rows, in place: by blocks, and one more part for what is around them.

    What is around them (embedding, last norm, head) is gathered in fp32: the sum of an embedding's gradient over a
    row's tokens would suffer in bf16.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    replicate, shards = mesh_sizes(cfg, ranks())
    sizes, names = ((replicate, shards), ("replicate", "shard")) if replicate > 1 else ((shards,), ("shard",))
    mesh = dist.init_device_mesh(device.type, sizes, mesh_dim_names=names)
    policy = lambda dtype: MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy(dtype),
                    reshard_after_forward=cfg["shard"]["reshard_after_forward"])
    fully_shard(model, mesh=mesh, mp_policy=policy(None))
    for module in sharded(model):
        module.set_gradient_divide_factor(1.0)                 # a sum: the loss is divided by the whole step's weight
        module.set_force_sum_reduction_for_comms(True)         # gloo knows no other way not to divide
    register_fsdp_forward_method(model, "logits")


def sharded(model):
    """The modules whose parameters lie over ranks, if any. By what they can do: importing their type takes time."""
    return [module for module in model.modules() if hasattr(module, "set_requires_gradient_sync")]


def one_gradient(model):
    """Let the gradients of all trained parameters be views of one tensor, which one all-reduce can sum. -> it"""
    params = [p for p in model.parameters() if p.requires_grad]
    flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device)
    for p, grad in zip(params, flat.split([p.numel() for p in params])):
        p.grad = grad.view_as(p)
    return flat


def part(p):
    """A parameter, or what an optimizer keeps for it -> (what this rank holds of it, first row, one behind the last)"""
    if not hasattr(p, "device_mesh"):
        return p.detach(), 0, len(p)
    n, mesh = len(p), p.device_mesh
    each = -(-n // mesh.size(-1))                              # the last ranks may hold fewer rows, or none
    start = min(n, each * mesh.get_local_rank(mesh.ndim - 1))
    return p.detach().to_local(), start, min(n, start + each)


def saves(p):
    """Is it this rank that saves its part of p? One of those that hold the same is enough."""
    if not hasattr(p, "device_mesh"):
        return rank() == 0
    return p.device_mesh.ndim == 1 or p.device_mesh.get_local_rank(0) == 0


def prepare(model, m, cfg, read):
    """A model without weights (on "meta") and read() of them -> ready to train on this run's devices, in place."""
    device, dtype = pick_device(cfg)
    if device.type == "cpu":
        keep_memory()
    else:                                                      # else a kernel may add in whatever order its parts end
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(cfg["shard"]["deterministic"])
        torch.utils.deterministic.fill_uninitialized_memory = False
    if cfg["shard"]["lora"]["r"]:
        add_lora(model, m, cfg["shard"]["lora"])
        read = with_adapters(model, read, cfg["seed"])
        if dtype == torch.bfloat16:                            # frozen weights need no fp32 master: half the memory
            for name, p in model.named_parameters():
                if not p.requires_grad and p.dim() == 2:
                    p.data = p.data.to(dtype)
    model.dtype, model.recompute = dtype, cfg["shard"]["recompute"]
    if model.recompute is None:                                # by formula: the same wherever the run goes on
        model.recompute = max(sum(held.values()) for held in plan(m, cfg, ranks()).values()) > room(device)
    replicate, shards = mesh_sizes(cfg, ranks())
    if shards > 1:
        split(model, cfg, device, dtype)
    transformer.load_weights(model.to_empty(device=device), read, part)    # every rank reads its own rows and no others
    if device.type == "cuda" if cfg["shard"]["compile"] is None else cfg["shard"]["compile"]:
        for block in model.blocks:                             # equal halves share what is compiled for one
            block.before, block.behind = torch.compile(block.before), torch.compile(block.behind)
    if replicate == ranks() > 1:
        model.gradient = one_gradient(model)
    return model


def room(device):
    """Bytes that a rank may fill on its device: most of it, or its share of the machine's."""
    if device.type == "cuda":
        return 0.9 * torch.cuda.get_device_properties(device).total_memory
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    return 0.9 * whole / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def graphs():
    """How often something was compiled so far."""
    compiler = sys.modules.get("torch._dynamo.utils")
    return compiler.counters["stats"]["unique_graphs"] if compiler else 0


# ---------------------------------------------------------------------------------------------------------------------
# a step's words between ranks

def before_row(model, last):
    """Parts: sum gradients over ranks in the last row's backward pass; before it each rank adds up its own."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)


def sum_gradients(model):
    """Behind the last row: the gradient becomes the sum of all ranks'."""
    if model.gradient is not None:
        dist.all_reduce(model.gradient)


def add_up(t):
    """A tensor on each rank's device -> their sum, in place, without waiting for it."""
    if ranks() > 1:
        dist.all_reduce(t)
    return t


def whole(t):
    """A number that may lie over ranks -> it, as a tensor."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def settle(model):
    """Give back what an evaluation gathered: without a backward pass nothing else would."""
    for module in sharded(model):
        module.reshard()


# ---------------------------------------------------------------------------------------------------------------------
# what it will cost

def kept_by_block(m, size, cuda, length):
    """Bytes per token that a block's forward pass keeps for its backward pass; `size` of a number in the computation.

    A norm keeps its input, and its output for the matmul that reads it; not q's and k's, for rope keeps nothing but its
    angles. Attention keeps q, k, v, its output and a sum per head (of short documents on a CPU in fp32), and there the
    output once more, for the matmul. The MLP keeps what goes into its activation, what comes out, and, gated, their
    product. Dropout keeps what it drops, and attention's its probabilities, for each token as many as its document is
    long.
    """
    C, H, K, E, F = m["d_model"], m["n_heads"], m["n_kv_heads"], m["head_dim"], m["d_ff"]
    fp32 = 4 if not cuda and length < transformer.FP32_ATTENTION_BELOW else size    # of attention
    norms = size * ((2 if m["shared_norm"] else 4) * C + (m["qk_norm"] != "none") * (H + K) * E)
    attention = fp32 * (H + 2 * K) * E + fp32 * H * E + 4 * H + (0 if cuda else size * H * E)
    drops = (2 * C if m["resid_pdrop"] else 0) + (H * length * (5 + fp32) if m["attn_pdrop"] else 0)
    return norms + attention + drops + size * F * (4 if m["glu"] else 2)


def plan(m, cfg, gpus=1):
    """Predicted bytes on each of `gpus` devices -> {moment of a step: {what: bytes}}, from formulas, without a device.

    The moments that can be the most: the loss, when every block's activations are kept; the last block's backward
    pass; the update. A row has as many tokens as batch_size and micro_tokens allow, all of them trained.
    """
    device = cfg["device"] if cfg["device"] != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    cuda, lora = device == "cuda", cfg["shard"]["lora"]
    narrow = cuda or has_bf16(torch.device("cpu")) if cfg["dtype"] == "auto" else cfg["dtype"] == "bfloat16"
    size = 2 if narrow else 4
    replicate, shards = mesh_sizes(cfg, gpus)
    model = transformer.build_on_meta(m)
    if lora["r"]:
        add_lora(model, m, lora)
    L, C, V = m["n_layers"], m["d_model"], model.padded_vocab_size
    n = lambda keep, module=model: sum(p.numel() for p in module.parameters() if keep(p))
    trained, frozen = n(lambda p: p.requires_grad), n(lambda p: not p.requires_grad)
    block, learning = n(lambda p: True, model.blocks[0]), n(lambda p: p.requires_grad, model.blocks[0])
    around = trained + frozen - L * block                      # embedding, last norm, head
    T = -(-cfg["batch_size"] // gpus) * cfg["data"]["seq_len"]
    rows, T = -(-T // cfg["micro_tokens"]), min(T, cfg["micro_tokens"])

    learns = 0 if lora["r"] else 4                             # of the head's gradient: bytes per weight
    turned = sum(p.numel() for name, p in model.named_parameters()
                 if p.requires_grad and transformer.matrix_rows(name, p, m))
    moments = {"adamw": 8 * trained, "muon": 8 * trained - 4 * turned, "sgd": 4 * trained * (cfg["momentum"] > 0)}
    moments = moments.get(cfg["optimizer"], 8 * trained)       # one of the user's own
    state = {"weights": (4 * trained + size * frozen) // shards, "moments": moments // shards}
    if shards > 1:                                             # gathered: what is around the blocks, and one or all
        blocks = 1 if cfg["shard"]["reshard_after_forward"] else L
        state["gathered weights"] = (size if lora["r"] else 4) * around + size * block * blocks
        gradients = 4 * trained if rows > 1 else 0
    else:                                                      # bf16 copies live as long as what needs them
        state["copies"] = size * block * L if size < 4 and not lora["r"] and not cfg["shard"]["recompute"] else 0
        gradients = 4 * trained if rows > 1 or gpus > 1 else 0

    kept = kept_by_block(m, size, cuda, cfg["data"]["seq_len"])
    input_only = size * C                                      # of a block that is computed again
    activations = T * (L * (input_only if cfg["shard"]["recompute"] else kept) + 8 * C + 2 * size * C)
    chunk, piece = (min(T, n) for n in transformer.chunk_sizes(V, size, cuda))
    plain = m["loss"] == "cross_entropy" and not m["loss_options"]
    logits = V * (chunk * size + piece * (8 if plain else 16))       # a piece's in fp32, and the gradient of each
    head = V * C * (learns + (learns and size) + (size if size < 4 and learns else 0)) + T * C * size
    backward = T * size * m["d_ff"] * (3 if m["glu"] else 2)   # gradients inside the MLP
    if cfg["shard"]["recompute"]:                              # two of them in the place of what was computed again
        backward -= 2 * T * size * m["d_ff"]
        backward += T * kept + (size * block if size < 4 else 0)
    if shards > 1:                                             # the next block's weights; gradients, as they are and in
        backward += size * block + (size + 4) * learning       # fp32, to be summed
    return {
        "at the loss": state | {"gradients": gradients, "activations": activations, "logits": logits, "head": head},
        "in the backward pass": state | {"gradients": max(gradients, V * C * learns), "activations": activations,
                                         "this block's": backward},
        "at the update": {"weights": state["weights"], "moments": state["moments"],
                          "gradients": 4 * trained // shards}}


def main(argv):
    options, argv = configs.take(argv, gpus=1)
    if options["gpus"] < 1:
        raise ValueError(f"gpus: expected at least 1, got {options['gpus']}")
    cfg, _, _ = configs.load(argv)
    m, gpus = cfg["model"], options["gpus"]
    if m["vocab_size"] is None:
        import tokenize_data
        m = transformer.resolve_vocab_size(m, tokenize_data.load_tokenizer(cfg).n_vocab)
    moments = plan(m, cfg, gpus)
    replicate, shards = mesh_sizes(cfg, gpus)
    moment, held = max(moments.items(), key=lambda item: sum(item[1].values()))
    total = sum(held.values())
    print(f"predicted on each of {gpus} device{'s' * (gpus > 1)} (replicate {replicate} x shard {shards}), "
          f"at most, which is {moment}:")
    for name, n in held.items():
        if n:
            print(f"  {name:<16} {n / 2**20:>12,.1f} MiB {n / total:>6.1%}  {'#' * round(40 * n / total)}".rstrip())
    print(f"  {'together':<16} {total / 2**20:>12,.1f} MiB")


if __name__ == "__main__":
    configs.run(main, sys.argv[1:])
