"""The imported layer of a config: a pretrained model's config.json, translated to our keys.

configs/families.yaml describes the families of models. configs.load() uses this file.
"""
import collections
import difflib
import functools
import json
import math
import os
import re
import struct
from pathlib import Path

import configs

# Model keys that a family's config.json need not have: they don't change what a saved model
# computes, or save_pretrained() stores their effect in the weights.
NOT_IN_HF_CONFIG = ("init_from", "family", "init_std", "init_by_depth", "loss", "loss_options",
                    "embed", "embed_options", "embd_pdrop", "attn_pdrop", "resid_pdrop",
                    "pad_vocab_size_multiple")
# scaled is folded into the table where a family has no key for it, neftune only adds noise in
# training
EXPORTED_EMBEDDINGS = ("plain", "scaled", "neftune")

# The kinds of rope_scaling that model.py computes: the keys that each needs, those that it may
# have, and what they must be, if not numbers above 0
ROPE_SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
    "proportional": (),
}
ROPE_OPTIONS = {
    "yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "attention_factor"),
    "proportional": ("partial_rotary_factor", "factor"),
}
ROPE_CONSTRAINTS = {
    "short_factor": "list of float > 0",
    "long_factor": "list of float > 0",
    "truncate": "bool",
    "partial_rotary_factor": "float >= 0 and <= 1",
}

# Keys of config.json with which transformers computes something else, unless they are missing or
# have one of these values
INERT_KEYS = {"is_causal": [True], "per_layer_config": [None], "text_config": [None]}

# Files of a pretrained model that its descendants must keep
LICENSES = ("LICENSE*", "NOTICE*", "USE_POLICY*")


@functools.cache
def families():
    """configs/families.yaml -> {name: {model_type, architecture, keys, fixed, weights, ...}}.

    The top of that file explains the entries. `like` names a family above, so its base is already
    complete. A null removes an inherited item.
    """
    table = configs.read_file(configs.HERE / "families.yaml")
    for name, family in table.items():
        base = table[family["like"]] if "like" in family else {}
        inherited = {key: base[key] for key in base if key not in ("new", "only")}
        table[name] = inherited | family
        for key in ("keys", "fixed", "weights"):
            items = base.get(key, {}) | family.get(key, {})
            table[name][key] = {ours: items[ours] for ours in items if items[ours] is not None}
        if "rename" in family:
            for key in ("weights", "fused"):
                table[name][key] = rename(table[name].get(key, {}), *family["rename"])
        table[name]["only"] = {}
        for key, values in family.get("only", {}).items():
            table[name]["only"][key] = values if isinstance(values, list) else [values]
    return table


def rename(items, old, new):
    """`weights` or `fused` of a family, with names in files that begin with new instead of old."""
    def replace(name):
        return new + name.removeprefix(old) if str(name).startswith(old) else name
    return {replace(key): replace(value) for key, value in items.items()}


def import_model(cfg):
    """The imported layer: from model.init_from, or what all new models of the family share.

    With shard.lora.init_from also what that adapter says.
    """
    model_cfg = cfg["model"]
    adapter = cfg["shard"]["lora"]["init_from"]
    imported = {"shard": {"lora": read_adapter(adapter)}} if adapter else {}
    if model_cfg["init_from"]:
        return imported | {"model": read_model(resolve_pretrained(model_cfg["init_from"]))}
    family = families().get(model_cfg["family"], {})
    return imported | {"model": family.get("new", {}) | family.get("fixed", {})}


# --------------------------------------------------------------------------------------------------
# PEFT's adapters

# Keys of adapter_config.json with which PEFT computes something else than shard.LoRALinear, unless
# they are missing or have one of these values. Other init_lora_weights change the base.
ADAPTER_KEYS = {
    "peft_type": ["LORA"], "bias": ["none", None], "lora_bias": [False, None],
    "use_dora": [False, None], "use_qalora": [False, None], "layer_replication": [None],
    "alora_invocation_tokens": [None], "trainable_token_indices": [None],
    "init_lora_weights": [True, False, "gaussian", "orthogonal"],
}


def read_adapter(folder):
    """The keys of shard.lora that a PEFT adapter decides, as a dict.

    targets and modules_to_save are those of its tensors: adapter_config.json may have a pattern.
    """
    folder = Path(folder)
    config_path = folder / "adapter_config.json"
    weights_path = folder / "adapter_model.safetensors"
    for path in (config_path, weights_path):
        if not path.is_file():
            hint = "name the folder of an adapter that PEFT or a run has saved"
            if (folder / "adapter" / path.name).is_file():
                hint = f"shard.lora.init_from={folder / 'adapter'}"
            raise configs.UserError(f"shard.lora.init_from: {folder} has no {path.name}; {hint}")
    adapter = read_json(config_path)
    for key, values in ADAPTER_KEYS.items():
        if adapter.get(key, values[0]) not in values:
            raise unsupported(config_path, key, values[0], adapter)
    targets = set()
    modules_to_save = set()
    for tensor in tensor_names(weights_path):
        module = tensor.rpartition(".")[0]               # ends in q_proj.lora_A, or embed_tokens
        if module.endswith((".lora_A", ".lora_B")):
            targets.add(module.split(".")[-2])
        else:
            modules_to_save.add(module.split(".")[-1])
    return {"r": adapter.get("r", 8), "alpha": adapter.get("lora_alpha", 8),
            "rslora": bool(adapter.get("use_rslora")), "dropout": adapter.get("lora_dropout", 0.0),
            "targets": sorted(targets), "modules_to_save": sorted(modules_to_save)}


def tensor_names(path):
    """The names of the tensors in a safetensors file, read without torch.

    Raises UserError for a damaged file.
    """
    try:
        with open(path, "rb") as file:
            [size] = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(size, path.stat().st_size)))
        return [name for name in header if name != "__metadata__"]
    except (ValueError, TypeError, struct.error):
        raise configs.UserError(f"{path}: is damaged or incomplete; copy it again") from None


@functools.cache
def resolve_pretrained(name):
    """A local path as it is, or the folder of a hub id (owner/name), downloaded if necessary.

    Raises configs.UserError if huggingface_hub is not installed or cannot download it.
    """
    is_hub_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)
    # if the parent folder exists, it is a local path, perhaps mistyped: don't ask the hub
    if Path(name).parent.is_dir() or not is_hub_id:
        return name
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise configs.UserError(f"model.init_from: no folder at {Path(name).absolute()}; to "
                                f"download {name} from the hub, pip install huggingface_hub"
                                ) from None
    # No pickles, nothing that would be executed, and no subfolders.
    patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "README.md",
                *LICENSES]
    # (consolidated.safetensors: the same weights under Mistral's own names)
    ignored = ["*/*", "consolidated*"]
    try:
        return snapshot_download(name, allow_patterns=patterns, ignore_patterns=ignored)
    except Exception as error:
        reason = (str(error) or type(error).__name__).strip().partition("\n")[0]
        raise configs.UserError(f"model.init_from: no folder at {Path(name).absolute()}, and "
                                f"downloading {name} from the hub failed: {reason}") from None


def resolve_model_dir(path):
    """The folder with config.json: a model's folder, that of a run (its hf/), or of a hub id.

    Raises configs.UserError if there is none.
    """
    path = resolve_pretrained(str(path))
    for folder in (Path(path), Path(path) / "hf"):
        if (folder / "config.json").is_file():
            return folder
    raise configs.UserError(f"{path}: {what_is_there(path)}")


def what_is_there(name):
    """Why a path has no model in Hugging Face format, and what helps."""
    path = Path(name)
    if "://" in str(name):
        parts = str(name).partition("://")[2].split("/")
        first = 1 if "." in parts[0] else 0              # after the host, if there is one
        owner_and_name = "/".join(parts[first:first + 2])
        return f"is a URL; a model on the hub is named by owner/name: {owner_and_name}"
    if not path.exists():
        names = os.listdir(path.parent) if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, 1)
        hint = f"; did you mean {path.with_name(near[0])}?" if near else ""
        return (f"does not exist (the current folder is {Path.cwd()}); name a model's folder, a "
                f"run's, or a model on the hub as owner/name{hint}")
    if path.is_file():
        return "is a file; name the folder of a model in Hugging Face format (config.json)"
    if (path / "state.json").is_file():
        return (f"is a checkpoint; python checkpoint.py export {path} DIR makes a model of it, "
                f"resume={path} continues its run")
    if (path / "hf" / "config.json").is_file():
        return f"is the folder of a run; its model is {path / 'hf'}"
    if (path / "checkpoints").is_dir():
        return (f"is the folder of a run without an export; python checkpoint.py export {path} DIR "
                "makes a model of it")
    if (path / "adapter_config.json").is_file():
        merged = path.parent / "hf"
        if (merged / "config.json").is_file():
            return f"is an adapter, not a whole model; {merged} has it merged into its base"
        return ("is an adapter, not a whole model; model.init_from=BASE shard.lora.init_from="
                f"{path} trains it further, and this merges it into its base: python -c \"from "
                f"peft import AutoPeftModelForCausalLM as M; M.from_pretrained('{path}')"
                ".merge_and_unload().save_pretrained('DIR')\"")
    return "has no config.json; name the folder of a model in Hugging Face format"


def read_model(folder):
    """The config.json of a pretrained folder as a dict like our model section."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise configs.UserError(f"model.init_from: {folder} {what_is_there(folder)}")
    return translate(read_json(path), path)


def read_json(path):
    """A JSON file of a pretrained model, as a dict. Raises UserError if it has no object."""
    text = configs.read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise configs.UserError(f"{path}: cannot read this JSON file: {error}") from None
    if not isinstance(value, dict):
        raise configs.UserError(f"{path}: must be a JSON object; got a {type(value).__name__}")
    return value


# --------------------------------------------------------------------------------------------------
# config.json -> our model section, with the values that transformers 5 uses

def translate(hf_config, path):
    """A config.json's dict -> a dict like our model section. `path` is for error messages."""
    model_type = str(hf_config.get("model_type"))
    names = collections.defaultdict(list)
    for name, family in families().items():
        names[family["model_type"]].append(name)
    if model_type not in names:
        raise configs.UserError(f"{path}: model_type must be one of {', '.join(names)}; got "
                                f"{model_type}; a new family is a few lines in "
                                "configs/families.yaml")
    # of families with one model_type, the first that has this kind of text part
    text_type = configs.get(hf_config, "text_config.model_type")
    name = next((name for name in names[model_type]
                 if text_type in families()[name]["only"].get("model_type", [text_type])),
                names[model_type][0])
    family = families()[name]
    if family.get("native"):                       # our own keys; others describe the export
        known = configs.read_defaults()[0]["model"]
        return {"family": name} | {key: hf_config[key] for key in hf_config if key in known}
    quantization = hf_config.get("quantization_config")
    if quantization and not is_mxfp4(quantization, family):
        raise configs.UserError(f"{path}: quantization_config: quantized weights are not "
                                "supported; use the model that they were made from")
    hf_config = standardize(text_section(hf_config, family, path), family, path)
    for key, values in (INERT_KEYS | family["only"]).items():
        if hf_config.get(key, values[0]) not in values:
            raise unsupported(path, key, values[0], hf_config)
    model_cfg = {"family": name} | family["fixed"]
    for key, places in family["keys"].items():
        model_cfg[key] = read_key(hf_config, key, places, path)
    if "head_dim" not in family["keys"] and model_cfg["positions"] == "rope":
        # transformers rotates with this width, but cuts heads by the other
        head_dim = model_cfg["d_model"] // model_cfg["n_heads"]
        if hf_config.get("head_dim") not in (None, head_dim):
            raise unsupported(path, "head_dim", head_dim, hf_config)
    if "rope_scaling" in model_cfg:
        model_cfg["rope_scaling"] = read_rope_scaling(hf_config, model_cfg, path)
    return model_cfg


def is_mxfp4(quantization, family):
    """Are the experts in MXFP4? families/expert_files.py reads them; they are exported in bf16."""
    is_section = isinstance(quantization, dict)
    return "mxfp4" in family and is_section and quantization.get("quant_method") == "mxfp4"


def text_section(hf_config, family, path):
    """The section of a config.json that describes the text part; all of it in most families."""
    if "section" not in family:
        return hf_config
    name = family["section"]
    section = hf_config.get(name)
    if not isinstance(section, dict):
        raise configs.UserError(f"{path}: {name} must be a section; got {section!r}")
    # the whole model reads one of them, its text part alone the other
    *_, default = family["keys"]["tie_embeddings"]
    tied = hf_config.get("tie_word_embeddings", default)
    if section.get("tie_word_embeddings", default) != tied:
        raise configs.UserError(f"{path}: {name}.tie_word_embeddings must be {configs.show(tied)}, "
                                "as outside of that section")
    return section


def unsupported(path, key, value, hf_config):
    return configs.UserError(f"{path}: {key} must be {configs.show(value)}, or missing; got "
                             f"{configs.show(hf_config[key])}, which is not supported")


def standardize(hf_config, family, path):
    """A copy of a config.json with one name for each setting that has several.

    rope_parameters  also what rope_scaling, its older name, says; always a section
    rope_local_base_freq    also what rope_parameters says about blocks with a window
    sliding_window, use_sliding_window    also what layer_types says
    layer_types      also what sliding_window_pattern or full_attention_interval says
    no_rope_layers   also what no_rope_layer_interval says
    """
    hf_config = dict(hf_config)
    standardize_gemma4(hf_config, family, path)
    if not hf_config.get("rope_scaling") and not hf_config.get("rope_parameters"):
        hf_config["rope_parameters"] = family.get("rope_parameters")
    if "rope_local_theta" in family["keys"] | family["fixed"]:
        hf_config["rope_parameters"] = split_rope_parameters(hf_config, path)
    else:
        hf_config["rope_parameters"] = merge_rope_parameters(hf_config, path)

    types = hf_config.get("layer_types") or []
    if types and isinstance(types, list):
        types = ["full_attention" if kind == "attention" else kind for kind in types]
        hf_config["layer_types"] = types           # attention: its older name
    for name, kind in (("sliding_window_pattern", "sliding_attention"),
                       ("full_attention_interval", "linear_attention")):
        if name not in hf_names(family["keys"].get("layer_types")):
            continue
        interval = hf_config.pop(name, None)
        if types or interval is None:              # layer_types counts more
            continue
        if type(interval) is not int or interval < 1:
            raise configs.UserError(f"{path}: {name} must be a number of blocks above 0; got "
                                    f"{configs.show(interval)}")
        hf_config["layer_types"] = [kind] * (interval - 1) + ["full_attention"]
    if "layer_types" in family["keys"]:
        types = []                                 # they need no translation
    n_types = len(types) if isinstance(types, list) else -1
    one_window = "sliding_window" in family["keys"] and types == ["sliding_attention"] * n_types
    if types and types == ["full_attention"] * n_types:
        hf_config |= {"sliding_window": None, "use_sliding_window": False}
    elif types and not one_window:
        raise configs.UserError(f"{path}: layer_types must be full_attention for all blocks, or "
                                f"missing; got {types}, which is not supported")

    if hf_config.get("no_rope_layers") is None and "rope_layers" in family["keys"]:
        interval = hf_config.get("no_rope_layer_interval", 4)
        n_layers = hf_config.get("num_hidden_layers")
        if type(interval) is int and interval > 0 and type(n_layers) is int:
            hf_config["no_rope_layers"] = [int(i % interval != 0) for i in range(1, n_layers + 1)]
    return hf_config


def standardize_gemma4(hf_config, family, path):
    """Part of standardize() for Gemma 4, in place: global_head_dim and num_global_key_value_heads
    also say what newer files have in per_layer_config. Rope is in rope_parameters alone.
    """
    if "global_head_dim" not in family["keys"]:
        return
    for name in ("rope_scaling", "rope_theta", "rope_local_base_freq"):
        hf_config.pop(name, None)
    if not hf_config.get("attention_k_eq_v"):
        hf_config["num_global_key_value_heads"] = None
    if "per_layer_config" not in hf_config:
        return
    layers = hf_config.pop("per_layer_config") or {}
    *_, layer = [{}, *layers.values()]
    kinds = hf_config.get("layer_types") or []
    full = {str(i): layer for i, kind in enumerate(kinds) if kind == "full_attention"}
    if layers not in ({}, full) or not layer.keys() <= {"head_dim", "num_key_value_heads"}:
        raise configs.UserError(f"{path}: per_layer_config must have head_dim and "
                                "num_key_value_heads, the same for all blocks with "
                                f"full_attention, and no other block; got {layers}")
    hf_config["global_head_dim"] = layer.get("head_dim", hf_config.get("head_dim", 256))
    hf_config["num_global_key_value_heads"] = layer.get("num_key_value_heads")


def merge_rope_parameters(hf_config, path):
    """rope_parameters or rope_scaling, its older name, of a family with one section for all blocks.

    Hunyuan's kind of dynamic scaling is no more than another rope_theta.
    """
    rope = hf_config.get("rope_scaling") or hf_config.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise configs.UserError(f"{path}: rope_parameters (or rope_scaling) must be one section, "
                                f"for all blocks; got {rope!r}")
    head_dim = hf_config.get("head_dim")
    is_hunyuan = hf_config["model_type"] == "hunyuan_v1_dense"
    if is_hunyuan and rope_kind(rope) == "dynamic" and rope.get("alpha") and head_dim:
        theta = rope.get("rope_theta", hf_config.get("rope_theta", 10000.0))
        rope = {"rope_theta": theta * rope["alpha"] ** (head_dim / (head_dim - 2))}
    return rope


def split_rope_parameters(hf_config, path):
    """rope_parameters of blocks with full attention, of a family with another rope_theta elsewhere.

    That of blocks with a window becomes rope_local_base_freq, its older name, in place.
    """
    sections = hf_config.get("rope_parameters") or {}
    scaling = hf_config.get("rope_scaling") or {}
    full = configs.get(sections, "full_attention") or {}
    local = configs.get(sections, "sliding_attention") or {}
    if not all(isinstance(section, dict) for section in (sections, full, local, scaling)):
        raise configs.UserError(f"{path}: rope_parameters must have the sections full_attention "
                                f"and sliding_attention, or none; got {sections!r}")
    if rope_kind(local) != "default" or local.get("partial_rotary_factor", 1.0) != 1.0:
        raise configs.UserError(f"{path}: rope_parameters.sliding_attention must have no other key "
                                f"than rope_theta; got {local!r}")
    if "rope_theta" in local:
        hf_config["rope_local_base_freq"] = local["rope_theta"]
    hf_config.pop("original_max_position_embeddings", None)      # counts only in the section
    return full | scaling


def read_key(hf_config, key, places, path):
    """The value of one of our keys. Raises UserError that names the key of config.json."""
    hf_key = hf_names(places)[-1]
    value = find_in_hf_config(hf_config, places)
    if value is configs.MISSING:
        raise configs.UserError(f"{path}: {hf_key} is missing (it is model.{key} here)")
    constraint = configs.read_defaults()[1][f"model.{key}"]
    value = configs.coerce(value, constraint)
    if not configs.fits(value, constraint):
        raise configs.UserError(f"{path}: {hf_key} must be {constraint}; got "
                                f"{configs.show(value)}")
    power = power_of(places)
    return value if power == 1 or not value else value ** power


def to_hf(value, places):
    """The inverse of read_key(): a value of our key, as config.json has it."""
    power = power_of(places)
    if power == 1 or not value:
        return value
    original = value ** (1 / power)
    nearest = round(original)
    return nearest if math.isclose(original, nearest) else original


def power_of(places):
    """The `power` of an entry of `keys` in families.yaml: {default: 256, power: -0.5}"""
    last = places[-1] if isinstance(places, list) else None
    return last.get("power", 1) if isinstance(last, dict) else 1


def hf_names(places):
    """The names of an entry of `keys` in families.yaml: ["a", "b.c", 0.5] -> ["a", "b.c"]"""
    places = places if isinstance(places, list) else [places]
    return [place for place in places if isinstance(place, str)]


def find_in_hf_config(hf_config, places):
    """The value at the first of several dotted keys that exists, or configs.MISSING.

    A last item that is not a string is the value if none of the keys exists: {default: gelu}, or
    any other value as it is.
    """
    for name in hf_names(places):
        value = configs.get(hf_config, name, configs.MISSING)
        if value is not configs.MISSING:
            return value
    default = places[-1] if isinstance(places, list) else places
    if isinstance(default, str):
        return configs.MISSING
    return default.get("default", configs.MISSING) if isinstance(default, dict) else default


def rope_kind(scaling):
    """The kind of a rope_scaling or rope_parameters section; older files call it type."""
    return str(scaling.get("rope_type", scaling.get("type", "default")))


def read_rope_scaling(hf_config, model_cfg, path):
    """rope_parameters -> model.rope_scaling: None, or a section with what its kind needs.

    The rest of rope_parameters is keys of their own here, or not read by transformers either.
    """
    section = hf_config["rope_parameters"]
    kind = rope_kind(section)
    if kind == "default":
        return None
    name = "rope_scaling" if hf_config.get("rope_scaling") else "rope_parameters"
    needed = ROPE_SCALINGS.get(kind, ())
    scaling = {"rope_type": kind} | {key: section[key] for key in needed if key in section}
    options = [key for key in ROPE_OPTIONS.get(kind, ()) if section.get(key) is not None]
    scaling |= {key: section[key] for key in options}
    key = "original_max_position_embeddings"
    if key in needed:                              # beside the section, it counts more
        scaling[key] = hf_config.get(key, section.get(key, model_cfg["max_len"]))
    check_rope_scaling(scaling, f"{path}: {name}")
    rotary = section.get("partial_rotary_factor", hf_config.get("partial_rotary_factor"))
    is_read = "partial_rotary_factor" in model_cfg | scaling
    if not is_read and rotary not in (None, 1.0):
        raise configs.UserError(f"{path}: partial_rotary_factor must be 1.0 where rope is scaled; "
                                f"got {rotary}")
    return scaling


def check_rope_scaling(section, place):
    """Raise UserError unless rope can be scaled so. `place` is where the section is written."""
    kind = rope_kind(section)
    if kind not in ROPE_SCALINGS:
        raise configs.UserError(f"{place}.rope_type: must be one of {', '.join(ROPE_SCALINGS)}; "
                                f"got {kind}")
    options = [key for key in ROPE_OPTIONS.get(kind, ()) if key in section]
    for key in (*ROPE_SCALINGS[kind], *options):
        constraint = ROPE_CONSTRAINTS.get(key, "float > 0")
        value = section.get(key)
        if not configs.fits(configs.coerce(value, constraint), constraint):
            raise configs.UserError(f"{place}.{key}: {kind} needs {constraint}; got {value}")
    if kind == "llama3" and section["low_freq_factor"] >= section["high_freq_factor"]:
        raise configs.UserError(f"{place}.low_freq_factor: must be below high_freq_factor; got "
                                f"{section['low_freq_factor']}")
    if kind == "yarn" and section.get("beta_slow", 1) >= section.get("beta_fast", 32):
        raise configs.UserError(f"{place}.beta_slow: must be below beta_fast; got "
                                f"{section.get('beta_slow', 1)}")
    for key in section:
        if key not in ("rope_type", "type", *ROPE_SCALINGS[kind], *options):
            raise configs.UserError(f"{place}.{key}: has no effect with {kind}; remove it")


def check_export(model_cfg, defaults):
    """Can the family's config.json express the model? If not, the export would be wrong.

    Yields (is it valid, key, what it must be).
    """
    name = model_cfg["family"]
    family = families()[name]
    if family.get("native"):
        return
    n_heads = model_cfg["n_heads"]
    plain_heads = {"n_kv_heads": n_heads, "head_dim": model_cfg["d_model"] // n_heads}
    yield ("carried" not in family or model_cfg["init_from"], "model.family",
           f"another family for a new model: {name} has parts that only a pretrained model has")
    fixed = defaults | plain_heads | family["fixed"]
    hf_values = {}                                 # several of our keys may be one of config.json
    for key, value in model_cfg.items():
        if key == "embed" and value not in EXPORTED_EMBEDDINGS:
            yield (False, "model.embed",
                   f"one of {', '.join(EXPORTED_EMBEDDINGS)} to be exported as a {name} model; "
                   "model.family=native exports any model, checkpoint.export=false none")
        if key in NOT_IN_HF_CONFIG and key not in family["fixed"]:
            continue
        if key not in family["keys"]:
            yield (value == fixed[key], f"model.{key}",
                   f"{configs.show(fixed[key])} to be exported as a {name} model, whose "
                   "config.json has no other value (configs/families.yaml); model.family=native "
                   "exports any model, checkpoint.export=false none")
            continue
        places = family["keys"][key]
        hf_key = hf_names(places)[-1]
        value = to_hf(value, places)
        shared = hf_values.setdefault(hf_key, value)
        yield (value == shared, f"model.{key}",
               f"{configs.show(shared)}: a {name} model has one {hf_key} for both")
