"""Models on one base have its frozen weights in common, in a process and between processes; all else is their own."""

from __future__ import annotations

import gc
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedlora import shared_base as module
from fedlora import simulate
from fedlora.adapters import adapt
from fedlora.clients import resources
from fedlora.config import Config
from fedlora.kernels import attention
from fedlora.models import load_base
from fedlora.shared_base import Loan, pickle_shared, shared_base
from fedlora.strategies.federation import Federation
from tests import tiny


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny.settings("llama", model={"name": str(tiny.save_llama(tmp_path / "llama"))})


def addresses(model: nn.Module) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def test_a_second_model_has_the_weights_of_the_first(config: Config) -> None:
    first, second, alone = shared_base(config, None), shared_base(config, None), load_base(config, None)
    assert addresses(first) == addresses(second)
    assert not set(addresses(first).values()) & set(addresses(alone).values())
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        assert torch.equal(first(input_ids=ids).logits, alone(input_ids=ids).logits)
    # Buffers, modules and what is trained are each model's own.
    assert not {b.data_ptr() for b in first.buffers()} & {b.data_ptr() for b in second.buffers()}
    one, other = adapt(first, config, "lora"), adapt(second, config, "lora")
    tiny.start(one, seed=1)
    before = other.logits({"input_ids": ids})
    tiny.start(one, seed=2)
    assert torch.equal(other.logits({"input_ids": ids}), before)
    assert not torch.equal(one.logits({"input_ids": ids}), before)
    weight = one.adapters["model.layers.0.self_attn.q_proj"].base.weight.requires_grad_(True)
    assert not other.adapters["model.layers.0.self_attn.q_proj"].base.weight.requires_grad
    assert weight.data_ptr() == other.adapters["model.layers.0.self_attn.q_proj"].base.weight.data_ptr()


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    LlamaForCausalLM(tiny.llama_config(tie_word_embeddings=True)).save_pretrained(tmp_path)
    tiny.save_tokenizer(tmp_path)
    config = tiny.settings("llama", model={"name": str(tmp_path)})
    for model in (shared_base(config, None), shared_base(config, None)):
        assert model.lm_head.weight is model.model.embed_tokens.weight  # type: ignore[union-attr]


def test_other_models_are_loaded_and_none_outlives_its_use(config: Config) -> None:
    gc.collect()
    before = set(module._originals)  # of other tests
    first = shared_base(config, None)
    other = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "float64"})})
    assert next(shared_base(other, None).parameters()).dtype == torch.float64
    assert next(shared_base(config, None, "meta").parameters()).is_meta
    # The folder holds another model by now.
    model = tiny.base_model("llama", seed=1)
    model.save_pretrained(config.model.name)  # type: ignore[operator]
    changed = shared_base(config, None)
    assert not torch.equal(next(changed.parameters()), next(first.parameters()))
    del first, changed, other
    gc.collect()
    assert set(module._originals) <= before


def test_server_and_clients_of_a_process_share_a_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "w4 w5 w6 w7"}\n' * 12)
    content: dict[str, Any] = {
        "run": {"rounds": 1},
        "model": {"name": str(tiny.save_llama(tmp_path / "llama")), "task": "causal-lm", "max_length": 8},
        "data": {"name": str(tmp_path / "texts.jsonl"), "partition": {"clients": 2}},
        "method": {"name": "fedit", "rank": 2},
        "client": {"batch_size": 2, "local_steps": 1},
        "simulation": {"workers": 0},
    }
    seen = []
    finish = Federation.finish

    def look(self: Federation) -> Any:
        (clients,) = (kept for _, kept in resources._last_model)
        seen.append((clients.model, self.adapted.model))
        return finish(self)

    monkeypatch.setattr(Federation, "finish", look)
    resources.forget_model()
    simulate(content, output=tmp_path / "run")
    ((clients, server),) = seen
    bases = [{n: a for n, a in addresses(model).items() if ".lora_" not in n} for model in (clients, server)]
    assert bases[0] == bases[1]
    assert len(bases[0]) > 10
    assert clients is not server


def test_a_process_uses_what_another_lends(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    # On the CPU handles are of shared memory.
    original = load_base(config, None)
    pickled, counters = pickle_shared(original)
    assert not counters
    loan = Loan(module._key(config, None, "cpu"), (), pickled, counters)
    module.borrow([loan, Loan("another card's", ("GPU-0",), b"", ())])
    assert list(module._loans) == [loan.key]
    monkeypatch.setattr(module, "load_base", None)
    try:
        borrowed = shared_base(config, None)
    finally:
        module._loans.clear()
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        assert torch.equal(borrowed(input_ids=ids).logits, original(input_ids=ids).logits)
        # It is the same memory.
        next(original.parameters()).zero_()
    assert not next(borrowed.parameters()).any()


def test_a_lent_model_attends_in_a_new_process_as_it_did(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = load_base(config, None)
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    monkeypatch.setattr(attention, "triton", object())  # as where there is a GPU
    assert attention.use_short_attention(model)
    (tmp_path / "model").write_bytes(pickle.dumps(model))
    script = (
        "import pickle, torch, fedlora.shared_base\n"
        "model = pickle.load(open('model', 'rb'))\n"
        "torch.save(model(input_ids=torch.arange(3, 9)[None]).logits.detach(), 'logits')"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "logits"), expected)


def test_what_cannot_be_borrowed_is_loaded(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    module._loans[module._key(config, None, "cpu")] = Loan("", (), pickle.dumps(1)[:-1], ())
    try:
        model = shared_base(config, None)
    finally:
        module._loans.clear()
    assert "loaded again" in caplog.text
    assert torch.equal(next(model.parameters()), next(load_base(config, None).parameters()))
