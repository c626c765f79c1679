"""What a terminal and a pipe see of a command at work."""

import contextlib
import dataclasses
import io
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from support.commands import TINY

from edgeblocks.cli.block_table import block_table
from edgeblocks.cli.console import training_report
from edgeblocks.cli.console_progress import ConsoleListener
from edgeblocks.progress import BlockProgress, Marked, Progress
from edgeblocks.runs.summary import Metrics, Summary, read_summary


def test_training_says_how_it_goes_on_standard_error_and_prints_the_summary(edgeblocks_command, tmp_path):
    """A pipe of either sees no control characters; standard output has planned beside measured and the next command."""
    out = tmp_path / "run"
    done = edgeblocks_command("train", *TINY, "--mem-budget", "2GB", "--out", out)
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout + done.stderr) & {"\r", "\x1b"}
    for expected in ("predicted peak", f"run directory: {out}", "creating blocks", "written", "loss 0:"):
        assert expected in done.stderr
    assert done.stdout == training_report(read_summary(out / "summary.json"), out) + "\n"
    for expected in ("planned", "measured", "validation loss", "next: edgeblocks sample"):
        assert expected in done.stdout
    (time_line,) = (line for line in done.stdout.splitlines() if line.startswith("time: "))
    shares = re.findall(r"([\w ]+) ([\d.]+)%", time_line)
    assert [name.strip() for name, _ in shares][-3:] == ["samples", "evaluation", "other"]
    assert sum(round(10 * float(share)) for _, share in shares) == 1000, time_line


def test_a_report_has_dashes_for_what_a_summary_lacks():
    """An earlier edgeblocks wrote less into it; what is there is told."""
    report = training_report(Summary(peak_bytes=5_000_000, metrics=Metrics(validation_loss=float("nan"))), "run")
    assert re.search(r"peak memory +- +5 MB\nbudget +-\n", report) and "; - written to disk" in report
    assert "validation loss nan\n" in report


def test_a_live_line_is_written_to_the_terminal_alone(run, tmp_path):
    """What a command makes goes to a file while its progress is seen; each live line ends before the next text."""
    main, terminal = pty.openpty()
    with (tmp_path / "told").open("w") as told:
        command = [Path(sys.executable).with_name("edgeblocks"), "eval", run, "--samples", "4"]
        process = subprocess.Popen(command, stdout=told, stderr=terminal)
    os.close(terminal)
    seen = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while part := os.read(main, 4096):
            seen += part
    os.close(main)
    assert process.wait() == 0, seen
    assert b"\r" in seen and seen.endswith(b"\n")
    assert not set((tmp_path / "told").read_text()) & {"\r", "\x1b"}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("silenced", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {}])
def test_an_example_has_colours_where_there_are_some(monkeypatch, silenced):
    """On a terminal what is marked is green and lines are lines; in a pipe, or where colours are not wanted, it is in
    [[ ]]. Neither can steer the terminal."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in silenced.items():
        monkeypatch.setenv(name, value)
    example = Marked("trained on is what is in", [("<user>2 + 2?\n", False), ("4\x1b[2J", True)])
    told = {}
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        ConsoleListener().note(example)
        told[stream.isatty()] = " ".join(stream.getvalue().split())
    brackets = "trained on is what is in [[ ]]: <user>2 + 2?\\n[[4\\x1b[2J]]"
    assert told[False] == brackets
    if silenced:
        assert told[True] == brackets
    else:
        assert told[True] == "trained on is what is in \x1b[32mgreen\x1b[0m: <user>2 + 2? \x1b[32m4\\x1b[2J\x1b[0m"


def test_an_error_begins_on_a_line_of_its_own(monkeypatch):
    """Also where a live line was being written."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(ValueError, match="broken"), ConsoleListener() as listener:
        listener.advance(1, 3, "counting")
        raise ValueError("broken")
    assert sys.stderr.getvalue().strip(" ").endswith("\n")


def test_the_progress_line_of_a_narrow_terminal_has_what_counts(monkeypatch):
    """How far it is, how long it takes, where it is, its memory and its loss; in a pipe everything."""
    progress = Progress(
        block=0,
        step=244,
        steps_done=156,
        steps_total=200,
        losses={0: 0.623, **dict.fromkeys(range(1, 12), 0.5)},
        used_bytes=496_000_000,
        budget_bytes=600_000_000,
        bytes_written=189_000_000,
        examples_per_s=58.0,
        started=time.perf_counter() - 60,
    )
    monkeypatch.setenv("COLUMNS", "80")
    lines = {}
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        listener = ConsoleListener()
        for done in (150, 156):
            listener._last = 0.0
            listener.step(dataclasses.replace(progress, steps_done=done))
        lines[stream.isatty()] = stream.getvalue().replace("\r", "\n").splitlines()[-1].rstrip()
    assert len(lines[True]) < 80
    for shown in (" 78%", "block 0 step 244", "loss 0:0.623", "496 MB/600 MB", " left"):
        assert shown in lines[True] and shown in lines[False]
    assert "189 MB written" in lines[False] and "stall" in lines[False] and "11:0.500" in lines[False]


def test_blocks_on_a_cluster_are_a_table_in_a_terminal_and_a_line_in_a_pipe(monkeypatch):
    """The table keeps its place while something is said above it, fits 80 columns and less, and ends below itself."""
    long = {"steps": 20000, "examples_per_s": 1234.5, "used_bytes": 1_230_000_000}
    rows = [BlockProgress(block=0, step=20000, saved=20000, where="done", loss=0.41, **long)]
    rows += [
        BlockProgress(
            block=n, step=11000, saved=9000, where="a-machine-of-a-long-name", is_training=True, loss=0.5, **long
        )
        for n in (1, 2)
    ]
    rows += [BlockProgress(block=3, step=0, saved=0, steps=20000, where="waits")]
    monkeypatch.setenv("LINES", "30")
    told = {}
    for width in (80, 50, None):
        monkeypatch.setenv("COLUMNS", str(width or 80))
        monkeypatch.setattr(sys, "stderr", Terminal() if width else io.StringIO())
        with ConsoleListener() as listener:
            listener.blocks(rows, 100.0)
            listener.note("block 1 is lost")
            listener._last = 0.0
            listener.blocks(rows, 90.0)
        told[width] = re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", sys.stderr.getvalue()).replace("\r", "\n").splitlines()
    for width in (80, 50):
        assert max(map(len, told[width])) <= width and told[width].index("block 1 is lost") < len(told[width]) - 6
        last = "\n".join(line.rstrip() for line in told[width][-6:])
        assert re.match(r"block +where .*\n +0 +done .*20000/20000 ", last), last
        assert "a-machine-of-a-" in last and "11000/20000" in last and last.endswith("1 min 30 s left")
    assert re.search(r" 9000 +0.500 +1234 +1.23 GB$", told[80][-3].rstrip()), told[80]
    assert told[None][1] == "block 1 is lost" and len(told[None]) == 3
    assert told[None][2].endswith(
        " 52%  1 min 30 s left  steps 0:20000  1:11000 a-machine-of-a-long-name  2:11000 a-machine-of-a-long-name  3:0"
        "  loss 0:0.410 1:0.500 2:0.500"
    )


def test_of_more_blocks_than_a_terminal_has_lines_those_in_training_are_shown():
    """The others are counted."""
    rows = [
        BlockProgress(block=n, step=min(10, n), saved=min(10, n), steps=10, where="pc", is_training=n in (3, 5))
        for n in range(12)
    ]
    stream = io.StringIO()
    Console(file=stream, width=80).print(block_table(rows, None, width=80, height=4))
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    assert [line.split()[0] for line in lines[1:3]] == ["3", "5"] and lines[3] == "10 others, 2 of them done"


def test_a_terminal_that_does_not_know_a_character_gets_a_question_mark(run, edgeblocks_command):
    progress = edgeblocks_command("eval", run, "--samples", "0", env={"PYTHONIOENCODING": "ascii"})
    assert progress.returncode == 0 and "?" in progress.stdout and "Traceback" not in progress.stderr
