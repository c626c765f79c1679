"""What is fuzzed: for each kind of file a `Reader`, which writes a mutated one and has it read as a user would."""

from fuzz.readers.blocks import BlockReader
from fuzz.readers.exports import (
    ChainExportReader,
    ClassifierExportReader,
    ContinuationExportReader,
    ExportReader,
    LanguageExportReader,
    TextExportReader,
)
from fuzz.readers.images import ArchiveReader, CacheReader, FolderReader
from fuzz.readers.run_files import ConfigReader, ManifestReader, PlanReader, RecordsReader, TextRunReader
from fuzz.readers.texts import LinesReader, TableReader, TextFileReader, TextFolderReader
from fuzz.readers.tokens import TokenCacheReader, TokenizerReader
from fuzz.readers.weights import InitialWeightsReader

READERS = {
    "block file": BlockReader,
    "initial weights": InitialWeightsReader,
    "run manifest": ManifestReader,
    "plan": PlanReader,
    "config": ConfigReader,
    "metrics and summary": RecordsReader,
    "chain export": ChainExportReader,
    "export manifest": ExportReader,
    "npz": ArchiveReader,
    "image folder": FolderReader,
    "image cache": CacheReader,
    "text file": TextFileReader,
    "jsonl": LinesReader,
    "text folder": TextFolderReader,
    "parquet": TableReader,
    "tokenizer": TokenizerReader,
    "token cache": TokenCacheReader,
    "text run": TextRunReader,
    "text export": TextExportReader,
    "continuation export": ContinuationExportReader,
    "language model": LanguageExportReader,
    "image classifier": ClassifierExportReader,
}
