"""Validation denoising loss of B=3 against B=1 at equal layer evaluations, on an .npz of images.

    python tests/bench/fashion_mnist.py fashion.npz
    python tests/bench/quality_blocks.py fashion.npz --steps 1500 --seeds 0 1

Every block makes `--steps` steps, so that the layer evaluations are those of `--steps` end-to-end steps, which is what
B=1 is. Both are evaluated on the same noised hold-out images at 24 noise levels with EMA weights.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import edgeblocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--depth", type=int, default=6)
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        totals = {}
        for blocks in arguments.blocks:
            folder = Path(tempfile.mkdtemp(prefix="edgeblocks-bench-"))
            run = edgeblocks.train(
                out=folder / "run",
                data=arguments.data,
                mem_budget="4GB",
                steps=arguments.steps,
                batch=64,
                seed=seed,
                blocks=blocks,
                depth=arguments.depth,
                width=arguments.width,
                heads=4,
                patch=4,
                sample_grids=0,
            )
            assert run.summary is not None
            metrics = run.summary["metrics"]
            totals[blocks] = metrics["validation_loss"]
            result = {
                "seed": seed,
                "blocks": blocks,
                "validation_loss": metrics["validation_loss"],
                "standard_error": metrics["validation"]["standard_error"],
                "levels": [round(level["loss"], 4) for level in metrics["validation"]["levels"]],
                "seconds": round(run.summary["seconds"]),
                "step_s": run.summary["step_s"],
            }
            print(json.dumps(result), flush=True)
            shutil.rmtree(folder)
        if {1, 3} <= totals.keys():
            print(f"seed {seed}: B=3 is {totals[3] / totals[1] - 1:+.2%} against B=1", flush=True)


if __name__ == "__main__":
    main()
