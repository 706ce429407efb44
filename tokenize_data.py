"""Raw text and chats -> token files on disk.

    python tokenize_data.py configs/ft.yaml                     tokenize, and print a summary
    python tokenize_data.py configs/ft.yaml show=3              and 3 samples, targets coloured
    python tokenize_data.py configs/ft.yaml show=1 ids=true     and each of their tokens

The file follows the data: read files, normalize records, render the chat template, encode, assign
loss weights, write token files, show. One record on its way, with data.tokenizer=bytes:

    {"prompt": "2 + 3?", "completion": "5"}                                          read
    [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]   normalized
    <|im_start|>user\\n2 + 3?<|im_end|>\\n<|im_start|>assistant\\n5<|im_end|>\\n          rendered
     257 117 115 101 ... 43 32 51 63 258 10 257 97 115 115 ... 116 10 53 258 10      token ids
       0   0   0   0      0  0  0  0   0  0   0  0   0   0       0  0  1   1  0      loss weights

The ids are those of the rendered text; loss weights do not change them. Special tokens that are
spelled inside a message stay text: <|im_end|> in a user's message ends no turn. (Other added tokens
of a vocabulary, such as <think>, are found everywhere.) A text document is BOS + its ids + EOS, cut
into windows of data.seq_len targets.

Each source has a folder in data.cache_dir, named by a fingerprint of everything it depends on:

    tokens.bin     uint16 or uint32: the ids of all documents, one after the other
    weights.bin    per token its loss weight: uint8 if all are 0 or 1, otherwise float16
                   (3 significant digits)
    offsets.bin    int64: where each document starts, and the end of the last one
    targets.bin    uint32: the number of targets of each document. Its first token is never one:
                   no token before it predicts it
    prompts.bin    for sampling: the ids of the generation prompt of a chat's last trained answer.
                   Empty if the chat's own ids before this answer are the same; they differ if the
                   template or the tokenizer writes the prompt in another way. dtype as tokens.bin
    prompt_offsets.bin    as offsets.bin, for prompts.bin
    header.json    format, dtype, counts, fingerprints; written last

Beside these folders, hashes.json has the hash of each data file, with its size and time.
"""
import base64
import bisect
import bz2
import concurrent.futures
import contextlib
import csv
import glob
import gzip
import hashlib
import io
import itertools
import json
import lzma
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import threading
import tokenize
import unicodedata
import zlib
from collections import Counter, deque
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property, lru_cache, partial
from pathlib import Path

import jinja2.ext
import jinja2.meta
import jinja2.sandbox
import numpy as np
import regex                    # installed with tiktoken
import tiktoken
from jinja2 import nodes

import configs
import log
from configs import UserError, read_text

FORMAT = 10                 # of the token files
# size of a Chunk, the unit of work of a process, in bytes, characters or token ids of the file:
# larger ones make work uneven, smaller ones cost time to send
BLOCK = 2**18
JSON_ERRORS = (ValueError, RecursionError)       # RecursionError: it is nested too deeply
UNPACKERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


@dataclass
class error_context:
    """Shorten errors to a UserError (a ValueError) of one line that begins with a place:

        with error_context("x.jsonl, line 3"):
            with error_context("tools", ValueError, "not valid JSON: "):
                json.loads("{")        ->  x.jsonl, line 3: tools: not valid JSON: Expecting ...

    RecursionError comes from JSON that is nested too deeply. (A class, because each record is read
    in one, and contextlib's generators take 3 times as long.)
    """
    place: str
    errors: tuple = (UserError, RecursionError)
    problem: str = ""

    def __enter__(self):
        return self

    def __exit__(self, error_type, error, traceback):
        if isinstance(error, self.errors):
            text = f"{self.place}: {self.problem}{one_line(error)}"
            raise UserError(text) from None


def one_line(error):
    """The message of an exception as one line of limited length."""
    text = getattr(error, "strerror", None) or str(error)
    if isinstance(error, KeyError):
        text = repr(error)
    if isinstance(error, UnicodeDecodeError):
        text = configs.decoding_problem(error)
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) < 600 else f"{text[:300]} ... {text[-200:]}"


def check_type(value, expected, problem):
    if not isinstance(value, expected):
        shown = "null" if value is None else f"{type(value).__name__} {value!r:.40}"
        raise UserError(f"{problem}, got {shown}")


def print_once(text):
    """Print to stderr, on local rank 0 only."""
    if configs.is_local_rank0():
        print(text, file=sys.stderr, flush=True)


def fingerprint(*values):
    return hashlib.sha256(json.dumps(values, default=str).encode()).hexdigest()[:16]


# --------------------------------------------------------------------------------------------------
# find files: on this machine, or on the hub

FORMATS = ".jsonl, .json, .csv, .tsv, .txt (also .gz, .bz2, .xz), .parquet, .npy"
FILE_NAME = re.compile(r".*\.(?:(jsonl|json|csv|tsv|txt)(?:\.(?:gz|bz2|xz))?|(parquet|npy))")
OTHER_FORMATS = {".zst": "zstd -d unpacks it", ".zip": "unzip unpacks it",
                 ".arrow": "to_parquet() of the datasets package writes .parquet"}
BESIDE_NPY = ("_labels.npy", "_weights.npy")              # of FILE.npy: see read_npy
METADATA = ("dataset_info.json", "dataset_infos.json")    # of a dataset on the hub
# of a path in the config file: owner/name, perhaps with @REVISION, perhaps with /FOLDER
HUB_PATH = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(refs/\w+/\w+|[^/]+))?(?:/(.+))?")
HUB_FORMATS = ("parquet", "jsonl", "json", "csv")         # the first that a dataset has is read
SPLIT_WORDS = {"train": "train|training", "validation": "validation|valid|val|dev",
               "test": "test|testing|eval|evaluation"}
NO_LETTER_BEFORE = "(?<![a-zA-Z])"


def find_files(cfg, name, source):
    """Return the files of a source, sorted: a file, a folder, a glob or a dataset on the hub.

    name  "train.NAME" or "validation.NAME"
    """
    path = source["path"]
    with error_context(f"data.{name}.path"):
        files = list_files(path, cfg["data_root"], source["split"])
        files = sorted(file for file in files if not file.endswith(BESIDE_NPY))
        if not files:
            raise UserError(f"no file at {os.path.abspath(path)} (a file, a folder or a glob of "
                            f"{FORMATS}, or a hub id: owner/name)")
        for file in files:
            if not os.path.isfile(file):
                raise UserError(f"{file} is a link to a file that does not exist")
            if not format_of(file):
                hint = OTHER_FORMATS.get(Path(file).suffix, "a glob selects files: FOLDER/*.jsonl")
                raise UserError(f"{file} must end in one of {FORMATS}; {hint}")
    shapes = {"npy": ("auto", "tokens"), "txt": ("auto", "text")}
    for file in files:
        allowed = shapes.get(format_of(file), ("auto", "text", "chat"))
        if source["shape"] not in allowed:
            raise UserError(f"data.{name}.shape: {source['shape']} does not fit {file}")
    if source["separator"] and "txt" not in map(format_of, files):
        raise UserError(f"data.{name}.separator: has no effect, because {path} has no .txt file; "
                        "remove it")
    return files


def list_files(path, data_root, split):
    """Return the files that a source's path names, each once."""
    # configs joined the path with data_root: undo that, to see whether it is a hub id
    hub_path = HUB_PATH.fullmatch(os.path.relpath(path, data_root))
    # if the parent folder exists, it is a local path, perhaps mistyped: don't ask the hub
    is_local = os.path.isdir(os.path.dirname(path) or ".") or format_of(path)
    if os.path.isdir(path):
        files = choose_local_files(path, list_folder(path), split)
    elif os.path.isfile(path):
        files = [path]
    elif hub_path and not is_local and not glob.has_magic(path):
        # returned at once: in the hub's cache, files of equal content are links to one file, and
        # what follows would drop all but one of them
        return download_split(*hub_path.groups(), split)
    else:
        files = [file for file in glob.glob(path, recursive=True) if os.path.isfile(file)]
    # links may name a file twice: keep the name that sorts first
    by_target = {os.path.realpath(file): file for file in sorted(files, reverse=True)}
    return list(by_target.values())


def format_of(file):
    """"a.jsonl.gz" -> "jsonl"; None if such a file cannot be read."""
    match = FILE_NAME.fullmatch(file.lower())
    return match and (match[1] or match[2])


def list_folder(folder, parents=()):
    """Return the data files in a folder and its subfolders, without hidden ones.

    parents  real paths of the folders above. Links are followed, except to one of them: that would
             never end
    """
    with error_context(folder, OSError, "cannot be read: "):
        names = os.listdir(folder)
    files = []
    parents = [*parents, os.path.realpath(folder)]
    for name in names:
        path = os.path.join(folder, name)
        if name.startswith(".") or name in METADATA or os.path.realpath(path) in parents:
            continue
        if os.path.isdir(path):
            files += list_folder(path, parents)
        elif format_of(name) or name.endswith(tuple(OTHER_FORMATS)):
            files.append(path)
    return files


def choose_local_files(folder, files, split):
    """Return the files of a split: see choose_split. All files are of "train", unless their names
    have words of "train" and of another split."""
    # .json and .jsonl count as one; files of OTHER_FORMATS are refused later
    formats = {format_of(file).removesuffix("l") for file in files if format_of(file)}
    if len(formats) > 1:
        raise UserError(f"{folder} has files of several formats ({', '.join(sorted(formats))}); a "
                        f"glob selects some: {folder}/**/*.{min(formats)}*")
    names = [os.path.relpath(file, folder) for file in files]
    splits = splits_of(names)
    if split == "train" and ("train" not in splits or len(splits) == 1):
        return files
    chosen = choose_split(names, split, folder)
    others = set(names) - set(chosen)
    if others:
        print_once(f"note: {folder}: only the split {split} is read ({abridged(chosen)}), not "
                   f"{abridged(others)}; the source's `split` names another one, and a glob reads "
                   "all")
    return [os.path.join(folder, name) for name in chosen]


def abridged(names):
    names = sorted({re.sub(r"\d{5}-of-\d{5}", "*", name) for name in names})
    shown = ", ".join(names[:8])
    return f"{shown}, ..." if len(names) > 8 else shown


def splits_of(names):
    """Return the splits whose words are in file names: {"train", "test"} for train_x and test.csv.

    This tells whether a dataset is divided into splits at all. So train_x counts as train here,
    while choose_split(), which chooses files, takes it for a split of its own.
    """
    splits = set()
    for split, words in SPLIT_WORDS.items():
        if any(re.search(f"{NO_LETTER_BEFORE}({words})(?![a-zA-Z])", name) for name in names):
            splits.add(split)
    return splits


def choose_split(names, split, place):
    """Return the file names of a split.

    A name with its word is of a split: train-00000-of-00002.parquet, data/test.jsonl. If there is
    none, and no name has the word of another split, all files are of "train".
    """
    words = SPLIT_WORDS.get(split, re.escape(split))
    # no letter after it, nor _ and a letter: train_sft is a split of its own
    word = re.compile(f"{NO_LETTER_BEFORE}({words})(?!_?[a-zA-Z])")
    chosen = [name for name in names if word.search(name)]
    if names and not chosen and split == "train" and splits_of(names) <= {"train"}:
        return names
    if not chosen:
        files = abridged(names) or "none that can be read"
        raise UserError(f"{place} has no split {split!r}; its files: {files}; "
                        "`split` of the source is a word of their names: split=train_sft")
    return chosen


def download_split(dataset, revision, folder, split):
    """Download one split of a dataset on the hub to huggingface_hub's cache; return its files.

    revision  branch, tag or commit, or None. HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE are respected
    """
    place = f"no file or folder at {dataset}, and none from the hub"
    with error_context(place, ImportError, "pip install huggingface_hub to download it: "):
        from huggingface_hub import constants, list_repo_files, snapshot_download
    repo = {"repo_id": dataset, "repo_type": "dataset", "revision": revision}
    is_listed = True
    try:
        names = list_repo_files(**repo)
    except Exception as error:               # no such dataset, no network
        is_listed = False
        names = cached_files(Path(constants.HF_HUB_CACHE), dataset, revision or "main")
        if not names:
            raise UserError(f"{place}: {one_line(error)}") from None
    names = choose_hub_files(names, dataset, folder, split)
    if not is_listed:
        check_complete(names, dataset)
    with error_context(place, Exception):
        local = snapshot_download(**repo, allow_patterns=names)
    return [str(Path(local, name)) for name in names]


def cached_files(cache, dataset, revision):
    """Return the names of a dataset's files that are in the cache, for use without network."""
    folder = cache / f"datasets--{dataset.replace('/', '--')}"
    ref = folder / "refs" / revision
    commit = ref.read_text(encoding="utf-8") if ref.is_file() else revision
    snapshot = folder / "snapshots" / commit
    if any(folder.glob("blobs/*.incomplete")):
        raise UserError(f"{dataset}: a download was interrupted, and the hub cannot be reached to "
                        f"complete it; a glob reads what is there: {snapshot}/**/*.jsonl")
    return [str(file.relative_to(snapshot)) for file in snapshot.rglob("*") if file.is_file()]


def check_complete(names, dataset):
    """Raise UserError if a file of a split in several (train-00000-of-00002) is missing."""
    for name in names:
        number = re.search(r"\d{5}-of-(\d{5})", name)
        parts = [n for n in names if number and n.startswith(name[:number.start()])]
        if number and len(parts) != int(number[1]):
            raise UserError(f"{dataset}: {len(parts)} of {int(number[1])} files of {name} are in "
                            "the cache, and the hub cannot be reached for the others")


def choose_hub_files(names, dataset, folder, split):
    """Return the file names of a split of a dataset, all in one folder and format."""
    names = [n for n in names if format_of(n) in HUB_FORMATS and Path(n).name not in METADATA]
    if folder:
        names = [n for n in names if n.startswith(f"{folder}/")]
    chosen = choose_split(names, split, dataset)
    best = min([format_of(n) for n in chosen], key=HUB_FORMATS.index)
    chosen = sorted(n for n in chosen if format_of(n) == best)
    folders = sorted({str(Path(n).parent) for n in chosen})
    if len(folders) > 1:
        raise UserError(f"{dataset} has this split in several folders; name one: "
                        f"{', '.join(f'{dataset}/{f}' for f in folders[:8] if f != '.')}")
    return chosen


# --------------------------------------------------------------------------------------------------
# read files: each reader(stream, file, context) yields Chunks

@dataclass
class Chunk:
    """Some records of a file, or a part of one document that is too long for one chunk.

    records  as they are in the file: JSON as bytes, texts, dicts (.parquet, .csv), or for .npy
             (ids [n], loss weights [n]). They are parsed by the process that encodes them
    numbers  of the records, from 1: which line or which record of the file each is (see unit)
    unit     "line" or "record", for error messages
    starts   False: the document started in an earlier chunk
    ends     False: the document continues in the next chunk
    n_bytes  its size in the file, for the progress bar. 0: read_chunks() measures it
    warnings  [(kind, example)] of a part that is encoded: see encode_chunk()
    """
    file: str
    unit: str
    numbers: list
    records: list
    starts: bool = True
    ends: bool = True
    n_bytes: int = 0
    warnings: list = ()


@dataclass
class Context:
    """What reading and encoding a source depend on, besides its files.

    Derived from the fields are
      data          the config's section data
      now           the time of templates that read the clock
      never_target  bool [V]: the ids that are never targets (data.ignore_token_ids, ..._range)
      dtype         of token ids on the disk
    """
    cfg: dict
    source: dict                 # its section of data.train or data.validation
    tok: object                  # Tokenizer or HFTokenizer

    def __post_init__(self):
        self.data = self.cfg["data"]
        self.now = fixed_time(self.cfg)
        ids = np.arange(self.tok.n_vocab)
        self.never_target = np.isin(ids, self.data["ignore_token_ids"])
        if self.data["ignore_token_id_range"]:
            first, last = self.data["ignore_token_id_range"]
            self.never_target |= (first <= ids) & (ids <= last)
        self.dtype = np.uint16 if self.tok.n_vocab <= 2**16 else np.uint32

    @cached_property
    def template(self):          # compiled by the first chat: texts need none
        try:
            return load_template(self.tok, self.cfg, self.now)
        except UserError as error:
            raise TemplateError(str(error)) from None


class TemplateError(UserError):
    """An error of the chat template itself: on_error=skip skips no records for it."""


def read_chunks(file, context):
    """Yield a file as Chunks of about BLOCK bytes, so that memory does not grow with the file."""
    reader = READERS[format_of(file)]
    errors = (OSError, EOFError, zlib.error, lzma.LZMAError)
    position = 0
    try:
        with error_context(file, errors, "cannot be read: "), open(file, "rb") as raw:
            for chunk in reader(unpack(raw, file), file, context):
                if not chunk.n_bytes:
                    chunk.n_bytes = raw.tell() - position
                    position = raw.tell()
                yield chunk
    except UnicodeError:                     # read it again, to find the line
        with open(file, "rb") as raw:
            problem = configs.encoding_problem(unpack(raw, file))
        raise UserError(f"{file}, {problem}") from None


def unpack(raw, file):
    """The stream of a file's content. Raises UserError if it does not begin as its name says."""
    check_format(raw, file, file)
    name, extension = os.path.splitext(file)
    opener = UNPACKERS.get(extension.lower())
    if not opener:
        return raw
    stream = opener(raw)
    check_format(stream, file, name)
    return stream


def check_format(stream, file, name):
    """Raise UserError if the first bytes of a stream are not those of such a file.

    file  for the error message
    name  whose extension names the format: file, or file without .gz for the unpacked stream
    """
    problem = configs.format_problem(stream.read(1000), name)
    if problem:
        raise UserError(f"{file}: {problem}")
    stream.seek(0)


def read_json(stream, file, context):
    """Also .jsonl. The file's first lines show where its records are:

        {"a": 1}\\n{"a": 2}              one on each line
        [{"a": 1}, {"a": 2}]             in a list: read_json_items()
        {\\n"a": 1\\n}, {"a": 2}          otherwise: read_json_items(), with is_list=False
    """
    first = "\n"
    while first.isspace():                               # it may follow empty lines
        first = stream.readline(256 * BLOCK).decode("utf-8-sig", "ignore")
    second = stream.readline(BLOCK).lstrip()
    stream.seek(0)
    first = first.lstrip()
    is_object = first.startswith("{")
    # a first line with an error also is one, if the next line begins a record: the error names it
    end = end_of_first_value(first)
    is_record = end > 0 and not first[end:].strip()
    is_cut = first.rstrip().endswith((",", ":", "[", "{"))
    is_broken = end == 0 and second.startswith(b"{") and not is_cut
    is_line = is_object and (is_record or is_broken)
    # a .json file that begins with neither [ nor { counts as a list: read_json_items() refuses it
    is_list = first.startswith("[") or (format_of(file) == "json" and not is_object)
    if is_list or (is_object and not is_line):
        yield from read_json_items(stream, file, is_list)
        return
    n = 1
    while lines := stream.readlines(BLOCK):
        numbers = [n + i for i, line in enumerate(lines) if not line.isspace()]
        yield Chunk(file, "line", numbers, [line for line in lines if not line.isspace()])
        n += len(lines)


def end_of_first_value(text):
    """The position after the JSON value that a text begins with; 0 if that is invalid or cut."""
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except JSON_ERRORS:
        return 0
    return end


def read_json_items(stream, file, is_list):
    """Yield Chunks of the items of a JSON list.

    is_list  False: there is no list, and commas between the items are optional
    """
    # a limit, since after a missing comma or quote all of the file is one broken item
    max_item = 256 * BLOCK
    buffer = ""                              # text that is not cut into items yet
    n_items = 0
    for text in iter_text(stream):
        buffer += text
        items, position, error = split_items(buffer, is_list, at_start=n_items == 0)
        if items:
            yield Chunk(file, "record", range(n_items + 1, n_items + len(items) + 1), items)
        n_items += len(items)
        buffer = buffer[position:].lstrip()
        if len(buffer) > max_item:
            break
    end = r",?\s*"
    if is_list:
        end = r"\]\s*" if n_items else r"\[\s*\]\s*"
    if error or not re.fullmatch(end, buffer):
        expected = "a comma or the end is expected" if n_items else "a list is expected"
        problem = getattr(error, "msg", None) or error or expected
        if len(buffer) > max_item:
            problem = f"{problem} (and nothing in the next {max_item:,} characters ends it)"
        raise UserError(f"{file}, record {n_items + 1}: not valid JSON: {problem}")


def split_items(text, is_list=True, at_start=False):
    """Cut the complete items off the start of a text.

        ', {"a": 1}, {"b": 2}, {"c"'  ->  [b'{"a": 1}', b'{"b": 2}'], 20, the decoder's error

    is_list   items have commas between them; False: commas are optional
    at_start  the text starts with the list's bracket

    Returns (items, the position after the last one, the error of the next item or None)
    """
    items = []
    position = 0
    between = re.compile(r"\s*,\s*" if is_list else r"\s*,?\s*(?=[^\s,])")
    separator = between
    if is_list and at_start:
        separator = re.compile(r"\s*\[\s*(?!\s*\])")         # the bracket, unless the list is empty
    while match := separator.match(text, position):
        try:
            _, end = json.JSONDecoder().raw_decode(text, match.end())
        except JSON_ERRORS as error:
            return items, position, error
        items.append(text[match.end():end].encode())    # parse_record() takes bytes for JSON
        position = end
        separator = between
    return items, position, None


def iter_text(stream):
    """Yield a file's text in blocks, with \\n for \\r\\n. The last block, and only that, is ""."""
    text_stream = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="\n")
    is_end = False
    while not is_end:
        text = text_stream.read(BLOCK)
        is_end = not text
        while text.endswith("\r") and (following := text_stream.read(1)):     # perhaps \n
            text += following
        yield refuse_zero_bytes(text.replace("\r\n", "\n"))
    text_stream.detach()                     # otherwise it closes the stream: read_chunks needs it


def refuse_zero_bytes(text):
    """Return the text. A damaged file may end in zero bytes; read_chunks names their line."""
    if "\0" in text:
        raise UnicodeError("zero byte")
    return text


def read_txt(stream, file, context):
    """One document; or several, if data.train.NAME.separator is between them."""
    separator = context.source["separator"].replace("\r\n", "\n")     # as in iter_text
    if separator:
        yield from read_separated(stream, file, separator)
        return
    buffer = ""
    starts = True
    for text in iter_text(stream):
        buffer += text
        end = find_split_point(buffer, context.tok.encode) if len(buffer) > BLOCK else 0
        if end:
            yield Chunk(file, "record", [1], [buffer[:end]], starts=starts, ends=False)
            buffer = buffer[end:]
            starts = False
    if buffer.strip() or not starts:
        yield Chunk(file, "record", [1], [buffer], starts=starts)


def read_separated(stream, file, separator):
    buffer = ""
    n = 1
    for text in iter_text(stream):
        *documents, buffer = (buffer + text).split(separator)
        if not text:                                     # the end of the file
            documents.append(buffer)
        documents = [document for document in documents if document.strip()]
        yield Chunk(file, "record", range(n, n + len(documents)), documents)
        n += len(documents)


def find_split_point(text, encode, margin=200):
    """Return a late position at which cutting the text does not change its ids, or 0.

    Candidates precede white space, because pre-tokenizers split words there. One is accepted if the
    `margin` characters before it and after it have the same ids encoded apart as encoded together.
    (A cut only changes the ids of the words next to it, which are shorter than margin.) Candidates
    are searched in the last 2**15 characters, so that the rest is short. At most 200 are tried.
    """
    earliest = max(margin, len(text) - 2**15)
    spaces = list(re.compile(r"\s").finditer(text, earliest, len(text) - margin))
    for match in reversed(spaces[-200:]):
        before = text[match.start() - margin:match.start()]
        after = text[match.start():match.start() + margin]
        if [*encode(before), *encode(after)] == [*encode(before + after)]:
            return match.start()
    return 0


def read_csv(stream, file, context):
    """Also .tsv. The first line names the columns; a record is {column: text}."""
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if format_of(file) == "tsv" else ","
    lines = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    rows = csv.reader(map(refuse_zero_bytes, lines), delimiter=delimiter, strict=True)
    columns = []
    numbers = []
    records = []
    line = 1                                 # where the next row starts; it may have several lines
    try:
        for fields in rows:
            if not columns:
                columns = fields
            elif fields:                     # otherwise the line is empty
                numbers.append(line)
                # a missing field is None, and so is the column of one too many
                records.append(dict(itertools.zip_longest(columns, fields)))
            line = rows.line_num + 1
            if len(records) == 512:
                yield Chunk(file, "line", numbers, records)
                numbers = []
                records = []
    except csv.Error as error:
        raise UserError(f"{file}, line {line}: not valid CSV: {one_line(error)}") from None
    if records:
        yield Chunk(file, "line", numbers, records)


def read_parquet(stream, file, context):
    with error_context(file, ImportError, "reading .parquet needs pyarrow; pip install pyarrow: "):
        import pyarrow.parquet
    errors = (OSError, UnicodeDecodeError, pyarrow.ArrowException)
    with error_context(file, errors, "cannot be read as .parquet: "):
        table = pyarrow.parquet.ParquetFile(file)
        size = os.path.getsize(file)
        n = 1
        for batch in table.iter_batches(512):
            records = batch.to_pylist()
            n_bytes = size * len(records) // table.metadata.num_rows
            numbers = range(n, n + len(records))
            yield Chunk(file, "record", numbers, records, n_bytes=n_bytes)
            n += len(records)


def read_npy(stream, file, context):
    """The token ids of one document. Beside FILE.npy there may be

        FILE_labels.npy     int [n]: the ids again, or data.ignore_index for tokens that are no
                            targets, as in Hugging Face
        FILE_weights.npy    float [n]: the loss weight of each token

    data.shift_labels=false: labels[i] and weights[i] belong to token i + 1. The last label is then
    appended to the ids, unless it is data.ignore_index.
    """
    labels_file = f"{file[:-4]}_labels.npy"
    ids = load_array(file, "iu")
    labels = load_array(labels_file, "iu", len(ids))
    weights = load_array(f"{file[:-4]}_weights.npy", "iuf", len(ids))
    ignore_index = context.data["ignore_index"]
    offset = 0 if context.data["shift_labels"] else 1        # labels[i] is of token i + offset
    n = len(ids)
    if offset and labels is not None and n and labels[-1] != ignore_index:
        n += 1
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        block = np.array(ids[start:end], np.int64)
        if end > len(ids):
            block = np.append(block, np.int64(labels[-1]))
        wrong = np.flatnonzero((block < 0) | (block >= context.tok.n_vocab))
        if len(wrong):
            i = start + wrong[0]
            place = f"{file}: index {i}" if i < len(ids) else f"{labels_file}: index {i - 1}"
            raise UserError(f"{place}: {block[wrong[0]]} is an id that the tokenizer "
                            f"({context.tok.n_vocab} tokens) lacks")
        # labels[in_arrays] and weights[in_arrays] are those of tokens first ... end - 1. With the
        # offset 1, token 0 has neither, and its weight stays 0
        first = max(start, offset)
        in_arrays = slice(first - offset, end - offset)
        block_weights = np.zeros(len(block), np.float32)
        labeled_weights = block_weights[first - start:]      # a view
        with np.errstate(over="ignore"):                     # compact_weights refuses inf
            labeled_weights[:] = 1 if weights is None else weights[in_arrays]
        if labels is not None:
            is_target = labels[in_arrays] != ignore_index
            wrong = np.flatnonzero(is_target & (labels[in_arrays] != block[first - start:]))
            if len(wrong):
                raise UserError(
                    f"{labels_file}: index {in_arrays.start + wrong[0]}: the label must be "
                    "data.ignore_index or the id there (the next id: data.shift_labels=false)")
            labeled_weights[~is_target] = 0
        yield Chunk(file, "record", [1], [(block, block_weights)], starts=start == 0,
                    ends=end == n, n_bytes=len(block) * ids.itemsize)


def load_array(path, kinds, n_tokens=None):
    """Map a .npy file into memory: [n].

    kinds     letters of the allowed dtypes: i, u ints, f floats (numpy's dtype.kind)
    n_tokens  of a file beside the ids: its length must be this. None is returned if it is missing
    """
    if n_tokens is not None and not os.path.isfile(path):
        return None
    # (numpy's parser of the header lets tokenize's errors through)
    errors = (ValueError, EOFError, SyntaxError, AttributeError, tokenize.TokenError)
    with error_context(path, errors, "no array of token ids: "):
        array = np.load(path, mmap_mode="r", allow_pickle=False).reshape(-1)
        if array.dtype.kind not in kinds:
            wanted = "floats" if "f" in kinds else "ints"
            raise UserError(f"expected {wanted}, got {array.dtype}")
        if n_tokens not in (None, len(array)):
            raise UserError(f"expected one number per token ({n_tokens}), got {len(array)}")
    return array


READERS = {"jsonl": read_json, "json": read_json, "txt": read_txt, "csv": read_csv,
           "tsv": read_csv, "parquet": read_parquet, "npy": read_npy}


# --------------------------------------------------------------------------------------------------
# normalize records: the shapes that people's files have, detected by their keys

MESSAGE_KEYS = ("messages", "conversations")
PROMPT_RESPONSE_KEYS = (("instruction", "output"), ("instruction", "response"),
                        ("prompt", "completion"), ("prompt", "response"),
                        ("question", "answer"), ("question", "response"), ("query", "response"))
KNOWN_SHAPES = "messages, conversations, text, " + ", ".join(map(" + ".join, PROMPT_RESPONSE_KEYS))
ROLES = {"user": "user", "human": "user", "system": "system", "developer": "system",
         "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant",
         "chatgpt": "assistant", "function_call": "assistant", "tool_call": "assistant",
         "tool": "tool", "observation": "tool", "function_response": "tool", "function": "tool",
         "tool_response": "tool", "ipython": "tool"}
# roles of tool outputs in ShareGPT's files, which have no tool_call_id
OUTPUT_ROLES = {role for role in ROLES if ROLES[role] == "tool"} - {"tool"}
CALL_ROLES = ("function_call", "tool_call")               # their content is a call, or a list
MESSAGE_WEIGHT_KEYS = ("weight", "loss_weight", "loss_scale", "loss", "train", "training")
RECORD_WEIGHT_KEYS = ("weight", "loss_weight")
WEIGHT_RANGE = "0 or from 6e-8 to 65504 in absolute value"        # that of float16
# names of an answer's thoughts: the first one that is not empty counts
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning", "thought", "thoughts")
# keys of a message that normalize_message replaces
REPLACED_KEYS = ("role", "from", "content", "value", "function_call", "tool_calls",
                 *MESSAGE_WEIGHT_KEYS, *REASONING_KEYS)
GENERATED_FIELDS = ("tool_calls", "reasoning_content")    # what an answer may have besides content
LABEL_KEYS = ("label", "kto_tag")                         # of an answer: good or bad
# names of a call's arguments, from LangChain, Llama and Anthropic
ARGUMENT_KEYS = ("arguments", "args", "parameters", "input")
MEDIA_KEYS = ("image", "images", "video", "videos", "audio", "audios")
# columns of a record that are no variables of a template
SHAPE_COLUMNS = {*MESSAGE_KEYS, *sum(PROMPT_RESPONSE_KEYS, ()), *RECORD_WEIGHT_KEYS, *MEDIA_KEYS,
                 "text", "input", "context", "history", "system", "system_prompt", "tools",
                 "documents", "chat_template_kwargs"}
# warnings about parts of a record that are not trained on
TEXT_BESIDE_CHAT = ("a record has a text beside a chat, and the chat is trained on; shape=text of "
                    "the source trains on the text, shape=chat says that this is right")
MEDIA_BESIDE_CHAT = "a record has pictures, video or sound, of which nothing is trained on"
SYSTEM_TWICE = ("a record has `system` beside another system message, and only the latter is "
                "used; remove one of them")
REJECTED_ANSWER = ("a record's answer is marked as a bad one (label or kto_tag is false) and is "
                   "trained on; remove such records, or give them the weight 0")


def normalize_record(record, place, shape="auto"):
    """Return {"text": str}, or {"messages": [{"role", "content", "weight", ...}], ...}.

    A chat may also have "tools", "documents", "chat_template_kwargs", "columns" (other variables of
    the template) and "warnings"; both may have "weight", a factor of all loss weights. These are
    the keyword arguments of encode_text() or encode_chat().

    record  as in Chunk.records
    place   of the record, for error messages
    """
    with error_context(place):
        record = parse_record(record)
        if shape == "text" or shape == "auto" and "text" in record and not has_chat(record):
            if "text" not in record:
                raise UserError("data shape is text, and this is a chat or of unknown shape")
            check_type(record["text"], str, "text: expected text")
            normalized = {"text": record["text"]}
        else:
            normalized = normalize_chat(record)
            if shape == "auto" and record.get("text"):
                warning = (TEXT_BESIDE_CHAT, f"{record['text']!r:.60}")
                normalized.setdefault("warnings", []).append(warning)
        weight = parse_weight(record, RECORD_WEIGHT_KEYS)
        if weight != 1:
            normalized["weight"] = weight
        return normalized


def parse_record(record):
    if isinstance(record, bytes):
        if b"\0" in record:
            raise UserError(configs.ZERO_BYTE)
        with error_context("not valid JSON", JSON_ERRORS):
            record = json.loads(record)
    elif isinstance(record, dict):
        # Arrow gives all structs of a column the same keys; those that a struct lacks are null
        record = {key: without_nulls(value) for key, value in record.items()}
    if isinstance(record, str):
        record = {"text": record}
    check_type(record, dict, f"expected an object ({KNOWN_SHAPES}) or a string")
    if None in record:                                   # see read_csv
        raise UserError("has more fields than the first line has columns")
    return record


def without_nulls(value, kept=()):
    """A JSON value without the null fields of its objects, except those named in `kept`."""
    if isinstance(value, dict):
        return {key: without_nulls(item, kept) for key, item in value.items()
                if item is not None or key in kept}
    if isinstance(value, list):
        return [without_nulls(item, kept) for item in value]
    return value


def parse_json(value):
    """The list or object of a text that is JSON. Anything else is returned as it is."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        with suppress(*JSON_ERRORS):
            return json.loads(value)
    return value


def parse_column(record, key, expected, description):
    """A list or dict, perhaps as JSON text. An empty one if it is missing, null or ""."""
    value = parse_json(record.get(key))
    if value is None or value == "":
        return expected()
    check_type(value, expected, f"{key}: expected {description}")
    return value


def parse_list(value):
    """A list, perhaps as JSON text. An empty one if a column of this name holds something else."""
    value = parse_json(value)
    return value if isinstance(value, list) else []


def has_chat(record):
    """Does a record hold a chat? A text beside it, as Alpaca has one, is the rendered chat."""
    pair = find_pair(record)
    return any(map(record.get, MESSAGE_KEYS)) or pair is not None and is_filled(record, pair)


def find_pair(record):
    """The pair of PROMPT_RESPONSE_KEYS that a record has, a filled one first; or None."""
    pairs = [pair for pair in PROMPT_RESPONSE_KEYS if all(key in record for key in pair)]
    filled = [pair for pair in pairs if is_filled(record, pair)]
    return next(iter(filled + pairs), None)


def is_filled(record, pair):
    prompt, response = (record[key] for key in pair)
    return prompt is not None and response not in (None, "")


def normalize_chat(record):
    """Return {"messages": [...]}, and, if the record has them, "tools", "documents",
    "chat_template_kwargs", "columns" and "warnings": see normalize_record."""
    messages = []
    for n, turn in enumerate(find_messages(record), 1):
        with error_context(f"message {n}"):
            messages.append(normalize_message(turn))
    if not messages:
        raise UserError("a chat without messages")
    warnings = [(MEDIA_BESIDE_CHAT, key) for key in MEDIA_KEYS if record.get(key)]
    warnings += [(REJECTED_ANSWER, key) for key in LABEL_KEYS if record.get(key) is False]
    for key in ("system_prompt", "system"):
        system = record.get(key) or ""
        check_type(system, str, f"{key}: expected text")
        if system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system, "weight": 1.0})
        elif system not in ("", messages[0]["content"]):
            warnings.append((SYSTEM_TWICE, f"{system!r:.60}"))
    tools = parse_column(record, "tools", list, "a list of tools")
    tools = tools or parse_list(record.get("functions"))                 # OpenAI's older form
    tools = [normalize_tool(tool) for tool in tools]
    set_call_ids(messages)
    drop_null_arguments(messages, tools)
    documents = parse_list(record.get("documents"))
    chat = {
        "messages": messages,
        "tools": tools,
        "documents": [document for document in documents if isinstance(document, dict)],
        "chat_template_kwargs": parse_column(record, "chat_template_kwargs", dict, "an object"),
        "columns": {key: value for key, value in record.items()
                    if isinstance(value, (str, int, float)) and key not in SHAPE_COLUMNS},
        "warnings": warnings}
    return {key: value for key, value in chat.items() if value}


def find_messages(record):
    """Return the messages of a record, as they are in it."""
    for key in MESSAGE_KEYS:
        messages = parse_column(record, key, list, "a list of messages")
        if messages:
            return messages
    pair = find_pair(record)
    if pair:
        return prompt_and_response(record, *pair)
    if isinstance(record.get("text"), str):
        raise UserError("data shape is chat, and this is text")
    if not record.keys().isdisjoint(MESSAGE_KEYS):
        return []
    problem = f"keys {', '.join(record) or 'none'} are of no known shape; known are {KNOWN_SHAPES}"
    for key, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            problem += (f". If {key} holds the records: jq -c '.{key}[]' OLD > NEW.jsonl writes "
                        "one on each line")
    raise UserError(problem)


def prompt_and_response(record, prompt_key, response_key):
    """The messages of a record like {"instruction": ..., "input": ..., "output": ...}.

    history  [[prompt, response], ...] of the turns before

    Prompt and response may be lists of messages. Those of the prompt are not targets.
    """
    prompt = parse_turns(record[prompt_key], prompt_key)
    response = parse_turns(record[response_key], response_key)
    turns = []
    for n, pair in enumerate(parse_column(record, "history", list, "a list of turns"), 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(f"history: item {n} must be a list of a prompt and a response")
        turns.append({"role": "user", "content": pair[0]})
        turns.append({"role": "assistant", "content": pair[1]})
    if isinstance(prompt, list):
        turns += [turn | {"weight": 0} for turn in prompt]
    else:
        for key in ("input", "context"):
            if record.get(key):
                check_type(record[key], str, f"{key}: expected text")
                prompt = "\n\n".join([prompt, record[key]] if prompt else [record[key]])
        turns.append({"role": "user", "content": prompt})
    if isinstance(response, list):
        return turns + response
    thoughts = {key: record[key] for key in REASONING_KEYS if isinstance(record.get(key), str)}
    return [*turns, {"role": "assistant", "content": response} | thoughts]


def parse_turns(value, key):
    """A text, or a list of messages, perhaps as JSON text. "[]" is a text, and so is "[1]"."""
    turns = parse_json(value) or value
    if isinstance(turns, list) and all(isinstance(t, dict) and "role" in t for t in turns):
        return turns
    check_type(value, str, f"{key}: expected text")
    return value


def normalize_tool(tool):
    """Return a tool as servers give it to templates: {"type": "function", "function": {...}}."""
    # Null fields are of other tools: a dataset that was stored with Arrow gives the same keys to
    # all objects of a column. In a JSON schema, only these two can be null.
    tool = without_nulls(parse_json(tool), kept=("default", "const"))
    check_type(tool, dict, "tools: expected objects")
    if "function" not in tool:    # {"name": ..., "parameters": ...}, with or without the type
        tool = {"function": {key: value for key, value in tool.items()
                             if (key, value) != ("type", "function")}}
    function = tool["function"]
    check_type(function, dict, "tools: expected objects")
    for key in ("name", "description"):
        check_type(function.get(key, ""), str, f"tools: expected a {key} that is text")
    if "parameters" in function:
        function["parameters"] = parse_json(function["parameters"])
        check_type(function["parameters"], dict, "tools: expected parameters that are an object")
    return {"type": "function"} | tool


def drop_null_arguments(messages, tools):
    """Drop null arguments that the tool of a call does not have: see normalize_tool."""
    properties = {}                                      # {tool: its parameters}
    for tool in tools:
        parameters = tool["function"].get("parameters", {})
        if isinstance(parameters.get("properties"), dict):
            properties[tool["function"].get("name")] = parameters["properties"]
    for message in messages:
        for call in message.get("tool_calls", []):
            function = call["function"]
            known = properties.get(function.get("name"))
            if known is not None and isinstance(function["arguments"], dict):
                function["arguments"] = {key: value for key, value in function["arguments"].items()
                                         if value is not None or key in known}


def normalize_message(turn):
    """A message -> {"role": one of the templates' roles, "content", "weight", ...}."""
    check_type(turn, dict, "expected an object")
    role = turn.get("role") or turn.get("from")
    content = turn.get("value") if turn.get("content") is None else turn["content"]
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f"role {role!r} must be one of {', '.join(ROLES)}")
    message = {key: value for key, value in turn.items()
               if key not in REPLACED_KEYS and value is not None}
    # the first of three places counts: a key, text before a call, parts of the content
    reasoning = find_reasoning(turn)
    if role in CALL_ROLES and isinstance(content, str):
        before, _, content = content.rpartition(THOUGHTS_END)
        reasoning = reasoning or before.strip().removeprefix("<think>").strip()
    calls = parse_calls(turn, role, content)
    if calls:
        message["tool_calls"] = [normalize_call(call) for call in calls]
    if role in CALL_ROLES:
        content = None
    if role in OUTPUT_ROLES:
        message.setdefault("tool_call_id", "")           # set_call_ids() gives it one
    if isinstance(content, list):
        content, thoughts = split_parts(content)
        reasoning = reasoning or thoughts
    if reasoning:
        message["reasoning_content"] = reasoning
    if content is not None or not has_generated_fields(message):     # calls or reasoning
        check_type(content, (str, list), "content: expected text")
    elif not calls:                                      # reasoning alone: no template needs null
        content = ""
    weight = parse_weight(turn, MESSAGE_WEIGHT_KEYS)
    return message | {"content": content, "role": ROLES[role], "weight": weight}


def find_reasoning(turn):
    """An answer's thoughts, under the first of REASONING_KEYS that has some; or ""."""
    for key in REASONING_KEYS:
        if turn.get(key):
            check_type(turn[key], str, f"{key}: expected text")
            return turn[key]
    return ""


def parse_calls(turn, role, content):
    """The tool calls of a message as they are in it: a list."""
    if role in CALL_ROLES:
        return parse_function_calls(content)
    if turn.get("function_call") and not turn.get("tool_calls"):     # OpenAI's older form
        return parse_function_calls(turn["function_call"])
    return parse_column(turn, "tool_calls", list, "a list of objects")


def parse_function_calls(content):
    """'{"name": ..., "arguments": ...}', or a list of such calls -> tool_calls."""
    calls = parse_json(content)
    if not isinstance(calls, list):
        calls = [calls]
    with error_context("a function_call must be JSON with a name and arguments",
                       (KeyError, TypeError)):
        return [{"id": "", "name": call["name"], "arguments": call["arguments"]} for call in calls]


def set_call_ids(messages):
    """Give ids to ShareGPT's calls and outputs, which have none ("").

    Outputs follow their calls in the same order: the first after some calls is that of the first.
    """
    n_calls = 0
    waiting = []                             # ids of calls without an output
    was_output = False
    for message in messages:
        is_output = message["role"] == "tool"
        if was_output and not is_output:
            waiting = []
        was_output = is_output
        for call in message.get("tool_calls", []):
            if call.get("id") == "":
                n_calls += 1
                call["id"] = tool_call_id(n_calls)
            if "id" in call:
                waiting.append(call["id"])
        if message.get("tool_call_id") == "":
            message["tool_call_id"] = waiting.pop(0) if waiting else tool_call_id(n_calls)


def tool_call_id(n):
    return f"call{n:05}"         # 9 letters and digits: Mistral's templates refuse other ids


def normalize_call(call):
    """Return a tool call as servers give it to templates, without null fields:

        {"type": "function", "id": ..., "function": {"name": ..., "arguments": ...}}
    """
    problem = "tool_calls: expected objects"
    check_type(call, dict, problem)
    if "function" not in call:
        function = {key: value for key, value in call.items() if key not in ("type", "id")}
        call = {"id": call.get("id"), "function": function}
    check_type(call["function"], dict, problem)
    function = {key: value for key, value in call["function"].items() if value is not None}
    check_type(function.get("name", ""), str, "tool_calls: expected a name that is text")
    values = [function.pop(key) for key in ARGUMENT_KEYS if key in function]
    function["arguments"] = values[0] if values and values[0] else {}
    call = {key: value for key, value in call.items() if value is not None}
    # the type comes first for the order of the keys, and again to override the call's own type
    return {"type": "function"} | call | {"type": "function", "function": function}


def split_parts(parts):
    """A content's parts -> its text parts, and the text of its thoughts. UserError for images.

        [{"type": "thinking", "thinking": "a"}, {"value": "b"}, "c"]
            -> [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}], "a"

    A single text is returned as it is.
    """
    texts = []
    thoughts = ""
    for part in parts:
        if isinstance(part, str):
            part = {"text": part}
        check_type(part, dict, "content: expected parts that are objects")
        kind = part.get("type") or "text"
        is_thought = kind in REASONING_KEYS
        if not is_thought and kind not in ("text", "input_text", "output_text"):
            raise UserError(f"content: a part of type {kind} cannot be trained on, only text")
        text = part.get(kind, part.get("text", part.get("value")))
        check_type(text, str, f"content: expected text in a part of type {kind}")
        if is_thought:
            thoughts += text
        else:
            texts.append(text)
    if len(texts) < 2:
        return "".join(texts), thoughts
    return [{"type": "text", "text": text} for text in texts], thoughts


def parse_weight(d, keys):
    """The loss weight that one of these keys sets, as a float. None of them: 1."""
    for key in keys:
        value = d.get(key)
        if value is None or value == "":                 # "" is an empty field of a .csv file
            continue
        problem = f"{key}: a loss weight must be a number, {WEIGHT_RANGE}; got {value!r}"
        with error_context(problem, (ValueError, TypeError, OverflowError)):
            weight = float(value)
            if weight and not 6e-8 <= abs(weight) <= 65504:
                raise ValueError("out of the range of float16")
        return weight
    return 1.0


# --------------------------------------------------------------------------------------------------
# render: messages -> text, by the jinja template of the model

CHATML = ("{% for message in messages %}"
          "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# for vocabularies without the two special tokens of ChatML
PLAIN = ("{% for message in messages %}"
         "{{ message.role }}:\n{{ message.content }}{{ eos_token }}\n{% endfor %}"
         "{% if add_generation_prompt %}assistant:\n{% endif %}")
TEMPLATE_FILES = ("chat_template.jinja", "tokenizer_config.json")    # in a model's folder
# Marks that are put into templates or messages, and found in the rendering: around {% generation %}
# blocks, around the index of a message instead of its content, inside of spelled special tokens.
# They are random, so that no message contains them
GENERATION_MARK, PLACEHOLDER_MARK, BREAK = (f"\ufdd0{os.urandom(8).hex()}\ufdd1" for _ in range(3))
# (the index of a message, the text up to the next placeholder)
PLACEHOLDER = re.compile(f"{PLACEHOLDER_MARK}([0-9]+){PLACEHOLDER_MARK}(.*?)"
                         rf"(?={PLACEHOLDER_MARK}|\Z)", re.DOTALL)
# two words with which ChatTemplate tries a template out; no template has them in its own text
WORDS = [f"w{os.urandom(8).hex()}" for _ in range(2)]
SPACES = re.compile(r"\s*")
THOUGHTS_END = "</think>"
# warnings about parts of a record that the chat template does not write
UNWRITTEN = "the chat template does not write {} of a record; another data.chat_template may"
THOUGHT_KEY = re.compile("reason|think|thought|rationale|^cot|_cot$", re.IGNORECASE)
UNUSED = "chat_template_kwargs has a variable that the chat template does not use"
to_json = json.JSONEncoder(ensure_ascii=False, default=str).encode


def template_text(tok, cfg):
    """The jinja text of data.chat_template."""
    name = cfg["data"]["chat_template"]
    if (name or "default") in tok.templates:
        return tok.templates[name or "default"]
    if not name and tok.templates:
        raise UserError("data.chat_template: must name one of the model's templates, of which none "
                        f"is the default: {', '.join(tok.templates)}")
    if name not in ("", "chatml"):
        names = ", ".join(["chatml", *tok.templates])
        problem = f"none of {names}, and no readable file: "
        with error_context("data.chat_template", problem=problem):
            return read_text(name)
    if {"<|im_start|>", "<|im_end|>"} <= tok.special_and_added.keys():
        return CHATML
    if name:
        raise UserError("data.chat_template: chatml needs a tokenizer with <|im_start|> and "
                        "<|im_end|>; leave it empty for a plain one that ends turns with EOS")
    if not tok.eos:
        raise UserError("data.eos_token: chats need a token that ends a turn; this tokenizer has "
                        "neither <|im_end|> nor an EOS")
    return PLAIN


def template_texts(tok, cfg, required=False):
    """[template_text(), and that of chats with tools if the model has another one].

    required  False: [] if there is none and the config names none, because texts need none
    """
    name = cfg["data"]["chat_template"]
    try:
        texts = [template_text(tok, cfg)]
    except UserError:
        if name or required:
            raise
        return []
    if "tool_use" in tok.templates and not name:
        texts.append(tok.templates["tool_use"])
    return texts


def load_template(tok, cfg, now=None):
    """template_texts(), compiled. An error names the file that the template is from.

    now  see compile_template
    """
    texts = template_texts(tok, cfg, required=True)
    place = cfg["data"]["chat_template"] or "built-in template"
    if tok.folder and not cfg["data"]["chat_template"]:
        files = [tok.folder / name for name in TEMPLATE_FILES]
        place = next(filter(Path.is_file, files), place)
    with error_context(place, (ValueError, RecursionError)):    # jinja2 raises both
        template = compile_template(texts[0], now)
        if len(texts) > 1:
            template.tool_use = compile_template(texts[1], now)
    return template


def reads_clock(tok, cfg):
    """Do the templates write the date?"""
    return any("strftime_now" in text for text in template_texts(tok, cfg))


def fixed_time(cfg):
    """The time of templates that read the clock: data.date, or today's midnight."""
    date = cfg["data"]["date"] or str(datetime.now())
    with error_context("data.date", ValueError, "must be a date like 2026-01-31: "):
        return datetime.fromisoformat(date[:10])


@dataclass(eq=False)
class ChatTemplate:
    """A compiled chat template."""
    jinja: object                # jinja2.Template
    text: str                    # as jinja2 compiles it
    variables: set               # names of those that it reads
    tool_use: object = None      # the ChatTemplate of chats with tools, if that is another one

    @cached_property
    def takes_parts(self):
        """Does it write the texts of a content's parts, and not their list, as Python or JSON?"""
        word = WORDS[0]
        text = self.try_content([{"type": "text", "text": word}])
        return word in text and not re.search(f"['\"]text['\"]: ?['\"]{word}", text)

    @cached_property
    def takes_text(self):
        """Does it write contents that are text? Those of vision models may need a list of parts.

        True if it writes neither.
        """
        return WORDS[0] in self.try_content(WORDS[0]) or not self.takes_parts

    @cached_property
    def reasoning_keys(self):
        """The names under which it gets reasoning: those that it has, and reasoning_content."""
        names = [key for key in REASONING_KEYS if re.search(rf"\b{key}\b", self.text)]
        return {"reasoning_content", *names}

    def writes_call(self, content, is_json):
        """Does it write a tool call, if its message has no other field than `content`?

        content  {} or {"content": ...}: this field of the message
        is_json  the arguments are given as JSON text, and must be written as this text; otherwise
                 they are given as an object
        False also if it shows Python's None or {'NAME': ...} instead.
        """
        arguments = {WORDS[0]: WORDS[1]}
        text = to_json(arguments)
        function = {"name": "example", "arguments": text if is_json else arguments}
        call = {"type": "function", "id": "call00001", "function": function}
        user = {"role": "user", "content": "a"}
        answer = {"role": "assistant", "tool_calls": [call]} | content
        written = self.try_render([user, answer])
        without_call = self.try_render([user, {"role": "assistant", "content": "b"}])
        for word in ("None", f"'{WORDS[0]}'"):
            if written.count(word) > without_call.count(word):
                return False
        return (text if is_json else WORDS[0]) in written

    def try_content(self, content):
        return self.try_render([{"role": "user", "content": content}])

    def try_render(self, messages):
        """Render messages. "" if the template raises an exception."""
        try:
            return self.jinja.render(messages=messages, bos_token="", eos_token="")
        except Exception:
            return ""


class ChatEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """jinja2's sandbox, with the names that chat templates rely on.

    now  the time of templates that read the clock
    """

    def __init__(self, now):
        super().__init__(trim_blocks=True, lstrip_blocks=True,
                         extensions=[jinja2.ext.loopcontrols])
        self.filters["mark_generation"] = mark_generation
        # as in transformers: jinja2's own filter escapes <, > and & for HTML
        self.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        self.globals.update(raise_exception=raise_exception, strftime_now=now.strftime)

    def getattr(self, obj, attribute):
        # message.role is a key: jinja2 tries getattr first, and the exception takes half of the
        # time of a rendering
        if type(obj) is dict and attribute in obj and not hasattr(dict, attribute):
            return obj[attribute]
        return super().getattr(obj, attribute)


def compile_template(text, now=None):
    """Compile jinja text.

    now  the time of templates that read the clock; None: the time at which it is compiled
    """
    environment = ChatEnvironment(now or datetime.now())
    # {% generation %} ... {% endgeneration %}, as tags that jinja2 knows
    for tag, known in (("generation", "filter mark_generation"), ("endgeneration", "endfilter")):
        text = re.sub(rf"{{%([-+]?)\s*{tag}\s*([-+]?)%}}", rf"{{%\1 {known} \2%}}", text)
    try:
        # first, because it leaves out what is in environment.globals, where tools come next
        variables = jinja2.meta.find_undeclared_variables(environment.parse(text))
        # templates test `tools is none`, which is false if it is undefined
        environment.globals.update(tools=None, documents=None)
        jinja = environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        problem = f"the chat template's line {error.lineno}: {one_line(error.message)}"
        raise UserError(problem) from None
    except SyntaxError as error:             # a {% break %} outside a loop, for example
        raise UserError(f"the chat template: {one_line(error)}") from None
    jinja.globals = dict(jinja.globals)                  # every rendering copies this ChainMap
    return ChatTemplate(jinja, text, variables - {"messages", "add_generation_prompt"})


def mark_generation(text):
    return GENERATION_MARK + text + GENERATION_MARK


def raise_exception(message):
    raise ValueError(message)


def render(template, tok, messages, /, add_generation_prompt=False, **variables):
    """Return (the text of messages, [(start, end)] of its {% generation %} blocks)."""
    special = {"bos_token": tok.bos or "", "eos_token": tok.eos or ""}
    variables = tok.token_variables | special | variables
    messages = [template_message(template, message) for message in messages]
    # a template may raise any of Python's exceptions
    with error_context("the chat template refuses these messages", Exception):
        marked = template.jinja.render(messages=messages, **variables,
                                       add_generation_prompt=add_generation_prompt)
    parts = marked.split(GENERATION_MARK)                # outside, inside, outside, ...
    ends = list(itertools.accumulate(map(len, parts)))
    return "".join(parts), [(ends[i - 1], ends[i]) for i in range(1, len(parts), 2)]


def template_message(template, message):
    """A message of normalize_message() as the template expects it."""
    message = {key: value for key, value in message.items() if key != "weight"}
    content = message.get("content")
    if isinstance(content, str) and not template.takes_text:
        message["content"] = [{"type": "text", "text": content}]
    if message.get("reasoning_content"):
        for key in template.reasoning_keys:
            message[key] = message["reasoning_content"]
    return message


@dataclass
class Rendering:
    """A chat's text, and what find_spans() and encode_spans() need to know about it."""
    template: ChatTemplate
    tok: object
    messages: list               # as rendered: see prepare_message
    variables: dict              # the template's, as rendered
    text: str
    generated: list              # [(start, end)] of {% generation %} blocks in the text
    # [(i, i + 1)]: a message spells a special token at text[i:], which stays text. Its first
    # character is enough for overlaps() to find it
    literals: list = ()
    prompts: dict = field(default_factory=dict)      # {i: prompt(i)}
    # indexes of answers whose prompt() is not the beginning of the text
    unprompted_answers: list = field(default_factory=list)
    warnings: list = field(default_factory=list)     # [(kind, example)]

    @cached_property
    def openings(self):
        """What the template writes before an answer, for chats like this: see find_openings()."""
        first = [{"role": "system", "content": "a"}] if self.messages[0]["role"] == "system" else []
        variables = {name: value for name, value in self.variables.items()
                     if name not in ("tools", "documents")}    # few chats have the same ones
        return find_openings(self.template, self.tok, to_json([first, variables]))

    def prompt(self, i):
        """The generation prompt of answer i: the messages before it, and add_generation_prompt.

        None if the template refuses them.
        """
        if i not in self.prompts:
            self.prompts[i] = self.render_other(self.messages[:i], add_generation_prompt=True)
        return self.prompts[i]

    def render_other(self, messages, add_generation_prompt=False):
        """The text of other messages with these variables. None if the template refuses them."""
        with suppress(UserError):
            return render(self.template, self.tok, messages, add_generation_prompt,
                          **self.variables)[0]


def render_messages(template, tok, messages, add_generation_prompt=False, columns=None,
                    chat_template_kwargs=None, **given):
    """Render messages and find what in them only spells special tokens: a Rendering.

    columns               of the record; those that are variables of the template are given to it
    chat_template_kwargs  other variables
    given                 tools, documents
    """
    options = chat_template_kwargs or {}
    variables = (columns or {}) | options | given
    if template.tool_use and variables.get("tools"):
        template = template.tool_use
    variables = {key: value for key, value in variables.items() if key in template.variables}
    messages = [prepare_message(template, message) for message in messages]
    text, generated = render(template, tok, messages, add_generation_prompt, **variables)
    # JSON may hold half of a surrogate pair ("\ud83d"), which UTF-8 cannot encode, and text that
    # the tokenizer composes. Both are rare, so messages are cleaned only then
    if tok.clean(text) != text:
        messages, variables = map_strings(tok.clean, [messages, variables])
        text, generated = render(template, tok, messages, add_generation_prompt, **variables)
    rendering = Rendering(template, tok, messages, variables, text, generated)
    rendering.literals = find_literals(rendering, add_generation_prompt)
    if not add_generation_prompt:            # a prompt is a part of a chat, which is checked
        rendering.warnings += find_unwritten(rendering, given)
        for name in options:
            if name not in template.variables:
                rendering.warnings.append((UNUSED, f"{name}={options[name]!r:.60}"))
    return rendering


def find_literals(rendering, add_generation_prompt):
    """Return where in the text a message or variable spells special tokens: see Rendering.

    All are rendered once more with each spelled token broken by a mark:

        message   "no <|im_end|> here"     <|im_start|>user\\nno <|im_end|> here<|im_end|>
        broken    "no <#|im_end|> here"    <|im_start|>user\\nno <#|im_end|> here<|im_end|>
    """
    tok = rendering.tok
    values = [rendering.messages, rendering.variables]
    # one search in their JSON is quicker than one in each string
    if not tok.escaped_pattern.search(to_json(values)):
        return []
    insert_break = partial(tok.special_pattern.sub, break_token)
    messages, variables = map_strings(insert_break, values)
    broken, _ = render(rendering.template, tok, messages, add_generation_prompt, **variables)
    parts = broken.split(BREAK)
    if "".join(parts) != rendering.text:
        spelled = sorted(set(tok.special_pattern.findall(to_json(values))))
        raise UserError(f"the chat template looks for {' or '.join(spelled)} in messages, where it "
                        "is text and no control token; reasoning goes into reasoning_content")
    breaks = itertools.accumulate(map(len, parts[:-1]))
    return [(end - 1, end) for end in breaks]


def break_token(match):
    return match[0][0] + BREAK + match[0][1:]


def map_strings(function, value):
    """A JSON value with the function applied to every string in it, keys too."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, list):
        return [map_strings(function, item) for item in value]
    if isinstance(value, dict):
        return {map_strings(function, key): map_strings(function, item)
                for key, item in value.items()}
    return value


def find_unwritten(rendering, given):
    """Return warnings about texts of a record that are not in its rendering: [(warning, example)].

    Of arguments of calls, only texts are searched, and parameters of tools are not: templates write
    them in many forms. A short text counts as written if it is anywhere in the rendering.

    given  {"tools": ..., "documents": ...}, if there are some
    """
    texts = []                               # [(what it is, where, text)]
    for tool in given.get("tools", []):
        for key in ("name", "description"):
            texts.append(("the tools", "", tool["function"].get(key)))
    for document in given.get("documents", []):
        texts += [("the documents", "", value) for value in document.values()]
    for i, message in enumerate(rendering.messages):
        place = f"message {i + 1}: "
        for text in content_texts(message):
            thoughts, _, words = text.rpartition(THOUGHTS_END)
            texts.append((f"the {message['role']} message", place, words))
            texts.append(("the reasoning", place, thoughts.replace("<think>", "")))
        for key, value in message.items():
            if THOUGHT_KEY.search(key):
                texts.append(("the reasoning", place, value))
        for call in message.get("tool_calls") or []:
            arguments = parse_json(call["function"]["arguments"])
            values = arguments.values() if isinstance(arguments, dict) else []
            for value in (call["function"].get("name"), *values):
                texts.append(("a tool call", place, value))
    written = set()
    examples = {}                            # {what: the first that is not written}
    for what, place, text in texts:
        if not isinstance(text, str) or not text.strip():
            continue
        if is_written(text, rendering.text):
            written.add(what)
        else:
            examples.setdefault(what, f"{place}{text!r:.60}")
    if "the reasoning" in written:           # templates drop that of earlier turns on purpose
        examples.pop("the reasoning", None)
    return [(UNWRITTEN.format(what), example) for what, example in examples.items()]


def is_written(text, rendered):
    if text.strip() in rendered:
        return True
    # if the template trims or escapes it, letters, digits and spaces stay
    runs = re.findall(r"[\w ]+", text)
    return max(runs, key=len, default="").strip() in rendered


def prepare_message(template, message):
    """Give a message's content and tool calls the form that the template writes.

    A template without tool calls gets them as content, so that nothing is lost.
    """
    texts = content_texts(message)
    if not template.takes_parts and len(texts) > 1:
        message = message | {"content": "".join(texts)}
    calls = message.get("tool_calls")
    if not calls:
        return message
    if "tool_calls" not in template.text:
        for call in calls:
            texts.append(to_json(with_arguments(call, as_json=False)["function"]))
        return message | {"content": "\n".join(filter(None, texts)), "tool_calls": None}
    content = message.get("content")
    is_json = isinstance(calls[0]["function"]["arguments"], str)
    # find_call_form is cached: so only whether there is text counts
    form, as_json = find_call_form(template, content and "text", is_json)
    if not content:
        message = {key: value for key, value in message.items() if key != "content"} | form
    return message | {"tool_calls": [with_arguments(call, as_json) for call in calls]}


def content_texts(message):
    """The texts of a content's parts. A content that is a text is one part."""
    content = message.get("content") or ""
    return [content] if isinstance(content, str) else [part["text"] for part in content]


@lru_cache(maxsize=1000)
def find_call_form(template, content, is_json):
    """The form in which a template writes tool calls: ({"content": ...} or {}, arguments as JSON?).

    content  of the message that has them: None, "", or "text" for any other
    is_json  the arguments are JSON text

    Some templates look for null content, or need arguments as an object. The given form is returned
    if they are written in none. Null content is left out as in transformers.
    """
    given = {} if content is None else {"content": content}
    forms = [given] if content else [given, {}, {"content": None}, {"content": ""}]
    for form in forms:
        for as_json in (is_json, not is_json):
            if template.writes_call(form, as_json):
                return form, as_json
    return given, is_json


def with_arguments(call, as_json):
    """A tool call with its arguments as JSON text, or as an object (text that is no JSON stays)."""
    arguments = call["function"]["arguments"]
    if not as_json:
        arguments = parse_json(arguments)
    elif not isinstance(arguments, str):
        arguments = to_json(arguments)
    return call | {"function": call["function"] | {"arguments": arguments}}


# --------------------------------------------------------------------------------------------------
# encode: text -> token ids

@dataclass(eq=False, repr=False, kw_only=True)
class BaseTokenizer:
    """What Tokenizer and HFTokenizer have in common.

    special   {text: id} of control tokens. Only templates write them: in messages they are text
    added     {text: id} of other tokens that are found wherever they are spelled, such as <think>
    bos, eos  texts of special tokens
    templates {name: jinja text} of the model's chat templates
    path      of the tokenizer.json, beside the model's other files
    token_variables  {"pad_token": text, ...}: variables of templates
    nfc       text is first brought to Unicode's composed form (Qwen)

    compile_patterns() sets
      special_and_added, special_and_added_ids    both kinds of tokens as {text: id}, and the ids
      special_pattern, special_and_added_pattern  find them in text
      escaped_pattern                             finds special tokens in JSON
      end_ids                                     of tokens that can end an answer
    """
    special: dict
    added: dict = field(default_factory=dict)
    bos: str = None
    eos: str = None
    templates: dict = field(default_factory=dict)
    path: Path = None
    token_variables: dict = field(default_factory=dict)
    nfc: bool = False

    @property
    def folder(self):
        return self.path and self.path.parent

    @property
    def template(self):
        return self.templates.get("default")

    def compile_patterns(self):
        self.special_pattern = compile_alternation(self.special)
        self.special_and_added = self.special | self.added
        self.special_and_added_ids = frozenset(self.special_and_added.values())
        self.special_and_added_pattern = compile_alternation(self.special_and_added)
        # some models have <|im_end|> among the added tokens
        self.end_ids = {i for text, i in self.special_and_added.items()
                        if text in self.special or CONTROL_TOKEN.fullmatch(text)}
        # special tokens as JSON spells them
        self.escaped_pattern = compile_alternation([to_json(text)[1:-1] for text in self.special])

    def encode(self, text):
        """str -> ids [n] int64. Special tokens that are spelled in it are text."""
        return self.encode_special(text, find_special=False).astype(np.int64)

    def compose(self, text):
        return unicodedata.normalize("NFC", text) if self.nfc else text

    def clean(self, text):
        """Replace lone surrogates by U+FFFD, and compose: the text that the ids stand for."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if not self.nfc or unicodedata.is_normalized("NFC", text):
            return text
        # added tokens are found in the text before it is composed
        segments = self.split_special(text, (), find_special=False)
        return "".join(self.compose(text[start:end]) if token is None else text[start:end]
                       for start, end, token in segments)

    def split_special(self, text, literals, find_special):
        """Split a text at special and added tokens: [(start, end, id or None)] without gaps."""
        segments = []
        position = 0
        for match in self.special_and_added_pattern.finditer(text):
            start, end = match.span()
            is_special = match[0] in self.special
            if is_special and (not find_special or overlaps(literals, start, end)):
                continue
            segments += [(position, start, None), (start, end, self.special_and_added[match[0]])]
            position = end
        return [*segments, (position, len(text), None)]


@dataclass(eq=False, repr=False)
class Tokenizer(BaseTokenizer):
    """A byte-level BPE tokenizer, run by tiktoken."""
    ranks: dict                  # {bytes of a token: id}; pairs are merged in this order
    pattern: str                 # regular expression that splits text into words

    def __post_init__(self):
        self.check_vocabulary()
        self.compile_patterns()
        ids = list(self.ranks.values())
        tokens = self.special_and_added
        self.n_vocab = 1 + max([*ids, *tokens.values()])
        with error_context("tiktoken refuses its pattern", (ValueError, RecursionError)):
            self.encoding = tiktoken.Encoding("tokenizer", pat_str=self.pattern,
                                              special_tokens=tokens, mergeable_ranks=self.ranks)
        self.token_lengths = np.zeros(self.n_vocab, np.int64)    # [V] in bytes; 0: no such id
        self.token_lengths[ids] = [len(token) for token in self.ranks]
        self.token_lengths[list(tokens.values())] = [len(text.encode()) for text in tokens]
        self.byte_ids = None                     # [256] the id of each byte, if nothing is merged
        if len(ids) == 256:
            self.byte_ids = np.array([self.ranks[bytes([b])] for b in range(256)], np.uint32)

        # tiktoken's own search for special and added tokens is exact unless one of them is a prefix
        # of another: then it may take the shorter one. (If a token is a prefix of any other, then
        # also of the next one in sorted order.) byte_ids encodes without tiktoken, so the search is
        # ours: split_special().
        in_order = sorted(tokens)
        has_prefix = any(b.startswith(a) for a, b in zip(in_order, in_order[1:]))
        self.tiktoken_finds_special = not has_prefix and self.byte_ids is None

        vocabulary = hashlib.sha256(repr(self.ranks).encode()).hexdigest()
        self.fingerprint = fingerprint(self.pattern, self.special, self.added, self.bos, self.eos,
                                       self.nfc, vocabulary)

    def check_vocabulary(self):
        """Raise UserError for what would abort the process in tiktoken."""
        missing = [b for b in range(256) if bytes([b]) not in self.ranks]
        if missing:
            raise UserError(f"tokenizer: its vocabulary lacks {len(missing)} of the 256 single "
                            f"bytes (the first is {missing[0]})")
        ids = Counter([*self.ranks.values(), *self.special.values(), *self.added.values()])
        [(i, n)] = ids.most_common(1)
        if n > 1:
            raise UserError(f"tokenizer: {n} of its tokens have the id {i}")

    def encode_ordinary(self, text):
        """str -> ids [n] uint32. Neither special nor added tokens are found."""
        if self.byte_ids is not None:
            return self.byte_ids[np.frombuffer(text.encode(), np.uint8)]
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:                   # tiktoken gives up on a run of a million spaces
            ids = []
            for match in regex.finditer(self.pattern, text):
                ids += self.encoding._encode_single_piece(match[0])
            return np.array(ids, np.uint32)

    def encode_with_offsets(self, text, literals=()):
        """encode_special(), and where in the text each token is, in characters.

        text  as clean() returns it

        Returns ids uint32 [n], starts and ends int64 [n]
        """
        ids = self.encode_special(text, literals)
        lengths = self.token_lengths[ids]
        ends = lengths.cumsum()                              # in bytes
        starts = ends - lengths
        if not text.isascii():
            encoded = np.frombuffer(self.encoding.decode_bytes(ids.tolist()), np.uint8)
            starts_character = encoded & 0xC0 != 0x80        # bytes that continue one are 10......
            n_characters = np.append(0, starts_character.cumsum())
            starts = n_characters[starts + 1] - 1
            ends = n_characters[ends]
        return ids, starts, ends

    def encode_special(self, text, literals=(), find_special=True):
        """Encode a text with the special and added tokens in it: ids uint32 [n].

        literals      spans of the text where special tokens are text
        find_special  False: special tokens are text everywhere
        """
        is_composed = not self.nfc or unicodedata.is_normalized("NFC", text)
        if self.tiktoken_finds_special and is_composed and not literals:
            found = self.special_and_added if find_special else self.added
            try:
                return self.encoding.encode_to_numpy(text, allowed_special=set(found),
                                                     disallowed_special=())
            except ValueError:                               # see encode_ordinary
                pass
        ids = []
        for start, end, token in self.split_special(text, literals, find_special):
            if token is None:
                ids.append(self.encode_ordinary(self.compose(text[start:end])))
            else:
                ids.append(np.array([token], np.uint32))
        return np.concatenate(ids)

    def decode(self, ids):
        """ids -> str. Unknown ids are left out, broken UTF-8 becomes U+FFFD."""
        known = [int(i) for i in ids if 0 <= i < self.n_vocab and self.token_lengths[i]]
        tokens = self.encoding.decode_tokens_bytes(known)
        return b"".join(tokens).decode("utf-8", errors="replace")


@dataclass(eq=False, repr=False)
class HFTokenizer(BaseTokenizer):
    """A tokenizer.json that tiktoken cannot represent exactly, run by the tokenizers package.

    The package finds special tokens in a text even where they are only spelled (Unigram models do
    in spite of its option encode_special_tokens). So we load a copy of tokenizer.json in which
    special tokens have random names (self.hidden), and before encoding, those special tokens of the
    text that are meant as such are replaced by these names, which have their tokens' lengths:

        <s>hi </s> there</s>   with the first </s> a literal   ->   AAAhi </s> thereBBBB
    """
    spec: dict                   # the content of tokenizer.json

    def __post_init__(self):
        import tokenizers
        # as many random private-use characters as the token has, so that offsets do not change
        private = range(0xF0000, 0x10FFFE)
        choose = random.SystemRandom().choices
        self.hidden = {text: "".join(map(chr, choose(private, k=len(text))))
                       for text in self.special}
        rename = partial(map_strings, lambda text: self.hidden.get(text, text))
        tokens = rename(self.spec.get("added_tokens") or [])
        for token in tokens:                                 # normalizers would change hidden names
            token["normalized"] = token["normalized"] and not token["special"]
        renamed = self.spec | {"model": rename(self.spec["model"]), "added_tokens": tokens,
                               "post_processor": None, "truncation": None, "padding": None}
        # tokenizers raises nothing narrower than Exception, and a panic of Rust not even that
        with error_context("the tokenizers package cannot read it either", BaseException):
            self.encoder = tokenizers.Tokenizer.from_str(json.dumps(renamed))
        self.n_vocab = 1 + max(self.encoder.get_vocab().values())
        self.compile_patterns()
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        self.fingerprint = fingerprint(digest, self.bos, self.eos)

    def encode_special(self, text, literals=(), find_special=True):
        """As Tokenizer.encode_special()."""
        return np.array(self.run(text, literals, find_special).ids, np.uint32)

    def encode_with_offsets(self, text, literals=()):
        """As Tokenizer.encode_with_offsets()."""
        encoded = self.run(text, literals, find_special=True)
        # (the byte tokens of one character all have this character's span)
        starts, ends = np.array(encoded.offsets, np.int64).reshape(-1, 2).T
        return np.array(encoded.ids, np.uint32), starts, ends

    def run(self, text, literals, find_special):
        """The tokenizers package's Encoding of a text."""
        pieces = []
        for start, end, token in self.split_special(text, literals, find_special):
            piece = text[start:end]
            pieces.append(piece if token is None else self.hidden.get(piece, piece))
        return self.encoder.encode("".join(pieces), add_special_tokens=False)

    def decode(self, ids):
        """ids -> str"""
        text = self.encoder.decode([int(i) for i in ids], skip_special_tokens=False)
        for token, name in self.hidden.items():
            text = text.replace(name, token)
        return text


def token_bytes(tok):
    """The length in bytes of each token's text: int64 [V]; 0 for control tokens.

    0 for all if the vocabulary does not determine them, as that of WordPiece.
    """
    if isinstance(tok, Tokenizer):
        lengths = tok.token_lengths.copy()
    else:
        lengths = np.zeros(tok.n_vocab, np.int64)
        decoder = tok.spec.get("decoder") or {}
        kinds = {step["type"] for step in [decoder, *decoder.get("decoders", [])] if step}
        if not kinds & {"ByteLevel", "Metaspace", "ByteFallback"}:
            return lengths
        for text, i in tok.encoder.get_vocab().items():
            if "ByteLevel" in kinds:                         # one character per byte
                lengths[i] = len(text)
            elif re.fullmatch("<0x[0-9A-F]{2}>", text):
                lengths[i] = 1
            else:
                lengths[i] = len(text.replace("\u2581", " ").encode())
        lengths[list(tok.added.values())] = [len(text.encode()) for text in tok.added]
    lengths[list(tok.end_ids.union(tok.special.values()))] = 0
    return lengths


def overlaps(spans, start, end):
    return any(span_start < end and start < span_end for span_start, span_end in spans)


def compile_alternation(texts):
    """A pattern that finds any of these texts, the longest first; nothing if there are none."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def bytes_to_unicode():
    """{byte: the character that spells it in a tokenizer.json}, as in GPT-2.

    Printable ones are themselves; the others, in order, are U+0100, U+0101, ...
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return dict(zip(printable + others, map(chr, [*printable, *range(256, 256 + len(others))])))


BYTES_TO_UNICODE = bytes_to_unicode()
UNICODE_TO_BYTES = {character: b for b, character in BYTES_TO_UNICODE.items()}
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT-2's without numbers, for tokenizers that first split digits off (StarCoder). Then a text ends
# before each digit, so (?!\S), which is true at the end and before white space, must be true before
# a digit, too: (?![^\s\p{N}])
WITHOUT_DIGITS_PATTERN = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|"
                          r"\s+(?![^\s\p{N}])|\s+")
BYTES_SPECIAL = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}


def load_tokenizer(cfg):
    """The tokenizer of data.tokenizer, or of model.init_from. Raises UserError."""
    data = cfg["data"]
    name = data["tokenizer"] or configs.resolve_pretrained(cfg["model"]["init_from"])
    if not name:
        raise UserError("data.tokenizer: is not set, and there is no model.init_from to take it "
                        "from; model.init_from=PATH, or data.tokenizer=bytes for a new model")
    if name == "bytes":
        tok = bytes_tokenizer()
    elif name.endswith(".tiktoken"):
        tok = tiktoken_file(Path(name), data["tokenizer_pattern"], data["special_tokens"])
    elif Path(name).exists():
        tok = huggingface_tokenizer(Path(name))
    elif name in tiktoken.list_encoding_names():
        tok = tiktoken_encoding(name)
    else:
        raise UserError(f"data.tokenizer: {name} is no file or folder; otherwise it must be one of "
                        f"bytes, {', '.join(tiktoken.list_encoding_names())}")
    for key in ("bos_token", "eos_token"):
        text = data[key]
        if text is None:
            continue
        if text and text not in tok.special:
            raise UserError(f"data.{key}: {text!r} is no special token of {name}; it has "
                            f"{', '.join(tok.special) or 'none'}")
        setattr(tok, key.removesuffix("_token"), text or None)
        tok.fingerprint = fingerprint(tok.fingerprint, key, text)
    return tok


def bytes_tokenizer():
    """Every byte is a token; BYTES_SPECIAL are ChatML's tokens, and BOS and EOS."""
    ranks = {bytes([b]): b for b in range(256)}
    return Tokenizer(ranks, r"[\s\S]", special=BYTES_SPECIAL, bos="<|endoftext|>",
                     eos="<|endoftext|>")


def tiktoken_encoding(name):
    """An encoding that tiktoken knows by name, such as gpt2, and downloads."""
    problem = (f"cannot download {name}; TIKTOKEN_CACHE_DIR=FOLDER names a folder that has it, and "
               "bytes or a folder with a tokenizer.json needs no network: ")
    with error_context("data.tokenizer", OSError, problem):
        encoding = tiktoken.get_encoding(name)
    special = {}
    for text, i in encoding._special_tokens.items():
        if i not in special.values():        # o200k_harmony has two texts of one id
            special[text] = i
    return Tokenizer(encoding._mergeable_ranks, encoding._pat_str, special=special,
                     eos="<|endoftext|>")


def tiktoken_file(path, pattern, special):
    """A file of `base64(token) rank` lines. It lacks the pattern and the special tokens."""
    if not pattern:
        raise UserError(f"data.tokenizer_pattern: {path} needs the regular expression that its "
                        "tokenizer splits text with")
    # (tiktoken's own reader caches files by their name)
    with error_context(path, (OSError, ValueError), "not a .tiktoken file: "):
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        if not all(0 <= rank < 2**32 for rank in ranks.values()):
            raise UserError("a rank must be from 0 to 2**32 - 1")
    place = f"{path} with data.tokenizer_pattern {pattern!r}"
    with error_context(place):
        if len(ranks) > 256:             # with 256 tokens, byte_ids is used instead of the pattern
            check_pattern(pattern)
        return Tokenizer(ranks, pattern, special=special)


def huggingface_tokenizer(path):
    """A tokenizer.json, or its folder -> Tokenizer if that is exact, else HFTokenizer."""
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; a tokenizer's folder must hold a tokenizer.json")
    spec = configs.read_json(path)
    config_file = path.with_name("tokenizer_config.json")
    config = configs.read_json(config_file) if config_file.is_file() else {}
    damage = (KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError)
    with error_context(path, damage, "not a whole tokenizer.json: "):
        tokens = spec.get("added_tokens") or []
        special = {t["content"]: t["id"] for t in tokens if t["special"]}
        names = token_names(spec, config)
        bos, eos = (names.get(key) for key in ("bos_token", "eos_token"))
        fields = {"special": special,
                  "added": {t["content"]: t["id"] for t in tokens if not t["special"]},
                  "bos": bos if bos in special else None,
                  "eos": eos if eos in special else None,
                  "templates": read_templates(path.parent, config),
                  "path": path,
                  "token_variables": names}
        try:
            return byte_level_tokenizer(spec, tokens, fields)
        except UserError as error:
            return package_tokenizer(spec, fields, str(error))


def package_tokenizer(spec, fields, problem):
    """A tokenizer.json that tiktoken cannot represent -> HFTokenizer. Prints why."""
    path = fields["path"]
    install = f"{path}: {problem}; pip install tokenizers makes it usable"
    with error_context(install, ImportError), error_context(path):
        tok = HFTokenizer(spec, **fields)
    print_once(f"note: {path}: {problem}; the tokenizers package runs it")
    return tok


def read_templates(folder, config):
    """The chat templates of a model's folder by name. Files of their own come first."""
    templates = {}
    if (folder / "chat_template.jinja").is_file():
        templates["default"] = read_text(folder / "chat_template.jinja")
    for file in sorted(folder.glob("additional_chat_templates/*.jinja")):
        templates[file.stem] = read_text(file)
    in_config = config.get("chat_template")
    if templates or in_config is None:
        return templates
    if isinstance(in_config, list):                          # [{"name", "template"}, ...]
        templates = {item["name"]: item["template"] for item in in_config}
    else:
        templates = {"default": in_config}
    for template in templates.values():
        check_type(template, str, f"{folder / 'tokenizer_config.json'}: chat_template must be text")
    return templates


def token_names(spec, config):
    """{"bos_token": text, ...} of tokenizer_config.json.

    If it has no such key, BOS and EOS are what tokenizer.json's post-processor puts around a text.
    """
    names = {}
    processor = spec.get("post_processor") or {}
    pieces = []
    for step in processor.get("processors") or [processor]:
        pieces += step.get("single") or []
    if pieces:
        names["bos_token"] = pieces[0].get("SpecialToken", {}).get("id")
        names["eos_token"] = pieces[-1].get("SpecialToken", {}).get("id")
    extra = config.get("extra_special_tokens")
    for key, token in (config | (extra if isinstance(extra, dict) else {})).items():
        text = token.get("content") if isinstance(token, dict) else token
        if key.endswith("_token") and (text is None or isinstance(text, str)):
            names[key] = text
    return {key: text for key, text in names.items() if text}


def unsupported_error(part):
    return UserError(f"tiktoken cannot run {part} exactly, only byte-level BPE tokenizers (GPT-2, "
                     "Llama 3, Qwen kinds)")


def unsupported_part(spec, tokens):
    """The first part of a tokenizer.json that tiktoken would treat differently, or None."""
    model = spec["model"]
    kind = model.get("type", "BPE")
    if kind != "BPE" or "merges" not in model:
        return f"a {kind} model"
    for key in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            return f"a {kind} model with {key}"
    normalizer = (spec.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        return f"the normalizer {normalizer}"
    steps = pre_tokenizer_steps(spec)
    description = "the pre-tokenizer " + " + ".join(str(step.get("type")) for step in steps)
    if steps[-1].get("add_prefix_space"):
        return f"{description} with a prefix space"
    if split_pattern(steps) is None:
        return description
    # The tokenizers package searches normalized tokens last, and in normalized text; tiktoken all
    # at once. That may differ in two cases.
    searched_first = "".join(t["content"] for t in tokens if not t["normalized"])
    for token in tokens:
        content = token["content"]
        for flag in ("single_word", "lstrip", "rstrip"):
            if token[flag]:
                return f"the {flag} added token {content!r}"
        # 1. The normalizer makes the token from other text, as NFC makes one "é" of "e" and its
        # accent. It makes no spaces, so that tokens of spaces (GPT-NeoX has some) are safe.
        may_change = normalizer and not content.isspace()
        # 2. The token overlaps with one that is searched first: of the text "abc", tokenizers takes
        # "bc", if that is searched first, and tiktoken takes the leftmost, "ab".
        may_overlap = not set(content).isdisjoint(searched_first)
        if token["normalized"] and (may_change or may_overlap):
            return f"the normalized added token {content!r}"
    return None


def pre_tokenizer_steps(spec):
    pre_tokenizer = spec.get("pre_tokenizer") or {}
    return pre_tokenizer.get("pretokenizers") or [pre_tokenizer]


def split_pattern(steps):
    """Return one regular expression that splits a text as these pre-tokenizer steps do.

    We have one for ByteLevel, alone or after one Split or Digits. Otherwise None is returned.
    """
    *before, last = steps
    uses_gpt2_regex = last.get("use_regex", True)
    if last.get("type") != "ByteLevel" or len(before) > 1:
        return None
    if not before:
        return GPT2_PATTERN if uses_gpt2_regex else r"[\s\S]+"
    step = before[0]
    if step.get("type") == "Digits" and uses_gpt2_regex:
        digits = r"\p{N}" if step.get("individual_digits") else r"\p{N}+"
        return f"{digits}|{WITHOUT_DIGITS_PATTERN}"
    if uses_gpt2_regex:                      # it would split the Split's words again
        return None
    # A Split with these options yields the matches of its pattern. (Isolated also yields the text
    # between matches; check_pattern refuses patterns that leave some.)
    if (step.get("behavior"), step.get("invert")) not in (("Isolated", False), ("Removed", True)):
        return None
    return step.get("pattern", {}).get("Regex") or None


def byte_level_tokenizer(spec, tokens, fields):
    """A byte-level BPE tokenizer.json -> Tokenizer. Raises UserError if that is not exact.

    spec    the content of tokenizer.json
    tokens  its added tokens
    fields  of BaseTokenizer
    """
    problem = unsupported_part(spec, tokens)
    if problem:
        raise unsupported_error(problem)
    ranks = {}
    for text, i in spec["model"]["vocab"].items():
        if text in fields["special"] or text in fields["added"]:
            continue
        if not UNICODE_TO_BYTES.keys() >= set(text):
            raise unsupported_error(f"a vocabulary with {text!r}, which does not spell bytes,")
        ranks[bytes(map(UNICODE_TO_BYTES.get, text))] = i
    check_merges(spec["model"], ranks)
    pattern = split_pattern(pre_tokenizer_steps(spec))
    check_pattern(pattern)
    return Tokenizer(ranks, pattern, nfc=bool(spec.get("normalizer")), **fields)


TEST_STRINGS = (
    "", " ", "a", "Hello, world! I'll we'd they're DON'T", "  two  spaces   three    four",
    "tab\tnew\nline\r\n\r\n\n  end  ", "naïve café Ünïcödé", "日本語と中文，한국어",
    "1234567890 3.14 1,000,000 ½ ٣", "עברית العربية",
    "👩‍👩‍👧 🏳️‍🌈 🤖",
    "\x00\x01\x7f\x1b[0m",
    "_under_score__ --flag=value // /* x */", "aaaaaaaaaaaaaaaaaaaaaaaaa",
    "\u200b\u00a0\u3000\ufeff", "e\u0301 o\u0308", " \n \n\n\t x", "<|endoftext|> <|im_end|>",
    "if (x==1) {\n    return y;\n}")


def check_pattern(pattern):
    """Raise UserError if a regular expression is wrong, or if its matches leave text out."""
    with error_context(f"its pattern {pattern!r}", regex.error):
        words = regex.compile(pattern)
    for text in TEST_STRINGS:
        if "".join(match[0] for match in words.finditer(text)) != text:
            raise UserError(f"its pattern {pattern!r} leaves something out (seen on {text!r})")


def check_merges(model, ranks):
    """Raise UserError unless tiktoken merges as this tokenizer.json does.

    tokenizer.json joins the pair of neighbours that comes first in its list of merges. tiktoken
    joins any two neighbours that make a token, the lowest id first. Both give the same ids if:

    1. The ids of the list's results ascend. Otherwise, with the list [b c, a b] and ab's id below
       bc's, the text abc is a + bc in tokenizer.json, and ab + c in tiktoken.
    2. The list joins the characters of each token to this token. Otherwise, with the list
       [a b, b c, a bc], the text abc stays ab + c in tokenizer.json, and is abc in tiktoken.
    3. Or, for a token for which 2 fails: ignore_merges is set, so that a word which is this token
       becomes it at once; and the list has each pair of tokens that makes it, [a bc, ab c] for abc,
       because inside of longer words tiktoken joins any such pair.

    Conditions 2 and 3 are not checked for more than 20,000 merges, since that takes seconds. Such
    long lists come from training or conversion, which comply with both.
    """
    # "a b" in older files, ["a", "b"] in newer ones
    pairs = [tuple(pair.split(" ", 1) if isinstance(pair, str) else pair)
             for pair in model["merges"]]
    vocab = model["vocab"]
    ids = [vocab[left + right] for left, right in pairs]
    if ids != sorted(ids):
        raise unsupported_error("its order of merges")
    ignore_merges = model.get("ignore_merges")
    # the cheap part of 2, for lists of any length: each token but the bytes has a merge
    if len(ranks) > 256 + len(set(ids)) and not ignore_merges:
        raise unsupported_error("a vocabulary with tokens that no merge makes")
    if len(pairs) > 20_000:
        return
    indexes = {}
    for i, pair in enumerate(pairs):
        indexes.setdefault(pair, i)
    for token in map(spell, ranks):
        if merge_characters(token, indexes) == [token]:
            continue
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        splits = {(left, right) for left, right in splits if left in vocab and right in vocab}
        if not ignore_merges or not indexes.keys() >= splits:
            raise unsupported_error(f"a vocabulary whose merges do not make {token!r}")


def merge_characters(text, indexes):
    """The tokens that a tokenizer.json's merges, {pair: index}, make of a text's characters."""
    parts = list(text)
    while True:
        pairs = list(zip(parts, parts[1:]))
        merges = [(indexes[pair], i) for i, pair in enumerate(pairs) if pair in indexes]
        if not merges:
            return parts
        _, first = min(merges)
        parts[first:first + 2] = [parts[first] + parts[first + 1]]


def recover_merges(ranks):
    """{token: rank} -> [(left, right)]: all pairs of tokens that make a token, in its rank's order.

    tiktoken knows no merges: it joins any two neighbours that make a token, the lowest rank first.
    """
    merges = []
    for token in sorted(ranks, key=ranks.get):
        for i in range(1, len(token)):
            if token[:i] in ranks and token[i:] in ranks:
                merges.append((token[:i], token[i:]))
    return merges


# files of a model's folder that save_tokenizer copies
TOKENIZER_FILES = ("tokenizer*", "chat_template.jinja", "special_tokens_map.json", "vocab.*",
                   "added_tokens.json", "merges.txt", "*.model", "*.tiktoken", "tekken.json")
# for these classes, transformers 5 ignores the pre-tokenizer in tokenizer.json and takes GPT-2's
REBUILT_CLASSES = [f"{name}Tokenizer{suffix}" for name in ("GPT2", "GPTNeoX", "CodeGen")
                   for suffix in ("", "Fast")]


def save_tokenizer(tok, folder, chat_template):
    """Write the files from which transformers loads the tokenizer: copies of its own, or new ones.

    chat_template  jinja text, or None to keep the tokenizer's
    """
    folder = Path(folder)
    config_file = folder / "tokenizer_config.json"
    if not tok.folder:
        write_json(folder / "tokenizer.json", tokenizer_spec(tok))
    elif tok.folder.resolve() != folder.resolve():
        for pattern in TOKENIZER_FILES:
            for path in filter(Path.is_file, tok.folder.glob(pattern)):
                shutil.copyfile(path, folder / path.name)
        shutil.copyfile(tok.path, folder / "tokenizer.json")         # it may have another name
        templates = tok.folder / "additional_chat_templates"
        if templates.is_dir() and chat_template in (None, tok.template):
            shutil.copytree(templates, folder / templates.name, dirs_exist_ok=True)
    if config_file.is_file():
        config = configs.read_json(config_file)
    else:
        config = {"tokenizer_class": "PreTrainedTokenizerFast",
                  "clean_up_tokenization_spaces": False}
    if config.get("tokenizer_class") in REBUILT_CLASSES:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["bos_token"] = tok.bos
    config["eos_token"] = tok.eos
    map_file = folder / "special_tokens_map.json"        # of older models; it would override both
    if map_file.is_file():
        names = configs.read_json(map_file)
        write_json(map_file, {key: names[key] for key in names
                              if key not in ("bos_token", "eos_token")})
    if chat_template and chat_template != tok.template:
        config["chat_template"] = chat_template
        (folder / "chat_template.jinja").unlink(missing_ok=True)     # it would come first
    write_json(config_file, config)


def write_json(path, value):
    text = json.dumps(value, ensure_ascii=False, indent=1) + "\n"
    path.write_text(text, encoding="utf-8")


def tokenizer_spec(tok):
    """The tokenizer.json of a Tokenizer that has no Hugging Face files."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False}
    # {1,3}+ is possessive for tiktoken; for tokenizers' Oniguruma it is {1,3}, repeated
    pattern = re.sub(r"(\{\d+,\d*\})\+", r"\1", tok.pattern)
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
             "invert": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokens = [{"id": i, "content": text, "special": True, **flags}
              for text, i in tok.special.items()]
    merges = [f"{spell(left)} {spell(right)}" for left, right in recover_merges(tok.ranks)]
    vocab = {spell(token): i for token, i in tok.ranks.items()}
    model = {"type": "BPE", "ignore_merges": True, "vocab": vocab, "merges": merges}
    return {"version": "1.0", "added_tokens": tokens, "model": model, "decoder": byte_level,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]}}


def spell(token):
    return "".join(BYTES_TO_UNICODE[b] for b in token)


# --------------------------------------------------------------------------------------------------
# loss weights: a chat -> token ids and the loss weight of each
#
# encode_chat() renders the chat, finds the Spans of the text that are targets, encodes the text,
# and gives the tokens of each span its weight. Most of the code locates messages in the rendered
# text, because a template does not tell where it wrote them: find_message_spans() finds contents,
# and find_answer_start() the end of an answer's generation prompt: the text that the template
# writes for the messages before the answer, with add_generation_prompt=True.

# Warnings, each with its remedy. They are counted by source, and printed with the first example.
SKIPPED = "a record has an error, and data.on_error=skip leaves it out"
OTHER_PROMPT = ("an answer's generation prompt (add_generation_prompt=True) is not how the chat "
                "begins, so that a model is prompted in another way than it is trained; use a "
                "data.chat_template that writes both alike, or answers that begin as the prompt "
                "ends")
NO_END = ("an answer ends in no token of the vocabulary, so that nothing ends its generation; "
          "data.append_eos=true trains EOS there")
NOT_FOUND = ("a message is not found in the rendered text, so that its loss weight is not applied; "
             "a data.chat_template with {% generation %} marks says where answers are")
SPELLED = ("a text spells control tokens, which are plain text there; texts that are rendered "
           "already need data.train.NAME.special=true")
SPELLED_IN_CHAT = ("a message spells control tokens, which are plain text there; a chat that is "
                   'rendered already must be a record\'s "text" (and the source special=true)')
FOREIGN = ("a text spells control tokens that the vocabulary lacks, which are plain text there; "
           "use the data.tokenizer that the text was rendered for")
NO_TOKENS = ("the chat template writes control tokens that the vocabulary lacks, as plain text; "
             "use a data.tokenizer or data.chat_template that fits the other")

END_TOKENS = 2               # the token that ends an answer, and perhaps a line break after it
SHORT_CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
# <|im_end|> and others (\uff5c are DeepSeek's full-width bars), <s>, </s>, <bos>, <end_of_turn>
CONTROL_TOKEN = re.compile(r"<[|\uff5c][^<>|\uff5c\s]+[|\uff5c]>|</?s>|<(?:bos|eos|\w+_of_turn)>")
# of a chat with tools, in stop_token_ids
TOOL = {"type": "function", "function": {"name": "f", "description": "f", "parameters": {
    "type": "object", "properties": {}}}}
CALL = {"name": "f", "arguments": {"a": 1}}


@dataclass
class Report:
    """What encode_chat() finds out about a chat besides ids and loss weights."""
    warnings: list = field(default_factory=list)     # [(kind, example)]
    # the ids of the last answer's generation prompt, if they differ from the chat's ids before this
    # answer; otherwise empty
    other_prompt: list = ()


@dataclass
class Span:
    """A part of a chat's text that has a loss weight."""
    start: int                   # text[start:end]
    end: int
    weight: float
    answer: int = None           # index of the message, if the span is one answer
    first_token: int = None      # set by encode_spans: ids[first_token:end_token]
    end_token: int = None


def encode_chat(tok, template, messages, train_on="all", weight=1.0, append_eos=False, warnings=(),
                report=None, **variables):
    """Return (ids [n] int64, loss weights [n] float32) of a chat. UserError if it is refused.

    messages    as from normalize_record
    train_on    "all": the assistant's turns, each from the end of its generation prompt to the
                token that ends it; "last": only the last of them; "everything": all text except the
                outputs of tools. In templates with {% generation %}, these blocks are the turns
    weight      a factor of all loss weights
    append_eos  append EOS, as a target, if no control token ends the last answer
    warnings    of normalize_record
    report      a Report to fill
    variables   see render_messages: tools, documents, columns, chat_template_kwargs
    """
    report = report or Report()
    rendering = render_messages(template, tok, messages, **variables)
    spans = [span for span in find_spans(rendering, train_on)
             if span.start < span.end and span.weight]
    for span in spans:
        span.weight *= weight
    ids, loss_weights = encode_spans(rendering, spans)
    warn_of_plain_tokens(rendering)
    if spans:
        last = spans[-1]
        report.other_prompt = find_other_prompt(rendering, last, ids[:last.first_token])
        if should_append_eos(rendering, last, ids, append_eos):
            # text between the answer and EOS (a line break) is trained, too
            ids = np.append(ids, tok.special[tok.eos])
            loss_weights = np.append(loss_weights, np.float32(0))
            loss_weights[last.end_token:] = last.weight
    report.warnings += [*warnings, *rendering.warnings]
    return ids, loss_weights


def encode_spans(rendering, spans):
    """Return (ids [n] int64, loss weights [n] float32), and set the spans' tokens."""
    ids, starts, ends = rendering.tok.encode_with_offsets(rendering.text, rendering.literals)
    loss_weights = np.zeros(len(ids), np.float32)
    for span in spans:
        # all tokens that overlap a span have its weight
        span.first_token = int(ends.searchsorted(span.start, side="right"))
        span.end_token = int(starts.searchsorted(span.end, side="left"))
        loss_weights[span.first_token:span.end_token] = span.weight
    return ids.astype(np.int64), loss_weights


def find_spans(rendering, train_on):
    """Return the Spans of the text that are targets."""
    messages = rendering.messages
    weights = message_weights(messages, train_on)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    blocks = rendering.generated
    spans = []
    if train_on == "everything":                 # all text has the weight 1, except these messages:
        wanted = [i for i, weight in enumerate(weights) if weight != 1]
        position = 0
        for start, end, i in find_turns(rendering, wanted):
            spans += [Span(position, start, 1.0), Span(start, end, weights[i])]
            position = end
        spans.append(Span(position, len(rendering.text), 1.0))
    elif not blocks:
        wanted = [i for i in answers if weights[i]
                  and (messages[i].get("content") or has_generated_fields(messages[i]))]
        for start, end, i in find_turns(rendering, wanted):
            spans.append(Span(start, end, weights[i], i))
    elif len(blocks) == len(answers):            # each answer has one block
        for (start, end), i in zip(blocks, answers):
            prompt_end = find_answer_start(rendering, i, start) if weights[i] else start
            # An answer starts where its generation prompt ends, also if the template marks less: in
            # use, the model has to write what is in between. (If the prompt has the whole block, as
            # when only an empty <think></think> is marked, the block stays.)
            if prompt_end < end:
                start = prompt_end
            spans.append(Span(start, end, weights[i], i))
    else:
        # Which answer a block is of is unknown. So it has the weight of an answer that it overlaps,
        # otherwise 1.
        others = find_turns(rendering, [i for i in answers if weights[i] != 1])
        for start, end in blocks:
            weight = 1.0
            for turn_start, turn_end, i in others:
                if overlaps([(turn_start, turn_end)], start, end):
                    weight = weights[i]
            spans.append(Span(start, end, weight))
    return spans


def message_weights(messages, train_on):
    """The loss weight of each message. Outputs of tools have none."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    weights = []
    for i, message in enumerate(messages):
        is_earlier = train_on == "last" and i not in answers[-1:]
        is_excluded = is_earlier or message["role"] == "tool"
        weights.append(0.0 if is_excluded else message.get("weight", 1.0))
    return weights


def find_turns(rendering, wanted):
    """Return find_message_spans(), with the spans of answers extended to all that is generated.

    That is from the end of the generation prompt to the end of the token that ends the turn.
    """
    turns = []
    for start, end, i in find_message_spans(rendering, wanted):
        if rendering.messages[i]["role"] == "assistant":
            start = find_answer_start(rendering, i, start)
            output_start = find_output_start(rendering, i)
            # Gemma 4 writes the output of a call inside of the answer's turn, and the span found
            # may include it: cut it off. In other templates the output starts after the turn, and
            # this changes nothing.
            if output_start is not None:
                end = min(end, output_start)
            end = end_of_turn(rendering.tok, rendering.text, end)
        turns.append((start, end, i))
    return turns


def find_output_start(rendering, i):
    """Return where the output of a tool that answer i calls may start, or None if unknown.

    Some templates write it between the call and the token that ends the answer (Gemma 4).
    """
    following = rendering.messages[i + 1:i + 2]
    if not following or following[0]["role"] != "tool":
        return None
    before = rendering.render_other(rendering.messages[:i + 1]) or ""
    before = before.rstrip()                 # the output may start before a final line break
    return len(before) if before and rendering.text.startswith(before) else None


def end_of_turn(tok, text, end):
    """The end of the special or added token after `end` and white space; `end` if none follows."""
    spaces = SPACES.match(text, end)
    token = tok.special_and_added_pattern.match(text, spaces.end())
    return token.end() if token else end


def find_message_spans(rendering, wanted):
    """Return where the wanted messages are in the rendered text: [(start, end, index)], ascending.

    The messages are rendered once more with placeholders instead of their contents. What the
    template writes between the placeholders is also between the contents. With wanted = [1, 3]:

        messages      user "2+3?", assistant "5", user "Sure?", assistant "Yes"
        placeholders  U:<0>; A:<1>; U:<2>; A:<3>;
        between       "U:"   "; A:"   "; U:"   "; A:"   ";"
        text          U:2+3?; A:5; U:Sure?; A:Yes;
        spans         (10, 11, 1) is "5", (24, 27, 3) is "Yes"

    A template may trim contents, drop messages, or look into contents, so that other things change
    with them. So the next try replaces the wanted messages only. Those that are still not found,
    and those with tool calls or reasoning, are replaced one at a time: find_span_alone().
    """
    messages = rendering.messages
    plain = [i for i, message in enumerate(messages)
             if isinstance(message.get("content"), str) and not has_generated_fields(message)]
    spans = align_messages(rendering, plain)
    if len(spans) < len(plain):
        spans = align_messages(rendering, [i for i in plain if i in wanted])
    spans = [span for span in spans if span[2] in wanted]
    found = {index for _, _, index in spans}
    for i in sorted(set(wanted) - found):
        earlier_ends = [end for _, end, index in spans if index < i]
        span = find_span_alone(rendering, i, after=max(earlier_ends, default=0))
        if span:
            spans.append((*span, i))
        else:
            rendering.warnings.append((NOT_FOUND, f"message {i + 1}"))
    return sorted(spans)


def align_messages(rendering, replaced):
    """Replace the contents of some messages by placeholders: align_placeholders()."""
    messages = list(rendering.messages)
    for i in replaced:
        # the weight is not rendered: equal ones let more chats share a rendering
        messages[i] = messages[i] | {"content": placeholder(i), "weight": 1}
    pieces = render_placeholders(rendering.template, rendering.tok,
                                 to_json([messages, rendering.variables]))
    if pieces is None:
        return []
    return align_placeholders(rendering.text, pieces, rendering.messages)


def has_generated_fields(message):
    return any(map(message.get, GENERATED_FIELDS))


def placeholder(i):
    return f"{PLACEHOLDER_MARK}{i}{PLACEHOLDER_MARK}"


@lru_cache(maxsize=1000)
def render_placeholders(template, tok, values):
    """Render placeholders: (text before the first one, [(index, text after this placeholder)]).

        "U:<0>; A:<1>;" -> ("U:", [(0, "; A:"), (1, ";")])

    Returns None if the template refuses the messages.

    values  [messages, variables] as JSON text: the cache needs a hashable key. Chats with the same
            roles have the same one
    """
    messages, variables = json.loads(values)
    with suppress(UserError):
        text, _ = render(template, tok, messages, **variables)
        pieces = [(int(i), between) for i, between in PLACEHOLDER.findall(text)]
        return text.partition(PLACEHOLDER_MARK)[0], pieces
    return None


def align_placeholders(text, pieces, messages):
    """Find the contents in a text by render_placeholders()'s pieces: [(start, end, index)].

    Returns the spans before the first piece that is not in its place. If all are, but the text goes
    on after the last one, some may have been found too early: [].
    """
    head, after_placeholders = pieces
    if not text.startswith(head):
        return []
    position = len(head)
    spans = []
    for i, between in after_placeholders:
        end = find_content_end(text, position, messages[i]["content"], between)
        if end is None:
            return spans
        spans.append((position, end, i))
        position = end + len(between)
    return spans if position == len(text) else []


def find_content_end(text, start, content, after):
    """The end of a content that starts at `start` and is followed by `after`; None if not found.

    The template may have written the content as it is, trimmed, or only a part of it.
    """
    for form in (content, content.strip(), content.lstrip(), content.rstrip()):
        if text.startswith(form + after, start):
            return start + len(form)
    end = text.find(after, start) if after else -1
    return end if end >= 0 and text[start:end] in content else None


def find_span_alone(rendering, i, after):
    """Return (start, end) of message i in the text, at `after` or later; None if it is not found.

    The text is compared with a rendering in which a placeholder replaces this message, with its
    reasoning and calls. The message is where they differ:

        text              U:2+3?; A:5; U:Sure?; A:Yes;
        with placeholder  U:2+3?; A:<1>; U:Sure?; A:Yes;      ->  (10, 11)
    """
    messages = rendering.messages
    text = rendering.text
    kept = {key: value for key, value in messages[i].items() if key not in GENERATED_FIELDS}
    replaced = [*messages[:i], kept | {"content": placeholder(i)}]
    with_placeholder = rendering.render_other([*replaced, *messages[i + 1:]])
    if with_placeholder is None:
        # Outputs of tools may not follow a message without calls: try chats that end at message i.
        with_placeholder = rendering.render_other(replaced)
        text = rendering.render_other(messages[:i + 1])
    if with_placeholder is None or text is None:
        return None

    prefix, mark, suffix = with_placeholder.partition(placeholder(i))
    if not mark:                                 # the template drops this message
        return None
    # The template may write reasoning before the content, and so before the placeholder. An answer
    # starts before both, after its generation prompt.
    prompt = rendering.prompt(i) if messages[i]["role"] == "assistant" else None
    if prompt is not None and text.startswith(prompt):
        prefix = prompt
    start = count_common(text, prefix)
    end = len(text) - count_common(text[start:][::-1], suffix[::-1])
    if rendering.text.startswith(text[:end]):
        return start, end

    # The text that ends at message i is no prefix of the whole chat's (the template drops earlier
    # reasoning, for example), so its positions do not apply.
    written = text[start:end]
    start = rendering.text.find(written, after) if written else -1
    return (start, start + len(written)) if start >= 0 else None


def count_common(a, b):
    """The number of characters with which two texts start alike."""
    # a binary search for the first index where they differ: texts are long, a loop is slow
    indexes = range(min(len(a), len(b)))
    return bisect.bisect_left(indexes, True, key=lambda i: not a.startswith(b[:i + 1]))


def find_answer_start(rendering, i, start):
    """Return where generation of answer i starts: at the end of its generation prompt.

    start  of the answer's content. The template may write text between the prompt and the content,
           which is generated, too: an empty <think></think>, for example

    If the chat's text does not begin with the prompt, `start` is returned, and a warning is added.
    """
    text = rendering.text
    messages = rendering.messages
    # openings, which save rendering the prompt, are those of plain answers to a user
    if i and messages[i - 1]["role"] == "user" and not has_generated_fields(messages[i]):
        for opening, n_generated in rendering.openings:
            if text.endswith(opening, 0, start):
                return start - n_generated
    prompt = rendering.prompt(i)
    if prompt is None:
        return start
    if text.startswith(prompt):
        return len(prompt)
    rendering.unprompted_answers.append(i)
    difference = count_common(prompt, text)
    near = slice(max(difference - 30, 0), difference + 30)
    example = f"message {i + 1}: prompt ...{prompt[near]!r}, text ...{text[near]!r}"
    rendering.warnings.append((OTHER_PROMPT, example))
    return start


@lru_cache(maxsize=1000)
def find_openings(template, tok, values):
    """Return what a template writes between the contents of a user and of an answer.

    Each opening is (text, n_generated): its last n_generated characters are after the answer's
    generation prompt. They only save time: prompts need not be rendered. Two answers are tried:

        text      U:<0>; A:<1>; U:<2>; A:<think></think><3>;
        prompts   U:<0>; A:                    U:<0>; A:<1>; U:<2>; A:
        openings  [("; A:", 0), ("; A:<think></think>", 15)]

    Returns [] if the text does not begin with these prompts, or if prompts depend on messages.

    values  [messages before the first of the user, variables] as JSON text
    """
    if not has_constant_prompt(template):
        return []
    messages, variables = json.loads(values)
    for i, role in enumerate(["user", "assistant"] * 2):
        messages.append({"role": role, "content": placeholder(i)})
    openings = set()
    with suppress(UserError):
        text, _ = render(template, tok, messages, **variables)
        for n in (-3, -1):
            prompt, _ = render(template, tok, messages[:n], add_generation_prompt=True, **variables)
            opening = prompt.rpartition(PLACEHOLDER_MARK)[2]
            added, mark, _ = text[len(prompt):].partition(PLACEHOLDER_MARK)
            if not (text.startswith(prompt) and opening and mark):
                return []
            # if a content begins with the added text itself, the template may not add it
            openings |= {(opening + added, len(added)), (opening, 0)}
    return sorted(openings)


def has_constant_prompt(template):
    """Whether a template writes the same for add_generation_prompt after any messages.

    True if it reads add_generation_prompt only in conditions of ifs, and if these ifs, with their
    bodies, name only arguments of the template: neither messages nor variables that it sets.
    """
    tree = template.jinja.environment.parse(template.text)
    # (find_all, in names_in, skips the node itself: so the condition is put into another one)
    branches = [branch for branch in tree.find_all((nodes.If, nodes.CondExpr))
                if "add_generation_prompt" in names_in(nodes.Output([branch.test]))]
    names = {name for branch in branches for name in names_in(branch)}
    # as many mentions as conditions: it is read nowhere else (twice in one condition: False)
    n_mentions = names_in(tree).count("add_generation_prompt")
    arguments = jinja2.meta.find_undeclared_variables(tree) - {"messages"}
    return len(branches) == n_mentions and names <= arguments


def names_in(tree):
    return [name.name for name in tree.find_all(nodes.Name)]


def should_append_eos(rendering, span, ids, append_eos):
    """Whether append_eos applies: no control token ends the last span, and no message follows.

    If none ends it, and EOS is not appended, a warning is added.
    """
    tok = rendering.tok
    # A control token before an answer does not end it: look only into the span. But a span of other
    # text (data.train_on=everything) may be just the line break after the token that ends the
    # answer: look before it, too.
    start = 0 if span.answer is None else span.first_token
    last_tokens = ids[max(start, span.end_token - END_TOKENS):span.end_token]
    if tok.end_ids.intersection(last_tokens.tolist()):
        return False
    after = rendering.text[span.end:]
    is_last = span.answer == len(rendering.messages) - 1 or not after.strip()
    if append_eos and tok.eos and is_last:
        return True
    end = rendering.text[span.start:span.end][-30:]
    rendering.warnings.append((NO_END, f"{end!r} before {after[:30]!r}"))
    return False


def find_other_prompt(rendering, span, ids):
    """Return Report.other_prompt: the ids of an answer's generation prompt if they are not `ids`.

    ids  before the answer's span

    They may differ although the texts are the same: the ids of "A: " are [A][:][ ], but in "A: yes"
    the last space is in a token of the answer, [A][:][ yes]. Then a warning is added.
    """
    tok = rendering.tok
    i = span.answer
    if i is None or span.weight <= 0:
        return ()
    text_differs = i in rendering.unprompted_answers
    # A fast test without rendering: if the texts are the same, only the last token may differ.
    # Encoding 32 characters gives this token, also if it is a special token and line breaks after
    # it: <|end_header_id|>\n\n has 19.
    last_token = encode_last_token(tok, rendering.text[max(span.start - 32, 0):span.start])
    if not text_differs and ids[-1:].tolist() == last_token:
        return ()
    if rendering.prompt(i) is None:
        return ()
    prompt = encode_prompt(tok, rendering.template, rendering.messages[:i], **rendering.variables)
    if prompt == ids.tolist():
        return ()
    if not text_differs:
        tokens = [tok.decode([token]) for token in prompt[-3:]]
        rendering.warnings.append((OTHER_PROMPT, f"message {i + 1}: the prompt's last tokens are "
                                   f"{tokens}, in the text {[tok.decode([t]) for t in ids[-3:]]}"))
    return prompt


@lru_cache(maxsize=10_000)
def encode_last_token(tok, text):
    """[the id of the last token of a text]"""
    return tok.encode_special(text)[-1:].tolist()


def warn_of_plain_tokens(rendering):
    """Add warnings of control tokens that are plain text."""
    if rendering.literals:
        start, _ = rendering.literals[0]
        rendering.warnings.append((SPELLED_IN_CHAT, repr(rendering.text[start:start + 30])))
    missing = template_missing_tokens(rendering.template, rendering.tok)
    if missing:
        rendering.warnings.append((NO_TOKENS, missing))


@lru_cache(maxsize=1000)
def template_missing_tokens(template, tok):
    """The control tokens that a template writes and the vocabulary lacks, or ""."""
    try:
        text, _ = render(template, tok, SHORT_CHAT)
    except UserError:                                    # the template refuses such a chat
        return ""
    return text_missing_tokens(text, tok)


def text_missing_tokens(text, tok):
    """The control tokens that a text spells and the vocabulary lacks, or ""."""
    missing = set(CONTROL_TOKEN.findall(text)) - set(tok.special_and_added)
    return " ".join(sorted(missing))


def encode_text(tok, text, weight=1.0, starts=True, ends=True, special=False):
    """Return (BOS + ids + EOS [n] int64, loss weights [n] float32) of a text, or of a part of it.

    starts, ends  False: the text started in an earlier part, continues in a later one
    special       True: special tokens that the text spells are control tokens. BOS and EOS are not
                  added to a text that has them
    """
    text = tok.clean(text)
    ids = tok.encode_special(text, find_special=special).astype(np.int64)
    if starts and tok.bos and not (special and text.startswith(tok.bos)):
        ids = np.append(tok.special[tok.bos], ids)
    if ends and tok.eos and not (special and text.rstrip().endswith(tok.eos)):
        ids = np.append(ids, tok.special[tok.eos])
    return ids, np.full(len(ids), weight, np.float32)


def encode_prompt(tok, template, messages, **variables):
    """Return the ids of the generation prompt for an answer to these messages, as a list."""
    rendering = render_messages(template, tok, messages, add_generation_prompt=True, **variables)
    return tok.encode_special(rendering.text, rendering.literals).tolist()


def stop_token_ids(tok, template):
    """Return the ids at which generation of an answer stops, sorted: EOS and the template's."""
    user, answer = SHORT_CHAT
    # the token of the next role may end an answer (GLM)
    stop_ids = find_end_token(tok, template, [user, answer, user])
    # Another token may end an answer with calls. There are two, so that a token that closes each
    # call, such as </tool_call>, occurs twice and is not taken for the end of the answer.
    calls = [{"type": "function", "id": tool_call_id(n), "function": CALL} for n in (1, 2)]
    outputs = [{"role": "tool", "content": "c", "tool_call_id": call["id"]} for call in calls]
    answer = {"role": "assistant", "content": None, "tool_calls": calls}
    stop_ids |= find_end_token(tok, template, [user, answer, *outputs], tools=[TOOL])
    if tok.eos:
        stop_ids.add(tok.special[tok.eos])
    return sorted(stop_ids)


def find_end_token(tok, template, messages, **variables):
    """Return {id of the control token that ends the last answer}, or an empty set.

    A token that also occurs earlier in the answer does not count. If the template refuses the
    messages, they are tried with a system message.
    """
    for system in ([], [{"role": "system", "content": "a"}]):
        with suppress(UserError):
            ids, loss_weights = encode_chat(tok, template, [*system, *messages], **variables)
            trained = ids[loss_weights != 0].tolist()
            last = [i for i in trained[-END_TOKENS:] if i in tok.end_ids][-1:]
            return {i for i in last if trained.count(i) == 1}
    return set()


# --------------------------------------------------------------------------------------------------
# token files: encoded by several processes, written in the order of the records

@dataclass
class Encoded:
    """The documents of a Chunk, one after the other, as TokenWriter appends them to its files.

    arrays    {name of a file: array}; of offsets, the lengths. Empty if there are no documents
    counts    see TokenWriter
    warnings  [(kind, example)]
    """
    arrays: dict
    counts: Counter
    warnings: list


def encode_chunk(chunk, context):
    """Return a Chunk's documents as Encoded; of a part of a document, a Chunk of (ids, weights)."""
    warnings = []
    if not (chunk.starts and chunk.ends):
        [part] = chunk.records
        if isinstance(part, str):
            warn_of_spelled_tokens(part, context, chunk.file, warnings)
            part = encode_text(context.tok, part, 1.0, chunk.starts, chunk.ends,
                               context.source["special"])
        return replace(chunk, records=[part], warnings=warnings)
    documents = []
    counts = Counter(records=len(chunk.records))
    for number, record in zip(chunk.numbers, chunk.records):
        place = f"{chunk.file}, {chunk.unit} {number}"
        try:
            documents += encode_record(record, place, context, counts, warnings)
        except TemplateError:
            raise
        except UserError as error:
            if context.data["on_error"] != "skip":
                # a record that is not UTF-8: the whole file is likely to be in another encoding
                if "iconv" in str(error):
                    raise
                raise UserError(f"{error}; data.on_error=skip leaves such records out") from None
            counts["skipped"] += 1
            warnings.append((SKIPPED, str(error)))
    return concat_documents(documents, context, chunk.file, counts, warnings)


def encode_record(record, place, context, counts, warnings):
    """Return the documents of a record: [(ids, loss weights, Report.other_prompt)].

    Long texts are cut into several documents.
    """
    seq_len = context.data["seq_len"]
    if isinstance(record, tuple):                        # of .npy
        return split_windows(*record, seq_len)
    record = normalize_record(record, place, context.source["shape"])
    if "text" in record:
        warn_of_spelled_tokens(record["text"], context, place, warnings)
        special = context.source["special"]
        return split_windows(*encode_text(context.tok, **record, special=special), seq_len)
    template = context.template              # (an error of the template is not the record's)
    report = Report()
    options = context.source["chat_template_kwargs"] | record.pop("chat_template_kwargs", {})
    with error_context(place):
        ids, weights = encode_chat(context.tok, template, train_on=context.data["train_on"],
                                   append_eos=context.data["append_eos"], report=report,
                                   chat_template_kwargs=options, **record)
    warnings += [(kind, f"{place}: {example}") for kind, example in report.warnings]
    counts["chats"] += 1
    if len(ids) > seq_len + 1:
        counts["truncated"] += 1
        counts["cut_away"] += bool(weights.any() and not weights[1:seq_len + 1].any())
        # no other_prompt: the last answer is cut off, so it is not compared with a generated one
        return [(ids[:seq_len + 1], weights[:seq_len + 1], ())]
    return [(ids, weights, report.other_prompt)]


def warn_of_spelled_tokens(text, context, place, warnings):
    """Add a warning if a text spells control tokens that are plain text in it."""
    # 1. tokens of the vocabulary, without special=true
    special = context.source["special"]
    match = None if special else context.tok.special_pattern.search(text)
    if match:
        example = text[match.start():match.start() + 30]
        warnings.append((SPELLED, f"{place}: {example!r}"))
        return
    # 2. tokens that the vocabulary lacks, if the text is a rendered chat: it begins with one
    if special or CONTROL_TOKEN.match(text.lstrip()):
        missing = text_missing_tokens(text, context.tok)
        if missing:
            warnings.append((FOREIGN, f"{place}: {missing}"))


def split_windows(ids, weights, seq_len):
    """Cut a document into windows of at most seq_len targets: [(ids, loss weights, ())].

    The last target of a window is the first token of the next one.
    """
    windows = []
    for start in range(0, max(len(ids) - 1, 1), seq_len):
        end = start + seq_len + 1
        windows.append((ids[start:end], weights[start:end], ()))
    return windows


def concat_documents(documents, context, file, counts, warnings):
    """[(ids, loss weights, other_prompt)] -> Encoded, without documents that have no targets."""
    ignores_ids = context.never_target.any()
    kept = []
    for ids, weights, prompt in documents:
        if ignores_ids:
            weights[context.never_target[ids]] = 0
        n_targets = np.count_nonzero(weights[1:])        # the first token is never one
        if n_targets:
            kept.append((ids, weights, prompt, n_targets))
    counts["documents"] += len(kept)
    counts["dropped"] += len(documents) - len(kept)
    arrays = {}
    if kept:
        ids, weights, prompts, targets = zip(*kept)
        arrays = {"tokens": np.concatenate(ids).astype(context.dtype),
                  "weights": compact_weights(np.concatenate(weights), file),
                  "offsets": np.array([len(document) for document in ids]),
                  "targets": np.array(targets, np.uint32),
                  "prompts": np.concatenate(prompts).astype(context.dtype),
                  "prompt_offsets": np.array([len(prompt) for prompt in prompts])}
    return Encoded(arrays, counts, warnings)


def compact_weights(weights, file):
    """Loss weights as uint8 if all are 0 or 1, otherwise as float16."""
    if ((weights == 0) | (weights == 1)).all():
        return weights.astype(np.uint8)
    with np.errstate(over="ignore"):
        compact = weights.astype(np.float16)
    if not np.isfinite(compact).all() or ((compact == 0) & (weights != 0)).any():
        raise UserError(f"{file}: a loss weight must be a finite number, {WEIGHT_RANGE}, also "
                        "after multiplication with its record's")
    return compact


def join_parts_of_documents(results, context):
    """Yield the results of encode_chunk() as Encoded: parts of documents are cut into windows."""
    open_ids = np.zeros(0, np.int64)                     # a window that the next part continues
    open_weights = np.zeros(0, np.float32)
    for result in results:
        if isinstance(result, Chunk):
            [(ids, weights)] = result.records
            ids = np.concatenate([open_ids, ids])
            weights = np.concatenate([open_weights, weights])
            windows = split_windows(ids, weights, context.data["seq_len"])
            open_ids = open_ids[:0]
            open_weights = open_weights[:0]
            if not result.ends:
                open_ids, open_weights, _ = windows.pop()
            counts = Counter(records=int(result.ends))
            result = concat_documents(windows, context, result.file, counts, result.warnings)
        yield result


def encode_parallel(chunks, n_bytes, context, name, quiet):
    """Yield encode_chunk() of each chunk in order, computed by data.processes processes."""
    n_processes = context.data["processes"]
    if not n_processes:                                  # (a fork may crash on macOS)
        n_processes = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    with log.ProgressBar(f"tokenize {name}", n_bytes, quiet, unit="B", unit_scale=True) as bar:
        if n_processes == 1 or n_bytes < 4 * BLOCK:
            for chunk in chunks:
                yield encode_chunk(chunk, context)
                bar.update(chunk.n_bytes)
            return
        fork = multiprocessing.get_context("fork")
        pool = concurrent.futures.ProcessPoolExecutor(n_processes, fork, init_worker, [context])
        problem = "a process was killed, perhaps for lack of memory; set a smaller number: "
        pending = deque()                    # two chunks per process
        with error_context("data.processes", concurrent.futures.BrokenExecutor, problem):
            try:
                chunks = iter(chunks)
                while True:
                    for chunk in itertools.islice(chunks, 2 * n_processes - len(pending)):
                        pending.append((pool.submit(encode_in_worker, chunk), chunk.n_bytes))
                    if not pending:
                        return
                    future, size = pending.popleft()
                    yield future.result()
                    bar.update(size)
            finally:
                # after an error or a signal, the processes end after their chunk: killing one while
                # it sends a result would hang the pool, which waits for the rest of it
                pool.shutdown(cancel_futures=True)


def init_worker(context):
    """Called once in each process of the pool: chunks are then sent to it without the context."""
    global worker_context
    worker_context = context
    signal.signal(signal.SIGTERM, signal.SIG_DFL)        # with which a broken pool ends the others
    signal.signal(signal.SIGINT, signal.SIG_IGN)         # Ctrl-C: they end after their chunk
    threading.Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent():
    """Exit if the parent is killed: a process of the pool does not notice this by itself."""
    multiprocessing.parent_process().join()
    os._exit(1)


def encode_in_worker(chunk):
    return encode_chunk(chunk, worker_context)


class TokenWriter:
    """Writes the token files of a source into a folder."""

    def __init__(self, folder):
        names = ("tokens", "weights", "offsets", "targets", "prompts", "prompt_offsets")
        self.files = {name: open(folder / f"{name}.bin", "wb") for name in names}
        self.weights_dtype = np.dtype(np.uint8)
        self.warnings = {}                               # {kind: (count, the first example)}
        self.counts = Counter(
            documents=0, records=0, chats=0,
            trained=0,           # targets
            longest=0,           # tokens of the longest document
            truncated=0,         # chats longer than seq_len
            dropped=0,           # documents without a target, including:
            cut_away=0,          # chats whose targets are all after seq_len
            skipped=0)           # records with an error, if data.on_error=skip
        self.last_offsets = {"offsets": 0, "prompt_offsets": 0}
        for name in self.last_offsets:
            self.files[name].write(np.zeros(1, np.int64))

    def write(self, encoded):
        for name, array in encoded.arrays.items():
            if name in self.last_offsets:
                array = self.last_offsets[name] + np.cumsum(array, dtype=np.int64)
                self.last_offsets[name] = int(array[-1])
            if name == "weights":
                if array.dtype != np.uint8 and self.weights_dtype == np.uint8:
                    self.widen_weights()
                array = array.astype(self.weights_dtype)
            self.files[name].write(array)
        self.counts.update(encoded.counts)
        if encoded.arrays:
            self.counts["trained"] += int(encoded.arrays["targets"].sum())
            longest = int(encoded.arrays["offsets"].max())
            self.counts["longest"] = max(self.counts["longest"], longest)
        for kind, example in encoded.warnings:
            count, first = self.warnings.get(kind, (0, example))
            self.warnings[kind] = (count + 1, first)

    def widen_weights(self):
        """Write weights.bin again, as float16."""
        self.files["weights"].close()
        path = Path(self.files["weights"].name)
        with open(path, "rb") as narrow:             # (an open file can be read after its removal)
            path.unlink()
            self.files["weights"] = open(path, "wb")
            while block := narrow.read(BLOCK):
                self.files["weights"].write(np.frombuffer(block, np.uint8).astype(np.float16))
        self.weights_dtype = np.dtype(np.float16)

    def close(self):
        for file in self.files.values():
            file.close()


@configs.exit_at_signals()
def tokenize_source(cfg, name, source, tok, quiet=False):
    """Return the folder with the token files of a source. They are written if they are missing.

    name  "train.NAME" or "validation.NAME"
    """
    files = find_files(cfg, name, source)
    fingerprints = fingerprint_source(cfg, source, tok, files)
    # If a template reads the clock, the folder's name depends on data.date, but not on today's
    # date: otherwise every day would tokenize again. header.json records the date.
    set_date = cfg["data"]["date"] if reads_clock(tok, cfg) else ""
    label = name.partition(".")[2]
    folder = Path(cfg["data"]["cache_dir"]) / f"{label}-{fingerprint(fingerprints, set_date)}"
    if not folder.exists():
        context = Context(cfg, source, tok)
        write_token_files(folder, files, fingerprints, context, name, quiet)
    print_warnings(read_header(folder)["warnings"], name)
    return folder


def write_token_files(folder, files, fingerprints, context, name, quiet):
    """Tokenize files into a folder, which exists when all is written."""
    building = folder.with_name(f"{folder.name}.building.{os.urandom(8).hex()}")
    try:
        building.mkdir(parents=True)
        chunks = itertools.chain.from_iterable(read_chunks(file, context) for file in files)
        n_bytes = sum(os.path.getsize(file) for file in files)
        results = encode_parallel(chunks, n_bytes, context, name, quiet)
        with closing(TokenWriter(building)) as writer, closing(results):
            for encoded in join_parts_of_documents(results, context):
                writer.write(encoded)
        check_not_empty(writer, name, context)
        if writer.counts["chats"] and reads_clock(context.tok, context.cfg):
            fingerprints["date"] = str(context.now.date())
        header = {"format": FORMAT, "dtype": np.dtype(context.dtype).name,
                  "weights": writer.weights_dtype.name, "tokens": writer.last_offsets["offsets"],
                  "fingerprints": fingerprints, "files": files, "vocabulary": context.tok.n_vocab,
                  "warnings": writer.warnings, **writer.counts}
        text = json.dumps(header, indent=1) + "\n"
        (building / "header.json").write_text(text, encoding="utf-8")
        os.replace(building, folder)
    except OSError as error:
        if not (folder / "header.json").is_file():       # else another process was faster
            raise UserError(f"{folder}: cannot write token files ({error.strerror}); "
                            "data.cache_dir sets their place") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


def read_header(folder):
    if not (folder / "header.json").is_file():
        raise UserError(f"{folder}: has no header.json; delete the folder to tokenize again")
    return configs.read_json(folder / "header.json")


def print_warnings(warnings, name):
    """Print the warnings of a source, {kind: (count, the first example)}."""
    for kind, (count, example) in warnings.items():
        how_often = "once" if count == 1 else f"{count:,} times"
        print_once(f"warning: data.{name}: {kind} ({how_often}; the first is {example})")


def fingerprint_source(cfg, source, tok, files):
    """Return the fingerprints of all that a source's token files depend on, by name."""
    data = cfg["data"]
    beside = [file[:-len(".npy")] + suffix for file in files if format_of(file) == "npy"
              for suffix in BESIDE_NPY]
    inputs = [*files, *filter(os.path.isfile, beside)]
    # paths relative to data_root, so that it may be moved
    root = os.path.join(os.path.abspath(cfg["data_root"]), "")
    hashes = content_hashes(inputs, Path(data["cache_dir"], "hashes.json"))
    names = [path.removeprefix(root) for path in inputs]
    keys = ("seq_len", "train_on", "on_error", "ignore_token_ids", "ignore_token_id_range",
            "ignore_index", "shift_labels", "append_eos")
    options = [data[key] for key in keys]
    return {"source": fingerprint(names, hashes), **fingerprint_tokenizer(cfg, tok),
            "options": fingerprint(FORMAT, options, source["shape"], source["separator"],
                                   source["special"], source["chat_template_kwargs"])}


def content_hashes(files, cache):
    """Return a hash of each file's content.

    `cache` keeps the hashes: a file with the same time and size as before is not read again.
    """
    known = {}
    with contextlib.suppress(OSError, ValueError, TypeError):      # there is none, or it is damaged
        known = dict(json.loads(cache.read_text(encoding="utf-8")))
    hashes = {}
    for file in files:
        stat = os.stat(file)
        key = f"{os.path.abspath(file)}, {stat.st_size} bytes, {stat.st_mtime_ns} ns"
        hashes[key] = known.get(key) or hash_file(file)
    if hashes.keys() - known.keys():
        with contextlib.suppress(OSError, ValueError):   # the next start reads the files again
            cache.parent.mkdir(parents=True, exist_ok=True)
            log.write_atomic(cache, json.dumps(known | hashes, indent=0))
    return list(hashes.values())


def hash_file(path):
    digest = hashlib.sha256()
    n_bytes = os.path.getsize(path)
    with error_context(path, OSError, "cannot be read: "), open(path, "rb") as file:
        with log.ProgressBar(f"hash {path}", n_bytes, unit="B", unit_scale=True) as bar:
            while block := file.read(BLOCK):
                digest.update(block)
                bar.update(len(block))
    return digest.hexdigest()[:16]


def fingerprint_tokenizer(cfg, tok):
    template = fingerprint(template_texts(tok, cfg), tok.token_variables)
    return {"tokenizer": tok.fingerprint, "template": template}


def check_not_empty(writer, name, context):
    """Raise UserError if a source has no documents."""
    counts = writer.counts
    if counts["documents"]:
        return
    print_warnings(writer.warnings, name)                # they may tell the reason
    cut = ""
    if counts["cut_away"]:
        cut = (f", {counts['cut_away']} of them because data.seq_len={context.data['seq_len']} "
               "cuts the answers off; a larger one keeps them")
    raise UserError(
        f"data.{name}: {context.source['path']} holds nothing to train on ({counts['records']} "
        f"records, {counts['skipped']} skipped, {counts['dropped']} documents without "
        f"a target{cut})")


class Tokens:
    """The documents of a source: document i is tokens[offsets[i]:offsets[i + 1]]."""

    def __init__(self, folder, first=0, last=None):
        """Open the documents first ... last - 1 of a folder of token files."""
        self.folder = Path(folder)
        self.header = read_header(self.folder)
        last = self.header["documents"] if last is None else last
        n_tokens = self.header["tokens"]
        n_documents = self.header["documents"]
        self.tokens = self.map_file("tokens.bin", self.header["dtype"], n_tokens)
        self.weights = self.map_file("weights.bin", self.header["weights"], n_tokens)
        self.offsets = self.map_file("offsets.bin", np.int64, n_documents + 1)[first:last + 1]
        self.n_targets = self.map_file("targets.bin", np.uint32, n_documents)[first:last]
        prompt_offsets = self.map_file("prompt_offsets.bin", np.int64, n_documents + 1)
        self.prompt_offsets = prompt_offsets[first:last + 1]
        self.prompts = self.map_file("prompts.bin", self.header["dtype"], int(prompt_offsets[-1]))

    def map_file(self, name, dtype, length):
        path = self.folder / name
        if not path.is_file() or path.stat().st_size != length * np.dtype(dtype).itemsize:
            raise UserError(f"{path}: damaged: its size does not match header.json; delete the "
                            f"folder {self.folder} to tokenize again")
        if not length:                                   # np.memmap refuses it
            return np.zeros(0, dtype)
        # an array, because its slices are faster than those of a memmap
        return np.asarray(np.memmap(path, dtype, "r"))

    def __len__(self):
        return len(self.offsets) - 1

    def n_inputs(self, i):
        """The number of inputs of documents i, one less than their tokens: int64, shaped as i."""
        i = np.asarray(i)
        return self.offsets[i + 1] - self.offsets[i] - 1

    def document(self, i):
        """Return (token ids [n], loss weights [n]: uint8 or float16)."""
        span = slice(self.offsets[i], self.offsets[i + 1])
        return self.tokens[span], self.weights[span]

    def other_prompt(self, i):
        """Report.other_prompt of document i: its last answer's generation prompt if it differs."""
        return self.prompts[self.prompt_offsets[i]:self.prompt_offsets[i + 1]]


def require_train_data(cfg):
    """Raise UserError if there is no training source."""
    if not cfg["data"]["train"]:
        raise UserError("data.train: no source is named; data.train.NAME.path=FILE names one")


def load_datasets(cfg, tok=None, quiet=False):
    """Return {"train": {name: Tokens}, "validation": {name: Tokens}}, tokenized if necessary.

    data.validation_split moves the last documents of each training source to "validation". Raises
    UserError, with file and line, for what cannot be read.
    """
    require_train_data(cfg)
    tok = tok or load_tokenizer(cfg)
    datasets = {"train": {}, "validation": {}}
    for kind in ("train", "validation"):
        for name, source in cfg["data"][kind].items():
            folder = tokenize_source(cfg, f"{kind}.{name}", source, tok, quiet)
            datasets[kind][name] = Tokens(folder)
    split = cfg["data"]["validation_split"]
    if split:
        for name, tokens in list(datasets["train"].items()):
            if name in datasets["validation"]:
                raise UserError(f"data.validation_split: there is also data.validation.{name}; set "
                                "one of the two")
            n_train = len(tokens) - count_held_out(split, name, len(tokens))
            datasets["train"][name] = Tokens(tokens.folder, 0, n_train)
            datasets["validation"][name] = Tokens(tokens.folder, n_train)
    return datasets


def count_held_out(split, name, n_documents):
    """How many documents data.validation_split, a count or a fraction, holds out of a source.

    A fraction is at least one document.
    """
    held_out = split if isinstance(split, int) else max(1, round(split * n_documents))
    if held_out >= n_documents:
        raise UserError(f"data.validation_split: {split} of {name}'s {n_documents} documents "
                        "leaves nothing to train on; less, or 0 and data.validation.NAME.path=FILE")
    return held_out


# --------------------------------------------------------------------------------------------------
# show: see before training whether the right tokens are targets

def summary(name, tokens):
    """One line about a source: documents, tokens, and how many were cut off, dropped or skipped.

    The latter three count the whole source. If data.validation_split divides it, only the line of
    the training part has them.
    """
    header = tokens.header
    n_tokens = int(tokens.offsets[-1] - tokens.offsets[0])
    n_inputs = n_tokens - len(tokens)                    # the last token of a document is no input
    n_targets = int(tokens.n_targets.sum(dtype=np.int64))
    parts = [f"{name}: {len(tokens):,} documents",
             f"{n_tokens:,} tokens ({n_targets / n_inputs:.0%} trained)",
             f"longest {np.diff(tokens.offsets).max():,}"]
    if tokens.offsets[0] > 0:                            # the validation part
        return ", ".join(parts)
    if header["truncated"]:
        parts.append(f"{header['truncated']:,} cut off by data.seq_len")
    if header["dropped"]:
        cut = f", {header['cut_away']:,} of them by cutting" if header["cut_away"] else ""
        parts.append(f"{header['dropped']:,} dropped (nothing to train on{cut})")
    if header["skipped"]:
        parts.append(f"{header['skipped']:,} skipped")
    return ", ".join(parts)


def histogram(tokens):
    """The distribution of the documents' lengths as lines of text, one for each power of two."""
    powers = np.ceil(np.log2(np.diff(tokens.offsets))).astype(int)
    powers, counts = np.unique(powers, return_counts=True)
    lines = []
    for power, count in zip(powers.tolist(), counts.tolist()):
        bar = "#" * math.ceil(40 * count / counts.max())
        lines.append(f"  {f'<= {2**power:,}':>12} tokens  {count:>10,}  {bar}")
    return lines


COLORS = {0: 2, 1: 32, -1: 31}          # by the sign of a loss weight: dim, green, red


def colorize(tok, ids, weights, use_color):
    """The text of a document with its targets in green and special tokens inverted.

    Without color, targets are in [[ ]], and text that only spells a special token begins with \\.
    A weight other than 1 is printed after its targets: {0.5}. Targets of negative weight are red.
    """
    parts = []
    for run, weight in split_runs(ids, weights.astype(float)):
        text = mark_special(tok, run, use_color)
        if use_color:
            text = f"\x1b[{COLORS[np.sign(weight)]}m{text}\x1b[0m"
        elif weight:
            text = f"[[{text}]]"
        if weight not in (0, 1):
            text += f"{{{weight:g}}}"
        parts.append(text)
    return "".join(parts)


def split_runs(ids, values):
    """Yield (ids, value) for each run of tokens with the same value."""
    starts = np.flatnonzero(np.diff(values)) + 1
    for run, run_values in zip(np.split(ids, starts), np.split(values, starts)):
        yield run, run_values[0]


def mark_special(tok, ids, use_color):
    """The text of ids, with special tokens distinguished from text that spells them."""
    parts = []
    for run, is_special in split_runs(ids, np.isin(ids, list(tok.special_and_added_ids))):
        text = tok.decode(run)
        if is_special and use_color:
            text = f"\x1b[7m{text}\x1b[27m"
        if not is_special and not use_color:
            text = tok.special_pattern.sub(r"\\\g<0>", text)
        parts.append(text)
    return "".join(parts)


def show_document(tok, name, i, ids, weights, show_ids):
    use_color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    weights = np.append(0, weights[1:])                  # the first token is never a target
    print(f"\n--- {name} {i}: {len(ids)} tokens, {np.count_nonzero(weights[1:])} trained, "
          f"{'in green' if use_color else 'in [[ ]]'}")
    print(colorize(tok, ids, weights, use_color))
    if show_ids:
        for position, (token, weight) in enumerate(zip(ids, weights)):
            word = {0: "-", 1: "trained"}.get(float(weight), f"{weight:g}")
            print(f"{position:>6} {token:>7} {word:<8}{tok.decode([token])!r}")


def main(argv):
    options, argv = configs.pop_options(argv, show=0, ids=False)
    cfg, _, _ = configs.load(argv)
    require_train_data(cfg)
    tok = load_tokenizer(cfg)
    for kind, sources in load_datasets(cfg, tok).items():
        for name, tokens in sources.items():
            print(summary(f"{kind}.{name}", tokens), f"  in {tokens.folder}", *histogram(tokens),
                  sep="\n")
            for i in range(min(options["show"], len(tokens))):
                show_document(tok, f"{kind}.{name}", i, *tokens.document(i), options["ids"])


if __name__ == "__main__":
    configs.exit_with_help(__doc__, sys.argv[1:])
    configs.run(main, sys.argv[1:])
