"""Every family of configs/families.yaml through a whole run: loaded, trained with LoRA, exported, reloaded."""
from pathlib import Path

import pytest
import torch

import configs, model as M, train
from test_model import FAMILIES, apart, noisy

CONFIGS = dict(reversed(FAMILIES.values()))          # {model_type: the first of its configs}


@pytest.mark.parametrize("model_type", CONFIGS)
def test_family_is_trained_with_lora_exported_and_reloaded(model_type, tmp_path, chats):
    """transformers computes the same from the merged model, and so does PEFT from base and adapter."""
    transformers = pytest.importorskip("transformers", reason="the reference, in requirements-dev.txt")
    peft = pytest.importorskip("peft", reason="the reference, in requirements-dev.txt")
    config = transformers.AutoConfig.for_model(model_type, **CONFIGS[model_type] | {"vocab_size": 259})
    base = noisy(transformers.AutoModelForCausalLM.from_config(config))
    base.save_pretrained(tmp_path / "base")
    cfg, _, explicit = configs.load([
        f"model.init_from={tmp_path / 'base'}", "shard.lora.r=2", "max_steps=2", "lr=0.01", "batch_size=4",
        f"data.train.chats.path={chats}", "data.tokenizer=bytes", f"data.cache_dir={tmp_path / 'tokens'}",
        f"out_dir={tmp_path / 'run'}", "dtype=float32", "save_every=0"])
    train.main(cfg, explicit)
    out = Path(cfg["out_dir"])
    ids = torch.randint(259, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = M.load(out / "hf")[0].logits(M.pack_prompts(ids.tolist()))
        before = base.eval()(ids).logits[0]
        merged = transformers.AutoModelForCausalLM.from_pretrained(out / "hf").eval()(ids).logits[0]
        adapted = peft.PeftModel.from_pretrained(base, out / "adapter").eval()(ids).logits[0]
    assert apart(logits, merged) < 3e-5 and apart(logits, adapted) < 3e-5 and apart(logits, before) > 1e-3
