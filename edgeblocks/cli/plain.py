"""Ordinary training as a command of its own, which `edgeblocks compare` starts as a child process.

python -m edgeblocks.cli.plain SETTINGS.yaml OUT [--checkpointing] [--eight-bit] [--boosting]
"""

import argparse
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

from edgeblocks.api import settings_for_here
from edgeblocks.cli.console_progress import ConsoleListener
from edgeblocks.cli.screen import complain, open_streams
from edgeblocks.compare import boosting, plain_training
from edgeblocks.compare.plain_training import Recorder
from edgeblocks.errors import EdgeblocksError
from edgeblocks.files.own import make_folder
from edgeblocks.registry import build_family, build_target, family_type
from edgeblocks.runs.open_data import data_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations on the way back")
    parser.add_argument("--eight-bit", action="store_true", help="moments of 8 bits: bitsandbytes' AdamW8bit")
    parser.add_argument("--boosting", action="store_true", help="layer after layer, as BoostResNet")
    wanted = parser.parse_args()
    open_streams()
    settings = settings_for_here(config=wanted.settings)
    run = settings.run.model_copy(update={"checkpointing": wanted.checkpointing})
    data = data_of(run, lambda *_: None)
    kind = family_type(run.family, "exact")
    family = build_family(run.family, asdict(settings.family), asdict(kind.data_info(data)), "exact")
    target = build_target(run.target)
    if target.host_bytes() is not None:  # on a processor ordinary training has the allocator's own settings
        target.prepare()
        target.warm_up()
    make_folder(wanted.out)
    for former in wanted.out.glob("*.json*"):
        former.unlink()
    with ConsoleListener() as listener:
        recorder = Recorder(wanted.out, family, data, run, target, listener)
        train = boosting.train if wanted.boosting else partial(plain_training.train, eight_bit=wanted.eight_bit)
        train(family, data, run, device=target.torch_device, on_start=recorder.start, on_step=recorder.note)
        recorder.finish()


if __name__ == "__main__":
    try:
        main()
    except EdgeblocksError as error:
        complain(f"error: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
