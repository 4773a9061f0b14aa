"""The primitive under every objective: a linear head's loss from coefficients known before it.

Shapes: T rows, D width, V vocabulary, C terms of the loss.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import (
    check_choice,
    check_constant,
    check_floating,
    check_home,
    check_number,
    check_operands,
    check_token_constants,
    logit_constants,
)
from .devices import choose_backend, compute_dtype, to_device, workspace_bytes
from .one_pass.autograd import differentiable_pass
from .one_pass.options import PassInputs, PassOptions
from .rows.forms import RATIOS, SHAPINGS, FormRows
from .vocab_parallel import VocabParallel, local_operands


class PolicyLoss(NamedTuple):
    """`loss` is differentiable, the rest are constants; loss = kl - sum(terms_C).

    `entropy_T` and `top1_T` are None unless asked for.
    """

    loss: Tensor
    terms_C: Tensor
    kl: Tensor
    logprob_T: Tensor
    entropy_T: Tensor | None
    top1_T: Tensor | None


class OffPolicy(NamedTuple):
    """Constants that turn log-probs into ratios with importance weights, and add a KL.

    A row's log-prob logp is replaced by a value, times min(exp(old - sampler), sampler_cap). With
    rho = exp(logp - old) and sg(.) for what is held constant, the value is, by `ratio`,

        "clipped"     rho, clipped as in PPO against the sign of the row's weight: at or below
                      1 + high for a positive weight, at or above 1 - low for a negative one
        "truncated"   sg(clamp(rho, 1 - low, 1 + high)) logp, as in CISPO: rows beyond the bounds
                      keep a gradient

    kl is the sum of kl_coef_T (exp(ref - logp) - (ref - logp) - 1); with `kl_times_ratio`, each
    addend is multiplied by rho, which is 1 on policy and has a gradient there too.

    old_logprob_T: (T,) floats, log-probs under the policy that made the update's data; NaN for a
        row that is on policy, whose value is logp.
    sampler_logprob_T: (T,) floats, under the sampler's own numerics; NaN for a row without one.
        Without `old_logprob_T`, old is the row's own log-prob, as a constant.
    ref_logprob_T: (T,) floats, under a frozen reference policy; NaN for a row without one, whose
        kl is 0. Goes with `kl_coef_T`.
    kl_coef_T: (T,) floats on the device of the terms. A row with a coefficient is computed even if
        its terms are 0.
    clip: (low, high), 0 <= low <= 1 and 0 <= high; needs `old_logprob_T`. None: no clip. A low of
        1 is no bound from below.
    sampler_cap: needs `sampler_logprob_T`. None: no cap.
    ratio: "clipped" or "truncated", of the rows with an old log-prob.
    kl_times_ratio: the unbiased estimate of the KL off policy, whose gradient is unbiased on policy
        too: that of rho k3 is rho (logp - ref), that of k3 alone is 1 - exp(ref - logp). Needs
        `ref_logprob_T`.

    Sources: arXiv 1707.06347 (PPO), 2506.13585 (CISPO), 2512.02556 (`kl_times_ratio`).
    """

    old_logprob_T: Tensor | None = None
    sampler_logprob_T: Tensor | None = None
    ref_logprob_T: Tensor | None = None
    kl_coef_T: Tensor | None = None
    clip: tuple[float, float] | None = None
    sampler_cap: float | None = None
    ratio: str = "clipped"
    kl_times_ratio: bool = False


class Shaping(NamedTuple):
    """The form of rows that are demonstrations: their value follows from their own probability.

    With p = exp(logp) and sg(.) for what is held constant, a shaped row of weight w has the value
    and the coefficient, which multiplies the gradient of -logp,

        form       value                 coefficient
        "dft"      sg(p) logp            w p                       DFT, arXiv 2508.05629
        "chord"    sg(p (1 - p)) logp    w p (1 - p)               CHORD, arXiv 2508.11408
        "luffy"    p / (p + 0.1)         w 0.1 p / (p + 0.1)^2     LUFFY, arXiv 2504.14945

    It has no ratio and no importance weight, whatever `OffPolicy` holds for it, but may have a KL.

    rows_T: (T,) bool, the rows that are shaped. None: all rows, which goes with no
        `old_logprob_T` or `sampler_logprob_T`, as these would have no effect.
    """

    form: str
    rows_T: Tensor | None = None


def linear_policy_loss(
    hidden_TD: Tensor,
    head_VD: Tensor,
    target_T: Tensor,
    terms_CT: Tensor,
    *,
    off_policy: OffPolicy | None = None,
    shaping: Shaping | None = None,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    top1: bool = False,
    workspace_mib: float | None = None,
    backend: str | None = None,
    head_grad_VD: Tensor | None = None,
    vocab_parallel: VocabParallel | None = None,
) -> PolicyLoss:
    """loss = kl - sum_c terms_c, terms_c = sum_t terms_ct value_t, in one pass over the vocabulary.

    value_t = log softmax(z_t)[target_t] and kl = 0; `off_policy` replaces them by the ratio and the
    KL that `OffPolicy` defines, and `shaping` the value of shaped rows by what `Shaping` defines.
    z = softcap((hidden head^T + bias) * logit_scale) / temperature, softcap(x) = c tanh(x / c).

    The coefficients, of either sign, are known before the head, so the gradients are made in this
    call, and `backward` only scales them and hands them over. Memory beyond the inputs: the
    workspace, the gradient of hidden_TD, and that of head_VD, which is summed in float32 whatever
    the dtype.

    Args:
        hidden_TD: (T, D) float32, bfloat16 or float16.
        head_VD: (V, D), the same dtype; under `torch.autocast` both are cast to its dtype.
        target_T: (T,) int64 or int32 in [0, V); any value in a row of weight 0.
        terms_CT: (C, T) floats, constants: each row's coefficient in each of C terms, which are
            reported apart. A row's weight is the sum of its terms. On the CPU (recommended,
            whatever device hidden_TD is on) rows of weight 0 are dropped before the head and cost
            nothing; on a CUDA device they are computed and zeroed, as dropping them would make the
            host wait.
        off_policy, shaping: None for a loss that is linear in the log-probs.
        bias_V: (V,) or None.
        temperature, logit_scale, softcap: of z; `softcap=None` is none.
        entropy, top1: whether to return entropies, and 1 where no token is likelier than the
            target, else 0.
        workspace_mib: memory for the logits of a chunk of rows and their gradient, of which the
            rows take what they need; None is 512 on a CPU and 2048 elsewhere. More is faster, to
            the point where all rows fit: see `one_pass/chunks.py`.
        backend: "triton", "torch", or None for Triton on CUDA tensors and PyTorch elsewhere.
        head_grad_VD: (V, D) float32 or of head_VD's dtype, for instance `head.weight.grad` or
            Megatron's `main_grad`. This call adds d loss / d head_VD to it, and `backward` then
            gives head_VD no gradient, so micro-batches need no second buffer of the head's size.
            The gradient is added once, even if a checkpoint runs the forward pass again. It cannot
            be scaled afterwards, so backward must start from this loss with a gradient of 1 (the
            coefficients can hold a factor); otherwise it raises on the CPU, and gives NaN gradients
            elsewhere.
        vocab_parallel: head_VD and bias_V are this process's shard of the vocabulary, and all else
            is the same in all processes of the group. Alternatively, head_VD is a DTensor placed
            [Shard(0)], bias_V likewise and hidden_TD [Replicate()]. The gradients of head and bias
            are then each process's own shard, all else is the same everywhere.

    Returns:
        PolicyLoss: loss (0-d float32, differentiable in hidden_TD, head_VD and bias_V), terms_C
        (C,), kl, and logprob_T, entropy_T and top1_T, (T,) float32, NaN in dead rows. A dead row,
        whose weight and KL coefficient are 0, may hold anything, NaN included; its gradient is 0.

    Raises:
        ValueError: a shape, dtype, device or option that does not fit, by name.
        RuntimeError: a second backward pass through one loss, or one with create_graph=True.
    """
    hidden_TD, head_VD, bias_V, shard = local_operands(hidden_TD, head_VD, bias_V, vocab_parallel)
    check_operands(hidden_TD, head_VD, target_T, bias_V)
    _check_terms(terms_CT, hidden_TD)
    options = PassOptions(
        constants=logit_constants(temperature, logit_scale, softcap),
        workspace_bytes=workspace_bytes(workspace_mib, hidden_TD.device),
        backend=choose_backend(backend, hidden_TD.device),
        dtype=compute_dtype(hidden_TD, head_VD),
        entropy=entropy,
        top1=top1,
        shard=shard,
    )
    off_policy = OffPolicy() if off_policy is None else off_policy
    _check_off_policy(off_policy, terms_CT, hidden_TD)
    if shaping is not None:
        _check_shaping(shaping, off_policy, hidden_TD)
    forms = _form_rows(off_policy, shaping, terms_CT, hidden_TD)
    inputs = PassInputs(hidden_TD, head_VD, bias_V, target_T, terms_CT, forms=forms)
    *outputs, entropy_T, top1_T = differentiable_pass(inputs, options, head_grad_VD)
    return PolicyLoss(*outputs, entropy_T if entropy else None, top1_T if top1 else None)


def _check_terms(terms_CT: Tensor, hidden_TD: Tensor) -> None:
    T = hidden_TD.shape[0]
    if terms_CT.ndim != 2 or terms_CT.shape[1] != T:
        raise ValueError(f"terms_CT must be (C, {T}), got {tuple(terms_CT.shape)}")
    check_floating("terms_CT", terms_CT)
    check_constant("terms_CT", terms_CT)
    check_home("terms_CT", terms_CT, hidden_TD)


def _check_off_policy(off_policy: OffPolicy, terms_CT: Tensor, hidden_TD: Tensor) -> None:
    """ValueError names a field that does not fit."""
    old_T, sampler_T, ref_T, kl_coef_T, clip, sampler_cap, ratio, kl_times_ratio = off_policy
    check_choice("ratio", ratio, tuple(RATIOS))
    for name, values_T in zip(OffPolicy._fields[:4], off_policy[:4], strict=True):
        if values_T is not None:
            check_token_constants(name, values_T, hidden_TD)
    for name, option, needed, values_T in (
        ("clip", clip, "old_logprob_T", old_T),
        ("sampler_cap", sampler_cap, "sampler_logprob_T", sampler_T),
        ("kl_coef_T", kl_coef_T, "ref_logprob_T", ref_T),
        ("ref_logprob_T", ref_T, "kl_coef_T", kl_coef_T),
        ("kl_times_ratio", kl_times_ratio or None, "ref_logprob_T", ref_T),
    ):
        if option is not None and values_T is None:
            raise ValueError(f"{name} has no effect without {needed}: give both, or neither")
    if kl_coef_T is not None and kl_coef_T.device != terms_CT.device:
        raise ValueError(f"kl_coef_T is on {kl_coef_T.device}, terms_CT on {terms_CT.device}")
    if sampler_cap is not None:
        check_number("sampler_cap", sampler_cap, above=0)
    if clip is None:
        return
    if not isinstance(clip, (tuple, list)) or len(clip) != 2:
        raise ValueError(f"clip must be a pair (low, high), got {clip!r}")
    check_number("clip[0]", clip[0])
    check_number("clip[1]", clip[1])
    if not 0 <= clip[0] <= 1 or clip[1] < 0:
        raise ValueError(f"clip must be (low, high) with 0 <= low <= 1 and 0 <= high, got {clip}")


def _check_shaping(shaping: Shaping, off_policy: OffPolicy, hidden_TD: Tensor) -> None:
    """ValueError names a field that does not fit."""
    form, rows_T = shaping
    check_choice("form", form, tuple(SHAPINGS))
    if rows_T is None:
        for name in ("old_logprob_T", "sampler_logprob_T"):
            if getattr(off_policy, name) is not None:
                raise ValueError(
                    f"{name} has no effect where all rows are shaped: leave it out, or say by "
                    "rows_T which rows are"
                )
        return
    T = hidden_TD.shape[0]
    if tuple(rows_T.shape) != (T,):
        raise ValueError(f"rows_T must be ({T},), got {tuple(rows_T.shape)}")
    if rows_T.dtype != torch.bool:
        raise ValueError(f"rows_T must be bool, got {rows_T.dtype}: compare, or call bool()")
    check_home("rows_T", rows_T, hidden_TD)


def _form_rows(
    off_policy: OffPolicy, shaping: Shaping | None, terms_CT: Tensor, hidden_TD: Tensor
) -> FormRows | None:
    """The forms and the constants of the rows, NaN for log-probs not given; None for no form."""
    given, clip, sampler_cap = off_policy[:3], off_policy.clip, off_policy.sampler_cap
    if shaping is None and all(each is None for each in given):
        return None
    T, device = hidden_TD.shape[0], hidden_TD.device
    absent_T = hidden_TD.new_full((T,), math.nan, dtype=torch.float32)
    planes = [absent_T if each is None else to_device(each, device).float() for each in given]
    if shaping is not None:
        rows_T = torch.ones_like(absent_T) if shaping.rows_T is None else shaping.rows_T
        planes.append(to_device(rows_T, device).float())
    kl_coef_T = off_policy.kl_coef_T
    if kl_coef_T is None:
        kl_coef_T = terms_CT.new_zeros(T)
    low, high = (-math.inf, math.inf) if clip is None else (1 - clip[0], 1 + clip[1])
    return FormRows(
        ratio=off_policy.ratio,
        shaping=None if shaping is None else shaping.form,
        constants_PR=torch.stack(planes),
        kl_coef_R=kl_coef_T.float(),
        low=low,
        high=high,
        importance_cap=math.inf if sampler_cap is None else sampler_cap,
        kl_times_ratio=off_policy.kl_times_ratio,
    )
