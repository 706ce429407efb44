"""The training loop: pretraining and fine-tuning of language models on one device or many.

    torchrun train.py configs/ft.yaml                          fine-tune data/base on chats
    torchrun train.py configs/ft.yaml lr=1e-4 out_dir=out/b    with another learning rate
    torchrun --nproc_per_node 2 train.py configs/ft.yaml out_dir=out/two             on two devices
    torchrun train.py configs/pretrain.yaml                    train from scratch on text
    torchrun train.py configs/ft.yaml shard.lora.r=8 lr=3e-3 out_dir=out/r8          adapters only
    python train.py configs/ft.yaml device=cpu dtype=float32 out_dir=out/cpu         a laptop
    torchrun train.py out/ft/config.yaml eval_only=true        only evaluate, with that run's keys

The file out_dir/STOP and the signals TERM, INT, USR1 and HUP end a run after its current step. It
is saved, and the same command resumes it. Exit status: 0 if the run is complete or was ended by
STOP, 128 + the number of the signal, 2 for a mistake in the config, 1 for other errors. torchrun
exits with 1 instead of any status but 0.

The loss of a step is

    sum(loss_weight * nll) over the target tokens of all its documents  /  sum(|loss_weight|)

Both sums run over the global batch. Nothing is averaged per micro-batch, per document or per rank
first, because a mean of means weights a token by the size of the group it happens to be in. The
summed loss of each micro-batch is divided by the global sum of weights before its backward pass,
so that gradients only have to be added: over micro-batches by autograd, over ranks by all-reduce
(reduce-scatter if the model is sharded).
The layout (micro-batch size, packing, number of ranks) changes rounding and nothing else.
"""
import os
import sys

import configs
import log
import tokenize_data


def check_inputs(cfg):
    """Raise UserError for trackers and data files that are missing."""
    log.check_backends(cfg)
    tokenize_data.require_train_data(cfg)
    for kind in ("train", "validation"):
        for name, source in cfg["data"][kind].items():
            tokenize_data.find_files(cfg, f"{kind}.{name}", source)


if __name__ == "__main__":
    # Only checks, before torch is imported, so that mistakes are reported at once. cli() loads the
    # config again. No experiment is running, so only built-in losses, optimizers, ... exist.
    configs.exit_with_help(__doc__, sys.argv[1:])
    configs.check_launch()
    checked_cfg, _, _ = configs.load_or_exit(sys.argv[1:], builtin_names=True)
    if os.environ.get("RANK", "0") == "0":
        configs.run(check_inputs, checked_cfg)

# Idle OpenMP threads sleep instead of spinning. Spinning makes steps 10 times slower if another
# process uses the cores (LOG.md).
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import contextlib
import dataclasses
import functools
import math
import platform
import re
import signal
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

import checkpoint
import model as transformer
import sampler
import shard


# --------------------------------------------------------------------------------------------------
# schedules: progress from 0 to 1 -> learning rate

def constant(progress, lr, min_lr):
    return lr


def linear(progress, lr, min_lr):
    return lr + (min_lr - lr) * progress


def cosine(progress, lr, min_lr):
    """arXiv:1608.03983"""
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2


SCHEDULES = {"constant": constant, "linear": linear, "cosine": cosine, "wsd": linear}


def lr_at(step, total_steps, cfg):
    """Learning rate of update `step` (from 0).

    The first is above 0. The last is min_lr, unless the schedule is constant, wsd has no
    decay_steps, or the warm-up takes the whole run.
    """
    warmup_steps = min(to_steps(cfg["warmup_steps"], total_steps), total_steps)
    # 1) linear warm-up
    if step < warmup_steps:
        return cfg["lr"] * (step + 1) / warmup_steps
    # 2) wsd (warm-up, stable, decay; arXiv:2404.06395) keeps lr until its last decay_steps
    start = warmup_steps
    if cfg["schedule"] == "wsd":
        start = max(warmup_steps, total_steps - to_steps(cfg["decay_steps"], total_steps))
    # 3) the schedule, from `start` to the last step
    progress = max(0, step + 1 - start) / max(1, total_steps - start)
    return SCHEDULES[cfg["schedule"]](progress, cfg["lr"], cfg["min_lr"])


def to_steps(value, total_steps):
    """A count (int) or a fraction of the run (float) as a number of steps.

    A fraction above 0 is at least 1 step.
    """
    if type(value) is int or value == 0:
        return int(value)
    return max(1, round(value * total_steps))


def every_n_steps(step, every, total_steps):
    """Is something due after `step` steps? `every`: a count, a fraction of the run, or 0: never.

    With 0.25 it is due at step 0 and after each quarter of the run. Unless `every` is 0, it is due
    at steps 0 and total_steps.
    """
    if not every:
        return False
    if step in (0, total_steps):
        return True
    period = every if type(every) is int else every * total_steps
    epsilon = 1e-9                       # rounding may leave step / period just below an integer
    times_now = math.floor(step / period + epsilon)
    times_before = math.floor((step - 1) / period + epsilon)
    return times_now > times_before


# --------------------------------------------------------------------------------------------------
# optimizers: a function of (param_groups, cfg, **optimizer_options), registered in OPTIMIZERS. It
# returns an object with param_groups, state, step() and zero_grad()

class WithoutDynamo:
    """Mixin for torch.optim classes: methods that do not import torch._dynamo.

    torch decorates them to exclude them from compilation, and the decorators import torch._dynamo
    in their first call, which takes as long as importing torch (1.5 s). __wrapped__ is the method
    without its decorator. step's decorator also turns gradients off, so no_grad is added below.
    """
    add_param_group = torch.optim.Optimizer.add_param_group.__wrapped__
    zero_grad = torch.optim.Optimizer.zero_grad.__wrapped__


class AdamW(WithoutDynamo, torch.optim.AdamW):
    """torch.optim.AdamW (arXiv:1711.05101) whose state exists from the start."""
    step = torch.no_grad()(torch.optim.AdamW.step.__wrapped__)

    def __init__(self, param_groups, **options):
        super().__init__(param_groups, fused=True, **options)
        for p in optimizer_parameters(self):
            self.state[p] = {"step": torch.zeros((), device=p.device),
                             "exp_avg": torch.zeros_like(p),
                             "exp_avg_sq": torch.zeros_like(p)}


# (sqrt(5) - 1) / 2 of 2**16: multiples of it, modulo 2**16, are spread evenly, so that the
# rounding errors of a weight's next updates cancel sooner than with independent random bits
GOLDEN_RATIO = 40503


class LowPrecisionAdamW:
    """AdamW (arXiv:1711.05101) whose weights or moments are bf16, computed in fp32.

    Numbers stored in bf16 are rounded stochastically (arXiv:2010.06192): a change that is smaller
    than the distance of two bf16 numbers, as most updates are, is made with a probability that
    makes it right on average. The random bits are a hash of seed, parameter, row and column, to
    which each update adds the same offset, so that they do not depend on ranks or on resuming.

    It has the part of torch.optim.Optimizer's interface that the loop and checkpoints use.
    """

    def __init__(self, param_groups, betas, eps, moment_dtype, seed):
        self.param_groups = param_groups
        self.betas = betas
        self.eps = eps
        self.seed = seed
        self.state = {}
        for p in optimizer_parameters(self):
            self.state[p] = {"step": 0,
                             "exp_avg": torch.zeros_like(p, dtype=moment_dtype),
                             "exp_avg_sq": torch.zeros_like(p, dtype=moment_dtype)}

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for name, p in zip(group["names"], group["params"]):
                if p.grad is not None:
                    self.update(name, p, group["lr"], group["weight_decay"])

    def update(self, name, p, lr, weight_decay):
        """Update a parameter chunk by chunk, so that little exists in fp32 at once."""
        state = self.state[p]
        state["step"] += 1
        seed = zlib.crc32(f"{self.seed} {name}".encode()) - 2**31
        weights, first_row, end_row = shard.local_shard(p)
        if first_row == end_row:                         # this rank has no rows of it
            return
        rows = torch.arange(first_row, end_row, dtype=torch.int32, device=weights.device)
        tensors = [weights]
        for t in (p.grad, state["exp_avg"], state["exp_avg_sq"]):
            tensors.append(shard.local_shard(t)[0])
        # [rows, columns] each; a vector has one column
        tensors = [t.view(len(rows), -1) for t in tensors]
        rows_at_once = max(1, shard.UPDATE_CHUNK // tensors[0].shape[1])
        for start in range(0, len(rows), rows_at_once):
            chunk = slice(start, start + rows_at_once)
            row_seeds = transformer.hash_int32(rows[chunk] ^ seed)
            self.update_chunk(*[t[chunk] for t in tensors], row_seeds, state["step"], lr,
                              weight_decay)

    def update_chunk(self, weights, gradient, exp_avg, exp_avg_sq, row_seeds, step, lr,
                     weight_decay):
        """weights, gradient and moments are [rows, columns], row_seeds [rows]."""
        beta1, beta2 = self.betas
        gradient = gradient.float()
        mean = exp_avg.float().lerp(gradient, 1 - beta1)
        mean_sq = (exp_avg_sq.float() * beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = (mean_sq / (1 - beta2**step)).sqrt_().add_(self.eps)
        new_weights = weights.float() * (1 - lr * weight_decay)
        new_weights.addcdiv_(mean, denominator, value=-lr / (1 - beta1**step))
        # three times 16 random bits, pairwise independent, from 32
        random = transformer.random_int32(row_seeds, weights.shape[1])
        offset = step * GOLDEN_RATIO % 2**16             # only 16 bits are used
        store(weights, new_weights, random + offset)
        store(exp_avg, mean, (random >> 16) + offset)
        store(exp_avg_sq, mean_sq, (random ^ (random >> 16)) + offset)

    def zero_grad(self):
        for p in optimizer_parameters(self):
            p.grad = None


def store(stored, x, random):
    """Copy fp32 numbers to where they are stored, in fp32 or in bf16."""
    if stored.dtype == torch.bfloat16:
        x = round_stochastically(x, random)
    stored.copy_(x)


def round_stochastically(x, random):
    """fp32 -> one of the two nearest bf16 numbers, the nearer one more probably.

    bf16 is the upper half of fp32. A random number is added to the lower half, which is then cut
    off: the probability of a carry, which rounds away from 0, is the fraction that is cut off.

    random  int32 in the shape of x, of which the lower 16 bits are used
    """
    bits = x.view(torch.int32) + (random & 0xffff)
    return (bits & -0x10000).view(torch.float32).bfloat16()


class SGD(WithoutDynamo, torch.optim.SGD):
    """torch.optim.SGD whose momentum buffers exist from the start."""
    step = torch.no_grad()(torch.optim.SGD.step.__wrapped__)

    def __init__(self, param_groups, momentum, **options):
        super().__init__(param_groups, momentum=momentum, **options)
        for p in optimizer_parameters(self):
            if momentum:
                self.state[p] = {"momentum_buffer": torch.zeros_like(p)}


class Muon:
    """Updates matrices along their orthogonalized momentum, and everything else with AdamW.

    https://kellerjordan.github.io/posts/muon. Updates are scaled to the size of AdamW's
    (arXiv:2502.16982), so that one learning rate serves both. torch.optim.Muon does not take
    parameters that are sharded over ranks. This class has the part of torch.optim.Optimizer's
    interface that the loop and checkpoints use.

    muon_groups   param_groups of the blocks' matrices (see make_param_groups)
    adamw_groups  param_groups of everything else
    n_experts     model.n_experts
    """

    def __init__(self, muon_groups, adamw_groups, momentum, n_experts=0, **adamw_options):
        self.adamw = AdamW(adamw_groups, **adamw_options)
        self.muon_groups = muon_groups
        self.momentum = momentum
        self.n_experts = n_experts
        # The same objects as in self.adamw: the learning rate that the loop sets and the state that
        # a checkpoint loads reach both.
        self.param_groups = [*muon_groups, *self.adamw.param_groups]
        self.state = self.adamw.state
        for group in muon_groups:
            for p in group["params"]:
                self.state[p] = {"momentum": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self):
        self.adamw.step()
        for group in self.muon_groups:
            for name, p in zip(group["names"], group["params"]):
                if p.grad is not None:
                    n_matrices = self.n_experts if ".experts." in name else 1
                    self.muon_update(p, n_matrices, group["lr"], group["weight_decay"])

    def muon_update(self, p, n_matrices, lr, weight_decay):
        """Update a parameter: a matrix, or the matrices of n_matrices experts, stacked by rows."""
        momentum = self.state[p]["momentum"]
        momentum.lerp_(p.grad, 1 - self.momentum)
        nesterov = torch.lerp(p.grad, momentum, self.momentum)
        nesterov = shard.full_tensor(nesterov)    # every rank computes the update of the whole p
        matrices = nesterov.unflatten(0, (n_matrices, -1))                 # [n, out, in]
        scale = 0.2 * math.sqrt(max(matrices.shape[1:]))    # the update's RMS is 0.2, about AdamW's
        update = scale * newton_schulz(matrices).flatten(0, 1)
        local, start, end = shard.local_shard(p)               # a view of p: this rank's rows
        local.mul_(1 - lr * weight_decay)
        local.sub_(update[start:end], alpha=lr)

    def zero_grad(self):
        for p in optimizer_parameters(self):
            p.grad = None


def newton_schulz(g):
    """Approximates U V^T of the singular value decompositions g = U S V^T of matrices [n, out, in].

    In bf16. Five iterations of an odd polynomial that drives all singular values towards 1.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = g.shape[1] <= g.shape[2]
    x = g.bfloat16() if wide else g.bfloat16().mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        xx = x @ x.mT
        polynomial = torch.baddbmm(xx, xx, xx, beta=b, alpha=c)         # b xx + c xx^2
        x = torch.baddbmm(x, polynomial, x, beta=a)                     # a x + (b xx + c xx^2) x
    return (x if wide else x.mT).to(g.dtype)


def adamw(param_groups, cfg):
    moment_dtype = cfg["shard"]["moment_dtype"]
    if "bfloat16" in (cfg["shard"]["master_dtype"], moment_dtype):
        return LowPrecisionAdamW(param_groups, cfg["betas"], cfg["eps"],
                                 getattr(torch, moment_dtype), cfg["seed"])
    return AdamW(param_groups, betas=tuple(cfg["betas"]), eps=cfg["eps"])


def sgd(param_groups, cfg):
    momentum = cfg["momentum"]
    return SGD(param_groups, momentum=momentum, nesterov=momentum > 0)


def muon(param_groups, cfg):
    muon_groups, adamw_groups = split_matrices(param_groups)
    if not muon_groups:
        raise configs.UserError("optimizer: muon updates the blocks' weight matrices, and none of "
                                "them is trained; optimizer=adamw")
    return Muon(muon_groups, adamw_groups, cfg["momentum"], cfg["model"]["n_experts"],
                betas=tuple(cfg["betas"]), eps=cfg["eps"])


OPTIMIZERS = {"adamw": adamw, "muon": muon, "sgd": sgd}


def split_matrices(param_groups):
    """Split param_groups into (those of the blocks' matrices, those of everything else)."""
    muon_groups = []
    adamw_groups = []
    for group in param_groups:
        is_matrix = [transformer.is_block_matrix(name, p)
                     for name, p in zip(group["names"], group["params"])]
        if any(is_matrix):
            muon_groups.append(subgroup(group, is_matrix))
        if not all(is_matrix):
            adamw_groups.append(subgroup(group, [not matrix for matrix in is_matrix]))
    return muon_groups, adamw_groups


def subgroup(group, chosen):
    """The part of a param_group whose parameters are chosen: [bool]."""
    names = [name for name, is_chosen in zip(group["names"], chosen) if is_chosen]
    params = [p for p, is_chosen in zip(group["params"], chosen) if is_chosen]
    return group | {"names": names, "params": params}


def optimizer_parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def make_param_groups(model, cfg):
    """Group parameters by cfg["param_groups"] and by shape: matrices decay, vectors don't.

    Each group holds

        params        [parameters];  names  their names
        lr, lr_scale  the learning rate, and its ratio to the scheduled one
        weight_decay

    Raises UserError for a pattern that matches no parameter.
    """
    groups = {}
    used_patterns = set()
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        lr_scale = 1.0
        weight_decay = cfg["weight_decay"] if p.dim() >= 2 else 0.0
        spec = shard.matching_group(name, cfg["param_groups"])
        if spec:
            used_patterns.add(spec["match"])
            # in the config, lr is a factor; weight_decay replaces the default
            lr_scale = spec.get("lr", lr_scale)
            weight_decay = spec.get("weight_decay", weight_decay)
        group = groups.setdefault((lr_scale, weight_decay), {"params": [], "names": []})
        group["params"].append(p)
        group["names"].append(name)
    for spec in cfg["param_groups"]:
        is_trained = spec.get("train", True)             # else: see shard.freeze_parameters
        if is_trained and spec["match"] not in used_patterns:
            raise configs.UserError(f"param_groups: no trained parameter matches {spec['match']!r} "
                                    "(or an earlier group already took them)")
    return [group | {"lr": cfg["lr"], "lr_scale": lr_scale, "weight_decay": weight_decay}
            for (lr_scale, weight_decay), group in groups.items()]


def make_optimizer(model, cfg):
    """The optimizer that the config names, with its state, so that a checkpoint can be loaded."""
    function = OPTIMIZERS[cfg["optimizer"]]
    options = cfg["optimizer_options"]
    n_arguments = 2                                      # param_groups and cfg
    make = configs.bind_options("optimizer", function, n_arguments, options)
    optimizer = make(make_param_groups(model, cfg), cfg)
    if not any(optimizer.state.values()):
        # an optimizer that creates its state in its first step (or, as SGD without momentum, never)
        create_state(optimizer)
    checkpoint.check_optimizer_state(optimizer, model)
    return optimizer


@torch.no_grad()
def create_state(optimizer):
    """Create the state of an optimizer that does so in its first step (as torch.optim does).

    Takes a step with gradients, learning rate and weight decay of 0. Parameters and step counters
    are reset afterwards. train_step sets the learning rate before each real step.
    """
    params = optimizer_parameters(optimizer)
    saved_params = [p.clone() for p in params]
    weight_decays = [group.get("weight_decay", 0.0) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        group["weight_decay"] = 0.0
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for group, weight_decay in zip(optimizer.param_groups, weight_decays):
        group["weight_decay"] = weight_decay
    for p, saved in zip(params, saved_params):
        p.copy_(saved)
        p.grad = None
        step = optimizer.state[p].get("step")
        if step is not None:
            optimizer.state[p]["step"] = step * 0


# --------------------------------------------------------------------------------------------------
# one step

def forward_backward(model, micro_batches, global_loss_weight, cfg):
    """Compute the gradient of the global batch, and leave it (or this rank's shard) in .grad.

    micro_batches       this rank's micro-batches (model.py describes them); every rank has the
                        same number of them, some of which may be empty
    global_loss_weight  sum of |loss_weight| over the micro-batches of all ranks
    cfg                 not used here; a replacement may read its options from it

    Returns the loss of the global batch as a tensor, and document_stats: for each micro-batch of
    this rank a pair (doc_ids [D], {"loss": [D]}).

    To aggregate gradients in another way, replace this function: see experiments/majority.py. The
    sum does not depend on micro_tokens and ranks; another aggregation may. One that calls
    backward() itself has to call unscale_gradients(model) afterwards.
    """
    loss = torch.zeros((), device=model.device)
    document_stats = []
    for i, micro_batch in enumerate(micro_batches):
        # FSDP (set to sum, see shard.apply_fsdp) reduces over ranks in the last backward pass only
        shard.set_gradient_sync(model, last=i == len(micro_batches) - 1)
        loss_sum, _weight_sum, stats = model(micro_batch)
        micro_loss = loss_sum / global_loss_weight
        micro_loss.backward()
        loss += micro_loss.detach()
        document_stats.append((micro_batch["doc_ids"], stats))
    unscale_gradients(model)
    shard.all_reduce_gradients(model)                    # replicated parameters: one all-reduce
    return shard.all_reduce_(loss), document_stats


def micro_batch_gradients(model, micro_batches, global_loss_weight):
    """Yield (loss, (doc_ids [D], {"loss": [D]}), gradients) for each of this rank's micro-batches.

    gradients is a list, one tensor per trained parameter in the order of model.parameters(): the
    gradient of this micro-batch on this rank alone, of its summed loss / global_loss_weight (see
    experiments/clipped.py for that of its mean loss). It is 0 for an empty one. Aggregate them,
    assign the result to each p.grad, and call shard.all_reduce_gradients(model), which sums .grad
    over ranks. A list stays valid after the next one is yielded.

    Works on one rank and on replicated ranks. With shard.mesh.shard > 1 no rank ever holds the
    gradient of its own micro-batch, because the backward pass reduces it over ranks: UserError.
    """
    if shard.is_sharded(model):
        raise configs.UserError("shard.mesh.shard: gradients per micro-batch exist only where each "
                                "rank holds the whole model; shard.mesh.shard=1 shard.offload=none")
    params = [p for p in model.parameters() if p.requires_grad]
    for micro_batch in micro_batches:
        model.zero_grad()
        loss_sum, _weight_sum, stats = model(micro_batch)
        micro_loss = loss_sum / global_loss_weight
        micro_loss.backward()
        unscale_gradients(model)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        yield micro_loss.detach(), (micro_batch["doc_ids"], stats), gradients


def unscale_gradients(model):
    """Divide all .grad by model.loss_scale, which is 1 except with dtype=float16."""
    if model.loss_scale != 1.0:
        for p in model.parameters():
            if p.grad is not None:
                p.grad.div_(model.loss_scale)


FIRST_LOSS_SCALE = 2.0**16
LEAST_LOSS_SCALE = 1.0
LOSS_SCALE_PERIOD = 2000     # good steps


def adjust_loss_scale(state, loss, is_finite):
    """Dynamic loss scaling of dtype=float16 (arXiv:1710.03740, section 3.2), after a step.

    The scale lifts small gradients into the range of float16. It is halved when a gradient
    overflows, and doubled after LOSS_SCALE_PERIOD good steps in a row. It is a power of two, so
    that scaling rounds nothing.

    Returns whether the scale was halved. It is not if the loss, which is not scaled, is not finite.
    """
    if state.dtype != "float16":
        return False
    state.good_steps = state.good_steps + 1 if is_finite else 0
    if state.good_steps == LOSS_SCALE_PERIOD:
        state.loss_scale *= 2
        state.good_steps = 0
    if is_finite or not math.isfinite(loss) or state.loss_scale <= LEAST_LOSS_SCALE:
        return False
    state.loss_scale /= 2
    return True


def weight_documents(micro_batch, factors):
    """A micro-batch whose loss weights are multiplied by a factor per document: {doc_id: factor}.

    Factors may be negative. For losses that compare whole documents, see experiments/dpo.py.
    """
    lengths = micro_batch["cu_seqlens"].diff()                                     # [D]
    of_documents = [factors[doc_id] for doc_id in micro_batch["doc_ids"].tolist()]
    of_documents = torch.tensor(of_documents, device=lengths.device)               # [D]
    of_tokens = of_documents.repeat_interleave(lengths)                            # [T - padding]
    loss_weights = micro_batch["loss_weights"].clone()                             # [T]
    loss_weights[:len(of_tokens)] *= of_tokens
    return micro_batch | {"loss_weights": loss_weights}


def train_step(model, optimizer, micro_batches, global_loss_weight, lr, cfg):
    """Forward, backward, clip, update. Returns (loss, grad_norm, is_finite, document_stats).

    grad_norm is the norm before clipping. If the loss or the norm is not finite, the update is
    skipped. This check is the only point where train_step waits for the device.
    """
    loss, document_stats = forward_backward(model, micro_batches, global_loss_weight, cfg)
    params = optimizer_parameters(optimizer)
    gradients = [p.grad for p in params if p.grad is not None]
    grad_norm = shard.full_tensor(total_norm(gradients))
    norm_on_host = float(grad_norm + 0 * loss)           # not finite if either is not
    is_finite = math.isfinite(norm_on_host)
    if is_finite:
        if 0 < cfg["grad_clip"] < norm_on_host:          # grad_clip 0: no clipping
            torch.nn.utils.clip_grads_with_norm_(params, cfg["grad_clip"], grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        optimizer.step()
    optimizer.zero_grad()
    return loss, grad_norm, is_finite, document_stats


def total_norm(gradients):
    """The norm of all gradients together, in fp32."""
    if all(gradient.dtype == torch.float32 for gradient in gradients):
        return torch.nn.utils.get_total_norm(gradients)
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
    return torch.linalg.vector_norm(torch.stack(norms))


def gather_document_stats(document_stats):
    """document_stats of all ranks -> (doc_ids [n], {"loss": [n], ...}) as numpy arrays."""
    local = []
    for doc_ids, stats in document_stats:
        arrays = {name: values.cpu().numpy() for name, values in stats.items()}
        local.append((doc_ids.cpu().numpy(), arrays))
    pairs = []
    for of_rank in shard.all_gather_object(local):
        pairs += of_rank
    doc_ids = np.concatenate([ids for ids, _ in pairs])
    names = pairs[0][1].keys()
    return doc_ids, {name: np.concatenate([arrays[name] for _, arrays in pairs]) for name in names}


# --------------------------------------------------------------------------------------------------
# micro-batches on their way to the device

def load_step(run, step):
    """Return (micro-batches, info, loss_weight) of a step, or None after the last step.

    Runs in a thread while the step before is computed; with a feedback sampler, after it.

    micro_batches  of this rank, in host memory
    info           what the global batch holds, see sampler.load_micro_batches
    loss_weight    the sum of |loss_weight| over this rank's micro-batches
    """
    if step >= run.state.total_steps:
        return None
    indices = run.sampler.documents(step)
    pad_to = shard.pad_multiple(run.device, run.model.dtype, run.cfg["micro_tokens"])
    micro_batches, info = sampler.load_micro_batches(
        indices, run.cfg, run.dataset, shard.world_size(), shard.rank(), pad_to)
    for micro_batch in micro_batches:
        run.sampler.reweight(micro_batch)
    loss_weight = sampler.sum_loss_weights(micro_batches)
    micro_batches = [pin_tensors(micro_batch, run.device) for micro_batch in micro_batches]
    return micro_batches, info, loss_weight


def pin_tensors(micro_batch, device):
    """numpy -> torch, in pinned memory, from which a GPU copies while it computes.

    Adds target_index, int64 [N]: the positions of the targets. If the model counted them on a GPU,
    the host would have to wait for the result.
    """
    is_target = micro_batch["targets"] != sampler.IGNORE_INDEX
    arrays = micro_batch | {"target_index": np.flatnonzero(is_target)}
    out = {}
    for key, value in arrays.items():
        out[key] = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
    if device.type == "cuda":
        with torch.cuda.device(device):                  # a new thread would initialize GPU 0
            out = {k: v.pin_memory() if torch.is_tensor(v) else v for k, v in out.items()}
    return out


def to_device(micro_batch, device):
    return {key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
            for key, value in micro_batch.items()}


# --------------------------------------------------------------------------------------------------
# evaluation

def exact_match(answer, reference):
    return answer.strip() == reference.strip()


def compared_part(text, eval_answer):
    """What cfg["eval_answer"] selects of an answer or a reference; "" if there is no match."""
    if eval_answer == "all":
        return text
    if eval_answer == "last_line":
        return text.strip().rpartition("\n")[2].strip()
    matches = list(re.finditer(eval_answer, text))
    if not matches:
        return ""
    last = matches[-1]
    group = 1 if last.re.groups else 0
    return (last[group] or "").strip()


# name: function (answer, reference) -> bool or number, whose mean is logged as val/LABEL/name. It
# gets what cfg["eval_answer"] selects of both. If larger is better, cfg["best"] has "max KEY"
METRICS = {"exact_match": exact_match}
# name: function (run, [(prompt ids, reference ids)]) -> number, which is logged. All ranks call it
# and return the same (experiments/pass_at_k.py)
EVALUATIONS = {}
PACK_TOGETHER = 1024                      # validation documents packed at once: bounds host memory
PROMPTS_PER_RANK = 64                     # prompts that a rank answers at once
# A generated token takes about as long as this many trained ones: 9 with 10M parameters on a CPU
# and 64 prompts at once
GENERATION_COST = 10


def group_by_label(cfg, data):
    """Validation sources by label: {label: Dataset}."""
    sources_by_label = {}
    for name, tokens in data["validation"].items():
        # a split that is held out (data.validation_split) has the name of its training source
        is_held_out = name not in cfg["data"]["validation"]
        kind = "train" if is_held_out else "validation"
        label = cfg["data"][kind][name]["label"] or name
        sources_by_label.setdefault(label, {})[name] = tokens
    return {label: sampler.Dataset(sources) for label, sources in sources_by_label.items()}


@torch.no_grad()
def evaluate(run):
    """Log the loss and the answers' metrics of every label, and update checkpoints/best.

    Leaves the answers in run.answers. In evaluation mode, so without dropout and NEFTune. After a
    signal nothing is logged: the resumed run evaluates again.
    """
    start = time.perf_counter()
    n_documents = sum(len(dataset) for dataset in run.validation_sets.values())
    n_answers = sum(len(prompts) for prompts in run.prompts.values())
    answers_of = f" and {n_answers:,} answers of at most {run.cfg['eval_tokens']:,} tokens"
    run.logger.print(f"evaluating {n_documents:,} documents{answers_of if n_answers else ''}")
    run.model.eval()
    values = {}
    with log.ProgressBar("evaluate", n_documents, unit="document") as bar:
        for label, dataset in run.validation_sets.items():
            if not run.stop_signal:
                values[label] = validation_losses(run, dataset, bar)
    if n_answers and not run.stop_signal:
        for label, metrics in evaluate_answers(run).items():
            values[label] |= metrics
    shard.reshard(run.model)    # without a backward pass, FSDP keeps gathered weights
    run.model.train()
    if run.stop_signal:
        return
    record = {"step": run.state.step}
    for label, of_label in values.items():
        record |= {f"val/{label}/{name}": value for name, value in of_label.items()}
    if run.cfg["eval_only"]:
        record["eval_only"] = 1
    run.logger.validation(record, run.answers, time.perf_counter() - start)
    samples = [sample for of_label in run.answers.values() for sample in of_label]
    if samples and run.cfg["samples"]:
        run.logger.print("\n".join(log.format_sample(samples[0])))
    if not run.cfg["eval_only"]:
        mark_best(run)


def evaluate_answers(run):
    """{label: {metric: mean}} of METRICS and EVALUATIONS. Leaves the answers in run.answers.

    The prompts of all labels are answered at once. Incomplete after a signal.
    """
    eval_answer = run.cfg["eval_answer"]
    labels = [label for label, prompts in run.prompts.items() for _ in prompts]
    prompts = [prompt for of_label in run.prompts.values() for prompt in of_label]
    run.answers = {}
    for label, (prompt, answer, reference) in zip(labels, generate_answers(run, prompts)):
        sample = {"prompt": prompt, "answer": answer, "reference": reference}
        parts = (compared_part(answer, eval_answer), compared_part(reference, eval_answer))
        for name, metric in METRICS.items():
            sample[name] = float(metric(*parts))
        run.answers.setdefault(label, []).append(sample)
    means = {}
    for label, samples in run.answers.items():
        means[label] = {name: sum(sample[name] for sample in samples) / len(samples)
                        for name in METRICS}
        for name, evaluation in EVALUATIONS.items():
            if not run.stop_signal:
                means[label][name] = evaluation(run, run.prompts[label])
    return means


def validation_losses(run, dataset, bar):
    """{"loss": sum(loss_weight * loss) / sum(|loss_weight|) over all documents, as in training}

    With a loss of one's own also the same of plain cross entropy, as "nll". If the bytes of tokens
    are known, also "bits_per_byte" (docs/metrics.md). After a signal, over fewer documents.
    """
    pad_to = shard.pad_multiple(run.device, run.model.dtype, run.cfg["micro_tokens"])
    sums = {"loss": 0.0}
    weight_sum = 0.0
    byte_sum = 0.0
    if run.model.computes_nll():
        sums["nll"] = 0.0
    for start in range(0, len(dataset), PACK_TOGETHER):
        indices = np.arange(start, min(start + PACK_TOGETHER, len(dataset)))
        micro_batches, _ = sampler.load_micro_batches(
            indices, run.cfg, dataset, shard.world_size(), shard.rank(), pad_to)
        weight_sum += sampler.sum_loss_weights(micro_batches)
        for micro_batch in micro_batches:
            batch = to_device(pin_tensors(micro_batch, run.device), run.device)
            _loss_sum, _weight_sum, stats = run.model(batch)
            for name in sums:
                sums[name] += stats[name].double().sum()
            byte_sum += sum_target_bytes(micro_batch, run.token_bytes)
            bar.update(len(micro_batch["doc_ids"]) * shard.world_size())
            poll_signals(run)
            if run.stop_signal:
                break
        if run.stop_signal:
            break
    *totals, total_weight, total_bytes = shard.all_reduce_sum(
        [*map(float, sums.values()), weight_sum, byte_sum])
    losses = {name: total / total_weight for name, total in zip(sums, totals)}
    if total_bytes:                      # the last total is that of nll, if there is one
        losses["bits_per_byte"] = totals[-1] / math.log(2) / total_bytes
    return losses


def sum_target_bytes(micro_batch, token_bytes):
    """The sum of |loss_weight| * bytes of the text, over the target tokens."""
    is_target = micro_batch["targets"] != sampler.IGNORE_INDEX
    n_bytes = token_bytes[micro_batch["targets"][is_target]]
    return float(np.abs(micro_batch["loss_weights"][is_target]) @ n_bytes)


def generate_answers(run, prompts, seed=0, **sampling):
    """Answers to [(prompt ids, reference ids)] -> [(prompt, answer, reference)] as text.

    seed      prompt i is sampled with a seed that is hashed from (seed, i), on any rank
    sampling  temperature, top_k, top_p of model.generate(). None: greedy answers

    Ranks share the prompts. All of them generate until no rank has an unfinished answer: on a
    sharded model every token is a collective. After a signal, answers are incomplete.
    """
    rank = shard.rank()
    world_size = shard.world_size()
    decode = run.tokenizer.decode
    seeds = [int(sampler.hash_key(seed, i)) for i in range(len(prompts))]
    answers = []
    for start in range(0, len(prompts), PROMPTS_PER_RANK * world_size):
        chunk = range(len(prompts))[start:start + PROMPTS_PER_RANK * world_size]
        # a rank without a prompt answers the first one; this answer is not among the results
        local = chunk[rank::world_size] or [0]
        what = f"answers {start + 1}-{start + len(chunk)} of {len(prompts)}"
        with log.ProgressBar(what, run.cfg["eval_tokens"], unit="token") as bar:
            answer_ids = transformer.generate_all(
                run.model, [prompts[i][0] for i in local], run.cfg["eval_tokens"], run.stop_ids,
                keep_going=functools.partial(keep_generating, run, bar),
                seed=[seeds[i] for i in local], **sampling)
        texts = [(decode(prompts[i][0]), decode(answer), decode(prompts[i][1]))
                 for i, answer in zip(local, answer_ids)]
        texts_by_rank = shard.all_gather_object(texts)
        # prompt i of the chunk was number i // world_size on rank i % world_size
        answers += [texts_by_rank[i % world_size][i // world_size] for i in range(len(chunk))]
        if run.stop_signal:
            break
    return answers


def keep_generating(run, bar, unfinished):
    """Does a rank have an unfinished answer, and none a signal? A collective, after each token.

    unfinished  [bool], one per prompt of this rank
    """
    bar.update()
    n_unfinished, run.stop_signal = shard.all_reduce_max([sum(unfinished), local_signal(run)])
    return n_unfinished > 0 and not run.stop_signal


def mark_best(run):
    """Point checkpoints/best to the checkpoint with the best value of cfg["best"].

    Waits for a save in progress, because that one may be the best.
    """
    if run.cfg["best"] and shard.rank() == 0:
        run.saver.wait()    # for this rank's writer thread: not a collective
        steps, _ = rank_steps(run)
        checkpoint.set_best(run.cfg["out_dir"], steps)


def rank_steps(run):
    """log.sort_steps_by for the steps of this folder, without those of a run that it continues."""
    records = log.read(run.cfg["out_dir"])
    return log.sort_steps_by(records, run.cfg["best"], run.state.first_step)


def is_out_of_patience(run):
    """Did the last `patience` evaluations find no new best? (rank 0 reads the records)"""
    if not run.cfg["patience"]:
        return False
    _, evaluations_since_best = rank_steps(run)
    return evaluations_since_best >= run.cfg["patience"]


# --------------------------------------------------------------------------------------------------
# setup

@dataclasses.dataclass
class TrainState:
    """What state.json holds: what a resumed run needs besides tensors and the sampler's state."""
    step: int                     # steps done, including those whose update was skipped
    total_steps: int
    first_step: int               # of the checkpoint of another run that this one continues; 0
    seconds: float                # wall-clock seconds after setup, evaluations included, summed
                                  # over the starts of the run (the first and every resume)
    skipped_steps: int            # steps without an update: loss or gradient was not finite
    consecutive_skips: int        # of them, since the last update; not overflows of float16
    loss_scale: float             # of the next step; 1 unless dtype is float16
    good_steps: int               # updates since the loss scale has changed or a step was skipped
    dtype: str                    # of the computation, chosen at the first start
    has_chats: bool               # the export gets the chat template
    config: dict                  # the keys that files and command line set
    data: dict                    # {source: fingerprints of its files, tokenizer and template}
    sources: dict                 # for the model card, see checkpoint.describe_sources
    base: dict                    # {key: hashes of the files of a pretrained model}
    code: dict                    # {file: hash} of the scripts that run
    git: str | None               # git describe
    launch: str                   # of the start that saved it, see checkpoint.launch_id
    changes: list                 # [{"step", "what"}]: files and data that had changed at a resume
    versions: dict


@dataclasses.dataclass
class Run:
    """Everything the loop works with.

    A checkpoint holds `state`, and the state of model, optimizer and sampler.
    """
    cfg: dict
    state: TrainState
    device: torch.device
    model: torch.nn.Module
    optimizer: object             # see OPTIMIZERS; None with eval_only
    tokenizer: object
    data: dict                    # {"train": {source: Tokens}, "validation": {source: Tokens}}
    dataset: sampler.Dataset      # all training sources
    sampler: sampler.Sampler
    validation_sets: dict         # {label: Dataset}
    prompts: dict                 # {label: [(prompt ids, reference ids)]}
    stop_ids: list                # tokens that end an answer
    token_bytes: np.ndarray       # int64 [V], see tokenize_data.token_bytes
    steps_per_epoch: int
    resume_path: Path | None
    logger: object
    saver: checkpoint.Saver
    lock: object                  # of out_dir: an open file on rank 0, see checkpoint.lock_folder
    # fixed at this start
    resumed_step: int = 0
    seconds_before: float = 0.0   # of earlier starts
    start_time: float = dataclasses.field(default_factory=time.perf_counter)
    # what changes while the run is on
    meter: log.Meter = dataclasses.field(default_factory=log.Meter)
    saved_step: int = -1          # of the newest checkpoint in out_dir, or being written; -1: none
    # signal numbers that this rank has received; STOP_FILE if out_dir/STOP was found
    received: list = dataclasses.field(default_factory=list)
    stop_signal: int = 0          # the one that all ranks know of, see poll_signals; 0: none
    next_look: float = 0.0        # time.monotonic() at which rank 0 looks for that file again
    time_is_up: bool = False      # max_seconds is reached
    out_of_patience: bool = False
    # of the last evaluation: {label: [sample]}, see log.Logger.validation
    answers: dict = dataclasses.field(default_factory=dict)
    # {name: number or tensor of one element}: what an experiment adds to the record of a step
    # (experiments/dpo.py)
    step_metrics: dict = dataclasses.field(default_factory=dict)

    def seconds(self):
        """Wall-clock seconds so far, summed over the starts of the run (see TrainState)."""
        return self.seconds_before + time.perf_counter() - self.start_time

    def is_complete(self):
        """Has the run reached its end: max_steps or epochs, max_seconds, or patience?

        A signal only interrupts a run.
        """
        all_steps_done = self.state.step >= self.state.total_steps
        return all_steps_done or self.time_is_up or self.out_of_patience


def setup(cfg, explicit):
    """Return the Run: load data and model, and restore the checkpoint to resume from.

    Writes config.yaml and code/ to out_dir. With resume=never, deletes an earlier run's files there
    first. Raises UserError for mistakes in the config.

    explicit  the keys that config files and command line set (configs.load); saved as config.yaml
    """
    is_rank0 = shard.rank() == 0
    check_registered_names(cfg)
    shard.rank0_only(check_inputs, cfg)
    shard.mesh_sizes(cfg, shard.world_size())            # raises UserError for an impossible mesh
    shard.set_threads()
    lock = checkpoint.lock_folder(cfg["out_dir"]) if is_rank0 else None
    resume_path, is_own_checkpoint, saved = read_resume_point(cfg)
    base = shard.rank0_only(checkpoint.base_hashes, cfg)
    if saved:
        checkpoint.check_same_base(saved, base, cfg)

    # data
    tokenizer = tokenize_data.load_tokenizer(cfg)
    quiet = not is_rank0
    data = shard.main_process_first(tokenize_data.load_datasets, cfg, tokenizer, quiet)
    dataset = sampler.Dataset(data["train"])
    steps_per_epoch, total_steps = count_steps(cfg, dataset.sizes)
    check_micro_tokens(cfg, data)

    # model and optimizer
    dtype = shard.rank0_only(choose_dtype, cfg, saved)
    cfg = cfg | {"dtype": dtype}                         # auto is resolved from here on
    model, optimizer = load_model(cfg, tokenizer)
    train_sampler = sampler.make_sampler(cfg, dataset)

    # evaluation
    state = new_state(explicit, cfg, data, base, total_steps)
    check_chat_options(explicit, state.has_chats)
    stop_ids = answer_stop_ids(cfg, tokenizer) if state.has_chats else []
    validation_sets = group_by_label(cfg, data)
    token_bytes = tokenize_data.token_bytes(tokenizer)
    prompts = build_prompts(cfg, model.cfg, validation_sets, stop_ids, tokenizer, token_bytes)
    if not cfg["eval_only"]:
        limit_prompts(cfg, dataset, total_steps, prompts)

    # resume
    if resume_path:
        checkpoint.check_same_data(saved, state.data, cfg)
        _, sampler_state = checkpoint.load_checkpoint(resume_path, model, optimizer)
        train_sampler.load_state_dict(sampler_state)
        continue_state(state, saved, is_own_checkpoint)

    # the run's folder
    logger = start_logging(cfg, explicit, state, resume_path, is_own_checkpoint)
    saver = checkpoint.Saver(cfg["out_dir"], cfg["checkpoint"]["keep"], logger.print,
                             cfg["checkpoint"]["keep_every"])
    return Run(
        cfg=cfg, state=state, device=model.device, model=model, optimizer=optimizer,
        tokenizer=tokenizer, data=data, dataset=dataset, sampler=train_sampler,
        validation_sets=validation_sets, prompts=prompts, stop_ids=stop_ids,
        token_bytes=token_bytes, steps_per_epoch=steps_per_epoch,
        resume_path=resume_path, logger=logger, saver=saver, lock=lock,
        resumed_step=state.step, seconds_before=state.seconds,
        saved_step=state.step if is_own_checkpoint else -1)


def read_resume_point(cfg):
    """Return (the checkpoint to resume from, is it one of the run in out_dir?, its state).

    (None, False, None) for a new run. The same on all ranks.
    """
    shard.rank0_only(check_no_stop_file, cfg["out_dir"])
    resume_path = shard.rank0_only(checkpoint.find_resume_point, cfg)
    saved = checkpoint.read_state(resume_path) if resume_path else None
    is_own_checkpoint = bool(saved) and checkpoint.is_inside(resume_path, cfg["out_dir"])
    if cfg["eval_only"]:
        step = saved["step"] if saved else 0
        shard.rank0_only(check_keeps_records, cfg["out_dir"], resume_path, is_own_checkpoint, step)
    return resume_path, is_own_checkpoint, saved


def check_no_stop_file(out_dir):
    """Raise UserError if out_dir/STOP exists before the run starts."""
    path = stop_file(out_dir)
    if path.exists():
        raise configs.UserError(f"out_dir: {path} exists, so nothing is trained; remove the file")


def check_keeps_records(out_dir, resume_path, is_own_checkpoint, step):
    """Raise UserError if eval_only would delete records in out_dir.

    Those of later steps than that of the checkpoint, and those of a run that is not resumed.
    """
    for record in log.read(out_dir):
        if record["step"] > step or ("loss" in record and not is_own_checkpoint):
            resume = f"resume={resume_path} " if is_own_checkpoint else ""
            raise configs.UserError(f"out_dir: {out_dir} has records that an evaluation of step "
                                    f"{step:,} would delete; {resume}out_dir=NEW evaluates in "
                                    "another folder")


def check_chat_options(explicit, has_chats):
    """Raise UserError for an option of chats if no source has any."""
    for key in ("data.chat_template", "data.train_on"):
        if configs.get(explicit, key) and not has_chats:
            raise configs.UserError(f"{key}: has no effect, because no source holds chats; remove "
                                    "it, or see what was found: python tokenize_data.py ... show=1")


def build_prompts(cfg, model_cfg, validation_sets, stop_ids, tokenizer, token_bytes):
    """{label: [(prompt ids, reference ids)]}. Raises UserError if cfg["best"] is not logged."""
    prompts = {}
    metric_names = {}
    for label, validation_set in validation_sets.items():
        found = transformer.build_eval_prompts(
            validation_set, stop_ids, cfg["eval_prompts"], model_cfg["max_len"])
        prompts[label] = found
        if cfg["eval_answer"] not in ("all", "last_line"):
            prompts[label] = [(prompt, reference) for prompt, reference in found
                              if compared_part(tokenizer.decode(reference), cfg["eval_answer"])]
        if found and not prompts[label]:
            raise configs.UserError(f"eval_answer: {cfg['eval_answer']!r} matches none of the "
                                    f"{len(found)} reference answers of {label}")
        metric_names[label] = [*METRICS, *EVALUATIONS] if prompts[label] else []
        if not transformer.is_plain_loss(model_cfg):
            metric_names[label].append("nll")
        if token_bytes.any():
            metric_names[label].append("bits_per_byte")
    log.check_best(cfg, list(validation_sets), metric_names)
    return prompts


def limit_prompts(cfg, dataset, total_steps, prompts):
    """Drop prompts, in place, so that answering them takes about eval_share of the training time.

    An answer is expected to be as long as its reference, with the token that ends it.
    """
    lengths = [len(reference) + 1 for of_label in prompts.values() for _, reference in of_label]
    if not lengths or not cfg["eval_share"] or not cfg["eval_every"]:
        return
    every = cfg["eval_every"]
    period = every if type(every) is int else every * total_steps
    n_evaluations = 1 + math.ceil(total_steps / max(1, period))
    n_tokens = total_steps * min(cfg["batch_size"], len(dataset)) * dataset.mean_length()
    n_generated = cfg["eval_share"] * n_tokens / GENERATION_COST / n_evaluations
    length = sum(lengths) / len(lengths)
    per_label = max(1, int(n_generated / length / len(prompts)))
    for label, of_label in prompts.items():
        prompts[label] = of_label[:per_label]
    n_left = sum(map(len, prompts.values()))
    if n_left < len(lengths) and shard.rank() == 0:
        print(f"answers   {n_left:,} of {len(lengths):,} in each of {n_evaluations} evaluations: "
              f"{cfg['eval_share']} x {n_tokens:,.0f} trained tokens / {GENERATION_COST} / "
              f"{n_evaluations} / ~{length:.0f} tokens (eval_share=0: all)")


def answer_stop_ids(cfg, tokenizer):
    """The ids that end an answer: those of the chat template, and the pretrained model's."""
    template = tokenize_data.load_template(tokenizer, cfg)
    stop_ids = tokenize_data.stop_token_ids(tokenizer, template)
    base = configs.resolve_pretrained(cfg["model"]["init_from"])
    return transformer.all_stop_ids(base and Path(base), stop_ids, tokenizer.special_and_added_ids)


def check_registered_names(cfg):
    """Raise UserError for a name that is not in its dict; experiments may have added names."""
    for key, registered in (("schedule", SCHEDULES), ("optimizer", OPTIMIZERS),
                            ("sampler.order", sampler.SAMPLERS), ("model.loss", transformer.LOSSES),
                            ("model.embed", transformer.EMBEDDINGS),
                            ("model.score_mod", transformer.SCORE_MODS)):
        name = configs.get(cfg, key)
        if name not in registered:
            raise configs.UserError(f"{key}: must be one of {', '.join(registered)}; got {name}")


def choose_dtype(cfg, saved):
    """`dtype: auto` is resolved once, on rank 0 of the first start; resumed runs keep it.

    saved  the state of the checkpoint, or None
    """
    if saved and cfg["dtype"] == "auto":
        return saved["dtype"]
    _, dtype = shard.pick_device(cfg)
    return str(dtype).removeprefix("torch.")


def load_model(cfg, tokenizer):
    """Return (model, optimizer) before the first step. With eval_only the optimizer is None.

    Raises UserError if tokenizer, lengths or the reference model don't fit the model.
    """
    model_cfg, read_slice = resolve_model(cfg, tokenizer)
    model = shard.parallelize(transformer.build_on_meta(model_cfg), cfg, read_slice)
    if "reference_logits" in model.loss_inputs:
        # in a list: as an attribute, it would be a submodule, trained and saved with the model
        model.references.append(load_reference(cfg, model_cfg))
    elif cfg["reference_model"]:
        raise configs.UserError(f"reference_model: has no effect with model.loss="
                                f"{model_cfg['loss']}, which compares with no model; remove it")
    if cfg["eval_only"]:
        return model, None                               # its state may be larger than the model
    shard.warm_up(model, cfg)
    return model, make_optimizer(model, cfg)


def resolve_model(cfg, tokenizer):
    """Return (model_cfg, read_slice).

    model_cfg is the model section with all keys resolved; read_slice(name, first_row, end_row)
    returns these rows of a weight.

    Raises UserError if tokenizer or lengths don't fit the model.
    """
    model_cfg = transformer.resolve_vocab_size(cfg["model"], tokenizer.n_vocab)
    seq_len = cfg["data"]["seq_len"]
    # resolve_vocab_size enlarges a pretrained vocabulary, so only an explicit model.vocab_size of a
    # new model can be too small
    if tokenizer.n_vocab > model_cfg["vocab_size"]:
        raise configs.UserError(f"model.vocab_size: {model_cfg['vocab_size']} rows are too few for "
                                f"the tokenizer's {tokenizer.n_vocab} ids; model.vocab_size=null "
                                "or another data.tokenizer")
    is_scaled = model_cfg["rope_scaling"] is not None
    if seq_len > model_cfg["max_len"] and not is_scaled and shard.rank() == 0:
        print(f"warning: data.seq_len: {seq_len} is more than the {model_cfg['max_len']} positions "
              f"that the model knows (model.max_len); model.max_len={seq_len} says that it learns "
              "more, and model.rope_scaling stretches those that it knows", file=sys.stderr)
    if cfg["checkpoint"]["export"]:
        transformer.hf_slices(model_cfg)    # raises UserError now, not after training
    reader = transformer.weights_reader(model_cfg, cfg["seed"])
    if model_cfg["init_from"] and reader.new_names:
        report_new_parameters(cfg, reader.new_names)
    if cfg["shard"]["lora"]["r"] and model_cfg["init_from"]:
        check_lora_vocabulary(cfg, tokenizer, model_cfg)
    return model_cfg, reader.read


def report_new_parameters(cfg, names):
    """Print which parameters a pretrained model lacks. Raises UserError if they stay untrained."""
    base = cfg["model"]["init_from"]
    if cfg["shard"]["lora"]["r"]:
        raise configs.UserError(f"shard.lora.r: {base} lacks {', '.join(names)}, and LoRA trains "
                                "nothing but its adapters; shard.lora.r=0 trains all")
    if shard.rank() == 0:
        print(f"new       {', '.join(names)}: not in {base}, so initialized")


def check_lora_vocabulary(cfg, tokenizer, model_cfg):
    """Raise UserError if the tokenizer has tokens that the pretrained model was not trained with.

    Under LoRA, embedding and head are frozen unless they are in shard.lora.modules_to_save. Some
    models have more rows in them than their tokenizer ids.
    """
    folder = configs.resolve_model_dir(cfg["model"]["init_from"])
    known = configs.read_model(folder)["vocab_size"]
    if cfg["data"]["tokenizer"] and (folder / "tokenizer.json").is_file():
        known = min(known, tokenize_data.huggingface_tokenizer(folder).n_vocab)
    has_row_per_token = {shard.module_name(tensor): name
                         for tensor, name in shard.tensors_outside_blocks(model_cfg).items()
                         if name in ("embed.weight", "head.weight")}
    saved = shard.saved_tensors(model_cfg, cfg["shard"]["lora"]["modules_to_save"])
    if tokenizer.n_vocab > known and set(has_row_per_token.values()) - set(saved.values()):
        raise configs.UserError(
            f"shard.lora.r: the tokenizer has {tokenizer.n_vocab:,} ids, {folder} only {known:,}, "
            "and LoRA leaves the rows of new ones untrained; "
            f"shard.lora.modules_to_save=[{', '.join(has_row_per_token)}] trains all rows beside "
            "the adapters, shard.lora.r=0 trains all weights, and an empty data.tokenizer is the "
            "model's own")


def load_reference(cfg, model_cfg):
    """The frozen model whose logits a loss asks for (see LOSS_INPUTS in model.py)."""
    path = cfg["reference_model"] or model_cfg["init_from"]
    if not path:
        raise configs.UserError("reference_model: this run compares with a reference model; "
                                "reference_model=FOLDER names one, or model.init_from=FOLDER")
    reference_cfg = configs.load([f"model.init_from={path}"])[0]["model"]
    # A smaller vocabulary grows like that of the model (new rows are the mean of the others), so
    # that both have the same number of logits. A larger one does not fit.
    reference_cfg = transformer.resolve_vocab_size(reference_cfg, model_cfg["vocab_size"])
    if reference_cfg["vocab_size"] != model_cfg["vocab_size"]:
        raise configs.UserError(f"reference_model: {path} has {reference_cfg['vocab_size']} "
                                f"tokens, and the model {model_cfg['vocab_size']}; they must be "
                                "the same")
    read_slice = transformer.PretrainedWeights(path, reference_cfg).read
    reference = transformer.build_on_meta(reference_cfg).requires_grad_(False)
    without_lora = cfg["shard"] | {"lora": cfg["shard"]["lora"] | {"r": 0}, "quantize": "none"}
    cfg = cfg | {"shard": without_lora, "param_groups": []}
    return shard.parallelize(reference, cfg, read_slice).eval()


@torch.no_grad()
def document_losses(run, model):
    """The loss of every training document: sum of loss_weight * loss over its targets, fp32 [n].

    On every rank the same. model is run.model or another one, for example load_reference().
    """
    pad_to = shard.pad_multiple(run.device, model.dtype, run.cfg["micro_tokens"])
    losses = np.zeros(len(run.dataset), np.float32)
    for start in range(0, len(losses), PACK_TOGETHER):
        indices = np.arange(start, min(start + PACK_TOGETHER, len(losses)))
        micro_batches, _ = sampler.load_micro_batches(
            indices, run.cfg, run.dataset, shard.world_size(), shard.rank(), pad_to)
        document_stats = []
        for micro_batch in micro_batches:
            batch = to_device(pin_tensors(micro_batch, run.device), run.device)
            _loss_sum, _weight_sum, stats = model(batch)
            document_stats.append((batch["doc_ids"], stats))
        doc_ids, stats = gather_document_stats(document_stats)
        losses[doc_ids] = stats["loss"]
    shard.reshard(model)
    return losses


def reference_losses(run):
    """document_losses() of the frozen reference model, computed once and kept in data.cache_dir."""
    inputs = (run.state.data, run.dataset.sizes, run.state.base, run.cfg["dtype"])
    name = f"reference-{tokenize_data.fingerprint(inputs)}.npy"
    path = Path(run.cfg["data"]["cache_dir"]) / name
    if not shard.rank0_only(path.is_file):
        losses = document_losses(run, load_reference(run.cfg, run.model.cfg))
        if shard.rank() == 0:
            building = path.with_name(f"building.{name}")
            np.save(building, losses)
            os.replace(building, path)
    return shard.rank0_only(np.load, path)


def check_micro_tokens(cfg, data):
    """Raise UserError if a document is longer than a micro-batch."""
    all_sources = [*data["train"].values(), *data["validation"].values()]
    # a document of n tokens has n - 1 inputs
    longest = max(tokens.header["longest"] for tokens in all_sources) - 1
    if longest > cfg["micro_tokens"]:
        raise configs.UserError(f"micro_tokens: {cfg['micro_tokens']} is less than the longest "
                                f"document's {longest} tokens; micro_tokens={longest}, or "
                                f"data.seq_len={cfg['micro_tokens']}")


def count_steps(cfg, sizes):
    """Return (steps per epoch, steps of the run). Raises UserError if nothing limits the run.

    sizes  {training source: its number of documents}
    """
    steps_per_epoch = sampler.steps_per_epoch(cfg, sizes)
    epsilon = 1e-9                                       # 0.28 * 100 is a little more than 28
    limits = [cfg["max_steps"], math.ceil(cfg["epochs"] * steps_per_epoch - epsilon)]
    if not any(limits):
        raise configs.UserError("max_steps: neither max_steps nor epochs limits the run; "
                                "max_steps=1000 or epochs=1")
    return steps_per_epoch, min(limit for limit in limits if limit)


def new_state(explicit, cfg, data, base, total_steps):
    """The state of a run before its first step."""
    all_sources = [*data["train"].values(), *data["validation"].values()]
    return TrainState(
        step=0, total_steps=total_steps, first_step=0, seconds=0.0, skipped_steps=0,
        consecutive_skips=0,
        loss_scale=FIRST_LOSS_SCALE if cfg["dtype"] == "float16" else 1.0, good_steps=0,
        dtype=cfg["dtype"], has_chats=any(tokens.header["chats"] for tokens in all_sources),
        config=explicit,
        data={name: tokens.header["fingerprints"] for name, tokens in data["train"].items()},
        sources=checkpoint.describe_sources(cfg, data["train"]),
        base=base, code=checkpoint.code_hashes(), git=checkpoint.git_describe(),
        launch=checkpoint.launch_id(), changes=[],
        versions={"torch": torch.__version__, "python": platform.python_version()})


def continue_state(state, saved, is_own_checkpoint):
    """Copy the counters of a checkpoint's state, and record the inputs that have changed."""
    state.first_step = saved.get("first_step", 0) if is_own_checkpoint else saved["step"]
    keys = ["step", "seconds", "skipped_steps", "consecutive_skips", "changes"]
    if saved["dtype"] == state.dtype:
        keys += ["loss_scale", "good_steps"]
    for key in keys:
        if key in saved:                                 # older versions had no loss scale
            setattr(state, key, saved[key])
    changed = checkpoint.changed_files(saved["code"], state.code)
    changed += [f"data.train.{name}" for name in sorted(saved["data"] | state.data)
                if saved["data"].get(name) != state.data.get(name)]
    saved_base = saved.get("base", state.base)
    changed += [key for key in sorted(saved_base | state.base)
                if saved_base.get(key) != state.base.get(key)]
    if changed:
        state.changes = [*saved["changes"], {"step": state.step, "what": changed}]


def start_logging(cfg, explicit, state, resume_path, is_own_checkpoint):
    """Prepare out_dir for this start, and return the logger of this rank.

    Rank 0 deletes what is not resumed, and writes config.yaml and code/. With eval_only it does so
    only in a folder without checkpoints.
    """
    if shard.rank() > 0:
        return log.NullLogger()
    continued = None                                     # the folder of another run
    if cfg["eval_only"]:
        is_written = not checkpoint.list_checkpoints(cfg["out_dir"])
    else:
        is_written = True
        if is_own_checkpoint:
            checkpoint.delete_later_checkpoints(cfg["out_dir"], state.step)
        elif resume_path:
            continued = checkpoint.run_folder(resume_path)
        elif cfg["resume"] == "never":
            checkpoint.start_over(cfg["out_dir"])
    logger = log.Logger(cfg, state.total_steps, state.step, state.seconds, continued, explicit,
                        state.git)
    if is_written:
        write_run_folder(cfg, explicit, state)
    return logger


def write_run_folder(cfg, explicit, state):
    """Write config.yaml and code/.

    resume=never and resume=latest apply to this start only, and are not written to config.yaml.
    """
    out_dir = Path(cfg["out_dir"])
    kept = dict(explicit)
    if kept.get("resume") in ("never", "latest"):
        del kept["resume"]
    log.write_atomic(out_dir / "config.yaml", configs.dump(kept))
    checkpoint.save_code(out_dir, state.step)


# --------------------------------------------------------------------------------------------------
# the loop

# SLURM can send SIGUSR1 before it kills; a terminal that is closed sends SIGHUP
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
STOP_FILE = 1000              # out_dir/STOP, in run.received and run.stop_signal


@contextlib.contextmanager
def record_signals(received):
    """Signals do not end the enclosed code; their numbers are appended to `received`.

    One that is ignored stays so: nohup ignores SIGHUP.
    """
    previous = {}
    for number in [n for n in SIGNALS if signal.getsignal(n) != signal.SIG_IGN]:
        previous[number] = signal.signal(number, lambda n, _frame: received.append(n))
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train(run):
    """Train until the last step, max_seconds, patience, a signal, or the file out_dir/STOP.

    After a signal the step or, in an evaluation, the token is finished.
    """
    cfg = run.cfg
    state = run.state
    poll_stop(run)
    mark_best(run)                        # a resumed run may name another metric in cfg["best"]
    if is_evaluation_missing(run) and not run.stop_signal:
        evaluate(run)
        poll_signals(run)
    run.out_of_patience = shard.rank0_only(is_out_of_patience, run)
    meter = run.meter
    meter.start()

    with ThreadPoolExecutor(1) as loader:
        next_batch = loader.submit(load_step, run, state.step)
        while not run.is_complete() and not run.stop_signal:
            # take this step's micro-batches, and start to load those of the next step
            step = state.step                # the number of this step, counted from 0
            with meter.waiting("data"):
                micro_batches, info, loss_weight = next_batch.result()
            if not run.sampler.uses_feedback:
                next_batch = loader.submit(load_step, run, step + 1)

            # forward, backward, update
            lr = lr_at(step, state.total_steps, cfg)
            # Dropout and NEFTune are hashed from this, doc_id and position: the same on any layout.
            noise_seed = {"noise_seed": (cfg["seed"], step)}
            state.step += 1                  # from here on: the number of this step, from 1
            run.model.loss_scale = state.loss_scale
            with profiler(run):
                micro_batches = [to_device(mb, run.device) | noise_seed for mb in micro_batches]
                with meter.waiting("ranks"):
                    [global_loss_weight] = shard.all_reduce_sum([loss_weight])
                loss, grad_norm, is_finite, document_stats = train_step(
                    run.model, run.optimizer, micro_batches, global_loss_weight, lr, cfg)
            if run.sampler.uses_feedback:
                run.sampler.update(*gather_document_stats(document_stats))
                next_batch = loader.submit(load_step, run, step + 1)

            count_skips(run, loss, grad_norm, is_finite, document_stats)
            with meter.waiting("ranks"):
                poll_stop(run)
            meter.tokens += info["tokens"]
            if is_due(run, "log_every"):
                log_step(run, info, loss, lr, grad_norm)
                meter.start_interval()
            save_and_evaluate(run)
            meter.end_step(state.step)


def count_skips(run, loss, grad_norm, is_finite, document_stats):
    """Adjust the loss scale, and count and report a step whose loss or gradient is not finite."""
    state = run.state
    is_overflow = adjust_loss_scale(state, loss, is_finite)
    if is_finite:
        state.consecutive_skips = 0
        return
    state.skipped_steps += 1
    if is_overflow:
        run.logger.print(f"step {state.step:,}: a gradient overflows float16, so no "
                         f"update; the loss scale is now {state.loss_scale:g}")
        return
    state.consecutive_skips += 1
    report_non_finite(run, loss, grad_norm, document_stats)


def save_and_evaluate(run):
    """Do what is due after a step. Saves before an evaluation that may fail or be interrupted."""
    # after a signal, save and exit at once; the resumed run evaluates
    is_evaluating = (bool(run.validation_sets) and is_due(run, "eval_every")
                     and not run.stop_signal)
    if is_save_due(run) or (is_evaluating and run.cfg["best"]):
        save(run)
    if is_evaluating:
        with run.meter.waiting("evaluation"):            # throughput is of training
            evaluate(run)
            run.out_of_patience = shard.rank0_only(is_out_of_patience, run)
            poll_signals(run)                            # one may have arrived meanwhile


def poll_stop(run):
    """Set run.stop_signal and run.time_is_up, the same on all ranks."""
    poll_signals(run)
    max_seconds = run.cfg["max_seconds"]
    if max_seconds:
        [is_over] = shard.all_reduce_max([int(run.seconds() >= max_seconds)])
        run.time_is_up = is_over > 0


def poll_signals(run):
    """Set run.stop_signal to the number of a signal that any rank has received, or STOP_FILE."""
    [run.stop_signal] = shard.all_reduce_max([local_signal(run)])


def local_signal(run):
    """The signal that this rank has received, or STOP_FILE, or 0.

    Rank 0 looks for the file at most once a second, because a network file system may be slow.
    """
    now = time.monotonic()
    if shard.rank() == 0 and not run.received and now >= run.next_look:
        run.next_look = now + 1.0
        if stop_file(run.cfg["out_dir"]).exists():
            run.received.append(STOP_FILE)
    return max(run.received, default=0)


def stop_file(out_dir):
    """The file that a user creates to stop a run. Stopping removes it."""
    return Path(out_dir) / "STOP"


def is_due(run, key):
    """Is logging, evaluation or saving (key: log_every, ...) due after this step?

    Everything is due after the last step, even if max_seconds ended the run early.
    """
    every = run.cfg[key]
    due = every_n_steps(run.state.step, every, run.state.total_steps)
    return due or (bool(every) and run.is_complete())


def is_save_due(run):
    """Is a checkpoint due after this step? After the last one, it is if save_final is set."""
    if run.is_complete():
        return run.cfg["checkpoint"]["save_final"]
    keep_every = run.cfg["checkpoint"]["keep_every"]
    return is_due(run, "save_every") or (keep_every > 0 and run.state.step % keep_every == 0)


def saves_at_stop(cfg):
    """Is a run saved when it is stopped? Not if the config turns all checkpoints off."""
    section = cfg["checkpoint"]
    return any([cfg["save_every"], cfg["best"], section["save_final"], section["keep_every"]])


def is_evaluation_missing(run):
    """Is an evaluation due that was not logged?

    True at step 0, and if the run was killed between a save and the evaluation after it.
    """
    is_logged = shard.rank0_only(was_evaluated, run.cfg, run.state.step)
    return bool(run.validation_sets) and is_due(run, "eval_every") and not is_logged


def was_evaluated(cfg, step):
    return log.was_evaluated(log.read(cfg["out_dir"]), step)


def profiler(run):
    """A context manager: log.profile_step on rank 0 in step cfg["profile"] (counted from 1).

    In other steps and on other ranks it does nothing.
    """
    if shard.rank() == 0 and run.state.step == run.cfg["profile"]:
        path = Path(run.cfg["out_dir"]) / "trace.json"
        return log.profile_step(path, run.device, run.logger.print)
    return contextlib.nullcontext()


def report_non_finite(run, loss, grad_norm, document_stats):
    """Name the documents of a step that made no update. Too many in a row end the run."""
    step = run.state.step
    doc_ids, stats = gather_document_stats(document_stats)
    bad = doc_ids[~np.isfinite(stats["loss"])]
    which = "the loss of each document is finite"
    if len(bad):
        which = f"not finite: document {run.dataset.describe(bad)}"
    run.logger.print(f"step {step:,}: loss {float(loss):g}, gradient norm {float(grad_norm):g}, "
                     f"so no update; {which}")
    limit = run.cfg["bad_steps"]
    if limit and run.state.consecutive_skips >= limit:
        raise configs.UserError(f"bad_steps: {limit} steps in a row, up to step {step:,}, had no "
                                "finite loss and gradient; try a smaller lr or another dtype, or "
                                "look at the documents named above")


def log_step(run, info, loss, lr, grad_norm):
    """Hand the record of a step to the logger, which reads its tensors later."""
    state = run.state
    meter = run.meter
    seconds, _ = meter.interval.read()
    tokens_per_second = meter.tokens / seconds
    flops = transformer.flops(run.model, info["lengths"], info["target_tokens"])
    flops_per_second = flops / info["tokens"] * tokens_per_second
    peak = log.peak_flops(run.device, run.model.dtype)
    record = {
        "step": state.step,
        "loss": loss,
        "lr": lr,
        "grad_norm": grad_norm,
        "tokens": info["tokens"],
        "target_tokens": info["target_tokens"],
        "documents": info["documents"],
        "tok_per_s": tokens_per_second,
        "mfu": flops_per_second / (peak * shard.world_size()) if peak else None,
        "packing": info["packing"],
        "seconds": run.seconds(),
        "skipped": state.skipped_steps,
        "compiled": shard.num_graphs(),
        **run.step_metrics,
    }
    if run.model.dtype == torch.float16:
        record["loss_scale"] = run.model.loss_scale
    if run.model.cfg["n_experts"]:
        record["expert_load"] = expert_load(run.model)
    by_rank = gather_numbers([log.peak_memory(run.device), *meter.numbers()])
    measured, slow_step = log.compare_ranks(by_rank, meter.slowest)
    if slow_step:
        run.logger.print(slow_step)
    run.logger.step(record | measured)


def expert_load(model):
    """Tokens of the fullest expert of any block since the last call, divided by the mean.

    1 is perfect balance, n_experts / n_experts_per_token the worst. A tensor: the device is not
    waited for.
    """
    tokens = shard.all_reduce_(model.expert_tokens).float()                        # [L, X]
    model.expert_tokens = 0
    return (tokens / tokens.mean(1, keepdim=True)).max()


def gather_numbers(numbers):
    """A list of numbers per rank -> [[numbers of rank 0], [of rank 1], ...], in one collective."""
    n = len(numbers)
    rank = shard.rank()
    table = [0.0] * (shard.world_size() * n)
    table[rank * n:(rank + 1) * n] = numbers
    table = shard.all_reduce_sum(table)
    return [table[start:start + n] for start in range(0, len(table), n)]


def save(run):
    """Copy the state to host memory and start to write it to disk; return after the copy.

    Raises RuntimeError if replicas differ (shard.check_replicas).
    """
    shard.check_replicas(run.model)
    # write the pending record first: a run resumed from this checkpoint does not repeat its step
    run.logger.flush()
    run.state.seconds = run.seconds()
    with run.meter.waiting("save"):
        run.saver.save(run.model, run.optimizer, run.sampler.state_dict(),
                       dataclasses.asdict(run.state))
    run.saved_step = run.state.step


# --------------------------------------------------------------------------------------------------
# the end of a run

def finish_saving(run):
    """Write the last checkpoint. After a signal, exit with status 128 + signal; after STOP with 0.

    Raises UserError if the last save failed.
    """
    step = run.state.step
    run.state.seconds = run.seconds()
    written = run.saver.wait()                           # False if the last save failed on any rank
    is_wanted = run.cfg["checkpoint"]["save_final"] if run.is_complete() else saves_at_stop(run.cfg)
    if is_wanted and (not written or run.saved_step < step):
        save(run)                      # retries a failed save too: the disk may have space by now
        written = run.saver.wait()
    poll_signals(run)                  # one may have arrived during the save
    if run.stop_signal:
        saved = "saved" if written and run.saved_step == step else "not saved"
        resumes = "resumes from the newest checkpoint" if saves_at_stop(run.cfg) else "starts over"
        run.logger.print(f"stopped by {stop_reason(run)} after step {step:,}, {saved}; the same "
                         f"command {resumes}")
        exit_stopped(run)
    if not written:
        raise configs.UserError(f"{run.saver.folder}: the last steps were not saved (see above); "
                                "the same command repeats them")


def stop_reason(run):
    if run.stop_signal == STOP_FILE:
        return stop_file(run.cfg["out_dir"])
    return f"signal {run.stop_signal}"


def exit_stopped(run):
    close(run, "killed")
    sys.exit(0 if run.stop_signal == STOP_FILE else 128 + run.stop_signal)


def finish(run):
    """Export the model, and print the summary."""
    cfg = run.cfg
    step = run.state.step
    if step < run.state.total_steps:
        reason = f"no new best {cfg['best']} in {cfg['patience']} evaluations"
        if run.time_is_up:
            reason = "max_seconds is reached"
        run.logger.print(f"ended after step {step:,} of {run.state.total_steps:,}: {reason}")
    if cfg["checkpoint"]["export"]:
        shard.rank0_only(export, run)
    if shard.rank() == 0:
        for line in log.final_summary(run):
            run.logger.print(line)
    close(run)


def close(run, status="finished"):
    """Close the logger, and remove out_dir/STOP, also if it was created after the last poll."""
    run.logger.close(status)
    if shard.rank() == 0:
        stop_file(run.cfg["out_dir"]).unlink(missing_ok=True)


def export(run):
    """Export the best checkpoint, or the newest, to out_dir/hf; adapters to out_dir/adapter."""
    out_dir = Path(run.cfg["out_dir"])
    best = run.saver.folder / "best"
    path = best if run.cfg["best"] and best.is_dir() else run.saver.folder / "latest"
    checkpoint.check_export_inputs(path, vars(run.state), run.cfg, run.tokenizer)
    arguments = (path, run.model.cfg, run.cfg, run.tokenizer)
    if run.cfg["shard"]["lora"]["r"]:
        checkpoint.export(*arguments, out_dir / "adapter", run.state.has_chats, is_adapter=True)
    checkpoint.export(*arguments, out_dir / "hf", run.state.has_chats)


def main(cfg, explicit):
    """One run, on every rank."""
    run = setup(cfg, explicit)
    if shard.rank() == 0:
        log.record_start(run)
        for line in log.describe_run(run):
            run.logger.print(line)
    try:
        with record_signals(run.received):
            if cfg["eval_only"]:
                evaluate_only(run)
                return
            train(run)
            finish_saving(run)
        signals = [number for number in run.received if number != STOP_FILE]
        if signals:                                      # after finish_saving() has looked
            signal.raise_signal(signals[0])
        finish(run)
    except Exception:
        run.saver.wait()                  # an error must not cut off a checkpoint being written
        run.logger.close("failed")
        raise


def evaluate_only(run):
    """One evaluation, and its results."""
    evaluate(run)
    if run.stop_signal:
        run.logger.print(f"stopped by {stop_reason(run)}; the evaluation is not recorded")
        exit_stopped(run)
    out_dir = Path(run.cfg["out_dir"])
    for line in log.format_answers(run.answers, run.cfg["samples"]):
        run.logger.print(line)
    answers = f", the answers in {out_dir / 'evaluations.jsonl'}" if run.answers else ""
    run.logger.print(f"step {run.state.step:,} evaluated; the record is in "
                     f"{out_dir / 'metrics.jsonl'}{answers}")
    close(run)


def cli(argv=None):
    """Run the command line. experiments/*.py call this after they have changed something."""
    argv = sys.argv[1:] if argv is None else argv
    configs.exit_with_help(__doc__, argv)
    configs.check_launch()
    cfg, _, explicit = configs.load_or_exit(argv)
    shard.run_distributed(main, cfg, explicit)


if __name__ == "__main__":
    cli()
