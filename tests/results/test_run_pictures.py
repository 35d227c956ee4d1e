"""Pictures of a run: what they show of its lines, and that they are drawn."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.data.partition_plot import partition_panel, plot_partition
from fedlora.figures.chart import Chart, Panel, Series, aligned, untangled
from fedlora.figures.draw import draw, figure_of
from fedlora.figures.style import class_colours
from fedlora.results.plot import (
    domain_panel,
    domain_tables,
    plot_by_domain,
    plot_rounds,
    rounds_chart,
    rounds_table,
)
from fedlora.tasks import get_task

CLASSES, TEXT = get_task("sequence-classification"), get_task("causal-lm")
START = {"accuracy": 0.45, "majority": 0.55, "loss": 0.7}


def lines(rounds: int, epsilon: bool = True) -> list[dict[str, Any]]:
    """Rounds that are evaluated every second time, as rounds.jsonl has them."""
    return [
        {
            "round": number,
            "metrics": {"accuracy": 0.5 + 0.4 * number / rounds, "majority": 0.55, "loss": 1 / number}
            if number % 2 == 0 or rounds == 1
            else {},
            "train_loss": 0.9 / number,
            "epsilon": 8 * number / rounds if epsilon else None,
            "communication": {"initial_bytes": 3e6, "downlink_bytes": 1e5 * number, "uplink_bytes": 1e5 * number},
        }
        for number in range(1, rounds + 1)
    ]


def panel_of(chart: Chart, title: str) -> Panel:
    return next(panel for panel in chart.panels if panel.title == title)


def series_of(panel: Panel, label: str) -> Series:
    return next(series for series in panel.series if series.label.startswith(label))


@given(st.integers(2, 400), st.booleans(), st.booleans())
def test_all_panels_have_the_same_whole_rounds_and_shares_stay_shares(rounds: int, private: bool, begun: bool) -> None:
    chart = rounds_chart(lines(rounds, private), "run", CLASSES, START if begun else None, 8.0)
    assert len(chart.panels) == 3 + private
    axes = [panel.x_axis for panel in chart.panels]
    assert all(axis == axes[0] for axis in axes)
    ticks = axes[0].ticks or {}
    assert 1 <= len(ticks) <= 7
    assert all(tick.is_integer() and (0 if begun else 1) <= tick <= rounds for tick in ticks)
    low, high = panel_of(chart, "Accuracy").y_axis.range or (-1, 2)
    assert 0 <= low < high <= 1


def test_start_largest_class_target_and_bytes_are_told_apart() -> None:
    chart = rounds_chart(lines(8), "run", CLASSES, START, 8.0)
    accuracy, sent, epsilon = (panel_of(chart, t) for t in ("Accuracy", "Sent so far", chart.panels[3].title))
    assert (series_of(accuracy, "test").x[0], series_of(accuracy, "test").y[0]) == (0.0, 0.45)
    assert set(series_of(accuracy, "majority class 55.0 %").y) == {0.55}
    assert set(series_of(epsilon, "target 8").y) == {8.0}
    # As much goes down as up: as areas, one lies on the other.
    assert [series.label for series in sent.series] == ["once 3 MB", "down 800 kB", "up 800 kB"]
    assert sent.kind == "areas"
    assert sent.y_values[-1] == 3e6 + 2 * 8e5
    figure = pickle.loads(pickle.dumps(figure_of(chart)))  # as notebooks do
    assert all(axes.get_legend() is not None for axes in figure.axes)


def test_validation_is_drawn_beside_the_test_score_and_loss() -> None:
    scored = lines(2)
    scored[1]["metrics"]["validation"] = {"accuracy": 0.8, "loss": 0.4}
    panels = rounds_chart(scored, "run", CLASSES).panels
    assert series_of(panels[0], "validation").y == [0.8]
    assert series_of(panels[1], "validation").y == [0.4]


def test_a_single_round_is_a_table() -> None:
    (line,) = lines(1)
    rows = {row[0]: row[1:] for row in rounds_table(line, CLASSES, START, 8.0)}
    assert rows["test accuracy"] == ["45.0 %", "90.0 %"]
    assert rows["majority class"] == ["–", "55.0 %"]
    assert rows["test loss (nats)"] == ["0.700", "1.00"]
    assert [rows[f"sent {way}"][1] for way in ("once", "down", "up")] == ["3 MB", "100 kB", "100 kB"]
    assert rows["epsilon (target 8)"] == ["–", "8.00"]
    assert rounds_table(line, CLASSES, None, None)[0] == ["test accuracy", "90.0 %"]


@pytest.mark.parametrize("rounds", [1, 2, 9])
@pytest.mark.parametrize("private", [True, False])
def test_rounds_are_drawn(tmp_path: Path, rounds: int, private: bool) -> None:
    plot_rounds(tmp_path / "rounds.png", lines(rounds, private), "run", CLASSES, START if private else None)
    assert matplotlib.image.imread(tmp_path / "rounds.png").std() > 0.01


def test_a_run_whose_loss_diverged_is_drawn(tmp_path: Path) -> None:
    diverged = lines(3)
    for line in diverged:
        line |= {"train_loss": None, "metrics": {"accuracy": 0.5, "majority": 0.5, "loss": None}}
    plot_rounds(tmp_path / "rounds.png", diverged, "run", CLASSES)
    assert (tmp_path / "rounds.png").stat().st_size > 1000


BY_DOMAIN = {
    "merged": {"law": 20.0, "news": 40.0},
    "public": {"law": 40.0, "news": 40.0},
    "firm": {"law": 10.0, "news": 80.0},
}


def test_models_are_compared_with_the_public_one_by_domain(tmp_path: Path) -> None:
    panel = domain_panel("", domain_tables({"by_domain": BY_DOMAIN}, {}), TEXT, "run")
    assert panel is not None
    assert [series.label for series in panel.series] == ["public", "merged", "firm"]
    # Half the perplexity is better by half of what a quarter is, and twice as much is worse by as much.
    shades = [series.shades for series in panel.series]
    assert shades == [pytest.approx(row) for row in ([0, 0], [0.5, 0], [1, -0.5])]
    plot_by_domain(tmp_path / "domains.png", {"by_domain": BY_DOMAIN}, "run", TEXT, None)
    assert matplotlib.image.imread(tmp_path / "domains.png").std() > 0.01


def test_one_model_is_compared_with_itself_before_training(tmp_path: Path) -> None:
    tables = domain_tables({"by_domain": {"law": 20.0}}, {"by_domain": {"law": 30.0}})
    assert tables == {"before training": {"law": 30.0}, "after training": {"law": 20.0}}
    plot_by_domain(tmp_path / "domains.png", {"perplexity": 20.0}, "run", TEXT, None)
    assert not (tmp_path / "domains.png").exists()


def test_a_domain_without_a_number_is_a_dash() -> None:
    tables = {"public": {"law": 40.0}, "firm": {"law": math.nan, "news": 80.0}}
    panel = domain_panel("", tables, TEXT, "run")
    assert panel is not None
    assert [series.shades for series in panel.series] == [[0, 0], [0, 0]]
    assert draw(Chart("domains", "", "", [panel]), endings=("png",))["png"]


def test_partition_names_the_owners(tmp_path: Path) -> None:
    panel = partition_panel("", np.array([[3, 4], [5, 0]]), ["good", "bad"], ["St. Mary's", "ward " * 9 + "9"])
    assert list((panel.x_ticks or {}).values()) == ["St. Mary's", "ward ward war…rd ward ward 9"]
    assert [series.y for series in panel.series] == [[3, 5], [4, 0]]
    many = partition_panel("", np.array([[1, 0], [4, 5]] * 40), ["a", "b"], [f"owner {i}" for i in range(80)])
    assert (many.kind, many.series[0].y) == ("areas", [9.0] * 40 + [1.0] * 40)
    plot_partition(tmp_path / "a.png", np.array([[3, 4], [5, 0]]), ["good", "bad"], ["north", "south"])
    assert matplotlib.image.imread(tmp_path / "a.png").std() > 0.01


@given(st.integers(1, 60))
def test_classes_have_colours_of_their_own(count: int) -> None:
    assert len(set(class_colours(count))) == count


def curve(label: str, y: float) -> Series:
    return Series(label, label, [1.0, 2.0], [y, y], ["", ""], [label] * 2, line=True, band=True)


def test_too_many_intervals_get_a_panel_each_with_the_same_axes() -> None:
    names = [f"method-{i}" for i in range(6)]
    panels = [
        Panel(level, "round", "score", [curve(n, i + 10.0 * j) for i, n in enumerate(names)], "round", "score")
        for j, level in enumerate(("ε 1", "no privacy"))
    ]
    chart = untangled(Chart("score", "", "", panels))
    assert [panel.title for panel in chart.panels] == names
    assert [[s.label for s in panel.series] for panel in chart.panels] == [["ε 1", "no privacy"]] * 6
    assert [[s.variant for s in panel.series] for panel in chart.panels] == [[0, 1]] * 6
    assert len({panel.y_axis for panel in chart.panels if panel.y_axis.ticks is None}) == 1
    few = Chart("score", "", "", [Panel("", "", "", [curve("a", 1.0)], "round", "score")])
    assert untangled(few) == few


def test_panels_of_other_quantities_keep_their_axes() -> None:
    a, b = (Panel("", "", "", [curve("a", y)], x, "score") for x, y in (("round", 1.0), ("bytes", 100.0)))
    assert [panel.y_axis.range for panel in aligned([a, b])] == [a.y_axis.range, b.y_axis.range]
