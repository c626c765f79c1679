"""Fine-tuned image classifiers as one ONNX graph: torch's logits, torch-free, from folders that are checked."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from support.changed_export import changed_copy, manifest_with
from support.commands import assert_refused, invoke
from support.outside import measured_script
from support.small_model import transformers
from support.small_vit import LORA, SMALL, WANTED, write_vit

import edgeblocks
from edgeblocks.errors import ConfigError, DoesNotFitError, RunError
from edgeblocks.export.destination import check_destination
from edgeblocks.export.export_vision import export_vision
from edgeblocks.export.manifest import sha256_of
from edgeblocks.export.vision_model import VisionModel, read_vision_manifest
from edgeblocks.export.vision_rounding import round_classifier
from edgeblocks.progress import Silent

pytestmark = pytest.mark.usefixtures("one_thread")

FILES = {"model.onnx", "manifest.json", "USE.md"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_vit(transformers(), tmp_path_factory.mktemp("base") / "tiny-vit")


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {
        "full": edgeblocks.finetune(base, out=folder / "full", **WANTED),
        "lora": edgeblocks.finetune(base, out=folder / "lora", quantize="none", **LORA),
    }


@pytest.fixture(scope="module")
def exports(runs, tmp_path_factory):
    """Folders and manifests by the kind of tuning, written when one is first asked for."""
    folder, made = tmp_path_factory.mktemp("exports"), {}

    def exported(kind):
        if kind not in made:
            made[kind] = folder / kind, runs[kind].export(folder / kind)
        return made[kind]

    return exported


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Pictures of another size and form, in a folder with one below it."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    random = np.random.default_rng(2)
    for name in ("a.png", "b.jpg", "more/c.png"):
        Image.fromarray(random.integers(0, 256, (20, 31, 3), dtype=np.uint8)).save(folder / name)
    return folder


def digits(count):
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_graph_gives_what_the_run_s_network_gives(kind, runs, exports):
    """Oracle: logits and probabilities of pictures as they are, of any number of them."""
    run, (out, manifest) = runs[kind], exports(kind)
    model = VisionModel(out)
    for count in (1, 5):
        pixels = digits(count)
        logits, probabilities = model.run(pixels)
        with torch.no_grad():
            expected = run.network().logits(run.images(pixels))
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        np.testing.assert_allclose(probabilities, run.classify(pixels), atol=1e-5)
        assert np.abs(logits).max() > 0.01
    assert {path.name for path in out.iterdir()} == FILES
    assert manifest["graph"]["sha256"] == sha256_of(out / "model.onnx")
    verified = manifest["verified"]
    assert verified["logits_max_abs_error"] <= verified["logits_limit"] == pytest.approx(1e-3)
    assert (verified["top1_equal"], verified["pictures"], verified["real_pictures"]) == (16, 16, True)
    assert manifest["class_names"] == list("0123456789") and manifest["model_type"] == "vit"
    onnx.checker.check_model(out / "model.onnx", full_check=True)


def test_the_command_line(exports, runs, photos):
    """Classes of files and folders; what does not belong to it is refused; what it is told to be."""
    out, manifest = exports("full")
    told = json.loads(invoke("run", out, photos, "--threads", "1", "--json").stdout)
    assert [Path(answer["path"]).name for answer in told] == ["a.png", "b.jpg", "c.png"]
    pixels = np.stack([VisionModel(out).taken.read(Path(answer["path"])) for answer in told])
    for answer, row in zip(told, runs["full"].classify(pixels), strict=True):
        assert len(answer["classes"]) == 5
        for found in answer["classes"]:
            assert found["probability"] == pytest.approx(row[int(found["name"])], abs=1e-5)
    assert re.search(r"a\.png: \d \d+\.\d%, ", invoke("run", out, photos / "a.png").stdout)
    assert_refused(invoke("run", out, photos, "--steps", "4"), 2, "no noise levels")
    assert_refused(invoke("run", out), 2, "name images")
    assert_refused(invoke("run", out, photos, "--n", "3"), 2, "classifies images")
    assert_refused(invoke("run", out, photos, "--mem-budget", "1MB"), 3, "takes at least")
    told = json.loads(invoke("info", out, "--json").stdout)
    assert (told["family"], told["makes"], told["classes"], told["image"]) == ("vit", "classes", 10, "8x8x1")
    assert told["verified"] == manifest["verified"]


_OPENED = """
import json, sys
import numpy as np
import edgeblocks
export = edgeblocks.open_export(sys.argv[1], threads=1)
pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
found = [export.classify(pixels, mem_budget="4GB").tolist() for _ in range(2)]
assert found[0] == found[1]
print(json.dumps([export.task, export.class_names, found[0]]))
assert not {"torch", "transformers"} & set(sys.modules)
"""


def test_programs_open_it_as_they_do_other_exports(exports, runs, tmp_path):
    """The same classes, without torch; what it does not make is refused with what it does."""
    out, _ = exports("full")
    told = measured_script(_OPENED, out, cwd=tmp_path)
    assert told["code"] == 0, told["err"]
    task, names, found = json.loads(told["out"])
    assert (task, names) == ("classes", list("0123456789"))
    np.testing.assert_allclose(found, runs["full"].classify(digits(5)), atol=1e-5)
    export = edgeblocks.open_export(out)
    with pytest.raises(ConfigError, match="makes classes of images: use classify in place of sample"):
        export.sample(1)
    with pytest.raises(ConfigError, match="the network takes uint8"):
        export.classify(digits(1)[:, :4])
    with pytest.raises(ConfigError, match="--noises 2: a fine-tuned classifier has no noise levels"):
        export.classify(digits(1), noises=2)


def test_the_program_of_use_md_classifies_a_photo(exports, photos, tmp_path, capsys, monkeypatch):
    """Equality with `run`, but for how a photo is resized."""
    folder = Path(shutil.copytree(exports("full")[0], tmp_path / "export"))
    shutil.copyfile(photos / "b.jpg", folder / "photo.jpg")
    monkeypatch.chdir(folder)
    text = (folder / "USE.md").read_text()
    (code,) = re.findall("```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(code, names)
    (answer,) = VisionModel(folder).classify_files([folder / "photo.jpg"])
    likeliest = answer["classes"][0]
    name, probability = capsys.readouterr().out.split()
    assert name == likeliest["name"] and float(probability) == pytest.approx(likeliest["probability"], abs=0.01)
    described = dict(re.findall(r"^- `(\w+)`: (\w+ \[[^]]*\])", text, re.MULTILINE))
    graph = onnx.load(folder / "model.onnx").graph
    assert [value.name for value in (*graph.input, *graph.output)] == list(described)
    assert described["pixels"] == "uint8 [batch, 8, 8, 1]"


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node")
def test_the_javascript_of_use_md_can_be_read(exports, tmp_path):
    """By node."""
    (code,) = re.findall("```js\n(.*?)```", (exports("full")[0] / "USE.md").read_text(), re.DOTALL)
    (tmp_path / "use.mjs").write_text(code)
    done = subprocess.run(["node", "--check", tmp_path / "use.mjs"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_another_architecture_with_weights_beside_it_and_without_data(tmp_path):
    """Dinov2, whose positions are interpolated for larger pictures, in colour; random pictures are compared."""
    library, random = transformers(), np.random.default_rng(1)
    torch.manual_seed(0)
    library.Dinov2Model(library.Dinov2Config(**SMALL, mlp_ratio=2)).save_pretrained(tmp_path / "model")
    (tmp_path / "model/preprocessor_config.json").write_text(json.dumps({"crop_size": 12}))
    pixels = random.integers(0, 256, (12, 12, 12, 3), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=pixels, labels=np.arange(12) % 3)
    wanted = {**WANTED, "data": str(tmp_path / "data.npz"), "steps": 1, "hold_out": 0.3}
    run = edgeblocks.finetune(tmp_path / "model", out=tmp_path / "run", **wanted)
    (tmp_path / "data.npz").unlink()
    out = tmp_path / "out"
    manifest = export_vision(run, out, Silent(), external_above_bytes=0)
    assert manifest["verified"]["real_pictures"] is False
    assert {path.name for path in out.iterdir()} == FILES | {"model.onnx.data"}
    assert manifest["graph"]["data_sha256"] == sha256_of(out / "model.onnx.data")
    with torch.no_grad():
        expected = run.network().logits(run.images(pixels))
    np.testing.assert_allclose(VisionModel(out).run(pixels)[0], expected, atol=1e-4)
    with pytest.raises(RunError, match="what rounding costs is measured on"):
        round_classifier(
            run.directory, VisionModel(out), Silent(), weights="int8", most_loss=None, external_above_bytes=0
        )


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_weights_are_rounded(weights, exports, runs, tmp_path):
    """The graph multiplies with rounded matrices, what it costs is what can be counted, and `run` runs it."""
    folder = Path(shutil.copytree(exports("full")[0], tmp_path / "export"))
    exact, told = VisionModel(folder), {"weights": weights, "most_loss": None, "external_above_bytes": 10**9}
    found = exact.run(digits(5))[1]
    manifest = round_classifier(runs["full"].directory, exact, Silent(), **told)
    (folder / "manifest.json").unlink()
    manifest.write(folder)
    assert {path.name for path in folder.iterdir()} == FILES
    assert {node.op_type for node in onnx.load(folder / "model.onnx").graph.node if node.domain} == {"MatMulNBits"}
    rounding = read_vision_manifest(folder).rounding
    assert (rounding.weights, rounding.judged, rounding.examples) == (weights, "probability", 36)
    rounded = VisionModel(folder)
    worst = np.abs(rounded.run(digits(5))[1] - found).max()
    assert 0 < worst < {"int8": 0.01, "int4": 0.1}[weights]
    assert 0 < rounding.relative_difference < 1
    told = json.loads(invoke("info", folder, "--json").stdout)
    assert told["weights"] == weights


def test_a_folder_from_elsewhere_is_checked(exports, tmp_path):
    """Every file, what the graph refers to and does, and what the manifest says of it."""
    source, _ = exports("full")

    def changed(change):
        return changed_copy(source, tmp_path / "changed", change)

    def graph(edit):
        """Another graph, of which the manifest has the checksum."""

        def change(folder):
            model, path = onnx.load(folder / "model.onnx"), folder / "model.onnx"
            edit(model.graph)
            path.write_bytes(model.SerializeToString())
            content = json.loads((folder / "manifest.json").read_text())["graph"]
            manifest_with(graph={**content, "sha256": sha256_of(path), "bytes": path.stat().st_size})(folder)

        return change

    def rewired(kind, domain):
        def edit(graph):
            graph.node[0].op_type, graph.node[0].domain = kind, domain

        return graph(edit)

    def outside(graph):
        weight = next(tensor for tensor in graph.initializer if len(tensor.raw_data) > 64)
        weight.ClearField("raw_data")
        weight.data_location = onnx.TensorProto.EXTERNAL
        weight.external_data.add(key="location", value="../secret")

    def flip(folder):
        content = bytearray((folder / "model.onnx").read_bytes())
        content[-1] ^= 1
        (folder / "model.onnx").write_bytes(content)

    names = [str(number) for number in range(11)]
    for change, said in (
        (rewired("Anything", "somebody.else"), "operators that are not onnx's own, of 'somebody.else'"),
        (rewired("Gelu", "com.microsoft"), r"operators that are not onnx's own, of 'com\.microsoft'"),
        (rewired("Loop", ""), "has a loop"),
        (graph(outside), "takes weights from '../secret', which is not among its files"),
        (flip, "does not match its checksum"),
        (lambda folder: (folder / "model.onnx").unlink(), "the model is missing"),
        (manifest_with(class_names=names), "of another network than its manifest describes"),
        (manifest_with(class_names=["one"]), "class_names"),
        (manifest_with(verified=None), "never finished"),
        (manifest_with(format_version=2), "format_version"),
        (manifest_with(kind="something"), "of another kind"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "damaged"),
    ):
        with pytest.raises(RunError, match=said):
            edgeblocks.open_export(changed(change)).classify(digits(1))


def test_what_cannot_be_exported_is_said(exports, runs, base, tmp_path):
    """And nothing is left behind."""
    run, (out, _) = runs["full"], exports("full")
    assert_refused(invoke("export", run.path, "-o", out), 2, "holds an export already; add --force to replace")
    check_destination(out, overwrite=True)
    other = Path(shutil.copytree(out, tmp_path / "other"))
    (other / "mine.txt").write_text("x")
    assert_refused(invoke("export", run.path, "-o", other, "--force"), 2, "files that are not of the export there")
    shutil.rmtree(other)
    for asked, said in (
        (["--single-file"], "always one graph"),
        (["--weights", "int2"], "int8, int4 or fp32"),
        (["--most-loss", "1%"], "float32 loses nothing"),
        (["--web", tmp_path / "page"], "one directory"),
    ):
        assert_refused(invoke("export", run.path, "-o", tmp_path / "x", *asked), 2, said)
    with pytest.raises(DoesNotFitError, match="the whole model is traced and verified in memory"):
        run.export(tmp_path / "x", mem_budget="100MB")
    moved = base.rename(base.with_name("moved"))
    try:
        with pytest.raises(RunError, match=r"cannot read .*tiny-vit"):
            edgeblocks.load(run.path).export(tmp_path / "x")
    finally:
        moved.rename(base)
    assert list(tmp_path.iterdir()) == []
