"""The state that a run needs to resume exactly.

All randomness of a step is a function of (seed, step), and the data cursor is a function of the
step, so weights, optimiser and scheduler are the whole state.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PreTrainedModel

from grao_fast.config import GRAOConfig
from grao_fast.distributed.folders import write_folder
from grao_fast.distributed.tensors import load_tensors, save_tensors
from grao_fast.distributed.world import World
from grao_fast.models.adapters import (
    differing_keys,
    is_peft_model,
    load_adapters,
    subtract_first_weights,
)
from grao_fast.models.beginning import trainable
from grao_fast.models.policy import Policy
from grao_fast.models.saving import save_model
from grao_fast.models.sharded_loading import refill
from grao_fast.models.sharding import own_class, reshard
from grao_fast.sampling.loading import LoadedPolicy
from grao_fast.training.checkpoint import FORMAT, OPTIMIZER, STATE, CheckpointError
from grao_fast.training.identity import (
    PolicyIdentity,
    check_base,
    check_same_policy,
    digest_weights,
    tensors_of,
)
from grao_fast.training.optim import load_moments, save_moments

_BARE_WEIGHTS = "weights"


def step_seed(seed: int, step: int) -> int:
    """The seed of everything random in a step: sampling, dropout, a reward's own draws."""
    digest = hashlib.sha256(f"{seed}/{step}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


@dataclass(frozen=True)
class DataStream:
    """An endless stream of shuffled epochs, of which step s takes the s-th batch."""

    size: int
    batch_size: int
    seed: int

    def batch(self, step: int) -> list[int]:
        """Indices of the examples of a step."""
        start = step * self.batch_size
        places = range(start, start + self.batch_size)
        orders = {epoch: self._order(epoch) for epoch in {p // self.size for p in places}}
        return [orders[p // self.size][p % self.size] for p in places]

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(step_seed(self.seed, -1 - epoch))
        return torch.randperm(self.size, generator=generator).tolist()


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
    """Write a whole checkpoint, or none.

    belongs_to: facts compared on resuming, see `grao_fast.training.identity`.
    bare: write weights as they are sharded, for use if `save_pretrained` fails.

    Every process must call it.
    """
    world = loaded.policy.world
    reshard(loaded.model)

    def fill(folder: Path) -> None:
        if bare:
            save_tensors(_trained(loaded.model), folder / _BARE_WEIGHTS, world)
        else:
            save_model(loaded.model, loaded.tokenizer, folder, world)
        save_moments(loaded.model, optimizer, folder / OPTIMIZER, world)
        if loaded.beginning is not None and is_peft_model(loaded.model):
            loaded.beginning.save(folder, world)  # a whole model is given again on resuming
        facts = {
            "format": FORMAT,
            "step": step,
            **belongs_to,
            "weights": digest_weights(loaded.model),
            "scheduler": scheduler.state_dict(),
            "config": config.to_dict(),
            "versions": versions(),
        }
        world.main(lambda: (folder / STATE).write_text(json.dumps(facts, indent=1)), held=True)

    write_folder(path, fill, world)


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


def load_weights(loaded: LoadedPolicy, path: Path, state: Mapping[str, Any]) -> None:
    """Load all of a checkpoint's weights into the policy; every process must call it.

    Raises:
        CheckpointError: a weight is missing, is not the model's, or is not what was saved.
    """
    model, world = loaded.model, loaded.policy.world
    if (path / _BARE_WEIGHTS).exists():
        load_tensors(_trained(model), path / _BARE_WEIGHTS, world)
    elif is_peft_model(model):
        world.together(lambda: load_adapters(model, path))
    else:
        _load_model(loaded.policy, path)
    if digest_weights(model) != state["weights"]:
        raise CheckpointError(
            f"checkpoint {str(path)!r} does not hold all that was trained: loaded, the weights "
            "differ from those that it was written of; resume from an earlier one"
        )


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that training changes, by name: a whole model, or what is trained of it."""
    if not is_peft_model(model):
        return tensors_of(model)
    return {name: parameter.detach() for name, parameter in trainable(model).items()}


def _load_model(policy: Policy, path: Path) -> None:
    causal_lm = policy.causal_lm
    if policy.world.size == 1:
        causal_lm.load_state_dict(_saved_model(causal_lm, path).state_dict())
        return
    refill(
        causal_lm,
        path,
        policy.world.together(lambda: _saved_model(causal_lm, path, outline=True)),
        whole=lambda: _saved_model(causal_lm, path),
        device=policy.device,
        world=policy.world,
    )


def _saved_model(
    causal_lm: PreTrainedModel, path: Path, *, outline: bool = False
) -> PreTrainedModel:
    """The model of a checkpoint, on the CPU or, as an outline without values, on "meta"."""
    on: dict[str, Any] = {"device_map": {"": "meta"}} if outline else {}
    loaded: Any = own_class(causal_lm).from_pretrained(
        path,
        dtype=torch.float32,  # which represents frozen layers of other dtypes exactly
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused below, in one line
        **on,
    )
    saved, info = loaded
    missing, unexpected = (info[kind] for kind in ("missing_keys", "unexpected_keys"))
    shapes = [f"{key} of shape {tuple(was)}" for key, was, _ in info["mismatched_keys"]]
    if missing or unexpected or shapes:
        raise CheckpointError(
            f"checkpoint {str(path)!r} is not of this model: it "
            f"{differing_keys(missing, [*unexpected, *shapes])}"
        )
    return saved


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
