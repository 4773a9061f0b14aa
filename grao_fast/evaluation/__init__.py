"""Evaluation: answers against references, and against the answers from before training."""
