"""One family's pass of the GRAO loss: packed, in repeated prompts, and by the naive formula.

All three are given the same model, groups and rewards, in float32. Packed is `share_prefix=True`,
repeated is `share_prefix=False`, which pads; naive is the stock model's full logits, one sequence
at a time (`naive_gradient`). The first two are held to each other before they are timed.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from step_problem import Case, make_rollout
from step_race import Contender, Race, take_turns
from step_sides import CONFIG, grao_weights, naive_gradient, take_gradients
from torch import Tensor

from grao_fast.policy import Policy, load_policy
from grao_fast.step import micro_batch_loss, to_groups

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from grao_fast.batch import Group

PACKED, REPEATED = "packed", "repeated"
LABELS = {PACKED: "grao-fast, shared prompts", REPEATED: "grao-fast, repeated prompts"}
CONTENDERS = {name: Contender(name, label) for name, label in LABELS.items()}
TOLERANCE = 1e-5

Gradient = tuple[float, list[Tensor]]  # the loss, and its gradient in every parameter


def race_family(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, case: Case, *, rounds: int
) -> tuple[Race, dict[str, Any]]:
    """Forward and backward of one batch, checked, then timed in turns.

    Returns:
        The race, and what is said beside its times: tokens computed by each, padding included, and
        `errors`, those of `off` for each pair that is compared.

    Raises:
        AssertionError: packed differs from repeated by more than 1e-5.
    """
    rollout = make_rollout(case, model.config.vocab_size, eos=tokenizer.eos_token_id)
    groups = to_groups(rollout, beta=CONFIG.beta, lam=CONFIG.lam)
    policies = {
        name: load_policy(
            model,
            config=CONFIG.replace(device="cpu", bf16=False, share_prefix=name == PACKED),
            tokenizer=tokenizer,
        )
        for name in CONTENDERS
    }
    errors = compare(policies, groups, naive_gradient(model, rollout, grao_weights(rollout)))
    for what, error in errors["packed and repeated"].items():
        assert error <= TOLERANCE, (
            f"{type(model).__name__}: the {what} of packed groups is off by {error:.2g} of that of "
            f"repeated prompts, {TOLERANCE:.0e} passes"
        )
    tokens = {name: policy.lay_out(groups).input_ids_BL.numel() for name, policy in policies.items()}
    useful = sum(len(ids) for group in groups for ids in group.sequence_ids)

    def run(name: str) -> int:
        gradient(policies[name], groups)
        return useful

    runs = {name: lambda turn, name=name: run(name) for name in policies}
    return take_turns(runs, {}, rounds, model.device), {"tokens": tokens, "errors": errors}


def compare(
    policies: dict[str, Policy], groups: list[Group], naive: Gradient
) -> dict[str, dict[str, float]]:
    """How far packed is from repeated, and both from naive.

    The naive formula has no loss of a mixture's router: beside it ours is left out too, and is
    part of what packed and repeated are compared by.
    """
    packed, repeated = (gradient(policies[name], groups) for name in (PACKED, REPEATED))
    errors = {"packed and repeated": off(packed, repeated)}
    if policies[PACKED].router is not None:
        packed, repeated = (
            gradient(dataclasses.replace(policies[name], router=None), groups)
            for name in (PACKED, REPEATED)
        )
    return errors | {
        "packed and naive": off(packed, naive),
        "repeated and naive": off(repeated, naive),
    }


def gradient(policy: Policy, groups: list[Group]) -> Gradient:
    """Of all groups in one micro-batch."""
    with policy.updating():
        batch = policy.lay_out(groups)
        loss = micro_batch_loss(policy, batch, CONFIG, num_prompts=len(groups)).loss
        loss.backward()
    return float(loss.detach()), take_gradients(policy.model)


def off(actual: Gradient, expected: Gradient) -> dict[str, float]:
    """The loss's relative error, and the largest of max|a - b| / max|b| of any parameter.

    NaN, also where a parameter's expected gradient is 0 everywhere, passes no comparison.
    """
    (loss, ours), (true_loss, theirs) = actual, expected
    errors = [(a - b).abs().max() / b.abs().max() for a, b in zip(ours, theirs, strict=True)]
    return {
        "loss": abs(loss - true_loss) / abs(true_loss),
        "gradient": float(torch.stack(errors).max()),
    }
