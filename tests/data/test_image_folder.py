"""Folders of image files, whole and broken."""

import os
import shutil
import socket

import numpy as np
import pytest
from support.picture_files import noise, opened, save

from edgeblocks.errors import DataError


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


def test_pictures_replaced_by_others_of_the_same_size_and_time_are_noticed(tmp_path, cache):
    """Archives set fixed times; the old pictures are never trained on."""
    for seed in (1, 2):
        for number in range(3):
            path = tmp_path / "set" / f"{number}.bmp"
            save(path, noise(5, 6, 3, seed=10 * seed + number))
            os.utime(path, (0, 0))
        np.testing.assert_array_equal(opened(tmp_path / "set", cache).images[0], noise(5, 6, 3, seed=10 * seed))


def test_devices_and_sockets_with_image_names_are_passed_over(pets, cache):
    """Neither is a file that could be read to its end, and neither is waited for."""
    (pets / "cat" / "zero.png").symlink_to("/dev/zero")
    (pets / "cat" / "random.jpg").symlink_to("/dev/random")
    (pets / "cat" / "terminal.gif").symlink_to("/dev/tty")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(pets / "cat" / "socket.png"))  # a socket's whole path may be too long for it
        assert len(opened(pets, cache).images) == 3
