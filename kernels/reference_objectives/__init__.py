"""The specifications of objectives: each loss as its paper writes it, in plain PyTorch.

Every function takes the log-probs of tokens, differentiable, and returns a loss in their dtype, at
any cost. They share nothing with `grao_fast.objectives` and the kernels, which are tested against
them in float64. GRAO's own specification is `grao_fast.kernels.reference`.
"""

from . import mixtures, own_logprob, policy_gradient, ppo, sequence_level, supervised

__all__ = [
    "mixtures",
    "own_logprob",
    "policy_gradient",
    "ppo",
    "sequence_level",
    "supervised",
]
