"""The checkpoints in the folder of a run, and the choice of the one to resume from.

A checkpoint is a sealed folder (see `grao_fast.system.files`) with a state.json. One whose files
differ from its manifest is torn: it is never loaded, and the one before it is used instead.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from grao_fast.system.errors import UserError
from grao_fast.system.files import delete, sealed_files, verify_folder
from grao_fast.system.visible import get_logger

logger = get_logger(__name__)

STATE = "state.json"
OPTIMIZER = "optimizer"
_MOMENTS_INDEX = f"{OPTIMIZER}/.metadata"  # of torch.distributed.checkpoint
FORMAT = 3  # of a checkpoint's files
FINAL = "final"
_NAME = re.compile(r"checkpoint-(\d+)")
_RESULTS = re.compile(r"(metrics|completions|eval-\d+)\.jsonl|(summary|baseline)\.json")

ResumeFrom = str | Path | bool | None


class CheckpointError(UserError):
    """A checkpoint that is missing, torn or of another run."""


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """The folder of the checkpoint written after `step` steps."""
    return output_dir / f"checkpoint-{step}"


def verify(path: Path) -> None:
    """Raise CheckpointError unless a checkpoint is whole and of the step that its name says."""
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {str(path)!r} does not exist")
    try:
        _check_named(path, STATE)
        verify_folder(path)
        state = read_state(path)
        if state.get("format") == FORMAT:  # those of other formats are whole, and refused later
            _check_named(path, _MOMENTS_INDEX)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"checkpoint {str(path)!r} is torn: {error}") from error
    step = state["step"]
    if _NAME.fullmatch(path.name) and step != step_of(path):
        raise CheckpointError(f"checkpoint {str(path)!r} is torn: its {STATE} is of step {step}")


def _check_named(path: Path, file: str) -> None:
    if file not in sealed_files(path):
        raise UserError(f"its manifest names no {file}")


def read_state(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint's state.json, which name its step at least."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {str(path)!r} is torn: no {STATE} to read") from error
    step = state.get("step") if isinstance(state, dict) else None
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise CheckpointError(f"checkpoint {str(path)!r} is torn: its {STATE} names no step")
    return state


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders, the latest step first; not verified."""
    found = [path for path in output_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def choose_checkpoint(output_dir: Path, resume_from: ResumeFrom) -> Path | None:
    """Choose the checkpoint that a run in `output_dir` resumes from; None if it starts anew.

    Args:
        resume_from: a checkpoint's folder; True for the latest whole one in output_dir; "auto" for
            that one or, if there is none, to start anew; None or False to start anew.

    Raises:
        CheckpointError: the folder given is missing or torn, there is no whole checkpoint, or
            results would be lost: those of another run, or of later steps than it begins at.
    """
    for name in ("model.safetensors", "model.safetensors.index.json", "adapter_config.json"):
        if (output_dir / name).exists():
            raise CheckpointError(
                f"output_dir {str(output_dir)!r} holds a model ({name}), whose config.json would "
                "be overwritten: choose another"
            )
    if resume_from is None or resume_from is False:
        check_fresh(output_dir)
        return None
    if resume_from is True or resume_from == "auto":
        checkpoint = _latest_whole(output_dir)
        if checkpoint is None and resume_from is True:
            raise CheckpointError(f"no whole checkpoint in {str(output_dir)!r} to resume from")
        if checkpoint is None and (output_dir / FINAL).exists():
            raise CheckpointError(
                f"{str(output_dir)!r} holds the {FINAL}/ of a run that ended without checkpoints: "
                "take it, delete it, or choose another output_dir"
            )
        return checkpoint
    if not isinstance(resume_from, (str, Path)) or not str(resume_from):
        raise UserError(
            'resume_from_checkpoint takes a checkpoint\'s folder, True, "auto" or None, got '
            f"{resume_from!r}"
        )
    path = Path(resume_from).expanduser()
    verify(path)
    if path.resolve().parent != output_dir.resolve():
        check_fresh(output_dir)
    for later in list_checkpoints(output_dir):
        if step_of(later) > read_state(path)["step"] and _is_whole(later):
            raise CheckpointError(
                f"{str(output_dir)!r} already holds {later.name}: resume from it "
                "(resume_from_checkpoint=True), delete it, or choose another output_dir"
            )
    return path


def check_fresh(output_dir: Path) -> None:
    """Refuse a folder with a run's results, which another run would overwrite."""
    names = [path.name for path in list_checkpoints(output_dir)]
    names += [FINAL] if (output_dir / FINAL).exists() else []
    for path in sorted(output_dir.iterdir() if output_dir.exists() else ()):
        if _RESULTS.fullmatch(path.name) and path.is_file() and path.stat().st_size:
            names.append(path.name)
    if names:
        raise CheckpointError(
            f"{str(output_dir)!r} already holds {names[0]}, of another run: go on with that run "
            '(resume_from_checkpoint=True, or "auto" to begin where there is no checkpoint), '
            "delete its results, or choose another output_dir"
        )


def delete_old(newest: Path, keep: int | None) -> None:
    """Delete all but `newest` and the keep - 1 checkpoints before it; None keeps all."""
    if keep is None:
        return
    earlier = [p for p in list_checkpoints(newest.parent) if step_of(p) < step_of(newest)]
    for path in earlier[keep - 1 :]:
        delete(path)


def _latest_whole(output_dir: Path) -> Path | None:
    return next(filter(_is_whole, list_checkpoints(output_dir)), None)


def _is_whole(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointError as error:
        logger.warning("%s; it is passed over", error)
        return False
    return True
