"""The owner's ledger: over runs and restarts, charged before it is spent, whole after any crash."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import sqlite3
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.errors import BudgetError, GuardError, InputError, StaleError
from fedlora.node.config import PolicySection
from fedlora.node.node_ledger import NodeLedger
from fedlora.privacy import PrivacyPlan
from fedlora.privacy.calibration import spent_epsilon

POLICY = PolicySection(max_epsilon=3.0, delta=1e-4)
OPEN = PolicySection(allow_non_private=True)


def plan(sigma: float = 1.0, rate: float = 0.1, ceiling: float | None = None) -> PrivacyPlan:
    return PrivacyPlan(rate, sigma, 1.0, 4.0, 100, 1e-5, "rdp", ceiling)


def take(ledger: NodeLedger, run: str, server_round: int, steps: int, with_plan: PrivacyPlan | None) -> None:
    """Register a run (of a federation of its own) and take a round of steps."""
    ledger.register(f"f-{run}", run, None)
    with ledger.round(f"f-{run}", run, server_round, with_plan, steps) as charge:
        for _ in range(steps):
            charge.step()
        charge.check_taken(steps)


@settings(max_examples=8)
@given(
    st.lists(st.tuples(st.sampled_from([0.8, 1.0, 2.0]), st.sampled_from([0.05, 0.2]), st.integers(1, 3)), max_size=3)
)
def test_epsilon_is_that_of_all_steps_of_all_runs(rounds: list[tuple[float, float, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for number, (sigma, rate, steps) in enumerate(rounds):
            # A new object a round: what counts is on the disk.
            take(NodeLedger(Path(folder), PolicySection(max_epsilon=1e6)), str(number), 1, steps, plan(sigma, rate))
        ledger = NodeLedger(Path(folder), POLICY)
        assert ledger.epsilon() == pytest.approx(spent_epsilon("rdp", 1e-4, tuple(rounds)), rel=1e-9)
        assert ledger.steps() == sum(steps for _, _, steps in rounds)
        assert ledger.left() == pytest.approx(max(0.0, 3.0 - ledger.epsilon()))


def test_the_owners_ceiling_holds_over_runs_and_says_how_much_is_left(tmp_path: Path) -> None:
    ledger = NodeLedger(tmp_path, POLICY)
    taken = 0
    while spent_epsilon("rdp", 1e-4, ((2.0, 0.1, taken + 20),)) <= 3.0:
        take(ledger, str(taken), 1, 20, plan(sigma=2.0))
        taken += 20
    assert taken > 20
    with pytest.raises(BudgetError) as refused:
        take(ledger, "beyond", 1, 20, plan(sigma=2.0))
    assert ledger.steps() == taken
    assert ledger.epsilon() <= 3.0
    assert refused.value.left == pytest.approx(3.0 - ledger.epsilon())
    # A smaller request still fits; a restart changes nothing.
    left = NodeLedger(tmp_path, POLICY).left()
    assert left == refused.value.left
    take(ledger, "small", 1, 1, plan(sigma=50.0))


def test_a_servers_own_ceiling_holds_for_its_federation(tmp_path: Path) -> None:
    ledger = NodeLedger(tmp_path, PolicySection(max_epsilon=100.0))
    limit = spent_epsilon("rdp", 1e-5, ((1.0, 0.1, 10),))
    take(ledger, "a", 1, 10, plan(ceiling=limit))
    with pytest.raises(BudgetError):
        take(ledger, "a", 2, 1, plan(ceiling=limit))
    take(ledger, "b", 1, 10, plan(ceiling=limit))


def test_a_round_is_taken_once_and_in_order(tmp_path: Path) -> None:
    ledger = NodeLedger(tmp_path, POLICY)
    take(ledger, "a", 2, 3, plan())
    for server_round in (1, 2):
        with pytest.raises(StaleError):
            take(NodeLedger(tmp_path, POLICY), "a", server_round, 3, plan())
    assert ledger.steps() == 3
    # One that was refused, or that ended before its first step, may come again.
    with ledger.round("f-a", "a", 3, plan(), 2):
        pass
    take(ledger, "a", 3, 2, plan())
    assert ledger.steps() == 5


def test_a_run_that_was_resumed_ends_the_one_before(tmp_path: Path) -> None:
    ledger = NodeLedger(tmp_path, POLICY)
    ledger.register("f", "1", ["a", "b"])
    ledger.register("f", "2", ["a", "b"])
    assert ledger.label_names("f", "2") == ["a", "b"]
    for attempt in (lambda: ledger.label_names("f", "1"), lambda: ledger.register("f", "1", None)):
        with pytest.raises(StaleError):
            attempt()
    with pytest.raises(StaleError):
        ledger.label_names("f", "unknown")
    with pytest.raises(StaleError):
        ledger.register("other", "2", None)  # a run belongs to one federation


def test_a_run_keeps_the_config_and_the_classes_that_it_was_described_with(tmp_path: Path) -> None:
    ledger = NodeLedger(tmp_path, POLICY)
    for _ in range(2):  # a node that was away is asked again
        ledger.register("f", "1", ["a"], "digest")
    ledger.check_config("1", "digest")
    for attempt in (
        lambda: ledger.check_config("1", "other"),
        lambda: ledger.check_config("2", "digest"),
        lambda: ledger.register("f", "1", ["a"], "other"),
        lambda: ledger.register("f", "1", ["b"], "digest"),
    ):
        with pytest.raises(StaleError):
            attempt()
    assert ledger.label_names("f", "1") == ["a"]
    ledger.check_config("1", "digest")


def test_a_ledger_from_before_configs_were_kept_goes_on(tmp_path: Path) -> None:
    take(NodeLedger(tmp_path, POLICY), "1", 1, 2, plan(sigma=2.0))
    with sqlite3.connect(tmp_path / "ledger.sqlite") as database:
        database.execute("ALTER TABLE runs DROP COLUMN config")
        database.execute("DROP TABLE describes")
    database.close()
    ledger = NodeLedger(tmp_path, POLICY)
    assert ledger.steps() == 2
    with pytest.raises(StaleError):
        ledger.check_config("1", "digest")
    ledger.register("f-1", "1", None, "digest")  # as whenever the node comes back
    ledger.check_config("1", "digest")


def test_no_step_beyond_those_admitted(tmp_path: Path) -> None:
    ledger = NodeLedger(tmp_path, POLICY)
    ledger.register("f", "1", None)
    with ledger.round("f", "1", 1, plan(), 2, also=[(5.0, 0.5, 1)]) as charge:
        charge.take(5.0, 0.5)
        for wrong in ((5.0, 0.5), (4.0, 0.5)):
            with pytest.raises(GuardError):
                charge.take(*wrong)
        charge.step()
        with pytest.raises(GuardError, match="took 2 steps, and 1 were charged"):
            charge.check_taken(2)
        charge.step()
        with pytest.raises(GuardError):
            charge.step()
    assert ledger.history() == [(1.0, 0.1, 2), (5.0, 0.5, 1)]


def test_what_comes_beside_the_steps_counts_against_the_ceiling(tmp_path: Path) -> None:
    ledger = NodeLedger(tmp_path, POLICY)
    ledger.check_budget("f", plan(), 1)
    with pytest.raises(BudgetError):
        ledger.check_budget("f", plan(), 1, also=[(0.3, 1.0, 1)])


def test_steps_without_noise_are_counted_as_such(tmp_path: Path) -> None:
    ledger = NodeLedger(tmp_path, OPEN)
    take(ledger, "a", 1, 2, None)
    assert ledger.history() == [(0.0, 1.0, 2)]
    assert ledger.left() is None
    strict = NodeLedger(tmp_path, POLICY)
    assert strict.left() == 0.0
    with pytest.raises(BudgetError):
        take(strict, "b", 1, 1, plan())


def _train(folder: Path, steps: int, begun: int, pipe: object) -> None:
    """Take steps, and die by SIGKILL inside one."""
    ledger = NodeLedger(folder, PolicySection(max_epsilon=1e6))
    ledger.register("f", "1", None)
    with ledger.round("f", "1", 1, plan(), steps) as charge:
        for number in range(steps):
            charge.step()
            if number + 1 == begun:
                os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("begun", [1, 2, 5])
def test_a_process_that_is_killed_has_charged_the_steps_that_it_began(tmp_path: Path, begun: int) -> None:
    process = multiprocessing.get_context("fork").Process(target=_train, args=(tmp_path, 5, begun, None))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    # All of them are in the one file that is backed up and moved.
    for beside in tmp_path.glob("ledger.sqlite-*"):
        beside.unlink()
    ledger = NodeLedger(tmp_path, PolicySection(max_epsilon=1e6))
    assert ledger.steps() == begun
    # The lock fell with the process; the round does not come again.
    with pytest.raises(StaleError), ledger.round("f", "1", 1, plan(), 5):
        pass
    take(ledger, "2", 1, 1, plan())


def _kill_at_random(folder: Path, steps: int) -> None:
    ledger = NodeLedger(folder, PolicySection(max_epsilon=1e6))
    ledger.register("f", "1", None)
    with ledger.round("f", "1", 1, plan(), steps) as charge, (folder / "begun").open("ab", buffering=0) as begun:
        for _ in range(steps):
            charge.step()
            begun.write(b".")


def test_a_kill_at_any_moment_never_undercharges(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        process = context.Process(target=_kill_at_random, args=(folder, 100_000))
        process.start()
        while not (folder / "begun").exists() or (folder / "begun").stat().st_size < 1 + 7 * attempt:
            pass
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        begun = (folder / "begun").stat().st_size
        # The kill may fall between the charge and the step's first byte; that step never read an example.
        assert begun <= NodeLedger(folder, POLICY).steps() <= begun + 1


def _one_round(folder: Path, run: str) -> None:
    take(NodeLedger(folder, PolicySection(max_epsilon=1e6)), run, 1, 10, plan())


def test_processes_at_once_lose_no_step(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_one_round, args=(tmp_path, str(number))) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert NodeLedger(tmp_path, POLICY).steps() == 40


def test_a_damaged_ledger_stops_the_node(tmp_path: Path) -> None:
    take(NodeLedger(tmp_path, POLICY), "a", 1, 3, plan())
    (tmp_path / "ledger.sqlite").write_bytes(b"x" * 5000)
    with pytest.raises(InputError, match=r"state\.directory = .*owner's ledger"):
        NodeLedger(tmp_path, POLICY)


def test_an_emptied_ledger_is_not_a_new_one(tmp_path: Path) -> None:
    """A copy on a full disk, or a file system after a power cut, leaves a file without content."""
    take(NodeLedger(tmp_path, POLICY), "a", 1, 3, plan())
    (tmp_path / "ledger.sqlite").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(InputError, match=r"state\.directory = .*restore a copy"):
            NodeLedger(tmp_path, POLICY)
    # One that was stopped while it was made never became the ledger.
    (tmp_path / "ledger.sqlite").rename(tmp_path / "ledger.new")
    assert NodeLedger(tmp_path, POLICY).steps() == 0


def _take_on_a_full_disk(folder: Path) -> None:
    ledger = NodeLedger(folder, PolicySection(max_epsilon=1e6))
    ledger.register("f", "1", None)
    taken = 0
    try:
        with ledger.round("f", "1", 1, plan(), 10) as charge:
            charge.step()
            taken = 1
            # From here on no file grows.
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            charge.step()
            taken = 2
    except InputError as error:
        assert error.field == "state.directory"  # noqa: PT017
        os._exit(taken)
    os._exit(9)


def test_on_a_full_disk_no_step_is_taken_that_is_not_charged(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_take_on_a_full_disk, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == NodeLedger(tmp_path, POLICY).steps() == 1


def test_a_ledger_that_cannot_be_written_stops_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take(NodeLedger(tmp_path, POLICY), "a", 1, 3, plan())
    connect = sqlite3.connect

    def read_only(path: Path, **options: Any) -> sqlite3.Connection:
        return connect(f"file:{path}?mode=ro", uri=True, **options)

    monkeypatch.setattr(sqlite3, "connect", read_only)
    with pytest.raises(InputError, match=r"readonly database.*owner's ledger"):
        take(NodeLedger(tmp_path, POLICY), "a", 2, 3, plan())


def test_a_copy_is_whole_whenever_it_is_made(tmp_path: Path) -> None:
    ledger, copy = NodeLedger(tmp_path / "state", POLICY), tmp_path / "copy" / "ledger.sqlite"
    copy.parent.mkdir()
    ledger.register("f", "1", None)
    with ledger.round("f", "1", 1, plan(), 3) as charge:
        charge.step()
        ledger.back_up(copy)  # the round goes on
        charge.step()
    assert NodeLedger(copy.parent, POLICY).steps() == 1
    assert NodeLedger(tmp_path / "state", POLICY).steps() == 2
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    with pytest.raises(InputError, match=r"FILE = .*exists already"):
        ledger.back_up(copy)
    with pytest.raises(InputError, match=r"FILE = .*cannot hold a copy"):
        ledger.back_up(tmp_path / "nowhere" / "ledger.sqlite")
    assert sorted(path.name for path in copy.parent.iterdir() if path.name.startswith(".")) == []


def test_the_ledger_is_its_owners_alone(tmp_path: Path) -> None:
    take(NodeLedger(tmp_path / "new", POLICY), "a", 1, 3, plan())
    paths = [tmp_path / "new", *(tmp_path / "new").iterdir()]
    assert {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in paths if path.stat().st_mode & 0o077} == {}


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"state\.directory"):
        NodeLedger(tmp_path / "file" / "state", POLICY)


CHANGES = {
    "a row gone": "DELETE FROM charges WHERE number = 2",
    "fewer steps": "UPDATE charges SET steps = 1 WHERE number = 1",
    "more noise": "UPDATE charges SET noise_multiplier = 50.0 WHERE number = 1",
    "a round again": "UPDATE runs SET last_round = 0",
    "a run gone": "DELETE FROM runs WHERE number = 1",
    "no seal": "DELETE FROM seals",
    "no table": "DROP TABLE seals",
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_trained_on_a_ledger_that_lost_or_changed_a_row(tmp_path: Path, change: str) -> None:
    ledger = NodeLedger(tmp_path, POLICY)
    for number in (1, 2):
        take(ledger, str(number), 1, 3, plan(sigma=2.0))
    database = sqlite3.connect(tmp_path / "ledger.sqlite")
    database.execute(CHANGES[change])
    database.commit()
    database.close()
    # A node that runs notices it before its next round, one that starts at once.
    with pytest.raises(InputError, match=r"^state\.directory"), ledger.round("f-2", "2", 2, plan(sigma=2.0), 1):
        pytest.fail("a round was admitted")
    with pytest.raises(InputError, match=r"^state.directory = .*ledger.sqlite': (is damaged|has lost).*restore a copy"):
        NodeLedger(tmp_path, POLICY)


def test_a_damaged_ledger_is_what_it_was_or_one_line(tmp_path: Path) -> None:
    """Bits that flip and files that are cut, at many places: never fewer steps than were taken."""
    whole = tmp_path / "whole"
    ledger = NodeLedger(whole, POLICY)
    for number in range(3):
        take(ledger, str(number), 1, 2, plan(sigma=2.0))
    good, history = (whole / "ledger.sqlite").read_bytes(), ledger.history()
    used = [place for place, byte in enumerate(good) if byte]  # a flip in an empty page changes nothing
    refused = 0
    for seed in range(120):
        rng = random.Random(seed)
        folder = tmp_path / str(seed)
        folder.mkdir()
        place = rng.choice(used)
        flipped = good[:place] + bytes([good[place] ^ (1 << rng.randrange(8))]) + good[place + 1 :]
        (folder / "ledger.sqlite").write_bytes(flipped if seed % 4 else good[:place])
        try:
            assert NodeLedger(folder, POLICY).history() == history
        except InputError as error:
            refused += len(str(error).splitlines()) == 1
    assert 60 < refused < 120
