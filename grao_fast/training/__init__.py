"""Training: a step, its memory and metrics, and the checkpoints of a run."""
