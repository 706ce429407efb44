"""The loop: pretraining and fine-tuning of language models, on one device or many.

    torchrun train.py configs/ft.yaml lr=1e-4                        fine-tune the embedded base on the embedded chats
    torchrun --nproc_per_node 2 train.py configs/ft.yaml lr=1e-4 out_dir=out/two     the same run on two devices
    torchrun train.py configs/pretrain.yaml                          train from scratch on text
    torchrun train.py configs/ft.yaml shard.lora.r=8 lr=3e-3 out_dir=out/lora        adapters only
    python train.py configs/ft.yaml device=cpu dtype=float32 out_dir=out/cpu     a laptop without torchrun

The loss of a step is

    sum of weight * nll over the target tokens of all its documents  /  the sum of those weights

Both sums are over the whole step. Nothing is averaged per row, per document or per rank first: an average of averages
weights a token by the company it happens to be in. So every row's summed loss is divided by the step's total weight,
known beforehand from the token files, and its gradient added to what is there: how a step is cut into rows, and rows
are dealt to ranks, changes rounding, and nothing else.
"""
import sys

import configs

if __name__ == "__main__":
    CONFIG = configs.load_or_exit(sys.argv[1:])      # before torch: a wrong key costs a moment, not a start-up

import os

os.environ.setdefault("GOMP_SPINCOUNT", "5000")      # waiting threads soon sleep: 10 times faster beside a busy process

import collections, concurrent.futures, contextlib, math, platform, re, signal, time
from pathlib import Path

import numpy as np
import torch

import checkpoint, log, model as transformer, sampler, shard, tokenize_data


# ---------------------------------------------------------------------------------------------------------------------
# schedules: step (from 0) -> learning rate

def constant(done, lr, least):
    return lr


def linear(done, lr, least):
    return lr + (least - lr) * done


def cosine(done, lr, least):
    """arXiv:1608.03983"""
    return least + (lr - least) * (1 + math.cos(math.pi * done)) / 2


SCHEDULES = {"constant": constant, "linear": linear, "cosine": cosine, "wsd": linear}    # wsd: at the end only


def lr_at(step, total, cfg):
    """The learning rate of the update that step makes: warm-up, then the schedule. The first is not 0, the last min_lr.

    Warm-up, stable, decay (wsd, arXiv:2404.06395) keeps lr until its last `decay` steps, so that the steps before don't
    depend on how long the run is.
    """
    warmup = min(count(cfg["warmup"], total), total)
    start = max(warmup, total - count(cfg["decay"], total)) if cfg["schedule"] == "wsd" else warmup
    if step < warmup:
        return cfg["lr"] * (step + 1) / warmup
    done = max(0, step + 1 - start) / max(1, total - start)    # of the schedule, 1 at the last step
    return SCHEDULES[cfg["schedule"]](done, cfg["lr"], cfg["min_lr"])


def count(value, total):
    """A count, or a fraction of `total` -> a count; a fraction above 0 is at least 1."""
    return value if type(value) is int else max(1, round(value * total)) if value else 0


def due(step, every, total):
    """Is it time, after `step` steps? At the start and the end always, unless every is 0. 0.25: four times a run."""
    period = every if type(every) is int else every * total
    times = lambda n: math.floor(n / period + 1e-9)            # up to step n; 1e-9: 0.1 * 30 is a little more than 3
    return bool(period) and (times(step) > times(step - 1) or step == total)


# ---------------------------------------------------------------------------------------------------------------------
# the optimizer

class AdamW:
    """arXiv:1711.05101, in one kernel over all tensors. To make torch's own class takes as long as to import torch.

    Used as theirs is: param_groups, state, step(), zero_grad(). Moments lie over ranks as their parameters do; each
    rank's step is that of its own rows.
    """

    def __init__(self, groups):
        self.param_groups, self.state = groups, collections.defaultdict(dict)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p] |= {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                                      "exp_avg_sq": torch.zeros_like(p)}
            params = [p for p in params if len(shard.part(p)[0])]    # of some a rank may have no row
            mine = lambda tensors: [shard.part(t)[0] for t in tensors]
            moment = lambda key: mine(self.state[p][key] for p in params)
            steps = [self.state[p]["step"] for p in params]
            if params:
                torch._foreach_add_(steps, 1)
                torch._fused_adamw_(mine(params), mine(p.grad for p in params), moment("exp_avg"), moment("exp_avg_sq"),
                                    [], steps, lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1],
                                    eps=group["eps"], weight_decay=group["weight_decay"], amsgrad=False, maximize=False)

    def zero_grad(self, set_to_none=True):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            p.grad = None if set_to_none else p.grad.zero_()


def adamw(groups, cfg):
    return AdamW(groups)


def sgd(groups, cfg):
    """Stochastic gradient descent with Nesterov's momentum, as deep learning writes it (Sutskever et al. 2013)."""
    return torch.optim.SGD(groups, lr=cfg["lr"], momentum=cfg["momentum"], nesterov=cfg["momentum"] > 0)


def orthogonal(g):
    """A matrix -> about U V^T of its U S V^T, by five rounds of a polynomial on its singular values, in bf16."""
    x = g.bfloat16() if g.shape[0] <= g.shape[1] else g.bfloat16().T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        xx = x @ x.T
        x = torch.addmm(x, torch.addmm(xx, xx, xx, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.to(g.dtype) if g.shape[0] <= g.shape[1] else x.T.to(g.dtype)


class Muon(AdamW):
    """Matrices of the blocks move along their momentum's nearest orthogonal matrix, the rest by AdamW.

    https://kellerjordan.github.io/posts/muon; steps as large as AdamW's (arXiv:2502.16982), so that one lr serves both.
    What is several matrices in one (q, k and v; gate and up) is taken apart: group["parts"] has the rows of each. A
    matrix that lies over ranks is gathered, and every rank takes the same step with its own rows.
    """
    @torch.no_grad()
    def step(self):
        done = []
        for group in self.param_groups:
            for p, rows in zip(group["params"], group["parts"]):
                if rows:
                    self.turn(p, rows, group)
                    done.append((p, p.grad))
                    p.grad = None                                    # AdamW passes over what has none
        super().step()
        for p, grad in done:
            p.grad = grad

    def turn(self, p, rows, group):
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(p.grad, 1 - group["momentum"])
        whole = shard.whole(torch.lerp(p.grad, state["momentum"], group["momentum"]))
        moves = [orthogonal(part) * 0.2 * math.sqrt(max(part.shape)) for part in whole.split(rows)]
        mine, start, end = shard.part(p)
        mine.mul_(1 - group["lr"] * group["weight_decay"]).sub_(torch.cat(moves)[start:end], alpha=group["lr"])


def muon(groups, cfg):
    return Muon(groups)


OPTIMIZERS = {"adamw": adamw, "muon": muon, "sgd": sgd}
HYPERPARAMETERS = ("lr", "betas", "eps", "momentum")                # each group's own; lr is set anew for every step


def make_optimizer(model, cfg):
    """Groups of parameters, by cfg["groups"] and by their dimensions: matrices decay, vectors (norms, biases) don't.

    A group has, besides its parameters, the factor `scale` of the learning rate, and `parts`: the rows of each matrix
    of the blocks, [] for all else. Raises ValueError for a pattern that no parameter's name matches.
    """
    groups, used = {}, set()
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        said = next((said for said in cfg["groups"] if re.search(said["match"], name)), {"match": None})
        used.add(said["match"])
        decay = said.get("weight_decay", cfg["weight_decay"] if p.dim() >= 2 else 0.0)
        group = groups.setdefault((said.get("lr", 1.0), decay), {"params": [], "parts": []})
        group["params"].append(p)
        group["parts"].append(transformer.matrix_rows(name, p, model.cfg))
    if idle := [said["match"] for said in cfg["groups"] if said["match"] not in used]:
        raise ValueError(f"groups: {idle[0]} matches the name of nothing that is trained, or others match it before")
    groups = [group | {"scale": scale, "weight_decay": decay} | {key: cfg[key] for key in HYPERPARAMETERS}
              for (scale, decay), group in groups.items()]
    if cfg["optimizer"] == "muon" and not any(rows for group in groups for rows in group["parts"]):
        raise ValueError("optimizer: muon turns the matrices of the blocks, and none is trained; optimizer=adamw")
    return OPTIMIZERS[cfg["optimizer"]](groups, cfg)


# ---------------------------------------------------------------------------------------------------------------------
# the step

def gradient(model, rows, weight):
    """The step's gradient, left in .grad: the sum over all rows of all ranks, and no mean. -> (loss, by document)

    rows    this rank's rows of the step (model.py says what one is), as many as every other rank has
    weight  the summed weight of the targets of all rows of all ranks, known to each

    A row's loss is divided by the whole step's weight before its backward pass, so what comes after are sums: autograd
    adds a row's gradient to what is in .grad, and ranks are added behind the last row. To put rows and ranks together
    in another way, replace this function; the README has one that does. By document: [(doc_ids, losses)] of the rows.
    """
    loss, documents = torch.zeros((), device=model.embed.weight.device), []
    for n, row in enumerate(rows, 1):
        shard.before_row(model, last=n == len(rows))                 # a model in parts adds up ranks as it goes back
        loss_sum, _, losses = model(row)
        (loss_sum / weight).backward()
        loss += loss_sum.detach() / weight
        documents.append((row["doc_ids"], losses))
    shard.sum_gradients(model)
    return shard.add_up(loss), documents


def train_step(model, optimizer, rows, weight, lr, grad_clip):
    """Forward, backward, clip, update. -> (loss, the gradient's norm before clipping, are both finite?, by document)

    Where they are not there is no update. To know is the one time in a step that the device is waited for.
    """
    loss, documents = gradient(model, rows, weight)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    norm = shard.whole(torch.nn.utils.get_total_norm([p.grad for p in params]))
    length = float(norm + 0 * loss)                                  # not a finite one where either isn't
    if finite := math.isfinite(length):
        if grad_clip and length > grad_clip:
            torch.nn.utils.clip_grads_with_norm_(params, grad_clip, norm)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        optimizer.step()
    optimizer.zero_grad(set_to_none=model.gradient is None)          # views of one tensor stay where they are
    return loss, norm, finite, documents


def by_document(documents):
    """What gradient() gives by document, of all ranks -> (indices, summed losses), as lists."""
    mine = [(ids.tolist(), losses.tolist()) for ids, losses in documents]
    every = [row for rows in shard.gathered(mine) for row in rows]
    return [i for ids, _ in every for i in ids], [x for _, losses in every for x in losses]


def as_tensors(row, device):
    """A row of numpy arrays -> of tensors, in memory that a GPU can copy from while it computes."""
    out = {key: torch.from_numpy(value) for key, value in row.items() if isinstance(value, np.ndarray)}
    if device.type == "cuda":
        with torch.cuda.device(device):                        # a thread of its own would wake the first GPU
            out = {key: t.pin_memory() for key, t in out.items()}
    return out | {"max_len": row["max_seqlen"]}


def to_device(row, device):
    return {key: t.to(device, non_blocking=True) if torch.is_tensor(t) else t for key, t in row.items()}


# ---------------------------------------------------------------------------------------------------------------------
# evaluation

def by_label(cfg, sources):
    """{name: Tokens} of validation -> {label: [Tokens]}; a part held out of a training source has that one's label."""
    out = {}
    for name, tokens in sources.items():
        kind = "validation" if name in cfg["data"]["validation"] else "train"
        out.setdefault(cfg["data"][kind][name]["label"] or name, []).append(tokens)
    return out


def validation_loss(model, sources, cfg, device):
    """Sum of weight * nll over all targets of the sources, divided by their weight: as in training."""
    total = weight = 0.0
    n, pad_to = sum(map(len, sources)), shard.row_multiple(device, model.dtype, cfg["micro_tokens"])
    for start in range(0, n, 1024):                            # documents packed together
        documents = np.arange(start, min(start + 1024, n))
        rows, info = sampler.rows_of(documents, cfg, sources, shard.ranks(), shard.rank(), pad_to)
        for row in rows:
            total += model(to_device(as_tensors(row, device), device))[0].double()
        weight += info["weight"]
    return shard.summed([float(total)])[0] / weight


def questions(sources, stop, most, room):
    """The first chats, at most `most`, that end in a whole answer and whose prompts are shorter than `room` tokens.

    -> [(prompt's ids, answer's ids without its end)]
    """
    out = []
    for tokens in sources:
        for i in range(len(tokens) if tokens.header["chats"] else 0):
            if len(out) == most:
                return out
            ids, mask = tokens.document(i)
            untrained, trained = np.flatnonzero(mask == 0), np.flatnonzero(mask)
            start = untrained[untrained < trained[-1]].max(initial=-1) + 1    # where the last trained span begins
            answer = ids[start:trained[-1] + 1].tolist()
            if 0 < start < room and answer[-1] in stop:
                out.append((ids[:start].tolist(), answer[:-1]))
    return out


def ask(model, asked, stop, cfg, tok):
    """[(prompt, reference)] as ids -> [(prompt, answer, reference)] as texts; answers are greedy. Ranks share the work.

    A model in parts is run by all its ranks at once: they ask equally many times and go on while anyone's answer does.
    """
    out, rank, ranks = [], shard.rank(), shard.ranks()
    going = any if model.gradient is not None else lambda alive: shard.largest(int(any(alive)))
    for start in range(0, len(asked), 64 * ranks):
        part = asked[start:start + 64 * ranks]
        mine = part[rank::ranks]
        prompts = [prompt for prompt, _ in mine] or [asked[0][0]]    # asked along with the others, and not counted
        answers = transformer.generate_all(model, prompts, cfg["eval_tokens"], stop, going=going)
        texts = [tuple(map(tok.decode, (prompt, ids, reference))) for (prompt, reference), ids in zip(mine, answers)]
        shares = shard.gathered(texts)
        out += [shares[i % ranks][i // ranks] for i in range(len(part))]
    return out


@torch.no_grad()
def evaluate(model, labels, asked, stop, cfg, tok, device):
    """-> ({"val/LABEL/loss", "val/LABEL/exact_match"}, {label: [(prompt, answer, reference)]})"""
    record, texts = {}, {}
    for label, sources in labels.items():
        record[f"val/{label}/loss"] = validation_loss(model, sources, cfg, device)
        if asked[label]:
            texts[label] = ask(model, asked[label], stop, cfg, tok)
            right = sum(reply.strip() == reference.strip() for _, reply, reference in texts[label])
            record[f"val/{label}/exact_match"] = right / len(texts[label])
    shard.settle(model)
    return record, texts


# ---------------------------------------------------------------------------------------------------------------------
# what a run starts from

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}    # dense bf16, NVIDIA's data sheets; no MFU on any other


def peak_flops(device, dtype):
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name and "PCIe" not in name), None)


def memory(device):
    """Most bytes held so far: by the device's allocator, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def where_to_start(cfg):
    """resume -> the checkpoint to go on from, or None. Raises ValueError where that would mix two runs, or lose one."""
    out, resume = Path(cfg["out_dir"]), cfg["resume"]
    checkpoint.need_folder(out, "out_dir")
    named = None if resume in ("auto", "never") else Path(resume)
    if resume == "never" and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        resume = "auto"                                        # torchrun starts again the run that wrote what is there
    if named:
        there = checkpoint.read_state(named)["dtype"]
        odd = [] if cfg["dtype"] in ("auto", there) else [f"dtype: {there} there, {cfg['dtype']} here"]
        odd += [d for d in checkpoint.differences(named.resolve().parents[1], cfg) if d.startswith("optimizer:")]
        if odd:
            raise ValueError(f"resume: {named} does not fit ({'; '.join(odd)}); model.init_from starts from the "
                             "weights that its run has exported")
    if not (out / "config.yaml").is_file():
        return named
    if resume == "never":
        raise ValueError(f"out_dir: {out} holds a run that resume=never would overwrite; out_dir=NEW, or delete {out}")
    if different := checkpoint.differences(out, cfg):
        raise ValueError(f"out_dir: {out} holds a different run ({'; '.join(different)}); out_dir=NEW starts another, "
                         f"with model.init_from={out}/hf from its weights; the old keys go on with it; deleting {out} "
                         "gives it up")
    whole = checkpoint.found(out)
    if named and (not whole or out.resolve() in named.resolve().parents):
        return named                                           # else this run began there, and has gone on since
    return whole[-1] if whole else None


def choose_dtype(cfg, start_from):
    """What is chosen by looking at a machine is chosen once: by the rank, and at the start, that came first."""
    return checkpoint.read_state(start_from)["dtype"] if start_from else str(shard.pick_device(cfg)[1]).split(".")[1]


def find_weights(cfg, tok):
    """-> (complete model section, read() of its weights). Raises ValueError where tokenizer or lengths don't fit."""
    m, seq_len = transformer.resolve_vocab_size(cfg["model"], tok.n_vocab), cfg["data"]["seq_len"]
    if tok.n_vocab > m["vocab_size"]:
        raise ValueError(f"model.vocab_size: {m['vocab_size']} rows are too few for the tokenizer's {tok.n_vocab} ids; "
                         "another data.tokenizer, or a model made for it")
    if m["positions"] == "learned" and seq_len > m["max_len"]:
        raise ValueError(f"data.seq_len: {seq_len} is more than the {m['max_len']} positions the model has learned "
                         f"(model.max_len); data.seq_len={m['max_len']}")
    transformer.hf_weight_names(transformer.build_on_meta(m), m)        # a model that could not be exported ends here
    read = transformer.pretrained_reader(m["init_from"], m) if m["init_from"] else transformer.init_reader(m, cfg["seed"])
    return m, read


def length_of_run(cfg, data):
    """-> (steps in an epoch, steps in all). Raises ValueError where rows are too short or nothing says when to end."""
    epoch = sampler.steps_per_epoch(cfg, {name: len(t) for name, t in data["train"].items()})
    longest = max(t.header["longest"] for group in data.values() for t in group.values()) - 1    # inputs of a document
    if longest > cfg["micro_tokens"]:
        raise ValueError(f"micro_tokens: {cfg['micro_tokens']} is less than the longest document's {longest} tokens; "
                         f"micro_tokens={longest}, or data.seq_len={cfg['micro_tokens']}")
    limits = [n for n in (cfg["max_steps"], math.ceil(cfg["epochs"] * epoch)) if n]
    if not limits:
        raise ValueError("max_steps: neither it nor epochs says when to end")
    return epoch, min(limits)


def check_best(cfg, asked):
    """Raises ValueError where `best` names what no evaluation of this run logs. asked: {label: its questions}"""
    numbers = ["loss", "grad_norm"] * (cfg["log_every"] > 0) + [f"val/{label}/loss" for label in asked]
    numbers += [f"val/{label}/exact_match" for label in asked if asked[label]]
    evaluated = asked and cfg["eval_every"]
    if cfg["best"] and (cfg["best"].removeprefix("max ") not in numbers or not evaluated):
        raise ValueError(f"best: {cfg['best']} is no number that is logged when this run is evaluated: "
                         f"{', '.join(numbers) if evaluated else 'nothing is'}")


def introduce(cfg, model, data, epoch, total, device):
    """What is about to be done, as arithmetic -> lines."""
    train, batch, lora, ranks = data["train"], cfg["batch_size"], cfg["shard"]["lora"]["r"], shard.ranks()
    lines = [f"data      {tokenize_data.summary(f'{kind}.{name}', tokens)}"
             for kind, sources in data.items() for name, tokens in sources.items()]
    every = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    new = model.cfg["vocab_size"] - (cfg["model"]["vocab_size"] or model.cfg["vocab_size"])
    lines.append(f"model     {model.cfg['family']} {model.cfg['n_layers']} x {model.cfg['d_model']}, {every:,} parameters, "
                 f"{trained:,} trained{f' (LoRA of rank {lora})' if lora else ''}, "
                 f"from {model.cfg['init_from'] or 'scratch'}{f', with {new:,} new tokens' if new else ''}")
    documents = int(sampler.quotas(cfg, {name: len(t) for name, t in train.items()})[2].sum())
    inputs = sum(int(t.offsets[-1] - t.offsets[0]) - len(t) for t in train.values())
    mean = inputs / sum(map(len, train.values()))
    rows = math.ceil(batch * mean / cfg["micro_tokens"] / ranks)
    lines.append(f"step      {batch} documents x {mean:,.0f} tokens = {batch * mean:,.0f} tokens, "
                 f"in {rows} row{'s' * (rows > 1)} of at most {cfg['micro_tokens']:,}{' on each rank' * (ranks > 1)}")
    lines.append(f"run       {documents:,} documents / {batch} = {epoch:,} steps an epoch; {total:,} steps = "
                 f"{total / epoch:.2f} epochs = {total * batch * mean:,.0f} tokens")
    threads = torch.get_num_threads()
    cpu = f"cpu, {threads} thread{'s' * (threads > 1)}"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    if ranks > 1:
        replicate, shards = shard.mesh_sizes(cfg, ranks)
        where = f"{ranks} ranks (replicate {replicate} x shard {shards}), each {where}"
    again = ", blocks computed again in the backward pass" if model.recompute else ""
    dtype = str(model.dtype).removeprefix("torch.")
    lines.append(f"device    {where}, computing in {dtype}, masters in float32{again}")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# the run

def main(cfg, source=None, explicit=None):
    """One run, from cfg to OUT_DIR, on every rank. Raises ValueError for what the user can mend."""
    rank, ranks = shard.rank(), shard.ranks()
    for key, known in (("schedule", SCHEDULES), ("optimizer", OPTIMIZERS)):
        if cfg[key] not in known:
            raise ValueError(f"{key}: {cfg[key]} is none of {', '.join(known)}")
    tokenize_data.require_train_data(cfg)
    shard.mesh_sizes(cfg, ranks)
    shard.set_threads()
    out, start_from = Path(cfg["out_dir"]), shard.on_first(where_to_start, cfg)
    tok = tokenize_data.load_tokenizer(cfg)
    data = shard.in_turn(tokenize_data.load_datasets, cfg, tok, rank > 0, doing="tokenizing")
    epoch, total = length_of_run(cfg, data)

    m, read = find_weights(cfg, tok)
    cfg = cfg | {"dtype": shard.on_first(choose_dtype, cfg, start_from)}
    model = shard.prepare(transformer.build_on_meta(m), m, cfg, read)
    device, optimizer, step, before = model.embed.weight.device, make_optimizer(model, cfg), 0, 0.0
    seen = sampler.Seen(cfg, data["train"]) if cfg["sampler"]["order"] == "feedback" else None
    if start_from:
        saved, more = checkpoint.restore(start_from, model, optimizer)
        step, before = saved["step"], saved["seconds"]
        if seen and more:
            seen.load({name: tensor.numpy() for name, tensor in more.items()})
    skipped, in_a_row = (saved["skipped"], saved["in_a_row"]) if start_from else (0, 0)    # without an update

    report = log.Log(cfg, total, step, before) if rank == 0 else log.Silent()
    if rank == 0:
        asks = explicit or {}                                  # "never" has been said; from now on the folder goes on
        log.replace(out / "config.yaml", configs.dump({key: asks[key] for key in asks if asks[key] != "never"}))
    saver = checkpoint.Saver(out, cfg["checkpoint"]["keep"], report.say)
    chats = any(t.header["chats"] for group in data.values() for t in group.values())
    state = {"dtype": str(model.dtype).removeprefix("torch."), "total_steps": total, "config": explicit or {},
             "data": {name: t.header["fingerprints"] for name, t in data["train"].items()}, "chats": chats,
             "versions": {"torch": torch.__version__, "python": platform.python_version()}}
    for line in introduce(cfg, model, data, epoch, total, device):
        report.say(line)
    if start_from:
        report.say(f"resume    {start_from}: {step:,} of {total:,} steps are done")
        if touched := [name for name in state["data"] if saved["data"].get(name) != state["data"][name]]:
            report.say(f"note      data.train.{touched[0]} has changed since: other documents may follow")

    labels, stop = by_label(cfg, data["validation"]), []
    if chats:
        stop = tokenize_data.stop_token_ids(tok, tokenize_data.load_template(tok, cfg))
    asked = {label: questions(group, stop, cfg["eval_prompts"], m["max_len"]) for label, group in labels.items()}
    texts = {}                                                 # of the last evaluation, by label
    check_best(cfg, asked)

    def mark_best():
        if cfg["best"] and rank == 0:
            saver.wait()
            checkpoint.mark(out, standing(log.read(out), cfg["best"])[0])

    def validate():
        record, found = evaluate(model, labels, asked, stop, cfg, tok, device)
        report.validation({"step": step} | record)
        texts.update(found)
        mark_best()

    mark_best()                                                # `best` may be new, or a run ended before it got here

    ended = []                                                 # a signal asks for an end: finish the step, save, exit
    handlers = {s: signal.signal(s, lambda number, _: ended.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    peak, clock = (peak_flops(device, model.dtype) or 0) * ranks, time.perf_counter()
    seconds = lambda: before + time.perf_counter() - clock
    since, tokens, on_disk = seconds(), 0, step                # since, tokens: of the last logged step
    waited = {"data_wait": 0.0, "save_wait": 0.0}              # seconds since then in which nothing was computed

    def asked_to_end(timed=True):
        """0, TIME_IS_UP or a signal's number, the same on all ranks."""
        return shard.largest(max(ended, default=int(timed and seconds() >= (cfg["max_seconds"] or math.inf))))

    def stale():
        """Has nothing become better for long? On rank 0 alone."""
        return bool(cfg["patience"]) and standing(log.read(out), cfg["best"])[1] >= cfg["patience"]

    def save():
        report.flush()                                         # a step that is saved is logged
        start = time.perf_counter()
        more = {name: torch.from_numpy(array) for name, array in seen.state().items()} if seen else {}
        now = {"seconds": seconds(), "skipped": skipped, "in_a_row": in_a_row}
        saver.save(step, model, optimizer, more, state | now)
        waited["save_wait"] += time.perf_counter() - start
        return step

    multiple = shard.row_multiple(device, model.dtype, cfg["micro_tokens"])

    def lay_out(step):
        """A step's rows and what they hold, on the host. Nothing behind the last step."""
        if step < total:
            rows, info = sampler.step_rows(step, cfg, data["train"], ranks, rank, multiple, seen)
            return [as_tensors(row, device) for row in rows], info

    end = asked_to_end()
    over = step >= total or end == TIME_IS_UP
    known = lambda: any(r["step"] == step for r in log.read(out) if evaluated(r))
    if labels and not shard.on_first(known) and (due(step, cfg["eval_every"], total) or over and cfg["eval_every"]):
        validate()                                             # at the start; or a run ended before it got here
    over = over or shard.on_first(stale)
    with concurrent.futures.ThreadPoolExecutor(1) as ahead:    # the next step's rows are laid out beside this step
        coming = ahead.submit(lay_out, step)
        while not over and not end:
            start = time.perf_counter()
            rows, info = coming.result()
            waited["data_wait"] += time.perf_counter() - start
            if seen:
                seen.take_in()
            coming, lr = ahead.submit(lay_out, step + 1), lr_at(step, total, cfg)
            noise = {"noise": (cfg["seed"], step)}             # of dropout and NEFTune; evaluation has none
            step += 1
            look = rank == 0 and step == cfg["profile"]
            with log.profiled(out / "trace.json", device, report.say) if look else contextlib.nullcontext():
                rows = [to_device(row, device) | noise for row in rows]
                loss, norm, finite, losses = train_step(model, optimizer, rows, info["weight"], lr, cfg["grad_clip"])
            if seen:
                seen.tell(*by_document(losses))
            skipped, in_a_row = (skipped, 0) if finite else (skipped + 1, in_a_row + 1)
            if not finite:
                strange = [i for i, loss_sum in zip(*by_document(losses)) if not math.isfinite(loss_sum)]
                report.say(f"step {step:,}: loss {float(loss):g}, gradient norm {float(norm):g}, so no update; "
                           f"{named(strange, data['train'])}")
            if cfg["bad_steps"] and in_a_row >= cfg["bad_steps"]:
                report.close()
                saver.wait()
                raise ValueError(f"bad_steps: {in_a_row} steps in a row, up to {step:,}, without a finite loss and "
                                 "gradient; a smaller lr or another dtype, or look at the documents named above")
            end = asked_to_end()
            over = step == total or end == TIME_IS_UP          # the run's last step, however it came to be

            tokens += info["tokens"]
            if due(step, cfg["log_every"], total) or over and cfg["log_every"]:
                now = seconds()
                speed = tokens / (now - since)
                used = transformer.flops(model, info["lengths"], info["target_tokens"]) / info["tokens"] * speed
                report.step({"step": step, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": info["tokens"],
                             "target_tokens": info["target_tokens"], "documents": info["documents"], "tok_per_s": speed,
                             "mfu": used / peak if peak else None, "packing": info["packing"], "memory": memory(device),
                             "seconds": now, "skipped": skipped, "compiled": shard.graphs()}
                            | {what: t / (now - since) for what, t in waited.items()})
                since, tokens, waited = now, 0, dict.fromkeys(waited, 0.0)
            evaluating = labels and (due(step, cfg["eval_every"], total) or over and cfg["eval_every"])
            if due(step, cfg["save_every"], total) or over or evaluating and cfg["best"]:
                on_disk = save()
            if evaluating:
                validate()
                over = over or shard.on_first(stale)
                since, tokens, waited = seconds(), 0, dict.fromkeys(waited, 0.0)    # speed is training's
                end = max(end, asked_to_end(timed=False))
    end = max(end, asked_to_end(timed=False))
    if not saver.wait() or end > TIME_IS_UP and on_disk < step:    # a full disk may have been emptied
        save()
    written = saver.wait()
    for s, handler in handlers.items():
        signal.signal(s, handler)
    if end > TIME_IS_UP:
        report.say(f"stopped by signal {end} after step {step:,}, {'saved' if written else 'not saved'}; "
                   "the same command goes on from the newest checkpoint")
        report.close()
        sys.exit(128 + end)
    if step < total:
        why = "max_seconds are over" if end else f"nothing better in {cfg['best']} for {cfg['patience']} evaluations"
        report.say(f"ended after step {step:,} of {total:,}: {why}")

    if not written:
        report.close()
        raise ValueError(f"{saver.folder}: the last steps were not saved, see above; the same command does them again")
    if cfg["checkpoint"]["export"]:
        adapter = out / "adapter" if cfg["shard"]["lora"]["r"] else None
        folder = saver.folder / ("best" if (saver.folder / "best").is_dir() and cfg["best"] else "latest")
        shard.on_first(checkpoint.export, folder, m, cfg, tok, out / "hf", chats, adapter)
    if rank == 0:
        for line in outcome(cfg, step, texts):
            report.say(line)
    report.close()


TIME_IS_UP = 1                                                 # no signal that is handled here


def evaluated(record):
    return any(key.startswith("val/") for key in record)


def standing(records, best):
    """Records, and the number that says which is best -> (steps, the best first; evaluations since the best of them).

    best  val/LABEL/loss, say: the least; or max val/LABEL/exact_match: the largest. Of equals, the first
    """
    way, _, key = best.rpartition(" ")
    records = [r for r in records if r["step"]]
    figures = [(-r[key] if way == "max" else r[key], r["step"]) for r in records if r.get(key) is not None]
    steps = [step for _, step in sorted(figures)]
    return steps, len({r["step"] for r in records if evaluated(r) and steps and r["step"] > steps[0]})


def named(documents, sources):
    """Indices through all sources -> text for people."""
    out = []
    for index in documents[:8]:
        for name, tokens in sources.items():
            if index < len(tokens):
                out.append(f"{name} {index}")
                break
            index -= len(tokens)
    more = f" and {len(documents) - 8} more" if len(documents) > 8 else ""
    return f"not finite: document {', '.join(out)}{more}" if out else "each document's own loss is finite"


def outcome(cfg, total, texts):
    """What the run has come to, from its last answers and its records -> lines."""
    records, lines = log.read(cfg["out_dir"]), [""]
    for prompt, reply, reference in (text for group in texts.values() for text in group[:cfg["samples"]]):
        right = reply.strip() == reference.strip()
        lines += [f"{prompt}{reply}", f"    {'as expected' if right else f'expected: {reference}'}", ""]
    for key in sorted({key for r in records for key in r if key.startswith("val/")}):
        figures = [r[key] for r in records if r.get(key) is not None]
        lines += [f"{key.removeprefix('val/'):<24} {figures[0]:.3f} -> {figures[-1]:.3f}"] if figures else []
    seconds = next((r["seconds"] for r in reversed(records) if r.get("seconds")), 0)
    lines.append(f"{total:,} steps in {log.clock(seconds)}; all is in {cfg['out_dir']}")
    if cfg["checkpoint"]["export"]:
        lines.append(f'talk to it: python model.py {cfg["out_dir"]} "..."')
    return lines


if __name__ == "__main__":
    shard.together(main, *CONFIG)
