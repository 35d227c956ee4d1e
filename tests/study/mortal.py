"""A runner that dies, for tests; in a module of its own, which the processes of Ray import."""

from __future__ import annotations

import os
from typing import Any

from fedlora.study.run_processes import Runner


class Mortal(Runner):
    """A runner whose process ends in a run of the name ``dies``."""

    def run(self, config: str, study: str, folder: str) -> dict[str, Any]:
        """Execute a run, or end."""
        if folder.endswith("dies"):
            os._exit(3)
        return super().run(config, study, folder)
