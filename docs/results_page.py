"""The page of all committed results, made from their tables: a hook of mkdocs (mkdocs.yml names it).

A folder of results is shown with the heading, the command and a link of the section that tells of it. One of which no
section tells is refused.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

STUDIES = Path(__file__).resolve().parents[1] / "experiments" / "studies"
RAW = (".csv", ".json")
"""What a page links to beside its tables and pictures."""


@dataclass(frozen=True)
class Section:
    """What is told of a folder of results.

    Attributes
    ----------
    question : str
        The section's heading.
    link : str
        To the section, from the page of results.
    command : str
        The lines that made the results.
    """

    question: str
    link: str
    command: str


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page, and the raw figures that it links to."""
    from mkdocs.structure.files import File  # the rest is tested where mkdocs is not installed

    files.append(File.generated(config, "results/index.md", content=results_page()))
    for path in sorted(STUDIES.glob("results/*/*")):
        if path.suffix in RAW:
            place = f"results/studies/{path.relative_to(STUDIES)}"
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def results_page() -> str:
    """Return the page, in Markdown."""
    folders = sorted(path for path in (STUDIES / "results").iterdir() if path.is_dir())
    told = {folder: section_of(folder.name) for folder in folders}
    lines = [
        "# All results",
        "",
        "Every result that is kept, with its question, its table and the command that made it. Scores are test",
        "accuracy in percent: the mean over the seeds, with its 95 % interval (Student's t). MB are of all messages of",
        "a run. The link below each table leads to the settings, the machine, the commit, and what the figures do and",
        "do not show.",
        "",
        "| question | results |",
        "|---|---|",
        *(f"| {told[folder].question} | [{folder.name}](#{folder.name}) |" for folder in folders),
    ]
    for folder in folders:
        lines += _shown(folder, told[folder])
    return "\n".join(lines) + "\n"


def section_of(name: str) -> Section:
    """Find the section of the studies' pages that names a folder of results.

    Raises
    ------
    ValueError
        If there is none, or if it gives no command.
    """
    for page in sorted(STUDIES.glob("*.md"), key=lambda page: page.name == "README.md"):
        heading, anchor = "", ""
        for part in re.split(r"^(?=#{1,2} )", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
            heading = part.partition("\n")[0].strip("# ")
            anchor = "" if part.startswith("# ") else f"#{_slug(heading)}"
            command = re.search(r"(?:^ {4}.+\n)+", part, re.MULTILINE)
            if f"results/{name}/" in part and command:
                lines = command[0].rstrip().replace(" && ", "\n    ")  # a line is as wide as the page
                return Section(heading, f"studies/{page.name}{anchor}", lines)
    raise ValueError(f"no section of {STUDIES.name}/*.md names results/{name}/ and the command that made it")


def _slug(heading: str) -> str:
    """Return the anchor that mkdocs gives to a heading."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def _shown(folder: Path, section: Section) -> list[str]:
    place = f"studies/results/{folder.name}"
    files = [path for path in sorted(folder.iterdir()) if path.suffix in RAW]
    return [
        "",
        f"## {section.question} {{ #{folder.name} }}",
        "",
        section.command,
        "",
        *(f"![{folder.name}: {path.stem}]({place}/{path.name})" for path in sorted(folder.glob("*.png"))),
        "",
        *_table(folder),
        "",
        f"[What this shows]({section.link}) · raw: "
        + ", ".join(f"[{path.name}]({place}/{path.name})" for path in files),
    ]


def _table(folder: Path) -> list[str]:
    """Return the groups of a study with their intervals; the table that is there, where there are no groups."""
    groups = folder / "groups.csv"
    if not groups.exists():
        return (folder / "table.md").read_text(encoding="utf-8").splitlines()
    with groups.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = ["| configuration | seeds | accuracy | MB | up | down | once |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        sizes = (f"{float(row[f'{way}_bytes']) / 1e6:.1f}" for way in ("total", "uplink", "downlink", "initial"))
        lines.append(f"| {row['group']} | {row['n']} | {_interval(row, 'accuracy')} | {' | '.join(sizes)} |")
    return lines


def _interval(row: dict[str, str], metric: str) -> str:
    mean, low = (100 * float(row[key]) for key in (metric, f"{metric}_low"))
    return f"{mean:.1f} ± {mean - low:.1f}"
