"""linear_grao_loss on both backends against the specification in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from problem import Problem, assert_matches_specification, make_problem, run

from grao_fast.kernels import linear_grao_loss, reference
from grao_fast.kernels.one_pass import loop as one_pass


def peaked(probability: float) -> Problem:
    """Every target has the same high probability: head = 1, hidden = a multiple of its row."""
    V = 16
    problem = make_problem(V=V, D=V)
    gap = math.log(probability * (V - 1) / (1 - probability))
    eye = torch.eye(V, dtype=torch.float64)
    return replace(problem, hidden_TD=gap * eye[problem.target_T], head_VD=eye)


def absent(problem: Problem) -> Problem:
    """A missing sample, a missing reference, and a group of one."""
    rewards_NK = problem.rewards_NK.clone()
    rewards_NK[0, 1] = math.nan
    rewards_NK[1, -1] = math.nan
    rewards_NK[2, 1:] = math.nan
    return replace(problem, rewards_NK=rewards_NK)


def dead_group(problem: Problem) -> Problem:
    rewards_NK = problem.rewards_NK.clone()
    rewards_NK[1] = 0.1
    return replace(problem, rewards_NK=rewards_NK)


PROBLEMS = {
    "plain": make_problem(),
    "tiny_ragged_vocabulary": make_problem(V=7, D=3),
    "vocabulary_of_one_block": make_problem(V=64, D=16),
    "vocabulary_of_three_blocks": make_problem(T=6, V=20011, D=8, N=1, K=3),
    "one_sample": make_problem(N=4, K=2),
    "bias": make_problem(bias=True),
    "temperature": make_problem(temperature=0.7),
    "logit_scale": make_problem(logit_scale=0.0625, logits=20.0),
    "softcap": make_problem(softcap=3.0, logits=4.0, seed=1),
    "all_of_z": make_problem(bias=True, temperature=0.7, logit_scale=2.0, softcap=5.0, logits=3.0),
    "samples_statistics": make_problem(statistics="samples"),
    "clipped_reference": make_problem(reference_advantage="clip", seed=2),
    "floored_reference": make_problem(reference_advantage="floor", seed=2),
    "tapered_reference": make_problem(reference_advantage="tapered", seed=2),
    "policy_gradient": make_problem(beta=0.0, lam=0.0),
    "more_prompts_elsewhere": make_problem(num_prompts=64),
    "absent": absent(make_problem()),
    "dead_group": dead_group(make_problem()),
    "peaked": peaked(0.999),
    "logits_of_1e4": make_problem(logits=1e4),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_matches_specification(problem, dtype, backend, device) -> None:
    assert_matches_specification(problem, dtype, backend, device)


def test_references_of_negative_weight_are_held_or_shaped(backend: str, device: str) -> None:
    """By option: "floor" drops their rows, "tapered" multiplies their gradients by p."""
    problems = {name: PROBLEMS[f"{name}_reference"] for name in ("floored", "tapered")}
    signed = problems["floored"].with_options(reference_advantage="signed")
    expected = run(linear_grao_loss, signed, torch.float32, device, backend=backend)
    weights_NK = reference.sequence_weights(expected["advantages_NK"], reference_advantage="signed")
    weight_T = weights_NK.flatten()[signed.sequence_T].where(signed.sequence_T >= 0, 0)
    lost_T = (weight_T < 0) & (signed.sequence_T % 4 == 3)
    assert lost_T.any() and (weights_NK[:, -1] > 0).any()
    p_T = expected["logprob_T"].exp().cpu()
    for name, factor_T in (("floored", torch.zeros_like(p_T)), ("tapered", p_T)):
        ours = run(linear_grao_loss, problems[name], torch.float32, device, backend=backend)
        factor_T = factor_T.where(lost_T, 1)
        scaled_TD = expected["dhidden_TD"].cpu() * factor_T[:, None]
        torch.testing.assert_close(ours["dhidden_TD"].cpu(), scaled_TD)
        assert ours["logprob_T"][lost_T].isnan().all() == (name == "floored")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_chunks_change_only_rounding(dtype: torch.dtype, backend: str, device: str) -> None:
    problem = make_problem(T=40, bias=True)
    row_bytes = 320 * 6
    assert_matches_specification(
        problem, dtype, backend, device, workspace_mib=7.5 * row_bytes / 2**20
    )


def test_workspace_of_one_row_is_enough(device: str, backend: str) -> None:
    assert_matches_specification(
        make_problem(T=9), torch.float32, backend, device, workspace_mib=1e-6
    )


def test_nothing_to_compute(backend: str, device: str) -> None:
    no_rows = make_problem(T=0)
    masked = make_problem()
    masked = replace(masked, sequence_T=torch.full_like(masked.sequence_T, -1))
    dead = replace(make_problem(), rewards_NK=torch.full((3, 4), 0.1, dtype=torch.float64))
    for problem in (no_rows, masked, dead):
        result = run(linear_grao_loss, problem, torch.float32, device, backend=backend)
        assert result["loss"].item() == 0.0
        assert not result["dhidden_TD"].any() and not result["dhead_VD"].any()
        assert result["logprob_T"].isnan().all()


def without_dropping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat rows as if weights were on a device: keep all, and skip the dead ones."""
    drop_rows = one_pass.find_live_rows

    def keep_rows(inputs, V):
        terms_CT, device = inputs.terms_CT, inputs.hidden_TD.device
        weight_T = terms_CT.sum(0)
        live_T = weight_T != 0
        if inputs.forms is not None:
            live_T |= inputs.forms.kl_coef_R != 0
        target_T = inputs.target_T.where(live_T, 0)
        rows = drop_rows(inputs._replace(terms_CT=torch.ones_like(terms_CT), target_T=target_T), V)
        row = rows.row._replace(weight_R=weight_T.to(device))
        return rows._replace(row=row, terms_CL=terms_CT.to(device), live_L=live_T.to(device))

    monkeypatch.setattr(one_pass, "find_live_rows", keep_rows)


@pytest.mark.parametrize("dropped", [True, False])
def test_rows_without_weight_may_hold_anything(dropped, backend, device, monkeypatch) -> None:
    if not dropped:
        without_dropping(monkeypatch)
    clean = dead_group(make_problem()).with_options(reference_advantage="signed")
    dead_T = (clean.sequence_T < 0) | (clean.sequence_T // 4 == 1)
    hidden_TD, target_T = clean.hidden_TD.clone(), clean.target_T.clone()
    hidden_TD[dead_T], target_T[dead_T] = math.nan, -100
    poisoned = replace(clean, hidden_TD=hidden_TD, target_T=target_T)
    expected = run(linear_grao_loss, clean, torch.bfloat16, device, backend=backend)
    result = run(linear_grao_loss, poisoned, torch.bfloat16, device, backend=backend)
    assert dead_T.any() and not dead_T.all()
    assert not result["dhidden_TD"][dead_T].any()
    assert result["dhidden_TD"][~dead_T].any(1).all()
    for name, value in expected.items():
        assert torch.equal(result[name].nan_to_num(7), value.nan_to_num(7)), name
    assert_matches_specification(poisoned, torch.bfloat16, backend, device)


def test_permuted_groups_permute_the_gradient(backend: str, device: str) -> None:
    problem = make_problem()
    K = problem.rewards_NK.shape[1]
    order_N = torch.tensor([2, 0, 1])
    place_N = order_N.argsort()
    n_T, k_T = problem.sequence_T // K, problem.sequence_T % K
    moved_T = torch.where(problem.sequence_T < 0, -1, place_N[n_T.clamp(min=0)] * K + k_T)
    moved = replace(problem, sequence_T=moved_T, rewards_NK=problem.rewards_NK[order_N])
    one = run(linear_grao_loss, problem, torch.float32, device, backend=backend)
    two = run(linear_grao_loss, moved, torch.float32, device, backend=backend)
    for name in ("dhidden_TD", "dhead_VD", "loss", "logprob_T"):
        torch.testing.assert_close(one[name], two[name], rtol=1e-6, atol=1e-7, equal_nan=True)
    assert torch.equal(one["advantages_NK"][order_N], two["advantages_NK"])


def test_micro_batches_sum_to_the_batch(backend: str, device: str) -> None:
    problem = make_problem(T=40).with_options(num_prompts=3)
    whole = run(linear_grao_loss, problem, torch.float32, device, backend=backend)
    K = problem.rewards_NK.shape[1]
    parts = []
    for n in range(3):
        rows = (problem.sequence_T // K == n).nonzero().squeeze(1)
        part = replace(
            problem,
            hidden_TD=problem.hidden_TD[rows],
            target_T=problem.target_T[rows],
            sequence_T=problem.sequence_T[rows] - n * K,
            rewards_NK=problem.rewards_NK[n : n + 1],
        )
        parts.append(run(linear_grao_loss, part, torch.float32, device, backend=backend))
    for name in ("loss", "exploration", "imitation", "alignment", "dhead_VD"):
        total = sum(part[name] for part in parts)
        torch.testing.assert_close(total, whole[name], rtol=1e-5, atol=1e-6)


def test_components_sum_to_minus_the_loss(backend: str, device: str) -> None:
    result = run(linear_grao_loss, make_problem(), torch.float32, device, backend=backend)
    terms = [result[name] for name in ("exploration", "imitation", "alignment")]
    assert all(term != 0 for term in terms)
    torch.testing.assert_close(sum(terms), -result["loss"], rtol=1e-6, atol=1e-6)


def test_same_bits_twice(backend: str, device: str) -> None:
    problem = make_problem(T=40, bias=True)
    one, two = (
        run(linear_grao_loss, problem, torch.bfloat16, device, backend=backend) for _ in range(2)
    )
    assert all(torch.equal(one[name].nan_to_num(7), two[name].nan_to_num(7)) for name in one)


def test_empty_completion_adds_nothing(backend: str, device: str) -> None:
    problem = make_problem()
    sequence_T = problem.sequence_T.where(problem.sequence_T != 5, -1)
    result = assert_matches_specification(
        replace(problem, sequence_T=sequence_T), torch.float32, backend, device
    )
    assert result["loss"].isfinite()


def test_a_sequence_longer_than_its_neighbours_weighs_the_same() -> None:
    """Two copies of every token of a sequence change neither its mean nor the loss."""
    problem = make_problem()
    again = (problem.sequence_T == 8).nonzero().squeeze(1)
    assert again.numel() > 0
    rows = torch.cat([torch.arange(problem.target_T.numel()), again])
    longer = replace(
        problem,
        hidden_TD=problem.hidden_TD[rows],
        target_T=problem.target_T[rows],
        sequence_T=problem.sequence_T[rows],
    )
    one, two = (run(linear_grao_loss, each, torch.float32) for each in (problem, longer))
    torch.testing.assert_close(one["loss"], two["loss"])
    truth = run(reference.grao_loss, problem, torch.float64)
    assert truth["loss"].abs() > 0.01
