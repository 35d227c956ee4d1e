"""Base models are frozen, without dropout, and alike in every process."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaForCausalLM,
    LlavaConfig,
    MPNetConfig,
    T5Config,
    T5Model,
)

from fedlora import models
from fedlora.config import Config, load_config
from fedlora.errors import InputError
from fedlora.models import (
    MeanPoolingClassifier,
    head_of,
    load_base,
    load_tokenizer,
    model_config,
    pretrained_source,
)
from tests import tiny as tiny_models
from tests.families import family_model
from tests.tiny import save_llama, save_tokenizer

LABELS = ["no", "yes", "perhaps"]


def config(name="asset:minilm-l6", seed=0, **model) -> Config:
    return load_config(
        {
            "run": {"seed": seed},
            "model": {"name": str(name), "max_length": 32, **model},
            "data": {"name": "x", "partition": {"clients": 2}},
            "method": {"name": "fedit"},
        }
    )


def change_config(folder, **entries):
    name = folder / "config.json"
    name.write_text(json.dumps(json.loads(name.read_text()) | entries))


@pytest.fixture(scope="module")
def minilm() -> nn.Module:
    return load_base(config(), LABELS)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A folder with a small BERT without a classifier and a tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=30522, max_position_embeddings=40, **sizes)).save_pretrained(folder)
    load_tokenizer(config()).save_pretrained(folder)
    return str(folder)


def test_minilm_is_frozen_without_dropout(minilm):
    assert head_of(minilm)[0] == "classifier"
    assert not any(parameter.requires_grad for parameter in minilm.parameters())
    assert {module.p for module in minilm.modules() if isinstance(module, nn.Dropout)} == {0.0}
    assert minilm.config.hidden_dropout_prob == minilm.config.attention_probs_dropout_prob == 0.0
    assert minilm.config.id2label == dict(enumerate(LABELS))
    assert minilm.config._attn_implementation == "sdpa"
    ids = torch.tensor([[101, 7592, 102]])
    with torch.no_grad():
        assert torch.equal(minilm.train()(ids).logits, minilm.eval()(ids).logits)


def test_the_body_is_the_checkpoint(minilm):
    stock = AutoModel.from_pretrained(pretrained_source(config()))
    own = minilm.bert.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in stock.state_dict().items())


def test_the_head_follows_the_seed_alone(tiny):
    torch.manual_seed(1)
    first = load_base(config(tiny), LABELS)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = load_base(config(tiny), LABELS)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    head = head_of(first)[1]
    assert head.weight.std() == pytest.approx(0.02, rel=0.3)
    assert not head.bias.any()
    assert not torch.equal(head_of(load_base(config(tiny, seed=1), LABELS))[1].weight, head.weight)
    # Neither the dtype nor the pooling moves the draw.
    assert torch.equal(head_of(load_base(config(tiny, dtype="float64"), LABELS))[1].weight.float(), head.weight)
    assert torch.equal(head_of(load_base(config(tiny, pooling="mean"), LABELS))[1].weight, head.weight)


def test_a_head_of_the_checkpoint_is_drawn_anew(tiny, tmp_path):
    trained = BertForSequenceClassification.from_pretrained(tiny, num_labels=7)
    trained.save_pretrained(tmp_path)
    head = head_of(load_base(config(tmp_path), LABELS))[1]
    assert torch.equal(head.weight, head_of(load_base(config(tiny), LABELS))[1].weight)


def test_mean_pooling_is_the_mean_over_tokens(tiny):
    model = load_base(config(tiny, pooling="mean", dtype="float64"), LABELS)
    assert isinstance(model, MeanPoolingClassifier)
    assert model.encoder.pooler is None
    ids = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    hidden = model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    expected = model.classifier(torch.stack([hidden[0, :3].mean(0), hidden[1].mean(0)]))
    torch.testing.assert_close(model(ids, mask).logits, expected)
    torch.testing.assert_close(model(ids[1:]).logits, expected[1:])
    # Padding neither counts in the mean nor is attended to.
    torch.testing.assert_close(model(ids[:1, :3], mask[:1, :3]).logits, expected[:1])


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_dtype_and_layers(tiny, dtype):
    model = load_base(config(tiny, dtype=dtype, num_hidden_layers=2), LABELS)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert len(model.bert.encoder.layer) == 2


def test_loading_says_nothing(tiny, capfd):
    load_base(config(tiny, num_hidden_layers=1), LABELS)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("field", "model"),
    [
        ("model.max_length", {"max_length": 41}),
        ("model.num_hidden_layers", {"num_hidden_layers": 4}),
        ("model.task", {"task": "causal-lm"}),
        ("model.name", {"name": "no/such/folder"}),
        ("model.name", {"name": "no-org/no-model"}),
        ("model.name", {"name": "asset:rotten-tomatoes"}),
        ("model.name", {"name": "asset:nothing"}),
        ("model.name", {"name": "tests"}),
        ("model.name", {"name": __file__}),
    ],
)
def test_mistakes_are_named(tiny, field, model):
    with pytest.raises(InputError) as caught:
        load_base(config(**{"name": tiny, "max_length": 40, **model}), LABELS)
    assert caught.value.field == field


def test_positions_that_depend_on_the_batch_are_refused(tmp_path):
    """LongRoPE: one long row would change the gradients of all others, which clipping by example does not bound."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [8.0] * 8}
    shape = tiny_models.llama_config(rope_parameters={**rope, "original_max_position_embeddings": 16})
    model = LlamaForCausalLM(shape).eval()
    short = torch.arange(3, 11)[None]
    alone, beside = (model(nn.functional.pad(short, (0, n))).logits[:, :8] for n in (0, 20))
    assert float((alone - beside).detach().abs().max()) > 1e-4
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"model\.max_length = 17: beyond 16 tokens"):
        load_base(config(tmp_path, task="causal-lm", max_length=17), None)
    load_base(config(tmp_path, task="causal-lm", max_length=16), None)


def test_positions_that_depend_on_the_batch_are_seen_in_a_config_within_a_config():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [8.0] * 8}
    text = tiny_models.llama_config(rope_parameters={**rope, "original_max_position_embeddings": 16})
    for pretrained in (text, LlavaConfig(text_config=text)):
        assert models._positions_alone(pretrained) == 16


def test_damaged_weights_are_named(tiny, tmp_path):
    BertModel.from_pretrained(tiny).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match=r"model\.name.*cannot be loaded"):
        load_base(config(tmp_path, max_length=40), LABELS)


@pytest.mark.parametrize("pooling", ["default", "mean"])
def test_a_checkpoint_that_lacks_layers_is_refused(tiny, tmp_path, pooling):
    model = BertModel.from_pretrained(tiny)
    kept = {name: value for name, value in model.state_dict().items() if "layer.2" not in name}
    model.save_pretrained(tmp_path)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.name.*has no weights for .*encoder\.layer\.2"):
        load_base(config(tmp_path, pooling=pooling), LABELS)


def test_an_encoder_is_no_causal_language_model(tiny, tmp_path):
    """Its checkpoint has the head, but a token would see the one that it predicts."""
    BertForMaskedLM(BertConfig.from_pretrained(tiny)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"model\.task.*would see the tokens that it predicts"):
        load_base(config(tmp_path, task="causal-lm"), None)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_of_two_texts_is_refused(tmp_path, device):
    T5Model(T5Config(vocab_size=50, d_model=16, d_ff=24, num_layers=1, num_heads=2, d_kv=8)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"model\.name.*its decoder needs a text"):
        load_base(config(tmp_path, pooling="mean"), LABELS, device)


def test_a_decoders_head_reads_the_last_token_before_this_tokenizers_padding(tmp_path):
    """Not before that of the model's config, which may be another token."""
    save_llama(tmp_path)
    name = tmp_path / "config.json"
    name.write_text(json.dumps(json.loads(name.read_text()) | {"pad_token_id": 7}))
    model, tokenizer = load_base(config(tmp_path), LABELS), load_tokenizer(config(tmp_path))
    texts = ["w5 w6", "w5 w6 w9 w9 w8"]
    both, alone = (model(**tokenizer(t, return_tensors="pt", padding=True)).logits for t in (texts, texts[:1]))
    torch.testing.assert_close(both[:1], alone)


def test_positions_reserved_for_padding_are_not_counted(tmp_path):
    MPNetConfig(max_position_embeddings=34).save_pretrained(tmp_path)
    assert model_config(config(tmp_path)).max_position_embeddings == 34
    with pytest.raises(InputError, match="the model has 32 positions"):
        model_config(config(tmp_path, max_length=33))


@pytest.mark.slow
def test_smollm2_is_converted_once_and_speaks():
    name = "asset:smollm2-135m"
    source = pretrained_source(config(name))
    assert pretrained_source(config(name)) == source
    tokenizer = load_tokenizer(config(name))
    assert tokenizer.pad_token_id is not None
    model = load_base(config(name, task="causal-lm"), None)
    assert head_of(model) is None
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"


def test_a_decoder_classifies_with_either_pooling():
    ids, mask = torch.tensor([[5, 6, 7, 2], [5, 6, 7, 8]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    for pooling, head in (("default", "score"), ("mean", "classifier")):
        model = load_base(config("asset:smollm2-135m", num_hidden_layers=2, pooling=pooling), LABELS)
        assert head_of(model)[0] == head
        assert model(input_ids=ids, attention_mask=mask).logits.shape == (2, 3)


def save(folder, model_type, causal=None, **options):
    """Save a tiny model of a family and a tokenizer of its own words."""
    model = family_model(model_type, causal, **options)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


@pytest.mark.parametrize("pad", [None, -1, 10**6])
@pytest.mark.parametrize("pooling", ["default", "mean"])
def test_a_roberta_without_its_padding_token_has_the_tokenizers(tmp_path, pad, pooling):
    save(tmp_path, "roberta")
    change_config(tmp_path, pad_token_id=pad)
    model = load_base(config(tmp_path, pooling=pooling), LABELS)
    ids = torch.tensor([[5, 6, 0, 0], [5, 6, 7, 8]])
    both = model(input_ids=ids, attention_mask=(ids != 0).long()).logits
    torch.testing.assert_close(both[:1], model(input_ids=ids[:1, :2]).logits)
    with pytest.raises(InputError, match="the model has 63 positions"):
        model_config(config(tmp_path, max_length=64))


@pytest.mark.parametrize(
    "odd",
    [
        {"pad_token_id": -1},
        {"eos_token_id": [2, 4], "pad_token_id": None},
        {"max_position_embeddings": None},
        {"max_position_embeddings": -1},
        {"id2label": {"0": "a", "7": "b"}},
        {"num_labels": 9},
        {"id2label": {"0": "a"}, "label2id": {"a": 5}},
        {"problem_type": "regression"},
        {"pad_token_id": 10**6},
        {"vocab_size": 70},
        {"hidden_size": 64},
        {"id2label": ["a", "b"]},
        {"max_position_embeddings": "many"},
        {"pad_token_id": [0, 1]},
    ],
    ids=str,
)
@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_odd_configs_load_or_are_named(tmp_path, model_type, odd):
    save(tmp_path, model_type)
    change_config(tmp_path, **odd)
    for pooling in ("default", "mean"):
        try:
            model = load_base(config(tmp_path, pooling=pooling), LABELS)
        except InputError as error:
            assert error.field in ("model.name", "model.max_length")  # noqa: PT017
            assert set(odd) & {"vocab_size", "hidden_size", "id2label", "max_position_embeddings", "pad_token_id"}
            continue
        assert not set(odd) & {"vocab_size", "hidden_size"}, "weights of other shapes are noise"
        assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.shape == (1, 3)


@pytest.mark.parametrize("pooling", ["default", "mean"])
@pytest.mark.parametrize("model_type", ["bart", "mbart"])
def test_an_encoder_decoder_of_one_text_classifies(tmp_path, model_type, pooling):
    """Its skeleton too: on the meta device it cannot look at its mask, which is no reason to refuse it."""
    save(tmp_path, model_type)
    model = load_base(config(tmp_path, pooling=pooling), LABELS)
    ids = torch.tensor([[5, 6, 7, 2], [5, 6, 7, 2]])
    assert model(input_ids=ids).logits.shape == (2, 3)
    skeleton = load_base(config(tmp_path, pooling=pooling), LABELS, "meta")
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert {name: p.shape for name, p in skeleton.named_parameters()} == shapes


def test_a_width_that_the_config_does_not_name_is_measured(tmp_path):
    """OPT of 350 M gives hidden states that are narrower than its hidden_size."""
    save(tmp_path, "opt", causal=True, word_embed_proj_dim=16)
    for device in ("cpu", "meta"):
        assert load_base(config(tmp_path, pooling="mean"), LABELS, device).classifier.in_features == 16


@pytest.mark.parametrize("pooling", ["default", "mean"])
def test_the_checkpoints_head_goes_on_where_its_classes_are_the_runs(tmp_path, pooling):
    tiny_models.base_model("mean" if pooling == "mean" else "bert").save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    change_config(tmp_path, id2label=dict(enumerate(LABELS)), label2id={name: i for i, name in enumerate(LABELS)})
    trained = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    model = load_base(config(tmp_path, pooling=pooling), LABELS)
    assert torch.equal(head_of(model)[1].weight, head_of(trained)[1].weight)
    assert not model.notes
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(model(input_ids=ids).logits, trained(input_ids=ids).logits)
    for others in (["no", "yes"], ["yes", "no", "perhaps"]):
        model = load_base(config(tmp_path, pooling=pooling), others)
        assert model.notes == ["the model's head is of other classes (no, yes, perhaps), so a new one is drawn"]
        assert not torch.equal(head_of(model)[1].weight[:2], head_of(trained)[1].weight[:2])
        assert model.config.id2label == dict(enumerate(others))


def test_a_mean_pooled_classifier_is_loaded_as_one(tmp_path):
    tiny_models.base_model("mean").save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    model = load_base(config(tmp_path, pooling="mean", num_hidden_layers=1), LABELS)
    assert len(model.encoder.encoder.layer) == 1
    assert (
        len(load_base(config(tmp_path, pooling="mean", num_hidden_layers=1), LABELS, "meta").encoder.encoder.layer) == 1
    )
    for model in ({}, {"task": "causal-lm"}):
        with pytest.raises(InputError, match=r"model\.name.*set model\.pooling = mean"):
            load_base(config(tmp_path, **model), LABELS)


@pytest.mark.parametrize(
    ("task", "remedy"), [("sequence-classification", "use pooling mean"), ("token-classification", "choose another")]
)
def test_an_unknown_head_is_refused_with_what_the_task_allows(tiny, monkeypatch, task, remedy):
    monkeypatch.setattr("fedlora.models._HEADS", ())
    with pytest.raises(InputError, match=remedy):
        load_base(config(tiny, task=task), LABELS, "meta")
