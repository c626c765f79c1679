"""Texts that the graph of a whole chain writes together, one token a run. numpy and onnxruntime, no torch."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeblocks.diffusion.autoregression import PROMPT_SEGMENT, TokenChain
from edgeblocks.diffusion.token_choice import Probabilities, Tokens, Values
from edgeblocks.onnx_runtime import Kept

Needed = Sequence[tuple[type[np.generic], tuple[int, ...]]]


class Graph(Protocol):
    """Runs the graph; see `ExportedChain.run_chain`."""

    def __call__(self, feed: dict[str, NDArray[np.generic] | Kept], needed: Needed, /, *, keep: str) -> list[Any]: ...


class ChainWindow:
    """Some texts that are written together, position by position; `autoregression.Window` with one graph."""

    def __init__(self, graph: Graph, chain: TokenChain, noise: Values) -> None:
        """Texts of which nothing is known.

        Args:
            noise: standard normal, [samples, length, code_width].
        """
        self._graph, self._chain, self._noise = graph, chain, noise
        self._inputs = np.full((len(noise), chain.length + 1), len(chain.codes), dtype=np.int64)
        # Keys and values stay in onnxruntime: two copies of all of them a token would take longer than small blocks.
        self._past: Values | Kept = np.zeros(
            (self._num_caches, len(noise), chain.heads, 0, chain.head_width), dtype=np.float32
        )

    @property
    def tokens(self) -> Tokens:
        """[samples, length]; a token that is not known is the id `vocabulary`."""
        return self._inputs[:, 1:]

    def fill(self, upto: int) -> None:
        """Run the known positions before `upto` through the graph, for its caches."""
        chain, end = self._chain, upto - self._restated
        # Levels that share the caches of their block would write the same into them: one a block is enough.
        steps = sorted({chain.cache_keys.index(key) for key in chain.cache_keys})
        for start in range(0, end, PROMPT_SEGMENT):
            stop = min(start + PROMPT_SEGMENT, end) + self._restated
            self._run(start, stop, [chain.levels[step] for step in steps], np.zeros(len(self._noise)), 1.0, 1.0)

    def next_token(
        self, position: int, uniform: Probabilities, *, temperature: float, top_p: float
    ) -> tuple[Tokens, Probabilities]:
        """A position's token [samples] and its probabilities [samples, vocabulary], given those before."""
        start = max(0, position - self._restated)
        return self._run(start, position + 1, self._chain.levels, uniform, temperature, top_p)

    def _run(
        self, start: int, stop: int, levels: Sequence[float], uniform: Probabilities, temperature: float, top_p: float
    ) -> tuple[Tokens, Probabilities]:
        num_caches, batch, heads, _, head_width = self._past.shape
        feed: dict[str, NDArray[np.generic] | Kept] = {
            "tokens": self._inputs[:, start:stop],
            "noise": self._noise[:, start:stop],
            "past": self._past,
            "levels": np.array(levels, dtype=np.float64),
            "uniform": uniform,
            "temperature": np.array(temperature, dtype=np.float64),
            "top_p": np.array(top_p, dtype=np.float64),
        }
        shapes: Needed = [
            (np.int64, (batch,)),
            (np.float64, (batch, len(self._chain.codes))),
            (np.float32, (num_caches, batch, heads, stop - self._restated, head_width)),
        ]
        token, probabilities, self._past = self._graph(feed, shapes, keep="present")
        return token, probabilities

    @property
    def _num_caches(self) -> int:
        chain = self._chain
        if chain.caches_per == "block":
            return sum(chain.num_caches)
        return sum(chain.num_caches[block] for block in chain.blocks)

    @property
    def _restated(self) -> int:
        """Known positions at the end that are run again together with the next one."""
        return int(self._chain.caches_per == "step")
