"""Predicted against measured peak resident set of short training runs, each in its own process.

    python tests/bench/predicted_peak.py

Measured from a small parent process with getrusage, which is what `/usr/bin/time -v` reports.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

LAUNCHER = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
peak = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps({"code": done.returncode, "err": done.stderr, "peak": peak}))
"""
CONFIGURATIONS = (
    {"batch": 64, "width": 128, "checkpointing": "false"},
    {"batch": 64, "width": 128, "checkpointing": "true"},
    {"batch": 128, "width": 128, "tier": "disk"},
    {"batch": 64, "width": 128, "patch": 1, "checkpointing": "true"},
    {"batch": 64, "width": 128, "patch": 1, "checkpointing": "false"},
    {"batch": 32, "width": 192, "image_size": 16, "checkpointing": "true"},
    {"batch": 32, "width": 192, "image_size": 16, "checkpointing": "false"},
    {"batch": 32, "width": 256, "image_size": 32, "depth": 6, "checkpointing": "true"},
    {"batch": 16, "width": 384, "image_size": 32, "patch": 4, "tier": "disk"},
    {"batch": 4, "width": 512, "heads": 8, "tier": "disk"},
    {"batch": 32, "width": 384, "heads": 6, "image_size": 32, "blocks": 4, "tier": "disk", "checkpointing": "true"},
    {"batch": 32, "width": 384, "heads": 6, "image_size": 32, "blocks": 4, "tier": "disk", "checkpointing": "false"},
)


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="edgeblocks-bench-"))
    for number, configuration in enumerate(CONFIGURATIONS):
        run = folder / str(number)
        settings = [word for key, value in configuration.items() for word in ("--set", f"{key}={value}")]
        command = [str(Path(sys.executable).with_name("edgeblocks")), "train", *settings, "--steps", "2"]
        command += ["--mem-budget", "12GB", "--out", str(run), "--json"]
        launched = [sys.executable, "-c", LAUNCHER, *command]
        result = json.loads(subprocess.run(launched, check=True, capture_output=True, text=True).stdout)
        if result["code"]:
            raise SystemExit(result["err"])
        plan = json.loads((run / "plan.json").read_text())
        predicted = plan["predicted_peak_bytes"]
        print(
            f"{configuration}: predicted {predicted / 1e6:.0f} MB, measured {result['peak'] / 1e6:.0f} MB "
            f"({result['peak'] / predicted - 1:+.1%}); activations {plan['breakdown']['activations'] / 1e6:.0f}, "
            f"slack {plan['breakdown']['slack'] / 1e6:.0f}",
            flush=True,
        )
        shutil.rmtree(run)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
