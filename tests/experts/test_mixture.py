"""The checks of FlexMoRE on small random models, gated (Llama) and ungated (GPT-2, BERT as a decoder)."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    BertLMHeadModel,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormForCausalLM,
    T5Config,
    T5EncoderModel,
)

from fedlora.errors import InputError
from fedlora.experts import FULL, Expert, Mixture, MixtureConfig
from fedlora.experts.expert import Rank, array_shapes, truncate
from fedlora.experts.feed_forward import find_feed_forwards, public_digest
from fedlora.experts.mixture import load_mixture
from tests import tiny

KINDS = ("llama", "gpt2", "bert")
IDS = torch.tensor([[3, 9, 27, 4, 12, 36, 8, 24, 5], [11, 33, 9, 6, 18, 7, 21, 13, 39]])


def public_model(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    if kind != "bert":
        return tiny.base_model(kind, dtype)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = BertLMHeadModel(tiny.bert_config(is_decoder=True))
    torch.set_rng_state(state)
    return model.to(dtype).requires_grad_(False).eval()


def mixture_of(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> Mixture:
    half = dtype == torch.bfloat16
    public = public_model(kind, torch.float32 if half else dtype)
    for parameter in public.parameters() if half else ():
        # The parameters alone, as from_pretrained does: rotary frequencies stay float32.
        parameter.data = parameter.data.to(dtype)
    return Mixture.of(public, **options).eval()


def drawn(mixture: Mixture, owner: str, rank: Rank, seed: int = 0) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    shapes = array_shapes(mixture.projections(), mixture.routers(), rank)
    dtype = mixture.dtype
    arrays = {n: 0.3 * torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in shapes.items()}
    return Expert(owner, rank, arrays, mixture.public_digest)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def truncated(full: Expert, rank: int) -> Expert:
    arrays = {name: array for name, array in full.arrays.items() if not name.endswith(".delta")}
    for name, array in full.arrays.items():
        if name.endswith(".delta"):
            path = name.removesuffix(".delta")
            arrays[f"{path}.lora_B"], arrays[f"{path}.lora_A"] = truncate(array, rank)
    return Expert(full.owner, rank, arrays, full.public_digest)


@pytest.mark.parametrize("kind", KINDS)
def test_by_definition(kind):
    """The block is sum p_i FFN_i(x), each expert with whole weights of its own, in a loop over tokens."""
    mixture = mixture_of(kind)
    for seed, rank in enumerate((3, FULL, 1)):
        mixture.add_expert(drawn(mixture, f"owner {seed}", rank, seed))
    block, form = mixture.blocks[0], mixture.forms[0]
    x = torch.randn(5, block.router.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    experts = [None, *(mixture.expert(owner) for owner in mixture.owners)]

    def apply(role: str, expert: Expert | None, value: torch.Tensor) -> torch.Tensor:
        layer = block.public(role)
        y: torch.Tensor = layer(value)
        if expert is not None:
            update = expert.update(form.projections[role])
            y = y + value @ (update if isinstance(update, torch.Tensor) else update[0] @ update[1]).T
        return y

    for top_k, renormalise in itertools.product((None, 1, 2, 4), (True, False)):
        block.top_k, block.renormalise = top_k, renormalise
        expected = []
        for token in x:
            scores = block.router @ token + block.router_bias.clamp(max=0)
            p = scores.softmax(0)
            assert float(p.sum()) == pytest.approx(1, abs=1e-12)
            chosen = p.argsort(descending=True)[: top_k or 4]
            total = p[chosen].sum() if renormalise else 1.0
            y = torch.zeros_like(token)
            for i in chosen.tolist():
                hidden = mixture.forms[0].activation(apply("gate" if block.gated else "up", experts[i], token))
                if block.gated:
                    hidden = hidden * apply("up", experts[i], token)
                y = y + p[i] / total * apply("down", experts[i], hidden)
            expected.append(y)
        torch.testing.assert_close(block(x[None])[0], torch.stack(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_rank_from_zero_to_full(kind):
    """r = min(m, n) is the full expert, r = 0 the public model, and dW's error falls all the way."""
    mixture = mixture_of(kind)
    public = logits(mixture)
    assert torch.equal(public, logits(public_model(kind)))
    full = drawn(mixture, "o", FULL)
    mixture.add_expert(full)
    with_full = logits(mixture)
    assert (with_full - public).abs().max() > 1e-3
    for rank, expected in ((32, with_full), (0, public)):
        other = mixture_of(kind)
        other.add_expert(truncated(full, rank))
        torch.testing.assert_close(logits(other), expected, rtol=0, atol=1e-12 if rank == 0 else 1e-10)
    for path in mixture.projections():
        delta = full.arrays[f"{path}.delta"]
        values = torch.linalg.svdvals(delta)
        errors = []
        for rank in range(33):
            b, a = truncate(delta, rank)
            errors.append(float((delta - b @ a).square().sum()))
            assert errors[-1] == pytest.approx(float(values[rank:].square().sum()), abs=1e-9)
        assert all(after < before for before, after in itertools.pairwise(errors))


@pytest.mark.parametrize("kind", KINDS)
def test_a_very_negative_bias_gives_the_public_model_exactly(kind):
    mixture = mixture_of(kind)
    public = logits(mixture)
    expert = drawn(mixture, "o", 4)
    for name in list(expert.arrays):
        if name.endswith(".router_bias"):
            expert.arrays[name] = torch.full((1, 1), -1e6, dtype=torch.float64)
    mixture.add_expert(expert)
    assert torch.equal(logits(mixture), public)
    # A positive bias enters as 0.
    tables = []
    for bias in (0.0, 5.0):
        other = mixture_of(kind)
        lifted = drawn(other, "o", 4)
        for name in list(lifted.arrays):
            if name.endswith(".router_bias"):
                lifted.arrays[name] = torch.full((1, 1), bias, dtype=torch.float64)
        other.add_expert(lifted)
        tables.append(logits(other))
    assert torch.equal(*tables)
    assert not torch.equal(tables[0], public)


@given(st.permutations([("a", 1), ("b", 5), ("c", FULL), ("d", 5)]), st.sampled_from([None, 2, 3]))
def test_the_order_of_experts_does_not_matter(order, top_k):
    results = []
    for owners in (sorted(order), order):
        mixture = mixture_of("llama", num_experts_per_tok=top_k)
        for owner, rank in owners:
            mixture.add_expert(drawn(mixture, owner, rank, ord(owner)))
        results.append(logits(mixture))
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_opting_out_equals_never_having_been_merged(kind, top_k):
    ranks = {"a": 2, "b": FULL, "c": 7}
    for gone in ranks:
        left, never = (mixture_of(kind, num_experts_per_tok=top_k) for _ in range(2))
        for owner, rank in ranks.items():
            left.add_expert(drawn(left, owner, rank, ord(owner)))
            if owner != gone:
                never.add_expert(drawn(never, owner, rank, ord(owner)))
        assert not torch.equal(logits(left), logits(never))
        left.remove_expert(gone)
        assert torch.equal(logits(left), logits(never))
        assert left.state_dict().keys() == never.state_dict().keys()
        assert (left.owners, left.config.ranks) == (never.owners, never.config.ranks)
    with pytest.raises(InputError, match="has no expert here"):
        left.remove_expert("nobody")


def test_what_does_not_fit_is_refused():
    mixture = mixture_of("llama")
    good = drawn(mixture, "o", 2)
    other = public_model("llama")
    other.model.layers[0].self_attn.q_proj.weight.data[0, 0] += 1e-9
    foreign = Mixture.of(other)
    assert foreign.public_digest != mixture.public_digest
    with pytest.raises(ValueError, match="owner o trained against other public weights"):
        mixture.add_expert(drawn(foreign, "o", 2))
    with pytest.raises(ValueError, match="owner o has shape"):
        mixture.add_expert(Expert("o", 3, good.arrays))
    with pytest.raises(ValueError, match=r"down_proj.delta of owner o has shape None, expected \(32, 48\)"):
        mixture.add_expert(Expert("o", FULL, good.arrays))
    assert mixture.owners == []
    assert torch.equal(logits(mixture), logits(public_model("llama")))
    mixture.add_expert(good)
    with pytest.raises(ValueError, match="has an expert already"):
        mixture.add_expert(good)


@pytest.mark.parametrize("kind", KINDS)
def test_the_digest_is_that_of_the_stock_weights(kind):
    stock = public_model(kind)
    forms = find_feed_forwards(stock)
    assert len(forms) == 2
    expected = public_digest(stock, forms)
    mixture = mixture_of(kind)
    assert mixture.public_digest == expected
    mixture.add_expert(drawn(mixture, "o", 2))
    assert public_digest(mixture.public, mixture.forms) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_it_generates_saves_and_loads(kind, dtype, tmp_path):
    mixture = mixture_of(kind, dtype, num_experts_per_tok=2)
    for owner, rank in (("a", 3), ("misc+alt / ü", FULL), ("c", 1)):
        mixture.add_expert(drawn(mixture, owner, rank))
    prompt = IDS[:, :4]
    before = mixture.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert before.shape == (2, 12)
    mixture.save_pretrained(tmp_path)
    for again in (load_mixture(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")):
        assert isinstance(again, Mixture)
        assert again.dtype == dtype
        assert torch.equal(logits(again), logits(mixture))
        assert torch.equal(again.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0), before)
        assert (again.owners, again.config.ranks) == (mixture.owners, [3, FULL, 1])
        # A loaded mixture takes experts in, and lets them go.
        again.add_expert(drawn(again, "later", 2))
        again.remove_expert("later")
        assert torch.equal(logits(again), logits(mixture))
        for owner in mixture.owners:
            known, loaded = mixture.expert(owner), again.expert(owner)
            assert tiny.difference(known.arrays, loaded.arrays) == 0
            assert known.public_digest == loaded.public_digest


def test_it_generates_as_the_public_model_is_configured_to(tmp_path):
    """An instruct model ends at tokens that only its generation config names."""
    public_model("llama", torch.float32).save_pretrained(tmp_path / "public")
    settings = {"eos_token_id": [2, 7], "max_new_tokens": 3, "temperature": 0.6}
    (tmp_path / "public" / "generation_config.json").write_text(json.dumps(settings))
    mixture = Mixture.of(AutoModelForCausalLM.from_pretrained(tmp_path / "public")).eval()
    mixture.save_pretrained(tmp_path / "mixture")
    for model in (mixture, load_mixture(tmp_path / "mixture")):
        assert model.generation_config.eos_token_id == [2, 7]
        assert model.generate(IDS[:1], do_sample=False, eos_token_id=-1, pad_token_id=0).shape[1] == 9 + 3
        model.generation_config.max_new_tokens = 5
        assert model.generate(IDS[:1], do_sample=False, eos_token_id=-1, pad_token_id=0).shape[1] == 9 + 5


def test_padding_on_the_left_changes_nothing_that_is_generated():
    mixture = mixture_of("llama", torch.float32, num_experts_per_tok=2)
    for seed, rank in enumerate((3, FULL, 1)):
        mixture.add_expert(drawn(mixture, f"owner {seed}", rank, seed))
    alone = mixture.generate(IDS[:1, :5], max_new_tokens=6, do_sample=False, pad_token_id=0)
    padded = torch.stack([torch.cat([torch.zeros(4, dtype=torch.long), IDS[0, :5]]), IDS[1]])
    both = mixture.generate(padded, attention_mask=padded != 0, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(both[0, 9:], alone[0, 5:])


def test_generating_with_a_cache_equals_generating_without():
    mixture = mixture_of("llama", torch.float32)
    mixture.add_expert(drawn(mixture, "o", 3))
    results = [
        mixture.generate(IDS, max_new_tokens=8, do_sample=False, use_cache=c, pad_token_id=0) for c in (True, False)
    ]
    assert torch.equal(*results)


def test_top_k_without_renormalising_keeps_less_than_the_whole():
    """Why renormalising is the default: a flat softmax leaves the chosen weights summing to k / experts."""
    sums = []
    for renormalise in (True, False):
        mixture = mixture_of("llama", num_experts_per_tok=2, norm_topk_prob=renormalise)
        for owner in "abcde":
            expert = drawn(mixture, owner, 2, ord(owner))
            expert.arrays.update({n: torch.zeros_like(a) for n, a in expert.arrays.items() if "router" in n})
            mixture.add_expert(expert)
        weights = mixture.blocks[0].weights(torch.randn(7, 32, dtype=torch.float64))
        assert ((weights > 0).sum(1) == 2).all()
        sums.append(weights.sum(1))
    torch.testing.assert_close(sums[0], torch.ones(7, dtype=torch.float64))
    torch.testing.assert_close(sums[1], torch.full((7,), 1 / 3, dtype=torch.float64))


def test_a_model_without_known_blocks_is_refused():
    opt = OPTForCausalLM(
        OPTConfig(vocab_size=50, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2)
    )
    # Its two layers lie among attention and norms: replacing them would replace these too.
    with pytest.raises(InputError, match="no known form"):
        find_feed_forwards(opt)
    t5 = T5EncoderModel(T5Config(vocab_size=50, d_model=16, d_ff=24, num_layers=1, num_heads=2, d_kv=8))
    with pytest.raises(InputError, match="no known form"):
        find_feed_forwards(t5)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_block_that_takes_more_than_its_input_is_refused(device):
    """MPT's names are those of a known form, but its blocks add the residual themselves."""
    with torch.device(device):
        model = MptForCausalLM(MptConfig(vocab_size=50, d_model=16, n_heads=2, n_layers=1, max_seq_len=16))
    with pytest.raises(InputError, match="no known form"):
        find_feed_forwards(model)


def test_a_block_that_does_more_than_its_projections_is_refused():
    """BERT's names, but a normalisation lies in the module that a mixture's block would replace."""
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = RobertaPreLayerNormForCausalLM(RobertaPreLayerNormConfig(vocab_size=50, is_decoder=True, **shape))
    with pytest.raises(InputError, match="no known form"):
        find_feed_forwards(model)


def test_an_empty_config_is_one_of_no_owners():
    assert (MixtureConfig().owners, MixtureConfig().public) == ([], {})
