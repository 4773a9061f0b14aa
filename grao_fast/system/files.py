"""Files and folders that are whole or not there, whatever moment the process dies at.

What is being written has a name of its own beside the one it will have, is flushed to disk, and is
renamed last; what gives way, or is deleted, is renamed first. All these names begin with
`.grao-fast-`, so that what a killed run leaves is known from what is the user's, and is cleared by
the next one. A folder is sealed by a manifest with the size and SHA-256 sum of every file in it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from grao_fast.system.visible import get_logger

logger = get_logger(__name__)

MANIFEST = "manifest.json"
NEW = ".grao-fast-new-"  # being written
_OLD = ".grao-fast-old-"  # whole; gives way to what replaces it
_GONE = ".grao-fast-gone-"  # being deleted

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PROBE_BYTES = 1 << 16


def write_file(path: Path, text: str) -> None:
    """Write a text file, or leave the one that is there."""
    beside = path.with_name(NEW + path.name)
    with named_when_full(beside, path):
        # a lone surrogate becomes JSON's own escape for it
        with beside.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
        _flush(beside)
        beside.replace(path)
        _flush(path.parent)


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Call `fill` on an empty folder, seal it with a manifest, and rename it to `path`.

    Raises:
        OSError: there is no room for it, which names the file and the room there is.
    """
    clear_left_overs(path.parent)
    new, old = path.with_name(NEW + path.name), path.with_name(_OLD + path.name)
    with named_when_full(new, path):
        new.mkdir(parents=True)
        fill(new)
        _seal(new)
    if os.path.lexists(path):  # never without a whole folder, under one name or the other
        os.rename(path, old)
    os.rename(new, path)
    _flush(path.parent)
    delete(old)


def clear_left_overs(folder: Path) -> None:
    """Undo or finish what a killed process was at in a folder; what is not its own stays."""
    for gone in list(folder.glob(f"{_GONE}*")):
        _delete_gone(gone)
    for old in list(folder.glob(f"{_OLD}*")):
        path = old.with_name(old.name.removeprefix(_OLD))
        if not os.path.lexists(path):  # killed between the two renames
            os.rename(old, path)
    for prefix in (NEW, _OLD):
        for left_over in list(folder.glob(f"{prefix}*")):
            delete(left_over)


def delete(path: Path) -> None:
    """Delete a file or folder, where there is one, without a moment at which half of it is left.

    What cannot be deleted now, as NFS cannot delete the folder of a file that is open, keeps a name
    of its own until `clear_left_overs` can.
    """
    if not os.path.lexists(path):
        return
    names = (path.with_name(f"{_GONE}{number}-{path.name}") for number in count())
    gone = next(name for name in names if not os.path.lexists(name))
    os.rename(path, gone)
    _delete_gone(gone)


def _delete_gone(gone: Path) -> None:
    try:
        _remove(gone)
    except OSError as error:
        logger.warning(
            "%s cannot be deleted (%s), and is left for the next save to delete",
            gone, error.strerror,
        )  # fmt: skip


def verify_folder(path: Path) -> None:
    """Raise ValueError, which says why, unless a folder holds what its manifest says."""
    for name, (size, digest) in _read_manifest(path).items():
        file = path / name
        try:
            if not file.is_file():
                raise ValueError(f"{name} is {'no file' if file.exists() else 'missing'}")
            if file.stat().st_size != size or _sha256(file) != digest:
                raise ValueError(f"{name} differs from its {MANIFEST}")
        except OSError as error:
            raise ValueError(f"{name} cannot be read ({error.strerror})") from error


def sealed_files(path: Path) -> set[str]:
    """The names in a folder's manifest; ValueError where there is none that can be read."""
    return set(_read_manifest(path))


@contextmanager
def named_when_full(beside: Path, path: Path) -> Iterator[None]:
    """Say so where writing fails for want of room, whichever library was at it.

    Args:
        beside: what is written; a half of it is removed.
        path: its name when it is whole.

    Raises:
        OSError: in place of an error that came of a full disk, a quota or a limit of size.
    """
    try:
        yield
    except BaseException as error:
        reason, name = _why_full(error), path.name
        if reason is None and isinstance(error, Exception):
            reason = _refusal_of_more(beside.parent)
            name += _last_written(beside)
        _remove(beside)
        if reason is None:
            raise
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            f"{reason} while {name} was written in {str(path.parent)!r} ({free / 2**20:.1f} MiB "
            "are free without it): what was saved before is whole; make room"
        ) from error


def _why_full(error: BaseException) -> str | None:
    """The system's words for want of room, where an error or what it came of has them."""
    link: BaseException | None = error
    while link is not None:
        for code in _FULL:
            if getattr(link, "errno", None) == code or os.strerror(code) in str(link):
                return os.strerror(code)
        link = link.__cause__ or link.__context__
    return None


def _refusal_of_more(folder: Path) -> str | None:
    """The same for errors that do not say, as PyTorch's: whether the disk takes a little more."""
    probe = folder / f"{NEW}probe"
    try:
        with probe.open("wb", buffering=0) as file:
            file.write(bytes(_PROBE_BYTES))
            os.fsync(file.fileno())
    except OSError as refusal:
        return os.strerror(refusal.errno) if refusal.errno in _FULL else None
    finally:
        _remove(probe)
    return None


def _last_written(folder: Path) -> str:
    """The file that was being written, as what follows a folder's name."""
    last = max(_files(folder), key=lambda file: file.stat().st_mtime_ns, default=None)
    return "" if last is None else f"/{last.relative_to(folder).as_posix()}"


def _seal(folder: Path) -> None:
    files = {}
    for file in _files(folder):
        _flush(file)
        size, digest = file.stat().st_size, _sha256(file)
        files[file.relative_to(folder).as_posix()] = {"bytes": size, "sha256": digest}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1))
    _flush(folder / MANIFEST)
    for inner in sorted(path for path in folder.rglob("*") if path.is_dir()):
        _flush(inner)
    _flush(folder)


def _read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and digest of every file, by its name below the folder."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        listed = {name: (facts["bytes"], facts["sha256"]) for name, facts in files.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it has no readable {MANIFEST}") from error
    for name in listed:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"its {MANIFEST} names a file outside it, {name!r}")
    return listed


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
