"""What is fuzzed: for each kind of file a `Reader`, which writes a mutated one and has it read as a user would."""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import socket
import zipfile
from dataclasses import asdict

import numpy as np
import yaml
from mutations import (
    changed_npy,
    changed_png,
    json_text,
    mutated_bytes,
    mutated_value,
    picture_of_frames,
    run_length_bmp,
    yaml_text,
)
from PIL import Image

from edgeblocks.data.cache import meta_digest
from edgeblocks.errors import EdgeblocksError


class Reader:
    """A kind of input: `prepare` writes one, `read` has it read. At first there is a sound one."""

    def prepare_sound(self):
        pass


class RunReader(Reader):
    """One file of a run directory is mutated, and everything is asked that is told without the data."""

    def __init__(self, folder):
        from random_run import make_run

        from edgeblocks import cost  # noqa: F401 - imported before memory is measured
        from edgeblocks.info import describe
        from edgeblocks.run_files import check_resumable

        self._describe, self._check_resumable = describe, check_resumable
        self.path = folder / "run"
        run = make_run(self.path, layers=(2, 1), width=16, heads=2)
        self.settings = {**run.directory.settings.run.model_dump(), **asdict(run.directory.settings.family)}
        self.plan = sound_plan()
        (self.path / "plan.json").write_text(json.dumps(self.plan))
        (self.path / "metrics.jsonl").write_text(
            "".join(json.dumps({"block": n % 2, "step": n, "loss": 0.5}) + "\n" for n in range(6))
        )
        self.summary = {"peak_bytes": 10**8, "metrics": {"validation_loss": 0.5}, "blocks": 2}
        (self.path / "summary.json").write_text(json.dumps(self.summary))
        self.manifest = json.loads((self.path / "manifest.json").read_text())
        self.sound = {name: (self.path / name).read_bytes() for name in FILES_OF_A_RUN}

    def prepare(self, rng):
        for name, content in self.sound.items():
            (self.path / name).write_bytes(content)
        for name, content in self.mutated(rng).items():
            (self.path / name).write_bytes(content)

    def read(self):
        from edgeblocks.checkpoint import open_run
        from edgeblocks.run import Run

        run = open_run(self.path)
        assert run.partition.num_blocks == len(run.layers) == len(run.store().layouts)
        with contextlib.suppress(EdgeblocksError):  # the more is asked, the more may be refused
            self._check_resumable(self.path / "plan.json", run.plan)
        json.dumps(self._describe(self.path))
        json.dumps(Run(run).summary)
        assert len(list(run.metrics())) <= 10**6
        run.drop_metrics_after([1] * len(run.layers))

    def mutated_json(self, rng, name, value):
        if rng.random() < 0.3:
            return mutated_bytes(rng, self.sound[name])
        return json_text(rng, mutated_value(rng, value)).encode()


FILES_OF_A_RUN = ("manifest.json", "plan.json", "config.yaml", "metrics.jsonl", "summary.json")


def sound_plan():
    """plan.json as the planner writes it, for blocks of two and one layers."""
    ranges = [{"low": 0.3, "high": 80.0, "train_low": 0.2, "train_high": 80.0}] * 2
    breakdown = {"runtime": 10**8, "weights": 10**6, "gradients": 10**6, "optimizer": 10**5, "activations": 10**6}
    shapes = [{"micro_batch": size, "checkpointing": False, "step_bytes": size * 10**5} for size in (4, 2, 1)]
    return {
        "blocks": 2,
        "layers_per_block": [2, 1],
        "noise_ranges": ranges,
        "micro_batch": 4,
        "accumulation": 16,
        "checkpointing": False,
        "optimizer": "adamw8bit",
        "precision": "fp32",
        "tiers": {"ram": [0], "disk": [1]},
        "slots": 2,
        "shapes": shapes,
        "visit_steps": 100,
        "budget_bytes": 10**9,
        "parameters": 10**6,
        "predicted_peak_bytes": sum(breakdown.values()),
        "predicted_step_s": 0.01,
        "breakdown": breakdown,
        "machine": {"name": "cpu", "runtime_bytes": 10**8},
        "warnings": [],
        "candidates": [{"blocks": 2, "micro_batch": 4, "slots": 2, "fits": True}],
    }


class ManifestReader(RunReader):
    """manifest.json of a run."""

    def mutated(self, rng):
        content = self.mutated_json(rng, "manifest.json", self.manifest)
        if rng.random() < 0.02:
            manifest = json.loads(json.dumps(self.manifest))
            manifest["class_names"] = ["x"] * rng.choice((10**5, 4 * 10**5))
            manifest["data"]["num_classes"] = len(manifest["class_names"])
            content = json.dumps(manifest).encode()
        return {"manifest.json": content}


class PlanReader(RunReader):
    """plan.json."""

    def mutated(self, rng):
        return {"plan.json": self.mutated_json(rng, "plan.json", self.plan)}


class ConfigReader(RunReader):
    """config.yaml, and now and then depth with a plan that agrees."""

    def mutated(self, rng):
        if rng.random() < 0.002:
            depth = rng.choice((300, 4096, 4097))
            plan = {**self.plan, "blocks": 2, "layers_per_block": [depth - 1, 1]}
            settings = {**self.settings, "depth": depth, "width": rng.choice((16, 2**20))}
            return {"config.yaml": yaml.safe_dump(settings).encode(), "plan.json": json.dumps(plan).encode()}
        return {"config.yaml": yaml_text(rng, self.settings)}


class RecordsReader(RunReader):
    """metrics.jsonl and summary.json."""

    def mutated(self, rng):
        if rng.random() < 0.5:
            return {"summary.json": self.mutated_json(rng, "summary.json", self.summary)}
        lines = [self.sound["metrics.jsonl"]]
        for _ in range(rng.choice((1, 3, 10))):
            record = mutated_value(rng, {"block": 0, "step": 1, "loss": 0.5})
            lines.append(json_text(rng, record).replace("\n", " ").encode() + b"\n")
        content = b"".join(lines)
        return {"metrics.jsonl": content if rng.random() < 0.5 else mutated_bytes(rng, content)}


class BlockReader(Reader):
    """A block file: damaged anywhere, or with a header that was changed and signed again."""

    def __init__(self, folder):
        import torch
        from torch import nn

        from edgeblocks.store import PARTS, BlockBuffer, BlockLayout, BlockStore

        layout = BlockLayout.of(nn.Sequential(nn.Linear(64, 128), nn.Linear(7, 3)), "adamw8bit")
        self.store = BlockStore(folder / "blocks", [layout], "0123456789abcdef")
        self.store.folder.mkdir()
        self.buffer = BlockBuffer(layout)
        for part in PARTS:
            self.buffer.part_bytes(part).copy_(torch.randint(0, 256, self.buffer.part_bytes(part).shape))
        self.store.write(0, self.buffer, step=3)
        self.sound = self.store.path(0).read_bytes()
        self.payload = 8 + int.from_bytes(self.sound[:8], "little")
        self.header = json.loads(self.sound[8 : self.payload])

    def prepare(self, rng):
        path = self.store.path(0)
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        way, chance = rng.randrange(4), rng.random()
        if chance < 0.01:
            path.write_bytes(self.sound)
            replace_by_something(rng, path, path)
            return
        if chance < 0.011:  # as many values as a header's bytes can hold
            text = b'{"a": [' + b"{}," * 5_000_000 + b"1]}"
            path.write_bytes(len(text).to_bytes(8, "little") + text + self.sound[self.payload :])
            return
        if way == 0:
            path.write_bytes(mutated_bytes(rng, self.sound))
        elif way == 1:
            text = mutated_bytes(rng, self.sound[8 : self.payload])
            path.write_bytes(len(text).to_bytes(8, "little") + text + self.sound[self.payload :])
        else:
            path.write_bytes(self._signed(rng, mutated_value(rng, self.header)))

    def read(self):
        header = self.store.header(0)
        assert self.store.read(0, self.buffer) == header.step
        assert type(header.step) is int and 0 <= header.step < 10**19, f"step {header.step}"
        assert type(header.run_bytes_written) is int and header.run_bytes_written >= 0

    def _signed(self, rng, header):
        if isinstance(header, dict) and isinstance(header.get("__metadata__"), dict) and rng.random() < 0.9:
            metadata = {key: value for key, value in header["__metadata__"].items() if key != "header_sha256"}
            table = {key: value for key, value in header.items() if key != "__metadata__"}
            with contextlib.suppress(RecursionError, ValueError):
                digest = hashlib.sha256(json.dumps([table, metadata], sort_keys=True).encode()).hexdigest()
                header = {"__metadata__": {**metadata, "header_sha256": digest}, **table}
        text = json_text(rng, header).encode()
        return len(text).to_bytes(8, "little") + text + self.sound[self.payload :]


class ExportReader(Reader):
    """manifest.json of an exported directory, and now and then what its names lead to."""

    def __init__(self, folder):
        from edgeblocks.export import manifest as module
        from edgeblocks.noise import NoiseDistribution, partition_noise

        self.module, self.folder, self.outside = module, folder / "export", folder / "outside.onnx"
        self.folder.mkdir()
        noise = NoiseDistribution()
        partition = partition_noise(noise, num_blocks=3, kind="equal-probability", overlap=0.05)
        contents = {f"block_{block:03d}.onnx": bytes([block]) * (100 + block) for block in range(3)}
        self.contents = {**contents, "block_002.onnx.data": b"weights"}
        self.outside.write_bytes(contents["block_000.onnx"])
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in self.contents.items()}
        files = []
        for block, name in enumerate(contents):
            data = f"{name}.data" if f"{name}.data" in self.contents else None
            size = len(self.contents[name]) + (len(self.contents[data]) if data else 0)
            files.append(
                module.BlockFile(
                    block=block,
                    file=name,
                    data_file=data,
                    sha256=digests[name],
                    data_sha256=digests[data] if data else None,
                    bytes=size,
                )
            )
        manifest = module.ImageManifest(
            edgeblocks="0.1.0",
            family="dit",
            task="images",
            opset=18,
            image_shape=(1, 8, 8),
            mean=0.3,
            scale=1.5,
            sigma_data=0.5,
            class_names=("a", "b"),
            noise=noise,
            boundaries=partition.boundaries,
            sampler=module.SamplerSettings(),
            files=tuple(files),
            verified=module.Verified(
                block_max_abs_error=1e-6,
                block_limit=1e-4,
                output_max_abs_error=1e-5,
                output_limit=1e-3,
                output_equal_share=1.0,
                outputs=8,
                real_inputs=True,
            ),
        )
        module.write_manifest(self.folder, manifest)
        self.sound = (self.folder / "manifest.json").read_bytes()
        self.value = json.loads(self.sound)
        self._restore()

    def _restore(self):
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        (self.folder / "manifest.json").write_bytes(self.sound)
        for name, content in self.contents.items():
            (self.folder / name).write_bytes(content)

    def prepare(self, rng):
        self._restore()
        if rng.random() < 0.15:
            replace_by_something(rng, self.folder / rng.choice([*self.contents, "manifest.json"]), self.outside)
        elif rng.random() < 0.3:
            (self.folder / "manifest.json").write_bytes(mutated_bytes(rng, self.sound))
        else:
            value = mutated_value(rng, self.value)
            if rng.random() < 0.03 and isinstance(value, dict):
                value["sampler"] = {
                    "steps": rng.choice((10**9, 20_000)),
                    "solver": "heun",
                    "guidance": 1.0,
                    "noises": 1,
                }
            text = json_text(rng, value)
            (self.folder / "manifest.json").write_text(text, encoding="utf-8", errors="surrogatepass")

    def read(self):
        manifest = self.module.read_manifest(self.folder)
        json.dumps(manifest.to_json(), ensure_ascii=False).encode()
        for file in manifest.files:
            path = self.module.checked_path(self.folder, file)
            assert path.resolve().parent == self.folder.resolve()


def replace_by_something(rng, path, outside):
    """A file's place is taken by what is no file of this folder."""
    path.unlink(missing_ok=True)
    way = rng.randrange(9)
    if way == 0:
        os.mkfifo(path)
    elif way == 1:
        path.symlink_to(outside)
    elif way == 2:
        path.symlink_to(path)
    elif way == 3:
        path.symlink_to(rng.choice(("/dev/zero", "/dev/random", "/dev/tty", "/proc/self/mem", "/proc/kmsg")))
    elif way == 4:
        path.mkdir()
    elif way == 5:
        bound = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(OSError):  # the path may be too long for a socket
            bound.bind(str(path))
        bound.close()
    elif way == 6:
        path.touch()
    elif way == 7:
        path.symlink_to("../" * rng.randrange(3) + "nowhere")
    else:
        with path.open("wb") as file:
            file.truncate(rng.choice((2**20, 2**33)))  # nothing but a hole


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


READERS = {
    "block file": BlockReader,
    "run manifest": ManifestReader,
    "plan": PlanReader,
    "config": ConfigReader,
    "metrics and summary": RecordsReader,
    "export manifest": ExportReader,
    "npz": ArchiveReader,
    "image folder": FolderReader,
    "image cache": CacheReader,
}
