"""Folders of image files, whole and broken."""

import os
import shutil
import socket
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin, TiffImagePlugin
from support.picture_files import noise, opened, save

from edgeblocks.data import class_folders, decoding, folder
from edgeblocks.errors import DataError, NoRoomToReadError
from edgeblocks.families.vit import Vit


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def pets(tmp_path):
    """Two classes, one nested, RGB, 6 x 5 pixels."""
    root = tmp_path / "pets"
    save(root / "dog" / "1.png", noise(5, 6, 3, seed=1))
    save(root / "dog" / "old" / "2.PNG", noise(5, 6, 3, seed=2))
    save(root / "cat" / "3.bmp", noise(5, 6, 3, seed=3))
    return root


def test_sub_folders_are_classes_in_the_order_of_their_names(pets, cache):
    """Pixels come back unchanged, nested files belong to the class above them."""
    images = opened(pets, cache)
    assert images.class_names == ("cat", "dog")
    assert images.labels.tolist() == [0, 1, 1]
    batch, labels = images.gather(np.array([2, 0]))
    np.testing.assert_array_equal(batch, [noise(5, 6, 3, seed=2), noise(5, 6, 3, seed=3)])
    assert labels.tolist() == [1, 0]
    assert images.unreadable == ()
    assert images.resident_bytes == 3 * 16


def test_a_flat_folder_is_unconditional(tmp_path, cache):
    """No sub-folders, no labels; hidden files and other kinds of file are ignored."""
    for number in range(3):
        save(tmp_path / "flat" / f"{number}.png", noise(4, 4, seed=number))
    (tmp_path / "flat" / "notes.txt").write_text("not an image")
    (tmp_path / "flat" / "._0.png").write_bytes(b"finder's")
    (tmp_path / "flat" / ".thumbnails").mkdir()
    images = opened(tmp_path / "flat", cache)
    assert images.labels is None and images.class_names == ()
    assert images.images.shape == (3, 4, 4, 1)
    assert images.gather(np.array([1]))[1] is None
    assert images.unreadable == ()


def test_one_colour_image_makes_the_set_colour(tmp_path, cache):
    """Grey images are repeated over the three channels."""
    save(tmp_path / "mix" / "a.png", noise(4, 4))
    save(tmp_path / "mix" / "b.png", noise(4, 4, 3))
    images = opened(tmp_path / "mix", cache)
    assert images.images.shape == (2, 4, 4, 3)
    np.testing.assert_array_equal(images.images[0], np.repeat(noise(4, 4)[..., None], 3, axis=2))


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


def test_sixteen_bit_grey_keeps_its_shades(tmp_path, cache):
    """The upper eight bits stay; nothing is clipped at 255."""
    values = np.array([[0, 256], [32768, 65535]], dtype=np.uint16)
    save(tmp_path / "deep" / "a.png", values)
    save(tmp_path / "deep" / "b.png", values)
    images = opened(tmp_path / "deep", cache)
    assert images.images[0, ..., 0].tolist() == [[0, 1], [128, 255]]


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


def test_different_sizes_ask_for_image_size(pets, cache):
    """The smallest and the largest size are named with their counts, and the flag that mends it."""
    save(pets / "cat" / "4.png", noise(50, 60, 3))
    with pytest.raises(DataError, match=r"4 images.*6 x 5 \(3 images\) to 60 x 50 \(1 images\).*--set image_size=N"):
        opened(pets, cache)


def test_a_damaged_image_is_skipped_and_named(pets, cache):
    """Cut, empty, falsely named and dead files are named, again when the cache is reused; the others are kept."""
    whole = (pets / "dog" / "1.png").read_bytes()
    (pets / "dog" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (pets / "dog" / "empty.jpg").touch()
    (pets / "cat" / "text.png").write_text("no image")
    (pets / "cat" / "vector.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 5\n")
    (pets / "cat" / "dead.png").symlink_to(pets / "gone.png")
    named = ("cat/dead.png", "cat/text.png", "cat/vector.png", "dog/cut.png", "dog/empty.jpg")
    assert opened(pets, cache).unreadable == named
    again = opened(pets, cache)
    assert again.unreadable == named
    assert again.labels.tolist() == [0, 1, 1]


def test_a_bomb_is_skipped_and_named(pets, cache, monkeypatch):
    """An image that claims more pixels than Pillow allows is not decoded."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    save(pets / "dog" / "bomb.png", noise(30, 30, 3))
    assert opened(pets, cache).unreadable == ("dog/bomb.png",)


def test_a_damaged_colour_image_does_not_decide_the_kind(tmp_path, cache):
    """When the only colour image turns out cut, the set is grey."""
    root = tmp_path / "grey"
    save(root / "a.png", noise(30, 30))
    save(root / "b.png", noise(30, 30, seed=1))
    save(root / "c.png", noise(30, 30, 3))
    (root / "c.png").write_bytes((root / "c.png").read_bytes()[:1500])
    images = opened(root, cache)
    assert images.unreadable == ("c.png",)
    assert images.images.shape == (2, 30, 30, 1)


def test_only_damaged_images_is_an_error_with_the_reasons(tmp_path, cache):
    """The error says how many of how many, and why for each."""
    root = tmp_path / "bad"
    root.mkdir()
    for name in ("a.png", "b.png"):
        (root / name).write_text("no image")
    with pytest.raises(DataError, match=r"0 of its 2 image files can be read.*(?s:.)*a\.png: its content is"):
        opened(root, cache)
    assert not list(cache.iterdir())


def test_a_single_image_is_too_few(tmp_path, cache):
    """Two are needed: one to train on, one to hold out."""
    save(tmp_path / "one" / "a.png", noise(4, 4))
    with pytest.raises(DataError, match="1 of its 1 image files can be read, and at least 2 are needed"):
        opened(tmp_path / "one", cache)


def test_a_class_with_only_damaged_images_is_an_error(pets, cache):
    """A class nobody can learn is named."""
    (pets / "fox").mkdir()
    (pets / "fox" / "a.png").write_text("no image")
    with pytest.raises(DataError, match="1 classes have no image that can be read: fox"):
        opened(pets, cache)


def test_an_empty_class_folder_is_named(pets, cache):
    """It would shift the class numbers or stand for nothing: the user decides."""
    (pets / "fox").mkdir()
    (pets / "fox" / "notes.txt").touch()
    with pytest.raises(
        DataError, match=r"3 class folders hold no images: fox \(left out in all: 1 \.txt\); .*remove the empty"
    ):
        opened(pets, cache)


@pytest.mark.parametrize("sub_folders", [(), ("a", "b")])
def test_a_folder_without_images_says_what_was_looked_for(tmp_path, cache, sub_folders):
    """Empty, or with empty classes only."""
    root = tmp_path / "empty"
    root.mkdir()
    for name in sub_folders:
        (root / name).mkdir()
    with pytest.raises(DataError, match=r"holds no images: looked for \.apng, .*\.webp in it and in its sub-folders"):
        opened(root, cache)


def test_images_beside_class_folders_are_an_error(pets, cache):
    """Which class would they be?"""
    save(pets / "loose.png", noise(5, 6, 3))
    with pytest.raises(DataError, match=r"has 1 images beside 2 sub-folders \(cat, dog\)"):
        opened(pets, cache)


def test_train_and_test_folders_are_not_taken_for_classes(pets, cache, tmp_path):
    """A whole data set given by mistake would otherwise train a model that tells `test` from `train`."""
    shutil.copytree(pets, tmp_path / "all" / "train")
    shutil.copytree(pets, tmp_path / "all" / "test")
    with pytest.raises(DataError, match=r"holds test, train, parts of a data set, not classes; give one of them"):
        opened(tmp_path / "all", cache)


def test_loops_of_links_come_to_an_end(pets, cache):
    """Links to the folder itself, to a parent and to each other neither hang nor double the images."""
    (pets / "dog" / "self").symlink_to(pets / "dog")
    (pets / "dog" / "up").symlink_to(pets)
    (pets / "dog" / "ring.png").symlink_to(pets / "dog" / "ring.png")
    images = opened(pets, cache)
    assert images.labels.tolist() == [0, 1, 1]
    assert images.unreadable == ("dog/ring.png",)


def test_a_pipe_with_an_image_name_does_not_block(pets, cache):
    """Opening it would wait for ever."""
    os.mkfifo(pets / "dog" / "pipe.png")
    assert len(opened(pets, cache).images) == 3


def test_names_that_are_not_unicode_can_be_printed(pets, cache):
    """File names are bytes; what is reported is text."""
    with open(os.fsencode(pets / "dog") + b"/\xff.png", "wb"):  # noqa: PTH123
        pass
    assert opened(pets, cache).unreadable == ("dog/\ufffd.png",)


def test_constant_images_are_an_error(tmp_path, cache):
    """A standard deviation of zero cannot be divided by."""
    for name in ("a.png", "b.png", "c.png"):
        save(tmp_path / "black" / name, np.full((4, 4), 9, dtype=np.uint8))
    with pytest.raises(DataError, match=r"all 32 pixel values of the 2 training images are 9; .* constant"):
        opened(tmp_path / "black", cache)


def test_progress_is_told_for_every_image(pets, cache):
    """First the headers, then the pixels."""
    calls = []
    opened(pets, cache, progress=lambda *call: calls.append(call))
    assert calls == [(n, 3, what) for what in ("inspecting", "decoding") for n in (1, 2, 3)]


def png(width, height, rows, *, bits=8, kind=2, clear=b""):
    """A PNG of these bytes, with a transparent colour if one is given."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    header += chunk(b"tRNS", clear) if clear else b""
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("size", "image_size", "words"),
    [
        ((60_000, 60_000), 8, "it has more than the 178,956,970 pixels that Pillow decodes; make it smaller"),
        ((8192, 8192), 8, "it declares 8192 x 8192 pixels, more than 74 bytes can hold"),
        ((70_000, 1), 8, "it has 70000 x 1 pixels, and at most 65,536 a side"),
    ],
)
def test_a_picture_that_declares_too_many_pixels_is_skipped_with_the_reason(tmp_path, cache, size, image_size, words):
    """Before anything is decoded, and with what would help."""
    root = tmp_path / "large"
    root.mkdir()
    (root / "a.png").write_bytes(png(*size, bytes(1000)))
    with pytest.raises(DataError, match=rf"0 of its 1 image files can be read(?s:.)*a\.png: {words}"):
        opened(root, cache, image_size=image_size)


def test_pictures_too_large_to_train_on_ask_for_image_size(tmp_path, cache, monkeypatch):
    """Left out they would be missed: a camera's pictures are all of one size."""
    monkeypatch.setattr(folder, "MOST_PIXELS", 29)
    for name in ("a.png", "b.png"):
        save(tmp_path / "large" / name, noise(5, 6, 3))
    with pytest.raises(DataError, match=r"have 6 x 5 pixels, and at most 29 are trained on; pass --set image_size=N"):
        opened(tmp_path / "large", cache)


@pytest.mark.parametrize(
    ("name", "pixel_bytes", "shape", "settings"),
    [
        ("a.png", 6, (3,), {}),
        ("a.png", 11, (4,), {}),
        ("a.webp", 21, (3,), {}),
        ("a.jpg", 6, (3,), {"progressive": True}),
        ("a.jp2", 24, (3,), {}),
    ],
)
def test_a_picture_that_the_memory_does_not_hold_is_refused_by_name(
    tmp_path, cache, name, pixel_bytes, shape, settings
):
    """With what it takes at most; no picture is left out for it, as the set must not depend on the memory."""
    needed_bytes = pixel_bytes * 160_000
    save(tmp_path / "large" / name, noise(400, 400, *shape), **settings)
    save(tmp_path / "large" / "b.png", noise(30, 30, 3))
    with pytest.raises(NoRoomToReadError, match=rf"{name} \(400 x 400 pixels") as caught:
        opened(tmp_path / "large", cache, image_size=16, room_bytes=needed_bytes - 1)
    assert needed_bytes <= caught.value.needed_bytes < needed_bytes + 50_000
    enough = opened(tmp_path / "large", cache, image_size=16, room_bytes=caught.value.needed_bytes)
    assert len(enough.images) == 2 and not enough.unreadable


def test_a_jpeg_counts_with_the_size_that_it_is_decoded_to(tmp_path, cache):
    """A camera's picture may be larger than the memory: its decoder makes it smaller for nothing."""
    for name in ("a.jpg", "b.jpg"):
        save(tmp_path / "large" / name, noise(800, 800, 3))
    assert len(opened(tmp_path / "large", cache, image_size=16, room_bytes=100_000).images) == 2


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


def test_pictures_replaced_by_others_of_the_same_size_and_time_are_noticed(tmp_path, cache):
    """Archives set fixed times; the old pictures are never trained on."""
    for seed in (1, 2):
        for number in range(3):
            path = tmp_path / "set" / f"{number}.bmp"
            save(path, noise(5, 6, 3, seed=10 * seed + number))
            os.utime(path, (0, 0))
        np.testing.assert_array_equal(opened(tmp_path / "set", cache).images[0], noise(5, 6, 3, seed=10 * seed))


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


def test_a_picture_that_asks_for_more_memory_than_there_is_is_skipped(pets, cache, monkeypatch):
    """Damaged headers ask for any amount: the picture is named and the others are kept."""

    def refuse(*_arguments, **_options):
        raise MemoryError

    save(pets / "cat" / "z.tif", noise(5, 6, 3))
    monkeypatch.setattr(TiffImagePlugin.TiffImageFile, "load", refuse)
    assert opened(pets, cache).unreadable == ("cat/z.tif",)


def test_a_file_that_is_too_long_for_a_picture_is_skipped(pets, cache):
    """Some decoders read a file whole: one with a hole of a terabyte would be the end."""
    with (pets / "cat" / "hole.webp").open("wb") as file:
        file.write(b"RIFF\xff\xff\xff\x7fWEBPVP8 ")
        file.truncate(10**12)
    assert opened(pets, cache).unreadable == ("cat/hole.webp",)


def test_devices_and_sockets_with_image_names_are_passed_over(pets, cache):
    """Neither is a file that could be read to its end, and neither is waited for."""
    (pets / "cat" / "zero.png").symlink_to("/dev/zero")
    (pets / "cat" / "random.jpg").symlink_to("/dev/random")
    (pets / "cat" / "terminal.gif").symlink_to("/dev/tty")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(pets / "cat" / "socket.png"))  # a socket's whole path may be too long for it
        assert len(opened(pets, cache).images) == 3


def test_of_thousands_of_frames_one_is_read(tmp_path, cache):
    """An animated GIF of 3,000 frames costs no more than its first."""
    frames = [Image.fromarray(noise(4, 4, 3, seed=number % 9)) for number in range(3000)]
    (tmp_path / "moving").mkdir()
    for name in ("a.gif", "b.gif"):
        frames[0].save(tmp_path / "moving" / name, save_all=True, append_images=frames[1:])
    images = opened(tmp_path / "moving", cache)
    assert images.images.shape == (2, 4, 4, 3) and images.unreadable == ()


def test_too_many_classes_images_or_damaged_files_are_an_error(pets, cache, monkeypatch):
    """Each keeps a name in memory; beyond the limits the folder is not what was meant."""
    monkeypatch.setattr(class_folders, "MOST_CLASSES", 1)
    with pytest.raises(DataError, match="has 2 sub-folders, each a class, and at most 1 classes are accepted"):
        opened(pets, cache)
    monkeypatch.setattr(class_folders, "MOST_CLASSES", 100)
    monkeypatch.setattr(folder, "MOST_IMAGES", 2)
    with pytest.raises(DataError, match="holds 3 images, and at most 2 are trained on"):
        opened(pets, cache)
    monkeypatch.setattr(folder, "MOST_IMAGES", 100)
    monkeypatch.setattr(folder, "MOST_UNREADABLE", 1)
    for name in ("a.png", "b.png"):
        (pets / "cat" / name).write_text("no image")
    with pytest.raises(DataError, match=r"more than 1 of its 5 image files cannot be read, the last being cat/b\.png"):
        opened(pets, cache)
