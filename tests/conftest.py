"""Shared settings: no hub, no telemetry, two threads, the same examples every time."""

import gc
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Before any import of the libraries that read them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    FLWR_TELEMETRY_ENABLED="0",
    FLWR_DISABLE_UPDATE_CHECK="1",
    RAY_USAGE_STATS_ENABLED="0",
    TOKENIZERS_PARALLELISM="false",
)
# Where it is set, each of the many processes that tests start would compile all sources anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Until all is imported: the collector would walk it again and again, and finds nothing in it.
gc.disable()

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


SHARING = {
    "ray_here": (
        "test_runner.py", "test_ray_grid.py", "test_end_to_end.py", "test_notebooks.py", "test_scaling.py",
        "test_faults.py", "test_flexmore_run.py", "test_bad_input.py",
    ),
    "federation": ("test_refused_runs.py", "test_federation.py", "test_refusals.py"),
}  # fmt: skip
"""Files by a fixture with daemons, which work even while no test needs them: one process has all of its files, one
after the other, so that the daemons start once, and they end with the last test that uses them."""

GROUPS = {file: fixture for fixture, files in SHARING.items() for file in files}

last_users = pytest.StashKey[dict[str, str]]()


def group_of(path: str) -> str:
    """Return what is the same for all files that one process has."""
    return GROUPS.get(path.rpartition("/")[2], path)


@pytest.hookimpl(trylast=True)  # by then some are deselected
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the slow files; those that share follow the first of them."""
    place = {name: number for number, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
    first: dict[str, int] = {}
    for number, item in enumerate(items):
        first.setdefault(group_of(item.path.as_posix()), number)
    items.sort(key=lambda item: first[group_of(item.path.as_posix())])
    config.stash[last_users] = {f: item.nodeid for item in items for f in SHARING if f in _fixtures(item)}


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Let the garbage collector walk what tests make, and not what was imported for them."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give files that share to one process."""
    from xdist.scheduler import LoadFileScheduling

    class Sharing(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(super()._split_scope(nodeid))

    return Sharing(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """End daemons behind the last test that uses them."""
    yield
    for fixture, nodeid in item.config.stash[last_users].items():
        if item.nodeid == nodeid:
            for definition in item.session._fixturemanager.getfixturedefs(fixture, item) or ():
                definition.finish(item._request)  # type: ignore[attr-defined]


def _fixtures(item: pytest.Item) -> Sequence[str]:
    return item.fixturenames if isinstance(item, pytest.Function) else ()


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
    """One Ray for all tests that need it: grids take the one that runs. It has more cores on paper than the machine."""
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
