"""GRAO's loss as kernels, for any trainer: PyTorch and Triton, nothing else.

    from grao_fast.kernels import linear_grao_loss

`grao_fast.kernels.reference` is the specification that they are tested against.
"""

# From a checkout's root, whoever looks for Hugging Face's `kernels` package (transformers does)
# meets this folder under that name. It must be nothing then, not these kernels a second time.
if __name__ == "kernels":
    __version__ = "0"  # Transformers 5.0 fails on a package without one
else:
    from . import reference
    from .advantage import group_advantages, sequence_weights
    from .linear_ce import LinearCrossEntropy, linear_weighted_cross_entropy
    from .linear_grao import GRAOLoss, linear_grao_loss
    from .linear_logprob import TokenLogprobs, linear_logprobs
    from .vocab_parallel import VocabParallel

__all__ = [
    "GRAOLoss",
    "LinearCrossEntropy",
    "TokenLogprobs",
    "VocabParallel",
    "group_advantages",
    "linear_grao_loss",
    "linear_logprobs",
    "linear_weighted_cross_entropy",
    "reference",
    "sequence_weights",
]
