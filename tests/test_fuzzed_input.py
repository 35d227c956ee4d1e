"""Mutated configs and data files: a run begins to train or ends with 2 and one line, soon and without a traceback.

The suite tries a few. ``FEDLORA_FUZZ=2000 pytest tests/test_fuzzed_input.py`` tries that many configs and a quarter as
many of each other kind of file; ``FEDLORA_FUZZ_LOG=FILE`` writes a line of JSON for each, to look through what was
accepted. With ``FEDLORA_FUZZ_TRAIN`` set, runs that take next to no time do train.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import json
import os
import random
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fedlora.config import Config
from fedlora.deployment.config import ServerFile, load_server
from fedlora.errors import InputError
from fedlora.node.config import NodeConfig, load_node
from fedlora.simulation import LocalGrid
from fedlora.study.config import StudyConfig, load_study
from fedlora.study.plan import make_plan
from tests.bare_runs import bare_runs
from tests.command import fedlora
from tests.configs import KEYS, accepted, keys, put
from tests.tiny import base_model, save_llama

NUMBER = int(os.environ.get("FEDLORA_FUZZ", "48"))
TRAIN = "FEDLORA_FUZZ_TRAIN" in os.environ
LOG = os.environ.get("FEDLORA_FUZZ_LOG")
SECONDS = 20.0
"""The longest that a run may think before it trains; ten times as long as it takes on an idle machine."""

draws = settings(
    deadline=None,
    derandomize=True,
    database=None,
    # A failure is told as it was drawn: making it smaller takes a run for each try.
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


class TrainingError(Exception):
    """Raised where training would begin."""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with two tiny models and a file of examples; the cache is there too."""
    folder = tmp_path_factory.mktemp("fuzz")
    save_llama(folder / "decoder")
    base_model("bert").save_pretrained(folder / "encoder")  # type: ignore[operator]
    for file in (folder / "decoder").glob("*token*"):
        shutil.copy(file, folder / "encoder")
    (folder / "data.csv").write_text(rows(60))
    (folder / "other.csv").write_text(rows(9))
    (folder / "link.csv").symlink_to(folder / "link.csv")
    (folder / "gone.csv").symlink_to(folder / "nothing.csv")
    os.mkfifo(folder / "pipe")
    with bare_runs() as patch:
        patch.setenv("FEDLORA_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        patch.setattr("fedlora.simulation.RayGrid", grid)
        patch.setattr("fedlora.simulator.LocalGrid", grid)
        yield folder


def rows(number: int) -> str:
    words = random.Random(number)
    lines = [
        f"{' '.join(f'w{words.randint(4, 49)}' for _ in range(6))},{'pos' if row % 2 else 'neg'},o{row % 5}\n"
        for row in range(number)
    ]
    return "".join(["text,label,owner\n", *lines])


reached: list[float] = []
said: list[str] = []
"""When training began, and what a refusal said, in the try at hand."""


class Tries:
    """What became of inputs: all faults are told at the end, since one hides the next otherwise."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.accepted = self.number = 0

    def add(self, what: object, attempt: Callable[[], bool]) -> None:
        """Note whether an input is accepted, and anything but an answer as a fault."""
        self.number += 1
        reached.clear()
        said.clear()
        began, took, fault = time.monotonic(), False, ""
        try:
            took = attempt()
        except KeyboardInterrupt:
            raise
        except BaseException:
            fault = traceback.format_exc()
        seconds = (reached[0] if reached else time.monotonic()) - began
        if seconds > SECONDS:
            fault += f"\n{seconds:.0f} seconds"
        self.accepted += took
        if fault:
            self.faults.append(f"{what!r:.2000}: {fault}")
        if LOG:
            line = {"what": f"{what!r:.2000}", "accepted": took, "seconds": round(seconds, 2), "fault": fault}
            line["said"] = said[:1]
            with Path(LOG).open("a") as stream:
                stream.write(json.dumps(line) + "\n")

    def check(self, least: float = 0.2 if NUMBER >= 1000 else 0.1) -> None:
        """Fail if there was a fault, or if too small a share was accepted to say much."""
        assert not self.faults, f"{len(self.faults)} faults of {self.number}, the first: {self.faults[0]}"
        assert self.accepted > least * self.number, f"{self.accepted} of {self.number} accepted"


def grid(*arguments: Any, **options: Any) -> LocalGrid:
    """Stand for both grids: end where training would begin, or train if that is asked for and takes no time."""
    reached.append(time.monotonic())
    config = Config.from_toml(options["run_config"]["config"])
    steps = config.client.local_steps or (config.client.local_epochs or 1) * 20
    options = vars(config.method)  # those of the run's method alone
    router = options.get("router_tuning_steps", 0) + options.get("router_documents", 0) / 100
    small = config.server.timeout > 10 and config.simulation.gpus_per_worker == 0
    if TRAIN and small and config.run.rounds * steps * config.client.batch_size <= 1000 and router < 100:
        return LocalGrid(*arguments, **options)
    raise TrainingError


def trains(*arguments: object, output: Path) -> bool:
    """Run the command; say whether it accepted what it was given, after checking that it ended as it must."""
    done = None
    try:
        with contextlib.suppress(TrainingError):
            done = fedlora(*arguments, "--output", output)
        # What is refused leaves nothing behind.
        assert reached or not output.exists()
    finally:
        shutil.rmtree(output, ignore_errors=True)
    if done is not None and done.code != 0:
        said.append(done.err)
        assert done.code == 2 or (done.code == 1 and reached), done
        assert "Traceback" not in done.err
        assert len(done.err.splitlines()) == 1, done
    return bool(reached)


# Configs.

BASE: dict[str, Any] = {
    "run": {"rounds": 1},
    "model": {"name": "encoder", "max_length": 16},
    "data": {"name": "data.csv", "partition": {"clients": 3}},
    "method": {"name": "fedit", "rank": 2},
    "client": {"batch_size": 4, "local_steps": 1, "learning_rate": 0.01},
    "simulation": {"workers": 0},
}
CAUSAL: dict[str, Any] = {"model": {"name": "decoder", "task": "causal-lm", "max_length": 16}}
PRIVATE: dict[str, Any] = {"privacy": {"mode": "example", "noise_multiplier": 1.0, "target_delta": 1e-3}}

NUMBERS = [0, -1, 1, 2, 3, 5, 60, 1000, 10**6, 10**9, 10**12, 10**30, 2**31, 2**32, 2**63 - 1, 2**63, -(10**30)]
FLOATS = [float("nan"), float("inf"), float("-inf"), -1.0, -0.0, 0.0, 1e-300, 1e-9, 1e-3, 0.1, 0.5, 1.0, 2.0]
FLOATS += [8.0, 1e30, 1e308]
TEXTS = ["", " ", "x", "a" * 300, "x" * 100_000, "a\0b", "a\nb", "\x1b[31m", "é", "日本語", "‮", "../..", "~nobody/x"]
TEXTS += ["/dev/zero", "/dev/null", "/dev/stdin", "pipe", "link.csv", "gone.csv", ".", "/", "encoder", "decoder"]
TEXTS += [
    "other.csv",
    "data.csv",
    "asset:",
    "asset:no",
    "auto",
    "full",
    "nan",
    "none",
    "nodes",
    "server",
    "[",
    "(a+)+$",
]
TEXTS += ["text", "label", "owner", "query", "value", "1", "1e9", "true", "main"]
OTHERS: list[Any] = [[], [1], ["query"], ["a", "a"], ["pos", "neg"], [float("nan")], [[1]], {}, {"a": 1}, {"4": 1.0}]
OTHERS += [True, False, datetime.date(2020, 1, 1), datetime.time(1, 2), datetime.datetime(2020, 1, 1, 1, 1)]
ANY = st.sampled_from([*NUMBERS, *FLOATS, *TEXTS, *OTHERS])


def likely(annotation: Any) -> st.SearchStrategy[Any]:
    """Values of the type that a key takes, most of which mean something."""
    kinds, words = accepted(annotation)
    pools = [st.sampled_from(sorted(words))] if words else []
    for kind, values in (
        (bool, [True, False]),
        (int, [1, 2, 3, 5, 16, 64]),
        (float, [1e-3, 0.1, 0.5, 0.9]),
        (str, TEXTS[-20:]),
    ):
        if kind in kinds:
            pools.append(st.sampled_from(values))
    return st.one_of(pools or [ANY])


@st.composite
def mutated(draw: st.DrawFn, base: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """Change a config (or another file) at a few places."""
    content = copy.deepcopy(base)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        key = draw(st.sampled_from(sorted(known)))
        kind = draw(st.sampled_from(["likely"] * 16 + ["any"] * 4 + ["gone", "unknown", "section", "swap", "dotted"]))
        try:
            if kind == "likely":
                put(content, key, draw(likely(known[key])))
            elif kind == "any":
                put(content, key, draw(ANY))
            elif kind == "gone":
                section = draw(st.sampled_from(sorted(content)))
                if isinstance(content[section], dict) and content[section] and draw(st.booleans()):
                    content[section].pop(draw(st.sampled_from(sorted(content[section]))))
                else:
                    content.pop(section)
            elif kind == "unknown":
                put(content, draw(st.sampled_from([f"{key}x", f"x.{key}", f"{key}.x", f"{key[:-1]} "])), draw(ANY))
            elif kind == "section":
                put(content, key.partition(".")[0], draw(ANY))
            elif kind == "dotted":
                section, _, last = key.rpartition(".")
                put(content, section or "x", {f"{last}.{last}": 1})
            else:
                other = draw(st.sampled_from(sorted(known)))
                place = content
                for part in other.split("."):
                    place = place.get(part, {}) if isinstance(place, dict) else {}
                put(content, key, copy.deepcopy(place) if place != {} else draw(ANY))
        except (TypeError, AttributeError):
            pass  # an earlier change put a value where the section was
    return content


@st.composite
def configs(draw: st.DrawFn) -> tuple[dict[str, Any], list[str]]:
    """A mutated config, and overrides of the command line."""
    base = copy.deepcopy(BASE)
    for part in draw(st.sampled_from([[], [CAUSAL], [PRIVATE], [CAUSAL, PRIVATE]])):
        base |= part
    base["method"]["name"] = draw(st.sampled_from(["fedit", "ffa-lora", "fed-sb", "flexmore"]))
    if base["method"]["name"] == "flexmore":
        base |= CAUSAL
    content = draw(mutated(base, KEYS))
    pairs = []
    if draw(st.integers(0, 3)) == 0:
        value = draw(ANY | likely(KEYS["run.seed"]))
        pairs = ["--set", f"{draw(st.sampled_from(sorted(KEYS)))}={value if isinstance(value, str) else repr(value)}"]
    return content, [part.replace("\0", "0") for part in pairs]


def test_any_config_trains_or_is_one_line(here: Path) -> None:
    tries = Tries()

    @settings(draws, max_examples=NUMBER)
    @given(configs())
    def run(given: tuple[dict[str, Any], list[str]]) -> None:
        content, pairs = given
        path = here / "run.toml"
        path.write_text(tomli_w.dumps(content), encoding="utf-8")
        tries.add(given, lambda: trains("run", path, *pairs, output=here / "out"))

    run()
    tries.check()


NODE: dict[str, Any] = {
    "name": "clinic",
    "superlink": {"address": "127.0.0.1:8000"},
    "data": {"path": "data.csv"},
    "policy": {"max_epsilon": 3.0},
}
SERVER: dict[str, Any] = {
    "host": "127.0.0.1",
    "directory": "server",
    "tls": {"ca_certificate": "ca", "certificate": "crt", "private_key": "key"},
}
STUDY: dict[str, Any] = {
    "base": {**BASE, "data": {**BASE["data"], "validation": 0.2}},
    "axes": {"client.learning_rate": [0.1, 0.2]},
    "draw": {"number": 2, "distributions": {"method.alpha": {"kind": "uniform", "low": 1.0, "high": 2.0}}},
    "tuning": {"over": "method.rank", "values": [1, 2]},
}
# Sections that hold keys of configs, and one that may be absent, which the schema alone does not show.
STUDY_KEYS = {
    **dict(keys(StudyConfig)),
    **{f"draw.{key}": int for key in ("number", "seed")},
    **{f"draw.distributions.method.alpha.{key}": float for key in ("kind", "low", "high", "values")},
    **{f"tuning.{key}": str for key in ("over", "values", "by", "seed", "validation")},
}
TLS_KEYS = {f"tls.{key}": str for key in ("ca_certificate", "certificate", "private_key")}


def loads(load: Callable[[Path], Any], path: Path) -> bool:
    try:
        load(path)
    except InputError as error:
        said.append(str(error))
        if len(str(error).splitlines()) != 1:
            raise AssertionError(str(error)) from None
        return False
    return True


@pytest.mark.parametrize(
    ("base", "known", "load"),
    [
        (NODE, dict(keys(NodeConfig)), load_node),
        (SERVER, {**dict(keys(ServerFile)), **TLS_KEYS}, load_server),
        (STUDY, STUDY_KEYS, lambda path: make_plan(load_study(path))),
    ],
    ids=["node", "server", "study"],
)
def test_any_other_file_is_taken_or_one_line(
    here: Path, base: dict[str, Any], known: dict[str, Any], load: Callable[[Path], Any]
) -> None:
    tries = Tries()

    @settings(draws, max_examples=NUMBER // 4)
    @given(mutated(base, known))
    def run(content: dict[str, Any]) -> None:
        path = here / "file.toml"
        path.write_text(tomli_w.dumps(content), encoding="utf-8")
        tries.add(content, lambda: loads(load, path))

    run()
    tries.check(0.05)


# Data files.

CELLS = [
    "",
    " ",
    '"',
    '""',
    '"a"',
    "a,b",
    "a\tb",
    "a;b",
    "a\nb",
    "a\rb",
    "NA",
    "null",
    "None",
    "NaN",
    "007",
    "1",
    "1.0",
]
CELLS += [
    "0.5",
    "1e400",
    "True",
    "2020-01-01",
    "9" * 400,
    "9" * 5000,
    "\0",
    "\ufeff",
    "日本語",
    "\\",
    '\\"',
    "=cmd|x",
    "é",
]
VALUES: list[Any] = [None, True, 1, 1.0, 0.5, 10**30, -1, float("nan"), float("inf"), [], ["a"], {}, {"a": 1}, *CELLS]
FORMATS = ["csv", "tsv", "jsonl", "json", "parquet"]


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A file of examples, well written and then changed."""
    words = random.Random(draw(st.integers(0, 9)))
    table = [
        {"text": " ".join(f"w{words.randint(4, 49)}" for _ in range(4)), "label": "ab"[row % 2], "owner": row % 3}
        for row in range(30)
    ]
    kind = draw(st.sampled_from(FORMATS))
    for _ in range(draw(st.integers(0, 2))):
        row, name = table[draw(st.integers(0, 29))], draw(st.sampled_from(["text", "label", "owner", "more"]))
        if draw(st.integers(0, 5)):
            row[name] = draw(st.sampled_from(VALUES))
        else:
            row.pop(name, None)
    content = written(kind, table, quoted=draw(st.booleans()))
    for _ in range(draw(st.integers(0, 2))):
        content = draw(damaged(content))
    return kind, content


def written(kind: str, table: list[dict[str, Any]], quoted: bool) -> bytes:
    """Write rows; with ``quoted`` as a library does, else by joining what there is."""
    import csv
    import io

    import pandas as pd

    if kind == "parquet":
        stream = io.BytesIO()
        try:
            pd.DataFrame(table).to_parquet(stream)
        except (ValueError, TypeError, OverflowError):  # a column of mixed types
            pd.DataFrame(table).astype(str).to_parquet(stream)
        return stream.getvalue()
    if kind == "json":
        return json.dumps(table, indent=1 if quoted else None).encode()
    if kind == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in table).encode()
    names = list(dict.fromkeys(name for row in table for name in row))
    separator = "," if kind == "csv" else "\t"
    text = io.StringIO()
    lines = [names, *([row.get(name, "") for name in names] for row in table)]
    if quoted:
        csv.writer(text, delimiter=separator).writerows(lines)
    else:
        text.writelines(separator.join(map(str, line)) + "\n" for line in lines)
    return text.getvalue().encode()


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Change the bytes of a file."""
    place = draw(st.integers(0, len(content)))
    lines = content.split(b"\n")
    number = draw(st.integers(0, len(lines) - 1))
    what = draw(
        st.sampled_from(["insert", "insert", "insert", "cut", "recode", "ends", "drop", "twice", "blank", "gzip"])
    )
    if what == "insert":
        given = [
            b'"',
            b",",
            b"\t",
            b";",
            b"\n",
            b"\r",
            b"\0",
            b"\xff",
            b"{",
            b"}",
            b"[",
            b"\\",
            b'"' * 3,
            b"\xef\xbb\xbf",
        ]
        return content[:place] + draw(st.sampled_from(given)) + content[place:]
    if what == "cut":
        return content[:place]
    if what == "recode":
        encoding = draw(st.sampled_from(["utf-16", "utf-16-le", "utf-8-sig", "utf-32", "cp1252", "utf-7"]))
        return content.decode("utf-8", "replace").encode(encoding, "replace")
    if what == "ends":
        return content.replace(b"\n", draw(st.sampled_from([b"\r\n", b"\r", b"\n\n"])))
    if what == "gzip":
        import gzip

        return gzip.compress(content)
    if what == "blank":
        lines.insert(number, draw(st.sampled_from([b"", b"   ", b",,", b"\t\t", b"#", b"null", b"[]", b"{}"])))
    elif what == "twice":
        lines.insert(number, lines[0])
    else:
        lines.pop(number)
    return b"\n".join(lines)


def test_any_data_file_trains_or_is_one_line(here: Path) -> None:
    tries = Tries()

    @settings(draws, max_examples=NUMBER // 4)
    @given(files(), st.sampled_from(["sequence-classification", "causal-lm"]), st.booleans())
    def run(file: tuple[str, bytes], task: str, natural: bool) -> None:
        kind, content = file
        with tempfile.TemporaryDirectory(dir=here) as folder:
            path = Path(folder) / f"data.{kind}"
            path.write_bytes(content)
            base = {**BASE, "data": {"name": str(path), "partition": {"clients": 3}}}
            if natural:
                base["data"]["partition"] = {"kind": "natural", "column": "owner"}
            if task == "causal-lm":
                base |= CAUSAL
            (here / "run.toml").write_text(tomli_w.dumps(base))
            tries.add((kind, task, content), lambda: trains("run", here / "run.toml", output=here / "out"))

    run()
    tries.check()
