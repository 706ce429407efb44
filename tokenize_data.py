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
    header.json    format, dtype, counts, fingerprints; written last
"""
import base64, codecs, collections, concurrent.futures, glob, gzip, hashlib, itertools, json, multiprocessing, os, re
import shutil, sys, unicodedata, zlib
from datetime import datetime
from pathlib import Path

import numpy as np
import tiktoken

import configs

FORMAT = 2


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


def one_line(error):
    text = " ".join(str(error).split())
    return text if len(text) < 600 else f"{text[:300]} … {text[-200:]}"


def digest(*things):
    return hashlib.sha256(json.dumps(things, default=str).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# records in: what people's files hold, as {"text": …} or {"messages": […]}
#
# Shapes are found by their keys, so that nobody writes a line to convert a file. Files are read in chunks of about
# BLOCK bytes, which bounds the memory and is what the cores share; a chunk is parsed where it is encoded.

ROLES = {"user": "user", "human": "user", "system": "system", "developer": "system", "assistant": "assistant",
         "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant", "tool": "tool",
         "function_call": "assistant", "observation": "tool", "function_response": "tool"}
ASKED = (("instruction", "output"), ("instruction", "response"), ("prompt", "completion"), ("prompt", "response"),
         ("question", "answer"), ("query", "response"))
TURNS, WEIGHTS = ("messages", "conversations"), ("weight", "loss_weight", "train")
KNOWN = "messages, conversations, text, " + ", ".join(" + ".join(pair) for pair in ASKED)


def normal(record, where, shape="auto"):
    """One record, whatever its keys -> {"text": str}, or {"messages": [{"role", "content", …}], …}; or ValueError."""
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
    chat = {"messages": [message(turn, where, n) for n, turn in enumerate(turns, 1)]}
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools.strip() or "[]")
        except ValueError:
            fail("tools is no JSON")
    if tools and not isinstance(tools, list):
        fail(f"tools must be a list, got {type(tools).__name__}")
    return chat | ({"tools": tools} if tools else {})


def message(turn, where, n):
    """One message, whatever its keys -> {"role": a role of the templates, "content": str, "weight": 0 or 1, …}."""
    def fail(what):
        raise ValueError(f"{where}: message {n}: {what}")
    if not isinstance(turn, dict):
        fail(f"expected an object, got {type(turn).__name__}")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        fail(f"role {role!r} is none of {', '.join(ROLES)}")
    rest = {k: v for k, v in turn.items() if k not in MESSAGE and v is not None}
    if role == "function_call":
        try:                                                         # one call, or a list of them
            calls = json.loads(content) if isinstance(content, str) else content
            calls = [{k: c[k] for k in ("name", "arguments")} for c in (calls if isinstance(calls, list) else [calls])]
            rest["tool_calls"] = [{"type": "function", "id": f"call{n:05}", "function": call} for call in calls]
        except (ValueError, KeyError, TypeError):
            fail("a function_call must be JSON with a name and arguments")
        content = None
    if role in ("observation", "function_response"):
        rest.setdefault("tool_call_id", f"call{n - 1:05}")           # some templates insist on one
    if isinstance(content, list):                                    # of parts: {"type": "text", "text": "…"}
        parts = [part.get("text", part.get("value")) if isinstance(part, dict) else part for part in content]
        if all(isinstance(part, str) for part in parts):
            content = "".join(parts)
    for key, kind in (("tool_calls", list), ("reasoning_content", str)):
        if not rest.get(key):
            rest.pop(key, None)
        elif not isinstance(rest[key], kind):
            fail(f"{key} must be {'a list' if kind is list else 'text'}, got {type(rest[key]).__name__}")
    if not all(isinstance(call, dict) for call in rest.get("tool_calls", ())):
        fail("tool_calls must be a list of objects")
    if content is None and "tool_calls" in rest:
        content = ""
    if not isinstance(content, str):
        fail(f"content must be text, got {type(content).__name__}")
    weight = next((turn[k] for k in WEIGHTS if turn.get(k) is not None), 1)
    if weight not in (0, 1):
        fail(f"a weight of {weight!r}: a message is trained (1) or not (0)")
    return rest | {"role": ROLES[role], "content": content, "weight": int(weight)}


MESSAGE = ("role", "from", "content", "value", *WEIGHTS)
ENDINGS = (".jsonl", ".json", ".txt", ".jsonl.gz", ".json.gz", ".txt.gz", ".parquet", ".npy")
BLOCK = 1 << 18                                                      # bytes of a file in one job


def find_files(path, key):
    """A file, a folder or a glob -> its files, sorted. Raises ValueError where there is none."""
    if Path(path).is_dir():
        found = [str(f) for f in Path(path).rglob("*") if f.name.endswith(ENDINGS)]
    else:
        found = [path] if Path(path).is_file() else glob.glob(path, recursive=True)
    found = sorted(f for f in found if Path(f).is_file() and not f.endswith("_labels.npy"))
    if not found:
        raise ValueError(f"{key}: no file at {path} (a file, a folder or a glob of {', '.join(ENDINGS)})")
    if odd := [f for f in found if not f.endswith(ENDINGS)]:
        raise ValueError(f"{key}: {odd[0]} ends in none of {', '.join(ENDINGS)}")
    return found


def chunks(file, separator):
    """A file -> ((file, number of its first record, [raw records], part), bytes of it read), about BLOCK at a time.

    A raw record is JSON as bytes (parsed later, on every core), a text, or what .parquet and .npy hold. A document too
    long for one job comes in parts, each (begins it, ends it); else part is None.
    """
    kind = file.removesuffix(".gz").rpartition(".")[2]
    read = {"jsonl": lines, "json": values, "txt": texts, "parquet": rows, "npy": ids_of}[kind]
    try:
        with open(file, "rb") as raw, (gzip.open(raw) if file.endswith(".gz") else raw) as f:
            first, done = 1, 0
            for records, part in read(f, file, *([separator] if kind == "txt" else [])):
                at = raw.tell() if not raw.closed else done
                yield (file, first, records, part), at - done
                first, done = first + (len(records) if part is None or part[1] else 0), at
    except (OSError, EOFError, zlib.error) as e:
        raise ValueError(f"{file}: cannot be read ({getattr(e, 'strerror', None) or e})") from None


def lines(f, file):
    """.jsonl: lines, which are parsed where they are encoded"""
    while found := f.readlines(BLOCK):
        yield found, None


def decoded(f, file):
    """A file's text, block by block, the last one empty"""
    decoder, block = codecs.getincrementaldecoder("utf-8-sig")(), b"?"       # some editors begin a file with a mark
    while block:
        at, block = f.tell(), f.read(BLOCK)
        try:
            yield decoder.decode(block, final=not block)
        except UnicodeDecodeError as e:
            raise ValueError(f"{file}: not UTF-8 text (about byte {at + e.start})") from None


def values(f, file):
    """.json: the items of its list, cut apart here and parsed where they are encoded; or lines after all"""
    text, at, n, found, gap = "", 0, 0, [], re.compile(r"\s*,\s*")
    for block in decoded(f, file):
        text, at, end = text[at:] + block, 0, 0
        if not n and text.lstrip()[:1] == "{":
            f.seek(0)
            yield from lines(f, file)
            return
        while end >= 0:
            begin = gap.match(text, at) if n else re.match(r"\s*\[\s*", text)
            try:
                end = json.JSONDecoder().raw_decode(text, begin.end())[1] if begin else -1
            except json.JSONDecodeError as e:                        # an error, or the rest of the item is to come
                if e.pos < len(text) - BLOCK and "Unterminated" not in e.msg:
                    raise ValueError(f"{file}, record {n + 1}: not valid JSON: {e.msg}") from None
                end, why = -1, e.msg
            except (ValueError, RecursionError) as e:                # a number too long, an item too deep
                raise ValueError(f"{file}, record {n + 1}: {one_line(e)}") from None
            if end >= 0:
                found.append(text[begin.end():end].encode())
                at, n = end, n + 1
        if found:
            yield found, None
            found = []
    if not re.fullmatch(r"\s*\]\s*" if n else r"\s*\[\s*\]\s*", text[at:]):
        why = why if begin else "a comma or the end is expected" if n else "a list is expected"
        raise ValueError(f"{file}, record {n + 1}: not valid JSON: {why}")


def texts(f, file, separator):
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
    encode = STATE["tok"].encode
    for c in "\n ":
        at = len(text) - near
        for _ in range(100):
            at = text.rfind(c, near, at)
            if at < 0:
                break
            here = at + (c == "\n")                                  # newlines end what they follow, spaces begin words
            a, b = text[here - near:here], text[here:here + near]
            if not (b[0] if c == "\n" else a[-1]).isspace() and [*encode(a), *encode(b)] == [*encode(a + b)]:
                return here
    return 0


def rows(f, file):
    """.parquet, by the optional pyarrow"""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{file}: reading .parquet needs pyarrow; pip install pyarrow") from None
    try:
        table, done, size = pyarrow.parquet.ParquetFile(file), 0, os.path.getsize(file)
        for batch in table.iter_batches(512):
            done += len(batch)
            f.seek(size * done // table.metadata.num_rows)           # where the progress bar looks
            yield batch.to_pylist(), None
    except (OSError, pyarrow.ArrowException) as e:
        raise ValueError(f"{file}: not a .parquet file: {str(e).splitlines()[0]}") from None


def ids_of(f, file):
    """.npy: ready token ids, one document; with FILE_labels.npy beside it, where data.ignore_index is not trained"""
    try:
        read = lambda path: np.load(path, mmap_mode="r", allow_pickle=False).reshape(-1)
        ids, beside = read(file), f"{file[:-4]}_labels.npy"
        labels = read(beside) if Path(beside).is_file() else ids
    except (ValueError, EOFError) as e:
        raise ValueError(f"{file}: no array of token ids: {one_line(e)}") from None
    if ids.dtype.kind not in "iu" or len(labels) != len(ids):
        raise ValueError(f"{file}: expected ints, as many as labels; got {len(ids)} {ids.dtype}, {len(labels)} labels")
    for at in range(0, len(ids), BLOCK):
        part, said, size = ids[at:at + BLOCK], labels[at:at + BLOCK], STATE["tok"].n_vocab
        mask = (said != STATE["cfg"]["data"]["ignore_index"]).astype(np.uint8)
        if not 0 <= part.min() <= part.max() < size or (said != part)[mask > 0].any():
            raise ValueError(f"{file}: near token {at}: an id that the tokenizer ({size} tokens) lacks, or a label "
                             "that is neither data.ignore_index nor the token")
        f.seek(at * ids.itemsize)
        yield [(np.array(part), mask)], (at == 0, at + BLOCK >= len(ids))


# ---------------------------------------------------------------------------------------------------------------------
# the tokenizer: text -> ids
#
# All are tiktoken encodings, with what a model's files say beside them. A converted one proves that it is exact, or is
# refused by the name of what tiktoken would do otherwise: ids that are nearly right train a model that is nearly right.

class Tokenizer:
    """Text <-> ids.

    ranks     {token's bytes: id}, the order in which pairs are merged
    pattern   regular expression that splits text into words; merges don't cross it
    special   {text: id} of control tokens: a template writes them; what spells one in a message is text
    bos, eos  texts of special tokens, or None
    template  jinja text of the model's own chat template, or None
    nfc       text is brought to Unicode's composed form first (Qwen)
    folder    where its Hugging Face files are, or None
    added     {text: id} of tokens that no words are split around, wherever they are spelled (Qwen's <tool_call>)
    strip     {text: (left, right)}: special or added tokens that swallow the white space beside them
    late      texts of special or added tokens that are looked for only in what the others leave over
    names     {"pad_token": text, …}: more names that templates may ask for
    """

    def __init__(self, ranks, pattern, special, bos=None, eos=None, template=None, nfc=False, folder=None,
                 added={}, strip={}, late=(), names={}):
        self.ranks, self.pattern, self.special, self.bos, self.eos = ranks, pattern, special, bos, eos
        self.template, self.nfc, self.folder, self.names, self.strip = template, nfc, folder, names, strip
        missing = [b for b in range(256) if bytes([b]) not in ranks]
        if missing:                                                  # such a byte would take tiktoken's process down
            raise ValueError(f"tokenizer: its vocabulary lacks {len(missing)} of the 256 single bytes "
                             f"(the first is {missing[0]})")
        if len(set(ranks.values())) < len(ranks):                    # so would this
            raise ValueError("tokenizer: two of its vocabulary's tokens have the same id")
        assert all(text is None or text in special for text in (bos, eos)), (bos, eos)
        self.every = special | added
        self.enc = tiktoken.Encoding("ours", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.every)
        self.n_vocab = 1 + max([*ranks.values(), *self.every.values()])
        self.lengths = np.zeros(self.n_vocab, np.int64)              # bytes of each token
        self.lengths[list(ranks.values())] = list(map(len, ranks))
        self.lengths[list(self.every.values())] = [len(s.encode()) for s in self.every]
        self.byte_ids = None                                         # byte -> id, where there is nothing to merge
        if len(ranks) == 256:
            self.byte_ids = np.array([ranks[bytes([b])] for b in range(256)], np.uint32)
        self.special_pattern, self.every_pattern = any_of(special), any_of(self.every)
        self.escaped_pattern = any_of(as_json(text)[1:-1] for text in special)
        self.passes = [any_of(set(self.every) - set(late)), *([any_of(late)] if late else [])]
        texts = sorted(self.every)
        doubtful = strip or late or any(b.startswith(a) for a, b in zip(texts, texts[1:]))
        self.alone = not doubtful and self.byte_ids is None          # tiktoken itself finds special and added tokens
        self.allowed = {False: frozenset(added), True: frozenset(self.every)}
        vocabulary = hashlib.sha256(b"".join(ranks) + np.array([list(map(len, ranks)), list(ranks.values())]).tobytes())
        self.fingerprint = digest(pattern, sorted(special.items()), bos, eos, nfc, vocabulary.hexdigest(),
                                  sorted(added.items()), sorted(strip.items()), sorted(late))

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
            allowed = self.allowed[held is not None]
            try:
                ids = self.enc.encode_to_numpy(text, allowed_special=allowed, disallowed_special=())
                at = borders if text.isascii() else [len(text[:b].encode()) for b in borders]
                return ids, self.lengths[ids].cumsum(), at
            except ValueError:                                       # as in words(), which mends it
                pass
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

    def __init__(self, path, spec, special, added, **more):
        import tokenizers
        self.private = {text: f"\ufdd4{n}\ufdd5" for n, text in enumerate(special)}
        hidden = lambda text: self.private.get(text, text)
        vocab, unknown = spec["model"]["vocab"], spec["model"].get("unk_token")
        renamed = [(hidden(text), i) for text, i in (vocab.items() if isinstance(vocab, dict) else vocab)]
        model = spec["model"] | {"vocab": dict(renamed) if isinstance(vocab, dict) else renamed}    # Unigram's: a list
        tokens = [t | {"content": hidden(t["content"]), "normalized": t["normalized"] and not t["special"]}
                  for t in spec.get("added_tokens") or []]
        spec = spec | {"post_processor": None, "truncation": None, "padding": None, "added_tokens": tokens,
                       "model": model | ({"unk_token": hidden(unknown)} if unknown else {})}
        try:
            self.enc = tokenizers.Tokenizer.from_str(json.dumps(spec))
        except Exception as e:                                       # the package raises no narrower one
            raise ValueError(f"{path}: the tokenizers package cannot read it either: {one_line(e)}") from None
        self.special, self.folder, self.nfc, self.n_vocab = special, path.parent, False, self.enc.get_vocab_size()
        self.special_pattern, self.every_pattern = any_of(special), any_of(special | added)
        self.escaped_pattern = any_of(as_json(text)[1:-1] for text in special)
        self.bos, self.eos, self.template, self.names = (more[k] for k in ("bos", "eos", "template", "names"))
        self.fingerprint = digest(hashlib.sha256(path.read_bytes()).hexdigest(), self.bos, self.eos)

    clean, encode = Tokenizer.clean, Tokenizer.encode

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
        return re.sub("\ufdd4\\d+\ufdd5", lambda m: names[m[0]], text)


SPACE = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and not "\x1c" <= c <= "\x1f")     # as Unicode has it


def any_of(special):
    """Special tokens -> the pattern that finds them, the longest first; it finds nothing where there is none."""
    return re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")


GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_PATTERN = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"   # StarCoder's
PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
# byte -> the letter that GPT-2 spells it with; what isn't printable is moved up to U+0100
LETTERS = dict(zip([*PRINTED, *sorted({*range(256)} - {*PRINTED})], map(chr, [*PRINTED, *range(256, 324)])))
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
        if text not in (None, "", *tok.special):
            raise ValueError(f"data.{key}: {text!r} is no special token of {name}; "
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


def huggingface_tokenizer(path):
    """A byte-level BPE tokenizer.json (or its folder) -> Tokenizer; what isn't one exactly is Borrowed, or refused."""
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a tokenizer's folder must hold a tokenizer.json")
    try:
        return read_huggingface(path)
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as e:
        raise ValueError(f"{path}: not a whole tokenizer.json ({type(e).__name__}: {one_line(e)})") from None


def read_huggingface(path):
    """tokenizer.json and what stands beside it -> a tokenizer; a damaged file may raise anything"""
    spec, beside = read_json(path), path.parent / "tokenizer_config.json"
    config = read_json(beside) if beside.is_file() else {}
    if not isinstance(spec.get("model"), dict) or "vocab" not in spec["model"]:
        raise ValueError(f"{path}: has no model with a vocab; it is not a tokenizer.json")

    template = config.get("chat_template")
    if isinstance(template, list):                                   # several, by name
        template = next((t.get("template") for t in template if t.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{beside}: chat_template must be text, got {type(template).__name__}")
    if (path.parent / "chat_template.jinja").is_file():
        template = read_text(path.parent / "chat_template.jinja")
    tokens = spec.get("added_tokens") or []
    special, added = ({t["content"]: t["id"] for t in tokens if t["special"] == kind} for kind in (True, False))

    post = spec.get("post_processor") or {}                          # what it puts around a text, where no name says so
    around = [piece for step in post.get("processors") or [post] for piece in step.get("single") or ()] or [{}]
    names = {key: piece.get("SpecialToken", {}).get("id")
             for key, piece in (("bos_token", around[0]), ("eos_token", around[-1]))}
    for key in config:
        text = config[key].get("content") if isinstance(config[key], dict) else config[key]
        if key.endswith("_token") and isinstance(text, str):         # "TEXT", or {"content": "TEXT", …}
            names[key] = text
    bos, eos = (names[key] if names[key] in special else None for key in ("bos_token", "eos_token"))
    more = dict(bos=bos, eos=eos, template=template, names={k: text for k, text in names.items() if text})
    try:
        ranks, pattern, nfc = byte_level(path, spec, special | added)
        tok = Tokenizer(ranks, pattern, special, nfc=nfc, folder=path.parent, added=added, **more,
                        strip={t["content"]: (t["lstrip"], t["rstrip"]) for t in tokens if t["lstrip"] or t["rstrip"]},
                        late=[t["content"] for t in tokens if t["normalized"]])
        prove(tok, spec["model"], path)
    except ValueError as e:
        try:
            tok = Borrowed(path, spec, special, added, **more)
        except ImportError:
            raise ValueError(f"{e}; with `pip install tokenizers` it would run there") from None
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"note: {e}; the tokenizers package runs it", file=sys.stderr, flush=True)
    return tok


def refuse(path, what):
    raise ValueError(f"{path}: {what} cannot be carried over exactly; "
                     "supported are byte-level BPE tokenizers (GPT-2, Llama 3, Qwen kinds)")


def byte_level(path, spec, added):
    """A byte-level BPE tokenizer.json -> (ranks, pattern, nfc). ValueError for what tiktoken would do otherwise."""
    bpe = spec["model"]
    if bpe.get("type", "BPE") != "BPE" or bpe.get("byte_fallback") or "merges" not in bpe:
        refuse(path, f"a {bpe.get('type')} model{' with byte fallback' if bpe.get('byte_fallback') else ''}")
    if odd := [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if bpe.get(key)]:
        refuse(path, f"model.{odd[0]}")
    normalizer = (spec.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        refuse(path, f"the normalizer {normalizer}")

    pre = spec.get("pre_tokenizer") or {}
    *before, last = pre.get("pretokenizers") or [pre]                # ByteLevel, alone or after Split or Digits
    split, prefixed, splits = before[0] if before else {}, last.get("add_prefix_space"), last.get("use_regex", True)
    regex = split.get("pattern", {}).get("Regex")
    if last.get("type") != "ByteLevel" or prefixed or len(before) > 1:
        names = " + ".join(str(step.get("type")) for step in [*before, last])
        refuse(path, f"the pre-tokenizer {names}{' with a prefix space' if prefixed else ''}")
    if not before:
        pattern = GPT2_PATTERN if splits else r"[\s\S]+"
    elif split["type"] == "Digits" and splits:
        pattern = DIGITS_PATTERN if split["individual_digits"] else DIGITS_PATTERN.replace(r"\p{N}|", r"\p{N}+|", 1)
    elif regex and not splits and (split["behavior"], split["invert"]) in (("Isolated", False), ("Removed", True)):
        pattern = regex
    else:
        refuse(path, f"the pre-tokenizer {split.get('type')} before ByteLevel")

    for t in spec.get("added_tokens") or []:
        if t["single_word"] or t["normalized"] and normalizer and not t["content"].isascii():
            refuse(path, f"the {'single_word' if t['single_word'] else 'normalized'} added token {t['content']!r}")
    spelled = {b: "\uffff" for b in range(256)} | {ord(c): chr(b) for b, c in LETTERS.items()}
    try:
        ranks = {token.translate(spelled).encode("latin-1"): i
                 for token, i in bpe["vocab"].items() if token not in added}
    except UnicodeEncodeError as e:
        refuse(path, f"a vocabulary with {e.object!r}, which is not spelled in bytes,")
    return ranks, pattern, normalizer == "NFC"


NASTY = ("", " ", "a", "Hello, world! I'll we'd they're DON'T", "  two  spaces   three    four",
         "tab\tnew\nline\r\n\r\n\n  end  ", "naïve café Ünïcödé", "1234567890 3.14 1,000,000 ½ ٣", "日本語と中文，한국어",
         "עברית العربية", "👩‍👩‍👧 🏳️‍🌈 🤖", "\x00\x01\x7f\x1b[0m", "_under_score__ --flag=value // /* x */",
         "aaaaaaaaaaaaaaaaaaaaaaaaa", "\u200b\u00a0\u3000\ufeff", "e\u0301 o\u0308", " \n \n\n\t x",
         "<|endoftext|> <|im_end|>", "if (x==1) {\n    return y;\n}")


def prove(tok, bpe, path):
    """Hold the tiktoken encoding against merging by the list of merges itself, on strings that tend to go wrong."""
    import regex                                                     # tiktoken brings it
    pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in bpe["merges"]]
    order = {tuple(pair): n for n, pair in enumerate(pairs)}
    for text in NASTY:
        text = tok.clean(text)
        want, words = [], regex.findall(tok.pattern, text)
        if "".join(words) != text:
            refuse(path, f"a pattern that leaves something out (seen on {text!r})")
        for word in words:
            parts = [LETTERS[b] for b in word.encode()]
            if bpe.get("ignore_merges") and "".join(parts) in bpe["vocab"]:
                parts = ["".join(parts)]
            while best := min((p for p in zip(parts, parts[1:]) if p in order), key=order.get, default=None):
                at = next(i for i in range(len(parts)) if tuple(parts[i:i + 2]) == best)
                parts[at:at + 2] = ["".join(best)]
            want += [bpe["vocab"].get(p) for p in parts]
        if tok.words(text).tolist() != want:
            refuse(path, f"its order of merges (seen on {text!r})")


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
        spell = lambda token: "".join(LETTERS[b] for b in token)
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        pattern = re.sub(r"(\{\d+,\d*\})\+", r"\1", tok.pattern)       # {1,3}+ means another thing there
        words = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
        spec = {"version": "1.0", "decoder": level,
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, level]},
                "added_tokens": [{"id": i, "content": text, **plain} for text, i in tok.special.items()],
                "model": {"type": "BPE", "ignore_merges": True,
                          "vocab": {spell(token): i for token, i in tok.ranks.items()},
                          "merges": [f"{spell(a)} {spell(b)}" for a, b in merges_of(tok.ranks)]}}
        (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if path.is_file():
        config = read_json(path)
    config |= {f"{key}_token": text for key in ("bos", "eos")
               if (text := getattr(tok, key)) and f"{key}_token" not in config}
    if template_text and template_text != tok.template:
        config["chat_template"] = template_text
        (folder / "chat_template.jinja").unlink(missing_ok=True)     # another one came along, and would win
    path.write_text(json.dumps(config, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# template and mask: a chat -> ids, and which of them are trained
#
# The model's own jinja renders the chat, and the ids are those of the whole text. Where each message stands in it is
# found from renderings too, with marks in place of contents: a template may trim, merge, drop or add what it likes.

CHATML = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
PLAIN = ("{% for message in messages %}{{ message.role }}:\n{{ message.content }}{{ eos_token }}\n{% endfor %}"
         "{% if add_generation_prompt %}assistant:\n{% endif %}")      # for vocabularies without ChatML's two tokens
OPEN, CLOSE, BEGIN, END = "\ufdd0\ufdd4\ufdd1", "\ufdd1\ufdd5\ufdd0", "\ufdd2\ufdd4\ufdd3", "\ufdd3\ufdd5\ufdd2"
BREAK = "\ufdd6"                                                     # marks, of code points that no text uses
MORE = ("reasoning_content", "tool_calls")                           # what an assistant's turn may hold besides content


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

    class Generation(jinja2.ext.Extension):                          # {% generation %} trained {% endgeneration %}
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

        def mark(self, caller):
            return BEGIN + caller() + END

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        def getattr(self, obj, name):                                # the way by an exception takes half of the time
            plain = type(obj) is dict and name in obj and not hasattr(dict, name)
            return obj[name] if plain else super().getattr(obj, name)

    env = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    # jinja's own tojson escapes for HTML
    env.filters["tojson"] = lambda x, indent=None, **more: json.dumps(x, ensure_ascii=False, indent=indent, **more)
    env.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: datetime.now().strftime(form)}
    env.globals |= {"tools": None, "documents": None}
    env.writes_calls = "tool_calls" in text
    try:
        template = env.from_string(text)
        template.globals = dict(template.globals)                    # a ChainMap, which every rendering copies
        return template
    except jinja2.TemplateSyntaxError as e:
        raise ValueError(f"the chat template's line {e.lineno}: {one_line(e.message)}") from None


def render(template, tok, messages, prompt=False, **more):
    """Messages -> text. `prompt`: with the opening of an assistant's turn, as for generation."""
    names = tok.names | {"add_generation_prompt": prompt, "bos_token": tok.bos or "", "eos_token": tok.eos or ""}
    try:
        return template.render(messages=messages, **names, **more)
    except Exception as e:                                           # a template may raise whatever Python raises
        raise ValueError(f"the chat template refuses these messages: {one_line(e) or type(e).__name__}") from None


def unmarked(text):
    """A rendered text without the marks of {% generation %}."""
    return text.replace(BEGIN, "").replace(END, "")


as_json = json.JSONEncoder(ensure_ascii=False, default=str).encode


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
    """Messages -> (messages, text with the marks of {% generation %}, spans in it that only spell special tokens).

    Those are found by rendering once more with each of them broken by a character that no text holds.
    """
    if not template.environment.writes_calls:                        # then nothing is lost: the calls are content
        calls = lambda m: [as_json(call.get("function", call)) for call in m["tool_calls"]]
        messages = [m | {"content": "\n".join([*filter(None, [m["content"]]), *calls(m)]), "tool_calls": None}
                    if m.get("tool_calls") else m for m in messages]
    text, spelled = render(template, tok, messages, prompt, **more), []
    if tok.escaped_pattern.search(as_json([messages, more])):        # quicker than looking into every string
        in_strings(lambda s: spelled.extend(tok.special_pattern.findall(s)), [messages, more])
    if not spelled:
        return messages, text, []
    broken = lambda s: tok.special_pattern.sub(lambda m: m[0][0] + BREAK + m[0][1:], s)
    marked = unmarked(render(template, tok, in_strings(broken, messages), prompt, **in_strings(broken, more)))
    parts = marked.split(BREAK)
    if "".join(parts) != unmarked(text):
        raise ValueError(f"the chat template looks for {' or '.join(sorted(set(spelled)))} in messages, where it is "
                         "text and no control token; reasoning goes into reasoning_content")
    return messages, text, [(at - 1, at) for at in itertools.accumulate(map(len, parts[:-1]))]


def located(tok, template, messages, text, wanted, **more):
    """Where the `wanted` messages stand in the rendered text -> [(start, end, index)], ascending.

    Rendered once more with marks for their contents, the template shows what it writes between them. Where that isn't
    what stands between the real ones (it looks into them, or writes more than contents), each is exchanged alone.
    """
    bare = {i: {"role": messages[i]["role"], "content": f"{OPEN}{i}{CLOSE}"} for i in wanted}
    plain = [i for i in wanted if not any(messages[i].get(key) for key in MORE)]
    shown = [messages[i] | bare[i] if i in plain else m for i, m in enumerate(messages)]
    first, *rest = re.split(f"{OPEN}(\\d+){CLOSE}", unmarked(render(template, tok, shown, **more))) if plain else ["\0"]
    found, at, opening = [], len(first), None
    for i, between in zip(map(int, rest[::2]), rest[1::2]) if text.startswith(first) else ():
        whole = messages[i]["content"]                           # as it is, trimmed by the template, or a part
        ends = [at + len(form) for form in (whole, whole.strip(), whole.lstrip(), whole.rstrip())
                if text.startswith(form + between, at)]
        ends = ends or [text.find(between, at) if between else -1]
        if ends[0] < 0 or text[at:ends[0]] not in whole:
            break
        found.append((at, ends[0], i))
        at = ends[0] + len(between)
    else:
        found = found if at == len(text) else []

    for i in sorted(set(wanted) - {i for _, _, i in found}):
        floor = max((end for _, end, before in found if before < i), default=0)
        try:
            whole, other = text, [*messages[:i], bare[i], *messages[i + 1:]]
            other = unmarked(render(template, tok, other, **more))
        except ValueError:                                           # it has rules for what may follow
            whole = unmarked(render(template, tok, messages[:i + 1], **more))
            other = unmarked(render(template, tok, [*messages[:i], bare[i]], **more))
        before, mark, after = other.partition(bare[i]["content"])
        if not mark:                                                 # this template doesn't write this message
            continue
        alone = whole.startswith(before) and whole[len(before):].endswith(after)
        if not alone:                                                # it changes something else with the content
            before = os.path.commonprefix([whole, other])
            after = os.path.commonprefix([whole[len(before):][::-1], other[len(before):][::-1]])
        start, end = len(before), len(whole) - len(after)
        if whole is not text:
            start = text.find(whole[start:end], floor)
            end += start - len(before)
        if not alone or any(messages[i].get(key) for key in MORE):   # all that is generated is trained
            if opening is None:
                asked = unmarked(render(template, tok, messages, True, **more))
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
    messages, marked, held = prepared(tok, template, messages, **more)
    if re.search("[\ud800-\udfff]", marked):                         # lone surrogates
        messages, more = in_strings(tok.clean, messages), in_strings(tok.clean, more)
        messages, marked, held = prepared(tok, template, messages, **more)
    text = unmarked(marked)
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=None)
    off = [i for i, m in enumerate(messages)                         # never trained
           if m["role"] == "tool" or not m.get("weight", 1) or train_on == "last" and i != last]
    on = sorted({i for i, m in enumerate(messages) if m["role"] == "assistant"}.difference(off))
    by_marks = BEGIN in marked and train_on != "everything"
    wanted = [i for i in (off if by_marks or train_on == "everything" else on)
              if any(messages[i].get(key) for key in ("content", *MORE))]
    spans = located(tok, template, messages, text, wanted, **more) if wanted else []
    if by_marks:
        ends = np.cumsum([len(part) for part in re.split(f"{BEGIN}|{END}", marked)]).tolist()    # outside, inside, …
        trained = [(a, b) for a, b in zip(ends[0::2], ends[1::2]) if not any(a < e and s < b for s, e, _ in spans)]
    elif train_on == "everything":
        edges = [0, *(edge for start, end, _ in spans for edge in (start, end)), len(text)]
        trained = list(zip(edges[::2], edges[1::2]))
    else:
        ends = [tok.every_pattern.match(text, len(text) - len(text[end:].lstrip())) for _, end, _ in spans]
        trained = [(start, after.end() if after else end) for (start, end, _), after in zip(spans, ends)]
    trained = [(start, end) for start, end in trained if end > start]
    ids, ends, borders = tok.spans(text, held, [edge for span in trained for edge in span])
    mask = np.zeros(len(ids), np.uint8)
    first = np.searchsorted(ends, borders[::2], "right")             # a token that overlaps the span is trained
    last = np.searchsorted(ends, borders[1::2], "left")
    for a, b in zip(first.tolist(), last.tolist()):
        mask[a:b + 1] = 1
    return ids.astype(np.int64), mask


def encode_prompt(tok, template, messages):
    """Messages -> the ids of the text that asks for an assistant's answer, as a list."""
    messages, text, held = prepared(tok, template, in_strings(tok.clean, messages), prompt=True)
    return tok.spans(unmarked(text), held)[0].tolist()


def turn_end(tok, template):
    """The ids that end an assistant's turn: what generation stops at."""
    ids, mask = encode_chat(tok, template, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    last = int(ids[np.flatnonzero(mask)[-1]]) if mask.any() else -1
    return sorted({i for i in (last, tok.special.get(tok.eos, -1)) if i in tok.special.values()})


# ---------------------------------------------------------------------------------------------------------------------
# token files out
#
# A source becomes a folder, made on every core, renamed into place when it is whole, and found again by a fingerprint
# of all it depends on. Chunks come back in their order, so that the number of processes changes nothing.

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
    files, shape = find_files(source["path"], f"data.{name}.path"), source["shape"]
    if shape != "auto" and (odd := [f for f in files if f.endswith(".npy") != (shape == "tokens")]):
        raise ValueError(f"data.{name}.shape: {shape}, which {odd[0]} is not; tokens are .npy files")
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
    STATE.update(tok=tok, template=None, shape=source["shape"], dtype=dtype, cfg=cfg, ignored=ignored)
    size, counts, offset, problems = sum(s for _, s, _ in stats), collections.Counter(), 0, []
    building = folder.with_name(f"{folder.name}.building.{os.getpid()}")
    shutil.rmtree(building, ignore_errors=True)
    try:
        building.mkdir(parents=True)
        create = lambda name: open(building / name, "wb")
        with create("tokens.bin") as tokens, create("mask.bin") as masks, create("offsets.bin") as offsets:
            offsets.write(np.zeros(1, np.int64).tobytes())
            jobs = (job for file in files for job in chunks(file, source["separator"]))
            results = encoded(jobs, size, data["processes"], quiet, name)
            for ids, mask, lengths, more, bad in whole(results, data["seq_len"]):
                tokens.write(ids)
                masks.write(mask)
                offsets.write(offset + np.cumsum(lengths))
                offset += len(ids)
                counts.update(more, documents=len(lengths), trained=int(mask.sum()))
                counts["longest"] = max(counts["longest"], int(lengths.max(initial=0)))
                problems = (problems + bad)[:3]
        if not counts["documents"]:
            raise ValueError(f"data.{name}: {source['path']} holds nothing to train on ({counts['records']} records, "
                             f"{counts['dropped']} documents without a trained token, {counts['skipped']} skipped"
                             f"{': ' + problems[0] if problems else ''})")
        counted = ("documents", "records", "chats", "trained", "longest", "truncated", "dropped", "cut_away", "skipped")
        header = {"format": FORMAT, "dtype": np.dtype(dtype).name, "tokens": offset, "fingerprints": prints,
                  "files": files, "vocabulary": tok.n_vocab, "problems": problems}
        header |= {key: counts[key] for key in counted}
        (building / "header.json").write_text(json.dumps(header, indent=1) + "\n")
        os.replace(building, folder)
    except OSError as e:
        if not (folder / "header.json").is_file():                   # else another process was faster: the same result
            raise ValueError(f"{folder}: cannot write token files ({e.strerror}); "
                             "data.cache_dir says where they go") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def encode_chunk(job):
    """A job of chunks() -> (tokens, mask, lengths, counts, problems): documents end to end; no lengths: part of one."""
    file, first, raw, part = job
    tok, shape, data, seq_len = STATE["tok"], STATE["shape"], STATE["cfg"]["data"], STATE["cfg"]["data"]["seq_len"]
    found, counts, problems = [], collections.Counter(), []
    bos, eos = (np.array([tok.special[text]] if text else [], np.uint32) for text in (tok.bos, tok.eos))
    if part and not isinstance(raw[0], str):
        return *raw[0], None, {"records": part[1]}, []
    if part:
        ids = np.concatenate([bos] * part[0] + [tok.encode(tok.clean(raw[0]))] + [eos] * part[1])
        return ids, np.ones(len(ids), np.uint8), None, {"records": part[1]}, []
    unit = "line" if file.removesuffix(".gz").endswith(".jsonl") else "record"
    for n, record in enumerate(raw, first):
        where = f"{file}, {unit} {n}"
        counts["records"] += 1
        try:
            if isinstance(record, bytes):
                if not record.strip():
                    raise ValueError(f"{where}: is empty; a .jsonl file has one JSON object on each line")
                try:
                    record = json.loads(record)
                except ValueError as e:
                    raise ValueError(f"{where}: not valid JSON: {e}") from None
            record = normal(record, where, shape)
            if "text" in record:
                ids = np.concatenate([bos, tok.encode(tok.clean(record["text"])), eos])
                found += windows(ids, np.ones(len(ids), np.uint8), seq_len)
                continue
            if STATE["template"] is None:
                STATE["template"] = compile_template(template_text(tok, STATE["cfg"]))
            try:
                ids, mask = encode_chat(tok, STATE["template"], train_on=data["train_on"], **record)
            except ValueError as e:
                raise ValueError(f"{where}: {e}") from None
        except (ValueError, RecursionError) as e:
            problem = one_line(e) if isinstance(e, ValueError) else f"{where}: too deeply nested"
            if data["on_error"] != "skip":
                raise ValueError(problem) from None
            counts["skipped"] += 1
            problems.append(problem)
            continue
        counts["chats"] += 1
        if len(ids) > seq_len + 1:
            counts["truncated"] += 1
            counts["cut_away"] += bool(mask.any() and not mask[1:seq_len + 1].any())
        found.append((ids[:seq_len + 1], mask[:seq_len + 1]))
    return *laid(found, counts), counts, problems[:3]


def windows(ids, mask, seq_len):
    """A document -> [(ids, mask)] of at most seq_len targets; a window's last target begins the next one."""
    return [(ids[at:at + seq_len + 1], mask[at:at + seq_len + 1]) for at in range(0, max(len(ids) - 1, 1), seq_len)]


def laid(documents, counts):
    """[(ids, mask)] -> (tokens, mask, lengths), end to end, without those that have nothing to train on."""
    lengths = np.array([len(ids) for ids, _ in documents], np.int64)
    tokens = np.concatenate([np.zeros(0, np.uint32), *(ids for ids, _ in documents)]).astype(STATE["dtype"])
    mask = np.concatenate([np.zeros(0, np.uint8), *(mask for _, mask in documents)])
    if STATE["ignored"].any():
        mask[STATE["ignored"][tokens]] = 0
    ends, trained = (np.concatenate([[0], np.cumsum(n, dtype=np.int64)]) for n in (lengths, mask))
    firsts = np.minimum(ends[:-1] + 1, ends[1:])                     # a document's first token is nobody's target
    keep = trained[ends[1:]] > trained[firsts]
    counts["dropped"] += int((~keep).sum())
    every = np.repeat(keep, lengths)
    return (tokens, mask, lengths) if keep.all() else (tokens[every], mask[every], lengths[keep])


STATE = {}                                                           # what the jobs need; forks inherit it


def whole(results, seq_len):
    """What encode_chunk gave, in order -> the same, the parts of long documents cut into windows across jobs."""
    left = [(np.zeros(0, np.uint32), np.zeros(0, np.uint8))]         # of the document that is open
    for ids, mask, lengths, counts, problems in results:
        if lengths is None:
            ids, mask = (np.concatenate(parts) for parts in zip(left[0], (ids, mask)))
            left, counts = windows(ids, mask, seq_len), collections.Counter(counts)
            ended = left if counts["records"] else left[:-1]         # its last window may not be full yet
            left = [(ids[:0], mask[:0])] if counts["records"] else left[-1:]
            ids, mask, lengths = laid(ended, counts)
        yield ids, mask, lengths, counts, problems


def encoded(jobs, size, processes, quiet, name):
    """Jobs, done, in order: on every core where there is much to do, two for each core ahead."""
    from tqdm import tqdm
    if not processes:
        processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    bar = tqdm(total=size, unit="B", unit_scale=True, desc=f"tokenize {name}", disable=quiet or None, leave=False)
    if size < 4 * BLOCK or processes == 1:
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
            e = done.exception()
            if isinstance(e, concurrent.futures.process.BrokenProcessPool):
                e = ValueError("data.processes: one was killed, for want of memory perhaps; fewer take less")
            if isinstance(e, ValueError):                            # from here, configs.run knows it for ours
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
# show: what a person looks at
#
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
    asked, argv = configs.take(argv, show=0, ids=False)
    cfg, _, _ = configs.load(argv)
    need_sources(cfg)
    tok = load_tokenizer(cfg)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for kind, sources in prepare(cfg, tok).items():
        for name, tokens in sources.items():
            print(summary(f"{kind}.{name}", tokens), f"  in {tokens.folder}", *histogram(tokens), sep="\n")
            for i in range(min(asked["show"], len(tokens))):
                ids, mask = tokens.document(i)
                print(f"\n--- {name} {i}: {len(ids)} tokens, {int(mask.sum())} trained, "
                      f"{'in green' if colour else 'in [[ ]]'}\n{shown(tok, ids, mask, colour)}")
                for at, (token, m) in enumerate(zip(ids, mask) if asked["ids"] else ()):
                    print(f"{at:>6} {token:>7} {'trained' if m else '-':<8}{tok.decode([token])!r}")


if __name__ == "__main__":
    configs.run(main, sys.argv[1:])
