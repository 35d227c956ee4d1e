"""The function behind ``fedlora report``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedlora.reporting.charts import charts
from fedlora.reporting.comparison import Comparison, compare
from fedlora.reporting.figures import draw_all
from fedlora.reporting.html import page
from fedlora.reporting.report_files import write_files
from fedlora.reporting.runs import read_runs
from fedlora.reporting.study_results import read_studies
from fedlora.reporting.tables import groups_shown, groups_table, runs_table, table_files


def write_report(
    folders: Sequence[str | Path], output: str | Path | None = None, command: str = ""
) -> tuple[Path, Comparison]:
    """Compare runs: tables, figures and a page.

    Parameters
    ----------
    folders : sequence of str or Path
        Each a run folder, a study, or a folder of runs.
    output : str or Path, optional
        Where to; the first folder by default. It gets ``report.html`` and the folder ``report`` with the tables
        (``runs``, ``groups``; CSV, Parquet and Markdown) and ``figures`` (PNG and SVG).
    command : str
        Shown on the page.

    Returns
    -------
    (Path, Comparison)
        report.html, and what it says.

    Raises
    ------
    InputError
        If a folder holds no finished run, a run is damaged, tasks differ, or a file of the user's is in the way.
    """
    found = read_runs(folders)
    comparison = compare(found)
    made = charts(comparison)
    files = {"report.html": page(comparison, made, command, read_studies(folders)).encode()}
    tables = table_files("runs", runs_table(comparison))
    tables |= table_files("groups", groups_table(comparison), groups_shown(comparison))
    files |= {f"report/{file}": content for file, content in tables.items()}
    files |= {f"report/figures/{file}": content for file, content in draw_all(made).items()}
    target = Path(output) if output is not None else Path(folders[0])
    write_files(target, files)
    return target / "report.html", comparison
