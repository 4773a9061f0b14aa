"""Every option on the device at the widths of real heads, against float64 there.

The repository's own tests have every option by itself, at small widths. The specification and the
tolerance are theirs.

Shapes: T rows (tokens), D width, V vocabulary, N prompts, K sequences of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grao_fast.kernels import (
    linear_grao_loss,
    linear_logprobs,
    linear_weighted_cross_entropy,
    reference,
)
from suite.checkout import load
from suite.runner import Run, attempt, free_memory

# The heads of Qwen3 and of Llama 3 8B, and a ragged one.
QWEN, RAGGED, LLAMA = (151936, 3584), (32001, 4096), (128256, 4096)
TINY = {QWEN: (1031, 24), RAGGED: (257, 17), LLAMA: (512, 16)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TRANSFORM = {"temperature": 0.7, "logit_scale": 2.0, "softcap": 30.0}
T, N, K = 24, 2, 4
WORKSPACE_MIB = 8  # several chunks of rows, even here

Outputs = dict[str, Tensor]

assert_accurate = load("tolerance", "tests/tolerance.py").assert_accurate
tests_problem = load("kernels_problem", "tests/kernels/problem.py")


def widths(run: Run) -> str:
    """As many cases as there is time for: what passed, and what failed."""
    cases = _cases()
    failed: dict[str, str] = {}
    passed = 0
    for name, case in cases.items():
        if not run.in_time(name):
            continue
        _, reason = attempt(partial(case, run))
        if reason is None:
            passed += 1
        elif reason == "out of memory":
            run.leave_out(name, reason)
        else:
            failed[name] = reason
        run.report |= {"passed": passed, "failed": failed}
        free_memory()
    summary = f"{passed} of {len(cases)} cases within the tolerance of float64"
    if failed or not passed:
        first = next(iter(failed.items()), ("", "nothing was checked"))
        raise AssertionError(f"{summary}; {': '.join(first)}")
    return summary


def _cases() -> dict[str, Callable[[Run], None]]:
    bf16 = torch.bfloat16
    cases: dict[str, Callable[[Run], None]] = {}
    for name, dtype in DTYPES.items():
        cases |= {
            f"plain, {name}": partial(_grao, QWEN, dtype),
            f"bias and transform, {name}": partial(_grao, RAGGED, dtype, bias=True, **TRANSFORM),
            f"off policy and KL, {name}": partial(_grao, LLAMA, dtype, off_policy=True),
            f"entropy and top1, {name}": partial(_extras, RAGGED, dtype),
            f"log-probs and entropies, {name}": partial(_logprobs, QWEN, dtype),
        }
    return cases | {
        "rewards on the device, bf16": partial(_grao, LLAMA, bf16, beside=True),
        "weighted cross-entropy, bf16": partial(_weighted, RAGGED, bf16),
        "frozen head, bf16": partial(_frozen, "head_VD", LLAMA, bf16),
        "frozen hidden, bf16": partial(_frozen, "hidden_TD", LLAMA, bf16),
    }


def make_problem(
    run: Run, head: tuple[int, int], dtype: torch.dtype, *, bias: bool = False, **options: Any
):
    """A `Problem` of tests/kernels, large tensors on the device; two rows in three count."""
    V, D = TINY[head] if run.tiny else head
    here: dict[str, Any] = {
        "generator": torch.Generator(run.device).manual_seed(0),
        "device": run.device,
    }
    sequence_T = torch.arange(T) % (N * K)
    sequence_T[::3] = -1
    return tests_problem.Problem(
        hidden_TD=torch.randn(T, D, **here).to(dtype),
        head_VD=torch.randn(V, D, **here).div_(D**0.5).to(dtype),
        target_T=torch.randint(0, V, (T,), **here),
        sequence_T=sequence_T,
        rewards_NK=torch.tensor([[0.3, -1.2, 2.0, 0.5], [1.0, 0.0, 0.0, 0.2]]).double(),
        bias_V=torch.randn(V, **here).to(dtype) if bias else None,
        options=options,
    )


def _grao(
    head: tuple[int, int],
    dtype: torch.dtype,
    run: Run,
    *,
    bias: bool = False,
    off_policy: bool = False,
    beside: bool = False,
    **options: Any,
) -> None:
    """Loss, its terms, log-probs, advantages and gradients; `beside`: rewards on the device."""
    problem = make_problem(run, head, dtype, bias=bias, **options)
    if off_policy:
        problem = problem.with_options(**_policies(problem))
    if beside:
        problem = replace(
            problem,
            sequence_T=problem.sequence_T.to(run.device),
            rewards_NK=problem.rewards_NK.to(run.device),
        )
    run_on = partial(tests_problem.run, problem=problem, device=str(run.device))
    truth = run_on(reference.grao_loss, dtype=torch.float64)
    naive = run_on(reference.grao_loss, dtype=dtype)
    ours = run_on(linear_grao_loss, dtype=dtype, workspace_mib=WORKSPACE_MIB)
    _compare(ours, naive, truth, dtype, one_vector=tests_problem.SCALARS)


def _policies(problem) -> dict[str, Any]:
    """As in tests/kernels/test_off_policy.py: far from the bounds, rows without any as well."""
    logprob_T = reference.token_logprobs(
        problem.hidden_TD.double(), problem.head_VD.double(), problem.target_T
    )
    steps_6 = torch.tensor([0.1, -0.5, 0.0, 0.5, -0.1, math.nan], dtype=torch.float64)
    given: dict[str, Any] = {
        name: logprob_T + steps_6.to(logprob_T)[torch.arange(T) * (3 + place) // 2 % 6]
        for place, name in enumerate(("old_logprob_T", "sampler_logprob_T", "ref_logprob_T"))
    }
    return given | {"clip": (0.2, 0.3), "sampler_cap": 1.2, "kl_coef": 0.1}


def _extras(head: tuple[int, int], dtype: torch.dtype, run: Run) -> None:
    """Entropies of the rows that count, and whether the target is the likeliest token."""
    problem = make_problem(run, head, dtype, bias=True, **TRANSFORM)
    options = {"bias_V": problem.bias_V, **TRANSFORM}
    logits_TV = problem.hidden_TD.double() @ problem.head_VD.double().T + problem.bias_V.double()
    best_T2 = logits_TV.topk(2).values
    problem.target_T[::2] = logits_TV.argmax(1)[::2]
    result = linear_grao_loss(
        problem.hidden_TD,
        problem.head_VD,
        problem.target_T,
        problem.sequence_T,
        problem.rewards_NK,
        entropy=True,
        top1=True,
        workspace_mib=WORKSPACE_MIB,
        **options,
    )
    live_T = ~result.logprob_T.isnan()
    assert torch.equal(live_T.cpu(), problem.sequence_T >= 0), "other rows count than should"
    clear_T = live_T & (best_T2[:, 0] - best_T2[:, 1] > 1e-3)
    hit_T = logits_TV.argmax(1) == problem.target_T
    assert hit_T[clear_T].any() and not hit_T[clear_T].all(), "top1 is not put to the test"
    assert torch.equal(result.top1_T[clear_T], hit_T[clear_T].float()), "top1"
    truth_T, naive_T = (
        reference.token_entropies(
            problem.hidden_TD.to(each),
            problem.head_VD.to(each),
            **options | {"bias_V": problem.bias_V.to(each)},
        )
        for each in (torch.float64, dtype)
    )
    assert_accurate("entropy", result.entropy_T[live_T], naive_T[live_T], truth_T[live_T], dtype)


def _naive_logprobs(hidden_TD: Tensor, head_VD: Tensor, target_T: Tensor, **options: Any):
    logprob_T = reference.token_logprobs(hidden_TD, head_VD, target_T, **options)
    return logprob_T, reference.token_entropies(hidden_TD, head_VD, **options)


def _logprobs(head: tuple[int, int], dtype: torch.dtype, run: Run) -> None:
    """linear_logprobs under a loss with coefficients of both signs, and some of 0."""
    problem = make_problem(run, head, dtype)
    weight_T = torch.linspace(-1, 1, T, dtype=torch.float64, device=run.device)
    weight_T[::3] = 0

    def outputs(function: Callable[..., Any], dtype: torch.dtype, **options: Any) -> Outputs:
        hidden_TD, head_VD = _leaves(problem, dtype)
        logprob_T, entropy_T = function(hidden_TD, head_VD, problem.target_T, **options)
        loss = (weight_T.to(logprob_T) * logprob_T).sum()
        loss = loss + (weight_T.flip(0).to(entropy_T) * entropy_T).sum()
        dhidden_TD, dhead_VD = torch.autograd.grad(loss, (hidden_TD, head_VD))
        return {
            "logprob": logprob_T,
            "entropy": entropy_T,
            "dhidden": dhidden_TD,
            "dhead": dhead_VD,
        }

    truth, naive = outputs(_naive_logprobs, torch.float64), outputs(_naive_logprobs, dtype)
    ours = outputs(linear_logprobs, dtype, entropy=True, workspace_mib=WORKSPACE_MIB)
    _compare(ours, naive, truth, dtype)


def _weighted(head: tuple[int, int], dtype: torch.dtype, run: Run) -> None:
    """linear_weighted_cross_entropy, its weights on the CPU, some of them 0."""
    problem = make_problem(run, head, dtype)
    weight_T = torch.linspace(-1, 1, T)
    weight_T[::3] = 0
    live_T = weight_T.to(run.device) != 0

    def naive(hidden_TD: Tensor, head_VD: Tensor) -> tuple[Tensor, Tensor]:
        logprob_T = reference.token_logprobs(hidden_TD, head_VD, problem.target_T)
        weighted_T = weight_T.to(logprob_T) * logprob_T
        return -weighted_T.sum(), logprob_T.where(live_T, torch.nan)

    def ours(hidden_TD: Tensor, head_VD: Tensor):
        return linear_weighted_cross_entropy(
            hidden_TD, head_VD, problem.target_T, weight_T, workspace_mib=WORKSPACE_MIB
        )

    def outputs(function: Callable[..., Any], dtype: torch.dtype) -> Outputs:
        leaves = _leaves(problem, dtype)
        loss, logprob_T = function(*leaves)
        dhidden_TD, dhead_VD = torch.autograd.grad(loss, leaves)
        return {"loss": loss, "logprob": logprob_T, "dhidden": dhidden_TD, "dhead": dhead_VD}

    _compare(outputs(ours, dtype), outputs(naive, dtype), outputs(naive, torch.float64), dtype)


def _frozen(frozen: str, head: tuple[int, int], dtype: torch.dtype, run: Run) -> None:
    """The gradient of the other operand has the same bits, and the frozen one gets none."""
    problem = make_problem(run, head, dtype)
    rest = (problem.target_T, problem.sequence_T, problem.rewards_NK)
    both = _leaves(problem, dtype)
    linear_grao_loss(*both, *rest, workspace_mib=WORKSPACE_MIB).loss.backward()
    leaves = _leaves(problem, dtype)
    place = ("hidden_TD", "head_VD").index(frozen)
    leaves[place].requires_grad_(False)
    linear_grao_loss(*leaves, *rest, workspace_mib=WORKSPACE_MIB).loss.backward()
    assert leaves[place].grad is None, f"{frozen} is frozen and has a gradient"
    expected, found = both[1 - place].grad, leaves[1 - place].grad
    assert expected is not None and expected.any() and found is not None
    assert torch.equal(found, expected), f"with {frozen} frozen, the other gradient has other bits"


def _leaves(problem, dtype: torch.dtype) -> list[Tensor]:
    operands = (problem.hidden_TD, problem.head_VD)
    return [each.to(dtype, copy=True).requires_grad_() for each in operands]


def _compare(
    ours: Outputs,
    naive: Outputs,
    truth: Outputs,
    dtype: torch.dtype,
    one_vector: tuple[str, ...] = (),
) -> None:
    """All outputs; those of `one_vector` as one: the loss is a difference of its terms."""
    if one_vector:
        stacked = [
            torch.stack([each[name] for name in one_vector]) for each in (ours, naive, truth)
        ]
        assert_accurate("loss and its terms", *stacked, dtype)
    for name in truth.keys() - set(one_vector):
        assert_accurate(name, ours[name], naive[name], truth[name], dtype)
