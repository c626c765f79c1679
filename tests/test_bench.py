"""Every program in tests/bench runs, on something tiny, so that none of them is found broken when it is needed.

What they measure says nothing at this size. Constants that name large networks are made small; the rest is as it is.
"""

import gzip
import importlib
import json
import os
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from support.browser import needs_browser
from support.random_run import make_run
from support.small_model import write_conversations, write_model
from support.web_runtime import needs_runtime, real_runtime

import edgeblocks
from edgeblocks.export.web_page import export_page
from edgeblocks.progress import Silent
from edgeblocks.tuning import tuning_settings

ROOT = Path(__file__).parents[1]
TINY = {"width": 32, "heads": 2, "depth": 2, "batch": 8}
CHANGES = [part for name, value in TINY.items() for part in ("--set", f"{name}={value}")]


@pytest.fixture
def bench(monkeypatch, capsys, tmp_path):
    """Runs one of the programs with arguments, in `tmp_path`; gives what it printed."""
    monkeypatch.chdir(tmp_path)
    # `budget_grid` sets it; the tests that follow have their traced costs and exported graphs in this one.
    monkeypatch.setenv("EDGEBLOCKS_CACHE", os.environ["EDGEBLOCKS_CACHE"])

    def run(name, *arguments, **constants):
        program = importlib.import_module(name)
        for constant, value in constants.items():
            assert hasattr(program, constant)
            monkeypatch.setattr(program, constant, value)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        assert not program.main()
        return capsys.readouterr().out

    return run


def test_each_program_is_run_here():
    programs = {path.stem for path in (ROOT / "tests/bench").glob("*.py")}
    text = Path(__file__).read_text()
    assert programs == {name for name in programs if f'bench("{name}"' in text} | {"plain", "gpu_table"}  # of others


def test_budget_grid(bench, tmp_path):
    """The ample budget is measured; the others are in the file already, as from a run that was stopped."""
    shape = {"family": "vit", **TINY, "image": 8, "channels": 1, "patch": 4}
    known = {"shape": 0, **shape, "code": 1, "error": "stopped", "budget_bytes": 1, "peak_bytes": 0, "seconds": 0}
    lines = [json.dumps({**known, "kind": kind}) for kind in ("smallest", "between")]
    (tmp_path / "grid.jsonl").write_text("\n".join(lines) + "\n")
    told = bench("budget_grid", "grid.jsonl", "--table", "grid.md", SHAPES=(shape,))
    rows = [json.loads(line) for line in (tmp_path / "grid.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows if row["code"] == 0] == ["ample"], told
    assert "| vit | 32 |" in (tmp_path / "grid.md").read_text()


@pytest.mark.parametrize("nodes", [(0,), pytest.param((1, 3), marks=pytest.mark.thorough)])
def test_cluster(bench, nodes):
    """In one process, and on nodes, whose own peaks are told then."""
    small = {**TINY, "blocks": 3, "depth": 3, "data": "digits", "shared": 0, "sample_grids": 0, "hold_out": 0.005}
    told = bench("cluster", "--steps", 2, "--rounds", 1, "--nodes", *nodes, HOW={**small, "mem_budget": "1GB"})
    rows = [line.strip("| ").split(" | ") for line in told.splitlines() if "process |" in line or "node" in line][1:]
    assert len(rows) == len(nodes), told
    assert all((row[5:] == ["-", "-"]) == (row[0] == "one process") for row in rows), told


def test_compiled_block(bench, monkeypatch):
    """With a compiler that gives the function back: compiling takes half a minute."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    told = bench("compiled_block", "--family", "vit", *CHANGES, "--set", "patch=8", "--blocks", 2, "--rounds", 1)
    assert "compiled / as it is" in told


def test_fashion_mnist(bench, tmp_path):
    for name, shape in {"train-images-idx3": (3, 4, 4), "train-labels-idx1": (3,)}.items():
        for part, size in (("train", 3), ("t10k", 2)):
            header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), size, *shape[1:])
            content = gzip.compress(header + bytes(range(size * int(np.prod(shape[1:])))))
            (tmp_path / f"{name.replace('train', part)}-ubyte.gz").write_bytes(content)
    bench("fashion_mnist", "out.npz", FOLDER=tmp_path)
    with np.load(tmp_path / "out.npz") as found:
        assert found["x_train"].shape == (3, 4, 4) and found["y_test"].tolist() == [0, 1]


def test_four_arms(bench, tmp_path):
    """The tables are tested where they are used."""
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "fashion.npz", images=images, labels=np.arange(64) % 4)
    tiny = {"SETTINGS": {"vit": {**TINY, "patch": 4}}, "TRAININGS": tmp_path / "rows.jsonl", "EXAMPLES": {"vit": 4}}
    tiny |= {"CURVES": tmp_path / "curves.png", "STEPS": {"vit": 2}}
    bench("four_arms", "fashion.npz", "--task", "vit", "--steps", 2, "--seeds", 0, tables=dict, **tiny)
    assert not (tmp_path / "curves.png").exists()
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    ways = [(row["method"], row.get("grow") or row["blocks"], row["shared"]) for row in rows]
    assert ways.pop() == ("boostresnet", 1, 0.0)
    alone = [("diffusion", 2, 0.0), ("diffusion", 2, 0.8), ("diffusion", 1, 0.0)]
    assert ways == [*alone, *[("exact", 1, 0.0)] * 2, ("greedy", "auto", 0.0), ("greedy", "equal", 0.0)]
    longer = ["--steps", 8, "--arms", "plain, short", "--rates", 1e-3, 1e-2]
    bench("four_arms", "fashion.npz", "--task", "vit", "--seeds", 0, *longer, tables=dict, **tiny)
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_frozen_blocks(bench):
    tiny = {"FAMILIES": {"vit": {**TINY, "data": "digits", "depth": 4, "hold_out": 0.02}}, "EXAMPLES": 2, "ROUNDS": 1}
    assert "| vit | " in bench("frozen_blocks", "--families", "vit", "--steps", 2, **tiny)


def test_tuning(bench, tmp_path):
    """One arm of either side; and the conversations that it is measured on, of a page like that of the package."""
    write_model(tmp_path / "model")
    write_conversations(tmp_path / "chat.jsonl")
    asked = ["model", "chat.jsonl", "--length", 24, "--batch", 2]
    plain, ours = (json.loads(bench("tuning", *asked, "--arm", arm)) for arm in ("transformers", "full:4GB"))
    assert ours["losses"] == pytest.approx(plain["losses"], rel=0.02) and len(plain["losses"]) == 2
    assert ours["units"] > 0 and plain["units"] > 0
    title = '<h2 class="title"><a id="x"></a>1.1. What is {}?</h2>'
    page = "".join(title.format(name) + f"<p>The answer to {name} &amp; more.</p>" for name in ("a", "b"))
    (tmp_path / "one.en.html").write_text(f'{page}<div class="navfooter">')
    bench("debian_faq", "faq.jsonl", FOLDER=tmp_path)
    (_, answer), _ = (json.loads(line)["messages"] for line in (tmp_path / "faq.jsonl").read_text().splitlines())
    assert answer == {"role": "assistant", "content": "The answer to a & more."}


def test_tuning_grid(bench):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    small = {"MODELS": {"tiny": shape}, "VOCABULARIES": {"tiny": 128}, "SHAPES": ((16, 2),), "KINDS": ("ample",)}
    told = bench("tuning_grid", "grid.jsonl", "--table", "grid.md", **small, TUNES=("blocks",), STEPS=2)
    assert "1 runs, 0 failed; within the budget: 1 of 1" in told
    assert "| tiny | 16 | 2 | blocks | 8000 |" in Path("grid.md").read_text()


def test_small_vit(bench, tmp_path, one_thread):
    """What it writes can be fine-tuned, as can the same with random weights."""
    images, labels = np.random.default_rng(0).integers(0, 256, (50, 28, 28), dtype=np.uint8), np.arange(50) % 10
    np.savez(tmp_path / "fashion.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    assert "of the test pictures" in bench("small_vit", "fashion.npz", "small-vit", STEPS=2, BATCH=4)
    for folder in ("small-vit", "small-vit-random"):
        asked = tuning_settings(tmp_path / folder, {})
        assert (asked["family"], asked["image_size"]) == ("hf-vision", 28)


def test_fuzz_readers(bench):
    assert "| block file | 3 |" in bench("fuzz_readers", "block file", "--cases", 3)


GPU = {
    "SHAPES": {"dit": {**TINY, "patch": 8, "hold_out": 0.02}, "ar": {**TINY, "length": 16, "hold_out": 0.005}},
    "LARGEST": {"depth": 12, "batch": 8, "patch": 8, "hold_out": 0.02},
    "WIDTHS": (32, 512),
    "HEAD_WIDTH": 16,
    "UPDATED_PARAMETERS": 2**14,
    "TIMED_STEPS": 2,
    "TRAINED_STEPS": 2,
}


def test_gpu(bench, tmp_path):
    """All of it on a device made of a processor, with peaks within the plans: figures, and their table in a page."""
    page, tests = tmp_path / "gpu.md", tmp_path / "test_two.py"
    page.write_text("# On a GPU\n\n<!-- gpu.py begins -->\nnot yet\n<!-- gpu.py ends -->\n\n## The rest\n")
    marked = "import pytest\n@pytest.mark.gpu\ndef test_one(): assert {}\n@pytest.mark.gpu\ndef test_two(): pass\n"
    tests.write_text(marked.format(False))
    given = "--target stand-in --mem-budget 2GB --precision fp32 --families ar --methods exact --precisions bf16"
    bench("gpu", *given.split(), "--largest-budget", "120MB", "--tests", tests, "--docs", page, **GPU)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["left_out"] == []
    assert [found["tests"][name] for name in ("tests", "failures", "skipped")] == [2, 1, 0]
    trained = [(row["family"], row["method"], row["precision"]) for row in found["trainings"]]
    assert trained == [("ar", "exact", "bf16")]
    assert all(0 < row["peak_bytes"] <= row["predicted_peak_bytes"] for row in found["trainings"])
    assert [row["arm"].split()[0] for row in found["times"]] == ["diffusion", "exact", "an", "with"]
    assert all(row["step_s"] > 0 and row["peak_bytes"] > 0 for row in found["times"])
    assert set(found["updates"]) >= {"8-bit by ours, chunks of 2 Mi", "fp32 by torch's kernel"}
    assert found["largest"]["width"] == 32 and found["largest"]["peak_bytes"] > 0
    text = page.read_text()
    assert "not yet" not in text and text.endswith("<!-- gpu.py ends -->\n\n## The rest\n")
    assert "Tests marked `gpu`: 1 passed, 1 failed, 0 skipped." in text and "| ar | exact | bf16 |" in text
    assert "an ordinary loop | " in text and "of 12 layers in 120MB has width 32" in text


def test_gpu_ends_in_time(bench, tmp_path):
    """What there is no time for is left out, and said so in the results and the table."""
    told = bench("gpu", "--target", "stand-in", "--minutes", 0, **GPU)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {one["why"] for one in found["left_out"]} == {"the time was up"}
    assert "Left out: training of ar by exact in fp32 (the time was up)." in told and "trainings" not in found


@pytest.mark.skipif(sys.platform != "linux", reason="the campaign forks its processes and looks into /proc")
def test_kill_campaign(bench):
    assert "1 x SIGKILL" in bench("kill_campaign", "--kills", 1)


def test_rounded_update(bench):
    told = bench("rounded_update", "--layers", 1, "--rounds", 1, WIDTH=64)
    assert [line.partition(",")[0] for line in told.splitlines()] == ["adamw8bit", "adamw"]
    assert told.count("ns a parameter, bf16") == 2


def test_one_file(bench):
    """Times of both batches, and the peaks of three processes."""
    small = {**TINY, "blocks": 2}
    told = bench("one_file", "--families", "dit", "--rounds", 1, SHAPE=small, BATCHES=(1, 2))
    rows = [line.split(" | ") for line in told.splitlines() if line.startswith("| dit")]
    assert [len(row) for row in rows] == [5, 5, 5] and all(int(peak.strip(" |")) > 30 for peak in rows[2][2:])


def test_rounded_export(bench):
    """A row of float32 and one of 8 bits."""
    asked = ("--families", "vit", "--steps", 1, "--rounds", 1)
    told = bench("rounded_export", *asked, SHAPE=TINY, WEIGHTS=("fp32", "int8"))
    rows = [line.split(" | ") for line in told.splitlines() if line.startswith("| `vit`")]
    assert [len(row) for row in rows] == [8, 8] and all(float(row[7].strip(" |")) > 0 for row in rows)


def test_scaling(bench, tmp_path):
    """The table from what was measured, as it is in docs/; and one more measurement."""
    shutil.copy(ROOT / "docs/scaling.jsonl", tmp_path)
    bench("scaling", "scaling.jsonl", "--docs", tmp_path)
    tables = [[line for line in path.read_text().splitlines() if line.startswith("|")] for path in
              (tmp_path / "scaling.md", ROOT / "docs/scaling.md")]  # fmt: skip
    assert tables[0] == tables[1] and len(tables[0]) > 30
    (row,) = importlib.import_module("scaling").measured({"depth": 2, "width": 32, "batch": 4}, 3, arms=("plain",))
    assert row["failure"] is None and row["step_s"] > 0


def test_state_of_the_union(bench, tmp_path):
    (tmp_path / "package/data").mkdir(parents=True)
    for year in (1791, 1790):
        (tmp_path / f"package/data/{year}.json").write_text(json.dumps({"text": f"of {year}", "year": year}))
    bench("state_of_the_union", "package", "out.jsonl")
    texts = [json.loads(line)["text"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert texts == ["of 1790", "of 1791"]


def test_step_times(bench, tmp_path):
    """A case is planned and trained twice; the table has its times and says whether they were in the plan's range."""
    case = {**TINY, "steps": 6, "data": "digits"}
    told = bench("step_times", "times.jsonl", "--case", "tiny", CASES={"tiny": case})
    row = {"case": "tiny", **json.loads(told.splitlines()[-1])}
    assert [run["measured_s"] > 0 for run in row["runs"]] == [True, True]
    (tmp_path / "times.jsonl").write_text(json.dumps(row) + "\n")
    bench("step_times", "times.jsonl", "--only", "--table", "times.md", CASES={"tiny": case})
    assert (tmp_path / "times.md").read_text().splitlines()[2].startswith("| tiny | ")


def test_text_compressors(bench, tmp_path):
    (tmp_path / "sea.txt").write_text(" ".join(np.random.default_rng(0).choice(["white", "whale", "sea"], 2000)))
    assert "zlib" in bench("text_compressors", "sea.txt")


def test_text_curve(bench, tmp_path):
    """A training in one stretch, its row, the table and the picture."""
    (tmp_path / "sea.txt").write_text(" ".join(np.random.default_rng(0).choice(["white", "whale", "sea"], 2000)))
    wanted = {**TINY, "length": 16, "hold_out": 0.02}
    # The processes that it starts take what this one, which has torch in memory, finds of the costs.
    edgeblocks.plan(family="ar", data="sea.txt", steps=2, mem_budget="4GB", **wanted)
    given = [part for name, value in wanted.items() for part in ("--set", f"{name}={value}")]
    bench("text_curve", "ar", "curve.jsonl", "--data", "sea.txt", "--out", "run", "--steps", 2, "--samples", 2, *given,
          "--table", "curve.md", "--plot", "curve.png")  # fmt: skip
    assert "## ar" in (tmp_path / "curve.md").read_text() and (tmp_path / "curve.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "what",
    [["time", "--precision", "bf16"], ["exact"], ["arm", "--arm", "plain+ckpt+8bit"]],
    ids=lambda words: words[0],
)
def test_versus_plain(bench, what):
    """Trainers and ordinary loops in turns, and one arm of the memory's table."""
    shape = [*CHANGES, "--set", "patch=8"]
    told = bench("versus_plain", *what, "--family", "vit", *shape, "--blocks", 2, "--rounds", 1)
    assert ("median" in told) == (what[0] != "arm") and told


@needs_browser
@needs_runtime
def test_web_page(bench, tmp_path):
    """The page of random digits: a row, and four pictures of it."""
    run = make_run(tmp_path / "run", layers=(1,), width=16, heads=2)
    export_page(run.directory, tmp_path / "site", Silent(), runtime=real_runtime())
    told = bench("web_page", "site", "--rounds", 1, "--shots", "shots")
    row = told.splitlines()[-1].replace("/", "|").strip("| ").split("|")
    assert [float(cell) > 0 for cell in row] == [True] * 9
    assert len(list((tmp_path / "shots").glob("*.png"))) == 4
