"""What `train` checks before it loads a model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from grao_fast.config import GRAOConfig
from grao_fast.data import Example


def check_one_process() -> None:
    """Refuse a launcher that starts several processes: each would train a model of its own."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise ValueError(
            f"grao_fast.train runs in one process, and a launcher started {processes} "
            "(WORLD_SIZE); start it with plain python"
        )


def writable_folder(output_dir: str | Path) -> Path:
    """Make `output_dir` and prove that it can be written to, before any work is lost."""
    output = Path(output_dir).expanduser()
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise ValueError(
            f"cannot write to output_dir {str(output)!r}: {error.strerror}; choose another folder"
        ) from error
    return output


def check_references(
    examples: Sequence[Example], eval_examples: Sequence[Example] | None, config: GRAOConfig
) -> None:
    """A pairwise reward compares with the reference, and every metric against it needs one."""
    for name, rows, needed in (
        ("dataset", examples, config.reward_type == "pairwise"),
        ("eval_dataset", eval_examples or [], True),
    ):
        absent = [i for i, example in enumerate(rows) if example.reference is None]
        if needed and absent:
            raise ValueError(
                f"{name}: row {absent[0]} and {len(absent) - 1} more have no reference, which "
                + (
                    'a pairwise reward compares with; leave them out or use reward_type="pointwise"'
                    if name == "dataset"
                    else "RAS compares with; leave them out"
                )
            )
