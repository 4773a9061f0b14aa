"""A model on the device "meta", where tensors have shapes and no storage, and its way to values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Place = tuple[nn.Module, str]


@torch.no_grad()
def compute_buffers(model: PreTrainedModel) -> None:
    """Compute the buffers that no file holds, such as rotary frequencies, on the CPU.

    For a model on "meta" as `from_pretrained` returned it, which would compute them likewise.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
    for module in model.modules():
        absent = [n for n, b in module.named_buffers(recurse=False) if not is_stored(module, n)]
        for name in absent:
            buffer = module.get_buffer(name)
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
            module._is_hf_initialized = False  # pyright: ignore[reportArgumentType]
    model.initialize_weights()


def is_stored(module: nn.Module, name: str) -> bool:
    """Whether a tensor of a module belongs to its state dict."""
    return name not in module._non_persistent_buffers_set


def tensor_at(place: Place) -> Tensor:
    """The parameter or buffer at a place."""
    module, name = place
    return getattr(module, name)


def places_of(model: nn.Module) -> dict[str, Place]:
    """Where a model has the tensors of its state dict, by name; one that is shared counts once.

    Places stay valid as adapters are put on the model and as it is sharded.
    """
    places: dict[str, Place] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and is_stored(module, name) and id(tensor) not in seen:
                seen.add(id(tensor))
                places[f"{path}.{name}" if path else name] = (module, name)
    return places


def shared_names(model: nn.Module) -> dict[str, str]:
    """Names of parameters that are another's too, each with that one's first name."""
    first: dict[int, str] = {}
    shared: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            shared[name] = first[id(parameter)]
    return shared


def share(model: nn.Module, names: dict[str, str]) -> None:
    """Share parameters as `shared_names` found them in another instance of the model."""
    for name, first in names.items():
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, model.get_parameter(first))


@contextmanager
def stand_ins(model: nn.Module) -> Iterator[None]:
    """A context in which the parameters on "meta" are on the CPU, NaN throughout, one number each.

    An adapter that is put on the model inside, and that does not read its weights, then has its
    own weights on the CPU, drawn as for a model with values.
    """
    real: dict[int, nn.Parameter] = {}
    places = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                places.append((module, name, parameter))
                if id(parameter) not in real:
                    number = torch.full((1,), torch.nan, dtype=parameter.dtype)
                    number = number.expand(parameter.shape)
                    real[id(parameter)] = nn.Parameter(number, requires_grad=False)
    for module, name, parameter in places:
        module._parameters[name] = real[id(parameter)].requires_grad_(parameter.requires_grad)
    try:
        yield
    finally:
        for module, name, parameter in places:
            stand_in = module._parameters[name]
            parameter.requires_grad_(stand_in is not None and stand_in.requires_grad)
            module._parameters[name] = parameter


def allocate(model: nn.Module, *, parameters: torch.device, buffers: torch.device) -> None:
    """Allocate what is still on "meta", without values: of sharded parameters, this one's shard."""

    def allocated(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        device = parameters if isinstance(tensor, nn.Parameter) else buffers
        return torch.empty_like(tensor, device=device)

    model._apply(allocated)
