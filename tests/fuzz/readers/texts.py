"""Text to train on: files, lines of JSON, folders, and tables."""

import contextlib
import io
import math
import os
import shutil

import numpy as np
from fuzz.readers.odd_entries import replace_by_something
from fuzz.readers.reader import Reader
from support.mutations import mutated_bytes
from support.text_mutations import broken_lines, broken_text, some_text

KINDS = ("bytes", "bytes", "bytes", "chars", "chars", "bpe")


class TextReader(Reader):
    """Text opened through a cache that is made anew each time, with any of the tokenizers."""

    def __init__(self, folder):
        from edgeblocks.data.text import open_text

        self.open_text, self.folder, self.cache = open_text, folder, folder / "cache"
        self.tokenizer, self.hold_out = "bpe", 0.1

    def choose_settings(self, rng):
        self.tokenizer, self.hold_out = rng.choice(KINDS), rng.choice((0, 0.1, 0.5))

    def open(self, source):
        shutil.rmtree(self.cache, ignore_errors=True)
        return self.checked(source)

    def checked(self, source):
        """The text, whose tokens are all read."""
        settings = {"tokenizer": str(self.tokenizer), "vocabulary": 300, "length": 8, "hold_out": self.hold_out}
        text = self.open_text(str(source), **settings, cache_dir=self.cache)
        assert text.has_held_out == (self.hold_out > 0) and text.num_tokens >= text.train_tokens >= 16
        last = text.num_tokens - text.length
        windows, labels = text.gather(np.linspace(0, last, 5).astype(np.int64))
        assert labels is None and windows.shape == (5, 8)
        tokens = text.token_file.read(0, text.num_tokens)
        assert tokens.max() < text.vocabulary
        assert isinstance(text.tokenizer.decode(tokens), str)
        assert 0 < text.bytes_per_token < math.inf and 0 < text.characters_per_token < math.inf
        text.gather(text.order(batch=3, seed=0, block=0).indices(1))
        text.gather(text.evaluation_indices(4))
        return text


class TextFileReader(TextReader):
    """A text file in any encoding."""

    def __init__(self, folder):
        super().__init__(folder)
        self.path = folder / "text.txt"

    def prepare(self, rng):
        self.choose_settings(rng)
        text = some_text(rng, rng.choice((300, 3000, 3000, 70_000)))
        self.path.write_bytes(broken_text(rng, text))

    def prepare_sound(self):
        self.path.write_text("The white whale swims — 7 miles.\n" * 50)

    def read(self):
        self.open(self.path)


class LinesReader(TextReader):
    """A .jsonl with damaged lines."""

    def __init__(self, folder):
        super().__init__(folder)
        self.path = folder / "text.jsonl"

    def prepare(self, rng):
        self.choose_settings(rng)
        self.path.write_bytes(broken_lines(rng, some_text(rng, 1200)))

    def prepare_sound(self):
        self.path.write_text('{"text": "The white whale swims — 7 miles."}\n' * 50)

    def read(self):
        self.open(self.path)


class TextFolderReader(TextReader):
    """A folder in which one text is damaged, or one entry is no text at all."""

    def __init__(self, folder):
        super().__init__(folder)
        self.root, self.outside = folder / "texts", folder / "outside.txt"
        self.outside.write_text("Outside, the whale sings. " * 20)

    def prepare(self, rng):
        self.choose_settings(rng)
        self.prepare_sound()
        way = rng.randrange(6)
        if way <= 1:
            name = rng.choice(("a.txt", "b.md", "c.jsonl", "z.txt", "inner/d.txt"))
            replace_by_something(rng, self.root / name, self.outside)
        elif way == 2:
            names = (b"\xff\xfe.txt", b"\x1b[31m.txt", b"a\nb.txt", b" .txt", b".hidden.txt", b"x.TXT", b"none.bin")
            with open(os.fsencode(self.root) + b"/" + rng.choice(names), "wb") as file:  # noqa: PTH123 - no text
                file.write(rng.choice((self.outside.read_bytes(), b"\0")))
        elif way == 3:
            place = rng.choice((self.root, self.root / "inner"))
            (place / rng.choice(("loop", "loop.txt"))).symlink_to(rng.choice((place, self.root, self.folder)))
        elif way == 4:
            deep = self.root
            for _ in range(rng.choice((3, 40))):
                deep = deep / ("d" * rng.choice((1, 100)))
            with contextlib.suppress(OSError):
                deep.mkdir(parents=True)
                (deep / "e.txt").write_bytes(broken_text(rng, some_text(rng, 300)))
        else:
            (self.root / "c.jsonl").write_bytes(broken_lines(rng, some_text(rng, 300)))
            (self.root / "y.txt").write_bytes(broken_text(rng, some_text(rng, 300)))

    def prepare_sound(self):
        shutil.rmtree(self.root, ignore_errors=True)
        (self.root / "inner").mkdir(parents=True)
        for name in ("a.txt", "b.md", "inner/d.txt"):
            (self.root / name).write_text("The white whale swims. " * 30)
        (self.root / "c.jsonl").write_text('{"text": "The whale sings."}\n' * 9)

    def read(self):
        self.open(self.root)


class TableReader(TextReader):
    """A .parquet that is damaged anywhere."""

    needs = "pyarrow"

    def __init__(self, folder):
        import pyarrow
        from pyarrow import parquet

        super().__init__(folder)
        self.path, self.sound = folder / "text.parquet", []
        texts = [f"The whale number {number} swims — far.\n" for number in range(90)]
        tables = (
            {"text": texts, "id": range(90)},
            {"text": [*texts[:89], None]},
            {"text": pyarrow.array(texts, pyarrow.large_string())},
            {"text": [text.encode() for text in texts]},
            {"body": texts},
            {"text": [[text] for text in texts]},
        )
        for columns in tables:
            for compression in ("none", "snappy", "gzip", "zstd"):
                file = io.BytesIO()
                parquet.write_table(pyarrow.table(columns), file, row_group_size=40, compression=compression)
                self.sound.append(file.getvalue())

    def prepare(self, rng):
        self.choose_settings(rng)
        content = rng.choice(self.sound if rng.random() < 0.2 else self.sound[:12])
        if rng.random() < 0.6:  # the table of contents, which stands at the end
            start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
            footer = mutated_bytes(rng, content[start:-8])
            content = content[:start] + footer + len(footer).to_bytes(4, "little") + b"PAR1"
        else:
            content = mutated_bytes(rng, content)
        self.path.write_bytes(content)

    def prepare_sound(self):
        self.path.write_bytes(self.sound[0])

    def read(self):
        self.open(self.path)
