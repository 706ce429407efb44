"""configs/: layers and their provenance, the schema, references, errors in one line, helpers of the scripts."""
import ast
import copy
import json
import shutil
import os
import re
import signal
import subprocess
import sys

import pytest
import yaml

import configs
from conftest import ROOT

SCHEMA = {"lr": 0.1, "steps": 10, "name": "x", "flag": False, "list": [1, 2], "any": None, "free": {},
          "eval_every": 100, "a": {"b": 1, "c": {"d": "deep"}, "e": 2.5}}


def load(*argv, **kw):
    return configs.load(list(argv), defaults=SCHEMA, **kw)


def file(tmp_path, text, name="x.yaml"):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def error_of(function, *args, **kw):
    """The text of the UserError that a call raises; it is one line."""
    with pytest.raises(configs.UserError) as e:
        function(*args, **kw)
    assert "\n" not in str(e.value), str(e.value)
    return str(e.value)


def assert_names(text, words):
    assert all(word in text for word in words), text


# ---- layers

def test_load_merges_layers_in_order_and_names_the_layer_of_each_value(tmp_path):
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


def test_load_prefers_a_users_value_that_equals_the_default():
    cfg, source, explicit = load("steps=10", imported={"steps": 5})
    assert cfg["steps"] == 10 and source["steps"] == "cli" and explicit == {"steps": 10}


def test_load_calls_imported_with_a_resolved_copy():
    seen = []
    def imported(cfg):
        seen.append(copy.deepcopy(cfg))
        cfg["lr"] = 77.0                                             # changes only the copy
        return {"steps": 3}
    cfg, source, _ = load("name=${a.c.d}", imported=imported)
    assert seen[0]["name"] == "deep" and cfg["lr"] == 0.1 and cfg["steps"] == 3 and source["steps"] == "imported"


def test_load_replaces_lists_and_null_whole_and_accepts_any_key_in_open_sections():
    cfg, source, explicit = load("any={x: 1, y: [2]}", "free.k.j=3", "list=[]")
    assert cfg["any"] == {"x": 1, "y": [2]} and cfg["free"] == {"k": {"j": 3}} and cfg["list"] == []
    assert source["any.x"] == "cli" and source["free.k.j"] == "cli" and "free" not in source
    cfg, source, _ = load("any=null", imported={"any": {"x": 1}})
    assert cfg["any"] is None and source["any"] == "cli" and "any.x" not in source
    cfg, source, _ = load("any={x: 1}", "any=null", "any={y: 2}", imported={"any": {"x": 3}})
    assert cfg["any"] == {"y": 2} and source["any.y"] == "cli" and "any.x" not in source


def test_load_twice_gives_the_same_and_changes_no_argument():
    schema, imported, argv = copy.deepcopy(SCHEMA), {"a": {"b": 3}, "list": [9]}, ["free.x=[1]", "a.e=3"]
    first = configs.load(argv, imported=imported, defaults=schema)
    first[0]["list"].append(1)
    first[0]["a"]["b"] = 77
    first[2]["free"]["x"].append(2)
    assert configs.load(argv, imported=imported, defaults=schema)[0]["list"] == [9]
    assert schema == SCHEMA and imported == {"a": {"b": 3}, "list": [9]} and argv == ["free.x=[1]", "a.e=3"]
    cfg = configs.load([])[0]
    cfg["betas"].append(1)
    cfg["data"]["train"]["a"] = {}
    assert configs.load([])[0]["betas"] == [0.9, 0.95] and configs.load([])[0]["data"]["train"] == {}


def test_load_derives_values_and_fills_sources():
    cfg, source, explicit = configs.load(["lr=1e-3", "data.train.a.path=x", "data.source.weight=2",
                                          "data.train.b.path=y", "data.train.b.weight=1"])
    assert cfg["min_lr"] == pytest.approx(1e-4) and source["min_lr"] == "derived" and "min_lr" not in explicit
    assert cfg["model"]["n_kv_heads"] == cfg["model"]["n_heads"]
    assert cfg["model"]["head_dim"] * cfg["model"]["n_heads"] == cfg["model"]["d_model"]
    assert cfg["data"]["train"]["a"]["weight"] == 2.0 and source["data.train.a.weight"] == "cli"
    assert source["data.train.a.label"] == "default" and "data.train.a" not in source
    assert explicit == {"lr": 1e-3, "data": {"source": {"weight": 2.0},
                                             "train": {"a": {"path": "x"}, "b": {"path": "y", "weight": 1.0}}}}
    assert sorted(source) == sorted(configs.flat(cfg))


def test_load_joins_relative_paths_to_their_roots(tmp_path):
    argv = ["data.train.a.path=a.jsonl", "data.validation.b.path=/b.jsonl", "out_dir=~/run"]
    cfg, source, explicit = configs.load(argv, env={})
    assert cfg["data"]["train"]["a"]["path"] == "a.jsonl" and cfg["data"]["cache_dir"] == "out/tokens"
    cfg, source, explicit = configs.load(argv, env={"DATA_ROOT": "/d", "OUTPUT_ROOT": "/o"})
    assert cfg["data"]["train"]["a"]["path"] == "/d/a.jsonl" and cfg["data"]["validation"]["b"]["path"] == "/b.jsonl"
    assert cfg["data"]["cache_dir"] == "/o/out/tokens" and cfg["out_dir"] == os.path.expanduser("~/run")
    assert source["data_root"] == "default" and source["data.train.a.path"] == "cli"
    assert explicit["data"]["train"]["a"]["path"] == "a.jsonl" and "data_root" not in explicit
    again, _, _ = configs.load([file(tmp_path, configs.dump(explicit))], env={"DATA_ROOT": "/d", "OUTPUT_ROOT": "/o"})
    assert again == cfg
    assert configs.load(["output_root=/x", "out_dir=a"], env={"OUTPUT_ROOT": "/o"})[0]["out_dir"] == "/x/a"


def test_load_joins_a_relative_root_once(tmp_path):
    """A printed config, all of it loaded again, names the same folders."""
    cfg, _, _ = configs.load(["data_root=d", "output_root=o", "data.train.a.path=a.jsonl", "out_dir=run"], env={})
    assert cfg["out_dir"] == os.path.abspath("o/run") and cfg["data"]["cache_dir"] == os.path.abspath("o/out/tokens")
    for value in (cfg["data"]["train"]["a"]["path"], os.path.abspath("d/a.jsonl")):
        again, _, _ = configs.load(["data_root=d", "output_root=o", f"out_dir={cfg['out_dir']}",
                                    f"data.cache_dir={cfg['data']['cache_dir']}", f"data.train.a.path={value}"], env={})
        assert again == cfg


PATHS = ("out_dir", "data_root", "output_root", "resume", "reference_model", "data.tokenizer", "data.chat_template",
         "data.cache_dir", "data.train.a.path", "data.validation.b.path")


@pytest.mark.parametrize("key", PATHS)
def test_load_expands_home_and_environment_in_every_path(tmp_path, key):
    """On the command line, in a file, and in a variable that a default or a ${...} takes."""
    env = {"DISK": "/disk", "WHERE": "$DISK/x"}
    in_file = file(tmp_path, configs.dump(configs.nested(key, "$DISK/x")))
    for argv, want in (([f"{key}=~/x"], os.path.expanduser("~/x")), ([f"{key}=$DISK/x"], "/disk/x"), ([in_file], "/disk/x"),
                       ([f"{key}=${{oc.env:WHERE}}"], "/disk/x"), ([f"{key}=/a$$b"], "/a$b")):
        cfg, _, explicit = configs.load(argv, env=env)
        assert configs.get(cfg, key) == want
        assert configs.get(explicit, key) != want                # a run's config.yaml has it as it was typed
    for value, words in (("$NOWHERE/x", ["environment variable NOWHERE is not set"]), ("a$", ["$$ is a dollar sign"]),
                         ("~nobody_of_this_name/x", ["nobody's home"])):
        assert_names(error_of(configs.load, [f"{key}={value}"], env=env), [key, *words])


def test_load_refuses_empty_folders_and_sources_without_a_name():
    for argv, words in ((["out_dir="], ["out_dir: must be a folder"]), (["out_dir= "], ["out_dir: must be a folder"]),
                        (["data.cache_dir="], ["data.cache_dir: must"]),
                        (["data.train=d/my-chats.jsonl"], ["data.train:", "data.train.my_chats.path=d/my-chats.jsonl"]),
                        (["data.train.path=x.txt"], ["data.train.path:", "data.train.x.path=x.txt"]),
                        (["data.validation.b=x.txt"], ["data.validation.b:", "data.validation.b.path=x.txt"]),
                        (["data.train.split=test"], ["data.train.NAME.split=test"]),
                        (["out_dir=${HOME}/x"], ["${HOME} is not a key", "${oc.env:HOME}"])):
        assert_names(error_of(configs.load, argv, env={"HOME": "/h"}), words)


def test_load_says_where_it_looked_for_a_model(monkeypatch, tmp_path):
    """Relative paths start at the working folder, which may be another one than that of the config."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    error = error_of(configs.load, [str(ROOT / "configs" / "ft.yaml"), "model.init_from=nowhere/base"])
    assert_names(error, [str(tmp_path / "nowhere" / "base")])


def test_read_text_of_all_encodings(tmp_path):
    """UTF-8 with or without a byte order mark and with any line ends; others are named."""
    text = "# é\nlr: 0.5\n"
    for content in (text.encode(), b"\xef\xbb\xbf" + text.encode(), text.replace("\n", "\r\n").encode()):
        (tmp_path / "x.yaml").write_bytes(content)
        assert load(str(tmp_path / "x.yaml"))[0]["lr"] == 0.5 and configs.read_text(tmp_path / "x.yaml") == text
    for encoding in ("UTF-16", "UTF-32", "LATIN1"):
        (tmp_path / "x.yaml").write_bytes(text.encode(encoding))
        assert_names(error_of(load, str(tmp_path / "x.yaml")), ["x.yaml", "not UTF-8", f"iconv -f {encoding}"])
    for content, words in ((b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), (b"<!doctype HTML>", "web page"),
                           (b"\x1f\x8b\x08\0", "gunzip")):
        (tmp_path / "x.yaml").write_bytes(content)
        assert_names(error_of(load, str(tmp_path / "x.yaml")), ["x.yaml", words])


# ---- values

@pytest.mark.parametrize("text, value", [
    ("true", True), ("false", False), ("null", None), ("None", None), ("~", None), ("3", 3), ("-3", -3), ("1e-4", 1e-4),
    ("1E5", 1e5), ("2.", 2.0), (".5", 0.5), ("-1.5e+3", -1500.0),
    ("[1, 1e-4, no]", [1, 1e-4, "no"]), ("{a: 1, b: 1e-4}", {"a": 1, "b": 1e-4}), ("no", "no"), ("on", "on"),
    ("yes", "yes"), ("010", "010"), ("1:30", "1:30"),
    ("2026-11-20", "2026-11-20"), ("0x10", "0x10"), ("1_000", "1_000"), ("", ""), ("a=b=c", "a=b=c"),
    ("'quoted'", "'quoted'")])
def test_parse_scalar_reads_words_alike_on_the_command_line_and_in_files(tmp_path, text, value):
    cfg, _, _ = load(f"any={text}")
    assert cfg["any"] == value and type(cfg["any"]) is type(value)
    if text not in ("", "a=b=c", "'quoted'"):
        cfg, _, _ = load(file(tmp_path, f"any: {text}"))
        assert cfg["any"] == value and type(cfg["any"]) is type(value)


def test_parse_value_takes_the_text_of_a_string_key_as_it_is():
    for text in ("1e-4", "true", "null", "[1]", "{a: 1}", "", "a=b", "010"):
        assert load(f"name={text}")[0]["name"] == text
    assert configs.load(["data.bos_token=null"])[0]["data"]["bos_token"] is None
    assert configs.load(["data.bos_token=1"])[0]["data"]["bos_token"] == "1"
    assert configs.load(["resume=1e3"])[0]["resume"] == "1e3"


def test_load_keeps_a_count_an_int_and_a_fraction_a_float():
    assert type(load("eval_every=1")[0]["eval_every"]) is int and type(load("eval_every=1.0")[0]["eval_every"]) is float
    cfg, _, _ = configs.load(["save_every=1.0", "warmup_steps=1", "data.validation_split=0.5", "epochs=2.5"])
    assert (cfg["save_every"], type(cfg["save_every"])) == (1.0, float) and cfg["epochs"] == 2.5
    assert (cfg["warmup_steps"], type(cfg["warmup_steps"])) == (1, int) and cfg["data"]["validation_split"] == 0.5


def test_load_converts_ints_where_only_a_float_fits():
    cfg, _, explicit = configs.load(["weight_decay=2", "min_lr=0", "betas=[0, 0.5]", "shard.lora.r=8",
                                     "shard.lora.alpha=16", "max_seconds=60", "data.tokenizer=a.tiktoken", "data.special_tokens={a.b: 3}"])
    values = [cfg["weight_decay"], cfg["min_lr"], *cfg["betas"], cfg["shard"]["lora"]["alpha"], cfg["max_seconds"]]
    assert values == [2, 0, 0, 0.5, 16, 60] and {type(value) for value in values} == {float}
    assert type(explicit["betas"][0]) is float
    assert cfg["data"]["special_tokens"] == {"a.b": 3} and configs.load(["weight_decay=2.5"])[0]["weight_decay"] == 2.5


def test_load_takes_one_name_as_a_list_of_one_only_where_the_schema_says_so(tmp_path):
    assert configs.load(["log.to=wandb"])[0]["log"]["to"] == ["wandb"]
    assert configs.load(["log.to=wandb"])[2] == {"log": {"to": ["wandb"]}}
    assert configs.load([file(tmp_path, "log: {to: mlflow}")])[0]["log"]["to"] == ["mlflow"]
    assert "list of str" in error_of(configs.load, ["shard.lora.targets=q_proj"])


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
    strings.remove("${lr}")                                          # would be resolved
    assert configs.load([file(tmp_path, configs.dump({"any": d}))], defaults=SCHEMA)[2] == {"any": d}


def test_compose_needs_no_libyaml(tmp_path, monkeypatch):
    """PyYAML may be built without its fast parser."""
    _, schema = configs.read_defaults()
    monkeypatch.setattr(configs, "YAML_PARSER", yaml.SafeLoader)
    assert configs.read_defaults.__wrapped__()[1] == schema
    assert_names(error_of(configs.read_file, file(tmp_path, "a: 1\nb: [")), ["x.yaml", "line", "not valid YAML"])


# ---- one item of a list

def test_parse_override_changes_one_item_of_a_list(tmp_path):
    path = file(tmp_path, "param_groups:\n- {match: embed, lr: 0.5}\n- {match: norm, weight_decay: 0.0}")
    cfg, source, explicit = configs.load([path, "param_groups.0.lr=2", "param_groups.1.match=bias|norm"])
    want = [{"match": "embed", "lr": 2}, {"match": "bias|norm", "weight_decay": 0.0}]
    assert cfg["param_groups"] == want and source["param_groups"] == "cli" and explicit == {"param_groups": want}
    assert configs.load(["betas.1=0.99"])[0]["betas"] == [0.9, 0.99]
    assert configs.load(["betas.1=0.99"])[2] == {"betas": [0.9, 0.99]}
    assert load("list=[5, 6, 7]", "list.2=1e-3")[0]["list"] == [5, 6, 1e-3]
    assert load("free.0=1", "any.0.x=2")[0]["free"] == {"0": 1}      # not lists: ordinary keys


def test_parse_override_reports_a_wrong_index(tmp_path):
    path = file(tmp_path, "param_groups: [{match: a}]\nbetas: ['${eps}', 0.5]")
    text = error_of(configs.load, [path, "param_groups.1.lr=2"])
    assert text == "param_groups.1: out of range; param_groups has 1 items, counted from 0 (from cli)"
    assert "0 items" in error_of(configs.load, ["param_groups.0.lr=2"])
    assert "0 items" in error_of(configs.load, ["model.rope_layers.0=1"])
    assert_names(error_of(configs.load, ["betas.0.x=1"]), ["betas.0", "not a section"])
    assert_names(error_of(configs.load, ["betas.0=x"]), ["betas", "list of float", "'x'"])
    assert_names(error_of(configs.load, [file(tmp_path, "betas: {0: 0.5}", "y.yaml")]), ["betas", "list", "y.yaml"])


# ---- errors

@pytest.mark.parametrize("argv, words", [
    (["stepz=1"], ["stepz", "cli", "the nearest is steps"]),
    (["a.c.dd=1"], ["a.c.dd", "a.c.d"]),
    (["optimizer.lr=1"], ["optimizer", "the nearest is lr"]),
    (["steps=1.5"], ["steps", "must be int", "1.5", "cli"]),
    (["steps=true"], ["steps", "int", "true"]),
    (["lr=abc"], ["lr", "float", "'abc'"]),
    (["flag=1"], ["flag", "true or false", "1"]),
    (["list=3"], ["list", "must be list"]),
    (["a=3"], ["a:", "section", "3"]),
    (["a=null"], ["a:", "section", "null"]),
    (["lr.x=3"], ["lr", "float", "a section (x)"]),
    (["steps=null"], ["steps", "null"]),
    (["eval_every=x"], ["eval_every"]),
    (["nothere.yaml"], ["nothere.yaml"]),
    (["--lr=1"], ["--lr=1", "write lr=..."]),
    (["any={a: 1"], ["any"]),
    (["any=3", "any.x=4"], ["any"])])
def test_load_reports_key_constraint_value_and_layer(argv, words):
    assert_names(error_of(load, *argv), words)


def test_load_reports_the_file_of_a_mistake(tmp_path):
    for text, words in (("stepz: 1", ["stepz", "x.yaml", "steps"]), ("steps: '1'", ["steps", "'1'", "x.yaml"]),
                        ("lr: [", ["x.yaml", "line"]), ("lr: 1\nlr: 2", ["x.yaml", "line 2", "twice"]),
                        ("- 1", ["x.yaml"]), ("a:", ["a:", "section", "null"]),
                        ("name: 3", ["name", "str", "3"])):
        assert_names(error_of(load, file(tmp_path, text)), words)


@pytest.mark.parametrize("argv, words", [
    (['param_groups=[{match: "a("}]'], ["param_groups", "regular expression"]),
    (["param_groups=[3]"], ["param_groups", "list of map"]),
    (["param_groups=[{lr: 1}]"], ["param_groups", "match"]),
    (["param_groups=[{match: embed, lr: x}]"], ["param_groups.lr", "'x'"]),
    (["param_groups=[{match: embed, lrr: 1}]"], ["param_groups.lrr", "param_groups.lr"]),
    (["param_groups=[{match: embed, lr: -1}]"], ["param_groups.lr", ">= 0"]),
    (["param_groups=[{match: embed, weight_decay: .nan}]"], ["param_groups.weight_decay", "nan"]),
    (["momentum=1.0"], ["momentum", "< 1"]), (["betas=[0.9]"], ["betas", "two"]), (["betas=[0.9, 1]"], ["betas", "< 1"]),
    (["patience=2"], ["patience", "best"]), (["shard.mesh.shard=0"], ["shard.mesh.shard", ">= 1"]),
    (["shard.mesh.replicate=1.5"], ["shard.mesh.replicate", "int"]), (["max_seconds=-1"], ["max_seconds"]),
    (["shard.compile=no"], ["shard.compile", "true or false or null"]), (["shard.compile=1"], ["shard.compile"]),
    (["model.init_std=-1"], ["model.init_std"]), (["model.rope_theta=-1.0"], ["model.rope_theta"]),
    (["lr=.inf"], ["lr"]), (["lr=nan"], ["lr"]), (["lr=-1"], ["lr"]), (["resume="], ["resume", "latest"]),
    (["param_groups=[{match: a, train: false, lr: 2}]"], ["groups with train: false have no lr and no weight_decay"]),
    (["param_groups=[{match: a, train: 0}]"], ["param_groups.train: must be true or false; got 0"]),
    (["optimizer=sgd", "shard.master_dtype=bf16"],
     ["shard.master_dtype: must be float32 with optimizer=sgd; bfloat16 is for adamw"]),
    (["dtype=fp8"], ["dtype: must be one of auto, bfloat16, float16, float32; got 'fp8' (from cli)"]),
    (["batch_size=0"], ["batch_size", ">= 1"]), (["max_steps=x"], ["max_steps", "int"]),
    (["warmup_steps=1.5"], ["warmup_steps", "int", "<= 1"]), (["data.ignore_token_id_range=[3, 1]"], ["first, last"]),
    (["data.ignore_token_ids=[x]"], ["data.ignore_token_ids", "list of int"]),
    (["data.special_tokens.x=1.5"], ["data.special_tokens.x", "int"]),
    (["data.special_tokens.x=-1"], ["data.special_tokens.x", "int >= 0"]),
    (["model.rope_layers=[1]"], ["model.rope_layers", "4"]), (["model.n_kv_heads=3"], ["model.n_kv_heads", "divisor"]),
    (["model.head_dim=33"], ["model.head_dim", "even"]), (["model.resid_pdrop=1"], ["model.resid_pdrop", "< 1"]),
    (["model.n_heads=0"], ["model.n_heads", ">= 1"]), (["model.n_kv_heads=2.0"], ["model.n_kv_heads", "int"]),
    (["model.n_heads=100"], ["model.head_dim", "derived"]), (["model.norm=nope"], ["rmsnorm", "layernorm"]),
    (["shard.lora.alpha=x"], ["shard.lora.alpha", "float"]),
    (["data.train.a.pth=x"], ["data.train.a.pth", "the nearest is data.train.a.path"]),
    (["data.train.a.weight=2"], ["data.train.a.path"]), (["data.train.a.shape=x"], ["data.train.a.shape", "chat"]),
    (["data.train.a=x"], ["data.train.a", "section"]), (["data.train=x"], ["data.train", "section"]),
    (["data=${lr}"], ["data", "section"]), (["model.init_from=nowhere"], ["model.init_from", "nowhere"])])
def test_load_checks_ranges_choices_and_combinations(argv, words):
    assert_names(error_of(configs.load, argv), words)


def test_load_reports_what_used_to_pass_or_end_in_a_traceback(tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    for argv, words in (
            ([file(tmp_path, "model.d_model: 64")], ["model.d_model", "x.yaml", "model: {d_model"]),
            ([file(tmp_path, "data: {train: {a.path: x}}", "y.yaml")], ["data.train.a.path", "y.yaml"]),
            ([file(tmp_path, "lr: \x00", "z.yaml")], ["z.yaml", "YAML"]),
            ([file(tmp_path, "[1]: 2", "k.yaml")], ["k.yaml", "line 1", "key"]),
            ([str(tmp_path)], [str(tmp_path), "is a folder"]),
            ([f"model.init_from={tmp_path}"], ["config.json", "object", "list"])):
        assert_names(error_of(configs.load, argv), words)


def test_check_config_file_names_what_was_meant(tmp_path, monkeypatch):
    """A mistyped file, spaces around =, a folder, a run's folder, a data file."""
    folder = tmp_path / "configs"
    folder.mkdir()
    for name in ("ft.yaml", "pretrain.yaml"):
        (folder / name).write_text("lr: 1\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").write_text("lr: 1\n")
    monkeypatch.chdir(tmp_path)
    spaces = "values are key=value, without spaces"
    for argv, text in (
            (["configs/ft.yam"], "configs/ft.yam: there is no such config file; " + spaces + "; the nearest is configs/ft.yaml"),
            (["pretrian.yaml"], "the nearest is configs/pretrain.yaml"),
            (["lr", "=", "1e-4"], "lr: there is no such config file; " + spaces),
            (["configs/ft.yaml", "lr=", "1e-4"], "1e-4: there is no such config file; " + spaces),
            (["epochs:3"], spaces), (["configs"], "configs: is a folder, not a config file; name a .yaml file in it"),
            (["out"], "out: is a folder, not a config file; out/config.yaml"),
            (["data/chats.jsonl"], "data/chats.jsonl: is not a config file (.yaml); data is named by data.train.NAME.path=")):
        assert text in error_of(configs.load, argv)
    assert configs.load(["configs/ft.yaml", "configs/pretrain.yaml"])[0]["lr"] == 1


def test_source_without_name_shows_an_example_for_null(tmp_path):
    """A section whose lines are not indented."""
    path = file(tmp_path, "data:\n  train:\n  a: {path: x}\n")
    assert "data.train.NAME.path=FILE; got null" in error_of(configs.load, [path])


def test_coerce_takes_short_names_of_values(tmp_path):
    """dtype=bf16 is bfloat16, and is recorded so."""
    for text, dtype in (("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32"), ("float32", "float32")):
        cfg, _, explicit = configs.load([f"dtype={text}"])
        assert cfg["dtype"] == explicit["dtype"] == dtype
    for text in ("fp8", "half", "bf"):
        assert_names(error_of(configs.load, [f"dtype={text}"]), ["dtype: must be one of", "bfloat16", repr(text)])


def test_load_reports_values_in_the_words_of_yaml(tmp_path):
    """true and false in words, quoted numbers, and words for resume that other trainers have."""
    for word, value in (("TRUE", True), ("FALSE", False), ("NULL", None), ("None", None)):
        assert configs.load([f"shard.compile={word}"])[0]["shard"]["compile"] is value
    assert "must be true or false or null; got 'yes'" in error_of(configs.load, ["shard.compile=yes"])
    path = file(tmp_path, 'lr: "1e-4"\n')
    assert error_of(configs.load, [path]).endswith(f"got '1e-4' (from {path}); remove the quotes")
    for word in ("true", "False", "yes", ""):
        assert_names(error_of(configs.load, [f"resume={word}"]), ["resume: must be auto", "never, latest", repr(word)])


# ---- unknown keys

def test_suggestion_knows_the_names_of_other_trainers():
    """What users of HF, TRL, axolotl, LLaMA-Factory, torchtune and torchrun type, with or without dashes."""
    keys = {"learning_rate": "lr", "model_name_or_path": "model.init_from", "lora_r": "shard.lora.r",
            "report_to": "log.to", "bf16": "dtype=bfloat16", "save_steps": "save_every", "lora_target": "shard.lora.targets",
            "gradient_checkpointing": "shard.recompute", "template": "data.chat_template", "val_size": "data.validation_split",
            "eval_dataset": "data.validation.NAME.path", "n_epochs": "epochs", "early_stopping": "patience",
            "resume_from": "resume", "model_id": "model.init_from", "tokenizer_path": "data.tokenizer"}
    for name, key in keys.items():
        for arg in (f"{name}=1", f"--{name}", f"--{name.replace('_', '-')}=1"):
            assert error_of(configs.load, [arg]).endswith(f"; it is {key} here"), name
    for name, words in (("dropout", "model.resid_pdrop"), ("gradient_accumulation_steps", "batch_size counts"),
                        ("lora_dropout", "shard.lora.dropout"), ("qlora", "shard.quantize=nf4"),
                        ("nproc_per_node", "torchrun --nproc_per_node N"), ("eval_batch_size", "micro_tokens bounds"),
                        ("split_special_tokens", "always split"), ("trust_remote_code", "never executed")):
        assert words in error_of(configs.load, [f"{name}=1"]), name


@pytest.mark.parametrize("key, hint", [
    ("learning_rate", "it is lr here"), ("bf16", "it is dtype=bfloat16 here"), ("groups", "it is param_groups here"),
    ("warmup", "it is warmup_steps here"), ("decay", "it is decay_steps here"), ("optim.learning_rate", "it is lr here"),
    ("gradient_accumulation_steps", "batch_size counts the documents of a whole step; micro_tokens bounds memory"),
    ("bach_size", "the nearest is batch_size"), ("n_layers", "the nearest is model.n_layers"),
    ("modle.n_layers", "the nearest is model.n_layers"), ("path", "the nearest is data.train.NAME.path"), ("shard.lora.rr", "the nearest is shard.lora.r")])
def test_suggestion_names_our_key(key, hint):
    assert error_of(configs.load, [f"{key}=1"]) == f"{key}: unknown key (from cli); {hint}"


@pytest.mark.parametrize("key", ["foo", "temperature", "model.foobar", "trainer", "chunk", "a.b.c"])
def test_suggestion_names_no_key_for_a_far_word(key):
    text = error_of(configs.load, [f"{key}=1"])
    assert text == f"{key}: unknown key (from cli); configs/defaults.yaml lists all keys"


def test_suggestion_of_an_option_with_dashes():
    for argv, hint in ((["--learning_rate", "3e-4"], "it is lr here"), (["--lr", "1"], "write lr=..."),
                       (["--gradient-accumulation-steps=4"], "batch_size counts"), (["-x"], "configs/defaults.yaml lists"),
                       (["--model.d_model=3"], "write model.d_model=...")):
        assert_names(error_of(configs.load, argv), [argv[0], "without dashes; " + hint])


def test_find_synonym_leads_to_keys_that_exist():
    _, schema = configs.read_defaults()
    table = configs.read_file(configs.HERE / "synonyms.yaml")
    assert len(table) >= 60
    for name, synonym in table.items():
        assert name not in schema, name
        assert configs.find_synonym(name, schema) == synonym, name
        assert configs.find_synonym(name, configs.schema_of(SCHEMA)) in (None, synonym)
        if "=" in synonym and " " not in synonym:
            configs.load([synonym, "best=loss"])
    assert configs.find_synonym("dropout", configs.schema_of(SCHEMA)) is None


# ---- the schema

def test_read_defaults_states_a_constraint_for_every_key():
    """Each constraint is readable: a value of the right kind fits, and the default itself does."""
    defaults, schema = configs.read_defaults()
    cfg = configs.load([], env={})[0]
    kind = r"int|float|bool|str|path|map|null|one of .+|names? in [\w.]+: .+|section of .+"
    bounds = r"( (>=|>|<=|<) [\d.]+( and (>=|>|<=|<) [\d.]+)*)?"
    pattern = re.compile(rf"((list|map) of )?({kind}){bounds}")
    for key in configs.flat(defaults):
        for alternative in schema[key].split(" or "):
            assert pattern.fullmatch(alternative), f"{key}: {schema[key]}"
        if not schema[key].startswith("section"):
            assert configs.fits(configs.get(cfg, key), schema[key]), key
    assert schema["lr"] == "float >= 0" and schema["dtype"] == "one of auto, bfloat16, float16, float32"
    assert schema["model.loss"].startswith("name in model.LOSSES: cross_entropy")


def test_read_defaults_keys_have_a_meaning():
    """After the constraint, on the same line or the next, there is a sentence about the key."""
    text = (configs.HERE / "defaults.yaml").read_text()
    unexplained = re.findall(r"^ *(\w+): .*?# [^.]*(?:\.[^ ][^.]*)*\.$\n(?! {20,}#)", text, re.M)
    assert unexplained in ([], ["norm"])                             # its choices say all


def test_fits_and_coerce_follow_the_grammar():
    for value, constraint, good in (
            (1, "int >= 1", True), (0, "int >= 1", False), (True, "int >= 0", False), (None, "int >= 1 or null", True),
            (0.5, "float >= 0 and < 1", True), (1.0, "float >= 0 and < 1", False), (float("inf"), "float >= 0", False),
            (float("inf"), "float", True), ("a", "one of a, b", True), ("c", "one of a, b", False), (1, "one of a, b", False),
            ("c", "name in X: a, b", True), (["c"], "names in X: a, b", True), ([1, 2], "list of int >= 1", True),
            ([1, "x"], "list of int", False), ({}, "map", True), ([], "map", False), ("x", "any", True)):
        assert configs.fits(value, constraint) is good, (value, constraint)
    assert configs.coerce([1, 2.5], "list of float") == [1.0, 2.5] and configs.coerce("a", "names in X: b") == ["a"]
    assert type(configs.coerce(1, "float or null")) is float and type(configs.coerce(1, "int or float")) is int


def test_read_defaults_lists_the_names_that_the_scripts_register():
    pytest.importorskip("torch")
    import log, model, sampler, train                                # noqa: F401, for the dicts below
    for constraint in configs.read_defaults()[1].values():
        match = re.match(r"names? in (\w+)\.(\w+): (.*)", constraint)
        if match:
            registered = getattr(sys.modules[match[1]], match[2])
            assert sorted(match[3].split(", ")) == sorted(registered), match[2]


def test_load_accepts_names_that_an_experiment_may_register():
    cfg, source, _ = configs.load(["model.loss=focal", "log.to=[trackio]"])
    text = error_of(configs.check_builtin_names, cfg, source)
    assert_names(text, ["model.loss: must be one of cross_entropy", "got focal (from cli)", "model.LOSSES"])
    assert_names(error_of(configs.check_builtin_names, *configs.load(["log.to=paper"])[:2]), ["log.to", "paper", "wandb"])
    assert_names(error_of(configs.check_builtin_names, *configs.load(["sampler.order=by_loss"])[:2]), ["weighted"])
    configs.check_builtin_names(*configs.load(["configs/ft.yaml"])[:2])


def test_check_builtin_names_accepts_what_an_edited_script_has(tmp_path, monkeypatch):
    """A loss written into model.py needs no other change."""
    for file in ("model.py", "train.py", "sampler.py", "log.py"):
        shutil.copy(configs.HERE.parent / file, tmp_path)
    with open(tmp_path / "model.py", "a") as file:
        file.write("LOSSES['focal'] = cross_entropy\n")
    cfg, source, _ = configs.load(["model.loss=focal"])
    configs.read_defaults()
    monkeypatch.setattr(configs, "HERE", tmp_path / "configs")
    configs.check_builtin_names(cfg, source)
    cfg["model"]["loss"] = "vocal"
    assert_names(error_of(configs.check_builtin_names, cfg, source), ["model.loss", "got vocal"])


# ---- references

def test_resolve_replaces_references_once_after_the_last_merge(tmp_path):
    one = file(tmp_path, "name: ${a.c.d}/${steps}\nlr: ${a.e}\nany: ${list}\na: {b: '${steps}'}\n"
                         "free: {x: '${oc.env:NOPE,${a.c.d}}', y: '${oc.env:HOME}'}")
    cfg, source, explicit = load(one, "steps=4", "a.e=0.5", "list=[7, '${steps}']", env={"HOME": "/h"})
    assert cfg["name"] == "deep/4" and cfg["lr"] == 0.5 and cfg["any"] == [7, 4] and cfg["a"]["b"] == 4
    assert cfg["free"] == {"x": "deep", "y": "/h"}
    assert explicit["name"] == "${a.c.d}/${steps}" and source["lr"] == one
    assert type(load("steps=${oc.env:N,4}", env={})[0]["steps"]) is int
    assert load("steps=${oc.env:N,4}", env={"N": "9"})[0]["steps"] == 9
    assert load("name=${oc.env:N}", env={"N": "1e-4"})[0]["name"] == "1e-4"
    assert load("name=<${oc.env:N,}>", env={})[0]["name"] == "<>"
    assert configs.load(["data.ignore_token_ids=['${samples}']"])[0]["data"]["ignore_token_ids"] == [2]


@pytest.mark.parametrize("argv, words", [
    (["lr=${a.e}", "a.e=${lr}"], ["circle", "lr", "a.e"]), (["name=${name}"], ["circle"]),
    (["name=${oc.env:NOPE}"], ["NOPE"]), (["name=${stepz}"], ["stepz", "steps"]),
    (["steps=${name}"], ["steps", "int", "'x'"]), (["name=${lr"], ["name", "brace"]),
    (["name=-${oc.env:ODD}"], ["ODD", "${"]),
    (["list=${oc.env:CUT}"], ["list (from environment variable CUT)", "not valid YAML"])])
def test_resolve_reports_references_that_cannot_be(argv, words):
    env = {"ODD": "${oc.env:ODD}", "CUT": "[1, "}
    assert_names(error_of(load, *argv, env=env), words)


def test_resolve_defaults_that_refer_and_references_to_sections():
    schema = {"lr": 0.1, "min_lr": "${lr}", "a": {"b": 1}, "free": {}}
    assert configs.load(["lr=0.2"], defaults=schema)[0]["min_lr"] == 0.2
    assert configs.load(["min_lr=0.5"], defaults=schema)[0]["min_lr"] == 0.5
    cfg, source, _ = configs.load(["free=${a}"], defaults=schema)
    assert cfg["free"] == {"b": 1} and source["free.b"] == "cli"


# ---- the imported layer

def test_check_family_allows_what_config_json_can_express():
    cfg, source, _ = configs.load(["model.family=gpt2", "model.activation=gelu_new"])
    assert cfg["model"]["norm"] == "layernorm" and cfg["model"]["qkv_bias"] and source["model.norm"] == "imported"
    for argv, words in ((["model.family=nope"], ["model.family", "gpt2"]),
                        (["model.norm=layernorm"], ["model.norm", "rmsnorm"]),
                        (["model.qkv_bias=true"], ["attention_bias"]),
                        (["model.family=gpt2", "model.n_kv_heads=2"], ["model.n_kv_heads", "4"]),
                        (["model.family=gpt2", "model.head_dim=16"], ["model.head_dim"])):
        assert_names(error_of(configs.load, argv), words)


def test_translate_finds_keys_in_several_places_and_refuses_others():
    small = {"model_type": "llama", "vocab_size": 8, "num_hidden_layers": 1, "hidden_size": 8,
             "num_attention_heads": 2, "intermediate_size": 8, "hidden_act": "silu"}
    translate = configs.hf_config.translate
    assert translate(small, "f")["rope_theta"] == 10000.0 and translate(small, "f")["rope_scaling"] is None
    newer = translate(small | {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "f")
    assert newer["rope_theta"] == 5.0 and newer["rope_scaling"] is None
    scaled = translate(small | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}}, "f")
    assert scaled["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert_names(error_of(translate, {"model_type": "t5"}, "f"), ["f: model_type", "llama", "t5", "families.yaml"])
    assert_names(error_of(translate, {**small, "hidden_size": 8, "vocab_size": 8, "model_type": "qwen2",
                                      "use_sliding_window": True}, "f"), ["use_sliding_window", "false", "true"])
    del small["hidden_size"]
    assert_names(error_of(translate, small, "f"), ["hidden_size", "d_model"])


def test_translate_takes_the_word_that_the_reference_takes():
    """rope_scaling before rope_parameters, what is in the section before what is beside it, defaults per family."""
    small = {"vocab_size": 8, "num_hidden_layers": 4, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}

    def read(kind, **keys):
        return configs.hf_config.translate(small | {"model_type": kind} | keys, "f")
    both = {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 7.0}}
    assert read("llama", **both)["rope_theta"] == 7.0
    assert read("llama", **both, rope_scaling={"type": "linear", "factor": 2})["rope_theta"] == 5.0
    assert read("gpt_neox", rope_theta=5.0)["rope_theta"] == 10000.0
    assert read("gpt_neox", rotary_pct=0.5, rope_parameters={"partial_rotary_factor": 1.0})["partial_rotary_factor"] == 1.0
    assert read("qwen2")["n_kv_heads"] == 32 and read("qwen2", num_key_value_heads=None)["n_kv_heads"] is None
    assert read("phi")["activation"] == "gelu_new" and read("smollm3")["rope_layers"] == [1, 1, 1, 0]
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling = read("llama", rope_scaling=llama3, max_position_embeddings=64)["rope_scaling"]
    assert scaling["original_max_position_embeddings"] == 64
    assert read("mistral", layer_types=["full_attention"] * 4)["sliding_window"] is None
    assert read("gemma2")["layer_types"] == ["sliding_attention", "full_attention"]
    assert read("gemma3_text", sliding_window_pattern=2)["layer_types"] == ["sliding_attention", "full_attention"]
    of_all = {"layer_types": ["full_attention"] * 4, "sliding_window": None}
    assert read("exaone4", sliding_window_pattern=None, **of_all)["layer_types"] == ["full_attention"] * 4
    assert read("granitemoehybrid", layer_types=["attention"] * 4)["layer_types"] == ["full_attention"] * 4
    gemma = read("gemma3_text", rope_theta=5.0, rope_parameters={"sliding_attention": {"rope_theta": 7.0}})
    assert (gemma["rope_theta"], gemma["rope_local_theta"]) == (5.0, 7.0)
    assert read("hunyuan_v1_dense", head_dim=4, rope_scaling={"type": "dynamic", "alpha": 3.0})["rope_theta"] == 90000.0
    assert read("granite", head_dim=16)["head_dim"] == 16 and read("granite", head_dim=None)["head_dim"] is None


@pytest.mark.parametrize("kind, keys, words", [
    ("llama", {"is_causal": False}, ["is_causal must be true, or missing; got false"]),
    ("llama", {"quantization_config": {"quant_method": "awq"}}, ["quantization_config", "made from"]),
    ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types"]),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, ["rope_scaling.rope_type", "linear", "dynamic"]),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_slow": 40}}, ["rope_scaling.beta_slow", "beta_fast"]),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": 1}}, ["rope_scaling.truncate", "bool"]),
    ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": 2.0}},
     ["rope_scaling.long_factor", "list"]),
    ("gemma3_text", {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
     ["rope_parameters.sliding_attention", "linear"]),
    ("gemma3_text", {"rope_parameters": {"full_attention": 5}}, ["full_attention", "5"]),
    ("gemma3_text", {"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
    ("olmo3", {"rope_parameters": {"sliding_attention": {"rope_theta": 5.0}}}, ["rope_local_base_freq", "5.0"]),
    ("exaone4", {"sliding_window_pattern": "LG"}, ["sliding_window_pattern", "LG"]),
    ("gemma4_text", {"enable_moe_block": True}, ["enable_moe_block must be false", "true"]),
    ("gemma4_text", {"layer_types": ["sliding_attention", "full_attention"], "per_layer_config": {"0": {"head_dim": 4}}},
     ["per_layer_config", "{'0': {'head_dim': 4}}"]),
    ("mistral3", {"text_config": {"model_type": "mixtral"}}, ["model_type must be 'mistral'", "mixtral"]),
    ("granitemoehybrid", {"num_local_experts": 4}, ["num_local_experts must be 0", "4"]),
    ("granitemoehybrid", {"layer_types": ["mamba", "attention"]}, ["layer_types", "mamba"]),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, ["rope_parameters", "for all blocks"]),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.5},
     ["partial_rotary_factor", "0.5"]),
    ("llama", {"layer_types": 5}, ["layer_types", "5"]),
    ("llama", {"rope_scaling": {"type": [1]}}, ["rope_scaling.rope_type", "[1]"]),
    ("llama", {"rms_norm_eps": None}, ["rms_norm_eps", "float", "null"]),
    ("llama", {"tie_word_embeddings": "yes"}, ["tie_word_embeddings"]),
    ("llama", {"text_config": {"model_type": "llama"}}, ["text_config"]),
    ("qwen3", {"use_sliding_window": True}, ["use_sliding_window"]),
    ("phi", {"qk_layernorm": True}, ["qk_layernorm"]),
    ("gpt_neox", {"head_dim": 16}, ["head_dim must be 4", "16"])])
def test_translate_names_the_key_that_is_not_computed(kind, keys, words):
    small = {"vocab_size": 8, "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    error = error_of(configs.hf_config.translate, small | {"model_type": kind} | keys, "x/config.json")
    assert_names(error, ["x/config.json: ", *words])


def test_read_model_says_what_is_there_and_what_helps(tmp_path):
    """A typo, a URL, a file, a checkpoint, a run with and without an export, an adapter."""
    for folder, file_name in (("run/checkpoints/00000002", "state.json"), ("run/adapter", "adapter_config.json"),
                              ("run/hf", "config.json"), ("half/checkpoints/00000002", "state.json"),
                              ("peft", "adapter_config.json"), ("empty", "README.md")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / file_name).write_text("{}")
    for name, words in (("emty", ["does not exist", f"did you mean {tmp_path / 'empty'}"]),
                        ("no/where/at/all", ["does not exist"]), ("peft/adapter_config.json", ["is a file"]),
                        ("run/checkpoints/00000002", ["is a checkpoint", "checkpoint.py export", "resume="]),
                        ("run", ["is the folder of a run", str(tmp_path / "run" / "hf")]),
                        ("half", ["without an export", "checkpoint.py export"]),
                        ("run/adapter", ["is an adapter", str(tmp_path / "run" / "hf")]),
                        ("peft", ["is an adapter", "merge_and_unload"]), ("empty", ["has no config.json"])):
        error = error_of(configs.load, [f"model.init_from={tmp_path / name}"])
        assert_names(error, [f"model.init_from: {tmp_path / name} ", *words])
    error = error_of(configs.load, ["model.init_from=https://huggingface.co/owner/name/tree/main"])
    assert_names(error, ["model.init_from: https:", "is a URL", "owner/name: owner/name"])
    assert_names(error_of(configs.load, ["model.init_from=hf://owner/name"]), ["owner/name: owner/name"])


def test_read_json_names_a_pointer_of_git_lfs(tmp_path):
    file(tmp_path, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "config.json")
    assert_names(error_of(configs.load, [f"model.init_from={tmp_path}"]), ["config.json: ", "Git LFS pointer"])


def test_load_refuses_an_eps_of_zero():
    """Without a gradient, such as that of a token that never occurs, adamw would divide 0 by 0."""
    assert_names(error_of(configs.load, ["eps=0"]), ["eps: must be float > 0", "got 0 (from cli)"])


@pytest.mark.parametrize("argv, words", [
    (["shard.lora.targets=[q_proj]"], ["shard.lora.targets: ['q_proj'] (from cli) has no effect", "shard.lora.r=8"]),
    (["shard.lora.alpha=16"], ["shard.lora.alpha", "shard.lora.r=8"]),
    (["schedule=constant", "min_lr=0.1"], ["min_lr", "schedule=constant"]),
    (["decay_steps=5"], ["decay_steps", "schedule=wsd"]), (["momentum=0.9"], ["momentum", "adamw"]),
    (["optimizer=sgd", "betas=[0.9, 0.99]"], ["betas", "optimizer=sgd"]), (["optimizer=sgd", "eps=1e-6"], ["eps"]),
    (["data.train.a.path=x", "eval_prompts=5"], ["eval_prompts", "data.validation_split"]),
    (["data.train.a.path=x", "eval_every=5"], ["eval_every", "data.validation_split"]),
    (["model.positions=learned", "model.rope_theta=5.0", "model.family=native"], ["model.rope_theta", "positions"]),
    (["model.init_from=data/base", "model.init_std=0.1"], ["model.init_std", "model.init_from"]),
    (["data.tokenizer=bytes", "data.tokenizer_pattern=x"], ["data.tokenizer_pattern", ".tiktoken"]),
    (["log.project=x"], ["log.project", "log.to=wandb"]),
    (["shard.reshard_after_forward=false", "shard.mesh.shard=1"], ["shard.reshard_after_forward", "shard.mesh.shard=2"]),
    (["model.rope_scaling={type: linear, factor: 2.0, rope_theta: 5.0}"], ["model.rope_scaling.rope_theta", "linear"])])
def test_load_refuses_an_option_without_effect(argv, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert_names(error_of(configs.load, argv), words)


def test_load_forgets_an_option_that_a_later_layer_leaves_without_effect(tmp_path):
    """So a run's config.yaml, where all layers are one, loads again."""
    path = file(tmp_path, "betas: [0.8, 0.9]\nshard: {lora: {r: 4, alpha: 2.0}}\nlr: 0.5")
    cfg, source, explicit = configs.load([path, "optimizer=sgd", "shard.lora.r=0", "eval_every=0", "eval_prompts=0"])
    assert cfg["betas"] == [0.9, 0.95] and source["betas"] == "default" and cfg["shard"]["lora"]["alpha"] == 0
    assert "betas" not in explicit and explicit["shard"] == {"lora": {"r": 0}} and explicit["lr"] == 0.5
    assert configs.load([file(tmp_path, configs.dump(explicit), "again.yaml")])[0] == cfg
    both = file(tmp_path, "betas: [0.8, 0.9]\noptimizer: sgd", "both.yaml")
    assert_names(error_of(configs.load, [both]), ["betas", "both.yaml"])


# ---- helpers of the scripts

def test_pop_options_separates_a_scripts_own_options():
    argv = ["a.yaml", "show=3", "lr=1", "ids=true", "name=null"]
    assert configs.pop_options(argv, show=0, ids=False, top_p=1.0, name="") == (
        {"show": 3, "ids": True, "top_p": 1.0, "name": "null"}, ["a.yaml", "lr=1"])
    assert configs.pop_options(["top_p=1"], top_p=0.5) == ({"top_p": 1.0}, [])
    assert_names(error_of(configs.pop_options, ["show=x"], show=0), ["show", "int", "'x'"])
    assert_names(error_of(configs.pop_options, ["shw=3"], show=0), ["shw: unknown option; the nearest is show"])
    assert configs.pop_options(["seed=1"], seeds=0)[1] == ["seed=1"]           # a key of the config


def test_bind_options_checks_and_binds():
    def loss(logits, targets, gamma, z_loss=0.0, kind="plain", flag=False):
        return logits, targets, gamma, z_loss, kind, flag
    bound = configs.bind_options("model.loss", loss, 2, {"gamma": None, "kind": "x", "flag": True, "z_loss": 1})
    assert bound(1, 2) == (1, 2, None, 1, "x", True)
    for options, words in (({"gama": 2}, ["model.loss_options.gama", "gamma"]), ({}, ["model.loss_options.gamma", "missing"]),
                           ({"gamma": 1, "z_loss": "abc"}, ["model.loss_options.z_loss", "number", "abc"])):
        assert_names(error_of(configs.bind_options, "model.loss", loss, 2, options), words)
    def optimizer(params, cfg, **options):
        return options
    assert configs.bind_options("optimizer", optimizer, 2, {}) is optimizer
    assert configs.bind_options("optimizer", optimizer, 2, {"any": 1})(0, 0) == {"any": 1}


@pytest.mark.parametrize("argv, rank, printed", [
    ([], "0", True), (["--help"], "0", True), (["x", "-h"], "0", True), (["--help"], "1", False)])
def test_exit_with_help_prints_the_doc_once(argv, rank, printed, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(SystemExit) as e:
        configs.exit_with_help("\nHow to start.\n", argv)
    assert e.value.code == 0 and capsys.readouterr().out == ("How to start.\n" if printed else "")
    configs.exit_with_help("doc", ["lr=1"])                          # returns
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL         # Ctrl-C: no traceback


def test_load_or_exit_reports_a_mistake_once(monkeypatch, capsys):
    for rank, text in (("0", "error: lrr: unknown key (from cli); the nearest is lr\n"), ("1", "")):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as e:
            configs.load_or_exit(["lrr=1"])
        assert e.value.code == 2 and capsys.readouterr().err == text
    assert configs.load_or_exit(["model.loss=focal"])[0]["model"]["loss"] == "focal"
    with pytest.raises(SystemExit):
        configs.load_or_exit(["model.loss=focal"], builtin_names=True)


def test_run_shortens_only_a_user_error(capsys):
    def user_mistake():
        raise configs.UserError("lr: is odd")
    def bug():
        a, b = [1, 2, 3]
    with pytest.raises(SystemExit) as e:
        configs.run(user_mistake)
    assert e.value.code == 1 and capsys.readouterr().err == "error: lr: is odd\n"
    with pytest.raises(ValueError, match="unpack"):
        configs.run(bug)


def test_run_shortens_a_user_error_of_a_script_reached_through_a_link(tmp_path):
    (tmp_path / "link").symlink_to(configs.HERE.parent)
    out = subprocess.run([sys.executable, "tokenize_data.py", "lrr=1"], cwd=tmp_path / "link",
                         env={"PYTHONPATH": str(tmp_path / "link")}, capture_output=True, text=True)
    assert out.returncode == 1 and out.stderr.startswith("error: lrr") and out.stderr.count("\n") == 1, out.stderr


def test_die_hands_torchrun_the_error(tmp_path, monkeypatch, capsys):
    """torchrun's report then ends with it, instead of with "To enable traceback see"."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit):
        configs.load_or_exit(["lrr=1"])
    error = json.loads((tmp_path / "error.json").read_text())["message"]
    assert error["extraInfo"]["py_callstack"] == capsys.readouterr().err.strip()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "gone" / "error.json"))    # left by an earlier command
    with pytest.raises(SystemExit):
        configs.load_or_exit(["lrr=1"])


TORCHRUN = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.mark.parametrize("env, words", [
    ({"WORLD_SIZE": "2"}, ["WORLD_SIZE: is 2", "RANK", "MASTER_ADDR", "unset WORLD_SIZE"]),
    ({"RANK": "1"}, ["RANK: is 1", "WORLD_SIZE is not set", "unset RANK"]),
    ({"LOCAL_RANK": "1"}, ["LOCAL_RANK: is 1", "LOCAL_WORLD_SIZE is not set", "unset LOCAL_RANK"]),
    (TORCHRUN | {"RANK": "2"}, ["RANK: is 2", "WORLD_SIZE is 2", "unset WORLD_SIZE RANK LOCAL_WORLD_SIZE"]),
    (TORCHRUN | {"LOCAL_RANK": "7"}, ["LOCAL_RANK: is 7", "LOCAL_WORLD_SIZE is 2"]),
    ({"WORLD_SIZE": "two"}, ["WORLD_SIZE: must be a number; got 'two'", "unset WORLD_SIZE"]),
    ({"LOCAL_RANK": ""}, ["LOCAL_RANK: must be a number; got ''"]),
    ({"TORCHELASTIC_RESTART_COUNT": "x"}, ["TORCHELASTIC_RESTART_COUNT: must be a number"]),
    ({"OMP_NUM_THREADS": "lots"}, ["OMP_NUM_THREADS: must be a number above 0; got 'lots'"]),
    ({"OMP_NUM_THREADS": "0"}, ["OMP_NUM_THREADS"]), ({"OMP_NUM_THREADS": "-2"}, ["OMP_NUM_THREADS"]),
    ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, ["SLURM_PROCID", "starts this 2 times", "torchrun"]),
    ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "0"}, ["starts this 8 times"])])
def test_check_launch_names_variables_that_contradict_each_other(env, words):
    """What torchrun, srun or a shell may have left in the environment."""
    with pytest.raises(SystemExit) as e:
        configs.check_launch(env)
    assert e.value.code.startswith("error: ") and "\n" not in e.value.code
    assert_names(e.value.code, words)


def test_check_launch_accepts_what_fits(capsys):
    one = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": "29500"}
    for env in ({}, one, TORCHRUN, TORCHRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, {"RANK": "0"},
                {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, {"OMP_NUM_THREADS": "4,2"}):
        configs.check_launch(env)
    assert capsys.readouterr().err == ""
    configs.check_launch({"SLURM_NTASKS": "8"})                      # sbatch --ntasks=8 without srun: one process
    assert capsys.readouterr().err.startswith("warning: SLURM_NTASKS: is 8")


def test_check_words_refuses_what_looks_like_an_option():
    """python model.py RUN hi temp=0.5"""
    options = {"temperature": 0.0, "prompt": ""}
    for word in ("temp=0.5", "--temperature", "--temperature=0.5", "-t"):
        assert_names(error_of(configs.check_words, ["out/ft", "hi", word], options),
                     [f"{word}: is not an option", "temperature, prompt", f"prompt={word}"])
    configs.check_words(["out/ft", "x=3, y=4, x+y=?", "-5", "what", "is", "a+b=c", "- an item"], options)


def test_exit_at_signals_cleans_up_and_restores_the_handlers(capsys):
    steps = []
    @configs.exit_at_signals()
    def work(number):
        try:
            signal.raise_signal(number)
            steps.append("goes on")
        finally:
            steps.append("cleans up")
    before = signal.getsignal(signal.SIGTERM)
    for number in (signal.SIGINT, signal.SIGTERM):
        with pytest.raises(SystemExit) as e:
            work(number)
        assert e.value.code == 128 + number and capsys.readouterr().err == f"stopped by signal {number}\n"
    assert steps == ["cleans up"] * 2 and signal.getsignal(signal.SIGTERM) == before


def test_configs_import_neither_torch_nor_numpy():
    code = ("import sys, configs; configs.load(['configs/ft.yaml']); "
            "print([m for m in ('torch', 'numpy') if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stderr


def test_main_prints_every_value_with_its_source(script):
    out = script("-m", "configs", "configs/ft.yaml", "lr=1e-4").stdout
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert rows["lr"] == ["cli", "0.0001"] and rows["model.d_model"][0] == "imported"
    assert rows["batch_size"][0] == "configs/ft.yaml" and rows["shard.lora.alpha"][0] == "derived"


def test_main_prints_usage_without_arguments(script):
    for argv in ([], ["--help"]):
        out = script("-m", "configs", *argv)
        assert out.returncode == 0 and "python -m configs configs/ft.yaml" in out.stdout and not out.stderr


def test_main_accepts_the_configs_of_the_project(script):
    names = [path.name for path in configs.HERE.glob("*.yaml")]
    runs = sorted(set(names) - {"families.yaml", "synonyms.yaml"})
    assert {"sft.yaml", "lora.yaml", "gpt2.yaml", "ft.yaml", "pretrain.yaml"} <= set(runs)
    for name in runs:
        out = script("-m", "configs", f"configs/{name}")
        assert out.returncode == 0 and "\nout_dir " in out.stdout, out.stderr


def test_load_or_exit_ends_torchrun_before_torch_with_one_line(script):
    out = script("torchrun", "train.py", "configs/ft.yaml", "lrr=1e-4")
    message = "error: lrr: unknown key (from cli); the nearest is lr"
    lines = out.stderr.splitlines()
    assert out.returncode and message in lines and lines[-2].endswith(message), out.stderr
    assert 'train.py", line' not in out.stderr                    # no traceback of ours
    out = script("-X", "importtime", "train.py", "configs/ft.yaml", "lrr=1e-4")
    assert out.returncode == 2 and "| torch" not in out.stderr
    assert out.stderr.splitlines()[-1] == "error: lrr: unknown key (from cli); the nearest is lr"


# ---- docs/config.md

def test_main_does_what_docs_config_md_shows(tmp_path):
    """Files of the page are written; each command's shown lines are in its output, apart from spaces."""
    for name in ("configs", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    env = {key: value for key, value in os.environ.items() if key not in ("DATA_ROOT", "OUTPUT_ROOT", "TAG")}
    commands = 0
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "docs/config.md").read_text(), re.M | re.S):
        if language == "yaml" and block.startswith("# "):
            file(tmp_path, block, block.split()[1])
        for command, shown in re.findall(r"^\$ python (.*)\n((?:[^$].*\n)*)", block, re.M):
            argv = re.findall(r"[^\s']+|'[^']*'", command)
            out = subprocess.run([sys.executable, *argv], cwd=tmp_path, env=env, capture_output=True, text=True)
            printed = [line.split() for line in (out.stdout + out.stderr).splitlines()]
            for line in shown.splitlines():
                assert line.split() in printed, f"{command}: {line}\n{out.stdout}{out.stderr}"
            commands += 1
    assert commands >= 8


def test_reading_figures_of_configs():
    """No line over 100 columns, no function over 50 lines."""
    for path in configs.HERE.glob("*.py"):
        text = path.read_text()
        assert max(map(len, text.splitlines())) <= 100, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 50, (path, node.name)
