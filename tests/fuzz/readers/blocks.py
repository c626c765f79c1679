"""The files of the blocks."""

import contextlib
import hashlib
import json

from fuzz.readers.odd_entries import replace_by_something
from fuzz.readers.reader import Reader
from support.mutations import json_text, mutated_bytes, mutated_value


class BlockReader(Reader):
    """A block file: damaged anywhere, or with a header that was changed and signed again."""

    def __init__(self, folder):
        import torch
        from torch import nn

        from edgeblocks.offload.block_buffer import PARTS, BlockBuffer, BlockLayout
        from edgeblocks.offload.block_files import BlockStore

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
