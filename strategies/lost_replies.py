"""Clients that a round asked and that do not count: who they are, why, and what they spent all the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from flwr.app import ConfigRecord, RecordDict

from fedlora.communication.meter import Row, row_dict
from fedlora.errors import BudgetError, ClientErrorCode, plain_text
from fedlora.privacy import Ledger
from fedlora.privacy.calibration import local_steps
from fedlora.privacy.mechanisms import mechanism_of
from fedlora.strategies.base import RoundReport
from fedlora.strategies.replies import NO_REPLY
from fedlora.strategies.summary import privacy_rows

if TYPE_CHECKING:
    from fedlora.strategies.federation import Federation

_LONGEST_REASON = 200

Rows = list[dict[str, Any]]


def attempt_rows(server_round: int, messages: Iterable[Row], reports: Sequence[RoundReport]) -> tuple[Rows, Rows, Rows]:
    """Return the rows of communication.csv, privacy.csv and left_out.csv of one attempt at a round."""
    return [*map(row_dict, messages)], privacy_rows(server_round, reports), left_out_rows(server_round, reports)


def left_out_rows(server_round: int, reports: Sequence[RoundReport]) -> Rows:
    """Return a row of left_out.csv for each client that an exchange asked and that does not count."""
    rows = []
    for report in reports:
        found = [(f["client"], _code_name(f["code"]), _last_line(f["error"])) for f in report.failed]
        enough = "the round had the replies that it takes"
        found += [(client, ClientErrorCode.SURPLUS.name.lower(), enough) for client in report.surplus]
        for client, code, reason in sorted(found):
            row = {"round": server_round, "attempt": report.attempt, "client": client, "code": code, "reason": reason}
            rows.append(row)
    return rows


def charge_unused(federation: Federation, server_round: int) -> None:
    """Note what simulated clients of the last exchange spent whose replies were not used.

    One whose reply was refused or not needed charged its ledger itself. That of a late one ended with its worker, and
    is charged here for all its steps: a server that it reached too late would have its result.
    """
    config, report = federation.config, federation.rounds.report
    mechanism, states = mechanism_of(config), getattr(federation.grid, "states", None)
    if mechanism.noise_by != "client" or states is None:
        return
    codes = {failure["client"]: failure["code"] for failure in report.failed}
    lost = [client for client, code in codes.items() if code in (ClientErrorCode.LATE, ClientErrorCode.REPLY)]
    exchange = federation.method.exchanges(config, server_round)[federation.method.exchange - 1]
    for client in sorted([*lost, *report.surplus]):
        examples = federation.data.drawn_from(client, config.privacy)
        plan = mechanism.plan(config, examples, federation.data.units_of(client, config.privacy))
        assert plan is not None
        steps, state = local_steps(exchange.training(config), examples), states.get(client) or RecordDict()
        known = state.get("ledger")
        ledger = Ledger(plan.accountant, plan.delta) if known is None else Ledger.from_record(known)
        if codes.get(client) == ClientErrorCode.LATE:
            starts = known is None and any(role.made_by == "client" for role in exchange.roles.values())
            try:
                ledger.check(plan, steps, starts)
            except BudgetError:  # it would have refused
                continue
            ledger.charge(plan, steps, starts)
            state["ledger"] = ConfigRecord(ledger.to_record())
            states[client] = state
        elif known is None:  # a user's own client, without a ledger
            continue
        report.unused[client] = {
            "steps": steps,
            "sample_rate": plan.sample_rate,
            "noise_multiplier": plan.noise_multiplier,
            "epsilon": ledger.epsilon(),
            "delta": ledger.delta,
        }


def _code_name(code: int) -> str:
    if code == NO_REPLY:
        return "no_reply"
    return ClientErrorCode(code).name.lower() if code in list(ClientErrorCode) else str(code)


def _last_line(error: str) -> str:
    """Return what a traceback ends with."""
    return plain_text(error.strip().rpartition("\n")[2], _LONGEST_REASON)
