"""Programs run and measured from outside, as `/usr/bin/time -v` does it."""

import json
import subprocess
import sys
from pathlib import Path

_LAUNCHER = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps({"code": done.returncode, "out": done.stdout, "err": done.stderr, "peak_bytes": peak_bytes}))
"""
EDGEBLOCKS = (sys.executable, "-m", "edgeblocks.cli")


def measured(*command, cwd=None):
    """Run a program below a small parent process: `code`, `out`, `err`, and `peak_bytes`, its largest resident set.

    (The resident set of a child that is started from a large process would begin with its parent's.)
    """
    launched = [sys.executable, "-c", _LAUNCHER, *map(str, command)]
    return json.loads(subprocess.run(launched, check=True, capture_output=True, text=True, cwd=cwd).stdout)


def measured_script(program, *arguments, cwd=None):
    """The same for a Python program given as text."""
    path = Path(cwd) / "program.py"
    path.write_text(program)
    return measured(sys.executable, path, *arguments, cwd=cwd)
