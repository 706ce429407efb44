"""Damaged inputs give the right result, or an error of one line that names the input.

    python tests/bench/fuzz.py                             2,000 inputs of each kind
    python tests/bench/fuzz.py kinds=config,record n=100   fewer
    python tests/bench/fuzz.py kinds=template first=17 n=1 verbose=true    one, with its traceback

Each kind starts from a valid input and damages it at random: bytes are removed, changed, doubled or cut off,
and values of JSON and YAML are replaced by others. What "right" means differs by kind:

    config       every value has its documented type, and the printed config loads as the same config
    record       the messages or the text are in the decoded tokens
    file         a .txt, .csv, .json, .gz, .parquet or .npy file: as `record`, where it can still be read
    template     the decoded tokens are the text that transformers renders
    tokenizer    the ids are those of the tokenizers package
    weights      the tensors are those that the safetensors package reads
    model        config.json: the logits are those of transformers
    checkpoint   the parameters and the optimizer are those of the undamaged checkpoint

Everything else is a failure: another exception, a process that dies, an input that takes over 20 seconds. Input
i of a kind is the same in each run. Prints a table and one line of JSON; exits with 1 if there was a failure.
"""
import contextlib
import copy
import gzip
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from safetensors.numpy import load_file

import checkpoint
import configs
import model as transformer
import tokenize_data
import train

CHATS = [
    {"messages": [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "It is 5."}]},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <|im_end|> you"},
                  {"role": "assistant", "content": "Hello.", "weight": 0.5}]},
    {"conversations": [{"from": "human", "value": "naïve 日本?"}, {"from": "gpt", "value": "Ja 👍"}],
     "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]},
    {"messages": [{"role": "user", "content": "Weather?"},
                  {"role": "assistant", "content": "", "tool_calls": [
                      {"type": "function", "function": {"name": "f", "arguments": {"city": "Bern"}}}]},
                  {"role": "tool", "content": "rain"}, {"role": "assistant", "content": "It rains."}]},
    {"instruction": "Name a colour", "input": "warm", "output": "red", "weight": 2},
    {"prompt": "a", "completion": "b"},
    {"text": "A plain text.\nIt has two lines."},
]
VALUES = [None, True, False, 0, 1, -1, 3.5, 1e30, float("nan"), float("inf"), 2**70, "", " ", "x", "1", "~", "null", "<|im_end|>", "\x00",
          "\ud800", "${lr}", "${", "{{", "../x", [], {}, [None], [[]], {"": None}, {"x": {"x": []}}, ["x", 1]]


# ---- damage

def damage_bytes(rng, data):
    """Bytes with one to three parts removed, changed, doubled or cut off."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        if not data:
            break
        start = rng.randrange(len(data))
        end = min(len(data), start + rng.choice([1, 1, 1, 2, 8, 64]))
        how = rng.choice(["remove", "change", "double", "cut", "flip", "zero"])
        if how == "remove":
            del data[start:end]
        elif how == "change":
            data[start:end] = bytes(rng.randrange(256) for _ in range(end - start))
        elif how == "double":
            data[start:start] = data[start:end]
        elif how == "cut":
            del data[start:]
        elif how == "flip":
            data[start] ^= 1 << rng.randrange(8)
        else:
            data[start:end] = bytes(end - start)
    return bytes(data)


def damage_text(rng, text):
    """Text in which characters or lines are removed, replaced by others of it, doubled or swapped."""
    for _ in range(rng.randint(1, 3)):
        units = list(text) if rng.random() < 0.6 else text.splitlines(keepends=True)
        if not units:
            return text
        i = rng.randrange(len(units))
        j = rng.randrange(len(units))
        how = rng.choice(["remove", "replace", "double", "swap", "insert"])
        if how == "remove":
            del units[i:i + rng.choice([1, 1, 3])]
        elif how == "replace":
            units[i] = units[j]
        elif how == "double":
            units.insert(i, units[i])
        elif how == "swap":
            units[i], units[j] = units[j], units[i]
        else:
            units.insert(i, rng.choice(list("{}[]\"':,\\\t\n%#-\ufeff\u2028é") + ["null", "NaN", "${lr}"]))
        text = "".join(units)
    return text


def nodes(value, path=()):
    """The paths of all values in a JSON value."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += nodes(item, (*path, key))
    return found


def damage_json(rng, value):
    """A JSON value in which one to three values are replaced, removed, doubled or renamed."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        paths = nodes(value)[1:]
        if not paths:
            break
        *parents, key = rng.choice(paths)
        parent = value
        for k in parents:
            parent = parent[k]
        how = rng.choice(["replace", "replace", "remove", "double", "rename"])
        if how == "replace":
            parent[key] = copy.deepcopy(rng.choice(VALUES))
        elif how == "remove":
            del parent[key]
        elif isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        elif how == "rename":
            parent[rng.choice([f"{key}x", str(key).upper(), ""])] = parent.pop(key)
        else:
            parent[key] = [parent[key], parent[key]]
    return value


def to_json_bytes(value):
    return json.dumps(value, ensure_ascii=True).encode()


# ---- kinds: each is a class whose check(rng) makes one damaged input, and returns if it was right

class Kind:
    """`folder` is empty, and `names` must be in an error's text: at least one of them."""
    names = ()

    def __init__(self, folder):
        self.folder = folder


class Config(Kind):
    TEXT = (ROOT / "configs" / "ft.yaml").read_text()
    KEYS = list(configs.flat(configs.read_defaults()[0]))

    def check(self, rng):
        path = self.folder / "some.yaml"
        overrides = []
        if rng.random() < 0.6:
            path.write_text(damage_text(rng, self.TEXT), encoding="utf-8", errors="surrogatepass")
        elif rng.random() < 0.5:
            path.write_bytes(damage_bytes(rng, self.TEXT.encode()))
        else:
            path.write_text(self.TEXT)
            for _ in range(rng.randint(1, 3)):
                key = rng.choice(self.KEYS)
                text = rng.choice([str(rng.choice(VALUES)), json.dumps(rng.choice(VALUES)), "1e-3", "a=b", "[1,"])
                overrides.append(damage_text(rng, f"{key}={text}") if rng.random() < 0.3 else f"{key}={text}")
        self.names = ("some.yaml", "model.init_from", *(o.partition("=")[0].split(".")[0] for o in overrides))
        cfg, _, _ = configs.load([str(path), *overrides])
        printed = self.folder / "printed.yaml"
        printed.write_text(configs.dump(cfg), encoding="utf-8")
        again, _, _ = configs.load([str(printed)])
        assert configs.dump(again) == configs.dump(cfg), "the printed config loads as another one"


class Data(Kind):
    """What kinds of training data have in common."""

    def load(self, file, *more):
        """The decoded documents of a file, and its counts."""
        self.names = (str(file), file.name, *(o.partition("=")[0] for o in more))
        cache = self.folder / "tokens"
        shutil.rmtree(cache, ignore_errors=True)
        cfg, _, _ = configs.load([f"data.train.a.path={file}", "data.tokenizer=bytes", "data.seq_len=100000",
                                  "data.processes=1", f"data.cache_dir={cache}", *more])
        tok = tokenize_data.load_tokenizer(cfg)
        tokens = tokenize_data.load_datasets(cfg, tok, quiet=True)["train"]["a"]
        for i in range(len(tokens)):
            ids, weights = tokens.document(i)
            assert len(ids) == len(weights) and np.isfinite(weights).all() and weights[1:].any()
        return [tok.decode(tokens.document(i)[0]) for i in range(len(tokens))], tokens.header


class Record(Data):
    def check(self, rng):
        record = rng.choice(CHATS)
        if rng.random() < 0.75:
            line = to_json_bytes(damage_json(rng, record))
        else:
            line = damage_bytes(rng, to_json_bytes(record))
        file = self.folder / "a.jsonl"
        file.write_bytes(line + b"\n")
        texts, header = self.load(file)
        if header["documents"] > 1 or b"\n" in line:
            return                                       # the damage made several lines of it
        record = json.loads(line)
        for said in answers(record):
            assert said.strip() in texts[0], f"{said!r} is not in {texts[0]!r}"


def answers(record):
    """The texts of a record that must be in its document, as far as their form is undamaged."""
    if isinstance(record, str):
        return [clean(record)]
    turns = record.get("messages") or record.get("conversations")
    if isinstance(turns, list):
        found = [turn.get("content") or turn.get("value") for turn in turns]
    else:
        found = [record.get(key) for key in ("output", "completion", "text")]
    return [clean(text) for text in found if isinstance(text, str)]


def clean(text):
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class File(Data):
    def valid(self):
        """{name: bytes} of valid files."""
        files = {
            "a.txt": "\n\n".join(["Some text, naïve."] * 4).encode(),
            "a.json": json.dumps(CHATS, indent=1).encode(),
            "a.csv": b'prompt,completion\nhello,"a ""b"" c"\nyes,no\n',
            "a.tsv": b"question\tanswer\nhello\tworld\n",
            "a.jsonl.gz": gzip.compress(b"\n".join(map(to_json_bytes, CHATS)), mtime=0),
        }
        for name, array in (("a.npy", np.arange(50)), ("a_labels.npy", np.arange(50)),
                            ("a_weights.npy", np.linspace(-1, 1, 50))):
            stream = io.BytesIO()
            np.save(stream, array)
            files[name] = stream.getvalue()
        with contextlib.suppress(ImportError):
            import pyarrow
            import pyarrow.parquet
            stream = io.BytesIO()
            table = pyarrow.table({"prompt": ["hello", "you"], "completion": ["a b c", "d"]})
            pyarrow.parquet.write_table(table, stream)
            files["a.parquet"] = stream.getvalue()
        return files

    def check(self, rng):
        if not hasattr(self, "files"):
            self.files = self.valid()
        folder = self.folder / "in"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        name = rng.choice(sorted(self.files))
        data = damage_bytes(rng, self.files[name])
        (folder / name).write_bytes(data)
        opened = folder / name
        if name.startswith("a_"):
            opened = folder / "a.npy"
            opened.write_bytes(self.files["a.npy"])
        try:
            texts, header = self.load(opened)
        except configs.UserError:
            self.names += (name,)
            raise
        if name == "a.txt":
            assert "".join(texts).replace("<|endoftext|>", "").strip() == data.decode("utf-8-sig").strip()
        if name == "a.json":
            records = json.loads(data.decode("utf-8-sig"))
            assert header["records"] == (len(records) if isinstance(records, list) else 1)


class Template(Data):
    TEXTS = (
        tokenize_data.CHATML,
        "{{- bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] | trim }}{% endgeneration %}{{ eos_token }}{% else %}[{{ m.role|upper }}] "
        "{{ m.content }}{% endif %}{% endfor %}",
        "{%- set ns = namespace(last=-1) %}{%- if tools %}{{ tools | tojson(indent=2) }}\n{% endif %}\n"
        "{%- for m in messages %}\n  {%- if loop.index0 > 5 %}{% break %}{% endif %}\n"
        "  {%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}\n"
        "  {{- '<|im_start|>' + m.role + '\\n' }}{% if m.content is string %}{{ m.content }}{% endif %}\n"
        "  {%- for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}\n"
        "  {{- '<|im_end|>\\n' }}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}",
    )

    def check(self, rng):
        from transformers.utils.chat_template_utils import render_jinja_template
        text = damage_text(rng, rng.choice(self.TEXTS))
        template = self.folder / "template.jinja"
        template.write_text(text, encoding="utf-8")
        file = self.folder / "a.jsonl"
        chat = CHATS[3] if "tool_calls" in text and rng.random() < 0.5 else CHATS[0]
        file.write_bytes(to_json_bytes(chat) + b"\n")
        names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
        try:
            (theirs,), _ = render_jinja_template([chat["messages"]], chat_template=template.read_text("utf-8-sig"), **names)
        except Exception:                                # jinja2's, Python's, transformers'
            theirs = None
        try:
            (ours,), _ = self.load(file, f"data.chat_template={template}")
        except configs.UserError as error:
            self.names += (str(template),)
            # these say that there is nothing to train on, or that no loss weight could be assigned
            is_right = theirs is None or "nothing to train on" in str(error) or not theirs
            assert is_right, f"refused, but transformers renders {theirs!r}: {error}"
            raise
        assert theirs is not None, f"transformers refuses it, we render {ours!r}"
        assert ours == clean(theirs), f"{ours!r} is not {theirs!r}"


class HFTokenizer(Kind):
    STRINGS = ("Hello, world! I'll go 123 4567", "  naïve\n\n\tdef f(x):  return x", "日本 👍 a\u00a0b", "<think>x</think>")

    def valid(self):
        """A byte-level tokenizer.json as GPT-2's, with 300 tokens."""
        import tokenizers
        tok = tokenizers.Tokenizer(tokenizers.models.BPE())
        tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False)
        tok.train_from_iterator([" hello world the thing there naïve return 12 123"] * 9, trainer)
        tok.add_tokens(["<think>"])
        return json.loads(tok.to_str())

    def check(self, rng):
        import tokenizers
        if not hasattr(self, "spec"):
            self.spec = self.valid()
        if rng.random() < 0.8:
            data = to_json_bytes(self.damage_spec(rng))
        else:
            data = damage_bytes(rng, json.dumps(self.spec, ensure_ascii=False).encode())
        path = self.folder / "tokenizer.json"
        path.write_bytes(data)
        self.names = (str(path), "tokenizer.json")
        cfg, _, _ = configs.load([f"data.tokenizer={path}"])
        with contextlib.redirect_stderr(io.StringIO()):
            tok = tokenize_data.load_tokenizer(cfg)
        try:
            theirs = tokenizers.Tokenizer.from_file(str(path))
        except Exception:                                # tokenizers raises nothing narrower
            return                                       # it insists on keys that change nothing
        theirs.no_truncation()
        for text in self.STRINGS:
            if any(special in text for special in tok.special):
                continue                                 # we encode it as text, and they as a token
            ids = theirs.encode(text, add_special_tokens=False).ids
            assert tok.encode(text).tolist() == ids, f"{text!r}: {tok.encode(text).tolist()} is not {ids}"

    def damage_spec(self, rng):
        """Damage a part other than the vocabulary as often as the vocabulary."""
        spec = copy.deepcopy(self.spec)
        key = rng.choice(["added_tokens", "normalizer", "pre_tokenizer", "model", "model", "decoder", "post_processor"])
        if rng.random() < 0.2:
            return damage_json(rng, spec)
        return spec | {key: damage_json(rng, {"x": spec[key]}).get("x")}


class Weights(Kind):
    FILE = "model.safetensors"

    def prepare(self):
        """Save a small Llama as transformers does, and keep what it computes."""
        import transformers
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        torch.manual_seed(0)
        shape = transformers.LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, vocab_size=259,
                                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
        transformers.LlamaForCausalLM(shape).save_pretrained(self.folder)
        self.original = (self.folder / self.FILE).read_bytes()

    def check(self, rng):
        if not hasattr(self, "original"):
            self.prepare()
        path = self.folder / self.FILE
        path.write_bytes(self.damage(rng))
        self.names = (str(path), str(self.folder), "model.")
        ours, _ = transformer.load(self.folder)
        self.compare(ours)

    def damage(self, rng):
        size = int.from_bytes(self.original[:8], "little")
        if rng.random() < 0.3:
            return damage_bytes(rng, self.original)
        if rng.random() < 0.5:
            return self.original[:8] + damage_bytes(rng, self.original[8:8 + size]) + self.original[8 + size:]
        header = to_json_bytes(damage_json(rng, json.loads(self.original[8:8 + size])))
        return len(header).to_bytes(8, "little") + header + self.original[8 + size:]

    @torch.no_grad()
    def compare(self, ours):
        theirs = load_file(self.folder / self.FILE)
        assert np.array_equal(ours.embed.weight[:259].detach().numpy(), theirs["model.embed_tokens.weight"], equal_nan=True)
        total = sum(float(np.nansum(np.abs(a.astype(np.float64)))) for a in theirs.values() if np.isfinite(a).all())
        mine = sum(float(p.double().abs().nansum()) for p in ours.parameters() if p.isfinite().all())
        assert np.isclose(total, mine, rtol=1e-6), f"the weights sum to {mine}, in the file to {total}"


class Model(Weights):
    FILE = "config.json"

    def damage(self, rng):
        if rng.random() < 0.2:
            return damage_bytes(rng, self.original)
        return to_json_bytes(damage_json(rng, json.loads(self.original)))

    @torch.no_grad()
    def compare(self, ours):
        import transformers
        ids = torch.arange(24)[None] * 7 % 259
        try:
            theirs = transformers.AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
            expected = theirs(ids).logits[0]
        except Exception:                                # which of transformers' checks, or of torch's, is not ours
            return
        actual = ours.logits(transformer.pack_prompts([ids[0].tolist()]))
        assert torch.allclose(actual, expected, atol=1e-4), f"logits differ by {(actual - expected).abs().max()}"


class Checkpoint(Kind):
    def prepare(self):
        data = self.folder / "chats.jsonl"
        data.write_bytes(b"".join(to_json_bytes(chat) + b"\n" for chat in CHATS))
        argv = [f"data.train.a.path={data}", "data.tokenizer=bytes", f"data.cache_dir={self.folder}/tokens",
                "model.n_layers=1", "model.d_model=16", "model.n_heads=2", "batch_size=4", "max_steps=2", "epochs=0",
                "eval_every=0", "samples=0", "checkpoint.export=false", "dtype=float32", f"out_dir={self.folder}/run"]
        cfg, _, explicit = configs.load(argv)
        with contextlib.redirect_stdout(io.StringIO()):
            train.main(cfg, explicit)
        self.saved = self.folder / "run" / "checkpoints" / "00000002"
        self.files = {p.name: p.read_bytes() for p in sorted(self.saved.iterdir())}
        model_cfg, _ = train.resolve_model(cfg, tokenize_data.load_tokenizer(cfg))
        self.model = transformer.build(model_cfg)
        self.optimizer = train.make_optimizer(self.model, cfg)
        checkpoint.load_checkpoint(self.saved, self.model, self.optimizer)
        self.expected = {name: t.clone() for name, t in self.tensors().items()}

    def tensors(self):
        weights = checkpoint.trained_parameters(self.model)
        return {name: t.detach() for name, t in (weights | checkpoint.optimizer_tensors(self.model, self.optimizer)).items()}

    def check(self, rng):
        if not hasattr(self, "files"):
            self.prepare()
        for name, data in self.files.items():
            (self.saved / name).write_bytes(data)
        name = rng.choice(sorted(self.files))
        self.names = (str(self.saved),)
        other = self.files[rng.choice(sorted(self.files))]
        how = rng.random()
        if how < 0.05:
            (self.saved / name).unlink()
        elif how < 0.1:
            (self.saved / name).write_bytes(other)
        elif name == "state.json" and how < 0.5:
            (self.saved / name).write_bytes(to_json_bytes(damage_json(rng, json.loads(self.files[name]))))
        else:
            (self.saved / name).write_bytes(damage_bytes(rng, self.files[name]))
        for t in self.tensors().values():
            t.zero_()
        checkpoint.load_checkpoint(self.saved, self.model, self.optimizer)
        for name, t in self.tensors().items():
            assert torch.equal(t, self.expected[name]), f"{name} differs"


KINDS = {"config": Config, "record": Record, "file": File, "template": Template, "tokenizer": HFTokenizer,
         "weights": Weights, "model": Model, "checkpoint": Checkpoint}


# ---- run

def outcome(kind, rng, limit=20):
    """"right", "one line", or what is wrong."""
    signal.alarm(limit)
    try:
        kind.check(rng)
        return "right"
    except configs.UserError as error:
        text = str(error)
        if "\n" in text or len(text) > 1500:
            return f"an error of {len(text)} characters and {text.count(chr(10)) + 1} lines: {text[:300]}"
        if not any(" ".join(name.split()) in " ".join(text.split()) for name in kind.names):
            return f"an error that does not name {' or '.join(kind.names[:3])}: {text[:300]}"
        return "one line"
    finally:
        signal.alarm(0)


def too_slow(*_):
    raise TimeoutError("it took over 20 seconds")


def run_kind(name, first, n, verbose=False):
    """Check inputs first ... first + n - 1 of a kind: ({"right": count, "one line": count}, failures)."""
    counts = {"right": 0, "one line": 0}
    failures = []
    signal.signal(signal.SIGALRM, too_slow)
    with tempfile.TemporaryDirectory() as folder:
        kind = KINDS[name](Path(folder))
        for i in range(first, first + n):
            try:
                result = outcome(kind, random.Random(f"{name} {i}"))
            except BaseException as error:               # also panics of Rust libraries
                if isinstance(error, KeyboardInterrupt):
                    raise
                result = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
                if verbose:
                    traceback.print_exc()
            if result in counts:
                counts[result] += 1
            else:
                failures.append(f"{name} {i}: {result}")
    return counts, failures


def run_in_fork(name, first, n, verbose):
    """run_kind() in a process of its own, because some inputs might kill it."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        result = run_kind(name, first, n, verbose)
        os.write(write_end, json.dumps([result[0], result[1][:50]]).encode()[:2**16 - 1])
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as stream:
        data = stream.read()
    status = os.waitpid(pid, 0)[1]
    if status:
        return {"right": 0, "one line": 0}, [f"{name}: the process died with status {status} in {first} ... {first + n - 1}"]
    return json.loads(data)


def main(argv):
    options, rest = configs.pop_options(argv, kinds=",".join(KINDS), n=2000, first=0, verbose=False)
    assert not rest, f"unknown: {rest}"
    total = 0
    all_failures = []
    table = {}
    for name in options["kinds"].split(","):
        counts = {"right": 0, "one line": 0}
        failures = []
        begun = time.perf_counter()
        for first in range(options["first"], options["first"] + options["n"], 200):
            n = min(200, options["first"] + options["n"] - first)
            some_counts, some_failures = run_in_fork(name, first, n, options["verbose"])
            counts = {key: counts[key] + some_counts[key] for key in counts}
            failures += some_failures
        total += options["n"]
        table[name] = counts | {"failed": len(failures)}
        print(f"{name:<12} {options['n']:>6} inputs  {counts['right']:>6} right  {counts['one line']:>6} one line  "
              f"{len(failures):>4} failed  {time.perf_counter() - begun:5.0f} s", flush=True)
        for failure in failures[:20]:
            print(f"    {failure!a}", flush=True)
        all_failures += failures
    print(json.dumps({"inputs": total, "failed": len(all_failures), "kinds": table}))
    sys.exit(1 if all_failures else 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
