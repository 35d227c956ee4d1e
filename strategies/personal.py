"""The clients' own models of a run whose arrays partly stay with the clients, for others to load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flwr.app import ArrayRecord, RecordDict

from fedlora.adapters import AdaptedModel
from fedlora.adapters.peft_format import export_peft
from fedlora.communication.wire import decode
from fedlora.config import Config
from fedlora.methods import ADAPTER, CLIENTS
from fedlora.roles import HOME


def export_own(
    adapted: AdaptedModel,
    config: Config,
    folder: Path,
    label_names: list[str] | None,
    states: Mapping[int, RecordDict],
) -> None:
    """Write each client's own model as a PEFT folder ``adapter/clients/NUMBER``, and say what ``adapter/`` is.

    Parameters
    ----------
    adapted : AdaptedModel
        With the arrays that all clients share, and the start of the others.
    config : Config
    folder : Path
        The run folder.
    label_names : list of str or None
    states : mapping of int to RecordDict
        Flower states of clients, by their number, as far as this process may read them: none of real nodes.
    """
    for client, state in sorted(states.items()):
        record = state.get(HOME)
        if isinstance(record, ArrayRecord):
            own = decode(record)
            start = adapted.arrays(own)
            adapted.set_shared(own)
            export_peft(adapted, config, folder / ADAPTER / CLIENTS / str(client), label_names)
            adapted.set_shared(start)
    (folder / ADAPTER / "README.md").write_text(_README, encoding="utf-8")


_README = """\
# What the clients share

In this run every client has a model of its own: some of its arrays stayed with it. This adapter holds the arrays that
all clients share, beside the start of the others. A client that joins begins with it; no client's model is in it.

A simulation leaves the models of the clients that trained in `clients/NUMBER`, each a PEFT adapter:

    peft.PeftModel.from_pretrained(model, "adapter/clients/0")
    fedlora.load("RUN", client=0)

On real nodes they stay in the owners' directories.
"""
