"""FlexMoRE and FFA-LoRA, both of mixed ranks, on real nodes and a real language model, as in simulation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fedlora
from fedlora.assets import fetch
from fedlora.config import load_config
from fedlora.data.sources import load_examples
from fedlora.experts import Mixture
from tests.deployment.federation import Federation
from tests.deployment.test_federation import WHO_AND_PAYLOAD, column, run_on

# Converting SmolLM2's weights and three loads of them come before the first step.
pytestmark = [pytest.mark.federation, pytest.mark.timeout(1500)]

OWNERS = {"east": "comp", "north": "rec", "west": "sci"}
"""The newsgroups' domain of each node."""

RANKS: dict[str, int | str] = {"east": 4, "north": "full", "west": 2}
NESTED = {"east": 1, "north": 4, "west": 2}


@pytest.fixture(scope="module")
def posts(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each owner's posts as OWNER.jsonl, all of them in all.csv, and test.csv; the domain bears its owner's name."""

    for name in ("20newsgroups", "smollm2-135m"):
        link = cache / "assets" / fetch(name).name
        if not link.exists():
            link.symlink_to(fetch(name))
    folder = tmp_path_factory.mktemp("posts")
    config = {
        "model": {"name": "asset:smollm2-135m", "task": "causal-lm"},
        "data": {"name": "asset:20newsgroups", "partition": {"clients": 1}},
        "method": {"name": "ffa-lora"},
    }
    found = load_examples(load_config(config))
    assert found.train is not None
    assert found.test is not None
    whose = {domain: owner for owner, domain in OWNERS.items()}
    for name, table, count in (("all", found.train, 30), ("test", found.test, 6)):
        rows = table.to_pandas()
        rows = rows[rows["domain"].isin(whose)].groupby("domain").head(count).sort_values("domain")
        rows = rows.assign(domain=rows["domain"].map(whose))[["text", "domain"]]
        rows.to_csv(folder / f"{name}.csv", index=False)
        if name == "all":
            for owner, own in rows.groupby("domain"):
                own[["text"]].to_json(folder / f"{owner}.jsonl", orient="records", lines=True)
    return folder


@pytest.fixture
def owners(federation: Federation, posts: Path) -> Iterator[None]:
    """Let every node own the posts of one domain."""
    before = dict(federation.data)
    federation.data.update({name: posts / f"{name}.jsonl" for name in OWNERS})
    federation.set_policy(allow_non_private=True)
    federation.wait_online(3, 300)
    yield
    federation.data.update(before)
    federation.set_policy(allow_non_private=True)


def on_both(federation: Federation, posts: Path, folder: Path, method: dict[str, Any]) -> tuple[Path, Path]:
    """Run a method on the nodes and in simulation; return the two run folders."""
    content: dict[str, Any] = {
        "run": {"name": method["name"], "rounds": 2, "seed": 3},
        "model": {"name": "asset:smollm2-135m", "task": "causal-lm", "max_length": 16, "num_hidden_layers": 2},
        "data": {"name": "nodes", "test": str(posts / "test.csv"), "partition": {"clients": 3}},
        "method": method,
        "client": {"optimizer": "sgd", "batch_size": 4, "local_steps": 3, "learning_rate": 0.03},
        "server": {"timeout": 300.0, "min_replies": 3},
    }
    there = run_on(federation, content)
    data = {
        "name": str(posts / "all.csv"), "test": str(posts / "test.csv"),
        "partition": {"kind": "natural", "column": "domain"},
    }  # fmt: skip
    content |= {"data": data, "simulation": {"workers": 0}}
    here = fedlora.simulate(content, output=folder / "simulation").folder
    assert column(there, *WHO_AND_PAYLOAD) == column(here, *WHO_AND_PAYLOAD)
    first, second = (json.loads((run / "summary.json").read_text()) for run in (here, there))
    assert first["final"]["perplexity"] == pytest.approx(second["final"]["perplexity"], rel=1e-5)
    assert second["final"]["perplexity"] < second["start"]["perplexity"]
    return here, there


@pytest.mark.usefixtures("owners")
def test_flexmore(federation: Federation, posts: Path, tmp_path: Path) -> None:
    here, there = on_both(
        federation, posts, tmp_path, {"name": "flexmore", "ranks": RANKS, "router_documents": 8, "alpha": 8}
    )
    assert not (there / "adapter").exists()
    assert sorted(path.name for path in (there / "experts").iterdir()) == sorted(OWNERS)
    first, second = (json.loads((run / "summary.json").read_text()) for run in (here, there))
    assert {owner: expert["rank"] for owner, expert in second["experts"].items()} == RANKS
    tables = second["final"]["by_domain"]
    assert tables.keys() == {"public", "mixture", *OWNERS}
    for model, table in tables.items():
        assert table == pytest.approx(first["final"]["by_domain"][model], rel=1e-5)
    # Each expert is the best on its own domain's text, or the public model would be.
    assert all(tables[owner][owner] < tables["public"][owner] for owner in OWNERS)
    ours, _ = fedlora.load(here)
    theirs, _ = fedlora.load(there)
    assert isinstance(theirs, Mixture)
    assert (theirs.owners, theirs.config.ranks) == (list(OWNERS), list(RANKS.values()))
    expected = ours.state_dict()
    for name, array in theirs.state_dict().items():
        torch.testing.assert_close(array, expected[name], rtol=0, atol=1e-6)


@pytest.mark.usefixtures("owners")
@pytest.mark.parametrize("method", [{"name": "ffa-lora", "rank": 4}, {"name": "ravan", "rank": 1, "heads": 4}])
def test_ranks_by_owner(federation: Federation, posts: Path, tmp_path: Path, method: dict[str, Any]) -> None:
    here, there = on_both(federation, posts, tmp_path, {**method, "ranks": NESTED})
    found = column(there, "client", "direction", "payload_bytes")
    assert len({size for _, direction, size in found if direction == "up"}) == len(NESTED)
    ours, theirs = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (here, there))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) <= 1e-6
    assert max(float(array.abs().max()) for name, array in theirs.items() if "lora_B" in name) > 1e-5
