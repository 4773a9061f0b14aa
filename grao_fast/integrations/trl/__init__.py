"""GRAO inside TRL.

    from grao_fast.integrations.trl import GRAOTrainer, GRAOTrainerConfig

config.py has GRAO's options; options.py and datasets.py refuse what is not supported;
references.py reads and attaches references, turns.py encodes them, and rollout.py puts them into
TRL's rollout; rows.py lays out a micro-batch; head.py makes its loss inside the model's forward
pass; zero.py gathers weights that ZeRO-3 has split; trainer.py is the trainer.
"""

from grao_fast.integrations.trl.config import GRAOTrainerConfig
from grao_fast.integrations.trl.trainer import GRAOTrainer

__all__ = ["GRAOTrainer", "GRAOTrainerConfig"]
