"""Records and restores the global random generators of Python, NumPy and torch."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class GlobalGenerators:
    """A snapshot of the states of the global random generators."""

    python: Any
    numpy: Any
    cpu: Tensor
    cuda: list[Tensor]

    @classmethod
    def now(cls) -> GlobalGenerators:
        """Take a snapshot."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def moved(self) -> bool:
        """Whether random numbers have been drawn since the snapshot."""
        now = GlobalGenerators.now()
        return (
            self.python != now.python
            or self.numpy[2:] != now.numpy[2:]
            or not np.array_equal(self.numpy[1], now.numpy[1])
            or not torch.equal(self.cpu, now.cpu)
            or not all(map(torch.equal, self.cuda, now.cuda))
        )

    def restore(self) -> None:
        """Set all generators back to the snapshot."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
