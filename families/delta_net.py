"""Gated DeltaNet: blocks with a state of fixed size instead of keys and values (Qwen3.5).

Gated Delta Networks, arXiv:2412.06464. model.py imports this file for a model whose
model.layer_types has linear_attention. In each head, a matrix S [Ek, Ev] maps keys to values. A
token decays it, corrects the value that it returns for the token's key, and reads it:

    S = exp(g_t) S                               g_t < 0
    S = S + k_t (beta_t (v_t - S^T k_t))^T       the delta rule; 0 < beta_t < 1
    y_t = S^T q_t / sqrt(Ek)

S is 0 at the start of a document. q, k and v come from a convolution over a token and the few
before it in its document; q and k have length 1. Letters, beside those of model.py:

    Hk heads of queries and keys    Hv heads of values: each key head serves Hv / Hk of them
    Ek, Ev width of a head of keys, of values    W channels of the convolution: 2 Hk Ek + Hv Ev
    n chunks of S tokens: those of all documents
"""
import functools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import model as transformer

CHUNK_SIZE = 64              # S, tokens


class GatedDeltaNet(nn.Module):
    """What a block has in the place of an Attention."""

    is_local = False         # of the two kinds of rope it reads neither

    def __init__(self, m):
        super().__init__()
        self.n_key_heads = m["linear_num_key_heads"]
        self.n_value_heads = m["linear_num_value_heads"]
        self.key_dim = m["linear_key_head_dim"]
        self.value_dim = m["linear_value_head_dim"]
        self.eps = m["norm_eps"]
        self.activation = transformer.ACTIVATIONS[m["activation"]]
        C = m["d_model"]
        Hv = self.n_value_heads
        key_width = self.n_key_heads * self.key_dim
        value_width = Hv * self.value_dim
        self.widths = [key_width, key_width, value_width]                  # of q, k, v
        W = sum(self.widths)
        self.in_proj_qkv = transformer.Linear(C, W, bias=False)
        self.in_proj_z = transformer.Linear(C, value_width, bias=False)
        self.in_proj_b = transformer.Linear(C, Hv, bias=False)
        self.in_proj_a = transformer.Linear(C, Hv, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(W, 1, m["linear_conv_kernel_dim"]))
        self.A_log = nn.Parameter(torch.empty(Hv))
        self.dt_bias = nn.Parameter(torch.empty(Hv))
        self.norm_weight = nn.Parameter(torch.empty(self.value_dim))
        self.out_proj = transformer.Linear(value_width, C, bias=False)

    def needs_probabilities(self, training):
        return False

    def project(self, x, rope, seeds=None):                                        # [T, C]
        """Return what mix() reads: qkv [T, W], and in fp32 g and beta [T, Hv]."""
        qkv = self.in_proj_qkv(x, seeds)                                           # [T, W]
        beta = self.in_proj_b(x, seeds).float().sigmoid()                          # [T, Hv]
        # A step of size dt of S' = -A S. Like all weights, A_log and dt_bias are rounded to the
        # compute dtype: FSDP casts the weights of a block when it gathers them.
        A = self.A_log.to(x.dtype).float().exp()                                   # [Hv]
        dt_bias = self.dt_bias.to(x.dtype).float()
        dt = F.softplus(self.in_proj_a(x, seeds).float() + dt_bias)                # [T, Hv]
        return qkv, -A * dt, beta

    def mix(self, qkv, g, beta, layout, seeds=None):
        """The convolution and the delta rule within each document: y [T, Hv, Ev].

        qkv, g, beta  what project() returns
        layout        see model.attention(). In generation, a KVCache holds the states
        """
        weight = self.conv_weight[:, 0].to(qkv.dtype).float()                      # [W, kernel]
        if layout.is_decoding:
            return self.decode(qkv, g, beta, weight, layout.states)
        if layout.cache is None and torch.is_grad_enabled():
            # What is computed here takes five times the memory of the MLP, and 3% of its time.
            y, _ = checkpoint(self.mix_documents, qkv, g, beta, weight, layout,
                              use_reentrant=False, preserve_rng_state=False)
            return y
        y, states = self.mix_documents(qkv, g, beta, weight, layout)
        if layout.cache is not None:
            inputs = last_inputs(qkv, weight.shape[1] - 1, layout.cu_seqlens)
            layout.cache.states[self] = (inputs, states)
        return y

    def mix_documents(self, qkv, g, beta, weight, layout):
        """Return y [T, Hv, Ev], and the states after the documents, as the delta rule does."""
        convolved = convolve(qkv.float(), weight, layout.chunks.positions)         # [T, W]
        q, k, v = self.split_heads(self.activation(convolved))
        if layout.use_varlen and flash_kernel():
            return flash_delta_rule(q, k, v, g, beta, layout, qkv.dtype)
        y, states = chunked_delta_rule(q, k, v, g, beta, layout.chunks)
        return y.to(qkv.dtype), states

    def decode(self, qkv, g, beta, weight, states):
        """mix() of the next token of B prompts. Updates their states:

        (the inputs of the convolution at the tokens before [B, kernel - 1, W], S [B, Hv, Ek, Ev])
        """
        inputs, S = states[self]
        inputs = torch.cat([inputs, qkv[:, None]], 1)                              # [B, kernel, W]
        convolved = (inputs.float() * weight.T).sum(1)                             # [B, W]
        q, k, v = self.split_heads(self.activation(convolved))
        S = S * g.exp()[..., None, None]
        stored = (k[..., None, :] @ S)[..., 0, :]                                  # [B, Hv, Ev]
        correction = beta[..., None] * (v - stored)
        S = S + k[..., :, None] * correction[..., None, :]
        states[self] = (inputs[:, 1:], S)
        y = (q[..., None, :] @ S)[..., 0, :]                                       # [B, Hv, Ev]
        return (y * self.key_dim ** -0.5).to(qkv.dtype)

    def split_heads(self, qkv):                                                    # [T, W]
        """Return q, k [T, Hv, Ek] of length 1, and v [T, Hv, Ev]."""
        q, k, v = qkv.split(self.widths, -1)
        group_size = self.n_value_heads // self.n_key_heads
        q = unit_length(q.unflatten(-1, (self.n_key_heads, self.key_dim)))         # [T, Hk, Ek]
        k = unit_length(k.unflatten(-1, (self.n_key_heads, self.key_dim)))         # [T, Hk, Ek]
        v = v.unflatten(-1, (self.n_value_heads, self.value_dim))                  # [T, Hv, Ev]
        return q.repeat_interleave(group_size, 1), k.repeat_interleave(group_size, 1), v

    def output(self, y, x, seeds=None):
        """The block's output [T, C]: y [T, Hv, Ev] of mix(), normalized, and gated by the input of
        project(), x [T, C]."""
        z = self.in_proj_z(x, seeds).view_as(y)                                    # [T, Hv, Ev]
        weight = self.norm_weight.to(x.dtype).float()
        normalized = F.rms_norm(y.float(), weight.shape, weight, self.eps)
        gated = normalized * F.silu(z.float())
        return self.out_proj(gated.to(x.dtype).flatten(1), seeds)


def unit_length(x):
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def convolve(x, weight, positions):
    """sum over j of weight[:, -1 - j] * x_(t - j), within documents. x [T, W] -> [T, W]"""
    y = x * weight[:, -1]
    for j in range(1, weight.shape[1]):
        earlier = F.pad(x, (0, 0, j, 0))[:len(x)]                                  # x_(t - j)
        is_outside = positions[:, None] < j
        y = y + (earlier * weight[:, -1 - j]).masked_fill(is_outside, 0)
    return y


def last_inputs(x, n, cu_seqlens):
    """The last n rows of each document in x [T, W], zeros before its first: [D, n, W]."""
    starts = cu_seqlens[:-1, None].long()
    ends = cu_seqlens[1:, None].long()
    index = ends - torch.arange(n, 0, -1, device=x.device)                         # [D, n]
    is_outside = index < starts
    return x[index.clamp(min=0)].masked_fill(is_outside[..., None], 0)


# --------------------------------------------------------------------------------------------------
# the delta rule

class Chunks:
    """The documents of a layout, cut into chunks of S tokens; the last one of each may be shorter.

    Chunks are sorted by their number in the document, and those of one number by the length of
    their documents, the longest first. So the documents that have a chunk of some number are the
    first of those that have one of the number before, in the same order.

    index   int64 [n, S], of each chunk's tokens; T where it has none
    place   int64 [T], of each token in the flattened index
    counts  [int]: how many documents have a chunk 0, a chunk 1, ...
    order   int64 [counts[0]], the documents: that of chunk 0, of chunk 1, ...
    """

    def __init__(self, layout):
        self.layout = layout

    @functools.cached_property
    def positions(self):
        """int64 [T], of each token in its document. Padding counts as one more document."""
        cu_seqlens = self.layout.cu_seqlens.long()
        tokens = torch.arange(self.layout.n_tokens, device=cu_seqlens.device)
        documents = torch.bucketize(tokens, cu_seqlens[1:], right=True)
        return tokens - cu_seqlens[documents]

    @functools.cached_property
    def tables(self):
        """(index, place, counts, order). On a GPU, the lengths of the documents cost a sync."""
        n_tokens = self.layout.n_tokens
        lengths = torch.tensor(self.layout.lengths)
        ends = lengths.cumsum(0)
        n_chunks = (lengths + CHUNK_SIZE - 1) // CHUNK_SIZE
        order = n_chunks.argsort(descending=True, stable=True)
        exists = torch.arange(int(n_chunks.max()))[:, None] < n_chunks[order]      # [numbers, D]
        number, rank = exists.nonzero(as_tuple=True)                               # [n]
        documents = order[rank]
        first = (ends - lengths)[documents] + number * CHUNK_SIZE
        tokens = first[:, None] + torch.arange(CHUNK_SIZE)                         # [n, S]
        index = tokens.where(tokens < ends[documents, None], n_tokens)
        place = torch.empty(n_tokens + 1, dtype=torch.int64)
        place[index.flatten()] = torch.arange(index.numel())
        order = order[n_chunks[order] > 0]
        device = self.layout.cu_seqlens.device
        return index.to(device), place[:-1].to(device), exists.sum(1).tolist(), order.to(device)

    def split(self, x):
        """x [T, Hv, ...] -> [n, Hv, S, ...], with zeros where a chunk has no token."""
        index, _, _, _ = self.tables
        zero = x.new_zeros(1, *x.shape[1:])
        return torch.cat([x, zero])[index].transpose(1, 2).contiguous()

    def join(self, y):
        """[n, Hv, S, Ev] -> [T, Hv, Ev]"""
        _, place, _, _ = self.tables
        return y.transpose(1, 2).flatten(0, 1)[place]


def chunked_delta_rule(q, k, v, g, beta, chunks):
    """The delta rule within documents, by a few matrix products per chunk (section 3.3 of the
    paper).

    In a chunk, let G_r be the sum of g_1 ... g_r, D_ri = exp(G_r - G_i), and S the state before it.
    The state after token r is exp(G_r) S + sum over i <= r of D_ri k_i u_i^T, where u_r is what
    token r writes. With the rule follows, for one u after another,

        u_r = beta_r (v_r - exp(G_r) S^T k_r - sum over i < r of D_ri (k_i . k_r) u_i)

    a triangular system for the u of the chunk (the WY form of arXiv:2406.06484), whose solution is
    linear in S: u = values - keys S. What does not depend on S is computed for all chunks at once.

    q, k  fp32 [T, Hv, Ek];  v  [T, Hv, Ev];  g, beta  [T, Hv]
    Returns y [T, Hv, Ev], and the states after those documents that have tokens [D, Hv, Ek, Ev].
    """
    _, _, counts, order = chunks.tables
    # Where a chunk has no token, g, k and v are 0 and leave the state as it is.
    q, k, v, g, beta = [chunks.split(x) for x in (q, k, v, g, beta)]
    Ek = k.shape[-1]
    Ev = v.shape[-1]
    G = g.cumsum(-1)                                                               # [n, Hv, S]
    is_later = torch.ones(CHUNK_SIZE, CHUNK_SIZE, dtype=torch.bool, device=q.device).triu(1)
    D = (G[..., :, None] - G[..., None, :]).masked_fill(is_later, -math.inf).exp()
    since_start = G.exp()[..., None]                                               # [n, Hv, S, 1]
    until_end = (G[..., -1:] - G).exp()[..., None]

    k_T = k.transpose(-1, -2)                                                      # [n, Hv, Ek, S]
    k_beta = k * beta[..., None]
    system = (k_beta @ k_T) * D                          # its diagonal is read as 1
    right_sides = torch.cat([v * beta[..., None], k_beta * since_start], -1)
    solved = torch.linalg.solve_triangular(system, right_sides, upper=False, unitriangular=True)
    values, keys = solved.split([Ev, Ek], -1)

    state = q.new_zeros(len(order), *k.shape[1:2], Ek, Ev)                         # [D, Hv, Ek, Ev]
    states = [state[:0]]                                 # before each chunk
    written = [values[:0]]                               # u of each chunk
    finished = [state[:0]]                               # after each document, the longest last
    tensors = (values, keys, k * until_end, since_start[:, :, -1:])
    chunks_of_number = zip(*(x.split(counts) for x in tensors))
    for values_c, keys_c, k_c, decay_c in chunks_of_number:
        n = len(values_c)                                # documents that have a chunk of this number
        finished.append(state[n:])
        state = state[:n]
        u = values_c - keys_c @ state
        states.append(state)
        written.append(u)
        state = state * decay_c + k_c.transpose(-1, -2) @ u
    finished.append(state)
    y = (q * since_start) @ torch.cat(states) + ((q @ k_T) * D) @ torch.cat(written)
    states = torch.cat(finished[::-1])[order.argsort()]
    return chunks.join(y * Ek ** -0.5), states


@functools.cache
def flash_kernel():
    """The kernel of flash-linear-attention for CUDA, or None if that is not installed."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError:
        return None
    return chunk_gated_delta_rule


def flash_delta_rule(q, k, v, g, beta, layout, dtype):
    """chunked_delta_rule() by flash_kernel(), in dtype; None for the states."""
    end = torch.full_like(layout.cu_seqlens[:1], layout.n_tokens)
    cu_seqlens = torch.cat([layout.cu_seqlens, end]).long()      # padding is one more document
    q, k, v = [x[None].to(dtype) for x in (q, k, v)]
    y, _ = flash_kernel()(q, k, v, g[None], beta[None], cu_seqlens=cu_seqlens)
    return y[0], None


# --------------------------------------------------------------------------------------------------
# for NewWeights, flops() and predict_memory()

def new_values(name, shape, generator):
    """The values of a new model's parameter that is no matrix, as in Mamba 2 (arXiv:2405.21060)."""
    if name.endswith("norm_weight"):
        return torch.ones(shape)
    uniform = torch.rand(shape, generator=generator)
    if name.endswith("A_log"):
        return (1 + 15 * uniform).log()                  # A from 1 to 16
    if name.endswith("dt_bias"):
        dt = 0.001 * 100 ** uniform                      # from 0.001 to 0.1
        return dt.expm1().log()                          # the inverse of softplus
    return (2 * uniform - 1) * shape[-1] ** -0.5         # the convolution, as in torch


def flops_per_token(m):
    """Of forward and backward of mix(): the rule token by token, of which chunks compute more."""
    Hv, Ek, Ev, W = sizes(m)
    # 3 products of the size of S, and the convolution; 2 operations; 1 forward + 2 backward
    return 6 * (3 * Hv * Ek * Ev + W * m["linear_conv_kernel_dim"])


def sizes(m):
    Hv = m["linear_num_value_heads"]
    Ek = m["linear_key_head_dim"]
    Ev = m["linear_value_head_dim"]
    return Hv, Ek, Ev, 2 * m["linear_num_key_heads"] * Ek + Hv * Ev


def activation_bytes(m, element):
    """What a GatedDeltaNet keeps per token for the backward pass, in bytes."""
    Hv, Ek, Ev, W = sizes(m)
    # qkv; g, beta and what they are computed from; in output(): y, its norm, z and silu(z) in fp32,
    # and their product
    return element * W + 4 * 6 * Hv + (4 * 4 + element) * Hv * Ev


def backward_bytes(m):
    """What its backward pass computes again per token, and some gradients, in bytes."""
    Hv, Ek, Ev, W = sizes(m)
    kernel = m["linear_conv_kernel_dim"]
    heads = 6 * Hv * Ek + 4 * Hv * Ev + 5 * Hv * CHUNK_SIZE + 2 * Hv * Ek * Ev / CHUNK_SIZE
    return 4 * ((kernel + 2) * W + heads)
