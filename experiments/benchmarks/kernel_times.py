"""Where a GPU's time goes: milliseconds by kernel, from PyTorch's profiler."""

from __future__ import annotations

import time
from typing import Any

import torch

KEPT = 40
"""Kernels that are told apart, the longest."""


class KernelTimes:
    """Records all kernels between :meth:`start` and :meth:`stop`; the device has to be a GPU."""

    def __init__(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        self._profiler = torch.profiler.profile(activities=activities)

    def start(self) -> None:
        """Begin."""
        torch.cuda.synchronize()
        self._profiler.start()
        self._began = time.perf_counter()

    def stop(self, steps: float) -> list[dict[str, Any]]:
        """End; return milliseconds a step by kernel: all of them, the idle time, then the longest ones."""
        torch.cuda.synchronize()
        wall = time.perf_counter() - self._began
        self._profiler.stop()
        events = [e for e in self._profiler.key_averages() if e.device_type.name == "CUDA"]
        kernels = [e for e in events if not e.is_user_annotation]  # which spans kernels that are counted themselves
        rows = [
            {"kernel": e.key[:100], "milliseconds": e.self_device_time_total / 1000 / steps, "calls": e.count / steps}
            for e in sorted(kernels, key=lambda e: -e.self_device_time_total)
        ]
        busy = sum(row["milliseconds"] for row in rows)
        idle = {"kernel": "(idle, under the profiler)", "milliseconds": wall * 1000 / steps - busy, "calls": 0}
        return [{"kernel": "(all)", "milliseconds": busy, "calls": sum(r["calls"] for r in rows)}, idle, *rows[:KEPT]]
