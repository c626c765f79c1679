"""Programs of ten lines or so that run the graph of a whole chain. The tests run them."""

from dataclasses import dataclass
from string import Template

from edgeblocks.export.manifest_types import (
    ContinuationManifest,
    ImageManifest,
    Manifest,
    NoiseLevel,
    TextManifest,
)


@dataclass(frozen=True, kw_only=True)
class Example:
    """How graphs are run.

    values: what each of their inputs and outputs is.
    """

    values: dict[str, str]
    python: str
    javascript: str


NORMAL = """\
const normal = (...shape) => new ort.Tensor("float32", Float32Array.from({ length: shape.reduce((a, b) => a * b) },
  () => Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random())), shape);"""
_PYTHON_BEGIN = """\
import numpy as np, onnxruntime

session = onnxruntime.InferenceSession("$file")
"""
_JAVASCRIPT_BEGIN = (
    'import * as ort from "onnxruntime-node";\n'
    f"{NORMAL}\n"
    'const session = await ort.InferenceSession.create("$file");\n'
    "const levels = [$levels];\n"
)

_IMAGES = """\
images, pixels = session.run(None, {
    "noise": np.random.default_rng(0).standard_normal((4, $channels, $height, $width), dtype=np.float32),
    "levels": np.array([$levels]),
    "heun": np.array(True),$python_labels
})
print(pixels.shape, pixels.dtype)
"""
_LABELS = """
    "labels": np.arange(4) % $num_classes,
    "guidance": np.array(2, np.float32),"""
_IMAGES_JS = """\
const { pixels } = await session.run({
  noise: normal(4, $channels, $height, $width),
  levels: new ort.Tensor("float64", levels, [levels.length]),
  heun: new ort.Tensor("bool", [true], []),$javascript_labels
});
console.log(pixels.dims, pixels.type);
"""
_LABELS_JS = """
  labels: new ort.Tensor("int64", [0n, 1n, 0n, 1n], [4]),
  guidance: new ort.Tensor("float32", [2], []),"""

_CLASSES = """\
pixels = np.zeros((2, $height, $width, $channels), np.uint8)  # your images
(probabilities,) = session.run(None, {
    "pixels": pixels,
    "noise": np.random.default_rng(0).standard_normal(($noises, len(pixels), $num_classes), dtype=np.float32),
    "levels": np.array([$levels]),
})
print(probabilities.argmax(1))
"""
_CLASSES_JS = """\
const image = new Uint8Array($height * $width * $channels);  // your image, row by row
const { probabilities } = await session.run({
  pixels: new ort.Tensor("uint8", image, [1, $height, $width, $channels]),
  noise: normal($noises, 1, $num_classes),
  levels: new ort.Tensor("float64", levels, [levels.length]),
});
console.log(probabilities.data);
"""

_TEXT = """\
steps, random = $steps, np.random.default_rng(0)
(written,) = session.run(None, {
    "tokens": np.full((2, $length), $vocabulary),
    "levels": np.linspace(1, 0, steps + 1),
    "uniform": random.random((steps, 2, 2, $length)),
    "temperature": np.array(1.0),
})
print(written)
"""
_TEXT_JS = """\
import * as ort from "onnxruntime-node";
const session = await ort.InferenceSession.create("$file");
const steps = $steps;
const { written } = await session.run({
  tokens: new ort.Tensor("int64", Array($length).fill($vocabulary).map(BigInt), [1, $length]),
  levels: new ort.Tensor("float64", Array.from({ length: steps + 1 }, (_, i) => 1 - i / steps), [steps + 1]),
  uniform: new ort.Tensor("float64", Float64Array.from({ length: steps * 2 * $length }, Math.random),
    [steps, 1, 2, $length]),
  temperature: new ort.Tensor("float64", [1], []),
});
console.log(written.data);
"""

_CONTINUATION = """\
random = np.random.default_rng(0)
noise = random.standard_normal((1, $length, $code_width), dtype=np.float32)
past = np.zeros(($caches, 1, $heads, 0, $head_width), np.float32)
tokens = [$vocabulary]  # which stands before a text; here a beginning of your own can follow
while len(tokens) <= $length:
    known = past.shape[3]
    token, probabilities, past = session.run(None, {
        "tokens": np.array([tokens[known:]]),
        "noise": noise[:, known : len(tokens)],
        "past": past,
        "levels": np.array([$levels]),
        "uniform": random.random(1),
        "temperature": np.array(1.0),
        "top_p": np.array(1.0),
    })
    tokens.append(int(token[0]))
print(tokens[1:])
"""
_CONTINUATION_JS = """\
const noise = normal(1, $length, $code_width).data, number = (x) => new ort.Tensor("float64", [x], []);
let past = new ort.Tensor("float32", new Float32Array(0), [$caches, 1, $heads, 0, $head_width]);
const tokens = [$vocabulary];  // which stands before a text; here a beginning of your own can follow
while (tokens.length <= $length) {
  const known = past.dims[3], now = tokens.slice(known);
  const { token, present } = await session.run({
    tokens: new ort.Tensor("int64", now.map(BigInt), [1, now.length]),
    noise: new ort.Tensor("float32", noise.slice(known * $code_width, tokens.length * $code_width),
      [1, now.length, $code_width]),
    past, levels: new ort.Tensor("float64", levels, [levels.length]),
    uniform: new ort.Tensor("float64", [Math.random()], [1]), temperature: number(1), top_p: number(1),
  });
  tokens.push(Number(token.data[0]));
  past = present;
}
console.log(tokens.slice(1));
"""


def chain_example(manifest: Manifest) -> Example:
    """Of an export with one graph for the whole chain."""
    assert manifest.chain is not None
    if isinstance(manifest, TextManifest):
        return _text(manifest, manifest.chain.file)
    if isinstance(manifest, ContinuationManifest):
        return _continuation(manifest, manifest.chain.file)
    assert isinstance(manifest, ImageManifest)
    return (_classes if manifest.task == "classes" else _images)(manifest, manifest.chain.file)


def filled(text: str, **values: object) -> str:
    return Template(text).substitute(values)


def listed(levels: tuple[NoiseLevel, ...]) -> str:
    """To six digits: other levels do as well."""
    return ", ".join(f"{level.sigma:.6g}" for level in levels)


def _images(manifest: ImageManifest, file: str) -> Example:
    channels, height, width = manifest.image_shape
    shape = f"[batch, {channels}, {height}, {width}]"
    values = {
        "noise": f"float32 {shape}, standard normal",
        "levels": "float64 [steps], noise levels; more are slower and better",
        "heun": "bool, true for Heun's solver and false for Euler's, which takes half of the time",
    }
    if manifest.num_classes:
        values |= {
            "labels": f"int64 [batch], class numbers; {manifest.num_classes} is no class",
            "guidance": "float32, how much a class counts: 1 as trained; any other number takes twice the time",
        }
    space, picture = "pixel / 255" if manifest.decoding is None else "latent", manifest.picture
    values |= {
        "images": f"float32 {shape}, the result in model space, ({space} - mean) * scale",
        "pixels": f"uint8 [batch, {picture.height}, {picture.width}, {picture.channels}], the same as pixels",
    }
    given: dict[str, object] = {
        "file": file,
        "channels": channels,
        "height": height,
        "width": width,
        "levels": listed(manifest.levels),
        "python_labels": filled(_LABELS, num_classes=manifest.num_classes) if manifest.num_classes else "",
        "javascript_labels": _LABELS_JS if manifest.num_classes else "",
    }
    return Example(
        values=values,
        python=filled(_PYTHON_BEGIN + _IMAGES, **given),
        javascript=filled(_JAVASCRIPT_BEGIN + _IMAGES_JS, **given),
    )


def _classes(manifest: ImageManifest, file: str) -> Example:
    channels, height, width = manifest.image_shape
    num_classes = manifest.num_classes
    values = {
        "pixels": f"uint8 [batch, {height}, {width}, {channels}], images",
        "noise": f"float32 [noises, batch, {num_classes}], standard normal; the answer is the mean over all chains",
        "levels": "float64 [steps], noise levels",
        "probabilities": f"float32 [batch, {num_classes}], in the order of `class_names` in manifest.json",
    }
    given: dict[str, object] = {
        "file": file,
        "channels": channels,
        "height": height,
        "width": width,
        "noises": manifest.sampler.noises,
        "num_classes": num_classes,
        "levels": listed(manifest.levels),
    }
    return Example(
        values=values,
        python=filled(_PYTHON_BEGIN + _CLASSES, **given),
        javascript=filled(_JAVASCRIPT_BEGIN + _CLASSES_JS, **given),
    )


def _text(manifest: TextManifest, file: str) -> Example:
    length = manifest.length
    values = {
        "tokens": f"int64 [batch, {length}], a text in which {manifest.vocabulary} stands at each gap",
        "levels": "float64 [steps + 1], the ends of the steps from 1 down to 0",
        "uniform": f"float64 [steps, batch, 2, {length}], random numbers in [0, 1)",
        "temperature": "float64, 1 as trained, 0 for the likeliest token",
        "written": f"int64 [batch, {length}], the text without gaps",
    }
    given: dict[str, object] = {
        "file": file,
        "length": length,
        "vocabulary": manifest.vocabulary,
        "steps": manifest.sampler.steps,
    }
    return Example(values=values, python=filled(_PYTHON_BEGIN + _TEXT, **given), javascript=filled(_TEXT_JS, **given))


def _continuation(manifest: ContinuationManifest, file: str) -> Example:
    caches = manifest.caches
    of_step = [caches.num_caches[level.block] for level in manifest.levels]
    begin = manifest.vocabulary
    again = ", and again the one before it" if caches.per == "step" else ""
    values = {
        "tokens": f"int64 [batch, n], at each new position the token before it, {begin} before the first{again}",
        "noise": f"float32 [batch, n, {manifest.code_width}], standard normal, of each position always the same",
        "past": "float32, the `present` of the run before; at first without positions",
        "levels": "float64 [steps], noise levels, in all runs the same",
        "uniform": "float64 [batch], a random number in [0, 1) that chooses the token",
        "temperature": "float64, 1 as trained, 0 for the likeliest token",
        "top_p": "float64, the share of the probability that tokens are drawn from, 1 for all",
        "token": "int64 [batch], that of the last position",
        "probabilities": f"float64 [batch, {manifest.vocabulary}], from which it was drawn",
        "present": "float32, keys and values, for the next run",
    }
    given: dict[str, object] = {
        "file": file,
        "length": manifest.length,
        "vocabulary": begin,
        "code_width": manifest.code_width,
        "caches": sum(caches.num_caches) if caches.per == "block" else sum(of_step),
        "heads": caches.heads,
        "head_width": caches.head_width,
        "levels": listed(manifest.levels),
    }
    return Example(
        values=values,
        python=filled(_PYTHON_BEGIN + _CONTINUATION, **given),
        javascript=filled(_JAVASCRIPT_BEGIN + _CONTINUATION_JS, **given),
    )
