"""``[simulation]``, ``[network]`` and ``[tracking]``: where clients run, over which links, and what logs the run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from fedlora.config.section import Count, Section, Seed
from fedlora.errors import InputError

if TYPE_CHECKING:
    from fedlora.config.schema import Config


class SimulationSection(Section):
    """``[simulation]``: where simulated clients run."""

    workers: Annotated[int, Field(ge=0, le=10_000)] | None = Field(
        default=None,
        description="Number of worker processes; 0 runs the clients in the run's own process, without Ray. By "
        "default as many as fit, or 0 if only one fits on this machine.",
    )
    cpus_per_worker: Annotated[int, Field(ge=1, le=10_000)] = Field(
        default=1, description="Cores, and threads, of a worker.", json_schema_extra={"unit": "cores"}
    )
    gpus_per_worker: Annotated[float, Field(ge=0, le=100)] = Field(
        default=0.0,
        description="Number of GPUs of a worker; with a fraction, such as 0.5, workers share one. Over several GPUs "
        "the base model is split by layers.",
        json_schema_extra={"unit": "GPUs"},
    )
    cohort_size: Count | Literal["auto"] = Field(
        default="auto",
        description="Number of clients that train together in one pass. On a GPU, auto is 1 if one client keeps it "
        "busy, otherwise as many as keep it busy and fit its memory; on the CPU it is 1.",
    )
    compile: bool | Literal["auto"] = Field(
        default="auto",
        description="Fuse the frozen layers on a GPU by torch.compile, which takes up to a minute; auto does so where "
        "a run's training is estimated to take several minutes.",
    )
    address: str | None = Field(
        default=None, description="Address of a running Ray cluster; a local one is started by default."
    )

    def check(self, config: Config) -> None:
        """Several GPUs are whole ones."""
        gpus = self.gpus_per_worker
        if gpus > 1 and gpus != int(gpus):
            raise InputError("simulation.gpus_per_worker", gpus, "several GPUs are whole ones; round it")


class NetworkSection(Section):
    """``[network]``: simulated links that turn the measured bytes into seconds."""

    profile: Literal["none", "lte", "broadband", "datacenter"] = Field(
        default="none", description="Kind of links between clients and server."
    )
    seed: Seed | None = Field(default=None, description="Seed of the clients' links; run.seed by default.")
    download_mbps: Annotated[float, Field(ge=1e-3, le=1e6)] | None = Field(
        default=None,
        description="Median rate to a client, in 10^6 bit/s; the profile's by default.",
        json_schema_extra={"unit": "10^6 bit/s"},
    )
    upload_mbps: Annotated[float, Field(ge=1e-3, le=1e6)] | None = Field(
        default=None,
        description="Median rate from a client, in 10^6 bit/s; the profile's by default.",
        json_schema_extra={"unit": "10^6 bit/s"},
    )
    latency_ms: Annotated[float, Field(ge=0, le=1e6)] | None = Field(
        default=None,
        description="Median round-trip latency, in milliseconds; the profile's by default.",
        json_schema_extra={"unit": "milliseconds"},
    )

    def unused(self, config: Config) -> Iterator[tuple[str, str]]:
        """Without a profile there are no links."""
        if self.profile == "none":
            yield "seed download_mbps upload_mbps latency_ms", "network.profile is none"


class TrackingSection(Section):
    """``[tracking]``: loggers beside the run folder."""

    tensorboard: bool = Field(default=False, description="Log to TensorBoard, into the run folder.")
    wandb: bool = Field(
        default=False, description="Log to Weights & Biases; with WANDB_MODE=offline only into the run folder."
    )
    mlflow: bool = Field(default=False, description="Log to MLflow, to the server or folder in MLFLOW_TRACKING_URI.")
    project: str = Field(default="fedlora", description="Project in Weights & Biases, and experiment in MLflow.")

    def unused(self, config: Config) -> Iterator[tuple[str, str]]:
        """TensorBoard has no projects."""
        if not (self.wandb or self.mlflow):
            yield "project", "neither tracking.wandb nor tracking.mlflow is set"
