"""What an objective is: from rewards and lengths to the coefficient of every token.

    loss = kl - sum_c terms_c,    terms_c = sum_t terms_ct value_t

is what `grao_fast.kernels.linear_policy_loss` computes in one pass over the vocabulary. An
objective says what terms_ct is. The value of a token is its log-prob, or follows from it by a row
form: a ratio to the log-prob that it was sampled with, or a shaping of references' tokens.

Suffixes: N prompts, G samples, K = G + 1 sequences of a prompt, the reference last, C terms of the
objective, T rows that predict a token.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from grao_fast.system.errors import UserError
from grao_fast.system.field_types import check_types


@dataclass(frozen=True)
class Groups:
    """All groups of a step, whatever process or micro-batch computes them; tensors on the CPU.

    rewards_NK: float64; NaN for an absent sequence, the reference included.
    length_NK: int64, the tokens of each sequence; 0 where it is absent.
    max_new_tokens: the most tokens that a sample may have.
    progress: the share of the run's steps that are done, in [0, 1).
    """

    rewards_NK: Tensor
    length_NK: Tensor
    max_new_tokens: int
    progress: float = 0.0

    @property
    def present_NK(self) -> Tensor:
        """Whether a sequence has a reward and a token."""
        return ~self.rewards_NK.isnan() & (self.length_NK > 0)


class Rows(NamedTuple):
    """The rows of a micro-batch of whole groups, of an objective that takes two passes.

    sequence_T: int64, n * K + k, where n counts the groups of the micro-batch; -1: does not count.
    K: sequences of a group, absent ones included.
    logprob_T, entropy_T: float32, under the policy, constants.
    old_logprob_T: under the policy that the step began with; None: that is this policy.
    ref_logprob_T: under the policy that training began with; None: not asked for.
    """

    sequence_T: Tensor
    K: int
    logprob_T: Tensor
    entropy_T: Tensor
    old_logprob_T: Tensor | None
    ref_logprob_T: Tensor | None


class SecondPass(NamedTuple):
    """The coefficients of log-probs whose gradient is the objective's, and the objective's value.

    terms_CT: float32. The gradient of -sum_ct terms_ct logp_t is that of the loss.
    values_C: the terms of the objective: the loss of the micro-batch is -sum(values_C).
    clipped_S: float32, 1 for each sequence that counts whose ratio `clip_options` hold, 0 for each
        other one that counts; None: they bound no ratios of sequences, or there are none.
    """

    terms_CT: Tensor
    values_C: Tensor
    clipped_S: Tensor | None = None


@dataclass(frozen=True)
class Objective(ABC):
    """An objective. Its fields are its options; a subclass states its formula and its source.

    terms: the names of its C terms, in metrics `objective/NAME`.
    needs_samples: whether completions are sampled and scored; False: references are enough, and
        K is 1.
    needs_references: whether a prompt without a reference has no use.
    uses_references: whether a reference may have a coefficient.
    has_dead_groups: whether nothing is learned from some groups whose rewards are all equal, and
        that have a reference where `needs_references`. Of most objectives these are all such
        groups; of HPT those above its gate, of RFT those below its threshold, and of REINFORCE
        those at the mean of the step.
    ratio: the form of a sample's token that has an old log-prob: "clipped" as in PPO, "truncated"
        for a constant weight as in CISPO; see `grao_fast.kernels.OffPolicy`.
    clip: the ratio's bounds (low, high) where the user sets none; None: tokens have no ratio that
        is clipped.
    clip_options: the options of a subclass that bound another ratio, such as a sequence's.
    shaping: the form of a reference's token, see `grao_fast.kernels.Shaping`; None: its log-prob.
    two_passes: whether coefficients depend on sums of log-probs: then the head is computed once
        for these, without gradients, and `second_pass` follows.
    needs_initial: whether `second_pass` needs log-probs under the policy that training began with.
    """

    terms: ClassVar[tuple[str, ...]] = ("policy",)
    needs_samples: ClassVar[bool] = True
    needs_references: ClassVar[bool] = False
    uses_references: ClassVar[bool] = True
    has_dead_groups: ClassVar[bool] = True
    ratio: ClassVar[str] = "clipped"
    clip: ClassVar[tuple[float, float] | None] = (0.2, 0.2)
    clip_options: ClassVar[tuple[str, ...]] = ()
    shaping: ClassVar[str | None] = None
    two_passes: ClassVar[bool] = False
    needs_initial: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Raise UserError for an option of another type, an infinite one, or an unknown word.

        A subclass with bounds calls this first.
        """
        check_types(self)
        hints = get_type_hints(type(self))
        for field in fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{field.name} must be finite, got {value}")
            if get_origin(hint) is Literal and value not in get_args(hint):
                words = ", ".join(map(str, get_args(hint)))
                raise UserError(f"{field.name} must be one of {words}; got {value!r}")

    @abstractmethod
    def advantages(self, rewards_NK: Tensor) -> Tensor:
        """(N, K) what weighs each sequence, for metrics too; NaN where it is absent.

        A group whose advantages are all 0 or NaN is dead: its coefficients are 0.
        """

    @abstractmethod
    def coefficients(self, groups: Groups) -> Tensor:
        """(C, N, K) float64: what multiplies the value of each token of a sequence, in each term.

        Means over tokens, samples and prompts are included, dead groups counted, so that the loss
        and the gradient of a step are sums over its micro-batches. 0 where a sequence is absent.
        """

    def sequence_weights(self, groups: Groups) -> Tensor:
        """(N, K) what multiplies the mean log-prob of each sequence in the prompt's objective."""
        return self.coefficients(groups).sum(0) * groups.length_NK * len(groups.length_NK)

    def shaped_rows(self, terms_CT: Tensor, is_reference_T: Tensor) -> Tensor:
        """(T,) bool: the rows that have the form `shaping`."""
        return is_reference_T

    def second_pass(self, terms_CT: Tensor, rows: Rows) -> SecondPass:
        """Coefficients from those of `coefficients`, by token, and the log-probs of the first pass.

        Only where `two_passes`; whatever a row of coefficient 0 holds must not matter.
        """
        raise NotImplementedError(f"{type(self).__name__} takes one pass")


def mean_over_tokens(weights_NK: Tensor, groups: Groups) -> Tensor:
    """(N, K) a sequence's weight spread over its tokens; 0 where it is absent."""
    length_NK = groups.length_NK.clamp(min=1)
    return torch.where(groups.present_NK, weights_NK.double() / length_NK, 0.0)


def token_terms(terms_CNK: Tensor, sequence_T: Tensor) -> Tensor:
    """(C, T) float32, for `linear_policy_loss`: the coefficients of each row's sequence.

    They are 0 for a row of sequence -1, and for one whose terms cancel: it has no gradient, so it
    is not computed, and its terms sum to 0 anyway.

    terms_CNK: from `Objective.coefficients`, of all groups or of those of a micro-batch.
    sequence_T: int64, n * K + k, where n counts these groups; -1: does not count.
    """
    terms_CT = terms_CNK.flatten(1)[:, sequence_T.clamp(min=0)].float()
    counts_T = (sequence_T >= 0) & (terms_CT.sum(0) != 0)
    return torch.where(counts_T, terms_CT, 0.0)
