"""Exported directories."""

import hashlib
import json
import shutil

from mutations import json_text, mutated_bytes, mutated_value

from fuzz_targets.odd_entries import replace_by_something
from fuzz_targets.reader import Reader


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
