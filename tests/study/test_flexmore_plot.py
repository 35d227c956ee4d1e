"""The study of ranks: what its table says, and which ranks a budget of bytes buys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedlora.experiments.flexmore_plot import Figures, join
from fedlora.experiments.flexmore_study import _affordable

RESULTS = Path(__file__).parents[2] / "experiments" / "studies" / "results" / "flexmore"


def test_committed_table_is_what_the_raw_figures_give() -> None:
    assert (RESULTS / "table.md").read_text(encoding="utf-8").splitlines() == Figures(RESULTS).table()


def raw(losses: dict[str, float], seed: int = 0) -> dict[str, Any]:
    """Two owners, public loss 5, of every rank the same loss on both domains."""
    found: dict[str, Any] = {"options": {"seed": seed}, "machine": {"commit": "none"}, "public": {"a": 5.0, "b": 5.0}}
    found["sizes"] = {"4": 4, "16": 16, "full": 1000}
    for rank, loss in losses.items():
        part = {name: {"a": loss, "b": loss} for name in ("a", "b", "mixture")}
        found[f"rank {rank}"] = part | {"best": {name: [loss, 1e-3, 8.0] for name in ("a", "b")}, "tried": []}
    return found


def test_means_over_seeds_and_shares_of_the_full_experts_gain(tmp_path: Path) -> None:
    (tmp_path / "raw.json").write_text(json.dumps(raw({"4": 4.5, "full": 4.0})))
    (tmp_path / "seed-1.json").write_text(json.dumps(raw({"4": 4.3, "full": 4.0}, 1)))
    lines = Figures(tmp_path).table()
    row = next(line for line in lines if line.startswith("| own expert, rank 4 "))
    assert row.split(" | ")[3:] == ["0.600 ± 0.141", "60.0%", "0.0", "2 |"]
    assert "Own expert worse than the next lower rank's, of 4: 0." in lines


def test_a_higher_rank_that_is_worse_in_one_seed_is_named(tmp_path: Path) -> None:
    (tmp_path / "raw.json").write_text(json.dumps(raw({"4": 4.5, "16": 4.2})))
    (tmp_path / "seed-1.json").write_text(json.dumps(raw({"4": 4.3, "16": 4.4}, 1)))
    assert "of 4: a at 16 against 4, seed 1, b at 16 against 4, seed 1." in "\n".join(Figures(tmp_path).table())


def test_parts_of_one_study_are_joined_with_the_commit_of_each(tmp_path: Path) -> None:
    for name, ranks in (("low", {"4": 4.5}), ("high", {"full": 4.0})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "raw.json").write_text(json.dumps(raw(ranks)))
    join([tmp_path / "high", tmp_path / "low"], tmp_path / "joined")
    figures = Figures(tmp_path / "joined")
    assert figures.ranks == ["4", "full"]
    assert figures.raw["options"]["low"] == {"seed": 0, "commit": "none"}


@pytest.mark.parametrize(("share", "ranks"), [(0.005, [4, 4]), (0.011, [4, 16]), (0.017, [16, 16])])
def test_a_budget_buys_rank_where_it_lowers_the_validation_loss_most(share: float, ranks: list[int]) -> None:
    found = raw({"4": 4.5, "16": 4.4})
    found["rank 16"]["best"]["b"][0] = 4.2
    assert _affordable(found, "rank", [4, 16], ["a", "b"], share) == ranks
