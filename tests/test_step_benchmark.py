"""The benchmark of a step is fair: both sides do the same work, and neither is broken."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from step_problem import MODELS, Case, make_model, make_prompts, make_rollout, useful_tokens
from step_sides import TRL, Ours, grao_weights, naive_gradient

CASE = Case(prompts=3, samples=3, prompt_tokens=9, response_tokens=10, dead=1 / 3)
VOCAB = MODELS["tiny"]["vocab"]
K = CASE.samples + 1


@pytest.fixture(scope="module")
def model():
    return make_model("tiny", "cpu")


@pytest.fixture(scope="module")
def rollout():
    return make_rollout(CASE, VOCAB)


@pytest.fixture(scope="module")
def ours(model) -> Ours:
    return Ours(copy.deepcopy(model[0]), model[1])


@pytest.fixture(scope="module")
def trl(model) -> TRL:
    pytest.importorskip("trl", reason="trl is not installed: pip install 'trl>=1.16'")
    return TRL(copy.deepcopy(model[0]), model[1], K=K, longest=CASE.longest_response)


def assert_equal(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Relative 1e-5 in the max norm of each tensor: float32 through two layers."""
    assert len(actual) == len(expected)
    for ours, truth in zip(actual, expected, strict=True):
        assert float((ours - truth).abs().max()) <= 1e-5 * float(truth.abs().max())


def test_a_rollout_is_what_its_case_says(rollout):
    lengths = [len(each.token_ids) for group in rollout.completions for each in group]
    lengths += [len(prompt.reference_ids) for prompt in rollout.prompts]
    assert min(lengths) == 5 and max(lengths) == CASE.longest_response
    assert sum(lengths) / len(lengths) == pytest.approx(CASE.response_tokens, rel=0.05)
    dead_N = (grao_weights(rollout) == 0).all(1)
    assert dead_N.tolist() == [True, False, False]


def test_our_gradient_is_the_naive_formulas(model, ours, rollout):
    loss, gradient = ours.gradient(rollout)
    expected, truth = naive_gradient(model[0], rollout, grao_weights(rollout))
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_equal(gradient, truth)


@pytest.mark.parametrize("parts", [1, CASE.prompts])
def test_trls_gradient_is_ours(ours, trl, rollout, parts: int):
    assert_equal(trl.gradient(rollout, parts)[1], ours.gradient(rollout)[1])


def test_trls_batch_holds_our_tokens(ours, trl, rollout):
    (batch,) = trl.load(rollout, 1)
    theirs = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]
    sequences = [
        ids
        for prompt, group in zip(rollout.prompts, rollout.completions, strict=True)
        for ids in [*(each.token_ids for each in group), prompt.reference_ids]
    ]
    assert theirs == sequences
    assert useful_tokens(rollout) == sum(map(len, sequences))


def test_trl_by_itself_is_its_own_formula(model, trl, rollout):
    """Its advantages are (r - mean) / (std + 1e-4); its loss -mean_s A_s, as every ratio is 1; and
    the gradient is that of -mean_s A_s L(s)."""
    scored = trl.score(rollout)
    rewards_NK = rollout.rewards_NK
    spread_N1 = rewards_NK.std(1, keepdim=True)
    advantages_NK = (rewards_NK - rewards_NK.mean(1, keepdim=True)) / (spread_N1 + 1e-4)
    assert torch.allclose(scored["advantages"].double(), advantages_NK.flatten(), atol=1e-5)

    scored["advantages"] = scored["advantages"] + 0.25  # or the mean would be 0
    loss = trl.backward([scored])
    assert loss == pytest.approx(-0.25, abs=1e-5)
    truth = naive_gradient(model[0], rollout, (advantages_NK + 0.25) / K)[1]
    parameters = trl.trainer.model.parameters()
    assert_equal([p.grad for p in parameters], truth)
    trl.trainer.model.zero_grad()


@torch.no_grad()
def assert_moved_alike(before, mine, theirs) -> None:
    """Adam's first step is the gradient's sign, which may differ where it is all rounding."""
    moved = (mine - before).abs().max()
    assert float(moved) > 0
    assert float(((mine - theirs).abs() <= 0.1 * moved).float().mean()) > 0.99


def test_a_step_moves_both_models_alike(model, ours, trl, rollout):
    tokens = {ours.step(rollout), trl.step(trl.load(rollout, 1)), useful_tokens(rollout)}
    assert len(tokens) == 1
    models = model[0], ours.policy.model, trl.trainer.model
    for before, mine, theirs in zip(*(each.parameters() for each in models), strict=True):
        assert_moved_alike(before, mine, theirs)


@pytest.mark.parametrize("mean_length", [4.0, math.inf])
def test_both_sample_lengths_of_one_distribution(mean_length: float):
    """Means of 512 lengths within 4 standard deviations of each other; alike where no EOS is."""
    pytest.importorskip("trl", reason="trl is not installed: pip install 'trl>=1.16'")
    model, tokenizer = make_model("tiny", "cpu", mean_length=mean_length)
    ours = Ours(copy.deepcopy(model), tokenizer)
    trl = TRL(copy.deepcopy(model), tokenizer, K=64, longest=16)
    prompts = make_prompts(CASE.replace(prompts=8), VOCAB)
    counts = [side.sample(prompts, 64, 16, 0) for side in (ours, trl)]
    if mean_length == math.inf:
        assert counts == [8 * 64 * 16] * 2
        return
    hazard = 1 / mean_length
    spread = math.sqrt(2 * 512 * (1 - hazard)) / hazard  # of a difference of sums; cut, it is less
    assert abs(counts[0] - counts[1]) <= 4 * spread
    expected = 512 * (1 - (1 - hazard) ** 16) / hazard
    assert all(count == pytest.approx(expected, abs=4 * spread) for count in counts)
