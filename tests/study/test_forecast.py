"""A forecast is shared only by runs whose figures are equal."""

from __future__ import annotations

from fedlora.study.config import load_study
from fedlora.study.forecast import Forecast, forecast_all
from fedlora.study.plan import make_plan
from tests.study.studies import TINY, tiny


def test_runs_that_evaluate_at_other_rounds_have_forecasts_of_their_own() -> None:
    base = {**TINY["base"], "run": {"rounds": 3}, "privacy": {"mode": "none"}}
    base["data"] = {**base["data"], "client_test": 0.2, "partition": {"kind": "iid", "clients": 10}}
    base["server"] = {"fraction_train": 0.1, "fraction_evaluate": 0.1}
    axes = {"server.evaluate_every": [1, 3], "client.learning_rate": [0.01, 0.1]}
    study = tiny(base=base, axes=axes)
    del study["tuning"]
    found = forecast_all(make_plan(load_study(study)).runs).values()
    often, same, seldom, _ = (expected for expected in found if isinstance(expected, Forecast))
    assert often is same
    # Before the first round, after the first two where these are due, and after the last.
    assert often.evaluated_examples == 4 / 2 * seldom.evaluated_examples
    # A client that is asked to evaluate before it ever trained gets the frozen arrays for it.
    assert often.initial_bytes > seldom.initial_bytes
