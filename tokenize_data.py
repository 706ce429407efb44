"""Raw text and chats -> token files on disk.

    python tokenize_data.py configs/ft.yaml              tokenize, and say what came out
    python tokenize_data.py configs/ft.yaml show=3       and print 3 samples, the trained tokens coloured
    python tokenize_data.py configs/ft.yaml show=1 ids=true      and each of their tokens with its id

The way of one record:

    {"messages": [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]}  found by its keys
    <|im_start|>user\\n2 + 3?<|im_end|>\\n<|im_start|>assistant\\n5<|im_end|>\\n                    the template's text
     257 117 115 101 114 10 50 32 43 32 51 63 258 10 257 97 115 … 116 10 53 258 10                its token ids
       0   0   0   0   0  0  0  0  0  0  0  0   0  0   0  0   0 …   0  0  1   1  0                1: trained

The ids are those of the whole rendered text; the mask never changes them. Special tokens that are spelled inside a
message stay text: a user who writes <|im_end|> ends nobody's turn. A text document is BOS + its ids + EOS, all trained,
cut into windows of data.seq_len targets.

A source becomes a folder in data.cache_dir, named by a fingerprint of everything it depends on:

    tokens.bin     uint16 or uint32, one document after the other
    mask.bin       uint8 per token, 1 where it is trained
    offsets.bin    int64, where document i begins; one more than there are documents
    targets.bin    uint32, how many tokens of document i have a loss: those that are trained, but not a first token
    header.json    format, dtype, counts, fingerprints; written last
"""
import base64, codecs, collections, concurrent.futures, contextlib, dataclasses, functools, glob, gzip, hashlib
import itertools, json, multiprocessing, os, re, shutil, sys, unicodedata, zlib
from datetime import datetime
from pathlib import Path

import numpy as np
import tiktoken

import configs

FORMAT = 3


class naming:
    """with naming(place): such an error inside becomes a UserError of one line that begins with the place."""

    def __init__(self, place, errors=(configs.UserError, RecursionError), what=""):
        self.place, self.errors, self.what = place, errors, what

    def __enter__(self):
        pass                                                         # contextlib's generators take three times as long

    def __exit__(self, kind, error, trace):
        if isinstance(error, self.errors):
            raise configs.UserError(f"{self.place}: {self.what}{one_line(error)}") from None


def one_line(error):
    said = repr(error) if isinstance(error, KeyError) else getattr(error, "strerror", None) or str(error)
    text = " ".join(said.split()) or type(error).__name__
    return text if len(text) < 600 else f"{text[:300]} … {text[-200:]}"


def read_text(path):
    with naming(path, (OSError, UnicodeDecodeError), "cannot be read as UTF-8 text: "):
        return Path(path).read_text(encoding="utf-8")


def read_json(path):
    """A file that holds one JSON object -> dict. Raises ValueError."""
    text = read_text(path)
    with naming(path, (ValueError, RecursionError), "not a JSON object: "):
        d = json.loads(text)
        if not isinstance(d, dict):
            raise configs.UserError(f"it is a {type(d).__name__}")
    return d


def digest(*things):
    return hashlib.sha256(json.dumps(things, default=str).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# records in: what people's files hold, as {"text": …} or {"messages": […]}
# Shapes are found by their keys, so that nobody writes a line to convert a file. Files are read in chunks of about
# BLOCK bytes, which bounds the memory and is what the cores share; a chunk is parsed where it is encoded.

ROLES = {"user": "user", "human": "user", "system": "system", "developer": "system", "assistant": "assistant",
         "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant", "tool": "tool",
         "function_call": "assistant", "observation": "tool", "function_response": "tool"}
ASKED = (("instruction", "output"), ("instruction", "response"), ("prompt", "completion"), ("prompt", "response"),
         ("question", "answer"), ("query", "response"))
TURNS, WEIGHTS = ("messages", "conversations"), ("weight", "loss_weight", "train")
KNOWN = "messages, conversations, text, " + ", ".join(" + ".join(pair) for pair in ASKED)
MESSAGE = ("role", "from", "content", "value", *WEIGHTS)             # keys of a message that ours replace
MORE = ("tool_calls", "reasoning_content")                           # what an answer may hold besides content
KINDS = {"content": (str, "text"), "tool_calls": (list, "a list of objects"), "reasoning_content": (str, "text")}
ENDINGS = (".jsonl", ".json", ".txt", ".jsonl.gz", ".json.gz", ".txt.gz", ".parquet", ".npy")
BLOCK = 1 << 18                                                      # bytes of a file in one job
STATE = {}                                                           # what the jobs need; forks inherit it


def normal(record, where, shape="auto"):
    """One record, as JSON or read -> {"text": str}, or {"messages": [{"role", "content", …}], …}; or ValueError."""
    with naming(where):
        if isinstance(record, bytes):
            if not record.strip():
                raise configs.UserError("is empty; a .jsonl file has one JSON object on each line")
            with naming("not valid JSON", (ValueError, RecursionError)):
                record = json.loads(record)
        if isinstance(record, str):
            record = {"text": record}
        if not isinstance(record, dict):
            raise configs.UserError(f"expected an object or a string, got {type(record).__name__}; known shapes are {KNOWN}")
        is_text = lambda key: isinstance(record.get(key), str)
        if is_text("text") and (shape == "text" or shape == "auto" and not any(key in record for key in TURNS)):
            return {"text": record["text"]}
        turns = next((record[key] for key in TURNS if isinstance(record.get(key), list)), None)
        if turns is None:
            pair = next((pair for pair in ASKED if all(map(is_text, pair))), None)
            if pair is None and is_text("text"):
                raise configs.UserError("data shape is chat, and this is text")
            if pair is None:
                raise configs.UserError(f"keys {', '.join(record) or 'none'} are of no known shape; known are {KNOWN}")
            asked, answer = (record[key] for key in pair)
            asked += f"\n\n{record['input']}" if is_text("input") and record["input"] else ""
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        if shape == "text":
            raise configs.UserError("data shape is text, and this is a chat")
        if is_text("system") and record["system"]:
            turns = [{"role": "system", "content": record["system"]}, *turns]
        if not turns:
            raise configs.UserError("a chat without messages")
        messages, tools = [], record.get("tools")
        for n, turn in enumerate(turns, 1):
            with naming(f"message {n}"):
                messages.append(message(turn, n))
        if isinstance(tools, str):
            with naming("tools is no JSON", (ValueError, RecursionError)):
                tools = json.loads(tools.strip() or "[]")
        if tools and not isinstance(tools, list):
            raise configs.UserError(f"tools must be a list, got {type(tools).__name__}")
        return {"messages": messages} | ({"tools": tools} if tools else {})


def message(turn, n):
    """Message n, whatever its keys -> {"role": a role of the templates, "content": str, "weight": 0 or 1, …}."""
    if not isinstance(turn, dict):
        raise configs.UserError(f"expected an object, got {type(turn).__name__}")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        raise configs.UserError(f"role {role!r} is none of {', '.join(ROLES)}")
    rest = {key: v for key, v in turn.items() if key not in MESSAGE and (v if key in MORE else v is not None)}
    if role == "function_call":                                      # its content is one call, or a list of them
        with naming("a function_call must be JSON with a name and arguments", (ValueError, KeyError, TypeError)):
            calls = json.loads(content) if isinstance(content, str) else content
            calls = [{k: c[k] for k in ("name", "arguments")} for c in (calls if isinstance(calls, list) else [calls])]
        rest["tool_calls"] = [{"type": "function", "id": f"call{n:05}", "function": call} for call in calls]
        content = None
    if role in ("observation", "function_response"):
        rest.setdefault("tool_call_id", f"call{n - 1:05}")           # some templates insist on one
    if isinstance(content, list):                                    # of parts: {"type": "text", "text": "…"}
        parts = [part.get("text", part.get("value")) if isinstance(part, dict) else part for part in content]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else content
    rest["content"] = "" if content is None and rest.get("tool_calls") else content
    for key, (kind, called) in KINDS.items():
        if key in rest and not isinstance(rest[key], kind):
            raise configs.UserError(f"{key} must be {called}, got {type(rest[key]).__name__}")
    if "tool_calls" in rest and not all(isinstance(call, dict) for call in rest["tool_calls"]):
        raise configs.UserError("tool_calls must be a list of objects")
    weight = next((turn[key] for key in WEIGHTS if turn.get(key) is not None), 1)
    if weight not in (0, 1):
        raise configs.UserError(f"a weight of {weight!r}: a message is trained (1) or not (0)")
    return rest | {"role": ROLES[role], "weight": int(weight)}


def find_files(path, key):
    """A file, a folder or a glob -> its files, sorted. Raises ValueError where there is none."""
    if Path(path).is_dir():
        found = [str(f) for f in Path(path).rglob("*") if f.name.endswith(ENDINGS)]
    else:
        found = [path] if Path(path).is_file() else glob.glob(path, recursive=True)
    found = sorted(f for f in found if Path(f).is_file() and not f.endswith("_labels.npy"))
    if not found:
        raise configs.UserError(f"{key}: no file at {path} (a file, a folder or a glob of {', '.join(ENDINGS)})")
    if odd := [f for f in found if not f.endswith(ENDINGS)]:
        raise configs.UserError(f"{key}: {odd[0]} ends in none of {', '.join(ENDINGS)}")
    return found


def chunks(file, separator):
    """A file -> ((file, number of its first record, [raw records], part), bytes of it read), about BLOCK at a time.

    A raw record is JSON as bytes (parsed later, on every core), a text, or what .parquet and .npy hold. A document too
    long for one job comes in parts, each (begins it, ends it); else part is None.
    """
    kind = file.removesuffix(".gz").rpartition(".")[2]
    read = {"jsonl": lines, "json": values, "txt": functools.partial(texts, separator), "parquet": rows, "npy": ids_of}
    unzip = gzip.open if file.endswith(".gz") else contextlib.nullcontext
    with naming(file, (OSError, EOFError, zlib.error), "cannot be read: "), open(file, "rb") as raw, unzip(raw) as f:
        first, done = 1, 0
        for records, part in read[kind](f, file):
            yield (file, first, records, part), raw.tell() - done
            first, done = first + (part[1] if part else len(records)), raw.tell()


def lines(f, file):
    """.jsonl"""
    while found := f.readlines(BLOCK):
        yield found, None


def decoded(f, file):
    """A file's text, block by block, the last one empty"""
    decoder, block = codecs.getincrementaldecoder("utf-8-sig")(), b"?"       # some editors begin a file with a mark
    while block:
        at, block = f.tell(), f.read(BLOCK)
        with naming(file, UnicodeDecodeError, f"not UTF-8 text, behind byte {at}: "):
            yield decoder.decode(block, final=not block)


def values(f, file):
    """.json: the items of its list, cut apart here and parsed where they are encoded; or lines after all"""
    text, n, gap = "", 0, re.compile(r"\s*\[\s*")
    for block in decoded(f, file):
        text, at, found = text + block, 0, []
        if not n and text.lstrip()[:1] == "{":
            f.seek(0)
            yield from lines(f, file)
            return
        while begin := gap.match(text, at):
            with naming(f"{file}, record {n + 1}", (ValueError, RecursionError), "not valid JSON: "):
                try:
                    end = json.JSONDecoder().raw_decode(text, begin.end())[1]
                except json.JSONDecodeError as e:                    # an error, or the rest of the item is to come
                    why = e.msg
                    if e.pos < len(text) - BLOCK and "Unterminated" not in why:
                        raise configs.UserError(why) from None
                    break
            found.append(text[begin.end():end].encode())
            at, n, gap = end, n + 1, re.compile(r"\s*,\s*")
        text = text[at:]
        if found:
            yield found, None
    if not re.fullmatch(r"\s*\]\s*" if n else r"\s*\[\s*\]\s*", text):
        why = why if begin else "a comma or the end is expected" if n else "a list is expected"
        raise configs.UserError(f"{file}, record {n + 1}: not valid JSON: {why}")


def texts(separator, f, file):
    """.txt: what stands between separators; or one document, in parts where it is long"""
    text, begins = "", True
    for block in decoded(f, file):
        text += block
        if separator:
            *whole, text = text.split(separator)
            yield [part for part in whole if part.strip()], None
        elif len(text) > BLOCK and (at := cut(text)):
            yield [text[:at]], (begins, False)
            text, begins = text[at:], False
    if text.strip() or not begins:
        yield [text], None if begins else (False, True)


def cut(text, near=200):
    """The last place where a text can be cut without changing its ids, as seen on `near` characters around it; or 0."""
    encode, start = STATE["tok"].encode, max(near, len(text) - (1 << 15))
    for border in (r"\n(?=\S)", r"(?<=\S)(?= )"):                    # newlines end what they follow, spaces begin words
        places = [m.end() for m in re.compile(border).finditer(text, start, len(text) - near)]
        for here in places[:-100:-1]:
            a, b = text[here - near:here], text[here:here + near]
            if [*encode(a), *encode(b)] == [*encode(a + b)]:
                return here
    return 0


def rows(f, file):
    """.parquet, by the optional pyarrow"""
    with naming(file, ImportError, "reading .parquet needs pyarrow; pip install pyarrow: "):
        import pyarrow.parquet
    with naming(file, (OSError, pyarrow.ArrowException), "not a .parquet file: "):
        table, done, size = pyarrow.parquet.ParquetFile(file), 0, os.path.getsize(file)
        for batch in table.iter_batches(512):
            done += len(batch)
            f.seek(size * done // table.metadata.num_rows)           # where the progress bar looks
            yield batch.to_pylist(), None


def ids_of(f, file):
    """.npy: ready token ids, one document; with FILE_labels.npy beside it, where data.ignore_index is not trained"""
    beside, size, ignore_index = f"{file[:-4]}_labels.npy", STATE["tok"].n_vocab, STATE["cfg"]["data"]["ignore_index"]
    with naming(file, (ValueError, EOFError), "no array of token ids: "):
        ids, labels = (np.load(path, mmap_mode="r", allow_pickle=False).reshape(-1)
                       for path in (file, beside if os.path.isfile(beside) else file))
        if ids.dtype.kind not in "iu" or len(labels) != len(ids):
            raise configs.UserError(f"expected ints, as many as labels; got {len(ids)} {ids.dtype}, {len(labels)} labels")
        for at in range(0, len(ids), BLOCK):
            part, said = ids[at:at + BLOCK], labels[at:at + BLOCK]
            mask = (said != ignore_index).astype(np.uint8)
            if not 0 <= part.min() <= part.max() < size or (said != part)[mask > 0].any():
                raise configs.UserError(f"near token {at}: an id that the tokenizer ({size} tokens) lacks, or a label that is "
                                 "neither data.ignore_index nor the token")
            f.seek(at * ids.itemsize)
            yield [(np.array(part), mask)], (at == 0, at + BLOCK >= len(ids))


# ---------------------------------------------------------------------------------------------------------------------
# the tokenizer: text -> ids
# All are tiktoken encodings, with what a model's files say beside them. A converted one proves that it is exact, or is
# refused by the name of what tiktoken would do otherwise: ids that are nearly right train a model that is nearly right.

@dataclasses.dataclass(eq=False, repr=False)
class Tokenizer:
    """Text <-> ids. Special tokens control: a template writes them, and what spells one in a message is text."""
    ranks: dict                                              # {token's bytes: id}, the order in which pairs are merged
    pattern: str                                             # regex that splits text into words; merges don't cross it
    special: dict                                            # {text: id} of control tokens
    bos: str = None                                          # texts of special tokens
    eos: str = None
    template: str = None                                     # jinja text of the model's own chat template
    nfc: bool = False                                        # text is brought to Unicode's composed form first (Qwen)
    folder: Path = None                                      # where its Hugging Face files are
    added: dict = dataclasses.field(default_factory=dict)    # {text: id}: tokens wherever they are spelled (<think>)
    strip: dict = dataclasses.field(default_factory=dict)    # {text: (left, right)}: they swallow spaces beside them
    late: tuple = ()                                         # texts that are looked for in what other tokens leave over
    names: dict = dataclasses.field(default_factory=dict)    # {"pad_token": text, …}: more that templates may ask for

    def __post_init__(self):
        missing = [b for b in range(256) if bytes([b]) not in self.ranks]
        if missing:                                                  # such a byte would take tiktoken's process down
            raise configs.UserError(f"tokenizer: its vocabulary lacks {len(missing)} of the 256 single bytes "
                             f"(the first is {missing[0]})")
        ids, lengths = list(self.ranks.values()), list(map(len, self.ranks))
        if len(set(ids)) < len(ids):                                 # so would this
            raise configs.UserError("tokenizer: two of its vocabulary's tokens have the same id")
        assert all(text is None or text in self.special for text in (self.bos, self.eos)), (self.bos, self.eos)
        self.every = every = self.special | self.added
        self.enc = tiktoken.Encoding("ours", pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens=every)
        self.n_vocab = 1 + max([*ids, *every.values()])
        self.lengths = np.zeros(self.n_vocab, np.int64)              # bytes of each token
        self.lengths[ids] = lengths
        self.lengths[list(every.values())] = [len(text.encode()) for text in every]
        self.byte_ids = None                                         # byte -> id, where there is nothing to merge
        if len(ids) == 256:
            self.byte_ids = np.array([self.ranks[bytes([b])] for b in range(256)], np.uint32)
        self.special_pattern, self.escaped_pattern, self.every_pattern = patterns(self.special, every)
        self.passes = [any_of(set(every) - set(self.late)), *([any_of(self.late)] if self.late else [])]
        doubtful = self.strip or self.late or any(b.startswith(a) for a, b in itertools.pairwise(sorted(every)))
        self.alone = not doubtful and self.byte_ids is None          # tiktoken itself finds special and added tokens
        self.allowed = {False: frozenset(self.added), True: frozenset(every)}
        vocabulary = hashlib.sha256(b"".join(self.ranks) + np.array([lengths, ids]).tobytes()).hexdigest()
        tokens = [sorted(part.items()) for part in (self.special, self.added, self.strip)]
        self.fingerprint = digest(self.pattern, tokens[0], self.bos, self.eos, self.nfc, vocabulary, *tokens[1:],
                                  sorted(self.late))

    def words(self, text):
        """str in which nothing is special -> [n] uint32 ids"""
        if self.byte_ids is not None:
            return self.byte_ids[np.frombuffer(text.encode(), np.uint8)]
        try:
            return self.enc.encode_to_numpy(text, disallowed_special=())
        except ValueError:                                           # a run of spaces too long for tiktoken's regexes
            import regex                                             # tiktoken brings it
            words = regex.findall(self.pattern, text)
            return np.array([i for word in words for i in self.enc._encode_single_piece(word)], np.uint32)

    def spans(self, text, held=None, borders=()):
        """Text -> (ids [n], where each ends [n], where the borders are), the latter two in bytes of what was encoded.

        held     None: special tokens that are spelled in it are text; else control tokens, save inside these spans
        borders  positions in the text, ascending
        """
        if self.alone and not held and (not self.nfc or unicodedata.is_normalized("NFC", text)):
            with contextlib.suppress(ValueError):                    # as in words(), which mends it
                allowed = self.allowed[held is not None]
                ids = self.enc.encode_to_numpy(text, allowed_special=allowed, disallowed_special=())
                at = borders if text.isascii() else [len(text[:b].encode()) for b in borders]
                return ids, self.lengths[ids].cumsum(), at
        ids, lengths, size, at = [], [], 0, []
        compose = (lambda part: unicodedata.normalize("NFC", part)) if self.nfc else (lambda part: part)
        for start, end, known in self.split(text, held):
            ids.append(self.words(compose(text[start:end])) if known is None else np.array([known], np.uint32))
            lengths.append(self.lengths[ids[-1]] if known is None else [len(text[start:end].encode())])
            at += [size + len(compose(text[start:b]).encode()) for b in borders[len(at):] if b <= end]
            size += int(np.sum(lengths[-1]))
        return np.concatenate(ids), np.cumsum(np.concatenate(lengths).astype(np.int64)), at

    def split(self, text, held):
        """Text -> [(start, end, id of the token that stands there, or None)], without a gap"""
        parts = [(0, len(text), None)]
        for late, pattern in enumerate(self.passes):
            parts, before = [], parts
            for at, end, known in before:
                for m in pattern.finditer(text, at, end) if known is None else ():
                    a, b = m.span()
                    if m[0] in self.special and (held is None or any(s < b and a < e for s, e in held)):
                        continue
                    if late and self.nfc and unicodedata.normalize("NFC", text[a:b + 1])[:b - a] != m[0]:
                        continue                                     # its last character composes with the next one
                    left, right = self.strip.get(m[0], (False, False))
                    a = max(at, len(text[:a].rstrip(SPACE)) if left else a)
                    b = max(at, len(text) - len(text[b:].lstrip(SPACE)) if right else b)
                    parts += [(at, a, None), (a, b, self.every[m[0]])]
                    at = b
                parts.append((at, end, known))
        return parts

    def encode(self, text):
        """str -> [n] int64 ids. Special tokens that are spelled in it are text."""
        return self.spans(text)[0].astype(np.int64)

    def decode(self, ids):
        """ids -> str; an id without a token is left out, broken UTF-8 becomes U+FFFD."""
        known = [int(i) for i in ids if 0 <= i < self.n_vocab and self.lengths[i]]
        return b"".join(self.enc.decode_tokens_bytes(known)).decode("utf-8", errors="replace")

    def clean(self, text):
        """Lone surrogates replaced by U+FFFD, and composed where the tokenizer asks for it."""
        if not text.isascii():
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return unicodedata.normalize("NFC", text) if self.nfc else text


class Borrowed:
    """A tokenizer.json that tiktoken can't hold, run by the optional tokenizers package: the same methods, slower.

    It is given the special tokens under names that no text spells, and those names only where they are meant.
    """
    clean, encode, nfc = Tokenizer.clean, Tokenizer.encode, False

    def __init__(self, path, spec, special, added, **more):          # bos, eos, template, folder, names
        import tokenizers
        self.private = {text: f"\ufdd4{os.urandom(8).hex()}\ufdd5" for text in special}
        hidden = lambda text: self.private.get(text, text)
        vocab, unknown = spec["model"]["vocab"], spec["model"].get("unk_token")
        renamed = [(hidden(text), i) for text, i in (vocab.items() if isinstance(vocab, dict) else vocab)]
        model = {"vocab": dict(renamed) if isinstance(vocab, dict) else renamed}                # Unigram's is a list
        tokens = [t | {"content": hidden(t["content"]), "normalized": t["normalized"] and not t["special"]}
                  for t in spec.get("added_tokens") or []]
        spec = spec | {"post_processor": None, "truncation": None, "padding": None, "added_tokens": tokens,
                       "model": spec["model"] | model | ({"unk_token": hidden(unknown)} if unknown else {})}
        with naming("the tokenizers package cannot read it either", Exception):    # it raises no narrower one
            self.enc = tokenizers.Tokenizer.from_str(json.dumps(spec))
        vars(self).update(more, special=special, n_vocab=self.enc.get_vocab_size())
        self.special_pattern, self.escaped_pattern, self.every_pattern = patterns(special, special | added)
        self.fingerprint = digest(hashlib.sha256(path.read_bytes()).hexdigest(), self.bos, self.eos)

    def spans(self, text, held=None, borders=()):
        parts, at, moved = [], 0, np.array(borders, np.int64)
        for m in self.special_pattern.finditer(text) if held is not None else ():
            if not any(s < m.end() and m.start() < e for s, e in held):
                parts += [text[at:m.start()], self.private[m[0]]]
                at = m.end()
                moved += (len(parts[-1]) - len(m[0])) * (np.array(borders) >= at)
        encoded = self.enc.encode("".join([*parts, text[at:]]), add_special_tokens=False)
        return np.array(encoded.ids, np.uint32), np.array([end for _, end in encoded.offsets], np.int64), moved

    def decode(self, ids):
        text = self.enc.decode([int(i) for i in ids], skip_special_tokens=False)
        names = {private: text for text, private in self.private.items()}
        return any_of(names).sub(lambda m: names[m[0]], text)


def any_of(texts):
    """The pattern that finds these texts, the longest first; it finds nothing where there is none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def patterns(special, every):
    """Patterns of the special tokens, of these as JSON spells them, and of special and added ones."""
    return any_of(special), any_of(as_json(text)[1:-1] for text in special), any_of(every)


as_json = json.JSONEncoder(ensure_ascii=False, default=str).encode
SPACE = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and not "\x1c" <= c <= "\x1f")     # as Unicode has it
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_PATTERN = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"   # StarCoder's
PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
# byte -> the letter that GPT-2 spells it with; what isn't printable is moved up to U+0100
LETTERS = dict(zip([*PRINTED, *sorted({*range(256)} - {*PRINTED})], map(chr, [*PRINTED, *range(256, 324)])))
BYTES_SPECIAL = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}


def load_tokenizer(cfg):
    """data.tokenizer, or model.init_from's where that is empty -> Tokenizer. Raises ValueError."""
    data = cfg["data"]
    name = data["tokenizer"] or configs.resolve_pretrained(cfg["model"]["init_from"])
    if not name:
        raise configs.UserError("data.tokenizer: none is given, and there is no model.init_from to take it from; "
                         "bytes always works")
    if name == "bytes":
        tok = bytes_tokenizer()
    elif name.endswith(".tiktoken"):
        tok = tiktoken_file(Path(name), data["tokenizer_pattern"], data["special_tokens"])
    elif Path(name).exists():
        tok = huggingface_tokenizer(Path(name))
    elif name in tiktoken.list_encoding_names():
        with naming("data.tokenizer", OSError, f"tiktoken cannot download {name}; bytes or a folder with a "
                                               "tokenizer.json needs no network: "):
            enc = tiktoken.get_encoding(name)
        tok = Tokenizer(enc._mergeable_ranks, enc._pat_str, enc._special_tokens, eos="<|endoftext|>")
    else:
        raise configs.UserError(f"data.tokenizer: {name} is no file or folder, and none of bytes, "
                         f"{', '.join(tiktoken.list_encoding_names())}")
    for key in ("bos_token", "eos_token"):
        text = data[key]
        if text not in (None, "", *tok.special):
            raise configs.UserError(f"data.{key}: {text!r} is no special token of {name}; "
                             f"it has {', '.join(tok.special) or 'none'}")
        if text is not None:
            setattr(tok, key[:3], text or None)
            tok.fingerprint = digest(tok.fingerprint, key, text)
    return tok


def bytes_tokenizer():
    """Every byte is a token; <|endoftext|> borders text documents, <|im_start|> and <|im_end|> border turns."""
    return Tokenizer({bytes([b]): b for b in range(256)}, r"[\s\S]", BYTES_SPECIAL, "<|endoftext|>", "<|endoftext|>")


def tiktoken_file(path, pattern, special):
    """A file of `base64(token) rank` lines -> Tokenizer. It needs its pattern said: the file doesn't hold one."""
    if not pattern:
        raise configs.UserError(f"data.tokenizer_pattern: {path} needs the regular expression its tokenizer splits text with")
    with naming(path, (OSError, ValueError), "not a .tiktoken file: "):      # tiktoken's own reader keeps old ones
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    taken = [*ranks.values(), *special.values()]
    for text, i in special.items():
        if type(i) is not int or i < 0 or taken.count(i) > 1:
            raise configs.UserError(f"data.special_tokens.{text}: expected an id that no other token has, got {i!r}")
    with naming(f"{path} with data.tokenizer_pattern {pattern!r}", (ValueError, RecursionError)):          # tiktoken's words on a pattern, or ours
        return Tokenizer(ranks, pattern, special)


def huggingface_tokenizer(path):
    """A byte-level BPE tokenizer.json (or its folder) -> Tokenizer; what isn't one exactly is Borrowed, or refused."""
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise configs.UserError(f"{path}: no such file; a tokenizer's folder must hold a tokenizer.json")
    spec, template_file, config_file = read_json(path), *map(path.with_name, TEMPLATE_FILES)
    config = read_json(config_file) if config_file.is_file() else {}
    damage = (KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError)
    with naming(path, damage, "not a whole tokenizer.json: "):
        template = config.get("chat_template")
        if isinstance(template, list):                               # several, by name
            template = next((t.get("template") for t in template if t.get("name") == "default"), None)
        if template is not None and not isinstance(template, str):
            raise configs.UserError(f"{config_file}: chat_template must be text, got {type(template).__name__}")
        if template_file.is_file():
            template = read_text(template_file)
        tokens = spec.get("added_tokens") or []
        special, added = ({t["content"]: t["id"] for t in tokens if t["special"] == kind} for kind in (True, False))

        post = spec.get("post_processor") or {}                      # what it puts around a text, where no name says so
        around = [piece for step in post.get("processors") or [post] for piece in step.get("single") or ()] or [{}]
        names = {key: piece.get("SpecialToken", {}).get("id")
                 for key, piece in (("bos_token", around[0]), ("eos_token", around[-1]))}
        for key, text in config.items():
            text = text.get("content") if isinstance(text, dict) else text    # "TEXT", or {"content": "TEXT", …}
            if key.endswith("_token") and isinstance(text, str):
                names[key] = text
        bos, eos = (names[key] if names[key] in special else None for key in ("bos_token", "eos_token"))
        more = dict(bos=bos, eos=eos, template=template, folder=path.parent,
                    names={key: text for key, text in names.items() if text})
        try:
            return byte_level(spec, tokens, special, added, **more)
        except ValueError as e:
            with naming(path, ImportError, f"{e}; with `pip install tokenizers` it would run there: "), naming(path):
                tok = Borrowed(path, spec, special, added, **more)
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"note: {path}: {e}; the tokenizers package runs it", file=sys.stderr, flush=True)
            return tok


def byte_level(spec, tokens, special, added, **more):
    """A byte-level BPE tokenizer.json, read -> Tokenizer. ValueError for what tiktoken would do otherwise."""
    bpe, pre, normalizer = spec["model"], spec.get("pre_tokenizer") or {}, (spec.get("normalizer") or {}).get("type")
    *before, last = pre.get("pretokenizers") or [pre]                # ByteLevel, alone or after Split or Digits
    split, splits, kind = before[0] if before else {}, last.get("use_regex", True), bpe.get("type", "BPE")
    pattern, how = split.get("pattern", {}).get("Regex"), (split.get("behavior"), split.get("invert"))
    if not before:
        pattern = GPT2_PATTERN if splits else r"[\s\S]+"
    elif split.get("type") == "Digits" and splits:
        pattern = DIGITS_PATTERN if split["individual_digits"] else DIGITS_PATTERN.replace(r"\p{N}|", r"\p{N}+|", 1)
    elif splits or how not in (("Isolated", False), ("Removed", True)):
        pattern = None
    steps = f"the pre-tokenizer {' + '.join(str(step.get('type')) for step in [*before, last])}"
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    for what, found in {
            f"a {kind} model": kind != "BPE" or "merges" not in bpe,
            f"a {kind} model with byte fallback": bpe.get("byte_fallback"),
            **{f"model.{key}": bpe.get(key) for key in odd},
            f"the normalizer {normalizer}": normalizer not in (None, "NFC"),
            f"{steps} with a prefix space": last.get("add_prefix_space"),
            steps: last.get("type") != "ByteLevel" or len(before) > 1 or not pattern,
            **{f"the single_word added token {t['content']!r}": t["single_word"] for t in tokens},
            **{f"the normalized added token {t['content']!r}":
               t["normalized"] and normalizer and not t["content"].isascii() for t in tokens}}.items():
        if found:
            refuse(what)
    spelled = {b: "\uffff" for b in range(256)} | {ord(c): chr(b) for b, c in LETTERS.items()}
    try:
        ranks = {token.translate(spelled).encode("latin-1"): i
                 for token, i in bpe["vocab"].items() if token not in special | added}
    except UnicodeEncodeError as e:
        refuse(f"a vocabulary with {e.object!r}, which is not spelled in bytes,")
    strip = {t["content"]: (t["lstrip"], t["rstrip"]) for t in tokens if t["lstrip"] or t["rstrip"]}
    late = [t["content"] for t in tokens if t["normalized"]]
    tok = Tokenizer(ranks, pattern, special, nfc=normalizer == "NFC", added=added, strip=strip, late=late, **more)
    prove(tok, bpe)
    return tok


def refuse(what):
    raise configs.UserError(f"{what} cannot be carried over exactly; "
                     "supported are byte-level BPE tokenizers (GPT-2, Llama 3, Qwen kinds)")


NASTY = ("", " ", "a", "Hello, world! I'll we'd they're DON'T", "  two  spaces   three    four",
         "tab\tnew\nline\r\n\r\n\n  end  ", "naïve café Ünïcödé", "1234567890 3.14 1,000,000 ½ ٣", "日本語と中文，한국어",
         "עברית العربية", "👩‍👩‍👧 🏳️‍🌈 🤖", "\x00\x01\x7f\x1b[0m", "_under_score__ --flag=value // /* x */",
         "aaaaaaaaaaaaaaaaaaaaaaaaa", "\u200b\u00a0\u3000\ufeff", "e\u0301 o\u0308", " \n \n\n\t x",
         "<|endoftext|> <|im_end|>", "if (x==1) {\n    return y;\n}")


def prove(tok, bpe):
    """Hold the tiktoken encoding against merging by the list of merges itself, on strings that tend to go wrong."""
    import regex                                                     # tiktoken brings it
    pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in bpe["merges"])
    order = {tuple(pair): n for n, pair in enumerate(pairs)}
    for text in map(tok.clean, NASTY):
        want, words = [], regex.findall(tok.pattern, text)
        if "".join(words) != text:
            refuse(f"a pattern that leaves something out (seen on {text!r})")
        for word in words:
            parts = [LETTERS[b] for b in word.encode()]
            if bpe.get("ignore_merges") and "".join(parts) in bpe["vocab"]:
                parts = ["".join(parts)]
            while best := min((p for p in zip(parts, parts[1:]) if p in order), key=order.get, default=None):
                at = list(zip(parts, parts[1:])).index(best)
                parts[at:at + 2] = ["".join(best)]
            want += map(bpe["vocab"].get, parts)
        if tok.words(text).tolist() != want:
            refuse(f"its order of merges (seen on {text!r})")


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
    write = lambda name, d: (folder / name).write_text(json.dumps(d, ensure_ascii=False, indent=1) + "\n", "utf-8")
    for name in ("tokenizer.json", *TEMPLATE_FILES, "special_tokens_map.json", "vocab.json", "merges.txt"):
        if tok.folder and (tok.folder / name).is_file() and tok.folder.resolve() != folder.resolve():
            shutil.copyfile(tok.folder / name, folder / name)
    if not tok.folder:
        spell = lambda token: "".join(LETTERS[b] for b in token)
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        pattern = re.sub(r"(\{\d+,\d*\})\+", r"\1", tok.pattern)       # {1,3}+ means another thing there
        words = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
        write("tokenizer.json", {
            "version": "1.0", "decoder": level, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, level]},
            "added_tokens": [{"id": i, "content": text, **plain} for text, i in tok.special.items()],
            "model": {"type": "BPE", "ignore_merges": True,
                      "vocab": {spell(token): i for token, i in tok.ranks.items()},
                      "merges": [f"{spell(a)} {spell(b)}" for a, b in merges_of(tok.ranks)]}})
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if (folder / "tokenizer_config.json").is_file():
        config = read_json(folder / "tokenizer_config.json")
    config = {f"{key}_token": getattr(tok, key) for key in ("bos", "eos") if getattr(tok, key)} | config
    if template_text and template_text != tok.template:
        config["chat_template"] = template_text
        (folder / "chat_template.jinja").unlink(missing_ok=True)     # another one came along, and would win
    write("tokenizer_config.json", config)


# ---------------------------------------------------------------------------------------------------------------------
# template and mask: a chat -> ids, and which of them are trained
# The model's own jinja renders the chat, and the ids are those of the whole text. Where each message stands in it is
# found from renderings too, with marks in place of contents: a template may trim, merge, drop or add what it likes.

CHATML = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
PLAIN = ("{% for message in messages %}{{ message.role }}:\n{{ message.content }}{{ eos_token }}\n{% endfor %}"
         "{% if add_generation_prompt %}assistant:\n{% endif %}")      # for vocabularies without ChatML's two tokens
TEMPLATE_FILES = ("chat_template.jinja", "tokenizer_config.json")    # where a model's folder has its own
OPEN, CLOSE, BEGIN, END, BREAK = (f"\ufdd0{os.urandom(8).hex()}\ufdd1" for _ in range(5))   # marks: no text spells them
MARKED, EXCHANGED = re.compile(f"{BEGIN}|{END}"), re.compile(f"{OPEN}(\\d+){CLOSE}")


def template_text(tok, cfg):
    """The jinja text of data.chat_template."""
    name = cfg["data"]["chat_template"]
    if name not in ("", "chatml"):
        with naming("data.chat_template", what="neither chatml nor a readable file: "):
            return read_text(name)
    if tok.template and not name:
        return tok.template
    if "<|im_end|>" in tok.special:
        return CHATML
    if name:
        raise configs.UserError("data.chat_template: chatml needs a tokenizer with <|im_start|> and <|im_end|>; "
                         "leave it empty for a plain one that ends turns with EOS")
    if not tok.eos:
        raise configs.UserError("data.eos_token: chats need a token that ends a turn; "
                         "this tokenizer has neither <|im_end|> nor an EOS")
    return PLAIN


def load_template(tok, cfg):
    """template_text(), compiled; an error names the file it is from."""
    text, own = template_text(tok, cfg), [tok.folder / name for name in TEMPLATE_FILES] if tok.folder else []
    with naming(cfg["data"]["chat_template"] or next(filter(Path.is_file, own), "built in"),
                (ValueError, RecursionError)):                       # jinja raises both for damaged text
        return compile_template(text)


def compile_template(text):
    """jinja text -> a compiled template, in jinja2's sandbox, with the names that chat templates rely on."""
    import jinja2, jinja2.ext, jinja2.sandbox

    class Generation(jinja2.ext.Extension):                          # {% generation %} trained {% endgeneration %}
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.FilterBlock(body, jinja2.nodes.Filter(None, "marked", [], [], None, None), lineno=line)

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        def getattr(self, obj, name):                                # the way by an exception takes half of the time
            plain = type(obj) is dict and name in obj and not hasattr(dict, name)
            return obj[name] if plain else super().getattr(obj, name)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    env = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    env.filters["marked"] = lambda text: BEGIN + text + END
    # jinja's own tojson escapes for HTML
    env.filters["tojson"] = lambda x, indent=None, **more: json.dumps(x, ensure_ascii=False, indent=indent, **more)
    env.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: datetime.now().strftime(form),
                    "tools": None, "documents": None}
    env.writes_calls = "tool_calls" in text
    try:
        template = env.from_string(text)
    except jinja2.TemplateSyntaxError as e:
        raise configs.UserError(f"the chat template's line {e.lineno}: {one_line(e.message)}") from None
    template.globals = dict(template.globals)                        # a ChainMap, which every rendering copies
    return template


def render(template, tok, messages, prompt=False, **more):
    """Messages -> text, in pieces outside and inside of {% generation %}, in turn.

    prompt  with the opening of an assistant's turn, as for generation
    """
    names = tok.names | {"add_generation_prompt": prompt, "bos_token": tok.bos or "", "eos_token": tok.eos or ""}
    with naming("the chat template refuses these messages", Exception):       # it may raise whatever Python raises
        return MARKED.split(template.render(messages=messages, **names, **more))


def in_strings(change, thing):
    """A JSON value with `change` done to every string in it, keys too."""
    if isinstance(thing, str):
        return change(thing)
    if isinstance(thing, list):
        return [in_strings(change, item) for item in thing]
    if isinstance(thing, dict):
        return {in_strings(change, k): in_strings(change, v) for k, v in thing.items()}
    return thing


def prepared(tok, template, messages, prompt=False, **more):
    """Messages -> (messages, pieces of text as from render, spans in it that only spell special tokens).

    Those are found by rendering once more with each of them broken by a character that no text holds.
    """
    if not template.environment.writes_calls:                        # then nothing is lost: the calls are content
        calls = lambda m: [as_json(call.get("function", call)) for call in m["tool_calls"]]
        messages = [m | {"content": "\n".join([*filter(None, [m["content"]]), *calls(m)]), "tool_calls": None}
                    if m.get("tool_calls") else m for m in messages]
    pieces, spelled = render(template, tok, messages, prompt, **more), []
    if tok.escaped_pattern.search(as_json([messages, more])):        # quicker than looking into every string
        in_strings(lambda s: spelled.extend(tok.special_pattern.findall(s)), [messages, more])
    if not spelled:
        return messages, pieces, []
    broken = lambda s: tok.special_pattern.sub(lambda m: m[0][0] + BREAK + m[0][1:], s)
    marked = render(template, tok, in_strings(broken, messages), prompt, **in_strings(broken, more))
    parts = "".join(marked).split(BREAK)
    if "".join(parts) != "".join(pieces):
        raise configs.UserError(f"the chat template looks for {' or '.join(sorted(set(spelled)))} in messages, where it is "
                         "text and no control token; reasoning goes into reasoning_content")
    return messages, pieces, [(at - 1, at) for at in itertools.accumulate(map(len, parts[:-1]))]


def located(tok, template, messages, text, wanted, **more):
    """Where the `wanted` messages stand in the rendered text -> [(start, end, index)], ascending.

    Rendered once more with marks for their contents, the template shows what it writes between them. Where that isn't
    what stands between the real ones (it looks into them, or writes more than contents), each is exchanged alone.
    """
    text_of = lambda messages, *prompt: "".join(render(template, tok, messages, *prompt, **more))
    marked = {i: {"role": messages[i]["role"], "content": f"{OPEN}{i}{CLOSE}"} for i in wanted}
    generated = {i for i in wanted if any(messages[i].get(key) for key in MORE)}        # what is more than content
    plain = {i: messages[i] | marked[i] for i in wanted if i not in generated}
    exchanged = text_of([plain.get(i, m) for i, m in enumerate(messages)]) if plain else text
    first, *rest = EXCHANGED.split(exchanged)
    found, at, opening = [], len(first), None
    for i, between in zip(map(int, rest[::2]), rest[1::2]) if text.startswith(first) else ():
        whole = messages[i]["content"]                               # as it is, trimmed by the template, or a part
        ends = [at + len(form) for form in (whole, whole.strip(), whole.lstrip(), whole.rstrip())
                if text.startswith(form + between, at)]
        end = ends[0] if ends else text.find(between, at) if between else -1
        if end < 0 or text[at:end] not in whole:
            break
        found.append((at, end, i))
        at = end + len(between)
    else:
        found = found if at == len(text) else []

    for i in sorted(set(wanted) - {i for _, _, i in found}):
        floor = max((end for _, end, before in found if before < i), default=0)
        try:
            whole, other = text, text_of([*messages[:i], marked[i], *messages[i + 1:]])
        except ValueError:                                           # it has rules for what may follow
            whole, other = text_of(messages[:i + 1]), text_of([*messages[:i], marked[i]])
        before, mark, after = other.partition(marked[i]["content"])
        if not mark:                                                 # this template doesn't write this message
            continue
        alone = whole.startswith(before) and whole[len(before):].endswith(after)
        if not alone:                                                # it changes something else with the content
            before = os.path.commonprefix([whole, other])
            after = os.path.commonprefix([whole[len(before):][::-1], other[len(before):][::-1]])
        said = whole[len(before):len(whole) - len(after)]
        start = len(before) if whole is text else text.find(said, floor)
        end = start + len(said)
        if not alone or i in generated:                              # all that is generated is trained
            if opening is None:
                asked = text_of(messages, True)
                opening = asked[len(text):] if asked.startswith(text) else ""
            at = text.rfind(opening, floor, start)
            start = at + len(opening) if opening and at >= 0 else start
        if 0 <= start < end:
            found.append((start, end, i))
    return sorted(found)


def encode_chat(tok, template, messages, train_on="all", **more):
    """Messages -> (ids [n] int64, mask [n] uint8).

    Trained are the assistant's turns, each with the token that ends it; only the last one; or everything but tools'
    outputs. A template with {% generation %} marks says itself where a turn is. Raises ValueError where it refuses.
    """
    messages, pieces, held = prepared(tok, template, messages, **more)
    if re.search("[\ud800-\udfff]", "".join(pieces)):                # lone surrogates
        messages, more = in_strings(tok.clean, messages), in_strings(tok.clean, more)
        messages, pieces, held = prepared(tok, template, messages, **more)
    text, by_marks = "".join(pieces), len(pieces) > 1 and train_on != "everything"
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    off = {i for i, m in enumerate(messages)                         # never trained
           if m["role"] == "tool" or not m.get("weight", 1) or train_on == "last" and i not in answers[-1:]}
    wanted = off if by_marks or train_on == "everything" else set(answers) - off
    wanted = [i for i in sorted(wanted) if any(messages[i].get(key) for key in ("content", *MORE))]
    spans = located(tok, template, messages, text, wanted, **more) if wanted else []
    if by_marks:
        ends = list(itertools.accumulate(map(len, pieces)))
        trained = [(a, b) for a, b in zip(ends[::2], ends[1::2]) if not any(a < e and s < b for s, e, _ in spans)]
    elif train_on == "everything":
        edges = [0, *(edge for start, end, _ in spans for edge in (start, end)), len(text)]
        trained = list(zip(edges[::2], edges[1::2]))
    else:
        ends = [tok.every_pattern.match(text, len(text) - len(text[end:].lstrip())) for _, end, _ in spans]
        trained = [(start, after.end() if after else end) for (start, end, _), after in zip(spans, ends)]
    ids, ends, borders = tok.spans(text, held, [edge for a, b in trained if a < b for edge in (a, b)])
    mask = np.zeros(len(ids), np.uint8)
    first = np.searchsorted(ends, borders[::2], "right")             # a token that overlaps the span is trained
    last = np.searchsorted(ends, borders[1::2], "left")
    for a, b in zip(first.tolist(), last.tolist()):
        mask[a:b + 1] = 1
    return ids.astype(np.int64), mask


def encode_prompt(tok, template, messages):
    """Messages -> the ids of the text that asks for an assistant's answer, as a list."""
    messages, pieces, held = prepared(tok, template, in_strings(tok.clean, messages), prompt=True)
    return tok.spans("".join(pieces), held)[0].tolist()


def stop_token_ids(tok, template):
    """The ids that end an assistant's turn: what generation stops at."""
    ids, mask = encode_chat(tok, template, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    last = int(ids[np.flatnonzero(mask)[-1]]) if mask.any() else -1
    return sorted({i for i in (last, tok.special.get(tok.eos, -1)) if i in tok.special.values()})


# ---------------------------------------------------------------------------------------------------------------------
# token files out
# A source becomes a folder, made on every core, renamed into place when it is whole, and found again by a fingerprint
# of all it depends on. Chunks come back in their order, so that the number of processes changes nothing.

def encode_chunk(job):
    """A job of chunks() -> (tokens, mask, lengths, counts, problems): documents end to end; no lengths: part of one."""
    file, first, records, part = job
    tok, shape, data, found, problems = STATE["tok"], STATE["shape"], STATE["cfg"]["data"], [], []
    counts, seq_len = collections.Counter(), data["seq_len"]
    if part:
        ids, mask = text_document(records[0], *part) if isinstance(records[0], str) else records[0]
        return ids, mask, None, collections.Counter(records=part[1]), []
    unit = "line" if file.removesuffix(".gz").endswith(".jsonl") else "record"
    for n, record in enumerate(records, first):
        where = f"{file}, {unit} {n}"
        counts["records"] += 1
        try:
            record = normal(record, where, shape)
            if "text" in record:
                found += windows(*text_document(record["text"]), seq_len)
                continue
            if STATE["template"] is None:
                STATE["template"] = load_template(tok, STATE["cfg"])
            with naming(where):
                ids, mask = encode_chat(tok, STATE["template"], train_on=data["train_on"], **record)
        except configs.UserError as e:
            if data["on_error"] != "skip" or not str(e).startswith(where):   # what names no record is no record's fault
                raise
            counts["skipped"] += 1
            problems.append(str(e))
            continue
        counts["chats"] += 1
        if len(ids) > seq_len + 1:
            counts["truncated"] += 1
            counts["cut_away"] += bool(mask.any() and not mask[1:seq_len + 1].any())
        found.append((ids[:seq_len + 1], mask[:seq_len + 1]))
    return *laid(found, counts), counts, problems[:3]


def text_document(text, begins=True, ends=True):
    """A text, or a part of one -> (BOS + its ids + EOS, mask: all trained)."""
    tok = STATE["tok"]
    bos, eos = ([tok.special[name]] if name and there else [] for name, there in ((tok.bos, begins), (tok.eos, ends)))
    ids = np.concatenate([np.asarray(part, np.int64) for part in (bos, tok.encode(tok.clean(text)), eos)])
    return ids, np.ones(len(ids), np.uint8)


def windows(ids, mask, seq_len):
    """A document -> [(ids, mask)] of at most seq_len targets; a window's last target begins the next one."""
    return [(ids[at:at + seq_len + 1], mask[at:at + seq_len + 1]) for at in range(0, max(len(ids) - 1, 1), seq_len)]


def laid(documents, counts):
    """[(ids, mask)] -> (tokens, mask, lengths), end to end, without those that have nothing to train on."""
    for ids, mask in documents if STATE["ignored"].any() else ():
        mask[STATE["ignored"][ids]] = 0
    kept = [(ids, mask) for ids, mask in documents if mask[1:].any()]        # a first token is nobody's target
    counts["dropped"] += len(documents) - len(kept)
    tokens, masks = (np.concatenate([np.zeros(0, np.uint8), *parts]) for parts in (zip(*kept) if kept else ((), ())))
    return tokens.astype(STATE["dtype"]), masks, np.array([len(ids) for ids, _ in kept], np.int64)


def whole(results, seq_len):
    """What encode_chunk gave, in order -> the same, the parts of long documents cut into windows across jobs."""
    left = []                                                        # a window that the open document may go on with
    for ids, mask, lengths, counts, problems in results:
        if lengths is None:
            ended = windows(*map(np.concatenate, zip(*left, (ids, mask))), seq_len)
            left = [] if counts["records"] else [ended.pop()]
            ids, mask, lengths = laid(ended, counts)
        yield ids, mask, lengths, counts, problems


def count_targets(mask, lengths):
    """Documents end to end -> how many targets each of them has, uint32 [documents]."""
    starts = np.cumsum(lengths) - lengths
    trained = np.add.reduceat(mask, starts, dtype=np.int64)
    return (trained - mask[starts]).astype(np.uint32)                # a first token is nobody's target


def encoded(jobs, size, processes, quiet, name):
    """Jobs, done, in order: on every core where there is much to do, two for each core ahead."""
    from tqdm import tqdm
    if not processes:
        processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    bar = tqdm(total=size, unit="B", unit_scale=True, desc=f"tokenize {name}", disable=quiet or None, leave=False)
    if processes == 1 or size < 4 * BLOCK:
        with bar:
            for job, n in jobs:
                yield encode_chunk(job)
                bar.update(n)
        return
    with bar, concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        ahead = collections.deque()
        while True:
            for job, n in itertools.islice(jobs, 2 * processes - len(ahead)):
                ahead.append((pool.submit(encode_chunk, job), n))
            if not ahead:
                return
            done, n = ahead.popleft()
            if isinstance(done.exception(), concurrent.futures.BrokenExecutor):
                raise configs.UserError("data.processes: one was killed, for want of memory perhaps; fewer take less")
            yield done.result()
            bar.update(n)


def tokenize(cfg, name, source, tok, quiet=False):
    """One source -> its folder of token files; made anew only where something it depends on has changed."""
    data = cfg["data"]
    files, shape = find_files(source["path"], f"data.{name}.path"), source["shape"]
    if shape != "auto" and (odd := [f for f in files if f.endswith(".npy") != (shape == "tokens")]):
        raise configs.UserError(f"data.{name}.shape: {shape}, which {odd[0]} is not; tokens are .npy files")
    beside = filter(os.path.isfile, (f"{file[:-4]}_labels.npy" for file in files))
    stats = [(f, os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in [*files, *beside]]
    template = template_text(tok, cfg) if tok.eos or "<|im_end|>" in tok.special else ""
    keys = ("seq_len", "train_on", "on_error", "ignore_token_ids", "ignore_token_id_range", "ignore_index")
    prints = {"source": digest(stats), "tokenizer": tok.fingerprint, "template": digest(template),
              "options": digest(FORMAT, [data[key] for key in keys], source["shape"], source["separator"])}
    folder = Path(data["cache_dir"]) / f"{name.split('.')[-1]}-{digest(prints)}"
    if (folder / "header.json").is_file():
        return folder

    ignored, ids = np.zeros(tok.n_vocab, bool), np.arange(tok.n_vocab)
    low, high = data["ignore_token_id_range"] or (1, 0)
    ignored[(low <= ids) & (ids <= high) | np.isin(ids, data["ignore_token_ids"])] = True
    dtype = np.uint16 if tok.n_vocab <= 1 << 16 else np.uint32
    STATE.update(tok=tok, template=None, shape=shape, dtype=dtype, cfg=cfg, ignored=ignored)
    counted = ("documents", "records", "chats", "trained", "longest", "truncated", "dropped", "cut_away", "skipped")
    counts, offset, problems = collections.Counter(dict.fromkeys(counted, 0)), 0, []
    building = folder.with_name(f"{folder.name}.building.{os.getpid()}")
    shutil.rmtree(building, ignore_errors=True)
    try:
        building.mkdir(parents=True)
        create = lambda name: open(building / name, "wb")
        with create("tokens.bin") as tokens, create("mask.bin") as masks, create("offsets.bin") as offsets, \
                create("targets.bin") as targets:
            offsets.write(np.zeros(1, np.int64).tobytes())
            jobs = (job for file in files for job in chunks(file, source["separator"]))
            results = encoded(jobs, sum(size for _, size, _ in stats), data["processes"], quiet, name)
            for ids, mask, lengths, more, bad in whole(results, data["seq_len"]):
                tokens.write(ids)
                masks.write(mask)
                offsets.write(offset + np.cumsum(lengths))
                targets.write(count_targets(mask, lengths))
                offset += len(ids)
                counts.update(more, documents=len(lengths), trained=int(mask.sum()))
                counts["longest"] = max(counts["longest"], int(lengths.max(initial=0)))
                problems = (problems + bad)[:3]
        if not counts["documents"]:
            raise configs.UserError(f"data.{name}: {source['path']} holds nothing to train on ({counts['records']} records, "
                             f"{counts['dropped']} documents without a trained token, {counts['skipped']} skipped"
                             f"{': ' + problems[0] if problems else ''})")
        header = {"format": FORMAT, "dtype": np.dtype(dtype).name, "tokens": offset, "fingerprints": prints,
                  "files": files, "vocabulary": tok.n_vocab, "problems": problems} | counts
        (building / "header.json").write_text(json.dumps(header, indent=1) + "\n")
        os.replace(building, folder)
    except OSError as e:
        if not (folder / "header.json").is_file():                   # else another process was faster: the same result
            raise configs.UserError(f"{folder}: cannot write token files ({e.strerror}); "
                             "data.cache_dir says where they go") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


class Tokens:
    """A source's token files: document i is tokens[offsets[i]:offsets[i + 1]], for i from first to last."""

    def __init__(self, folder, first=0, last=None):
        self.folder = Path(folder)
        self.header = read_json(self.folder / "header.json")
        last = self.header["documents"] if last is None else last
        read = lambda name, dtype: np.asarray(np.memmap(self.folder / name, dtype, "r"))    # its slices are cheaper
        self.tokens, self.mask = read("tokens.bin", self.header["dtype"]), read("mask.bin", np.uint8)
        self.offsets = read("offsets.bin", np.int64)[first:last + 1]
        self.n_targets = read("targets.bin", np.uint32)[first:last]  # of each document

    def __len__(self):
        return len(self.offsets) - 1

    def lengths(self, i):
        """Targets and inputs of documents i: one fewer than their tokens."""
        return self.offsets[np.asarray(i) + 1] - self.offsets[np.asarray(i)] - 1

    def document(self, i):
        """(tokens [n], mask [n])"""
        where = slice(self.offsets[i], self.offsets[i + 1])
        return self.tokens[where], self.mask[where]


def require_train_data(cfg):
    """The first thing to say where nothing is said. Raises ValueError."""
    if not cfg["data"]["train"]:
        raise configs.UserError("data.train: no source is named; data.train.NAME.path=FILE names one")


def load_datasets(cfg, tok=None, quiet=False):
    """cfg -> {"train": {name: Tokens}, "validation": {name: Tokens}}, tokenizing what is not there yet.

    data.validation_split takes the last documents of each training source. Raises ValueError, with file and line, for
    what can't be read.
    """
    require_train_data(cfg)
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
            raise configs.UserError(f"data.validation_split: {split} of {name}'s {len(tokens)} documents leaves nothing "
                             f"to {'validate' if held < 1 else 'train'} on")
        if name in out["validation"]:
            raise configs.UserError(f"data.validation_split: data.validation.{name} is there already; give one of the two")
        kept = len(tokens) - held
        out["train"][name], out["validation"][name] = Tokens(tokens.folder, 0, kept), Tokens(tokens.folder, kept)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# show: what a person looks at
# Counts, lengths, and samples with the trained part marked: a template that masks wrongly is seen here before a step.

def summary(name, tokens):
    h = tokens.header
    away = f", {h['cut_away']:,} of them by cutting" if h["cut_away"] else ""
    told = {"truncated": "cut off", "dropped": f"dropped (nothing to train on{away})",
            "skipped": f"skipped ({', '.join(h['problems'][:1])})"}
    return (f"{name}: {len(tokens):,} documents, {int(tokens.offsets[-1] - tokens.offsets[0]):,} tokens"
            f" ({h['trained'] / h['tokens']:.0%} trained), longest {h['longest']:,}"
            + "".join(f", {h[key]:,} {words}" for key, words in told.items() if h[key]))


def histogram(tokens):
    """How long the documents are -> lines, one for each power of two that is met."""
    bins = np.bincount(np.ceil(np.log2(np.diff(tokens.offsets))).astype(int))
    return [f"  {f'<= {1 << i:,}':>12} tokens  {n:>10,}  {'#' * -(-40 * int(n) // int(bins.max()))}"
            for i, n in enumerate(bins) if n]


def shown(tok, ids, mask, colour):
    """The text of a document: its trained part in green, special tokens inverted; without colour in [[ ]]."""
    parts, borders = [], np.flatnonzero(np.diff(mask)) + 1
    for part, m in zip(np.split(ids, borders), np.split(mask, borders)):
        text = tok.decode(part)
        if colour:
            text = tok.every_pattern.sub(lambda m: f"\x1b[7m{m[0]}\x1b[27m", text)
            parts.append(f"\x1b[{32 if m[0] else 2}m{text}\x1b[0m")
        else:
            parts.append(f"[[{text}]]" if m[0] else text)
    return "".join(parts)


def main(argv):
    asked, argv = configs.pop_options(argv, show=0, ids=False)
    cfg, _, _ = configs.load(argv)
    require_train_data(cfg)
    tok = load_tokenizer(cfg)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for kind, sources in load_datasets(cfg, tok).items():
        for name, tokens in sources.items():
            print(summary(f"{kind}.{name}", tokens), f"  in {tokens.folder}", *histogram(tokens), sep="\n")
            for i in range(min(asked["show"], len(tokens))):
                ids, mask = tokens.document(i)
                print(f"\n--- {name} {i}: {len(ids)} tokens, {int(mask.sum())} trained, "
                      f"{'in green' if colour else 'in [[ ]]'}\n{shown(tok, ids, mask, colour)}")
                for at, (token, m) in enumerate(zip(ids, mask) if asked["ids"] else ()):
                    print(f"{at:>6} {token:>7} {'trained' if m else '-':<8}{tok.decode([token])!r}")


if __name__ == "__main__":
    configs.exit_with_help(__doc__, sys.argv[1:])
    configs.run(main, sys.argv[1:])
