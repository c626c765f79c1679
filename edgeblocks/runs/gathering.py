"""Blocks that copies of a run have trained, taken into the run: what other machines did comes home.

Of each block the file that is furthest is taken. It is copied beside the run's own, with its checksums verified on the
way, and only when all that is to be taken lies there whole are names changed, one block after the other. So whatever
stops it, each block is either as it was or as the copy has it, and gathering again goes on. The records of a block's
steps come with it.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

from edgeblocks.errors import ConfigError, RunError
from edgeblocks.files.durable import sync, write_atomically
from edgeblocks.offload.block_files import BlockHeader, BlockStore, storage_error
from edgeblocks.runs.apart import check_trained_apart, steps_left
from edgeblocks.runs.directory import SHARED_FOLDER, RunDirectory, remove_leftovers, write_text
from edgeblocks.runs.history import shared_s, with_own_time
from edgeblocks.runs.locks import check_links, locked, locked_away
from edgeblocks.runs.opening import open_run

OF_A_MACHINE = frozenset({"mem_budget", "ram_budget", "target", "data", "work_dir", "max_disk_writes"})
"""Settings in which copies of a run may differ: they change no number of the result."""


class Taken(TypedDict):
    """A block that was taken from a copy; None of the denoiser that blocks begin as."""

    block: int | None
    copy: str
    step_before: int
    step: int


class Gathered(TypedDict):
    """What `gather` did, and how far the run's blocks are now."""

    run: str
    taken: list[Taken]
    steps: list[int]
    steps_wanted: int
    left: dict[int, int]
    """Steps that blocks have still to make."""


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A run or a copy of it, with its block files."""

    run: RunDirectory
    store: BlockStore
    headers: tuple[BlockHeader, ...]


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """Where each block of a run comes from, and where the records of its steps do."""

    home: _Place
    files: dict[int, _Place]
    """Of blocks that are taken."""
    records: dict[int, _Place]
    """Of all blocks."""
    steps: list[int]


def gather(run: RunDirectory, copies: Sequence[Path], note: Callable[[str], None]) -> Gathered:
    """Take from copies of a run the blocks that are further there.

    Raises:
        ConfigError: a copy is the run itself, or the run's parts were trained together.
        RunError: a copy is of another run or has other settings, a file is damaged, or two copies have trained a block
            to the same step with other bits. Nothing was taken then.
        StorageError: the disk refused.
    """
    check_trained_apart((), run.method)
    others = [_opened(run, path) for path in copies]
    with locked(run.path, note), locked_away(run, note):
        remove_leftovers(run)
        shared = _chosen_shared(run, others)
        choices = [*([shared] if isinstance(shared, _Choice) else ()), _chosen(run, others)]
        # All that can be wrong with a copy has shown itself when the last of these is through.
        arrived = _bring(choices)
        if isinstance(shared, RunDirectory):
            _take_folder(shared, run.path / SHARED_FOLDER)
        for path, place in arrived:
            _put(path, place)
        for choice in choices:
            _merge_records(choice)
        return {
            "run": str(run.path),
            "taken": [taken for choice in choices for taken in _taken(choice)],
            "steps": run.saved_steps(run.store()),
            "steps_wanted": run.settings.run.steps,
            "left": steps_left(run),
        }


def take_block(run: RunDirectory, block: int, store: BlockStore, folder: Path) -> bool:
    """The same of one block that came from elsewhere, for who has locked the run; says whether it was further.

    Args:
        store: a folder of block files, of which this one is there.
        folder: where the metrics.jsonl is that has the records of its steps.

    Raises:
        RunError: the file is damaged or of another run.
        StorageError: the disk refused.
    """
    home = _place(run)
    header = store.header(block)
    if header.step <= home.headers[block].step:
        return False
    headers = (*home.headers[:block], header, *home.headers[block + 1 :])
    copy = _Place(run=replace(run, path=folder), store=store, headers=headers)
    choice = _Choice(
        home=home,
        files={block: copy},
        records={**dict.fromkeys(range(len(headers)), home), block: copy},
        steps=[header.step for header in headers],
    )
    for path, place in _bring([choice]):
        _put(path, place)
    _merge_records(choice)
    return True


def _opened(run: RunDirectory, path: Path) -> RunDirectory:
    """A copy of a run, which is the same run.

    Raises:
        ConfigError, RunError: it is not.
    """
    copy = open_run(path)
    if path.samefile(run.path):
        raise ConfigError(f"{path} is the run itself; name copies of it that other machines have trained")
    for folder in (path, path / SHARED_FOLDER):
        check_links(folder)
    if copy.run_id != run.run_id:
        raise RunError(
            f"{path} is a copy of another run ({copy.run_id[:8]}, and {run.path} is {run.run_id[:8]}): runs that were "
            f"begun apart have other weights, even with the same settings; copy the run itself (cp -r)"
        )
    if different := _differences(run, copy):
        raise RunError(
            f"{path} goes on with other settings than {run.path}, so its blocks would not be those of one run: "
            f"{'; '.join(different)}"
        )
    if copy.is_away and _same_folder(copy.blocks_folder, run.blocks_folder):
        raise RunError(
            f"the blocks of {path} are not in it but in the work directory of the machine that trains it; let it end "
            f"there, or copy that folder (edgeblocks-{run.run_id[:12]}) to {path / 'blocks'}"
        )
    return copy


def _same_folder(one: Path, other: Path) -> bool:
    return not one.is_dir() or (other.is_dir() and one.samefile(other))


def _differences(run: RunDirectory, copy: RunDirectory) -> list[str]:
    """What of a copy is not as the run has it and would change a number of the result, in words."""
    found = []
    for name, value in run.settings.run.model_dump().items():
        theirs = getattr(copy.settings.run, name)
        if name not in OF_A_MACHINE and theirs != value:
            found.append(f"{name} {theirs}, here {value}")
    if run.settings.family != copy.settings.family:
        found.append("another network")
    if run.file_layers != copy.file_layers:
        found.append(f"layers of the blocks {list(copy.file_layers)}, here {list(run.file_layers)}")
    if run.data_fingerprint != copy.data_fingerprint:
        found.append("other data")
    if run.prolongations != copy.prolongations:
        found.append("it was prolonged at other steps")
    return found


def _place(run: RunDirectory) -> _Place:
    store = run.store()
    return _Place(run=run, store=store, headers=tuple(map(store.header, range(len(run.file_layers)))))


def _chosen(run: RunDirectory, copies: Sequence[RunDirectory]) -> _Choice:
    """Where each block of a run is furthest.

    Raises:
        RunError: a file is damaged, or two are as far with other bits.
    """
    home = _place(run)
    places = [home, *map(_place, copies)]
    files, records, steps = {}, {}, []
    counts = [_num_records(place.run) for place in places]
    for block in range(len(home.headers)):
        furthest = max(place.headers[block].step for place in places)
        best = [number for number, place in enumerate(places) if place.headers[block].step == furthest]
        for number in best[1:]:
            _check_equal(places[best[0]], places[number], block)
        if best[0]:  # else the run's own is as far
            files[block] = places[best[0]]
        # Where gathering was cut short, a block is here and the records of its steps are not.
        records[block] = places[max(best, key=lambda number: counts[number].get(block, 0))]
        steps.append(furthest)
    return _Choice(home=home, files=files, records=records, steps=steps)


def _check_equal(one: _Place, other: _Place, block: int) -> None:
    mine, theirs = one.headers[block], other.headers[block]
    if (mine.digests, mine.loss_scale) != (theirs.digests, theirs.loss_scale):
        raise RunError(
            f"{_what(one.run, block)} is at step {mine.step} in {one.run.path} and in {other.run.path}, with other "
            f"bits: it was trained twice, on machines that round sums otherwise. Nothing was taken; leave out the copy "
            f"whose block you do not want"
        )


def _what(run: RunDirectory, block: int) -> str:
    return f"block {block}" if run.shared_by is None else "the denoiser that all blocks begin as"


def _num_records(run: RunDirectory) -> dict[int, int]:
    """How many steps of each block have records."""
    counts: dict[int, int] = {}
    for record in run.records():
        counts[record.block] = counts.get(record.block, 0) + 1
    return counts


def _chosen_shared(run: RunDirectory, copies: Sequence[RunDirectory]) -> _Choice | RunDirectory | None:
    """The same of the denoiser that the blocks begin as: all blocks must come from one.

    Returns:
        A copy's run of that denoiser where only copies have begun one; None where nobody has.

    Raises:
        RunError: copies have trained it apart, to other bits.
    """
    folders = [place.path / SHARED_FOLDER for place in (run, *copies)]
    begun = [open_run(folder) for folder in folders if (folder / "manifest.json").exists()]
    if not begun:
        return None
    places = [_place(one) for one in begun]
    furthest = max(places, key=lambda place: place.headers[0].step)
    for place in places:
        if place.headers[0].step == furthest.headers[0].step:
            _check_equal(furthest, place, 0)
        elif place.run.run_id != furthest.run.run_id:
            raise RunError(
                f"the denoiser that all blocks begin as was begun in {place.run.path} and in {furthest.run.path}, each "
                f"by itself: one machine trains it, and copies that are made then go on from there. Nothing was taken; "
                f"leave out the copy that you do not want"
            )
    if begun[0].path != folders[0]:
        for _ in furthest.store.sound_pieces(0):
            pass  # its checksums are verified before anything is taken
        return furthest.run
    return _chosen(begun[0], [one for one in begun[1:] if one.run_id == begun[0].run_id])


def _take_folder(source: RunDirectory, home: Path) -> None:
    """The run of the denoiser that blocks begin as, whole."""
    arriving = home.with_name("blocks.arriving")
    try:
        shutil.rmtree(arriving, ignore_errors=True)
        shutil.copytree(source.path, arriving, ignore=shutil.ignore_patterns("lock", "lock.pid", ".*.tmp"))
        for path in (*arriving.rglob("*"), arriving):
            sync(path)
        shutil.rmtree(home, ignore_errors=True)  # what was begun and has no manifest
        arriving.rename(home)
        sync(home.parent)
    except (OSError, shutil.Error) as error:
        cause = error if isinstance(error, OSError) else OSError(str(error))
        raise storage_error(f"cannot take {source.path}", home, cause) from error


def _bring(choices: Sequence[_Choice]) -> list[tuple[Path, Path]]:
    """Copy the files that are taken beside those of the run; each with the name that it is to get.

    Raises:
        RunError: one is damaged.
        StorageError: the disk refused. Nothing is left of what had come until then.
    """
    arrived: list[tuple[Path, Path]] = []
    try:
        for choice in choices:
            for block, place in choice.files.items():
                path = choice.home.store.path(block)
                beside = path.with_name(f".{path.name}.{os.getpid()}.arrived.tmp")
                try:
                    write_atomically(beside, place.store.sound_pieces(block))
                except OSError as error:
                    raise storage_error(f"cannot take {_what(choice.home.run, block)}", path, error) from error
                arrived.append((beside, path))
    except BaseException:
        for beside, _ in arrived:
            beside.unlink(missing_ok=True)
        raise
    return arrived


def _put(arrived: Path, path: Path) -> None:
    try:
        arrived.replace(path)
        sync(path.parent)
    except OSError as error:
        raise storage_error("cannot replace the block", path, error) from error


def _merge_records(choice: _Choice) -> None:
    """Put together the records of all blocks, whose times are added up."""
    run = choice.home.run
    if all(place is choice.home for place in choice.records.values()):
        return
    lines, passed_s = [], shared_s(run) or 0.0
    for block, place in choice.records.items():
        for content, record, own_s in with_own_time(place.run):
            if record.block != block or record.step > choice.steps[block]:
                continue
            passed_s += own_s or 0.0
            lines.append(json.dumps(content if own_s is None else {**content, "seconds": round(passed_s, 3)}) + "\n")
    write_text(run.path / "metrics.jsonl", "".join(lines))


def _taken(choice: _Choice) -> Iterator[Taken]:
    run = choice.home.run
    for block, place in choice.files.items():
        copy = place.run.path if run.shared_by is None else place.run.path.parent
        yield {
            "block": block if run.shared_by is None else None,
            "copy": str(copy),
            "step_before": choice.home.headers[block].step,
            "step": choice.steps[block],
        }
