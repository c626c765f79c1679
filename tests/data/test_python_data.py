"""What `data=` takes from a program: images and texts in their many forms, and words for what is none of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edgeblocks.data.images import open_images
from edgeblocks.data.python_data import store_images, store_texts
from edgeblocks.data.text import open_text
from edgeblocks.errors import DataError, NoRoomToReadError

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 8, 6, 3), dtype=np.uint8)
LABELS = np.arange(12) % 3
NAMES = ["ant", "bee", "cow"]


class Table(list):
    """What is asked of a data set of Hugging Face: rows, and the names and kinds of their columns."""

    def __init__(self, rows, **kinds):
        super().__init__(rows)
        self.column_names = list(kinds)
        self.features = {name: type(kind, (), {"names": NAMES})() for name, kind in kinds.items()}


class Stream(list):
    """One whose columns nobody knows before its rows."""

    column_names = features = None


class DataFrame:
    """What is asked of a data frame: columns by their names, which it gives where it is gone through."""

    def __init__(self, **columns):
        self.columns, self._columns = list(columns), columns

    def __iter__(self):
        return iter(self.columns)

    def __getitem__(self, name):
        return self._columns[name]


class Items(torch.utils.data.Dataset):
    """A data set of torch: a length and items, no iterator, and no error behind the last one."""

    classes = NAMES

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.from_numpy(PIXELS[index % 12]).movedim(2, 0).float() / 255, int(LABELS[index % 12])


def given_images():
    pictures = [Image.fromarray(pixels) for pixels in PIXELS]
    return {
        "pair": (PIXELS, LABELS),
        "tensors": (torch.from_numpy(PIXELS), torch.from_numpy(LABELS)),
        "dict": {"images": PIXELS, "labels": LABELS.tolist(), "class_names": NAMES},
        "names": (PIXELS, [NAMES[label] for label in LABELS]),
        "floats": (PIXELS / 255, LABELS),
        "torch": Items(),
        "generator": ((picture, label) for picture, label in zip(pictures, LABELS, strict=True)),
        "rows": [{"id": 1, "image": picture, "label": label} for picture, label in zip(pictures, LABELS, strict=True)],
        "table": Table(
            ({"photo": picture, "kind": int(label)} for picture, label in zip(pictures, LABELS, strict=True)),
            photo="Image",
            kind="ClassLabel",
        ),
        "stream": Stream({"image": picture, "label": label} for picture, label in zip(pictures, LABELS, strict=True)),
        "frame": DataFrame(image=pictures, label=[NAMES[label] for label in LABELS]),
    }


def images_of(data, cache, **settings):
    size = settings.pop("image_size", None)
    source = store_images(
        data, cache_dir=cache, image_size=size, room_bytes=settings.pop("room_bytes", None), progress=lambda *_: None
    )
    return open_images(source, image_size=size, hold_out=0.25, seed=0, cache_dir=cache)


def texts_of(data, cache, text_key="text"):
    source = store_texts(data, cache_dir=cache, text_key=text_key)
    settings = {"tokenizer": "bytes", "vocabulary": 300, "length": 4, "hold_out": 0, "cache_dir": cache}
    text = open_text(source, **settings)
    return text.tokenizer.decode(text.token_file.read(0, text.num_tokens)), text


@pytest.mark.parametrize("form", given_images())
def test_images_of_every_form_are_those_that_were_given(tmp_path, form):
    """Pixel by pixel, with their labels and the names that the classes have."""
    images = images_of(given_images()[form], tmp_path / "cache")
    pixels, labels = images.gather(np.arange(12))
    np.testing.assert_array_equal(pixels, PIXELS)
    np.testing.assert_array_equal(labels, LABELS)
    named = form in ("dict", "names", "torch", "table", "frame")
    assert images.class_names == (tuple(NAMES) if named else ("0", "1", "2"))
    assert images.source.startswith("python:") and images.reading.startswith("12 images in 3 classes of 4 each")


def test_images_without_labels_and_of_one_channel(tmp_path):
    """An array of them, an array in pieces, lists of arrays; grey stays grey, also beside a first one with colours."""
    for data in (PIXELS[..., 0], torch.from_numpy(PIXELS[..., 0]), list(PIXELS[..., :1]), {"images": PIXELS[..., :1]}):
        images = images_of(data, tmp_path / "cache")
        np.testing.assert_array_equal(images.gather(np.arange(12))[0], PIXELS[..., :1])
        assert images.labels is None and images.class_names == ()
    mixed = images_of([Image.fromarray(PIXELS[0]), Image.fromarray(PIXELS[1, :, :, 0])], tmp_path / "cache")
    np.testing.assert_array_equal(mixed.gather(np.array([1]))[0][0, :, :, 2], PIXELS[1, :, :, 0])
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (
        images_of([clear, *map(Image.fromarray, PIXELS[:3, :4, :4])], tmp_path / "cache").gather(np.array([0]))[0].min()
        == 255
    )


def test_equal_data_have_one_place_in_the_cache_and_other_ones_another(tmp_path):
    """However they are given: the name is of the content."""
    first, again, other = (
        images_of(data, tmp_path / "cache").source for data in ((PIXELS, LABELS), Items(), (PIXELS[::-1], LABELS))
    )
    named = images_of({"images": PIXELS, "labels": LABELS, "class_names": NAMES}, tmp_path / "cache").source
    assert named == again and len({first, again, other}) == 3
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_a_class_of_which_no_image_was_given_is_told_whatever_is_in_the_cache(tmp_path):
    """The same images and labels, named by the classes that they have, are there already."""
    told = [
        images_of({"images": PIXELS, "labels": LABELS, "class_names": names}, tmp_path / "cache").warnings
        for names in (NAMES, [*NAMES, "dodo"])
    ]
    assert told[0] == () and told[1][0].startswith("no image has the label dodo; the 3 classes are those that some")


@pytest.mark.parametrize(("store", "data"), [(images_of, PIXELS), (texts_of, ["the white whale"])])
def test_data_that_are_damaged_in_the_cache_are_given_again(tmp_path, store, data):
    """They do not stay there because they have the name of the content."""
    store(data, tmp_path)
    (stored,) = tmp_path.glob("python-*")
    for path in stored.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    store(data, tmp_path)
    assert list(tmp_path.glob("python-*")) == [stored]


def test_pictures_are_turned_as_their_camera_says(tmp_path):
    """As those of a folder are: the same file, opened by the program and by a folder's reader."""
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "set").mkdir()
    for number in range(2):
        Image.fromarray(PIXELS[number]).save(tmp_path / "set" / f"{number}.png", exif=exif)
    given = images_of([Image.open(path) for path in sorted((tmp_path / "set").iterdir())], tmp_path / "cache")
    read = open_images(str(tmp_path / "set"), image_size=None, hold_out=0, seed=0, cache_dir=tmp_path / "cache")
    both = np.arange(2)
    np.testing.assert_array_equal(given.gather(both)[0], read.gather(both)[0])
    assert given.images.shape == (2, 6, 8, 3)


def test_pictures_of_several_sizes_are_cut_to_one_that_is_named(tmp_path):
    """As pictures in a folder are; and asked for at another size they are told to be of that one."""
    pictures = [Image.new("RGB", (9 + number, 12), (number * 20, 5, 5)) for number in range(4)]
    with pytest.raises(DataError, match=r"image 1 of the data is 12 x 10 x 3, the first 12 x 9 x 3; pass image_size=N"):
        images_of(pictures, tmp_path / "cache")
    images = images_of(pictures, tmp_path / "cache", image_size=8)
    assert images.images.shape == (4, 8, 8, 3)
    with pytest.raises(DataError, match="were read at 8 x 8 pixels, and image_size is 16"):
        open_images(images.source, image_size=16, hold_out=0, seed=0, cache_dir=tmp_path / "cache")


def wrong_images():
    picture = Image.new("L", (4, 4))
    yield (PIXELS, LABELS[:5]), r"12 images and 5 labels; give one label per image"
    yield (PIXELS / 255 * 2 - 1), r"float64 from -1 to .*; wanted 0 to 1; undo its normalisation"
    yield (PIXELS.astype(int) * 9), r"int64 from 0 to .*; wanted 0 to 255"
    yield np.moveaxis(PIXELS, 3, 1), r"shape 3 x 8 x 6; wanted height x width, .*; move the channels last"
    yield np.zeros((3, 4, 4, 4)), r"shape 4 x 4 x 4; .*; drop the transparency"
    yield (
        [picture, Image.fromarray(PIXELS[0])],
        r"image 1 .* is 8 x 6 x 3, the first 4 x 4 x 1; pass image_size",
    )
    yield [picture, Image.new("RGB", (4, 4))], r"the first is grey and this one has colours"
    yield [Image.new("I;16", (4, 4))] * 2, r"image 0 of the data has mode I;16, values of more than 8 bits"
    yield [(picture, 1), (picture, -1)], r"label 1 of the data is -1; give whole numbers from 0, or names"
    yield [(picture, 1), (picture, "b")], r"label 1 is 'b', and those before are numbers; give one kind"
    yield [(picture, 1), picture], r"image 1 of the data has no label, and those before have one"
    yield [(picture, None), (picture, 1)], r"image 1 of the data has a label, and those before have none"
    yield [picture], r"data has 1 image\(s\); at least 2 are needed"
    yield ["a", "b"], r"image 0 of the data is 'a' \(str\); give an array"
    yield {"pixels": PIXELS}, r"has the columns 'pixels', of which none is called `image`"
    yield (
        {"train": Table([], image="Image"), "test": Table([], image="Image")},
        r"the parts 'train', 'test' .*'train'\]",
    )
    yield 5, r"data is a int, which holds nothing that is known; give an array"


@pytest.mark.parametrize(("data", "message"), list(wrong_images()), ids=lambda part: str(part)[:20])
def test_what_are_no_images_is_told_with_a_cure(tmp_path, data, message):
    """Which one, what it is, what is wanted; and nothing is left in the cache."""
    with pytest.raises(DataError, match=message):
        images_of(data, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_picture_that_the_budget_does_not_hold_is_refused(tmp_path):
    """With what it needs."""
    with pytest.raises(NoRoomToReadError, match=r"image 0 of the data \(900 x 800 pixels\)"):
        images_of([Image.new("RGB", (900, 800))] * 2, tmp_path / "cache", room_bytes=10**6)


TEXTS = ["first whale", "", "second — whale\n", "third\r\nwhale"]


@pytest.mark.parametrize(
    "data",
    [
        TEXTS,
        tuple(TEXTS),
        iter(TEXTS),
        np.array(TEXTS),
        {"text": TEXTS},
        [{"text": text, "id": 1} for text in [*TEXTS, None]],
        Table([{"text": text} for text in TEXTS], text="Value"),
        Stream({"text": text} for text in TEXTS),
        DataFrame(text=[text or float("nan") for text in TEXTS]),
    ],
    ids=["list", "tuple", "iterator", "array", "dict", "rows", "table", "stream", "frame"],
)
def test_texts_of_every_form_are_documents(tmp_path, data):
    """With a newline between two, as files of a folder; the empty ones are left out."""
    found, text = texts_of(data, tmp_path / "cache")
    assert found == "\n".join(filter(None, TEXTS))
    empty = 2 if isinstance(data, list) and isinstance(data[-1], dict) and data[-1]["text"] is None else 1
    left_out = f"left out: {empty} empty document{'s' * (empty > 1)}"
    assert text.source.startswith("python:")
    assert text.reading == f"42 B from Python, 3 documents, {text.num_tokens} tokens; {left_out}"


def test_texts_are_found_under_another_name(tmp_path):
    """`text_key` names the column."""
    assert texts_of([{"content": "the whales"}], tmp_path / "cache", text_key="content")[0] == "the whales"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("one string", r"data is 'one string', one string; wanted texts"),
        ([1, 2], r"text 0 of the data is 1 \(int\), not a string"),
        (["a", "b\0"], r"text 1 of the data holds a NUL"),
        ({"body": ["a"]}, r"a dict of 'body', and has no 'text'; name its texts with text_key="),
        ([{"body": "a"}], r"row 0 of the data has no 'text', but 'body'; name the one of the text with text_key="),
        (Stream([{"body": "a"}]), r"row 0 of the data has no 'text', but 'body'"),
        (DataFrame(body=["a"]), r"a dict of 'body', and has no 'text'; name its texts with text_key="),
        (Table([], body="Value"), r"has no column 'text', but 'body'; name the one of the text with text_key="),
    ],
)
def test_what_is_no_text_is_told_with_a_cure(tmp_path, data, message):
    """Which one, and what is wanted."""
    with pytest.raises(DataError, match=message):
        texts_of(data, tmp_path / "cache")


def test_data_that_the_cache_has_no_more_are_asked_for_again(tmp_path):
    """For images and for text."""
    settings = {"tokenizer": "bytes", "vocabulary": 300, "length": 4, "hold_out": 0, "cache_dir": tmp_path}
    for opening in (
        lambda: open_images("python:abc", image_size=None, hold_out=0, seed=0, cache_dir=tmp_path),
        lambda: open_text("python:abc", **settings),
    ):
        with pytest.raises(DataError, match=r"came from a Python program .* give them again .*resume\(RUN, data=..\)"):
            opening()
    with pytest.raises(DataError):
        open_text("python:../" + Path(tmp_path).name, **settings)
    source = images_of((PIXELS, LABELS), tmp_path).source
    with pytest.raises(DataError, match="are images; give text"):
        open_text(source, **settings)
