"""Writing a folder by all processes of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from grao_fast.distributed.world import PeerFailed, World
from grao_fast.system.files import (
    begin_folder,
    contents,
    describe,
    finish_folder,
    remove,
    why_full,
)


def write_folder(path: Path, fill: Callable[[Path], None], world: World) -> None:
    """Call `fill` on an empty folder, add a manifest, and rename the folder to `path`.

    Every process must call it. The folder must be on a file system that all of them share.

    fill: called in every process with the empty folder. It may exchange tensors, so it must itself
        raise in all processes or in none: it writes in `World.each`.

    Raises:
        OSError: the disk is full; the message names the file and the free space.
    """
    new = world.main(lambda: begin_folder(path), held=True)
    try:
        fill(new)
        described = _described(new, world)
    except BaseException as error:
        full = None if isinstance(error, PeerFailed) else why_full(error, new, path)
        if world.is_shared(error):  # else the next folder's beginning removes this one
            world.main(lambda: remove(new), held=True)
        if full is None:
            raise
        full_error = full.error()
        if world.size > 1:
            world.put_name(full_error)
        raise full_error from error
    world.main(lambda: finish_folder(path, described), held=True)


def _described(folder: Path, world: World) -> dict[str, dict[str, Any]]:
    """What `describe` says of each file, of which every process reads its share."""
    names = world.main(lambda: contents(folder), held=True)
    facts = world.map(lambda own: [describe(folder / name) for name in own], names, held=True)
    return dict(zip(names, facts, strict=True))
