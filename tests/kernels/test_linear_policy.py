"""linear_policy_loss: any terms, on or off policy."""

from __future__ import annotations

import math

import pytest
import torch
from problem import make_problem
from tolerance import assert_accurate
from torch import Tensor

from grao_fast.kernels import OffPolicy, linear_policy_loss, reference

T = 24
PROBLEM = make_problem(T=T)
ONES = torch.ones(T)
KL_COEF = torch.linspace(0, 0.2, T)


def off_policy() -> OffPolicy:
    """Ratios far from the bounds, on both sides; some rows have no old log-prob, or no ref."""
    args = (PROBLEM.hidden_TD, PROBLEM.head_VD, PROBLEM.target_T)
    logprob_T = reference.token_logprobs(*args)
    steps_T = torch.tensor([0.1, -0.5, 0.5, math.nan], dtype=torch.float64).repeat(T // 4)
    return OffPolicy(
        old_logprob_T=logprob_T + steps_T,
        sampler_logprob_T=logprob_T + steps_T.roll(1),
        ref_logprob_T=logprob_T + steps_T.roll(2),
        kl_coef_T=KL_COEF,
        clip=(0.2, 0.3),
        sampler_cap=1.2,
    )


def formula(hidden_TD: Tensor, head_VD: Tensor, terms_CT: Tensor, given: OffPolicy | None):
    """The loss as its docstring has it, in the operands' dtype."""
    value_T = logprob_T = reference.token_logprobs(hidden_TD, head_VD, PROBLEM.target_T)
    weight_T = terms_CT.sum(0)
    kl = torch.zeros((), dtype=hidden_TD.dtype)
    if given is not None:
        old_T, sampler_T, ref_T = (each.to(hidden_TD) for each in given[:3])
        value_T = reference.surrogate(
            logprob_T, old_T, sampler_T, weight_T, clip=given.clip, sampler_cap=given.sampler_cap
        )
        kl = (given.kl_coef_T * reference.k3(logprob_T, ref_T)).sum()
    terms_C = (terms_CT * value_T).sum(1)
    return kl - terms_C.sum(), terms_C, kl, logprob_T


@pytest.mark.parametrize("given", [None, off_policy()], ids=["on_policy", "off_policy"])
@pytest.mark.parametrize("C", [1, 4])
def test_matches_its_formula(C: int, given: OffPolicy | None, backend: str, device: str) -> None:
    terms_CT = torch.randn(C, T, generator=torch.Generator().manual_seed(C))
    results = []
    for kind, dtype in (("ours", torch.float32), ("naive", torch.float32), ("", torch.float64)):
        operands = [
            each.float().to(dtype).to(device if kind == "ours" else "cpu").requires_grad_()
            for each in (PROBLEM.hidden_TD, PROBLEM.head_VD)
        ]
        if kind == "ours":
            target_T = PROBLEM.target_T.to(device)
            outputs = linear_policy_loss(
                *operands, target_T, terms_CT, off_policy=given, backend=backend, workspace_mib=0.02
            )[:4]
        else:
            outputs = formula(*operands, terms_CT.to(dtype), given)
        outputs[0].backward()
        # The loss may be far smaller than its terms, so all are compared as one vector.
        sums = torch.cat([outputs[0][None], outputs[1], outputs[2][None]])
        results.append([sums, outputs[3], *(each.grad for each in operands)])
    for name, *values in zip(("sums", "logprob", "dhidden", "dhead"), *results, strict=True):
        assert_accurate(name, *(each.detach() for each in values), torch.float32)


def test_without_any_log_prob_nothing_changes() -> None:
    hidden_TD, head_VD = PROBLEM.hidden_TD.float(), PROBLEM.head_VD.float()
    args = (hidden_TD, head_VD, PROBLEM.target_T, ONES[None])
    one, two = (linear_policy_loss(*args, off_policy=each) for each in (None, OffPolicy()))
    assert one.entropy_T is one.top1_T is None and one.kl == 0
    assert torch.equal(one.loss, two.loss) and torch.equal(one.logprob_T, two.logprob_T)


@pytest.mark.parametrize(
    "terms_CT, given, message",
    [
        (ONES, None, r"terms_CT must be \(C, 24\), got \(24,\)"),
        (ONES[None, 1:], None, r"terms_CT must be \(C, 24\), got \(1, 23\)"),
        (ONES[None].long(), None, "terms_CT must be floating point, got torch.int64"),
        (ONES[None].requires_grad_(), None, r"terms_CT requires grad.*detach\(\)"),
        (ONES[None], OffPolicy(kl_coef_T=ONES), "kl_coef_T has no effect without ref_logprob_T"),
        (ONES[None], OffPolicy(kl_times_ratio=True), "kl_times_ratio has no effect without ref_"),
        (
            ONES[None],
            OffPolicy(ref_logprob_T=ONES),
            "ref_logprob_T has no effect",
        ),
        (
            ONES[None],
            OffPolicy(ref_logprob_T=ONES, kl_coef_T=ONES[1:]),
            r"kl_coef_T must be \(24,\), got \(23,\)",
        ),
    ],
)
def test_refused_by_name(terms_CT: Tensor, given: OffPolicy | None, message: str) -> None:
    hidden_TD, head_VD = PROBLEM.hidden_TD.float(), PROBLEM.head_VD.float()
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(hidden_TD, head_VD, PROBLEM.target_T, terms_CT, off_policy=given)
