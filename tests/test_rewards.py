"""Tests of rewards: finding functions, their arguments, checks, sums and comparisons."""

from __future__ import annotations

import asyncio
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grao_fast.data.examples import Example
from grao_fast.rewards import Reward, RewardError, resolve_reward

NAN = math.nan
EXAMPLES = [Example("p0", "ref", {"k": 1}), Example("p1", "refer", {"k": 2})]
GROUPS = [["a", "bb"], ["ccc", "dddd"]]


def length(completions: list[str], **columns: Any) -> list[float]:
    return [len(completion) for completion in completions]


def longer(completions: list[str], references: list[str]) -> list[float]:
    """Return +1, 0 or -1: the longer text wins."""
    pairs = zip(completions, references, strict=True)
    return [float(np.sign(len(mine) - len(other))) for mine, other in pairs]


def pointwise(spec: Any, examples: list[Example] = EXAMPLES, **options: Any) -> list[list[float]]:
    reward = resolve_reward(spec, **options)
    scores = reward.score_groups(examples, GROUPS[: len(examples)], reward_type="pointwise")
    assert scores.rewards_NK.dtype == torch.float64
    return scores.rewards_NK.tolist()


# ---- arguments of functions


def test_pointwise_scores_samples_and_references_in_one_call() -> None:
    calls = []

    def reward(prompts: list[str], completions: list[str], k: list[int]) -> list[float]:
        calls.append((prompts, completions, k))
        return [
            len(completion) + 10.0 * item for completion, item in zip(completions, k, strict=True)
        ]

    assert pointwise(reward) == [[11, 12, 13], [23, 24, 25]]
    assert calls == [
        (["p0"] * 3 + ["p1"] * 3, ["a", "bb", "ref", "ccc", "dddd", "refer"], [1, 1, 1, 2, 2, 2])
    ]


def test_pairwise_compares_with_references_and_scores_them_zero() -> None:
    calls = []

    def reward(completions: list[str], references: list[str]) -> list[float]:
        calls.append((completions, references))
        return longer(completions, references)

    scores = resolve_reward(reward).score_groups(EXAMPLES, GROUPS, reward_type="pairwise")
    assert scores.rewards_NK.tolist() == [[-1, -1, 0], [-1, -1, 0]]
    assert calls == [(["a", "bb", "ccc", "dddd"], ["ref", "ref", "refer", "refer"])]
    assert scores.per_function == {"reward": -1.0}


def test_conversations_are_given_as_messages() -> None:
    prompt = [{"role": "user", "content": "hi"}]
    seen: dict[str, Any] = {}

    def reward(**everything: Any) -> list[float]:
        seen.update(everything)
        return [0.0] * len(everything["completions"])

    examples = [Example(prompt, "yes", {"k": 1})]
    resolve_reward(reward).score_groups(examples, [["no"]], reward_type="pairwise")
    assert seen == {
        "prompts": [prompt],
        "completions": [[{"role": "assistant", "content": "no"}]],
        "references": [[{"role": "assistant", "content": "yes"}]],
        "k": [1],
    }


def test_absent_references() -> None:
    examples = [EXAMPLES[0], Example("p1", None, {"k": 2})]
    assert str(pointwise(length, examples)) == str([[1.0, 2.0, 3.0], [3.0, 4.0, NAN]])
    scores = resolve_reward(longer).score_groups(examples, GROUPS, reward_type="pairwise")
    assert str(scores.rewards_NK.tolist()) == str([[-1.0, -1.0, 0.0], [NAN, NAN, NAN]])
    alone = resolve_reward(longer).score_groups(examples[1:], GROUPS[1:], reward_type="pairwise")
    assert alone.rewards_NK.isnan().all()


def test_methods_partials_objects_and_builtins() -> None:
    class Judge:
        def __call__(self, completions: list[str]) -> list[float]:
            return length(completions)

        def method(self, completions: list[str], scale: float = 1.0) -> list[float]:
            return [scale * value for value in length(completions)]

    for function in (
        Judge(),
        Judge().method,
        functools.partial(Judge().method, scale=1.0),
        lambda completions: length(completions),
    ):
        assert pointwise(function) == [[1, 2, 3], [3, 4, 5]]
    with pytest.raises(RewardError, match="does not take `completions`"):
        resolve_reward(len)


# ---- sums


def test_weighted_sum_leaves_none_out() -> None:
    def first(completions: list[str]) -> list[float | None]:
        return [None if len(text) in (1, 3) else 1.0 for text in completions]

    def second(completions: list[str]) -> list[float | None]:
        return [None if len(text) == 3 else np.float32(len(text)) for text in completions]

    reward = resolve_reward([first, second], weights=[10, 0.5])
    scores = reward.score_groups(EXAMPLES, GROUPS, reward_type="pointwise")
    assert str(scores.rewards_NK.tolist()) == str([[0.5, 11.0, NAN], [NAN, 12.0, 12.5]])
    # means over samples, without the references "ref" and "refer" and without None.
    assert scores.per_function == {"first": 1.0, "second": pytest.approx(7 / 3)}


def test_names_are_unique_and_weights_are_checked() -> None:
    assert resolve_reward([length, longer, length, length]).names == [
        "length", "longer", "length_2", "length_3",
    ]  # fmt: skip
    reward = resolve_reward(length)
    assert resolve_reward(reward) is reward
    assert resolve_reward(reward, weights=[2.0]).score(EXAMPLES, ["a", "bb"]) == [2, 4]
    for weights in ([1.0, 2.0], [NAN]):
        with pytest.raises(RewardError, match="reward_weights must hold 1 finite"):
            resolve_reward(length, weights=weights)
    with pytest.raises(RewardError, match="no reward function"):
        resolve_reward([])


# ---- comparisons


def test_compare() -> None:
    mine, others = ["aaaa", "b"], ["aa", "bbb"]
    reward = resolve_reward(length)
    assert reward.compare(EXAMPLES, mine, others, reward_type="pointwise") == [2, -2]
    reward = resolve_reward(longer)
    assert reward.compare(EXAMPLES, mine, others, reward_type="pairwise") == [1, -1]


# ---- async


def later(value: float, log: list[str], partner: str | None = None) -> Any:
    async def reward(completions: list[str], **columns: Any) -> list[float]:
        log.append("started")
        while len(log) < 2:  # returns only if the other one runs concurrently
            await asyncio.sleep(0)
        return [value] * len(completions)

    return reward


def test_async_functions_run_concurrently() -> None:
    log: list[str] = []
    functions = [later(1.0, log), length, later(10.0, log)]
    assert pointwise(functions) == [[12, 13, 14], [14, 15, 16]]


def test_async_functions_work_inside_a_running_loop() -> None:
    async def notebook() -> list[list[float]]:
        log: list[str] = []
        return pointwise([later(1.0, log), later(10.0, log)])

    assert asyncio.run(notebook()) == [[11] * 3, [11] * 3]


@pytest.mark.filterwarnings("error")
def test_async_failures_are_named_and_leave_nothing_unawaited() -> None:
    async def flaky(completions: list[str]) -> list[float]:
        raise TimeoutError("no answer")

    def broken(completions: list[str]) -> list[float]:
        raise KeyError("answer")

    with pytest.raises(RewardError, match="reward flaky raised TimeoutError: no answer"):
        pointwise([length, flaky])
    with pytest.raises(RewardError, match="reward broken raised KeyError: 'answer'") as error:
        pointwise([flaky, broken])
    assert isinstance(error.value.__cause__, KeyError)


# ---- wrong functions and wrong values


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0], "reward bad returned 1 values for 6 completions"),
        (None, "returned a NoneType: it must return a list of 6 numbers"),
        (1.0, "returned a float"),
        ({"a": 1}, "returned a dict"),
        (np.zeros(6), r"returned a ndarray.*call .tolist\(\)"),
        ([0, 0, "1", 0, 0, 0], "returned '1' for the reference of prompt 0, a str"),
        ([0, 0, 0, 0, math.inf, 0], "returned inf for completion 1 of prompt 1: it must be finite"),
        ([NAN, 0, 0, 0, 0, 0], "returned nan for completion 0 of prompt 0.*None for no reward"),
    ],
)
def test_bad_results(result: Any, message: str) -> None:
    def bad(completions: list[str]) -> Any:
        return result

    with pytest.raises(RewardError, match=message):
        pointwise(bad)


def test_check_needs_no_call() -> None:
    def wants(completions: list[str], answer: list[str]) -> list[float]:
        pytest.fail("it was called")

    with pytest.raises(RewardError, match=r"reward wants needs `answer`.*references, k"):
        resolve_reward(wants).check(EXAMPLES, reward_type="pointwise")
    with pytest.raises(RewardError, match="needs `answer`"):
        pointwise(wants)
    with pytest.raises(RewardError, match="reward wants does not take `references`"):
        resolve_reward(wants).check(EXAMPLES, reward_type="pairwise")
    alone = [Example("p", None, {})]
    resolve_reward(length).check(alone, reward_type="pointwise")
    with pytest.raises(RewardError, match="the dataset has none: add a column `reference`"):
        resolve_reward(longer).check(alone, reward_type="pairwise")
    resolve_reward(longer).check(EXAMPLES, reward_type="pairwise")


def test_ragged_groups_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 groups of one size, got groups of \[1, 2\]"):
        Reward([length]).score_groups(EXAMPLES, [["a"], ["b", "c"]], reward_type="pointwise")


# ---- finding functions

SOURCE = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Score:
    value: float

loads = []
loads.append(1)
number = 3

def reward(completions):
    return [Score(float(len(c))).value for c in completions]

def loaded(completions):
    return [float(len(loads))] * len(completions)
"""


def test_functions_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "my_rewards_of_test.py"
    path.write_text(SOURCE)
    assert pointwise(f"{path}:reward") == [[1, 2, 3], [3, 4, 5]]
    # the file runs once for all of its functions
    assert pointwise([f"{path}:reward", f"{path}:loaded"])[0] == [2, 3, 4]
    monkeypatch.syspath_prepend(tmp_path)
    assert pointwise("my_rewards_of_test:reward") == [[1, 2, 3], [3, 4, 5]]
    for spec, message in {
        f"{path}:number": "is not callable: it is a int",
        f"{path}:Score": "is a class",
        f"{path}:missing": "has no 'missing'",
        "my_rewards_of_test:missing": "has no 'missing'",
    }.items():
        with pytest.raises(RewardError, match=message):
            resolve_reward(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("reward", "names no function: write 'package.module:function'"),
        ("no_such_file.py:f", "no such file 'no_such_file.py'"),
        ("no_such_module:f", "No module named 'no_such_module'; for a file .* 'path/file.py:f'"),
        (3, "reward int is not callable"),
    ],
)
def test_specs_that_name_nothing(spec: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        resolve_reward(spec)


def test_a_file_that_fails_fails_again(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("1 / 0")
    for _ in range(2):
        with pytest.raises(RewardError, match=r"broken\.py raised ZeroDivisionError"):
            resolve_reward(f"{path}:f")


# ---- rewards made by name

MAKING = """
class Near:
    def __init__(self, number, *, most=1):
        if most < 0:
            raise ValueError("below 0")
        self.number, self.most = number, most

    def __call__(self, completions):
        return [float(abs(len(c) - self.number) <= self.most) for c in completions]

def away(text=""):
    return lambda completions: [float(c != text) for c in completions]

number = 3
"""


def test_rewards_are_made_by_name_with_arguments(tmp_path: Path) -> None:
    path = tmp_path / "making (1).py"
    path.write_text(MAKING)
    assert pointwise(f"{path}:Near(2)") == [[1, 1, 1], [1, 0, 0]]
    assert pointwise(f"{path}:Near(2, most=0)") == [[0, 1, 0], [0, 0, 0]]
    assert pointwise(f"{path}:away('a')") == [[0, 1, 1], [1, 1, 1]]
    assert pointwise(f'{path}:away("x:y(b)")') == [[1] * 3] * 2
    for spec, message in {
        f"{path}:Near(2, most=-1)": "raised ValueError: below 0",
        f"{path}:Near(2, mist=1)": "unexpected keyword argument 'mist'",
        f"{path}:Near(number)": "arguments must be written out",
        f"{path}:Near({{[2]: 2}})": "arguments must be written out",
        f"{path}:Near(2, most=1, most=2)": "names an argument twice",
        f"{path}:Near(2": "has no 'Near\\(2'",
        f"{path}:number(2)": "is not callable: it is a int",
        f"{path}:Near": r"is a class: pass an instance of it, as '.*:Near\(\.\.\.\)'",
        "Nearest(2)": "grao_fast.rewards has no 'Nearest'",
        "ExactMtch(2)": r"grao_fast.rewards has no 'ExactMtch' \(did you mean ExactMatch\?\)",
        "(2)": "cannot be read: write 'Class",
        "a.b(2)": "cannot be read: write 'Class",
    }.items():
        with pytest.raises(RewardError, match=message):
            resolve_reward(spec)
