"""How many bits a character simple means need for a run's hold-out text: what a trained network is compared with.

    python tests/bench/text_compressors.py moby-dick
    python tests/bench/text_compressors.py notes/ --tokenizer bytes

The text, its tokens and its last tenth are those of `edgeblocks train --data ..`. n-grams of order n see n - 1
characters; they are counted on the training part and interpolated with all shorter ones as Witten and Bell do: a
context that was followed by many different characters trusts its own counts less. zlib and bzip2 compress the hold-out
part alone.
"""

import argparse
import bz2
import tempfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeblocks.data.text import open_text

ORDERS = (1, 2, 3, 4, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--tokenizer", default="chars", choices=("chars", "bytes"))
    wanted = parser.parse_args()
    for name, bits in bits_per_character(wanted.data, wanted.tokenizer).items():
        print(f"{name:>10}  {bits:.3f} bits per character")


def bits_per_character(data: str, tokenizer: str) -> dict[str, float]:
    """By name of the means, each on the whole hold-out part."""
    with tempfile.TemporaryDirectory(prefix="edgeblocks-bench-") as cache:
        text = open_text(data, tokenizer=tokenizer, vocabulary=256, length=1, hold_out=0.1, cache_dir=Path(cache))
        tokens = text.gather(np.arange(text.num_tokens))[0][:, 0]
    train, held_out = tokens[: text.train_tokens], tokens[text.train_tokens :]
    characters = len(held_out) * text.characters_per_token
    written = text.tokenizer.decode(held_out).encode()
    found = {"zlib": 8 * len(zlib.compress(written, 9)) / characters}
    found["bzip2"] = 8 * len(bz2.compress(written, 9)) / characters
    for order, bits in zip(ORDERS, ngram_bits(train, held_out, vocabulary=text.vocabulary), strict=True):
        found[f"{order}-gram"] = bits / characters
    return found


def ngram_bits(train: NDArray[np.int64], held_out: NDArray[np.int64], *, vocabulary: int) -> list[float]:
    """Bits that n-grams of each of `ORDERS` need for the whole hold-out part, which follows the training part.

    P_n(c | h) = (count(h c) + types(h) P_{n-1}(c | h')) / (count(h) + types(h)), where h' is h without its first
    character and types(h) the number of different characters that followed h (Witten and Bell 1991, method C).
    """
    text = np.concatenate([train, held_out])
    probability = np.full(len(held_out), 1 / vocabulary)
    found = []
    for order in ORDERS:
        grams = sum(
            text[place : len(text) - order + 1 + place] * vocabulary ** (order - 1 - place) for place in range(order)
        )
        seen, asked = grams[: len(train) - order + 1], grams[len(grams) - len(held_out) :]
        kinds, counts = np.unique(seen, return_counts=True)
        contexts, first = np.unique(kinds // vocabulary, return_index=True)
        totals, types = np.add.reduceat(counts, first), np.diff(np.append(first, len(kinds)))
        of_gram = _looked_up(asked, kinds, counts)
        of_context, types_of_context = (_looked_up(asked // vocabulary, contexts, values) for values in (totals, types))
        known = of_context > 0
        mixed = (of_gram + types_of_context * probability) / np.maximum(of_context + types_of_context, 1)
        probability = np.where(known, mixed, probability)
        found.append(float(-np.log2(probability).sum()))
    return found


def _looked_up(keys: NDArray[np.int64], sorted_keys: NDArray[np.int64], values: NDArray[np.int64]) -> NDArray[np.int64]:
    """The value of each key; 0 where there is none."""
    places = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    found: NDArray[np.int64] = np.where(sorted_keys[places] == keys, values[places], 0)
    return found


if __name__ == "__main__":
    main()
