import json
import os
import shutil

import numpy as np
import onnx
import pytest
import torch
from support.commands import assert_refused, invoke
from support.random_run import make_run, torch_runner, unlabelled_images
from torch import nn

from edgeblocks.diffusion.noise import sampler_levels
from edgeblocks.diffusion.solver import integrate
from edgeblocks.errors import ConfigError, DoesNotFitError, EdgeblocksError, RunError
from edgeblocks.export.export_run import export_run
from edgeblocks.export.graph import make_template, trace_own, write_graph
from edgeblocks.export.manifest import read_manifest, sha256_of
from edgeblocks.export.sampler import Sampler
from edgeblocks.export.verify import BLOCK_LIMIT, OUTPUT_LIMIT, verify_export
from edgeblocks.families.dit import Dit, DitSettings
from edgeblocks.inference.block_runner import class_labels, guided
from edgeblocks.onnx_runtime import session_options
from edgeblocks.seeds import start_noise

onnxruntime = pytest.importorskip("onnxruntime")


class Notes:
    """A listener that keeps what it hears, and does something when a stage begins."""

    def __init__(self, at_stage=None):
        self.notes, self.stages, self.counts = [], [], []
        self._at_stage = at_stage or (lambda text: None)

    def stage(self, text):
        self.stages.append(text)
        self._at_stage(text)

    def advance(self, done, total, text):
        self.counts.append((done, total, text))

    def note(self, text):
        self.notes.append(text)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run with classes and blocks of two depths, and one without classes, of images that are not square."""
    folder = tmp_path_factory.mktemp("runs")
    data = unlabelled_images(folder / "colours.npz")
    return {
        "conditional": make_run(folder / "digits", layers=(2, 1, 2), width=32, heads=2),
        "unconditional": make_run(folder / "colours", layers=(1, 1), width=16, heads=2, data=data),
    }


@pytest.fixture(scope="module")
def exports(runs, tmp_path_factory):
    """Each run's exported directory, with what the listener heard."""
    folder, made = tmp_path_factory.mktemp("exports"), {}
    for name, run in runs.items():
        heard = Notes()
        export_run(run.directory, folder / name, heard)
        made[name] = (folder / name, heard)
    return made


def torch_images(run, n, *, steps=18, solver="heun", guidance=1.0, label=None):
    """Final images of torch's chain in model space."""
    data = run.directory.data
    labels = class_labels(n, num_classes=data.num_classes, chosen=label)
    return integrate(
        guided(torch_runner(run).denoise, labels, guidance=guidance, no_class=data.num_classes),
        torch.from_numpy(start_noise((data.channels, data.height, data.width), samples=range(n), seed=0)),
        sampler_levels(run.directory.partition, num_steps=steps),
        solver=solver,
    ).numpy()


@pytest.mark.parametrize("kind", ["conditional", "unconditional"])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_exported_images_equal_those_of_torch(runs, exports, kind, solver):
    """Equality: onnxruntime's final images are torch's within 1e-3 in model space, and as pixels but for rounding."""
    sampler = Sampler(exports[kind][0])
    expected = torch_images(runs[kind], 5, steps=7, solver=solver)
    found = sampler.sample_model_space(5, steps=7, solver=solver)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=OUTPUT_LIMIT, rtol=0)
    theirs = runs[kind].sample(n=5, steps=7, solver=solver, runner=torch_runner(runs[kind]))
    ours = sampler.sample(5, steps=7, solver=solver)
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs).max() <= 1
    assert (ours == theirs).mean() > 0.99


@pytest.mark.parametrize("guidance", [0.0, 0.5, 3.0])
def test_exported_guidance_equals_that_of_torch(runs, exports, guidance):
    """Equality: with one class and guidance, onnxruntime's images are torch's within 1e-3."""
    found = Sampler(exports["conditional"][0]).sample_model_space(3, steps=5, guidance=guidance, label="7")
    expected = torch_images(runs["conditional"], 3, steps=5, guidance=guidance, label=7)
    np.testing.assert_allclose(found, expected, atol=OUTPUT_LIMIT, rtol=0)


@pytest.mark.parametrize("kind", ["conditional", "unconditional"])
def test_an_export_reports_what_was_verified(exports, kind):
    """The manifest holds errors below their limits, and the listener heard every block exported and verified."""
    folder, heard = exports[kind]
    verified = read_manifest(folder).verified
    assert 0 < verified.block_max_abs_error < BLOCK_LIMIT
    assert 0 < verified.output_max_abs_error < OUTPUT_LIMIT
    assert verified.output_equal_share > 0.99
    assert verified.real_inputs
    blocks = len(read_manifest(folder).files)
    assert heard.stages == ["exporting", "verifying against torch"]
    assert [count[:2] for count in heard.counts if count[2] == "verifying"] == [
        (done + 1, blocks + 1) for done in range(blocks + 1)
    ]
    assert any("onnxruntime against torch" in note for note in heard.notes)


def test_an_exported_directory_holds_the_graphs_the_manifest_and_use_md_only(exports):
    """No temporary file, no data file of a small block, and no path or source line of the machine in a graph."""
    folder, _ = exports["conditional"]
    names = {"block_000.onnx", "block_001.onnx", "block_002.onnx", "manifest.json", "USE.md"}
    assert {path.name for path in folder.iterdir()} == names
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]
    for name in names - {"manifest.json", "USE.md"}:
        content = (folder / name).read_bytes()
        assert b"dit.py" not in content
        assert str(os.path.expanduser("~")).encode() not in content  # noqa: PTH111 - text is compared, no path is made


def test_a_graph_has_the_documented_inputs_and_named_weights(runs, exports):
    """z, sigma and labels in, denoised out, any batch; every weight bears its parameter's name, transposed or not."""
    for kind, names in (("conditional", ["z", "sigma", "labels"]), ("unconditional", ["z", "sigma"])):
        model = onnx.load(exports[kind][0] / "block_000.onnx")
        onnx.checker.check_model(model)
        assert [value.name for value in model.graph.input] == names
        assert [value.name for value in model.graph.output] == ["denoised"]
        assert all(value.type.tensor_type.shape.dim[0].dim_param for value in model.graph.input)
        weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        for name, parameter in torch_runner(runs[kind]).network(0).named_parameters():
            own = weights[name] if name in weights else weights[f"{name}.transposed"].T
            np.testing.assert_array_equal(own, parameter.numpy())


def test_export_prints_nothing(runs, tmp_path, capfd, exported_anew):
    """torch's exporter is kept quiet: neither stdout nor stderr gets a word."""
    export_run(runs["unconditional"].directory, tmp_path / "out", Notes())
    assert capfd.readouterr() == ("", "")


def test_what_an_export_takes_is_told_and_bounded(runs, tmp_path):
    """Nothing is written where it is more than the budget; the budget that is advised does."""
    directory = runs["unconditional"].directory
    with pytest.raises(DoesNotFitError, match="takes up to 490 MB of memory, and the budget is 300 MB") as caught:
        export_run(directory, tmp_path / "out", Notes(), mem_budget="300MB")
    assert not (tmp_path / "out").exists()
    advised = str(caught.value).split("--mem-budget ")[1].split(" ")[0]
    heard = Notes()
    export_run(directory, tmp_path / "out", heard, mem_budget=advised)
    assert "exporting takes up to 490 MB of memory" in heard.notes


def test_large_blocks_keep_their_weights_beside_the_graph(runs, exports, tmp_path):
    """Equality: above the threshold weights go to a data file, are checked there, and give the same bits."""
    out = tmp_path / "external"
    export_run(runs["conditional"].directory, out, Notes(), external_above_bytes=130_000)
    files = read_manifest(out).files
    assert [file.data_file for file in files] == ["block_000.onnx.data", None, "block_002.onnx.data"]
    assert [file.bytes for file in files] == [sum((out / name).stat().st_size for name in file.names) for file in files]
    inline = Sampler(exports["conditional"][0]).sample_model_space(3, steps=5)
    np.testing.assert_array_equal(Sampler(out).sample_model_space(3, steps=5), inline)
    onnx.checker.check_model(out / "block_000.onnx")
    flip_byte(out / "block_002.onnx.data")
    with pytest.raises(RunError, match=r"block 2 is damaged.*block_002\.onnx\.data"):
        Sampler(out).sample(1, steps=3)


def flip_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def change_weight(folder, block, by):
    """Add `by` to one weight of a block's readout, and put the new checksum into the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    path = folder / manifest["files"][block]["file"]
    model = onnx.load(path)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == "readout.bias")
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[0] += by
    tensor.raw_data = values.tobytes()
    onnx.save(model, path)
    manifest["files"][block]["sha256"] = sha256_of(path)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_wrong_weight_fails_the_verification(runs, exports, tmp_path):
    """One weight off by 1e-3 in one block is found, and the message names the block, the figure and the limit."""
    directory = runs["conditional"].directory
    folder = shutil.copytree(exports["conditional"][0], tmp_path / "copy")
    verify_export(directory, torch_runner(runs["conditional"]), Sampler(folder), Notes())
    change_weight(folder, 1, by=1e-3)
    with pytest.raises(EdgeblocksError, match=r"block 1 .*they differ by \d\.\d+e-0\d .*1e-04 is allowed"):
        verify_export(directory, torch_runner(runs["conditional"]), Sampler(folder), Notes())


def test_block_limit_and_image_limit_are_both_enforced(runs, exports):
    """With a limit of zero the blocks fail; with loose blocks the final images fail."""
    run, sampler = runs["conditional"], Sampler(exports["conditional"][0])
    with pytest.raises(EdgeblocksError, match="block 0"):
        verify_export(run.directory, torch_runner(run), sampler, Notes(), block_limit=0.0)
    with pytest.raises(EdgeblocksError, match="final images of 8"):
        verify_export(run.directory, torch_runner(run), sampler, Notes(), output_limit=0.0)


def test_another_block_in_a_blocks_place_fails_the_verification(runs, exports, tmp_path):
    """Routing: blocks 0 and 2 exchanged, with checksums that agree, are found."""
    run = runs["conditional"]
    folder = shutil.copytree(exports["conditional"][0], tmp_path / "copy")
    manifest = json.loads((folder / "manifest.json").read_text())
    first, last = manifest["files"][0], manifest["files"][2]
    for key in ("file", "sha256"):
        first[key], last[key] = last[key], first[key]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(EdgeblocksError, match="block 0"):
        verify_export(run.directory, torch_runner(run), Sampler(folder), Notes())


@pytest.mark.parametrize("stage", ["exporting", "verifying against torch"])
def test_an_interrupted_export_leaves_nothing(runs, tmp_path, stage):
    """Whenever it is stopped, neither the destination nor a temporary folder is left behind."""

    def interrupt(text):
        if text == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_run(runs["unconditional"].directory, tmp_path / "out", Notes(interrupt))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_keeps_the_former_one(runs, exports, tmp_path):
    """A block damaged between writing and verification stops the export; the export that was there still runs."""
    out = shutil.copytree(exports["unconditional"][0], tmp_path / "out")

    def damage(text):
        if text.startswith("verifying"):
            flip_byte(tmp_path / ".out.edgeblocks-new" / "block_001.onnx")

    with pytest.raises(RunError, match="block 1 is damaged"):
        export_run(runs["unconditional"].directory, out, Notes(damage), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert Sampler(out).sample(1, steps=2).shape == (1, 6, 4, 3)


def test_what_a_kill_left_behind_is_cleaned_up(runs, exports, tmp_path):
    """A half-written folder is removed; a former export that was moved aside is put back and then replaced."""
    (tmp_path / ".out.edgeblocks-new").mkdir()
    (tmp_path / ".out.edgeblocks-new" / "block_000.onnx").write_bytes(b"half")
    shutil.copytree(exports["conditional"][0], tmp_path / ".out.edgeblocks-former")
    export_run(runs["unconditional"].directory, tmp_path / "out", Notes())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(Sampler(tmp_path / "out").manifest.files) == 2


def test_nothing_but_an_export_is_replaced(runs, exports, tmp_path):
    """A folder with other content, a run, a file, and an export with other files beside it are refused and kept."""
    directory = runs["unconditional"].directory
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    beside = shutil.copytree(exports["unconditional"][0], tmp_path / "beside")
    (beside / "grid.png").write_bytes(b"x")
    for out, words in (
        (tmp_path / "own", "not an export"),
        (directory.path, "not an export"),
        (tmp_path / "file", "is a file"),
        (beside, r"files that are not of the export.*grid\.png"),
    ):
        before = sorted(out.rglob("*")) if out.is_dir() else out.read_text()
        with pytest.raises(ConfigError, match=words):
            export_run(directory, out, Notes(), overwrite=True)
        assert before == (sorted(out.rglob("*")) if out.is_dir() else out.read_text())


def test_an_export_is_replaced_only_when_asked(runs, exports, tmp_path):
    """By the command, with --force, or --overwrite as before; without, nothing is touched and no time is spent."""
    out = shutil.copytree(exports["conditional"][0], tmp_path / "out")
    command = ("export", runs["unconditional"].directory.path, "-o", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert_refused(invoke(*command), 2, f"-o {out} holds an export already; add --force to replace it, or choose")
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    assert invoke(*command, "--force").exit_code == 0
    assert len(read_manifest(out).files) == 2


def test_an_unfinished_run_is_exported_with_a_note(tmp_path):
    """Steps done and planned are told, and data that are gone: the blocks then see random inputs only."""
    data = unlabelled_images(tmp_path / "data.npz")
    run = make_run(tmp_path / "run", layers=(1,), step=3, steps=10, width=16, heads=2, data=data)
    (tmp_path / "data.npz").unlink()
    heard = Notes()
    manifest = export_run(run.directory, tmp_path / "new" / "out", heard)
    assert any("at steps 3 of 10" in note for note in heard.notes)
    assert any("random inputs only" in note for note in heard.notes)
    assert manifest["verified"]["real_inputs"] is False
    assert manifest == json.loads((tmp_path / "new" / "out" / "manifest.json").read_text())


class Gained(nn.Module):
    """A block whose parameter `gain` the exporter folds into another constant, so that it cannot be found."""

    def __init__(self, block):
        super().__init__()
        self.block = block
        self.gain = nn.Parameter(torch.full((8, 8), 0.5))

    def reset_tables_(self):
        self.block.reset_tables_()

    def forward(self, z, sigma, labels=None):
        return self.block(z, sigma, labels) * (self.gain * 2)


class GainedDit(Dit):
    def block(self, *, num_layers, checkpointing):
        return Gained(super().block(num_layers=num_layers, checkpointing=checkpointing))


def test_a_folded_parameter_is_exported_by_tracing_the_block_itself(runs, tmp_path):
    """Where a parameter is not among a graph's constants there is no template, and the block's own trace is right."""
    data = runs["conditional"].directory.data
    family = GainedDit(DitSettings(width=16, heads=2, depth=1), data)
    assert make_template(family, 1) is None
    network = family.block(num_layers=1, checkpointing=False).eval()
    network.reset_tables_()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    graph, tensors = trace_own(network, family)
    random = np.random.default_rng(0)
    z, sigma = random.standard_normal((3, 1, 8, 8), dtype=np.float32), np.ones(3, np.float32)
    labels = np.array([0, 5, 10])
    with torch.no_grad():
        expected = network(*map(torch.from_numpy, (z, sigma, labels))).numpy()
    for external in (False, True):
        path = tmp_path / f"{external}.onnx"
        assert (write_graph(path, graph, tensors, external=external) is not None) == external
        session = onnxruntime.InferenceSession(path, session_options())
        (found,) = session.run(None, {"z": z, "sigma": sigma, "labels": labels})
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_torch_loads_each_block_once(runs):
    """BlockRunner.loads of a Heun chain with guidance is 0, 1, 2: never back, never twice."""
    run = runs["conditional"]
    runner = torch_runner(run)
    run.sample(n=5, steps=9, guidance=2.0, runner=runner)
    assert runner.loads == [0, 1, 2]
