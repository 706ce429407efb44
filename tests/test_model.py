"""model.py: the same numbers as the reference library, document by document (law 5), in and out of its files."""
import atexit, collections, functools, json, logging.handlers, math, os, random, re, shutil, sys, tempfile, warnings
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
from safetensors import safe_open

import configs, model as M, tokenize_data
from conftest import ROOT

torch.manual_seed(0)
M_TINY = configs.load(["model.n_layers=2", "model.d_model=48", "model.n_heads=4", "model.n_kv_heads=2",
                       "model.head_dim=16", "model.vocab_size=101", "model.d_ff=80"])[0]["model"]


def row(docs, masked=0):
    """Lists of ids -> a training row; the first `masked` targets of each document are not trained."""
    batch = M.pack_prompts([d[:-1] for d in docs])
    targets = [t if i >= masked else M.IGNORE_INDEX for d in docs for i, t in enumerate(d[1:])]
    weights = torch.tensor([float(t != M.IGNORE_INDEX) for t in targets])
    return batch | {"targets": torch.tensor(targets), "loss_weights": weights, "doc_ids": torch.arange(len(docs))}


def documents(vocab, *lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (n,), generator=g).tolist() for n in lengths]


def noisy(model):
    """New weights that are not special: norms and biases too."""
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
            p += 0.3 * noise * (1 if p.dim() < 2 else 0.3)
    return model


def remembering(model):
    """Numbers that matter: as transformers draws them, a delta net's state is 0 after a token, and a layer_scalar 1.

    Gemma 4 does not divide its scores by sqrt(head_dim), and large ones amplify rounding.
    """
    is_gemma4 = model.config.model_type.startswith("gemma4")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("dt_bias"):
                p -= 4
            if is_gemma4 and name.endswith("q_norm.weight"):
                p *= 0.3
        for name, scalar in model.named_buffers():
            if name.endswith("layer_scalar"):
                scalar *= 0.6
    return model


def grads(model):
    out = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out


def grads_by_file_name(theirs):
    """Gradients of one of their models. In memory, it has several experts' matrices in one parameter."""
    wanted = {}
    for name, grad in grads(theirs).items():
        experts, _, kind = name.partition(".experts.")
        if theirs.config.model_type == "gpt_oss":        # in files as in memory
            wanted[name] = grad
        elif not kind:
            wanted[name.replace("router.weight", "router.layer.weight")] = grad
        elif "block_sparse_moe" in name:
            wanted[experts + {"gate_up_proj": ".input_linear.weight", "down_proj": ".output_linear.weight"}[kind]] = grad
        else:
            kinds = ["gate_proj", "up_proj"] if kind == "gate_up_proj" else [kind]
            for i, of_expert in enumerate(grad):
                for kind, part in zip(kinds, of_expert.chunk(len(kinds))):
                    wanted[f"{experts}.experts.{i}.{kind}.weight"] = part
    return wanted


def close(a, b, tolerance):
    return float((a - b).detach().abs().max()) <= tolerance * float(b.detach().abs().max())


GPT2 = dict(n_embd=48, n_layer=2, n_head=4, vocab_size=101, n_positions=128, bos_token_id=0, eos_token_id=0)
LLAMA = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=101, tie_word_embeddings=False, initializer_range=0.05)
SCALED = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
NEOX = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, vocab_size=99,
            max_position_embeddings=256, bos_token_id=0, eos_token_id=0)
GRANITE = LLAMA | dict(embedding_multiplier=12.0, attention_multiplier=0.1, residual_multiplier=0.22,
                       logits_scaling=8.0)
OLMO2 = LLAMA | dict(pad_token_id=None, eos_token_id=None)
SMOLLM3 = LLAMA | dict(pad_token_id=None, bos_token_id=0, eos_token_id=0)
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=101, initializer_range=0.05, pad_token_id=None, bos_token_id=0, eos_token_id=0)
YARN = dict(rope_type="yarn", factor=8.0, beta_fast=4.0, original_max_position_embeddings=64)
GEMMA = SMALL | dict(head_dim=8, query_pre_attn_scalar=12, sliding_window=19)
GEMMA4 = SMALL | dict(
    num_hidden_layers=4, head_dim=8, global_head_dim=16, attention_k_eq_v=True, num_global_key_value_heads=1,
    hidden_size_per_layer_input=0, sliding_window=19, final_logit_softcapping=2.0,
    layer_types=["sliding_attention", "full_attention"] * 2, rope_parameters=dict(
        full_attention=dict(rope_type="proportional", partial_rotary_factor=0.3, rope_theta=5000.0),
        sliding_attention=dict(rope_type="default", rope_theta=70.0)))
# the output of a delta net is normalized; where q and k are nearly orthogonal, a larger eps keeps rounding small
QWEN3_5 = LLAMA | dict(num_hidden_layers=4, rms_norm_eps=1e-3, head_dim=16, linear_num_key_heads=2,
                       linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=12)
# the loss that balances experts is compared by itself, in tests/test_moe.py
EXPERTS = LLAMA | dict(num_experts_per_tok=3, router_aux_loss_coef=0.0)
# as the table of docs/models.md has them -> (model_type, its config)
FAMILIES = {
    "GPT-2": ("gpt2", GPT2),
    "GPT-2, untied": ("gpt2", GPT2 | dict(vocab_size=100, n_inner=80, tie_word_embeddings=False)),
    "GPT-NeoX, Pythia": ("gpt_neox", NEOX | dict(rotary_pct=0.25, num_attention_heads=2)),
    "GPT-NeoX, tied, not parallel": ("gpt_neox", NEOX | dict(
        rotary_pct=0.5, rotary_emb_base=1000, use_parallel_residual=False, tie_word_embeddings=True,
        attention_bias=False)),
    "Phi-1, 1.5, 2": ("phi", NEOX | dict(
        partial_rotary_factor=0.5, rope_theta=5000.0, num_key_value_heads=4, hidden_act="gelu_new")),
    "Phi, tied, grouped heads": ("phi", NEOX | dict(
        partial_rotary_factor=1.0, num_key_value_heads=2, tie_word_embeddings=True)),
    "Llama 1, 2": ("llama", LLAMA),
    "Llama 3, SmolLM2, tied, biases": ("llama", LLAMA | dict(
        num_key_value_heads=4, head_dim=16, vocab_size=100, tie_word_embeddings=True, attention_bias=True,
        mlp_bias=True)),
    "Llama 3.1 to 3.3, rope scaled": ("llama", LLAMA | dict(
        vocab_size=77, num_key_value_heads=1, max_position_embeddings=256, rope_parameters=SCALED)),
    "Mistral": ("mistral", LLAMA | dict(num_key_value_heads=1, sliding_window=None)),
    "Mistral, sliding window, tied": ("mistral", LLAMA | dict(head_dim=8, sliding_window=19, tie_word_embeddings=True)),
    "Qwen2, 2.5": ("qwen2", LLAMA),
    "Qwen2, tied": ("qwen2", LLAMA | dict(tie_word_embeddings=True)),
    "Qwen3": ("qwen3", LLAMA | dict(head_dim=16)),
    "Qwen3, tied": ("qwen3", LLAMA | dict(head_dim=12, tie_word_embeddings=True, num_key_value_heads=1)),
    "Qwen3, YaRN": ("qwen3", SMALL | dict(head_dim=16, rope_parameters=YARN | dict(rope_theta=5000.0))),
    "Qwen3.5 (text)": ("qwen3_5_text", QWEN3_5),
    "Qwen3.5 (text), tied": ("qwen3_5_text", QWEN3_5 | dict(
        tie_word_embeddings=True, partial_rotary_factor=0.5, linear_num_value_heads=2, linear_conv_kernel_dim=3,
        layer_types=["full_attention", "linear_attention", "linear_attention", "full_attention"])),
    "Granite 3": ("granite", GRANITE),
    "Granite 3, tied": ("granite", GRANITE | dict(tie_word_embeddings=True, num_key_value_heads=4)),
    "OLMo2": ("olmo2", OLMO2),
    "OLMo2, tied": ("olmo2", OLMO2 | dict(tie_word_embeddings=True, num_key_value_heads=4)),
    "SmolLM3": ("smollm3", SMOLLM3 | dict(
        num_hidden_layers=4, no_rope_layers=[1, 0, 1, 1], tie_word_embeddings=True)),
    "SmolLM3, untied": ("smollm3", SMOLLM3 | dict(no_rope_layers=[0, 1])),
    "Gemma 1": ("gemma", GEMMA),
    "Gemma 2": ("gemma2", GEMMA | dict(attn_logit_softcapping=3.0, final_logit_softcapping=2.0)),
    "Gemma 3": ("gemma3_text", GEMMA | dict(
        num_hidden_layers=3, sliding_window_pattern=3, rope_theta=5000.0, rope_local_base_freq=70.0,
        rope_scaling=dict(rope_type="linear", factor=8.0))),
    "Gemma 4 (text)": ("gemma4_text", GEMMA4),
    "Gemma 4 12B (text)": ("gemma4_unified_text", {
        key: value for key, value in GEMMA4.items() if key != "hidden_size_per_layer_input"}),
    "Gemma 4 (text), E2B, E4B": ("gemma4_text", GEMMA4 | dict(
        num_kv_shared_layers=2, use_double_wide_mlp=True, attention_k_eq_v=False, hidden_size_per_layer_input=12,
        vocab_size_per_layer_input=101)),
    "StarCoder2": ("starcoder2", SMALL | dict(sliding_window=19)),
    "Phi-3, Phi-4": ("phi3", SMALL),
    "Phi-4-mini, longrope": ("phi3", SMALL | dict(
        partial_rotary_factor=0.5, max_position_embeddings=400, original_max_position_embeddings=100,
        tie_word_embeddings=True, rope_scaling=dict(rope_type="longrope", short_factor=[1.0, 1.5],
                                                    long_factor=[2.0, 7.5]))),
    "OLMo 3": ("olmo3", SMALL | dict(sliding_window=19, layer_types=["sliding_attention", "full_attention"],
                                     rope_theta=5000.0, rope_scaling=YARN)),
    "Ministral": ("ministral", SMALL | dict(head_dim=8, sliding_window=19, layer_types=["sliding_attention", "full_attention"])),
    "Ministral 3": ("ministral3", SMALL | dict(head_dim=8, rope_parameters=YARN | dict(
        rope_theta=5000.0, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.7, original_max_position_embeddings=16))),
    "Seed-OSS": ("seed_oss", SMALL | dict(head_dim=16)),
    "EXAONE 4": ("exaone4", SMALL | dict(sliding_window=19, sliding_window_pattern=2)),
    "EXAONE 4, 1.2B": ("exaone4", SMALL | dict(sliding_window=None, layer_types=["full_attention"] * 2)),
    "GLM-4": ("glm", SMALL | dict(head_dim=8)),
    "GLM-4-0414": ("glm4", SMALL | dict(head_dim=8)),
    "Granite 4": ("granitemoehybrid", SMALL | dict(
        shared_intermediate_size=48, num_local_experts=0, layer_types=["full_attention"] * 2, mamba_n_heads=4,
        position_embedding_type="rope", embedding_multiplier=12.0, attention_multiplier=0.1,
        residual_multiplier=0.22, logits_scaling=8.0)),
    "Hunyuan": ("hunyuan_v1_dense", SMALL | dict(
        head_dim=8, rope_scaling=dict(rope_type="dynamic", alpha=50.0, factor=1.0))),
    "ERNIE 4.5": ("ernie4_5", SMALL | dict(head_dim=8, use_bias=True)),
    "Arcee": ("arcee", SMALL),
    "Nemotron, Minitron": ("nemotron", SMALL),
    "Qwen3-MoE": ("qwen3_moe", EXPERTS | dict(moe_intermediate_size=32, head_dim=16, num_experts=8, norm_topk_prob=True)),
    "Qwen3-MoE, tied": ("qwen3_moe", EXPERTS | dict(
        moe_intermediate_size=24, head_dim=12, num_experts=4, tie_word_embeddings=True)),
    "OLMoE": ("olmoe", EXPERTS | dict(num_experts=8, pad_token_id=None, eos_token_id=None)),
    "gpt-oss": ("gpt_oss", EXPERTS | dict(
        num_local_experts=6, head_dim=16, sliding_window=19, pad_token_id=None,
        rope_parameters=YARN | dict(rope_theta=5000.0, truncate=False))),
    "Granite 3 MoE": ("granitemoe", GRANITE | EXPERTS | dict(num_local_experts=6, tie_word_embeddings=True)),
}


@functools.cache
def pair(name):
    """(our model, its section, the reference's, the folder it was saved to)"""
    transformers = pytest.importorskip("transformers", reason="the reference, in requirements-dev.txt")
    kind, config = FAMILIES[name]
    config = transformers.AutoConfig.for_model(kind, **config)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    theirs = remembering(noisy(theirs)).eval()
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    theirs.save_pretrained(folder / "theirs")
    return *M.load(folder / "theirs"), theirs, folder / "theirs"


def apart(a, b):
    """Largest difference, in parts of the largest number."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())


# what is compared with the reference: a figure, and the most it may be (docs/models.md: python tests/test_model.py)

def logits(ours, m, theirs, folder):
    """Packed documents against theirs, one at a time."""
    docs = documents(m["vocab_size"], 70, 3, 2, 41, 120, seed=1)
    with torch.no_grad():
        return apart(ours.logits(row(docs)), torch.cat([theirs(torch.tensor([d[:-1]])).logits[0] for d in docs]))


def loss_and_gradients(ours, m, theirs, folder):
    """Of packed documents, the loss and every parameter's gradient, against the sums of theirs."""
    docs = documents(m["vocab_size"], 70, 3, 2, 41, 120, seed=1)
    nll = torch.nn.functional.cross_entropy
    wants = [nll(theirs(torch.tensor([d[:-1]])).logits[0], torch.tensor(d[1:]), reduction="sum") for d in docs]
    sum(wants).backward()
    loss_sum, weight, stats = ours(row(docs))
    loss_sum.backward()
    assert weight == sum(len(d) - 1 for d in docs) and close(stats["loss"], torch.stack(wants), 1e-5)
    got, wanted = grads(ours), grads_by_file_name(theirs)
    trained = {tensor: parts for tensor, parts in M.hf_tensors(m).items() if parts[0][0] in got}
    got = M.collect_tensors(got.get, m, trained.items(), torch.float32)
    if "embed_out.weight" in got:                                      # as files call what is lm_head in memory
        got["lm_head.weight"] = got.pop("embed_out.weight")
    assert got.keys() == wanted.keys()
    return max(apart(loss_sum, sum(wants)), *(apart(got[name], g) for name, g in wanted.items()))


def bf16(ours, m, theirs, folder):
    """How far bf16's logits are from fp32's, in parts of how far theirs are, of the median token.

    Not of the mean: where two experts are nearly equally probable, rounding chooses one of them.
    """
    docs = documents(m["vocab_size"], 50, 9, seed=2)
    narrow = type(theirs)(theirs.config).to(torch.bfloat16).eval()
    narrow.load_state_dict({key: t.bfloat16() for key, t in theirs.state_dict().items()})
    run = lambda model: torch.cat([model(torch.tensor([d])).logits[0].float() for d in docs])
    with torch.no_grad():
        exact, want = run(theirs), run(narrow)
        ours.dtype = torch.bfloat16
        got = ours.logits(M.pack_prompts(docs))
        ours.dtype = torch.float32
    assert got.dtype == torch.float32
    error, their_error = ((logits - exact).abs().mean(1).median() for logits in (got, want))
    return float(error / their_error)


def greedy(ours, m, theirs, folder):
    """Of 64 tokens behind each of three prompts, generated together, those that they don't choose there."""
    prompts = documents(m["vocab_size"], 1, 17, 5, seed=3)
    wrong = 0
    for prompt, ids in zip(prompts, M.generate_all(ours, prompts, 64, ())):
        assert len(ids) == 64
        with torch.no_grad():
            chosen = theirs(torch.tensor([prompt + ids])).logits[0].argmax(-1)
        wrong += int((chosen[len(prompt) - 1:-1] != torch.tensor(ids)).sum())
    return wrong


def export(ours, m, theirs, folder):
    """Saved in parts, loaded by them without a warning: numbers of weights and logits that differ; and ours again."""
    transformers = pytest.importorskip("transformers")
    out, said = folder.with_name("out"), logging.handlers.BufferingHandler(10 ** 6)
    M.save_pretrained(ours.get_parameter, m, out, folder, [1, 2], bos=3, control_ids={1, 2, 3}, shard_bytes=40_000)
    assert (out / "model.safetensors.index.json").is_file()
    transformers.logging.get_logger().addHandler(said)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        again, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    transformers.logging.get_logger().removeHandler(said)
    assert not warned and not [r.getMessage() for r in said.buffer if r.levelno >= logging.WARNING]
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sorted(again.config.eos_token_id) == [1, 2]
    ids = torch.tensor(documents(m["vocab_size"], 60))
    first = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    reloaded, m2 = M.load(out)
    weights = zip(reloaded.state_dict().values(), ours.state_dict().values(), strict=True)
    assert m2 == m | {"init_from": str(out)} and all(torch.equal(a, b) for a, b in weights)
    names = [{name for f in path.glob("*.safetensors") for name in safe_open(f, "pt").keys()} for path in (folder, out)]
    assert names[0] == names[1]                                        # what other programs look for
    weights = zip(again.state_dict().values(), theirs.state_dict().values(), strict=True)
    with torch.no_grad():
        return sum(int((a != b).sum()) for a, b in weights) + int((again.eval()(ids).logits != first(ids).logits).sum())


CHECKS = {"logits": (logits, 1e-5), "loss and gradients": (loss_and_gradients, 1e-4), "bf16": (bf16, 1.5),
          "64 greedy tokens": (greedy, 0), "export": (export, 0)}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", FAMILIES)
def test_parity_with_the_reference(name, check):
    function, most = CHECKS[check]
    assert function(*pair(name)) <= most


def parity_table():
    """The table of docs/models.md, measured -> lines"""
    rows = [["family", *CHECKS], ["---"] * (len(CHECKS) + 1)]
    for name in FAMILIES:
        figures = [function(*pair(name)) for function, _ in CHECKS.values()]
        rows.append([name, f"{figures[0]:.0e}", f"{figures[1]:.0e}", f"{figures[2]:.2f}",
                     "equal" if figures[3] == 0 else f"{figures[3]} differ",
                     "bitwise" if figures[4] == 0 else f"{figures[4]} differ"])
    return ["| " + " | ".join(row) + " |" for row in rows]


def test_generate_rotates_by_the_longest_text_that_a_prompt_can_become():
    """With longrope: a text of more than 100 tokens has other angles from its first token on."""
    ours, m, _, _ = pair("Phi-4-mini, longrope")
    prompt, short = documents(m["vocab_size"], 95, 5)
    answer, other = M.generate_all(ours, [prompt, short], 10, ())
    for text, n in ((prompt + answer, 95), (short + other, 5)):
        assert ours.logits(M.pack_prompts([text]))[n - 1:-1].argmax(-1).tolist() == text[n:]


def test_hf_config_has_the_factor_of_queries_among_the_keys_of_rope():
    """As transformers reads Ministral 3, and nowhere else."""
    _, m, _, folder = pair("Ministral 3")
    config = M.hf_config(m, folder, "float32")
    assert config["rope_scaling"] == m["rope_scaling"] | {"llama_4_scaling_beta": 0.7}
    assert not [key for key in config if "." in key]


@pytest.mark.release
def test_parity_table_has_every_family_and_check():
    lines = (ROOT / "docs" / "models.md").read_text().splitlines()
    begin = tuple(f"| {name} |" for name in ("family", *FAMILIES))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith(begin)]
    assert rows[0] == ["family", *CHECKS] and [row[0] for row in rows[1:]] == list(FAMILIES)
    assert all(float(row[n]) <= most for row in rows[1:] for n, (_, most) in enumerate(list(CHECKS.values())[:3], 1))
    assert all(row[4:] == ["equal", "bitwise"] for row in rows[1:])


def test_models_page_shows_a_family_of_the_file():
    [family] = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "models.md").read_text(), re.S)
    assert f"\n{family}\n" in (configs.HERE / "families.yaml").read_text()


NEEDED = {                                                             # keys without which theirs fail
    "gpt2": ["model.activation=gelu_new"], "smollm3": ["model.rope_layers=[1, 0]"], "granite4": ["model.d_model=64"],
    "qwen3_5_text": ["model.layer_types=[linear_attention, full_attention]"], "olmo3": ["model.sliding_window=9"],
    "gemma3": ["model.rope_local_theta=100.0", "model.sliding_window=9"], "gemma4_text": ["model.sliding_window=9"],
    "gemma4_unified_text": ["model.sliding_window=9"]}


@pytest.mark.parametrize("family", [name for name, family in configs.families().items()
                                    if name != "native" and "carried" not in family])
def test_new_weights_export_too(family, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the reference, in requirements-dev.txt")
    m = configs.load(["model.n_layers=2", "model.d_model=32", "model.vocab_size=64", f"model.family={family}",
                      *NEEDED.get(family, [])])[0]["model"]
    ours = noisy(M.build(m))
    M.save_pretrained(ours.get_parameter, m, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = documents(64, 30)
    assert close(ours.logits(M.pack_prompts(ids)), theirs(torch.tensor(ids)).logits[0], 1e-5)


# ---- config.json in old and new words: the same numbers as the reference, or an error that names the key

def draw_rope(choose):
    """A rope_scaling or rope_parameters section: often incomplete, sometimes of a kind that we don't compute."""
    section = {"alpha": 50.0, "rope_type": choose("default", "linear", "linear", "llama3", "llama3", "yarn", "dynamic"),
               "rope_theta": choose(500.0, 100_000), "factor": choose(2.0, 8), "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": choose(16, 64),
               "partial_rotary_factor": choose(0.5, 1.0), "full_attention": {"rope_theta": 7.0}}
    rare = {"alpha": 0.5, "full_attention": 0.03, "partial_rotary_factor": 0.15, "rope_theta": 0.5,
            "original_max_position_embeddings": 0.6}
    section = {key: value for key, value in section.items() if choose.often(rare.get(key, 0.93))}
    if choose.often(0.3):
        section["type"] = section.pop("rope_type", "linear")           # its older name
    return section


def draw_config(choose, kind):
    """A config.json with keys that its family reads and keys that it doesn't, missing or given twice."""
    small = {"gpt2": dict(n_embd=64, n_layer=2, n_head=4, vocab_size=101, n_positions=128)}
    config = small.get(kind, dict(hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
                                  vocab_size=101, pad_token_id=None))
    family = configs.families()[kind]
    config |= dict(model_type=family["model_type"], bos_token_id=0, eos_token_id=0)
    if "n_experts" in family["keys"]:
        config |= dict(num_experts_per_tok=2, moe_intermediate_size=24)
        config[choose("num_experts", "num_local_experts") if kind != "granitemoe" else "num_local_experts"] = 4
    *_, n_kv_heads = family["keys"].get("n_kv_heads", [None])
    if n_kv_heads or kind == "nemotron":                               # the default is that of a large model, or fails
        config["num_key_value_heads"] = 2
    if kind in ("ministral", "hunyuan"):                               # they fail without one
        config["head_dim"] = 16
    if kind.startswith("gemma4"):
        config |= dict(num_hidden_layers=3, layer_types=["sliding_attention", "full_attention", "full_attention"],
                       global_head_dim=choose(8, 12), hidden_size_per_layer_input=choose(0, 8),
                       num_kv_shared_layers=choose(0, 1), attention_k_eq_v=choose(True, False),
                       num_global_key_value_heads=choose(1, 2, None), use_double_wide_mlp=choose(True, False),
                       vocab_size_per_layer_input=101)
    if kind == "granite4":
        config |= dict(num_local_experts=0, position_embedding_type="rope", layer_types=["attention"] * 2,
                       mamba_n_heads=8)
    usual = {"rope_theta": (100.0, 500_000), "rope_scaling": (None, {}, draw_rope), "rope_parameters": (None, draw_rope),
             "partial_rotary_factor": (0.5, 1.0), "rotary_pct": (0.5, 1.0), "rotary_emb_base": (50, 1000.0),
             "max_position_embeddings": (64, 256), "original_max_position_embeddings": (16, 64),
             "head_dim": (8, 16, 24, None), "num_key_value_heads": (1, 2, 4, None),
             "tie_word_embeddings": (True, False), "attention_bias": (True, False), "mlp_bias": (True, False),
             "hidden_act": ("gelu", "gelu_new", "relu", "silu"), "activation_function": ("relu", "gelu_new"),
             "rms_norm_eps": (1e-3, 1e-5), "layer_norm_eps": (1e-3,), "layer_norm_epsilon": (1e-3,),
             "sliding_window": (5, None), "max_window_layers": (0, 1, 28), "use_sliding_window": (False,),
             "no_rope_layers": ([1, 0], [0, 1]), "no_rope_layer_interval": (1, 2, 3), "hidden_size": (64,),
             "num_attention_heads": (4,), "n_inner": (80, None), "use_parallel_residual": (True, False),
             "reorder_and_upcast_attn": (True, False), "torch_dtype": ("float32",), "logits_scaling": (3,),
             "embedding_multiplier": (2.0,), "attention_multiplier": (0.3,), "residual_multiplier": (0.5,),
             "final_logit_softcapping": (None, 2.0), "attn_logit_softcapping": (None, 3), "query_pre_attn_scalar": (12,),
             "hidden_activation": ("gelu_pytorch_tanh", "silu"), "rope_local_base_freq": (70.0,), "use_bias": (True, False),
             "sliding_window_pattern": (1, 2, 3), "norm_topk_prob": (True, False), "router_aux_loss_coef": (0.0, 0.1)}
    rare = {"layer_types": (["full_attention"] * 2, ["sliding_attention"] * 2, ["full_attention", "sliding_attention"]),
            "use_sliding_window": (True,), "is_causal": (True, False), "hidden_act": ("quick_gelu",),
            "scale_attn_weights": (True, False), "scale_attn_by_inverse_layer_idx": (True, False),
            "qk_layernorm": (True,), "use_bidirectional_attention": (True,),
            "num_local_experts": (4,) if kind == "granitemoe" else (0, 4),
            "per_layer_config": (None, {"0": {"rms_norm_eps": 0.5}}),
            "mlp_only_layers": ([], [0]), "decoder_sparse_step": (1, 2), "clip_qkv": (None, 0.1),
            "text_config": (None, {"model_type": "llama"}), "quantization_config": ({"quant_method": "gptq"},)}
    for keys, probability in ((usual, 0.25), (rare, 0.025)):
        for key, values in keys.items():
            if choose.often(probability):
                value = choose(*values)
                config[key] = value(choose) if callable(value) else value
    for key in ("rope_scaling", "rope_parameters"):
        if kind == "ministral3" and config.get(key):
            config[key]["llama_4_scaling_beta"] = 0.3
    return config


def state_of_files(model):
    """Their state_dict with the names of files. In memory, it has several experts' matrices in one parameter."""
    state = model.state_dict()
    if any(".experts." in name for name in state):
        from transformers.core_model_loading import revert_weight_conversion
        state = revert_weight_conversion(model, state)
    return state


def draw_weights(choose, model):
    """Random weights for one of their models, as a file has them: with, without, or with another head than is tied."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, p in state_of_files(model).items():
        tensors[name] = (0 if p.dim() > 1 else p) + torch.randn(p.shape, generator=generator) * 0.15
    head = tensors.pop("lm_head.weight")
    [embed] = [name for name in tensors if name.endswith(("embed_tokens.weight", "embed_in.weight", "wte.weight"))]
    way = "as the config says" if choose.often(0.8) else choose("both", "the same twice", "head only", "embedding only")
    if way == "the same twice":
        head = tensors[embed].clone()
    if way == "head only":
        del tensors[embed]
    if way != "embedding only" and (way != "as the config says" or not model.config.tie_word_embeddings):
        tensors["embed_out.weight" if "embed_in" in embed else "lm_head.weight"] = head
    return tensors


def compare_reading(choose, kind, folder):
    """Draw a folder, load it with them and with us -> "equal", "refused by us", "... by them"."""
    import transformers
    from safetensors.torch import save_file
    config = draw_config(choose, kind)
    (folder / "config.json").write_text(json.dumps(config))
    load = functools.partial(transformers.AutoModelForCausalLM.from_pretrained, attn_implementation="eager")
    ids = documents(101, 60)
    logits = lambda model: model.eval()(torch.tensor(ids), use_cache=False).logits[0]
    try:
        new = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
        save_file(draw_weights(choose, new), folder / "model.safetensors", {"format": "pt"})
        theirs, info = load(folder, output_loading_info=True)
        want = None if info["missing_keys"] else logits(theirs)        # None: with new, random weights
    except Exception:                                                  # of any kind; most have no message of use
        want = None
    try:
        ours, m = M.load(folder)
    except configs.UserError as error:
        named = {*config, "rope_type", "lm_head", "embed_out", "model.safetensors", "factor", "wte", "embed_", "safetensors"}
        assert any(key in str(error).replace(str(folder), "") for key in named), (config, error)
        assert "\n" not in str(error)
        return "refused by us"
    if want is None:
        return "refused by them"
    assert apart(ours.logits(M.pack_prompts(ids)), want) < 1e-4, config
    if choose.often(0.3):
        M.save_pretrained(ours.get_parameter, m, folder / "out", folder)
        assert apart(logits(load(folder / "out")), want) < 1e-4, config
    return "equal"


@pytest.mark.parametrize("kind", [name for name, family in configs.families().items()
                                  if name != "native" and "section" not in family])
def test_config_json_is_read_as_the_reference_reads_it(kind, tmp_path):
    """CONFIG_DRAWS=1000 draws more than the 6 of each family."""
    transformers = pytest.importorskip("transformers", reason="the reference, in requirements-dev.txt")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    random_choice = random.Random(f"{kind} 0")
    choose = lambda *values: random_choice.choice(values)
    choose.often = lambda probability: random_choice.random() < probability
    results = collections.Counter()
    for n in range(int(os.environ.get("CONFIG_DRAWS", 6))):
        folder = tmp_path / str(n)
        folder.mkdir()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results[compare_reading(choose, kind, folder)] += 1
        shutil.rmtree(folder)
    transformers.logging.set_verbosity_warning()
    assert results["equal"] > 0, results


FACTORS = dict(rope_type="longrope", short_factor=[1.0, 1.5, 2.0, 1.0], long_factor=[2.0, 7.5, 9.0, 30],
               original_max_position_embeddings=40)


@pytest.mark.parametrize("keys", [
    dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=4096),
    dict(rope_type="yarn", factor=4, original_max_position_embeddings=40, truncate=False, beta_fast=4, beta_slow=0.5),
    dict(rope_type="yarn", factor=40.0, original_max_position_embeddings=400, mscale=0.7, mscale_all_dim=1.0),
    dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=400, attention_factor=1.3, mscale=None),
    dict(rope_type="yarn", factor=0.5, original_max_position_embeddings=12),
    FACTORS, FACTORS | dict(factor=3.0), FACTORS | dict(attention_factor=0.8)])
def test_rope_freqs_scales_as_the_reference(keys):
    transformers = pytest.importorskip("transformers", reason="the reference, in requirements-dev.txt")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    theirs = transformers.LlamaConfig(**SMALL, max_position_embeddings=300, rope_parameters=keys | {"rope_theta": 500.0})
    hf_config = SMALL | dict(model_type="llama", rope_theta=500.0, max_position_embeddings=300, rope_scaling=keys)
    m = configs.load(["model.d_model=32", "model.n_heads=4", "model.max_len=300"])[0]["model"]
    m |= configs.hf_config.translate(hf_config, "config.json") | {"head_dim": 8}
    positions = torch.arange(60)
    for length in (40, 60):
        freqs, scale = ROPE_INIT_FUNCTIONS[keys["rope_type"]](theirs, "cpu", seq_len=length)
        angles = positions[:, None] * freqs.double()
        cos, sin = M.rope_freqs(positions, m, torch.full((60,), length))
        assert torch.allclose(cos[:, 0].double(), angles.cos() * scale, atol=1e-5)
        assert torch.allclose(sin[:, 0].double(), angles.sin() * scale, atol=1e-5)


# ---- law 5

def test_packed_documents_do_not_see_each_other():
    model = noisy(M.build(M_TINY))
    docs = documents(101, 9, 33, 2, 70, 3, 12, 70)
    alone = [model(row([d])) for d in docs]
    sum(a[0] for a in alone).backward()
    want = grads(model)
    loss_sum, weight, stats = model(row(docs))
    loss_sum.backward()
    assert close(stats["loss"], torch.cat([a[2]["loss"] for a in alone]), 1e-5) and weight == sum(len(d) - 1 for d in docs)
    assert all(close(g, want[name], 1e-4) for name, g in grads(model).items())
    changed = docs[:1] + documents(101, 33, seed=9) + docs[2:]
    before, again = stats["loss"], model(row(changed))[2]["loss"]
    assert torch.equal(again[2:], before[2:]) and torch.equal(again[:1], before[:1])


def test_padding_is_outside_every_document():
    model, batch = noisy(M.build(M_TINY)), row(documents(101, 9, 33))
    padded = dict(batch)
    for key in ("tokens", "targets", "loss_weights", "positions"):
        value = M.IGNORE_INDEX if key == "targets" else 0
        padded[key] = torch.nn.functional.pad(batch[key], (0, 7), value=value)
    model(batch)[0].backward()
    want = grads(model)
    loss_sum, weight, _ = model(padded)
    loss_sum.backward()
    assert weight == 40 and all(close(g, want[name], 1e-4) for name, g in grads(model).items())


def test_an_idle_row_counts_nothing():
    model = M.build(M_TINY)
    row_of_none = {key: torch.zeros(0, dtype=torch.long) for key in ("tokens", "targets", "positions", "doc_ids")}
    row_of_none |= {"loss_weights": torch.zeros(0), "cu_seqlens": torch.zeros(1, dtype=torch.int32), "max_seqlen": 0}
    loss_sum, weight, stats = model(row_of_none)
    loss_sum.backward()
    assert loss_sum == 0 and weight == 0 and len(stats["loss"]) == 0
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


def test_an_untrained_target_has_no_loss_and_no_gradient_of_its_own():
    model, docs = noisy(M.build(M_TINY)), documents(101, 20, 15)
    logits = model.logits(row(docs))
    batch = row(docs, masked=6)
    keep = batch["targets"] != M.IGNORE_INDEX
    torch.nn.functional.cross_entropy(logits[keep], batch["targets"][keep], reduction="sum").backward()
    want = grads(model)
    loss_sum, weight, _ = model(batch)
    loss_sum.backward()
    assert weight == int(keep.sum()) == 19 - 6 + 14 - 6
    assert all(close(g, want[name], 1e-4) for name, g in grads(model).items())


def test_weights_weigh(monkeypatch):
    model, batch = noisy(M.build(M_TINY)), row(documents(101, 12, 9))
    batch["loss_weights"] = torch.rand(len(batch["loss_weights"]), generator=torch.Generator().manual_seed(0))
    nll = torch.nn.functional.cross_entropy(model.logits(batch), batch["targets"], reduction="none")
    loss_sum, weight, _ = model(batch)
    assert close(loss_sum, (nll * batch["loss_weights"]).sum(), 1e-5) and close(weight, batch["loss_weights"].sum(), 1e-6)


def test_chunks_of_the_loss_change_rounding_only(monkeypatch):
    model = noisy(M.build(M_TINY | {"tie_embeddings": False, "head_bias": True}))
    batch = row(documents(101, 90, 200, 130))
    model(batch)[0].backward()
    want = grads(model)
    monkeypatch.setattr(M, "CHUNK_BYTES", 1)                               # 64 tokens at a time, the least
    monkeypatch.setattr(M, "PIECE_BYTES", 4 * 7 * 300)
    model(batch)[0].backward()
    assert all(close(g, want[name], 1e-5) for name, g in grads(model).items()) and "head_bias" in want


def most_bytes(function):
    """-> (what function() returns, most bytes of torch's allocations meanwhile)"""
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        out = function()
    events = prof.profiler.kineto_results.events()
    now = most = 0
    for _, n in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += n
        most = max(most, now)
    return out, most


def test_head_and_loss_take_a_quarter_of_the_memory_that_all_logits_would():
    x, head = torch.randn(4096, 128, requires_grad=True), (torch.randn(32_000, 128) * 0.02).requires_grad_()
    targets, weights = torch.randint(32_000, (4096,)), torch.rand(4096)

    def gradients(loss_sum):
        loss_sum.backward()
        out = x.grad, head.grad
        x.grad = head.grad = None
        return out

    def whole():
        nll = torch.nn.functional.cross_entropy(x @ head.T, targets, reduction="none")
        return gradients((nll * weights).sum())
    want, plain = most_bytes(whole)
    model = M.build_on_meta(M_TINY | {"vocab_size": 32_000})
    losses = M.MicroBatchLoss(model, {"targets": targets}, torch.arange(4096))
    got, chunked = most_bytes(lambda: gradients(M.ChunkedLoss.apply(x, head, None, weights, losses)[0]))
    assert chunked < 0.25 * plain and all(apart(a, b) < 1e-5 for a, b in zip(got, want))


def test_untrained_targets_cost_no_matmul_of_the_head():
    from torch.utils.flop_counter import FlopCounterMode
    model, docs = M.build(M_TINY | {"vocab_size": 5000}), documents(101, 200, 200, 241)

    def counted(masked):
        with FlopCounterMode(display=False) as count:
            model(row(docs, masked))[0].backward()
        return count.get_total_flops()
    one = 2 * 2 * 5000 * 48        # forward and the gradient of x. addmm_(), that of the head, is not counted
    assert counted(0) - counted(150) == one * (640 - 192)            # 638 and 188 tokens, in chunks of 64


def test_a_forward_pass_without_gradients_takes_none_in_the_head_either():
    from torch.utils.flop_counter import FlopCounterMode
    model, docs = M.build(M_TINY | {"vocab_size": 5000}), documents(101, 129)
    with torch.no_grad(), FlopCounterMode(display=False) as count:
        model(row(docs))
    assert 2 * 5000 * 48 * 128 <= count.get_total_flops() < 1.5 * 2 * 5000 * 48 * 128


def test_another_loss_is_evaluated_with_plain_nll_beside_it():
    """In evaluation alone: training computes what it needs."""
    model, plain, batch = noisy(M.build(M_TINY | {"loss": "dft"})), noisy(M.build(M_TINY)), row(documents(101, 12, 9))
    batch["loss_weights"][::2] = 0.5
    assert model(batch)[2].keys() == {"loss"}
    assert close(model.eval()(batch)[2]["nll"], plain.eval()(batch)[2]["loss"], 1e-6)
    assert plain(batch)[2].keys() == {"loss"}
    assert not any(values.requires_grad for values in model(batch)[2].values())


def test_token_stats_are_summed_per_document_in_training_alone(monkeypatch):
    """They get the head's input and the gradient of loss_weight * loss with respect to its output."""
    monkeypatch.setattr(M, "CHUNK_BYTES", 1)                            # 64 tokens in a chunk
    monkeypatch.setitem(M.TOKEN_STATS, "x_sum", lambda x, dlogits: x.sum(-1))
    monkeypatch.setitem(M.TOKEN_STATS, "square", lambda x, dlogits: (dlogits ** 2).sum(-1))
    model = noisy(M.build(M_TINY | {"pad_vocab_size_multiple": 64, "logits_scaling": 2.0}))
    batch = row(documents(101, 90, 70, 5), masked=3)
    batch["loss_weights"][::2] *= -0.5
    stats = model(batch)[2]
    x = model.hidden(batch)
    logits = (x @ model.head_weight().T).detach().requires_grad_()
    losses = M.cross_entropy(logits[:, :101] / 2, batch["targets"].clamp(min=0))
    (losses * batch["loss_weights"]).sum().backward()
    is_target = batch["targets"] != M.IGNORE_INDEX
    spans = list(zip(batch["cu_seqlens"], batch["cu_seqlens"][1:]))
    x_sum = torch.stack([(x.sum(-1) * is_target)[start:end].sum() for start, end in spans])
    square = torch.stack([(logits.grad ** 2)[start:end].sum() for start, end in spans])
    assert close(stats["x_sum"], x_sum, 1e-5) and close(stats["square"], square, 1e-5)
    with torch.no_grad():
        assert model(batch)[2].keys() == {"loss"}
    untrained = model(row(documents(101, 5), masked=9))[2]
    assert untrained.keys() == stats.keys() and untrained["square"].tolist() == [0]


def test_losses_are_their_formulas():
    logits, targets = torch.randn(7, 11, requires_grad=True), torch.randint(11, (7,))
    logs = logits.log_softmax(-1)
    nll = -logs[range(7), targets]
    got = M.cross_entropy(logits, targets, label_smoothing=0.2, z_loss=0.1)
    assert close(got, 0.8 * nll - 0.2 * logs.mean(-1) + 0.1 * logits.exp().sum(-1).log() ** 2, 1e-6)
    assert close(M.dft(logits, targets), nll * (-nll).exp(), 1e-6)
    grad, = torch.autograd.grad(M.dft(logits, targets).sum(), logits)
    one_hot = torch.nn.functional.one_hot(targets, 11)
    assert close(grad, (logits.softmax(-1) - one_hot) * (-nll).exp()[:, None], 1e-6)


@pytest.mark.parametrize("loss, options", [("cross_entropy", {"label_smoothing": 0.1, "z_loss": 1e-2}), ("dft", {})])
def test_every_loss_goes_through_the_chunks(loss, options, monkeypatch):
    monkeypatch.setattr(M, "CHUNK_BYTES", 1)
    model, batch = noisy(M.build(M_TINY | {"loss": loss, "loss_options": options})), row(documents(101, 90, 70))
    (M.LOSSES[loss](model.logits(batch), batch["targets"], **options) * batch["loss_weights"]).sum().backward()
    want = grads(model)
    model(batch)[0].backward()
    assert all(close(g, want[name], 1e-4) for name, g in grads(model).items())


# ---- noise: a function of seed, step, document and position

NOISY = dict(embd_pdrop=0.2, attn_pdrop=0.3, resid_pdrop=0.1, embed="neftune", embed_options={"alpha": 5.0},
             sliding_window=9)


def test_noise_is_the_same_in_any_layout():
    model, docs = noisy(M.build(M_TINY | NOISY)), documents(101, 9, 33, 2, 70)
    run = lambda docs, ids, step=3: model(row(docs) | {"doc_ids": torch.tensor(ids), "noise_seed": (0, step)})
    of_documents = lambda *args, **kwargs: run(*args, **kwargs)[2]["loss"]
    loss_sum, _, stats = run(docs, [5, 6, 7, 8])
    together = stats["loss"]
    loss_sum.backward()
    want = grads(model)
    alone = [run([docs[n]], [n + 5])[0] for n in (3, 1, 0, 2)]
    sum(alone).backward()
    assert close(together[[3, 1, 0, 2]], torch.stack(alone), 1e-5)
    assert all(close(g, want[name], 1e-4) for name, g in grads(model).items())
    model.recompute = len(model.blocks)
    assert torch.equal(of_documents(docs, [5, 6, 7, 8]), together)
    for other in (of_documents(docs, [5, 6, 7, 8], step=4), of_documents(docs, [15, 16, 17, 18]), model(row(docs))[2]["loss"]):
        assert not any(close(a, b, 1e-4) for a, b in zip(other, together))
    # without a seed there is none: evaluation, generation
    assert torch.equal(model(row(docs))[2]["loss"], model(row(docs))[2]["loss"])


def test_no_two_places_of_a_model_share_their_noise(monkeypatch):
    seen, real = [], M.dropout

    def watched(x, p, seeds):
        columns = torch.arange(x.shape[-1])
        seen.append(M.hash_int32(seeds[..., None] ^ M.hash_int32(columns)).flatten()[:48].tolist())
        return real(x, p, seeds)
    monkeypatch.setattr(M, "dropout", watched)
    M.build(M_TINY | NOISY)(row(documents(101, 60)) | {"noise_seed": 0})
    assert len(seen) == 1 + 2 * 3                                    # embedding; attention and both sums of each block
    assert len({i for place in seen for i in place}) == 48 * len(seen)


def test_dropout_drops_a_share_and_keeps_the_mean():
    seeds, x = M.hash_int32(torch.arange(500)), torch.ones(500, 300, requires_grad=True)
    y = M.dropout(x, 0.3, seeds)
    y.sum().backward()
    assert abs(float((y == 0).float().mean()) - 0.3) < 0.005 and torch.equal(x.grad, y.detach()) and y.max() == 1 / 0.7
    for dim in (0, 1):                                               # no token and no column is special
        assert float((y == 0).float().mean(dim).std()) == pytest.approx((0.3 * 0.7 / y.shape[dim]) ** 0.5, rel=0.15)


def test_attention_without_dropout_is_the_kernels():
    plain, batch = noisy(M.build(M_TINY | {"sliding_window": 7})), row(documents(101, 40, 25))
    slow = M.build(M_TINY | {"sliding_window": 7, "attn_pdrop": 1e-12})
    slow.load_state_dict(plain.state_dict())
    assert close(slow(batch | {"noise_seed": 0})[2]["loss"], plain(batch)[2]["loss"], 1e-5)


def test_softcapped_attention_without_dropout_of_its_own_hashes_nothing(monkeypatch):
    """Seeds for other dropouts do not make it hash a number per probability."""
    model = noisy(M.build(M_TINY | {"attn_softcap": 5.0, "resid_pdrop": 0.1})).train()
    monkeypatch.delattr(M, "head_seeds")
    assert model(row(documents(9, 30)) | {"noise_seed": 0})[0].isfinite()


@pytest.mark.parametrize("n_docs", [4, 0])
def test_flex_attention_has_the_outputs_and_gradients_of_the_plain_path(n_docs, monkeypatch):
    """With windows, grouped heads, soft-capping, sinks, a score_mod, and padding after the last document."""
    from torch.nn.attention import flex_attention as flex
    # torch refuses to train on a CPU, where it has no kernel; its plain functions, of which the kernel is made, do it
    monkeypatch.setattr(flex, "_validate_device", lambda *qkv: None)
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setitem(M.SCORE_MODS, "sine", lambda score, factor: torch.sin(factor * score))
    model = noisy(M.build(M_TINY | {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"],
                                    "attn_softcap": 1.5, "attn_sinks": True, "score_mod": "sine",
                                    "score_mod_options": {"factor": 2.0}}))
    batch = row(documents(101, 6, 41, 2, 15)[:n_docs] or [[0, 0]])
    if not n_docs:
        batch["cu_seqlens"] = torch.zeros(1, dtype=torch.int32)
    padding = 9
    for key, value in {"tokens": 5, "positions": 0, "targets": M.IGNORE_INDEX, "loss_weights": 0}.items():
        batch[key] = torch.nn.functional.pad(batch[key], (0, padding), value=value)
    hidden, results = {}, {}
    for path, function in {"plain": None, "flex": M.flex_attention}.items():
        model.flex_attention = function
        hidden[path] = model.hidden(batch)
        hidden[path].square().sum().backward()
        results[path] = grads(model)
    assert not torch.equal(hidden["plain"], hidden["flex"]) and close(hidden["flex"], hidden["plain"], 1e-5)
    for name, want in results["plain"].items():
        assert close(results["flex"][name], want, 1e-4), name


def test_neftune_adds_what_its_paper_says():
    model, docs = M.build(M_TINY | {"embed": "neftune", "embed_options": {"alpha": 5.0}}), documents(101, 101, 26)
    batch = row(docs) | {"noise_seed": (1, 2)}
    noise = (M.neftune(model, batch, 5.0) - M.plain(model, batch)).split([100, 25])
    for part, length in zip(noise, (100, 25)):
        most = 5.0 / (length * 48) ** 0.5
        largest, mean = float(part.detach().abs().max()), float(part.detach().mean())
        assert 0.99 * most < largest <= most * 1.0001 and abs(mean) < 0.05 * most
    with pytest.raises(ValueError, match="embed_options.alpha: is missing"):
        M.build(M_TINY | {"embed": "neftune"})
    with pytest.raises(ValueError, match="loss_options.label_smothing: unknown option; model.loss takes label_smoothing, z_loss"):
        M.build(M_TINY | {"loss_options": {"label_smothing": 0.1}})


def test_a_run_with_noise_does_not_depend_on_its_rows_and_resumes(tiny):
    import log, train
    more = ["model.resid_pdrop=0.2", "model.embed=neftune", "model.embed_options.alpha=5", "max_steps=6",
            "eval_every=0"]
    losses = {}
    for out, keys in {"wide": [], "narrow": ["micro_tokens=210"], "in parts": ["save_every=4"]}.items():
        cfg, _, explicit = tiny(*more, *keys, out=out)
        train.main(cfg, explicit)
        if out == "in parts":
            shutil.rmtree(Path(tiny(*more, out=out)[0]["out_dir"]) / "checkpoints" / "00000006")
            train.main(cfg, explicit)
        losses[out] = [r["loss"] for r in log.read(tiny(*more, out=out)[0]["out_dir"]) if r["step"]]
    assert losses["narrow"] == pytest.approx(losses["wide"], rel=1e-5) and losses["in parts"][-6:] == losses["wide"]


# ---- the vocabulary's rows

@pytest.mark.parametrize("more", [
    {}, {"tie_embeddings": False, "head_bias": True, "family": "phi", "loss_options": {"label_smoothing": 0.1}}])
def test_rows_that_pad_the_vocabulary_are_not_seen(more, tmp_path):
    section = M_TINY | more | {"family": "llama"}
    plain, padded = noisy(M.build(section)), M.build(section | {"pad_vocab_size_multiple": 64})
    assert padded.embed.weight.shape == (128, 48)
    assert torch.equal(M.build(section).embed.weight, padded.embed.weight[:101])
    longer = {}
    for name, t in plain.state_dict().items():
        rows = len(padded.get_parameter(name)) - len(t)
        longer[name] = torch.nn.functional.pad(t, (0, 0) * (t.dim() - 1) + (0, rows), value=3.0)
    padded.load_state_dict(longer)
    batch = row(documents(101, 60, 31))
    plain(batch)[0].backward()
    want = grads(plain)
    loss_sum, _, _ = padded(batch)
    loss_sum.backward()
    assert close(loss_sum, plain(batch)[0], 1e-6) and close(padded.logits(batch), plain.logits(batch), 1e-6)
    for name, g in grads(padded).items():
        assert close(g[:len(want[name])], want[name], 1e-5) and not g[len(want[name]):].any(), name
    assert M.generate_all(padded, [[1, 2]], 9, ()) == M.generate_all(plain, [[1, 2]], 9, ())
    if not more:
        M.save_pretrained(padded.get_parameter, padded.cfg, tmp_path)
        again = M.load(tmp_path, padded.cfg)[0]
        assert torch.equal(again.embed.weight[:101], plain.embed.weight) and not again.embed.weight[101:].any()


def test_a_vocabulary_grows_from_the_mean_of_the_old(tmp_path):
    for tied in (True, False):
        old = noisy(M.build(M_TINY | {"tie_embeddings": tied}))
        M.save_pretrained(old.get_parameter, old.cfg, tmp_path / str(tied))
        m = configs.load([f"model.init_from={tmp_path / str(tied)}", "model.pad_vocab_size_multiple=8"])[0]["model"]
        assert M.resolve_vocab_size(m, 90)["vocab_size"] == 101
        new, _ = M.load(tmp_path / str(tied), M.resolve_vocab_size(m, 109))
        for name in ["embed.weight"] + ["head.weight"] * (not tied):
            a, b = old.get_parameter(name), new.get_parameter(name)
            assert len(b) == 112 and torch.equal(b[:101], a) and not b[109:].any()
            assert torch.allclose(b[101:109], a.mean(0).expand(8, -1), atol=1e-6)


def test_a_run_with_a_larger_tokenizer_grows_its_base(tiny, tmp_path, capsys):
    transformers = pytest.importorskip("transformers", reason="the reference, in requirements-dev.txt")
    import train
    base = M.build(M_TINY | {"vocab_size": 200})
    M.save_pretrained(base.get_parameter, base.cfg, tmp_path / "base")
    _, _, explicit = tiny("max_steps=3", "checkpoint.export=true", "eval_every=0")
    argv = [f"{key}={value}" for key, value in configs.flat(explicit).items() if not key.startswith("model.")]
    cfg, _, given = configs.load([*argv, f"model.init_from={tmp_path / 'base'}"])
    train.main(cfg, given)
    assert f"from {tmp_path / 'base'}, with 59 new tokens" in capsys.readouterr().out
    theirs = transformers.AutoModelForCausalLM.from_pretrained(f"{explicit['out_dir']}/hf")
    assert theirs.config.vocab_size == len(theirs.get_input_embeddings().weight) == 259


# ---- reading parts

@pytest.mark.parametrize("name", ["GPT-NeoX, Pythia", "GPT-2", "Qwen3", "Phi-1, 1.5, 2"])
def test_any_rows_of_any_weight_are_read_by_themselves(name):
    ours, m, _, folder = pair(name)
    read, fresh = M.PretrainedWeights(folder, m | {"pad_vocab_size_multiple": 64}).read, M.NewWeights(m, 0).read
    for key, p in ours.named_parameters():
        for start, end in ((0, 1), (len(p) // 3, len(p) - 2), (len(p) - 1, len(p))):
            assert torch.equal(read(key, start, end), p[start:end])
            assert torch.equal(fresh(key, start, end), fresh(key, 0, len(p))[start:end])


LOADING = """
import json, re, sys, threading, time
from pathlib import Path
import model as M
M.load("data/base")                                                  # what is imported on the way
seen, loaded = [], threading.Event()
def watch():
    # what is the process's own: mapped files are the system's
    is_over = False
    while not is_over:                                   # the last look follows the end of the loading
        is_over = loaded.wait(0.001)
        seen.append(int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024)
thread = threading.Thread(target=watch, daemon=True)
thread.start()
while not seen:
    time.sleep(0.01)
before = seen[-1]
model, _ = M.load(sys.argv[1])
loaded.set()
thread.join()
print(json.dumps([sum(p.nbytes for p in model.parameters()), before, seen]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its own memory in /proc")
def test_load_parameter_reads_nothing_for_a_rank_without_rows(tmp_path):
    """49 rows on 8 ranks: seven each, and none for the last."""
    base = ROOT / "data" / "base"
    read = M.PretrainedWeights(base, configs.load([f"model.init_from={base}"])[0]["model"]).read
    p = torch.empty(49, 128)
    M.load_parameter("embed.weight", read, p[49:], 49, 49)


def test_loading_takes_no_more_than_the_model(tmp_path, script):
    m = M_TINY | {"vocab_size": 80_000, "d_model": 512, "head_dim": 64, "n_kv_heads": 4}
    M.save_pretrained(M.build(m).get_parameter, m, tmp_path)
    held, before, seen = json.loads(script("-c", LOADING, tmp_path).stdout)    # in a process that keeps no freed memory
    assert held > 160e6 and len(seen) > 10 and held * 0.9 < max(seen) - before < held * 1.1


def test_a_bf16_checkpoint_in_parts_comes_back_bitwise(tmp_path):
    from safetensors.torch import load_file
    _, _, theirs, _ = pair("GPT-NeoX, tied, not parallel")
    copy = type(theirs)(theirs.config).bfloat16()
    copy.load_state_dict({name: t.bfloat16() for name, t in theirs.state_dict().items()})
    copy.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    model, m = M.load(tmp_path / "in")
    M.save_pretrained(model.get_parameter, m, tmp_path / "out", tmp_path / "in")
    parts = {name: t for f in (tmp_path / "in").glob("*.safetensors") for name, t in load_file(f).items()}
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert again.keys() == parts.keys()
    assert all(t.dtype == torch.bfloat16 and torch.equal(t, parts[name]) for name, t in again.items())
    next((tmp_path / "in").glob("*-00002-*.safetensors")).unlink()
    with pytest.raises(ValueError, match="00002.*: is missing, and model.safetensors.index.json"):
        M.load(tmp_path / "in")


@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_of_a_fused_projection_load_in_peft(tmp_path, rslora):
    peft = pytest.importorskip("peft", reason="the reference, in requirements-dev.txt")
    transformers = pytest.importorskip("transformers")
    import shard
    ours, m, _, folder = pair("GPT-NeoX, Pythia")
    targets = ["query_key_value", "dense_h_to_4h"]
    lora = configs.load([])[0]["shard"]["lora"] | {"r": 3, "alpha": 6.0, "targets": targets, "rslora": rslora}
    model = M.build_on_meta(m)
    shard.add_lora(model, lora)
    shard.load_weights(model.to_empty(device="cpu"), M.PretrainedWeights(folder, m).read, 0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                p.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    shard.save_adapter(model, lora, tmp_path, folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    theirs, ids = peft.PeftModel.from_pretrained(theirs, tmp_path).eval(), documents(99, 40)
    with torch.no_grad():
        want = theirs(torch.tensor(ids)).logits[0]
    assert apart(model.logits(M.pack_prompts(ids)), want) < 1e-5 and apart(ours.logits(M.pack_prompts(ids)), want) > 1e-2


def test_scaled_embeddings_are_exported_in_the_weights(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the reference, in requirements-dev.txt")
    ours = noisy(M.build(M_TINY | {"embed": "scaled"}))
    M.save_pretrained(ours.get_parameter, ours.cfg, tmp_path)
    ids = documents(101, 30)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert apart(ours.logits(M.pack_prompts(ids)), theirs(torch.tensor(ids)).logits[0]) < 1e-5


HUB = """
import pathlib, sys
sys.path.append("tests")
import hub
asked = hub.start("models/someone/tiny", pathlib.Path(sys.argv[1]))
import configs, model, tokenize_data
cfg, source, explicit = configs.load(["model.init_from=someone/tiny"])
loaded, m = model.load("someone/tiny")
assert cfg["model"]["init_from"] == explicit["model"]["init_from"] == "someone/tiny"
assert source["model.d_model"] == "imported"
assert tokenize_data.load_tokenizer(cfg).n_vocab == m["vocab_size"]
assert model.PretrainedWeights("someone/tiny", cfg["model"])
model.save_pretrained(loaded.get_parameter, m, sys.argv[2], "someone/tiny")
print(m["init_from"], sorted(asked), sep="|")
"""


def test_a_hub_id_is_fetched_without_pickles(tmp_path, script):
    pytest.importorskip("huggingface_hub", reason="what fetches from a hub")
    base = ROOT / "data" / "base"
    shutil.copytree(base, tmp_path / "there")
    (tmp_path / "there" / "pytorch_model.bin").write_bytes(b"pickle")
    env = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = script("-c", HUB, tmp_path / "there", tmp_path / "again", **env)
    assert done.returncode == 0, done.stderr
    folder, asked = done.stdout.strip().split("|")
    assert folder.startswith(str(tmp_path / "cache")) and "model.safetensors" in asked and ".bin" not in asked
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    env |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "other")}
    lost = script("model.py", "someone/tiny", **env)
    assert lost.returncode == 1 and lost.stderr.count("\n") == 1, lost.stderr
    assert "someone/tiny" in lost.stderr and "hub" in lost.stderr, lost.stderr


# ---- the config's second layer

def test_what_the_user_says_beats_the_model_even_where_it_is_the_default(tmp_path):
    saved = M_TINY | {"family": "granite", "head_dim": 12, "norm_eps": 1e-3, "rope_theta": 5e5, "attn_pdrop": 0.3,
                      "attention_multiplier": 0.3, "logits_scaling": 4.0,
                      "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    M.save_pretrained(M.build(saved).get_parameter, saved, tmp_path)
    said = {"norm_eps": "1e-5", "rope_theta": "10000.0", "attn_pdrop": "0.0", "logits_scaling": "1.0",
            "rope_scaling": "null", "loss": "cross_entropy"}
    argv = [f"model.{key}={value}" for key, value in said.items()]
    cfg, source, _ = configs.load([f"model.init_from={tmp_path}", *argv])
    defaults = configs.read_file(configs.HERE / "defaults.yaml")["model"]
    assert all(cfg["model"][key] == defaults[key] and source[f"model.{key}"] == "cli" for key in said)
    assert cfg["model"]["attention_multiplier"] == 0.3
    assert source["model.attention_multiplier"] == source["model.d_model"] == "imported"
    (model, _), batch = M.load(tmp_path, cfg["model"]), M.pack_prompts([[1, 2, 3]])
    assert model.norm.eps == 1e-5 and not torch.equal(model.logits(batch), M.load(tmp_path)[0].logits(batch))


def test_a_key_that_contradicts_a_weight_is_named_with_it(tmp_path):
    M.save_pretrained(M.build(M_TINY).get_parameter, M_TINY, tmp_path)
    for key, value, words in (
            ("d_ff", 96, "model.layers.0.mlp.gate_proj.weight is [80, 48], and the config makes it [96, 48]"),
            ("n_layers", 3, "model.layers.2.mlp.down_proj.weight is missing"),
            ("vocab_size", 90, "model.embed_tokens.weight is [101, 48], and the config makes it [90, 48]"),
            ("tie_embeddings", False, "lm_head.weight is missing"), ("qkv_bias", True, "q_proj.bias is missing")):
        more = ["model.out_bias=true"] if key == "qkv_bias" else []
        m = configs.load([f"model.init_from={tmp_path}", f"model.{key}={str(value).lower()}", *more])[0]["model"]
        with pytest.raises(ValueError) as e:
            M.load(tmp_path, m)
        said = str(e.value)
        assert f"model.{key} = {value}, where config.json has {M_TINY[key]}" in said, said
        assert words in said or key in ("n_layers", "qkv_bias"), said
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "quick_gelu"}))
    m = configs.load([f"model.init_from={tmp_path}", "model.activation=gelu", "model.d_ff=96"])[0]["model"]
    with pytest.raises(configs.UserError, match="weights don't fit.*; model.d_ff = 96, where config.json has 80$"):
        M.load(tmp_path, m)    # not the activation, which the user has replaced


def test_a_block_is_one_graph_that_all_blocks_share():
    import torch._dynamo as dynamo
    model = noisy(M.build(M_TINY | {"n_layers": 9, "resid_pdrop": 0.1}))
    batch = row(documents(101, 40, 30)) | {"noise_seed": 1}
    want = model(batch)[0]
    dynamo.reset()
    dynamo.utils.counters.clear()
    for block in model.blocks:
        block.pre_attention = torch.compile(block.pre_attention, backend="eager", fullgraph=True)
        block.post_attention = torch.compile(block.post_attention, backend="eager", fullgraph=True)
    assert close(model(batch)[0], want, 1e-6) and dynamo.utils.counters["stats"]["unique_graphs"] == 2
    dynamo.reset()


def test_recompute_changes_nothing():
    model, batch = noisy(M.build(M_TINY)), row(documents(101, 30, 12))
    model(batch)[0].backward()
    want, model.recompute = grads(model), len(model.blocks)
    model(batch)[0].backward()
    assert all(torch.equal(g, want[name]) for name, g in grads(model).items())


def test_another_loss_and_another_embedding_are_one_function_each(monkeypatch):
    monkeypatch.setitem(M.LOSSES, "halved", lambda logits, targets: M.cross_entropy(logits, targets) / 2)
    monkeypatch.setitem(M.EMBEDDINGS, "scaled",
                        lambda model, batch: M.plain(model, batch) * math.sqrt(model.cfg["d_model"]))
    batch = row(documents(101, 30, 12))
    plain, halved, scaled = (noisy(M.build(M_TINY | more)) for more in ({}, {"loss": "halved"}, {"embed": "scaled"}))
    assert close(halved(batch)[0] * 2, plain(batch)[0], 1e-6) and not close(scaled(batch)[0], plain(batch)[0], 1e-3)
    with pytest.raises(ValueError, match="model.embed: must be one of plain"):
        M.build(M_TINY | {"embed": "nope"})


def test_load_needs_no_registered_loss_but_training_does(tmp_path, monkeypatch, capsys):
    """A native model of an experiment: it generates without the experiment's loss, not without its embedding."""
    def shifted(model, batch):
        return M.plain(model, batch) + 1
    monkeypatch.setitem(M.EMBEDDINGS, "shifted", shifted)
    m = M_TINY | {"family": "native", "loss": "focal", "loss_options": {"gamma": 2.0}, "embed": "shifted"}
    M.save_pretrained(noisy(M.build(m)).get_parameter, m, tmp_path)
    model, m = M.load(tmp_path)
    assert m["loss"] == "focal" and len(M.generate_all(model, [[1, 2]], 5, ())[0]) == 5
    M.print_summary(tmp_path)
    assert "MB as stored" in capsys.readouterr().out
    with pytest.raises(configs.UserError, match="model.loss: must be one of cross_entropy.*got focal"):
        model(row(documents(101, 9)))
    monkeypatch.delitem(M.EMBEDDINGS, "shifted")
    with pytest.raises(configs.UserError, match="model.embed: .*got shifted; .*import that experiment first"):
        M.load(tmp_path)


def test_print_summary_counts_the_files_that_are_read(tmp_path, capsys):
    M.save_pretrained(M.build(M_TINY).get_parameter, M_TINY, tmp_path)
    M.print_summary(tmp_path)
    want = capsys.readouterr().out
    shutil.copyfile(tmp_path / "model.safetensors", tmp_path / "consolidated.safetensors")
    M.print_summary(tmp_path)
    assert capsys.readouterr().out == want


def test_loss_receives_the_inputs_that_it_names(monkeypatch):
    received = []

    def advantage(logits, targets, token_index, batch, scale=1.0, clip=False, name="a"):
        received.append((scale, clip, name, len(token_index)))
        return scale * M.cross_entropy(logits, targets) * batch["advantages"][token_index]
    monkeypatch.setitem(M.LOSSES, "advantage", advantage)
    options = {"scale": 2, "clip": True, "name": "b"}
    model = noisy(M.build(M_TINY | {"loss": "advantage", "loss_options": options}))
    batch = row(documents(101, 30, 12), masked=5)
    batch["advantages"] = torch.linspace(-1, 1, len(batch["tokens"]))
    want = noisy(M.build(M_TINY))(batch | {"loss_weights": batch["loss_weights"] * batch["advantages"]})
    assert close(model(batch)[0], 2 * want[0], 1e-5) and received[0] == (2, True, "b", 24 + 6)
    for bad, expected in (({"clip": 1}, "true or false"), ({"name": 1}, "a string"), ({"scale": "x"}, "a number")):
        with pytest.raises(configs.UserError, match=f"model.loss_options.{[*bad][0]}: must be {expected}"):
            M.build(M_TINY | {"loss": "advantage", "loss_options": bad})


def test_a_reference_model_gives_its_logits_and_is_not_trained(monkeypatch):
    def divergence(logits, targets, reference_logits):
        assert not reference_logits.requires_grad
        return torch.nn.functional.kl_div(logits.log_softmax(-1), reference_logits.log_softmax(-1),
                                          log_target=True, reduction="none").sum(-1)
    monkeypatch.setitem(M.LOSSES, "divergence", divergence)
    model = noisy(M.build(M_TINY | {"loss": "divergence"}))
    reference = noisy(M.build(M_TINY)).requires_grad_(False).eval()
    model.references.append(reference)
    assert model.state_dict().keys() == reference.state_dict().keys()
    batch = row(documents(101, 30, 12))
    assert abs(float(model(batch)[0].detach())) < 1e-4
    with torch.no_grad():
        model.embed.weight[:5] += 0.5
    loss_sum = model(batch)[0]
    loss_sum.backward()
    want = divergence(model.logits(batch), None, reference.logits(batch)).sum()
    assert close(loss_sum, want, 1e-4) and float(loss_sum.detach()) > 1e-3
    assert model.embed.weight.grad.any() and reference.embed.weight.grad is None


def test_previous_tokens_are_the_same_in_packed_documents_and_in_generation(monkeypatch):
    batch = M.pack_prompts([[5, 6, 7], [8, 9]])
    assert M.previous_tokens(batch, 2).tolist() == [[-1, -1], [5, -1], [6, 5], [-1, -1], [8, -1]]

    def bigram(model, batch):
        """The mean of a token's row and those of the two before it."""
        previous = M.previous_tokens(batch, 2)
        rows = model.embed.weight[previous.clamp(min=0)] * (previous >= 0)[..., None]
        return M.plain(model, batch) + rows.sum(1)
    monkeypatch.setitem(M.EMBEDDINGS, "bigram", bigram)
    model = noisy(M.build(M_TINY | {"embed": "bigram"}))
    prompts = documents(101, 7, 3)
    for prompt, answer in zip(prompts, M.generate_all(model, prompts, 12, ())):
        for n, token in enumerate(answer):
            assert model.logits(M.pack_prompts([prompt + answer[:n]]))[-1].argmax() == token


def test_a_native_model_has_any_keys_and_is_refused_by_transformers(tmp_path, tiny):
    keys = ["model.family=native", "model.qk_norm=head", "model.parallel_residual=true", "model.norm=layernorm",
            "model.embed=neftune", "model.embed_options.alpha=5", "model.head_bias=true"]
    cfg, _, explicit = tiny(*keys, "checkpoint.export=true", "max_steps=3", "save_every=2")
    import train
    train.main(cfg, explicit)
    folder = tmp_path / "run" / "hf"
    model, m = M.load(folder)
    assert {key: m[key] for key in cfg["model"] if key not in ("vocab_size", "init_from")} == {
        key: cfg["model"][key] for key in cfg["model"] if key not in ("vocab_size", "init_from")}
    stored = safe_open(folder / "model.safetensors", "pt")
    assert set(stored.keys()) == {name for name, _ in model.named_parameters()}
    M.save_pretrained(model.get_parameter, m, tmp_path / "again", folder)
    again, _ = M.load(tmp_path / "again")
    batch = M.pack_prompts(documents(259, 20))
    assert torch.equal(again.logits(batch), model.logits(batch))
    assert len(M.generate_all(model, [[1, 2]], 5, ())[0]) == 5
    transformers = pytest.importorskip("transformers", reason="the reference, in requirements-dev.txt")
    with pytest.raises(ValueError, match="native"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_a_key_without_a_place_in_config_json_is_refused_only_if_the_model_is_exported(tmp_path):
    assert configs.load(["model.qk_norm=head", "checkpoint.export=false"])
    with pytest.raises(configs.UserError, match="model.qk_norm: .*model.family=native"):
        configs.load(["model.qk_norm=head"])


def test_scaled_embeddings_of_a_family_are_not_stored_scaled(tmp_path, monkeypatch):
    families = configs.families()
    llama = families["llama"]
    monkeypatch.setitem(families, "llama", llama | {"fixed": llama["fixed"] | {"embed": "scaled"}})
    ours = noisy(M.build(M_TINY | {"embed": "scaled"}))
    M.save_pretrained(ours.get_parameter, ours.cfg, tmp_path)
    again, m = M.load(tmp_path)
    assert m["embed"] == "scaled" and m["tie_embeddings"] and torch.equal(again.embed.weight, ours.embed.weight)


def test_a_family_converts_values_and_has_a_window_in_some_blocks(tmp_path, monkeypatch):
    """Powers, a pattern of layer_types, several values that mean the same: in, and out again."""
    families = configs.families()
    keys = {"attention_multiplier": ["query_pre_attn_scalar", {"default": 256, "power": -0.5}],
            "sliding_window": ["sliding_window", 8],
            "layer_types": ["layer_types", {"default": ["sliding_attention", "full_attention"]}]}
    family = families["llama"] | {"keys": families["llama"]["keys"] | keys, "only": {"use_bidirectional": [None, False]}}
    family["fixed"] = family["fixed"] | {"embedding_multiplier": "sqrt_d_model"}
    monkeypatch.setitem(families, "llama", family)
    m = configs.load(["model.n_layers=3", "model.d_model=48", "model.head_dim=144", "model.sliding_window=7",
                      "model.embedding_multiplier=sqrt_d_model", "model.vocab_size=101", "model.embed=neftune",
                      "model.embed_options={alpha: 1.0}"])[0]["model"]
    ours = noisy(M.build(m))
    assert [block.attn.window for block in ours.blocks] == [7, None, 7]
    assert ours.blocks[0].attn.scale == 1 / 12
    same = noisy(M.build(m | {"layer_types": None, "sliding_window": None, "embedding_multiplier": math.sqrt(48)}))
    same.blocks[0].attn.window = same.blocks[2].attn.window = 7
    batch = row(documents(101, 30, 5))
    assert torch.equal(ours.logits(batch), same.logits(batch))
    M.save_pretrained(ours.get_parameter, m, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["query_pre_attn_scalar"] == 144 and type(config["query_pre_attn_scalar"]) is int
    assert config["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]
    assert "embedding_multiplier" not in config and config["use_bidirectional"] is None
    for change in ({}, {"use_bidirectional": False, "layer_types": None}):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        assert torch.equal(M.load(tmp_path)[0].logits(batch), ours.logits(batch))
    (tmp_path / "config.json").write_text(json.dumps(config | {"use_bidirectional": True}))
    with pytest.raises(configs.UserError, match="use_bidirectional must be null"):
        M.load(tmp_path)


def test_negative_loss_weights_count_with_their_absolute_value():
    model, batch = noisy(M.build(M_TINY)), row(documents(101, 12, 9))
    batch["loss_weights"][::3] = -0.5
    nll = torch.nn.functional.cross_entropy(model.logits(batch), batch["targets"], reduction="none")
    loss_sum, weight_sum, _ = model(batch)
    assert close(loss_sum, (nll * batch["loss_weights"]).sum(), 1e-5)
    assert close(weight_sum, batch["loss_weights"].abs().sum(), 1e-6)


def test_dropout_applies_in_training_mode_only():
    model = noisy(M.build(M_TINY | {"resid_pdrop": 0.5}))
    batch = row(documents(101, 30)) | {"noise_seed": (0, 1)}
    in_training = model(batch)[0]
    model.eval()
    assert torch.equal(model(batch)[0], model(row(documents(101, 30)))[0]) and not torch.equal(in_training, model(batch)[0])


def test_new_weights_depend_on_seed_and_name_alone():
    a, b, other = M.build(M_TINY), M.build(M_TINY | {"n_layers": 2, "tie_embeddings": False}), M.build(M_TINY, seed=1)
    assert torch.equal(a.blocks[1].mlp.up_proj.weight, b.blocks[1].mlp.up_proj.weight)
    assert not torch.equal(a.embed.weight, other.embed.weight)


def test_new_weights_are_their_familys():
    for family, narrower in (("gpt2", 8 ** 0.5), ("llama", 1), ("gpt_neox", 1)):
        more = ["model.activation=gelu"] * (family != "llama")
        m = configs.load([f"model.family={family}", "model.n_layers=4", "model.vocab_size=99", *more])[0]["model"]
        block = M.build(m).blocks[2]
        assert float(block.mlp.up_proj.weight.detach().std()) == pytest.approx(m["init_std"], rel=0.02)
        assert not any(p.any() for name, p in block.named_parameters() if name.endswith("bias"))
        assert float(block.mlp.down_proj.weight.detach().std()) == pytest.approx(m["init_std"] / narrower, rel=0.02)


ROUNDED = {"gpt_oss": ["model.n_experts=4", "model.sliding_window=4"], "gemma2": [],
           "nemotron": ["model.activation=relu2"],
           "qwen3_5_text": ["model.layer_types=[linear_attention, full_attention]"]}


@pytest.mark.parametrize("family", ROUNDED)
def test_blocks_in_bf16_compute_with_rounded_weights(family):
    """As FSDP gathers them, so that a sharded run computes what a replicated one does."""
    m = configs.load([f"model.family={family}", "model.n_layers=2", "model.d_model=64", "model.n_heads=4",
                      "model.vocab_size=101", "model.d_ff=64", *ROUNDED[family]])[0]["model"]
    model = noisy(M.build(m)).eval()
    model.dtype = torch.bfloat16
    batch = row(documents(9, 30, 17))
    with torch.no_grad():
        x = model.hidden(batch)
        for name, p in model.blocks.named_parameters():
            if "attn.decay" not in name:                 # which is gathered in fp32
                p.copy_(p.bfloat16())
        assert torch.equal(x, model.hidden(batch))


def test_summary_has_a_part_for_every_parameter():
    for family in ROUNDED:
        m = configs.load([f"model.family={family}", "model.n_layers=2", "model.vocab_size=99", *ROUNDED[family]])[0]["model"]
        names = dict(M.build_on_meta(m).named_parameters())
        parts = {name: [part for part, pattern in M.SUMMARY_PARTS.items() if re.search(pattern, name)] for name in names}
        assert all(len(found) == 1 for found in parts.values()), parts


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_cpu_rms_norm_equals_torch(dtype, tolerance):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(30, 4, 16, generator=random).to(dtype).requires_grad_()
    weight = torch.rand(16, generator=random).to(dtype).requires_grad_()
    grad = torch.randn(30, 4, 16, generator=random).to(dtype)
    want = torch.nn.functional.rms_norm(x, [16], weight, 1e-5)
    wanted = torch.autograd.grad(want, (x, weight), grad)
    got = M.CPURMSNorm.apply(x, weight, 1e-5)
    gotten = torch.autograd.grad(got, (x, weight), grad)
    for a, b in zip((got, *gotten), (want, *wanted)):
        assert a.dtype == b.dtype and close(a.float(), b.float(), tolerance)


def test_rope_is_exact_far_out():
    m = M_TINY | {"rope_theta": 1e6}
    angles = [131_071 * 1e6 ** (-i / 16) for i in range(0, 16, 2)]
    cos, sin = M.rope_freqs(torch.tensor([131_071]), m)
    assert torch.allclose(cos[0, 0], torch.tensor([math.cos(a) for a in angles]), rtol=0, atol=6e-8)
    assert torch.allclose(sin[0, 0], torch.tensor([math.sin(a) for a in angles]), rtol=0, atol=6e-8)


def test_model_keys_are_refused_that_attention_cannot_compute():
    """Rope rotates no more than a head, and kernels give nan for scores times 0."""
    for key, value in (("partial_rotary_factor", 2.0), ("attention_multiplier", 0.0)):
        with pytest.raises(configs.UserError, match=f"model.{key}: must be"):
            configs.load([f"model.{key}={value}"])


def test_check_model_refuses_to_take_the_window_and_with_it_the_rope_theta_of_blocks(tmp_path):
    """Without a window, all blocks of a Gemma 3 would rotate by the rope_theta of those without one."""
    keys = SMALL | dict(model_type="gemma3_text", rope_theta=1e6)
    (tmp_path / "config.json").write_text(json.dumps(keys))
    assert configs.load([f"model.init_from={tmp_path}"])[0]["model"]["rope_local_theta"] == 1e4
    with pytest.raises(configs.UserError, match="model.sliding_window: must be a number with model.rope_local_theta"):
        configs.load([f"model.init_from={tmp_path}", "model.sliding_window=null"])


def test_rope_keeps_its_angles_alone_for_the_backward_pass():
    for dtype, part in ((torch.bfloat16, 1.0), (torch.float32, 0.5)):
        (cos, sin), kept = M.rope_freqs(torch.arange(30), M_TINY | {"partial_rotary_factor": part}), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            M.apply_rotary_emb(torch.randn(30, 4, 16, dtype=dtype, requires_grad=True), cos, sin)
        assert {t.data_ptr() for t in kept} == {cos.data_ptr(), sin.data_ptr()}


def test_sampling_is_seeded_and_cut_off():
    model = noisy(M.build(M_TINY))
    draw = lambda **kw: M.generate_all(model, [[1, 2, 3]], 30, (), **kw)[0]
    assert draw(temperature=1.0, seed=1) == draw(temperature=1.0, seed=1) != draw(temperature=1.0, seed=2)
    assert draw(temperature=1.0, top_k=1) == draw() == draw(temperature=1.0, top_p=1e-6)
    assert draw(temperature=1e-38) == draw(temperature=1e-300) == draw()
    with pytest.raises(configs.UserError, match="temperature >= 0"):
        draw(temperature=float("nan"))
    stop = draw()[3]
    assert M.generate_all(model, [[1, 2, 3]], 30, [stop])[0] == draw()[:draw().index(stop)]


def test_flops_are_counted_by_hand():
    model = M.build(M_TINY)
    each = 2 * ((4 + 2 * 2) * 16 * 48 + 64 * 48 + 2 * 80 * 48 + 80 * 48)
    assert M.flops(model, [10, 20], 12) == 6 * each * 30 + 6 * 101 * 48 * 12 + 6 * 2 * 4 * 16 * (100 + 400)
    # 1 + 2 + 3 + 3 + ...: 27 pairs of 10 tokens, 57 of 20; a half of each token's own is not counted
    in_window = M.build(M_TINY | {"sliding_window": 3})
    assert M.flops(in_window, [10, 20], 12) == 6 * each * 30 + 6 * 101 * 48 * 12 + 6 * 2 * 4 * 16 * (100 - 49 + 400 - 289)
    model.requires_grad_(False)
    assert M.flops(model, [10, 20], 12) == 4 * each * 30 + 4 * 101 * 48 * 12 + 6 * 2 * 4 * 16 * (100 + 400)


@pytest.mark.parametrize("name", ["GPT-2", "Phi-1, 1.5, 2", "Qwen3", "GPT-NeoX, Pythia", "Gemma 4 (text), E2B, E4B"])
def test_a_summary_reads_no_weight_and_counts_every_one(name, script):
    ours, m, _, folder = pair(name)
    lines = M.summary(M.build_on_meta(m)).splitlines()
    rows = [line.split() for line in lines if line.strip()]
    parts = ("embedding", "attention", "mlp", "block_inputs", "norms", "head", "parameters")
    n = {words[0]: int(words[1].replace(",", "")) for words in rows if words[0] in parts}
    assert n.pop("parameters") == sum(n.values()) == sum(p.numel() for p in ours.parameters())
    if name == "Qwen3":
        done = script("model.py", folder, "summary=true")
        assert done.returncode == 0 and done.stdout.splitlines()[:-1] == lines, done.stderr
        assert "MB as stored" in done.stdout, done.stderr


# ---- what can be wrong with a folder

def test_weights_that_dont_fit_are_all_named_at_once(tmp_path):
    from safetensors.torch import load_file, save_file
    model = M.build(M_TINY)
    M.save_pretrained(model.get_parameter, M_TINY, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(3, 4)
    tensors["extra"] = tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as e:
        M.load(tmp_path)
    for words in ("model.norm.weight is missing", "extra is unknown", "down_proj.weight is [3, 4]", "[48, 80]"):
        assert words in str(e.value)
    assert "\n" not in str(e.value)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ValueError, match="damaged"):
        M.load(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin: pickles.*this converts one: python -c .*save_pretrained"):
        M.load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(ValueError, match="mamba"):
        M.load(tmp_path)
    with pytest.raises(ValueError, match="nowhere"):
        M.load("nowhere")


def test_a_tied_head_that_differs_from_the_embedding_is_refused_or_kept(tmp_path):
    """config.json ties two matrices that the file has apart: transformers keeps both, as tie_embeddings=false does."""
    transformers = pytest.importorskip("transformers", reason="the reference, in requirements-dev.txt")
    from safetensors.torch import load_file, save_file
    model = noisy(M.build(M_TINY))
    M.save_pretrained(model.get_parameter, M_TINY, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    embed = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embed.clone()}, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(M.load(tmp_path)[0].embed.weight, embed)
    save_file(tensors | {"lm_head.weight": embed.flip(0)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(configs.UserError, match="lm_head.weight differs.*tie_word_embeddings.*tie_embeddings=false"):
        M.load(tmp_path)
    m = configs.load([f"model.init_from={tmp_path}", "model.tie_embeddings=false"])[0]["model"]
    ids = documents(101, 30)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ours, _ = M.load(tmp_path, m)
    assert apart(ours.logits(M.pack_prompts(ids)), theirs(torch.tensor(ids)).logits[0]) < 1e-5
    M.save_pretrained(ours.get_parameter, m, tmp_path / "out", tmp_path)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_damaged_folder_is_named_with_what_helps(tmp_path):
    """A missing head, quantized weights, a pointer of Git LFS, a truncated file, a missing one, none at all."""
    from safetensors.torch import load_file, save_file
    M.save_pretrained(M.build(M_TINY).get_parameter, M_TINY, tmp_path)
    weights, config_file = tmp_path / "model.safetensors", tmp_path / "config.json"
    config, tensors, whole = json.loads(config_file.read_text()), load_file(weights), weights.read_bytes()

    def error():
        with pytest.raises(configs.UserError) as e:
            M.load(tmp_path)
        assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)
        return str(e.value)
    config_file.write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert "lm_head.weight is missing; model.tie_embeddings=true" in error()
    config_file.write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert "config.json: quantization_config" in error()
    config_file.write_text(json.dumps(config))
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, weights)
    assert f"{name} has dtype F8_E4M3, which is quantized" in error()
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234\n")
    assert "model.safetensors: is a Git LFS pointer" in error() and "git lfs pull" in error()
    weights.write_bytes(whole[:-100])
    assert "model.safetensors: is damaged or incomplete" in error() and "download it again" in error()
    weights.unlink()
    assert "holds no *.safetensors, download its weights" in error()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": []}')
    assert "model.safetensors.index.json: a damaged file" in error()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "00001-of-00002.safetensors: is missing, and model.safetensors.index.json" in error()


def test_save_pretrained_keeps_what_its_base_says(tmp_path):
    """All fields of generation_config.json, all ends of a generation, both names of the dtype, BOS, the license."""
    base, out = tmp_path / "base", tmp_path / "out"
    model = M.build(M_TINY)
    M.save_pretrained(model.get_parameter, M_TINY, base)
    config = json.loads((base / "config.json").read_text())
    config |= {"torch_dtype": "bfloat16", "bos_token_id": 3, "eos_token_id": 5, "auto_map": {"AutoConfig": "x.py"}}
    del config["dtype"]
    (base / "config.json").write_text(json.dumps(config))
    generation = {"bos_token_id": 3, "eos_token_id": [5, 6, 50], "pad_token_id": 6, "do_sample": True,
                  "temperature": 0.7, "top_p": 0.8}
    (base / "generation_config.json").write_text(json.dumps(generation))
    (base / "LICENSE.txt").write_text("the license")
    # 50 is no control token: of another tokenizer
    M.save_pretrained(model.get_parameter, M_TINY, out, base, stop=[5, 7], control_ids={3, 5, 6, 7})
    assert json.loads((out / "generation_config.json").read_text()) == generation | {"eos_token_id": [5, 6, 7]}
    # our own generation ends at the same ids as transformers'
    assert M.all_stop_ids(base, [5, 7], {3, 5, 6, 7}) == M.all_stop_ids(out, [], {3, 5, 6, 7}) == [5, 6, 7]
    assert M.all_stop_ids(None, [5], {5}) == [5] and M.all_stop_ids(tmp_path, [], {5}) == []
    (tmp_path / "config.json").write_text('{"eos_token_id": 6}')      # without a generation_config.json
    assert M.all_stop_ids(tmp_path, [], {5, 6}) == [6]
    written = json.loads((out / "config.json").read_text())
    assert written["dtype"] == written["torch_dtype"] == "bfloat16" and "auto_map" not in written
    assert written["bos_token_id"] == 3 and written["eos_token_id"] == [5, 7]
    assert (out / "LICENSE.txt").read_text() == "the license"
    # a config.json without a dtype: that of the weights
    del written["dtype"], written["torch_dtype"]
    (out / "config.json").write_text(json.dumps(written))
    M.save_pretrained(model.get_parameter, M_TINY, tmp_path / "again", out)
    assert safe_open(tmp_path / "again" / "model.safetensors", "pt").get_slice("model.norm.weight").get_dtype() == "BF16"


# ---- on real inputs

def test_the_real_checkpoint_loads(realdata):
    folder = realdata / "checkpoints" / "stories260K"
    model, m = M.load(folder / "hf")
    want = json.loads((folder / "reference.json").read_text())
    assert abs(float(model(row([want["ids"]]))[0].detach()) / (len(want["ids"]) - 1) - want["nll_mean"]) < 1e-4
    logits = model.logits(M.pack_prompts([want["ids"]]))
    assert torch.allclose(logits[-1, :8], torch.tensor(want["logits_last_first8"]), atol=1e-3)
    cfg = configs.load([f"data.tokenizer={folder / 'tok512.tiktoken'}", "data.tokenizer_pattern= ?[^ ]+| ",
                        "data.special_tokens={<s>: 1, </s>: 2}", "data.bos_token=<s>", "data.eos_token=</s>"])[0]
    tok = tokenize_data.load_tokenizer(cfg)
    assert [1, *tok.encode(" " + want["text"]).tolist()][:256] == want["ids"]
    ids = M.generate_all(model, [[1]], 200, [1, 2])[0]
    got, greedy = tok.decode(ids).strip(), (folder / "greedy200.txt").read_text().strip()
    assert len(got) > 300 and (got.startswith(greedy) or greedy.startswith(got))


if __name__ == "__main__":
    print("\n".join(parity_table()))
