"""The language-model head of a Transformers model: how hidden states become logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from grao_fast.models.sharding import own_class
from grao_fast.system.errors import UserError

# Names of a factor of the logits, and of their cap, in configs of Transformers.
_SCALES = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Model types whose config names a factor of the logits but divides by it.
_DIVIDES_LOGITS_SCALING = ("granite", "minicpm3")


@dataclass(frozen=True)
class LogitTransform:
    """z = softcap((h W^T + b) * logit_scale); softcap None is the identity."""

    logit_scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def from_config(cls, config: Any) -> LogitTransform:
        """Read a Transformers config: Gemma caps, Cohere and Falcon-H1 scale, Granite divides."""

        def first(names: tuple[str, ...]) -> float | None:
            return next(filter(None, (getattr(config, name, None) for name in names)), None)

        scale = first(_SCALES)
        scaling = getattr(config, "logits_scaling", None)
        if scaling is not None:
            divides = config.model_type.startswith(_DIVIDES_LOGITS_SCALING)
            scale = 1 / scaling if divides else scaling
        return cls(float(scale or 1.0), first(_CAPS))


def check_head(causal_lm: PreTrainedModel, *, copies: bool = False) -> None:
    """Raise UserError unless the head is a plain Linear layer, as the loss assumes.

    copies: whether it may also be one of which PEFT trains a copy, by `modules_to_save`.
    """
    head = causal_lm.get_output_embeddings()
    layers = head_layers(head) if copies and head is not None else [head]
    if any(own_class(layer) is not nn.Linear for layer in layers):
        names = "target_modules" if copies else "target_modules and modules_to_save"
        raise UserError(
            f"the head of {own_class(causal_lm).__name__} is a {own_class(head).__name__}, "
            f"where a plain Linear is needed; leave lm_head out of {names}, and load it unquantised"
        )


def head_layers(head: nn.Module) -> list[nn.Module]:
    """The layers of which a head runs one: the model's own and PEFT's copies of it, if any."""
    copies = getattr(head, "modules_to_save", None)
    return [head] if copies is None else [head.original_module, *copies.values()]
