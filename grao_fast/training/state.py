"""The state that a run needs to resume exactly.

All randomness of a step is a function of (seed, step), and so is the data cursor, unless prompts
are drawn by rewards (`grao_fast.training.draws`). So weights, optimiser, scheduler and these draws
are the whole state.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from grao_fast.config import GRAOConfig
from grao_fast.data.encoding import Encoded
from grao_fast.data.streaming import StreamedPrompts
from grao_fast.distributed.folders import write_folder
from grao_fast.distributed.tensors import held_tensors, save_tensors
from grao_fast.distributed.world import World
from grao_fast.models.adapters import (
    is_peft_model,
    subtract_first_weights,
)
from grao_fast.models.saving import hold_model, save_model
from grao_fast.models.sharding import reshard
from grao_fast.sampling.loaded import LoadedPolicy
from grao_fast.system.visible import get_logger
from grao_fast.training.checkpoint import FORMAT, OPTIMIZER, STATE, CheckpointError
from grao_fast.training.identity import (
    PolicyIdentity,
    check_base,
    check_same_policy,
    digest_weights,
)
from grao_fast.training.optim import load_moments, moments_of
from grao_fast.training.weights import load_weights, save_bare

logger = get_logger(__name__)


def step_seed(seed: int, step: int) -> int:
    """The seed of everything random in a step: sampling, dropout, a reward's own draws."""
    digest = hashlib.sha256(f"{seed}/{step}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


@dataclass(frozen=True)
class DataStream:
    """An endless stream of shuffled epochs, of which step s takes the s-th batch.

    size: examples of an epoch; infinite for a streaming dataset.
    streamed: the prompts of a streaming dataset, whose order is its own.
    """

    size: float
    batch_size: int
    seed: int
    streamed: StreamedPrompts | None = None

    @property
    def prompts(self) -> int | None:
        """How many prompts an epoch has; None: unknown."""
        return None if self.streamed is not None else int(self.size)

    def batch(self, step: int) -> list[int]:
        """Indices of the examples of a step."""
        start = step * self.batch_size
        return self.at(range(start, start + self.batch_size))

    def at(self, places: Sequence[int]) -> list[int]:
        """Indices of the examples at some places of the stream."""
        if self.streamed is not None:
            return list(places)
        n = int(self.size)
        return [int(_order(self.seed, p // n, n)[p % n]) for p in places]

    def state(self, place: int) -> dict[str, Any] | None:
        """What `load` needs to go on at a place, as data for JSON; None: nothing."""
        return None if self.streamed is None else self.streamed.state(place)

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Take over the state of a checkpoint."""
        if self.streamed is not None:
            self.streamed.load(state)


def stream_of(prompts: Sequence[Encoded], config: GRAOConfig) -> DataStream:
    """The stream of a run's prompts; a step takes all of them if they are fewer than it should."""
    wanted = config.prompts_per_step
    if isinstance(prompts, StreamedPrompts):
        # prompts sampled ahead are asked for again, and an unfinished step may have drawn more
        prompts.kept = wanted * (config.async_rollouts + config.dynamic_sampling + 2)
        return DataStream(math.inf, wanted, config.seed, prompts)
    if wanted > len(prompts):
        logger.warning(
            "prompts_per_step %d > %d prompts: every step takes all of them", wanted, len(prompts)
        )
    return DataStream(len(prompts), min(wanted, len(prompts)), config.seed)


@lru_cache(maxsize=2)  # a batch may lie in two epochs
def _order(seed: int, epoch: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(step_seed(seed, -1 - epoch))
    return torch.randperm(size, generator=generator)


def save_checkpoint(
    path: Path,
    loaded: LoadedPolicy,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    *,
    step: int,
    config: GRAOConfig,
    belongs_to: Mapping[str, Any],
    bare: bool = False,
) -> None:
    """Write a whole checkpoint, or none; every process must call it.

    belongs_to: facts compared on resuming, see `grao_fast.training.identity`.
    bare: write weights as they are sharded, for use if `save_pretrained` fails.
    """
    reshard(loaded.model)
    if bare:
        weights = partial(save_bare, loaded.model)
    else:
        weights = partial(save_model, loaded.model, loaded.tokenizer)
    facts = _facts(loaded.model, scheduler, step=step, config=config, belongs_to=belongs_to)
    contents = _Contents(weights, moments_of(loaded.model, optimizer), _beginning(loaded), facts)
    contents.write(path, loaded.policy.world)


def hold_checkpoint(
    loaded: LoadedPolicy,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    *,
    step: int,
    config: GRAOConfig,
    belongs_to: Mapping[str, Any],
) -> Callable[[Path, World], None]:
    """Copy a checkpoint into the CPU's memory; every process must call it.

    Returns write(path, world), to be called in another thread of every process, with a world of
    the threads'.
    """
    reshard(loaded.model)
    return _Contents(
        hold_model(loaded.model, loaded.tokenizer, loaded.policy.world),
        held_tensors(moments_of(loaded.model, optimizer)),
        _beginning(loaded),
        _facts(loaded.model, scheduler, step=step, config=config, belongs_to=belongs_to),
    ).write


@dataclass(frozen=True)
class _Contents:
    """What a checkpoint holds.

    weights: writes them into a folder.
    beginning: writes the adapter's first weights; None where they are not needed.
    facts: of state.json.
    """

    weights: Callable[[Path, World], None]
    moments: dict[str, Tensor]
    beginning: Callable[[Path], None] | None
    facts: dict[str, Any]

    def write(self, path: Path, world: World) -> None:
        """Write the checkpoint's folder; every process must call it."""

        def write_files(folder: Path) -> None:
            (folder / STATE).write_text(json.dumps(self.facts, indent=1))
            if self.beginning is not None:
                self.beginning(folder)

        def fill(folder: Path) -> None:
            self.weights(folder, world)
            save_tensors(self.moments, folder / OPTIMIZER, world)
            world.main(lambda: write_files(folder), held=True)

        write_folder(path, fill, world)


def _beginning(loaded: LoadedPolicy) -> Callable[[Path], None] | None:
    """Only an adapter's: a whole model is given again on resuming."""
    if loaded.beginning is None or not is_peft_model(loaded.model):
        return None
    return loaded.beginning.hold()


def _facts(
    model: nn.Module,
    scheduler: LRScheduler,
    *,
    step: int,
    config: GRAOConfig,
    belongs_to: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "step": step,
        **belongs_to,
        "weights": digest_weights(model),
        "scheduler": scheduler.state_dict(),
        "config": config.to_dict(),
        "versions": versions(),
    }


def resume_policy(
    loaded: LoadedPolicy, given: PolicyIdentity, path: Path, state: Mapping[str, Any]
) -> PolicyIdentity:
    """Load a checkpoint's weights into the policy, and the first weights of its run.

    given: the identity of the policy as it is; returns that of the policy the run began with.

    Raises:
        CheckpointError: the checkpoint is of another policy, or does not hold all that is trained.
    """
    beginning = loaded.beginning
    as_far = beginning is None and digest_weights(loaded.model) == state["weights"]
    check_same_policy(path, state, given, as_far=as_far)
    run = replace(given, start=state["policy"]["start"])
    if beginning is not None and not beginning.load(path) and given != run:
        raise CheckpointError(
            f"checkpoint {str(path)!r} was written with kl_coef=0 and does not hold the adapter's "
            f"first weights, and those drawn here are others (seed {state['config']['seed']} "
            "there): resume with that seed, or leave kl_coef at 0"
        )
    if beginning is not None and loaded.base_digest is not None:
        subtract_first_weights(loaded.model, beginning.restored)
    load_weights(loaded, path, state)
    check_base(path, state, loaded)
    return run


def load_optimizer(
    path: Path,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LambdaLR,
    state: Mapping[str, Any],
    world: World,
) -> None:
    """Load a checkpoint's moments and schedule step; options remain those of the config."""
    load_moments(model, optimizer, path / OPTIMIZER, world)
    base_lrs = scheduler.base_lrs
    scheduler.load_state_dict(dict(state["scheduler"]))
    scheduler.base_lrs = base_lrs
    factor = scheduler.lr_lambdas[0](scheduler.last_epoch)
    for group, base_lr in zip(optimizer.param_groups, base_lrs, strict=True):
        group["lr"] = base_lr * factor
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def versions() -> dict[str, str]:
    """Package versions."""
    return {name: version(name) for name in ("grao-fast", "torch", "transformers")}
