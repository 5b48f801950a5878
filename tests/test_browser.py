"""The notebooks in a real JupyterLab, used as a person uses them: `make browser`, if Chromium is installed.

Screenshots are in runs/browser.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from io import BytesIO
from pathlib import Path
from statistics import median
from time import monotonic, sleep

import nbformat
import numpy as np
import pytest
from PIL import Image

from recorded import recorded_run

ROOT = Path(__file__).parent.parent
SHOTS = ROOT / "runs" / "browser"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
KERNEL = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
LARGE = {"large": 2000, "long": 100_000}  # steps of runs of a BERT-base, 12 layers
BLUE = (0x00, 0x72, 0xB2)  # of the first curve

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright, as make browser does")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (Debian: apt install chromium)"),
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a copy of notebooks, ledger and figures, as `make lab` opens it; its address."""
    folder = tmp_path_factory.mktemp("lab")
    for part in ("notebooks", "experiments"):
        shutil.copytree(ROOT / part, folder / part)
    for name, steps in LARGE.items():
        recorded_run(folder / name, steps)
        code = f"import hdlib.lab\n\nhdlib.lab.explore('../{name}')"
        cells = [nbformat.v4.new_code_cell(part) for part in code.split("\n\n")]
        notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": KERNEL})
        nbformat.write(notebook, folder / "notebooks" / f"{name}.ipynb")
    settings = folder / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    (settings / "tracker.jupyterlab-settings").write_text(
        json.dumps({"windowingMode": "none"})
    )  # all cells in the page
    apputils = folder / "settings" / "@jupyterlab" / "apputils-extension"
    apputils.mkdir()
    (apputils / "notification.jupyterlab-settings").write_text(json.dumps({"fetchNews": "false"}))
    environment = os.environ | {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), "PYTHONPATH": str(ROOT)}
    environment |= {"JUPYTER_RUNTIME_DIR": str(folder / "runtime"), "JUPYTER_CONFIG_DIR": str(folder / "config")}
    port = 18888 + os.getpid() % 1000
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--IdentityProvider.token="]
    command += [f"--port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder}"]
    with (folder / "lab.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    for _ in range(240):
        try:
            urllib.request.urlopen(f"{address}/api/status")
            break
        except OSError:
            sleep(0.5)
    yield address
    server.terminate()
    server.wait(30)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Page:
    """An open notebook in JupyterLab."""

    def __init__(self, browser, address: str, name: str):
        self.page = browser.new_page(viewport={"width": 1500, "height": 1300})
        self.name, self.errors = name, []
        self.page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(f"{address}/lab/tree/notebooks/{name}.ipynb?reset")
        self.page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=90_000)
        self.page.wait_for_function("document.querySelector('.jp-Notebook-ExecutionIndicator')", timeout=90_000)

    def run_all(self, timeout: float = 400) -> None:
        """Run all cells from the menu and wait for the last one."""
        sleep(3)  # the kernel starts
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        until = monotonic() + timeout
        sleep(2)
        while self.prompts() and monotonic() < until:
            sleep(0.5)
        assert not self.prompts(), "some cells have not run"

    def prompts(self) -> list[str]:
        """Prompts of code cells that have not finished."""
        texts = self.page.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts()
        return [text for text in texts if not re.search(r"\d", text)]

    def red(self) -> list[str]:
        """Outputs that are errors."""
        red = '[data-mime-type="application/vnd.jupyter.error"]'
        return self.page.locator(f".jp-OutputArea-output{red}").all_inner_texts()

    def shot(self, name: str) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SHOTS / f"{self.name}-{name}.png")

    def complaints(self) -> list[str]:
        """Errors in the console."""
        return [error for error in self.errors if "favicon" not in error]


def test_the_quickstart_runs_from_the_menu(lab, browser):
    notebook = Page(browser, lab, "00_quickstart")
    notebook.run_all()
    images = notebook.page.locator(".jp-OutputArea-output img")
    images.first.scroll_into_view_if_needed()
    notebook.shot("curve")
    assert notebook.red() == [] and notebook.complaints() == []
    assert images.count() >= 2


@pytest.fixture(scope="module")
def gallery(lab, browser):
    notebook = Page(browser, lab, "05_explore")
    notebook.run_all()
    return notebook


def picture(gallery, text: str):
    """The picture whose text alternative holds this text."""
    return gallery.page.locator(f'img[alt*="{text}"]').first


def wait_for(condition, seconds: float = 20) -> None:
    until = monotonic() + seconds
    while not condition():
        assert monotonic() < until, "waited too long"
        sleep(0.02)


def test_no_cell_fails_and_every_picture_has_a_text_alternative(gallery):
    assert gallery.red() == []
    pictures = gallery.page.locator(".jp-OutputArea-output img")
    assert pictures.count() >= 3
    described = [
        image.get_attribute("alt")
        for image in pictures.all()
        if image.evaluate("image => image.src.startsWith('blob')")
    ]
    assert len(described) >= 3 and all(len(alt) > 20 for alt in described)


def test_the_slider_moves_the_picture_within_300_milliseconds(gallery):
    shown = picture(gallery, "Step ")
    shown.scroll_into_view_if_needed()
    gallery.shot("explore")
    handle = gallery.page.locator(".noUi-handle").first
    handle.focus()
    seconds = gallery.page.evaluate(MOVES)
    gallery.shot("explore-moved")
    assert len(seconds) == 12 and median(seconds) < 300, seconds
    print("milliseconds of a move:", [round(each) for each in seconds])


MOVES = """async () => {
  // One key after the other; the time from each key to its picture, decoded.
  const handle = document.querySelector(".noUi-handle");
  const image = document.querySelector('img[alt^="Step "]');
  const taken = [];
  for (let turn = 0; turn < 12; turn++) {
    const changed = new Promise((resolve) => {
      const watcher = new MutationObserver(() => { watcher.disconnect(); resolve(); });
      watcher.observe(image, { attributeFilter: ["alt"] });
    });
    const started = performance.now();
    handle.dispatchEvent(new KeyboardEvent("keydown", { key: turn % 2 ? "PageDown" : "ArrowLeft", bubbles: true }));
    await changed;
    await image.decode();
    taken.push(performance.now() - started);
  }
  return taken;
}"""


def test_the_slider_is_as_quick_on_a_large_run(lab, browser):
    """2,000 steps, 12 layers of 3,072 neurons, a hundred prunes."""
    notebook = Page(browser, lab, "large")
    notebook.run_all()
    notebook.page.locator(".noUi-handle").first.focus()
    seconds = notebook.page.evaluate(MOVES)
    notebook.shot("explored")
    assert notebook.red() == [] and notebook.complaints() == [] and median(seconds) < 300, seconds
    print("milliseconds of a move, large run:", [round(each) for each in seconds])


def test_a_run_of_a_hundred_thousand_steps_opens_within_two_seconds(lab, browser):
    """From the key that runs the cell to the picture; the library is already imported."""
    notebook = Page(browser, lab, "long")
    notebook.run_all()
    seconds = []
    for _ in range(3):
        notebook.page.locator(".jp-CodeCell .jp-InputArea-editor").last.click()
        notebook.page.evaluate("document.querySelectorAll('img[alt^=Step]').forEach((each) => { each.alt = 'old'; })")
        started = monotonic()
        notebook.page.keyboard.press("Control+Enter")
        notebook.page.wait_for_selector("img[alt^=Step]")
        seconds.append(monotonic() - started)
    notebook.shot("explored")
    assert notebook.red() == [] and min(seconds) < 2, seconds
    print("seconds to open 100,000 logged steps:", [round(each, 2) for each in seconds])


def test_the_arrow_keys_of_a_keyboard_move_the_slider(gallery):
    before = picture(gallery, "Step ").get_attribute("alt")
    gallery.page.locator(".noUi-handle").first.focus()
    gallery.page.keyboard.press("ArrowLeft")
    wait_for(lambda: picture(gallery, "Step ").get_attribute("alt") != before)


def test_a_typed_sentence_gives_guesses_of_both_models(gallery):
    sentence = gallery.page.get_by_label("sentence").first
    sentence.scroll_into_view_if_needed()
    answer = gallery.page.locator("table", has_text="student of step").first
    before = answer.inner_text()
    sentence.fill("If the file does not ___, an error is raised.")
    sentence.press("Enter")
    wait_for(lambda: answer.count() and answer.inner_text() != before)
    answer.scroll_into_view_if_needed()
    gallery.shot("guesses")
    assert answer.inner_text().count("%") >= 10


def test_a_click_on_a_curve_opens_its_run(gallery):
    curves = picture(gallery, "along step")
    curves.scroll_into_view_if_needed()
    before = gallery.page.locator(".noUi-handle").count()
    pixels = np.asarray(Image.open(BytesIO(curves.screenshot())).convert("RGB")).astype(int)
    close = np.abs(pixels - BLUE).sum(-1) < 30
    rows, columns = close[:, : pixels.shape[1] // 2].nonzero()  # left of the legend
    curves.click(position={"x": int(columns[-1]), "y": int(rows[-1])})
    wait_for(lambda: gallery.page.locator(".noUi-handle").count() > before)
    gallery.page.locator(".noUi-handle").nth(before).scroll_into_view_if_needed()
    sleep(1)
    gallery.shot("compare-opened")


def test_the_watched_run_is_shown_as_finished(gallery):
    wait_for(lambda: gallery.page.locator('[role="status"]', has_text="Finished").count())
    gallery.page.locator('[role="status"]', has_text="Finished").first.scroll_into_view_if_needed()
    gallery.shot("watched")


def test_the_chooser_shows_the_sizes_of_a_new_width(gallery):
    target = gallery.page.get_by_label("target", exact=True).last
    target.scroll_into_view_if_needed()
    target.fill("0.5")
    target.press("Tab")
    row = gallery.page.locator("table", has_text="Student of").locator("tr", has_text="hidden")
    wait_for(lambda: "90" in row.first.inner_text())  # of 180: six heads of 15
    gallery.shot("chooser")


def test_tab_reaches_every_control(gallery):
    """In each widget the tab key reaches all controls from the first one."""
    counts = gallery.page.evaluate(CONTROLS)
    assert sum(counts) > 15
    for widget, count in enumerate(counts):
        gallery.page.locator(f'[data-control="{widget}"]').first.focus()
        for _ in range(2 * count):
            gallery.page.evaluate("document.activeElement.dataset.reached = '1'")
            gallery.page.keyboard.press("Tab")
        missed = gallery.page.locator(f'[data-control="{widget}"]:not([data-reached])')
        assert [each.evaluate("control => control.outerHTML.slice(0, 150)") for each in missed.all()] == []


CONTROLS = """() => {
  // Marks the controls of each widget with its number. Returns the number of controls of each widget.
  const kinds = "input, select, button, textarea, .noUi-handle";
  const able = (each) => !each.disabled && each.offsetParent !== null && each.tabIndex >= 0;
  const controls = [...document.querySelectorAll(".jp-OutputArea-output")]
    .map((each) => [...each.querySelectorAll(kinds)].filter(able)).filter((each) => each.length);
  controls.forEach((each, widget) => each.forEach((control) => { control.dataset.control = widget; }));
  return controls.map((each) => each.length);
}"""


def test_the_console_has_no_errors(gallery):
    assert gallery.complaints() == []
