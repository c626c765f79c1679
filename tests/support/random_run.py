"""Runs with random weights, made in a moment: what is tested with them does not depend on training."""

import numpy as np
import torch

from edgeblocks.data.images import open_images
from edgeblocks.data.text import open_text
from edgeblocks.inference.ema_loader import EmaLoader
from edgeblocks.offload.block_buffer import BlockBuffer
from edgeblocks.registry import family_type
from edgeblocks.run import Run
from edgeblocks.runs.create import create_run, seal_run
from edgeblocks.runs.written_plan import WrittenPlan
from edgeblocks.settings.reading import resolve_settings


def make_run(path, *, layers, step=1, **settings):
    """A run with blocks of `layers` layers, whose weights and EMA weights are random and differ."""
    resolved = resolve_settings(
        {"steps": 1, "depth": sum(layers), **settings},
        family_settings=lambda name: family_type(name).settings_type,
    )
    wanted = resolved.run
    images = open_images(
        wanted.data, image_size=None, hold_out=wanted.hold_out, seed=wanted.seed, cache_dir=path.parent / "cache"
    )
    return _filled(path, resolved, images, layers, step)


def make_text_run(path, *, layers, step=1, **settings):
    """The same for a family that reads text."""
    resolved = resolve_settings(
        {"family": "mdlm", "steps": 1, "depth": sum(layers), **settings},
        family_settings=lambda name: family_type(name).settings_type,
    )
    wanted = resolved.run
    text = open_text(
        wanted.data,
        tokenizer=wanted.tokenizer,
        vocabulary=wanted.vocab,
        length=wanted.length,
        hold_out=wanted.hold_out,
        cache_dir=path.parent / "cache",
    )
    return _filled(path, resolved, text, layers, step, tokenizer=text.tokenizer)


def _filled(path, resolved, data, layers, step, **given):
    plan = WrittenPlan(layers_per_block=list(layers), micro_batch=4, slots=1, budget_bytes=10**9)
    run = create_run(
        path,
        resolved,
        plan,
        family_type(resolved.run.family).data_info(data),
        data_source=data.source,
        data_fingerprint=data.fingerprint,
        class_names=data.class_names,
        **given,
    )
    store, generator = run.store(), torch.Generator().manual_seed(0)
    buffer = BlockBuffer(max(store.layouts, key=lambda layout: layout.num_bytes))
    for block in range(len(layers)):
        buffer.adopt_(store.layouts[block])
        buffer.part_bytes("optimizer").zero_()
        for part in ("weights", "ema"):
            for _, tensor in buffer.tensors(part):
                scale = tensor.shape[-1] ** -0.5 if tensor.ndim == 2 else 0.1
                tensor.normal_(std=scale, generator=generator)
        store.write(block, buffer, step=step)
    seal_run(run)
    return Run(run)


def torch_runner(run, *, micro_batch=4):
    return run.runner(EmaLoader(run.directory.store()), micro_batch=micro_batch)


def unlabelled_images(path, *, count=40, height=6, width=4, channels=3):
    """An .npz of smooth colour images without labels; its path as text."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, size=(count, height, width, channels), dtype=np.uint8)
    np.savez(path, images=images)
    return str(path)
