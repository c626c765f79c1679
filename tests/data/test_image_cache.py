"""The decoded images on the disk: built once, never half, never resident."""

import json
import multiprocessing
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from edgeblocks.data import cache as cache_module
from edgeblocks.data.images import open_images
from edgeblocks.errors import StorageError

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "set.npz"
    np.savez(path, images=IMAGES, labels=np.arange(20))
    return path


def opened(source, cache_dir, **settings):
    return open_images(
        str(source), **{"image_size": None, "hold_out": 0.2, "seed": 0, "cache_dir": cache_dir} | settings
    )


def the_cache(cache_dir):
    (folder,) = (path for path in cache_dir.iterdir() if path.suffix != ".lock")
    return folder


def test_a_second_opening_decodes_nothing(source, tmp_path):
    """No progress is reported, and everything known comes back."""
    first = opened(source, tmp_path / "cache")
    calls = []
    again = opened(source, tmp_path / "cache", progress=lambda *call: calls.append(call))
    assert calls == []
    np.testing.assert_array_equal(again.images, IMAGES)
    for name in ("class_names", "mean", "std", "unreadable", "fingerprint", "source", "reading", "warnings"):
        assert getattr(again, name) == getattr(first, name)


def test_changed_data_or_size_gets_a_cache_of_its_own(source, tmp_path):
    """Another image_size, or the same name with other content, never reads the old cache."""
    opened(source, tmp_path / "cache")
    assert opened(source, tmp_path / "cache", image_size=4).images.shape == (20, 4, 4, 3)
    np.savez(source, images=IMAGES[::-1])
    os.utime(source, ns=(1, 1))
    np.testing.assert_array_equal(opened(source, tmp_path / "cache").images, IMAGES[::-1])
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_a_file_replaced_by_another_of_the_same_size_and_time_is_noticed(source, tmp_path):
    """Also where it is renamed into place, with the time of the one that was there."""
    times = source.stat().st_atime_ns, source.stat().st_mtime_ns
    opened(source, tmp_path / "cache")
    np.savez(tmp_path / "new.npz", images=IMAGES[::-1], labels=np.arange(20))
    os.utime(tmp_path / "new.npz", ns=times)
    (tmp_path / "new.npz").rename(source)
    np.testing.assert_array_equal(opened(source, tmp_path / "cache").images, IMAGES[::-1])


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "moments.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_cache_is_built_again(source, tmp_path, name, damage):
    """A cut or missing file is noticed before anything is read from it."""
    opened(source, tmp_path / "cache")
    file = the_cache(tmp_path / "cache") / name
    if damage == "cut":
        os.truncate(file, file.stat().st_size - 1)
    else:
        file.unlink()
    images = opened(source, tmp_path / "cache")
    np.testing.assert_array_equal(images.images, IMAGES)
    assert images.labels.tolist() == list(range(20))
    assert the_cache(tmp_path / "cache").name == file.parent.name


@pytest.mark.parametrize("text", ["[]", '{"version": 1}', "null", '{"version": 99, "file_bytes": {}}', "\x00\xff"])
def test_nonsense_in_the_description_is_built_again(source, tmp_path, text):
    """Whatever is in meta.json, it is not believed blindly."""
    opened(source, tmp_path / "cache")
    (the_cache(tmp_path / "cache") / "meta.json").write_text(text, encoding="latin-1")
    np.testing.assert_array_equal(opened(source, tmp_path / "cache").images, IMAGES)


def test_a_description_of_another_shape_is_not_believed(source, tmp_path):
    """The shape in meta.json must be the array's own."""
    opened(source, tmp_path / "cache")
    path = the_cache(tmp_path / "cache") / "meta.json"
    meta = json.loads(path.read_text())
    meta["shape"][0] = 21
    write_meta(path, meta)
    assert len(opened(source, tmp_path / "cache").images) == 20


def write_meta(path, meta):
    """With a checksum that is right: what the values say must be seen to be wrong."""
    del meta["sha256"]
    path.write_text(json.dumps({**meta, "sha256": cache_module.meta_digest(meta)}))


def change_meta(cache_dir, keys, value):
    path = the_cache(cache_dir) / "meta.json"
    meta = json.loads(path.read_text())
    place = meta
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    write_meta(path, meta)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["shape"], 5),
        (["shape"], []),
        (["shape"], {}),
        (["shape"], [20, 8, 8, 3, 1]),
        (["content", "num_test"], float("inf")),
        (["content", "num_test"], 10**400),
        (["content", "num_test"], -1),
        (["content", "num_test"], 20),
        (["content", "num_test"], True),
        (["content", "class_names"], "abc"),
        (["content", "class_names"], [1] * 20),
        (["content", "class_names"], ["a", "b"]),
        (["content", "class_names"], []),
        (["content", "unreadable"], {"a": 1}),
        (["content"], [[[[[]]]]]),
        (["content", "notes"], "abc"),
        (["content", "notes"], [1]),
        (["content", "left_out"], ["a" * 10_000]),
        (["content", "deep_range"], [1]),
        (["content", "deep_range"], [0, 2.5]),
        (["content", "num_of_several"], -1),
        (["doubts"], None),
        (["doubts"], {"brightest": "a", "num_again": 0, "num_in_several_classes": 0}),
        (["fingerprint"], 5),
        (["file_bytes"], {"images.npy": float("nan")}),
        (["file_bytes"], {"../set.npz": 1}),
        (["version"], "1"),
    ],
    ids=str,
)
def test_a_description_that_lies_is_not_believed(source, tmp_path, keys, value):
    """Types, lengths and ranges are compared with the arrays; the cache is then built again, and no error comes out."""
    first = opened(source, tmp_path / "cache")
    change_meta(tmp_path / "cache", keys, value)
    again = opened(source, tmp_path / "cache")
    np.testing.assert_array_equal(again.images, IMAGES)
    assert (again.class_names, again.fingerprint) == (first.class_names, first.fingerprint)
    np.testing.assert_array_equal(again.labels, first.labels)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("labels.npy", np.full(20, 99)),
        ("labels.npy", np.full(20, -1)),
        ("labels.npy", np.zeros(20, np.float64)),
        ("labels.npy", np.zeros((20, 1), np.int64)),
        ("moments.npy", np.full((20, 2), -1)),
        ("moments.npy", np.full((20, 2), 2**62)),
        ("moments.npy", np.tile([1000, 10], (20, 1))),
        ("moments.npy", np.tile([20_000, 20_000], (20, 1))),
        ("images.npy", IMAGES.astype(np.int16)),
        ("images.npy", np.asfortranarray(IMAGES)),
        ("images.npy", IMAGES[..., 0]),
    ],
)
def test_an_array_of_another_kind_is_not_believed(source, tmp_path, name, array):
    """Whole files of the size that meta.json has, but not what was decoded: built again."""
    opened(source, tmp_path / "cache")
    path = the_cache(tmp_path / "cache") / name
    np.save(path, array)
    change_meta(tmp_path / "cache", ["file_bytes", name], path.stat().st_size)
    again = opened(source, tmp_path / "cache")
    np.testing.assert_array_equal(again.images, IMAGES)
    assert again.labels.tolist() == list(range(20))


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "moments.npy"])
def test_a_header_that_promises_a_petabyte_allocates_nothing(source, tmp_path, name):
    """The bytes in the file are counted before room is made for them."""
    opened(source, tmp_path / "cache")
    path = the_cache(tmp_path / "cache") / name
    array = np.load(path)
    with path.open("wb") as file:
        header = {"descr": array.dtype.str, "fortran_order": False, "shape": (10**15, *array.shape[1:])}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(array.tobytes())
    change_meta(tmp_path / "cache", ["file_bytes", name], path.stat().st_size)
    np.testing.assert_array_equal(opened(source, tmp_path / "cache").images, IMAGES)


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "moments.npy", "meta.json"])
def test_a_pipe_in_a_cache_is_not_waited_for(source, tmp_path, name):
    """It is no cache, so one is built."""
    opened(source, tmp_path / "cache")
    path = the_cache(tmp_path / "cache") / name
    path.unlink()
    os.mkfifo(path)
    np.testing.assert_array_equal(opened(source, tmp_path / "cache").images, IMAGES)


def _open_in_a_process(source, cache_dir, barrier):
    barrier.wait()
    np.testing.assert_array_equal(opened(source, cache_dir).images, IMAGES)


def test_processes_that_build_at_once_do_not_disturb_each_other(source, tmp_path):
    """All of them read the right images, and one cache is left."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    processes = [
        context.Process(target=_open_in_a_process, args=(source, tmp_path / "cache", barrier)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert the_cache(tmp_path / "cache").is_dir()


def test_an_interrupted_build_leaves_nothing(source, tmp_path):
    """Ctrl-C in the middle of decoding, then a new start."""

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opened(source, tmp_path / "cache", progress=interrupt)
    assert list((tmp_path / "cache").iterdir()) == []
    opened(source, tmp_path / "cache")


def test_what_a_killed_build_left_is_removed_later(source, tmp_path):
    """Old unlocked remains go, those of a build still running stay, and neither is ever taken for a cache."""
    code = (
        "import os, sys, pathlib; from edgeblocks.data.images import open_images;"
        "open_images(sys.argv[1], image_size=None, hold_out=.1, seed=0, cache_dir=pathlib.Path(sys.argv[2]),"
        "            progress=lambda *_: os.kill(os.getpid(), 9))"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(source), str(tmp_path / "cache")], check=False)
    assert killed.returncode == -9
    remains = the_cache(tmp_path / "cache")
    assert remains.suffix == ".partial"
    long_ago = time.time() - 3600
    os.utime(remains, (long_ago, long_ago))
    running = tmp_path / "cache" / "other.partial"
    running.mkdir()
    os.utime(running, (long_ago, long_ago))
    with cache_module._locked(running):
        np.testing.assert_array_equal(opened(source, tmp_path / "cache").images, IMAGES)
    assert not remains.exists() and running.exists()


def test_a_full_disk_is_told_before_anything_is_decoded(source, tmp_path, monkeypatch):
    """With the bytes needed, the bytes free and the folder."""
    usage = type(cache_module.shutil.disk_usage(tmp_path))(total=10**6, used=10**6 - 1000, free=1000)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: usage)
    calls = []
    with pytest.raises(StorageError, match=rf"need 4320 bytes \(4\.32 KB\) in {tmp_path}/cache, .* 1000 bytes"):
        opened(source, tmp_path / "cache", progress=lambda *call: calls.append(call))
    assert calls == [] and list((tmp_path / "cache").iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_is_an_error_of_ours(source, tmp_path):
    """The kernel's refusal (here of a file over a limit) becomes StorageError, and the remains are removed."""
    code = (
        "import pathlib, resource, sys; from edgeblocks.data.images import open_images\n"
        "from edgeblocks.errors import StorageError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "try: open_images(sys.argv[1], image_size=None, hold_out=.1, seed=0, cache_dir=pathlib.Path(sys.argv[2]))\n"
        "except StorageError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "cache")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "the image cache cannot be written in" in done.stdout and "it needs 4320 bytes" in done.stdout
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_folder_that_cannot_be_made_is_an_error_of_ours(source, tmp_path):
    """For example because a file has its name."""
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(StorageError, match=rf"cannot be written in {tmp_path}/cache: .*; free some space"):
        opened(source, tmp_path / "cache")


def test_a_cache_cut_while_in_use_is_an_error_and_no_crash(source, tmp_path):
    """Through a memory map this would be a bus error, which kills the process."""
    images = opened(source, tmp_path / "cache")
    os.truncate(the_cache(tmp_path / "cache") / "images.npy", 1000)
    with pytest.raises(StorageError, match=r"images\.npy ends before byte \d+, inside an image: .*delete"):
        images.gather(np.array([19]))


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["images.npy", "moments.npy"])
def test_a_flipped_byte_of_an_image_is_found_before_use(source, tmp_path, name):
    """The image is named where it is read, with what to delete; the others are read as they are."""
    images = opened(source, tmp_path / "cache")
    flip(the_cache(tmp_path / "cache") / name, -1)  # of the last image, and of its sum of squares
    np.testing.assert_array_equal(images.gather(np.array([0, 18]))[0], IMAGES[[0, 18]])
    with pytest.raises(StorageError, match=r"images\.npy is damaged: image 19 is not what was decoded; .* delete"):
        images.gather(np.array([3, 19]))


@pytest.mark.parametrize("name", ["labels.npy", "meta.json"])
def test_a_flipped_byte_of_what_describes_the_images_builds_them_again(source, tmp_path, name):
    """A label that is another class's, and a letter of a class's name."""
    opened(source, tmp_path / "cache")
    file = the_cache(tmp_path / "cache") / name
    before = file.read_bytes()
    flip(file, before.index(b'"class_names": ["') + 17 if name == "meta.json" else -8)
    opened(source, tmp_path / "cache")
    assert file.read_bytes() == before


def test_a_cache_deleted_while_in_use_goes_on(source, tmp_path):
    """The open file keeps its bytes."""
    images = opened(source, tmp_path / "cache")
    folder = the_cache(tmp_path / "cache")
    for file in folder.iterdir():
        file.unlink()
    np.testing.assert_array_equal(images.gather(np.array([19]))[0][0], IMAGES[19])


@pytest.mark.parametrize("index", [-1, 20])
def test_an_index_out_of_range_is_refused(source, tmp_path, index):
    """Reading by position must not return the bytes of something else."""
    with pytest.raises(IndexError, match=r"outside 0\.\.19"):
        opened(source, tmp_path / "cache").gather(np.array([index]))


def test_sets_are_closed_with_their_last_user(source, tmp_path):
    """Opening often does not use up the process's file descriptors."""
    opened(source, tmp_path / "cache")
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(5):
        opened(source, tmp_path / "cache")
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


MEMORY_PROBE = """
import pathlib, sys
import numpy as np
from edgeblocks.data.images import open_images

def peak_kb():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])

base = peak_kb()
images = open_images(sys.argv[1], image_size=None, hold_out=0.1, seed=0, cache_dir=pathlib.Path(sys.argv[2]))
built = peak_kb()
order = np.random.default_rng(0).permutation(len(images.images))
total = sum(int(images.gather(order[start : start + 64])[0].sum()) for start in range(0, len(order), 64))
print(built - base, peak_kb() - base, images.images.nbytes, images.resident_bytes)
"""


def test_a_set_larger_than_the_memory_is_built_and_read_within_a_few_megabytes(tmp_path):
    """300 MB of images raise the peak by less than 40 MB, building included."""
    path = tmp_path / "large.npz"
    piece = np.random.default_rng(0).integers(0, 256, (100, 64, 64, 3), dtype=np.uint8)
    np.savez(path, images=np.concatenate([piece] * 244))
    command = [sys.executable, "-c", MEMORY_PROBE, str(path), str(tmp_path / "cache")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    built_kb, read_kb, image_bytes, resident_bytes = map(int, done.stdout.split())
    assert image_bytes > 299e6
    assert built_kb < 40_000 and read_kb < 40_000
    assert resident_bytes < 1e6


def test_without_a_home_caches_are_in_a_temporary_folder_of_the_users_own(tmp_path, monkeypatch):
    """It says so; a folder that others may write, or a link, is refused with the cure."""
    for name in ("EDGEBLOCKS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cache_module.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_module.cache_folder() == tmp_path / "home/.cache/edgeblocks" and cache_module.cache_note() is None

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cache_module.Path, "home", no_home)
    folder = cache_module.cache_folder()
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
    assert f"caches are kept in {folder}; EDGEBLOCKS_CACHE=FOLDER names" in cache_module.cache_note()
    folder.chmod(0o777)
    with pytest.raises(StorageError, match=r"may be written by others; name a folder for caches with EDGEBLOCKS_CACHE"):
        cache_module.cache_folder()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(StorageError, match="may be written by others"):
        cache_module.cache_folder()
