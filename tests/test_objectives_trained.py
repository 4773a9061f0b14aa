"""Objectives in the trainer: a step is the formula of the stock model, and a run learns by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from formed_cases import CASES as FORMED
from objective_cases import CASES, Case
from test_trainer import CONFIG, lines, rarely_equal, run, same_bits, sampled
from transformers import AutoModelForCausalLM

from grao_fast.config import GRAOConfig
from grao_fast.data.packing import split_by_tokens
from grao_fast.models.policy import Policy
from grao_fast.objectives import OBJECTIVES
from grao_fast.sampling.loaded import LoadedPolicy
from grao_fast.sampling.loading import load_policy
from grao_fast.system.errors import UserError
from grao_fast.training.coefficients import to_groups
from grao_fast.training.rollout import Rollout
from grao_fast.training.step import micro_batch_loss

NAMES = [name for name in CASES if name in OBJECTIVES]
FORMED_NAMES = [name for name in FORMED if name in OBJECTIVES]


@pytest.fixture(scope="module")
def rollout(tiny_model: Path) -> Rollout:
    """Rewards from 0 to 1; one group is dead, and one sample has no reward."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grao_fast.sampling.loading.check_parity", lambda *args, **options: None)
        patch.setattr("grao_fast.sampling.loading.check_sampler", lambda *args, **options: None)
        made = sampled(load_policy(tiny_model, config=CONFIG), rarely_equal, CONFIG)
    rewards_NK = made.rewards_NK / 100
    rewards_NK[1], rewards_NK[2, 0] = 0.1, torch.nan
    return replace(made, rewards_NK=rewards_NK)


def naive_loss(model: Any, rollout: Rollout, case: Case) -> torch.Tensor:
    """The specification of full logits, every sequence by itself."""
    logprob_T, _, sequence_T = of_tokens(model, rollout)
    options = {**case.options}
    if "max_new_tokens" in options:
        options["max_new_tokens"] = CONFIG.max_new_tokens
    return case.formula(logprob_T, sequence_T, rollout.rewards_NK, **options)


def of_tokens(model: Any, rollout: Rollout) -> tuple[torch.Tensor, ...]:
    """The log-prob and the entropy of every token, by full logits, and its sequence."""
    K = rollout.rewards_NK.shape[1]
    logprobs, entropies, sequences = [], [], []
    for n, (prompt, completions) in enumerate(
        zip(rollout.prompts, rollout.completions, strict=True)
    ):
        for k, ids in enumerate([*(c.token_ids for c in completions), prompt.reference_ids]):
            tokens = torch.tensor([prompt.prompt_ids + ids])
            logits = model(tokens).logits[0, len(prompt.prompt_ids) - 1 : -1] / CONFIG.temperature
            logprobs_LV = logits.log_softmax(-1)
            logprobs.append(logprobs_LV[torch.arange(len(ids)), torch.tensor(ids)])
            entropies.append(-(logprobs_LV.exp() * logprobs_LV).sum(-1))
            sequences += [n * K + k] * len(ids)
    return torch.cat(logprobs), torch.cat(entropies), torch.tensor(sequences)


@pytest.fixture(scope="module")
def double(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> LoadedPolicy:
    return load_policy(tiny_model, config=CONFIG)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_the_formula(
    name: str, rollout: Rollout, loaded: LoadedPolicy, double: Any
) -> None:
    """Loss and every gradient, in several micro-batches, against float64 of the stock model."""
    case, policy = CASES[name], loaded.policy
    options = replace(CONFIG.objective_options, formula=case.objective)
    groups = to_groups(replace(rollout, progress=case.progress), options)
    policy.model.zero_grad()
    double.zero_grad()
    total = 0.0
    with policy.updating():
        for part in split_by_tokens(groups, 60):
            batch = policy.lay_out(part)
            loss = micro_batch_loss(policy, batch, options, num_prompts=len(groups)).loss
            loss.backward()
            total += float(loss.detach())
    expected = naive_loss(double, rollout, case)
    expected.backward()
    assert_same_step(policy, double, total, expected)


def assert_same_step(policy: Policy, double: Any, total: float, expected: torch.Tensor) -> None:
    assert abs(total - float(expected.detach())) < 1e-5 * max(1.0, abs(float(expected.detach())))
    pairs = zip(policy.model.named_parameters(), double.parameters(), strict=True)
    for (parameter, ours), theirs in pairs:
        error = float((ours.grad - theirs.grad).abs().max())
        assert error <= 1e-5 * max(1e-2, float(theirs.grad.abs().max())), parameter


@pytest.mark.parametrize("name", FORMED_NAMES)
def test_a_step_with_old_and_initial_logprobs_is_the_formula(
    name: str, rollout: Rollout, loaded: LoadedPolicy, double: Any
) -> None:
    """Loss and every gradient of an update that is not a step's first, as above."""
    case, policy = FORMED[name], loaded.policy
    K = rollout.rewards_NK.shape[1]
    double.zero_grad()
    logprob_T, entropy_T, sequence_T = of_tokens(double, rollout)
    steps = torch.tensor(case.steps, dtype=torch.float64)
    step_T = steps[torch.arange(len(logprob_T)) % len(steps)]
    is_reference_T = sequence_T % K == K - 1
    old_T = torch.where(is_reference_T, torch.nan, logprob_T.detach() - step_T)
    ref_T = logprob_T.detach() + step_T.flip(0)
    expected = case.loss(
        {
            "logprob_T": logprob_T,
            "entropy_T": entropy_T,
            "old_logprob_T": old_T,
            "ref_logprob_T": ref_T,
            "sequence_T": sequence_T,
            "rewards_NK": rollout.rewards_NK,
        }
    )
    expected.backward()

    formula = case.objective
    options = replace(CONFIG.objective_options, formula=formula, clip=formula.clip)
    groups = to_groups(rollout, options)
    number = {id(group): n for n, group in enumerate(groups)}
    policy.model.zero_grad()
    total = 0.0
    with policy.updating():
        for part in split_by_tokens(groups, 60):
            batch = policy.lay_out(part)
            numbers = torch.tensor([number[id(group)] for group in part])
            of_step_T = numbers[batch.sequence_T // K] * K + batch.sequence_T % K
            place_T = torch.cat([(sequence_T == s).nonzero()[:, 0] for s in of_step_T.unique()])
            place_T = place_T[of_step_T.argsort(stable=True).argsort()]
            loss = micro_batch_loss(
                policy,
                batch,
                options,
                num_prompts=len(groups),
                old_logprob_T=old_T[place_T].float() if "old_logprob_T" in case.inputs else None,
                ref_logprob_T=ref_T[place_T].float(),
            )
            loss.loss.backward()
            total -= float(loss.policy.terms_C.sum())
    assert_same_step(policy, double, total, expected)


@pytest.mark.parametrize("name", [*NAMES, *FORMED_NAMES])
def test_trains(name: str, tiny_model: Path, tmp_path: Path, unchecked: None) -> None:
    samples = OBJECTIVES[name].needs_samples
    G = 2 if samples else GRAOConfig.num_generations  # of none: an error at other values
    options = {"objective": name, "num_generations": G, "num_iterations": 2}
    config = CONFIG.replace(**options, max_steps=2, save_steps=0)
    run(tiny_model, tmp_path, config=config, reward=rarely_equal if samples else None)
    rows = [row for row in lines(tmp_path) if "loss" in row]
    assert len(rows) == 2 and not same_bits(tmp_path / "final", tiny_model)
    terms = [f"objective/{term}" for term in OBJECTIVES[name].terms]
    for row in rows:
        assert row["loss"] == pytest.approx(-sum(row[term] for term in terms), abs=1e-6)
        assert row["grad_norm"] > 0


def test_schedules_follow_the_run(tiny_model: Path, tmp_path: Path, unchecked: None) -> None:
    """Where mu falls from 1 to 0 in half a run of two steps, each term has a step of its own."""
    objective = "chord(mu_start=1.0, mu_end=0.0)"
    config = CONFIG.replace(objective=objective, max_steps=2, save_steps=0, num_generations=2)
    run(tiny_model, tmp_path, config=config, reward=rarely_equal)
    first, last = (row for row in lines(tmp_path) if "loss" in row)
    assert first["objective/policy"] == 0 != first["objective/imitation"]
    assert last["objective/imitation"] == 0 != last["objective/policy"]


def test_every_objective_is_a_choice_of_the_configuration() -> None:
    for name in NAMES:
        assert type(GRAOConfig(objective=name).objective_options.formula) is OBJECTIVES[name]


def test_clipping_has_no_effect_on_references() -> None:
    with pytest.raises(UserError, match="objective='sft', which clips no ratio of tokens"):
        GRAOConfig(objective="sft", epsilon=0.1, num_iterations=2)
