"""What may stand in a run directory: every number that something is allocated from has a limit."""

import json
import os

import pytest
from support.random_run import make_run

import edgeblocks
from edgeblocks.errors import RunError
from edgeblocks.run import Run
from edgeblocks.runs.describe import describe
from edgeblocks.runs.opening import open_run
from edgeblocks.runs.written_plan import WrittenPlan, check_plan


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with blocks of two layers and one, and what is in its files."""
    path = tmp_path_factory.mktemp("runs") / "run"
    make_run(path, layers=(2, 1), width=16, heads=2)
    return path, {name: (path / name).read_text() for name in ("manifest.json", "plan.json", "config.yaml")}


@pytest.fixture
def run(made):
    """The path of that run, sound again."""
    path, texts = made
    for name in ("summary.json", "metrics.jsonl", "manifest.json"):
        (path / name).unlink(missing_ok=True)
    for name, text in texts.items():
        (path / name).write_text(text)
    return path


def change(path, keys, value):
    """Set a value inside a JSON file."""
    content = json.loads(path.read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(content))


def test_a_sound_run_is_opened_with_the_plan_that_was_written(run):
    """Only the four keys that sampling needs are there; more are kept, known or not."""
    assert open_run(run).plan.to_json() == json.loads((run / "plan.json").read_text())
    plan = json.loads((run / "plan.json").read_text()) | {"work_of_a_later_version": {"any": ["thing"]}}
    del plan["sha256"]
    (run / "plan.json").write_text(json.dumps(plan))
    assert open_run(run).plan.to_json() == plan
    assert describe(run)["parameters"] is None


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("slots", 10**9, "slots=1000000000"),
        ("slots", 3, "slots=3 are more than the 2 blocks"),
        ("slots", 0, "slots=0"),
        ("slots", True, "slots=True: .*integer"),
        ("micro_batch", 1e300, r"micro_batch=1e\+300"),
        ("micro_batch", 10**7, "micro_batch=10000000"),
        ("micro_batch", None, "micro_batch=None"),
        ("layers_per_block", [10**9, 1], "layers_per_block.0=1000000000"),
        ("layers_per_block", [4, -1], "layers_per_block.1=-1"),
        ("layers_per_block", [], "layers_per_block=.*at least 1 item"),
        ("layers_per_block", [1] * 10**5, "layers_per_block=.*at most 4096 items"),
        ("layers_per_block", [2, 2], "its blocks have 4 layers, the network 3"),
        ("layers_per_block", "21", "layers_per_block='21'"),
        ("blocks", 3, "blocks=3, but layers_per_block lists 2"),
        ("budget_bytes", "6GB", "budget_bytes='6GB'"),
        ("budget_bytes", 10**400, "budget_bytes=a number of 1329 bits"),
        ("visit_steps", 0, "visit_steps=0"),
        ("shapes", [{"micro_batch": 0, "checkpointing": False, "step_bytes": 1}], "shapes.0.micro_batch=0"),
        ("breakdown", {"weights": -1}, "breakdown.weights=-1"),
        ("predicted_step_s", float("nan"), "NaN is not a finite number"),
    ],
)
def test_an_impossible_plan_is_refused(run, key, value, words):
    """The file, the key and its value are named, and what to do."""
    change(run / "plan.json", [key], value)
    with pytest.raises(RunError, match=rf"plan\.json is damaged: .*{words}.*train again with a new --out"):
        open_run(run)


@pytest.mark.parametrize("key", ["layers_per_block", "micro_batch", "slots", "budget_bytes"])
def test_a_plan_without_a_needed_key_names_it(run, key):
    """No KeyError somewhere later."""
    plan = json.loads((run / "plan.json").read_text())
    del plan[key]
    (run / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(RunError, match=f"plan.json is damaged: {key} is missing"):
        open_run(run)


def test_a_plan_that_cannot_be_resumed_lists_what_is_missing(run):
    """A plan may do for sampling and not for training, which needs four keys more."""
    missing = "shapes is missing; visit_steps is missing; predicted_peak_bytes is missing; breakdown is missing;"
    with pytest.raises(RunError, match=rf"plan\.json is damaged: {missing}"):
        open_run(run).trainable_plan  # noqa: B018 - asking is what fails
    with pytest.raises(RunError, match=rf"plan\.json is damaged: {missing}"):
        edgeblocks.resume(run)


def test_of_many_faults_the_first_are_named(run):
    """Five of them, and how many more there are."""
    change(run / "plan.json", ["layers_per_block"], ["a"] * 8)
    with pytest.raises(RunError, match=r"layers_per_block\.4='a': [a-z ]+ and 3 more; put the file back"):
        open_run(run)


def test_a_written_plan_is_read_back_as_it_was(tmp_path):
    """Of a processor and of a device beside a host, whose keys stand in the file there alone."""
    for beside in ({}, {"ram_budget_bytes": 5 * 10**9, "host_breakdown": {"runtime": 10**8}, "ram_blocks": 0}):
        plan = WrittenPlan(layers_per_block=[2, 1], micro_batch=4, slots=1, budget_bytes=10**9, **beside)
        content = json.loads(json.dumps(plan.to_json()))
        assert content.keys() == {"layers_per_block", "micro_batch", "slots", "budget_bytes", *beside}
        assert check_plan(tmp_path / "plan.json", content, num_layers=3) == plan
        assert plan.is_beside_a_host == bool(beside)


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        (["data", "height"], 10**12, "data.height=1000000000000"),
        (["data", "width"], -8, "data.width=-8"),
        (["data", "deep_range"], [1], "data.deep_range.1"),
        (["data", "deep_range"], [0, 1e9], "data.deep_range.1=1000000000.0"),
        (["data", "channels"], "1", "data.channels='1'"),
        (["data", "num_classes"], 10**6, "data.num_classes=1000000"),
        (["data", "mean"], 10**400, "data.mean="),
        (["data", "scale"], 0, "data.scale=0"),
        (["data"], [1], r"data=\[1\]"),
        (["class_names"], ["x"] * 10**6, "at most .* are read"),
        (["class_names"], ["x"] * 200_000, "class_names=.*at most 100000 items"),
        (["class_names"], [1] * 10, "class_names.0=1"),
        (["class_names"], ["a"], "1 class_names for data.num_classes=10"),
        (["run_id"], 5, "run_id=5"),
        (["run_id"], "../../../elsewhere", "run_id='../../../elsewhere'"),
        (["family"], "vit", "is of the family 'vit', config.yaml of another"),
    ],
)
def test_an_impossible_manifest_is_refused(run, keys, value, words):
    """The file, the key and its value are named."""
    change(run / "manifest.json", keys, value)
    with pytest.raises(RunError, match=f"damaged: .*{words}"):
        open_run(run)


@pytest.mark.parametrize("version", [1, 3, "2", True, None, [[[[[1]]]]], 10**400])
def test_another_format_version_is_refused(run, version):
    """Whatever it is, with what this edgeblocks reads."""
    change(run / "manifest.json", ["format_version"], version)
    with pytest.raises(RunError, match=r"has run format version .* reads version 2"):
        open_run(run)


@pytest.mark.parametrize("name", ["manifest.json", "plan.json", "config.yaml"])
@pytest.mark.parametrize("damage", ["deep", "huge", "binary", "pipe", "folder", "empty", "aliases"])
def test_a_file_that_is_no_such_file_is_refused(run, name, damage):
    """No RecursionError, no gigabytes, no waiting."""
    path = run / name
    path.unlink()
    if damage == "pipe":
        os.mkfifo(path)
    elif damage == "folder":
        path.mkdir()
    elif damage == "huge":
        with path.open("wb") as file:
            file.truncate(10**11)
    else:
        content = {"deep": b'{"a": ' + b"[" * 100_000, "binary": b"\xff\xfe\0", "empty": b""}
        content["aliases"] = b"".join(
            b"a%d: &a%d [%s]\n" % (n, n, b"*a%d, " % (n - 1) * 9 if n else b"x") for n in range(30)
        )
        path.write_bytes(content[damage])
    with pytest.raises(RunError, match=name):
        open_run(run)
    path.rmdir() if damage == "folder" else path.unlink()


def test_records_that_are_none_are_passed_over(run):
    """Lines of other types, without block or step, of blocks that do not exist, too long or half written."""
    sound = [{"block": 0, "step": 1}, {"block": 1, "step": 2}]
    odd = [5, None, [], {}, {"block": 0}, {"step": 1}, {"block": "0", "step": 1}, {"block": -1, "step": 1}]
    odd += [{"block": 0, "step": "1"}, {"block": 7, "step": 1}, {"block": 0, "step": 9}, {"block": True, "step": 1}]
    lines = [json.dumps(line) for line in [*odd, *sound]]
    lines += ["[" * 10_000, '{"block": 0, "step": 1, "text": "' + "x" * 10**6 + '"}', '{"block": 0, "st']
    (run / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\xff\n\n")
    opened = open_run(run)
    assert sum(record == sound[0] for record in opened.metrics()) == 1
    opened.drop_metrics_after([3, 3])
    assert [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] == sound


@pytest.mark.parametrize(
    ("summary", "words"),
    [
        ({}, "peak_bytes is missing; metrics is missing"),
        ({"peak_bytes": "much", "metrics": {"validation_loss": 1.0}}, "peak_bytes='much'"),
        ({"peak_bytes": 1, "metrics": {}}, "metrics.validation_loss is missing"),
        ({"peak_bytes": 1, "metrics": {"validation_loss": []}}, r"metrics.validation_loss=\[\]"),
        ([], "an object is expected, found list"),
    ],
)
def test_a_damaged_summary_is_a_run_error(run, summary, words):
    """For `info` and for `Run.summary` alike."""
    (run / "summary.json").write_text(json.dumps(summary))
    for ask in (lambda: describe(run), lambda: Run(open_run(run)).summary):
        with pytest.raises(RunError, match=rf"summary\.json is damaged: .*{words}"):
            ask()


def test_the_summary_of_a_run_that_diverged_is_read(run):
    """NaN is what was measured."""
    (run / "summary.json").write_text('{"peak_bytes": 5, "metrics": {"validation_loss": NaN}, "more": 1}')
    assert Run(open_run(run)).summary["more"] == 1
    assert describe(run)["measured_peak"] == "5 B"
