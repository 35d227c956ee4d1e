"""The tidy tables: one row for each run, and one for each group of runs that differ only in their seed."""

from __future__ import annotations

import io
from typing import Any

import pandas as pd

from fedlora.csv_files import table_csv
from fedlora.reporting.comparison import Comparison, flatten, in_a_cell, quantities


def runs_table(comparison: Comparison) -> pd.DataFrame:
    """Return one row for each run: its name, every config key in which runs differ, and every number.

    Shares are in [0, 1]; a cell without a value is empty. ``seed`` is the run's; ``commit`` that of the source tree;
    ``audited_epsilon``, where a run was audited, the lower bound that was proved.
    """
    rows = []
    for group in comparison.groups:
        for run in group.runs:
            flat = flatten(run.config)
            rows.append(
                {
                    "run": run.name,
                    "method": group.method,
                    "privacy": group.privacy,
                    **{
                        key: in_a_cell(flat.get(key))
                        for key in comparison.varied
                        if key not in ("method.name", "privacy")
                    },
                    "seed": run.config.run.seed,
                    "rounds": run.summary.rounds,
                    "clients": run.summary.clients,
                    "test_examples": run.summary.test_examples,
                    **quantities(run),
                    "delta": run.summary.epsilon.delta if run.summary.epsilon else None,
                    "covers_init": run.summary.epsilon.covers_init if run.summary.epsilon else None,
                    **({"audited_epsilon": run.audit.lower_bound.epsilon} if run.audit else {}),
                    "commit": run.summary.environment.commit,
                }
            )
    return _table(rows)


def groups_table(comparison: Comparison) -> pd.DataFrame:
    """Return one row for each group: n seeds, and the mean and 95 % interval of every number (empty for n = 1)."""
    front = {group.name for group in comparison.front}
    rows = []
    for group in comparison.groups:
        flat = flatten(group.runs[0].config)
        row: dict[str, object] = {
            "group": group.name,
            "method": group.method,
            "privacy": group.privacy,
            **{key: in_a_cell(flat.get(key)) for key in comparison.varied if key not in ("method.name", "privacy")},
            "n": len(group.runs),
            "seeds": " ".join(str(run.config.run.seed) for run in group.runs),
            "pareto": group.name in front,
        }
        for name, mean in group.means.items():
            row |= {name: mean.mean, f"{name}_low": mean.low, f"{name}_high": mean.high}
        rows.append(row)
    return _table(rows)


def groups_shown(comparison: Comparison) -> pd.DataFrame:
    """Return one row for each group, for readers: every number as mean ± half its interval."""
    table = groups_table(comparison)
    columns: dict[str, list[str]] = {}
    for name in table.columns:
        if not name.endswith(("_low", "_high")):
            columns[name] = [_shown(value) for value in table[name]]
        if f"{name}_high" in table.columns:
            halves = [_shown(half) for half in table[f"{name}_high"].astype(float) - table[name]]
            columns[name] = [f"{m} ± {h}" if h else m for m, h in zip(columns[name], halves, strict=True)]
    return pd.DataFrame(columns)


def table_files(name: str, table: pd.DataFrame, shown: pd.DataFrame | None = None) -> dict[str, bytes]:
    """Return a table as CSV, Parquet and Markdown (of ``shown``, if given), by file name."""
    parquet = io.BytesIO()
    table.to_parquet(parquet, index=False)
    return {
        f"{name}.csv": table_csv(table).encode(),
        f"{name}.parquet": parquet.getvalue(),
        f"{name}.md": markdown(table if shown is None else shown).encode(),
    }


def markdown(table: pd.DataFrame) -> str:
    """Return a table as GitHub Markdown. Numbers have four significant digits; integers have all."""
    lines = [list(map(str, table.columns)), ["---"] * len(table.columns)]
    lines += [[_shown(value) for value in row] for row in table.itertuples(index=False)]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def _shown(value: object) -> str:
    if value is None or value is pd.NA or value != value:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() else f"{value:.4g}"
    return " ".join(str(value).split())


def _table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Make a table. A column that mixes text and numbers becomes text, since Parquet allows one type only."""
    table = pd.DataFrame(rows)
    for name in table.columns:
        if len({isinstance(value, str) for value in table[name].dropna()}) > 1:
            table[name] = table[name].map(str, na_action="ignore")
    return table
