"""The README, docs/ and the scripts' docstrings: their commands run, their numbers and tables are right.

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
import launch
import tokenize_data
from conftest import ROOT

SCRIPTS = ["tokenize_data.py", "model.py", "shard.py", "sampler.py", "checkpoint.py", "train.py",
           "log.py"]
README = (ROOT / "README.md").read_text()
FIRST_COMMAND = "torchrun train.py configs/ft.yaml"


def find_commands():
    """All torchrun and python commands of the README's shell blocks and the docstrings, each once.

    Commands that hold a placeholder in capitals (PATH, FILE) are left out. The model of the README
    is on the hub; data/base takes its place.
    """
    texts = re.findall(r"```sh\n(.*?)```", README.replace("Qwen/Qwen2.5-0.5B-Instruct", "data/base"), re.S)
    for path in [*SCRIPTS, "configs/__init__.py", "configs/__main__.py", "data/make.py"]:
        texts.append((ROOT / path).read_text().split('"""')[1])
    commands = []
    for line in "\n".join(texts).splitlines():
        line = line.strip().split("   ")[0].split("  #")[0]
        for command in line.split("&&"):
            command = command.strip().rstrip(":")
            is_command = re.match(r"(torchrun|python) (.* )?(\S+\.py|-m (configs|experiments))", command)
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
    # the user's own files, as the README names them
    chats = (ROOT / "data" / "chats.jsonl").read_text().splitlines(keepends=True)
    (folder / "chats.jsonl").write_text("".join(chats[:200]))
    (folder / "book.txt").write_text("".join(json.loads(line)["messages"][0]["content"] + "\n" for line in chats))
    return folder


def run_command(command, clone, script):
    """Run a command of the README in the clone, shortened; return its finished processes."""
    words = shlex.split(command)
    words = ["1" if word == "34" else word for word in words]        # megabytes of drills
    if "train.py" in words or any(word.startswith("experiments.") for word in words):
        words += ["max_steps=2", "eval_prompts=2", "eval_tokens=8"]
        if command != FIRST_COMMAND:                     # which is enough of evaluation
            words += ["eval_every=0", "batch_size=8"]
    if words == ["python", "model.py", "out/ft"]:        # a chat, which needs a terminal
        words += ["hello", "max_tokens=4"]
    if words[1] == "--nproc_per_node":
        assert words[2] == "2"
        return launch.run_ranks(2, words[3:], cwd=clone)
    if words[0] == "python" or command != FIRST_COMMAND:
        words = words[1:]                                # torchrun on one rank starts a python
    return [script(*words, cwd=clone)]


def test_readme_commands_run(clone, script):
    commands = find_commands()
    assert len(commands) > 25 and FIRST_COMMAND in commands
    for command in commands:
        for rank, done in enumerate(run_command(command, clone, script)):
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
            assert done.stdout or rank > 0, command


def test_readme_chats_are_read(tmp_path):
    """The lines of JSON that show the format of chats."""
    [lines] = re.findall(r"```json\n(.*?)```", README, re.S)
    for line in lines.splitlines():
        record = tokenize_data.normalize_record(line.encode(), "README.md")
        assert record["messages"][-1]["role"] == "assistant"


def find_keys(text):
    """What a text has in backticks that looks like a key of the config or an assignment to one."""
    words = re.findall(r"`\"?([a-z_]+(?:\.[A-Za-z_]+)*)(?:=[^`]*)?`", text)
    return [word.replace("NAME.", "") for word in words]


@pytest.mark.release
def test_phyagi_page_names_keys_that_exist():
    """The right column of docs/phyagi.md, and the README's keys of configs."""
    keys = configs.flat(configs.read_file(configs.HERE / "defaults.yaml"))
    known = {".".join(key.split(".")[:n]) for key in keys for n in range(1, 5)}
    for line in (ROOT / "docs" / "phyagi.md").read_text().splitlines():
        if line.startswith("| `"):
            for key in find_keys(line.split("|")[2].split(". ")[0]):
                key = re.sub(r"data\.(train|validation)\.(?=\w)", "data.source.", key)
                assert key in known or "." not in key and key in configs.families(), line


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
def test_metrics_page_names_every_metric(tiny):
    import log
    import train
    cfg, _, explicit = tiny("max_steps=1")
    train.main(cfg, explicit)
    table = (ROOT / "docs" / "metrics.md").read_text()
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
    "tokenize_data.py": {"log"},
    "model.py": {"log", "tokenize_data"},
    "shard.py": {"log", "model", "tokenize_data"},
    "sampler.py": {"tokenize_data"},
    "checkpoint.py": {"log", "model", "shard", "tokenize_data"},
    "log.py": {"model", "sampler", "shard", "tokenize_data"},
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
