"""."""

from pathlib import Path

TEXT_FILE = "text.txt"


def is_python_data(source: str) -> bool:
    return source.startswith("python:")


def python_folder(source: str, cache_dir: Path) -> Path:
    return cache_dir / source
