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

import model as transformer

CHUNK_SIZE = 64              # S, tokens


class GatedDeltaNet(nn.Module):
    """The projections around mix(), in the place of an Attention."""

    def __init__(self, m):
        super().__init__()
        self.n_key_heads = m["linear_num_key_heads"]
        self.n_value_heads = m["linear_num_value_heads"]
        self.key_dim = m["linear_key_head_dim"]
        self.value_dim = m["linear_value_head_dim"]
        self.eps = m["norm_eps"]
        self.activation = transformer.ACTIVATIONS[m["activation"]]
        C = m["d_model"]
        key_width = self.n_key_heads * self.key_dim
        value_width = self.n_value_heads * self.value_dim
        self.widths = [key_width, key_width, value_width]                  # of q, k, v
        n_channels = sum(self.widths)
        self.in_proj_qkv = transformer.Linear(C, n_channels, bias=False)
        self.in_proj_z = transformer.Linear(C, value_width, bias=False)
        self.in_proj_b = transformer.Linear(C, self.n_value_heads, bias=False)
        self.in_proj_a = transformer.Linear(C, self.n_value_heads, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(n_channels, 1, m["linear_conv_kernel_dim"]))
        self.A_log = nn.Parameter(torch.empty(self.n_value_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.n_value_heads))
        self.norm_weight = nn.Parameter(torch.empty(self.value_dim))
        self.out_proj = transformer.Linear(value_width, C, bias=False)

    def needs_probabilities(self, training):
        return False

    def project(self, x, rope, seeds=None):                                        # [T, C]
        """Return what mix() reads: qkv [T, W], and in fp32 g and beta [T, Hv]."""
        qkv = self.in_proj_qkv(x, seeds)                                           # [T, W]
        beta = self.in_proj_b(x, seeds).float().sigmoid()                          # [T, Hv]
        # A step of size dt of S' = -A S. Both weights are rounded to the compute dtype like all
        # others: FSDP casts the weights of a block when it gathers them.
        A = self.A_log.to(x.dtype).float().exp()                                   # [Hv]
        dt_bias = self.dt_bias.to(x.dtype).float()
        dt = F.softplus(self.in_proj_a(x, seeds).float() + dt_bias)                # [T, Hv]
        return qkv, -A * dt, beta

    def output(self, y, x, seeds=None):
        """y [T, Hv, Ev] of mix(), normalized, gated by the input x [T, C] of project(), as [T, C].
        """
        z = self.in_proj_z(x, seeds).view_as(y)                                    # [T, Hv, Ev]
        weight = self.norm_weight.to(x.dtype).float()
        normalized = F.rms_norm(y.float(), weight.shape, weight, self.eps)
        gated = normalized * F.silu(z.float())
        return self.out_proj(gated.to(x.dtype).flatten(1), seeds)

    def mix(self, qkv, g, beta, layout, seeds=None):
        """The convolution and the delta rule within each document: y [T, Hv, Ev].

        qkv, g, beta  what project() returns
        layout        see model.attention(). In generation, a KVCache holds the states
        """
        weight = self.conv_weight[:, 0].to(qkv.dtype).float()                      # [W, kernel]
        if layout.is_decoding:
            return decode(self, qkv, g, beta, weight, layout.states).to(qkv.dtype)
        chunks = layout.chunks
        convolved = convolve(qkv.float(), weight, chunks.positions)                # [T, W]
        q, k, v = self.split_heads(self.activation(convolved))
        if layout.use_varlen and flash_kernel():
            return flash_delta_rule(q, k, v, g, beta, layout, qkv.dtype)
        y, states = chunked_delta_rule(q, k, v, g, beta, chunks)
        if layout.cache is not None:
            inputs = last_inputs(qkv, weight.shape[1] - 1, layout.cu_seqlens)
            layout.cache.states[self] = (inputs, states)
        return y.to(qkv.dtype)

    def split_heads(self, qkv):                                                    # [T, W]
        """Return q, k [T, Hv, Ek] of length 1, and v [T, Hv, Ev], in fp32."""
        q, k, v = qkv.float().split(self.widths, -1)
        group_size = self.n_value_heads // self.n_key_heads
        q = unit_length(q.unflatten(-1, (self.n_key_heads, self.key_dim)))         # [T, Hk, Ek]
        k = unit_length(k.unflatten(-1, (self.n_key_heads, self.key_dim)))         # [T, Hk, Ek]
        v = v.unflatten(-1, (self.n_value_heads, self.value_dim))                  # [T, Hv, Ev]
        return q.repeat_interleave(group_size, 1), k.repeat_interleave(group_size, 1), v


def unit_length(x):
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


# --------------------------------------------------------------------------------------------------
# the convolution

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
    starts, ends = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    index = ends - torch.arange(n, 0, -1, device=x.device)                         # [D, n]
    is_outside = index < starts
    return x[index.clamp(min=0)].masked_fill(is_outside[..., None], 0)


# --------------------------------------------------------------------------------------------------
# the delta rule

class Chunks:
    """How the documents of a layout are cut into chunks, and each token's position.

    The chunks are sorted by their number in the document: first those with number 0, the longest
    document's first, then those with number 1 of the same documents, without the last ones, which
    are shorter. Thus a step of the scan over chunk numbers reads neighboring rows.

    positions  int64 [T], of each token in its document
    index      int64 [n, S], of each chunk's tokens; T where there is none
    place      int64 [T], of each token in the flattened index
    counts     [int], the number of documents that have a chunk 0, a chunk 1, ...
    order      int64 [counts[0]], the documents, sorted by decreasing number of chunks
    """

    def __init__(self, layout):
        self.layout = layout

    @functools.cached_property
    def positions(self):
        cu_seqlens = self.layout.cu_seqlens.long()
        tokens = torch.arange(self.layout.n_tokens, device=cu_seqlens.device)
        # tokens after the last document count as one more document
        documents = torch.bucketize(tokens, cu_seqlens[1:], right=True)
        return tokens - cu_seqlens[documents]

    @functools.cached_property
    def tables(self):
        """(index, place, counts, order). On a GPU, the lengths of the documents cost a sync."""
        device = self.layout.cu_seqlens.device
        n_tokens = self.layout.n_tokens
        lengths = torch.tensor(self.layout.lengths)
        ends = lengths.cumsum(0)
        n_chunks = (lengths + CHUNK_SIZE - 1) // CHUNK_SIZE
        order = n_chunks.argsort(descending=True, stable=True)
        index = [torch.empty(0, CHUNK_SIZE, dtype=torch.int64)]
        counts = []
        for number in range(int(n_chunks.max())):
            documents = order[n_chunks[order] > number]
            counts.append(len(documents))
            first = (ends - lengths)[documents] + number * CHUNK_SIZE
            tokens = first[:, None] + torch.arange(CHUNK_SIZE)
            index.append(tokens.where(tokens < ends[documents, None], n_tokens))
        index = torch.cat(index)
        place = torch.empty(n_tokens + 1, dtype=torch.int64)
        place[index.flatten()] = torch.arange(index.numel())
        order = order[:counts[0]] if counts else order[:0]
        return index.to(device), place[:n_tokens].to(device), counts, order.to(device)

    def split(self, x):
        """x [T, Hv, ...] -> [n, Hv, S, ...], with zeros where a chunk has no token."""
        index, _, _, _ = self.tables
        zero = x.new_zeros(1, *x.shape[1:])
        return torch.cat([x, zero])[index].transpose(1, 2)

    def join(self, y):
        """[n, Hv, S, Ev] -> [T, Hv, Ev]"""
        _, place, _, _ = self.tables
        return y.transpose(1, 2).flatten(0, 1)[place]


def chunked_delta_rule(q, k, v, g, beta, chunks):
    """The delta rule from zero states, a matrix product per chunk (arXiv:2412.06464, section 3.3).

    In a chunk, let G_r be the sum of g_1 ... g_r, D_ri = exp(G_r - G_i), and S the state before it.
    Then the state after token r is exp(G_r) S + sum over i <= r of D_ri k_i u_i^T, where u_r is
    what token r writes. Put into the rule, that gives u_1, u_2, ... one after another:

        u_r = beta_r (v_r - exp(G_r) S^T k_r - sum over i < r of D_ri (k_i . k_r) u_i)

    that is, a triangular system for all u of the chunk (the WY form of arXiv:2406.06484). Its
    solution is linear in S: u = new_values - read_keys S. What does not depend on S is computed for
    all chunks at once, S in a loop over the numbers of chunks, for all documents together.

    q, k      fp32 [T, Hv, Ek];  v  [T, Hv, Ev];  g, beta  [T, Hv]
    Returns y [T, Hv, Ev], and the states after each document that has tokens [D, Hv, Ek, Ev].
    """
    q, k, v, g, beta = [chunks.split(x) for x in (q, k, v, g, beta)]   # a place without token keeps
    _, _, counts, order = chunks.tables                                # the state: g, k and v are 0
    S, Ek, Ev = CHUNK_SIZE, k.shape[-1], v.shape[-1]
    q = q * Ek ** -0.5
    G = g.cumsum(-1)                                                               # [n, Hv, S]
    is_later = torch.ones(S, S, dtype=torch.bool, device=q.device).triu(1)
    D = (G[..., :, None] - G[..., None, :]).masked_fill(is_later, -math.inf).exp()
    decay = G.exp()[..., None]                           # since the start of the chunk
    decay_to_end = (G[..., -1:] - G).exp()[..., None]                              # [n, Hv, S, 1]

    k_beta = k * beta[..., None]                                                   # [n, Hv, S, Ek]
    system = (k_beta @ k.transpose(-1, -2)) * D          # below the diagonal, which counts as 1
    right_sides = torch.cat([v * beta[..., None], k_beta * decay], -1)
    solved = torch.linalg.solve_triangular(system, right_sides, upper=False, unitriangular=True)
    new_values, read_keys = solved.split([Ev, Ek], -1)

    state = q.new_zeros(len(order), *k.shape[1:2], Ek, Ev)                         # [D, Hv, Ek, Ev]
    states, written, finished = [state[:0]], [new_values[:0]], []
    steps = zip(counts, [*counts[1:], 0], new_values.split(counts), read_keys.split(counts),
                (k * decay_to_end).transpose(-1, -2).split(counts), decay[:, :, -1:].split(counts))
    for count, next_count, new_values_c, read_keys_c, keys_c, decay_c in steps:
        u = new_values_c - read_keys_c @ state                                     # [., Hv, S, Ev]
        states.append(state)
        written.append(u)
        state = state * decay_c + keys_c @ u
        finished.append(state[next_count:])              # of documents without another chunk
        state = state[:next_count]
    states = torch.cat(states)                           # before each chunk: [n, Hv, Ek, Ev]
    y = (q * decay) @ states + ((q @ k.transpose(-1, -2)) * D) @ torch.cat(written)
    finished = torch.cat(finished[::-1]) if finished else state
    return chunks.join(y), finished[order.argsort()]


def decode(layer, qkv, g, beta, weight, states):
    """mix() for the next token of B prompts, one step of the rule. Updates states[layer]:

    (the inputs of the convolution at the tokens before [B, kernel - 1, W], S [B, Hv, Ek, Ev])
    """
    inputs, S = states[layer]
    inputs = torch.cat([inputs, qkv[:, None]], 1)                                  # [B, kernel, W]
    convolved = (inputs.float() * weight.T).sum(1)                           # [B, W]
    q, k, v = layer.split_heads(layer.activation(convolved))
    S = S * g.exp()[..., None, None]
    stored = (k[..., None, :] @ S)[..., 0, :]                                      # [B, Hv, Ev]
    correction = beta[..., None] * (v - stored)
    S = S + k[..., :, None] * correction[..., None, :]
    states[layer] = (inputs[:, 1:], S)
    return (q[..., None, :] @ S)[..., 0, :] * layer.key_dim ** -0.5


@functools.cache
def flash_kernel():
    """The kernel of flash-linear-attention for CUDA, or None if that is not installed."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError:
        return None
    return chunk_gated_delta_rule


def flash_delta_rule(q, k, v, g, beta, layout, dtype):
    """chunked_delta_rule() by flash_kernel(), in dtype; without the states. Returns [T, Hv, Ev]."""
    end = torch.full_like(layout.cu_seqlens[:1], layout.n_tokens)
    cu_seqlens = torch.cat([layout.cu_seqlens, end]).long()      # padding is one more document
    q, k, v, g, beta = [x[None] for x in (q.to(dtype), k.to(dtype), v.to(dtype), g, beta)]
    y, _ = flash_kernel()(q, k, v, g, beta, cu_seqlens=cu_seqlens)
    return y[0]


# --------------------------------------------------------------------------------------------------
# what other files ask for

def new_values(name, shape, generator):
    """The values of a parameter that is no matrix, for a new model (arXiv:2405.21060, as in Mamba).

    The step of a token's decay is between 0.001 and 0.1, its rate A between 1 and 16.
    """
    uniform = torch.rand(shape, generator=generator)
    if name.endswith("A_log"):
        return (1 + 15 * uniform).log()
    if name.endswith("dt_bias"):
        dt = 0.001 * 100 ** uniform
        return dt.expm1().log()                          # the inverse of softplus
    if name.endswith("norm_weight"):
        return torch.ones(shape)
    bound = shape[-1] ** -0.5                            # conv_weight, as torch initializes it
    return (2 * uniform - 1) * bound


def flops_per_token(m):
    """Of forward and backward of mix(): the rule token by token, of which chunks compute more."""
    n_channels = 2 * m["linear_num_key_heads"] * m["linear_key_head_dim"]
    n_channels += m["linear_num_value_heads"] * m["linear_value_head_dim"]
    state = m["linear_num_value_heads"] * m["linear_key_head_dim"] * m["linear_value_head_dim"]
    # 3 products of the size of S, and the convolution; 2 operations; 1 forward + 2 backward
    return 6 * (3 * state + n_channels * m["linear_conv_kernel_dim"])
