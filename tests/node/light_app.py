"""A ClientApp that loads nothing, for tests of what carries its messages."""

from __future__ import annotations

import os
import signal

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query()
def count(message: Message, context: Context) -> Message:
    """Answer with the process and the number of messages that it had."""
    calls = int(context.state["count"]["calls"]) + 1 if "count" in context.state else 1  # type: ignore[index,arg-type]
    context.state["count"] = MetricRecord({"calls": calls})
    return Message(RecordDict({"metrics": MetricRecord({"worker": os.getpid(), "calls": calls})}), reply_to=message)


@app.query("fail")
def fail(message: Message, context: Context) -> Message:
    """Raise what the message says."""
    raise RuntimeError(str(message.content["say"]["text"]))  # type: ignore[index]


@app.query("die")
def die(message: Message, context: Context) -> Message:
    """Die; the first time only, if the message says so."""
    flag = str(message.content["say"]["text"])  # type: ignore[index]
    if flag and os.path.exists(flag):
        return count(message, context)
    if flag:
        open(flag, "w").close()
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError
