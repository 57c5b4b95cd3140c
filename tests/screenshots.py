"""Draws the pictures of the page in docs/: python tests/screenshots.py runs/tiny docs/pictures (after launch.speedrun).

Needs the extras serve and dev, and chromium. A picture is a row of `PICTURES`.
"""

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright
from test_page import BROWSERS, program, send

ASKED = ("Where does Mia live?", "Tom has 9 apples. He gives Mia 4. How many apples are left?")


def chat(page: Page) -> None:
    """A fact of the village, and a sum by the calculator."""
    wide = page.viewport_size["width"] > 760  # type: ignore[index]
    if not wide:
        page.click("#open-settings")
    page.click("#presets button[value=greedy]")
    if not wide:
        page.keyboard.press("Escape")
    for text in ASKED:
        send(page, text)
    page.mouse.move(0, 0)


def microscope(page: Page) -> None:
    """The candidates of the second token of an answer, with the course's sampling."""
    chat(page)
    if page.viewport_size["width"] > 760:  # type: ignore[index]
        page.click("#presets button[value=course]")
    page.locator("article.assistant").last.get_by_role("button", name="Look inside").click()
    page.locator("[aria-label='<|assistant_start|>'] + button + button").first.click()
    page.locator("#scope-view[aria-busy=false] tbody tr").first.wait_for()
    page.mouse.move(0, 0)


def attention(page: Page) -> None:
    """Attention of one head on a text of the village."""
    page.get_by_role("button", name="Microscope").click()
    page.locator("#scope-tokens[aria-busy=false]").wait_for()
    page.locator("#scope-tab-attention").click()
    page.locator("#scope-view[aria-busy=false] svg").first.wait_for()


def checkpoints(page: Page) -> None:
    """An early checkpoint of pretraining, of the same text."""
    names = page.locator("#model option").all_inner_texts()
    page.select_option("#model", next(name for name in names if name.endswith("/pretrain")))
    attention(page)
    page.locator("#scope-tab-checkpoints").click()
    page.locator("#scope-view tbody th").get_by_text("450", exact=True).wait_for()
    page.get_by_role("slider", name="Step of the run").fill("2")
    page.get_by_text("at step 135:").wait_for()


PICTURES: dict[str, tuple[tuple[int, int], Any, Callable[[Page], None]]] = {
    "chat_desktop": ((1280, 800), "light", chat),
    "chat_phone": ((390, 844), "dark", chat),
    "microscope_desktop": ((1280, 900), "light", microscope),
    "microscope_phone": ((390, 844), "dark", microscope),
    "microscope_attention": ((1280, 1440), "dark", attention),
    "microscope_checkpoints": ((1280, 900), "light", checkpoints),
}


def draw(browser: Any, url: str, name: str, directory: Path) -> None:
    (width, height), scheme, play = PICTURES[name]
    size = {"width": width, "height": height}
    context = browser.new_context(viewport=size, color_scheme=scheme, device_scale_factor=1.25)
    page = context.new_page()
    page.set_default_timeout(600_000)
    page.goto(url)
    page.locator("#presets button").first.wait_for(state="attached")
    play(page)
    page.screenshot(path=directory / f"{name}.png", animations="disabled")
    context.close()


def main(run: str, directory: str) -> None:
    if not program():
        sys.exit(f"none of {', '.join(BROWSERS)} is installed: apt-get install chromium")
    command = [sys.executable, "-m", "launch.serve", f"--checkpoint={run}", "--port=0", "--warm=False"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server, sync_playwright() as driver:
        try:
            assert server.stderr
            line = next((line for line in server.stderr if line.startswith("http://")), "")
            if not line:
                sys.exit(f"launch.serve does not serve {run}")
            threading.Thread(target=server.stderr.read, daemon=True).start()  # A full pipe would stop the server.
            browser = driver.chromium.launch(executable_path=program(), args=["--no-sandbox"])
            for name in PICTURES:
                for _ in range(3):  # The third time everything is compiled, so that the speed shown is the usual one.
                    draw(browser, line.split()[0], name, Path(directory))
            browser.close()
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
