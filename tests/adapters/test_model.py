"""Adapters in a frozen model: which layers get them, and that what is trained is what the formulas say."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fedlora.adapters import StackedLinear, adapt
from fedlora.adapters.model import dense_weight, linear_shape, target_paths
from fedlora.config import load_config
from fedlora.errors import InputError
from fedlora.models import load_base
from fedlora.roles import HEAD
from fedlora.training import evaluate, train_cohort
from tests import tiny


def real(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Leave out what a causal model says after padding: nobody reads it."""
    return logits[batch["attention_mask"].bool()] if logits.dim() == 3 else logits


def adapters(kind: str, targets, **options) -> list[str]:
    config = tiny.settings(kind, method={"target_modules": targets, **options})
    return list(adapt(tiny.base_model(kind), config, "lora").adapters)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("bert", None),
        ("llama", None),
        ("gpt2", None),
        ("bert", "all-linear"),
        ("llama", "all-linear"),
        ("gpt2", "all-linear"),
        ("bert", ["query", "value"]),
        ("bert", ["output.dense"]),
        ("bert", ["bert.encoder.layer.1.attention.self.key"]),
        ("bert", r".*layer\.[01]\.attention\.self\.(query|key)"),
        ("llama", r"model\.layers\.1\.mlp\..*_proj"),
    ],
)
def test_the_layers_that_peft_would_choose(kind, targets):
    stock = tiny.base_model(kind)
    task = "CAUSAL_LM" if kind in tiny.CAUSAL else "SEQ_CLS"
    peft = get_peft_model(stock, LoraConfig(target_modules=targets, task_type=task))
    chosen = adapters(kind, targets)
    assert sorted(chosen) == sorted(peft.targeted_module_names)
    assert chosen


def test_a_mean_pooled_classifier_has_its_encoders_defaults():
    assert [p.removeprefix("encoder.") for p in adapters("mean", None)] == [
        p.removeprefix("bert.") for p in adapters("bert", None)
    ]
    assert "classifier" not in adapters("mean", "all-linear")
    # A path is the stock encoder's, as in PEFT; with the wrapper's own prefix it is known too.
    expected = ["encoder.encoder.layer.1.attention.self.key"]
    for targets in (expected[0].removeprefix("encoder."), expected[0]):
        assert adapters("mean", [targets]) == expected
        assert adapters("mean", targets.replace(".", r"\.")) == expected


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["nothing"], "matches no module.*its linear layers are dense, key, query, value"),
        ("quer", "matches no module"),
        (["classifier"], "matches no module"),
        ("(", "is not a regular expression"),
        (["LayerNorm"], "matches bert.*LayerNorm, a LayerNorm; only Linear and Conv1D"),
        (["word_embeddings"], "an Embedding"),
    ],
)
def test_targets_that_cannot_be_are_named(targets, said):
    with pytest.raises(InputError) as caught:
        adapters("bert", targets)
    assert caught.value.field == "method.target_modules"
    assert re.search(said.replace("an Emb", "a[n]? Emb"), str(caught.value))


def test_a_head_tied_to_the_embeddings_takes_no_adapter():
    """Merging its update would change what the model reads as well; GPT-2's is tied, Llama's is not."""
    with pytest.raises(InputError, match="matches lm_head, whose weight is the embeddings' too"):
        adapters("gpt2", ["lm_head"])
    assert list(adapters("llama", ["lm_head"])) == ["lm_head"]


def test_an_unknown_architecture_has_no_default():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(InputError, match='name the modules, or "all-linear"'):
        target_paths(model, None)
    assert target_paths(model, "all-linear") == ["0"]


def test_a_rank_above_a_layers_size_is_refused():
    assert adapters("bert", ["query", "intermediate.dense"], rank=32)
    with pytest.raises(
        InputError, match=r"above the size of bert\.encoder\.layer\.0.*query \(32 x 32\); use 32 or less"
    ) as caught:
        adapters("bert", ["query", "intermediate.dense"], rank=33)
    assert caught.value.field == "method.rank"
    # Llama's keys and values are narrower.
    with pytest.raises(InputError, match=r"k_proj \(16 x 32\); use 16 or less"):
        adapters("llama", ["q_proj", "k_proj"], rank=17)


def test_only_adapters_and_head_may_train():
    config = tiny.settings("bert")
    adapted = tiny.adapted_model("bert", config)
    assert not any(p.requires_grad for p in adapted.model.parameters())
    adapted.set_clients([adapted.arrays(adapted.names(["lora_B", HEAD]))] * 3)
    trained = {name for name, p in adapted.model.named_parameters() if p.requires_grad}
    assert trained == {
        *(f"bert.encoder.layer.{i}.attention.self.{n}.lora_B.weight" for i in (0, 1) for n in ("query", "value")),
        "classifier.weight",
        "classifier.bias",
    }
    assert {p.shape[0] for p in adapted.parameters()} == {3}
    assert adapted.head_names == ("classifier.weight", "classifier.bias")
    assert len(adapted.parameters()) == len(adapted.trained) == 6
    assert not adapt(tiny.base_model("llama"), tiny.settings("llama"), "lora").head_names


def test_a_new_model_is_the_base_model():
    for kind in tiny.KINDS:
        for parameterisation in ("lora", "sb"):
            stock = tiny.base_model(kind)
            batch = tiny.table(kind, 4).batch(np.arange(4))
            with torch.no_grad():
                expected = stock(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                adapted = adapt(tiny.base_model(kind), tiny.settings(kind), parameterisation)
                adapted.layout.set_rows([4])
                torch.testing.assert_close(real(adapted.logits(batch), batch), real(expected, batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", list(tiny.FACTORS))
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_training_equals_training_the_dense_delta(kind, method):
    """After rounds of training the logits are those of W0 + s B (R) A put into the stock model; Conv1D included."""
    targets = "all-linear" if kind != "mean" else None
    config = tiny.settings(
        kind, method={"name": method, "target_modules": targets}, client={"optimizer": "sgd", "local_steps": 3}
    )
    adapted = tiny.adapted_model(kind, config, torch.float64)
    examples = tiny.table(kind, 6)
    start = adapted.arrays(tiny.trained_names(adapted, config))
    arrays = start
    for server_round in (1, 2):
        jobs = tiny.jobs_of([arrays], [np.arange(6)], None, server_round, 0.01)
        arrays = train_cohort(adapted, examples, jobs, config)[0].arrays
    assert tiny.difference(arrays, start) > 1e-3
    adapted.set_shared(arrays)
    stock = tiny.base_model(kind, torch.float64)
    values = adapted.arrays()
    for path, adapter in adapted.adapters.items():
        product = torch.eye(linear_shape(adapter.base)[1], dtype=torch.float64)
        for factor in adapter.factors:
            product = values[f"{path}.{factor}"] @ product
        weight = dense_weight(stock.get_submodule(path))
        assert weight.shape == product.shape == torch.Size(linear_shape(adapter.base))
        weight += 1.5 * product  # alpha / rank = 4.5 / 3; a view of the layer's own weight
    for name in adapted.head_names:
        stock.get_parameter(name).data.copy_(values[name])
    batch = examples.batch(np.arange(6))
    adapted.layout.set_rows([6])
    with torch.no_grad():
        expected = stock(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        torch.testing.assert_close(real(adapted.logits(batch), batch), real(expected, batch), rtol=0, atol=1e-10)


def test_evaluation_refuses_a_model_of_many_clients():
    config = tiny.settings("bert", client={"optimizer": "sgd", "local_steps": 1})
    adapted = tiny.adapted_model("bert", config)
    examples = tiny.table("bert", 4)
    adapted.set_clients([adapted.arrays(adapted.names(["lora_B", HEAD]))] * 2)
    with pytest.raises(ValueError, match="those of 2 clients"):
        evaluate(adapted, examples, 4)


@pytest.mark.parametrize("kind", ["mean", "llama"])
def test_a_half_precision_base_keeps_full_precision_adapters(kind):
    config = tiny.settings(kind, method={"rank": 2}, client={"optimizer": "sgd", "local_steps": 2})
    adapted = adapt(tiny.base_model(kind, torch.bfloat16), config, "lora")
    tiny.start(adapted)
    assert {p.dtype for n, p in adapted.model.named_parameters() if "lora" in n} == {torch.float32}
    assert {p.dtype for layer in adapted.head.values() for p in layer.parameters()} <= {torch.float32}
    base = {p.dtype for n, p in adapted.model.named_parameters() if "lora" not in n and "classifier" not in n}
    assert base == {torch.bfloat16}
    start = adapted.arrays(adapted.names(["lora_A", "lora_B", HEAD]))
    plans = [None, tiny.plan(0.5, 1.0, 1.0, 4.0)]
    for plan in plans:
        # A step far below bf16's resolution of 0.4 % is kept.
        jobs = tiny.jobs_of([start] * 2, tiny.split([4, 3]), [plan] * 2, learning_rate=1e-4)
        for result in train_cohort(adapted, tiny.table(kind, 7), jobs, config):
            assert {a.dtype for a in result.arrays.values()} == {torch.float32}
            assert 0 < tiny.difference(result.arrays, start) < 1e-3
            assert all(torch.isfinite(a).all() for a in result.arrays.values())
    fp32 = tiny.adapted_model(kind, config)
    batch = tiny.table(kind, 4).batch(np.arange(4))
    for model in (adapted, fp32):
        model.set_shared(start | {n: a for n, a in adapted.arrays().items() if n not in start})
        model.layout.set_rows([4])
    with torch.no_grad():
        got, expected = (real(model.logits(batch).float(), batch) for model in (adapted, fp32))
        torch.testing.assert_close(got, expected, rtol=0.1, atol=0.3)


def test_a_head_of_two_layers_is_trained_whole():
    """RoBERTa's classifier is a small network; its dense layer is no target of the adapters."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    shape = RobertaConfig(
        vocab_size=tiny.VOCABULARY, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes
    )
    model = RobertaForSequenceClassification(shape).requires_grad_(False)
    config = tiny.settings(
        "bert", method={"target_modules": "all-linear"}, client={"optimizer": "sgd", "local_steps": 2}
    )
    adapted = adapt(model, config, "lora")
    tiny.start(adapted)
    assert adapted.head_names == tuple(
        f"classifier.{layer}.{part}" for layer in ("dense", "out_proj") for part in ("weight", "bias")
    )
    assert not any(path.startswith("classifier") for path in adapted.adapters)
    assert all(isinstance(layer, StackedLinear) for layer in adapted.head.values())
    start = adapted.arrays(adapted.names(["lora_B", HEAD]))
    jobs = tiny.jobs_of([start] * 2, tiny.split([3, 2]), [tiny.plan(0.1, 1.0, 1.0)] * 2)
    results = train_cohort(adapted, tiny.table("bert", 5), jobs, config)
    for k, result in enumerate(results):
        alone = train_cohort(adapted, tiny.table("bert", 5), jobs[k : k + 1], config)[0]
        assert tiny.difference(alone.arrays, result.arrays) < 1e-6


def test_dropout_reaches_layers_without_tokens():
    """BERT's pooler sees one vector a row."""
    config = tiny.settings(
        "bert",
        method={"target_modules": ["pooler.dense"], "dropout": 0.5},
        client={"optimizer": "sgd", "local_steps": 2},
    )
    adapted = tiny.adapted_model("bert", config, torch.float64)
    start = adapted.arrays(adapted.names(["lora_B", HEAD]))
    jobs = tiny.jobs_of([start] * 2, tiny.split([3, 2]))
    results = train_cohort(adapted, tiny.table("bert", 5), jobs, config)
    for k, result in enumerate(results):
        alone = train_cohort(adapted, tiny.table("bert", 5), jobs[k : k + 1], config)[0]
        assert tiny.difference(alone.arrays, result.arrays) < 1e-12


def test_no_cache_of_keys_and_values():
    for kind in ("llama", "gpt2"):
        adapted = tiny.adapted_model(kind, tiny.settings(kind))
        batch = tiny.table(kind, 2).batch(np.arange(2))
        output = adapted.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        assert output.past_key_values is None


@pytest.fixture(scope="module")
def minilm():
    config = load_config(
        {
            "model": {"name": "asset:minilm-l6", "max_length": 32, "pooling": "mean"},
            "data": {"name": "x", "partition": {"clients": 2}},
            "method": {"name": "fedit", "rank": 4},
            "client": {"optimizer": "sgd", "local_steps": 2, "batch_size": 4},
        }
    )
    return adapt(load_base(config, ["no", "yes"]), config, "lora"), config


@pytest.mark.slow
def test_the_real_minilm(minilm):
    """Two clients under DP in one pass equal each alone, on the real model."""
    adapted, config = minilm
    assert len(adapted.adapters) == 12
    tiny.start(adapted, scale=0.05)
    start = adapted.arrays(adapted.names(["lora_A", "lora_B", HEAD]))
    examples = tiny.table("bert", 7)
    examples.labels %= 2
    jobs = tiny.jobs_of([start] * 2, tiny.split([4, 3]), [tiny.plan(0.3, 0.5, 1.0, 4.0)] * 2)
    for k, result in enumerate(train_cohort(adapted, examples, jobs, config)):
        alone = train_cohort(adapted, examples, jobs[k : k + 1], config)[0]
        assert tiny.difference(alone.arrays, start) > 0.01
        assert tiny.difference(alone.arrays, result.arrays) < 1e-6
