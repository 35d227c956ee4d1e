"""The model of the round that validation prefers is kept, can be exported, and can end a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fedlora
from fedlora import InputError, RunResult, simulate
from fedlora.adapters import AdaptedModel
from fedlora.data.tokens import FederatedData
from fedlora.results.load import export_run
from fedlora.results.privacy_spent import explain_privacy
from fedlora.strategies.base import FederatedStrategy
from fedlora.strategies.callbacks import Progress
from tests.command import fedlora as fedlora_command
from tests.small_runs import World, forget, logits, world

LOSSES = (5.0, 3.0, 4.0, 3.0, 2.0)
"""Perplexity on the validation examples by round: the second is the best of four, and is not beaten twice."""


class Validated:
    """Runs whose validation scores are given, and what the server's model answered after every round."""

    def __init__(self, here: World, patch: pytest.MonkeyPatch) -> None:
        self.here, self.logits, self.batch = here, dict[int, torch.Tensor](), dict[str, torch.Tensor]()
        self._count = 0
        evaluate = FederatedStrategy.evaluate

        def scored(
            strategy: FederatedStrategy, adapted: AdaptedModel, data: FederatedData, server_round: int
        ) -> dict[str, Any]:
            metrics = evaluate(strategy, adapted, data, server_round)
            if data.validation is not None and server_round:
                metrics["validation"] = {"perplexity": LOSSES[server_round - 1]}
            if adapted.adapters:
                self.batch = data.test.batch(np.arange(len(data.test)))
                self.logits[server_round] = logits(adapted, self.batch)[self.batch["attention_mask"].bool()]
            return metrics

        patch.setattr(FederatedStrategy, "evaluate", scored)

    def run(self, method: str = "ffa-lora", /, stop: int = 0, **sections: dict[str, Any]) -> RunResult:
        """Run four rounds by default; with ``stop``, stop after that round and resume."""
        self._count += 1
        output = self.here.folder / f"run-{self._count}"
        validation = {"validation": str(self.here.folder / "test.jsonl")}
        sections = {"run": {"rounds": 4, "seed": 19}, "data": validation, **sections}
        content = self.here.content(method, "llama", **sections)

        def end(line: dict[str, Any]) -> None:
            if line["round"] == stop:
                raise KeyboardInterrupt

        forget()
        if stop:
            with pytest.raises(KeyboardInterrupt):
                simulate(content, output=output, progress=Progress(on_round=end))
            forget()
        return simulate(content, output=output, resume=bool(stop))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Validated]:
    with world(tmp_path_factory.mktemp("best")) as here, pytest.MonkeyPatch.context() as patch:
        yield Validated(here, patch)


def answers(runs: Validated, model: Any) -> torch.Tensor:
    """Return the logits of all tokens; padding's have no meaning."""
    ids, mask = runs.batch["input_ids"], runs.batch["attention_mask"]
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits[mask.bool()]


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize(
    ("method", "options"),
    [("fedit", {}), ("fed-sb", {}), ("flora", {}), ("fedex-lora", {}), ("fedsvd", {}), ("flexlora", {"final_rank": 1})],
)
def test_the_best_model_answers_as_the_server_did_after_that_round(
    runs: Validated, method: str, options: dict[str, Any]
) -> None:
    options = {**runs.here.content(method, "llama")["method"], **options}
    result = runs.run(method, method=options)
    best = result.best
    assert best is not None
    assert (best.round, best.metrics) == (2, {"perplexity": 3.0})
    for wanted, at in ((True, 2), (False, 4)):
        model, _ = fedlora.load(result, best=wanted)
        torch.testing.assert_close(answers(runs, model), runs.logits[at], rtol=1e-4, atol=1e-5)
    assert (runs.logits[2] - runs.logits[4]).abs().max() > 1e-3


def test_a_resumed_run_keeps_the_same_best_model(runs: Validated) -> None:
    whole, resumed = runs.run(), runs.run(stop=3)
    assert files(whole.folder / "best") == files(resumed.folder / "best") != {}
    assert "best/adapter/adapter_model.safetensors" in (whole.folder / "SHA256SUMS").read_text()


def test_a_changed_best_model_is_not_loaded(runs: Validated) -> None:
    result = runs.run()
    weights = result.folder / "best" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    fedlora.load(result)
    with pytest.raises(InputError, match="not as the run wrote it"):
        fedlora.load(result, best=True)


def test_the_best_model_is_exported_with_its_own_score(runs: Validated, tmp_path: Path) -> None:
    result = runs.run()
    best = result.best
    assert best is not None
    found = best.export(tmp_path / "best")
    assert load_file(found / "adapter_model.safetensors").keys()
    own, last = (load_file(f / "adapter_model.safetensors") for f in (found, result.export(tmp_path / "last")))
    assert any(not torch.equal(own[name], last[name]) for name in own)
    score = result.rounds.loc[2, "metrics.perplexity"]
    card = (found / "README.md").read_text()
    assert "this is round 2, which validation prefers" in card
    assert f"perplexity {score:.4g}" in card
    assert files(found) == files(Path(fedlora_command("export", str(result.folder), "--best").out.strip()))
    whole = best.export(merged=True)
    assert whole == result.folder / "best" / "merged"
    assert (whole / "model.safetensors").is_file()


def test_a_run_without_validation_has_no_best_round(runs: Validated) -> None:
    result = runs.run(data={})
    assert result.best is None
    assert not (result.folder / "best").exists()
    with pytest.raises(InputError, match=r"data\.validation"):
        fedlora.load(result, best=True)
    with pytest.raises(InputError, match=r"data\.validation"):
        export_run(result, best=True)


def test_a_run_ends_when_validation_is_no_better_for_some_evaluations(runs: Validated) -> None:
    private = {"mode": "example", "noise_multiplier": 2.0, "target_delta": 1e-3}
    server = {"early_stopping_patience": 2}
    result = runs.run(run={"rounds": 5, "seed": 19}, server=server, privacy=private)
    assert list(result.rounds.index) == [1, 2, 3, 4]
    assert (result.summary["rounds"], result.summary["best"]["round"]) == (4, 2)
    assert "stopped early after round 4" in (result.folder / "run.log").read_text()
    # What was spent is what was run.
    full = runs.run(privacy=private)
    assert result.summary["epsilon"] == full.summary["epsilon"]
    spent = explain_privacy(result.folder)
    assert spent.epsilon == pytest.approx(result.summary["epsilon"]["max"], rel=1e-6)
    assert result.summary["communication"] == full.summary["communication"]


@pytest.mark.parametrize("stop", [3, 4])
def test_a_resumed_run_ends_where_it_would_have(runs: Validated, stop: int) -> None:
    sections: dict[str, Any] = {"run": {"rounds": 5, "seed": 19}, "server": {"early_stopping_patience": 2}}
    whole, resumed = runs.run(**sections), runs.run(stop=stop, **sections)
    assert len(resumed.rounds) == len(whole.rounds) == 4
    assert files(whole.folder / "adapter") == files(resumed.folder / "adapter")


def test_evaluations_count_not_rounds(runs: Validated) -> None:
    result = runs.run(run={"rounds": 5, "seed": 19}, server={"early_stopping_patience": 1, "evaluate_every": 2})
    assert result.summary["rounds"] == 4  # 3.0 after round 2, and no better after round 4
    assert runs.run(server={"early_stopping_patience": 3}).summary["rounds"] == 4  # all that the run has


def test_patience_needs_validation_and_a_method_without_a_last_step(runs: Validated) -> None:
    for method, data in (("ffa-lora", {}), ("flexmore", {"validation": 0.1})):
        with pytest.raises(InputError, match=r"server\.early_stopping_patience"):
            runs.run(method, data=data, server={"early_stopping_patience": 1})


def test_an_owner_that_leaves_leaves_the_best_model_too(runs: Validated) -> None:
    result = runs.run("flexmore")
    assert (result.folder / "best" / "experts" / "ann").is_dir()
    fedlora.opt_out(result.folder, "ann")
    assert not (result.folder / "best").exists()
    assert b"best/" not in (result.folder / "SHA256SUMS").read_bytes()
    database = (result.folder / "checkpoint" / "state.sqlite").read_bytes()
    assert b"ann/" not in database
