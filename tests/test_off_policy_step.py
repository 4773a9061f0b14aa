"""A step off policy: importance weights, clipped ratios and KL, against the specification.

The truth is `grao_fast.kernels.reference` in float64, on the hidden states of the stock model.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from published import assert_as_published
from test_trainer import CONFIG, StopAt, lines, run, same_bits, step_groups
from tolerance import gradients_of
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM

from grao_fast.data.packing import split_by_tokens
from grao_fast.kernels import reference
from grao_fast.sampling.loading import load_policy
from grao_fast.training.coefficients import to_groups
from grao_fast.training.step import micro_batch_loss, reference_logprobs, update

OFF_POLICY = CONFIG.replace(temperature=0.8)


def double_of(tiny_model) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)


def rows_of(model, rollout) -> tuple[Tensor, Tensor, Tensor]:
    """hidden_TD, target_T and sequence_T of every sequence, one after another, unpacked."""
    hidden, targets, sequences = [], [], []
    for n, (prompt, group) in enumerate(zip(rollout.prompts, rollout.completions, strict=True)):
        K = len(group) + 1
        for k, ids in enumerate([*(c.token_ids for c in group), prompt.reference_ids]):
            tokens = torch.tensor([prompt.prompt_ids + ids])
            hidden.append(model.model(tokens).last_hidden_state[0, len(prompt.prompt_ids) - 1 : -1])
            targets += ids
            sequences += [n * K + k] * len(ids)
    return torch.cat(hidden), torch.tensor(targets), torch.tensor(sequences)


def truth(model, rollout, config, **off_policy) -> reference.ReferenceLoss:
    """The specification's loss of a whole step, differentiable in the double model's parameters."""
    hidden_TD, target_T, sequence_T = rows_of(model, rollout)
    return reference.grao_loss(
        hidden_TD,
        model.lm_head.weight,
        target_T,
        sequence_T,
        rollout.rewards_NK,
        beta=config.beta,
        lam=config.lam,
        temperature=config.temperature,
        **off_policy,
    )


def sampler_logprobs(rollout) -> Tensor:
    """In the order of `rows_of`; NaN for references."""
    values = []
    for prompt, group in zip(rollout.prompts, rollout.completions, strict=True):
        values += [value for completion in group for value in completion.logprobs]
        values += [math.nan] * len(prompt.reference_ids)
    return torch.tensor(values, dtype=torch.float64)


def assert_same_gradients(model: torch.nn.Module, double: torch.nn.Module) -> None:
    for (name, ours), theirs in zip(model.named_parameters(), double.parameters(), strict=True):
        error = float((ours.grad - theirs.grad).abs().max())
        assert error <= 1e-5 * max(1e-2, float(theirs.grad.abs().max())), name


@pytest.mark.parametrize("reference_advantage", ["signed", "clip", "floor", "tapered"])
def test_references_that_lose_are_treated_as_specified(tiny_model, reference_advantage: str):
    config = OFF_POLICY.replace(reference_advantage=reference_advantage)
    loaded, rollout, _ = step_groups(tiny_model, config)
    policy, objective = loaded.policy, config.objective_options
    rewards_NK = rollout.rewards_NK.clone()
    rewards_NK[:, -1] = rewards_NK[:, :-1].amin(1) - 0.1  # below all samples
    advantages_NK = objective.formula.advantages(rewards_NK)
    rollout = dataclasses.replace(rollout, rewards_NK=rewards_NK, advantages_NK=advantages_NK)
    groups = to_groups(rollout, objective)
    total = 0.0
    with policy.updating():
        for part in split_by_tokens(groups, 60, share_prefix=config.share_prefix):
            batch = policy.lay_out(part)
            loss = micro_batch_loss(policy, batch, objective, num_prompts=len(groups))
            loss.loss.backward()
            total += float(loss.loss.detach())
    double = double_of(tiny_model)
    expected = truth(double, rollout, config, reference_advantage=reference_advantage)
    expected.loss.backward()
    values = total, expected.loss.detach()
    gradients = gradients_of(policy.model), gradients_of(double)
    way = 'grao_fast.train, a step of it with reference_advantage="floor"'
    assert_as_published(way, *values, *gradients, kind=reference_advantage)
    assert abs(total - float(expected.loss.detach())) < 1e-5
    assert_same_gradients(policy.model, double)
    weight_N = reference.sequence_weights(expected.advantages_NK, reference_advantage="signed")[
        :, -1
    ]
    assert (weight_N < 0).all()


@pytest.mark.parametrize("share_prefix", [True, False])
def test_importance_weights_are_those_of_the_known_mismatch(tiny_model, share_prefix: bool):
    """A sampler off by 0.5, and by 2 nats on every third token: weights e^0.5, and 3, the cap."""
    config = OFF_POLICY.replace(share_prefix=share_prefix)
    loaded, rollout, _ = step_groups(tiny_model, config)
    policy = loaded.policy

    def shifted(logprobs: list[float]) -> list[float]:
        return [value - (2.0 if t % 3 == 0 else 0.5) for t, value in enumerate(logprobs)]

    rollout = dataclasses.replace(
        rollout,
        completions=[
            [dataclasses.replace(c, logprobs=shifted(c.logprobs)) for c in group]
            for group in rollout.completions
        ],
    )
    groups = to_groups(rollout, config.objective_options)
    corrected = config.replace(use_vllm=True)
    assert corrected.objective_options.sampler_cap == 3.0 < math.exp(2)
    total = 0.0
    with policy.updating():
        for part in split_by_tokens(groups, 60, share_prefix=share_prefix):
            batch = policy.lay_out(part)
            loss = micro_batch_loss(
                policy, batch, corrected.objective_options, num_prompts=len(groups)
            )
            loss.loss.backward()
            total += float(loss.loss.detach())
    double = double_of(tiny_model)
    expected = truth(
        double, rollout, config, sampler_logprob_T=sampler_logprobs(rollout), sampler_cap=3.0
    )
    expected.loss.backward()
    assert abs(total - float(expected.loss.detach())) < 1e-5
    assert_same_gradients(policy.model, double)
    plain = double_of(tiny_model)
    truth(plain, rollout, config).loss.backward()
    gap = (plain.lm_head.weight.grad - double.lm_head.weight.grad).abs().max()
    assert gap > 0.1 * double.lm_head.weight.grad.abs().max()


def test_the_entropy_is_that_of_the_sampled_tokens(tiny_model):
    """At the sampling temperature, and of living samples alone, not of references."""
    loaded, rollout, _ = step_groups(tiny_model, OFF_POLICY)
    double = double_of(tiny_model)
    hidden_TD, _, sequence_T = rows_of(double, rollout)
    entropy_T = reference.token_entropies(
        hidden_TD, double.lm_head.weight, temperature=OFF_POLICY.temperature
    )
    K = OFF_POLICY.num_generations + 1
    weight_T = reference.sequence_weights(rollout.advantages_NK).flatten()[sequence_T]
    expected = entropy_T[(sequence_T % K != K - 1) & (weight_T != 0)].mean()
    metrics = one_update(loaded, rollout, OFF_POLICY, lr=0.1)
    assert metrics["entropy"] == pytest.approx(float(expected), rel=1e-5)
    assert metrics["entropy"] != pytest.approx(float(entropy_T.mean()), rel=1e-4)


def test_the_mismatch_is_measured_over_the_tokens_that_are_computed(tiny_model):
    loaded, rollout, groups = step_groups(tiny_model, OFF_POLICY)
    rollout = dataclasses.replace(
        rollout,
        completions=[
            [
                dataclasses.replace(c, logprobs=[v - (0.25 if k else 0.75) for v in c.logprobs])
                for k, c in enumerate(group)
            ]
            for group in rollout.completions
        ],
    )
    lengths = [0, 0]
    for group, completions in zip(groups, rollout.completions, strict=True):
        for k, completion in enumerate(completions):
            lengths[k > 0] += len(completion.token_ids) * bool(group.live_K[k])
    metrics = one_update(loaded, rollout, OFF_POLICY, lr=0.0)
    mean = (0.75 * lengths[0] + 0.25 * lengths[1]) / sum(lengths)
    assert 0 < lengths[0] < lengths[1]
    assert metrics["sampling/logp_diff"] == pytest.approx(mean, abs=1e-5)
    assert metrics["sampling/logp_diff_max"] == pytest.approx(0.75, abs=1e-4)


def one_update(loaded, rollout, config, *, lr: float) -> dict[str, float]:
    optimizer = torch.optim.SGD(loaded.model.parameters(), lr=lr)
    return update(
        loaded.policy,
        optimizer,
        LambdaLR(optimizer, lambda step: 1.0),
        rollout,
        objective=config.objective_options,
        optimisation=config.optimisation,
        max_tokens=config.max_tokens_per_microbatch,
        beginning=loaded.beginning,
    )


def test_updates_after_the_first_hold_the_ratios_of_samples(tiny_model):
    """Three updates by SGD against the same three of the specification."""
    config = OFF_POLICY.replace(
        num_iterations=3, epsilon=0.01, epsilon_high=0.02, max_grad_norm=0.0, weight_decay=0.0
    )
    loaded, rollout, _ = step_groups(tiny_model, config)
    double, lr = double_of(tiny_model), 0.5
    descent = torch.optim.SGD(double.parameters(), lr=lr)
    K = config.num_generations + 1
    off_policy: dict = {}
    held = []
    for _ in range(3):
        loss = truth(double, rollout, config, **off_policy)
        descent.zero_grad()
        loss.loss.backward()
        descent.step()
        sequence_T = rows_of(double, rollout)[2]
        if off_policy:
            weight_T = reference.sequence_weights(loss.advantages_NK).flatten()[sequence_T]
            rho_T = (loss.logprob_T - off_policy["old_logprob_T"]).exp()
            rising, falling = (weight_T > 0) & (rho_T > 1.02), (weight_T < 0) & (rho_T < 0.99)
            held.append(float((rising | falling)[~rho_T.isnan()].double().mean()))
        else:
            is_sample_T = sequence_T % K != K - 1
            old_logprob_T = torch.where(is_sample_T, loss.logprob_T, torch.nan)
            off_policy = {"old_logprob_T": old_logprob_T, "clip": config.objective_options.clip}
            first = float(loss.loss.detach())
    start = {name: p.detach().clone() for name, p in loaded.model.named_parameters()}
    metrics = one_update(loaded, rollout, config, lr=lr)
    assert metrics["loss"] == pytest.approx(first, abs=1e-5)
    assert 0.01 < sum(held) / 2 < 0.99
    assert metrics["clip_ratio/region_mean"] == pytest.approx(sum(held) / 2)
    assert metrics["tokens"] % 3 == 0
    for (name, ours), theirs in zip(
        loaded.model.named_parameters(), double.parameters(), strict=True
    ):
        theirs = theirs.detach()
        distance = float((theirs - start[name]).abs().max())
        rounding = 4 * torch.finfo(torch.float32).eps * float(theirs.abs().max())
        assert float((ours.detach() - theirs).abs().max()) <= 1e-4 * distance + rounding, name


def test_gspo_clips_ratios_of_sequences(tiny_model):
    """After a step of some length; a step of no length leaves all ratios 1."""
    config = OFF_POLICY.replace(objective="gspo", max_grad_norm=0.0)
    loaded, rollout, _ = step_groups(tiny_model, config)
    bounded = config.replace(objective="gspo(low=0.2, high=0.3)", num_iterations=2)
    runs = ((config, 0.0), (bounded, 0.0), (bounded, 0.5))
    first, still, moved = (one_update(loaded, rollout, each, lr=lr) for each, lr in runs)
    assert "clip_ratio/region_mean" not in first and still["clip_ratio/region_mean"] == 0
    assert 0 < moved["clip_ratio/region_mean"] < 1


def test_one_iteration_knows_no_clip(tiny_model):
    loaded, rollout, _ = step_groups(tiny_model, OFF_POLICY)
    assert "clip_ratio/region_mean" not in one_update(loaded, rollout, OFF_POLICY, lr=0.1)


def start_logprobs(loaded, batch, config) -> Tensor:
    return reference_logprobs(
        loaded.policy, loaded.beginning, batch, temperature=config.temperature
    )


def moved(policy) -> None:
    """Weights a little away from where training began, so that the KL is not 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("share_prefix", [True, False])
def test_the_kl_term_pulls_towards_the_policy_that_training_began_with(tiny_model, share_prefix):
    """Loss and gradients, samples of dead groups included: one group's rewards are made equal."""
    config = OFF_POLICY.replace(kl_coef=0.3, share_prefix=share_prefix)
    loaded, rollout, _ = step_groups(tiny_model, config)
    policy = loaded.policy
    moved(policy)
    rollout.rewards_NK[0] = 0.5
    rollout.advantages_NK[0] = 0.0
    groups = to_groups(rollout, config.objective_options)
    assert groups[0].live_K.tolist() == [True] * 4 + [False]
    total = kl = 0.0
    with policy.updating():
        for part in split_by_tokens(groups, 60, share_prefix=share_prefix):
            batch = policy.lay_out(part)
            ref_logprob_T = start_logprobs(loaded, batch, config)
            assert policy.model.training
            loss = micro_batch_loss(
                policy,
                batch,
                config.objective_options,
                num_prompts=len(groups),
                ref_logprob_T=ref_logprob_T,
            )
            loss.loss.backward()
            total, kl = total + float(loss.loss.detach()), kl + float(loss.policy.kl)
    original, double = double_of(tiny_model), double_of(tiny_model)
    double.load_state_dict(policy.model.state_dict())
    hidden_TD, target_T, _ = rows_of(original, rollout)
    ref_logprob_T = reference.token_logprobs(
        hidden_TD, original.lm_head.weight, target_T, temperature=config.temperature
    ).detach()
    expected = truth(double, rollout, config, ref_logprob_T=ref_logprob_T, kl_coef=0.3)
    expected.loss.backward()
    assert float(expected.kl.detach()) > 0.01
    assert abs(total - float(expected.loss.detach())) < 1e-5
    assert abs(kl - float(expected.kl.detach())) < 1e-5
    assert_same_gradients(policy.model, double)


def test_an_adapters_kl_is_from_the_model_without_it(tiny_model):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = OFF_POLICY.replace(kl_coef=0.3)
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5)
    loaded = load_policy(tiny_model, config=config, peft_config=adapter)
    policy = loaded.policy
    moved(loaded)
    for layer in policy.causal_lm.model.layers:
        layer.self_attn.attention_dropout = 0.5  # which only training applies
    plain, rollout, _ = step_groups(tiny_model, config)
    groups = to_groups(rollout, config.objective_options)
    with policy.updating():
        batch = policy.lay_out(groups)
        actual = start_logprobs(loaded, batch, config)
        assert policy.model.training
        assert all(p.requires_grad == ("lora" in n) for n, p in policy.model.named_parameters())
    with plain.policy.updating():
        expected = start_logprobs(plain, batch, config)
    assert torch.allclose(actual, expected, atol=1e-5)


def test_kl_and_iterations_in_a_run(tiny_model, tmp_path: Path):
    """The first step's KL is 0, later ones' is not; a resumed run measures from the same start."""
    config = CONFIG.replace(kl_coef=0.1, num_iterations=2, max_steps=4, save_steps=2)
    run(tiny_model, tmp_path / "whole", config=config)
    rows = lines(tmp_path / "whole")
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows[-1]["kl"] > 1e-3
    assert all("clip_ratio/region_mean" in row for row in rows)
    run(tiny_model, tmp_path / "parts", config=config, callbacks=[StopAt(2)])
    run(tiny_model, tmp_path / "parts", config=config, resume_from_checkpoint=True)
    assert same_bits(tmp_path / "whole" / "final", tmp_path / "parts" / "final")
    assert lines(tmp_path / "parts") == rows


def test_a_step_without_a_reward_signal_still_has_its_kl(tiny_model):
    config = OFF_POLICY.replace(kl_coef=0.3)
    loaded, rollout, _ = step_groups(tiny_model, config)
    moved(loaded)
    rollout = dataclasses.replace(
        rollout,
        rewards_NK=torch.zeros_like(rollout.rewards_NK),
        advantages_NK=torch.zeros_like(rollout.advantages_NK),
    )
    metrics = one_update(loaded, rollout, config, lr=0.1)
    assert metrics["loss"] == pytest.approx(0.3 * metrics["kl"])
    assert metrics["kl"] > 0
    assert metrics["grad_norm"] > 0
