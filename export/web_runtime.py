"""onnxruntime-web, which runs graphs in a browser: found on this machine, or fetched once with npm.

It is of one version, and its files are compared with their checksums: they run on the machines of strangers.
"""

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edgeblocks.data.cache import cache_folder
from edgeblocks.errors import ConfigError, RunError, StorageError
from edgeblocks.files.own import create
from edgeblocks.onnx_runtime import onnxruntime
from edgeblocks.progress import Listener
from edgeblocks.terminal import one_line

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
SCRIPT, WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
"""The smallest set that runs on one thread, which needs no headers of the server; graphs on a GPU would need others."""
SHA256 = {
    SCRIPT: "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    WASM: "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
BYTES = {SCRIPT: 73_054, WASM: 14_239_897}
_FETCH = f"npm pack {PACKAGE}@{VERSION}"
_FETCHING_S = 900


def runtime_files(given: Path | None, listener: Listener) -> dict[str, bytes]:
    """The runtime's files and their licences, by their names in a page's folder.

    Args:
        given: the npm package, as a folder or as the .tgz that `npm pack` writes; None: it is looked for in the cache
            folder, and fetched with npm where it is not there.

    Raises:
        ConfigError: it is not there, or of another version.
        RunError: npm did not fetch it.
        StorageError: the disk refused.
    """
    # The wasm file is built of the same sources as the library that runs here, which brings the licences along.
    library = Path(str(onnxruntime().__file__)).parent
    try:
        files = {name: (library / name).read_bytes() for name in ("LICENSE", "ThirdPartyNotices.txt")}
        return files | (_cached(listener) if given is None else _checked(given))
    except OSError as error:
        raise StorageError(f"cannot read {one_line(error.filename)}: {error.strerror}") from error


def _cached(listener: Listener) -> dict[str, bytes]:
    folder = cache_folder() / f"{PACKAGE}-{VERSION}"
    if folder.is_dir():
        try:
            return _checked(folder)
        except ConfigError:
            pass  # cut short, or changed: it is fetched again
    npm = shutil.which("npm")
    if npm is None:
        raise ConfigError(
            f"a page needs {PACKAGE} {VERSION}, and npm, which would fetch it, is not installed; on a machine that has "
            f"it: {_FETCH}, and give the file that it writes with --web-runtime {PACKAGE}-{VERSION}.tgz"
        )
    listener.note(f"fetching {PACKAGE} {VERSION} with npm, 33 MB, once: it will be in {one_line(folder)}")
    with tempfile.TemporaryDirectory(prefix="edgeblocks-") as work:
        command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--silent"]
        try:
            subprocess.run(command, cwd=work, check=True, capture_output=True, text=True, timeout=_FETCHING_S)
            (packed,) = Path(work).glob("*.tgz")
        except (subprocess.SubprocessError, ValueError) as error:
            told = " ".join(str(getattr(error, "stderr", None) or error).split())[:300]
            raise RunError(
                f"npm could not fetch {PACKAGE} {VERSION}: {told}; where there is a network run {_FETCH}, and give the "
                f"file that it writes with --web-runtime"
            ) from error
        files = _checked(packed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        with create(folder / name) as file:
            file.write(content)
    return files


def _checked(given: Path) -> dict[str, bytes]:
    """The files of a package, if they are those that are known."""
    if not given.exists():
        raise ConfigError(f"--web-runtime {one_line(given)}: there is no such folder or file; {_FETCH} makes one")
    found = dict(_of_archive(given) if given.is_file() else _of_folder(given))
    for name, digest in SHA256.items():
        if name not in found:
            raise ConfigError(f"--web-runtime {one_line(given)} holds no {name} of {BYTES[name]:,} bytes; {_needed()}")
        if hashlib.sha256(found[name]).hexdigest() != digest:
            raise ConfigError(f"--web-runtime {one_line(given)}: its {name} is of other content; {_needed()}")
    return found


def _needed() -> str:
    return f"the package {PACKAGE} of version {VERSION} is needed: {_FETCH}"


def _of_folder(folder: Path) -> Iterator[tuple[str, bytes]]:
    for inner in (".", "dist", "package/dist", f"node_modules/{PACKAGE}/dist"):
        for name, num_bytes in BYTES.items():
            path = folder / inner / name
            if path.is_file() and path.stat().st_size == num_bytes:
                yield name, path.read_bytes()


def _of_archive(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = member.name.removeprefix("package/dist/")
                content = archive.extractfile(member) if member.size == BYTES.get(name) else None
                if content is not None:
                    yield name, content.read()
    except tarfile.TarError as error:
        raise ConfigError(f"--web-runtime {one_line(path)} is no package of npm ({error}); {_needed()}") from error
