"""Tests of reports in headless Chromium, on a phone's width and a desk's, light and dark."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_runs import HOSTILE, write_run

import grao_fast

pytestmark = pytest.mark.browser

SIZES = [(400, "light"), (400, "dark"), (1280, "light"), (1280, "dark")]
OPTIONS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip

# The least contrast (WCAG 2) of any text with what lies behind it.
CONTRAST = """() => {
  const parts = c => c.match(/[\\d.]+/g).map(Number);
  const light = c => { const [r, g, b] = parts(c).slice(0, 3).map(v => {
    v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = e => { for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor;
    if ((parts(c)[3] ?? 1) > 0) return c; } return 'rgb(255, 255, 255)'; };
  let least = [99, ''];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim());
    if (!own || !e.getClientRects().length) continue;
    const style = getComputedStyle(e);
    const colour = e.tagName == 'text' ? style.fill : style.color;
    const [a, b] = [light(colour), light(behind(e))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < least[0]) least = [ratio, e.outerHTML.slice(0, 80)];
  }
  return least;
}"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason='needs playwright: pip install "grao-fast[browser]"'
    )
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if path is None:
        pytest.skip("needs chromium (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as api:
        browser = api.chromium.launch(executable_path=path, args=list(OPTIONS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    runs = [
        write_run(folder / "a", texts=HOSTILE, model="m" * 400),
        write_run(folder / ("<b>long name" + "n" * 100), texts=HOSTILE[:2], steps=12),
    ]
    return grao_fast.report(*runs, path=folder / "report.html")


@pytest.fixture(params=SIZES, ids=lambda size: f"{size[0]}-{size[1]}")
def opened(chromium: Any, report: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The report, opened in a window of its own; `heard` is what it asked for and complained of."""
    width, scheme = request.param
    context = chromium.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, java_script_enabled=True
    )
    page = context.new_page()
    page.heard = []
    page.on("request", lambda asked: page.heard.append(asked.url))
    page.on("console", lambda message: page.heard.append(message.text))
    page.on("pageerror", lambda error: page.heard.append(str(error)))
    page.on("dialog", lambda dialog: page.heard.append(dialog.message))
    page.goto(report.as_uri())
    page.eval_on_selector_all("details", "all => all.forEach(one => { one.open = true })")
    yield page
    context.close()


def test_nothing_is_fetched_or_run(opened: Any, report: Path) -> None:
    opened.wait_for_timeout(200)
    assert opened.heard == [report.as_uri()]
    assert opened.title().startswith("GRAO: a, <b>long name")
    assert opened.locator("script, img, iframe, link, object").count() == 0
    assert opened.locator("h1").count() == 1  # and none from a completion


def test_the_page_does_not_scroll_sideways(opened: Any) -> None:
    width = opened.viewport_size["width"]
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    reach = opened.eval_on_selector_all(
        "figure, .sample, .text, h1, h2, h3, .legend li",
        "all => Math.max(...all.map(one => one.getBoundingClientRect().right))",
    )
    assert reach <= width


def test_text_is_large_enough_and_stands_out(opened: Any) -> None:
    contrast, where = opened.evaluate(CONTRAST)
    assert contrast >= 4.5, where
    scale = opened.eval_on_selector_all(
        "figure svg[role=img]",
        "all => Math.min(...all.map(one => one.getBoundingClientRect().width / 380))",
    )
    assert 11 * scale >= 9  # pixels, of the labels of axes


def test_charts_are_drawn_within_their_frames(opened: Any) -> None:
    charts = opened.locator("figure svg[role=img]")
    assert charts.count() >= 10
    outside = charts.evaluate_all(
        """all => all.filter(one => [...one.querySelectorAll('path, circle, text')].some(part => {
            const b = part.getBBox();
            return b.x < -1 || b.y < -1 || b.x + b.width > 381 || b.y + b.height > 221;
        })).map(one => one.getAttribute('aria-label'))"""
    )
    assert outside == []
    lines = charts.first.locator(".line")
    assert lines.count() == 6  # samples, references and held out, of two runs
    assert lines.first.evaluate("one => one.getTotalLength()") > 100
    assert len({lines.nth(n).evaluate("one => getComputedStyle(one).stroke") for n in (0, 5)}) == 2
