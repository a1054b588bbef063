"""A real browser for tests of pages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

REQUIRE_CHROMIUM = "HPC_RLHF_REQUIRE_CHROMIUM"
_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
          "--disable-background-networking", "--disable-component-update"]  # fmt: skip


@contextmanager
def started() -> Iterator[Browser]:
    """Start Chromium; skips the test where there is none."""
    chromium = shutil.which("chromium")
    if chromium is None and os.environ.get(REQUIRE_CHROMIUM) == "1":
        pytest.fail(f"{REQUIRE_CHROMIUM}=1, but there is no chromium")
    if chromium is None:
        pytest.skip("no chromium: scripts/install-chromium.sh installs it on Debian")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=_FLAGS)
        yield browser
        browser.close()


def serious_violations(page: Page) -> list[tuple[str, str]]:
    """The serious findings of axe, each with the first element that it is about."""
    violations = Axe().run(page).response["violations"]
    return [(one["id"], one["nodes"][0]["html"]) for one in violations if one["impact"] in ("serious", "critical")]
