"""What TRL's own tests ask of GRPOTrainer's tools and environments, asked of GRAOTrainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

pytest.importorskip("trl")

import trl.trainer.grpo_trainer as trls
from trl_beside import OfGRAO, assert_sampled_alike, both, make, messages, moved, said
from trl_tools import save_tool_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tool_model(tmp_path_factory.mktemp("llama"))


class Counter:
    """An environment that counts."""

    def reset(self, **row: Any) -> None:
        self.count, self.row = 0, row

    def increment(self, step: int) -> int:
        """Increments the count.

        Args:
            step: By how much.
        """
        self.count += step
        return self.count


class Scored(Counter):
    def get_reward(self) -> float:
        return float(self.count)


class Echo:
    """An environment that repeats, and gives the prompt."""

    def reset(self, **row: Any) -> str:
        self.count, self.row = 0, row
        return "Say something."

    def shout(self, text: str) -> str:
        """Repeats a text in capitals.

        Args:
            text: The text.
        """
        self.count += 1
        return text.upper()


def call(name: str, **arguments: Any) -> str:
    function = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{function}\n</tool_call>"


def multiply(a: int, b: int) -> int:
    """Multiplies two numbers.

    Args:
        a: The one number.
        b: The other number.
    """
    return a * b


async def multiply_later(a: int, b: int) -> int:
    """Multiplies two numbers.

    Args:
        a: The one number.
        b: The other number.
    """
    return a * b


def told(completions: list, **_: Any) -> list[float]:
    """By the last turn's text, and by how many turns there are."""
    return [float(len(said(each)) + 3 * len(each)) for each in completions]


def multiplied(name: str) -> list[str]:
    return [call(name, a=3, b=4), call(name, a=3, c=4), "no tool"]


COUNTED = [call("increment", step=1), call("decrement", step=2), "no tool"]
MALFORMED = [
    '<tool_call>\n{"arguments": {"a": 3, "b": 4}}\n</tool_call>',
    '<toolcall>\n{"arguments": {"a": 3, "b": 4}}\n</toolcall> so',
    '<tool_call>\n{"arguments": {a: 3, b: 4}}\n</tool_call>',
]
MIXED = Dataset.from_list(
    [{"environment": each, "reference": "I did"} for each in ["counter", "echo"] * 2]
)
OF_MIXED = {"num_generations": 2, "per_device_train_batch_size": 4, "shuffle_dataset": False}
OF_EACH = [call("increment", step=1), "no tool", call("shout", text="hi"), "none"]
TOOLS: dict[str, tuple[Any, Any, dict[str, Any], list[str], tuple[float, float], list[int]]] = {
    # Data, rewards, options, first turns, frequencies of calls and failures, counts at the end.
    "a tool": (messages(), told, {"tools": [multiply]}, multiplied("multiply"), (2 / 3, 1 / 2), []),
    "a tool that waits": (
        messages(),
        told,
        {"tools": [multiply_later]},
        multiplied("multiply_later"),
        (2 / 3, 1 / 2),
        [],
    ),
    "malformed calls": (messages(), told, {"tools": [multiply]}, MALFORMED, (0, 0), []),
    "an environment": (
        messages(),
        told,
        {"environment_factory": Counter},
        COUNTED,
        (2 / 3, 1 / 2),
        [1, 0, 0],
    ),
    "an environment's reward": (
        messages(reference_reward=0.5),
        None,
        {"environment_factory": Scored},
        COUNTED,
        (2 / 3, 1 / 2),
        [1, 0, 0],
    ),
    "its reward and another": (
        messages(reference_reward=0.5),
        [told],
        {"environment_factory": Scored, "reward_weights": [0.5]},
        COUNTED,
        (2 / 3, 1 / 2),
        [1, 0, 0],
    ),
    "several environments": (
        MIXED,
        told,
        {"environment_factory": {"counter": Counter, "echo": Echo}, **OF_MIXED},
        OF_EACH,
        (1 / 2, 0),
        [1, 0, 1, 0],
    ),
    "several environments, one with a reward": (
        MIXED.add_column("reference_reward", [9.0] * 4),
        [told],
        {"environment_factory": {"counter": Scored, "again": Scored, "echo": Echo}, **OF_MIXED},
        OF_EACH,
        (1 / 2, 0),
        [1, 0, 1, 0],
    ),
}


@pytest.mark.parametrize("case", TOOLS)
def test_tools_are_called_as_trl_calls_them(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
):
    monkeypatch.setattr(trls, "is_jmespath_available", lambda: False)
    data, rewards, options, turns, frequencies, counts = TOOLS[case]

    def speak(prompts: list[str]) -> list[str]:
        return turns if len(prompts) == len(turns) else ["done!"] * len(prompts)

    theirs, ours = both(
        llama, tmp_path, rewards, data, speak=speak, max_completion_length=400, **options
    )
    assert_sampled_alike(theirs, ours)
    entry = ours.state.log_history[0]
    assert (entry["tools/call_frequency"], entry["tools/failure_frequency"]) == pytest.approx(
        frequencies
    )
    assert [each.count for each in ours.environments or []] == counts
    assert all("environment" not in each.row for each in ours.environments or [])
    assert ours.reward_func_names == theirs.reward_func_names
    assert ours.reward_weights.tolist() == theirs.reward_weights.tolist()
    assert moved(ours) == set(ours.began)


def test_data_of_an_environments_own_have_no_references(llama: Path, tmp_path: Path):
    """GRPOTrainer trains without a dataset; GRAOTrainer has nothing to compare with."""
    with pytest.raises(ValueError, match="gives prompts and no references: pass a dataset"):
        make(OfGRAO, llama, tmp_path, told, None, environment_factory=Echo)


def test_an_unknown_environment_is_refused(llama: Path, tmp_path: Path):
    factories = {"environment_factory": {"one": Counter}}
    trainer = make(OfGRAO, llama, tmp_path, told, messages(environment="other"), **factories)
    with pytest.raises(ValueError, match="`environment='other'`, which is not among"):
        trainer.train()
