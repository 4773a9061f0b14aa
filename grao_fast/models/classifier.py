"""Loading sequence classifiers: their outline, which has shapes alone, and then their weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from grao_fast.models.adapter_folders import find_adapter
from grao_fast.models.loading import existing_path
from grao_fast.models.outline import places_of, tensor_at
from grao_fast.models.placement import Placement
from grao_fast.models.sharded_loading import Outline
from grao_fast.models.weight_files import WeightFiles, safetensors_of
from grao_fast.system.bars import no_bar, on_terminal
from grao_fast.system.digests import digest_tensors
from grao_fast.system.errors import UserError, explained, first_of

_LOADING = (ImportError, OSError, SafetensorError, ValueError)


@dataclass(frozen=True)
class Classifier:
    """A sequence classifier that is not loaded yet, by its folder or hub id."""

    name: str

    @classmethod
    def named(cls, name: str | Path) -> Classifier:
        """Check that there is a model of that name. Raises UserError for none, or an adapter."""
        path = existing_path(name)
        if find_adapter(path) is not None:
            raise UserError(
                f"reward model {path!r} is an adapter: merge it into its base first "
                "(merge_and_unload, save_pretrained) and give the merged model"
            )
        return cls(path)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer beside it."""
        with explained(f"cannot load the tokenizer of reward model {self.name!r}", *_LOADING):
            return AutoTokenizer.from_pretrained(self.name, trust_remote_code=False)

    def outline(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The model on "meta". Raises UserError if its files lack weights, such as the head's."""
        return self._load(dtype, device_map={"": "meta"})

    def load(self, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
        """The whole model."""
        model: Any = self._load(dtype)
        return model.to(device)

    def load_sharded(
        self, device: torch.device, dtype: torch.dtype, placement: Placement
    ) -> PreTrainedModel:
        """The model, sharded over the processes of a run, all of which must call this."""
        loader = _Loader(self, dtype)
        outline = Outline(loader, placement.world)
        model: Any = outline.model
        freeze(model)
        placement.shard(model, model)
        outline.fill(device)
        return model

    def head_digest(self, outline: PreTrainedModel) -> str | None:
        """A digest of the weights above the base model; None if no safetensors file holds them."""
        files = WeightFiles(safetensors_of(self.name, None), outline)
        base = f"{outline.base_model_prefix}."
        head = {}
        for name, place in places_of(outline).items():
            shape = tuple(tensor_at(place).shape)
            if not name.startswith(base) and files.holds(name, shape):
                head[name] = files.read(name, (slice(None),) * len(shape))
        files.close()
        return digest_tensors(head) if head else None

    def _load(self, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
        named = explained(f"cannot load reward model {self.name!r}", *_LOADING)
        with named, no_bar(unless=on_terminal()):
            model, info = AutoModelForSequenceClassification.from_pretrained(
                self.name,
                dtype=dtype,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, in one line
                **options,
            )
        # Transformers would draw them at random
        absent = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
        if absent:
            raise UserError(
                f"reward model {self.name!r} holds no {first_of(absent)} of the shapes that its "
                "config.json wants: it is no sequence classifier; give one that has been trained"
            )
        if getattr(model.config, "quantization_config", None) is not None:
            raise UserError(
                f"reward model {self.name!r} is quantised: give its unquantised weights, and "
                'dtype="bfloat16"'
            )
        return model


def freeze(model: nn.Module) -> None:
    """Put a model into the mode in which it only scores."""
    model.eval()
    model.requires_grad_(False)


@dataclass(frozen=True)
class _Loader:
    """A classifier as the `Loader` of its outline."""

    classifier: Classifier
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return self.classifier.name

    def base(self, device: torch.device) -> PreTrainedModel:
        if device.type == "meta":
            return self.classifier.outline(self.dtype)
        return self.classifier.load(device, self.dtype)

    def files(self) -> list[str]:
        return safetensors_of(self.classifier.name, None)

    def adapted(self, base: nn.Module) -> nn.Module:
        return base

    def adapted_outline(self, base: nn.Module) -> nn.Module:
        return base

    def reads_base(self) -> bool:
        return False

    def digest(self, base: nn.Module) -> str | None:
        return None
