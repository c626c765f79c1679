"""A process that would pass its budget takes smaller steps instead, and ends saved when there are none."""

import errno
import json
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from support.outside import EDGEBLOCKS, measured, measured_script

import edgeblocks
from edgeblocks.errors import OutOfBudgetError, is_refusal
from edgeblocks.planning.plans import StepShape
from edgeblocks.training.guard import HEADROOM_BYTES, Guard

MB = 1_000_000
SHAPES = [
    StepShape(micro_batch=64, checkpointing=False, step_bytes=400 * MB),
    StepShape(micro_batch=16, checkpointing=False, step_bytes=100 * MB),
    StepShape(micro_batch=1, checkpointing=True, step_bytes=10 * MB),
]
BREAKDOWN = {"runtime": 270 * MB, "weights": 50 * MB, "activations": 80 * MB, "planning": 300 * MB}


@dataclass
class Process:
    """The sizes that an operating system would report."""

    resident: int
    free_heap: int = 0

    def used_bytes(self):
        return self.resident

    def live_bytes(self):
        return self.resident - self.free_heap

    def give_back(self):
        self.resident, self.free_heap = self.resident - self.free_heap, 0


def guard_of(process, budget_bytes):
    notes = []
    guard = Guard(process, budget_bytes=budget_bytes, shapes=SHAPES, breakdown=BREAKDOWN, note=notes.append)
    return guard, notes


@given(st.integers(0, 1200 * MB), st.integers(0, 200 * MB), st.integers(400 * MB, 1200 * MB))
def test_no_step_is_taken_that_would_pass_the_budget(live, free_heap, budget):
    """Whatever is in use, the step that is allowed fits beside it; the largest such is taken; else the run ends."""
    process = Process(resident=live + free_heap, free_heap=free_heap)
    guard, notes = guard_of(process, budget)
    try:
        shape = guard.before_step()
    except OutOfBudgetError:
        assert live + SHAPES[-1].step_bytes > budget
        return
    assert live + shape.step_bytes <= budget
    assert bool(notes) == (shape != SHAPES[0]) == bool(guard.changes)
    larger = SHAPES[: SHAPES.index(shape)]
    assert all(live + other.step_bytes > budget - HEADROOM_BYTES for other in larger)


def test_free_pages_of_the_heap_are_given_back_before_a_step_shrinks():
    """Memory that is only kept for reuse does not make a step smaller."""
    process = Process(resident=900 * MB, free_heap=500 * MB)
    guard, notes = guard_of(process, 900 * MB)
    assert guard.before_step() == SHAPES[0]
    assert process.resident == 400 * MB
    assert notes == []


def test_the_line_says_what_happened():
    """The note has the budget, what is in use, and the new micro-batch; the change is in the summary."""
    guard, notes = guard_of(Process(resident=500 * MB), 700 * MB)
    guard.before_step()
    assert "the budget is 700 MB (500 MB in use); the micro-batch is now 16, checkpointing off" in notes[0]
    assert guard.changes == [{"micro_batch": 16, "checkpointing": False, "used_bytes": 500 * MB}]


def test_the_end_names_the_largest_item_and_the_flag():
    """Nothing left to shrink: numbers, largest planned item, what is not planned, and a larger budget."""
    guard, _ = guard_of(Process(resident=695 * MB), 700 * MB)
    with pytest.raises(OutOfBudgetError) as caught:
        guard.before_step()
    text = str(caught.value)
    for words in ("700 MB", "695 MB", "runtime (270 MB)", "not in the plan", "--mem-budget 875MB", "--resume"):
        assert words in text


def test_refusals_are_told_from_other_errors():
    """Python's, numpy's and torch's words for refused memory are known; other RuntimeErrors are not taken for it."""
    assert is_refusal(MemoryError())
    assert is_refusal(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    assert is_refusal(RuntimeError("can't start new thread"))
    assert not is_refusal(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert is_refusal(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert is_refusal(SystemError("error return without exception set"))
    assert not is_refusal(ValueError("out of memory"))
    assert not is_refusal(OSError(errno.ENOSPC, "No space left on device"))
    assert not is_refusal(SystemError("bad argument to internal function"))


TRAIN = """
import json, sys
import numpy as np
import edgeblocks
from edgeblocks.errors import EdgeblocksError
from edgeblocks.progress import Silent

held_each, most, when = (int(word) for word in sys.argv[2:5])

class Holder(Silent):
    held, notes = [], []
    def step(self, progress):
        if progress.steps_done >= when and len(self.held) < most:
            self.held.append(np.ones(held_each // 8))
    def note(self, text):
        self.notes.append(text)

result = {}
try:
    run = edgeblocks.train(
        out=sys.argv[1], mem_budget="420MB", steps=8, visit_steps=4, batch=64, width=64, heads=2, depth=6, patch=1,
        micro_batch=64, checkpointing=False, tier="disk", sample_grids=1, sample_steps=4, hold_out=0.01,
        optimizer="adamw", listener=Holder(),
    )
    result["changes"] = run.summary["memory_changes"]
except EdgeblocksError as error:
    result["error"], result["exit_code"] = str(error), error.exit_code
print(json.dumps({**result, "notes": Holder.notes, "held": sum(array.nbytes for array in Holder.held)}))
"""


def weights(run):
    return {
        (path.name, name): tensor
        for path in sorted((run / "blocks").glob("*.safetensors"))
        for name, tensor in load_file(path).items()
        if not name.startswith("optimizer.")
    }


@pytest.fixture(scope="module")
def free(tmp_path_factory):
    """A run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("free")
    # The processes that follow take what this one, which has torch in memory, finds of the costs.
    shape = {"width": 64, "heads": 2, "depth": 6, "patch": 1, "batch": 64, "micro_batch": 64, "checkpointing": False}
    edgeblocks.plan(**shape, steps=8, tier="disk", optimizer="adamw", mem_budget="4GB")
    done = measured_script(TRAIN, "run", 8, 0, 0, cwd=folder)
    assert done["code"] == 0, done["err"]
    assert json.loads(done["out"])["changes"] == []
    return folder / "run"


@pytest.mark.slow
def test_a_process_that_grows_while_training_takes_smaller_steps(free, tmp_path):
    """3 MB more after every step, held by a listener: the micro-batch shrinks, the peak stays below the budget, and
    the weights are those of the undisturbed run up to rounding."""
    done = measured_script(TRAIN, "run", 3 * MB, 26, 3, cwd=tmp_path)
    assert done["code"] == 0, done["err"]
    result = json.loads(done["out"])
    assert "error" not in result, result
    assert result["changes"], "nothing had to shrink: the test is too mild"
    notes = [note for note in result["notes"] if not note.startswith("read:")]
    assert all("the micro-batch is now" in note for note in notes)
    assert done["peak_bytes"] <= 420 * MB
    one, two = weights(free), weights(tmp_path / "run")
    assert one.keys() == two.keys()
    assert all(abs(one[key] - two[key]).max() < 2e-3 for key in one)


@pytest.mark.slow
def test_a_burst_ends_the_run_saved_and_it_goes_on(free, tmp_path):
    """200 MB at once after step 6: memory is refused at the cap, the run ends with exit code 1 and all steps saved, the
    machine is never short, and --resume ends with the undisturbed run's bits."""
    done = measured_script(TRAIN, "run", 200 * MB, 1, 6, cwd=tmp_path)
    result = json.loads(done["out"])
    assert result["exit_code"] == 1
    assert "the budget of 420 MB is used up: memory was refused to the report of a step" in result["error"]
    assert done["peak_bytes"] <= 420 * MB
    resumed = measured(*EDGEBLOCKS, "train", "--resume", tmp_path / "run", "--json")
    assert resumed["code"] == 0, resumed["err"]
    assert json.loads(resumed["out"])["resumed_from"] == [4, 2, 0]
    one, two = weights(free), weights(tmp_path / "run")
    assert all(one[key].tobytes() == two[key].tobytes() for key in one)


@pytest.mark.slow
def test_a_plan_that_foresaw_too_little_is_mended_at_the_cap(free, tmp_path):
    """A step that takes more than its plan says meets the cap, is made again in smaller parts, and the run goes on."""
    done = measured_script(TRAIN, "run", 200 * MB, 1, 1, cwd=tmp_path)
    assert "error" in json.loads(done["out"])
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    for shape in plan["shapes"]:
        shape["step_bytes"] = 1000
    plan |= {"budget_bytes": 330 * MB, "predicted_peak_bytes": 320 * MB}
    del plan["sha256"]
    (tmp_path / "run/plan.json").write_text(json.dumps(plan))
    resumed = measured(*EDGEBLOCKS, "train", "--resume", tmp_path / "run", "--json")
    assert resumed["code"] == 0, resumed["err"]
    changes = json.loads(resumed["out"])["memory_changes"]
    assert changes
    assert "memory was refused at the cap, the budget is 330 MB" in resumed["err"]
    # The cap counts data, and the plan that says what else there is was made wrong here: code that is used first now.
    assert resumed["peak_bytes"] <= 331 * MB
    one, two = weights(free), weights(tmp_path / "run")
    assert all(abs(one[key] - two[key]).max() < 2e-3 for key in one)
