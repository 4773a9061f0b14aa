"""The caches of models: what they hold, and a key/value cache that grows in place.

Shapes: B sequences, H key/value heads, L tokens, d head width.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from grao_fast.models.checks import MODEL_ERRORS
from grao_fast.models.router import no_router_loss
from grao_fast.models.sharding import own_class
from grao_fast.system.errors import UserError, first_line

# Tokens that a full layer is enlarged by.
_ROOM = 32
# Cache layers that hold keys and values only, or share those of another layer.
_KEYS_AND_VALUES = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` with spare capacity, which new tokens are written to.

    `DynamicLayer` copies all keys and values for every token. For use without autograd.
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

    def close_up(self, places: Tensor, movers: Tensor, left: int) -> None:
        """Copy the sequences `movers` to `places` and keep the first `left` sequences."""
        assert self.keys is not None and self.values is not None
        for states in (self.keys, self.values):
            states[places] = states[movers]
        self.keys, self.values = self.keys[:left], self.values[:left]
        if self._room is not None:
            self._room = self._room[0][:left], self._room[1][:left]

    def _in_room(self) -> bool:
        """Whether keys and values are still in the buffer; repeating or reordering copies them."""
        assert self._room is not None and self.keys is not None
        return self.keys.untyped_storage().data_ptr() == self._room[0].untyped_storage().data_ptr()

    def _make_room(
        self, key_states: Tensor, value_states: Tensor, old: int, new: int
    ) -> tuple[Tensor, Tensor]:
        spare = _ROOM if old else 0  # after prefill they are repeated, which copies them anyway
        rooms = []
        for states, held in ((key_states, self.keys), (value_states, self.values)):
            B, H, _, d = states.shape
            room = states.new_empty(B, H, new + spare, d)
            if old:
                room[:, :, :old] = held
            rooms.append(room)
        return rooms[0], rooms[1]


def drop_rows(cache: DynamicCache, ended: Tensor) -> Tensor:
    """Drop the sequences that have ended, (B,) bool on the CPU; returns the indices left, in order.

    The last sequences move to the places of the ended ones. A `GrowingLayer` copies only these,
    other layers copy all that are left.
    """
    assert cache.layers[0].keys is not None
    device = cache.layers[0].keys.device
    live = (~ended).nonzero().squeeze(1)
    left = len(live)
    places, movers = ended[:left].nonzero().squeeze(1), live[live >= left]
    order = torch.arange(left)
    order[places] = movers
    places, movers, order = (x.to(device) for x in (places, movers, order))
    for layer in cache.layers:
        if isinstance(layer, GrowingLayer):
            layer.close_up(places, movers, left)
        else:
            layer.batch_select_indices(order)
    return order


def growing_cache(config: PreTrainedConfig) -> DynamicCache:
    """A model's cache, with a `GrowingLayer` for every `DynamicLayer`."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(x) is DynamicLayer else x for x in cache.layers]
    return cache


def cache_name(model: PreTrainedModel) -> str:
    """The name of `forward`'s cache argument, which Transformers has renamed."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class Kept(NamedTuple):
    """What a model keeps of earlier tokens while it generates.

    keys_and_values: whether it keeps keys and values only, in a `DynamicCache`.
    state: a name for any other state that tokens depend on; None: there is none.
    """

    keys_and_values: bool
    state: str | None


@torch.no_grad()
def kept_by(model: PreTrainedModel, dtype: torch.dtype | None) -> Kept:
    """What a model keeps, read off the cache that a forward pass over two tokens returns.

    A class that marks itself as stateful is taken to be so. Raises UserError if the model cannot
    run.
    """
    training = model.training
    model.eval()
    try:
        ids = torch.zeros((1, 2), dtype=torch.int64, device=model.device)
        autocast = torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None)
        with autocast, no_router_loss(model):
            output = model(input_ids=ids, use_cache=True)
    except MODEL_ERRORS as error:
        raise UserError(f"{own_class(model).__name__} cannot run: {first_line(error)}") from error
    finally:
        model.train(training)
    held = dict(output.items())
    cache = held.get("cache", held.get("past_key_values"))
    stateful = getattr(model, "_is_stateful", False)
    if type(cache) is DynamicCache:
        others = {type(layer).__name__ for layer in cache.layers} - _KEYS_AND_VALUES
        if others:
            return Kept(False, " and ".join(sorted(others)))
    elif cache is not None:
        return Kept(False, type(cache).__name__)
    return Kept(cache is not None and not stateful, "a recurrent state" if stateful else None)
