"""The configuration of a run: one plain dict, merged from layers.

    cfg, source, explicit = configs.load(["configs/ft.yaml", "lr=1e-4"])
    python -m configs configs/ft.yaml lr=1e-4         print every value and the layer it comes from

Layers, each merged over the ones before:

    default    configs/defaults.yaml, which is also the schema: type, range and meaning of every key
    imported   the config.json of the pretrained model, translated by configs/families.yaml;
               without one, what new models of model.family share
    files      the yaml files on the command line, left to right
    cli        key.subkey=value on the command line, left to right
    derived    values that are still null and follow from others; never saved

`explicit` is what files and command line set; a run saves it as its config.yaml. This package
imports neither torch nor numpy, so a mistyped key is reported in a tenth of a second.
docs/config.md explains the config with examples.
"""
import contextlib
import copy
import difflib
import functools
import io
import json
import math
import operator
import os
import re
import signal
import string
import sys
import time
from pathlib import Path

import yaml

from configs import hf_config
# for other scripts: configs.read_model(), ...
from configs.hf_config import (LICENSES, families, hf_names, read_json, read_model,
                               resolve_model_dir, resolve_pretrained, rope_kind, to_hf)

if sys.platform == "win32":                        # no fork, no file locks, no links
    sys.exit("error: Windows is not supported; WSL2 runs this as Linux does")

HERE = Path(__file__).resolve().parent
MISSING = object()                                 # returned by get() for a missing key
DEFAULT_SEQ_LEN = 1024                             # upper limit of a data.seq_len that nobody sets


class UserError(ValueError):
    """A mistake of the user. It is shown as one line; every other exception keeps its traceback."""

    def __str__(self):
        return " ".join(super().__str__().splitlines()).strip()


# --------------------------------------------------------------------------------------------------
# text files, of all scripts: UTF-8, with or without a byte order mark

ZERO_BYTE = "has a zero byte; tr -d '\\000' < OLD > NEW removes them"
ICONV = "iconv -f {0} -t UTF-8 OLD > NEW converts it"
# the first bytes of a file, how the name of such a file should end, what it is otherwise
SIGNATURES = (
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", (), "not UTF-8 but UTF-32 text; " + ICONV.format("UTF-32")),
    (rb"\xff\xfe|\xfe\xff", (), "not UTF-8 but UTF-16 text; " + ICONV.format("UTF-16")),
    (rb"[^\0]\0[^\0]\0", (), "not UTF-8 but UTF-16 text; " + ICONV.format("UTF-16LE")),
    (rb"\0[^\0]\0[^\0]", (), "not UTF-8 but UTF-16 text; " + ICONV.format("UTF-16BE")),
    (rb"\x1f\x8b", ".gz", "compressed with gzip; gunzip it, or let its name end in .gz"),
    (rb"BZh[1-9]1AY", ".bz2", "compressed with bzip2; bunzip2 it, or let its name end in .bz2"),
    (rb"\xfd7zXZ", ".xz", "compressed with xz; unxz it, or let its name end in .xz"),
    (rb"\x28\xb5\x2f\xfd", ".zst", "compressed with zstd; zstd -d OLD -o NEW unpacks it"),
    (rb"PK\x03\x04", ".zip", "a zip archive; unzip unpacks it"),
    (rb"PAR1[^ -~]", ".parquet", "a parquet file; let its name end in .parquet"),
    (rb"version https://git-lfs", (), "a Git LFS pointer, not the file; git lfs pull downloads it"),
    (rb"\s*<(!doctype html|html)", ".txt", "a web page; was the download refused?"))


def format_problem(head, name):
    """What a file is whose first bytes do not fit its name, and what to do; or ""."""
    for pattern, ends, problem in SIGNATURES:
        if re.match(pattern, head, re.IGNORECASE) and not name.lower().endswith(ends):
            return problem
    return ""


def decoding_problem(error):
    """A UnicodeDecodeError in words, and what to do."""
    wrong = error.object[error.start:error.start + 2]
    likely = "GBK" if len(wrong) == 2 and min(wrong) >= 0x80 else "LATIN1"
    return (f"not UTF-8 text (byte {error.start + 1} is 0x{wrong[0]:02x}); {ICONV.format(likely)}, "
            "with the encoding that it has: LATIN1, GBK, ...")


def encoding_problem(lines):
    """The first of a file's lines (bytes) that is not UTF-8, and what to do."""
    for n, line in enumerate(lines, 1):
        if b"\0" in line:
            return f"line {n}: {ZERO_BYTE}"
        try:
            line.decode()
        except UnicodeDecodeError as error:
            return f"line {n}: {decoding_problem(error)}"


def read_text(path):
    """The text of a file, with \\n for \\r\\n. Raises UserError if it is not UTF-8."""
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:               # ValueError: a zero byte in the path
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read: {reason}") from None
    problem = format_problem(data[:1000], str(path))
    if problem:
        raise UserError(f"{path}: {problem}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}, {encoding_problem(data.splitlines())}") from None
    return text.replace("\r\n", "\n")


# --------------------------------------------------------------------------------------------------
# YAML. Unquoted words have the same meaning in files and on the command line
#
# YAML 1.1, which PyYAML implements, reads 1e-4 as a string, no as false, 010 as 8 and 1:30 as 90.
# Here 1e-4 is a float and the others are strings.

# libyaml parses our files in 2 ms, 60 times faster than PyYAML's own parser. PyYAML can be built
# without it.
YAML_PARSER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
INT = r"[-+]?(0|[1-9][0-9]*)"
FLOAT = r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.?inf|\.?nan"
WORDS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
         "null": None, "Null": None, "NULL": None, "None": None, "~": None}


def parse_scalar(text):
    """The value of an unquoted word: true/false, null/None/~, int, float, or else the string."""
    if text in WORDS:
        return WORDS[text]
    if re.fullmatch(INT, text):
        return int(text)
    if re.fullmatch(FLOAT, text):
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))
    return text


def compose(text, name):
    """The tree of YAML nodes of a text, or None if it is empty. `name` is for error messages."""
    try:
        return yaml.compose(text, Loader=YAML_PARSER)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UserError(f"{name}{line}: not valid YAML: {problem}") from None


def construct(node, name):
    """The value of a YAML node. Raises UserError for a key that occurs twice or is not a word."""
    if node is None:
        return None
    if isinstance(node, yaml.ScalarNode):
        if node.style:                             # quoted, or a block of text
            return node.value
        return parse_scalar(node.value) if node.value else None
    if isinstance(node, yaml.SequenceNode):
        return [construct(item, name) for item in node.value]
    section = {}
    for key_node, value_node in node.value:
        key = key_node.value
        if not isinstance(key_node, yaml.ScalarNode) or key in section:
            line = key_node.start_mark.line + 1
            raise UserError(f"{name}, line {line}: the key {key!r} occurs twice or is not a word")
        section[key] = construct(value_node, name)
    return section


def read_file(path):
    """A config file as a dict. An empty file is an empty dict."""
    value = construct(compose(read_text(path), path), path)
    if not isinstance(value, dict | None):
        raise UserError(f"{path}: must be sections of key: value; got {show(value)}")
    return value or {}


class Dumper(yaml.SafeDumper):
    """Writes no aliases. The resolvers below quote "1e-4" and "None", which load() would read as a
    float and as null."""

    def ignore_aliases(self, data):
        return True


Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^(?:{FLOAT})$"), None)
Dumper.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^None$"), None)


def dump(d):
    """A dict as YAML text, which load() and other YAML readers read as the same values."""
    return yaml.dump(d, Dumper=Dumper, sort_keys=False, width=120)


def show(value):
    """A value in an error message."""
    if isinstance(value, dict):
        return f"a section ({', '.join(value) or 'empty'})"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


# --------------------------------------------------------------------------------------------------
# dicts with dotted keys

def flat(d, prefix=""):
    """{"a": {"b": 1}} -> {"a.b": 1}. An empty section is a value."""
    leaves = {}
    for key, value in d.items():
        if isinstance(value, dict) and value:
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def get(d, key, default=None):
    """get({"a": {"b": 1}}, "a.b") -> 1. `default` if the key or one of its sections is missing."""
    for part in key.split("."):
        if not isinstance(d, dict) or part not in d:
            return default
        d = d[part]
    return d


def nested(key, value):
    """("a.b", 1) -> {"a": {"b": 1}}"""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def overlay(base, new, layer, prefix=""):
    """Merge `new` into `base` in place: sections recursively, all other values are replaced.

    null, and a ${...} where the schema allows one, replace anything. Otherwise a section in the
    place of a value, or the reverse, is a UserError.
    """
    for key, value in new.items():
        old = base.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            overlay(old, value, layer, f"{prefix}{key}.")
            continue
        is_reference = isinstance(value, str) and "${" in value
        if old is not None and value is not None and not is_reference:
            if isinstance(old, dict) != isinstance(value, dict):
                want = "a section" if isinstance(old, dict) else "a value, not a section"
                raise UserError(f"{prefix}{key}: must be {want}; got {show(value)} (from {layer})")
        base[key] = copy.deepcopy(value)


def merged(layers):
    """Merge [(layer name, dict)]. Returns the dict and {dotted key: name of its layer}."""
    cfg = {}
    last_layer = {}
    for name, layer in layers:
        overlay(cfg, layer, name)
        last_layer |= dict.fromkeys(flat(layer), name)
    # only of keys that are left: a later layer may have replaced a section
    return cfg, {key: layer_of(last_layer, key) for key in flat(cfg)}


def layer_of(source, key):
    """The layer of a dotted key; if it is not in `source`, that of the section it is in.

    source[""], if there is one, is the layer of everything else. "cfg" for a section of several
    layers, which has no entry of its own.
    """
    while key and key not in source:
        key = key.rpartition(".")[0]
    return source.get(key, "cfg")


# --------------------------------------------------------------------------------------------------
# the schema: {dotted key: constraint}, for example {"lr": "float >= 0", "optimizer": "name in
# train.OPTIMIZERS: adamw, muon, sgd"}. The top of defaults.yaml describes constraints

TYPES = {"str": str, "bool": bool, "int": int, "float": float, "list": list, "map": dict,
         "section": dict, "null": type(None), "name": str, "names": list, "path": str}
COUNT_OR_FRACTION = "int >= 0 or float >= 0 and <= 1"
# of values
SHORT_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "gpu": "cuda"}
PARAM_GROUP = {"param_groups.match": "str", "param_groups.lr": "float >= 0",
               "param_groups.weight_decay": "float >= 0", "param_groups.train": "bool"}
COMPARISONS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}


@functools.cache
def read_defaults():
    """configs/defaults.yaml -> (the default values, the schema)."""
    text = (HERE / "defaults.yaml").read_text(encoding="utf-8")
    root = compose(text, "defaults.yaml")
    schema = {}
    add_constraints(root, text.splitlines(), schema)
    return construct(root, "defaults.yaml"), schema


def add_constraints(node, lines, schema, prefix=""):
    """Add the constraints of a section of defaults.yaml, from the comments after its values."""
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        if isinstance(value_node, yaml.MappingNode) and value_node.value:
            schema[key] = "section of keys"
            add_constraints(value_node, lines, schema, f"{key}.")
            continue
        end = value_node.end_mark
        comment = lines[end.line][end.column:].strip(" #")
        constraint = comment.removesuffix(".").partition(". ")[0]
        schema[key] = constraint.replace("count or fraction", COUNT_OR_FRACTION)


def schema_of(defaults, prefix=""):
    """The schema of another dict of defaults: the types of its values.

    A default of null or with ${...} allows any value. Keys that end in _every take a count or a
    fraction.
    """
    schema = {}
    for key, value in defaults.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            schema[dotted] = "section of keys"
            schema |= schema_of(value, f"{dotted}.")
        elif value is None or isinstance(value, str) and "${" in value:
            schema[dotted] = "any"
        elif dotted.endswith("_every"):
            schema[dotted] = "int or float"        # a count, or a fraction of the run
        else:
            schema[dotted] = next(name for name in TYPES if type(value) is TYPES[name])
    return schema


def constraint_of(key, schema):
    """The constraint of a dotted key, or None if the key is unknown."""
    if "data.source" in schema:                    # every named source has the keys of data.source
        key = re.sub(r"^data\.(train|validation)\.[^.]+", "data.source", key)
    if key in schema:
        return schema[key]
    section = key.rpartition(".")[0]
    return item_constraint(constraint_of(section, schema)) if section else None


def item_constraint(constraint):
    """The constraint of a list's items or of a map's values.

    None for other values, and for a section, whose keys have constraints of their own.
    """
    for kind in (constraint or "").split(" or "):
        if kind in ("any", "map", "list"):
            return "any"
        if kind.startswith(("map of ", "list of ")):
            return kind.partition(" of ")[2]
    return None


def fits(value, constraint):
    """Does a value fulfil a constraint, e.g. "int >= 1 or null"?

    Of "name in ..." only the type is checked: see check_builtin_names.
    """
    if " or " in constraint:
        return any(fits(value, kind) for kind in constraint.split(" or "))
    if constraint == "any":
        return True
    if constraint.startswith("one of "):
        return value in constraint.removeprefix("one of ").split(", ")
    kind, _, rest = constraint.partition(" ")
    if type(value) is not TYPES[kind]:
        return False
    if kind == "int" and abs(value) >= 2**63:
        return False
    if kind == "list" and rest:
        return all(fits(item, rest.removeprefix("of ")) for item in value)
    if kind in ("int", "float") and rest:
        return math.isfinite(value) and in_range(value, rest)
    return True


def in_range(value, bounds):
    """in_range(0.5, ">= 0 and < 1") -> True"""
    for bound in bounds.split(" and "):
        comparison, limit = bound.split()
        if not COMPARISONS[comparison](value, float(limit)):
            return False
    return True


def coerce(value, constraint):
    """The value after the conversions that a constraint allows: int to float, a name to a list,
    a short name to the full one."""
    if constraint.startswith("one of ") and isinstance(value, str) and value in SHORT_NAMES:
        value = SHORT_NAMES[value] if fits(SHORT_NAMES[value], constraint) else value
    if isinstance(value, str) and constraint.startswith("names in "):
        return [value]
    if isinstance(value, list) and item_constraint(constraint):
        return [coerce(item, item_constraint(constraint)) for item in value]
    if type(value) is int and not fits(value, constraint) and fits(float(value), constraint):
        return float(value)
    return value


def checked_value(key, value, constraint, layer):
    """The value, converted. Raises UserError if it does not fulfil the constraint."""
    # A ${...} is checked when it is resolved. It cannot replace a section of known keys.
    if "${" in str(value) and not constraint.startswith("section"):
        return value
    value = coerce(value, constraint)
    if not fits(value, constraint):
        if re.match(r"data\.(train|validation)\b", key) and constraint.startswith("section"):
            raise source_without_name(key, value, layer)
        is_quoted = isinstance(value, str) and fits(parse_scalar(value), constraint)
        raise invalid(key, constraint, value, layer, "; remove the quotes" if is_quoted else "")
    return value


def source_without_name(key, value, layer):
    """The error for data.train=FILE, data.train.path=FILE and data.train.NAME=FILE."""
    section, _, name = re.fullmatch(r"(data\.\w+)(\.|$)(.*)", key).groups()
    option = name if name in read_defaults()[0]["data"]["source"] else "path"
    if name in ("", option):
        name = re.sub(r"\W", "_", Path(str(value)).stem) if option == "path" else "NAME"
    example = f"{section}.{name}.{option}={value}"
    if value is None:                              # the lines below it are not indented
        example = f"{section}.NAME.path=FILE"
    return invalid(key, f"a section: a source has a name and keys, {example}", value, layer)


def invalid(key, want, value, layer, hint=""):
    layer = "model.init_from's config.json" if layer == "imported" else layer
    want = want.replace("bool", "true or false").replace("section of", "a section of")
    return UserError(f"{key}: must be {want}; got {show(value)} (from {layer}){hint}")


def validate(section, schema, source, prefix=""):
    """A copy of a section (of cfg or of a layer) with converted values.

    Raises UserError for an unknown key or an invalid value.

    source  {dotted key: layer}; {"": layer} for a dict that comes from one layer
    """
    checked = {}
    # if the section is a map, any key is valid, and this is the constraint of its values
    item_kind = item_constraint(constraint_of(prefix.removesuffix("."), schema))
    for key, value in section.items():
        dotted = f"{prefix}{key}"
        layer = layer_of(source, dotted)
        constraint = item_kind or constraint_of(dotted, schema)
        if constraint is None:
            # of an unknown section, name the first leaf: synonyms.yaml lists leaves
            full_key = next(iter(flat({dotted: value})))
            raise UserError(f"{full_key}: unknown key (from {layer}); "
                            f"{suggestion(full_key, schema)}")
        if "." in key and not item_kind:
            first, _, rest = key.partition(".")
            raise UserError(f"{dotted}: a key in a file must not contain a dot (from {layer}); "
                            f"write {first}: {{{rest}: ...}}")
        may_be_section = fits({}, constraint)
        if isinstance(value, dict) and may_be_section:
            checked[key] = validate(value, schema, source, f"{dotted}.")
        else:
            checked[key] = checked_value(dotted, value, constraint, layer)
    return checked


# --------------------------------------------------------------------------------------------------
# unknown keys: names from other trainers, and the nearest key

def suggestion(key, schema):
    """How to write an unknown key: its name here, a sentence from synonyms.yaml, a near key."""
    synonym = find_synonym(key, schema)
    if synonym:
        return synonym if " " in synonym else f"it is {synonym} here"
    names = [name for name, kind in schema.items() if not kind.startswith("section")]
    source = re.match(r"data\.(train|validation)\.[^.]+\.", key)
    source_prefix = source[0] if source else "data.train.NAME."
    near = nearest(key, [name.replace("data.source.", source_prefix) for name in names])
    if near:
        return f"the nearest is {near}"
    return "configs/defaults.yaml lists all keys"


def find_synonym(key, schema):
    """The entry of synonyms.yaml for a key of another trainer, or None.

    An entry begins with one of our keys. If the schema lacks that key, as the schema of a script's
    own options does, the entry is ignored.
    """
    table = read_file(HERE / "synonyms.yaml")
    for name in (key, key.rpartition(".")[2]):
        synonym = table.get(name, "")
        our_key = re.match(r"[\w.]*", synonym)[0]
        if constraint_of(our_key, schema):
            return synonym
    return None


def nearest(key, names):
    """The name that is spelled most like a key, as a whole or in its last part, or None."""
    spellings = {name.rpartition(".")[2]: name for name in names}
    spellings |= {name: name for name in names}
    for word in (key, key.rpartition(".")[2]):
        near = difflib.get_close_matches(word, spellings, n=1, cutoff=0.8)
        if near:
            return spellings[near[0]]
    return None


# --------------------------------------------------------------------------------------------------
# the command line

def parse_value(text, key, constraint, origin="cli"):
    """The value of key=TEXT.

    If the constraint accepts a string (str, one of, name in), the text is returned as it is; but
    null is None if the constraint accepts null.

    origin  where the text comes from, for error messages
    """
    value = parse_scalar(text)
    takes_text = constraint != "any" and fits(text, constraint)
    if takes_text:
        is_null = value is None and fits(None, constraint)
        return None if is_null else text
    if text.startswith(("[", "{")):
        name = f"{key} (from {origin})"
        return construct(compose(text, name), name)
    return value


def parse_override(arg, schema, layers):
    """key=value -> a nested dict.

    layers  for LIST.INDEX=value: defaults, files and earlier arguments. An item of a list that only
            config.json sets cannot be changed singly
    """
    key, _, text = arg.partition("=")
    if not is_utf8(arg):
        raise UserError(f"{ascii(key)[1:-1]}: is not UTF-8: {text!a} (from cli)")
    value = parse_value(text, key, constraint_of(key, schema) or "any")
    match = re.match(r"(.+?)\.([0-9]+)(\.|$)", key)
    if match and (constraint_of(match[1], schema) or "").startswith(("list", "names")):
        list_key = match[1]
        items = get(merged(layers)[0], list_key)
        change = nested(key.removeprefix(f"{list_key}."), value)
        return nested(list_key, change_item(items, match[2], change, list_key))
    return nested(key, value)


def is_utf8(text):
    """False if bytes of the command line are not UTF-8: Python decodes them to lone surrogates."""
    return text == text.encode(errors="ignore").decode()


def change_item(items, index, change, key):
    """Change one item of a list, in place.

    change_item([{"a": 1}], "0", {"0": {"b": 2}}, key) -> [{"a": 1, "b": 2}]
    """
    length = len(items) if isinstance(items, list) else 0
    if int(index) >= length:
        raise UserError(f"{key}.{index}: out of range; {key} has {length} items, counted from 0 "
                        "(from cli)")
    section = {index: items[int(index)]}           # overlay() merges dicts, so wrap the item in one
    overlay(section, change, "cli", f"{key}.")
    items[int(index)] = section[index]
    return items


# --------------------------------------------------------------------------------------------------
# ${a.b} and ${oc.env:NAME,default}

REFERENCE = re.compile(r"\$\{([^{}]*)\}")         # the innermost one, if they are nested


def resolve(cfg, schema, source, env):
    """A copy of cfg with every ${...} replaced."""
    context = {"cfg": cfg, "schema": schema, "source": source, "env": env}
    cfg = expand(cfg, "", [], context)
    for key, value in flat(cfg).items():
        if isinstance(value, str) and constraint_of(key, schema) == "path":
            overlay(cfg, nested(key, expand_path(value, key, context)), "path")
    return cfg


def expand_path(path, key, context):
    """A path with ~ and environment variables ($NAME) replaced."""
    try:
        expanded = os.path.expanduser(string.Template(path).substitute(context["env"]))
    except KeyError as error:
        problem = f"the environment variable {error.args[0]} is not set"
    except ValueError:
        problem = f"{path} has a $ without a name; $$ is a dollar sign"
    else:
        if not expanded.startswith("~"):
            return expanded
        problem = f"{path} begins with a ~ that is nobody's home; ./~ is a file of this name"
    raise reference_error(key, problem, context)


def expand(value, key, trail, context):
    """A copy of the value of a key with every ${...} replaced, in sections and lists too.

    trail  the keys whose values are being expanded, to find references in a circle
    """
    if isinstance(value, dict):
        prefix = f"{key}." if key else ""
        return {name: expand(item, prefix + name, trail, context) for name, item in value.items()}
    if isinstance(value, list):
        return [expand(item, key, trail, context) for item in value]
    if not isinstance(value, str):
        return value
    text = value
    while match := REFERENCE.search(text):
        if key in trail:
            circle = " -> ".join([*trail, key])
            raise reference_error(key, f"${{...}} refers to itself in a circle: {circle}", context)
        inserted = look_up(match[1].strip(), key, [*trail, key], context)
        if match[0] == text:                       # nothing else in the text: keep the type
            return inserted
        text = text[:match.start()] + str(inserted) + text[match.end():]
    if "${" in text:
        raise reference_error(key, f"{value!r} has a ${{ without its closing brace", context)
    return text


def look_up(name, key, trail, context):
    """The value of ${name}, which is used in the value of `key`."""
    if name.startswith("oc.env:"):
        variable, comma, default = name.removeprefix("oc.env:").partition(",")
        text = context["env"].get(variable, default if comma else None)
        if text is None:
            raise reference_error(key, f"the environment variable {variable} is not set; "
                                  f"${{oc.env:{variable},VALUE}} has a default", context)
        if "${" in text:
            raise reference_error(key, f"the environment variable {variable} contains ${{", context)
        constraint = constraint_of(key, context["schema"]) or "any"
        return parse_value(text, key, constraint, f"environment variable {variable}")
    value = get(context["cfg"], name, MISSING)
    if value is MISSING:
        near = nearest(name, list(flat(context["cfg"])))
        hint = f"; the nearest is {near}" if near else ""
        if name in context["env"]:
            hint = f"; the environment variable is ${{oc.env:{name}}}"
        raise reference_error(key, f"${{{name}}} is not a key{hint}", context)
    return expand(value, name, trail, context)


def reference_error(key, problem, context):
    return UserError(f"{key}: {problem} (from {layer_of(context['source'], key)})")


# --------------------------------------------------------------------------------------------------
# derived values, and checks that involve several keys

def named_sources(cfg):
    """{"data.train.NAME": its section}, also of data.validation."""
    sources = {}
    for kind in ("data.train", "data.validation"):
        for name, section in get(cfg, kind).items():
            sources[f"{kind}.{name}"] = section
    return sources


def fill_sources(cfg, layers_by_key):
    """Give every named source the keys of data.source that it does not set itself.

    layers_by_key  what load() returns as `source`; here, a source is one of data
    """
    for name, section in named_sources(cfg).items():
        for key, value in cfg["data"]["source"].items():
            if key not in section:
                section[key] = value
                layers_by_key[f"{name}.{key}"] = layer_of(layers_by_key, f"data.source.{key}")


def has_linear_attention(model_cfg):
    """Do model.layer_types, or else those of the family, have linear_attention?"""
    places = families().get(model_cfg["family"], {}).get("keys", {}).get("layer_types")
    default = places[-1]["default"] if places else []
    return "linear_attention" in (model_cfg["layer_types"] or default)


def derive(cfg, layers_by_key):
    """Fill values that are null and follow from others, and join paths, in place."""
    model_cfg = cfg["model"]
    d_model = model_cfg["d_model"]
    head_dim = model_cfg["head_dim"] or d_model // model_cfg["n_heads"]
    # A gated MLP has 3 matrices instead of 2, so 2/3 of the width gives about the same size.
    gated_d_ff = math.ceil(d_model * 8 // 3 / 64) * 64
    values = {"min_lr": cfg["lr"] / 10,
              "data.seq_len": min(model_cfg["max_len"], DEFAULT_SEQ_LEN),
              "checkpoint.export": cfg["checkpoint"]["save_final"],
              "shard.lora.alpha": 2.0 * cfg["shard"]["lora"]["r"],
              "model.n_kv_heads": model_cfg["n_heads"],
              "model.head_dim": head_dim,
              "model.d_ff": gated_d_ff if model_cfg["glu"] else 4 * d_model}
    if model_cfg["n_experts"]:
        values["model.d_expert"] = model_cfg["d_ff"] or values["model.d_ff"]
    # stay null in families whose config.json lacks them
    family_keys = families().get(model_cfg["family"], {}).get("keys", {})
    if "rope_layers" in family_keys:
        values["model.rope_layers"] = [1] * model_cfg["n_layers"]
    if "layer_types" in family_keys:
        values["model.layer_types"] = family_keys["layer_types"][-1]["default"]
    if "llama_4_scaling_beta" in family_keys:
        values["model.llama_4_scaling_beta"] = 0.1
    if "global_head_dim" in family_keys:
        values["model.global_head_dim"] = head_dim
    if "attention_multiplier" in family_keys:
        # head_dim may still be 0 here; validate() refuses it afterwards
        values["model.attention_multiplier"] = max(head_dim, 1) ** -0.5
    if has_linear_attention(model_cfg):
        n_key_heads = model_cfg["linear_num_key_heads"] or model_cfg["n_heads"]
        values |= {"model.linear_num_key_heads": n_key_heads,
                   "model.linear_num_value_heads": n_key_heads,
                   "model.linear_key_head_dim": head_dim,
                   "model.linear_value_head_dim": head_dim,
                   "model.linear_conv_kernel_dim": 4}
    for key, value in values.items():
        if get(cfg, key) is None:
            overlay(cfg, nested(key, value), "derived")
            layers_by_key[key] = "derived"

    cfg["out_dir"] = join_root(cfg["output_root"], cfg["out_dir"])
    cfg["data"]["cache_dir"] = join_root(cfg["output_root"], cfg["data"]["cache_dir"])
    for data_source in named_sources(cfg).values():
        data_source["path"] = join_root(cfg["data_root"], data_source["path"])
    if cfg["eval_only"] and not cfg["data"]["train"]:
        cfg["data"]["train"] = copy.deepcopy(cfg["data"]["validation"])    # they are not trained


def conditional_options(cfg):
    """Yields (option, the key that decides about it, does it have an effect, why or why not)."""
    data = cfg["data"]
    can_evaluate = data["validation"] or data["validation_split"] or not data["train"]
    mesh = cfg["shard"]["mesh"]
    is_sharded = (mesh["replicate"] or (mesh["shard"] or 1) > 1
                  or cfg["shard"]["offload"] != "none")
    uses_lora = cfg["shard"]["lora"]["r"]
    switches = (
        ("shard.lora.alpha shard.lora.targets shard.lora.rslora shard.lora.dropout "
         "shard.lora.modules_to_save", "shard.lora.r", uses_lora,
         "without LoRA; shard.lora.r=8 turns it on"),
        ("eval_every eval_only eval_prompts eval_tokens eval_answer eval_share samples",
         "data.validation", can_evaluate,
         "without validation data; data.validation_split=0.05 holds some out"))
    for options, decider, is_used, why in switches:
        for option in options.split():             # null, 0 and false are right without effect
            yield option, decider, is_used or not get(cfg, option), why
    others = (
        ("shard.quantize", "shard.lora.r", uses_lora,
         "without LoRA, which freezes the weights that are quantized; shard.lora.r=8 turns it on"),
        ("min_lr", "schedule", cfg["schedule"] != "constant",
         "with schedule=constant, which stays at lr"),
        ("decay_steps", "schedule", cfg["schedule"] == "wsd", "without schedule=wsd"),
        ("momentum", "optimizer", cfg["optimizer"] != "adamw",
         "with optimizer=adamw, which has betas"),
        ("betas eps", "optimizer", cfg["optimizer"] != "sgd", "with optimizer=sgd"),
        ("log.project", "log.to", cfg["log"]["to"], "without a tracker; log.to=wandb names one"),
        ("shard.reshard_after_forward", "shard.mesh", is_sharded,
         "on unsharded ranks; shard.mesh.shard=2 shards over two"),
        ("data.tokenizer_pattern data.special_tokens", "data.tokenizer",
         data["tokenizer"].endswith(".tiktoken"), "unless data.tokenizer is a .tiktoken file"),
        *conditional_model_options(cfg["model"]))
    for options, decider, is_used, why in others:
        for option in options.split():
            yield option, decider, is_used, why


def conditional_model_options(model_cfg):
    """The part of conditional_options() about the model section: [(options, ...)]."""
    has_linear = has_linear_attention(model_cfg)
    window = model_cfg["sliding_window"]
    no_window = "without model.sliding_window"
    return [
        ("model.rope_theta model.rope_scaling model.rope_local_theta model.rope_interleaved "
         "model.rope_layers model.partial_rotary_factor model.llama_4_scaling_beta",
         "model.positions", model_cfg["positions"] == "rope",
         "with learned positions (model.positions)"),
        ("model.global_head_dim model.n_global_kv_heads model.attention_k_eq_v model.d_per_layer "
         "model.n_kv_shared_layers model.double_wide_mlp", "model.block",
         model_cfg["block"] == "gemma4", "without model.block=gemma4"),
        ("model.layer_types", "model.sliding_window", window or has_linear, no_window),
        ("model.rope_local_theta", "model.sliding_window", window, no_window),
        ("model.linear_num_key_heads model.linear_num_value_heads model.linear_key_head_dim "
         "model.linear_value_head_dim model.linear_conv_kernel_dim", "model.layer_types",
         has_linear, "without linear_attention in model.layer_types"),
        ("model.n_experts_per_token model.d_expert model.norm_topk_prob model.swiglu_limit "
         "model.router_aux_loss model.router_aux_loss_coef", "model.n_experts",
         model_cfg["n_experts"], "without experts; model.n_experts=8 makes eight per block"),
        ("model.init_std model.init_by_depth", "model.init_from", not model_cfg["init_from"],
         "with model.init_from, which has the weights")]


def drop_unused(cfg, layers_by_key, explicit, layer_names, defaults):
    """Reset options that a later layer has left without effect, in place.

    For example betas of a file, if the command line has optimizer=sgd. Raises UserError for other
    options that have no effect.

    layer_names  of files and command line, in their order
    defaults     the values that nobody has set
    """
    for key, decider, is_used, why in conditional_options(cfg):
        default = get(defaults, key)
        if is_used or get(cfg, key) == default or get(explicit, key) is None:
            continue
        layer = layer_of_value(layers_by_key, key)
        decided_in = layer_of_value(layers_by_key, decider)
        earlier = layer_names[:layer_names.index(layer) + 1]
        if decided_in not in layer_names or decided_in in earlier:
            raise UserError(f"{key}: {show(get(cfg, key))} (from {layer}) has no effect {why}")
        section, _, name = key.rpartition(".")
        for d in (cfg, explicit):
            (get(d, section) if section else d).pop(name)
        overlay(cfg, nested(key, default), "default")
        layers_by_key[key] = "default"


def layer_of_value(source, key):
    """layer_of(), also of a section: the layer of one of its keys."""
    inside = [k for k in source if k.startswith(f"{key}.")]
    return source[inside[-1]] if inside else layer_of(source, key)


def join_root(root, path):
    """A path below a root folder. Absolute and empty paths stay as they are.

    It is absolute, so that a printed config means the same when it is loaded again.
    """
    if root in ("", ".") or not path:
        return path
    return os.path.join(os.path.abspath(root), path)


def check(cfg, layers_by_key, defaults):
    """What one key's constraint cannot express: yields (is it valid, key, what it must be)."""
    yield len(cfg["betas"]) == 2, "betas", "two numbers"
    yield cfg["best"] or not cfg["patience"], "patience", "0 unless `best` names a logged number"
    yield is_pattern(cfg["eval_answer"]), "eval_answer", "all, last_line or a regular expression"
    yield (not cfg["eval_only"] or cfg["resume"] != "never", "resume",
           "auto, latest or a checkpoint with eval_only, which deletes nothing")
    yield (not cfg["checkpoint"]["export"] or cfg["checkpoint"]["save_final"] or cfg["best"],
           "checkpoint.export", "false with checkpoint.save_final=false, because it exports the "
           "final checkpoint")
    yield (cfg["resume"].lower() not in ("", "true", "false", "yes", "no"), "resume",
           "auto (the default: continue the run in out_dir), never, latest or the path of a "
           "checkpoint")
    for group in cfg["param_groups"]:
        # for its errors only: the values need no conversion
        validate(group, PARAM_GROUP, layers_by_key, "param_groups.")
        yield (is_pattern(group.get("match")), "param_groups",
               "a list of {match: a regular expression, lr: a factor, weight_decay: a number, "
               "train: false}")
        yield (group.get("train", True) or not {"lr", "weight_decay"} & group.keys(),
               "param_groups", "a list in which groups with train: false have no lr and no "
               "weight_decay")
    yield (cfg["shard"]["recompute"] != "selective" or not cfg["shard"]["lora"]["r"],
           "shard.recompute", "true, false or a number with LoRA, whose adapters are added in "
           "place to the outputs that selective would keep")
    for key in ("master_dtype", "moment_dtype"):
        yield (cfg["optimizer"] == "adamw" or cfg["shard"][key] == "float32", f"shard.{key}",
               f"float32 with optimizer={cfg['optimizer']}; bfloat16 is for adamw")
    id_range = cfg["data"]["ignore_token_id_range"] or [0, 0]
    yield (len(id_range) == 2 and id_range[0] <= id_range[1], "data.ignore_token_id_range",
           "null or [first, last]")
    for name, section in named_sources(cfg).items():
        yield section["path"].strip(), f"{name}.path", "a file, a folder or a glob"
    yield cfg["out_dir"].strip(), "out_dir", "a folder"
    yield cfg["data"]["cache_dir"].strip(), "data.cache_dir", "a folder"
    yield from check_adapter(cfg["shard"]["lora"], cfg["out_dir"])
    yield from check_model(cfg["model"])
    max_len = cfg["model"]["max_len"]
    yield (cfg["model"]["positions"] != "learned" or cfg["data"]["seq_len"] <= max_len,
           "data.seq_len", f"at most {max_len}: the model has no more learned positions "
           "(model.max_len)")
    yield cfg["model"]["family"] in families(), "model.family", f"one of {', '.join(families())}"
    if cfg["checkpoint"]["export"]:
        yield from hf_config.check_export(cfg["model"], defaults["model"])


def is_pattern(text):
    """Is it a valid regular expression?"""
    try:
        re.compile(text)
    except (TypeError, re.error):
        return False
    return True


def check_adapter(lora_cfg, out_dir):
    """Do the keys that were set agree with the adapter of init_from? Yields like check()."""
    folder = lora_cfg["init_from"]
    adapter = hf_config.read_adapter(folder) if folder else {}
    is_own = folder and Path(out_dir).resolve() in Path(folder).resolve().parents
    yield (not is_own, "shard.lora.init_from", "outside of out_dir, where this run writes its own "
           "adapter; out_dir=NEW")
    for key, value in adapter.items():
        if key != "dropout":                       # it may change
            ours = lora_cfg[key]
            ours = sorted(ours) if isinstance(ours, list) else ours
            yield (ours == value, f"shard.lora.{key}",
                   f"{show(value)}, as in the adapter {folder}, or not set")


def check_gemma4(model_cfg):
    """The part of check_model() about the keys of model.block=gemma4."""
    n_heads = model_cfg["n_heads"]
    n_layers = model_cfg["n_layers"]
    yield (n_heads % (model_cfg["n_global_kv_heads"] or 1) == 0, "model.n_global_kv_heads",
           f"a divisor of model.n_heads ({n_heads})")
    yield (model_cfg["n_global_kv_heads"] is None or model_cfg["attention_k_eq_v"],
           "model.n_global_kv_heads", "null without model.attention_k_eq_v")
    is_gemma4 = model_cfg["block"] == "gemma4"
    yield (model_cfg["n_kv_shared_layers"] < n_layers, "model.n_kv_shared_layers",
           f"less than model.n_layers ({n_layers})")
    yield (not (is_gemma4 and has_linear_attention(model_cfg)), "model.layer_types",
           "without linear_attention in a model with model.block=gemma4")
    yield (not model_cfg["global_head_dim"] or model_cfg["rope_local_theta"] is not None,
           "model.rope_local_theta", "a number with model.global_head_dim")
    has_rope = model_cfg["positions"] == "rope" and model_cfg["rope_layers"] is None
    yield (model_cfg["block"] == "plain" or has_rope and model_cfg["qk_norm"] == "head",
           "model.block", "plain unless model.qk_norm=head, and all blocks have rope")
    yield ((model_cfg["global_head_dim"] or 2) % 2 == 0, "model.global_head_dim",
           "even: rope rotates pairs")


def check_model(model_cfg):
    """Do the sizes of the model section fit each other? Yields like check()."""
    hf_config.check_rope_scaling(model_cfg["rope_scaling"] or {}, "model.rope_scaling")
    n_heads = model_cfg["n_heads"]
    n_layers = model_cfg["n_layers"]
    rope_layers = model_cfg["rope_layers"]
    rope_dim = int(model_cfg["head_dim"] * model_cfg["partial_rotary_factor"])
    yield (n_heads % model_cfg["n_kv_heads"] == 0, "model.n_kv_heads",
           f"a divisor of model.n_heads ({n_heads})")
    yield from check_gemma4(model_cfg)
    n_value_heads = model_cfg["linear_num_value_heads"] or 0
    yield (n_value_heads % (model_cfg["linear_num_key_heads"] or 1) == 0,
           "model.linear_num_value_heads", "a multiple of model.linear_num_key_heads")
    yield (model_cfg["positions"] != "rope" or rope_dim % 2 == 0, "model.head_dim",
           "even after multiplication by model.partial_rotary_factor: rope rotates pairs")
    original = (model_cfg["rope_scaling"] or {}).get("original_max_position_embeddings")
    yield (not model_cfg["llama_4_scaling_beta"]
           or original and model_cfg["partial_rotary_factor"] == 1.0,
           "model.llama_4_scaling_beta", "0 without original_max_position_embeddings in "
           "model.rope_scaling, and with a model.partial_rotary_factor")
    for key in ("short_factor", "long_factor"):
        factors = (model_cfg["rope_scaling"] or {}).get(key)
        yield (factors is None or len(factors) == rope_dim // 2, f"model.rope_scaling.{key}",
               f"a list of {rope_dim // 2} numbers, one per pair that rope rotates")
    yield (not model_cfg["shared_norm"] or model_cfg["parallel_residual"], "model.shared_norm",
           "false unless model.parallel_residual")
    yield (model_cfg["norm_place"] == "before" or not model_cfg["parallel_residual"],
           "model.norm_place", "before if model.parallel_residual")
    yield (model_cfg["sliding_window"] is not None
           or model_cfg["rope_local_theta"] in (None, model_cfg["rope_theta"]),
           "model.sliding_window", "a number with model.rope_local_theta, that of blocks with a "
           "window")
    yield (not isinstance(rope_layers, list) or len(rope_layers) == n_layers, "model.rope_layers",
           f"a list of {n_layers} (model.n_layers), 1: with rope, 0: without")
    if model_cfg["n_experts"]:
        yield (model_cfg["n_experts_per_token"] <= model_cfg["n_experts"],
               "model.n_experts_per_token", f"at most {model_cfg['n_experts']} (model.n_experts)")
        yield model_cfg["glu"], "model.glu", "true if model.n_experts is above 0"
        yield (model_cfg["swiglu_limit"] is None or model_cfg["activation"] == "silu",
               "model.activation", "silu with model.swiglu_limit, which computes that")


# --------------------------------------------------------------------------------------------------
# load

def load(argv, imported=None, defaults=None, env=os.environ):
    """Load the config of a command line, e.g. ["configs/ft.yaml", "lr=1e-4"].

    imported  a dict, or a function that receives a resolved copy of the other layers and returns
              one. Default: hf_config.import_model, or nothing if defaults is given
    defaults  a dict to use instead of defaults.yaml; the types of its values are the schema. The
              checks and derived values of this project don't apply

    Returns
        cfg       the merged dict
        source    {dotted key: "default" | "imported" | file name | "cli" | "derived"}
        explicit  a dict of only what files and command line set
    Raises UserError: one line with the key, what it must be, the value, and the layer.
    """
    is_own_schema = defaults is None
    if is_own_schema:
        defaults, schema = read_defaults()
        imported = hf_config.import_model if imported is None else imported
    else:
        schema = schema_of(defaults)

    default_layer = ("default", defaults)
    layers = user_layers(argv, default_layer, schema)
    explicit, _ = merged(layers)
    if callable(imported):
        cfg, source = merged([default_layer, *layers])
        imported = imported(resolve(cfg, schema, source, env))
    imported_layer = ("imported", validate(imported or {}, schema, {"": "imported"}))
    cfg, source = merged([default_layer, imported_layer, *layers])
    if is_own_schema:
        fill_sources(cfg, source)

    cfg = resolve(cfg, schema, source, env)
    cfg = validate(cfg, schema, source)
    # a ${...} may have become a section: its keys have the layer of the reference
    source = {key: layer_of(source, key) for key in flat(cfg)}
    if is_own_schema:
        without_options, _ = merged([default_layer, imported_layer])
        drop_unused(cfg, source, explicit, [name for name, _ in layers], without_options)
        derive(cfg, source)
        cfg = validate(cfg, schema, source)        # derived values have ranges, too
        for is_valid, key, want in check(cfg, source, defaults):
            if not is_valid:
                raise invalid(key, want, get(cfg, key), layer_of(source, key))
    return cfg, source, explicit


def user_layers(argv, default_layer, schema):
    """The layers of a command line: its files, then its key=value arguments."""
    overrides = [arg for arg in argv if re.match(r"[A-Za-z_][\w.-]*=", arg)]
    layers = []
    for arg in argv:
        if arg.startswith("-"):
            key = arg.lstrip("-").partition("=")[0].replace("-", "_")
            hint = f"write {key}=..." if key in schema else suggestion(key, schema)
            raise UserError(f"{arg}: arguments are config files and key=value, without dashes; "
                            f"{hint}")
        if arg not in overrides:
            check_config_file(arg, schema)
            layers.append((arg, validate(read_file(arg), schema, {"": arg})))
    for arg in overrides:
        layer = parse_override(arg, schema, [default_layer, *layers])
        layers.append(("cli", validate(layer, schema, {"": "cli"})))
    return layers


def check_config_file(path, schema):
    """Raise UserError, with what was probably meant, if an argument names no config file."""
    if os.path.isdir(path):
        found = Path(path) / "config.yaml"
        hint = str(found) if found.is_file() else "name a .yaml file in it"
        raise UserError(f"{path}: is a folder, not a config file; {hint}")
    if path.endswith(DATA_FILES):
        raise UserError(f"{path}: is not a config file (.yaml); data is named by "
                        f"data.train.NAME.path={path}")
    if os.path.exists(path):
        return
    folders = {Path(path).parent, Path("."), Path("configs")}
    names = [str(file) for folder in folders for file in folder.glob("*.yaml")]
    near = nearest_file(path, names)
    hint = f"; the nearest is {near}" if near and path not in schema else ""
    raise UserError(f"{path}: there is no such config file; values are key=value, without spaces"
                    f"{hint}")


DATA_FILES = (".jsonl", ".txt", ".csv", ".tsv", ".parquet", ".npy", ".gz")


def nearest_file(path, names):
    """The file whose name, without folder and extension, is spelled most like a path, or None."""
    spellings = {Path(name).stem: name for name in names}
    near = difflib.get_close_matches(Path(path).stem, spellings, n=1, cutoff=0.6)
    return spellings[near[0]] if near else None


def check_builtin_names(cfg, source):
    """Raise UserError for a loss, optimizer, ... that its script does not mention in quotes.

    It is quick, because it imports no script. Only a script that no experiment has changed may call
    this. load() accepts all names, because experiments register more; train.py checks them when it
    uses them.
    """
    _, schema = read_defaults()
    for key, constraint in schema.items():
        kind, _, builtin = constraint.partition(": ")    # "name in train.OPTIMIZERS", "adamw, sgd"
        if not kind.startswith(("name in ", "names in ")):
            continue
        value = get(cfg, key)
        _, _, registry = kind.partition(" in ")
        script = read_text(HERE.parent / f"{registry.partition('.')[0]}.py")
        for name in value if isinstance(value, list) else [value]:
            is_in_script = re.search(rf"""["']{re.escape(name)}["']""", script)
            if name not in builtin.split(", ") and not is_in_script:
                raise UserError(f"{key}: must be one of {builtin}; got {name} "
                                f"(from {layer_of(source, key)}); an experiment may add others to "
                                f"{registry}")


# --------------------------------------------------------------------------------------------------
# for scripts

def pop_options(argv, **options):
    """Take a script's own key=value options out of its command line; `options` are their defaults.

    pop_options(["a.yaml", "show=3"], show=0) -> ({"show": 3}, ["a.yaml"])

    Raises UserError for a key that is not in the config and is spelled like an option.
    """
    schema = schema_of(options)
    config_keys = read_defaults()[0]
    rest = []
    for arg in argv:
        key, equals, text = arg.partition("=")
        if equals and key in schema:
            value = parse_value(text, key, schema[key])
            options[key] = checked_value(key, value, schema[key], "cli")
            continue
        near = nearest(key, list(options))
        is_option = equals and re.fullmatch(r"\w+", key) and not os.path.exists(arg)
        if is_option and near and key not in config_keys:
            raise UserError(f"{key}: unknown option; the nearest is {near}")
        rest.append(arg)
    return options, rest


def bind_options(key, function, given, options, supplied=()):
    """Bind the options of cfg[f"{key}_options"] to the function that `key` names.

    given     the number of leading parameters that the function receives when it is called
    options   the section of options, {name: value}
    supplied  names of other parameters that the caller supplies, if the function has them

    Returns the function, or a functools.partial of it. Raises UserError if an option is unknown, if
    a required one is missing, or if its type is not that of the default.
    """
    import inspect                                 # not at the top: it takes 10 ms to import

    defaults = {}
    takes_any = False
    for parameter in list(inspect.signature(function).parameters.values())[given:]:
        if parameter.kind == parameter.VAR_KEYWORD:
            takes_any = True
        elif parameter.kind != parameter.VAR_POSITIONAL and parameter.name not in supplied:
            defaults[parameter.name] = parameter.default
    for option, value in options.items():
        if option not in defaults and not takes_any:
            names = ", ".join(defaults) or "no options"
            raise UserError(f"{key}_options.{option}: unknown option; {key} takes {names} here")
        default = defaults.get(option)
        for types, expected in (((bool,), "true or false"), ((int, float), "a number"),
                                ((str,), "a string")):
            if type(default) in types and type(value) not in types:
                raise UserError(f"{key}_options.{option}: must be {expected}; got {show(value)}")
    for option, default in defaults.items():
        if default is inspect.Parameter.empty and option not in options:
            raise UserError(f"{key}_options.{option}: is missing; this {key} needs it")
    return functools.partial(function, **options) if options else function


def check_words(words, options):
    """Raise UserError for a word of a prompt that is meant as an option: temp=0.5, --temperature.

    options  those of pop_options(), with `prompt` among them
    """
    for word in words:
        if re.fullmatch(r"--?[A-Za-z]\S*|[A-Za-z_][\w.]*=\S*", word):
            raise UserError(f"{word}: is not an option; options are {', '.join(options)}, each as "
                            f"key=value; prompt={word} makes it the prompt")


TORCHRUN_VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR",
                      "MASTER_PORT")
NUMBER_VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT",
                    "GROUP_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS",
                    "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")


def check_launch(env=os.environ):
    """Exit with one line if the environment variables of torchrun or SLURM contradict each other.

    An earlier command may have left them.
    """
    for name in NUMBER_VARIABLES:
        if not re.fullmatch("[0-9]+", env.get(name, "0")):
            sys.exit(f"error: {name}: must be a number; got {env[name]!r} (from the environment); "
                     f"unset {name}")
    if not re.fullmatch("[1-9][0-9]*(,[1-9][0-9]*)*", env.get("OMP_NUM_THREADS", "1")):
        sys.exit(f"error: OMP_NUM_THREADS: must be a number above 0; got {env['OMP_NUM_THREADS']!r}"
                 " (from the environment); unset OMP_NUM_THREADS")
    world_size = int(env.get("WORLD_SIZE", 1))
    missing = [name for name in TORCHRUN_VARIABLES if name not in env]
    if world_size > 1 and missing:
        sys.exit(f"error: WORLD_SIZE: is {world_size} in the environment, but {', '.join(missing)} "
                 f"not set; {unset_hint(env)}")
    for name, limit in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if int(env.get(name, 0)) >= int(env.get(limit, 1)):
            sys.exit(f"error: {name}: is {env[name]} in the environment, and {limit} is "
                     f"{env.get(limit, 'not set')}; {unset_hint(env)}")
    n_tasks = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", 1)))
    if world_size == 1 and n_tasks > 1:
        if "SLURM_STEP_NUM_TASKS" in env or int(env.get("SLURM_PROCID", 0)) > 0:
            sys.exit(f"error: SLURM_PROCID: srun starts this {n_tasks} times, and each would train "
                     "alone; srun --ntasks-per-node=1 torchrun ... starts one run")
        print(f"warning: SLURM_NTASKS: is {n_tasks}, but one process trains; torchrun starts more",
              file=sys.stderr)


def unset_hint(env):
    names = [name for name in (*TORCHRUN_VARIABLES, "TORCHELASTIC_USE_AGENT_STORE") if name in env]
    return f"if torchrun did not start this process: unset {' '.join(names)}"


@contextlib.contextmanager
def exit_at_signals():
    """SIGINT and SIGTERM raise SystemExit in the enclosed code, so that it can clean up.

    Elsewhere they end the process at once (but see train.py).
    """
    def exit_now(number, frame):
        print(f"stopped by signal {number}", file=sys.stderr)
        sys.exit(128 + number)
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, exit_now) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, previous):
            signal.signal(number, handler)


def exit_with_help(doc, argv):
    """Print how to start a script and exit, if it has no arguments or one is --help or -h.

    Every script calls this first, so it also prepares the console: what its encoding lacks is
    printed as \\u2581, and is no error. From here on, Ctrl-C ends the script without a traceback.
    """
    for stream in (sys.stdin, sys.stdout):
        # (a stdin that has been read from cannot be changed)
        with contextlib.suppress(AttributeError, io.UnsupportedOperation):
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if not argv or "--help" in argv or "-h" in argv:
        if is_local_rank0():
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)      # ends quietly in `... | head`
            print(doc.strip())
        sys.exit(0)


def load_or_exit(argv, builtin_names=False, **options):
    """load(), for the first lines of a script: a UserError is one line, and exit status 2.

    builtin_names  also check_builtin_names()
    options        of the script, see pop_options()
    """
    try:
        _, argv = pop_options(argv, **options)
        cfg, source, explicit = load(argv)
        if builtin_names:
            check_builtin_names(cfg, source)
    except UserError as error:
        die(error)
    return cfg, source, explicit


def run(main, *args):
    """Call main(*args). A UserError is one line, and exit status 1."""
    try:
        main(*args)
    except UserError as error:
        die(error, 1)


def die(error, status=2):
    """Print an error in one line, on local rank 0 only, and exit."""
    write_error_file(error, f"error: {error}")
    if is_local_rank0():
        print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(status)


def write_error_file(error, text):
    """Hand an error to torchrun, if it has started this process: its report then ends with `text`.

    The report begins with torchrun's own traceback, which no option and no exit status but 0 turns
    off: it raises a ChildFailedError (torch/distributed/launcher/api.py, launch_agent).
    The format is that of torch.distributed.elastic.multiprocessing.errors.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and os.path.isdir(os.path.dirname(path)):
        details = {"py_callstack": text, "timestamp": str(int(time.time()))}
        message = {"message": str(error), "extraInfo": details}
        Path(path).write_text(json.dumps({"message": message}))


def is_local_rank0():
    """Is this the first process on its machine? torchrun sets these variables."""
    is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
    return is_alone or os.environ.get("LOCAL_RANK", "0") == "0"
