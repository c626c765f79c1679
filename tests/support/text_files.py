"""Text files, and a set of text opened with usual settings."""

from edgeblocks.data.text import open_text

LINES = "".join(f"Line {number}: déjà vu — 鯨 swam {number * 37} miles.\n" for number in range(3000))
WORDS = [f"This is document number {number} about ships — and whales." for number in range(60)]


def opened(source, cache_dir, **settings):
    settings = {
        "tokenizer": "bytes",
        "vocabulary": 300,
        "length": 8,
        "hold_out": 0.1,
        "cache_dir": cache_dir,
    } | settings
    return open_text(str(source), **settings)


def all_tokens(text):
    """Every token of a set in one reading, which windows are compared with."""
    return text.token_file.read(0, text.num_tokens)


def whole_text(source, cache_dir, **settings):
    text = opened(source, cache_dir, **{"length": 1, "hold_out": 0} | settings)
    return text.tokenizer.decode(all_tokens(text))
