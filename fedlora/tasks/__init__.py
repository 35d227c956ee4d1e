"""What a model is trained to do, one file a task.

Adding a file adds a task. A task of another package comes by an entry point of the group ``fedlora.tasks`` that names
its class.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points

from fedlora.errors import InputError
from fedlora.tasks.base import IGNORED, Encoded, Metric, Sums, Task

__all__ = ["IGNORED", "Encoded", "Metric", "Sums", "Task", "get_task", "tasks"]

GROUP = "fedlora.tasks"


def tasks() -> dict[str, Task]:
    """Return every task that can be used by its name, sorted."""
    found, broken = _find()
    return {name: found[name] for name in sorted(found) if name not in broken}


def get_task(name: str) -> Task:
    """Return the task of a name (``model.task``).

    Raises
    ------
    InputError
        If there is none (close names are suggested), another package's task of this name cannot be loaded, or two
        tasks have the name.
    """
    found, broken = _find()
    if name in broken:
        raise InputError(GROUP, *broken[name])
    if name not in found:
        close = difflib.get_close_matches(name, found, 1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(tasks())}"
        raise InputError("model.task", name, f"is not a task; {hint}")
    return found[name]


@cache
def _find() -> tuple[dict[str, Task], dict[str, tuple[str, str]]]:
    """Return the tasks by name and, for each name that cannot be used, the entry point and why."""
    found: dict[str, Task] = {}
    broken: dict[str, tuple[str, str]] = {}
    for module in pkgutil.iter_modules(__path__):
        content = vars(importlib.import_module(f"{__name__}.{module.name}"))
        for value in content.values():
            is_own = isinstance(value, type) and issubclass(value, Task) and value.__module__ == content["__name__"]
            if is_own and "name" in vars(value):
                found[value.name] = value()
    for entry in entry_points(group=GROUP):
        try:
            task = entry.load()()
        except Exception as error:  # of any package's code
            broken[entry.name] = entry.value, f"cannot be loaded ({error}); fix or remove the package"
            continue
        if not isinstance(task, Task) or not hasattr(task, "name"):
            broken[entry.name] = entry.value, "is no fedlora.tasks.Task with a name; name a subclass of it"
        elif task.name in found:
            broken[task.name] = entry.value, f"has the name {task.name!r}, which is taken; rename the task"
        else:
            found[task.name] = task
    return found, broken
