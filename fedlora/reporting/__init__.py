"""Compare runs: read run folders; write tables, figures and an HTML page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlora.reporting.report import write_report, write_reports

__all__ = ["write_report", "write_reports"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: a study reads runs, but draws nothing and needs neither plotly nor matplotlib.
    if name in __all__:
        from fedlora.reporting import report

        return getattr(report, name)
    raise AttributeError(f"module 'fedlora.reporting' has no attribute {name!r}")
