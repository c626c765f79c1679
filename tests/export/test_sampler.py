import functools
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.random_run import make_run, unlabelled_images

from edgeblocks.diffusion.noise import sampler_levels
from edgeblocks.diffusion.solver import class_number, classes_in_turn, guide, integrate
from edgeblocks.errors import ConfigError, EdgeblocksError, RunError
from edgeblocks.export.export_run import export_run
from edgeblocks.export.manifest import checked_path, read_manifest
from edgeblocks.export.sampler import Sampler


class Silent:
    """A listener that hears nothing."""

    def stage(self, text): ...

    def advance(self, done, total, text): ...

    def note(self, text): ...


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An exported run with classes, three blocks of one layer."""
    folder = tmp_path_factory.mktemp("sampler")
    run = make_run(folder / "run", layers=(1, 1, 1), width=32, heads=2)
    export_run(run.directory, folder / "onnx", Silent())
    return folder / "onnx"


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory):
    """An exported run without classes."""
    folder = tmp_path_factory.mktemp("unconditional")
    data = unlabelled_images(folder / "colours.npz")
    run = make_run(folder / "run", layers=(1, 1), width=16, heads=2, data=data)
    export_run(run.directory, folder / "onnx", Silent())
    return folder / "onnx"


@pytest.fixture
def copy(exported, tmp_path):
    """A copy of the export that a test may damage."""
    return shutil.copytree(exported, tmp_path / "copy")


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_solver_is_the_same_in_numpy_and_in_torch(solver):
    """Equality: one denoiser of plain operators gives the same float32 bits from numpy and from torch arrays."""
    noise = np.random.default_rng(0).standard_normal((7, 3, 5, 5), dtype=np.float32)
    levels = (80.0, 31.7, 9.3, 2.1, 0.63, 0.11, 0.002)

    def denoise(z, sigma):
        return guide(z * (0.25 / (sigma**2 + 0.25)), z * 0.125, 1.7)

    by_numpy = integrate(denoise, noise, levels, solver=solver)
    by_torch = integrate(denoise, torch.from_numpy(noise), levels, solver=solver)
    assert by_numpy.dtype == np.float32
    np.testing.assert_array_equal(by_numpy, by_torch.numpy())
    chain = integrate(denoise, torch.from_numpy(noise), levels, solver=solver)
    np.testing.assert_allclose(by_numpy, chain.numpy(), rtol=1e-5, atol=1e-5)


def test_heun_is_of_second_order():
    """Oracle: for Gaussian data the exact solution is known; twice the steps quarter Heun's error, halve Euler's."""
    top, bottom, std = 10.0, 0.01, 0.5

    def error(solver, steps):
        levels = tuple(np.geomspace(top, bottom, steps).tolist())
        found = integrate(lambda z, s: z * (std**2 / (std**2 + s**2)), np.float64(1.0), levels, solver=solver)
        return abs(float(found) - top * std / (std**2 + top**2) ** 0.5)

    assert error("heun", 40) < 0.35 * error("heun", 20)
    assert 0.4 < error("euler", 400) / error("euler", 200) < 0.6


def test_each_block_is_loaded_once_and_in_order(exported):
    """One sample() call loads 0, 1, 2, whatever the micro-batch, solver and guidance, and releases the last one."""
    for arguments in ({}, {"micro_batch": 2}, {"solver": "euler", "steps": 3}, {"guidance": 2.0, "steps": 6}):
        sampler = Sampler(exported)
        sampler.sample(5, **arguments)
        assert sampler.loads == [0, 1, 2]
        assert not sampler._sessions


@pytest.mark.parametrize("n", [1, 3, 7])
def test_any_batch_size_and_micro_batch_give_the_same_samples(exported, n):
    """Sample i depends neither on how many are made nor on the micro-batch, up to 1e-5 in model space."""
    sampler = Sampler(exported)
    expected = sampler.sample_model_space(8, steps=6, micro_batch=8)
    for micro_batch in (None, 1, 3):
        found = sampler.sample_model_space(n, steps=6, micro_batch=micro_batch)
        np.testing.assert_allclose(found, expected[:n], atol=1e-5)


def test_samples_are_decided_by_the_seed(exported):
    """The same seed gives the same pixels, another seed others."""
    sampler = Sampler(exported)
    first = sampler.sample(3, steps=4, seed=1)
    np.testing.assert_array_equal(first, sampler.sample(3, steps=4, seed=1))
    assert (first != sampler.sample(3, steps=4, seed=2)).any()


def test_denoise_is_done_by_the_block_that_owns_the_level(exported):
    """Routing: at a boundary the lower block ends and the upper one begins, as in NoisePartition.block_of."""
    sampler = Sampler(exported)
    z, labels = np.ones((2, 1, 8, 8), np.float32), np.zeros(2, np.int64)
    for block, sigma in enumerate(sampler.manifest.boundaries[1:]):
        upper = sampler.denoise(z, sigma, labels)
        assert sampler.loads[-1] == block
        np.testing.assert_array_equal(upper, sampler.run_block(block, z, np.full(2, sigma, np.float32), labels))
    with pytest.raises(ValueError, match="outside"):
        sampler.denoise(z, 81.0, labels)


def test_classes_go_by_name_or_number(exported, unconditional):
    """A class by name equals the class by number; without one they take turns; images differ between classes."""
    sampler = Sampler(exported)
    seven = sampler.sample(2, steps=3, label="7")
    np.testing.assert_array_equal(seven, sampler.sample(2, steps=3, label=7))
    turns = sampler.sample_model_space(8, steps=3)
    np.testing.assert_allclose(turns[7], sampler.sample_model_space(8, steps=3, label=7)[7], atol=1e-5)
    assert np.abs(turns[1] - sampler.sample_model_space(2, steps=3, label=7)[1]).max() > 1e-3
    assert class_number("1", ("cat", "1")) == 1
    assert classes_in_turn(3, num_classes=0, chosen=None) is None
    assert Sampler(unconditional).sample(2, steps=2).shape == (2, 6, 4, 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"n": 0}, "--n 0"),
        ({"n": 1, "steps": 2}, "--steps 3 or more"),
        ({"n": 1, "steps": 0}, "--steps 0"),
        ({"n": 1, "guidance": -1.0}, "--guidance -1"),
        ({"n": 1, "guidance": float("nan")}, "--guidance nan"),
        ({"n": 1, "label": "cat"}, "no such class; the 10 classes are 0, 1"),
        ({"n": 1, "label": 10}, "no such class"),
        ({"n": 1, "label": -1}, "no such class"),
        ({"n": 1, "solver": "dpm"}, "--solver dpm"),
        ({"n": 1, "micro_batch": 0}, "micro_batch 0"),
    ],
)
def test_impossible_requests_are_refused(exported, arguments, words):
    """Each message names the argument and what is possible."""
    with pytest.raises(ConfigError, match=words):
        Sampler(exported).sample(arguments.pop("n"), **arguments)


def test_a_network_without_classes_refuses_them(unconditional):
    """A class or guidance is refused with the reason."""
    with pytest.raises(ConfigError, match="without classes"):
        Sampler(unconditional).sample(1, label=0)
    with pytest.raises(ConfigError, match="trained without"):
        Sampler(unconditional).sample(1, guidance=2.0)


def test_sampling_imports_no_torch(exported):
    """The deployed chain runs where torch is not installed: a process that samples imports neither torch nor onnx."""
    code = (
        "import sys; from edgeblocks.export.sampler import Sampler; Sampler(sys.argv[1]).sample(2, steps=3); "
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'onnx', 'yaml'}))"
    )
    done = subprocess.run([sys.executable, "-c", code, exported], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert done.stderr == ""


_PEAK = """
import sys
import numpy as np
import onnxruntime
from pathlib import Path
from edgeblocks.onnx_runtime import session_options
from edgeblocks.export.sampler import Sampler
folder, one_at_a_time = Path(sys.argv[1]), sys.argv[2] == "one"
sampler = Sampler(folder)
if one_at_a_time:
    sampler.sample(1, steps=3, solver="euler")
else:
    sessions = []
    for file in sampler.manifest.files:
        sessions.append(onnxruntime.InferenceSession(folder / file.file, session_options()))
        feed = {"z": np.zeros((1, 1, 8, 8), np.float32), "sigma": np.ones(1, np.float32), "labels": np.zeros(1, int)}
        sessions[-1].run(None, feed)
print(next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak resident set is read from /proc")
def test_memory_is_that_of_one_block(tmp_path):
    """Measured bytes: sampling three blocks of over 15 MB peaks at least 1.5 blocks below all of them loaded."""
    run = make_run(tmp_path / "run", layers=(1, 1, 1), width=448, heads=4)
    export_run(run.directory, tmp_path / "onnx", Silent())
    block_bytes = min(file.bytes for file in read_manifest(tmp_path / "onnx").files)
    assert block_bytes > 15e6

    def peak_bytes(how):
        command = [sys.executable, "-c", _PEAK, tmp_path / "onnx", how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    one, everything = peak_bytes("one"), peak_bytes("all")
    assert one < everything - 1.5 * block_bytes, f"one block at a time {one} bytes, all three {everything}"


@pytest.mark.parametrize(
    ("name", "words"),
    [("block_001.onnx", "block 1 is missing"), ("manifest.json", "not an exported directory: it has no manifest")],
)
def test_a_missing_file_is_named(copy, name, words):
    """A file that is gone gives an error that says which and what to do."""
    (copy / name).unlink()
    with pytest.raises(RunError, match=words):
        Sampler(copy).sample(1, steps=3)


@pytest.mark.parametrize("place", [0, 0.3, 0.99])
def test_a_flipped_byte_in_a_block_is_found_before_it_is_used(copy, place):
    """The block's checksum fails and the message names the block."""
    content = bytearray((copy / "block_002.onnx").read_bytes())
    content[int(place * len(content))] ^= 1
    (copy / "block_002.onnx").write_bytes(content)
    sampler = Sampler(copy)
    with pytest.raises(RunError, match="block 2 is damaged"):
        sampler.sample(1, steps=3)
    assert sampler.loads == [0, 1]


def test_a_run_or_an_empty_folder_is_not_an_export(exported, tmp_path):
    """The message tells how an export is made."""
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "nowhere", exported.parent / "run"):
        with pytest.raises(RunError, match="edgeblocks export RUN"):
            Sampler(folder)


def test_a_manifest_that_is_cut_short_is_found_at_every_length(copy):
    """Truncated JSON is a RunError, never another exception."""
    text = (copy / "manifest.json").read_text()
    for length in range(0, len(text.rstrip()), 97):
        (copy / "manifest.json").write_text(text[:length])
        with pytest.raises(RunError, match="damaged"):
            read_manifest(copy)


_PATH_LEADS_OUT = "plain name of a file in the directory"


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("format_version",), 1, "format version 1.*reads versions 2 and 3"),
        (("format_version",), True, "format version True"),
        (("format_version",), "1", "format version '1'"),
        (("kind",), "something", "of another kind"),
        (("files", 0, "file"), "../block_000.onnx", _PATH_LEADS_OUT),
        (("files", 0, "file"), "/etc/passwd", _PATH_LEADS_OUT),
        (("files", 0, "file"), "a\\b.onnx", _PATH_LEADS_OUT),
        (("files", 0, "file"), "C:b.onnx", _PATH_LEADS_OUT),
        (("files", 0, "file"), "..", _PATH_LEADS_OUT),
        (("files", 0, "file"), "block\0.onnx", _PATH_LEADS_OUT),
        (("files", 0, "file"), "", "files.0.file='': string should have at least 1 character"),
        (("files", 0, "file"), "block_001.onnx", "same name"),
        (("files", 1, "block"), 0, "in order"),
        (("files", 0, "sha256"), "abc", "files.0.sha256='abc': string should match pattern"),
        (("files", 0, "sha256"), None, "files.0.sha256=None: input should be a valid string"),
        (("files", 0, "data_sha256"), "0" * 64, "exactly when data_file"),
        (("files", 0, "data_file"), "../x", "exactly when|plain name"),
        (("files", 0), [], r"files.0=\[\]: input should be a valid dictionary"),
        (("files",), {}, "files={}: input should be a list"),
        (("boundaries",), [80.0, 0.1, 0.2, 0.002], "strictly descending"),
        (("boundaries",), [80.0, 0.5, 0.002], "files lists 3 blocks where 2 belong"),
        (("boundaries",), [80.0, 0.5, 0.1, -0.002], "boundaries.3=-0.002: input should be greater than or equal to 0"),
        (("boundaries",), [80.0, float("nan"), 0.1, 0.002], "boundaries.1=nan: input should be a finite number"),
        (("boundaries",), [70.0, 0.5, 0.1, 0.002], "noise levels from 80 to 0.002"),
        (("levels", 3, "block"), 2, "levels are not those"),
        (("levels",), [], "levels are not those"),
        (("num_classes",), 9, "number of class_names"),
        (("class_names",), [1, 2], "class_names.1=2: input should be a valid string"),
        (("image", "height"), 0, "image.height=0: input should be greater than or equal to 1"),
        (("image", "width"), 8.0, "image.width=8.0: input should be a valid integer"),
        (("scale",), 0, "scale=0: input should be greater than 0"),
        (("mean",), float("inf"), "mean=inf: input should be a finite number"),
        (("mean",), 10**400, "mean=a number of 1329 bits: input should be a valid number"),
        (("sampler", "solver"), "dpm", "'euler' or 'heun'"),
        (("sampler", "steps"), 2, "the number of blocks"),
        (("verified",), None, "verified is missing"),
        (("verified", "real_inputs"), 1, "verified.real_inputs=1: input should be a valid boolean"),
    ],
)
def test_a_wrong_manifest_is_refused(copy, path, value, words):
    """Every field is checked when the directory is opened, and the message names it."""
    content = json.loads((copy / "manifest.json").read_text())
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (copy / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match=words):
        Sampler(copy)


def test_a_manifest_of_any_size_depth_or_kind_is_refused(copy):
    """A hole of a terabyte, a pipe, brackets without end, a value too deep to be shown: RunError, at once."""
    path = copy / "manifest.json"
    content = json.loads(path.read_text())
    content["family"] = functools.reduce(lambda inner, _: [inner], range(900), 0)
    for text in ("[" * 10**6, '{"a":' * 10**5, json.dumps(content), '{"kind": "edgeblocks export"' + ", 1" * 10**6):
        path.write_text(text)
        with pytest.raises(RunError, match="damaged"):
            read_manifest(copy)
    with path.open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(RunError, match="1000000000000 bytes, and at most"):
        read_manifest(copy)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(RunError, match=r"manifest\.json: it is a pipe"):
        read_manifest(copy)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("sampler", "steps"), 10**9, "sampler.steps=1000000000: input should be less than or equal to 10000"),
        (("image", "height"), 10**12, "image.height=1000000000000: input should be less than or equal to 65536"),
        (("image", "width"), 2**16, "image: 65536 x 65536 pixels are more than 16777216"),
        (("image", "channels"), 2**31, "image.channels=2147483648: input should be less than or equal to 1024"),
        (("num_classes",), 10**9, "num_classes=1000000000: input should be less than or equal to 100000"),
        (("opset",), 2**31, "opset=2147483648: input should be less than or equal to 1000"),
        (("files", 0, "bytes"), 2**64, "files.0.bytes=.*: input should be less than or equal to"),
        (("files", 0, "file"), "\ud800.onnx", "files.0.file=.*"),
        (("files", 0, "file"), "x" * 300, "plain name of a file"),
        (("class_names",), ["\udcff"] * 10, "class_names.0=.*: it holds halves of characters"),
        (("boundaries",), [1e300, 0.5, 0.1, 0.002], r"boundaries.0=1e\+300: input should be less than"),
    ],
    ids=str,
)
def test_sizes_in_a_manifest_have_limits(copy, path, value, words):
    """Nothing is made or waited for before the number is compared: a billion steps are a billion noise levels."""
    content = json.loads((copy / "manifest.json").read_text())
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    if path[-1] == "width":
        content["image"]["height"] = 2**16
    (copy / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match=words):
        read_manifest(copy)


def test_a_block_file_is_a_file_of_the_directory(copy, exported):
    """A link to another file, a pipe, a device, a folder, a loop, and a file of another size are refused."""
    block = read_manifest(copy).files[0]
    path = copy / block.file
    path.rename(copy / "moved.onnx")
    path.symlink_to("moved.onnx")
    assert checked_path(copy, block) == path  # a link that stays inside is as good as the file

    def refused(words):
        with pytest.raises(RunError, match=words):
            checked_path(copy, block)
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()

    path.unlink()
    path.symlink_to(exported / read_manifest(copy).files[1].file)
    refused("block 0 is damaged")
    path.symlink_to("/dev/zero")
    refused("block 0 is refused: .* is no regular file")
    path.symlink_to(path)
    refused("cannot read block 0")
    os.mkfifo(path)
    refused("block 0 is refused: .* is no regular file")
    path.mkdir()
    refused("block 0 is refused: .* is no regular file")
    with path.open("wb") as file:
        file.truncate(10**12)
    refused("block 0 is damaged: .* have 1000000000000 bytes where")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), value=_JSON)
def test_any_value_anywhere_in_a_manifest_is_read_or_refused(copy, exported, data, value):
    """Fuzz: with any JSON value in the place of any field, reading gives a manifest or a RunError, nothing else."""
    content = json.loads((exported / "manifest.json").read_text())
    place, key = content, data.draw(st.sampled_from(sorted(content)))
    while isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    place[key] = value
    (copy / "manifest.json").write_text(json.dumps(content))
    try:
        manifest = read_manifest(copy)
    except EdgeblocksError as error:
        assert isinstance(error, RunError)
    else:
        assert sampler_levels(manifest.partition, num_steps=manifest.sampler.steps)


def test_a_manifest_survives_writing_and_reading(exported):
    """Round trip: what is read is what was written, and every default level names the block that owns it."""
    manifest = read_manifest(exported)
    content = json.loads((exported / "manifest.json").read_text())
    assert manifest.to_json() == content
    assert len(content["levels"]) == 18
    assert {level["block"] for level in content["levels"]} == {0, 1, 2}
    assert all(manifest.partition.block_of(level["sigma"]) == level["block"] for level in content["levels"])
