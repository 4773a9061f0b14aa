"""The coefficients of `forms.py`'s forms, as Triton device functions."""

from __future__ import annotations

import triton
import triton.language as tl

from . import forms

_CLIPPED = tl.constexpr(forms.RATIOS["clipped"].number)
_DFT = tl.constexpr(forms.SHAPINGS["dft"].number)
_CHORD = tl.constexpr(forms.SHAPINGS["chord"].number)
_GAMMA = tl.constexpr(forms.LUFFY_GAMMA)


@triton.jit
def _form_coefficient(
    weight,
    kl_coef,
    logprob,
    row_constants_ptr,
    stride,
    low,
    high,
    importance_cap,
    RATIO: tl.constexpr,
    SHAPING: tl.constexpr,
    KL_TIMES_RATIO: tl.constexpr,
):
    """`forms.row_coefficient`; a row's constants, see FormRows, lie `stride` apart."""
    coefficient = weight
    if RATIO != 0:
        old = tl.load(row_constants_ptr)
        sampler = tl.load(row_constants_ptr + stride)
        gap = tl.load(row_constants_ptr + 2 * stride) - logprob
        old = tl.where(old == old, old, logprob)
        rho = tl.exp(logprob - old)
        free = tl.where(weight > 0, rho <= high, rho >= low)
        importance = tl.where(
            sampler == sampler, tl.minimum(tl.exp(old - sampler), importance_cap), 1.0
        )
        push = weight * importance * _ratio_slope(rho, free, low, high, RATIO)
        if SHAPING != 0:
            shaped = tl.load(row_constants_ptr + 3 * stride)
            push = tl.where(shaped != 0.0, weight * _shape_slope(logprob, SHAPING), push)
            rho = tl.where(shaped != 0.0, 1.0, rho)  # it has none
        # Rows of zero weight may hold inf; skip them, since 0 * inf is NaN.
        kl_slope = rho * gap if KL_TIMES_RATIO else _expm1(gap)
        pull = tl.where((gap == gap) & (kl_coef != 0.0), kl_coef * kl_slope, 0.0)
        coefficient = tl.where(weight == 0.0, 0.0, push) + pull
    return coefficient


@triton.jit
def _ratio_slope(rho, free, low, high, RATIO: tl.constexpr):
    """The derivative of the ratio's value in the log-prob."""
    if RATIO == _CLIPPED:
        slope = tl.where(free, rho, 0.0)
    else:
        slope = tl.minimum(tl.maximum(rho, low), high)
    return slope


@triton.jit
def _shape_slope(logprob, SHAPING: tl.constexpr):
    """The derivative of a shaped row's value in the log-prob."""
    p = tl.exp(logprob)
    if SHAPING == _DFT:
        slope = p
    elif SHAPING == _CHORD:
        slope = -p * _expm1(logprob)
    else:
        slope = _GAMMA * p / ((p + _GAMMA) * (p + _GAMMA))
    return slope


@triton.jit
def _expm1(x):
    """exp(x) - 1, to float32 precision near 0."""
    series = x * (1 + x * (1.0 / 2 + x * (1.0 / 6 + x * (1.0 / 24 + x / 120))))
    return tl.where(tl.abs(x) < 0.05, series, tl.exp(x) - 1.0)
