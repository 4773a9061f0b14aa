"""PEFT adapters in folders and on the hub: finding them, and loading them on their base model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.utils.peft_utils import find_adapter_config_file

from grao_fast.models.adapters import (
    DEFAULT,
    UNLOADABLE,
    check_adapter_config,
    differing_keys,
    outline_adapter,
    said_twice,
)
from grao_fast.system.errors import UserError, explained
from grao_fast.system.optional import import_optional

_CONFIG = "adapter_config.json"
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter as peft saves it.

    path: a folder or a hub id.
    base: name or path of the model that it was trained on.
    revision: of that model on the hub; None: its main one.
    name: of the adapter; one with a name of its own lies in a folder of that name below.
    """

    path: str
    base: str
    revision: str | None = None
    name: str = DEFAULT

    @property
    def subfolder(self) -> dict[str, str]:
        """Options for peft's loaders."""
        return {} if self.name == DEFAULT else {"subfolder": self.name}


def find_adapter(path: str) -> AdapterFolder | None:
    """Find the adapter in a folder or under a hub id; None if it is a model, or nothing.

    Raises:
        ValueError: the folder holds several, or a model's weights too; or no base is named.
    """
    config = find_adapter_config_file(path)
    names = [DEFAULT] if config is not None else []
    if Path(path).is_dir():
        names += _named_below(Path(path))
    if not names:
        return None
    if len(names) > 1:
        raise UserError(
            f"model {path!r} holds several adapters ({', '.join(names)}): give the folder of one, "
            "or load them with peft and pass the PeftModel"
        )
    config = config or str(Path(path) / names[0] / _CONFIG)
    if any(weights for pattern in _WEIGHTS for weights in Path(path).glob(pattern)):
        raise UserError(
            f"model {path!r} holds the weights of a model and {_CONFIG}: move {_CONFIG} away to "
            "use the model, or give a folder with the adapter alone"
        )
    try:
        options = json.loads(Path(config).read_text(encoding="utf-8"))
        base, revision = options["base_model_name_or_path"], options.get("revision")
    except (ValueError, KeyError, TypeError, AttributeError):
        base = revision = None
    if not base or not isinstance(base, str):
        raise UserError(
            f"adapter {path!r} does not say which base model it is of: name it as "
            f"base_model_name_or_path in {_CONFIG}, or load both and pass the PeftModel"
        )
    return AdapterFolder(path, base, revision, names[0])


def _named_below(folder: Path) -> list[str]:
    """Names of the adapters in subfolders that hold nothing else.

    A trainer's checkpoints below a folder hold more.
    """
    return sorted(
        config.parent.name
        for config in folder.glob(f"*/{_CONFIG}")
        if all(file.name.startswith("adapter_") for file in config.parent.iterdir())
    )


def read_config(adapter: AdapterFolder, *, trained: bool) -> Any:
    """Read and check a saved adapter's peft config; set it for training if `trained`.

    Raises:
        ValueError: peft is not installed, or the adapter is of a kind that cannot be used.
    """
    peft = import_optional("peft", extra="peft", option=f"adapter {adapter.path!r}")
    with explained(f"cannot read the configuration of adapter {adapter.path!r}", *UNLOADABLE):
        config = peft.PeftConfig.from_pretrained(adapter.path, **adapter.subfolder)
        check_adapter_config(config)
    config.inference_mode = not trained
    return config


def open_adapter(model: nn.Module, adapter: AdapterFolder, peft_config: Any) -> nn.Module:
    """Load a saved adapter of that config onto the model.

    Raises:
        ValueError: the adapter does not fit the model, key by key.
    """
    from peft import get_peft_model, load_peft_weights

    what = f"cannot put adapter {adapter.path!r} on base model {adapter.base!r}"
    with explained(what, *UNLOADABLE):
        weights = load_peft_weights(adapter.path, device="cpu", **adapter.subfolder)
        _fit_vocabulary(model, weights)
        with warnings.catch_warnings():
            # The base model may have moved since the adapter was trained.
            warnings.filterwarnings("ignore", message=".*was renamed from.*")
            peft_model = get_peft_model(model, peft_config, adapter_name=adapter.name)  # pyright: ignore[reportArgumentType]
        loaded = peft_model.load_adapter(
            adapter.path,
            adapter.name,
            is_trainable=not peft_config.inference_mode,
            **adapter.subfolder,
        )
    state = peft_model.state_dict()
    found = {t.data_ptr() for key, t in state.items() if key not in loaded.missing_keys}
    # Tensors that layers share are saved, and found, under one of their names.
    missing = [key for key in loaded.missing_keys if state[key].data_ptr() not in found]
    unexpected = set(loaded.unexpected_keys) - said_twice(weights)
    if missing or unexpected:
        raise UserError(
            f"adapter {adapter.path!r} does not fit base model {adapter.base!r}: "
            f"{differing_keys(missing, unexpected)}"
        )
    return peft_model


def holds_lora_alone(adapter: AdapterFolder) -> bool:
    """Whether a saved adapter has no tensors but LoRA's matrices, such as embeddings."""
    from peft import load_peft_weights

    with explained(f"cannot read the weights of adapter {adapter.path!r}", *UNLOADABLE):
        weights = load_peft_weights(adapter.path, device="cpu", **adapter.subfolder)
    return all(".lora_A." in key or ".lora_B." in key for key in weights)


def open_outline(model: nn.Module, adapter: AdapterFolder, peft_config: Any) -> nn.Module:
    """Wrap a model on the device "meta" in a saved adapter, without reading its weights."""
    from peft import load_peft_weights

    _fit_vocabulary(model, load_peft_weights(adapter.path, device="cpu", **adapter.subfolder))
    return outline_adapter(model, peft_config, name=adapter.name)


def _fit_vocabulary(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Resize the base model to the embeddings that were saved with the adapter.

    peft saves them where tokens were added, and loads them only into as many rows.
    """
    layers = {
        kind: next((n for n, m in model.named_modules() if m is layer), None)
        for kind, layer in (
            ("input", model.get_input_embeddings()),
            ("output", model.get_output_embeddings()),
        )
    }
    rows = {
        kind: tensor.shape[0]
        for kind, name in layers.items()
        for key, tensor in weights.items()
        if name and f".{name}." in key and key.endswith("weight") and "lora_" not in key
    }
    if "input" not in rows or rows["input"] == model.get_input_embeddings().weight.shape[0]:
        return
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    if not tied and "output" not in rows:
        raise UserError(
            f"its embeddings have {rows['input']} rows, and it holds no head of as many"
        )
    model.resize_token_embeddings(rows["input"], mean_resizing=False)
