"""GRAO's loss as kernels, for any trainer: PyTorch and Triton, nothing else.

    from grao_fast.kernels import linear_grao_loss

The kernels are tested against `grao_fast.kernels.reference`, the specification.
"""

# From a checkout's root, a search for Hugging Face's `kernels` package, as by transformers, finds
# this folder. It must then be empty, not import these kernels a second time.
if __name__ == "kernels":
    __version__ = "0"  # Transformers 5.0 fails on a package without a version
else:
    from . import reference, reference_objectives
    from .advantage import group_advantages, sequence_weights
    from .linear_ce import LinearCrossEntropy, linear_weighted_cross_entropy
    from .linear_grao import GRAOLoss, linear_grao_loss
    from .linear_logprob import TokenLogprobs, linear_logprobs
    from .linear_policy import OffPolicy, PolicyLoss, Shaping, linear_policy_loss
    from .vocab_parallel import VocabParallel

__all__ = [
    "GRAOLoss",
    "LinearCrossEntropy",
    "OffPolicy",
    "PolicyLoss",
    "Shaping",
    "TokenLogprobs",
    "VocabParallel",
    "group_advantages",
    "linear_grao_loss",
    "linear_logprobs",
    "linear_policy_loss",
    "linear_weighted_cross_entropy",
    "reference",
    "reference_objectives",
    "sequence_weights",
]
