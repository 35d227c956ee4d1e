"""From run folders to tables, figures and a page that compare them."""

from fedlora.reporting.report import write_report

__all__ = ["write_report"]
