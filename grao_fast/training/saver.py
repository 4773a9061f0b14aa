"""Writing checkpoints, and saving elsewhere or in another form if that fails."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from grao_fast.distributed.world import PeerFailed, World
from grao_fast.system.errors import one_line
from grao_fast.system.visible import get_logger
from grao_fast.training.background import Background
from grao_fast.training.checkpoint import checkpoint_path, delete_old

logger = get_logger(__name__)


class SaveError(OSError):
    """Saving failed; the message says where the weights are."""


class Saver:
    """Writes the checkpoints of a run, and keeps track of the last whole one.

    Args:
        output_dir: of the run.
        write: write(path, step, bare) writes a whole checkpoint, or none; if bare, weights are
            written without the `save_pretrained` of model and tokenizer.
        hold: hold(step) copies a checkpoint into memory, and returns write(path, world), which
            writes it in a thread.
        keep: checkpoints kept; None: all.
        world: the processes of the run, all of which write; rank 0 deletes.

    checkpoint: the last one written or resumed from, if any.
    step: its step; 0 without one.
    """

    def __init__(
        self,
        output_dir: Path,
        write: Callable[[Path, int, bool], None],
        hold: Callable[[int], Callable[[Path, World], None]],
        *,
        keep: int | None,
        world: World,
    ) -> None:
        self.output_dir, self._write, self._keep, self._world = output_dir, write, keep, world
        self.checkpoint: Path | None = None
        self.step = 0
        self._hold, self._background = hold, Background(world)

    def resumed(self, checkpoint: Path, step: int) -> None:
        """Record the checkpoint that the run resumes from."""
        self.checkpoint, self.step = checkpoint, step
        if checkpoint.resolve().parent == self.output_dir.resolve():
            self._delete_old(checkpoint)  # left over if a run was killed

    def save(self, step: int) -> Path:
        """Write the checkpoint of a step, and delete old ones."""
        self._save(checkpoint_path(self.output_dir, step), step)
        self._delete_old(self.checkpoint)
        return self.checkpoint

    def start(self, step: int) -> None:
        """Copy the checkpoint of a step, and write it in a thread; `finish` must come before."""
        write = self._hold(step)
        path = checkpoint_path(self.output_dir, step)
        self._background.start(step, partial(write, path))

    @property
    def in_flight(self) -> int | None:
        """The step whose checkpoint a thread writes."""
        return self._background.name

    def finish(self) -> Path:
        """Wait for the checkpoint in flight, and delete old ones. Raises what the thread raised."""
        step = self._background.name
        assert step is not None
        self._background.finish()
        self.checkpoint, self.step = checkpoint_path(self.output_dir, step), step
        self._delete_old(self.checkpoint)
        return self.checkpoint

    def end_flight(self) -> None:
        """Wait for the checkpoint in flight; a failure is logged, as the run is ending."""
        step = self.in_flight
        try:
            self.finish()
        except (Exception, PeerFailed) as error:  # of any kind: of a disk, of a library
            if not self._world.is_shared(error):
                raise
            _report(f"step {step} could not be saved in {self.output_dir}", error)

    def rescue(self, step: int) -> None:
        """Write the checkpoint of a step in any way that works.

        It goes to output_dir, bare if a library fails, else to a new temporary folder. Failures are
        logged, not raised, since the run is ending with another error.
        """
        if self._rescued_in(self.output_dir, step):
            self._delete_old(checkpoint_path(self.output_dir, step))
            return
        if self._world.local_size < self._world.size:  # no temporary folder is on all machines
            return
        try:
            elsewhere = self._world.main(
                lambda: Path(tempfile.mkdtemp(prefix="grao-fast-rescued-")), held=True
            )
        except (OSError, PeerFailed) as error:
            _report(f"step {step} could not be saved among temporary files", error)
            return
        if not self._rescued_in(elsewhere, step):
            self._world.main(elsewhere.rmdir, held=True)

    def where(self) -> str | None:
        """How to resume from the last checkpoint, in words; None without one."""
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
            # of any kind: of a disk, of a library, of a model's own
            except (Exception, PeerFailed) as error:
                if not self._world.is_shared(error):
                    raise
                _report(f"step {step} could not be saved in {folder}", error)
                if any(self._world.gather(isinstance(error, OSError))):
                    return False  # a disk error, which bare weights would meet too
        return False

    def _delete_old(self, newest: Path) -> None:
        self._world.main(lambda: delete_old(newest, self._keep), held=True)

    def _save(self, path: Path, step: int, *, bare: bool = False) -> None:
        self._write(path, step, bare)
        self.checkpoint, self.step = path, step


def _report(what: str, error: BaseException) -> None:
    """Log an error, in the process that it came from."""
    if not isinstance(error, PeerFailed):
        logger.error("%s: %s", what, one_line(error))
