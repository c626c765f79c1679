"""A network that begins with the weights of a file: another run's, or plain PyTorch's."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file
from support.commands import invoke
from support.equality import StopAfter, assert_same_bits
from support.pages import code_after

import edgeblocks
from edgeblocks.errors import ConfigError, InterruptedRunError, RunError
from edgeblocks.files.tensor_file import PIECE_BYTES, TensorFile
from edgeblocks.progress import Silent

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"data": "digits", "width": 32, "heads": 2, "depth": 6, "batch": 16, "micro_batch": 8, "hold_out": 0.005}
SMALL |= {
    "sample_grids": 0,
    "mem_budget": "4GB",
    "steps": 3,
    "warmup": 0,
    "family": "vit",
    "method": "exact",
    "tier": "ram",
}


def trained(out, **settings):
    return edgeblocks.train(out=out, **{**SMALL, **settings})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A vit of two stages, trained end to end."""
    return trained(tmp_path_factory.mktemp("first") / "run", blocks=2)


@pytest.fixture(scope="module")
def weights(run):
    """Its EMA weights as a file."""
    path = run.path.parent / "weights.safetensors"
    run.save_weights(path)
    return path


def first_weights(run):
    """What a run's blocks held before their first step: a run whose learning rate is nothing still holds it."""
    found = {}
    for block in range(len(run.directory.file_layers)):
        for name, value in load_file(run.path / "blocks" / f"block_{block:03d}.safetensors").items():
            part, _, own = name.partition(".")
            if part != "optimizer":
                found[part, run.directory.tensor_name(block, own)] = value
    return found


def begun(out, **settings):
    """A run that was stopped before anything could change: its rate is nothing."""
    return trained(out, learning_rate=1e-300, weight_decay=0.0, steps=1, **settings)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_a_run_begins_with_another_ones_average_whatever_the_cut(weights, tmp_path, blocks):
    """Weights and EMA are the file's, bit for bit; the manifest and the summary say which file it was."""
    again = begun(tmp_path / "run", init=str(weights), blocks=blocks)
    held, given = first_weights(again), load_file(weights)
    assert {name for _, name in held} == set(given) and len(held) == 2 * len(given)
    for (_, name), value in held.items():
        np.testing.assert_array_equal(value, given[name], err_msg=name)
    origin = json.loads((again.path / "manifest.json").read_text())["init"]
    assert origin == again.summary["init"]
    assert origin["file"] == "weights.safetensors" and origin["bytes"] == weights.stat().st_size


def test_torch_loads_the_file_and_a_file_of_torch_is_begun_with(run, weights, tmp_path):
    """The whole network's `state_dict`, both ways; half precision is converted without loss."""
    family = run.directory.family()
    network = family.block(num_layers=family.num_layers, checkpointing=False)
    network.load_state_dict({name: torch.from_numpy(value) for name, value in load_file(weights).items()})
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        path = tmp_path / f"{dtype}.safetensors".removeprefix("torch.")
        save_file({name: value.to(dtype) for name, value in network.state_dict().items()}, path)
        again = begun(tmp_path / str(dtype), init=str(path), blocks=2)
        for (_, name), value in first_weights(again).items():
            np.testing.assert_array_equal(value, network.state_dict()[name].to(dtype).float().numpy(), err_msg=name)


def test_the_lines_of_the_docs_write_a_file_that_is_begun_with(run, weights, tmp_path, monkeypatch):
    """As printed, in a folder where the run is `runs/exact` and its weights are `exact.safetensors`."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/exact").symlink_to(run.path)
    (tmp_path / "exact.safetensors").symlink_to(weights)
    monkeypatch.chdir(tmp_path)
    exec(code_after("test: plain weights"), {})
    assert begun(tmp_path / "run", init="mine.safetensors", blocks=2).summary["init"]["file"] == "mine.safetensors"


def test_the_last_steps_weights_are_given_when_asked_for(run, tmp_path):
    run.save_weights(tmp_path / "last.safetensors", last=True)
    given = load_file(tmp_path / "last.safetensors")
    for (part, name), value in first_weights(run).items():
        assert (value.tobytes() == given[name].tobytes()) == (part == "weights") or value.size == 1, (part, name)


def test_blocks_that_are_trained_alone_begin_with_a_file_too(tmp_path):
    """Under their own names; a block that is made again begins with it again, and only with the very same file."""
    alone = {"method": "diffusion", "blocks": 2}
    first = trained(tmp_path / "first", **alone)
    path = tmp_path / "alone.safetensors"
    first.save_weights(path)
    assert {name.partition(".")[0] for name in load_file(path)} == {"block_0", "block_1"}
    again = trained(tmp_path / "again", init=str(path), **alone)
    before = {name: value.tobytes() for name, value in first_weights(again).items()}
    edgeblocks.resume(again.path, reinit_blocks=[1])
    assert {name: value.tobytes() for name, value in first_weights(again).items()} == before
    with pytest.raises(ConfigError, match=r"--init .* lacks 32 of the 96 tensors .*block_2"):
        begun(tmp_path / "three", init=str(path), method="diffusion", blocks=3)
    first.save_weights(path, last=True, overwrite=True)
    with pytest.raises(RunError, match="is another file now"):
        edgeblocks.resume(again.path, reinit_blocks=[1])
    path.unlink()
    with pytest.raises(RunError, match=r"begins with the file of --init, and .* cannot be read"):
        edgeblocks.resume(again.path, reinit_blocks=[1])


def test_a_run_goes_on_without_the_file(weights, tmp_path):
    """It ends with the bits of a run that was not interrupted."""
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(weights.read_bytes())
    whole = trained(tmp_path / "whole", init=str(copy), blocks=2)
    with pytest.raises(InterruptedRunError):
        trained(tmp_path / "run", init=str(copy), blocks=2, listener=StopAfter(1))
    copy.unlink()
    edgeblocks.resume(tmp_path / "run")
    assert_same_bits(whole.path, tmp_path / "run", blocks=2)


def photos(tmp_path, classes):
    """Pictures of some classes, as an .npz file."""
    path = tmp_path / f"{classes}.npz"
    rng = np.random.default_rng(0)
    labels = np.arange(60) % classes
    np.savez(path, images=rng.integers(0, 256, (60, 8, 8, 1), dtype=np.uint8), labels=labels)
    return str(path)


def test_parts_begin_afresh_when_asked(weights, tmp_path):
    """Other classes need another readout: which tensors differ is told, and how to begin these with random values."""
    other = {"data": photos(tmp_path, classes=4), "batch": 8, "hold_out": 0.1}
    with pytest.raises(ConfigError) as refused:
        begun(tmp_path / "run", init=str(weights), blocks=2, **other)
    assert "readout.weight is 10x32, here 4x32, readout.bias is 10, here 4" in str(refused.value)
    assert "--set init_fresh=readout" in str(refused.value) and not (tmp_path / "run").exists()
    again = begun(tmp_path / "run", init=str(weights), init_fresh="readout, layers.5.mlp", blocks=2, **other)
    seed, given = begun(tmp_path / "seed", blocks=2, **other), load_file(weights)
    for (part, name), value in first_weights(again).items():
        fresh = name.startswith(("readout.", "layers.5.mlp."))
        expected = first_weights(seed)[part, name] if fresh else given[name]
        np.testing.assert_array_equal(value, expected, err_msg=name)


def letters(tmp_path, names):
    """Pictures of ten classes that are called so, as an .npz file."""
    path = tmp_path / f"{names[0]}.npz"
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 1), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(60) % 10, class_names=np.array(list(names)))
    return str(path)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (tuple("9876543210"), "it is of the data's classes in another order: class 0 is '0', here '9'"),
        (tuple("abcdefghij"), "it is of other classes: 0, 1, .* and 2 more; the data have a, b, "),
    ],
)
def test_classes_in_another_order_are_refused(weights, tmp_path, names, told):
    """As many classes fit the readout, which would know them by each other's names; a new one learns them."""
    settings = {"data": letters(tmp_path, names), "batch": 8, "hold_out": 0.1, "blocks": 2}
    with pytest.raises(ConfigError, match=told) as refused:
        begun(tmp_path / "run", init=str(weights), **settings)
    assert "--set init_fresh=" in str(refused.value) and not (tmp_path / "run").exists()
    parts = re.search(r"init_fresh=(\S+)", str(refused.value))[1]
    assert begun(tmp_path / "run", init=str(weights), init_fresh=parts, **settings)


def test_a_file_that_tells_no_classes_is_begun_with(weights, tmp_path):
    """As those of others, and of an earlier edgeblocks."""
    tensors = {name: torch.from_numpy(value) for name, value in load_file(weights).items()}
    for number, metadata in enumerate(({}, {"edgeblocks.class_names": "[1"}, {"edgeblocks.class_names": "[1]"})):
        save_file(tensors, tmp_path / "weights.safetensors", metadata=metadata)
        settings = {"data": letters(tmp_path, "abcdefghij"), "batch": 8, "hold_out": 0.1, "blocks": 2}
        assert begun(tmp_path / f"run{number}", init=str(tmp_path / "weights.safetensors"), **settings)


def test_everything_that_is_wrong_is_told_together(weights, tmp_path):
    tensors = {name: torch.from_numpy(value) for name, value in load_file(weights).items()}
    del tensors["class_token.weight"]
    tensors["head.weight"] = torch.zeros(3)
    tensors["patch_embedding.bias"] = torch.zeros(7)
    tensors["readout_norm.bias"] = tensors["readout_norm.bias"].to(torch.int64)
    path = tmp_path / "wrong.safetensors"
    save_file(tensors, path)
    with pytest.raises(ConfigError) as refused:
        edgeblocks.plan(init=str(path), **SMALL)
    assert len(refused.value.problems) == 4
    for told in (
        r"lacks 1 of the \d+ tensors of this network: class_token.weight",
        "1 of its tensors are not of this network: head.weight",
        "patch_embedding.bias is 7, here 32",
        "readout_norm.bias is 'I64'.*Use float32",
    ):
        assert re.search(told, str(refused.value)), told


def test_names_of_the_other_method_are_told_in_a_word(weights, tmp_path):
    alone = {**SMALL, "method": "diffusion"}
    with pytest.raises(ConfigError, match="it has the names of one network; use --method exact"):
        edgeblocks.plan(init=str(weights), **alone)
    tensors = {f"block_0.{name}": torch.from_numpy(value) for name, value in load_file(weights).items()}
    save_file(tensors, tmp_path / "alone.safetensors")
    with pytest.raises(ConfigError, match="names of blocks that are trained alone; use --method diffusion"):
        edgeblocks.plan(init=str(tmp_path / "alone.safetensors"), **SMALL)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused(weights, tmp_path, value):
    """Wherever they stand, and only where they are used."""
    tensors = {name: torch.from_numpy(array) for name, array in load_file(weights).items()}
    tensors["readout.bias"][-1] = value
    save_file(tensors, tmp_path / "wrong.safetensors")
    with pytest.raises(ConfigError, match=r"1 of its tensors hold NaN or infinite values: readout.bias"):
        edgeblocks.plan(init=str(tmp_path / "wrong.safetensors"), **SMALL)
    edgeblocks.plan(init=str(tmp_path / "wrong.safetensors"), init_fresh="readout", **SMALL)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read"),
        (b"", "no safetensors file"),
        (b"\x04\0\0\0\0\0\0\0null", "no safetensors file"),
        (b"\xff" * 64, "no safetensors file"),
        (b'\x14\0\0\0\0\0\0\0{"a":{"dtype":"F3"}}', "no safetensors file"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path, content, told):
    path = tmp_path / "some.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"--init .*{told}"):
        edgeblocks.plan(init=str(path), **SMALL)


def test_a_file_that_is_cut_short_is_refused(weights, tmp_path):
    (tmp_path / "short.safetensors").write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(ConfigError, match="it is cut short"):
        edgeblocks.plan(init=str(tmp_path / "short.safetensors"), **SMALL)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"init_fresh": "readout"}, "name the file, or leave init_fresh out"),
        ({"init": "weights", "init_fresh": "head"}, "no part head; its parts are patch_embedding, class_token, layers"),
    ],
)
def test_settings_that_mean_nothing_are_refused(weights, settings, told):
    settings = {**settings, **({"init": str(weights)} if "init" in settings else {})}
    with pytest.raises(ConfigError, match=told):
        edgeblocks.plan(**settings, **SMALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_tensor_of_many_pieces_is_read_whole(tmp_path, dtype):
    """Converted piece by piece; a scalar and an empty tensor are tensors too."""
    values = torch.randn(3, PIECE_BYTES // 2 + 1, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensors = {"many": values, "one": torch.tensor(2.5, dtype=dtype), "none": torch.zeros(0, 4, dtype=dtype)}
    save_file(tensors, tmp_path / "file.safetensors")
    file = TensorFile(tmp_path / "file.safetensors")
    for name, tensor in tensors.items():
        read = torch.full(tensor.shape, 7.0)
        file.read_(name, read)
        assert torch.equal(read, tensor.float())


def test_the_command_writes_weights_and_says_what_is_wrong(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = invoke("weights", run.path, "-o", tmp_path / "sub/w.safetensors", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["bytes"] == (tmp_path / "sub/w.safetensors").stat().st_size
    assert told["tensors"] == len(load_file(tmp_path / "sub/w.safetensors")) and told["part"] == "ema"
    for out, message in (("w.bin", "ends in .safetensors"), ("/proc/w.safetensors", "choose another place")):
        done = invoke("weights", run.path, "-o", out)
        assert done.exit_code in (1, 2) and message in done.stderr and not done.stdout
    assert not list(tmp_path.rglob(".*.tmp"))


def test_a_listener_is_told_that_a_file_is_read(weights):
    """A file of gigabytes takes a while."""

    class Noted(Silent):
        def __init__(self):
            self.stages = []

        def stage(self, text):
            self.stages.append(text)

    listener = Noted()
    edgeblocks.plan(init=str(weights), listener=listener, **SMALL)
    assert f"reading {weights}" in listener.stages
