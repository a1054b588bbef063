"""The report in a real browser: drawing, any width, accessibility, and no foreign script."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from hpc_rlhf.observe.report.page import write_report
from tests import chromium
from tests.observe.report_runs import HOSTILE, evaluate, make_reported_run

pytestmark = [pytest.mark.xdist_group("browser"), pytest.mark.slow]

# Texts that share a place, and those that leave their box; what scrolls in a box of its own is left out.
_MISPLACED = """() => {
  const boxes = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, parent = node.parentElement;
    if (!node.data.trim() || parent.closest("script, style, noscript, title, pre, .wide") ||
    !parent.checkVisibility()) continue; const range = document.createRange();
    range.selectNodeContents(node);
    for (const box of range.getClientRects()) if (box.width > 1) boxes.push({ box, text:
    node.data.trim().slice(0, 40) });
  }
  boxes.sort((a, b) => a.box.top - b.box.top);
  const found = [];
  const wide = document.documentElement.clientWidth;
  boxes.forEach(({ box, text }, at) => {
    if (box.left < -1 || box.right > wide + 1) found.push(`out of the page: ${text}`);
    for (const other of boxes.slice(at + 1)) {
      if (other.box.top > box.bottom - 4) break;
      if (other.box.left < box.right - 2 && other.box.right > box.left + 2) found.push(`${text} |
      ${other.text}`);
    }
  });
  return found;
}"""


# What leaves the page or its box.
_CLIPPED = """() => [...document.querySelectorAll(".wide, pre, .plot, .plot canvas, table, section, td, .text")]
  .filter((each) => each.checkVisibility())
  .filter((each) => each.getBoundingClientRect().right > innerWidth + 1 || (
    ["auto", "scroll", "hidden"].includes(getComputedStyle(each).overflowX) && each.scrollWidth > each.clientWidth + 1))
  .map((each) => each.outerHTML.slice(0, 120))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium.started() as browser:
        yield browser


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run of 3,000 steps and 40 interruptions with hostile prompts and responses."""
    with pytest.MonkeyPatch.context() as patch:
        run = make_reported_run(tmp_path_factory.mktemp("report") / "run", patch, steps=3000, interruptions=40)
    evaluate(run, HOSTILE, {"sft": HOSTILE, "ppo": "W" * 500, "ema": "short", "reference": ""})
    return write_report(run)


def opened(browser: Browser, report: Path, width: int = 1440, theme: Any = "light") -> tuple[Page, list[str]]:
    """The report in a page, and a list that collects the errors of the page."""
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme).new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: (wrong.append("a script ran"), dialog.dismiss()))
    page.on("request", lambda request: None if request.url.startswith("file:") else wrong.append(request.url))
    page.goto(report.as_uri())
    return page, wrong


def draw_all(page: Page) -> int:
    """Scroll to every chart and return how many were drawn."""
    for plot in page.locator(".plot").all():
        plot.scroll_into_view_if_needed()
        plot.locator("canvas").wait_for()
    return page.locator(".plot canvas").count()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1440])
def test_report_renders_accessibly(browser: Browser, report: Path, width: int, theme: str) -> None:
    page, wrong = opened(browser, report, width, theme)
    assert draw_all(page) == page.locator(".plot").count() > 20
    page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(_MISPLACED) == []
    assert chromium.serious_violations(page) == []
    assert wrong == []
    page.context.close()


def test_theme_can_be_switched(browser: Browser, report: Path) -> None:
    page, wrong = opened(browser, report, theme="light")
    background = "getComputedStyle(document.body).backgroundColor"
    colours = [page.evaluate(background)]
    for _ in range(3):
        page.locator("#theme").click()
        colours.append(page.evaluate(background))
    as_system, light, dark, again = colours
    assert as_system == light == again != dark
    assert wrong == []
    page.context.close()


def test_paper_is_light_and_shows_everything(browser: Browser, report: Path) -> None:
    page, wrong = opened(browser, report, 1440, "dark")
    assert len(page.pdf(format="A4")) > 100_000
    page.set_viewport_size({"width": 718, "height": 1000})  # A4 within its margins
    page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator(".plot canvas").count() == page.locator(".plot").count() > 20
    faint = "getComputedStyle(document.documentElement).getPropertyValue('--faint')"
    assert page.evaluate(faint) == "#566070"
    assert page.evaluate(_CLIPPED) == []
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.emulate_media(media="screen", color_scheme="dark")
    assert page.evaluate(faint) == "#a3adbb"
    assert wrong == []
    page.context.close()


def test_curves_are_drawn_without_being_seen(browser: Browser, report: Path) -> None:
    page, _ = opened(browser, report)
    expect(page.locator(".plot canvas")).to_have_count(page.locator(".plot").count(), timeout=30_000)
    page.context.close()


def test_wide_tables_scroll_visibly_on_a_phone(browser: Browser, report: Path) -> None:
    page, _ = opened(browser, report, 390)
    wide = page.locator("#time .wide").first
    assert wide.evaluate("(box) => box.scrollWidth > box.clientWidth")
    end = {"x": 0, "y": 0, "width": 0, "height": 0} | dict(wide.bounding_box() or {})
    edge = {"x": end["x"] + end["width"] - 6, "y": end["y"] + 4, "width": 6, "height": end["height"] - 8}
    more = page.screenshot(clip=edge, full_page=True)
    cell = wide.locator("th[scope=row]").first
    before = cell.bounding_box()
    wide.evaluate("(box) => box.scrollTo(box.scrollWidth, 0)")
    assert cell.bounding_box() == before
    page.wait_for_timeout(100)
    assert page.screenshot(clip=edge, full_page=True) != more  # the shadow is gone at the end
    page.context.close()


def test_pointing_at_a_curve_shows_its_values(browser: Browser, report: Path) -> None:
    page, _ = opened(browser, report)
    plot = page.locator(".plot").first
    plot.scroll_into_view_if_needed()
    step = plot.locator(".u-legend .u-value").first
    assert step.inner_text() == "3,000"
    plot.locator(".u-over").hover(position={"x": 5, "y": 40})
    assert 0 < int(step.inner_text().replace(",", "")) < 300
    page.mouse.move(1, 1)
    assert step.inner_text() == "3,000"
    page.context.close()
