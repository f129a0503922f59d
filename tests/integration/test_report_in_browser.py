"""The report in a real browser: offline, in light and dark schemes, on wide and narrow screens."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from peft_core.evaluation.loss_curve import loss_curve
from peft_core.evaluation.report import render_report
from tests.factories import make_evaluation
from tests.unit.evaluation.test_report import EVENTS, HOSTILE

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", "--disable-background-networking"]
        )
        yield browser
        browser.close()


@pytest.fixture
def report(tmp_path: Path) -> Path:
    path = tmp_path / "report.html"
    tables = {"Data": {"files": "12", "a long name": "x" * 300, "hostile": HOSTILE}}
    page = render_report(
        title="web on SmolLM2", subtitle=HOSTILE, result=make_evaluation(), curve=loss_curve(EVENTS), tables=tables
    )
    path.write_text(page, encoding="utf-8")
    return path


def open_report(browser: Browser, report: Path, *, dark: bool = False, width: int = 1000) -> tuple[Page, list[str]]:
    """Open the report. Return the page, and everything that the browser complained about or requested besides the page."""
    context = browser.new_context(
        offline=True, color_scheme="dark" if dark else "light", viewport={"width": width, "height": 900}
    )
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(f"a dialog: {dialog.message}"))
    page.on("request", lambda request: complaints.append(request.url) if request.url != report.as_uri() else None)
    page.goto(report.as_uri())
    return page, complaints


def test_the_report_opens_offline_and_requests_nothing(browser: Browser, report: Path) -> None:
    page, complaints = open_report(browser, report)
    assert complaints == []
    assert page.locator("h1").inner_text() == "The adapter helps"
    assert page.locator("script, img").count() == 0


def test_the_report_draws_its_curves(browser: Browser, report: Path) -> None:
    page, _ = open_report(browser, report)
    for curve in ("step", "smooth", "held"):
        box = page.locator(f"polyline.{curve}").bounding_box()
        assert box is not None
        assert box["width"] > 100
        assert box["height"] > 10


@pytest.mark.parametrize("dark", [False, True])
def test_the_report_has_sufficient_contrast_in_both_colour_schemes(browser: Browser, report: Path, dark: bool) -> None:
    page, _ = open_report(browser, report, dark=dark)
    ratios = page.evaluate(CONTRAST)
    assert ratios["paper"] < 0.1 if dark else ratios["paper"] > 0.9
    assert ratios["least"] >= 4.5, ratios  # WCAG 2.2, level AA, for text


@pytest.mark.parametrize("width", [360, 1000])
def test_the_report_fits_the_width_of_the_window(browser: Browser, report: Path, width: int) -> None:
    page, _ = open_report(browser, report, width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


# Relative luminance and contrast as WCAG 2.2 defines them, over every element that holds text of its own.
CONTRAST = """() => {
  const luminance = colour => {
    const channels = colour.match(/[0-9.]+/g).slice(0, 3).map(c => c / 255);
    const [r, g, b] = channels.map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (colour !== "rgba(0, 0, 0, 0)") return luminance(colour);
    }
    return 1;
  };
  const hasText = e => [...e.childNodes].some(n => n.nodeType === Node.TEXT_NODE && n.textContent.trim());
  let least = 21, where = "";
  for (const element of [...document.body.querySelectorAll("*")].filter(hasText)) {
    const style = getComputedStyle(element);
    const ink = luminance(element instanceof SVGElement ? style.fill : style.color), paper = behind(element);
    const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    if (ratio < least) [least, where] = [ratio, element.outerHTML.slice(0, 200)];
  }
  return { least, where, paper: behind(document.body) };
}"""
