"""Blocks of one run that are trained apart: which of them here, and what is left to do.

Blocks of method `diffusion` need nothing of each other, and a step's numbers depend on (seed, block, step) alone. So
each may be trained by another process or machine, in a copy of the run (`gathering`), to the same bits.
"""

from collections.abc import Sequence

from edgeblocks.errors import ConfigError
from edgeblocks.methods import Method
from edgeblocks.runs.directory import RunDirectory
from edgeblocks.settings.fields import numbers_in
from edgeblocks.terminal import command

NONE_HERE = "none"


def blocks_from_text(text: str) -> tuple[int, ...]:
    """The numbers of blocks in a flag.

    Raises:
        ConfigError: something else stands there.

    >>> blocks_from_text("2,0"), blocks_from_text("none")
    ((0, 2), ())
    """
    if text.strip() == NONE_HERE:
        return ()
    try:
        return numbers_in(text)
    except ValueError as error:
        raise ConfigError(
            f"--blocks-here {text}: numbers of blocks with commas between them, such as 0,2 (the first block is 0), or "
            f"{NONE_HERE} to begin a run that is copied before any block is trained"
        ) from error


def as_text(blocks: Sequence[int]) -> str:
    """The same the other way round.

    >>> as_text((0, 2)), as_text(())
    ('0,2', 'none')
    """
    return ",".join(map(str, blocks)) or NONE_HERE


def check_trained_apart(blocks_here: Sequence[int] | None, method: Method, *, cluster: str | None = None) -> None:
    """That single blocks of a run can be trained, here or on a cluster.

    Raises:
        ConfigError: its parts are trained together.
    """
    if (blocks_here is None and cluster is None) or not method.trained_together:
        return
    asked = "--blocks-here" if blocks_here is not None else "--cluster"
    why = {
        "exact": "each stage needs what the one below it computes, and the gradient of the one above, in every step",
        "greedy": "each window of layers is trained on top of those below, which were trained before",
    }
    raise ConfigError(
        f"{asked}: with --method {method.name} {why[method.name]}, so one machine trains them all; leave {asked} out, "
        f"or train with --method diffusion, whose blocks need nothing of each other"
    )


def checked_blocks(blocks_here: Sequence[int] | None, num_blocks: int) -> tuple[int, ...] | None:
    """The blocks that are trained here, in order and each once; None: all.

    Raises:
        ConfigError: there is no such block.
    """
    if blocks_here is None:
        return None
    wrong = [block for block in blocks_here if not 0 <= block < num_blocks]
    if wrong:
        there = "only block 0" if num_blocks == 1 else f"the blocks 0 to {num_blocks - 1}"
        raise ConfigError(f"--blocks-here {as_text(blocks_here)}: there is no block {wrong[0]}; the run has {there}")
    return tuple(sorted(set(blocks_here)))


def steps_left(run: RunDirectory) -> dict[int, int]:
    """Steps that each block has still to make, by its number; of parts that are trained together, those of part 0.

    Raises:
        RunError: a file is missing or damaged.
    """
    saved, wanted = run.saved_steps(run.store()), run.settings.run.steps
    counted = enumerate(saved[:1] if run.method.trained_together else saved)
    return {block: wanted - step for block, step in counted if step < wanted}


def is_done_here(run: RunDirectory, blocks_here: Sequence[int] | None) -> bool:
    """Whether all blocks that are trained here are trained, and others are left."""
    if blocks_here is None:
        return False
    left = steps_left(run)
    return bool(left) and not left.keys() & set(blocks_here)


def next_commands(run: RunDirectory) -> list[str]:
    """What to type next: on this machine, or on others and then on this one."""
    go_on, left = command("train", "--resume", run.path), steps_left(run)
    if not left:
        return [command("eval", run.path) if run.summary is not None else f"{go_on}  # evaluates and finishes it"]
    if run.method.trained_together:
        return [go_on]
    return [
        f"{go_on}  # trains what is left, here",
        f"or, in a copy of it on another machine: "
        f"{command('train', '--resume', 'COPY', '--blocks-here', as_text(tuple(left)[:1]))}",
        f"and then here: {command('gather', run.path, 'COPY')}  # takes what the copy has trained further",
    ]
