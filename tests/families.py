"""Tiny models of many families, and two groups to run through them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from grao_fast.data.packing import Group, MicroBatch
from grao_fast.models.policy import Policy

SIZES = {
    "vocab_size": 77,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral": {"sliding_window": 4},
    "Gemma2": {"sliding_window": 4, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 0.5},
    "Gemma3Text": {"sliding_window": 4, "sliding_window_pattern": 2},
    "Phi3": {},
    "Granite": {"logits_scaling": 3.0, "residual_multiplier": 0.5},
    "Olmo2": {},
    "Cohere2": {"logit_scale": 0.3, "sliding_window": 4, "sliding_window_pattern": 2},
    "Mixtral": {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.1},
    "Qwen3Moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.1,
    },
}
# Of layers that carry a state: gated delta rule, short convolution, and two with Mamba 2, beside
# attention in one layer and without any.
HYBRIDS = {
    "Qwen3Next": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 0,
        "mlp_only_layers": [0, 1],
    },
    "Lfm2": {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
    "FalconH1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
        "lm_head_multiplier": 0.5,
    },
    "Mamba2": {
        "num_heads": 8,
        "head_dim": 8,
        "state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
        "num_attention_heads": None,
        "num_key_value_heads": None,
        "max_position_embeddings": None,
    },
}
GROUPS = [
    Group(
        [5, 6, 7, 8, 9, 10],
        [[11, 12, 13], [14], [15, 16, 17, 18, 19, 20, 1]],
    ),
    Group(
        [21, 22],
        [[23, 24, 25, 26, 27, 28], [29, 30, 1], [31]],
        torch.tensor([[1.0, 0.0, -0.5]], dtype=torch.float64),
    ),
]


def family_model(name: str, **sizes: Any) -> transformers.PreTrainedModel:
    """Two layers with random weights, norms included: fresh ones would hide a misplaced scale."""
    torch.manual_seed(0)
    options = SIZES | (FAMILIES | HYBRIDS).get(name, {}) | sizes
    given = {option: value for option, value in options.items() if value is not None}
    config = getattr(transformers, f"{name}Config")(**given)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.0 if parameter.ndim > 1 else 1.0, std=0.2)
    return model


def gradients(policy: Policy, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The hidden states of a batch, and every gradient of a sum that tells all of them apart.

    The router's loss is part of that sum where there is one.
    """
    policy.model.zero_grad()
    with policy.updating():
        hidden, router_loss = policy.at_head(
            batch, lambda head: (head.hidden_TD, policy.router_loss(head, batch))
        )
        total = (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum()
        (total if router_loss is None else total + router_loss).backward()
    named = policy.model.named_parameters()
    return hidden.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_same(ours: tuple, theirs: tuple) -> None:
    """Relative 1e-5 in the max norm of each tensor: float32 rounding through two layers."""
    (hidden, shared), (expected, repeated) = ours, theirs
    assert torch.allclose(hidden, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert shared.keys() == repeated.keys()
    for name, gradient in repeated.items():
        error = float((shared[name] - gradient).abs().max())
        assert error <= 1e-5 * float(gradient.abs().max()), name
