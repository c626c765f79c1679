"""Runs whose 8-bit step is made by bitsandbytes: by what its CUDA kernel computes, on a device made of a processor."""

import json

import pytest
from support.cuda_kernel import used_here  # noqa: F401
from support.equality import assert_same_bits

import edgeblocks
from edgeblocks.errors import OutOfBudgetError
from edgeblocks.optim import cuda_step
from edgeblocks.progress import Silent

pytest.importorskip("bitsandbytes")
TINY = {"data": "digits", "depth": 3, "width": 32, "heads": 2, "batch": 8, "blocks": 3, "sample_grids": 0}
TINY |= {"steps": 4, "visit_steps": 2, "hold_out": 0.005, "micro_batch": 8}


class Heard(Silent):
    """Keeps the notes, and stops a run after so many steps."""

    def __init__(self, steps=0):
        self.notes, self._left = [], steps

    def note(self, text):
        self.notes.append(text)

    def step(self, progress):
        self._left -= 1
        if self._left == 0:
            raise OutOfBudgetError("enough")


@pytest.mark.usefixtures("gpu_like", "used_here")
def test_streamed_and_resumed_runs_have_the_same_bits(tmp_path, monkeypatch):
    """With the library's step as with ours; the notes and env.json name it, and so does a run that goes on without."""
    name = cuda_step.choice_on("cpu").name
    resident = edgeblocks.train(out=tmp_path / "resident", mem_budget="4GB", **TINY)
    out, heard = tmp_path / "streamed", Heard(5)
    with pytest.raises(OutOfBudgetError):
        edgeblocks.train(out=out, target="cuda", mem_budget="2GB", tier="disk", listener=heard, **TINY)
    assert f"8-bit AdamW step on the GPU: {name}" in heard.notes
    assert json.loads((out / "env.json").read_text())["adamw8bit"] == name
    heard = Heard()
    edgeblocks.resume(out, listener=heard)
    assert not any("began otherwise" in note for note in heard.notes)
    assert_same_bits(resident.path, out)

    monkeypatch.setattr(cuda_step, "KINDS", ("cuda",))
    ours = edgeblocks.resume(out, steps=6, listener=heard)
    assert any(f"began otherwise (the 8-bit AdamW step by '{name}', now 'edgeblocks')" in note for note in heard.notes)
    assert ours.summary["steps"] == 6


@pytest.mark.usefixtures("gpu_like", "used_here")
def test_weights_in_bfloat16_are_stepped_by_ours(tmp_path):
    """The library would round them to the nearest; the note and env.json say so, and the bits are a processor's."""
    heard = Heard()
    there = edgeblocks.train(
        out=tmp_path / "there", target="cuda", mem_budget="2GB", master="bf16", listener=heard, **TINY
    )
    assert any(note.startswith("8-bit AdamW step on the GPU: edgeblocks (master=bf16 rounds") for note in heard.notes)
    assert json.loads((there.path / "env.json").read_text())["adamw8bit"] == "edgeblocks"
    assert_same_bits(edgeblocks.train(out=tmp_path / "here", mem_budget="4GB", master="bf16", **TINY).path, there.path)
