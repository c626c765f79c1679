"""How an exported directory turns text into tokens and back: numpy alone, no torch."""

from pathlib import Path

from edgeblocks.data.tokenizer import Tokenizer, stored_tokenizer
from edgeblocks.export.manifest_types import WordedManifest


def exported_tokenizer(directory: Path, manifest: WordedManifest) -> Tokenizer:
    """How text becomes tokens.

    Raises:
        RunError: its file is missing, damaged, or of another vocabulary.
    """
    return stored_tokenizer(
        directory,
        manifest.tokenizer,
        definition_sha256=manifest.tokenizer_sha256,
        vocabulary=manifest.vocabulary,
        cure="copy the directory again, or export again",
    )
