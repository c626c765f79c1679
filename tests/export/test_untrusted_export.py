"""Exports from elsewhere: whatever their graphs do, and however they are laid out."""

import ast
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from support.commands import assert_refused, invoke
from support.random_run import make_run

import edgeblocks
from edgeblocks.errors import DoesNotFitError, OutOfBudgetError, RunError
from edgeblocks.export.export_run import export_run
from edgeblocks.export.graph_file import files_named_in
from edgeblocks.export.manifest import read_manifest, sha256_of
from edgeblocks.export.sampler import Sampler
from edgeblocks.files.untrusted import MalformedFileError
from edgeblocks.progress import Silent

BODY = ["b", 1, 8, 8]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An export of one block that makes images, with its weights in a file of their own."""
    folder = tmp_path_factory.mktemp("untrusted")
    run = make_run(folder / "run", layers=(1,), width=16, heads=2)
    export_run(run.directory, folder / "onnx", Silent(), external_above_bytes=1)
    return folder / "onnx"


@pytest.fixture
def copy(exported, tmp_path):
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def with_graph(folder, nodes, constants=(), *, data_file=None):
    """The export with another graph, of which the manifest has the checksum; its output is `out`."""
    manifest = read_manifest(folder)
    shape = ["b", *manifest.image_shape]
    inputs = [
        helper.make_tensor_value_info("z", TensorProto.FLOAT, shape),
        helper.make_tensor_value_info("sigma", TensorProto.FLOAT, ["b"]),
        helper.make_tensor_value_info("labels", TensorProto.INT64, ["b"]),
    ]
    output = onnx.ValueInfoProto(name="out")
    graph = helper.make_graph(nodes, "g", inputs, [output], list(constants))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = folder / "block_000.onnx"
    path.write_bytes(model.SerializeToString())
    content = json.loads((folder / "manifest.json").read_text())
    content["files"][0] |= {"data_file": None, "data_sha256": None, "bytes": path.stat().st_size}
    content["files"][0]["sha256"] = sha256_of(path)
    (folder / "manifest.json").write_text(json.dumps(content))
    return folder


def endless():
    """A loop that never ends."""
    kinds = [("i", TensorProto.INT64, []), ("go", TensorProto.BOOL, []), ("x", TensorProto.FLOAT, None)]
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Identity", ["x"], ["y"])],
        "body",
        [helper.make_tensor_value_info(*kind) for kind in kinds],
        [helper.make_tensor_value_info("go_on", TensorProto.BOOL, []), onnx.ValueInfoProto(name="y")],
    )
    body.output[1].type.tensor_type.elem_type = TensorProto.FLOAT
    return [helper.make_node("Loop", ["", "true", "z"], ["out"], body=body)], [
        numpy_helper.from_array(np.array(True), "true")
    ]


def filling(values):
    """A tensor of so many numbers, made inside the graph."""
    nodes = [
        helper.make_node("ConstantOfShape", ["many"], ["much"]),
        helper.make_node("ReduceSum", ["much"], ["sum"], keepdims=0),
        helper.make_node("Add", ["z", "sum"], ["out"]),
    ]
    return nodes, [numpy_helper.from_array(np.array([values], np.int64), "many")]


WRONG = {
    "another shape": (
        [helper.make_node("ReduceSum", ["z"], ["out"], keepdims=0)],
        [],
        r"gives .*float32.*\(\).* needed",
    ),
    "another type": ([helper.make_node("Cast", ["z"], ["out"], to=TensorProto.INT64)], [], r"gives .*int64.* needed"),
    "not a number": (
        [helper.make_node("Sub", ["z", "z"], ["o"]), helper.make_node("Div", ["o", "o"], ["out"])],
        [],
        r"block 0 of .* gives values that are not finite numbers",
    ),
    "no such node": ([helper.make_node("Nonsense", ["z"], ["out"])], [], r"cannot load block 0"),
    "another operator of onnxruntime's own": (
        [helper.make_node("Gelu", ["z"], ["out"], domain="com.microsoft")],
        [],
        r"block 0 is refused: .* operators that are not onnx's own, of .*com\.microsoft",
    ),
    "somebody's operator of that name": (
        [helper.make_node("MatMulNBits", ["z"], ["out"], domain="elsewhere")],
        [],
        r"block 0 is refused: .* of .*elsewhere",
    ),
    "a node that fails": (
        [helper.make_node("Reshape", ["z", "shape"], ["out"])],
        [numpy_helper.from_array(np.array([7, 7], np.int64), "shape")],
        r"onnxruntime cannot run block 0",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_a_graph_gives_is_checked(copy, what, capfd):
    """Its shape, its type and that it is finite; onnxruntime itself prints nothing."""
    nodes, constants, words = WRONG[what]
    result = invoke("run", with_graph(copy, nodes, constants), "-o", copy / "grid.png", "--n", "1", "--steps", "1")
    assert_refused(result, 1, words)
    assert capfd.readouterr().err == ""


def test_memory_that_a_graph_asks_for_is_bounded(copy):
    """4 GB of zeros under a budget of 2 GB are refused, with what to do."""
    sampler = Sampler(with_graph(copy, *filling(10**9)))
    words = r"refused at the budget of 2 GB; ask for fewer with --n or give more with --mem-budget. If .* elsewhere"
    with pytest.raises(OutOfBudgetError, match=words), sampler.within("2GB", n=1):
        sampler.sample(1, steps=1)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="signals of POSIX")
def test_an_endless_graph_answers_ctrl_c(copy):
    """Within a second or two."""
    sampler = Sampler(with_graph(copy, *endless()))
    main = threading.main_thread().ident
    timer = threading.Timer(0.5, lambda: signal.pthread_kill(main, signal.SIGINT))
    timer.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        sampler.sample(1, steps=1)
    assert time.monotonic() - started < 3


def test_an_image_of_the_manifest_has_bounds(copy):
    """Of all its values together, and of as many images as are asked for; nothing is allocated before."""
    content = json.loads((copy / "manifest.json").read_text())
    content["image"] = {"channels": 64, "height": 4096, "width": 4096}
    (copy / "manifest.json").write_text(json.dumps(content))
    assert_refused(invoke("run", copy), 1, r"image: 64 x 4096 x 4096 values are more than 67108864")
    content["image"]["channels"] = 4
    (copy / "manifest.json").write_text(json.dumps(content))
    words = r"takes at least 10\d GB for 64 at a time, by its manifest"
    with pytest.raises(DoesNotFitError, match=words), Sampler(copy).within("1GB", n=64):
        pass
    assert_refused(invoke("run", copy, "--mem-budget", "lots"), 2, "--mem-budget 'lots' is not a size")


@pytest.mark.parametrize("place", ["top", "in a loop"])
def test_weights_of_a_file_that_the_manifest_does_not_list_are_refused(copy, place):
    """They could be anybody's; also deep in a graph, and also one that lies beside it."""
    (copy / "other.bin").write_bytes(bytes(4))
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="other.bin")
    if place == "top":
        nodes, constants = [helper.make_node("Add", ["z", "w"], ["out"])], [tensor]
    else:
        nodes, constants = endless()
        nodes[0].attribute[0].g.initializer.append(tensor)
    with_graph(copy, nodes, constants)
    assert files_named_in(copy / "block_000.onnx") == {"other.bin"}
    with pytest.raises(RunError, match=r"block 0 is refused: .* takes weights from 'other.bin', which is not among"):
        Sampler(copy).sample(1, steps=1)


def test_the_files_that_a_graph_names_are_found_as_onnx_finds_them(exported):
    """Equality with onnx's own reader, on a graph of ours; what is no graph is refused."""
    path = exported / "block_000.onnx"
    model = onnx.load(path, load_external_data=False)
    named = {entry.value for one in model.graph.initializer for entry in one.external_data if entry.key == "location"}
    assert files_named_in(path) == named == {"block_000.onnx.data"}
    with contextlib.suppress(ValueError):
        assert not files_named_in(exported / "manifest.json")


@given(content=st.binary(max_size=200), place=st.integers(0, 2000), cut=st.integers(0, 2000))
def test_any_bytes_are_a_graph_or_are_refused(exported, content, place, cut, tmp_path_factory):
    """Also where they replace some of a graph's own: nothing else is raised, and it ends."""
    sound = (exported / "block_000.onnx").read_bytes()
    path = tmp_path_factory.getbasetemp() / "any.onnx"
    for made in (content, sound[:place] + content + sound[place + len(content) :], sound[:cut]):
        path.write_bytes(made)
        with contextlib.suppress(MalformedFileError):
            assert all(isinstance(name, str) for name in files_named_in(path))


def test_an_export_of_links_into_a_store_runs(copy, exported, tmp_path):
    """As caches of content lay out a folder: each file a link to one that is called by its checksum."""
    store = tmp_path / "blobs"
    store.mkdir()
    for path in list(copy.iterdir()):
        blob = store / sha256_of(path)
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, copy))
    np.testing.assert_array_equal(Sampler(copy).sample(2, steps=2), Sampler(exported).sample(2, steps=2))
    blob = (copy / "block_000.onnx").resolve()
    blob.write_bytes(b"another" + blob.read_bytes()[7:])
    with pytest.raises(RunError, match="is damaged"):
        Sampler(copy).sample(2, steps=2)


def test_an_export_in_a_folder_whose_name_is_no_text_runs(copy, exported, tmp_path):
    """Bytes that are no UTF-8, which onnxruntime does not take."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/ex\xe9"))
    copy.rename(folder)
    np.testing.assert_array_equal(Sampler(folder).sample(1, steps=2), Sampler(exported).sample(1, steps=2))


def test_onnxruntime_is_imported_in_one_place_which_switches_its_reports_off():
    """Before the import: later is too late. The user's own setting counts."""
    package = Path(edgeblocks.__file__).parent
    top = package.parent
    importing = set()
    for path in (file for folder in (package, top / "export", top / "targets") for file in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in getattr(node, "names", ())] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "onnxruntime" for name in names):
                importing.add(path.name)
    assert importing == {"onnx_runtime.py"}
    code = "import os; from edgeblocks.onnx_runtime import onnxruntime; onnxruntime();"
    code += "print(os.environ['ORT_DISABLE_TELEMETRY'])"
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    for own, expected in (({}, "1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0")):
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment | own, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == expected
