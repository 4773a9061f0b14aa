"""The public functions on a case, with a whole head or a shard of it; and the row functions."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from grao_fast.kernels import (
    OffPolicy,
    Shaping,
    linear_grao_loss,
    linear_logprobs,
    linear_policy_loss,
    linear_weighted_cross_entropy,
)
from grao_fast.kernels.vocab_parallel import Shard


def backward(
    case: dict[str, Any], operands: dict[str, Tensor], **options: Any
) -> dict[str, Tensor]:
    """Outputs by name, and gradients of operands as d<name> where there are any."""
    if case.get("compiled"):
        torch._dynamo.reset()
        function = torch.compile(_losses, fullgraph=True, backend="aot_eager")
    else:
        function = _losses
    result, loss = function(
        case, operands, {**case["options"], "bias_V": operands["bias_V"], **options}
    )
    loss.backward()
    outputs = {name: x.detach() for name, x in result._asdict().items() if x is not None}
    return outputs | {f"d{name}": x.grad for name, x in operands.items() if x.grad is not None}


def _losses(case: dict[str, Any], operands: dict[str, Tensor], options: dict[str, Any]):
    args = (operands["hidden_TD"], operands["head_VD"], case["target_T"])
    if case["function"] == "grao":
        result = linear_grao_loss(*args, case["sequence_T"], case["rewards_NK"], **options)
        loss = result.loss
    elif case["function"] == "weighted":
        result = linear_weighted_cross_entropy(*args, case["weight_T"], **options)
        loss = result.loss
    elif case["function"] == "policy":
        shaping = Shaping(case["form"], case["weight_T"] > 0)
        given = {"off_policy": OffPolicy(**case["off_policy"]), "shaping": shaping}
        result = linear_policy_loss(*args, case["weight_T"][None], **given, **options)
        loss = result.loss
    else:
        result = linear_logprobs(*args, entropy=True, **options)
        loss = (case["weight_T"] * result.logprob_T).sum()
        loss = loss + (case["weight_T"].flip(0) * result.entropy_T).sum()
    return result, loss


def row_functions(backend: str) -> ModuleType:
    if backend == "triton":
        from grao_fast.kernels.rows import triton_rows as rows
    else:
        from grao_fast.kernels.rows import torch_rows as rows
    return rows


class OneProcess(Shard):
    """A group of one process, whose shard is the whole vocabulary."""

    start = 0

    def max_(self, tensor: Tensor) -> Tensor:
        return tensor

    sum_ = max_
