"""How an exported directory turns text into tokens and back: numpy alone, no torch."""

import hashlib
from pathlib import Path

from edgeblocks.data.tokenizer import MOST_DEFINITION_BYTES, Tokenizer, build_tokenizer
from edgeblocks.errors import RunError
from edgeblocks.export.contents import WordedManifest
from edgeblocks.export.manifest import TOKENIZER_FILE
from edgeblocks.untrusted import MalformedFileError, read_text


def exported_tokenizer(directory: Path, manifest: WordedManifest) -> Tokenizer:
    """How text becomes tokens.

    Raises:
        RunError: its file is missing, damaged, or of another vocabulary.
    """
    path, definition = directory / TOKENIZER_FILE, None
    if manifest.tokenizer_sha256 is not None:
        try:
            definition = read_text(path, most_bytes=MOST_DEFINITION_BYTES)
        except (OSError, MalformedFileError) as error:
            raise RunError(f"cannot read {path}: {error}; copy the directory again, or export again") from error
        if hashlib.sha256(definition.encode()).hexdigest() != manifest.tokenizer_sha256:
            raise RunError(f"{path} does not match its checksum; copy the directory again, or export again")
    tokenizer = build_tokenizer(manifest.tokenizer, definition, path=path)
    if tokenizer.vocabulary != manifest.vocabulary:
        raise RunError(
            f"{directory} is damaged: its tokenizer has {tokenizer.vocabulary} tokens, manifest.json tells of "
            f"{manifest.vocabulary}; copy the directory again, or export again"
        )
    return tokenizer
