"""Kill a tiny run at random instants, go on with it each time, and compare the finished weights bit for bit.

    python tests/bench/kill_campaign.py --kills 200 --seed 0

Prints how many kills hit each phase, and how many runs came to their end in between. Ends with an error where a run
did not go on, was damaged, or ended with other bits than an undisturbed one.
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.killing import Campaign


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        campaign = Campaign(Path(folder), arguments.seed)
        report = campaign.run(arguments.kills)
        deadline = time.monotonic() + 60
        while campaign.orphans() and time.monotonic() < deadline:
            time.sleep(0.5)
        orphans = campaign.orphans()
    threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
    print(f"{arguments.kills} x SIGKILL, seed {arguments.seed}, Python {platform.python_version()}, {threads} threads")
    print(report.table())
    if orphans:
        sys.exit(f"processes of killed runs are still there after a minute: {orphans}")


if __name__ == "__main__":
    main()
