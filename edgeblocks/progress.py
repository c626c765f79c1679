"""Who hears how a long call goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from edgeblocks.prepare import Prepared
    from edgeblocks.runs.directory import RunDirectory
    from edgeblocks.training.diffusion import Progress


class Listener(Protocol):
    """Hears how a long call goes on. All methods are optional to act on; `Silent` ignores everything."""

    def stage(self, text: str) -> None: ...

    def advance(self, done: int, total: int, text: str) -> None: ...

    def planned(self, prepared: Prepared, run: RunDirectory) -> None: ...

    def step(self, progress: Progress) -> None: ...

    def note(self, text: str) -> None: ...


class Silent:
    """A listener that hears nothing."""

    def stage(self, text: str) -> None: ...

    def advance(self, done: int, total: int, text: str) -> None: ...

    def planned(self, prepared: Prepared, run: RunDirectory) -> None: ...

    def step(self, progress: Progress) -> None: ...

    def note(self, text: str) -> None: ...
