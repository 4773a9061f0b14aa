"""From a name or a module to a checked policy with its tokenizer and its sampler.

This lies above models and samplers, since both are proved before the policy is given out: the model
by `check_parity`, the sampler by `check_sampler`. Training and evaluation load through it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grao_fast.config import GRAOConfig
from grao_fast.distributed.world import World
from grao_fast.models.adapters import check_all_saved, is_peft_model
from grao_fast.models.attention import choose_attention, keep_score_cap
from grao_fast.models.attention.frequencies import hold_frequencies
from grao_fast.models.beginning import Beginning
from grao_fast.models.checks import check_weights, warn_of_dropout
from grao_fast.models.head import LogitTransform, check_head
from grao_fast.models.loading import load_model
from grao_fast.models.parity import check_parity
from grao_fast.models.placement import Placement
from grao_fast.models.policy import Policy, causal_lm_of
from grao_fast.models.router import Router
from grao_fast.models.sharding import gathered, reshard
from grao_fast.sampling import Sampler
from grao_fast.sampling.cache import Kept, kept_by
from grao_fast.sampling.choose import check_own_sampler, check_sharing, choose_sampler
from grao_fast.sampling.loaded import LoadedPolicy
from grao_fast.sampling.model_sampler import Decoding
from grao_fast.sampling.proof import check_sampler
from grao_fast.system.visible import get_logger

logger = get_logger(__name__)


def load_policy(
    model: str | Path | nn.Module,
    *,
    config: GRAOConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    peft_config: Any = None,
    trained: bool = True,
    sampler: Sampler | None = None,
    world: World | None = None,
) -> LoadedPolicy:
    """Load a model for training or sampling, and check that its loss and samples are its own.

    Args:
        model: a folder or hub id of a model, or of an adapter, which is continued on its base; or
            a causal language model of Transformers, or a PeftModel.
        config: `device`, `bf16`, `gradient_checkpointing`, `share_prefix`, `kl_coef` and the
            sampler's options are read.
        tokenizer: of the model; None loads the one beside it.
        peft_config: a peft config; its adapter is trained instead of the model.
        trained: False for a model that only answers: gradients are not checked.
        sampler: one of the user's own, checked as others are; None: as config says.
        world: the processes to shard it over; None: this one alone.

    Raises:
        ValueError: a path that does not exist, no tokenizer, no end-of-sequence token, an adapter
            on the head, logits or gradients that differ from the model's own, an attention backend
            or Liger that cannot serve, or a vLLM that cannot.
        ConnectionError: no vLLM server answers.
    """
    world = World() if world is None else world
    if sampler is not None:
        world.together(lambda: check_own_sampler(sampler, use_vllm=config.use_vllm))
    placement = Placement.of(config, world, trains=trained)
    device, dtype = placement.device, placement.compute_dtype
    source = load_model(
        model,
        device=device,
        bf16=dtype is not None,
        tokenizer=tokenizer,
        peft_config=peft_config,
        trained=trained,
        liger=config.use_liger_kernel,
        world=world,
    )
    model, tokenizer, base_digest = source.model, source.tokenizer, source.base_digest
    causal_lm = causal_lm_of(model)
    _prepare(model, causal_lm, recompute=config.gradient_checkpointing, trained=trained)
    transform = LogitTransform.from_config(causal_lm.config.get_text_config())
    router = Router.of(causal_lm)
    defers_reduction = placement.shard(model, causal_lm)
    if source.outline is not None:
        source.outline.fill(device, cpu_offload=placement.cpu_offload)
    world.each(lambda: check_weights(model))
    with gathered(causal_lm):
        kept = world.each(lambda: kept_by(causal_lm, dtype))[0]
    if config.share_prefix:
        check_sharing(causal_lm, kept)
    policy = Policy(
        model=model,
        causal_lm=causal_lm,
        transform=transform,
        autocast_dtype=dtype,
        share_prefix=config.share_prefix,
        attention=choose_attention(
            causal_lm,
            device,
            backend=config.attention_backend,
            share_prefix=config.share_prefix,
            recompute=config.gradient_checkpointing,
            dtype=dtype or causal_lm.dtype,
        ),
        pad_token_id=_pad_token_id(causal_lm, tokenizer),
        router=router,
        world=placement.world,
        computes_on=device,
        defers_reduction=defers_reduction,
    )
    eos_ids = _eos_token_ids(causal_lm, tokenizer)
    needs_beginning = config.objective_options.needs_beginning
    if sampler is not None:
        sampler.sync(policy)
    loaded = LoadedPolicy(
        policy=policy,
        tokenizer=tokenizer,
        eos_token_ids=eos_ids,
        sampler=world.together(
            lambda: (
                _sampler(policy, tokenizer, eos_ids, kept, config) if sampler is None else sampler
            )
        ),
        beginning=Beginning(model) if needs_beginning or base_digest else None,
        base_digest=base_digest,
    )
    if trained:
        warn_of_dropout(causal_lm)
    check_parity(policy, gradient=trained)
    if not config.use_vllm:  # vLLM is checked when it first gets the weights
        check_sampler(loaded.sampler, policy)
    reshard(model)  # an optimiser would otherwise get the whole parameters of the last pass
    return loaded


def _prepare(
    model: nn.Module, causal_lm: PreTrainedModel, *, recompute: bool, trained: bool
) -> None:
    """Check head and adapter, and set attention, rotary frequencies and recomputation."""
    check_head(causal_lm)
    keep_score_cap(causal_lm)
    # the longest context that the model has, until the lengths of a run are known
    hold_frequencies(causal_lm, getattr(causal_lm.config, "max_position_embeddings", None))
    if trained and is_peft_model(model):
        check_all_saved(model)
    if recompute and not causal_lm.supports_gradient_checkpointing:
        logger.warning("%s cannot recompute activations: all are kept", type(causal_lm).__name__)
    elif recompute:
        _checkpoint_activations(causal_lm)
        if hasattr(model, "peft_config"):
            causal_lm.enable_input_require_grads()


def _sampler(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    eos_token_ids: frozenset[int],
    kept: Kept,
    config: GRAOConfig,
) -> Sampler:
    if not config.use_vllm:
        decoding = Decoding(
            eos_token_ids=eos_token_ids,
            pad_token_id=policy.pad_token_id,
            batch_size=config.generation_batch_size,
            dtype=policy.autocast_dtype,
        )
        static_cache = config.cache_implementation == "static"
        return choose_sampler(policy.causal_lm, kept, decoding, static_cache=static_cache)
    from grao_fast.sampling.vllm import VLLMColocatedSampler, VLLMServerSampler
    from grao_fast.sampling.vllm.client import api_key

    if config.vllm_mode == "server":
        return VLLMServerSampler(
            config.vllm_server_base_url,
            model=config.vllm_server_model or policy.causal_lm.name_or_path,
            tokenizer=tokenizer,
            eos_token_ids=eos_token_ids,
            sync_dir=config.vllm_sync_dir,
            api_key=api_key(config.vllm_server_api_key_env),
            samples_on=config.async_rollouts > 1,  # see grao_fast.training.ahead
            world=policy.world,
        )
    return VLLMColocatedSampler(
        tokenizer=tokenizer,
        eos_token_ids=eos_token_ids,
        sync_dir=config.vllm_sync_dir,
        gpu_memory_utilization=config.vllm_gpu_memory_utilization,
        max_model_length=config.vllm_max_model_length,
        tensor_parallel_size=config.vllm_tensor_parallel_size,
        world=policy.world,
    )


def _checkpoint_activations(causal_lm: PreTrainedModel) -> None:
    """Transformers 5.23 renamed the method; both take these options."""
    renamed = hasattr(causal_lm, "activation_checkpointing_enable")
    name = "activation_checkpointing_enable" if renamed else "gradient_checkpointing_enable"
    getattr(causal_lm, name)({"use_reentrant": False})


def _pad_token_id(causal_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's padding or end token, or 0 where the model embeds neither."""
    embeddings: Any = causal_lm.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in ids if token is not None and token < rows), 0)


def _eos_token_ids(
    causal_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    """Those of the model's generation_config, and the tokenizer's."""
    generation = getattr(causal_lm, "generation_config", None)
    ids = getattr(generation, "eos_token_id", None)
    listed = [] if ids is None else torch.as_tensor(ids).flatten().tolist()  # also of a tuple
    return frozenset([*listed, tokenizer.eos_token_id])
