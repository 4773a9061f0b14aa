"""Writing and reading sharded tensors, by torch.distributed.checkpoint.

Every process writes its own shards. Any number of processes can read them, sharded in any way.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from grao_fast.distributed.world import World

TENSORS_INDEX = ".metadata"  # DCP's file that says where in a folder each tensor is


def save_tensors(tensors: Mapping[str, Tensor], folder: Path, world: World) -> None:
    """Write named tensors into a new folder; every process must call it."""

    def write() -> None:
        with _own_error(world.rank):
            writer = dcp.FileSystemWriter(folder)
            dcp.save(dict(tensors), storage_writer=writer, **_processes(world))

    world.each(write, held=True)


def load_tensors(tensors: Mapping[str, Tensor], folder: Path, world: World) -> None:
    """Read named tensors in place; every process must call it."""

    def read() -> None:
        with _own_error(world.rank):
            reader = dcp.FileSystemReader(folder)
            dcp.load(dict(tensors), storage_reader=reader, **_processes(world))

    world.each(read, held=True)


def saved_shapes(folder: Path, world: World) -> dict[str, torch.Size]:
    """The shapes of the tensors in a folder of `save_tensors`, by name."""
    saved = world.together(lambda: dcp.FileSystemReader(folder).read_metadata().state_dict_metadata)
    return {n: facts.size for n, facts in saved.items() if isinstance(facts, TensorStorageMetadata)}


def _processes(world: World) -> dict[str, Any]:
    return {"process_group": world.group, "no_dist": world.size == 1}


@contextmanager
def _own_error(rank: int) -> Iterator[None]:
    """Raise this process's own error alone: DCP raises those of all processes in every one."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*assuming the intent is to")
            yield
    except CheckpointException as error:
        own = error.failures.get(rank)
        if own is not None:
            raise own[0] from None
