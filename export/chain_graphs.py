"""The chains of images and their classes as graphs: all noise levels in one loop, each run by the block that owns it.

The arithmetic is that of `diffusion.solver`, operation by operation and in its order. Levels are float64, as Python's
numbers are there, and become float32 where they meet an array.
"""

from collections.abc import Callable, Sequence

from onnx import ValueInfoProto, helper

from edgeblocks.export.graph_builder import BOOL, BYTE, DOUBLE, FLOAT, INT, Nodes
from edgeblocks.export.linked_blocks import LinkedBlocks
from edgeblocks.export.manifest_types import ImageManifest
from edgeblocks.limits import MOST_ROUNDS

Signature = tuple[list[ValueInfoProto], list[ValueInfoProto]]
"""What a graph takes and gives."""
Denoise = Callable[[Nodes, str, str, Sequence[str]], Sequence[str]]
"""Given the level's number, the level, and [z, *others]: the denoised z, and the others as the next level gets them."""


def value(name: str, kind: int, *shape: int | str) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def named(nodes: Nodes, output: str, name: str) -> None:
    """Give a value the name of an output."""
    nodes.nodes.append(helper.make_node("Identity", [output], [name], name=name))


def images(nodes: Nodes, blocks: LinkedBlocks, manifest: ImageManifest) -> Signature:
    """noise, levels, heun (else Euler), and where there are classes labels and guidance -> images and their pixels.

    Of latents the pixels are those of the pictures that the decoder makes of them.
    """
    channels, height, width = manifest.image_shape
    conditional = manifest.num_classes > 0
    inputs = [
        value("noise", FLOAT, "batch", channels, height, width),
        value("levels", DOUBLE, "steps"),
        value("heun", BOOL),
    ]
    if conditional:
        inputs += [value("labels", INT, "batch"), value("guidance", FLOAT)]
        labels, copies = _guided_labels(nodes, manifest.num_classes)
    batch = nodes.length("noise", 0)

    def denoise(inner: Nodes, _number: str, sigma: str, state: Sequence[str]) -> Sequence[str]:
        seen = inner("Tile", state[0], copies) if conditional else state[0]
        given = {"z": seen, "sigma": for_each(inner, sigma, seen)}
        if conditional:
            given["labels"] = labels
        (denoised,) = blocks.call(inner, blocks.owner(inner, sigma), given, [FLOAT])
        if not conditional:
            return [denoised]
        # D_null + guidance (D_class - D_null), see `solver.guide`. Without guidance both are the same.
        first = inner.part(denoised, inner.whole(0), batch, axis=0)
        last = inner.part(denoised, inner("Neg", batch), inner.length(denoised, 0), axis=0)
        return [inner("Add", last, inner("Mul", inner("Sub", first, last), "guidance"))]

    (z,) = integrate(nodes, denoise, ["noise"], [FLOAT], heun="heun")
    named(nodes, z, "images")
    shown = _shown(nodes, z, manifest)
    named(
        nodes, _pixels(nodes, shown) if manifest.decoding is None else _decoded(nodes, blocks, shown, batch), "pixels"
    )
    picture = manifest.picture
    return inputs, [
        value("images", FLOAT, "batch", channels, height, width),
        value("pixels", BYTE, "batch", picture.height, picture.width, picture.channels),
    ]


def classes(nodes: Nodes, blocks: LinkedBlocks, manifest: ImageManifest) -> Signature:
    """pixels, levels and the noise of each chain of each image -> probabilities, the mean over chains and levels."""
    channels, height, width = manifest.image_shape
    inputs = [
        value("pixels", BYTE, "batch", height, width, channels),
        value("noise", FLOAT, "noises", "batch", manifest.num_classes),
        value("levels", DOUBLE, "steps"),
    ]
    noises = nodes.length("noise", 0)
    of_images = nodes("Concat", noises, nodes.whole(1, 1, 1), axis=0)
    seen = nodes("Tile", _to_model(nodes, manifest), of_images)
    # All chains of all images are rows: [noises * batch, classes].
    z = nodes("Reshape", "noise", nodes.whole(-1, manifest.num_classes))
    zeros = nodes("ConstantOfShape", nodes("Shape", z))

    def denoise(inner: Nodes, _number: str, sigma: str, state: Sequence[str]) -> Sequence[str]:
        z, total = state
        given = {"z": z, "sigma": for_each(inner, sigma, z), "images": seen}
        (denoised,) = blocks.call(inner, blocks.owner(inner, sigma), given, [FLOAT])
        return [denoised, inner("Add", total, denoised)]

    _, total = integrate(nodes, denoise, [z, zeros], [FLOAT, FLOAT], heun=None)
    per_chain = nodes("Reshape", total, nodes("Shape", "noise"))
    num_answers = nodes("Mul", nodes("Size", "levels"), nodes.single(noises))
    summed = nodes("ReduceSum", per_chain, nodes.whole(0), keepdims=0)
    named(nodes, nodes("Div", summed, nodes.cast(num_answers, FLOAT)), "probabilities")
    return inputs, [value("probabilities", FLOAT, "batch", manifest.num_classes)]


def integrate(
    nodes: Nodes, denoise: Denoise, state: Sequence[str], types: Sequence[int], *, heun: str | None
) -> list[str]:
    """`solver.integrate` over the input `levels`, down to 0: one round a run of the network.

    Args:
        state: standard normal noise, and what else `denoise` carries from run to run.
        heun: a truth value, whether Heun's solver is taken; None is Euler's, always.

    Source: Karras et al. 2022, arXiv 2206.00364, algorithm 1.
    """
    one, two = nodes.constant(1, "int64"), nodes.constant(2, "int64")
    steps = nodes("Size", "levels")
    ends = nodes("Concat", "levels", nodes.constant([0.0], "float64"), axis=0)
    highest = nodes.item("levels", nodes.constant(0, "int64"))
    noise, *others = state
    z = nodes("Mul", noise, nodes.cast(highest, FLOAT))
    if heun is None:
        runs = steps
    else:
        order = nodes("Add", nodes.cast(heun, INT), one)
        # Heun's solver runs the network twice a level, except at the last one.
        runs = nodes("Add", nodes("Mul", nodes("Sub", steps, one), order), one)

    def euler(inner: Nodes, number: str, carried: Sequence[str]) -> Sequence[str]:
        sigma, sigma_next = inner.item(ends, number), inner.item(ends, inner("Add", number, one))
        z, *rest = carried
        denoised, *rest = denoise(inner, number, sigma, [z, *rest])
        slope = inner("Div", inner("Sub", z, denoised), inner.cast(sigma, FLOAT))
        way = inner.cast(inner("Sub", sigma_next, sigma), FLOAT)
        return [inner("Add", inner("Mul", slope, way), z), *rest]

    def either(inner: Nodes, number: str, carried: Sequence[str]) -> Sequence[str]:
        # `start` and `slope` are those of the first run at a level, for the second one.
        z, start, slope, *rest = carried
        step = inner("Div", number, order)
        second = inner.cast(inner("Mod", number, order), BOOL)
        sigma, sigma_next = inner.item(ends, step), inner.item(ends, inner("Add", step, one))
        level = inner("Where", second, sigma_next, sigma)
        denoised, *rest = denoise(inner, step, level, [z, *rest])
        here = inner("Div", inner("Sub", z, denoised), inner.cast(level, FLOAT))
        start = inner("Where", second, start, z)
        slope = inner("Where", second, inner("Add", here, slope), here)
        runs_so_far = inner.cast(inner("Where", second, two, one), DOUBLE)
        way = inner.cast(inner("Div", inner("Sub", sigma_next, sigma), runs_so_far), FLOAT)
        return [inner("Add", inner("Mul", slope, way), start), start, slope, *rest]

    times = bounded(nodes, runs)
    kinds = list(types)
    if heun is None:
        return nodes.loop(times, list(zip([z, *others], kinds, strict=True)), euler)
    carried = list(zip([z, z, z, *others], [FLOAT, FLOAT, *kinds], strict=True))
    z, _, _, *others = nodes.loop(times, carried, either)
    return [z, *others]


def bounded(nodes: Nodes, times: str) -> str:
    """How often a loop runs, never more than MOST_ROUNDS: a reader of an unknown graph looks for this node."""
    return nodes("Min", times, nodes.constant(MOST_ROUNDS, "int64"))


def for_each(nodes: Nodes, sigma: str, z: str) -> str:
    """A level as float32 for each sample."""
    return nodes("Expand", nodes.cast(sigma, FLOAT), nodes.length(z, 0))


def _guided_labels(nodes: Nodes, num_classes: int) -> tuple[str, str]:
    """Labels of all that goes through a block, and how often z does: twice with guidance, then without classes."""
    nothing = nodes("Expand", nodes.constant(num_classes, "int64"), nodes("Shape", "labels"))
    guided = nodes("Not", nodes("Equal", "guidance", nodes.constant(1.0, "float32")))
    (labels,) = nodes.branch(
        guided,
        lambda inner: [inner("Concat", "labels", nothing, axis=0)],
        lambda inner: ["labels"],
        [INT],
    )
    copies = nodes("Add", nodes.cast(guided, INT), nodes.constant(1, "int64"))
    return labels, nodes("Concat", nodes("Reshape", copies, nodes.whole(1)), nodes.whole(1, 1, 1), axis=0)


def _to_model(nodes: Nodes, manifest: ImageManifest) -> str:
    """`ImageInfo.to_model`: float32 [batch, C, H, W] with zero mean."""
    images = nodes.cast(nodes("Transpose", "pixels", perm=[0, 3, 1, 2]), FLOAT)
    images = nodes("Mul", images, nodes.constant(manifest.scale / 255, "float32"))
    return nodes("Sub", images, nodes.constant(manifest.mean * manifest.scale, "float32"))


def _shown(nodes: Nodes, images: str, manifest: ImageManifest) -> str:
    """Out of model space: pictures of 0 to 1, or latents."""
    shares = nodes("Div", images, nodes.constant(manifest.scale, "float32"))
    return nodes("Add", shares, nodes.constant(manifest.mean, "float32"))


def _decoded(nodes: Nodes, blocks: LinkedBlocks, latents: str, batch: str) -> str:
    """Pixels of latents, one picture after the other: a decoder needs far more memory than a chain."""

    def picture(inner: Nodes, number: str) -> str:
        alone = inner("Unsqueeze", inner.item(latents, number), inner.whole(0))
        return inner("Squeeze", _pixels(inner, blocks.decode(inner, alone)), inner.whole(0))

    return nodes.each(bounded(nodes, nodes.single(batch)), BYTE, picture)


def _pixels(nodes: Nodes, shares: str) -> str:
    """`pictures.to_uint8`, of pictures of 0 to 1."""
    shares = nodes("Clip", shares, nodes.constant(0, "float32"), nodes.constant(1, "float32"))
    levels = nodes("Round", nodes("Mul", shares, nodes.constant(255, "float32")))
    return nodes("Transpose", nodes.cast(levels, BYTE), perm=[0, 2, 3, 1])
