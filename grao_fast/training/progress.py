"""The progress of a run: its checkpoints, resuming, and saving when it ends early."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from grao_fast.config import GRAOConfig
from grao_fast.distributed.world import World
from grao_fast.sampling.loaded import LoadedPolicy
from grao_fast.system import interruption
from grao_fast.system.errors import one_line
from grao_fast.system.visible import get_logger
from grao_fast.training.checkpoint import read_state
from grao_fast.training.draws import PromptDraws
from grao_fast.training.identity import PolicyIdentity, RunIdentity, check_steps, digest_frozen
from grao_fast.training.saver import SaveError, Saver
from grao_fast.training.state import (
    hold_checkpoint,
    load_optimizer,
    resume_policy,
    save_checkpoint,
)

logger = get_logger(__name__)


class Progress:
    """The steps that a run has done, and where they are saved.

    Args:
        identity: of the run, written into its checkpoints.
        draws: which prompts the steps take.
        config: written into checkpoints as it was given.
        output_dir: of the run.

    done: steps done; None within an update, which cannot be saved.
    flush: called before a checkpoint is written, so that metrics.jsonl is complete up to it.
    """

    def __init__(
        self,
        loaded: LoadedPolicy,
        optimizer: Optimizer,
        scheduler: LambdaLR,
        *,
        identity: RunIdentity,
        draws: PromptDraws,
        config: GRAOConfig,
        output_dir: Path,
    ) -> None:
        self.loaded, self.optimizer, self.scheduler = loaded, optimizer, scheduler
        self.identity, self.draws, self.config = identity, draws, config
        self.policy_identity = PolicyIdentity.of(loaded)
        self.frozen: str | None = None  # set by `begin`
        self.done: int | None = 0
        self.flush: Callable[[], None] = lambda: None
        self.saver = Saver(
            output_dir,
            self._write,
            self._hold,
            keep=config.save_total_limit,
            world=loaded.policy.world,
        )
        self._rescued = False
        optimizer.register_step_pre_hook(self._commit)

    def begin(self, checkpoint: Path | None, *, total_steps: int) -> int:
        """Load the checkpoint that the run resumes from, if any; returns the steps it has done."""
        if checkpoint is not None:
            self._resume(checkpoint, total_steps)
            self.loaded.changed()
        self.frozen = digest_frozen(self.loaded.model)
        assert self.done is not None
        return self.done

    def save(self, step: int) -> list[Path]:
        """Write the checkpoint of a step, and delete those that are not kept.

        With `async_save`, a thread writes it. Returns the checkpoints that are whole since the last
        call.
        """
        whole = self.finish()
        with self.saving(f"checkpoint-{step}"):
            self.loaded.policy.world.main(self.flush, held=True)
            if self.config.async_save:
                self.saver.start(step)
            else:
                whole.append(self.saver.save(step))
        interruption.resumes_from(self.saver.checkpoint)
        return whole

    def finish(self) -> list[Path]:
        """Wait for a checkpoint that a thread writes; returns it, if there is one."""
        step = self.saver.in_flight
        if step is None:
            return []
        with self.saving(f"checkpoint-{step}"):
            path = self.saver.finish()
        interruption.resumes_from(path)
        return [path]

    @contextmanager
    def saving(self, name: str) -> Iterator[None]:
        """Raise errors of the block as a SaveError that says where the weights are."""
        try:
            yield
        except Exception as error:  # of any kind: of a disk, of a library, of a model's own
            self.rescue(together=self.loaded.policy.world.is_shared(error))
            kept = "no step has been saved"
            if self.saver.checkpoint is not None:
                kept = f"step {self.saver.step} is in {str(self.saver.checkpoint)!r}"
            raise SaveError(f"{name} could not be saved ({one_line(error)}); {kept}") from error

    def rescue(self, *, together: bool = True) -> None:
        """Save the finished steps when the run ends early, and log where they are; only once.

        together: whether all processes do so, as they must to save; False: this one has failed
            alone, or has lost another.
        """
        if self._rescued:
            return
        self._rescued = True
        saves = together and not interruption.is_aborted()
        if saves and self.saver.in_flight is not None:
            self.saver.end_flight()
        if saves and self.done is not None and self.done != self.saver.step:
            with suppress(OSError):  # a full disk; the weights may find room elsewhere
                self.flush()
            self.saver.rescue(self.done)
        interruption.resumes_from(self.saver.checkpoint)
        if where := self.saver.where():
            logger.warning("the run ended early; %s", where)

    def _commit(self, *_: Any) -> None:
        """Called before the optimiser changes weights: the step can no longer be abandoned."""
        interruption.hold()  # first: a signal in between would leave nothing to save
        self.done = None

    def _write(self, path: Path, step: int, bare: bool) -> None:
        save_checkpoint(path, *self._state, **self._facts(step), bare=bare)

    def _hold(self, step: int) -> Callable[[Path, World], None]:
        return hold_checkpoint(*self._state, **self._facts(step))

    @property
    def _state(self) -> tuple[LoadedPolicy, Optimizer, LambdaLR]:
        return self.loaded, self.optimizer, self.scheduler

    def _facts(self, step: int) -> dict[str, Any]:
        belongs_to = {
            "run": asdict(self.identity),
            "policy": asdict(self.policy_identity),
            "frozen": self.frozen,
            "prompts": self.draws.stream.prompts,
            "draws": self.draws.state(step),
        }
        return {"step": step, "config": self.config, "belongs_to": belongs_to}

    def _resume(self, checkpoint: Path, total_steps: int) -> None:
        state = read_state(checkpoint)
        check_steps(checkpoint, state["step"], total_steps)
        self.policy_identity = resume_policy(self.loaded, self.policy_identity, checkpoint, state)
        prompts = self.draws.stream.prompts
        if state["prompts"] != prompts:
            logger.warning(
                "%d prompts are short enough here and %d were: their order is another one",
                prompts, state["prompts"],
            )  # fmt: skip
        self.draws.load(state.get("draws"))
        load_optimizer(
            checkpoint,
            self.loaded.model,
            self.optimizer,
            self.scheduler,
            state,
            self.loaded.policy.world,
        )
        logger.info("resuming from %s", checkpoint)
        self.done = state["step"]
        self.saver.resumed(checkpoint, state["step"])
