"""Draws the pictures of the page in docs/: python tests/screenshots.py runs/tiny docs/pictures (after launch.speedrun).

Needs the extras serve and dev, and chromium. A picture is a row of `PICTURES`.
"""

import subprocess
import sys
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


PICTURES: dict[str, tuple[tuple[int, int], Any, Callable[[Page], None]]] = {
    "chat_desktop": ((1280, 800), "light", chat),
    "chat_phone": ((390, 844), "dark", chat),
}


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
            browser = driver.chromium.launch(executable_path=program(), args=["--no-sandbox"])
            for name, ((width, height), scheme, play) in PICTURES.items():
                context = browser.new_context(
                    viewport={"width": width, "height": height}, color_scheme=scheme, device_scale_factor=1.5
                )
                page = context.new_page()
                page.set_default_timeout(120_000)
                page.goto(line.split()[0])
                page.locator("#presets button").first.wait_for()
                play(page)
                page.screenshot(path=Path(directory) / f"{name}.png", animations="disabled")
                context.close()
            browser.close()
        finally:
            server.terminate()
            server.stderr = None  # Nobody reads it any more.


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
