"""Tests of calling reward functions: copies, concurrency, time limits, failures."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from grao_fast.data.examples import Example
from grao_fast.rewards import RewardError, resolve_reward
from grao_fast.system.interruption import Interruption

EXAMPLES = [Example("p0", None, {}), Example("p1", None, {})]


def score(spec: Any, examples: list[Example] = EXAMPLES, **options: Any) -> list[float]:
    texts = [str(i) for i in range(len(examples))]
    return resolve_reward(spec, **options).score(examples, texts)


# ---- copies


def test_changes_to_arguments_stay_in_the_reward() -> None:
    lock = threading.Lock()
    endless: list[Any] = []
    endless.append(endless)
    columns = {
        "list": [1, [2, 3]],
        "dict": {"a": {"b": [1]}},
        "set": {1, 2},
        "array": np.ones(2),
        "tensor": torch.ones(2),
        "in_a_graph": torch.ones(2, requires_grad=True) * 2,
        "tuple": ([1], 2),
        "lock": {"held": [lock]},
        "endless": endless,
    }
    examples = [Example([{"role": "user", "content": "q"}], "r", columns)] * 2
    seen: list[Any] = []

    def vandal(prompts: Any, completions: Any, references: Any, **columns: Any) -> list[float]:
        # the values now, unaffected by later changes
        row = {name: values[-1] for name, values in columns.items() if name != "endless"}
        seen.append(repr((prompts, completions, references, row)))
        assert columns["lock"][0]["held"][0] is lock  # it cannot be copied
        assert columns["endless"][0][0] is columns["endless"][0] is not endless
        prompts[0].append("more")
        prompts[0][0]["content"] = completions[0][0]["content"] = "other"
        references.clear()
        columns["list"][0][1].clear()
        columns["dict"][0]["a"]["b"].append(2)
        columns["set"][0].clear()
        columns["array"][0][:] = columns["tensor"][0][:] = 0
        columns["tuple"][0][0].clear()
        columns["lock"][0]["held"].clear()
        completions.pop()
        return [0.0, 1.0]

    reward = resolve_reward([vandal, vandal])
    for _ in range(2):
        assert reward.score(examples, ["a", "b"]) == [0.0, 2.0]
    assert len(seen) == 4
    assert len(set(seen)) == 1
    assert "'content': 'q'" in seen[0]
    assert examples[0].prompt == [{"role": "user", "content": "q"}]
    assert columns["list"] == [1, [2, 3]]


def test_rows_of_one_prompt_are_separate_objects() -> None:
    """The samples of a prompt share its columns, but a change to one must not show in another."""
    lengths: list[int] = []

    def pops(completions: Any, answers: Any) -> list[float]:
        for answer in answers:
            lengths.append(len(answer))
            answer.pop()
        return [0.0] * len(completions)

    resolve_reward(pops).score_groups(
        [Example("p", None, {"answers": ["a", "b"]})], [["x", "y"]], reward_type="pointwise"
    )
    assert lengths == [2, 2]


# ---- failures: whatever ends a reward must not end the run silently


def raising(error: BaseException) -> Callable[..., Any]:
    def leaves(completions: list[str]) -> list[float]:
        raise error

    return leaves


def raising_async(error: BaseException) -> Callable[..., Any]:
    async def leaves(completions: list[str]) -> list[float]:
        await asyncio.sleep(0)
        raise error

    return leaves


LEAVING = [
    SystemExit(0),
    SystemExit("done"),
    KeyboardInterrupt(),
    GeneratorExit(),
    asyncio.CancelledError(),
    StopIteration(1),
    asyncio.TimeoutError(),
    RecursionError("deep"),
    MemoryError(),
    BrokenPipeError(32, "Broken pipe"),
]


@pytest.mark.parametrize("error", LEAVING, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("kind", [raising, raising_async])
@pytest.mark.parametrize("timeout", [None, 60.0])
def test_any_exception_of_a_reward_becomes_a_reward_error(kind, error, timeout) -> None:
    name = "RuntimeError" if kind is raising_async and isinstance(error, StopIteration) else None
    name = name or type(error).__name__
    with Interruption(), pytest.raises(RewardError, match=f"reward leaves raised {name}"):
        score(kind(error), timeout=timeout)


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_a_reward_that_stops_its_event_loop_is_an_error(timeout: float | None) -> None:
    async def stops(completions: list[str]) -> list[float]:
        asyncio.get_running_loop().stop()
        await asyncio.sleep(60)
        return []

    async def cancels(completions: list[str]) -> list[float]:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(60)
        return []

    with pytest.raises(RewardError, match="stops did not finish, because an async") as error:
        score(stops, timeout=timeout)
    assert error.value.place is None  # no code of the user's raised
    with pytest.raises(RewardError, match="reward cancels raised CancelledError"):
        score(cancels, timeout=timeout)


def test_the_first_of_several_that_fail_is_named() -> None:
    def slow(completions: list[str]) -> list[float]:
        time.sleep(0.05)
        raise KeyError("slow")

    def quick(completions: list[str]) -> list[float]:
        raise KeyError("quick")

    with pytest.raises(RewardError, match="reward slow raised KeyError: 'slow'"):
        score([slow, quick])


def test_an_error_that_quotes_control_characters_shows_them() -> None:
    with pytest.raises(RewardError) as caught:
        score(raising(ValueError("\x1b]0;title\x07 \u202ereversed\nsecond line")))
    text = str(caught.value)
    assert text.isascii()
    assert "\\x1b]0;title\\x07 \\u202ereversed\nsecond line" in text


@pytest.mark.parametrize(("leave", "status"), [(lambda: sys.exit(3), 3), (lambda: None, 0)])
def test_a_child_that_a_reward_forks_ends_where_the_reward_does(leave, status) -> None:
    """Otherwise the child would continue the run: save, and unlock the folder."""

    def forks(completions: list[str]) -> list[float]:
        child = os.fork()
        if child == 0:
            leave()
            return [float("nan")]
        _, ended = os.waitpid(child, 0)
        return [float(os.waitstatus_to_exitcode(ended))] * len(completions)

    assert score(forks) == [status, status]


def test_errors_are_short_whatever_they_quote() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise ValueError

        __repr__ = __str__

    with pytest.raises(RewardError, match="leaves raised Mute, whose message cannot be printed"):
        score(raising(Mute()))
    with pytest.raises(RewardError, match="a value that cannot be printed for completion 0"):
        score(lambda completions: [Mute()] * len(completions))
    with pytest.raises(RewardError, match=r"returned 'xx+\.\.\. for completion 0") as caught:
        score(lambda completions: ["x" * 10_000] * len(completions))
    assert len(str(caught.value)) < 300


# ---- time limits


def sleeps(completions: list[str]) -> list[float]:
    time.sleep(60)
    return [0.0] * len(completions)


async def sleeps_async(completions: list[str]) -> list[float]:
    await asyncio.sleep(60)
    return [0.0] * len(completions)


async def sleeps_in_a_thread(completions: list[str]) -> list[float]:
    await asyncio.to_thread(time.sleep, 60)
    return [0.0] * len(completions)


async def blocks_its_loop(completions: list[str]) -> list[float]:
    return sleeps(completions)


async def ignores_being_cancelled(completions: list[str]) -> list[float]:
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            continue


def zero(completions: list[str]) -> list[float]:
    return [0.0] * len(completions)


HANGING = [sleeps, sleeps_async, sleeps_in_a_thread, blocks_its_loop, ignores_being_cancelled]


@pytest.mark.parametrize("hanging", HANGING, ids=lambda function: function.__name__)
@pytest.mark.parametrize("others", [[], [zero]], ids=["alone", "beside another"])
def test_a_reward_that_hangs_is_named_and_does_not_block_exit(hanging, others) -> None:
    """Run in a child process, whose exit joins threads that are not daemons."""

    def child() -> None:
        message = f"reward {hanging.__name__} took longer than reward_timeout=0.05 seconds: raise"
        with pytest.raises(RewardError, match=message):
            score([*others, hanging], timeout=0.05)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(timeout=20)
    ended = process.exitcode
    process.kill()
    assert ended == 0


def unlimited(completions: list[str]) -> list[float]:
    time.sleep(0.2)
    return [0.0] * len(completions)


@pytest.mark.parametrize("slow", [sleeps, sleeps_async], ids=lambda function: function.__name__)
def test_each_function_has_a_limit_of_its_own(slow) -> None:
    """The one without a limit may take longer than the other's, and is not waited for."""
    assert score([unlimited, zero], timeout=[None, 0.1]) == [0.0, 0.0]
    message = f"reward {slow.__name__} took longer than reward_timeout=0.05 seconds"
    for others in ([zero], [zero, sleeps]):
        timeout = [*(None for _ in others), 0.05]
        with pytest.raises(RewardError, match=message):
            score([*others, slow], timeout=timeout)
    with pytest.raises(RewardError, match="one number, or hold 2, one for each"):
        score([zero, zero], timeout=[1.0])


def test_a_time_limit_does_not_change_results() -> None:
    draws: list[float] = []

    def drawing(completions: list[str]) -> list[float]:
        draws.append(random.random())
        return [draws[-1]] * len(completions)

    random.seed(1)
    score(drawing, timeout=60)
    random.seed(1)
    score(drawing)
    assert draws[0] == draws[1]


# ---- concurrency


def test_several_run_concurrently_and_keep_their_order() -> None:
    meeting = threading.Barrier(3, timeout=20)

    def one(completions: list[str]) -> list[float]:
        meeting.wait()
        return [1.0] * len(completions)

    def two(completions: list[str]) -> list[float]:
        meeting.wait()
        return [10.0] * len(completions)

    async def three(completions: list[str]) -> list[float]:
        await asyncio.to_thread(meeting.wait)
        return [100.0] * len(completions)

    assert score([one, three, two], weights=[1, 2, 3]) == [231.0, 231.0]
    assert score([one, three, two], weights=[1, 2, 3], timeout=60) == [231.0, 231.0]


def test_a_single_function_runs_in_the_calling_thread() -> None:
    threads: list[threading.Thread] = []

    def where(completions: list[str]) -> list[float]:
        threads.append(threading.current_thread())
        return [0.0] * len(completions)

    score(where)
    assert threads == [threading.current_thread()]


GENERATORS = {
    "random": random.random,
    "numpy": lambda: float(np.random.random()),
    "torch": lambda: float(torch.rand(())),
}


@pytest.mark.parametrize("draw", GENERATORS.values(), ids=GENERATORS)
def test_rewards_that_draw_are_repeatable(draw, caplog) -> None:
    """Whatever the order of threads, the values are those of calls one after another."""

    def draws(wait: float) -> Callable[..., list[float]]:
        def drawing(completions: list[str]) -> list[float]:
            time.sleep(wait)
            return [draw() for _ in completions]

        return drawing

    def seed() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    seed()
    expected = [[draw() for _ in range(4)] for _ in range(2)]
    seed()
    reward = resolve_reward([draws(0.03), draws(0.0)], weights=[1, 10])
    got = [reward.score(EXAMPLES, ["", ""]) for _ in range(2)]
    assert got == [[a + 10 * c, b + 10 * d] for a, b, c, d in expected]
    assert caplog.text.count("draws from a global random generator") == 1


def test_a_function_for_the_main_thread_runs_in_it(caplog: pytest.LogCaptureFixture) -> None:
    def alarmed(completions: list[str]) -> list[float]:
        before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, before)
        return [1.0] * len(completions)

    reward = resolve_reward([zero, alarmed])
    for _ in range(2):
        assert reward.score(EXAMPLES, ["", ""]) == [1.0, 1.0]
    assert caplog.text.count("signal only works in main thread") == 1


def test_the_grad_mode_is_that_of_the_caller() -> None:
    modes: list[bool] = []

    def mode(completions: list[str]) -> list[float]:
        modes.append(torch.is_grad_enabled())
        return [0.0] * len(completions)

    with torch.no_grad():
        score([mode, mode])
    score([mode, mode])
    assert modes == [False, False, True, True]

    def off(completions: list[str]) -> list[float]:
        torch.set_grad_enabled(False)
        return [0.0] * len(completions)

    score(off)
    assert torch.is_grad_enabled()


# ---- values


@pytest.mark.parametrize("one", [np.float32(1), np.int64(1), np.bool_(True), torch.tensor(1), True])
def test_numbers_of_every_kind(one: Any) -> None:
    assert score(lambda completions: [one, None])[0] == 1.0


@pytest.mark.parametrize(
    "value", [1.7e308, -1e101, 10**400, 10**5000], ids=["float", "negative", "int", "long"]
)
def test_numbers_whose_deviation_would_overflow(value: float) -> None:
    with pytest.raises(RewardError, match="for completion 1: beyond 1e\\+100 mean and deviation"):
        score(lambda completions: [0.0, value])


def test_a_sum_whose_deviation_would_overflow() -> None:
    with pytest.raises(RewardError, match="weighted sum of the rewards zero, lambda is 2e\\+108"):
        score([zero, lambda completions: [0.0, 1e100]], weights=[1, 2e8])
