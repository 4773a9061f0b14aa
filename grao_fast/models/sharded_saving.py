"""Writing a sharded model for `from_pretrained` by all processes, none of which has it whole.

The model is cut between its layers into files. Each process gathers the tensors of all files, and
keeps those of one file at a time, which it writes: the first file, with all that lies outside of
layers, by the model's `save_pretrained`, which other processes than rank 0 may not call.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from grao_fast.distributed.world import World
from grao_fast.models.sharding import layers, whole
from grao_fast.system.files import NEW
from grao_fast.system.visible import get_logger

logger = get_logger(__name__)

_LARGEST_FILE = 5 << 30  # bytes, of which each process holds one file's

Save = Callable[[PreTrainedModel, Path, dict[str, Tensor]], None]


def save_sharded(model: PreTrainedModel, folder: Path, world: World, save: Save) -> None:
    """Write weights and configuration; every process must call it.

    save: save(model, folder, state_dict), by the model's own `save_pretrained`.
    """
    count = 0
    for part in _parts(model, world):
        world.each(partial(_write, model, folder, part, save), held=True)
        count += part.together
    world.main(lambda: _join(model, folder, count), held=True)


def hold_sharded(
    model: PreTrainedModel, world: World, save: Save
) -> Callable[[PreTrainedModel, Path, World], None]:
    """Copy this process's files into the CPU's memory; every process must call it.

    Returns write(model, folder, world), which does what `save_sharded` does and may be called in
    another thread, with a model whose configuration does not change and a world of the thread's.
    """
    parts = list(_parts(model, world, copied=True))

    def write(model: PreTrainedModel, folder: Path, world: World) -> None:
        for part in parts:
            world.each(partial(_write, model, folder, part, save), held=True)
        count = sum(part.together for part in parts)
        world.main(lambda: _join(model, folder, count), held=True)

    return write


class _Part(NamedTuple):
    """A file of this process; empty where the others write the last ones.

    number: among the files of all.
    together: the files that all processes write at the same time.
    """

    number: int
    tensors: dict[str, Tensor]
    together: int


def _parts(model: PreTrainedModel, world: World, *, copied: bool = False) -> Iterator[_Part]:
    """Gather this process's files, one after the other; every process must do so.

    copied: whether tensors must not share memory with the model's.
    """
    state = model.state_dict()
    files = _files(model, state, world.size)
    for start in range(0, len(files), world.size):
        own: dict[str, Tensor] = {}
        together = files[start : start + world.size]
        for rank, names in enumerate(together):
            for name, tensor in gathered_tensors(model, state, names):
                if rank == world.rank:
                    own[name] = tensor
        if copied:
            own = copies(own)
        yield _Part(start + world.rank, own, len(together))


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU; names that share a tensor share its copy."""
    copied = {id(tensor): tensor.to("cpu", copy=True) for tensor in tensors.values()}
    return {name: copied[id(tensor)] for name, tensor in tensors.items()}


def _files(model: PreTrainedModel, state: dict[str, Tensor], processes: int) -> list[list[str]]:
    """The names of the tensors of each file: as many files as processes, or more if too large.

    A few models store tensors on disk that are made of several layers': they get a single file.
    """
    units = list(units_of(model, state).values())
    if not can_be_cut(model, state, units):
        logger.info(
            "rank 0 gathers the whole of %s to save it: its files do not hold it layer by layer",
            model.config.model_type,
        )
        return [list(state)]
    sizes = [sum(_bytes(state[name]) for name in names) for names in units]
    enough = min(_LARGEST_FILE, -(-sum(sizes) // processes))
    files: list[list[str]] = [[]]
    filled = 0
    for names, size in zip(units, sizes, strict=True):
        if filled >= enough:
            files.append([])
            filled = 0
        files[-1] += names
        filled += size
    return files


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size() if isinstance(tensor, Tensor) else 0


def units_of(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, list[str]]:
    """The names of a state's tensors by layer, those outside of layers first, under "".

    The first ones include parameters with several names, of which `save_pretrained` keeps one.
    """
    split = set(map(id, layers(model)))
    paths = {path for path, module in model.named_modules() if id(module) in split}
    units: dict[str, list[str]] = {"": []}
    shared = _shared(_first_names(model))
    for name in state:
        parts = name.split(".")
        prefixes = (".".join(parts[:count]) for count in range(1, len(parts)))
        layer = next((prefix for prefix in prefixes if prefix in paths), "")
        units.setdefault("" if name in shared else layer, []).append(name)
    return units


def _first_names(model: nn.Module) -> dict[str, str]:
    """For every parameter's name, the first name of that parameter."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def _shared(first: dict[str, str]) -> set[str]:
    """The names of parameters that have several."""
    ones = {one for name, one in first.items() if one != name}
    return {name for name, one in first.items() if one in ones}


def can_be_cut(model: PreTrainedModel, state: dict[str, Tensor], units: list[list[str]]) -> bool:
    """Whether parts, saved alone, have the names and shapes that they have in the whole.

    Transformers renames and splits the tensors of some models as it saves them; it is asked what it
    does, with tensors that have no values.
    """
    outline = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in state.items()
        if isinstance(tensor, Tensor)
    }

    def saved(names: list[str]) -> dict[str, torch.Size]:
        part = {name: outline[name] for name in names if name in outline}
        return {name: t.shape for name, t in revert_weight_conversion(model, part).items()}

    try:
        together = saved(list(outline))
        apart = [saved(names) for names in units]
    except Exception as error:  # of any kind: conversions are the model's own
        logger.debug("tensors without values cannot be converted: %s", error)
        return False
    return sum(map(len, apart)) == len(together) and together == {
        name: shape for part in apart for name, shape in part.items()
    }


def gathered_tensors(
    model: nn.Module, state: dict[str, Tensor], names: Iterable[str]
) -> Iterator[tuple[str, Tensor]]:
    """The whole tensors of a state on the CPU, one at a time; names of a parameter share it.

    Every process must go through all of them.
    """
    first = _first_names(model)
    shared = _shared(first)
    kept: dict[str, Tensor] = {}  # of those with several names
    for name in names:
        one = first.get(name, name)
        tensor = kept.get(one, state[name])
        if isinstance(tensor, Tensor):
            tensor = whole(tensor).cpu()
        if name in shared:
            kept[one] = tensor
        yield name, tensor


def _write(model: PreTrainedModel, folder: Path, part: _Part, save: Save) -> None:
    """Write a file as `save_pretrained` does, or by it."""
    own = _part(folder, part.number)
    if part.number == 0:
        save(model, own, part.tensors)
    elif part.tensors:
        _write_layers(model, own, part.tensors)


def _write_layers(model: PreTrainedModel, part: Path, tensors: dict[str, Tensor]) -> None:
    ignored = model._keys_to_ignore_on_save or ()
    kept = {name: tensor for name, tensor in tensors.items() if name not in ignored}
    converted = revert_weight_conversion(model, kept)
    part.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in converted.items()},
        part / SAFE_WEIGHTS_NAME,
        metadata={"format": "pt"},
    )


def _part(folder: Path, number: int) -> Path:
    return folder / f"{NEW}part-{number:05d}"


def _join(model: PreTrainedModel, folder: Path, count: int) -> None:
    """Move the files of the parts into their folder, named as `save_pretrained` names them."""
    parts = [_part(folder, number) for number in range(count)]
    weights = [file for part in parts for file in sorted(part.glob("*.safetensors"))]
    names = [SAFE_WEIGHTS_NAME]
    if len(weights) > 1:
        stem, suffix = SAFE_WEIGHTS_NAME.split(".")
        total = len(weights)
        names = [f"{stem}-{number:05d}-of-{total:05d}.{suffix}" for number in range(1, total + 1)]
        _write_index(model, dict(zip(names, weights, strict=True)), folder)
    for name, file in zip(names, weights, strict=True):
        file.rename(folder / name)
    for file in parts[0].iterdir():
        if file.name != SAFE_WEIGHTS_INDEX_NAME:
            file.rename(folder / file.name)
    for part in parts:
        shutil.rmtree(part)


def _write_index(model: PreTrainedModel, files: dict[str, Path], folder: Path) -> None:
    places: dict[str, str] = {}
    size = 0
    for name, file in files.items():
        with safe_open(file, framework="pt") as opened:
            places |= dict.fromkeys(opened.keys(), name)
        with file.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
        size += file.stat().st_size - 8 - header
    facts = {"total_parameters": model.num_parameters(), "total_size": size}
    index = {"metadata": facts, "weight_map": places}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")
