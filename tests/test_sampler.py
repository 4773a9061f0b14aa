"""The sampler draws from the model's distribution, reproducibly, and says with what log-prob."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from grao_fast.rollout.transformers import TransformersSampler

EOS = 1
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [16, 17]]


@pytest.fixture(scope="module")
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


def sampler(model, batch_size: int = 64, eos=(EOS,)) -> TransformersSampler:
    return TransformersSampler(model, eos_token_ids=eos, pad_token_id=0, batch_size=batch_size)


def test_greedy_equals_generate(model):
    groups = sampler(model, batch_size=3).sample(
        PROMPTS, num_generations=1, max_new_tokens=12, temperature=0.0, seed=0
    )
    for prompt, group in zip(PROMPTS, groups, strict=True):
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=EOS
        )[0, len(prompt) :]
        assert group[0].token_ids == expected.tolist()


def test_logprobs_are_those_of_the_full_forward_pass(model):
    """Every third token ends a completion, so that rows leave the batch at different times."""
    eos = range(1, model.config.vocab_size, 3)
    groups = sampler(model, eos=eos).sample(
        PROMPTS, num_generations=16, max_new_tokens=20, temperature=0.7, seed=3
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


def test_frequencies_follow_the_distribution(model):
    """4,000 draws of one token: every frequency within 4 standard deviations."""
    n = 4000
    groups = sampler(model, batch_size=n).sample(
        [[5, 6, 7]], num_generations=n, max_new_tokens=1, temperature=1.3, seed=0
    )
    counts = torch.bincount(
        torch.tensor([c.token_ids[0] for c in groups[0]]), minlength=model.config.vocab_size
    )
    with torch.no_grad():
        p = (model(torch.tensor([[5, 6, 7]])).logits[0, -1] / 1.3).softmax(-1)
    assert bool(((counts - n * p).abs() <= 4 * (n * p * (1 - p)).sqrt() + 1).all())


def test_the_seed_decides(model):
    def draw(seed: int) -> list[list[int]]:
        groups = sampler(model).sample(
            PROMPTS, num_generations=4, max_new_tokens=8, temperature=1.0, seed=seed
        )
        return [completion.token_ids for group in groups for completion in group]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_training_mode_is_given_back(model):
    model.train()
    sampler(model).sample([[5]], num_generations=2, max_new_tokens=2, temperature=1.0, seed=0)
    assert model.training
    model.eval()
