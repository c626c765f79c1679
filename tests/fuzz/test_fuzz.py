"""Mutated inputs to everything that reads a file; tests/bench/fuzz_readers.py makes 10,000 of each."""

import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.fuzzing import MEMORY_BYTES, READERS, failure_kinds, fuzz

from edgeblocks.errors import RunError
from edgeblocks.runs.schema import check_manifest, checked, is_up_to
from edgeblocks.runs.written_plan import TrainablePlan, check_plan

CASES = 200 if settings.get_current_profile_name() == "thorough" else 50
MENDED = ("image cache", "token cache")
"""What is damaged there is made again."""
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
PLAN = {"layers_per_block": [2, 1], "micro_batch": 4, "slots": 1, "budget_bytes": 10**9}
DATA = {"channels": 1, "height": 8, "width": 8, "num_classes": 2, "mean": 0.3, "scale": 1.5}
MANIFEST = {
    "run_id": "0123456789abcdef",
    "family": "dit",
    "data": {**DATA, "source": "digits", "fingerprint": "a"},
    "class_names": ["a", "b"],
}


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited and measured as Linux does it")


@on_linux
@pytest.mark.parametrize("reader", READERS)
def test_a_mutated_input_is_refused_or_sound(reader):
    """No case ends in another error than ours, in a crash, in a hang, or with 600 MB more than before."""
    if READERS[reader].needs is not None:
        pytest.importorskip(READERS[reader].needs)
    report = fuzz(reader, CASES, seed=7)
    assert not report.failures, failure_kinds(report)
    assert report.cases == report.accepted + report.refused == CASES
    assert report.peak_bytes < MEMORY_BYTES
    assert report.refused > CASES // 10 or reader in MENDED, "the mutations are too mild to be noticed"
    assert report.accepted, "the mutations are so strong that nothing behind the first check is reached"


@on_linux
def test_each_kind_of_failure_is_noticed():
    """Another error, memory beyond the limit, an endless loop, a crash and an endless message are all reported."""
    report = fuzz("faulty", 8, timeout_s=0.5)
    assert {(case, kind) for case, kind, _ in report.failures} == {
        (2, "KeyError"),
        (3, "MemoryError"),
        (4, "hang"),
        (5, "crash or hang"),
        (6, "message"),
    }
    assert report.cases == 8


@given(st.sampled_from(sorted({*PLAN, "blocks", "shapes", "breakdown", "visit_steps"})), JSON_VALUES)
def test_a_plan_with_any_value_anywhere_is_refused_or_itself(key, value):
    """The plan that comes out says what went in, and its sizes are small enough to be allocated."""
    content = {**PLAN, key: value}
    try:
        plan = check_plan("plan.json", content, num_layers=3)
    except RunError as error:
        assert "plan.json is damaged" in str(error)
        return
    assert plan.to_json() == content
    assert 1 <= plan.slots <= len(plan.layers_per_block) and 1 <= plan.micro_batch <= 2**20
    with pytest.raises(RunError, match="is missing"):
        checked(TrainablePlan, "plan.json", plan.to_json())


@given(st.sampled_from(sorted(MANIFEST)), st.sampled_from([None, *DATA, "source"]), JSON_VALUES)
def test_a_manifest_with_any_value_anywhere_is_refused_or_typed(key, inner, value):
    """What comes out has the types that the rest of the code relies on."""
    content = {**MANIFEST, key: value}
    if inner is not None:
        content = {**MANIFEST, "data": {**MANIFEST["data"], inner: value}}
    try:
        manifest = check_manifest("manifest.json", content, reads="images")
    except RunError as error:
        assert "manifest.json is damaged" in str(error)
        return
    assert len(manifest.class_names) == manifest.data.num_classes
    assert all(type(size) is int for size in (manifest.data.height, manifest.data.width, manifest.data.channels))
    assert 0 <= manifest.data.mean <= 1 and manifest.data.scale > 0


SAVED = {0: 3, 1: 4}
NUMBERS = st.integers(-2, 5) | st.floats(-2, 5) | st.booleans()


@given(st.dictionaries(st.sampled_from(["block", "step", "loss"]), JSON_VALUES | NUMBERS))
@example({"block": 1, "step": 4})
@example({"block": True, "step": 4})
@example({"block": 1, "step": 5})
@example({"block": 2, "step": 1})
@example({"block": -1, "step": 1})
@example({"block": 0, "step": 0})
@example({"block": 0, "step": -1})
def test_a_record_counts_where_its_block_and_step_are_the_runs(record):
    """Whole numbers, of a block that there is and a step from 1 on that it has made; anything else is dropped."""
    block, step = record.get("block"), record.get("step")
    whole = type(block) is int and type(step) is int
    assert is_up_to(record, list(SAVED.values())) is (whole and block in SAVED and 1 <= step <= SAVED[block])
