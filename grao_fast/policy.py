"""The policy: a causal language model split where `linear_grao_loss` takes over, at its head."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from grao_fast.attention import shared_prefix
from grao_fast.batch import Group, MicroBatch, pack, pad
from grao_fast.config import GRAOConfig
from grao_fast.parity import check_parity
from grao_fast.rollout import Completion
from grao_fast.rollout.transformers import TransformersSampler

logger = logging.getLogger(__name__)

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
        scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None)
        scaling = getattr(config, "logits_scaling", None)
        if scaling is not None:
            scale = (
                1 / scaling if config.model_type.startswith(_DIVIDES_LOGITS_SCALING) else scaling
            )
        return cls(float(scale or 1.0), getattr(config, "final_logit_softcapping", None))


@dataclass(frozen=True)
class Policy:
    """A model with what training and sampling need of it.

    model: as it is trained and saved; a PeftModel where an adapter is trained.
    causal_lm: the Transformers model inside (the same object without an adapter).
    autocast_dtype: bfloat16, or None to compute in the parameters' dtype.
    """

    model: nn.Module
    causal_lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: frozenset[int]
    pad_token_id: int
    transform: LogitTransform
    autocast_dtype: torch.dtype | None
    share_prefix: bool
    sampler: TransformersSampler

    @property
    def device(self) -> torch.device:
        return self.causal_lm.device

    @property
    def context_length(self) -> int | None:
        """Positions the model has, prompt and completion together; None where it does not say."""
        return getattr(self.causal_lm.config, "max_position_embeddings", None)

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight (V, D) and bias (V,) of the language-model head, as parameters."""
        head = self.causal_lm.get_output_embeddings()
        return head.weight, head.bias

    def autocast(self) -> torch.autocast:
        """The context in which this policy computes."""
        return torch.autocast(
            self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None
        )

    def decode(self, completions: Sequence[Completion]) -> list[str]:
        """Texts of completions, without special tokens."""
        return self.tokenizer.batch_decode(
            [completion.token_ids for completion in completions], skip_special_tokens=True
        )

    def answer(self, prompts: list[list[int]], *, max_new_tokens: int, seed: int) -> list[str]:
        """The greedy completion of every prompt, as text."""
        groups = self.sampler.sample(
            prompts, num_generations=1, max_new_tokens=max_new_tokens, temperature=0.0, seed=seed
        )
        return self.decode([group[0] for group in groups])

    def lay_out(self, groups: list[Group]) -> MicroBatch:
        """The groups as this policy computes them: packed behind shared prompts, or padded."""
        return pack(groups) if self.share_prefix else pad(groups, pad_token_id=self.pad_token_id)

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Training mode, for forward and backward passes over micro-batches."""
        self.model.train()
        if not self.share_prefix:
            yield
            return
        with shared_prefix(self.causal_lm):
            yield

    def hidden(self, batch: MicroBatch) -> Tensor:
        """hidden_TD, the last hidden states of the rows that predict a token, before the head."""
        device = self.device
        inputs: dict[str, Any] = {
            "input_ids": batch.input_ids_BL.to(device, non_blocking=True),
            "position_ids": batch.position_ids_BL.to(device, non_blocking=True),
        }
        if batch.segments is not None:
            inputs["segments"] = batch.segments
        if batch.attention_mask_BL is not None:
            inputs["attention_mask"] = batch.attention_mask_BL.to(device, non_blocking=True)
        with self.autocast():
            hidden = self.causal_lm.base_model(**inputs, use_cache=False).last_hidden_state
        rows = batch.row_T.to(device, non_blocking=True)
        return hidden.flatten(0, 1).index_select(0, rows)


def load_policy(
    model: str | Path | nn.Module,
    *,
    config: GRAOConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    peft_config: Any = None,
) -> Policy:
    """Load a model for training or sampling, and check that its head is understood.

    Args:
        model: a folder, a hub id, or a causal language model of Transformers (or a PeftModel).
        config: `device`, `bf16`, `gradient_checkpointing`, `share_prefix` and
            `generation_batch_size` are read.
        tokenizer: of the model; None loads the one beside it.
        peft_config: a peft config; its adapter is trained instead of the model.

    Raises:
        ValueError: a path that is not there, no tokenizer, no end-of-sequence token, an adapter on
            the head, or logits that differ from the model's own.
    """
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {config.device!r} but no CUDA device is available")
    bf16 = config.bf16
    if bf16 is None:
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    tokenizer = tokenizer or _load_tokenizer(model)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {_name(model)} has no eos_token; set tokenizer.eos_token"
        )
    if not isinstance(model, nn.Module):
        frozen_bf16 = bf16 and peft_config is not None
        with _loading(model):
            model = AutoModelForCausalLM.from_pretrained(
                existing_path(model), dtype=torch.bfloat16 if frozen_bf16 else torch.float32
            )
    model = model.to(device)
    if peft_config is not None:
        model = _with_adapter(model, peft_config)
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    _check_head(causal_lm)
    if config.gradient_checkpointing and not causal_lm.supports_gradient_checkpointing:
        logger.warning("%s cannot recompute activations: none are", type(causal_lm).__name__)
    elif config.gradient_checkpointing:
        _checkpoint_activations(causal_lm)
        if hasattr(model, "peft_config"):
            causal_lm.enable_input_require_grads()
    dtype = torch.bfloat16 if bf16 else None
    eos = _eos_token_ids(causal_lm, tokenizer)
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    policy = Policy(
        model=model,
        causal_lm=causal_lm,
        tokenizer=tokenizer,
        eos_token_ids=eos,
        pad_token_id=pad_id,
        transform=LogitTransform.from_config(causal_lm.config.get_text_config()),
        autocast_dtype=dtype,
        share_prefix=config.share_prefix,
        sampler=TransformersSampler(
            causal_lm,
            eos_token_ids=eos,
            pad_token_id=pad_id,
            batch_size=config.generation_batch_size,
            dtype=dtype,
        ),
    )
    check_parity(policy)
    return policy


def existing_path(name: str | Path) -> str:
    """A hub id as it is; what looks like a path must be a folder."""
    text = str(Path(name).expanduser()) if str(name).startswith("~") else str(name)
    looks_like_path = isinstance(name, Path) or text.startswith((".", "/")) or text.count("/") > 1
    if looks_like_path and not Path(text).is_dir():
        raise ValueError(f"model folder {text!r} does not exist; give a folder or a hub id")
    return text


def _load_tokenizer(model: str | Path | nn.Module) -> PreTrainedTokenizerBase:
    name = (
        getattr(model, "name_or_path", "") if isinstance(model, nn.Module) else existing_path(model)
    )
    if not name:
        raise ValueError("a model given as a module needs its tokenizer: pass tokenizer=...")
    with _loading(name):
        return AutoTokenizer.from_pretrained(name)


@contextmanager
def _loading(name: str | Path) -> Iterator[None]:
    """Transformers' reasons for not loading, many lines long, as one that names the model."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"cannot load model {str(name)!r}: {reason}") from error


def _name(model: str | Path | nn.Module) -> str:
    return type(model).__name__ if isinstance(model, nn.Module) else str(model)


def _with_adapter(model: nn.Module, peft_config: Any) -> nn.Module:
    from peft import get_peft_model

    if peft_config.is_prompt_learning:
        raise ValueError(
            f"{type(peft_config).__name__} prepends virtual tokens, which packed prompts cannot "
            "hold; use a LoRA-like adapter"
        )
    try:
        return get_peft_model(model, peft_config)
    except ValueError as error:
        raise ValueError(f"the adapter does not fit {_name(model)}: {error}") from error


def _checkpoint_activations(causal_lm: PreTrainedModel) -> None:
    """Transformers 5.23 renamed the method; both take these options."""
    enable = getattr(
        causal_lm, "activation_checkpointing_enable", causal_lm.gradient_checkpointing_enable
    )
    enable({"use_reentrant": False})


def _check_head(causal_lm: PreTrainedModel) -> None:
    if getattr(causal_lm.config, "output_router_logits", False):
        raise ValueError(
            "output_router_logits asks for the router's auxiliary loss, which GRAO's step does not "
            "add yet: set model.config.output_router_logits = False"
        )
    head = causal_lm.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise ValueError(
            f"the language-model head of {type(causal_lm).__name__} is a {type(head).__name__}, "
            "where a plain Linear is needed; leave lm_head out of target_modules and "
            "modules_to_save, and load it unquantised"
        )


def _eos_token_ids(
    causal_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    generation = getattr(causal_lm, "generation_config", None)
    ids = getattr(generation, "eos_token_id", None)
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    return frozenset([*listed, tokenizer.eos_token_id])
