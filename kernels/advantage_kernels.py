"""Rewards to advantages to coefficients in Triton: `advantage.py`'s arithmetic, one launch each.

One program a group. Shapes: N prompts, K = G + 1 sequences a prompt, the reference last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _load_group(values_ptr, k, K):
    """A group's values, in float64 if stored so and else in float32; NaN beyond its end."""
    values = tl.load(values_ptr + k, mask=k < K, other=float("nan"))
    if values.dtype != tl.float64:
        values = values.to(tl.float32)
    return values


@triton.jit
def _advantages(rewards, k, K, SAMPLES_ONLY: tl.constexpr, CLIP: tl.constexpr):
    """A = (r - mu) / sigma; NaN where the reward is NaN, 0 where max = min."""
    present = rewards == rewards
    basis = present
    if SAMPLES_ONLY:
        basis = basis & (k < K - 1)
    count = tl.maximum(tl.sum(basis.to(tl.int32), 0), 1)
    mean = tl.sum(tl.where(basis, rewards, 0.0), 0) / count
    high = tl.max(tl.where(basis, rewards, float("-inf")), 0)
    low = tl.min(tl.where(basis, rewards, float("inf")), 0)
    # In units of the range, so that no square under- or overflows.
    centred = (rewards - mean) / (high - low)
    variance = tl.sum(tl.where(basis, centred * centred, 0.0), 0) / count
    advantages = tl.where(high > low, centred / tl.sqrt(variance), 0.0)
    if CLIP:
        advantages = tl.where((k == K - 1) & (advantages < 0), 0.0, advantages)
    return tl.where(present, advantages, float("nan"))


@triton.jit
def _store_terms(terms_ptr, advantages, k, K, N, beta, lam):
    """Coefficients of exploration, imitation and alignment, (3, N, K); 0 where absent."""
    present = advantages == advantages
    sample = present & (k < K - 1)
    reference = present & (k == K - 1)
    count = tl.maximum(tl.sum(sample.to(tl.int32), 0), 1)
    exploration = tl.where(sample, advantages, 0.0) / count
    imitation = tl.where(reference, beta * advantages, 0.0)
    pull = -lam * tl.sum(exploration, 0)
    alignment = tl.where(reference, pull, lam * exploration)
    tl.store(terms_ptr + k, exploration, mask=k < K)
    tl.store(terms_ptr + N * K + k, imitation, mask=k < K)
    tl.store(terms_ptr + 2 * N * K + k, alignment, mask=k < K)


@triton.jit
def _group_advantages_kernel(
    rewards_ptr,
    advantages_ptr,
    K,
    SAMPLES_ONLY: tl.constexpr,
    CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0) * K
    k = tl.arange(0, BLOCK)
    rewards = _load_group(rewards_ptr + group, k, K)
    advantages = _advantages(rewards, k, K, SAMPLES_ONLY, CLIP)
    tl.store(advantages_ptr + group + k, advantages, mask=k < K)


@triton.jit
def _sequence_terms_kernel(advantages_ptr, terms_ptr, N, K, beta, lam, BLOCK: tl.constexpr):
    group = tl.program_id(0) * K
    k = tl.arange(0, BLOCK)
    advantages = _load_group(advantages_ptr + group, k, K)
    _store_terms(terms_ptr + group, advantages, k, K, N, beta, lam)


@triton.jit
def _advantages_and_terms_kernel(
    rewards_ptr,
    advantages_ptr,
    terms_ptr,
    N,
    K,
    beta,
    lam,
    SAMPLES_ONLY: tl.constexpr,
    CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0) * K
    k = tl.arange(0, BLOCK)
    rewards = _load_group(rewards_ptr + group, k, K)
    advantages = _advantages(rewards, k, K, SAMPLES_ONLY, CLIP)
    tl.store(advantages_ptr + group + k, advantages, mask=k < K)
    _store_terms(terms_ptr + group, advantages, k, K, N, beta, lam)


def launch_group_advantages(
    rewards_NK: Tensor, statistics: str, reference_advantage: str
) -> Tensor:
    rewards_NK = rewards_NK.contiguous()
    N, K = rewards_NK.shape
    advantages_NK = torch.empty_like(rewards_NK, dtype=_result_dtype(rewards_NK))
    if N > 0:
        with torch.cuda.device_of(rewards_NK):
            _group_advantages_kernel[(N,)](
                rewards_NK,
                advantages_NK,
                K,
                SAMPLES_ONLY=statistics == "samples",
                CLIP=reference_advantage == "clip",
                **_block(K),
            )
    return advantages_NK


def launch_sequence_terms(advantages_NK: Tensor, beta: float, lam: float) -> Tensor:
    """(3, N, K); beta and lam enter in float32."""
    advantages_NK = advantages_NK.contiguous()
    N, K = advantages_NK.shape
    terms_3NK = advantages_NK.new_empty((3, N, K), dtype=_result_dtype(advantages_NK))
    if N > 0:
        with torch.cuda.device_of(advantages_NK):
            _sequence_terms_kernel[(N,)](
                advantages_NK, terms_3NK, N, K, float(beta), float(lam), **_block(K)
            )
    return terms_3NK


def launch_advantages_and_terms(
    rewards_NK: Tensor, statistics: str, reference_advantage: str, beta: float, lam: float
) -> tuple[Tensor, Tensor]:
    """(N, K) advantages and (3, N, K) terms; beta and lam enter in float32."""
    rewards_NK = rewards_NK.contiguous()
    N, K = rewards_NK.shape
    advantages_NK = torch.empty_like(rewards_NK, dtype=_result_dtype(rewards_NK))
    terms_3NK = rewards_NK.new_empty((3, N, K), dtype=_result_dtype(rewards_NK))
    if N > 0:
        with torch.cuda.device_of(rewards_NK):
            _advantages_and_terms_kernel[(N,)](
                rewards_NK,
                advantages_NK,
                terms_3NK,
                N,
                K,
                float(beta),
                float(lam),
                SAMPLES_ONLY=statistics == "samples",
                CLIP=reference_advantage == "clip",
                **_block(K),
            )
    return advantages_NK, terms_3NK


def _result_dtype(values_NK: Tensor) -> torch.dtype:
    return torch.float64 if values_NK.dtype == torch.float64 else torch.float32


def _block(K: int) -> dict[str, int]:
    block = triton.next_power_of_2(K)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 256))}
