"""The start-up check that hidden states and head give the model's own logits and gradients.

Suffixes: T rows of the head, V vocabulary, B rows of L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from grao_fast.data.packing import Group
from grao_fast.kernels.devices import resolve_backend
from grao_fast.models.attention import attending
from grao_fast.models.checks import MODEL_ERRORS
from grao_fast.models.objective import HeadInputs
from grao_fast.models.policy import Policy
from grao_fast.models.sharding import own_class, whole_shape
from grao_fast.system.errors import UserError, first_line
from grao_fast.system.visible import get_logger

logger = get_logger(__name__)

_SHORT = (4, 4, 8)  # tokens of a prompt and of two suffixes
# For FlexAttention and the kernels of variable-length attention, more than one block of 128: full,
# partial and empty blocks occur. Training uses the FlexAttention that is compiled for this row; a
# shorter row would compile another.
_LONG = (140, 50, 90)
# Tolerance on logits and on gradients, relative to the largest.
_TOLERANCE = 1e-3
_TOLERANCE_16_BITS = 0.05
# How far other sequences in the row may move a sequence's logits; only experts move them at all.
_LEAK = 1e-5


def check_parity(policy: Policy, *, gradient: bool = True) -> None:
    """Compare logits made of the policy's hidden states with the model's own, and their gradients.

    The gradient is that of a sum of log-probs with respect to the embedded tokens, to which every
    layer contributes. It costs two backward passes over 16 tokens, or over 280 where kernels
    take blocks of tokens, and changes no parameter.

    Args:
        gradient: False for a policy that only answers.

    Raises:
        UserError: they differ or cannot be computed; names the model and the remedy.
    """
    model = policy.causal_lm
    name, training = own_class(model).__name__, policy.model.training
    remedy = "set share_prefix=False" if policy.share_prefix else "this model is not supported"
    vocabulary, _ = whole_shape(model.get_output_embeddings().weight)
    lengths = _lengths(policy)
    ids_T = (torch.arange(sum(lengths)) * 7919 + 11) % vocabulary
    prompt, *suffixes = (ids.tolist() for ids in ids_T.split(lengths))
    policy.model.eval()
    try:
        with attending(model, policy.attention):
            ours = _measure(policy, lambda: _logits(policy, prompt, suffixes), ids_T, gradient)
            leak = _leak(policy, prompt, suffixes) if policy.share_prefix else 0.0
        its_own = _measure(policy, lambda: _own_logits(policy, prompt, suffixes), ids_T, gradient)
    except MODEL_ERRORS as error:
        raise UserError(f"{name} cannot run as a policy: {first_line(error)}; {remedy}") from error
    finally:
        policy.model.train(training)
    # 16-bit forward passes of different shapes differ by their rounding
    sixteen_bits = policy.autocast_dtype is not None or model.dtype != torch.float32
    tolerance = _TOLERANCE_16_BITS if sixteen_bits else _TOLERANCE
    off, largest = 0.0, float(its_own[0].abs().max())
    if any(bool((~values.isfinite()).any()) for values in its_own):
        raise UserError(
            f"{name} gives logits or gradients that are NaN or infinite, though its parameters are "
            "not: look at its buffers and its dtype, and at the device's kernels"
        )
    if leak > (tolerance if sixteen_bits else _LEAK) * largest:
        raise UserError(
            f"{name}: in one row with others, a sequence sees their tokens: its logits move by "
            f"{leak:.3g} with them, where the largest is {largest:.3g}; {remedy}"
        )
    for what, actual, expected in zip(("logits", "gradients"), ours, its_own, strict=False):
        error, largest = float((actual - expected).abs().max()), float(expected.abs().max())
        if not error <= tolerance * largest:
            raise UserError(
                f"{name}: {what} from its hidden states differ from its own by {error:.3g} where "
                f"the largest is {largest:.3g}; {remedy}"
            )
        off = max(off, error / largest if largest else 0.0)  # of a head of zeros, both are 0
    logger.info(
        "%s on %s: prompts %s, attention %s, loss in %s, %s off by %.1e of the largest",
        name,
        policy.device,
        "shared" if policy.share_prefix else "repeated",
        policy.attention or model.config._attn_implementation,
        resolve_backend(None, policy.device),
        "logits and gradients" if gradient else "logits",
        off,
    )


def _lengths(policy: Policy) -> tuple[int, ...]:
    if policy.attention not in ("grao_flex", "grao_varlen"):
        return _SHORT
    fits = policy.context_length is None or _LONG[0] + max(_LONG[1:]) <= policy.context_length
    return _LONG if fits else _SHORT


def _logits(policy: Policy, prompt: list[int], suffixes: list[list[int]]) -> Tensor:
    """Logits (T, V) of the suffixes' tokens, made of hidden states and head as in the loss."""
    group = Group(prompt, suffixes)

    def logits(head: HeadInputs) -> Tensor:
        bias_V = None if head.bias_V is None else head.bias_V.float()
        with policy.autocast(enabled=False):
            logits_TV = nn.functional.linear(head.hidden_TD.float(), head.head_VD.float(), bias_V)
            logits_TV = logits_TV * policy.transform.logit_scale
            softcap = policy.transform.softcap
            return logits_TV if softcap is None else softcap * torch.tanh(logits_TV / softcap)

    return policy.at_head(policy.lay_out([group]), logits)


@torch.no_grad()
def _leak(policy: Policy, prompt: list[int], suffixes: list[list[int]]) -> float:
    """How far the logits of the last suffix move when the tokens of the others change."""
    last = len(suffixes[-1])
    others = [[prompt[0]] * len(suffix) for suffix in suffixes[:-1]]
    before = _logits(policy, prompt, suffixes)[-last:]
    return float((_logits(policy, prompt, [*others, suffixes[-1]])[-last:] - before).abs().max())


def _own_logits(policy: Policy, prompt: list[int], suffixes: list[list[int]]) -> Tensor:
    """Logits (T, V) of the same tokens, from the model's own forward pass over each sequence."""
    rows = [torch.tensor([prompt + suffix], device=policy.device) for suffix in suffixes]
    first = len(prompt) - 1  # the row that predicts a suffix's first token
    with policy.autocast():
        logits = [policy.causal_lm(input_ids=row).logits[0, first:-1] for row in rows]
    return torch.cat(logits).float()


def _measure(
    policy: Policy, forward: Callable[[], Tensor], ids_T: Tensor, gradient: bool
) -> list[Tensor]:
    """Logits of a forward pass and, with `gradient`, the gradient of each token's embedding."""
    passed: list[tuple[Tensor, Tensor]] = []

    def watch(embeddings: nn.Module, args: tuple[Tensor, ...], out_BLD: Tensor) -> Tensor:
        leaf_BLD = out_BLD.detach().requires_grad_()
        passed.append((args[0], leaf_BLD))
        return leaf_BLD

    hook = policy.causal_lm.get_input_embeddings().register_forward_hook(watch)
    try:
        with torch.set_grad_enabled(gradient):
            logits_TV = forward()
            target_T = ids_T[-len(logits_TV) :].to(policy.device)
            logprob_T = logits_TV.log_softmax(-1).gather(1, target_T[:, None])[:, 0]
            weight_T = torch.linspace(
                -1, 2, len(target_T), dtype=torch.float32, device=policy.device
            )
            loss = (weight_T * logprob_T).sum()
    finally:
        hook.remove()
    if not gradient:
        return [logits_TV]
    gradients = torch.autograd.grad(loss, [leaf_BLD for _, leaf_BLD in passed])
    ids_T = ids_T.unique().to(policy.device)
    total_TD = sum(
        (ids_T[:, None] == ids_BL.flatten()).float() @ gradient_BLD.flatten(0, 1).float()
        for (ids_BL, _), gradient_BLD in zip(passed, gradients, strict=True)
    )
    assert isinstance(total_TD, Tensor)  # there is at least one pass
    return [logits_TV.detach(), total_TD]
