"""``fedlora audit`` from config to JSON, and what whole runs with mislabelled canaries prove."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedlora.audit import audit, inputs
from fedlora.audit.inputs import likelihood_ratios
from fedlora.config import load_config
from fedlora.reporting import write_reports
from fedlora.training import dp
from tests.audit.conftest import Configs
from tests.bare_runs import bare_runs
from tests.command import fedlora
from tests.reporting.folders import make_run

MEMORISED = {
    "run": {"rounds": 4},
    "data": {"partition": {"clients": 2}},
    "method": {"name": "fedit", "rank": 16, "target_modules": "all-linear"},
    "client": {"batch_size": 32, "local_steps": 15, "learning_rate": 0.01},
}
"""Without privacy the tiny model learns labels by heart."""


def test_a_run_without_privacy_gives_its_canaries_away(configs: Configs) -> None:
    with bare_runs():
        found = audit(configs("none", **MEMORISED), canaries=100, shadows=3)
    told = found.to_dict()
    assert told["claimed"] == {"epsilon": None, "delta": 1e-5}
    assert found.canaries == 100
    by_name = {attack.name: attack for attack in found.attacks}
    assert max(attack.epsilon for attack in found.attacks) > 0.2
    for name in ("loss, 50%", "membership, 50%"):
        assert by_name[name].counts["right"] > 0.6 * by_name[name].counts["guesses"]
    assert found.checks == []
    assert found.faults == []


def test_a_private_run_does_not(configs: Configs) -> None:
    with bare_runs():
        found = audit(configs("example", 1.0), canaries=60, shadows=2)
    assert {"each sum", "all sums of a trial", "loss, 10%", "membership, 10%"} <= {a.name for a in found.attacks}
    assert found.faults == []
    assert found.lower_bound < 1


def test_whole_clients_are_the_canaries_at_client_level(configs: Configs) -> None:
    config = load_config(configs("client"))
    clients = [np.arange(20 * k, 20 * k + 20) for k in range(12)]
    drawn = inputs._draw(config, clients, 1000)
    assert len(drawn.rows) == 6
    assert all(len(rows) == 20 and rows[0] % 20 == 0 for rows in drawn.rows)
    with bare_runs():
        evidence, count = inputs.attack_inputs(config, 1000, shadows=0)
    assert count == 6
    assert set(evidence) == {"loss, 10%", "loss, 50%"}


def test_canaries_are_mislabelled_and_stay_away_by_their_coin(configs: Configs, tmp_path: Path) -> None:
    from fedlora.data.partition import partition_rows
    from fedlora.data.sources import load_examples

    config = load_config(configs("none"))
    examples = load_examples(config)
    clients = partition_rows(config, examples.train, examples.label_names)
    drawn = inputs._draw(config, clients, 50)
    assert 10 < drawn.held.sum() < 40
    inputs._with_canaries(config, examples, clients, drawn, tmp_path)
    whole, train = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("all", "train")
    )
    assert len(whole) == len(examples.train)
    assert len(train) == len(whole) - (~drawn.held).sum()
    wrong = {int(row) for rows in drawn.rows for row in rows}
    for row, line in enumerate(whole):
        label = examples.label_names[examples.train["label"][row]]
        assert (line["label"] != label) == (row in wrong)
        assert row in clients[int(line["owner"])]


def test_likelihood_ratios_tell_members_by_their_own_shadows() -> None:
    """Canaries are hard or easy: a loss alone says little, beside those of the canary's shadows it says all."""
    rng = np.random.default_rng(0)
    shadows, canaries = 8, 400
    hard = rng.uniform(0.5, 4, canaries)
    coins, held = rng.random((shadows, canaries)) < 0.5, rng.random(canaries) < 0.5
    losses = np.exp(rng.normal(0, 0.05, (shadows, canaries))) * hard * np.where(coins, 0.7, 1)
    mine = np.exp(rng.normal(0, 0.05, canaries)) * hard * np.where(held, 0.7, 1)
    scores = likelihood_ratios(mine, losses, coins)
    assert ((scores > 0) == held).mean() > 0.95
    assert (((-mine) > np.median(-mine)) == held).mean() < 0.75


def test_the_command_prints_json_and_exits_by_the_claim(
    configs: Configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(load_config(configs("example", 3.0)).to_toml())
    output = tmp_path / "audit.json"
    options = ("--canaries", 100, "--no-inputs", "--json")
    done = fedlora("audit", file, *options, "--output", output)
    assert (done.code, done.err) == (0, "")
    told = json.loads(done.out)
    assert told == json.loads(output.read_text())
    assert set(told["claimed"]) == {"epsilon", "delta"}
    assert told["lower_bound"]["confidence"] == 0.95
    assert 0 <= told["lower_bound"]["epsilon"] < told["claimed"]["epsilon"] <= 3
    assert told["canaries"] == 100
    monkeypatch.setattr(dp.StackedDPOptimizer, "add_noise", lambda self: _bare(self))
    broken = fedlora("audit", file, *options)
    assert broken.code == 1
    assert broken.err.startswith("fedlora: the claim does not hold: epsilon is ")
    assert json.loads(broken.out)["holds"] is False


def _bare(optimizer: dp.StackedDPOptimizer) -> None:
    for p in optimizer.params:
        p.grad = p * 0 if p.summed_grad is None else p.summed_grad.clone()


def test_what_cannot_be_audited_is_refused_in_one_line(configs: Configs, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(load_config(configs("none")).to_toml())
    for options, told in (
        (("--no-inputs",), "privacy.mode"),
        (("--canaries", "5"), "--canaries"),
        (("--set", "method.name=fedsa-lora"), "method.name"),
    ):
        done = fedlora("audit", file, *options)
        assert done.code == 2
        assert done.err.count("\n") == 1
        assert told in done.err


def test_a_report_shows_an_audit_beside_the_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlora.reporting.report.draw_all", lambda charts: {"one.png": b"drawn"})
    privacy = {"privacy.mode": "example", "privacy.target_epsilon": 3.0}
    audited = make_run(tmp_path / "runs" / "audited", 1, privacy)
    make_run(tmp_path / "runs" / "other", 2, {**privacy, "run.seed": 1})
    told = {
        "claimed": {"epsilon": 2.99, "delta": 1e-5},
        "lower_bound": {"epsilon": 1.875, "confidence": 0.95, "attack": "each sum"},
        "canaries": 1000,
        "unit": "one example of one client",
        "holds": True,
    }
    (audited / "audit.json").write_text(json.dumps(told))
    ((page, _),) = write_reports([tmp_path / "runs"], tmp_path / "output")
    text = page.read_text()
    assert 'id="audits"' in text
    assert 'data-q="audited_epsilon"' in text
    assert "each sum" in text
    table = (tmp_path / "output" / "report" / "runs.csv").read_text().splitlines()
    place = table[0].split(",").index("audited_epsilon")
    assert sorted(line.split(",")[place] for line in table[1:]) == ["", "1.875"]
    (audited / "audit.json").unlink()
    ((page, _),) = write_reports([tmp_path / "runs"], tmp_path / "without")
    assert 'id="audits"' not in page.read_text()
