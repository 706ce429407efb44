"""configs/: layers, origins, types, interpolation, and errors of one line."""
import copy, subprocess, sys

import pytest
import yaml

import configs

SCHEMA = {"lr": 0.1, "steps": 10, "name": "x", "flag": False, "list": [1, 2], "any": None, "free": {},
          "eval_every": 100, "a": {"b": 1, "c": {"d": "deep"}, "e": 2.5}}


def load(*argv, **kw):
    return configs.load(list(argv), defaults=SCHEMA, **kw)


def file(tmp_path, text, name="x.yaml"):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_layers_in_order_and_where_each_value_came_from(tmp_path):
    one = file(tmp_path, "lr: 1\na: {b: 2, c: {d: one}}", "one.yaml")
    two = file(tmp_path, "a: {c: {d: two}}\nlist: [3]", "two.yaml")
    imported = {"name": "imported", "steps": 5, "a": {"b": 99}}
    cfg, source, explicit = load("a.e=7", one, "name=cli", two, imported=imported)
    assert cfg == SCHEMA | {"lr": 1.0, "steps": 5, "name": "cli", "list": [3],
                            "a": {"b": 2, "c": {"d": "two"}, "e": 7.0}}
    assert type(cfg["lr"]) is float and type(cfg["a"]["e"]) is float
    assert source == {"lr": one, "steps": "imported", "name": "cli", "flag": "default", "list": two, "any": "default",
                      "free": "default", "eval_every": "default", "a.b": one, "a.c.d": two, "a.e": "cli"}
    assert explicit == {"lr": 1.0, "a": {"b": 2, "c": {"d": "two"}, "e": 7.0}, "list": [3], "name": "cli"}


def test_a_users_value_wins_even_where_it_equals_the_default():
    cfg, source, explicit = load("steps=10", imported={"steps": 5})
    assert cfg["steps"] == 10 and source["steps"] == "cli" and explicit == {"steps": 10}


def test_imported_may_be_a_callable_that_sees_a_resolved_copy():
    seen = []
    def imported(cfg):
        seen.append(copy.deepcopy(cfg))
        cfg["lr"] = 77.0                                             # its own copy: this goes nowhere
        return {"steps": 3}
    cfg, source, _ = load("name=${a.c.d}", imported=imported)
    assert seen[0]["name"] == "deep" and cfg["lr"] == 0.1 and cfg["steps"] == 3 and source["steps"] == "imported"


def test_null_is_a_value_lists_are_replaced_whole_and_free_sections_take_any_key():
    cfg, source, explicit = load("any={x: 1, y: [2]}", "free.k.j=3", "list=[]")
    assert cfg["any"] == {"x": 1, "y": [2]} and cfg["free"] == {"k": {"j": 3}} and cfg["list"] == []
    assert source["any.x"] == "cli" and source["free.k.j"] == "cli" and "free" not in source
    cfg, source, _ = load("any=null", imported={"any": {"x": 1}})
    assert cfg["any"] is None and source["any"] == "cli" and "any.x" not in source


@pytest.mark.parametrize("text, value", [
    ("true", True), ("false", False), ("null", None), ("None", None), ("~", None), ("3", 3), ("-3", -3), ("1e-4", 1e-4),
    ("1E5", 1e5), ("2.", 2.0), (".5", 0.5), ("-1.5e+3", -1500.0),
    ("[1, 1e-4, no]", [1, 1e-4, "no"]), ("{a: 1, b: 1e-4}", {"a": 1, "b": 1e-4}), ("no", "no"), ("on", "on"),
    ("yes", "yes"), ("010", "010"), ("1:30", "1:30"),
    ("2026-11-20", "2026-11-20"), ("0x10", "0x10"), ("1_000", "1_000"), ("", ""), ("a=b=c", "a=b=c"),
    ("'quoted'", "'quoted'")])
def test_words_mean_the_same_on_the_command_line_and_in_files(tmp_path, text, value):
    cfg, _, _ = load(f"any={text}")
    assert cfg["any"] == value and type(cfg["any"]) is type(value)
    if text not in ("", "a=b=c", "'quoted'"):
        cfg, _, _ = load(file(tmp_path, f"any: {text}"))
        assert cfg["any"] == value and type(cfg["any"]) is type(value)


def test_where_the_default_is_a_string_the_text_is_taken_as_it_stands():
    for text in ("1e-4", "true", "null", "[1]", "{a: 1}", "", "a=b", "010"):
        assert load(f"name={text}")[0]["name"] == text


@pytest.mark.parametrize("argv, words", [
    (["stepz=1"], ["stepz", "cli", "steps"]),
    (["a.c.dd=1"], ["a.c.dd", "a.c.d"]),
    (["optimizer.lr=1"], ["optimizer", "lr"]),
    (["steps=1.5"], ["steps", "an int", "1.5", "cli"]),
    (["steps=true"], ["steps", "an int", "True"]),
    (["lr=abc"], ["lr", "a float", "'abc'"]),
    (["flag=1"], ["flag", "true or false", "1"]),
    (["list=3"], ["list", "a list"]),
    (["a=3"], ["a", "a section", "3"]),
    (["a=null"], ["a", "a section", "null"]),
    (["lr.x=3"], ["lr", "not a section"]),
    (["steps=null"], ["steps", "null"]),
    (["eval_every=x"], ["eval_every"]),
    (["nothere.yaml"], ["nothere.yaml"]),
    (["--lr=1"], ["--lr=1", "lr="]),
    (["any={a: 1"], ["any"]),
    (["any=3", "any.x=4"], ["any"])])
def test_a_mistake_is_one_line_that_names_key_expectation_value_and_layer(argv, words):
    with pytest.raises(ValueError) as e:
        load(*argv)
    assert "\n" not in str(e.value) and all(w in str(e.value) for w in words), str(e.value)


def test_a_mistake_in_a_file_names_the_file(tmp_path):
    for text, words in (("stepz: 1", ["stepz", "x.yaml", "steps"]), ("steps: '1'", ["steps", "'1'", "x.yaml"]),
                        ("lr: [", ["x.yaml", "line"]), ("lr: 1\nlr: 2", ["x.yaml", "line 2", "twice"]),
                        ("- 1", ["x.yaml"]), ("a:", ["a", "a section", "null"]),
                        ("name: 3", ["name", "a string", "3"])):
        with pytest.raises(ValueError) as e:
            load(file(tmp_path, text))
        assert "\n" not in str(e.value) and all(w in str(e.value) for w in words), str(e.value)


def test_counts_and_fractions_keep_what_they_are():
    assert type(load("eval_every=1")[0]["eval_every"]) is int and type(load("eval_every=1.0")[0]["eval_every"]) is float
    cfg, _, _ = configs.load(["save_every=1.0", "warmup=1", "data.validation_split=0.5"])
    assert (cfg["save_every"], type(cfg["save_every"])) == (1.0, float)
    assert (cfg["warmup"], type(cfg["warmup"])) == (1, int) and cfg["data"]["validation_split"] == 0.5


def test_interpolation_resolves_once_after_the_last_merge(tmp_path):
    one = file(tmp_path, "name: ${a.c.d}/${steps}\nlr: ${a.e}\nany: ${list}\na: {b: '${steps}'}\n"
                         "free: {x: '${oc.env:NOPE,${a.c.d}}', y: '${oc.env:HOME}'}")
    cfg, source, explicit = load(one, "steps=4", "a.e=0.5", "list=[7, '${steps}']", env={"HOME": "/h"})
    assert cfg["name"] == "deep/4" and cfg["lr"] == 0.5 and cfg["any"] == [7, 4] and cfg["a"]["b"] == 4
    assert cfg["free"] == {"x": "deep", "y": "/h"}
    assert explicit["name"] == "${a.c.d}/${steps}" and source["lr"] == one
    assert type(load("steps=${oc.env:N,4}", env={})[0]["steps"]) is int
    assert load("steps=${oc.env:N,4}", env={"N": "9"})[0]["steps"] == 9
    assert load("name=${oc.env:N}", env={"N": "1e-4"})[0]["name"] == "1e-4"


@pytest.mark.parametrize("argv, words", [
    (["lr=${a.e}", "a.e=${lr}"], ["circle", "lr", "a.e"]), (["name=${name}"], ["circle"]),
    (["name=${oc.env:NOPE}"], ["NOPE"]), (["name=${stepz}"], ["stepz", "steps"]),
    (["steps=${name}"], ["steps", "an int", "'x'"]), (["name=${lr"], ["name", "brace"])])
def test_interpolation_that_cannot_be(argv, words):
    with pytest.raises(ValueError) as e:
        load(*argv, env={})
    assert "\n" not in str(e.value) and all(w in str(e.value) for w in words), str(e.value)


@pytest.mark.parametrize("argv, words", [
    (['groups=[{match: "a("}]'], ["groups", "regular expression"]), (["groups=[3]"], ["groups"]),
    (["groups=[{lr: 1}]"], ["groups", "match"]), (["groups=[{match: embed, lr: x}]"], ["groups"]),
    (["groups=[{match: embed, lr: -1}]"], ["groups", "below 0"]),
    (["groups=[{match: embed, weight_decay: .nan}]"], ["groups"]), (["momentum=1.0"], ["momentum", "below 1"]),
    (["patience=2"], ["patience", "best"]), (["shard.mesh.shard=0"], ["shard.mesh.shard", "1"]),
    (["shard.mesh.replicate=1.5"], ["shard.mesh.replicate", "an int"]), (["max_seconds=-1"], ["max_seconds"]),
    (["shard.compile=no"], ["shard.compile", "true"]), (["shard.compile=1"], ["shard.compile"]),
    (["model.init_std=-1"], ["model.init_std"]), (["model.rope_theta=-1.0"], ["model.rope_theta"])])
def test_ranges_and_choices_are_checked(argv, words):
    with pytest.raises(ValueError) as e:
        configs.load(argv)
    assert "\n" not in str(e.value) and all(w in str(e.value) for w in words), str(e.value)


def test_loading_twice_gives_the_same_and_changes_no_argument():
    schema, imported, argv = copy.deepcopy(SCHEMA), {"a": {"b": 3}, "list": [9]}, ["free.x=[1]", "a.e=3"]
    first = configs.load(argv, imported=imported, defaults=schema)
    first[0]["list"].append(1)
    first[0]["a"]["b"] = 77
    first[2]["free"]["x"].append(2)
    assert configs.load(argv, imported=imported, defaults=schema)[0]["list"] == [9]
    assert schema == SCHEMA and imported == {"a": {"b": 3}, "list": [9]} and argv == ["free.x=[1]", "a.e=3"]


def test_dump_reloads_as_the_same_values_and_types(tmp_path):
    strings = ["1e-4", "no", "on", "010", "1:30", "null", "None", "~", "true", "1", "1.0", "2026-11-20", "", " x ",
               "a: b", "# x", "é\n日本", "${lr}", ".inf", "nan", "[1]", "- x", "0x1F", "1_0", "=", "<<", "!x"]
    d = {"strings": strings, "numbers": [1, 1.0, 1e-4, 1e-8, 1e20, -0.5, float("inf")], "rest": [True, None, {}, []],
         "nested": {"a": {"b": {"1": 2, "no": 3}}}, "same": [strings[:1]] * 2}
    text = configs.dump(d)
    again = configs.read_file(file(tmp_path, text))
    def types(x):
        if isinstance(x, dict):
            return {k: types(v) for k, v in x.items()}
        return [types(v) for v in x] if isinstance(x, list) else type(x)
    assert again == d and types(again) == types(d) and yaml.safe_load(text) == d
    assert configs.load([file(tmp_path, configs.dump({"any": d}))], defaults=SCHEMA)[2] == {"any": d}


def test_this_projects_own_defaults():
    cfg, source, explicit = configs.load(["lr=1e-3", "data.train.a.path=x", "data.source.weight=2",
                                          "data.train.b.path=y", "data.train.b.weight=1"])
    assert cfg["min_lr"] == pytest.approx(1e-4) and source["min_lr"] == "derived" and "min_lr" not in explicit
    assert cfg["model"]["n_kv_heads"] == cfg["model"]["n_heads"]
    assert cfg["model"]["head_dim"] * cfg["model"]["n_heads"] == cfg["model"]["d_model"]
    assert cfg["data"]["train"]["a"]["weight"] == 2.0 and source["data.train.a.weight"] == "cli"
    assert source["data.train.a.label"] == "default"
    assert explicit == {"lr": 1e-3, "data": {"source": {"weight": 2.0},
                                             "train": {"a": {"path": "x"}, "b": {"path": "y", "weight": 1.0}}}}
    for argv, words in ((["dtype=fp8"], ["dtype", "bfloat16"]), (["batch_size=0"], ["batch_size", "at least 1"]),
                        (["data.train.a.pth=x"], ["data.train.a.pth", "path"]),
                        (["data.train.a.weight=2"], ["data.train.a.path"]),
                        (["data.train.a=x"], ["data.train.a", "section"]), (["warmup=1.5"], ["warmup"]),
                        (["max_steps=x"], ["max_steps"]),
                        (["model.init_from=nowhere"], ["model.init_from", "nowhere"]), (["lr=-1"], ["lr"]),
                        (["learning_rate=1"], ["learning_rate", "nearest"])):
        with pytest.raises(ValueError) as e:
            configs.load(argv)
        assert "\n" not in str(e.value) and all(w in str(e.value) for w in words), str(e.value)


def test_words_that_no_layer_may_say(tmp_path):
    """Each of these once went unnoticed, or ended in a traceback."""
    (tmp_path / "config.json").write_text("[1]")
    for argv, words in (
            ([file(tmp_path, "model.d_model: 64")], ["model.d_model", "x.yaml", "model: {d_model"]),
            ([file(tmp_path, "data: {train: {a.path: x}}", "y.yaml")], ["data.train.a.path", "y.yaml"]),
            ([file(tmp_path, "lr: \x00", "z.yaml")], ["z.yaml", "YAML"]),
            ([file(tmp_path, "[1]: 2", "k.yaml")], ["k.yaml", "line 1", "key"]),
            ([str(tmp_path)], [str(tmp_path), "directory"]),
            (["model.n_heads=0"], ["model.n_heads", "at least 1"]),
            (["model.n_kv_heads=2.0"], ["model.n_kv_heads", "an int"]),
            (["shard.lora.alpha=x"], ["shard.lora.alpha", "number"]),
            ([f"model.init_from={tmp_path}"], ["config.json", "object", "list"])):
        with pytest.raises(ValueError) as e:
            configs.load(argv)
        assert "\n" not in str(e.value) and all(w in str(e.value) for w in words), str(e.value)


def test_weight_decay_is_no_count_though_it_ends_like_one():
    cfg, _, _ = configs.load(["weight_decay=2"])
    assert cfg["weight_decay"] == 2.0 and type(cfg["weight_decay"]) is float
    assert configs.load(["weight_decay=2.5", "data.special_tokens={a.b: 3}"])[0]["data"]["special_tokens"] == {"a.b": 3}


def test_a_users_mistake_is_one_line_also_where_the_folder_is_reached_through_a_link(tmp_path):
    (tmp_path / "link").symlink_to(configs.HERE.parent)
    out = subprocess.run([sys.executable, "tokenize_data.py", "lrr=1"], cwd=tmp_path / "link",
                         env={"PYTHONPATH": str(tmp_path / "link")}, capture_output=True, text=True)
    assert out.returncode == 1 and out.stderr.startswith("error: lrr") and out.stderr.count("\n") == 1, out.stderr


def test_the_loader_starts_fast_and_imports_no_torch_or_numpy():
    code = ("import sys, configs; configs.load(['configs/ft.yaml']); "
            "print([m for m in ('torch', 'numpy') if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code],
                         cwd=configs.HERE.parent, capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stderr


def test_every_value_is_shown_with_its_source(script):
    out = script("-m", "configs", "configs/ft.yaml", "lr=1e-4").stdout
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert rows["lr"] == ["cli", "0.0001"] and rows["model.d_model"][0] == "imported"
    assert rows["batch_size"][0] == "configs/ft.yaml" and rows["shard.lora.alpha"][0] == "derived"


def test_a_wrong_key_ends_torchrun_before_torch_with_one_line_once(script):
    out = script("torchrun", "train.py", "configs/ft.yaml", "lrr=1e-4")
    assert out.returncode and out.stderr.count("lrr: unknown key (from cli); the nearest is lr") == 1
    out = script("-X", "importtime", "train.py", "configs/ft.yaml", "lrr=1e-4")
    assert out.returncode == 2 and "| torch" not in out.stderr
    assert out.stderr.splitlines()[-1] == "error: lrr: unknown key (from cli); the nearest is lr"


def test_a_family_has_what_its_config_json_can_say():
    cfg, source, _ = configs.load(["model.family=gpt2", "model.activation=gelu_new"])
    assert cfg["model"]["norm"] == "layernorm" and cfg["model"]["qkv_bias"] and source["model.norm"] == "imported"
    for argv, words in ((["model.family=nope"], ["model.family", "gpt2"]),
                        (["model.norm=layernorm"], ["model.norm", "rmsnorm"]),
                        (["model.qkv_bias=true"], ["attention_bias"]),
                        (["model.family=gpt2", "model.n_kv_heads=2"], ["model.n_kv_heads", "4"]),
                        (["model.family=gpt2", "model.head_dim=16"], ["model.head_dim"])):
        with pytest.raises(ValueError) as e:
            configs.load(argv)
        assert all(w in str(e.value) for w in words), str(e.value)


def test_a_default_may_refer_and_a_section_may_be_referred_to():
    schema = {"lr": 0.1, "min_lr": "${lr}", "a": {"b": 1}, "free": {}}
    assert configs.load(["lr=0.2"], defaults=schema)[0]["min_lr"] == 0.2
    assert configs.load(["min_lr=0.5"], defaults=schema)[0]["min_lr"] == 0.5
    assert configs.load(["free=${a}"], defaults=schema)[0]["free"] == {"b": 1}
