"""`edgeblocks compare`: several ways to train one network, side by side, each in a process of its own."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.commands import assert_refused, invoke
from support.modules_in_the_way import put_in_the_way

import edgeblocks
from edgeblocks.cli.comparing import comparison_table
from edgeblocks.report.comparison_page import comparison_page
from edgeblocks.runs.locks import locked
from edgeblocks.settings.fields import RunSettings

SMALL = ["--set", "depth=3", "--set", "width=32", "--set", "heads=2", "--set", "hold_out=0.02", "--batch", "16"]
IMAGES = ["dit", "--data", "digits", *SMALL, "--mem-budget", "1GB"]


def foreseen(methods, **settings):
    """Costs that the processes of a comparison ask for are found by this one, which has torch in memory."""
    for method in methods:
        usual = {"data": "digits", "depth": 3, "width": 32, "heads": 2, "hold_out": 0.02, "batch": 16}
        edgeblocks.plan(**usual, **settings, method=method, mem_budget="4GB")


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Three ways at equal steps; fp32 moments and one clipping norm, so that two of them do the same."""
    out = tmp_path_factory.mktemp("compare") / "out"
    asked = [*IMAGES, "--steps", "24", "--set", "optimizer=adamw", "--set", "learning_rate=0.003"]
    asked += ["--set", "visit_steps=3", "-o", out]
    foreseen(("diffusion", "exact"), family="dit")
    done = invoke("compare", *asked, "--arms", "diffusion,exact,plain")
    assert done.exit_code == 0, done.stderr
    return out, asked, done


def rows_of(out):
    content = json.loads((out / "compare.json").read_text())
    return {row["arm"]: row for row in content["arms"]}


def test_every_arm_tells_quality_time_and_memory(compared):
    """Curves over the training at the same numbers of steps; the arms with a budget keep it."""
    out, _, done = compared
    rows = rows_of(out)
    assert list(rows) == ["diffusion", "exact", "plain"]
    for row in rows.values():
        assert row["failure"] is None
        assert [mark["step"] for mark in row["quality"]] == [3, 6, 9, 12, 15, 18, 21, 24]
        seconds = [mark["seconds"] for mark in row["quality"]]
        assert seconds == sorted(seconds) and seconds[0] > 0
        assert row["quality"][-1]["value"] < row["quality"][0]["value"]
        assert row["peak_bytes"] > row["runtime_bytes"] > 100e6
        assert max(used for _, used in row["memory"]) <= row["peak_bytes"]
    for arm in ("diffusion", "exact"):
        assert rows[arm]["peak_bytes"] <= rows[arm]["budget_bytes"] == 1_000_000_000
    assert rows["plain"]["budget_bytes"] is None
    for arm in rows:
        assert any(line.startswith(arm) for line in done.stdout.splitlines())


def test_exact_training_is_what_the_ordinary_loop_does(compared):
    """The same quality at every mark, as both have the same weights; the ordinary loop imports none of ours."""
    out, _, _ = compared
    exact, plain = (rows_of(out)[arm]["quality"] for arm in ("exact", "plain"))
    for mine, ordinary in zip(exact, plain, strict=True):
        # Two processes: where a tensor lies in memory decides how some sums are rounded, and the first steps of AdamW,
        # which are nearly of the gradient's sign alone, make 5e-5 of it. Bit for bit, in one process: `test_exact`.
        assert mine["value"] == pytest.approx(ordinary["value"], rel=5e-4)


def test_the_same_comparison_goes_on_with_what_is_missing(compared):
    """Arms that are done are not trained again, another arm joins them, and other settings are refused."""
    out, asked, _ = compared
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/summary.json")}
    former = rows_of(out)
    done = invoke("compare", *asked, "--arms", "exact,plain,plain+ckpt", "--json")
    assert done.exit_code == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    rows = {row["arm"]: row for row in json.loads(done.stdout)["arms"]}
    assert rows["plain"] == former["plain"] and rows["plain+ckpt"]["failure"] is None
    assert_refused(invoke("compare", *asked, "--batch", "8"), 2, "other settings")


def test_a_time_instead_of_steps_and_a_budget_that_is_too_small(tmp_path):
    """A short trial tells how many steps fill the time. What does not fit has no result, and the others have one."""
    foreseen(("exact",), family="vit")
    asked = ["vit", "--data", "digits", *SMALL, "--minutes", "0.01", "--mem-budget", "50MB", "-o", tmp_path / "out"]
    done = invoke("compare", *asked, "--arms", "exact,plain,boostresnet")
    assert done.exit_code == 0, done.stderr
    rows = rows_of(tmp_path / "out")
    assert "does not fit the budget of 50MB" in rows["exact"]["failure"] and "does not fit" in done.stdout
    for arm in ("plain", "boostresnet"):
        assert rows[arm]["failure"] is None and 0.05 < rows[arm]["quality"][-1]["value"] <= 1
    content = json.loads((tmp_path / "out/compare.json").read_text())
    usual = RunSettings.model_fields["steps"].default
    assert content["equal"] == "time" and 0 < rows["plain"]["steps"] < usual / 2  # 0.6 s, on any machine


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--arms", "diffusion,exakt"], "there is no arm 'exakt'"),
        (["--arms", "plain,boostresnet"], "it trains classifiers, and dit is none"),
        (["--minutes", "1", "--steps", "5"], "an arm trains for a time"),
        (["--set", "method=exact", "--set", "train_blocks=1"], "name them with --arms"),  # the rest: test_settling
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_trained(tmp_path, asked, said):
    """Exit code 2, the reason, and no folder."""
    assert_refused(invoke("compare", *IMAGES, *asked, "-o", tmp_path / "out"), 2, re.escape(said))
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    """A comparison is not written among other files."""
    (tmp_path / "mine.txt").write_text("mine")
    assert_refused(invoke("compare", *IMAGES, "-o", tmp_path), 2, "holds no comparison")
    (tmp_path / "link").symlink_to(tmp_path / "mine.txt")
    assert_refused(invoke("compare", *IMAGES, "-o", tmp_path), 2, r"holds links \(link\), and arms would be written")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "mine.txt"]


def test_other_minutes_are_another_comparison(compared):
    """Figures of one length of training are not told as those of another."""
    _, asked, _ = compared
    without_steps = [word for place, word in enumerate(asked) if "--steps" not in asked[max(0, place - 1) : place + 1]]
    assert_refused(invoke("compare", *without_steps, "--arms", "plain", "--minutes", "1"), 2, "for another time")


def test_it_fails_where_no_arm_has_a_result(tmp_path, monkeypatch):
    """Exit code 1; the table says why. No process runs a file of the folder that the command is started in."""
    put_in_the_way(tmp_path)
    monkeypatch.chdir(tmp_path)
    asked = [*IMAGES, "--steps", "3", "--mem-budget", "50MB", "-o", tmp_path / "out", "--arms", "diffusion"]
    done = invoke("compare", *asked)
    assert done.exit_code == 1 and "no arm has a result" in done.stderr and "does not fit" in done.stdout


def test_a_signal_ends_the_training_and_the_same_command_goes_on(tmp_path):
    """SIGTERM reaches the process that trains: it saves, nothing is left running, and nothing is trained twice."""
    command = [Path(sys.executable).with_name("edgeblocks"), "compare", *IMAGES, "--steps", "4000", "--blocks", "1"]
    command = [str(part) for part in (*command, "--arms", "diffusion", "-o", tmp_path / "out")]
    run = tmp_path / "out/diffusion-seed0"
    comparing = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.1)
    status = Path(f"/proc/{comparing.pid}/status").read_text()
    resident_bytes = 1024 * int(re.search(r"VmRSS:\s+(\d+)", status)[1])
    comparing.terminate()
    assert resident_bytes < 120e6, "the process that waits holds no torch"
    assert comparing.wait(timeout=120) == 130
    (path,) = (run / "blocks").glob("block_*.safetensors")
    saved = edgeblocks.load(run).directory.store().header(0).step
    assert 0 < saved < 4000
    with locked(run, print):  # nobody trains it any more
        pass
    assert path.exists()


def row(arm, value, error, examples):
    mark = {"step": 1, "seconds": 1.0, "value": value, "standard_error": error, "examples": examples}
    sizes = {"steps": 1, "peak_bytes": 10**9, "runtime_bytes": 10**8, "step_s": 0.1, "blocks": 1, "budget_bytes": None}
    return {
        "arm": arm,
        "meaning": arm,
        "seed": 0,
        "path": arm,
        "failure": None,
        "seconds": 1.0,
        "quality": [mark],
    } | sizes


def comparison(*rows, examples):
    told = {"family": "vit", "measure": "accuracy", "higher_is_better": True, "examples": examples, "equal": "steps"}
    told |= {"evaluations_a_step": None, "minutes": None, "settings": {"data": "digits"}, "environment": {}}
    return {**told, "arms": [{**one, "memory": [(1.0, 10**8)], "time_split": None} for one in rows]}


@pytest.mark.parametrize(
    ("errors", "other", "said"),
    [
        ((0.02, 0.02), 0.47, "but the difference to plain is within the error of 1024 examples"),
        ((0.001, 0.001), 0.49, "before plain by 0.01"),
        ((None, None), 0.49, "and plain is about as good: they differ by 2 %, and no error is known"),
        ((None, None), 0.50, "and plain is about as good: they differ by 0 %, and no error is known"),
        ((None, None), 0.40, "before plain by 0.1"),
    ],
)
def test_an_arm_is_called_better_by_more_than_the_noise_alone(errors, other, said):
    """The measured error decides where there is one; where there is none, within 5 % two arms are about as good."""
    rows = [row("exact", 0.5, errors[0], 1024), row("plain", other, errors[1], 1024)]
    assert said in comparison_page(comparison(*rows, examples=1024))


def test_few_examples_have_no_error(tmp_path):
    """Four of four right are not certain, and tell no arm from another; of an earlier edgeblocks the error stands."""
    few = comparison(row("exact", 1.0, None, 4), row("plain", 0.75, None, 4), examples=4)
    table = comparison_table(few, tmp_path)
    assert "1.0000 (4 examples, too few for an error)" in table and "±" not in table
    shown = comparison_page(few)
    assert "4 examples are too few to tell whether plain is worse" in shown
    assert "1.0000 (4 examples, too few for an error)" in shown
    many = comparison(row("exact", 0.5, 0.01, None), row("plain", 0.4, None, None), examples=1024)
    assert "0.5000 ± 0.0100" in comparison_table(many, tmp_path) and "too few" not in comparison_page(many)
