"""Ways to train a network, by name: the methods, and ordinary training with what makes it smaller.

>>> Arm.parse("plain+8bit"), Arm.parse("exact").method
(Arm(method='plain', extras=('8bit',)), 'exact')
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

from edgeblocks.errors import ConfigError
from edgeblocks.methods import EXACT, METHODS, MethodName

DEFAULT_ARMS = ("diffusion", "exact", "plain", "plain+ckpt+8bit")
MEANINGS: dict[str, str] = {
    **{name: method.summary for name, method in METHODS.items()},
    "plain": "an ordinary loop, everything in memory: weights, their mean, gradients, 32-bit moments of AdamW",
    "ckpt": "activations recomputed",
    "8bit": "bitsandbytes' AdamW8bit",
    "boostresnet": "each layer alone on top of frozen ones, by boosting (arXiv 1706.04964); everything in memory",
}
_EXTRAS = {"ckpt": "--checkpointing", "8bit": "--eight-bit"}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train."""

    method: MethodName | Literal["plain", "boostresnet"]
    extras: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Arm":
        """
        Raises:
            ConfigError: there is no such way.
        """
        method, *extras = cast("list[Any]", text.strip().split("+"))
        known = method in (*METHODS, "plain", "boostresnet") and len(set(extras)) == len(extras)
        if not known or (extras and method != "plain") or not set(extras) <= _EXTRAS.keys():
            raise ConfigError(
                f"--arms: there is no arm '{text.strip()}'; there are {', '.join(METHODS)}, plain, plain+ckpt, "
                f"plain+8bit, plain+ckpt+8bit and, for vit, boostresnet"
            )
        return cls(method=method, extras=tuple(extra for extra in _EXTRAS if extra in extras))

    @property
    def name(self) -> str:
        return "+".join((self.method, *self.extras))

    @property
    def meaning(self) -> str:
        return ", ".join(MEANINGS[part] for part in (self.method, *self.extras))

    @property
    def flags(self) -> list[str]:
        """Of ordinary training as a command."""
        return ["--boosting"] if self.is_boosting else [_EXTRAS[extra] for extra in self.extras]

    @property
    def is_boosting(self) -> bool:
        return self.method == "boostresnet"

    @property
    def is_plain(self) -> bool:
        """Whether it is none of our methods: everything is in memory, and there is no budget."""
        return self.method not in METHODS

    @property
    def network(self) -> MethodName:
        """The method whose network it trains."""
        # Two comparisons: that is how type checkers see what is left.
        return EXACT.name if self.method == "plain" or self.method == "boostresnet" else self.method  # noqa: PLR1714


def arms_of(text: str | None, note: Callable[[str], None]) -> tuple[Arm, ...]:
    """The arms that a user names with commas between; the usual ones where the text is None.

    Raises:
        ConfigError: there is no such way to train, or its library is missing.
    """
    has_8bit = importlib.util.find_spec("bitsandbytes") is not None
    parsed = tuple(dict.fromkeys(Arm.parse(name) for name in (text.split(",") if text is not None else DEFAULT_ARMS)))
    if not has_8bit and text is None:
        note("plain+ckpt+8bit is left out: bitsandbytes is not installed (pip install 'edgeblocks[compare]')")
        parsed = tuple(arm for arm in parsed if "8bit" not in arm.extras)
    if not has_8bit and any("8bit" in arm.extras for arm in parsed):
        raise ConfigError("--arms: 8bit needs bitsandbytes, which is not installed: pip install 'edgeblocks[compare]'")
    return parsed
