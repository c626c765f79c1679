"""Mutations of text: encodings, lines of JSON, and what a tokenizer.json may ask the library for.

Every function takes a `random.Random` first and changes nothing that is handed in.
"""

import base64
import codecs
import json
import struct

from support.mutations import edge_string, edge_value, json_text, mutated_bytes, mutated_value

SENTENCES = (
    "The white whale swims.",
    "Où est la baleine ?",
    "鯨は泳ぐ。",
    "Ein Wal — 7 Meilen!",
    "\tNo  ship\r",
    "🐋🐋",
)
ENCODINGS = ("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1", "cp1252", "shift-jis", "utf-7")
NO_TEXT = (b"\0", b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe9\xaf", b"\x80" * 9, b"\x1a\x04")
ODD_TEXT = ("\ufeff", "\u2028", "\u202e", "e" + "\u0301" * 300, "\x85", "\x1b[31m", "\ufffd", "\U000e0001", "\r")


def some_text(rng, num_bytes):
    """Sentences in several scripts, of at least so many bytes."""
    pieces, length = [], 0
    while length < num_bytes:
        pieces.append(rng.choice(SENTENCES) + rng.choice((" ", " ", "\n", "\n\n")))
        length += len(pieces[-1].encode())
    return "".join(pieces)


def broken_text(rng, text):
    """A text's bytes in another encoding, with bytes that are no text, or of a shape that few texts have."""
    return rng.choice(_TEXT_MUTATIONS)(rng, text)


def _encoded(rng, text):
    return text.encode(rng.choice(ENCODINGS), errors="replace")


def _marked(rng, text):
    mark = rng.choice((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE))
    return mark * rng.choice((1, 1, 2)) + text.encode()[: rng.choice((0, 1, len(text)))]


def _without_words(rng, _text):
    return rng.choice((b"", b" ", b"\n" * 5000, b"a", b"\xef\xbb\xbf", b"\t" * 200_000, b"\xe2\x80\xa8" * 30))


def _one_line(rng, _text):
    """Longer than any piece that is read at once."""
    word = rng.choice(("x", "xyz ", "鯨", "e\u0301", " ", "7", "a\u00a0"))
    return (word * rng.choice((70_000, 140_000, 300_000))).encode()


def _over_the_border(rng, text):
    """A character that lies over the border of two pieces."""
    return b"a" * (2**16 - rng.randrange(1, 5)) + rng.choice(("🐋", "鯨", "é")).encode() * 40 + text.encode()


def _inserted(rng, content, odd):
    place = rng.choice((0, len(content), rng.randrange(len(content) + 1)))
    return content[:place] + odd + content[place:]


_TEXT_MUTATIONS = [
    _encoded,
    _marked,
    lambda rng, text: _inserted(rng, text.encode(), rng.choice(NO_TEXT)),
    lambda rng, text: _inserted(rng, text.encode(), rng.choice(NO_TEXT)),
    lambda rng, text: _inserted(rng, text.encode(), rng.choice(ODD_TEXT).encode()),
    _without_words,
    _one_line,
    _over_the_border,
    lambda rng, text: mutated_bytes(rng, text.encode()),
]


def broken_lines(rng, text):
    """A .jsonl of which some lines are damaged, or are JSON of something else."""
    records = [{"text": text[start : start + 40], "id": start} for start in range(0, min(len(text), 1200), 40)]
    lines = [json.dumps(record, ensure_ascii=rng.random() < 0.5).encode() for record in records]
    for _ in range(rng.choice((1, 1, 2, 5))):
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(_LINE_MUTATIONS)(rng, rng.choice(records)))
    end = rng.choice((b"\n", b"\n", b"\n", b"\r\n", b"\r", b"\n\n \n", b"\0\n"))
    content = end.join(lines)
    return mutated_bytes(rng, content) if rng.random() < 0.2 else content


def _json_line(rng, value):
    return json_text(rng, value).replace("\n", " ").encode("utf-8", errors="surrogatepass")


def _half_a_pair(rng, _record):
    """Halves of surrogate pairs, NUL and marks, as JSON can write them."""
    half = rng.choice((r"\ud800", r"\udc00", r"\udc00\ud800", r"\u0000", r"\ufeff", r"\ud83d\udc0b"))
    return b'{"text": "a whale ' + half.encode() * rng.choice((1, 500)) + b'"}'


def _huge_number(rng, _record):
    return b'{"text": "a", "n": ' + rng.choice((b"1e999", b"9" * 5000, b"-", b"NaN", b"0x1", b"1" * 400)) + b"}"


def _long_line(rng, _record):
    size = rng.choice((10**5, 10**6, 10**6, 17 * 2**20))
    return b'{"text": "' + rng.choice((b"whale ", b"x", b"\\n")) * (size // 4) + rng.choice((b'"}', b""))


_LINE_MUTATIONS = [
    lambda rng, record: mutated_bytes(rng, json.dumps(record).encode()).replace(b"\n", b" "),
    lambda rng, record: _json_line(rng, mutated_value(rng, record)),
    lambda rng, _: _json_line(rng, {"text": edge_value(rng)}),
    lambda rng, _: _json_line(rng, edge_value(rng)),
    lambda rng, _: _json_line(rng, {rng.choice(("TEXT", "text ", "body", "", "te\0xt", edge_string(rng))): "a"}),
    _half_a_pair,
    _huge_number,
    _long_line,
]


HOSTILE_PATTERNS = (
    {"Regex": "(a*)*b"},
    {"Regex": "(x+x+)+y"},
    {"Regex": "(?=a)*"},
    {"Regex": "(" * 400 + ")" * 400},
    {"Regex": "a{1000}{1000}"},
    {"Regex": "[" * 50},
    {"Regex": "(?<=a+)b"},
    {"Regex": ""},
    {"Regex": "\\1(a)"},
    {"String": ""},
    {"String": "e"},
)
_BEHAVIOURS = ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous", "Nowhere")


def hostile_component(rng, place):
    """A normalizer, pre_tokenizer, post_processor or decoder that asks for much, or for what cannot be."""
    pattern = rng.choice(HOSTILE_PATTERNS)
    kinds = {
        "normalizer": [
            {"type": "Replace", "pattern": pattern, "content": rng.choice(("", "ee", "e" * 1000))},
            {"type": "Prepend", "prepend": rng.choice(("", "▁", "x" * 10**5))},
            {"type": "Strip", "strip_left": True, "strip_right": True},
            {"type": "Precompiled", "precompiled_charsmap": rng.choice(("", "AAAA", "/////w==", "AQAAAA=="))},
            {"type": "Sequence", "normalizers": [_table()] * rng.choice((1, 2, 9))},
            {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "lowercase": True},
            {"type": "ByteLevel"},
            {"type": "Sequence", "normalizers": [_doubling() for _ in range(rng.choice((2, 40)))]},
            *({"type": kind} for kind in ("NFC", "NFKD", "Lowercase", "Nmt", "StripAccents")),
        ],
        "pre_tokenizer": [
            {"type": "Split", "pattern": pattern, "behavior": rng.choice(_BEHAVIOURS), "invert": rng.random() < 0.5},
            {"type": "Metaspace", "replacement": rng.choice(("▁", "", "ab")), "prepend_scheme": "always"},
            {"type": "FixedLength", "length": rng.choice((0, 1, 2**63))},
            {"type": "CharDelimiterSplit", "delimiter": rng.choice((" ", "e", ""))},
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": rng.random() < 0.5},
            *({"type": kind} for kind in ("Whitespace", "WhitespaceSplit", "UnicodeScripts", "Punctuation")),
        ],
        "post_processor": [
            {"type": "BertProcessing", "sep": ["x", 10**9], "cls": ["y", 2**32 - 1]},
            {"type": "RobertaProcessing", "sep": ["x", 1], "cls": ["y", 2], "trim_offsets": True},
            {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "B", "type_id": 0}}], "pair": []},
        ],
        "decoder": [
            {"type": "Replace", "pattern": pattern, "content": rng.choice(("", "ee" * 1000))},
            {"type": "Strip", "content": "e", "start": rng.choice((0, 2**63)), "stop": rng.choice((0, 2**63))},
            {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
            {"type": "BPEDecoder", "suffix": rng.choice(("", "</w>"))},
            {"type": "WordPiece", "prefix": "", "cleanup": True},
            *({"type": kind} for kind in ("ByteFallback", "Fuse", "ByteLevel")),
        ],
    }
    if rng.random() < 0.1:
        return rng.choice((None, {"type": "Nothing"}, edge_value(rng)))
    return rng.choice(kinds[place])


def _doubling():
    return {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}


def _table():
    """A table of characters in which an e becomes eight."""
    units = [0] * 256
    units[0], units[128 ^ 0x65], units[129 ^ 0x65] = 128 << 10, 1 << 10 | 1 << 8 | 0x65, 1 << 31
    packed = struct.pack("<257I", 1024, *units) + b"e" * 8 + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(packed).decode()}


def changed_definition(rng, definition):
    """The content of a tokenizer.json with its values, a component, its vocabulary or its bytes changed."""
    way = rng.randrange(6)
    if way == 0:
        return mutated_bytes(rng, json.dumps(definition).encode())
    if way <= 2:
        text = json_text(rng, mutated_value(rng, definition))
        return text.encode("utf-8", errors="surrogatepass")
    changed = json.loads(json.dumps(definition))
    if way == 3:
        for place in rng.sample(("normalizer", "pre_tokenizer", "post_processor", "decoder"), rng.choice((1, 1, 2))):
            changed[place] = hostile_component(rng, place)
    elif way == 4:
        lengths = {"max_length": rng.choice((0, 1, 2**40)), "strategy": "LongestFirst", "stride": rng.choice((0, 5))}
        changed["truncation"] = {**lengths, "direction": "Right"}
        fixed = {"strategy": {"Fixed": rng.choice((0, 2**40))}, "direction": "Left", "pad_to_multiple_of": None}
        changed["padding"] = {**fixed, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
        token = {"id": rng.choice((0, 5, 700, 10**6, 2**32 - 1)), "content": edge_string(rng), "special": True}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), rng.random() < 0.5)
        changed["added_tokens"] = [{**token, **flags}] * rng.choice((1, 2))
    elif isinstance(changed.get("model"), dict):
        changed["model"] = mutated_value(rng, changed["model"])
    return json.dumps(changed).encode("utf-8", errors="surrogatepass")
