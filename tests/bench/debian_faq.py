"""Debian's list of questions and answers as conversations, for a fine-tuning that everybody can repeat.

apt-get install debian-faq
python tests/bench/debian_faq.py faq.jsonl
edgeblocks finetune MODEL --data faq.jsonl --mem-budget 1GB

Each question is one user's message and its answer the assistant's. The text is that of the package, GPL-2+.
"""

import html
import json
import re
import sys
from pathlib import Path

FOLDER = Path("/usr/share/doc/debian/FAQ")
_SECTION = re.compile(
    r'<h[23] class="title">(.*?)</h[23]>(.*?)(?=<h[23] class="title">|<div class="navfooter">)', re.DOTALL
)


def main() -> None:
    out = Path(sys.argv[1])
    with out.open("w", encoding="utf-8") as file:
        for path in sorted(FOLDER.glob("*.en.html")):
            for question, answer in conversations(path.read_text(encoding="utf-8")):
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def conversations(page: str) -> list[tuple[str, str]]:
    """(question, answer) of each section of a page whose title asks something."""
    found = []
    for title, body in _SECTION.findall(page):
        question, answer = re.sub(r"^[\d.]+\s*", "", _text(title)), _text(body)
        if question.endswith("?") and len(answer) > 20:
            found.append((question, answer))
    return found


def _text(marked: str) -> str:
    without = re.sub(r"<(script|style).*?</\1>|<[^>]*>", " ", marked, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(without)).strip()


if __name__ == "__main__":
    main()
