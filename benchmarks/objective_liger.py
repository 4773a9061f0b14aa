"""Liger's losses of the objectives that it has, each as its documentation says.

Liger takes whole sequences of one length and a mask, its DPO pairs. Each loss has one chunk, which
is fastest: the logits of its GRPO are chunked in any case, those of its DPO are few. A loss that is
linear in the log-probs, whose weight is one of a sequence, is Liger's CISPO without old log-probs.

Shapes: T rows (tokens), D width, N prompts, G samples, K = G + 1 sequences a prompt, S sequences, R
rows of each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from batches import SEQUENCE_ROWS
from objective_problem import Problem, terms_of
from objective_truth import Case
from peers import IGNORE
from torch import Tensor


def linear(problem: Problem, case: Case) -> Tensor:
    weight_SR = terms_of(problem, case.objective).sum(0).view(-1, SEQUENCE_ROWS)
    mask_SR = (weight_SR != 0).to(problem.hidden_TD.device)
    weight_S = weight_SR[:, -1].to(problem.hidden_TD.device)  # prompts' rows come first
    S = len(weight_SR)
    loss_function = _grpo_loss(S, loss_type="cispo", epsilon_high=5.0)
    loss, _ = loss_function(
        problem.hidden_TD.view(S, SEQUENCE_ROWS, -1),
        problem.head_VD,
        problem.target_T.view(S, SEQUENCE_ROWS),
        mask_SR.float(),
        weight_S * mask_SR.sum(),  # the loss divides by live rows
    )
    return loss


def clipped(loss_type: str, level: str = "token") -> Callable[[Problem, Case], Tensor]:
    """A loss of samples' ratios; `level` is that of a ratio, "token" or "sequence"."""

    def loss(problem: Problem, case: Case) -> Tensor:
        groups, (low, high) = problem.groups, _bounds(case.objective)
        assert not case.objective.uses_references, "all sequences are samples"
        S = len(problem.sequence_T) // SEQUENCE_ROWS
        loss_function = _grpo_loss(
            S,
            loss_type=loss_type,
            epsilon_low=low,
            epsilon_high=1 + high if loss_type == "cispo" else high,
            max_completion_length=groups.max_new_tokens if loss_type == "dr_grpo" else None,
            importance_sampling_level=level,
        )
        advantages_NK = case.objective.advantages(groups.rewards_NK).to(problem.hidden_TD.device)
        loss, _ = loss_function(
            problem.hidden_TD.view(S, SEQUENCE_ROWS, -1),
            problem.head_VD,
            problem.target_T.view(S, SEQUENCE_ROWS),
            _counts(problem).view(S, SEQUENCE_ROWS).float(),
            advantages_NK[:, :-1].flatten().float(),
            old_per_token_logps=problem.old_logprob_T.nan_to_num().view(S, SEQUENCE_ROWS),
        )
        return loss

    return loss


def dpo(problem: Problem, case: Case) -> Tensor:
    """It takes the initial policy as hidden states, for whose log-probs it has its own pass."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    rewards_NK = problem.groups.rewards_NK
    best_N, worst_N = rewards_NK.argmax(1), rewards_NK.argmin(1)
    paired_N = (rewards_NK.amax(1) != rewards_NK.amin(1)).nonzero().squeeze(1)
    pairs_S = torch.cat([each[paired_N] + paired_N * problem.K for each in (best_N, worst_N)])
    pairs_S = pairs_S.to(problem.hidden_TD.device)
    target_T = problem.target_T.masked_fill(~_counts(problem), IGNORE)
    loss_function = LigerFusedLinearDPOLoss(
        beta=case.objective.beta, compiled=False, chunk_size=len(paired_N)
    )
    loss, _ = loss_function(
        problem.head_VD,
        _sequences(problem.hidden_TD, pairs_S),
        _sequences(target_T, pairs_S),
        ref_input=_sequences(problem.initial_hidden_TD, pairs_S),
        ref_weight=problem.head_VD.detach(),
    )
    return loss * (len(paired_N) / len(rewards_NK))  # it divides by the pairs


LOSSES: dict[str, Callable[[Problem, Case], Tensor]] = {
    **dict.fromkeys(("grao", "sft", "rft", "awr", "reinforce", "rloo"), linear),
    "grpo": clipped("grpo"),
    "dr_grpo": clipped("dr_grpo"),
    "dapo": clipped("dapo"),
    "cispo": clipped("cispo"),
    "gspo": clipped("grpo", "sequence"),
    "dpo": dpo,
}


def _grpo_loss(sequences: int, **options: Any) -> Any:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    return LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=False, use_ref_model=False, chunk_size=sequences, **options
    )


def _bounds(objective: Any) -> tuple[float, float]:
    """Those of a token's ratio, or GSPO's, of a sequence's."""
    return objective.clip or (objective.low, objective.high)


def _sequences(rows_T: Tensor, chosen_S: Tensor) -> Tensor:
    """(chosen, R, ...) of (T, ...)."""
    return rows_T.view(-1, SEQUENCE_ROWS, *rows_T.shape[1:])[chosen_S]


def _counts(problem: Problem) -> Tensor:
    return (problem.sequence_T >= 0).to(problem.hidden_TD.device)
