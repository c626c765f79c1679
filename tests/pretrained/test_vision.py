"""Fine-tuning a pretrained image classifier: the numbers of the library's own training, streamed, resumed, merged."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.commands import assert_refused, invoke
from support.equality import StopAfter, assert_same_bits
from support.small_vit import LORA, MEAN, SMALL, WANTED, write_vit

import edgeblocks
from edgeblocks.errors import ConfigError, InterruptedRunError
from edgeblocks.pretrained.vision_folder import pictures_of
from edgeblocks.pretrained.vision_gate import check_classifier
from edgeblocks.runs.open_data import data_of
from edgeblocks.tuning import tuning_settings

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = list("1032547698")


@pytest.fixture(scope="module")
def base(library, tmp_path_factory):
    return write_vit(library, tmp_path_factory.mktemp("base") / "tiny-vit")


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """A run that nothing stopped, all stages in memory."""
    return edgeblocks.finetune(base, out=tmp_path_factory.mktemp("tuned") / "run", tier="ram", **WANTED)


@pytest.fixture(scope="module")
def classifier(library, tmp_path_factory):
    """The same with a head of the digits, in another order than the data's, and in bfloat16."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("classifier") / "tiny-vit"
    network = library.ViTForImageClassification(library.ViTConfig(**SMALL, id2label=dict(enumerate(NAMES))))
    network.to(torch.bfloat16).save_pretrained(folder, max_shard_size="10KB")
    return folder


def images(count, side=8, channels=1):
    return np.random.default_rng(0).integers(0, 256, (count, side, side, channels), dtype=np.uint8)


def their_logits(library, folder, pixels):
    """As the library's loaded model gives them in float32, pictures normalised as the folder says."""
    network = library.AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    asked = json.loads((folder / "preprocessor_config.json").read_text())
    mean, std = (torch.tensor(asked[name]).view(-1, 1, 1) for name in ("image_mean", "image_std"))
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).expand(-1, len(mean), -1, -1)
    with torch.no_grad():
        return network(pixel_values=((pixels.float() * (1 / 255) - mean) / std).contiguous()).logits, network


def test_streamed_stopped_and_resumed_it_gives_the_same_bits(tuned, base, tmp_path):
    with pytest.raises(InterruptedRunError):
        edgeblocks.finetune(base, out=tmp_path / "run", tier="disk", listener=StopAfter(2), **WANTED)
    again = edgeblocks.resume(tmp_path / "run")
    assert_same_bits(tuned.path, again.path, blocks=2)
    assert tuned.summary["metrics"]["validation"] == again.summary["metrics"]["validation"]


def test_it_trains_as_the_library_does(tuned, base, library):
    """Losses and weights of transformers' classifier under torch.optim.AdamW, all frozen but layers and head."""
    network = library.AutoModelForImageClassification.from_pretrained(base, num_labels=10).train().requires_grad_(False)
    torch.nn.init.zeros_(network.classifier.weight)
    torch.nn.init.zeros_(network.classifier.bias)
    trained = [network.vit.layers.requires_grad_(True), network.classifier.requires_grad_(True)]
    optimizer = torch.optim.AdamW(
        [p for part in trained for p in part.parameters()], betas=(0.9, 0.99), weight_decay=0.0
    )
    data, pictures = data_of(tuned.directory.settings.run, lambda *_: None), pictures_of(str(base))
    order = data.order(batch=6, seed=0, block=0)
    for step, record in enumerate(tuned.directory.metrics()):
        pixels, labels = data.gather(order.indices(step))
        loss = network(pixel_values=pictures.normalised(pixels), labels=torch.from_numpy(labels)).loss
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-4)
        loss.backward()
        for half in (network.vit.layers[:2], torch.nn.ModuleList([*network.vit.layers[2:], network.classifier])):
            torch.nn.utils.clip_grad_norm_(half.parameters(), 1.0)  # each stage by its own norm
        for group in optimizer.param_groups:
            group["lr"] = record["learning_rate"]
        optimizer.step()
        optimizer.zero_grad()
    family, theirs = tuned.directory.family(), dict(network.named_parameters())
    for stage in range(2):
        for name, value in load_file(tuned.directory.store().path(stage)).items():
            part, _, own = name.partition(".")
            if part == "weights":
                expected = theirs[family.name_in_file(tuned.directory.tensor_name(stage, own))].detach()
                np.testing.assert_allclose(value.view(expected.shape), expected, rtol=1e-2, atol=1e-3, err_msg=name)


def test_what_was_merged_loads_with_the_same_logits(tuned, base, library, tmp_path):
    """The head and the classes in it; what was not trained is the same byte for byte under its name and the prefix."""
    out = tmp_path / "merged"
    merged = tuned.merge(out)
    pixels = images(5)
    found, network = their_logits(library, out, pixels)
    with torch.no_grad():
        assert torch.equal(found, tuned.network().logits(tuned.images(pixels)))
    np.testing.assert_allclose(tuned.classify(pixels), found.softmax(-1), atol=1e-6)
    assert network.config.id2label == dict(enumerate(tuned.class_names)) == dict(enumerate("0123456789"))
    assert network.config.label2id["7"] == 7 and network.config.architectures == ["ViTForImageClassification"]
    assert merged["trained"] == 4 * 16 + 2 and merged["untouched"] == 6 and merged["left_out"] == []
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert {f"vit.{name}" for name in before if "pooler" not in name} | {"classifier.weight", "classifier.bias"} == set(
        after
    )
    same = {name for name, value in before.items() if "pooler" not in name and torch.equal(after[f"vit.{name}"], value)}
    assert same == {name for name in before if "embeddings" in name or name.startswith("layernorm")}
    assert_refused(invoke("merge", tuned.path, "-o", out), 2, "something already")


def test_a_head_of_the_same_classes_goes_on(classifier, library, tmp_path):
    """Its rows are put into the data's order, and accuracy is told before and after."""
    wanted = {**WANTED, "steps": 1, "learning_rate": 1e-12}
    run = edgeblocks.finetune(classifier, out=tmp_path / "run", **wanted)
    run.merge(tmp_path / "merged", last=True)
    former = with_processor(shutil.copytree(classifier, tmp_path / "former"))
    before, after = (their_logits(library, folder, images(50))[0] for folder in (former, tmp_path / "merged"))
    assert torch.equal(after[:, [int(name) for name in NAMES]], before)
    assert load_file(tmp_path / "merged/model.safetensors")["classifier.weight"].dtype == torch.bfloat16
    assert not (tmp_path / "merged/model.safetensors.index.json").exists()
    data = data_of(run.directory.settings.run, lambda *_: None)
    held, labels = data.gather(data.evaluation_indices(512))
    theirs, _ = their_logits(library, former, held)
    right = (np.array(NAMES)[theirs.argmax(-1)] == np.array(list("0123456789"))[labels]).mean()
    metrics = run.summary["metrics"]
    assert metrics["top1_before"] == pytest.approx(right) == metrics["validation"]["levels"][0]["top1"]


def with_processor(folder, mean=(0.5, 0.5, 0.5)):
    """A file that says what is usual where none does."""
    processor = {"image_mean": mean, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.mark.parametrize("kind", ["vit", "dinov2", "siglip", "deit", "dinov2_with_registers", "clip", "beit"])
def test_architectures_that_are_trained(library, tmp_path, kind):
    """Hidden values, logits and gradients, layer by layer, are those of the whole network bit for bit."""
    check_classifier(str(as_folder(library, tmp_path, kind)))


def test_a_matrix_that_is_two_modules_is_trained(library, tmp_path):
    """Dinov2's largest has it."""
    check_classifier(str(as_folder(library, tmp_path, "dinov2", use_swiglu_ffn=True)))


@pytest.mark.parametrize(
    ("kind", "said"), [("swin", "its layers are not alike"), ("pvt", "its layers are of several widths")]
)
def test_architectures_that_are_refused(library, tmp_path, kind, said):
    """By what was measured, in words."""
    with pytest.raises(ConfigError, match=rf"of the type {kind} cannot be trained layer by layer: {said}"):
        tuning_settings(as_folder(library, tmp_path, kind), {})


def test_a_type_that_has_no_classifier_is_refused(library, tmp_path):
    with pytest.raises(ConfigError, match="vit_mae has no image classifier in transformers"):
        tuning_settings(as_folder(library, tmp_path, "vit_mae"), {})


def as_folder(library, folder, kind, **changes):
    config = json.loads(library.AutoConfig.for_model(kind, **changes).to_json_string(use_diff=False))
    (folder / "config.json").write_text(json.dumps({**config, "model_type": kind}))
    return folder


@pytest.mark.parametrize("kind", ["dinov2", "siglip"])
def test_other_checkpoints_are_merged_alike(library, tmp_path, kind):
    """Dinov2's head sees all patches of pictures that are larger than its positions, and SigLIP's folder has a text
    tower, which a classifier does not have."""
    torch.manual_seed(0)
    side = {"siglip": 8, "dinov2": 12}[kind]
    if kind == "siglip":
        text = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}
        config = library.SiglipConfig(vision_config=SMALL, text_config={**text, "intermediate_size": 16})
        library.SiglipModel(config).save_pretrained(tmp_path / "model")
    else:
        library.Dinov2Model(library.Dinov2Config(**SMALL, mlp_ratio=2)).save_pretrained(tmp_path / "model")
        (tmp_path / "model/preprocessor_config.json").write_text(json.dumps({"crop_size": side, "image_mean": MEAN}))
    run = edgeblocks.finetune(tmp_path / "model", out=tmp_path / "run", **{**WANTED, "steps": 2})
    run.merge(tmp_path / "merged")
    asked = json.loads((tmp_path / "merged/preprocessor_config.json").read_text())
    with_processor(tmp_path / "merged", mean=asked["image_mean"])
    found, _ = their_logits(library, tmp_path / "merged", images(3, side))
    assert found.abs().max() > 0
    with torch.no_grad():
        assert torch.equal(found, run.network().logits(run.images(images(3, side))))


def test_stages_that_are_not_trained_stay(tuned, base, tmp_path):
    run = edgeblocks.finetune(base, out=tmp_path / "run", train_blocks="1", **WANTED)
    run.merge(tmp_path / "merged")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged/model.safetensors")
    changed = {name for name, value in before.items() if not torch.equal(after.get(f"vit.{name}", value), value)}
    assert changed and all(name.startswith(("encoder.layer.2", "encoder.layer.3")) for name in changed)
    planned = edgeblocks.plan(**tuning_settings(base, {**WANTED, "train_blocks": "0"}))
    assert any("has the readout, is frozen" in warning for warning in planned.plan.warnings)


def test_the_command_line(base, tmp_path):
    """The plan from a config alone; a training with its accuracy; what cannot be done with such a run."""
    folder = tmp_path / "config"
    folder.mkdir()
    shutil.copyfile(base / "config.json", folder / "config.json")
    asked = ["--data", "digits", "--batch", "6", "--steps", "2", "--mem-budget", "4GB"]
    planned = invoke("finetune", folder, *asked, "--dry-run")
    assert planned.exit_code == 0 and "trained end to end" in planned.stdout, planned.output
    done = invoke("finetune", base, *asked, "--out", tmp_path / "run")
    assert done.exit_code == 0 and "top-1 accuracy" in done.stdout, done.output
    assert "before" not in done.stdout.partition("top-1")[2].partition("\n")[0]
    assert f"edgeblocks merge {tmp_path / 'run'}" in done.stdout.replace("\n", "")
    assert "calibration error" in invoke("eval", tmp_path / "run", "--samples", "20").stdout
    assert "hf-vision" in invoke("info", tmp_path / "run").stdout
    assert invoke("report", tmp_path / "run").exit_code == 0
    assert_refused(invoke("export", tmp_path / "run", "--web", tmp_path / "page"), 2, "is a fine-tuned model")
    assert_refused(invoke("sample", tmp_path / "run"), 2, "classifies images")


def test_what_cannot_be_trained_on_is_said(base, model, tmp_path):
    flat, colours = tmp_path / "flat.npz", tmp_path / "colours.npz"
    np.savez(flat, images=images(4))
    np.savez(colours, images=images(4, channels=3), labels=np.array([0, 1, 0, 1]))
    (tmp_path / "text.txt").write_text("A text.")
    grey = shutil.copytree(base, tmp_path / "grey")
    (grey / "preprocessor_config.json").unlink()
    config = json.loads((grey / "config.json").read_text())
    (grey / "config.json").write_text(json.dumps({**config, "num_channels": 1}))
    for folder, settings, said in [
        (base, {"data": str(flat)}, "the data have no classes and the model is a classifier"),
        (base, {"data": str(tmp_path / "text.txt")}, "which classifies images, and .* is text; give a folder"),
        (base, {"tune": "blocks"}, "--tune blocks: .* classifies images"),
        (base, {"length": 12}, "length=12: hf-vision reads images"),
        (base, {"image_size": 12}, "does not take pictures of 12 x 12 pixels"),
        (grey, {"data": str(colours)}, "have 3 channels and the model takes 1"),
        (model, {"data": "digits"}, "which writes text, and digits are images"),
    ]:
        with pytest.raises(ConfigError, match=said):
            edgeblocks.plan(**tuning_settings(folder, {"mem_budget": "4GB", **settings}))


@pytest.mark.parametrize(
    ("asked", "side", "mean", "factor"),
    [
        ({}, 8, 0.5, 1 / 255),
        ({"size": 16, "image_mean": 0.1, "image_std": 0.2}, 16, 0.1, 1 / 255),
        ({"size": {"shortest_edge": 20}, "crop_size": {"height": 8, "width": 8}}, 8, 0.5, 1 / 255),
        ({"size": {"shortest_edge": 20}, "crop_size": 8, "do_center_crop": False}, 20, 0.5, 1 / 255),
        ({"size": [8, 8], "do_normalize": False, "do_rescale": False}, 8, 0.0, 1.0),
    ],
)
def test_pictures_are_made_what_the_folder_says(library, tmp_path, asked, side, mean, factor):
    as_folder(library, tmp_path, "vit", **SMALL)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(asked))
    found = pictures_of(str(tmp_path))
    assert (found.side, found.mean, found.factor) == (side, (mean,) * 3, factor)
    white = found.normalised(np.full((1, 2, 2, 1), 255, dtype=np.uint8))
    assert white.shape == (1, 3, 2, 2) and white[0, 0, 0, 0] == pytest.approx((255 * factor - mean) / found.std[0])


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("[]", "is no table"),
        ('{"size": {"height": 8, "width": 16}}', "8 x 16 pixels, and here they are squares"),
        ('{"size": "large"}', "no number of pixels"),
        ('{"image_mean": ["a"]}', "no numbers"),
        ('{"image_mean": [0.1, 0.2]}', "has 2 values, and the model takes pictures of 3 colours"),
    ],
)
def test_a_processor_that_cannot_be_used_is_said(library, tmp_path, asked, said):
    as_folder(library, tmp_path, "vit", **SMALL)
    (tmp_path / "preprocessor_config.json").write_text(asked)
    with pytest.raises(ConfigError, match=said):
        pictures_of(str(tmp_path))


@pytest.fixture(scope="module")
def adapted(base, tmp_path_factory):
    """A run that nothing stopped, with adapters beside layers as they are."""
    return edgeblocks.finetune(base, out=tmp_path_factory.mktemp("adapted") / "run", quantize="none", **LORA)


def test_lora_is_merged_and_loads_in_peft(adapted, base, library, tmp_path):
    """The adapter with the head in PEFT's layout, and the merged folder, give the logits of what was trained; patches,
    positions, biases and norms are the same byte for byte."""
    peft, pixels = pytest.importorskip("peft"), images(5)
    with torch.no_grad():
        expected = adapted.network().logits(adapted.images(pixels))
    adapted.merge(tmp_path / "adapter", adapter=True)
    adapted.merge(tmp_path / "merged")
    found, _ = their_logits(library, tmp_path / "merged", pixels)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4) and found.abs().max() > 0
    network = library.AutoModelForImageClassification.from_pretrained(base, num_labels=10)
    with torch.no_grad():
        loaded = peft.PeftModel.from_pretrained(network, tmp_path / "adapter").eval()(
            pixel_values=adapted.images(pixels)
        )
    assert torch.allclose(loaded.logits, expected, rtol=1e-4, atol=1e-4)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    changed = {name for name, value in before.items() if not torch.equal(after.get(f"vit.{name}", value), value)}
    assert len(changed) == 4 * 6 and all(before[name].ndim == 2 for name in changed)
    first = next(iter(adapted.directory.metrics()))["loss"]
    assert first == pytest.approx(np.log(10), rel=1e-5)  # adapters change nothing at first, and the head is zeros


def test_lora_stopped_and_resumed_gives_the_same_bits(base, tmp_path):
    """Also over layers in 8 bits, which is what is usual."""
    whole = edgeblocks.finetune(base, out=tmp_path / "whole", **LORA)
    with pytest.raises(InterruptedRunError):
        edgeblocks.finetune(base, out=tmp_path / "run", listener=StopAfter(2), **LORA)
    assert_same_bits(whole.path, edgeblocks.resume(tmp_path / "run").path, blocks=1)


def test_lora_goes_on_from_a_head_of_the_same_classes(classifier, tmp_path):
    """The accuracy is told before and after, and nothing is changed where nothing is learned."""
    run = edgeblocks.finetune(classifier, out=tmp_path / "run", **{**LORA, "steps": 1, "learning_rate": 1e-12})
    metrics = run.summary["metrics"]
    assert metrics["top1_before"] == metrics["validation"]["levels"][0]["top1"] > 0
