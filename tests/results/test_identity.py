"""The digests of a base model's weights: what changes them, and what may go on while they are computed."""

from __future__ import annotations

import torch
from torch import nn

from fedlora.adapters import AdaptedModel
from fedlora.results.identity import hash_weights
from tests import tiny


def model() -> AdaptedModel:
    """Return an adapted BERT that also has a buffer, and a weight under two names."""
    adapted = tiny.adapted_model("bert", tiny.settings("bert"))
    adapted.model.register_buffer("seen", torch.zeros(3))
    adapted.model.again = nn.Parameter(next(p for p in adapted.model.parameters() if p.dim() == 2), False)
    return adapted


def test_a_single_bit_changes_one_weight_s_digest_and_trained_weights_have_none() -> None:
    adapted = model()
    before = hash_weights(adapted)()
    assert not any(name.startswith(f"{path}.") for path in adapted.stacked_layers() for name in before)
    changed = next(name for name in before if name.endswith("value.base.weight"))
    weight = adapted.model.get_parameter(changed)
    weight.view(torch.int32)[-1, -1] ^= 1
    after = hash_weights(adapted)()
    assert [name for name in before if before[name] != after[name]] == [changed]


def test_weights_are_hashed_as_they_were_whatever_a_pass_does_meanwhile() -> None:
    """A check of the model puts other tensors in the place of its weights, and a pass may write to buffers."""
    expected = hash_weights(model())()
    adapted = model()
    digests = hash_weights(adapted)
    adapted.model.seen.fill_(7)
    for module in adapted.model.modules():
        module._parameters.update(
            {name: nn.Parameter(p + 1, False) for name, p in module._parameters.items() if p is not None}
        )
    assert digests() == expected
    assert hash_weights(adapted)() != expected
