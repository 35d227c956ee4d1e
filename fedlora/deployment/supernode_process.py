"""The SuperNode's process: Flower's own, but it ends when its connection ends.

When the connection to the SuperLink breaks permanently (for example, a proxy answers instead), Flower's main thread
returns, but another thread keeps the idle process alive. Here the process ends, so that its supervisor notices.
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
