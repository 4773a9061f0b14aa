"""Checks whole steps and sampling phases of both sides, then times them in turns.

A side that is not installed, or finds no memory, leaves a reason in place of its figures.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import statistics
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from measure import peak_extra_mib, quartiles, seconds
from peers import _not_installed
from step_problem import Case, make_rollout
from step_sides import TRL, Ours, grao_weights, naive_gradient
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OURS, TRL_WHOLE, TRL_GROUPS, TRL_SAMPLE = "ours", "trl_whole", "trl_groups", "trl"
LABELS = {
    OURS: "grao-fast",
    TRL_WHOLE: "TRL GRPOTrainer, one micro-batch",
    TRL_GROUPS: "TRL GRPOTrainer, a micro-batch a group",
    TRL_SAMPLE: "TRL GRPOTrainer, `generate`",
}


class Contender(NamedTuple):
    name: str
    label: str


CONTENDERS = {name: Contender(name, label) for name, label in LABELS.items()}


class Timed(NamedTuple):
    """Seconds and useful tokens of each round, and peak memory beyond that before a call."""

    seconds: list[float]
    tokens: list[int]
    peak_extra_mib: float | None

    def summary(self) -> dict[str, Any]:
        """Return median and quartiles of the time, and the median of the tokens a second."""
        rates = [count / took for count, took in zip(self.tokens, self.seconds, strict=True)]
        return quartiles(self.seconds) | {
            "tokens_per_s": statistics.median(rates),
            "useful_tokens": statistics.median(self.tokens),
            "peak_extra_mib": self.peak_extra_mib,
        }


Race = tuple[dict[str, Timed], dict[str, str]]


def trl_absence() -> str | None:
    """Return what to install, or None where TRL is installed."""
    return _not_installed("trl", "1.16")


# An optimiser step


def race_steps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    case: Case,
    *,
    rounds: int,
    without_trl: str | None,
) -> Race:
    """Check each side's gradient, then time one optimiser step on the same batch in turns.

    without_trl: why TRL does not run; None: it does.

    Raises:
        AssertionError: a gradient is not that of the naive formula.
    """
    vocab, eos = model.config.vocab_size, tokenizer.eos_token_id
    rollout = make_rollout(case, vocab, eos=eos)
    small = make_rollout(case.replace(prompts=2, dead=0.5), vocab, eos=eos)
    expected = naive_gradient(model, small, grao_weights(small))[1]

    ours = Ours(copy.deepcopy(model), tokenizer)
    assert_same_gradient("ours", ours.gradient(small)[1], expected)
    runs: dict[str, Callable[[int], int]] = {OURS: lambda turn: ours.step(rollout)}
    if without_trl is None:
        trl = TRL(
            copy.deepcopy(model), tokenizer, K=case.samples + 1, longest=case.longest_response
        )
        assert_same_gradient("TRL", trl.gradient(small)[1], expected)
        whole, groups = (trl.load(rollout, parts) for parts in (1, case.prompts))
        runs[TRL_WHOLE] = lambda turn: trl.step(whole)
        runs[TRL_GROUPS] = lambda turn: trl.step(groups)
    del expected
    return take_turns(
        runs, dict.fromkeys((TRL_WHOLE, TRL_GROUPS), without_trl), rounds, model.device
    )


def assert_same_gradient(side: str, actual: list[Tensor], expected: list[Tensor]) -> None:
    """Check that half of the dtype's digits are right, in the norm of the whole gradient.

    On CUDA both sides compute in bfloat16 under autocast, and the truth here is in float32.
    """
    error = torch.stack([(a - b).norm() for a, b in zip(actual, expected, strict=True)]).norm()
    off = float(error / torch.stack([b.norm() for b in expected]).norm())
    on_cuda = expected[0].is_cuda
    allowed = torch.finfo(torch.bfloat16 if on_cuda else torch.float32).eps ** 0.5
    assert off <= allowed, f"{side}: the gradient is off by {off:.2g}, {allowed:.2g} passes"


# A sampling phase


def race_sampling(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    *,
    samples: int,
    longest: int,
    rounds: int,
    without_trl: str | None,
) -> Race:
    """Time `samples` completions of every prompt, each of at most `longest` tokens."""
    ours = Ours(copy.deepcopy(model), tokenizer)
    runs: dict[str, Callable[[int], int]] = {
        OURS: lambda turn: ours.sample(prompts, samples, longest, turn)
    }
    if without_trl is None:
        trl = TRL(copy.deepcopy(model), tokenizer, K=samples, longest=longest)
        runs[TRL_SAMPLE] = lambda turn: trl.sample(prompts, samples, longest, turn)
    return take_turns(runs, {TRL_SAMPLE: without_trl}, rounds, model.device)


# Time and memory


def take_turns(
    runs: Mapping[str, Callable[[int], int]],
    absences: Mapping[str, str | None],
    rounds: int,
    device: torch.device,
) -> Race:
    """Warm up, measure memory, then time rounds that each start with another contender."""
    absent = {name: reason for name, reason in absences.items() if reason is not None}
    peaks: dict[str, float | None] = {}
    for name, run in runs.items():
        try:
            run(0)
            give_back()  # a call that reuses freed memory would seem to need less
            peaks[name] = peak_extra_mib(lambda run=run: run(0), device)
        except torch.OutOfMemoryError:
            absent[name] = "out of memory"
        give_back()
    took: dict[str, list[float]] = {name: [] for name in peaks}
    tokens: dict[str, list[int]] = {name: [] for name in peaks}
    names = list(peaks)
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            took[name].append(
                seconds(lambda name=name, turn=turn: tokens[name].append(runs[name](turn)), device)
            )
    return {name: Timed(took[name], tokens[name], peaks[name]) for name in names}, absent


def give_back() -> None:
    """Return freed memory to the system, where the peak is read."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; musl has none
        if trim is not None:
            trim(0)
