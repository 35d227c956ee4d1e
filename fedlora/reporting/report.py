"""The function behind ``fedlora report``."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from fedlora.figures.draw import draw_all
from fedlora.reporting.budgets import Questions, answer_questions, budgets_table, targets_table
from fedlora.reporting.changes import changes, changes_shown, changes_table
from fedlora.reporting.charts import charts
from fedlora.reporting.comparison import Comparison, compare, short_name
from fedlora.reporting.differences import differences, differences_table
from fedlora.reporting.html import Part, page
from fedlora.reporting.report_files import write_files
from fedlora.reporting.runs import FinishedRun, Found, read_runs
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
    """Compare runs: tables, figures and a page, with a section for every task and data set.

    Runs whose clients have models of their own have a page of their own.

    Parameters
    ----------
    folders : sequence of str or Path
        Each a run folder, a study, or a folder of runs.
    output : str or Path, optional
        Where to; the first folder by default. It gets ``report.html`` and the folder ``report`` with the tables
        (``runs``, ``groups``, ``changes`` where runs were evaluated before training, ``differences`` where groups share
        seeds, and ``budgets`` and ``targets`` where asked for; CSV, Parquet and Markdown) and ``figures`` (PNG and
        SVG). Where runs are of several tasks or data sets, each section's are in ``report/SECTION``. Beside runs of
        global models, those of clients' own models are in ``personalised.html`` and ``report/personalised``.
    command : str
        Shown on the page.
    questions : Questions, optional
        Budgets and targets beside those of the studies' own ``[report]``.

    Returns
    -------
    list of (Path, Comparison)
        Each section, with the page that it is on.

    Raises
    ------
    InputError
        If a folder holds no finished run, a run is damaged, or a file of the user's is in the way.
    """
    target = Path(output) if output is not None else Path(folders[0])
    studies = read_studies(folders)
    questions = questions or Questions()
    for study in studies:
        questions |= Questions(study.state.report.budgets, study.state.report.targets)
    files: dict[str, bytes] = {}
    written = []
    for name, found in _pages(read_runs(folders)).items():
        below = "report" if name == "report" else f"report/{name}"
        parts = [_part(each, title, below, questions) for title, each in _sections(found).items()]
        if len(parts) > 1:
            parts = [dataclasses.replace(part, below=f"{below}/{part.name}") for part in parts]
        # Studies are told once. They tune global models alone.
        files[f"{name}.html"] = page(parts, command, studies if name == "report" else []).encode()
        for part in parts:
            files |= {f"{part.below}/{file}": content for file, content in _part_files(part).items()}
            written.append((target / f"{name}.html", part.comparison))
    write_files(target, files)
    return written


def _part(found: Found, title: str, below: str, questions: Questions) -> Part:
    """Compare the runs of one section."""
    comparison = compare(found)
    answers, pairs, moved = answer_questions(comparison, questions), differences(comparison), changes(comparison)
    name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    return Part(name, title, below, comparison, charts(comparison), answers, pairs, moved)


def _part_files(part: Part) -> dict[str, bytes]:
    """Return the tables and figures of a section."""
    comparison = part.comparison
    tables = table_files("runs", runs_table(comparison))
    tables |= table_files("groups", groups_table(comparison), groups_shown(comparison))
    if part.changes:
        tables |= table_files("changes", changes_table(part.changes), changes_shown(part.changes))
    if part.pairs:
        tables |= table_files("differences", differences_table(part.pairs))
    if part.answers.budgets:
        tables |= table_files("budgets", budgets_table(part.answers.budgets))
    if part.answers.targets:
        tables |= table_files("targets", targets_table(part.answers.targets))
    return tables | {f"figures/{file}": content for file, content in draw_all(part.charts).items()}


def _sections(found: Found) -> dict[str, Found]:
    """Divide runs by what they are scored on, task and data, by the title of their section.

    The first section has the unfinished runs.
    """
    by_key: dict[tuple[str | None, ...], list[FinishedRun]] = defaultdict(list)
    for run in found.runs:
        source = run.config.data
        by_key[run.config.model.task, source.name, source.subset, source.test].append(run)
    sections: dict[str, Found] = {}
    for (task, *data), runs in by_key.items():
        base = f"{', '.join(short_name(each) for each in data if each is not None)} ({task})"
        # Paths may have their last part in common.
        numbered = itertools.chain([base], (f"{base} {number}" for number in itertools.count(2)))
        title = next(title for title in numbered if title not in sections)
        sections[title] = Found(runs, [] if sections else found.unfinished)
    return sections


def _pages(found: Found) -> dict[str, Found]:
    """Divide runs into those of a global model and those of clients' own models, by the name of their page."""
    own = [run for run in found.runs if run.summary.personalised]
    if not own or len(own) == len(found.runs):
        return {"report": found}
    common = [run for run in found.runs if not run.summary.personalised]
    return {"report": dataclasses.replace(found, runs=common), "personalised": Found(own, [])}
