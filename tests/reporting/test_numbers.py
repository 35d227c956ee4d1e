"""Every number in a report is recomputed here from the run folders, without the code that wrote it."""

from __future__ import annotations

import csv
import json
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from tests.reporting.packed import unpacked

LINKS = {
    # Medians of rates in Mbit/s and of latency in ms, and the spread of their logarithms.
    "lte": (29.0, 6.8, 29.0, 1.0, 0.5),
    "broadband": (58.0, 22.0, 10.0, 1.2, 0.5),
    "datacenter": (10_000.0, 10_000.0, 0.5, 0.0, 0.0),
    "config": (29.0, 2.5, 29.0, 1.0, 0.5),
}
METRICS = ("accuracy", "macro_f1", "majority", "loss")
BYTES = ("initial_bytes", "downlink_bytes", "uplink_bytes", "payload_bytes", "formula_bytes")


class Facts:
    """What a run folder says."""

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self.config = tomllib.loads((folder / "config.toml").read_text())
        self.summary = json.loads((folder / "summary.json").read_text())
        self.rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
        self.messages = table(folder / "communication.csv")
        self.clients = table(folder / "clients.csv")
        self.partition = table(folder / "partition.csv")
        self.charged = table(folder / "privacy.csv")
        self.seed = self.config["run"]["seed"]
        privacy = self.config["privacy"]
        self.level = "no privacy" if privacy["mode"] == "none" else f"ε {privacy['target_epsilon']:g}"
        self.label = f"{self.config['method']['name']} · rank {self.config['method']['rank']}"
        self.group = f"{self.label} · {self.level}"

    def values(self) -> dict[str, float]:
        s = self.summary
        values = {name: s["final"][name] for name in METRICS}
        values |= {name: s["communication"][name] for name in BYTES}
        values["total_bytes"] = sum(s["communication"][name] for name in BYTES[:3])
        if "flower" in s["communication"]:
            moved = s["communication"]["flower"]
            values["socket_bytes"] = moved["sent_bytes"] + moved["received_bytes"]
            values["socket_overhead"] = values["socket_bytes"] / moved["message_bytes"] - 1
        values["trainable_parameters"] = s["trainable_parameters"]
        values["wall_seconds"] = s["seconds"]["total"]
        if s["epsilon"]:
            values |= {"epsilon_max": s["epsilon"]["max"], "epsilon_mean": s["epsilon"]["mean"]}
        drifts = [line["drift"] for line in self.rounds if line["drift"] is not None]
        values["drift"] = sum(drifts) / len(drifts)
        scores = [float(row["accuracy"]) for row in self.clients]
        values |= {"client_mean": np.mean(scores), "client_std": np.std(scores)}
        values |= {"client_min": min(scores), "client_max": max(scores)}
        own = ["config"] if self.config["network"]["profile"] != "none" else []
        for profile in ("lte", "broadband", "datacenter", *own):
            values[f"seconds_{profile}"] = self.network(profile)
        return {name: float(value) for name, value in values.items()}

    def spent(self, cost: str, number: int) -> float:
        """What was spent after a round."""
        if cost == "bytes":
            return float(sum(int(row["message_bytes"]) for row in self.messages if int(row["round"]) <= number))
        if cost == "epsilon":
            return max(float(row["epsilon"]) for row in self.charged if int(row["round"]) <= number)
        of = [line["seconds"] for line in self.rounds[:number]]
        return sum(s["train"] + s["communicate"] + s["aggregate"] for s in of)

    def best(self, number: int) -> float:
        """The best accuracy up to a round; round 1 has none."""
        return max(line["metrics"]["accuracy"] for line in self.rounds[1:number])

    def network(self, profile: str) -> float:
        down, up, latency, sigma, sigma_latency = LINKS[profile]
        seconds: dict[tuple[str, str], float] = defaultdict(float)
        for row in self.messages:
            z = np.random.default_rng([self.seed, int(row["client"]), 0x4C]).standard_normal(3)
            rate = up * np.exp(sigma * z[1]) if row["direction"] == "up" else down * np.exp(sigma * z[0])
            seconds[row["round"], row["client"]] += int(row["message_bytes"]) * 8e-6 / rate
            if row["direction"] != "initial":
                seconds[row["round"], row["client"]] += latency * np.exp(sigma_latency * z[2]) / 2e3
        slowest: dict[str, float] = defaultdict(float)
        for (number, _), value in seconds.items():
            slowest[number] = max(slowest[number], value)
        return sum(slowest.values())


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def interval(values: list[float], step: float = 0.0) -> tuple[float, float]:
    """Mean and half of the 95 % interval, of values that are differences of scores rounded to a step."""
    mean, error = float(np.mean(values)), np.sqrt((np.var(values, ddof=1) + step**2 / 6) / len(values))
    if not error:
        return mean, 0.0
    high = stats.t.interval(0.95, len(values) - 1, loc=mean, scale=error)[1]
    return mean, high - mean


class Page(HTMLParser):
    """Marked numbers, and the text that is not marked as one."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.numbers: list[dict[str, Any]] = []
        self.unmarked: dict[str, list[str]] = defaultdict(list)
        self.plots = json.loads(unpacked(text, "plots"))
        self._open: list[tuple[str, dict[str, Any]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "br", "line"):
            self._open.append((tag, dict(attrs)))
        if tag == "data":
            self.numbers.append({**dict(attrs), "text": ""})

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        tag = self._open[-1][0] if self._open else ""
        if tag == "data":
            self.numbers[-1]["text"] += data
        elif tag not in ("script", "style"):
            classes = " ".join(str(a.get("class") or a.get("id")) for _, a in self._open)
            self.unmarked[classes].append(data)


@pytest.fixture(scope="module")
def facts(compared: tuple[Path, Path]) -> list[Facts]:
    return [Facts(path.parent) for path in sorted(compared[0].glob("*/summary.json"))]


@pytest.fixture(scope="module")
def groups(facts: list[Facts]) -> dict[str, list[Facts]]:
    by_name: dict[str, list[Facts]] = defaultdict(list)
    for fact in facts:
        by_name[fact.group].append(fact)
    assert len(by_name) == 12
    return {name: sorted(of, key=lambda fact: fact.seed) for name, of in by_name.items()}


@pytest.fixture(scope="module")
def means(groups: dict[str, list[Facts]]) -> dict[tuple[str, str], tuple[float, float]]:
    found = {}
    for name, runs in groups.items():
        rows = [run.values() for run in runs]
        found |= {(name, quantity): interval([row[quantity] for row in rows]) for quantity in rows[0]}
    return found


@pytest.fixture(scope="module")
def page(compared: tuple[Path, Path]) -> Page:
    return Page((compared[1] / "report.html").read_text())


def displayed(text: str) -> tuple[float, float]:
    """Value of a shown number, and how far rounding may have moved it."""
    match = re.fullmatch(r"(-?[\d.,]+)(?:e([+-]\d+))? ?(%|B|kB|MB|GB|s|)", text)
    assert match, text
    digits, power, unit = match.groups()
    scale = {"%": 0.01, "kB": 1e3, "MB": 1e6, "GB": 1e9}.get(unit, 1.0) * 10.0 ** int(power or 0)
    digits = digits.replace(",", "")
    decimals = len(digits.partition(".")[2])
    value = float(digits) * scale
    # Three significant digits lose trailing zeros.
    return value, max(0.5 * 10**-decimals * scale, 0.005 * abs(value)) * 1.0001


def test_every_marked_number_is_what_the_runs_say(
    page: Page,
    groups: dict[str, list[Facts]],
    means: dict[tuple[str, str], tuple[float, float]],
) -> None:
    by_run = {run.name: run.values() for runs in groups.values() for run in runs}
    seen = set()
    for number in page.numbers:
        of, quantity, value = number["data-of"], number["data-q"], float(number["value"])
        name, _, part = quantity.partition(".")
        if quantity == "n":
            expected = float(len(groups[of]))
        elif name == "minus":
            first, second = groups[part.rpartition(".")[0]], groups[of]
            pairs = [a.values()["accuracy"] - b.values()["accuracy"] for a, b in zip(first, second, strict=True)]
            level = of.rpartition(" · ")[2]
            rivals = [run for name, runs in groups.items() if name.rpartition(" · ")[2] == level for run in runs]
            scores = sorted({run.values()["accuracy"] for run in rivals})
            expected = interval(pairs, min(np.diff(scores)))[("mean", "half").index(part.rpartition(".")[2])]
        elif part:
            expected = means[of, name][("mean", "half").index(part)]
        else:
            expected = by_run[of][name]
        assert value == pytest.approx(expected, rel=1e-9, abs=1e-12), number
        shown, error = displayed(number["text"])
        assert abs(shown - expected) <= error, number
        seen.add((of, quantity))
    # All groups and runs are there.
    assert {of for of, _ in seen} == set(groups) | set(by_run)
    assert {(of, "accuracy.half") for of in groups} <= seen


def test_no_number_is_unmarked_where_results_are_told(page: Page, groups: dict[str, list[Facts]]) -> None:
    labels = sorted({run.label for runs in groups.values() for run in runs}, key=len, reverse=True)
    for place, texts in page.unmarked.items():
        if not ({"answer", "caveat"} & set(place.split()) or "results" in place.split()):
            continue
        for text in texts:
            for known in (*labels, "ε 1", "ε 8", "95 %"):
                text = text.replace(known, "")
            assert not re.search(r"\d", text), (place, text)


def test_the_answer_names_the_best_of_each_level(
    page: Page, groups: dict[str, list[Facts]], means: dict[tuple[str, str], tuple[float, float]]
) -> None:
    told = {number["data-of"] for number in page.numbers[: 3 * 4]}
    for level in ("ε 1", "ε 8", "no privacy"):
        at_level = [name for name in groups if name.endswith(level)]
        assert max(at_level, key=lambda name: means[name, "accuracy"][0]) in told


def test_the_tables_are_what_the_runs_say(
    compared: tuple[Path, Path],
    facts: list[Facts],
    groups: dict[str, list[Facts]],
    means: dict[tuple[str, str], tuple[float, float]],
) -> None:
    folder = compared[1] / "report"
    runs, by_group = (pd.read_csv(folder / f"{name}.csv") for name in ("runs", "groups"))
    for name, frame in (("runs", runs), ("groups", by_group)):
        other = pd.read_parquet(folder / f"{name}.parquet")
        both = [table.astype(object).where(table.notna(), None) for table in (frame, other)]
        pd.testing.assert_frame_equal(*both, check_dtype=False)
        markdown = (folder / f"{name}.md").read_text().splitlines()
        assert len(markdown) == len(frame) + 2
        assert len({line.count("|") for line in markdown}) == 1
    assert sorted(runs["run"]) == sorted(fact.name for fact in facts)
    for fact in facts:
        row = runs.set_index("run").loc[fact.name]
        for name, value in fact.values().items():
            assert row[name] == pytest.approx(value, rel=1e-9), (fact.name, name)
        assert (row["method.rank"], row["seed"]) == (fact.config["method"]["rank"], fact.seed)
        assert row["client.learning_rate"] == fact.config["client"]["learning_rate"]
    assert sorted(by_group["group"]) == sorted(groups)
    costs = {}
    for name, of in groups.items():
        row = by_group.set_index("group").loc[name]
        assert (row["n"], row["seeds"]) == (len(of), "0 1 2")
        for quantity in of[0].values():
            mean, half = means[name, quantity]
            low_high = (mean - half, mean + half)
            assert row[quantity] == pytest.approx(mean, rel=1e-9)
            assert (row[f"{quantity}_low"], row[f"{quantity}_high"]) == pytest.approx(low_high, rel=1e-9, abs=1e-9)
        epsilon = means[name, "epsilon_max"][0] if of[0].summary["epsilon"] else np.inf
        costs[name] = np.array([-means[name, "accuracy"][0], epsilon, means[name, "total_bytes"][0]])
    for name, own in costs.items():
        beaten = any((other <= own).all() and (other < own).any() for other in costs.values())
        assert by_group.set_index("group").loc[name, "pareto"] == (not beaten)


def points(page: Page) -> Iterator[tuple[str, dict[str, str], dict[str, Any], int]]:
    """Every point of every plot: the chart, what its axes are, its trace and its place."""
    for name, plot in page.plots.items():
        for trace in plot["data"]:
            assert len(trace["x"]) == len(trace["y"]) == len(trace["meta"]["of"]) > 0
            for i in range(len(trace["x"])):
                yield name.rpartition("-")[0], plot["quantities"], trace, i


def test_every_point_of_every_plot_is_what_the_runs_say(
    page: Page, groups: dict[str, list[Facts]], means: dict[tuple[str, str], tuple[float, float]]
) -> None:
    count: dict[str, int] = defaultdict(int)
    fronts: dict[str, list[tuple[float, float, str]]] = {}
    for chart, quantities, trace, i in points(page):
        of, role = trace["meta"]["of"][i], trace["meta"]["role"]
        x, y = trace["x"][i], trace["y"][i]
        if role == "bars":  # which lie
            x, y = y, x
        if trace["meta"]["label"] == "front":
            fronts.setdefault(groups[of][0].level, []).append((x, y, of))
            continue
        if chart in ("score-epsilon", "score-bytes", "pareto", "score-network"):
            if (of, quantities["x"]) in means:
                # Points of one epsilon are drawn side by side.
                apart = 0.05 if chart == "score-epsilon" else 1e-9
                assert x == pytest.approx(means[of, quantities["x"]][0], rel=apart)
            else:
                assert (chart, groups[of][0].level) == ("score-epsilon", "no privacy")
                assert x > 8
            expected, half = means[of, "accuracy"]
            if chart == "pareto":
                assert "error_y" not in trace
                assert trace["meta"]["method"] == groups[of][0].config["method"]["name"]
            else:
                assert (trace["error_y"]["array"][i], trace["error_y"]["arrayminus"][i]) == pytest.approx((half, half))
        elif chart in ("score-rounds", "drift"):
            lines = [run.rounds[x_round(x)] for run in groups[of]]
            values = [line["drift"] if chart == "drift" else line["metrics"]["accuracy"] for line in lines]
            expected = at_role(values, role)
        elif chart.startswith("front-"):
            # Which round it is, its cost tells.
            runs = groups[of]
            at = {n: float(np.mean([run.spent(quantities["x"], n) for run in runs])) for n in (2, 3)}
            (number,) = (n for n, value in at.items() if value == pytest.approx(x, rel=1e-9))
            expected = float(np.mean([run.best(number) for run in runs]))
            assert trace["line"]["shape"] == "hv"
            assert trace["meta"]["method"] in (None, runs[0].config["method"]["name"])
        elif chart == "fairness":
            curves = [np.quantile([float(row["accuracy"]) for row in run.clients], x) for run in groups[of]]
            expected = at_role(curves, role)
        elif chart == "bytes-rounds":
            runs = [run for runs in groups.values() for run in runs if run.label == of]
            column = "formula_bytes" if trace["meta"]["label"].endswith("formula") else "message_bytes"
            rows = [row for run in runs for row in run.messages if int(row["round"]) == x]
            way = quantities["y"].removesuffix("_bytes")
            expected = sum(int(row[column]) for row in rows if row["direction"] == way) / len(runs)
        else:
            assert chart == "partition"
            run = next(run for runs in groups.values() for run in runs if run.name == of)
            label = trace["meta"]["label"]
            rows = [row for row in run.partition if int(row["client"]) == x and row["label"] == label]
            expected = float(rows[0]["examples"])
        assert y == pytest.approx(expected, rel=1e-9, abs=1e-12), (chart, of, role)
        count[chart] += 1
    check_fronts(fronts, means)
    assert set(count) == {
        *("score-epsilon", "score-bytes", "pareto", "score-network", "score-rounds", "drift"),
        *("fairness", "bytes-rounds", "partition", "front-bytes", "front-epsilon", "front-seconds"),
    }
    assert count["score-epsilon"] == count["pareto"] == len(groups)
    assert count["score-bytes"] == 4 * len(groups)
    assert count["score-rounds"] == count["drift"] == 2 * 3 * len(groups)  # with the ends of the interval


def check_fronts(
    fronts: dict[str, list[tuple[float, float, str]]], means: dict[tuple[str, str], tuple[float, float]]
) -> None:
    """At each level of privacy the steps pass through every group that no other beats, and end at the most bytes."""
    most = max(mean for (_, quantity), (mean, _) in means.items() if quantity == "total_bytes")
    names = {name for name, _ in means}
    for level, steps in fronts.items():
        costs = {n: (means[n, "total_bytes"][0], -means[n, "accuracy"][0]) for n in names if n.endswith(level)}
        beaten = {n for n, a in costs.items() for b in costs.values() if b != a and b[0] <= a[0] and b[1] <= a[1]}
        best = list(costs.keys() - beaten)
        best.sort(key=costs.__getitem__)
        assert [of for *_, of in steps] == [*best, best[-1]]
        assert [x for x, *_ in steps] == pytest.approx([*(costs[n][0] for n in best), most])
        assert [y for _, y, _ in steps] == pytest.approx([-costs[n][1] for n in [*best, best[-1]]])
    assert len(fronts) == 3


def x_round(x: float) -> int:
    return int(x) - 1


def at_role(values: list[Any], role: str) -> float:
    mean, half = interval([float(value) for value in values])
    return mean + {"points": 0, "low": -half, "high": half}[role]
