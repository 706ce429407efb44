"""Rope beyond the context that a model was pretrained with: the kinds of model.rope_scaling.

model.py imports this file for a model that has this key. `original` is the length of the original
context, in tokens. Frequencies of rope are angles per token, one per pair of numbers that rotate
together: fp64 [R/2], from high to low.
"""
import math

import torch

import configs


def scale_freqs(freqs, m, lengths):
    """Return the scaled frequencies, and the factor of cos and sin.

    freqs    fp64 [R/2], those without scaling
    lengths  [T], of each token's document; with longrope, the frequencies are [T, 1, R/2]
    """
    scaling = m["rope_scaling"]
    kind = configs.rope_kind(scaling)
    if kind == "linear":
        freqs = freqs / scaling["factor"]
    elif kind == "llama3":
        keep = llama3_keep(freqs, scaling)
        freqs = freqs * keep + freqs / scaling["factor"] * (1 - keep)
    elif kind == "yarn":
        keep = yarn_keep(len(freqs), scaling, m["rope_theta"]).to(freqs.device)
        freqs = freqs * keep + freqs / scaling["factor"] * (1 - keep)
    elif kind == "proportional":                         # Gemma 4: only the first pairs rotate
        n_rotated = int(scaling.get("partial_rotary_factor", 1.0) * len(freqs))
        freqs = freqs / scaling.get("factor", 1.0)
        freqs[n_rotated:] = 0
    elif kind == "longrope":                             # arXiv:2402.13753
        short = freqs / freqs.new_tensor(scaling["short_factor"])
        long = freqs / freqs.new_tensor(scaling["long_factor"])
        is_long = lengths > scaling["original_max_position_embeddings"]            # [T]
        freqs = torch.where(is_long[:, None, None], long, short)                   # [T, 1, R/2]
    return freqs, cos_sin_factor(scaling, m["max_len"])


def llama3_keep(freqs, scaling):
    """The share of each frequency that Llama 3.1 keeps; the rest is divided by the factor.

    1 for pairs with more than high_freq_factor full turns in the original context, 0 below
    low_freq_factor, and in between linear in the number of turns.
    """
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    n_turns = scaling["original_max_position_embeddings"] * freqs / (2 * math.pi)
    return ((n_turns - low) / (high - low)).clamp(0, 1)


def yarn_keep(n_pairs, scaling, theta):
    """The share of each frequency that YaRN keeps (arXiv:2309.00071, section 3.2): fp64 [R/2].

    1 for pairs with more than beta_fast full turns in the original context, 0 below beta_slow, and
    in between linear in the index of the pair.
    """
    original = scaling["original_max_position_embeddings"]
    R = 2 * n_pairs
    bounds = []                                          # the index of the pair with n_turns
    for n_turns in (scaling.get("beta_fast", 32), scaling.get("beta_slow", 1)):
        bounds.append(R * math.log(original / (2 * math.pi * n_turns)) / (2 * math.log(theta)))
    low, high = bounds
    if scaling.get("truncate", True):
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, R - 1)
    if low == high:                                      # no division by 0
        high += 0.001
    pairs = torch.arange(n_pairs, dtype=torch.float64)
    return 1 - ((pairs - low) / (high - low)).clamp(0, 1)


def cos_sin_factor(scaling, max_len):
    """The factor of cos and sin with YaRN and LongRoPE. Attention scores have its square."""
    kind = configs.rope_kind(scaling)
    if kind not in ("yarn", "longrope"):
        return 1.0
    if "attention_factor" in scaling:
        return scaling["attention_factor"]
    original = scaling["original_max_position_embeddings"]
    factor = max(1, scaling.get("factor") or max_len / original)
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    growth = 0.1 * math.log(factor)
    if "mscale" in scaling and "mscale_all_dim" in scaling:      # DeepSeek-V2
        return (1 + scaling["mscale"] * growth) / (1 + scaling["mscale_all_dim"] * growth)
    return 1 + growth


def scale_queries(rope, positions, m):
    """The cos and sin of queries, from those of keys: see model.llama_4_scaling_beta."""
    original = m["rope_scaling"]["original_max_position_embeddings"]
    beta = m["llama_4_scaling_beta"]
    scale = 1 + beta * (1 + positions.double() // original).log()                  # [T]
    return tuple((scale[:, None, None] * x).float() for x in rope)


def finish_hf_config(config, m, source_rope):
    """Move the parts of rope in a config.json to where transformers reads them, in place.

    source_rope  rope_parameters of the pretrained model. Those that begin with "mrope" divide rope
                 among the positions of images, which a text does not have; they are kept
    """
    scaling = m["rope_scaling"] or {}
    if configs.rope_kind(scaling) == "longrope":         # where Phi-3 has it
        key = "original_max_position_embeddings"
        config[key] = scaling[key]
    beta = config.pop("rope_parameters.llama_4_scaling_beta", None)
    if beta is not None:
        config["rope_scaling"] = scaling | {"llama_4_scaling_beta": beta}
    mrope = {key: value for key, value in source_rope.items() if key.startswith("mrope")}
    if mrope:
        names = ("rope_theta", "partial_rotary_factor", "rope_scaling")
        rope = {name: config.pop(name) for name in names if name in config}
        scaling = rope.pop("rope_scaling", None) or {"rope_type": "default"}
        config["rope_parameters"] = mrope | rope | scaling
