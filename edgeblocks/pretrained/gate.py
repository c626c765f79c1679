"""Whether a model can be trained layer by layer: measured, not taken from a list.

A network of the model's own architecture, small and with random weights, is saved as the library saves it, read back,
and run twice: by the library, whole, and layer by layer. Hidden values and the gradients of all weights must be equal
bit for bit. What the shell cannot know of an architecture shows here: tables that are not restored, layers that talk to
each other beside the hidden values, files whose names are not those of the modules.
"""

import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgeblocks.errors import ConfigError
from edgeblocks.pretrained.library import library, without_dropout
from edgeblocks.pretrained.model_folder import CONFIG, ModelFolder, model_folder
from edgeblocks.pretrained.shell import Shell, UnsupportedModelError, shell_of

_TOKENS = 256
_LAYERS = 4
_HEAD_WIDTH = 16
_TEXTS = (7, 12, 5)
"""Lengths of texts that share a window."""
_CLOSE = 1e-4
"""Relative, of logits: the head is multiplied a slice at a time, which adds up in another order."""


def check_architecture(model: str, *, packed: bool = False) -> None:
    """Compare.

    Args:
        packed: whether windows hold several texts, which must not see each other.

    Raises:
        ConfigError: the two differ, or nothing small can be built of this architecture.
    """
    try:
        kinds = shell_of(model, "meta").kinds
    except UnsupportedModelError as error:
        raise refusal(model, str(error)) from error
    config = json.dumps(model_folder(model).config, sort_keys=True)
    why = _why_not(config, kinds)
    if why is not None:
        raise refusal(model, why)
    why = _why_not_packed(config) if packed else None
    if why is not None:
        raise ConfigError(
            f"{model}: with a model of the type {model_folder(model).config['model_type']} conversations cannot share "
            f"a window: {why}; leave packing out"
        )


def refusal(model: str, why: str) -> ConfigError:
    """The error for a model that cannot be trained."""
    return ConfigError(
        f"{model}: a model of the type {model_folder(model).config['model_type']} cannot be trained layer by layer: "
        f"{why}. Decoders such as llama, qwen2, qwen3, mistral, gemma3, phi3, smollm3, granite and olmo2 can"
    )


@functools.lru_cache(maxsize=8)
def _why_not(config: str, kinds: frozenset[tuple[str, ...]]) -> str | None:
    """What is wrong; None where the two are equal.

    Args:
        kinds: of the model's layers, all of which the small one must have.
    """
    return why_not(lambda folder: _difference(_small_network(json.loads(config), folder), folder, kinds))


@functools.lru_cache(maxsize=8)
def _why_not_packed(config: str) -> str | None:
    """Why texts in one window are not what they are alone; None where they are."""

    def compare(folder: Path) -> str | None:
        _small_network(json.loads(config), folder)
        return _difference_of_packed(folder)

    return why_not(compare)


def why_not(compare: Callable[[Path], str | None]) -> str | None:
    """What is wrong with an architecture, or why that cannot be told; None where nothing is.

    Args:
        compare: makes a small network in a folder, and says in what it differs from what is trained.
    """
    with tempfile.TemporaryDirectory(prefix="edgeblocks-gate-") as name:
        folder = Path(name)
        state = torch.get_rng_state()
        try:
            return compare(folder)
        except (UnsupportedModelError, ConfigError) as error:
            return str(error).removeprefix(f"{folder}: ")
        except Exception as error:
            return f"a small one could not be run ({type(error).__name__}: {str(error).strip()[:200]})"
        finally:
            torch.set_rng_state(state)


def _small_network(config: dict[str, Any], folder: Path) -> Any:
    """The architecture with few small layers, saved into a folder."""
    transformers = library()
    (folder / CONFIG).write_text(json.dumps(shrunk(config)))
    small = without_dropout(transformers.AutoConfig.from_pretrained(folder, local_files_only=True))
    torch.manual_seed(0)
    problems = []
    for attention in ("sdpa", "eager"):
        try:
            network = (
                transformers.AutoModelForCausalLM.from_config(small, attn_implementation=attention).float().train()
            )
        except (ValueError, ImportError) as error:
            problems.append(error)
            continue
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.ndim == 1:  # norms begin as ones, which would hide one that is left out
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
        network.save_pretrained(folder)
        return network
    raise problems[0]


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """A config of the same architecture: few layers and heads, little width, few tokens and experts.

    >>> shrunk({"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32})
    {'hidden_size': 64, 'num_attention_heads': 4, 'num_key_value_heads': 2, 'num_hidden_layers': 4}
    """
    heads = config.get("num_attention_heads") or config.get("n_head") or 4
    groups = config.get("num_key_value_heads")
    ratio = 1 if not groups else max(1, min(2, heads // groups))
    few_groups = min(groups or 4, 4 if ratio == 1 else 2)
    width = _HEAD_WIDTH * ratio * few_groups
    changed: dict[str, Any] = {
        "num_hidden_layers": min(config.get("num_hidden_layers") or _LAYERS, _LAYERS),
        "n_layer": min(config.get("n_layer") or _LAYERS, _LAYERS),
        "hidden_size": width,
        "n_embd": width,
        "word_embed_proj_dim": width,
        "intermediate_size": 2 * width,
        "ffn_dim": 2 * width,
        "num_attention_heads": ratio * few_groups,
        "n_head": ratio * few_groups,
        "num_key_value_heads": few_groups,
        "head_dim": config.get("qk_rope_head_dim") or _HEAD_WIDTH,
        "vocab_size": _TOKENS,
        "max_position_embeddings": 128,
        "n_positions": 128,
        "num_local_experts": 4,
        "num_experts": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": min(config.get("n_group") or 1, 2),
        "topk_group": 1,
        "num_kv_shared_layers": min(config.get("num_kv_shared_layers") or 0, 2),
        "vocab_size_per_layer_input": _TOKENS,
        "moe_intermediate_size": 32,
        "sliding_window": 8,
        "first_k_dense_replace": min(config.get("first_k_dense_replace") or 0, 1),
    }
    if "expand" in config and "state_size" in config:  # of state spaces, whose heads are wider than the hidden values
        changed |= {"num_heads": config["expand"] * width // _HEAD_WIDTH, "state_size": _HEAD_WIDTH, "n_groups": 1}
    small: dict[str, Any] = {
        key: changed.get(key, value) if value is not None else None for key, value in config.items()
    }
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(small.get(key), int):
            small[key] = min(small[key], 2)
        elif key in small:
            small[key] = None
    layers = small.get("num_hidden_layers", _LAYERS)
    if isinstance(small.get("layer_types"), list):
        kinds = small["layer_types"]
        # Each kind of layer that there is, in their order, again and again.
        chosen = [kind for number, kind in enumerate(kinds) if kind not in kinds[:number]]
        small["layer_types"] = (chosen * layers)[:layers]
    if isinstance(small.get("per_layer_config"), dict):
        small["per_layer_config"] = {key: one for key, one in small["per_layer_config"].items() if int(key) < layers}
    for key, value in config.items():
        if key != "layer_types" and isinstance(value, list) and len(value) == config.get("num_hidden_layers"):
            small[key] = value[:layers]
    return small


def _difference(whole: Any, path: Path, kinds: frozenset[tuple[str, ...]]) -> str | None:
    """In what the library's whole network and the layers one by one differ; None where they do not."""
    shell = Shell(ModelFolder(path), torch.device("cpu"))
    if not kinds <= shell.kinds:
        return f"it has layers of {len(kinds)} kinds, and a small one of {len(shell.layers)} layers has not all of them"
    layers = filled_layers(shell)
    tokens = torch.randint(3, _TOKENS, (2, 24), generator=torch.Generator().manual_seed(1))
    hidden = _through(shell, layers, tokens)
    last: list[Tensor] = []
    end = dict(whole.named_modules())[shell.layers_name][len(layers) - 1]
    hook = end.register_forward_hook(lambda _, __, out: last.append(out[0] if isinstance(out, tuple) else out))
    logits = whole(input_ids=tokens, use_cache=False).logits
    hook.remove()
    if not torch.equal(hidden, last[0]):
        return f"its hidden values are others, by up to {(hidden - last[0]).abs().max():.2g}"
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    for one in (hidden, last[0]):
        (one * weights).sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
    theirs = dict(whole.named_parameters())
    for number, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            expected = theirs[f"{shell.layers_name}.{number}.{name}"].grad
            found = parameter.grad
            if (found is None) != (expected is None):
                return f"{name} of layer {number} has a gradient in one of them alone"
            if found is not None and expected is not None and not torch.equal(found, expected):
                return f"the gradient of {name} of layer {number} is another one"
    answered, logits = shell.leave(hidden.detach()), logits.detach().float()
    if not torch.allclose(answered, logits, rtol=_CLOSE, atol=_CLOSE * float(logits.abs().max())):
        return f"its logits are others, by up to {(answered - logits).abs().max():.2g}"
    return None


def filled_layers(shell: Shell) -> list[nn.Module]:
    """A model's layers with their weights and tables.

    Raises:
        UnsupportedModelError: its files do not have one of them.
    """
    layers = [shell.layer(number) for number in range(len(shell.layers))]
    for number, layer in enumerate(layers):
        prefix = f"{shell.layers_name}.{number}."
        missing = [name for name in layer.state_dict() if f"{prefix}{name}" not in shell.stored.tensors]
        if missing:
            raise UnsupportedModelError(
                f"its files have other names than its modules (there is no {prefix}{missing[0]})"
            )
        for name, parameter in list(layer.named_parameters()):
            value = torch.empty(parameter.shape)
            shell.stored.read_(f"{prefix}{name}", value)
            owner, _, leaf = name.rpartition(".")
            layer.get_submodule(owner)._parameters[leaf] = nn.Parameter(value)
        shell.restore_tables_(layer, number)
    return layers


def _through(shell: Shell, layers: Sequence[nn.Module], tokens: Tensor, positions: Tensor | None = None) -> Tensor:
    """What the last layer gives."""
    hidden = shell.enter(tokens, positions)
    for layer, (args, kwargs) in zip(layers, shell.calls(hidden, positions), strict=True):
        out = layer(hidden, *args, **kwargs)
        hidden = out[0] if isinstance(out, tuple) else out
    return hidden


def _difference_of_packed(path: Path) -> str | None:
    """In what texts of one window differ from the same texts alone; None where they do not."""
    shell = Shell(ModelFolder(path), torch.device("cpu"))
    layers = filled_layers(shell)
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    tokens = torch.randint(3, _TOKENS, (1, sum(_TEXTS)), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(size) for size in _TEXTS]).unsqueeze(0)
    together = _through(shell, layers, tokens, positions)
    alone = torch.cat([_through(shell, layers, text) for text in torch.split(tokens, list(_TEXTS), dim=1)], dim=1)
    found = [("hidden values", together.detach(), alone.detach())]
    weights = torch.randn(together.shape, generator=torch.Generator().manual_seed(2))
    gradients = [torch.autograd.grad((one * weights).sum(), parameters, allow_unused=True) for one in (together, alone)]
    for one, other in zip(*gradients, strict=True):
        if one is not None and other is not None:
            found.append(("gradients", one, other))
    for what, one, other in found:
        if not torch.allclose(one, other, rtol=_CLOSE, atol=_CLOSE * float(other.abs().max())):
            return f"its {what} depend on what else is there, by up to {(one - other).abs().max():.2g}"
    return None
