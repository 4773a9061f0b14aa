"""A key/value cache that grows in place.

Shapes: B sequences, H key/value heads, L tokens, d head width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

# Tokens that a layer makes room for when it has none left.
_ROOM = 32


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` with room behind its tokens: a new token is written there.

    `DynamicLayer` copies all that it holds at every token. For use without autograd.
    """

    _room: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (B, H, new tokens, d); returns all keys and values, (B, H, L, d)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.get_seq_length()
        new = old + key_states.shape[-2]
        if self._room is None or self._room[0].shape[-2] < new or not self._in_room():
            self._room = self._make_room(key_states, value_states, old, new)
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, old:new] = states
        self.keys, self.values = (room[:, :, :new] for room in self._room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences; the room of all goes with the others, or both would be held."""
        super().batch_select_indices(indices)
        self._room = None

    def _in_room(self) -> bool:
        """Whether they still stand there: repeated or reordered sequences are a new tensor."""
        assert self._room is not None and self.keys is not None
        return self.keys.untyped_storage().data_ptr() == self._room[0].untyped_storage().data_ptr()

    def _make_room(
        self, key_states: Tensor, value_states: Tensor, old: int, new: int
    ) -> tuple[Tensor, Tensor]:
        spare = _ROOM if old else 0  # a prompt's keys and values are repeated first: a copy anyway
        rooms = []
        for states, held in ((key_states, self.keys), (value_states, self.values)):
            B, H, _, d = states.shape
            room = states.new_empty(B, H, new + spare, d)
            if old:
                room[:, :, :old] = held
            rooms.append(room)
        return rooms[0], rooms[1]


def growing_cache(config: PreTrainedConfig) -> DynamicCache:
    """A model's cache, with `GrowingLayer` where it would have a `DynamicLayer`."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(x) is DynamicLayer else x for x in cache.layers]
    return cache
