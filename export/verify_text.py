"""Does an exported chain write token by token as torch does? Its blocks with keys and values, and whole texts."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from edgeblocks.data.dataset import DataSet
from edgeblocks.diffusion.autoregression import write_texts
from edgeblocks.diffusion.token_choice import Tokens, Values, softmax
from edgeblocks.export.continuer import Continuer
from edgeblocks.export.tolerances import BATCH, NUM_OUTPUTS, check_finite, largest_difference, levels_of
from edgeblocks.families.base import TextInfo
from edgeblocks.inference.block_runner import BlockRunner
from edgeblocks.runs.directory import RunDirectory

PROMPT_TOKENS = 8
MOST_TOKENS = 64
"""Of each text that is written."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Positions start to stop of some texts; `what` names them in a message."""

    what: str
    z: Values
    sigma: Values
    inputs: Tokens
    start: int
    stop: int


def block_difference(
    run: RunDirectory, runner: BlockRunner, chain: Continuer, data_set: DataSet | None, block: int
) -> tuple[float, str]:
    """The largest difference of a block's probabilities, keys and values, and the input that shows it."""
    network = runner.network(block)
    worst, worst_where = -1.0, ""
    for case in _segments(run, data_set, block):
        given = [torch.from_numpy(array) for array in (case.z, case.sigma, case.inputs)]
        before, part = slice(0, case.start), slice(case.start, case.stop)
        with torch.no_grad():
            # A KV cache of no position, of the network's own shape: one graph takes a text's beginning and what
            # follows.
            empty = network(given[0][:, :1], given[1], given[2][:, :1])[1][:, :, :, :0]
            past = network(given[0][:, before], given[1], given[2][:, before])[1] if case.start else empty
            logits, present = network(given[0][:, part], given[1], given[2][:, part], past)
        found = chain.run_block(block, case.z[:, part], case.sigma, case.inputs[:, part], past.numpy())
        for own, other in zip((softmax(logits.numpy()), present.numpy()), (softmax(found[0]), found[1]), strict=True):
            check_finite(own, f"block {block}")
            difference = largest_difference(other, own)
            if difference > worst:
                worst, worst_where = difference, f"{case.what}, batch {len(case.z)}"
    return worst, worst_where


def _segments(run: RunDirectory, data_set: DataSet | None, block: int) -> Iterator[Segment]:
    """Texts over the noise range of a block with both its ends: whole, one token at the end, and two in the middle."""
    family, levels = run.family(), levels_of(run.partition.ranges[block])
    assert family.task == "continuation"
    length = family.data.length
    random = np.random.default_rng([run.settings.run.seed, block])
    z = random.standard_normal((BATCH, *family.state_shape), dtype=np.float32)
    for what, tokens in _texts(family.data, data_set, random).items():
        inputs = np.insert(tokens[:, :-1], 0, family.data.vocabulary, axis=1)
        middle = length // 2
        for start, stop in sorted({(0, length), (length - 1, length), (middle, min(middle + 2, length))}):
            yield Segment(
                what=f"{what}, positions {start} to {stop - 1}, sigma {levels[0]:.4g} to {levels[-1]:.4g}",
                z=z * levels[:, None, None],
                sigma=levels,
                inputs=inputs,
                start=start,
                stop=stop,
            )
        yield Segment(
            what=f"{what}, one alone", z=z[:1], sigma=levels[:1], inputs=inputs[:1], start=length - 1, stop=length
        )


def _texts(data: TextInfo, data_set: DataSet | None, random: np.random.Generator) -> dict[str, Tokens]:
    """Tokens [5, length]: random ones, and the run's own text."""
    texts = {"random tokens": random.integers(0, data.vocabulary, (BATCH, data.length))}
    if data_set is not None:
        texts["real text"] = np.resize(data_set.gather(data_set.evaluation_indices(BATCH))[0], (BATCH, data.length))
    return texts


def example_prompt(run: RunDirectory, data_set: DataSet | None) -> tuple[Tokens, int]:
    """Some tokens of the run's text, or random ones, and how long the texts are that begin with them."""
    data = run.data
    assert isinstance(data, TextInfo)
    *_, tokens = _texts(data, data_set, np.random.default_rng(run.settings.run.seed)).values()
    length = min(data.length, MOST_TOKENS)
    return tokens[0, : min(PROMPT_TOKENS, length - 1)], length


def text_difference(
    run: RunDirectory, runner: BlockRunner, continuer: Continuer, data_set: DataSet | None
) -> tuple[float, float]:
    """Of the probabilities at each level of each token of torch's texts, and the share of tokens that both write."""
    settings = continuer.manifest.sampler
    prompt, length = example_prompt(run, data_set)
    chain = continuer.token_chain(settings.steps, length=length)
    worst = 0.0

    def both(block: int, z: Values, sigma: Values, inputs: Tokens, past: Values) -> tuple[Values, Values]:
        nonlocal worst
        expected, present = runner.continued(block, z, sigma, inputs, past)
        check_finite(expected, "the chain")
        found, _ = continuer.continued(block, z, sigma, inputs, past)
        worst = max(worst, largest_difference(softmax(found), softmax(expected)))
        # Torch's keys and values go on, for both: a difference would otherwise be handed from token to token.
        return expected, present

    expected = write_texts(
        both,
        chain,
        prompt=prompt,
        n=NUM_OUTPUTS,
        together=NUM_OUTPUTS,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=0,
    )
    found = continuer.write_tokens(NUM_OUTPUTS, prompt, length=length, micro_batch=runner.micro_batch)
    return worst, float((found == expected).mean())
