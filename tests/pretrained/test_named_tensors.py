"""Tensors by the names of modules where files have others: experts merged, matrices cut, prefixes added."""

import importlib
import json

import pytest
import torch
from safetensors.torch import load_file
from support.small_model import write_tokenizer

import edgeblocks
from edgeblocks.pretrained.lora import PEFT_PREFIX, peft_targets, targets_of
from edgeblocks.pretrained.model_folder import ModelFolder
from edgeblocks.pretrained.named_tensors import NamedTensors
from edgeblocks.runs.open_data import data_of

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 64, "initializer_range": 0.1}
WANTED = {"length": 24, "batch": 3, "steps": 2, "warmup": 0, "mem_budget": "4GB", "learning_rate": 1e-2}
WANTED |= {"precision": "fp32"}


def written(folder, network):
    network.to(torch.bfloat16).save_pretrained(folder, max_shard_size="50KB")
    write_tokenizer(folder)
    return folder


def convolutions(library, folder):
    torch.manual_seed(0)
    kinds = ["conv", "full_attention", "conv"]
    config = library.Lfm2Config(**SMALL, layer_types=kinds, block_ff_dim=64, block_auto_adjust_ff_dim=False)
    return written(folder, library.Lfm2ForCausalLM(config))


def losses(run):
    return [record["loss"] for record in run.directory.metrics()]


def first_loss(kind, folder, run):
    """Of the library's model, on a run's first batch."""
    data = data_of(run.directory.settings.run, lambda *_: None)
    tokens = torch.from_numpy(data.gather(data.order(batch=3, seed=0, block=0).indices(0))[0])
    network = kind.from_pretrained(folder, dtype=torch.float32).train()
    return network(input_ids=tokens, labels=tokens, use_cache=False).loss.item()


@pytest.fixture(scope="module")
def experts(library, tmp_path_factory):
    """Each expert's matrices are tensors of their own in the files."""
    torch.manual_seed(0)
    config = library.MixtralConfig(**SMALL, num_local_experts=4)
    return written(tmp_path_factory.mktemp("experts") / "tiny-mixtral", library.MixtralForCausalLM(config))


def named(kind, folder):
    """The folder's tensors, and those of the library's loaded model."""
    network = kind.from_pretrained(folder, dtype=torch.float32)
    with torch.device("meta"):
        model = kind._from_config(network.config)
    return NamedTensors(ModelFolder(folder), model), network.state_dict()


def assert_read_alike(found, theirs):
    for name, expected in theirs.items():
        if name == "lm_head.weight" and name not in found.tensors:  # tied
            continue
        values = torch.empty(expected.shape)
        found.read_(name, values)
        assert torch.equal(values, expected), name
        assert found.tensors[name].shape == expected.shape
    assert set(found.tensors) <= set(theirs)


def test_experts_are_read_as_the_library_merges_them(experts, library):
    """Also in pieces, which come in order."""
    found, theirs = named(library.MixtralForCausalLM, experts)
    assert_read_alike(found, theirs)
    merged = "model.layers.1.mlp.experts.gate_up_proj"
    assert len(found.tensors[merged].spans) == 8 and found.alone(merged) is None
    pieces = list(found.pieces(merged))
    assert [start for start, _ in pieces] == [64 * 32 * number for number in range(8)]
    assert torch.equal(torch.cat([piece for _, piece in pieces]), theirs[merged].flatten())


def test_a_base_model_lacks_the_prefix(library, tmp_path):
    """As GPT-2's first files do."""
    network = library.GPT2Model(library.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32))
    found, theirs = named(library.GPT2LMHeadModel, written(tmp_path / "gpt2", network))
    assert_read_alike(found, theirs)
    assert "wte.weight" in found.prefixed


def test_one_matrix_that_is_two(library, tmp_path):
    """Two halves of what lies as one in the files of Dinov2's largest model."""
    config = library.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4, use_swiglu_ffn=True
    )
    library.Dinov2ForImageClassification(config).save_pretrained(tmp_path)
    found, theirs = named(library.Dinov2ForImageClassification, tmp_path)
    assert_read_alike(found, theirs)
    cut = [name for name, one in found.tensors.items() if one.spans[0].start]
    assert len(cut) == 2 * 2 and all("up_proj" in name for name in cut)


def test_values_that_a_conversion_would_move_are_left_to_the_library(experts, library):
    """A table that turns matrices round is none of spans: their tensors keep the files' names, and are missed."""
    core_model_loading = importlib.import_module("transformers.core_model_loading")
    found, _ = named(library.MixtralForCausalLM, experts)
    for step in found._converters:
        step.operations = [*step.operations, core_model_loading.Transpose(1, 2)]
    name = "model.layers.0.mlp.experts.down_proj"
    stored = [f"model.layers.0.block_sparse_moe.experts.{number}.w2.weight" for number in range(4)]
    assert found._converted(None, name, {".experts.*.w2.weight": stored}) is None


@pytest.mark.parametrize("tune", ["blocks", "lora"])
def test_what_was_trained_is_merged_where_it_came_from(experts, library, text, tmp_path, tune):
    """The first loss is the library's; the merged folder loads with what was trained, all else the same bytes."""
    wanted = {"blocks": {"train_blocks": "2"}, "lora": {"lora_rank": 2}}[tune]
    run = edgeblocks.finetune(
        experts, data=text, out=tmp_path / "run", tune=tune, quantize="none", optimizer="adamw", **WANTED, **wanted
    )
    expected = first_loss(library.MixtralForCausalLM, experts, run)
    assert losses(run)[0] == pytest.approx(expected, rel=1e-5)
    merged = run.merge(tmp_path / "merged", last=True)
    changed = set()
    for path in experts.glob("*.safetensors"):
        before, after = load_file(path), load_file(tmp_path / "merged" / path.name)
        changed |= {name for name, value in before.items() if not torch.equal(after[name], value)}
    if tune == "blocks":
        # 4 of attention, 12 of experts, the router and two norms, all of layer 2.
        assert merged["trained"] == 19 and {name.split(".")[2] for name in changed} == {"2"}
        assert sum(".experts." in name for name in changed) == 12
        after, trained = library.MixtralForCausalLM.from_pretrained(tmp_path / "merged"), run.network(last=True)
        for name, value in trained.state_dict().items():
            own = run.directory.family().name_in_file(name)
            assert torch.equal(after.state_dict()[own], value.to(torch.bfloat16)), name
    else:
        assert merged["trained"] == 3 * 4 and all("self_attn" in name for name in changed)


def test_layers_of_several_kinds(library, text, tmp_path):
    """Convolutions and attention: streamed and resident stages give the same bits, the first loss is the library's,
    and the plan, which takes every layer for the largest, is above the peak."""
    folder = convolutions(library, tmp_path / "tiny-lfm2")
    runs = [
        edgeblocks.finetune(folder, data=text, out=tmp_path / tier, tier=tier, blocks=3, **WANTED)
        for tier in ("ram", "disk")
    ]
    assert losses(runs[0]) == losses(runs[1])
    for stage in range(3):
        values = [load_file(run.directory.store().path(stage)) for run in runs]
        assert all(torch.equal(value, values[1][name]) for name, value in values[0].items())
    assert losses(runs[0])[0] == pytest.approx(first_loss(library.Lfm2ForCausalLM, folder, runs[0]), rel=1e-5)
    assert runs[0].summary["peak_bytes"] <= 4e9
    runs[0].merge(tmp_path / "merged")
    library.Lfm2ForCausalLM.from_pretrained(tmp_path / "merged")


def test_lora_beside_layers_of_several_kinds(library, text, tmp_path):
    """Each layer has adapters beside its own matrices, read from rows of 8 bits that are as long as the longest."""
    folder = convolutions(library, tmp_path / "tiny-lfm2")
    run = edgeblocks.finetune(folder, data=text, out=tmp_path / "run", tune="lora", lora_rank=2, **WANTED)
    assert losses(run)[0] == pytest.approx(first_loss(library.Lfm2ForCausalLM, folder, run), rel=2e-3)
    run.merge(tmp_path / "adapter", adapter=True)
    names = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert any(".0.conv.in_proj.lora_A" in name for name in names)
    assert any(".1.self_attn.q_proj.lora_A" in name for name in names)
    asked = json.loads((tmp_path / "adapter/adapter_config.json").read_text())["target_modules"]
    assert {"in_proj", "q_proj", "w1"} <= set(asked)


@pytest.mark.parametrize("targets", ["all-linear", "out_proj", "self_attn.out_proj", "conv.out_proj,feed_forward.w1"])
def test_peft_has_adapters_beside_the_matrices_that_were_trained_alone(library, tmp_path, targets):
    """Also where another part of a layer has a matrix of the same name: PEFT asks how names end."""
    peft = pytest.importorskip("peft")
    folder = convolutions(library, tmp_path / "tiny-lfm2")
    network = library.AutoModelForCausalLM.from_pretrained(folder)
    asked = peft.LoraConfig(target_modules=peft_targets(str(folder), targets))
    adapted = peft.get_peft_model(network, asked)
    found = {name.removesuffix(".lora_A") for name, _ in adapted.named_modules() if name.endswith(".lora_A")}
    trained = targets_of(str(folder), targets)
    assert found == {f"{PEFT_PREFIX}model.layers.{n}.{name}" for n, names in enumerate(trained) for name in names}
