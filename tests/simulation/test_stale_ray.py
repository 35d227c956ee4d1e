"""A Ray that died leaves its address behind; a simulation starts its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPT = """
import ray
from fedlora.simulation.ray_grid import start_ray
assert start_ray(None)
ray.shutdown()
"""


def test_a_dead_rays_address_is_not_tried() -> None:
    # Sockets want a short path.
    with tempfile.TemporaryDirectory(prefix="fedlora-", dir="/tmp") as folder:
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
        environment = os.environ | {"RAY_TMPDIR": folder, "RAY_ADDRESS": "127.0.0.1:1"}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
