"""Attention over a shared prefix by CUDA's kernels, beside SDPA in parts: a model's gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
from step_problem import Case, make_model, make_rollout
from torch import Tensor

from grao_fast.config import GRAOConfig
from grao_fast.config.views import AttentionBackend
from grao_fast.models.policy import Policy
from grao_fast.sampling.loading import load_policy
from grao_fast.training.coefficients import to_groups
from grao_fast.training.rollout import Rollout
from grao_fast.training.step import micro_batch_loss

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

# Rows of one block of 128 tokens, of a few, and of many.
CASES = [
    Case(prompts=1, samples=2, prompt_tokens=12, response_tokens=10),
    Case(prompts=1, samples=3, prompt_tokens=150, response_tokens=60),
    Case(prompts=3, samples=4, prompt_tokens=90, response_tokens=130),
    Case(prompts=4, samples=8, prompt_tokens=256, response_tokens=128),
]


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("backend", ["flex", "varlen"])
def test_kernels_give_the_gradient_of_sdpa(backend: AttentionBackend, recompute: bool) -> None:
    model, tokenizer = make_model("attention", "cuda")
    config = GRAOConfig(
        device="cuda",
        attention_backend=backend,
        gradient_checkpointing=recompute,
        workspace_mib=64,
    )
    policy = load_policy(model, config=config, tokenizer=tokenizer).policy
    for case in CASES:
        rollout = make_rollout(case, model.config.vocab_size)
        ours = gradient(policy, rollout)
        parts = gradient(replace(policy, attention="grao_parts"), rollout)
        assert parts.any()
        off = float((ours - parts).norm() / parts.norm())
        assert off <= torch.finfo(torch.bfloat16).eps ** 0.5, case  # half of the digits


def gradient(policy: Policy, rollout: Rollout) -> Tensor:
    """The gradients of all parameters in one vector."""
    objective = GRAOConfig().objective_options
    groups = to_groups(rollout, objective)
    policy.model.zero_grad()
    with policy.updating():
        batch = policy.lay_out(groups)
        micro_batch_loss(policy, batch, objective, num_prompts=len(groups)).loss.backward()
    gradients = [p.grad for p in policy.model.parameters() if p.grad is not None]
    return torch.cat([each.flatten() for each in gradients])
