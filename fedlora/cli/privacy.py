"""``fedlora privacy`` and ``fedlora audit``: a run's epsilon explained and computed again, and attacked."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.console import Console

from fedlora.cli.tables import print_line
from fedlora.privacy.accountants import group_of
from fedlora.results.privacy_spent import Spent

if TYPE_CHECKING:
    from fedlora.audit.report import Audit


def show_privacy(console: Console, spent: Spent) -> None:
    """Print what the epsilon of a run is made of."""
    whose = "all clients" if spent.client == "all" else f"client {spent.client}, of {spent.clients}"
    lines = [
        ("run", spent.run),
        ("protects", spent.unit),
        ("neighbours", f"data sets {spent.neighbours}"),
        ("mechanism", spent.mechanism),
        ("epsilon of", whose),
    ]
    for number, entry in enumerate(spent.history):
        sigma, rate, steps, group = *entry[:3], group_of(entry)
        drawn = "all" if rate == 1 else f"sample rate {rate:.6g}"
        where = ", for the start before the first round" if number < len(spent.start) else ""
        several = f", up to {group} examples of a person" if group > 1 else ""
        lines.append(("steps", f"{steps} of noise multiplier {sigma:.6g}, {drawn}{several}{where}"))
    lines += [
        ("delta", f"{spent.delta:g}"),
        ("recorded", f"{spent.recorded:.6g} (privacy.csv)"),
        ("recomputed", f"{spent.epsilon:.6g} by {spent.accountant}"),
    ]
    for name, epsilon in spent.others.items():
        compared = f", {100 * spent.difference:+.2f} %" if name == spent.compared else ""
        lines.append(("dp-accounting", f"{epsilon:.6g} by {name}{compared}"))
    if spent.explanation:
        lines.append(("difference", spent.explanation))
    lines += [("not covered", text) for text in spent.not_covered]
    _print(console, lines)


def show_audit(console: Console, audit: Audit) -> None:
    """Print what an audit proves beside what is claimed."""
    claim = f"{audit.epsilon:.6g} at delta {audit.delta:g}" if audit.epsilon < math.inf else "no epsilon"
    lines = [
        ("protects", audit.unit),
        ("claimed", claim),
        ("lower bound", f"{audit.lower_bound:.6g}, at {audit.confidence:.0%} confidence over all attacks"),
        ("canaries", f"{audit.canaries}"),
    ]
    for attack in audit.attacks:
        lines.append(("attack", f"{attack.name}: {attack.epsilon:.4g} ({attack.estimator}; assumes {attack.assumes})"))
    for check in audit.checks:
        lines.append(("check", f"{check.name}: {'passed' if check.passed else 'FAILED'}, {check.detail}"))
    _print(console, lines)


def _print(console: Console, lines: list[tuple[str, str]]) -> None:
    for name, text in lines:
        print_line(console, f"{name:<15}{text}")
