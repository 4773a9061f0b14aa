"""Loading a model into shards, so that no process ever holds it whole.

Every process builds the model on the device "meta", has it sharded, allocates its shards alone, and
reads its part of every tensor from the safetensors files. Where the files do not hold the tensors
of the model, rank 0 loads it into the CPU's memory and scatters it, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from grao_fast.distributed.world import World
from grao_fast.models.outline import (
    Place,
    allocate,
    compute_buffers,
    places_of,
    share,
    shared_names,
    stand_ins,
    tensor_at,
)
from grao_fast.models.weight_files import Part, WeightFiles, safetensors_of
from grao_fast.system.errors import UserError, first_of
from grao_fast.system.visible import get_logger

logger = get_logger(__name__)

T = TypeVar("T")


class Loader(Protocol):
    """How one process loads a model by its name."""

    @property
    def name(self) -> str:
        """Of the model, in messages."""
        ...

    def base(self, device: torch.device) -> PreTrainedModel:
        """Load the model without its adapter; on "meta", without values."""
        ...

    def files(self) -> list[str]:
        """Paths of the safetensors files with the model's weights; empty if it has others."""
        ...

    def adapted(self, base: nn.Module) -> nn.Module:
        """Put the adapter, if there is one, on a base with values."""
        ...

    def adapted_outline(self, base: nn.Module) -> nn.Module:
        """Put the adapter on a base on "meta", itself on "meta" too."""
        ...

    def reads_base(self) -> bool:
        """Whether the adapter's first weights depend on the base's, or alter them."""
        ...

    def digest(self, base: nn.Module) -> str | None:
        """What is kept of a base before its adapter alters it."""
        ...


class Outline:
    """A model and its adapter that wait, on the device "meta", to be sharded and filled.

    Once filled, every tensor has the bits that one process would have loaded or, of an adapter,
    drawn, provided that the random generators of all processes agree.

    model: its base is on "meta"; its buffers and its adapter may be on the CPU.
    base_digest: of the base before its adapter alters it; None if it does not.
    """

    def __init__(self, loader: Loader, world: World) -> None:
        """Outline the model in every process.

        Raises:
            UserError: what the loader raises, in all processes.
        """
        base = _here(world, lambda: loader.base(torch.device("meta")))
        compute_buffers(base)
        self._world = world
        self._files = _here(world, lambda: WeightFiles(loader.files(), base))
        why = next(filter(None, world.each(lambda: _why_whole(loader, base, self._files))), None)
        self._whole = None if why is None else _Whole(loader, world, base, why)
        self.base_digest = None if self._whole is None else self._whole.base_digest
        self._places = places_of(base)
        if loader.reads_base():
            self.model = _here(world, lambda: loader.adapted_outline(base))
            self._places = places_of(self.model)
        else:
            self.model = _here(world, lambda: _drawn_adapter(loader, base))

    def fill(self, device: torch.device, *, cpu_offload: bool = False) -> None:
        """Allocate this process's shards, or all tensors if none is sharded, and fill them.

        Args:
            device: that computes.
            cpu_offload: whether the shards lie in the CPU's memory.
        """
        shards_on = torch.device("cpu") if cpu_offload else device
        allocate(self.model, parameters=shards_on, buffers=device)
        if self._whole is None:
            _here(self._world, lambda: _read(self._places, self._files))
        else:
            self._whole.scatter(self._places, device)
        self._files.close()


def refill(
    model: PreTrainedModel,
    folder: Path,
    outline: PreTrainedModel,
    *,
    whole: Callable[[], PreTrainedModel],
    device: torch.device,
    world: World,
) -> None:
    """Fill a sharded model with weights that `save_pretrained` wrote; every process must call it.

    Args:
        outline: the folder's model on "meta", as `from_pretrained` returns it.
        whole: loads it into the CPU's memory, for rank 0 to scatter where that is needed.
        device: that computes.
    """
    files = _here(world, lambda: WeightFiles(safetensors_of(str(folder), None), outline))
    places = places_of(model)
    why = next(filter(None, world.each(lambda: _held_otherwise(places, files))), None)
    if why is None:
        _here(world, lambda: _read(places, files))
    else:
        logger.info("rank 0 loads %s whole and scatters it: %s", folder.name, why)
        tensors: dict[str, Tensor] = {}
        world.main(lambda: tensors.update(whole().state_dict()))
        _scatter(places, tensors, device, world)
    files.close()


def _here(world: World, attempt: Callable[[], T]) -> T:
    """Call `attempt` in every process; returns this one's result, which the others do not get."""
    kept: list[T] = []
    world.each(lambda: kept.append(attempt()))
    return kept[0]


def _why_whole(loader: Loader, outline: PreTrainedModel, files: WeightFiles) -> str | None:
    """Why processes cannot read their parts of the model from its files; None if they can."""
    if loader.reads_base():
        return "the first weights of its adapter depend on whole weights of the model"
    if not loader.files():
        return "its weights are not in safetensors files"
    unlike = _held_otherwise(places_of(outline), files)
    if unlike is not None:
        return unlike
    tied = outline.all_tied_weights_keys.items()
    twice = [a for a, b in tied if outline.get_parameter(a) is not outline.get_parameter(b)]
    if twice:
        return f"its files hold {first_of(twice)}, which is tied, a second time"
    return None


def _held_otherwise(places: dict[str, Place], files: WeightFiles) -> str | None:
    """How files differ from a model's own tensors; None if they hold these."""
    of = {name: tuple(tensor_at(place).shape) for name, place in places.items()}
    absent = [name for name, shape in of.items() if not files.holds(name, shape)]
    if absent:
        return f"its files hold {first_of(absent)} under other names or in another form"
    return None


def _drawn_adapter(loader: Loader, outline: nn.Module) -> nn.Module:
    with stand_ins(outline):
        model = loader.adapted(outline)
    read = [
        name
        for name, parameter in model.named_parameters()
        if not parameter.is_meta and not bool(parameter.isfinite().all())
    ]
    if read:
        raise UserError(
            f"peft_config makes {first_of(read)} from the model's weights, which are sharded: make "
            "the adapter in one process, save it (save_pretrained), and give its folder as model"
        )
    return model


@torch.no_grad()
def _read(places: dict[str, Place], files: WeightFiles) -> None:
    """Read this process's part of every tensor from the files."""
    for name, place in places.items():
        tensor = tensor_at(place)
        if not isinstance(tensor, DTensor):
            tensor.copy_(files.read(name, (slice(None),) * tensor.dim()))
            continue
        (chunk,) = tensor.__create_chunk_list__()
        if chunk.sizes.numel():
            part: Part = tuple(
                slice(start, start + size)
                for start, size in zip(chunk.offsets, chunk.sizes, strict=True)
            )
            tensor.to_local().copy_(files.read(name, part))


class _Whole:
    """The whole model in rank 0, in the CPU's memory, of which the other processes get shards."""

    def __init__(self, loader: Loader, world: World, outline: PreTrainedModel, why: str) -> None:
        """Load it, and share parameters of the outline as it does."""
        self._world = world
        if world.is_main:
            logger.info("rank 0 loads %s whole and scatters it: %s", loader.name, why)
        self.tensors: dict[str, Tensor] = {}
        shared, outline.all_tied_weights_keys, self.base_digest = world.main(
            lambda: self._load(loader)
        )
        share(outline, shared)

    def _load(self, loader: Loader) -> tuple[dict[str, str], dict[str, str], str | None]:
        base = loader.base(torch.device("cpu"))
        said = shared_names(base), base.all_tied_weights_keys, loader.digest(base)
        model = loader.adapted(base) if loader.reads_base() else base
        self.tensors = {n: tensor_at(place).detach() for n, place in places_of(model).items()}
        return said

    def scatter(self, places: dict[str, Place], device: torch.device) -> None:
        """Fill the shards of all processes."""
        _scatter(places, self.tensors, device, self._world)
        # an adapter was drawn in rank 0 alone
        torch.set_rng_state(self._world.main(torch.get_rng_state))


@torch.no_grad()
def _scatter(
    places: dict[str, Place], tensors: dict[str, Tensor], device: torch.device, world: World
) -> None:
    """Fill the shards of all processes with rank 0's tensors, one at a time."""
    for name, place in places.items():
        tensor = tensor_at(place)
        if world.is_main:
            values = tensors.pop(name).to(device, tensor.dtype)
        else:
            values = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if isinstance(tensor, DTensor):
            sharded = distribute_tensor(values, tensor.device_mesh, tensor.placements)
            tensor.to_local().copy_(sharded.to_local())
        else:
            dist.broadcast(values, src=0)
            tensor.copy_(values)
