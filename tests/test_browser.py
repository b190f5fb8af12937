"""The live page as a person uses it: training, serving and Chromium as three processes."""

from __future__ import annotations

import io
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from chromium import find
from headscope import Trial, open_trial
from headscope.record import Keeping
from runs import make, put_probe, put_step, writer

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find() is None, reason="no Chromium here; on Debian, as root, `make test` installs it"),
]
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"
HERE = Path(__file__).parent
# Every drawn step with the moment at which its drawing was done, in the order of drawing.
RECORD_DRAWINGS = """
() => {
  const root = document.querySelector('#app').shadowRoot;
  window.drawn = [];
  const note = () => {
    const at = root.querySelector('[data-drawn-at]');
    if (at) window.drawn.push([Number(at.dataset.step), Number(at.dataset.drawnAt)]);
  };
  new MutationObserver(note).observe(root, { subtree: true, attributes: true, attributeFilter: ['data-drawn-at'] });
  window.loadedAt = performance.timeOrigin;
}
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=find(), args=FLAGS.split())
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page on which nothing may go wrong."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    fresh = context.new_page()
    problems: list[str] = []
    fresh.on("pageerror", lambda error: problems.append(str(error)))
    fresh.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    yield fresh
    context.close()
    assert problems == []


@contextmanager
def serving(path: Path, page: Page, port: str = "0") -> Iterator[str]:
    """The address at which a process of its own serves the run; the page leaves it before it ends."""
    command = [sys.executable, "-m", "headscope", "serve", str(path), "--port", port]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            assert server.stdout is not None
            match = re.search(r"http://\S+", server.stdout.readline())
            assert match is not None
            yield match[0]
            page.goto("about:blank")
        finally:
            server.terminate()
            said = server.communicate(timeout=20)[0]
    assert said == ""


def picture(page: Page) -> str:
    """The lines as an image, once what is shown has settled."""
    drawn = ""
    for _ in range(100):
        now: str = page.eval_on_selector("canvas.lines", "canvas => canvas.toDataURL()")
        if now == drawn:
            return now
        drawn = now
        page.wait_for_timeout(100)
    raise AssertionError("the drawing does not settle")


def shown(page: Page, name: str) -> str:
    return page.locator("[data-drawn-at]").get_attribute(f"data-{name}") or ""


def wait_shown(page: Page, name: str, value: str) -> None:
    page.wait_for_selector(f"[data-drawn-at][data-{name}='{value}']", timeout=20_000)


def numbers(page: Page) -> dict[tuple[int, int, int], float]:
    """(head, query, key) to the weight that is written there."""
    found = page.eval_on_selector_all("[data-weight]", "all => all.map(one => ({...one.dataset}))")
    assert found
    return {(int(one["head"]), int(one["query"]), int(one["key"])): float(one["weight"]) for one in found}


def choose_step(page: Page, index: int) -> None:
    page.eval_on_selector(
        "input[name=step]",
        "(input, index) => { input.value = index; input.dispatchEvent(new Event('input', { bubbles: true })); }",
        index,
    )


@contextmanager
def training(run: Path, stop: Path) -> Iterator[subprocess.Popen[Any]]:
    """A process of its own that trains into `run` until `stop` is there."""
    process = subprocess.Popen([sys.executable, str(HERE / "train_slowly.py"), str(run), str(stop), "0.4"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def report_delays(run: Path, drawings: list[tuple[int, float]], capsys: pytest.CaptureFixture[str]) -> None:
    """Prints how long each step took from its file's put to its drawing."""
    put = {int(file.name[:10]): file.stat().st_mtime * 1000 for file in (run / "a000" / "steps").iterdir()}
    drawn: dict[int, float] = {}
    for step, at in drawings:
        drawn.setdefault(step, at)
    delays = sorted(drawn[step] - put[step] for step in drawn if step > 2)
    assert len(delays) >= 5 and delays[0] > 0
    with capsys.disabled():
        print(
            f"\nfrom a step's file being put to its being drawn: median {statistics.median(delays):.0f} ms, "
            f"longest {delays[-1]:.0f} ms over {len(delays)} steps (aim: median under 500 ms)"
        )


def test_page_follows_training(page: Page, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, stop = tmp_path / "run", tmp_path / "stop"
    with serving(run, page) as address:
        page.goto(address)
        page.wait_for_selector("text=Waiting for the first step")
        page.evaluate(RECORD_DRAWINGS)
        with training(run, stop) as process:
            page.wait_for_function("() => new Set(window.drawn.map(([step]) => step)).size >= 12", timeout=120_000)
            assert page.evaluate("window.loadedAt === performance.timeOrigin"), "the page was reloaded"
            stop.touch()
            assert process.wait(60) == 0
        trial = open_trial(run)
        last = trial.steps()[-1]
        wait_shown(page, "step", str(last))
        page.wait_for_selector(f"text=Training ended at step {last}")
        report_delays(run, page.evaluate("window.drawn"), capsys)
        walk_and_come_back(page, last)
        compare_numbers(page, trial, last)


def walk_and_come_back(page: Page, last: int) -> None:
    """Changes layer, head and step: each changes the drawing, and going back brings the same one."""
    page.select_option("select[name=layer]", "0")
    page.click("button[data-head='1']")
    wait_shown(page, "heads", "1")
    wait_shown(page, "layer", "0")
    first = picture(page)
    page.select_option("select[name=layer]", "2")
    wait_shown(page, "layer", "2")
    other_layer = picture(page)
    page.click("button[data-head='3']")
    wait_shown(page, "heads", "3")
    other_head = picture(page)
    choose_step(page, 0)
    wait_shown(page, "step", "0")
    other_step = picture(page)
    assert len({first, other_layer, other_head, other_step}) == 4
    choose_step(page, last)
    wait_shown(page, "step", str(last))
    assert picture(page) == other_head
    page.click("button[data-head='1']")
    wait_shown(page, "heads", "1")
    assert picture(page) == other_layer
    page.select_option("select[name=layer]", "0")
    wait_shown(page, "layer", "0")
    assert picture(page) == first


def compare_numbers(page: Page, trial: Trial, step: int) -> None:
    """What stands beside the tokens is what the trial rebuilds."""
    row = trial.examples()[int(shown(page, "example"))].row
    weights = trial.tensor(f"{trial.layers(step)[0].name}.weights").value(step)[row]
    page.hover("[data-side=query] [data-token='3']")
    page.wait_for_selector("[data-weight][data-query='3']")
    pointed = numbers(page)
    assert {query for _, query, _ in pointed} == {3} and len(pointed) >= 5
    page.hover("[data-side=key] [data-token='2']")
    page.wait_for_selector("[data-weight][data-key='2']")
    looking = numbers(page)
    assert {key for _, _, key in looking} == {2}
    for (head, query, key), weight in (pointed | looking).items():
        assert weight == pytest.approx(float(weights[head, query, key]), abs=1e-7)


def test_everything_by_keyboard(page: Page, tmp_path: Path) -> None:
    with serving(make(tmp_path, [0, 5, 10], tokens=12, layers=3), page) as address:
        page.goto(address)
        wait_shown(page, "step", "10")
        head, layer = int(shown(page, "heads")), int(shown(page, "layer"))
        page.keyboard.press("]")
        wait_shown(page, "heads", str((head + 1) % 4))
        page.keyboard.press("}" if layer < 2 else "{")
        wait_shown(page, "layer", str(layer + 1 if layer < 2 else layer - 1))
        page.keyboard.press(",")
        wait_shown(page, "step", "5")
        assert page.get_attribute("button[name=follow]", "aria-pressed") == "false"
        page.keyboard.press("f")
        wait_shown(page, "step", "10")
        assert page.get_attribute("button[name=follow]", "aria-pressed") == "true"
        page.keyboard.press("ArrowDown")
        page.wait_for_selector("[data-weight]")
        page.keyboard.press("Escape")
        page.wait_for_selector("[data-weight]", state="detached")
        page.keyboard.press("a")
        wait_shown(page, "heads", "0,1,2,3")
        page.keyboard.press("?")
        page.wait_for_selector("dialog[open]")
        page.keyboard.press("Escape")
        page.wait_for_selector("dialog[open]", state="detached")


def test_only_the_heads_that_were_kept_can_be_chosen(page: Page, tmp_path: Path) -> None:
    run = make(tmp_path, [0, 1], keeping=Keeping(heads=[1, 3]))
    with serving(run, page) as address:
        page.goto(address)
        wait_shown(page, "step", "1")
        tiles = page.locator("button[data-head]")
        assert [tile.get_attribute("data-head") for tile in tiles.all()] == ["1", "3"]
        page.click("button[data-head='3']")
        wait_shown(page, "heads", "3")
        page.keyboard.press("]")
        wait_shown(page, "heads", "1")
        page.hover("[data-side=query] [data-token='1']")
        page.wait_for_selector("[data-weight][data-query='1']")
        trial = open_trial(run)
        layer = trial.layers(1)[int(shown(page, "layer"))]
        row = trial.examples()[int(shown(page, "example"))].row
        weights = trial.weights(1, layer, row=row, heads=[1])[0, 0]
        for (_, query, key), weight in numbers(page).items():
            assert weight == pytest.approx(float(weights[query, key]), abs=1e-7)


def test_a_page_forgets_steps_that_were_thinned(page: Page, tmp_path: Path) -> None:
    run = writer(tmp_path)
    put_probe(run)
    for step in range(4):
        put_step(run, step)
    open_trial(tmp_path).wait(3, timeout=20)
    with serving(tmp_path, page) as address:
        page.goto(address)
        wait_shown(page, "step", "3")
        choose_step(page, 1)
        wait_shown(page, "step", "1")
        said: list[str] = []
        run.say, run.max_bytes = said.append, 1
        put_step(run, 4)
        page.wait_for_selector("input[name=step][max='1']", timeout=20_000)
        wait_shown(page, "step", "0")
    run.close()
    assert said == ["captures of this run reached 1 bytes: older steps are thinned from now on"]


def test_a_layer_that_failed_its_self_check_is_not_drawn(page: Page, tmp_path: Path) -> None:
    run = writer(tmp_path)
    put_probe(run)
    put_step(run, 0, break_layer=1)
    put_step(run, 1, break_layer=1)
    run.close()
    with serving(tmp_path, page) as address:
        page.goto(address)
        wait_shown(page, "layer", "0")
        assert picture(page)
        page.select_option("select[name=layer]", "1")
        page.wait_for_selector("text=/Layer 1 failed its self-check .*not drawn/")
        assert page.query_selector("canvas.lines") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_ink_is_dark_on_light_and_light_on_dark(browser: Browser, tmp_path: Path, scheme: Any) -> None:
    context = browser.new_context(color_scheme=scheme)
    page = context.new_page()
    with serving(make(tmp_path, [0, 1]), page) as address:
        page.goto(address)
        wait_shown(page, "step", "1")
        picture(page)
        pixels = page.eval_on_selector(
            "canvas.lines", "c => Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)"
        )
        rgba = np.array(pixels, np.float64).reshape(-1, 4)
        ink = rgba[rgba[:, 3] > 200][:, :3].mean()
        ground = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L"))[-10, 640]
        assert (ink < 128 < ground) if scheme == "light" else (ground < 128 < ink)
    context.close()


def test_a_server_that_goes_and_comes_back(browser: Browser, tmp_path: Path) -> None:
    context = browser.new_context()
    page, away = context.new_page(), context.new_page()
    make(tmp_path, [0, 1])
    with serving(tmp_path, away) as address:
        page.goto(address)
        wait_shown(page, "step", "1")
    page.wait_for_selector("text=/server/i", timeout=20_000)
    make(tmp_path, [0, 4])
    with serving(tmp_path, page, address.rsplit(":", 1)[1].strip("/")):
        wait_shown(page, "step", "4")
    context.close()


def test_a_run_that_is_deleted_and_made_anew(page: Page, tmp_path: Path) -> None:
    run = make(tmp_path / "run", [0, 10, 20])
    with serving(run, page) as address:
        page.goto(address)
        wait_shown(page, "step", "20")
        shutil.rmtree(run)
        page.wait_for_selector("text=Waiting for the first step")
        make(run, [0, 5])
        wait_shown(page, "step", "5")
        assert page.get_attribute("input[name=step]", "max") == "1"
