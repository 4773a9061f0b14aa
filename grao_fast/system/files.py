"""Writes files and folders atomically: whenever the process dies, they are whole or absent.

Contents are written under a temporary name in the same folder, flushed to disk, and renamed at the
end; a file or folder that is replaced or deleted is renamed first. All temporary names begin with
`.grao-fast-`, so that the next run can recognise and delete what a killed run has left. A folder
contains a manifest with the size and SHA-256 sum of each of its files.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from grao_fast.system.errors import UserError
from grao_fast.system.visible import get_logger

logger = get_logger(__name__)

MANIFEST = "manifest.json"
NEW = ".grao-fast-new-"  # being written
_OLD = ".grao-fast-old-"  # whole; about to be replaced
_GONE = ".grao-fast-gone-"  # being deleted

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PROBE_BYTES = 1 << 16


def writable_folder(output_dir: str | Path) -> Path:
    """The absolute path of `output_dir`, which is made if need be and proved to be writable.

    It is absolute since a reward that runs code may change the working directory.
    """
    output = Path(output_dir).expanduser()
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write to output_dir {str(output)!r}: {error.strerror}; choose another folder"
        ) from error
    return output.absolute()


def write_file(path: Path, text: str) -> None:
    """Write a text file atomically; if that fails, an existing file is unchanged."""
    # backslashreplace turns a lone surrogate into JSON's escape for it
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically; if that fails, an existing file is unchanged."""
    beside = path.with_name(NEW + path.name)
    with named_when_full(beside, path):
        beside.write_bytes(data)
        _flush(beside)
        beside.replace(path)
        _flush(path.parent)


def begin_folder(path: Path) -> Path:
    """Make the empty folder that `finish_folder` renames to `path`; returns it."""
    clear_left_overs(path.parent)
    new = path.with_name(NEW + path.name)
    with named_when_full(new, path):
        new.mkdir(parents=True)
    return new


def contents(folder: Path) -> list[str]:
    """The files of a folder and of those within it, by their paths in it, in order."""
    return [file.relative_to(folder).as_posix() for file in _files(folder)]


def describe(file: Path) -> dict[str, Any]:
    """Flush a file to disk; returns its entry in a manifest."""
    _flush(file)
    return {"bytes": file.stat().st_size, "sha256": _sha256(file)}


def finish_folder(path: Path, described: dict[str, dict[str, Any]]) -> None:
    """Add a manifest to the folder of `begin_folder`, and rename it to `path`.

    described: what `describe` says of each of its files.
    """
    new, old = path.with_name(NEW + path.name), path.with_name(_OLD + path.name)
    with named_when_full(new, path):
        _seal(new, described)
    if os.path.lexists(path):  # at every moment, a whole folder has one of the two names
        os.rename(path, old)
    os.rename(new, path)
    _flush(path.parent)
    delete(old)


def clear_left_overs(folder: Path) -> None:
    """Undo or complete what a killed process began in a folder; other files are left alone."""
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
    """Delete a file or folder, if it exists, so that it is never seen half deleted.

    If it cannot be deleted now, as on NFS while one of its files is open, it keeps a temporary name
    until `clear_left_overs` deletes it.
    """
    if not os.path.lexists(path):
        return
    names = (path.with_name(f"{_GONE}{number}-{path.name}") for number in count())
    gone = next(name for name in names if not os.path.lexists(name))
    os.rename(path, gone)
    _delete_gone(gone)


def _delete_gone(gone: Path) -> None:
    try:
        remove(gone)
    except OSError as error:
        logger.warning(
            "%s cannot be deleted (%s): the next save will delete it",
            gone, error.strerror,
        )  # fmt: skip


def verify_folder(path: Path) -> None:
    """Raise UserError, with the reason, unless a folder's files match its manifest."""
    for name, (size, digest) in _read_manifest(path).items():
        file = path / name
        try:
            if not file.is_file():
                raise UserError(f"{name} is {'not a file' if file.exists() else 'missing'}")
            if file.stat().st_size != size or _sha256(file) != digest:
                raise UserError(f"{name} differs from its {MANIFEST}")
        except OSError as error:
            raise UserError(f"{name} cannot be read ({error.strerror})") from error


def sealed_files(path: Path) -> set[str]:
    """Return the names in a folder's manifest. Raises UserError if it cannot be read."""
    return set(_read_manifest(path))


@contextmanager
def named_when_full(beside: Path, path: Path) -> Iterator[None]:
    """Raise errors of any library that come from a full disk as an OSError that says so.

    Args:
        beside: the file or folder being written; it is deleted if that fails.
        path: its final name, for the message.

    Raises:
        OSError: instead of an error caused by a full disk, a quota or a limit on file sizes.
    """
    try:
        yield
    except BaseException as error:
        full = why_full(error, beside, path)
        remove(beside)
        if full is None:
            raise
        raise full.error() from error


@dataclass(frozen=True)
class Full:
    """A disk, a quota or a limit that was met while a file was written.

    reason: the system's message.
    name: of the file.
    folder: where it was to be.
    """

    reason: str
    name: str
    folder: Path

    def error(self) -> OSError:
        """The error to raise, once what was written has been removed."""
        free = shutil.disk_usage(self.folder).free
        return OSError(
            f"{self.reason} while {self.name} was written in {str(self.folder)!r} "
            f"({free / 2**20:.1f} MiB are free without it): make room; what was saved before is "
            "intact"
        )


def why_full(error: BaseException, beside: Path, path: Path) -> Full | None:
    """Whether an error comes from a full disk; arguments as of `named_when_full`."""
    reason, name = _why_full(error), path.name
    if reason is None and isinstance(error, Exception):
        reason = _refusal_of_more(beside.parent)
        name += _last_written(beside)
    return None if reason is None else Full(reason, name, path.parent)


def _why_full(error: BaseException) -> str | None:
    """Return the system's message for a full disk if an error, or a cause of it, has one."""
    link: BaseException | None = error
    while link is not None:
        for code in _FULL:
            if getattr(link, "errno", None) == code or os.strerror(code) in str(link):
                return os.strerror(code)
        link = link.__cause__ or link.__context__
    return None


def _refusal_of_more(folder: Path) -> str | None:
    """Return the message for a full disk if it takes no more data; PyTorch's errors do not say."""
    probe = folder / f"{NEW}probe"
    try:
        with probe.open("wb", buffering=0) as file:
            file.write(bytes(_PROBE_BYTES))
            os.fsync(file.fileno())
    except OSError as refusal:
        return os.strerror(refusal.errno) if refusal.errno in _FULL else None
    finally:
        remove(probe)
    return None


def _last_written(folder: Path) -> str:
    """The file that was written last, as a suffix to the name of its folder."""
    last = max(_files(folder), key=lambda file: file.stat().st_mtime_ns, default=None)
    return "" if last is None else f"/{last.relative_to(folder).as_posix()}"


def _seal(folder: Path, described: dict[str, dict[str, Any]]) -> None:
    (folder / MANIFEST).write_text(json.dumps({"files": described}, indent=1))
    _flush(folder / MANIFEST)
    for inner in sorted(path for path in folder.rglob("*") if path.is_dir()):
        _flush(inner)
    _flush(folder)


def _read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Return the size and digest of every file, by its path in the folder."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        listed = {name: (facts["bytes"], facts["sha256"]) for name, facts in files.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"it has no readable {MANIFEST}") from error
    for name in listed:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"its {MANIFEST} names a file outside it, {name!r}")
    return listed


def remove(path: Path) -> None:
    """Delete a file or folder that has a temporary name, if it exists."""
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
