"""On a real node nothing that protects an example is drawn from a generator whose numbers can be computed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlora.clients import client_app
from fedlora.clients.client_app import app
from fedlora.communication.wire import Arrays, decode
from fedlora.training import cohort
from tests import tiny
from tests.owner import Server, listed, write_node


@pytest.fixture(autouse=True)
def _here(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FEDLORA_CACHE", str(cache))
    yield
    client_app.forget_data()


def predictable(*_: Any, **__: Any) -> None:
    raise AssertionError("a generator whose numbers follow from its others")


@pytest.mark.parametrize("method", ["fed-sb", "flexmore"])
def test_no_predictable_generator_is_made_on_the_cpu(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Neither for noise, sampling and dropout, nor for an expert's start from documents; and no two runs agree."""
    settings: dict[str, Any] = {"method__dropout": 0.1} if method == "fed-sb" else {"method__rank": 2}
    if method == "flexmore":
        model = tiny.save_llama(tmp_path / "model")
        settings |= {
            "model__name": str(model),
            "model__task": "causal-lm",
            "model__pooling": "default",
            "known": tiny.KNOWN,
        }
    found: list[Arrays] = []
    for number in range(3):
        server = Server(tmp_path / "server", method, privacy__target_epsilon=8.0, **settings)
        policy = {"models": listed(model)} if method == "flexmore" else {}
        here = server.context(write_node(tmp_path / f"clinic{number}", cache, policy=policy))
        assert not app(server.describe(), here).has_error()
        with monkeypatch.context() as planted:
            if number:  # the first loads the model and the data, whose seeds are public
                planted.setattr(cohort, "_generator", predictable)
                planted.setattr(np.random, "default_rng", predictable)
                planted.setattr(np.random, "SeedSequence", predictable)
                # It draws synthetic rows, of which nothing is secret.
                planted.setattr(client_app, "check_sound", lambda *_: None)
                planted.setattr(cohort, "check_sound", lambda *_: None)
            reply = app(server.train(1), here)
        assert not reply.has_error(), reply.error
        record: Any = reply.content["arrays"]
        found.append(decode(record))
    names = [name for name in found[0] if not name.endswith("router_bias")]
    assert all(not torch.equal(found[1][name], found[2][name]) for name in names)
