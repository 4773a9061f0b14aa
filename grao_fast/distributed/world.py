"""`World`: the processes of a run, and the only exchanges between them besides those of FSDP.

Every process holds the whole rollout (a few MB) and plans the step from it alone, so that no
process has to ask another how many micro-batches there are.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from grao_fast.system import interruption
from grao_fast.system.errors import one_line

R = TypeVar("R")
T = TypeVar("T")


class PeerFailed(SystemExit):
    """Raised in every process but the one whose error ends the run, which raises that error.

    Uncaught, it ends its process silently with status 1, so that the console shows one error.

    rank: of the process that failed.
    """

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(1)
        self.rank, self.message = rank, message

    def __str__(self) -> str:
        return f"rank {self.rank} failed: {self.message}"


class _Failure(NamedTuple):
    """What one process tells the others about an exception.

    signum: of the signal that raised it; None for an error.
    """

    message: str
    signum: int | None


class World:
    """The processes of a run. `World()` is a single process.

    rank, size: of this process, and the number of processes.
    local_rank, local_size: the same within this machine.
    closing: what several processes do when they exchange nothing more, before they leave the
        default group of torch.distributed, if it is the run's.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        *,
        local_rank: int = 0,
        local_size: int = 1,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.rank, self.size = rank, size
        self.local_rank, self.local_size = local_rank, local_size
        self._group = group  # of gloo: objects and small numbers, on the CPU
        self._shared: list[BaseException] = []  # raised in all processes
        self.closing = ExitStack()

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The processes' group for exchanges on the CPU; None for a single process."""
        return self._group

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and the console of the run."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """This process's name in messages."""
        return f"rank {self.rank} of {self.size}"

    def twin(self) -> World:
        """The same processes with connections of their own, for a thread; all must ask for it."""
        group = None if self.size == 1 else dist.new_group(backend="gloo")
        return World(
            self.rank,
            self.size,
            local_rank=self.local_rank,
            local_size=self.local_size,
            group=group,
        )

    def each(self, attempt: Callable[[], R], *, held: bool = False) -> list[R]:
        """Call `attempt` in every process; returns the results of all, by rank.

        If it raises in any process, no process returns: the first that failed raises its own
        error, and the others `PeerFailed`. A signal that has come to one stops all.

        Args:
            held: whether the call cannot be repeated, so that signals wait for its end.
        """
        stops = nullcontext() if held else interruption.at_once()
        if self.size == 1:
            with stops:
                return [attempt()]
        error = None
        try:
            with stops:
                result = attempt()
            sent = pickle.dumps((result, None))
        except BaseException as caught:  # of any kind: the others must not wait for this process
            error = caught
            sent = pickle.dumps((None, _failure(caught)))
        received = [b""] * self.size
        dist.all_gather_object(received, sent, group=self._group)
        outcomes: list[tuple[R, _Failure | None]] = [pickle.loads(each) for each in received]
        failures = [(rank, f) for rank, (_, f) in enumerate(outcomes) if f is not None]
        if not failures:
            return [value for value, _ in outcomes]
        self._raise(failures, error)

    def gather(self, value: R) -> list[R]:
        """The values of all processes, by rank. Signals wait."""
        return self.each(lambda: value, held=True)

    def together(self, attempt: Callable[[], R], *, held: bool = False) -> R:
        """Call `attempt` in every process; returns its own result, which is not exchanged."""
        results: list[R] = []
        self.each(lambda: results.append(attempt()), held=held)
        return results[0]

    def main(self, attempt: Callable[[], R], *, held: bool = False) -> R:
        """Call `attempt` in rank 0 alone; returns its result in every process."""
        results = self.each(lambda: attempt() if self.is_main else None, held=held)
        return results[0]  # pyright: ignore[reportReturnType]

    def map(
        self,
        work: Callable[[Sequence[T]], Sequence[R]],
        items: Sequence[T],
        *,
        held: bool = False,
    ) -> list[R]:
        """Share out `items`, call `work` on each process's share, and join the results in order."""
        if self.size == 1:
            return list(work(items))
        parts = self.each(lambda: work(self.share(items)), held=held)
        joined: list[R | None] = [None] * len(items)
        for rank, part in enumerate(parts):
            joined[rank :: self.size] = part
        return joined  # pyright: ignore[reportReturnType]

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's items of a list that every process has."""
        return items[self.rank :: self.size]

    def check(self) -> None:
        """Raise Stop in every process if a signal has come to any of them."""
        if self.size > 1:
            signum = torch.tensor(interruption.pending() or 0)
            dist.all_reduce(signum, dist.ReduceOp.MAX, group=self._group)
            if int(signum):
                self._stop(int(signum))

    def team(self, size: int) -> World:
        """This process with its neighbours, `size` in all; every process must call it."""
        if size == 1:
            return World()
        starts = range(0, self.size, size)
        groups = [dist.new_group(range(start, start + size), backend="gloo") for start in starts]
        return World(self.rank % size, size, group=groups[self.rank // size])

    def least(self, value: float) -> float:
        """The least of the values of all processes."""
        return min(self.gather(value))

    def at_once(self) -> AbstractContextManager[None]:
        """`interruption.at_once` for work that exchanges data with the other processes.

        With several processes, signals wait for the next `each` or `check`: a process that left
        an exchange would leave the others waiting in it.
        """
        return interruption.at_once() if self.size == 1 else nullcontext()

    def is_shared(self, error: BaseException | None) -> bool:
        """Whether all processes have raised for this error, and can still work together."""
        while error is not None and not any(error is shared for shared in self._shared):
            error = error.__cause__ or error.__context__
        return self.size == 1 or error is not None

    def put_name(self, error: BaseException, behind: str = "") -> None:
        """Put this process's name before the message of an error, and `behind` behind it."""
        if isinstance(error, OSError) and error.strerror:
            error.strerror = f"{self.name}: {error.strerror}{behind}"
        elif not error.args:
            error.args = (f"{self.name}{behind}",)
        elif isinstance(error.args[0], str):
            error.args = (f"{self.name}: {error.args[0]}{behind}", *error.args[1:])

    def _raise(self, failures: list[tuple[int, _Failure]], own: BaseException | None) -> None:
        """Raise what `each` raises."""
        signals = [failure.signum for _, failure in failures if failure.signum is not None]
        if signals:
            self._stop(signals[0])
        rank, failure = failures[0]
        if rank != self.rank:
            own = PeerFailed(rank, failure.message)
        else:
            assert own is not None
            self.put_name(own)
        self._shared.append(own)
        raise own

    def _stop(self, signum: int) -> None:
        """Raise Stop, as if the signal had come to this process."""
        try:
            interruption.stop(signum)
        except interruption.Stop as stop:
            self._shared.append(stop)
            raise


def _failure(error: BaseException) -> _Failure:
    if isinstance(error, interruption.Stop):
        return _Failure(one_line(error), error.signum)
    kind = type(error).__name__
    return _Failure(f"{kind}: {one_line(error)}", None)
