"""`JointTrainer`: TRL's GRPOTrainer, whose processes end together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

from trl.trainer.grpo_trainer import GRPOTrainer

from grao_fast.distributed.links import Links
from grao_fast.distributed.watch import end_together
from grao_fast.distributed.world import PeerFailed, World
from grao_fast.system.errors import UserError
from grao_fast.system.visible import get_logger

logger = get_logger(__name__)


class JointTrainer(GRPOTrainer):
    """TRL's GRPOTrainer, which ends in all processes once it fails in one, or one dies.

    The process that failed raises its own error, and the others PeerFailed, a SystemExit of status
    1. TRL's would wait for it in their next exchange, until that times out.
    """

    _is_joint = False  # inside of `_jointly`

    @cached_property
    def _world(self) -> World:
        """The processes that train together, as accelerate has them."""
        accelerator = self.accelerator
        return World(
            accelerator.process_index,
            accelerator.num_processes,
            local_rank=accelerator.local_process_index,
        )

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train, as Transformers' Trainer does."""
        with self._jointly():
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate, as Transformers' Trainer does."""
        with self._jointly():
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> Any:
        """Predict, as Transformers' Trainer does."""
        with self._jointly():
            return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    @contextmanager
    def _jointly(self) -> Iterator[None]:
        """A context that all processes enter, and that ends in all by an error in one.

        Where they cannot be connected, it is TRL's own.
        """
        if self._is_joint or self._world.size == 1:
            yield
            return
        self._is_joint = True
        try:
            with ExitStack() as stack:
                if links := self._links(stack):
                    stack.enter_context(_own_exits())
                    stack.enter_context(end_together(self._world, links))
                yield
        finally:
            self._is_joint = False
            del self._world  # it keeps errors, and with them what their frames hold

    def _links(self, stack: ExitStack) -> Links | None:
        """The processes' connections, entered in `stack`; None: some cannot be made."""
        timeout = self.args.ddp_timeout
        links = Links(self._world, heartbeat_timeout=timeout, option="ddp_timeout")
        try:
            return stack.enter_context(links)
        except (UserError, PeerFailed) as error:
            if self._world.is_main:
                logger.warning("if one process fails, the others may wait for it: %s", error)
            return None


@contextmanager
def _own_exits() -> Iterator[None]:
    """A context that a KeyboardInterrupt or SystemExit of this process leaves as it was raised.

    `end_together` replaces it by PeerFailed if another process was first, as when Ctrl-C or a
    scheduler's signal comes to all: scripts catch the one, and launchers read the other's status.
    """
    try:
        yield
    except PeerFailed as failed:
        own = failed.__cause__
        if isinstance(own, (KeyboardInterrupt, SystemExit)):
            raise own from None
        raise
