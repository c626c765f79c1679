"""The page of a run: what it tells, that it needs nothing else, and that nothing in a run can get out of its place."""

import hashlib
import html
import json
import re
import shutil
import warnings
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support.equality import StopAfter
from typer.testing import CliRunner

import edgeblocks
from edgeblocks.cli.main import app
from edgeblocks.errors import InterruptedRunError
from edgeblocks.progress import Silent
from edgeblocks.report.bars import Part, stacked_bar
from edgeblocks.report.figures import Reference, Series, line_figure, moving_mean
from edgeblocks.report.previews import MOST_PREVIEWS, read_previews
from edgeblocks.runs.locks import locked
from edgeblocks.units import format_bytes, format_duration

pytestmark = pytest.mark.usefixtures("one_thread")

COMMON = {"mem_budget": "4GB", "width": 16, "depth": 3, "batch": 4, "steps": 12, "sample_steps": 3}
IMAGES = {**COMMON, "family": "dit", "data": "digits", "blocks": 2, "visit_steps": 3, "sample_grids": 2}
IMAGES |= {"hold_out": 0.005}
TEXT = {**COMMON, "family": "mdlm", "data": "moby-dick", "length": 16, "hold_out": 0.00005, "sample_grids": 1}
KINDS = {"dit": IMAGES, "exact": {**IMAGES, "method": "exact"}, "vit": {**IMAGES, "family": "vit", "sample_grids": 0}}
# Other tests' shapes, whose costs may have been traced already.
KINDS["vit"] |= {"width": 32, "heads": 2, "depth": 6, "patch": 4, "batch": 16}
KINDS["mdlm"] = {**TEXT, "blocks": 2, "width": 32, "heads": 2, "batch": 4, "micro_batch": 2}
VOID = {"meta", "img"}
SCRIPT = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs by kind, each trained when it is first asked for."""
    made = {}

    def run(kind):
        if kind not in made:
            out = tmp_path_factory.mktemp(kind) / "run"
            made[kind] = edgeblocks.train(out=out, listener=Silent(), **KINDS[kind]).path
        return made[kind]

    return run


@pytest.fixture
def copy(runs, tmp_path):
    """A copy of the `dit` run that a test may change."""
    return Path(shutil.copytree(runs("dit"), tmp_path / "copy"))


def invoke(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def page_of(run, tmp_path):
    """The page that the command writes."""
    out = tmp_path / "page.html"
    done = invoke(run, "-o", out)
    assert done.exit_code == 0, (done.output, done.exception)
    return out.read_text(encoding="utf-8")


def words_of(page):
    """What a reader sees, on one line."""
    text = re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(text).split())


def change_json(path, change):
    content = json.loads(path.read_text())
    content.pop("sha256", None)
    change(content)
    path.write_text(json.dumps(content))


class Outline(HTMLParser):
    """Checks that every element is closed where it should be, and keeps addresses, names and headings."""

    def __init__(self, page):
        super().__init__()
        self.open, self.addresses, self.names, self.headings, self.scripts = [], [], [], [], 0
        self.feed(page)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "srcset", "data", "poster"):
                self.addresses.append(value)
            if name == "id":
                self.names.append(value)
            assert not name.startswith("on"), f"{tag} has {name}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append(data)


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_tells_what_the_summary_tells(runs, tmp_path, kind):
    """Peak, budget, step time, disk, times and losses stand in the page as the summary has them, under their heads."""
    run = runs(kind)
    page = page_of(run, tmp_path)
    summary = json.loads((run / "summary.json").read_text())
    plan = json.loads((run / "plan.json").read_text())
    words = words_of(page)
    for size in ("peak_bytes", "predicted_peak_bytes", "budget_bytes", "disk_bytes", "disk_bytes_written"):
        assert format_bytes(summary[size]) in words, size
    for time in ("seconds", "step_s", "predicted_step_s"):
        assert format_duration(summary[time]) in words, time
    for part in ("compute", "data", "load", "store"):
        assert format_duration(summary["time_split"][part]) in words, part
    for size in plan["breakdown"].values():
        assert not size or format_bytes(size) in words
    assert f"{summary['metrics']['validation_loss']:.4g}" in words
    assert "accuracy (top 1)" not in words  # of single blocks, which are shown the label under noise: not the chain's
    assert "Finished: " in words and "12 steps" in words
    headings = Outline(page).headings
    for title in ("Plan against measured", "Training loss", "Memory against the budget over time", "Time", "Settings"):
        assert title in headings
    assert ("Validation loss per noise level" in headings) == (len(summary["metrics"]["validation"]["levels"]) > 1)
    of_text = "text" in summary["metrics"]
    assert ("vocab" in words.split(), "image_size" in words.split()) == (of_text, not of_text)
    if of_text:
        assert f"{summary['metrics']['text']['bits_per_character']:.3f}" in words
    for look in (run / "samples").iterdir():
        assert f"after {int(look.stem.removeprefix('step_'))} steps" in headings


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_needs_nothing_else(runs, tmp_path, kind):
    """No script, no address but embedded pictures and places in the drawings, and every drawing is sound SVG."""
    page = page_of(runs(kind), tmp_path)
    outline = Outline(page)
    assert outline.scripts == 0 and "http:" not in page and "https:" not in page and "@import" not in page
    for address in outline.addresses + re.findall(r"url\(([^)]*)\)", page):
        assert address.startswith("data:image/png;base64,") or address[1:] in outline.names, address[:60]
        assert address.startswith(("data:", "#"))
    assert len(outline.names) == len(set(outline.names))
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) >= 2
    for drawing in drawings:
        ElementTree.fromstring(drawing)
        assert not re.findall(r"#[0-9a-f]{6}\b", drawing), "a colour that dark pages cannot change"
    assert page.count('role="img" aria-label="') == len(drawings) + 2  # and the two bars


def test_nothing_that_a_run_brings_along_is_more_than_text(runs, copy, tmp_path):
    """Names of classes and folders, texts of samples, warnings and versions with HTML in them are shown as they are."""
    hostile = copy.rename(tmp_path / "<img src=x onerror=alert(1)>")
    (hostile / "samples/step_0000012.png").unlink()
    (hostile / "samples/step_0000006.png").unlink()
    (hostile / "samples/step_0000012.txt").write_text(f"{SCRIPT}</pre>\n----\n&amp;")

    def change(manifest):
        manifest["class_names"] = [SCRIPT] * 10
        manifest["data"]["source"] = f"/pictures/{SCRIPT}"

    change_json(hostile / "manifest.json", change)
    change_json(hostile / "plan.json", lambda plan: plan.update(warnings=[SCRIPT]))
    change_json(hostile / "env.json", lambda found: found.update({SCRIPT: SCRIPT, "platform": '"><svg onload=x>'}))
    page = page_of(hostile, tmp_path)
    outline = Outline(page)
    assert outline.scripts == 0 and "<img src=x" not in page and "<svg onload" not in page
    shown = html.unescape(page)
    assert shown.count(SCRIPT) >= 14 and "<img src=x onerror=alert(1)>" in shown
    assert html.escape(SCRIPT) in page and "&amp;amp;" in page


def test_what_has_html_in_its_name_can_be_drawn():
    """Labels, titles and captions of figures and bars, also with the signs of formulas."""
    for label in (SCRIPT, "$\\frac{1}{2}$", 'a"b', "_hidden"):
        figure = line_figure(
            [Series(label=label, x=[1, 2], y=[1, 2]), Series(label="b", x=[1], y=[2])],
            title=label,
            x_label=label,
            y_label=label,
            caption=label,
            references=[Reference(label=label, value=1)],
        )
        bar = stacked_bar([Part(label=label, value=1)], title=label, write=str, caption=label)
        for piece in (figure, bar):
            assert Outline(piece).scripts == 0
            assert html.unescape(piece).count(label) >= 3
        assert html.escape(label, quote=False) in figure


def test_an_unfinished_run_is_shown_as_far_as_it_is(tmp_path):
    """Interrupted in the middle: its steps, losses, memory and pictures are there; what is not known is said."""
    for kind, words in (("dit", "blocks are saved at steps 6, 5 of 12"), ("exact", "saved at step 11 of 12")):
        with pytest.raises(InterruptedRunError):
            edgeblocks.train(out=tmp_path / kind, listener=StopAfter(11), **KINDS[kind])
        done = invoke(tmp_path / kind, "--json")
        told = json.loads(done.stdout)
        assert told["finished"] is False and sum(told["steps"]) in (11, 22)
        page = (tmp_path / kind / "report.html").read_text()
        assert words in words_of(page)
        assert "known when the run is finished" in page and "budget" in page
        headings = Outline(page).headings
        assert "Training loss" in headings and "Validation loss per noise level" not in headings
        assert ("after 6 steps" in headings) == (tmp_path / kind / "samples/step_0000006.png").exists()


def test_a_run_without_a_step_is_shown(copy, tmp_path):
    """As a run is when it was stopped before its first record."""
    for name in ("metrics.jsonl", "summary.json"):
        (copy / name).unlink()
    shutil.rmtree(copy / "samples")
    words = words_of(page_of(copy, tmp_path))
    assert "Nothing to draw" in words and "There are no records yet" in words and "no samples yet" in words


def test_records_of_an_earlier_version_have_losses_and_no_times(copy, tmp_path):
    """They are drawn against steps, and the page says why memory over time is not."""
    path = copy / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        del record["seconds"], record["used_bytes"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    page = page_of(copy, tmp_path)
    assert "it was trained by an earlier edgeblocks" in words_of(page)
    assert "Training loss: loss of a step&#39;s batch against steps of the block" in page
    (copy / "summary.json").unlink()
    edgeblocks.load(copy).directory.forget_summary()
    edgeblocks.resume(copy, reinit_blocks=[1], listener=Silent())
    assert all(record.seconds is None for record in edgeblocks.load(copy).directory.records())


def test_lines_that_are_no_records_are_passed_over(copy, tmp_path):
    """Values of other types, of blocks that do not exist, NaN and half a line: the page has what is sound."""
    odd = [{"block": 0, "step": "1", "loss": 1.0}, {"block": 9, "step": 1, "loss": 1.0}, {"step": 1}, [], 7]
    odd += [{"block": 0, "step": 1, "loss": "nan"}, {"block": 0, "step": 1, "loss": 1.0, "seconds": -1}]
    lines = [json.dumps(line) for line in odd] + ['{"block": 0, "step": 2, "loss": NaN}', '{"block": 0, "st']
    (copy / "metrics.jsonl").write_text("\n".join(lines))
    assert "Nothing to draw" in page_of(copy, tmp_path)


def test_the_run_is_only_read(runs, copy, tmp_path):
    """No byte of it changes, whoever holds its lock; the page is the one new file, and a second one replaces it."""

    def digests():
        files = (path for path in copy.rglob("*") if path.is_file() and path.name not in ("report.html", "lock"))
        return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    before = digests()
    with locked(copy, print):
        for _ in range(2):
            done = invoke(copy)
            assert done.exit_code == 0 and done.stdout.startswith(f"wrote {copy}/report.html (")
    assert digests() == before
    assert (copy / "report.html").exists() and not list(copy.glob(".*"))


def test_a_run_is_shown_without_its_block_files(copy, tmp_path):
    """Its small files are enough; the page says where the steps are from."""
    shutil.rmtree(copy / "blocks")
    (copy / "env.json").unlink()
    words = words_of(page_of(copy, tmp_path))
    assert "The steps are those of the last records" in words and "The versions and the machine are not known" in words


def test_a_run_that_a_gpu_trained_is_shown_without_one(copy, tmp_path):
    """With the host's memory beside the device's."""
    config = copy / "config.yaml"
    config.write_text(config.read_text().partition("# sha256")[0].replace("target: auto", "target: cuda"))
    beside = {"ram_budget_bytes": 4_000_000_000, "predicted_host_peak_bytes": 123_000_000}
    beside["host_breakdown"] = {"runtime": 100_000_000, "blocks": 23_000_000}
    change_json(copy / "plan.json", lambda plan: plan.update(beside))
    words = words_of(page_of(copy, tmp_path))
    assert "123 MB" in words and "4 GB" in words and "peak of the host" in words and "device memory" in words


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shutil.rmtree, "there is no run directory"),
        (lambda run: (run / "manifest.json").unlink(), "is not a run directory"),
        (lambda run: (run / "plan.json").write_text("{"), "plan.json is damaged"),
        (lambda run: change_json(run / "plan.json", lambda plan: plan.update(warnings=[5])), "warnings.0=5"),
        (lambda run: (run / "summary.json").write_text("[]"), "summary.json is damaged"),
        (
            lambda run: change_json(run / "summary.json", lambda summary: summary.update(time_split={"data": "x"})),
            "time_split.data='x'",
        ),
        (lambda run: (run / "report.html").mkdir(), "choose another place with -o"),
    ],
)
def test_what_cannot_be_reported_is_an_error_that_says_why(copy, damage, words):
    damage(copy)
    done = invoke(copy)
    assert done.exit_code == 1 and words in done.stderr and "Traceback" not in done.stderr


def test_wrong_names_of_the_page_are_refused(runs, tmp_path):
    """One that a browser would not open as a page, and one in a folder that does not exist."""
    done = invoke(runs("dit"), "-o", tmp_path / "page.pdf")
    assert done.exit_code == 2 and "give a name that ends in .html" in done.stderr
    done = invoke(runs("dit"), "-o", tmp_path / "none/page.html")
    assert done.exit_code == 1 and "No such file or directory; choose another place with -o" in done.stderr


@pytest.mark.parametrize("kind", ["dit", "exact"])
def test_records_tell_the_time_of_the_whole_run_and_the_memory(tmp_path, kind):
    """The seconds of a resumed run go on from those of its records, and no waiting in between counts."""
    with pytest.raises(InterruptedRunError):
        edgeblocks.train(out=tmp_path / "run", listener=StopAfter(8), **KINDS[kind])
    first = list(edgeblocks.load(tmp_path / "run").directory.records())
    run = edgeblocks.resume(tmp_path / "run", listener=Silent())
    records = list(run.directory.records())
    assert records[: len(first)] == first
    times = [record.seconds for record in records]
    assert times == sorted(times) and times[len(first)] > times[len(first) - 1] > 0
    assert times[-1] <= times[len(first) - 1] + run.summary["seconds"]
    assert all(10**8 < record.used_bytes <= run.summary["peak_bytes"] for record in records[len(first) :])
    words = words_of(page_of(run.path, tmp_path))
    assert f"peak memory {format_bytes(run.summary['peak_bytes'])} since it was resumed" in words
    assert f"time of training {format_duration(times[-1])}" in words and "Measured since the run was resumed." in words


def test_of_many_previews_the_newest_and_some_others_are_shown(tmp_path):
    """What is no picture is left out with its name, and so is what is too large to stand in a page."""
    png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x08\0\0\0\x08"
    for step in range(1, 41):
        (tmp_path / f"step_{step:07d}.png").write_bytes(png)
    (tmp_path / "step_0000041.png").write_bytes(b"GIF89a")
    (tmp_path / "step_0000042.png").write_bytes(png + bytes(5_000_000))
    (tmp_path / "step_0000043.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "step_x.png").write_bytes(png)
    previews, remarks = read_previews(tmp_path)
    assert [one.step for one in previews] == sorted((one.step for one in previews), reverse=True)
    assert previews[-1].step == 1 and len(previews) + len(remarks) == MOST_PREVIEWS + 1
    assert f"{MOST_PREVIEWS} of 43 are shown" in remarks[0]
    assert "step_0000043.txt is left out: it is not UTF-8" in remarks[1]


POINTS = st.lists(st.tuples(st.floats(), st.floats()), max_size=40)


@settings(phases=[Phase.explicit, Phase.generate])  # shrinking takes minutes
@given(
    lines=st.lists(POINTS, min_size=1, max_size=10),
    log_x=st.booleans(),
    log_y=st.booleans(),
    smooth=st.booleans(),
    from_zero=st.booleans(),
)
def test_any_numbers_give_a_figure(lines, log_x, log_y, smooth, from_zero):
    """NaN, infinite, huge and tiny values, no values at all, more series than colours: sound HTML and no warning."""
    series = [
        Series(label=f"series {n}", x=[x for x, _ in line], y=[y for _, y in line], smooth=smooth, marks=not smooth)
        for n, line in enumerate(lines)
    ]
    options = {"log_x": log_x, "log_y": log_y, "from_zero": from_zero and not log_y}
    options["references"] = [Reference(label="none", value=0), Reference(label="one", value=1)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = line_figure(series, title="any", x_label="x", y_label="y", **options)
    Outline(figure)
    assert ("<svg" in figure) != ("Nothing to draw" in figure)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300))
def test_the_moving_mean_is_the_mean_of_the_values_around(values):
    """Against the obvious loop: so many values to each side, as far as there are some."""
    reach = max(1, min(3, len(values) // 8), len(values) // 50)
    means = [np.mean(values[max(0, place - reach) : place + reach + 1]) for place in range(len(values))]
    np.testing.assert_allclose(moving_mean(np.array(values)), means, atol=1e-4)


def test_a_figure_of_many_points_keeps_its_peaks_and_stays_small():
    """A line of 100,000 points: its largest value is drawn, in a drawing of less than 40 kB."""
    y = np.sin(np.arange(100_000) / 3000)
    y[77_777] = 5
    figure = line_figure([Series(label="a", x=range(len(y)), y=y)], title="t", x_label="x", y_label="y")
    line = max(re.findall(r'd="([^"]*)"', figure), key=len)
    heights = [float(pair.split()[1]) for pair in re.findall(r"[\d.]+ [\d.]+", line)]
    assert len(figure) < 40_000 and sorted(heights)[1] - min(heights) > 20


class Tables(HTMLParser):
    """The cells of a page's tables, by row, and whether each takes the whole width."""

    def __init__(self):
        super().__init__()
        self.found, self._cell, self._span = [], None, False

    def handle_starttag(self, tag, attributes):
        classes = dict(attributes).get("class") or ""
        if tag == "div" and "card" in classes:
            self._span = "span" in classes
        elif tag == "table":
            self.found.append((self._span, "numbers" in classes, []))
        elif tag == "tr":
            self.found[-1][2].append([])
        elif tag in ("td", "th"):
            self._cell = []

    def handle_data(self, data):
        if self._cell is not None:
            self._cell.append(data)

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.found[-1][2][-1].append("".join(self._cell))
            self._cell = None


def least_width(rows):
    """Pixels: in each column the longest piece that cannot be broken, at 15 px a line, and the cells' padding."""
    columns = [[row[i] for row in rows if i < len(row)] for i in range(max(map(len, rows)))]
    pieces = [max((len(piece) for cell in column for piece in cell.split(" ")), default=0) for column in columns]
    return sum(pieces) * 0.58 * 15 + (len(columns) - 1) * 19.2


@pytest.mark.parametrize("kind", ["dit", "exact", "vit", "mdlm"])
def test_no_table_of_numbers_is_wider_than_a_window_of_1000_pixels(runs, tmp_path, kind):
    """Beside another one, or in the whole row; nothing keeps a long value from going on in the next line."""
    page = page_of(runs(kind), tmp_path)
    assert not re.search(r"table[^{]*\{[^}]*nowrap", page)
    tables = Tables()
    tables.feed(page)
    numbers = [(span, rows) for span, is_numbers, rows in tables.found if is_numbers]
    assert numbers
    for span, rows in numbers:
        row_px = 1000 - 48  # the body's padding
        room = row_px - 40 if span else (row_px - 16) / 2 - 40
        assert least_width(rows) <= room, (span, rows)
