"""The Ray cluster that a process uses: started here, or running already."""

from __future__ import annotations

import logging
import os
import signal
import socket
import tempfile
import threading

import ray

from fedlora.errors import InputError
from fedlora.timeline import phase


@phase("ray", "starting Ray")
def start_ray(address: str | None) -> bool:
    """Start Ray on this machine, or connect to a cluster; return whether this call did it.

    Raises
    ------
    InputError
        If Ray cannot be started or reached.
    """
    if ray.is_initialized():
        _check_connected(address)
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # added to the caller's; Ray would add 15
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    terminated = signal.getsignal(signal.SIGTERM)
    try:
        _check_listening(address)
        ray.init(
            address=address or "local",
            include_dashboard=False if address is None else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except SystemExit:
        raise KeyboardInterrupt from None  # Ray's own handler of SIGTERM, while it connects
    except (OSError, ValueError, RuntimeError) as error:
        if "AF_UNIX path length" in str(error):
            folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
            remedy = "is too long a path for Ray's sockets; set the environment variable RAY_TMPDIR to a short folder"
            raise InputError("RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR", folder, remedy) from None
        remedy = f"Ray cannot be reached or started ({error}); give the HOST:PORT of a running cluster, or leave it out"
        raise InputError("simulation.address", address, remedy) from None
    if callable(terminated) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminated)  # Ray's own prints a stack and aborts
    return True


def _check_connected(address: str | None) -> None:
    """Refuse the address of another cluster than the one to which this process is connected already."""
    there = ray.get_runtime_context().gcs_address
    host_and_port = (address or "").rpartition("//")[2]
    # Ray's own words (auto, local) and its client's ray:// addresses name no cluster in this form.
    if ":" in host_and_port and not (address or "").startswith("ray://") and host_and_port != there:
        remedy = f"this process is connected to the Ray at {there} already; call ray.shutdown() first, or leave it out"
        raise InputError("simulation.address", address, remedy)


def _check_listening(address: str | None) -> None:
    """Raise an OSError if nothing listens at HOST:PORT: Ray would try again for many minutes."""
    host, _, port = (address or "").rpartition("//")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10.0).close()
