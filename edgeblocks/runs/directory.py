"""The run directory: what is in it, how a run is created in it and found again.

    config.yaml  plan.json  env.json  manifest.json  metrics.jsonl  summary.json  blocks/*.safetensors
    samples/*.png or *.txt  tokenizer.json (of a vocabulary that was trained or given)  quality.jsonl (`evaluations`)
    growth.jsonl (of a network that grows by its loss)
    shared/ (a run of its own: the denoiser that all blocks begin as, see `runs.shared`)
    blocks/window_NNN/*.safetensors in the place of the blocks, where the network grows (`runs.growing`)

`manifest.json` is written last when a run is created, so a directory with a manifest is whole. Each block file knows
its own step; there is no second place that could disagree with it, and so nothing to repair after a crash. While a run
with a `work_dir` is being trained its block files lie there; when it is finished they are brought home.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgeblocks.data.tokenizer import TOKENIZER_FILE, Tokenizer
from edgeblocks.diffusion.noise import NoisePartition, partition_noise
from edgeblocks.files.durable import sync, write_atomically
from edgeblocks.files.own import append, make_folder
from edgeblocks.methods import METHODS, Master, Method, Precision
from edgeblocks.offload.block_buffer import BlockLayout
from edgeblocks.offload.block_files import BlockStore, storage_error
from edgeblocks.offload.sections import Section, blocks_of, network_of, stages_of, tensor_name
from edgeblocks.planning.plans import shared_steps, trained_stages
from edgeblocks.planning.windows import last_steps, latest_steps, layers_so_far, look_steps
from edgeblocks.registry import build_family, family_type
from edgeblocks.runs.schema import (
    GrowthFields,
    InitFields,
    Prolongation,
    QualityFields,
    RecordFields,
    SharedBy,
    WindowFields,
    checked,
    checked_record,
    config_with_checksum,
    is_up_to,
    read_records,
    with_checksum,
)
from edgeblocks.runs.summary import Summary, read_summary
from edgeblocks.runs.written_plan import TrainablePlan, WrittenPlan
from edgeblocks.settings.fields import TOKENIZERS, Settings, precision_of, share_of
from edgeblocks.settings.reading import resolve_settings

if TYPE_CHECKING:
    from edgeblocks.families.base import DataInfo
    from edgeblocks.families.family import AnyFamily

RUN_FORMAT_VERSION = 2
SHARED_FOLDER = "shared"
WINDOW_RATE_SHARE = 0.4
"""To which the learning rate falls in every window but the last. At zero, layers that are frozen have settled on what
the short network needs: 0.02 to 0.035 nats worse in the end, on characters."""
BEFORE_FILE = "before.json"
"""What evaluation found of a pretrained network before it was trained."""
OWN_FOLDERS = ("blocks", "blocks.arriving", "samples", SHARED_FOLDER)
OWN_NAMES = (
    *(
        "lock",
        "lock.pid",
        "config.yaml",
        "plan.json",
        "env.json",
        "manifest.json",
        "metrics.jsonl",
        "quality.jsonl",
        "growth.jsonl",
        BEFORE_FILE,
    ),
    *("summary.json", TOKENIZER_FILE),
)
"""What training writes and removes in a run directory."""


@dataclass(frozen=True, kw_only=True)
class RunDirectory:
    """A run on disk: its settings, its plan, its family and its block files."""

    path: Path
    run_id: str
    settings: Settings
    plan: WrittenPlan
    data: "DataInfo"
    """What the network knows of the data: the family's `data_type`."""
    data_source: str
    data_fingerprint: str
    class_names: tuple[str, ...]
    tokenizer: Tokenizer | None = None
    """How text becomes tokens; None for a family that reads images."""
    init: InitFields | None = None
    """The file that the weights began with; None where they came from the seed."""
    shared_by: SharedBy | None = None
    """Whose blocks begin as this run's only one; None of a run that stands alone."""
    window: WindowFields | None = None
    """Of a network that grows, the window that is trained now; None where all parts are there from the beginning."""
    prolonged: tuple[Prolongation, ...] = ()
    """When more steps were asked for than before; see `prolonging.prolong`."""

    @property
    def trainable_plan(self) -> TrainablePlan:
        """The plan with all that training needs.

        Raises:
            RunError: names what its plan.json lacks, for example after it was written by hand.
        """
        if isinstance(self.plan, TrainablePlan):
            return self.plan
        return checked(TrainablePlan, self.path / "plan.json", self.plan.to_json())

    @property
    def summary(self) -> Summary | None:
        """The figures of the finished training; None while the run is not finished.

        Raises:
            RunError: summary.json is damaged.
        """
        path = self.path / "summary.json"
        return read_summary(path) if path.exists() else None

    @property
    def precision(self) -> Precision:
        """In which its networks compute."""
        return precision_of(self.settings.run)

    @property
    def master(self) -> Master:
        """In which numbers its weights and their EMA are kept."""
        return self.settings.run.master

    @property
    def file_layers(self) -> tuple[int, ...]:
        """Layers in each block file; of a network that grows, in those that there are so far."""
        layers = tuple(self.plan.layers_per_block)
        return layers if self.window is None else layers_so_far(layers, self.window.number)

    @property
    def is_grown(self) -> bool:
        """Whether all parts of the network are there."""
        return len(self.file_layers) == len(self.plan.layers_per_block)

    @property
    def last_step(self) -> int:
        """Up to which the parts that there are so far are trained: that of the run, unless the network grows then."""
        if self.window is None or self.is_grown:
            return self.settings.run.steps
        ends = latest_steps if self.grows_by_loss else last_steps
        return ends(self.first_steps, len(self.plan.layers_per_block))[self.window.number]

    @property
    def grows_by_loss(self) -> bool:
        """Whether a network that grows does so when its loss has flattened, and not after equal shares of the steps."""
        return self.settings.run.grow == "auto"

    @property
    def look_steps(self) -> int | None:
        """After so many steps each time the loss is looked at, to see whether the network is to grow; None: never."""
        if self.window is None or self.is_grown or not self.grows_by_loss:
            return None
        return look_steps(self.first_steps, len(self.plan.layers_per_block))

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of each denoiser: of each block, or of the one that stages trained end to end make together."""
        return self.method.denoisers(self.file_layers)

    @property
    def sections(self) -> tuple[Section, ...]:
        """What is in each block file."""
        return (stages_of if self.method.one_network else blocks_of)(self.file_layers)

    @property
    def trained(self) -> tuple[bool, ...]:
        """Of each block whether it is trained; the others are frozen."""
        parts = len(self.file_layers)
        return trained_stages((parts - 1,) if self.method.grows else self.settings.run.trained_blocks, parts)

    @property
    def first_steps(self) -> int:
        """Steps of each block that the run was created for, before it was prolonged."""
        in_force = self.prolongations
        return in_force[0].steps_before if in_force else self.settings.run.steps

    @property
    def shared_steps(self) -> int:
        """Of each block's steps, those that one denoiser makes for all of them; 0 where blocks do not begin as one."""
        return shared_steps(share_of(self.settings.run), steps=self.first_steps, blocks=len(self.file_layers))

    @property
    def steps_of_all(self) -> int:
        """Of all that is trained apart; of a denoiser that blocks begin as with the steps that these make later."""
        if self.shared_by is not None:
            return self.shared_by.blocks * self.shared_by.steps
        return self.settings.run.steps * self.method.trained_apart(len(self.file_layers))

    @property
    def resumed_at(self) -> Path:
        """The run that `--resume` goes on with."""
        return self.path if self.shared_by is None else self.path.parent

    def saved_steps(self, store: BlockStore) -> list[int]:
        """The saved step of each block. A frozen block never changes: it counts as the least of the trained ones.

        Raises:
            RunError: a file is missing or damaged.
        """
        steps = [store.header(block).step for block in range(len(self.file_layers))]
        least = min(step for step, trained in zip(steps, self.trained, strict=True) if trained)
        return [step if trained else least for step, trained in zip(steps, self.trained, strict=True)]

    def stretches(self, block: int) -> list[tuple[int, int]]:
        """Of a block's learning rate, for `schedule.learning_rate_over`; one where the run was never prolonged."""
        if self.shared_by is not None:
            return [(0, self.steps_of_all)]  # one schedule over this run and the blocks' own steps
        steps, in_force = self.last_step, self.prolongations
        begins = [0 if self.window is None else self.window.first_step, *(one.began_at[block] for one in in_force)]
        return list(zip(begins, [*(one.steps_before for one in in_force), steps], strict=True))

    @property
    def lowest_rate_share(self) -> float:
        """Of the learning rate's highest value, to which it falls at the end of a stretch."""
        return 0.0 if self.window is None or self.is_grown else WINDOW_RATE_SHARE

    @property
    def prolongations(self) -> tuple[Prolongation, ...]:
        """Those of `prolonged` that are in force: a process that is killed while it prolongs a run changes nothing."""
        return tuple(one for one in self.prolonged if one.steps_before < self.settings.run.steps)

    @property
    def method(self) -> Method:
        """How it is trained."""
        return METHODS[self.settings.run.method]

    def tensor_name(self, block: int, name: str) -> str:
        """What a block's parameter is called in a file of all weights."""
        return tensor_name(block, name, self.file_layers, one_network=self.method.one_network)

    @cached_property
    def partition(self) -> NoisePartition:
        run = self.settings.run
        return partition_noise(
            self.family().noise, num_blocks=len(self.layers), kind=run.partition, overlap=run.overlap
        )

    def family(self) -> "AnyFamily":
        """The run's family, made once: `ar` and `looped` compare the codes of all tokens, which takes a while."""
        return self._family

    @cached_property
    def _family(self) -> "AnyFamily":
        run = self.settings.run
        return build_family(run.family, asdict(self.settings.family), asdict(self.data), run.method)

    def store(self) -> BlockStore:
        """The block files of this run."""
        import torch

        family, layouts = self.family(), {}
        kinds = list(zip(self.sections, self.trained, strict=True))
        for section, trained in set(kinds):
            with torch.device("meta"):
                network = network_of(family, section)
            # One layout for all blocks of a kind: building a network to count its tensors takes time.
            layouts[section, trained] = BlockLayout.of(
                network,
                self.settings.run.optimizer,
                frozen=not trained,
                master=self.master,
                keeps_ema=self.settings.run.keeps_ema,
            )
        of_blocks = [layouts[kind] for kind in kinds]
        return BlockStore(self.blocks_folder, of_blocks, self.run_id, trained_together=self.method.trained_together)

    def store_with_meter(self, *others: BlockStore) -> BlockStore:
        """The block files, whose count of bytes written goes on from where the newest file has it, `others` included.

        Raises:
            RunError: a file is missing or damaged.
        """
        store = self.store()
        stores = (store, *others)
        store.continue_meter(one.header(block) for one in stores for block in range(len(one.layouts)))
        return store

    @property
    def blocks_folder(self) -> Path:
        """Where the block files are; those of a network that grows have a folder for each window."""
        if self.window is None:
            return self._folder_of_blocks
        return self._folder_of_blocks / f"window_{self.window.number:03d}"

    @property
    def is_away(self) -> bool:
        """Whether the block files are in the work directory."""
        return self._folder_of_blocks == self.away_folder

    @property
    def _folder_of_blocks(self) -> Path:
        """At home, or a folder of this run's own in the work directory."""
        home, away = self.path / "blocks", self.away_folder
        return home if away is None or home.is_dir() else away

    @property
    def away_folder(self) -> Path | None:
        """This run's folder in its work directory."""
        work_dir = self.settings.run.work_dir
        return None if work_dir is None else Path(work_dir).expanduser() / f"edgeblocks-{self.run_id[:12]}"

    @property
    def data_settings(self) -> Settings:
        """The settings with which the data are opened: a tokenizer.json that was given is the run's own copy of it, but
        for a pretrained model, beside whose tokenizer is its chat template."""
        run = self.settings.run
        if self.tokenizer is None or run.tokenizer in TOKENIZERS or self.family().only_exact:
            return self.settings
        return replace(self.settings, run=run.model_copy(update={"tokenizer": str(self.path / TOKENIZER_FILE)}))

    def write_json(self, name: str, content: Mapping[str, object]) -> None:
        write_text(self.path / name, json.dumps(with_checksum(content), indent=1) + "\n")

    def changed(self, settings: Mapping[str, object]) -> "RunDirectory":
        """The run with some of its settings changed; `save_settings` writes them down when they have proved sound.

        Raises:
            ConfigError: an impossible setting.
        """
        if not settings:
            return self
        kept = {**self.settings.run.model_dump(), **asdict(self.settings.family)}
        resolved = resolve_settings(
            settings,
            family_settings=lambda name: family_type(name).settings_type,
            config={name: value for name, value in kept.items() if name not in settings},
        )
        return replace(self, settings=resolved.with_whole_paths())

    def save_settings(self) -> None:
        write_text(self.path / "config.yaml", config_with_checksum(self.settings.to_yaml()))

    def forget_summary(self) -> None:
        """The run is not finished any more, and its blocks may be made again where there is no folder of them.

        Raises:
            StorageError: the disk refused.
        """
        try:
            (self.path / "summary.json").unlink(missing_ok=True)
            make_folder(self.blocks_folder)
        except OSError as error:
            raise storage_error("cannot make blocks again in", self.path, error) from error

    def planned_again(self, plan: WrittenPlan) -> "RunDirectory":
        """The run with another plan for the same blocks, here and in its plan.json."""
        assert plan.layers_per_block == self.plan.layers_per_block
        self.write_json("plan.json", plan.to_json())
        return replace(self, plan=plan)

    def append(
        self, name: Literal["metrics.jsonl", "quality.jsonl", "growth.jsonl"], record: Mapping[str, object]
    ) -> None:
        """Add a line to one of these; `schema.RecordFields`, `QualityFields` and `GrowthFields` say what is in it.

        Raises:
            StorageError: the disk refused.
        """
        path = self.path / name
        try:
            # Not synced: where a run goes on is in the block files alone, and a record that is lost is a point of a
            # curve.
            append(path, f"{json.dumps(record)}\n".encode())
        except OSError as error:
            raise storage_error("cannot write metrics", path, error) from error

    def metrics(self) -> Iterator[dict[str, object]]:
        """The records of metrics.jsonl; a half-written last line is passed over."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            yield from read_records(path)

    def quality(self) -> list[QualityFields]:
        """The records of quality.jsonl; none where the quality was not measured on the way."""
        found = self._quality_in(self.path)
        if not self.shared_steps:
            return found
        # Of the denoiser that the blocks began as: so many of its steps as there are blocks are one of each block.
        shared, blocks = self._quality_in(self.path / SHARED_FOLDER), len(self.file_layers)
        return [*(one.model_copy(update={"step": math.ceil(one.step / blocks)}) for one in shared), *found]

    def growth(self) -> list[GrowthFields]:
        """The records of growth.jsonl."""
        path = self.path / "growth.jsonl"
        found = (checked_record(GrowthFields, content) for content in read_records(path)) if path.exists() else ()
        return [record for record in found if record is not None]

    @staticmethod
    def _quality_in(folder: Path) -> list[QualityFields]:
        path = folder / "quality.jsonl"
        found = (checked_record(QualityFields, content) for content in read_records(path)) if path.exists() else ()
        return [record for record in found if record is not None]

    def records(self) -> Iterator[RecordFields]:
        """The same, checked; what is no record of a step is passed over."""
        for content in self.metrics():
            record = checked_record(RecordFields, content)
            if record is not None:
                yield record

    def drop_metrics_after(self, steps: list[int]) -> None:
        """Forget records of steps that a crash undid, given each block's saved step."""
        # Those steps are made again and write their records again: two lines of one step would bend every curve.
        kept = (json.dumps(record) + "\n" for record in self.metrics() if is_up_to(record, steps))
        write_text(self.path / "metrics.jsonl", "".join(kept))


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically.

    Raises:
        StorageError: the disk refused.
    """
    try:
        write_atomically(path, [text.encode()])
    except OSError as error:
        raise storage_error("cannot write", path, error) from error


def remove_leftovers(run: RunDirectory) -> None:
    """Delete the temporary files that killed processes left behind. The run must be locked.

    Raises:
        StorageError: the folder cannot be written.
    """
    if run.window is not None:
        for former in run.blocks_folder.parent.glob("window_*"):
            if former != run.blocks_folder:  # of a window that was, or of one that had not begun
                shutil.rmtree(former, ignore_errors=True)
    for folder in (run.path, run.blocks_folder, run.path / "samples"):
        for leftover in folder.glob(".*.tmp"):
            try:
                leftover.unlink(missing_ok=True)
            except OSError as error:
                raise storage_error("cannot remove what a killed process left", leftover, error) from error


def bring_blocks_home(run: RunDirectory) -> None:
    """Move a finished run's block files from its work directory into the run directory, which is then whole.

    Raises:
        StorageError: no room; the files stay where they are and the run stays usable.
    """
    away, home = run.away_folder, run.path / "blocks"
    if away is None:
        return
    if not home.is_dir():
        arriving = run.path / "blocks.arriving"
        try:
            shutil.rmtree(arriving, ignore_errors=True)
            shutil.copytree(away, arriving, symlinks=True, ignore=shutil.ignore_patterns("lock"))
            # The bytes are on the disk before the name is, and the name before the only other copy goes.
            for path in (*arriving.iterdir(), arriving):
                sync(path)
            # Under its final name the folder is whole: `blocks_folder` goes by whether it is there.
            arriving.rename(home)
            sync(run.path)  # the name must be on the disk before the other files go
        except (OSError, shutil.Error) as error:
            shutil.rmtree(arriving, ignore_errors=True)
            cause = error if isinstance(error, OSError) else OSError(str(error))
            raise storage_error(f"cannot move the blocks from {away}, where they stay,", home, cause) from error
    shutil.rmtree(away, ignore_errors=True)
