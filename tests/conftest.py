"""Shared settings: no hub, no telemetry, two threads, the same examples every time."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

# Before any import of the libraries that read them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    FLWR_TELEMETRY_ENABLED="0",
    FLWR_DISABLE_UPDATE_CHECK="1",
    RAY_USAGE_STATS_ENABLED="0",
    TOKENIZERS_PARALLELISM="false",
)

import pytest
import torch
from hypothesis import settings

from tests.bare_runs import bare_runs
from tests.unaligned import unaligned_weights

unaligned_weights.watch()
# With several test processes one thread each: more of them than cores are slower than one.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

settings.register_profile("fedlora", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("fedlora")

TINY_MODELS = {"adapters", "audit", "experts", "strategies", "training"}
"""Folders of tests whose models gain nothing from threads, and lose much where others use the cores."""

SLOW_FILES = (
    "test_soak.py", "test_runner.py", "test_refused_runs.py", "test_federation.py", "test_documented_runs.py",
    "test_end_to_end.py", "test_notebooks.py", "test_ray_grid.py", "test_resident.py", "test_split.py",
    "test_node_oracle.py", "test_flower_runtime.py", "test_codecs.py", "test_methods_conform.py", "test_shadowing.py",
    "test_user_level_run.py", "test_cohort.py", "test_peft_types.py", "test_task_runs.py", "test_page.py",
    "test_ten_clients_on_minilm.py", "test_storage.py",
)  # fmt: skip
"""Files that take longest, in this order: first, so that no process is left with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slow files."""
    place = {name: number for number, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let all tests run as on processors whose products round by address."""
    help_text = "move every weight that is read from safetensors to this address modulo 64: 8, 24 or 40"
    parser.addoption("--weight-offset", type=int, default=0, help=help_text)


def pytest_configure(config: pytest.Config) -> None:
    """Change this process, and all Python processes that start from it."""
    offset = config.getoption("--weight-offset")
    if offset:
        os.environ.update(unaligned_weights.environment(offset))
        unaligned_weights.offset = offset
        unaligned_weights.round_by_address()


@pytest.fixture(autouse=True, scope="module")
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.path.parent.name not in TINY_MODELS:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random numbers of a test do not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for FEDLORA_CACHE with MiniLM and the reviews in it; what runs add to it goes with the session."""
    from fedlora.assets import fetch

    assets = tmp_path_factory.mktemp("cache") / "assets"
    assets.mkdir()
    for name in ("minilm-l6", "rotten-tomatoes"):
        folder = fetch(name)
        (assets / folder.name).symlink_to(folder)
    return assets.parent


@pytest.fixture(scope="module")
def cached(cache: Path) -> Iterator[None]:
    """Runs of a module use that cache, in their own processes too."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("FEDLORA_CACHE", str(cache))
        yield


@pytest.fixture(scope="module")
def bare() -> Iterator[None]:
    """Runs of a module draw no pictures and collect no garbage."""
    with bare_runs():
        yield


@pytest.fixture(scope="session")
def ray_here(cache: Path) -> Iterator[None]:
    """One Ray for the whole session: grids take the one that runs. It has more cores on paper than the machine."""
    import ray

    with pytest.MonkeyPatch.context() as environment:
        # Workers have the environment in which Ray started.
        environment.setenv("FEDLORA_CACHE", str(cache))
        ray.init(
            address="local",
            num_cpus=8,
            num_gpus=0,
            object_store_memory=200 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    yield
    ray.shutdown()
