"""The page in Chromium: it gives what `edgeblocks run` gives, and asks for nothing outside its folder."""

import contextlib

import numpy as np
import pytest
from support.browser import browser, needs_browser, served
from support.random_run import make_run, make_text_run
from support.web_runtime import needs_runtime, real_runtime

import edgeblocks
from edgeblocks.export.web_page import export_page
from edgeblocks.progress import Silent

pytestmark = [needs_browser, needs_runtime, pytest.mark.slow]
TEXT = {"width": 16, "heads": 2, "length": 24, "hold_out": 0.01}
PIXELS = """[...document.querySelectorAll("#tiles canvas")].map((canvas) => Array.from(
  canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data).filter((_, i) => i % 4 === 0))"""
IDLE = "!document.querySelector('#save').disabled"


@pytest.fixture(scope="module")
def page():
    with browser() as page:
        yield page


@pytest.fixture
def opened(page, tmp_path):
    """Writes the page of a run, opens it, and gives its export and its address."""

    def open_page(run, **options):
        site = tmp_path / "site"
        export_page(run.directory, site, Silent(), runtime=real_runtime(), **options)
        page.requests.clear()
        page.problems.clear()
        page.open(address := running.enter_context(served(site)))
        page.wait("document.querySelector('form')")
        return edgeblocks.open_export(site / "network"), address

    with contextlib.ExitStack() as running:
        yield open_page


def press(page, **values):
    """Set fields by their names, and ask."""
    for name, value in values.items():
        page.value(f"document.getElementById({name!r}).value = {value!r}")
    page.value("document.querySelector('form').requestSubmit()")


@pytest.mark.parametrize("weights", ["fp32", pytest.param("int8", marks=pytest.mark.thorough)])
def test_pictures_are_those_of_the_command(page, opened, tmp_path, weights):
    """The same seed, class, guidance, levels and solver give the pixels of `run` to one of 255; nothing is asked for
    outside the folder, and the browser refuses what would be, in the page and in its worker."""
    run = make_run(tmp_path / "run", layers=(1, 1), width=32, heads=2)
    export, address = opened(run, weights=weights, most_loss="100%" if weights == "int8" else None)
    page.wait(IDLE)
    first = np.uint8(page.value(PIXELS)).reshape(10, 8, 8, 1)
    press(page, seed=7, n=3, label=4, guidance=1.5, steps=5, solver="euler")
    page.wait(f"{IDLE} && document.querySelectorAll('#tiles canvas').length === 3")
    second = np.uint8(page.value(PIXELS)).reshape(3, 8, 8, 1)
    wanted = export.sample(10, guidance=2), export.sample(3, seed=7, label=4, guidance=1.5, steps=5, solver="euler")
    for found, own in zip((first, second), wanted, strict=True):
        assert np.abs(found.astype(int) - own).max() <= 1
        assert (found == own).mean() > 0.99
    assert page.value("document.querySelector('#command').textContent").endswith(
        "--n 3 --seed 7 --steps 5 --solver euler --guidance 1.5 --class 4"
    )
    assert not page.problems
    assert all(request.startswith((address, f"blob:{address}")) for request in page.requests)
    assert {f"{address}network/block_001.onnx", f"{address}runtime/ort-wasm-simd-threaded.wasm"} <= set(page.requests)
    other = "http://127.0.0.1:9/"
    asking = f"fetch({other!r}).then(() => 'went', (error) => 'refused')"
    assert page.value(asking) == "refused"
    script = f"onmessage = () => {asking}.then(postMessage)"
    in_worker = f"""new Promise((told) => {{
      const worker = new Worker(URL.createObjectURL(new Blob([{script!r}], {{ type: "text/javascript" }})),
        {{ type: "module" }});
      worker.onmessage = (event) => told(event.data);
      worker.postMessage("");
    }})"""
    assert page.value(in_worker) == "refused"
    assert (
        all("violates" in problem for problem in page.problems)
        and len(page.problems) == 4
        and other not in page.requests
    )


@pytest.mark.thorough
def test_a_chosen_picture_is_classified_as_by_the_command(page, opened, tmp_path):
    """The likeliest classes and their shares, to a tenth of a percent."""
    run = make_run(tmp_path / "run", layers=(1, 1), family="vit", width=32, heads=2, patch=4)
    export, _ = opened(run)
    page.value("""(async () => {
      const paper = new OffscreenCanvas(8, 8), shown = new ImageData(8, 8);
      for (let i = 0; i < 64; i++) shown.data.set([4 * i, 4 * i, 4 * i, 255], 4 * i);
      paper.getContext("2d").putImageData(shown, 0, 0);
      const files = new DataTransfer();
      files.items.add(new File([await paper.convertToBlob()], "a.png", { type: "image/png" }));
      document.getElementById("file").files = files.files;
      document.getElementById("file").dispatchEvent(new Event("change", { bubbles: true }));
    })()""")
    page.wait("document.querySelectorAll('#bars li').length === 5")
    (shares,) = export.classify((4 * np.arange(64, dtype=np.uint8)).reshape(1, 8, 8, 1))
    order = np.argsort(-shares)[:5]
    assert page.value("document.querySelector('#bars').innerText").split("\n") == [
        part for number in order for part in (str(number), f"{100 * shares[number]:.1f} %")
    ]
    page.value("""["pointerdown", "pointermove", "pointerup"].forEach((kind, i) => document.getElementById("pad")
      .dispatchEvent(new PointerEvent(kind, { pointerId: 1, buttons: 1, clientX: 150, clientY: 300 + 60 * i })))""")
    page.wait("document.querySelector('#status').getAttribute('aria-busy') === 'false'")
    assert not [problem for problem in page.problems if "setPointerCapture" not in problem]


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["mdlm", "ar", "looped", "bpe"])
def test_text_is_that_of_the_command(page, opened, tmp_path, kind):
    """Gaps are filled, and a beginning is gone on with, by the same letters."""
    settings = {"family": "mdlm", "tokenizer": "bpe", "vocab": 300} if kind == "bpe" else {"family": kind}
    run = make_text_run(tmp_path / "run", layers=(1,) if kind == "looped" else (1, 1), **TEXT, **settings)
    export, _ = opened(run)
    text = "the ____ sat on " if kind in ("mdlm", "bpe") else "the whale"
    press(page, given=text, seed=5, temperature=0.5)
    page.wait("/^Written in /.test(document.querySelector('#status').textContent)")
    (wanted,) = export.write(seed=5, temperature=0.5, **({"fill": text} if "_" in text else {"prompt": text}))
    assert page.value("document.querySelector('#written').textContent") == wanted
    assert not page.problems


@pytest.mark.thorough
def test_damage_and_absence_are_told(page, opened, tmp_path):
    """A damaged graph, a missing one, and a page that was opened as a file, each with what to do."""
    run = make_run(tmp_path / "run", layers=(1,), width=16, heads=2)
    _, address = opened(run)
    block = tmp_path / "site/network/block_000.onnx"
    content = block.read_bytes()
    refused = "document.querySelector('#refusal')?.textContent"
    for change, says in (
        (lambda: block.write_bytes(content[:-1] + b"?"), "block_000.onnx is damaged"),
        (block.unlink, "the server answers 404"),
    ):
        change()
        page.open(f"{address}?{says[:3]}")
        page.wait(f"{refused} && document.querySelector('#loading')?.hidden")
        assert says in page.value(refused)
    page.open((tmp_path / "site/index.html").as_uri())
    page.wait(f"location.protocol === 'file:' && {refused}")
    assert "python -m http.server" in page.value(refused)
