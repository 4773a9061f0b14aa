"""Differentiable log-probs of a linear head's targets, without materialising the logits."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .checks import check_operands, logit_constants
from .devices import choose_backend, compute_dtype, workspace_bytes
from .one_pass import logprob_ops
from .one_pass.derivatives import check_transforms
from .one_pass.options import PassOptions
from .vocab_parallel import VocabParallel, local_operands


class TokenLogprobs(NamedTuple):
    """Both differentiable. `entropy_T` is None unless asked for."""

    logprob_T: Tensor
    entropy_T: Tensor | None


def linear_logprobs(
    hidden_TD: Tensor,
    head_VD: Tensor,
    target_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    workspace_mib: float | None = None,
    backend: str | None = None,
    vocab_parallel: VocabParallel | None = None,
) -> TokenLogprobs:
    """logprob = log p[target] and entropy = -sum_v p_v log p_v of each row, p = softmax(z).

    z = softcap((hidden head^T + bias) * logit_scale) / temperature, softcap(x) = c tanh(x / c).
    Use it for scoring, and for losses that `linear_policy_loss` cannot express. The coefficients
    are not known before `backward`, which computes the logits again, chunk by chunk: 8 T D V
    operations a step, where `linear_policy_loss` takes 6, and 2 without gradients. Only the inputs
    are kept in between. On the CPU, rows whose incoming gradients are 0 cost nothing in `backward`,
    and what they hold does not reach the head.

    Args:
        hidden_TD: (T, D) float32, bfloat16 or float16.
        head_VD: (V, D), the same dtype; under `torch.autocast` both are cast to its dtype.
        target_T: (T,) int64 or int32 in [0, V), in every row.
        bias_V, temperature, logit_scale, softcap, workspace_mib, backend, vocab_parallel: as in
            `linear_policy_loss`. With a sharded head, all processes must compute the same loss.
        entropy: whether to compute entropies as well, in the same pass.

    Returns:
        TokenLogprobs(logprob_T, entropy_T): (T,) float32, differentiable in hidden_TD, head_VD and
        bias_V, once; entropy_T is None without `entropy`.

    Raises:
        ValueError: a shape, dtype, device, option or (on the CPU) target that does not fit.
        RuntimeError: a backward pass with create_graph=True.
    """
    hidden_TD, head_VD, bias_V, shard = local_operands(hidden_TD, head_VD, bias_V, vocab_parallel)
    check_operands(hidden_TD, head_VD, target_T, bias_V)
    check_transforms(hidden_TD, head_VD, bias_V, vmap=True)
    options = PassOptions(
        constants=logit_constants(temperature, logit_scale, softcap),
        workspace_bytes=workspace_bytes(workspace_mib, hidden_TD.device),
        backend=choose_backend(backend, hidden_TD.device),
        dtype=compute_dtype(hidden_TD, head_VD),
        entropy=entropy,
        shard=shard,
    )
    logprob_T, entropy_T = logprob_ops.token_logprobs(
        hidden_TD, head_VD, bias_V, target_T, *options.flat()
    )
    return TokenLogprobs(logprob_T, entropy_T if entropy else None)
