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
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from grao_fast.distributed.world import World


def save_tensors(tensors: Mapping[str, Tensor], folder: Path, world: World) -> None:
    """Write named tensors into a new folder; every process must call it."""

    def write() -> None:
        with _own_error(world.rank):
            writer = FileSystemWriter(folder)
            save(dict(tensors), storage_writer=writer, **_processes(world))

    world.each(write, held=True)


def held_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in the CPU's memory for `save_tensors`, of sharded tensors this process's shards."""
    return BlockingAsyncStager(cache_staged_state_dict=False).stage(dict(tensors))


def load_tensors(tensors: Mapping[str, Tensor], folder: Path, world: World) -> None:
    """Read named tensors in place; every process must call it."""

    def read() -> None:
        with _own_error(world.rank):
            reader = FileSystemReader(folder)
            load(dict(tensors), storage_reader=reader, **_processes(world))

    world.each(read, held=True)


def saved_shapes(folder: Path, world: World) -> dict[str, torch.Size]:
    """The shapes of the tensors in a folder of `save_tensors`, by name."""
    saved = world.together(lambda: FileSystemReader(folder).read_metadata().state_dict_metadata)
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
