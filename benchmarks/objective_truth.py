"""The objectives that are measured, each with its specification, and errors against it in float64.

Shapes: T rows (tokens), D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from batches import exact_weights
from measure import Outputs, errors
from objective_problem import Problem, as_batch_of
from torch import Tensor

from grao_fast.kernels.reference_objectives import (
    mixtures,
    own_logprob,
    policy_gradient,
    sequence_level,
    supervised,
)
from grao_fast.objectives import Groups, Objective, make_objective


class LogProbs(NamedTuple):
    """Log-probs of targets, differentiable, and entropies, constants to every loss."""

    logprob_T: Tensor
    entropy_T: Tensor


class Case(NamedTuple):
    """An objective, and whether the samples are of an earlier policy: then they have ratios."""

    objective: Objective
    off_policy: bool


# What `make_objective` takes. Samples are of an earlier policy where the paper's formula has a
# ratio. GSPO's own clip, of 3e-4, would clip nearly every sequence of the batch.
ON_POLICY = ("grao", "sft", "rft", "awr", "reinforce", "rloo", "dft", "dpo", "srft")
OFF_POLICY = (
    "grpo", "dr_grpo", "dapo", "cispo", "luffy", "chord", "chord(phi=True)", "uft", "hpt",
    "gspo(low=0.2, high=0.28)",
)  # fmt: skip


def cases() -> dict[str, Case]:
    """The cases by name: those of one pass first, as in docs/objectives.md."""
    made = {
        text: Case(make_objective(text), text in OFF_POLICY) for text in (*ON_POLICY, *OFF_POLICY)
    }
    return dict(sorted(made.items(), key=lambda item: item[1].objective.two_passes))


class Truth:
    """The losses and gradients of specifications in float64, which share one set of log-probs."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._outputs: dict[str, Outputs] = {}  # of the last case: sides of one follow each other
        self._hidden_TD = problem.hidden_TD.detach().double().requires_grad_()
        self._head_VD = problem.head_VD.detach().double().requires_grad_()
        logprob_TV = torch.log_softmax(self._hidden_TD @ self._head_VD.T, 1)
        self._logprobs = LogProbs(
            logprob_TV.gather(1, problem.target_T[:, None]).squeeze(1),
            -(logprob_TV.detach().exp() * logprob_TV.detach()).sum(1),
        )

    def outputs(self, text: str, case: Case) -> Outputs:
        """The true loss comes with what its error is measured by: its size, or if that is larger
        the sum of its coefficients' sizes, since terms of both signs cancel."""
        problem = as_batch_of(self._problem, case.objective)
        loss = specification(text, self._logprobs, problem, case)
        (coefficient_T,) = torch.autograd.grad(loss, self._logprobs.logprob_T, retain_graph=True)
        gradients = torch.autograd.grad(loss, (self._hidden_TD, self._head_VD), retain_graph=True)
        size = torch.maximum(loss.detach().abs(), coefficient_T.abs().sum())
        return Outputs(torch.stack([loss.detach(), size]), *gradients)

    def errors(self, text: str, case: Case, actual: Outputs) -> dict[str, float]:
        """The largest error of each output, relative to its largest true value.

        Raises:
            AssertionError: fewer than half of the dtype's digits are right.
        """
        if text not in self._outputs:
            self._outputs = {text: self.outputs(text, case)}
        found = errors(actual, self._outputs[text])
        allowed = torch.finfo(self._problem.hidden_TD.dtype).eps ** 0.5
        for name, error in found.items():
            assert error <= allowed, (
                f"{text}: {name} is off by {error:.2g} of its size, {allowed:.2g} passes"
            )
        return found


def specification(text: str, logprobs: LogProbs, problem: Problem, case: Case) -> Tensor:
    """The loss of log-probs by `grao_fast.kernels.reference_objectives`, GRAO's by `reference`."""
    given = Given(
        logprobs.logprob_T,
        logprobs.entropy_T,
        problem.old_logprob_T.double(),
        problem.initial_logprob_T.double(),
        problem.sequence_T,
        problem.groups,
    )
    return _SPECIFICATIONS[text.partition("(")[0]](given, case.objective)


class Given(NamedTuple):
    """What specifications are functions of, in float64."""

    logprob_T: Tensor
    entropy_T: Tensor
    old_T: Tensor
    initial_T: Tensor
    sequence_T: Tensor
    groups: Groups

    @property
    def rewarded(self) -> tuple[Tensor, Tensor]:
        return self.sequence_T, self.groups.rewards_NK

    def off_policy(self, objective: Objective) -> dict[str, Any]:
        return {"old_logprob_T": self.old_T, "clip": objective.clip}


# Without types, since options are those of each objective.
def _grao(given: Given, options: Any) -> Tensor:
    weight_T = exact_weights(*given.rewarded, reference_advantage=options.reference_advantage).to(
        given.logprob_T
    )
    return -(weight_T * given.logprob_T).sum()


def _rft(given: Given, options: Any) -> Tensor:
    kept = {"best": options.best, "threshold": options.threshold}
    return supervised.rft_loss(given.logprob_T, *given.rewarded, **kept)


def _awr(given: Given, options: Any) -> Tensor:
    weights = {"temperature": options.temperature, "cap": options.cap}
    return supervised.awr_loss(given.logprob_T, *given.rewarded, **weights)


def _grpo(given: Given, options: Any) -> Tensor:
    ratio = given.off_policy(options)
    return policy_gradient.grpo_loss(given.logprob_T, *given.rewarded, sigma=options.sigma, **ratio)


def _dr_grpo(given: Given, options: Any) -> Tensor:
    ratio, longest = given.off_policy(options), given.groups.max_new_tokens
    return policy_gradient.dr_grpo_loss(
        given.logprob_T, *given.rewarded, max_new_tokens=longest, **ratio
    )


def _chord(given: Given, options: Any) -> Tensor:
    mu = mixtures.chord_mu(
        given.groups.progress,
        start=options.mu_start,
        end=options.mu_end,
        decay=options.decay,
        schedule=options.schedule,
    )
    ratio = given.off_policy(options)
    return mixtures.chord_loss(given.logprob_T, *given.rewarded, mu=mu, phi=options.phi, **ratio)


def _uft(given: Given, options: Any) -> Tensor:
    share = mixtures.uft_hint_share(
        given.groups.progress,
        start=options.hint_start,
        end=options.hint_end,
        decay=options.decay,
    )
    imitation = {"hint_coef": options.hint_coef, "hint_share": share}
    ratio = given.off_policy(options)
    return mixtures.uft_loss(given.logprob_T, *given.rewarded, **imitation, **ratio)


def _hpt(given: Given, options: Any) -> Tensor:
    return mixtures.hpt_loss(
        given.logprob_T,
        *given.rewarded,
        gate=options.gate,
        sft_coef=options.sft_coef,
        max_new_tokens=given.groups.max_new_tokens,
        **given.off_policy(options),
    )


def _with_ratios(loss: Callable[..., Tensor]) -> Callable[[Given, Any], Tensor]:
    def specified(given: Given, options: Any) -> Tensor:
        low, high = options.clip
        return loss(given.logprob_T, given.old_T, *given.rewarded, low=low, high=high)

    return specified


def _gspo(given: Given, options: Any) -> Tensor:
    bounds = {"low": options.low, "high": options.high}
    return sequence_level.gspo(given.logprob_T, given.old_T, *given.rewarded, **bounds)


def _dpo(given: Given, options: Any) -> Tensor:
    return sequence_level.dpo(given.logprob_T, given.initial_T, *given.rewarded, beta=options.beta)


def _srft(given: Given, options: Any) -> Tensor:
    return sequence_level.srft(
        given.logprob_T, given.entropy_T, *given.rewarded, threshold=options.threshold
    )


def _without_options(loss: Callable[..., Tensor]) -> Callable[[Given, Any], Tensor]:
    return lambda given, _: loss(given.logprob_T, *given.rewarded)


_SPECIFICATIONS: dict[str, Callable[[Given, Any], Tensor]] = {
    "grao": _grao,
    "sft": _without_options(supervised.sft_loss),
    "rft": _rft,
    "awr": _awr,
    "reinforce": _without_options(policy_gradient.reinforce_loss),
    "rloo": _without_options(policy_gradient.rloo_loss),
    "grpo": _grpo,
    "dr_grpo": _dr_grpo,
    "dapo": _with_ratios(own_logprob.dapo),
    "cispo": _with_ratios(own_logprob.cispo),
    "luffy": _with_ratios(own_logprob.luffy),
    "chord": _chord,
    "uft": _uft,
    "hpt": _hpt,
    "dft": _without_options(own_logprob.dft),
    "gspo": _gspo,
    "dpo": _dpo,
    "srft": _srft,
}
