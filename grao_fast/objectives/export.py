"""Objectives as data: tokens with weights, for trainers that take a weighted cross-entropy.

    loss = -sum_t weights_t log p(labels_t | the tokens of its sequence up to input_ids_t)

is all that a consumer computes, whatever the objective: `linear_weighted_cross_entropy` does, and
so does any trainer that multiplies token losses by weights and sums them. Means over tokens,
samples and prompts are in the weights, so that sequences may be split over micro-batches at will.

Suffixes: N prompts, K sequences of a prompt, the reference last, S sequences that have a weight, T
tokens of them, prompts included.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from grao_fast.objectives.base import Groups, Objective
from grao_fast.system.errors import UserError

FORMAT, VERSION = "grao-fast/weighted-tokens", "1"
IGNORED = -100  # the label of a token without weight, which `cross_entropy` ignores by default

Ids = Sequence[int]


class WeightedTokens(NamedTuple):
    """Sequences with a weight for every token, one behind the other.

    input_ids: (T,) int64, each sequence's prompt and continuation.
    labels: (T,) int64, already shifted: the token that follows input_ids in its sequence; -100
        where the weight is 0, as at the end of every sequence and in prompts.
    weights: (T,) float32, of either sign.
    cu_seqlens: (S + 1,) int32, from 0 to T: sequence s has the tokens cu_seqlens[s] to
        cu_seqlens[s + 1], as flash-attn and PyTorch take it.
    """

    input_ids: Tensor
    labels: Tensor
    weights: Tensor
    cu_seqlens: Tensor

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, with the name and version of this format as its metadata."""
        check(self, "these tokens")
        tensors = {name: each.contiguous() for name, each in self._asdict().items()}
        save_file(tensors, path, metadata={"format": FORMAT, "version": VERSION})

    @classmethod
    def load(cls, path: str | Path) -> WeightedTokens:
        """Read what `save` wrote.

        Raises:
            UserError: the file has another format or version, or its tensors do not fit.
            OSError: the file cannot be read.
        """
        try:
            with safetensors.safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
        except safetensors.SafetensorError as error:
            raise UserError(f"{path} is not a safetensors file: {error}") from error
        found = metadata.get("format"), metadata.get("version")
        if found != (FORMAT, VERSION):
            raise UserError(
                f"{path} has the format {found[0]!r}, version {found[1]!r}; this reads {FORMAT!r}, "
                f"version {VERSION!r}: write it again by grao_fast.objectives.export"
            )
        tensors = load_file(path)
        missing = [name for name in cls._fields if name not in tensors]
        if missing:
            raise UserError(
                f"{path} has no tensor {missing[0]!r}: it was not written whole; "
                "write it again by grao_fast.objectives.export"
            )
        return check(cls(*(tensors[name] for name in cls._fields)), str(path))


def export(
    prompts: Sequence[Ids],
    sequences: Sequence[Sequence[Ids]],
    rewards_NK: Tensor,
    objective: Objective,
    *,
    max_new_tokens: int,
    progress: float = 0.0,
) -> WeightedTokens:
    """The tokens of a step's groups, weighted by an objective.

    The gradient of the weighted cross-entropy is the objective's, for samples of the policy itself.
    Sequences without weight are left out, dead groups among them.

    Args:
        prompts: token ids of N prompts, at least one each.
        sequences: for each prompt, the token ids of K continuations, the reference last, with their
            end-of-sequence tokens; an empty one is absent.
        rewards_NK: (N, K) floats on the CPU; NaN for an absent sequence.
        max_new_tokens, progress: as in `Groups`.

    Raises:
        UserError: shapes that do not fit, or an objective whose weights follow from log-probs.
    """
    _check_objective(objective)
    N, K = len(prompts), rewards_NK.shape[1] if rewards_NK.ndim == 2 else 0
    counts = {len(group) for group in sequences}
    if rewards_NK.shape != (N, K) or len(sequences) != N or not counts <= {K}:
        raise UserError(
            f"{N} prompts, {len(sequences)} lists of {sorted(counts)} sequences and rewards of "
            f"shape {tuple(rewards_NK.shape)} do not fit: every prompt has as many sequences as "
            "rewards, the reference last"
        )
    empty = next((n for n, ids in enumerate(prompts) if not len(ids)), None)
    if empty is not None:
        raise UserError(f"prompt {empty} has no token: nothing predicts the first of its answers")
    length_NK = torch.tensor([[len(ids) for ids in group] for group in sequences])
    groups = Groups(rewards_NK.double(), length_NK, max_new_tokens, progress)
    weight_NK = objective.coefficients(groups).sum(0)
    input_ids, labels, weights, lengths = [], [], [], [0]
    for n, k in weight_NK.nonzero().tolist():
        prompt, ids, weight = list(prompts[n]), list(sequences[n][k]), float(weight_NK[n, k])
        before = [IGNORED] * (len(prompt) - 1)
        input_ids += prompt + ids
        labels += [*before, *ids, IGNORED]
        weights += [*[0.0] * len(before), *[weight] * len(ids), 0.0]
        lengths.append(len(prompt) + len(ids))
    return WeightedTokens(
        torch.tensor(input_ids, dtype=torch.int64),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(weights, dtype=torch.float32),
        torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32),
    )


def check(tokens: WeightedTokens, what: str) -> WeightedTokens:
    """Return the tokens; raise UserError, naming `what`, where they break the format."""
    T = tokens.input_ids.numel()
    wanted = {"input_ids": torch.int64, "labels": torch.int64, "weights": torch.float32}
    for name, dtype in wanted.items():
        tensor = getattr(tokens, name)
        if tensor.shape != (T,) or tensor.dtype != dtype:
            raise UserError(
                f"{name} of {what} must be ({T},) {dtype}, got {tuple(tensor.shape)} {tensor.dtype}"
            )
    edges = tokens.cu_seqlens
    if edges.ndim != 1 or edges.dtype != torch.int32 or not _are_edges(edges, T):
        raise UserError(f"cu_seqlens of {what} must be int32, and rise from 0 to {T}; got {edges}")
    unweighted = tokens.labels == IGNORED
    if not torch.equal(unweighted, tokens.weights == 0):
        raise UserError(f"labels of {what} must be {IGNORED} exactly where weights are 0")
    return tokens


def _are_edges(edges: Tensor, T: int) -> bool:
    return bool(len(edges) and edges[0] == 0 and edges[-1] == T and (edges.diff() > 0).all())


def _check_objective(objective: Objective) -> None:
    name = type(objective).__name__
    if objective.two_passes:
        raise UserError(
            f"{name} weighs tokens by their log-probs under the policy, which data does not hold: "
            "use linear_policy_loss, or an objective of one pass"
        )
    if objective.shaping is not None:
        raise UserError(
            f"{name} shapes references by the form {objective.shaping!r} of their own probability, "
            "which data does not hold: use linear_policy_loss with Shaping"
        )
