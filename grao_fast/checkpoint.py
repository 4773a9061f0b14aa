"""Checkpoints that are whole or not there.

A checkpoint is written into a folder beside its final name, every file is flushed to disk, a
manifest with sizes and SHA-256 sums is written last, and only then is the folder renamed. A process
killed at any moment leaves the earlier checkpoints and at most a `.partial` folder, which the next
write removes. A folder whose files do not match its manifest is never loaded.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_PARTIAL = ".partial"
_REPLACED = ".replaced"
_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(ValueError):
    """A checkpoint that is missing, torn or of another run."""


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """The folder of the checkpoint written after `step` steps."""
    return output_dir / f"checkpoint-{step}"


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Call `fill` on an empty folder, seal it with a manifest, and rename it to `path`."""
    for left_over in path.parent.glob(f"*{_PARTIAL}"):
        shutil.rmtree(left_over)
    partial = path.with_name(path.name + _PARTIAL)
    partial.mkdir(parents=True)
    fill(partial)
    files = {}
    for file in _files(partial):
        _flush(file)
        files[str(file.relative_to(partial))] = {
            "bytes": file.stat().st_size,
            "sha256": _sha256(file),
        }
    (partial / MANIFEST).write_text(json.dumps({"files": files}, indent=1))
    _flush(partial / MANIFEST)
    _flush(partial)
    replaced = path.with_name(path.name + _REPLACED)
    if path.exists():  # never without a whole folder, under one name or the other
        os.rename(path, replaced)
    os.rename(partial, path)
    _flush(path.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def verify(path: Path) -> None:
    """Raise CheckpointError unless `path` holds exactly what its manifest says."""
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {str(path)!r} does not exist")
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"checkpoint {str(path)!r} has no readable {MANIFEST}") from error
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint {str(path)!r} is torn: {name} is missing")
        if file.stat().st_size != expected["bytes"] or _sha256(file) != expected["sha256"]:
            raise CheckpointError(
                f"checkpoint {str(path)!r} is torn: {name} differs from its manifest"
            )


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders, the latest step first; not verified."""
    found = [path for path in output_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def find_checkpoint(output_dir: Path, resume_from: str | Path | bool) -> Path:
    """The checkpoint to resume from: a path as given, or with True the latest whole one.

    Raises:
        CheckpointError: the path given is missing or torn, or there is no whole checkpoint.
    """
    if resume_from is not True:
        path = Path(str(resume_from))
        verify(path)
        return path
    for path in list_checkpoints(output_dir):
        try:
            verify(path)
            return path
        except CheckpointError as error:
            logger.warning("%s; trying the one before it", error)
    raise CheckpointError(f"no whole checkpoint in {str(output_dir)!r} to resume from")


def check_fresh(output_dir: Path, *, after_step: int) -> None:
    """Refuse a folder that holds checkpoints of later steps than this run starts at.

    They are another run's, or of another branch of this one, and would be taken for its own.
    """
    later = [path.name for path in list_checkpoints(output_dir) if step_of(path) > after_step]
    if later:
        raise CheckpointError(
            f"{str(output_dir)!r} already holds {later[0]}: resume from it "
            "(resume_from_checkpoint=True), delete it, or choose another output_dir"
        )


def delete_old(newest: Path, keep: int | None) -> None:
    """Delete all but `newest` and the keep - 1 checkpoints before it; None keeps all."""
    if keep is None:
        return
    earlier = [p for p in list_checkpoints(newest.parent) if step_of(p) < step_of(newest)]
    for path in earlier[keep - 1 :]:
        shutil.rmtree(path)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
