"""Writing a folder by all processes of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from grao_fast.distributed.world import World
from grao_fast.system.files import begin_folder, finish_folder, named_when_full


def write_folder(path: Path, fill: Callable[[Path], None], world: World) -> None:
    """Write a folder as `grao_fast.system.files.write_folder` does; every process must call it.

    fill: called in every process with the empty folder. It may exchange tensors, so it must itself
        raise in all processes or in none: it writes in `World.each`.
    """
    new = world.main(lambda: begin_folder(path), held=True)
    with named_when_full(new, path):
        fill(new)
    world.main(lambda: finish_folder(path), held=True)
