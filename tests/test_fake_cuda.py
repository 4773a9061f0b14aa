"""Training steps and samples on CUDA tensors without values: devices, dtypes, where the host waits.

What the host sees of the device is 0, where a test lets it look.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import fake_cuda
import pytest
import torch
from families import GROUPS, family_model
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoTokenizer, PreTrainedModel

from grao_fast.config import GRAOConfig
from grao_fast.data.encoding import Encoded
from grao_fast.data.examples import Example
from grao_fast.distributed.tensors import save_tensors
from grao_fast.distributed.world import World
from grao_fast.kernels import group_advantages
from grao_fast.models import policy as policy_module
from grao_fast.models.attention import flex, varlen
from grao_fast.models.parity import check_parity
from grao_fast.models.policy import Policy
from grao_fast.objectives.grao import GRAO
from grao_fast.sampling import Completion, loading
from grao_fast.sampling.loaded import LoadedPolicy
from grao_fast.sampling.loading import load_policy
from grao_fast.training.checkpoint import OPTIMIZER
from grao_fast.training.group_shape import GroupShape
from grao_fast.training.memory import token_budget
from grao_fast.training.optim import adamw, moments_of
from grao_fast.training.rollout import Rollout
from grao_fast.training.state import load_optimizer
from grao_fast.training.step import micro_batch_loss, update

pytestmark = pytest.mark.skipif(fake_cuda.why_not() is not None, reason=str(fake_cuda.why_not()))

CONFIG = GRAOConfig(
    device="cuda", num_generations=2, temperature=1.0, workspace_mib=1, max_tokens_per_microbatch=20
)
LAYOUTS: dict[str, dict[str, Any]] = {
    "grao_flex": {},
    "grao_parts": {"attention_backend": "sdpa"},
    "grao_varlen": {"attention_backend": "varlen"},
    "stock": {"share_prefix": False},
}


@pytest.fixture(autouse=True)
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are on the device when they are made; nothing is compiled."""

    def as_in_a_trace(*args: Any, **kwargs: Any) -> Tensor:
        with patch.object(torch.compiler, "is_dynamo_compiling", lambda: True):
            return flex_attention(*args, **kwargs)

    fake_cuda.launch_nothing(monkeypatch)
    monkeypatch.setattr(flex, "_compiled", lambda: as_in_a_trace)
    monkeypatch.setattr(PreTrainedModel, "to", lambda model, device: model)
    monkeypatch.setattr(PreTrainedModel, "get_compiled_call", lambda model, options: model)
    for check in ("check_weights", "check_parity", "check_sampler"):  # of values
        monkeypatch.setattr(loading, check, lambda *args, **options: None)
    flex.block_mask.cache_clear()
    varlen.plan_of.cache_clear()


def load(tiny_model: Path, **options: Any) -> tuple[LoadedPolicy, GRAOConfig]:
    config = CONFIG.replace(**options)
    with torch.device("cuda"):
        model = family_model("Qwen3", head_dim=16, max_position_embeddings=256)
    loaded = load_policy(model, config=config, tokenizer=AutoTokenizer.from_pretrained(tiny_model))
    assert loaded.policy.autocast_dtype == torch.bfloat16 and model.dtype == torch.float32
    return loaded, config


def backward(policy: Policy, config: GRAOConfig) -> None:
    with policy.updating():
        batch = policy.lay_out(GROUPS)
        micro_batch_loss(
            policy,
            batch,
            config.objective_options,
            num_prompts=2,
            workspace_mib=config.workspace_mib,
        ).loss.backward()


def prompts() -> list[Encoded]:
    return [Encoded(Example("", "", {}), g.prompt_ids, g.sequence_ids[-1], "") for g in GROUPS]


@pytest.mark.parametrize(
    ("layout", "recompute"), [*((layout, True) for layout in LAYOUTS), ("grao_flex", False)]
)
def test_a_micro_batch_waits_for_nothing(layout: str, recompute: bool, tiny_model: Path) -> None:
    """Forward, loss and backward; gradients are where their parameters are, in float32."""
    with fake_cuda.fake_cuda(may_wait=True):
        loaded, config = load(tiny_model, gradient_checkpointing=recompute, **LAYOUTS[layout])
    assert (loaded.policy.attention or "stock") == layout
    with fake_cuda.fake_cuda():
        backward(loaded.policy, config)
        for name, parameter in loaded.model.named_parameters():
            gradient = parameter.grad
            assert gradient is not None and gradient.is_cuda, name
            assert gradient.dtype == torch.float32, name


@pytest.mark.parametrize("options", [{}, {"num_iterations": 2, "kl_coef": 0.1}])
def test_an_update(options: dict[str, Any], tiny_model: Path) -> None:
    """With clipping, AdamW and metrics; the norm of the gradient is 0, for what the host knows."""
    rewards_NK = torch.tensor([[1.0, 0.0, 0.5], [0.0, 2.0, 1.0]], dtype=torch.float64)
    completions = [
        [Completion(ids, [-1.0] * len(ids), finished=True) for ids in group.sequence_ids[:-1]]
        for group in GROUPS
    ]
    rollout = Rollout(
        prompts(), completions, [["", ""]] * 2, rewards_NK, group_advantages(rewards_NK), {}, {}
    )
    with fake_cuda.fake_cuda(may_wait=True, look=0):
        loaded, config = load(tiny_model, **options)
        optimizer = adamw(loaded.model, config.optimisation)
        scheduler = LambdaLR(optimizer, lambda step: 1.0)
        metrics = update(
            loaded.policy,
            optimizer,
            scheduler,
            rollout,
            objective=config.objective_options,
            optimisation=config.optimisation,
            max_tokens=config.max_tokens_per_microbatch,
            beginning=loaded.beginning,
        )
    assert metrics["grad_norm"] == 0 and metrics["flops/done"] > 0
    moments = [value for state in optimizer.state.values() for value in state.values()]
    assert len(moments) == 3 * len(list(loaded.model.parameters()))
    assert all(moment.device.type == "cuda" for moment in moments)  # step counts too: it is fused


def test_a_checkpoint_of_a_cpu_is_loaded_for_fused_adamw(tmp_path: Path, tiny_model: Path) -> None:
    """Step counts are on the device for fused AdamW, and on the CPU for the other."""
    model = family_model("Qwen3", head_dim=16)
    plain = torch.optim.AdamW(model.parameters())
    for parameter in plain.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    plain.step()
    schedule = LambdaLR(plain, lambda step: 1.0)
    save_tensors(moments_of(model, plain), tmp_path / OPTIMIZER, World())
    with fake_cuda.fake_cuda(may_wait=True):
        loaded, _ = load(tiny_model)
        fused = torch.optim.AdamW(loaded.model.parameters(), fused=True)
        state = {"scheduler": schedule.state_dict()}
        options = loaded.model, fused, LambdaLR(fused, lambda step: 1.0), state, World()
        load_optimizer(tmp_path, *options)
        assert all(group["fused"] for group in fused.param_groups)
        assert all(x.is_cuda for state in fused.state.values() for x in state.values())


@pytest.mark.parametrize(("temperature", "cache"), [(1.0, "dynamic"), (0.0, "static")])
def test_a_sample(temperature: float, cache: str, tiny_model: Path) -> None:
    """No sequence has ended, for what the host knows, and none has a token."""
    with fake_cuda.fake_cuda(may_wait=True, look=0):
        loaded, _ = load(tiny_model, cache_implementation=cache)
        groups = loaded.sampler.sample(
            [[5, 6, 7], [8]],
            num_generations=2,
            max_new_tokens=4,
            temperature=temperature,
            seeds=[0, 1],
        )
    assert groups == [[Completion([], [], finished=False)] * 2] * 2


@pytest.mark.parametrize("layout", ["grao_flex", "stock"])
def test_the_check_at_the_start(layout: str, tiny_model: Path) -> None:
    """It comes to its end: an error of 0, of logits of 0."""
    with fake_cuda.fake_cuda(may_wait=True, look=0):
        loaded, _ = load(tiny_model, **LAYOUTS[layout])
        check_parity(loaded.policy)


def test_the_probe_of_the_memory(tiny_model: Path) -> None:
    """Two groups take 100 bytes, for what PyTorch's allocator says here."""
    allocator = {
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: 0,
        "max_memory_allocated": lambda device: 100,
        "memory_reserved": lambda device: 0,
        "mem_get_info": lambda device: (2**30, 2**30),
        "get_rng_state": lambda device: None,
        "set_rng_state": lambda state, device: None,
    }
    with fake_cuda.fake_cuda(may_wait=True):
        loaded, config = load(tiny_model, max_tokens_per_microbatch=None, max_new_tokens=5)
    with fake_cuda.fake_cuda(), patch.multiple(torch.cuda, **allocator):
        found = token_budget(
            loaded.policy,
            adamw(loaded.model, config.optimisation),
            GroupShape.largest(prompts(), config.sampling, GRAO()),
            config.objective_options,
            most=2,
            workspace_mib=config.workspace_mib,
        )
    assert found == 2 * (6 + 2 * 5 + 7)
    assert all(parameter.grad is None for parameter in loaded.model.parameters())


def test_what_is_left_on_the_cpu_is_seen(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail."""
    monkeypatch.setattr(policy_module, "to_device", lambda tensor, device: tensor)
    with (
        fake_cuda.fake_cuda(may_wait=True),
        pytest.raises(RuntimeError, match="two devices"),
    ):
        loaded, config = load(tiny_model)
        backward(loaded.policy, config)
