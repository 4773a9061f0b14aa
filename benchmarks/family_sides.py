"""Passes of the GRAO loss through one model: packed, with repeated prompts, and naive.

All three are given the same model, groups and rewards, in float32. Packed is `share_prefix=True`,
repeated is `share_prefix=False`, which pads; naive is the stock model's full logits, one sequence
at a time (`naive_gradient`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from step_problem import useful_tokens
from step_sides import CONFIG, grao_weights, naive_gradient, take_gradients
from torch import Tensor

from grao_fast.models.policy import Policy
from grao_fast.sampling.loading import load_policy
from grao_fast.training.coefficients import to_groups
from grao_fast.training.step import micro_batch_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from grao_fast.data.packing import Group
    from grao_fast.training.rollout import Rollout

PACKED, REPEATED = "packed", "repeated"
TOLERANCE = 1e-5

Gradient = tuple[float, list[Tensor]]  # the loss, and its gradient in every parameter


def compare_family(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rollout: Rollout,
    *,
    held: tuple[str, ...],
) -> tuple[dict[str, Callable[[int], int]], dict[str, Any]]:
    """Run forward and backward of one batch in all three ways and compare the gradients.

    held: which errors of packed against repeated must be within 1e-5.

    Returns:
        For `take_turns` the passes of packed and repeated; and what is said beside their times: the
        tokens that each computes, how many of the repeated ones are padding, and `errors`, those of
        `off` for each pair that is compared.

    Raises:
        AssertionError: one of those that are held is above 1e-5.
    """
    groups = to_groups(rollout, CONFIG.objective_options)
    policies = {
        name: load_policy(
            model,
            config=CONFIG.replace(device="cpu", bf16=False, share_prefix=name == PACKED),
            tokenizer=tokenizer,
        ).policy
        for name in (PACKED, REPEATED)
    }
    errors = compare(policies, groups, naive_gradient(model, rollout, grao_weights(rollout)))
    for what in held:
        error = errors["packed, repeated"][what]
        assert error <= TOLERANCE, (
            f"{type(model).__name__}: {what} of packed groups is off by {error:.2g} of that of "
            f"repeated prompts, {TOLERANCE:.0e} passes"
        )
    packed, repeated = (policies[name].lay_out(groups) for name in (PACKED, REPEATED))
    mask_BL = repeated.attention_mask_BL
    assert mask_BL is not None
    facts = {
        "tokens": {PACKED: packed.input_ids_BL.numel(), REPEATED: mask_BL.numel()},
        "padding": int((mask_BL == 0).sum()),
        "errors": errors,
    }

    def run(name: str) -> int:
        gradient(policies[name], groups)
        return useful_tokens(rollout)

    return {name: lambda turn, name=name: run(name) for name in policies}, facts


def compare(
    policies: dict[str, Policy], groups: list[Group], naive: Gradient
) -> dict[str, dict[str, float]]:
    """Return the errors of packed against repeated, and of both against naive.

    A mixture's router adds its loss where packed is compared with repeated; the naive formula has
    none, and beside it theirs is left out.
    """
    packed, repeated = (gradient(policies[name], groups) for name in (PACKED, REPEATED))
    errors = {"packed, repeated": off(packed, repeated)}
    if policies[PACKED].router is not None:
        packed, repeated = (
            gradient(dataclasses.replace(policies[name], router=None), groups)
            for name in (PACKED, REPEATED)
        )
    return errors | {
        "packed, naive": off(packed, naive),
        "repeated, naive": off(repeated, naive),
    }


def gradient(policy: Policy, groups: list[Group]) -> Gradient:
    """Return the loss and gradient of all groups in one micro-batch."""
    with policy.updating():
        batch = policy.lay_out(groups)
        loss = micro_batch_loss(
            policy, batch, CONFIG.objective_options, num_prompts=len(groups)
        ).loss
        loss.backward()
    return float(loss.detach()), take_gradients(policy.model)


def off(actual: Gradient, expected: Gradient) -> dict[str, float]:
    """Return relative errors of the loss, the whole gradient in norm, and the worst parameter.

    The last is the largest of max|a - b| / max|b| over parameters; NaN or infinite, and so within
    no bound, where a parameter's expected gradient is 0 everywhere.
    """
    (loss, ours), (true_loss, theirs) = actual, expected
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    worst = [d.abs().max() / b.abs().max() for d, b in zip(differences, theirs, strict=True)]
    return {
        "loss": abs(loss - true_loss) / abs(true_loss),
        "gradient": float(norm(differences) / norm(theirs)),
        "worst parameter": float(torch.stack(worst).max()),
    }


def norm(gradients: list[Tensor]) -> Tensor:
    return torch.stack([each.norm() for each in gradients]).norm()
