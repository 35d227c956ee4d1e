"""The documentation in a browser: after ``make docs``, in headless Chromium."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser import CHROMIUM, SCHEMES, WIDTHS, Visit, chromium, looks

SITE = Path(__file__).parents[1] / "build" / "site"
PAGES = ("index.html", "results/studies/index.html", "results/benchmarks/index.html", "reference/config.html")

pytest.importorskip("playwright", reason="playwright is not installed (pip install .[dev])")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium (apt-get install chromium, or set CHROMIUM)"),
    pytest.mark.skipif(not (SITE / PAGES[0]).is_file(), reason="the documentation is not built (make docs)"),
]


def test_pages_fit_say_nothing_and_ask_nobody() -> None:
    faults = {}
    with chromium() as browser:
        for page in PAGES:
            for width in WIDTHS:
                for scheme in SCHEMES:
                    visit = Visit(browser, SITE / page, site=SITE, **looks(width, scheme))
                    assert visit.page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
                    faults[page, width, scheme] = visit.faults()
                    visit.context.close()
    assert len(faults) == len(PAGES) * 4
    assert {look: found for look, found in faults.items() if found} == {}
