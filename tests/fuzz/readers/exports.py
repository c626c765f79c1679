"""Exported directories."""

import functools
import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from dataclasses import asdict

from fuzz.readers.odd_entries import replace_by_something
from fuzz.readers.reader import Reader
from support.mutations import json_text, mutated_bytes, mutated_value
from support.text_mutations import changed_definition


class ExportReader(Reader):
    """manifest.json of an exported directory, and now and then what its names lead to."""

    names = ("block_000.onnx", "block_001.onnx", "block_002.onnx")

    def __init__(self, folder):
        from edgeblocks.export import manifest_types as module
        from edgeblocks.export.manifest import write_manifest

        self.module, self.folder, self.outside = module, folder / "export", folder / "outside.onnx"
        self.folder.mkdir()
        # Graphs of a version and a producer's name, as protobuf has them.
        graphs = [b"\x08\x08\x12" + bytes([100 + block]) + bytes([block]) * (100 + block) for block in range(3)]
        contents = dict(zip(self.names, graphs, strict=False))
        last = [*contents][-1]
        self.contents = {**contents, f"{last}.data": b"weights"}
        self.outside.write_bytes(graphs[0])
        files = [self._described(name) for name in contents]
        verified = module.Verified(
            block_max_abs_error=1e-6,
            block_limit=1e-4,
            output_max_abs_error=1e-5,
            output_limit=1e-3,
            output_equal_share=1.0,
            outputs=8,
            real_inputs=True,
        )
        common = {"edgeblocks": "0.1.0", "opset": 18, "verified": verified, **self.graphs(files)}
        manifest = self.manifest(common)
        write_manifest(self.folder, manifest)
        self.sound = (self.folder / "manifest.json").read_bytes()
        self.value = json.loads(self.sound)
        self._restore()

    def _described(self, name):
        """What a manifest says of a graph's file."""
        data = f"{name}.data" if f"{name}.data" in self.contents else None
        digests = [name and hashlib.sha256(self.contents[name]).hexdigest() for name in (name, data)]
        size = sum(len(self.contents[name]) for name in (name, data) if name)
        return {"file": name, "data_file": data, "sha256": digests[0], "data_sha256": digests[1], "bytes": size}

    def graphs(self, files):
        """The fields that name the graphs."""
        return {"files": tuple(self.module.BlockFile(block=block, **file) for block, file in enumerate(files))}

    def manifest(self, common):
        """A sound one, with the fields that all manifests have."""
        from edgeblocks.diffusion.noise import NoiseDistribution, partition_noise

        noise = NoiseDistribution()
        partition = partition_noise(noise, num_blocks=3, kind="equal-probability", overlap=0.05)
        return self.module.ImageManifest(
            **common,
            family="dit",
            task="images",
            image=self.module.ImageSize(channels=1, height=8, width=8),
            mean=0.3,
            scale=1.5,
            sigma_data=0.5,
            num_classes=2,
            class_names=("a", "b"),
            noise=self.module.Noise(**asdict(noise)),
            boundaries=partition.boundaries,
            levels=self.module.noise_levels(partition, num_steps=18),
            sampler=self.module.SamplerSettings(steps=18),
        )

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
        from edgeblocks.export.manifest import checked_path, read_manifest

        manifest = read_manifest(self.folder)
        json.dumps(manifest.to_json(), ensure_ascii=False).encode()
        for file in manifest.graphs:
            path = checked_path(self.folder, file)
            assert hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256


class ChainExportReader(ExportReader):
    """manifest.json of an exported directory with one graph for the whole chain, and the graph's own bytes."""

    names = ("chain.onnx",)

    def graphs(self, files):
        verified = self.module.ChainVerified(torch_difference=1e-6, walk_difference=0.0, limit=1e-3)
        chain = self.module.ChainFile(**files[0], verified=verified)
        return {"format_version": 3, "files": (), "chain": chain}

    def prepare(self, rng):
        """Now and then another graph, of which the manifest has the checksum."""
        super().prepare(rng)
        path = self.folder / "chain.onnx"
        if rng.random() < 0.5 and path.is_file() and not path.is_symlink():
            graph = mutated_bytes(rng, looping_graph())
            path.write_bytes(graph)
            size = len(graph) + len(self.contents["chain.onnx.data"])
            chain = {**self.value["chain"], "sha256": hashlib.sha256(graph).hexdigest(), "bytes": size}
            manifest = self.folder / "manifest.json"
            if manifest.is_file() and not manifest.is_symlink():
                manifest.write_text(json.dumps({**self.value, "chain": chain}))


@functools.cache
def looping_graph():
    """A small graph with a loop, as a chain has one."""
    from onnx import helper

    from edgeblocks.export.chain_graphs import bounded
    from edgeblocks.export.graph_builder import FLOAT, Nodes

    nodes = Nodes()
    times = bounded(nodes, nodes("Size", "levels"))
    nodes.loop(times, [("z", FLOAT)], lambda inner, number, carried: [inner("Neg", carried[0])])
    graph = helper.make_graph(nodes.nodes, "chain", [], [], nodes.constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]).SerializeToString()


class TextExportReader(ExportReader):
    """manifest.json and tokenizer.json of an exported directory that writes text."""

    needs = "tokenizers"

    def __init__(self, folder):
        from edgeblocks.data.tokenizer import train_pairs

        pairs = train_pairs(["The white whale swims under a cold sea. " * 100], 300)
        self.definition, self.vocabulary = pairs.to_json().encode(), pairs.vocabulary
        super().__init__(folder)

    def manifest(self, common):
        from edgeblocks.diffusion.noise import MaskingSchedule, partition_noise

        partition = partition_noise(MaskingSchedule(), num_blocks=3, kind="equal-probability", overlap=0.05)
        return self.module.TextManifest(
            **common,
            family="mdlm",
            task="text",
            vocabulary=self.vocabulary,
            length=8,
            tokenizer="bpe",
            tokenizer_sha256=hashlib.sha256(self.definition).hexdigest(),
            boundaries=partition.boundaries,
            levels=self.module.masking_levels(partition, num_steps=64),
            sampler=self.module.WriterSettings(steps=64),
        )

    def prepare(self, rng):
        super().prepare(rng)
        path = self.folder / "tokenizer.json"
        if rng.random() < 0.5:
            path.write_bytes(self.definition)
        elif rng.random() < 0.05:
            replace_by_something(rng, path, self.outside)
        else:
            definition = changed_definition(rng, json.loads(self.definition))
            path.write_bytes(definition)
            self._restore_manifest({**self.value, "tokenizer_sha256": hashlib.sha256(definition).hexdigest()})

    def prepare_sound(self):
        (self.folder / "tokenizer.json").write_bytes(self.definition)

    def _restore_manifest(self, value):
        path = self.folder / "manifest.json"
        if path.is_file() and not path.is_symlink():
            path.write_text(json.dumps(value))

    def read(self):
        from edgeblocks.export.manifest import exported_tokenizer, read_manifest

        super().read()
        manifest = read_manifest(self.folder)
        if manifest.task == "text":
            tokenizer = exported_tokenizer(self.folder, manifest)
            tokens = tokenizer.encode("a whale")
            assert isinstance(tokenizer.decode(tokens), str)
            assert max(tokens, default=0) < manifest.vocabulary


class ContinuationExportReader(ExportReader):
    """manifest.json of an exported directory that writes text token by token."""

    def manifest(self, common):
        from edgeblocks.diffusion.noise import NoiseDistribution, partition_noise

        noise = NoiseDistribution(sigma_min=0.1, sigma_max=10.0, p_mean=0.0, p_std=1.2)
        partition = partition_noise(noise, num_blocks=3, kind="equal-probability", overlap=0.1)
        return self.module.ContinuationManifest(
            **common,
            family="ar",
            task="continuation",
            vocabulary=27,
            length=8,
            tokenizer="chars",
            tokenizer_sha256=None,
            code_width=16,
            caches=self.module.CacheShape(per="block", num_caches=(4, 4, 4), heads=2, head_width=8),
            noise=self.module.Noise(**asdict(noise)),
            boundaries=partition.boundaries,
            levels=self.module.noise_levels(partition, num_steps=16),
            sampler=self.module.ContinuerSettings(steps=16),
        )

    def read(self):
        """Also what a chain allocates from it is bounded: codes and noise levels."""
        from edgeblocks.diffusion.codebook import code_rows
        from edgeblocks.export.manifest import read_manifest

        super().read()
        manifest = read_manifest(self.folder)
        assert code_rows(manifest.vocabulary, manifest.code_width).shape[0] == manifest.vocabulary


class ModelExportReader(Reader, ABC):
    """An exported fine-tuned model: its manifest, its files' own bytes, and what its names lead to."""

    changed = ("model.onnx",)
    """Files whose bytes are changed."""

    @abstractmethod
    def listed(self, name, content):
        """The manifest with the checksum of another content of a file."""

    def prepare_sound(self):
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        for name, content in self.contents.items():
            (self.folder / name).write_bytes(content)
        (self.folder / "manifest.json").write_text(json.dumps(self.value))

    def prepare(self, rng):
        self.prepare_sound()
        manifest = self.folder / "manifest.json"
        if rng.random() < 0.15:
            replace_by_something(rng, self.folder / rng.choice([*self.contents, "manifest.json"]), self.outside)
        elif rng.random() < 0.5:
            name = rng.choice(self.changed)
            content = mutated_bytes(rng, self.contents[name])
            (self.folder / name).write_bytes(content)
            manifest.write_text(json.dumps(self.listed(name, content)))
        else:
            text = json_text(rng, mutated_value(rng, self.value))
            manifest.write_text(text, encoding="utf-8", errors="surrogatepass")


class ClassifierExportReader(ModelExportReader):
    """An exported fine-tuned classifier."""

    def __init__(self, folder):
        from edgeblocks.export.manifest_types import ImageSize, ModelFile
        from edgeblocks.export.vision_model import VerifiedClassifier, VisionManifest

        self.folder, self.outside = folder / "export", folder / "outside.onnx"
        self.folder.mkdir()
        self.contents = {"model.onnx": plain_graph("MatMulNBits"), "model.onnx.data": b"weights"}
        self.outside.write_bytes(self.contents["model.onnx"])
        digests = [hashlib.sha256(content).hexdigest() for content in self.contents.values()]
        manifest = VisionManifest(
            edgeblocks="0.1.0",
            model_type="vit",
            opset=20,
            image=ImageSize(channels=3, height=8, width=8),
            deep_range=None,
            class_names=("cat", "dog"),
            graph=ModelFile(
                file="model.onnx",
                data_file="model.onnx.data",
                sha256=digests[0],
                data_sha256=digests[1],
                bytes=sum(map(len, self.contents.values())),
            ),
            verified=VerifiedClassifier(
                logits_max_abs_error=1e-6, logits_limit=1e-4, top1_equal=8, pictures=8, real_pictures=True
            ),
        )
        self.value = manifest.to_json()
        self.prepare_sound()

    def listed(self, name, content):
        graph = self.value["graph"]
        size = graph["bytes"] + len(content) - len(self.contents[name])
        return {**self.value, "graph": {**graph, "sha256": hashlib.sha256(content).hexdigest(), "bytes": size}}

    def read(self):
        from edgeblocks.export.manifest import checked_path
        from edgeblocks.export.open_export import open_graphs

        model = open_graphs(self.folder)
        for file in model.manifest.graphs:
            checked_path(self.folder, file)


class LanguageExportReader(ModelExportReader):
    """An exported language model."""

    needs = "tokenizers"
    changed = ("model.onnx", "tokenizer.json")

    def __init__(self, folder):
        from edgeblocks.data.tokenizer import train_pairs
        from edgeblocks.export.language_model import ExportedFile, LanguageManifest, VerifiedModel

        pairs = train_pairs(["The white whale swims under a cold sea. " * 100], 300)
        self.folder, self.outside = folder / "export", folder / "outside.onnx"
        self.folder.mkdir()
        self.contents = {
            "model.onnx": plain_graph("RotaryEmbedding"),
            "model.onnx.data": b"weights",
            "tokenizer.json": pairs.to_json().encode(),
        }
        self.outside.write_bytes(self.contents["model.onnx"])
        digest = {name: hashlib.sha256(content).hexdigest() for name, content in self.contents.items()}
        manifest = LanguageManifest(
            edgeblocks="0.1.0",
            model_type="llama",
            weights="fp32",
            layers=1,
            heads=1,
            head_width=8,
            vocabulary=pairs.vocabulary,
            positions=64,
            length=16,
            ends=(1,),
            files=tuple(
                ExportedFile(name=name, sha256=digest[name], bytes=len(content))
                for name, content in self.contents.items()
            ),
            verified=VerifiedModel(greedy_equal=1, greedy_tokens=1, loss_torch=1.0, loss_graph=1.0, windows=1),
        )
        self.value = manifest.model_dump(mode="json")
        self.prepare_sound()

    def listed(self, name, content):
        one = {"name": name, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        return {**self.value, "files": [one if file["name"] == name else file for file in self.value["files"]]}

    def read(self):
        from edgeblocks.export.language_model import LanguageModel, is_language_model

        is_language_model(self.folder)
        model = LanguageModel(self.folder)
        assert isinstance(model.tokenizer.decode(model.tokenizer.encode("a whale")), str)


def plain_graph(operator):
    """A small graph with an operator of onnxruntime's own and weights beside it."""
    from onnx import TensorProto, helper

    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1])
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "model.onnx.data", "offset": "0", "length": "4"}.items():
        weight.external_data.add(key=key, value=value)
    node = helper.make_node(operator, ["x", "w"], ["y"], domain="com.microsoft")
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(
        helper.make_graph([node], "model", [], [], [weight]), opset_imports=opsets
    ).SerializeToString()
