"""The page of a network in Chromium: time to the first result, size, memory, and pictures of it.

    edgeblocks export digits-run --web site
    python tests/bench/web_page.py site --shots shots
    python tests/bench/web_page.py site --rounds 5

A page is opened from Python's static server with an empty cache, in a browser of its own each round. The first pictures
are the page's own: each class once with guidance 2, or nine, with the levels of the manifest. The network may be
untrained: it takes as long. --shots writes what it looks like 1200 and 390 pixels wide, light and dark.
"""

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.browser import Page, browser, served

MADE = "document.querySelector('#save') && !document.querySelector('#save').disabled"
READY = "document.querySelector('#app form')"
SIZES = {1200: 900, 390: 844}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shots", type=Path)
    wanted = parser.parse_args()
    with served(wanted.site) as address:
        rounds = [measured(address) for _ in range(wanted.rounds)]
        if wanted.shots:
            wanted.shots.mkdir(parents=True, exist_ok=True)
            shots(address, wanted.shots)
    sizes = {path: path.stat().st_size for path in wanted.site.rglob("*") if path.is_file()}
    graphs = sum(size for path, size in sizes.items() if path.suffix == ".onnx")
    print("| page MB | of them graphs MB | ready s | first pictures s | the same again s | peak of the tab MB |")
    print("|---|---|---|---|---|---|")
    medians = [statistics.median(column) for column in zip(*rounds, strict=True)]
    times = [f"{wall:.1f} / {processor:.1f}" for wall, processor in zip(medians[0:6:2], medians[1:6:2], strict=True)]
    cells = [f"{sum(sizes.values()) / 1e6:.1f}", f"{graphs / 1e6:.1f}", *times, f"{medians[6]:.0f}"]
    print(f"| {' | '.join(cells)} |")


def measured(address: str) -> list[float]:
    """Until the network is loaded, until its first pictures, of the second ones: seconds and those of processors; and
    the tab's peak in MB."""
    with browser() as page:
        page.look(width=1200, height=900)
        began, used = time.perf_counter(), processor_s(page)
        page.open(address)
        found = []
        for condition in (READY, MADE):
            page.wait(condition, at_most_s=600)
            found += [time.perf_counter() - began, processor_s(page) - used]
        began, used = time.perf_counter(), processor_s(page)
        page.value("document.querySelector('form').requestSubmit()")
        page.wait(MADE, at_most_s=600)
        return [*found, time.perf_counter() - began, processor_s(page) - used, peak_mb(page)]


def processes(page: Page) -> Iterator[tuple[Path, bytes]]:
    """Those of the browser: where the system tells of them, and their command lines."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            command = (folder / "cmdline").read_bytes()
            if page.profile.encode() in command:
                yield folder, command


def processor_s(page: Page) -> float:
    """What all of the browser has used: on a machine where others work it says more than a clock."""
    ticks = 0
    for folder, _ in processes(page):
        with contextlib.suppress(OSError):
            ticks += sum(map(int, (folder / "stat").read_text().rpartition(")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def peak_mb(page: Page) -> float:
    """Of the largest process that draws a page, which is the tab's."""
    peaks = [0]
    for folder, command in processes(page):
        if b"--type=renderer" in command:
            lines = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines() if ":" in line)
            peaks.append(int(lines["VmHWM"].split()[0]))
    return max(peaks) * 1024 / 1e6


def shots(address: str, folder: Path) -> None:
    """The page with its first pictures."""
    with browser() as page:
        page.look(width=1200, height=900)
        page.open(address)
        page.wait(MADE, at_most_s=600)
        for width, height in SIZES.items():
            for dark in (False, True):
                page.look(width=width, height=height, dark=dark)
                page.value(f"document.querySelector('.more').open = {str(width > 800).lower()}")
                time.sleep(0.5)  # until it is painted
                page.screenshot(folder / f"{width}-{'dark' if dark else 'light'}.png")


if __name__ == "__main__":
    main()
