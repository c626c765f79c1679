"""Images to train on: archives, folders, and the cache of what was decoded."""

import contextlib
import io
import json
import os
import re
import shutil
import zipfile

import numpy as np
from fuzz.readers.odd_entries import replace_by_something
from fuzz.readers.reader import Reader
from PIL import Image
from support.mutations import (
    changed_npy,
    changed_png,
    json_text,
    mutated_bytes,
    mutated_value,
    picture_of_frames,
    run_length_bmp,
)

from edgeblocks.data.cache import meta_digest


class ImageReader(Reader):
    """Images opened through a cache that is made anew each time."""

    def __init__(self, folder):
        from edgeblocks.data.images import open_images

        self.open_images, self.folder, self.cache = open_images, folder, folder / "cache"
        self.size = 8
        Image.init()

    def open(self, source):
        shutil.rmtree(self.cache, ignore_errors=True)
        images = self.open_images(str(source), image_size=self.size, hold_out=0.25, seed=0, cache_dir=self.cache)
        num_images = len(images.images)
        pixels, labels = images.gather(np.array([0, num_images - 1]))
        assert pixels.dtype == np.uint8 and pixels.shape[1:] == images.images.shape[1:]
        assert labels is None or labels.max() < len(images.class_names)
        assert len(images.train) + len(images.held_out) == num_images
        assert 0 <= images.mean <= 1 and 0 < images.std <= 1
        return images


class ArchiveReader(ImageReader):
    """An .npz: damaged bytes, changed fields of the zip, and arrays whose headers lie under right checksums."""

    def __init__(self, folder):
        super().__init__(folder)
        self.path = folder / "set.npz"
        random_numbers = np.random.default_rng(0)
        images = random_numbers.integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
        labels = np.arange(6) % 3
        self.sets = [
            {"images": images, "labels": labels},
            {"images": (images / 255).astype(np.float32)},
            {"x_train": images[:4], "y_train": labels[:4], "x_test": images[4:], "y_test": labels[4:]},
            {"images": images[..., 0].astype(np.int16), "labels": labels.astype(np.uint8)},
            {"images": images, "labels": np.array(["a", "b", "c"])[labels]},
            {"images": images, "labels": labels, "class_names": np.array([b"a", b"b", b"c"])},
        ]
        self.sound = []
        for arrays in self.sets:
            for save in (np.savez, np.savez_compressed):
                file = io.BytesIO()
                save(file, **arrays)
                self.sound.append(file.getvalue())

    def prepare(self, rng):
        self.size = rng.choice((None, None, 4))
        way = rng.randrange(5)
        if way == 0:
            content = mutated_bytes(rng, rng.choice(self.sound))
        elif way == 1:
            content = self._changed_fields(rng)
        else:
            content = self._repacked(rng)
        self.path.write_bytes(content)

    def prepare_sound(self):
        self.path.write_bytes(self.sound[0])

    def read(self):
        self.open(self.path)

    def _changed_fields(self, rng):
        """Sizes, methods, flags, offsets and names in the zip's own tables become others."""
        content = bytearray(rng.choice(self.sound))
        fields = {b"PK\x03\x04": (4, 6, 8, 14, 18, 22, 26, 28), b"PK\x01\x02": (6, 8, 10, 16, 20, 24, 28, 30, 42)}
        fields[b"PK\x05\x06"] = (4, 6, 8, 10, 12, 16, 20)
        for _ in range(rng.choice((1, 2))):
            mark = rng.choice(list(fields))
            found = [match.start() for match in re.finditer(re.escape(mark), bytes(content))]
            place = rng.choice(found) + rng.choice(fields[mark])
            value = rng.choice((0, 1, 8, 9, 12, 14, 93, 95, 2**16 - 1, 2**31, 2**32 - 1, rng.randrange(2000)))
            content[place : place + 4] = (value % 2**32).to_bytes(4, "little")[: rng.choice((2, 4))].ljust(4, b"\0")
        return bytes(content)

    def _repacked(self, rng):
        """The members changed and packed again, so that all of the zip's own checksums are right."""
        arrays = rng.choice(self.sets)
        members = {}
        for name, array in arrays.items():
            file = io.BytesIO()
            np.save(file, array)
            members[f"{name}.npy"] = file.getvalue()
        name = rng.choice(list(members))
        way = rng.randrange(8)
        if way <= 3:
            members[name] = changed_npy(rng, arrays[name.removesuffix(".npy")])
        elif way == 4:
            members[name] = mutated_bytes(rng, members[name])
        elif way == 5:
            other = rng.choice(("images", "labels", "x_train", "x_test", "y_test", "a/../b", "\u00e4", ""))
            members[rng.choice((other, f"{other}.npy"))] = members.pop(name)
        elif way == 6:
            bomb = b"\x93NUMPY\x02\x00" + (2**31).to_bytes(4, "little") + b" " * (rng.choice((1, 1, 1, 1, 50)) * 10**6)
            members[name] = bomb
        elif rng.random() < 0.1:
            members.update({f"{number}.npy": b"" for number in range(rng.choice((300, 20_000)))})
        method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_LZMA if rng.random() < 0.03 else method) as archive:
            for member, content in members.items():
                archive.writestr(zipfile.ZipInfo(member), content, compress_type=archive.compression)
        return file.getvalue()


class FolderReader(ImageReader):
    """A folder with classes in which one picture is damaged, or one entry is no picture at all."""

    def __init__(self, folder):
        super().__init__(folder)
        self.root, self.outside = folder / "pictures", folder / "outside.png"
        random_numbers = np.random.default_rng(0)
        smooth = np.add.outer(np.arange(12), np.arange(10)).astype(np.uint8) * 9
        colours = np.stack([smooth, smooth[::-1], random_numbers.integers(0, 256, smooth.shape, dtype=np.uint8)], -1)
        deep = smooth.astype(np.uint16) * 250
        clear = np.dstack([colours, smooth])
        exif = Image.Exif()
        exif[0x0112] = 6
        frames = [Image.fromarray(colours // (number + 1)) for number in range(3)]
        self.sound = {}
        for name, pixels, options in (
            ("a.png", colours, {"exif": exif}),
            ("b.png", clear, {}),
            ("c.png", deep, {}),
            ("d.png", smooth, {"transparency": 9}),
            ("e.jpg", colours, {"exif": exif}),
            ("f.jpg", colours, {"progressive": True}),
            ("g.jpg", smooth, {}),
            ("h.gif", frames, {"save_all": True, "append_images": frames[1:]}),
            ("i.bmp", colours, {}),
            ("j.tif", colours, {"compression": "tiff_lzw"}),
            ("k.tif", deep, {}),
            ("l.webp", colours, {"lossless": True}),
            ("m.webp", frames, {"save_all": True, "append_images": frames[1:]}),
            ("n.ppm", colours, {}),
            ("o.pgm", smooth, {}),
            ("t.avif", clear, {}),
            ("u.jp2", colours, {}),
            ("v.tga", clear, {"compression": "tga_rle"}),
            ("w.tif", frames, {"save_all": True, "append_images": frames[1:]}),
        ):
            picture = pixels[0] if isinstance(pixels, list) else Image.fromarray(pixels)
            path = folder / name
            picture.save(path, **options)
            self.sound[name] = path.read_bytes()
        self.sound["p.ppm"] = b"P3\n3 2\n255\n" + b" ".join(str(n).encode() for n in range(18)) + b"\n"
        self.sound["q.bmp"] = run_length_bmp()
        for name in ("r.gif", "s.png"):
            self.sound[name] = picture_of_frames(colours[:4, :4], name.rpartition(".")[2])
        self.outside.write_bytes(self.sound["a.png"])

    def prepare(self, rng):
        self.size = rng.choice((None, None, 4))
        shutil.rmtree(self.root, ignore_errors=True)
        for folder in ("one", "two"):
            (self.root / folder).mkdir(parents=True)
        names = list(self.sound)
        for folder, name in (("one", "a.png"), ("one", "i.bmp"), ("two", rng.choice(names))):
            (self.root / folder / name).write_bytes(self.sound[name])
        name = rng.choice(names)
        if rng.random() < 0.2:
            self._odd_entry(rng, name)
        else:
            (self.root / "two" / f"z-{name}").write_bytes(self._damaged(rng, name))

    def read(self):
        images = self.open(self.root)
        assert len(images.unreadable) <= 1

    def prepare_sound(self):
        shutil.rmtree(self.root, ignore_errors=True)
        (self.root / "all").mkdir(parents=True)
        for name, content in self.sound.items():
            (self.root / "all" / name).write_bytes(content)

    def _damaged(self, rng, name):
        content = self.sound[name]
        if name.endswith(".png") and rng.random() < 0.7:
            return changed_png(rng, content)
        if rng.random() < 0.1:
            return mutated_bytes(rng, self.sound[rng.choice(list(self.sound))])  # of another kind than its name says
        return mutated_bytes(rng, content)

    def _odd_entry(self, rng, name):
        place = self.root / rng.choice(("one", "two"))
        way = rng.randrange(7)
        if way <= 2:
            replace_by_something(rng, place / f"z-{name}", self.outside)
        elif way == 3:
            raw = os.fsencode(place) + b"/" + rng.choice((b"\xff\xfe.png", b"\x1b[31m.png", b"a\nb.png", b" .png"))
            with open(raw, "wb") as file:  # noqa: PTH123 - a name that is not text
                file.write(rng.choice((self.sound["a.png"], b"nothing")))
        elif way == 4:
            (place / rng.choice(("loop", "loop.png"))).symlink_to(rng.choice((place, self.root, self.folder)))
        elif way == 5:
            deep = place
            for _ in range(rng.choice((3, 40))):
                deep = deep / ("d" * rng.choice((1, 100)))
            with contextlib.suppress(OSError):
                deep.mkdir(parents=True)
                (deep / name).write_bytes(self.sound[name])
        else:
            (self.root / rng.choice(("three", "train", ".hidden", "loose.png"))).mkdir()


class CacheReader(ImageReader):
    """The decoded images on the disk: meta.json and the arrays lie. What is not believed is built again."""

    def __init__(self, folder):
        super().__init__(folder)
        self.path = folder / "set.npz"
        self.images = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
        np.savez(self.path, images=self.images, labels=np.arange(6) % 3)
        self._open()
        (self.built,) = self.cache.iterdir()
        self.sound = {path.name: path.read_bytes() for path in self.built.iterdir()}
        self.meta = json.loads(self.sound["meta.json"])

    def _open(self):
        images = self.open_images(str(self.path), image_size=None, hold_out=0.25, seed=0, cache_dir=self.cache)
        pixels, labels = images.gather(np.arange(len(images.images)))
        assert labels is None or labels.max() < len(images.class_names)
        assert pixels.dtype == np.uint8
        return images

    def prepare(self, rng):
        shutil.rmtree(self.cache, ignore_errors=True)
        self.built.mkdir(parents=True)
        for name, content in self.sound.items():
            (self.built / name).write_bytes(content)
        name = rng.choice(list(self.sound))
        if rng.random() < 0.1:
            replace_by_something(rng, self.built / name, self.path)
        elif name == "meta.json":
            text = json_text(rng, self._signed(rng, mutated_value(rng, self.meta)))
            (self.built / name).write_text(text, encoding="utf-8", errors="surrogatepass")
        else:
            array = np.load(io.BytesIO(self.sound[name]))
            content = changed_npy(rng, array) if rng.random() < 0.5 else mutated_bytes(rng, self.sound[name])
            (self.built / name).write_bytes(content)
            if rng.random() < 0.8:
                meta = json.loads(json.dumps(self.meta))
                meta["file_bytes"][name] = len(content)
                (self.built / "meta.json").write_text(json.dumps(self._signed(rng, meta)))

    @staticmethod
    def _signed(rng, meta):
        """Mostly with a checksum that is right, so that the values are looked at."""
        if not isinstance(meta, dict) or rng.random() < 0.1:
            return meta
        rest = {key: value for key, value in meta.items() if key != "sha256"}
        with contextlib.suppress(TypeError, ValueError):
            rest["sha256"] = meta_digest(rest)
        return rest

    def read(self):
        self._open()
