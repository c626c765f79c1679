"""Fine-tuning all layers of a pretrained model beside transformers: peak memory, time of a step, losses.

    python tests/bench/tuning.py MODEL chat.jsonl --length 256 --batch 4 --budgets 800MB 1200MB lora:900MB

Every training has a process of its own and makes two steps on the same windows, of which the second one is timed; the
peak is its largest resident set, interpreter and libraries included. `lora:` before a budget is --tune lora.
transformers trains the layers and the rest as its own loop does, in float32: with torch's AdamW, and with gradient
checkpointing and bitsandbytes' AdamW8bit.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import edgeblocks
from edgeblocks.api import tuning_settings
from edgeblocks.progress import Progress, Silent
from edgeblocks.runs.open_data import data_of
from edgeblocks.settings.fields import RunSettings

STEPS = 2
PLAIN = ("transformers", "transformers, checkpointing, 8-bit AdamW")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--budgets", nargs="+", default=["1GB"])
    parser.add_argument("--arm", help="one of them, in this process")
    wanted = parser.parse_args()
    given = {"data": wanted.data, "length": wanted.length, "batch": wanted.batch, "steps": STEPS, "warmup": 0}
    if wanted.arm is not None:
        print(json.dumps(measured(wanted.arm, wanted.model, given)))
        return
    print("| | peak | a step | losses |\n|---|---|---|---|")
    for arm in (*PLAIN, *wanted.budgets):
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--arm", arm], check=True, capture_output=True)
        found = json.loads(done.stdout.splitlines()[-1])
        tune, _, budget = arm.rpartition(":")
        name = arm if arm in PLAIN else f"edgeblocks --tune {tune or 'full'} --mem-budget {budget}"
        losses = ", ".join(f"{loss:.4f}" for loss in found["losses"])
        print(f"| {name} | {found['peak'] / 1e6:,.0f} MB | {found['step_s']:.1f} s | {losses} |", flush=True)


def measured(arm: str, model: str, given: dict[str, Any]) -> dict[str, Any]:
    """Peak in bytes, seconds of the second step, and losses."""
    losses, step_s = plain(arm, model, given) if arm in PLAIN else ours(arm, model, given)
    return {"losses": losses, "step_s": step_s, "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def plain(arm: str, model: str, given: dict[str, Any]) -> tuple[list[float], float]:
    """The loop as users of transformers write it."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    how: dict[str, Any] = {"lr": 2e-5, "weight_decay": 0.0}
    if arm == PLAIN[0]:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(network.parameters(), fused=True, **how)
    else:
        import bitsandbytes

        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer = bitsandbytes.optim.AdamW8bit(network.parameters(), **how)
    asked = {name: value for name, value in tuning_settings(model, given).items() if name in RunSettings.model_fields}
    data = data_of(RunSettings.model_validate(asked), lambda *_: None)
    order, losses, took = data.order(batch=given["batch"], seed=0, block=0), [], 0.0
    for step in range(STEPS):
        started = time.perf_counter()
        tokens, counts = data.gather(order.indices(step))
        labels = tokens if counts is None else np.where(counts, tokens, -100)
        loss = network(input_ids=torch.from_numpy(tokens), labels=torch.from_numpy(labels), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        took = time.perf_counter() - started
    return losses, took


class Timed(Silent):
    """Notes when steps end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def step(self, progress: Progress) -> None:
        self.ends.append(time.perf_counter())


def ours(arm: str, model: str, given: dict[str, Any]) -> tuple[list[float], float]:
    """A run of its own, which is evaluated before and after as well."""
    timed, (tune, _, budget) = Timed(), arm.rpartition(":")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        run = edgeblocks.finetune(model, out=out, mem_budget=budget, listener=timed, tune=tune or "full", **given)
        losses = [record["loss"] for record in run.directory.metrics()]
    return losses, timed.ends[1] - timed.ends[0]


if __name__ == "__main__":
    main()
