"""Tests of rewards that score each group as soon as it is whole (`per_group`)."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import CONFIG, ROWS, letters, lines, run, same_bits

from grao_fast.data.examples import load_examples
from grao_fast.rewards import RewardError, per_group, resolve_reward
from grao_fast.rewards.early import EarlyCalls
from grao_fast.rewards.functions import Reward
from grao_fast.sampling import Completion
from grao_fast.sampling.loading import load_policy
from grao_fast.sampling.model_sampler import ModelSampler
from grao_fast.training.rollout import sample_and_score

EXAMPLES = load_examples(ROWS)
TEXTS = [[f"{n}{k}" * n for k in range(3)] for n in range(len(EXAMPLES))]
PLACES = range(len(EXAMPLES))


def length(completions: Sequence[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def as_early(function: Any, calls: list[int] | None = None, *, wait: float = 0.0) -> Any:
    """A marked function of the same values, plain or async."""

    @per_group
    def plain(completions: Sequence[str]) -> list[float]:
        time.sleep(wait)
        if calls is not None:
            calls.append(len(completions))
        return function(completions)

    return plain


async def _slowly(completions: Sequence[str]) -> list[float]:
    await asyncio.sleep(0.02 * completions[0].startswith(("2", "4")))
    return length(completions)


def scores(reward: Reward, order: Sequence[int] = PLACES, reward_type: Any = "pointwise") -> Any:
    """Scores of all groups, which become whole in this order."""
    early = reward.begin(EXAMPLES, reward_type=reward_type, alone=True)
    assert early is not None
    for place in order:
        early.begin(place, TEXTS[place])
    return reward.score_groups(EXAMPLES, TEXTS, reward_type=reward_type, places=PLACES, early=early)


@pytest.mark.parametrize(
    "marked", [as_early(length), per_group(_slowly), partial(as_early(length))]
)
@pytest.mark.parametrize("order", [PLACES, [6, 0, 3, 1, 5, 4, 2]], ids=["in order", "mixed"])
def test_scores_are_those_of_one_call(marked: Any, order: Sequence[int]) -> None:
    def after(completions: Sequence[str]) -> list[float | None]:
        assert len(completions) == len(EXAMPLES) * 4  # not marked: all at once
        return [None if text.startswith("1") else 0.5 for text in completions]

    weights = [2.0, 3.0, 1.0]
    expected = resolve_reward([after, length, length], weights=weights).score_groups(
        EXAMPLES, TEXTS, reward_type="pointwise"
    )
    found = scores(resolve_reward([after, marked, as_early(length)], weights=weights), order)
    assert torch.equal(found.rewards_NK, expected.rewards_NK)
    assert torch.allclose(found.scores_FNG, expected.scores_FNG, equal_nan=True)


def test_a_pairwise_group_without_a_reference_is_not_scored() -> None:
    rows = [row if i else {**row, "reference": None} for i, row in enumerate(ROWS)]
    examples, calls = load_examples(rows), []

    @per_group
    def longer(completions: Sequence[str], references: Sequence[str]) -> list[float]:
        calls.append(references[0])
        return [float(len(a) - len(b)) for a, b in zip(completions, references, strict=True)]

    reward = resolve_reward(longer)
    early = reward.begin(examples, reward_type="pairwise", alone=True)
    assert early is not None
    for place in PLACES:
        early.begin(place, TEXTS[place])
    found = reward.score_groups(
        examples, TEXTS, reward_type="pairwise", places=PLACES, early=early
    ).rewards_NK
    assert calls == [row["reference"] for row in ROWS[1:]]
    assert bool(found[0].isnan().all())
    assert found[1:, -1].tolist() == [0.0] * 6


# ---- errors


def test_an_error_names_the_prompt_and_comes_while_others_are_sampled() -> None:
    def fails(completions: Sequence[str]) -> list[float]:
        raise KeyError("of the user")

    early = resolve_reward(per_group(fails)).begin(EXAMPLES, reward_type="pointwise", alone=True)
    assert early is not None
    early.begin(3, TEXTS[3])
    with pytest.raises(RewardError, match=r"fails, called for prompt 3 \(row 3\), raised KeyError"):
        for _ in range(500):
            time.sleep(0.01)
            early.begin(4, TEXTS[4])
    early.abandon()


@pytest.mark.parametrize("value", [float("nan"), "text"])
def test_a_wrong_value_names_its_completion(value: Any) -> None:
    @per_group
    def wrong(completions: Sequence[str]) -> list[Any]:
        return [value if text == "2222" else 0.0 for text in completions]

    with pytest.raises(RewardError, match=r"for completion 2 of prompt 2 \(row 2\)"):
        scores(resolve_reward(wrong))


def test_the_time_limit_is_that_of_a_call() -> None:
    """Many calls may together take longer than the limit; one may not."""
    assert scores(resolve_reward(as_early(length, wait=0.3), timeout=1.5)) is not None
    started = time.monotonic()
    with pytest.raises(
        RewardError, match=r"called for prompt \d.* took longer than reward_timeout"
    ):
        scores(resolve_reward(as_early(length, wait=1.0), timeout=0.1))
    assert time.monotonic() - started < 4  # not all seven calls


def test_an_async_reward_that_stops_its_loop_is_named() -> None:
    @per_group
    async def stops(completions: Sequence[str]) -> list[float]:
        asyncio.get_running_loop().stop()
        await asyncio.sleep(60)
        return length(completions)

    with pytest.raises(RewardError, match=r"reward stops.*stopped the event loop"):
        scores(resolve_reward(stops))


def test_calls_that_are_given_up_end() -> None:
    ended = threading.Event()

    @per_group
    async def hangs(completions: Sequence[str]) -> list[float]:
        try:
            await asyncio.sleep(600)
        finally:
            ended.set()
        return length(completions)

    early = resolve_reward(hangs).begin(EXAMPLES, reward_type="pointwise", alone=True)
    assert early is not None
    early.begin(0, TEXTS[0])
    time.sleep(0.05)
    early.abandon()
    assert ended.wait(10)


# ---- in a run


def test_a_sampler_reports_each_group_as_it_ends(tiny_model) -> None:
    """Within a batch too, in the thread that samples; what is reported is what is returned."""
    loaded = load_policy(tiny_model, config=CONFIG.replace(generation_batch_size=16))
    sampler, reported, decoding = loaded.sampler, {}, []
    assert isinstance(sampler, ModelSampler)
    forward = sampler._forward

    def counted(*args: Any) -> Any:
        decoding.append(1)
        return forward(*args)

    sampler._forward = counted
    thread = threading.current_thread()

    def on_group(place: int, group: list[Completion]) -> None:
        assert threading.current_thread() is thread
        assert place not in reported
        reported[place] = (group, len(decoding))

    prompts = [[10 + n] * (1 + n % 3) for n in range(12)]
    groups = sampler.sample(
        prompts,
        num_generations=2,
        max_new_tokens=60,
        temperature=1.0,
        seeds=list(range(12)),
        on_group=on_group,
    )
    assert [reported[place][0] for place in range(12)] == groups
    assert len({when for _, when in reported.values()}) > 3  # and not only once for each batch


@per_group
def early_letters(prompts, completions, target):
    return letters(prompts, completions, target)


def test_a_run_has_the_bits_of_one_that_scores_afterwards(tiny_model, tmp_path: Path):
    """Also where it is resumed."""
    early_letters.__name__ = "letters"
    calm = run(tiny_model, tmp_path / "a").output_dir
    early = run(tiny_model, tmp_path / "b", reward=early_letters).output_dir
    assert lines(calm) == lines(early)
    assert same_bits(calm / "final", early / "final")
    resumed = tmp_path / "c"
    run(
        tiny_model,
        resumed,
        reward=early_letters,
        resume_from_checkpoint=early / "checkpoint-2",
    )
    assert same_bits(resumed / "final", early / "final")


def test_a_reward_that_draws_random_numbers_is_called_afterwards(tiny_model, caplog) -> None:
    @per_group
    def noisy(completions: Sequence[str]) -> list[float]:
        return [random.random() for _ in completions]

    def draws(reward: Any) -> list[Any]:
        random.seed(5)
        return [scores(reward).rewards_NK if isinstance(reward, Reward) else None, random.random()]

    reward = resolve_reward(noisy)
    first, second = draws(reward)
    assert "draws from a global random generator" in caplog.text
    assert reward.begin(EXAMPLES, reward_type="pointwise", alone=True) is None
    random.seed(5)
    again = reward.score_groups(EXAMPLES, TEXTS, reward_type="pointwise").rewards_NK
    assert torch.equal(first, again)
    assert second == random.random()


def test_groups_are_scored_while_the_next_are_sampled(tiny_model, monkeypatch) -> None:
    """The second batch is not sampled before a group of the first has been scored."""
    config = CONFIG.replace(generation_batch_size=4)
    loaded = load_policy(tiny_model, config=config)
    scored, batches, decode = threading.Event(), [], type(loaded.sampler)._decode

    @per_group
    def reward(completions: Sequence[str]) -> list[float]:
        scored.set()
        return length(completions)

    def waits(self: ModelSampler, *arguments: Any) -> None:
        batches.append(len(batches) == 0 or scored.wait(30))
        decode(self, *arguments)

    monkeypatch.setattr(type(loaded.sampler), "_decode", waits)
    rollout = sample_and_score(
        loaded,
        resolve_reward(reward),
        loaded.encode(EXAMPLES, config.sampling),
        sampling=config.sampling,
        objective=config.objective_options,
        seed=5,
    )
    assert batches == [True] * 7
    assert rollout.seconds["reward_overlapped"] > 0


def test_the_mark_is_kept_by_a_partial_and_an_object() -> None:
    class Judge:
        per_group = True

        def __call__(self, completions: Sequence[str]) -> list[float]:
            return length(completions)

    for reward in (Judge(), partial(as_early(length))):
        begun = resolve_reward(reward).begin(EXAMPLES, reward_type="pointwise", alone=True)
        assert isinstance(begun, EarlyCalls)
    assert resolve_reward(length).begin(EXAMPLES, reward_type="pointwise", alone=True) is None
