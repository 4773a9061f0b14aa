"""FlexAttention as CUDA compiles it, beside SDPA in parts: the gradients of a whole model."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from step_problem import Case, make_model, make_rollout
from torch import Tensor

from suite.runner import Run, Skipped

if TYPE_CHECKING:
    from grao_fast.models.policy import Policy
    from grao_fast.training.step import Rollout

# Rows of one block of 128 tokens, of a few, and of many.
CASES = [
    Case(prompts=1, samples=2, prompt_tokens=12, response_tokens=10),
    Case(prompts=1, samples=3, prompt_tokens=150, response_tokens=60),
    Case(prompts=3, samples=4, prompt_tokens=90, response_tokens=130),
    Case(prompts=4, samples=8, prompt_tokens=256, response_tokens=128),
]


def attention(run: Run) -> str:
    """Errors of gradients, with layers recomputed and not; compilations, and seconds with them."""
    if run.device.type != "cuda":
        raise Skipped("needs CUDA")
    if importlib.util.find_spec("transformers") is None:
        raise Skipped("transformers is not installed")
    from torch._dynamo.utils import counters

    worst = 0.0
    for recompute in (True, False):
        start = time.monotonic()
        policy = _policy(recompute)
        report = run.report["recomputed" if recompute else "kept"] = {
            "attention": policy.attention,
            "loaded_and_checked_s": round(time.monotonic() - start, 2),
        }
        for case in CASES:
            rollout = make_rollout(case, policy.causal_lm.config.vocab_size)
            name = f"{case}, recompute={recompute}"
            if not run.in_time(name):
                continue
            start = time.monotonic()
            ours = _gradient(policy, rollout)
            took = round(time.monotonic() - start, 2)
            parts = _gradient(replace(policy, attention="grao_parts"), rollout)
            off = float((ours - parts).norm() / parts.norm())
            report[str(case)] = {"seconds": took, "off": off}
            report["compiled"] = counters["stats"]["unique_graphs"]
            worst = max(worst, off)
            allowed = torch.finfo(torch.bfloat16).eps ** 0.5  # as in step_race
            if not off <= allowed:
                raise AssertionError(f"{name}: gradients differ by {off:.2g}, {allowed:.2g} passes")
    return f"gradients within {worst:.1e} of SDPA's, {counters['stats']['unique_graphs']} compiled"


def _policy(recompute: bool) -> Policy:
    from grao_fast.config import GRAOConfig
    from grao_fast.models.policy import load_policy

    model, tokenizer = make_model("attention", "cuda")
    config = GRAOConfig(
        device="cuda", attention_backend="flex", gradient_checkpointing=recompute, workspace_mib=64
    )
    return load_policy(model, config=config, tokenizer=tokenizer)


def _gradient(policy: Policy, rollout: Rollout) -> Tensor:
    """Of every parameter, one behind the other."""
    from grao_fast.config import GRAOConfig
    from grao_fast.training.step import micro_batch_loss, to_groups

    groups = to_groups(rollout, beta=0.5, lam=0.6)
    policy.model.zero_grad()
    with policy.updating():
        batch = policy.lay_out(groups)
        loss = micro_batch_loss(policy, batch, GRAOConfig(), num_prompts=len(groups)).loss
        loss.backward()
    gradients = [p.grad for p in policy.model.parameters() if p.grad is not None]
    return torch.cat([gradient.flatten() for gradient in gradients])
