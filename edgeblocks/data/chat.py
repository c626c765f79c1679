"""Conversations to fine-tune on: records of messages, or of a prompt and its completion, out of .jsonl files.

A record becomes one window: written by the model's own chat template, cut to the window's length or filled up. What is
trained on are the answers: the tokens of the assistant's messages, or of the completion. They are found by what the
template adds to the conversation before an answer (with the words that ask for one), so that templates without marks
of their own are enough; one that writes earlier messages anew is refused, because then no such difference exists.

Windows are written into a cache on the disk: rows.npy int32 [examples, length], where a token that counts is stored as
its complement and what fills up a window as PADDING, and checks.npy, a CRC-32 of each row.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from edgeblocks.data.cache import CacheFiles, CacheKind, RowFile, open_or_build, read_meta
from edgeblocks.data.dataset import Progress, silent
from edgeblocks.data.file_identity import file_identity
from edgeblocks.data.order import BatchOrder
from edgeblocks.data.text import TextSet
from edgeblocks.data.tokenizer import PairTokenizer, read_tokenizer
from edgeblocks.errors import ConfigError, DataError, StorageError
from edgeblocks.files.untrusted import MalformedFileError, open_regular, parse_json, read_text, shown

PADDING = 2**31 - 1
ROLES = ("system", "user", "assistant", "tool")
_KIND = CacheKind(name="cache of conversations", content="conversations", row="a row", remedy="give fewer", version=2)
_MOST_LINE_BYTES = 2**26
_MOST_TEMPLATE_BYTES = 2**22
_MOST_EXAMPLES = 2**32
_ROWS_AT_ONCE = 64
_SHOWN_CHARACTERS = 400
_TRAIN, _OTHERS = ("train.jsonl",), ("valid.jsonl", "validation.jsonl", "test.jsonl")


@dataclass(frozen=True, kw_only=True, eq=False)
class ChatSet(TextSet):
    """Windows of a conversation each; see `TextSet`. Indices count examples, those that are held out last."""

    rows: RowFile[np.int32] = field(repr=False)
    checks: RowFile[np.uint32] = field(repr=False)
    num_train: int
    num_examples: int
    answered: float
    """Share of the training part's tokens that count."""

    @property
    def has_held_out(self) -> bool:
        """Whether a part is kept for validation."""
        return self.num_train < self.num_examples

    @property
    def train_examples(self) -> int:
        """Conversations of the training part."""
        return self.num_train

    def order(self, *, batch: int, seed: int, block: int) -> Any:
        """Each example once an epoch."""
        return BatchOrder(np.arange(self.num_train, dtype=np.int64), batch=batch, seed=seed, block=block)

    def gather(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], Any]:
        """Tokens int64 [b, length], and which of them count, bool [b, length]; what fills up a window is token 0.

        Raises:
            StorageError: the cache has been damaged since it was opened.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        rows, checks = self.rows.read(wanted), self.checks.read(wanted)
        for row, check in zip(rows, checks, strict=True):
            if zlib.crc32(row.data) != check:
                raise StorageError(
                    f"{self.rows.path} is damaged; check the disk, delete {self.rows.path.parent}, and start again"
                )
        counts = rows < 0
        tokens = np.where(counts, ~rows, np.where(rows == PADDING, 0, rows))
        return tokens.astype(np.int64), counts

    def evaluation_indices(self, most: int) -> NDArray[np.int64]:
        """At most so many, spread evenly over the hold-out part, else over the training part."""
        begin, end = (self.num_train, self.num_examples) if self.has_held_out else (0, self.num_train)
        number = min(most, end - begin)
        return begin + np.arange(number, dtype=np.int64) * (end - begin) // max(1, number)

    def batch_resident_bytes(self, batch: int) -> int:
        """What a call of `gather` with `batch` indices adds to the resident memory, in bytes."""
        return batch * self.length * (8 + 8 + 1)

    def describe(self) -> str:
        """The set in one line."""
        held_out = f" and {self.num_examples - self.num_train:,} hold-out" if self.has_held_out else ""
        return (
            f"{self.num_train:,} training{held_out} conversations in windows of {self.length:,} tokens, of which "
            f"{self.answered:.0%} are answers and are trained on"
        )


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """How a model's folder writes conversations."""

    template: str | None
    beginning: str
    end: str
    """The texts of its tokens for the beginning and the end of a text, empty where it has none."""

    @classmethod
    def of(cls, folder: Path) -> "ChatFormat":
        """From chat_template.jinja, or tokenizer_config.json.

        Raises:
            DataError: a file cannot be read.
        """
        config: dict[str, Any] = {}
        try:
            if (folder / "tokenizer_config.json").exists():
                told = parse_json(read_text(folder / "tokenizer_config.json", most_bytes=_MOST_TEMPLATE_BYTES))
                config = told if isinstance(told, dict) else {}
            template = config.get("chat_template")
            if (folder / "chat_template.jinja").exists():
                template = read_text(folder / "chat_template.jinja", most_bytes=_MOST_TEMPLATE_BYTES)
        except (OSError, MalformedFileError) as error:
            raise DataError(f"{folder}: its chat template cannot be read ({error}); download it again") from error
        if isinstance(template, list):  # several by name
            named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
            template = named.get("default")
        return cls(
            template=template if isinstance(template, str) else None,
            beginning=_token_text(config.get("bos_token")),
            end=_token_text(config.get("eos_token")),
        )

    def renderer(self) -> Callable[[Sequence[Mapping[str, Any]], bool], str]:
        """Writes messages as a text; the flag adds the words that ask for an answer.

        The template comes with the model and may do nothing but write: jinja's sandbox runs it.
        """
        if self.template is None:
            raise DataError(
                "the model has no chat template, which says how messages are written; take its -Instruct or -chat "
                "version, or give records of prompt and completion as texts"
            )
        from jinja2.exceptions import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> NoReturn:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False)
        environment.globals["raise_exception"] = refuse
        try:
            template = environment.from_string(self.template)
        except TemplateError as error:
            raise DataError(f"the model's chat template is no template ({error}); download it again") from error

        def render(messages: Sequence[Mapping[str, Any]], ask: bool) -> str:
            try:
                return template.render(
                    messages=list(messages),
                    add_generation_prompt=ask,
                    bos_token=self.beginning,
                    eos_token=self.end,
                )
            except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
                raise _NotWrittenError(f"the model's chat template does not write it ({str(error)[:200]})") from error

        return render


class _NotWrittenError(Exception):
    """A record has no text, or no answer in it; the message says why."""


Spans = list[tuple[int, int]]
"""Where the answers of a text begin and end, in characters."""


def is_chat(source: str) -> bool:
    """Whether the records of a file, or of a folder's train.jsonl, are conversations, by the first of them."""
    path = Path(source).expanduser()
    path = path / _TRAIN[0] if path.is_dir() else path
    if path.suffix.lower() not in (".jsonl", ".json") or not path.is_file():
        return False
    try:
        _, _, first = next(iter(_records(path)), (0, 0, None))
    except DataError:
        return False
    return isinstance(first, dict) and ("messages" in first or {"prompt", "completion"} <= first.keys())


def open_chat(
    source: str,
    *,
    tokenizer: str,
    length: int,
    hold_out: float,
    cache_dir: Path,
    progress: Progress | None = None,
) -> ChatSet:
    """The conversations of a .jsonl file, or of a folder with train.jsonl and, held out, valid.jsonl or test.jsonl.

    tokenizer: path of the tokenizer.json in the model's folder, where its chat template is as well.
    length: tokens of a window; longer conversations are cut at their end.
    hold_out: share of a single file, its end, in the hold-out part.

    Raises:
        ConfigError: the tokenizer cannot be used.
        DataError: a record is none, or no record has an answer.
        StorageError: the cache cannot be written or read.
    """
    pairs = read_tokenizer(Path(tokenizer).expanduser())
    if not isinstance(pairs, PairTokenizer):
        raise ConfigError(f"tokenizer is {tokenizer}; conversations need the tokenizer.json of the model's folder")
    how = ChatFormat.of(Path(tokenizer).expanduser().parent)
    parts = _parts(Path(source).expanduser())
    identity = [[str(path.resolve()), file_identity(path.stat())] for path in parts]
    decides = [_KIND.version, identity, pairs.to_json(), vars(how), length, hold_out if len(parts) == 1 else 0]
    key = hashlib.sha256(f"chat {json.dumps(decides)}".encode()).hexdigest()

    def build(files: CacheFiles) -> None:
        _fill(files, _Writer(pairs, how, length), parts, hold_out, progress or silent)

    return open_or_build(_KIND, cache_dir, key, build=build, read=lambda folder: _read(folder, source, pairs, length))


class _Writer:
    """Turns records into rows, and counts."""

    def __init__(self, tokenizer: PairTokenizer, how: ChatFormat, length: int) -> None:
        self._tokenizer, self._how, self._length = tokenizer, how, length
        self._render: Callable[[Sequence[Mapping[str, Any]], bool], str] | None = None
        self.cut = self.without_answer = 0
        self.example: str | None = None
        """The first conversation, its answers in [[ ]]."""

    def row(self, record: object) -> tuple[NDArray[np.int32], int, int] | None:
        """A row, its tokens, and how many of them count; None where no answer lies in the window.

        Raises:
            _NotWrittenError: the record is no conversation.
        """
        text, spans = self._text_of(record)
        ids, offsets = self._tokenizer.encode_with_offsets(text)
        begins, ends = offsets[:, 0], offsets[:, 1]
        counts = np.zeros(len(ids), dtype=bool)
        for begin, end in spans:
            counts |= (begins >= begin) & (ends <= end) & (ends > begins)
        if self.example is None and counts.any():
            self.example = _marked(text, spans)
        self.cut += len(ids) > self._length
        ids, counts = ids[: self._length], counts[: self._length]
        counts[:1] = False  # nothing comes before it
        if not counts.any():
            self.without_answer += 1
            return None
        row = np.full(self._length, PADDING, dtype=np.int32)
        row[: len(ids)] = np.where(counts, ~ids, ids)
        return row, len(ids), int(counts.sum())

    def _text_of(self, record: object) -> tuple[str, Spans]:
        if not isinstance(record, dict):
            raise _NotWrittenError("it is no object")
        if "messages" in record:
            return self._written(_messages(record["messages"], "messages"))
        if not {"prompt", "completion"} <= record.keys():
            raise _NotWrittenError("it has neither `messages` nor `prompt` and `completion`")
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            beginning = self._tokenizer.beginning
            text = prompt if prompt.startswith(beginning) else beginning + prompt
            return text + completion + self._how.end, [(len(text), len(text) + len(completion) + len(self._how.end))]
        return self._written([*_messages(prompt, "prompt"), *_messages(completion, "completion")], answers=1)

    def _written(self, messages: list[dict[str, Any]], answers: int | None = None) -> tuple[str, Spans]:
        """A conversation as the template writes it; with `answers` only so many last messages count."""
        self._render = self._render or self._how.renderer()
        text, spans = self._render(messages, False), []
        first = 0 if answers is None else len(messages) - answers
        for number, message in enumerate(messages):
            if message["role"] != "assistant" or number < first:
                continue
            before, after = self._render(messages[:number], True), self._render(messages[: number + 1], False)
            if not (text.startswith(before) and text.startswith(after) and len(after) > len(before)):
                raise DataError(
                    f"the model's chat template writes message {number + 1} otherwise when others follow it, so that "
                    f"it cannot be told which tokens are answers; give one answer a record, as prompt and completion"
                )
            spans.append((len(before), len(after)))
        if not spans:
            raise _NotWrittenError("no message of it is of the role assistant, so there is nothing to learn")
        return text, spans


def _messages(found: object, name: str) -> list[dict[str, Any]]:
    if not isinstance(found, list) or not found:
        raise _NotWrittenError(f"`{name}` is no list of messages")
    for number, message in enumerate(found, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise _NotWrittenError(f"message {number} of `{name}` has no `content` that is a text")
        if message.get("role") not in ROLES:
            role = shown(message.get("role"))
            raise _NotWrittenError(f"message {number} of `{name}` is of the role {role}; there are {', '.join(ROLES)}")
    return found


def _marked(text: str, spans: Spans) -> str:
    """A conversation with its answers in [[ ]], shortened."""
    pieces, done = [], 0
    for begin, end in spans:
        pieces += [text[done:begin], "[[", text[begin:end], "]]"]
        done = end
    whole = "".join([*pieces, text[done:]])
    return whole if len(whole) <= _SHOWN_CHARACTERS else f"{whole[:_SHOWN_CHARACTERS]} .."


def _parts(path: Path) -> list[Path]:
    """The file of the training part and, of a folder, that of the hold-out part."""
    if not path.is_dir():
        return [path]
    held_out = next((path / name for name in _OTHERS if (path / name).is_file()), None)
    return [path / _TRAIN[0], *([held_out] if held_out else [])]


def _records(path: Path) -> Iterator[tuple[int, int, object]]:
    """Of each line that is not empty its number, the byte after it, and its content.

    Raises:
        DataError: a line is no JSON.
    """
    with open_regular(path) as file:
        number = position = 0
        while line := file.readline(_MOST_LINE_BYTES + 1):
            number, position = number + 1, position + len(line)
            if len(line) > _MOST_LINE_BYTES:
                raise DataError(f"{path}, line {number} has more than {_MOST_LINE_BYTES} bytes; cut the record")
            if not line.strip():
                continue
            try:
                yield number, position, parse_json(line.decode("utf-8").removeprefix("\ufeff"), finite=False)
            except (MalformedFileError, UnicodeDecodeError) as error:
                raise DataError(
                    f"{path}, line {number} is not read: {error}; every line is one object, such as "
                    f'{{"messages": [{{"role": "user", "content": ".."}}, {{"role": "assistant", "content": ".."}}]}}'
                ) from error


def _fill(files: CacheFiles, writer: _Writer, parts: Sequence[Path], hold_out: float, progress: Progress) -> None:
    files.begin({"rows.npy": (np.dtype(np.int32), (writer._length,)), "checks.npy": (np.dtype(np.uint32), ())}, 2**16)
    digest, waiting, counts = hashlib.sha256(), [], []
    tokens, counted = [0, 0], [0, 0]
    sizes = [path.stat().st_size for path in parts]
    for part, path in enumerate(parts):
        count = 0
        for number, position, record in _records(path):
            try:
                made = writer.row(record)
            except _NotWrittenError as error:
                raise DataError(f"{path}, line {number}: {error}; mend or remove the record") from error
            if made is None:
                continue
            row, size, answers = made
            count += 1
            tokens[part], counted[part] = tokens[part] + size, counted[part] + answers
            digest.update(row.astype("<i4").data)
            waiting.append(row)
            if len(waiting) == _ROWS_AT_ONCE:
                _append(files, waiting)
                waiting = []
                progress(sum(sizes[:part]) + position, sum(sizes), "reading conversations")
        counts.append(count)
    _append(files, waiting)
    num_examples = sum(counts)
    num_train = counts[0] if len(counts) == 2 else num_examples - round(hold_out * num_examples)
    if min(num_train, num_examples - num_train if hold_out else num_train) < 1:
        raise DataError(
            f"{parts[0]}: {num_examples} conversations have an answer inside a window of {writer._length} tokens, and "
            f"each part needs one; give more of them, or a larger --length"
        )
    files.finish(
        {
            "fingerprint": digest.hexdigest(),
            "num_train": num_train,
            "num_examples": num_examples,
            "tokens": sum(tokens),
            "counted": sum(counted),
            "cut": writer.cut,
            "without_answer": writer.without_answer,
            "example": writer.example,
        }
    )


def _append(files: CacheFiles, rows: Sequence[NDArray[np.int32]]) -> None:
    if rows:
        files.append("rows.npy", np.stack(rows))
        files.append("checks.npy", np.array([zlib.crc32(row.data) for row in rows], dtype=np.uint32))


def _read(folder: Path, source: str, tokenizer: PairTokenizer, length: int) -> ChatSet:
    """The cache in `folder`; raises what `open_or_build` takes for a damaged one."""
    meta = read_meta(folder, _KIND.version)
    rows = RowFile(folder / "rows.npy", np.int32, row=_KIND.row, most_rows=_MOST_EXAMPLES)
    checks = RowFile(folder / "checks.npy", np.uint32, row=_KIND.row, most_rows=_MOST_EXAMPLES)
    num_examples = int(meta["num_examples"])
    if rows.shape != (num_examples, length) or checks.shape != (num_examples,):
        raise ValueError("another number of rows")
    told = f"{num_examples:,} conversations of {meta['tokens']:,} tokens, {meta['counted']:,} of them in answers"
    if meta["cut"]:
        told += f"; {meta['cut']:,} cut at {length:,} tokens"
    if meta["without_answer"]:
        told += f"; left out: {meta['without_answer']:,} without an answer inside a window"
    return ChatSet(
        source=source,
        fingerprint=str(meta["fingerprint"]),
        tokenizer=tokenizer,
        num_tokens=int(meta["tokens"]),
        train_tokens=int(meta["tokens"]),
        length=length,
        characters_per_token=1.0,
        bytes_per_token=1.0,
        resident_bytes=0,
        token_file=None,  # type: ignore[arg-type]  # rows are read instead
        reading=f"{told}. Answers in [[ ]], as the first: {json.dumps(meta['example'], ensure_ascii=False)}",
        rows=rows,
        checks=checks,
        num_train=int(meta["num_train"]),
        num_examples=num_examples,
        answered=meta["counted"] / max(1, meta["tokens"]),
    )


def _token_text(told: object) -> str:
    if isinstance(told, dict):
        told = told.get("content")
    return told if isinstance(told, str) else ""
