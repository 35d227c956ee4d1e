"""What training changed: the test scores before the first round and after the last, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from fedlora.reporting.comparison import Comparison, Group, Mean
from fedlora.tasks.base import Metric


@dataclass(frozen=True)
class Change:
    """A metric of a group before training and after it.

    Attributes
    ----------
    group : Group
    metric : str
    before, after : Mean
    change : Mean
        Of the differences by seed, after minus before: what seeds share cancels.
    """

    group: Group
    metric: str
    before: Mean
    after: Mean
    change: Mean

    @property
    def form(self) -> str:
        """Format of the metric: percent or number."""
        return self.group.task.form(self.metric)


def changes(comparison: Comparison) -> list[Change]:
    """Return the changes of all metrics that every run of a group has before and after, group by group.

    Without those that are not finite, and those that no training can change, such as the share of the largest class.
    """
    return [change for group in comparison.groups for change in _of_group(group)]


def _of_group(group: Group) -> Iterator[Change]:
    baseline = group.task.baseline.metric if group.task.baseline is not None else None
    for metric in group.task.scores:
        before = [run.start.get(metric, math.nan) for run in group.runs]
        after = [run.scores.get(metric, math.nan) for run in group.runs]
        if metric != baseline and all(map(math.isfinite, (*before, *after))):
            moved = [last - first for first, last in zip(before, after, strict=True)]
            yield Change(group, metric, Mean.of(before), Mean.of(after), Mean.of(moved))


def changes_table(found: Sequence[Change]) -> pd.DataFrame:
    """Return a row for each group and metric: mean and 95 % interval before, after, and of the change by seed."""
    rows = []
    for each in found:
        row = {
            "group": each.group.name,
            "method": each.group.method,
            "privacy": each.group.privacy,
            "metric": each.metric,
            "n": each.change.n,
        }
        for name, mean in (("before", each.before), ("after", each.after), ("change", each.change)):
            row |= {name: mean.mean, f"{name}_low": mean.low, f"{name}_high": mean.high}
        rows.append(row)
    return pd.DataFrame(rows)


def changes_shown(found: Sequence[Change]) -> pd.DataFrame:
    """Return a row for each group and metric, for readers: every number as mean ± half its interval."""
    return pd.DataFrame(
        {
            "configuration": each.group.label,
            "privacy": each.group.privacy,
            "metric": each.metric,
            "n": each.change.n,
            "before": _shown(each.before, each.group.task.scores[each.metric]),
            "after": _shown(each.after, each.group.task.scores[each.metric]),
            "change": _shown(each.change, each.group.task.scores[each.metric]),
        }
        for each in found
    )


def _shown(mean: Mean, metric: Metric) -> str:
    """Write a mean and half its interval with the metric's digits, and one unit behind both."""
    scale, unit = (100, " %") if metric.form == "percent" else (1, "")
    numbers = [mean.mean] if mean.half is None else [mean.mean, mean.half]
    # Adding 0.0 takes the sign from what is rounded to -0.
    return " ± ".join(f"{round(scale * value, metric.digits) + 0.0:.{metric.digits}f}" for value in numbers) + unit
