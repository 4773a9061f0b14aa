"""The sampler draws from the model's distribution, reproducibly, and says with what log-prob."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, family_model
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer

from grao_fast.sampling import transformers as transformers_sampler
from grao_fast.sampling.cache import GrowingLayer, cache_name, drop_rows
from grao_fast.sampling.drawing import draw
from grao_fast.sampling.model_sampler import Decoding
from grao_fast.sampling.transformers import TransformersSampler

EOS = 1
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [16, 17]]
SEEDS = [3, 1, 4, 15]


@pytest.fixture(scope="module")
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


def sampler(
    model, batch_size: int = 64, eos=(EOS,), dtype: torch.dtype | None = None, **options
) -> TransformersSampler:
    decoding = Decoding(eos_token_ids=eos, pad_token_id=0, batch_size=batch_size, dtype=dtype)
    return TransformersSampler(model, decoding, **options)


@pytest.mark.parametrize("static_cache", [False, True])
def test_greedy_equals_generate(model, static_cache: bool):
    groups = sampler(model, batch_size=3, static_cache=static_cache).sample(
        PROMPTS, num_generations=1, max_new_tokens=12, temperature=0.0, seeds=SEEDS
    )
    for prompt, group in zip(PROMPTS, groups, strict=True):
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=EOS
        )[0, len(prompt) :]
        assert group[0].token_ids == expected.tolist()


@pytest.mark.parametrize("static_cache", [False, True])
def test_logprobs_are_those_of_the_full_forward_pass(model, static_cache: bool):
    """Every third token ends a completion, so that rows leave the batch at different times."""
    eos = range(1, model.config.vocab_size, 3)
    groups = sampler(model, eos=eos, static_cache=static_cache).sample(
        PROMPTS, num_generations=16, max_new_tokens=20, temperature=0.7, seeds=SEEDS
    )
    lengths = {len(completion.token_ids) for group in groups for completion in group}
    assert len(lengths) > 3
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            ids = torch.tensor([prompt + completion.token_ids])
            with torch.no_grad():
                logits = model(ids).logits[0, len(prompt) - 1 : -1] / 0.7
            rows = torch.arange(len(completion.token_ids))
            expected = logits.log_softmax(-1)[rows, ids[0, len(prompt) :]]
            assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=1e-4)
            ended = [token in eos for token in completion.token_ids]
            assert not any(ended[:-1])
            assert completion.finished == ended[-1]
            assert completion.finished or len(completion.token_ids) == 20


@pytest.mark.parametrize("name", FAMILIES)
def test_a_long_prompt_is_prefilled_in_parts(name: str, monkeypatch: pytest.MonkeyPatch):
    """Parts may be shorter than a sliding window of 4, or begin in the padding of a prompt."""
    model = family_model(name).eval()

    def sampled(pairs: int) -> list:
        monkeypatch.setattr(transformers_sampler, "_PAIRS", pairs)
        groups = sampler(model).sample(
            PROMPTS, num_generations=2, max_new_tokens=6, temperature=1.0, seeds=SEEDS
        )
        return [completion for group in groups for completion in group]

    whole = sampled(2**25)
    for pairs in (1, 2 * 4 * 7, 5 * 4 * 7):  # 4 prompts of up to 7 tokens: parts of 1, 2, 5
        for ours, theirs in zip(sampled(pairs), whole, strict=True):
            assert ours.token_ids == theirs.token_ids
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_a_prompt_without_padding_needs_no_mask_in_sdpa():
    mask = torch.ones(1, 3 * 2**13, dtype=torch.int64)
    assert len(sampler(family_model("Llama"))._parts(mask)) == 1
    assert sampler(family_model("Mistral"))._parts(mask)[:2] == [1365, 2730]
    mask[0, 0] = 0
    assert sampler(family_model("Llama"))._parts(mask)[-1] == 3 * 2**13


def test_frequencies_follow_the_distribution(model):
    """Of 4,000 draws of one token, every frequency is within 4 standard deviations."""
    n = 4000
    groups = sampler(model, batch_size=n).sample(
        [[5, 6, 7]], num_generations=n, max_new_tokens=1, temperature=1.3, seeds=[0]
    )
    counts = torch.bincount(
        torch.tensor([c.token_ids[0] for c in groups[0]]), minlength=model.config.vocab_size
    )
    with torch.no_grad():
        p = (model(torch.tensor([[5, 6, 7]])).logits[0, -1] / 1.3).softmax(-1)
    assert bool(((counts - n * p).abs() <= 4 * (n * p * (1 - p)).sqrt() + 1).all())


def test_the_cache_has_the_name_that_the_model_gives_it(model):
    """Transformers renames the argument and will drop the old name, which older versions and
    other authors' models still use."""

    def old(input_ids=None, past_key_values=None): ...
    def new(input_ids=None, cache=None): ...

    assert cache_name(SimpleNamespace(forward=old)) == "past_key_values"
    assert cache_name(SimpleNamespace(forward=new)) == "cache"
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        sampler(model).sample(
            [[5]], num_generations=2, max_new_tokens=2, temperature=1.0, seeds=[0]
        )


def uniform(n: int) -> torch.Tensor:
    return torch.rand(n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("V", [5, 128, 1000])
def test_draws_invert_the_distribution_function(V: int):
    """Holds also if the vocabulary is not a multiple of a block."""
    logits = 3 * torch.randn(4000, V, generator=torch.Generator().manual_seed(1))
    u = uniform(4000)
    token, logprob = draw(logits, 0.9, u)
    logprobs = (logits / 0.9).log_softmax(-1)
    cdf = logprobs.double().exp().cumsum(-1)
    assert torch.equal(token[:, None], torch.searchsorted(cdf, (1 - u) * cdf[:, -1:]))
    torch.testing.assert_close(logprob, logprobs.gather(1, token[:, None])[:, 0])


@pytest.mark.parametrize("place", [1, 150, 300])
def test_rare_tokens_are_not_rounded_away(place: int):
    """A token of probability 1e-9 is drawn for that share of the random numbers, whichever block
    it is in."""
    logits = torch.full((2, 301), -torch.inf)
    logits[:, 0], logits[:, place] = 0.0, math.log(1e-9)
    token, _ = draw(logits, 1.0, torch.tensor([[0.9e-9], [1.1e-9]], dtype=torch.float64))
    assert token.tolist() == [place, 0]


@pytest.mark.parametrize("scale", [1, 60])
def test_what_cannot_be_drawn_is_not_drawn(scale: int):
    """Covers probability 0 at both ends and in the middle, and a token one rounding above it."""
    logits = torch.full((4000, 6 * scale), -torch.inf)
    logits[:, 2 * scale], logits[:, 4 * scale] = 0.0, -40.0
    token, logprob = draw(logits, 1.0, uniform(4000))
    assert token.tolist() == [2 * scale] * 4000 and logprob.tolist() == [0.0] * 4000
    logits[:, 4 * scale] = 0.0
    token, _ = draw(logits, 1.0, uniform(4000))
    assert set(token.tolist()) == {2 * scale, 4 * scale}
    ends = torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.float64)
    token, _ = draw(logits[:2], 1.0, ends)
    assert token.tolist() == [4 * scale, 2 * scale]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("logit", [math.nan, math.inf])
def test_logits_that_are_not_numbers_raise(tiny_model, temperature: float, logit: float):
    broken = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        broken.get_output_embeddings().weight[3] = logit
    with pytest.raises(FloatingPointError, match=r"NaN or infinite.*learning_rate"):
        sampler(broken).sample(
            [[5]], num_generations=2, max_new_tokens=3, temperature=temperature, seeds=[0]
        )


@pytest.mark.parametrize("static_cache", [False, True])
def test_a_completion_does_not_depend_on_when_others_end(model, static_cache: bool):
    """With and without an end-of-sequence token, all draw the same until their own end."""
    options = {"num_generations": 8, "max_new_tokens": 12, "temperature": 1.0, "seeds": SEEDS}
    eos = range(1, model.config.vocab_size, 5)
    ending = sampler(model, eos=eos, static_cache=static_cache).sample(PROMPTS, **options)
    endless = sampler(model, eos=()).sample(PROMPTS, **options)
    ends = set()
    for group, others in zip(ending, endless, strict=True):
        for completion, other in zip(group, others, strict=True):
            length = len(completion.token_ids)
            ends.add(length)
            assert completion.token_ids == other.token_ids[:length]
    assert len(ends) > 3


def test_a_growing_cache_holds_what_a_dynamic_one_holds(monkeypatch: pytest.MonkeyPatch):
    """Both hold the same after repeating rows, selecting rows, and outgrowing the reserved room."""
    monkeypatch.setattr("grao_fast.sampling.cache._ROOM", 3)
    generator = torch.Generator().manual_seed(0)
    layers = GrowingLayer(), DynamicLayer()

    def append(sequences: int, tokens: int) -> None:
        keys, values = torch.randn(2, sequences, 2, tokens, 4, generator=generator)
        ours, theirs = (layer.update(keys, values) for layer in layers)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert layers[0].get_seq_length() == layers[1].get_seq_length()

    append(2, 5)
    for layer in layers:
        layer.batch_repeat_interleave(2)
    for _ in range(5):
        append(4, 1)
    for layer in layers:
        layer.batch_select_indices(torch.tensor([0, 3, 1]))
    for tokens in (1, 4, 1):
        append(3, tokens)


@pytest.mark.parametrize("room", [False, True], ids=["repeated", "in its room"])
@pytest.mark.parametrize("gone", [[0, 1], [1, 3], [4], [3, 4], [0, 1, 2, 3]], ids=str)
def test_the_last_rows_take_the_places_of_dropped_ones(gone: list[int], room: bool):
    """A growing layer and a layer without reserved room keep the same rows."""
    keys = torch.arange(5.0)[:, None, None, None].expand(5, 2, 3, 4)
    cache = DynamicCache()
    cache.layers = [GrowingLayer(), DynamicLayer()]
    for layer in cache.layers:
        layer.update(keys, -keys)
        if room:
            layer.update(keys[:, :, :1], -keys[:, :, :1])
        else:
            layer.batch_repeat_interleave(1)
    ended = torch.zeros(5, dtype=torch.bool)
    ended[gone] = True
    order = drop_rows(cache, ended)
    assert sorted(order.tolist()) == sorted(set(range(5)) - set(gone))
    stay = [i for i in range(len(order)) if not ended[i]]
    assert order[stay].tolist() == stay
    for layer in cache.layers:
        more = order.float()[:, None, None, None].expand(-1, 2, 1, 4)
        got, negative = layer.update(more, -more)
        assert torch.equal(got, more.expand_as(got)) and torch.equal(negative, -got)


def test_training_mode_is_given_back(model):
    model.train()
    sampler(model).sample([[5]], num_generations=2, max_new_tokens=2, temperature=1.0, seeds=[0])
    assert model.training
    model.eval()


def test_batches_are_made_of_prompts_of_like_length(model, monkeypatch: pytest.MonkeyPatch):
    """Prompts run longest first and are prefilled once; answers keep the order of the prompts."""
    prefilled = []
    prefill = TransformersSampler._prefill
    monkeypatch.setattr(
        TransformersSampler,
        "_prefill",
        lambda self, prompts, cache: prefilled.append(prompts) or prefill(self, prompts, cache),
    )
    sampler(model, batch_size=8).sample(
        PROMPTS, num_generations=4, max_new_tokens=2, temperature=1.0, seeds=SEEDS
    )
    long, middle, short, shortest = PROMPTS[2], PROMPTS[0], PROMPTS[3], PROMPTS[1]
    assert prefilled == [[long, middle], [short, shortest]]


def test_bfloat16_logprobs_are_those_of_the_bfloat16_forward_pass(model):
    """The sampler's log-probs are closer to a full bfloat16 pass than to a float32 pass.

    They are not equal to it, since torch 2.8 rounds attention to a cache differently. Log-probs of
    a float32 sampler would be 10,000 times closer to the float32 pass.
    """
    groups = sampler(model, dtype=torch.bfloat16).sample(
        PROMPTS, num_generations=4, max_new_tokens=8, temperature=0.7, seeds=SEEDS
    )
    errors: dict[bool, list[float]] = {True: [], False: []}
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            ids = torch.tensor([prompt + completion.token_ids])
            for bf16 in errors:
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    logits = model(ids).logits[0, len(prompt) - 1 : -1].float() / 0.7
                logprobs = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
                errors[bf16] += (torch.tensor(completion.logprobs) - logprobs).abs().tolist()
    assert sum(errors[True]) < sum(errors[False])
    assert max(errors[True]) < 0.02


def test_a_static_cache_is_captured_once(model):
    """Every step of batches of one shape is the same graph; on CUDA, it is a CUDA graph."""
    graphs = []
    fixed = sampler(model, static_cache=True)
    compiled = torch.compile(
        model.__call__, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph
    )
    decoder = fixed._decoder
    fixed._decoder = lambda *arguments: (compiled, *decoder(*arguments)[1:])  # type: ignore
    options = {"num_generations": 4, "max_new_tokens": 8, "temperature": 1.0, "seeds": SEEDS}
    eager = sampler(model, static_cache=True).sample(PROMPTS, **options)
    for _ in range(2):
        groups = fixed.sample(PROMPTS, **options)
        for group, expected in zip(groups, eager, strict=True):
            assert [c.token_ids for c in group] == [c.token_ids for c in expected]
    assert len(graphs) == 1


def test_a_static_cache_is_refused_where_layers_slide():
    from transformers import MistralConfig, MistralForCausalLM

    sliding = MistralForCausalLM(
        MistralConfig(
            vocab_size=20,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            sliding_window=4,
        )
    )
    with pytest.raises(ValueError, match=r'MistralForCausalLM has layers.*"dynamic"'):
        sampler(sliding, static_cache=True).sample(
            [[5]], num_generations=2, max_new_tokens=3, temperature=1.0, seeds=[0]
        )
