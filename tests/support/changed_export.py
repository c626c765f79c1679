"""Exports that somebody has changed on the way."""

import json
import shutil


def changed_copy(source, folder, change):
    """A copy of an export at `folder`, in the place of a former one, that `change` was called with."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    change(folder)
    return folder


def manifest_with(**values):
    """A change of some entries of manifest.json."""

    def change(folder):
        path = folder / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change
