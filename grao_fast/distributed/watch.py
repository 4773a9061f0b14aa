"""Ending all processes of a run if one of them fails or dies, with one message."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch.distributed as dist

from grao_fast.distributed.links import Ending, Links, resume
from grao_fast.distributed.world import PeerFailed, World
from grao_fast.system import interruption
from grao_fast.system.errors import one_line

_TO_LEARN = 5.0  # seconds in which the reason of a failed exchange becomes known
_TO_SHOW = 1.5  # seconds that others wait for the process that shows the error
_OF_GLOO = re.compile(r"timed out waiting \d+ ?ms for \w+ operation")  # a plain RuntimeError


class ProcessDied(RuntimeError):
    """A process of the run was killed, or its machine is gone."""


class SlowProcess(RuntimeError):
    """A process kept the others waiting for longer than `ddp_timeout`."""


@contextmanager
def end_together(world: World, links: Links) -> Iterator[None]:
    """A context that ends in every process if it ends by an error in one, or if one dies.

    The process that failed raises its error, behind its rank, and the others raise PeerFailed. They
    do so a little later, as torchrun ends all processes when one has ended.
    """
    try:
        try:
            yield
            world.each(lambda: None, held=True)  # others may yet fail, and must be heard of
        except BaseException as error:
            if world.is_shared(error):
                raise
            with interruption.held():
                _end(world, links, error)
    except PeerFailed:
        with interruption.held():  # the launcher's signal, after the other's end, changes nothing
            time.sleep(_TO_SHOW)
            raise


def _end(world: World, links: Links, error: BaseException) -> NoReturn:
    """Raise an error of this process, or what it follows from in another.

    An exchange with a process that has failed or died raises RuntimeError, which others may have
    wrapped: then its reason is on the way. If none comes, the error is this process's own.
    """
    if any(isinstance(link, RuntimeError) for link in _chain(error)):
        links.wait(_TO_LEARN)
    signum = error.signum if isinstance(error, interruption.Stop) else None
    message = f"{type(error).__name__}: {one_line(error)}"
    ending = links.tell(Ending(world.rank, world.rank, message, signum=signum))
    if ending.signum is not None:
        interruption.stop(ending.signum)
    if ending.told_by != world.rank:
        raise PeerFailed(ending.rank, ending.message) from error
    if ending.died:
        raise ProcessDied(ending.message) from None
    if _is_timeout(error):
        raise SlowProcess(
            f"{world.name} waited longer than ddp_timeout for the others: one of them hangs, or "
            f"takes much longer than the others for its share{_behind(world)}"
        ) from error
    world.put_name(error, _behind(world))
    raise error


def _is_timeout(error: BaseException) -> bool:
    """Whether an exchange of torch.distributed took too long: of gloo, or another backend's."""
    message = str(error).lower()
    if isinstance(error, dist.DistError):
        return "timed out" in message or "timeout" in message
    return isinstance(error, RuntimeError) and _OF_GLOO.search(message) is not None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from."""
    seen: list[BaseException] = []  # chains may be circular
    while error is not None and not any(error is link for link in seen):
        yield error
        seen.append(error)
        error = error.__cause__ or error.__context__


def _behind(world: World) -> str:
    return "" if world.is_main else resume()  # rank 0 has logged it
