"""The coefficients of `off_policy.py`'s forms, as Triton device functions."""

from __future__ import annotations

import triton
import triton.language as tl

from .off_policy import FORMS

_CLIPPED_RATIO = tl.constexpr(FORMS["clipped_ratio"].number)


@triton.jit
def _form_coefficient(
    weight,
    kl_coef,
    logprob,
    row_logprobs_ptr,
    stride,
    low,
    high,
    importance_cap,
    FORM: tl.constexpr,
):
    """`off_policy.row_coefficient`; old, sampler and ref log-probs lie `stride` apart."""
    coefficient = weight
    if FORM == _CLIPPED_RATIO:
        coefficient = _clipped_ratio(
            weight, kl_coef, logprob, row_logprobs_ptr, stride, low, high, importance_cap
        )
    return coefficient


@triton.jit
def _clipped_ratio(weight, kl_coef, logprob, row_logprobs_ptr, stride, low, high, importance_cap):
    old = tl.load(row_logprobs_ptr)
    sampler = tl.load(row_logprobs_ptr + stride)
    gap = tl.load(row_logprobs_ptr + 2 * stride) - logprob
    old = tl.where(old == old, old, logprob)
    rho = tl.exp(logprob - old)
    free = tl.where(weight > 0, rho <= high, rho >= low)
    importance = tl.where(
        sampler == sampler, tl.minimum(tl.exp(old - sampler), importance_cap), 1.0
    )
    # Rows of zero weight may hold inf; skip them, since 0 * inf is NaN.
    pull = tl.where((gap == gap) & (kl_coef != 0.0), kl_coef * _expm1(gap), 0.0)
    push = weight * importance * tl.where(free, rho, 0.0)
    return tl.where(weight == 0.0, 0.0, push) + pull


@triton.jit
def _expm1(x):
    """exp(x) - 1, to float32 precision near 0."""
    series = x * (1 + x * (1.0 / 2 + x * (1.0 / 6 + x * (1.0 / 24 + x / 120))))
    return tl.where(tl.abs(x) < 0.05, series, tl.exp(x) - 1.0)
