"""The auxiliary loss of a mixture of experts, which balances the load of the experts.

Where the model's config asks for it (`output_router_logits`), it is taken group by group and
averaged over the prompts of a step, as J is:

    loss = -J + coef / N * sum_n balance(group n)

The loss is not linear in its tokens, so taken over a micro-batch it would depend on how the step is
split; taken over a group it does not. A dead group is not computed and adds nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grao_fast.data.packing import MicroBatch
from grao_fast.kernels.devices import to_device
from grao_fast.models.sharding import own_class
from grao_fast.system.errors import UserError
from grao_fast.system.interruption import as_outside, held


@contextmanager
def no_router_loss(causal_lm: PreTrainedModel) -> Iterator[None]:
    """Turn the router's loss off for the block: Transformers cannot compute it with a cache."""
    asked = getattr(causal_lm.config, "output_router_logits", None)
    if not asked:
        yield
        return
    with held():  # the configuration could be saved meanwhile
        try:
            causal_lm.config.output_router_logits = False
            with as_outside():
                yield
        finally:
            causal_lm.config.output_router_logits = True


@dataclass(frozen=True)
class Router:
    """The auxiliary loss as the model's own module defines it.

    balance: (logits of every layer, number of experts, experts of a token) -> loss.
    coef: its weight beside the loss proper.
    """

    balance: Callable[..., Tensor]
    num_experts: int
    num_experts_per_tok: int
    coef: float

    @classmethod
    def of(cls, causal_lm: PreTrainedModel) -> Router | None:
        """The router of a model whose config asks for its loss, else None; UserError if unknown."""
        if not getattr(causal_lm.config, "output_router_logits", False):
            return None
        module = sys.modules[own_class(causal_lm).__module__]
        names = ("num_experts", "num_experts_per_tok", "router_aux_loss_coef")
        missing = [name for name in names if not hasattr(causal_lm, name)]
        if not hasattr(module, "load_balancing_loss_func") or missing:
            raise UserError(
                f"{own_class(causal_lm).__name__} has output_router_logits set, but "
                f"{missing[0] if missing else 'load_balancing_loss_func'} is not where other "
                "mixtures of experts have it; set model.config.output_router_logits = False"
            )
        return cls(module.load_balancing_loss_func, *(getattr(causal_lm, n) for n in names))

    def loss(self, router_logits: tuple[Tensor, ...], batch: MicroBatch) -> Tensor:
        """The sum over the groups of a micro-batch, weighted by `coef`; a scalar.

        router_logits: for each layer (B * L, experts), of the flattened rows.
        """
        losses = []
        for place_T in batch.place_NT:
            place_T = to_device(place_T, router_logits[0].device)
            of_group = tuple(logits.index_select(0, place_T) for logits in router_logits)
            losses.append(self.balance(of_group, self.num_experts, self.num_experts_per_tok))
        return self.coef * torch.stack(losses).sum()
