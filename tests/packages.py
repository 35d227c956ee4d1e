"""Packages that add to fedlora by entry points, laid out on the path as pip leaves them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def lay_package(site: Path, name: str, points: Mapping[str, Mapping[str, str]], code: str | None = None) -> None:
    """Write the metadata of a package, and its code.

    Parameters
    ----------
    site : Path
        A folder on the path; it may hold other packages.
    name : str
        Of the package and of its one module.
    points : mapping of str to mapping of str to str
        By group, the value of each entry point by its name.
    code : str, optional
        Of the module; None writes no module.
    """
    about = site / f"{name}-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = []
    for group, values in points.items():
        lines += [f"[{group}]", *(f"{point} = {value}" for point, value in values.items())]
    (about / "entry_points.txt").write_text("\n".join([*lines, ""]))
    if code is not None:
        (site / f"{name}.py").write_text(code)
