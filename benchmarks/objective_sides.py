"""The head pass of an objective by ours, TRL's log-probs, Liger's losses and the naive formula.

Each side takes a `Problem`, as a batch of the objective, and returns the same loss, differentiable
in hidden_TD and head_VD. The truth is the specification in float64, which shares nothing with any
side.

Shapes: T rows (tokens), V vocabulary, N prompts, G samples, K = G + 1 sequences a prompt, C terms,
S sequences, R rows of each.
"""

from __future__ import annotations

import math

import objective_liger
import torch
from objective_problem import Problem, terms_of
from objective_truth import Case, LogProbs
from peers import _LIGER, Peer, _never, _without
from torch import Tensor

from grao_fast.kernels import OffPolicy, Shaping, linear_logprobs, linear_policy_loss
from grao_fast.objectives import Objective, Rows, SecondPass
from grao_fast.objectives.srft import SRFT

NO_SUCH_LOSS = "Liger has no such loss"

# Ours


def ours(problem: Problem, case: Case) -> Tensor:
    """Coefficients from rewards and lengths, then one pass over the head, or two."""
    objective = case.objective
    terms_CT = terms_of(problem, objective)
    operands = problem.hidden_TD, problem.head_VD, problem.target_T
    if objective.two_passes:
        second = objective.second_pass(
            terms_CT, _rows(_first_pass(problem, terms_CT), problem, case)
        )
        return _of_value(linear_policy_loss(*operands, second.terms_CT).loss, second)
    off_policy = shaping = None
    if case.off_policy:
        off_policy = OffPolicy(
            old_logprob_T=problem.old_logprob_T, clip=objective.clip, ratio=objective.ratio
        )
    if objective.shaping is not None:
        rows_T = objective.shaped_rows(terms_CT, problem.is_reference_T)
        shaping = Shaping(objective.shaping, rows_T)
    return linear_policy_loss(*operands, terms_CT, off_policy=off_policy, shaping=shaping).loss


@torch.no_grad()
def _first_pass(problem: Problem, terms_CT: Tensor) -> LogProbs:
    """The log-probs, and entropies, of rows that have a coefficient; NaN in the others."""
    live_R = _live_rows(problem, terms_CT)
    found = linear_logprobs(
        problem.hidden_TD[live_R], problem.head_VD, problem.target_T[live_R], entropy=True
    )
    assert found.entropy_T is not None, "asked for"
    return LogProbs(
        *(_spread(each, live_R, problem) for each in (found.logprob_T, found.entropy_T))
    )


def _rows(logprobs: LogProbs, problem: Problem, case: Case) -> Rows:
    """What a second pass needs of a first one."""
    return Rows(
        sequence_T=problem.sequence_T,
        K=problem.K,
        logprob_T=logprobs.logprob_T.detach(),
        entropy_T=logprobs.entropy_T.detach(),
        old_logprob_T=problem.old_logprob_T if case.off_policy else None,
        ref_logprob_T=problem.initial_logprob_T if case.objective.needs_initial else None,
    )


def _live_rows(problem: Problem, terms_CT: Tensor) -> Tensor:
    return (terms_CT != 0).any(0).nonzero().squeeze(1).to(problem.hidden_TD.device)


def _spread(values_R: Tensor, live_R: Tensor, problem: Problem) -> Tensor:
    """(T,) NaN in rows that are not live."""
    values_T = values_R.new_full(problem.target_T.shape, math.nan)
    return values_T.index_copy(0, live_R, values_R)


# Log-probs by others, and the loss from them


def trl(problem: Problem, case: Case) -> Tensor:
    """Call TRL's chunked log-probs as `peers._trl` does: on CUDA for live rows only."""
    from trl.kernels import ChunkedLogProbFunction

    hidden_RD, target_R, live_R = problem.hidden_TD, problem.target_T, None
    if hidden_RD.is_cuda:
        live_R = _live_rows(problem, terms_of(problem, case.objective))
        hidden_RD, target_R = hidden_RD[live_R], target_R[live_R]
    outputs = ("entropy",) if _has_entropies(case) else ()
    logprob_R, entropy_R, *_ = ChunkedLogProbFunction.apply(
        hidden_RD, problem.head_VD, None, target_R, 1.0, 32768, None, 1.0, outputs
    )
    found = LogProbs(logprob_R, logprob_R if entropy_R is None else entropy_R)
    if live_R is not None:
        found = LogProbs(*(_spread(each, live_R, problem) for each in found))
    return loss_of(found, problem, case)


def naive(problem: Problem, case: Case) -> Tensor:
    logits_TV = (problem.hidden_TD @ problem.head_VD.T).float()
    logprob_TV = torch.log_softmax(logits_TV, 1)
    logprob_T = logprob_TV.gather(1, problem.target_T[:, None]).squeeze(1)
    entropy_T = logprob_T
    if _has_entropies(case):
        with torch.no_grad():
            entropy_T = -(logprob_TV.exp() * logprob_TV).sum(1)
    return loss_of(LogProbs(logprob_T, entropy_T), problem, case)


def _has_entropies(case: Case) -> bool:
    """Whether the loss has entropies in it."""
    return isinstance(case.objective, SRFT)


def loss_of(logprobs: LogProbs, problem: Problem, case: Case) -> Tensor:
    """The loss as plain operations on (T,) log-probs, with the objective's own coefficients.

    What a row without a coefficient holds, NaN included, has no effect.
    """
    objective, logprob_T = case.objective, logprobs.logprob_T
    terms_CT = terms_of(problem, objective)
    if objective.two_passes:
        second = objective.second_pass(terms_CT, _rows(logprobs, problem, case))
        weight_T = second.terms_CT.sum(0).to(logprob_T.device)
        return _of_value(-_product(weight_T, logprob_T).sum(), second)
    weight_T = terms_CT.sum(0).to(logprob_T.device)
    value_T = logprob_T
    if case.off_policy:
        value_T = _ratios(logprob_T, weight_T, problem.old_logprob_T, objective)
    if objective.shaping is not None:
        rows_T = objective.shaped_rows(terms_CT, problem.is_reference_T).to(logprob_T.device)
        value_T = torch.where(rows_T, _shaped(logprob_T, objective.shaping), value_T)
    return -_product(weight_T, value_T).sum()


def _product(weight_T: Tensor, value_T: Tensor) -> Tensor:
    return torch.where(weight_T == 0, 0, weight_T * value_T)


def _of_value(linear: Tensor, second: SecondPass) -> Tensor:
    """The objective's value, with the gradient of the linear loss."""
    return linear + (-second.values_C.sum().to(linear) - linear).detach()


def _ratios(logprob_T: Tensor, weight_T: Tensor, old_T: Tensor, objective: Objective) -> Tensor:
    low, high = objective.clip or (1.0, math.inf)
    rho_T = (logprob_T - old_T.nan_to_num()).exp()
    held_T = rho_T.clamp(1 - low, 1 + high)
    if objective.ratio == "truncated":
        value_T = held_T.detach() * logprob_T
    else:
        value_T = torch.where(
            weight_T > 0, torch.minimum(rho_T, held_T), torch.maximum(rho_T, held_T)
        )
    return torch.where(old_T.isnan(), logprob_T, value_T)


def _shaped(logprob_T: Tensor, form: str) -> Tensor:
    p_T = logprob_T.exp()
    if form == "luffy":
        return p_T / (p_T + 0.1)
    return (p_T if form == "dft" else p_T * (1 - p_T)).detach() * logprob_T


# Contenders


def sides(text: str, case: Case) -> dict[str, Peer]:
    """The four contenders of a case, by name."""
    made = {
        "ours": Peer("ours", "grao-fast", lambda problem: ours(problem, case), _never),
        "trl": Peer(
            "trl",
            "TRL chunked log-probs",
            lambda problem: trl(problem, case),
            _without("trl", "1.16"),
        ),
        "liger": Peer("liger", "Liger GRPO, DPO", _never, _no_such_loss),
        "naive": Peer("naive", "naive formula", lambda problem: naive(problem, case), _never),
    }
    if liger := objective_liger.LOSSES.get(text.partition("(")[0]):
        made["liger"] = made["liger"]._replace(
            loss=lambda problem: liger(problem, case), absence=_without(*_LIGER)
        )
    return made


def _no_such_loss(problem: Problem) -> str:
    return NO_SUCH_LOSS
