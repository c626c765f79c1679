"""The file that a network's weights begin with."""

import json

from fuzz.readers.odd_entries import replace_by_something
from fuzz.readers.reader import Reader
from support.mutations import json_text, mutated_bytes, mutated_value


class InitialWeightsReader(Reader):
    """A safetensors file, damaged anywhere or with a changed header, opened for a network and read into its tensors."""

    def __init__(self, folder):
        from dataclasses import asdict

        import torch
        from safetensors.torch import save

        from edgeblocks.families.base import ImageInfo
        from edgeblocks.families.vit import VitSettings
        from edgeblocks.offload.sections import Section
        from edgeblocks.registry import build_family

        data = ImageInfo(channels=1, height=8, width=8, num_classes=3, mean=0.5, scale=2.0)
        self.family = build_family("vit", asdict(VitSettings(width=8, depth=1, heads=2)), asdict(data), "exact")
        self.sections = [Section(num_layers=1)]
        named = dict(self.family.block(num_layers=1, checkpointing=False).named_parameters())
        self.shapes = {name: parameter.shape for name, parameter in named.items()}
        self.path = folder / "init.safetensors"
        self.sound = save({name: torch.randn(shape) for name, shape in self.shapes.items()})
        self.path.write_bytes(self.sound)
        self.payload = 8 + int.from_bytes(self.sound[:8], "little")
        self.header = json.loads(self.sound[8 : self.payload])

    def prepare(self, rng):
        if self.path.is_dir():
            self.path.rmdir()
        self.path.unlink(missing_ok=True)
        chance = rng.random()
        if chance < 0.02:
            self.path.write_bytes(self.sound)
            replace_by_something(rng, self.path, self.path)
        elif chance < 0.3:
            self.path.write_bytes(mutated_bytes(rng, self.sound))
        elif chance < 0.5:
            self.path.write_bytes(self.sound[: self.payload] + mutated_bytes(rng, self.sound[self.payload :]))
        else:
            text = json_text(rng, mutated_value(rng, self.header)).encode()
            self.path.write_bytes(len(text).to_bytes(8, "little") + text + self.sound[self.payload :])

    def read(self):
        import torch

        from edgeblocks.runs.load_weights import open_initial_weights

        initial = open_initial_weights(self.path, self.family, self.sections, lambda block, name: name)
        tensors = {name: torch.full(shape, float("nan")) for name, shape in self.shapes.items()}
        initial.fill_(0, tensors.items())
        assert all(tensor.isfinite().all() for tensor in tensors.values())
