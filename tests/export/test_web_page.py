"""A page's folder: what is in it, and what is refused."""

import hashlib
import json
import re
import shutil
import tarfile

import pytest
from support.commands import assert_refused, invoke
from support.random_run import make_run, make_text_run
from support.web_runtime import made_up_runtime

import edgeblocks
from edgeblocks.errors import ConfigError, RunError
from edgeblocks.export import web_page, web_runtime
from edgeblocks.export.web_page import export_page
from edgeblocks.progress import Silent

TEXT = {"width": 16, "heads": 2, "length": 16, "hold_out": 0.01}


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    return made_up_runtime(tmp_path / "package", monkeypatch)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "digits", layers=(1, 1), width=16, heads=2).directory


def hashes(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.slow
def test_the_folder_is_whole_and_is_replaced_as_a_whole(digits, runtime, tmp_path):
    """It lists all of its files with their checksums, holds an export that runs here too, and takes a former page's
    place where that is asked for, but for one to which something was added."""
    site = tmp_path / "site"
    told = invoke("export", digits.path, "--web", site, "--web-runtime", runtime)
    assert f"python -m http.server -d {site}" in told.stdout and "the page has" in told.stderr
    listed = json.loads((site / "site.json").read_text())
    assert {**listed["files"], "site.json": hashes(site)["site.json"]} == hashes(site)
    assert listed["runtime"]["wasm"]["sha256"] == hashes(site)["runtime/ort-wasm-simd-threaded.wasm"]
    assert "Microsoft" in (site / "runtime/LICENSE").read_text()
    assert edgeblocks.open_export(site / "network").sample(2, steps=2).shape == (2, 8, 8, 1)

    (site / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"files that are not of the page .*: notes\.txt"):
        export_page(digits, site, Silent(), runtime=runtime)
    (site / "notes.txt").unlink()
    shutil.rmtree(site / "network")
    with pytest.raises(ConfigError, match="holds a page already; add --force to replace it"):
        export_page(digits, site, Silent(), runtime=runtime)
    export_page(digits, site, Silent(), runtime=runtime, overwrite=True)
    assert (site / "network/manifest.json").exists()


def test_scripts_name_no_other_place():
    """No address of another machine is in what the page loads, and its policy lets the browser refuse one."""
    folder = web_page.resources.files("edgeblocks.export") / "web"
    for file in folder.iterdir():
        found = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", file.read_text()))
        assert not found, (file.name, found)
    assert "connect-src 'self'" in (folder / "index.html").read_text()


def test_one_destination_is_given(digits, tmp_path):
    """Both or none are wrong use, as are flags of one with the other."""
    for words, says in (
        ((), "-o DIR for the network's graphs, --web DIR"),
        (("-o", "a", "--web", "b"), "give one directory"),
        (("-o", "a", "--web-runtime", "b"), "--web-runtime belongs to --web"),
        (("--web", "a", "--single-file"), "leave it out with --web"),
    ):
        assert_refused(invoke("export", digits.path, *words), 2, says)


def test_a_destination_with_something_else_is_refused(digits, tmp_path):
    """A file, a folder with other things, and one whose site.json is another's."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        export_page(digits, tmp_path / "file", Silent())
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_text("")
    with pytest.raises(ConfigError, match="not a page that could be replaced"):
        export_page(digits, tmp_path / "photos", Silent())
    (tmp_path / "photos/site.json").write_text('{"kind": "another", "files": {"a.jpg": ""}}')
    with pytest.raises(ConfigError, match="of another kind"):
        export_page(digits, tmp_path / "photos", Silent())


def test_networks_that_a_browser_cannot_run_are_refused_before_anything_is_written(
    digits, runtime, tmp_path, monkeypatch
):
    """Too large a graph, with what would make it smaller; rounded weights of a chain in one graph; other tokenizers."""
    monkeypatch.setattr(web_page, "MOST_GRAPH_BYTES", 1_000)
    with pytest.raises(ConfigError, match=r"is more than the 1 KB that a page can load.*--weights int8"):
        export_page(digits, tmp_path / "site", Silent(), runtime=runtime)
    with pytest.raises(ConfigError, match="train with more blocks"):
        export_page(digits, tmp_path / "site", Silent(), runtime=runtime, weights="int4")
    monkeypatch.undo()
    tale = make_text_run(tmp_path / "tale", layers=(1,), family="ar", **TEXT).directory
    with pytest.raises(ConfigError, match="whose weights are float32; leave --weights out"):
        export_page(tale, tmp_path / "site", Silent(), runtime=runtime, weights="int8")
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize(
    ("part", "content"),
    [
        ("model", {"type": "WordLevel"}),
        ("added_tokens", [{"content": "<s>"}]),
        ("normalizer", {"type": "NFC"}),
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True}),
        ("decoder", {"type": "Metaspace"}),
    ],
)
def test_a_tokenizer_with_other_parts_is_not_plain(part, content):
    """The page reads byte pairs over bytes, and nothing else around them."""
    plain = {
        "model": {"type": "BPE"},
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "decoder": {"type": "ByteLevel"},
    }
    assert web_page._is_plain(plain)
    assert not web_page._is_plain({**plain, part: content})


def test_the_runtime_is_found_and_compared(runtime, tmp_path, monkeypatch):
    """In a folder, in what npm packs, and in the cache; of other content it is refused, and without npm it is said how
    to get it."""
    files = web_runtime.runtime_files(runtime, Silent())
    assert set(files) == {"LICENSE", "ThirdPartyNotices.txt", web_runtime.SCRIPT, web_runtime.WASM}
    with tarfile.open(tmp_path / "package.tgz", "w:gz") as archive:
        archive.add(runtime / "dist", "package/dist")
    assert web_runtime.runtime_files(tmp_path / "package.tgz", Silent()) == files

    monkeypatch.setenv("EDGEBLOCKS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"npm pack onnxruntime-web@1\.30\.0, and give the file .* --web-runtime"):
        web_runtime.runtime_files(None, Silent())
    shutil.copytree(runtime / "dist", tmp_path / "cache/onnxruntime-web-1.30.0")
    assert web_runtime.runtime_files(None, Silent()) == files

    (runtime / "dist" / web_runtime.SCRIPT).write_bytes(b"x" * len(files[web_runtime.SCRIPT]))
    with pytest.raises(ConfigError, match="is of other content"):
        web_runtime.runtime_files(runtime, Silent())
    (runtime / "dist" / web_runtime.WASM).unlink()
    with pytest.raises(ConfigError, match=r"other content|holds no"):
        web_runtime.runtime_files(runtime, Silent())
    (tmp_path / "no.tgz").write_text("no archive")
    for path, says in ((tmp_path / "none", "no such folder"), (tmp_path / "no.tgz", "is no package of npm")):
        with pytest.raises(ConfigError, match=says):
            web_runtime.runtime_files(path, Silent())


def test_npm_fetches_the_runtime_once(runtime, tmp_path, monkeypatch):
    """What npm packs is kept in the cache; what npm says when it cannot is told."""
    with tarfile.open(tmp_path / "package.tgz", "w:gz") as archive:
        archive.add(runtime / "dist", "package/dist")
    npm = tmp_path / "bin/npm"
    npm.parent.mkdir()
    npm.write_text(f"#!/bin/sh\n[ $2 = onnxruntime-web@1.30.0 ] && /bin/cp {tmp_path}/package.tgz .\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(npm.parent))
    monkeypatch.setenv("EDGEBLOCKS_CACHE", str(tmp_path / "cache"))
    files = web_runtime.runtime_files(None, Silent())
    npm.write_text("#!/bin/sh\necho no network >&2; exit 1\n")
    assert web_runtime.runtime_files(None, Silent()) == files
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(RunError, match=r"npm could not fetch .*: no network; .* --web-runtime"):
        web_runtime.runtime_files(None, Silent())
