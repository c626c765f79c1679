"""The chains that write text as graphs: by unmasking all steps in one run, token by token one token a run.

The arithmetic is that of `diffusion.unmasking`, `diffusion.autoregression` and `diffusion.token_choice`, with float64
where Python and numpy have it there.
"""

from collections.abc import Sequence

from edgeblocks.diffusion.autoregression import LEAST_READ_SIGMA
from edgeblocks.diffusion.codebook import code_rows
from edgeblocks.export.chain_graphs import Signature, bounded, for_each, integrate, named, value
from edgeblocks.export.graph_builder import DOUBLE, FLOAT, INT, Body, Nodes
from edgeblocks.export.linked_blocks import Inputs, LinkedBlocks, Rows
from edgeblocks.export.manifest_types import ContinuationManifest, TextManifest


def text(nodes: Nodes, blocks: LinkedBlocks, manifest: TextManifest) -> Signature:
    """tokens with gaps, the ends of the steps, a step's random numbers, temperature -> tokens (`unmasking.unmask`)."""
    length = manifest.length
    inputs = [
        value("tokens", INT, "batch", length),
        value("levels", DOUBLE, "ends"),
        value("uniform", DOUBLE, "steps", "batch", 2, length),
        value("temperature", DOUBLE),
    ]
    one = nodes.constant(1, "int64")
    steps = nodes("Sub", nodes("Size", "levels"), one)
    last = nodes("Sub", steps, one)
    mask = nodes.constant(manifest.vocabulary, "int64")

    def step(inner: Nodes, number: str, carried: Sequence[str]) -> Sequence[str]:
        (tokens,) = carried
        t_from, t_to = inner.item("levels", number), inner.item("levels", inner("Add", number, one))
        # Of the masked tokens the share that is unmasked; in the last step all are.
        share = inner("Div", inner("Sub", t_from, t_to), t_from)
        share = inner("Where", inner("Equal", number, last), inner.constant(1, "float64"), share)
        draws = inner.item("uniform", number)
        picked = inner("Less", inner.item(draws, inner.constant(0, "int64"), axis=1), share)
        chosen = inner("And", inner("Equal", tokens, mask), picked)
        concerned = inner("ReduceMax", inner.cast(chosen, INT), inner.whole(1), keepdims=0)
        rows = inner("Squeeze", inner("NonZero", concerned), inner.whole(0))
        middle = inner("Div", inner("Add", t_from, t_to), inner.constant(2, "float64"))

        def unmasked(some: Nodes) -> list[str]:
            part = some("Gather", tokens, rows)
            given = {"z": part, "t": for_each(some, middle, part)}
            (logits,) = blocks.call(some, blocks.owner(some, middle), given, [FLOAT])
            places = some("Transpose", some("NonZero", some("Gather", chosen, rows)), perm=[1, 0])
            uniform = some("Gather", some.item(draws, one, axis=1), rows)
            drawn = _drawn(some, some("GatherND", logits, places), some("GatherND", uniform, places))
            filled = some("ScatterND", part, places, drawn)
            return [some("ScatterND", tokens, some("Unsqueeze", rows, some.whole(1)), filled)]

        # Where nothing is unmasked no network runs, and of the others only the texts concerned go through it.
        some_rows = inner("Greater", inner("Size", rows), inner.constant(0, "int64"))
        return inner.branch(some_rows, unmasked, lambda _: [tokens], [INT])

    (tokens,) = nodes.loop(bounded(nodes, steps), [("tokens", INT)], step)
    named(nodes, tokens, "written")
    return inputs, [value("written", INT, "batch", length)]


def continuation(nodes: Nodes, blocks: LinkedBlocks, manifest: ContinuationManifest) -> Signature:
    """One token: what its text has so far, noise, caches, temperature -> the token, and the caches for the next.

    The last of the `n` positions is that of the token; those before it are known and go into the caches, as a whole
    prompt does. Of families whose caches hold noised codes (a set a step) the position before it is known only now, so
    that it is given again, and the last position's entries are not kept.
    """
    caches, vocabulary = manifest.caches, manifest.vocabulary
    heads, head_width, width = caches.heads, caches.head_width, manifest.code_width
    inputs = [
        value("tokens", INT, "batch", "n"),
        value("noise", FLOAT, "batch", "n", width),
        value("past", FLOAT, "caches", "batch", heads, "positions", head_width),
        value("levels", DOUBLE, "steps"),
        value("uniform", DOUBLE, "batch"),
        value("temperature", DOUBLE),
        value("top_p", DOUBLE),
    ]
    zero = nodes.constant(0, "int64")
    first, end = nodes.whole(0), nodes.whole(2**62)
    codes = nodes.constant(code_rows(vocabulary, width), "float32")
    new, batch = nodes.length("tokens", 1), nodes.length("tokens", 0)
    known = nodes("Sub", new, nodes.whole(1))
    # A known position's token is what the next one reads.
    known_codes = nodes("Gather", codes, nodes.part("tokens", nodes.whole(1), end, axis=1))
    start = nodes.item("noise", nodes.constant(-1, "int64"), axis=1)
    owners, starts, ends = _cache_rows(nodes, blocks, manifest)
    fresh_shape = nodes(
        "Concat", nodes.length("past", 0), batch, nodes.whole(heads), new, nodes.whole(head_width), axis=0
    )
    fresh = nodes("ConstantOfShape", fresh_shape)
    total = nodes.cast(nodes("ConstantOfShape", nodes("Concat", batch, nodes.whole(vocabulary), axis=0)), DOUBLE)

    def denoise(inner: Nodes, number: str, sigma: str, state: Sequence[str]) -> Sequence[str]:
        z, total, fresh = state
        owner = inner.item(owners, number)
        own = Rows(value="past", first=inner.item(starts, number), end=inner.item(ends, number))
        noise = inner("Mul", inner.part("noise", first, known, axis=1), inner.cast(sigma, FLOAT))
        states = inner("Add", known_codes, noise)
        states = inner("Concat", states, inner("Unsqueeze", z, inner.whole(1)), axis=1)
        sigmas = inner("Expand", inner.cast(sigma, FLOAT), batch)
        given: Inputs = {"z": states, "sigma": sigmas, "tokens": "tokens", "past": own}
        logits, present = blocks.call(inner, owner, given, [FLOAT, FLOAT])
        probabilities = inner("Softmax", inner.item(logits, inner.constant(-1, "int64"), axis=1), axis=-1)
        # Where levels share the caches of their block they write the same keys and values of known positions.
        least, most = (inner("Reshape", one, inner.whole(1)) for one in (own.first, own.end))
        rest = inner.part(fresh, first, least, axis=0), inner.part(fresh, most, end, axis=0)
        fresh = inner("Concat", rest[0], present, rest[1], axis=0)
        # Levels near the top are read, see `autoregression.read_levels`.
        high = inner("GreaterOrEqual", sigma, inner.constant(LEAST_READ_SIGMA, "float64"))
        read = inner.cast(inner("Or", high, inner("Equal", number, zero)), DOUBLE)
        total = inner("Add", total, inner("Mul", inner.cast(probabilities, DOUBLE), read))
        return [inner("MatMul", probabilities, codes), total, fresh]

    _, total, fresh = integrate(nodes, denoise, [start, total, fresh], [FLOAT, DOUBLE, FLOAT], heun=None)
    probabilities = nodes("Div", total, _num_read(nodes))
    named(nodes, _chosen(nodes, probabilities), "token")
    named(nodes, probabilities, "probabilities")
    if caches.per == "step":
        fresh = nodes.part(fresh, first, known, axis=3)
    named(nodes, nodes("Concat", "past", fresh, axis=3), "present")
    return inputs, [
        value("token", INT, "batch"),
        value("probabilities", DOUBLE, "batch", vocabulary),
        value("present", FLOAT, "caches", "batch", heads, "positions_now", head_width),
    ]


def _cache_rows(nodes: Nodes, blocks: LinkedBlocks, manifest: ContinuationManifest) -> tuple[str, str, str]:
    """Of each level the block that owns it, and where its caches begin and end among those of all."""
    caches = manifest.caches
    owners = blocks.owner(nodes, "levels")
    sizes = nodes("Gather", nodes.constant(caches.num_caches, "int64"), owners)
    if caches.per == "block":
        ends = nodes("Gather", nodes.constant(_sums(caches.num_caches), "int64"), owners)
    else:
        ends = nodes("CumSum", sizes, nodes.constant(0, "int64"))
    return owners, nodes("Sub", ends, sizes), ends


def _num_read(nodes: Nodes) -> str:
    """At how many levels probabilities are read."""
    high = nodes.cast(nodes("GreaterOrEqual", "levels", nodes.constant(LEAST_READ_SIGMA, "float64")), INT)
    read = nodes("Max", nodes("ReduceSum", high, keepdims=0), nodes.constant(1, "int64"))
    return nodes.cast(read, DOUBLE)


def _sums(numbers: Sequence[int]) -> list[int]:
    return [sum(numbers[: place + 1]) for place in range(len(numbers))]


def _drawn(nodes: Nodes, logits: str, uniform: str) -> str:
    """`unmasking._drawn`: a token for each row of logits, by one uniform number each."""

    def by_chance(inner: Nodes) -> list[str]:
        scaled = inner("Sub", inner.cast(logits, DOUBLE), inner.cast(_largest(inner, logits), DOUBLE))
        return [_token_at(inner, inner("Exp", inner("Div", scaled, "temperature")), uniform)]

    return _likeliest_or(nodes, logits, by_chance)


def _chosen(nodes: Nodes, probabilities: str) -> str:
    """`token_choice.choose_tokens`."""

    def by_chance(inner: Nodes) -> list[str]:
        logarithms = inner("Sub", inner("Log", probabilities), inner("Log", _largest(inner, probabilities)))
        weights = inner("Exp", inner("Div", logarithms, "temperature"))
        whole = inner("GreaterOrEqual", "top_p", inner.constant(1, "float64"))
        (weights,) = inner.branch(whole, lambda _: [weights], lambda some: [_nucleus(some, weights)], [DOUBLE])
        return [_token_at(inner, weights, "uniform")]

    return _likeliest_or(nodes, probabilities, by_chance)


def _likeliest_or(nodes: Nodes, scores: str, by_chance: Body) -> str:
    """The token with the highest score at a temperature of 0."""
    cold = nodes("Equal", "temperature", nodes.constant(0, "float64"))
    (token,) = nodes.branch(cold, lambda inner: [inner("ArgMax", scores, axis=1, keepdims=0)], by_chance, [INT])
    return token


def _nucleus(nodes: Nodes, weights: str) -> str:
    """`token_choice.nucleus`: TopK gives equals in the tokens' order, as a stable sort does."""
    ordered, order = nodes.several("TopK", weights, nodes.length(weights, 1), num_outputs=2, axis=1)
    sums = nodes("CumSum", ordered, nodes.constant(1, "int64"))
    share = nodes("Mul", "top_p", _last_column(nodes, sums))
    # A token is out if those before it have the share already, so the likeliest always stays.
    before = nodes("CumSum", ordered, nodes.constant(1, "int64"), exclusive=1)
    reached_before = nodes("GreaterOrEqual", before, share)
    kept = nodes("Where", reached_before, nodes.constant(0, "float64"), ordered)
    return nodes("ScatterElements", weights, order, kept, axis=1)


def _token_at(nodes: Nodes, weights: str, uniform: str) -> str:
    """`token_choice.token_at`."""
    sums = nodes("CumSum", weights, nodes.constant(1, "int64"))
    share = nodes("Mul", nodes("Unsqueeze", uniform, nodes.whole(1)), _last_column(nodes, sums))
    below = nodes("ReduceSum", nodes.cast(nodes("LessOrEqual", sums, share), INT), nodes.whole(1), keepdims=0)
    last = nodes("Sub", nodes.length(weights, 1), nodes.whole(1))
    return nodes("Min", below, last)


def _largest(nodes: Nodes, rows: str) -> str:
    return nodes("ReduceMax", rows, nodes.whole(1))


def _last_column(nodes: Nodes, rows: str) -> str:
    return nodes.part(rows, nodes.whole(-1), nodes.whole(2**62), axis=1)
