"""A browser for the device's page, which keeps a list of what went wrong in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Page, sync_playwright

from tests.harness.ci import skip_or_fail

FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@dataclass
class Watched:
    """A page with what it said and asked for."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    """Of the console, and uncaught errors."""
    hosts: set[str] = field(default_factory=set)
    """HOST:PORT of every request."""


@contextmanager
def browser() -> Iterator[Browser]:
    """Chromium of the machine; skips where there is none, and fails in CI."""
    program = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
    if not program.exists():
        skip_or_fail(f"{program} is not installed (Debian: apt-get install chromium)")
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=program, args=list(FLAGS))
        try:
            yield started
        finally:
            started.close()


def watched(browser: Browser, url: str, width: int = 1280, height: int = 800) -> Watched:
    """Open `url` in a window of its own."""
    page = browser.new_context(viewport={"width": width, "height": height}).new_page()
    found = Watched(page)
    page.on(
        "console",
        lambda said: found.complaints.append(said.text) if said.type in ("error", "warning") else None,
    )
    page.on("pageerror", lambda error: found.complaints.append(str(error)))
    page.on("request", lambda request: found.hosts.add(urlsplit(request.url).netloc))
    page.goto(url)
    return found
