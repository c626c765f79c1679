"""LoRA over frozen layers: the numbers of an ordinary loop, PEFT's files, merged, resumed."""

import gc
import json
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support.commands import assert_refused, invoke
from support.equality import StopAfter, assert_same_bits

import edgeblocks
from edgeblocks.errors import ConfigError, InterruptedRunError
from edgeblocks.pretrained.frozen_layers import FrozenLayers
from edgeblocks.runs.open_data import data_of

pytestmark = pytest.mark.usefixtures("one_thread")

WANTED = {"length": 24, "batch": 3, "steps": 4, "warmup": 0, "mem_budget": "4GB", "micro_batch": 2, "tune": "lora"}
WANTED |= {"precision": "fp32"}
WANTED |= {"lora_rank": 3, "lora_alpha": 12.0, "learning_rate": 1e-2}
TARGETS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
TARGETS += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


@pytest.fixture(scope="module", params=["none", "int8", "nf4"])
def tuned(request, model, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("lora") / "run"
    return edgeblocks.finetune(model, data=text, out=out, quantize=request.param, **WANTED)


def rounded(library, model, kind):
    """The library's whole network, its layers' weights as they are read."""
    network = library.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).requires_grad_(False)
    frozen = FrozenLayers(str(model), kind, torch.device("cpu"))
    for number, layer in enumerate(network.model.layers):
        frozen.bind_(layer, number)
        frozen.load_(number)
        for name, parameter in list(layer.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            setattr(
                layer.get_submodule(owner), leaf, torch.nn.Parameter(parameter.detach().clone(), requires_grad=False)
            )
    return network


def with_adapter(matrix, down, up, scale, x):
    return F.linear(x, matrix.weight) + scale * F.linear(F.linear(x, down), up)


def beside(network, values, scale):
    """The network, whose matrices have adapters of these values."""
    for number, layer in enumerate(network.model.layers):
        for name in TARGETS:
            key = f"layers.{number}.adapters.{name.replace('.', '-')}"
            matrix, (down, up) = layer.get_submodule(name), (values[f"{key}.lora_{part}"] for part in "AB")
            matrix.forward = partial(with_adapter, matrix, down, up, scale)
    return network


def adapters(run, part="weights"):
    stored = load_file(run.directory.store().path(0))
    return {name.removeprefix(f"{part}."): value for name, value in stored.items() if name.startswith(f"{part}.")}


def test_it_trains_as_an_ordinary_loop_over_rounded_layers(tuned, model, library):
    """Losses of every step, and the adapters at the end; the first loss is that of the model as it is read."""
    family, records = tuned.directory.family(), tuned.directory.metrics()
    values = {name: torch.empty(value.shape) for name, value in adapters(tuned).items()}
    from edgeblocks.offload.sections import init_section_
    from edgeblocks.seeds import generator_at

    init_section_(family, tuned.directory.sections[0], values.items(), generator_at(0, "init", 0))
    learning = [value.requires_grad_() for value in values.values()]
    network = beside(rounded(library, model, family.settings.quantize), values, 4.0)
    optimizer = torch.optim.AdamW(learning, betas=(0.9, 0.99), weight_decay=0.0)
    data = data_of(tuned.directory.settings.run, lambda *_: None)
    order = data.order(batch=3, seed=0, block=0)
    for step, record in enumerate(records):
        tokens = torch.from_numpy(data.gather(order.indices(step))[0])
        loss = network(input_ids=tokens, labels=tokens, use_cache=False).loss
        assert record["loss"] == pytest.approx(loss.item(), rel=2e-4)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.param_groups[0]["lr"] = record["learning_rate"]
        optimizer.step()
        optimizer.zero_grad()
    for name, value in adapters(tuned).items():
        assert torch.allclose(value.view(values[name].shape), values[name], rtol=0.05, atol=2e-3), name
    assert tuned.summary["metrics"]["validation_loss"] < tuned.summary["metrics"]["validation_loss_before"]


def test_stopped_and_resumed_it_gives_the_same_bits(tuned, model, text, tmp_path):
    kind = tuned.directory.settings.family.quantize
    with pytest.raises(InterruptedRunError):
        stop = StopAfter(2)
        edgeblocks.finetune(model, data=text, out=tmp_path / "run", quantize=kind, listener=stop, **WANTED)
    again = edgeblocks.resume(tmp_path / "run")
    assert_same_bits(tuned.path, again.path, blocks=1)
    assert tuned.summary["metrics"]["validation"] == again.summary["metrics"]["validation"]


def test_merged_and_as_an_adapter_it_is_what_was_trained(tuned, model, library, tmp_path):
    """W + (alpha / r) B A in the type that W has; PEFT's names; what has no adapter is the same byte for byte."""
    merged = tuned.merge(tmp_path / "merged")
    tuned.merge(tmp_path / "adapter", adapter=True)
    found = load_file(tmp_path / "adapter/adapter_model.safetensors")
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], len(found)) == (3, 12.0, 2 * 4 * 7)
    assert set(settings["target_modules"]) == {name.rpartition(".")[2] for name in TARGETS}
    assert merged["trained"] == 4 * 7
    for path in model.glob("*.safetensors"):
        before, after = load_file(path), load_file(tmp_path / "merged" / path.name)
        for name, value in before.items():
            down = found.get(f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight")
            if down is None:
                assert torch.equal(after[name], value)
                continue
            up = found[f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"]
            expected = (value.float() + 4.0 * up @ down).to(torch.bfloat16)
            assert torch.allclose(after[name].float(), expected.float(), rtol=0.01), name
    library.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_peft_loads_the_adapter(tuned, model, library, tmp_path):
    """With the same logits as the network that was trained, where its layers are not rounded."""
    peft = pytest.importorskip("peft")
    if tuned.directory.settings.family.quantize != "none":
        pytest.skip("its layers are rounded, the library's are not")
    tuned.merge(tmp_path / "adapter", adapter=True, last=True)
    network = library.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokens = torch.arange(20).view(1, 20)
    expected = peft.PeftModel.from_pretrained(network, tmp_path / "adapter").eval()(tokens).logits
    values = {name: value.view(-1) for name, value in adapters(tuned).items()}
    shapes = {name: value.shape for name, value in tuned.network(last=True).state_dict().items()}
    plain = library.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).requires_grad_(False)
    own = beside(plain, {name: value.view(shapes[name]) for name, value in values.items()}, 4.0)
    assert torch.allclose(own(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_network_that_is_let_go_frees_its_memory_at_once(tuned):
    """Not when garbage is collected next: what its adapters lie in is as large as the plan says, once."""
    family = tuned.directory.family()
    gc.collect()
    gc.disable()
    try:
        with torch.device("meta"):
            network = family.block(num_layers=4, checkpointing=False)
        known = [weakref.ref(parameter) for parameter in network.parameters()]
        del network
        assert not any(parameter() is not None for parameter in known)
    finally:
        gc.enable()


def test_it_is_planned_as_it_runs(tuned):
    """With checkpointing, of which no step that it may fall back to is without."""
    assert all(shape.checkpointing for shape in tuned.directory.plan.step_shapes)


def test_what_cannot_be_tuned_so_is_refused(model, text, tmp_path):
    asked = ["finetune", model, "--data", text, "--length", "16", "--dry-run"]
    assert_refused(invoke(*asked, "--lora-rank", "4"), 2, "lora_rank: these belong to --tune lora")
    assert_refused(invoke(*asked, "--tune", "half"), 2, "use one")
    assert_refused(invoke(*asked, "--tune", "lora", "--lora-targets", "q_proj,nothing"), 2, "ends with nothing")
    assert_refused(
        invoke(*asked, "--tune", "lora", "--lora-targets", ","), 2, "=, names no matrix; there are self_attn"
    )
    assert_refused(invoke(*asked, "--tune", "lora", "--set", "blocks=2"), 2, "are one stage")
    assert_refused(invoke(*asked, "--tune", "lora", "--set", "checkpointing=false"), 2, "run again on the way back")
    assert_refused(invoke(*asked, "--tune", "lora", "--quantize", "int3"), 2, "quantize")
    with pytest.raises(ConfigError, match="there is no adapter"):
        small = {"data": text, "length": 16, "batch": 2, "steps": 1, "mem_budget": "4GB"}
        edgeblocks.finetune(model, out=tmp_path / "run", **small).merge(tmp_path / "adapter", adapter=True)
