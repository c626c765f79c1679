"""The settings of a run that fine-tunes a pretrained model: what is usual, over what fine-tuning settles itself."""

from collections.abc import Mapping
from pathlib import Path

from edgeblocks.errors import ConfigError
from edgeblocks.planning.plans import split_layers
from edgeblocks.pretrained.decoder import DecoderSettings
from edgeblocks.pretrained.model_folder import TOKENIZER, ModelFolder, model_folder
from edgeblocks.pretrained.vision_folder import is_vision, pictures_of
from edgeblocks.pretrained.vision_gate import check_classifier

TUNING: dict[str, object] = {
    "steps": 200,
    "batch": 4,
    "length": 512,
    "learning_rate": 2e-5,
    "warmup": 10,
    "weight_decay": 0.0,
    "sample_grids": 0,
}
"""What is usual where a pretrained model is trained on; learning rate and weight decay are those of trl 1.16."""
LORA_TUNING: dict[str, object] = {"learning_rate": 2e-4, "optimizer": "adamw"}
"""Over these, with --tune lora."""
FROZEN_TUNING: dict[str, object] = {"precision": "auto"}
"""Over these, where layers are frozen: most of a step are their products, whose numbers are rounded already."""
PICTURE_TUNING: dict[str, object] = {
    "steps": 200,
    "batch": 16,
    "learning_rate": 5e-5,
    "warmup": 20,
    "weight_decay": 0.0,
    "sample_grids": 0,
}
"""The same of a pretrained image classifier; learning rate and batch are those of transformers' guide."""
OTHER_TOKENIZERS = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
"""Files of older tokenizers."""
LORA_SETTINGS = frozenset({"lora_rank", "lora_alpha", "lora_targets"})
TUNING_OWN: dict[str, object] = {"family": "hf", "method": "exact", "model": None, "init": None, "tokenizer": None}
"""What fine-tuning settles itself."""


def tuning_settings(model: Path | str, given: Mapping[str, object]) -> dict[str, object]:
    """The settings of a run that fine-tunes a model: those that were given, over those that are usual.

    Raises:
        ConfigError: one of them belongs to networks that begin with random weights.
    """
    given = {name: value for name, value in given.items() if value is not None}
    tune = given.pop("tune", "full")
    if tune not in ("full", "lora", "blocks"):
        raise ConfigError(
            f"--tune {tune}: full trains all layers, lora small products beside them, blocks some of them; use one"
        )
    wrong = sorted(given.keys() & (LORA_SETTINGS | {"quantize"} if tune == "full" else LORA_SETTINGS))
    if tune != "lora" and wrong:
        raise ConfigError(f"{', '.join(wrong)}: these belong to --tune lora{'' if tune == 'blocks' else ' or blocks'}")
    if given.get("train_embeddings"):
        if tune != "full":
            raise ConfigError(
                "train_embeddings: tables of tokens are trained with --tune full; leave it out, or --tune"
            )
        given = {"clip_by": "network", **given}
    wrong = sorted(TUNING_OWN.keys() & given.keys())
    if wrong:
        raise ConfigError(f"{', '.join(wrong)}: fine-tuning sets this itself; leave it out")
    folder = str(Path(model).expanduser())
    told = model_folder(folder)  # says at once what is wrong with it
    if is_vision(told):
        return _picture_settings(told, tune, given)
    if _is_of_images(given.get("data")):
        raise ConfigError(
            f"{model} is a {told.config['model_type']}, which writes text, and {given['data']} are images; give a text "
            f"or conversations, or fine-tune an image classifier such as a vit or dinov2"
        )
    init, tokenizer = None if told.is_plan_only else folder, str(Path(folder) / TOKENIZER)
    if told.is_plan_only and given.get("data") is None and not Path(tokenizer).exists():
        tokenizer = "bytes"  # of the built-in text: how many tokens there are decides nothing that a plan tells
    else:
        _check_tokenizer(told)
    own: dict[str, object] = {"model": folder, "init": init, "tokenizer": tokenizer}
    usual = TUNING
    if tune == "lora":
        usual = {**TUNING, **LORA_TUNING}
        own |= {"family": "hf-lora", "init": None}
    elif tune == "blocks":
        own |= {"family": "hf-part", **_trained_part(folder, given)}
    if tune != "full" and not told.is_plan_only:  # without weights there is nothing to measure with
        usual = {**usual, **FROZEN_TUNING}
    return {"data": "moby-dick", **usual, **given, **TUNING_OWN, **own}


def _check_tokenizer(folder: ModelFolder) -> None:
    if (folder.path / TOKENIZER).exists():
        return
    others = [name for name in OTHER_TOKENIZERS if (folder.path / name).exists()]
    cure = "download it with the model"
    if others:
        cure = (
            f"it has {others[0]}, of which transformers writes one: "
            f"AutoTokenizer.from_pretrained({str(folder.path)!r}).save_pretrained({str(folder.path)!r})"
        )
    raise ConfigError(f"{folder.path} has no {TOKENIZER}, which says what tokens a text is; {cure}")


def _trained_part(folder: str, given: dict[str, object]) -> dict[str, object]:
    """The layers of `train_blocks`, where a model is cut into `blocks`; both are taken out of the settings.

    Raises:
        ConfigError: they do not name layers that follow each other.
    """
    depth = DecoderSettings(model=folder).depth
    told, count = str(given.pop("train_blocks", "")), given.pop("blocks", depth)
    if not isinstance(count, int) or not 1 <= count <= depth:
        raise ConfigError(f"--blocks {count}: the model has {depth} layers, so that it can be cut into 1 to {depth}")
    numbers = sorted({int(number) for number in told.split(",") if number.strip().isdigit()})
    if not numbers or any(not number.strip().isdigit() for number in told.split(",")):
        raise ConfigError(
            f"--tune blocks needs --train-blocks: the model has {depth} layers, cut into {count} blocks; "
            f"--train-blocks {max(0, count - 2)},{count - 1} trains the last ones"
        )
    if numbers[-1] >= count or numbers != list(range(numbers[0], numbers[-1] + 1)):
        raise ConfigError(
            f"--train-blocks {told}: name some of 0 to {count - 1} that follow each other; what is below them is only "
            f"run forward"
        )
    layers = split_layers(depth, count)
    return {"first_layer": sum(layers[: numbers[0]]), "trained_layers": sum(layers[numbers[0] : numbers[-1] + 1])}


def _is_of_images(data: object) -> bool:
    """Whether data are images by their name."""
    return data == "digits" or (isinstance(data, str | Path) and Path(data).suffix.lower() == ".npz")


def _picture_settings(folder: ModelFolder, tune: object, given: Mapping[str, object]) -> dict[str, object]:
    """`tuning_settings` of an image classifier.

    Raises:
        ConfigError: one of them is of text, or the model cannot be trained.
    """
    if tune == "blocks":
        raise ConfigError(
            f"--tune blocks: {folder.path} classifies images; leave it out, and train some stages alone with "
            f"--blocks and --train-blocks"
        )
    data = given.get("data", "digits")
    is_file = isinstance(data, str | Path) and Path(data).expanduser().is_file()
    if data == "moby-dick" or (is_file and not _is_of_images(data)):
        raise ConfigError(
            f"{folder.path} is a {folder.config['model_type']}, which classifies images, and {data} is text; give a "
            f"folder with one sub-folder of images per class or an .npz with labels, or fine-tune a decoder"
        )
    model = str(folder.path)
    check_classifier(model)
    own: dict[str, object] = {
        "family": "hf-vision",
        "method": "exact",
        "model": model,
        "init": None if folder.is_plan_only else model,
    }
    usual = PICTURE_TUNING
    if tune == "lora":
        usual = {**usual, **LORA_TUNING, **({} if folder.is_plan_only else FROZEN_TUNING)}
        own["family"] = "hf-vision-lora"
    return {"data": "digits", "image_size": pictures_of(model).side, **usual, **given, **own}
