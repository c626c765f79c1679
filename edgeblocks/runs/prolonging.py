"""A run that is to make more steps than it was begun with."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from edgeblocks.errors import ConfigError
from edgeblocks.optim.schedule import learning_rate_over
from edgeblocks.runs.create import seal_run
from edgeblocks.runs.directory import RunDirectory
from edgeblocks.runs.schema import Prolongation
from edgeblocks.runs.shared import is_split
from edgeblocks.settings.fields import share_of


def check_prolonging(run: RunDirectory, *, steps_before: int, saved: Sequence[int]) -> None:
    """Check that a run whose settings ask for other steps than before can make them.

    Args:
        steps_before: that it was to make.
        saved: steps that its blocks have made.

    Raises:
        ConfigError: they are fewer than it was to make, or has made.
    """
    if run.shared_steps and not is_split(run):
        raise ConfigError(
            f"--steps {run.settings.run.steps}: the blocks of {run.path} are still one denoiser (shared="
            f"{share_of(run.settings.run):g}), whose learning rate goes by the steps of all; train it to its end "
            f"first, then prolong it"
        )
    if not run.is_grown:
        raise ConfigError(
            f"--steps {run.settings.run.steps}: the network of {run.path} still grows, by the steps that it was begun "
            f"with; train it to its end first, then prolong it"
        )
    steps, made = run.settings.run.steps, f"{min(saved)} to {max(saved)}" if min(saved) < max(saved) else str(saved[0])
    if steps < steps_before:
        raise ConfigError(
            f"--steps {steps}: {run.path} has made {made} of its {steps_before} steps, and --resume can prolong a run "
            f"but not shorten it; give more than {steps_before}, or leave --steps out"
        )


def prolong(run: RunDirectory, *, steps_before: int, saved: Sequence[int], note: Callable[[str], None]) -> RunDirectory:
    """Write down that a run is to make the steps of its settings; says what becomes of the learning rate.

    The run is prolonged once its config.yaml is written. A process that is killed here leaves it as it was, without a
    summary.
    """
    settings = run.settings.run
    before = replace(run.settings, run=settings.model_copy(update={"steps": steps_before}))
    former = replace(run, settings=before)
    prolongation = Prolongation(steps_before=steps_before, began_at=list(saved))
    run = replace(run, prolonged=(*former.prolongations, prolongation))
    run.forget_summary()
    seal_run(run)
    run.save_settings()
    rates = [_rate_after(former, block, step) for block, step in enumerate(saved)]
    now = f"{min(rates):.2g}" if min(rates) == max(rates) else f"{min(rates):.2g} to {max(rates):.2g}"
    rise = min(settings.warmup, (settings.steps - max(saved)) // 2)
    how = f"rises over {rise} steps" if rise else "goes back at once"
    note(
        f"prolonged from {steps_before} to {settings.steps} steps: the learning rate is {now} now, {how} to "
        f"{settings.learning_rate:.2g} and falls to zero along a new cosine"
    )
    return run


def _rate_after(run: RunDirectory, block: int, step: int) -> float:
    """The rate of a block's last step."""
    settings, last = run.settings.run, max(step - 1, 0)
    return learning_rate_over(run.stretches(block), last, warmup=settings.warmup, peak=settings.learning_rate)
