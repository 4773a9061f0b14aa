"""The paper's pairwise judge: a language model, at an OpenAI-compatible endpoint."""

from grao_fast.rewards.judge.judge import Judge

__all__ = ["Judge"]
