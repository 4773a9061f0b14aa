"""linear_logprobs on both backends against the specification in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from problem import GRADIENTS, Problem, make_problem
from slow_dtypes import ONE_BY_DEFAULT
from tolerance import assert_accurate
from torch import Tensor

from grao_fast.kernels import linear_logprobs, linear_weighted_cross_entropy, reference
from grao_fast.kernels.one_pass import logprob_ops
from grao_fast.kernels.one_pass.options import PassOptions
from grao_fast.kernels.rows.contract import LogitConstants

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIONS = ("temperature", "logit_scale", "softcap")


def peaked(probability: float) -> Problem:
    """Operands that give the target, or in every second row another token, this probability."""
    V = 16
    problem = make_problem(V=V, D=V)
    gap = math.log(probability * (V - 1) / (1 - probability))
    eye = torch.eye(V, dtype=torch.float64)
    likely_T = (problem.target_T + torch.arange(24) % 2) % V
    return replace(problem, hidden_TD=gap * eye[likely_T], head_VD=eye)


PROBLEMS = {
    "plain": make_problem(),
    "tiny_ragged_vocabulary": make_problem(V=7, D=3),
    "one_token_vocabulary": make_problem(V=1),
    "vocabulary_of_three_blocks": make_problem(T=6, V=20011, D=8),
    "all_of_z": make_problem(bias=True, temperature=0.7, logit_scale=2.0, softcap=5.0, logits=3.0),
    "peaked": peaked(0.999),
    "logits_of_1e4": make_problem(logits=1e4),
    "no_rows": make_problem(T=0),
}


def naive_logprobs(hidden_TD, head_VD, target_T, **options) -> tuple[Tensor, Tensor]:
    logprob_T = reference.token_logprobs(hidden_TD, head_VD, target_T, **options)
    return logprob_T, reference.token_entropies(hidden_TD, head_VD, **options)


def run(function, problem: Problem, dtype, device="cpu", **options) -> dict[str, Tensor]:
    """Values, and gradients of a loss that is linear in neither log-probs nor entropies."""
    leaves = {
        name: tensor.to(device=device, dtype=dtype, copy=True).requires_grad_()
        for name in GRADIENTS
        if (tensor := getattr(problem, name)) is not None
    }
    logprob_T, entropy_T = function(
        leaves["hidden_TD"],
        leaves["head_VD"],
        problem.target_T.to(device),
        bias_V=leaves.get("bias_V"),
        **problem.options,
        **options,
    )
    # Coefficients of both signs, some 0; the same for truth and naive.
    weight_T = torch.linspace(-1, 1, logprob_T.numel(), dtype=torch.float64)
    weight_T[::3] = 0
    entropy_weight_T = weight_T.flip(0)
    loss = (weight_T.to(logprob_T) * logprob_T).sum()
    loss = loss + (entropy_weight_T.to(logprob_T) * entropy_T).sum()
    loss.backward()
    outputs = {"logprob_T": logprob_T.detach(), "entropy_T": entropy_T.detach()}
    return outputs | {f"d{name}": leaf.grad for name, leaf in leaves.items()}


def assert_matches_specification(
    problem, dtype, backend, device, truth_on="cpu", **options
) -> None:
    rounded = {name: getattr(problem, name) for name in GRADIENTS}
    rounded = {name: None if x is None else x.to(dtype) for name, x in rounded.items()}
    problem = replace(problem, **rounded)
    truth = run(naive_logprobs, problem, torch.float64, truth_on)
    naive = run(naive_logprobs, problem, dtype, truth_on)
    ours = run(linear_logprobs, problem, dtype, device, entropy=True, backend=backend, **options)
    for name in truth:
        assert_accurate(name, ours[name], naive[name], truth[name], dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_matches_specification(problem, dtype, backend, device) -> None:
    assert_matches_specification(problem, dtype, backend, device)


def operands(device: str, dtype=torch.float32):
    problem = make_problem(T=20)
    hidden_TD = problem.hidden_TD.to(device, dtype).requires_grad_()
    head_VD = problem.head_VD.to(device, dtype).requires_grad_()
    return hidden_TD, head_VD, problem.target_T.to(device)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_gradients_are_those_of_the_one_pass(dtype, backend: str, device: str) -> None:
    """For a loss that is linear in the log-probs, both agree to the bit."""
    hidden_TD, head_VD, target_T = operands(device, dtype)
    weight_T = torch.linspace(-1, 1, 20).where(torch.arange(20) % 4 > 0, 0)
    expected = linear_weighted_cross_entropy(
        hidden_TD, head_VD, target_T, weight_T, backend=backend
    )
    logprob_T, entropy_T = linear_logprobs(hidden_TD, head_VD, target_T, backend=backend)
    assert entropy_T is None
    live_T = weight_T != 0
    assert torch.equal(logprob_T[live_T], expected.logprob_T[live_T])
    loss = -(weight_T.to(device) * logprob_T).sum()
    ours = torch.autograd.grad(loss, (hidden_TD, head_VD))
    theirs = torch.autograd.grad(expected.loss, (hidden_TD, head_VD))
    assert all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))


def test_entropy_changes_no_log_prob(backend: str, device: str) -> None:
    hidden_TD, head_VD, target_T = operands(device)
    with_entropy = linear_logprobs(hidden_TD, head_VD, target_T, entropy=True, backend=backend)
    without = linear_logprobs(hidden_TD, head_VD, target_T, backend=backend)
    assert torch.equal(with_entropy.logprob_T, without.logprob_T)


def test_entropy_alone_may_be_differentiated(backend: str, device: str) -> None:
    hidden_TD, head_VD, target_T = operands(device)
    result = linear_logprobs(hidden_TD, head_VD, target_T, entropy=True, backend=backend)
    ours = torch.autograd.grad(result.entropy_T.sum(), (hidden_TD, head_VD))
    expected, truth = (
        torch.autograd.grad(reference.token_entropies(*leaves).sum(), leaves)
        for dtype in (torch.float32, torch.float64)
        for leaves in [[x.detach().to("cpu", dtype).requires_grad_() for x in (hidden_TD, head_VD)]]
    )
    for name, one, two, three in zip(("dhidden", "dhead"), ours, expected, truth, strict=True):
        assert_accurate(name, one, two, three, torch.float32)


def test_vocabulary_masked_by_the_bias(backend: str, device: str) -> None:
    """p = 0 adds 0 to the entropy and to the gradient, not 0 * -inf."""
    hidden_TD, head_VD, target_T = operands(device)
    masked, V = 100, head_VD.shape[0]
    bias_V = torch.zeros(V, device=device)
    bias_V[:masked] = -math.inf
    target_T = target_T.clamp(min=masked)
    result = linear_logprobs(
        hidden_TD, head_VD, target_T, bias_V=bias_V, entropy=True, backend=backend
    )
    rest = linear_logprobs(
        hidden_TD, head_VD[masked:], target_T - masked, entropy=True, backend=backend
    )
    for one, two in zip(result, rest, strict=True):
        torch.testing.assert_close(one, two)
    (dhead_VD,) = torch.autograd.grad(result.entropy_T.sum() + result.logprob_T.sum(), head_VD)
    assert not dhead_VD[:masked].any() and dhead_VD[masked:].isfinite().all()


def test_rows_without_gradient_may_hold_anything(backend: str, device: str) -> None:
    hidden_TD, head_VD, target_T = operands(device)
    with torch.no_grad():
        hidden_TD[::3] = math.nan
    result = linear_logprobs(hidden_TD, head_VD, target_T, entropy=True, backend=backend)
    assert result.logprob_T[::3].isnan().all() and result.entropy_T[::3].isnan().all()
    keep_T = torch.arange(20, device=device) % 3 > 0
    loss = result.logprob_T[keep_T].sum() + result.entropy_T[keep_T].square().sum()
    dhidden_TD, dhead_VD = torch.autograd.grad(loss, (hidden_TD, head_VD))
    assert not dhidden_TD[::3].any() and dhead_VD.isfinite().all()


def test_scoring_keeps_nothing(backend: str, device: str) -> None:
    hidden_TD, head_VD, target_T = operands(device)
    expected = linear_logprobs(hidden_TD, head_VD, target_T, entropy=True, backend=backend)
    with torch.no_grad():
        result = linear_logprobs(hidden_TD, head_VD, target_T, entropy=True, backend=backend)
    assert not result.logprob_T.requires_grad and not result.entropy_T.requires_grad
    assert all(torch.equal(one, two) for one, two in zip(result, expected, strict=True))


def test_backward_may_be_repeated(backend: str, device: str) -> None:
    hidden_TD, head_VD, target_T = operands(device)
    logprob_T = linear_logprobs(hidden_TD, head_VD, target_T, backend=backend).logprob_T
    once = torch.autograd.grad(logprob_T.exp().sum(), head_VD, retain_graph=True)
    again = torch.autograd.grad(logprob_T.exp().sum(), head_VD)
    assert torch.equal(once[0], again[0]) and once[0].any()


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_frozen_operands_get_no_gradient(frozen, backend, device, monkeypatch) -> None:
    seen = []

    def watched(*arguments):
        seen.append(backward(*arguments))
        return seen[-1]

    backward = logprob_ops.token_logprobs_backward
    monkeypatch.setattr(logprob_ops, "token_logprobs_backward", watched)
    hidden_TD, head_VD, target_T = operands(device)
    (hidden_TD if frozen == "hidden" else head_VD).requires_grad_(False)
    linear_logprobs(hidden_TD, head_VD, target_T, backend=backend).logprob_T.sum().backward()
    dhidden_TD, dhead_VD, _ = seen[0]
    assert (dhidden_TD.numel() == 0) == (frozen == "hidden") == (hidden_TD.grad is None)
    assert (dhead_VD.numel() == 0) == (frozen == "head") == (head_VD.grad is None)


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("dtype", ONE_BY_DEFAULT)
def test_opcheck(dtype: torch.dtype, entropy: bool, backend: str, device: str) -> None:
    hidden_TD, head_VD, target_T = operands(device, dtype)
    options = PassOptions(LogitConstants(1.3, 0.5, 2.6), 4000, backend, dtype, entropy)
    torch.library.opcheck(
        torch.ops.grao_fast.token_logprobs.default,
        (hidden_TD, head_VD, None, target_T, *options.flat()),
    )
    gradient_T = torch.ones(20, device=device)
    constants = (hidden_TD.detach(), head_VD.detach(), None, target_T)
    options = options._replace(wants=(True, True, False)).flat()
    torch.library.opcheck(
        torch.ops.grao_fast.token_logprobs_backward.default,
        (*constants, gradient_T, gradient_T if entropy else None, *options),
    )


def test_compiled_gives_the_same_bits(backend: str, device: str) -> None:
    hidden_TD, head_VD, target_T = operands(device)

    def loss(hidden_TD, head_VD):
        result = linear_logprobs(hidden_TD, head_VD, target_T, entropy=True, backend=backend)
        return (result.logprob_T.exp() + result.entropy_T).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    one = torch.autograd.grad(loss(hidden_TD, head_VD), (hidden_TD, head_VD))
    two = torch.autograd.grad(compiled(hidden_TD, head_VD), (hidden_TD, head_VD))
    assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


def test_refused_by_name() -> None:
    hidden_TD, head_VD, target_T = operands("cpu")
    with pytest.raises(ValueError, match=r"got 257 in row 0"):
        linear_logprobs(hidden_TD, head_VD, torch.full_like(target_T, 257))
    with pytest.raises(ValueError, match="temperature must be finite and above 0"):
        linear_logprobs(hidden_TD, head_VD, target_T, temperature=0)
    with pytest.raises(ValueError, match="workspace_mib must be finite and above 0"):
        linear_logprobs(hidden_TD, head_VD, target_T, workspace_mib=0)
    with pytest.raises(ValueError, match="head_VD must be"):
        linear_logprobs(hidden_TD, head_VD[:, 1:], target_T)
