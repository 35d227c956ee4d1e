"""Compare runs: read run folders; write tables, figures and an HTML page."""

from fedlora.reporting.report import write_report

__all__ = ["write_report"]
