"""Tokenizers that a user brings, and the tokens on the disk."""

import contextlib
import hashlib
import io
import json
import shutil

import numpy as np
from fuzz.readers.odd_entries import replace_by_something
from fuzz.readers.texts import TextReader
from support.mutations import changed_npy, json_text, mutated_bytes, mutated_value
from support.text_mutations import changed_definition

from edgeblocks.data.cache import meta_digest

TEXT = "The white whale swims under a cold sea — 7 miles; Où est la baleine ? 鯨は泳ぐ。 eeee xxxx aaaa\n" * 40


def definitions():
    """Contents of tokenizer.json: byte pairs, words, and pieces of words, with the parts that others are made with."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    from edgeblocks.data.tokenizer import train_pairs

    words = {word: number for number, word in enumerate(["[UNK]", *sorted(set(TEXT.split()))])}
    pieces = {**words, **{f"##{letter}": len(words) + number for number, letter in enumerate("abcdefgh")}}
    made = [
        Tokenizer(models.WordLevel(words, unk_token="[UNK]")),
        Tokenizer(models.WordPiece(pieces, unk_token="[UNK]")),
        Tokenizer(models.Unigram([("<unk>", 0.0), *((word, -float(n)) for word, n in words.items())], 0, True)),
        Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "<unk>": 3}, [("a", "b")], unk_token="<unk>", fuse_unk=True)),
    ]
    for tokenizer in made:
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("é", "e")])
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.decoder = decoders.WordPiece()
        tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A", special_tokens=[("[CLS]", 1)])
        tokenizer.add_special_tokens(["[CLS]"])
    texts = [train_pairs([TEXT], 300).to_json(), *(tokenizer.to_str() for tokenizer in made)]
    return [json.loads(text) for text in texts]


class TokenizerReader(TextReader):
    """A tokenizer.json that the user names."""

    needs = "tokenizers"

    def __init__(self, folder):
        super().__init__(folder)
        self.source, self.tokenizer = folder / "text.txt", folder / "tokenizer.json"
        self.source.write_text(TEXT)
        self.definitions = definitions()

    def prepare(self, rng):
        self.tokenizer.unlink(missing_ok=True) if not self.tokenizer.is_dir() else self.tokenizer.rmdir()
        if rng.random() < 0.02:
            replace_by_something(rng, self.tokenizer, self.source)
        else:
            self.tokenizer.write_bytes(changed_definition(rng, rng.choice(self.definitions)))

    def prepare_sound(self):
        self.tokenizer.write_text(json.dumps(self.definitions[0]))

    def read(self):
        text = self.open(self.source)
        tokenizer = text.tokenizer
        assert all(0 <= token < text.vocabulary for token in tokenizer.encode("A whale — 鯨 \ud800").tolist())
        assert isinstance(tokenizer.decode(range(text.vocabulary)), str)


class TokenCacheReader(TextReader):
    """The tokens on the disk: meta.json, the arrays and the tokenizer lie. What is not believed is made again."""

    needs = "tokenizers"

    def __init__(self, folder):
        super().__init__(folder)
        self.source = folder / "text.txt"
        self.source.write_text(TEXT)
        self.built = {}
        for kind in ("bytes", "bpe"):
            self.tokenizer = kind
            text = self.open(self.source)
            (place,) = self.cache.iterdir()
            files = {path.name: path.read_bytes() for path in place.iterdir()}
            self.built[kind] = (place, files, text.token_file.read(0, text.num_tokens))

    def prepare(self, rng):
        self.tokenizer = rng.choice(("bytes", "bpe"))
        shutil.rmtree(self.cache, ignore_errors=True)
        place, files, _ = self.built[self.tokenizer]
        place.mkdir(parents=True)
        for name, content in files.items():
            (place / name).write_bytes(content)
        meta, name = json.loads(files["meta.json"]), rng.choice(list(files))
        if rng.random() < 0.1:
            replace_by_something(rng, place / name, self.source)
        elif name == "meta.json":
            text = json_text(rng, self._signed(rng, mutated_value(rng, meta)))
            (place / name).write_text(text, encoding="utf-8", errors="surrogatepass")
        else:
            content = self._changed(rng, name, files[name])
            (place / name).write_bytes(content)
            if rng.random() < 0.8:
                meta["file_bytes"][name] = len(content)
                if name == "tokenizer.json":
                    meta["definition_sha256"] = hashlib.sha256(content).hexdigest()
                (place / "meta.json").write_text(json.dumps(self._signed(rng, meta)))

    @staticmethod
    def _changed(rng, name, content):
        if name == "tokenizer.json":
            return changed_definition(rng, json.loads(content))
        if rng.random() < 0.5:
            return mutated_bytes(rng, content)
        return changed_npy(rng, np.load(io.BytesIO(content)))

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
        text = self.checked(self.source)
        expected = self.built[self.tokenizer][2][: text.num_tokens]
        found = text.token_file.read(0, len(expected))
        assert np.array_equal(found, expected), "what is read is what was written, or nothing is"
