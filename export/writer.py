"""Text from an exported directory: numpy and onnxruntime, no torch."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edgeblocks.data.gaps import with_gaps
from edgeblocks.diffusion.noise import unmasking_steps
from edgeblocks.diffusion.token_choice import check_options
from edgeblocks.diffusion.unmasking import check_writing, random_numbers, unmask
from edgeblocks.export.manifest import exported_tokenizer
from edgeblocks.export.manifest_types import TextManifest
from edgeblocks.export.onnx_chain import DEFAULT_MICRO_BATCH, ExportedChain, Values, parts

_RANDOM_BYTES = 2**26
"""Of the random numbers that go into a graph together; those of one text may be more."""


class Writer(ExportedChain):
    """An exported chain that writes text."""

    manifest: TextManifest

    def held_bytes(self, n: int) -> int:
        """The logits of the texts that go through a block together, in two copies."""
        return 8 * min(n, DEFAULT_MICRO_BATCH) * self.manifest.length * self.manifest.vocabulary

    def write(
        self,
        n: int,
        *,
        steps: int | None = None,
        temperature: float | None = None,
        fill: str | None = None,
        prompt: str | None = None,
        top_p: float | None = None,
        length: int | None = None,
        seed: int = 0,
        micro_batch: int | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Texts as long as those that the network was trained on; or `fill` with its gaps filled in.

        Args:
            steps: of unmasking, at least one a block; None: as the manifest says.
            temperature: 1 draws as the network was trained, 0 takes the likeliest token; None: as the manifest says.
            fill: a text in which each missing token is written `_` or `[MASK]`.
            prompt, top_p: refused; they belong to networks that write token by token.
            length: tokens of a text, the beginning of a whole one; None: as many as the network was trained on.
            on_token: called with the steps of unmasking that are done, and how many there will be.

        Raises:
            ConfigError: an impossible argument.
            RunError: a file is missing or damaged.
        """
        check_options(self.manifest.task, fill=fill, prompt=prompt, top_p=top_p, length=length)
        levels = self.manifest.sampler.steps if steps is None else steps
        tokens, given = self.write_tokens(
            n,
            steps=levels,
            temperature=temperature,
            fill=fill,
            length=length,
            seed=seed,
            micro_batch=micro_batch,
            on_step=None if on_token is None else lambda done: on_token(done, levels),
        )
        tokenizer = exported_tokenizer(self.directory, self.manifest)
        return [tokenizer.decode(row[:given]) for row in tokens]

    def write_tokens(
        self,
        n: int,
        *,
        steps: int | None = None,
        temperature: float | None = None,
        fill: str | None = None,
        length: int | None = None,
        seed: int = 0,
        micro_batch: int | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> tuple[NDArray[np.int64], int]:
        """As `write`, before the tokens become text: int64 [n, length], and how many of them are the text."""
        manifest = self.manifest
        steps = manifest.sampler.steps if steps is None else steps
        temperature = manifest.sampler.temperature if temperature is None else temperature
        check_writing(n=n, steps=steps, temperature=temperature, length=length, trained_length=manifest.length)
        intervals = unmasking_steps(self.partition, num_steps=steps)
        mask = manifest.vocabulary
        start, given = with_gaps(fill, exported_tokenizer(self.directory, manifest), length=manifest.length, mask=mask)
        try:
            if self.in_one_file:
                tokens = self._in_one_run(np.tile(start, (n, 1)), intervals, temperature, seed, micro_batch, on_step)
                return tokens, length or given
            tokens = unmask(
                self.logits,
                np.tile(start, (n, 1)),
                steps=intervals,
                mask=mask,
                temperature=temperature,
                seed=seed,
                micro_batch=DEFAULT_MICRO_BATCH if micro_batch is None else micro_batch,
                on_step=on_step,
            )
        finally:
            self.close()
        return tokens, length or given

    def _in_one_run(
        self,
        tokens: NDArray[np.int64],
        steps: Sequence[tuple[float, float]],
        temperature: float,
        seed: int,
        micro_batch: int | None,
        on_step: Callable[[int], None] | None,
    ) -> NDArray[np.int64]:
        """The chain's own graph, some texts at a time: their random numbers are there at once."""
        n, length = tokens.shape
        together = DEFAULT_MICRO_BATCH if micro_batch is None else micro_batch
        common: dict[str, NDArray[np.generic]] = {
            "levels": np.array([steps[0][0], *(t_to for _, t_to in steps)]),
            "temperature": np.array(temperature, dtype=np.float64),
        }
        for part in parts(n, min(together, max(1, _RANDOM_BYTES // (16 * length * len(steps))))):
            samples = range(n)[part]
            own: dict[str, NDArray[np.generic]] = {
                "tokens": tokens[part],
                "uniform": random_numbers(samples, steps=len(steps), length=length, seed=seed),
            }
            (tokens[part],) = self.run_chain(common | own, [(np.int64, tokens[part].shape)])
            if on_step is not None:
                on_step(len(steps) * samples.stop // n)
        return tokens

    def logits(self, tokens: NDArray[np.int64], t: float, wanted: NDArray[np.bool_]) -> Values:
        """Logits [wanted, vocabulary] at the wanted places of tokens [some, length], by the block that owns t."""
        found: Values = self.run_block(self.partition.block_of(t), tokens, np.full(len(tokens), t, np.float32))[wanted]
        return found

    def run_block(self, block: int, tokens: NDArray[np.int64], t: Values) -> Values:
        """One block's logits [b, length, vocabulary], whichever times it owns."""
        return self.run_graph(block, {"z": tokens, "t": t}, [(*tokens.shape, self.manifest.vocabulary)])[0]
