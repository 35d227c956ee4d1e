"""The SuperNode's process: Flower's own, which ends when its connection does.

Flower's main thread returns when the connection to the SuperLink breaks for good (a proxy's answer instead of the
SuperLink's), while another thread keeps the process alive without working. Here the process ends, so that its
supervisor sees it.
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
