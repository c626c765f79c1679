"""The examples in docstrings hold."""

import doctest
import importlib
import importlib.util
import pkgutil
from pathlib import Path

import pytest

import edgeblocks

WITH_EXAMPLES = [
    name
    for _, name, is_package in pkgutil.walk_packages(edgeblocks.__path__, "edgeblocks.")
    if not is_package and ">>> " in Path(importlib.util.find_spec(name).origin).read_text()
]


def test_there_are_modules_with_examples():
    """More than twenty of them, also in folders of their own."""
    assert len(WITH_EXAMPLES) > 20
    assert {"edgeblocks.diffusion.noise", "edgeblocks.data.tokenizer"} <= set(WITH_EXAMPLES)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_examples_hold(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted > 0 and results.failed == 0
