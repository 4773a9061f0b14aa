"""Adapters of peft on models: checked, described, and loaded with every key accounted for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils.import_utils import is_peft_available

from grao_fast.system.errors import UserError, explained, first_of

DEFAULT = "default"  # the adapter that peft saves in the folder itself; others go one level below
# What peft, safetensors and torch raise for an adapter that cannot be loaded.
UNLOADABLE = (KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError)
# Options of an adapter that change nothing of what it computes once its weights are drawn, or that
# the names of what is trained say better.
_NOT_COMPUTED = (
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "peft_version",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
)
# First weights of LoRA that peft takes out of the base model, so that both together are the model.
_TAKEN_OUT = ("corda", "lora_ga", "olora", "pissa")
_MERGE_OR_CONTINUE = (
    "leave peft_config out to continue that adapter, or merge it first (model.merge_and_unload()) "
    "and pass what that returns"
)


def is_peft_model(model: Any) -> bool:
    """Whether a model is peft's wrapper around a Transformers model."""
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def check_adapter_config(peft_config: Any) -> None:
    """Refuse what is no adapter of a language model, or cannot be packed, or loaded again."""
    if isinstance(peft_config, type) or not hasattr(peft_config, "peft_type"):
        raise UserError(
            "peft_config must be a configuration of peft, such as LoraConfig, got "
            f"{type(peft_config).__name__}"
        )
    if peft_config.task_type not in (None, "CAUSAL_LM"):
        raise UserError(
            f"the adapter's task_type is {str(peft_config.task_type).removeprefix('TaskType.')}, "
            "and must be CAUSAL_LM, of a causal language model"
        )
    if peft_config.is_prompt_learning:
        raise UserError(
            f"{type(peft_config).__name__} prepends virtual tokens, which packed prompts cannot "
            "hold; use a LoRA-like adapter"
        )
    init = getattr(peft_config, "init_lora_weights", None)
    if isinstance(init, str) and init.startswith("pissa_niter"):
        # peft puts a saved adapter on a base out of which it takes what it then draws anew
        raise UserError(
            f"init_lora_weights={init!r} takes out of the base model what it draws at random, and "
            "what is trained fits no other draw: use 'pissa', which takes the same each time (for "
            "an adapter that is trained, save_pretrained(path_initial_model_for_weight_conversion))"
        )


def check_module(model: nn.Module, *, peft_config: Any, trained: bool) -> None:
    """Refuse a model in memory whose adapter would be lost, doubled or not trained.

    Raises:
        ValueError: says which, and the remedy.
    """
    model = getattr(model, "_orig_mod", model)  # inside torch.compile's wrapper
    if not is_peft_model(model):
        if (trained or peft_config is not None) and _tuner_layers(model):
            raise UserError(
                f"{type(model).__name__} still holds the layers of an adapter, of an earlier "
                "peft_config or of load_adapter: load the model anew, or pass its PeftModel "
                "(`result.model` of a run) without peft_config to continue that adapter"
            )
        return
    if peft_config is not None:
        raise UserError(
            f"the model is a {type(model).__name__} already, whose adapter a peft_config would "
            f"wrap and lose: {_MERGE_OR_CONTINUE}"
        )
    for config in model.peft_config.values():  # pyright: ignore[reportAttributeAccessIssue]
        check_adapter_config(config)
    if is_peft_model(model.get_base_model()) or any(  # pyright: ignore[reportCallIssue]
        # peft itself nests ParamWrapper, one for each of a module's targeted parameters
        type(layer).__name__ != "ParamWrapper" and len(_tuner_layers(layer)) > 1
        for layer in _tuner_layers(model)
    ):
        raise UserError(
            "the model is an adapter within an adapter, of which only the outer one would be "
            "saved: merge the inner one first (merge_and_unload), or load the base model anew"
        )
    if trained and not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            "no parameter of the adapter is trainable, as it was loaded for inference: load it "
            "with PeftModel.from_pretrained(..., is_trainable=True), or give its folder as model"
        )


def _tuner_layers(model: nn.Module) -> list[Any]:
    """Layers that an adapter has put in place of a model's own, itself included."""
    if not is_peft_available():
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def new_adapter(model: nn.Module, peft_config: Any, *, name: str) -> nn.Module:
    """The model with a new adapter, whose first weights are drawn."""
    from peft import get_peft_model

    try:
        return get_peft_model(model, peft_config)  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise UserError(f"the adapter does not fit {name}: {error}") from error


def said_twice(weights: Mapping[str, Tensor]) -> set[str]:
    """Keys of saved modules that peft, where tokens were added, writes by their plain name too."""
    plain = {key: key.replace(".modules_to_save.", ".") for key in weights}
    return {
        key
        for key, other in plain.items()
        if other != key and other in weights and torch.equal(weights[key], weights[other])
    }


def differing_keys(missing: Iterable[str], unexpected: Iterable[str]) -> str:
    """One phrase that names the first of each and counts the others."""
    kinds = (("lacks", sorted(missing)), ("has no place for", sorted(unexpected)))
    return "; ".join(f"{what} {first_of(keys)}" for what, keys in kinds if keys)


def adapter_state(model: Any, name: str) -> dict[str, Tensor]:
    """What peft saves of an adapter by its key in the file, sharing memory with the model."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)


def check_all_saved(model: Any) -> None:
    """Refuse what would be trained and not be in the adapter that is saved."""
    saved = {
        tensor.data_ptr()
        for name in model.peft_config
        for tensor in adapter_state(model, name).values()
    }
    left = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.data_ptr() not in saved
    ]
    if left:
        raise UserError(
            f"{first_of(left)} would be trained, and is not saved "
            "with the adapter: freeze it (requires_grad_(False)), or name its module in "
            "modules_to_save"
        )


@torch.no_grad()
def load_adapters(model: Any, folder: Path) -> None:
    """Load the adapters that `save_pretrained` wrote into `folder`: all keys, or none.

    Raises:
        ValueError: a key is missing, has no place in the model, or is of another shape.
    """
    from peft import load_peft_weights

    whole = model.state_dict()  # where peft has saved embeddings beside the adapter
    pairs = []
    for name in model.peft_config:
        path = folder if name == DEFAULT else folder / name
        with explained(f"cannot load adapter {name!r} of {str(folder)!r}", *UNLOADABLE):
            saved = load_peft_weights(str(path), device="cpu")
        own = adapter_state(model, name)
        places = whole | own
        missing = own.keys() - saved.keys()
        unexpected = saved.keys() - places.keys() - said_twice(saved)
        if missing or unexpected:
            raise UserError(
                f"adapter {name!r} of {str(folder)!r} is not this run's: it "
                f"{differing_keys(missing, unexpected)}"
            )
        for key, value in saved.items():
            if key not in places:
                continue
            if value.shape != places[key].shape:
                raise UserError(
                    f"adapter {name!r} of {str(folder)!r} is not this run's: {key} has shape "
                    f"{tuple(value.shape)}, here {tuple(places[key].shape)}"
                )
            pairs.append((places[key], value))
    for place, value in pairs:
        place.copy_(value)


def alters_base(peft_config: Any) -> bool:
    """Whether a new adapter's first weights are taken out of the base model's."""
    return getattr(peft_config, "init_lora_weights", None) in _TAKEN_OUT


@torch.no_grad()
def take_out_alike(model: Any, as_it_began: Callable[[], AbstractContextManager[None]]) -> None:
    """Take out of the base model what a run took out of it, in place of what was taken here.

    Both come of the same base by the same matrix decomposition, whose rounding is another one with
    other processors or numbers of threads.

    as_it_began: gives the adapter the first weights of that run, for as long as it is entered.
    """
    altering = [name for name, config in model.peft_config.items() if alters_base(config)]
    for layer in _tuner_layers(model):
        for name in (name for name in altering if name in getattr(layer, "lora_A", {})):
            here = layer.get_delta_weight(name)
            with as_it_began():
                there = layer.get_delta_weight(name)
            if not torch.equal(here, there):
                layer.get_base_layer().weight.add_(here - there)


def adapter_configs(model: Any) -> dict[str, dict[str, Any]]:
    """By adapter, the options that decide what it computes; empty where there is none."""
    if not is_peft_model(model):
        return {}
    active = set(model.base_model.active_adapters)
    return {
        name: {
            "active": name in active,
            **{
                key: _plain(value)
                for key, value in config.to_dict().items()
                if key not in _NOT_COMPUTED and not key.endswith("dropout")
            },
        }
        for name, config in model.peft_config.items()
    }


def _plain(value: Any) -> Any:
    """JSON of an option; names in alphabetical order, as most options hold them in sets."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in sorted(value.items(), key=str)}
    if isinstance(value, (set, frozenset, list, tuple)):
        items = [_plain(item) for item in value]
        return sorted(items) if all(isinstance(item, str) for item in items) else items
    if value is None or isinstance(value, (bool, int, float, str)):
        return getattr(value, "value", value)  # of an enumeration of texts
    return type(value).__name__
