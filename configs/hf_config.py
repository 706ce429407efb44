"""The imported layer of a config: a pretrained model's config.json, translated to our keys.

configs/families.yaml describes the families of models. configs.load() uses this file.
"""
import functools
import json
import re
from pathlib import Path

import configs

# Model keys that a family's config.json need not have: they don't change what a saved model
# computes, or save_pretrained() stores their effect in the weights.
NOT_IN_HF_CONFIG = ("init_from", "family", "init_std", "init_by_depth", "loss", "loss_options",
                    "embed", "embed_options", "embd_pdrop", "attn_pdrop", "resid_pdrop",
                    "pad_vocab_size_multiple")


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
    return table


def import_model(cfg):
    """The imported layer: from model.init_from, or what all new models of the family share."""
    model_cfg = cfg["model"]
    if model_cfg["init_from"]:
        return {"model": read_model(resolve_pretrained(model_cfg["init_from"]))}
    family = families().get(model_cfg["family"], {})
    return {"model": family.get("new", {}) | family.get("fixed", {})}


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
    patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
    try:
        return snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"])
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
    hint = "name a model folder, a run's folder or a hub id (owner/name)"
    if (Path(path) / "checkpoints").is_dir():
        hint = f"python checkpoint.py export {path} DIR makes one"
    raise configs.UserError(f"{path}: no model in Hugging Face format here (config.json); {hint}")


def read_model(folder):
    """The config.json of a pretrained folder as a dict like our model section."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        hint = "give a model folder in Hugging Face format"
        if (Path(folder) / "hf").is_dir():
            hint = f"{folder}/hf has one"
        raise configs.UserError(f"model.init_from: {folder} has no config.json; {hint}")
    try:
        hf_config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise configs.UserError(f"{path}: cannot read this JSON file: {error}") from None
    if not isinstance(hf_config, dict):
        raise configs.UserError(f"{path}: must be a JSON object; got a {type(hf_config).__name__}")
    return translate(hf_config, path)


def translate(hf_config, path):
    """A config.json's dict -> a dict like our model section. `path` is for error messages."""
    model_type = str(hf_config.get("model_type"))
    names = {family["model_type"]: name for name, family in families().items()}
    if model_type not in names:
        raise configs.UserError(f"{path}: model_type must be one of {', '.join(names)}; got "
                                f"{model_type}; a new family is a few lines in "
                                "configs/families.yaml")
    name = names[model_type]
    family = families()[name]
    for key, value in family.get("only", {}).items():
        if hf_config.get(key, value) != value:
            raise configs.UserError(f"{path}: {key} must be {value!r}; got {hf_config[key]!r}, "
                                    "which is not supported")
    if family.get("native"):                       # our own keys; others describe the export
        known = configs.read_defaults()[0]["model"]
        return {"family": name} | {key: hf_config[key] for key in hf_config if key in known}
    model_cfg = {"family": name} | family["fixed"]
    for key, places in family["keys"].items():
        value = find_in_hf_config(hf_config, places)
        if value is configs.MISSING:
            raise configs.UserError(f"{path}: {places} is missing, a {name} model's {key}")
        model_cfg[key] = value
    if "rope_scaling" in model_cfg:
        model_cfg["rope_scaling"] = clean_rope_scaling(model_cfg["rope_scaling"], path)
    return model_cfg


def find_in_hf_config(hf_config, places):
    """The value at the first of several dotted keys that exists, or configs.MISSING.

    A last item that is not a string is the value if none of the keys exists: {default: gelu}, or
    any other value as it is.
    """
    places = places if isinstance(places, list) else [places]
    for place in places:
        if isinstance(place, dict) and list(place) == ["default"]:
            return place["default"]
        if not isinstance(place, str):
            return place
        value = configs.get(hf_config, place, configs.MISSING)
        if value is not configs.MISSING:
            return value
    return configs.MISSING


def clean_rope_scaling(scaling, path):
    """A config.json's rope_scaling or rope_parameters, without entries that are keys of their own
    here. None if rope is not scaled."""
    if not scaling:
        return None
    if not isinstance(scaling, dict):
        raise configs.UserError(f"{path}: rope_scaling must be a section; got {scaling!r}")
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type == "default":
        return None
    other_keys = ("rope_theta", "partial_rotary_factor")
    return {key: value for key, value in scaling.items() if key not in other_keys}


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
    fixed = defaults | plain_heads | family["fixed"]
    hf_values = {}                                 # several of our keys may be one of config.json
    for key, value in model_cfg.items():
        if key in NOT_IN_HF_CONFIG and key not in family["fixed"]:
            continue
        if key not in family["keys"]:
            yield (value == fixed[key], f"model.{key}",
                   f"{configs.show(fixed[key])} to be exported as a {name} model, whose "
                   "config.json has no other value (configs/families.yaml); model.family=native "
                   "exports any model, checkpoint.export=false none")
            continue
        places = family["keys"][key]
        hf_key = places[0] if isinstance(places, list) else places
        shared = hf_values.setdefault(hf_key, value)
        yield (value == shared, f"model.{key}",
               f"{configs.show(shared)}: a {name} model has one {hf_key} for both")
