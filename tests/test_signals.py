"""Tests of signals and errors in a run: finished steps are saved, and resume to the same bits."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_trainer
import torch
from test_trainer import CONFIG, ROWS, letters, lines, rarely_equal, run, same_bits

import grao_fast.evaluation.held_out
import grao_fast.system.interruption
import grao_fast.trainer
import grao_fast.training.rollouts
import grao_fast.training.step
from grao_fast import Preempted
from grao_fast.callbacks import Callback
from grao_fast.models.beginning import Beginning
from grao_fast.rewards import RewardError
from grao_fast.sampling import changes, generate
from grao_fast.sampling.model_sampler import Decoding, ModelSampler
from grao_fast.system.interruption import Interruption, Stop, at_once, held

OPTIONS: dict[str, Any] = {
    # live groups in every step, one micro-batch each
    "reward": rarely_equal,
    "config": CONFIG.replace(
        max_steps=4,
        save_steps=3,
        eval_steps=2,
        logging_steps=2,
        prompts_per_step=2,
        num_generations=3,
        max_new_tokens=4,
        max_tokens_per_microbatch=30,
        reference_advantage="signed",  # no sequence is left out, whatever its reward
        gradient_checkpointing=False,
    ),
    "eval_dataset": ROWS[:2],
}


@pytest.fixture(scope="module")
def uninterrupted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted")
    run(tiny_model, output, **OPTIONS)
    return output


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Check that the handlers after a test are those from before it."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    after = [signal.getsignal(number) for number in numbers]
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    assert after == before


def send(signum: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), signum)


def at_call(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: int, act: Callable[[], Any]
) -> None:
    """Call `act` at the start of the number-th call of a function."""
    original, calls = getattr(owner, name), []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            act()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


SAMPLING = grao_fast.training.rollouts, "sample_and_score"

# Functions in which a signal comes, and the steps that are finished by then. Each is called once a
# step unless another number is given.
MOMENTS = {
    "sampling": (*SAMPLING, 2, 1),
    "gradient": (grao_fast.training.step, "micro_batch_loss", 4, 1),
    "optimiser's step": (grao_fast.training.step.torch.optim.AdamW, "step", 2, 2),
    "behind the optimiser": (grao_fast.training.step, "update_flops", 2, 2),
    "callback": (Callback, "on_step_end", 2, 2),
    "evaluation": (grao_fast.evaluation.held_out, "evaluate_completions", 2, 2),
    "save": (grao_fast.training.progress, "save_checkpoint", 1, 3),
    "last evaluation": (grao_fast.evaluation.held_out, "evaluate_completions", 3, 4),
    "last save": (grao_fast.trainer, "save_model", 1, 4),
}


def check_same(output: Path, uninterrupted: Path) -> None:
    assert same_bits(output / "final", uninterrupted / "final")
    assert lines(output) == lines(uninterrupted)
    evaluations = [path.name for path in sorted(uninterrupted.glob("eval-*.jsonl"))]
    assert evaluations == ["eval-0.jsonl", "eval-2.jsonl", "eval-4.jsonl"]
    for name in evaluations:
        assert (output / name).read_text() == (uninterrupted / name).read_text()


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_moment_saves_whole_steps_and_the_run_goes_on_to_the_same_bits(
    moment: str,
    tiny_model: Path,
    tmp_path: Path,
    uninterrupted: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner, name, number, whole = MOMENTS[moment]
    with monkeypatch.context() as patch, pytest.raises(Preempted) as caught:
        at_call(patch, owner, name, number, send)
        run(tiny_model, tmp_path, **OPTIONS, callbacks=[Callback()])
    assert caught.value.code == 143
    assert caught.value.checkpoint == tmp_path / f"checkpoint-{whole}"
    run(tiny_model, tmp_path, **OPTIONS, resume_from_checkpoint=True)
    check_same(tmp_path, uninterrupted)


def test_a_run_can_be_stopped_again_and_again(tiny_model, tmp_path, uninterrupted, monkeypatch):
    """A resumed run stopped before its first step leaves the checkpoint that it resumed from."""
    for number, whole in ((2, 1), (1, 1), (2, 2), (3, 4)):
        moment = (*SAMPLING, number) if whole < 4 else (grao_fast.trainer, "save_model", 1)
        with monkeypatch.context() as patch, pytest.raises(Preempted) as caught:
            at_call(patch, *moment, send)
            run(tiny_model, tmp_path, **OPTIONS, resume_from_checkpoint=whole_dir(tmp_path))
        assert caught.value.checkpoint == tmp_path / f"checkpoint-{whole}"
    run(tiny_model, tmp_path, **OPTIONS, resume_from_checkpoint=True)
    check_same(tmp_path, uninterrupted)


def whole_dir(output: Path) -> bool | None:
    return True if list(output.glob("checkpoint-*")) else None


def test_without_checkpoints_a_signal_writes_one_and_says_where(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    at_call(monkeypatch, *SAMPLING, 2, lambda: send(signal.SIGHUP))
    with pytest.raises(Preempted) as caught:
        run(tiny_model, tmp_path, config=CONFIG.replace(save_steps=0))
    assert caught.value.code == 129
    assert f"resume_from_checkpoint=True goes on from {tmp_path}/checkpoint-1" in caplog.text


@pytest.mark.parametrize("name", ["load_policy", "token_budget", "_evaluate"])
def test_before_the_first_step_there_is_nothing_to_save(name, tiny_model, tmp_path, monkeypatch):
    owner = grao_fast.trainer._Run if name == "_evaluate" else grao_fast.trainer
    at_call(monkeypatch, owner, name, 1, send)
    config = OPTIONS["config"].replace(max_tokens_per_microbatch=None)  # which is then found
    with pytest.raises(Preempted) as caught:
        run(tiny_model, tmp_path, **OPTIONS | {"config": config})
    assert caught.value.checkpoint is None
    assert not list(tmp_path.glob("checkpoint-*"))


def test_ctrl_c_is_a_keyboard_interrupt_of_pythons_own_kind(tiny_model, tmp_path, monkeypatch):
    """Python reports an interrupted process only for KeyboardInterrupt itself, not a subclass."""
    at_call(monkeypatch, *SAMPLING, 2, lambda: send(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt) as caught:
        run(tiny_model, tmp_path, **OPTIONS)
    assert type(caught.value) is KeyboardInterrupt
    assert (tmp_path / "checkpoint-1").is_dir()


@pytest.mark.parametrize("signum, saved", [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_a_second_ctrl_c_waits_for_no_save_and_a_second_sigterm_does(
    signum: int, saved: bool, tiny_model: Path, tmp_path: Path, monkeypatch
) -> None:
    at_call(monkeypatch, *SAMPLING, 2, lambda: send(signum))
    at_call(monkeypatch, grao_fast.training.progress, "save_checkpoint", 1, lambda: send(signum))
    with pytest.raises((KeyboardInterrupt, Preempted)):
        run(tiny_model, tmp_path, **OPTIONS)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"] * saved


# ---- rewards


def hangs(completions: list[str], **columns: Any) -> list[float]:
    time.sleep(60)
    return []


def hangs_and_catches(completions: list[str], **columns: Any) -> list[float]:
    try:
        time.sleep(60)
    except BaseException:
        return [0.0] * len(completions)
    return []


def hangs_and_says_otherwise(completions: list[str], **columns: Any) -> list[float]:
    try:
        time.sleep(60)
    except BaseException as error:
        raise ValueError("no answer") from error
    return []


async def hangs_async(completions: list[str], **columns: Any) -> list[float]:
    await asyncio.to_thread(time.sleep, 60)
    return []


HANGING = [hangs, hangs_and_catches, hangs_and_says_otherwise, hangs_async]


@pytest.mark.parametrize(
    ("hanging", "others"),
    [*((hanging, []) for hanging in HANGING), (hangs, [letters])],
    ids=[*(hanging.__name__ for hanging in HANGING), "hangs beside another"],
)
def test_a_hanging_reward_is_not_waited_for(hanging, others, tiny_model, tmp_path) -> None:
    steps: list[int] = []

    def reward(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        if len(steps) == 1:
            return letters(*args, **kwargs)
        threading.Timer(0.05, send).start()
        return hanging(*args, **kwargs)

    config = OPTIONS["config"].replace(eval_steps=None)

    def child() -> None:
        run(tiny_model, tmp_path, reward=[*others, reward], config=config)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(timeout=30)
    ended = process.exitcode
    process.kill()
    assert ended == 143
    assert (tmp_path / "checkpoint-1").is_dir()


def fails(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


# What fails at its how-manieth call, after two whole steps, and what the run raises for it.
FAILURES = {
    # an evaluation and two steps come before the second evaluation
    "reward that exits": (test_trainer, "rarely_equal", 4, SystemExit(0), RewardError),
    "reward that raises": (test_trainer, "rarely_equal", 4, ValueError("no"), RewardError),
    "callback": (Callback, "on_step_end", 2, LookupError("of the callback"), LookupError),
    # it takes weights once before the first step
    "sampler": (ModelSampler, "sync", 3, ConnectionError("gone"), ConnectionError),
}


@pytest.mark.parametrize("failing", FAILURES)
def test_what_fails_costs_no_step_and_no_line(
    failing: str, tiny_model: Path, tmp_path: Path, uninterrupted: Path, monkeypatch, caplog
) -> None:
    owner, name, number, error, raised = FAILURES[failing]
    options = OPTIONS | {"callbacks": [Callback()]}
    with monkeypatch.context() as patch, pytest.raises(raised):
        at_call(patch, owner, name, number, fails(error))
        if name == "rarely_equal":

            def reward(prompts: Any, completions: Any) -> list[float]:
                return owner.rarely_equal(prompts, completions)

            reward.__name__ = "rarely_equal"
            options |= {"reward": reward}
        run(tiny_model, tmp_path, **options)
    assert f"resume_from_checkpoint=True goes on from {tmp_path}/checkpoint-2" in caplog.text
    run(tiny_model, tmp_path, **OPTIONS, resume_from_checkpoint=True)
    check_same(tmp_path, uninterrupted)


def test_a_reward_that_goes_to_another_folder_takes_nothing_there(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def runs_code(completions: list[str], **columns: Any) -> list[float]:
        os.chdir(tmp_path / "there")
        return letters(completions=completions, **columns)

    config = CONFIG.replace(max_steps=2, save_steps=1)
    run(tiny_model, Path("run"), reward=runs_code, config=config)
    assert not list((tmp_path / "there").iterdir())
    written = {path.name for path in (tmp_path / "here/run").iterdir()}
    assert {"checkpoint-2", "final", "summary.json", "metrics.jsonl"} <= written


def test_a_sampler_that_hangs_while_it_takes_weights_is_not_waited_for(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hangs() -> None:
        send()
        time.sleep(60)

    at_call(monkeypatch, ModelSampler, "sync", 3, hangs)
    began = time.monotonic()
    with pytest.raises(Preempted) as caught:
        run(tiny_model, tmp_path, **OPTIONS)
    assert time.monotonic() - began < 30
    assert caught.value.checkpoint == tmp_path / "checkpoint-2"


def test_a_failing_save_does_not_hide_what_went_wrong_before(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(grao_fast.training.progress, "save_checkpoint", full)
    at_call(monkeypatch, *SAMPLING, 2, send)
    with pytest.raises(Preempted) as caught:
        run(tiny_model, tmp_path, **OPTIONS)
    assert caught.value.checkpoint is None
    assert f"step 1 could not be saved in {tmp_path}: [Errno 28] No space left" in caplog.text


def test_an_update_that_breaks_off_is_not_saved(tiny_model, tmp_path, monkeypatch) -> None:
    def breaks() -> None:
        raise RuntimeError("within the optimiser")

    at_call(monkeypatch, grao_fast.training.step.torch.optim.AdamW, "step", 2, breaks)
    with pytest.raises(RuntimeError, match="within the optimiser"):
        run(tiny_model, tmp_path, **OPTIONS)
    assert not list(tmp_path.glob("checkpoint-*"))


# ---- handlers


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            send(signal.SIGHUP)
        assert interruption.signum is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_callers_own_handler_has_its_turn_when_all_is_saved() -> None:
    turns: list[Any] = []
    before = signal.signal(signal.SIGTERM, lambda *args: turns.append(args[0]))
    try:
        with pytest.raises(Preempted), Interruption(), held():
            send()
            assert turns == []
        assert turns == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_code_that_waits_for_a_thread_while_it_is_left_is_told_again(monkeypatch) -> None:
    monkeypatch.setattr(grao_fast.system.interruption, "_PATIENCE", 0.05)
    began, release = time.monotonic(), threading.Event()
    with pytest.raises(Preempted), Interruption(), at_once():
        try:
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(release.wait, 30)
                threading.Timer(0.05, send).start()
                waiting.result()
        finally:
            release.set()
    assert time.monotonic() - began < 20


def test_what_is_held_is_finished_and_what_is_not_is_left() -> None:
    done: list[str] = []
    with pytest.raises(Preempted), Interruption(), held():
        with pytest.raises(Stop), at_once():
            send()
            done.append("left")
        done.append("finished")
    assert done == ["finished"]


def test_a_child_that_is_forked_meanwhile_has_the_handlers_of_before() -> None:
    """Otherwise `Pool.terminate`, which sends SIGTERM, would wait forever."""
    with Interruption(), held():
        process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        process.start()
        process.terminate()
        process.join(timeout=20)
        ended = process.exitcode
        process.kill()
    assert ended == -signal.SIGTERM


def exchanged() -> tuple[Any, Callable[[], AbstractContextManager[None]], Callable[[], Any]]:
    """A module, one of its contexts of a temporary change, and a function that shows it."""
    model = torch.nn.Linear(2, 2)
    beginning = Beginning(model)
    model.weight.data.copy_(torch.arange(4.0).view(2, 2))
    return grao_fast.models.beginning, beginning.restored, model.weight.tolist


def ones() -> torch.nn.Linear:
    model = torch.nn.Linear(2, 2)
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
    return model


def negated() -> tuple[Any, Callable[[], AbstractContextManager[None]], Callable[[], Any]]:
    model = ones()
    change = changes.Negated(model)
    return changes, lambda: change.of(change.tensors), lambda: [p.tolist() for p in change.tensors]


def swapped() -> tuple[Any, Callable[[], AbstractContextManager[None]], Callable[[], Any]]:
    model = ones()
    change = changes.Swapped(model, lambda name: True)
    return changes, lambda: change.of(change.tensors), lambda: [p.tolist() for p in change.tensors]


def stirred() -> tuple[Any, Callable[[], AbstractContextManager[None]], Callable[[], Any]]:
    model: Any = torch.nn.Linear(2, 2)
    return generate, lambda: generate._stirred_biases(model), model.bias.tolist


def generating() -> tuple[Any, Callable[[], AbstractContextManager[None]], Callable[[], Any]]:
    model: Any = SimpleNamespace(device="cpu", generation_config="its own")
    sampler = generate.GenerateSampler(
        model, Decoding(eos_token_ids=(), pad_token_id=0, batch_size=1)
    )
    ours: Any = "ours"
    return generate, lambda: sampler._generating_by(ours), lambda: model.generation_config


@pytest.mark.parametrize("case", [exchanged, negated, swapped, stirred, generating])
def test_what_is_changed_is_put_back_at_whatever_instruction_a_signal_comes(case) -> None:
    """Send a signal at each of the instructions that enter and leave a context."""
    module, changed, state = case()
    before = state()
    files = {grao_fast.system.interruption.__file__, module.__file__}
    stopped = 0
    for at in range(10_000):
        seen = [0]

        def trace(frame: Any, event: str, argument: Any, at: int = at, seen: Any = seen) -> Any:
            if frame.f_code.co_filename not in files:
                return None
            frame.f_trace_opcodes = True
            if event == "opcode":
                seen[0] += 1
                if seen[0] == at:
                    send()
            return trace

        with suppress(Preempted), Interruption():
            tracing = sys.gettrace()
            with held(), suppress(Stop), at_once():
                sys.settrace(trace)
                try:
                    with changed():
                        assert state() != before
                finally:
                    sys.settrace(tracing)
                    stopped += seen[0] >= at
        assert state() == before, at
        if seen[0] < at:
            break
    assert stopped > 100


def test_another_thread_and_an_inner_run_leave_the_handlers_alone() -> None:
    seen: list[Any] = []

    def elsewhere() -> None:
        with Interruption():
            seen.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [before]
    with Interruption():
        outer = signal.getsignal(signal.SIGTERM)
        with Interruption():
            assert signal.getsignal(signal.SIGTERM) == outer
        assert signal.getsignal(signal.SIGTERM) == outer


def test_metrics_hold_no_torn_line(tiny_model: Path, tmp_path: Path) -> None:
    """Send a real signal from another process, at a random moment."""

    def child() -> None:
        run(tiny_model, tmp_path, config=CONFIG.replace(max_steps=1000, save_steps=0))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    while not (tmp_path / "metrics.jsonl").exists() and process.is_alive():
        time.sleep(0.01)
    time.sleep(0.2)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    process.join(timeout=30)
    assert process.exitcode == 143
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert (tmp_path / f"checkpoint-{len(rows)}").is_dir() or not rows
