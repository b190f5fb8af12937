"""Takes the README's picture anew: trains the demo's model, serves it, and looks at it in Chromium.

.venv/bin/python docs/screenshots.py
"""

import io
import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from headscope import demo
from headscope.server import serve

IMAGES = Path(__file__).resolve().parent / "img"


def main() -> None:
    """Writes docs/img/head-view.png and its dark twin."""
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("no chromium here: apt-get install chromium")
    os.chdir(tempfile.mkdtemp())
    run = "runs/demo"
    report = demo.train(run)
    address: list[str] = []
    threading.Thread(target=serve, args=(run,), kwargs={"port": 0, "say": address.append}, daemon=True).start()
    IMAGES.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for name, scheme in (("head-view", "light"), ("head-view-dark", "dark")):
            page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme=scheme)  # type: ignore[arg-type]
            page.goto(address[0].split(" at ")[1])
            page.click(f"[data-example-index='{next(w.example for w in report.wrong if w.triggered)}']")
            page.select_option("select[name=layer]", str(report.looks[0].layer))
            page.click(f"button[data-head='{report.looks[0].head}']")
            page.mouse.move(640, 60)
            page.wait_for_timeout(1000)
            shot = Image.open(io.BytesIO(page.screenshot()))
            shot.quantize(256, dither=Image.Dither.NONE).save(IMAGES / f"{name}.png", optimize=True)
        browser.close()


if __name__ == "__main__":
    main()
