"""The start-up check that a sampler's log-probs are the policy's."""

from __future__ import annotations

from typing import NamedTuple

import torch

from grao_fast.data.packing import Group, pad
from grao_fast.kernels import linear_logprobs
from grao_fast.kernels.devices import to_device
from grao_fast.models.checks import MODEL_ERRORS
from grao_fast.models.objective import HeadInputs
from grao_fast.models.policy import Policy
from grao_fast.models.sharding import gathered, own_class
from grao_fast.sampling import Sampler
from grao_fast.sampling.seeds import prompt_seeds
from grao_fast.system.errors import UserError, first_line

# Lengths of two prompts, different so that padding is tested, and the tokens sampled for each.
_LENGTHS = (5, 3)
_NEW_TOKENS = 4
# Nats for each token, relative to the largest log-prob, or to 1 if that is smaller. In 16 bits,
# decoding rounds differently from a pass over a whole row, so the mean over tokens is compared.
_TOLERANCE = 1e-3
_MEAN_16_BITS = 0.1


class Difference(NamedTuple):
    """The differences of log-probs between sampler and policy, in nats: maximum and mean.

    allowed: bound on the maximum in float32.
    """

    off: float
    mean: float
    allowed: float


def check_sampler(sampler: Sampler, policy: Policy, *, temperature: float = 1.0) -> Difference:
    """Sample a few tokens and compare their log-probs with the policy's own.

    Raises UserError, naming the model, if it cannot be sampled or they differ.
    """
    name = own_class(policy.causal_lm).__name__
    try:
        difference = measure_sampler(sampler, policy, temperature=temperature)
    except MODEL_ERRORS as error:
        raise UserError(
            f"{name} cannot be sampled by {type(sampler).__name__}: {first_line(error)}"
        ) from error
    sixteen_bits = policy.autocast_dtype is not None or policy.causal_lm.dtype != torch.float32
    off, allowed = difference.off, difference.allowed
    if sixteen_bits:
        off, allowed = difference.mean, _MEAN_16_BITS
    if not off <= allowed:
        raise UserError(
            f"{name}: log-probs of {type(sampler).__name__} differ from the policy's own by "
            f"{off:.3g} nats, where rounding explains {allowed:.3g}; this model is not supported"
        )
    return difference


@torch.no_grad()
def measure_sampler(sampler: Sampler, policy: Policy, *, temperature: float = 1.0) -> Difference:
    """Compare the sampler, as last synced, with the policy on tokens that it samples now."""
    vocabulary = policy.head()[0].shape[0]
    prompts = [[(i * 7919 + n + 11) % vocabulary for i in range(n)] for n in _LENGTHS]
    with gathered(policy.causal_lm):
        sampled = sampler.sample(
            prompts,
            num_generations=2,
            max_new_tokens=_NEW_TOKENS,
            temperature=temperature,
            seeds=prompt_seeds(0, len(prompts)),
        )
    groups = [
        Group(
            prompt,
            [completion.token_ids for completion in completions],
            sampler_logprobs=[completion.logprobs for completion in completions],
        )
        for prompt, completions in zip(prompts, sampled, strict=True)
    ]
    # Padded rows with the model's own attention; `check_parity` has compared packed rows with it.
    batch = pad(groups, pad_token_id=policy.pad_token_id)

    def score(head: HeadInputs) -> torch.Tensor:
        return linear_logprobs(
            head.hidden_TD,
            head.head_VD,
            to_device(batch.target_T, policy.device),
            bias_V=head.bias_V,
            temperature=temperature or 1.0,
            logit_scale=policy.transform.logit_scale,
            softcap=policy.transform.softcap,
        ).logprob_T

    training = policy.model.training
    policy.model.eval()
    logprob_T = policy.at_head(batch, score)
    policy.model.train(training)
    off_T = (logprob_T.float().cpu() - batch.sampler_logprob_T).abs()
    largest = float(batch.sampler_logprob_T.abs().max())
    return Difference(float(off_T.max()), float(off_T.mean()), _TOLERANCE * max(1.0, largest))
