"""Inputs of the benchmarks: a packed batch of groups as a GRAO step passes it to the LM head.

Shapes: T rows (tokens), D width, V vocabulary, N prompts, K = G + 1 sequences a prompt with the
reference last.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grao_fast.kernels import reference

K = 8  # G = 7 samples and the reference: powers of two, so that every shape below has whole groups
SEQUENCE_ROWS = 32
REFERENCE_ADVANTAGE = "signed"  # with which no reference of a live group is dead
GROUP_ROWS = K * SEQUENCE_ROWS

# (T, D, V): heads of Llama 3 8B, of Qwen with D = 4096, and of SmolLM2-135M.
SHAPES = {
    "cuda": [(8192, 4096, 131072), (8192, 4096, 151936)],
    "cpu": [(2048, 576, 49152)],
    "tiny": [(512, 64, 1031)],
}
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = DEVICE  # of inputs; with --quick, conftest.py makes it "tiny" before it imports a benchmark


class Batch(NamedTuple):
    """A batch, of which hidden_TD, head_VD (both leaves), target_T and weight_T share a device.

    sequence_T and rewards_NK are on the CPU, where rewards are made. weight_T, float32, is what
    they come to, for contenders that take weights: loss = -sum_t weight_t log p(target_t).
    """

    hidden_TD: Tensor
    head_VD: Tensor
    target_T: Tensor
    sequence_T: Tensor
    rewards_NK: Tensor
    weight_T: Tensor


def make_batch(
    shape_TDV: tuple[int, int, int],
    dtype: torch.dtype,
    device: str,
    *,
    live: float = 1.0,
    seed: int = 0,
) -> Batch:
    """Make groups of K sequences of 32 rows, with logits of unit variance and random targets.

    Args:
        shape_TDV: T a multiple of 256, the rows of a group.
        dtype, device: of hidden and head.
        live: share of rows that count, in (0, 1]. Of the others about half are whole groups with
            equal rewards, and half are prompt rows, the first of their sequences, with
            sequence_T = -1.
        seed: of everything random, the same on every device.

    Raises:
        ValueError: T is not whole groups, or `live` is out of range.
    """
    T, D, V = shape_TDV
    if T <= 0 or T % GROUP_ROWS:
        raise ValueError(f"T must be a positive multiple of {GROUP_ROWS}, whole groups, got {T}")
    if not 0 < live <= 1:
        raise ValueError(f"live must be in (0, 1], got {live}")
    generator = torch.Generator().manual_seed(seed)
    sequence_T, rewards_NK = _groups(T, live, generator)
    hidden_TD = torch.randn(T, D, generator=generator)
    head_VD = torch.randn(V, D, generator=generator).div_(D**0.5)
    target_T = torch.randint(0, V, (T,), generator=generator)
    return Batch(
        hidden_TD.to(device, dtype).requires_grad_(),
        head_VD.to(device, dtype).requires_grad_(),
        target_T.to(device),
        sequence_T,
        rewards_NK,
        exact_weights(sequence_T, rewards_NK).to(device, torch.float32),
    )


def batch_facts(batch: Batch) -> dict[str, Any]:
    """Return the shape and dtype of a batch under the names that results use."""
    (T, D), V = batch.hidden_TD.shape, batch.head_VD.shape[0]
    return {"shape_TDV": [T, D, V], "dtype": str(batch.hidden_TD.dtype).removeprefix("torch.")}


def shape_name(shape_TDV: tuple[int, int, int]) -> str:
    return "T{}-D{}-V{}".format(*shape_TDV)


def _groups(T: int, live: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return sequence_T and rewards_NK in which round(live * T) rows count."""
    N = T // GROUP_ROWS
    kept = max(1, -int(-N * live**0.5 // 1))
    rewards_NK = torch.randn(N, K, generator=generator)
    alive_N = torch.zeros(N, dtype=torch.bool)
    alive_N[torch.randperm(N, generator=generator)[:kept]] = True
    rewards_NK[~alive_N] = 0.5

    sequence_T = torch.arange(T) // SEQUENCE_ROWS
    alive_T = alive_N[sequence_T // K]
    sequences = kept * K
    prompt_rows = kept * GROUP_ROWS - round(live * T)
    bounds = torch.arange(sequences + 1) * prompt_rows // sequences
    prompt_L = bounds.diff().repeat_interleave(SEQUENCE_ROWS)  # over the rows of groups that count
    position_T = torch.arange(T) % SEQUENCE_ROWS
    dead = alive_T.nonzero().squeeze(1)[position_T[alive_T] < prompt_L]
    sequence_T[dead] = -1
    return sequence_T, rewards_NK


def exact_weights(
    sequence_T: Tensor, rewards_NK: Tensor, *, reference_advantage: str = REFERENCE_ADVANTAGE
) -> Tensor:
    """Return w_s / (|s| N) of every row in float64, by the specification; 0 for dead rows."""
    options = {"reference_advantage": reference_advantage}
    advantages_NK = reference.group_advantages(rewards_NK.double(), **options)
    weight_S = reference.sequence_weights(advantages_NK, **options).flatten()
    counted_T = sequence_T >= 0
    rows_S = sequence_T[counted_T].bincount(minlength=weight_S.numel())
    weight_S = weight_S / (rows_S.clamp(min=1) * rewards_NK.shape[0])
    return weight_S[sequence_T.clamp(min=0)].where(counted_T, 0)


def one_group(batch: Batch) -> Batch:
    """Return the first group with rows that count; weights stay those of the whole batch."""
    first = int(batch.weight_T.nonzero()[0]) // GROUP_ROWS * GROUP_ROWS
    rows = slice(first, first + GROUP_ROWS)
    return batch._replace(
        hidden_TD=batch.hidden_TD[rows].detach().requires_grad_(),
        target_T=batch.target_T[rows],
        sequence_T=batch.sequence_T[rows],
        weight_T=batch.weight_T[rows],
    )
