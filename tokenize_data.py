"""Raw text and chats -> token files on disk.

    python tokenize_data.py configs/ft.yaml              tokenize, and say what came out
    python tokenize_data.py configs/ft.yaml show=3       and print 3 samples, the trained tokens coloured

The way of one record:

    {"messages": [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]}      found by looking at its keys
    <|im_start|>user\\n2 + 3?<|im_end|>\\n<|im_start|>assistant\\n5<|im_end|>\\n                            the chat template's text
     257 117 115 101 114 10 50 32 43 32 51 63 258 10 257 97 115 … 116 10 53 258 10                    its token ids
       0   0   0   0   0  0  0  0  0  0  0  0   0  0   0  0   0 …   0  0  1   1  0                    1: trained

The ids are those of the whole rendered text; the mask never changes them. Special tokens that are spelled inside a
message's content stay text: a user who writes <|im_end|> ends nobody's turn. A text document is BOS + its ids + EOS,
all trained, cut into windows of data.seq_len targets.

A source becomes a folder in data.cache_dir, named by a fingerprint of everything it depends on:

    tokens.bin     uint16 or uint32, one document after the other
    mask.bin       uint8 per token, 1 where it is trained
    offsets.bin    int64, where document i begins; one more than there are documents
    header.json    format, dtype, counts, fingerprints; written last
"""
import collections, concurrent.futures, glob, gzip, hashlib, json, multiprocessing, os, re, shutil, sys, unicodedata
from datetime import datetime
from pathlib import Path

import numpy as np
import tiktoken.load

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
        if missing:                                                  # tiktoken would take the process down when it meets one
            raise ValueError(f"tokenizer: its vocabulary lacks {len(missing)} of the 256 single bytes (the first is {missing[0]})")
        for name in ("bos", "eos"):
            if getattr(self, name) and getattr(self, name) not in special:
                raise ValueError(f"tokenizer: {name}_token {getattr(self, name)!r} is none of its special tokens: {', '.join(special) or 'it has none'}")
        self.enc = tiktoken.Encoding("ours", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        self.n_vocab = 1 + max(max(ranks.values()), *special.values()) if special else 1 + max(ranks.values())
        self.lengths = np.zeros(self.n_vocab, np.int64)              # bytes of each token
        self.lengths[list(ranks.values())] = [len(b) for b in ranks]
        self.lengths[list(special.values())] = [len(s.encode()) for s in special]
        self.byte_ids = np.array([ranks[bytes([b])] for b in range(256)], np.int64) if len(ranks) == 256 else None
        self.special_pattern = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
        self.fingerprint = digest(pattern, sorted(special.items()), bos, eos, nfc, sorted((i, b.hex()) for b, i in ranks.items()))

    def spans(self, text):
        """str -> (ids [n], where each ends in bytes of the text [n])"""
        ids = self.encode(text)
        return ids, np.cumsum(self.lengths[ids])

    def encode(self, text):
        """str -> [n] int64 ids. Special tokens that are spelled in it are text. Lone surrogates become U+FFFD."""
        if self.byte_ids is not None:                                # nothing to merge
            return self.byte_ids[np.frombuffer(text.encode(), np.uint8)]
        return np.array(self.enc.encode_ordinary(text), np.int64)

    def decode(self, ids):
        """ids -> str; an id without a token is left out, broken UTF-8 becomes U+FFFD."""
        known = [int(i) for i in ids if 0 <= i < self.n_vocab and self.lengths[i]]
        return b"".join(self.enc.decode_tokens_bytes(known)).decode("utf-8", errors="replace")

    def clean(self, text):
        """What can't be UTF-8 replaced, and composed where the tokenizer asks for it."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if not text.isascii() else text
        return unicodedata.normalize("NFC", text) if self.nfc else text


class Borrowed:
    """A tokenizer.json that tiktoken can't hold, run by the optional tokenizers package: the same methods, slower."""

    def __init__(self, path, special, bos, eos, template):
        import tokenizers
        self.enc, self.special, self.bos, self.eos, self.template = tokenizers.Tokenizer.from_file(str(path)), special, bos, eos, template
        self.enc.encode_special_tokens = True                        # what spells a special token in a text is text
        self.nfc, self.folder, self.byte_ids, self.n_vocab = False, path.parent, None, self.enc.get_vocab_size()
        self.special_pattern = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
        self.fingerprint = digest(hashlib.sha256(path.read_bytes()).hexdigest(), bos, eos)

    clean = lambda self, text: Tokenizer.clean(self, text)

    def spans(self, text):
        encoded = self.enc.encode(text, add_special_tokens=False)
        at = np.cumsum([0, *(len(c.encode()) for c in text)])        # characters -> bytes
        return np.array(encoded.ids, np.int64), at[[end for _, end in encoded.offsets]] if encoded.ids else np.zeros(0, np.int64)

    def encode(self, text):
        return self.spans(text)[0]

    def decode(self, ids):
        return self.enc.decode([int(i) for i in ids], skip_special_tokens=False)


def digest(*things):
    return hashlib.sha256(json.dumps(things, default=str).encode()).hexdigest()[:16]


GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BYTES_SPECIAL = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}


def load_tokenizer(cfg):
    """data.tokenizer, or model.init_from's where that is empty -> Tokenizer. Raises ValueError."""
    data = cfg["data"]
    name = data["tokenizer"] or cfg["model"]["init_from"]
    if not name:
        raise ValueError("data.tokenizer: none is given, and there is no model.init_from to take it from; bytes always works")
    path = Path(name)
    if name == "bytes":
        tok = bytes_tokenizer()
    elif name.endswith(".tiktoken"):
        tok = tiktoken_file(path, data["tokenizer_pattern"], data["special_tokens"])
    elif path.exists():
        tok = huggingface_tokenizer(path)
    elif name in tiktoken.list_encoding_names():
        enc = tiktoken.get_encoding(name)
        tok = Tokenizer(enc._mergeable_ranks, enc._pat_str, enc._special_tokens, eos="<|endoftext|>")
    else:
        raise ValueError(f"data.tokenizer: {name} is no file or folder, and none of bytes, {', '.join(tiktoken.list_encoding_names())}")
    for key in ("bos_token", "eos_token"):
        if data[key] is not None:
            if data[key] and data[key] not in tok.special:
                raise ValueError(f"data.{key}: {data[key]!r} is no special token of {name}; it has {', '.join(tok.special) or 'none'}")
            setattr(tok, key[:3], data[key] or None)
            tok.fingerprint = digest(tok.fingerprint, key, data[key])
    return tok


def bytes_tokenizer():
    """Every byte is a token; <|endoftext|> borders text documents, <|im_start|> and <|im_end|> border turns."""
    return Tokenizer({bytes([b]): b for b in range(256)}, r"[\s\S]", BYTES_SPECIAL, "<|endoftext|>", "<|endoftext|>")


def tiktoken_file(path, pattern, special):
    """A file of `base64(token) rank` lines -> Tokenizer. It needs its pattern said: the file doesn't hold one."""
    if not pattern:
        raise ValueError(f"data.tokenizer_pattern: {path} needs the regular expression its tokenizer splits text with")
    try:
        ranks = tiktoken.load.load_tiktoken_bpe(str(path))
    except (OSError, ValueError) as e:
        raise ValueError(f"{path}: not a .tiktoken file: {e}") from None
    for text, i in special.items():
        if type(i) is not int or i in ranks.values():
            raise ValueError(f"data.special_tokens.{text}: expected an id that no other token has, got {i!r}")
    return Tokenizer(ranks, pattern, special)


def byte_letters():
    """GPT-2's spelling of bytes as printable letters -> {letter: byte}. What isn't printable is moved up to U+0100."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in keep]
    return {chr(b): b for b in keep} | {chr(256 + n): b for n, b in enumerate(rest)}


def huggingface_tokenizer(path):
    """A byte-level BPE tokenizer.json (or its folder) -> Tokenizer. What can't be carried over exactly is refused, by name."""
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a tokenizer's folder must hold a tokenizer.json")
    spec, beside = read_json(path), path.parent / "tokenizer_config.json"
    config = read_json(beside) if beside.is_file() else {}

    named = lambda key: (v.get("content") if isinstance(v := config.get(key), dict) else v) or None
    template = config.get("chat_template")
    if isinstance(template, list):                                   # several, by name
        template = {t["name"]: t["template"] for t in template}.get("default")
    if (path.parent / "chat_template.jinja").is_file():
        template = (path.parent / "chat_template.jinja").read_text(encoding="utf-8")
    special = {t["content"]: t["id"] for t in spec.get("added_tokens", [])}
    bos, eos = (named(key) if named(key) in special else None for key in ("bos_token", "eos_token"))
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
    raise ValueError(f"{path}: {what} cannot be carried over exactly; supported are byte-level BPE tokenizers (GPT-2, Llama 3, Qwen kinds)")


def byte_level(path, spec, special):
    """A byte-level BPE tokenizer.json -> (ranks, pattern, nfc). Raises ValueError for what tiktoken would do otherwise."""
    bpe = spec.get("model", {})
    if bpe.get("type", "BPE") != "BPE" or bpe.get("byte_fallback") or "merges" not in bpe:
        refuse(path, f"a {bpe.get('type')} model{' with byte fallback' if bpe.get('byte_fallback') else ''}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if bpe.get(key):
            refuse(path, f"model.{key}")
    normalizer = (spec.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        refuse(path, f"the normalizer {normalizer}")
    steps = (pre := spec.get("pre_tokenizer") or {}).get("pretokenizers", [pre])
    if steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space") or len(steps) > 2:
        refuse(path, f"the pre-tokenizer {' + '.join(str(s.get('type')) for s in steps)}{' with a prefix space' if steps[-1].get('add_prefix_space') else ''}")
    pattern = GPT2_PATTERN if steps[-1].get("use_regex", True) else r"[\s\S]+"
    if len(steps) == 2:
        if steps[0].get("type") != "Split" or "Regex" not in steps[0]["pattern"] or steps[0]["behavior"] != "Isolated" or steps[-1].get("use_regex", True):
            refuse(path, f"the pre-tokenizer {steps[0].get('type')} before ByteLevel")
        pattern = steps[0]["pattern"]["Regex"]

    if bad := [t["content"] for t in spec.get("added_tokens", []) if not t["special"] and (t["lstrip"] or t["rstrip"] or t["single_word"] or t["normalized"])]:
        refuse(path, f"the added token {bad[0]!r}, which is no control token,")
    letters = byte_letters()
    try:
        return {bytes(letters[c] for c in token): i for token, i in bpe["vocab"].items() if token not in special}, pattern, normalizer == "NFC"
    except KeyError as e:
        refuse(path, f"a vocabulary with the letter {e}")


NASTY = ("", " ", "a", "Hello, world! I'll we'd they're DON'T", "  two  spaces   three    four", "tab\tnew\nline\r\n\r\n\n  end  ", "naïve café Ünïcödé",
         "1234567890 3.14 1,000,000 ½ ٣", "日本語と中文，한국어", "עברית العربية", "👩‍👩‍👧 🏳️‍🌈 🤖", "\x00\x01\x7f\x1b[0m", "_under_score__ --flag=value // /* x */",
         "aaaaaaaaaaaaaaaaaaaaaaaaa", "\u200b\u00a0\u3000\ufeff", "e\u0301 o\u0308", " \n \n\n\t x", "<|endoftext|> <|im_end|>", "if (x==1) {\n    return y;\n}")


def prove(tok, bpe, path):
    """Hold the tiktoken encoding against merging by the list of merges itself, on strings that tend to go wrong."""
    import regex                                                     # tiktoken brings it
    letters = {b: c for c, b in byte_letters().items()}
    order = {tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m): n for n, m in enumerate(bpe["merges"])}
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


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ValueError(f"{path}: not valid JSON: {e}") from None


def save_tokenizer(tok, folder, template_text):
    """Write what transformers needs to load the tokenizer: its own files where it came with some, else new ones. bytes, in full."""
    folder = Path(folder)
    if tok.folder:
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json", "merges.txt"):
            if (tok.folder / name).is_file() and (tok.folder / name).resolve() != (folder / name).resolve():
                shutil.copyfile(tok.folder / name, folder / name)
    elif tok.byte_ids is not None:                                   # no merges: a vocabulary of letters is all of it
        letters = {b: c for c, b in byte_letters().items()}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        spec = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": level, "post_processor": None, "decoder": level,
                "added_tokens": [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
                                 for t, i in tok.special.items()],
                "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                          "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                          "vocab": {letters[b[0]]: i for b, i in tok.ranks.items()}, "merges": []}}
        (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    else:
        return
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {key: value for key, value in (("bos_token", tok.bos), ("eos_token", tok.eos)) if value and key not in config}
    if template_text and not tok.template:
        config["chat_template"] = template_text
    path.write_text(json.dumps(config, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# chats: a template's text, where each content stands in it, and which tokens are trained

CHATML = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
PLAIN = ("{% for message in messages %}{{ message.role }}:\n{{ message.content }}{{ eos_token }}\n{% endfor %}"
         "{% if add_generation_prompt %}assistant:\n{% endif %}")      # for vocabularies without ChatML's two tokens
OPEN, CLOSE, BEGIN, END = "\U000f0000", "\U000f0001", "\U000f0002", "\U000f0003"    # private characters: marks that no template touches


def template_text(tok, cfg):
    """The jinja text of data.chat_template."""
    name = cfg["data"]["chat_template"]
    if name not in ("", "chatml"):
        try:
            return Path(name).read_text(encoding="utf-8")
        except OSError as e:
            raise ValueError(f"data.chat_template: {name} is neither chatml nor a readable file ({e.strerror})") from None
    if tok.template and not name:
        return tok.template
    if "<|im_end|>" in tok.special:
        return CHATML
    if not tok.eos:
        raise ValueError("data.eos_token: chats need a token that ends a turn; this tokenizer has neither <|im_end|> nor an EOS")
    return PLAIN


def compile_template(text):
    """jinja text -> a compiled template, in jinja2's sandbox, with the names that chat templates rely on."""
    import jinja2, jinja2.ext, jinja2.sandbox

    class Generation(jinja2.ext.Extension):                          # {% generation %} … {% endgeneration %}: the trained part, marked
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

        def mark(self, caller):
            return BEGIN + caller() + END

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    env.filters["tojson"] = lambda x, indent=None, **kw: json.dumps(x, ensure_ascii=False, indent=indent, **kw)   # jinja's own escapes for HTML
    env.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: datetime.now().strftime(form)}
    try:
        return env.from_string(text)
    except jinja2.TemplateSyntaxError as e:
        raise ValueError(f"the chat template's line {e.lineno}: {e.message}") from None


def render(template, tok, messages, prompt=False, **more):
    """Messages -> text. `prompt`: with the opening of an assistant's turn, as for generation."""
    import jinja2
    try:
        return template.render(messages=messages, add_generation_prompt=prompt, bos_token=tok.bos or "", eos_token=tok.eos or "", **more)
    except (jinja2.TemplateError, TypeError) as e:
        raise ValueError(f"the chat template refuses these messages: {e}") from None


def contents(template, tok, messages, text, **more):
    """Where the messages' contents stand in the rendered text -> [(start, end, message's index)], ascending.

    Rendered once more with a mark for each content, the template shows what it writes between them. Where that isn't
    what stands between the real contents (a template that looks into them), each content is found by exchanging it alone.
    """
    mark = lambda i: f"{OPEN}{i}{CLOSE}"
    marked = render(template, tok, [m | {"content": mark(i)} if m.get("content") else m for i, m in enumerate(messages)], **more)
    first, *rest = re.split(f"{OPEN}(\\d+){CLOSE}", marked.replace(BEGIN, "").replace(END, ""))
    found, at = [], len(first) if text.startswith(first) else None
    for index, between in zip(map(int, rest[::2]), rest[1::2]):
        whole = messages[index]["content"]
        forms = [c for c in (whole, whole.strip(), whole.lstrip(), whole.rstrip()) if at is not None and text.startswith(c + between, at)]
        at = at + len(forms[0] + between) if forms else None
        if at is None:
            break
        found.append((at - len(forms[0] + between), at - len(between), index))
    if at == len(text):
        return found

    found = []
    for i, m in enumerate(messages):
        other = render(template, tok, [*messages[:i], m | {"content": mark(i)}, *messages[i + 1:]], **more).replace(BEGIN, "").replace(END, "")
        if m.get("content") and other != text:
            start = len(os.path.commonprefix([text, other]))
            end = len(text) - len(os.path.commonprefix([text[start:][::-1], other[start:][::-1]]))
            found.append((start, end, i))
    return sorted(found)


def encode_chat(tok, template, messages, **more):
    """Messages -> (ids [n] int64, mask [n] uint8). Trained are the assistant's contents, each with the token that ends its turn.

    A template with {% generation %} marks says itself what is trained. Raises ValueError where the template refuses.
    """
    messages = [m | {"content": tok.clean(m["content"])} if m.get("content") else m for m in messages]
    marked = render(template, tok, messages, **more)
    text = marked.replace(BEGIN, "").replace(END, "")
    where = contents(template, tok, messages, text, **more)
    trained, held = [], [(start, end) for start, end, _ in where]
    if BEGIN in marked:
        parts = re.split(f"[{BEGIN}{END}]", marked)                  # outside, inside, outside, …
        ends = np.cumsum([len(p) for p in parts])
        trained = list(zip(ends[0::2], ends[1::2]))
    else:
        for start, end, i in where:
            if messages[i]["role"] == "assistant" and messages[i].get("weight", 1):
                after = re.compile(r"\s*(?:" + tok.special_pattern.pattern + ")").match(text, end)
                trained.append((start, after.end() if after else end))

    ids, ends = encode_held(tok, text, held)
    mask = np.zeros(len(ids), np.uint8)
    for start, end in trained:
        start, end = len(text[:start].encode()), len(text[:end].encode())
        if end > start:                                              # a token that overlaps the span is trained
            mask[np.searchsorted(ends, start, "right"):np.searchsorted(ends, end, "left") + 1] = 1
    return ids, mask


def encode_held(tok, text, held):
    """Text -> (ids, where each ends in bytes). Special tokens are control tokens, save those spelled in the `held` spans."""
    ids, ends, at, before = [], [], 0, 0
    def add(new, their_ends, upto):
        nonlocal at, before
        ids.append(new)
        ends.append(np.asarray(their_ends) + before)
        before += len(text[at:upto].encode())
        at = upto
    for special in tok.special_pattern.finditer(text):
        if not any(start < special.end() and special.start() < end for start, end in held):
            add(*tok.spans(text[at:special.start()]), special.start())
            add([tok.special[special[0]]], [len(special[0].encode())], special.end())
    add(*tok.spans(text[at:]), len(text))
    return np.concatenate(ids).astype(np.int64), np.concatenate(ends).astype(np.int64)


def encode_prompt(tok, template, messages):
    """Messages -> the ids of the text that asks for an assistant's answer, as a list."""
    messages = [m | {"content": tok.clean(m["content"])} for m in messages]
    text = render(template, tok, messages, prompt=True).replace(BEGIN, "").replace(END, "")
    held = [(start, end) for start, end, _ in contents(template, tok, messages, text, prompt=True)]
    return encode_held(tok, text, held)[0].tolist()


def turn_end(tok, template):
    """The ids that end an assistant's turn: what generation stops at."""
    ids, mask = encode_chat(tok, template, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    last = int(ids[np.flatnonzero(mask)[-1]]) if mask.any() else -1
    return sorted({i for i in (last, tok.special.get(tok.eos, -1)) if i in tok.special.values()})


# ---------------------------------------------------------------------------------------------------------------------
# records: what people's files hold, as {"text": …} or {"messages": […]}

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system", "tool": "tool", "bot": "assistant",
         "model": "assistant", "chatgpt": "assistant", "function_call": "assistant", "observation": "tool", "function_response": "tool", "developer": "system"}
ASKED = (("instruction", "output"), ("instruction", "response"), ("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("query", "response"))
KNOWN = "messages, conversations, text, " + ", ".join(" + ".join(pair) for pair in ASKED)


def normal(record, where, shape="auto"):
    """One record, whatever its keys -> {"text": str} or {"messages": [{"role", "content", …}], …}. `where` names it in errors."""
    def fail(what):
        raise ValueError(f"{where}: {what}")
    if isinstance(record, str):
        record = {"text": record}
    if not isinstance(record, dict):
        fail(f"expected an object or a string, got {type(record).__name__}; known shapes are {KNOWN}")
    if isinstance(record.get("text"), str) and shape != "chat" and not any(k in record for k in ("messages", "conversations")):
        return {"text": record["text"]}
    turns = next((record[k] for k in ("messages", "conversations") if isinstance(record.get(k), list)), None)
    if turns is None:
        pair = next((p for p in ASKED if all(isinstance(record.get(k), str) for k in p)), None)
        if pair is None:
            fail(f"keys {', '.join(map(str, record)) or 'none'} are of no known shape; known are {KNOWN}")
        asked = record[pair[0]] + ("\n\n" + record["input"] if isinstance(record.get("input"), str) and record["input"] else "")
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": record[pair[1]]}]
    if isinstance(record.get("system"), str) and record["system"]:
        turns = [{"role": "system", "content": record["system"]}, *turns]
    if not turns:
        fail("a chat without messages")
    messages = []
    for n, turn in enumerate(turns):
        if not isinstance(turn, dict):
            fail(f"message {n + 1}: expected an object, got {type(turn).__name__}")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if role not in ROLES:
            fail(f"message {n + 1}: role {role!r} is none of {', '.join(ROLES)}")
        if isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text", part.get("value")), str) for part in content):
            content = "".join(part.get("text", part.get("value")) for part in content)
        if not isinstance(content, str):
            if content is not None or not turn.get("tool_calls"):
                fail(f"message {n + 1}: content must be text, got {type(content).__name__}")
            content = ""
        weight = next((turn[k] for k in ("weight", "loss_weight", "train") if turn.get(k) is not None), 1)
        if weight not in (0, 1):
            fail(f"message {n + 1}: a weight of {weight!r}: a message is trained (1) or not (0)")
        keep = {k: v for k, v in turn.items() if k not in ("role", "from", "content", "value", "weight", "loss_weight", "train")}
        messages.append(keep | {"role": ROLES[role], "content": content, "weight": int(weight)})
    return {"messages": messages} | ({"tools": record["tools"]} if isinstance(record.get("tools"), list) else {})


ENDINGS = (".jsonl", ".json", ".txt", ".jsonl.gz", ".json.gz", ".txt.gz")


def find_files(path, key):
    """A file, a folder or a glob -> its files, sorted. Raises ValueError where there is none."""
    if Path(path).is_dir():
        found = sorted(str(f) for f in Path(path).rglob("*") if f.name.endswith(ENDINGS))
    else:
        found = [path] if Path(path).is_file() else sorted(glob.glob(path, recursive=True))
    if not found:
        raise ValueError(f"{key}: no file at {path} (a file, a folder or a glob of {', '.join(ENDINGS)})")
    if odd := [f for f in found if not f.endswith(ENDINGS)]:
        raise ValueError(f"{key}: {odd[0]} ends in none of {', '.join(ENDINGS)}")
    return found


def chunks(file, separator, size=1 << 20):
    """A file -> (number of its first record, [raw records], bytes of the file read), about `size` bytes at a time.

    A raw record is a line of .jsonl as bytes (parsed later, on every core), or what a .json or .txt holds.
    """
    with (gzip.open if file.endswith(".gz") else open)(file, "rb") as f:
        name = file.removesuffix(".gz")
        if name.endswith(".jsonl"):
            first = 1
            while lines := f.readlines(size):
                yield first, lines, sum(map(len, lines))
                first += len(lines)
            return
        try:
            text = f.read().decode("utf-8")
        except UnicodeDecodeError as e:
            raise ValueError(f"{file}: not UTF-8 text (at byte {e.start})") from None
    if name.endswith(".txt"):
        records = [part for part in text.split(separator) if part.strip()] if separator else [text]
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


def encode_chunk(job):
    """(file, first, raw records) -> (tokens, mask, lengths, counts): the documents of one chunk, one after the other."""
    file, first, raw = job
    tok, template, shape, seq_len = STATE["tok"], STATE["template"], STATE["shape"], STATE["seq_len"]
    tokens, masks, lengths, counts = [], [], [], collections.Counter()
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
            if shape == "chat":
                raise ValueError(f"{where}: data shape is chat, and this is text")
            bos, eos = ([tok.special[t]] if t else [] for t in (tok.bos, tok.eos))
            ids = np.concatenate([bos, tok.encode(tok.clean(record["text"])), eos]).astype(np.int64)
            for start in range(0, max(len(ids) - 1, 1), seq_len):    # a window's last target is the next one's first token
                keep(ids[start:start + seq_len + 1], np.ones(min(seq_len + 1, len(ids) - start), np.uint8))
        else:
            if shape == "text":
                raise ValueError(f"{where}: data shape is text, and this is a chat")
            if template is None:
                template = STATE["template"] = compile_template(template_text(tok, STATE["cfg"]))
            try:
                ids, mask = encode_chat(tok, template, **record)
            except ValueError as e:
                raise ValueError(f"{where}: {e}") from None
            counts["chats"] += 1
            counts["truncated"] += len(ids) > seq_len + 1
            keep(ids[:seq_len + 1], mask[:seq_len + 1])
    joined = (np.concatenate(parts) if parts else np.zeros(0) for parts in (tokens, masks))
    return next(joined).astype(STATE["dtype"]), next(joined).astype(np.uint8), np.array(lengths, np.int64), counts


STATE = {}                                                           # what encode_chunk needs; forked processes inherit it


# ---------------------------------------------------------------------------------------------------------------------
# token files

class Tokens:
    """A source's token files: document i is tokens[offsets[i]:offsets[i + 1]], for i from first to last."""

    def __init__(self, folder, first=0, last=None):
        self.folder, self.header = Path(folder), read_json(Path(folder) / "header.json")
        read = lambda name, dtype: np.memmap(self.folder / name, dtype, "r") if (self.folder / name).stat().st_size else np.zeros(0, dtype)
        self.tokens, self.mask = read("tokens.bin", self.header["dtype"]), read("mask.bin", np.uint8)
        self.offsets = read("offsets.bin", np.int64)
        last = self.header["documents"] if last is None else last
        self.offsets = self.offsets[first:last + 1]

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
    building.mkdir(parents=True)
    try:
        with open(building / "tokens.bin", "wb") as tokens, open(building / "mask.bin", "wb") as masks, open(building / "offsets.bin", "wb") as offsets:
            offsets.write(np.zeros(1, np.int64).tobytes())
            for ids, mask, lengths, more in encoded(files, source["separator"], size, data["processes"], quiet, name):
                tokens.write(ids.tobytes())
                masks.write(mask.tobytes())
                ends = offset + np.cumsum(lengths)
                offsets.write(ends.astype(np.int64).tobytes())
                offset = int(ends[-1]) if len(ends) else offset
                counts.update(more, documents=len(lengths), trained=int(mask.sum()), longest=0)
                counts["longest"] = max(counts["longest"], int(lengths.max(initial=0)))
        if not counts["documents"]:
            raise ValueError(f"data.{name}: {source['path']} holds nothing to train on ({counts['records']} records, {counts['dropped']} without a trained token)")
        header = {"format": FORMAT, "dtype": np.dtype(dtype).name, "tokens": offset, "fingerprints": prints, "files": files, "vocabulary": tok.n_vocab,
                  **{key: counts[key] for key in ("documents", "records", "chats", "trained", "longest", "truncated", "dropped")}}
        (building / "header.json").write_text(json.dumps(header, indent=1) + "\n")
        os.replace(building, folder)
    except OSError as e:
        if not (folder / "header.json").is_file():                   # else another process was faster, with the same result
            raise ValueError(f"{folder}: cannot write token files: {e.strerror}") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def encoded(files, separator, size, processes, quiet, name):
    """The files' chunks, encoded, in order: on every core where there is much to do, at most two chunks per core ahead."""
    from tqdm import tqdm
    jobs = ((file, first, raw, n) for file in files for first, raw, n in chunks(file, separator))
    processes = processes or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else processes or os.cpu_count()
    bar = tqdm(total=size, unit="B", unit_scale=True, desc=f"tokenize {name}", disable=quiet or None, leave=False)
    with bar:
        if size < 4 << 20 or processes == 1:
            for *job, n in jobs:
                yield encode_chunk(job)
                bar.update(n)
            return
        with concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
            ahead = collections.deque()
            for *job, n in jobs:
                ahead.append((pool.submit(encode_chunk, job), n))
                while len(ahead) >= 2 * processes:
                    done, n = ahead.popleft()
                    yield done.result()
                    bar.update(n)
            for done, n in ahead:
                yield done.result()
                bar.update(n)


def prepare(cfg, tok=None, quiet=False):
    """cfg -> {"train": {name: Tokens}, "validation": {name: Tokens}}, tokenizing what is not there yet.

    data.validation_split takes the last documents of each training source. Raises ValueError, with file and line, for what can't be read.
    """
    tok = tok or load_tokenizer(cfg)
    data, out = cfg["data"], {"train": {}, "validation": {}}
    if not data["train"]:
        raise ValueError("data.train: no source is named; data.train.NAME.path=FILE names one")
    for kind in out:
        for name, source in data[kind].items():
            out[kind][name] = Tokens(tokenize(cfg, f"{kind}.{name}", source, tok, quiet))
    split = data["validation_split"]
    for name, tokens in list(out["train"].items()) if split else ():
        held = split if type(split) is int else round(split * len(tokens))
        if not 0 < held < len(tokens):
            raise ValueError(f"data.validation_split: {split} of {name}'s {len(tokens)} documents leaves nothing to {'validate' if held < 1 else 'train'} on")
        if name in out["validation"]:
            raise ValueError(f"data.validation_split: data.validation.{name} is there already; give one of the two")
        out["train"][name] = Tokens(tokens.folder, 0, len(tokens) - held)
        out["validation"][name] = Tokens(tokens.folder, len(tokens) - held, len(tokens))
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
    tok = load_tokenizer(cfg)
    for kind, sources in prepare(cfg, tok).items():
        for name, tokens in sources.items():
            print(summary(f"{kind}.{name}", tokens), f"\n  in {tokens.folder}")
            for i in range(min(show["show"], len(tokens))):
                ids, mask = tokens.document(i)
                print(f"\n--- {name} {i}: {len(ids)} tokens, {int(mask.sum())} trained\n{colour(tok, ids, mask)}")


if __name__ == "__main__":
    configs.run(main, sys.argv[1:])
