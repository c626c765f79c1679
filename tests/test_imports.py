"""What a process does not import: every library's memory would have to be in every budget."""

import subprocess
import sys

import pytest

PARTS = {
    "plans and errors come at once": (
        ("planning", "settings", "errors", "limits", "methods", "progress", "registry", "seeds", "tasks", "units"),
        ("torch", "matplotlib"),
    ),
    "the deployed chain runs without torch": (
        ("diffusion", "data", "export.exported"),
        ("torch", "onnx", "sklearn", "matplotlib"),
    ),
    "an examination and a comparison ask others": (("doctor", "compare.trainings"), ("torch", "onnxruntime", "onnx")),
    "training draws no figures": (("api", "cli.main", "training"), ("matplotlib",)),
}
"""By claim: packages, with all their modules, and the libraries that none of them brings."""
PROGRAM = """
import importlib, pkgutil, sys
for name in sys.argv[1].split(","):
    module = importlib.import_module(f"edgeblocks.{name}")
    for _, inner, _ in pkgutil.walk_packages(getattr(module, "__path__", []), f"{module.__name__}."):
        if not inner.endswith("__main__"):
            importlib.import_module(inner)
print(sorted(set(sys.argv[2].split(",")) & set(sys.modules)))
"""


@pytest.mark.parametrize("claim", PARTS)
def test_a_part_does_not_import(claim):
    """Each in a process of its own, as the libraries are in this one."""
    modules, libraries = (",".join(names) for names in PARTS[claim])
    command = [sys.executable, "-c", PROGRAM, modules, libraries]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
