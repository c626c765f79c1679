"""What a network makes, asked of it and given to the user: a grid of images, texts, the classes of images."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeblocks.cli.options import as_flags
from edgeblocks.cli.screen import json_text, say, say_raw
from edgeblocks.errors import ConfigError, DataError, StorageError
from edgeblocks.files.durable import write_atomically
from edgeblocks.files.own import check_new

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgeblocks.export.classifier import Classifier
    from edgeblocks.export.picture_classes import Answer
    from edgeblocks.export.vision_model import VisionModel

_MOST_UNREADABLE = 10
"""Files without an answer that are named."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user typed for a network that makes something: None where nothing was typed.

    `of_images` and `of_text` are the options that only a network of that kind has.
    """

    n: int | None
    out: Path | None
    overwrite: bool
    as_json: bool
    of_images: dict[str, Any]
    of_text: dict[str, Any]

    @property
    def num_texts(self) -> int:
        """How many are written."""
        return 4 if self.n is None else self.n

    @property
    def num_images(self) -> int:
        """How many are made."""
        return 64 if self.n is None else self.n

    def texts(self, write: Callable[..., list[str]]) -> None:
        """Have texts written, and print or save them.

        Args:
            write: called with `n`, and with the options of text that were typed.
        """
        asked = _only(self.of_text, self.of_images, "writes text")
        if self.out is not None and self.out.suffix.lower() in (".png", ".jpg", ".jpeg"):
            raise ConfigError(f"-o {self.out}: this network writes text; give a name that ends in .txt or .json")
        if self.out is not None:
            check_new(self.out, overwrite=self.overwrite)
        _say_texts(write(n=self.num_texts, **asked), self.out, as_json=self.as_json)

    def images(self, draw: "Callable[..., NDArray[np.uint8]]", *, num_classes: int) -> None:
        """Have images made, and save a grid of them.

        Args:
            draw: called with `n`, and with the options of images that were typed; gives uint8 [n, H, W, C].
        """
        asked = _only(self.of_images, self.of_text, "makes no text")
        out = self.out or Path("grid.png")
        _check_picture(out, asked.get("solver", "heun"))
        check_new(out, overwrite=self.overwrite)
        made = draw(n=self.num_images, **asked)
        from edgeblocks.data import pictures

        # A column for each class where the classes take turns and are few; else the picture chooses.
        columns = num_classes if "label" not in asked and 1 < num_classes <= 16 else None
        pictures.save_png(out, pictures.image_grid(made, columns=columns))
        say(json_text({"path": str(out), "n": len(made)}) if self.as_json else f"saved {len(made)} images to {out}")

    def nothing(self, what: str) -> None:
        """That no option was typed, because the network makes neither.

        Raises:
            ConfigError: one was.
        """
        _only({}, {"n": self.n, **self.of_images, **self.of_text}, what)


def say_classes(
    classifier: "Classifier | VisionModel",
    images: list[Path],
    out: Path | None,
    steps: int | None,
    seed: int,
    *,
    overwrite: bool,
    as_json: bool,
    on_image: Callable[[int, int], None] | None = None,
) -> None:
    """Classify image files; print the likeliest classes of each, or save them as JSON.

    Raises:
        DataError: some cannot be read. The others' answers were given before.
    """
    if not images:
        raise ConfigError(f"{classifier.directory} classifies images: name images, or a folder of them, after it")
    if out is not None and out.suffix.lower() != ".json":
        raise ConfigError(f"-o {out}: classes are written as JSON; give a name that ends in .json")
    if out is not None:
        check_new(out, overwrite=overwrite)
    unreadable: list[DataError] = []
    found = classifier.classify_files(
        images, steps=steps, seed=seed, on_unreadable=unreadable.append, on_image=on_image
    )
    if found:
        _say_answers(found, out, as_json=as_json)
    if unreadable:
        shown = [str(error) for error in unreadable[:_MOST_UNREADABLE]]
        if len(unreadable) > len(shown):
            shown.append(f"and {len(unreadable) - len(shown)} more like that")
        if found:
            shown.append(f"{len(unreadable)} of {len(images)} images have no answer; the others have theirs")
        raise DataError(*shown)


def _say_answers(found: "list[Answer]", out: Path | None, *, as_json: bool) -> None:
    if out is not None:
        _write(out, json.dumps(found, indent=1) + "\n")
        say(json_text({"path": str(out), "n": len(found)}) if as_json else f"saved {len(found)} answers to {out}")
        return
    if as_json:
        say(json_text(found))
        return
    for answer in found:
        classes = ", ".join(f"{one['name']} {one['probability']:.1%}" for one in answer["classes"])
        say(f"{answer['path']}: {classes}")


def _only(own: Mapping[str, object], others: Mapping[str, object], what: str) -> dict[str, Any]:
    """What the user typed of a network's own options, after a look that nothing else was typed."""
    wrong = ["class" if name == "label" else name for name, value in others.items() if value is not None]
    if wrong:
        raise ConfigError(f"this network {what}, so {as_flags(wrong)} means nothing to it; leave it out")
    return {name: value for name, value in own.items() if value is not None}


def _check_picture(out: Path, solver: str) -> None:
    problems = []
    if out.suffix.lower() != ".png":
        problems.append(f"-o {out}: the grid is a PNG picture; give a name that ends in .png")
    if solver not in ("heun", "euler"):
        problems.append(f"--solver {solver}: there are heun and euler")
    if problems:
        raise ConfigError(*problems)


def _say_texts(texts: list[str], out: Path | None, *, as_json: bool) -> None:
    """Print texts, or save them: as a JSON list where the file's name ends in .json."""
    from edgeblocks.diffusion.unmasking import texts_as_file

    if out is None:
        say_raw(f"{json_text(texts)}\n" if as_json else texts_as_file(texts))
        return
    content = json.dumps(texts, indent=1, ensure_ascii=False) + "\n" if out.suffix == ".json" else texts_as_file(texts)
    _write(out, content)
    say(json_text({"path": str(out), "n": len(texts)}) if as_json else f"saved {len(texts)} texts to {out}")


def _write(out: Path, content: str) -> None:
    try:
        if out.exists() and not out.is_file():  # a pipe or a device
            out.write_text(content, encoding="utf-8")
        else:
            write_atomically(out, [content.encode()])
    except OSError as error:
        raise StorageError(f"cannot write {out}: {error.strerror}; choose another place with -o") from error
