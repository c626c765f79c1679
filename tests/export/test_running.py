"""How exports are run: threads, execution providers, and budgets that do not hold all blocks."""

import json
import sys

import numpy as np
import pytest
from support.commands import assert_refused, invoke
from support.outside import EDGEBLOCKS, measured, measured_script
from support.random_run import make_text_run

import edgeblocks
from edgeblocks.errors import ConfigError
from edgeblocks.export.export_run import export_run
from edgeblocks.export.manifest import read_manifest
from edgeblocks.export.open_export import open_chain
from edgeblocks.onnx_runtime import Hardware, onnxruntime
from edgeblocks.progress import Silent

linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system bounds no memory")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Text token by token by four blocks, whose keys and values stay while they come and go; 10 MB each."""
    folder = tmp_path_factory.mktemp("running")
    run = make_text_run(folder / "run", layers=(1, 1, 1, 1), family="ar", width=320, heads=2, length=8)
    export_run(run.directory, folder / "onnx", Silent())
    assert min(file.bytes for file in read_manifest(folder / "onnx").files) > 8e6
    return folder / "onnx"


@linux
def test_blocks_give_way_where_the_budget_does_not_hold_all(exported):
    """Equality and measured bytes: the same text with less memory, within the budget; a note says what it costs."""
    asked = (*EDGEBLOCKS, "run", exported, "--n", "2", "--threads", "1", "--prompt", "the sea", "--mem-budget")
    block_bytes = max(file.bytes for file in read_manifest(exported).files)
    whole = measured(*asked, "4GB")
    budget_bytes = int(whole["peak_bytes"] - 1.5 * block_bytes)
    found = measured(*asked, f"{budget_bytes}B")
    assert found["code"] == 0, found["err"]
    assert found["out"] == whole["out"]
    assert found["peak_bytes"] <= budget_bytes < whole["peak_bytes"]
    assert "does not hold all blocks: each is read again for every token, which is slow; --mem-budget" in found["err"]
    assert "writing: 1/1" in whole["err"] and "does not hold" not in whole["err"]


_REFUSED = """
import sys
from edgeblocks.export.open_export import open_chain
from edgeblocks.onnx_runtime import Hardware, onnxruntime
from edgeblocks.registry import build_target
chain = open_chain(sys.argv[1], hardware=Hardware(threads=1))
target = build_target("cpu")
onnxruntime()
with target.without_gaps(), target.capped(target.used_bytes() + int(sys.argv[2])):
    print(chain.write(1, prompt="the sea"), len(chain.loads), chain.keeps_all)
"""


@linux
def test_blocks_give_way_where_the_system_refuses_memory(exported, tmp_path):
    """What graphs take beside their files is known once it is refused: then the same text comes, a block at a time."""
    sizes = [file.bytes for file in read_manifest(exported).files]
    whole, found = (
        measured_script(_REFUSED, exported, size, cwd=tmp_path)
        for size in (10**9, 20_000_000 + sum(sizes) - sizes[0] // 2)
    )
    assert found["code"] == 0, found["err"]
    assert whole["out"].endswith("] 4 True\n") and found["out"].endswith("] 8 False\n")
    assert found["out"].partition("]")[0] == whole["out"].partition("]")[0]


def test_graphs_run_on_as_many_threads_as_are_asked_for(exported):
    """Each session has so many, and the text is the same but for rounding, which greedy text does not show."""
    for threads in (1, 2):
        chain = open_chain(exported, hardware=Hardware(threads=threads))
        z = np.zeros((1, 1, chain.manifest.code_width), np.float32)
        shape = (chain.manifest.caches.num_caches[0], 1, chain.manifest.caches.heads, 0)
        past = np.zeros((*shape, chain.manifest.caches.head_width), np.float32)
        chain.run_block(0, z, np.ones(1, np.float32), np.zeros((1, 1), np.int64), past)
        (session,) = chain._sessions.values()
        assert session._session.get_session_options().intra_op_num_threads == threads
    texts = [edgeblocks.open_export(exported, threads=threads).write(2, temperature=0) for threads in (None, 1, 2)]
    assert texts[0] == texts[1] == texts[2]
    told = invoke("run", exported, "--n", "2", "--temperature", "0", "--threads", "1", "--provider", "CPU", "--json")
    assert json.loads(told.stdout) == texts[0]


def test_a_provider_that_is_not_there_is_refused_with_those_that_are(exported):
    """Also one that nobody knows, and no threads at all; nothing falls back to the processor in silence."""
    assert_refused(invoke("run", exported, "--threads", "0"), 2, "--threads 0: at least one is needed")
    words = r"--provider abacus: .* knows no such execution provider; available are .*\bcpu"
    assert_refused(invoke("run", exported, "--provider", "abacus"), 2, words)
    there = onnxruntime().get_available_providers()
    absent = next(name for name in onnxruntime().get_all_providers() if name not in there)
    short = absent.removesuffix("ExecutionProvider").lower()
    with pytest.raises(ConfigError, match=rf"--provider {short}: .* does not have it; available are .*\bcpu"):
        edgeblocks.open_export(exported, provider=short)
