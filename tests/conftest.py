"""Shared settings: no hub, no telemetry, two threads, the same examples every time."""

import os

# Before any import of the libraries that read them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    FLWR_TELEMETRY_ENABLED="0",
    FLWR_DISABLE_UPDATE_CHECK="1",
    RAY_USAGE_STATS_ENABLED="0",
    TOKENIZERS_PARALLELISM="false",
)

import torch
from hypothesis import settings

torch.set_num_threads(2)

settings.register_profile("fedlora", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("fedlora")
