"""What a server may make of a run folder here: files in it, and nothing else."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.deployment import download
from fedlora.deployment.control import Server
from fedlora.deployment.download import MANIFEST, MOST_BYTES, MOST_BYTES_A_FILE, MOST_FILES, check_files, copy_run
from fedlora.errors import InputError, RunError

HONEST = {
    "config.toml": b"[run]\n",
    "summary.json": b"{}",
    "rounds.jsonl": b"{}\n",
    "adapter/adapter_model.safetensors": b"abc",
    "checkpoint/state.sqlite": b"\0" * 9,
    "checkpoint/empty": b"",
    "experts/ward 7/expert.json": b"{}",
    "experts/%C3%A4/expert.json": b"{}",
}

BAD = [
    *(
        "../../victim/.bashrc",
        "..",
        "../x",
        "a/../../x",
        "a/..",
        "./x",
        "a/./x",
        "a//x",
        "a/",
        "/etc/passwd",
        "//x",
        "",
    ),
    *(
        "..\\x",
        "a\\..\\..\\x",
        "C:\\x",
        "C:x",
        "c:/x",
        "\\\\host\\share",
        "file:stream",
        "~/x\0",
        "a\0b",
        "a\nb",
        "\x1b[2J",
    ),
    *(".bashrc", ".git/hooks/post-checkout", "a/.ssh/authorized_keys", "x" * 256, "ä" * 128, "a/" * 600 + "x"),
    *("nul", "CON", "com1.txt", "a/aux/b", "a.", "a ", "a./b", "\u202etxt.exe", "\u2028", "\ud800", ".", MANIFEST),
]


def server(
    files: dict[str, bytes], answer: Callable[[httpx.Request], httpx.Response | None] = lambda r: None
) -> Server:
    """Make a connection to a server that lists and sends these files; ``answer`` may say something else."""

    def handle(request: httpx.Request) -> httpx.Response:
        own = answer(request)
        if own is not None:
            return own
        file = unquote(request.url.raw_path.decode()).partition("/runs/first")[2].removeprefix("/")
        if not file:
            return httpx.Response(200, content=json.dumps({name: len(content) for name, content in files.items()}))
        return httpx.Response(200, content=files[file]) if file in files else httpx.Response(404)

    made = object.__new__(Server)
    made.address = "fed.example:8000"
    made._http = httpx.Client(transport=httpx.MockTransport(handle), base_url="https://fed.example:8000")
    return made


def listing(content: Any, **about: Any) -> Callable[[httpx.Request], httpx.Response | None]:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda request: httpx.Response(200, content=body, **about) if request.url.path.endswith("/first") else None


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder two below a victim's."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / ".bashrc").write_text("mine")
    (tmp_path / "home" / "runs").mkdir(parents=True)
    return tmp_path / "home" / "runs" / "first"


def untouched(here: Path) -> bool:
    """Whether nothing was written anywhere."""
    root = here.parents[2]
    return tree(root) == {"victim/.bashrc": b"mine"} and list(here.parent.iterdir()) == []


def test_a_run_folder_is_copied_whole(here: Path) -> None:
    copy_run(server(HONEST), "first", here)
    assert tree(here) == HONEST
    assert list(here.parent.iterdir()) == [here]


def test_nothing_is_made_of_a_run_without_files(here: Path) -> None:
    copy_run(server({}), "first", here)
    copy_run(server({}, lambda request: httpx.Response(404)), "first", here)
    assert untouched(here)


@pytest.mark.parametrize("name", BAD)
def test_a_name_that_does_not_lie_in_the_folder_is_refused_in_one_line(here: Path, name: str) -> None:
    with pytest.raises(RunError, match="lists a file that is not copied") as error:
        copy_run(server({**HONEST, name: b"evil"}), "first", here)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300
    assert untouched(here)


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (("Notes.txt", "notes.txt"), "only in case"),
        (("experts/A/x", "experts/a/y"), "only in case"),
        (("stra\u00dfe", "STRASSE"), "only in case"),
        (("\u00e9", "e\u0301"), "only in case"),
        (("a", "a/b"), "a file and a folder"),
        (("a/b/c", "a/b"), "a file and a folder"),
        (("A", "a/b"), "only in case"),
    ],
)
def test_names_that_are_one_on_some_system_are_refused(here: Path, names: tuple[str, str], why: str) -> None:
    with pytest.raises(RunError, match=why):
        copy_run(server({**HONEST, **dict.fromkeys(names, b"x")}), "first", here)
    assert untouched(here)


@given(
    st.text(max_size=30) | st.lists(st.sampled_from(["..", ".", "", "a", "A", "\\", "c:", " ", "nul"])).map("/".join)
)
def test_whatever_passes_lies_in_the_folder(name: str) -> None:
    with contextlib.suppress(RunError):
        check_files({name: 1}, "fed.example:8000")
        for system in (os.path, __import__("ntpath")):
            whole = system.normpath(system.join(f"{system.sep}runs", name))
            assert whole.startswith(f"{system.sep}runs{system.sep}")
        assert name == name.strip(".").strip()


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        ({f"f{i}": 0 for i in range(MOST_FILES + 1)}, "more than 10000"),
        ({"a": MOST_BYTES_A_FILE + 1}, "larger than 32 GiB"),
        ({f"f{i}": MOST_BYTES_A_FILE for i in range(MOST_BYTES // MOST_BYTES_A_FILE + 1)}, "more than 128 GiB"),
    ],
)
def test_too_many_and_too_large_files_are_refused_before_any_is_asked_for(
    here: Path, sizes: dict[str, int], why: str
) -> None:
    with pytest.raises(RunError, match=why):
        copy_run(server({}, listing(sizes)), "first", here)
    assert untouched(here)


def test_what_does_not_fit_the_disk_is_refused_before_it_is_asked_for(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: SimpleNamespace(free=9))
    with pytest.raises(InputError, match="has 9 bytes of room"):
        copy_run(server(HONEST), "first", here)
    assert untouched(here)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"nonsense", b"\xff", b"[" * 10**5, b'{"a": -1}', b'{"a": 1.5}', b'{"a": true}', b'{"a": "1"}',
        b'{"a": null}', b'{"a": 1, "a": 2}', b'{"a": {"b": 1}}', b"1" * 10**4, b'{"a": 1e999}', b"\0" * (9 * 2**20),
    ],
)  # fmt: skip
def test_a_list_that_is_none_is_one_line(here: Path, body: bytes) -> None:
    with pytest.raises(RunError, match=r"fed\.example:8000 (does not answer like|sends more than)") as error:
        copy_run(server({}, listing(body)), "first", here)
    assert "\n" not in str(error.value)
    assert untouched(here)


@pytest.mark.parametrize("sent", [b"{}more", b"{", b"", b"x" * 10**7])
def test_a_file_of_another_size_than_was_listed_is_refused_and_nothing_stays(here: Path, sent: bytes) -> None:
    def answer(request: httpx.Request) -> httpx.Response | None:
        return httpx.Response(200, content=sent) if request.url.path.endswith("/summary.json") else None

    with pytest.raises(RunError, match="sends"):
        copy_run(server(HONEST, answer), "first", here)
    assert untouched(here)


def test_an_endless_file_is_cut_off(here: Path) -> None:
    sent = 0

    def endless() -> Any:
        nonlocal sent
        while True:
            sent += 1000
            yield b"x" * 1000

    def answer(request: httpx.Request) -> httpx.Response | None:
        return httpx.Response(200, content=endless()) if "/first/" in request.url.path else None

    with pytest.raises(RunError, match="sends more than"):
        copy_run(server(HONEST, answer), "first", here)
    assert sent <= 3000
    assert untouched(here)


@pytest.mark.parametrize("path", ["/first", "/first/summary.json"])
def test_compressed_bytes_are_refused_before_they_grow(here: Path, path: str) -> None:
    bomb = gzip.compress(b"\0" * 10**8)
    headers = {"Content-Encoding": "gzip"}

    def answer(request: httpx.Request) -> httpx.Response | None:
        assert request.headers["Accept-Encoding"] == "identity"
        stream = httpx.ByteStream(bomb)
        return httpx.Response(200, stream=stream, headers=headers) if request.url.path.endswith(path) else None

    with pytest.raises(RunError, match="compressed"):
        copy_run(server(HONEST, answer), "first", here)
    assert untouched(here)


def test_on_resume_what_was_copied_is_replaced_and_the_rest_stays(here: Path) -> None:
    copy_run(server(HONEST), "first", here)
    (here / "notes.txt").write_text("mine")
    (here / "adapter" / "mine.txt").write_text("mine")
    more = {**HONEST, "rounds.jsonl": b"{}\n{}\n", "new/file": b"x"}
    copy_run(server(more), "first", here)
    assert tree(here) == {**more, "notes.txt": b"mine", "adapter/mine.txt": b"mine"}
    # What was changed here by the command itself counts as copied.
    (here / "summary.json").write_text('{"rounds": 1}')
    download.note_change(here, "summary.json")
    copy_run(server(more), "first", here)
    assert tree(here) == {**more, "notes.txt": b"mine", "adapter/mine.txt": b"mine"}


@pytest.mark.parametrize("name", ["notes.txt", "summary.json", "adapter/mine.txt", "rounds.jsonl/x", "adapter"])
def test_an_existing_file_is_not_overwritten(here: Path, name: str) -> None:
    copy_run(server(HONEST), "first", here)
    for mine in ("notes.txt", "summary.json", "adapter/mine.txt"):
        (here / mine).write_text("mine")
    before = tree(here)
    with pytest.raises(InputError, match=r"--output.*(exists, and differs from what the server sent|in the way)"):
        copy_run(server({"config.toml": b"new", name: b"theirs"}), "first", here)
    assert tree(here) == before
    assert list(here.parent.iterdir()) == [here]


@pytest.mark.parametrize("kind", ["folder", "dangling folder", "file", "dangling file", "hard link", "pipe"])
def test_links_and_devices_in_the_folder_are_not_followed(here: Path, kind: str) -> None:
    copy_run(server(HONEST), "first", here)
    victim = here.parents[2] / "victim"
    if "folder" in kind:
        (here / "new").symlink_to(victim if kind == "folder" else victim / "none")
        names = {"new/bashrc": b"theirs"}
    elif kind == "hard link":
        os.link(victim / ".bashrc", here / "new")
        names = {"new": b"theirs"}
    elif kind == "pipe":
        os.mkfifo(here / "new")
        names = {"new": b"theirs"}
    else:
        (here / "new").symlink_to(victim / (".bashrc" if kind == "file" else "none"))
        names = {"new": b"theirs"}
    with pytest.raises(InputError, match="--output"):
        copy_run(server(names), "first", here)
    assert [p.name for p in victim.iterdir()] == [".bashrc"]
    assert (victim / ".bashrc").read_text() == "mine"


@pytest.mark.parametrize("content", ["[]", "{", '{"a": 1}', '{"summary.json": "x"}'])
def test_a_damaged_list_of_copies_overwrites_nothing(here: Path, content: str) -> None:
    copy_run(server(HONEST), "first", here)
    (here / MANIFEST).write_text(content)
    (here / "summary.json").write_text("mine")
    with pytest.raises(InputError, match="--output"):
        copy_run(server(HONEST), "first", here)
    assert (here / "summary.json").read_text() == "mine"


def test_a_disk_that_is_full_or_closed_is_one_line_and_nothing_stays(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*about: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(download.os, "rename", full)
        with pytest.raises(InputError, match=r"No space left on device.*--resume: the server keeps the run"):
            copy_run(server(HONEST), "first", here)
    assert untouched(here)
    (here.parents[1] / "file").write_text("")
    with pytest.raises(InputError, match="--output"):
        copy_run(server(HONEST), "first", here.parents[1] / "file" / "first")


def test_what_a_server_says_cannot_write_to_the_terminal(here: Path) -> None:
    said = json.dumps({"code": 7, "message": "\x1b[2J" + "x" * 10**6}).encode()
    made = server({}, lambda request: httpx.Response(500, content=said))
    for call in (
        lambda: made.files("first"),
        lambda: made.lines("first", "run.log"),
        lambda: copy_run(made, "first", here),
    ):
        with pytest.raises(RunError) as error:
            call()
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 1000
