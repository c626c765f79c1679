"""Standard streams that are closed, left or full, and what is printed on them."""

import io
import json
import re
import subprocess
import sys

import pytest
import typer
from support.commands import invoke

from edgeblocks.cli.console_progress import ConsoleListener
from edgeblocks.cli.exit_codes import _guarded
from edgeblocks.cli.main import main
from edgeblocks.cli.outputs import say_classes
from edgeblocks.cli.screen import json_text
from edgeblocks.progress import Progress

OPENED = (
    "import sys; from edgeblocks.cli.screen import *; open_streams();"
    "file = open('data', 'w'); file.close() if file.fileno() > 2 else sys.exit(9);"
    "print('out'); print('error', file=sys.stderr); sys.stdin.read(); finish_output()"
)


@pytest.mark.parametrize(("closed", "heard"), [("2>&-", "out\n"), (">&-", "error\n"), ("<&- >&- 2>&-", "")])
def test_a_closed_stream_is_opened_to_nowhere(closed, heard, tmp_path):
    """No file of ours gets its number, and what is printed there is lost without an error."""
    command = ["bash", "-c", f'"$0" -c "$1" {closed}', sys.executable, OPENED]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, input="", check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, heard)


MUCH = """
import sys, typer
from edgeblocks.cli.exit_codes import _guarded
from edgeblocks.cli.screen import say
try:
    _guarded(lambda: [say("x" * 99) for _ in range(2000)], verbose=False)
except typer.Exit as ended:
    sys.exit(ended.exit_code)
"""


@pytest.mark.parametrize(("where", "words"), [("| true", ""), ("> /dev/full", r"error: OSError: .*No space left.*\n")])
def test_output_that_nobody_takes_ends_without_a_traceback(where, words):
    """A reader that left is no error to tell; a full disk is one."""
    shell = f'"$0" -c "$1" {where}; echo "${{PIPESTATUS[0]}}" >&2'
    done = subprocess.run(["bash", "-c", shell, sys.executable, MUCH], capture_output=True, text=True, check=False)
    assert re.fullmatch(f"{words}1\n", done.stderr), done.stderr


def test_a_system_that_does_not_tell_its_memory_is_told_as_such(capsys):
    """A container or a chroot without /proc; any other file that is missing is told by its name."""

    def reads(path):
        with pytest.raises(typer.Exit):
            _guarded(lambda: open(path), verbose=False)  # noqa: SIM115, PTH123 - it is not there
        return capsys.readouterr().err

    told = r"error: /proc/0/status cannot be read \(No such .*\): .*; mount it: mount -t proc proc /proc\n"
    assert re.fullmatch(told, reads("/proc/0/status"))
    assert re.fullmatch(r"error: FileNotFoundError: .*'/nowhere'. --verbose shows where\n", reads("/nowhere"))


def test_a_folder_that_is_gone_is_told_before_a_library_ends_the_process(tmp_path, monkeypatch, capsys):
    """The one that the command was started in."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "the folder that this command was started in is gone" in capsys.readouterr().err


class Leaving(io.StringIO):
    """A stream whose reader leaves after the first line."""

    def write(self, text):
        if self.getvalue():
            raise BrokenPipeError
        return super().write(text)


def test_a_reader_of_the_progress_that_leaves_does_not_end_the_training(monkeypatch):
    """Nothing is raised into the loop, and nothing more is written."""
    stream = Leaving()
    monkeypatch.setattr(sys, "stderr", stream)
    with ConsoleListener() as listener:
        listener.note("first")
        for done in range(5):
            listener.note("more")
            listener.step(Progress(losses={0: 1.0}, steps_done=done, steps_total=5))
    assert stream.getvalue().strip() in ("first", "")


def test_names_are_printed_in_one_line_that_steers_nothing(capsys, tmp_path):
    """Of files and of classes, in answers, notes and errors; JSON stays JSON."""

    class Named:
        directory = "onnx"

        def classify_files(self, paths, **_):
            classes = [{"name": "x\x1b[31mred", "probability": 0.75}, {"name": "a\nb", "probability": 0.25}]
            return [{"path": str(path), "classes": classes} for path in paths]

    say_classes(Named(), ["p\nq\x1b[7m.png"], None, None, 0, overwrite=False, as_json=False)
    assert capsys.readouterr().out == "p\\nq\\x1b[7m.png: x\\x1b[31mred 75.0%, a\\nb 25.0%\n"
    with ConsoleListener() as listener:
        listener.note("skipped: \x1b]0;title\x07\nerror: none")
    assert capsys.readouterr().err == "skipped: \\x1b]0;title\\x07\\nerror: none\n"
    refused = invoke("info", tmp_path / "no\x1b[2J\nsuch")
    assert refused.stderr.count("\n") == 1 and "no\\x1b[2J\\nsuch" in refused.stderr
    assert json.loads(json_text("\x7f\x1b")) == "\x7f\x1b" and json_text("\x7f").isprintable()
