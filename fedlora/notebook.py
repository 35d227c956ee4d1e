"""The progress of a run in a notebook: a bar of rounds, with the last score beside it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.console import Console
from tqdm.auto import tqdm

from fedlora.config import Config
from fedlora.strategies.callbacks import Progress
from fedlora.summaries import format_bytes, format_epsilon, sent_bytes
from fedlora.tasks import get_task


@contextmanager
def shown(config: Config, progress: Progress | None) -> Iterator[Progress | None]:
    """Give a display for a run: what the caller brought, else a bar if this process is a notebook's kernel."""
    bar = nullcontext(progress) if progress is not None or not Console().is_jupyter else rounds_bar(config)
    with bar as found:
        yield found


@contextmanager
def rounds_bar(config: Config) -> Iterator[Progress]:
    """Show a bar, which tqdm draws as a widget where ipywidgets is installed, and as text elsewhere."""
    task = get_task(config.model.task)
    with tqdm(total=config.run.rounds, desc=config.run.name, unit="round") as bar:

        def on_start(rounds: int, first: int, clients: int) -> None:
            bar.update(first - bar.n)

        def on_note(text: str) -> None:
            if not logging.getLogger().handlers:  # else the user's own logging has shown it
                bar.write(text)

        def on_round(line: dict[str, Any]) -> None:
            facts = {"sent": format_bytes(sent_bytes(line["communication"]))}
            if task.primary in line["metrics"]:
                facts[task.primary] = task.show(task.primary, line["metrics"][task.primary])
            if line["epsilon"] is not None:
                facts["epsilon"] = format_epsilon(line["epsilon"])
            bar.set_postfix(facts, refresh=False)
            bar.update(line["round"] - bar.n)

        yield Progress(on_start=on_start, on_round=on_round, on_note=on_note)
