"""Looks at the folder of a run, and at the checkpoint that it would resume from; writes nothing."""

from __future__ import annotations

import os
from pathlib import Path

from grao_fast.checkup.findings import Finding
from grao_fast.system.errors import UserError, one_line
from grao_fast.training.checkpoint import ResumeFrom, choose_checkpoint


def look_at(output_dir: str | Path, resume_from: ResumeFrom) -> tuple[Finding, Path | None]:
    """Return whether a run could write to output_dir, and the checkpoint that it resumes from."""
    output = Path(output_dir).expanduser()
    try:
        _check_writable(output)
        checkpoint = choose_checkpoint(output, resume_from)
    except UserError as error:
        return Finding("run", "output_dir", "failure", one_line(error)), None
    value = f"{str(output)!r} " + ("can be written to" if output.exists() else "can be made")
    if checkpoint is not None:
        value += f"; the run resumes from {checkpoint.name}"
    return Finding("run", "output_dir", "ok", value), checkpoint


def _check_writable(output: Path) -> None:
    there = output.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise _not_written_to(output, f"{str(there)!r} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise _not_written_to(output, f"no permission in {str(there)!r}")


def _not_written_to(output: Path, reason: str) -> UserError:
    return UserError(f"cannot write to output_dir {str(output)!r}: {reason}; choose another folder")
