"""What a model is trained to do: one file a task, found by its being there.

A task of another package comes by an entry point of the group ``fedlora.tasks`` that names its class.
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


@cache
def tasks() -> dict[str, Task]:
    """Return every task by its name, sorted.

    Raises
    ------
    InputError
        If the task of another package cannot be loaded, or has a name that is taken.
    """
    found: dict[str, Task] = {}
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
            raise InputError(GROUP, entry.value, f"cannot be loaded ({error}); mend or remove the package") from error
        if not isinstance(task, Task):
            raise InputError(GROUP, entry.value, "is no fedlora.tasks.Task; name a subclass of it")
        if task.name in found:
            raise InputError(GROUP, entry.value, f"has the name {task.name!r}, which is taken; rename the task")
        found[task.name] = task
    return dict(sorted(found.items()))


def get_task(name: str) -> Task:
    """Return the task of a name (``model.task``).

    Raises
    ------
    InputError
        If there is none; close names are suggested.
    """
    known = tasks()
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(known)}"
        raise InputError("model.task", name, f"is not a task; {hint}")
    return known[name]
