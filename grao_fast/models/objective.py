"""Losses made at the language-model head, inside the model's own forward pass.

DDP and FSDP expect the loss to come out of the forward pass that they wrap, and FSDP2 gathers the
head's weight only inside it. A loss is therefore a closure that the model runs in its `forward`.
It is not a set of tensor arguments: FSDP2 casts those. DeepSpeed's ZeRO-3 gathers a weight only
inside the forward and backward passes of the module that owns it, so the closure runs in the
`forward` of the head itself.

Suffixes: B rows of L tokens, T rows that predict a token, D width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from grao_fast.models.head import head_layers

R = TypeVar("R")

Objective = Callable[[PreTrainedModel, Any], Any]


class HeadInputs(NamedTuple):
    """Everything a loss needs from the model.

    hidden_TD: last hidden states of the rows that predict a token.
    head_VD, bias_V: parameters of the head, unsharded; bias_V is None where the head has none.
    router_logits: for each layer (B * L, experts), where the model was asked for them.
    """

    hidden_TD: Tensor
    head_VD: Tensor
    bias_V: Tensor | None
    router_logits: tuple[Tensor, ...] | None


def run_at_head(
    model: nn.Module, inputs: Mapping[str, Any], row_T: Tensor, function: Callable[[HeadInputs], R]
) -> R:
    """Run the model over `inputs` and return function(head inputs), evaluated in its forward pass.

    Args:
        model: a model that answers objectives (see `answer_objectives`), bare or wrapped in an
            adapter, DDP or FSDP.
        inputs: keyword arguments of the model's forward.
        row_T: int64 on the model's device, places in the flattened (B * L) rows.
    """

    def objective(causal_lm: PreTrainedModel, output: Any) -> R:
        head = causal_lm.get_output_embeddings()
        assert head is not None, "see check_head"

        def forward(layer: nn.Module, hidden_BLD: Tensor) -> R:
            return function(
                HeadInputs(
                    hidden_TD=hidden_BLD.flatten(0, 1).index_select(0, row_T),
                    head_VD=layer.weight,
                    bias_V=layer.bias,
                    router_logits=getattr(output, "router_logits", None),
                )
            )

        with ExitStack() as replaced:
            for layer in head_layers(head):
                replaced.enter_context(_forward_of(layer, functools.partial(forward, layer)))
            return head(output.last_hidden_state)

    return model(**inputs, objective=objective)


def answer_objectives(causal_lm: PreTrainedModel) -> None:
    """Let `causal_lm(..., objective=f)` return f(causal_lm, output of its base model).

    Without `objective` the forward pass is unchanged.
    """
    without = causal_lm.forward
    function = getattr(without, "__func__", None)  # None for a patch that is no method

    @functools.wraps(without)  # `generate` reads the signature
    def forward(
        self: PreTrainedModel, *arguments: Any, objective: Objective | None = None, **named: Any
    ) -> Any:
        if objective is None and function is not None:
            return function(self, *arguments, **named)  # `self` may be a deep copy of the model
        if objective is None:
            return without(*arguments, **named)
        # PEFT passes every argument that it knows, None where it was not given
        named = {name: value for name, value in named.items() if value is not None}
        return objective(self, self.base_model(*arguments, **named, use_cache=False))

    causal_lm.forward = MethodType(forward, causal_lm)


@contextmanager
def answering_objectives(causal_lm: PreTrainedModel) -> Iterator[None]:
    """Apply `answer_objectives` inside the block, and restore the model's own forward after it."""
    with _forward_of(causal_lm, causal_lm.forward):
        answer_objectives(causal_lm)
        yield


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's `forward` inside the block; its hooks run as they did."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
