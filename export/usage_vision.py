"""USE.md of a fine-tuned classifier: how other programs run its graph. The tests run them."""

from pathlib import Path

from edgeblocks.export.usage import programs, write_text
from edgeblocks.export.usage_chain import Example, filled
from edgeblocks.export.vision_model import VisionManifest

_PYTHON = """\
import json
import numpy as np, onnxruntime
from PIL import Image, ImageOps

names = json.load(open("manifest.json", encoding="utf-8"))["class_names"]
session = onnxruntime.InferenceSession("$file")
picture = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("$mode")  # your picture
picture = ImageOps.fit(picture, ($width, $height), Image.Resampling.LANCZOS)
pixels = np.asarray(picture).reshape(1, $height, $width, $channels)
logits, probabilities = session.run(None, {"pixels": pixels})
for row in probabilities:
    print(names[row.argmax()], row.max())
"""
_JAVASCRIPT = """\
import * as ort from "onnxruntime-node";
import { readFileSync } from "node:fs";
const names = JSON.parse(readFileSync("manifest.json")).class_names;
const session = await ort.InferenceSession.create("$file");
const picture = new Uint8Array($height * $width * $channels);  // your picture, row by row
const { probabilities } = await session.run({
  pixels: new ort.Tensor("uint8", picture, [1, $height, $width, $channels]),
});
const row = probabilities.data, best = row.indexOf(row.reduce((a, b) => Math.max(a, b)));
console.log(names[best], row[best]);
"""
_COLOURS = {1: "the grey", 3: "red, green and blue"}


def write_vision_usage(folder: Path, manifest: VisionManifest) -> None:
    """Write USE.md.

    Raises:
        OSError: the disk refused.
    """
    write_text(folder, vision_usage_text(manifest))


def vision_usage_text(manifest: VisionManifest) -> str:
    """What USE.md says of an export."""
    channels, height, width = manifest.image_shape
    opening = (
        f"The model tells how likely each class of a picture is. `{manifest.graph.file}` is one graph, which takes\n"
        f"pixels as they are and normalises them itself. It needs onnxruntime (opset {manifest.opset}).\n"
        f"Pictures have {height} x {width} pixels, any number together. `edgeblocks run` takes the central square of\n"
        f"a file's picture, turned as its EXIF data say, and resizes it with Lanczos' filter, as below."
    )
    num_classes = len(manifest.class_names)
    given = {"file": manifest.graph.file, "channels": channels, "height": height, "width": width}
    colours = _COLOURS.get(channels, f"the {channels} channels")
    mode = "L" if channels == 1 else "RGB"
    example = Example(
        values={
            "pixels": f"uint8 [batch, {height}, {width}, {channels}], {colours} of each pixel from 0 to 255",
            "logits": f"float32 [batch, {num_classes}], in the order of `class_names` in manifest.json",
            "probabilities": f"float32 [batch, {num_classes}], the softmax of the logits",
        },
        python=filled(_PYTHON, **given, mode=mode),
        javascript=filled(_JAVASCRIPT, **given),
    )
    return "\n\n".join([f"# How to run this {manifest.model_type} model", opening, *programs(example)]) + "\n"
