"""One decoder-only transformer, described by the config's model section: GPT-2, Llama and their kin.

    python model.py data/base                       a summary: shapes, parameters, FLOPs per token, bytes
    python model.py out/ft "What is 12 + 30?"       talk to what was trained

Shapes, in all seven files:

    T tokens in a row (several documents, one behind the other)     D documents in a row      B prompts
    C width    H heads    K heads of keys and values    E width of a head    F width inside the MLP
    V vocabulary    L blocks    N trained tokens

A row is a dict of tensors; the documents in it don't see each other:

    tokens [T]  targets [T] (-100: no loss)  loss_weights [T]  positions [T]  cu_seqlens [D+1]  max_seqlen  doc_ids [D]
    target_index [N]: where targets are not -100. Optional; counting them on a GPU would make the host wait for it
    noise (seed, step): without it there is no dropout and no other noise

    tokens      t h e _ c a t | a _ d o g | .           cu_seqlens  0 7 12 13
    positions   0 1 2 3 4 5 6 | 0 1 2 3 4 | 0           attention, positions and targets stop at each bar

What lies behind the last document is padding, outside every document. The model knows nothing of ranks and devices'
memory: shard.py takes a finished model and changes it.
"""
import functools, inspect, json, math, re, shutil, sys, zlib
from pathlib import Path

import configs

if __name__ == "__main__":    # before torch is imported
    configs.exit_with_help(__doc__, sys.argv[1:])
    for path in [arg for arg in sys.argv[1:] if "=" not in arg][:1]:
        configs.run(configs.resolve_model_dir, path)

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

IGNORED = -100                                                 # the target of a token that nobody learns to predict


# ---------------------------------------------------------------------------------------------------------------------
# layers

class Linear(nn.Linear):
    """x W^T + b, in x's dtype: masters stay in fp32, the bf16 copy lives as long as the backward pass needs it."""

    def reset_parameters(self):
        """Nothing: weights come by load_weights(); and torch's own way, on a model without any, imports its compiler."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Embedding(nn.Embedding):
    reset_parameters = Linear.reset_parameters


class RMSNorm(torch.autograd.Function):
    """x / sqrt(mean x^2 + eps) * weight, in fp32. The backward pass needs x and one number a token, not the fp32
    tensors in between, which autograd would keep: a third faster on a CPU, and 8 bytes a number less."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)                                 # [T, 1]
        scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        normed, grad = x.float() * scale, grad.float()
        dweight = grad * normed                                      # [T, C], of each token
        along = (dweight @ weight).div_(-x.shape[-1]).unsqueeze(-1)  # x's length changes nothing: [T, 1]
        dx = normed.mul_(along).addcmul_(grad, weight).mul_(scale).to(x.dtype)
        return dx, dweight.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None, None


class Norm(nn.Module):
    """RMSNorm (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450), computed in fp32, its weights rounded as all are."""

    def __init__(self, m, width):
        super().__init__()
        self.eps = m["norm_eps"]
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if m["norm"] == "layernorm" else None

    def forward(self, x):
        weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        if not x.is_cuda:                                      # statistics are fp32 there, here as the weights are
            weight, bias = (None if p is None else p.float() for p in (weight, bias))
        if bias is not None:
            return F.layer_norm(x, weight.shape, weight, bias, self.eps)
        return F.rms_norm(x, weight.shape, weight, self.eps) if x.is_cuda else RMSNorm.apply(x, weight, self.eps)


SCALINGS = {"default": (), "linear": ("factor",),
            "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}


def rope_scaling(m):
    """-> (the kind of scaling a model section asks for, its section). Raises ValueError: unknown, or lacks a number."""
    section = m["rope_scaling"] or {}
    if not isinstance(section, dict):
        raise configs.UserError(f"model.rope_scaling: expected null or a section as config.json's, got {section}")
    kind = section.get("rope_type", section.get("type", "default"))
    if kind not in SCALINGS:
        raise configs.UserError(f"model.rope_scaling.rope_type: {kind} is none of {', '.join(SCALINGS)}")
    for key in SCALINGS[kind]:
        if type(section.get(key)) not in (int, float) or section[key] <= 0:
            raise configs.UserError(f"model.rope_scaling.{key}: {kind} needs it, a number above 0; got {section.get(key)}")
    return kind, section


def rope_turns(positions, m):
    """[T] -> [T, 1, R/2] complex64 of length 1: what turns the pairs (x_i, x_(i + R/2)) of a head (arXiv:2104.09864).

    R is the part of a head's width that is turned. Angles are taken in fp64: at position 100,000 an fp32 product is
    off by more than bf16's own rounding.
    """
    R = int(m["head_dim"] * m["partial_rotary_factor"])
    exponents = torch.arange(0, R, 2, dtype=torch.float64, device=positions.device) / R
    freqs = m["rope_theta"] ** -exponents                                                             # [R/2]
    kind, scaling = rope_scaling(m)
    if kind == "linear":
        freqs = freqs / scaling["factor"]
    elif kind == "llama3":                                     # long waves stretched, short ones kept, a ramp between
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * freqs / (2 * math.pi)   # in the first training's context
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freqs = freqs * keep + freqs / scaling["factor"] * (1 - keep)
    angles = (positions.double()[:, None] * freqs)[:, None]                                           # [T, 1, R/2]
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def rotate(x, turns):
    """x [T, H, E] turned by its positions' angles: a pair is a complex number, a turn a product.

    A pair's two numbers come out side by side. Queries and keys only meet in dot products, where order means nothing.
    The backward pass needs the angles alone: torch.complex(), unlike stack(), would keep x for it, in fp32.
    """
    real = not turns.is_complex()                              # [T, 1, R/2, 2]: compilers know no complex numbers
    R = 2 * turns.shape[2]
    a, b = x[..., :R].float().chunk(2, -1)                                                            # [T, H, R/2]
    if real:
        cos, sin = turns.unbind(-1)
        pairs = torch.stack([a * cos - b * sin, a * sin + b * cos], -1)                               # [T, H, R/2, 2]
    else:
        pairs = torch.view_as_real(torch.view_as_complex(torch.stack([a, b], -1)) * turns)
    turned = pairs.flatten(-2).to(x.dtype)
    return turned if R == x.shape[-1] else torch.cat([turned, x[..., R:]], -1)


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
    def __init__(self, m, n):
        super().__init__()
        self.heads, self.kv_heads, self.width = m["n_heads"], m["n_kv_heads"], m["head_dim"]
        self.scale, self.window, self.dropout = m["attention_multiplier"], m["sliding_window"], m["attn_pdrop"]
        self.turns = m["positions"] == "rope" and bool((m["rope_layers"] or [1] * m["n_layers"])[n])
        self.qkv = Linear(m["d_model"], (self.heads + 2 * self.kv_heads) * self.width, bias=m["qkv_bias"])
        self.out = Linear(self.heads * self.width, m["d_model"], bias=m["out_bias"])
        self.q_norm = self.k_norm = None
        if m["qk_norm"] != "none":                             # of each head (arXiv:2302.05442), or of all in one
            each = m["qk_norm"] == "head"
            self.q_norm = Norm(m, self.width * (1 if each else self.heads))
            self.k_norm = Norm(m, self.width * (1 if each else self.kv_heads))

    def project(self, x, rope):                                                                       # [T, C]
        """-> queries, keys and values [T, H+2K, E], turned"""
        qkv = self.qkv(x).unflatten(-1, (-1, self.width))                                             # [T, H+2K, E]
        if self.turns or self.q_norm is not None:
            qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], 1)
            if self.q_norm is not None:
                q, k = qk.split([self.heads, self.kv_heads], 1)
                qk = torch.cat([norm(t.reshape(len(t), -1, len(norm.weight))).view_as(t)
                                for norm, t in ((self.q_norm, q), (self.k_norm, k))], 1)
            qkv = torch.cat([rotate(qk, rope) if self.turns else qk, v], 1)
        return qkv

    def split(self, qkv, dim):
        """-> q of H heads, k and v of K heads, along `dim`"""
        return qkv.split([self.heads, self.kv_heads, self.kv_heads], dim)


class Block(nn.Module):
    """x + attention, then + MLP. Norms stand before both, or behind (OLMo2); or both read one x (GPT-J, NeoX, Phi).

    keys [T] seed this block's dropout; None: there is none. What stands before attention, and what stands behind it,
    depend on the row's length alone, so that each can be compiled; attention depends on where documents begin.
    """

    def __init__(self, m, n):
        super().__init__()
        self.parallel, self.after = m["parallel_residual"], m["norm_after"]
        self.scale, self.dropout = m["residual_multiplier"], m["resid_pdrop"]
        self.norm1, self.attn = Norm(m, m["d_model"]), Attention(m, n)
        self.norm2, self.mlp = None if m["shared_norm"] else Norm(m, m["d_model"]), MLP(m)

    def forward(self, x, rope, attend, keys=None):                                                    # [T, C]
        h, qkv = self.pre_attention(x, rope)
        return self.post_attention(x, h, attend(self.attn, qkv, keys), keys)

    def pre_attention(self, x, rope):
        h = x if self.after else self.norm1(x)
        return h, self.attn.project(h, rope)

    def post_attention(self, x, h, y, keys):                                                                  # y [T, H, E]
        y = self.attn.out(y.flatten(1))
        if self.parallel:
            h = h if self.norm2 is None else self.norm2(x)
            return self.add(self.add(x, y, keys, 1), self.mlp(h), keys, 2)
        x = self.add(x, self.norm1(y) if self.after else y, keys, 1)
        return self.add(x, self.norm2(self.mlp(x)) if self.after else self.mlp(self.norm2(x)), keys, 2)

    def add(self, x, y, keys, site):
        if self.scale != 1.0:
            y = y * self.scale
        if keys is not None and self.dropout:
            y = dropout(y, self.dropout, scrambled(keys + site)[:, None], torch.arange(y.shape[1], device=y.device))
        return x + y


# ---------------------------------------------------------------------------------------------------------------------
# noise: a number is a function of seed, step, document, position and place in the model, so that neither packing, nor
# ranks, nor a resumed run change it (a generator's state would). A document that a step draws twice has the same twice

def scrambled(x):
    """Each int32 -> another: the hash lowbias32 (github.com/skeeto/hash-prospector). Products wrap, shifts fill 0."""
    x = x.int()
    x = (x >> 16 & 0xffff ^ x) * 0x7feb352d
    x = (x >> 15 & 0x1ffff ^ x) * (0x846ca68b - (1 << 32))
    return x >> 16 & 0xffff ^ x


def document_of(batch):
    """Number of the document that each token is in; what lies behind the last counts to it. -> [T]"""
    cu, at = batch["cu_seqlens"], torch.arange(len(batch["tokens"]), device=batch["tokens"].device)
    return torch.bucketize(at, cu[1:].to(at.dtype), right=True).clamp(max=len(cu) - 2)


def token_keys(batch):
    """The seed of each token's noise: of batch["noise"] (seed and step, say), document and position. -> [T] int32"""
    if not len(batch["doc_ids"]):                              # an idle row
        return batch["positions"].int()
    seed = zlib.crc32(repr(batch["noise"]).encode()) - (1 << 31)
    return scrambled(scrambled(batch["doc_ids"][document_of(batch)].int() ^ seed) + batch["positions"].int())


def dropout(x, p, keys, codes):
    """x with each number set to 0 with probability p, the others times 1 / (1 - p); keys and codes, together, as x."""
    keep = scrambled(keys ^ scrambled(codes)) >= int(p * (1 << 32)) - (1 << 31)
    return torch.where(keep, x / (1 - p), 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# attention, document by document: attend(layer, qkv [T, H+2K, E], keys of its dropout or None) -> [T, H, E]

FP32_ATTENTION_BELOW = 256                                                     # tokens


class Gather(torch.autograd.Function):
    """y = x[index], where each row of x is used at most once, save in places nobody reads.

    Knowing the way back (x[i] went to y[back[i]]; -1: nowhere) makes the backward pass a gather as well, instead of the
    serial scatter-add that autograd would do on a CPU. holes: does `back` hold a -1? Known beforehand, no one waits.
    """
    @staticmethod
    def forward(ctx, x, index, back, holes):
        ctx.save_for_backward(back)
        ctx.holes = holes
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        back, = ctx.saved_tensors
        if not ctx.holes:
            return grad.index_select(0, back), None, None, None
        return grad.index_select(0, back.clamp(min=0)) * (back >= 0)[:, None, None], None, None, None


def per_document(cu_seqlens, total, device):
    """An attend() for any device: scaled_dot_product_attention over documents of about one length at a time.

    Documents are grouped by length, each group padded to its longest ([d, len], at most a third of it padding): a few
    calls instead of one per document. Causal attention needs no mask for padding, which stands behind what looks back.

        row      a a a | b b | c c c c        groups   [4: c, a]  [2: b]
        there    5 6 7 8  0 1 2 2  3 4        which token of the row stands at each padded place
        back     4 5 6  8 9  0 1 2 3          at which padded place each token of the row stands
        used     5 6 7 8  0 1 2 -1 3 4        like `there`, with -1 for padding

    On a CPU documents below FP32_ATTENTION_BELOW are computed in fp32: bf16 takes five times as long for 64 tokens (LOG.md).
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
        return lambda layer, qkv, keys: qkv[:, :layer.heads]
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
    outside, padded = bool((back < 0).any()), bool((used < 0).any())
    there, back, used = (t.to(device) for t in (there, back, used))

    @functools.cache
    def sees(longest, window):                                 # who looks at whom, where causal does not say it
        mask = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
        return mask.triu(1 - window) if window else mask                                              # [len, len]

    def attend(layer, qkv, keys):
        qkv = qkv if settled else Gather.apply(qkv, there, back, outside)
        keys = keys[there] if keys is not None and layer.dropout else None
        out, sizes = [], [longest * len(docs) for longest, docs in groups]
        keys = [None] * len(groups) if keys is None else keys.split(sizes)
        for (longest, _), group, seeds in zip(groups, qkv.split(sizes), keys):
            group = group.float() if longest < FP32_ATTENTION_BELOW and not qkv.is_cuda else group
            q, k, v = layer.split(group.unflatten(0, (-1, longest)).transpose(1, 2), 1)               # [d, H, len, E]
            window = layer.window if layer.window and layer.window < longest else None
            if seeds is None:
                mask = sees(longest, window) if window else None
                y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=layer.scale,
                                                   enable_gqa=layer.heads != layer.kv_heads)
            else:
                y = dropped(layer, q, k, v, sees(longest, window), seeds.unflatten(0, (-1, longest)))
            out.append(y.transpose(1, 2).flatten(0, 1).to(qkv.dtype))                                 # [d * len, H, E]
        out = torch.cat(out)
        return out if settled else Gather.apply(out, back.clamp(min=0), used, padded)
    return attend


def dropped(layer, q, k, v, mask, keys):
    """Attention with dropout, by keys [d, len]: its probabilities stand in memory, as in no kernel. [d, H, len, E]"""
    k, v = (t.repeat_interleave(layer.heads // layer.kv_heads, 1) for t in (k, v))
    scores = (q @ k.transpose(-1, -2)).float() * (layer.scale or layer.width ** -0.5)                 # [d, H, len, len]
    probs = scores.masked_fill(~mask, -math.inf).softmax(-1)
    codes = (torch.arange(layer.heads, device=q.device)[:, None, None] << 20) + torch.arange(len(mask), device=q.device)
    return dropout(probs, layer.dropout, scrambled(keys)[:, None, :, None], codes).to(v.dtype) @ v


def varlen(cu_seqlens, total, max_len):
    """An attend() by the variable-length kernel, on CUDA in bf16 or fp16.

    Padding is one more document, so that what is computed for it are numbers.
    """
    from torch.nn.attention.varlen import varlen_attn
    end = torch.full_like(cu_seqlens[:1], total)
    cu_seqlens = torch.cat([cu_seqlens, end])                        # an empty last document where there is no padding
    takes = inspect.signature(varlen_attn).parameters                # later versions say causal by a window

    def attend(layer, qkv, keys):
        said = {"is_causal": True} if "is_causal" in takes else {"window_size": ((layer.window or 0) - 1, 0)}
        said |= {"scale": layer.scale} if layer.scale else {}
        if said.keys() - takes.keys() or layer.window and "is_causal" in said:
            raise configs.UserError("model.sliding_window, model.attention_multiplier: need torch 2.12 and its attention")
        q, k, v = layer.split(qkv, 1)
        if layer.heads != layer.kv_heads and "enable_gqa" in takes:
            said["enable_gqa"] = True
        elif layer.heads != layer.kv_heads:                          # the argument that spares this copy came with 2.12
            k, v = (t.repeat_interleave(layer.heads // layer.kv_heads, 1) for t in (k, v))
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max(max_len, 1), max(max_len, 1), **said)
    return attend


# ---------------------------------------------------------------------------------------------------------------------
# two things people change: how tokens become vectors, and what is minimized. A new one is a function and its name here;
# what it takes besides comes from the config's section model.embed_options or model.loss_options

def plain(model, batch):
    """One row of the table for each token. -> [T, C]"""
    return F.embedding(batch["tokens"], model.embed.weight)


def scaled(model, batch):
    """sqrt(C) times the row (arXiv:1706.03762, 3.4)."""
    return plain(model, batch) * math.sqrt(model.cfg["d_model"])


def neftune(model, batch, alpha):
    """In training, the row plus noise of U(-1, 1) * alpha / sqrt(L C); L: the document's tokens (arXiv:2310.05914)."""
    x = plain(model, batch)
    if "noise" not in batch or not len(batch["doc_ids"]):
        return x
    codes = scrambled(torch.arange(x.shape[1], device=x.device))
    uniform = scrambled(scrambled(token_keys(batch) + 3)[:, None] ^ codes) / (1 << 31)                # [T, C]
    lengths = batch["cu_seqlens"].diff()[document_of(batch)][:, None]                                 # [T, 1]
    return x + uniform * alpha / (lengths * x.shape[1]).sqrt()


EMBEDDINGS = {"plain": plain, "scaled": scaled, "neftune": neftune}


class NLL(torch.autograd.Function):
    """-log softmax(logits)[target], whose gradient takes the log-probabilities' place: half of autograd's memory."""

    @staticmethod
    def forward(ctx, logits, targets):
        ctx.logp, ctx.targets = logits.log_softmax(-1), targets[:, None]                              # [n, V]
        return -ctx.logp.gather(1, ctx.targets).squeeze(1)

    @staticmethod
    def backward(ctx, grad):
        grad, dlogits, ctx.logp = grad[:, None], ctx.logp.exp_(), None
        return dlogits.mul_(grad).scatter_add_(1, ctx.targets, -grad), None


def cross_entropy(logits, targets, label_smoothing=0.0, z_loss=0.0):
    """-log softmax(logits)[target]; logits [n, V] in fp32, targets [n] -> [n]

    label_smoothing  that share of the target is spread over all V tokens (arXiv:1512.00567, 7)
    z_loss           times log(sum of exp(logits))^2: keeps logits near a sum of 1 (arXiv:2204.02311, 5)
    """
    nll = (F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing) if label_smoothing else
           NLL.apply(logits, targets))
    return nll + z_loss * logits.logsumexp(-1) ** 2 if z_loss else nll


def dft(logits, targets):
    """-p log p of the target's probability p, the first a constant: the unlikely pull less (arXiv:2508.05629, 3)."""
    nll = cross_entropy(logits, targets)
    return nll * (-nll).detach().exp()


LOSSES = {"cross_entropy": cross_entropy, "dft": dft}


class ChunkedLoss(torch.autograd.Function):
    """Head and loss over chunks of tokens, so that the logits of all of them never stand in memory at once.

    A chunk's gradient is taken right away, in the forward pass, while its logits are there, and takes their place,
    piece by piece: only a piece is ever in fp32. The backward pass only scales what was gathered (the loss is one
    number, so its gradient is one factor). Only the first V of the V' rows are tokens. In bf16 a chunk's products are
    rounded once; chunks add up in fp32.

    x [N, C], head [V', C], targets [N], weights [N], bias [V'] or None -> (sum of weight * loss, loss per token [N],
    which carries no gradient)
    """
    @staticmethod
    def forward(ctx, x, head, targets, weights, loss, bias=None, V=None):
        ctx.n, fill = len(x), -len(x) % 64                     # few shapes; what is filled in weighs 0
        x, targets, weights = F.pad(x, (0, 0, 0, fill)), F.pad(targets, (0, fill)), F.pad(weights, (0, fill))
        want_x, want_head, want = ctx.needs_input_grad[0], ctx.needs_input_grad[1], any(ctx.needs_input_grad)
        want_bias = want and bias is not None
        w, rows, V = head.to(x.dtype), len(head), V or len(head)                                      # [V', C]
        b = None if bias is None else bias.to(x.dtype)
        dx = torch.empty_like(x) if want_x else None
        dw = torch.zeros_like(head, dtype=torch.float32) if want_head and not len(x) else None    # else by a chunk
        db = torch.zeros_like(bias, dtype=torch.float32) if want_bias else None
        losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
        step, piece = chunk_sizes(rows, x.element_size(), x.is_cuda)
        room = torch.empty(min(step, len(x)), rows, dtype=x.dtype, device=x.device)
        for at in range(0, len(x), step):
            part, chunk = slice(at, at + step), room[:len(x) - at]                                    # [n, V']
            torch.mm(x[part], w.T, out=chunk) if b is None else torch.addmm(b, x[part], w.T, out=chunk)
            for some, start in zip(chunk.split(piece), range(at, len(x), piece)):
                those = slice(start, start + len(some))
                with torch.enable_grad():
                    logits = some[:, :V].float().requires_grad_(want)                                 # [piece, V]
                    nll = loss(logits, targets[those])
                    if want:
                        some[:, :V], = torch.autograd.grad((nll * weights[those]).sum(), logits)
                losses[those] = nll.detach()
                del logits, nll                                # or they stand beside the next piece's
            if not want:
                continue
            chunk[:, V:] = 0                                   # d loss / d logits from here on
            if want_x:
                torch.mm(chunk, w, out=dx[part])
            if want_head and dw is None:
                dw = (chunk.T @ x[part]).float()
            elif want_head and x.dtype == torch.float32:
                dw.addmm_(chunk.T, x[part])
            elif want_head:
                dw += chunk.T @ x[part]
            if want_bias:
                db += chunk.sum(0, dtype=torch.float32)
        ctx.save_for_backward(dx, dw, db)
        loss_sum, losses = (losses * weights).sum(), losses[:ctx.n]
        ctx.mark_non_differentiable(losses)
        return loss_sum, losses

    @staticmethod
    def backward(ctx, grad_sum, _):
        dx, dw, db = (None if d is None else d.mul_(grad_sum) for d in ctx.saved_tensors)    # in place: once, no copy
        return None if dx is None else dx[:ctx.n], dw, None, None, None, db, None


CHUNK, PIECE = 160 << 20, 8 << 20    # bytes: of logits in one matrix product; of those in fp32 at once (LOG.md)


def chunk_sizes(V, size, cuda):
    """Tokens in a chunk, and in a piece of it, which stays in a CPU's cache; a logit in the chunk has `size` bytes. A
    GPU takes more of both: each chunk reads and writes the whole gradient of the head, in fp32."""
    rows = max(64, CHUNK // (V * size) // 64 * 64)
    return (max(4096, rows), 1024) if cuda else (rows, max(1, PIECE // (4 * V)))


# ---------------------------------------------------------------------------------------------------------------------
# the model

class Transformer(nn.Module):
    def __init__(self, m):
        super().__init__()
        self.cfg = m
        rope_scaling(m)
        self.padded_vocab_size = -(-m["vocab_size"] // m["pad_vocab_size_multiple"]) * m["pad_vocab_size_multiple"]
        choices = {"loss": LOSSES, "embed": EMBEDDINGS, "norm": ("rmsnorm", "layernorm"), "activation": ACTIVATIONS,
                   "positions": ("rope", "learned"), "qk_norm": ("none", "head", "all")}
        for key, known in choices.items():
            if m[key] not in known:
                raise configs.UserError(f"model.{key}: must be one of {', '.join(known)}; got {m[key]}")
        self.embed = Embedding(self.padded_vocab_size, m["d_model"])
        self.pos = Embedding(m["max_len"], m["d_model"]) if m["positions"] == "learned" else None
        self.blocks = nn.ModuleList(Block(m, n) for n in range(m["n_layers"]))
        self.norm = Norm(m, m["d_model"])
        self.head = None if m["tie_embeddings"] else Linear(m["d_model"], self.padded_vocab_size, bias=False)
        self.head_bias = nn.Parameter(torch.empty(self.padded_vocab_size)) if m["head_bias"] else None
        self.loss = configs.bind_options("model.loss", LOSSES[m["loss"]], 2, m["loss_options"])
        self.embedded = configs.bind_options("model.embed", EMBEDDINGS[m["embed"]], 2, m["embed_options"])
        self.dtype, self.recompute = torch.float32, False            # of the computation; shard.parallelize sets both

    def forward(self, batch):
        """A micro-batch (see the top of the file) -> (loss_sum, weight_sum, {"loss": [D]}).

        loss_sum    sum of loss_weight * nll over its target tokens, the only one that carries a gradient
        weight_sum  sum of |loss_weight| over the same tokens
        {...}       statistics per document; "loss": the sum of loss_weight * nll over its target tokens
        """
        total, cu = len(batch["tokens"]), batch["cu_seqlens"]
        fast = cu.is_cuda and self.dtype != torch.float32 and not ("noise" in batch and self.cfg["attn_pdrop"])
        fast = fast and self.cfg["head_dim"] % 8 == 0 and self.cfg["head_dim"] <= 256    # what the kernel is made for
        x = self.hidden(batch, varlen(cu, total, batch["max_seqlen"]) if fast else per_document(cu, total, cu.device))
        index = batch.get("target_index")
        if index is None:
            index = (batch["targets"] != IGNORED).nonzero().squeeze(1)                                # [N]
        loss_weights = batch["loss_weights"][index]
        head = self.head_weight()
        head = head if torch.is_grad_enabled() else head.detach()    # a Function is not told that no gradient is wanted
        loss_sum, losses = ChunkedLoss.apply(x[index], head, batch["targets"][index], loss_weights, self.loss,
                                             self.head_bias, self.cfg["vocab_size"])
        document_losses = torch.zeros(len(cu) - 1, device=x.device)                                   # [D]
        document_losses.index_add_(0, document_of(batch)[index], losses * loss_weights)
        return loss_sum, loss_weights.abs().sum(), {"loss": document_losses}

    def hidden(self, batch, attend):
        """What the head reads. -> [T, C]"""
        m, positions, keys = self.cfg, batch["positions"], None
        x = self.embedded(self, batch)                                                                # [T, C]
        if m["embedding_multiplier"] != 1.0:
            x = x * m["embedding_multiplier"]
        if self.pos is not None:
            x = x + F.embedding(positions, self.pos.weight)
        if "noise" in batch and (m["embd_pdrop"] or m["attn_pdrop"] or m["resid_pdrop"]):
            keys = token_keys(batch)                                                                  # [T]
            if m["embd_pdrop"]:
                x = dropout(x, m["embd_pdrop"], keys[:, None], torch.arange(x.shape[1], device=x.device))
        x, rope = x.to(self.dtype), None if self.pos is not None else rope_turns(positions, m)
        rope = torch.view_as_real(rope) if rope is not None and x.is_cuda else rope
        for n, block in enumerate(self.blocks):
            args = x, rope, attend, None if keys is None else scrambled(keys + n + 1)
            if self.recompute and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*args)
        x = self.norm(x)
        return x if m["logits_scaling"] == 1.0 else x / m["logits_scaling"]

    def head_weight(self):
        return self.embed.weight if self.head is None else self.head.weight                           # [V', C]

    def logits(self, batch, attend=None):
        """All logits, for generation and tests. -> [T, V] in fp32"""
        attend = attend or per_document(batch["cu_seqlens"], len(batch["tokens"]), batch["tokens"].device)
        x, bias = self.hidden(batch, attend), self.head_bias
        logits = F.linear(x, self.head_weight().to(x.dtype), None if bias is None else bias.to(x.dtype))
        return logits[:, :self.cfg["vocab_size"]].float()


def resolve_vocab_size(m, n):
    """A model section for a tokenizer of n ids: a pretrained vocabulary grows where it is smaller, an open one is n."""
    return m | {"vocab_size": max(m["vocab_size"] or 0, n) if m["init_from"] else m["vocab_size"] or n}


def build(m, seed=0, device="cpu"):
    """A model section, complete -> a model with new weights."""
    return load_weights(build_on_meta(m).to_empty(device=device), init_reader(m, seed))


def load_weights(model, read, part=lambda p: (p, 0, len(p))):
    """Give a model its weights, in place, some MB at a time: besides them nothing large is in memory. -> the model

    read  (name, first row, one behind the last) -> those rows of that tensor: init_reader() or pretrained_reader(), so
          that a process which holds a part of a tensor reads no more than that
    part  a parameter -> (what is held of it here, its first row, one behind its last)
    """
    with torch.no_grad():
        for name, p in model.named_parameters():
            mine, start, end = part(p)
            rows = max(1, (1 << 20) // math.prod(p.shape[1:]))
            for at in range(start, end, rows):
                mine[at - start:at - start + rows].copy_(read(name, at, min(at + rows, end)))
    return model


def init_reader(m, seed):
    """-> read() of new weights.

    Matrices are normal with init_std; with init_by_depth those that write into the residual stream are narrower by
    sqrt(2 L), as in GPT-2; norms are 1, biases and what only pads the vocabulary 0. Every thousand rows are make_generator by
    their tensor's name, so that they are the same whatever else the model has, and whoever reads them.
    """
    shapes, each = {name: p.shape for name, p in build_on_meta(m).named_parameters()}, 1024

    def read(name, start, end):
        if len(shapes[name]) < 2:
            return torch.full((end - start,), 1.0 if name.endswith("weight") else 0.0)
        narrow = m["init_by_depth"] and name.endswith(("attn.out.weight", "mlp.down.weight"))
        std = m["init_std"] / math.sqrt(2 * m["n_layers"]) if narrow else m["init_std"]
        drawn, out, begin = known_rows(name, shapes[name][0], m), [], start // each * each
        for first in range(begin, end, each):
            block = torch.zeros(min(each, shapes[name][0] - first), *shapes[name][1:])
            block[:max(0, drawn - first)].normal_(0, std, generator=make_generator(seed, f"{name} {first}" if first else name))
            out.append(block)
        return torch.cat(out)[start - begin:end - begin]
    return read


def make_generator(seed, name):
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))


def build_on_meta(m):
    with torch.device("meta"):
        return Transformer(m)


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face's format, in and out

def hf_names(name, m):
    """A parameter's name -> [their names of what it is stacked of, along the outputs], by configs/families.yaml."""
    theirs = configs.families()[m["family"]]["weights"].get(re.sub(r"^blocks\.\d+\.", "blocks.{i}.", name))
    if theirs is None:
        raise configs.UserError(f"model.family: {m['family']} has no name for {name} in configs/families.yaml")
    i = name.split(".")[1] if name.startswith("blocks.") else ""
    return [t.replace("{i}", i) for t in (theirs if isinstance(theirs, list) else [theirs])]


def hf_weight_names(model, m):
    """{our name: hf_names()} of all the model's parameters."""
    return {name: hf_names(name, m) for name, _ in model.named_parameters()}


def fused_sizes(name, m):
    """Outputs of each part of a stacked weight: q, k and v; gate and up."""
    if ".attn.qkv." in name:
        return [m["n_heads"] * m["head_dim"], m["n_kv_heads"] * m["head_dim"], m["n_kv_heads"] * m["head_dim"]]
    return [m["d_ff"], m["d_ff"]]


def known_rows(name, rows, m):
    """Rows of a parameter without those that only pad the vocabulary."""
    return m["vocab_size"] if name in ("embed.weight", "head.weight", "head_bias") else rows


def pieces(name, rows, m):
    """Where a parameter's `rows` rows stand in their files, in our order -> [(their name, first row, rows)]"""
    names = hf_names(name, m)
    if name.endswith(tuple(configs.families()[m["family"]].get("by_head", ["-"]))):    # theirs: q, k, v of head 0, …
        E = m["head_dim"]
        return [(names[0], (3 * head + part) * E, E) for part in range(3) for head in range(m["n_heads"])]
    return [(key, 0, n) for key, n in zip(names, fused_sizes(name, m) if len(names) > 1 else [rows])]


def to_hf(name, t, m):
    """A tensor with our rows of a parameter -> {their name: their rows}"""
    out, where = {}, pieces(name, len(t), m)
    for (key, first, _), part in zip(where, t.split([rows for *_, rows in where])):
        out.setdefault(key, []).append((first, part))
    in_order = {key: [part for _, part in sorted(parts, key=lambda p: p[0])] for key, parts in out.items()}
    return {key: torch.cat(parts) if len(parts) > 1 else parts[0] for key, parts in in_order.items()}


def matrix_rows(name, p, m):
    """The outputs of each matrix that a block's weight consists of; [] for whatever is no matrix of a block."""
    if p.dim() < 2 or not name.startswith("blocks.") or not name.endswith(".weight"):
        return []
    stacked = name.endswith("attn.qkv.weight") or m["glu"] and name.endswith("mlp.up.weight")
    return fused_sizes(name, m) if stacked else [len(p)]


def load(path, m=None, device="cpu"):
    """A pretrained folder (or a run's) -> (model in fp32, the complete model section that describes it).

    m  the section to go by, where the caller has one; else config.json's

    Raises ValueError as pretrained_reader() does.
    """
    folder = configs.resolve_model_dir(path)
    m = m or configs.load([f"model.init_from={folder}"])[0]["model"]
    return load_weights(build_on_meta(m).to_empty(device=device), pretrained_reader(folder, m)), m


def pretrained_reader(path, m):
    """A pretrained folder (or a run's) -> read() of its weights, in the dtype they are stored in.

    Only safetensors are read, memory-mapped, and of them only what read() is asked for. Where the vocabulary has grown
    beyond theirs, new tokens start at the mean of the old. Raises ValueError naming all that is missing, unknown or
    misshapen at once, and the keys that contradict config.json.
    """
    folder = configs.resolve_model_dir(path)
    family, theirs, where = configs.families()[m["family"]], configs.read_model(folder), open_weights(folder)
    known, turned = min(m["vocab_size"], theirs["vocab_size"]), tuple(family.get("transposed", ()))
    model, places, wrong = build_on_meta(m), {}, []                  # places: our name -> [(their key, first row, rows)]
    for name, p in model.named_parameters():
        places[name], sizes = [], {}
        for key, first, rows in pieces(name, known_rows(name, len(p), m | {"vocab_size": known}), m):
            short = key.removeprefix(family["prefix"])
            key = short if key not in where and short in where else key
            places[name].append((key, first, rows))
            sizes[key] = sizes.get(key, 0) + rows
        for key, rows in sizes.items():
            want = [rows, *p.shape[1:]]
            want = want[::-1] if name.endswith(turned) else want
            if key not in where:
                wrong.append(f"{key} is missing")
            elif (stored := where[key].get_slice(key).get_shape()) != want:
                wrong.append(f"{key} is {stored}, and the config makes it {want}")
    used = {key for parts in places.values() for key, *_ in parts}
    ignored = (*family.get("ignore", ()), *[family["weights"]["head.weight"]] * theirs["tie_embeddings"])
    wrong += [f"{key} is unknown" for key in sorted(where) if key not in used and not key.endswith(ignored)]
    if wrong:
        shapes = lambda m: [(name, p.shape) for name, p in build_on_meta(m | {"rope_layers": None}).named_parameters()]
        said = [f"model.{key} = {m[key]}, where config.json says {value}" for key, value in theirs.items()
                if value is not None and m[key] != value and shapes(m | {key: value}) != shapes(m)]
        raise configs.UserError(f"{folder}: weights don't fit the model: {listed(wrong)}{'; ' * bool(said)}{listed(said)}")

    @functools.cache
    def mean(key):
        stored, total = where[key].get_slice(key), 0
        for at in range(0, known, 8192):
            total = total + stored[at:at + 8192].double().sum(0)
        return total / known

    def read(name, start, end):
        out, at = [], 0
        for key, first, rows in places[name]:
            a, b = max(start - at, 0), min(end - at, rows)
            if a < b:
                stored = where[key].get_slice(key)
                out.append(stored[:, first + a:first + b].T if name.endswith(turned) else stored[first + a:first + b])
            at += rows
        if end > at:                                           # tokens the file doesn't know, and what only pads
            new, start = torch.zeros(end - max(start, at), *model.get_parameter(name).shape[1:]), max(start, at)
            if start < m["vocab_size"]:
                new[:m["vocab_size"] - start] = mean(places[name][0][0]).float()
            out.append(new)
        return torch.cat(out) if len(out) > 1 else out[0]
    return read


def open_weights(folder):
    """-> {their name: the open safetensors file that holds it}. Raises ValueError: none there, pickles, or damage."""
    from safetensors import SafetensorError, safe_open
    at = index = folder / "model.safetensors.index.json"         # at: what is being read
    try:
        files = sorted(folder.glob("model.safetensors")) or sorted(folder.glob("*.safetensors"))
        if index.is_file() and files[:1] != [folder / "model.safetensors"]:
            files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
        opened = [safe_open(at := f, framework="pt") for f in files]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as e:
        raise configs.UserError(f"{at}: a damaged or missing safetensors file: {e}") from None
    if not files:
        pickles = ", ".join(sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth")))
        raise configs.UserError(f"{folder}: holds no *.safetensors{f', but {pickles}' if pickles else ''}: pickles can run "
                         "code and are not read; this converts one: python -c \"from transformers import "
                         f"AutoModelForCausalLM as M; M.from_pretrained('{folder}').save_pretrained('{folder}')\"")
    return {key: f for f in opened for key in f.keys()}


def listed(wrong, most=8):
    """["a", "b"] -> "a; b", shortened where there are many"""
    return "; ".join([*wrong[:most], *([f"and {len(wrong) - most} more"] if len(wrong) > most else [])])


def save_pretrained(read, m, folder, source="", stop=(), bos=None, shard_bytes=4 << 30):
    """Write config.json, generation_config.json and model.safetensors (in parts above shard_bytes).

    read    name -> that tensor, whole: a model's get_parameter, or anything like it. A part is in memory at a time
    source  the folder or hub id it came from: what that config.json says besides is carried along, and its dtype
    stop    ids that end a generation;  bos  the id a text begins with
    """
    from safetensors.torch import save_file
    if m["embed"] == "scaled":                                 # no config.json here says it: it goes into the weights
        table, tied, scale = read, m["tie_embeddings"], math.sqrt(m["d_model"])
        read = lambda name: (table(name) * scale if name == "embed.weight" else
                             table("embed.weight" if tied and name == "head.weight" else name))
        m = m | {"embed": "plain", "tie_embeddings": False}
    folder, family, model = Path(folder), configs.families()[m["family"]], build_on_meta(m)
    folder.mkdir(parents=True, exist_ok=True)
    original = Path(configs.resolve_pretrained(str(source)) or "/nowhere") / "config.json"
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")     # left out, they are some released model's
    config = json.loads(original.read_text(encoding="utf-8")) if original.is_file() else dict.fromkeys(ids)
    dtype = config.get("dtype") or config.get("torch_dtype")
    dtype = dtype if dtype in ("float32", "bfloat16", "float16") else "float32"
    for key in ("torch_dtype", "rope_parameters"):             # said below, in the words every version reads
        config.pop(key, None)
    config |= {"model_type": family["model_type"], "architectures": [family["architecture"]], "dtype": dtype}
    config |= {ways[0] if isinstance(ways, list) else ways: m[key] for key, ways in family["keys"].items()}
    if stop or bos is not None:
        config |= {"bos_token_id": bos, "eos_token_id": stop[0] if len(stop) == 1 else list(stop) or None}
    absent = family.get("refuse", {})                          # what we don't compute, said even where it is null
    null = [ways[0] for ways in family["keys"].values() if isinstance(ways, list) and ways[-1] is not None]
    config = {key: value for key, value in config.items() if value is not None or key in (*null, *ids)} | absent
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")

    dtype = getattr(torch, dtype)
    files, size = [[]], 0                                      # our names, file by file
    for name, p in model.named_parameters():
        if files[-1] and size + p.numel() * dtype.itemsize > shard_bytes:
            files.append([])
            size = 0
        files[-1].append(name)
        size += p.numel() * dtype.itemsize
    index, total, turned = {}, 0, tuple(family.get("transposed", ()))
    for n, ours in enumerate(files):
        tensors = {}
        for name in ours:
            whole = read(name).detach()[:known_rows(name, None, m)].to("cpu", dtype)
            for key, t in to_hf(name, whole, m).items():
                tensors[key] = (t.T if name.endswith(turned) else t).contiguous()
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
    return {key: t.to(device) for key, t in batch.items()} | {"max_seqlen": max(lengths)}


@torch.no_grad()
def generate(model, prompts, max_tokens=256, stop=(), temperature=0.0, top_k=0, top_p=1.0, seed=0, keep_going=any):
    """Prompts (lists of ids, of any lengths) -> yields, token by token, a list of B ids; None for one that has ended.

    It ends with an id of `stop` (yielded), after max_tokens, or at model.max_len. temperature 0 takes the likeliest.
    keep_going  ([is each prompt unfinished?]) -> generate another token? The ranks of a sharded model decide it together
    """
    m, device, B = model.cfg, model.embed.weight.device, len(prompts)
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0 or max_tokens < 1:
        raise configs.UserError("expected temperature >= 0, 0 < top_p <= 1, top_k >= 0, max_tokens >= 1; "
                         f"got {temperature}, {top_p}, {top_k}, {max_tokens}")
    if not prompts or not all(prompts) or max(map(len, prompts)) > m["max_len"]:
        lengths = sorted({len(p) for p in prompts})
        raise configs.UserError(f"a prompt must have 1 to {m['max_len']} tokens (model.max_len), got {lengths}")
    room = min(max(map(len, prompts)) + max_tokens, m["max_len"])
    batch, cache = as_batch(prompts, device), {}
    inside = per_document(batch["cu_seqlens"], len(batch["tokens"]), device)
    length, every = torch.tensor([len(p) for p in prompts], device=device), torch.arange(B, device=device)    # [B]
    rows = torch.repeat_interleave(every, length)                                                     # [T]

    def remember(layer, qkv, keys):                            # the prompts, packed
        keys_values, cache[layer] = layer.split(qkv, 1)[1:], []
        for new in keys_values:
            store = torch.zeros(B, room, *new.shape[1:], dtype=new.dtype, device=device)              # [B, room, K, E]
            store[rows, batch["positions"]] = new
            cache[layer].append(store)
        return inside(layer, qkv, keys)

    def recall(layer, qkv, keys):                              # one token of each prompt
        q, *keys_values = layer.split(qkv, 1)
        for store, new in zip(cache[layer], keys_values):
            store[every, length] = new
        upto = int(length.max()) + 1
        keys, values = (store[:, :upto].transpose(1, 2) for store in cache[layer])                    # [B, K, upto, E]
        back = length[:, None] - torch.arange(upto, device=device)                                    # [B, upto]
        seen = (back >= 0 if not layer.window else (back >= 0) & (back < layer.window))[:, None, None]
        y = F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=seen, scale=layer.scale,
                                           enable_gqa=layer.heads != layer.kv_heads)
        return y[:, :, 0]                                                                             # [B, H, E]

    random, stop = torch.Generator(device=device).manual_seed(seed), set(stop)
    logits = model.logits(batch, remember)[batch["cu_seqlens"][1:].long() - 1]                        # [B, V]
    alive = [True] * B
    for n in range(max_tokens):
        ids = pick(logits, temperature, top_k, top_p, random)
        chosen = ids.tolist()
        yield [i if live else None for i, live in zip(chosen, alive)]
        alive = [live and i not in stop and len(p) + n + 1 < m["max_len"] for i, live, p in zip(chosen, alive, prompts)]
        if n + 1 == max_tokens or not keep_going(alive):
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


def generate_all(model, prompts, max_tokens, stop, **sampling):
    """generate(), collected: lists of ids, without what ended them."""
    out = [[] for _ in prompts]
    for ids in generate(model, prompts, max_tokens, stop, **sampling):
        for text, i in zip(out, ids):
            if i is not None and i not in stop:
                text.append(i)
    return out


def build_eval_prompts(dataset, stop_ids, limit, max_prompt_tokens):
    """Questions from held-out chats, with their answers: [(prompt ids, answer ids without the stop token)].

    A chat is cut before its last trained span. At most `limit` chats are taken, in order: those that end in a complete
    answer and whose prompt is shorter than max_prompt_tokens.

    dataset  a sampler.Dataset
    """
    prompts = []
    for source in dataset.sources.values():
        documents = len(source) if source.header["chats"] else 0
        for i in range(documents):
            if len(prompts) == limit:
                return prompts
            ids, mask = source.document(i)
            last = np.flatnonzero(mask)[-1]
            untrained = np.flatnonzero(mask[:last] == 0)
            if not len(untrained):
                continue
            start = int(untrained[-1]) + 1
            answer = ids[start:last + 1].tolist()
            if start < max_prompt_tokens and answer[-1] in stop_ids:
                prompts.append((ids[:start].tolist(), answer[:-1]))
    return prompts


# ---------------------------------------------------------------------------------------------------------------------
# counting

def flops(model, lengths, n_targets):
    """Floating-point operations of one training step over documents of these lengths: forward and backward.

    6 per token and weight of a matmul, 4 where the weight is frozen (its own gradient is not taken); the head only for
    tokens that have a loss; attention causal and per document, so that packing earns nothing it doesn't do.
    """
    each = sum(p.numel() * (6 if p.requires_grad else 4) for name, p in model.blocks.named_parameters() if p.dim() == 2)
    m, head = model.cfg, 6 if model.head_weight().requires_grad else 4
    seen = lambda n: n ** 2 - max(0, n - (m["sliding_window"] or n)) ** 2    # pairs of tokens, times 2
    attention = 6 * m["n_layers"] * m["n_heads"] * m["head_dim"] * sum(seen(int(n)) for n in lengths)
    return each * int(sum(lengths)) + m["vocab_size"] * m["d_model"] * head * int(n_targets) + attention


def summary(model, m):
    """What a person wants to know of a model, as text."""
    rows = [(name, list(p.shape), p.numel()) for name, p in model.named_parameters()]
    parts = {"embedding": "embed|pos", "attention": "attn.(qkv|out)", "mlp": "mlp", "norms": "norm", "head": "head"}
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
        if n := sum(n for name, _, n in rows if re.search(keys, name)):
            lines.append(f"  {part:<28} {n:>29,} {n / total:>6.1%}")
    lines.append(f"  {'parameters':<28} {total:>29,}{'  (the head is the embedding)' if m['tie_embeddings'] else ''}")
    length = m["max_len"]
    lines.append(f"\n  {flops(model, [length], length) / length:.3g} FLOPs per token, forward and backward, "
                 f"in documents of {length:,} tokens")
    lines.append(f"  {total * 4 / 1e6:,.1f} MB in fp32, {total * 2 / 1e6:,.1f} MB in bf16")
    return "\n".join(lines)


def main(argv):
    import tokenize_data
    options, words = configs.pop_options(argv, temperature=0.0, top_k=0, top_p=1.0, seed=0, max_tokens=256)
    if not words:
        raise configs.UserError('python model.py PATH ["PROMPT"] [temperature=0.8 top_k=0 top_p=1.0 seed=0 max_tokens=256]')
    folder = configs.resolve_model_dir(words[0])
    if len(words) < 2:                                               # no weight is read for that
        m = configs.load([f"model.init_from={folder}"])[0]["model"]
        pretrained_reader(folder, m)
        size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        print(f"{summary(build_on_meta(m), m)}, {size / 1e6:,.1f} MB as it is stored")
        return
    model, m = load(folder)
    tok = tokenize_data.huggingface_tokenizer(folder)
    question, stop = " ".join(words[1:]), [tok.special[tok.eos]] if tok.eos else []
    if tok.template:
        template = tokenize_data.compile_template(tok.template)
        prompt = tokenize_data.encode_prompt(tok, template, [{"role": "user", "content": question}])
        stop = tokenize_data.stop_token_ids(tok, template)
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
