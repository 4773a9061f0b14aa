"""Sampling the rollouts of later steps while the policy learns from an earlier one.

With `ahead=N`, the rollout of step s begins to be sampled when the sampler takes over the weights
after s - N steps (after none for the first N + 1 rollouts), in a thread. The policy learns from it
after s steps, so that it is at most N steps stale.

With N = 1 a hand-over of weights waits for the one rollout in flight, so that every rollout is
sampled with one set of weights. If larger N waited too, the next hand-over would wait for the
rollout that was begun last, and nothing would be gained over N = 1. There the sampler takes over
weights while it samples (`ConcurrentSampler`), and the rest of every completion in flight comes
from the newer weights. Either way the log-prob of each token is that of the weights which sampled
it, so its importance weight is exact.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass

from grao_fast.distributed.world import World
from grao_fast.rewards.early import EarlyCalls
from grao_fast.sampling import Completion, ConcurrentSampler, Sampler
from grao_fast.system.threads import DaemonExecutor, in_thread
from grao_fast.system.visible import get_logger

logger = get_logger(__name__)

_PATIENCE = 10.0  # seconds for threads to end when their rollouts are given up
_ABORT_EVERY = 0.5  # seconds; a request may reach the sampler just after an abort


@dataclass(frozen=True)
class Share:
    """The completions of this process's share of a step's prompts.

    early: the calls that score each group by itself, all begun; None: no reward is called so.
    """

    completions: list[list[Completion]]
    early: EarlyCalls | None


@dataclass(frozen=True)
class Sampled:
    """This process's share of a step's prompts, sampled ahead.

    staleness: steps of the policy since the sampling began.
    seconds: that the sampling took.
    waited: seconds that the run waited for it.
    """

    share: Share
    staleness: int
    seconds: float
    waited: float


@dataclass
class _InFlight:
    """A rollout that has begun. The future gives this process's share and the seconds it took.

    began: steps that the sampler's weights had then.
    """

    began: int
    future: Future[tuple[Share, float]]
    waited: float = 0.0

    def finish(self) -> tuple[Share, float]:
        started = time.perf_counter()
        try:
            return self.future.result()
        finally:
            self.waited += time.perf_counter() - started


class SamplingAhead:
    """The rollouts in flight of a run; there are none with `ahead=0`.

    Args:
        sample: sample(step) returns this process's share of a step's prompts. It is
            called in threads, which must not touch the policy.
        sampler: that it samples with; where anything is sampled ahead, a ConcurrentSampler.
        ahead: most steps between the weights of a rollout's first tokens and the policy that learns
            from it.
        steps: of the run; nothing is sampled for later ones.
        world: the processes of the run, which wait for each other's shares.
    """

    def __init__(
        self,
        sample: Callable[[int], Share],
        sampler: Sampler,
        *,
        ahead: int,
        steps: int,
        world: World,
    ) -> None:
        self._sample, self._sampler, self._ahead, self._steps = sample, sampler, ahead, steps
        self._world = world
        self._in_flight: dict[int, _InFlight] = {}
        self._threads = DaemonExecutor(ahead) if ahead else None

    def begin(self, done: int) -> None:
        """Begin the rollouts that are due when the sampler has the weights after `done` steps."""
        if self._threads is None:
            return
        for step in range(done, min(done + self._ahead + 1, self._steps)):
            if step not in self._in_flight:
                self._in_flight[step] = _InFlight(done, self._threads.submit(self._timed, step))

    def settle(self) -> None:
        """Wait until the sampler may take over other weights.

        Raises the error of a rollout in flight that has failed.
        """
        if self._ahead == 1:
            self._world.together(lambda: [each.finish() for each in self._in_flight.values()])

    def take(self, step: int) -> Sampled | None:
        """Wait for the rollout of a step; None if nothing is sampled ahead.

        Raises what `sample` raised.
        """
        if self._threads is None:
            return None
        rollout = self._in_flight[step]
        share, seconds = self._world.together(rollout.finish)
        del self._in_flight[step]
        return Sampled(share, step - rollout.began, seconds, rollout.waited)

    def close(self) -> None:
        """Give up the rollouts in flight, and wait until their threads have ended."""
        if self._threads is None:
            return
        assert isinstance(self._sampler, ConcurrentSampler), "as the configuration demands"
        self._threads.shutdown()
        for rollout in self._in_flight.values():
            rollout.future.add_done_callback(_abandon)
        running = {r.future for r in self._in_flight.values() if not r.future.cancel()}
        deadline = time.monotonic() + _PATIENCE
        while (running := _unfinished(running)) and time.monotonic() < deadline:
            # in a thread, whose error is dropped: a server that is gone may not answer
            in_thread(self._sampler.abort)
            wait(running, timeout=_ABORT_EVERY)
        if running:
            logger.warning(
                "%d rollouts are still being sampled; their threads end with the process",
                len(running),
            )

    def _timed(self, step: int) -> tuple[Share, float]:
        started = time.perf_counter()
        return self._sample(step), time.perf_counter() - started


def _abandon(rollout: Future[tuple[Share, float]]) -> None:
    """Give up what scores a rollout that nobody takes."""
    if not rollout.cancelled() and rollout.exception() is None:
        early = rollout.result()[0].early
        if early is not None:
            early.abandon()


def _unfinished(futures: Iterable[Future]) -> set[Future]:
    return {future for future in futures if not future.done()}
