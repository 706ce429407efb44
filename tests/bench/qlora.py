"""The peak memory of QLoRA steps of a model of Qwen2.5-1.5B's shape, in a process of its own.

    python tests/bench/qlora.py [key=value ...]        more keys of the config: shard.quantize=int8

The weights are new ones, or those of model.init_from=FOLDER. Peak: the largest resident set that
the kernel counted (VmHWM), with Python, torch and, with init_from, the pages of mapped files.
"""
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHAPE = ["model.family=qwen2", "model.qkv_bias=true", "model.n_layers=28", "model.d_model=1536",
         "model.n_heads=12", "model.n_kv_heads=2", "model.d_ff=8960", "model.vocab_size=151936",
         "model.max_len=32768", "data.tokenizer=bytes"]
RUN = ["data.train.chats.path=data/chats.jsonl", "data.validation_split=2", "data.seq_len=128",
       "batch_size=2", "micro_tokens=128", "max_steps=3", "epochs=0", "shard.recompute=true",
       "checkpoint.export=false", "eval_every=0", "eval_prompts=0", "save_every=0",
       "samples=0", "device=cpu"]


def main(argv):
    shape = [] if any(arg.startswith("model.init_from=") for arg in argv) else SHAPE
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = [f"out_dir={folder}/run", f"data.cache_dir={folder}/tokens"]
        command = [sys.executable, "train.py", "configs/qlora.yaml", *shape, *RUN, *out, *argv]
        subprocess.run(command, cwd=ROOT, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20      # KiB -> GiB
    print(f"peak resident set {peak:.2f} GiB; {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
