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
from grao_fast.sampling.cache import kept_by
from grao_fast.sampling.choose import check_sharing
from grao_fast.system.errors import UserError
from grao_fast.system.visible import get_logger

logger = get_logger(__name__)

# With another attention, prompts are shared only if the option says so.
_REPLACED = ("sdpa", "eager")


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
    *,
    share_prefix: bool | None,
    autocast_dtype: torch.dtype | None,
    recompute: bool,
) -> Policy:
    """The model as a policy, checked against the model's own logits.

    Rank 0 checks, since the others may not have weights yet. Where ZeRO-3 has split the model,
    every process does, since each has a part of it.

    Args:
        share_prefix: None: where the check finds that the model allows it, and its attention is
            "sdpa" or "eager".
        recompute: whether the backward pass will recompute layers.

    Raises:
        UserError: the model's logits differ.
    """
    causal_lm = causal_lm_of(model)
    check_head(causal_lm, copies=True)
    split = is_partitioned(model)
    repeating = Policy(
        model=model,
        causal_lm=causal_lm,
        transform=LogitTransform.from_config(causal_lm.config.get_text_config()),
        autocast_dtype=autocast_dtype,
        pad_token_id=tokenizer.pad_token_id,
    )
    # For the device of the weights. FSDP moves them only later: what is checked is what runs.
    attention = choose_attention(
        causal_lm,
        repeating.device,
        backend="auto",
        share_prefix=True,
        recompute=recompute or repeating.recomputes,
        dtype=autocast_dtype or causal_lm.dtype,
    )
    sharing = replace(repeating, share_prefix=True, attention=attention)

    def why_not() -> str | None:
        try:
            check_sharing(causal_lm, kept_by(causal_lm, autocast_dtype))
            check_parity(sharing, gradient=not split)
        except UserError as error:
            if share_prefix:
                raise
            return str(error)
        return None

    with gathering(model) if split else nullcontext():
        run = world.each if split else lambda check: [world.main(check)]
        if share_prefix or (share_prefix is None and _is_free(causal_lm, world)):
            reasons = [why for why in run(why_not) if why is not None]
            if not reasons:
                return sharing
            _warn(reasons[0], world)
        run(lambda: check_parity(repeating, gradient=False))  # its layers run as they are
    return repeating


def _is_free(causal_lm: PreTrainedModel, world: World) -> bool:
    """Whether the model's attention may be replaced, as far as nobody has said."""
    attention = causal_lm.config._attn_implementation
    if attention in _REPLACED:
        return True
    _warn(
        f"the attention is {attention!r}; set share_prefix=False to keep it, or True to take "
        "another one",
        world,
    )
    return False


def _warn(why: str, world: World) -> None:
    if world.is_main:
        logger.warning("each prompt is computed for each of its samples: %s", why)
