"""Does a chain in one file give what torch gives, and what the blocks give that it was made of?"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeblocks.data.dataset import DataSet
from edgeblocks.diffusion.autoregression import CachedPredict, Network, Window, random_numbers
from edgeblocks.diffusion.solver import Solver
from edgeblocks.diffusion.token_choice import choose_tokens
from edgeblocks.export.chain_window import ChainWindow
from edgeblocks.export.classifier import Classifier
from edgeblocks.export.continuer import Continuer
from edgeblocks.export.manifest_figures import ChainVerified
from edgeblocks.export.onnx_chain import ExportedChain
from edgeblocks.export.sampler import Sampler
from edgeblocks.export.tolerances import NUM_OUTPUTS, largest_difference
from edgeblocks.export.verify import (
    OUTPUT_LIMIT,
    Listener,
    decoder_of,
    enforce,
    output_difference,
    real_data,
    shown_pixels,
    torch_texts,
)
from edgeblocks.export.verify_text import example_prompt
from edgeblocks.export.writer import Writer
from edgeblocks.inference.block_runner import BlockRunner
from edgeblocks.progress import Silent
from edgeblocks.runs.directory import RunDirectory

GUIDANCE = 2.0
SOLVERS: tuple[Solver, ...] = ("heun", "euler")
ONE_LEVEL = 1 / 255
OTHER_TEXTS_LIMIT = 0.25
"""One token in thousands lies so near to a boundary that rounding decides on it, and then its text is another."""


def verify_chain(
    run: RunDirectory, runner: BlockRunner, walk: ExportedChain, chain: ExportedChain, listener: Listener
) -> ChainVerified:
    """Compare what a chain in one file makes with torch's, and with that of its blocks one after the other.

    With rounded weights it is compared with its blocks alone: how far these are from torch was measured.

    Args:
        runner: the run's blocks with their EMA weights.
        walk: the blocks, exported and verified.
        chain: the same directory with its graph of the whole chain.

    Raises:
        EdgeblocksError: a difference is larger than its limit.
    """
    listener.stage("verifying the chain")
    data_set = real_data(run, Silent())
    limit = OTHER_TEXTS_LIMIT if isinstance(chain, Writer) else OUTPUT_LIMIT
    of_torch = None if walk.manifest.rounding else _from_torch(run, runner, walk, chain, data_set)
    if isinstance(chain, Writer):
        assert isinstance(walk, Writer)
        of_walk = _other_texts(chain, lambda temperature: walk.write_tokens(NUM_OUTPUTS, temperature=temperature)[0])
    elif isinstance(chain, Continuer):
        assert isinstance(walk, Continuer)
        of_walk = _token_difference(run, chain, walk.continued, data_set)
    else:
        outputs = _outputs(run, walk, chain, data_set)
        of_walk = max(largest_difference(found, expected) for found, expected in outputs)
    walk.close()
    chain.close()
    if of_torch is not None:
        enforce("the chain in one file", of_torch, limit, f"against torch, {NUM_OUTPUTS} outputs")
    enforce("the chain in one file", of_walk, limit, f"against its blocks, {NUM_OUTPUTS} outputs")
    against = "" if of_torch is None else f"torch {of_torch:.1e}, "
    listener.note(f"the chain in one file against {against}its blocks {of_walk:.1e} (limit {limit:.0e})")
    return ChainVerified(torch_difference=of_torch, walk_difference=of_walk, limit=limit)


def _from_torch(
    run: RunDirectory, runner: BlockRunner, walk: ExportedChain, chain: ExportedChain, data_set: DataSet | None
) -> float:
    """How far what a chain in one file makes is from torch's."""
    if isinstance(chain, Writer):
        assert isinstance(walk, Writer)
        own = {"micro_batch": runner.micro_batch}
        return _other_texts(chain, lambda one: torch_texts(run, runner.logits, walk, temperature=one, **own))
    if isinstance(chain, Continuer):
        return _token_difference(run, chain, runner.continued, data_set)
    return output_difference(run, runner, chain, data_set, decoder=decoder_of(run))[0]


def _outputs(
    run: RunDirectory, walk: ExportedChain, chain: ExportedChain, data_set: DataSet | None
) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """What both make, in the ways in which they can be asked: also with other levels than those of the manifest."""
    fewest, usual = walk.manifest.num_blocks, walk.manifest.sampler.steps
    if isinstance(chain, Sampler):
        assert isinstance(walk, Sampler)
        for steps in sorted({fewest, usual}):
            for solver in SOLVERS:
                for guidance in (1.0, GUIDANCE) if chain.conditional else (1.0,):
                    made = (
                        one.sample_both(NUM_OUTPUTS, steps=steps, solver=solver, guidance=guidance)
                        for one in (chain, walk)
                    )
                    (found, pictures), (expected, _) = made
                    yield found, expected
                    assert pictures is not None
                    _check_pictures(pictures, walk.pictures(expected))
    elif isinstance(chain, Classifier):
        assert isinstance(walk, Classifier)
        pixels = shown_pixels(run, chain, data_set)
        for steps, noises in {(fewest, 1), (usual, walk.manifest.sampler.noises)}:
            found = chain.classify(pixels, steps=steps, noises=noises, seed=1)
            yield found, walk.classify(pixels, steps=steps, noises=noises, seed=1)


def _check_pictures(found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> None:
    """Values that lie between two of the 256 levels may be rounded to either."""
    most = int(np.abs(found.astype(int) - expected).max())
    enforce("the chain in one file", most / 255, ONE_LEVEL, "pictures, as shares of white")


def _other_texts(chain: Writer, texts_of: Callable[[float], NDArray[np.int64]]) -> float:
    """The share of the texts that are others than those of a temperature."""
    temperatures = (chain.manifest.sampler.temperature, 0.0)
    both = ((chain.write_tokens(NUM_OUTPUTS, temperature=one)[0], texts_of(one)) for one in temperatures)
    return max(float((found != expected).any(axis=1).mean()) for found, expected in both)


def _token_difference(run: RunDirectory, chain: Continuer, network: Network, data_set: DataSet | None) -> float:
    """The largest difference of the probabilities of each token of a network's texts; infinite for another choice."""
    settings = chain.manifest.sampler
    prompt, length = example_prompt(run, data_set)
    how = chain.token_chain(settings.steps, length=length)
    noise, uniform = random_numbers(how, range(NUM_OUTPUTS), seed=0)
    predict, window = CachedPredict(network, how), Window(how, noise)
    own = ChainWindow(chain.run_chain, how, noise)
    for one in (window, own):
        one.tokens[:, : len(prompt)] = prompt
    window.fill(predict, len(prompt))
    own.fill(len(prompt))
    worst = 0.0
    choices = [(settings.temperature, settings.top_p), (0.0, 1.0), (0.7, 0.6)]
    for position in range(len(prompt), length):
        temperature, top_p = choices[position % len(choices)]
        expected = window.probabilities_at(predict, position)
        drawn = uniform[:, position]
        token, found = own.next_token(position, drawn, temperature=temperature, top_p=top_p)
        worst = max(worst, largest_difference(found.astype(np.float32), expected.astype(np.float32)))
        if (token != choose_tokens(found, drawn, temperature=temperature, top_p=top_p)).any():
            return float("inf")
        # The network's tokens go on, for both: after one token that differs, two chains write two texts.
        chosen = choose_tokens(expected, drawn, temperature=temperature, top_p=top_p)
        window.tokens[:, position] = own.tokens[:, position] = chosen
    return worst
