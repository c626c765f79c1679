"""Which folders are classes, and which are parts of a data set or lie around it."""

import pytest

from edgeblocks.data.class_folders import find_classes
from edgeblocks.errors import DataError


def tree(root, *files):
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def pets(*parts):
    return [f"{part}/{name}/1.png" for part in parts for name in ("cat", "dog")]


@pytest.mark.parametrize(
    "parts",
    [
        ("train", "test"),
        ("Training", "Testing"),
        ("train", "eval"),
        ("train_set", "test_set"),
        ("seg_train", "seg_test", "seg_pred"),
        ("train2017", "val2017", "annotations"),
        ("trainset", "validation images"),
    ],
)
@pytest.mark.parametrize("wrapped", ["", "set/"])
def test_folders_called_as_parts_are_refused(tmp_path, parts, wrapped):
    """Whatever is in them; the training part is named, in the folder around them too."""
    root = tree(tmp_path, *(f"{wrapped}{part}/{number}.png" for part in parts for number in range(2)))
    chosen = next(part for part in parts if "rain" in part)
    with pytest.raises(DataError, match=rf"parts of a data set, not classes; give one of them, .*{wrapped}{chosen};"):
        find_classes(root)


def test_folders_that_hold_the_same_folders_are_refused(tmp_path):
    """Their names say nothing: 2019 and 2020, each with cat and dog."""
    with pytest.raises(DataError, match=r"hold the same 2 sub-folders \(cat, dog\), as parts of a data set do.*2019"):
        find_classes(tree(tmp_path, *pets("2019", "2020")))


@pytest.mark.parametrize(
    "names",
    [
        ("bus", "train"),
        ("test tube", "train station"),
        ("test1", "test2"),
        ("train",),
    ],
)
def test_classes_may_be_called_so(tmp_path, names):
    """A train is a vehicle, and one folder alone is no part of anything."""
    assert find_classes(tree(tmp_path, *(f"{name}/1.png" for name in names))).names == names


@pytest.mark.parametrize(
    "files",
    [
        ("cat/images/1.png", "dog/images/1.png"),
        ("cat/old/1.png", "cat/new/1.png", "dog/old/1.png", "dog/white/1.png", "dog/black/1.png"),
        ("cat/old/1.png", "cat/new/1.png", "dog/old/1.png", "dog/new/1.png", "dog/1.png"),
    ],
)
def test_classes_may_have_folders(tmp_path, files):
    """One and the same in each, some that differ, or pictures beside them."""
    found = find_classes(tree(tmp_path, *files))
    assert found.names == ("cat", "dog") and not found.warnings


def test_parts_inside_of_classes_are_told(tmp_path):
    """Their pictures are one set, as they always were."""
    found = find_classes(tree(tmp_path, *(f"{name}/{part}/1.png" for name in "ab" for part in ("train", "test"))))
    assert found.names == ("a", "b")
    assert "each class has the folders test, train: the pictures of all of them are read" in found.warnings[0]


@pytest.mark.parametrize("way", ["train", "pets-master/images"])
def test_the_classes_in_a_folder_around_them_are_found(tmp_path, way):
    """Archives are unpacked into one; what is told names it."""
    found = find_classes(tree(tmp_path, *pets(way)))
    assert (found.root, found.names) == (tmp_path / way, ("cat", "dog"))
    assert f"{way} is the one folder in {tmp_path}: the classes are in it" in found.warnings[0]


@pytest.mark.parametrize("files", [("cat/1.png",), ("cat/old/1.png",), ("cat/1.png", "cat/old/1.png", "cat/new/1.png")])
def test_a_single_class_stays_one(tmp_path, files):
    """Where there are no several folders to descend to, or pictures beside them."""
    found = find_classes(tree(tmp_path, *files))
    assert (found.root, found.names) == (tmp_path, ("cat",))


@pytest.mark.parametrize(("name", "told"), [("train", True), ("images", True), ("Test_Set", True), ("cat", False)])
def test_a_single_class_that_is_called_as_no_class_is_told(tmp_path, name, told):
    """Its pictures may have classes in a list beside them, or none; the folder to give is named."""
    found = find_classes(tree(tmp_path, f"{name}/1.png", f"{name}/2.png", "labels.csv"))
    assert found.names == (name,)
    assert [warning.endswith(f"to train without classes, give {tmp_path / name}") for warning in found.warnings] == (
        [True] if told else []
    )


def test_folders_around_folders_come_to_an_end(tmp_path):
    """A link back to the beginning is no way to classes."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").symlink_to(tmp_path)
    assert find_classes(tmp_path).names == ("a",)


def test_images_and_their_masks_are_doubted(tmp_path):
    """They are seldom two classes."""
    found = find_classes(tree(tmp_path, "images/1.png", "masks/1.png"))
    assert found.names == ("images", "masks") and "the classes are called images, masks" in found.warnings[0]
