"""One model on many devices: ranks, FSDP2, LoRA, precision, and the memory that a run will need.

    torchrun --nproc_per_node 2 train.py configs/ft.yaml out_dir=out/two        two replicated ranks
    torchrun --nproc_per_node 2 train.py configs/ft.yaml shard.mesh.shard=2 out_dir=out/sharded
    python shard.py configs/ft.yaml gpus=64 device=cuda              predicted memory per device,
                                                and what fits one of memory=80 GiB

Ranks form a mesh of replicate x shard. Here 2 x 4:

                            shard  ->
    replicate    rank 0   rank 1   rank 2   rank 3      A row holds one copy of the training state
        |        rank 4   rank 5   rank 6   rank 7      (weights, gradients, optimizer), a quarter
        v                                               per rank. A column holds the same quarter.

    n x 1    replicated: every rank holds everything (data parallel). The fastest, if it fits.
    1 x n    sharded: ZeRO-3 by FSDP2, the least memory; ZeRO-2 with reshard_after_forward=false
    m x n    both (HSDP): sharded within a node, for example, and replicated over nodes

    With shard.offload=all, FSDP2 keeps what each rank holds in host memory, on any mesh.

Communication in one step:

    all-gather      along a row: a block's shards become its whole weights, before its forward pass
                    and, if they were freed in between (ZeRO-3), before its backward pass
    reduce-scatter  along a row, backward only: a block's gradients are summed in fp32, and each
                    rank keeps the rows of its shard
    all-reduce      along a column, backward only: sums these gradients over the replicas. On a
                    mesh of n x 1 it is the only communication, once per step.

model.py knows nothing of this: the model that parallelize() returns is called as before.

    precision   The computation is bf16, fp16 or fp32. Trained parameters and their gradients are
                fp32; those of blocks (shard.master_dtype) and the optimizer's state
                (shard.moment_dtype) may be bf16; frozen matrices have the dtype of the
                computation. Each matmul casts its weight; FSDP casts a block's weights when it
                gathers them. Gradients are summed over ranks in fp32.
    LoRA        y = W x + (alpha / r) B A x; W is frozen, A [r, in] and B [out, r] are trained
                (arXiv:2106.09685). With shard.quantize, W is stored in 4 or 8 bits per weight
"""
import atexit
import bisect
import ctypes
import datetime
import functools
import math
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path

import configs

if __name__ == "__main__":    # before torch is imported
    configs.exit_with_help(__doc__, sys.argv[1:])
    configs.load_or_exit(sys.argv[1:], gpus=1, memory=80.0)

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.rendezvous import rendezvous

import log
import model as transformer


# --------------------------------------------------------------------------------------------------
# ranks: one process per device, started, supervised and restarted by torchrun. Without torchrun
# there is one rank, and collectives return their argument

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank():
    """Number of this rank on its node. It is also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size():
    """Number of ranks on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


JOIN_TIMEOUT = datetime.timedelta(minutes=10)    # until all ranks have started


def init_distributed(cfg):
    """Join the process group of all ranks. Raises UserError if the launch command can't work."""
    device, _ = pick_device(cfg)
    if device.type == "cuda":
        if torch.cuda.device_count() < local_world_size():
            raise configs.UserError(
                f"torchrun: {local_world_size()} processes on a node with "
                f"{torch.cuda.device_count()} GPUs; "
                f"--nproc_per_node {torch.cuda.device_count()}, or device=cpu")
        torch.cuda.set_device(device)
    env = os.environ
    message = (f"MASTER_ADDR: rank {env['RANK']} waits for {env['WORLD_SIZE']} ranks to meet at "
               f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}; {configs.unset_hint(env)}")
    # printed if the ranks have not met after 5 s
    timer = threading.Timer(5, print, [message], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        wait_for_store()
        store, this_rank, n_ranks = next(rendezvous("env://", timeout=JOIN_TIMEOUT))
        store = store_of_this_start(store)
        dist.init_process_group(backend_of(device), store=store, rank=this_rank,
                                world_size=n_ranks,
                                device_id=device if device.type == "cuda" else None)
    except (dist.DistError, TimeoutError):
        raise configs.UserError(f"{message} (no answer)") from None
    finally:
        timer.cancel()
    if this_rank > 0:
        warnings.simplefilter("ignore")    # rank 0 prints the same warnings


def backend_of(device):
    """torch.distributed's backend. gloo communicates CPU tensors, as in all_reduce_sum()."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def wait_for_store():
    """Wait until the store through which ranks meet accepts connections. Raises TimeoutError.

    torch would wait as well, but print a stack trace for each attempt.
    """
    # torchrun's own store is there before it starts a rank; otherwise rank 0 opens it
    has_agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if os.environ["RANK"] == "0" and not has_agent_store:
        return
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    give_up_at = time.monotonic() + (60 if has_agent_store else JOIN_TIMEOUT.total_seconds())
    while time.monotonic() < give_up_at:
        try:
            socket.create_connection(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError


def store_of_this_start(store):
    """The store for this start, without the keys that earlier starts left in torchrun's store.

    torchrun keeps one store over its restarts. On one node, the number of the restart serves as a
    prefix. Several nodes may count restarts differently, so torchrun has to create a new store for
    each restart; UserError if it does not.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store    # another launcher, or a store made for this start only: no old keys
    may_restart = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
    if may_restart and int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
        raise configs.UserError(
            "torchrun: --max-restarts on several nodes needs --rdzv_backend c10d and, in the "
            "environment of torchrun on every node, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")
    return dist.PrefixStore("start " + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)


def run_distributed(main, cfg, *args):
    """Call main(cfg, *args) on every rank that torchrun started.

    If a rank fails, torchrun ends the others and prints the error of the failed rank last. A
    UserError is printed as one line, every other exception with its traceback.
    """
    # so that Ctrl-C also ends a rank that waits in a collective
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        configs.run(run_alone, main, cfg, *args)
        return
    exit_code = 0
    try:
        init_distributed(cfg)
        main(cfg, *args)
        dist.barrier()
    except SystemExit as error:
        # as in Python: exit(None) means 0, and exit(text) prints the text and means 1
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        exit_code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except Exception as error:
        wait_for_termination(error)
        print(error_text(error), file=sys.stderr, flush=True)
        configs.write_error_file(error, error_text(error))
        os._exit(1)    # don't wait for communication that can't complete any more
    dist.destroy_process_group()
    # os._exit() skips Python's shutdown, in which gloo's threads may still hold tensors and abort
    # the process (pytorch/pytorch#179291). What Python does at exit is done here.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def run_alone(main, cfg, *args):
    try:
        main(cfg, *args)
    except Exception as error:
        configs.write_error_file(error, error_text(error))
        raise


def wait_for_termination(error):
    """Wait, so that the rank with the original error exits first.

    torchrun shows the error of the first rank to exit, and ends all others, this one included. A
    rank that only lost its connection to a failed rank waits 5 s. If all ranks fail alike, local
    rank 0 reports at once, and the others wait 2 s.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)    # the training loop's handler would not exit
    if is_connection_loss(error):
        time.sleep(5)
    elif local_rank() > 0:
        time.sleep(2)


def is_connection_loss(error):
    """Did communication fail because another rank has ended?

    A DistError counts as one. The RuntimeErrors of gloo, for example, are known by their message.
    If this is wrong, the error is reported nevertheless, some seconds later.
    """
    texts = ("Connection closed by peer", "Connection reset by peer", "Broken pipe",
             "remote process exit", "communicator was aborted")
    if isinstance(error, RuntimeError) and any(text in str(error) for text in texts):
        return True
    return isinstance(error, dist.DistError)


def error_text(error):
    if isinstance(error, configs.UserError):
        return f"error: {error}"
    text = "".join(traceback.format_exception(error)).rstrip()
    if is_connection_loss(error):
        text += ("\nThis rank lost its connection to another rank. If that rank runs on another "
                 "node, the cause is printed there.")
    return text


# --------------------------------------------------------------------------------------------------
# collectives: every rank has to call them, in the same order

def all_reduce_(t):
    """Replace a tensor by its sum over ranks, in place. On a GPU the host does not wait for it."""
    if world_size() > 1:
        dist.all_reduce(t)
    return t


def all_reduce_sum(numbers):
    """A list of numbers per rank -> their sums over ranks, computed in fp64.

    On CPU tensors (gloo), so the GPU is not waited for.
    """
    return all_reduce_(torch.tensor(numbers, dtype=torch.float64)).tolist()


def all_reduce_max(numbers):
    """A list of ints per rank -> the largest of each over ranks. On CPU tensors as well."""
    t = torch.tensor(numbers)
    if world_size() > 1:
        dist.all_reduce(t, dist.ReduceOp.MAX)
    return t.tolist()


def all_gather_object(value):
    """A picklable value per rank -> the list of all ranks' values."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def new_gloo_group():
    """A process group of all ranks whose collectives may wait for a week; None for one rank.

    A thread that communicates in the background needs a group of its own.
    """
    if world_size() == 1:
        return None
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))


@functools.cache
def waiting_group():
    """The group in which ranks wait while rank 0 tokenizes, for example, which may take hours.

    The first call creates it, so all ranks have to make that call together.
    """
    return new_gloo_group()


def rank0_only(function, *args):
    """Call function(*args) on rank 0 alone, however long it takes. Every rank gets its result.

    If it raises, the other ranks wait until torchrun ends them.
    """
    if world_size() == 1:
        return function(*args)
    group = waiting_group()
    result = [function(*args) if rank() == 0 else None]
    dist.broadcast_object_list(result, group=group)
    return result[0]


def main_process_first(function, *args):
    """Call function(*args), which fills a folder, on every rank, in three phases.

    1) rank 0; 2) the first rank of every other node, whose disk may be its own; 3) all other ranks.
    So later phases find the folder filled. The ranks of a phase run together. Returns this rank's
    own result.
    """
    phase = 2
    if local_rank() == 0:
        phase = 0 if rank() == 0 else 1
    for current_phase in range(3):
        if current_phase == phase:
            result = function(*args)
        if world_size() > 1:
            dist.barrier(group=waiting_group())
    return result


# --------------------------------------------------------------------------------------------------
# device and precision

def pick_device(cfg):
    """Return (torch.device, dtype of the computation). Raises UserError for a missing device."""
    device_type = resolve_device_type(cfg)
    if device_type == "cuda" and not torch.cuda.is_available():
        raise configs.UserError("device: cuda is not available; device=cpu or device=auto")
    index = local_rank() if device_type == "cuda" else None
    return torch.device(device_type, index), resolve_dtype(cfg, device_type)


def resolve_device_type(cfg):
    if cfg["device"] != "auto":
        return cfg["device"]
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_dtype(cfg, device_type):
    if cfg["dtype"] != "auto":
        return getattr(torch, cfg["dtype"])
    return torch.bfloat16 if has_fast_bf16(device_type) else torch.float32


def has_fast_bf16(device_type):
    """Does the hardware multiply bf16 matrices faster than fp32 ones?"""
    if device_type == "cuda":
        if not torch.cuda.is_available():    # predicting for another machine: a recent GPU
            return True
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not hasattr(torch.cpu, "get_capabilities"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def pad_multiple(device, dtype, micro_tokens):
    """The multiple of tokens that micro-batches are padded to.

    With few different shapes, kernels are selected and memory blocks are allocated less often. On
    CUDA there are at most sixteen shapes. In bf16 on a CPU, oneDNN prepares and keeps a kernel per
    shape (117 us per token with multiples of 64, 139 without; LOG.md). In fp32 padding only costs.
    """
    if device.type == "cuda":
        return max(256, math.ceil(micro_tokens / 16))
    return 64 if dtype == torch.bfloat16 else 1


def set_threads():
    """Divide the cores among the ranks of a node, if OMP_NUM_THREADS is not set by the user.

    torchrun sets it to 1.
    """
    ranks_here = local_world_size()
    if ranks_here > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores = os.cpu_count()
        if hasattr(os, "sched_getaffinity"):
            cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // ranks_here))


def configure_device(device, cfg):
    """Settings of the process: memory on a CPU, determinism on a GPU."""
    if device.type == "cpu":
        configure_malloc(map_large_blocks=cfg["shard"]["quantize"] != "none")
        return
    # Without determinism a kernel may add its partial sums in the order in which they finish.
    torch.use_deterministic_algorithms(cfg["shard"]["deterministic"])
    # cuBLAS is deterministic only with a fixed workspace; harmless otherwise
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # deterministic mode would also fill every torch.empty(), which costs time; nothing here reads
    # uninitialized memory
    torch.utils.deterministic.fill_uninitialized_memory = False


# options of glibc's mallopt(3)
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_THRESHOLD = -3
M_MMAP_MAX = -4


def configure_malloc(map_large_blocks):
    """Keep freed memory in the process: page faults cost more than the work on the pages.

    By default glibc maps every large block anew and unmaps it at once. Here it maps no blocks,
    never shrinks the heap, and grows it by 64 MB. Does nothing with another C library.

    map_large_blocks  map blocks of 16 MB and more as glibc does. This is for dequantized weights:
                      in the heap, small tensors that live longer take a part of a freed weight's
                      place, and the next weight does not fit there. The heap grew to three times
                      what was in use.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        if map_large_blocks:
            mallopt(M_MMAP_THRESHOLD, 16 << 20)
        else:
            mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_TOP_PAD, 64 << 20)


def num_graphs():
    """Number of graphs that torch.compile has compiled so far; 0 if it was not imported."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


# --------------------------------------------------------------------------------------------------
# quantized weights. NF4 is equal to bitsandbytes's with double quantization, bit for bit

# quantiles of the normal distribution (QLoRA, arXiv:2305.14314, appendix E)
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
       0.7229568362236023, 1.0]
NF4_BLOCKSIZE = 64           # weights with one absmax
ABSMAX_BLOCKSIZE = 256       # absmax values that are quantized together
# stored per weight; int8 has 4 more per row
BYTES_PER_WEIGHT = {"nf4": 1 / 2 + 1 / NF4_BLOCKSIZE + 4 / (NF4_BLOCKSIZE * ABSMAX_BLOCKSIZE),
                    "int8": 1}


def nf4_pairs():
    """The two values of each byte of NF4 codes: fp32 [256, 2]. The first has the upper 4 bits."""
    return torch.cartesian_prod(torch.tensor(NF4), torch.tensor(NF4))


def dynamic_map():
    """The 256 values of the 8-bit dynamic data type (arXiv:1511.04561), ascending."""
    positive = []
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2 ** exponent + 1)
        positive.append((bounds[1:] + bounds[:-1]) / 2 * 10.0 ** (exponent - 6))
    positive = torch.cat(positive)
    return torch.cat([-positive, positive, torch.tensor([0.0, 1.0])]).sort().values


def quantize_blockwise(values, code, blocksize):
    """Divide blocks of values by their largest absolute value, and find the nearest codes.

    values  fp32, of any shape; the last block may be shorter
    code    fp32, ascending: the values that can be stored
    Returns (indices into code, uint8 in the shape of values; absmax, fp32 [number of blocks]).
    """
    n = values.numel()
    blocks = F.pad(values.flatten(), (0, -n % blocksize)).view(-1, blocksize)
    absmax = blocks.abs().amax(1)
    # clamp: a block of zeros would be divided by 0
    scaled = blocks * (1 / absmax.clamp(min=1e-38)).unsqueeze(1)
    bounds = (code[1:] + code[:-1]) / 2
    indices = torch.bucketize(scaled, bounds, out_int32=True).to(torch.uint8)
    return indices.flatten()[:n].view_as(values), absmax


def quantize_nf4(weight):
    """fp32 [rows, in] -> (two codes per byte [rows, in / 2]; absmax, fp32 [rows, in / 64])."""
    code = torch.tensor(NF4, device=weight.device)
    indices, absmax = quantize_blockwise(weight, code, NF4_BLOCKSIZE)
    packed = indices[:, 0::2] << 4 | indices[:, 1::2]
    return packed, absmax.view(len(weight), -1)


def quantize_absmax(absmax):
    """Double quantization of quantize_nf4's absmax: (uint8 in its shape, nested_absmax, offset)."""
    offset = absmax.mean()
    code = dynamic_map().to(absmax.device)
    indices, nested_absmax = quantize_blockwise(absmax - offset, code, ABSMAX_BLOCKSIZE)
    return indices, nested_absmax, offset


def dequantize_nf4(packed, absmax, nested_absmax, offset, pairs, absmax_code):
    """The inverse of quantize_nf4 and quantize_absmax: fp32 [rows, in].

    pairs        nf4_pairs()
    absmax_code  dynamic_map()
    """
    scales = absmax_code.index_select(0, absmax.flatten().int())
    scales = scales * nested_absmax.repeat_interleave(ABSMAX_BLOCKSIZE)[:scales.numel()] + offset
    values = pairs.index_select(0, packed.flatten().int())                # [rows * in / 2, 2]
    return values.view(-1, NF4_BLOCKSIZE).mul_(scales.unsqueeze(1)).view(len(packed), -1)


def quantize_int8(weight):
    """fp32 [rows, in] -> (int8 [rows, in], absmax, fp32 [rows])."""
    absmax = weight.abs().amax(1)
    scale = 127 / absmax.clamp(min=1e-36)
    return (weight * scale.unsqueeze(1)).round().to(torch.int8), absmax


def dequantize_int8(weight, absmax):
    return weight * (absmax / 127).unsqueeze(1)


def dequantize(weight, absmax, *nested):
    """The weight of a FrozenLinear from its stored() tensors: fp32 [out, in]."""
    if weight.dtype == torch.int8:
        return dequantize_int8(weight, absmax)
    return dequantize_nf4(weight, absmax, *nested)


class QuantizedMatmul(torch.autograd.Function):
    """linear(x, W, bias, ends): W is dequantized for the forward and again for the backward pass.

    Only x, [T, in], has a gradient. The last six arguments are FrozenLinear.stored(). They are
    listed, because torch 2.13's compiler loses ctx if their number varies.
    """

    @staticmethod
    def forward(ctx, x, bias, ends, weight, absmax, nested_absmax, offset, pairs, absmax_code):
        stored = (weight, absmax, nested_absmax, offset, pairs, absmax_code)
        ctx.save_for_backward(ends, *stored)
        return linear(x, dequantize(*stored).to(x.dtype), bias, ends)     # [T, out]

    @staticmethod
    def backward(ctx, grad_out):
        ends, *stored = ctx.saved_tensors
        weight = dequantize(*stored).to(grad_out.dtype)                   # [out, in]
        if ends is None:
            grad_x = grad_out @ weight
        else:
            from families import moe
            matrices = weight.unflatten(0, (len(ends), -1))               # [X, out, in]
            grad_x = moe.grouped_matmul(grad_out.contiguous(), matrices, ends)
        return grad_x, *[None] * 8


def linear(x, weight, bias=None, ends=None):
    """F.linear(), or for the experts of a mixture: each multiplies its rows of x by its rows of W.

    ends  int32 [X]: the rows of x that belong to expert e are ends[e - 1] ... ends[e] - 1
    """
    if ends is None:
        return F.linear(x, weight, bias)
    from families import moe
    return moe.grouped_linear(x, weight, ends, bias)


class FrozenLinear(transformer.Linear):
    """A frozen linear layer, whose weight may be stored quantized.

    nf4   parameters weight [out, in / 2] and absmax [out, in / 64] in uint8; buffers nested_absmax
          and offset in fp32, and the tables pairs and absmax_code: see dequantize_nf4()
    int8  parameter weight [out, in] in int8; buffer absmax [out] in fp32

    FSDP shards parameters by rows. Buffers are small, and whole on every rank.
    """

    def __init__(self, linear, quantize="none"):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None,
                         device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        self.n_experts = getattr(linear, "n_experts", 1)    # more: of moe.ExpertLinear
        self.quantize = quantize
        rows = linear.out_features
        buffers = dict.fromkeys(("nested_absmax", "offset", "pairs", "absmax_code"))    # None
        if quantize == "int8":
            self.weight = quantized_parameter(rows, linear.in_features, torch.int8)
            buffers["absmax"] = torch.empty(rows, device="meta")
        elif quantize == "nf4":
            n_blocks = linear.in_features // NF4_BLOCKSIZE                # of a row
            n_nested_blocks = math.ceil(rows * n_blocks / ABSMAX_BLOCKSIZE)
            self.weight = quantized_parameter(rows, linear.in_features // 2, torch.uint8)
            self.absmax = quantized_parameter(rows, n_blocks, torch.uint8)
            shapes = ((n_nested_blocks,), (), (256, 2), (256,))
            buffers = {name: torch.empty(shape, device="meta")
                       for name, shape in zip(buffers, shapes)}
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def stored(self):
        """The arguments of dequantize(). The last four are None for int8."""
        return (self.weight, self.absmax, self.nested_absmax, self.offset, self.pairs,
                self.absmax_code)

    def forward(self, x, seeds=None, ends=None):                         # [T, in]
        """seeds  not used here, see LoRALinear;  ends  see linear()"""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.quantize == "none":
            return linear(x, self.weight.to(x.dtype), bias, ends)
        return QuantizedMatmul.apply(x, bias, ends, *self.stored())

    def load_quantized(self, read_rows):
        """Quantize the weight while it is read. read_rows: (first row, end row) -> rows"""
        quantize_rows = quantize_nf4 if self.quantize == "nf4" else quantize_int8
        weight, start, end = local_shard(self.weight)
        absmax = torch.zeros(self.absmax.shape, device=weight.device)
        for low, high in transformer.row_ranges(start, end):
            rows = read_rows(low, high).to(weight.device).float()
            weight[low - start:high - start], absmax[low:high] = quantize_rows(rows)
        # quantize_absmax() needs the absmax of all rows: those of other ranks are 0 so far
        if is_dtensor(self.weight):
            dist.all_reduce(absmax, dist.ReduceOp.MAX)
        if self.quantize == "int8":
            self.absmax.copy_(absmax)
            return
        absmax, nested_absmax, offset = quantize_absmax(absmax)
        copy_rows(self.absmax, absmax)
        self.nested_absmax.copy_(nested_absmax)
        self.offset.copy_(offset)
        self.pairs.copy_(nf4_pairs())
        self.absmax_code.copy_(dynamic_map())


def quantized_parameter(rows, columns, dtype):
    return nn.Parameter(torch.empty(rows, columns, dtype=dtype, device="meta"), requires_grad=False)


# --------------------------------------------------------------------------------------------------
# LoRA

class LoRALinear(FrozenLinear):
    """A frozen linear layer with an adapter: x W^T + scale * (dropout(x) A^T) B^T.

    A is [r, in] and B [out, r]. init_adapters() gives them their values. Each expert of a
    moe.ExpertLinear has an adapter of its own: A is [X r, in] and B [X out, r].

    place  of the layer in its block. It makes the dropouts of a block's layers differ
    """

    def __init__(self, linear, lora_cfg, place, quantize="none"):
        super().__init__(linear, quantize)
        r = lora_cfg["r"]
        self.scale = adapter_scale(lora_cfg)
        self.dropout = lora_cfg["dropout"]
        self.place = place
        device = linear.weight.device
        self.lora_A = nn.Parameter(
            torch.empty(self.n_experts * r, linear.in_features, device=device))
        self.lora_B = nn.Parameter(torch.empty(linear.out_features, r, device=device))

    def forward(self, x, seeds=None, ends=None):                         # [T, in]
        """seeds  int32 [T] of the block's dropouts, see model.Block. None: no dropout"""
        adapter_x = x
        if seeds is not None and self.dropout:
            # + 3: see the table of noise in model.py, above hash_int32()
            layer_seeds = transformer.hash_int32(seeds + 3 + self.place)
            adapter_x = transformer.dropout(x, self.dropout, layer_seeds)
        low_rank = linear(adapter_x, self.lora_A.to(x.dtype), None, ends) * self.scale    # [T, r]
        y = super().forward(x, ends=ends)                                # [T, out]
        # in place: no second tensor of the width of the output
        if ends is not None:
            return y.add_(linear(low_rank, self.lora_B.to(x.dtype), None, ends))
        return y.addmm_(low_rank, self.lora_B.to(x.dtype).T)

    def delta(self):
        """What the adapter adds to the weight: [out, in] in fp32."""
        A = self.lora_A.unflatten(0, (self.n_experts, -1))               # [X, r, in]
        B = self.lora_B.unflatten(0, (self.n_experts, -1))               # [X, out, r]
        return (B @ A).flatten(0, 1) * self.scale

    def rows_of_A(self, first):
        """The rows of lora_A (a slice) of the expert that row `first` of lora_B belongs to."""
        r = len(self.lora_A) // self.n_experts
        expert = first * self.n_experts // len(self.lora_B)
        return slice(expert * r, (expert + 1) * r)


def adapter_scale(lora_cfg):
    """The factor of B A: alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv:2312.03732)."""
    r = lora_cfg["r"]
    return lora_cfg["alpha"] / (math.sqrt(r) if lora_cfg["rslora"] else r)


def add_lora(model, lora_cfg, quantize="none"):
    """Freeze the model and replace linear layers of its blocks by LoRALinear, in place.

    The modules of shard.lora.modules_to_save stay trained.

    quantize  how all linear layers of the blocks store their frozen weights; see FrozenLinear
    Raises UserError for a target that no layer has, for a module that does not exist, and for a
    width that NF4 cannot divide.
    """
    model.requires_grad_(False)
    model.adapter_dropout = lora_cfg["dropout"]
    # names of linear layers within their blocks; the index of a name is its place in LoRALinear
    places = list(dict.fromkeys(name for block in model.blocks
                                for name, module in block.named_modules()
                                if isinstance(module, nn.Linear)))
    layout = transformer.hf_slices(model.cfg)
    family = configs.families()[model.cfg["family"]]
    wanted = lora_cfg["targets"]
    known = set()
    for name, module in list(model.blocks.named_modules(prefix="blocks")):
        if not isinstance(module, nn.Linear):
            continue
        tensor, _, _ = layout[f"{name}.weight"][0]
        target = module_name(tensor)
        # PEFT adapts no module of files that have all experts in one tensor (Granite-MoE)
        can_adapt = not transformer.is_stacked(tensor, family)
        if can_adapt:
            known.add(target)
        if quantize == "nf4" and module.in_features % NF4_BLOCKSIZE:
            raise configs.UserError(
                f"shard.quantize: nf4 stores blocks of {NF4_BLOCKSIZE} weights, which do not "
                f"divide the rows of {name}, {module.in_features} long; shard.quantize=int8")
        if can_adapt and (not wanted or target in wanted):
            _, _, name_in_block = name.split(".", 2)
            layer = LoRALinear(module, lora_cfg, places.index(name_in_block), quantize)
        else:
            layer = FrozenLinear(module, quantize)
        model.set_submodule(name, layer)
    for target in wanted:
        if target not in known:
            raise configs.UserError(f"shard.lora.targets: must be some of "
                                    f"{', '.join(sorted(known))}; got {target}")
    for name in saved_tensors(model.cfg, lora_cfg["modules_to_save"]).values():
        model.get_parameter(name).requires_grad_(True)
    if any(isinstance(layer, LoRALinear) and layer.n_experts > 1 for layer in model.modules()):
        check_adapters_of_experts(lora_cfg)


def check_adapters_of_experts(lora_cfg):
    """Raise UserError for adapters of experts that PEFT loads wrongly or not at all."""
    layers = {"gate_proj", "up_proj", "down_proj"}
    if lora_cfg["targets"] and not layers <= set(lora_cfg["targets"]):
        raise configs.UserError("shard.lora.targets: PEFT loads adapters of experts only for "
                                "gate_proj, up_proj and down_proj together; name all or none")
    if lora_cfg["rslora"]:
        raise configs.UserError("shard.lora.rslora: PEFT scales adapters of experts in another "
                                "way; shard.lora.rslora=false, or shard.lora.targets without "
                                "gate_proj, up_proj and down_proj")


def tensors_outside_blocks(m):
    """{tensor of the exported files: parameter}. A tied head is listed, as the embedding."""
    tensors = {}
    for tensor, parts in transformer.hf_tensors(m).items():
        name, _, _ = parts[0]
        if not name.startswith("blocks."):
            tensors[tensor] = name
    if m["tie_embeddings"]:
        names = configs.families()[m["family"]].get("weights", {})
        tensors[names.get("head.weight", "head.weight")] = "embed.weight"
    return tensors


def module_name(tensor):
    """model.embed_tokens.weight -> embed_tokens"""
    return tensor.rpartition(".")[0].split(".")[-1]


def saved_tensors(m, modules_to_save):
    """The part of tensors_outside_blocks() in these modules, named as in the exported files.

    Embedding and tied head are one parameter, which has both names as soon as one is given.
    Raises UserError for a module that does not exist.
    """
    tensors = tensors_outside_blocks(m)
    known = {module_name(tensor) for tensor in tensors}
    for module in modules_to_save:
        if module not in known:
            raise configs.UserError(f"shard.lora.modules_to_save: must be some of "
                                    f"{', '.join(sorted(known))}; got {module}")
    chosen = {name for tensor, name in tensors.items() if module_name(tensor) in modules_to_save}
    return {tensor: name for tensor, name in tensors.items() if name in chosen}


def is_adapter(name):
    return name.endswith((".lora_A", ".lora_B"))


@torch.no_grad()
def init_adapters(model, seed):
    """A starts as in PEFT, B at 0, so that the adapters change nothing at first.

    A depends on the seed and the layer's name alone.
    """
    for name, module in model.named_modules():
        if not isinstance(module, LoRALinear):
            continue
        bound = 1 / math.sqrt(module.in_features)    # kaiming_uniform_ with a = sqrt(5)
        generator = transformer.make_generator(seed, name)
        A = torch.empty(module.lora_A.shape).uniform_(-bound, bound, generator=generator)
        copy_rows(module.lora_A, A)
        local_shard(module.lora_B)[0].zero_()


class MergedWeights:
    """Reads a model's parameters without LoRA, with the adapters added to the weights.

    model      with adapters and modules_to_save; its other weights are not used
    read_base  read() of the base: (name, first row, end row) -> rows
    """

    def __init__(self, model, read_base):
        self.model = model
        self.read_base = read_base

    def read(self, name):
        parameter = self.model.get_parameter(name)
        if parameter.requires_grad:                      # of modules_to_save
            return parameter
        layer, _, kind = name.rpartition(".")            # kind: "weight" or "bias"
        tensor = self.read_base(name, 0, len(parameter))
        module = self.model.get_submodule(layer)
        if kind == "weight" and isinstance(module, LoRALinear):
            tensor = tensor + module.delta()
        return tensor


def save_adapter(model, lora_cfg, folder, base):
    """Save the adapters in PEFT's layout: adapter_model.safetensors and adapter_config.json.

    base  the folder or hub id of the pretrained model, which PEFT loads first; empty if the base
          was drawn from the seed
    """
    if base and Path(base).is_dir():
        base = Path(base).resolve()                      # PEFT may be started in another folder
    family = configs.families()[model.cfg["family"]]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    n_fused = {}                                         # {target module: number of fused layers}
    for hf_module, layers, parts in adapted_modules(model):
        A, B = fuse_adapters(layers, parts)
        tensors[f"{PEFT_PREFIX}{hf_module}.lora_A.weight"] = A
        tensors[f"{PEFT_PREFIX}{hf_module}.lora_B.weight"] = B
        n_fused[hf_module.split(".")[-1]] = len(layers)
    saved = saved_tensors(model.cfg, lora_cfg["modules_to_save"])
    for tensor, name in saved.items():
        parameter = model.get_parameter(name)
        rows = transformer.unpadded_rows(name, len(parameter), model.cfg)
        tensors[PEFT_PREFIX + tensor] = parameter[:rows]
    # clone: a safetensors file holds no tensor twice
    tensors = {name: t.detach().float().cpu().clone(memory_format=torch.contiguous_format)
               for name, t in tensors.items()}
    r = lora_cfg["r"]
    alpha = lora_cfg["alpha"]
    # n fused adapters have rank n r. Their scale stays alpha / r with alpha n, or with rslora
    # alpha / sqrt(r) with alpha sqrt(n)
    power = 0.5 if lora_cfg["rslora"] else 1
    adapter_config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base) if base else None,
        "r": r, "lora_alpha": alpha, "lora_dropout": lora_cfg["dropout"], "bias": "none",
        "use_rslora": lora_cfg["rslora"],
        "rank_pattern": {target: n * r for target, n in n_fused.items() if n > 1},
        "alpha_pattern": {target: n ** power * alpha for target, n in n_fused.items() if n > 1},
        "inference_mode": True, "fan_in_fan_out": bool(family.get("transposed")),
        "target_modules": sorted(n_fused),
        "modules_to_save": sorted({module_name(tensor) for tensor in saved}) or None}
    if len(set(saved.values())) < len(saved):            # embedding and tied head: one parameter
        adapter_config["ensure_weight_tying"] = True
    if "carried" in family:    # parts that are not trained here, with modules of the same names
        parts = "|".join(re.escape(prefix) for prefix in family["carried"])
        adapter_config["exclude_modules"] = rf"(.*\.)?({parts}).*"
    config_file = folder / "adapter_config.json"
    transformer.write_json(config_file, adapter_config)
    transformer.write_safetensors(tensors, folder / "adapter_model.safetensors", config_file)


PEFT_PREFIX = "base_model.model."    # of the tensors in adapter_model.safetensors


def adapted_modules(model):
    """The modules of the exported files that have adapters: a list of (hf_module, layers, parts).

    hf_module  the name, such as model.layers.0.self_attn.q_proj
    layers     {parameter name: LoRALinear}; several if the module is fused
    parts      the entry of hf_tensors(), see fuse_adapters()
    """
    modules = []
    for tensor, parts in transformer.hf_tensors(model.cfg).items():
        layers = {name: model.get_submodule(name.rpartition(".")[0]) for name, _, _ in parts}
        is_adapted = all(isinstance(layer, LoRALinear) for layer in layers.values())
        if tensor.endswith(".weight") and is_adapted:
            modules.append((tensor.removesuffix(".weight"), layers, parts))
    return modules


def fuse_adapters(layers, parts):
    """Adapters of layers that are one module in Hugging Face's files, as one adapter (A, B).

        A = [A_q; A_k; A_v]  [3 r, in]      B = [[B_q, 0, 0], [0, B_k, 0], [0, 0, B_v]]  [out, 3 r]

    Targets are Hugging Face's modules, so that either all layers of a module have adapters or none.

    layers  {parameter name: LoRALinear}
    parts   [(parameter name, first row, number of rows)], in the order of the module's outputs. A
            layer has several parts if the outputs are those of q, k and v of each head in turn
    """
    names = list(layers)
    rows_of_A = {}
    rows_of_B = []
    for name, first, n_rows in parts:
        place = names.index(name)
        layer = layers[name]
        rows_of_A[name] = layer.lora_A[layer.rows_of_A(first)]
        B = layer.lora_B[first:first + n_rows]
        r = B.shape[1]
        rows_of_B.append(F.pad(B, (place * r, (len(names) - 1 - place) * r)))
    return torch.cat(list(rows_of_A.values())), torch.cat(rows_of_B)


def split_adapter(A, B, layers, parts, r):
    """The inverse of fuse_adapters(): {parameter name: (A [r, in], B [its outputs, r])}.

    An adapter of rank r that PEFT made for a fused module has one A for all of its layers.
    Returns None if the adapter has another rank, or was trained further after fuse_adapters().
    """
    is_fused = len(A) == len(layers) * r
    if not is_fused and len(A) != r:
        return None
    rows_of_B = {name: [] for name in layers}
    part_sizes = [n_rows for _, _, n_rows in parts]
    for (name, _, _), rows in zip(parts, B.split(part_sizes)):
        rows_of_B[name].append(rows)
    adapters = {}
    for place, (name, rows) in enumerate(rows_of_B.items()):
        columns = slice(place * r, (place + 1) * r) if is_fused else slice(None)
        layer_B = torch.cat(rows)
        # fuse_adapters() has zeros in all other columns
        if layer_B.count_nonzero() > layer_B[:, columns].count_nonzero():
            return None
        adapters[name] = (A[columns], layer_B[:, columns])
    return adapters


@torch.no_grad()
def load_adapter(model, lora_cfg):
    """Copy the tensors of shard.lora.init_from, a PEFT adapter, into a model, in place.

    lora_cfg  r and targets are the adapter's: see configs.hf_config.read_adapter()
    Raises UserError for tensors that are missing, unknown or of another shape.
    """
    folder = Path(lora_cfg["init_from"])
    adapter_config = configs.read_json(folder / "adapter_config.json")
    files = transformer.open_weights(folder)
    modules = adapted_modules(model)
    saved = saved_tensors(model.cfg, lora_cfg["modules_to_save"])
    check_adapter_tensors(folder, files, model, modules, saved)
    tensors = {name.removeprefix(PEFT_PREFIX): file.get_tensor(name)
               for name, file in files.items()}
    for hf_module, layers, parts in modules:
        A = tensors[f"{hf_module}.lora_A.weight"].float()
        B = tensors[f"{hf_module}.lora_B.weight"].float()
        B *= peft_scale(adapter_config, hf_module, len(A)) / adapter_scale(lora_cfg)
        adapters = split_adapter(A, B, layers, parts, lora_cfg["r"])
        if adapters is None:
            raise configs.UserError(
                f"shard.lora.init_from: {folder}: the adapter of {hf_module} has rank {len(A)} and "
                f"does not split into adapters of rank {lora_cfg['r']} (r of adapter_config.json); "
                "merge it into its base with PEFT, and start from that")
        for name, (layer_A, layer_B) in adapters.items():
            layer = layers[name]
            # the layer's first row in this module; above 0 if the module is one of the experts
            first = min(row for part, row, _ in parts if part == name)
            copy_rows(layer.lora_A, layer_A, layer.rows_of_A(first).start)
            copy_rows(layer.lora_B, layer_B, first)
    loaded = {}
    for tensor, name in saved.items():
        rows = tensors[tensor]
        if not torch.equal(loaded.setdefault(name, rows), rows):
            raise configs.UserError(f"shard.lora.init_from: {folder}: {tensor} differs from the "
                                    "embedding, to which config.json ties the head; merge it into "
                                    "its base with PEFT, and start from that")
        copy_rows(model.get_parameter(name), rows)


def check_adapter_tensors(folder, files, model, modules, saved):
    """Raise UserError unless a PEFT adapter has exactly the tensors that load_adapter() reads.

    files    {tensor: open safetensors file};  modules  adapted_modules();  saved  saved_tensors()
    """
    shapes = {}                                          # None: any size
    for hf_module, layers, parts in modules:
        in_features = next(iter(layers.values())).in_features
        out_features = sum(n_rows for _, _, n_rows in parts)
        shapes[f"{PEFT_PREFIX}{hf_module}.lora_A.weight"] = [None, in_features]
        shapes[f"{PEFT_PREFIX}{hf_module}.lora_B.weight"] = [out_features, None]
    for tensor, name in saved.items():
        n_rows, *rest = model.get_parameter(name).shape
        shapes[PEFT_PREFIX + tensor] = [transformer.unpadded_rows(name, n_rows, model.cfg), *rest]
    hint = ""
    if len(saved) > len(set(saved.values())):
        hint = " (the head is tied to the embedding: PEFT saves both with ensure_weight_tying)"
    wrong = [f"{tensor} is unknown" for tensor in sorted(files.keys() - shapes.keys())]
    for tensor, shape in shapes.items():
        if tensor not in files:
            wrong.append(f"{tensor} is missing")
            continue
        found = files[tensor].get_slice(tensor).get_shape()
        is_saved = tensor.removeprefix(PEFT_PREFIX) in saved
        if is_saved and shape[0] == model.cfg["vocab_size"]:
            if found[0] > shape[0]:
                hint = f"; its tokenizer has more tokens: data.tokenizer={folder}"
            else:
                shape = [found[0], *shape[1:]]           # tokens added since then have no rows
        if len(found) != len(shape) or any(n not in (None, m) for n, m in zip(shape, found)):
            wrong.append(f"{tensor} is {found}, and the model makes it {shape}")
    if wrong:
        raise configs.UserError(f"shard.lora.init_from: {folder}: the adapter does not fit the "
                                f"model: {transformer.shorten(wrong)}{hint}")


def peft_scale(adapter_config, hf_module, rank):
    """The factor of B A in PEFT, for a module whose adapter has this rank."""
    alpha = adapter_config.get("lora_alpha", 8)
    for pattern, value in adapter_config.get("alpha_pattern", {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", hf_module):
            alpha = value
            break
    return adapter_scale({"r": rank, "alpha": alpha,
                          "rslora": adapter_config.get("use_rslora", False)})


def copy_rows(p, rows, first=0):
    """Copy rows first ... first + len(rows) - 1 of a parameter, or those that this rank holds."""
    local, start, end = local_shard(p)
    low = max(start, first)
    high = min(end, first + len(rows))
    if low < high:
        local[low - start:high - start].copy_(rows[low - first:high - first])


# --------------------------------------------------------------------------------------------------
# parallelize a model

def parallelize(model, cfg, read_slice):
    """Make a model without weights (on the meta device) ready for training, in place.

    Sets model.dtype and model.recompute, which model.py reads. Returns the model.

    read_slice  (name, first row, end row) -> these rows of the parameter; see NewWeights.read and
                PretrainedWeights.read in model.py
    """
    # 1) device, precision, determinism
    device, dtype = pick_device(cfg)
    configure_device(device, cfg)
    model.dtype = dtype
    # 2) LoRA, frozen parameters
    lora_cfg = cfg["shard"]["lora"]
    if lora_cfg["r"]:
        add_lora(model, lora_cfg, cfg["shard"]["quantize"])
    freeze_parameters(model, cfg["param_groups"])
    cast_weights(model, dtype, getattr(torch, cfg["shard"]["master_dtype"]))
    # 3) recompute activations in the backward pass
    model.recompute = choose_recompute(model.cfg, cfg, device)
    if cfg["shard"]["recompute"] == "selective":
        model.recompute_options = {"context_fn": keep_matmuls(cfg, device)}
    # 4) shard
    offload = cfg["shard"]["offload"] == "all"
    _, shards = mesh_sizes(cfg, world_size())
    if shards > 1 or offload:
        apply_fsdp(model, cfg, device, dtype)
    # 5) load weights: each rank reads the rows of its shard only
    load_weights(model.to_empty(device="cpu" if offload else device), read_slice, cfg["seed"])
    if lora_cfg["r"] and lora_cfg["init_from"]:
        load_adapter(model, lora_cfg)
    if offload:
        model.offload_device = device
        for module in model.modules():                   # FSDP copies parameters, not buffers
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
    # 6) compile
    if should_compile(cfg, device):
        compile_blocks(model)
        if can_use_flex(model.cfg, cfg):
            flex_attention = torch.compile(transformer.flex_attention, dynamic=True, fullgraph=True)
            # scale and softcap are constants: torch compiles no kernel for floats that may change
            constants = torch._dynamo.config.patch(specialize_float=True)
            model.flex_attention = constants(flex_attention)
    return model


@torch.no_grad()
def load_weights(model, read_slice, seed):
    """Give a model its weights: each rank reads the rows of its shard. Adapters are new ones."""
    for name, p in log.progress(dict(model.named_parameters()).items(), "load weights"):
        if p.is_floating_point() and not is_adapter(name):
            transformer.load_parameter(name, read_slice, *local_shard(p))
    for name, module in model.named_modules():
        if isinstance(module, FrozenLinear) and module.quantize != "none":
            module.load_quantized(functools.partial(read_slice, f"{name}.weight"))
    init_adapters(model, seed)


def freeze_parameters(model, param_groups):
    """Freeze the parameters of the config's param_groups with train: false.

    Raises UserError for such a group without parameters, and if nothing remains trained.
    """
    frozen_patterns = {spec["match"] for spec in param_groups if not spec.get("train", True)}
    used_patterns = set()
    for name, p in model.named_parameters():
        spec = matching_group(name, param_groups)
        if spec and spec["match"] in frozen_patterns:
            p.requires_grad = False
            used_patterns.add(spec["match"])
    for pattern in sorted(frozen_patterns - used_patterns):
        raise configs.UserError(f"param_groups: no parameter matches {pattern!r} (or an earlier "
                                "group already took them); python model.py FOLDER lists the names")
    if frozen_patterns and not any(p.requires_grad for p in model.parameters()):
        raise configs.UserError("param_groups: train: false leaves no parameter to train; freeze "
                                "fewer")


def matching_group(name, param_groups):
    """The first of the config's param_groups whose pattern is in a parameter's name, or None."""
    return next((spec for spec in param_groups if re.search(spec["match"], name)), None)


def cast_weights(model, dtype, master_dtype):
    """Store frozen matrices in dtype, and trained parameters of blocks in master_dtype.

    Frozen matrices need no fp32 copy. Gradients have the dtype of their parameters. Trained vectors
    are cast as well, though they are small: FSDP2 needs the same dtype for all of a block.
    Embedding and head stay in fp32: in bf16 the validation loss was higher in most runs
    (RECORDS.md).
    """
    for name, p in model.named_parameters():
        if p.requires_grad:
            if name.startswith("blocks."):
                p.data = p.data.to(master_dtype)
        elif p.dim() == 2 and p.is_floating_point():
            p.data = p.data.to(dtype)


def choose_recompute(model_cfg, cfg, device):
    """The number of blocks to recompute: shard.recompute, or as few as make a step fit."""
    n_blocks = model_cfg["n_layers"]
    if cfg["shard"]["recompute"] is not None:
        return n_recomputed(cfg["shard"]["recompute"], n_blocks)
    budget = memory_budget(device)
    for recompute in range(n_blocks):
        shard_cfg = cfg["shard"] | {"recompute": recompute}
        s = StepSize(model_cfg, cfg | {"shard": shard_cfg}, world_size())
        if peak_bytes(s, cfg["micro_tokens"]) <= budget:
            return recompute
    return n_blocks


def n_recomputed(recompute, n_blocks):
    """The number of blocks that a value of shard.recompute means; null counts as none."""
    if recompute is True or recompute == "selective":
        return n_blocks
    return min(int(recompute or 0), n_blocks)


def keep_matmuls(cfg, device):
    """The context_fn of torch.utils.checkpoint.checkpoint() for shard.recompute=selective.

    It keeps the outputs of matmuls and attention. Raises UserError if blocks are compiled.
    """
    if should_compile(cfg, device):
        raise configs.UserError(
            "shard.recompute: selective has no effect on compiled blocks, whose compiler "
            "recomputes norms and activation functions already; shard.recompute=false or "
            "shard.compile=false")
    kept = []
    if device.type == "cuda":                            # imported here: it takes seconds
        from torch.nn.attention import varlen            # defines torch_attn._varlen_attn
        kept.append(torch.ops.torch_attn._varlen_attn.default)
    for name in ("mm", "addmm", "_grouped_mm", "_scaled_dot_product_flash_attention",
                 "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
                 "_scaled_dot_product_flash_attention_for_cpu"):
        kept.append(getattr(torch.ops.aten, name).default)
    return functools.partial(torch.utils.checkpoint.create_selective_checkpoint_contexts, kept)


def memory_budget(device):
    """Bytes that a rank may use: 90% of its GPU, or of its share of the machine's memory."""
    if device.type == "cuda":
        return 0.9 * torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):
        return math.inf
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 0.9 * total / local_world_size()


def should_compile(cfg, device):
    if cfg["shard"]["compile"] is None:
        return device.type == "cuda"
    return cfg["shard"]["compile"]


def can_use_flex(m, cfg):
    """Does parallelize() compile flex_attention(): on CUDA, in bf16 or fp16, for this head_dim?

    For heads wider than 128, the kernels of torch 2.11 take up to 198 kB of shared memory. H100 and
    B200 have them, A100 and GeForce do not. Without a GPU, a prediction assumes one that has.
    """
    is_cuda = resolve_device_type(cfg) == "cuda"
    widest = max(m["head_dim"], m["global_head_dim"] or 0)
    if not is_cuda or cfg["shard"]["compile"] is False or m["head_dim"] < 16 or widest > 256:
        return False
    if resolve_dtype(cfg, "cuda") == torch.float32:
        return False
    if not torch.cuda.is_available():
        return True
    gpu = torch.cuda.get_device_properties(local_rank())
    return gpu.major >= 8 and (widest <= 128 or gpu.shared_memory_per_block_optin >= 200000)


def compile_blocks(model):
    """Compile what comes before and after attention, and on a GPU the loss.

    Equal blocks share the compiled code. dynamic=True: it serves all lengths of micro-batches.
    """
    # graphs per function: one each for blocks with and without rope, with and without a backward
    # pass, and for 0, 1 and more tokens
    torch._dynamo.config.recompile_limit = 32
    for block in model.blocks:
        block.pre_attention = torch.compile(block.pre_attention, dynamic=True)
        block.post_attention = torch.compile(block.post_attention, dynamic=True)
        if model.cfg["n_experts"]:           # its shapes depend on where tokens are sent
            block.mlp.forward = torch.compiler.disable(block.mlp.forward)
    if model.device.type == "cuda":
        model.token_losses = torch.compile(model.token_losses, dynamic=True)


def warm_up(model, cfg):
    """If the model is compiled: forward and backward of a full micro-batch, which is discarded.

    The compiler divides sums over tokens by the length that it sees first. With the same first
    length in every process, a resumed run computes bitwise what an uninterrupted one does.
    """
    device = model.device
    if not should_compile(cfg, device):
        return
    n_tokens = cfg["micro_tokens"]
    length = min(cfg["data"]["seq_len"], n_tokens)
    batch = transformer.pack_prompts([[0] * length] * (n_tokens // length), device)
    n_tokens = len(batch["tokens"])
    batch |= {"targets": batch["tokens"],
              "target_index": torch.arange(n_tokens, device=device),
              "loss_weights": torch.ones(n_tokens, device=device),
              "doc_ids": torch.arange(n_tokens // length, device=device)}
    model.train()
    loss_sum, _, _ = model(batch | {"noise_seed": 0})
    loss_sum.backward()
    model.zero_grad()
    model.expert_tokens = 0                              # counted in the forward pass
    with torch.no_grad():                                # validation
        model.eval()(batch)
    model.train()


def mesh_sizes(cfg, world_size):
    """Return (replicate, shard), whose product is world_size. Raises UserError if it can't be."""
    replicate = cfg["shard"]["mesh"]["replicate"]
    shards = cfg["shard"]["mesh"]["shard"]
    for key, size in cfg["shard"]["mesh"].items():
        if size and world_size % size:
            raise configs.UserError(f"shard.mesh.{key}: {world_size} ranks are not a multiple of "
                                    f"{size}")
    if shards is None:
        shards = world_size // replicate if replicate else 1
    if replicate is None:
        replicate = world_size // shards
    if replicate * shards != world_size:
        raise configs.UserError(f"shard.mesh: replicate {replicate} x shard {shards} is not "
                                f"{world_size} ranks; leave one of them null")
    return replicate, shards


def apply_fsdp(model, cfg, device, dtype):
    """Shard the parameters with FSDP2, in place: each block is a unit, and the rest is one more.

    The rest (embedding, last norm, head) is gathered as it is stored, and not in the dtype of the
    computation: an embedding's gradient is a sum over all tokens, for which bf16 is too coarse.
    """
    # imported here: it takes longer than half of torch's own import
    from torch.distributed.fsdp import (CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy,
                                        fully_shard, register_fsdp_forward_method)
    if cfg["shard"]["quantize"] != "none" and torch.__version__ < "2.13":
        raise configs.UserError(f"shard.quantize: FSDP2 of torch {torch.__version__} takes no "
                                "integers, which shards and offloaded weights need; install torch "
                                "2.13, or shard.quantize=none")
    if not dist.is_initialized():        # one rank, with shard.offload: FSDP2 needs a process group
        dist.init_process_group(backend_of(device), store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(dist.destroy_process_group)
    sizes = mesh_sizes(cfg, world_size())
    mesh = dist.init_device_mesh(device.type, sizes, mesh_dim_names=("replicate", "shard"))
    if sizes[0] == 1:
        mesh = mesh["shard"]
    options = {"mesh": mesh, "offload_policy": OffloadPolicy()}
    if cfg["shard"]["offload"] == "all":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    # A quantized block is gathered as it is stored; torch 2.11 would cast integers as well.
    param_dtype = dtype if cfg["shard"]["quantize"] == "none" else None
    precision = functools.partial(MixedPrecisionPolicy, reduce_dtype=torch.float32,
                                  cast_forward_inputs=False)
    for block in model.blocks:
        if hasattr(block.attn, "decay"):     # of families/delta_net.py: as stored, not in bf16
            fully_shard(block.attn.decay, mp_policy=precision(), **options)
        fully_shard(block, mp_policy=precision(param_dtype=param_dtype),
                    reshard_after_forward=cfg["shard"]["reshard_after_forward"], **options)
    fully_shard(model, mp_policy=precision(), **options)
    for module in fsdp_modules(model):
        # Gradients are summed, not averaged: the loss is divided by the global batch's weight.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)    # gloo would average nevertheless
    for method in ("hidden", "logits"):    # called instead of forward(): experiments, generation
        register_fsdp_forward_method(model, method)


def fsdp_modules(model):
    """The modules that fully_shard() was applied to, known by a method that it adds.

    isinstance() would need an import that takes half a second, also in runs without FSDP.
    """
    return [module for module in model.modules() if is_sharded(module)]


def is_sharded(model):
    """Are the parameters sharded over ranks by FSDP?"""
    return hasattr(model, "set_requires_gradient_sync")


def reshard(model):
    """Free the weights gathered in an evaluation.

    The root, and without reshard_after_forward every block, stays gathered until a backward pass.
    """
    for module in fsdp_modules(model):
        module.reshard()


# --------------------------------------------------------------------------------------------------
# sharded tensors: parameters, gradients and optimizer state are DTensors under FSDP

def is_dtensor(t):
    return hasattr(t, "placements")    # see fsdp_modules


def local_shard(t):
    """Return (the rows that this rank holds, first row, end row). They share memory with t.

    A plain or replicated tensor is whole on every rank. Of a sharded one each rank holds
    ceil(rows / ranks) rows, and the last ranks may hold fewer or none.
    """
    t = t.detach()
    if not is_dtensor(t):
        return t, 0, len(t)
    local = t.to_local()
    start = 0
    for mesh_dim, placement in enumerate(t.placements):
        if placement.is_replicate():
            continue
        assert placement.is_shard(0), f"rows of {t.placements} are not on one rank each"
        rows_per_rank = math.ceil(len(t) / t.device_mesh.size(mesh_dim))
        start = min(len(t), rows_per_rank * t.device_mesh.get_local_rank(mesh_dim))
    return local, start, start + len(local)


def is_writer(t):
    """Does this rank write its local shard to a checkpoint? One rank per shard does."""
    if not is_dtensor(t):
        return rank() == 0
    # the first of those with the same shard: number 0 along each dimension that replicates t
    return all(placement.is_shard() or t.device_mesh.get_local_rank(mesh_dim) == 0
               for mesh_dim, placement in enumerate(t.placements))


def full_tensor(t):
    """The whole tensor, on every rank. Gathers the shards of a DTensor."""
    return t.full_tensor() if is_dtensor(t) else t


# --------------------------------------------------------------------------------------------------
# gradients

UPDATE_CHUNK = 1 << 20    # weights that train.LowPrecisionAdamW updates at once


def set_gradient_sync(model, last):
    """Under FSDP, sum gradients over ranks in the backward pass of the last micro-batch only.

    last  is this micro-batch the last of the step?

    Before that, each rank accumulates its own gradients. They are whole and on the device, so with
    shard.offload every micro-batch sums, and its sums are added up in host memory. Replicated
    models need nothing here.
    """
    if is_sharded(model):
        model.set_requires_gradient_sync(last or model.offload_device is not None)


def all_reduce_gradients(model):
    """Replace .grad of each trained parameter by its sum over replicated ranks.

    Takes whatever is in .grad; None counts as zero. All gradients go through one flat tensor in
    fp32, of which new .grad in fp32 are views, so that there is one all-reduce per step. Under FSDP
    the backward pass has already summed them.
    """
    if world_size() == 1 or is_sharded(model):
        return
    params = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    flat = torch.empty(0, dtype=torch.float32, device=params[0].device)
    torch.cat([gradient.flatten() for gradient in gradients], out=flat)    # resizes it
    del gradients    # frees the zeros; each .grad is freed when it is replaced
    dist.all_reduce(flat)
    for p, summed in zip(params, flat.split([p.numel() for p in params])):
        p.grad = summed.view_as(p).to(p.dtype)


def check_replicas(model):
    """Raise RuntimeError if parameters differ between ranks that hold the same rows of them.

    Compares one checksum per parameter, the sum of its bits, instead of the parameters.
    """
    if world_size() == 1:
        return
    my_rows = []
    my_checksums = []
    for p in model.parameters():
        if p.requires_grad:
            local, start, end = local_shard(p)
            bits = local.view(torch.int32 if local.itemsize == 4 else torch.int16)
            my_checksums.append(bits.sum(dtype=torch.int32))    # int64 would take 25 times as long
            my_rows.append((start, end))
    mine = (tuple(my_rows), torch.stack(my_checksums).tolist())
    different = []
    first_holder = {}    # {rows: (first rank that holds them, its checksums)}
    for r, (rows, checksums) in enumerate(all_gather_object(mine)):
        first_rank, expected = first_holder.setdefault(rows, (r, checksums))
        if checksums != expected:
            different.append(f"rank {r} from rank {first_rank}")
    if different:
        raise RuntimeError(
            f"replicated parameters differ: {', '.join(different)}. Every rank has to make the "
            "same update. Look for gradients that are set after shard.all_reduce_gradients, and "
            "for updates that depend on the rank, its data or unseeded random numbers.")


# --------------------------------------------------------------------------------------------------
# predicted memory, from formulas

class StepSize:
    """The quantities from which the memory of a training step follows.

    Documents are assumed to be as long as seq_len, and all their tokens to be targets.
    """

    def __init__(self, model_cfg, cfg, world_size):
        shard_cfg = cfg["shard"]
        model = transformer.build_on_meta(model_cfg)
        if shard_cfg["lora"]["r"]:
            add_lora(model, shard_cfg["lora"])
        freeze_parameters(model, cfg["param_groups"])
        device_type = resolve_device_type(cfg)
        self.cfg = cfg
        self.model_cfg = model_cfg
        self.is_cuda = device_type == "cuda"
        _, self.shards = mesh_sizes(cfg, world_size)
        self.offloads = shard_cfg["offload"] == "all"
        self.is_sharded = self.shards > 1 or self.offloads
        self.is_replicated = world_size > 1 and not self.is_sharded
        documents = math.ceil(cfg["batch_size"] / world_size)
        self.rank_tokens = documents * cfg["data"]["seq_len"]      # of a step, on a rank
        self.set_micro_tokens(cfg["micro_tokens"])
        # bytes of a computed number, of a block's trained weight or its gradient, and of a number
        # of the optimizer's state
        self.compute_bytes = resolve_dtype(cfg, device_type).itemsize
        self.master_bytes = getattr(torch, shard_cfg["master_dtype"]).itemsize
        self.moment_bytes = getattr(torch, shard_cfg["moment_dtype"]).itemsize
        # The first blocks without a backward pass keep no activations: see count_frozen_blocks()
        frozen_blocks = count_frozen_blocks(model)
        self.n_blocks = len(model.blocks) - frozen_blocks
        self.keeps_matmuls = shard_cfg["recompute"] == "selective"
        recompute = n_recomputed(shard_cfg["recompute"], len(model.blocks))
        self.recomputed_blocks = max(0, recompute - frozen_blocks)
        self.measure_blocks(model.blocks)
        self.measure_linear_layers(model.blocks)
        self.measure_parameters(model, frozen_blocks)

    def measure_blocks(self, blocks):
        """What the activations of a block depend on: means, where blocks differ."""
        self.norms = sum(isinstance(module, transformer.Norm) for module in blocks[0].children())
        has_flex = can_use_flex(self.model_cfg, self.cfg)
        self.keeps_probabilities = any(block.attn.needs_probabilities(True, has_flex)
                                       for block in blocks)
        # Gemma 4 has MLPs of two widths and attention of two kinds
        m = self.model_cfg
        n_double_wide = m["n_kv_shared_layers"] if m["double_wide_mlp"] else 0
        self.d_ff = m["d_ff"] * (1 + n_double_wide / len(blocks))
        layers = [block.attn for block in blocks if isinstance(block.attn, transformer.Attention)]
        n_layers = max(1, len(layers))
        self.head_dim = sum(layer.head_dim for layer in layers) / n_layers
        self.kv_width = sum(layer.n_kv_heads * layer.head_dim for layer in layers) / n_layers
        # the part of the blocks that has linear attention, from 0 to 1
        self.linear_attention_share = 1 - len(layers) / len(blocks)
        self.trains_experts = count_parameters(blocks[0].mlp, trained=True) > 0

    def measure_parameters(self, model, frozen_blocks):
        """Numbers of parameters."""
        self.trained_weights = count_parameters(model, trained=True)
        self.frozen_weights = count_parameters(model, trained=False)
        # of each block with a backward pass, and outside of the blocks
        self.blocks_trained = [count_parameters(block, trained=True)
                               for block in model.blocks[frozen_blocks:]]
        self.outside_trained = self.trained_weights - sum(self.blocks_trained)
        self.outside_frozen = self.frozen_weights - count_parameters(model.blocks, trained=False)
        # bytes of all trained parameters, and of their gradients
        self.trained_bytes = self.master_bytes * sum(self.blocks_trained) + 4 * self.outside_trained
        self.head_weights = model.padded_vocab_size * self.model_cfg["d_model"]
        self.trains_head = model.head_weight().requires_grad
        # in the blocks' matrices: with Muon they have a momentum and no other state
        self.matrix_weights = sum(p.numel() for name, p in model.named_parameters()
                                  if p.requires_grad and transformer.is_block_matrix(name, p))

    def measure_linear_layers(self, blocks):
        """The sizes of a block's linear layers, whose weights may be quantized."""
        layers = [module for module in blocks.modules() if isinstance(module, nn.Linear)]
        sizes = [layer.in_features * layer.out_features for layer in layers]
        n_weights = sum(sizes) // len(blocks)
        self.linear_weights = sum(sizes)                 # of all blocks
        self.largest_linear = max(sizes)
        # per token and block: numbers that they compute, and that adapters read after dropout
        self.linear_outputs = 0
        self.adapter_inputs = 0
        for layer in layers:
            n_experts = getattr(layer, "n_experts", 1)
            times = self.model_cfg["n_experts_per_token"] if n_experts > 1 else 1
            self.linear_outputs += times * layer.out_features / n_experts / len(blocks)
            if isinstance(layer, LoRALinear) and layer.dropout:
                self.adapter_inputs += times * layer.in_features / len(blocks)
        quantize = self.cfg["shard"]["quantize"]
        self.is_quantized = quantize != "none"
        # bytes of a linear layer's weight, and of a block as FSDP gathers it
        self.linear_bytes = BYTES_PER_WEIGHT.get(quantize, self.compute_bytes)
        n_parameters = count_parameters(blocks) // len(blocks)
        other = 4 if self.is_quantized else self.compute_bytes
        self.block_bytes = self.linear_bytes * n_weights + other * (n_parameters - n_weights)

    def set_micro_tokens(self, micro_tokens):
        """Set the tokens of the largest micro-batch, and the number of micro-batches per rank."""
        self.micro_tokens = min(self.rank_tokens, micro_tokens)
        self.micro_batches = math.ceil(self.rank_tokens / micro_tokens)


def count_parameters(module, trained=None):
    """Number of parameters: all (None), the trained (True) or the frozen ones (False)."""
    return sum(p.numel() for p in module.parameters()
               if trained is None or p.requires_grad == trained)


def count_frozen_blocks(model):
    """How many of the first blocks need no backward pass: they and all before them are frozen."""
    for module in (model.embed, model.pos, model.per_layer, model.embedding):
        if isinstance(module, nn.Module) and count_parameters(module, trained=True):
            return 0
    for i, block in enumerate(model.blocks):
        if count_parameters(block, trained=True):
            return i
    return len(model.blocks)


def predict_memory(model_cfg, cfg, world_size=1):
    """Predict each device's memory in the phases of a step that can be its peak.

    Returns {phase: {what: bytes}}. Needs no device: device=auto predicts for this machine's kind of
    device; set device=cuda to plan for GPUs elsewhere.
    """
    return memory_of_phases(StepSize(model_cfg, cfg, world_size))


def memory_of_phases(s):
    """What predict_memory() returns, of a StepSize."""
    state = state_bytes(s)
    if s.offloads and s.is_cuda:
        state = dict.fromkeys(state, 0)
    gradients = state.pop("gradients")
    # Gradients of earlier micro-batches. Unless offloaded, FSDP shards them in the last one only,
    # and until then keeps them in fp32.
    accumulated = 0
    if s.micro_batches > 1:
        accumulated = 4 * s.trained_weights if s.is_sharded and not s.offloads else gradients
    head_gradient = 4 * s.head_weights if s.trains_head else 0
    in_use = state | {"gathered or cast": gathered_or_cast_bytes(s),
                      "activations": activation_bytes(s)}
    phases = {
        # in the last micro-batch, after the forward pass, which keeps the activations of all blocks
        "at the loss": in_use | {"gradients": accumulated, "logits and head": loss_bytes(s)},
        # the backward pass of the last block, the first to run: all other activations are kept
        "in the last block's backward pass": in_use | {
            "gradients": accumulated + head_gradient,
            "block backward": block_backward_bytes(s, last=True)},
        # that of the first block, the last to run: nearly all gradients exist
        "in the first block's backward pass": state | {
            "gathered or cast": gathered_or_cast_bytes(s, blocks=1),
            "activations": activation_bytes(s, blocks=1),
            "gradients": max(accumulated, gradients),
            "block backward": block_backward_bytes(s, last=False)},
        "at the update": state | {"gradients": gradients}}
    if s.is_replicated:    # summed in fp32, see all_reduce_gradients
        phases["at the all-reduce"] = state | {"gradients": gradients + 4 * s.trained_weights}
    return phases


def state_bytes(s):
    """What a rank holds between steps, and of gradients; with shard.offload on the host."""
    frozen_bytes = s.compute_bytes * s.frozen_weights
    if s.is_quantized:
        frozen_bytes -= round((s.compute_bytes - s.linear_bytes) * s.linear_weights)
    return {"weights": (s.trained_bytes + frozen_bytes) // s.shards,
            "optimizer": optimizer_bytes(s) // s.shards,
            "gradients": s.trained_bytes // s.shards}


def peak_phase(phases):
    """Of predict_memory's phases the one that holds most: (phase, {what: bytes})."""
    return max(phases.items(), key=lambda item: sum(item[1].values()))


def optimizer_bytes(s):
    """Two numbers per parameter for AdamW and unknown optimizers, one for a momentum."""
    numbers = 2 * s.trained_weights
    if s.cfg["optimizer"] == "muon":
        numbers -= s.matrix_weights
    elif s.cfg["optimizer"] == "sgd":
        numbers = s.trained_weights if s.cfg["momentum"] > 0 else 0
    return s.moment_bytes * numbers


def gathered_or_cast_bytes(s, blocks=None):
    """Weights besides the stored ones: gathered by FSDP, or cast to bf16 and kept for backward.

    blocks  how many, from the first; None: all
    """
    if s.is_sharded:
        if s.cfg["shard"]["reshard_after_forward"]:
            blocks = 1
        elif blocks is None:
            blocks = s.model_cfg["n_layers"]
        outside = 4 * s.outside_trained + s.compute_bytes * s.outside_frozen
        return outside + blocks * s.block_bytes
    # Frozen weights are stored in the dtype of the computation. The casts of a recomputed block are
    # not kept.
    if s.master_bytes == s.compute_bytes:
        return 0
    n_cast = sum(s.blocks_trained[s.recomputed_blocks:blocks])
    return n_cast * s.compute_bytes


def activation_bytes(s, blocks=None):
    """What the forward pass keeps for the backward pass: in all blocks, before and after them.

    blocks  how many, from the first; None: all
    """
    C = s.model_cfg["d_model"]
    blocks = s.n_blocks if blocks is None else min(blocks, s.n_blocks)
    recompute = min(s.recomputed_blocks, blocks)
    per_token = recompute * recomputed_block_bytes(s)
    per_token += (blocks - recompute) * block_activation_bytes(s)
    per_token += 8 * C                    # the embedding in fp32, and later its gradient
    per_token += 2 * s.compute_bytes * C        # input and output of the last norm
    return round(s.micro_tokens * per_token)


def recomputed_block_bytes(s):
    """What a recomputed block keeps per token: its input; with selective, also the outputs of
    matmuls and attention."""
    m = s.model_cfg
    kept = s.compute_bytes * m["d_model"]
    if s.keeps_matmuls:
        kept += s.compute_bytes * s.linear_outputs
        if not s.keeps_probabilities:
            kept += (1 - s.linear_attention_share) * attention_bytes(s) * m["n_heads"] * s.head_dim
    return round(kept)


def attention_bytes(s):
    """Bytes of a number in attention: on a CPU, short documents are computed in fp32."""
    is_short = s.cfg["data"]["seq_len"] < transformer.FP32_ATTENTION_BELOW
    return 4 if is_short and not s.is_cuda else s.compute_bytes


def block_activation_bytes(s):
    """What a block keeps per token."""
    m = s.model_cfg
    C, H, E = m["d_model"], m["n_heads"], s.head_dim
    K = s.kv_width / E if E else 0
    length = s.cfg["data"]["seq_len"]
    # Each norm: its input. The norms before attention and MLP: also the output, the input of their
    # matmuls. Rope keeps its angles only.
    norms = s.compute_bytes * (s.norms + min(s.norms, 2)) * C
    # Attention: q, k, v and the output. On a CPU the output is kept in the matmul's dtype as well.
    kv_heads = K
    if s.is_cuda and s.compute_bytes == 4:
        # model.attention() repeats k and v for each query head
        kv_heads = H
    attention = attention_bytes(s) * (2 * H + 2 * kv_heads) * E
    if not s.is_cuda:
        attention += s.compute_bytes * H * E
    if m["qk_norm"] != "none":
        attention += s.compute_bytes * (H + K) * E
    if m["attn_sinks"] and not s.keeps_probabilities:     # the output before they reduce it
        attention += s.compute_bytes * H * E
    if m["attention_gate"]:              # the gate, and its product with the output
        attention += 2 * s.compute_bytes * H * E
    if s.keeps_probabilities:
        # per pair of tokens: the fp32 probabilities, and fp32 scores after soft-capping; after
        # dropout its mask and the probabilities once more; else only if their dtype is another
        pair = 8 if m["attn_softcap"] else 4
        if m["attn_pdrop"]:
            pair += 1 + attention_bytes(s)
        elif attention_bytes(s) < 4:
            pair += attention_bytes(s)
        attention += H * length * pair
    if s.linear_attention_share:
        from families import delta_net
        attention *= 1 - s.linear_attention_share
        attention += s.linear_attention_share * delta_net.activation_bytes(m, s.compute_bytes)
    if m["block"] == "gemma4":
        from families import gemma4
        attention += gemma4.activation_bytes(m, s.compute_bytes, s.kv_width)
    # Adapters with dropout keep a mask and a copy of their inputs. Then nothing keeps the inputs
    # themselves, which are the outputs of norms, attention and activation.
    dropout_copies = 0
    if s.adapter_inputs:
        inside = m["n_experts_per_token"] * (C + m["d_expert"]) if m["n_experts"] else m["d_ff"]
        not_kept = min(s.norms, 2) * C + inside + (0 if s.is_cuda else H * E)
        dropout_copies = (1 + s.compute_bytes) * s.adapter_inputs - s.compute_bytes * not_kept
    return norms + attention + dropout_copies + mlp_activation_bytes(s)


def mlp_activation_bytes(s):
    """What an MLP or a mixture of experts (families/moe.py) keeps per token."""
    m = s.model_cfg
    if not m["n_experts"]:
        # input and output of the activation function; if gated, also the gate's factor and the
        # product
        return s.compute_bytes * s.d_ff * (4 if m["glu"] else 2)
    # per chosen expert: the output, and three numbers of the gated MLP for their product; the
    # inputs of the matrices only if these or their adapters are trained
    numbers = m["d_model"] + 3 * m["d_expert"]
    if s.trains_experts:
        numbers += m["d_model"] + m["d_expert"]
    return s.compute_bytes * m["n_experts_per_token"] * numbers


def loss_bytes(s):
    """Logits, and the gradients of the head and of its input: see model.ChunkedLoss.

    The logits of a chunk of tokens are computed by one matmul; pieces of it are converted to fp32.
    """
    C = s.model_cfg["d_model"]
    V = s.head_weights // C
    chunk, piece = transformer.chunk_sizes(V, s.compute_bytes, s.is_cuda)
    logits = min(chunk, s.micro_tokens) * V * s.compute_bytes
    # in fp32, of a piece: logits, log-probabilities, and the gradients of both
    logits += min(piece, s.micro_tokens) * V * 4 * 4
    total = logits + s.micro_tokens * C * s.compute_bytes    # the gradient of the head's input
    if s.trains_head:
        total += 4 * s.head_weights                              # the head's gradient
        if s.compute_bytes < 4:
            total += s.compute_bytes * s.head_weights                  # the head, cast
    return total


def block_backward_bytes(s, last):
    """What the backward pass of the last or first block needs besides the kept activations."""
    m = s.model_cfg
    # the first s.recomputed_blocks blocks are recomputed
    is_recomputed = s.recomputed_blocks == s.n_blocks if last else s.recomputed_blocks > 0
    block_trained = s.blocks_trained[-1] if s.blocks_trained else 0
    kept = s.micro_tokens * block_activation_bytes(s)
    d_ff = m["n_experts_per_token"] * m["d_expert"] if m["n_experts"] else m["d_ff"]
    mlp_gradient = s.micro_tokens * s.compute_bytes * d_ff
    if not is_recomputed:
        # gradients [T, d_ff] of the activation's input and output; if gated, also of the factor
        total = mlp_gradient * (3 if m["glu"] else 2)
    else:
        # All activations are computed again. Measured: of a gated MLP's three gradients only one
        # adds to the peak, of a plain MLP's two none does; the others reuse memory of activations
        # that are already freed.
        total = kept
        if s.keeps_matmuls:
            total -= s.micro_tokens * (recomputed_block_bytes(s) - s.compute_bytes * m["d_model"])
        if m["glu"]:
            total += mlp_gradient
    if s.linear_attention_share:    # it runs after the activations of the MLP are freed
        from families import delta_net
        total = max(total, s.micro_tokens * delta_net.backward_bytes(m))
    if s.is_quantized:
        # a dequantized matrix: in fp32, and either its indices or its values in the compute dtype
        total += 6 * s.largest_linear
    if s.is_sharded:
        # At the end of the block, its activations are freed. What is there then: its gradients, and
        # their fp32 copy that is summed over ranks. With gloo, later: this copy, and the weights of
        # the next block twice, once in gloo's buffer
        freed = 0 if is_recomputed else kept    # counted among the kept activations
        total = max(total, (s.compute_bytes + 4) * block_trained - freed)
        if s.shards > 1 and not s.is_cuda:
            total = max(total, 4 * block_trained + 2 * s.block_bytes - freed)
        total += s.block_bytes                # weights of the next block
        if not last:                          # what the block before sums over ranks
            total += 4 * block_trained
    return total


GIB = 2**30

# The choices that the script compares: (name, whether it has LoRA, keys of the shard section that
# differ from START)
START = {"quantize": "none", "offload": "none", "master_dtype": "float32",
         "moment_dtype": "float32"}
CHOICES = [
    ("full fine-tuning", False, {}),
    ("full, bf16 states", False, {"master_dtype": "bfloat16", "moment_dtype": "bfloat16"}),
    ("full, offloaded", False, {"offload": "all"}),
    ("LoRA", True, {}),
    ("LoRA, nf4", True, {"quantize": "nf4"}),
]


def choices_of(cfg):
    """Yield (name, config) of each of CHOICES, without and with recomputation."""
    r = cfg["shard"]["lora"]["r"] or 16
    for name, has_lora, keys in CHOICES:
        lora_cfg = cfg["shard"]["lora"] | {"r": r if has_lora else 0}
        for recompute in (False, True):
            shard_cfg = cfg["shard"] | START | keys | {"lora": lora_cfg, "recompute": recompute}
            yield name, cfg | {"shard": shard_cfg}


def peak_bytes(s, micro_tokens):
    """The predicted peak of a StepSize with other micro_tokens."""
    s.set_micro_tokens(micro_tokens)
    _, held = peak_phase(memory_of_phases(s))
    return sum(held.values())


def largest_micro_tokens(s, budget):
    """The largest micro_tokens whose predicted peak is within a budget of bytes; 0 if none is.

    A power of two below 1,024, or a multiple of it. At least a document's tokens (data.seq_len); at
    most those of a rank's step, above which nothing changes.
    """
    whole_step = math.ceil(s.rank_tokens / 1024) * 1024
    if peak_bytes(s, whole_step) <= budget:      # a single micro-batch accumulates no gradients
        return whole_step
    sizes = [*(2 ** n for n in range(10)), *range(1024, whole_step, 1024)]
    sizes = [size for size in sizes if size >= s.cfg["data"]["seq_len"]]
    n_fitting = bisect.bisect_right(sizes, budget, key=functools.partial(peak_bytes, s))
    return sizes[n_fitting - 1] if n_fitting else 0


def print_choices(model_cfg, cfg, gpus, memory):
    """Print a table of CHOICES, with and without recomputation, for devices of `memory` GiB."""
    budget = 0.9 * memory * GIB
    print(f"\nusual choices on devices of {memory:g} GiB, of which 90% may be used:\n"
          f"  {'':<20}{'shard.recompute':<17}{'GiB':>10}  fits  largest micro_tokens")
    for name, choice in choices_of(cfg):
        s = StepSize(model_cfg, choice, gpus)
        total = peak_bytes(s, cfg["micro_tokens"])
        fits = "yes" if total <= budget else "no"
        micro_tokens = largest_micro_tokens(s, budget)
        tokens = f"{micro_tokens:,}" if micro_tokens else "none"
        if micro_tokens >= s.rank_tokens:
            tokens += " (a whole step)"
        recompute = configs.show(choice["shard"]["recompute"])
        print(f"  {name:<20}{recompute:<17}{total / GIB:>10,.3f}  {fits:<6}{tokens}")
    print(f"  GiB: with micro_tokens={cfg['micro_tokens']}; a step has {s.rank_tokens:,} tokens "
          f"per device (batch_size={cfg['batch_size']} x data.seq_len={cfg['data']['seq_len']} "
          f"/ {gpus})")


def main(argv):
    """python shard.py CONFIG... [key=value ...] [gpus=N] [memory=GIB]

    device=auto predicts for this machine's kind of device; set device=cuda to plan for GPUs
    elsewhere.
    """
    options, argv = configs.pop_options(argv, gpus=1, memory=80.0)
    gpus = options["gpus"]
    if gpus < 1:
        raise configs.UserError(f"gpus: expected at least 1, got {gpus}")
    if options["memory"] <= 0:
        raise configs.UserError(f"memory: expected GiB above 0, got {options['memory']:g}")
    cfg, _, _ = configs.load(argv)
    model_cfg = cfg["model"]
    if model_cfg["vocab_size"] is None:
        import tokenize_data
        tokenizer = tokenize_data.load_tokenizer(cfg)
        model_cfg = transformer.resolve_vocab_size(model_cfg, tokenizer.n_vocab)
    replicate, shards = mesh_sizes(cfg, gpus)
    s = StepSize(model_cfg, cfg, gpus)
    phase, held = peak_phase(memory_of_phases(s))
    total = sum(held.values())
    print(f"predicted peak on each of {gpus} devices ({resolve_device_type(cfg)}, "
          f"replicate {replicate} x shard {shards}), {phase}:")
    for what, n in held.items():
        bar = "#" * round(40 * n / total)
        print(f"  {what:<16} {n / GIB:>12,.3f} GiB {n / total:>6.1%}  {bar}".rstrip())
    print(f"  {'total':<16} {total / GIB:>12,.3f} GiB")
    if s.offloads:
        on_host = sum(state_bytes(s).values())
        print(f"in host memory, for each device: {on_host / GIB:,.3f} GiB of weights, gradients "
              "and optimizer state")
    if cfg["shard"]["recompute"] is None:
        print("if this is more than 90% of a device's memory, the run recomputes activations of as "
              "many blocks as needed; shard.recompute=true predicts the peak with all of them")
    print_choices(model_cfg, cfg, gpus, options["memory"])


if __name__ == "__main__":
    configs.run(main, sys.argv[1:])
