"""The README and the pages of docs/: their code blocks by their markers, their commands and their links."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = {
    path: path.read_text(encoding="utf-8")
    for path in (*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *ROOT.glob("docs/*.md"))
}
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def page(name):
    return PAGES[ROOT / name]


def code_after(marker):
    """The code block that follows an HTML comment on one of the pages."""
    pattern = re.compile(rf"<!-- {re.escape(marker)} -->\n```\w*\n(.*?)```", re.DOTALL)
    found = [block[1] for text in PAGES.values() for block in pattern.finditer(text)]
    assert len(found) == 1, f"{len(found)} blocks of the README and of docs/ are marked {marker}"
    return found[0]


def blocks_in_order(name):
    """(language, code) of a page's blocks of commands and of Python, without those that CI runs as they stand."""
    text = re.sub(r"<!-- ci: [\w-]+ -->\n```.*?^```", "", page(name), flags=re.MULTILINE | re.DOTALL)
    return [(language, code) for language, code in _FENCED.findall(text) if language in ("bash", "python")]


def command_words(code):
    """The words after `edgeblocks` of each command of a block."""
    lines = (line.partition(" #")[0] for line in code.splitlines())
    parts = (part.strip() for line in lines for part in line.split("&&"))
    return [shlex.split(part)[1:] for part in parts if part.startswith("edgeblocks ")]


def commands():
    """(page, verb, words) of every `edgeblocks VERB ..` in a block of commands or in running text."""
    for path, text in PAGES.items():
        blocks = [block for language, block in _FENCED.findall(text) if language in ("", "bash")]
        lines = [line.partition(" #")[0] for block in blocks for line in block.splitlines()]
        lines += re.findall(r"`(edgeblocks [^`]+)`", _FENCED.sub("", text))
        for line in lines:
            for part in line.split("&&"):
                found = re.match(r" *(?:\$ |\.venv/bin/)?edgeblocks ([a-z]+)(?: |$)(.*)", part)
                if found:
                    yield path.name, found[1], shlex.split(found[2])


def links():
    """(page, target) of every link and picture that is a file of this project."""
    for path, text in PAGES.items():
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)", _FENCED.sub("", text)):
            yield path, target


def rows(name, heading):
    """The cells of the table below a heading of a page, without its first two lines."""
    below = page(name).split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in below.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
