"""The weights of a checkpoint: loading them, and writing them bare."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grao_fast.distributed.tensors import load_tensors, save_tensors
from grao_fast.distributed.world import World
from grao_fast.models.adapters import differing_keys, is_peft_model, load_adapters
from grao_fast.models.beginning import trainable
from grao_fast.models.policy import Policy
from grao_fast.models.sharded_loading import refill
from grao_fast.models.sharding import own_class
from grao_fast.sampling.loaded import LoadedPolicy
from grao_fast.system.bars import no_bar, on_terminal
from grao_fast.training.checkpoint import CheckpointError
from grao_fast.training.identity import digest_weights, tensors_of

_BARE_WEIGHTS = "weights"


def save_bare(model: nn.Module, folder: Path, world: World) -> None:
    """Write weights as they are sharded, without a library for models; all must call it."""
    save_tensors(_trained(model), folder / _BARE_WEIGHTS, world)


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
    with no_bar(unless=on_terminal()):
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
