"""Blocks of Gemma 4 (text). model.py imports this file for a model with model.block=gemma4.

Source: modeling_gemma4.py of transformers. Beside what the keys of Gemma 3 describe,

    values have a norm, without weights
    scores are not divided by sqrt(E): queries and keys have norms (model.attention_multiplier is 1)
    blocks with full attention have heads of another width, of which rope rotates a part, and may
        have fewer heads of keys and values. In the 31B, their values are the keys before norm and
        rope
    a block's output is multiplied by a number, which is not trained
    each block may have a second input [T, P] (E2B and E4B): see PerLayerEmbedding
    the last blocks may use the keys and values of the last block of their kind before them, and
        have wider MLPs (E2B and E4B)
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

import configs
import model as transformer


class PerLayerEmbedding(nn.Module):
    """The second input of all blocks, from the tokens and from the first block's input."""

    def __init__(self, m, padded_vocab_size):
        super().__init__()
        L = m["n_layers"]
        P = m["d_per_layer"]
        self.shape = (L, P)
        self.embed = transformer.Embedding(padded_vocab_size, L * P)
        self.proj = transformer.Linear(m["d_model"], L * P, bias=False)
        self.norm = transformer.Norm(m, P)

    def forward(self, tokens, x):                                                  # [T], [T, C]
        """Return [T, L, P]."""
        of_token = self.embed(tokens) * math.sqrt(self.shape[1])                   # [T, L P]
        projected = self.proj(x) * x.shape[1] ** -0.5                              # [T, L P]
        projected = self.norm(projected.unflatten(1, self.shape))                  # [T, L, P]
        of_token = of_token.to(x.dtype).unflatten(1, self.shape)                   # [T, L, P]
        return (projected + of_token) * 0.5 ** 0.5


class Block(transformer.Block):
    """A block with norms before and after attention and MLP, a second input, and a factor."""

    def __init__(self, m, layer_idx):
        if shares_keys(m, layer_idx) and m["double_wide_mlp"]:
            m = m | {"d_ff": 2 * m["d_ff"]}
        super().__init__(m, layer_idx)
        self.layer_idx = layer_idx
        self.per_layer_gate = None
        if m["d_per_layer"]:
            C = m["d_model"]
            P = m["d_per_layer"]
            self.activation = transformer.ACTIVATIONS[m["activation"]]
            self.per_layer_gate = transformer.Linear(C, P, bias=False)
            self.per_layer_proj = transformer.Linear(P, C, bias=False)
            self.per_layer_norm = transformer.Norm(m, C)
        self.output_weight = nn.Parameter(torch.empty(1), requires_grad=False)

    def make_attention(self, m, layer_idx):
        kind = SharedAttention if shares_keys(m, layer_idx) else Attention
        return kind(m, layer_idx)

    def forward(self, x, rope, layout, seeds=None):                                # x [T, C]
        """As model.Block.forward(). layout.shared is what blocks of one forward pass share."""
        x = super().forward(x, rope, layout, seeds)
        if self.per_layer_gate is not None:
            gate = self.activation(self.per_layer_gate(x, seeds))                  # [T, P]
            y = self.per_layer_proj(gate * layout.shared["inputs"][:, self.layer_idx], seeds)
            x = x + self.per_layer_norm(y)                                         # [T, C]
        return x * self.output_weight.to(x.dtype)


class Attention(transformer.Attention):
    """With a window or over all tokens (global): both kinds have heads of their own sizes."""

    def __init__(self, m, layer_idx):
        kind = transformer.layer_types(m)[layer_idx]
        is_global = kind == "full_attention"
        if is_global:
            m = m | {"head_dim": m["global_head_dim"] or m["head_dim"],
                     "n_kv_heads": m["n_global_kv_heads"] or m["n_kv_heads"]}
        super().__init__(m, layer_idx)
        self.kind = kind
        self.eps = m["norm_eps"]
        self.stores_keys = m["n_kv_shared_layers"] > 0
        if is_global and m["attention_k_eq_v"]:
            self.v_proj = None

    def project_queries(self, x, rope, seeds):                                     # [T, C]
        q = self.q_proj(x, seeds).unflatten(-1, (self.n_heads, self.head_dim))     # [T, H, E]
        return transformer.apply_rotary_emb(self.q_norm(q), *rope, self.rope_interleaved)

    def project(self, x, rope, seeds=None):                                        # [T, C]
        """Return q [T, H, E], k and v [T, K, E], normalized, q and k also rotated."""
        q_rope, k_rope = rope
        heads = (self.n_kv_heads, self.head_dim)
        k = self.k_proj(x, seeds).unflatten(-1, heads)                             # [T, K, E]
        v = k
        if self.v_proj is not None:
            v = self.v_proj(x, seeds).unflatten(-1, heads)                         # [T, K, E]
        k = transformer.apply_rotary_emb(self.k_norm(k), *k_rope, self.rope_interleaved)
        v = F.rms_norm(v.float(), (self.head_dim,), eps=self.eps).to(v.dtype)
        return self.project_queries(x, q_rope, seeds), k, v

    def mix(self, q, k, v, layout, seeds=None):
        if self.stores_keys:                 # each block replaces those of the one before
            layout.shared[self.kind] = (self, k, v)
        return transformer.attention(self, q, k, v, layout, seeds)                 # [T, H, E]


class SharedAttention(Attention):
    """Computes queries alone. Keys and values are those of the last Attention of its kind."""

    def __init__(self, m, layer_idx):
        super().__init__(m, layer_idx)
        own = transformer.layer_types(m)[:m["n_layers"] - m["n_kv_shared_layers"]]
        if self.kind not in own:
            raise configs.UserError(f"model.n_kv_shared_layers: none of the first {len(own)} "
                                    f"blocks has {self.kind}; a smaller number, or other "
                                    "model.layer_types")
        self.k_proj = None
        self.v_proj = None
        self.k_norm = None
        self.n_kv_heads = 0                  # for the prediction of memory

    def project(self, x, rope, seeds=None):
        q_rope, _ = rope
        return (self.project_queries(x, q_rope, seeds),)

    def mix(self, q, layout, seeds=None):
        layer, k, v = layout.shared[self.kind]
        # in generation, `layer` stores k and v in the KVCache once more, at the same position
        return transformer.attention(layer, q, k, v, layout, seeds)


def shares_keys(m, layer_idx):
    """Does this block use the keys and values of a block before it?"""
    return layer_idx >= m["n_layers"] - m["n_kv_shared_layers"]


def activation_bytes(m, element, kv_width):
    """What a block keeps per token for the backward pass, beside what blocks of other families do.

    kv_width  the mean of K E
    """
    bytes_per_token = 4 * kv_width           # values in fp32, before their norm
    if m["d_per_layer"]:
        # x; the gate before and after its activation, the second input before its norm and in the
        # end, the product of both
        bytes_per_token += element * (m["d_model"] + 5 * m["d_per_layer"])
    return bytes_per_token


# --------------------------------------------------------------------------------------------------
# Hugging Face's format

def unread_tensors(m, family):
    """The files' weights of keys and values in blocks that use those of another block instead."""
    tensors = []
    for i in range(m["n_layers"] - m["n_kv_shared_layers"], m["n_layers"]):
        for kind in ("k_proj", "v_proj", "k_norm"):
            name = family["weights"][f"blocks.{{i}}.attn.{kind}.weight"]
            tensors.append(name.replace("{i}", str(i)))
    return tuple(tensors)


def finish_hf_config(config, m):
    """Write rope per kind of block, as transformers reads it for this family alone, in place."""
    full = {"rope_theta": config.pop("rope_theta")} | config.pop("rope_scaling")
    local = {"rope_type": "default", "rope_theta": config.pop("rope_local_base_freq")}
    config["rope_parameters"] = {"full_attention": full, "sliding_attention": local}
    if m["d_per_layer"]:
        config["vocab_size_per_layer_input"] = m["vocab_size"]
