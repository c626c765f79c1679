"""A chain in one file from elsewhere: what its graph may not do is found before onnxruntime loads it."""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from support.commands import assert_refused, invoke
from support.random_run import make_run

from edgeblocks.errors import RunError
from edgeblocks.export.export_run import export_run
from edgeblocks.export.graph_file import files_named_in, problem_of_chain
from edgeblocks.export.manifest import read_manifest, sha256_of
from edgeblocks.export.sampler import Sampler
from edgeblocks.files.untrusted import MalformedFileError
from edgeblocks.limits import MOST_ROUNDS
from edgeblocks.progress import Silent


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untrusted")
    run = make_run(folder / "run", layers=(1,), width=16, heads=2)
    export_run(run.directory, folder / "onnx", Silent(), single_file=True)
    return folder / "onnx"


@pytest.fixture
def copy(exported, tmp_path):
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def changed(folder, change):
    """The export with its graph changed, of which the manifest has the checksum."""
    path = folder / "chain.onnx"
    model = onnx.load(path)
    change(model)
    path.write_bytes(model.SerializeToString())
    content = json.loads((folder / "manifest.json").read_text())
    content["chain"] |= {"sha256": sha256_of(path), "bytes": path.stat().st_size}
    (folder / "manifest.json").write_text(json.dumps(content))
    return folder


def the_loop(model):
    (loop,) = (node for node in model.graph.node if node.op_type == "Loop")
    return loop


def constant(model, value, name):
    model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))


def endless(model):
    the_loop(model).input[0] = ""


def many_rounds(model):
    constant(model, MOST_ROUNDS + 1, "many")
    next(node for node in model.graph.node if node.op_type == "Min").input[1] = "many"


def a_number_of_its_own(model):
    constant(model, 5, "five")
    the_loop(model).input[0] = "five"


def bounded_by_what_is_fed(model):
    next(node for node in model.graph.node if node.op_type == "Min").input[1] = "labels"


def a_loop_in_the_loop(model):
    inner = helper.make_node("Loop", ["constant_0", ""], ["unused"], body=the_loop(model).attribute[0].g)
    the_loop(model).attribute[0].g.node.append(inner)


def foreign_operator(model):
    model.graph.node.append(helper.make_node("Run", ["noise"], ["out"], domain="com.example"))


def foreign_operator_in_the_loop(model):
    body = the_loop(model).attribute[0].g
    body.node.append(helper.make_node("Run", [], ["out"], domain="com.microsoft"))


def functions(model):
    model.functions.append(onnx.FunctionProto(name="f", domain="com.example"))


def other_weights(model):
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../w.bin")
    the_loop(model).attribute[0].g.initializer.append(tensor)


def another_type(model):
    model.graph.node[-1].CopyFrom(helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT))
    model.graph.output[1].CopyFrom(helper.make_tensor_value_info("pixels", TensorProto.FLOAT, None))


def no_numbers(model):
    (last,) = (node for node in model.graph.node if node.output[0] == "images")
    last.CopyFrom(helper.make_node("Div", [last.input[0], "nothing"], ["images"]))
    model.graph.initializer.append(numpy_helper.from_array(np.array(0, np.float32), "nothing"))


REFUSED = {
    endless: f"the chain is refused: .* has a loop that could run more than {MOST_ROUNDS} times",
    many_rounds: f"has a loop that could run more than {MOST_ROUNDS} times",
    a_number_of_its_own: "has a loop that could run more than",
    bounded_by_what_is_fed: "has a loop that could run more than",
    a_loop_in_the_loop: "has a loop inside another part",
    foreign_operator: r"has operators that are not onnx's own, of 'com\.example'",
    foreign_operator_in_the_loop: r"of 'com\.microsoft'",
    functions: "parts of a kind that no export has",
    other_weights: r"takes weights from '\.\./w\.bin', which is not among its files",
    another_type: "the chain of .* is of another network than its manifest describes: it gives .*float32.*uint8",
    no_numbers: "the chain of .* gives values that are not finite numbers",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_what_a_chain_may_not_do_is_refused(copy, change, capfd):
    """With what it is; onnxruntime itself prints nothing."""
    result = invoke("run", changed(copy, change), "-o", copy / "grid.png", "--n", "1", "--steps", "2")
    assert_refused(result, 1, REFUSED[change])
    assert capfd.readouterr().err == ""


def test_a_sound_chain_is_not_refused(exported):
    """What is exported passes its own check, and a rewritten file of the same graph does."""
    assert problem_of_chain(exported / "chain.onnx") is None
    assert files_named_in(exported / "chain.onnx") == set()


def damaged_file(folder):
    content = bytearray((folder / "chain.onnx").read_bytes())
    content[len(content) // 2] ^= 255
    (folder / "chain.onnx").write_bytes(content)


DAMAGED = {
    "a missing file": (lambda folder: (folder / "chain.onnx").unlink(), r"the chain is missing: .*chain\.onnx"),
    "a flipped byte": (damaged_file, r"the chain is damaged: .*chain\.onnx does not match its checksum"),
    "a file cut short": (lambda f: (f / "chain.onnx").write_bytes(b"\x08\x08"), "have 2 bytes where"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_chain_is_found(copy, what):
    """Before it is loaded."""
    damage, words = DAMAGED[what]
    damage(copy)
    with pytest.raises(RunError, match=words):
        Sampler(copy).sample(1)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("format_version",), 2, "chain is given exactly in format version 3"),
        (("chain",), None, "chain is given exactly in format version 3"),
        (("chain", "file"), "../chain.onnx", "plain name of a file in the directory"),
        (("chain", "data_file"), "chain.onnx", "exactly when data_file"),
        (("chain", "sha256"), "abc", "chain.sha256='abc'"),
        (("chain", "verified"), None, "verified is missing"),
        (("chain", "verified", "limit"), 0, "chain.verified.limit=0"),
        (("boundaries",), [80.0], "boundaries"),
    ],
)
def test_a_manifest_of_a_chain_is_checked(copy, path, value, words):
    """Each of its own fields, with its name."""
    content = json.loads((copy / "manifest.json").read_text())
    *outer, last = path
    part = content
    for key in outer:
        part = part[key]
    part[last] = value
    (copy / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match=words):
        read_manifest(copy)


def loops_and_domains(graph, depth=0):
    """As onnx's own reader finds them: (depth, bounded) of each loop, and the domain of each node."""
    numbers = {
        one.name: numpy_helper.to_array(one).item()
        for one in graph.initializer
        if one.data_type == TensorProto.INT64 and len(one.raw_data) == 8
    }
    least = {output: node.input for node in graph.node if node.op_type == "Min" for output in node.output}
    for node in graph.node:
        if node.op_type == "Loop":
            times = next(iter(node.input), "")
            bounds = [numbers.get(name, MOST_ROUNDS + 1) for name in least.get(times, ())]
            yield (depth, any(bound <= MOST_ROUNDS for bound in bounds)), node.domain
        else:
            yield None, node.domain
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from loops_and_domains(inner, depth + 1)


@given(content=st.binary(max_size=40), place=st.integers(0, 6000), cut=st.integers(0, 6000))
def test_whatever_is_not_refused_is_bounded(exported, content, place, cut, tmp_path_factory):
    """Oracle: onnx's own reader. Bytes of a sound graph are replaced or cut off; nothing but ours is raised."""
    model = onnx.load(exported / "chain.onnx")
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) > 64:
            tensor.ClearField("raw_data")
    sound = model.SerializeToString()
    path = tmp_path_factory.getbasetemp() / "any.onnx"
    for made in (sound, sound[:place] + content + sound[place + len(content) :], sound[:cut], content):
        path.write_bytes(made)
        with contextlib.suppress(MalformedFileError):
            if problem_of_chain(path) is None:
                try:
                    read = onnx.load_from_string(made)
                except Exception:  # protobuf's errors have no common base
                    continue
                for loop, domain in loops_and_domains(read.graph):
                    assert domain in ("", "ai.onnx") and loop in (None, (0, True))
                assert not read.functions
