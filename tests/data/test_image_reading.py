"""What the user is told of the images that were read."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image
from support.picture_files import noise, opened, save


@pytest.fixture
def pets(tmp_path):
    """Three cats and two dogs, RGB, 6 x 5 pixels."""
    root = tmp_path / "pets"
    for number, name in enumerate(("cat", "dog", "cat", "dog", "cat")):
        save(root / name / f"{number}.png", noise(5, 6, 3, seed=number))
    return root


def test_a_folder_is_told_in_one_line(pets, tmp_path):
    """Images, classes from the smallest to the largest, and what was left out by reason; from the cache the same."""
    assert opened(pets, tmp_path / "cache").reading == "5 images in 2 classes from 2 (dog) to 3 (cat)"
    for name in ("cat/1.HEIC", "cat/2.heic", "dog/noextension", "labels.csv", "cat/.7.png", "dog/Thumbs.db"):
        (pets / name).touch()
    (pets / "cat" / "broken.png").touch()
    save(pets / "cat" / "@eaDir" / "0.png" / "SYNOPHOTO_THUMB_M.jpg", noise(5, 6, 3))
    save(pets / "__MACOSX" / "cat" / "0.png", noise(5, 6, 3))
    os.mkfifo(pets / "dog" / "pipe.png")
    expected = (
        "5 images in 2 classes from 2 (dog) to 3 (cat); left out: 1 unreadable, 2 .heic, 1 .csv, 1 without extension, "
        "1 hidden, 3 of other systems (__MACOSX, @eaDir, Thumbs.db), 1 that are no files"
    )
    first = opened(pets, tmp_path / "cache")
    assert first.reading == expected
    again = opened(pets, tmp_path / "cache", progress=None)
    assert (again.reading, again.warnings) == (first.reading, first.warnings)
    assert first.warnings == (
        "2 .heic files are pictures of kinds that are not read; save them as JPEG or PNG to train on them",
    )


def test_a_flat_folder_and_the_digits_are_told(tmp_path):
    """Without classes, and with classes that are nearly alike."""
    for number in range(3):
        save(tmp_path / "flat" / f"{number}.png", noise(4, 4, seed=number))
    (tmp_path / "flat" / "notes.txt").touch()
    assert opened(tmp_path / "flat", tmp_path / "cache").reading == "3 images; left out: 1 .txt"
    assert opened("digits", tmp_path / "cache").reading == "1,797 images in 10 classes from 174 (8) to 183 (3)"


def test_one_class_is_told_by_its_name(pets, tmp_path):
    """Nothing is to be compared."""
    shutil.rmtree(pets / "dog")
    assert opened(pets, tmp_path / "cache").reading == "3 images in 1 class (cat)"


def test_many_kinds_of_files_are_told_together(pets, tmp_path):
    """The line stays one that is read."""
    for number in range(30):
        (pets / "cat" / f"a.x{number:02}").touch()
    (pets / "cat" / f"a.{'y' * 200}").touch()
    assert opened(pets, tmp_path / "cache").reading.endswith(
        "left out: 1 .x00, 1 .x01, 1 .x02, 1 .x03, 1 .x04, 1 .x05, 25 of 25 other kinds"
    )


@pytest.mark.parametrize("name", ["a.tif", "a.gif", "a.webp", "a.png"])
def test_files_with_more_pages_or_frames_are_told(pets, tmp_path, name):
    """The first is read, as it always was."""
    frames = [Image.fromarray(noise(5, 6, 3, seed=10 + number)) for number in range(3)]
    frames[0].save(pets / "cat" / name, save_all=True, append_images=frames[1:])
    images = opened(pets, tmp_path / "cache")
    assert len(images.images) == 6 and not images.unreadable
    (told,) = images.warnings
    assert told.startswith("1 files hold several pages or frames, of which the first is read")
    assert opened(pets, tmp_path / "cache").warnings == (told,)


def test_images_that_are_enlarged_or_cut_are_told(pets, tmp_path):
    """Neither is seen in a loss."""
    save(pets / "dog" / "long.png", noise(20, 50, 3, seed=20))
    assert opened(pets, tmp_path / "cache", image_size=4).warnings == (
        "1 images are more than twice as long as wide, or as wide as long: what lies outside of their "
        "central square is cut off",
    )
    for _ in range(2):
        told = opened(pets, tmp_path / "cache", image_size=8).warnings
        assert told[0] == "5 images are smaller than 8 x 8 and are enlarged, which adds nothing to be learned"


def test_equal_images_are_told(pets, tmp_path):
    """In two classes a network cannot tell them apart; in one they may be held out and trained on."""
    save(pets / "dog" / "0.bmp", noise(5, 6, 3, seed=0))
    save(pets / "dog" / "1.bmp", noise(5, 6, 3, seed=1))
    images = opened(pets, tmp_path / "cache")
    assert [note.split(";")[0] for note in images.warnings] == [
        "2 images lie in one class and, equal in every pixel, in another",
        "2 of 7 images are there already, equal in every pixel: the hold-out part may hold images that are trained on",
    ]


def test_images_of_few_shades_are_told(tmp_path):
    """Values 0 to 16, as those of the digits, or labels of pixels, are black to the eye."""
    np.savez(tmp_path / "dark.npz", images=noise(6, 4, 4) % 17)
    (told,) = opened(tmp_path / "dark.npz", tmp_path / "cache").warnings
    assert told.startswith("the largest value of all images is 16 of 255, so they are nearly black")


@pytest.mark.parametrize(("one", "other"), [("Cat", "cat"), ("caf\u00e9", "cafe\u0301")])
def test_classes_that_are_called_alike_are_told(tmp_path, one, other):
    """Capitals and composed letters differ between systems; the names are written so that they differ."""
    for number, name in enumerate((one, other)):
        for k in range(2):
            save(tmp_path / "set" / name / f"{k}.png", noise(4, 4, seed=2 * number + k))
    images = opened(tmp_path / "set", tmp_path / "cache")
    assert len(images.class_names) == 2
    assert ascii(other) in images.warnings[0] and ascii(one) in images.warnings[0]
