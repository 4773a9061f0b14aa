"""Rewards that hold a model, which has its place beside the policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager

from grao_fast.models.placement import Placement
from grao_fast.rewards.named import CountedReward


class PlacedReward(CountedReward, ABC):
    """A reward that is loaded beside a policy, and may be sharded over the same processes."""

    @abstractmethod
    def place(self, placement: Placement) -> None:
        """Load the model, where the policy is. Every process must call it."""

    @abstractmethod
    def ready(self) -> AbstractContextManager[None]:
        """A context in which it scores without other processes: all must enter it together."""
