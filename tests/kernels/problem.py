"""Inputs of the GRAO loss, run three ways: by the kernels, naively, and in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tolerance import assert_accurate
from torch import Tensor

from grao_fast.kernels import linear_grao_loss, reference

SCALARS = ("loss", "exploration", "imitation", "alignment", "kl")
OUTPUTS = (*SCALARS, "logprob_T", "advantages_NK")
GRADIENTS = ("hidden_TD", "head_VD", "bias_V")


@dataclass(frozen=True)
class Problem:
    hidden_TD: Tensor
    head_VD: Tensor
    target_T: Tensor
    sequence_T: Tensor
    rewards_NK: Tensor
    bias_V: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def with_options(self, **options: Any) -> Problem:
        return replace(self, options={**self.options, **options})


def make_problem(
    *,
    T: int = 24,
    D: int = 17,
    V: int = 257,
    N: int = 3,
    K: int = 4,
    bias: bool = False,
    logits: float = 1.0,
    seed: int = 0,
    **options: Any,
) -> Problem:
    """Random sequences of unequal lengths; every seventh row is in none. `logits`: their scale."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sequence_T = torch.randint(0, N * K, (T,), generator=generator)
    sequence_T[::7] = -1
    return Problem(
        hidden_TD=randn(T, D) * logits / max(D, 1) ** 0.5,
        head_VD=randn(V, D),
        target_T=torch.randint(0, V, (T,), generator=generator),
        sequence_T=sequence_T,
        rewards_NK=randn(N, K),
        bias_V=randn(V) if bias else None,
        options=options,
    )


def run(
    loss_function: Callable[..., Any],
    problem: Problem,
    dtype: torch.dtype,
    device: str = "cpu",
    scale: float = 1.0,
    **extra: Any,
) -> dict[str, Tensor]:
    """Outputs by name, and gradients of scale * loss as d<name>."""
    leaves = {
        name: tensor.to(device=device, dtype=dtype, copy=True).requires_grad_()
        for name in GRADIENTS
        if (tensor := getattr(problem, name)) is not None
    }
    result = loss_function(
        leaves["hidden_TD"],
        leaves["head_VD"],
        problem.target_T.to(device),
        problem.sequence_T,
        problem.rewards_NK,
        bias_V=leaves.get("bias_V"),
        **problem.options,
        **extra,
    )
    (scale * result.loss).backward()
    outputs = {name: getattr(result, name).detach() for name in OUTPUTS}
    return outputs | {f"d{name}": leaf.grad for name, leaf in leaves.items()}


def assert_matches_specification(
    problem: Problem,
    dtype: torch.dtype,
    backend: str,
    device: str,
    scale: float = 1.0,
    truth_on: str = "cpu",
    **extra: Any,
) -> dict[str, Tensor]:
    """Compare every output and gradient with float64, starting from the same inputs in `dtype`."""
    bias_V = None if problem.bias_V is None else problem.bias_V.to(dtype)
    problem = replace(
        problem,
        hidden_TD=problem.hidden_TD.to(dtype),
        head_VD=problem.head_VD.to(dtype),
        bias_V=bias_V,
    )
    truth = run(reference.grao_loss, problem, torch.float64, truth_on, scale)
    naive = run(reference.grao_loss, problem, dtype, truth_on, scale)
    ours = run(linear_grao_loss, problem, dtype, device, scale, backend=backend, **extra)
    # The loss may be far smaller than its terms, so all five are compared as one vector.
    scalars = [torch.stack([each[name] for name in SCALARS]) for each in (ours, naive, truth)]
    assert_accurate("loss and its terms", *scalars, dtype)
    for name in truth.keys() - set(SCALARS):
        assert_accurate(name, ours[name], naive[name], truth[name], dtype)
    return ours
