"""Runs of `--method exact`, and the loop of plain PyTorch that they must equal."""

import json
import shutil

import torch
from safetensors.numpy import load_file
from support.separate_memory import SeparateMemory

import edgeblocks
from edgeblocks.offload.sections import init_section_, network_of, whole_name
from edgeblocks.offload.tiers import DiskTier, HostTier, SwapFile
from edgeblocks.optim.schedule import learning_rate_at
from edgeblocks.optim.update import BETA1, BETA2, EPS
from edgeblocks.progress import Silent
from edgeblocks.runs.open_data import data_of
from edgeblocks.seeds import generator_at

IMAGES = {"family": "dit", "data": "digits", "width": 32, "heads": 2, "depth": 6, "batch": 16, "micro_batch": 8}


TEXT = {"family": "mdlm", "data": "moby-dick", "width": 32, "heads": 2, "depth": 6, "batch": 4, "micro_batch": 2}


KINDS = {"dit": {**IMAGES, "hold_out": 0.005}, "mdlm": {**TEXT, "length": 16, "hold_out": 0.00005}}


KINDS |= {"vit": {**KINDS["dit"], "family": "vit"}, "ar": {**KINDS["mdlm"], "family": "ar", "depth": 4}}


SLOTS = {"dit": (1, 2, 3), "mdlm": (1,), "vit": (2,), "ar": (3,)}
"""Of four stages: every number is tried with one family and every family with one, as what holds them knows none."""


EXACT = {"method": "exact", "sample_grids": 0, "mem_budget": "4GB", "steps": 20, "warmup": 5}


def trained(kind, out, listener=None, **settings):
    return edgeblocks.train(out=out, listener=listener or Silent(), **{**KINDS[kind], **EXACT, **settings})


def plain_training(run, steps):
    """The loop as users write it, on the run's draws: the network's parameters by name, and the losses."""
    directory = run.directory
    told, family, sections = directory.settings.run, directory.family(), directory.sections
    network = family.block(num_layers=family.num_layers, checkpointing=False)
    network.reset_tables_()
    named = dict(network.named_parameters())
    for stage, section in enumerate(sections):
        with torch.device("meta"):
            names = [name for name, _ in network_of(family, section).named_parameters()]
        own = [(name, named[whole_name(name, directory.file_layers, stage)].data) for name in names]
        init_section_(family, section, own, generator_at(told.seed, "init", stage))
        for name, _ in own if not directory.trained[stage] else ():
            named[whole_name(name, directory.file_layers, stage)].requires_grad_(False)
    if told.init is not None:
        for name, value in load_file(told.init).items():
            named[name].data.copy_(torch.from_numpy(value))
    learning = [parameter for parameter in named.values() if parameter.requires_grad]
    vectors = [parameter for parameter in learning if parameter.ndim < 2]
    matrices = [parameter for parameter in learning if parameter.ndim >= 2]
    groups = [{"params": matrices, "weight_decay": told.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(BETA1, BETA2), eps=EPS, fused=True)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(told.precision)
    scaler = torch.amp.GradScaler("cpu", enabled=told.precision == "fp16")
    data = data_of(told, lambda *_: None)
    order, losses = data.order(batch=told.batch, seed=told.seed, block=0), []
    for step in range(steps):
        examples, labels = data.gather(order.indices(step))
        noise = directory.partition.ranges[0]
        batch = family.draw(examples, labels, noise, generator_at(told.seed, "train", 0, step))
        optimizer.zero_grad(set_to_none=False)
        losses.append(0.0)
        for start in range(0, told.batch, told.micro_batch):
            part = {name: tensor[start : start + told.micro_batch] for name, tensor in batch.items()}
            with torch.autocast("cpu", dtype=half, enabled=half is not None):
                loss = family.loss(network, part).sum() / told.batch
            scaler.scale(loss).backward()
            losses[-1] += loss.item()
        scaler.unscale_(optimizer)
        if told.clip_by == "network":
            torch.nn.utils.clip_grad_norm_(named.values(), told.clip)
        rate = learning_rate_at(step, steps=told.steps, warmup=told.warmup, peak=told.learning_rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        scaler.step(optimizer)
        scaler.update()
    return named, losses


def whole_weights(run):
    found = {}
    for stage in range(len(run.directory.file_layers)):
        path = run.path / "blocks" / f"block_{stage:03d}.safetensors"
        for name, value in load_file(path).items():
            if name.startswith("weights."):
                found[whole_name(name.removeprefix("weights."), run.directory.file_layers, stage)] = value
    return found


def with_slots(begun, run, slots):
    """A copy of a run that has begun, with so many stages in memory; it looks at its quality as `run` does."""
    out = shutil.copytree(begun, begun.with_name(f"{slots} slots"))
    plan = json.loads((out / "plan.json").read_text())
    del plan["sha256"]
    looks = run.directory.plan.look_micro_batch
    (out / "plan.json").write_text(json.dumps({**plan, "slots": slots, "look_micro_batch": looks}))
    return out


def waiting_in(folder, store, ram_stages=None, device=None):
    """Stages of a store that wait on disk; or, where so many wait in a host's memory, beside a device."""
    swap = SwapFile(folder, store.layouts)
    if ram_stages is None:
        return DiskTier(store, swap=swap)
    return HostTier(store, device or SeparateMemory(), swap=swap, ram_blocks=ram_stages)
