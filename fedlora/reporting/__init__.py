"""Compare runs: read run folders; write tables, figures and an HTML page."""

from fedlora.reporting.report import write_report, write_reports

__all__ = ["write_report", "write_reports"]
