"""Names shared by servers and nodes."""

from __future__ import annotations

import hashlib
import json
import re

NODE_FILE = "node-file"
"""Key of Flower's node config with the path of node.toml; a client without it is simulated."""

NODE_RECORD = "node"
"""Key of the record that only real nodes and their servers exchange."""


def labels_digest(label_names: list[str] | None) -> str:
    """Return a digest of the classes and their order, which server and node compare."""
    return hashlib.sha256(json.dumps(label_names).encode()).hexdigest()


NODE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Pattern of a node's name, which also names a folder."""

_DEVICES = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")


def is_node_name(name: object) -> bool:
    """Whether a value is a valid node name, and a folder name on every system."""
    fits = isinstance(name, str) and len(name) <= 100 and re.fullmatch(NODE_NAME, name) is not None
    return fits and not str(name).endswith((".", "\n")) and not is_device(str(name))


def is_device(name: str) -> bool:
    """Whether Windows would take a file's name for a device, as ``nul`` or ``com1.txt``."""
    return _DEVICES.fullmatch(name) is not None
