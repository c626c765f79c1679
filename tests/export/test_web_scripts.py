"""The page's scripts against the Python that they repeat: random numbers, levels, tokens, pixels. Node runs them."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeblocks.data.decoding import fit_square
from edgeblocks.data.pictures import to_uint8
from edgeblocks.data.tokenizer import build_tokenizer, train_pairs
from edgeblocks.diffusion.classification import label_noise
from edgeblocks.diffusion.noise import (
    MaskingSchedule,
    NoiseDistribution,
    partition_noise,
    sampler_levels,
    unmasking_steps,
)
from edgeblocks.seeds import seed_at, start_noise

WEB = Path(__file__).parents[2] / "export/web"
pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="no node, which runs scripts without a browser")


@pytest.fixture
def node(tmp_path):
    """Runs lines that call `tell(value)` once, with modules by their names; gives that value."""

    def run(lines, **given):
        names = ("sha256", "random", "levels", "tokens", "pixels")
        imports = "".join(f"import * as {name} from {json.dumps((WEB / f'{name}.js').as_uri())};\n" for name in names)
        plain = "(_, value) => (typeof value === 'bigint' ? `${value}` : value)"
        tell = f"const tell = (value) => process.stdout.write(JSON.stringify(value, {plain}));"
        script = tmp_path / "script.mjs"
        script.write_text(f"{imports}{tell}\nconst given = {json.dumps(given)};\n{lines}\n")
        done = subprocess.run(["node", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_checksums_and_seeds(node):
    """SHA-256 of all lengths around a block's, and seeds at positions with words, numbers and words like numbers."""
    lengths = [0, 1, 55, 56, 63, 64, 65, 1000]
    lines = "tell(given.lengths.map((n) => sha256.hex(sha256.sha256(new Uint8Array(n).fill(7)))))"
    found = node(lines, lengths=lengths)
    assert found == [hashlib.sha256(bytes([7]) * n).hexdigest() for n in lengths]
    positions = [(0, "train", 1, 2), (2**53 - 1, "start", 0), (5, "start", "12"), (5, "a/b", ""), (5, "é")]
    assert node("tell(given.positions.map((p) => random.seedAt(...p)))", positions=positions) == [
        str(seed_at(*position)) for position in positions
    ]


def test_noise_is_numpys(node):
    """The start noise of four samples of 50,000 numbers, some of them from the tail, and uniform numbers after it."""
    lines = """
      const noise = random.startNoise(50000, [0, 1, 2, "name"], 41);
      const stream = new random.Generator(random.seedAt(3, "continue", 0));
      stream.normal(new Float32Array(7));
      tell([Array.from(noise), Array.from({ length: 9 }, () => stream.uniform())]);"""
    noise, uniform = node(lines)
    wanted = start_noise((50_000,), samples=[0, 1, 2, "name"], seed=41).ravel()
    assert np.abs(wanted).max() > 3.66
    # The logarithm in the tail may round otherwise.
    assert np.abs(np.float32(noise) - wanted).max() <= 5e-7
    assert (np.float32(noise) == wanted).mean() > 0.9999
    stream = np.random.default_rng(seed_at(3, "continue", 0))
    stream.standard_normal(7, dtype=np.float32)
    assert uniform == stream.random(9).tolist()


def test_noise_of_labels_follows_from_the_picture(node):
    """The chains of a picture begin where `label_noise` lets them begin."""
    pixels = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1)
    lines = """
      const name = sha256.hex(sha256.sha256(Uint8Array.from({ length: 64 }, (_, i) => i)));
      tell([0, 1].map((chain) => Array.from(random.startNoise(10, [name], random.seedAt(6, "chain", chain)))));"""
    assert np.array_equal(np.float32(node(lines)), label_noise(pixels, num_classes=10, noises=2, seed=6)[:, 0])


def test_levels_are_those_of_the_sampler(node):
    """For one to seven blocks and up to forty steps, levels and the steps of unmasking are the same."""
    asked, wanted = [], []
    for blocks in (1, 2, 3, 5, 7):
        for distribution, levels in ((NoiseDistribution(), sampler_levels), (MaskingSchedule(), unmasking_steps)):
            partition = partition_noise(distribution, num_blocks=blocks, kind="equal-probability", overlap=0.05)
            for steps in (blocks, blocks + 1, 18, 40):
                asked.append((levels.__name__, partition.boundaries, steps))
                wanted += np.ravel(levels(partition, num_steps=steps)).tolist()
    lines = """tell(given.asked.flatMap(([kind, boundaries, steps]) =>
      (kind === "sampler_levels" ? levels.samplerLevels : levels.unmaskingSteps)(boundaries, steps).flat()))"""
    np.testing.assert_allclose(node(lines, asked=asked), wanted, rtol=1e-13)


def test_tokens_are_those_of_the_tokenizers(node):
    """Characters, bytes and byte pairs, of texts with digits, accents, marks and letters of four bytes."""
    pytest.importorskip("tokenizers")
    texts = ["Call me Ishmael.", "it's the 7th  Été!\n", "  two   spaces\tand 42 ", "naïve 鯨 🐋 whale's", ""]
    pairs = train_pairs(["the whale's sea, the sea's whale 42 times: the 鯨"] * 4, 300)
    lines = """
      const kinds = ["chars", "bytes", "bpe"].map((kind) => tokens.tokenizer(kind, JSON.parse(given.definition)));
      tell(kinds.map((kind) => given.texts.map((text) => [kind.encode(text), kind.decode(kind.encode(text))])));"""
    found = node(lines, texts=texts, definition=pairs.to_json())
    for kind, rows in zip((build_tokenizer("chars", None), build_tokenizer("bytes", None), pairs), found, strict=True):
        assert rows == [[(ids := kind.encode(text)).tolist(), kind.decode(ids)] for text in texts]


def test_pictures_become_what_the_network_is_given(node):
    """The central square in grey and in colour, resized as Pillow does; and samples become the same pixels."""
    rng = np.random.default_rng(0)
    image = np.dstack([rng.integers(0, 256, (40, 30, 3)), np.full((40, 30), 255)]).astype(np.uint8)
    lines = """
      const rgba = { width: 30, height: 40, data: Uint8ClampedArray.from(given.rgba) };
      tell([1, 3].map((channels) => Array.from(pixels.fitted(rgba, { width: 12, height: 12, channels }))));"""
    for channels, found in zip((1, 3), node(lines, rgba=image.ravel().tolist()), strict=True):
        picture = Image.fromarray(image[..., :3]).convert("L" if channels == 1 else "RGB")
        assert found == np.asarray(fit_square(picture, 12)).ravel().tolist()
    values = rng.normal(size=(1, 3, 4, 5)).astype(np.float32)
    lines = """
      const manifest = { image: { channels: 3, height: 4, width: 5 }, mean: 0.4, scale: 1.7 };
      const made = pixels.toPixels(Float32Array.from(given.values), manifest);
      tell([Array.from(made), Array.from(pixels.toPixels(pixels.toModel(made, manifest), manifest))]);"""
    made, again = node(lines, values=values.ravel().tolist())
    assert made == again == to_uint8(values, mean=0.4, scale=1.7).ravel().tolist()
