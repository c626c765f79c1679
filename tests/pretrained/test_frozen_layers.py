"""Frozen layers that share the memory they are expanded into: what goes through them, forward and back, is exact."""

import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import edgeblocks
from edgeblocks.families.base import TextInfo
from edgeblocks.families.layers import run_layers
from edgeblocks.families.precision import computing_in
from edgeblocks.pretrained.frozen_layers import FrozenLayer, FrozenLayers, frozen_layers
from edgeblocks.pretrained.lora import LoraDecoder, LoraSettings
from edgeblocks.profiling.block_step import BlockStep, example_batch
from edgeblocks.tuning import tuning_settings

pytestmark = pytest.mark.usefixtures("one_thread")


def expanded(model, kind, layer, number):
    """A layer with memory of its own, of the values that its codes stand for."""
    frozen = FrozenLayers(str(model), kind, torch.device("cpu"))
    frozen.bind_(layer, number)
    frozen.load_(number)
    for name, parameter in list(layer.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        setattr(layer.get_submodule(owner), leaf, torch.nn.Parameter(parameter.detach().clone(), requires_grad=False))
    return layer


def gradients_of_input(network, model, kind, tokens):
    """Through layers in turn that share memory, and through the library's layers of the same values."""
    layers = [FrozenLayer(str(model), number, kind) for number in range(len(network.model.layers))]
    for layer in layers:
        layer.bind_(torch.device("cpu"))
    width = network.config.hidden_size
    hidden = torch.randn(2, tokens, width, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    one, other = (hidden.clone().requires_grad_() for _ in range(2))
    out = run_layers(layers, one, hidden.new_zeros(2, 1), checkpointing=True)
    (out * weights).sum().backward()
    for number, layer in enumerate(network.model.layers):
        expanded(model, kind, layer, number)
    network.model.norm = torch.nn.Identity()
    theirs = network.model(inputs_embeds=other, use_cache=False).last_hidden_state
    (theirs * weights).sum().backward()
    assert torch.equal(out, theirs)
    return one.grad, other.grad


@pytest.mark.parametrize("kind", ["none", "int8", "nf4"])
def test_the_gradient_of_the_input_is_that_of_the_expanded_weights(library, model, kind):
    """Bit for bit, though each layer's weights have been overwritten by the others' before its backward pass."""
    network = library.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found, expected = gradients_of_input(network, model, kind, tokens=6)
    assert torch.equal(found, expected) and expected.abs().max() > 0


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_gradient_through_large_layers(library, tmp_path, kind):
    """Of 168 million parameters each: codes of 178 and 94 MB, expanded 671 MB."""
    config = library.LlamaConfig(
        hidden_size=2048,
        intermediate_size=24576,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=64,
        tie_word_embeddings=True,
    )
    network = library.LlamaForCausalLM(config).to(torch.bfloat16)
    network.save_pretrained(tmp_path)
    found, expected = gradients_of_input(network.float(), tmp_path, kind, tokens=6)
    frozen_layers.cache_clear()
    assert torch.equal(found, expected) and expected.abs().max() > 0


class Products(TorchDispatchMode):
    """Types of the factors of products of two matrices while this lasts."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.seen.append({value.dtype for value in args if isinstance(value, torch.Tensor) and value.ndim == 2})
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("precision", "half"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_products_of_frozen_layers_are_of_the_run_s_precision(library, model, precision, half):
    """Forward and back, with those of adapters; it is such a step that `--precision auto` times in both."""
    family = LoraDecoder(LoraSettings(model=str(model), lora_rank=2), TextInfo(vocabulary=128, length=12))
    step, batch = BlockStep(family, "cpu", num_layers=1, optimizer=None), example_batch(family, 2, "cpu")
    # Products of the head, which stays in float32 in its file, are left out.
    with Products() as products, computing_in(precision):
        hidden, nothing = family.enter(step.network, batch)
        out = step.network.through_stage(hidden, nothing, checkpointing=True)
    with products:
        out.float().sum().backward()
    # 7 matrices, each with two of an adapter: forward, again on the way back, then gradients: one of a matrix' input,
    # and two of each of an adapter's.
    assert len(products.seen) == 7 * (3 + 3 + 5) and all(types == {half} for types in products.seen)


def test_frozen_layers_are_computed_in_what_a_measurement_finds_faster(model, text, tmp_path):
    """Unless a precision is asked for, or there are no weights to measure with; all layers are trained in float32."""
    for tune, usual in (("lora", "auto"), ("blocks", "auto"), ("full", None)):
        blocks = {"train_blocks": "3"} if tune == "blocks" else {}
        assert tuning_settings(model, {"data": text, "tune": tune, **blocks}).get("precision") == usual
    assert tuning_settings(model, {"tune": "lora", "precision": "fp32"})["precision"] == "fp32"
    shutil.copyfile(model / "config.json", tmp_path / "config.json")
    assert "precision" not in tuning_settings(tmp_path, {"tune": "lora"})
    planned = edgeblocks.plan(**tuning_settings(model, {"data": text, "tune": "lora", "length": 24, "steps": 2}))
    assert planned.plan.precision in ("fp32", "bf16")
