"""Text that an exported directory writes token by token: numpy and onnxruntime, no torch."""

from collections.abc import Callable, Iterable

import numpy as np

from edgeblocks.data.tokenizer import check_readable
from edgeblocks.diffusion.autoregression import (
    TokenChain,
    check_continuing,
    check_prompt,
    random_numbers,
    write_texts,
    writing_bytes,
)
from edgeblocks.diffusion.codebook import code_rows
from edgeblocks.diffusion.noise import sampler_levels
from edgeblocks.diffusion.token_choice import Tokens, Values, check_options
from edgeblocks.export.chain_window import ChainWindow
from edgeblocks.export.manifest import exported_tokenizer
from edgeblocks.export.manifest_types import ContinuationManifest
from edgeblocks.export.onnx_chain import DEFAULT_MICRO_BATCH, ExportedChain, parts


class Continuer(ExportedChain):
    """An exported chain that writes text token by token. Every token runs all blocks, so all stay loaded."""

    manifest: ContinuationManifest
    keeps_all = True

    def held_bytes(self, n: int) -> int:
        """The codes of all tokens, and what writing keeps of each text that is written together."""
        manifest, caches = self.manifest, self.manifest.caches
        sets = 1 if caches.per == "block" else manifest.sampler.steps
        text_bytes = writing_bytes(
            length=manifest.length,
            num_caches=sum(caches.num_caches) * sets,
            width=caches.heads * caches.head_width,
            vocabulary=manifest.vocabulary,
            code_width=manifest.code_width,
        )
        return 4 * manifest.vocabulary * manifest.code_width + min(n, DEFAULT_MICRO_BATCH) * text_bytes

    def write(
        self,
        n: int,
        *,
        steps: int | None = None,
        temperature: float | None = None,
        prompt: str | None = None,
        top_p: float | None = None,
        fill: str | None = None,
        length: int | None = None,
        seed: int = 0,
        micro_batch: int | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Texts which begin with `prompt`.

        Args:
            steps: noise levels of each token's chain, at least one a block; None: as the manifest says.
            temperature: 1 draws as the network was trained, 0 takes the likeliest token; None: as the manifest says.
            top_p: draw from the smallest set of the likeliest tokens with this probability; None: as the manifest says.
            fill: refused; it belongs to networks that fill gaps.
            length: tokens of a text with its prompt, at most as many as the network was trained on; None: that many.
            on_token: called with the tokens written, and how many there will be.

        Raises:
            ConfigError: an impossible argument.
            RunError: a file is missing or damaged.
        """
        check_options(self.manifest.task, fill=fill, prompt=prompt, top_p=top_p)
        tokenizer = exported_tokenizer(self.directory, self.manifest)
        check_readable("--prompt", prompt or "", tokenizer)
        tokens = self.write_tokens(
            n,
            tokenizer.encode(prompt or ""),
            steps=steps,
            temperature=temperature,
            top_p=top_p,
            length=length,
            seed=seed,
            micro_batch=micro_batch,
            on_token=on_token,
        )
        return [tokenizer.decode(row) for row in tokens]

    def write_tokens(
        self,
        n: int,
        prompt: Tokens,
        *,
        steps: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        length: int | None = None,
        seed: int = 0,
        micro_batch: int | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> Tokens:
        """As `write`, before the tokens become text: [n, length]; None is the length of the training's texts."""
        settings = self.manifest.sampler
        steps = settings.steps if steps is None else steps
        temperature = settings.temperature if temperature is None else temperature
        top_p = settings.top_p if top_p is None else top_p
        trained_length = self.manifest.length
        check_continuing(
            n=n, steps=steps, temperature=temperature, top_p=top_p, length=length, trained_length=trained_length
        )
        chain = self.token_chain(steps, length=length)
        check_prompt(prompt, length=chain.length, trained_length=trained_length)
        together = DEFAULT_MICRO_BATCH if micro_batch is None else micro_batch
        try:
            if self.in_one_file:
                return self._in_one_file(chain, prompt, parts(n, together), temperature, top_p, seed, on_token)
            return write_texts(
                self.continued,
                chain,
                prompt=prompt,
                n=n,
                together=together,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                on_token=on_token,
            )
        finally:
            self.close()

    def _in_one_file(
        self,
        chain: TokenChain,
        prompt: Tokens,
        groups: Iterable[slice],
        temperature: float,
        top_p: float,
        seed: int,
        on_token: Callable[[int, int], None] | None,
    ) -> Tokens:
        """`write_texts` with the chain's own graph, once a token."""
        samples = [range(part.start, part.stop) for part in groups]
        positions = range(len(prompt), chain.length)
        texts = []
        for done, some in enumerate(samples):
            noise, uniform = random_numbers(chain, some, seed=seed)
            window = ChainWindow(self.run_chain, chain, noise)
            window.tokens[:, : len(prompt)] = prompt
            window.fill(len(prompt))
            for position in positions:
                window.tokens[:, position], _ = window.next_token(
                    position, uniform[:, position], temperature=temperature, top_p=top_p
                )
                if on_token is not None:
                    written = done * len(positions) + position - len(prompt) + 1
                    on_token(written, len(samples) * len(positions))
            texts.append(window.tokens)
        return np.concatenate(texts)

    def token_chain(self, steps: int, *, length: int | None = None) -> TokenChain:
        """How a token is written, over `steps` noise levels."""
        manifest = self.manifest
        levels = sampler_levels(self.partition, num_steps=steps)
        return TokenChain(
            codes=code_rows(manifest.vocabulary, manifest.code_width),
            length=manifest.length if length is None else length,
            levels=levels,
            blocks=tuple(self.partition.block_of(sigma) for sigma in levels),
            caches_per=manifest.caches.per,
            num_caches=manifest.caches.num_caches,
            heads=manifest.caches.heads,
            head_width=manifest.caches.head_width,
        )

    def continued(self, block: int, z: Values, sigma: Values, inputs: Tokens, past: Values) -> tuple[Values, Values]:
        """An `autoregression.Network`: logits of the last position, and the keys and values of all for the KV cache."""
        logits, present = self.run_block(block, z, sigma, inputs, past)
        return logits[:, -1], present

    def run_block(self, block: int, z: Values, sigma: Values, inputs: Tokens, past: Values) -> tuple[Values, Values]:
        """One block's logits [b, n, vocabulary] and keys and values, whichever noise levels it owns."""
        batch, new = inputs.shape
        caches = self.manifest.caches
        shapes = [
            (batch, new, self.manifest.vocabulary),
            (caches.num_caches[block], batch, caches.heads, new, caches.head_width),
        ]
        logits, present = self.run_graph(block, {"z": z, "sigma": sigma, "tokens": inputs, "past": past}, shapes)
        return logits, present
