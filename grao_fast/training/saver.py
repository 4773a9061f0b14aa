"""When a run saves, and what it leaves when it cannot."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from grao_fast.system.errors import one_line
from grao_fast.system.visible import get_logger
from grao_fast.training.checkpoint import checkpoint_path, delete_old

logger = get_logger(__name__)


class SaveError(OSError):
    """A run that was done could not save its model; says where the weights are."""


class Saver:
    """Writes the checkpoints of a run, and knows which is the last that is whole.

    Args:
        output_dir: of the run.
        write: write(path, step, bare) writes a whole checkpoint, or none; bare, its weights are
            written without the model's and the tokenizer's own `save_pretrained`.
        keep: checkpoints kept; None: all.

    checkpoint: the last that was written or resumed from; None: there is none.
    step: its steps; 0 where there is none.
    """

    def __init__(
        self, output_dir: Path, write: Callable[[Path, int, bool], None], *, keep: int | None
    ) -> None:
        self.output_dir, self._write, self._keep = output_dir, write, keep
        self.checkpoint: Path | None = None
        self.step = 0

    def resumed(self, checkpoint: Path, step: int) -> None:
        """Take note of the checkpoint that the run goes on from."""
        self.checkpoint, self.step = checkpoint, step
        if checkpoint.resolve().parent == self.output_dir.resolve():
            delete_old(checkpoint, self._keep)  # which a kill may have left

    def save(self, step: int) -> Path:
        """Write the checkpoint of a step, and delete what is not kept."""
        self._save(checkpoint_path(self.output_dir, step), step)
        delete_old(self.checkpoint, self._keep)
        return self.checkpoint

    def rescue(self, step: int) -> None:
        """Write the checkpoint of a step wherever, and however, that can be done.

        In output_dir, bare where a library fails; else in a new folder among temporary files. What
        fails is said, not raised: the run is ending for a reason of its own.
        """
        if self._rescued_in(self.output_dir, step):
            delete_old(checkpoint_path(self.output_dir, step), self._keep)
            return
        try:
            elsewhere = Path(tempfile.mkdtemp(prefix="grao-fast-rescued-"))
        except OSError as error:
            logger.error(
                "step %d could not be saved among temporary files: %s", step, one_line(error)
            )
            return
        if not self._rescued_in(elsewhere, step):
            elsewhere.rmdir()

    def where(self) -> str | None:
        """How to go on from the last checkpoint, in words; None where there is none."""
        if self.checkpoint is None:
            return None
        if self.checkpoint.parent == self.output_dir:
            return f"resume_from_checkpoint=True goes on from {self.checkpoint}"
        return f"move {self.checkpoint} to {self.output_dir} to go on from it"

    def _rescued_in(self, folder: Path, step: int) -> bool:
        for bare in (False, True):
            try:
                self._save(checkpoint_path(folder, step), step, bare=bare)
                return True
            except Exception as error:  # of any kind: of a disk, of a library, of a model's own
                logger.error(
                    "step %d could not be saved in %s: %s",
                    step, folder, one_line(error),
                )  # fmt: skip
                if isinstance(error, OSError):  # of the disk: it takes bare weights no better
                    return False
        return False

    def _save(self, path: Path, step: int, *, bare: bool = False) -> None:
        self._write(path, step, bare)
        self.checkpoint, self.step = path, step
