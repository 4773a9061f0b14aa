"""The sizes of a model that a plan needs, read from its config: no weights are loaded."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from grao_fast.models.adapter_folders import find_adapter
from grao_fast.models.adapters import check_adapter_config, new_adapter
from grao_fast.models.attention import head_width
from grao_fast.models.loading import existing_path
from grao_fast.models.policy import causal_lm_of
from grao_fast.models.sharding import layers
from grao_fast.system.errors import UserError, explained
from grao_fast.training.flops import ModelCost, Window, layer_windows


class Elements(NamedTuple):
    """Numbers of elements of parameters; a tied parameter counts once."""

    trained: int
    frozen: int

    @property
    def all(self) -> int:
        return self.trained + self.frozen

    @classmethod
    def of(cls, parameters: list[nn.Parameter]) -> Elements:
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        return cls(trained, sum(p.numel() for p in parameters) - trained)


@dataclass(frozen=True)
class ModelSize:
    """What a plan needs to know of a model.

    model: all parameters.
    layer: the largest of the layers that are sharded by themselves (`_no_split_modules`).
    root: everything outside these layers: embeddings, last norm, head.
    layers: the number of these layers.
    width: D, of the hidden states.
    matrix_io: inputs and outputs of all matrices of the largest layer, in elements a token; of a
        mixture of experts, those that a token is routed to.
    windows: the number of attention layers for each window; None is no window.
    cache: keys and values of one attention layer, in elements a token.
    cost: FLOPs of a token, a pair and a row.
    """

    model: Elements
    layer: Elements
    root: Elements
    layers: int
    width: int
    matrix_io: float
    windows: Counter[Window]
    cache: int
    cost: ModelCost

    @classmethod
    def of(cls, model: nn.Module, *, recompute: bool) -> ModelSize:
        """The sizes of a model, which may be on the meta device and have an adapter."""
        causal_lm = causal_lm_of(model)
        config: Any = causal_lm.config.get_text_config()
        sharded = layers(causal_lm)
        inner = sharded or [causal_lm]
        inside = {id(p) for layer in sharded for p in layer.parameters()}
        outside = [p for p in causal_lm.parameters() if id(p) not in inside]
        largest = max(inner, key=lambda layer: Elements.of(list(layer.parameters())).all)
        windows = Counter(layer_windows(config))
        return cls(
            model=Elements.of(list(causal_lm.parameters())),
            layer=Elements.of(list(largest.parameters())),
            root=Elements.of(outside),
            layers=len(inner),
            width=config.hidden_size,
            matrix_io=_matrix_io(largest, config),
            windows=windows,
            cache=_cache(config) if windows else 0,
            cost=ModelCost.of(causal_lm, recompute=recompute),
        )


def skeleton(model: str | Path, peft_config: Any = None) -> nn.Module:
    """Return the model that a folder's or hub id's config describes, on the meta device.

    Raises:
        UserError: there is no such model, it is an adapter, or an adapter does not fit it.
    """
    path = existing_path(model)
    if find_adapter(path) is not None:
        raise UserError(
            f"model {path!r} is an adapter: plan with its base model, and the adapter's rank "
            "as --peft.r"
        )
    with explained(f"cannot read the config of model {path!r}", OSError, ValueError, KeyError):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            causal_lm = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if peft_config is None:
        return causal_lm
    check_adapter_config(peft_config)
    with torch.device("meta"):
        return new_adapter(causal_lm, peft_config, name=path)


def _matrix_io(layer: nn.Module, config: Any) -> float:
    chosen = getattr(config, "num_experts_per_tok", 1)
    widths = 0.0
    for parameter in layer.parameters():
        if parameter.ndim >= 2:  # three dimensions: one matrix for each expert
            widths += sum(parameter.shape[-2:]) * (chosen if parameter.ndim == 3 else 1)
    return widths


def _cache(config: Any) -> int:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    qk, v = (getattr(config, n, None) or head_width(config) for n in ("qk_head_dim", "v_head_dim"))
    return heads * (qk + v)
