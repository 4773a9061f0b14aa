"""The policy: a causal language model split where `linear_grao_loss` takes over, at its head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grao_fast.config import GRAOConfig
from grao_fast.data.decoding import completion_texts, ending_ids
from grao_fast.data.packing import Group, MicroBatch, pack, pad
from grao_fast.kernels.devices import to_device
from grao_fast.models.adapters import check_all_saved, is_peft_model
from grao_fast.models.attention import attending, choose_attention, keep_score_cap
from grao_fast.models.attention.frequencies import hold_frequencies
from grao_fast.models.beginning import Beginning
from grao_fast.models.checks import check_weights, tell_of_dropout
from grao_fast.models.head import LogitTransform, check_head
from grao_fast.models.loading import load_model
from grao_fast.models.parity import check_parity
from grao_fast.models.router import Router
from grao_fast.sampling import Completion, Sampler
from grao_fast.sampling.cache import Kept, kept_by
from grao_fast.sampling.choose import check_sharing, choose_sampler
from grao_fast.sampling.proof import check_sampler
from grao_fast.system.errors import UserError
from grao_fast.system.visible import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class Policy:
    """A model with what training and sampling need of it.

    model: as it is trained and saved; a PeftModel where an adapter is trained.
    causal_lm: the Transformers model inside (the same object without an adapter).
    autocast_dtype: bfloat16, or None to compute in the parameters' dtype.
    attention: of updates, as `choose_attention` gives it.
    router: the auxiliary loss of a mixture of experts; None: there is none.
    beginning: what training began with, for the KL term, and to resume where an adapter has altered
        its base; None where it is not needed.
    base: digest of the base model before an adapter's first weights altered it; None: they did not,
        or it is not known.
    """

    model: nn.Module
    causal_lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: frozenset[int]
    pad_token_id: int
    transform: LogitTransform
    autocast_dtype: torch.dtype | None
    share_prefix: bool
    attention: str | None
    router: Router | None
    sampler: Sampler
    beginning: Beginning | None = None
    base: str | None = None

    @property
    def device(self) -> torch.device:
        return self.causal_lm.device

    @property
    def context_length(self) -> int | None:
        """Tokens of prompt and completion that model and sampler hold; None: nothing says so."""
        of_model = getattr(self.causal_lm.config, "max_position_embeddings", None)
        return min(filter(None, (of_model, self.sampler.context_length)), default=None)

    @property
    def recomputes(self) -> bool:
        """Whether layers are computed again in the backward pass."""
        return any(getattr(m, "gradient_checkpointing", False) for m in self.causal_lm.modules())

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight (V, D) and bias (V,) of the language-model head, as parameters."""
        head = self.causal_lm.get_output_embeddings()
        return head.weight, head.bias

    def head_grad(self) -> Tensor | None:
        """The weight's `grad`, made if need be, for the loss to add to; None where it is frozen."""
        weight, _ = self.head()
        if not (weight.requires_grad and torch.is_grad_enabled()):
            return None
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        return weight.grad

    def autocast(self) -> torch.autocast:
        """The context in which this policy computes."""
        return torch.autocast(
            self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None
        )

    @property
    def embedding_rows(self) -> int:
        """Tokens that the model can read and write; its tokenizer may know more."""
        model: Any = self.causal_lm
        embeddings = model.get_input_embeddings(), model.get_output_embeddings()
        return min(embedding.weight.shape[0] for embedding in embeddings)

    def decode(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Completion]
    ) -> list[str]:
        """Texts of completions, each behind its own prompt; see `completion_texts`."""
        ids = [completion.token_ids for completion in completions]
        return completion_texts(self.tokenizer, prompts, ids, self._ending_ids)

    @cached_property
    def _ending_ids(self) -> frozenset[int]:
        return ending_ids(self.tokenizer, self.eos_token_ids)

    def answer(self, prompts: list[list[int]], *, max_new_tokens: int, seed: int) -> list[str]:
        """The greedy completion of every prompt, as text."""
        groups = self.sampler.sample(
            prompts, num_generations=1, max_new_tokens=max_new_tokens, temperature=0.0, seed=seed
        )
        return self.decode(prompts, [group[0] for group in groups])

    def lay_out(self, groups: list[Group]) -> MicroBatch:
        """The groups as this policy computes them: packed behind shared prompts, or padded."""
        return pack(groups) if self.share_prefix else pad(groups, pad_token_id=self.pad_token_id)

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Training mode, for forward and backward passes over micro-batches."""
        self.model.train()
        with torch.enable_grad(), attending(self.causal_lm, self.attention):
            yield

    @contextmanager
    def as_it_began(self) -> Iterator[Policy]:
        """This policy as it was before training, in evaluation mode, inside `updating`."""
        assert self.beginning is not None, "it is kept where kl_coef is not 0"
        self.model.eval()
        with self.beginning.restored():
            yield self
        self.model.train()

    def hidden(self, batch: MicroBatch) -> Tensor:
        """hidden_TD, the last hidden states of the rows that predict a token, before the head."""
        return self.hidden_and_router_loss(batch)[0]

    def hidden_and_router_loss(self, batch: MicroBatch) -> tuple[Tensor, Tensor | None]:
        """`hidden`, and the router's loss summed over groups; None where there is no router."""
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
        with self.autocast():
            out = self.causal_lm.base_model(**inputs, use_cache=False)
        rows_T = to_device(batch.row_T, device)
        hidden_TD = out.last_hidden_state.flatten(0, 1).index_select(0, rows_T)
        return hidden_TD, self.router.loss(out.router_logits, batch) if self.router else None


def causal_lm_of(model: Any) -> PreTrainedModel:
    """The Transformers model inside an adapter, or the model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def load_policy(
    model: str | Path | nn.Module,
    *,
    config: GRAOConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    peft_config: Any = None,
    trained: bool = True,
) -> Policy:
    """Load a model for training or sampling, and check that it is understood.

    Args:
        model: a folder or hub id of a model, or of an adapter, which is continued on its base; or
            a causal language model of Transformers, or a PeftModel.
        config: `device`, `bf16`, `gradient_checkpointing`, `share_prefix`, `kl_coef` and what
            concerns the sampler are read.
        tokenizer: of the model; None loads the one beside it.
        peft_config: a peft config; its adapter is trained instead of the model.
        trained: False for a model that is only to answer: gradients are not checked.

    Raises:
        ValueError: a path that is not there, no tokenizer, no end-of-sequence token, an adapter on
            the head, logits or gradients that differ from the model's own, an attention backend
            or Liger that cannot serve, or a vLLM that cannot.
        ConnectionError: no vLLM server answers.
    """
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device is {config.device!r} but no CUDA device is available")
    bf16 = config.bf16
    if bf16 is None:
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    model, tokenizer, base = load_model(
        model,
        device=device,
        bf16=bf16,
        tokenizer=tokenizer,
        peft_config=peft_config,
        trained=trained,
        liger=config.use_liger_kernel,
    )
    check_weights(model)
    causal_lm = causal_lm_of(model)
    check_head(causal_lm)
    keep_score_cap(causal_lm)
    # until the lengths of a run are known, as long as can be
    hold_frequencies(causal_lm, getattr(causal_lm.config, "max_position_embeddings", None))
    if trained and is_peft_model(model):
        check_all_saved(model)
    if config.gradient_checkpointing and not causal_lm.supports_gradient_checkpointing:
        logger.warning("%s cannot recompute activations: none are", type(causal_lm).__name__)
    elif config.gradient_checkpointing:
        _checkpoint_activations(causal_lm)
        if hasattr(model, "peft_config"):
            causal_lm.enable_input_require_grads()
    dtype = torch.bfloat16 if bf16 else None
    kept = kept_by(causal_lm, dtype)
    if config.share_prefix:
        check_sharing(causal_lm, kept)
    eos = _eos_token_ids(causal_lm, tokenizer)
    pad_id = _pad_token_id(causal_lm, tokenizer)
    policy = Policy(
        model=model,
        causal_lm=causal_lm,
        tokenizer=tokenizer,
        eos_token_ids=eos,
        pad_token_id=pad_id,
        transform=LogitTransform.from_config(causal_lm.config.get_text_config()),
        autocast_dtype=dtype,
        share_prefix=config.share_prefix,
        attention=choose_attention(
            causal_lm,
            device,
            backend=config.attention_backend,
            share_prefix=config.share_prefix,
            recompute=config.gradient_checkpointing,
        ),
        router=Router.of(causal_lm),
        sampler=_sampler(causal_lm, kept, config, eos, pad_id, dtype),
        beginning=Beginning(model) if config.kl_coef or base else None,
        base=base,
    )
    if trained:
        tell_of_dropout(causal_lm)
    check_parity(policy, gradient=trained)
    if not config.use_vllm:  # which is proved when it has the weights
        check_sampler(policy)
    return policy


def _sampler(
    causal_lm: PreTrainedModel,
    kept: Kept,
    config: GRAOConfig,
    eos_token_ids: frozenset[int],
    pad_token_id: int,
    dtype: torch.dtype | None,
) -> Sampler:
    if not config.use_vllm:
        return choose_sampler(
            causal_lm,
            kept,
            eos_token_ids=eos_token_ids,
            pad_token_id=pad_token_id,
            batch_size=config.generation_batch_size,
            dtype=dtype,
            static_cache=config.cache_implementation == "static",
        )
    from grao_fast.sampling.vllm import VLLMColocatedSampler, VLLMServerSampler
    from grao_fast.sampling.vllm.client import api_key

    if config.vllm_mode == "server":
        return VLLMServerSampler(
            config.vllm_server_base_url,
            model=config.vllm_server_model or causal_lm.name_or_path,
            eos_token_ids=eos_token_ids,
            sync_dir=config.vllm_sync_dir,
            api_key=api_key(config.vllm_server_api_key_env),
        )
    return VLLMColocatedSampler(
        eos_token_ids=eos_token_ids,
        sync_dir=config.vllm_sync_dir,
        gpu_memory_utilization=config.vllm_gpu_memory_utilization,
        max_model_length=config.vllm_max_model_length,
    )


def _checkpoint_activations(causal_lm: PreTrainedModel) -> None:
    """Transformers 5.23 renamed the method; both take these options."""
    renamed = hasattr(causal_lm, "activation_checkpointing_enable")
    name = "activation_checkpointing_enable" if renamed else "gradient_checkpointing_enable"
    getattr(causal_lm, name)({"use_reentrant": False})


def _pad_token_id(causal_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's, or one that the model has: nothing attends to it."""
    embeddings: Any = causal_lm.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in ids if token is not None and token < rows), 0)


def _eos_token_ids(
    causal_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    generation = getattr(causal_lm, "generation_config", None)
    ids = getattr(generation, "eos_token_id", None)
    listed = [] if ids is None else torch.as_tensor(ids).flatten().tolist()  # also of a tuple
    return frozenset([*listed, tokenizer.eos_token_id])
