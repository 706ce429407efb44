"""model.py: the same numbers as the reference library, document by document (law 5), in and out of its files."""
import json, math

import pytest
import torch

import configs, model as M, tokenize_data

torch.manual_seed(0)
M_TINY = configs.load(["model.n_layers=2", "model.d_model=48", "model.n_heads=4", "model.n_kv_heads=2", "model.head_dim=16", "model.vocab_size=101", "model.d_ff=80"])[0]["model"]


def row(docs, masked=0):
    """Lists of ids -> a training row; the first `masked` targets of each document are not trained."""
    batch = M.as_batch([d[:-1] for d in docs])
    targets = [t if i >= masked else M.IGNORED for d in docs for i, t in enumerate(d[1:])]
    return batch | {"targets": torch.tensor(targets), "weights": torch.tensor([float(t != M.IGNORED) for t in targets]), "doc_ids": torch.arange(len(docs))}


def documents(vocab, *lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (n,), generator=g).tolist() for n in lengths]


def noisy(model):
    """New weights that are not special: norms and biases too."""
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * (1 if p.dim() < 2 else 0.3)
    return model


def grads(model):
    out = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out


def close(a, b, tolerance):
    return float((a - b).detach().abs().max()) <= tolerance * float(b.detach().abs().max())


FAMILIES = {
    "llama": dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=101, tie_word_embeddings=False),
    "llama tied": dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=16, vocab_size=100, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama scaled": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=77, rope_theta=500000.0, max_position_embeddings=256,
                         rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)),
    "qwen2": dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=101, tie_word_embeddings=True),
    "mistral": dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1, vocab_size=101, sliding_window=None),
    "gpt2": dict(n_embd=48, n_layer=2, n_head=4, vocab_size=101, n_positions=128, bos_token_id=0, eos_token_id=0),
}


@pytest.fixture(params=FAMILIES)
def pair(request, tmp_path):
    """(our model, its section, the reference's, the folder it was saved to)"""
    transformers = pytest.importorskip("transformers", reason="the reference, in requirements-dev.txt")
    config = transformers.AutoConfig.for_model(request.param.split()[0], **FAMILIES[request.param])
    theirs = noisy(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    return *M.load(tmp_path / "theirs"), theirs, tmp_path / "theirs"


def test_logits_loss_and_gradients_are_the_references(pair):
    ours, m, theirs, _ = pair
    docs = documents(m["vocab_size"], 70, 3, 2, 41, 120, seed=1)
    want = torch.cat([theirs(torch.tensor([d[:-1]])).logits[0] for d in docs])
    batch = row(docs)
    assert close(ours.logits(batch), want, 1e-5)
    nll = torch.nn.functional.cross_entropy(want, batch["targets"], reduction="none")
    nll.sum().backward()
    loss_sum, weight, per_document = ours(batch)
    loss_sum.backward()
    assert close(loss_sum, nll.sum(), 1e-5) and weight == len(nll)
    assert close(per_document, torch.stack([part.sum() for part in nll.split([len(d) - 1 for d in docs])]), 1e-5)
    got, family, their_grads = grads(ours), configs.families()[m["family"]], {n: p.grad for n, p in theirs.named_parameters()}
    for name, names in M.weight_names(ours, m).items():
        wants = [their_grads[n] for n in names]
        wants = [w.T for w in wants] if name.endswith(tuple(family.get("transposed", ()))) else wants
        assert close(got[name], torch.cat(wants), 1e-4), name


def test_bf16_is_the_reference_within_its_rounding(pair):
    ours, m, theirs, _ = pair
    docs = documents(m["vocab_size"], 50, 9, seed=2)
    want = torch.cat([theirs(torch.tensor([d])).logits[0] for d in docs])
    ours.dtype = torch.bfloat16
    got = ours.logits(M.as_batch(docs))
    assert got.dtype == torch.float32 and float((got - want).detach().abs().mean()) < 0.03 * float(want.detach().abs().mean())


def test_greedy_generation_is_the_references(pair):
    ours, m, theirs, _ = pair
    prompts = documents(m["vocab_size"], 1, 17, 5, seed=3)
    got = M.answer(ours, prompts, 40, ())
    for prompt, ids in zip(prompts, got):
        want = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert ids == want[0, len(prompt):].tolist()


def test_export_reloads_in_the_reference_bitwise(pair, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours, m, theirs, folder = pair
    M.save(ours.get_parameter, m, tmp_path / "out", folder, stop=[1, 2], bos=3, shard_bytes=40_000)
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), theirs.state_dict().values()))
    ids = torch.tensor(documents(m["vocab_size"], 60))
    assert torch.equal(again.eval()(ids).logits, transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits)
    reloaded, m2 = M.load(tmp_path / "out")
    assert m2 == m | {"init_from": str(tmp_path / "out")} and all(torch.equal(a, b) for a, b in zip(reloaded.state_dict().values(), ours.state_dict().values()))


def test_new_weights_export_too(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the reference, in requirements-dev.txt")
    for more in ([], ["model.family=gpt2", "model.activation=gelu_new"], ["model.family=qwen2"], ["model.family=mistral", "model.n_kv_heads=2"]):
        m = configs.load(["model.n_layers=2", "model.d_model=32", "model.vocab_size=64", *more])[0]["model"]
        ours = noisy(M.build(m))
        M.save(ours.get_parameter, m, tmp_path / m["family"])
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / m["family"]).eval()
        ids = documents(64, 30)
        assert close(ours.logits(M.as_batch(ids)), theirs(torch.tensor(ids)).logits[0], 1e-5)


# ---- law 5

def test_packed_documents_do_not_see_each_other():
    model = noisy(M.build(M_TINY))
    docs = documents(101, 9, 33, 2, 70, 3, 12, 70)
    alone = [model(row([d])) for d in docs]
    sum(a[0] for a in alone).backward()
    want = grads(model)
    loss_sum, weight, per_document = model(row(docs))
    loss_sum.backward()
    assert close(per_document, torch.cat([a[2] for a in alone]), 1e-5) and weight == sum(len(d) - 1 for d in docs)
    assert all(close(g, want[name], 1e-4) for name, g in grads(model).items())
    changed = docs[:1] + documents(101, 33, seed=9) + docs[2:]
    assert torch.equal(model(row(changed))[2][2:], per_document[2:]) and torch.equal(model(row(changed))[2][:1], per_document[:1])


def test_padding_is_outside_every_document():
    model, batch = noisy(M.build(M_TINY)), row(documents(101, 9, 33))
    padded = {key: torch.cat([t, torch.full((7,), M.IGNORED if key == "targets" else 0, dtype=t.dtype)]) if key in ("tokens", "targets", "weights", "positions") else t for key, t in batch.items()}
    model(batch)[0].backward()
    want = grads(model)
    loss_sum, weight, _ = model(padded)
    loss_sum.backward()
    assert weight == 40 and all(close(g, want[name], 1e-4) for name, g in grads(model).items())


def test_an_idle_row_counts_nothing():
    model = M.build(M_TINY)
    empty = {key: torch.zeros(0, dtype=torch.long) for key in ("tokens", "targets", "positions", "doc_ids")}
    loss_sum, weight, per_document = model(empty | {"weights": torch.zeros(0), "cu_seqlens": torch.zeros(1, dtype=torch.int32), "max_len": 0})
    loss_sum.backward()
    assert loss_sum == 0 and weight == 0 and len(per_document) == 0 and all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


def test_an_untrained_target_has_no_loss_and_no_gradient_of_its_own():
    model, docs = noisy(M.build(M_TINY)), documents(101, 20, 15)
    logits = model.logits(row(docs))
    batch = row(docs, masked=6)
    keep = batch["targets"] != M.IGNORED
    torch.nn.functional.cross_entropy(logits[keep], batch["targets"][keep], reduction="sum").backward()
    want = grads(model)
    loss_sum, weight, _ = model(batch)
    loss_sum.backward()
    assert weight == int(keep.sum()) == 19 - 6 + 14 - 6 and all(close(g, want[name], 1e-4) for name, g in grads(model).items())


def test_weights_weigh(monkeypatch):
    model, batch = noisy(M.build(M_TINY)), row(documents(101, 12, 9))
    batch["weights"] = torch.rand(len(batch["weights"]), generator=torch.Generator().manual_seed(0))
    nll = torch.nn.functional.cross_entropy(model.logits(batch), batch["targets"], reduction="none")
    loss_sum, weight, _ = model(batch)
    assert close(loss_sum, (nll * batch["weights"]).sum(), 1e-5) and close(weight, batch["weights"].sum(), 1e-6)


def test_chunks_of_the_loss_change_rounding_only(monkeypatch):
    model, batch = noisy(M.build(M_TINY | {"tie_embeddings": False})), row(documents(101, 90, 200, 130))
    model(batch)[0].backward()
    want = grads(model)
    monkeypatch.setattr(M, "CHUNK", 1)                               # 64 tokens at a time, the least
    model(batch)[0].backward()
    assert all(close(g, want[name], 1e-5) for name, g in grads(model).items())


def test_recompute_changes_nothing():
    model, batch = noisy(M.build(M_TINY)), row(documents(101, 30, 12))
    model(batch)[0].backward()
    want, model.recompute = grads(model), True
    model(batch)[0].backward()
    assert all(torch.equal(g, want[name]) for name, g in grads(model).items())


def test_another_loss_and_another_embedding_are_one_function_each(monkeypatch):
    monkeypatch.setitem(M.LOSSES, "halved", lambda logits, targets: M.cross_entropy(logits, targets) / 2)
    monkeypatch.setitem(M.EMBEDDINGS, "scaled", lambda model, batch: M.plain(model, batch) * math.sqrt(model.m["d_model"]))
    batch = row(documents(101, 30, 12))
    plain, halved, scaled = (noisy(M.build(M_TINY | more)) for more in ({}, {"loss": "halved"}, {"embed": "scaled"}))
    assert close(halved(batch)[0] * 2, plain(batch)[0], 1e-6) and not close(scaled(batch)[0], plain(batch)[0], 1e-3)
    with pytest.raises(ValueError, match="model.loss"):
        M.build(M_TINY | {"loss": "nope"})


def test_new_weights_depend_on_seed_and_name_alone():
    a, b, other = M.build(M_TINY), M.build(M_TINY | {"n_layers": 2, "tie_embeddings": False}), M.build(M_TINY, seed=1)
    assert torch.equal(a.blocks[1].mlp.up.weight, b.blocks[1].mlp.up.weight) and not torch.equal(a.embed.weight, other.embed.weight)


def test_rope_is_exact_far_out():
    m = M_TINY | {"rope_theta": 1e6}
    angles = [131_071 * 1e6 ** (-i / 16) for i in range(0, 16, 2)]
    want = torch.tensor([complex(math.cos(a), math.sin(a)) for a in angles])
    assert torch.allclose(M.rope_turns(torch.tensor([131_071]), m)[0, 0], want, atol=1e-6)


def test_sampling_is_seeded_and_cut_off():
    model = noisy(M.build(M_TINY))
    draw = lambda **kw: M.answer(model, [[1, 2, 3]], 30, (), **kw)[0]
    assert draw(temperature=1.0, seed=1) == draw(temperature=1.0, seed=1) != draw(temperature=1.0, seed=2)
    assert draw(temperature=1.0, top_k=1) == draw() == draw(temperature=1.0, top_p=1e-6)
    stop = draw()[3]
    assert M.answer(model, [[1, 2, 3]], 30, [stop])[0] == draw()[:draw().index(stop)]


def test_flops_are_counted_by_hand():
    model = M.build(M_TINY)
    each = 2 * ((4 + 2 * 2) * 16 * 48 + 64 * 48 + 2 * 80 * 48 + 80 * 48)
    assert M.flops(model, [10, 20], 12) == 6 * each * 30 + 6 * 101 * 48 * 12 + 6 * 2 * 4 * 16 * (100 + 400)
    model.requires_grad_(False)
    assert M.flops(model, [10, 20], 12) == 4 * each * 30 + 4 * 101 * 48 * 12 + 6 * 2 * 4 * 16 * (100 + 400)


# ---- what can be wrong with a folder

def test_weights_that_dont_fit_are_all_named_at_once(tmp_path):
    from safetensors.torch import load_file, save_file
    model = M.build(M_TINY)
    M.save(model.get_parameter, M_TINY, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(3, 4)
    tensors["extra"] = tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as e:
        M.load(tmp_path)
    assert all(w in str(e.value) for w in ("model.norm.weight is missing", "extra is unknown", "down_proj.weight is [3, 4]", "[48, 80]")) and "\n" not in str(e.value)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ValueError, match="damaged"):
        M.load(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickle"):
        M.load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(ValueError, match="mamba"):
        M.load(tmp_path)
    with pytest.raises(ValueError, match="nowhere"):
        M.load("nowhere")


# ---- on real inputs

def test_the_real_checkpoint_loads(realdata):
    folder = realdata / "checkpoints" / "stories260K"
    model, m = M.load(folder / "hf")
    want = json.loads((folder / "reference.json").read_text())
    assert abs(float(model(row([want["ids"]]))[0].detach()) / (len(want["ids"]) - 1) - want["nll_mean"]) < 1e-4
    logits = model.logits(M.as_batch([want["ids"]]))
    assert torch.allclose(logits[-1, :8], torch.tensor(want["logits_last_first8"]), atol=1e-3)
    cfg = configs.load([f"data.tokenizer={folder / 'tok512.tiktoken'}", "data.tokenizer_pattern= ?[^ ]+| ", "data.special_tokens={<s>: 1, </s>: 2}", "data.bos_token=<s>", "data.eos_token=</s>"])[0]
    tok = tokenize_data.load_tokenizer(cfg)
    assert [1, *tok.encode(" " + want["text"]).tolist()][:256] == want["ids"]
    ids = M.answer(model, [[1]], 200, [1, 2])[0]
    got, greedy = tok.decode(ids).strip(), (folder / "greedy200.txt").read_text().strip()
    assert len(got) > 300 and (got.startswith(greedy) or greedy.startswith(got))
