"""log.py: records, tables, pictures."""
import json, xml.etree.ElementTree as ET

import pytest
import torch

import configs, log


def logged(tmp_path, name, *losses, resumed=0):
    c = configs.load([f"out_dir={tmp_path / name}"])[0]
    writer = log.Log(c, len(losses) + resumed, resumed)
    for i, loss in enumerate(losses, 1 + resumed):
        writer.step({"step": i, "loss": torch.tensor(loss), "lr": 1e-3, "grad_norm": 1.0, "tok_per_s": 10.0,
                     "mfu": None, "seconds": float(i)})
    writer.validation({"step": len(losses) + resumed, "val/x/loss": 1.5, "val/x/exact_match": 0.25})
    writer.close()
    return tmp_path / name


def test_records_are_strict_json_one_a_line(tmp_path):
    folder = logged(tmp_path, "a", 2.0, float("nan"), float("inf"), 1.0)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    got = [json.loads(line, parse_constant=lambda c: pytest.fail(f"{c} is no JSON")) for line in lines]
    assert [r.get("loss") for r in got] == [2.0, None, None, 1.0, None]
    assert got[-1] == {"step": 4, "val/x/loss": 1.5, "val/x/exact_match": 0.25}


def test_going_on_drops_the_records_of_steps_done_again(tmp_path):
    folder = logged(tmp_path, "a", 4.0, 3.0, 2.0)
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text() + '{"step": 4, "lo')
    logged(tmp_path, "a", 1.0, resumed=2)
    assert [(r["step"], r.get("loss")) for r in log.read(folder)] == [(1, 4.0), (2, 3.0), (3, 1.0), (3, None)]


def test_a_full_disk_keeps_the_run_and_its_records(tmp_path, capsys):
    writer = log.Log(configs.load([f"out_dir={tmp_path}"])[0], 3)
    there, writer.file = writer.file, open("/dev/full", "ab", buffering=0)
    writer.validation({"step": 1, "val/x/loss": 3.0})
    writer.validation({"step": 2, "val/x/loss": 2.0})
    assert capsys.readouterr().out.count("No space left") == 2 and not log.read(tmp_path)
    writer.file = there                                              # somebody has made room
    writer.validation({"step": 3, "val/x/loss": 1.0})
    assert [r["step"] for r in log.read(tmp_path)] == [1, 2, 3]


def test_runs_are_compared_in_a_table_and_a_picture(tmp_path, script):
    a, b = logged(tmp_path, "a", 4.0, 3.0, 2.0), logged(tmp_path, "b", 5.0, 1.0)
    out = script("log.py", a, b)
    assert out.returncode == 0, out.stderr
    rows = {line.split()[0]: line.split() for line in out.stdout.splitlines() if line}
    assert rows[str(a)][1:3] == ["3", "2.0000"] and rows[str(b)][1:3] == ["2", "1.0000"]
    assert rows[str(a)][3:5] == ["0.2500", "1.5000"] and rows[str(a)][-1] == "█▅▁"
    picture = ET.parse(a / "curves.svg").getroot()
    assert len([e for e in picture.iter() if e.tag.endswith("polyline")]) == 4 and str(b) in "".join(picture.itertext())


def test_a_folder_without_records_is_named(tmp_path, script):
    out = script("log.py", tmp_path)
    assert out.returncode == 1 and "metrics.jsonl" in out.stderr and out.stderr.count("\n") == 1


def test_another_place_is_told_or_named_as_missing(tmp_path):
    told = []
    log.PLACES["list"] = lambda cfg, folder: told.append
    try:
        c = configs.load([f"out_dir={tmp_path}", "log.to=[list]"])[0]
        writer = log.Log(c, 1)
        writer.validation({"step": 1, "val/x/loss": 2.0})
        assert told == [{"step": 1, "val/x/loss": 2.0}]
        def missing(cfg, folder):
            raise ImportError
        log.PLACES["list"] = missing
        with pytest.raises(ValueError, match="pip install list"):
            log.Log(c, 1)
    finally:
        del log.PLACES["list"]
