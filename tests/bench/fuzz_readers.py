"""Mutated inputs to everything that reads a file, 10,000 to each reader, as a table (Markdown).

python tests/bench/fuzz_readers.py [--cases 10000] [--seed 0] [READER ..]

Ends with 1 when a case failed, and shows the failures with the numbers under which they are found again.
"""

import argparse
import importlib.util
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.fuzzing import MEMORY_BYTES, READERS, TIMEOUT_S, failure_kinds, fuzz


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"of: {', '.join(READERS)}")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(f"Each case may take {TIMEOUT_S:.0f} s and {MEMORY_BYTES / 2**20:.0f} MiB. Seed {given.seed}.\n")
    print("| reader | cases | accepted | refused | failed | peak MB (case) | slowest s (case) | all s |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    failed = []
    for reader in given.readers or READERS:
        needs = READERS[reader].needs
        if needs is not None and importlib.util.find_spec(needs) is None:
            print(f"| {reader} | none: {needs} is not installed |", flush=True)
            continue
        started = time.perf_counter()
        report = fuzz(reader, given.cases, given.seed)
        print(
            f"| {reader} | {report.cases} | {report.accepted} | {report.refused} | {len(report.failures)} "
            f"| {report.peak_bytes / 1e6:.0f} ({report.peak_case}) | {report.slowest_s:.2f} ({report.slowest_case}) "
            f"| {time.perf_counter() - started:.0f} |",
            flush=True,
        )
        if report.failures:
            failed.append(report)
    for report in failed:
        print(f"\n{report.reader}:")
        for (kind, where), count in failure_kinds(report).most_common():
            cases = [case for case, found, detail in report.failures if found == kind and where in detail]
            print(f"  {count} x {kind}: {where} (cases {', '.join(map(str, cases[:5]))})")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
