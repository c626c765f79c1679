"""Fine-tuning of a pretrained model beside transformers and peft: peak memory, time of a step, losses.

    OMP_NUM_THREADS=1 python tests/bench/tuning.py MODEL chat.jsonl --length 256 --batch 4
    OMP_NUM_THREADS=1 python tests/bench/tuning.py MODEL chat.jsonl --ours full:1GB lora,quantize=nf4:900MB --plain

Every training has a process of its own and makes two steps on the same windows; the peak is its largest resident set,
interpreter and libraries included. `--ours` names trainings of edgeblocks: --tune, settings, and after a colon the
budget. `--plain` names those of transformers and peft, as their own loops do it; all where it is left out. A table in
Markdown.

The second step is timed, by the processor's time of all threads. As machines differ and others use them, it is also
told in units: one is a product of float32 matrices [1024, 576] and [576, 1536], 1.8 GFLOP, timed before and after the
step. With one thread units are comparable from machine to machine; precisions that have instructions of their own are
not.
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
import yaml

import edgeblocks
from edgeblocks.progress import Progress, Silent
from edgeblocks.runs.open_data import data_of
from edgeblocks.settings.fields import RunSettings
from edgeblocks.tuning import tuning_settings

STEPS = 2
LORA = ("peft LoRA", "peft LoRA, checkpointing", "peft LoRA, bf16, checkpointing")
PLAIN = (
    "transformers",
    "transformers, checkpointing",
    "transformers, checkpointing, 8-bit AdamW",
    *LORA,
)
OURS = ("full:1GB", "full,optimizer=adamw,train_embeddings=true,weight_decay=0.01:2GB", "lora:900MB")
RATES = {"full": 2e-5, "lora": 2e-4}
RANK = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--ours", nargs="*", default=OURS)
    parser.add_argument("--plain", nargs="*", default=PLAIN)
    parser.add_argument("--arm", help="one of them, in this process")
    wanted = parser.parse_args()
    given = {"data": wanted.data, "length": wanted.length, "batch": wanted.batch, "steps": STEPS, "warmup": 0}
    if wanted.arm is not None:
        print(json.dumps(measured(wanted.arm, wanted.model, given)))
        return
    print("| | peak | a step | units | losses |\n|---|---|---|---|---|")
    for arm in (*wanted.plain, *wanted.ours):
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--arm", arm], check=True, capture_output=True)
        found = json.loads(done.stdout.splitlines()[-1])
        name = arm if arm in PLAIN else "edgeblocks --tune {} --mem-budget {}".format(*arm.rsplit(":", 1))
        losses = ", ".join(f"{loss:.4f}" for loss in found["losses"])
        peak, seconds, units = f"{found['peak'] / 1e6:,.0f} MB", f"{found['step_s']:.1f} s", f"{found['units']:.0f}"
        print(f"| {name} | {peak} | {seconds} | {units} | {losses} |", flush=True)


def measured(arm: str, model: str, given: dict[str, Any]) -> dict[str, Any]:
    """Peak in bytes, the second step's seconds and units, and losses."""
    losses, clock = plain(arm, model, given) if arm in PLAIN else ours(arm, model, given)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"losses": losses, "step_s": clock.seconds[1], "units": clock.units(1), "peak": peak}


class Clock:
    """The processor's time of steps, and of a known product around each."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._products = [self._product_s()]
        self._began = time.process_time()

    def step_ends(self) -> None:
        self.seconds.append(time.process_time() - self._began)
        self._products.append(self._product_s())
        self._began = time.process_time()

    def units(self, step: int) -> float:
        return self.seconds[step] / ((self._products[step] + self._products[step + 1]) / 2)

    @staticmethod
    def _product_s(rounds: int = 12) -> float:
        left, right = torch.ones(1024, 576), torch.ones(576, 1536)
        began = time.process_time()
        for _ in range(rounds):
            left @ right
        return (time.process_time() - began) / rounds


def plain(arm: str, model: str, given: dict[str, Any]) -> tuple[list[float], Clock]:
    """The loop as users of transformers write it."""
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if "bf16" in arm else torch.float32
    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).train()
    if arm in LORA:
        import peft

        network = peft.get_peft_model(
            network,
            peft.LoraConfig(
                r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )
    if "checkpointing" in arm:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if arm in LORA:
            network.enable_input_require_grads()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    how: dict[str, Any] = {"lr": RATES["lora" if arm in LORA else "full"], "weight_decay": 0.0}
    if "8-bit" in arm:
        import bitsandbytes

        optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(trained, **how)
    else:
        optimizer = torch.optim.AdamW(trained, fused=True, **how)
    asked = {name: value for name, value in tuning_settings(model, given).items() if name in RunSettings.model_fields}
    data = data_of(RunSettings.model_validate(asked), lambda *_: None)
    order, losses, clock = data.order(batch=given["batch"], seed=0, block=0), [], Clock()
    for step in range(STEPS):
        tokens, counts = data.gather(order.indices(step))
        labels = tokens if counts is None else np.where(counts, tokens, -100)
        loss = network(input_ids=torch.from_numpy(tokens), labels=torch.from_numpy(labels), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        clock.step_ends()
    return losses, clock


class Timed(Silent):
    """Times steps; the first one begins with the training."""

    def __init__(self) -> None:
        self.clock = Clock()

    def step(self, progress: Progress) -> None:
        self.clock.step_ends()


def ours(arm: str, model: str, given: dict[str, Any]) -> tuple[list[float], Clock]:
    """A run of its own, which is evaluated before and after as well."""
    timed, (how, budget) = Timed(), arm.rsplit(":", 1)
    tune, *settings = how.split(",")
    own = {name: yaml.safe_load(value) for name, value in (setting.split("=") for setting in settings)}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        run = edgeblocks.finetune(model, out=out, mem_budget=budget, listener=timed, tune=tune, **given, **own)
        losses = [record["loss"] for record in run.directory.metrics()]
    return losses, timed.clock


if __name__ == "__main__":
    main()
