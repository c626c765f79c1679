"""Probes in child processes: nothing that a library does there ends the examination."""

import os

import pytest

from edgeblocks.doctor import probes


def fake_torchao(folder, monkeypatch, code):
    """A library named torchao, whose import does this."""
    (folder / "torchao").mkdir()
    (folder / "torchao" / "__init__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os.abort()", r"it crashed (SIGABRT)"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("raise SystemExit(7)", "its process ended with 7"),
        ("print('a library may print'); import os; os._exit(3)", "its process ended with 3"),
    ],
)
def test_a_library_that_breaks_is_a_result(tmp_path, monkeypatch, code, reason):
    """A crash, an exception and an exit are reasons, and the probe behind them runs all the same."""
    fake_torchao(tmp_path, monkeypatch, code)
    answers = ask("torchao_int8_linear", "onnxruntime_matmul", limit_s=60)
    assert answers["torchao_int8_linear"].failed
    assert reason in answers["torchao_int8_linear"].reason
    assert answers["onnxruntime_matmul"].value["works"]


def test_a_library_that_hangs_is_a_result(tmp_path, monkeypatch):
    """A probe without an answer ends with its time. It is not called broken: a busy machine looks the same."""
    fake_torchao(tmp_path, monkeypatch, "import time; time.sleep(600)")
    answers = ask("torchao_int8_linear", "onnxruntime_matmul", limit_s=2)
    assert "no answer within 2 s" in answers["torchao_int8_linear"].reason
    assert answers["onnxruntime_matmul"].reason == "not tried: the time was up"
    assert not any(answer.failed for answer in answers.values())


def test_nothing_begins_after_the_deadline():
    """When the time is up all answers are `not tried`."""
    answers = probes.ask(("onnxruntime_matmul",), limit_s=60, deadline=0.0)
    assert answers["onnxruntime_matmul"].reason == "not tried: the time was up"


def ask(*names, limit_s):
    return probes.ask(names, limit_s=limit_s, deadline=float("inf"))
