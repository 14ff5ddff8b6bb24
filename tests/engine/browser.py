"""Headless browsers for the tests of the live page: the system's Chromium, or the one that playwright was told to fetch; and
Firefox, where it can be had.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Playwright, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
#: A Firefox as it comes, which playwright drives through WebDriver BiDi if it is new enough; empty: playwright's own build.
FIREFOX = os.environ.get("FIREFOX")


def engines() -> list[str]:
    """Browsers to test with. Firefox's is one that was named (FIREFOX=/path/to/it), or that playwright was told to fetch."""
    with sync_playwright() as playwright:
        fetched = Path(playwright.firefox.executable_path).exists()
    return ["chromium", "firefox"] if FIREFOX or fetched else ["chromium"]


@contextmanager
def browser_of(engine: str) -> Iterator[Browser]:
    """Skips the test where there is no Chromium; in CI that is a failure."""
    with sync_playwright() as playwright:
        browser = _firefox(playwright) if engine == "firefox" else _chromium(playwright)
        try:
            yield browser
        finally:
            browser.close()


def _firefox(playwright: Playwright) -> Browser:
    if FIREFOX:
        return playwright.firefox.launch(executable_path=FIREFOX, channel="moz-firefox")
    return playwright.firefox.launch()


def _chromium(playwright: Playwright) -> Browser:
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None and not Path(playwright.chromium.executable_path).exists():
        reason = "no Chromium: apt-get install chromium (or `playwright install chromium`, or CHROMIUM=/path/to/it)"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return playwright.chromium.launch(executable_path=found)
