"""The ClientApp: describes a client's data, and trains it, alone or in a cohort."""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict

from clients.participant import (
    Participant,
    is_node,
    node_record,
    open_node,
    participant,
    run_of,
    sent_config,
    sent_digest,
)
from clients.resources import (
    client_data,
    client_model,
    forget_data,
    initial_arrays,
    initial_path,
    keep_initial,
    run_config,
)
from fedlora.adapters import AdaptedModel, ExpertModel
from fedlora.communication.meter import INITIAL
from fedlora.communication.wire import Arrays, decode, digest, encode, wire_dtype
from fedlora.data.sources import count_own
from fedlora.errors import BudgetError, ClientErrorCode, GuardError, InputError, NeedsInitialError, error_code
from fedlora.models import load_tokenizer, model_config
from fedlora.node.errors import outward_error
from fedlora.node.names import NODE_RECORD, labels_digest
from fedlora.privacy.calibration import local_steps
from fedlora.simulation.cohort_app import CohortClientApp
from fedlora.training import ClientJob, ClientResult, train_cohort
from fedlora.training.capacity import cohort_capacity
from fedlora.training.expert_start import start_expert
from fedlora.training.soundness import check_sound

log = logging.getLogger("fedlora")

app = CohortClientApp()


@app.query()
def describe(message: Message, context: Context) -> Message:
    """Answer with the client's partition and its number of examples, so that the server can sample by partition.

    A real node answers with its owner's name for it instead of a partition, once its own data and its owner's policy
    fit the run.
    """
    if is_node(context):
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


def _describe_node(message: Message, context: Context) -> Message:
    """Answer from the number of rows and the labels alone: no text is looked at."""
    node = open_node(context)
    node.ledger.count_describe()
    about, run = node_record(message), run_of(message, context)
    federation, label_names = str(about["federation"]), list(map(str, about.get("label-names", []))) or None
    # The owner may have changed the file since the last run.
    forget_data()
    config = node.own_config(sent_config(context), label_names)
    # A model that is not within reach is told before the first round.
    model_config(config)
    load_tokenizer(config)
    examples = count_own(config)
    plan = node.admit(config, examples)
    # A resumed run has made its start already.
    made = {(sigma, rate) for sigma, rate, _ in node.ledger.history(federation)}
    start = [step for step in (plan.start if plan is not None else ()) if step[:2] not in made]
    node.ledger.check_budget(federation, plan, local_steps(config, examples), start)
    node.ledger.register(federation, run, label_names, sent_digest(context))
    content = RecordDict({"metrics": MetricRecord({"num-examples": examples})})
    content[NODE_RECORD] = ConfigRecord({"name": node.config.name, "labels": labels_digest(label_names)})
    return Message(content, reply_to=message)


@app.train_cohort
def train(messages: Sequence[Message], contexts: Sequence[Context]) -> Iterator[Message]:
    """Train the clients of the messages in one pass, then yield their replies.

    A message carries the global arrays and ``config`` (server-round, learning-rate, parameterisation, and the digest of
    the frozen arrays, which come with the first message). A reply carries the trained arrays and metrics: num-examples,
    steps, loss, seconds, worker, and under DP noise-multiplier, sample-rate, epsilon and delta.
    """
    if is_node(contexts[0]):
        yield from _train_on_node(messages, contexts)
    else:
        with ExitStack() as held:
            yield from _train(messages, contexts, held)


def _train_on_node(messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
    try:
        with ExitStack() as held:
            return list(_train(messages, contexts, held))
    except Exception as error:
        return [_error_reply(error, m, c) for m, c in zip(messages, contexts, strict=True)]


def _train(messages: Sequence[Message], contexts: Sequence[Context], held: ExitStack) -> Iterator[Message]:
    started = time.perf_counter()
    replies: dict[int, Message] = {}
    clients: dict[int, Participant] = {}
    jobs: dict[int, ClientJob] = {}
    adapted: AdaptedModel | None = None
    for i, (message, context) in enumerate(zip(messages, contexts, strict=True)):
        try:
            clients[i] = participant(message, context)
            clients[i].admit(held)
            adapted = _model_with_initial(clients[i], message, adapted)
            if adapted is None:
                raise NeedsInitialError
            if clients[i].plan is not None:
                # Before the ledger is charged, or an example is read.
                check_sound(adapted, clients[i].config, client_data(clients[i].config).train.pad_token_id)
            jobs[i] = _job(message, clients[i], adapted)
        except Exception as error:
            replies[i] = _error_reply(error, message, context)
    trained: dict[int, ClientResult] = {}
    seconds: dict[int, float] = {}

    def reply(i: int) -> Message:
        assert adapted is not None
        return _reply(messages[i], clients[i], jobs[i], trained[i], seconds[i], adapted)

    groups = _groups(messages, list(jobs))
    for group in groups:
        assert adapted is not None
        adapted.prepare(_settings(messages[group[0]]))
        # All clients of a simulation have one config, and a real node is alone.
        config = clients[group[0]].config
        try:
            results = train_cohort(adapted, client_data(config).train, [jobs[i] for i in group], config)
        except (GuardError, BudgetError, InputError) as error:
            if len(group) > 1:
                raise  # one client's failure must not be the others': they run again one by one
            replies |= {i: _error_reply(error, messages[i], contexts[i]) for i in group}
            continue
        trained |= zip(group, results, strict=True)
        seconds |= dict.fromkeys(group, (time.perf_counter() - started) / len(group))
        if len(groups) > 1:
            # How an expert leaves depends on the rank that the model is prepared for.
            replies |= {i: reply(i) for i in group}
        started = time.perf_counter()
    for i in range(len(messages)):
        yield replies[i] if i in replies else reply(i)


def _settings(message: Message) -> Any:
    return message.content["config"]


def _groups(messages: Sequence[Message], indices: Sequence[int]) -> list[list[int]]:
    """Divide messages into those that can share a pass: of one rank, where clients differ in it, and learning rate."""
    groups: dict[tuple[str, float], list[int]] = {}
    for i in indices:
        settings = _settings(messages[i])
        groups.setdefault((str(settings.get("rank", "")), float(settings["learning-rate"])), []).append(i)
    return list(groups.values())


def _model_with_initial(client: Participant, message: Message, ready: AdaptedModel | None) -> AdaptedModel | None:
    """Return the model with the run's frozen arrays in it, or None where this host does not hold them.

    Arrays that came with the message are kept once the model took them: a server cannot let a node keep others.
    """
    settings = _settings(message)
    wanted = str(settings.get("initial-digest", ""))
    adapted = ready if ready is not None else client_model(client.config, str(settings["parameterisation"]))
    if not wanted or getattr(adapted, "initial", None) == wanted:
        return adapted
    came = message.content.get(INITIAL)
    arrays = decode(came) if isinstance(came, ArrayRecord) else initial_arrays(wanted)
    if arrays is None:
        initial_arrays.cache_clear()
        return None
    if came is not None and digest(arrays) != wanted:
        raise RuntimeError("the frozen arrays that came differ from the digest that the server announced")
    adapted.initial = None
    adapted.set_shared(arrays)
    adapted.initial = wanted
    path = initial_path(wanted)
    if came is None:
        client.make_room(0, path)
    elif not path.exists():
        client.make_room(sum(array.nbytes for array in arrays.values()))
        keep_initial(arrays, wanted)
    return adapted


def _job(message: Message, client: Participant, adapted: AdaptedModel) -> ClientJob:
    settings = _settings(message)
    record = message.content["arrays"]
    assert isinstance(record, ArrayRecord)
    adapted.prepare(settings)
    if client.starts and isinstance(adapted, ExpertModel):
        client.charge_start()
        sequence = None if client.secret else np.random.SeedSequence([client.config.run.seed, 0, client.client])
        table = client_data(client.config).train
        arrays = start_expert(adapted, table, client.rows, client.plan, sequence)
    else:
        arrays = adapted.begin(_decode_shared(record))
    return ClientJob(
        client=client.client,
        server_round=int(settings["server-round"]),
        rows=client.rows,
        arrays=arrays,
        learning_rate=float(settings["learning-rate"]),
        plan=client.plan,
        secret=client.secret,
        on_step=client.on_step,
    )


_last_decoded: list[tuple[ArrayRecord, Arrays]] = []


def _decode_shared(record: ArrayRecord) -> Arrays:
    """Decode a record once, however many of a round's messages share it."""
    if not _last_decoded or _last_decoded[0][0] is not record:
        _last_decoded[:] = [(record, decode(record))]
    return _last_decoded[0][1]


def _reply(
    message: Message,
    client: Participant,
    job: ClientJob,
    result: ClientResult,
    seconds: float,
    adapted: AdaptedModel,
) -> Message:
    ledger = client.settle(result.steps)
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
    arrays = encode(adapted.finish(result.arrays), wire_dtype(client.config.model.dtype))
    content = RecordDict({"arrays": arrays, "metrics": metrics})
    if isinstance(adapted, ExpertModel):
        content["expert"] = ConfigRecord({"rank": str(adapted.rank), "public-digest": adapted.public_digest})
    return Message(content, reply_to=message)


def _error_reply(error: Exception, message: Message, context: Context) -> Message:
    if is_node(context):
        # What went wrong may quote the owner's data: the text stays in the node's own log.
        log.error("a message of run %d is refused", message.metadata.run_id, exc_info=error)
        return Message(outward_error(error), reply_to=message)
    code = error_code(error)
    reason = "".join(traceback.format_exception(error)) if code == ClientErrorCode.FAILED else str(error)
    return Message(Error(code=code, reason=reason), reply_to=message)


@app.cohort_capacity
def capacity(message: Message, context: Context) -> int:
    """Measure how many clients of this run train in one pass on this process' device."""
    client = participant(message, context)
    adapted = _model_with_initial(client, message, None)
    if adapted is None or adapted.device.type == "cpu":
        return 1
    return cohort_capacity(adapted, client_data(client.config).train, _job(message, client, adapted), client.config)
