"""experiments/ that change model.py: focal, distill, ngram_embeddings, softcap."""
import json, shutil
from pathlib import Path

import pytest
import torch

import configs, launch, model as M, tokenize_data, train
from test_model import M_TINY, close, documents, grads, noisy, row


def generates_what_it_computes(model, prompts, n_tokens=8):
    """Is every greedy token that of a computation without a cache?"""
    for prompt, answer in zip(prompts, M.generate_all(model, prompts, n_tokens, ())):
        for n, token in enumerate(answer):
            logits = model.logits(M.pack_prompts([prompt + answer[:n]]))
            if logits[-1].argmax() != token:
                return False
    return True


def run_and_resume(tiny, *argv):
    """Four steps, then the last two of them again. Returns the folder; both results must be the same bytes."""
    cfg, _, explicit = tiny(*argv, "max_steps=4", "save_every=2", "eval_every=0", "checkpoint.keep=9")
    train.main(cfg, explicit)
    checkpoints = Path(cfg["out_dir"]) / "checkpoints"
    newest = checkpoints / "00000004"
    files = ("model.safetensors", "optimizer.safetensors")
    before = [(newest / name).read_bytes() for name in files]
    shutil.rmtree(newest)
    (checkpoints / "latest").unlink()
    (checkpoints / "latest").symlink_to("00000002")
    cfg, _, explicit = tiny(*argv, "max_steps=4", "save_every=2", "eval_every=0", "checkpoint.keep=9")
    train.main(cfg, explicit)
    assert [(newest / name).read_bytes() for name in files] == before
    return Path(cfg["out_dir"])


@pytest.fixture
def base(tmp_path, tiny):
    """The folder of a pretrained Llama in the shape of tiny(), saved under Llama's names."""
    cfg = tiny()[0]
    m = M.resolve_vocab_size(cfg["model"], tokenize_data.load_tokenizer(cfg).n_vocab)
    model = noisy(M.build(m))
    M.save_pretrained(model.get_parameter, m, tmp_path / "base")
    return tmp_path / "base"


# ---- focal.py

def test_focal_with_gamma_0_is_cross_entropy(experiment):
    experiment("focal")
    batch = row(documents(101, 30, 12))
    results = []
    for more in ({"loss": "focal", "loss_options": {"gamma": 0}}, {}):
        model = noisy(M.build(M_TINY | more))
        loss = model(batch)[0]
        loss.backward()
        results.append((loss.detach(), grads(model)))
    (focal_loss, focal_grads), (loss, gradients) = results
    assert torch.equal(focal_loss, loss)
    assert all(torch.equal(focal_grads[name], gradients[name]) for name in gradients)


def test_focal_is_the_formula_of_its_paper(experiment):
    focal = experiment("focal").focal
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
    targets = torch.tensor([0, 2])
    p = logits.softmax(-1)[[0, 1], targets]
    torch.testing.assert_close(focal(logits, targets), (1 - p) ** 2 * -p.log())
    torch.testing.assert_close(focal(logits, targets, gamma=0.5), (1 - p).sqrt() * -p.log())


def test_focal_has_a_finite_gradient_where_the_target_is_certain(experiment):
    focal = experiment("focal").focal
    logits = torch.tensor([[100.0, 0.0]], requires_grad=True)
    focal(logits, torch.tensor([0]), gamma=0.5).sum().backward()
    assert logits.grad.isfinite().all()


# ---- distill.py

@pytest.mark.parametrize("temperature, ce_share", [(1.0, 0.0), (3.0, 0.25)])
def test_distill_is_the_divergence_computed_from_all_probabilities(experiment, temperature, ce_share):
    """The loss of a whole micro-batch and the gradients of all parameters."""
    experiment("distill")
    options = {"temperature": temperature, "ce_share": ce_share}
    model = noisy(M.build(M_TINY | {"loss": "distill", "loss_options": options}))
    reference = noisy(M.build(M_TINY | {"n_layers": 1, "d_model": 32})).requires_grad_(False).eval()
    model.references.append(reference)
    batch = row(documents(101, 30, 12), masked=3)
    loss = model(batch)[0]
    loss.backward()
    got = grads(model)

    trained = batch["targets"] != M.IGNORE_INDEX
    logits = model.logits(batch)[trained]
    p = (reference.logits(batch)[trained] / temperature).softmax(-1)
    q = (logits / temperature).softmax(-1)
    divergence = (p * (p.log() - q.log())).sum(-1) * temperature ** 2
    nll = -logits.log_softmax(-1).gather(1, batch["targets"][trained, None])[:, 0]
    want = (ce_share * nll + (1 - ce_share) * divergence).sum()
    want.backward()
    assert close(loss, want, 1e-5)
    expected = grads(model)
    assert got.keys() == expected.keys()
    assert all(close(got[name], expected[name], 1e-4) for name in expected)


def test_distill_is_0_where_the_model_is_its_reference(experiment):
    experiment("distill")
    model = noisy(M.build(M_TINY | {"loss": "distill", "loss_options": {"ce_share": 0.0}}))
    model.references.append(noisy(M.build(M_TINY)).requires_grad_(False).eval())
    assert abs(float(model(row(documents(101, 30, 12)))[0].detach())) < 1e-4


def test_distill_trains_a_smaller_model_towards_its_reference(experiment, tiny, base, tmp_path):
    """The logged validation loss, here the divergence alone, falls from step to step."""
    experiment("distill")
    cfg, _, explicit = tiny("model.loss=distill", "model.loss_options.ce_share=0.0", f"reference_model={base}",
                            "model.n_layers=1", "max_steps=12", "eval_every=6", "eval_prompts=0")
    train.main(cfg, explicit)
    records = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    losses = [record["val/chats/loss"] for record in records if "val/chats/loss" in record]
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2] > 0


# ---- ngram_embeddings.py

BIGRAM = ["model.embed=bigram", "model.embed_options.rows=50"]
IN_LLAMA = {"embed": "bigram", "embed_options": {"rows": 50}}


def test_ngram_embeddings_add_the_row_of_each_bigram(experiment):
    """A bigram is a token and the one before it in the same document; the first has a row of its own."""
    experiment("ngram_embeddings")
    model = noisy(M.build(M_TINY | IN_LLAMA))
    docs = [[5, 6, 7, 5, 6], [6, 7], [5]]
    x = model.embedding(model, M.pack_prompts(docs))
    rows = {}
    for i, (previous, token) in enumerate(pair for doc in docs for pair in zip([None, *doc], doc)):
        added = (x[i] - model.embed.weight[token]).detach()
        [row] = [n for n in range(50) if close(added, model.embedding.table.weight[n], 1e-5)]
        assert rows.setdefault((previous, token), row) == row
    assert len(rows) == 5 and len(set(rows.values())) >= 4


def test_ngram_embeddings_of_many_bigrams_use_all_rows_evenly(experiment):
    module = experiment("ngram_embeddings")
    embedding = module.BigramEmbedding({"d_model": 1}, rows=64)
    with torch.no_grad():
        embedding.table.weight[:, 0] = torch.arange(64.0)
    model = M.build(M_TINY | {"vocab_size": 400, "d_model": 1, "n_heads": 1, "n_kv_heads": 1, "init_std": 0.0})
    rows = embedding(model, M.pack_prompts(documents(400, 64_000)))
    counts = rows.detach().long().flatten().bincount(minlength=64)
    assert counts.min() > 800 and counts.max() < 1200


def test_ngram_embeddings_are_trained(experiment):
    """The gradient of the table is that of the embedded tokens, added up by row."""
    experiment("ngram_embeddings")
    model = noisy(M.build(M_TINY | IN_LLAMA))
    batch = row([[5, 6, 5, 6, 5, 6, 9]])
    model(batch)[0].backward()
    used = model.embedding.table.weight.grad.abs().sum(1) > 0
    assert 1 < int(used.sum()) <= 3            # (start, 5), (5, 6), (6, 5)


def test_ngram_embeddings_in_generation_are_those_of_training(experiment):
    experiment("ngram_embeddings")
    model = noisy(M.build(M_TINY | IN_LLAMA))
    assert generates_what_it_computes(model, documents(101, 7, 3, 1))


def test_ngram_embeddings_leave_a_pretrained_model_as_it_was(experiment, base):
    """They are new there, and the rows start at 0."""
    experiment("ngram_embeddings")
    _, m = M.load(base)
    m = m | IN_LLAMA | {"family": "native"}
    assert M.PretrainedWeights(base, m).new_names == ["embedding.table.weight"]
    batch = M.pack_prompts(documents(250, 20, 9))
    assert torch.equal(M.load(base, m)[0].logits(batch), M.load(base)[0].logits(batch))


def test_ngram_embeddings_run_is_resumed_exported_and_loaded(experiment, tiny, base, capsys):
    experiment("ngram_embeddings")
    out = run_and_resume(tiny, *BIGRAM, f"model.init_from={base}", "model.family=native", "checkpoint.export=true")
    assert f"new       embedding.table.weight: not in {base}" in capsys.readouterr().out
    model, m = M.load(out)
    saved = M.open_weights(out / "checkpoints" / "latest")["embedding.table.weight"]
    table = saved.get_tensor("embedding.table.weight")
    assert table.abs().sum() > 0 and torch.equal(model.embedding.table.weight, table)
    assert m["embed"] == "bigram" and M.PretrainedWeights(out, m).new_names == []

    del M.EMBEDDINGS["bigram"]                 # as in a process that has not imported the experiment
    with pytest.raises(configs.UserError, match="model.embed: must be one of plain.*got bigram; .*experiment"):
        M.load(out)


def test_ngram_embeddings_cannot_be_saved_as_a_llama(experiment, tiny, base):
    experiment("ngram_embeddings")
    with pytest.raises(configs.UserError, match="model.embed: .*to be exported as a llama model.*"
                       "model.family=native .*checkpoint.export=false"):
        tiny(*BIGRAM, f"model.init_from={base}", "checkpoint.export=true")
    m = configs.load([*BIGRAM, f"model.init_from={base}", "checkpoint.export=false"])[0]["model"]
    with pytest.raises(configs.UserError, match="model.family: llama has no name for embedding.table.weight"):
        M.hf_slices(m | {"vocab_size": 259})


def test_ngram_embeddings_are_refused_under_lora(experiment, tiny, base):
    experiment("ngram_embeddings")
    cfg, _, explicit = tiny(*BIGRAM, f"model.init_from={base}", "shard.lora.r=2")
    with pytest.raises(configs.UserError, match="shard.lora.r: .* lacks embedding.table.weight, "):
        train.main(cfg, explicit)


def test_ngram_embeddings_run_is_the_same_on_two_shards(experiment, tiny, chats, base, tmp_path):
    command = [f"data.train.chats.path={chats}", "data.tokenizer=bytes", f"data.cache_dir={tmp_path / 'tokens'}",
               f"model.init_from={base}", "model.embed_options.rows=51", "batch_size=4", "micro_tokens=240",
               "data.seq_len=240", "max_steps=4", "eval_every=0", "save_every=0", "log_every=1", "lr=1e-2",
               "dtype=float32"]
    experiment("ngram_embeddings")
    cfg, _, explicit = configs.load([*command, "model.embed=bigram", "model.family=native", f"out_dir={tmp_path / '1'}"])
    train.main(cfg, explicit)
    ranks = launch.run_ranks(2, ["-m", "experiments.ngram_embeddings", *command, "shard.mesh.shard=2",
                                 f"out_dir={tmp_path / '2'}"])
    assert [done.returncode for done in ranks] == [0, 0], ranks[0].stderr
    losses = []
    for out in "12":
        records = map(json.loads, (tmp_path / out / "metrics.jsonl").read_text().splitlines())
        losses.append([record["loss"] for record in records if "loss" in record])
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-4)


# ---- weights of a pretrained model under other names

@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_pretrained_model_becomes_native(tmp_path, family):
    """What is read has the names of its own family, fused and transposed ones too; the export has ours."""
    more = ["model.activation=gelu"] * (family != "llama")
    argv = [f"model.family={family}", "model.n_layers=2", "model.d_model=32", "model.vocab_size=64", *more]
    m = configs.load(argv)[0]["model"]
    model = noisy(M.build(m))
    M.save_pretrained(model.get_parameter, m, tmp_path / "base")
    m = configs.load([f"model.init_from={tmp_path / 'base'}", "model.family=native"])[0]["model"]
    native, _ = M.load(tmp_path / "base", m)
    M.save_pretrained(native.get_parameter, m, tmp_path / "native", tmp_path / "base")
    again, m = M.load(tmp_path / "native")
    batch = M.pack_prompts(documents(64, 20))
    assert m["family"] == "native" and torch.equal(again.logits(batch), model.logits(batch))


def test_a_parameter_that_the_stored_family_lacks_is_missing(base):
    """Only parameters of an embedding may be new."""
    m = configs.load([f"model.init_from={base}", "model.family=native", "model.head_bias=true"])[0]["model"]
    with pytest.raises(configs.UserError, match="weights don't fit the model: head_bias is missing"):
        M.load(base, m)


# ---- softcap.py

CAPPED = {"score_mod": "softcap", "score_mod_options": {"cap": 0.7}}


def attention_by_hand(layer, q, k, v, lengths, cap):
    """One query at a time."""
    out = torch.zeros_like(q)
    start = 0
    for length in lengths:
        for i in range(start, start + length):
            first = start if layer.window is None else max(start, i - layer.window + 1)
            for head in range(layer.n_heads):
                kv_head = head * layer.n_kv_heads // layer.n_heads
                scores = k[first:i + 1, kv_head] @ q[i, head] * layer.head_dim ** -0.5
                probs = torch.softmax(cap * torch.tanh(scores / cap), 0)
                out[i, head] = probs @ v[first:i + 1, kv_head]
        start += length
    return out


@pytest.mark.parametrize("window", [None, 5])
def test_softcap_of_attention_is_that_of_a_loop(experiment, window):
    experiment("softcap")
    layer = M.build(M_TINY | CAPPED | {"sliding_window": window}).blocks[0].attn
    lengths = [9, 2, 1, 12]
    g = torch.Generator().manual_seed(0)
    q, k, v = (2 * torch.randn(sum(lengths), n, 16, generator=g) for n in (4, 2, 2))
    cu_seqlens = torch.tensor([0, 9, 11, 12, 24], dtype=torch.int32)
    y = M.attention(layer, q, k, v, M.PackedDocuments(cu_seqlens, 24, 12))
    assert close(y, attention_by_hand(layer, q, k, v, lengths, 0.7), 1e-5)
    assert not close(y, attention_by_hand(layer, q, k, v, lengths, 1e6), 0.05)


def test_softcap_of_a_large_cap_changes_nothing(experiment):
    experiment("softcap")
    batch = row(documents(101, 30, 12))
    plain = noisy(M.build(M_TINY))
    for cap, is_same in ((1e4, True), (0.7, False)):
        capped = noisy(M.build(M_TINY | CAPPED | {"score_mod_options": {"cap": cap}}))
        assert close(capped.logits(batch), plain.logits(batch), 1e-4) == is_same


def test_softcap_never_uses_a_kernel(experiment, monkeypatch):
    """Kernels compute plain scores: those for packed documents, and torch's own."""
    def kernel(*args, **options):
        raise AssertionError("a kernel")
    monkeypatch.setattr(M, "varlen_attention", kernel)
    monkeypatch.setattr(M.F, "scaled_dot_product_attention", kernel)
    monkeypatch.setattr(M.Transformer, "can_use_varlen", lambda model: True)
    experiment("softcap")
    batch = row(documents(101, 30, 12))
    with pytest.raises(AssertionError, match="a kernel"):
        M.build(M_TINY)(batch)
    model = M.build(M_TINY | CAPPED)
    for mode in (model.train(), model.eval()):
        mode(batch)
    M.generate_all(model, [[1, 2]], 3, ())


def test_softcap_holds_under_dropout(experiment):
    """A probability of dropout that drops nothing gives the same numbers."""
    experiment("softcap")
    batch = row(documents(101, 30, 12)) | {"noise_seed": (0, 0)}
    results = []
    for p in (0.0, 1e-12, 0.5):
        model = noisy(M.build(M_TINY | CAPPED | {"attn_pdrop": p})).train()
        results.append(model(batch)[0].detach())
    assert close(results[1], results[0], 1e-6) and not close(results[2], results[0], 1e-6)


def test_softcap_in_generation_is_that_of_training(experiment):
    experiment("softcap")
    for window in (None, 4):
        model = noisy(M.build(M_TINY | CAPPED | {"sliding_window": window}))
        assert generates_what_it_computes(model, documents(101, 7, 3, 1))


def test_softcap_run_is_resumed_exported_and_loaded_only_with_the_experiment(experiment, tiny, base):
    experiment("softcap")
    out = run_and_resume(tiny, "model.score_mod=softcap", "model.score_mod_options.cap=0.7", "model.family=native",
                         f"model.init_from={base}", "checkpoint.export=true")
    config = configs.read_json(out / "hf" / "config.json")
    assert config["model_type"] == "native" and config["score_mod"] == "softcap"
    model, m = M.load(out)
    batch = M.pack_prompts(documents(250, 20))
    plain, _ = M.load(out, m | {"score_mod": "none", "score_mod_options": {}})
    assert m["score_mod_options"] == {"cap": 0.7}
    assert not close(model.logits(batch), plain.logits(batch), 1e-3)

    del M.SCORE_MODS["softcap"]                # as in a process that has not imported the experiment
    with pytest.raises(configs.UserError, match="model.score_mod: must be one of none; got softcap; .*experiment"):
        M.load(out)


def test_softcap_cannot_be_saved_as_a_llama():
    with pytest.raises(configs.UserError, match="model.score_mod: must be 'none' to be exported as a llama model.*"
                       "model.family=native .*checkpoint.export=false"):
        configs.load(["model.score_mod=softcap"])
    configs.load(["model.score_mod=softcap", "checkpoint.export=false"])


# ---- all of them

@pytest.mark.parametrize("name", ["focal", "distill", "ngram_embeddings", "softcap"])
def test_experiment_without_arguments_prints_how_to_start(script, name):
    out = script("-m", f"experiments.{name}")
    assert out.returncode == 0 and f"torchrun -m experiments.{name} configs/ft.yaml" in out.stdout
