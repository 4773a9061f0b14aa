"""GRAO inside TRL.

    from grao_fast.integrations.trl import GRAOTrainer

options.py refuses what does not fit; references.py finds, encodes and places the references;
rows.py lays out a micro-batch; head.py makes its loss inside the model's forward pass; trainer.py
is the trainer.
"""

from grao_fast.integrations.trl.trainer import GRAOTrainer

__all__ = ["GRAOTrainer"]
