"""Text that a pretrained model writes, token by token: by the library's own forward pass, with its KV cache.

The model's layers are given, so that they may come into memory one after the other; see `shell.Shell.continued`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from edgeblocks.data.chat_format import ChatFormat
from edgeblocks.data.tokenizer import PairTokenizer, check_readable, read_tokenizer
from edgeblocks.diffusion.next_token import Drawing, write
from edgeblocks.diffusion.token_choice import Tokens, Values
from edgeblocks.errors import ConfigError, DataError, DoesNotFitError
from edgeblocks.families.precision import computing_in
from edgeblocks.files.untrusted import MalformedFileError, open_regular, parse_json
from edgeblocks.methods import Frozen, Precision
from edgeblocks.pretrained.frozen_layers import FrozenLayer, frozen_layers
from edgeblocks.pretrained.gate import refusal
from edgeblocks.pretrained.model_folder import TOKENIZER, FileTable, ModelFolder, model_folder
from edgeblocks.pretrained.shell import UnsupportedModelError, shell_of
from edgeblocks.pretrained.trained_tables import TrainedReadout, TrainedTable
from edgeblocks.units import advised_budget, format_bytes

Layers = Sequence[Callable[..., Any]]
Messages = Sequence[Mapping[str, Any]]
ANSWER_TOKENS = 512
"""Of an answer where no number is asked for."""
WRITING_BYTES = 96_000_000
"""Of kernels' code and scratch memory, and of the head's slices: 75 MB were measured with SmolLM2-135M."""
USUAL_LENGTH = 512
"""Tokens of a text of a model that was not trained here."""
GENERATION = "generation_config.json"
_MOST_BYTES = 2**20
_CACHE_COPIES = 1.5
"""Keys and values of a layer are copied to become one token longer, and what was freed leaves gaps."""


def cache_bytes(folder: ModelFolder, length: int, *, num_layers: int, vocabulary: int) -> int:
    """Of the keys and values of a text of so many tokens, and of what its next token is chosen from."""
    heads = _config_number(folder, "num_attention_heads", "n_head") or 1
    width = _config_number(folder, "hidden_size", "n_embd") or 0
    groups = _config_number(folder, "num_key_value_heads") or heads
    per_head = _config_number(folder, "head_dim") or -(-width // heads)
    # Choosing: probabilities as float64, in an order, and with sums.
    return int(_CACHE_COPIES * 2 * num_layers * groups * per_head * length * 4) + 6 * 8 * vocabulary


def end_tokens(folder: ModelFolder) -> frozenset[int]:
    """What ends a text, as the folder says."""
    told: object = None
    try:
        with open_regular(folder.path / GENERATION) as file:
            found = parse_json(file.read(_MOST_BYTES).decode("utf-8", errors="replace"))
        told = found.get("eos_token_id") if isinstance(found, dict) else None
    except FileNotFoundError:
        pass
    except (OSError, MalformedFileError) as error:
        raise DataError(f"{folder.path / GENERATION} cannot be read ({error}); download it again") from error
    told = folder.config.get("eos_token_id") if told is None else told
    return frozenset(one for one in (told if isinstance(told, list) else [told]) if isinstance(one, int))


def _config_number(folder: ModelFolder, *names: str) -> int | None:
    """The first of these that the model's config has."""
    text = folder.config.get("text_config")
    for config in (folder.config, text if isinstance(text, dict) else {}):
        for name in names:
            if isinstance(config.get(name), int):
                return int(config[name])
    return None


class TextWriter:
    """A pretrained model that continues texts, and answers messages by the words of its chat template."""

    def __init__(
        self,
        model: str,
        layers: Layers,
        *,
        table: TrainedTable | None = None,
        readout: TrainedReadout | None = None,
        device: torch.device,
        usual_length: int,
        precision: Precision = "fp32",
    ) -> None:
        """
        Args:
            model: its folder.
            layers: called as the model calls its own; these, the table of tokens and what comes after the layers are as
                in `shell.Shell.continued`.
            usual_length: tokens of a text where none are asked for.
            precision: in which the model computes.

        Raises:
            ConfigError: the model or its tokenizer cannot be used.
        """
        self._folder, self._shell, self._layers = model_folder(model), shell_of(model, device.type), layers
        self._table, self._readout = table, readout
        self.tokenizer = tokenizer_of(self._folder)
        self._usual_length, self._precision = usual_length, precision

    def continued(
        self,
        prompt: str,
        *,
        n: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        length: int | None = None,
        seed: int = 0,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Texts that begin with a prompt.

        Args:
            length: tokens of a text, the prompt's counted.
            on_token: called with the tokens written, and how many there will be at the most.

        Raises:
            ConfigError: an impossible argument.
        """
        check_readable("--prompt", prompt, self.tokenizer)
        beginning = self.tokenizer.beginning
        given = self.tokenizer.encode(prompt if prompt.startswith(beginning) else beginning + prompt)
        wanted = length if length is not None else max(self._usual_length, len(given) + 1)
        drawing = self._drawing(temperature=temperature, top_p=top_p, length=wanted, seed=seed)
        most = drawing.length - len(given)
        told = None if on_token is None else (lambda texts: on_token(max(len(text) for text in texts), most))
        written = self._write(given, drawing, n, told)
        return [prompt + self.tokenizer.decode(text) for text in written]

    def answer(
        self,
        messages: Messages,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        most_tokens: int = ANSWER_TOKENS,
        seed: int = 0,
        on_text: Callable[[str], None] | None = None,
    ) -> str:
        """What the model answers to a conversation.

        Args:
            messages: each with `role` and `content`, the user's last.
            most_tokens: at which an answer is cut.
            on_text: called with each piece of the answer as it is written.

        Raises:
            ConfigError: an impossible argument, or the conversation has no room for an answer.
            DataError: the model has no chat template, or its template does not write these messages.
        """
        render = ChatFormat.of(self._folder.path).renderer()
        given = self.tokenizer.encode(render(messages, True))
        known = most_positions(self._folder)
        length = len(given) + most_tokens if known is None else min(len(given) + most_tokens, known)
        drawing = self._drawing(temperature=temperature, top_p=top_p, length=length, seed=seed)
        said = ""

        def tell(texts: list[list[int]]) -> None:
            nonlocal said
            text = self.tokenizer.decode(texts[0])
            if on_text is not None and text.startswith(said) and not text.endswith("\ufffd"):  # half of a character
                on_text(text[len(said) :])
                said = text

        (written,) = self._write(given, drawing, 1, tell)
        return self.tokenizer.decode(written)

    def _write(
        self, given: Tokens, drawing: Drawing, n: int, on_tokens: Callable[[list[list[int]]], None] | None
    ) -> list[list[int]]:
        drawing.check(given, n=n, positions=most_positions(self._folder))

        def next_logits(tokens: Tokens, cache: object | None) -> tuple[Values, object]:
            found = torch.from_numpy(tokens).to(self._shell.device)
            logits, cache = self._shell.continued(found, self._layers, cache, table=self._table, readout=self._readout)
            return logits.cpu().numpy(), cache

        with computing_in(self._precision, self._shell.device):
            return write(next_logits, given, drawing, n=n, piece=self._usual_length, on_tokens=on_tokens)

    def _drawing(self, *, temperature: float, top_p: float, length: int, seed: int) -> Drawing:
        return Drawing(
            length=length,
            ends=end_tokens(self._folder),
            vocabulary=self.tokenizer.vocabulary,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )


def tokenizer_of(folder: ModelFolder) -> PairTokenizer:
    """The tokenizer that a model's folder has.

    Raises:
        ConfigError: there is none, or it cannot be used.
    """
    return read_tokenizer(folder.path / TOKENIZER)


@contextmanager
def writer_of_folder(
    model: str, device: torch.device, *, length: int, budget_bytes: int, used_bytes: Callable[[], int]
) -> Iterator[TextWriter]:
    """A model as its folder has it, while this lasts.

    Args:
        length: tokens of the longest text.
        budget_bytes: of memory; what writing does not need keeps weights, which then need not be read for every token.
        used_bytes: of memory now.

    Raises:
        ConfigError: it is no model that can be run layer by layer.
        DoesNotFitError: there is no room to write.
    """
    folder = model_folder(model)
    if folder.is_plan_only:
        raise ConfigError(f"{model} has no .safetensors files, so there are no weights to write with")
    try:
        shell_of(model, device.type)
    except UnsupportedModelError as error:
        raise refusal(model, str(error)) from error
    numbers = range(len(shell_of(model, "meta").layers))
    frozen_layers(model, "none", device.type, None)  # in memory before there is a look at what is left
    vocabulary = tokenizer_of(folder).vocabulary
    needed_bytes = WRITING_BYTES + cache_bytes(folder, length, num_layers=len(numbers), vocabulary=vocabulary)
    held_bytes = used_bytes()
    if held_bytes + needed_bytes > budget_bytes:
        raise DoesNotFitError(
            f"the libraries, the tokenizer and a layer of {model} take {format_bytes(held_bytes)}, writing {length:,} "
            f"tokens {format_bytes(needed_bytes)} more, and the budget is {format_bytes(budget_bytes)}; use "
            f"--mem-budget {advised_budget(held_bytes + needed_bytes)} or more, or fewer tokens with --length",
            held_bytes + needed_bytes,
        )
    layers = [FrozenLayer(model, number, "none") for number in numbers]
    for layer in layers:
        layer.bind_(device)
    with held(model, "none", device, budget_bytes - held_bytes - needed_bytes):
        yield TextWriter(model, [layer.called for layer in layers], device=device, usual_length=length)


@contextmanager
def held(
    model: str, kind: Frozen | None, device: torch.device, room_bytes: int, *, with_head: bool = True
) -> Iterator[None]:
    """Where there is room, the head is kept in memory, and the layers, while this lasts; else they are read for every
    token.

    Args:
        kind: as what layers are read; None where they are elsewhere.
        with_head: whether the head is the files'.
    """
    table, frozen = shell_of(model, device.type).head_table if with_head else None, None
    if isinstance(table, FileTable) and table.num_bytes <= room_bytes:
        table.hold_()
        room_bytes -= table.num_bytes
    if kind is not None and frozen_layers(model, kind, device.type, None).all_bytes <= room_bytes:
        frozen = frozen_layers(model, kind, device.type, None)
        frozen.hold_all_()
    try:
        yield
    finally:
        if isinstance(table, FileTable):
            table.release_()
        if frozen is not None:
            frozen.hold_one_()


def most_positions(folder: ModelFolder) -> int | None:
    """Tokens of the longest text that a model knows; None where its config does not say."""
    return _config_number(folder, "max_position_embeddings", "n_positions")
