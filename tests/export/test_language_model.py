"""Fine-tuned models as ONNX graphs: the text of torch, with a KV cache, torch-free, from folders that are checked."""

import json
import re
import shutil
import sys
from itertools import takewhile
from pathlib import Path

import numpy as np
import onnx
import pytest
from support.changed_export import changed_copy, manifest_with
from support.commands import assert_refused, invoke
from support.outside import measured, measured_script
from support.small_model import transformers, write_conversations, write_model

import edgeblocks
from edgeblocks.errors import ConfigError, DoesNotFitError, RunError
from edgeblocks.export.destination import check_destination
from edgeblocks.export.language_model import LanguageModel
from edgeblocks.export.manifest import sha256_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A model that answers; its heads have 16 values, which the graph's attention needs."""
    transformers()
    pytest.importorskip("onnxruntime_genai")
    folder = tmp_path_factory.mktemp("model")
    write_model(folder / "tiny", hidden_size=64)
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "!"}
    (folder / "tiny/tokenizer_config.json").write_text(json.dumps(kind))
    write_conversations(folder / "talk.jsonl")
    wanted = {"length": 48, "batch": 2, "steps": 20, "warmup": 0, "learning_rate": 1e-2, "mem_budget": "4GB"}
    return edgeblocks.finetune(folder / "tiny", data=str(folder / "talk.jsonl"), out=folder / "run", **wanted)


@pytest.fixture(scope="module", params=["fp32", "int8"])
def exported(request, tuned, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "graph"
    return out, tuned.export(out, weights=request.param)


def test_it_writes_what_torch_writes(exported, tuned, tmp_path):
    """In float32 every greedy token; the losses are those of torch, in 8 bits nearly."""
    out, manifest = exported
    verified, weights = manifest["verified"], manifest["weights"]
    assert verified["loss_graph"] == pytest.approx(verified["loss_torch"], rel=1e-4 if weights == "fp32" else 0.02)
    if weights == "fp32":
        assert verified["greedy_equal"] == verified["greedy_tokens"]
        prompt = "<user>the sea?"
        tuned.merge(tmp_path / "merged")
        with edgeblocks.writer(tmp_path / "merged", mem_budget="4GB") as writer:
            expected = writer.continued(prompt, temperature=0, length=40)
        assert LanguageModel(out).write(1, prompt=prompt, temperature=0, length=40) == expected
    assert json.loads((out / "genai_config.json").read_text())["model"]["type"] == "llama"


def test_onnxruntime_genai_writes_what_run_writes(exported):
    """Greedily, by the program in USE.md: until a text is full, and to the first token that its config calls an end."""
    out, manifest = exported
    (program,) = re.findall("```python\n(.*?)```", (out / "USE.md").read_text(), re.DOTALL)
    ends = set(json.loads((out / "genai_config.json").read_text())["model"]["eos_token_id"])
    model = LanguageModel(out)
    drawing = model.drawing(length=manifest["length"], temperature=0)
    for prompt in ("captain", "the sea"):
        told = measured(sys.executable, "-c", program.replace("Once upon a time", prompt), cwd=out)
        assert told["code"] == 0, told["err"]
        (written,) = model.written(model.tokenizer.encode(prompt), drawing, n=1)
        expected = model.tokenizer.decode(list(takewhile(lambda token: token not in ends, written)))
        assert told["out"] == f"{prompt}{expected}\n" and expected


def test_with_a_cache_logits_are_those_of_the_whole_text(exported):
    model = LanguageModel(exported[0])
    tokens = np.random.default_rng(0).integers(3, 70, (2, 12))
    whole, _ = model.logits(tokens, None)
    cache = None
    for start, stop in ((0, 5), (5, 6), (6, 12)):
        found, cache = model.logits(tokens[:, start:stop], cache)
        np.testing.assert_allclose(found, whole[:, start:stop], rtol=1e-3, atol=1e-3 * np.abs(whole).max())


def test_the_command_line(exported, tmp_path):
    """Texts, drawn by the seed; what does not belong to it is refused."""
    out = exported[0]
    asked = ["run", out, "--prompt", "the sea", "--n", "2", "--length", "20", "--seed", "3", "--threads", "1"]
    told = invoke(*asked, "--json")
    texts = json.loads(told.stdout)
    assert len(texts) == 2 and all(text.startswith("the sea") for text in texts)
    assert texts == json.loads(invoke(*asked, "--json").stdout)
    assert_refused(invoke(*asked, "--steps", "4"), 2, "no noise levels")
    assert_refused(invoke("run", out, "a.png"), 2, "takes no images")
    assert_refused(invoke("run", out, "--fill", "a _"), 2, "fill gaps")
    assert_refused(invoke("run", out, "--prompt", "a", "--length", "999"), 2, "knows 64 positions")
    assert_refused(invoke(*asked, "--mem-budget", "1MB"), 3, "takes at least")
    assert_refused(invoke("run", out, "-o", tmp_path / "a.png"), 2, "writes text")
    told = json.loads(invoke("info", out, "--json").stdout)
    assert (told["kind"], told["makes"], told["weights"]) == ("export", "continuation", exported[1]["weights"])


_OPENED = """
import json, sys
import edgeblocks
export = edgeblocks.open_export(sys.argv[1], threads=1)
print(json.dumps(export.write(2, prompt="the sea", length=20, seed=3, mem_budget="4GB")))
assert not {"torch", "transformers", "onnxruntime_genai"} & set(sys.modules)
"""


def test_programs_open_it_as_they_do_other_exports(exported, tmp_path):
    """The texts of `run`, without torch; what it does not make is refused with what it does."""
    out = exported[0]
    told = measured_script(_OPENED, out, cwd=tmp_path)
    assert told["code"] == 0, told["err"]
    asked = ["--prompt", "the sea", "--n", "2", "--length", "20", "--seed", "3", "--threads", "1", "--json"]
    assert json.loads(told["out"]) == json.loads(invoke("run", out, *asked).stdout)
    export = edgeblocks.open_export(str(out))
    assert (export.path, export.task, export.class_names) == (out, "continuation", ())
    with pytest.raises(ConfigError, match="makes text: use write in place of sample"):
        export.sample(1)


def test_a_former_one_is_replaced_when_asked(tuned, exported, tmp_path):
    """With --force, but not where other files are beside it, which would be lost."""
    check_destination(exported[0], overwrite=True)
    out = Path(shutil.copytree(exported[0], tmp_path / "out"))
    (out / "mine.txt").write_text("x")
    assert_refused(invoke("export", tuned.path, "-o", out, "--force"), 2, "files that are not of the export there")


def test_a_folder_from_elsewhere_is_checked(exported, tmp_path):
    """Every file, what the graph refers to, and what the manifest says of it."""

    def changed(change):
        return changed_copy(exported[0], tmp_path / "changed", change)

    def flip(name):
        def change(folder):
            content = bytearray((folder / name).read_bytes())
            content[-1] ^= 1
            (folder / name).write_bytes(content)

        return change

    def rewired(kind, domain):
        """Another operator in the graph, of which the manifest has the checksum."""

        def change(folder):
            graph = onnx.load(folder / "model.onnx", load_external_data=False)
            graph.graph.node[0].op_type, graph.graph.node[0].domain = kind, domain
            (folder / "model.onnx").write_bytes(graph.SerializeToString())
            path = folder / "manifest.json"
            content = json.loads(path.read_text())
            (one,) = (file for file in content["files"] if file["name"] == "model.onnx")
            one |= {"sha256": sha256_of(folder / "model.onnx"), "bytes": (folder / "model.onnx").stat().st_size}
            path.write_text(json.dumps(content))

        return change

    for change, said in (
        (rewired("Anything", "somebody.else"), "operators that are not onnx's own, of 'somebody.else'"),
        (rewired("Loop", ""), "has a loop"),
        (flip("model.onnx.data"), "does not match its checksum"),
        (flip("tokenizer.json"), "does not match its checksum"),
        (lambda folder: (folder / "model.onnx").unlink(), "cannot read"),
        (manifest_with(verified=None), "never finished"),
        (manifest_with(layers=0), "layers"),
        (manifest_with(files=[]), "does not list model.onnx"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "cannot be read"),
    ):
        with pytest.raises(RunError, match=said):
            LanguageModel(changed(change))
    other = changed(manifest_with(layers=3))
    with pytest.raises(RunError, match=r"cannot run|of another model"):
        LanguageModel(other).write(1, prompt="the sea", length=12)


def test_what_cannot_be_exported_is_said(tuned, exported, tmp_path, monkeypatch):
    assert_refused(
        invoke("export", tuned.path, "-o", exported[0]), 2, "holds an export already; add --force to replace"
    )
    assert_refused(invoke("export", tuned.path, "-o", tmp_path / "x", "--weights", "int2"), 2, "int8, int4 or fp32")
    with pytest.raises(DoesNotFitError, match="holds the whole model"):
        tuned.export(tmp_path / "x", mem_budget="100MB")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"edgeblocks\[genai\]"):
        tuned.export(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_the_builder_does_not_know_is_refused_in_its_words(tuned, tmp_path, monkeypatch):
    """Nothing is left behind."""
    monkeypatch.setattr("edgeblocks.export.export_model.BUILDER", "edgeblocks.no_such_module")
    with pytest.raises(RunError, match="does not convert the model"):
        tuned.export(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
