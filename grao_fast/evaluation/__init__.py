"""Evaluation: a model's answers against references, and against answers from before training.

`compare` scores completions and gives a `result` with `bootstrap` intervals; `evaluate` answers a
dataset first; `held_out` does so during a run, against the `baseline` that it keeps.
"""
