"""The data that a run's settings name, opened inside its budget."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgeblocks.data.cache import cache_folder, cache_note
from edgeblocks.data.chat import ChatSet, open_chat
from edgeblocks.data.chat_files import is_chat
from edgeblocks.data.dataset import DataSet, Progress
from edgeblocks.data.images import open_images
from edgeblocks.data.packing import packed_chat
from edgeblocks.data.python_data import store_images, store_texts
from edgeblocks.data.text import open_text
from edgeblocks.data.tokenise import tokenise_in_child
from edgeblocks.data.tokenizer import build_tokenizer, read_tokenizer
from edgeblocks.errors import ConfigError, DoesNotFitError, NoRoomToReadError
from edgeblocks.offload.device import Target
from edgeblocks.pretrained.autoencoder import library as diffusers
from edgeblocks.profiling.budgets import TOGETHER_ABOVE_BYTES, budget_of_this_process, room_beside, with_budgets
from edgeblocks.progress import Listener
from edgeblocks.registry import build_target, family_type
from edgeblocks.runs.latents import latents_of
from edgeblocks.settings.fields import TOKENIZERS, RunSettings, Settings
from edgeblocks.units import PROCESSES_DIFFER_BYTES, advised_budget, format_bytes, who_holds

PAIRS_LIBRARY_BYTES, BYTES_PER_PAIR = 25_000_000, 800
"""Measured: 23 MB for the library, and 35 MB with 50,000 tokens."""
DECODING_SLACK_BYTES = 12_000_000
"""Beside a picture: pieces of it on their way to the cache, code of Pillow's decoders."""


def data_of(
    run: RunSettings, progress: Progress, *, room_bytes: int | None = None, budget_bytes: int | None = None
) -> DataSet:
    """The data that a run's settings name; see `open_images` and `open_text`.

    Args:
        room_bytes: memory that reading may take in this process; None does not bound it.
        budget_bytes: that of a process that reads beside it, as text is.

    Raises:
        ConfigError: settings of images for a family that reads text, or the other way round.
    """
    reads = family_type(run.family).reads
    check_data_settings(run, reads)
    is_pretrained: bool = family_type(run.family).only_exact
    if is_pretrained and reads == "text" and is_chat(run.data):
        where: dict[str, Any] = {"hold_out": run.hold_out, "cache_dir": cache_folder(), "progress": progress}
        chats = open_chat(run.data, tokenizer=run.tokenizer, length=run.length, **where)
        return packed_chat(chats, cache_dir=cache_folder()) if run.packing else chats
    if run.packing:
        raise ConfigError(
            f"packing lets short conversations share a window, and {run.data} are none that {run.family} is trained "
            f"on: windows of text are full; leave packing out"
        )
    if reads == "text":
        asked: dict[str, Any] = {
            "tokenizer": run.tokenizer,
            "vocabulary": run.vocab,
            "length": run.length,
            "hold_out": run.hold_out,
            "text_key": run.text_key,
        }
        request = {"source": run.data, "cache_dir": str(cache_folder()), "budget_bytes": budget_bytes, **asked}
        return open_text(
            run.data,
            **asked,
            cache_dir=cache_folder(),
            progress=progress,
            room_bytes=room_bytes,
            elsewhere=lambda: tokenise_in_child(request, progress),
        )
    images = open_images(
        run.data,
        image_size=run.image_size,
        hold_out=run.hold_out,
        seed=run.seed,
        cache_dir=cache_folder(),
        progress=progress,
        room_bytes=room_bytes,
    )
    return images if run.vae is None else latents_of(images, run, progress=progress, room_bytes=room_bytes)


def check_data_settings(run: RunSettings, reads: str) -> None:
    """That a family is given settings of the kind of data that it reads.

    Raises:
        ConfigError: with all that are of the other kind.
    """
    others = {"images": ("tokenizer", "vocab", "length", "text_key", "packing"), "text": ("image_size", "vae")}[reads]
    usual = RunSettings()
    problems = [
        f"{name}={getattr(run, name)}: {run.family} reads {reads}, and {name} is for families that do not; leave it out"
        for name in others
        if getattr(run, name) != getattr(usual, name)
    ]
    if problems:
        raise ConfigError(*problems)


def vocabulary_of(run: RunSettings) -> int:
    """Different tokens that a text will have, before it is read: of byte pairs that are learned, the most.

    Raises:
        DataError: the tokenizer's file cannot be used.
    """
    if run.tokenizer == "bpe":
        return run.vocab
    if run.tokenizer in TOKENIZERS:
        return build_tokenizer(run.tokenizer, None).vocabulary
    return read_tokenizer(Path(run.tokenizer).expanduser()).vocabulary


def tokenizer_bytes(run: RunSettings) -> int:
    """What byte pairs that are learned will keep in memory, the library included."""
    return PAIRS_LIBRARY_BYTES + BYTES_PER_PAIR * run.vocab if run.tokenizer == "bpe" else 0


def check_vocab(run: RunSettings, typed: Mapping[str, object], from_file: Mapping[str, object]) -> None:
    """That a number of byte pairs is asked for only where some are learned.

    A file may hold one all the same: for the tokenizer that the command line replaces, or the usual one, as the
    config.yaml of every run does.

    Args:
        typed: settings of the command line.
        from_file: settings of a file, under those.

    Raises:
        ConfigError: it is asked for, and would mean nothing.
    """
    asked = typed.get("vocab")
    if asked is None and typed.get("tokenizer") is None and from_file.get("vocab") != RunSettings().vocab:
        asked = from_file.get("vocab")
    if asked is None or run.tokenizer == "bpe" or family_type(run.family).reads != "text":
        return
    own = "the tokens in that file"
    if run.tokenizer in TOKENIZERS:
        own = f"{build_tokenizer(run.tokenizer, None).vocabulary} tokens of its own"
    raise ConfigError(
        f"vocab is {asked}, which is how many byte pairs are learned, and the tokenizer is '{run.tokenizer}', which "
        f"has {own}; learn byte pairs with --tokenizer bpe, or leave vocab out"
    )


def stored_source(data: object, settings: Settings, listener: Listener) -> str | None:
    """Data as a setting: a path as text; what a program gave is read into the cache, inside the budget of this process.

    Raises:
        DataError: they are nothing that the run's family reads.
        DoesNotFitError: converting an image would pass the budget.
    """
    if data is None or isinstance(data, str | os.PathLike):
        return None if data is None else os.fspath(data)
    run = settings.run
    if family_type(run.family).reads == "text":
        return store_texts(data, cache_dir=cache_folder(), text_key=run.text_key)
    target = build_target(run.target)
    budget_bytes = budget_of_this_process(
        with_budgets(settings, beside_a_host=target.host_bytes() is not None).run, target
    )
    with _refusals_to_read_explained(budget_bytes, target) as room_bytes:
        return store_images(
            data,
            cache_dir=cache_folder(),
            image_size=run.image_size,
            room_bytes=room_bytes,
            progress=listener.advance,
        )


def open_run_data(
    settings: Settings,
    listener: Listener,
    *,
    budget_bytes: int,
    target: Target,
    training_bytes: Callable[[], int] = lambda: 0,
) -> DataSet:
    """The data of a run, read into the cache inside the budget of the memory that this process is in.

    Args:
        training_bytes: the smallest budget that the training needs which follows, as far as it is known; asked where
            reading is refused, so that the budget that is advised is the last one.

    Raises:
        DoesNotFitError: reading a picture or a text would pass the budget.
    """
    note = cache_note()
    if note is not None:
        listener.note(f"note: {note}")
    if settings.run.vae is not None:
        diffusers()  # before the memory is measured that reading may take
    with _refusals_to_read_explained(budget_bytes, target, training_bytes) as room_bytes:
        held_bytes = target.host_used_bytes()
        beside_bytes = room_beside(budget_bytes, held_bytes)
        data_set = data_of(settings.run, listener.advance, room_bytes=room_bytes, budget_bytes=beside_bytes)
    listener.note(f"read: {data_set.reading}")
    if isinstance(data_set, ChatSet):
        listener.note(data_set.example)
    if data_set.unreadable:
        shown = ", ".join(data_set.unreadable[:5]) + (", .." if len(data_set.unreadable) > 5 else "")
        listener.note(f"skipped {len(data_set.unreadable)} unreadable files: {shown}")
    for warning in data_set.warnings:
        listener.note(f"note: {warning}")
    return data_set


@contextmanager
def _refusals_to_read_explained(
    budget_bytes: int, target: Target, training_bytes: Callable[[], int] = lambda: 0
) -> Iterator[int]:
    """Gives the memory that reading may take in this process; says which budget would do where that is too little.

    Raises:
        DoesNotFitError: in place of NoRoomToReadError.
    """
    taken_bytes = target.host_used_bytes() + DECODING_SLACK_BYTES
    room_bytes = max(0, budget_bytes - taken_bytes)
    try:
        yield room_bytes
    except NoRoomToReadError as error:
        holder, waiting_bytes = who_holds(taken_bytes), 0
        if error.taken_bytes is not None:  # read by a process that has an interpreter, and little else
            waiting_bytes = taken_bytes - DECODING_SLACK_BYTES
            taken_bytes, holder = error.taken_bytes, "the interpreter that reads it"
        needed_bytes, least_bytes = taken_bytes + error.needed_bytes, training_bytes()
        if waiting_bytes:  # measured anew: planning has made it larger, and the next try may be in this process
            waiting_bytes = max(waiting_bytes, target.host_used_bytes())
        smallest_bytes, together_bytes = (
            max(size, least_bytes) for size in (needed_bytes, needed_bytes + waiting_bytes)
        )
        if waiting_bytes and budget_bytes > TOGETHER_ABOVE_BYTES:
            taken_bytes, holder = taken_bytes + waiting_bytes, f"{holder} and the process that waits for it"
            smallest_bytes = together_bytes
        smallest_bytes, advice = _budgets_that_do(smallest_bytes, together_bytes)
        flag = "--mem-budget" if target.host_bytes() is None else "--ram-budget"
        raise DoesNotFitError(
            f"{error.what} takes up to {format_bytes(error.needed_bytes)} to read, and the budget of "
            f"{format_bytes(budget_bytes)} leaves {format_bytes(max(0, budget_bytes - taken_bytes))} after {holder} "
            f"({format_bytes(taken_bytes)}); use {flag} {advice} the first time (then it is in the cache), or "
            f"{error.cure}",
            smallest_bytes,
        ) from error


def _budgets_that_do(each_bytes: int, together_bytes: int) -> tuple[int, str]:
    """The smallest budget that is enough, and in words all that are.

    Args:
        each_bytes: what the larger of the processes takes.
        together_bytes: what all of them take, which larger budgets bound.

    >>> _budgets_that_do(300_000_000, 500_000_000), _budgets_that_do(460_000_000, 720_000_000)
    ((300000000, '302MB or more'), (460000000, '462MB to 600MB, or 722MB or more'))
    """
    if together_bytes <= TOGETHER_ABOVE_BYTES:
        return each_bytes, f"{advised_budget(each_bytes)} or more"
    if each_bytes < TOGETHER_ABOVE_BYTES - PROCESSES_DIFFER_BYTES:
        most = f"{TOGETHER_ABOVE_BYTES // 10**6}MB"
        return each_bytes, f"{advised_budget(each_bytes)} to {most}, or {advised_budget(together_bytes)} or more"
    return together_bytes, f"{advised_budget(together_bytes)} or more"
