"""PEFT adapters on models: checks, a description to compare, and loading that misses no key."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from copy import copy
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils.import_utils import is_peft_available

from grao_fast.models.sharding import fill
from grao_fast.system.errors import UserError, explained, first_of

DEFAULT = "default"  # peft saves this adapter in the folder itself, others in subfolders
# What peft, safetensors and torch raise for an adapter that cannot be loaded.
UNLOADABLE = (KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError)
# Options that do not change what an adapter computes once its weights are drawn, or that show in
# the names of the trained parameters.
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
# LoRA initialisations for which peft subtracts the first weights from the base model.
_TAKEN_OUT = ("corda", "lora_ga", "olora", "pissa")
# Options of LoRA for which its first weights are computed or copied from the base model's.
_READING_BASE = ("layer_replication", "modules_to_save", "trainable_token_indices", "use_dora")
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
    """Refuse adapters of other tasks, virtual tokens, and adapters that cannot be loaded again."""
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
        # Loading draws a new random initialisation and subtracts it from the base.
        raise UserError(
            f"init_lora_weights={init!r} subtracts a random draw from the base model, and the "
            "trained adapter fits no other draw: use 'pissa', which is deterministic (for an "
            "adapter that is trained, save_pretrained(path_initial_model_for_weight_conversion))"
        )


def check_module(model: nn.Module, *, peft_config: Any, trained: bool) -> None:
    """Refuse a model in memory whose adapter would be lost, nested or left untrained.

    Raises:
        UserError: names the problem and the remedy.
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
    """The adapter layers among a module and its submodules."""
    if not is_peft_available():
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def new_adapter(model: nn.Module, peft_config: Any, *, name: str) -> nn.Module:
    """Wrap a model in a new, freshly initialised adapter."""
    from peft import get_peft_model

    try:
        return get_peft_model(model, peft_config)  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise UserError(f"the adapter does not fit {name}: {error}") from error


def said_twice(weights: Mapping[str, Tensor]) -> set[str]:
    """Keys that repeat a saved module under its plain name, as peft does for added tokens."""
    plain = {key: key.replace(".modules_to_save.", ".") for key in weights}
    return {
        key
        for key, other in plain.items()
        if other != key and other in weights and torch.equal(weights[key], weights[other])
    }


def differing_keys(missing: Iterable[str], unexpected: Iterable[str]) -> str:
    """A phrase that names the first missing and unexpected key and counts the others."""
    kinds = (("lacks", sorted(missing)), ("has no place for", sorted(unexpected)))
    return "; ".join(f"{what} {first_of(keys)}" for what, keys in kinds if keys)


def adapter_state(model: Any, name: str) -> dict[str, Tensor]:
    """The tensors that peft saves of an adapter, by key; they share memory with the model."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)


def saved_names(model: Any, embeddings: bool | Literal["auto"] = False) -> set[str]:
    """The names in a model's state of the tensors that peft saves of its adapters.

    embeddings: whether to add the base's embeddings; "auto": where `save_pretrained` saves them.
    """
    from peft import get_peft_model_state_dict

    # peft gets scalars that look like the tensors, and is known to have chosen each by its memory.
    stand_ins = {
        name: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor)
    }
    name_of = {tensor.untyped_storage().data_ptr(): name for name, tensor in stand_ins.items()}
    saved: set[str | None] = set()
    for adapter in model.peft_config:
        chosen = get_peft_model_state_dict(
            model,
            state_dict=dict(stand_ins),
            adapter_name=adapter,
            save_embedding_layers=embeddings,
        )
        saved |= {name_of.get(t.untyped_storage().data_ptr()) for t in chosen.values()}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied = {name for shared in names.values() if saved.intersection(shared) for name in shared}
    return tied.union(name for name in saved if name is not None)


def check_all_saved(model: Any) -> None:
    """Refuse a model with trainable parameters that are not saved with its adapters."""
    saved = saved_names(model)
    left = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name not in saved
    ]
    if left:
        raise UserError(
            f"{first_of(left)} would be trained, and is not saved with the adapter: freeze it "
            "(requires_grad_(False)), or name its module in modules_to_save"
        )


@torch.no_grad()
def load_adapters(model: Any, folder: Path) -> None:
    """Load the adapters that `save_pretrained` wrote into `folder`; on an error, nothing is loaded.

    Raises:
        ValueError: a key is missing, has no place in the model, or is of another shape.
    """
    from peft import load_peft_weights

    whole = model.state_dict()  # peft may have saved embeddings with the adapter
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
        fill(place, value)


def alters_base(peft_config: Any) -> bool:
    """Whether initialising the adapter subtracts its first weights from the base model."""
    return getattr(peft_config, "init_lora_weights", None) in _TAKEN_OUT


def is_drawn_alone(peft_config: Any) -> bool:
    """Whether a new adapter's weights depend on random numbers alone, not on the base model's."""
    return (
        peft_config.peft_type == "LORA"
        and peft_config.init_lora_weights in (True, False, "gaussian", "orthogonal")
        and not any(getattr(peft_config, option, None) for option in _READING_BASE)
    )


def outline_adapter(model: nn.Module, peft_config: Any, *, name: str) -> nn.Module:
    """Wrap a model on the device "meta" in an adapter of that name, which is on "meta" too."""
    from peft import get_peft_model

    config = copy(peft_config)
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = False  # others would decompose weights that have no values
    wrapped = get_peft_model(model, config, adapter_name=name, low_cpu_mem_usage=True)  # pyright: ignore[reportArgumentType]
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = peft_config.init_lora_weights
    return wrapped


@torch.no_grad()
def subtract_first_weights(
    model: Any, as_it_began: Callable[[], AbstractContextManager[None]]
) -> None:
    """Subtract a run's first adapter weights from the base model, instead of those drawn here.

    The same matrix decomposition gave both, but it rounds differently on other processors and with
    other numbers of threads.

    as_it_began: a context in which the adapter has the first weights of that run.
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
    """By adapter, the options that decide what it computes; empty without adapters."""
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
    """An option as JSON data, lists of names sorted, since most options hold them as sets."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in sorted(value.items(), key=str)}
    if isinstance(value, (set, frozenset, list, tuple)):
        items = [_plain(item) for item in value]
        return sorted(items) if all(isinstance(item, str) for item in items) else items
    if value is None or isinstance(value, (bool, int, float, str)):
        return getattr(value, "value", value)  # the value of a string enumeration
    return type(value).__name__
