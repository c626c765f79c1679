"""Programs of some fifteen lines that run the graphs of blocks one after the other. The tests run those in Python."""

from edgeblocks.export.manifest_types import ContinuationManifest, ImageManifest, Manifest, TextManifest
from edgeblocks.export.usage_chain import NORMAL, Example, filled

_BEGIN = """\
import json
import numpy as np, onnxruntime

manifest = json.load(open("manifest.json"))
sessions = [onnxruntime.InferenceSession(file["file"]) for file in manifest["files"]]
random = np.random.default_rng(0)
"""
_LEVELS = """\
levels = [*manifest["levels"], {"sigma": 0.0}]
"""

_IMAGES = """\
z = random.standard_normal((4, $channels, $height, $width), dtype=np.float32) * levels[0]["sigma"]
for here, after in zip(levels, levels[1:]):
    feed = {"z": z, "sigma": np.full(4, here["sigma"], np.float32)$python_labels}
    (denoised,) = sessions[here["block"]].run(None, feed)
    z = z + (z - denoised) / here["sigma"] * (after["sigma"] - here["sigma"])
images = z / manifest["scale"] + manifest["mean"]
${decode}pixels = np.rint(255 * np.clip(images, 0, 1)).astype(np.uint8).transpose(0, 2, 3, 1)
print(pixels.shape, pixels.dtype)
"""
_DECODE = """\
decoder = onnxruntime.InferenceSession(manifest["decoding"]["graph"]["file"])
(images,) = decoder.run(None, {"latents": images})
"""
_IMAGES_JS = """\
import * as ort from "onnxruntime-node";
import { readFileSync } from "node:fs";
const manifest = JSON.parse(readFileSync("manifest.json"));
const sessions = await Promise.all(manifest.files.map((file) => ort.InferenceSession.create(file.file)));
$normal
const levels = [...manifest.levels, { sigma: 0 }], shape = [1, $channels, $height, $width];
let z = normal(...shape).data.map((x) => x * levels[0].sigma);
for (const [i, { sigma: here, block }] of manifest.levels.entries()) {
  const feed = { z: new ort.Tensor("float32", z, shape), sigma: new ort.Tensor("float32", [here], [1])$js_labels };
  const { denoised } = await sessions[block].run(feed);
  z = z.map((x, j) => x + (x - denoised.data[j]) / here * (levels[i + 1].sigma - here));
}
console.log(z.map((x) => Math.round(255 * Math.min(1, Math.max(0, x / manifest.scale + manifest.mean)))));
"""

_CLASSES = """\
pixels, answers = np.zeros((2, $height, $width, $channels), np.uint8), []  # your images
images = (pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255 - manifest["mean"]) * manifest["scale"]
for chain in range($noises):
    z = random.standard_normal((len(pixels), $num_classes), dtype=np.float32) * levels[0]["sigma"]
    for here, after in zip(levels, levels[1:]):
        feed = {"z": z, "sigma": np.full(len(z), here["sigma"], np.float32), "images": images}
        (denoised,) = sessions[here["block"]].run(None, feed)
        answers.append(denoised)
        z = z + (z - denoised) / here["sigma"] * (after["sigma"] - here["sigma"])
probabilities = np.mean(answers, axis=0)
print(probabilities.argmax(1))
"""

_TEXT = """\
tokens, ends = np.full((2, $length), $vocabulary), np.linspace(1, 0, $steps + 1)
for high, low in zip(ends, ends[1:]):
    t = (high + low) / 2
    block = sum(t < boundary for boundary in manifest["boundaries"][1:-1])
    (logits,) = sessions[block].run(None, {"z": tokens, "t": np.full(len(tokens), t, np.float32)})
    sums = np.exp(logits - logits.max(-1, keepdims=True)).cumsum(-1)
    drawn = (sums < random.random((*tokens.shape, 1)) * sums[..., -1:]).sum(-1)
    now = (tokens == $vocabulary) & (random.random(tokens.shape) < (high - low) / high)
    tokens = np.where(now, drawn, tokens)
print(tokens)
"""

_CONTINUATION = """\
name = b"edgeblocks: $code_width signs for each of $vocabulary tokens"
signs = np.unpackbits(np.frombuffer(hashlib.shake_256(name).digest($num_bytes), np.uint8))
codes = np.where(signs, 1, -1).reshape($vocabulary, $code_width) * $code_width**-0.5
noise = random.standard_normal(($length, $code_width))
tokens = [$vocabulary]  # which stands before a text; here a beginning of your own can follow
while len(tokens) <= $length:  # each time all of the text: `past` and `present` are there to run only what is new
    z = noise[len(tokens) - 1] * levels[0]["sigma"]
    for here, after in zip(levels, levels[1:]):
        known = codes[np.array(tokens[1:], int)] + noise[: len(tokens) - 1] * here["sigma"]
        shape = (manifest["caches"]["num_caches"][here["block"]], 1, $heads, 0, $head_width)
        logits, present = sessions[here["block"]].run(None, {
            "z": np.array([[*known, z]], np.float32),
            "sigma": np.array([here["sigma"]], np.float32),
            "tokens": np.array([tokens]),
            "past": np.zeros(shape, np.float32),
        })
        weights = np.exp(logits[0, -1] - logits[0, -1].max())
        if here is levels[0]:
            sums = weights.cumsum()
        z = z + (z - weights / weights.sum() @ codes) / here["sigma"] * (after["sigma"] - here["sigma"])
    tokens.append(int((sums < random.random() * sums[-1]).sum()))
print(tokens[1:])
"""


def walk_example(manifest: Manifest) -> Example:
    """Of an export with a graph for each block."""
    if isinstance(manifest, TextManifest):
        return _text(manifest)
    if isinstance(manifest, ContinuationManifest):
        return _continuation(manifest)
    assert isinstance(manifest, ImageManifest)
    return (_classes if manifest.task == "classes" else _images)(manifest)


def _images(manifest: ImageManifest) -> Example:
    channels, height, width = manifest.image_shape
    values = {
        "z": f"float32 [batch, {channels}, {height}, {width}], noised images in model space",
        "sigma": "float32 [batch], their noise levels",
    }
    if manifest.num_classes:
        values["labels"] = f"int64 [batch], class numbers; {manifest.num_classes} is no class"
    values["denoised"] = "the images without their noise, as the block estimates them"
    given: dict[str, object] = {
        "channels": channels,
        "height": height,
        "width": width,
        "normal": NORMAL,
        "python_labels": f', "labels": np.arange(4) % {manifest.num_classes}' if manifest.num_classes else "",
        "js_labels": ', labels: new ort.Tensor("int64", [0n], [1])' if manifest.num_classes else "",
    }
    if manifest.decoding is None:
        python = filled(_BEGIN + _LEVELS + _IMAGES, **given, decode="")
        return Example(values=values, python=python, javascript=filled(_IMAGES_JS, **given))
    picture = manifest.decoding.picture
    values["images"] = (
        f"float32 [batch, {picture.channels}, {picture.height}, {picture.width}] of 0 to 1, by the decoder"
    )
    python = filled(_BEGIN + _LEVELS + _IMAGES, **given, decode=_DECODE)
    return Example(values=values, python=python, javascript=None)


def _classes(manifest: ImageManifest) -> Example:
    channels, height, width = manifest.image_shape
    values = {
        "z": f"float32 [batch, {manifest.num_classes}], noised labels",
        "sigma": "float32 [batch], their noise levels",
        "images": f"float32 [batch, {channels}, {height}, {width}], in model space",
        "denoised": "the labels without their noise, as the block estimates them; the answer is their mean",
    }
    python = filled(
        _BEGIN + _LEVELS + _CLASSES,
        channels=channels,
        height=height,
        width=width,
        noises=manifest.sampler.noises,
        num_classes=manifest.num_classes,
    )
    return Example(values=values, python=python, javascript=None)


def _text(manifest: TextManifest) -> Example:
    values = {
        "z": f"int64 [batch, {manifest.length}], a text in which {manifest.vocabulary} stands at each gap",
        "t": "float32 [batch], the share of the text that is masked",
        "logits": f"float32 [batch, {manifest.length}, {manifest.vocabulary}], of each place",
    }
    steps = manifest.sampler.steps
    python = filled(_BEGIN + _TEXT, length=manifest.length, vocabulary=manifest.vocabulary, steps=steps)
    return Example(values=values, python=python, javascript=None)


def _continuation(manifest: ContinuationManifest) -> Example:
    caches, vocabulary, width = manifest.caches, manifest.vocabulary, manifest.code_width
    values = {
        "z": f"float32 [batch, n, {width}], noised codes of tokens",
        "sigma": "float32 [batch], their noise level",
        "tokens": f"int64 [batch, n], at each position the token before it, {vocabulary} before the first",
        "past": f"float32 [caches, batch, {caches.heads}, positions, {caches.head_width}], keys and values before",
        "logits": f"float32 [batch, n, {vocabulary}], of each position",
        "present": f"float32 [caches, batch, {caches.heads}, n, {caches.head_width}], those of these positions",
    }
    python = filled(
        "import hashlib\n" + _BEGIN + _LEVELS + _CONTINUATION,
        length=manifest.length,
        vocabulary=vocabulary,
        code_width=width,
        num_bytes=vocabulary * width // 8,
        heads=caches.heads,
        head_width=caches.head_width,
    )
    return Example(values=values, python=python, javascript=None)
