"""A worker loads what its clients need before they come, and measures nothing that the server has measured."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from fedlora.clients import client_app


@pytest.mark.parametrize("compiled", [False, True])
def test_data_and_model_are_loaded_and_what_is_known_is_kept(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config: Any = SimpleNamespace()
    adapted: Any = SimpleNamespace(independent={})
    loaded = []
    monkeypatch.setattr(client_app, "run_config", lambda values: config)
    monkeypatch.setattr(client_app, "client_data", loaded.append)
    monkeypatch.setattr(client_app, "compiles", lambda *_: compiled)
    monkeypatch.setattr(client_app, "client_half", lambda of: loaded.append(of) or SimpleNamespace(adapted=adapted))
    context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
    client_app.prepare(context, {(64, 0): None})
    assert loaded == [config, config]
    # Fused layers are others than those that the server measured.
    assert adapted.independent == ({} if compiled else {(64, 0): None})
    assert client_app.app.preparation_function is client_app.prepare
