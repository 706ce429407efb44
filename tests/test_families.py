"""Every family of configs/families.yaml through a whole run: loaded, trained with LoRA, exported, reloaded."""
from pathlib import Path

import pytest
import torch

import configs, model as M, train
from test_model import FAMILIES, SMALL, apart, noisy, remembering

CONFIGS = dict(reversed(FAMILIES.values()))          # {model_type: the first of its configs}
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28,
              patch_size=14)
TOWERS = {
    "gemma3": dict(text_config=CONFIGS["gemma3_text"] | {"vocab_size": 259}, vision_config=VISION,
                   mm_tokens_per_image=4, image_token_index=257),
    "gemma4": dict(
        text_config=FAMILIES["Gemma 4 (text), E2B, E4B"][1] | dict(
            vocab_size=259, vocab_size_per_layer_input=259, pad_token_id=0, use_bidirectional_attention="vision"),
        vision_config=VISION | dict(num_key_value_heads=2, head_dim=8, position_embedding_size=8),
        audio_config=dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, subsampling_conv_channels=[4, 4],
                          output_proj_dims=16), image_token_id=257, video_token_id=257, audio_token_id=257),
    "gemma4_unified": dict(
        text_config=CONFIGS["gemma4_unified_text"] | dict(vocab_size=259, pad_token_id=0),
        vision_config=dict(patch_size=4, pooling_kernel_size=2, mm_embed_dim=16, mm_posemb_size=8, output_proj_dims=32),
        audio_config=dict(audio_embed_dim=16), image_token_id=257, video_token_id=257, audio_token_id=257),
    "mistral3": dict(text_config=SMALL | dict(model_type="mistral", vocab_size=259), vision_config=VISION,
                     image_token_index=257, tie_word_embeddings=False),
    "mistral3, of ministral3": dict(
        text_config=CONFIGS["ministral3"] | dict(model_type="ministral3", vocab_size=259), vision_config=VISION,
        image_token_index=257, tie_word_embeddings=False)}


def check_run(folder, chats, base, auto_class):
    """Two steps with LoRA: transformers computes the same from the merged model, and so does PEFT from the adapter.

    base  the reference's model, saved in folder / "base"
    """
    peft = pytest.importorskip("peft", reason="the reference, in requirements-dev.txt")
    cfg, _, explicit = configs.load([
        f"model.init_from={folder / 'base'}", "shard.lora.r=2", "max_steps=2", "lr=0.01", "batch_size=4",
        f"data.train.chats.path={chats}", "data.tokenizer=bytes", f"data.cache_dir={folder / 'tokens'}",
        f"out_dir={folder / 'run'}", "dtype=float32", "save_every=0"])
    train.main(cfg, explicit)
    out = Path(cfg["out_dir"])
    ids = torch.randint(256, (1, 30), generator=torch.Generator().manual_seed(0))
    merged, info = auto_class.from_pretrained(out / "hf", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        logits = M.load(out / "hf")[0].logits(M.pack_prompts(ids.tolist()))
        before = base.eval()(ids).logits[0]
        assert apart(logits, before) > 1e-3
        assert apart(logits, merged.eval()(ids).logits[0]) < 1e-5
        adapted = peft.PeftModel.from_pretrained(base, out / "adapter")
        assert apart(logits, adapted.eval()(ids).logits[0]) < 1e-5
    return merged


@pytest.mark.parametrize("model_type", CONFIGS)
def test_family_is_trained_with_lora_exported_and_reloaded(model_type, tmp_path, chats):
    transformers = pytest.importorskip("transformers", reason="the reference, in requirements-dev.txt")
    config = transformers.AutoConfig.for_model(model_type, **CONFIGS[model_type] | {"vocab_size": 259})
    torch.manual_seed(0)
    base = remembering(noisy(transformers.AutoModelForCausalLM.from_config(config)))
    base.save_pretrained(tmp_path / "base")
    check_run(tmp_path, chats, base, transformers.AutoModelForCausalLM)


@pytest.mark.parametrize("name", TOWERS)
def test_family_with_a_vision_tower_carries_it_along(name, tmp_path, chats, recwarn):
    transformers = pytest.importorskip("transformers", reason="the reference, in requirements-dev.txt")
    config = transformers.AutoConfig.for_model(name.partition(",")[0], **TOWERS[name])
    torch.manual_seed(0)
    base = remembering(noisy(transformers.AutoModelForImageTextToText.from_config(config)))
    base.save_pretrained(tmp_path / "base")
    tower = {name: p.clone() for name, p in base.state_dict().items() if "language_model" not in name}
    merged = check_run(tmp_path, chats, base, transformers.AutoModelForImageTextToText).state_dict()
    assert not [w for w in recwarn if "missing adapter keys" in str(w.message)]      # PEFT adapts the text part alone
    assert len(tower) > 10 and all(torch.equal(p, merged[name]) for name, p in tower.items() if name != "lm_head.weight")
