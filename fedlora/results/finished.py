"""A finished run in Python: its summary, its tables, its picture, and its models."""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.config import ANY_METHOD, Config, read_toml
from fedlora.csv_files import plain_cell
from fedlora.errors import InputError
from fedlora.methods import get_method
from fedlora.results.plot import draw_rounds
from fedlora.summaries import format_epsilon, result_rows
from fedlora.tasks import get_task

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class BestRound:
    """The round with the best validation score, whose model the run kept.

    Attributes
    ----------
    folder : Path
        The run folder.
    round : int
    metrics : dict
        On ``data.validation``, after that round.
    """

    folder: Path
    round: int
    metrics: dict[str, Any]

    def export(self, output: str | Path | None = None, *, merged: bool = False) -> Path:
        """Write that round's model for others to load; see :func:`fedlora.results.load.export_run`.

        ``fedlora.load(folder, best=True)`` gives it in memory.
        """
        from fedlora.results.load import export_run

        return export_run(self.folder, output, merged=merged, best=True)


@dataclass(frozen=True)
class RunResult:
    """A finished run, represented by its folder: ``fedlora.load(result)`` loads its model.

    A notebook shows it as a small table. The tables below are read from the run folder each time.

    Attributes
    ----------
    folder : Path
    summary : dict
        The content of summary.json.
    """

    folder: Path
    summary: dict[str, Any]

    @classmethod
    def load(cls, folder: str | Path) -> RunResult:
        """Open the folder of a finished run.

        Raises
        ------
        InputError
            If there is no finished run in it, or its summary cannot be read.
        """
        path = Path(folder) / "summary.json"
        try:
            return cls(Path(folder), json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            remedy = "holds no finished run (it has no summary.json); give the folder of one"
            raise InputError("FOLDER", str(folder), remedy) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            remedy = f"its summary.json cannot be read ({reason}); run again into another"
            raise InputError("FOLDER", str(folder), remedy) from None

    @property
    def best(self) -> BestRound | None:
        """The round with the best validation score; None in a run without ``data.validation``."""
        best = self.summary.get("best")
        if best is None:
            return None
        return BestRound(self.folder, best["round"], {name: v for name, v in best.items() if name != "round"})

    @property
    def rounds(self) -> pd.DataFrame:
        """rounds.jsonl, a row a round; nested values have names such as ``metrics.accuracy``."""
        import pandas as pd

        return pd.json_normalize(self._lines()).set_index("round")

    @property
    def communication(self) -> pd.DataFrame:
        """communication.csv, a row a message: round, client, direction, and bytes."""
        return self._table("communication.csv")

    @property
    def privacy(self) -> pd.DataFrame:
        """privacy.csv, a row a round and client: steps, rate, noise multiplier and epsilon so far; empty without it."""
        return self._table("privacy.csv")

    @property
    def clients(self) -> pd.DataFrame:
        """A row a client: name and number of examples, bytes of its messages, epsilon spent, metrics of its own.

        Names and examples are known in a simulation. Metrics are those of clients.csv, where the run wrote it.
        """
        sent = self.communication
        found = sent.pivot_table(index="client", columns="direction", values="message_bytes", aggfunc="sum")
        found = found.astype("Int64").add_suffix("_bytes").rename_axis(columns=None)
        if (self.folder / "partition.csv").exists():
            by_label = self._table("partition.csv").groupby("client")
            found = by_label.agg(name=("name", "first"), examples=("examples", "sum")).join(found)
        spent = self.privacy
        spent = spent[spent["client"] != "all"].astype({"client": int}).groupby("client")["epsilon"].last()
        found = found.join(spent) if len(spent) else found
        if (self.folder / "clients.csv").exists():
            own = self._table("clients.csv").set_index("client").rename(columns={"examples": "evaluated_examples"})
            found = found.join(own)
        return found

    def plot(self) -> Figure:
        """Return what rounds.png shows, as a figure of matplotlib: score, losses, bytes and epsilon by round."""
        config = self._config()
        title = f"{config.run.name}: {get_method(config.method.name).title}"
        task, target = get_task(config.model.task), config.privacy.target_epsilon
        figure = draw_rounds(self._lines(), title, task, self.summary.get("start"), target)
        # A notebook asks for it; it knows how to show figures of pyplot alone.
        figure._repr_png_ = partial(_png, figure)  # type: ignore[attr-defined]
        return figure

    def export(self, output: str | Path | None = None, *, merged: bool = False, client: int | None = None) -> Path:
        """Write the last round's model for others to load; see :func:`fedlora.results.load.export_run`."""
        from fedlora.results.load import export_run

        return export_run(self.folder, output, merged=merged, client=client)

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        facts = [f"{self.summary['method']}, {self.summary['rounds']} rounds"]
        facts += [f"{name} {value:.4g}" for name, value in self.summary["final"].items() if isinstance(value, float)]
        if self.summary["epsilon"]:
            facts.append(f"epsilon {format_epsilon(self.summary['epsilon']['max'])}")
        return f"RunResult({str(self.folder)!r}: {', '.join(facts)})"

    def _repr_html_(self) -> str:
        rows = [("method", self.summary["method"]), ("rounds", str(self.summary["rounds"]))]
        rows += result_rows(self.summary, get_task(self._config().model.task), self.folder)
        cells = (
            f"<tr><th>{html.escape(name.replace('_', ' '))}</th><td>{html.escape(v)}</td></tr>" for name, v in rows
        )
        return f"<table>{''.join(cells)}</table>"

    def _config(self) -> Config:
        return Config.model_validate(read_toml(self.folder / "config.toml"), context=ANY_METHOD)

    def _lines(self) -> list[dict[str, Any]]:
        text = (self.folder / "rounds.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def _table(self, name: str) -> pd.DataFrame:
        import pandas as pd

        texts = dict.fromkeys(("name", "label"), plain_cell)
        return pd.read_csv(self.folder / name, converters=texts if name == "partition.csv" else None)


def _png(figure: Figure) -> bytes:
    stream = BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()
