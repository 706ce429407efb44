"""Save, resume, export. A checkpoint exists complete or not at all.

    python checkpoint.py ls out/ft                 list the checkpoints: step, loss, size, age, and
                                                   which are damaged (verify=false: not read)
    python checkpoint.py export out/ft DIR         write the newest one as a Hugging Face model
                                                   (or another, by its folder instead of out/ft)
                         dtype=bfloat16            in another dtype than that of its base
                         adapter=true              LoRA's adapters instead of the merged model
                         upload=OWNER/NAME         and upload it, as a private model (private=false)
                         key=value                 of the run's config, for what has moved

    out/ft/checkpoints/00000100/model.safetensors       all parameters, or LoRA's adapters
                                optimizer.safetensors   PARAMETER/exp_avg, ... for each of them
                                sampler.safetensors     the state of a sampler with feedback
                                state.json              step, config, code, data, base, checksums
    out/ft/checkpoints/latest -> 00000100               the newest; best: the best by cfg["best"]

A checkpoint is written under a temporary name, fsynced and renamed. Whenever the process is killed,
the newest checkpoint is complete. The loop waits for the copy into host memory, and for the write
of the previous checkpoint if that is not finished; a thread writes the copy to disk.
Nothing is unpickled, so loading a checkpoint cannot run code.

Any number of ranks writes the same files. A local shard is a range of rows, and the rows of a
tensor are contiguous in a safetensors file, so each rank writes its rows at their offset. Any other
number of ranks reads them, each rank its own rows.
"""
import importlib.util
import re
import sys
from pathlib import Path

import configs

USAGE = ("python checkpoint.py ls RUN [verify=false]; "
         "python checkpoint.py export RUN|CHECKPOINT DIR [dtype=bfloat16] [adapter=true] "
         "[upload=OWNER/NAME] [private=false] [key=value ...]")
EXPORT_OPTIONS = {"dtype": "", "adapter": False, "upload": "", "private": True}    # and defaults
EXPORT_DTYPES = ("float32", "bfloat16", "float16")


def check_arguments(command, path="", *rest):
    """Raise UserError unless a command line is as in USAGE, and the path holds a checkpoint."""
    n_folders = sum("=" not in argument for argument in rest)
    if command not in ("ls", "export"):
        raise configs.UserError(f"{command}: is neither ls nor export; {USAGE}")
    if not path or n_folders != (command == "export"):
        wanted = "a RUN and a new folder" if command == "export" else "a RUN"
        raise configs.UserError(f"{command}: needs {wanted}; {USAGE}")
    if command == "export":
        check_export_options(configs.pop_options(rest, **EXPORT_OPTIONS)[0])
    states = [*Path(path).glob("checkpoints/*/state.json"), *Path(path).glob("state.json")]
    if not states:
        problem = "has no checkpoints" if Path(path).exists() else "does not exist"
        raise configs.UserError(f"{path}: {problem}; name a run's folder or one of its checkpoints")


def check_export_options(options):
    dtype = options["dtype"]
    if dtype and dtype not in EXPORT_DTYPES:
        raise configs.UserError(f"dtype: must be one of {', '.join(EXPORT_DTYPES)}; got {dtype}")
    if dtype and options["adapter"]:
        raise configs.UserError("dtype: adapters are written in float32; remove it")
    if not options["upload"]:
        return
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", options["upload"]):
        raise configs.UserError(f"upload: must be OWNER/NAME on the hub; got {options['upload']}")
    if not importlib.util.find_spec("huggingface_hub"):
        raise configs.UserError("upload: needs a package; pip install huggingface_hub")


if __name__ == "__main__":    # before torch is imported
    configs.exit_with_help(__doc__, sys.argv[1:])
    configs.run(check_arguments, *sys.argv[1:])

import contextlib
import dataclasses
import fcntl
import functools
import glob
import hashlib
import json
import math
import os
import platform
import shutil
import struct
import subprocess
import threading
import time
import zlib

import torch
import torch.distributed as dist
from safetensors import safe_open

import log
import model as transformer
import shard
import tokenize_data

FORMAT = 3
PROJECT = Path(__file__).absolute().parent
DTYPE_NAMES = {                                          # as safetensors spells them
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint8: "U8", torch.bool: "BOOL",
}


# --------------------------------------------------------------------------------------------------
# what a checkpoint contains

def trained_parameters(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def saved_parameters(model):
    """What model.safetensors holds: under LoRA the trained parameters and all adapters, else all.

    The frozen weights under LoRA are read again, where they were read at the start.
    """
    params = dict(model.named_parameters())
    is_lora = any(shard.is_adapter(name) for name in params)
    return {name: p for name, p in params.items()
            if not is_lora or p.requires_grad or shard.is_adapter(name)}


def optimizer_tensors(model, optimizer):
    """{"PARAMETER/KEY": tensor} of an optimizer's state. Python numbers become scalar tensors."""
    tensors = {}
    for name, p in trained_parameters(model).items():
        for key, value in sorted(optimizer.state[p].items()):
            if isinstance(value, float):
                value = torch.tensor(value, dtype=torch.float64)    # as_tensor would round to fp32
            tensors[f"{name}/{key}"] = torch.as_tensor(value)
    return tensors


def check_optimizer_state(optimizer, model):
    """Raise UserError for optimizer state that a checkpoint could not restore.

    Each value is saved by its own layout, not by its parameter's: a plain tensor is the same on all
    ranks, a DTensor is sharded by rows or replicated. Its shape may differ from its parameter's.
    Values that an optimizer keeps elsewhere, in its param_groups or attributes, are not saved.
    """
    names = {p: name for name, p in trained_parameters(model).items()}
    for p, values in optimizer.state.items():
        if p not in names:
            raise configs.UserError("optimizer: its state has a key that is not a trained "
                                    "parameter; keep everything in self.state[p]")
        for key, value in values.items():
            problem = layout_problem(value, p)
            if problem:
                raise configs.UserError(f"optimizer: state {key!r} of {names[p]} {problem}")


def layout_problem(value, p):
    """Why an optimizer's value for parameter p could not be restored, or ""."""
    if not torch.is_tensor(value):
        is_number = isinstance(value, (bool, int, float))
        return "" if is_number else f"is a {type(value).__name__}; use a tensor or a number"
    if value.dtype not in DTYPE_NAMES:
        return f"has dtype {value.dtype}, which safetensors cannot store; use another dtype"
    if shard.is_dtensor(value):
        if all(q.is_replicate() or q.is_shard(0) for q in value.placements):
            return ""
        return f"has placements {value.placements}; redistribute it to Shard(0) or Replicate()"
    if value.numel() > 1 and shard.is_dtensor(p):
        return (f"is a plain tensor of shape {list(value.shape)}, but its parameter is sharded "
                "over ranks; make it a DTensor (torch.zeros_like(p)), or shard.mesh.shard=1")
    return ""


@dataclasses.dataclass
class TensorFile:
    """A safetensors file, with what this rank writes into it."""
    header: bytes
    size: int
    chunks: list                  # [(offset in the file, tensor in host memory)]


def snapshot(model, optimizer, sampler_state, buffers):
    """Copy all that a resumed run needs to host memory: {file name: TensorFile}.

    The copies are in `buffers`, and the next snapshot overwrites them.

    sampler_state  {name: numpy array}, the same on all ranks
    buffers        {"file/tensor": tensor in pinned memory}, empty at first; allocating them anew
                   for each snapshot would take several times as long as copying
    """
    contents = {
        "model.safetensors": saved_parameters(model),
        "optimizer.safetensors": optimizer_tensors(model, optimizer),
        "sampler.safetensors": {name: torch.as_tensor(a) for name, a in sampler_state.items()},
    }
    files = {}
    for file, tensors in contents.items():
        header, offsets, size = safetensors_layout(tensors)
        chunks = []
        for name, t in tensors.items():
            local, first_row, end_row = local_rows(t)
            if first_row < end_row and shard.is_writer(t):
                row_bytes = t.dtype.itemsize * math.prod(t.shape[1:])
                copy = copy_to_host(local, f"{file}/{name}", buffers)
                chunks.append((offsets[name] + first_row * row_bytes, copy))
        files[file] = TensorFile(header, size, chunks)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()                         # copies to pinned memory are asynchronous
    return files


def safetensors_layout(tensors):
    """Return (the first bytes of a safetensors file, {name: offset of the tensor}, file size).

    The format is: the length of the header in 8 bytes, the header as JSON, the tensors.
    """
    header = {}
    begin = 0
    for name, t in tensors.items():
        end = begin + t.numel() * t.dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[t.dtype], "shape": list(t.shape),
                        "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first_bytes = struct.pack("<Q", len(text)) + text
    offsets = {name: len(first_bytes) + entry["data_offsets"][0] for name, entry in header.items()}
    return first_bytes, offsets, len(first_bytes) + begin


def copy_to_host(t, key, buffers):
    """Start to copy a tensor into its buffer in host memory; return the buffer."""
    buffer = buffers.get(key)
    if buffer is None or buffer.shape != t.shape or buffer.dtype != t.dtype:
        buffer = torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda)
        buffers[key] = buffer
    return buffer.copy_(t, non_blocking=True)


def local_rows(t):
    """shard.local_shard, also of a scalar: it counts as one row."""
    if t.dim():
        return shard.local_shard(t)
    t = t.detach()
    return (t.to_local() if shard.is_dtensor(t) else t), 0, 1


# --------------------------------------------------------------------------------------------------
# write

def create_files(building, files):
    """Create a checkpoint's files in their final sizes, without the tensors.

    building  the temporary folder, .STEP.building
    """
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    for name, file in files.items():
        with open(building / name, "wb") as f:
            f.write(file.header)
            f.truncate(file.size)


def write_shards(building, files):
    """Write this rank's rows of every tensor, and fsync them."""
    for name, file in files.items():
        if not file.chunks:
            continue
        # Not "r+b": a network file system would read blocks around our rows, and write them back
        # over those of other ranks. os.fdopen does not truncate the file.
        with os.fdopen(os.open(building / name, os.O_WRONLY), "wb") as f:
            for offset, rows in file.chunks:
                f.seek(offset)
                f.write(rows.flatten().view(torch.uint8).numpy())
            f.flush()
            os.fsync(f.fileno())


def commit(building, folder, files, state, keep, keep_every):
    """Add state.json, fsync, rename, point `latest` to it, delete old checkpoints.

    On rank 0, after all ranks have written their shards.
    """
    checksums = {name: file_checksum(building / name) for name in files}
    for name in files:                                   # also one that no rank has written to
        fsync(building / name)
    state = state | {"format": FORMAT, "checksums": checksums}
    state = json.loads(json.dumps(state))                # keys and tuples as they will be read
    state["checksum"] = state_checksum(state)
    (building / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    fsync(building / "state.json")
    fsync(building)
    remove_checkpoint(folder)
    os.replace(building, folder)
    fsync(folder.parent)
    set_symlink(folder.parent / "latest", folder)
    delete_old_checkpoints(folder, keep, keep_every)


def delete_old_checkpoints(newest, keep, keep_every):
    """Delete all but the `keep` newest checkpoints of a run and the one that `best` points to.

    keep_every  those of every so many steps are not deleted; 0: none
    """
    best = (newest.parent / "best").resolve().name
    for folder in list_checkpoints(run_folder(newest))[:-keep]:
        is_kept = keep_every and int(folder.name) % keep_every == 0
        if folder.name != best and not is_kept:
            remove_checkpoint(folder)


def delete_later_checkpoints(out_dir, step):
    """Delete the checkpoints of later steps than the one that a run resumes from.

    If a run with checkpoints of steps 100, 150 and 200 is resumed from step 100, those of 150 and
    200 come from the abandoned continuation. `latest` points to step 100 afterwards.
    """
    checkpoints = list_checkpoints(out_dir)
    kept = [folder for folder in checkpoints if int(folder.name) <= step]
    if kept:
        set_symlink(kept[-1].with_name("latest"), kept[-1])
    for folder in checkpoints[len(kept):]:
        remove_checkpoint(folder)


def remove_checkpoint(folder):
    """Delete a checkpoint. It is renamed first, so that half of one is never taken for a whole."""
    if folder.exists():
        deleting = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(deleting, ignore_errors=True)
        os.replace(folder, deleting)
        shutil.rmtree(deleting)


def fsync(path):
    """Wait until a file or a folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_checksum(path, report=None):
    """The CRC-32 of a file. report(bytes) is called for each block that was read."""
    checksum = 0
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
            if report:
                report(len(block))
    return f"{checksum:08x}"


def state_checksum(state):
    """Checksum of state.json without its own entry "checksum"."""
    rest = {key: value for key, value in state.items() if key != "checksum"}
    text = json.dumps(rest, sort_keys=True)
    return f"{zlib.crc32(text.encode()):08x}"


def set_symlink(link, folder):
    """Point `link`, which is beside a checkpoint, to it. Atomic."""
    new = link.with_name(f".{link.name}")
    new.unlink(missing_ok=True)
    new.symlink_to(folder.name)
    os.replace(new, link)
    fsync(link.parent)


def set_best(out_dir, steps):
    """Point `best` to the first of `steps`, best first, that has a checkpoint.

    If none has one, remove the link.
    """
    link = Path(out_dir) / "checkpoints" / "best"
    for step in steps:
        folder = link.with_name(f"{step:08}")
        if folder.is_dir():
            set_symlink(link, folder)
            return
    link.unlink(missing_ok=True)


class Saver:
    """Writes checkpoints in a background thread of every rank, one at a time.

    All ranks create it together. A failed write does not end the run: the next wait() or save()
    calls warn(text), and older checkpoints stay complete.
    """

    def __init__(self, out_dir, keep, warn, keep_every=0):
        self.folder = Path(out_dir) / "checkpoints"
        self.keep = keep
        self.keep_every = keep_every
        self.warn = warn
        self.group = shard.new_gloo_group()    # threads must not share the main thread's group
        self.buffers = {}
        self.thread = None
        self.error = ""                        # of the last save
        if shard.rank() == 0:
            for path in self.folder.glob(".*.*"):    # .STEP.building, .STEP.old of a killed process
                shutil.rmtree(path, ignore_errors=True)

    def save(self, model, optimizer, sampler_state, state):
        """Start to write the checkpoint of state["step"]. Returns when the copy is made.

        state  a dict for state.json, complete but for format and checksums
        """
        self.wait()
        files = snapshot(model, optimizer, sampler_state, self.buffers)
        self.error = "it was interrupted"    # until write() has finished
        self.thread = threading.Thread(target=self.write, args=(files, state), daemon=True)
        self.thread.start()

    def wait(self):
        """Wait for the last save. Warns once per failure.

        Returns False if the last save failed on any rank, also when called again; True otherwise,
        also before the first save.
        """
        if self.thread is not None:
            self.thread.join()
            self.thread = None
            if self.error:
                self.warn(f"checkpoint not written: {self.error}; the run continues, older "
                          "checkpoints are complete")
        return not self.error

    def write(self, files, state):
        """Runs in the thread, in three stages. If a rank fails in one, all ranks stop after it."""
        folder = self.folder / f"{state['step']:08}"
        building = folder.with_name(f".{folder.name}.building")
        is_rank0 = shard.rank() == 0
        error = self.run_stage(is_rank0, create_files, building, files)
        if not error:
            error = self.run_stage(True, write_shards, building, files)
        if not error:
            error = self.run_stage(is_rank0, commit, building, folder, files, state, self.keep,
                                   self.keep_every)
        if error and is_rank0:
            shutil.rmtree(building, ignore_errors=True)    # it would keep a full disk full
        self.error = error

    def run_stage(self, takes_part, function, *args):
        """Call function(*args) on the ranks that take part. Returns the first error of any rank."""
        error = ""
        if takes_part:
            try:
                function(*args)
            except Exception as e:             # of any kind: the other ranks wait for this one
                error = f"rank {shard.rank()}, {type(e).__name__}: {e}"
        if self.group is None:
            return error
        errors = [None] * shard.world_size()
        dist.all_gather_object(errors, error, group=self.group)
        return next((e for e in errors if e), "")


# --------------------------------------------------------------------------------------------------
# read

def list_checkpoints(out_dir):
    """The complete checkpoints of a run, oldest first: a complete one has its final name."""
    return sorted(p.parent for p in Path(out_dir, "checkpoints").glob("[0-9]*/state.json"))


def read_state(folder):
    """The dict in a checkpoint's state.json. Raises UserError if it is missing or damaged."""
    path = Path(folder) / "state.json"
    if not path.is_file():
        raise configs.UserError(f"{folder}: no checkpoint here (no state.json); "
                                "python checkpoint.py ls RUN lists those of a run")
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        is_intact = state["checksum"] == state_checksum(state)
    except (ValueError, KeyError, TypeError):
        is_intact = False
    if not is_intact:
        raise configs.UserError(f"{path}: this checkpoint is damaged{suggest_other(folder)}")
    if state["format"] != FORMAT:
        raise configs.UserError(f"{path}: checkpoint format {state['format']}, but this version "
                                f"reads {FORMAT}; use the version that wrote it")
    return state


def verify(folder):
    """Read all of a checkpoint and return its state. Raises UserError that names a damaged file."""
    folder = Path(folder)
    state = read_state(folder)
    for name, checksum in damaged_files(folder, state).items():
        expected = state["checksums"][name]
        raise configs.UserError(f"{folder / name}: this checkpoint is damaged (checksum {expected} "
                                f"in state.json, {checksum} here){suggest_other(folder)}")
    return state


def damaged_files(folder, state):
    """Read a checkpoint's files: {name: checksum, or "missing"} of those that have changed."""
    damaged = {}
    n_bytes = folder_size(folder)
    with log.ProgressBar(f"verify {folder}", n_bytes, unit="B", unit_scale=True) as bar:
        for name, expected in state["checksums"].items():
            path = folder / name
            checksum = file_checksum(path, bar.update) if path.is_file() else "missing"
            if checksum != expected:
                damaged[name] = checksum
    return damaged


def folder_size(folder):
    return sum(path.stat().st_size for path in Path(folder).iterdir())


def run_folder(folder):
    """out/ft/checkpoints/00000100 -> out/ft"""
    return Path(folder).resolve().parent.parent


def suggest_other(folder):
    """What to do about a damaged checkpoint: "; resume=..." with the newest other one, if any."""
    folder = Path(folder).resolve()
    others = [p for p in list_checkpoints(run_folder(folder)) if p.resolve() != folder]
    return f"; resume={others[-1]} resumes from another" if others else ""


def load_checkpoint(folder, model, optimizer):
    """Load a checkpoint into a model and, unless that is None, its optimizer. On all ranks.

    The optimizer must have all its state tensors already (train.make_optimizer creates them); their
    values are replaced. Returns (state, {name: numpy array} of the sampler). Raises UserError for a
    damaged checkpoint and for one that does not fit, before anything is changed.
    """
    folder = Path(folder)
    state = shard.rank0_only(verify, folder)
    weights = saved_parameters(model)
    with safe_open(folder / "model.safetensors", framework="pt") as saved_weights:
        check_tensors_fit(saved_weights, weights, folder, "model")
        if optimizer is not None:
            load_optimizer(folder, model, optimizer)
        # in place: these are the tensors that the model holds
        copy_rows(saved_weights, weights)
    with safe_open(folder / "sampler.safetensors", framework="np") as saved_sampler:
        sampler_state = {name: saved_sampler.get_tensor(name) for name in saved_sampler.keys()}
    return state, sampler_state


def load_optimizer(folder, model, optimizer):
    """Load the state of an optimizer, in place. Raises UserError if it does not fit."""
    optimizer_state = optimizer_tensors(model, optimizer)
    with safe_open(folder / "optimizer.safetensors", framework="pt") as saved_state:
        check_tensors_fit(saved_state, optimizer_state, folder, "optimizer")
        copy_rows(saved_state, optimizer_state)
    # numbers were read into temporary tensors: put them back
    for name, p in trained_parameters(model).items():
        for key, value in optimizer.state[p].items():
            if not torch.is_tensor(value):
                number = optimizer_state[f"{name}/{key}"].item()
                optimizer.state[p][key] = type(value)(number)


def check_tensors_fit(saved, tensors, folder, owner):
    """Raise UserError unless a safetensors file has exactly these names and shapes, and dtypes that
    are equal or that copy_rows() converts."""
    found = {}
    for name in saved.keys():
        entry = saved.get_slice(name)
        found[name] = f"{entry.get_dtype()} {entry.get_shape()}"
    expected = {name: f"{DTYPE_NAMES[t.dtype]} {list(t.shape)}" for name, t in tensors.items()}
    problems = []
    for name in sorted(found | expected):
        in_file = found.get(name, "missing")
        in_owner = expected.get(name, "missing")
        if without_dtype(in_file) != without_dtype(in_owner):
            problems.append(f"{name}: {in_file} in the checkpoint, {in_owner} in the {owner}")
    if problems:
        shown = "; ".join(problems[:8])
        if len(problems) > 8:
            shown += f"; and {len(problems) - 8} more"
        run = run_folder(folder)
        raise configs.UserError(
            f"{folder}: does not fit the {owner}: {shown}; python "
            f"{newest_code(run)}/checkpoint.py export {folder} DIR exports it with the code of its "
            "run, and model.init_from=DIR starts from these weights")


def without_dtype(entry):
    """"BF16 [5, 7]" -> "[5, 7]" where shard.master_dtype or moment_dtype may have changed.

    A step is a number in fp32, or an integer if either is bfloat16.
    """
    dtype, _, shape = entry.partition(" ")
    is_convertible = dtype in ("F32", "BF16") or (dtype == "I64" and shape == "[]")
    return shape if is_convertible else entry


@torch.no_grad()
def copy_rows(saved, tensors):
    """Copy this rank's rows of each tensor from a safetensors file, in place and in its dtype."""
    for name, t in log.progress(tensors.items(), "load the checkpoint"):
        local, first_row, end_row = local_rows(t)
        if not t.dim():
            local.copy_(saved.get_tensor(name))
        elif first_row < end_row:
            local.copy_(saved.get_slice(name)[first_row:end_row])


# --------------------------------------------------------------------------------------------------
# the resume point

# Keys and sections that may change when a run is resumed: they do not change what it has computed.
MAY_CHANGE = (
    "log_every", "eval_every", "save_every", "eval_only", "eval_prompts", "eval_tokens",
    "eval_answer", "eval_share", "samples", "log",
    "best", "patience", "max_seconds", "bad_steps", "profile", "checkpoint", "resume",
    "data_root", "output_root", "out_dir", "data.cache_dir", "data.processes", "data.validation",
    "micro_tokens", "device", "shard.mesh", "shard.reshard_after_forward", "shard.recompute",
    "shard.compile",
    # base_hashes() compares what is there
    "model.init_from", "reference_model", "shard.lora.init_from",
)


def find_resume_point(cfg):
    """The checkpoint that cfg["resume"] means, or None: start at step 0. On rank 0.

    1) never: None; train.py then calls start_over.
    2) PATH of another run, and out_dir has no checkpoint: PATH. This starts a new run, whose config
       and code may differ.
    3) out_dir has no checkpoint: None.
    4) PATH of this run: PATH, with the same checks as auto.
    5) auto: the newest of out_dir. UserError if config or code differ; changed data is found later,
       by check_same_data. latest: the same, also with changed code or data.
    6) PATH of another run, from which the run in out_dir has already been started: as 5). UserError
       if that run was not started from PATH.

    If torchrun restarts the command (--max-restarts), and the command has saved a checkpoint, then
    1) and 4) are treated like auto. Raises UserError if resuming would mix two runs.
    """
    out_dir = Path(cfg["out_dir"])
    resume = cfg["resume"]
    check_writable(out_dir, "out_dir")
    checkpoints = list_checkpoints(out_dir)
    continues_launch = is_restart_after_save(checkpoints)
    if resume == "never" and not continues_launch:
        return None                                      # 1)

    named = None
    if resume not in ("auto", "latest", "never"):
        named = Path(resume)
        # Once the run in out_dir was started from PATH and has checkpoints of its own, PATH is not
        # needed any more and may have been deleted: don't check it.
        if not was_started_from(out_dir, resume):
            check_named_checkpoint(named, cfg)
    if not (out_dir / "config.yaml").is_file():
        return named                                     # 2) or 3), in a new out_dir
    check_same_config(cfg)
    if starts_new_run(cfg):
        return named                                     # 2), killed before its first checkpoint
    if not checkpoints:
        return None                                      # 3)
    if named and not is_inside(named, out_dir) and not was_started_from(out_dir, resume):
        raise configs.UserError(f"resume: {resume} is a checkpoint of another run, and {out_dir} "
                                "has a run that was not started from it; out_dir=NEW starts a run "
                                f"from it, resume=auto continues the one in {out_dir}")
    resume_point = checkpoints[-1]                       # 5) or 6)
    if named and is_inside(named, out_dir) and not continues_launch:
        resume_point = named                             # 4)
    if resume != "latest":
        check_same_code(resume_point, cfg)
    return resume_point


def lock_folder(out_dir):
    """Keep other processes out of a run's folder: returns the locked file, which ends the lock when
    it is closed. On rank 0. Raises UserError if another process has the lock.

    The lock also ends with the process, however that ends. flock() would pass it on to processes
    that tokenize. On a file system without locks there is none.
    """
    check_writable(Path(out_dir), "out_dir")
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    check_symlinks(Path(out_dir))
    file = open(Path(out_dir) / ".lock", "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise configs.UserError(f"out_dir: {out_dir} is in use by {file.read()}; wait until that "
                                "has ended, or out_dir=NEW starts another run") from None
    except OSError:
        return file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def check_symlinks(out_dir):
    """Raise UserError if a folder cannot hold symbolic links, which FAT and cloud drives lack."""
    link = out_dir / ".link"
    link.unlink(missing_ok=True)
    try:
        link.symlink_to("checkpoints")
    except OSError as error:
        raise configs.UserError(f"out_dir: {out_dir} cannot hold the symbolic link `latest` "
                                f"({error.strerror}); name a folder on another disk") from None
    link.unlink()


def launch_id():
    """Identifies one launch of a command by torchrun, over all its restarts of the command.

    Nodes share the id of torchrun --rdzv_id. Without one, the parent process is torchrun's agent,
    which restarts the command on its node.
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return f"agent {os.getppid()}" if run_id == "none" else run_id


def is_restart_after_save(checkpoints):
    """Has torchrun restarted this command, after it had saved the newest of these checkpoints?"""
    is_restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if not is_restart or not checkpoints:
        return False
    return read_state(checkpoints[-1]).get("launch") == launch_id()


def was_started_from(out_dir, resume):
    """Has out_dir a run that was started with this resume=PATH? PATH may be deleted by now."""
    path = Path(out_dir) / "config.yaml"
    if not path.is_file() or not list_checkpoints(out_dir):
        return False
    return configs.read_file(path).get("resume") == str(resume)


def starts_new_run(cfg):
    """Does resume=PATH start a run in a new out_dir from a checkpoint of another run?"""
    resume = cfg["resume"]
    if resume in ("auto", "latest", "never") or is_inside(resume, cfg["out_dir"]):
        return False
    return not list_checkpoints(cfg["out_dir"])


def is_inside(path, folder):
    return Path(folder).resolve() in Path(path).resolve().parents


def check_named_checkpoint(folder, cfg):
    """Raise UserError if a run with cfg cannot start from this checkpoint."""
    if not (folder / "state.json").is_file():
        hint = "python checkpoint.py ls RUN lists those of a run"
        if (folder / "checkpoints").is_dir():
            hint = f"resume={folder}/checkpoints/latest"
        raise configs.UserError(f"resume: {folder}: no checkpoint here (no state.json); {hint}")
    read_state(folder)                                   # raises UserError if it is damaged
    differences = config_diff(run_folder(folder), cfg)
    if "optimizer" in differences:                       # its state would not fit
        raise configs.UserError(f"resume: {folder} does not fit ({differences['optimizer']}); "
                                "model.init_from=RUN/hf starts from the weights that its run "
                                "has exported")


def check_same_config(cfg):
    """Raise UserError if out_dir has a run with another config."""
    out_dir = cfg["out_dir"]
    differences = config_diff(out_dir, cfg)
    if differences:
        listed = "; ".join(differences.values())
        raise configs.UserError(
            f"out_dir: {out_dir} has a run with other settings ({listed}); "
            "out_dir=NEW starts another run, resume=never starts over in this folder, "
            f"resume={out_dir}/checkpoints/latest out_dir=NEW continues this run with the new "
            "settings in another folder")


def check_same_code(folder, cfg):
    """Raise UserError if the code has changed since a checkpoint of this run."""
    changed = changed_files(read_state(folder)["code"], code_hashes())
    if changed:
        raise configs.UserError(f"out_dir: the code of the run in {cfg['out_dir']} has changed "
                                f"({', '.join(changed)}); {resume_choices('code', cfg)}")


def check_same_data(state, fingerprints, cfg):
    """Raise UserError if training data has changed since a checkpoint.

    state         the checkpoint's
    fingerprints  of the data now, {source: {what: hash}}
    """
    changed = changed_inputs(state["data"], fingerprints, "data.train.")
    if changed and cfg["resume"] != "latest" and not starts_new_run(cfg):
        raise configs.UserError(f"out_dir: the data of the run in {cfg['out_dir']} has changed "
                                f"({changed}); {resume_choices('data', cfg)}")


def check_same_base(state, hashes, cfg):
    """Raise UserError if a pretrained model has changed since a checkpoint.

    state   the checkpoint's
    hashes  base_hashes(cfg)
    """
    changed = changed_inputs(state.get("base", hashes), hashes)
    if changed and cfg["resume"] != "latest" and not starts_new_run(cfg):
        raise configs.UserError(f"out_dir: the run in {cfg['out_dir']} started from another model "
                                f"({changed}); {resume_choices('model', cfg)}")


def changed_inputs(saved, current, prefix=""):
    """Compare {name: {part: hash}} -> "PREFIX a: part, part; PREFIX b: part", or ""."""
    changed = []
    for name in sorted(saved | current):
        parts = changed_files(saved.get(name, {}), current.get(name, {}))
        if parts:
            changed.append(f"{prefix}{name}: {', '.join(parts)}")
    return "; ".join(changed)


HASHED_BLOCK = 1 << 16       # bytes


def base_hashes(cfg):
    """{key of cfg: {file: hash}} of the pretrained models and the adapter that a run reads.

    Paths do not count, so a copy is the same model, nor do keys of config.json that we don't read.
    """
    hashes = {}
    for key in ("model.init_from", "reference_model"):
        if configs.get(cfg, key):
            folder = configs.resolve_model_dir(configs.get(cfg, key))
            section = json.dumps(configs.read_model(folder), sort_keys=True).encode()
            hashes[key] = {"config.json": hashlib.sha256(section).hexdigest()[:16]}
            # raise UserError for a damaged file now, not after training
            transformer.open_weights(folder)
            transformer.read_source(folder, "generation_config.json")
            for path in transformer.weight_files(folder):
                hashes[key][path.name] = weights_hash(path)
    adapter = cfg["shard"]["lora"]["init_from"]
    if adapter:
        path = Path(adapter) / "adapter_model.safetensors"
        hashes["shard.lora.init_from"] = {path.name: weights_hash(path)}
    return hashes


def weights_hash(path):
    """Hash of a file's size and content: of a file above 64 MB, 1024 blocks at equal distances."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as f:
        for offset in range(0, size, max(HASHED_BLOCK, size // 1024)):
            f.seek(offset)
            digest.update(f.read(HASHED_BLOCK))
    return digest.hexdigest()[:16]


def resume_choices(what, cfg):
    return ("out_dir=NEW starts another run, resume=never starts this run over, "
            f"resume=latest continues it with the new {what} and records the change, "
            f"resume={cfg['out_dir']}/checkpoints/latest out_dir=NEW does so in another folder")


def config_diff(out_dir, cfg):
    """The keys in which a run's config differs from cfg.

    Except MAY_CHANGE, and except max_steps and epochs if the run can be extended (can_be_extended).
    Returns {key: text}, for example {"lr": "lr: 0.1 there, 0.2 here"}.
    """
    path = Path(out_dir) / "config.yaml"
    if not path.is_file():
        return {}
    # these may have moved
    paths = [f"{key}={configs.get(cfg, key)}"
             for key in ("data_root", "output_root", "model.init_from", "shard.lora.init_from")]
    saved_cfg, _, _ = configs.load([str(path), *paths])
    may_change = list(MAY_CHANGE)
    if can_be_extended(out_dir, saved_cfg) and can_be_extended(out_dir, cfg):
        may_change += ["max_steps", "epochs"]
    saved = configs.flat(saved_cfg)
    given = configs.flat(cfg)
    differences = {}
    for key in sorted(given | saved):
        # the key itself, or a section that it is in
        may_differ = any(key == free or key.startswith(f"{free}.") for free in may_change)
        if given.get(key) != saved.get(key) and not may_differ:
            saved_text = configs.show(saved.get(key))
            differences[key] = f"{key}: {saved_text} there, {configs.show(given.get(key))} here"
    return differences


def can_be_extended(out_dir, cfg):
    """May a run's length change, because its steps so far would have been the same?

    The answer depends on cfg["schedule"]:

    constant  yes, if warmup_steps is a number of steps and not a fraction of the run
    wsd       yes, if decay_steps is one as well and the decay has not begun; no if `epochs` is set,
              because the start of the decay then depends on data that is not loaded yet
    other     no, because every learning rate depends on the length

    Never if the warm-up is longer than the run: lr_at then shortens it to the run.
    """
    counts_warmup = type(cfg["warmup_steps"]) is int
    checkpoints = list_checkpoints(out_dir)
    if counts_warmup and checkpoints:
        saved_length = read_state(checkpoints[-1])["total_steps"]    # of max_steps or epochs
        new_length = cfg["max_steps"] or saved_length
        if cfg["warmup_steps"] > min(saved_length, new_length):
            return False
    if cfg["schedule"] == "constant":
        return counts_warmup
    if cfg["schedule"] != "wsd" or not counts_warmup or type(cfg["decay_steps"]) is not int:
        return False
    if not cfg["max_steps"] or cfg["epochs"]:
        return False
    steps_done = max((int(folder.name) for folder in checkpoints), default=0)
    return steps_done <= cfg["max_steps"] - cfg["decay_steps"]


def start_over(out_dir):
    """Delete what a run has left in out_dir, for resume=never.

    Except for config.yaml, which train.py then overwrites.
    """
    out_dir = Path(out_dir)
    for pattern in ("checkpoints", "hf", "adapter", "code", "code-at-*"):
        for folder in out_dir.glob(pattern):
            shutil.rmtree(folder)
    files = [out_dir / "metrics.jsonl", out_dir / "evaluations.jsonl"]
    for path in [*files, *out_dir.glob("tracker_*.json")]:
        path.unlink(missing_ok=True)


def check_writable(folder, key):
    """Raise UserError that names the key if a folder cannot be created or written to."""
    # the folder, or the nearest parent that exists
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise configs.UserError(f"{key}: {existing} is a file; name another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise configs.UserError(f"{key}: {existing} is not writable; name another folder")


# --------------------------------------------------------------------------------------------------
# the code of a run

def source_files():
    """The files that decide what a run computes: {name relative to the project: Path}.

    These are the main script, the loaded modules of the project, the yaml files with defaults and
    families, and all of families/. Installed packages are not included, nor tests, which only call
    the code.
    """
    paths = [PROJECT / "configs" / "defaults.yaml", PROJECT / "configs" / "families.yaml"]
    paths += (PROJECT / "families").glob("*.py")         # imported when the model is built
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None) or ""
        if file.startswith(f"{PROJECT}{os.sep}") or module is sys.modules["__main__"]:
            paths.append(Path(file).absolute())
    standard_library = Path(os.__file__).parent
    installed = Path(torch.__file__).parents[1]
    excluded = (standard_library, installed, PROJECT / "tests")
    files = {}
    for path in paths:
        is_source = path.suffix in (".py", ".yaml") and path.is_file()
        if is_source and not any(path.is_relative_to(folder) for folder in excluded):
            name = path.relative_to(PROJECT) if path.is_relative_to(PROJECT) else path.name
            files[str(name)] = path
    return files


@functools.cache
def code_hashes():
    """{file: first 16 digits of its sha256} of source_files().

    Cached, because files may be edited while the run is on. First called in setup, when all modules
    are imported.
    """
    return hash_files(source_files())


def hash_files(files):
    return {name: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            for name, path in files.items()}


def changed_files(saved, current):
    """The names of files that differ between two results of code_hashes, or exist in only one."""
    return [name for name in sorted(saved | current) if saved.get(name) != current.get(name)]


def newest_code(out_dir):
    return max(Path(out_dir).glob("code-at-*"), default=Path(out_dir) / "code")


def save_code(out_dir, step):
    """Copy the source files to out_dir/code, or to out_dir/code-at-STEP if they have changed."""
    out_dir = Path(out_dir)
    folder = out_dir / "code"
    if step > 0 and folder.is_dir():                     # resumed: keep the code of before
        newest = newest_code(out_dir)
        copies = {str(p.relative_to(newest)): p for p in newest.rglob("*") if p.is_file()}
        if hash_files(copies) == code_hashes():
            return
        folder = out_dir / f"code-at-{step:08}"
    building = out_dir / ".code.building"
    shutil.rmtree(building, ignore_errors=True)
    for name, path in source_files().items():
        copy = building / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    replace_folder(building, folder)


def replace_folder(new, folder):
    """Put a complete folder in the place of another one, which is never left half deleted."""
    deleting = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(deleting, ignore_errors=True)
    if folder.exists():
        os.replace(folder, deleting)
    os.replace(new, folder)
    shutil.rmtree(deleting, ignore_errors=True)


def git_describe():
    """`git describe --always --dirty` of the project, or None without git or a repository."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, timeout=5,
                              encoding="utf-8", errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# --------------------------------------------------------------------------------------------------
# export

@configs.exit_at_signals()
def export(path, model_cfg, cfg, tokenizer, folder, has_chats, is_adapter=False, dtype="",
           hub_id=""):
    """Write a checkpoint as a Hugging Face folder with its tokenizer and a model card.

    A killed export leaves no partial `folder`.

    has_chats   was the model trained on chats? Then the chat template is written too, and the
                tokens that end a turn also end a generation
    is_adapter  write LoRA's adapters alone, in PEFT's layout; otherwise they are merged
    dtype       of the weights, by its name; "": that of model.init_from. Adapters are in fp32
    hub_id      OWNER/NAME, where the model will be uploaded to
    """
    folder = Path(folder)
    building = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    try:
        write_export(path, model_cfg, cfg, tokenizer, building, has_chats, is_adapter, dtype,
                     hub_id)
        replace_folder(building, folder)
    except OSError as error:                             # such as a full disk
        raise configs.UserError(f"{folder}: cannot be written ({error}); {path} is complete, and "
                                "the same command exports it again") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


def write_export(path, model_cfg, cfg, tokenizer, folder, has_chats, is_adapter, dtype, hub_id):
    """export(), but `folder` is written in place."""
    template = None
    stop_ids = [tokenizer.special[tokenizer.eos]] if tokenizer.eos else []
    if has_chats:
        template = tokenize_data.template_text(tokenizer, cfg)
        compiled = tokenize_data.compile_template(template)
        stop_ids = tokenize_data.stop_token_ids(tokenizer, compiled)

    state = verify(path)
    init_from = model_cfg["init_from"]
    saved = safe_open(Path(path) / "model.safetensors", framework="pt")
    read_tensor = saved.get_tensor
    lora_cfg = cfg["shard"]["lora"]
    if lora_cfg["r"]:
        adapted = transformer.build_on_meta(model_cfg)
        shard.add_lora(adapted, lora_cfg)
        adapters = {name: saved.get_tensor(name) for name in saved.keys()}
        # strict=False: the base's weights stay on the meta device
        loaded = adapted.load_state_dict(adapters, strict=False, assign=True)
        assert not loaded.unexpected_keys, loaded.unexpected_keys
        # A checkpoint does not hold the frozen weights. They are read from init_from or, if the
        # model was new, drawn again from the seed.
        base = transformer.weights_reader(model_cfg, cfg["seed"])
        read_tensor = shard.MergedWeights(adapted, base.read).read

    if is_adapter:
        shard.save_adapter(adapted, lora_cfg, folder, init_from)
        transformer.copy_licenses(init_from, folder)
    else:
        bos_id = tokenizer.special.get(tokenizer.bos)
        transformer.save_pretrained(read_tensor, model_cfg, folder, init_from, stop_ids, bos_id,
                                    set(tokenizer.special.values()), dtype=dtype)
    tokenize_data.save_tokenizer(tokenizer, folder, template)
    write_card(folder, path, state, model_cfg, lora_cfg["r"], hub_id, is_adapter)


def check_export_inputs(path, state, cfg, tokenizer):
    """Raise UserError if what an export takes from elsewhere is not what a run was trained with.

    That is the tokenizer, the chat template, and the pretrained model: under LoRA its weights,
    otherwise only its config.json, if it still exists.

    state  what state.json holds
    """
    is_lora = cfg["shard"]["lora"]["r"] > 0
    init_from = cfg["model"]["init_from"]
    changed = []
    if init_from and (is_lora or Path(configs.resolve_pretrained(init_from)).is_dir()):
        current = base_hashes(cfg)["model.init_from"]
        saved = state.get("base", {}).get("model.init_from", current)
        files = [name for name in changed_files(saved, current) if is_lora or name == "config.json"]
        changed += [f"model.init_from: {name}" for name in files]
    current = tokenize_data.fingerprint_tokenizer(cfg, tokenizer)
    saved = next(iter(state["data"].values()), current)
    for part in ["tokenizer", "template"] if state["has_chats"] else ["tokenizer"]:
        if saved[part] != current[part]:
            changed.append(part)
    if changed:
        raise configs.UserError(
            f"{path}: cannot be exported: files that it was trained with have changed "
            f"({', '.join(changed)}); put the old ones back, or name copies of them in "
            "python checkpoint.py export CHECKPOINT DIR model.init_from=... data.tokenizer=... "
            "data.chat_template=...; resume=latest there exports with the files as they are")


# --------------------------------------------------------------------------------------------------
# the model card: README.md of an exported folder, as the hub reads it. It has no times, and no
# paths of this machine: equal checkpoints have equal cards

CARD = """---
{header}---

# {title}

Trained{lora} for {step:,} of {total_steps:,} steps, computing in {dtype}.

## Data

{data}

## Settings

```yaml
{settings}```

## Evaluation

{evaluation}

## Use

```python
from transformers import AutoTokenizer
from {library} import {auto}

tokenizer = AutoTokenizer.from_pretrained("{place}")
model = {auto}.from_pretrained("{place}")
```
"""
LICENSE_TITLES = {"Apache License": "apache-2.0", "MIT License": "mit"}    # first words of a file


def write_card(folder, path, state, model_cfg, lora_r=0, hub_id="", is_adapter=False):
    """Write the model card of the checkpoint at `path`. See export()."""
    base = base_metadata(model_cfg["init_from"])
    sources = state.get("sources", {})                   # older checkpoints have none
    datasets = sorted({source["dataset"] for source in sources.values()} - {""})
    library = "peft" if is_adapter else "transformers"
    tags = (["lora"] if is_adapter else []) + (["conversational"] if state["has_chats"] else [])
    header = base | {"datasets": datasets, "library_name": library,
                     "pipeline_tag": "text-generation", "tags": tags}
    values = state | {
        "header": configs.dump({key: value for key, value in header.items() if value}),
        "title": card_title(model_cfg, base),
        "lora": f" with LoRA of rank {lora_r}" if lora_r else "",
        "data": "\n".join(describe_source(name, sources.get(name)) for name in state["data"]),
        "settings": configs.dump(card_settings(state["config"])),
        "evaluation": evaluation_table(log.read(run_folder(path)), state["step"]),
        "library": library,
        "auto": "AutoPeftModelForCausalLM" if is_adapter else "AutoModelForCausalLM",
        "place": hub_id or "path/to/this/folder",
    }
    card = CARD.format_map(values)
    if configs.families()[model_cfg["family"]].get("native"):    # unknown to transformers
        card = re.sub("library_name: .*\n", "", card).partition("## Use")[0]
        card += f"    python model.py {values['place']}\n"
    Path(folder, "README.md").write_text(card, encoding="utf-8")


def base_metadata(init_from):
    """The part of a card's header that comes from its base: base_model and license, where known.

    A base that is not on the hub passes on the base_model of its own card.
    """
    if not init_from:
        return {}
    folder = Path(configs.resolve_pretrained(init_from))
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    header = {}
    if match := re.match(r"---\n(.*?)\n---", text, re.S):
        with contextlib.suppress(configs.UserError):     # not ours to correct
            header = configs.construct(configs.compose(match[1], card), card)
    keys = ("base_model", "license", "license_name", "license_link")
    metadata = {key: header[key] for key in keys if header.get(key)}
    # where huggingface_hub keeps what it has downloaded
    if match := re.search(r"models--([^/]+?)--([^/]+)/snapshots/", f"{folder}/"):
        metadata["base_model"] = f"{match[1]}/{match[2]}"
    licenses = sorted(folder.glob("LICENSE*"))
    if licenses and "license" not in metadata:
        text = licenses[0].read_text(encoding="utf-8", errors="replace")[:500]
        known = [name for title, name in LICENSE_TITLES.items() if title in text]
        metadata |= {"license": [*known, "other"][0], "license_link": licenses[0].name}
    return metadata


def card_title(model_cfg, base):
    if not model_cfg["init_from"]:
        return (f"{model_cfg['family']} of {model_cfg['n_layers']} x {model_cfg['d_model']}, "
                "trained from new weights")
    folder = Path(model_cfg["init_from"])
    name = folder.parent.name if folder.name == "hf" else folder.name
    return f"{base.get('base_model', name)}, fine-tuned"


def describe_sources(cfg, data):
    """The training sources, for state.json and model cards: {name: {"documents", "tokens",
    "dataset"}}, where dataset is an id on the hub, or "" for local files.

    data  {name: Tokens}
    """
    sources = {}
    for name, tokens in data.items():
        path = cfg["data"]["train"][name]["path"]
        hub_path = tokenize_data.HUB_PATH.fullmatch(os.path.relpath(path, cfg["data_root"]))
        is_local = bool(glob.glob(path))
        sources[name] = {"documents": len(tokens),
                         "tokens": int(tokens.offsets[-1] - tokens.offsets[0]),
                         "dataset": hub_path[1] if hub_path and not is_local else ""}
    return sources


def describe_source(name, source):
    if not source:
        return f"- {name}"
    dataset = f" of {source['dataset']}" if source["dataset"] else ""
    return f"- {name}: {source['documents']:,} documents, {source['tokens']:,} tokens{dataset}"


def card_settings(explicit):
    """The keys that were set, as {dotted key: value}, but those with paths or of trackers."""
    _, schema = configs.read_defaults()
    settings = {}
    for key, value in configs.flat(explicit).items():
        is_path = (configs.constraint_of(key, schema) or "").startswith("path")
        # also in the options of an experiment
        has_path = re.search(r"""(^|[\s'"\[{:=])(~|\.{0,2}/|\$)""", str(value))
        if not is_path and not has_path and not key.startswith("log."):
            settings[key] = value
    return settings


def evaluation_table(records, step):
    """The last validation up to a step."""
    evaluations = [record for record in records
                   if record["step"] <= step and log.is_eval_record(record)]
    if not evaluations:
        return "None."
    last = evaluations[-1]
    rows = [f"| {key.removeprefix('val/')} | {value:.4f} |" for key, value in last.items()
            if key.startswith("val/") and value is not None]
    return "\n".join([f"| validation | after step {last['step']:,} |", "|---|---|", *rows])


# --------------------------------------------------------------------------------------------------
# upload

def prepare_upload(hub_id, private):
    """Create a model on the hub, if there is none. Before the export, which takes longer."""
    from huggingface_hub import HfApi
    try:
        HfApi().create_repo(hub_id, private=private, exist_ok=True)
        is_public = not HfApi().model_info(hub_id).private
    except Exception as error:
        raise configs.UserError(f"upload: {hub_id}: {tokenize_data.one_line(error)}; hf auth login "
                                "stores a token that can write") from None
    if private and is_public:
        raise configs.UserError(f"upload: {hub_id} exists and is public; private=false uploads to "
                                "it, another name makes a private one")


def upload(folder, hub_id):
    """Upload an exported folder as one commit, which deletes other weights and configs there."""
    from huggingface_hub import HfApi
    try:
        HfApi().upload_folder(repo_id=hub_id, folder_path=folder, commit_message="Upload model",
                              delete_patterns=["*.safetensors", "*.safetensors.index.json",
                                               "config.json", "adapter_config.json"])
    except Exception as error:
        raise configs.UserError(f"upload: {hub_id}: {tokenize_data.one_line(error)}; {folder} is "
                                f"complete, and hf upload {hub_id} {folder} uploads it") from None


# --------------------------------------------------------------------------------------------------
# command line

def export_checkpoint(path, folder, *overrides):
    """Export a checkpoint, or the newest of a run. Raises UserError if `folder` is in use.

    overrides  EXPORT_OPTIONS, and key=value for the run's config, such as the new place of
               model.init_from
    """
    path = Path(path)
    options, overrides = configs.pop_options(overrides, **EXPORT_OPTIONS)
    adapter = options["adapter"]
    if not (path / "state.json").is_file():
        path = list_checkpoints(path)[-1]
    check_writable(Path(folder), "DIR")
    if Path(folder).exists() and any(Path(folder).iterdir()):
        raise configs.UserError(f"{folder}: is not empty; name another folder")
    # export=true: the family must be able to express the model
    cfg, _, _ = configs.load([str(run_folder(path) / "config.yaml"), "checkpoint.export=true",
                              "checkpoint.save_final=true", *overrides])
    if adapter and not cfg["shard"]["lora"]["r"]:
        raise configs.UserError(f"adapter: {path} has none, because all weights were trained; "
                                "remove it")
    tokenizer = tokenize_data.load_tokenizer(cfg)
    # A loss that an experiment has registered is unknown here. Weights do not depend on it.
    section = cfg["model"] | {"loss": "cross_entropy", "loss_options": {}}
    model_cfg = transformer.resolve_vocab_size(section, tokenizer.n_vocab)
    state = read_state(path)
    if cfg["resume"] != "latest":
        check_export_inputs(path, state, cfg, tokenizer)
    if options["upload"]:
        prepare_upload(options["upload"], options["private"])
    export(path, model_cfg, cfg, tokenizer, folder, state["has_chats"], adapter, options["dtype"],
           options["upload"])
    print(f"{path} -> {folder}")
    if options["upload"]:
        upload(folder, options["upload"])
        print(f"{folder} -> {options['upload']} on the hub")


def ls(path, *arguments):
    """Print a table of a run's checkpoints, oldest first, or of one checkpoint."""
    options, rest = configs.pop_options(arguments, verify=True)
    if rest:
        raise configs.UserError(USAGE)
    path = Path(path)
    folders = [path]
    if not (path / "state.json").is_file():
        folders = [p for p in (path / "checkpoints").iterdir() if p.is_dir() and not p.is_symlink()]
        folders.sort(key=lambda p: p.name.strip("."))
    records = log.read(run_folder(folders[0]))
    rows = [["checkpoint", "step", "loss", "size", "age", "state"]]
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):     # a running training has renamed it
            rows.append(describe_checkpoint(folder, records, options["verify"]))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for name, step, loss, size, age, status in rows:
        print(f"{name:<{widths[0]}}  {step:>{widths[1]}}  {loss:<{widths[2]}}  "
              f"{size:>{widths[3]}}  {age:>{widths[4]}}  {status}")


def describe_checkpoint(folder, records, reads_all):
    """A row of ls(), as texts.

    records    of the run's metrics.jsonl
    reads_all  also check the content of the files
    """
    size = f"{folder_size(folder) / 1e6:,.1f} MB"
    age = format_age(time.time() - folder.stat().st_mtime)
    if folder.name.startswith("."):
        return [str(folder), "", "", size, age, "incomplete: being written, or it was interrupted"]
    try:
        state = read_state(folder)
        damaged = damaged_files(folder, state) if reads_all else {}
    except configs.UserError as error:
        return [str(folder), "", "", size, age, str(error).partition(": ")[2]]
    status = f"damaged: {', '.join(damaged)}" if damaged else "complete"
    links = [name for name in ("latest", "best")
             if folder.resolve().with_name(name).resolve() == folder.resolve()]
    step = f"{state['step']:,} of {state['total_steps']:,}"
    return [str(folder), step, loss_at(records, state["step"]), size, age,
            ", ".join([status, *links])]


def loss_at(records, step):
    """The validation losses after a step, or else its training loss, as text."""
    losses = []
    training_loss = ""
    for record in log.without_eval_only(records):
        if record["step"] == step:
            losses += [f"{key[4:-5]} {value:.4f}" for key, value in record.items()
                       if re.fullmatch("val/.*/loss", key) and value is not None]
        if record["step"] <= step and record.get("loss") is not None:
            training_loss = f"training {record['loss']:.4f}"
    return ", ".join(losses) or training_loss


def format_age(seconds):
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def main(argv):
    check_arguments(*argv)
    command, path, *rest = argv
    if command == "ls":
        ls(path, *rest)
        return
    [folder] = [argument for argument in rest if "=" not in argument]
    overrides = [argument for argument in rest if "=" in argument]
    export_checkpoint(path, folder, *overrides)


if __name__ == "__main__":
    configs.run(main, sys.argv[1:])
