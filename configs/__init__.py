"""One plain dict says everything about a run.

    cfg, source, explicit = configs.load(["configs/ft.yaml", "lr=1e-4"])
    python -m configs configs/ft.yaml lr=1e-4         every value, and where it came from

Layers, each a plain dict laid over the one before:

    default    configs/defaults.yaml: the schema, and the only place that states a default
    imported   the pretrained model's config.json, in our words (configs/families.yaml)
    files      the yaml files named on the command line, left to right
    cli        key.subkey=value on the command line, left to right
    derived    fills what is still null and follows from the rest; never saved

What files and command line set is kept apart as `explicit`: it is what a run saves as its config.yaml. This package
imports neither torch nor numpy, so that a wrong key is found in a tenth of a second.
"""
import copy, difflib, functools, json, os, re, sys
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent


class UserError(ValueError):
    """A mistake of the user: shown as one line, without a traceback."""


# ---------------------------------------------------------------------------------------------------------------------
# text -> values: one reading of plain scalars, the same in files and on the command line

INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")                            # 010 is a string: nobody agrees on what it means
FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.?inf|\.?nan")
TYPES = {str: "a string", bool: "true or false", int: "an int", float: "a float", list: "a list", dict: "a section"}
FLOAT_ANCHORED = re.compile(f"^(?:{FLOAT.pattern}|{INT.pattern})$")
WORDS = {"true": True, "True": True, "false": False, "False": False,
         "null": None, "Null": None, "None": None, "~": None}


def scalar(text):
    """A plain word's meaning: true/false, null/None/~, int, a float (1e-4 too), else a string (no, on, 010, 1:30)."""
    if text in WORDS:
        return WORDS[text]
    if INT.fullmatch(text):
        return int(text)
    if FLOAT.fullmatch(text):
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))
    return text


def parse(text, name):
    """YAML text -> values. Only the syntax is PyYAML's: plain words go through scalar(), no key stands twice."""
    def value(node):
        if isinstance(node, yaml.ScalarNode):
            if node.style:                                           # quoted, or a block of text
                return node.value
            return scalar(node.value) if node.value else None        # `key:` with nothing behind it is null
        if isinstance(node, yaml.SequenceNode):
            return [value(item) for item in node.value]
        out = {}
        for key, item in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value in out:
                said = repr(key.value) if isinstance(key, yaml.ScalarNode) else "a list or a section"
                raise ValueError(f"{name}, line {key.start_mark.line + 1}: {said} stands twice or is no key")
            out[key.value] = value(item)
        return out
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(e, "problem", None) or " ".join(str(e).split())
        raise ValueError(f"{name}{line}: not valid YAML: {problem}") from None
    return None if node is None else value(node)


def read_file(path):
    """A config file -> dict. An empty file is an empty dict."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or "not UTF-8 text"
        raise ValueError(f"{path}: cannot read this config file ({reason})") from None
    d = parse(text, str(path))
    if not isinstance(d, dict | None):
        raise ValueError(f"{path}: expected sections of key: value, got {show(d)}")
    return d or {}


def dump(d):
    """dict -> YAML text that load() reads back as the same values and types (plain YAML readers do, too)."""
    dumper = type("Dumper", (yaml.SafeDumper,), {"ignore_aliases": lambda self, data: True})
    dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT_ANCHORED, None)   # quotes the string "1e-4" …
    dumper.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^None$"), None)  # … and the string "None"
    return yaml.dump(d, Dumper=dumper, sort_keys=False, width=120)


def show(value):
    if isinstance(value, dict):
        return f"a section ({', '.join(value) or 'empty'})"
    return "null" if value is None else repr(value)


# ---------------------------------------------------------------------------------------------------------------------
# dicts with dotted keys

def flat(d, prefix=""):
    """{"a": {"b": 1}} -> {"a.b": 1}. An empty section is a leaf: it has nothing below it to stand for it."""
    out = {}
    for key, value in d.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return out


def merged(layers):
    """[(name, dict)] -> (one dict, {dotted key: name of the layer it came from})"""
    out, source = {}, {}
    for name, d in layers:
        update(out, d, name, source)
    return out, source


def get(d, key, default=None):
    """get({"a": {"b": 1}}, "a.b") -> 1; `default` where a part of the way is missing."""
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


def update(base, new, layer, source, prefix=""):
    """Lay `new` over `base`, in place: sections recursively, all else whole, null too. Notes the layer in `source`."""
    for key, value in new.items():
        dotted, old = f"{prefix}{key}", base.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            update(old, value, layer, source, f"{dotted}.")
            continue
        refers = isinstance(value, str) and "${" in value
        if old is not None and value is not None and not refers and isinstance(value, dict) != isinstance(old, dict):
            want = "a section" if isinstance(old, dict) else "a value, not a section"
            raise ValueError(f"{dotted}: expected {want}, got {show(value)} (from {layer})")
        base[key] = copy.deepcopy(value)
        for gone in [k for k in source if k == dotted or k.startswith(f"{dotted}.")]:
            del source[gone]
        source.update({k: layer for k in flat({key: value}, prefix)})
    if base:                                                         # an empty section, once filled, is no leaf
        source.pop(prefix[:-1], None)


# ---------------------------------------------------------------------------------------------------------------------
# the schema is the defaults

def schema_of(defaults, key):
    """(is it a key, its default). Below an empty section and below a null any key goes; sources share one template."""
    d, template = defaults, get(defaults, "data.source")
    parts = key.split(".")
    if template and len(parts) > 2 and parts[:2] in (["data", "train"], ["data", "validation"]):
        d, parts = template, parts[3:]
    for i, part in enumerate(parts):
        if d is None or d == {} and i:
            return True, None
        if not isinstance(d, dict) or part not in d:
            return False, None
        d = d[part]
    return True, None if isinstance(d, str) and "${" in d else d     # a default that refers has no type of its own


def nearest(key, defaults):
    """The known key that looks most like `key`: alike as a whole, or in its last part (optimizer.lr -> lr)."""
    def alike(known):
        ratio = lambda a, b: difflib.SequenceMatcher(None, a, b).ratio()
        return ratio(known, key) + ratio(known.split(".")[-1], key.split(".")[-1])
    names = [k.replace("data.source.", "data.train.NAME.") for k in flat(defaults)]
    return max(names, key=alike, default="")


def count_or_fraction(key, own):
    """Does the key keep both: 1 is one, 1.0 is all? `own`: it is of this project's schema, not of another."""
    return key.endswith(("_every", "validation_split")) or own and key in ("warmup", "decay", "epochs")


def typed(key, value, defaults, layer):
    """`value` as its default's type. int -> float is the only conversion; a count or a fraction keeps what it is."""
    default = schema_of(defaults, key)[1]
    if default is None or isinstance(value, str) and "${" in value:  # ${...} is checked once it is resolved
        return value
    want = (type(default),)
    if type(default) in (int, float) and count_or_fraction(key, own="micro_tokens" in defaults):
        want = (int, float)
    if type(value) is int and want == (float,):
        return float(value)
    if type(value) not in want:
        names = " or ".join(TYPES[t] for t in want)
        raise ValueError(f"{key}: expected {names}, got {show(value)} (from {layer})")
    return value


def checked(d, defaults, layer, prefix=""):
    """A layer, held against the schema: every key known, every value of its default's type. Returns a new dict."""
    out = {}
    for key, value in d.items():
        dotted = f"{prefix}{key}"
        known, default = schema_of(defaults, dotted)
        if not known:
            full = next(iter(flat({dotted: value})))                 # an unknown section is named by what stands in it
            raise ValueError(f"{full}: unknown key (from {layer}); the nearest is {nearest(full, defaults)}")
        named = prefix in ("data.train.", "data.validation.")
        if "." in key and (named or not schema_of(defaults, f"{prefix}*")[0]):
            section, _, rest = key.partition(".")                    # it would lie beside the section, unread
            raise ValueError(f"{dotted}: no dots in a file's keys (from {layer}); write {section}: {{{rest}: ...}}")
        if isinstance(value, dict):
            if default is not None and not isinstance(default, dict):
                raise ValueError(f"{dotted}: expected a value, not a section, got {show(value)} (from {layer})")
            out[key] = checked(value, defaults, layer, f"{dotted}.")
        else:
            out[key] = typed(dotted, value, defaults, layer)
    return out


def from_cli(text, defaults):
    """`key=value` -> a nested dict. Where the default is a string the value is taken as it stands."""
    key, value = text.split("=", 1)
    default = schema_of(defaults, key)[1]
    if isinstance(default, str):
        return nested(key, value)
    value = parse(value, f"{key} (from cli)") if value[:1] in ("[", "{") else scalar(value)
    return nested(key, value)


# ---------------------------------------------------------------------------------------------------------------------
# ${a.b} and ${oc.env:NAME,default}

def first_reference(text, key):
    """"a${b}c" -> ("a", "b", "c"): what stands before, inside and behind the first ${...}; they may nest."""
    start, depth = text.index("${"), 0
    for end in range(start, len(text)):
        depth += text.startswith("${", end) - (text[end] == "}" and depth > 0)
        if not depth:
            return text[:start], text[start + 2:end], text[end + 1:]
    raise ValueError(f"{key}: {text!r} lacks the brace that ends its ${{")


def resolve(cfg, defaults, source, env):
    """A copy of cfg with every ${...} replaced, once. A value that is one ${...} and nothing else keeps its type."""
    def look_up(name, key, trail):
        layer = f"(from {source.get(key, 'cfg')})"
        if name.startswith("oc.env:"):
            name, comma, fallback = name.removeprefix("oc.env:").partition(",")
            if name not in env and not comma:
                raise ValueError(f"{key}: no variable {name} is set {layer}; ${{oc.env:{name},VALUE}} has a default")
            text = env.get(name, fallback)
            return text if isinstance(schema_of(defaults, key)[1], str) else scalar(text)
        value = get(cfg, name, missing)
        if value is missing:
            raise ValueError(f"{key}: ${{{name}}} is no key {layer}; the nearest is {nearest(name, cfg)}")
        return walk(value, name, trail)

    def expand(text, key, trail):
        if "${" not in text:
            return text
        before, name, after = first_reference(text, key)
        value = look_up(str(expand(name, key, trail)).strip(), key, trail)
        if not before and not after:
            return value
        return before + str(value) + str(expand(after, key, trail))

    def walk(value, key, trail):
        if isinstance(value, dict):
            return {k: walk(v, f"{key}.{k}" if key else k, trail) for k, v in value.items()}
        if isinstance(value, list):
            return [walk(v, key, trail) for v in value]
        if not isinstance(value, str) or "${" not in value:
            return value
        if key in trail:
            way = " -> ".join([*trail, key])
            raise ValueError(f"{key}: ${{...}} goes round in a circle: {way} (from {source.get(key, 'cfg')})")
        return expand(value, key, [*trail, key])

    missing = object()
    return walk(cfg, "", [])


# ---------------------------------------------------------------------------------------------------------------------
# the imported layer: a pretrained model's config.json in our words

@functools.cache
def families():
    """families.yaml -> {name: {model_type, architecture, keys, fixed, weights, ...}}; the file says what each means."""
    table = read_file(HERE / "families.yaml")
    for name, own in table.items():
        base = table[own["like"]] if "like" in own else {}
        table[name] = {key: value for key, value in base.items() if key not in ("new", "refuse")} | own
        for key in ("keys", "fixed", "weights"):
            both = base.get(key, {}) | own.get(key, {})
            table[name][key] = {ours: theirs for ours, theirs in both.items() if theirs is not None}
    return table


def imported_model(cfg):
    """{"model": ...} as model.init_from's config.json says it; without one, what is so in every model of the family."""
    folder, family = cfg["model"]["init_from"], families().get(cfg["model"]["family"], {})
    if not folder:
        return {"model": family.get("new", {}) | family.get("fixed", {})}
    return {"model": read_model(pretrained(folder))}


@functools.cache
def pretrained(name):
    """A folder, or a hub id (owner/name) -> the folder: the id's files, by huggingface_hub's own cache and settings.

    Raises ValueError where it is no folder and the hub has not given it.
    """
    if Path(name).parent.is_dir() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return name
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"model.init_from: {name} is no folder; to have it from the hub, pip install huggingface_hub")
    try:                                                             # no pickles, nothing that would be run
        wanted = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
        return snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*"])
    except Exception as e:
        reason = next((line for line in str(e).splitlines() if line), type(e).__name__)
        raise ValueError(f"model.init_from: {name} is no folder, and the hub has not given it: {reason}") from None


def read_model(folder):
    """A pretrained folder -> its config.json in our words. Raises ValueError."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        hint = f"{folder}/hf does" if (Path(folder) / "hf").is_dir() else "give a model folder in Hugging Face format"
        raise ValueError(f"model.init_from: {folder} holds no config.json; {hint}")
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ValueError(f"{path}: not valid JSON: {getattr(e, 'strerror', None) or e}") from None
    if not isinstance(theirs, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(theirs).__name__}")
    return translate(theirs, path)


def translate(theirs, path):
    """A config.json's dict -> our model section. `path` names the file in errors."""
    table, missing = families(), object()
    known = {family["model_type"]: name for name, family in table.items()}
    name = known.get(str(theirs.get("model_type")))
    if name is None:
        raise ValueError(f"{path}: model_type {theirs.get('model_type')!r} is none of {', '.join(known)}; "
                         "a family is a few lines in configs/families.yaml")
    family, ours = table[name], {"family": name}
    for key, ways in family["keys"].items():                         # places to look, then the value where all lack it
        ways = ways if isinstance(ways, list) else [ways]
        found = [v for way in ways if isinstance(way, str) and (v := get(theirs, way, missing)) is not missing]
        if not found and isinstance(ways[-1], str):
            raise ValueError(f"{path}: lacks {ways[0]}, which a {name} model needs")
        ours[key] = found[0] if found else ways[-1]
    if isinstance(scaling := ours.get("rope_scaling"), dict):        # newer files say all of rope in this section
        scaling = {k: v for k, v in scaling.items() if k not in ("rope_theta", "partial_rotary_factor")}
        plain = scaling.get("rope_type", scaling.get("type", "default")) == "default"
        ours["rope_scaling"] = None if plain else scaling
    elif scaling:
        raise ValueError(f"{path}: rope_scaling is {scaling!r}, and no section")
    for key, value in family.get("refuse", {}).items():
        if theirs.get(key, value) != value:
            raise ValueError(f"{path}: {key} = {theirs[key]!r} is not supported, only {value!r}")
    return family["fixed"] | ours


# ---------------------------------------------------------------------------------------------------------------------
# what follows from the rest, and what must hold

CHOICES = {"dtype": ("auto", "bfloat16", "float32"), "device": ("auto", "cpu", "cuda"),
           "data.train_on": ("all", "last", "everything"), "data.on_error": ("error", "skip")}
AT_LEAST = {                                                         # {key: least value}
    "lr": 0, "min_lr": 0, "eps": 0, "momentum": 0, "weight_decay": 0, "grad_clip": 0, "bad_steps": 0,
    "batch_size": 1, "micro_tokens": 1, "max_steps": 0, "max_seconds": 0, "epochs": 0, "warmup": 0, "decay": 0,
    "eval_every": 0,
    "save_every": 0, "log_every": 0, "patience": 0, "profile": 0, "eval_prompts": 0, "eval_tokens": 1, "samples": 0,
    "seed": 0, "data.seq_len": 1, "data.validation_split": 0, "data.processes": 0, "checkpoint.keep": 1,
    "model.n_layers": 1, "model.n_heads": 1, "model.n_kv_heads": 1, "model.d_model": 1, "model.d_ff": 1,
    "model.head_dim": 2, "model.vocab_size": 1, "model.max_len": 1, "model.norm_eps": 0, "model.sliding_window": 1,
    "model.pad_vocab_size_multiple": 1, "model.embd_pdrop": 0, "model.attn_pdrop": 0, "model.resid_pdrop": 0,
    "model.partial_rotary_factor": 0, "model.init_std": 0, "model.rope_theta": 1, "model.attention_multiplier": 0,
    "shard.mesh.replicate": 1, "shard.mesh.shard": 1, "shard.lora.r": 0, "shard.lora.alpha": 0}
INTS = ("max_steps", "profile", "data.seq_len", "model.n_kv_heads", "model.d_ff", "model.head_dim",
        "model.vocab_size", "model.sliding_window", "shard.mesh.replicate", "shard.mesh.shard")  # or null
SHAPES = ("auto", "chat", "text", "tokens")
OWN = ("init_from", "family", "init_std", "init_by_depth", "loss", "loss_options", "embed", "embed_options",
       "embd_pdrop", "attn_pdrop", "resid_pdrop", "pad_vocab_size_multiple")    # no config.json need say them
LONGEST = 1024                                                       # data.seq_len where nobody says, or model.max_len


def derive(cfg, source):
    """Fill what is null and follows from the rest, in place."""
    def fill(section, key, value, prefix=""):
        if section[key] is None:
            section[key], source[f"{prefix}{key}"] = value, "derived"
    m, lora = cfg["model"], cfg["shard"]["lora"]
    fill(cfg, "min_lr", cfg["lr"] / 10)
    fill(cfg["data"], "seq_len", min(m["max_len"], LONGEST), "data.")
    fill(m, "n_kv_heads", m["n_heads"], "model.")
    fill(m, "head_dim", m["d_model"] // max(m["n_heads"], 1), "model.")  # no heads: check() says so
    gated = (m["d_model"] * 8 // 3 + 63) // 64 * 64                  # 3 matrices, not 2, of about the same size in all
    fill(m, "d_ff", gated if m["glu"] else 4 * m["d_model"], "model.")
    said = families().get(m["family"], {}).get("keys", {})           # null means nothing in their config.json
    if "rope_layers" in said:
        fill(m, "rope_layers", [1] * m["n_layers"], "model.")
    if "attention_multiplier" in said:
        fill(m, "attention_multiplier", max(m["head_dim"], 1) ** -0.5, "model.")
    fill(lora, "alpha", 2.0 * lora["r"], "shard.lora.")


def check(cfg, source, defaults):
    """Ranges and choices of this project's keys. Changes nothing; raises ValueError."""
    def wrong(key, want):
        raise ValueError(f"{key}: expected {want}, got {show(get(cfg, key))} (from {source.get(key, 'cfg')})")
    for key, choices in CHOICES.items():
        if get(cfg, key) not in choices:
            wrong(key, f"one of {', '.join(choices)}")
    for key, least in AT_LEAST.items():
        value, types = get(cfg, key), (int,) if key in INTS else (int, float)
        if value is not None and not (type(value) in types and least <= value < float("inf")):
            wrong(key, f"{'an int' if key in INTS else 'a number'}, at least {least}")
    for key in source:
        value = get(cfg, key)
        if count_or_fraction(key, own=True) and key != "epochs" and type(value) is float and value > 1:
            wrong(key, "a count (an int) or a fraction (at most 1.0)")
    if len(cfg["betas"]) != 2 or not all(type(b) in (int, float) and 0 <= b < 1 for b in cfg["betas"]):
        wrong("betas", "two numbers, at least 0 and below 1")
    if cfg["momentum"] >= 1:
        wrong("momentum", "a number, at least 0 and below 1")
    for key in ("compile", "recompute"):
        if not isinstance(cfg["shard"][key], (bool, type(None))):
            wrong(f"shard.{key}", "true, false or null")
    if cfg["patience"] and not cfg["best"]:
        wrong("patience", "0 where `best` names no number")
    for group in cfg["groups"]:
        known = {"match": (str,), "lr": (int, float), "weight_decay": (int, float)}
        try:
            good = all(type(value) in known[key] and (key == "match" or 0 <= value < float("inf"))
                       for key, value in group.items()) and re.compile(group["match"])
        except (AttributeError, KeyError, re.error):
            good = False
        if not good:
            wrong("groups", "a list of {match: a regular expression, lr: a factor, weight_decay: a number}, "
                            "none below 0")
    ids, ends = cfg["data"]["ignore_token_ids"], cfg["data"]["ignore_token_id_range"]
    if not all(type(i) is int for i in ids):
        wrong("data.ignore_token_ids", "a list of ints")
    if ends is not None and not (isinstance(ends, list) and [*map(type, ends)] == [int, int] and ends[0] <= ends[1]):
        wrong("data.ignore_token_id_range", "null or [first, last]")
    if cfg["resume"] == "":
        wrong("resume", "auto, never or a checkpoint's path")
    for kind in ("train", "validation"):
        for name, s in cfg["data"][kind].items():
            if not s["path"]:
                wrong(f"data.{kind}.{name}.path", "a file, a folder or a glob")
            if s["shape"] not in SHAPES:
                wrong(f"data.{kind}.{name}.shape", f"one of {', '.join(SHAPES)}")
            if s["weight"] <= 0:
                wrong(f"data.{kind}.{name}.weight", "a number above 0")
    m, table = cfg["model"], families()
    if m["n_heads"] % m["n_kv_heads"]:
        wrong("model.n_kv_heads", f"a divisor of model.n_heads ({m['n_heads']})")
    if m["positions"] == "rope" and int(m["head_dim"] * m["partial_rotary_factor"]) % 2:
        wrong("model.head_dim", "an even number (times model.partial_rotary_factor): rope turns pairs")
    for key in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
        if m[key] >= 1:
            wrong(f"model.{key}", "a number below 1")
    if m["rope_layers"] is not None and (type(m["rope_layers"]) is not list or len(m["rope_layers"]) != m["n_layers"]):
        wrong("model.rope_layers", f"a list of {m['n_layers']} (model.n_layers), 1: with rope, 0: without")
    if m["family"] not in table:
        wrong("model.family", f"one of {', '.join(table)}")
    family, said = table[m["family"]], {}                            # what its config.json can't say, it can't be
    alone = {"n_kv_heads": m["n_heads"], "head_dim": m["d_model"] // m["n_heads"]} | family["fixed"]
    for key, value in m.items():
        want = alone.get(key, defaults["model"][key])
        if key not in OWN and key not in family["keys"] and value != want:
            wrong(f"model.{key}", f"{show(want)}, as a {m['family']} model has it")
    for key, ways in family["keys"].items():
        name = ways[0] if isinstance(ways, list) else ways
        if said.setdefault(name, m[key]) != m[key] and key not in OWN:
            wrong(f"model.{key}", f"{show(said[name])}: a {m['family']} model has one {name} for both")


# ---------------------------------------------------------------------------------------------------------------------
# load

def load(argv, imported=None, defaults=None, env=os.environ):
    """argv, e.g. ["configs/ft.yaml", "lr=1e-4"] -> (cfg, source, explicit).

    cfg       the merged plain dict
    source    {dotted key: "default" | "imported" | file name | "cli" | "derived"}
    explicit  the sparse dict of what files and command line set
    imported  a dict, or a callable that is given a resolved copy of what is merged so far and returns one;
              left out, the pretrained model's config.json is found through model.init_from
    defaults  another schema; this project's own checks and derived values then don't apply
    Raises ValueError: one line with the key, what was expected, what came, and from which layer.
    """
    own = defaults is None
    defaults = read_file(HERE / "defaults.yaml") if own else copy.deepcopy(defaults)
    if strange := [a for a in argv if a.startswith("-")]:
        raise ValueError(f"{strange[0]}: options have no dashes: {strange[0].lstrip('-').partition('=')[0]}=...")
    is_pair = lambda a: re.match(r"[A-Za-z_][\w.-]*=", a)
    layers = [(a, checked(read_file(a), defaults, a)) for a in argv if not is_pair(a)]
    layers += [("cli", checked(from_cli(a, defaults), defaults, "cli")) for a in argv if is_pair(a)]

    if imported is None and own:
        imported = imported_model
    if callable(imported):
        so_far, source = merged([("default", defaults), *layers])
        if own:
            fill_sources(so_far, source)
        imported = imported(resolve(so_far, defaults, source, env))
    explicit, _ = merged(layers)
    imported = checked(imported or {}, defaults, "imported")
    cfg, source = merged([("default", defaults), ("imported", imported), *layers])
    if own:
        fill_sources(cfg, source)
    raw, cfg = flat(cfg), resolve(cfg, defaults, source, env)
    for key in [k for k, v in raw.items() if isinstance(v, str) and "${" in v]:
        value = typed(key, get(cfg, key), defaults, source[key])
        update(cfg, nested(key, value), source[key], source)
    if own:
        derive(cfg, source)
        check(cfg, source, defaults)
    return cfg, source, explicit


def fill_sources(cfg, source):
    """Give every named source the keys of data.source that it doesn't set itself, in place."""
    for kind in ("train", "validation"):
        for name, given in cfg["data"][kind].items():
            for key, value in cfg["data"]["source"].items():
                if key not in given:
                    given[key] = copy.deepcopy(value)
                    source[f"data.{kind}.{name}.{key}"] = source.get(f"data.source.{key}", "default")
            source.pop(f"data.{kind}.{name}", None)                  # no longer empty


def take(argv, **wanted):
    """A script's own key=value arguments, apart: take(["a.yaml", "show=3"], show=0) -> ({"show": 3}, ["a.yaml"])."""
    out, rest = dict(wanted), []
    for arg in argv:
        key, equals, text = arg.partition("=")
        if not equals or key not in wanted:
            rest.append(arg)
        else:
            out[key] = typed(key, scalar(text), wanted, "cli")
    return out, rest


def load_or_exit(argv):
    """load(), for a script's first lines: a mistake is one line on standard error, once, and exit status 2."""
    try:
        return load(argv)
    except ValueError as e:
        stop(e)


def stop(error, status=2):
    """Say what is wrong, in one line, from the node's first rank only; exit."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(status)


def run(main, *args):
    """Call main(*args). A user's mistake is one line; other errors keep their traceback."""
    try:
        main(*args)
    except ValueError as e:
        if not ours(e):
            raise
        stop(e, 1)


def ours(error):
    """Was it raised by this project's own lines, as a ValueError: a user's mistake, and one line?"""
    frame = error.__traceback__
    while frame.tb_next:
        frame = frame.tb_next
    here = Path(frame.tb_frame.f_code.co_filename).resolve().parent in (HERE, HERE.parent)
    return isinstance(error, ValueError) and here
