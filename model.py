"""A decoder-only transformer, described by the config's model section: GPT-2, Llama and relatives.

    python model.py out/ft                          chat with a trained model, in several turns
    python model.py out/ft "What is 12 + 30?"       one answer; without a terminal, also one for
                                                    each line of stdin
    python model.py out/ft prompts=FILE out=FILE    answers to .jsonl (messages or prompt) or the
                                                    lines of .txt, as .jsonl with generated_text
    python model.py data/base summary=true          shapes, parameters, FLOPs per token

Letters for shapes, in all seven files:

    T tokens of a micro-batch    D documents in it    N target tokens    B prompts of a generation
    C width (d_model)    H heads    K key/value heads    E width of a head (head_dim)
    F width of the MLP (d_ff)    V vocabulary (V' with padding)    L blocks
    d documents, padded to t tokens each    t' keys (= t, except in generation)

A micro-batch is one flat sequence of documents, as a dict of tensors:

    tokens [T]  targets [T] (-100: no loss)  loss_weights [T]  positions [T]  cu_seqlens [D+1]
    max_seqlen         int: the length of the longest document, or of the padding if it is longer
    doc_ids [D]        the index of each document in the dataset
    target_index [N]   where targets are not -100. Optional: on a GPU, counting them costs a sync
    noise_seed         (seed, step), of dropout and NEFTune. Optional: without it there are none

    tokens      t h e _ c a t | a _ d o g | .           cu_seqlens  0 7 12 13
    positions   0 1 2 3 4 5 6 | 0 1 2 3 4 | 0           attention and targets stop at each bar

Tokens after the last document are padding and belong to no document. This file knows nothing about
ranks: shard.py takes a finished model and parallelizes it. m is the config's model section, a dict;
in comments and messages, model.x is its key x.
"""
import collections
import contextlib
import dataclasses
import functools
import inspect
import json
import math
import re
import shutil
import signal
import sys
import zlib
from pathlib import Path

import configs

SAMPLING = {                 # arguments of generate(), and their defaults: greedy
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "seed": 0,
    "max_tokens": 256,
}
OPTIONS = SAMPLING | {       # of the command line
    "prompt": "",            # for a prompt that would be read as an option: prompt="top_k=5"
    "prompts": "",
    "out": "",               # empty: to stdout
    "batch_size": 16,        # prompts that are answered at once
    "device": "auto",
    "dtype": "auto",
    "summary": False,
}
CHOICES = {"device": ("auto", "cpu", "cuda"), "dtype": ("auto", "float32", "bfloat16", "float16")}


def parse_arguments(argv):
    """The command line as (folder of the model, prompt, options)."""
    options, words = configs.pop_options(argv, **OPTIONS)
    configs.check_words(words, options)                  # raises if a word is a mistyped option
    if not words:
        raise configs.UserError('python model.py PATH ["PROMPT"] [temperature=0.8 top_k=0 '
                                "top_p=1.0 seed=0 max_tokens=256 prompt=PROMPT prompts=FILE "
                                "out=FILE batch_size=16 device=auto dtype=auto summary=true]")
    folder = configs.resolve_model_dir(words[0])
    # again, now with the defaults of the model in this folder
    options, _ = configs.pop_options(argv, **OPTIONS | sampling_defaults(folder))
    for key, choices in CHOICES.items():
        if options[key] not in choices:
            raise configs.UserError(f"{key}: must be one of {', '.join(choices)}; got "
                                    f"{options[key]}")
    prompts, out = options["prompts"], options["out"]
    if prompts and not prompts.endswith((".jsonl", ".txt")):
        raise configs.UserError(f"prompts: must be a .jsonl or .txt file; got {prompts}")
    if out and Path(out).exists():
        raise configs.UserError(f"out: {out} exists; name another file")
    if out and not prompts:
        raise configs.UserError("out: has no effect without prompts=FILE; remove it")
    if options["batch_size"] < 1:
        raise configs.UserError(f"batch_size: must be at least 1; got {options['batch_size']}")
    prompt = options.pop("prompt") or " ".join(words[1:])
    return folder, prompt, options


def sampling_defaults(folder):
    """The defaults of sampling options that a model's generation_config.json gives."""
    path = folder / "generation_config.json"
    config = configs.read_json(path) if path.is_file() else {}
    defaults = {"max_tokens": config.get("max_new_tokens")}
    if config.get("do_sample"):
        defaults |= {"temperature": config.get("temperature", 1.0),
                     "top_k": config.get("top_k"), "top_p": config.get("top_p")}
    # JSON may have 1 for 1.0
    return {key: type(SAMPLING[key])(value) for key, value in defaults.items()
            if isinstance(value, (int, float))}


if __name__ == "__main__":    # report mistakes before the slow import
    configs.exit_with_help(__doc__, sys.argv[1:])         # if there are no arguments, or --help
    configs.run(parse_arguments, sys.argv[1:])

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import log

IGNORE_INDEX = -100          # the target of a token without a loss


# --------------------------------------------------------------------------------------------------
# layers

class Linear(nn.Linear):
    """nn.Linear that computes in the dtype of its input; the weights may stay in fp32."""

    def reset_parameters(self):
        """Does nothing: load_weights() sets the weights. (On the meta device, torch's
        initialization would import the compiler, which takes seconds.)"""

    def forward(self, x, seeds=None):
        """seeds  of the dropout that only shard.LoRALinear has: see token_seeds()"""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Embedding(nn.Embedding):
    reset_parameters = Linear.reset_parameters


class Norm(nn.Module):
    """RMSNorm (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450). Statistics are in fp32."""

    def __init__(self, m, width):
        super().__init__()
        self.eps = m["norm_eps"]
        self.offset = m["norm_offset"]
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if m["norm"] == "layernorm" else None

    def forward(self, x):
        weight = self.weight.to(x.dtype)     # FSDP gathers it in this dtype; without FSDP the same
        if self.bias is None and not x.is_cuda and not torch.compiler.is_compiling():
            # F.rms_norm with a faster backward pass. Not under torch.compile: torch 2.11 compiles
            # CPURMSNorm without its gradients.
            if self.offset:                  # in fp32; F.rms_norm needs x and weight in one dtype
                weight = weight.float() + self.offset
            return CPURMSNorm.apply(x, weight, self.eps)
        if self.offset:
            weight = weight + self.offset
        if self.bias is None:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return F.layer_norm(x, weight.shape, weight, self.bias.to(x.dtype), self.eps)


def rope_freqs(positions, m, lengths=None):
    """Return cos and sin of the rotary embedding (arXiv:2104.09864), each [T, 1, R/2] in fp32.

    positions [T]. The first R = partial_rotary_factor * E numbers of a head are rotated. Angles are
    computed in fp64: at position 100,000, fp32 would be off by more than the rounding of bf16.

    lengths [T], of each token's document. Only longrope needs them
    """
    R = int(m["head_dim"] * m["partial_rotary_factor"])
    first_of_pair = torch.arange(0, R, 2, device=positions.device)
    freqs = m["rope_theta"] ** (-first_of_pair.double() / R)                       # [R/2]
    scale = 1.0
    if m["rope_scaling"]:
        from families import rope_scaling
        freqs, scale = rope_scaling.scale_freqs(freqs, m, lengths)
    angles = positions.double()[:, None, None] * freqs                             # [T, 1, R/2]
    return (scale * angles.cos()).float(), (scale * angles.sin()).float()


def apply_rotary_emb(x, cos, sin, interleaved=False):
    """Rotate the pairs (x_i, x_(i + R/2)) of every head, or (x_(2i), x_(2i + 1)) if interleaved.

    x [T, H, E]; cos, sin [T, 1, R/2]
    """
    R = 2 * cos.shape[-1]
    shape = (R // 2, 2) if interleaved else (2, R // 2)
    dim = -1 if interleaved else -2                      # of the two numbers of a pair
    x1, x2 = x[..., :R].float().unflatten(-1, shape).unbind(dim)                   # [T, H, R/2]
    y1 = x1 * cos - x2 * sin
    y2 = x2 * cos + x1 * sin
    rotated = torch.stack([y1, y2], dim).flatten(-2).to(x.dtype)                   # [T, H, R]
    if R == x.shape[-1]:
        return rotated
    return torch.cat([rotated, x[..., R:]], -1)


def softcap(x, cap):
    """Bound x smoothly between -cap and cap (Gemma 2, arXiv:2408.00118, section 2)."""
    return cap * (x / cap).tanh()


# model.score_mod: (attention scores, **model.score_mod_options) -> scores, both fp32 of any shape,
# after scale and softcap and before the mask. Add your own to SCORE_MODS. It must treat each score
# alone: on CUDA, flex_attention() compiles it into its kernel, where `scores` is a single number.

def unchanged(scores):
    return scores


SCORE_MODS = {"none": unchanged}


class Attention(nn.Module):
    """The projections around attention(), and the settings that it reads."""

    def __init__(self, m, layer_idx):
        super().__init__()
        self.n_heads = m["n_heads"]
        self.n_kv_heads = m["n_kv_heads"]
        self.head_dim = m["head_dim"]
        self.scale = m["attention_multiplier"] or self.head_dim ** -0.5
        self.is_local = layer_types(m)[layer_idx] == "sliding_attention"
        # the number of tokens that a token attends to, itself included, or None: all before it
        self.window = m["sliding_window"] if self.is_local else None
        self.use_rope = m["positions"] == "rope" and has_rope(m, layer_idx)
        self.rope_interleaved = m["rope_interleaved"]
        self.dropout = m["attn_pdrop"]
        self.softcap = m["attn_softcap"]
        self.score_mod = configs.bind_options("model.score_mod", SCORE_MODS[m["score_mod"]],
                                              given=1,   # the scores
                                              options=m["score_mod_options"])
        # attention sinks (arXiv:2508.10925): each head has one more key, without a value. This is
        # its logit
        self.sinks = nn.Parameter(torch.empty(m["n_heads"])) if m["attn_sinks"] else None
        # flex_attention() is the only kernel that computes softcap, score_mod and sinks
        self.needs_flex = bool(m["attn_softcap"] or m["score_mod"] != "none" or m["attn_sinks"])

        C = m["d_model"]
        E = self.head_dim
        q_width = self.n_heads * E
        kv_width = self.n_kv_heads * E
        bias = m["qkv_bias"]
        self.q_proj = Linear(C, q_width, bias=bias)
        self.k_proj = Linear(C, kv_width, bias=bias)
        self.v_proj = Linear(C, kv_width, bias=bias)
        # the gate of each number before o_proj (arXiv:2505.06708, Qwen3.5)
        self.gate_proj = Linear(C, q_width, bias=bias) if m["attention_gate"] else None
        self.o_proj = Linear(q_width, C, bias=m["out_bias"])
        self.qk_norm = m["qk_norm"]
        if self.qk_norm in ("head", "head_after_rope"):  # of each head (arXiv:2302.05442)
            self.q_norm = Norm(m, E)
            self.k_norm = Norm(m, E)
        elif self.qk_norm == "all":                      # of all heads together
            self.q_norm = Norm(m, q_width)
            self.k_norm = Norm(m, kv_width)

    def needs_probabilities(self, training, has_flex=False):
        """Does padded_attention() compute the softmax itself, instead of calling a kernel?

        It does for dropout, because kernels use torch's random generator, not our seeds; and for
        softcap, sinks and score_mod, unless flex_attention() computes these (has_flex). If you
        change the probabilities in padded_attention() in another way, return True here.

        training  will dropout be applied?
        """
        return (self.needs_flex and not has_flex) or (training and self.dropout > 0)

    def change_scores(self, scores):
        """softcap and score_mod of scaled scores in fp32: of all pairs in padded_attention(), of
        one pair in flex_attention(). So a change here must treat each score alone."""
        if self.softcap:
            scores = softcap(scores, self.softcap)
        return self.score_mod(scores)

    def project(self, x, rope, seeds=None):                                        # [T, C]
        """Return q [T, H, E], k and v [T, K, E], normalized and rotated."""
        q = self.q_proj(x, seeds)                                                  # [T, H E]
        k = self.k_proj(x, seeds)                                                  # [T, K E]
        v = self.v_proj(x, seeds)                                                  # [T, K E]
        if self.qk_norm == "all":
            q = self.q_norm(q)
            k = self.k_norm(k)
        q = q.unflatten(-1, (self.n_heads, self.head_dim))                         # [T, H, E]
        k = k.unflatten(-1, (self.n_kv_heads, self.head_dim))                      # [T, K, E]
        v = v.unflatten(-1, (self.n_kv_heads, self.head_dim))                      # [T, K, E]
        if self.qk_norm == "head":
            q = self.q_norm(q)
            k = self.k_norm(k)
        if self.use_rope:
            q_rope, k_rope = rope
            q = apply_rotary_emb(q, *q_rope, self.rope_interleaved)
            k = apply_rotary_emb(k, *k_rope, self.rope_interleaved)
        if self.qk_norm == "head_after_rope":
            q = self.q_norm(q)
            k = self.k_norm(k)
        return q, k, v

    def mix(self, q, k, v, layout, seeds=None):
        """What a Block calls between project() and output(). GatedDeltaNet has the same three."""
        return attention(self, q, k, v, layout, seeds)                             # [T, H, E]

    def output(self, y, x, seeds=None):
        """The output projection [T, C].

        y  [T, H, E], what mix() returns
        x  [T, C], what project() has read
        """
        y = y.flatten(1)                                                           # [T, H E]
        if self.gate_proj is not None:
            y = y * self.gate_proj(x, seeds).sigmoid()
        return self.o_proj(y, seeds)


def layer_types(m):
    """The kind of each block's attention: sliding_attention, full_attention or linear_attention.

    Without model.layer_types, all blocks are sliding_attention, or full_attention if
    model.sliding_window is null. The last block of a Gemma 4 is always full_attention.
    """
    pattern = m["layer_types"] or ["sliding_attention"]
    if m["sliding_window"] is None:
        pattern = ["full_attention" if kind == "sliding_attention" else kind for kind in pattern]
    kinds = [pattern[i % len(pattern)] for i in range(m["n_layers"])]
    if m["block"] == "gemma4":
        kinds[-1] = "full_attention"
    return kinds


def has_rope(m, layer_idx):
    """Does this block of a model with positions=rope rotate q and k?

    model.rope_layers is null (all blocks do), a list with 1 (does) or 0 per block, or
    "sliding_attention": blocks with a window do, and all if no block has one.
    """
    if m["rope_layers"] is None:
        return True
    if m["rope_layers"] == "sliding_attention":
        return m["sliding_window"] is None or layer_types(m)[layer_idx] == "sliding_attention"
    return m["rope_layers"][layer_idx] == 1


def attention(layer, q, k, v, layout, seeds=None):
    """softmax(scale * q k^T) v within each document, for training and for generation.

    layer   an Attention, for its settings
    q       [T, H, E];  k, v  [T, K, E]
    layout  PackedDocuments (training), Prefill (prompts) or KVCache (a new token per prompt):
                is_decoding         is it a KVCache?
                use_varlen          may varlen_attention() be called?
                flex_attention      the compiled flex_attention() or None; block_mask() is its mask
                padded_groups(...)  yields the arguments of padded_attention(), group by group
                unpad(outputs)      [d, t, H, E] of each group -> [T, H, E]
    seeds   int32 [T], of the dropout of the probabilities. None: no dropout
    Returns [T, H, E].
    """
    sinks = None if layer.sinks is None else layer.sinks.to(q.dtype)     # as in Norm.forward()
    # flex_attention() fails for a micro-batch without tokens
    has_flex = layout.flex_attention is not None and len(q) > 0
    need_probs = layer.needs_probabilities(seeds is not None, has_flex)
    if layer.needs_flex and not need_probs:
        return layout.flex_attention(layer, q, k, v, layout.block_mask(layer.window), sinks)
    if layout.use_varlen and layer.head_dim <= MAX_VARLEN_WIDTH and not need_probs:
        return varlen_attention(layer, q, k, v, layout)
    outputs = []
    groups = layout.padded_groups(layer, q, k, v, seeds, need_mask=need_probs)
    for q_d, k_d, v_d, mask, seeds_d in groups:
        y = padded_attention(layer, q_d, k_d, v_d, mask, seeds_d, sinks)           # [d, H, t, E]
        outputs.append(y.transpose(1, 2).to(q.dtype))
    return layout.unpad(outputs)


def padded_attention(layer, q, k, v, mask, seeds, sinks):
    """attention() of d documents, padded to t tokens. Returns [d, H, t, E].

    q      [d, H, t, E];  k, v  [d, K, t', E];  seeds  [d, t]
    mask   True where a query sees a key; broadcasts to [d, 1, t, t']. None: causal
    sinks  [H] or None: logits of one more key per head, which has no value
    """
    need_probs = layer.needs_probabilities(training=seeds is not None)
    # The softmax below needs H heads of k and v, and so do CUDA's kernels for fp32 or with a mask
    if q.is_cuda or need_probs:
        group_size = layer.n_heads // layer.n_kv_heads
        k = k.repeat_interleave(group_size, 1)                                     # [d, H, t', E]
        v = v.repeat_interleave(group_size, 1)                                     # [d, H, t', E]
    if not need_probs:
        # On CUDA, varlen_attention() is called instead wherever it can be: change both.
        return F.scaled_dot_product_attention(
            q, k, v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=layer.scale,
            enable_gqa=q.shape[1] > k.shape[1])
    scores = q @ k.transpose(-1, -2)                                               # [d, H, t, t']
    scores = scores.float() * layer.scale
    scores = layer.change_scores(scores)
    scores = scores.masked_fill(~mask, -math.inf)
    if sinks is not None:
        sinks = sinks.float()[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], -1)                                    # [d, H, t, t'+1]
    probs = scores.softmax(-1)[..., :k.shape[2]]                                   # [d, H, t, t']
    if seeds is not None and layer.dropout:
        probs = dropout(probs, layer.dropout, head_seeds(seeds, layer.n_heads))
    return probs.to(v.dtype) @ v


# On a CPU, attention of documents of fewer tokens is computed in fp32: in bf16 it takes six times
# as long at 68 tokens, 1.15 times at 200, and 0.75 times at 512 (LOG.md, CPU throughput).
FP32_ATTENTION_BELOW = 256


@dataclasses.dataclass
class PackedDocuments:
    """The documents of a micro-batch, padded in groups of similar length for attention().

    A group takes documents whose length is at least 2/3 of its longest. Lengths 4 2 5 become two
    groups: documents 2 and 0, padded to 5 tokens each, and document 1. Padding is appended to a
    document, so in a causal model none of its tokens attends to it. The tokens after the last
    document (the padding of the micro-batch) count as one more document.

    cu_seqlens  int32 [D+1];  n_tokens  T, with padding;  max_seqlen  int
    use_varlen  attention() may call the kernel for packed documents
    cache       the KVCache that generation continues from
    """

    cu_seqlens: torch.Tensor
    n_tokens: int
    max_seqlen: int
    use_varlen: bool = False
    cache: object = None
    flex_attention: object = None                                    # compiled
    block_masks: dict = dataclasses.field(default_factory=dict)      # {window: BlockMask}
    is_decoding = False               # as in KVCache; not a field

    @functools.cached_property        # computed only if it is needed: on a GPU it costs a sync
    def lengths(self):
        """The number of tokens of each document, and of the padding: [int]."""
        boundaries = [*self.cu_seqlens.tolist(), self.n_tokens]
        return [end - start for start, end in zip(boundaries, boundaries[1:])]

    @functools.cached_property
    def have_equal_lengths(self):
        """Are all documents that are not empty equally long, as when a text is cut into windows?
        Then x [T, ...] is reshaped to [d, t, ...], without padding and copies."""
        return len(set(self.lengths) - {0}) == 1

    @functools.cached_property
    def groups(self):
        """[(number of tokens to pad to, indices of the documents)]"""
        documents = range(len(self.lengths))
        longest_first = sorted(documents, key=self.lengths.__getitem__, reverse=True)
        groups = []
        for i in longest_first:
            length = self.lengths[i]
            # From here on all are empty, and left out. If the first is, one empty group is kept,
            # because torch.cat() in unpad() needs an output.
            if groups and length == 0:
                break
            if not groups or 3 * length < 2 * groups[-1][0]:
                groups.append((length, []))
            groups[-1][1].append(i)
        return groups

    def padded_groups(self, layer, q, k, v, seeds, need_mask):
        """Yield (q, k, v, mask, seeds) of each group, for padded_attention().

        need_mask  the mask must not be None: padded_attention() computes the softmax itself
        """
        no_seeds = [None] * len(self.groups)
        seeds_of_groups = no_seeds if seeds is None else self.pad(seeds)
        for *qkv, seeds_d in zip(self.pad(q), self.pad(k), self.pad(v), seeds_of_groups):
            length = qkv[0].shape[1]                     # of q [d, t, H, E]
            if not q.is_cuda and length < FP32_ATTENTION_BELOW:
                qkv = [x.float() for x in qkv]
            window = min(layer.window or length, length)
            mask = None
            if need_mask or window < length:
                mask = causal_mask(length, window, q.device)                       # [t, t]
            q_d, k_d, v_d = [x.transpose(1, 2) for x in qkv]             # [d, H or K, t, E]
            yield q_d, k_d, v_d, mask, seeds_d

    def pad(self, x):
        """Yield x [T, ...] as [d, t, ...] of each group, with zeros after shorter documents."""
        if self.have_equal_lengths:                      # one group
            [(length, _)] = self.groups
            yield x.unflatten(0, (-1, length))
            return
        documents = x.split(self.lengths)
        for length, indices in self.groups:
            zeros = x.new_zeros(length, *x.shape[1:])
            parts = []
            for i in indices:
                parts += [documents[i], zeros[self.lengths[i]:]]
            yield torch.cat(parts).unflatten(0, (len(indices), length))

    @torch.no_grad()          # create_block_mask() is compiled once for training and validation
    def block_mask(self, window):
        """The mask of flex_attention(), which all blocks of the model with this window share.

        It stores which tiles of 128 queries and 128 keys have pairs to compute.
        """
        from torch.nn.attention.flex_attention import create_block_mask
        if window in self.block_masks:
            return self.block_masks[window]
        T = self.n_tokens
        tokens = torch.arange(T, device=self.cu_seqlens.device)
        documents = torch.bucketize(tokens, self.cu_seqlens, right=True) - 1       # padding: D
        first_keys = self.cu_seqlens[documents]                                    # [T]
        if window:
            first_keys = first_keys.maximum(tokens - window + 1).int()

        def is_seen(b, h, query, key):
            return (first_keys[query] <= key) & (key <= query)

        if tokens.is_cuda:                               # uncompiled, it stores all T x T pairs
            create_block_mask = torch.compile(create_block_mask, dynamic=True)
        self.block_masks[window] = create_block_mask(is_seen, None, None, T, T, tokens.device)
        return self.block_masks[window]

    def unpad(self, outputs):
        """[d, t, H, E] of each group -> [T, H, E]"""
        if self.have_equal_lengths:
            return outputs[0].flatten(0, 1)
        documents = {}                                   # {index: [length, H, E]}, no empty ones
        for output, (_, indices) in zip(outputs, self.groups):
            for document, i in zip(output, indices):                               # [t, H, E]
                documents[i] = document[:self.lengths[i]]
        return torch.cat([documents[i] for i in sorted(documents)])


def causal_mask(length, window, device):
    """[length, length], True where a query (row) sees a key: itself and window - 1 before it."""
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions
    return (distance >= 0) & (distance < window)


@functools.cache
def varlen_parameters():
    """The names of the parameters of varlen_attn, which differ between versions of torch."""
    from torch.nn.attention.varlen import varlen_attn
    return frozenset(inspect.signature(varlen_attn).parameters)


MAX_VARLEN_WIDTH = 256       # of a head


def varlen_attention(layer, q, k, v, documents):
    """attention() of PackedDocuments by a CUDA kernel for bf16 and fp16. Returns [T, H, E]."""
    from torch.nn.attention.varlen import varlen_attn
    if not len(q):
        # The kernel's backward pass fails without tokens. Return an empty tensor that depends on
        # q, k and v, so that all three get gradients.
        return q + k.sum() + v.sum()
    cu_seqlens = documents.cu_seqlens
    end = torch.full_like(cu_seqlens[:1], documents.n_tokens)
    cu_seqlens = torch.cat([cu_seqlens, end])            # padding is one more document, maybe empty
    max_seqlen = max(documents.max_seqlen, 1)
    options = {}
    if "enable_gqa" in varlen_parameters():      # torch 2.11 takes grouped heads without it
        options["enable_gqa"] = layer.n_heads > layer.n_kv_heads
    n_before = layer.window - 1 if layer.window else -1  # keys before a query that it sees; -1: all
    return varlen_attn(
        q.contiguous(), k.contiguous(), v.contiguous(),
        cu_seqlens, cu_seqlens,
        max_seqlen, max_seqlen,
        window_size=(n_before, 0), scale=layer.scale, **options)


def flex_attention(layer, q, k, v, block_mask, sinks):
    """attention() of PackedDocuments with changed scores, by a CUDA kernel. Returns [T, H, E].

    shard.parallelize() compiles it into a kernel that has change_scores() in it. With
    shard.compile=false it is not called: uncompiled, torch's function stores the probabilities of
    all T x T pairs, and padded_attention() only those within documents.
    """
    from torch.nn.attention import flex_attention as flex

    def score_mod(score, b, h, query, key):
        return layer.change_scores(score.float())

    q, k, v = [x.transpose(0, 1)[None] for x in (q, k, v)]               # [1, H or K, T, E]
    y, aux = flex.flex_attention(
        q, k, v, score_mod, block_mask,
        scale=layer.scale, enable_gqa=True, return_aux=flex.AuxRequest(lse=True))
    y = y[0].transpose(0, 1)                                                       # [T, H, E]
    if sinks is None:
        return y
    # aux.lse is the log of the sum of exp(score) over keys. The sink's exp(logit) joins that sum.
    share_of_keys = (aux.lse[0].T - sinks.float()).sigmoid()                       # [T, H]
    return (y * share_of_keys[..., None]).to(y.dtype)


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


def relu_squared(x):
    """arXiv:2109.08668"""
    return F.relu(x).square()


ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "relu2": relu_squared,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
}


class MLP(nn.Module):
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))) without model.glu."""

    def __init__(self, m):
        super().__init__()
        C = m["d_model"]
        d_ff = m["d_ff"]
        bias = m["mlp_bias"]
        self.activation = ACTIVATIONS[m["activation"]]
        self.gate_proj = Linear(C, d_ff, bias=bias) if m["glu"] else None
        self.up_proj = Linear(C, d_ff, bias=bias)
        self.down_proj = Linear(d_ff, C, bias=bias)

    def forward(self, x, seeds=None):                                              # [T, C]
        h = self.up_proj(x, seeds)                                                 # [T, F]
        if self.gate_proj is None:
            h = self.activation(h)
        else:
            h = self.activation(self.gate_proj(x, seeds)) * h
        return self.down_proj(h, seeds)


def make_mlp(m):
    if not m["n_experts"]:
        return MLP(m)
    from families import moe
    return moe.MixtureOfExperts(m)


class Block(nn.Module):
    """x + post_norm1(attention(norm1(x))), then + post_norm2(mlp(norm2(x))).

    norm_place         before: without post_norm1 and post_norm2; after: with these two alone
                       (OLMo2); both: with all four (Gemma 2)
    parallel_residual  attention and MLP both read the block's input (GPT-NeoX, Phi)
    shared_norm        of a parallel block: both read norm1(x) (Phi)

    forward() is in three parts because shard.compile_blocks() compiles the first and the last: they
    depend on the number of tokens alone, attention also on where documents begin.
    """

    def __init__(self, m, layer_idx):
        super().__init__()
        self.parallel_residual = m["parallel_residual"]
        self.shared_norm = m["shared_norm"]
        self.residual_multiplier = m["residual_multiplier"]
        self.dropout = m["resid_pdrop"]
        C = m["d_model"]
        has_norms = m["norm_place"] in ("before", "both")
        has_post_norms = m["norm_place"] in ("after", "both")
        self.norm1 = Norm(m, C) if has_norms else None
        self.attn = self.make_attention(m, layer_idx)
        self.post_norm1 = Norm(m, C) if has_post_norms else None
        self.norm2 = Norm(m, C) if has_norms and not m["shared_norm"] else None
        self.mlp = make_mlp(m)
        self.post_norm2 = Norm(m, C) if has_post_norms else None

    def make_attention(self, m, layer_idx):
        """The attention of this block, or the GatedDeltaNet that replaces it."""
        if layer_types(m)[layer_idx] != "linear_attention":
            return Attention(m, layer_idx)
        from families import delta_net
        return delta_net.GatedDeltaNet(m)

    def forward(self, x, rope, layout, seeds=None):                                # x [T, C]
        """rope: see Transformer.rope(); seeds int32 [T] of this block's dropouts, or None."""
        h, *projected = self.pre_attention(x, rope, seeds)
        attention_seeds = None if seeds is None else hash_int32(seeds)
        y = self.attn.mix(*projected, layout, attention_seeds)                     # [T, H, E]
        return self.post_attention(x, h, y, seeds)

    def pre_attention(self, x, rope, seeds=None):
        """Return h [T, C], the input of the projections, and what they return: q, k, v."""
        h = x if self.norm1 is None else self.norm1(x)
        return h, *self.attn.project(h, rope, seeds)

    def post_attention(self, x, h, y, seeds):
        """Return the block's output [T, C].

        x  [T, C], the block's input
        h  [T, C], the input of q_proj, k_proj and v_proj: see pre_attention()
        y  [T, H, E], the output of attention()
        """
        y = self.attn.output(y, h, seeds)                                          # [T, C]
        if self.post_norm1 is not None:
            y = self.post_norm1(y)
        sum1 = self.add(x, y, seeds, 1)
        if not self.shared_norm:             # otherwise the MLP reads h, as attention does
            h = x if self.parallel_residual else sum1
            if self.norm2 is not None:
                h = self.norm2(h)
        y = self.mlp(h, seeds)
        if self.post_norm2 is not None:
            y = self.post_norm2(y)
        return self.add(sum1, y, seeds, 2)

    def add(self, x, y, seeds, place):
        """x + y, with residual_multiplier and dropout. `place` makes the two dropouts differ."""
        if self.residual_multiplier != 1.0:
            y = y * self.residual_multiplier
        if seeds is not None and self.dropout:
            y = dropout(y, self.dropout, hash_int32(seeds + place))
        return x + y


def make_block(m, layer_idx):
    if m["block"] == "plain":
        return Block(m, layer_idx)
    from families import gemma4
    return gemma4.Block(m, layer_idx)


# --------------------------------------------------------------------------------------------------
# noise: dropout and NEFTune hash seed, step, document, position in the document and place in the
# model. Unlike that of a random generator, this noise does not depend on packing, ranks or
# resuming. token_seeds() gives one seed per token. Each place hashes it again with its own offset,
# so that no two places have the same noise:
#
#     embedding dropout         seeds
#     NEFTune                   hash(seeds - 1)
#     block i                   s = hash(seeds + i + 1)
#     its attention             hash(s), which head_seeds() hashes once more per head
#     its two residuals         hash(s + 1), hash(s + 2)
#     adapter n of a block      hash(s + 3 + n) (shard.add_lora)

def hash_int32(x):
    """Scramble int32 (the hash lowbias32, github.com/skeeto/hash-prospector)."""
    x = x.int()
    x = (x ^ ((x >> 16) & 0xffff)) * 0x7feb352d          # & clears copies of the sign bit
    x = (x ^ ((x >> 15) & 0x1ffff)) * (0x846ca68b - 2**32)     # - 2**32: the same bits in int32
    return x ^ ((x >> 16) & 0xffff)


def document_index(batch):
    """The number 0 ... D-1 of each token's document in the micro-batch, D of padding: int64 [T]."""
    ends = batch["cu_seqlens"][1:].long()
    tokens = torch.arange(len(batch["tokens"]), device=ends.device)
    return torch.bucketize(tokens, ends, right=True)


def document_lengths(batch):
    """The length of each token's document: int64 [T]. In generation, its final length at most."""
    if "document_lengths" in batch:
        return batch["document_lengths"]
    lengths = batch["cu_seqlens"].long().diff()                                    # [D]
    return F.pad(lengths, (0, 1))[document_index(batch)]         # padding: 0


def token_seeds(batch):
    """The seed of each token's noise, hashed from noise_seed, document and position: int32 [T]."""
    seed = zlib.crc32(str(batch["noise_seed"]).encode()) - 2**31     # uint32 -> int32
    documents = F.pad(batch["doc_ids"], (0, 1))[document_index(batch)].int()
    document_seeds = hash_int32(documents ^ seed)                                  # [T]
    return hash_int32(document_seeds + batch["positions"].int())


def head_seeds(seeds, n_heads):
    """Seeds int32 [d, t] -> one per head: [d, H, t]."""
    heads = torch.arange(n_heads, device=seeds.device)
    offsets = hash_int32(heads)[:, None]                                           # [H, 1]
    return hash_int32(seeds[:, None, :] + offsets)


def random_int32(seeds, width):
    """Seeds int32 [...] -> random numbers [..., width], uniform in the range of int32."""
    columns = torch.arange(width, device=seeds.device)
    return hash_int32(seeds[..., None] ^ hash_int32(columns))


def dropout(x, p, seeds):
    """Set each number of x to 0 with probability p, and divide the others by 1 - p.

    seeds  int32, of the shape of x without its last dimension
    """
    smallest_kept = int(p * 2**32) - 2**31
    keep = random_int32(seeds, x.shape[-1]) >= smallest_kept
    return torch.where(keep, x / (1 - p), 0.0)


# --------------------------------------------------------------------------------------------------
# embeddings, one of which model.embed names: functions of (Transformer, micro-batch,
# **model.embed_options) -> [T, C]. Add your own to EMBEDDINGS.
#
# An embedding with parameters is a subclass of nn.Module: made by (m, **model.embed_options) and
# called with (Transformer, micro-batch). Its parameters are named embedding.* and initialized by
# NewWeights, with the class's attribute init_std instead of model.init_std if it has one. A
# pretrained model that lacks them gets new ones. Only model.family=native exports them.

def plain(model, batch):
    return model.embed(batch["tokens"])


def scaled(model, batch):
    """Times sqrt(C) (arXiv:1706.03762, section 3.4).

    model.embedding_multiplier=sqrt_d_model computes the same, but only some families have a key for
    it in config.json. For this one, save_pretrained() multiplies the exported weights.
    """
    return plain(model, batch) * math.sqrt(model.cfg["d_model"])


def neftune(model, batch, alpha):
    """In training, add noise U(-1, 1) * alpha / sqrt(n C) in a document of n tokens
    (arXiv:2310.05914)."""
    x = plain(model, batch)
    if not model.has_noise(batch):
        return x
    C = x.shape[1]
    seeds = hash_int32(token_seeds(batch) - 1)                                     # [T]
    noise = random_int32(seeds, C) / 2**31                                         # [T, C]
    lengths = document_lengths(batch)[:, None].clamp(min=1)                        # [T, 1]
    return x + noise * alpha / (lengths.float() * C).sqrt()


EMBEDDINGS = {"plain": plain, "scaled": scaled, "neftune": neftune}


def make_embedding(m):
    """The function that model.embed names, with its options bound, or an instance of the class."""
    embedding = EMBEDDINGS[m["embed"]]
    is_module = inspect.isclass(embedding)
    n_given = 1 if is_module else 2      # parameters before the options: (m), or (model, batch)
    embedding = configs.bind_options("model.embed", embedding, n_given, m["embed_options"])
    if not is_module:
        return embedding
    module = embedding(m)
    if list(module.buffers()):
        raise TypeError(f"model.embed={m['embed']}: buffers are neither saved nor initialized; "
                        "use a parameter, or compute them in forward()")
    return module


def previous_tokens(batch, n):
    """For each token, the n tokens before it in the same document, nearest first: int64 [T, n].

    -1 where there is none. For embeddings of experiments; no built-in one looks back. In
    generation, a micro-batch holds one new token per prompt, and generate() adds all tokens so far
    as batch["history"], [B, capacity].
    """
    offsets = torch.arange(1, n + 1, device=batch["tokens"].device)
    positions = batch["positions"][:, None] - offsets                              # [T, n]
    if "history" in batch:
        previous = batch["history"].gather(1, positions.clamp(min=0))
    else:
        tokens = batch["tokens"]
        index = torch.arange(len(tokens), device=tokens.device)[:, None] - offsets
        previous = tokens[index.clamp(min=0)]
    return previous.masked_fill(positions < 0, -1)


# --------------------------------------------------------------------------------------------------
# losses: (logits [n, V] in fp32, targets [n], **model.loss_options) -> [n]. Add your own to LOSSES.
# The model multiplies by the loss weights, which may be negative. A loss that has a parameter of
# one of these names receives it, too:
#
#     token_index       int64 [n]: where the n target tokens are in the micro-batch
#     batch             the micro-batch
#     reference_logits  fp32 [n, V]: of the frozen model that the config's reference_model names

LOSS_INPUTS = ("token_index", "batch", "reference_logits")


def cross_entropy(logits, targets, label_smoothing=0.0, z_loss=0.0):
    """-log softmax(logits)[target].

    label_smoothing  share of the target that all tokens get evenly (arXiv:1512.00567, section 7)
    z_loss           factor of log(sum(exp(logits)))^2 (arXiv:2204.02311, section 5)
    """
    nll = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    if z_loss:
        nll = nll + z_loss * logits.logsumexp(-1) ** 2
    return nll


def dft(logits, targets):
    """-p log p of the target's probability p. The factor p has no gradient (arXiv:2508.05629)."""
    nll = cross_entropy(logits, targets)
    return nll * (-nll).detach().exp()


def is_plain_loss(m):
    """Is model.loss the negative log-likelihood and nothing else?"""
    return m["loss"] == "cross_entropy" and not m["loss_options"]


LOSSES = {"cross_entropy": cross_entropy, "dft": dft}


# Statistics of target tokens: {name: function (x [n, C], dlogits [n, V]) -> [n]}. In training,
# forward() computes all of them in each step, sums them per document and returns the sums beside
# "loss". A sampler can choose documents by them: see experiments/by_gradient.py. Both inputs have
# the compute dtype:
#
#     x        the input of the head
#     dlogits  the gradient of loss_weight * loss with respect to the output of the head. It is not
#              divided by the global loss weight, which forward() does not know
TOKEN_STATS = {}


class MicroBatchLoss:
    """model.loss of the target tokens of a micro-batch, for ChunkedLoss.

    token_index  int64 [N], where the target tokens are
    start, end   of all methods: the target tokens start ... end - 1
    """

    def __init__(self, model, batch, token_index):
        self.model = model
        self.batch = batch
        self.token_index = token_index
        self.nll = torch.zeros(len(token_index), device=token_index.device)   # if computes_nll()
        self.vocab_size = model.cfg["vocab_size"]
        self.stats = {}                  # TOKEN_STATS: [N] each
        if torch.is_grad_enabled():
            self.stats = {name: torch.zeros_like(self.nll) for name in TOKEN_STATS}
        if "reference_logits" in model.loss_inputs:
            assert model.references, "this loss needs a reference model in model.references"
            [self.reference] = model.references
            with torch.no_grad():
                self.reference_x = self.reference.hidden(batch)[token_index]       # [N, its C]

    def losses_and_gradient_(self, logits, loss_weights, start, end, piece_size, want_gradient):
        """Return the losses [end - start] of a chunk, whose logits are [n, V'].

        n >= end - start: the rest is padding. If want_gradient, logits are overwritten with the
        gradient of sum(loss_weight * loss), which is 0 in padding of tokens and vocabulary.
        """
        losses = []
        for piece_start in range(start, end, piece_size):
            piece_end = min(piece_start + piece_size, end)
            piece = logits[piece_start - start:piece_end - start, :self.vocab_size]
            with torch.enable_grad():
                piece_logits = piece.detach().requires_grad_(want_gradient)
                piece_losses = self.losses(piece_logits, piece_start, piece_end)
                losses.append(piece_losses.detach())
                if want_gradient:
                    weighted_sum = (piece_losses * loss_weights[piece_start:piece_end]).sum()
                    [gradient] = torch.autograd.grad(weighted_sum, piece_logits)
                    piece.copy_(gradient)
                    del weighted_sum, gradient
            del piece_logits, piece_losses   # and their graph, before the next piece is allocated
        logits[end - start:] = 0
        logits[:, self.vocab_size:] = 0
        return torch.cat(losses)

    def losses(self, logits, start, end):
        """The losses [end - start] of a piece: model.loss with those LOSS_INPUTS that it takes.

        logits  [end - start, V], as they come from the head
        """
        index = self.token_index[start:end]
        inputs = {"token_index": index, "batch": self.batch}
        if "reference_logits" in self.model.loss_inputs:
            # With FSDP, hidden() has gathered the weights of the reference model's head, and they
            # stay gathered until a backward pass, which this model never has.
            with torch.no_grad():
                inputs["reference_logits"] = self.reference.head_logits(self.reference_x[start:end])
        inputs = {name: inputs[name] for name in self.model.loss_inputs}
        targets = self.batch["targets"][index]
        if self.model.computes_nll():
            plain_logits = self.model.finish_logits(logits.detach())
            self.nll[start:end] = cross_entropy(plain_logits, targets)
        return self.model.token_losses(logits, targets, **inputs)

    def record_stats(self, x, dlogits, start, end):
        """Compute TOKEN_STATS of a chunk: x [n, C] and dlogits [n, V'], with padding."""
        n_tokens = end - start
        dlogits = dlogits[:n_tokens, :self.vocab_size]
        for name, values in self.stats.items():
            values[start:end] = TOKEN_STATS[name](x[:n_tokens], dlogits)


class ChunkedLoss(torch.autograd.Function):
    """The head and the loss, chunk by chunk, so that the logits of all tokens never exist at once.

    While a chunk's logits exist, forward() also computes their gradient, in their place, and from
    it the gradients of x, head and bias. backward() only multiplies these by the gradient of
    loss_sum, a number. A chunk is one matrix product with the head; a piece of it is what the loss
    computes at once in fp32 (on a CPU, it fits in the cache):

        ChunkedLoss.forward()                           all target tokens
            MicroBatchLoss.losses_and_gradient_()       a chunk
                MicroBatchLoss.losses()                 a piece
                    Transformer.token_losses()          model.loss, compiled on CUDA

    x                 [N, C], in the compute dtype
    head              [V', C];  bias  [V'] or None. Only the first vocab_size of V' are tokens
    loss_weights      fp32 [N]
    micro_batch_loss  a MicroBatchLoss
    Returns (sum of loss_weight * loss, losses [N] without gradient).
    """

    @staticmethod
    def forward(ctx, x, head, bias, loss_weights, micro_batch_loss):
        weight = head.to(x.dtype)                                                  # [V', C]
        if bias is not None:
            bias = bias.to(x.dtype)                                                # [V']
        want_x, want_head, want_bias, *_ = ctx.needs_input_grad
        want_gradient = any(ctx.needs_input_grad)
        dx = torch.empty_like(x) if want_x else None
        dhead = torch.zeros_like(head, dtype=torch.float32) if want_head else None
        dbias = torch.zeros_like(bias, dtype=torch.float32) if want_bias else None
        losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
        chunk_size, piece_size = chunk_sizes(len(head), x.element_size(), x.is_cuda)
        for start in range(0, len(x), chunk_size):
            end = min(start + chunk_size, len(x))
            # to a multiple of 64 tokens: a CPU's bf16 kernels are generated for each new shape
            n_padding = -(end - start) % 64
            x_chunk = F.pad(x[start:end], (0, 0, 0, n_padding))                    # [n, C]
            logits = F.linear(x_chunk, weight, bias)                               # [n, V']
            losses[start:end] = micro_batch_loss.losses_and_gradient_(
                logits, loss_weights, start, end, piece_size, want_gradient)
            dlogits = logits                             # overwritten with the gradient
            if want_gradient:
                micro_batch_loss.record_stats(x_chunk, dlogits, start, end)
            if want_x:
                dx[start:end] = (dlogits @ weight)[:end - start]
            if want_head and x.dtype == torch.float32:   # addmm_ needs equal dtypes
                dhead.addmm_(dlogits.T, x_chunk)
            elif want_head and x.dtype == torch.float16:
                # A sum over thousands of tokens may exceed 65504. 1/64 and 64 are exact.
                dhead.add_(dlogits.T @ (x_chunk / 64), alpha=64)
            elif want_head:
                dhead += dlogits.T @ x_chunk
            if want_bias:
                dbias += dlogits.sum(0, dtype=torch.float32)
            del logits, dlogits                          # before the next chunk is allocated
        ctx.save_for_backward(dx, dhead, dbias)
        ctx.mark_non_differentiable(losses)
        return (losses * loss_weights).sum(), losses

    @staticmethod
    def backward(ctx, grad_loss_sum, _grad_losses):
        gradients = [None if d is None else d.mul_(grad_loss_sum) for d in ctx.saved_tensors]
        return *gradients, None, None


# measured on a CPU (LOG.md, CPU throughput); those for CUDA are guesses
CHUNK_BYTES = 160 << 20      # of logits in one matrix product
PIECE_BYTES = 4 << 20        # of logits in fp32 at once; a loss needs about four such tensors
CUDA_CHUNK_TOKENS = 4096     # at least; each chunk reads and writes the whole gradient of the head
CUDA_PIECE_TOKENS = 512      # enough to fill a GPU


def chunk_sizes(padded_vocab_size, element_size, is_cuda):
    """Return the numbers of tokens of a chunk and of a piece; see ChunkedLoss."""
    chunk_size = CHUNK_BYTES // (padded_vocab_size * element_size)
    chunk_size = max(64, chunk_size // 64 * 64)
    if is_cuda:
        return max(CUDA_CHUNK_TOKENS, chunk_size), CUDA_PIECE_TOKENS
    return chunk_size, max(1, PIECE_BYTES // (4 * padded_vocab_size))


# --------------------------------------------------------------------------------------------------
# the model

class Transformer(nn.Module):
    """The model that a model section m describes. Its weights come from load_weights()."""

    def __init__(self, m):
        super().__init__()
        check_choice(m, "activation", ACTIVATIONS)
        check_choice(m, "embed", EMBEDDINGS)
        check_choice(m, "score_mod", SCORE_MODS)
        self.cfg = m
        multiple = m["pad_vocab_size_multiple"]
        self.padded_vocab_size = math.ceil(m["vocab_size"] / multiple) * multiple
        V = self.padded_vocab_size
        C = m["d_model"]
        self.embed = Embedding(V, C)
        self.pos = Embedding(m["max_len"], C) if m["positions"] == "learned" else None
        self.per_layer = None
        if m["d_per_layer"]:
            from families import gemma4
            self.per_layer = gemma4.PerLayerEmbedding(m, V)
        self.blocks = nn.ModuleList(make_block(m, i) for i in range(m["n_layers"]))
        self.norm = Norm(m, C)
        self.head = None if m["tie_embeddings"] else Linear(C, V, bias=False)
        self.head_bias = nn.Parameter(torch.empty(V)) if m["head_bias"] else None
        self.embedding = make_embedding(m)
        # stay empty if an experiment's loss is not imported: only forward() needs it, and raises
        self.loss_fn = None
        self.loss_inputs = set()
        if m["loss"] in LOSSES:
            loss = LOSSES[m["loss"]]
            self.loss_fn = configs.bind_options(
                "model.loss", loss, given=2,             # logits and targets
                options=m["loss_options"], supplied=LOSS_INPUTS)
            self.loss_inputs = inspect.signature(loss).parameters.keys() & set(LOSS_INPUTS)
        # the frozen reference model, if any; in a list, so that its parameters are not this one's
        self.references = []
        self.expert_tokens = 0               # tokens of each expert, counted by families/moe.py
        # set by shard.parallelize()
        self.dtype = torch.float32           # of the computation
        self.loss_scale = 1.0                # factor of all gradients: see train.adjust_loss_scale
        self.recompute = 0                   # activation checkpointing for this many first blocks
        self.flex_attention = None           # flex_attention(), compiled
        self.recompute_options = {}          # of checkpoint(): what it keeps nevertheless
        self.offload_device = None           # with shard.offload: that of the computation
        self.adapter_dropout = 0.0           # shard.lora.dropout

    def forward(self, batch):
        """Return (loss_sum, weight_sum, {"loss": [D]}) of a micro-batch (see the top of the file).

        loss_sum    sum of loss_weight * loss over its target tokens; only this has a gradient
        weight_sum  sum of |loss_weight| over the same tokens
        {...}       sums over each document's target tokens: "loss"; in evaluation with another loss
                    than plain cross entropy also "nll", the cross entropy, to compare runs;
                    in training also those of TOKEN_STATS
        Raises UserError if model.loss is not in LOSSES; a model that only generates needs no loss.
        """
        check_choice(self.cfg, "loss", LOSSES)
        router_loss = None
        if self.cfg["n_experts"] and self.training and torch.is_grad_enabled():
            from families import moe
            x, router_loss = moe.hidden_and_router_loss(self, batch)               # [T, C]
        else:
            x = self.compute_hidden(batch)                                         # [T, C]
        index = batch.get("target_index")
        if index is None:
            index = (batch["targets"] != IGNORE_INDEX).nonzero().squeeze(1)        # [N]
        loss_weights = batch["loss_weights"][index]                                # [N]
        micro_batch_loss = MicroBatchLoss(self, batch, index)
        head = self.head_weight()
        bias = self.head_bias
        if not torch.is_grad_enabled():      # ctx.needs_input_grad ignores torch.no_grad()
            head = head.detach()
            bias = None if bias is None else bias.detach()
        loss_sum, losses = ChunkedLoss.apply(x[index], head, bias, loss_weights, micro_batch_loss)
        if router_loss is not None:
            # Adds its gradient but 0 to the value: the reported loss is that of the targets.
            loss_sum = loss_sum + (router_loss - router_loss.detach())
        if self.loss_scale != 1.0 and loss_sum.requires_grad:
            loss_sum.register_hook(self.scale_gradient)

        stats = {"loss": losses * loss_weights, **micro_batch_loss.stats}
        if self.computes_nll():
            stats["nll"] = micro_batch_loss.nll * loss_weights
        documents = document_index(batch)[index]                                   # [N]
        for name, values in stats.items():
            zeros = torch.zeros(len(batch["cu_seqlens"]) - 1, device=x.device)     # [D]
            stats[name] = zeros.index_add_(0, documents, values)
        return loss_sum, loss_weights.abs().sum(), stats

    def scale_gradient(self, gradient):
        return gradient * self.loss_scale

    def hidden(self, batch):
        """Return the final hidden states [T, C], which the head reads."""
        return self.compute_hidden(batch)

    def compute_hidden(self, batch, layout=None):
        """The final hidden states [T, C], for forward(), hidden() and logits().

        These three must not call each other: under FSDP2, each is a forward pass with hooks of its
        own, which gather the sharded weights (shard.apply_fsdp()). Afterwards the blocks are
        sharded again, but embedding, norm and head stay gathered until the backward pass.

        layout  see attention(). None: the documents of the micro-batch
        """
        m = self.cfg
        positions = batch["positions"]
        if layout is None:
            layout = PackedDocuments(batch["cu_seqlens"], len(positions), batch["max_seqlen"],
                                     self.can_use_varlen(), flex_attention=self.flex_attention)
        x = self.embedding(self, batch)                                            # [T, C]
        multiplier = embedding_multiplier(m)
        if multiplier != 1.0:
            x = x * multiplier
        if self.pos is not None:
            x = x + self.pos(positions)
        has_dropout = (m["embd_pdrop"] or m["attn_pdrop"] or m["resid_pdrop"]
                       or self.adapter_dropout)
        seeds = token_seeds(batch) if has_dropout and self.has_noise(batch) else None        # [T]
        if seeds is not None and m["embd_pdrop"]:
            x = dropout(x, m["embd_pdrop"], seeds)
        x = x.to(self.dtype)
        layout.shared = {}                   # what blocks of Gemma 4 leave for later ones
        if self.per_layer is not None:
            layout.shared["inputs"] = self.per_layer(batch["tokens"], x)           # [T, L, P]
        full_rope, local_rope = self.rope(batch)
        for i, block in enumerate(self.blocks):
            rope = local_rope if block.attn.is_local else full_rope
            block_seeds = None if seeds is None else hash_int32(seeds + i + 1)
            if i < self.recompute and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(
                    block, x, rope, layout, block_seeds,
                    use_reentrant=False, preserve_rng_state=False, **self.recompute_options)
            else:
                x = block(x, rope, layout, block_seeds)
        return self.norm(x)

    def rope(self, batch):
        """Return (full, local): for blocks with full attention, and for those with a window.

        Each is (rope_freqs() of queries, rope_freqs() of keys), or None without rope.
        """
        m = self.cfg
        positions = batch["positions"]
        if m["positions"] != "rope":
            return None, None
        lengths = None
        if configs.rope_kind(m["rope_scaling"] or {}) == "longrope":
            lengths = document_lengths(batch)
        full = m | {"head_dim": m["global_head_dim"] or m["head_dim"]}             # Gemma 4
        k_rope = rope_freqs(positions, full, lengths)
        q_rope = k_rope
        if m["llama_4_scaling_beta"]:
            from families import rope_scaling
            q_rope = rope_scaling.scale_queries(k_rope, positions, m)
        if m["rope_local_theta"] is None:
            return (q_rope, k_rope), (q_rope, k_rope)
        local = m | {"rope_theta": m["rope_local_theta"], "rope_scaling": None}
        local_rope = rope_freqs(positions, local)
        return (q_rope, k_rope), (local_rope, local_rope)

    def computes_nll(self):
        """Does forward() also return "nll"?"""
        return not self.training and not is_plain_loss(self.cfg)

    def has_noise(self, batch):
        """Do dropout and NEFTune apply? In training mode, to documents with a noise_seed."""
        return self.training and "noise_seed" in batch and len(batch["doc_ids"]) > 0

    def can_use_varlen(self):
        """CUDA's kernel for packed documents takes bf16 or fp16 and certain widths of a head.

        It needs a GPU of 2020 (A100) or later.
        """
        E = self.cfg["head_dim"]
        can_take_width = E % 8 == 0 and (self.cfg["global_head_dim"] or E) % 8 == 0
        if self.device.type != "cuda" or self.dtype == torch.float32 or not can_take_width:
            return False
        return torch.cuda.get_device_capability(self.device) >= (8, 0)

    @property
    def device(self):
        """The device of the computation. With shard.offload, the weights are in host memory."""
        return self.offload_device or self.embed.weight.device

    def head_weight(self):
        return self.embed.weight if self.head is None else self.head.weight        # [V', C]

    def token_losses(self, logits, targets, **inputs):
        """model.loss of logits [n, V] as they come from the head, in the compute dtype: fp32 [n].

        On CUDA shard.compile_blocks() compiles this, so that fp32 logits are never stored.
        """
        return self.loss_fn(self.finish_logits(logits), targets, **inputs)

    def finish_logits(self, logits):
        """What follows the head, for losses and generation: [n, V] -> fp32 [n, V]."""
        logits = logits.float()
        scaling = self.cfg["logits_scaling"]
        if scaling != 1.0:
            logits = logits / scaling
        if self.cfg["logit_softcap"]:
            logits = softcap(logits, self.cfg["logit_softcap"])
        return logits

    def logits(self, batch, layout=None, index=None):
        """Return logits, fp32 [T, V], or those of the tokens `index` [n]: for generation, tests."""
        x = self.compute_hidden(batch, layout)
        if index is not None:
            x = x[index]
        return self.head_logits(x)

    def head_logits(self, x):
        """Hidden states [n, C] -> logits, fp32 [n, V]."""
        weight = self.head_weight().to(x.dtype)
        bias = None if self.head_bias is None else self.head_bias.to(x.dtype)
        logits = F.linear(x, weight, bias)                                         # [n, V']
        logits = logits[:, :self.cfg["vocab_size"]]
        return self.finish_logits(logits)


def embedding_multiplier(m):
    """model.embedding_multiplier as a number."""
    multiplier = m["embedding_multiplier"]
    return math.sqrt(m["d_model"]) if multiplier == "sqrt_d_model" else multiplier


def check_choice(m, key, choices):
    """Raise UserError unless m[key] is in `choices`, a dict to which experiments may add names."""
    if m[key] in choices:
        return
    hf_keys = configs.families()[m["family"]].get("keys", {})
    hf_key = ""
    if key in hf_keys:                   # its name in the config.json of a pretrained model
        hf_key = f" ({configs.hf_names(hf_keys[key])[-1]})"
    raise configs.UserError(f"model.{key}{hf_key}: must be one of {', '.join(choices)}; got "
                            f"{m[key]}; if an experiment registers it, import that experiment "
                            "first (config.json does not say which one)")


def resolve_vocab_size(m, n_tokens):
    """Return the model section with its vocab_size, for a tokenizer of n_tokens ids.

    A pretrained vocabulary grows if it is smaller; null becomes n_tokens.
    """
    vocab_size = m["vocab_size"] or n_tokens
    if m["init_from"]:
        vocab_size = max(vocab_size, n_tokens)
    return m | {"vocab_size": vocab_size}


# --------------------------------------------------------------------------------------------------
# weights: a reader is an object whose read(name, start, end) returns rows start ... end - 1 of the
# parameter `name`

def build(m, seed=0, device="cpu"):
    """Return a model with new weights. m: a complete model section."""
    model = build_on_meta(m).to_empty(device=device)
    return load_weights(model, NewWeights(m, seed).read)


def build_on_meta(m):
    """Return a model without memory for its weights."""
    with torch.device("meta"):
        return Transformer(m)


@torch.no_grad()
def load_weights(model, read):
    """Copy the weights that a reader's read() gives into a model. Returns the model."""
    for name, p in log.progress(dict(model.named_parameters()).items(), "load weights"):
        load_parameter(name, read, p, 0, len(p))
    return model


# Rows of a parameter that are copied at once. NewWeights draws as many with one seed, so another
# number gives other new weights.
ROWS_AT_ONCE = 1024


def load_parameter(name, read, local, start, end):
    """Copy rows start ... end - 1 of a parameter into the tensor `local`.

    A part at a time, because read() may need memory for what it returns.
    """
    for low, high in row_ranges(start, end):
        local[low - start:high - start].copy_(read(name, low, high))


def row_ranges(start, end):
    """Yield (first row, end row) of the parts in which rows start ... end - 1 are read."""
    if start == end:                                     # the last ranks may hold no rows
        return
    # from a multiple of ROWS_AT_ONCE, so that NewWeights draws no rows twice
    for first in range(start - start % ROWS_AT_ONCE, end, ROWS_AT_ONCE):
        yield max(first, start), min(first + ROWS_AT_ONCE, end)


def parameter_shapes(m):
    return {name: p.shape for name, p in build_on_meta(m).named_parameters()}


def unpadded_rows(name, rows, m):
    """The number of rows of a parameter, without those that pad the vocabulary."""
    of_vocabulary = ("embed.weight", "head.weight", "head_bias", "per_layer.embed.weight")
    return m["vocab_size"] if name in of_vocabulary else rows


# matrices that write to the residual stream
RESIDUAL_MATRICES = ("attn.o_proj.weight", "attn.out_proj.weight", "down_proj.weight")
# what a GatedDeltaNet has besides matrices
DELTA_NET_PARAMETERS = ("attn.decay.A_log", "attn.decay.dt_bias", "attn.conv_weight",
                        "attn.norm_weight")


class NewWeights:
    """A reader that draws the weights of a new model.

    Matrices are normal with init_std; with init_by_depth, those that write to the residual stream
    are divided by sqrt(2 L), as in GPT-2. Norms multiply by 1; biases and padding of the vocabulary
    are 0.
    Each ROWS_AT_ONCE rows are drawn with a seed of their own, made from the run's seed, the
    parameter's name and the first row. They do not depend on other parameters or on ranks.
    """

    def __init__(self, m, seed):
        self.m = m
        self.seed = seed
        self.shapes = parameter_shapes(m)

    def read(self, name, start, end):
        if name.endswith(DELTA_NET_PARAMETERS):
            from families import delta_net
            generator = make_generator(self.seed, name)
            return delta_net.new_values(name, self.shapes[name], generator)[start:end]
        if len(self.shapes[name]) < 2:
            value = 1.0 - self.m["norm_offset"] if name.endswith("weight") else 0.0
            return torch.full((end - start,), value)
        begin = start - start % ROWS_AT_ONCE
        parts = [self.draw(name, first) for first in range(begin, end, ROWS_AT_ONCE)]
        return torch.cat(parts)[start - begin:end - begin]

    def draw(self, name, first):
        """The rows from `first` on, at most ROWS_AT_ONCE."""
        m = self.m
        n_rows, *rest = self.shapes[name]
        std = m["init_std"]
        if name.startswith("embedding."):
            std = getattr(EMBEDDINGS[m["embed"]], "init_std", std)
        if m["init_by_depth"] and name.endswith(RESIDUAL_MATRICES):
            std = std / math.sqrt(2 * m["n_layers"])
        rows = torch.zeros(min(ROWS_AT_ONCE, n_rows - first), *rest)
        n_drawn = max(0, unpadded_rows(name, n_rows, m) - first)
        generator = make_generator(self.seed, f"{name} {first}")
        rows[:n_drawn].normal_(0, std, generator=generator)
        return rows


def make_generator(seed, name):
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))


def weights_reader(m, seed):
    """The reader of the weights that training starts from: pretrained, or new ones."""
    if m["init_from"]:
        return PretrainedWeights(m["init_from"], m, seed)
    return NewWeights(m, seed)


def is_block_matrix(name, p):
    """Is this parameter a weight matrix of a block? Muon updates these, not lora_A and lora_B."""
    return name.startswith("blocks.") and name.endswith(".weight") and p.dim() == 2


# --------------------------------------------------------------------------------------------------
# Hugging Face's format: names of weights

def hf_slices(m):
    """Where Hugging Face's files have each parameter, from configs/families.yaml.

    Returns {name: [(tensor, first row, number of rows)]}. There are several slices if the files
    have q, k and v of each head in turn. Padding of the vocabulary is in no file.
    Raises UserError for a parameter that the family has no name for.
    """
    shapes = parameter_shapes(m)
    slices = {name: slices_of_parameter(name, shapes, m) for name in shapes}
    nameless = [name for name in slices if not slices[name]]
    if nameless:
        raise configs.UserError(f"model.family: {m['family']} has no name for "
                                f"{shorten(nameless)} in configs/families.yaml; "
                                "model.family=native saves the model under our own names, "
                                "checkpoint.export=false saves none")
    return slices


def slices_of_parameter(name, shapes, m):
    """One parameter's slices for hf_slices(), [] if the family has no name for it.

    shapes  parameter_shapes(m)
    """
    family = configs.families()[m["family"]]
    rows = unpadded_rows(name, shapes[name][0], m)
    if family.get("native"):
        return [(name, 0, rows)]
    block, pattern = split_block(name)                   # "3", "blocks.{i}.attn.q_proj.weight"
    module, _, kind = pattern.rpartition(".")            # "blocks.{i}.attn.q_proj", "weight"
    for fused, parts in family.get("fused", {}).items():
        if module not in parts:
            continue
        suffix = family.get("fused_suffixes", {}).get(kind, f".{kind}")
        tensor = f"{fused}{suffix}".replace("{i}", block)
        place = parts.index(module)
        n = rows                                         # that are together in the tensor
        # 1) fused by head: GPT-NeoX has q, k, v of head 0, then q, k, v of head 1, ..., each E rows
        if family.get("fused_by_head"):
            n = m["head_dim"]
        # 2) or by expert: Granite-MoE has gate and up of expert 0, then of expert 1, ...
        if family.get("fused_by_expert"):
            n = rows // m["n_experts"]
        if n < rows:
            first_rows = [(i * len(parts) + place) * n for i in range(rows // n)]
            return [(tensor, first, n) for first in first_rows]
        # 3) fused module by module: GPT-2's c_attn has all rows of q, then all of k, then all of v
        before = [f"{part}.{kind}".replace("{i}", block) for part in parts[:place]]
        first = sum(shapes[part][0] for part in before)
        return [(tensor, first, rows)]
    # 4) a tensor of its own, or one per expert
    if pattern not in family["weights"]:
        return []
    tensor = family["weights"][pattern].replace("{i}", block)
    if "{e}" not in tensor:
        return [(tensor, 0, rows)]
    n = rows // m["n_experts"]
    return [(tensor.replace("{e}", str(e)), 0, n) for e in range(m["n_experts"])]


def split_block(name):
    """blocks.3.norm1.weight -> ("3", "blocks.{i}.norm1.weight");  norm.weight -> ("", as it is)"""
    match = re.match(r"blocks\.(\d+)\.", name)
    if not match:
        return "", name
    return match[1], "blocks.{i}." + name[match.end():]


def hf_tensors(m):
    """The tensors of an exported model: {tensor: [(name, first row, number of rows)]}.

    The inverse of hf_slices(): the first row is one of the parameter `name`. The rows of a tensor
    are those of its parts, one after another.
    """
    parts = collections.defaultdict(list)
    for name, slices in hf_slices(m).items():
        row = 0
        for tensor, first, rows in slices:
            parts[tensor].append((first, name, row, rows))
            row += rows
    tensors = {}
    for tensor in parts:
        in_order = sorted(parts[tensor])                 # by their first row in the tensor
        tensors[tensor] = [(name, row, rows) for _, name, row, rows in in_order]
    return tensors


def is_transposed(name, family):
    """Do the files store this weight as [in, out]?"""
    return name.endswith(tuple(family.get("transposed", ())))


def is_stacked(tensor, family):
    """Do the files store the experts' matrices of this tensor as [X, out, in]?"""
    return tensor.endswith(tuple(family.get("stacked", ())))


# --------------------------------------------------------------------------------------------------
# Hugging Face's format: in

def load(path, m=None, device="cpu", dtype=torch.float32):
    """Return (model in evaluation mode, its model section).

    path   a pretrained folder, a run's folder or a hub id
    m      the complete model section, if the caller has one; otherwise it is that of config.json
    dtype  of the computation and of matrices; vectors are fp32
    Raises UserError if the weights do not fit.
    """
    folder = configs.resolve_model_dir(path)
    if m is None:
        m = read_model_section(folder)
    model = build_on_meta(m)
    model.dtype = dtype
    for p in model.parameters():
        if p.dim() == 2:
            p.data = p.data.to(dtype)
    model.to_empty(device=device)
    load_weights(model, PretrainedWeights(folder, m).read)
    return model.eval(), m


def read_model_section(folder):
    """The complete model section of a pretrained folder: its config.json, and the defaults."""
    path = str(folder).replace("$", "$$")                # a $ would be an environment variable
    return configs.load([f"model.init_from={path}"])[0]["model"]


STORED_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
}


class PretrainedWeights:
    """A reader of a pretrained folder (or a run's, or a hub id's); tensors have the stored dtype.

    Safetensors files are memory-mapped, and read() reads no other rows than it returns. If the
    vocabulary has grown, new tokens start at the mean of the stored ones; padding is 0.

    The tensors' names are those of the stored family, whatever m["family"] is.

    seed       of new_names
    new_names  the parameters that the files lack because m has another embedding: NewWeights
    slices     {name: [(tensor, first row, number of rows)]} of all others, see hf_slices()
    Raises UserError that names the first eight missing, unknown and misshapen tensors.
    """

    def __init__(self, path, m, seed=0):
        self.m = m
        self.folder = configs.resolve_model_dir(path)
        self.stored_config = configs.read_model(self.folder)
        self.family = configs.families()[self.stored_config["family"]]
        self.files = open_weights(self.folder)           # {tensor: the open file}
        if "mxfp4" in self.family:
            from families import expert_files
            self.files = expert_files.open_mxfp4(self.files)
        self.shapes = parameter_shapes(m)
        # If m has fewer tokens than the files, check() reports tensors with too many rows.
        self.stored_vocab_size = min(m["vocab_size"], self.stored_config["vocab_size"])
        self.new_names = []
        if self.stored_config.get("embed") != m["embed"]:
            self.new_names = [name for name in self.shapes if name.startswith("embedding.")]
        self.new_weights = NewWeights(m, seed)
        self.slices = self.find_slices()
        names = self.family.get("weights", {})
        self.head = self.find(names.get("head.weight", "head.weight"))
        # some files have a tied matrix only once, under the name of the head
        [(embed, first, rows)] = self.slices["embed.weight"]
        if m["tie_embeddings"] and embed not in self.files and self.head in self.files:
            self.slices["embed.weight"] = [(self.head, first, rows)]
        self.means = {}
        self.check()

    def find_slices(self):
        """What `slices` is: hf_slices() of the stored family and vocabulary, without new_names."""
        m = self.m | {"family": self.stored_config["family"],
                      "vocab_size": self.stored_vocab_size}
        shapes = parameter_shapes(m)
        found = {}
        for name in shapes:
            if name in self.new_names:
                continue
            slices = slices_of_parameter(name, shapes, m)
            # without a name in the family: check() then reports our own name as missing
            slices = slices or [(name, 0, shapes[name][0])]
            found[name] = [(self.find(tensor), first, rows) for tensor, first, rows in slices]
        return found

    def find(self, tensor):
        """The tensor's name in the files. Some files have it without the family's prefix."""
        short = tensor.removeprefix(self.family.get("prefix", ""))
        return short if tensor not in self.files and short in self.files else tensor

    def get_slice(self, tensor):
        """As get_slice() of safetensors: slices of what it returns are read from the file."""
        stored = self.files[tensor].get_slice(tensor)
        if is_stacked(tensor, self.family):
            from families import expert_files
            return expert_files.StackedSlice(stored, tensor, self.family)
        return stored

    def read(self, name, start, end):
        if name in self.new_names:
            return self.new_weights.read(name, start, end)
        slices = self.slices[name]
        transposed = is_transposed(name, self.family)
        out = []
        row = 0                                          # of the parameter, where a slice begins
        for tensor, first, rows in slices:
            low = max(start - row, 0)
            high = min(end - row, rows)
            if low < high:
                stored = self.get_slice(tensor)
                if transposed:
                    out.append(stored[:, first + low:first + high].T)
                else:
                    out.append(stored[first + low:first + high])
            row += rows
        if end > row:
            out.append(self.new_rows(name, max(start, row), end))
        return torch.cat(out) if len(out) > 1 else out[0]

    def new_rows(self, name, start, end):
        """Rows that the files don't have: new tokens, and padding of the vocabulary."""
        new = torch.zeros(end - start, *self.shapes[name][1:])
        n_tokens = max(self.m["vocab_size"] - start, 0)
        if n_tokens:
            [(tensor, _, _)] = self.slices[name]
            new[:n_tokens] = self.mean(tensor)
        return new

    def mean(self, tensor):
        """The mean row of the stored vocabulary, in fp32."""
        if tensor not in self.means:
            stored = self.get_slice(tensor)
            total = 0
            for start, end in row_ranges(0, self.stored_vocab_size):
                total = total + stored[start:end].double().sum(0)
            self.means[tensor] = (total / self.stored_vocab_size).float()
        return self.means[tensor]

    def check(self):
        """Raise UserError unless the files have exactly the tensors that the model needs."""
        wrong = []
        n_rows = collections.Counter()                   # {tensor: rows that the model reads of it}
        name_of = {}                                     # {tensor: a parameter that it has rows of}
        for name, slices in self.slices.items():
            for tensor, _, rows in slices:
                n_rows[tensor] += rows
                name_of[tensor] = name
        for tensor, name in name_of.items():
            problem = self.problem(tensor, name, n_rows[tensor])
            if problem:
                wrong.append(f"{tensor} {problem}")
        # A head in the files is redundant if config.json ties it. If only the user ties it, it is
        # unknown: tie_embeddings=true must not discard a trained head unnoticed.
        is_tied = self.stored_config.get("tie_embeddings")
        ignored = tuple(self.family.get("ignore", ()))
        if is_tied:
            ignored += (self.head,)
        if self.m["n_kv_shared_layers"]:
            from families import gemma4
            ignored += gemma4.unread_tensors(self.m, self.family)
        prefixes = (*self.family.get("ignore_prefixes", ()), *self.family.get("carried", ()))
        for tensor in sorted(self.files):
            is_ignored = tensor.endswith(ignored) or tensor.startswith(prefixes)
            if tensor not in name_of and not is_ignored:
                wrong.append(f"{tensor} is unknown")
        if wrong:
            hints = contradicting_keys(self.m, self.stored_config)
            head_is_missing = self.head in name_of and self.head not in self.files
            # (If config.json ties it, the user has untied it, and contradicting_keys() names that.)
            if head_is_missing and not is_tied:
                hints.append("model.tie_embeddings=true takes the embedding for it")
            hint = f"; {shorten(hints)}" if hints else ""
            raise configs.UserError(f"{self.folder}: weights don't fit the model: "
                                    f"{shorten(wrong)}{hint}")
        self.check_tied_head()

    def problem(self, tensor, name, n_rows):
        """Why n_rows of a parameter cannot be read from this tensor, or ""."""
        if tensor not in self.files:
            return "is missing"
        shape = [n_rows, *self.shapes[name][1:]]
        if is_transposed(name, self.family):
            shape = shape[::-1]
        stored = self.get_slice(tensor)
        if stored.get_shape() != shape:
            return f"is {stored.get_shape()}, and the config makes it {shape}"
        if stored.get_dtype() not in STORED_DTYPES:
            return f"has dtype {stored.get_dtype()}, which is quantized"
        return ""

    def check_tied_head(self):
        """Raise UserError if the head is tied, and the files have another matrix for it."""
        [(embed, _, rows)] = self.slices["embed.weight"]
        has_both = self.head in self.files and self.head != embed
        if not self.m["tie_embeddings"] or not has_both:
            return
        a = self.get_slice(embed)
        b = self.get_slice(self.head)
        is_equal = a.get_shape() == b.get_shape()
        for start, end in row_ranges(0, rows):
            is_equal = is_equal and a[start:end].float().equal(b[start:end].float())
        if not is_equal:
            raise configs.UserError(
                f"{self.folder}: {self.head} differs from {embed}, but tie_word_embeddings of "
                "config.json (or its default) makes them one; model.tie_embeddings=false keeps "
                "both, as transformers does")


def contradicting_keys(m, stored_config):
    """The keys whose values differ from config.json's and give weights of other shapes."""
    contradictions = []
    m = m | {"rope_layers": None}    # changes no shape, but forbids to change n_layers alone
    shapes = parameter_shapes(m)
    for key, value in stored_config.items():
        if key == "rope_layers" or value is None or m[key] == value:
            continue
        try:
            changes_shapes = parameter_shapes(m | {key: value}) != shapes
        except configs.UserError:        # not possible with the other keys of m
            changes_shapes = False
        if changes_shapes:
            contradictions.append(f"model.{key} = {m[key]}, where config.json has {value}")
    return contradictions


def weight_files(folder):
    """The safetensors files of a model: [Path]. Raises UserError if there is none."""
    single_file = folder / "model.safetensors"
    index_file = folder / "model.safetensors.index.json"
    if single_file.is_file():
        return [single_file]
    if index_file.is_file():
        index = configs.read_json(index_file)
        try:
            return sorted({folder / name for name in index["weight_map"].values()})
        except (KeyError, TypeError, AttributeError) as e:
            raise configs.UserError(f"{index_file}: a damaged file: {e!r}") from None
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickles = [f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth")]
    hint = "download its weights"
    if pickles:
        hint = (f"but {', '.join(sorted(pickles))}: pickles can run code and are not read; this "
                "converts one: python -c \"from transformers import AutoModelForCausalLM as M"
                f"; M.from_pretrained('{folder}').save_pretrained('{folder}')\"")
    raise configs.UserError(f"{folder}: holds no *.safetensors, {hint}")


def open_weights(folder):
    """Return {tensor: the open safetensors file that holds it}.

    Raises UserError if there is no such file, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open
    tensors = {}
    for path in weight_files(folder):
        try:
            opened = safe_open(path, framework="pt")
        except (SafetensorError, OSError, ValueError) as error:
            raise configs.UserError(f"{path}: {damage(path, error)}") from None
        tensors |= dict.fromkeys(opened.keys(), opened)
    return tensors


def damage(path, error):
    """Why a safetensors file cannot be read, and what helps."""
    if isinstance(error, PermissionError):
        return "cannot be read (permission denied); chmod +r"
    if not path.is_file():
        return ("is missing, and model.safetensors.index.json says that it holds weights; "
                "download it again")
    with open(path, "rb") as file:
        problem = configs.format_problem(file.read(1000), path.name)
    if problem:
        return f"is {problem}"
    return (f"is damaged or incomplete ({path.stat().st_size:,} bytes; {error}); download it "
            "again")


def shorten(items, limit=8):
    """["a", "b"] -> "a; b", with the first `limit` items only."""
    more = [f"and {len(items) - limit} more"] if len(items) > limit else []
    return "; ".join([*items[:limit], *more])


# --------------------------------------------------------------------------------------------------
# Hugging Face's format: out

def save_pretrained(get_parameter, m, folder, source="", stop=(), bos=None,
                    control_ids=None, shard_bytes=4 << 30, dtype=""):
    """Write config.json, generation_config.json and model.safetensors.

    get_parameter  name -> the whole tensor: model.get_parameter, for example. Only one file's
                 tensors are in memory at a time
    source       the folder or hub id of the pretrained model: its dtype is kept, its license, and
                 all other keys of its config.json and generation_config.json
    stop, bos    ids that end a generation, beside those of source, and the id that begins a text
    control_ids  the tokenizer's control tokens: other ids in source's configs are dropped. None:
                 all are kept
    shard_bytes  a larger model is written as several files
    dtype        of the weights; "": that of source
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    family = configs.families()[m["family"]]
    # A family may have embed: scaled among its `fixed` keys in families.yaml (no built-in one has).
    family_scales = family.get("native") or "embed" in family["fixed"]
    if m["embed"] == "scaled" and not family_scales:
        # others have no key for it: export the scaled embedding, and a tied head as its own matrix
        get_parameter = functools.partial(get_scaled, get_parameter, m)
        m = m | {"embed": "plain", "tie_embeddings": False}
    # not resolve_model_dir(), which raises if the folder has been deleted since the run started:
    # then nothing is taken from it
    source = Path(configs.resolve_pretrained(str(source))) if source else None
    config = hf_config(m, source, dtype)
    set_token_ids(config, stop, bos, control_ids)
    generation = read_source(source, "generation_config.json")
    if not generation:
        generation = {key: config[key] for key in TOKEN_ID_KEYS} | {"do_sample": False}
    set_token_ids(generation, stop, bos, control_ids)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation)
    copy_licenses(source, folder)
    carried = carried_tensors(family, source)
    if carried:
        for path in source.glob("*processor*.json"):
            shutil.copyfile(path, folder / path.name)
    dtype = getattr(torch, config["dtype"])
    write_weights(get_parameter, m, folder, dtype, shard_bytes, carried)


def copy_licenses(source, folder):
    """Copy the licenses of a pretrained model, the folder or hub id `source`; "" or None: none."""
    if not source:
        return
    source = Path(configs.resolve_pretrained(str(source)))
    for pattern in configs.LICENSES:
        for path in filter(Path.is_file, source.glob(pattern)):
            shutil.copyfile(path, Path(folder) / path.name)


def carried_tensors(family, source):
    """Tensors that are exported as the pretrained model has them: {tensor: the open file}."""
    prefixes = tuple(family.get("carried", ()))
    if not prefixes:
        return {}
    if source is None or not source.is_dir():
        raise configs.UserError(f"model.init_from: {source} must exist for the export, which "
                                f"copies the weights {', '.join(prefixes)}* from it")
    return {tensor: file for tensor, file in open_weights(source).items()
            if tensor.startswith(prefixes)}


def write_weights(get_parameter, m, folder, dtype, shard_bytes, carried):
    """Write model.safetensors, or several files and their index. See save_pretrained.

    carried  carried_tensors(), which get a file of their own
    """
    files = split_into_files(m, dtype, shard_bytes)
    n_files = len(files) + bool(carried)
    weight_map = {}
    total_size = 0
    for i in range(n_files):
        name = "model.safetensors"
        if n_files > 1:
            name = f"model-{i + 1:05}-of-{n_files:05}.safetensors"
        if i < len(files):
            items = log.progress(files[i].items(), f"write {name}")
            tensors = collect_tensors(get_parameter, m, items, dtype)
        else:
            tensors = {tensor: file.get_tensor(tensor) for tensor, file in carried.items()}
        write_safetensors(tensors, folder / name, folder / "config.json")
        weight_map |= dict.fromkeys(tensors, name)
        total_size += sum(tensor.nbytes for tensor in tensors.values())
    if n_files > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def get_scaled(get_parameter, m, name):
    """A parameter of a model with model.embed=scaled, as that of one with plain embeddings and a
    head of its own."""
    if name == "embed.weight":
        return get_parameter(name) * math.sqrt(m["d_model"])
    if name == "head.weight" and m["tie_embeddings"]:
        return get_parameter("embed.weight")
    return get_parameter(name)


TOKEN_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_source(folder, name):
    """A JSON file of the pretrained model; {} if there is none."""
    if not folder or not (folder / name).is_file():
        return {}
    return configs.read_json(folder / name)


def set_token_ids(config, stop, bos, control_ids):
    """Set the token ids of config.json or generation_config.json, in place.

    eos_token_id  the ids that it had, and `stop`
    bos_token_id  `bos`, or, if that is None, the id that it had
    pad_token_id  the id that it had

    Ids that are not in control_ids are dropped first. Several ids are written as a list. For none,
    null is written: transformers replaces a missing key by the id of a released model.
    stop, bos, control_ids  see save_pretrained()
    """
    for key in TOKEN_ID_KEYS:
        value = config.get(key)
        ids = value if isinstance(value, list) else [value]
        ids = [i for i in ids if type(i) is int]
        if control_ids is not None:
            ids = [i for i in ids if i in control_ids]
        if key == "eos_token_id":
            ids += [i for i in stop if i not in ids]
        if key == "bos_token_id" and bos is not None:
            ids = [bos]
        if len(ids) > 1:
            config[key] = ids
        else:
            config[key] = ids[0] if ids else None


def all_stop_ids(folder, stop, control_ids):
    """All ids that end an answer: `stop`, and the folder's eos_token_id.

    As in transformers, config.json counts only if there is no generation_config.json.
    """
    config = read_source(folder, "generation_config.json") or read_source(folder, "config.json")
    set_token_ids(config, stop, None, control_ids)
    ids = config.get("eos_token_id")
    if ids is None:
        return []
    return ids if isinstance(ids, list) else [ids]


def hf_config(m, source, dtype=""):
    """The config.json of an exported model, as a dict. source: a folder, or None."""
    family = configs.families()[m["family"]]
    # 1) the config.json of source, or its part about text
    config = read_source(source, "config.json")
    if "section" not in family:
        config = config.get("text_config") or config
    dtype = dtype or config.get("dtype") or config.get("torch_dtype")
    if dtype not in STORED_DTYPES.values():
        dtype = stored_dtype(source)
    config |= {"model_type": family["model_type"], "architectures": [family["architecture"]],
               "dtype": dtype}
    if "torch_dtype" in config:                          # the older name
        config["torch_dtype"] = dtype
    config = without_contradictions(config)
    # 2) our keys
    if family.get("native"):
        return config | {key: m[key] for key in m if key not in ("family", "init_from")}
    if "section" in family:
        name = family["section"]
        text_config = without_contradictions(config.get(name, {}))
        config[name] = set_model_keys(text_config, m, family)
        return config | {"tie_word_embeddings": m["tie_embeddings"]}
    return set_model_keys(config, m, family)


def without_contradictions(config):
    """A copy without auto_map, whose code is not copied, and without keys that might contradict
    those of set_model_keys()."""
    names = ("auto_map", "layer_types", "original_max_position_embeddings",
             "partial_rotary_factor", "quantization_config", "per_layer_config")
    return {key: config[key] for key in config if key not in names}


def set_model_keys(config, m, family):
    """Set our keys in a config.json, or in its section about text, under the family's names.

    If versions of transformers have different names for a key, the last in families.yaml is set,
    and the others, from source, are removed. Returns config, which is changed in place.
    """
    source_rope = config.get("rope_parameters") or {}
    # config.json has embedding_multiplier as a number, and layer_types with one item per block
    m = m | {"embedding_multiplier": embedding_multiplier(m), "layer_types": layer_types(m)}
    if "layer_types" in family["keys"] and m["rope_layers"] is None:
        # transformers fails without a number, also where no block has a window
        m["sliding_window"] = m["sliding_window"] or m["max_len"]
    if "rope_parameters" in family:          # null would be read as the family's default
        m["rope_scaling"] = m["rope_scaling"] or {"rope_type": "default"}
    for key, places in family["keys"].items():
        *other_names, hf_key = configs.hf_names(places)
        for name in other_names:
            config.pop(name, None)
        config[hf_key] = configs.to_hf(m[key], places)
    # the keys for which the family supports one meaning only
    for hf_key, supported_values in family["only"].items():
        if config.get(hf_key, configs.MISSING) not in supported_values:
            config[hf_key] = supported_values[0]
    from families import gemma4, rope_scaling
    rope_scaling.finish_hf_config(config, m, source_rope)
    if m["block"] == "gemma4":
        gemma4.finish_hf_config(config, m)
    return config


def stored_dtype(folder):
    """The dtype of a pretrained model whose config.json does not say it: that of most tensors."""
    if folder is None or not (folder / "config.json").is_file():
        return "float32"
    count = collections.Counter(file.get_slice(tensor).get_dtype()
                                for tensor, file in open_weights(folder).items())
    [(most_common, _)] = count.most_common(1)
    return STORED_DTYPES.get(most_common, "float32")


def split_into_files(m, dtype, shard_bytes):
    """hf_tensors() in parts, one per file. Only a single tensor may exceed shard_bytes."""
    shapes = parameter_shapes(m)
    files = [{}]
    size = 0
    for tensor, parts in hf_tensors(m).items():
        n_numbers = sum(rows * math.prod(shapes[name][1:]) for name, _, rows in parts)
        n_bytes = n_numbers * dtype.itemsize
        if files[-1] and size + n_bytes > shard_bytes:
            files.append({})
            size = 0
        files[-1][tensor] = parts
        size += n_bytes
    return files


def collect_tensors(get_parameter, m, items, dtype):
    """The tensors of a file: {tensor name: tensor}. items: a part of hf_tensors(m).items()"""
    family = configs.families()[m["family"]]
    tensors = {}
    for tensor_name, parts in items:
        params = {}
        slices = []
        is_float32 = tensor_name.endswith(tuple(family.get("float32", ())))
        tensor_dtype = torch.float32 if is_float32 else dtype
        for name, first, n_rows in parts:
            if name not in params:
                params[name] = get_parameter(name).detach().to("cpu", tensor_dtype)
            slices.append(params[name][first:first + n_rows])
        tensor = torch.cat(slices) if len(slices) > 1 else slices[0]
        first_name, _, _ = parts[0]
        if is_transposed(first_name, family):
            tensor = tensor.T
        if dtype == torch.float16 and tensor.isinf().any():
            raise configs.UserError(f"dtype: {tensor_name} has numbers above 65,504, the largest "
                                    "of float16; dtype=bfloat16")
        if is_stacked(tensor_name, family):
            from families import expert_files
            tensor = expert_files.stack(tensor, m["n_experts"], tensor_name, family)
        tensors[tensor_name] = tensor.contiguous()
    return tensors


def write_safetensors(tensors, path, copy_mode_from):
    """Write a safetensors file with the permissions of another file.

    (save_file makes it readable for its owner only.)
    """
    from safetensors.torch import save_file
    save_file(tensors, path, metadata={"format": "pt"})
    shutil.copymode(copy_mode_from, path)


def write_json(path, content):
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# generation

def pack_prompts(prompts, device="cpu"):
    """Lists of token ids -> a micro-batch without targets."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    tokens = torch.tensor([token for prompt in prompts for token in prompt])
    positions = torch.cat([torch.arange(n) for n in lengths])
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
    return {
        "tokens": tokens.to(device),
        "positions": positions.to(device),
        "cu_seqlens": cu_seqlens.int().to(device),
        "max_seqlen": int(lengths.max()),
    }


class KVCache:
    """Keys and values of B growing sequences: the layout of attention() for the next token of each.

    n_tokens  int64 [B], the tokens of each sequence so far; the token being computed comes next
    capacity  the most tokens of a sequence
    """

    is_decoding = True
    use_varlen = False
    flex_attention = None

    def __init__(self, n_tokens, capacity):
        self.n_tokens = n_tokens
        self.longest = int(n_tokens.max())       # kept as an int: on a GPU, max() costs a sync
        self.capacity = capacity
        self.sequences = torch.arange(len(n_tokens), device=n_tokens.device)
        self.keys = {}               # {Attention: [B, capacity, K, E]}
        self.values = {}
        self.states = {}             # {GatedDeltaNet: its states}

    def advance(self):
        """Go to the next token. An answer that is finished and full stays at its last position."""
        last = self.capacity - 1
        self.n_tokens = (self.n_tokens + 1).clamp(max=last)
        self.longest = min(self.longest + 1, last)

    def store(self, layer, k, v, sequences, positions):
        """Store keys and values [n, K, E] of tokens at these positions of these sequences."""
        if layer not in self.keys:
            shape = (len(self.n_tokens), self.capacity, *k.shape[1:])
            self.keys[layer] = k.new_zeros(shape)
            self.values[layer] = v.new_zeros(shape)
        self.keys[layer][sequences, positions] = k
        self.values[layer][sequences, positions] = v

    def padded_groups(self, layer, q, k, v, seeds, need_mask):
        """Store k and v, and yield one group: q [B, H, 1, E], all keys and values so far
        [B, K, t, E], and the mask."""
        self.store(layer, k, v, self.sequences, self.n_tokens)
        t = self.longest + 1
        keys = self.keys[layer][:, :t].transpose(1, 2)
        values = self.values[layer][:, :t].transpose(1, 2)
        positions = torch.arange(t, device=q.device)
        distance = self.n_tokens[:, None] - positions                              # [B, t]
        mask = distance >= 0
        if layer.window:
            mask = mask & (distance < layer.window)
        queries = q[:, :, None]                                                    # [B, H, 1, E]
        yield queries, keys, values, mask[:, None, None], seeds

    def unpad(self, outputs):
        return outputs[0][:, 0]                                                    # [B, H, E]


class Prefill(PackedDocuments):
    """The layout of the prompts: PackedDocuments whose keys and values are stored in a KVCache."""

    def __init__(self, batch, cache):
        # use_varlen stays False: the kernel would bypass padded_groups(), which fills the cache
        n_tokens = len(batch["tokens"])
        super().__init__(batch["cu_seqlens"], n_tokens, batch["max_seqlen"], cache=cache)
        self.sequences = document_index(batch)
        self.positions = batch["positions"]

    def padded_groups(self, layer, q, k, v, seeds, need_mask):
        self.cache.store(layer, k, v, self.sequences, self.positions)
        yield from super().padded_groups(layer, q, k, v, seeds, need_mask)


@torch.no_grad()
def generate(model, prompts, max_tokens=256, stop=(),
             temperature=0.0, top_k=0, top_p=1.0, seed=0,
             keep_going=any):
    """Continue B prompts, lists of token ids. Yields, per step, B items: each prompt's next id.
    (generate_all() returns whole answers.)

    A prompt's answer ends with an id of `stop`, which is yielded, after max_tokens, or when prompt
    and answer have model.max_len tokens. After that, its item is None. temperature 0 takes the
    most likely token.

    seed        an int, or a list of one per prompt: then an answer's noise does not depend on the
                other prompts
    keep_going  is called after each step with B bools: is answer i unfinished? Generation stops
                when it returns False. On a sharded model, it must return the same on all ranks
    """
    m = model.cfg
    device = model.device
    check_generation(prompts, m["max_len"], max_tokens, temperature, top_k, top_p)
    lengths = [len(prompt) for prompt in prompts]
    capacity = min(max(lengths) + max_tokens, m["max_len"])
    cache = KVCache(torch.tensor(lengths, device=device), capacity)
    batch = pack_prompts(prompts, device)
    layout = Prefill(batch, cache)
    history = torch.zeros(len(prompts), capacity, dtype=torch.int64, device=device)
    history[layout.sequences, batch["positions"]] = batch["tokens"]
    last_tokens = batch["cu_seqlens"][1:].long() - 1
    # With longrope, angles depend on the length of the document, and keys in the cache are rotated
    # already. So each sequence counts as long as it can become, from the start.
    final_lengths = (cache.n_tokens + max_tokens).clamp(max=m["max_len"])          # [B]
    batch["document_lengths"] = final_lengths[layout.sequences]
    generators = random_generators(seed, len(prompts), device)
    logits = model.logits(batch, layout, last_tokens)                              # [B, V]
    unfinished = [True] * len(prompts)
    for n in range(max_tokens):
        ids = sample_next(logits, temperature, top_k, top_p, generators)           # [B]
        tokens = ids.tolist()
        yield [token if alive else None for token, alive in zip(tokens, unfinished)]
        for i, token in enumerate(tokens):
            if token in stop or lengths[i] + n + 1 >= m["max_len"]:
                unfinished[i] = False
        if n + 1 == max_tokens or not keep_going(unfinished):
            break
        history[cache.sequences, cache.n_tokens] = ids
        batch = {"tokens": ids, "positions": cache.n_tokens, "history": history,
                 "document_lengths": final_lengths}
        logits = model.logits(batch, cache)
        cache.advance()


def random_generators(seed, n, device):
    """n random generators: one per seed of a list, or n times the same for an int."""
    if isinstance(seed, list):
        return [torch.Generator(device=device).manual_seed(s) for s in seed]
    return [torch.Generator(device=device).manual_seed(seed)] * n


def check_generation(prompts, max_len, max_tokens, temperature, top_k, top_p):
    """Raise UserError for arguments of generate() that are not possible."""
    if not temperature >= 0 or not 0 < top_p <= 1 or top_k < 0 or max_tokens < 1:
        raise configs.UserError("expected temperature >= 0, 0 < top_p <= 1, top_k >= 0, "
                                f"max_tokens >= 1; got {temperature}, {top_p}, {top_k}, "
                                f"{max_tokens}")
    lengths = sorted({len(prompt) for prompt in prompts})
    if not lengths or lengths[0] < 1 or lengths[-1] >= max_len:
        raise configs.UserError(f"a prompt must have 1 to {max_len - 1} tokens (model.max_len - 1)"
                                f"; got {lengths}")


def sample_next(logits, temperature, top_k, top_p, generators):
    """Choose a token from logits [B, V], with B random generators: ids [B].

    Candidates are the top_k most likely tokens (0: all). Their probabilities are made to sum to 1,
    and of these tokens the fewest most likely ones are kept that have at least top_p together.
    """
    if not temperature:
        return logits.argmax(-1)
    temperature = max(temperature, 1e-6)                 # smaller ones overflow fp32
    sorted_logits, order = (logits / temperature).sort(-1, descending=True)
    if top_k:
        sorted_logits = sorted_logits[:, :top_k]
    probs = sorted_logits.softmax(-1)
    excluded = probs.cumsum(-1) - probs >= top_p         # more likely tokens reach top_p already
    kept = probs.masked_fill(excluded, 0)
    chosen = [row.multinomial(1, generator=g) for row, g in zip(kept, generators)]       # B x [1]
    return order.gather(-1, torch.stack(chosen))[:, 0]


def generate_all(model, prompts, max_tokens, stop, **sampling):
    """The answers of generate() as lists of token ids, without the ids that end them."""
    answers = [[] for _ in prompts]
    for ids in generate(model, prompts, max_tokens, stop, **sampling):
        for answer, token in zip(answers, ids):
            if token is not None and token not in stop:
                answer.append(token)
    return answers


def build_eval_prompts(dataset, stop_ids, limit, max_prompt_tokens):
    """Prompts from held-out chats: [(prompt ids, ids of the chat's last answer)].

    The last answer is the last run of tokens with a loss weight above 0, up to its first stop
    token, which is left out. The prompt is what comes before it; if the template writes that
    differently at inference, it is other_prompt of the token files. The first `limit` chats are
    taken that have both and whose prompt is shorter than max_prompt_tokens.

    dataset  a sampler.Dataset
    """
    prompts = []
    for source in dataset.sources.values():
        n_chats = len(source) if source.header["chats"] else 0
        for i in range(n_chats):
            if len(prompts) == limit:
                return prompts
            ids, loss_weights = source.document(i)       # one loss weight per id
            targets = np.flatnonzero(loss_weights > 0)
            if not len(targets):
                continue
            end = targets[-1] + 1
            start = targets[-1]
            while start > 0 and loss_weights[start - 1] > 0:
                start -= 1
            answer = ids[start:end].tolist()
            prompt = source.other_prompt(i).tolist() or ids[:start].tolist()
            stops = [n for n, token in enumerate(answer) if token in stop_ids]
            if start > 0 and stops and len(prompt) < max_prompt_tokens:
                prompts.append((prompt, answer[:stops[0]]))
    return prompts


# --------------------------------------------------------------------------------------------------
# counting

def flops(model, lengths, n_targets):
    """Floating-point operations of a training step, forward and backward.

    lengths    of the documents, in tokens
    n_targets  the number of target tokens, for which alone the head is computed

    6 per token and weight of a matrix, 4 if the weight is frozen. Attention is counted as causal
    and within documents.
    """
    m = model.cfg
    per_token = 0
    for name, p in model.blocks.named_parameters():
        if p.dim() == 2 and p.requires_grad:
            per_token += 6 * active_parameters(name, p.numel(), m)
    for name, module in model.blocks.named_modules():
        # not numel(): a quantized weight has another shape
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            n_weights = module.in_features * module.out_features
            per_token += 4 * active_parameters(name, n_weights, m)
    if model.per_layer is not None:
        weight = model.per_layer.proj.weight
        per_token += (6 if weight.requires_grad else 4) * weight.numel()
    head_factor = 6 if model.head_weight().requires_grad else 4
    per_target = head_factor * m["vocab_size"] * m["d_model"]
    lengths = [int(length) for length in lengths]
    shapes = [(block.attn.window, block.attn.head_dim) for block in model.blocks
              if isinstance(block.attn, Attention)]
    n_linear = m["n_layers"] - len(shapes)
    if n_linear:
        from families import delta_net
        per_token += n_linear * delta_net.flops_per_token(m)
    in_attention = 0
    for (window, head_dim), n_blocks in collections.Counter(shapes).items():
        pairs = 0                                        # a query and a key that it sees
        for length in lengths:
            # a triangle of pairs, without that of keys before the window
            outside_window = max(0, length - window) if window else 0
            pairs += (length ** 2 - outside_window ** 2) / 2
        # 2 products (q k^T, probs v) x 2 operations x (1 forward + 2 backward)
        in_attention += 12 * m["n_heads"] * head_dim * pairs * n_blocks
    return per_token * sum(lengths) + per_target * int(n_targets) + int(in_attention)


def active_parameters(name, n, m):
    """Of n parameters, the number that a token is computed with: of experts, that of a few."""
    if ".experts." in name:
        return n // m["n_experts"] * m["n_experts_per_token"]
    return n


SUMMARY_PARTS = {            # and the pattern of their parameters' names
    "embedding": r"embed|pos\.",
    "attention": r"attn\.(?!\w*norm)",
    "mlp": "mlp",
    "block_inputs": r"per_layer[._](gate|proj)",
    "norms": "norm|output_weight",
    "head": "head",
}


def summary(model):
    """A table of the model's parameters, with FLOPs and bytes, as text."""
    m = model.cfg
    params = dict(model.named_parameters())
    total = sum(p.numel() for p in params.values())
    gated = " gated" if m["glu"] else ""
    mlp = f"{m['n_experts']} experts of {m['d_expert']}" if m["n_experts"] else f"MLP {m['d_ff']}"
    lines = [f"{m['family']}: {m['n_layers']} blocks, width {m['d_model']}, {m['n_heads']} heads "
             f"of {m['head_dim']} ({m['n_kv_heads']} of keys and values), {mlp}{gated}, "
             f"{m['vocab_size']:,} tokens, context {m['max_len']:,}", ""]
    kinds = collections.Counter((split_block(name)[1], p.shape) for name, p in params.items())
    for (pattern, shape), n_blocks in kinds.items():
        times = f"  x {n_blocks}" if "{i}" in pattern else ""
        size = "x".join(map(str, shape))
        name = pattern.replace("{i}", "*")
        lines.append(f"  {name:<28} {size:>14} {shape.numel():>14,}{times}")
    lines.append("")
    for part, pattern in SUMMARY_PARTS.items():
        n = sum(p.numel() for name, p in params.items() if re.search(pattern, name))
        if n:
            lines.append(f"  {part:<28} {n:>29,} {n / total:>6.1%}")
    tied = "  (the head is the embedding)" if m["tie_embeddings"] else ""
    lines.append(f"  {'parameters':<28} {total:>29,}{tied}")
    if m["n_experts"]:
        active = sum(active_parameters(name, p.numel(), m) for name, p in params.items())
        lines.append(f"  {'of these, a token uses':<28} {active:>29,} {active / total:>6.1%}  "
                     f"({m['n_experts_per_token']} of {m['n_experts']} experts)")
    length = m["max_len"]
    lines.append(f"\n  {flops(model, [length], length) / length:.3g} FLOPs per token, forward and "
                 f"backward, in documents of {length:,} tokens")
    lines.append(f"  {total * 4 / 1e6:,.1f} MB in fp32, {total * 2 / 1e6:,.1f} MB in bf16")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# faster on a CPU

class CPURMSNorm(torch.autograd.Function):
    """F.rms_norm(x, [C], weight, eps) with a backward pass of its own.

    It keeps x and one number per token, where autograd keeps several fp32 tensors of the size of x.
    With bf16, this is 8% of a step (LOG.md, CPU throughput).
    """

    @staticmethod
    def forward(ctx, x, weight, eps):                                              # x [..., C]
        x_fp32 = x.float()
        C = x.shape[-1]
        norm = torch.linalg.vector_norm(x_fp32, dim=-1, keepdim=True)              # [..., 1]
        inverse_rms = norm.square_().div_(C).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        return (x_fp32 * inverse_rms).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, inverse_rms = ctx.saved_tensors
        normalized = x.float() * inverse_rms
        grad = grad.float()
        grad_times_normalized = grad * normalized
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = grad_times_normalized.flatten(0, -2).sum(0)
            grad_weight = grad_weight.to(weight.dtype)
        # n = x * inverse_rms, g = grad * weight:  grad_x = inverse_rms * (g - n * mean(g * n))
        weight = weight.float()
        minus_mean = (grad_times_normalized @ weight).div_(-x.shape[-1])
        grad_x = normalized.mul_(minus_mean[..., None])
        grad_x = grad_x.addcmul_(grad, weight).mul_(inverse_rms)
        return grad_x.to(x.dtype), grad_weight, None


# --------------------------------------------------------------------------------------------------
# command line

def print_summary(folder):
    """Print summary() of a folder's model. Reads no weights, except to compare a tied head."""
    m = read_model_section(folder)
    PretrainedWeights(folder, m)                         # raises UserError if they do not fit
    size = sum(path.stat().st_size for path in weight_files(folder))
    print(summary(build_on_meta(m)))
    print(f"  {size / 1e6:,.1f} MB as stored")


class Generator:
    """A model and its tokenizer, for the command line.

    template  compiled, or None: the model continues a text, and knows no turns
    """

    def __init__(self, folder, options):
        import tokenize_data
        device, dtype = choose_device(options)
        self.model, _ = load(folder, device=device, dtype=dtype)
        tokenizer = tokenize_data.huggingface_tokenizer(folder)
        self.tokenizer = tokenizer
        self.template = None
        stop = [tokenizer.special[tokenizer.eos]] if tokenizer.eos else []
        if tokenizer.template:
            self.template = tokenize_data.compile_template(tokenizer.template)
            stop = tokenize_data.stop_token_ids(tokenizer, self.template)
        self.stop = all_stop_ids(folder, stop, tokenizer.special_and_added_ids)
        self.sampling = {key: options[key] for key in SAMPLING}

    def encode(self, messages, **variables):
        """The ids of the prompt for an answer. Without a template, the last message is the text."""
        import tokenize_data
        tokenizer = self.tokenizer
        if self.template:
            return tokenize_data.encode_prompt(tokenizer, self.template, messages, **variables)
        ids = tokenizer.encode(tokenizer.clean(messages[-1]["content"])).tolist()
        return [tokenizer.special[tokenizer.bos], *ids] if tokenizer.bos else ids

    def print_answer(self, messages):
        """Print an answer while it is generated. Returns it."""
        text = ""
        answer = []
        n_printed = 0
        for [token] in generate(self.model, [self.encode(messages)], stop=self.stop,
                                **self.sampling):
            if token not in self.stop:
                answer.append(token)
            text = self.tokenizer.decode(answer)
            if not text.endswith("\ufffd"):              # more bytes of a character may follow
                print(text[n_printed:], end="", flush=True)
                n_printed = len(text)
        print(text[n_printed:])
        return text


def choose_device(options):
    """(device, dtype) of a command line. auto: a GPU and bf16, if there are; else CPU and fp32."""
    device = options["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise configs.UserError("device: cuda is not available; device=cpu or device=auto")
    dtype = options["dtype"]
    if dtype == "auto":
        has_bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if has_bf16 else "float32"
    return device, getattr(torch, dtype)


COMMANDS = ("/reset forgets the turns, /system TEXT also sets a system message; Ctrl-C ends an "
            "answer, Ctrl-D the chat")
TEXT_COMMANDS = ("the model has no chat template, so it continues each line; Ctrl-C ends that, "
                 "Ctrl-D ends")


def chat(generator):
    """Answer what is typed on a terminal, line by line, each with the turns before it."""
    with contextlib.suppress(ImportError):               # lets input() edit lines, with a history
        import readline                                  # noqa: F401
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print(COMMANDS if generator.template else TEXT_COMMANDS)
    system = []
    turns = []
    while True:
        try:
            line = input("> ")
            command, _, text = line.strip().partition(" ")
            if command == "/reset" and generator.template:
                turns = []
            elif command == "/system" and generator.template:
                system = system_message(generator, text.strip())
                turns = []
            elif re.fullmatch("/[a-z]+", command):
                print(COMMANDS if generator.template else TEXT_COMMANDS)
            elif command:
                messages = [*turns, {"role": "user", "content": line}]
                answer = generator.print_answer([*system, *messages])
                # Ctrl-C ends the answer with KeyboardInterrupt: then the turn is not kept
                turns = [*messages, {"role": "assistant", "content": answer}]
        except configs.UserError as error:
            print(f"error: {error}")
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


def system_message(generator, text):
    """The messages that begin a chat: [] without a text. UserError if the template has none."""
    user = {"role": "user", "content": "a"}
    system = [{"role": "system", "content": text}] if text else []
    if system and generator.encode([*system, user]) == generator.encode([user]):
        raise configs.UserError("the chat template leaves out system messages")
    return system


def read_prompts(generator, path):
    """A file of prompts as [(record, prompt ids)]. Answers at the end of a chat are left out."""
    import tokenize_data
    max_len = generator.model.cfg["max_len"]
    prompts = []
    for n, line in enumerate(configs.read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        record = {"prompt": line}
        with tokenize_data.error_context(f"{path}, line {n}"):
            if path.endswith(".jsonl"):
                record = tokenize_data.parse_record(line.encode())
            messages, variables = parse_prompt(record)
            ids = generator.encode(messages, **variables)
            if not 0 < len(ids) < max_len:
                raise configs.UserError(f"the prompt has {len(ids):,} tokens, and must have 1 to "
                                        f"{max_len - 1:,} (model.max_len - 1)")
        prompts.append((record, ids))
    return prompts


def parse_prompt(record):
    """The messages to answer, and the other variables of the chat template."""
    import tokenize_data
    prompt = record.get("prompt")
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}], {}
    if prompt:                                           # a list of messages
        record = {"messages": prompt, "tools": record.get("tools")}
    variables = tokenize_data.normalize_record(record, "a prompt", "chat")
    for key in ("weight", "warnings"):                   # of training
        variables.pop(key, None)
    messages = variables.pop("messages")
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise configs.UserError("has no prompt")
    return messages, variables


def answer_file(generator, path, out, batch_size):
    """Write the records of a file of prompts with their answers to `out`, or to stdout if empty."""
    prompts = read_prompts(generator, path)
    sampling = dict(generator.sampling)
    seed = sampling.pop("seed")
    file = open(out, "x", encoding="utf-8") if out else sys.stdout
    for start in log.progress(range(0, len(prompts), batch_size), f"answer {path}"):
        batch = prompts[start:start + batch_size]
        seeds = [seed + start + i for i in range(len(batch))]
        answers = generate_all(generator.model, [ids for _, ids in batch], stop=generator.stop,
                               seed=seeds, **sampling)
        for (record, _), answer in zip(batch, answers):
            record = record | {"generated_text": generator.tokenizer.decode(answer)}
            print(json.dumps(record, ensure_ascii=False), file=file, flush=True)
    if out:
        print(f"{len(prompts)} answers: {out}")


def main(argv):
    folder, prompt, options = parse_arguments(argv)
    if options["summary"]:
        print_summary(folder)
        return
    generator = Generator(folder, options)
    if options["prompts"]:
        answer_file(generator, options["prompts"], options["out"], options["batch_size"])
        return
    if not prompt and sys.stdin.isatty():
        chat(generator)
        return
    lines = [prompt] if prompt else map(str.strip, sys.stdin)
    for line in filter(None, lines):
        if not generator.template:                       # the model continues the text
            print(line, end="")
        generator.print_answer([{"role": "user", "content": line}])


if __name__ == "__main__":
    configs.run(main, sys.argv[1:])
