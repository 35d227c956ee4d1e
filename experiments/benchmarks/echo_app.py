"""Clients that send back what they got.

They have a module of their own because Flower pickles an app that is defined in ``__main__`` by value, at every
message.
"""

from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

echo_app = ClientApp()


@echo_app.train("decode")
def decode(message: Message, context: Context) -> Message:
    """Decode the arrays and encode them anew, as every client that trains has to."""
    arrays = message.content.array_records["arrays"].to_numpy_ndarrays()
    return Message(RecordDict({"arrays": ArrayRecord(arrays)}), reply_to=message)


@echo_app.train("forward")
def forward(message: Message, context: Context) -> Message:
    """Return the serialised arrays unopened: the transport alone."""
    return Message(RecordDict({"arrays": message.content.array_records["arrays"]}), reply_to=message)
