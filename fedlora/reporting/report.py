"""The function behind ``fedlora report``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedlora.reporting.budgets import Questions, answer_questions, budgets_table, targets_table
from fedlora.reporting.charts import charts
from fedlora.reporting.comparison import Comparison, compare
from fedlora.reporting.figures import draw_all
from fedlora.reporting.html import page
from fedlora.reporting.report_files import write_files
from fedlora.reporting.runs import read_runs
from fedlora.reporting.study_results import read_studies
from fedlora.reporting.tables import groups_shown, groups_table, runs_table, table_files


def write_report(
    folders: Sequence[str | Path],
    output: str | Path | None = None,
    command: str = "",
    questions: Questions | None = None,
) -> tuple[Path, Comparison]:
    """Compare runs: tables, figures and a page.

    Parameters
    ----------
    folders : sequence of str or Path
        Each a run folder, a study, or a folder of runs.
    output : str or Path, optional
        Where to; the first folder by default. It gets ``report.html`` and the folder ``report`` with the tables
        (``runs``, ``groups``, and ``budgets`` and ``targets`` where asked for; CSV, Parquet and Markdown) and
        ``figures`` (PNG and SVG).
    command : str
        Shown on the page.
    questions : Questions, optional
        Budgets and targets beside those of the studies' own ``[report]``.

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
    studies = read_studies(folders)
    questions = questions or Questions()
    for study in studies:
        questions |= Questions(study.state.report.budgets, study.state.report.targets)
    answers = answer_questions(comparison, questions)
    files = {"report.html": page(comparison, made, command, studies, answers).encode()}
    tables = table_files("runs", runs_table(comparison))
    tables |= table_files("groups", groups_table(comparison), groups_shown(comparison))
    for answer in answers:
        if answer.budgets:
            tables |= table_files(f"budgets{answer.suffix}", budgets_table(answer.budgets))
        if answer.targets:
            tables |= table_files(f"targets{answer.suffix}", targets_table(answer.targets))
    files |= {f"report/{file}": content for file, content in tables.items()}
    files |= {f"report/figures/{file}": content for file, content in draw_all(made).items()}
    target = Path(output) if output is not None else Path(folders[0])
    write_files(target, files)
    return target / "report.html", comparison
