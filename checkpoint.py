"""Save, resume, export: a checkpoint exists whole or not at all.

    python checkpoint.py ls out/ft                 what can be resumed
    python checkpoint.py export out/ft DIR         the newest (or out/ft/checkpoints/00000100) as a Hugging Face model

    out/ft/checkpoints/00000100/model.safetensors         what is trained, in fp32: all weights, or the adapters alone
                                optimizer.safetensors     NAME/exp_avg, … for each of them
                                sampler.safetensors       what order=feedback has seen, if it has
                                state.json                step, config, versions, fingerprints, checksums
    out/ft/checkpoints/latest -> 00000100                 the newest; and best, where `best` names a number

A checkpoint is written under another name, synced and renamed: whatever ends the process, and whenever, `latest` is
whole. The loop waits only for the copy into memory, the rest is a thread's. Nothing that is read back can run code.

Many ranks write the same files as one: a part of a tensor is some rows of it, those lie together in a safetensors file,
and each rank puts its own where they belong. Any other number of ranks reads them, again each its own rows.
"""
import itertools, json, math, os, shutil, struct, sys, threading, zlib
from pathlib import Path

import configs

if __name__ == "__main__" and len(sys.argv) < 2:
    sys.exit(__doc__)

import torch
from safetensors import safe_open

import model as transformer
import shard
import tokenize_data

FORMAT = 2


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


def snapshot(model, optimizer, more, buffers):
    """A copy of what a resumed run needs, in main memory -> {file: {name: (dtype, shape, first row, rows)}}.

    more     {name: tensor} besides, the same on all ranks
    buffers  {} that keeps the memory the copies lie in: the first time it costs several times as long to get it
    rows     what this rank saves of the tensor, or None where another does. The loop waits for no more than this
    """
    def copy(name, t):
        if name not in buffers or buffers[name].shape != t.shape:
            buffers[name] = torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda)
        return buffers[name].copy_(t, non_blocking=True)

    def piece(name, t):
        if not t.dim():                                        # the optimizer's own count of steps
            return t.dtype, [], 0, copy(name, t) if shard.rank() == 0 else None
        mine, start, end = shard.part(t)
        return t.dtype, list(t.shape), start, copy(name, mine) if start < end and shard.saves(t) else None

    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    moments = {f"{name}/{key}": t for name, p in weights.items() for key, t in optimizer.state[p].items()}
    files = {"model": weights, "optimizer": dict(sorted(moments.items())), "sampler": more}
    out = {f"{file}.safetensors": {name: piece(f"{file} {name}", t) for name, t in tensors.items()}
           for file, tensors in files.items()}
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return out


TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
         torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}


def layout(tensors):
    """A file of a snapshot -> (its first bytes, {name: where the tensor begins}, the file's size).

    A safetensors file: a length in 8 bytes, so much JSON ({name: {dtype, shape, data_offsets}}), the tensors.
    """
    header, at = {}, 0
    for name, (dtype, shape, *_) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": TYPES[dtype], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = struct.pack("<Q", len(text)) + text
    return first, {name: len(first) + entry["data_offsets"][0] for name, entry in header.items()}, len(first) + at


def lay_out(building, files):
    """Create a checkpoint's files in their sizes, empty but for their first bytes."""
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    for name, tensors in files.items():
        first, _, size = layout(tensors)
        with open(building / name, "wb") as f:
            f.write(first)
            f.truncate(size)


def put(building, files):
    """Write this rank's rows of every tensor, and have the disk hold them."""
    for name, tensors in files.items():
        _, begins, _ = layout(tensors)
        mine = {key: piece for key, piece in tensors.items() if piece[-1] is not None}
        if not mine:
            continue
        # not opened for reading: a network file system would read, and write back, others' bytes around ours
        with os.fdopen(os.open(building / name, os.O_WRONLY), "wb") as f:
            for key, (dtype, shape, start, rows) in mine.items():
                f.seek(begins[key] + start * math.prod(shape[1:]) * dtype.itemsize)
                f.write(rows.contiguous().flatten().view(torch.uint8).numpy())
            f.flush()
            os.fsync(f.fileno())


def finish(building, folder, files, state, keep):
    """Name a written checkpoint: check, sync, rename, point `latest` at it, delete all but the newest `keep`."""
    parent, sums = folder.parent, {name: checksum(building / name) for name in files}
    for name in files:                                         # of some no rank has written a row: nobody has synced it
        sync(building / name)
    state = json.loads(json.dumps(state | {"format": FORMAT, "checksums": sums}))
    (building / "state.json").write_text(json.dumps(state | {"checksum": own_checksum(state)}, indent=1) + "\n")
    sync(building / "state.json")
    sync(building)
    remove(folder)
    os.replace(building, folder)
    sync(parent)
    point(parent / "latest", folder)
    whole, best = found(parent.parent), os.path.basename(os.path.realpath(parent / "best"))
    ahead = [p for p in whole if p.name > folder.name]         # left by a run that went on from an older one
    for old in ahead + [p for p in whole if p not in ahead][:-keep]:
        if old in ahead or old.name != best:
            remove(old)


def point(link, folder):
    """Let `link`, beside a checkpoint, lead to it: at once, whatever it led to before."""
    new = link.with_name(f".{link.name}")
    new.unlink(missing_ok=True)
    new.symlink_to(folder.name)
    os.replace(new, link)
    sync(link.parent)


def mark(out_dir, steps):
    """Let `best` lead to the first of the steps that has a checkpoint, or to none: best is kept, and exported."""
    folder = Path(out_dir) / "checkpoints"
    there = [folder / f"{step:08}" for step in steps if (folder / f"{step:08}").is_dir()]
    if there:
        point(folder / "best", there[0])
    else:
        (folder / "best").unlink(missing_ok=True)


class Saver:
    """Writes snapshots in the background, one at a time: rank 0 lays out files, all fill them, rank 0 names them."""

    saves = itertools.count()                                  # of this process; every rank counts the same

    def __init__(self, out_dir, keep, warn):
        self.folder, self.keep, self.warn = Path(out_dir) / "checkpoints", keep, warn
        self.buffers, self.thread, self.error = {}, None, None
        if shard.rank() == 0:
            for left in self.folder.glob(".*.*"):              # of a process that was killed while it wrote or deleted
                shutil.rmtree(left, ignore_errors=True)

    def save(self, step, model, optimizer, more, state):
        """Step's checkpoint: returns when the copy is made. wait() tells of a failed write, which leaves the others."""
        self.wait()
        self.error = None
        files, folder = snapshot(model, optimizer, more, self.buffers), self.folder / f"{step:08}"
        args = files, folder, state | {"step": step}, next(self.saves)
        self.thread = threading.Thread(target=self.work, args=args, daemon=True)
        self.thread.start()

    def work(self, files, folder, state, n):
        """The thread of a rank. What goes wrong on any of them every rank learns, and rank 0 tells."""
        def tried(what, *args):
            try:
                what(*args)
            except Exception as e:                             # whatever it is, the others must not wait for ever
                return f"{type(e).__name__}: {e}"
            return ""
        rank, building = shard.rank(), folder.with_name(f".{folder.name}.building")
        if rank:
            problem = shard.wait_for(f"save{n}/laid out") or tried(put, building, files)
            shard.post(f"save{n}/rank{rank}", problem)
            problem = shard.wait_for(f"save{n}/named")
        else:
            problem = tried(lay_out, building, files)
            shard.post(f"save{n}/laid out", problem)
            problem = problem or tried(put, building, files)
            for other in range(1, shard.ranks()):
                problem = shard.wait_for(f"save{n}/rank{other}") or problem
            problem = problem or tried(finish, building, folder, files, state, self.keep)
            if problem:
                shutil.rmtree(building, ignore_errors=True)        # what is left of it would keep a full disk full
            shard.post(f"save{n}/named", problem)
        if problem:
            self.error = f"checkpoint {folder} was not written ({problem}); the run goes on, the older ones are whole"

    def wait(self):
        """Until the last save is on disk, from all ranks. -> did it get there? If not, that is told once."""
        if self.thread:
            self.thread.join()
            self.thread = None
            if self.error:
                self.warn(self.error)
        return not self.error


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


def verified(folder):
    """A checkpoint's state.json, once its files are what it says. Raises ValueError naming a damaged one."""
    folder, state = Path(folder), read_state(folder)
    for name, want in state["checksums"].items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: is missing, this checkpoint is damaged{another(folder)}")
        if (got := checksum(folder / name)) != want:
            raise ValueError(f"{folder / name}: checksum {got}, not {want}: checkpoint is damaged{another(folder)}")
    return state


def restore(folder, model, optimizer):
    """A checkpoint into a model and its optimizer, in place -> (state, {name: tensor} of what was saved besides).

    Raises ValueError, naming what doesn't fit.
    """
    state = shard.on_first(verified, folder)
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    saved, moments, more = (safe_open(Path(folder) / f"{name}.safetensors", framework="pt")
                            for name in ("model", "optimizer", "sampler"))
    shapes = {name: saved.get_slice(name).get_shape() for name in saved.keys()}
    wrong = [f"{name} is missing" for name in wanted if name not in shapes]
    wrong += [f"{name} is unknown" for name in shapes if name not in wanted]
    wrong += [f"{name} is {shapes[name]}, and the model's is {list(p.shape)}"
              for name, p in wanted.items() if name in shapes and shapes[name] != list(p.shape)]
    if wrong:
        raise ValueError(f"{folder}: doesn't fit the model: {transformer.listed(wrong)}")

    dtypes = {label: dtype for dtype, label in TYPES.items()}

    def give(t, file, key):
        mine, start, end = shard.part(t)
        if start < end:
            mine.copy_(file.get_slice(key)[start:end])
    with torch.no_grad():
        for name, p in wanted.items():
            give(p, saved, name)
            optimizer.state[p].clear()
        for key in moments.keys():
            name, _, what = key.rpartition("/")
            p, stored = wanted[name], moments.get_slice(key)
            if stored.get_shape() == list(p.shape):
                optimizer.state[p][what] = torch.zeros_like(p, dtype=dtypes[stored.get_dtype()])
                give(optimizer.state[p][what], moments, key)
            elif shard.part(p)[0].shape == p.shape or not stored.get_shape():    # a count of steps, a row's mean
                optimizer.state[p][what] = moments.get_tensor(key).to(p.device)
            else:
                raise ValueError(f"{folder}: {key} is {stored.get_shape()}, which can't be laid over ranks as its "
                                 "weight is; shard.mesh.shard=1")
    return state, {name: more.get_tensor(name) for name in more.keys()}


# may change in a run that goes on: its past stays what it was
FREE = ("log_every", "eval_every", "save_every", "eval_prompts", "eval_tokens", "samples", "micro_tokens", "resume",
        "best", "patience", "max_seconds", "bad_steps", "profile", "out_dir", "device", "shard.mesh.",
        "shard.reshard_after_forward", "shard.recompute", "shard.compile", "data.cache_dir", "data.processes",
        "data.validation", "data.validation.", "checkpoint.", "log.")


def differences(out_dir, cfg):
    """The keys in which a run's saved config differs from cfg, the FREE ones aside -> ["lr: 0.1 there, 0.2 here"]"""
    saved = Path(out_dir) / "config.yaml"
    if not saved.is_file():
        return []
    there = configs.load([str(saved)])[0]
    free = FREE + (("max_steps", "epochs") if endless(out_dir, there) and endless(out_dir, cfg) else ())
    here, there = configs.flat(cfg), configs.flat(there)
    kept = lambda key: any(key == f or f.endswith(".") and key.startswith(f) for f in free)
    return [f"{key}: {configs.show(there.get(key))} there, {configs.show(here.get(key))} here"
            for key in sorted(here | there) if here.get(key) != there.get(key) and not kept(key)]


def endless(out_dir, cfg):
    """Is what a run has done the same wherever it ends? Its warm-up counts steps, and its rate has not begun to go."""
    if cfg["schedule"] == "constant":
        return type(cfg["warmup"]) is int
    if cfg["schedule"] != "wsd" or not type(cfg["warmup"]) is type(cfg["decay"]) is int:
        return False
    if not cfg["max_steps"] or cfg["epochs"]:                  # which of the two ends it is not known here
        return False
    done = max((int(folder.name) for folder in found(out_dir)), default=0)
    return done <= cfg["max_steps"] - cfg["decay"]


# ---------------------------------------------------------------------------------------------------------------------
# export

def weights_of(path, m, cfg):
    """A checkpoint -> (read(name) of the plain model's tensors, the model with its adapters or None)."""
    verified(path)
    saved = safe_open(Path(path) / "model.safetensors", framework="pt")
    if not cfg["shard"]["lora"]["r"]:
        return saved.get_tensor, None
    base = transformer.pretrained_reader(m["init_from"], m) if m["init_from"] else transformer.init_reader(m, cfg["seed"])
    model = transformer.build_on_meta(m)
    shard.add_lora(model, m, cfg["shard"]["lora"])
    model.load_state_dict({name: saved.get_tensor(name) for name in saved.keys()}, strict=False, assign=True)
    return shard.merged(model, base), model


def export(path, m, cfg, tok, folder, chats, adapter=None):
    """A checkpoint as a Hugging Face folder, with its tokenizer, that is there whole or not at all.

    chats    was it trained on any? Then their template goes along, and what ends a turn ends a generation
    adapter  under LoRA, whose adapters are merged: a folder for them alone
    """
    folder, text = Path(folder), None
    building = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    stop = [tok.special[tok.eos]] if tok.eos else []
    if chats:
        text = tokenize_data.template_text(tok, cfg)
        stop = tokenize_data.stop_token_ids(tok, tokenize_data.compile_template(text))
    read, adapted = weights_of(path, m, cfg)
    if adapter and adapted:
        shard.save_adapter(adapted, m, cfg["shard"]["lora"], adapter, m["init_from"])
    transformer.save_pretrained(read, m, building, m["init_from"], stop, tok.special.get(tok.bos))
    tokenize_data.save_tokenizer(tok, building, text)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(building, folder)


def need_folder(folder, key):
    """Raises ValueError, naming the key, where a folder is not there and can't be made, or can't be written to."""
    above = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not above.is_dir():
        raise ValueError(f"{key}: {above} is a file; {key}=NEW")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{key}: {above} can't be written to; {key}=NEW")


def export_checkpoint(path, folder):
    """A run's (newest) checkpoint as a Hugging Face folder. Raises ValueError: none there, or a folder in use."""
    path, folder = Path(path), Path(folder)
    if not (path / "state.json").is_file():
        if not (whole := found(path)):
            raise ValueError(f"{path}: no checkpoint there; a run's folder has them in checkpoints/")
        path = whole[-1]
    need_folder(folder, "DIR")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: is not empty; name another folder")
    cfg, _, _ = configs.load([str(path.resolve().parents[1] / "config.yaml")])
    tok = tokenize_data.load_tokenizer(cfg)
    m = transformer.resolve_vocab_size(cfg["model"], tok.n_vocab)
    export(path, m, cfg, tok, folder, read_state(path)["chats"])
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
        names = [n for n in ("latest", "best") if (folder.with_name(n)).resolve() == folder.resolve()]
        print(f"{folder}   step {state['step']:,} of {state['total_steps']:,}   {size / 1e6:,.1f} MB   "
              f"torch {state['versions']['torch']}{''.join(f'   {n}' for n in names)}")
    if not whole:
        raise ValueError(f"{out_dir}: no checkpoints there")


def main(argv):
    commands = {"ls": (ls, "ls RUN"), "export": (export_checkpoint, "export RUN|CHECKPOINT DIR")}
    if argv[0] not in commands or len(argv) != len(commands[argv[0]][1].split()):
        raise ValueError("; ".join(f"python checkpoint.py {usage}" for _, usage in commands.values()))
    commands[argv[0]][0](*argv[1:])


if __name__ == "__main__":
    configs.run(main, sys.argv[1:])
