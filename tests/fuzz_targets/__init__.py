"""What is fuzzed: for each kind of file a `Reader`, which writes a mutated one and has it read as a user would."""

from fuzz_targets.blocks import BlockReader
from fuzz_targets.exports import ContinuationExportReader, ExportReader, TextExportReader
from fuzz_targets.images import ArchiveReader, CacheReader, FolderReader
from fuzz_targets.run_files import ConfigReader, ManifestReader, PlanReader, RecordsReader, TextRunReader
from fuzz_targets.texts import LinesReader, TableReader, TextFileReader, TextFolderReader
from fuzz_targets.tokens import TokenCacheReader, TokenizerReader
from fuzz_targets.weights import InitialWeightsReader

READERS = {
    "block file": BlockReader,
    "initial weights": InitialWeightsReader,
    "run manifest": ManifestReader,
    "plan": PlanReader,
    "config": ConfigReader,
    "metrics and summary": RecordsReader,
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
}
