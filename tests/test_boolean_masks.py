"""Masks in the form that a GPU need not be asked about hide the same tokens, whatever computes a model's attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedlora.models import give_boolean_masks
from tests.architectures import DECODERS, ENCODERS, build

CASES = [(name, "default" if name in ("squeezebert", "funnel") else "mean") for name in ENCODERS]
OWN_HEADS = [(name, "default") for name in ("bert", "eurobert", "modernbert", "mpnet", "roberta", "distilbert")]
TAKING = {"bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "albert", "eurobert"}
"""Some that must have it, for speed."""


def logits(model: Any) -> torch.Tensor:
    """Return those of rows of 40, 7 and 25 tokens: longer than the tiny models' windows."""
    ids = torch.randint(5, 50, (3, 40), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([40, 7, 25])[:, None]
    mask = (torch.arange(40) < lengths).long()
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.where(mask == 1, ids, 0), attention_mask=mask).logits
    return found


@pytest.mark.parametrize(("name", "head"), [*CASES, *OWN_HEADS], ids=str)
def test_the_logits_are_those_with_the_plain_mask(name: str, head: str) -> None:
    model = build(*ENCODERS[name], head)
    expected = logits(model)
    taken = give_boolean_masks(model)
    assert taken or name not in TAKING
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_decoders_keep_their_masks(name: str) -> None:
    assert not give_boolean_masks(build(*DECODERS[name], "mean"))
