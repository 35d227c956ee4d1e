"""The ClientApp that Flower's own runtimes start: it hands a real node's messages to the node's resident worker.

A process is started for every message; this one loads neither torch nor the model. Without ``node-file`` in the node
config the client is a simulated one, and the app itself runs here.
"""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedlora.node.names import NODE_FILE
from fedlora.node.resident import ask

APP = "fedlora.clients.client_app:app"


class NodeApp(ClientApp):
    """A ClientApp that passes on every message."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Return the reply of the node's worker, or of the app in this process."""
        if NODE_FILE in context.node_config:
            return ask(str(context.node_config[NODE_FILE]), APP, message, context)
        from fedlora.clients.client_app import app as here

        return here(message, context)


app = NodeApp()
