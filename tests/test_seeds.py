"""What is drawn for a prompt depends on its own seed, and not on what it is sampled with."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from grao_fast.sampling import Completion
from grao_fast.sampling.generate import GenerateSampler
from grao_fast.sampling.model_sampler import Decoding, ModelSampler
from grao_fast.sampling.seeds import prompt_seeds, uniform_numbers
from grao_fast.sampling.transformers import TransformersSampler

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [16, 17], [18, 19, 20]]
SEEDS = prompt_seeds(7, len(PROMPTS))
KINDS = {
    "transformers": (TransformersSampler, {}),
    "static cache": (TransformersSampler, {"static_cache": True}),
    "generate": (GenerateSampler, {}),
    "generate, padded": (GenerateSampler, {"pads": True}),
}


@pytest.fixture(scope="module", params=KINDS)
def sampler(request: pytest.FixtureRequest, tiny_model: Path) -> ModelSampler:
    """Every fifth token ends a completion, so that rows leave the batch at different times."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    eos = range(1, model.config.vocab_size, 5)
    kind, options = KINDS[request.param]
    return kind(model, Decoding(eos_token_ids=eos, pad_token_id=0, batch_size=64), **options)


def sample(sampler: ModelSampler, places: list[int], **options) -> dict[int, list[Completion]]:
    """Completions of the prompts at these places, sampled in one call, by place."""
    options = {
        "num_generations": 4,
        "max_new_tokens": 12,
        "temperature": 1.0,
        "seeds": [SEEDS[i] for i in places],
    } | options
    groups = sampler.sample([PROMPTS[i] for i in places], **options)
    return dict(zip(places, groups, strict=True))


def assert_same(groups: dict[int, list[Completion]], expected: dict[int, list[Completion]]) -> None:
    """Tokens are equal, log-probs to rounding."""
    for place, group in groups.items():
        assert [c.token_ids for c in group] == [c.token_ids for c in expected[place]]
        for ours, theirs in zip(group, expected[place], strict=True):
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


@pytest.mark.parametrize("shares", [1, 2, 5], ids="{} processes".format)
def test_prompts_that_are_shared_out_get_the_same_completions(sampler: ModelSampler, shares: int):
    """Each of `shares` processes samples every so manyth prompt; with five, each samples one."""
    whole = sample(sampler, [0, 1, 2, 3, 4])
    for rank in range(shares):
        assert_same(sample(sampler, list(range(len(PROMPTS)))[rank::shares]), whole)


def test_the_order_of_prompts_does_not_matter(sampler: ModelSampler):
    whole = sample(sampler, [0, 1, 2, 3, 4])
    assert_same(sample(sampler, [3, 0, 4, 2, 1]), whole)


@pytest.mark.parametrize("batch_size", [1, 8, 12])
def test_the_batch_does_not_matter(
    sampler: ModelSampler, batch_size: int, monkeypatch: pytest.MonkeyPatch
):
    whole = sample(sampler, [0, 1, 2, 3, 4])
    monkeypatch.setattr(sampler, "batch_size", batch_size)
    assert_same(sample(sampler, [0, 1, 2, 3, 4]), whole)


def test_a_seed_decides_for_its_own_prompt_alone(sampler: ModelSampler):
    whole = sample(sampler, [0, 1, 2, 3, 4])
    assert sample(sampler, [0, 1, 2, 3, 4]) == whole
    other = sample(sampler, [0, 1, 2, 3, 4], seeds=[*SEEDS[:2], SEEDS[2] + 1, *SEEDS[3:]])
    assert [c.token_ids for c in other.pop(2)] != [c.token_ids for c in whole[2]]
    assert_same(other, whole)


def test_completions_are_the_beginnings_of_longer_ones(sampler: ModelSampler):
    """Numbers are drawn in blocks, whose size does not depend on how many are needed."""
    longer = sample(sampler, [1, 2], max_new_tokens=80)
    for place, group in sample(sampler, [1, 2]).items():
        beginnings = [c.token_ids[:12] for c in longer[place]]
        assert [c.token_ids for c in group] == beginnings


def test_equal_prompts_with_seeds_of_their_own_get_different_completions(sampler: ModelSampler):
    groups = sampler.sample(
        [[5, 6]] * 4,
        num_generations=4,
        max_new_tokens=12,
        temperature=1.0,
        seeds=prompt_seeds(0, 4),
    )
    assert len({str([c.token_ids for c in group]) for group in groups}) == 4


def test_every_completion_of_a_prompt_and_every_token_has_a_number_of_its_own():
    numbers = uniform_numbers([3, 4], 2, torch.device("cpu"))
    drawn = torch.cat([next(numbers) for _ in range(200)], dim=1)
    assert drawn.shape == (4, 200) and drawn.dtype == torch.float64
    assert len(drawn.unique()) == 800
    assert float(drawn.min()) >= 0 and float(drawn.max()) < 1


def test_numbers_leave_the_global_generator_as_it_was():
    state = torch.get_rng_state()
    next(uniform_numbers([3], 2, torch.device("cpu")))
    assert torch.equal(torch.get_rng_state(), state)


def test_seeds_of_prompts_depend_on_the_step_and_the_place_alone():
    state = random.getstate()
    assert prompt_seeds(3, 5)[:2] == prompt_seeds(3, 2)
    assert prompt_seeds(3, 5) != prompt_seeds(4, 5)
    assert len(set(prompt_seeds(3, 1000))) == 1000
    assert random.getstate() == state
    assert all(0 <= seed < 2**31 for seed in prompt_seeds(4, 100))  # vLLM adds a sample's index
