"""Raw text and chats -> token files on disk.

    python tokenize_data.py configs/ft.yaml              tokenize, and say what came out
    python tokenize_data.py configs/ft.yaml show=3       and print 3 samples, the trained tokens coloured

The way of one record:

    {"messages": [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]}  found by its keys
    <|im_start|>user\\n2 + 3?<|im_end|>\\n<|im_start|>assistant\\n5<|im_end|>\\n                    the template's text
     257 117 115 101 114 10 50 32 43 32 51 63 258 10 257 97 115 … 116 10 53 258 10                its token ids
       0   0   0   0   0  0  0  0  0  0  0  0   0  0   0  0   0 …   0  0  1   1  0                1: trained

The ids are those of the whole rendered text; the mask never changes them. Special tokens that are spelled inside a
message's content stay text: a user who writes <|im_end|> ends nobody's turn. A text document is BOS + its ids + EOS,
all trained, cut into windows of data.seq_len targets.

A source becomes a folder in data.cache_dir, named by a fingerprint of everything it depends on:

    tokens.bin     uint16 or uint32, one document after the other
    mask.bin       uint8 per token, 1 where it is trained
    offsets.bin    int64, where document i begins; one more than there are documents
    header.json    format, dtype, counts, fingerprints; written last
"""
import base64, collections, concurrent.futures, glob, gzip, hashlib, itertools, json, multiprocessing, os, re
import shutil, sys, unicodedata, zlib
from datetime import datetime
from pathlib import Path

import numpy as np
import tiktoken

import configs

FORMAT = 1


# ---------------------------------------------------------------------------------------------------------------------
# tokenizers: all are tiktoken encodings, with what a model's files say beside them

class Tokenizer:
    """Text <-> ids.

    ranks     {token's bytes: id}, the order in which pairs are merged
    pattern   regular expression that splits text into words; merges don't cross it
    special   {text: id}
    bos, eos  texts of special tokens, or None
    template  jinja text of the model's own chat template, or None
    nfc       text is brought to Unicode's composed form first (Qwen)
    folder    where its Hugging Face files are, or None
    """

    def __init__(self, ranks, pattern, special, bos=None, eos=None, template=None, nfc=False, folder=None):
        self.ranks, self.pattern, self.special, self.bos, self.eos = ranks, pattern, special, bos, eos
        self.template, self.nfc, self.folder = template, nfc, folder
        missing = [b for b in range(256) if bytes([b]) not in ranks]
        if missing:                                                  # such a byte would take tiktoken's process down
            raise ValueError(f"tokenizer: its vocabulary lacks {len(missing)} of the 256 single bytes "
                             f"(the first is {missing[0]})")
        assert all(text is None or text in special for text in (bos, eos)), (bos, eos)
        self.enc = tiktoken.Encoding("ours", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        self.n_vocab = 1 + max([*ranks.values(), *special.values()])
        self.lengths = np.zeros(self.n_vocab, np.int64)              # bytes of each token
        self.lengths[list(ranks.values())] = [len(b) for b in ranks]
        self.lengths[list(special.values())] = [len(s.encode()) for s in special]
        self.byte_ids = None                                         # byte -> id, where there is nothing to merge
        if len(ranks) == 256:
            self.byte_ids = np.array([ranks[bytes([b])] for b in range(256)], np.int64)
        self.special_pattern = any_of(special)
        vocabulary = sorted((i, b.hex()) for b, i in ranks.items())
        self.fingerprint = digest(pattern, sorted(special.items()), bos, eos, nfc, vocabulary)

    def spans(self, text):
        """str -> (ids [n], where each ends in bytes of the text [n])"""
        ids = self.encode(text)
        return ids, np.cumsum(self.lengths[ids])

    def encode(self, text):
        """str -> [n] int64 ids. Special tokens that are spelled in it are text. Lone surrogates become U+FFFD."""
        if self.byte_ids is not None:
            return self.byte_ids[np.frombuffer(text.encode(), np.uint8)]
        return np.array(self.enc.encode_ordinary(text), np.int64)

    def decode(self, ids):
        """ids -> str; an id without a token is left out, broken UTF-8 becomes U+FFFD."""
        known = [int(i) for i in ids if 0 <= i < self.n_vocab and self.lengths[i]]
        return b"".join(self.enc.decode_tokens_bytes(known)).decode("utf-8", errors="replace")

    def clean(self, text):
        """What can't be UTF-8 replaced, and composed where the tokenizer asks for it."""
        if not text.isascii():
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return unicodedata.normalize("NFC", text) if self.nfc else text


class Borrowed:
    """A tokenizer.json that tiktoken can't hold, run by the optional tokenizers package: the same methods, slower."""

    def __init__(self, path, special, bos, eos, template):
        import tokenizers
        try:
            self.enc = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:                                       # the package raises no narrower one
            raise ValueError(f"{path}: the tokenizers package cannot read it either: {one_line(e)}") from None
        self.enc.encode_special_tokens = True                        # what spells a special token in a text is text
        self.special, self.bos, self.eos, self.template = special, bos, eos, template
        self.nfc, self.folder, self.byte_ids, self.n_vocab = False, path.parent, None, self.enc.get_vocab_size()
        self.special_pattern = any_of(special)
        self.fingerprint = digest(hashlib.sha256(path.read_bytes()).hexdigest(), bos, eos)

    clean = Tokenizer.clean

    def spans(self, text):
        encoded = self.enc.encode(text, add_special_tokens=False)
        at = np.cumsum([0, *(len(c.encode()) for c in text)])        # characters -> bytes
        ends = np.array([end for _, end in encoded.offsets], np.int64)
        return np.array(encoded.ids, np.int64), at[ends]

    def encode(self, text):
        return self.spans(text)[0]

    def decode(self, ids):
        return self.enc.decode([int(i) for i in ids], skip_special_tokens=False)


def digest(*things):
    return hashlib.sha256(json.dumps(things, default=str).encode()).hexdigest()[:16]


def any_of(special):
    """Special tokens -> the pattern that finds them, the longest first; it finds nothing where there is none."""
    return re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")


def one_line(error):
    return " ".join(str(error).split())


GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BYTES_SPECIAL = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}


def load_tokenizer(cfg):
    """data.tokenizer, or model.init_from's where that is empty -> Tokenizer. Raises ValueError."""
    data = cfg["data"]
    name = data["tokenizer"] or configs.pretrained(cfg["model"]["init_from"])
    if not name:
        raise ValueError("data.tokenizer: none is given, and there is no model.init_from to take it from; "
                         "bytes always works")
    path = Path(name)
    if name == "bytes":
        tok = bytes_tokenizer()
    elif name.endswith(".tiktoken"):
        tok = tiktoken_file(path, data["tokenizer_pattern"], data["special_tokens"])
    elif path.exists():
        tok = huggingface_tokenizer(path)
    elif name in tiktoken.list_encoding_names():
        try:
            enc = tiktoken.get_encoding(name)
        except OSError as e:
            raise ValueError(f"data.tokenizer: tiktoken cannot download {name} ({type(e).__name__}); "
                             "bytes or a folder with a tokenizer.json needs no network") from None
        tok = Tokenizer(enc._mergeable_ranks, enc._pat_str, enc._special_tokens, eos="<|endoftext|>")
    else:
        raise ValueError(f"data.tokenizer: {name} is no file or folder, and none of bytes, "
                         f"{', '.join(tiktoken.list_encoding_names())}")
    for key in ("bos_token", "eos_token"):
        text = data[key]
        if text is None:
            continue
        if text != "" and (not isinstance(text, str) or text not in tok.special):
            raise ValueError(f"data.{key}: {text!r} is no special token of {name}; "
                             f"it has {', '.join(tok.special) or 'none'}")
        setattr(tok, key[:3], text or None)
        tok.fingerprint = digest(tok.fingerprint, key, text)
    return tok


def bytes_tokenizer():
    """Every byte is a token; <|endoftext|> borders text documents, <|im_start|> and <|im_end|> border turns."""
    return Tokenizer({bytes([b]): b for b in range(256)}, r"[\s\S]", BYTES_SPECIAL, "<|endoftext|>", "<|endoftext|>")


def tiktoken_file(path, pattern, special):
    """A file of `base64(token) rank` lines -> Tokenizer. It needs its pattern said: the file doesn't hold one."""
    if not pattern:
        raise ValueError(f"data.tokenizer_pattern: {path} needs the regular expression its tokenizer splits text with")
    try:                                                             # tiktoken's own reader keeps old files in a cache
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    except (OSError, ValueError) as e:
        raise ValueError(f"{path}: not a .tiktoken file: {getattr(e, 'strerror', None) or e}") from None
    taken = [*ranks.values(), *special.values()]
    for text, i in special.items():
        if type(i) is not int or i < 0 or taken.count(i) > 1:
            raise ValueError(f"data.special_tokens.{text}: expected an id that no other token has, got {i!r}")
    try:
        return Tokenizer(ranks, pattern, special)
    except ValueError as e:                                          # tiktoken's own words on a pattern, or ours
        raise ValueError(f"{path} with data.tokenizer_pattern {pattern!r}: {one_line(e)}") from None


def byte_letters():
    """GPT-2's spelling of bytes as printable letters -> {letter: byte}. What isn't printable is moved up to U+0100."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in keep]
    return {chr(b): b for b in keep} | {chr(256 + n): b for n, b in enumerate(rest)}


def huggingface_tokenizer(path):
    """A byte-level BPE tokenizer.json (or its folder) -> Tokenizer; what isn't one exactly is Borrowed, or refused."""
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a tokenizer's folder must hold a tokenizer.json")
    spec, beside = read_json(path), path.parent / "tokenizer_config.json"
    config = read_json(beside) if beside.is_file() else {}
    if not isinstance(spec.get("model"), dict):
        raise ValueError(f"{path}: has no section `model`; it is not a tokenizer.json")

    template = config.get("chat_template")
    if isinstance(template, list):                                   # several, by name
        template = next((t.get("template") for t in template if t.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{beside}: chat_template must be text, got {type(template).__name__}")
    if (path.parent / "chat_template.jinja").is_file():
        template = read_text(path.parent / "chat_template.jinja")
    special = {t["content"]: t["id"] for t in spec.get("added_tokens") or []}

    def named(key):                                                  # "TEXT", or {"content": "TEXT", …}
        value = config.get(key)
        if isinstance(value, dict):
            value = value.get("content")
        return value if isinstance(value, str) and value in special else None
    bos, eos = named("bos_token"), named("eos_token")
    try:
        ranks, pattern, nfc = byte_level(path, spec, special)
        tok = Tokenizer(ranks, pattern, special, bos, eos, template, nfc, path.parent)
        prove(tok, spec["model"], path)
    except ValueError as e:
        try:
            tok = Borrowed(path, special, bos, eos, template)
        except ImportError:
            raise ValueError(f"{e}; with `pip install tokenizers` it would run there") from None
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"note: {e}; the tokenizers package runs it", file=sys.stderr, flush=True)
    return tok


def refuse(path, what):
    raise ValueError(f"{path}: {what} cannot be carried over exactly; "
                     "supported are byte-level BPE tokenizers (GPT-2, Llama 3, Qwen kinds)")


def byte_level(path, spec, special):
    """A byte-level BPE tokenizer.json -> (ranks, pattern, nfc). ValueError for what tiktoken would do otherwise."""
    bpe = spec["model"]
    if bpe.get("type", "BPE") != "BPE" or bpe.get("byte_fallback") or "merges" not in bpe:
        refuse(path, f"a {bpe.get('type')} model{' with byte fallback' if bpe.get('byte_fallback') else ''}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if bpe.get(key):
            refuse(path, f"model.{key}")
    normalizer = (spec.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        refuse(path, f"the normalizer {normalizer}")

    pre = spec.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers") or [pre]                        # [ByteLevel] or [Split, ByteLevel]
    last, prefixed = steps[-1], steps[-1].get("add_prefix_space")
    if last.get("type") != "ByteLevel" or prefixed or len(steps) > 2:
        names = " + ".join(str(step.get("type")) for step in steps)
        refuse(path, f"the pre-tokenizer {names}{' with a prefix space' if prefixed else ''}")
    splits = last.get("use_regex", True)
    pattern = GPT2_PATTERN if splits else r"[\s\S]+"
    if len(steps) == 2:
        first = steps[0]
        known = first.get("type") == "Split" and "Regex" in first["pattern"] and first["behavior"] == "Isolated"
        if not known or splits:
            refuse(path, f"the pre-tokenizer {first.get('type')} before ByteLevel")
        pattern = first["pattern"]["Regex"]

    for token in spec.get("added_tokens") or []:
        touchy = any(token[key] for key in ("lstrip", "rstrip", "single_word", "normalized"))
        if touchy and not token["special"]:
            refuse(path, f"the added token {token['content']!r}, which is no control token,")
    letters = byte_letters()
    try:
        ranks = {bytes(letters[c] for c in token): i for token, i in bpe["vocab"].items() if token not in special}
    except KeyError as e:
        refuse(path, f"a vocabulary with the letter {e}")
    return ranks, pattern, normalizer == "NFC"


NASTY = ("", " ", "a", "Hello, world! I'll we'd they're DON'T", "  two  spaces   three    four",
         "tab\tnew\nline\r\n\r\n\n  end  ", "naïve café Ünïcödé", "1234567890 3.14 1,000,000 ½ ٣", "日本語と中文，한국어",
         "עברית العربية", "👩‍👩‍👧 🏳️‍🌈 🤖", "\x00\x01\x7f\x1b[0m", "_under_score__ --flag=value // /* x */",
         "aaaaaaaaaaaaaaaaaaaaaaaaa", "\u200b\u00a0\u3000\ufeff", "e\u0301 o\u0308", " \n \n\n\t x",
         "<|endoftext|> <|im_end|>", "if (x==1) {\n    return y;\n}")


def prove(tok, bpe, path):
    """Hold the tiktoken encoding against merging by the list of merges itself, on strings that tend to go wrong."""
    import regex                                                     # tiktoken brings it
    letters = {b: c for c, b in byte_letters().items()}
    pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in bpe["merges"]]
    order = {tuple(pair): n for n, pair in enumerate(pairs)}
    for text in NASTY:
        text = tok.clean(text)
        want = []
        for word in regex.findall(tok.pattern, text):
            parts = [letters[b] for b in word.encode()]
            if bpe.get("ignore_merges") and "".join(parts) in bpe["vocab"]:
                parts = ["".join(parts)]
            while best := min((p for p in zip(parts, parts[1:]) if p in order), key=order.get, default=None):
                at = next(i for i in range(len(parts)) if tuple(parts[i:i + 2]) == best)
                parts[at:at + 2] = ["".join(best)]
            want += [bpe["vocab"].get(p) for p in parts]
        if tok.encode(text).tolist() != want:
            refuse(path, f"its order of merges (seen on {text!r})")


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: cannot be read ({getattr(e, 'strerror', None) or 'not UTF-8 text'})") from None


def read_json(path):
    """A file that holds one JSON object -> dict. Raises ValueError."""
    try:
        d = json.loads(read_text(path))
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}: not valid JSON: {e}") from None
    if not isinstance(d, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(d).__name__}")
    return d


def merges_of(ranks):
    """{token: rank} -> [(left, right)] in the order of ranks: the two tokens that merging by rank makes each one of."""
    out = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best, i = min((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
            if best >= rank:                                         # never merged, only met as a whole word
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            out.append(tuple(parts))
    return out


def save_tokenizer(tok, folder, template_text):
    """Write what transformers needs to load the tokenizer: its own files where it has some, else new ones."""
    folder = Path(folder)
    if tok.folder:
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
                     "vocab.json", "merges.txt"):
            if (tok.folder / name).is_file() and (tok.folder / name).resolve() != (folder / name).resolve():
                shutil.copyfile(tok.folder / name, folder / name)
    else:
        letters = {b: c for c, b in byte_letters().items()}
        spell = lambda token: "".join(letters[b] for b in token)
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        pattern = re.sub(r"(\{\d+,\d*\})\+", r"\1", tok.pattern)       # {1,3}+ means another thing there
        words = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                 "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                 "vocab": {spell(token): i for token, i in tok.ranks.items()},
                 "merges": [f"{spell(a)} {spell(b)}" for a, b in merges_of(tok.ranks)]}
        spec = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None,
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, level]},
                "post_processor": None, "decoder": level,
                "added_tokens": [{"id": i, "content": text, **plain} for text, i in tok.special.items()],
                "model": model}
        (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if path.is_file():
        config = read_json(path)
    for key, text in (("bos_token", tok.bos), ("eos_token", tok.eos)):
        if text:
            config.setdefault(key, text)
    if template_text and template_text != tok.template:
        config["chat_template"] = template_text
        (folder / "chat_template.jinja").unlink(missing_ok=True)     # another one came along, and would win
    path.write_text(json.dumps(config, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# chats: a template's text, where each content stands in it, and which tokens are trained

CHATML = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
PLAIN = ("{% for message in messages %}{{ message.role }}:\n{{ message.content }}{{ eos_token }}\n{% endfor %}"
         "{% if add_generation_prompt %}assistant:\n{% endif %}")      # for vocabularies without ChatML's two tokens
OPEN, CLOSE, BEGIN, END = "\ufdd0\ufdd1\ufdd2\ufdd3"                # no text's characters: marks no template touches


def template_text(tok, cfg):
    """The jinja text of data.chat_template."""
    name = cfg["data"]["chat_template"]
    if name not in ("", "chatml"):
        try:
            return read_text(name)
        except ValueError as e:
            raise ValueError(f"data.chat_template: neither chatml nor a readable file: {e}") from None
    if tok.template and not name:
        return tok.template
    if "<|im_end|>" in tok.special:
        return CHATML
    if name:
        raise ValueError("data.chat_template: chatml needs a tokenizer with <|im_start|> and <|im_end|>; "
                         "leave it empty for a plain one that ends turns with EOS")
    if not tok.eos:
        raise ValueError("data.eos_token: chats need a token that ends a turn; "
                         "this tokenizer has neither <|im_end|> nor an EOS")
    return PLAIN


def compile_template(text):
    """jinja text -> a compiled template, in jinja2's sandbox, with the names that chat templates rely on."""
    import jinja2, jinja2.ext, jinja2.sandbox

    class Generation(jinja2.ext.Extension):                          # {% generation %} … {% endgeneration %} is trained
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

        def mark(self, caller):
            return BEGIN + caller() + END

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    # jinja's own tojson escapes for HTML
    env.filters["tojson"] = lambda x, indent=None, **more: json.dumps(x, ensure_ascii=False, indent=indent, **more)
    env.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: datetime.now().strftime(form)}
    try:
        return env.from_string(text)
    except jinja2.TemplateSyntaxError as e:
        raise ValueError(f"the chat template's line {e.lineno}: {e.message}") from None


def render(template, tok, messages, prompt=False, **more):
    """Messages -> text. `prompt`: with the opening of an assistant's turn, as for generation."""
    names = {"add_generation_prompt": prompt, "bos_token": tok.bos or "", "eos_token": tok.eos or ""}
    try:
        return template.render(messages=messages, **names, **more)
    except Exception as e:                                           # a template may raise whatever Python raises
        raise ValueError(f"the chat template refuses these messages: {one_line(e) or type(e).__name__}") from None


def unmarked(text):
    """A rendered text without the marks of {% generation %}."""
    return text.replace(BEGIN, "").replace(END, "")


def contents(template, tok, messages, text, **more):
    """Where the messages' contents stand in the rendered text -> [(start, end, message's index)], ascending.

    Rendered once more with a mark for each content, the template shows what it writes between them. Where that isn't
    what stands between the real contents (a template that looks into them), each is found by exchanging it alone.
    """
    marks = [m | {"content": f"{OPEN}{i}{CLOSE}"} if m.get("content") else m for i, m in enumerate(messages)]
    first, *rest = re.split(f"{OPEN}(\\d+){CLOSE}", unmarked(render(template, tok, marks, **more)))
    found, at = [], len(first) if text.startswith(first) else -1
    for index, between in zip(map(int, rest[::2]), rest[1::2]):
        whole = messages[index]["content"]
        forms = (whole, whole.strip(), whole.lstrip(), whole.rstrip())
        form = next((c for c in forms if at >= 0 and text.startswith(c + between, at)), None)
        if form is None:
            at = -1
            break
        found.append((at, at + len(form), index))
        at += len(form + between)
    if at == len(text):
        return found

    found = []
    for i, m in enumerate(messages):
        if not m.get("content"):
            continue
        alone = [*messages[:i], marks[i], *messages[i + 1:]]
        other = unmarked(render(template, tok, alone, **more))
        if other != text:
            start = len(os.path.commonprefix([text, other]))
            end = len(text) - len(os.path.commonprefix([text[start:][::-1], other[start:][::-1]]))
            found.append((start, end, i))
    return sorted(found)


def cleaned(tok, messages):
    return [m | {"content": tok.clean(m["content"])} if m.get("content") else m for m in messages]


def encode_chat(tok, template, messages, **more):
    """Messages -> (ids [n] int64, mask [n] uint8).

    Trained are the assistant's contents, each with the token that ends its turn. A template with
    {% generation %} marks says itself what is trained. Raises ValueError where the template refuses.
    """
    messages = cleaned(tok, messages)
    marked = render(template, tok, messages, **more)
    text = unmarked(marked)
    where = contents(template, tok, messages, text, **more)
    trained, held = [], [(start, end) for start, end, _ in where]
    if BEGIN in marked:
        parts = re.split(f"[{BEGIN}{END}]", marked)                  # outside, inside, outside, …
        ends = np.cumsum([len(p) for p in parts])
        trained = list(zip(ends[0::2], ends[1::2]))
    else:
        turn_ends = re.compile(rf"\s*(?:{tok.special_pattern.pattern})")
        for start, end, i in where:
            if messages[i]["role"] == "assistant" and messages[i].get("weight", 1):
                after = turn_ends.match(text, end)
                trained.append((start, after.end() if after else end))

    ids, ends = encode_held(tok, text, held)
    mask = np.zeros(len(ids), np.uint8)
    for start, end in trained:
        start, end = len(text[:start].encode()), len(text[:end].encode())
        if end > start:                                              # a token that overlaps the span is trained
            mask[np.searchsorted(ends, start, "right"):np.searchsorted(ends, end, "left") + 1] = 1
    return ids, mask


def encode_held(tok, text, held):
    """Text -> (ids, where each ends in bytes). Special tokens are control tokens, save those in the `held` spans."""
    pieces, at = [], 0                                               # text, control token, text, …, text
    for special in tok.special_pattern.finditer(text):
        if not any(start < special.end() and special.start() < end for start, end in held):
            pieces += [text[at:special.start()], special[0]]
            at = special.end()
    ids, ends, before = [], [], 0
    for n, piece in enumerate([*pieces, text[at:]]):
        n_bytes = len(piece.encode())
        new, new_ends = ([tok.special[piece]], [n_bytes]) if n % 2 else tok.spans(piece)
        ids.append(new)
        ends.append(np.asarray(new_ends) + before)
        before += n_bytes
    return np.concatenate(ids).astype(np.int64), np.concatenate(ends).astype(np.int64)


def encode_prompt(tok, template, messages):
    """Messages -> the ids of the text that asks for an assistant's answer, as a list."""
    messages = cleaned(tok, messages)
    text = unmarked(render(template, tok, messages, prompt=True))
    held = [(start, end) for start, end, _ in contents(template, tok, messages, text, prompt=True)]
    return encode_held(tok, text, held)[0].tolist()


def turn_end(tok, template):
    """The ids that end an assistant's turn: what generation stops at."""
    ids, mask = encode_chat(tok, template, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    last = int(ids[np.flatnonzero(mask)[-1]]) if mask.any() else -1
    return sorted({i for i in (last, tok.special.get(tok.eos, -1)) if i in tok.special.values()})


# ---------------------------------------------------------------------------------------------------------------------
# records: what people's files hold, as {"text": …} or {"messages": […]}

ROLES = {"user": "user", "human": "user", "system": "system", "developer": "system", "assistant": "assistant",
         "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant", "tool": "tool",
         "function_call": "assistant", "observation": "tool", "function_response": "tool"}
ASKED = (("instruction", "output"), ("instruction", "response"), ("prompt", "completion"), ("prompt", "response"),
         ("question", "answer"), ("query", "response"))
TURNS, WEIGHTS = ("messages", "conversations"), ("weight", "loss_weight", "train")
KNOWN = "messages, conversations, text, " + ", ".join(" + ".join(pair) for pair in ASKED)


def normal(record, where, shape="auto"):
    """One record, whatever its keys -> {"text": str} or {"messages": [{"role", "content", …}], …}; or ValueError."""
    def fail(what):
        raise ValueError(f"{where}: {what}")
    is_text = lambda key: isinstance(record.get(key), str)
    if isinstance(record, str):
        record = {"text": record}
    if not isinstance(record, dict):
        fail(f"expected an object or a string, got {type(record).__name__}; known shapes are {KNOWN}")
    if is_text("text") and (shape == "text" or shape == "auto" and not any(k in record for k in TURNS)):
        return {"text": record["text"]}
    turns = next((record[k] for k in TURNS if isinstance(record.get(k), list)), None)
    if turns is None:
        pair = next((p for p in ASKED if all(map(is_text, p))), None)
        if pair is None and is_text("text"):
            fail("data shape is chat, and this is text")
        if pair is None:
            fail(f"keys {', '.join(record) or 'none'} are of no known shape; known are {KNOWN}")
        asked = record[pair[0]]
        if is_text("input") and record["input"]:
            asked += "\n\n" + record["input"]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": record[pair[1]]}]
    if shape == "text":
        fail("data shape is text, and this is a chat")
    if is_text("system") and record["system"]:
        turns = [{"role": "system", "content": record["system"]}, *turns]
    if not turns:
        fail("a chat without messages")
    chat = {"messages": [message(turn, f"{where}: message {n}") for n, turn in enumerate(turns, 1)]}
    if isinstance(record.get("tools"), list):
        chat["tools"] = record["tools"]
    return chat


def message(turn, where):
    """One message, whatever its keys -> {"role": a role of the templates, "content": str, "weight": 0 or 1, …}."""
    def fail(what):
        raise ValueError(f"{where}: {what}")
    if not isinstance(turn, dict):
        fail(f"expected an object, got {type(turn).__name__}")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        fail(f"role {role!r} is none of {', '.join(ROLES)}")
    if isinstance(content, list):                                    # of parts: {"type": "text", "text": "…"}
        parts = [part.get("text", part.get("value")) if isinstance(part, dict) else None for part in content]
        if all(isinstance(part, str) for part in parts):
            content = "".join(parts)
    if content is None and turn.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        fail(f"content must be text, got {type(content).__name__}")
    weight = next((turn[k] for k in WEIGHTS if turn.get(k) is not None), 1)
    if weight not in (0, 1):
        fail(f"a weight of {weight!r}: a message is trained (1) or not (0)")
    rest = {k: v for k, v in turn.items() if k not in ("role", "from", "content", "value", *WEIGHTS)}
    return rest | {"role": ROLES[role], "content": content, "weight": int(weight)}


ENDINGS = (".jsonl", ".json", ".txt", ".jsonl.gz", ".json.gz", ".txt.gz", ".parquet")


def find_files(path, key):
    """A file, a folder or a glob -> its files, sorted. Raises ValueError where there is none."""
    if Path(path).is_dir():
        found = [str(f) for f in Path(path).rglob("*") if f.name.endswith(ENDINGS)]
    else:
        found = [path] if Path(path).is_file() else glob.glob(path, recursive=True)
    found = sorted(f for f in found if Path(f).is_file())
    if not found:
        raise ValueError(f"{key}: no file at {path} (a file, a folder or a glob of {', '.join(ENDINGS)})")
    if odd := [f for f in found if not f.endswith(ENDINGS)]:
        raise ValueError(f"{key}: {odd[0]} ends in none of {', '.join(ENDINGS)}")
    return found


def chunks(file, separator, size=1 << 20):
    """A file -> (number of its first record, [raw records], bytes of the file read), about `size` bytes at a time.

    A raw record is a line of .jsonl as bytes (parsed later, on every core), or what a .json or .txt holds.
    """
    name = file.removesuffix(".gz")
    if name.endswith(".parquet"):
        yield from parquet_chunks(file)
        return
    try:
        with (gzip.open if file.endswith(".gz") else open)(file, "rb") as f:
            if name.endswith(".jsonl"):
                first = 1
                while lines := f.readlines(size):
                    yield first, lines, sum(map(len, lines))
                    first += len(lines)
                return
            text = f.read().decode("utf-8-sig")                      # some editors begin a file with a mark
    except UnicodeDecodeError as e:
        raise ValueError(f"{file}: not UTF-8 text (at byte {e.start})") from None
    except (OSError, EOFError, zlib.error) as e:
        raise ValueError(f"{file}: cannot be read ({getattr(e, 'strerror', None) or e})") from None
    if name.endswith(".txt"):
        records = [part for part in (text.split(separator) if separator else [text]) if part.strip()]
    else:
        try:
            records = json.loads(text)
        except ValueError as e:
            raise ValueError(f"{file}: not valid JSON: {e}") from None
        if not isinstance(records, list):
            raise ValueError(f"{file}: expected a list of records, got {type(records).__name__}")
    for first in range(0, len(records), 512):
        part = records[first:first + 512]
        yield first + 1, part, len(text) * len(part) // len(records)


def parquet_chunks(file):
    """chunks() of a .parquet file, by the optional pyarrow."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{file}: reading .parquet needs pyarrow; pip install pyarrow") from None
    try:
        table, first = pyarrow.parquet.ParquetFile(file), 1
        for batch in table.iter_batches(512):
            yield first, batch.to_pylist(), batch.nbytes
            first += len(batch)
    except (OSError, pyarrow.ArrowException) as e:
        raise ValueError(f"{file}: not a .parquet file: {str(e).splitlines()[0]}") from None


def encode_chunk(job):
    """(file, first, raw records) -> (tokens, mask, lengths, counts): the documents of one chunk, end to end."""
    file, first, raw = job
    tok, shape, seq_len = STATE["tok"], STATE["shape"], STATE["seq_len"]
    tokens, masks, lengths, counts = [], [], [], collections.Counter()
    bos, eos = ([tok.special[text]] if text else [] for text in (tok.bos, tok.eos))
    def keep(ids, mask):
        if len(ids) > 1 and mask[1:].any():                          # a document's first token is nobody's target
            tokens.append(ids)
            masks.append(mask)
            lengths.append(len(ids))
        else:
            counts["dropped"] += 1
    for n, record in enumerate(raw, first):
        where = f"{file}, {'line' if isinstance(record, bytes) else 'record'} {n}"
        if isinstance(record, bytes):
            if not record.strip():
                raise ValueError(f"{where}: is empty; a .jsonl file has one JSON object on each line")
            try:
                record = json.loads(record)
            except ValueError as e:
                raise ValueError(f"{where}: not valid JSON: {e}") from None
        record = normal(record, where, shape)
        counts["records"] += 1
        if "text" in record:
            ids = np.concatenate([bos, tok.encode(tok.clean(record["text"])), eos]).astype(np.int64)
            for start in range(0, max(len(ids) - 1, 1), seq_len):    # a window's last target begins the next one
                window = ids[start:start + seq_len + 1]
                keep(window, np.ones(len(window), np.uint8))
            continue
        if STATE["template"] is None:
            STATE["template"] = compile_template(template_text(tok, STATE["cfg"]))
        try:
            ids, mask = encode_chat(tok, STATE["template"], **record)
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from None
        counts["chats"] += 1
        counts["truncated"] += len(ids) > seq_len + 1
        keep(ids[:seq_len + 1], mask[:seq_len + 1])
    tokens, mask = (np.concatenate(parts) if parts else np.zeros(0) for parts in (tokens, masks))
    return tokens.astype(STATE["dtype"]), mask.astype(np.uint8), np.array(lengths, np.int64), counts


STATE = {}                                                           # what encode_chunk needs; forks inherit it


# ---------------------------------------------------------------------------------------------------------------------
# token files

class Tokens:
    """A source's token files: document i is tokens[offsets[i]:offsets[i + 1]], for i from first to last."""

    def __init__(self, folder, first=0, last=None):
        self.folder = Path(folder)
        self.header = read_json(self.folder / "header.json")
        last = self.header["documents"] if last is None else last
        read = lambda name, dtype: np.asarray(np.memmap(self.folder / name, dtype, "r"))    # its slices are cheaper
        self.tokens, self.mask = read("tokens.bin", self.header["dtype"]), read("mask.bin", np.uint8)
        self.offsets = read("offsets.bin", np.int64)[first:last + 1]

    def __len__(self):
        return len(self.offsets) - 1

    def lengths(self, i):
        """Targets and inputs of documents i: one fewer than their tokens."""
        return self.offsets[np.asarray(i) + 1] - self.offsets[np.asarray(i)] - 1

    def document(self, i):
        """(tokens [n], mask [n])"""
        where = slice(self.offsets[i], self.offsets[i + 1])
        return self.tokens[where], self.mask[where]


def tokenize(cfg, name, source, tok, quiet=False):
    """One source -> its folder of token files; made anew only where something it depends on has changed."""
    data = cfg["data"]
    files = find_files(source["path"], f"data.{name}.path")
    stats = [(f, os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in files]
    template = template_text(tok, cfg) if tok.eos or "<|im_end|>" in tok.special else ""
    prints = {"source": digest(stats), "tokenizer": tok.fingerprint, "template": digest(template),
              "options": digest(FORMAT, data["seq_len"], source["shape"], source["separator"])}
    folder = Path(data["cache_dir"]) / f"{name.split('.')[-1]}-{digest(prints)}"
    if (folder / "header.json").is_file():
        return folder

    dtype = np.uint16 if tok.n_vocab <= 1 << 16 else np.uint32
    STATE.update(tok=tok, template=None, shape=source["shape"], seq_len=data["seq_len"], dtype=dtype, cfg=cfg)
    size, counts, offset = sum(s for _, s, _ in stats), collections.Counter(), 0
    building = folder.with_name(f"{folder.name}.building.{os.getpid()}")
    shutil.rmtree(building, ignore_errors=True)
    try:
        building.mkdir(parents=True)
        create = lambda name: open(building / name, "wb")
        with create("tokens.bin") as tokens, create("mask.bin") as masks, create("offsets.bin") as offsets:
            offsets.write(np.zeros(1, np.int64).tobytes())
            for ids, mask, lengths, more in encoded(files, source["separator"], size, data["processes"], quiet, name):
                tokens.write(ids.tobytes())
                masks.write(mask.tobytes())
                offsets.write((offset + np.cumsum(lengths)).tobytes())
                offset += len(ids)
                counts.update(more, documents=len(lengths), trained=int(mask.sum()))
                counts["longest"] = max(counts["longest"], int(lengths.max(initial=0)))
        if not counts["documents"]:
            raise ValueError(f"data.{name}: {source['path']} holds nothing to train on ({counts['records']} records, "
                             f"{counts['dropped']} without a trained token)")
        counted = ("documents", "records", "chats", "trained", "longest", "truncated", "dropped")
        header = {"format": FORMAT, "dtype": np.dtype(dtype).name, "tokens": offset, "fingerprints": prints,
                  "files": files, "vocabulary": tok.n_vocab, **{key: counts[key] for key in counted}}
        (building / "header.json").write_text(json.dumps(header, indent=1) + "\n")
        os.replace(building, folder)
    except OSError as e:
        if not (folder / "header.json").is_file():                   # else another process was faster: the same result
            raise ValueError(f"{folder}: cannot write token files ({e.strerror}); "
                             "data.cache_dir says where they go") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def encoded(files, separator, size, processes, quiet, name):
    """The files' chunks, encoded, in order: on every core where there is much to do, two chunks per core ahead."""
    from tqdm import tqdm
    jobs = ((file, first, raw, n) for file in files for first, raw, n in chunks(file, separator))
    if not processes:
        processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    bar = tqdm(total=size, unit="B", unit_scale=True, desc=f"tokenize {name}", disable=quiet or None, leave=False)
    if size < 4 << 20 or processes == 1:
        with bar:
            for *job, n in jobs:
                yield encode_chunk(job)
                bar.update(n)
        return
    with bar, concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        ahead = collections.deque()
        while True:
            for *job, n in itertools.islice(jobs, 2 * processes - len(ahead)):
                ahead.append((pool.submit(encode_chunk, job), n))
            if not ahead:
                return
            done, n = ahead.popleft()
            if isinstance(e := done.exception(), ValueError):        # from here, configs.run knows it for ours
                raise ValueError(str(e)) from e
            yield done.result()
            bar.update(n)


def need_sources(cfg):
    """The first thing to say where nothing is said. Raises ValueError."""
    if not cfg["data"]["train"]:
        raise ValueError("data.train: no source is named; data.train.NAME.path=FILE names one")


def prepare(cfg, tok=None, quiet=False):
    """cfg -> {"train": {name: Tokens}, "validation": {name: Tokens}}, tokenizing what is not there yet.

    data.validation_split takes the last documents of each training source. Raises ValueError, with file and line, for
    what can't be read.
    """
    need_sources(cfg)
    tok = tok or load_tokenizer(cfg)
    data, out = cfg["data"], {"train": {}, "validation": {}}
    for kind in out:
        for name, source in data[kind].items():
            out[kind][name] = Tokens(tokenize(cfg, f"{kind}.{name}", source, tok, quiet))
    split = data["validation_split"]
    if not split:
        return out
    for name, tokens in out["train"].items():
        held = split if type(split) is int else round(split * len(tokens))
        if not 0 < held < len(tokens):
            raise ValueError(f"data.validation_split: {split} of {name}'s {len(tokens)} documents leaves nothing "
                             f"to {'validate' if held < 1 else 'train'} on")
        if name in out["validation"]:
            raise ValueError(f"data.validation_split: data.validation.{name} is there already; give one of the two")
        kept = len(tokens) - held
        out["train"][name], out["validation"][name] = Tokens(tokens.folder, 0, kept), Tokens(tokens.folder, kept)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# what a person looks at

def summary(name, tokens):
    h = tokens.header
    dropped = f", {h['dropped']:,} dropped (nothing to train on)" if h["dropped"] else ""
    cut = f", {h['truncated']:,} cut off" if h["truncated"] else ""
    return (f"{name}: {len(tokens):,} documents, {int(tokens.offsets[-1] - tokens.offsets[0]):,} tokens"
            f" ({h['trained'] / h['tokens']:.0%} trained), longest {h['longest']:,}{cut}{dropped}")


def colour(tok, ids, mask):
    """The text of a document, its trained part in green, or in [[ ]] where the output knows no colours."""
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ
    on, off = ("[[", "]]") if plain else ("\x1b[32m", "\x1b[0m")
    borders = np.flatnonzero(np.diff(mask)) + 1
    parts = zip(np.split(ids, borders), np.split(mask, borders))
    return "".join(f"{on}{tok.decode(part)}{off}" if m[0] else tok.decode(part) for part, m in parts)


def main(argv):
    show, argv = configs.take(argv, show=0)
    cfg, _, _ = configs.load(argv)
    need_sources(cfg)
    tok = load_tokenizer(cfg)
    for kind, sources in prepare(cfg, tok).items():
        for name, tokens in sources.items():
            print(summary(f"{kind}.{name}", tokens), f"\n  in {tokens.folder}")
            for i in range(min(show["show"], len(tokens))):
                ids, mask = tokens.document(i)
                print(f"\n--- {name} {i}: {len(ids)} tokens, {int(mask.sum())} trained\n{colour(tok, ids, mask)}")


if __name__ == "__main__":
    configs.run(main, sys.argv[1:])
