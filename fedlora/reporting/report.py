"""The function behind ``fedlora report``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from fedlora.figures.draw import draw_all
from fedlora.reporting.budgets import Questions, answer_questions, budgets_table, targets_table
from fedlora.reporting.changes import changes, changes_shown, changes_table
from fedlora.reporting.charts import charts
from fedlora.reporting.comparison import Comparison, compare
from fedlora.reporting.differences import differences, differences_table
from fedlora.reporting.html import page
from fedlora.reporting.report_files import write_files
from fedlora.reporting.runs import Found, read_runs
from fedlora.reporting.study_results import read_studies
from fedlora.reporting.tables import groups_shown, groups_table, runs_table, table_files


def write_report(
    folders: Sequence[str | Path],
    output: str | Path | None = None,
    command: str = "",
    questions: Questions | None = None,
) -> tuple[Path, Comparison]:
    """Compare runs: tables, figures and a page; return the first of :func:`write_reports`."""
    return write_reports(folders, output, command, questions)[0]


def write_reports(
    folders: Sequence[str | Path],
    output: str | Path | None = None,
    command: str = "",
    questions: Questions | None = None,
) -> list[tuple[Path, Comparison]]:
    """Compare runs: tables, figures and a page. Runs whose clients have models of their own have a report of their own.

    Parameters
    ----------
    folders : sequence of str or Path
        Each a run folder, a study, or a folder of runs.
    output : str or Path, optional
        Where to; the first folder by default. It gets ``report.html`` and the folder ``report`` with the tables
        (``runs``, ``groups``, ``changes`` where runs were evaluated before training, ``differences`` where groups share
        seeds, and ``budgets`` and ``targets`` where asked for; CSV, Parquet and Markdown) and ``figures`` (PNG and
        SVG). Beside runs of global models, those of clients' own models are in ``personalised.html`` and
        ``report/personalised``.
    command : str
        Shown on the page.
    questions : Questions, optional
        Budgets and targets beside those of the studies' own ``[report]``.

    Returns
    -------
    list of (Path, Comparison)
        Each page, and what it says.

    Raises
    ------
    InputError
        If a folder holds no finished run, a run is damaged, tasks differ, or a file of the user's is in the way.
    """
    target = Path(output) if output is not None else Path(folders[0])
    studies = read_studies(folders)
    questions = questions or Questions()
    for study in studies:
        questions |= Questions(study.state.report.budgets, study.state.report.targets)
    files: dict[str, bytes] = {}
    written = []
    for name, found in _parts(read_runs(folders)).items():
        comparison = compare(found)
        below = "report" if name == "report" else f"report/{name}"
        made = charts(comparison)
        answers, pairs, moved = answer_questions(comparison, questions), differences(comparison), changes(comparison)
        # Like unfinished runs, studies are told once. They tune global models alone.
        told = studies if name == "report" else []
        files[f"{name}.html"] = page(comparison, made, command, told, answers, pairs, moved).encode()
        tables = table_files("runs", runs_table(comparison))
        tables |= table_files("groups", groups_table(comparison), groups_shown(comparison))
        if moved:
            tables |= table_files("changes", changes_table(moved), changes_shown(moved))
        if pairs:
            tables |= table_files("differences", differences_table(pairs))
        if answers.budgets:
            tables |= table_files("budgets", budgets_table(answers.budgets))
        if answers.targets:
            tables |= table_files("targets", targets_table(answers.targets))
        files |= {f"{below}/{file}": content for file, content in tables.items()}
        files |= {f"{below}/figures/{file}": content for file, content in draw_all(made).items()}
        written.append((target / f"{name}.html", comparison))
    write_files(target, files)
    return written


def _parts(found: Found) -> dict[str, Found]:
    """Divide runs into those of a global model and those of clients' own models, by the name of their page."""
    own = [run for run in found.runs if run.summary.personalised]
    if not own or len(own) == len(found.runs):
        return {"report": found}
    common = [run for run in found.runs if not run.summary.personalised]
    return {"report": dataclasses.replace(found, runs=common), "personalised": Found(own, [])}
