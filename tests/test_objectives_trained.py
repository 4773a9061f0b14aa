"""Objectives in the trainer: a step is the formula of the stock model, and a run learns by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from objective_cases import CASES, Case
from test_trainer import CONFIG, lines, rarely_equal, run, same_bits, sampled
from transformers import AutoModelForCausalLM

from grao_fast.config import GRAOConfig
from grao_fast.data.packing import split_by_tokens
from grao_fast.objectives import OBJECTIVES
from grao_fast.sampling.loaded import LoadedPolicy
from grao_fast.sampling.loading import load_policy
from grao_fast.system.errors import UserError
from grao_fast.training.rollout import Rollout, to_groups
from grao_fast.training.step import micro_batch_loss

NAMES = [name for name in CASES if name in OBJECTIVES]


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
    K = rollout.rewards_NK.shape[1]
    logprobs, sequences = [], []
    for n, (prompt, completions) in enumerate(
        zip(rollout.prompts, rollout.completions, strict=True)
    ):
        for k, ids in enumerate([*(c.token_ids for c in completions), prompt.reference_ids]):
            tokens = torch.tensor([prompt.prompt_ids + ids])
            logits = model(tokens).logits[0, len(prompt.prompt_ids) - 1 : -1] / CONFIG.temperature
            logprobs.append(logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)])
            sequences += [n * K + k] * len(ids)
    options = {**case.options}
    if "max_new_tokens" in options:
        options["max_new_tokens"] = CONFIG.max_new_tokens
    return case.formula(torch.cat(logprobs), torch.tensor(sequences), rollout.rewards_NK, **options)


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
    assert abs(total - float(expected.detach())) < 1e-5 * max(1.0, abs(float(expected.detach())))
    pairs = zip(policy.model.named_parameters(), double.parameters(), strict=True)
    for (parameter, ours), theirs in pairs:
        error = float((ours.grad - theirs.grad).abs().max())
        assert error <= 1e-5 * max(1e-2, float(theirs.grad.abs().max())), parameter


@pytest.mark.parametrize("name", NAMES)
def test_trains(name: str, tiny_model: Path, tmp_path: Path, unchecked: None) -> None:
    config = CONFIG.replace(objective=name, max_steps=2, save_steps=0, num_generations=2)
    run(tiny_model, tmp_path, config=config, reward=rarely_equal)
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
