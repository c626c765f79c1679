"""A tiny run, and what can be told of it from outside, with other readers than edgeblocks' own."""

import contextlib
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from safetensors.numpy import load_file

BLOCKS, STEPS, VISIT_STEPS = 4, 36, 6
GRID_STEPS = (18, 36)
SETTINGS: dict[str, Any] = {
    "width": 32,
    "heads": 2,
    "depth": 4,
    "blocks": BLOCKS,
    "steps": STEPS,
    "visit_steps": VISIT_STEPS,
    "batch": 8,
    "micro_batch": 8,
    "checkpointing": False,
    "sample_grids": len(GRID_STEPS),
    "sample_steps": 4,
    "mem_budget": "2GB",
}

STARTING, CACHING, PLANNING, CREATING = "starting", "building the cache", "planning", "creating blocks"
VISITING, WRITING, SAMPLING, PICTURE = "visiting", "writing a block", "sampling", "writing a picture"
EVALUATING, FINISHING, RETURNING, SMALL_FILE = "evaluating", "finishing", "bringing blocks home", "writing a small file"
PHASES = (
    *(STARTING, CACHING, PLANNING, CREATING, VISITING, WRITING),
    *(SAMPLING, PICTURE, EVALUATING, FINISHING, RETURNING, SMALL_FILE),
)
_NAMES = re.compile(
    r"(config\.yaml|(plan|env|manifest|summary)\.json|metrics\.jsonl|lock"
    r"|blocks(\.arriving)?(/block_\d{3}\.safetensors)?|samples(/step_\d{7}\.png)?|(.*/)?\.[^/]*\.tmp)"
)


def make_images(path: Path) -> Path:
    """An .npz of images with three classes; it is decoded into a cache before it is trained on."""
    random_ = np.random.default_rng(0)
    np.savez(path, images=random_.integers(0, 256, (400, 8, 8, 1), dtype=np.uint8), labels=np.arange(400) % 3)
    return path


@dataclass
class Subject:
    """A run that is being trained, and where its parts lie."""

    out: Path
    work_dir: Path | None
    cache: Path
    settings: dict[str, Any]
    steps: dict[int, int] = field(default_factory=dict)
    """The saved step of each block after the latest attempt."""

    @property
    def sealed(self) -> bool:
        return (self.out / "manifest.json").exists()

    def block_folders(self) -> list[Path]:
        folders = [self.out / "blocks", *(self.work_dir.glob("edgeblocks-*") if self.work_dir else ())]
        return [folder for folder in folders if folder.is_dir()]

    def is_writing_a_block(self) -> bool:
        with contextlib.suppress(OSError):
            return any(path.suffix == ".tmp" for folder in self.block_folders() for path in folder.iterdir())
        return False

    def remains(self) -> dict[Path, str]:
        """What only a process at work or a killed one has, and the phase in which it is made."""
        found = {path: WRITING for folder in self.block_folders() for path in folder.glob(".*.tmp")}
        found |= dict.fromkeys(self.out.glob("samples/.*.tmp"), PICTURE)
        found |= dict.fromkeys(self.out.glob(".*.tmp"), SMALL_FILE)
        found |= dict.fromkeys(self.cache.glob("*.partial"), CACHING)
        return found | dict.fromkeys(self.out.glob("blocks.arriving"), RETURNING)


def read_block(path: Path) -> tuple[str, int, int]:
    """(run, block, step) of a whole block file, whose checksums are computed here and not by edgeblocks."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    table = json.loads(content[8:start])
    metadata = table.pop("__metadata__")
    for part in ("weights", "ema", "optimizer"):
        spans = [entry["data_offsets"] for name, entry in table.items() if name.startswith(f"{part}.")]
        data = content[start + min(first for first, _ in spans) : start + max(last for _, last in spans)]
        assert hashlib.sha256(data).hexdigest() == metadata[f"{part}_sha256"], f"{path}: {part}"
    assert len(load_file(path)) == len(table)
    assert len(content) == start + max(entry["data_offsets"][1] for entry in table.values())
    return metadata["run_id"], int(metadata["block"]), int(metadata["step"])


def examine(subject: Subject) -> None:
    """Every file under its final name is whole and belongs there, and no saved step was lost.

    Raises:
        AssertionError: otherwise.
    """
    if not subject.out.exists():
        return
    names = [str(path.relative_to(subject.out)) for path in subject.out.rglob("*")]
    strange = [name for name in names if not _NAMES.fullmatch(name)]
    assert not strange, strange
    manifest = json.loads((subject.out / "manifest.json").read_text()) if subject.sealed else None
    for path in subject.out.glob("*.json"):
        json.loads(path.read_text())
    if (subject.out / "config.yaml").exists():
        assert yaml.safe_load((subject.out / "config.yaml").read_text())["steps"] == STEPS
    for path in subject.out.glob("samples/step_*.png"):
        with Image.open(path) as picture:
            picture.load()
    homes = []
    for folder in subject.block_folders():
        found = {path: read_block(path) for path in folder.glob("block_*.safetensors")}
        assert all(path.name == f"block_{block:03d}.safetensors" for path, (_, block, _) in found.items()), found
        runs = {run_id for run_id, _, _ in found.values()}
        if folder.parent != subject.out:  # folders of attempts that were killed before they were valid may be there
            assert all(folder.name == f"edgeblocks-{run_id[:12]}" for run_id in runs), (folder, runs)
        if manifest is not None and (folder.parent == subject.out or runs == {manifest["run_id"]}):
            assert runs == {manifest["run_id"]}, (folder, runs)
            homes.append({block: step for _, block, step in found.values()})
    if manifest is not None:
        steps = homes[0]  # at home where they are at home already, and the work directory is being emptied
        assert sorted(steps) == list(range(BLOCKS)), f"there are only the blocks {sorted(steps)}"
        assert all(step >= subject.steps.get(block, 0) for block, step in steps.items()), (subject.steps, steps)
        subject.steps = steps


def assert_equal_runs(out: Path, reference: Path) -> None:
    """All tensors of all block files, the metrics' steps and the validation losses are the reference's, bit for bit.

    Raises:
        AssertionError: otherwise.
    """
    for block in range(BLOCKS):
        name = f"blocks/block_{block:03d}.safetensors"
        one, two = load_file(out / name), load_file(reference / name)
        assert one.keys() == two.keys()
        different = [key for key in one if one[key].tobytes() != two[key].tobytes()]
        assert not different, f"{len(different)} tensors of block {block} differ, the first is {different[0]}"
        assert read_block(out / name)[2] == STEPS
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    made = sorted((record["block"], record["step"]) for record in records)
    assert made == [(block, step) for block in range(BLOCKS) for step in range(1, STEPS + 1)]
    first, second = (json.loads((path / "summary.json").read_text())["metrics"] for path in (out, reference))
    assert first["validation"] == second["validation"]
    for path in out.glob("samples/*.png"):
        assert path.read_bytes() == (reference / "samples" / path.name).read_bytes(), path
