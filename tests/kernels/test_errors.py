"""Errors name the argument that is wrong, its value and the remedy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problem import make_problem
from torch.autograd import forward_ad

from grao_fast.kernels import (
    group_advantages,
    linear_grao_loss,
    linear_logprobs,
    linear_weighted_cross_entropy,
    sequence_weights,
)

PROBLEM = make_problem()
HIDDEN = PROBLEM.hidden_TD.float()
HEAD = PROBLEM.head_VD.float()


def with_value(index_T: torch.Tensor, value: int) -> torch.Tensor:
    index_T = index_T.clone()
    index_T[3] = value
    return index_T


BAD = {
    "hidden_of_three_dims": (
        dict(hidden=HIDDEN[None]),
        "hidden_TD must be (T, D), got (1, 24, 17)",
    ),
    "head_of_another_width": (dict(head=HEAD[:, :5]), "head_VD must be (V, 17)"),
    "float64": (dict(hidden=HIDDEN.double()), "got torch.float64"),
    "two_dtypes": (dict(head=HEAD.bfloat16()), "torch.autocast"),
    "target_length": (dict(target=PROBLEM.target_T[:5]), "target_T must be (24,), got (5,)"),
    "target_dtype": (dict(target=PROBLEM.target_T.float()), "int64 or int32, got torch.float32"),
    "target_range": (dict(target=with_value(PROBLEM.target_T, 257)), "[0, 257), got 257"),
    "target_negative": (
        dict(target=with_value(PROBLEM.target_T, -100)),
        "got -100 in row 3: rows without a target need weight 0",
    ),
    "sequence_range": (
        dict(sequence=with_value(PROBLEM.sequence_T, 12)),
        "sequence_T must be in [-1, 12), got 12 in row 3",
    ),
    "sequence_below": (dict(sequence=with_value(PROBLEM.sequence_T, -2)), "got -2 in row 3"),
    "rewards_of_no_sample": (dict(rewards=PROBLEM.rewards_NK[:, :1]), "rewards_NK must be (N, G"),
    "rewards_of_one_dim": (dict(rewards=PROBLEM.rewards_NK[0]), "got (4,)"),
    "rewards_of_integers": (
        dict(rewards=PROBLEM.rewards_NK.long()),
        "got torch.int64: call float()",
    ),
    "rewards_infinite": (dict(rewards=PROBLEM.rewards_NK / 0), "inf for sequence 0 of prompt 0"),
    "rewards_with_grad": (dict(rewards=PROBLEM.rewards_NK.clone().requires_grad_()), "detach()"),
    "temperature": (dict(temperature=0.0), "temperature must be finite and above 0, got 0.0"),
    "temperature_of_numpy": (
        dict(temperature=np.float32(0.7)),
        "temperature must be a number, got np.float32(0.7): pass float(temperature)",
    ),
    "temperature_tensor": (dict(temperature=torch.tensor(0.7)), "pass float(temperature)"),
    "softcap": (dict(softcap=-1.0), "softcap must be finite and above 0, got -1.0"),
    "logit_scale": (dict(logit_scale=float("nan")), "logit_scale must be finite, got nan"),
    "beta": (dict(beta="0.5"), "beta must be a number, got '0.5'"),
    "statistics": (
        dict(statistics="batch"),
        "statistics must be one of group, samples; got 'batch'",
    ),
    "reference_advantage": (
        dict(reference_advantage="abs"),
        "signed, clip, floor, tapered; got 'abs'",
    ),
    "num_prompts": (dict(num_prompts=0), "num_prompts must be finite and above 0, got 0"),
    "workspace": (dict(workspace_mib=-1), "workspace_mib must be finite and above 0, got -1"),
    "backend": (dict(backend="cuda"), "backend must be one of triton, torch; got 'cuda'"),
    "bias_length": (dict(bias_V=torch.zeros(256)), "bias_V must be (257,), got (256,)"),
    "bias_dtype": (dict(bias_V=torch.zeros(257).long()), "bias_V must be float32"),
    "device_of_head": (dict(head=HEAD.to("meta")), "head_VD is on meta, hidden_TD on cpu"),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_refused_by_name(change: dict, message: str) -> None:
    tensors = {
        "hidden": HIDDEN,
        "head": HEAD,
        "target": PROBLEM.target_T,
        "sequence": torch.where(PROBLEM.sequence_T < 0, 0, PROBLEM.sequence_T),
        "rewards": PROBLEM.rewards_NK,
    }
    options = {name: value for name, value in change.items() if name not in tensors}
    tensors |= {name: value for name, value in change.items() if name in tensors}
    with pytest.raises(ValueError) as error:
        linear_grao_loss(*tensors.values(), **options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "weight_T, message",
    [
        (torch.ones(5), r"weight_T must be \(24,\), got \(5,\)"),
        (torch.ones(24, requires_grad=True), r"weight_T requires grad.*detach\(\)"),
        (torch.ones(24).long(), "weight_T must be floating point, got torch.int64"),
        (torch.ones(24, device="meta"), "weight_T must be on the CPU or beside hidden_TD"),
    ],
    ids=["length", "grad", "dtype", "device"],
)
def test_weights_refused_by_name(weight_T: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_weighted_cross_entropy(HIDDEN, HEAD, PROBLEM.target_T, weight_T)


def test_advantage_options_refused_by_name() -> None:
    with pytest.raises(ValueError, match="statistics must be one of"):
        group_advantages(PROBLEM.rewards_NK, statistics="none")
    with pytest.raises(ValueError, match="beta must be finite, got inf"):
        sequence_weights(PROBLEM.rewards_NK, beta=float("inf"))


def test_a_target_is_refused_in_the_row_that_it_has() -> None:
    """The message counts the rows of weight 0, which are dropped before targets are checked."""
    weight_T, target_T = torch.ones(24), PROBLEM.target_T.clone()
    weight_T[:9], target_T[11] = 0.0, 999
    with pytest.raises(ValueError, match=r"got 999 in row 11: rows without"):
        linear_weighted_cross_entropy(HIDDEN, HEAD, target_T, weight_T)


def weighted(hidden_TD: torch.Tensor) -> torch.Tensor:
    args = (hidden_TD, HEAD, PROBLEM.target_T)
    return linear_weighted_cross_entropy(*args, torch.ones(24)).loss


def logprobs(hidden_TD: torch.Tensor) -> torch.Tensor:
    return linear_logprobs(hidden_TD, HEAD, PROBLEM.target_T).logprob_T.sum()


@pytest.mark.parametrize("function", [weighted, logprobs])
def test_there_is_no_second_derivative(function) -> None:
    """Otherwise a gradient penalty would silently add 0, and a Hessian would be 0."""
    hidden_TD = HIDDEN.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"no second derivative: .* without create_graph=True"):
        torch.autograd.grad(function(hidden_TD), hidden_TD, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.functional.hvp(function, HIDDEN, HIDDEN)


@pytest.mark.parametrize("function", [weighted, logprobs])
def test_transforms_are_refused_by_name(function) -> None:
    with pytest.raises(
        ValueError, match=r"torch.func's grad and derivatives in forward mode do not pass"
    ):
        torch.func.grad(function)(HIDDEN)
    with pytest.raises(ValueError, match=r"torch.func's jvp .* backward or torch.autograd.grad"):
        torch.func.jvp(function, (HIDDEN,), (HIDDEN,))
    with (
        forward_ad.dual_level(),
        pytest.raises(ValueError, match="in forward mode do not pass"),
    ):
        function(forward_ad.make_dual(HIDDEN, HIDDEN))


def test_batches_of_torch_func_are_refused_where_they_do_not_work() -> None:
    with pytest.raises(ValueError, match=r"torch.func's vmap"):
        torch.vmap(weighted)(HIDDEN[None])
