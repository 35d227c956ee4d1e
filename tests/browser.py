"""Pages in headless Chromium: what they say and ask for, and pictures of them.

``python -m tests.browser FOLDER PAGE ...`` writes a picture of each page, wide and narrow, light and dark, and prints
what is wrong with it. Pages of a site, such as build/site that ``make docs`` writes, are opened with ``--site``, as if
a server sent them: from the disk their search would not run.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
WIDTHS = (1400, 390)
SCHEMES = ("light", "dark")
_SERVER = "http://site.invalid"
"""No request to it leaves: :class:`Visit` answers."""

_BEYOND = """
() => [...document.querySelectorAll('body *')].filter(element => {
  const box = element.getBoundingClientRect();
  if (box.width === 0 || box.right <= innerWidth + 1) return false;
  for (let above = element.parentElement; above; above = above.parentElement)
    if (getComputedStyle(above).overflowX !== 'visible') return false;
  return getComputedStyle(element).position !== 'fixed';
}).map(element => element.outerHTML.slice(0, 120))
"""
"""Elements that reach beyond the window, unless they can be scrolled to or are hidden on purpose."""


@contextmanager
def chromium() -> Iterator[Any]:
    """Start the browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # Chromium refuses its sandbox to root, as in a container.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


class Visit:
    """A page opened in a window, and all that it said and asked for; nothing but files can be reached.

    Parameters
    ----------
    browser
        Of :func:`chromium`.
    page : Path
    ready : str
        Selector of what is there when the page is ready.
    site : Path, optional
        The folder whose files are sent as if by a server.
    options
        Of the window.
    """

    def __init__(self, browser: Any, page: Path, ready: str = "body", site: Path | None = None, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(300_000)  # a busy machine starts pages slowly
        self.said: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.site = site
        self.context.route(lambda url: url.startswith("http"), self._send)
        self.page.goto(page.as_uri() if site is None else f"{_SERVER}/{page.relative_to(site).as_posix()}")
        self.page.wait_for_selector(ready)

    def _send(self, route: Any) -> None:
        if self.site is None or not route.request.url.startswith(f"{_SERVER}/"):
            route.abort()
        else:
            route.fulfill(path=self.site / urlsplit(route.request.url).path.lstrip("/"))

    def beyond(self) -> list[str]:
        """Return what reaches beyond the window's right edge."""
        wide: int = self.page.evaluate("document.documentElement.scrollWidth - innerWidth")
        found: list[str] = self.page.evaluate(_BEYOND)
        return [f"the page is {wide} px too wide", *found] if wide > 0 else found

    def faults(self) -> list[str]:
        """Return what the page said, asked of other machines, or let reach beyond the window."""
        away = [url for url in self.requests if not url.startswith(("file:", "data:", "blob:", f"{_SERVER}/"))]
        return [*self.said, *(f"asked for {url}" for url in away), *self.beyond()]


def looks(width: int, scheme: str) -> dict[str, Any]:
    """Options of a window: a phone if it is narrow."""
    narrow = width < 600
    size = {"width": width, "height": 844 if narrow else 1000}
    return {"viewport": size, "color_scheme": scheme, "is_mobile": narrow, "has_touch": narrow}


def shoot(folder: Path, pages: list[Path], site: Path | None = None) -> list[str]:
    """Write pictures of pages; return their faults."""
    folder.mkdir(parents=True, exist_ok=True)
    faults = []
    with chromium() as browser:
        for page in pages:
            for width in WIDTHS:
                for scheme in SCHEMES:
                    report = "data-ready" in page.read_text(encoding="utf-8")[-20_000:]
                    visit = Visit(browser, page, "html[data-ready]" if report else "body", site, **looks(width, scheme))
                    visit.page.wait_for_timeout(1000)
                    visit.page.screenshot(path=folder / f"{page.stem}-{width}-{scheme}.png", full_page=True)
                    faults += [f"{page.name}, {width}, {scheme}: {fault}" for fault in visit.faults()]
                    visit.context.close()
    return faults


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("pages", type=lambda name: Path(name).resolve(), nargs="+")
    parser.add_argument(
        "--site", type=lambda name: Path(name).resolve(), help="the folder of the site that they are of"
    )
    arguments = parser.parse_args()
    print("\n".join(shoot(arguments.folder, arguments.pages, arguments.site)) or "nothing is wrong")
