"""edgeblocks: train a deep network block by block on a machine whose memory does not hold it.

    import edgeblocks
    print(edgeblocks.plan(data="digits", mem_budget="700MB").plan.chosen)
    run = edgeblocks.train(data="digits", mem_budget="700MB", steps=200, out="runs/digits")
    images = run.sample(n=16)

Torch is imported when one of these is first used, not by `import edgeblocks`; `open_export` needs none.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeblocks.api import Callback, Run, finetune, gather, load, plan, register_family, resume, train, writer
    from edgeblocks.export.exported import Export, open_export

_OF_EXPORTS = ("Export", "open_export")
__all__ = [
    "Callback",
    "Export",
    "Run",
    "finetune",
    "gather",
    "load",
    "open_export",
    "plan",
    "register_family",
    "resume",
    "train",
    "writer",
]


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def __getattr__(name: str) -> Any:
    if name in _OF_EXPORTS:
        from edgeblocks.registry import exports

        return getattr(exports(), name)
    if name in __all__:
        from edgeblocks import api

        return getattr(api, name)
    raise AttributeError(f"module 'edgeblocks' has no attribute '{name}'")
