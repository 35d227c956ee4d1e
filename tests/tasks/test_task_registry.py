"""Where tasks are found, and how one that is not there is told."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from peft import TaskType

import fedlora.tasks as package
from fedlora.config import load_config, unused_keys
from fedlora.errors import InputError
from fedlora.tasks import get_task, tasks
from fedlora.tasks.sequence_classification import SequenceClassification
from tests.configs import BASE


def test_a_file_of_the_folder_is_a_task() -> None:
    known = {"sequence-classification", "causal-lm", "multi-label-classification", "regression", "token-classification"}
    assert known <= set(tasks())
    for name, task in tasks().items():
        assert (task.name, type(get_task(name))) == (name, type(task))
        assert task.primary in task.scores
        assert task.client_metric in {"loss", *task.scores}
        assert task.baseline is None or task.baseline.metric in task.scores
        assert hasattr(transformers, task.auto_class)
        assert task.peft_type in TaskType.__members__


@pytest.mark.parametrize(
    ("name", "hint"), [("regresion", "did you mean regression"), ("xyz", "choose one of causal-lm"), ("", "model.task")]
)
def test_an_unknown_task_is_refused_with_what_there_is(name: str, hint: str) -> None:
    with pytest.raises(InputError, match=hint):
        load_config(BASE, {"model.task": name} if name else {"model.task": 3})


class Foreign(SequenceClassification):
    """A task of another package."""

    name = "foreign"


@pytest.mark.parametrize(
    ("loaded", "message"),
    [
        (Foreign, None),
        (SequenceClassification, "is taken"),
        (dict, "is no fedlora.tasks.Task"),
        (None, "cannot be loaded"),
    ],
)
def test_another_packages_task_comes_by_entry_point(
    monkeypatch: pytest.MonkeyPatch, loaded: Any, message: str | None
) -> None:
    def load() -> Any:
        if loaded is None:
            raise ImportError("no such module")
        return loaded

    entry = SimpleNamespace(name="foreign", value="elsewhere:Task", load=load)
    monkeypatch.setattr(package, "entry_points", lambda group: [entry] if group == "fedlora.tasks" else [])
    package._find.cache_clear()
    try:
        if message is None:
            assert load_config(BASE, {"model.task": "foreign"}).model.task == "foreign"
        else:
            name = SequenceClassification.name if loaded is SequenceClassification else "foreign"
            with pytest.raises(InputError, match=message):
                load_config(BASE, {"model.task": name})
            assert name not in tasks()
            # A package that is broken spoils no run of another task.
            assert unused_keys(load_config(BASE, {"model.task": "regression"})) == []
    finally:
        package._find.cache_clear()


def test_reading_a_config_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from fedlora.config import load_config; from fedlora.tasks import tasks; tasks();"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
