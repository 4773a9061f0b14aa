"""The operators' code on CUDA tensors without values: devices, dtypes, launches, no waiting.

Values are tested in Triton's interpreter, by test_rows.py and others.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import fake_cuda
import pytest
import torch
from problem import Problem, make_problem
from test_no_sync import DTYPES, OFF_POLICY
from torch import Tensor

from grao_fast.kernels import (
    group_advantages,
    linear_grao_loss,
    linear_logprobs,
    linear_weighted_cross_entropy,
    sequence_weights,
)
from grao_fast.kernels.one_pass import live_rows
from grao_fast.kernels.vocab_parallel import Shard, VocabParallel

pytestmark = pytest.mark.skipif(fake_cuda.why_not() is not None, reason=str(fake_cuda.why_not()))

CHUNKS = {"workspace_mib": 0.02}  # several


@pytest.fixture(autouse=True)
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    fake_cuda.launch_nothing(monkeypatch)
    with fake_cuda.fake_cuda():
        yield


def moved(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return tensor.to("cuda", dtype or tensor.dtype, non_blocking=True)


def operands(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    tensors = (problem.hidden_TD, problem.head_VD)
    hidden_TD, head_VD = (moved(each, dtype).requires_grad_() for each in tensors)
    return hidden_TD, head_VD


@pytest.mark.parametrize("rewards_on", ["cpu", "cuda"])
@pytest.mark.parametrize("head_grad", [None, "fp32", "own"])
@pytest.mark.parametrize("options", [{}, OFF_POLICY], ids=["plain", "off_policy"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_grao_loss(dtype, options, head_grad, rewards_on) -> None:
    problem = make_problem(bias=bool(options))
    hidden_TD, head_VD = operands(problem, dtype)
    extra = dict(options)
    if problem.bias_V is not None:
        extra |= {"bias_V": moved(problem.bias_V, dtype).requires_grad_(), "softcap": 5.0}
    if head_grad:
        kept = torch.float32 if head_grad == "fp32" else dtype
        extra["head_grad_VD"] = torch.zeros(head_VD.shape, dtype=kept, device="cuda")
    small = [problem.target_T, problem.sequence_T, problem.rewards_NK]
    if rewards_on == "cuda":
        small = [moved(each) for each in small]
    result = linear_grao_loss(hidden_TD, head_VD, *small, **extra, **CHUNKS)
    result.loss.backward()
    for name, value in result._asdict().items():
        home = rewards_on if name == "advantages_NK" else "cuda"
        assert value is None or value.device.type == home, name
    assert hidden_TD.grad is not None and hidden_TD.grad.dtype == dtype
    assert (head_VD.grad is None) == bool(head_grad)


@pytest.mark.parametrize("weights_on", ["cpu", "cuda"])
@pytest.mark.parametrize("frozen", [None, "hidden_TD", "head_VD"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_other_losses(dtype: torch.dtype, frozen: str | None, weights_on: str) -> None:
    problem = make_problem()
    hidden_TD, head_VD = operands(problem, dtype)
    hidden_TD.requires_grad_(frozen != "hidden_TD")
    head_VD.requires_grad_(frozen != "head_VD")
    weight_T = torch.linspace(-1, 1, 24)
    weight_T = moved(weight_T) if weights_on == "cuda" else weight_T
    args = (hidden_TD, head_VD, problem.target_T)
    linear_weighted_cross_entropy(*args, weight_T, **CHUNKS).loss.mul(3).backward()
    result = linear_logprobs(*args, entropy=weights_on == "cpu", **CHUNKS)
    loss = result.logprob_T.sum()
    (loss if result.entropy_T is None else loss + result.entropy_T.sum()).backward()
    assert (hidden_TD.grad is None) == (frozen == "hidden_TD")
    assert (head_VD.grad is None) == (frozen == "head_VD")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_operands_in_float32(dtype: torch.dtype) -> None:
    problem = make_problem()
    hidden_TD, head_VD = operands(problem, torch.float32)
    args = (hidden_TD.to(dtype), head_VD, problem.target_T)
    head_grad_VD = torch.zeros(head_VD.shape, device="cuda")
    with torch.autocast("cuda", dtype=dtype):
        group = (problem.sequence_T, problem.rewards_NK)
        loss = linear_grao_loss(*args, *group, head_grad_VD=head_grad_VD, **CHUNKS).loss
        logprob_T = linear_logprobs(*args, **CHUNKS).logprob_T
    loss.backward()
    logprob_T.sum().backward()
    assert hidden_TD.grad is not None and head_VD.grad is not None
    assert hidden_TD.grad.dtype == head_VD.grad.dtype == torch.float32


@pytest.mark.parametrize("options", [{}, OFF_POLICY], ids=["plain", "off_policy"])
def test_a_part_of_a_vocabulary(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that processes reduce are on the device."""

    def reduce(shard: Shard, tensor: Tensor) -> Tensor:
        assert tensor.is_cuda
        return tensor

    group: Any = SimpleNamespace(rank=lambda: 1, size=lambda: 2, group_name="two")
    monkeypatch.setattr(Shard, "group", group)
    for name in ("sum_", "max_"):
        monkeypatch.setattr(Shard, name, reduce)
    problem = make_problem()
    hidden_TD, head_VD = operands(problem, torch.bfloat16)
    result = linear_grao_loss(
        hidden_TD,
        head_VD,
        problem.target_T,
        problem.sequence_T,
        problem.rewards_NK,
        vocab_parallel=VocabParallel(group, 2 * len(head_VD)),
        **options,
        **CHUNKS,
    )
    result.loss.backward()


def test_advantages_are_made_where_rewards_are() -> None:
    advantages_NK = group_advantages(moved(make_problem().rewards_NK))
    assert advantages_NK.is_cuda and sequence_weights(advantages_NK).is_cuda


@pytest.mark.parametrize(
    ("copy", "error"),
    [
        (lambda tensor, device: tensor, r"_ptr is on cpu|two devices"),
        (lambda tensor, device: tensor.to(device), r"_to_copy\S* from cpu to cuda"),
    ],
    ids=["left behind", "waited for"],
)
def test_mistakes_are_seen(copy: Any, error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above fail if `to_device` leaves a tensor behind, or waits for its copy."""
    monkeypatch.setattr(live_rows, "to_device", copy)
    problem = make_problem()
    weight_T = torch.ones(24)
    with pytest.raises((RuntimeError, AssertionError), match=error):
        linear_weighted_cross_entropy(
            *operands(problem, torch.bfloat16), problem.target_T, weight_T
        )


def test_a_look_at_a_value_is_seen() -> None:
    with pytest.raises(RuntimeError, match="_local_scalar_dense"):
        moved(torch.ones(3)).sum().item()
