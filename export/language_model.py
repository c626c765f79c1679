"""An exported language model in onnxruntime: numpy and tokenizers, no torch and no transformers.

The folder is as onnxruntime-genai's builder writes it, so that whatever loads such folders loads it, and has our
manifest beside: what every file's content must be, and how close the graph was to torch.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from edgeblocks.data.tokenizer import PairTokenizer, check_readable, read_tokenizer
from edgeblocks.diffusion.next_token import Drawing, write
from edgeblocks.diffusion.token_choice import Tokens, Values, check_options
from edgeblocks.errors import ConfigError, DoesNotFitError, OutOfBudgetError, RunError
from edgeblocks.export.graph_file import files_named_in, problem_of_language_model
from edgeblocks.export.loaded_graphs import budget_of_a_run
from edgeblocks.export.manifest import FILE_NAME, kind_of, read_content, sha256_of, write_content
from edgeblocks.export.manifest_types import FileName
from edgeblocks.files.checked import Checked, ListOf, NotNegative, Sha256, Text
from edgeblocks.files.untrusted import MalformedFileError, shown
from edgeblocks.limits import MOST_HEADS, MOST_LAYERS, MOST_TOKENS, MOST_WIDTH
from edgeblocks.onnx_runtime import CODE_BYTES, PROCESSOR, Hardware, Session, onnxruntime, prepare
from edgeblocks.registry import build_target
from edgeblocks.units import advised_budget, format_bytes

KIND: Literal["edgeblocks language model"] = "edgeblocks language model"
GRAPH, TOKENIZER = "model.onnx", "tokenizer.json"
Weights = Literal["fp32", "int8", "int4"]
_PIECE = 64
"""Tokens of a prompt that go through the graph together: their logits are in memory."""
_AGAIN = "copy the directory again from where it was written, or export the run again"


class ExportedFile(Checked):
    """A file of the folder."""

    name: FileName
    sha256: Sha256
    bytes: Annotated[int, Field(ge=0, le=2**63)]


class VerifiedModel(Checked):
    """How close the graph was to torch when it was written.

    greedy_equal, greedy_tokens: of so many greedy tokens after a prompt so many were the same, up to the first that
        differed.
    loss_torch, loss_graph: nats a token on as many windows of the run's data; None where these were not there.
    """

    greedy_equal: Annotated[int, Field(ge=0)]
    greedy_tokens: Annotated[int, Field(ge=1)]
    loss_torch: NotNegative | None
    loss_graph: NotNegative | None
    windows: Annotated[int, Field(ge=0)]


class LanguageManifest(Checked):
    """What running the model needs besides its files.

    positions: tokens of the longest text.
    ends: tokens after which a text is finished.
    """

    kind: Literal["edgeblocks language model"] = KIND
    format_version: Literal[1] = 1
    edgeblocks: Text
    model_type: Text
    weights: Weights
    layers: Annotated[int, Field(ge=1, le=MOST_LAYERS)]
    heads: Annotated[int, Field(ge=1, le=MOST_HEADS)]
    head_width: Annotated[int, Field(ge=1, le=MOST_WIDTH)]
    vocabulary: Annotated[int, Field(ge=2, le=MOST_TOKENS)]
    positions: Annotated[int, Field(ge=2, le=2**31)]
    length: Annotated[int, Field(ge=2, le=2**31)]
    ends: ListOf[Annotated[int, Field(ge=0, le=MOST_TOKENS)]]
    files: ListOf[ExportedFile]
    verified: VerifiedModel | None = None

    def write(self, folder: Path) -> None:
        """Write manifest.json and wait until it is on the disk.

        Raises:
            OSError: the disk refused.
        """
        assert self.verified is not None, "only a verified export is finished"
        write_content(folder, self.model_dump(mode="json"))


def is_language_model(folder: Path) -> bool:
    """Whether a folder says that it is one; what it holds is looked at when it is opened."""
    return kind_of(folder) == KIND


class LanguageModel:
    """An exported language model. Not thread-safe."""

    def __init__(
        self, directory: Path, *, manifest: LanguageManifest | None = None, hardware: Hardware = PROCESSOR
    ) -> None:
        """
        Args:
            manifest: given only while the directory is being written; else it is read, and all files are compared
                with it.

        Raises:
            RunError: it is damaged, or takes weights from files that are not its own.
        """
        self.directory = directory
        self.manifest = _read(directory) if manifest is None else manifest
        self.tokenizer = _tokenizer(directory)
        self._hardware = hardware
        self._session: Session | None = None

    @contextlib.contextmanager
    def within(self, mem_budget: str | None, *, n: int) -> Iterator[None]:
        """Keep the process inside a memory budget while `n` texts are written; a graph may come from anywhere.

        Raises:
            ConfigError: not a size.
            DoesNotFitError: what the manifest describes cannot fit.
            OutOfBudgetError: memory was refused at the budget.
        """
        target = build_target("cpu")
        budget_bytes = budget_of_a_run(mem_budget)
        weights = sum(file.bytes for file in self.manifest.files if file.name.startswith(GRAPH))
        least = target.used_bytes() + weights + _PIECE * 4 * self.manifest.vocabulary * n
        if least > budget_bytes:
            raise DoesNotFitError(
                f"{self.directory} takes at least {format_bytes(least)} for {n} texts, {format_bytes(weights)} of it "
                f"weights; the budget is {format_bytes(budget_bytes)}. Ask for fewer with --n, give --mem-budget "
                f"{advised_budget(least)} or more, or export with --weights int4",
                least,
            )
        prepare()
        try:
            with target.capped(budget_bytes - CODE_BYTES):
                yield
        except MemoryError as error:
            raise OutOfBudgetError(
                f"memory was refused at the budget of {format_bytes(budget_bytes)}; ask for fewer with --n, for "
                f"shorter texts with --length, or give more with --mem-budget"
            ) from error

    def write(
        self,
        n: int,
        *,
        prompt: str | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        length: int | None = None,
        steps: int | None = None,
        fill: str | None = None,
        seed: int = 0,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Texts which begin with `prompt`; see `pretrained.writing.TextWriter.continued`.

        Args:
            steps, fill: refused; they belong to other kinds of networks.

        Raises:
            ConfigError: an impossible argument.
            RunError: a file is missing or damaged.
        """
        check_options("continuation", fill=fill, prompt=prompt, top_p=top_p)
        if steps is not None:
            raise ConfigError(f"--steps {steps}: a language model has no noise levels; leave it out")
        prompt = prompt or ""
        check_readable("--prompt", prompt, self.tokenizer)
        beginning = self.tokenizer.beginning
        given = self.tokenizer.encode(prompt if prompt.startswith(beginning) else beginning + prompt)
        wanted = max(self.manifest.length, len(given) + 1) if length is None else length
        told = None if on_token is None else (lambda texts: on_token(max(map(len, texts)), wanted - len(given)))
        drawing = self.drawing(length=wanted, temperature=temperature, top_p=top_p, seed=seed)
        found = self.written(given, drawing, n=n, on_tokens=told)
        return [prompt + self.tokenizer.decode(text) for text in found]

    def drawing(
        self, *, length: int, temperature: float | None = None, top_p: float | None = None, seed: int = 0
    ) -> Drawing:
        """How this model's tokens are chosen."""
        return Drawing(
            length=length,
            ends=frozenset(self.manifest.ends),
            vocabulary=min(self.tokenizer.vocabulary, self.manifest.vocabulary),
            temperature=1.0 if temperature is None else temperature,
            top_p=1.0 if top_p is None else top_p,
            seed=seed,
        )

    def written(
        self,
        given: Tokens,
        drawing: Drawing,
        *,
        n: int,
        on_tokens: Callable[[list[list[int]]], None] | None = None,
    ) -> list[list[int]]:
        """Tokens after those that are given."""
        drawing.check(given, n=n, positions=self.manifest.positions)

        def next_logits(tokens: Tokens, cache: "list[Values] | None") -> "tuple[Values, list[Values]]":
            logits, cache = self.logits(tokens, cache)
            return logits[:, -1], cache

        return write(next_logits, given, drawing, n=n, piece=_PIECE, on_tokens=on_tokens)

    def logits(self, tokens: Tokens, cache: "list[Values] | None") -> "tuple[Values, list[Values]]":
        """Logits [b, n, vocabulary] at tokens [b, n] behind those of a KV cache, and the cache with them.

        Raises:
            RunError: the graph cannot be run, or is of another model than the manifest describes.
        """
        manifest, (count, new) = self.manifest, tokens.shape
        if cache is None:
            empty = np.zeros((count, manifest.heads, 0, manifest.head_width), dtype=np.float32)
            cache = [empty] * (2 * manifest.layers)
        known = cache[0].shape[2] + new
        if count > 1 and known > new > 1:
            # onnxruntime's attention takes several new tokens behind a cache of one text alone.
            parts = [self.logits(tokens[[row]], [values[[row]] for values in cache]) for row in range(count)]
            together = [np.concatenate(some) for some in zip(*(part[1] for part in parts), strict=True)]
            return np.concatenate([part[0] for part in parts]), together
        feed: dict[str, NDArray[Any]] = {"input_ids": tokens, "attention_mask": np.ones((count, known), dtype=np.int64)}
        for number, values in enumerate(cache):
            feed[f"past_key_values.{number // 2}.{('key', 'value')[number % 2]}"] = values
        session = self._loaded()
        try:
            found = dict(zip(session.output_names, session.run(feed), strict=True))
        except MemoryError:
            raise
        except Exception as error:  # onnxruntime's errors have no common base
            raise RunError(
                f"onnxruntime cannot run {self.directory / GRAPH}: {str(error).strip()}; {_AGAIN}"
            ) from error
        present = [
            found.get(f"present.{layer}.{part}") for layer in range(manifest.layers) for part in ("key", "value")
        ]
        shape = (count, manifest.heads, known, manifest.head_width)
        logits = found.get("logits")
        kinds = [(values.dtype, values.shape) for values in (logits, *present) if isinstance(values, np.ndarray)]
        wanted = [((count, new, manifest.vocabulary)), *[shape] * len(present)]
        if kinds != [(np.dtype(np.float32), one) for one in wanted]:
            raise RunError(f"{self.directory / GRAPH} is of another model than its manifest describes; {_AGAIN}")
        assert logits is not None
        if not np.isfinite(logits[:, -1]).all():
            raise RunError(f"{self.directory / GRAPH} gives values that are no numbers; its training diverged")
        return logits, present  # type: ignore[return-value]  # arrays, as their shapes say

    def _loaded(self) -> Session:
        if self._session is None:
            try:
                self._session = Session(self.directory / GRAPH, self._hardware)
            except (MemoryError, ConfigError):
                raise
            except Exception as error:  # onnxruntime's errors have no common base
                version = onnxruntime().__version__
                raise RunError(
                    f"onnxruntime {version} cannot load {self.directory / GRAPH}: {str(error).strip()}; try a newer one"
                ) from error
        return self._session


def read_language_manifest(folder: Path) -> LanguageManifest:
    """The manifest of an exported language model; its files are not looked at.

    Raises:
        RunError: it is damaged.
    """
    path, manifest = folder / FILE_NAME, read_content(folder, LanguageManifest)
    if manifest.verified is None:
        raise RunError(f"{path} is damaged: verified is missing, so the export was never finished; {_AGAIN}")
    names = [file.name for file in manifest.files]
    if len(set(names)) < len(names) or not {GRAPH, TOKENIZER} <= set(names):
        raise RunError(f"{path} is damaged: it does not list {GRAPH} and {TOKENIZER} once each; {_AGAIN}")
    return manifest


def _read(folder: Path) -> LanguageManifest:
    """The manifest, after a look that the files are those that it names."""
    manifest = read_language_manifest(folder)
    names = [file.name for file in manifest.files]
    for file in manifest.files:
        try:
            is_same = (folder / file.name).stat().st_size == file.bytes and sha256_of(folder / file.name) == file.sha256
        except OSError as error:
            raise RunError(f"cannot read {folder / file.name}: {error.strerror}; {_AGAIN}") from error
        if not is_same:
            raise RunError(f"{folder / file.name} does not match its checksum; {_AGAIN}")
    try:
        foreign = sorted(files_named_in(folder / GRAPH) - set(names))
        problem = problem_of_language_model(folder / GRAPH)
    except (OSError, MalformedFileError) as error:
        raise RunError(f"{folder / GRAPH} is damaged: {error}; {_AGAIN}") from error
    if problem is not None:
        raise RunError(f"{folder / GRAPH} is refused: it {problem}; {_AGAIN}")
    if foreign:
        raise RunError(
            f"{folder / GRAPH} is refused: it takes weights from {shown(foreign[0])}, which is not among its files in "
            f"{FILE_NAME}; {_AGAIN}"
        )
    return manifest


def _tokenizer(folder: Path) -> PairTokenizer:
    return read_tokenizer(folder / TOKENIZER)
