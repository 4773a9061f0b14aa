"""The policy: a causal language model split where the loss takes over, at its head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grao_fast.data.packing import Group, MicroBatch, pack, pad
from grao_fast.distributed.world import World
from grao_fast.kernels.devices import to_device
from grao_fast.models.attention import attending
from grao_fast.models.head import LogitTransform
from grao_fast.models.objective import HeadInputs, answering_objectives, run_at_head
from grao_fast.models.router import Router

R = TypeVar("R")


@dataclass(frozen=True)
class Policy:
    """A model, its head, and the attention that updates run.

    model: as it is trained and saved; a PeftModel where an adapter is trained.
    causal_lm: the Transformers model inside (the same object without an adapter).
    transform: from the head's product to logits.
    autocast_dtype: bfloat16, or None to compute in the parameters' dtype.
    share_prefix: compute each prompt once for all its continuations, in packed rows.
    attention: of updates, as `choose_attention` gives it.
    pad_token_id: fills rows where prefixes are not shared.
    router: the auxiliary loss of a mixture of experts; None where there is none.
    world: the processes that the model is sharded over.
    computes_on: the device of passes; None: the parameters'.
    defers_reduction: sum gradients over the processes once a step, and keep them whole until then.
    """

    model: nn.Module
    causal_lm: PreTrainedModel
    transform: LogitTransform
    autocast_dtype: torch.dtype | None
    share_prefix: bool = False
    attention: str | None = None
    pad_token_id: int = 0
    router: Router | None = None
    world: World = field(default_factory=World)
    computes_on: torch.device | None = None
    defers_reduction: bool = False

    @property
    def device(self) -> torch.device:
        """The device that computes, also where parameters wait on the CPU."""
        return self.computes_on or self.causal_lm.device

    @property
    def context_length(self) -> int | None:
        """Tokens of a prompt and its completion that the model holds; None: unlimited."""
        return getattr(self.causal_lm.config, "max_position_embeddings", None)

    @property
    def recomputes(self) -> bool:
        """Whether the backward pass recomputes layers."""
        return any(getattr(m, "gradient_checkpointing", False) for m in self.causal_lm.modules())

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight (V, D) and bias (V,) of the language-model head, as parameters."""
        head = self.causal_lm.get_output_embeddings()
        return head.weight, head.bias

    def head_grad(self) -> Tensor | None:
        """The weight's `grad`, allocated if need be, for the loss to add to; None where frozen."""
        weight, _ = self.head()
        if not (weight.requires_grad and torch.is_grad_enabled()):
            return None
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        return weight.grad

    def autocast(self, *, enabled: bool = True) -> torch.autocast:
        """The context in which this policy computes; with `enabled` False, without autocast."""
        return torch.autocast(
            self.device.type,
            dtype=self.autocast_dtype,
            enabled=enabled and self.autocast_dtype is not None,
        )

    def lay_out(self, groups: list[Group]) -> MicroBatch:
        """The groups as this policy computes them: packed behind shared prompts, or padded."""
        return pack(groups) if self.share_prefix else pad(groups, pad_token_id=self.pad_token_id)

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Training mode, for forward and backward passes over micro-batches."""
        self.model.train()
        with torch.enable_grad(), attending(self.causal_lm, self.attention):
            yield

    def at_head(self, batch: MicroBatch, function: Callable[[HeadInputs], R]) -> R:
        """function(head inputs of the rows that predict a token), inside the forward pass."""
        device = self.device
        inputs: dict[str, Any] = {
            "input_ids": to_device(batch.input_ids_BL, device),
            "position_ids": to_device(batch.position_ids_BL, device),
        }
        if batch.segments is not None:
            inputs["segments"] = batch.segments
        if batch.attention_mask_BL is not None:
            inputs["attention_mask"] = to_device(batch.attention_mask_BL, device)
        if self.router is not None:
            inputs["output_router_logits"] = True

        def at_head(head: HeadInputs) -> R:
            torch.clear_autocast_cache()  # of the layers' weights, which are cast no more
            return function(head)

        with self.autocast(), answering_objectives(self.causal_lm):
            return run_at_head(self.causal_lm, inputs, to_device(batch.row_T, device), at_head)

    def hidden(self, batch: MicroBatch) -> Tensor:
        """hidden_TD, the last hidden states of the rows that predict a token, before the head."""
        return self.at_head(batch, lambda head: head.hidden_TD)

    def router_loss(self, head: HeadInputs, batch: MicroBatch) -> Tensor | None:
        """The router's loss, summed over groups; None where there is no router."""
        if self.router is None:
            return None
        assert head.router_logits is not None, "asked for in `at_head`"
        with self.autocast(enabled=False):
            return self.router.loss(head.router_logits, batch)


def causal_lm_of(model: Any) -> PreTrainedModel:
    """The Transformers model inside an adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
