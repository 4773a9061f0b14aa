"""A policy's whole weights, adapters merged, one layer at a time, as its files would hold them.

No process ever has more than a layer of a sharded model: all of them gather its tensors, and rank 0
alone keeps them until it has passed them on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from grao_fast.models.policy import Policy
from grao_fast.models.sharded_saving import can_be_cut, units_of
from grao_fast.models.sharding import reshard, whole
from grao_fast.system.visible import get_logger

logger = get_logger(__name__)

R = TypeVar("R")
Tensors = dict[str, Tensor]


class WholeWeights:
    """The weights of a policy, as they are when they are read.

    Names and shapes are those of the model's safetensors files, dtypes those of the policy's
    passes. A tied tensor comes under each of its names.
    """

    def __init__(self, policy: Policy) -> None:
        self._lm, self._world = policy.causal_lm, policy.world
        self._dtype = policy.autocast_dtype
        self._wrappers = _wrappers(self._lm) if hasattr(policy.model, "peft_config") else {}
        self._paths: dict[str, str | None] = {}  # of the wrapper around each tensor
        self._own = self._outline_without_adapter()
        self._units = list(filter(None, units_of(self._lm, self._own).values()))
        if not can_be_cut(self._lm, self._own, self._units):
            logger.debug(
                "all weights of %s are gathered at once: its files do not hold it layer by layer",
                self._lm.config.model_type,
            )
            self._units = [list(self._own)]

    def outline(self) -> Tensors:
        """All tensors in the order in which they are read, on the device "meta"."""
        parts = [self._as_in_files({n: self._own[n] for n in names}) for names in self._units]
        return {name: tensor for part in parts for name, tensor in part.items()}

    def read(self, use: Callable[[Iterator[Tensors]], R]) -> R:
        """Call `use` in rank 0 with the tensors of each layer in turn; returns its result in all.

        Every process must call it.
        """

        def attempt() -> R | None:
            stream = self._layers()
            try:
                return use(stream) if self._world.is_main else None
            finally:  # an error comes after the gathering, in which the other processes wait
                for _ in stream:
                    pass

        return self._world.each(attempt, held=True)[0]  # pyright: ignore[reportReturnType]

    @torch.no_grad()
    def _layers(self) -> Iterator[Tensors]:
        """The tensors of each layer, in rank 0; nothing in the other processes."""
        reshard(self._lm)
        state = self._lm.state_dict()
        for names in self._units:
            tensors: Tensors = {}
            merged: set[str] = set()
            for name in names:
                path = self._paths[name]
                if path in merged:
                    continue
                if path is None:
                    found = {name: whole(self._cast(state[name]))}
                else:
                    found = self._merged(path)
                    merged.add(path)
                if self._world.is_main:
                    tensors |= found
            if self._world.is_main:
                tensors = self._as_in_files({name: tensors[name] for name in names})
            yield tensors

    def _merged(self, path: str) -> Tensors:
        """In rank 0, the tensors of a wrapped module, merged in a copy of it.

        Merging in the module itself, and unmerging, would round its weights.
        """
        wrapper: Any = self._wrappers[path]
        copies = {
            id(p): nn.Parameter(whole(p.detach()).clone(), requires_grad=False)
            for p in wrapper.parameters()
        }
        if not self._world.is_main:
            return {}
        merged = copy.deepcopy(wrapper, copies)
        if hasattr(merged, "unload_and_optionally_merge_module"):
            merged = merged.unload_and_optionally_merge_module(True, False, None)
        else:
            merged.merge()
            merged = merged.get_base_layer()
        return {f"{path}.{name}": self._cast(t) for name, t in merged.state_dict().items()}

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype) if self._dtype and tensor.is_floating_point() else tensor

    def _outline_without_adapter(self) -> Tensors:
        """The tensors of the model inside of an adapter, on "meta"."""
        state: Tensors = {}
        for name, tensor in self._lm.state_dict().items():
            path = next((p for p in _parents(name) if p in self._wrappers), None)
            own = {name: tensor}
            if path is not None:
                inside = _own_module(self._wrappers[path]).state_dict()
                own = {f"{path}.{n}": t for n, t in inside.items()}
            state |= own
            self._paths |= dict.fromkeys(own, path)
        ignored = self._lm._keys_to_ignore_on_save or ()
        return {
            name: self._cast(torch.empty(t.shape, dtype=t.dtype, device="meta"))
            for name, t in state.items()
            if name not in ignored
        }

    def _as_in_files(self, tensors: Tensors) -> Tensors:
        return revert_weight_conversion(self._lm, tensors)


def _wrappers(lm: nn.Module) -> dict[str, Any]:
    """The modules that an adapter has put around the model's own, by path, the outermost ones."""
    found: dict[str, Any] = {}
    for path, module in lm.named_modules():
        wraps = hasattr(module, "unload_and_optionally_merge_module") or hasattr(
            module, "base_layer"
        )
        if wraps and not any(parent in found for parent in _parents(path)):
            found[path] = module
    return found


def _own_module(wrapper: Any) -> nn.Module:
    """The model's own module inside of one that an adapter has put around it."""
    if hasattr(wrapper, "base_layer"):
        return wrapper.get_base_layer()
    return wrapper.original_module


def _parents(path: str) -> Iterator[str]:
    """The paths of the modules around a tensor or module, the outermost first."""
    parts = path.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts)))
