"""Files of arrays (.npz), whole and broken."""

import io
import re
import tracemalloc
import zipfile

import numpy as np
import pytest

from edgeblocks.data.images import open_images
from edgeblocks.errors import DataError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (10, 4, 5, 3), dtype=np.uint8)
LABELS = np.arange(10) % 3


@pytest.fixture
def load(tmp_path):
    """Saves the arrays and opens them."""

    def save_and_open(*, image_size=None, hold_out=0.2, **arrays):
        np.savez_compressed(tmp_path / "set.npz", **arrays)
        return opened(tmp_path, image_size=image_size, hold_out=hold_out)

    return save_and_open


def opened(tmp_path, image_size=None, hold_out=0.2):
    source = str(tmp_path / "set.npz")
    return open_images(source, image_size=image_size, hold_out=hold_out, seed=0, cache_dir=tmp_path / "cache")


def test_images_and_labels_come_back(load):
    """Every value, in order."""
    images = load(images=IMAGES, labels=LABELS.astype(np.uint8))
    np.testing.assert_array_equal(images.images, IMAGES)
    np.testing.assert_array_equal(images.labels, LABELS)
    assert images.class_names == ("0", "1", "2")
    assert len(images.train) == 8 and len(images.held_out) == 2
    np.testing.assert_array_equal(images.gather(np.array([9, 0]))[0], IMAGES[[9, 0]])


def test_arrays_of_many_pieces_come_back(load):
    """Values and labels keep their places when the array is unpacked in several pieces."""
    many = RNG.integers(0, 256, (3000, 32, 32), dtype=np.uint8)
    images = load(images=many, labels=np.arange(3000))
    np.testing.assert_array_equal(images.images[..., 0], many)
    np.testing.assert_array_equal(images.labels, np.arange(3000))


def test_images_without_labels_are_unconditional(load):
    """And without channels they are grey."""
    images = load(images=IMAGES[..., 0])
    assert images.labels is None and images.class_names == ()
    assert images.images.shape == (10, 4, 5, 1)


def test_keras_names_bring_their_own_test_part(load):
    """The test part is held out, whatever hold_out says; labels of shape (N, 1) are accepted."""
    images = load(
        x_train=IMAGES[:7], y_train=LABELS[:7, None], x_test=IMAGES[7:], y_test=LABELS[7:, None], hold_out=0.5
    )
    assert images.train.tolist() == list(range(7)) and images.held_out.tolist() == [7, 8, 9]
    np.testing.assert_array_equal(images.images, IMAGES)
    np.testing.assert_array_equal(images.labels, LABELS)


def test_keras_training_part_alone_is_split(load):
    """Without a test part, hold_out counts."""
    images = load(x_train=IMAGES, y_train=LABELS)
    assert len(images.held_out) == 2


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, ">i2"])
def test_other_whole_numbers_within_a_byte_are_accepted(load, dtype):
    """The kind of number does not matter, its value does."""
    np.testing.assert_array_equal(load(images=IMAGES.astype(dtype)).images, IMAGES)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numbers_from_zero_to_one_are_scaled(load, dtype):
    """Rounded to the nearest of 256 shades."""
    np.testing.assert_array_equal(load(images=(IMAGES / 255).astype(dtype)).images, IMAGES)


def test_truth_values_are_black_and_white(load):
    """False is 0, True is 255."""
    np.testing.assert_array_equal(load(images=IMAGES > 127).images, np.where(IMAGES > 127, 255, 0))


@pytest.mark.parametrize("kind", [str, "S", np.str_])
def test_labels_may_be_names(load, kind):
    """Classes in the order of the names, whatever comes first."""
    names = np.array(["dog", "cat", "fox", "dog", "cat"] * 2, dtype=kind)
    images = load(images=IMAGES, labels=names)
    assert images.class_names == ("cat", "dog", "fox")
    assert [images.class_names[number] for number in images.labels] == names.astype(str).tolist()
    assert images.warnings == ()


def test_names_of_many_pieces_come_back(load, monkeypatch):
    """Names keep their numbers when the array is unpacked in several pieces."""
    monkeypatch.setattr("edgeblocks.data.npz._PIECE_BYTES", 1000)
    names = np.array([f"{number * 7 % 10:40}\u00e4" for number in range(10)])
    images = load(images=IMAGES, labels=names)
    assert [images.class_names[number] for number in images.labels] == names.tolist()


def test_class_names_name_the_numbers(load):
    """In their order, which is not that of the alphabet; labels that are names are numbered in it, too."""
    names = np.array(["dog", "cat", "ant"])
    by_number = load(images=IMAGES, labels=LABELS, class_names=names)
    assert by_number.class_names == ("dog", "cat", "ant")
    np.testing.assert_array_equal(by_number.labels, LABELS)
    by_name = load(images=IMAGES, labels=names[LABELS], class_names=names)
    np.testing.assert_array_equal(by_name.labels, LABELS)
    assert by_name.fingerprint == by_number.fingerprint


@pytest.mark.parametrize(
    ("labels", "names", "classes", "told"),
    [
        (
            LABELS + 1,
            None,
            ("1", "2", "3"),
            "no image has the label 0; the 3 classes are those that some have: 1, 2, 3",
        ),
        (LABELS * 20 + 3, None, ("3", "23", "43"), "no image has the label 0, 1, 2, 4, .* and 31 more; the 3 classes"),
        (LABELS, ["a", "b", "c", "d"], ("a", "b", "c"), "no image has the label d;"),
        (np.array(["x"] * 5 + ["z"] * 5), ["x", "y", "z"], ("x", "z"), "no image has the label y;"),
    ],
)
def test_a_class_without_images_is_none(load, labels, names, classes, told):
    """Labels from 1 or with gaps would be classes that nobody can learn: they are numbered anew, and that is told."""
    given = {} if names is None else {"class_names": np.array(names)}
    images = load(images=IMAGES, labels=labels, **given)
    assert images.class_names == classes
    assert len(np.unique(images.labels)) == len(classes) == images.labels.max() + 1
    assert re.search(told, images.warnings[0])


def test_a_class_of_the_test_part_alone_is_told(load):
    """The user's own parts stay as they are."""
    y_test = np.array([0, 1, 2, 2])
    images = load(x_train=IMAGES[:6], y_train=np.arange(6) % 2, x_test=IMAGES[6:], y_test=y_test)
    assert images.class_names == ("0", "1", "2")
    assert images.warnings == ("1 of 3 classes have images in the test part alone and are not learned: 2",)


def test_arrays_that_are_not_used_are_told(load, tmp_path):
    """Labels under another name would be missed without a word."""
    for images in (load(images=IMAGES, label=LABELS, x_val=IMAGES), opened(tmp_path)):
        assert images.labels is None
        assert images.reading == "10 images; left out: 2 arrays (label, x_val)"
    assert load(images=IMAGES, labels=LABELS).reading == "10 images in 3 classes from 3 (1) to 4 (0)"


def test_an_image_that_may_be_taken_for_many_is_told(load):
    """One of 8 x 5 pixels in colour has the shape of 8 grey ones of 5 x 3."""
    assert "3 pixels wide" in load(images=IMAGES.reshape(-1, 5, 3)).warnings[0]


def test_image_size_is_honoured(load):
    """Cut to the central square and resized, grey or colour."""
    assert load(images=IMAGES, image_size=8).images.shape == (10, 8, 8, 3)
    square = load(images=IMAGES[..., 0], image_size=4).images
    assert square.shape == (10, 4, 4, 1)
    np.testing.assert_array_equal(square[..., 0], IMAGES[..., :4, 0])


def test_the_same_content_elsewhere_has_the_same_fingerprint(load, tmp_path):
    """A run may be resumed after the file was moved or packed again; other data is noticed."""
    first = load(images=IMAGES, labels=LABELS).fingerprint
    (tmp_path / "moved").mkdir()
    np.savez(tmp_path / "moved" / "set.npz", images=IMAGES, labels=LABELS)
    assert opened(tmp_path / "moved").fingerprint == first
    assert load(images=IMAGES, labels=LABELS[::-1]).fingerprint != first
    assert load(images=IMAGES[::-1], labels=LABELS).fingerprint != first


NAN = (IMAGES / 255).astype(np.float32)
NAN[3, 0, 2, 1] = np.nan
NAN[4, 1, 1, 0] = np.inf


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": IMAGES}, r"holds the arrays pictures; wanted `images` and optionally `labels`, or x_train"),
        ({"images": IMAGES, "x_train": IMAGES}, "holds the arrays images, x_train; wanted"),
        ({"images": IMAGES, "labels": LABELS[:9]}, "10 images in `images` and 9 labels in `labels`"),
        ({"images": IMAGES[0, :, 0]}, r"`images` has shape \(4, 3\), 2 dimensions; wanted N x height x width"),
        ({"images": IMAGES[None]}, "5 dimensions; wanted"),
        (
            {"images": np.zeros((2, 4, 4, 4), np.uint8)},
            r"4 channels; .*drop the transparency with images\[\.\.\., :3\]",
        ),
        ({"images": IMAGES.transpose(0, 3, 1, 2)}, r"5 channels; .*images\.transpose\(0, 2, 3, 1\)"),
        ({"images": IMAGES[:0]}, r"shape \(0, 4, 5, 3\): it is empty"),
        ({"images": IMAGES[:1]}, "holds 1 image; at least 2 are needed"),
        ({"images": NAN}, r"2 values that are NaN or infinite, the first at \[3, 0, 2, 1\]"),
        ({"images": IMAGES.astype(np.float32)}, r"\(float32\) has values from 0 to 25\d; wanted 0 to 1 for floating"),
        ({"images": IMAGES.astype(np.int16) - 1}, r"\(int16\) has values from -1 to 25\d; wanted 0 to 255"),
        ({"images": IMAGES.astype(complex)}, "dtype complex128; wanted uint8"),
        ({"images": np.array([[["a"]]] * 2)}, "dtype <U1; wanted uint8"),
        ({"images": np.array([[[None]]] * 2)}, r"Python objects \(dtype object\), which only pickle could load"),
        (
            {"images": np.asfortranarray(IMAGES)},
            r"column by column \(Fortran order\).*numpy\.ascontiguousarray\(images\)",
        ),
        ({"images": IMAGES, "labels": LABELS - 1}, "4 negative class numbers, the smallest -1"),
        (
            {"images": IMAGES, "labels": LABELS + 100_000},
            "goes up to 100002, which means 100003 classes, and at most 100000",
        ),
        ({"images": IMAGES, "labels": np.full(10, 2**64 - 1, np.uint64)}, "goes up to 18446744073709551615"),
        ({"images": IMAGES, "labels": LABELS / 1}, "`labels` has dtype float64; wanted whole numbers"),
        ({"images": IMAGES, "labels": np.eye(10)}, r"shape \(10, 10\); wanted one class number .* argmax\(1\)"),
        ({"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES}, "labels for one part only"),
        ({"x_train": IMAGES, "x_test": IMAGES, "y_test": LABELS}, "labels for one part only"),
        ({"x_train": IMAGES, "x_test": IMAGES[:, 1:]}, "`x_train` are 4 x 5 x 3 and those of `x_test` 3 x 5 x 3"),
        (
            {"images": IMAGES, "labels": LABELS.astype(object)},
            r"`labels` holds Python objects.*numpy\.array\(\.\., str\)",
        ),
        (
            {"images": IMAGES, "labels": LABELS, "class_names": np.array(["a", "b"])},
            "a label is 2, and `class_names` names 0 to 1",
        ),
        (
            {"images": IMAGES, "labels": np.array(["a", "b"] * 5), "class_names": np.array(["a", "c"])},
            "1 labels are not in `class_names`: b",
        ),
        (
            {"images": IMAGES, "labels": LABELS, "class_names": np.array(["a", "b", "a"])},
            "1 of its 3 names are there already",
        ),
        (
            {"images": IMAGES, "labels": LABELS, "class_names": np.eye(3)},
            r"`class_names` has shape \(3, 3\) and dtype float64",
        ),
        (
            {"images": IMAGES, "labels": np.array(["x" * 2000] * 10)},
            "take 8000 bytes each, and names of classes take 1 to 4096",
        ),
        ({"images": IMAGES, "labels": np.array([b"\xff"] * 10)}, "`labels` holds names that are no text in Unicode"),
        ({"images": IMAGES, "labels": np.array(["\ud800"] * 10)}, "`labels` holds names that are no text in Unicode"),
        (
            {"images": IMAGES, "labels": np.full(10, 2**31, np.uint32).view("<U1")},
            "`labels` holds names that are no text",
        ),
        (
            {"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES, "y_test": LABELS.astype(str)},
            "the labels of one part are numbers and those of the other names",
        ),
        ({"images": np.full((5, 2, 2), 3, np.uint8)}, "all 16 pixel values of the 4 training images are 3"),
    ],
)
def test_arrays_that_are_not_images_are_explained(load, arrays, message):
    """Each mistake is answered with the numbers and what to do."""
    with pytest.raises(DataError, match=message):
        load(**arrays)


@pytest.mark.parametrize("kept_bytes", [0, 10, 500, 1000, -1, -30])
def test_a_cut_file_is_explained(tmp_path, kept_bytes):
    """Wherever the download broke off, and nothing is left in the cache."""
    np.savez(tmp_path / "set.npz", images=IMAGES, labels=LABELS)
    whole = (tmp_path / "set.npz").read_bytes()
    (tmp_path / "set.npz").write_bytes(whole[:kept_bytes])
    with pytest.raises(DataError, match=r"cannot be read as an \.npz file"):
        opened(tmp_path)
    assert not list((tmp_path / "cache").iterdir())


def test_a_flipped_bit_is_noticed(tmp_path):
    """The zip's checksum is compared, also for the last piece."""
    np.savez(tmp_path / "set.npz", images=IMAGES)
    data = bytearray((tmp_path / "set.npz").read_bytes())
    data[data.find(IMAGES[9].tobytes()) + 5] ^= 1
    (tmp_path / "set.npz").write_bytes(data)
    with pytest.raises(DataError, match="Bad CRC-32"):
        opened(tmp_path)


def test_damage_anywhere_is_an_error_of_ours_or_harmless(tmp_path):
    """Random bytes overwritten at random places never raise anything but DataError."""
    rng = np.random.default_rng(1)
    np.savez_compressed(tmp_path / "set.npz", images=IMAGES[:3], labels=LABELS[:3])
    whole = (tmp_path / "set.npz").read_bytes()
    num_refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), 3):
            data[place] = rng.integers(256)
        (tmp_path / "set.npz").write_bytes(data)
        try:
            opened(tmp_path)
        except DataError:
            num_refused += 1
    assert num_refused > 100


def write_member(path, header_shape, data, descr="|u1"):
    """A zip with an images.npy whose header and data need not agree."""
    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(member, {"descr": descr, "fortran_order": False, "shape": header_shape})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", member.getvalue() + data)


def test_a_header_that_promises_too_much_allocates_nothing(tmp_path):
    """A petabyte in the header is compared with the bytes in the file."""
    write_member(tmp_path / "set.npz", (10**6, 10**5, 10**4), b"\0" * 100)
    with pytest.raises(DataError, match=r"needs 1000000000000\d{3} bytes and has \d{3}; the file is damaged"):
        opened(tmp_path)


def test_a_member_that_is_no_array_is_explained(tmp_path):
    """Some zip with a file of that name."""
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as archive:
        archive.writestr("images.npy", b"hello, this is text")
    with pytest.raises(DataError, match="`images` is not an array that numpy saved"):
        opened(tmp_path)


def test_a_header_that_claims_gigabytes_is_not_read(tmp_path):
    """Version 2 of the format lets a header have 4 GB, and a deflated one takes a thousandth of that in the file."""
    claim = b"\x93NUMPY\x02\x00" + (2**31).to_bytes(4, "little") + b" " * 10**6
    with zipfile.ZipFile(tmp_path / "set.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", claim)
    with pytest.raises(DataError, match="its header claims 2147483648 bytes, and at most 10000 are read"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"(" * 5000, "cannot be read"),
        (b"-" * 9000 + b"1", "cannot be read"),
        (b"{[]: 1}", "cannot be read"),
        (b"9" * 9000, "cannot be read"),
        (b"{'descr': '|u1',\n'fortran_order': False, 'shape': (2,", "cannot be read"),
        (b"{'descr': '|u1', 'fortran_order': False, 'shape': (-2, -3, 2)}", "its shape is"),
        (b"{'descr': '|u1', 'fortran_order': False, 'shape': [2, 3, 2]}", "its shape is"),
        (b"{'descr': '|u1', 'fortran_order': 0, 'shape': (2, 3, 2)}", "its fortran_order is 0"),
        (b"{'descr': [('a', '<f8')], 'fortran_order': False, 'shape': (2, 3, 2)}", "not numbers of one type"),
        (b"{'descr': '<i9', 'fortran_order': False, 'shape': (2, 3, 2)}", "which numpy does not know"),
        (b"{'descr': '|u1', 'shape': (2, 3, 2)}", "its header says"),
        (b"[]", "its header says"),
    ],
)
def test_a_header_that_is_none_is_explained(tmp_path, header, words):
    """What makes Python's parser raise TokenError, RecursionError or MemoryError is a damaged file and nothing else."""
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(12))
    with pytest.raises(DataError, match=f"`images` is not an array that numpy saved .*{words}"):
        opened(tmp_path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packings_that_numpy_does_not_use_are_refused(tmp_path, method):
    """A megabyte of bzip2 can become 20 GB in one step, whatever is asked for."""
    np.savez(tmp_path / "plain.npz", images=IMAGES)
    with zipfile.ZipFile(tmp_path / "plain.npz") as plain, zipfile.ZipFile(tmp_path / "set.npz", "w", method) as packed:
        packed.writestr("images.npy", plain.read("images.npy"))
    with pytest.raises(DataError, match=rf"packed by the zip method {method}; .*numpy\.savez"):
        opened(tmp_path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_member_that_claims_more_than_can_be_packed_is_refused(tmp_path, save):
    """A file of some kilobytes whose tables promise 4 GB: nothing is allocated, no disk is asked for room."""
    save(tmp_path / "set.npz", images=IMAGES)
    content = bytearray((tmp_path / "set.npz").read_bytes())
    place = content.rfind(b"PK\x01\x02")
    content[place + 24 : place + 28] = (2**32 - 2).to_bytes(4, "little")
    (tmp_path / "set.npz").write_bytes(content)
    with pytest.raises(DataError, match="`images` claims 4294967294 bytes, packed in"):
        opened(tmp_path)


def test_a_table_of_contents_of_any_length_is_not_read(tmp_path):
    """20,000 empty members have more names than all that is read of them."""
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as archive:
        for number in range(20_000):
            archive.writestr(f"{number}.npy", b"")
    with pytest.raises(DataError, match=r"its table of contents has \d+ bytes, and at most 1048576 are read"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((2, 4097, 4096), "images of 4097 x 4096 pixels; at most 16777216 pixels"),
        ((2, 1, 65537), "images of 1 x 65537 pixels; .*65536 a side"),
        ((2**24 + 1, 1, 1), "holds 16777217 images, and at most 16777216"),
    ],
)
def test_more_than_anyone_trains_on_is_refused(tmp_path, shape, words):
    """One image of an honest file must not fill the memory, nor a label of each of a billion."""
    np.savez_compressed(tmp_path / "set.npz", images=np.broadcast_to(np.uint8(0), shape))
    with pytest.raises(DataError, match=words):
        opened(tmp_path)


def test_small_images_made_large_are_made_a_few_at_a_time(tmp_path):
    """A piece of small images would be 105 MB once each has 1024 x 1024 pixels; the peak stays below a fifth of it."""
    images = RNG.integers(0, 256, (100, 2, 2), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", images=images)
    tracemalloc.start()
    try:
        assert opened(tmp_path, image_size=1024).images.shape == (100, 1024, 1024, 1)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_a_large_image_of_long_numbers_is_unpacked_in_pieces(tmp_path):
    """Two images of 24 MB each in the file (float64) and 3 MB as bytes: never a whole one in the file's type."""
    images = RNG.integers(0, 256, (2, 1000, 1000, 3), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", images=images / 255)
    tracemalloc.start()
    try:
        found = opened(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 24e6
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(found.images, images)


def test_names_that_are_not_unicode_are_a_damaged_file(tmp_path):
    """The zip says that its names are UTF-8, and they are not."""
    np.savez(tmp_path / "set.npz", images=IMAGES, labels=LABELS)
    content = (tmp_path / "set.npz").read_bytes().replace(b"labels.npy", b"l\xffbels.npy")
    content = bytearray(content)
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = 0
        while (start := content.find(mark, start)) >= 0:
            content[start + place + 1] |= 8
            start += 4
    (tmp_path / "set.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"cannot be read as an \.npz file"):
        opened(tmp_path)
