"""The ClientApp: describes a client's data, and trains it, alone or in a cohort."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict

from clients.resources import client_data, client_model, initial_arrays, keep_initial, run_config
from fedlora.adapters import AdaptedModel
from fedlora.communication.meter import INITIAL
from fedlora.communication.wire import Arrays, decode, encode, wire_dtype
from fedlora.config import Config
from fedlora.data.tokens import FederatedData
from fedlora.errors import BudgetError, ClientErrorCode, GuardError, InputError
from fedlora.privacy import Ledger, PrivacyPlan, plan_privacy
from fedlora.privacy.calibration import local_steps
from fedlora.simulation.cohort_app import CohortClientApp
from fedlora.training import ClientJob, ClientResult, train_cohort
from fedlora.training.capacity import cohort_capacity

app = CohortClientApp()


@app.query()
def describe(message: Message, context: Context) -> Message:
    """Answer with the client's partition and its number of examples, so that the server can sample by partition."""
    config = run_config(context.run_config)
    client = int(context.node_config["partition-id"])
    partition = client_data(config).partition
    if client >= len(partition):
        reason = f"partition-id = {client}: the run has {len(partition)} clients; start fewer nodes"
        return Message(Error(code=ClientErrorCode.INPUT, reason=reason), reply_to=message)
    metrics = MetricRecord({"partition-id": client, "num-examples": len(partition[client])})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@app.train_cohort
def train(messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
    """Train the clients of the messages in one pass.

    A message carries the global arrays and ``config`` (server-round, learning-rate, parameterisation, and the digest of
    the frozen arrays, which come with the first message). A reply carries the trained arrays and metrics: num-examples,
    steps, loss, seconds, worker, and under DP noise-multiplier, sample-rate, epsilon and delta.
    """
    started = time.perf_counter()
    config = run_config(contexts[0].run_config)
    data = client_data(config)
    replies: dict[int, Message] = {}
    jobs: dict[int, ClientJob] = {}
    adapted: AdaptedModel | None = None
    for i, (message, context) in enumerate(zip(messages, contexts, strict=True)):
        try:
            adapted = _model_with_initial(config, message, adapted)
            if adapted is None:
                raise _NeedsInitialError
            jobs[i] = _job(config, data, message, context)
        except Exception as error:
            replies[i] = _error_reply(error, message)
    if jobs and adapted is not None:
        try:
            results = train_cohort(adapted, data.train, list(jobs.values()), config)
        except (GuardError, BudgetError, InputError) as error:
            return [_error_reply(error, message) for message in messages]
        seconds = (time.perf_counter() - started) / len(jobs)
        for (i, job), result in zip(jobs.items(), results, strict=True):
            replies[i] = _reply(config, messages[i], contexts[i], job, result, seconds)
    return [replies[i] for i in range(len(messages))]


class _NeedsInitialError(RuntimeError):
    pass


def _model_with_initial(config: Config, message: Message, ready: AdaptedModel | None) -> AdaptedModel | None:
    """Return the model with the run's frozen arrays in it, or None where this host does not hold them."""
    settings = message.content["config"]
    wanted = str(settings.get("initial-digest", ""))
    if INITIAL in message.content:
        record = message.content[INITIAL]
        assert isinstance(record, ArrayRecord)
        if getattr(ready, "initial", None) != wanted and keep_initial(decode(record)) != wanted:
            raise RuntimeError("the frozen arrays that came differ from the digest that the server announced")
    if ready is not None:
        return ready
    adapted = client_model(config, str(settings["parameterisation"]))
    if wanted and getattr(adapted, "initial", None) != wanted:
        arrays = initial_arrays(wanted)
        if arrays is None:
            initial_arrays.cache_clear()
            return None
        adapted.set_shared(arrays)
        adapted.initial = wanted
    return adapted


def _job(config: Config, data: FederatedData, message: Message, context: Context) -> ClientJob:
    settings: Any = message.content["config"]
    client = int(context.node_config["partition-id"])
    rows = data.partition[client]
    plan = plan_privacy(config, len(rows)) if config.privacy.mode == "example" else None
    if plan is not None:
        _ledger(context, plan).check(plan, local_steps(config, len(rows)))
    arrays = message.content["arrays"]
    assert isinstance(arrays, ArrayRecord)
    return ClientJob(
        client=client,
        server_round=int(settings["server-round"]),
        rows=rows,
        arrays=_decode_shared(arrays),
        learning_rate=float(settings["learning-rate"]),
        plan=plan,
        # Only the simulation's own grid says so; a run's config, which a server sends, cannot.
        secret=plan is not None and not context.node_config.get("simulated", False),
    )


_last_decoded: list[tuple[ArrayRecord, Arrays]] = []


def _decode_shared(record: ArrayRecord) -> Arrays:
    """Decode a record once, however many of a round's messages share it."""
    if not _last_decoded or _last_decoded[0][0] is not record:
        _last_decoded[:] = [(record, decode(record))]
    return _last_decoded[0][1]


def _ledger(context: Context, plan: PrivacyPlan) -> Ledger:
    if "ledger" in context.state:
        return Ledger.from_record(context.state["ledger"])
    return Ledger(plan.accountant, plan.delta)


def _reply(
    config: Config, message: Message, context: Context, job: ClientJob, result: ClientResult, seconds: float
) -> Message:
    metrics = MetricRecord(
        {
            "num-examples": result.examples,
            "steps": result.steps,
            "loss": result.loss,
            "seconds": seconds,
            # A float, since the bytes of an integer on the wire depend on its size.
            "worker": float(os.getpid()),
        }
    )
    if job.plan is not None:
        ledger = _ledger(context, job.plan)
        ledger.charge(job.plan, result.steps)
        context.state["ledger"] = ConfigRecord(ledger.to_record())
        metrics["noise-multiplier"] = job.plan.noise_multiplier
        metrics["sample-rate"] = job.plan.sample_rate
        metrics["total-steps"] = ledger.steps
        metrics["epsilon"] = ledger.epsilon()
        metrics["delta"] = ledger.delta
        if job.secret:
            # The loss is computed from private data without noise: it stays on a real node.
            del metrics["loss"]
    arrays = encode(result.arrays, wire_dtype(config.model.dtype))
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def _error_reply(error: Exception, message: Message) -> Message:
    codes = {
        GuardError: ClientErrorCode.GUARD,
        BudgetError: ClientErrorCode.BUDGET,
        InputError: ClientErrorCode.INPUT,
        _NeedsInitialError: ClientErrorCode.NEEDS_INITIAL,
    }
    code = codes.get(type(error), ClientErrorCode.FAILED)
    reason = "".join(traceback.format_exception(error)) if code == ClientErrorCode.FAILED else str(error)
    return Message(Error(code=code, reason=reason), reply_to=message)


@app.cohort_capacity
def capacity(message: Message, context: Context) -> int:
    """Measure how many clients of this run train in one pass on this process' device."""
    config = run_config(context.run_config)
    adapted = _model_with_initial(config, message, None)
    if adapted is None or adapted.device.type == "cpu":
        return 1
    data = client_data(config)
    return cohort_capacity(adapted, data.train, _job(config, data, message, context), config)
