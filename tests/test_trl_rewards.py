"""Rewards of references in TRL: fields that samples alone have, and totals that tie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoTokenizer

pytest.importorskip("trl")

from trl_runs import config, prompts, run

from grao_fast.integrations.trl.rewards import equal_to_rounding, totals
from grao_fast.kernels.advantage import group_advantages

LIVE = ["live"] * 6


def rollout_of(model: Path) -> Callable[[list, Any], dict[str, list]]:
    """A rollout_func whose environment rewards each sample by a number of its own."""
    tokenizer = AutoTokenizer.from_pretrained(model)

    def rollout(prompts: list, trainer: Any) -> dict[str, list]:
        ids = [tokenizer.apply_chat_template(each, add_generation_prompt=True) for each in prompts]
        return {
            "prompt_ids": [each["input_ids"] for each in ids],
            "completion_ids": [[10 + b, 20, 1] for b in range(len(prompts))],
            "logprobs": [[-1.0] * 3] * len(prompts),
            "env_reward": [float(b) for b in range(len(prompts))],
        }

    return rollout


def test_a_reference_has_no_field_of_rollout_func(tiny_model: Path, tmp_path: Path):
    """Not its first sample's either: a reward that needs one is refused, or the dataset has it."""

    def named(env_reward: list, **_: Any) -> list[float]:
        return env_reward

    def looked_up(**columns: Any) -> list[float]:
        return columns["env_reward"]

    def optional(completions: list, env_reward: Any = None, **_: Any) -> list[float]:
        seen.append(env_reward)
        return env_reward or [9.0] * len(completions)

    seen: list[Any] = []
    rollout = rollout_of(tiny_model)
    for function, name in ((named, "named"), (looked_up, "a reward function")):
        with pytest.raises(ValueError, match=f"{name} needs `env_reward`, which samples alone"):
            run(
                tiny_model,
                config(tmp_path),
                prompts(LIVE),
                reward_funcs=function,
                rollout_func=rollout,
            )
    trainer = run(
        tiny_model, config(tmp_path), prompts(LIVE), reward_funcs=optional, rollout_func=rollout
    )
    assert seen == [[0.0, 1.0, 2.0, 3.0, 4.0, 5.0], None]
    assert trainer.state.log_history[0]["reference/reward"] == 9.0
    data = prompts(LIVE).add_column("reference_reward", [2.5] * 5 + [None])
    args = config(tmp_path, shuffle_dataset=False)  # whose first batch lacks the last row
    with pytest.raises(ValueError, match="give the reference of train_dataset, row 5, a reward"):
        run(tiny_model, args, data, reward_funcs=named, rollout_func=rollout)
    data = prompts(LIVE).add_column("reference_reward", [2.5] * 6)
    trainer = run(tiny_model, config(tmp_path), data, reward_funcs=named, rollout_func=rollout)
    assert trainer.state.log_history[0]["reference/reward"] == 2.5


def test_totals_that_differ_by_rounding_tie(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """0.1 + 0.2 for each sample and 0.3 for the reference: the group is dead.

    What goes to a device is float32, since some have no float64.
    """

    def a_tenth(completions: list, **_: Any) -> list[float]:
        return [0.1] * len(completions)

    def two_tenths(completions: list, **_: Any) -> list[float]:
        return [0.2] * len(completions)

    gathered, gather = set(), Accelerator.gather

    def watched(self: Accelerator, tensor: torch.Tensor) -> torch.Tensor:
        gathered.add(tensor.dtype)
        return gather(self, tensor)

    monkeypatch.setattr(Accelerator, "gather", watched)
    data = prompts(LIVE).add_column("reference_reward", [0.3] * 6)
    trainer = run(tiny_model, config(tmp_path), data, reward_funcs=[a_tenth, two_tenths])
    assert trainer.state.log_history[0]["frac_dead"] == 1
    assert not any(bool(each.any()) for each in trainer.gradients[0])
    assert torch.float32 in gathered and torch.float64 not in gathered


@pytest.mark.parametrize("statistics", ["group", "samples"])
def test_rounding_is_of_the_size_of_what_is_added_up(statistics: str):
    """Parts that cancel leave the rounding of the parts; differences above it stay."""
    parts_SF = torch.tensor([[0.7, -0.4, 0.1], [0.1, 0.2, 0.1], [0.6, -0.3, 0.1], [0.3, 0.0, 0.2]])
    total_S, size_S = totals(parts_SF, torch.tensor([1.0, 1.0, 0.5]))
    apart_NK = torch.tensor([[0.35, 0.35 + 1e-4, 0.35], [torch.nan, torch.nan, 0.3]]).double()
    rewards_NK = torch.cat([total_S[None, :3], apart_NK])
    assert rewards_NK[0].unique().numel() > 1
    size_N = torch.tensor([float(size_S.max()), 0.35, 0.0])
    rounded_NK = equal_to_rounding(rewards_NK, size_N)
    assert rounded_NK[0].unique().numel() == 1
    torch.testing.assert_close(rounded_NK[1:], rewards_NK[1:], rtol=0, atol=0, equal_nan=True)
    dead_K, live_K, _ = group_advantages(rounded_NK, statistics=statistics)
    assert not dead_K.any() and live_K.abs().max() > 0.5
