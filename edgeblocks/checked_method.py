"""Whether a family's network can be trained by a method, with these settings."""

from edgeblocks.errors import ConfigError
from edgeblocks.methods import EXACT, METHODS
from edgeblocks.registry import family_type
from edgeblocks.settings.fields import RunSettings, share_of

SETTINGS_OF_SOME_METHODS = {
    "shared": "is of blocks that are trained alone, and {method} trains one network",
    "window": "says how many layers are trained at a time while a network grows, and with --method {method} none does",
    "grow": "says when layers are added to a network that grows, and with --method {method} none does",
    "frozen": "says as what layers below a window are in memory, and with --method {method} there is none",
    "clip_by": "clips by the norm of a whole network's gradient; with --method {method} there is none, what is trained "
    "is clipped by its own",
    "boundaries": "says where activations at the stage boundaries wait for the backward pass; with --method {method} "
    "no gradient goes from part to part",
    "boundary_dtype": "says what activations at the stage boundaries are kept as; with --method {method} no gradient "
    "goes from part to part",
    "train_blocks": "names the stages that are trained; with --method {method} there is nothing to choose (to train a "
    "block again: edgeblocks train --resume RUN --reinit-block N)",
}
"""Why a setting means nothing with a method that does not have it among its own."""


def check_method(run: RunSettings) -> None:
    """Check that a network can be trained this way.

    Raises:
        ConfigError: the family does not have that many stages, or a setting belongs to another method.
    """
    if is_one_stage(run) and run.blocks not in ("auto", 1):
        raise ConfigError(
            f"--blocks {run.blocks}: all layers of a {run.family} that is trained end to end are one stage; leave "
            f"--blocks out"
        )
    method, kind = METHODS[run.method], family_type(run.family)
    if kind.only_exact and run.method != EXACT.name:
        raise ConfigError(
            f"--method {run.method}: a pretrained model is trained end to end, with --method exact; blocks that are "
            f"trained alone would be other networks"
        )
    if run.checkpointing is False and kind.always_checkpointed:
        raise ConfigError(
            "checkpointing=False: frozen layers are in memory one at a time, so each is run again on the way back; "
            "leave it out"
        )
    if run.sample_grids and not kind.writes_text:
        raise ConfigError(f"sample_grids={run.sample_grids}: a pretrained model writes no text here yet; leave it out")
    if run.evaluations and not kind.writes_text:
        raise ConfigError(
            f"evaluations={run.evaluations}: a pretrained model is evaluated before and after it; leave it out"
        )
    if method.grows and is_one_stage(run):
        raise ConfigError(
            f"--method {run.method}: a {run.family} is not grown, because each pass runs its core again and again, and "
            f"layers on top would come after all of its iterations; use --method exact"
        )
    if method.grows and run.blocks != "auto":
        raise ConfigError(
            f"--blocks {run.blocks}: with --method {run.method} the window decides how the network is cut; use --set "
            f"window=N (layers), or leave both out"
        )
    if method.grows and run.init is not None:
        raise ConfigError(
            f"--method {run.method} and --init: the network begins as its lowest layers, and the file holds all; to go "
            f"on with the weights of a file, use --method exact"
        )
    if share_of(run) and run.init is not None:
        raise ConfigError(
            f"shared={share_of(run):g} and --init: blocks begin as one denoiser or as the file has them; leave one out"
        )
    for name, why in SETTINGS_OF_SOME_METHODS.items():
        value = getattr(run, name)
        if name in METHODS[run.method].own_settings or not value or value == RunSettings.model_fields[name].default:
            continue
        others = " or ".join(f"--method {other.name}" for other in METHODS.values() if name in other.own_settings)
        raise ConfigError(f"{name}={value} {why.format(method=run.method)}; leave it out, or use {others}")


def is_one_stage(run: RunSettings) -> bool:
    """Whether the family's network cannot be cut where it is trained end to end."""
    return METHODS[run.method].one_network and family_type(run.family, run.method).one_stage
