"""What the README and the pages of docs/ promise can be typed as it stands."""

import re
import shlex
import shutil
from itertools import pairwise

import numpy as np
import pytest
import typer
from PIL import Image
from support.commands import invoke
from support.pages import PAGES, ROOT, blocks_in_order, code_after, command_words, commands, links, page, rows
from support.small_autoencoder import write_autoencoder
from support.small_model import write_conversations, write_model

from edgeblocks.cli.main import app
from edgeblocks.registry import family_type, profile_names, target_names
from edgeblocks.settings.fields import RunSettings
from edgeblocks.settings.presets import load_preset, preset_names
from edgeblocks.settings.table import as_markdown, family_settings, run_settings


def family_defaults():
    """{setting: {family: default}} of what only a family has."""
    found = {}
    for family in ("dit", "vit", "mdlm", "ar", "looped"):
        for name, value in vars(family_type(family).settings_type()).items():
            found.setdefault(name, {})[family] = value
    return found


@pytest.mark.slow
def test_the_python_examples_work_in_their_order(tmp_path, monkeypatch, capsys, one_thread):
    """The README's lines, those of docs/python.md and of docs/several_machines.md.

    But for their budget, which this process alone passes, and the size of the network, which takes seconds to train.
    """
    first = code_after("test: python")
    assert first in page("docs/python.md")
    monkeypatch.chdir(tmp_path)
    names = ("network", "summary", "several machines", "arrays", "pictures", "strings", "errors", "listener")
    others = [code_after(f"test: python, {name}") for name in names]
    parts = [first, "assert images.shape == (16, 8, 8, 1), images.shape", *others]
    code = "\n".join(parts).replace('"1GB"', '"4GB"')
    exec(code.replace('(data="digits", ', '(data="digits", width=32, heads=2, depth=6, hold_out=0.1, '), {})
    assert (tmp_path / "runs/python-onnx/manifest.json").exists()
    lines = capsys.readouterr().out.splitlines()
    printed = re.findall(r"# (\(.*depht.*\))", page("docs/python.md"))
    assert printed and printed[0].replace('"', "").strip("(,)") in "".join(lines).replace('"', "")
    assert sum(bool(re.match(r"this needs \d+ MB$", line)) for line in lines) == 1
    assert sum(line.startswith(("0 1 {", "2 2 {")) for line in lines) == 2


SMALL = ["--mem-budget", "4GB", "--steps", "2", "--batch", "4", "--set", "sample_grids=0", "--set", "warmup=0"]
SMALL += [part for key in ("depth=4", "width=16", "heads=2", "hold_out=0.1") for part in ("--set", key)]
SMALL_IMAGES = ["--set", "image_size=8"]
SMALL_TEXT = ["--set", "length=32", "--set", "hold_out=0.0005"]


def small(words):
    """A command as a page has it, but for a network and a training that take a second."""
    if words[0] == "finetune":
        return [*words, "--steps", "2", "--length", "24", "--batch", "2", "--mem-budget", "4GB"]
    if words[0] not in ("plan", "train") or "--resume" in words:
        return [*words, "--samples", "4"] if words[0] == "eval" else words
    return [*words, *SMALL, *(SMALL_TEXT if words[1] in ("mdlm", "ar", "looped") else SMALL_IMAGES)]


@pytest.fixture(scope="module")
def a_users_folder(tmp_path_factory):
    """Pictures of three classes in photos/ and more/, and one in new/, models in smollm2/ and sd-vae/, and
    conversations."""
    folder, rng = tmp_path_factory.mktemp("user"), np.random.default_rng(0)
    for name in ("photos/cat", "photos/dog", "photos/owl", "more/cat", "more/dog", "more/owl", "new"):
        (folder / name).mkdir(parents=True)
        for number in range(1 if name == "new" else 8):
            picture = Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8))
            picture.save(folder / name / f"{number}.jpg")
    write_model(folder / "smollm2")
    write_autoencoder(folder / "sd-vae")
    write_conversations(folder / "chat.jsonl")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["README.md", "docs/exact.md", "docs/images.md", "docs/latents.md", "docs/several_machines.md"]
)
def test_the_blocks_of_a_page_work_in_their_order(name, a_users_folder, tmp_path, monkeypatch, one_thread):
    """Each command and each Python block does its work on what those before it on the page have made."""
    for made in a_users_folder.iterdir():
        (tmp_path / made.name).symlink_to(made)
    monkeypatch.chdir(tmp_path)
    seen = []
    for language, code in blocks_in_order(name):
        if language == "python" and "edgeblocks.train(" not in code:  # what trains is run as printed, above
            exec(code, {})
        for line in code.splitlines() if language == "bash" else ():
            if line.startswith("cp -r "):
                shutil.copytree(*shlex.split(line.partition(" #")[0])[2:])
            for words in command_words(line):
                files = [str(path) for word in words if "*" in word for path in tmp_path.glob(word)]
                done = invoke(*small([word for word in words if "*" not in word]), *files)
                assert done.exit_code == 0, (words, done.output)
                seen.append(words[0])
    assert {"plan", "train"} <= set(seen), seen


def test_every_command_has_valid_options_and_settings():
    """Each `edgeblocks VERB` line uses only options, settings, presets and machines that exist."""
    verbs = typer.main.get_command(app).commands
    settings = {*RunSettings.model_fields, *family_defaults()}
    values = {"--preset": preset_names(), "--target": (*target_names(), *profile_names(), "auto", "NAME")}
    values["--set"] = (*settings, "key", "..")
    seen = set()
    for name, verb, words in commands():
        shown = f"{name}: edgeblocks {verb} {' '.join(words)}"
        assert verb in verbs, shown
        options = {option for parameter in verbs[verb].params for option in parameter.opts}
        for word, value in pairwise([*words, ""]):
            if word.startswith("-"):
                assert word in options | {"--help"}, shown
            if word in values:
                assert value.partition("=")[0] in values[word], shown
        seen.add(verb)
    assert seen == set(verbs), f"no page shows {set(verbs) - seen}"


def test_settings_in_running_text_exist():
    """Each `--set key=value` outside of a command, too."""
    settings = {*RunSettings.model_fields, *family_defaults(), "key", "kernel"}  # `kernel`: own_family.md's own
    for path, text in PAGES.items():
        for key in re.findall(r"`--set ([\w-]+)=", text):
            assert key.replace("-", "_") in settings, f"{path.name}: --set {key}"


def test_relative_links_and_pictures_exist():
    """No link of a page points to a file that is not there."""
    found = list(links())
    assert len(found) > 50
    for path, target in found:
        assert (path.parent / target).exists(), f"{path.name}: {target}"
    assert (ROOT / "docs/digits.png").stat().st_size > 1000


def test_the_page_of_settings_has_all_of_them_with_their_defaults():
    """Of runs and of families as `edgeblocks settings --markdown` prints them, and the presets."""
    types = {name: family_type(name).settings_type for name in ("ar", "dit", "looped", "mdlm", "vit")}
    for heading, table in (("Of every run", run_settings()), ("Of a family", family_settings(types))):
        assert f"## {heading}\n\n{as_markdown(table)}\n" in page("docs/settings.md"), heading

    told = {name.strip("`"): numbers for name, *numbers in rows("docs/settings.md", "Presets")}
    assert told == {
        name: [str({"batch": 64, **load_preset(name)}[key]) for key in ("width", "depth", "heads", "steps", "batch")]
        for name in preset_names()
    }


def test_files_that_the_architecture_names_exist():
    """Each path in backticks on that page and in CONTRIBUTING.md, in the package or at the top of the project."""
    places = [ROOT / "edgeblocks", ROOT]
    text = page("docs/ARCHITECTURE.md") + page("CONTRIBUTING.md")
    paths = re.findall(r"`((?:\w+/)*\w+(?:\.py|\.toml|/))`", text)
    assert len(paths) > 60
    missing = [path for path in paths if "NAME" not in path and not any((place / path).exists() for place in places)]
    assert not missing
