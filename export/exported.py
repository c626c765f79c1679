"""An exported directory for programs: `edgeblocks.open_export`. numpy and onnxruntime, no torch."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeblocks.diffusion.solver import Solver
from edgeblocks.errors import ConfigError
from edgeblocks.export.classifier import Classifier
from edgeblocks.export.continuer import Continuer
from edgeblocks.export.language_model import LanguageModel, is_language_model
from edgeblocks.export.manifest_types import ImageManifest
from edgeblocks.export.onnx_chain import ExportedChain, Values
from edgeblocks.export.open_export import open_graphs
from edgeblocks.export.sampler import Sampler
from edgeblocks.export.vision_model import VisionManifest, VisionModel
from edgeblocks.export.writer import Writer
from edgeblocks.onnx_runtime import Hardware
from edgeblocks.tasks import Task

_Made = TypeVar("_Made")
_METHODS: dict[Task, str] = {"images": "sample", "classes": "classify", "text": "write", "continuation": "write"}


class Export:
    """What `edgeblocks export` wrote: a chain, in one file or block by block, or a fine-tuned model. Not thread-safe.

    Weights are in memory while a call runs, and those of a fine-tuned model from the first one on. With `mem_budget`, a
    size such as "500MB" or a share of the machine's memory, a call is refused where it cannot fit, and the process may
    take no more until it is done. Blocks that write token by token, and do not fit together, are then read again for
    every token.

    Raises (each method):
        ConfigError: an impossible argument, or the network makes something else.
        DoesNotFitError, OutOfBudgetError: it takes more memory than `mem_budget`.
        RunError: a file is missing, damaged or refused.
    """

    def __init__(self, chain: ExportedChain | LanguageModel | VisionModel) -> None:
        self._chain = chain

    @property
    def path(self) -> Path:
        return self._chain.directory

    @property
    def task(self) -> Task:
        """`images`, `classes`, `text` (filled gaps) or `continuation` (text from its beginning)."""
        return "continuation" if isinstance(self._chain, LanguageModel) else self._chain.manifest.task

    @property
    def class_names(self) -> tuple[str, ...]:
        """() where there are no classes."""
        manifest = self._chain.manifest
        return manifest.class_names if isinstance(manifest, ImageManifest | VisionManifest) else ()

    def sample(
        self,
        n: int,
        *,
        steps: int | None = None,
        solver: Solver = "heun",
        guidance: float = 1.0,
        label: int | str | None = None,
        seed: int = 0,
        mem_budget: str | None = None,
    ) -> NDArray[np.uint8]:
        """Images, uint8 [n, H, W, C]. The classes take turns unless one is chosen by number or name."""
        chain = self._chain
        if not isinstance(chain, Sampler):
            raise self._other("sample")
        return self._within(
            mem_budget,
            n,
            lambda: chain.sample(n, steps=steps, solver=solver, guidance=guidance, label=label, seed=seed),
        )

    def classify(
        self,
        pixels: NDArray[np.uint8],
        *,
        steps: int | None = None,
        noises: int | None = None,
        seed: int = 0,
        mem_budget: str | None = None,
    ) -> Values:
        """Probabilities of the classes, float32 [N, classes], of images uint8 [N, H, W, C] of the network's size."""
        chain = self._chain
        if not isinstance(chain, Classifier | VisionModel):
            raise self._other("classify")
        return self._within(
            mem_budget, len(pixels), lambda: chain.classify(pixels, steps=steps, noises=noises, seed=seed)
        )

    def write(
        self,
        n: int = 1,
        *,
        prompt: str | None = None,
        fill: str | None = None,
        steps: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        length: int | None = None,
        seed: int = 0,
        mem_budget: str | None = None,
    ) -> list[str]:
        """Texts: with the gaps of `fill` filled in, or from a beginning `prompt`, as the network is made for it."""
        chain = self._chain
        if not isinstance(chain, Writer | Continuer | LanguageModel):
            raise self._other("write")
        return self._within(
            mem_budget,
            n,
            lambda: chain.write(
                n,
                steps=steps,
                temperature=temperature,
                fill=fill,
                prompt=prompt,
                top_p=top_p,
                length=length,
                seed=seed,
            ),
        )

    def _within(self, mem_budget: str | None, n: int, make: Callable[[], _Made]) -> _Made:
        if mem_budget is None:
            return make()
        with self._chain.within(mem_budget, n=n):
            return make()

    def _other(self, asked: str) -> ConfigError:
        makes = {"images": "images", "classes": "classes of images"}.get(self.task, "text")
        return ConfigError(f"{self.path} makes {makes}: use {_METHODS[self.task]} in place of {asked}")


def open_export(directory: Path | str, *, threads: int | None = None, provider: str = "cpu") -> Export:
    """An exported directory, ready to run, of any kind. It imports no torch.

    Args:
        threads: of onnxruntime inside one operator; None: as many as it chooses.
        provider: one of onnxruntime's execution providers by its short name, such as "cuda"; not yet run on a GPU.

    Raises:
        ConfigError: the installed onnxruntime does not have that provider.
        RunError: not an exported directory, of another version, or damaged.

    For example: `edgeblocks.open_export("photos-onnx").sample(16, guidance=2)`.
    """
    hardware = Hardware(threads=threads, provider=provider)
    if is_language_model(Path(directory)):
        return Export(LanguageModel(Path(directory), hardware=hardware))
    return Export(open_graphs(Path(directory), hardware=hardware))
