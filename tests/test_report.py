"""log.py: report.html in a browser, the files it is made from, and the live view."""
import contextlib
import fcntl
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys

import pytest

import log
from conftest import ROOT


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def step_record(step, loss, **more):
    record = {"step": step, "loss": loss, "lr": 1e-3, "grad_norm": 2.0, "tok_per_s": 1500.0,
              "mfu": None, "memory": 2**30, "seconds": float(step), "data_wait": 0.0,
              "save_wait": 0.0}
    return record | more


def start_line(step=0, **more):
    line = {"step": step, "total_steps": 4, "time": "2026-01-31 12:00:00",
            "command": "python train.py", "device": "cpu, 2 threads", "git": "abc123",
            "versions": {"torch": "2.13"}}
    return line | more


def write_run(folder, losses, lr="0.5"):
    """A run with a record per loss, an evaluation before it and one at its end -> its folder."""
    records = [step_record(step, loss) for step, loss in enumerate(losses, 1)]
    first = {"step": 0, "val/x/loss": 10.0, "val/x/exact_match": 0.0}
    last = {"step": len(losses), "val/x/loss": 1.0, "val/x/exact_match": 0.25}
    write_lines(folder / "metrics.jsonl", [first, *records, last])
    answer = {"prompt": "<b>2 & 3?</b>", "answer": "<script>document.title = 'run'</script>",
              "reference": "5", "exact_match": 0.0}
    write_lines(folder / "evaluations.jsonl", [
        {"step": step, "seconds": 1.0, "answers": {"x": [answer]}} for step in (0, len(losses))])
    write_lines(folder / "starts.jsonl", [start_line()])
    (folder / "config.yaml").write_text(f"lr: {lr}\nout_dir: {folder}\nepochs: 2\n")
    (folder / "documents.txt").write_text("--- x 0\n\x1b[2mQ <i>\x1b[0m\x1b[32mA\x1b[0m\n")
    return folder


def write_report(*folders):
    log.main([str(folder) for folder in folders])
    return folders[0] / "report.html"


# --------------------------------------------------------------------------------------------------
# in a browser

@pytest.fixture(scope="module")
def browser():
    """A headless Chromium, if one is installed."""
    sync_api = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("needs an installed Chromium or Chrome")
    with sync_api.sync_playwright() as playwright:
        # root, as in containers, cannot use Chromium's sandbox
        with playwright.chromium.launch(executable_path=path, args=["--no-sandbox"]) as started:
            yield started


@pytest.fixture
def open_report(browser):
    """open_report(path, width=1200, color_scheme="light") -> its page.

    page.problems has the console's messages, errors, and requests but for the file itself.
    """
    pages = []

    def open_page(path, width=1200, color_scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=color_scheme)
        pages.append(page)
        page.problems = []
        page.on("console", lambda message: page.problems.append(message.text))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("request", lambda request: page.problems.append(request.url))
        page.goto(f"file://{path}")
        page.problems.remove(f"file://{path}")
        return page
    yield open_page
    for page in pages:
        page.close()


def find_plot(page, title):
    return page.locator("figure", has=page.locator("figcaption", has_text=title))


def curve_heights(plot, i):
    """The y of the points of curve i."""
    points = plot.locator("polyline").nth(i).get_attribute("points").split()
    return [float(point.split(",")[1]) for point in points]


@pytest.fixture(scope="module")
def report_path(tmp_path_factory):
    """The report of two runs: 3 steps from 8 to 2, and 2 steps."""
    folder = tmp_path_factory.mktemp("runs")
    a = write_run(folder / "a", [8.0, 4.0, 2.0])
    b = write_run(folder / "b", [9.0, 0.5], lr="0.25")
    return write_report(a, b)


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_report_fits_the_window(report_path, open_report, width, color_scheme):
    """No errors, no requests, and no part wider than the window."""
    page = open_report(report_path, width, color_scheme)
    assert page.problems == []
    assert page.evaluate("document.documentElement.scrollWidth") == width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    red = int(re.search(r"\d+", background)[0])
    assert red > 200 if color_scheme == "light" else red < 50


def test_report_shows_a_step_under_the_mouse(report_path, open_report):
    """Pointing at a step of a plot shows its values in all runs, and nothing else does."""
    plot = find_plot(open_report(report_path), "Loss")
    column = plot.locator(".hover").nth(2)               # of the steps 0, 1, 2 and 3
    assert not column.locator("text").first.is_visible()
    column.locator(".column").hover()
    assert column.locator("text").first.is_visible()
    step, *texts = column.locator("text").all_text_contents()
    assert step == "step 2"
    # of a long name the end
    assert [text.partition("/runs0/")[2] for text in texts] == [
        "a train: 4", "b train: 0.5", "b val/x/loss: 1"]


def test_report_draws_values_to_scale(report_path, open_report):
    """Losses that differ tenfold are on a logarithmic scale with round ticks."""
    page = open_report(report_path)
    plot = find_plot(page, "Loss (log scale)")
    ticks = plot.locator("text[text-anchor=end]:not(.hover text)").all_text_contents()
    assert ticks == ["0.5", "1", "2", "5", "10"]        # of losses from 0.5 to 10
    first, second, third = curve_heights(plot, 0)        # 8, 4, 2
    assert second - first == pytest.approx(third - second, abs=0.2) and second > first
    assert plot.locator("polyline.validation").count() == 2
    assert plot.locator("circle:not(.hover circle)").count() == 4    # validations are also dots
    memory = find_plot(page, "Memory")
    assert curve_heights(memory, 0) == [log.TOP] * 3     # 1 of 1 GiB


def test_report_shows_what_differs_and_what_was_run(report_path, open_report):
    page = open_report(report_path)
    row = page.locator("tr", has=page.locator("code", has_text=re.compile("^lr$")))
    assert row.locator("td").all_inner_texts() == ["lr", "0.5", "0.25"]
    text = page.locator("body").inner_text()
    assert "epochs" not in text and "out_dir" not in text
    assert "cpu, 2 threads" in text and "code abc123, torch 2.13" in text
    assert "stopped, 75% done" in text


def test_report_escapes_text(report_path, open_report):
    """Answers and documents are shown as they are, and run nothing."""
    page = open_report(report_path)
    assert page.title().endswith("b") and page.locator("script, main b, i").count() == 0
    answers = page.locator("td.answer").all_inner_texts()
    assert "<script>document.title = 'run'</script>" in answers
    assert page.locator("pre", has_text="<b>2 & 3?</b>").count() == 1
    assert page.locator("pre .trained").all_inner_texts() == ["A"]
    assert page.locator("pre .untrained").all_inner_texts() == ["Q <i>"]


def test_report_of_a_run_in_progress(tmp_path, open_report):
    """One record is enough, without any of the other files, and with unknown values."""
    write_lines(tmp_path / "metrics.jsonl", [step_record(1, None)])
    page = open_report(write_report(tmp_path))
    assert page.problems == []
    titles = page.locator("figcaption").all_inner_texts()
    assert titles == ["Learning rate", "Gradient norm", "Tokens per second", "Memory (GiB)"]


def test_report_of_real_runs(tmp_path, tiny, open_report):
    """A run and its continuation are one curve; documents, answers, times and commands."""
    import train
    options = ["eval_every=2", "eval_tokens=4"]
    cfg, _, explicit = tiny("max_steps=2", *options, out="a")
    train.main(cfg, explicit)
    cfg, _, explicit = tiny("max_steps=4", *options, f"resume={tmp_path}/a/checkpoints/latest", out="b")
    train.main(cfg, explicit)
    run = log.load_run(str(tmp_path / "b"))
    assert [step for step, _ in log.series(run.records, "loss")] == [1, 2, 3, 4]
    assert [line["step"] for line in run.evaluations] == [0, 2, 4]
    assert [(start["step"], start["total_steps"]) for start in run.starts] == [(0, 2), (2, 4)]
    page = open_report(write_report(tmp_path / "b", tmp_path / "a"))
    assert page.problems == []
    assert len(curve_heights(find_plot(page, "Loss"), 0)) == 4
    assert page.locator("td.answer").count() > 4 * 3
    assert any("RED" in text for text in page.locator("pre .trained").all_inner_texts())
    times = page.locator("p.legend").first.inner_text()
    shares = dict(re.findall(r"(compute|evaluation)[^%]*?(\d+)\.\d%", times))
    assert 90 <= int(shares["compute"]) + int(shares["evaluation"]) <= 100
    row = page.locator("tr", has=page.locator("code", has_text=re.compile("^max_steps$")))
    assert row.locator("td").all_inner_texts() == ["max_steps", "4", "2"]


# --------------------------------------------------------------------------------------------------
# what the report is made from

@pytest.mark.parametrize("low, high, ticks", [
    (0, 10, [0, 2, 4, 6, 8, 10]), (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 0, [0, 1]),
    (2.1, 2.9, [2, 2.2, 2.4, 2.6, 2.8, 3]), (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    (0, 6123, [0, 2000, 4000, 6000, 8000]), (0, 3e-4, [0, 1e-4, 2e-4, 3e-4])])
def test_linear_ticks_are_round(low, high, ticks):
    assert log.linear_ticks(low, high) == ticks


@pytest.mark.parametrize("low, high, ticks", [
    (0.3, 4, [0.5, 1, 2]), (0.013, 11, [0.1, 1, 10]), (1, 10, [1, 2, 5, 10]),
    (1e-9, 1, [1e-9, 1e-7, 1e-5, 1e-3, 0.1])])
def test_log_ticks_are_round(low, high, ticks):
    assert log.log_ticks(low, high) == ticks


def test_thin_takes_means():
    """At most so many points; each is at the last step of those that it is the mean of."""
    points = [(step, float(step)) for step in range(1, 10)]
    assert log.thin(points, 9) == points
    assert log.thin(points, 4) == [(3, 2.0), (6, 5.0), (9, 8.0)]
    assert log.thin([], 4) == []


def test_time_shares_add_up(tmp_path):
    """Waiting is a share of the time without evaluations; the rest is compute."""
    folder = write_run(tmp_path / "a", [])
    write_lines(folder / "metrics.jsonl", [
        {"step": 0, "val/x/loss": 1.0},
        step_record(2, 1.0, seconds=12.0, data_wait=0.1, save_wait=0.2),
        {"step": 2, "val/x/loss": 1.0},
        step_record(4, 1.0, seconds=25.0, data_wait=0.5),
        {"step": 4, "val/x/loss": 1.0}])
    write_lines(folder / "evaluations.jsonl", [
        {"step": 0, "seconds": 2.0, "answers": {}}, {"step": 2, "seconds": 3.0, "answers": {}},
        {"step": 3, "seconds": 9.0, "answers": {}},          # of a start that was killed
        {"step": 4, "seconds": 4.0, "answers": {}}])
    assert log.time_shares(log.load_run(str(folder))) == pytest.approx(
        {"compute": 12.0, "evaluation": 9.0, "waiting for data": 6.0, "waiting for saves": 2.0})


def test_differing_scripts_compares_the_code_of_runs(tmp_path):
    runs = []
    for name in ("a", "b"):
        (tmp_path / name / "code").mkdir(parents=True)
        (tmp_path / name / "code" / "model.py").write_text(f"# {name}")
        (tmp_path / name / "code" / "train.py").write_text("same")
        runs.append(log.LoggedRun(str(tmp_path / name), [], [], [], {}, ""))
    assert log.differing_scripts(runs) == ["model.py"]


# --------------------------------------------------------------------------------------------------
# the live view

def test_watch_prints_once_if_not_on_a_terminal(tmp_path, capsys):
    folder = write_run(tmp_path / "a", [8.0, 4.0, 2.0])
    log.main([str(folder), "watch=true"])
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == f"not running: {folder}"[:len(lines[0])]
    assert lines[1] == "step 3/4  ███████████████░░░░░ 75%  0:01 left"
    assert lines[2].startswith("       8 █") and lines[-1].split() == ["x/loss", "10.000", "->", "1.000"]
    assert "\x1b" not in out and not (folder / "report.html").exists()


def test_watch_redraws_until_the_run_ends(tmp_path):
    """On a terminal, while a process holds the lock of the run."""
    folder = write_run(tmp_path / "a", [8.0, 4.0])
    lock = open(folder / ".lock", "w")
    fcntl.lockf(lock, fcntl.LOCK_EX)
    terminal, stdout = pty.openpty()
    process = subprocess.Popen([sys.executable, "log.py", folder, "watch=true"], cwd=ROOT,
                               stdout=stdout, close_fds=True)
    os.close(stdout)
    seen = b""
    while b"step 2/4" not in seen:
        assert select.select([terminal], [], [], 60)[0], seen
        seen += os.read(terminal, 10_000)
    assert seen.startswith(b"running: ")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(step_record(4, 1.0)) + "\n")
    lock.close()
    assert process.wait(timeout=60) == 0
    with contextlib.suppress(OSError):                   # at the end of what was written
        while True:
            seen += os.read(terminal, 10_000)
    os.close(terminal)
    _, *later = seen.decode().split("\x1b[J")
    assert later[-1].startswith("not running: ") and "step 4/4" in later[-1]
