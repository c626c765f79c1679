"""A small model as a folder, and a text."""

import json

import pytest
from support.small_autoencoder import write_autoencoder, write_pictures
from support.small_model import TEXT, transformers, write_model


@pytest.fixture(scope="session")
def library():
    return transformers()


@pytest.fixture(scope="session")
def model(library, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    write_model(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "sea.jsonl"
    path.write_text("".join(json.dumps({"text": TEXT[start:]}) + "\n" for start in range(3)))
    return path


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    """Folder of an autoencoder."""
    return write_autoencoder(tmp_path_factory.mktemp("autoencoder") / "tiny-vae")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "squares.npz")
