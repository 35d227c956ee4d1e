"""Exchanges before the first round, in which clients help to make the start."""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, ConfigRecord

from fedlora.communication.meter import row_dict
from fedlora.communication.wire import decode, encode
from fedlora.errors import RunError
from fedlora.strategies.base import FederatedStrategy
from fedlora.strategies.nodes import in_round, told
from fedlora.strategies.summary import privacy_rows, round_seconds

if TYPE_CHECKING:
    from fedlora.strategies.federation import Federation

log = logging.getLogger("fedlora")


def gather_start(federation: Federation) -> None:
    """Put the means of the clients' answers into the method's ``gathered``; the server's model makes the start of them.

    Each exchange is in the checkpoint, with what its clients spent, before the next one begins. A resumed run goes on
    after the last of them.

    Raises
    ------
    RunError
        If too few clients answered. The exchanges before are kept.
    """
    method, saved = federation.method, federation.checkpoint
    starter = method.starting()
    # Of the strategy that runs the rounds, which need not be the method: it keeps count of what is released.
    starter.noise = federation.stateful.get("noise", method.noise)
    starter.secure = method.secure
    starter.know(federation.adapted)
    federation.meter.formula = starter.client_formula(federation.adapted, federation.parts)
    done = int(saved.get("gathered", 0))
    if done:
        method.gathered = saved.get_arrays("gathered") or {}
        federation.count(saved.get("seconds"), ())
        federation.totals.epsilon.update(saved.get("epsilon"))
        starter.noise.load_state_dict(saved.get("noise"))
    for exchange in range(done + 1, len(method.start_exchanges(federation.config)) + 1):
        answered = _ask(federation, starter, exchange)
        means = decode(ArrayRecord({name: a for name, a in answered.items() if starter.role(name).trained}))
        method.gathered = method.gathered | means
        _save(federation, starter, exchange)
    federation.meter.formula = method.client_formula(federation.adapted, federation.parts)


def _ask(federation: Federation, starter: FederatedStrategy, exchange: int) -> ArrayRecord:
    """Send the messages of an exchange, and aggregate the replies."""
    began = time.perf_counter()
    starter.exchange = exchange
    starter.secure.send = partial(federation.query, 0, exchange)
    request = encode(federation.method.start_request(federation.adapted, exchange), federation.dtype)
    messages = starter.configure_train(0, request, ConfigRecord(), federation.meter)
    messages = in_round(messages, 0, federation.roster, exchange)
    replies = federation.meter.send_and_receive(messages, timeout=federation.config.server.timeout)
    with federation.asking("clients help to start", len(starter.report.addressed)) as counted:
        answered, _ = starter.aggregate_train(0, told(counted(replies), federation.roster))
    starter.report.seconds = time.perf_counter() - began
    federation.roster.after_round(starter.report)
    if answered is None:
        why = starter.report.uncounted or "there was no answer"
        raise RunError(f"exchange {exchange} of the start gave nothing: {why}; continue with --resume")
    text = "exchange %d before the first round: %d of %d clients answered in %.1f s"
    clients, seconds = len(starter.report.clients), starter.report.seconds
    log.info(text, exchange, len(starter.report.metrics), clients, seconds)
    return answered


def _save(federation: Federation, starter: FederatedStrategy, exchange: int) -> None:
    """Commit an exchange, with what its clients spent."""
    saved, spent = federation.checkpoint, privacy_rows(0, [starter.report])
    federation.count(round_seconds([starter.report], 0.0), spent)
    saved["gathered"] = exchange
    saved.set_arrays("gathered", federation.method.gathered)
    saved["seconds"], saved["epsilon"] = dict(federation.totals.seconds), federation.totals.epsilon
    saved["communication"], saved["noise"] = federation.meter.totals, starter.noise.state_dict()
    federation.folder.add_start(map(row_dict, federation.meter.take_rows()), spent)
