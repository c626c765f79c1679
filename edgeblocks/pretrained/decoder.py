"""hf: a pretrained decoder of Hugging Face's transformers, trained end to end stage by stage.

Layers are the library's own modules (`shell`), and are what is trained. The table of tokens, the head and the final
norm are where that is asked for (`trained_tables`). Else they stay as they are, and both tables in the model's files:
rows of the tokens at hand are read, and the head is multiplied with a slice at a time. A window of tokens is one
example; each token but the first is predicted from those before it.
"""

import copy
import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from edgeblocks.diffusion.autoregression import CachesPer
from edgeblocks.diffusion.noise import NoiseDistribution, NoisePartition, NoiseRange
from edgeblocks.errors import ConfigError
from edgeblocks.families.base import Batch, BatchSpec, ConditionSpec, Level, TextFamily, TextInfo
from edgeblocks.families.block import Block
from edgeblocks.families.family import EndToEnd
from edgeblocks.families.layers import run_layers
from edgeblocks.families.settings import FamilySettings
from edgeblocks.methods import Frozen
from edgeblocks.pretrained.gate import check_architecture, refusal
from edgeblocks.pretrained.keys import from_key
from edgeblocks.pretrained.layer import LARGEST_HEAP_BYTES, PretrainedLayer, TrainedLayer, as_condition
from edgeblocks.pretrained.model_folder import ModelFolder, model_folder
from edgeblocks.pretrained.named_tensors import NamedTensors
from edgeblocks.pretrained.shell import Shell, UnsupportedModelError, shell_of
from edgeblocks.pretrained.trained_tables import (
    HEAD,
    READOUT,
    TABLE,
    TrainedLoss,
    TrainedReadout,
    TrainedTable,
    chunks,
)

LOGITS_BYTES = 16 * 2**20
"""Of the logits that exist at a time, float32."""
READING_BYTES = 16_000_000
"""What a slice of the head is read into, with the gaps that it leaves on the heap."""
TRAINED_TABLES_GAP_BYTES = 38_000_000
"""With less a step of SmolLM2 was refused memory at the cap in the smallest budget, and went on with fewer samples."""
_TABLES = f"{TABLE}.weight", f"{READOUT}.{HEAD}"
_VECTORS = f"{READOUT}.vectors."
_NOISE = NoiseDistribution(sigma_min=0.1, sigma_max=10.0, p_mean=0.0, p_std=1.2)
"""Nothing is noised: one level stands for all."""


@dataclass(frozen=True, kw_only=True)
class DecoderSettings(FamilySettings):
    """Where the model is."""

    model: Annotated[
        str, Field(max_length=4096, description="folder of the model: config.json, .safetensors files, tokenizer.json")
    ] = ""
    train_embeddings: Annotated[
        bool, Field(description="train the table of tokens, the head and the norms outside of layers as well")
    ] = False

    @property
    def depth(self) -> int:
        """Layers of the model; 1 where none is named."""
        if not self.model:
            return 1
        config = model_folder(self.model).config
        told = config.get("num_hidden_layers") or (config.get("text_config") or {}).get("num_hidden_layers")
        if told is None:
            told = config.get("n_layer") or config.get("num_layers")
        if not isinstance(told, int) or told < 1:
            raise ConfigError(f"{self.model}: its config.json does not say how many layers it has")
        return told


class DecoderBlock(Block):
    """Some layers of a model."""

    reading_bytes = READING_BYTES

    stem_parts, readout_parts = (TABLE,), (READOUT,)
    table: TrainedTable | None
    readout: TrainedReadout | None
    """Where they are trained; else there are none of these names."""

    def __init__(self, *, model: str, numbers: Sequence[int], checkpointing: bool, with_tables: bool = False) -> None:
        super().__init__()
        self.model, self.checkpointing = model, checkpointing
        if with_tables:
            shell = shell_of(model, "meta")
            self.table = TrainedTable(shell.embedding_table.shape)
        self.layers = nn.ModuleList(TrainedLayer(model, number) for number in numbers)
        if with_tables:
            self.readout = TrainedReadout(shell.head_table.shape, shell.vectors)

    def init_(self, generator: torch.Generator) -> None:
        """Weights are those of the files; these are for a network whose speed is measured."""
        with torch.no_grad():
            for parameter in self.parameters():
                nn.init.normal_(parameter, std=0.02, generator=generator)

    def count_reading_(self) -> None:
        """On the meta device, where plans count tables, a table as large as what reading leaves in memory."""
        if torch.get_default_device().type == "meta":
            self.register_buffer("reading", torch.empty(self.reading_bytes, dtype=torch.uint8), persistent=False)

    def begin_at(self, layer: int) -> None:
        """The layers are those from this one on: what a model calls them with may differ."""
        count = len(self.layers)
        self.layers = nn.ModuleList(TrainedLayer(self.model, number) for number in range(layer, layer + count))

    def reset_tables_(self) -> None:
        """Make the fixed tables inside layers, which are not stored, on torch's default device."""
        self.count_reading_()
        shell = shell_of(self.model, torch.get_default_device().type)
        for layer in self.layers:
            assert isinstance(layer, TrainedLayer)
            shell.restore_tables_(layer.hf, layer.number)


class Decoder(TextFamily, EndToEnd):
    """The family: what a training step needs of a model and a text."""

    name = "hf"
    task: Literal["continuation"] = "continuation"
    preferred_blocks = 1
    settings_type: type = DecoderSettings
    settings: DecoderSettings
    like: int | None = None
    """The layer that all layers of its networks are like, where its costs are traced; None: each is as in the model."""
    caches_per: CachesPer = "block"
    chain_steps = 1
    sigma_data = 1.0
    noise = _NOISE
    code_width = 8
    heads = head_width = 1
    writes_text = False
    only_exact = True
    largest_heap_bytes = LARGEST_HEAP_BYTES
    library_bytes = 180_000_000
    """transformers, the tokenizer and the model without weights, measured with SmolLM2-135M."""

    def __init__(self, settings: DecoderSettings, data: TextInfo) -> None:
        """
        Raises:
            ConfigError: with everything that is impossible.
        """
        super().__init__(settings, data)
        if not settings.model:
            raise ConfigError("the family hf fine-tunes a model: name its folder with edgeblocks finetune FOLDER")
        vocabulary = self.shell("meta").embedding_table.shape[0]
        if data.vocabulary > vocabulary:
            raise ConfigError(
                f"the tokenizer has {data.vocabulary:,} tokens, and the table of the model in {settings.model} "
                f"{vocabulary:,} rows: tokens were added that the model was not given, or the tokenizer is another "
                f"model's; download tokenizer.json again, or give the model rows for them with transformers' "
                f"resize_token_embeddings({data.vocabulary})"
            )

    def shell(self, device: str) -> Shell:
        """The model around its layers.

        Raises:
            ConfigError: it cannot be trained layer by layer.
        """
        try:
            return shell_of(self.settings.model, device)
        except UnsupportedModelError as error:
            raise refusal(self.settings.model, str(error)) from error

    @property
    def reads_layers_as(self) -> Frozen | None:
        """As what layers that are not trained are read, where they are no part of the network."""
        return None

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Nothing is noised."""
        return (0,)

    @property
    def condition_spec(self) -> ConditionSpec:
        """The tokens."""
        return "tokens", (self.data.length,), torch.int64

    @property
    def architecture(self) -> str:
        """The model's config.json, as one text."""
        return json.dumps(model_folder(self.settings.model).config, sort_keys=True)

    def check_network(self) -> None:
        """Compare a small network of this architecture, layer by layer, with the library's own forward pass.

        Raises:
            ConfigError: they differ.
        """
        check_architecture(self.settings.model, packed=self.data.packed)

    def num_caches(self, num_layers: int) -> int:
        """Text is not written here."""
        return 0

    def opened(self, path: Path) -> NamedTensors:
        """The model's tensors, as its files are now."""
        return NamedTensors(ModelFolder(path), self.shell("meta").model)

    def name_in_file(self, name: str) -> str:
        """What a parameter of the whole network is called in the library's model.

        >>> Decoder.__new__(Decoder)._named("model.layers", "layers.3.hf.mlp.up_proj.weight")
        'model.layers.3.mlp.up_proj.weight'
        """
        shell = self.shell("meta")
        if name in _TABLES:
            return shell.table_names[_TABLES.index(name)]
        if name.startswith(_VECTORS):
            return from_key(name.removeprefix(_VECTORS))
        return self._named(shell.layers_name, name)

    @property
    def tied_parameters(self) -> tuple[str, str] | None:
        """Of the first and of the last stage, where these are copies of one."""
        return _TABLES if self.settings.train_embeddings and self.shell("meta").is_tied else None

    @property
    def tied_bytes(self) -> int:
        """Of the table."""
        return 4 * math.prod(self.shell("meta").embedding_table.shape) if self.tied_parameters else 0

    @property
    def gap_bytes(self) -> int:
        """Where tables are trained; where they are read, `READING_BYTES` covers it."""
        return TRAINED_TABLES_GAP_BYTES if self.settings.train_embeddings else 0

    def _named(self, layers: str, name: str) -> str:
        _, number, _, own = name.split(".", 3)
        return f"{layers}.{number}.{own}"

    def is_frozen(self, name: str) -> bool:
        """Whether a tensor of the model's files is used as it is."""
        shell = self.shell("meta")
        trained = {*shell.table_names, *shell.vectors} if self.settings.train_embeddings else ()
        return name in shell.frozen_names and name not in trained

    @staticmethod
    def tables_of(network: nn.Module) -> tuple[TrainedTable | None, TrainedReadout | None]:
        """What a network has around its layers; None: it is not trained, and in the model's files."""
        return getattr(network, TABLE, None), getattr(network, READOUT, None)

    def called_layers(self, network: Callable[[], nn.Module], device: torch.device) -> list[Callable[..., Any]]:
        """The model's layers on a device, to be called as the model calls its own.

        Args:
            network: the trained layers, whose weights come when one is taken.
        """

        def call(number: int, *args: Any, **kwargs: Any) -> Any:
            block = network()
            assert isinstance(block, DecoderBlock)
            layer = block.layers[number]
            assert isinstance(layer, PretrainedLayer)
            return layer.called(*args, **kwargs)

        return [functools.partial(call, number) for number in range(self.num_layers)]

    def uniform(self) -> Sequence[Self]:
        """One for each kind of layer that the model has."""
        kind_of, first = self.shell("meta").kind_of, self.first_layer
        found = []
        for kind in sorted(set(kind_of[first : first + self.num_layers])):
            one = copy.copy(self)
            one.like = kind
            found.append(one)
        return found if len(found) > 1 else [self]

    @property
    def first_layer(self) -> int:
        """Of those that are trained."""
        return 0

    def block(self, *, num_layers: int, checkpointing: bool) -> DecoderBlock:
        """Some layers, without weights."""
        return DecoderBlock(
            model=self.settings.model,
            numbers=self._numbers(num_layers),
            checkpointing=checkpointing,
            with_tables=self.settings.train_embeddings,
        )

    def _numbers(self, num_layers: int) -> Sequence[int]:
        """Of the layers that a network has."""
        self.shell("meta")  # refuses models in words
        if self.like is not None:
            return [self.like] * num_layers
        return range(self.first_layer, self.first_layer + num_layers)

    def batch_spec(self, batch: int) -> BatchSpec:
        """Shape and dtype of each tensor that `draw` gives."""
        return {
            "tokens": ((batch, self.data.length), torch.int64),
            "counts": ((batch, self.data.length), torch.bool),
            "share": ((batch,), torch.float32),
            **({"positions": ((batch, self.data.length), torch.int64)} if self.data.packed else {}),
        }

    def draw(
        self, tokens: np.ndarray, labels: np.ndarray | None, noise_range: NoiseRange, generator: torch.Generator
    ) -> Batch:
        """One training step's batch: tokens, which of them count (all, or the answers of conversations), what a
        sample's sum of losses is multiplied with, so that all tokens that count weigh the same, and where windows are
        packed each token's position in its text."""
        return self._batch(tokens, labels)

    def at_level(
        self, tokens: np.ndarray, labels: np.ndarray | None, level: Level, generator: torch.Generator
    ) -> Batch:
        """A batch for evaluation."""
        return self._batch(tokens, labels)

    def _batch(self, tokens: np.ndarray, counts: np.ndarray | None) -> Batch:
        packed: Batch = {}
        if self.data.packed:
            assert counts is not None
            packed, counts = {"positions": torch.from_numpy(counts[:, 1].copy())}, counts[:, 0] == 1
        counted = torch.ones(tokens.shape, dtype=torch.bool) if counts is None else torch.from_numpy(counts)
        counted[:, 0] = False  # nothing comes before it
        share = len(tokens) / counted.sum().clamp(min=1)
        shares = share.expand(len(tokens)).clone()
        return {"tokens": torch.from_numpy(tokens), "counts": counted, "share": shares, **packed}

    def evaluation_levels(self, partition: NoisePartition) -> tuple[Level, ...]:
        """One, as nothing is noised."""
        return (Level.at(_NOISE.sigma_max),)

    def with_iterations(self, batch: Batch, count: int) -> Batch:
        """The batch: layers are run once."""
        return batch

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Nothing noised, and the tokens."""
        return batch["tokens"].new_zeros(len(batch["tokens"]), 0), batch["tokens"]

    def enter(self, block: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Hidden values of the tokens, and as conditioning the positions of packed ones."""
        tokens, positions = batch["tokens"], batch.get("positions")
        hidden = self.shell(tokens.device.type).enter(tokens, positions, self.tables_of(block)[0])
        # With a gradient, without which the first layer would not be checkpointed.
        return hidden.requires_grad_(torch.is_grad_enabled()), as_condition(positions, hidden)

    def loss_after(self, block: nn.Module, hidden: Tensor, condition: Tensor, batch: Batch) -> Float[Tensor, " batch"]:
        """Cross-entropy of each window, in nats: the mean over a batch is that over all of its tokens that count."""
        losses, _ = self._losses(self._above(hidden, condition), batch, self.tables_of(block)[1])
        return losses.sum(1) * batch["share"]

    def loss(self, block: nn.Module, batch: Batch) -> Float[Tensor, " batch"]:
        """The same, from the tokens on."""
        return self.loss_after(block, *self._through(block, batch), batch)

    def scores(self, block: nn.Module, batch: Batch) -> dict[str, Float[Tensor, " batch"]]:
        """The mean loss of each window's tokens that count, and the share of them whose likeliest answer is right."""
        hidden = self._above(*self._through(block, batch))
        losses, right = self._losses(hidden, batch, self.tables_of(block)[1])
        counted = batch["counts"].sum(1).clamp(min=1)
        return {"loss": losses.sum(1) / counted, "accuracy": right.float().sum(1) / counted}

    def _through(self, block: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        assert isinstance(block, DecoderBlock)
        hidden, nothing = self.enter(block, batch)
        return run_layers(block.layers, hidden, nothing, checkpointing=block.checkpointing), nothing

    def _above(self, hidden: Tensor, condition: Tensor) -> Tensor:
        """What the final norm is given: what the trained layers give."""
        return hidden

    def _losses(self, hidden: Tensor, batch: Batch, readout: TrainedReadout | None = None) -> tuple[Tensor, Tensor]:
        """Of each token but the first, [batch, length - 1], 0 where it does not count; and whether the likeliest answer
        is right."""
        tokens = batch["tokens"]
        shell = self.shell(tokens.device.type)
        states, answers = hidden[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        counts = batch["counts"][:, 1:].flatten()
        size = max(1, LOGITS_BYTES // (4 * shell.head_table.shape[0]))
        if readout is None:
            losses, right = _ChunkedLoss.apply(states, answers, counts, shell, size)  # type: ignore[no-untyped-call]
        else:
            losses, right = TrainedLoss.apply(  # type: ignore[no-untyped-call]
                states, answers, counts, shell, readout, size
            )
        return losses.view(len(tokens), -1), right.view(len(tokens), -1)


class _ChunkedLoss(torch.autograd.Function):
    """Cross-entropy of answers without the logits of all: those of some rows exist at a time, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, answers: Tensor, counts: Tensor, shell: Shell, size: int
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[0]
        losses = torch.zeros(len(states), device=states.device)
        right = torch.zeros(len(states), dtype=torch.bool, device=states.device)
        gradient = torch.zeros_like(states) if wanted else None
        for rows in chunks(counts, size):
            with torch.set_grad_enabled(wanted):
                part = states[rows].detach().requires_grad_(wanted)
                logits = shell.leave(part.unsqueeze(0))[0]
            # With one buffer beside the logits: the largest share tells log sum exp, as it is 1 over the sum of
            # exp(logit - largest), and the shares become the loss' gradient, softmax - one-hot.
            given, wanted_ids = logits.detach(), answers[rows].unsqueeze(1)
            largest, likeliest = given.max(-1, keepdim=True)
            shares = given.softmax(-1)
            sums = largest - shares.gather(1, likeliest).log()
            losses[rows] = (sums - given.gather(1, wanted_ids)).squeeze(1)
            right[rows] = (likeliest == wanted_ids).squeeze(1)
            if gradient is not None:
                shares.scatter_add_(1, wanted_ids, torch.full_like(sums, -1.0))
                gradient[rows] = torch.autograd.grad(logits, part, shares)[0]
            del logits, given, shares, part
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(right)
        return losses, right

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].unsqueeze(1).to(gradient.dtype), None, None, None, None
