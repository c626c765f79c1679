"""Programs run and measured from outside, as `/usr/bin/time -v` does it."""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

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


def largest_together(*command, cwd=None, env=None):
    """Run a program with its child processes: `code`, `out`, `err`, and `together_bytes`, the largest sum seen.

    Code that processes share is counted once: of the first its resident set, of its children what is theirs alone.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = psutil.Popen(list(map(str, command)), stdout=out, stderr=err, text=True, cwd=cwd, env=env)
        together_bytes = 0
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                # A child that was just forked and is not yet a program of its own has its parent's memory.
                children = [child for child in process.children(recursive=True) if child.cmdline() != process.cmdline()]
                own_bytes = sum(child.memory_full_info().uss for child in children)
                together_bytes = max(together_bytes, process.memory_info().rss + own_bytes)
            time.sleep(0.02)
        for file in (out, err):
            file.seek(0)
        return {"code": process.returncode, "out": out.read(), "err": err.read(), "together_bytes": together_bytes}
