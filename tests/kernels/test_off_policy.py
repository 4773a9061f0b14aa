"""linear_grao_loss off policy: ratio, importance weight, KL; and entropies and top-1 hits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from problem import Problem, assert_matches_specification, make_problem, run
from test_linear_grao import dead_group, without_dropping

from grao_fast.kernels import linear_grao_loss, linear_logprobs, reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = ("old_logprob_T", "sampler_logprob_T", "ref_logprob_T")


def off_policy(problem: Problem, *names: str, **options) -> Problem:
    """Log-probs 0, 0.1 and 0.5 off the row's own, so that ratios are far from 0.8 and 1.3."""
    logprob_T = reference.token_logprobs(
        problem.hidden_TD, problem.head_VD, problem.target_T, bias_V=problem.bias_V
    )
    steps = torch.tensor([0.1, -0.5, 0.0, 0.5, -0.1, math.nan], dtype=torch.float64)
    T = logprob_T.numel()
    given = {
        name: logprob_T + steps.to(logprob_T)[(torch.arange(T) * (3 + NAMES.index(name))) // 2 % 6]
        for name in names
    }
    return problem.with_options(**given, **options)


PROBLEMS = {
    "ratio": off_policy(make_problem(T=48), "old_logprob_T"),
    "clipped_ratio": off_policy(make_problem(T=48), "old_logprob_T", clip=(0.2, 0.3)),
    "clipped_below_only": off_policy(make_problem(T=48), "old_logprob_T", clip=(0.2, 1000.0)),
    "sampler": off_policy(make_problem(), "sampler_logprob_T"),
    "truncated": off_policy(make_problem(), "sampler_logprob_T", sampler_cap=1.2),
    "kl": off_policy(make_problem(), "ref_logprob_T", kl_coef=0.1),
    "kl_of_dead_groups": off_policy(dead_group(make_problem()), "ref_logprob_T", kl_coef=0.5),
    "rewarded_kl": off_policy(make_problem(), "ref_logprob_T", kl_coef=-0.5),
    "all": off_policy(
        make_problem(T=48, bias=True), *NAMES, clip=(0.2, 0.3), sampler_cap=1.2, kl_coef=0.1
    ),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_matches_specification(problem, dtype, backend, device) -> None:
    assert_matches_specification(problem, dtype, backend, device)


@pytest.mark.parametrize("dropped", [True, False])
def test_chunks_and_dead_rows(dropped, backend, device, monkeypatch) -> None:
    if not dropped:
        without_dropping(monkeypatch)
    workspace_mib = 7.5 * 320 * 6 / 2**20
    for name in ("all", "kl_of_dead_groups"):
        problem = PROBLEMS[name]
        assert_matches_specification(
            problem, torch.float32, backend, device, workspace_mib=workspace_mib
        )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_ratio_of_1_changes_no_bit(dtype: torch.dtype, backend: str, device: str) -> None:
    plain = make_problem(T=40, bias=True)
    expected = run(linear_grao_loss, plain, dtype, device, backend=backend)
    old_logprob_T = expected["logprob_T"]
    for options in (
        {"clip": (0.0, 0.0)},
        {"clip": (0.2, 0.2), "sampler_logprob_T": old_logprob_T, "sampler_cap": 2.0},
        {"ref_logprob_T": old_logprob_T, "kl_coef": 0.1},
    ):
        problem = plain.with_options(old_logprob_T=old_logprob_T, **options)
        ours = run(linear_grao_loss, problem, dtype, device, backend=backend)
        for name in ("dhidden_TD", "dhead_VD", "dbias_V", "logprob_T"):
            assert torch.equal(ours[name].nan_to_num(7), expected[name].nan_to_num(7)), name


def test_rows_without_old_are_on_policy(backend: str, device: str) -> None:
    plain = make_problem(T=40, bias=True)
    nothing = torch.full((40,), math.nan)
    marked = plain.with_options(old_logprob_T=nothing, clip=(0.2, 0.2), sampler_logprob_T=nothing)
    one = run(linear_grao_loss, plain, torch.float32, device, backend=backend)
    two = run(linear_grao_loss, marked, torch.float32, device, backend=backend)
    assert all(torch.equal(one[name].nan_to_num(7), two[name].nan_to_num(7)) for name in one)


def test_held_rows_have_no_gradient(backend: str, device: str) -> None:
    """The gradient is 0 beyond the bound that the weight pushes to, and only there."""
    problem = PROBLEMS["clipped_ratio"].with_options(reference_advantage="signed")
    result = run(linear_grao_loss, problem, torch.float32, device, backend=backend)
    rho_T = (result["logprob_T"].cpu() - problem.options["old_logprob_T"]).exp()
    weights_NK = reference.sequence_weights(
        result["advantages_NK"].cpu(), reference_advantage="signed"
    )
    weight_T = weights_NK.flatten()[problem.sequence_T]
    held_T = ((weight_T > 0) & (rho_T > 1.3)) | ((weight_T < 0) & (rho_T < 0.8))
    moved_T = result["dhidden_TD"].cpu().any(1)
    live_T = problem.sequence_T >= 0
    assert held_T[live_T].any() and torch.equal(moved_T[live_T], ~held_T[live_T])


def test_kl_holds_samples_of_dead_groups_and_no_reference(backend: str, device: str) -> None:
    problem = dead_group(make_problem())
    own = run(linear_grao_loss, problem, torch.float32, device, backend=backend)
    truth_T = reference.token_logprobs(problem.hidden_TD, problem.head_VD, problem.target_T)
    there = problem.with_options(ref_logprob_T=truth_T + 0.3, kl_coef=1.0)
    result = run(linear_grao_loss, there, torch.float32, device, backend=backend)
    K = 4
    dead_T = problem.sequence_T // K == 1
    reference_T = problem.sequence_T % K == K - 1
    moved_T = result["dhidden_TD"].cpu().any(1)
    assert moved_T[dead_T & ~reference_T].all() and not moved_T[dead_T & reference_T].any()
    assert not own["dhidden_TD"].cpu()[dead_T].any()
    # Every token is 0.3 below its reference, so each sample's mean is a token's value.
    k3 = math.exp(0.3) - 0.3 - 1
    present = [k for n in range(3) for k in range(K - 1) if (problem.sequence_T == n * K + k).any()]
    assert result["kl"].item() == pytest.approx(k3 * len(present) / (3 * (K - 1)), rel=1e-5)


def test_what_rows_without_weight_hold_has_no_effect(backend: str, device: str) -> None:
    problem = PROBLEMS["all"]
    dead_T = problem.sequence_T < 0
    hidden_TD = problem.hidden_TD.clone()
    hidden_TD[dead_T] = math.nan
    rubbish = {name: problem.options[name].clone() for name in NAMES}
    for values_T in rubbish.values():
        values_T[dead_T] = math.inf
    poisoned = replace(problem, hidden_TD=hidden_TD).with_options(**rubbish)
    one = run(linear_grao_loss, problem, torch.float32, device, backend=backend)
    two = run(linear_grao_loss, poisoned, torch.float32, device, backend=backend)
    assert dead_T.any()
    assert all(torch.equal(one[name].nan_to_num(7), two[name].nan_to_num(7)) for name in one)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_entropy_and_top1_come_along(dtype: torch.dtype, backend: str, device: str) -> None:
    problem = make_problem(V=5, bias=True, temperature=0.7, softcap=5.0)
    operands = [x.to(device, dtype) for x in (problem.hidden_TD, problem.head_VD, problem.bias_V)]
    hidden_TD, head_VD, bias_V = operands
    target_T = problem.target_T.to(device)
    options = {"bias_V": bias_V, **problem.options, "backend": backend}
    arguments = (hidden_TD, head_VD, target_T, problem.sequence_T, problem.rewards_NK)
    plain = linear_grao_loss(*arguments, **options)
    assert plain.entropy_T is None and plain.top1_T is None
    result = linear_grao_loss(*arguments, entropy=True, top1=True, **options)
    assert torch.equal(result.loss, plain.loss)
    expected = linear_logprobs(hidden_TD, head_VD, target_T, entropy=True, **options)
    live_T = ~result.logprob_T.isnan()
    logits_TV = hidden_TD.float() @ head_VD.float().T + bias_V.float()
    hits_T = logits_TV.argmax(1) == target_T
    torch.testing.assert_close(result.entropy_T[live_T], expected.entropy_T[live_T])
    assert torch.equal(result.top1_T[live_T], hits_T[live_T].float()) and hits_T[live_T].any()
    assert result.entropy_T[~live_T].isnan().all() and result.top1_T[~live_T].isnan().all()


ONES = torch.zeros(24)
BAD = {
    "length": (dict(old_logprob_T=ONES[:5]), "old_logprob_T must be (24,), got (5,)"),
    "dtype": (dict(ref_logprob_T=ONES.long(), kl_coef=0.1), "must be floating point"),
    "grad": (dict(sampler_logprob_T=ONES.clone().requires_grad_()), "detach()"),
    "device": (dict(old_logprob_T=ONES.to("meta")), "old_logprob_T must be on the CPU or beside"),
    "clip_alone": (dict(clip=(0.2, 0.2)), "clip has no effect without old_logprob_T"),
    "cap_alone": (dict(sampler_cap=2.0), "sampler_cap has no effect without sampler_logprob_T"),
    "kl_coef_alone": (dict(kl_coef=0.1), "kl_coef has no effect without ref_logprob_T"),
    "ref_alone": (dict(ref_logprob_T=ONES), "ref_logprob_T has no effect without kl_coef"),
    "clip_number": (dict(old_logprob_T=ONES, clip=0.2), "clip must be a pair (low, high), got 0.2"),
    "clip_order": (dict(old_logprob_T=ONES, clip=(1.5, 0.2)), "with 0 <= low <= 1 and 0 <= high"),
    "cap": (
        dict(sampler_logprob_T=ONES, sampler_cap=0.0),
        "sampler_cap must be finite and above 0",
    ),
}


@pytest.mark.parametrize("options, message", BAD.values(), ids=BAD)
def test_refused_by_name(options: dict, message: str) -> None:
    problem = make_problem().with_options(**options)
    with pytest.raises(ValueError) as error:
        run(linear_grao_loss, problem, torch.float32)
    assert message in str(error.value)


def test_surrogate_by_hand() -> None:
    """rho = 2 and 1/2, clip (0.2, 0.3), cap 1.5, sampler at old - log 3 and at old."""
    logprob_T = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    old_T = logprob_T - torch.tensor([2.0, 0.5], dtype=torch.float64).log()
    sampler_T = old_T - torch.tensor([3.0, 1.0], dtype=torch.float64).log()
    options = {"clip": (0.2, 0.3), "sampler_cap": 1.5}
    for weight, expected in ((1.0, [1.5 * 1.3, 0.5]), (-1.0, [1.5 * 2.0, 0.8])):
        weight = torch.tensor(weight, dtype=torch.float64)
        value_T = reference.surrogate(logprob_T, old_T, sampler_T, weight, **options)
        torch.testing.assert_close(value_T, torch.tensor(expected, dtype=torch.float64))
    k3_T = reference.k3(logprob_T, logprob_T + torch.tensor([math.log(2), 0.0]))
    torch.testing.assert_close(k3_T, torch.tensor([1 - math.log(2), 0.0], dtype=torch.float64))


def test_what_weighs_nothing_in_the_kl_may_be_far_away(backend: str, device: str) -> None:
    """The policy has unlearned the reference: exp(ref - logp) overflows, with a weight of 0."""
    V, T = 8, 5
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(T, 4, generator=generator).to(device).requires_grad_()
    head_VD = torch.randn(V, 4, generator=generator).to(device).requires_grad_()
    bias_V = torch.zeros(V, device=device)
    bias_V[5] = -100.0
    result = linear_grao_loss(
        hidden_TD,
        head_VD,
        torch.arange(1, 6, device=device),
        torch.arange(5),
        torch.tensor([[1.0, 0.0, 1.0, 0.0, 2.0]]),
        bias_V=bias_V,
        ref_logprob_T=torch.full((T,), -3.0),
        kl_coef=0.01,
        backend=backend,
    )
    result.loss.backward()
    assert result.logprob_T[4] < -95
    assert hidden_TD.grad.isfinite().all() and head_VD.grad.isfinite().all()
