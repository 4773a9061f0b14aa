"""Packs groups of sequences into micro-batches: tensors for one forward and backward pass.

A group is one prompt and its K = G + 1 continuations: G samples, then the reference. It is laid out
as

    [prompt, o_1, ..., o_G, y]      positions 0..P-1, then P, P+1, ... again in every continuation

so that the prompt is computed once. Groups follow each other in one row, without padding. The last
position of the prompt predicts the first token of every continuation, so the rows that enter the
language-model head contain that position once for each.

Suffixes of names: B rows of L tokens, T rows of the head (one for each predicted token), N groups,
K sequences of a group, P tokens of a prompt, C terms of the objective.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """One prompt with its continuations, as token ids.

    Args:
        prompt_ids: P tokens, at least one.
        sequence_ids: K lists, the reference last; an empty list is an absent sequence.
        terms_CK: float64 on the CPU, the coefficient of a token of each sequence in each term of
            the objective; None: one term, in which all are 1.
        kl_coef_K: float64 on the CPU, the coefficient of its KL; None: 0.
        sampler_logprobs: log-probs under the sampler of every token of the first sequences, in the
            order of sequence_ids; the others, such as the reference, have none.
    """

    prompt_ids: list[int]
    sequence_ids: list[list[int]]
    terms_CK: Tensor | None = None
    kl_coef_K: Tensor | None = None
    sampler_logprobs: Sequence[Sequence[float]] = ()

    @property
    def coefficients_CK(self) -> Tensor:
        """terms_CK, whether given or not."""
        if self.terms_CK is None:
            return torch.ones(1, len(self.sequence_ids), dtype=torch.float64)
        return self.terms_CK

    @cached_property
    def live_K(self) -> Tensor:
        """(K,) bool: which sequences have a gradient, of the objective or of the KL."""
        live_K = self.coefficients_CK.sum(0) != 0
        return live_K if self.kl_coef_K is None else live_K | (self.kl_coef_K != 0)

    @cached_property
    def live_sequences(self) -> list[int]:
        """Indices of the sequences that need a forward pass: those live and not empty."""
        live = self.live_K.tolist()
        return [k for k, ids in enumerate(self.sequence_ids) if ids and live[k]]

    @cached_property
    def size(self) -> Size:
        """Size of the group's forward pass; zero for a dead group, which needs none."""
        lengths = [len(self.sequence_ids[k]) for k in self.live_sequences]
        P = len(self.prompt_ids)
        return Size(len(lengths), P + max(lengths), P + sum(lengths)) if lengths else Size(0, 0, 0)


@dataclass(frozen=True)
class Size:
    """Size of a forward pass.

    sequences: the number of live sequences.
    longest: tokens of the longest sequence, its prompt included.
    packed: tokens of all sequences, with every prompt counted once.
    """

    sequences: int
    longest: int
    packed: int

    def __add__(self, other: Size) -> Size:
        longest = max(self.longest, other.longest)
        return Size(self.sequences + other.sequences, longest, self.packed + other.packed)

    def tokens(self, *, share_prefix: bool) -> int:
        """Tokens of the pass: packed with shared prompts, or padded to the longest sequence."""
        return self.packed if share_prefix else self.sequences * self.longest


@dataclass(frozen=True)
class Segment:
    """The place of one group in a packed row: a prefix, then suffixes that each attend to it."""

    start: int
    prefix_length: int
    suffix_lengths: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + self.prefix_length + sum(self.suffix_lengths)


@dataclass(frozen=True)
class MicroBatch:
    """Whole groups for one forward and backward pass; all tensors are on the CPU.

    input_ids_BL, position_ids_BL: int64, the rows of the forward pass.
    attention_mask_BL: int64, 0 on padding; None for a packed row.
    segments: the places of the groups in a packed row; None for padded rows.
    place_NT: for each group, int64 indices of its tokens in the flattened rows, its prompt once.
    row_T: int64, indices in the flattened (B * L) rows of the hidden states that predict target_T.
    target_T: int64 token ids.
    sequence_T: int64, n * K + k of every target, where n counts the groups of this micro-batch.
    K: sequences of a group, absent ones included.
    terms_CT: float32, the coefficients of every target in the terms of the objective. Where they
        cancel there is no gradient, and all are 0.
    kl_coef_T: float32, that of its KL; None: no group has one.
    sampler_logprob_T: float32, log-prob of every target under the sampler; NaN if unknown.
    """

    input_ids_BL: Tensor
    position_ids_BL: Tensor
    attention_mask_BL: Tensor | None
    segments: tuple[Segment, ...] | None
    place_NT: tuple[Tensor, ...]
    row_T: Tensor
    target_T: Tensor
    sequence_T: Tensor
    K: int
    terms_CT: Tensor
    kl_coef_T: Tensor | None
    sampler_logprob_T: Tensor

    @property
    def is_idle(self) -> bool:
        """Whether no target counts: see `idle`."""
        return not bool((self.sequence_T >= 0).any())

    @property
    def is_sample_T(self) -> Tensor:
        """(T,) bool: whether a target is a sample's; neither a reference's, nor one of -1."""
        return (self.sequence_T >= 0) & (self.sequence_T % self.K != self.K - 1)

    @property
    def is_reference_T(self) -> Tensor:
        """(T,) bool: whether a target is a reference's."""
        return (self.sequence_T >= 0) & (self.sequence_T % self.K == self.K - 1)


def split_by_tokens(
    groups: Sequence[Group], max_tokens: int, *, share_prefix: bool = True
) -> Iterator[list[Group]]:
    """Split groups into lists of at most `max_tokens` each; dead groups are left out.

    The longest groups come first, so that a run which does not fit in memory fails at once. A group
    of more than `max_tokens` makes a list of its own.
    """

    def tokens(size: Size) -> int:
        return size.tokens(share_prefix=share_prefix)

    live = (group for group in groups if group.size.sequences)
    waiting = sorted(live, key=lambda group: tokens(group.size), reverse=True)
    while waiting:
        chosen, rest, size = waiting[:1], [], waiting[0].size
        for group in waiting[1:]:
            if tokens(size + group.size) <= max_tokens:
                chosen.append(group)
                size += group.size
            else:
                rest.append(group)
        yield chosen
        waiting = rest


def share_out(
    groups: Sequence[Group], max_tokens: int, processes: int, *, share_prefix: bool = True
) -> list[list[list[Group]]]:
    """The micro-batches of each process: `split_by_tokens`, dealt out.

    Processes get as many micro-batches as each other or one fewer, alike in tokens round by round.
    Every process makes the same plan from the same groups. Micro-batches of several groups are
    halved where that gives idle processes work.
    """

    def tokens(part: list[Group]) -> int:
        size = sum((group.size for group in part), start=Size(0, 0, 0))
        return size.tokens(share_prefix=share_prefix)

    parts = list(split_by_tokens(groups, max_tokens, share_prefix=share_prefix))
    while len(parts) % processes:
        divisible = [part for part in parts if len(part) > 1]
        if not divisible:
            break
        largest = max(divisible, key=tokens)
        parts.remove(largest)
        parts += [largest[::2], largest[1::2]]
    if processes > 1:
        parts.sort(key=tokens, reverse=True)
    return [parts[process::processes] for process in range(processes)]


def idle(group: Group, lay_out: Callable[[list[Group]], MicroBatch]) -> MicroBatch:
    """A micro-batch of a few tokens without weight, to keep step with other processes.

    lay_out: `pack`, or `pad` with its padding token.
    """
    K = len(group.sequence_ids)
    small = Group(
        prompt_ids=group.prompt_ids[:1],
        sequence_ids=[[group.prompt_ids[0]]] * K,
        terms_CK=torch.ones_like(group.coefficients_CK),
        kl_coef_K=group.kl_coef_K,
    )
    batch = lay_out([small])
    return replace(
        batch,
        sequence_T=torch.full_like(batch.sequence_T, -1),
        terms_CT=torch.zeros_like(batch.terms_CT),
        kl_coef_T=None if batch.kl_coef_T is None else torch.zeros_like(batch.kl_coef_T),
    )


def pack(groups: Sequence[Group]) -> MicroBatch:
    """Lay out live groups in one packed row, with every prompt once and no padding."""
    input_ids: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    segments: list[Segment] = []
    for group in groups:
        start, P = len(input_ids), len(group.prompt_ids)
        input_ids += group.prompt_ids
        positions += range(P)
        live = [group.sequence_ids[k] for k in group.live_sequences]
        for ids in live:
            first = len(input_ids)
            # the last prompt token predicts the first token, every other token its successor
            rows += [start + P - 1, *range(first, first + len(ids) - 1)]
            input_ids += ids
            positions += range(P, P + len(ids))
        segments.append(Segment(start, P, tuple(len(ids) for ids in live)))
    return MicroBatch(
        input_ids_BL=torch.tensor([input_ids]),
        position_ids_BL=torch.tensor([positions]),
        attention_mask_BL=None,
        segments=tuple(segments),
        place_NT=tuple(torch.arange(s.start, s.stop) for s in segments),
        row_T=torch.tensor(rows),
        **_targets(groups),
    )


def pad(groups: Sequence[Group], *, pad_token_id: int) -> MicroBatch:
    """Lay out live sequences in right-padded rows, one each, with the prompt repeated."""
    size = sum((group.size for group in groups), start=Size(0, 0, 0))
    B, L = size.sequences, size.longest
    input_ids = torch.full((B, L), pad_token_id)
    mask = torch.zeros((B, L), dtype=torch.int64)
    rows: list[int] = []
    places: list[Tensor] = []
    b = 0
    for group in groups:
        P, of_group = len(group.prompt_ids), []
        for k in group.live_sequences:
            ids = group.sequence_ids[k]
            stop = P + len(ids)
            input_ids[b, :stop] = torch.tensor(group.prompt_ids + ids)
            mask[b, :stop] = 1
            rows += range(b * L + P - 1, b * L + stop - 1)
            of_group += range(b * L + (P if of_group else 0), b * L + stop)
            b += 1
        places.append(torch.tensor(of_group))
    return MicroBatch(
        input_ids_BL=input_ids,
        position_ids_BL=torch.arange(L).expand(B, L),
        attention_mask_BL=mask,
        segments=None,
        place_NT=tuple(places),
        row_T=torch.tensor(rows),
        **_targets(groups),
    )


def _targets(groups: Sequence[Group]) -> dict[str, Any]:
    """The fields of MicroBatch with one value for each target, in the order of `pack` and `pad`."""
    K = len(groups[0].sequence_ids)
    targets: list[int] = []
    sequences: list[int] = []
    logprobs: list[float] = []
    for n, group in enumerate(groups):
        for k in group.live_sequences:
            targets += group.sequence_ids[k]
            length = len(group.sequence_ids[k])
            sequences += [n * K + k] * length
            sampled = k < len(group.sampler_logprobs)
            logprobs += group.sampler_logprobs[k] if sampled else [math.nan] * length
    sequence_T = torch.tensor(sequences)
    terms_CT = torch.cat([group.coefficients_CK for group in groups], 1)[:, sequence_T].float()
    kl_coef_T = None
    if groups[0].kl_coef_K is not None:
        kl_coef_T = torch.cat([group.kl_coef_K for group in groups])[sequence_T].float()
    return {
        "target_T": torch.tensor(targets),
        "sequence_T": sequence_T,
        "K": K,
        "terms_CT": terms_CT.where(terms_CT.sum(0) != 0, 0.0),
        "kl_coef_T": kl_coef_T,
        "sampler_logprob_T": torch.tensor(logprobs, dtype=torch.float32),
    }
