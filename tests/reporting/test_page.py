"""report.html in a real browser: headless Chromium, driven by the DevTools protocol."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import browser as browsers
from tests.browser import CHROMIUM, SCHEMES, WIDTHS, chromium, looks

pytest.importorskip("playwright", reason="playwright is not installed (pip install .[dev])")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium (apt-get install chromium, or set CHROMIUM)"),
]
READY = "html[data-ready]"
METHODS = ("fed-sb", "fedit", "ffa-lora")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


class Visit(browsers.Visit):
    """A report in a window."""

    def __init__(self, browser: Any, report: Path, **options: Any) -> None:
        super().__init__(browser, report, READY, **options)

    def colour(self, selector: str, property_: str) -> tuple[int, ...]:
        """Return an element's colour as red, green and blue."""
        script = "([selector, name]) => getComputedStyle(document.querySelector(selector))[name]"
        return tuple(int(n) for n in re.findall(r"\d+", self.page.evaluate(script, [selector, property_]))[:3])

    def ticks(self, unlike: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Return the colour of the plots' ticks, as soon as it is another than ``unlike``."""
        for _ in range(100):
            fill = self.page.evaluate("document.querySelector('.xtick text').style.fill")
            colour = tuple(int(n) for n in re.findall(r"\d+", fill)[:3])
            if colour != unlike:
                return colour
            self.page.wait_for_timeout(100)
        raise AssertionError(f"the ticks stay {colour}")


@pytest.fixture(scope="module")
def report(compared: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page alone: what it needs from beside it would be missing."""
    return Path(shutil.copy(compared[1] / "report.html", tmp_path_factory.mktemp("alone")))


@pytest.fixture(scope="module")
def desktop(browser: Any, report: Path) -> Iterator[Visit]:
    visit = Visit(browser, report, viewport={"width": 1280, "height": 900}, color_scheme="light")
    yield visit
    # Whatever the tests did, nothing went wrong and nothing was fetched.
    assert visit.said == []
    assert visit.requests == [report.as_uri()]
    visit.context.close()


def shown(visit: Visit) -> dict[str, set[str]]:
    """Methods that each plot shows."""
    return visit.page.evaluate(
        """() => Object.fromEntries([...document.querySelectorAll('[data-plot]')].map(place => [place.id,
             [...new Set(place.data.filter(t => t.visible !== false && t.meta.method).map(t => t.meta.method))]]))"""
    )


def test_all_plots_are_drawn(desktop: Visit) -> None:
    drawn = desktop.page.evaluate(
        "[...document.querySelectorAll('[data-plot]')].map(p => !!p.querySelector('svg.main-svg'))"
    )
    assert len(drawn) > 12
    assert all(drawn)
    assert all(set(methods) <= set(METHODS) for methods in shown(desktop).values())
    assert set(shown(desktop)["plot-score-epsilon-0"]) == set(METHODS)


def test_hover_shows_the_config(desktop: Visit) -> None:
    place = desktop.page.locator("#plot-score-epsilon-0")
    place.scroll_into_view_if_needed()
    # Where the plot has its third trace's first point.
    x, y = desktop.page.evaluate(
        """() => {
            const plot = document.getElementById('plot-score-epsilon-0'), trace = plot.data[2];
            const { xaxis, yaxis } = plot._fullLayout, box = plot.getBoundingClientRect();
            return [box.left + xaxis._offset + xaxis.d2p(trace.x[0]), box.top + yaxis._offset + yaxis.d2p(trace.y[0])];
        }"""
    )
    desktop.page.mouse.move(x - 30, y - 30)
    desktop.page.mouse.move(x, y, steps=4)
    label = place.locator(".hovertext")
    label.wait_for()
    lines = "node => [...node.querySelectorAll('tspan.line')].map(line => line.textContent).join('; ')"
    text = label.first.evaluate(lines)
    for part in ("rank", "ε 1", "learning rate", "accuracy", "±", "sent", "epsilon", "seeds 0, 1, 2"):
        assert part in text
    desktop.page.mouse.move(0, 0)


def test_a_click_filters_by_method(desktop: Visit) -> None:
    page = desktop.page
    ranges = "[...document.querySelectorAll('[data-plot]')].map(p => [p.layout.xaxis.range, p.layout.yaxis.range])"
    before = page.evaluate(ranges)
    page.click("nav button[data-method=fedit]")
    # What is left is read on the same scale.
    assert page.evaluate(ranges) == before
    assert {tuple(methods) for methods in shown(desktop).values()} <= {("fedit",), ()}
    assert shown(desktop)["plot-score-epsilon-0"] == ["fedit"]
    rows = page.eval_on_selector_all(
        "#results tbody tr", "rows => rows.filter(r => r.offsetParent).map(r => r.dataset.method)"
    )
    assert rows == ["fedit"] * 3
    assert page.get_attribute("nav button[data-method=fedit]", "aria-pressed") == "true"
    page.click("nav button[data-method=fed-sb]")
    assert set(shown(desktop)["plot-score-epsilon-0"]) == {"fedit", "fed-sb"}
    page.click("#all")
    assert set(shown(desktop)["plot-score-epsilon-0"]) == set(METHODS)
    assert not page.is_visible("#all")


def test_a_click_on_a_point_filters_by_its_method(desktop: Visit) -> None:
    desktop.page.evaluate(
        """() => { const p = document.getElementById('plot-pareto-0');
                   p.emit('plotly_click', {points: [{data: p.data.find(t => t.meta.method === 'ffa-lora')}]}); }"""
    )
    assert shown(desktop)["plot-pareto-0"] == ["ffa-lora"]
    desktop.page.click("#all")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_and_its_text_stands_out(browser: Any, report: Path, width: int, scheme: str) -> None:
    visit = Visit(browser, report, **looks(width, scheme))
    visit.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert visit.faults() == []
    # Nor is anything cut off by a plot or a table.
    outside = f"element => element.getBoundingClientRect().right > {width + 1} && !element.closest('.plot')"
    assert visit.page.evaluate(f"[...document.querySelectorAll('body *')].filter({outside}).length") == 0
    paper, ink = visit.colour("body", "backgroundColor"), visit.colour("body", "color")
    assert (sum(paper) < sum(ink)) == (scheme == "dark")
    assert contrast(paper, ink) > 7
    assert contrast(paper, visit.ticks()) > 4.5
    assert visit.requests == [report.as_uri()]
    visit.context.close()


def test_dark_mode_follows_the_system_while_the_page_is_open(browser: Any, report: Path) -> None:
    visit = Visit(browser, report, viewport={"width": 800, "height": 600}, color_scheme="light")
    before = visit.ticks()
    visit.page.emulate_media(color_scheme="dark")
    assert contrast(visit.ticks(unlike=before), visit.colour("body", "backgroundColor")) > 4.5
    assert visit.said == []
    visit.context.close()


def test_it_prints(browser: Any, report: Path) -> None:
    visit = Visit(browser, report, viewport={"width": 1280, "height": 900}, color_scheme="dark")
    before = visit.ticks()
    visit.page.emulate_media(media="print")
    # Black on white, whatever the screen has.
    assert visit.colour("body", "color") == (0, 0, 0)
    assert contrast(visit.ticks(unlike=before), (255, 255, 255)) > 4.5
    assert visit.page.pdf(format="A4").startswith(b"%PDF")
    assert visit.said == []
    visit.context.close()


def luminance(colour: tuple[int, ...]) -> float:
    parts = [c / 255 for c in colour]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """Contrast ratio of two colours (WCAG 2)."""
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)
