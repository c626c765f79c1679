"""Picture files of all formats to pixels: orientation, transparency, deep grey, inks, sizes."""

import struct

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin
from support.picture_files import noise, opened, png, save

from edgeblocks.data import decoding
from edgeblocks.families.vit import Vit


def test_every_extension_is_read(tmp_path, cache):
    """All the formats of the documentation, lossless ones nearly; of a moving GIF the first frame."""
    root = tmp_path / "kinds"
    root.mkdir()
    halves = np.full((16, 16, 3), 200, dtype=np.uint8)
    halves[:, 8:] = 60
    for extension in decoding.EXTENSIONS - {".gif", ".pbm"}:
        kind = {".jif": "JPEG", ".avifs": "AVIF"}.get(
            extension, Image.registered_extensions().get(extension, "JPEG2000")
        )
        Image.fromarray(halves).save(root / f"a{extension}", format=kind)
    Image.fromarray(halves[..., 0] > 100).save(root / "b.pbm")
    frames = [Image.fromarray(halves), Image.fromarray(halves // 4)]
    frames[0].save(root / "j.gif", save_all=True, append_images=frames[1:])
    images = opened(root, cache)
    assert len(images.images) == len(decoding.EXTENSIONS) and images.unreadable == ()
    num_near = (np.abs(images.images.astype(int) - halves).reshape(len(images.images), -1).max(axis=1) <= 2).sum()
    assert num_near == len(decoding.EXTENSIONS) - 1, "all but the one in black and white"


def test_a_name_decides_for_tga_alone(pets, cache):
    """Nothing in a TGA says what it is: other files are never taken for one, and one with another name is none."""
    Image.fromarray(noise(5, 6, 3, seed=9)).save(pets / "cat" / "z.tga")
    (pets / "cat" / "z.tga").rename(pets / "cat" / "z.png")
    assert opened(pets, cache).unreadable == ("cat/z.png",)


def test_the_exif_orientation_is_applied(tmp_path, cache):
    """A picture stored lying and marked as rotated is set upright, and counts with its upright size."""
    upright = noise(3, 5, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by 90 degrees
    save(tmp_path / "exif" / "a.png", np.ascontiguousarray(np.rot90(upright)), exif=exif)
    save(tmp_path / "exif" / "b.png", upright)
    images = opened(tmp_path / "exif", cache)
    np.testing.assert_array_equal(images.images[0], upright)


@pytest.mark.parametrize("extension", ["png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_agree_with_pillow(tmp_path, cache, orientation, extension):
    """Pillow's own exif_transpose is the oracle."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in (f"a.{extension}", f"b.{extension}"):
        save(tmp_path / "exif" / name, noise(6, 4, 3), exif=exif)
    with Image.open(tmp_path / "exif" / f"a.{extension}") as picture:
        expected = np.asarray(ImageOps.exif_transpose(picture))
    np.testing.assert_array_equal(opened(tmp_path / "exif", cache).images[1], expected)


def test_the_orientation_that_imagemagick_writes_is_applied(tmp_path, cache):
    """As hexadecimal text in a PNG; nothing of the picture is turned before it is used."""
    exif = Image.Exif()
    exif[0x0112] = 6
    text = f"\nexif\n{len(exif.tobytes()):8}\n{exif.tobytes().hex()}\n"
    told = PngImagePlugin.PngInfo()
    told.add_text("Raw profile type exif", text, zip=True)
    upright = noise(3, 5, 3)
    save(tmp_path / "exif" / "a.png", np.ascontiguousarray(np.rot90(upright)), pnginfo=told)
    save(tmp_path / "exif" / "b.png", upright)
    np.testing.assert_array_equal(opened(tmp_path / "exif", cache).images[0], upright)


def test_transparent_parts_become_white(tmp_path, cache):
    """The colour hidden below a transparent pixel is never seen."""
    pixels = noise(4, 4, 4)
    pixels[..., 3] = 255
    pixels[0, 0] = (10, 20, 30, 0)
    save(tmp_path / "clear" / "a.png", pixels)
    save(tmp_path / "clear" / "b.png", pixels)
    images = opened(tmp_path / "clear", cache)
    assert images.images[0, 0, 0].tolist() == [255, 255, 255]
    np.testing.assert_array_equal(images.images[0, 1:], pixels[1:, :, :3])


@pytest.mark.parametrize(
    ("bits", "kind", "pixels", "clear"),
    [
        (16, 0, struct.pack(">2H", 0, 60_000), struct.pack(">H", 0)),
        (16, 0, struct.pack(">2H", 60_000, 1), struct.pack(">H", 60_000)),
        (8, 0, b"\x07\x09", struct.pack(">H", 7)),
        (4, 0, b"\xf1", struct.pack(">H", 15)),
        (2, 0, b"\x40", struct.pack(">H", 1)),
        (1, 0, b"\x80", struct.pack(">H", 1)),
        (16, 2, struct.pack(">6H", 1000, 2000, 3000, 9, 9, 9), struct.pack(">3H", 1000, 2000, 3000)),
        (8, 2, bytes(range(6)), struct.pack(">3H", 0, 1, 2)),
    ],
)
def test_the_transparent_colour_of_a_png_becomes_white(tmp_path, cache, bits, kind, pixels, clear):
    """Grey of 1 to 16 bits, and colours of 8 and 16: the first of two pixels has that colour, the second another."""
    (tmp_path / "clear").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "clear" / name).write_bytes(png(2, 1, b"\0" + pixels, bits=bits, kind=kind, clear=clear))
    image = opened(tmp_path / "clear", cache).images[0]
    assert (image[0, 0] == 255).all()
    assert (image[0, 1] != 255).any()


def test_sixteen_bit_grey_keeps_its_shades(tmp_path, cache):
    """The upper eight bits stay; nothing is clipped at 255."""
    values = np.array([[0, 256], [32768, 65535]], dtype=np.uint16)
    save(tmp_path / "deep" / "a.png", values)
    save(tmp_path / "deep" / "b.png", values)
    images = opened(tmp_path / "deep", cache)
    assert images.images[0, ..., 0].tolist() == [[0, 1], [128, 255]]


@pytest.mark.parametrize(
    ("values", "extension"),
    [
        (np.linspace(0, 4095, 64).astype(np.uint16), "png"),
        (np.linspace(30_000, 34_000, 64).astype(np.uint16), "png"),
        (np.arange(64, dtype=np.uint16) * 4, "png"),
        (np.linspace(-1000, 3000, 64).astype(np.int32), "tif"),
        (np.linspace(0, 10**6, 64).astype(np.int32), "tif"),
    ],
)
def test_deep_grey_keeps_its_shades_whatever_its_range(tmp_path, cache, values, extension):
    """The range of the set is spread over 0..255; one picture alone has a part of it."""
    whole = np.resize(values, (8, 64))
    save(tmp_path / "deep" / f"a.{extension}", whole)
    save(tmp_path / "deep" / f"b.{extension}", whole[:, ::-1].clip(None, values[32]))
    images = opened(tmp_path / "deep", cache)
    ramp = (values - values[0].astype(float)) * 255 / (values[-1].astype(float) - values[0])
    assert np.abs(images.images[0, 0, :, 0] - ramp).max() <= 0.5
    assert images.images[1].max() == images.images[0, 0, 32, 0]
    assert images.deep_range == (values[0], values[-1])
    assert f"from {values[0]:,} to {values[-1]:,}, which are spread over 0 to 255" in images.warnings[0]
    alone = decoding.decode(
        tmp_path / "deep" / f"b.{extension}", image_size=None, grey=True, deep_range=images.deep_range
    )
    np.testing.assert_array_equal(alone, images.images[1], err_msg="as a classifier reads it later")
    assert Vit.data_info(images).deep_range == images.deep_range
    again = opened(tmp_path / "deep", cache)
    assert (again.deep_range, again.warnings) == (images.deep_range, images.warnings)


def test_a_damaged_picture_of_deep_grey_does_not_decide_the_range(tmp_path, cache):
    """It is named, and the others have the range."""
    for number, name in enumerate(("a.png", "b.png", "c.png")):
        save(tmp_path / "deep" / name, noise(30, 30, seed=number).astype(np.uint16) * (1 + 9 * (name == "c.png")))
    content = (tmp_path / "deep" / "c.png").read_bytes()
    (tmp_path / "deep" / "c.png").write_bytes(content[: len(content) // 2])
    images = opened(tmp_path / "deep", cache)
    assert images.unreadable == ("c.png",) and images.deep_range == (0, 255)


def test_deep_grey_whose_zero_is_white_is_turned_round(tmp_path, cache):
    """As Pillow does it for 8 bits: X-ray pictures are often kept so."""
    values = np.array([[0, 65535], [20_000, 40_000]], dtype=np.uint16)
    for name in ("a.tif", "b.tif"):
        save(tmp_path / "deep" / name, values, tiffinfo={262: 0})
    assert opened(tmp_path / "deep", cache).images[0, ..., 0].tolist() == [[255, 0], [177, 99]]


def test_cmyk_is_not_turned_round(tmp_path, cache):
    """Cyan stays cyan, in a TIFF and in a JPEG, which keeps the four inks the other way round."""
    cyan = np.zeros((8, 8, 4), dtype=np.uint8)
    cyan[..., 0] = 255
    (tmp_path / "ink").mkdir()
    for name in ("a.jpg", "b.tif"):
        Image.fromarray(cyan, "CMYK").save(tmp_path / "ink" / name)
    save(tmp_path / "ink" / "c.png", noise(8, 8, 3))
    for image in opened(tmp_path / "ink", cache).images[:2]:
        assert np.abs(image.astype(int) - [0, 255, 255]).max() <= 2


def test_image_size_cuts_the_centre_and_resizes(tmp_path, cache):
    """The sides of a broad picture are cut away; a small one is enlarged."""
    broad = np.zeros((20, 60, 3), dtype=np.uint8)
    broad[:, 20:40] = noise(20, 20, 3) // 4 + 150
    save(tmp_path / "sizes" / "a.png", broad)
    save(tmp_path / "sizes" / "b.jpg", noise(6, 9, 3))
    images = opened(tmp_path / "sizes", cache, image_size=10)
    assert images.images.shape == (2, 10, 10, 3)
    assert images.images[0].min() >= 140


def test_reduced_decoding_of_a_large_jpeg_stays_true(tmp_path, cache):
    """Letting the decoder drop resolution changes the result by little against Pillow's plain way."""
    ramp = np.add.outer(np.linspace(0, 120, 400), np.linspace(0, 120, 600)).astype(np.uint8)
    save(tmp_path / "large" / "a.jpg", ramp, quality=95)
    save(tmp_path / "large" / "b.jpg", ramp, quality=95)
    plain = Image.fromarray(ramp[:, 100:500]).resize((16, 16), Image.Resampling.LANCZOS)
    images = opened(tmp_path / "large", cache, image_size=16)
    assert np.abs(images.images[0, ..., 0].astype(int) - np.asarray(plain)).max() <= 2


@pytest.mark.parametrize("kind", ["clear", "deep", "palette"])
def test_converting_in_bands_changes_no_pixel(tmp_path, cache, monkeypatch, kind):
    """Bands of one row, of several, and one of the whole picture give the same colours."""
    pixels = {"clear": noise(9, 7, 4), "deep": noise(9, 7).astype(np.uint16) * 250, "palette": noise(9, 7) % 4}[kind]
    picture = Image.fromarray(pixels)
    if kind == "palette":
        picture = picture.convert("P")
        picture.info["transparency"] = 2
    (tmp_path / "bands").mkdir()
    for name in ("a.png", "b.png"):
        picture.save(tmp_path / "bands" / name)
    whole = opened(tmp_path / "bands", cache).images[0]
    for band in (1, 20):
        monkeypatch.setattr(decoding, "_BAND_PIXELS", band)
        np.testing.assert_array_equal(opened(tmp_path / "bands", tmp_path / f"cache{band}").images[0], whole)


def test_of_thousands_of_frames_one_is_read(tmp_path, cache):
    """An animated GIF of 3,000 frames costs no more than its first."""
    frames = [Image.fromarray(noise(4, 4, 3, seed=number % 9)) for number in range(3000)]
    (tmp_path / "moving").mkdir()
    for name in ("a.gif", "b.gif"):
        frames[0].save(tmp_path / "moving" / name, save_all=True, append_images=frames[1:])
    images = opened(tmp_path / "moving", cache)
    assert images.images.shape == (2, 4, 4, 3) and images.unreadable == ()
