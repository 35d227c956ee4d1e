"""Run a config (arguments: config, output) and die by SIGKILL when the second client of round 2 has answered."""

from __future__ import annotations

import os
import signal
import sys

from fedlora import simulate
from fedlora.strategies.federation import Progress

answers = 0


def count(client: int) -> None:
    """Die at the fifth answer: three clients answer in a round."""
    global answers
    answers += 1
    if answers == 5:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    simulate(sys.argv[1], output=sys.argv[2], progress=Progress(on_client=count))
