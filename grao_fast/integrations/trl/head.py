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
from grao_fast.kernels import linear_logprobs
from grao_fast.kernels.checks import choose_backend, logit_transform
from grao_fast.kernels.linear_ce import WeightedTerms, weighted_terms
from grao_fast.kernels.vocab_parallel import local_parts
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
    rows: Rows, terms_3T: Tensor, logits: dict[str, Any], off_policy: dict[str, Any]
) -> Objective:
    """The loss of a micro-batch, its terms, and log-probs and entropies, in one pass.

    Not `linear_grao_loss`, which weighs whole groups, and a micro-batch of TRL's holds parts of
    them: the terms are known already. `off_policy` is given on as it is.
    """

    def objective(causal_lm: PreTrainedModel, hidden_SLD: Tensor) -> WeightedTerms:
        head = causal_lm.get_output_embeddings()
        row_T = rows.row_T.to(hidden_SLD.device)
        hidden_TD = hidden_SLD.flatten(0, 1).index_select(0, row_T)
        return weighted_terms(
            local_parts(hidden_TD, head.weight, head.bias, None),
            rows.target_T,
            terms_3T,
            logit_transform(**logits),
            None,  # the workspace: the device's default
            choose_backend(None, hidden_TD.device),
            None,  # DDP must see the head's gradient: it goes by autograd
            entropy=True,
            **off_policy,
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
