"""Conversations to fine-tune on: records of messages, or of a prompt and its completion (`chat_files`).

A record becomes one window: written by the model's own chat template, cut to the window's length or filled up. What is
trained on are the answers: the tokens of the assistant's messages, or of the completion. They are found by what the
template adds to the conversation before an answer (with the words that ask for one), so that templates without marks
of their own are enough; one that writes earlier messages anew is refused, because then no such difference exists.

Windows are written into a cache on the disk: rows.npy int32 [examples, length], where a token that counts is stored as
its complement and what fills up a window as PADDING, and checks.npy, a CRC-32 of each row. Where several conversations
share a window (`packing`), the first token of each is stored with BEGINS added.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeblocks.data.cache import CacheFiles, CacheKind, RowFile, open_or_build, read_meta
from edgeblocks.data.chat_files import parts_of, records
from edgeblocks.data.chat_format import ChatFormat, NotWrittenError
from edgeblocks.data.dataset import Progress, silent
from edgeblocks.data.file_identity import file_identity
from edgeblocks.data.order import BatchOrder
from edgeblocks.data.text import TextSet
from edgeblocks.data.tokenizer import PairTokenizer, read_tokenizer
from edgeblocks.errors import ConfigError, DataError, StorageError
from edgeblocks.files.untrusted import shown
from edgeblocks.progress import Marked

PADDING = 2**31 - 1
BEGINS = 2**30
ROLES = ("system", "user", "assistant", "tool")
KIND = CacheKind(name="cache of conversations", content="conversations", row="a row", remedy="give fewer", version=3)
_MOST_EXAMPLES = 2**32
ROWS_AT_ONCE = 64
_SHOWN_CHARACTERS = 400
_FULL = 0.5
_HALF_EMPTY = "windows are {full} full; --packing lets short conversations share them, so that a step sees more of them"
_EXAMPLE = "the first conversation, with what is trained on in"


@dataclass(frozen=True, kw_only=True, eq=False)
class ChatSet(TextSet):
    """Windows of a conversation each, or with `packed` of several; see `TextSet`. Indices count windows, those that are
    held out last."""

    rows: RowFile[np.int32] = field(repr=False)
    checks: RowFile[np.uint32] = field(repr=False)
    num_train: int
    num_examples: int
    answered: float
    """Share of the tokens that count."""
    example: Marked
    """The first conversation, its answers marked."""

    @property
    def has_held_out(self) -> bool:
        """Whether a part is kept for validation."""
        return self.num_train < self.num_examples

    @property
    def train_examples(self) -> int:
        """Windows of the training part."""
        return self.num_train

    def order(self, *, batch: int, seed: int, block: int) -> Any:
        """Each example once an epoch."""
        return BatchOrder(np.arange(self.num_train, dtype=np.int64), batch=batch, seed=seed, block=block)

    def gather(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], Any]:
        """Tokens int64 [b, length], and which of them count, bool [b, length]; what fills up a window is token 0.

        Of packed windows the second is int64 [b, 2, length]: which count, and a token's position in its conversation.

        Raises:
            StorageError: the cache has been damaged since it was opened.
        """
        rows = self.stored(indices)
        counts, padding = rows < 0, rows == PADDING
        begins = (rows >= BEGINS) & ~padding
        tokens = np.where(counts, ~rows, np.where(padding, 0, rows - BEGINS * begins)).astype(np.int64)
        if not self.packed:
            return tokens, counts
        places = np.broadcast_to(np.arange(self.length), rows.shape)
        positions = places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)
        return tokens, np.stack([counts.astype(np.int64), positions], axis=1)

    def stored(self, indices: NDArray[np.int64]) -> NDArray[np.int32]:
        """Rows as the cache has them.

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
        return rows

    def evaluation_indices(self, most: int) -> NDArray[np.int64]:
        """At most so many, spread evenly over the hold-out part, else over the training part."""
        begin, end = (self.num_train, self.num_examples) if self.has_held_out else (0, self.num_train)
        number = min(most, end - begin)
        return begin + np.arange(number, dtype=np.int64) * (end - begin) // max(1, number)

    def batch_resident_bytes(self, batch: int) -> int:
        """What a call of `gather` with `batch` indices adds to the resident memory, in bytes."""
        return batch * self.length * (8 + 8 + (3 * 8 if self.packed else 1))

    def describe(self) -> str:
        """The set in one line."""
        held_out = f" and {self.num_examples - self.num_train:,} hold-out" if self.has_held_out else ""
        return (
            f"{self.num_train:,} training{held_out} windows of {'conversations' if self.packed else 'a conversation'}, "
            f"{self.length:,} tokens each, of which {self.answered:.0%} are answers and are trained on"
        )


Spans = list[tuple[int, int]]
"""Where the answers of a text begin and end, in characters."""


def open_chat(
    source: str,
    *,
    tokenizer: str,
    length: int,
    hold_out: float,
    cache_dir: Path,
    progress: Progress | None = None,
) -> ChatSet:
    """The conversations of a .jsonl or .parquet file, or of a folder with a training part and one that is held out.

    tokenizer: path of the tokenizer.json in the model's folder, where its chat template is as well.
    length: tokens of a window; longer conversations are cut at their end.
    hold_out: share of a single file, its end, in the hold-out part.

    Raises:
        ConfigError: the tokenizer cannot be used.
        DataError: a record is none, or no record has an answer; the tokenizer does not know what ends a text.
        StorageError: the cache cannot be written or read.
    """
    pairs = read_tokenizer(Path(tokenizer).expanduser())
    if not isinstance(pairs, PairTokenizer):
        raise ConfigError(f"tokenizer is {tokenizer}; conversations need the tokenizer.json of the model's folder")
    how = ChatFormat.of(Path(tokenizer).expanduser().parent)
    _check_end(how, pairs, tokenizer)
    parts = parts_of(source)
    identity = [[[str(path.resolve()), file_identity(path.stat())] for path in part] for part in parts]
    decides = [KIND.version, identity, pairs.to_json(), vars(how), length, hold_out if len(parts) == 1 else 0]
    key = hashlib.sha256(f"chat {json.dumps(decides)}".encode()).hexdigest()

    def build(files: CacheFiles) -> None:
        _fill(files, _Writer(pairs, how, length), parts, hold_out, progress or silent)

    return open_or_build(
        KIND, cache_dir, key, build=build, read=lambda folder: read_chat(folder, source, pairs, length)
    )


def _check_end(how: ChatFormat, tokenizer: PairTokenizer, path: str) -> None:
    """A text's end is one token, which an answer ends with: in pieces, it would be learned as words."""
    pieces = len(tokenizer.encode(how.end)) if how.end else 1
    if pieces != 1:
        raise DataError(
            f"tokenizer_config.json beside {path} ends a text with {shown(how.end)}, of which this tokenizer makes "
            f"{pieces} tokens, and one is meant: the two files are of different models; download both again"
        )


class _Writer:
    """Turns records into rows, and counts."""

    def __init__(self, tokenizer: PairTokenizer, how: ChatFormat, length: int) -> None:
        self._tokenizer, self._how, self._length = tokenizer, how, length
        self._render: Callable[[Sequence[Mapping[str, Any]], bool], str] | None = None
        self.cut = self.without_answer = 0
        self.example: list[tuple[str, bool]] = []
        """The first conversation in pieces, and whether each is an answer."""

    def row(self, record: object) -> tuple[NDArray[np.int32], int, int] | None:
        """A row, its tokens, and how many of them count; None where no answer lies in the window.

        Raises:
            NotWrittenError: the record is no conversation.
        """
        text, spans = self._text_of(record)
        ids, offsets = self._tokenizer.encode_with_offsets(text)
        begins, ends = offsets[:, 0], offsets[:, 1]
        counts = np.zeros(len(ids), dtype=bool)
        for begin, end in spans:
            counts |= (begins >= begin) & (ends <= end) & (ends > begins)
        if not self.example and counts.any():
            self.example = _pieces(text, spans)
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
            raise NotWrittenError("it is no object")
        if record.get("messages") is not None:
            return self._written(_messages(record["messages"], "messages"))
        if record.get("prompt") is None or record.get("completion") is None:
            raise NotWrittenError(f"it has neither `messages` nor `prompt` and `completion`{_renaming(record)}")
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
            raise NotWrittenError("no message of it is of the role assistant, so there is nothing to learn")
        return text, spans


def _renaming(record: Mapping[str, Any]) -> str:
    """How conversations that are written otherwise become such records."""
    if "conversations" not in record:
        return ""
    roles = '{human: "user", gpt: "assistant"}[.from] // .from'
    each = f"{{role: (.role // ({roles})), content: (.content // .value)}}"
    command = f"jq -c '{{messages: [.conversations[] | {each}]}}'"
    return f", but `conversations`; in lines of JSON this writes them anew: {command}"


def _messages(found: object, name: str) -> list[dict[str, Any]]:
    if not isinstance(found, list) or not found:
        raise NotWrittenError(f"`{name}` is no list of messages")
    for number, message in enumerate(found, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise NotWrittenError(f"message {number} of `{name}` has no `content` that is a text")
        if message.get("role") not in ROLES:
            role = shown(message.get("role"))
            raise NotWrittenError(f"message {number} of `{name}` is of the role {role}; there are {', '.join(ROLES)}")
    return found


def _pieces(text: str, spans: Spans) -> list[tuple[str, bool]]:
    """A text's beginning in pieces, and whether each is an answer."""
    found, done, left = [], 0, _SHOWN_CHARACTERS
    for begin, end in [*spans, (len(text), len(text))]:
        for piece, is_answer in ((text[done:begin], False), (text[begin:end], True)):
            if piece and left > 0:
                found.append((piece if len(piece) <= left else f"{piece[:left]} ..", is_answer))
                left -= len(piece)
        done = end
    return found


class RowWriter:
    """Writes rows into a cache's files, some at a time."""

    def __init__(self, files: CacheFiles, length: int) -> None:
        files.begin({"rows.npy": (np.dtype(np.int32), (length,)), "checks.npy": (np.dtype(np.uint32), ())}, 2**16)
        self._files, self._digest = files, hashlib.sha256()
        self._waiting: list[NDArray[np.int32]] = []
        self.count = 0

    def add(self, row: NDArray[np.int32]) -> None:
        """One more."""
        self.count += 1
        self._digest.update(row.astype("<i4").data)
        self._waiting.append(row)
        if len(self._waiting) == ROWS_AT_ONCE:
            self._write()

    def finish(self) -> str:
        """Write what waits; sha256 of all rows, in hexadecimal."""
        self._write()
        return self._digest.hexdigest()

    def _write(self) -> None:
        if self._waiting:
            self._files.append("rows.npy", np.stack(self._waiting))
            checks = [zlib.crc32(row.data) for row in self._waiting]
            self._files.append("checks.npy", np.array(checks, dtype=np.uint32))
            self._waiting = []


def _fill(files: CacheFiles, writer: _Writer, parts: Sequence[Sequence[Path]], hold_out: float, told: Progress) -> None:
    rows = RowWriter(files, writer._length)
    counts: list[int] = []
    tokens = counted = 0
    sizes, done = [path.stat().st_size for part in parts for path in part], 0.0
    for part in parts:
        for path in part:
            for number, record in enumerate(records(path)):
                try:
                    made = writer.row(record.content)
                except NotWrittenError as error:
                    raise DataError(f"{record.place}: {error}; mend or remove the record") from error
                if made is not None:
                    row, size, answers = made
                    tokens, counted = tokens + size, counted + answers
                    rows.add(row)
                if number % ROWS_AT_ONCE == ROWS_AT_ONCE - 1:
                    reached = done + record.reached * path.stat().st_size
                    told(min(int(reached), sum(sizes)), sum(sizes), "reading conversations")
            done += path.stat().st_size
        counts.append(rows.count - sum(counts))
    fingerprint = rows.finish()
    num_examples = sum(counts)
    num_train = counts[0] if len(counts) == 2 else num_examples - round(hold_out * num_examples)
    if min(num_train, num_examples - num_train if hold_out else num_train) < 1:
        raise DataError(
            f"{parts[0][0]}: {num_examples} conversations have an answer inside a window of {writer._length} tokens, "
            f"and each part needs one; give more of them, or a larger --length"
        )
    files.finish(
        {
            "fingerprint": fingerprint,
            "num_train": num_train,
            "num_examples": num_examples,
            "tokens": tokens,
            "counted": counted,
            "told": _told(num_examples, tokens, counted, writer),
            "example": writer.example,
            "packed": False,
        }
    )


def _told(num_examples: int, tokens: int, counted: int, writer: _Writer) -> str:
    """What was read, in a line."""
    told = f"{num_examples:,} conversations of {tokens:,} tokens, {counted:,} of them in answers"
    if writer.cut:
        told += f"; {writer.cut:,} cut at {writer._length:,} tokens"
    if writer.without_answer:
        told += f"; left out: {writer.without_answer:,} without an answer inside a window"
    return told


def read_chat(folder: Path, source: str, tokenizer: PairTokenizer, length: int) -> ChatSet:
    """The cache in `folder`; raises what `open_or_build` takes for a damaged one."""
    meta = read_meta(folder, KIND.version)
    rows = RowFile(folder / "rows.npy", np.int32, row=KIND.row, most_rows=_MOST_EXAMPLES)
    checks = RowFile(folder / "checks.npy", np.uint32, row=KIND.row, most_rows=_MOST_EXAMPLES)
    num_examples = int(meta["num_examples"])
    if rows.shape != (num_examples, length) or checks.shape != (num_examples,):
        raise ValueError("another number of rows")
    full = meta["tokens"] / (num_examples * length)
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
        reading=str(meta["told"]),
        warnings=() if full > _FULL or meta["packed"] else (_HALF_EMPTY.format(full=f"{full:.0%}"),),
        rows=rows,
        checks=checks,
        num_train=int(meta["num_train"]),
        num_examples=num_examples,
        answered=meta["counted"] / max(1, meta["tokens"]),
        packed=bool(meta["packed"]),
        example=Marked(_EXAMPLE, [(str(piece), bool(is_answer)) for piece, is_answer in meta["example"]]),
    )
