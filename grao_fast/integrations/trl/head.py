"""What happens at the LM head, inside the model's forward pass.

Suffixes: B or S rows of L tokens, C columns that are scored, T tokens, D width, 3 terms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grao_fast.integrations.trl.rows import Rows
from grao_fast.kernels import OffPolicy, PolicyLoss, linear_logprobs, linear_policy_loss
from grao_fast.models.head import LogitTransform, check_head
from grao_fast.models.parity import check_parity
from grao_fast.models.policy import Policy, causal_lm_of
from grao_fast.sampling import Sampler
from grao_fast.system.errors import UserError

Objective = Callable[[PreTrainedModel, Tensor], Any]


def answer_objectives(causal_lm: PreTrainedModel) -> None:
    """Let `causal_lm(..., objective=f)` return f(causal_lm, last hidden states).

    DDP and FSDP need the loss to come out of the forward pass that they watch, and inside it FSDP
    has the head's weight whole. Without `objective` the forward pass is what it was.
    """
    without = causal_lm.forward

    @functools.wraps(without)  # `generate` reads the signature
    def forward(
        self: PreTrainedModel, *arguments: Any, objective: Objective | None = None, **named: Any
    ) -> Any:
        if objective is None:
            return without(*arguments, **named)
        named = {name: value for name, value in named.items() if value is not None}  # of PEFT
        output = self.base_model(*arguments, **named, use_cache=False)
        return objective(self, output.last_hidden_state)

    causal_lm.forward = MethodType(forward, causal_lm)


def embedding_rows_of(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens the model has an embedding of; ValueError if padding is none of them."""
    rows = len(causal_lm_of(model).get_input_embeddings().weight)
    if tokenizer.pad_token_id >= rows:
        raise UserError(
            f"the padding token {tokenizer.pad_token!r} is beyond the model's embedding of {rows} "
            "rows: set tokenizer.pad_token=tokenizer.eos_token"
        )
    return rows


def logit_transform_of(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    autocast_dtype: torch.dtype | None,
    compare: bool,
) -> LogitTransform:
    """How the kernels make the model's logits, held to the model's own where asked to `compare`.

    Raises ValueError, by name, for a model whose logits are others.
    """
    causal_lm = causal_lm_of(model)
    check_head(causal_lm)
    transform = LogitTransform.from_config(causal_lm.config.get_text_config())
    if not compare:
        return transform
    policy = Policy(
        model=model,
        causal_lm=causal_lm,
        tokenizer=tokenizer,
        eos_token_ids=frozenset([tokenizer.eos_token_id]),
        pad_token_id=tokenizer.pad_token_id,
        transform=transform,
        autocast_dtype=autocast_dtype,
        share_prefix=False,
        attention=None,
        router=None,
        sampler=cast(Sampler, None),  # TRL samples
    )
    check_parity(policy, gradient=False)  # of its layers, which run as they are
    return transform


def loss_of(
    rows: Rows, terms_3T: Tensor, logits: dict[str, Any], off_policy: OffPolicy | None
) -> Objective:
    """The loss of a micro-batch, its terms, log-probs and entropies, in one pass.

    It is `linear_policy_loss` on coefficients that are known already: `linear_grao_loss` weighs
    whole groups, and TRL's micro-batches split them.
    """

    def objective(causal_lm: PreTrainedModel, hidden_SLD: Tensor) -> PolicyLoss:
        head = causal_lm.get_output_embeddings()
        row_T = rows.row_T.to(hidden_SLD.device)
        # No head_grad_VD, as DDP must see the head's gradient.
        return linear_policy_loss(
            hidden_SLD.flatten(0, 1).index_select(0, row_T),
            head.weight,
            rows.target_T,
            terms_3T,
            off_policy=off_policy,
            bias_V=head.bias,
            entropy=True,
            **logits,
        )

    return objective


def scores_of(input_ids_BL: Tensor, counts_BC: Tensor, logits: dict[str, Any]) -> Objective:
    """(B, C) log-probs of the last C tokens, 0 where they do not count."""
    C = counts_BC.shape[1]

    def objective(causal_lm: PreTrainedModel, hidden_BLD: Tensor) -> Tensor:
        head = causal_lm.get_output_embeddings()
        logprob_BC = torch.zeros(counts_BC.shape, device=hidden_BLD.device)
        logprob_BC[counts_BC] = linear_logprobs(
            hidden_BLD[:, -C - 1 : -1][counts_BC],
            head.weight,
            input_ids_BL[:, -C:][counts_BC],
            bias_V=head.bias,
            **logits,
        ).logprob_T
        return logprob_BC

    return objective
