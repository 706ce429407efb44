"""families/gemma4.py: two kinds of heads, keys and values of other blocks, an input per block."""
import json, re

import pytest
import torch
from safetensors.torch import load_file, save_file

import configs, model as M
from test_model import close, documents, grads, noisy, pair, row

KEYS = ["model.family=gemma4_text", "model.n_layers=4", "model.d_model=32", "model.n_heads=4", "model.n_kv_heads=2",
        "model.head_dim=8", "model.global_head_dim=16", "model.d_ff=48", "model.vocab_size=101", "model.sliding_window=9",
        "model.layer_types=[sliding_attention, full_attention]"]
DENSE = [*KEYS, "model.attention_k_eq_v=true", "model.n_global_kv_heads=1"]
SHARED = [*KEYS, "model.d_per_layer=12", "model.n_kv_shared_layers=2", "model.double_wide_mlp=true"]


def section(keys):
    return configs.load(keys)[0]["model"]


def test_recompute_of_blocks_that_share_keys_gives_the_same_gradients():
    model, batch = noisy(M.build(section(SHARED))), row(documents(101, 40, 25, 3))
    model(batch)[0].backward()
    want = grads(model)
    for model.recompute in (1, 4):
        model(batch)[0].backward()
        got = grads(model)
        assert got.keys() == want.keys() and all(torch.equal(g, want[name]) for name, g in got.items())


def test_flops_of_both_kinds_of_blocks_are_counted_by_hand():
    mlp = 3 * 48 * 32
    head = 6 * 101 * 32 * 12
    full = 10 ** 2 + 20 ** 2
    in_window = full - 1 ** 2 - 11 ** 2
    pairs = 2 * 6 * 4 * (8 * in_window + 16 * full)
    local = (4 * 8 * 2 + 2 * 2 * 8) * 32                 # q and o, k and v
    of_keys = (4 * 16 * 2 + 16) * 32                     # q and o, k
    assert M.flops(M.build(section(DENSE)), [10, 20], 12) == 6 * 2 * (2 * mlp + local + of_keys) * 30 + head + pairs
    own = local + (4 * 16 * 2 + 2 * 2 * 16) * 32
    shared = (4 * 8 * 2 + 4 * 16 * 2) * 32               # q and o of both kinds
    inputs = 4 * (2 * 12 * 32) + 4 * 12 * 32             # gate and projection of each block; the input of all
    weights = 2 * mlp + own + 2 * 2 * mlp + shared + inputs
    assert M.flops(M.build(section(SHARED)), [10, 20], 12) == 6 * weights * 30 + head + pairs


def test_keys_of_blocks_that_use_those_of_others_are_ignored_in_files(tmp_path):
    """Google's files have some; neither transformers nor this decoder reads them."""
    ours, m, _, folder = pair("Gemma 4 (text), E2B, E4B")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    unread = {f"model.layers.3.self_attn.{name}.weight": torch.ones(3) for name in ("k_proj", "v_proj", "k_norm")}
    save_file(tensors | unread, tmp_path / "model.safetensors", {"format": "pt"})
    model, _ = M.load(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), ours.parameters(), strict=True))
    save_file(tensors | {"model.layers.1.self_attn.k": torch.ones(3)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(configs.UserError, match=re.escape("model.layers.1.self_attn.k is unknown")):
        M.load(tmp_path)


def test_hf_config_has_one_form_and_keeps_how_images_attend(tmp_path):
    """Global heads are written as older versions of transformers read them, too; rope by kinds of blocks."""
    ours, m, _, folder = pair("Gemma 4 (text)")
    config = json.loads((folder / "config.json").read_text())
    assert "per_layer_config" in config and "global_head_dim" not in config
    (tmp_path / "config.json").write_text(json.dumps(config | {"use_bidirectional_attention": "vision"}))
    out = M.hf_config(m, tmp_path, "float32")
    assert (out["global_head_dim"], out["num_global_key_value_heads"]) == (16, 1) and "per_layer_config" not in out
    assert out["rope_parameters"] == config["rope_parameters"] and out["use_bidirectional_attention"] == "vision"
    assert M.hf_config(m, None, "float32")["use_bidirectional_attention"] is None


def test_vocabulary_of_both_embeddings_grows():
    """New rows are the means of the stored ones, also of the embedding that is each block's input."""
    ours, m, _, folder = pair("Gemma 4 (text), E2B, E4B")
    larger, _ = M.load(folder, m | {"vocab_size": 103, "pad_vocab_size_multiple": 8})
    table, stored = larger.per_layer.embed.weight, ours.per_layer.embed.weight
    assert len(table) == 104 and torch.equal(table[:101], stored) and not table[103].any()
    assert close(table[101:103], stored.mean(0).expand(2, -1), 1e-6)


@pytest.mark.parametrize("keys, words", [
    (["model.block=gemma4"], "block: .*model.qk_norm=head"),
    (["model.attention_k_eq_v=true"], "attention_k_eq_v: .*without model.block=gemma4"),
    ([*KEYS, "model.n_global_kv_heads=1"], "n_global_kv_heads: .*null without model.attention_k_eq_v"),
    ([*DENSE, "model.n_global_kv_heads=3"], "n_global_kv_heads: .*a divisor of model.n_heads"),
    ([*KEYS, "model.n_kv_shared_layers=3"], "n_kv_shared_layers: none of the first 1 blocks has full_attention")])
def test_keys_of_gemma4_are_refused_where_they_fit_nothing(keys, words):
    with pytest.raises(configs.UserError, match=words):
        M.build_on_meta(section(keys))
