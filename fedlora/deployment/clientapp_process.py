"""The process that handles one message: Flower's ``flwr-clientapp`` with the ClientApp that is installed here.

A SuperLink sends the app along with a run, and Flower runs it, so whoever controls the server could run code on the
owner's machine. A fedlora node neither unpacks nor imports that app. It runs the installed ClientApp.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version

from flwr.app import Context, Error, Message

from fedlora.errors import ClientErrorCode
from fedlora.flower import run_clientapp
from fedlora.node.outward_errors import outward_error

CLIENT_APP = ("fedlora.clients.node_app", "app")


def loader(**_: object) -> Callable[[str, str, str], Callable[[Message, Context], Message]]:
    """Replaces Flower's loader of the sent app. Only the app's version is read."""

    def load(fab_id: str, fab_version: str, fab_hash: str) -> Callable[[Message, Context], Message]:
        installed = version("fedlora")
        if fab_version == installed:
            return installed_app
        reason = f"the run is of fedlora {fab_version}, the node has {installed}"
        return lambda message, context: Message(Error(code=ClientErrorCode.INPUT, reason=reason), reply_to=message)

    return load


def ignore(app: bytes, **_: object) -> None:
    """Replaces Flower's unpacking of the app, whose version could be a path such as ``../``."""


def installed_app(message: Message, context: Context) -> Message:
    """Handle a message with the installed app; only the class of an exception leaves the node, never its text."""
    try:
        module, attribute = CLIENT_APP
        app: Callable[[Message, Context], Message] = getattr(import_module(module), attribute)
        return app(message, context)
    except Exception as error:
        return Message(outward_error(error), reply_to=message)


def main() -> None:
    """Run ``flwr-clientapp`` with this command line."""
    run_clientapp(loader, ignore)


if __name__ == "__main__":
    main()
