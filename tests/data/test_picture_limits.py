"""Pictures and folders larger than memory or limits: left out by name, or refused with what would do."""

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin
from support.picture_files import noise, opened, png, save

from edgeblocks.data import class_folders, folder
from edgeblocks.errors import DataError, NoRoomToReadError


def test_a_bomb_is_skipped_and_named(pets, cache, monkeypatch):
    """An image that claims more pixels than Pillow allows is not decoded."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    save(pets / "dog" / "bomb.png", noise(30, 30, 3))
    assert opened(pets, cache).unreadable == ("dog/bomb.png",)


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


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_the_pictures_of_a_phone_are_read(tmp_path, cache, name):
    """48 megapixels, in no more room than one of them takes: left out as too large they would be missed."""
    picture = Image.new("L", (8000, 6000), 40)
    picture.paste(200, (0, 0, 8000, 3000))
    (tmp_path / "set").mkdir()
    picture.save(tmp_path / "set" / name, **({"compress_level": 1} if name == "a.png" else {}))
    save(tmp_path / "set" / "b.png", noise(30, 30))
    images = opened(tmp_path / "set", cache, image_size=8, room_bytes=6 * 48_000_000 + 100_000)
    assert not images.unreadable
    pixels = images.gather(np.array([0]))[0][0, :, :, 0].astype(int)
    assert abs(pixels[:4] - 200).max() < 15 and abs(pixels[4:] - 40).max() < 15  # the filter swings at the edge


def test_a_jpeg_counts_with_the_size_that_it_is_decoded_to(tmp_path, cache):
    """A camera's picture may be larger than the memory: its decoder makes it smaller for nothing."""
    for name in ("a.jpg", "b.jpg"):
        save(tmp_path / "large" / name, noise(800, 800, 3))
    assert len(opened(tmp_path / "large", cache, image_size=16, room_bytes=100_000).images) == 2


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
