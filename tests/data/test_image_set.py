"""What open_images promises whatever the source: digits, the split, statistics, settings."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeblocks.data.images import open_images, split, with_every_class
from edgeblocks.errors import ConfigError, DataError


def opened(source, cache_dir, **settings):
    return open_images(
        str(source), **{"image_size": None, "hold_out": 0.1, "seed": 0, "cache_dir": cache_dir} | settings
    )


def test_the_bundled_digits_are_those_of_scikit_learn(tmp_path):
    """Every pixel and label equals scikit-learn's copy, rescaled from 0..16 to 0..255."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    images = opened("digits", tmp_path)
    np.testing.assert_array_equal(images.images[..., 0], np.rint(digits.images * 255 / 16))
    np.testing.assert_array_equal(images.labels, digits.target)
    assert images.class_names == tuple("0123456789")
    assert images.images.dtype == np.uint8 and images.labels.dtype == np.int64


def test_digits_need_no_cache_and_count_their_memory(tmp_path):
    """Nothing is written for the built-in set, and resident_bytes is what its arrays hold."""
    images = opened("digits", tmp_path / "never")
    assert not (tmp_path / "never").exists()
    assert images.resident_bytes == 1797 * (64 + 8 + 8)
    assert images.batch_resident_bytes(10) == 10 * (64 + 8)


def test_digits_can_be_resized(tmp_path):
    """image_size holds for the built-in set too, and makes it other data."""
    small, large = opened("digits", tmp_path), opened("digits", tmp_path, image_size=16)
    assert large.images.shape == (1797, 16, 16, 1)
    assert abs(large.mean - small.mean) < 0.02
    assert large.fingerprint != small.fingerprint


def test_gather_returns_copies_in_the_order_asked_for(tmp_path):
    """Changing a batch does not change the data, and repeated indices are allowed."""
    images = opened("digits", tmp_path)
    batch, labels = images.gather(np.array([5, 0, 5]))
    assert labels.tolist() == [5, 0, 5]
    batch[...] = 7
    assert images.images.max() == 255 and not (images.images[5] == 7).all()


def test_mean_and_std_are_those_of_the_training_part(tmp_path):
    """The streamed whole-number sums equal numpy's on the training pixels in float64."""
    images = opened("digits", tmp_path, hold_out=0.5, seed=3)
    pixels = images.images[images.train] / 255
    assert images.mean == pytest.approx(pixels.mean(), abs=1e-14)
    assert images.std == pytest.approx(pixels.std(), abs=1e-14)


@given(st.integers(2, 3000), st.floats(0, 0.5), st.integers(0, 2**32))
def test_the_split_covers_every_image_once(num_images, hold_out, seed):
    """Both parts are disjoint, ascending, cover all images, repeat for the same seed, and none is empty by accident."""
    train, held_out = split(num_images, hold_out, seed)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, held_out])), np.arange(num_images))
    assert (np.diff(train) > 0).all() and (np.diff(held_out) > 0).all()
    assert len(train) >= 1
    assert (len(held_out) >= 1) == (hold_out > 0)
    assert abs(len(held_out) - hold_out * num_images) <= 1
    assert train.dtype == held_out.dtype == np.int64
    for part, again in zip((train, held_out), split(num_images, hold_out, seed), strict=True):
        np.testing.assert_array_equal(part, again)


@given(st.lists(st.integers(0, 5), min_size=2, max_size=40), st.floats(0, 0.5), st.integers(0, 2**32))
def test_every_class_is_trained_on(labels, hold_out, seed):
    """Each has an image in the training part; where it had one anyway, no image has changed parts."""
    labels = np.array(labels)
    drawn = split(len(labels), hold_out, seed)
    train, held_out = with_every_class(*drawn, labels)
    assert set(labels[train]) == set(labels)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, held_out])), np.arange(len(labels)))
    assert (np.diff(train) > 0).all() and (np.diff(held_out) > 0).all()
    assert set(labels[np.setdiff1d(train, drawn[0])]).isdisjoint(labels[drawn[0]])
    assert len(train) - len(drawn[0]) == len(set(labels)) - len(set(labels[drawn[0]]))


def test_classes_of_one_image_leave_nothing_to_hold_out(tmp_path):
    """Which is told; a class held out whole would be learned by nobody."""
    np.savez(tmp_path / "a.npz", images=np.random.default_rng(0).integers(0, 255, (30, 4, 4)), labels=np.arange(30))
    images = opened(tmp_path / "a.npz", tmp_path / "cache")
    assert len(images.train) == 30 and not images.has_held_out
    assert images.warnings == ("no image is held out: each one is the only one of its class; give more images a class",)


def test_another_seed_gives_another_split():
    """The split is drawn, not cut at a fixed place."""
    assert split(100, 0.1, 0)[1].tolist() != split(100, 0.1, 1)[1].tolist()


@pytest.mark.parametrize("hold_out", [-0.1, 0.51, float("nan")])
def test_a_hold_out_out_of_range_is_a_setting_to_mend(tmp_path, hold_out):
    """The message names the setting, its value and its range."""
    with pytest.raises(ConfigError, match=r"hold_out is .*0 to 0\.5"):
        opened("digits", tmp_path, hold_out=hold_out)


def test_all_wrong_settings_are_reported_together(tmp_path):
    """Two wrong values give two problems."""
    with pytest.raises(ConfigError) as caught:
        opened("digits", tmp_path, hold_out=2, image_size=0)
    assert len(caught.value.problems) == 2


def test_a_missing_path_lists_what_is_accepted(tmp_path):
    """A typing mistake is answered with the three kinds of source."""
    with pytest.raises(
        DataError, match=r"does not exist; give \"digits\" \(built in\), a folder of images, or an \.npz"
    ):
        opened(tmp_path / "nowhere", tmp_path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    """Only .npz files are read."""
    (tmp_path / "images.csv").write_text("1,2,3")
    with pytest.raises(DataError, match=r"neither a folder nor an \.npz file"):
        opened(tmp_path / "images.csv", tmp_path)


def test_a_path_the_system_refuses_is_an_error_of_ours(tmp_path):
    """For example a name that is too long."""
    with pytest.raises(DataError, match="cannot be looked at: File name too long"):
        opened("x" * 5000, tmp_path)


def test_reading_data_imports_neither_torch_nor_scikit_learn():
    """Both would cost memory of the budget."""
    code = (
        "import sys, pathlib; from edgeblocks.data.images import open_images;"
        "open_images('digits', image_size=None, hold_out=.1, seed=0, cache_dir=pathlib.Path('unused'));"
        "assert not {'torch', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("source", ["~nobody-of-this-name/pictures", "a\0b.npz", "\ud800", "x" * 5000])
def test_a_source_that_no_file_can_have_is_an_error_of_ours(tmp_path, source):
    """Nobody's home folder, a NUL, half a character, a name longer than any."""
    with pytest.raises(DataError, match=r'give "digits" \(built in\), a folder of images, or an \.npz file'):
        open_images(source, image_size=None, hold_out=0.1, seed=0, cache_dir=tmp_path)
