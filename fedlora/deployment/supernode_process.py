"""The SuperNode's process: Flower's own, but it ends when its connection ends.

When the connection to the SuperLink breaks permanently (for example, a proxy answers instead), Flower's main thread
returns, but another thread keeps the idle process alive. Here the process ends, so that its supervisor notices.
"""

from __future__ import annotations

import os

from flwr.supercore.app_utils import start_parent_process_monitor
from flwr.supernode.cli.flower_supernode import flower_supernode

from fedlora.deployment.processes import PARENT


def main() -> None:
    """Run ``flower-supernode`` with this command line."""
    if PARENT in os.environ:
        start_parent_process_monitor(int(os.environ[PARENT]))
    flower_supernode()
    os._exit(1)


if __name__ == "__main__":
    main()
