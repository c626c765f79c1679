"""What is fuzzed: for each kind of file a `Reader`, which writes a mutated one and has it read as a user would."""

from fuzz_targets.blocks import BlockReader
from fuzz_targets.exports import ExportReader
from fuzz_targets.images import ArchiveReader, CacheReader, FolderReader
from fuzz_targets.run_files import ConfigReader, ManifestReader, PlanReader, RecordsReader

READERS = {
    "block file": BlockReader,
    "run manifest": ManifestReader,
    "plan": PlanReader,
    "config": ConfigReader,
    "metrics and summary": RecordsReader,
    "export manifest": ExportReader,
    "npz": ArchiveReader,
    "image folder": FolderReader,
    "image cache": CacheReader,
}
