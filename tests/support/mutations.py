"""Mutations: copies of sound files and values that are wrong in ways which readers have stumbled over.

Every function takes a `random.Random` first and changes nothing that is handed in.
"""

import binascii
import contextlib
import io
import json
import re
import string
import struct
import zlib

import numpy as np
import yaml
from PIL import Image

EDGES = [0, -1, 1, 2, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64, 10**30]


def mutated_bytes(rng, content):
    """A copy with one to four changes."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        rng.choice(_BYTE_MUTATIONS)(rng, content)
    return bytes(content)


def _place(rng, content):
    """Any byte, the first ones more often, for headers stand there."""
    most = len(content) if rng.random() < 0.6 else min(len(content), 128)
    return rng.randrange(max(1, most))


def _flip_bits(rng, content):
    for _ in range(rng.choice((1, 1, 2, 8))):
        if content:
            content[_place(rng, content)] ^= 1 << rng.randrange(8)


def _replace_bytes(rng, content):
    place = _place(rng, content)
    content[place : place + rng.choice((1, 1, 2, 4, 16))] = rng.randbytes(rng.choice((1, 1, 2, 4, 16)))


def _truncate(rng, content):
    del content[_place(rng, content) :]


def _append(rng, content):
    content += rng.choice((b"\0" * 100, rng.randbytes(50), bytes(content[:2000])))


def _span(rng, content):
    start = _place(rng, content)
    return start, min(len(content), start + rng.choice((1, 4, 16, 64, 512)))


def _remove_span(rng, content):
    start, stop = _span(rng, content)
    del content[start:stop]


def _repeat_span(rng, content):
    start, stop = _span(rng, content)
    content[start:start] = bytes(content[start:stop]) * rng.choice((1, 2, 50))


def _swap_spans(rng, content):
    (a, b), (c, d) = sorted((_span(rng, content), _span(rng, content)))
    if b <= c:
        content[a:d] = content[c:d] + content[b:c] + content[a:b]


def _blank_span(rng, content):
    start, stop = _span(rng, content)
    content[start:stop] = bytes([rng.choice((0, 255, 32))]) * (stop - start)


def _edge_integer(rng, content):
    width, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
    place = _place(rng, content)
    if place + width <= len(content):
        content[place : place + width] = (rng.choice(EDGES) % 256**width).to_bytes(width, order)


def _edge_digits(rng, content):
    """A number that stands in the bytes as text becomes another one."""
    found = list(re.finditer(rb"-?\d+(?:\.\d+)?", bytes(content[:100_000])))
    if found:
        match = rng.choice(found)
        content[match.start() : match.end()] = edge_text(rng).encode()


_BYTE_MUTATIONS = [
    _flip_bits,
    _flip_bits,
    _replace_bytes,
    _truncate,
    _append,
    _remove_span,
    _repeat_span,
    _swap_spans,
    _blank_span,
    _edge_integer,
    _edge_integer,
    _edge_digits,
]


def edge_text(rng):
    """A number as text, from which readers have stumbled before."""
    if rng.random() < 0.6:
        return str(rng.choice(EDGES))
    return rng.choice(
        ("1e300", "-1e300", "1e400", "1e-320", "0.5", "NaN", "Infinity", "-0", "00", "9" * 400, "9" * 5000, "1e5", "")
    )


def edge_value(rng, depth=0):
    """Any JSON value, the awkward ones more often."""
    kind = rng.randrange(12)
    if kind <= 8 or depth == 3:
        return _edge_leaf(rng)
    if kind == 9:
        return [edge_value(rng, depth + 1) for _ in range(rng.randrange(5))]
    if kind == 10:
        return {edge_string(rng): edge_value(rng, depth + 1) for _ in range(rng.randrange(4))}
    return [rng.choice((0, "", "a", None, 10**30, 0.5))] * rng.choice((10, 1000, 20_000))


def _edge_leaf(rng):
    kind = rng.randrange(10)
    if kind <= 3:
        return rng.choice(EDGES)
    if kind <= 5:
        return edge_string(rng)
    if kind == 6:
        return rng.choice((0.0, -0.0, 0.5, -1.5, 1e300, -1e300, 5e-324, float("nan"), float("inf"), float("-inf")))
    if kind == 7:
        return rng.choice((None, True, False))
    if kind == 8 and rng.random() < 0.2:
        return nested(rng.choice((70, 300, 900)), rng.choice(("list", "dict")))
    return rng.choice(([], {}, [[]], [None], {"": 0}, 10**400, 10**4000))


def nested(depth, kind):
    value = 0
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


def edge_string(rng):
    return rng.choice(
        (
            "",
            "auto",
            "0",
            "1e9",
            "nan",
            "a" * rng.choice((300, 5000)),
            "../../etc/passwd",
            "/dev/zero",
            "~nobody-of-this-name/x",
            "a\0b",
            "\ud800",
            "\udcff",
            "\u202e\x1b[31m",
            "9" * 400 + "GB",
            "100%",
            "C:x",
            ".",
            "".join(rng.choice(string.printable) for _ in range(rng.randrange(20))),
        )
    )


def places(value, path=()):
    """The paths of all values inside a JSON value, itself first."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*path, key))


def mutated_value(rng, value):
    """A deep copy of a JSON value with one to three changes."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = [path for path in places(value) if path]
        if not found:
            return edge_value(rng)
        _change_at(rng, value, rng.choice(found), rng.choice(found))
    return value


def _at(value, path):
    for key in path:
        value = value[key]
    return value


def _change_at(rng, value, path, other):
    try:
        parent, key = _at(value, path[:-1]), path[-1]
        former = parent[key]
        kind = rng.randrange(9)
        if kind <= 2:
            parent[key] = edge_value(rng)
        elif kind == 3:
            del parent[key]
        elif kind == 4:
            parent[key] = rng.choice((str, lambda x: [x], lambda x: {"a": x}, lambda _: None))(former)
        elif kind == 5 and isinstance(former, (int, float)):
            parent[key] = rng.choice((former + 1, former - 1, -former, former * 1000, float(former), former / 3))
        elif kind == 6 and isinstance(former, list) and former:
            parent[key] = rng.choice((former[1:], [*former, former[0]], former[::-1]))
        elif kind == 7 and isinstance(parent, dict):
            parent[edge_string(rng)] = parent.pop(key)
        else:
            parent[key] = _at(value, other)
            json.dumps(value)  # a value inside itself cannot be written
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, RecursionError):
        with contextlib.suppress(KeyError, IndexError, TypeError):
            parent[key] = edge_value(rng, 3)


def json_text(rng, value):
    """A JSON value as text, seldom damaged further."""
    try:
        text = json.dumps(value, indent=rng.choice((None, 1)))
    except (ValueError, RecursionError):
        text = "{}"
    chance = rng.random()
    if chance < 0.04:
        text = rng.choice(("[" * 100_000, '{"a":' * 50_000, "[" * 500 + "]" * 500, '{"a":1,' * 1000, "", "null", "[]"))
    elif chance < 0.08:
        text = text.replace("{", '{"slots": 0, "slots": 1, ', 1)
    elif chance < 0.1:
        text = "{" + ", ".join(f'"k{number}": {{}}' for number in range(rng.choice((1000, 200_000)))) + "}"
    return text


YAML_LINES = (
    "a: &a [x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]\n"
    "c: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b]\nd: &d [*c, *c, *c, *c, *c, *c, *c, *c, *c]\ndata: [*d, *d, *d, *d]",
    "data: &x [*x]",
    "<<: {steps: 3}",
    "<<: *x",
    "seed: 2024-99-99",
    "seed: 2024-01-01",
    "steps: 0x" + "f" * 5000,
    "steps: 1" + ":59" * 3000,
    "steps: " + "9" * 5000,
    "width: 0b1111111111111111111111111111111111111111111111",
    "batch: !!int ''",
    "batch: !!bool 5",
    "batch: !!float x",
    "data: !!binary '*'",
    "data: !!python/object/apply:os.system [id]",
    "data: !!timestamp x",
    "data: !!set {a, b}",
    "? [a, b]\n: c",
    "? {a: b}\n: c",
    "data: " + "[" * 3000,
    "data: " + "{a: " * 50,
    "data: |\n  " + "x" * 3000,
    "data: '\\0'",
    'data: "\\ud800"',
    "1: 2",
    "null: 2",
    "1.5: 2",
    "%YAML 9.9",
    "---\na: b",
    "\t a: b",
    "mem_budget: 99999999999999999999999999999999999999999999TB",
    "sigma_max: 1.0e+308",
    "sigma_min: 1.0e-320",
    "p_std: .nan",
    "depth: 1000000000",
    "heads: 1000000000000000",
    "learning_rate: 1_0.5e+3_0",
    "\n".join(f"k{number}: 1" for number in range(300)),
    "k: " + "y" * 70_000,
)


def yaml_text(rng, settings):
    """Settings as YAML, mutated as values, as lines or as bytes."""
    way = rng.randrange(4)
    if way == 0:
        text = yaml.safe_dump(settings, sort_keys=False)
        return mutated_bytes(rng, text.encode())
    changed = mutated_value(rng, settings) if way != 1 else settings
    try:
        lines = yaml.safe_dump(changed, sort_keys=False).splitlines()
    except (ValueError, RecursionError, yaml.YAMLError):
        lines = ["data: digits"]
    for _ in range(rng.choice((0, 1, 1, 2)) if way != 2 else 0):
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(YAML_LINES))
    if way == 3 and lines:
        place = rng.randrange(len(lines))
        key = lines[place].partition(":")[0]
        lines[place] = f"{key}: {edge_text(rng)}"
    return "\n".join(lines).encode("utf-8", errors="surrogatepass")


def changed_npy(rng, array):
    """An .npy whose header was changed and has the right length."""
    fields = {
        "descr": repr(np.lib.format.dtype_to_descr(array.dtype)),
        "fortran_order": "False",
        "shape": repr(array.shape),
    }
    for _ in range(rng.choice((1, 1, 2))):
        key = rng.choice(list(fields))
        fields[key] = rng.choice(_NPY_VALUES[key])(rng, array)
    text = ", ".join(f"'{key}': {value}" for key, value in fields.items())
    header = rng.choice(("{%s, }", "{%s}", "{%s}", "%s", "({%s})", "{%s, 'more': 1}")) % text
    header = header.encode("latin1", errors="replace")
    if rng.random() < 0.1:
        header = rng.choice(
            (b"(" * 5000, b"-" * 9000 + b"1", b"[" * 150 + b"]" * 150, b"{[]: 1}", b"'\\q'", b"", b"9" * 9000)
        )
    version, length_bytes = rng.choice(((1, 2), (1, 2), (2, 4), (3, 4)))
    length = len(header) if rng.random() < 0.95 else rng.choice((0, 65535, len(header) - 1))
    content = array.tobytes()
    if rng.random() < 0.2:
        content = content * rng.choice((0, 2, 100))
    return b"\x93NUMPY" + bytes((version, 0)) + max(0, length).to_bytes(length_bytes, "little") + header + content


def _changed_shape(rng, array):
    shape = list(array.shape)
    way = rng.randrange(6)
    if way == 0:
        shape[rng.randrange(len(shape))] = rng.choice(EDGES)
    elif way == 1:
        rng.shuffle(shape)
    elif way == 2:
        shape.append(rng.choice((1, 0, 3)))
    elif way == 3:
        shape = [-size for size in shape[:2]] + shape[2:]
    elif way == 4:
        shape = [10**4 * (10**4) ** rng.randrange(3)] * rng.randrange(6)
    else:
        shape = [array.size, 1, 1]
    return repr(tuple(shape))


_NPY_VALUES = {
    "descr": [
        lambda rng, _: repr(rng.choice(("|u1", "<i8", ">i2", "<f2", "<f8", "<f16", "|b1", "<c8", "|S3", "<U2", "|O"))),
        lambda rng, _: repr(rng.choice(("", "x", "|V0", "|S0", "<M8[s]", "u1,u1", "(2,)u1", "f" * 500, "<i99999999"))),
        lambda rng, _: rng.choice(("[('a', '<f8')]", "('u1', (2,))", "None", "5", "'\\ud800'", "b'u1'", "{}")),
    ],
    "fortran_order": [lambda rng, _: rng.choice(("True", "1", "None", "'no'"))],
    "shape": [
        _changed_shape,
        _changed_shape,
        lambda rng, _: rng.choice(
            ("None", "5", "[6, 5]", "(6.0, 5)", "(True, 5, 4)", "()", "(6, '5')", "(" + "9" * 4000 + ",)")
        ),
    ],
}


def picture_of_frames(pixels, kind):
    """An animated GIF or PNG of some thousand frames."""
    file = io.BytesIO()
    frames = [Image.fromarray(pixels // (number % 7 + 1)) for number in range(1000)]
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    return file.getvalue()


def run_length_bmp():
    """A BMP of 4 x 2 pixels packed by run lengths, which Pillow unpacks in Python."""
    data = b"\x04\x01\x00\x00\x02\x02\x02\x01\x00\x01"
    palette = b"\x00\x00\x00\x00\xff\xff\xff\x00\x80\x10\x20\x00" + b"\0" * 1012
    header = struct.pack("<IiiHHIIiiII", 40, 4, 2, 1, 8, 1, len(data), 1, 1, 256, 0)
    start = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + header + palette + data


def changed_png(rng, content):
    """A PNG with a chunk changed, doubled, dropped or added, and the right checksums."""
    chunks, place = [], 8
    while place + 12 <= len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
        place += 12 + length
    index = rng.randrange(len(chunks))
    kind, data = chunks[index]
    way = rng.randrange(6)
    if way == 0:
        width, height = rng.choice(
            ((60_000, 60_000), (8192, 8192), (2**31 - 1, 1), (1, 2**31 - 1), (0, 5), (16383, 16383))
        )
        fields = bytes(rng.choice((1, 2, 4, 8, 16)) if rng.random() < 0.3 else byte for byte in chunks[0][1][8:])
        chunks[0] = (b"IHDR", struct.pack(">II", width, height) + fields)
        if rng.random() < 0.5:
            width, height, size = rng.choice(
                ((width, height, 10**4), (width, height, 10**7), (4096, 4095, 4097 * 4095))
            )
            chunks[0] = (b"IHDR", struct.pack(">II", width, height) + (b"\x08\0\0\0\0" if size > 10**7 else fields))
            chunks = [chunk for chunk in chunks if chunk[0] != b"IDAT"]
            chunks.insert(-1, (b"IDAT", zlib.compress(b"\0" * size, 1)))
    elif way == 1:
        chunks[index] = (kind, mutated_bytes(rng, data))
    elif way == 2:
        chunks.insert(index, chunks[rng.randrange(len(chunks))])
    elif way == 3:
        del chunks[index]
    elif way == 4:
        bomb = zlib.compress(b"\0" * rng.choice((10**5, 10**8)))
        chunks.insert(
            rng.choice((1, index)),
            rng.choice(((b"zTXt", b"a\0\0" + bomb), (b"iCCP", b"a\0\0" + bomb), (b"iTXt", b"a\0\1\0\0\0" + bomb))),
        )
    else:
        other = rng.choice((b"tRNS", b"PLTE", b"eXIf", b"acTL", b"fcTL", b"gAMA", b"pHYs", b"xxxx"))
        chunks.insert(rng.randrange(1, len(chunks) + 1), (other, rng.randbytes(rng.choice((0, 1, 3, 6, 256, 768)))))
    parts = [content[:8]]
    for kind, data in chunks:
        parts.append(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", binascii.crc32(kind + data)))
    return b"".join(parts)
