"""An adapter folder loads with stock PEFT on the stock model, and computes the same."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

from fedlora.adapters import AdaptedModel, adapt
from fedlora.adapters.model import linear_shape
from fedlora.adapters.peft_format import HEAD_FILE, LABELS_FILE, export_peft
from fedlora.config import Config
from fedlora.models import load_base
from fedlora.training import train_cohort
from tests import tiny

NAMES = ["bad", "so so", "good"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Tiny models as save_pretrained leaves them: bodies without a classifier, and language models."""
    torch.manual_seed(0)
    models = {
        "bert": BertModel(tiny.bert_config()),
        "bert without pooler": BertModel(tiny.bert_config(), add_pooling_layer=False),
        "distilbert": DistilBertModel(
            DistilBertConfig(vocab_size=50, dim=32, n_layers=2, n_heads=2, hidden_dim=48, max_position_embeddings=32)
        ),
        "llama": LlamaForCausalLM(tiny.llama_config()),
        "gpt2": GPT2LMHeadModel(tiny.gpt2_config(pad_token_id=0)),
    }
    found = {}
    for name, model in models.items():
        found[name] = tmp_path_factory.mktemp(name)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.2)
        if name == "llama":
            tiny.save_llama(found[name])  # with a tokenizer, which a decoder's own head needs
        model.save_pretrained(found[name])
    return found


def trained(folder: Path, method: str, kind: str, dtype: str = "float32", **options) -> tuple[AdaptedModel, Config]:
    """Load a model as a run does, and train it a little, so that no factor and no head is what it was."""
    task = "causal-lm" if kind in tiny.CAUSAL else "sequence-classification"
    config = tiny.settings(
        kind,
        model={"name": str(folder), "task": task, "pooling": "mean" if kind == "mean" else "default", "dtype": dtype},
        method={"name": method, "rank": 3, "alpha": 4.5, **options},
        client={"optimizer": "sgd", "local_steps": 2},
    )
    adapted = adapt(load_base(config, None if task == "causal-lm" else NAMES), config, tiny.FACTORS[method][0])
    tiny.start(adapted)
    start = adapted.arrays(tiny.trained_names(adapted, config))
    result = train_cohort(adapted, tiny.table(kind, 6), tiny.jobs_of([start], [np.arange(6)]), config)[0]
    assert all(not torch.equal(result.arrays[name], start[name]) for name in start)
    adapted.set_shared(result.arrays)
    return adapted, config


def batch_of(kind: str) -> dict[str, torch.Tensor]:
    return tiny.table(kind, 5, seed=9).batch(np.arange(5))


def logits(adapted: AdaptedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    adapted.model.eval()
    adapted.layout.set_rows([len(batch["input_ids"])])
    with torch.no_grad():
        return adapted.logits(batch)


def loaded(stock, target: Path, batch: dict[str, torch.Tensor]):
    """Load the folder with PEFT and run it; nothing may be missing or left over."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = PeftModel.from_pretrained(stock, str(target)).eval()
    with torch.no_grad():
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        merged = model.merge_and_unload()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return output, merged


@pytest.mark.parametrize("targets", [None, "all-linear", ["query", "intermediate.dense"], r".*layer\.1\..*(key|value)"])
@pytest.mark.parametrize("method", list(tiny.FACTORS))
def test_a_classifier_has_the_same_logits(method, targets, folders, tmp_path):
    adapted, config = trained(folders["bert"], method, "bert", target_modules=targets)
    export_peft(adapted, config, tmp_path / "adapter", NAMES)
    batch = batch_of("bert")
    stock = AutoModelForSequenceClassification.from_pretrained(folders["bert"], num_labels=3)
    before = stock(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    # The pooler is drawn anew where the checkpoint has none; here it has one.
    output, merged = loaded(stock, tmp_path / "adapter", batch)
    expected = logits(adapted, batch)
    assert (before - expected).abs().max() > 0.05
    tiny.assert_close(output.logits, expected)
    tiny.assert_close(merged.logits, expected)
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(folders["bert"])
    assert saved["modules_to_save"] == ["classifier"]
    assert saved["lora_alpha"] / saved["r"] == pytest.approx(1.5)
    assert json.loads((tmp_path / "adapter" / LABELS_FILE).read_text()) == NAMES


@pytest.mark.parametrize("targets", [r".*(query|q_lin)", "all-linear"])
@pytest.mark.parametrize("name", ["bert without pooler", "distilbert"])
@pytest.mark.parametrize("method", ["fed-sb", "ffa-lora"])
def test_layers_that_were_drawn_are_in_the_folder(method, name, targets, folders, tmp_path):
    """The checkpoint lacks what lies between the body and the classifier: stock transformers draws other weights."""
    adapted, config = trained(folders[name], method, "bert", target_modules=targets)
    export_peft(adapted, config, tmp_path, NAMES)
    batch = batch_of("bert")
    torch.manual_seed(1)
    stock = AutoModelForSequenceClassification.from_pretrained(folders[name], num_labels=3)
    output, merged = loaded(stock, tmp_path, batch)
    tiny.assert_close(output.logits, logits(adapted, batch))
    tiny.assert_close(merged.logits, logits(adapted, batch))


@pytest.mark.parametrize("targets", [None, "all-linear", ["query", "intermediate.dense"]])
@pytest.mark.parametrize("method", list(tiny.FACTORS))
def test_a_mean_pooled_encoder_has_the_same_hidden_states(method, targets, folders, tmp_path):
    adapted, config = trained(folders["bert"], method, "mean", target_modules=targets)
    export_peft(adapted, config, tmp_path, NAMES)
    batch = batch_of("mean")
    expected = logits(adapted, batch)
    with torch.no_grad():
        encoder = adapted.model.encoder
        hidden = encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    stock = AutoModel.from_pretrained(folders["bert"], add_pooling_layer=False)
    output, merged = loaded(stock, tmp_path, batch)
    tiny.assert_close(output.last_hidden_state, hidden)
    tiny.assert_close(merged.last_hidden_state, hidden)
    # The head lies beside it: a linear layer on the mean over tokens.
    head = load_file(tmp_path / HEAD_FILE)
    assert set(head) == {"classifier.weight", "classifier.bias"}
    mask = batch["attention_mask"][..., None]
    pooled = (output.last_hidden_state * mask).sum(1) / mask.sum(1)
    got = pooled @ head["classifier.weight"].T + head["classifier.bias"]
    tiny.assert_close(got, expected)


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("method", list(tiny.FACTORS))
@pytest.mark.parametrize("kind", tiny.CAUSAL)
def test_a_language_model_has_the_same_logits(kind, method, targets, folders, tmp_path):
    adapted, config = trained(folders[kind], method, kind, target_modules=targets)
    export_peft(adapted, config, tmp_path, None)
    batch = batch_of(kind)
    stock = AutoModelForCausalLM.from_pretrained(folders[kind])
    output, merged = loaded(stock, tmp_path, batch)
    real = batch["attention_mask"].bool()
    expected = logits(adapted, batch)[real]
    # Adapters in every layer add up to large numbers that nearly cancel.
    tiny.assert_close(output.logits[real], expected, 3e-5)
    tiny.assert_close(merged.logits[real], expected, 3e-5)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["fan_in_fan_out"] == (kind == "gpt2")
    assert saved["task_type"] == "CAUSAL_LM"
    assert not saved["modules_to_save"]
    assert not (tmp_path / LABELS_FILE).exists()


@pytest.mark.parametrize("kind", ["bert", "mean", *tiny.CAUSAL])
@pytest.mark.parametrize(("method", "rank"), [("fedit", 4), ("fed-sb", 4), ("fedit", None)])
def test_a_residual_makes_an_adapter_of_a_larger_rank(kind, method, rank, folders, tmp_path):
    """Stock PEFT loads it, and computes the same, up to the residual that fills the whole matrix."""
    adapted, config = trained(folders["bert" if kind == "mean" else kind], method, kind, target_modules="all-linear")
    generator = torch.Generator().manual_seed(2)
    residual, without = {}, next(iter(adapted.adapters))
    for path, adapter in adapted.adapters.items():
        m, n = linear_shape(adapter.base)
        if path != without:  # of one layer there is none
            factors = (
                torch.randn(m, rank or min(m, n), generator=generator),
                torch.randn(rank or min(m, n), n, generator=generator),
            )
            residual[path] = 0.02 * factors[0] @ factors[1]
    adapted.set_residual(residual)
    export_peft(adapted, config, tmp_path, None if kind in tiny.CAUSAL else NAMES)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    shapes = {path: linear_shape(adapter.base) for path, adapter in adapted.adapters.items()}
    ranks = {path: min(*shapes[path], 3 + (rank or 99) if path in residual else 3) for path in shapes}
    assert saved["r"] == max(ranks.values())
    assert saved["lora_alpha"] / saved["r"] == pytest.approx(1.5)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    found = {
        n.split(".lora_A")[0].removeprefix("base_model.model."): len(t) for n, t in tensors.items() if "lora_A" in n
    }
    assert found == {path.removeprefix("encoder." if kind == "mean" else ""): r for path, r in ranks.items()}
    assert f"rank {saved['r']} at most" in (tmp_path / "README.md").read_text()
    batch = batch_of(kind)
    real = batch["attention_mask"].bool()
    if kind == "mean":
        stock = AutoModel.from_pretrained(folders["bert"], add_pooling_layer=False)
        adapted.model.eval()
        adapted.layout.set_rows([5])
        with torch.no_grad():
            expected = adapted.model.encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
    elif kind == "bert":
        stock = AutoModelForSequenceClassification.from_pretrained(folders["bert"], num_labels=3)
        expected, real = logits(adapted, batch), torch.ones(5, dtype=torch.bool)
    else:
        stock = AutoModelForCausalLM.from_pretrained(folders[kind])
        expected = logits(adapted, batch)
    before = stock(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
    assert (before[real] - expected[real]).abs().max() > 0.05
    for output in loaded(stock, tmp_path, batch):
        tiny.assert_close(output[0][real], expected[real], 3e-5)


@pytest.mark.parametrize("method", ["fedit", "fed-sb"])
def test_a_decoder_with_a_classifier(method, folders, tmp_path):
    """Llama's own head is called score."""
    adapted, config = trained(folders["llama"], method, "bert")
    assert adapted.head_names == ("score.weight",)
    export_peft(adapted, config, tmp_path, NAMES)
    batch = batch_of("bert")
    stock = AutoModelForSequenceClassification.from_pretrained(folders["llama"], num_labels=3)
    output, merged = loaded(stock, tmp_path, batch)
    tiny.assert_close(output.logits, logits(adapted, batch))
    tiny.assert_close(merged.logits, logits(adapted, batch))


def test_a_half_precision_model_exports_full_precision(folders, tmp_path):
    adapted, config = trained(folders["bert"], "fed-sb", "bert", dtype="bfloat16")
    export_peft(adapted, config, tmp_path, NAMES)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    assert len(tensors) == 2 * 4 + 2
    stock = AutoModelForSequenceClassification.from_pretrained(folders["bert"], num_labels=3)
    output, _ = loaded(stock, tmp_path, batch_of("bert"))
    torch.testing.assert_close(output.logits, logits(adapted, batch_of("bert")).float(), rtol=0.1, atol=0.1)


@pytest.mark.slow
def test_the_real_minilm(tmp_path):
    """From the asset in the cache, by the name that the folder itself carries."""
    config = tiny.settings(
        "bert",
        model={"name": "asset:minilm-l6", "pooling": "mean"},
        method={"name": "fed-sb", "rank": 4, "alpha": 6.0},
    )
    adapted = adapt(load_base(config, NAMES), config, "sb")
    tiny.start(adapted)
    export_peft(adapted, config, tmp_path, NAMES)
    batch = batch_of("bert")
    name = json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert not name.startswith("asset:")
    output, _ = loaded(AutoModel.from_pretrained(name), tmp_path, batch)
    with torch.no_grad():
        encoder = adapted.model.encoder.eval()
        adapted.layout.set_rows([5])
        hidden = encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    tiny.assert_close(output.last_hidden_state, hidden)
