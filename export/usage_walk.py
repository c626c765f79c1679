"""Programs of some twenty lines that run the graphs of blocks one after the other. The tests run them."""

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
_BEGIN_JS = """\
import * as ort from "onnxruntime-node";
import { readFileSync } from "node:fs";
const manifest = JSON.parse(readFileSync("manifest.json"));
const sessions = await Promise.all(manifest.files.map((file) => ort.InferenceSession.create(file.file)));
const number = (x) => new ort.Tensor("float32", [x], [1]);
"""
_LEVELS_JS = f"""\
{NORMAL}
const levels = [...manifest.levels, {{ sigma: 0 }}];
"""
_DRAW_JS = """\
const softmax = (logits) => {
  const most = logits.reduce((a, b) => Math.max(a, b)), weights = logits.map((x) => Math.exp(x - most));
  const sum = weights.reduce((a, b) => a + b);
  return weights.map((x) => x / sum);
};
const draw = (shares) => {
  let left = Math.random();
  return shares.findIndex((share, token) => (left -= share) < 0 || token === shares.length - 1);
};
"""
_IMAGES_JS = """\
const shape = [1, $channels, $height, $width];
let z = normal(...shape).data.map((x) => x * levels[0].sigma);
for (const [i, { sigma: here, block }] of manifest.levels.entries()) {
  const feed = { z: new ort.Tensor("float32", z, shape), sigma: number(here)$js_labels };
  const { denoised } = await sessions[block].run(feed);
  z = z.map((x, j) => x + (x - denoised.data[j]) / here * (levels[i + 1].sigma - here));
}
let images = z.map((x) => x / manifest.scale + manifest.mean);
${decode}const pixels = Uint8ClampedArray.from(images, (x) => 255 * x);  // channel by channel
console.log(pixels);
"""
_DECODE_JS = """\
const decoder = await ort.InferenceSession.create(manifest.decoding.graph.file);
images = (await decoder.run({ latents: new ort.Tensor("float32", images, shape) })).pictures.data;
"""
_CLASSES_JS = """\
const image = new Uint8Array($height * $width * $channels), images = new Float32Array(image.length);  // your image
image.forEach((x, i) => {
  images[i % $channels * $height * $width + Math.floor(i / $channels)] = (x / 255 - manifest.mean) * manifest.scale;
});
const probabilities = Array($num_classes).fill(0);
for (let chain = 0; chain < $noises; chain++) {
  let z = normal(1, $num_classes).data.map((x) => x * levels[0].sigma);
  for (const [i, { sigma: here, block }] of manifest.levels.entries()) {
    const feed = { z: new ort.Tensor("float32", z, [1, $num_classes]), sigma: number(here),
      images: new ort.Tensor("float32", images, [1, $channels, $height, $width]) };
    const { denoised } = await sessions[block].run(feed);
    denoised.data.forEach((x, k) => { probabilities[k] += x / manifest.levels.length / $noises; });
    z = z.map((x, j) => x + (x - denoised.data[j]) / here * (levels[i + 1].sigma - here));
  }
}
console.log(probabilities);
"""
_TEXT_JS = """\
let tokens = Array($length).fill($vocabulary);
for (let step = 0; step < $steps; step++) {
  const high = 1 - step / $steps, low = 1 - (step + 1) / $steps, t = (high + low) / 2;
  const block = manifest.boundaries.slice(1, -1).filter((boundary) => t < boundary).length;
  const z = new ort.Tensor("int64", tokens.map(BigInt), [1, $length]);
  const { logits } = await sessions[block].run({ z, t: number(t) }), width = logits.dims[2];
  tokens = tokens.map((token, i) => token !== $vocabulary || Math.random() >= (high - low) / high ? token
    : draw(softmax(logits.data.subarray(i * width, (i + 1) * width))));
}
console.log(tokens);
"""
_CONTINUATION_JS = """\
const name = "edgeblocks: $code_width signs for each of $vocabulary tokens";
const signs = createHash("shake256", { outputLength: $num_bytes }).update(name).digest();
const codes = Array.from({ length: $vocabulary }, (_, token) => Array.from({ length: $code_width }, (_, k) =>
  (signs[(token * $code_width + k) >> 3] >> (7 - k % 8) & 1 ? 1 : -1) * $code_width ** -0.5));
const noise = Array.from({ length: $length }, () => [...normal($code_width).data]);
const tokens = [$vocabulary];  // which stands before a text; here a beginning of your own can follow
while (tokens.length <= $length) {  // each time all of the text: `past` and `present` are there to run only what is new
  let z = noise[tokens.length - 1].map((x) => x * levels[0].sigma), next;
  for (const [i, { sigma: here, block }] of manifest.levels.entries()) {
    const known = tokens.slice(1).map((token, at) => codes[token].map((x, k) => x + noise[at][k] * here));
    const { logits } = await sessions[block].run({
      z: new ort.Tensor("float32", [...known, z].flat(), [1, tokens.length, $code_width]), sigma: number(here),
      tokens: new ort.Tensor("int64", tokens.map(BigInt), [1, tokens.length]),
      past: new ort.Tensor("float32", [], [manifest.caches.num_caches[block], 1, $heads, 0, $head_width]),
    });
    const shares = softmax(logits.data.subarray(-$vocabulary));
    next ??= draw(shares);
    z = z.map((x, k) => {
      const denoised = shares.reduce((sum, share, token) => sum + share * codes[token][k], 0);
      return x + (x - denoised) / here * (levels[i + 1].sigma - here);
    });
  }
  tokens.push(next);
}
console.log(tokens.slice(1));
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
        "python_labels": f', "labels": np.arange(4) % {manifest.num_classes}' if manifest.num_classes else "",
        "js_labels": ', labels: new ort.Tensor("int64", [0n], [1])' if manifest.num_classes else "",
    }
    decode = decode_js = ""
    if manifest.decoding is not None:
        decode, decode_js, picture = _DECODE, _DECODE_JS, manifest.picture
        values["images"] = (
            f"float32 [batch, {picture.channels}, {picture.height}, {picture.width}] of 0 to 1, by the decoder"
        )
    return Example(
        values=values,
        python=filled(_BEGIN + _LEVELS + _IMAGES, **given, decode=decode),
        javascript=filled(_BEGIN_JS + _LEVELS_JS + _IMAGES_JS, **given, decode=decode_js),
    )


def _classes(manifest: ImageManifest) -> Example:
    channels, height, width = manifest.image_shape
    values = {
        "z": f"float32 [batch, {manifest.num_classes}], noised labels",
        "sigma": "float32 [batch], their noise levels",
        "images": f"float32 [batch, {channels}, {height}, {width}], in model space",
        "denoised": "the labels without their noise, as the block estimates them; the answer is their mean",
    }
    given: dict[str, object] = {
        "channels": channels,
        "height": height,
        "width": width,
        "noises": manifest.sampler.noises,
        "num_classes": manifest.num_classes,
    }
    return Example(
        values=values,
        python=filled(_BEGIN + _LEVELS + _CLASSES, **given),
        javascript=filled(_BEGIN_JS + _LEVELS_JS + _CLASSES_JS, **given),
    )


def _text(manifest: TextManifest) -> Example:
    values = {
        "z": f"int64 [batch, {manifest.length}], a text in which {manifest.vocabulary} stands at each gap",
        "t": "float32 [batch], the share of the text that is masked",
        "logits": f"float32 [batch, {manifest.length}, {manifest.vocabulary}], of each place",
    }
    given: dict[str, object] = {
        "length": manifest.length,
        "vocabulary": manifest.vocabulary,
        "steps": manifest.sampler.steps,
    }
    return Example(
        values=values,
        python=filled(_BEGIN + _TEXT, **given),
        javascript=filled(_BEGIN_JS + _DRAW_JS + _TEXT_JS, **given),
    )


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
    given: dict[str, object] = {
        "length": manifest.length,
        "vocabulary": vocabulary,
        "code_width": width,
        "num_bytes": vocabulary * width // 8,
        "heads": caches.heads,
        "head_width": caches.head_width,
    }
    hashed = 'import { createHash } from "node:crypto";\n'
    return Example(
        values=values,
        python=filled("import hashlib\n" + _BEGIN + _LEVELS + _CONTINUATION, **given),
        javascript=filled(hashed + _BEGIN_JS + _LEVELS_JS + _DRAW_JS + _CONTINUATION_JS, **given),
    )
