"""Names that servers and nodes agree on."""

from __future__ import annotations

import hashlib
import json
import re

NODE_FILE = "node-file"
"""Key of Flower's node config that holds the path of node.toml; without it a client is simulated."""

NODE_RECORD = "node"
"""Key of the record that real nodes and servers tell each other more in than simulated clients need."""


def labels_digest(label_names: list[str] | None) -> str:
    """Return a digest by which a server and a node see that they mean the same classes in the same order."""
    return hashlib.sha256(json.dumps(label_names).encode()).hexdigest()


NODE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""What a node may be called: its name becomes that of a folder."""

_DEVICES = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")


def is_node_name(name: object) -> bool:
    """Whether something is a name that node.toml takes, and a folder's on every system."""
    fits = isinstance(name, str) and len(name) <= 100 and re.fullmatch(NODE_NAME, name) is not None
    return fits and not str(name).endswith((".", "\n")) and not is_device(str(name))


def is_device(name: str) -> bool:
    """Whether Windows would take a file's name for a device, as ``nul`` or ``com1.txt``."""
    return _DEVICES.fullmatch(name) is not None
