"""One decoder-only transformer, described by the config's model section: GPT-2, Llama and their kin.

    python model.py data/base                       a summary: shapes, parameters, FLOPs per token, bytes
    python model.py out/ft "What is 12 + 30?"       talk to what was trained

Shapes, in all seven files:

    T tokens in a row (several documents, one behind the other)     D documents in a row      B prompts
    C width    H heads    K heads of keys and values    E width of a head    F width inside the MLP
    V vocabulary    L blocks    N trained tokens

A row is a dict of tensors; the documents in it don't see each other:

    tokens [T]  targets [T] (-100: not trained)  weights [T]  positions [T]  cu_seqlens [D+1]  max_len  doc_ids [D]

    tokens      t h e _ c a t | a _ d o g | .           cu_seqlens  0 7 12 13
    positions   0 1 2 3 4 5 6 | 0 1 2 3 4 | 0           attention, positions and targets stop at each bar

What lies behind the last document is padding, outside every document. The model knows nothing of ranks and devices'
memory: shard.py takes a finished model and changes it.
"""
import inspect, json, math, re, shutil, sys, zlib
from pathlib import Path

import configs

if __name__ == "__main__" and len(sys.argv) < 2:
    sys.exit(__doc__)

import torch
import torch.nn.functional as F
from torch import nn

IGNORED = -100                                                 # the target of a token that nobody learns to predict


# ---------------------------------------------------------------------------------------------------------------------
# layers

class Linear(nn.Linear):
    """x W^T + b, in x's dtype: masters stay in fp32, the bf16 copy lives as long as the backward pass needs it."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Norm(nn.Module):
    """RMSNorm (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450), computed in fp32, its weights rounded as all are."""

    def __init__(self, m):
        super().__init__()
        self.eps = m["norm_eps"]
        self.weight = nn.Parameter(torch.empty(m["d_model"]))
        self.bias = nn.Parameter(torch.empty(m["d_model"])) if m["norm"] == "layernorm" else None

    def forward(self, x):
        weight = self.weight.to(x.dtype).float()
        if self.bias is None:
            return F.rms_norm(x.float(), weight.shape, weight, self.eps).to(x.dtype)
        bias = self.bias.to(x.dtype).float()
        return F.layer_norm(x.float(), weight.shape, weight, bias, self.eps).to(x.dtype)


def rope_turns(positions, m):
    """[T] -> [T, 1, E/2] complex64 of length 1: what turns the pairs (x_i, x_(i + E/2)) of a head (arXiv:2104.09864).

    Angles are taken in fp64: at position 100,000 an fp32 product is off by more than bf16's own rounding.
    """
    exponents = torch.arange(0, m["head_dim"], 2, dtype=torch.float64, device=positions.device) / m["head_dim"]
    freqs = m["rope_theta"] ** -exponents                                                             # [E/2]
    scaling = m["rope_scaling"] or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "linear":
        freqs = freqs / scaling["factor"]
    elif kind == "llama3":                                     # long waves stretched, short ones kept, a ramp between
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * freqs / (2 * math.pi)   # in the first training's context
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freqs = freqs * keep + freqs / scaling["factor"] * (1 - keep)
    angles = (positions.double()[:, None] * freqs)[:, None]                                           # [T, 1, E/2]
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def rotate(x, turns):
    """x [T, H, E] turned by its positions' angles: a pair is a complex number, a turn a product.

    A pair's two numbers come out side by side. Queries and keys only meet in dot products, where order means nothing.
    """
    pairs = torch.complex(*x.float().chunk(2, -1)) * turns                                            # [T, H, E/2]
    return torch.view_as_real(pairs).flatten(-2).to(x.dtype)


ACTIVATIONS = {
    "silu": F.silu, "gelu": F.gelu, "relu": F.relu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"), "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class MLP(nn.Module):
    def __init__(self, m):
        super().__init__()
        self.glu, self.act = m["glu"], ACTIVATIONS[m["activation"]]
        wide = 2 * m["d_ff"] if m["glu"] else m["d_ff"]        # gate and up, in one matmul
        self.up = Linear(m["d_model"], wide, bias=m["mlp_bias"])
        self.down = Linear(m["d_ff"], m["d_model"], bias=m["mlp_bias"])

    def forward(self, x):                                                                             # [T, C]
        x = self.up(x)                                                                                # [T, 2F] / [T, F]
        if self.glu:
            gate, x = x.chunk(2, -1)
            return self.down(self.act(gate) * x)
        return self.down(self.act(x))


class Attention(nn.Module):
    def __init__(self, m):
        super().__init__()
        self.heads, self.kv_heads, self.width = m["n_heads"], m["n_kv_heads"], m["head_dim"]
        self.qkv = Linear(m["d_model"], (self.heads + 2 * self.kv_heads) * self.width, bias=m["qkv_bias"])
        self.out = Linear(self.heads * self.width, m["d_model"], bias=m["out_bias"])

    def forward(self, x, rope, attend):                                                               # [T, C]
        qkv = self.qkv(x).unflatten(-1, (-1, self.width))                                             # [T, H+2K, E]
        if rope is not None:
            turned = self.heads + self.kv_heads
            qkv = torch.cat([rotate(qkv[:, :turned], rope), qkv[:, turned:]], 1)
        return self.out(attend(self, qkv).flatten(1))

    def split(self, qkv, dim):
        """-> q of H heads, k and v of K heads, along `dim`"""
        return qkv.split([self.heads, self.kv_heads, self.kv_heads], dim)


class Block(nn.Module):
    def __init__(self, m):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = Norm(m), Attention(m), Norm(m), MLP(m)

    def forward(self, x, rope, attend):                                                               # [T, C]
        x = x + self.attn(self.norm1(x), rope, attend)
        return x + self.mlp(self.norm2(x))


# ---------------------------------------------------------------------------------------------------------------------
# attention, document by document: attend(layer, qkv [T, H+2K, E]) -> [T, H, E]

class Gather(torch.autograd.Function):
    """y = x[index], where each row of x is used at most once, save in places nobody reads.

    Knowing the way back (x[i] went to y[back[i]]; -1: nowhere) makes the backward pass a gather as well, instead of the
    serial scatter-add that autograd would do on a CPU.
    """
    @staticmethod
    def forward(ctx, x, index, back):
        ctx.save_for_backward(back)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        back, = ctx.saved_tensors
        dx = grad.index_select(0, back.clamp(min=0))
        return (dx if bool((back >= 0).all()) else dx * (back >= 0).view(-1, *[1] * (dx.dim() - 1))), None, None


def per_document(cu_seqlens, total, device):
    """An attend() for any device: scaled_dot_product_attention over documents of about one length at a time.

    Documents are grouped by length, each group padded to its longest ([d, len], at most a third of it padding): a few
    calls instead of one per document. Causal attention needs no mask for padding, which stands behind what looks back.

        row      a a a | b b | c c c c        groups   [4: c, a]  [2: b]
        there    5 6 7 8  0 1 2 2  3 4        which token of the row stands at each padded place
        back     4 5 6  8 9  0 1 2 3          at which padded place each token of the row stands
        used     5 6 7 8  0 1 2 -1 3 4        like `there`, with -1 for padding

    On a CPU it computes in fp32: the bf16 kernel's backward pass takes five times as long (LOG.md).
    """
    starts = cu_seqlens.tolist()
    lengths = [b - a for a, b in zip(starts, starts[1:])]
    order = sorted((d for d in range(len(lengths)) if lengths[d]), key=lambda d: -lengths[d])
    groups = []                                                # (longest, its documents)
    for d in order:
        if not groups or lengths[d] * 3 < groups[-1][0] * 2:
            groups.append((lengths[d], []))
        groups[-1][1].append(d)
    if not groups:                                             # an idle row
        return lambda layer, qkv: qkv[:, :layer.heads]
    there, back, at = [], torch.full((total,), -1), 0
    for longest, docs in groups:
        for d in docs:
            span = torch.arange(starts[d], starts[d] + longest)
            there.append(span.clamp(max=starts[d] + lengths[d] - 1))
            back[starts[d]:starts[d] + lengths[d]] = torch.arange(at, at + lengths[d])
            at += longest
    there = torch.cat(there)
    settled = len(there) == total and bool((there == torch.arange(total)).all())    # equal windows: nothing to move
    used = torch.full((len(there),), -1)
    used[back[back >= 0]] = (back >= 0).nonzero().squeeze(1)
    there, back, used = (t.to(device) for t in (there, back, used))

    def attend(layer, qkv):
        dtype, qkv = qkv.dtype, qkv if settled else Gather.apply(qkv, there, back)
        qkv = qkv.float() if qkv.device.type == "cpu" else qkv
        out, at = [], 0
        for longest, docs in groups:
            part = qkv[at:at + longest * len(docs)].unflatten(0, (-1, longest)).transpose(1, 2)       # [d,H+2K,len,E]
            at += longest * len(docs)
            q, k, v = layer.split(part, 1)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=layer.heads != layer.kv_heads)
            out.append(y.transpose(1, 2).flatten(0, 1))                                               # [d * len, H, E]
        out = torch.cat(out).to(dtype)
        return out if settled else Gather.apply(out, back.clamp(min=0), used)
    return attend


def varlen(cu_seqlens, total, max_len):
    """An attend() by the variable-length kernel, on CUDA in bf16 or fp16.

    Padding is one more document, so that what is computed for it are numbers.
    """
    from torch.nn.attention.varlen import varlen_attn
    end = torch.full_like(cu_seqlens[:1], total)
    cu_seqlens = torch.cat([cu_seqlens, end])                        # an empty last document where there is no padding
    old = "is_causal" in inspect.signature(varlen_attn).parameters    # later versions say it by a window
    causal = {"is_causal": True} if old else {"window_size": (-1, 0)}

    def attend(layer, qkv):
        q, k, v = layer.split(qkv, 1)
        if layer.heads != layer.kv_heads:                            # the argument that spares this copy came with 2.12
            k, v = (t.repeat_interleave(layer.heads // layer.kv_heads, 1) for t in (k, v))
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max(max_len, 1), max(max_len, 1), **causal)
    return attend


# ---------------------------------------------------------------------------------------------------------------------
# two things people change: how tokens become vectors, and what is minimized. A new one is a function and its name here

def plain(model, batch):
    """One row of the table for each token. -> [T, C]"""
    return F.embedding(batch["tokens"], model.embed.weight)


EMBEDDINGS = {"plain": plain}


def cross_entropy(logits, targets):
    """-log softmax(logits)[target]; logits [n, V] in fp32, targets [n] -> [n]"""
    return F.cross_entropy(logits, targets, reduction="none")


LOSSES = {"cross_entropy": cross_entropy}


class ChunkedLoss(torch.autograd.Function):
    """Head and loss over chunks of tokens, so that the logits of all of them never stand in memory at once.

    A chunk's gradient is taken right away, in the forward pass, while its logits are there; the backward pass only
    scales what was gathered (the loss is one number, so its gradient is one factor). x [N, C], head [V, C], bias None,
    targets [N], weights [N] -> (sum of weight * loss, loss per token [N], which carries no gradient).
    """
    @staticmethod
    def forward(ctx, x, head, targets, weights, loss):
        ctx.n, fill = len(x), -len(x) % 64                     # few shapes; what is filled in weighs 0
        x, targets, weights = F.pad(x, (0, 0, 0, fill)), F.pad(targets, (0, fill)), F.pad(weights, (0, fill))
        want_x, want_head = ctx.needs_input_grad[:2]
        w = head.to(x.dtype)                                                                          # [V, C]
        dx = torch.empty_like(x) if want_x else None
        dw = torch.zeros_like(head, dtype=torch.float32) if want_head else None
        losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
        step = max(64, CHUNK // len(head))
        for at in range(0, len(x), step):
            part = slice(at, at + step)
            logits = (x[part] @ w.T).float()                                                          # [n, V]
            with torch.enable_grad():
                logits.requires_grad_(want_x or want_head)
                nll = loss(logits, targets[part])
                if want_x or want_head:
                    grad, = torch.autograd.grad((nll * weights[part]).sum(), logits)
                    grad = grad.to(x.dtype)
            losses[part] = nll.detach()
            if want_x:
                dx[part] = grad @ w
            if want_head:
                dw += grad.T @ x[part]
        ctx.save_for_backward(dx, dw)
        loss_sum, losses = (losses * weights).sum(), losses[:ctx.n]
        ctx.mark_non_differentiable(losses)
        return loss_sum, losses

    @staticmethod
    def backward(ctx, grad_sum, _):
        dx, dw = ctx.saved_tensors
        dx = None if dx is None else dx[:ctx.n] * grad_sum
        dw = None if dw is None else dw * grad_sum
        return dx, dw, None, None, None


CHUNK = 1 << 25                                                # logits in a chunk: 128 MB in fp32, matmuls still tall


# ---------------------------------------------------------------------------------------------------------------------
# the model

class Transformer(nn.Module):
    def __init__(self, m):
        super().__init__()
        self.m = m
        kind = (scaling := m["rope_scaling"] or {}).get("rope_type", scaling.get("type", "default"))
        choices = {"loss": LOSSES, "embed": EMBEDDINGS, "norm": ("rmsnorm", "layernorm"), "activation": ACTIVATIONS,
                   "positions": ("rope", "learned"), "rope_scaling.rope_type": ("default", "linear", "llama3")}
        for key, known in choices.items():
            if (value := m.get(key, kind)) not in known:
                raise ValueError(f"model.{key}: {value} is none of {', '.join(known)}")
        self.embed = nn.Embedding(m["vocab_size"], m["d_model"])
        self.pos = nn.Embedding(m["max_len"], m["d_model"]) if m["positions"] == "learned" else None
        self.blocks = nn.ModuleList(Block(m) for _ in range(m["n_layers"]))
        self.norm = Norm(m)
        self.head = None if m["tie_embeddings"] else Linear(m["d_model"], m["vocab_size"], bias=False)
        self.dtype, self.recompute = torch.float32, False            # of the computation; shard.py sets both …
        self.gradient = None                                         # … and may lay all gradients into one tensor

    def forward(self, batch):
        """A row (see the top of the file) -> (sum of weight * nll, sum of weights, the same sum per document [D])."""
        total, cu = len(batch["tokens"]), batch["cu_seqlens"]
        fast = cu.is_cuda and self.dtype != torch.float32
        x = self.hidden(batch, varlen(cu, total, batch["max_len"]) if fast else per_document(cu, total, cu.device))
        at = batch["trained"] if "trained" in batch else (batch["targets"] != IGNORED).nonzero().squeeze(1)  # [N]
        weights = batch["weights"][at]
        loss = LOSSES[self.m["loss"]]
        loss_sum, losses = ChunkedLoss.apply(x[at], self.head_weight(), batch["targets"][at], weights, loss)
        doc = torch.bucketize(at, cu[1:].to(at.dtype), right=True).clamp(max=len(cu) - 2)
        docs = torch.zeros(len(cu) - 1, device=x.device).index_add_(0, doc, losses * weights)
        return loss_sum, weights.sum(), docs

    def hidden(self, batch, attend):
        """What the head reads. -> [T, C]"""
        positions = batch["positions"]
        x = EMBEDDINGS[self.m["embed"]](self, batch)                                                  # [T, C]
        if self.pos is not None:
            x = x + F.embedding(positions, self.pos.weight)
        x, rope = x.to(self.dtype), None if self.pos is not None else rope_turns(positions, self.m)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, x, rope, attend, use_reentrant=False)
            else:
                x = block(x, rope, attend)
        return self.norm(x)

    def head_weight(self):
        return self.embed.weight if self.head is None else self.head.weight                           # [V, C]

    def logits(self, batch, attend=None):
        """All logits, for generation and tests. -> [T, V] in fp32"""
        attend = attend or per_document(batch["cu_seqlens"], len(batch["tokens"]), batch["tokens"].device)
        x = self.hidden(batch, attend)
        return (x @ self.head_weight().to(x.dtype).T).float()


def build(m, seed=0, device="cpu"):
    """A model section, complete -> a model with new weights."""
    return fill(on_meta(m).to_empty(device=device), new_weights(m, seed))


def fill(model, read):
    """Give a model its weights, in place. -> the model

    read  (name, first row, one behind the last) -> those rows of that tensor: new_weights() or stored_weights(), so
          that a process which holds a part of a tensor reads no more than that
    """
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(read(name, 0, len(p)))
    return model


def new_weights(m, seed):
    """-> read() of new weights.

    Matrices are normal with init_std, those that write into the residual stream narrower by sqrt(2 L) (GPT-2); norms
    are 1, biases 0. Each tensor is seeded by its own name, so that it is the same whatever else the model has.
    """
    shapes = {name: p.shape for name, p in on_meta(m).named_parameters()}

    def read(name, start, end):
        if len(shapes[name]) < 2:
            return torch.full((end - start,), 1.0 if name.endswith("weight") else 0.0)
        writes = name.endswith(("attn.out.weight", "mlp.down.weight"))
        std = m["init_std"] / math.sqrt(2 * m["n_layers"]) if writes else m["init_std"]
        return torch.empty(shapes[name]).normal_(0, std, generator=seeded(seed, name))[start:end]
    return read


def seeded(seed, name):
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))


def on_meta(m):
    with torch.device("meta"):
        return Transformer(m)


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face's format, in and out

def weight_names(model, m):
    """{our name: [their names, stacked along the outputs]} of all the model's parameters, by configs/families.yaml."""
    table, out = configs.families()[m["family"]]["weights"], {}
    for name, p in model.named_parameters():
        i = name.split(".")[1]                                 # of a block; not used elsewhere
        theirs = table.get(re.sub(r"^blocks\.\d+\.", "blocks.{i}.", name))
        if theirs is None:
            raise ValueError(f"model.family: {m['family']} has no name for {name} in configs/families.yaml")
        out[name] = [t.replace("{i}", i) for t in (theirs if isinstance(theirs, list) else [theirs])]
    return out


def part_sizes(name, m):
    """Outputs of each part of a stacked weight: q, k and v; gate and up."""
    if ".attn.qkv." in name:
        return [m["n_heads"] * m["head_dim"], m["n_kv_heads"] * m["head_dim"], m["n_kv_heads"] * m["head_dim"]]
    return [m["d_ff"], m["d_ff"]]


def matrices(name, p, m):
    """The outputs of each matrix that a block's weight consists of; [] for whatever is no matrix of a block."""
    if p.dim() < 2 or not name.startswith("blocks.") or not name.endswith(".weight"):
        return []
    stacked = name.endswith("attn.qkv.weight") or m["glu"] and name.endswith("mlp.up.weight")
    return part_sizes(name, m) if stacked else [len(p)]


def find_model(path):
    """A folder with config.json, or a run's -> the folder with config.json. Raises ValueError."""
    for folder in (Path(path), Path(path) / "hf"):
        if (folder / "config.json").is_file():
            return folder
    hint = f"; python checkpoint.py export {path} DIR makes one" if (Path(path) / "checkpoints").is_dir() else ""
    raise ValueError(f"{path}: no model in Hugging Face format there (config.json){hint}")


def load(path, m=None, device="cpu"):
    """A pretrained folder (or a run's) -> (model in fp32, the complete model section that describes it).

    m  the section to go by, where the caller has one; else config.json's

    Raises ValueError as stored_weights() does.
    """
    folder = find_model(path)
    m = m or configs.load([f"model.init_from={folder}"])[0]["model"]
    return fill(on_meta(m).to_empty(device=device), stored_weights(folder, m)), m


def stored_weights(path, m):
    """A pretrained folder (or a run's) -> read() of its weights, in the dtype they are stored in.

    Only safetensors are read, memory-mapped, and of them only what read() is asked for. Raises ValueError naming all
    that is missing, unknown or misshapen at once.
    """
    from safetensors import SafetensorError, safe_open
    folder, family = find_model(path), configs.families()[m["family"]]
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = [f.name for f in folder.glob("*.bin")]
        hint = (f"; {pickles[0]} is a pickle, which can run code; with transformers, AutoModelForCausalLM"
                f".from_pretrained('{folder}').save_pretrained('{folder}') converts it") if pickles else ""
        raise ValueError(f"{folder}: holds no safetensors{hint}")
    try:
        opened = [safe_open(f, framework="pt") for f in files]
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{folder}: a damaged safetensors file: {e}") from None
    where = {key: f for f in opened for key in f.keys()}
    model, turned = on_meta(m), tuple(family.get("transposed", ()))
    names, places, wrong = weight_names(model, m), {}, []      # places: our name -> [(their key, its rows)]
    for name, p in model.named_parameters():
        places[name] = []
        for theirs, rows in zip(names[name], part_sizes(name, m) if len(names[name]) > 1 else [len(p)]):
            key = theirs if theirs in where else theirs.removeprefix(family["prefix"])
            if key not in where:
                wrong.append(f"{theirs} is missing")
                continue
            places[name].append((key, rows))
            stored, want = where[key].get_slice(key).get_shape(), [rows, *p.shape[1:]]
            if stored != (want[::-1] if name.endswith(turned) else want):
                wrong.append(f"{theirs} is {stored}, and the config makes it {want}")
    used = {key for parts in places.values() for key, _ in parts}
    ignored = tuple(family.get("ignore", ())) + (("lm_head.weight",) if m["tie_embeddings"] else ())
    wrong += [f"{key} is unknown" for key in sorted(where) if key not in used and not key.endswith(ignored)]
    if wrong:
        raise ValueError(f"{folder}: weights don't fit the model: {listed(wrong)}")

    def read(name, start, end):
        out, at = [], 0
        for key, rows in places[name]:
            first, last = max(start - at, 0), min(end - at, rows)
            if first < last:
                stored = where[key].get_slice(key)
                out.append(stored[:, first:last].T if name.endswith(turned) else stored[first:last])
            at += rows
        return torch.cat(out)
    return read


def listed(wrong, most=8):
    """["a", "b"] -> "a; b", shortened where there are many"""
    return "; ".join([*wrong[:most], *([f"and {len(wrong) - most} more"] if len(wrong) > most else [])])


def save(read, m, folder, source="", stop=(), bos=None, shard_bytes=4 << 30):
    """Write config.json, generation_config.json and model.safetensors (in parts above shard_bytes).

    read    name -> that tensor, whole: a model's get_parameter, or anything like it. A part is in memory at a time
    source  the folder the model came from: what its config.json says besides is carried along, and its dtype
    stop    ids that end a generation;  bos  the id a text begins with
    """
    from safetensors.torch import save_file
    folder, family, model = Path(folder), configs.families()[m["family"]], on_meta(m)
    folder.mkdir(parents=True, exist_ok=True)
    original = Path(source or "/nowhere") / "config.json"
    config = json.loads(original.read_text(encoding="utf-8")) if original.is_file() else {}
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    for key in ("torch_dtype", "rope_parameters"):             # said below, in the words every version reads
        config.pop(key, None)
    config |= {"model_type": family["model_type"], "architectures": [family["architecture"]], "dtype": dtype}
    config |= {ways[0] if isinstance(ways, list) else ways: m[key] for key, ways in family["keys"].items()}
    if stop or bos is not None:
        config |= {"bos_token_id": bos, "eos_token_id": stop[0] if len(stop) == 1 else list(stop) or None}
    absent = family.get("refuse", {})                          # what we don't compute, said even where it is null
    config = {key: value for key, value in config.items() if value is not None} | absent
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")

    dtype = getattr(torch, dtype)
    files, size = [[]], 0                                      # our names, file by file
    for name, p in model.named_parameters():
        if files[-1] and size + p.numel() * dtype.itemsize > shard_bytes:
            files.append([])
            size = 0
        files[-1].append(name)
        size += p.numel() * dtype.itemsize
    names, index, total = weight_names(model, m), {}, 0
    for n, ours in enumerate(files):
        tensors = {}
        for name in ours:
            whole = read(name).detach().to("cpu", dtype)
            for key, part in zip(names[name], whole.split(part_sizes(name, m)) if len(names[name]) > 1 else [whole]):
                tensors[key] = (part.T if name.endswith(tuple(family.get("transposed", ()))) else part).contiguous()
        label = "model.safetensors" if len(files) == 1 else f"model-{n + 1:05}-of-{len(files):05}.safetensors"
        save_file(tensors, folder / label, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / label)    # safetensors writes for the owner alone
        index |= dict.fromkeys(tensors, label)
        total += sum(t.nbytes for t in tensors.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id") if key in config}
    (folder / "generation_config.json").write_text(json.dumps(generation | {"do_sample": False}, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# generation

def as_batch(documents, device="cpu"):
    """Lists of ids -> a row without targets."""
    lengths = [len(d) for d in documents]
    cu = torch.tensor([0, *lengths]).cumsum(0)
    positions = torch.cat([torch.arange(n) for n in lengths])
    batch = {"tokens": torch.tensor([i for d in documents for i in d]), "positions": positions, "cu_seqlens": cu.int()}
    return {key: t.to(device) for key, t in batch.items()} | {"max_len": max(lengths)}


@torch.no_grad()
def generate(model, prompts, max_tokens=256, stop=(), temperature=0.0, top_k=0, top_p=1.0, seed=0, going=any):
    """Prompts (lists of ids, of any lengths) -> yields, token by token, a list of B ids; None for one that has ended.

    It ends with an id of `stop` (yielded), after max_tokens, or at model.max_len. temperature 0 takes the likeliest.
    going  (is each prompt alive?) -> go on? A model in parts runs only where all who hold one run it: any of theirs
    """
    m, device, B = model.m, model.embed.weight.device, len(prompts)
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(f"expected temperature >= 0, 0 < top_p <= 1, top_k >= 0; got {temperature}, {top_p}, {top_k}")
    if not prompts or not all(prompts) or max(map(len, prompts)) > m["max_len"]:
        lengths = sorted({len(p) for p in prompts})
        raise ValueError(f"a prompt must have 1 to {m['max_len']} tokens (model.max_len), got {lengths}")
    room = min(max(map(len, prompts)) + max_tokens, m["max_len"])
    batch, cache = as_batch(prompts, device), {}
    inside = per_document(batch["cu_seqlens"], len(batch["tokens"]), device)
    length, every = torch.tensor([len(p) for p in prompts], device=device), torch.arange(B, device=device)    # [B]
    rows = torch.repeat_interleave(every, length)                                                     # [T]

    def remember(layer, qkv):                                  # the prompts, packed
        keys_values, cache[layer] = layer.split(qkv, 1)[1:], []
        for new in keys_values:
            store = torch.zeros(B, room, *new.shape[1:], dtype=new.dtype, device=device)              # [B, room, K, E]
            store[rows, batch["positions"]] = new
            cache[layer].append(store)
        return inside(layer, qkv)

    def recall(layer, qkv):                                    # one token of each prompt
        q, *keys_values = layer.split(qkv, 1)
        for store, new in zip(cache[layer], keys_values):
            store[every, length] = new
        upto = int(length.max()) + 1
        keys, values = (store[:, :upto].transpose(1, 2) for store in cache[layer])                    # [B, K, upto, E]
        seen = (torch.arange(upto, device=device) <= length[:, None])[:, None, None]                  # [B, 1, 1, upto]
        grouped = layer.heads != layer.kv_heads
        y = F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=seen, enable_gqa=grouped)
        return y[:, :, 0]                                                                             # [B, H, E]

    random, stop = torch.Generator(device=device).manual_seed(seed), set(stop)
    logits = model.logits(batch, remember)[batch["cu_seqlens"][1:].long() - 1]                        # [B, V]
    alive = [True] * B
    for n in range(max_tokens):
        ids = pick(logits, temperature, top_k, top_p, random)
        chosen = ids.tolist()
        yield [i if live else None for i, live in zip(chosen, alive)]
        alive = [live and i not in stop and len(p) + n + 1 < m["max_len"] for i, live, p in zip(chosen, alive, prompts)]
        if n + 1 == max_tokens or not going(alive):
            return
        new = {"tokens": ids, "positions": length.clamp(max=room - 1)}
        length = new["positions"]
        logits = model.logits(new, recall)
        length = length + 1


def pick(logits, temperature, top_k, top_p, random):
    """logits [B, V] -> ids [B]: the likeliest, or drawn from the top_k and the fewest that hold top_p."""
    if not temperature:
        return logits.argmax(-1)
    values, order = (logits / temperature).sort(-1, descending=True)
    probs = values.softmax(-1)
    out = probs.cumsum(-1) - probs >= top_p                    # what stands before it already holds top_p
    if top_k:
        out[:, top_k:] = True
    drawn = probs.masked_fill(out, 0).multinomial(1, generator=random)
    return order.gather(-1, drawn)[:, 0]


def answer(model, prompts, max_tokens, stop, **sampling):
    """generate(), collected: lists of ids, without what ended them."""
    out = [[] for _ in prompts]
    for ids in generate(model, prompts, max_tokens, stop, **sampling):
        for text, i in zip(out, ids):
            if i is not None and i not in stop:
                text.append(i)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# counting

def flops(model, lengths, n_targets):
    """Floating-point operations of one training step over documents of these lengths: forward and backward.

    6 per token and weight of a matmul, 4 where the weight is frozen (its own gradient is not taken); the head only for
    tokens that have a loss; attention causal and per document, so that packing earns nothing it doesn't do.
    """
    each = sum(p.numel() * (6 if p.requires_grad else 4) for name, p in model.blocks.named_parameters() if p.dim() == 2)
    head = model.head_weight()
    m = model.m
    attention = 6 * m["n_layers"] * m["n_heads"] * m["head_dim"] * sum(int(n) ** 2 for n in lengths)
    return each * int(sum(lengths)) + head.numel() * (6 if head.requires_grad else 4) * int(n_targets) + attention


def summary(model, m):
    """What a person wants to know of a model, as text."""
    rows = [(name, list(p.shape), p.numel()) for name, p in model.named_parameters()]
    parts = {"embedding": ("embed", "pos"), "attention": ("attn",), "mlp": ("mlp",),
             "norms": ("norm", "norm1", "norm2"), "head": ("head",)}
    total = sum(n for *_, n in rows)
    lines = [f"{m['family']}: {m['n_layers']} blocks, width {m['d_model']}, {m['n_heads']} heads of {m['head_dim']} "
             f"({m['n_kv_heads']} of keys and values), MLP {m['d_ff']}{' gated' if m['glu'] else ''}, "
             f"{m['vocab_size']:,} tokens, context {m['max_len']:,}", ""]
    for name, shape, n in rows:
        if not name.startswith("blocks.") or name.startswith("blocks.0."):
            times = f"  x {m['n_layers']}" if name.startswith("blocks.") else ""
            name, shape = name.replace("blocks.0", "blocks.*"), "x".join(map(str, shape))
            lines.append(f"  {name:<28} {shape:>14} {n:>14,}{times}")
    lines.append("")
    for part, keys in parts.items():
        if n := sum(n for name, _, n in rows if any(key in keys for key in name.split("."))):
            lines.append(f"  {part:<28} {n:>29,} {n / total:>6.1%}")
    lines.append(f"  {'parameters':<28} {total:>29,}{'  (the head is the embedding)' if m['tie_embeddings'] else ''}")
    length = m["max_len"]
    lines.append(f"\n  {flops(model, [length], length) / length:.3g} FLOPs per token, forward and backward, "
                 f"in documents of {length:,} tokens")
    lines.append(f"  {total * 4 / 1e6:,.1f} MB in fp32, {total * 2 / 1e6:,.1f} MB in bf16")
    return "\n".join(lines)


def main(argv):
    import tokenize_data
    options, words = configs.take(argv, temperature=0.0, top_k=0, top_p=1.0, seed=0, max_tokens=256)
    if not words:
        raise ValueError('python model.py PATH ["PROMPT"] [temperature=0.8 top_k=0 top_p=1.0 seed=0 max_tokens=256]')
    folder = find_model(words[0])
    model, m = load(folder)
    if len(words) < 2:
        print(summary(model, m))
        return
    tok = tokenize_data.huggingface_tokenizer(folder)
    question, stop = " ".join(words[1:]), [tok.special[tok.eos]] if tok.eos else []
    if tok.template:
        template = tokenize_data.compile_template(tok.template)
        prompt = tokenize_data.encode_prompt(tok, template, [{"role": "user", "content": question}])
        stop = tokenize_data.turn_end(tok, template)
    else:                                                            # no chat model: it goes on with the text
        prompt = [*([tok.special[tok.bos]] if tok.bos else []), *tok.encode(tok.clean(question)).tolist()]
        print(question, end="")
    ids, shown = [], 0
    for i, in generate(model, [prompt], stop=stop, **options):
        ids += [] if i in stop else [i]
        text = tok.decode(ids)
        if not text.endswith("\ufffd"):                              # the rest of a character may be on its way
            print(text[shown:], end="", flush=True)
            shown = len(text)
    print(tok.decode(ids)[shown:])


if __name__ == "__main__":
    configs.run(main, sys.argv[1:])
