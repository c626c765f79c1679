"""Fuzzing of everything that reads a file: mutated inputs go in, and an error of ours or a sound value must come out.

Each case is made from (seed, reader, number) alone, so a failure is found again with

    cd tests && python -m support.fuzzing READER --first NUMBER --cases 1 --seed SEED

The cases of a reader run in a process of their own whose data segment may grow by 600 MB and no more, so that memory
which an input talked the reader into is an error here. A timer ends a case that takes too long; where no Python code
runs that could hear it, the watching parent does, as it notices a process that died of a signal.
"""

import argparse
import contextlib
import json
import mmap
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fuzz.readers import READERS
from fuzz.readers.reader import Reader

from edgeblocks.errors import ConfigError, EdgeblocksError

TESTS = Path(__file__).parents[1]

MEMORY_BYTES = 600 * 2**20
TIMEOUT_S = 20.0
LONGEST_MESSAGE = 100_000


@dataclass
class Report:
    """What became of a reader's cases."""

    reader: str
    cases: int = 0
    accepted: int = 0
    refused: int = 0
    failures: list = field(default_factory=list)
    """(number of the case, kind, what was raised)"""
    peak_bytes: int = 0
    """The most that the reading of one case added to the resident set."""
    peak_case: int = -1
    slowest_s: float = 0.0
    slowest_case: int = -1
    seconds: float = 0.0


class HangError(BaseException):
    """A case took too long. Not an Exception, so that no reader takes it for damage."""


class FaultyReader(Reader):
    """Does in each case what no reader may do, so that a test can see that it is noticed."""

    number = 0

    def prepare(self, _rng):
        pass

    def __init__(self, _folder):
        pass

    def read(self):
        if self.number == 1:
            raise ConfigError("a refusal that says why")
        if self.number == 2:
            raise KeyError("slots")
        if self.number == 3:
            bytearray(2 * MEMORY_BYTES)
        if self.number == 4:
            while True:
                pass
        if self.number == 5:
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.number == 6:
            raise ConfigError("x" * LONGEST_MESSAGE)


def run_cases(name, folder, first, cases, seed, timeout_s, progress):
    """Run cases in this process; print failures and a report as JSON lines."""
    os.environ["EDGEBLOCKS_CACHE"] = str(folder / "digits")
    reader = {**READERS, "faulty": FaultyReader}[name](folder)
    reader.prepare_sound()
    reader.read()  # what is sound is accepted
    report = Report(reader=name, cases=cases)
    limit = _status_bytes("VmData") + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    signal.signal(signal.SIGALRM, _hang)
    for number in range(first, first + cases):
        progress[:8] = number.to_bytes(8, "little")
        reader.number = number
        reader.prepare(random.Random(f"{seed}/{name}/{number}"))
        _read_case(reader, number, timeout_s, report)
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(json.dumps({"report": asdict(report)}), flush=True)


def _read_case(reader, number, timeout_s, report):
    with contextlib.suppress(OSError):  # from now on the peak is this case's own, where the system allows it
        Path("/proc/self/clear_refs").write_text("5")
    start_bytes = _status_bytes("VmRSS")
    started = time.perf_counter()
    failure = None
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        reader.read()
        report.accepted += 1
    except EdgeblocksError as error:
        report.refused += 1
        if not 10 < len(str(error)) < LONGEST_MESSAGE:
            failure = ("message", f"{len(str(error))} characters: {str(error)[:200]}")
    except HangError:
        failure = ("hang", traceback.format_exc(limit=-8))
    except BaseException as error:
        failure = (type(error).__name__, traceback.format_exc(limit=-8))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds = time.perf_counter() - started
    grown = _status_bytes("VmHWM") - start_bytes
    if seconds > report.slowest_s:
        report.slowest_s, report.slowest_case = seconds, number
    if grown > report.peak_bytes:
        report.peak_bytes, report.peak_case = grown, number
    report.seconds += seconds
    if failure is not None:
        print(json.dumps({"failure": [number, *failure]}), flush=True)


def _hang(_number, _frame):
    raise HangError


def _status_bytes(name):
    with open("/proc/self/status", encoding="ascii") as status:  # noqa: PTH123 - quick, for it is read in every case
        for line in status:
            if line.startswith(name):
                return 1024 * int(line.split()[1])
    raise AssertionError(name)


def fuzz(name, cases, seed=0, *, timeout_s=TIMEOUT_S):
    """A reader's report, from a process of its own; one that crashes is started again behind the case."""
    total, first = Report(reader=name), 0
    while first < cases:
        reached, done = _watch(name, first, cases - first, seed, timeout_s, total)
        if done:
            break
        total.cases += reached - first + 1
        first = reached + 1
    return total


def _roomy_folder():
    """A temporary folder, in memory where there is one: a case writes and deletes a few files."""
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(prefix="fuzz", dir=memory if memory.is_dir() else None)


def _watch(name, first, cases, seed, timeout_s, total):
    """Run one process to its end; the number of the case it reached, and whether all were made."""
    with _roomy_folder() as folder, tempfile.NamedTemporaryFile() as shared, tempfile.TemporaryFile("w+") as output:
        shared.write(b"\0" * 8)
        shared.flush()
        progress = mmap.mmap(shared.fileno(), 8)
        given = {"first": first, "cases": cases, "seed": seed, "timeout": timeout_s}
        given |= {"progress": shared.name, "folder": folder}
        options = [f"--{option}={value}" for option, value in given.items()]
        child = subprocess.Popen([sys.executable, "-m", "support.fuzzing", name, *options], stdout=output, cwd=TESTS)
        reached, since = -1, time.monotonic()
        while child.poll() is None:
            time.sleep(0.1)
            number = int.from_bytes(progress[:8], "little")
            if number != reached:
                reached, since = number, time.monotonic()
            elif time.monotonic() - since > 3 * TIMEOUT_S + timeout_s:
                child.kill()
        reached = max(first, int.from_bytes(progress[:8], "little"))
        output.seek(0)
        lines = [json.loads(line) for line in output]
    assert child.returncode <= 0, f"{name}: the process that runs the cases failed; its traceback is above"
    total.failures += [line["failure"] for line in lines if "failure" in line]
    report = next((line["report"] for line in lines if "report" in line), None)
    if report is None:
        total.failures.append([reached, "crash or hang", f"the process ended with {child.returncode}"])
        return reached, False
    total.cases += report["cases"]
    total.accepted += report["accepted"]
    total.refused += report["refused"]
    total.seconds += report["seconds"]
    for peak, case in (("peak_bytes", "peak_case"), ("slowest_s", "slowest_case")):
        if report[peak] > getattr(total, peak):
            setattr(total, peak, report[peak])
            setattr(total, case, report[case])
    return reached, True


def failure_kinds(report):
    """How often each kind of failure came, and where from."""
    return Counter((kind, detail.strip().splitlines()[-1][:160]) for _, kind, detail in report.failures)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=[*READERS, "faulty"])
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--cases", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S)
    parser.add_argument("--progress", type=Path, help="a file of 8 bytes that holds the number of the case")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    progress = bytearray(8)
    if given.progress:
        with given.progress.open("r+b") as file:
            progress = mmap.mmap(file.fileno(), 8)
    with contextlib.nullcontext(given.folder) if given.folder else _roomy_folder() as folder:
        run_cases(given.reader, Path(folder), given.first, given.cases, given.seed, given.timeout, progress)


if __name__ == "__main__":
    main()
