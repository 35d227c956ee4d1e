"""How the forecast of a run is told."""

from __future__ import annotations

from fedlora.cli.formats import config_rows
from fedlora.privacy.banded import band_advice
from fedlora.privacy.units import unit_advice
from fedlora.study.estimate import Estimate
from fedlora.study.forecast import Forecast
from fedlora.summaries import format_bytes
from fedlora.timeline import format_seconds


def estimate_lines(found: Estimate) -> list[str]:
    """Return what ``fedlora run --dry-run`` prints."""
    expected, privacy = found.forecast, found.config.privacy
    ways = (expected.initial_bytes, "once"), (expected.downlink_bytes, "down"), (expected.uplink_bytes, "up")
    rows = [
        *config_rows(found.config),
        ("clients", f"{expected.clients:,}"),
        ("rounds", f"{found.config.run.rounds:,}"),
        ("trained", f"{expected.trainable_parameters:,} parameters"),
        ("ranks", rank_list(expected)),
        ("payload", ", ".join(f"{count:,} bytes {way}" for count, way in ways)),
        ("steps", f"{expected.steps:,} of all clients"),
        ("noise", f"multiplier {noise_range(expected)}" if expected.noise_multipliers else "none: no privacy"),
    ]
    if privacy.mode != "none" and privacy.target_epsilon is not None:
        rows.append(("epsilon", f"{privacy.target_epsilon:g}"))
    if found.step is None:
        rows += [("memory", "not known"), ("time", f"not known: {found.obstacle}")]
    else:
        kind = "GPU memory" if found.config.simulation.gpus_per_worker else "memory"
        together = "" if found.step.clients == 1 else f" for {found.step.clients} clients in one pass"
        workers = f"{found.workers} workers" if found.workers > 1 else "1 worker"
        rows.append(("memory", f"about {format_bytes(found.step.memory_bytes)} of {kind} a worker{together}"))
        rows.append(("time", f"about {format_seconds(found.seconds)} with {workers} here, from one measured step"))
    lines = [f"{name:<12}{text}" for name, text in rows if text != "-"]
    return [*lines, *filter(None, (unit_advice(expected.unit_noise), band_advice(expected.band_noise)))]


def noise_range(expected: Forecast) -> str:
    """Return the lowest and highest noise multiplier of the clients; a dash without privacy."""
    noise = sorted({f"{sigma:.4g}" for sigma in expected.noise_multipliers}, key=float)
    return " - ".join(dict.fromkeys((noise[0], noise[-1]))) if noise else "-"


def rank_list(expected: Forecast) -> str:
    """Return the clients' ranks; a dash where clients have none of their own."""
    ranks = sorted(set(expected.ranks), key=lambda rank: (isinstance(rank, str), rank))
    return ", ".join(map(str, ranks)) or "-"
