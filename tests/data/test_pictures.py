import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edgeblocks.data.pictures import image_grid, save_png, to_uint8
from edgeblocks.errors import ConfigError, RunError, StorageError


def random_images(*shape):
    return np.random.default_rng(0).integers(0, 256, size=shape, dtype=np.uint8)


@given(
    num=st.integers(1, 20),
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20), st.sampled_from([1, 3])),
    columns=st.none() | st.integers(1, 25),
    min_cell=st.integers(1, 30),
    padding=st.integers(0, 3),
)
def test_every_image_is_in_its_cell(num, shape, columns, min_cell, padding):
    """Oracle: reading the cells back row by row gives every pixel of every image, and the rest is one grey."""
    height, width, _ = shape
    images = random_images(num, *shape)
    grid = image_grid(images, columns=columns, min_cell=min_cell, padding=padding)
    num_columns = int(np.ceil(np.sqrt(num))) if columns is None else min(columns, num)
    cell_width = (grid.shape[1] - padding) // num_columns - padding
    factor = cell_width // width
    covered = np.zeros(grid.shape[:2], dtype=bool)
    for index in range(num):
        row, column = divmod(index, num_columns)
        y = padding + row * (height * factor + padding)
        x = padding + column * (width * factor + padding)
        cell = np.s_[y : y + height * factor, x : x + width * factor]
        covered[cell] = True
        np.testing.assert_array_equal(grid[cell], np.kron(images[index], np.ones((factor, factor, 1), dtype=np.uint8)))
    assert min(height, width) * factor >= min_cell
    assert factor == 1 or min(height, width) * (factor - 1) < min_cell
    assert (grid[~covered] == 224).all()


@pytest.mark.parametrize(("num", "shape"), [(64, (402, 402)), (10, (152, 202)), (1, (52, 52)), (3, (102, 102))])
def test_nearly_square_by_default(num, shape):
    """64 images make 8 x 8, 10 make 3 x 4: cells of 48 pixels, lines of 2."""
    assert image_grid(random_images(num, 8, 8, 1)).shape == (*shape, 1)


def test_large_images_keep_their_size():
    """Images of 64 x 50 are not enlarged."""
    assert image_grid(random_images(4, 64, 50, 3), padding=0).shape == (128, 100, 3)


def test_an_empty_grid_is_refused():
    """No images or no columns make no picture."""
    with pytest.raises(ValueError, match="0 images"):
        image_grid(random_images(0, 8, 8, 1))
    with pytest.raises(ValueError, match="0 columns"):
        image_grid(random_images(2, 8, 8, 1), columns=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_round_trip(tmp_path, channels):
    """The file holds exactly the pixels, in a folder made for it, and no temporary file stays."""
    picture = random_images(7, 5, channels)
    path = tmp_path / "new" / "folder" / "grid.PNG"
    save_png(path, picture)
    with Image.open(path) as image:
        assert image.format == "PNG"
        np.testing.assert_array_equal(np.asarray(image).reshape(picture.shape), picture)
    assert [entry.name for entry in path.parent.iterdir()] == ["grid.PNG"]


def test_an_old_picture_is_replaced(tmp_path):
    """Writing twice leaves the second picture."""
    path = tmp_path / "grid.png"
    save_png(path, np.zeros((4, 4, 3), dtype=np.uint8))
    save_png(path, np.full((4, 4, 3), 9, dtype=np.uint8))
    with Image.open(path) as image:
        assert (np.asarray(image) == 9).all()


@pytest.mark.parametrize("name", ["grid.jpg", "grid", ".png"])
def test_other_suffixes_are_refused(tmp_path, name):
    """The message names the flag and a name that works."""
    with pytest.raises(ConfigError, match=r"-o .*ends in \.png"):
        save_png(tmp_path / name, np.zeros((4, 4, 3), dtype=np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_a_refusing_disk_is_reported(tmp_path):
    """A file where the folder should be: the error has the path and the system's reason."""
    (tmp_path / "taken").write_text("a file")
    path = tmp_path / "taken" / "grid.png"
    with pytest.raises(StorageError, match=r"grid\.png: (File exists|Not a directory)"):
        save_png(path, np.zeros((4, 4, 3), dtype=np.uint8))


def test_a_failed_replace_leaves_no_temporary_file(tmp_path):
    """A folder of that name cannot be replaced; nothing else is left behind."""
    (tmp_path / "grid.png").mkdir()
    with pytest.raises(StorageError, match=r"grid\.png"):
        save_png(tmp_path / "grid.png", np.zeros((4, 4, 3), dtype=np.uint8))
    assert [entry.name for entry in tmp_path.iterdir()] == ["grid.png"]


def test_a_full_disk_is_reported(tmp_path):
    """The reason of a full disk reaches the user, and the old picture stays."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "grid.png"
    save_png(path, np.zeros((4, 4, 3), dtype=np.uint8))
    before = path.read_bytes()
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, former[1]))
    try:
        with pytest.raises(StorageError, match="File too large"):
            save_png(path, random_images(64, 64, 3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["grid.png"]


@given(mean=st.floats(0, 1), scale=st.floats(0.1, 10), dtype=st.sampled_from([np.float32, np.float64]))
def test_pixels_survive_model_space(mean, scale, dtype):
    """All 256 values return exactly from model space, in the order [N, H, W, C]."""
    pixels = np.arange(2 * 8 * 16 * 3).astype(np.uint8).reshape(2, 8, 16, 3)
    model_space = ((pixels.transpose(0, 3, 1, 2).astype(dtype) / 255 - mean) * scale).astype(dtype)
    np.testing.assert_array_equal(to_uint8(model_space, mean=mean, scale=scale), pixels)


def test_values_out_of_range_are_cut():
    """Values beyond black and white become black and white, infinities included."""
    images = np.array([-9, -1, 0, 1, 9, -np.inf, np.inf], dtype=np.float32).reshape(1, 1, 1, 7)
    assert to_uint8(images, mean=0.5, scale=2.0).ravel().tolist() == [0, 0, 128, 255, 255, 0, 255]


def test_not_a_number_is_no_colour():
    """A diverged model is reported with the number of images, not painted black."""
    images = np.zeros((3, 1, 2, 2))
    images[1, 0, 0, 0] = np.nan
    with pytest.raises(RunError, match="1 of 3 images"):
        to_uint8(images, mean=0.5, scale=2.0)


def test_needs_no_torch():
    """An exported model is drawn in a process that never loads torch or onnxruntime."""
    program = (
        "import sys, edgeblocks.data.pictures as p\n"
        "assert not {'numpy', 'PIL'} & set(sys.modules), 'loaded before use'\n"
        "import numpy as np\n"
        "p.image_grid(p.to_uint8(np.zeros((2, 1, 8, 8)), mean=0.5, scale=2.0))\n"
        "assert not {'torch', 'onnxruntime'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
