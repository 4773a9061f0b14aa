"""Rollouts sampled ahead, on a local server that speaks vLLM's API (tests/vllm_server.py)."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_trainer import CONFIG, ROWS, StopAt, lines, rarely_equal, run, same_bits
from vllm_server import FakeVLLM, serving

import grao_fast.trainer
from grao_fast import Preempted
from grao_fast.callbacks import Callback
from grao_fast.rewards import per_group
from grao_fast.sampling.loading import load_policy
from grao_fast.sampling.seeds import prompt_seeds
from grao_fast.training.state import step_seed

pytest.importorskip("openai", reason="openai, the client of a vLLM server, is not installed")

STEPS = 4
PROMPTS = CONFIG.prompts_per_step
WAIT = 60.0  # seconds, for what would not come without the overlap
STEP_OF = {
    seed: step
    for step in range(STEPS)
    for seed in prompt_seeds(step_seed(CONFIG.seed, step), PROMPTS)
}


class Watched(FakeVLLM):
    """A server that logs what it samples, from which weights, and can hold requests in flight.

    log: (event, step, updates of the weights), in order.
    holds: holds(step) says whether the requests of a step wait; those that wait are in flight,
        also for a pause.
    met: the most requests in flight that a hand-over has met.
    """

    def __init__(self, model_path: str) -> None:
        super().__init__(model_path)
        self.log: list[tuple[str, int, int]] = []
        self.changed = threading.Condition()
        self.holds: Callable[[int], bool] = lambda step: False
        self.in_flight, self.aborts, self.met = 0, 0, 0

    def answer(self, path: str, body: dict[str, Any], key: str | None) -> tuple[int, Any]:
        if path == "/pause":
            self._meet_requests(body["mode"])
        if path != "/v1/completions" or "prompt_logprobs" in body:
            answer = super().answer(path, body, key)
            self.release()
            return answer
        if body["temperature"] == 0:
            self.note("evaluated", -1)
            return super().answer(path, body, key)
        step = STEP_OF[body["seed"]]
        self.note("asked", step)
        with self.changed:
            self.in_flight += 1
            aborts = self.aborts
            self.changed.wait_for(lambda: not self._waits(step, aborts), timeout=WAIT)
        aborted = self.aborts > aborts
        status, answer = super().answer(path, body, key)
        if aborted:  # with the tokens that it has
            for choice in answer["choices"]:
                del choice["token_ids"][1:], choice["logprobs"]["token_logprobs"][1:]
        else:
            self.note("sampled", step)
        with self.changed:
            self.in_flight -= 1
        return status, answer

    def _waits(self, step: int, aborts: int) -> bool:
        return self.aborts == aborts and self.holds(step)

    def _meet_requests(self, mode: str) -> None:
        with self.changed:
            if mode == "abort":
                self.aborts += 1
            else:
                self.met = max(self.met, self.in_flight)

    def release(self) -> None:
        """Ask again what is held."""
        with self.changed:
            self.changed.notify_all()

    def note(self, event: str, step: int) -> None:
        # two hand-overs before the first step, and one after each
        updates = len(self.paths("/collective_rpc")) - 2
        with self.changed:
            self.log.append((event, step, updates))
            self.changed.notify_all()

    def wait_for(self, event: str, step: int, *, times: int = PROMPTS) -> None:
        """Until an event has come for all prompts of a step; it fails if it does not come."""

        def seen() -> bool:
            return sum((e, s) == (event, step) for e, s, _ in self.log) >= times

        with self.changed:
            assert self.changed.wait_for(seen, timeout=WAIT), f"no {event} of step {step}"

    def updates_of(self, event: str) -> dict[int, set[int]]:
        """The updates of the weights at an event, for each step."""
        found: dict[int, set[int]] = {}
        for name, step, updates in self.log:
            if name == event:
                found.setdefault(step, set()).add(updates)
        return found


_EARLIER: set[threading.Thread] = set()


@pytest.fixture(autouse=True)
def earlier_threads() -> None:
    """Remember the threads of tests before, such as those of rewards that hang for ever."""
    _EARLIER.clear()
    _EARLIER.update(threading.enumerate())


@pytest.fixture
def fake(tiny_model) -> Watched:
    return Watched(tiny_model)


@pytest.fixture
def url(fake: Watched) -> Iterator[str]:
    with serving(fake) as url:
        yield url


def config(url: str, ahead: int, **changes):
    options = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": url}
    options |= {"async_rollouts": ahead, "max_steps": STEPS, "save_steps": 0}
    options |= {"num_generations": 3, "max_new_tokens": 5, "max_tokens_per_microbatch": 300}
    options |= {"gradient_checkpointing": False}
    return CONFIG.replace(**options | changes)


def around_update(
    monkeypatch: pytest.MonkeyPatch,
    before: Callable[[int], None] = lambda step: None,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """Call before(step) when the rollout of a step is there, and after(step) its update."""
    original, steps = grao_fast.trainer.update, []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        before(len(steps) - 1)
        metrics = original(*args, **kwargs)
        after(len(steps) - 1)
        return metrics

    monkeypatch.setattr(grao_fast.trainer, "update", wrapped)


def logged(output: Path, name: str) -> list[float]:
    return [row[name] for row in lines(output) if "loss" in row]


def no_thread_samples() -> bool:
    """Whether all threads that this test has started, and that sample, end within half a minute."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        started = set(threading.enumerate()) - _EARLIER
        if not any("_work_off" in thread.name for thread in started):
            return True
        time.sleep(0.01)
    return False


def test_one_ahead_every_rollout_comes_from_the_weights_one_update_before(
    fake, url, tiny_model, tmp_path, monkeypatch
):
    """Also where sampling takes longer than the update: a hand-over waits for it."""
    updated: set[int] = set()

    def after(step: int) -> None:
        threading.Timer(0.1, lambda: (updated.add(step), fake.release())).start()

    fake.holds = lambda step: step > 0 and step - 1 not in updated
    around_update(monkeypatch, after=after)
    run(tiny_model, tmp_path, config=config(url, 1), reward=rarely_equal)
    assert fake.met == 0
    expected = {step: {max(0, step - 1)} for step in range(STEPS)}
    assert fake.updates_of("asked") == fake.updates_of("sampled") == expected
    assert logged(tmp_path, "sampling/staleness") == [0, 1, 1, 1]
    ratios = {
        of: logged(tmp_path, f"sampling/importance_sampling_ratio/{of}")
        for of in ("min", "mean", "max")
    }
    assert all(abs(ratios[of][0] - 1) < 1e-4 for of in ratios)
    assert all(ratios["min"][i] < 0.99 and ratios["max"][i] > 1.01 for i in range(1, STEPS))
    assert all(0.7 < mean < 1.3 for mean in ratios["mean"])
    assert no_thread_samples()


def test_a_rollout_is_sampled_while_the_policy_is_updated(
    fake, url, tiny_model, tmp_path, monkeypatch
):
    """Requests of the next step wait for an update to begin, and the update for all of them."""
    updating: set[int] = set()

    def update(step: int) -> None:
        updating.add(step)
        fake.note("update", step)
        if step + 1 < STEPS:
            fake.wait_for("sampled", step + 1)

    fake.holds = lambda step: step > 0 and step - 1 not in updating
    around_update(monkeypatch, update)
    run(tiny_model, tmp_path, config=config(url, 1), reward=rarely_equal)
    assert len(updating) == STEPS


def test_two_ahead_weights_move_on_under_the_rollouts_in_flight(
    fake, url, tiny_model, tmp_path, monkeypatch
):
    """Requests that no hand-over waits for: of every step until its own begins."""
    fake.holds = lambda step: step > 0 and len(fake.paths("/collective_rpc")) - 2 < step
    run(tiny_model, tmp_path, config=config(url, 2), reward=rarely_equal)
    began, ended = fake.updates_of("asked"), fake.updates_of("sampled")
    assert all(step - 2 <= min(began[step]) for step in range(STEPS))
    assert ended == {step: {step} for step in range(STEPS)}
    assert logged(tmp_path, "sampling/staleness") == [0, 1, 2, 2]
    assert {body["mode"] for body in fake.paths("/pause")} == {"keep"} and fake.met > 0
    # sampled wholly by the newest weights
    assert max(logged(tmp_path, "sampling/logp_diff")) < 1e-4


def test_samples_are_the_same_where_the_weights_stay_the_same(fake, url, tiny_model, tmp_path):
    """However far ahead they are sampled; not at all, by default."""
    for ahead in range(3):
        options = {"config": config(url, ahead, learning_rate=0.0), "reward": rarely_equal}
        run(tiny_model, tmp_path / str(ahead), **options)
        if ahead == 0:
            assert fake.updates_of("asked") == {step: {step} for step in range(STEPS)}
            assert "sampling/staleness" not in lines(tmp_path / "0")[0]
    for name in ("reward", "loss", "completions/mean_length"):
        now, one, two = (logged(tmp_path / str(ahead), name) for ahead in range(3))
        assert now == one == two


@pytest.mark.parametrize("ahead", [0, 1])
def test_groups_are_scored_while_others_are_sampled(ahead, fake, url, tiny_model, tmp_path):
    """All requests of a step but one wait until a group of that step has been scored."""
    let_through: dict[int, int] = {}
    scored: list[int] = []

    @per_group
    def reward(completions: list[str]) -> list[float]:
        scored.append(len(completions))
        fake.release()
        return rarely_equal(completions, completions)

    def holds(step: int) -> bool:
        first = let_through.setdefault(step, threading.get_ident())
        return threading.get_ident() != first and len(scored) <= step * PROMPTS

    fake.holds = holds
    began = time.monotonic()
    run(tiny_model, tmp_path, config=config(url, ahead), reward=reward)
    assert time.monotonic() - began < WAIT / 2  # otherwise requests have waited in vain
    assert scored == [4] * STEPS * PROMPTS  # G + 1
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(row["time/reward_overlapped"] > 0 for row in rows)
    assert no_thread_samples()


def test_evaluations_use_the_weights_of_their_step(fake, url, tiny_model, tmp_path):
    """Though the next rollout is in flight meanwhile."""
    evaluating = threading.Event()

    class Evaluate(Callback):
        def on_step_end(self, step: int, metrics: dict[str, float]) -> bool:
            evaluating.set()
            return False

        def on_evaluate(self, step: int, result: Any) -> None:
            evaluating.clear()
            fake.release()

    fake.holds = lambda step: evaluating.is_set()
    options = {"eval_dataset": ROWS[:2], "callbacks": [Evaluate()]}
    run(tiny_model, tmp_path, config=config(url, 1, eval_steps=1), **options)
    assert fake.updates_of("evaluated") == {-1: set(range(STEPS + 1))}


def test_an_error_of_the_sampling_thread_is_the_runs_own(fake, url, tiny_model, tmp_path, caplog):
    def fails(choices: list[dict]) -> list[dict]:
        return choices[1:] if fake.log[-1][2] == 1 else choices

    fake.change_choices = fails  # samples of the third step are
    with pytest.raises(ValueError, match="returned 2 completions of a prompt, not the 3"):
        run(tiny_model, tmp_path, config=config(url, 1), reward=rarely_equal)
    assert logged(tmp_path, "step") == [1, 2]
    assert f"resume_from_checkpoint=True goes on from {tmp_path}/checkpoint-2" in caplog.text
    assert no_thread_samples()


@pytest.mark.parametrize("ahead", [1, 2])
def test_a_signal_gives_up_the_rollouts_in_flight(
    ahead, fake, url, tiny_model, tmp_path, monkeypatch
):
    def terminate(step: int) -> None:
        if step == 1:
            fake.wait_for("asked", 2)
            os.kill(os.getpid(), signal.SIGTERM)

    fake.holds = lambda step: step >= 2
    around_update(monkeypatch, terminate)
    began = time.monotonic()
    with pytest.raises(Preempted) as caught:
        run(tiny_model, tmp_path, config=config(url, ahead), reward=rarely_equal)
    assert caught.value.checkpoint == tmp_path / "checkpoint-1"
    assert time.monotonic() - began < WAIT / 2
    assert no_thread_samples()
    assert fake.in_flight == 0 and not fake.paused


def test_a_signal_ends_the_wait_for_a_rollout(fake, url, tiny_model, tmp_path):
    def terminate() -> None:
        fake.wait_for("asked", 2)
        time.sleep(0.2)  # the update of step 1 ends, and the run waits
        os.kill(os.getpid(), signal.SIGTERM)

    fake.holds = lambda step: step >= 2
    threading.Thread(target=terminate).start()
    with pytest.raises(Preempted):
        run(tiny_model, tmp_path, config=config(url, 1), reward=rarely_equal)
    assert no_thread_samples()


def test_a_run_that_a_callback_ends_leaves_no_request_in_flight(fake, url, tiny_model, tmp_path):
    fake.holds = lambda step: step >= 3
    result = run(tiny_model, tmp_path, config=config(url, 1), callbacks=[StopAt(2)])
    assert result.steps == 2
    assert no_thread_samples()
    assert fake.in_flight == 0 and not fake.paused
    assert (tmp_path / "final").is_dir()


def test_a_server_that_stands_still_does_not_keep_a_run(
    fake, url, tiny_model, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(grao_fast.training.ahead, "_PATIENCE", 0.3)
    fake.holds = lambda step: step >= 3
    fake.without("/is_paused", "/pause", "/resume")  # so that nothing can be aborted
    run(tiny_model, tmp_path, config=config(url, 1), callbacks=[StopAt(2)])
    assert "1 rollouts are still being sampled" in caplog.text
    fake.holds = lambda step: False
    fake.release()
    assert no_thread_samples()


def test_a_run_ahead_resumes_with_the_weights_of_its_checkpoint(fake, url, tiny_model, tmp_path):
    options = {"config": config(url, 1, save_steps=1), "reward": rarely_equal}
    run(tiny_model, tmp_path, **options, callbacks=[StopAt(2)])
    run(tiny_model, tmp_path, **options, resume_from_checkpoint=True)
    assert logged(tmp_path, "sampling/staleness") == [0, 1, 0, 1]


def test_one_ahead_a_run_repeats_bit_for_bit(url, tiny_model, tmp_path):
    for folder in ("one", "other"):
        run(tiny_model, tmp_path / folder, config=config(url, 1), reward=rarely_equal)
    assert same_bits(tmp_path / "one" / "final", tmp_path / "other" / "final")


def test_what_samples_ahead_needs(fake, url, tiny_model):
    with pytest.raises(ValueError, match="async_rollouts=1 has no effect without use_vllm=True"):
        CONFIG.replace(async_rollouts=1)
    with pytest.raises(ValueError, match="no effect without vllm_mode='server'"):
        CONFIG.replace(async_rollouts=1, use_vllm=True)
    with pytest.raises(ValueError, match="async_rollouts=1 learns from samples of earlier weights"):
        config(url, 1, vllm_importance_sampling_clip_max=None)
    with pytest.raises(ValueError, match="async_rollouts must be at least 0, got -1"):
        config(url, -1)
    fake.max_lora_rank = 8
    with pytest.raises(ValueError, match=r"started with --enable-lora.*set async_rollouts to 1"):
        load_policy(tiny_model, config=config(url, 2))
    load_policy(tiny_model, config=config(url, 1))
    fake.max_lora_rank = None
    fake.without("/is_paused")
    with pytest.raises(ValueError, match=r"cannot pause.*set async_rollouts to 1"):
        load_policy(tiny_model, config=config(url, 2))
