"""Takes the pictures of the device's page for the README: docs/images/page.png and page-phone.png.

Usage: python -m scripts.screenshots [FOLDER]   (`make screenshots`). Starts a cloud and a device with the default model
and a slow link between them, asks some questions in Chromium and takes the pictures when the answers are there.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from playwright.sync_api import Browser, Page

from hat_runtime.cli.processes import Children, free_address, hat_command
from hat_runtime.emulation.link import EmulatedLink
from hat_runtime.emulation.spec import LinkSpec
from hat_runtime.model.prepare import prepare
from tests.runtime.browser import browser as chromium_browser

ROOT = Path(__file__).resolve().parent.parent
LINK = "60mbit,20ms"
TEXT = (
    "The harbour of the old town was built in 1620. In 1842 a fire burnt the warehouses down, and they were rebuilt in "
    "brick within three years. Since 1998 they have housed shops, a museum of navigation and the office of the harbour "
    "master, whose tower can be climbed on Sundays. "
)
QUESTIONS = (
    "Name three rivers of Europe and say where each of them flows.",
    TEXT + "What happened in 1842?",
    "What is photosynthesis? Explain it to a child in three sentences.",
)
PHONE_QUESTION = QUESTIONS[2]


def main() -> int:
    """Take both pictures. Returns the exit code."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    model = prepare("default")
    cloud, http, api = free_address(), free_address(), free_address()
    with (
        Children() as children,
        EmulatedLink(cloud, LinkSpec.parse(LINK)) as link,
        chromium_browser() as chromium,
    ):
        command = hat_command(
            "cloud", "serve", "--model", str(model), "--input-layers", "3", "--listen", cloud
        )
        children.start("cloud", [*command, "--http-listen", http]).wait_ready(f"http://{http}/readyz")
        command = hat_command("device", "serve", "--model", str(model), "--model-name", "smollm2")
        device = children.start("device", [*command, "--cloud", link.address, "--listen", api])
        device.wait_ready(f"http://{api}/readyz")
        page = open_page(chromium, f"http://{api}/", 1280, 800, "light")
        for question in QUESTIONS:
            ask(page, question)
        time.sleep(10)  # for plots that are worth looking at
        page.screenshot(path=folder / "page.png")
        phone = open_page(chromium, f"http://{api}/", 390, 844, "dark")
        ask(phone, PHONE_QUESTION)
        time.sleep(5)
        phone.screenshot(path=folder / "page-phone.png")
    for name in ("page.png", "page-phone.png"):
        print(f"{folder / name}: {(folder / name).stat().st_size} bytes")
    return 0


def open_page(browser: Browser, url: str, width: int, height: int, scheme: str) -> Page:
    """The device's page in a window of so many pixels; scheme: "light" or "dark"."""
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)  # type: ignore[arg-type]
    page.goto(url)
    page.wait_for_selector("#cloud[data-state=ok]")
    return page


def ask(page: Page, question: str) -> None:
    """Ask, and wait for the end of the answer."""
    answered = page.locator(".counts").count()
    page.fill("#question", question)
    page.click("#send")
    page.locator(".counts").nth(answered).wait_for(timeout=120_000)


if __name__ == "__main__":
    sys.exit(main())
