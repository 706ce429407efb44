"""The README and the scripts' headers: their commands run, their sizes and keys are true, prose repeats no number
(law 7)."""
import re, shlex, shutil, subprocess, sys

import pytest

import configs
from conftest import ROOT

SCRIPTS = ["tokenize_data.py", "model.py", "shard.py", "sampler.py", "checkpoint.py", "train.py", "log.py"]
README = (ROOT / "README.md").read_text()


def commands():
    """Every torchrun or python command of the README's shell blocks and the scripts' headers, in order, each once.

    Those with a capital word (PATH, FILE) are forms of a command, not one.
    """
    texts = re.findall(r"```sh\n(.*?)```", README, re.S)
    for path in [*SCRIPTS, "configs/__init__.py", "configs/__main__.py", "data/make.py"]:
        texts.append((ROOT / path).read_text().split('"""')[1])
    lines = [line.strip().split("   ")[0].split("  #")[0].strip() for text in texts for line in text.splitlines()]
    lines = [part.strip() for line in lines for part in line.split("&&")]
    found = [line.rstrip(":") for line in lines if re.match(r"(torchrun|python) \S+(\.py|configs)", line)
             and not re.search(r"\b(N_MB|RUN|PATH|FILE)\b", line)]
    return list(dict.fromkeys(found))


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of what git tracks: nobody's out/ folder helps."""
    folder = tmp_path_factory.mktemp("clone") / "repo"
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True,
                             text=True, check=True).stdout
    for name in tracked.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    return folder


def test_every_command_runs(clone, script):
    found = commands()
    assert len(found) > 12 and found[0] == "torchrun train.py configs/ft.yaml lr=1e-4"
    for command in found:
        words = shlex.split(command)
        words = ["1" if word == "34" else word for word in words]    # megabytes of drills
        short = ["max_steps=2", "eval_prompts=2", "eval_tokens=8"] if "train.py" in words else []
        done = script(*(words if words[0] == "torchrun" else words[1:]), *short, cwd=clone)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert done.stdout, command


def test_the_embedded_data_is_what_its_script_makes(clone, tmp_path):
    before = {p.name: p.read_bytes() for p in (ROOT / "data").iterdir() if p.suffix in (".jsonl", ".txt")}
    shutil.copyfile(clone / "data" / "make.py", tmp_path / "make.py")
    subprocess.run([sys.executable, tmp_path / "make.py"], check=True, capture_output=True)
    assert len(before) >= 3 and all((tmp_path / name).read_bytes() == content for name, content in before.items())


def test_train_and_held_out_chats_do_not_overlap():
    import json
    read = lambda name: [json.loads(line) for line in (ROOT / "data" / name).open()]
    train, held = ({c["messages"][0]["content"] for c in read(name)} for name in ("chats.jsonl", "chats_val.jsonl"))
    assert not train & held and len({c["task"] for c in read("chats_val.jsonl")}) >= 4


def test_the_embedded_base_is_small_and_loads():
    import model
    folder = ROOT / "data" / "base"
    assert (folder / "model.safetensors").stat().st_size < 5e6 and model.load(folder)[1]["vocab_size"] >= 259


def test_the_readme_says_how_many_lines_each_script_has():
    for path in [*SCRIPTS, "configs/__init__.py"]:
        lines = len((ROOT / path).read_text().splitlines())
        said = int(re.search(rf"`{re.escape(path)}`[^|]*\|\s*(\d+)", README)[1])
        assert abs(said - lines) <= 5, f"{path} has {lines} lines, the README says {said}"


def test_the_readme_names_every_section_and_every_metric(tiny):
    defaults = configs.read_file(configs.HERE / "defaults.yaml")
    table = README.split("## Every key")[1].split("\n## ")[0]
    for key, value in defaults.items():
        assert f"`{key}`" in table, key
    import log, train
    loaded = tiny("max_steps=1")
    train.main(*loaded)
    metrics = README.split("## What is logged")[1].split("\n## ")[0]
    for record in log.read(loaded[0]["out_dir"]):
        for key in record:
            assert f"`{re.sub('val/[^/]+/', 'val/LABEL/', key)}`" in metrics, key


def test_a_default_is_written_once():
    """Every key of the defaults says what it means beside it; no other yaml or script states a default of the
    schema."""
    text = (configs.HERE / "defaults.yaml").read_text()
    lines = [line for line in text.splitlines() if re.match(r"\s*[a-z_]+:", line)]
    named = [line.split(":")[0].strip() for line in lines if "#" not in line and not line.rstrip().endswith(":")]
    assert set(named) <= {"optimizer", "order"}, f"without a meaning: {named}"
    for path in SCRIPTS:
        own = re.search(r"cfg(\[[^]]+\])*\.get\(", (ROOT / path).read_text())
        assert not own, f"{path} falls back to a default of its own"


def test_imports_run_one_way():
    allowed = {"tokenize_data.py": set(), "model.py": {"tokenize_data"}, "shard.py": {"model", "tokenize_data"},
               "sampler.py": {"tokenize_data"}, "log.py": set(), "checkpoint.py": {"model", "shard", "tokenize_data"},
               "configs/__init__.py": set(), "configs/__main__.py": set(),
               "train.py": {"checkpoint", "log", "model", "sampler", "shard", "tokenize_data"}}
    names = {p.removesuffix(".py") for p in SCRIPTS}
    for path, may in allowed.items():
        text = (ROOT / path).read_text()
        words = set()
        for line in re.findall(r"^\s*(?:import|from) (.+)$", text, re.M):
            words |= set(re.findall(r"\w+", line.split(" as ")[0] if "," not in line else line))
        imported = words & names
        assert imported <= may, (path, imported)
