"""Exports with rounded matrices: smaller, nearly as good by hold-out data, refused where they cost too much."""

import json
import shutil

import numpy as np
import onnx
import pytest
from support.commands import assert_refused, invoke
from support.random_run import make_run, make_text_run, torch_runner

import edgeblocks
from edgeblocks.errors import ConfigError, EdgeblocksError, RunError
from edgeblocks.export.graph import make_template, write_graph
from edgeblocks.export.manifest import read_manifest, write_manifest
from edgeblocks.export.manifest_figures import Rounding
from edgeblocks.export.open_export import open_chain
from edgeblocks.export.rounded_graph import write_rounded
from edgeblocks.export.rounding import judge, most_loss_of, round_blocks
from edgeblocks.inference.metrics import validation_loss
from edgeblocks.progress import Silent
from edgeblocks.runs.open_data import data_of

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = {"width": 64, "heads": 4, "length": 8}
FAMILIES = ("dit", "vit", "mdlm", "ar", "looped")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    made = {name: make_text_run(folder / name, layers=(1, 1), family=name, **TEXT) for name in ("mdlm", "ar")}
    made["looped"] = make_text_run(folder / "looped", layers=(4,), family="looped", **TEXT)
    made["dit"] = make_run(folder / "dit", layers=(1, 1), family="dit", width=64, heads=4, patch=4)
    made["vit"] = make_run(folder / "vit", layers=(1, 1), family="vit", width=64, heads=4, patch=4)
    return made


@pytest.fixture(scope="module")
def exports(runs, tmp_path_factory):
    """Folders by family and kind of weights, written when one is first asked for."""
    folder, made = tmp_path_factory.mktemp("exports"), {}

    def exported(name, kind):
        """Tracing takes seconds: an export of rounded weights is made of the family's one in float32."""
        out = folder / f"{name}-{kind}"
        if (name, kind) not in made and kind == "fp32":
            runs[name].export(out)
        elif (name, kind) not in made:
            shutil.copytree(exported(name, "fp32"), out)
            told = {"weights": kind, "most_loss": None, "micro_batch": 64, "external_above_bytes": 10**9}
            manifest = round_blocks(runs[name].directory, open_chain(out), Silent(), **told)
            (out / "manifest.json").unlink()
            write_manifest(out, manifest)
        made[name, kind] = out
        return out

    return exported


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_of_graphs_is_the_family_s_own(name, runs, exports):
    """Oracle: by graphs in float32 it is what torch's network gives on the same examples with the same noise."""
    directory, rounding = runs[name].directory, read_manifest(exports(name, "int8")).rounding
    family = directory.family()
    data = data_of(directory.data_settings.run, Silent().advance)
    expected = validation_loss(
        family,
        torch_runner(runs[name], micro_batch=64),
        data,
        seed=directory.settings.run.seed,
        most_examples=rounding.examples,
    )
    assert rounding.loss_fp32 == pytest.approx(expected["total"], rel=1e-4)
    assert rounding.examples == expected["images"]
    if name == "vit":
        pixels, labels = data.gather(data.evaluation_indices(rounding.examples))
        wanted = (runs[name].classify(pixels, mem_budget="4GB").argmax(1) == labels).mean()
        assert rounding.accuracy_fp32 == pytest.approx(wanted, abs=2e-2)
    elif name != "dit":
        wanted = sum(level["share"] * level["accuracy"] for level in expected["levels"])
        assert rounding.accuracy_fp32 == pytest.approx(wanted, abs=2e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_eight_bits_cost_little(name, exports):
    rounding = read_manifest(exports(name, "int8")).rounding
    assert rounding.weights == "int8"
    assert 0 < rounding.relative_difference < 0.02
    assert rounding.judged == ("probability" if name == "vit" else "loss")
    cost, error = rounding.cost
    assert cost - 2 * error < 0.005 and abs(cost) < 0.03


@pytest.mark.parametrize("name", ["dit", "ar"])
def test_four_bits_cost_more_and_take_less(name, exports):
    found = {kind: read_manifest(exports(name, kind)) for kind in ("int8", "int4")}
    assert found["int4"].rounding.relative_difference > 4 * found["int8"].rounding.relative_difference
    sizes = {kind: sum(file.bytes for file in manifest.files) for kind, manifest in found.items()}
    assert sizes["int4"] < 0.75 * sizes["int8"] < 0.75 * found["int8"].rounding.bytes_fp32


def test_matrices_take_a_share_of_their_room(tmp_path):
    """int8 is 8 bits and 32 for each 32 weights, 0.281 of float32; int4 0.156. Products of vectors are among them."""
    run = make_run(tmp_path / "run", layers=(1,), width=256, heads=4)
    template = make_template(run.directory.family(), 1)
    source = tmp_path / "fp32.onnx"
    write_graph(source, template.graph, template.tensors_of(torch_runner(run).network(0)), external=False)
    for kind, share in (("int8", 0.3), ("int4", 0.17)):
        path = tmp_path / f"{kind}.onnx"
        write_rounded(source, path, kind, external_above_bytes=10**9)
        assert path.stat().st_size < share * source.stat().st_size
        assert "Gemm" not in {node.op_type for node in onnx.load(path).graph.node}


def test_float32_is_what_it_was(exports, runs, tmp_path):
    """Byte for byte, whether it is asked for or not: no key of the manifest tells of rounding."""
    runs["dit"].export(tmp_path / "out")
    for path in sorted(exports("dit", "fp32").iterdir()):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert "rounding" not in json.loads((tmp_path / "out" / "manifest.json").read_text())


def test_the_command_tells_what_rounding_costs(runs, exports, tmp_path):
    """And writes what `round_blocks` makes of an export in float32."""
    result = invoke("export", runs["dit"].path, "-o", tmp_path / "out", "--weights", "int4", "--most-loss", "50%")
    assert "then weights in int4: " in result.stdout
    assert "part loss " in result.stdout
    for path in sorted(exports("dit", "int4").glob("*.onnx")):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_rounded_exports_run(kind, exports, tmp_path):
    """Images near those of float32, and text; from the command line and from Python."""
    invoke("run", exports("dit", kind), "-o", tmp_path / "grid.png", "--n", "2", "--steps", "4")
    assert (tmp_path / "grid.png").stat().st_size
    images = {of: edgeblocks.open_export(exports("dit", of)).sample(2, steps=4) for of in ("fp32", kind)}
    difference = np.abs(images["fp32"].astype(int) - images[kind]).mean()
    assert 0 < difference < {"int8": 4, "int4": 40}[kind]
    assert "call" in str(invoke("run", exports("ar", kind), "--prompt", "call ", "--n", "1").stdout)


@pytest.mark.parametrize(
    "name", ["dit", "ar", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("vit", "mdlm", "looped"))]
)
def test_a_chain_in_one_file_has_the_weights_of_its_blocks(name, runs, exports, tmp_path):
    """It gives what the rounded blocks give, in the room that they take."""
    out = tmp_path / "one"
    manifest = runs[name].export(out, weights="int8", single_file=True)
    assert {path.name for path in out.iterdir()} == {"chain.onnx", "manifest.json", "USE.md"}
    assert manifest["rounding"]["weights"] == "int8"
    assert manifest["chain"]["verified"]["torch_difference"] is None
    chain, walk = (edgeblocks.open_export(folder) for folder in (out, exports(name, "int8")))
    if name == "dit":
        found, expected = (one.sample(3, steps=4, guidance=2).astype(int) for one in (chain, walk))
        assert np.abs(found - expected).max() <= 1
    elif name == "vit":
        pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
        np.testing.assert_allclose(chain.classify(pixels), walk.classify(pixels), atol=1e-5)
    else:
        assert chain.write(2, temperature=0, seed=3) == walk.write(2, temperature=0, seed=3)
    blocks_bytes = sum(path.stat().st_size for path in exports(name, "int8").glob("*.onnx"))
    assert (out / "chain.onnx").stat().st_size < 1.3 * blocks_bytes


def test_no_file_is_left_beside_a_rounded_export(exports):
    names = {path.name for path in exports("dit", "int4").iterdir()}
    assert names == {"block_000.onnx", "block_001.onnx", "manifest.json", "USE.md"}


MEASURED = {"weights": "int4", "part": "hold-out", "mean_abs_difference": 0.1, "relative_difference": 0.1}
MEASURED |= {"loss_fp32": 0.5, "loss": 0.5, "examples": 64, "bytes_fp32": 100}
OF_CLASSES = {"judged": "probability", "probability_fp32": 0.97, "probability_error": 0.002}


@pytest.mark.parametrize(
    ("found", "refused", "told"),
    [
        ({"loss": 0.51, "loss_error": 0.0005}, True, False),  # 2% ± 0.2%
        ({"loss": 0.51, "loss_error": 0.01}, False, True),  # 2% ± 4%
        ({"loss": 0.5001, "loss_error": 0.0001}, False, False),
        ({"loss": 0.51, "loss_error": None}, False, True),  # too few examples for an error
        (OF_CLASSES | {"loss": 0.9, "loss_error": 1e-4, "probability": 0.97}, False, False),
        (OF_CLASSES | {"probability": 0.9}, True, False),
        (OF_CLASSES | {"probability": 0.963}, False, True),
    ],
)
def test_only_what_noise_does_not_explain_is_refused(found, refused, told):
    """Beyond two standard errors of the paired differences; where they leave it open, a note says so. A classifier is
    judged by what it answers, whatever its loss."""
    notes = []
    listener = Silent()
    listener.note = notes.append
    rounding = Rounding(**MEASURED | found)
    if refused:
        with pytest.raises(EdgeblocksError, match=r"are refused: the .* on 64 examples .* worse by .* ± "):
            judge(rounding, 0.005, listener)
    else:
        judge(rounding, 0.005, listener)
    judge(rounding, None, listener)
    assert [("cannot be told from noise" in note) for note in notes] == [True] * told


def test_what_costs_too_much_is_refused_with_figures(runs, tmp_path):
    """And nothing is written."""
    out = tmp_path / "out"
    with pytest.raises(EdgeblocksError, match=r"int4 are refused: the loss on \d+ examples .* 0\.00% are allowed"):
        runs["ar"].export(out, weights="int4", most_loss="0%")
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "int2"], "int8, int4 or fp32 can be written"),
        (["--weights", "int8", "--most-loss", "0.5"], "a percentage is needed"),
        (["--most-loss", "1%"], "float32 loses nothing"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message, runs, tmp_path):
    result = invoke("export", runs["dit"].path, "-o", tmp_path / "out", *arguments)
    assert_refused(result, 2, message)


@pytest.mark.parametrize("text", ["", "%", "half%", "nan%", "inf%", "-1%"])
def test_what_is_no_percentage_is_refused(text):
    with pytest.raises(ConfigError, match="a percentage is needed"):
        most_loss_of(text, "int8")


def test_without_the_data_nothing_can_be_measured(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", images=images)
    run = make_run(tmp_path / "run", layers=(1,), width=32, heads=2, data=str(tmp_path / "own.npz"))
    (tmp_path / "own.npz").unlink()
    with pytest.raises(RunError, match="put the run's data back"):
        run.export(tmp_path / "out", weights="int8")


def test_rounded_weights_may_lie_beside_the_graph(exports, tmp_path):
    """As those of large blocks do: the same values."""
    source = exports("dit", "fp32") / "block_000.onnx"
    data_path = write_rounded(source, tmp_path / "block_000.onnx", "int8", external_above_bytes=0)
    assert data_path == tmp_path / "block_000.onnx.data"
    assert data_path.stat().st_size > 5 * (tmp_path / "block_000.onnx").stat().st_size
    apart, whole = (onnx.load(folder / "block_000.onnx") for folder in (tmp_path, exports("dit", "int8")))
    values = [{t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer} for model in (apart, whole)]
    assert values[0].keys() == values[1].keys()
    for name, array in values[0].items():
        np.testing.assert_array_equal(array, values[1][name])
