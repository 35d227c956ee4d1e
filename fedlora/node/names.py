"""Names that servers and nodes agree on."""

from __future__ import annotations

import hashlib
import json

NODE_FILE = "node-file"
"""Key of Flower's node config that holds the path of node.toml; without it a client is simulated."""

NODE_RECORD = "node"
"""Key of the record that real nodes and servers tell each other more in than simulated clients need."""


def labels_digest(label_names: list[str] | None) -> str:
    """Return a digest by which a server and a node see that they mean the same classes in the same order."""
    return hashlib.sha256(json.dumps(label_names).encode()).hexdigest()
