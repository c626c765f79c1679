"""transformers as it is asked here: quiet, without dropout, models on the meta device, nothing from a network."""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch

from edgeblocks.errors import ConfigError
from edgeblocks.pretrained.model_folder import ModelFolder

_NEEDS = "needs transformers, which is not installed: pip install 'edgeblocks[hf]'"


def library() -> Any:
    """transformers, which says nothing by itself.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        found = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise ConfigError(f"fine-tuning {_NEEDS}") from error
    found.logging.set_verbosity_error()
    found.logging.disable_progress_bar()
    return found


def read_config(folder: ModelFolder) -> Any:
    """The config as the library reads it, without dropout.

    Raises:
        ConfigError: it does not.
    """
    transformers = library()
    try:
        config = transformers.AutoConfig.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError, ImportError, TypeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{folder.path}: transformers does not read its config.json ({first[:300]}); models that need code of "
            f"their own are not supported"
        ) from error
    return without_dropout(config)


def built(folder: ModelFolder, kind: Any, config: Any, otherwise: str) -> Any:
    """A model on the meta device.

    Args:
        kind: one of the library's classes that choose the model's by its config.
        otherwise: what the model is where this class has none for it.

    Raises:
        ConfigError: it has none.
    """
    problems = []
    for attention in ("sdpa", "eager"):
        try:
            with torch.device("meta"):
                model = kind.from_config(config, attn_implementation=attention)
            return model.train()
        except (ValueError, KeyError, TypeError, ImportError, RuntimeError, AttributeError) as error:
            problems.append(str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__)
    raise ConfigError(f"{folder.path}: it is {otherwise} as transformers builds them ({problems[0]})")


@contextlib.contextmanager
def without_values(device: torch.device, *, are_several: bool = False) -> Iterator[None]:
    """On the meta device, where tensors have no values, the library asks for none while this lasts.

    It does not look whether positions are of several texts; and tokens that their values would send to several experts
    all go to the first, which takes as much memory and as many products.

    Args:
        are_several: whether positions are of several texts in a window.
    """
    if device.type != "meta":
        yield
        return
    masking, experts = (
        importlib.import_module(f"transformers.{name}").__dict__ for name in ("masking_utils", "integrations.moe")
    )
    found = (lambda position_ids: position_ids) if are_several else (lambda position_ids: None)
    with (
        replaced(masking, "find_packed_sequence_indices", found),
        replaced(experts, "_grouped_mm", lambda input, weight, offs: input @ weight[0]),
    ):
        yield


def without_dropout(config: Any) -> Any:
    """A config whose layers give the same numbers each time: in a step they are run twice."""
    for name in ("attention_dropout", "hidden_dropout", "dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop",
                 "embedding_dropout", "residual_dropout", "ffn_dropout", "hidden_dropout_prob",
                 "attention_probs_dropout_prob", "drop_path_rate", "layerdrop"):  # fmt: skip
        if getattr(config, name, None):
            setattr(config, name, 0.0)
    return config


@contextlib.contextmanager
def replaced(names: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    """An entry of a table is another one while this lasts."""
    missing = object()
    former = names.get(name, missing)
    names[name] = value
    try:
        yield
    finally:
        if former is missing:
            del names[name]
        else:
            names[name] = former
