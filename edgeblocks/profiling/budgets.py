"""The budgets that a user names or leaves to us, in bytes: of a device's memory, and of its host's."""

from dataclasses import replace

from edgeblocks.errors import ConfigError, DoesNotFitError
from edgeblocks.offload.device import Target
from edgeblocks.registry import build_target
from edgeblocks.settings.fields import RunSettings, Settings
from edgeblocks.units import advised_budget, format_bytes, parse_size

LEAST_MEANT_BYTES = 1_000_000
"""Nobody means less by a budget: the interpreter alone takes more."""
TOGETHER_ABOVE_BYTES = 600_000_000
"""Budgets above this bound all processes together, also while one reads or plans beside this one; others bound each."""
GPU_BUDGET = "90%"
"""Of a GPU's memory, where the user names no budget: little else needs it, while a processor's memory is everyone's."""
RAM_BUDGET = "50%"


def with_budgets(settings: Settings, *, beside_a_host: bool) -> Settings:
    """The settings, with the budgets that a GPU and its host have where the user names none."""
    if not beside_a_host:
        return settings
    run = settings.run
    usual = {"ram_budget": run.ram_budget or RAM_BUDGET}
    if "mem_budget" not in run.model_fields_set:
        usual["mem_budget"] = GPU_BUDGET
    return replace(settings, run=run.model_copy(update=usual))


def usual_budgets(target: str) -> dict[str, str | None]:
    """The budgets of a target where the user names none, as settings."""
    if build_target(target).host_bytes() is None:
        return {"mem_budget": RunSettings().mem_budget, "ram_budget": None}
    return {"mem_budget": GPU_BUDGET, "ram_budget": RAM_BUDGET}


def budgets_here(run: RunSettings, target: Target) -> tuple[int, int | None]:
    """Bytes of the device's budget, and of the host's where the device has its own memory.

    Raises:
        ConfigError: not a size, or more than there is.
    """
    return budgets_of(run, target.total_bytes(), target.host_bytes(), "this machine")


def budget_of_this_process(run: RunSettings, target: Target) -> int:
    """Bytes of the budget that bounds the resident set: the host's where the device has memory of its own.

    Raises:
        ConfigError: not a size, or more than there is.
    """
    budget_bytes, ram_budget_bytes = budgets_here(run, target)
    return budget_bytes if ram_budget_bytes is None else ram_budget_bytes


def budgets_of(run: RunSettings, memory_bytes: int, host_bytes: int | None, machine: str) -> tuple[int, int | None]:
    if host_bytes is not None:
        return (
            _size_within("--mem-budget", run.mem_budget, memory_bytes, f"the GPU of {machine}"),
            _size_within("--ram-budget", run.ram_budget or RAM_BUDGET, host_bytes, f"the host of {machine}"),
        )
    if run.ram_budget is not None:
        raise ConfigError(
            f"--ram-budget {run.ram_budget} bounds the host's memory when a GPU trains; on {machine} training has "
            f"one memory, and --mem-budget bounds it"
        )
    return _size_within("--mem-budget", run.mem_budget, memory_bytes, machine), None


def device_budget_bytes(text: str, target: Target) -> int:
    """Bytes of a budget for a target's memory.

    Raises:
        ConfigError: not a size, or more than there is.
    """
    return _size_within("--mem-budget", text, target.total_bytes(), "this machine")


def room_beside(budget_bytes: int, held_bytes: int) -> int:
    """What a process may take that works while this one, which holds some of the memory, waits for it.

    >>> room_beside(1_000_000_000, 300_000_000), room_beside(500_000_000, 300_000_000)
    (700000000, 500000000)
    """
    return max(0, budget_bytes - held_bytes) if budget_bytes > TOGETHER_ABOVE_BYTES else budget_bytes


def check_needed(mem_budget: str | None, needed_bytes: int, doing: str, why: str) -> None:
    """Check, before it begins, that work which cannot be made smaller takes no more of a process's memory than it may.

    Args:
        mem_budget: a size, or a share of the machine's memory; None bounds nothing.
        doing, why: what would be done, and where the memory goes, in words.

    Raises:
        ConfigError: not a size.
        DoesNotFitError: it takes more.
    """
    if mem_budget is None:
        return
    budget_bytes = device_budget_bytes(mem_budget, build_target("cpu"))
    if needed_bytes > budget_bytes:
        raise DoesNotFitError(
            f"{doing} takes up to {format_bytes(needed_bytes)} of memory, and the budget is "
            f"{format_bytes(budget_bytes)}: {why}; use --mem-budget {advised_budget(needed_bytes)} or more, here or on "
            f"another machine that the run is copied to",
            needed_bytes,
        )


def _size_within(flag: str, text: str, total: int, machine: str) -> int:
    try:
        budget_bytes = parse_size(str(text), whole_bytes=total)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{flag}: {error}") from error
    if str(text).strip().isdigit() and budget_bytes < LEAST_MEANT_BYTES:
        raise ConfigError(
            f"{flag} {text} is {format_bytes(budget_bytes)}, as a number without a unit counts bytes; write {flag} "
            f"{text}MB if you mean megabytes"
        )
    if budget_bytes > total:
        raise ConfigError(
            f"{flag} {text} is {format_bytes(budget_bytes)}, but {machine} has {format_bytes(total)}; "
            f"use at most {flag} {int(total * 0.9 / 1e6)}MB"
        )
    return budget_bytes
