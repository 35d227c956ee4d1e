"""The ClientApp: describes a client's data, and trains it, alone or in a cohort."""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections.abc import Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict

from clients.resources import client_data, client_model, forget_data, initial_arrays, keep_initial, run_config
from fedlora.adapters import AdaptedModel
from fedlora.communication.meter import INITIAL
from fedlora.communication.wire import Arrays, decode, encode, wire_dtype
from fedlora.config import Config
from fedlora.errors import (
    BudgetError,
    ClientErrorCode,
    GuardError,
    InputError,
    NeedsInitialError,
    StaleError,
    error_code,
)
from fedlora.node.errors import outward_error
from fedlora.node.ledger import Charge
from fedlora.node.names import NODE_FILE, NODE_RECORD, labels_digest
from fedlora.node.node import Node
from fedlora.privacy import Ledger, PrivacyPlan, plan_privacy
from fedlora.privacy.calibration import local_steps
from fedlora.simulation.cohort_app import CohortClientApp
from fedlora.training import ClientJob, ClientResult, train_cohort
from fedlora.training.capacity import cohort_capacity

log = logging.getLogger("fedlora")

app = CohortClientApp()


@app.query()
def describe(message: Message, context: Context) -> Message:
    """Answer with the client's partition and its number of examples, so that the server can sample by partition.

    A real node answers with its owner's name for it instead of a partition, once its own data and its owner's policy
    fit the run.
    """
    if NODE_FILE in context.node_config:
        try:
            return _describe_node(message, context)
        except Exception as error:
            return _error_reply(error, message, context)
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
    if NODE_FILE in contexts[0].node_config:
        return [_train_on_node(m, c) for m, c in zip(messages, contexts, strict=True)]
    started = time.perf_counter()
    config = run_config(contexts[0].run_config)
    replies: dict[int, Message] = {}
    jobs: dict[int, ClientJob] = {}
    adapted: AdaptedModel | None = None
    for i, (message, context) in enumerate(zip(messages, contexts, strict=True)):
        try:
            adapted = _model_with_initial(config, message, adapted)
            if adapted is None:
                raise NeedsInitialError
            jobs[i] = _job(config, message, context)
        except Exception as error:
            replies[i] = _error_reply(error, message, context)
    if jobs and adapted is not None:
        try:
            results = train_cohort(adapted, client_data(config).train, list(jobs.values()), config)
        except (GuardError, BudgetError, InputError) as error:
            return [_error_reply(error, m, c) for m, c in zip(messages, contexts, strict=True)]
        seconds = (time.perf_counter() - started) / len(jobs)
        for (i, job), result in zip(jobs.items(), results, strict=True):
            replies[i] = _reply(config, messages[i], contexts[i], job, result, seconds)
    return [replies[i] for i in range(len(messages))]


def _describe_node(message: Message, context: Context) -> Message:
    node, about = Node.open(str(context.node_config[NODE_FILE])), _about(message)
    given, federation, run = about.get("label-names"), str(about["federation"]), _run(message, context)
    label_names = list(map(str, given)) if isinstance(given, list) else None
    forget_data()
    config = node.own_config(run_config(context.run_config), label_names)
    examples = len(client_data(config).train)
    node.ledger.check_budget(federation, node.admit(config, examples), local_steps(config, examples))
    node.ledger.register(federation, run, label_names)
    content: dict[str, Any] = {
        "metrics": MetricRecord({"num-examples": examples}),
        NODE_RECORD: ConfigRecord({"name": node.config.name, "labels": labels_digest(label_names)}),
    }
    return Message(RecordDict(content), reply_to=message)


def _train_on_node(message: Message, context: Context) -> Message:
    """Train on the owner's own file, within the owner's policy and ledger."""
    started = time.perf_counter()
    try:
        node, about, run = Node.open(str(context.node_config[NODE_FILE])), _about(message), _run(message, context)
        federation, server_round = str(about["federation"]), int(_settings(message)["server-round"])
        config = node.own_config(run_config(context.run_config), node.ledger.label_names(federation, run))
        rows = client_data(config).partition[0]
        plan, steps = node.admit(config, len(rows)), local_steps(config, len(rows))
        with node.ledger.round(federation, run, server_round, plan, steps) as charge:
            adapted = _model_with_initial(config, message, None)
            if adapted is None:
                raise NeedsInitialError
            job = _make_job(message, int(about["client"]), rows, plan, secret=plan is not None, charge=charge)
            (result,) = train_cohort(adapted, client_data(config).train, [job], config)
            charge.check_taken(result.steps)
            ledger = None if plan is None else node.ledger.of_federation(federation, plan)
        return _result_reply(config, message, job, result, time.perf_counter() - started, ledger)
    except Exception as error:
        return _error_reply(error, message, context)


def _about(message: Message) -> Any:
    """Return what a server says to a real node beside the config of the round."""
    if NODE_RECORD not in message.content:
        raise StaleError("the message says nothing of its federation")
    return message.content[NODE_RECORD]


def _run(message: Message, context: Context) -> str:
    """Return the SuperLink's id of the run; the message must be of the run that it came with, and not too old."""
    meta = message.metadata
    if meta.run_id != context.run_id:
        raise StaleError(f"a message of run {meta.run_id} came in run {context.run_id}")
    if time.time() > meta.created_at + meta.ttl:
        raise StaleError(f"the message waited longer than its {meta.ttl:.0f} s")
    return str(context.run_id)


def _settings(message: Message) -> Any:
    return message.content["config"]


def _model_with_initial(config: Config, message: Message, ready: AdaptedModel | None) -> AdaptedModel | None:
    """Return the model with the run's frozen arrays in it, or None where this host does not hold them."""
    settings = _settings(message)
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


def _job(config: Config, message: Message, context: Context) -> ClientJob:
    client = int(context.node_config["partition-id"])
    rows = client_data(config).partition[client]
    plan = plan_privacy(config, len(rows)) if config.privacy.mode == "example" else None
    if plan is not None:
        _ledger(context, plan).check(plan, local_steps(config, len(rows)))
    # Only the simulation's own grid says so; a run's config, which a server sends, cannot.
    secret = plan is not None and not context.node_config.get("simulated", False)
    return _make_job(message, client, rows, plan, secret=secret)


def _make_job(
    message: Message,
    client: int,
    rows: np.ndarray,
    plan: PrivacyPlan | None,
    *,
    secret: bool,
    charge: Charge | None = None,
) -> ClientJob:
    settings, arrays = _settings(message), message.content["arrays"]
    assert isinstance(arrays, ArrayRecord)
    return ClientJob(
        client=client,
        server_round=int(settings["server-round"]),
        rows=rows,
        arrays=_decode_shared(arrays),
        learning_rate=float(settings["learning-rate"]),
        plan=plan,
        secret=secret,
        on_step=None if charge is None else charge.step,
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
    ledger = None
    if job.plan is not None:
        ledger = _ledger(context, job.plan)
        ledger.charge(job.plan, result.steps)
        context.state["ledger"] = ConfigRecord(ledger.to_record())
    return _result_reply(config, message, job, result, seconds, ledger)


def _result_reply(
    config: Config, message: Message, job: ClientJob, result: ClientResult, seconds: float, ledger: Ledger | None
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
    if job.plan is not None and ledger is not None:
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


def _error_reply(error: Exception, message: Message, context: Context) -> Message:
    if NODE_FILE in context.node_config:
        # What went wrong may quote the owner's data: the text stays in the node's own log.
        log.error("message of run %s refused", message.metadata.run_id, exc_info=error)
        return Message(outward_error(error), reply_to=message)
    code = error_code(error)
    reason = "".join(traceback.format_exception(error)) if code == ClientErrorCode.FAILED else str(error)
    return Message(Error(code=code, reason=reason), reply_to=message)


@app.cohort_capacity
def capacity(message: Message, context: Context) -> int:
    """Measure how many clients of this run train in one pass on this process' device."""
    config = run_config(context.run_config)
    adapted = _model_with_initial(config, message, None)
    if adapted is None or adapted.device.type == "cpu":
        return 1
    return cohort_capacity(adapted, client_data(config).train, _job(config, message, context), config)
