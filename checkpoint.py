"""Save, resume, export: a checkpoint exists whole or not at all.

    python checkpoint.py ls out/ft                 what can be resumed
    python checkpoint.py export out/ft DIR         the newest (or out/ft/checkpoints/00000100) as a Hugging Face model

    out/ft/checkpoints/00000100/model.safetensors         what is trained, in fp32: all weights, or the adapters alone
                                optimizer.safetensors     NAME/exp_avg, … for each of them
                                state.json                step, config, versions, fingerprints, checksums
    out/ft/checkpoints/latest -> 00000100

A checkpoint is written under another name, synced and renamed: whatever ends the process, and whenever, `latest` is
whole. The loop waits only for the copy into memory, the rest is a thread's. Nothing that is read back can run code.
"""
import json, os, shutil, sys, threading, zlib
from pathlib import Path

import configs

if __name__ == "__main__" and len(sys.argv) < 2:
    sys.exit(__doc__)

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import model as transformer
import shard
import tokenize_data

FORMAT = 1


# ---------------------------------------------------------------------------------------------------------------------
# out

def sync(path):
    """Have the disk hold what was written to a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum(path):
    value = 0
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def own_checksum(state):
    """Of what state.json says besides."""
    rest = {key: value for key, value in state.items() if key != "checksum"}
    return f"{zlib.crc32(json.dumps(rest, sort_keys=True).encode()):08x}"


def remove(folder):
    """Delete a checkpoint: it loses its name first, so that half of one is never taken for a whole."""
    gone = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(folder, gone)
        shutil.rmtree(gone)


def snapshot(model, optimizer):
    """A copy of what a resumed run needs, in main memory -> {file: {name: tensor}}. The loop waits for no more."""
    copy = lambda t: t.detach().to("cpu", copy=True)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    moments = {f"{name}/{key}": t for name, p in weights.items() for key, t in optimizer.state[p].items()}
    return {"model.safetensors": {name: copy(p) for name, p in weights.items()},
            "optimizer.safetensors": {name: copy(t) for name, t in moments.items()}}


def write(folder, files, state, keep):
    """Write a snapshot as `folder`, point `latest` at it, delete all but the newest `keep`. OSError leaves what was."""
    parent, building = folder.parent, folder.with_name(f".{folder.name}.building")
    parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    sums = {}
    for name, tensors in files.items():
        save_file(tensors, building / name)
        sync(building / name)
        sums[name] = checksum(building / name)
    state = json.loads(json.dumps(state | {"format": FORMAT, "checksums": sums}))
    (building / "state.json").write_text(json.dumps(state | {"checksum": own_checksum(state)}, indent=1) + "\n")
    sync(building / "state.json")
    sync(building)
    remove(folder)
    os.replace(building, folder)
    sync(parent)
    link = parent / ".latest"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    os.replace(link, parent / "latest")
    sync(parent)
    whole = found(parent.parent)
    ahead = [p for p in whole if p.name > folder.name]         # left by a run that went on from an older one
    for old in ahead + [p for p in whole if p not in ahead][:-keep]:
        remove(old)


class Saver:
    """Writes snapshots in the background, one at a time."""

    def __init__(self, out_dir, keep, warn):
        self.folder, self.keep, self.warn = Path(out_dir) / "checkpoints", keep, warn
        self.thread = self.error = None
        for left in self.folder.glob(".*.*"):                  # of a process that was killed while it wrote or deleted
            shutil.rmtree(left, ignore_errors=True)

    def save(self, step, model, optimizer, state):
        """Step's checkpoint: returns when the copy is made. wait() tells of a failed write, which leaves the others."""
        self.wait()
        files, folder = snapshot(model, optimizer), self.folder / f"{step:08}"

        def work():
            try:
                write(folder, files, state | {"step": step}, self.keep)
            except (OSError, SafetensorError) as e:
                self.error = f"checkpoint {folder} was not written ({e}); the run goes on, the older ones are whole"
        self.thread = threading.Thread(target=work)
        self.thread.start()

    def wait(self):
        """Until the last save is on disk. -> did it get there?"""
        if self.thread:
            self.thread.join()
        error, self.error = self.error, None
        if error:
            self.warn(error)
        return not error


# ---------------------------------------------------------------------------------------------------------------------
# in

def found(out_dir):
    """A run's whole checkpoints, oldest first. Whole is what bears its final name."""
    return sorted(p.parent for p in Path(out_dir, "checkpoints").glob("[0-9]*/state.json"))


def read_state(folder):
    """A checkpoint's state.json -> dict, verified. Raises ValueError."""
    path = Path(folder) / "state.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no checkpoint there (no state.json); python checkpoint.py ls RUN lists a run's")
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        whole = state["checksum"] == own_checksum(state)
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"{path}: this checkpoint is damaged{another(folder)}")
    if state["format"] != FORMAT:
        raise ValueError(f"{path}: format {state['format']}; this version reads {FORMAT}, use the one that wrote it")
    return state


def another(folder):
    """What to do about a damaged checkpoint, where there is something."""
    folder = Path(folder).resolve()
    others = [str(p) for p in found(folder.parents[1]) if p.resolve() != folder]
    return f"; resume={others[-1]} goes on from another" if others else ""


def read(folder):
    """A checkpoint's folder -> (state, {file: {name: tensor}}), verified. Raises ValueError naming a damaged file."""
    folder, state, files = Path(folder), read_state(folder), {}
    for name, want in state["checksums"].items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: is missing, this checkpoint is damaged{another(folder)}")
        if (got := checksum(folder / name)) != want:
            raise ValueError(f"{folder / name}: checksum {got}, not {want}: checkpoint is damaged{another(folder)}")
        files[name] = load_file(folder / name)
    return state, files


def restore(folder, model, optimizer):
    """A checkpoint into a model and its optimizer, in place -> state. Raises ValueError, naming what doesn't fit."""
    state, files = read(folder)
    saved, wanted = files["model.safetensors"], {name: p for name, p in model.named_parameters() if p.requires_grad}
    wrong = [f"{name} is missing" for name in wanted if name not in saved]
    wrong += [f"{name} is unknown" for name in saved if name not in wanted]
    wrong += [f"{name} is {list(saved[name].shape)}, and the model's is {list(p.shape)}"
              for name, p in wanted.items() if name in saved and saved[name].shape != p.shape]
    if wrong:
        raise ValueError(f"{folder}: doesn't fit the model: {transformer.listed(wrong)}")
    with torch.no_grad():
        for name, p in wanted.items():
            p.copy_(saved[name])
            optimizer.state[p].clear()
    for key, tensor in files["optimizer.safetensors"].items():
        name, _, part = key.rpartition("/")
        optimizer.state[wanted[name]][part] = tensor.to(wanted[name].device)
    return state


FREE = ("log_every", "eval_every", "save_every", "eval_prompts", "eval_tokens", "samples", "micro_tokens", "resume",
        "out_dir", "device", "shard.recompute", "data.cache_dir", "data.processes", "data.validation",
        "data.validation.", "checkpoint.", "log.")             # what may change without changing the run's past


def differences(out_dir, cfg):
    """The keys in which a run's saved config differs from cfg, the FREE ones aside -> ["lr: 0.1 there, 0.2 here"]"""
    saved = Path(out_dir) / "config.yaml"
    if not saved.is_file():
        return []
    here, there = (configs.flat(c) for c in (cfg, configs.load([str(saved)])[0]))
    endless = cfg["schedule"] == "constant" and type(cfg["warmup"]) is int       # its past doesn't depend on its end
    free = FREE + (("max_steps", "epochs") if endless else ())
    kept = lambda key: any(key == f or f.endswith(".") and key.startswith(f) for f in free)
    return [f"{key}: {configs.show(there.get(key))} there, {configs.show(here.get(key))} here"
            for key in sorted(here | there) if here.get(key) != there.get(key) and not kept(key)]


# ---------------------------------------------------------------------------------------------------------------------
# export

def export(model, m, cfg, tok, folder, chats):
    """The model, adapters merged, with its tokenizer, as a Hugging Face folder that is there whole or not at all.

    chats  was it trained on any? Then their template goes along, and what ends a turn ends a generation.
    """
    folder, text = Path(folder), None
    building = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    stop = [tok.special[tok.eos]] if tok.eos else []
    if chats:
        text = tokenize_data.template_text(tok, cfg)
        stop = tokenize_data.turn_end(tok, tokenize_data.compile_template(text))
    transformer.save(shard.merge_lora(model, m), m, building, cfg["model"]["init_from"], stop, tok.special.get(tok.bos))
    tokenize_data.save_tokenizer(tok, building, text)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(building, folder)


def export_checkpoint(path, folder):
    """A run's (newest) checkpoint as a Hugging Face folder. Raises ValueError: none there, or a folder in use."""
    path, folder = Path(path), Path(folder)
    if not (path / "state.json").is_file():
        if not (whole := found(path)):
            raise ValueError(f"{path}: no checkpoint there; a run's folder has them in checkpoints/")
        path = whole[-1]
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: is not empty; name another folder")
    cfg, _, _ = configs.load([str(path.resolve().parents[1] / "config.yaml")])
    tok = tokenize_data.load_tokenizer(cfg)
    m = cfg["model"] | {"vocab_size": cfg["model"]["vocab_size"] or tok.n_vocab}
    model = transformer.load(m["init_from"], m)[0] if m["init_from"] else transformer.build(m, cfg["seed"])
    if cfg["shard"]["lora"]["r"]:
        shard.add_lora(model, m, cfg["shard"]["lora"], cfg["seed"])
    state, files = read(path)
    with torch.no_grad():
        for name, tensor in files["model.safetensors"].items():
            model.get_parameter(name).copy_(tensor)
    export(model, m, cfg, tok, folder, state["chats"])
    print(f"{path} -> {folder}")


def ls(out_dir):
    """Print a run's checkpoints, oldest first."""
    whole = found(out_dir)
    for folder in whole:
        try:
            state = read_state(folder)
        except ValueError as e:
            print(e)
            continue
        size = sum(f.stat().st_size for f in folder.iterdir())
        newest = "   latest" if folder == whole[-1] else ""
        print(f"{folder}   step {state['step']:,} of {state['total_steps']:,}   {size / 1e6:,.1f} MB   "
              f"torch {state['versions']['torch']}{newest}")
    if not whole:
        raise ValueError(f"{out_dir}: no checkpoints there")


def main(argv):
    commands = {"ls": (ls, "ls RUN"), "export": (export_checkpoint, "export RUN|CHECKPOINT DIR")}
    if argv[0] not in commands or len(argv) != len(commands[argv[0]][1].split()):
        raise ValueError("; ".join(f"python checkpoint.py {usage}" for _, usage in commands.values()))
    commands[argv[0]][0](*argv[1:])


if __name__ == "__main__":
    configs.run(main, sys.argv[1:])
