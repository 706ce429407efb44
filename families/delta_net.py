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
    n chunks of c tokens in each of d documents, which are padded to t tokens
"""
import functools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import model as transformer

CHUNK_SIZE = 64              # c. From 16 to 128, a block takes the same time (LOG.md, DeltaNet)


class GatedDeltaNet(nn.Module):
    """Replaces the Attention of a block."""

    is_local = False         # selects one of two ropes in Transformer; project() reads neither

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
        self.in_proj_z = transformer.Linear(C, value_width, bias=False)    # the gate of output()
        self.in_proj_b = transformer.Linear(C, Hv, bias=False)             # beta = sigmoid(b)
        self.in_proj_a = transformer.Linear(C, Hv, bias=False)             # g: see Decay
        self.conv_weight = nn.Parameter(torch.empty(W, 1, m["linear_conv_kernel_dim"]))
        self.decay = Decay(Hv)
        self.norm_weight = nn.Parameter(torch.empty(self.value_dim))
        self.out_proj = transformer.Linear(value_width, C, bias=False)

    def needs_probabilities(self, training, has_flex=False):
        """As in Attention, for the prediction of memory: there are none."""
        return False

    def project(self, x, rope, seeds=None):                                        # [T, C]
        """Return what mix() reads: qkv [T, W], and a and b [T, Hv], for g and beta."""
        return self.in_proj_qkv(x, seeds), self.in_proj_a(x, seeds), self.in_proj_b(x, seeds)

    def mix(self, qkv, a, b, layout, seeds=None):
        """The convolution and the delta rule within each document: y [T, Hv, Ev].

        qkv, a, b  what project() returns
        layout     see model.attention(). In generation, a KVCache holds the states
        """
        g = self.decay(a)                                                          # [T, Hv]
        beta = b.float().sigmoid()                                                 # [T, Hv]
        weight = self.conv_weight[:, 0].to(qkv.dtype).float()                      # [W, kernel]
        if layout.is_decoding:
            return self.decode(qkv, g, beta, weight, layout.states)
        outputs = []
        states = []
        for inputs in zip(layout.pad(qkv), layout.pad(g), layout.pad(beta)):       # [d, t, ...]
            if torch.is_grad_enabled():
                # Computed again in the backward pass: what is computed in here takes more memory
                # than the rest of the block, and less time.
                y, state = checkpoint(self.mix_documents, *inputs, weight,
                                      use_reentrant=False, preserve_rng_state=False)
            else:
                y, state = self.mix_documents(*inputs, weight)
            outputs.append(y)
            states.append(state)
        if layout.cache is not None:                     # in Prefill: keep the states for decode()
            # back from the order of the groups to that of the documents
            documents = [i for _, indices in layout.groups for i in indices]
            states = torch.cat(states)[torch.tensor(documents).argsort()]          # [D, Hv, Ek, Ev]
            inputs = last_inputs(qkv, weight.shape[1] - 1, layout.cu_seqlens)
            layout.cache.states[self] = (inputs, states)
        return layout.unpad(outputs)

    def mix_documents(self, qkv, g, beta, weight):
        """mix() of d documents, padded to t tokens: y [d, t, Hv, Ev], and S after each of them.

        Padding leaves S as it is, because its g and beta are 0.
        """
        q, k, v = self.split_heads(self.activation(convolve(qkv.float(), weight)))
        has_kernel = qkv.is_cuda and qkv.dtype != torch.float32 and flash_kernel()
        if has_kernel and qkv.shape[1] > 0:
            q, k, v = [x.to(qkv.dtype) for x in (q, k, v)]
            return flash_kernel()(q, k, v, g, beta, output_final_state=True)
        y, states = chunked_delta_rule(q, k, v, g, beta)
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

    def split_heads(self, qkv):                                                    # [..., W]
        """Return q, k [..., Hv, Ek] of length 1, and v [..., Hv, Ev]."""
        q, k, v = qkv.split(self.widths, -1)
        group_size = self.n_value_heads // self.n_key_heads
        q = unit_length(q.unflatten(-1, (self.n_key_heads, self.key_dim)))         # [..., Hk, Ek]
        k = unit_length(k.unflatten(-1, (self.n_key_heads, self.key_dim)))         # [..., Hk, Ek]
        v = v.unflatten(-1, (self.n_value_heads, self.value_dim))                  # [..., Hv, Ev]
        return q.repeat_interleave(group_size, -2), k.repeat_interleave(group_size, -2), v

    def output(self, y, x, seeds=None):
        """The block's output [T, C]: y [T, Hv, Ev] of mix(), normalized, and gated by the input of
        project(), x [T, C]."""
        z = self.in_proj_z(x, seeds).view_as(y)                                    # [T, Hv, Ev]
        weight = self.norm_weight.to(x.dtype).float()
        normalized = F.rms_norm(y.float(), weight.shape, weight, self.eps)
        gated = normalized * F.silu(z.float())
        return self.out_proj(gated.to(x.dtype).flatten(1), seeds)


class Decay(nn.Module):
    """g = -A dt: exp(g) is the decay of S' = -A S in a time step dt (Mamba 2).

    In fp32, because errors add up over a document. A module of its own, because FSDP casts the
    other weights of a block to the compute dtype.
    """

    def __init__(self, n_heads):
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(n_heads))
        self.dt_bias = nn.Parameter(torch.empty(n_heads))

    def forward(self, a):                                                          # [T, Hv]
        dt = F.softplus(a.float() + self.dt_bias.float())
        return -self.A_log.float().exp() * dt


def unit_length(x):
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def convolve(x, weight):                                                           # [d, t, W]
    """Causal convolution per channel, sum over j of weight[:, -1 - j] * x_(t - j): [d, t, W].

    weight [W, kernel]
    """
    y = x * weight[:, -1]
    for j in range(1, weight.shape[1]):
        earlier = F.pad(x, (0, 0, j, 0))[:, :x.shape[1]]                           # x_(t - j)
        y = y + earlier * weight[:, -1 - j]
    return y


def last_inputs(x, n, cu_seqlens):
    """The last n rows of each document in x [T, W], zeros before its first: [D, n, W]."""
    starts = cu_seqlens[:-1, None].long()
    ends = cu_seqlens[1:, None].long()
    index = ends - torch.arange(n, 0, -1, device=x.device)                         # [D, n]
    is_outside = index < starts
    return x[index.clamp(min=0)].masked_fill(is_outside[..., None], 0)


def split_chunks(x):                                                               # [d, t, Hv, ...]
    """[d, Hv, n, c, ...], with zeros after the last token."""
    n = max(1, math.ceil(x.shape[1] / CHUNK_SIZE))
    n_missing = n * CHUNK_SIZE - x.shape[1]
    zeros = x.new_zeros(len(x), n_missing, *x.shape[2:])
    x = torch.cat([x, zeros], 1).transpose(1, 2)                                 # [d, Hv, n c, ...]
    return x.unflatten(2, (n, CHUNK_SIZE)).contiguous()


def chunked_delta_rule(q, k, v, g, beta):
    """The delta rule by a few matrix products per chunk (section 3.3 of the paper).

    In a chunk, let G_r be the sum of g_1 ... g_r, D_ri = exp(G_r - G_i), and S the state before it.
    The state after token r is exp(G_r) S + sum over i <= r of D_ri k_i u_i^T, where u_r is what
    token r writes. The rule gives, for one u after another,

        u_r = beta_r (v_r - exp(G_r) S^T k_r - sum over i < r of D_ri (k_i . k_r) u_i)

    a triangular system for the u of the chunk (the WY form of arXiv:2406.06484), whose solution is
    linear in S: u = values - keys S. What does not depend on S is computed for all chunks at once.

    q, k  fp32 [d, t, Hv, Ek];  v  [d, t, Hv, Ev];  g, beta  [d, t, Hv]
    Returns y [d, t, Hv, Ev], and S after the last token [d, Hv, Ek, Ev].
    """
    _, t, _, Ek = k.shape
    Ev = v.shape[-1]
    q, k, v, g, beta = [split_chunks(x) for x in (q, k, v, g, beta)]
    ones = q.new_ones(CHUNK_SIZE, CHUNK_SIZE)
    # g.cumsum(-1), which has no deterministic kernel on CUDA
    G = g @ ones.triu()                                                            # [d, Hv, n, c]
    is_later = ones.triu(1).bool()
    D = (G[..., :, None] - G[..., None, :]).masked_fill(is_later, -math.inf).exp()
    since_start = G.exp()[..., None]                                              # [d, Hv, n, c, 1]
    until_end = (G[..., -1:] - G).exp()[..., None]
    chunk_decay = since_start[..., -1:, :]                                        # [d, Hv, n, 1, 1]

    k_T = k.transpose(-1, -2)                                                    # [d, Hv, n, Ek, c]
    k_beta = k * beta[..., None]
    system = (k_beta @ k_T) * D                          # its diagonal is read as 1
    right_sides = torch.cat([v * beta[..., None], k_beta * since_start], -1)
    solved = torch.linalg.solve_triangular(system, right_sides, upper=False, unitriangular=True)
    values, keys = solved.split([Ev, Ek], -1)

    state = q.new_zeros(*q.shape[:2], Ek, Ev)                                      # [d, Hv, Ek, Ev]
    states = []                                          # before each chunk
    written = []                                         # u of each chunk
    chunks = zip(*(x.unbind(2) for x in (values, keys, k * until_end, chunk_decay)))
    for values_c, keys_c, k_c, decay_c in chunks:
        u = values_c - keys_c @ state                                              # [d, Hv, c, Ev]
        states.append(state)
        written.append(u)
        state = state * decay_c + k_c.transpose(-1, -2) @ u
    from_states = (q * since_start) @ torch.stack(states, 2)                     # [d, Hv, n, c, Ev]
    from_chunk = ((q @ k_T) * D) @ torch.stack(written, 2)
    y = (from_states + from_chunk).flatten(2, 3)[:, :, :t] * Ek ** -0.5
    return y.transpose(1, 2), state


@functools.cache
def flash_kernel():
    """The kernel of flash-linear-attention for CUDA, or None if that is not installed."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError:
        return None
    return chunk_gated_delta_rule


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
    """Hv, Ek, Ev, W: see the top of the file."""
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
    # fp32 numbers: tensors like k, like v, of [c, c] per chunk, of [Ek, Ev] per chunk
    heads = 6 * Hv * Ek + 4 * Hv * Ev + 5 * Hv * CHUNK_SIZE + 2 * Hv * Ek * Ev / CHUNK_SIZE
    return 4 * ((kernel + 2) * W + heads)
