"""The SuperNode's process: Flower's own, which ends when its connection does.

Flower's main thread returns when the connection to the SuperLink breaks for good (a proxy's answer instead of the
SuperLink's), while another thread keeps the process alive without working. Here the process ends, so that its
supervisor sees it.
"""

from __future__ import annotations

import os

from fedlora.deployment.processes import PARENT
from fedlora.flower import end_with, run_supernode


def main() -> None:
    """Run ``flower-supernode`` with this command line."""
    if PARENT in os.environ:
        end_with(int(os.environ[PARENT]))
    run_supernode()
    os._exit(1)


if __name__ == "__main__":
    main()
