"""The ClientApp: describes a client's data, and trains it, alone or in a cohort."""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict

from fedlora.arrays import Arrays
from fedlora.capacity import Capacity
from fedlora.clients.evaluation import evaluate_own
from fedlora.clients.feedback import encode_with_errors
from fedlora.clients.half import ClientHalf, client_half
from fedlora.clients.held import divide, receive
from fedlora.clients.memory import Memory
from fedlora.clients.participant import (
    Participant,
    attempt_of,
    is_node,
    node_record,
    open_node,
    participant,
    run_of,
    sent_config,
    sent_digest,
)
from fedlora.clients.resources import client_data, forget_data, loaded_model, run_config
from fedlora.clients.secure import answer, check_shared, masked
from fedlora.communication.codecs import Codec, run_codecs
from fedlora.communication.secure_sums import SECURE
from fedlora.corrections import VARIATES
from fedlora.data.sources import count_own, count_own_units
from fedlora.errors import BudgetError, ClientErrorCode, GuardError, InputError, NeedsInitialError, error_code
from fedlora.methods import get_method
from fedlora.models import load_tokenizer, model_config
from fedlora.node.names import NODE_RECORD, labels_digest
from fedlora.node.outward_errors import outward_error
from fedlora.privacy.calibration import round_steps
from fedlora.roles import Roles, roles_of
from fedlora.simulation.cohort_app import CohortClientApp
from fedlora.timeline import phase
from fedlora.training import ClientJob, ClientResult
from fedlora.training.capacity import cohort_capacity
from fedlora.training.fuse import compiles
from fedlora.training.optimizer_state import steps_taken
from fedlora.training.soundness import check_sound
from fedlora.training.step_memory import last_memory

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
    data = client_data(config)
    if client >= len(data.partition):
        reason = f"partition-id = {client}: the run has {len(data.partition)} clients; start fewer nodes"
        return Message(Error(code=ClientErrorCode.INPUT, reason=reason), reply_to=message)
    metrics = MetricRecord({"partition-id": client, "num-examples": data.drawn_from(client, config.privacy)})
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
    plan = node.admit(config, examples, count_own_units(config))
    # A resumed run has made its start already, or a part of it.
    made = {entry[:2]: entry[2] for entry in node.ledger.history(federation)}
    left = [(*step[:2], step[2] - made.get(step[:2], 0)) for step in (plan.start if plan is not None else ())]
    start = [step for step in left if step[2] > 0]
    if (update := node.update_charge(config)) is None:
        node.ledger.check_budget(federation, plan, round_steps(config, examples, 1), start)
    else:
        exchanges = get_method(config.method.name).exchanges(config, 1)
        node.ledger.check_budget(federation, plan, 0, [update] * len(exchanges))
    node.ledger.register(federation, run, label_names, sent_digest(context), config.run.name)
    content = RecordDict({"metrics": MetricRecord({"num-examples": examples})})
    content[NODE_RECORD] = ConfigRecord({"name": node.config.name, "labels": labels_digest(label_names)})
    return Message(content, reply_to=message)


@app.preparation
def prepare(context: Context, known: Mapping[Any, Any]) -> None:
    """Load a simulation's data and model; ``known`` is whether the model is sound, as the server measured it."""
    config = run_config(context.run_config)
    fused = compiles(config, client_data(config))
    adapted = client_half(config).adapted
    if not fused:  # else it is another than the server's
        adapted.independent.update(known)


@app.train_cohort
def train(messages: Sequence[Message], contexts: Sequence[Context]) -> Iterator[Message]:
    """Train the clients of the messages in one pass, then yield their replies.

    A message carries arrays, ``config`` (server-round and learning-rate), and the parts that the client lacks of those
    that it keeps. The method's table (:mod:`fedlora.roles`) says which arrays are trained and sent. A reply carries
    arrays and metrics: num-examples, steps, loss, seconds, worker, and under DP noise-multiplier, sample-rate, epsilon
    and delta.
    """
    if is_node(contexts[0]):
        yield from _train_on_node(messages, contexts)
    else:
        with ExitStack() as held:
            yield from _train(messages, contexts, held)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Answer with the sums of what the client's own test examples add to an evaluation, and with their number."""
    try:
        return evaluate_own(message, context)
    except Exception as error:
        return _error_reply(error, message, context)


@app.query(SECURE)
def secure_sum(message: Message, context: Context) -> Message:
    """Answer an exchange of keys or shares, around a round with a secure sum."""
    try:
        return answer(message, context)
    except Exception as error:
        return _error_reply(error, message, context)


def _train_on_node(messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
    try:
        with ExitStack() as held:
            return list(_train(messages, contexts, held))
    except Exception as error:
        return [_error_reply(error, m, c) for m, c in zip(messages, contexts, strict=True)]


def _train(messages: Sequence[Message], contexts: Sequence[Context], held: ExitStack) -> Iterator[Message]:
    started = time.perf_counter()
    replies: dict[int, Message] = {}
    work: dict[int, _Work] = {}
    for i, (message, context) in enumerate(zip(messages, contexts, strict=True)):
        try:
            work[i] = _prepare(message, context, held)
        except Exception as error:
            replies[i] = _error_reply(error, message, context)
    groups = _groups(work)
    for group in groups:
        half, first = work[group[0]].half, work[group[0]]
        half.prepare(first.settings)
        half.adapted.set_shared(first.frozen)
        try:
            # All clients of a simulation have one config, and a real node is alone.
            table = client_data(first.client.config).train
            results = half.train(table, [work[i].job for i in group], first.client.config)
        except (GuardError, BudgetError, InputError) as error:
            if len(group) > 1:
                raise  # one client's failure must not be the others': they run again one by one
            replies |= {i: _error_reply(error, messages[i], contexts[i]) for i in group}
            continue
        seconds = (time.perf_counter() - started) / len(group)
        for i, result in zip(group, results, strict=True):
            work[i].result, work[i].seconds = result, seconds
            if len(groups) > 1:
                # What leaves may depend on what the model is prepared for.
                replies[i] = _reply(messages[i], work[i])
        started = time.perf_counter()
    for i in range(len(messages)):
        yield replies[i] if i in replies else _reply(messages[i], work[i])


@dataclass
class _Work:
    """What a message asks of a client.

    Attributes
    ----------
    client : Participant
    settings : mapping
        The message's ``config``.
    roles : mapping of str to Role
        The method's table for this exchange.
    half : ClientHalf
    frozen : dict of str to Tensor
        Global arrays that came with the message and are not trained.
    start : dict of str to Tensor
        Those that are trained, as they came or as the method's half made them.
    job : ClientJob
    memory : Memory
    result : ClientResult
    seconds : float
    """

    client: Participant
    settings: Mapping[str, Any]
    roles: Roles
    half: ClientHalf
    frozen: Arrays
    start: Arrays
    job: ClientJob
    memory: Memory
    result: ClientResult | None = None
    seconds: float = 0.0


@phase("client")
def _prepare(message: Message, context: Context, held: ExitStack) -> _Work:
    """Check a message, receive its arrays and make a job of it; nothing of the client's examples is read for it."""
    client = participant(message, context)
    if client.config.server.secure_aggregation:
        check_shared(message, context)
    client.admit(held)
    half = client_half(client.config)
    adapted = half.adapted
    settings: Any = message.content["config"]
    roles = client.exchange.roles
    half.prepare(settings)  # what comes may be of a rank of the client's own
    parts = receive(client, message, roles, adapted)
    if client.plan is not None:
        # Before the ledger is charged, or an example is read.
        check_sound(adapted, client.config, client_data(client.config).train.pad_token_id)
    record = message.content["arrays"]
    assert isinstance(record, ArrayRecord)
    frozen: Arrays = {}
    came: Arrays = {}
    if client.starts:
        arrays = start = half.start(client)
    else:
        came = _decode_shared(record, run_codecs(client.config).down)
        frozen, start = divide(client, came, parts, roles, adapted)
        arrays = half.begin(start)
        start = arrays | start  # what the half adds is where its arrays start from
    job = ClientJob(
        client=client.client,
        server_round=int(settings["server-round"]),
        rows=client.rows,
        arrays=arrays,
        learning_rate=float(settings["learning-rate"]),
        plan=client.plan,
        secret=client.secret,
        on_step=client.on_step,
        exchange=client.number,
        attempt=attempt_of(client.config, message),
    )
    memory = Memory(client, message, parts | came, adapted.head_names)
    return _Work(client, settings, roles, half, frozen, start, memory.recall(job), memory)


def _groups(work: Mapping[int, _Work]) -> list[list[int]]:
    """Divide clients into those that can share a pass.

    They have one learning rate, the same frozen arrays, optimisers that took equally many steps, and whatever else the
    method's half asks for.
    """
    groups: dict[Hashable, list[int]] = {}
    for i, one in work.items():
        # A record that messages share is decoded once, so equal arrays are the same objects.
        frozen = tuple(map(id, one.frozen.values()))
        key = (one.half.group(one.settings), one.job.learning_rate, steps_taken(one.job.state), frozen)
        groups.setdefault(key, []).append(i)
    return list(groups.values())


_last_decoded: list[tuple[ArrayRecord, Arrays]] = []


def _decode_shared(record: ArrayRecord, codec: Codec) -> Arrays:
    """Decode a record once, however many of a round's messages share it."""
    if not _last_decoded or _last_decoded[0][0] is not record:
        _last_decoded[:] = [(record, codec.decode(record))]
    return _last_decoded[0][1]


def _reply(message: Message, work: _Work) -> Message:
    client, result = work.client, work.result
    assert result is not None
    ledger = client.settle(result.steps)
    metrics = MetricRecord(
        {
            "num-examples": result.examples,
            "steps": result.steps,
            "loss": result.loss,
            "seconds": work.seconds,
            # A float, since the bytes of an integer on the wire depend on its size.
            "worker": float(os.getpid()),
        }
    )
    plan = work.job.plan
    if plan is not None and ledger is not None:
        metrics["noise-multiplier"] = plan.noise_multiplier
        metrics["sample-rate"] = plan.sample_rate
        metrics["total-steps"] = ledger.steps
        metrics["epsilon"] = ledger.epsilon()
        metrics["delta"] = ledger.delta
        if work.job.secret:
            # The loss is computed from private data without noise: it stays on a real node.
            del metrics["loss"]
    codecs, secure = run_codecs(client.config), client.config.server.secure_aggregation
    arrays = _leaving(work, work.half.finish(result.arrays), codecs.updates or secure)
    if secure:
        # It would be told of this client alone.
        metrics.pop("loss", None)
        try:
            sent = masked(client, message, arrays)
        except (InputError, GuardError) as error:
            return _error_reply(error, message, client.context)
    elif codecs.feedback:
        sent = encode_with_errors(client, arrays, codecs.up, work.settings, work.memory.coordinates)
    else:
        sent = codecs.up.encode(arrays)
    content = RecordDict({"arrays": sent, "metrics": metrics})
    for key, record in work.half.records().items():
        content[key] = record
    if change := work.memory.keep(work.job, result):
        content[VARIATES] = run_codecs(client.config).once.encode(change)
    return Message(content, reply_to=message)


def _leaving(work: _Work, trained: Arrays, updates: bool) -> Arrays:
    """Divide what was trained by its role: what stays with the client is kept, the rest is returned.

    Parameters
    ----------
    work : _Work
    trained : dict of str to Tensor
    updates : bool
        Whether the wire takes updates alone, whatever the roles say.
    """
    # The client half may have given arrays other names.
    roles = roles_of(trained, work.roles, work.half.adapted.head_names)
    own = {name: array for name, array in trained.items() if roles[name].home}
    if own:
        work.client.keep(own)
    return {
        name: array - work.start[name] if updates or roles[name].up == "update" else array
        for name, array in trained.items()
        if roles[name].up != "never"
    }


def _error_reply(error: Exception, message: Message, context: Context) -> Message:
    if is_node(context):
        # What went wrong may quote the owner's data: the text stays in the node's own log.
        log.error("a message of run %d is refused", message.metadata.run_id, exc_info=error)
        return Message(outward_error(error), reply_to=message)
    code = error_code(error)
    reason = "".join(traceback.format_exception(error)) if code == ClientErrorCode.FAILED else str(error)
    return Message(Error(code=code, reason=reason), reply_to=message)


@app.cohort_capacity
def capacity(message: Message, context: Context, most: int) -> Capacity:
    """Choose how many clients of this run train in one pass on this process' device, and how much of their batches."""
    with ExitStack() as held:
        try:
            work = _prepare(message, context, held)
        except NeedsInitialError:
            return Capacity(1)
        adapted, config = work.half.adapted, work.client.config
        adapted.set_shared(work.frozen)
        return cohort_capacity(adapted, client_data(config).train, work.job, config, most)


@app.chosen_settings
def chosen_settings() -> Mapping[str, Any]:
    """Return the physical batch size and gradient checkpointing of the last training's steps."""
    adapted = loaded_model()
    memory = None if adapted is None else last_memory(adapted)
    return {} if memory is None else memory.settings
