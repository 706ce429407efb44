"""The README and the scripts' docstrings: their commands run, their numbers and tables are right.

Tests marked `release` check the published text against the code. They run in CI and are skipped
elsewhere (conftest.py), so that an experiment in a checkout does not turn them red.
"""
import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest

import configs
from conftest import ROOT

SCRIPTS = ["tokenize_data.py", "model.py", "shard.py", "sampler.py", "checkpoint.py", "train.py",
           "log.py"]
README = (ROOT / "README.md").read_text()


def find_commands():
    """All torchrun and python commands of the README's shell blocks and the docstrings, each once.

    Commands that hold a placeholder in capitals (PATH, FILE) are left out.
    """
    texts = re.findall(r"```sh\n(.*?)```", README, re.S)
    for path in [*SCRIPTS, "configs/__init__.py", "configs/__main__.py", "data/make.py"]:
        texts.append((ROOT / path).read_text().split('"""')[1])
    commands = []
    for line in "\n".join(texts).splitlines():
        line = line.strip().split("   ")[0].split("  #")[0]
        for command in line.split("&&"):
            command = command.strip().rstrip(":")
            is_command = re.match(r"(torchrun|python) \S+(\.py|configs)", command)
            if is_command and not re.search(r"\b(N_MB|RUN|PATH|FILE)\b", command):
                commands.append(command)
    return list(dict.fromkeys(commands))


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the files that git tracks, without anybody's out/ folder."""
    folder = tmp_path_factory.mktemp("clone") / "repo"
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in files.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    return folder


def test_readme_commands_run(clone, script):
    commands = find_commands()
    assert len(commands) > 12 and commands[0] == "torchrun train.py configs/ft.yaml lr=1e-4"
    for command in commands:
        words = shlex.split(command)
        words = ["1" if word == "34" else word for word in words]    # megabytes of drills
        if "train.py" in words:
            words += ["max_steps=2", "eval_prompts=2", "eval_tokens=8"]
            if command != commands[0]:                   # which is enough of evaluation
                words += ["eval_every=0", "batch_size=8"]
        if words[0] == "python" or command != commands[0]:
            words = words[1:]                            # torchrun on one rank starts a python
        done = script(*words, cwd=clone)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert done.stdout, command


def test_embedded_data_is_what_make_writes(clone, tmp_path):
    files = [path for path in (ROOT / "data").iterdir() if path.suffix in (".jsonl", ".txt")]
    shutil.copyfile(clone / "data" / "make.py", tmp_path / "make.py")
    subprocess.run([sys.executable, tmp_path / "make.py"], check=True, capture_output=True)
    assert len(files) >= 3
    for path in files:
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_embedded_train_and_validation_chats_do_not_overlap():
    questions = {}
    tasks = {}
    for name in ("chats.jsonl", "chats_val.jsonl"):
        chats = [json.loads(line) for line in (ROOT / "data" / name).open()]
        questions[name] = {chat["messages"][0]["content"] for chat in chats}
        tasks[name] = {chat["task"] for chat in chats}
    assert not questions["chats.jsonl"] & questions["chats_val.jsonl"]
    assert len(tasks["chats_val.jsonl"]) >= 4


def test_embedded_base_is_small_and_loads():
    import model
    folder = ROOT / "data" / "base"
    assert (folder / "model.safetensors").stat().st_size < 5e6
    assert model.load(folder)[1]["vocab_size"] >= 259


@pytest.mark.release
@pytest.mark.parametrize("path", [*SCRIPTS, "configs/__init__.py"])
def test_readme_states_the_lines_of_each_script(path):
    n_lines = len((ROOT / path).read_text().splitlines())
    stated = re.search(rf"`{re.escape(path)}`[^|]*\|\s*([\d,]+)", README)
    assert stated, f"the README does not state the lines of {path}"
    assert abs(int(stated[1].replace(",", "")) - n_lines) <= 5, f"{path} has {n_lines} lines"


@pytest.mark.release
def test_readme_names_every_key_of_the_config():
    table = README.split("## Every key")[1].split("\n## ")[0]
    for key in configs.read_file(configs.HERE / "defaults.yaml"):
        assert f"`{key}`" in table, key


@pytest.mark.release
def test_readme_names_every_metric(tiny):
    import log
    import train
    cfg, _, explicit = tiny("max_steps=1")
    train.main(cfg, explicit)
    table = README.split("## What is logged")[1].split("\n## ")[0]
    for record in log.read(cfg["out_dir"]):
        for key in record:
            name = re.sub("val/[^/]+/", "val/LABEL/", key)
            assert f"`{name}`" in table, key


@pytest.mark.release
def test_defaults_are_explained_and_written_once():
    """Every key of defaults.yaml has a comment, and no script has a default of its own."""
    text = (configs.HERE / "defaults.yaml").read_text()
    lines = [line for line in text.splitlines() if re.match(r"\s*[a-z_]+:", line)]
    without_comment = {line.split(":")[0].strip() for line in lines
                       if "#" not in line and not line.rstrip().endswith(":")}
    assert without_comment <= {"optimizer", "order"}
    for path in SCRIPTS:
        fallback = re.search(r"cfg(\[[^]]+\])*\.get\(", (ROOT / path).read_text())
        assert not fallback, f"{path}: {fallback[0]}"


ALLOWED_IMPORTS = {
    "configs/__init__.py": set(),
    "configs/__main__.py": set(),
    "tokenize_data.py": set(),
    "model.py": {"tokenize_data"},
    "shard.py": {"model", "tokenize_data"},
    "sampler.py": {"tokenize_data"},
    "checkpoint.py": {"model", "shard", "tokenize_data"},
    "log.py": {"sampler", "shard", "tokenize_data"},
    "train.py": {"checkpoint", "log", "model", "sampler", "shard", "tokenize_data"},
}


@pytest.mark.release
@pytest.mark.parametrize("path", list(ALLOWED_IMPORTS))
def test_scripts_import_in_one_direction(path):
    """No script imports train.py, and there are no cycles."""
    text = (ROOT / path).read_text()
    words = set()
    for names in re.findall(r"^\s*(?:import|from) (.+)$", text, re.M):
        if "," not in names:
            names = names.split(" as ")[0]
        words |= set(re.findall(r"\w+", names))
    scripts = {name.removesuffix(".py") for name in SCRIPTS}
    assert words & scripts <= ALLOWED_IMPORTS[path]
