"""The dashboard in a real browser: any width and theme, keyboard, live changes, and hostile text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from hpc_rlhf.run.layout import RunDir
from tests import chromium
from tests.observe.dashboard.running import TOKEN, watching
from tests.observe.dashboard.test_board import rename
from tests.observe.report_runs import HOSTILE, evaluate, make_reported_run

pytestmark = [pytest.mark.xdist_group("browser"), pytest.mark.slow]

LATER = 15_000  # milliseconds in which a change reaches the page


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium.started() as browser:
        yield browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, one of them with hostile texts and many interruptions, and one that cannot be read."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        hostile = make_reported_run(folder / "hostile", patch, steps=400, interruptions=9)
        other = make_reported_run(folder / "other", patch, steps=300)
    rename(hostile, HOSTILE)
    rename(other, "other-" + "long" * 20)
    evaluate(hostile, HOSTILE, {"sft": HOSTILE, "ppo": "W" * 500, "reference": ""})
    (folder / "damaged").mkdir()
    for name in ("job.yaml", "plan.json"):
        (folder / "damaged" / name).write_text("{")
    return folder


@pytest.fixture(scope="module")
def base(folder: Path) -> Iterator[str]:
    with watching(folder) as base:
        yield base


def opened(browser: Browser, base: str, width: int = 1200, theme: Any = "light") -> tuple[Page, list[str]]:
    """The page, and a list that collects what must not happen there."""
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme).new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: (wrong.append("a script ran"), dialog.dismiss()))
    page.on("request", lambda each: None if each.url.startswith((base, "data:")) else wrong.append(each.url))
    page.goto(f"{base}/#{TOKEN}")
    expect(page.locator("#runs tbody tr")).to_have_count(2)
    return page, wrong


def choose_both(page: Page) -> None:
    for box in page.locator("#runs input").all():
        box.check()
    expect(page.locator("#chips li")).to_have_count(2)
    expect(page.locator("#curves-ppo .plot").first.locator(".u-legend .u-series")).to_have_count(3)


@pytest.mark.parametrize(("width", "theme"), [(320, "light"), (320, "dark"), (800, "light"), (1600, "dark")])
def test_the_page_fits_and_is_accessible(browser: Browser, base: str, width: int, theme: str) -> None:
    page, wrong = opened(browser, base, width, theme)
    choose_both(page)
    page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert chromium.serious_violations(page) == []
    expect(page.locator("#left-out")).to_contain_text("left out")
    expect(page.locator("#responses .text").filter(has_text="<script>")).to_have_count(1)
    assert page.locator(".plot canvas").count() == page.locator(".plot").count() > 20
    assert wrong == []
    page.context.close()


def test_the_keyboard_chooses_runs_and_the_address_keeps_them(browser: Browser, base: str) -> None:
    page, wrong = opened(browser, base)
    boxes = page.locator("#runs input")
    assert [box.is_checked() for box in boxes.all()] == [True, False]
    boxes.nth(1).focus()
    page.keyboard.press("Space")
    expect(page.locator("#chosen-title")).to_have_text("2 runs chosen")
    expect(page.locator("#curves-ppo .plot").first).to_have_attribute("aria-label", re.compile("other-long"))
    latest = page.locator("#curves-ppo .plot").first.locator(".u-legend .u-value")
    assert latest.first.inner_text() == "400"
    assert "–" not in [value.inner_text() for value in latest.all()]  # though the other run has 300 steps
    page.reload()
    expect(page.locator("#chosen-title")).to_have_text("2 runs chosen")
    page.locator("#chips button").first.click()
    expect(page.locator("#chosen-title")).to_have_text("1 run chosen")
    assert [box.is_checked() for box in boxes.all()] == [False, True]
    page.locator("#filter").fill("hostile")
    expect(page.locator("#runs tbody tr")).to_have_count(1)
    page.get_by_role("button", name="Done").click()
    page.locator("#filter").fill("nothing like this")
    expect(page.locator("#none")).to_have_text("No run matches.")
    assert wrong == []
    page.context.close()


def test_changes_appear_by_themselves(browser: Browser, base: str, folder: Path) -> None:
    run = RunDir(folder / "other")
    manifest, metrics = run.stage("ppo").model / "manifest.json", run.stage("ppo").metrics
    whole, rows = manifest.read_text(), metrics.read_text()
    manifest.unlink()
    metrics.write_text("".join(f"{line}\n" for line in rows.splitlines()[:100]))
    page, wrong = opened(browser, base)
    row = page.locator("#runs tbody tr").filter(has_text="other")
    expect(row).to_contain_text("step 100 of 300", timeout=LATER)
    row.locator("input").check()
    steps = page.locator("#curves-ppo .plot").first.locator(".u-legend .u-value").first
    page.locator("#chips button").first.click()
    expect(steps).to_have_text("100")
    box = page.locator("#curves-ppo .plot").first.element_handle()
    manifest.write_text(whole)
    metrics.write_text(rows)
    expect(row).to_contain_text("3 of 3 stages", timeout=LATER)
    expect(page.locator("#announcer")).to_contain_text("is done")
    expect(steps).to_have_text("300", timeout=LATER)
    assert box is not None
    assert box.is_visible()  # the same element
    assert wrong == []
    page.context.close()


def test_without_the_token_the_page_asks_for_it(browser: Browser, base: str) -> None:
    page = browser.new_context().new_page()
    page.goto(f"{base}/#wrong")
    expect(page.locator("#login-problem")).to_have_text("The server does not accept this token.")
    assert page.locator("#workspace").is_hidden()
    page.get_by_label("Token").fill(TOKEN)
    page.keyboard.press("Enter")
    expect(page.locator("#runs tbody tr")).to_have_count(2)
    assert TOKEN not in page.url
    page.context.close()


def test_a_lost_server_is_reported_and_what_is_known_stays(browser: Browser, folder: Path) -> None:
    with watching(folder) as base:
        page, _ = opened(browser, base)
        expect(page.locator("#live")).to_contain_text("live")
    page.evaluate("refresh()")
    expect(page.locator("#problem")).to_contain_text("cannot be reached")
    expect(page.locator("#live")).to_contain_text("not connected")
    expect(page.locator("#runs tbody tr")).to_have_count(2)
    page.context.close()
