"""Folders that are no models, or none that can be trained: what is said of each."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import assert_refused, invoke

from edgeblocks.errors import ConfigError
from edgeblocks.pretrained.gate import check_architecture, shrunk
from edgeblocks.pretrained.model_folder import ModelFolder, model_folder


def without(name):
    return lambda folder: (folder / name).unlink()


def with_config(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def of_bytes(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def shard_of_8_bits(folder):
    path = sorted(folder.glob("*.safetensors"))[0]
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"BF16"', b'"F8_X"'))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("config.json"), "has no config.json"),
        (of_bytes("config.json", b"{"), "cannot be read"),
        (of_bytes("config.json", b"[]"), "names no model_type"),
        (with_config(quantization_config={"quant_method": "gptq"}), r"it is quantized \(gptq\)"),
        (with_config(quantization_config={"quant_method": "fp8"}), r"it is quantized \(fp8\)"),
        (without("model.safetensors.index.json"), "which says what is in them"),
        (of_bytes("model.safetensors.index.json", b'{"weight_map": {"a": "../b.safetensors"}}'), "is no table"),
        (without("model-00001-of-00002.safetensors"), "lacks 1 of its 2 files"),
        (of_bytes("model-00001-of-00002.safetensors", b"cut"), "download it again"),
        (shard_of_8_bits, "it is quantized"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(model, tmp_path, change, said):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    change(folder)
    with pytest.raises(ConfigError, match=said):
        ModelFolder(folder)


def test_files_that_are_not_those_of_the_config_are_told_apart(model, text, tmp_path):
    """A tensor of another shape, or one that is missing; counters beside the weights are no quantized weights."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    name = "model.layers.1.mlp.up_proj.weight"
    path = ModelFolder(folder).file_of(name).path
    tensors = {**load_file(path), "model.layers.1.count": torch.tensor([1])}
    save_file(tensors, path)
    assert "model.layers.1.count" not in ModelFolder(folder).tensors
    asked = [
        "finetune",
        folder,
        "--data",
        text,
        "--length",
        "16",
        "--batch",
        "2",
        "--steps",
        "2",
        "--mem-budget",
        "4GB",
    ]
    for change, said in (
        ({name: torch.zeros(60, 32)}, f"{name} is 60x32, here 64x32"),
        ({}, f"of this network: {name}"),
    ):
        save_file({**{own: value for own, value in tensors.items() if own != name}, **change}, path)
        message = (
            f"{said}. Its config.json and its .safetensors files do not belong together; download all of them again"
        )
        assert_refused(invoke(*asked, "--out", tmp_path / "run"), 2, re.escape(message))


def test_names_that_are_no_folders(tmp_path):
    with pytest.raises(ConfigError, match="hf download someone/model --local-dir model"):
        ModelFolder(tmp_path.relative_to(tmp_path) / "someone/model")
    with pytest.raises(ConfigError, match="a GGUF file holds"):
        ModelFolder(tmp_path / "model.gguf")
    (tmp_path / "weights.bin").write_bytes(b"")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=r"It has weights.bin: convert it"):
        ModelFolder(tmp_path)


KINDS = ["llama", "qwen2", "qwen3", "mistral", "smollm3", "gemma2", "gemma3_text", "phi3", "gpt2", "olmo2", "granite"]
KINDS += ["mixtral", "lfm2"]
DOCS = Path(__file__).parents[2] / "docs/finetune.md"
LISTED = re.findall(r"^\| (llama, .*) \| equal bit for bit \|$", DOCS.read_text(), re.MULTILINE)[0].split(", ")
CHANGED = {
    "hunyuan_v1_dense": {"head_dim": 128},
    "lfm2": {"num_hidden_layers": 16, "layer_types": ["conv", "conv", "full_attention", "conv"] * 4},
}
"""Of configs that cannot be run as they are, or have layers of one kind, which no model has."""


def as_folder(library, folder, kind):
    config = json.loads(library.AutoConfig.for_model(kind, **CHANGED.get(kind, {})).to_json_string(use_diff=False))
    (folder / "config.json").write_text(json.dumps({**config, "model_type": kind}))
    return str(folder)


def test_types_that_are_tried():
    """All are on the list in the docs, which has as many types as it says."""
    assert set(KINDS) <= set(LISTED) and f"{len(LISTED)} types" in DOCS.read_text()


@pytest.mark.parametrize(
    "kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.thorough) for kind in LISTED if kind not in KINDS)]
)
def test_architectures_that_are_trained(library, tmp_path, kind):
    """Hidden values and gradients, layer by layer, are those of the whole network bit for bit."""
    check_architecture(as_folder(library, tmp_path, kind))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("gemma3n_text", "a small one could not be run"),
        pytest.param("falcon_h1", "its hidden values are others", marks=pytest.mark.thorough),
    ],
)
def test_architectures_that_are_refused(library, tmp_path, kind, said):
    """By what was measured, in words."""
    with pytest.raises(ConfigError, match=rf"of the type {kind} cannot be trained layer by layer: .*{said}"):
        check_architecture(as_folder(library, tmp_path, kind))


def test_a_small_network_without_one_of_the_kinds_of_layers_tells_nothing(library, tmp_path):
    """So it is refused, and not taken for equal."""
    folder = as_folder(library, tmp_path, "lfm2")
    config = json.loads((tmp_path / "config.json").read_text())
    for names in (config, config["rope_parameters"]):
        names.pop("layer_types", None)
    late = json.dumps({**config, "full_attn_idxs": [12], "layer_types": None})
    (tmp_path / "config.json").write_text(late)
    with pytest.raises(ConfigError, match="has layers of 2 kinds, and a small one of 4 layers has not all of them"):
        check_architecture(folder)


def test_a_small_config_keeps_what_makes_the_architecture():
    kinds = ["sliding", "sliding", "full"] * 9
    small = shrunk({"num_hidden_layers": 26, "layer_types": kinds, "rope_theta": 5, "x": None})
    assert small["layer_types"] == ["sliding", "full", "sliding", "full"]
    assert small["rope_theta"] == 5 and small["x"] is None


def test_a_folder_is_like_one_file(model):
    folder = model_folder(str(model))
    assert len(folder.sha256()) == 64 and folder.num_bytes == sum(file.num_bytes for file in folder.files)
    name = "model.layers.3.mlp.up_proj.weight"
    assert folder.tensors[name].shape == (64, 32) and folder.file_of(name) in folder.files


def test_a_config_alone_is_enough_to_plan(model, text, tmp_path):
    """For a machine that is not here, without a weight on the disk."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(model / name, folder / name)
    asked = ["finetune", folder, "--data", text, "--length", "16", "--batch", "2", "--set", "target=laptop-8gb"]
    planned = invoke(*asked, "--dry-run")
    assert planned.exit_code == 0 and "laptop without a GPU" in planned.stdout, planned.output
    assert_refused(invoke(*asked[:-2], "--out", tmp_path / "run"), 2, "a config is enough to plan")
