"""Which modules get adapters, over many families, and that an adapter does something in each of them."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from torch import nn

from fedlora import models
from fedlora.adapters import adapt
from fedlora.adapters.model import target_paths
from fedlora.adapters.reach import NEVER_CALLED, NO_INFLUENCE, READ_ELSEWHERE, unreached
from fedlora.errors import InputError
from fedlora.models import head_of, run_short_text
from fedlora.roles import HEAD
from fedlora.training import train_cohort
from tests import tiny
from tests.families import QUERY_VALUE, family_model


@pytest.mark.parametrize("model_type", QUERY_VALUE)
def test_the_default_is_every_attentions_query_and_value(model_type):
    """And the adapters work there: changing any of them changes the logits."""
    names, attentions = QUERY_VALUE[model_type]
    model = family_model(model_type)
    adapted = adapt(model, tiny.settings("bert", method={"rank": 2}), "lora")
    assert not adapted.notes
    assert {path.rpartition(".")[2] for path in adapted.adapters} == names
    assert len(adapted.adapters) == attentions * len(names)
    assert {p.rpartition(".")[0] for p in adapted.adapters} == {
        p for p, m in model.named_modules() if names <= {name for name, _ in m.named_children()}
    }
    # On a skeleton too, of which a forecast is made.
    with torch.device("meta"):
        skeleton = family_model(model_type)
    assert list(adapt(skeleton, tiny.settings("bert", method={"rank": 2}), "lora").adapters) == list(adapted.adapters)
    assert all(p.is_meta for p in skeleton.parameters())


def settings(targets=None, **method):
    return tiny.settings("llama", method={"rank": 2, "target_modules": targets, **method})


def test_weights_that_other_code_reads_take_no_adapter():
    """Mamba multiplies by the weight of dt_proj itself; it crashed, and would be bypassed."""
    adapted = adapt(family_model("mamba", causal=True), settings("all-linear"), "lora")
    assert {path.rpartition(".")[2] for path in adapted.adapters} == {"in_proj", "x_proj", "out_proj"}
    (note,) = adapted.notes
    assert re.search(r"all-linear leaves out 2 layers \(.*dt_proj.*: other code reads its weight", note)
    assert torch.isfinite(run_short_text(adapted.model).logits).all()
    with pytest.raises(InputError, match=r"target_modules.*dt_proj.*other code reads its weight.*; name other modules"):
        adapt(family_model("mamba", causal=True), settings(["in_proj", "dt_proj"]), "lora")
    with pytest.raises(InputError, match='no attention with linear query and value; name the modules, or "all-linear"'):
        adapt(family_model("mamba", causal=True), settings(), "lora")


def test_torchs_own_attention_is_not_bypassed():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(8, 8)
            self.layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
            self.unused, self.detached, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, input_ids, attention_mask=None):
            hidden = self.layer(self.embed(input_ids))
            self.detached(hidden)
            return type("Output", (), {"logits": self.out(hidden)})

    model = Model().requires_grad_(False)
    assert unreached(model, target_paths(model, "all-linear")) == {
        "layer.self_attn.out_proj": READ_ELSEWHERE,
        "unused": NEVER_CALLED,
        "detached": NO_INFLUENCE,
    }
    # In evaluation torch has a fused path that would read linear1's weight.
    adapted = adapt(model, settings("all-linear"), "lora")
    tiny.start(adapted)
    ids = torch.arange(6).reshape(2, 3)
    with torch.no_grad():
        trained, evaluated = (adapted.model.train(mode)(ids).logits for mode in (True, False))
    torch.testing.assert_close(trained, evaluated)


def test_experts_that_no_token_chose_are_reached():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(4, 4)}) for _ in range(3))
            self.skipped = nn.ModuleDict({"w1": nn.Linear(4, 4)})

        def forward(self, x):
            return self.experts[1]["w1"](x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.layers = nn.Embedding(4, 4), nn.ModuleList([Block(), Block()])

        def forward(self, input_ids, attention_mask=None):
            hidden = self.embed(input_ids)
            for layer in self.layers:
                hidden = layer(hidden)
            return type("Output", (), {"logits": hidden})

    model = Model().requires_grad_(False)
    found = unreached(model, target_paths(model, "all-linear"))
    assert set(found) == {"layers.0.skipped.w1", "layers.1.skipped.w1"}


def test_all_linear_says_what_it_does_not_reach():
    """The experts of a mixture are fused in one parameter: no linear layer, and most of the model."""
    model = family_model("mixtral", causal=True)
    adapted = adapt(model, settings("all-linear"), "lora")
    assert {path.rpartition(".")[2] for path in adapted.adapters} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    fused = sum(p.numel() for n, p in model.named_parameters() if "experts" in n)
    (note,) = adapted.notes
    assert "does not reach model.layers.*.mlp.experts.gate_up_proj, model.layers.*.mlp.experts.down_proj" in note
    assert f"({fused:,} of " in note
    assert not adapt(family_model("llama", causal=True), settings("all-linear"), "lora").notes


@pytest.mark.parametrize("excluded", [["lm_head", "o_proj"], r".*\.(lm_head|o_proj)|lm_head"])
def test_modules_are_excluded_as_in_peft(excluded):
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "o_proj", "lm_head"]
    stock = get_peft_model(
        tiny.base_model("llama"), LoraConfig(target_modules=targets, exclude_modules=excluded, task_type="CAUSAL_LM")
    )
    adapted = adapt(tiny.base_model("llama"), settings(targets, exclude_modules=excluded), "lora")
    assert sorted(adapted.adapters) == sorted(stock.targeted_module_names)
    assert {path.rpartition(".")[2] for path in adapted.adapters} == {"q_proj"}


def test_a_layer_is_excluded_by_its_path():
    first = adapt(tiny.base_model("bert"), settings(exclude_modules=r".*layer\.1\..*"), "lora")
    assert len(first.adapters) == 2
    assert all(".layer.0." in path for path in first.adapters)


@pytest.mark.parametrize(
    ("excluded", "said"),
    [
        (["v_porj"], r"'v_porj' is none of the modules that method.target_modules chooses \(q_proj, v_proj\)"),
        (["v_proj", "o_proj"], "'o_proj' is none of the modules"),
        (".*", "leaves no module to adapt"),
        ("(", "is not a regular expression"),
    ],
)
def test_exclusions_that_cannot_be_are_named(excluded, said):
    with pytest.raises(InputError, match=said) as caught:
        adapt(tiny.base_model("llama"), settings(exclude_modules=excluded), "lora")
    assert caught.value.field == "method.exclude_modules"


def test_quantised_layers_are_refused():
    model = tiny.base_model("llama")
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(InputError, match=r"matches model\.layers\.0\.self_attn\.q_proj, a quantised Linear"):
        target_paths(model, ["q_proj"])


def test_a_layer_that_does_not_see_the_texts_rows_takes_no_adapter():
    """OPT flattens texts before its feed-forward layers; whose tokens are whose is lost to clients and to clipping."""
    adapted = adapt(family_model("opt", causal=True), settings("all-linear"), "lora")
    names = {path.rpartition(".")[2] for path in adapted.adapters}
    assert names == {"q_proj", "k_proj", "v_proj", "out_proj"}
    (note,) = adapted.notes
    assert note.startswith("all-linear leaves out 4 layers (model.decoder.layers.0.fc1, ")
    tiny.start(adapted)
    start = adapted.arrays(adapted.names(["lora_A", "lora_B", HEAD]))
    jobs = tiny.jobs_of([start] * 2, tiny.split([4, 3]), [tiny.plan(0.1, 1.0, 1.0)] * 2)
    config = tiny.settings("llama", client={"optimizer": "sgd", "local_steps": 1})
    for k, result in enumerate(train_cohort(adapted, tiny.table("llama", 7), jobs, config)):
        alone = train_cohort(adapted, tiny.table("llama", 7), jobs[k : k + 1], config)[0]
        assert tiny.difference(alone.arrays, result.arrays) < 1e-6
    with pytest.raises(
        InputError, match=r"^method\.target_modules = .*fc1, .*whose they are is lost; name other modules"
    ):
        adapt(family_model("opt", causal=True), settings(["q_proj", "fc1"]), "lora")


@pytest.mark.parametrize("model_type", ["bart", "t5", "distilbert"])
def test_all_linear_reaches_every_layer(model_type):
    """An encoder-decoder's too; T5 asks its layers' weights for their dtype, which is no reading."""
    model = family_model(model_type)
    adapted = adapt(model, tiny.settings("bert", method={"rank": 2, "target_modules": "all-linear"}), "lora")
    assert not adapted.notes
    name, _ = head_of(model)
    linear = [p for p, m in family_model(model_type).named_modules() if isinstance(m, nn.Linear)]
    assert list(adapted.adapters) == [path for path in linear if path.partition(".")[0] != name]


def test_an_expression_that_never_ends_is_refused():
    """A server chooses the expression, and a node matches it before any charge."""
    with pytest.raises(InputError, match=r"takes more than .* on one path"):
        target_paths(torch.nn.ModuleDict({"a" * 60: torch.nn.Linear(2, 2)}), "(a|a)+[bc]")


def test_a_skeleton_is_asked_once_and_other_models_anew(monkeypatch):
    asked = []
    run = models._run_skeleton
    monkeypatch.setattr(models, "_answers", {})
    monkeypatch.setattr(models, "_run_skeleton", lambda *given: asked.append(given[0]) or run(*given))

    def ask(layers):
        with torch.device("meta"):
            small = transformers.BertConfig(num_hidden_layers=layers, hidden_size=8, num_attention_heads=2)
            model = transformers.BertForSequenceClassification(small)
        return unreached(model, target_paths(model, "all-linear"))

    assert ask(1) == ask(1)
    assert len(asked) == 1
    ask(2)
    assert len(asked) == 2
