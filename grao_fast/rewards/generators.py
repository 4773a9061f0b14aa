"""The generators that a process shares: Python's, NumPy's and torch's."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class GlobalGenerators:
    """Where the global generators stand, to tell whether someone drew, and to go back."""

    python: Any
    numpy: Any
    cpu: Tensor
    cuda: list[Tensor]

    @classmethod
    def now(cls) -> GlobalGenerators:
        """Where they stand now."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def moved(self) -> bool:
        """Whether one stands elsewhere now."""
        now = GlobalGenerators.now()
        return (
            self.python != now.python
            or self.numpy[2:] != now.numpy[2:]
            or not np.array_equal(self.numpy[1], now.numpy[1])
            or not torch.equal(self.cpu, now.cpu)
            or not all(map(torch.equal, self.cuda, now.cuda))
        )

    def restore(self) -> None:
        """Put them back."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
