"""What reaches a terminal."""

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeblocks.terminal import command, one_line, quoted, visible


@given(st.text())
def test_a_line_is_one_line_that_steers_nothing(text):
    """Of any text; what was harmless is unchanged, and once is enough."""
    line = one_line(text)
    assert len(line.splitlines()) <= 1
    assert not any(ord(character) < 32 or 0x7F <= ord(character) < 0xA0 for character in line)
    line.encode()
    assert one_line(line) == line
    assert visible("a\n\tb") == "a\n\tb"
    if text.isprintable():
        assert line == text


NAMES = (b"a b", b"it's", b"a\nb", b"\x1b[31m", b"ex\xe9", b"back\\slash '\n", b"$HOME", "é".encode(), b"-n")


@pytest.mark.parametrize("name", NAMES)
def test_a_command_can_be_pasted(name):
    """A shell gives back the bytes of the name."""
    typed = command("run", Path(os.fsdecode(b"/x/" + name)), os.fsdecode(name))
    code = f'edgeblocks() {{ printf "%s\\0" "$@"; }}; {typed}'
    given = subprocess.run(["bash", "-c", code], capture_output=True, check=True).stdout.split(b"\0")
    assert given == [b"run", b"/x/" + name, name, b""]
    assert quoted("runs/a") == "runs/a"
