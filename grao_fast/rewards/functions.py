"""Scores groups of completions with one or more reward functions.

A reward function is `f(prompts, completions, **columns) -> list[float | None]`, plain or async. One
call scores all completions of a step; `prompts` and the other columns of the dataset are repeated
to match. The function takes the arguments that it names, from `prompts`, `completions`,
`references` and the columns. If prompts are messages, so are completions and references:
[{"role": "assistant", "content": ...}]. It returns None for a completion that it cannot score.

The reward is the weighted sum of all functions that did not return None. Functions run
concurrently, see `grao_fast.rewards.calling`. Every function gets its own deep copy of all values,
which it may change; only objects that cannot be copied are shared. Functions marked by `per_group`
may score each group by itself while others are sampled, see `grao_fast.rewards.early`.

A reward may offer more, see `grao_fast.rewards.measured`: a check before the run, and metrics.

Suffixes of names: N prompts, K = G + 1 sequences of a group, R scored texts (completions and
references in one call), F functions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grao_fast.config import RewardType
from grao_fast.data.examples import Example
from grao_fast.models.placement import Placement
from grao_fast.rewards.calling import Caller
from grao_fast.rewards.early import EarlyCalls, EarlyFunction, is_per_group
from grao_fast.rewards.finding import (
    RewardError,
    RewardFunction,
    find_function,
    function_name,
    require_references,
    select_arguments,
)
from grao_fast.rewards.limits import Timeout, limit_of_each
from grao_fast.rewards.measured import Measured, Metrics, check_ready, take_metrics
from grao_fast.rewards.named import NamedReward
from grao_fast.rewards.placed import PlacedReward
from grao_fast.rewards.texts import (
    arguments,
    column_names,
    group_texts,
    labels_of,
    prompt_name,
    scored_texts,
)
from grao_fast.rewards.values import LARGEST
from grao_fast.system.errors import UserError


@dataclass(frozen=True)
class GroupScores:
    """Rewards of groups.

    rewards_NK: float64 on the CPU, the reference last; NaN for sequences without a reward.
    scores_FNG: float64, of every function for the samples alone; NaN where it gave none.
    names: of the functions.
    """

    rewards_NK: Tensor
    scores_FNG: Tensor
    names: list[str]

    @property
    def per_function(self) -> dict[str, float]:
        """The mean of every function over the samples; NaN if the function scored none."""
        means = self.scores_FNG.flatten(1).nanmean(dim=1).tolist()
        return dict(zip(self.names, means, strict=True))


def resolve_reward(
    spec: str | RewardFunction | Reward | Sequence[str | RewardFunction],
    *,
    weights: Sequence[float] | None = None,
    timeout: Timeout = None,
) -> Reward:
    """Make a Reward of a function, or of several.

    Args:
        spec: a callable, or its name as `find_function` reads it, or a list of these; a Reward
            keeps its functions.
        weights: one weight for each function; default: all 1.
        timeout: the most seconds that a call of a function may take, or one number for each
            function; None: no limit.

    Raises:
        RewardError: a function is not found, not callable, or takes no `completions`; or the number
            of weights or time limits is wrong.
    """
    if isinstance(spec, Reward):
        if weights is None and timeout is None:
            return spec
        return Reward(
            spec.functions,
            weights=spec.weights if weights is None else weights,
            timeout=spec.timeouts if timeout is None else timeout,
        )
    specs: list[Any] = list(spec) if isinstance(spec, (list, tuple)) else [spec]
    return Reward([find_function(item) for item in specs], weights=weights, timeout=timeout)


class Reward:
    """One or more reward functions and their weights."""

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        *,
        weights: Sequence[float] | None = None,
        timeout: Timeout = None,
    ) -> None:
        if not functions:
            raise RewardError("no reward function was given")
        weights = [1.0] * len(functions) if weights is None else list(weights)
        if len(weights) != len(functions) or not all(map(math.isfinite, weights)):
            raise RewardError(
                f"reward_weights must hold {len(functions)} finite numbers, one for each reward "
                f"function; got {weights}"
            )
        self.functions = list(functions)
        self.weights = [float(weight) for weight in weights]
        self.timeouts = limit_of_each(timeout, len(functions))
        self.names = _unique([function_name(function) for function in functions])
        self._caller = Caller(functions, timeouts=self.timeouts)
        self._early = {
            i: EarlyFunction(self.names[i], function, self.timeouts[i])
            for i, function in enumerate(functions)
            if is_per_group(function)
        }
        others = [i for i in range(len(functions)) if i not in self._early]
        self._caller_of_others = Caller(
            [functions[i] for i in others], timeouts=[self.timeouts[i] for i in others]
        )

    def check(self, examples: Sequence[Example], *, reward_type: RewardType) -> None:
        """Check that the functions can be called on these examples, without calling them.

        Raises RewardError if a function needs a column that the dataset lacks, if a pairwise one
        takes no `references`, or if no example has a reference to compare with.
        """
        offered = arguments(examples[:1], [""], [""], column_names(examples))
        for function in self.functions:
            if reward_type == "pairwise":
                require_references(function)
            select_arguments(function, offered)
            if isinstance(function, NamedReward):
                function.check(examples)
        if reward_type == "pairwise" and all(example.reference is None for example in examples):
            raise RewardError(
                "reward_type='pairwise' compares completions with references, but the dataset has "
                "none: add a column `reference`, or set reward_type='pointwise'"
            )

    def place(self, placement: Placement) -> None:
        """Load the models of rewards that have one, beside the policy; every process must."""
        for function in self.functions:
            if isinstance(function, PlacedReward):
                function.place(placement)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """A context in which each process can score alone: all must enter it together."""
        with ExitStack() as stack:
            for function in self.functions:
                if isinstance(function, PlacedReward):
                    stack.enter_context(function.ready())
            yield

    def check_ready(self) -> None:
        """Ask the functions that can tell whether they would fail. Raises RewardError if one does.

        It may call a server, so it is called once before a run.
        """
        check_ready(self.names, self.functions)

    @property
    def is_measured(self) -> bool:
        """Whether a function offers metrics."""
        return any(isinstance(function, Measured) for function in self.functions)

    def take_metrics(self) -> Metrics:
        """Return the functions' own metrics since the last call, by rewards/FUNCTION/METRIC."""
        return take_metrics(self.names, self.functions)

    def score_groups(
        self,
        examples: Sequence[Example],
        completions: Sequence[Sequence[str]],
        *,
        reward_type: RewardType,
        places: Sequence[int] | None = None,
        early: EarlyCalls | None = None,
        wanted_NK: Tensor | None = None,
    ) -> GroupScores:
        """Score G completions of every example, and its reference. Raises RewardError.

        places: numbers of the prompts in errors; None: 0, 1, 2...
        early: what `begin` returned, after all these groups have been begun.
        wanted_NK: bool, the sequences to score, the reference last; the others get NaN. None: all.

        "pointwise": samples and references are scored alike, in one call. "pairwise": samples are
        compared with their reference, whose own reward is 0; a group without a reference has no
        rewards.
        """
        groups, samples = len(examples), len(completions[0])
        places = range(groups) if places is None else places
        if len(completions) != groups or any(len(group) != samples for group in completions):
            raise UserError(
                f"completions must be {groups} groups of one size, got groups of "
                f"{[len(group) for group in completions]}"
            )
        # of every scored text: its index n * K + k in rewards_NK, the text, its name for errors
        cells, texts, labels = [], [], []
        for n, (example, group) in enumerate(zip(examples, completions, strict=True)):
            scored = scored_texts(example, group, reward_type)
            names = labels_of(prompt_name(places[n], example), len(scored), samples)
            wanted = [k for k in range(len(scored)) if wanted_NK is None or wanted_NK[n, k]]
            cells += [n * (samples + 1) + k for k in wanted]
            texts += [scored[k] for k in wanted]
            labels += [names[k] for k in wanted]
        examples_R = [examples[cell // (samples + 1)] for cell in cells]
        references = [example.reference for example in examples_R]
        known = None if early is None else early.scores(places)
        if early is not None and known is None:
            self._early = {}  # from now on they are called after sampling
        scores_FR = self._call(examples_R, texts, references, reward_type, labels, known)

        rewards_NK = torch.full((groups, samples + 1), math.nan, dtype=torch.float64)
        cell_R = torch.tensor(cells, dtype=torch.long)
        rewards_NK.view(-1)[cell_R] = self._sum(scores_FR, labels)
        if reward_type == "pairwise":
            present_N = torch.tensor([example.reference is not None for example in examples])
            rewards_NK[present_N, -1] = 0.0
        scores_FC = torch.full((len(self.functions), rewards_NK.numel()), math.nan).double()
        scores_FC[:, cell_R] = scores_FR
        scores_FNG = scores_FC.unflatten(1, (groups, samples + 1))[:, :, :-1]
        return GroupScores(rewards_NK, scores_FNG, self.names)

    def begin(
        self, examples: Sequence[Example], *, reward_type: RewardType, alone: bool
    ) -> EarlyCalls | None:
        """The calls for groups that are scored while others are sampled; none has begun yet.

        None if no function is marked by `per_group`.

        examples: of which calls are begun by their places.
        alone: see `EarlyCalls`.
        """
        if not self._early:
            return None
        texts = partial(group_texts, examples, column_names(examples), reward_type)
        return EarlyCalls(self._early, texts, alone=alone)

    def score(self, examples: Sequence[Example], completions: Sequence[str]) -> list[float]:
        """Score one completion of every example, pointwise; NaN for no reward."""
        references = [example.reference for example in examples]
        labels = [f"completion {index}" for index in range(len(examples))]
        scores_FR = self._call(examples, completions, references, "pointwise", labels)
        return self._sum(scores_FR, labels).tolist()

    def compare(
        self,
        examples: Sequence[Example],
        completions: Sequence[str],
        others: Sequence[str],
        *,
        reward_type: RewardType,
    ) -> list[float]:
        """Return R(o, other), positive if the completion is better than `other`; NaN for no reward.

        "pairwise": the functions get the others as `references`. "pointwise": the difference
        R(o) - R(other), both scored in one call.
        """
        if reward_type == "pairwise":
            labels = [f"pair {index}" for index in range(len(examples))]
            scores_FR = self._call(examples, completions, others, reward_type, labels)
            return self._sum(scores_FR, labels).tolist()
        both = self.score([*examples, *examples], [*completions, *others])
        half = len(examples)
        return [mine - other for mine, other in zip(both[:half], both[half:], strict=True)]

    def _call(
        self,
        examples: Sequence[Example],
        completions: Sequence[str],
        references: Sequence[str | None],
        reward_type: RewardType,
        labels: Sequence[str],
        known: Mapping[int, list[float]] | None = None,
    ) -> Tensor:
        """Return scores_FR, the float64 score of every text by every function; NaN for None.

        known: of the functions that are marked by `per_group`, if they have been called.
        """
        if reward_type == "pairwise":
            for function in self.functions:
                require_references(function)
        if not examples:
            return torch.empty(len(self.functions), 0, dtype=torch.float64)
        offered = arguments(examples, completions, references, column_names(examples))
        if known is None:
            return torch.tensor(self._caller.call(offered, labels), dtype=torch.float64)
        others = iter(self._caller_of_others.call(offered, labels))
        values = [known[i] if i in known else next(others) for i in range(len(self.functions))]
        return torch.tensor(values, dtype=torch.float64)

    def _sum(self, scores_FR: Tensor, labels: Sequence[str]) -> Tensor:
        """Return the weighted sum of the functions for every text; NaN without a score."""
        weights_F1 = torch.tensor(self.weights, dtype=torch.float64)[:, None]
        total_R = (weights_F1 * scores_FR).nansum(dim=0)
        if bool((total_R.abs() > LARGEST).any()):
            top = int(total_R.abs().argmax())
            raise RewardError(
                f"the weighted sum of the rewards {', '.join(self.names)} is {total_R[top]:g} for "
                f"{labels[top]}: beyond {LARGEST:g} mean and deviation overflow; lower "
                "reward_weights"
            )
        return total_R.masked_fill(scores_FR.isnan().all(dim=0), math.nan)


@contextmanager
def ready(*rewards: Reward | None) -> Iterator[None]:
    """A context in which each process can score by several rewards alone; see `Reward.ready`."""
    with ExitStack() as stack:
        for reward in filter(None, rewards):
            stack.enter_context(reward.ready())
        yield


def _unique(names: Sequence[str]) -> list[str]:
    return [
        name if name not in names[:index] else f"{name}_{names[:index].count(name) + 1}"
        for index, name in enumerate(names)
    ]
