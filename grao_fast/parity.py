"""The start-up check that a model's head is understood: refused by name, never trained wrong."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import nn

from grao_fast.batch import Group
from grao_fast.kernels.checks import resolve_backend

if TYPE_CHECKING:
    from grao_fast.policy import Policy

logger = logging.getLogger(__name__)

_TOKENS = 16
# Of our logits against the model's, relative to the largest of them.
_TOLERANCE = 1e-3
_TOLERANCE_16_BITS = 0.05


@torch.no_grad()
def check_parity(policy: Policy) -> None:
    """Compare logits from the policy's hidden states with the model's own.

    Raises ValueError, naming the model and the remedy, where they differ or cannot be computed.
    """
    model, device = policy.causal_lm, policy.device
    name = type(model).__name__
    remedy = "set share_prefix=False" if policy.share_prefix else "this model is not supported"
    vocabulary = model.get_output_embeddings().weight.shape[0]
    ids = (torch.arange(_TOKENS) * 7919 + 11) % vocabulary
    prompt, suffixes = ids[:4].tolist(), [ids[4:8].tolist(), ids[8:16].tolist()]
    group = Group(prompt, suffixes, torch.tensor([0.0, 1.0]), torch.tensor([True, True]))
    training = model.training
    try:
        with policy.updating():
            policy.model.eval()
            hidden = policy.hidden(policy.lay_out([group])).float()
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot run as a policy: {error}; {remedy}") from error
    head, bias = policy.head()
    logits = nn.functional.linear(hidden, head.float(), None if bias is None else bias.float())
    logits = logits * policy.transform.logit_scale
    if policy.transform.softcap is not None:
        logits = policy.transform.softcap * torch.tanh(logits / policy.transform.softcap)
    with policy.autocast():
        rows = [
            model(input_ids=torch.tensor([prompt + suffix], device=device)).logits[0, 3:-1].float()
            for suffix in suffixes
        ]
    policy.model.train(training)
    expected = torch.cat(rows)
    error = float((logits - expected).abs().max())
    largest = float(expected.abs().max())
    # 16-bit forward passes of different shapes differ by their rounding
    sixteen_bits = policy.autocast_dtype is not None or model.dtype != torch.float32
    tolerance = _TOLERANCE_16_BITS if sixteen_bits else _TOLERANCE
    if not error <= tolerance * largest:
        raise ValueError(
            f"{name}: logits from its hidden states differ from its own by {error:.3g} where the "
            f"largest is {largest:.3g}; {remedy}"
        )
    logger.info(
        "%s on %s: prompts %s, loss in %s, logits off by %.1e of the largest",
        name,
        device,
        "shared" if policy.share_prefix else "repeated",
        resolve_backend(None, device),
        error / largest,
    )
