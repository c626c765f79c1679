"""Systems without what only POSIX or Linux has, as a process sees them that cannot import it."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

HIDDEN = """
import sys
import psutil  # for Linux it was built with them

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "resource"):
            raise ImportError(f"{name} is not there on this system")

for name in ("fcntl", "resource"):
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Hidden())

import edgeblocks
from edgeblocks.progress import Silent
from edgeblocks.registry import open_exported

class Notes(Silent):
    def note(self, text):
        print(text)

settings = dict(depth=3, width=16, batch=4, steps=2, sample_grids=0, hold_out=0.005, data="digits", mem_budget="2GB")
run = edgeblocks.train(out="run", listener=Notes(), **settings)
edgeblocks.resume("run", reinit_blocks=[0], listener=Notes())
run.export("onnx")
exported = open_exported("onnx")
with exported.within(None, n=2):
    assert exported.sample(2, steps=3).shape == (2, 8, 8, 1)
assert not {"fcntl", "resource"} & set(sys.modules)
"""


def test_without_fcntl_and_resource_a_run_is_trained_resumed_exported_and_run(tmp_path):
    """And a note says that nothing but the plan bounds the memory."""
    done = subprocess.run([sys.executable, "-c", HIDDEN], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("note: this system does not bound the memory of a process") == 2, done.stdout
    assert "made again from the beginning: block 0" in done.stdout
