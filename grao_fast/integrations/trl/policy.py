"""The policy of a TRL run: its logits, and whether and how its passes share prompts."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grao_fast.distributed.world import World
from grao_fast.integrations.trl.zero import gathering, is_partitioned
from grao_fast.models.attention import choose_attention
from grao_fast.models.head import LogitTransform, check_head
from grao_fast.models.parity import check_parity
from grao_fast.models.policy import Policy, causal_lm_of
from grao_fast.models.sharding import whole_shape
from grao_fast.system.errors import UserError
from grao_fast.system.visible import get_logger

logger = get_logger(__name__)

# Where a model was given another attention, prompts are shared only if asked for.
_DEFAULT_ATTENTIONS = ("sdpa", "eager")


def embedding_rows_of(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of tokens that the model embeds; UserError if padding is not one of them."""
    rows, _ = whole_shape(causal_lm_of(model).get_input_embeddings().weight)
    if tokenizer.pad_token_id >= rows:
        raise UserError(
            f"the padding token {tokenizer.pad_token!r} is beyond the model's embedding of {rows} "
            "rows: set tokenizer.pad_token=tokenizer.eos_token"
        )
    return rows


def policy_of(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    device: torch.device,
    *,
    share_prefix: bool | None,
    autocast_dtype: torch.dtype | None,
    recompute: bool,
) -> Policy:
    """The model as a policy, checked against the model's own logits.

    Rank 0 checks, since the others may not have weights yet. Where ZeRO-3 has split the model,
    every process does, since each has a part of it.

    Args:
        device: of the run. FSDP moves the model there only later.
        share_prefix: None: where the check finds that the model allows it, and its attention is
            Transformers' default.
        recompute: whether the backward pass recomputes layers.

    Raises:
        UserError: the model's logits differ.
    """
    causal_lm = causal_lm_of(model)
    check_head(causal_lm)
    policy = Policy(
        model=model,
        causal_lm=causal_lm,
        transform=LogitTransform.from_config(causal_lm.config.get_text_config()),
        autocast_dtype=autocast_dtype,
        pad_token_id=tokenizer.pad_token_id,
    )

    def sharing_on(device: torch.device) -> Policy:
        attention = choose_attention(
            causal_lm,
            device,
            backend="auto",
            share_prefix=True,
            recompute=recompute,
            dtype=autocast_dtype or causal_lm.dtype,
        )
        return replace(policy, share_prefix=True, attention=attention)

    split = is_partitioned(model)

    def shares() -> bool:
        with gathering(model) if split else nullcontext():
            if share_prefix or (share_prefix is None and _has_default_attention(causal_lm)):
                try:
                    check_parity(sharing_on(policy.device), gradient=not split)
                    return True
                except UserError as error:
                    if share_prefix:
                        raise
                    logger.warning("each prompt is computed for each of its samples: %s", error)
            check_parity(policy, gradient=False)  # its layers run as they are
            return False

    shared = world.each(shares)[0] if split else world.main(shares)
    return sharing_on(device) if shared else policy


def _has_default_attention(causal_lm: PreTrainedModel) -> bool:
    attention = causal_lm.config._attn_implementation
    if attention not in _DEFAULT_ATTENTIONS:
        logger.info(
            "each prompt is computed for each of its samples, by the attention %r; "
            "share_prefix=True computes it once, by another one",
            attention,
        )
    return attention in _DEFAULT_ATTENTIONS
