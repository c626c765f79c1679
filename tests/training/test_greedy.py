"""A network that grows: ordinary training of a window over frozen layers, whatever is in memory, whatever stops it."""

import gc
import itertools
import json
import shutil
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from support.commands import invoke
from support.equality import StopAfter, assert_same_bits
from support.exact_runs import KINDS
from support.shapes import checked_shapes

import edgeblocks
from edgeblocks.errors import ConfigError, InterruptedRunError, RunError, WriteLimitError
from edgeblocks.optim.schedule import learning_rate_at
from edgeblocks.optim.update import BETA1, BETA2, EPS, ema_exponent
from edgeblocks.planning.windows import frozen_below, last_steps, layers_in_windows, layers_so_far
from edgeblocks.progress import Silent
from edgeblocks.report.facts import read_facts
from edgeblocks.report.run_page import run_page
from edgeblocks.runs import growing
from edgeblocks.runs.directory import WINDOW_RATE_SHARE
from edgeblocks.runs.open_data import data_of
from edgeblocks.seeds import generator_at
from edgeblocks.training.greedy import GreedyTrainer

pytestmark = pytest.mark.usefixtures("one_thread")

GREEDY = {"method": "greedy", "sample_grids": 0, "mem_budget": "4GB", "depth": 4, "window": 2, "steps": 12, "warmup": 2}
GREEDY |= {"grow": "equal"}
ENDS = (4, 8, 12)


def trained(kind, out, listener=None, **settings):
    return edgeblocks.train(out=out, listener=listener or Silent(), **{**KINDS[kind], **GREEDY, **settings})


def files_of(run):
    return sorted((run.path / "blocks").glob("window_*/block_*.safetensors"))


def grown_at(run):
    """The last step with each number of layers but all."""
    return list({look.layers: look.step for look in run.directory.growth()}.values())


@pytest.fixture(scope="module", params=["vit", "mdlm"])
def resident(request, tmp_path_factory):
    """A run whose parts are all in memory; two micro-batches, fp32 optimizer state, no clipping."""
    out = tmp_path_factory.mktemp(request.param) / "run"
    made = {"tier": "ram", "optimizer": "adamw", "clip": 1e9}
    return request.param, made, trained(request.param, out, **made)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run with the usual optimizer, which nothing stopped."""
    return trained("dit", tmp_path_factory.mktemp("digits") / "run", visit_steps=3)


@given(st.integers(1, 60), st.data())
def test_windows_cover_the_network(num_layers, data):
    window = data.draw(st.integers(1, num_layers))
    layers = layers_in_windows(num_layers, window)
    assert sum(layers) == num_layers and layers[-1] == window
    assert all(1 <= count <= max(1, window // 2) for count in layers[:-1])
    for number, below in enumerate(frozen_below(layers)):
        assert layers_so_far(layers, number)[-1] == window
        assert sum(layers_so_far(layers, number)[:-1]) == below <= num_layers - window
    steps = data.draw(st.integers(len(layers), 10_000))
    ends = last_steps(steps, len(layers))
    assert ends[-1] == steps
    assert max(np.diff((0, *ends))) - min(np.diff((0, *ends))) <= 1


def grown_by_hand(lower, family, num_layers, *, up):
    """A network with more layers on top: copies of those below, which add a tenth as much."""
    network = family.block(num_layers=num_layers + up, checkpointing=False)
    network.reset_tables_()
    values = dict(network.named_parameters())
    for name, value in values.items():
        part, number, rest = (*name.split(".", 2), "", "")[:3]
        if part != "layers" or int(number) < num_layers:
            value.data.copy_(lower[name])
        else:
            value.data.copy_(lower[f"layers.{int(number) - up}.{rest}"])
            if rest.startswith(("attention.out.", "mlp.down.")):
                value.data.mul_(0.1)
    return network


def plain_growing(run):
    """The loop as users write it: a short network is trained, its average gets layers on top, and so on."""
    directory = run.directory
    told, family = directory.settings.run, directory.family()
    data = data_of(told, lambda *_: None)
    order, losses = data.order(batch=told.batch, seed=told.seed, block=0), []
    first, ema = 0, {}
    exponent = ema_exponent(told.ema_length)
    for number, end in enumerate(ENDS):
        if number == 0:
            network = family.block(num_layers=2, checkpointing=False)
            network.reset_tables_()
            for value in network.parameters():
                value.data = torch.empty(value.shape)
            network.init_(generator_at(told.seed, "init", 0))
        else:
            network = grown_by_hand(ema, family, 1 + number, up=1)
        named = dict(network.named_parameters())
        frozen = {name for name in named if number and name.startswith(network.stem_parts)}
        frozen |= {name for name in named for layer in range(number) if name.startswith(f"layers.{layer}.")}
        for name in frozen:
            named[name].requires_grad_(False)
        learning = [value for name, value in named.items() if name not in frozen]
        groups = [{"params": [value for value in learning if value.ndim >= 2], "weight_decay": told.weight_decay}]
        groups += [{"params": [value for value in learning if value.ndim < 2], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, betas=(BETA1, BETA2), eps=EPS, fused=True)
        ema = {name: value.detach().clone() for name, value in named.items()}
        for step in range(first, end):
            examples, labels = data.gather(order.indices(step))
            noise = directory.partition.ranges[0]
            batch = family.draw(examples, labels, noise, generator_at(told.seed, "train", 0, step))
            optimizer.zero_grad(set_to_none=False)
            losses.append(0.0)
            for start in range(0, told.batch, told.micro_batch):
                part = {name: tensor[start : start + told.micro_batch] for name, tensor in batch.items()}
                loss = family.loss(network, part).sum() / told.batch
                loss.backward()
                losses[-1] += loss.item()
            floor = 0.0 if number + 1 == len(ENDS) else WINDOW_RATE_SHARE
            rate = learning_rate_at(
                step, steps=end, warmup=told.warmup, peak=told.learning_rate, first=first, floor=floor
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            share = 1 - (1 - 1 / (step - first + 1)) ** (exponent + 1)
            for name, value in named.items():
                ema[name].lerp_(value.detach(), share)
        first = end
    return ema, losses


def test_losses_and_weights_are_those_of_plain_pytorch(resident):
    """Bit for bit: the short network, and what grows on it, with torch.optim.AdamW on the same draws."""
    _, _, run = resident
    ema, losses = plain_growing(run)
    assert [record["loss"] for record in run.directory.metrics()] == losses
    directory, found = run.directory, {}
    for part, path in enumerate(files_of(run)):
        for name, value in load_file(path).items():
            if name.startswith("ema."):
                found[directory.tensor_name(part, name.removeprefix("ema."))] = value
    assert found.keys() == ema.keys()
    for name, value in ema.items():
        np.testing.assert_array_equal(found[name], value.numpy(), err_msg=name)


def test_a_window_of_all_layers_is_end_to_end_training(tmp_path):
    greedy = trained("vit", tmp_path / "greedy", window=4)
    exact = trained("vit", tmp_path / "exact", method="exact", window="auto", grow="auto", blocks=1)
    assert_same_bits(greedy.path, exact.path, blocks=1)


def test_streamed_it_gives_the_bits_of_resident_parts(resident, tmp_path):
    """With frozen parts on disk, of which one or two are in memory, activation checkpointing, and other visits."""
    kind, made, run = resident
    for depth, settings in ((4, {"checkpointing": True, "visit_steps": 3}), (4, {"visit_steps": 2})):
        with checked_shapes():
            again = trained(kind, tmp_path / str(settings), **{**made, "tier": "disk", "depth": depth, **settings})
        assert_same_bits(run.path, again.path)
        assert again.summary["metrics"]["validation"]["total"] == pytest.approx(
            run.summary["metrics"]["validation"]["total"], rel=1e-6
        )


@pytest.mark.parametrize("stop", [2, 4, 6, 11], ids=["first window", "its end", "second", "last"])
def test_stopped_and_resumed_it_gives_the_same_bits(digits, tmp_path, stop):
    with pytest.raises(InterruptedRunError, match=f"saved at step {stop} of 12"):
        trained("dit", tmp_path / "run", listener=StopAfter(stop), visit_steps=3)
    begun = edgeblocks.load(tmp_path / "run")
    assert sum(begun.directory.layers) == 2 + (stop > 4) + (stop > 8)
    assert begun.evaluate(samples=2)["validation_loss"] > 0  # as far as it is, it is a whole network
    again = edgeblocks.resume(tmp_path / "run")
    assert_same_bits(digits.path, again.path)
    assert again.summary["metrics"]["validation"] == digits.summary["metrics"]["validation"]
    assert len(list((tmp_path / "run/blocks").iterdir())) == 1  # nothing is left of former windows


@pytest.mark.parametrize("where", ["while files are written", "before the manifest", "before the former ones go"])
def test_killed_while_it_grows_it_goes_on_with_the_same_bits(digits, tmp_path, monkeypatch, where):
    class Killed(BaseException):
        pass

    def die(*_args, **_kwargs):
        raise Killed

    with monkeypatch.context() as patched:
        if where == "while files are written":
            write, times = growing.BlockStore.write, itertools.count()
            patched.setattr(
                growing.BlockStore,
                "write",
                lambda store, block, *rest, **how: (
                    die() if store.folder.name == "window_001" and next(times) else write(store, block, *rest, **how)
                ),
            )
        elif where == "before the manifest":
            patched.setattr(growing, "seal_run", die)
        else:
            remove = shutil.rmtree
            patched.setattr(
                growing.shutil,
                "rmtree",
                lambda path, **how: die() if path.name == "window_000" else remove(path, **how),
            )
        with pytest.raises(Killed):
            trained("dit", tmp_path / "run", visit_steps=3)
    again = edgeblocks.resume(tmp_path / "run")
    assert_same_bits(digits.path, again.path)
    assert len(list((tmp_path / "run/blocks").iterdir())) == 1


def test_the_grown_network_computes_nearly_what_the_short_one_did(digits, tmp_path):
    """And what was frozen stays as it is, to the last bit."""
    with pytest.raises(InterruptedRunError):
        trained("dit", tmp_path / "run", listener=StopAfter(4), visit_steps=3)
    short = edgeblocks.load(tmp_path / "run")
    before = short.evaluate(samples=2)["validation_loss"]
    taller = growing.grown(short.directory, lambda _: None)
    after = edgeblocks.load(taller.path)
    assert after.directory.layers == (3,) and after.directory.trained == (False, True)
    assert after.evaluate(samples=2)["validation_loss"] == pytest.approx(before, rel=0.05)
    frozen, final = load_file(files_of(after)[0]), load_file(files_of(digits)[0])
    for name, value in frozen.items():
        if not name.startswith("optimizer."):
            np.testing.assert_array_equal(final[name], value, err_msg=name)
    for name, value in frozen.items():
        if name.startswith("weights."):
            np.testing.assert_array_equal(frozen[name.replace("weights.", "ema.", 1)], value)


def test_it_grows_when_its_loss_has_flattened_and_resumed_at_the_same_steps(tmp_path):
    """With a learning rate that teaches nothing, at the first chance; else when there is no more time."""
    settings = {"grow": "auto", "steps": 48, "visit_steps": 7}
    flat = trained("vit", tmp_path / "flat", **settings, learning_rate=1e-30, warmup=0)
    assert grown_at(flat) == [16, 32]  # four looks, one after every fourth step
    falling = trained("vit", tmp_path / "falling", **settings, learning_rate=3e-3)
    assert grown_at(falling) == [40, 44]
    looks = [look.step for look in falling.directory.growth()]
    assert looks == sorted(set(looks)) and set(looks) <= set(range(4, 49, 4))
    with pytest.raises(InterruptedRunError):
        trained("vit", tmp_path / "run", listener=StopAfter(15), **settings, learning_rate=1e-30, warmup=0)
    with pytest.raises(InterruptedRunError):
        edgeblocks.resume(tmp_path / "run", listener=StopAfter(16))
    again = edgeblocks.resume(tmp_path / "run")
    assert_same_bits(flat.path, again.path)
    assert again.directory.growth() == flat.directory.growth()


def test_a_run_that_grows_goes_on_under_another_budget(digits, tmp_path):
    """Its window stays, and every bit."""
    with pytest.raises(InterruptedRunError):
        trained("dit", tmp_path / "run", listener=StopAfter(6), visit_steps=3)
    again = edgeblocks.resume(tmp_path / "run", mem_budget="3GB")
    assert again.directory.plan.budget_bytes == 3_000_000_000
    assert_same_bits(digits.path, again.path)


def test_the_limit_of_writes_holds_where_it_grows(tmp_path):
    with pytest.raises(
        WriteLimitError, match=r"adding layers would pass --max-disk-writes 1500KB.* Everything is saved"
    ):
        trained("dit", tmp_path / "run", visit_steps=4, max_disk_writes="1500KB")
    run = edgeblocks.load(tmp_path / "run").directory
    assert run.saved_steps(run.store()) == [4] and run.store().header(0).run_bytes_written <= 1_500_000
    again = edgeblocks.resume(tmp_path / "run", max_disk_writes="100MB")
    assert again.summary["steps"] == 12


def test_the_loss_is_known_after_each_window(digits):
    looks = digits.directory.growth()
    assert [(look.step, look.layers) for look in looks] == [(ENDS[0], 2), (ENDS[1], 3)]
    assert "While it grew" in run_page(read_facts(digits.path))


def test_what_comes_out_is_the_ordinary_network(digits, tmp_path):
    """Exported, and as a file that end-to-end training goes on with."""
    digits.export(tmp_path / "onnx")  # compares with torch
    digits.save_weights(tmp_path / "grown.safetensors")
    settings = {
        "method": "exact",
        "window": "auto",
        "grow": "auto",
        "init": str(tmp_path / "grown.safetensors"),
        "steps": 1,
    }
    again = trained("dit", tmp_path / "tuned", **settings, learning_rate=1e-9)
    assert again.evaluate(samples=2)["validation_loss"] == pytest.approx(
        digits.evaluate(samples=2)["validation_loss"], rel=1e-4
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"frozen": "int8"},
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"master": "bf16"},
        {"master": "bf16", "frozen": "nf4"},
    ],
    ids=["int8", "bf16", "fp16", "bf16 weights", "bf16 weights, nf4"],
)
def test_in_fewer_bits_streamed_and_resumed_are_equal(tmp_path, settings):
    whole = trained("vit", tmp_path / "whole", tier="ram", **settings)
    with pytest.raises(InterruptedRunError):
        trained("vit", tmp_path / "run", listener=StopAfter(6), tier="disk", **settings)
    again = edgeblocks.resume(tmp_path / "run")
    assert_same_bits(whole.path, again.path)
    assert np.isfinite(whole.summary["metrics"]["validation_loss"])


def test_a_finished_run_is_prolonged_in_its_last_window_and_no_other(digits, tmp_path):
    shutil.copytree(digits.path, tmp_path / "run")
    longer = edgeblocks.resume(tmp_path / "run", steps=16)
    assert longer.directory.file_layers == (1, 1, 2)
    assert [record["step"] for record in longer.directory.metrics()] == list(range(1, 17))
    with pytest.raises(InterruptedRunError):
        trained("dit", tmp_path / "begun", listener=StopAfter(2))
    with pytest.raises(ConfigError, match="still grows"):
        edgeblocks.resume(tmp_path / "begun", steps=16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 5}, "window=5: the network has 4 layers; use 1 to 4"),
        ({"blocks": 2}, "--blocks 2: with --method greedy the window decides.*--set window=N"),
        ({"init": "w.safetensors"}, "--method greedy and --init.*use --method exact"),
        ({"train_blocks": "1"}, "train_blocks=1 names the stages.*use --method exact"),
        ({"method": "exact", "grow": "auto"}, "window=2 says how many layers.*use --method greedy"),
        ({"steps": 2}, "--steps 2: .* 3 windows"),
    ],
)
def test_what_is_impossible_is_refused(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        trained("dit", tmp_path / "run", **settings)


def test_a_core_that_runs_again_and_again_is_not_grown(tmp_path):
    with pytest.raises(ConfigError, match=r"a looped is not grown.*use --method exact"):
        edgeblocks.train(out=tmp_path / "run", family="looped", data="moby-dick", method="greedy", mem_budget="4GB")


def test_a_manifest_with_an_impossible_window_is_refused(digits, tmp_path):
    shutil.copytree(digits.path, tmp_path / "run")
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    del manifest["sha256"]
    for window in (None, {"number": 3, "first_step": 0}, {"number": -1, "first_step": 0}):
        (tmp_path / "run/manifest.json").write_text(json.dumps({**manifest, "window": window}))
        with pytest.raises(RunError, match=r"manifest\.json"):
            edgeblocks.load(tmp_path / "run")


def test_info_tells_how_far_it_has_grown(tmp_path):
    with pytest.raises(InterruptedRunError):
        trained("dit", tmp_path / "run", listener=StopAfter(6))
    assert "3 of 4 layers" in invoke("info", tmp_path / "run").stdout


def test_a_windows_memory_is_free_when_the_next_one_needs_it(tmp_path, monkeypatch):
    """At once, not when garbage is collected."""
    alive, made, init = [], [], GreedyTrainer.__init__

    def watched(trainer, *args, **kwargs):
        alive.append(sum(reference() is not None for reference in made))
        made.append(weakref.ref(trainer))
        init(trainer, *args, **kwargs)

    monkeypatch.setattr(GreedyTrainer, "__init__", watched)
    gc.disable()
    try:
        trained("dit", tmp_path / "run", frozen="int8")
    finally:
        gc.enable()
    assert alive == [0, 0, 0]
