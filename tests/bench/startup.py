"""From the start of a process to the end of its first training step, on a tiny model: ours, nanoGPT, TRL, in turn.

    python tests/bench/startup.py --nanogpt ../nanoGPT --rounds 5

Two layers of width 64, on a CPU, tokens and data prepared. Ours and nanoGPT are whole commands, timed until they print
their first step; TRL is the script one would write. Prints a table and one line of JSON.
"""
import argparse, json, os, statistics, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRL = """
import datasets, transformers
from trl import SFTConfig, SFTTrainer
from tokenizers import Tokenizer, models
class End(transformers.TrainerCallback):
    def on_step_end(self, *_, **__):
        print("first step", flush=True)
words = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1}, unk_token="a"))
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")
shape = transformers.LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
                                 vocab_size=259)
model = transformers.LlamaForCausalLM(shape)
data = datasets.Dataset.from_list([{"input_ids": [1] * 64} for _ in range(8)])
config = SFTConfig("%s/trl", max_steps=1, save_strategy="no", report_to=[], use_cpu=True)
SFTTrainer(model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[End()]).train()
"""


def until(command, cwd, sign):
    """Seconds until a command prints a line that begins with `sign`."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=cwd, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    seconds, said = None, []
    for line in process.stdout:
        said.append(line)
        if sign in line and seconds is None:                       # a progress bar may stand before it
            seconds = time.perf_counter() - start
    if process.wait() or seconds is None:
        sys.exit("".join(said))
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", required=True, type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    times = {"ours": [], "nanoGPT": [], "TRL": []}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("To be, or not to be, that is the question.\n" * 500)
        data = args.nanogpt / "data" / "shakespeare_char"
        (data / "input.txt").write_text(text.read_text())
        subprocess.run([sys.executable, "prepare.py"], cwd=data, check=True, capture_output=True)
        ours = ["train.py", f"data.train.text.path={text}", "data.tokenizer=bytes", f"data.cache_dir={folder}/tokens",
                "model.n_layers=2", "model.d_model=64", "model.n_heads=4", "data.seq_len=64", "batch_size=8",
                "max_steps=1", "eval_every=0", "save_every=0", "checkpoint.export=false", "log_every=1", "resume=never"]
        theirs = ["train.py", "config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=1",
                  "--log_interval=1", "--block_size=64", "--batch_size=8", "--n_layer=2", "--n_head=4", "--n_embd=64",
                  "--max_iters=0", "--dropout=0.0", f"--out_dir={folder}/nanogpt"]
        (Path(folder) / "theirs.py").write_text(TRL % folder)
        for n in range(args.rounds + 1):
            now = {"ours": until([*ours, f"out_dir={folder}/{n}"], ROOT, "step 1/1"),
                   "nanoGPT": until(theirs, args.nanogpt, "iter 0:"),
                   "TRL": until([f"{folder}/theirs.py"], folder, "first step")}
            for side, seconds in now.items():
                times[side] += [seconds] if n else []                  # the first round fills caches
    result = {}
    for side, seconds in times.items():
        result[side] = {"seconds": round(statistics.median(seconds), 2), "least": round(min(seconds), 2),
                        "most": round(max(seconds), 2), "n": len(seconds)}
        ratio = statistics.median(a / b for a, b in zip(times["ours"], seconds))
        compared = f"   ours takes {ratio:.2f} of it" if side != "ours" else ""
        print(f"{side:<8} {result[side]['seconds']:6.2f} s ({min(seconds):.2f} to {max(seconds):.2f})   "
              f"n {len(seconds)}{compared}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
