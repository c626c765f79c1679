"""The whole chain in one ONNX file: what it gives, where it is refused, and the programs of USE.md."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from support.commands import invoke
from support.random_run import make_run, make_text_run, torch_runner, unlabelled_images

import edgeblocks
from edgeblocks.diffusion.noise import sampler_levels
from edgeblocks.diffusion.solver import guide, integrate
from edgeblocks.errors import ConfigError, DoesNotFitError, EdgeblocksError, RunError
from edgeblocks.export import chain_window
from edgeblocks.export.export_run import export_bytes, export_run
from edgeblocks.export.manifest import read_manifest, sha256_of
from edgeblocks.export.open_export import open_chain
from edgeblocks.export.sampler import Sampler
from edgeblocks.export.verify_chain import verify_chain
from edgeblocks.progress import Silent

AMPLE = "4GB"
"""This process is as large as the tests before have made it."""
TEXT = {"width": 32, "heads": 2, "length": 16}
KINDS = ("dit", "plain dit", "exact dit", "vit", "mdlm", "ar", "looped")


def make(kind, folder):
    path = folder / kind
    if kind == "dit":
        return make_run(path, layers=(2, 1, 2), width=32, heads=2)
    if kind == "plain dit":
        data = unlabelled_images(folder / "colours.npz")
        return make_run(path, layers=(1, 1), width=16, heads=2, data=data)
    if kind == "exact dit":
        return make_run(path, layers=(1, 1), method="exact", width=32, heads=2)
    if kind == "vit":
        return make_run(path, layers=(2, 2), family="vit", width=32, heads=2, patch=4)
    layers = (4,) if kind == "looped" else (1, 1, 1)
    return make_text_run(path, layers=layers, family=kind, **TEXT)


class WhenAsked(dict):
    """What is made of each kind when it is first asked for: a worker of the tests needs some of them."""

    def __init__(self, make):
        super().__init__()
        self._make = make

    def __missing__(self, kind):
        self[kind] = self._make(kind)
        return self[kind]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return WhenAsked(lambda kind: make(kind, folder))


@pytest.fixture(scope="module")
def chains(runs, tmp_path_factory):
    """Each run's export in one file."""
    folder = tmp_path_factory.mktemp("chains")

    def export(kind):
        export_run(runs[kind].directory, folder / kind, Silent(), single_file=True)
        return folder / kind

    return WhenAsked(export)


@pytest.fixture(scope="module")
def blocks(runs, tmp_path_factory):
    """Each run's export with a graph a block."""
    folder = tmp_path_factory.mktemp("blocks")

    def export(kind):
        export_run(runs[kind].directory, folder / kind, Silent())
        return folder / kind

    return WhenAsked(export)


@pytest.mark.parametrize("kind", ["dit", "plain dit", "exact dit"])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_images_of_one_file_equal_those_of_torch(runs, chains, kind, solver):
    """Equality but for rounding, with other levels than those of the manifest, with guidance, and in groups."""
    sampler = open_chain(chains[kind])
    asked = {"n": 5, "steps": 7, "solver": solver, "guidance": 1.0 if kind == "plain dit" else 2.5}
    found = sampler.sample(**asked, micro_batch=2)
    expected = runs[kind].sample(**asked, mem_budget=AMPLE)
    assert found.shape == expected.shape and found.dtype == np.uint8
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert (found == expected).mean() > 0.99


def test_the_block_of_a_level_is_found_in_the_graph(chains, blocks):
    """Equality with the walk, with levels on the boundaries between blocks, which the upper block owns."""
    chain, walk = open_chain(chains["dit"]), open_chain(blocks["dit"])
    walk.keeps_all = True
    high, *inner, low = walk.manifest.boundaries
    random = np.random.default_rng(0)
    for levels in ((high, *inner, low), (inner[0],), (float(np.nextafter(inner[0], 0)), inner[1], low)):
        noise = random.standard_normal((3, 1, 8, 8), dtype=np.float32)
        labels = np.array([1, 5, 10])
        feed = {"noise": noise, "levels": np.array(levels), "heun": np.array(False), "labels": labels}
        feed["guidance"] = np.array(1, np.float32)
        needed = [(np.float32, noise.shape), (np.uint8, (3, 8, 8, 1))]
        found, _ = chain.run_chain(feed, needed)
        walk.loads.clear()
        expected = integrate(lambda z, sigma: walk.denoise(z, sigma, labels), noise, levels, solver="euler")  # noqa: B023
        np.testing.assert_array_equal(found, expected)


def test_classes_of_one_file_equal_those_of_torch(runs, chains):
    """Equality of probabilities, whatever the images beside one and the number of chains."""
    classifier = open_chain(chains["vit"])
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
    for steps, noises in ((2, 1), (5, 3)):
        found = classifier.classify(pixels, steps=steps, noises=noises, seed=4)
        expected = runs["vit"].classify(pixels, steps=steps, noises=noises, seed=4, mem_budget=AMPLE)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        alone = classifier.classify(pixels[:2], steps=steps, noises=noises, seed=4)
        np.testing.assert_allclose(found[:2], alone, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_unmasked_text_of_one_file_equals_that_of_torch(runs, chains, temperature):
    """Equality, from nothing and with gaps, with few steps and with so many that some run no network."""
    writer = open_chain(chains["mdlm"])
    for asked in ({"steps": 3}, {"steps": 40}, {"steps": 8, "fill": "the ____ sat"}):
        found = writer.write(3, temperature=temperature, micro_batch=2, seed=1, **asked)
        own = {"n": 3, "temperature": temperature, "seed": 1, "mem_budget": AMPLE}
        assert found == runs["mdlm"].sample_text(**own, **asked)


@pytest.mark.parametrize("kind", ["ar", "looped"])
@pytest.mark.parametrize("choice", [(0.0, 1.0), (1.0, 1.0), (0.8, 0.5)])
def test_continued_text_of_one_file_equals_that_of_torch(runs, chains, kind, choice, monkeypatch):
    """Equality, without a prompt, with one of one token, and with one that goes through the graph in pieces."""
    monkeypatch.setattr(chain_window, "PROMPT_SEGMENT", 3)
    continuer = open_chain(chains[kind])
    for prompt in ("", "a", "call me ish"):
        asked = {"temperature": choice[0], "top_p": choice[1], "prompt": prompt, "steps": 5, "seed": 2}
        heard = []
        found = continuer.write(n=3, micro_batch=2, on_token=lambda *told: heard.append(told), **asked)  # noqa: B023
        assert found == runs[kind].sample_text(n=3, mem_budget=AMPLE, **asked)
        assert heard == [(done + 1, len(heard)) for done in range(2 * (16 - len(prompt)))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_one_file_holds_what_it_needs(chains, kind):
    """One graph, its manifest and USE.md: sound for onnx's checker, verified, and with inputs of any batch size."""
    folder = chains[kind]
    assert {path.name for path in folder.iterdir()} == {"chain.onnx", "manifest.json", "USE.md"}
    manifest = read_manifest(folder)
    assert (manifest.format_version, manifest.files) == (3, ())
    assert 0 <= manifest.chain.verified.torch_difference < manifest.chain.verified.limit
    assert 0 <= manifest.chain.verified.walk_difference < manifest.chain.verified.limit
    model = onnx.load(folder / "chain.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert {one.domain for one in model.opset_import} == {""}
    listed = re.findall(r"^- `(\w+)`: (\w+)", (folder / "USE.md").read_text(), re.MULTILINE)
    assert [name for name, _ in listed] == [one.name for one in (*model.graph.input, *model.graph.output)]


def test_large_chains_keep_their_weights_beside_the_graph(runs, chains, tmp_path):
    """Equality of bits with weights in a file of their own, which is checked; it takes the place of a former export."""
    out = Path(shutil.copytree(chains["plain dit"], tmp_path / "out"))
    export_run(runs["plain dit"].directory, out, Silent(), single_file=True, overwrite=True, external_above_bytes=1)
    assert {path.name for path in out.iterdir()} == {"chain.onnx", "chain.onnx.data", "manifest.json", "USE.md"}
    onnx.checker.check_model(out / "chain.onnx", full_check=True)
    inline = Sampler(chains["plain dit"]).sample_model_space(3, steps=5)
    np.testing.assert_array_equal(Sampler(out).sample_model_space(3, steps=5), inline)
    weights = bytearray((out / "chain.onnx.data").read_bytes())
    weights[len(weights) // 2] ^= 255
    (out / "chain.onnx.data").write_bytes(weights)
    with pytest.raises(RunError, match=r"the chain is damaged: .*chain\.onnx\.data does not match its checksum"):
        Sampler(out).sample(1)


def test_a_wrong_chain_fails_the_verification(runs, chains, blocks, tmp_path):
    """One weight off by 0.01 in one block is found, with the figure and the limit."""
    folder = Path(shutil.copytree(chains["dit"], tmp_path / "copy"))
    model = onnx.load(folder / "chain.onnx")
    (tensor,) = (one for one in model.graph.initializer if one.name == "block_002.readout.bias")
    tensor.raw_data = (onnx.numpy_helper.to_array(tensor) + np.float32(0.01)).tobytes()
    onnx.save(model, folder / "chain.onnx")
    content = json.loads((folder / "manifest.json").read_text())
    content["chain"] |= {"sha256": sha256_of(folder / "chain.onnx"), "bytes": (folder / "chain.onnx").stat().st_size}
    (folder / "manifest.json").write_text(json.dumps(content))
    run = runs["dit"]
    walk, chain = open_chain(blocks["dit"]), open_chain(folder)
    with pytest.raises(EdgeblocksError, match=r"the chain in one file .*they differ by .*1e-03 is allowed"):
        verify_chain(run.directory, torch_runner(run), walk, chain, Silent())


def test_a_chain_in_one_file_is_held_whole(runs, chains, tmp_path):
    """An export of it is refused where all blocks do not fit, with the number; so is what runs it."""
    directory = runs["dit"].directory
    assert export_bytes(directory, single_file=True) >= export_bytes(directory)
    with pytest.raises(DoesNotFitError, match=r"takes up to 49\d MB of memory, and the budget is 300 MB"):
        export_run(directory, tmp_path / "out", Silent(), single_file=True, mem_budget="300MB")
    with pytest.raises(DoesNotFitError, match="the chain has 6"), Sampler(chains["dit"]).within("20MB", n=1):
        pass


def test_the_commands_write_and_run_one_file(runs, tmp_path):
    """`export --single-file` and `run`, with grids as a graph a block gives them."""
    run = runs["plain dit"].directory.path
    for flags in (["--single-file"], []):
        out = tmp_path / f"onnx{len(flags)}"
        assert "verified against torch" in invoke("export", run, "-o", out, *flags).stdout
        assert invoke("run", out, "-o", tmp_path / f"{len(flags)}.png", "--n", "4", "--steps", "4").exit_code == 0
    assert (tmp_path / "onnx1/chain.onnx").exists()
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()


def test_an_export_is_opened_by_programs(chains, blocks):
    """Either kind of folder gives the same; what a network does not make is refused with what it does."""
    for kind, make in (
        ("dit", lambda export: export.sample(2, steps=4, label="3", mem_budget="4GB").tolist()),
        ("vit", lambda export: export.classify(np.zeros((1, 8, 8, 1), np.uint8)).round(4).tolist()),
        ("mdlm", lambda export: export.write(2, steps=4, fill="a ____ sea")),
        ("ar", lambda export: export.write(prompt="call", temperature=0.5, length=8)),
    ):
        assert make(edgeblocks.open_export(chains[kind])) == make(edgeblocks.open_export(blocks[kind]))
    export = edgeblocks.open_export(str(chains["vit"]))
    assert (export.path, export.task, export.class_names[3]) == (chains["vit"], "classes", "3")
    with pytest.raises(ConfigError, match="makes classes of images: use classify in place of sample"):
        export.sample(1)


RUN_ALL = """
import json, os, re, sys, io, contextlib
found = []
for folder in sys.argv[1:]:
    os.chdir(folder)
    (code,) = re.findall("```python\\n(.*?)```", open("USE.md").read(), re.DOTALL)
    names = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, names)
    assert printed.getvalue()
    last = names.get("pixels", names.get("tokens"))
    last = names.get("probabilities", names.get("written", last)) if "token" not in names else last
    found.append(getattr(last, "tolist", lambda: last)())
assert not {"torch", "edgeblocks"} & set(sys.modules)
print(json.dumps(found))
"""


def test_the_python_of_use_md_runs(chains, blocks):
    """With numpy and onnxruntime alone, for each family, in one file and block by block; nothing else is printed."""
    folders = [chains[kind] for kind in KINDS] + [blocks[kind] for kind in KINDS if " " not in kind]
    environment = os.environ | {"ORT_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-W", "ignore", "-c", RUN_ALL, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found = dict(zip(folders, json.loads(done.stdout), strict=True))
    for folder in folders:
        result, kind = np.array(found[folder]), folder.name
        if "dit" in kind:
            assert result.shape == ((4, 6, 4, 3) if kind == "plain dit" else (4, 8, 8, 1))
        elif kind == "vit":
            assert result.shape == (2, 10)
            np.testing.assert_allclose(result.sum(1), 1, atol=1e-4)
        elif kind == "mdlm":
            assert result.shape == (2, 16) and result.min() >= 0 and result.max() < 27
        else:
            assert result.shape == (17,) and result[0] == 27 and result[1:].max() < 27 and result.min() >= 0
    # And the images are those of the walk, by hand.
    walk = open_chain(blocks["dit"])
    walk.keeps_all = True
    noise = np.random.default_rng(0).standard_normal((4, 1, 8, 8), dtype=np.float32)
    labels, nothing = np.arange(4) % 10, np.full(4, 10)

    def denoise(z, sigma):
        return guide(walk.denoise(z, sigma, labels), walk.denoise(z, sigma, nothing), 2.0)

    levels = [float(f"{sigma:.6g}") for sigma in sampler_levels(walk.partition, num_steps=18)]
    images = integrate(denoise, noise, levels, solver="heun")
    pixels = np.rint(255 * np.clip(images / walk.manifest.scale + walk.manifest.mean, 0, 1)).transpose(0, 2, 3, 1)
    assert np.abs(np.array(found[chains["dit"]]) - pixels).max() <= 1


NODE = shutil.which("node")
OF_BOTH = [*KINDS, *(f"{kind} by blocks" for kind in KINDS if " " not in kind)]


def javascript(folder):
    (code,) = re.findall("```js\n(.*?)```", (folder / "USE.md").read_text(), re.DOTALL)
    return code


def exported(name, chains, blocks):
    kind = name.removesuffix(" by blocks")
    return chains[kind] if kind == name else blocks[kind]


@pytest.mark.skipif(NODE is None, reason="there is no node")
def test_the_javascript_of_use_md_can_be_read(chains, blocks, tmp_path):
    """By node, for each family, in one file and block by block."""
    for name in OF_BOTH:
        path = tmp_path / "use.mjs"
        path.write_text(javascript(exported(name, chains, blocks)))
        done = subprocess.run([NODE, "--check", path], capture_output=True, text=True, check=False)
        assert done.returncode == 0, (name, done.stderr)


HALF = -float(np.sqrt(2 * np.log(2)))
"""The normal number that the programs in JavaScript make of two random numbers of 1/2."""
SHOWN = """
const last = typeof pixels !== "undefined" ? pixels : typeof probabilities !== "undefined" ? probabilities
  : typeof written !== "undefined" ? written : tokens;
console.log(JSON.stringify(Array.from(last.data ?? last, Number)));
"""


class Halves:
    """A random generator that always gives 1/2."""

    def random(self, shape=()):
        return np.full(shape, 0.5)

    def standard_normal(self, shape, dtype=np.float64):
        return np.full(shape, HALF, dtype)


@pytest.fixture
def node_modules():
    """A folder that has onnxruntime-node: named by a variable, or npm's own."""
    if NODE is None:
        pytest.skip("there is no node")
    found = os.environ.get("EDGEBLOCKS_NODE_MODULES")
    if found is None and shutil.which("npm") is not None:
        found = subprocess.run(["npm", "root", "-g"], capture_output=True, text=True, check=False).stdout.strip()
    if not found or not (Path(found) / "onnxruntime-node").is_dir():
        pytest.skip("onnxruntime-node is not there: npm install -g onnxruntime-node")
    return Path(found)


@pytest.mark.parametrize("name", OF_BOTH)
def test_the_javascript_of_use_md_gives_what_its_python_gives(
    name, chains, blocks, node_modules, tmp_path, monkeypatch
):
    """Equality but for rounding, where all random numbers are 1/2; of the first image or text."""
    folder = Path(shutil.copytree(exported(name, chains, blocks), tmp_path / "export"))
    (folder / "node_modules").symlink_to(node_modules)
    (folder / "use.mjs").write_text(f"{javascript(folder)}\n{SHOWN}".replace("\n", "\nMath.random = () => 0.5;\n", 1))
    done = subprocess.run([NODE, "use.mjs"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = np.array(json.loads(done.stdout.splitlines()[-1]))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(np.random, "default_rng", lambda seed: Halves())
    (code,) = re.findall("```python\n(.*?)```", (folder / "USE.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    if "dit" in name:
        pixels = names["pixels"][0].transpose(2, 0, 1) if "by blocks" in name else names["pixels"][0]
        assert np.abs(found[: pixels.size] - pixels.ravel()).max() <= 1
    elif "vit" in name:
        np.testing.assert_allclose(found, names["probabilities"][0], atol=1e-5)
    elif "mdlm" in name:
        assert found.tolist() == (names["written"] if "written" in names else names["tokens"])[0].tolist()
    else:
        assert found.tolist() == names["tokens"]


@pytest.mark.parametrize("kind", ["mdlm", "ar"])
def test_writing_tells_how_far_it_is(chains, blocks, kind):
    """In either form of an export, up to all that there is to do."""
    for folder in (chains[kind], blocks[kind]):
        told = []
        open_chain(folder).write(2, on_token=lambda *done, told=told: told.append(done))
        assert told[-1][0] == told[-1][1] and told == sorted(told)
        lines = invoke("run", folder, "--n", "1").stderr.splitlines()
        assert lines[-1] == f"writing: {told[-1][1]}/{told[-1][1]}"
