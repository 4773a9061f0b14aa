"""Runs of several processes that fail: all end soon, with one message, and can be resumed."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import test_trainer
from processes import Ended, launch, started
from test_signals import at_call
from test_trainer import CONFIG, ROWS, lines, run, same_bits

import grao_fast.trainer
import grao_fast.training.progress
import grao_fast.training.rollouts
import grao_fast.training.step
from grao_fast.callbacks import Callback
from grao_fast.config import GRAOConfig
from grao_fast.sampling.model_sampler import ModelSampler
from grao_fast.training.state import DataStream

SHORT = CONFIG.replace(max_steps=3, save_steps=1, prompts_per_step=3, max_tokens_per_microbatch=400)
SOON = 30.0  # seconds in which all processes have to end

# Functions in which a process fails, at which of their calls, and the last checkpoint by then.
# Each is called once a step, but the sampler also in the checks of a model.
MOMENTS = {
    "load": (grao_fast.trainer, "load_policy", 1, None),
    "sampling": (grao_fast.training.rollouts, "sample_and_score", 2, 1),
    "reward": (test_trainer, "rarely_equal", 2, 1),
    "update": (grao_fast.training.step, "micro_batch_loss", 2, 1),
    "optimiser": (grao_fast.training.step, "_optimizer_step", 2, 1),
    "weights": (ModelSampler, "sync", 3, 1),
    "callback": (Callback, "on_step_end", 2, 1),
    "save": (grao_fast.training.progress, "save_checkpoint", 2, 1),
    "final": (grao_fast.trainer, "save_model", 1, 3),
}


def scores(prompts: Any, completions: Any) -> list[float]:
    """A reward that a test can make fail at its how-manieth call."""
    return test_trainer.rarely_equal(prompts, completions)


def train(model: Path, output: Path, config: GRAOConfig = SHORT, **options: Any) -> None:
    run(
        model, output, **({"reward": scores, "config": config, "callbacks": [Callback()]} | options)
    )


def fail(
    model: Path,
    folder: Path,
    act: Callable[[], Any],
    *,
    moment: str,
    ranks: Sequence[int] = (1,),
    size: int = 2,
    config: GRAOConfig = SHORT,
) -> list[Ended]:
    """Train in `folder / "run"` in processes of which some act at a moment; returns their ends."""
    owner, name, number, _ = MOMENTS[moment]

    def timed() -> None:
        (folder / "failed").write_text(str(time.monotonic()))
        act()

    def body(rank: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if rank in ranks:
                at_call(patch, owner, name, number, timed)
            train(model, folder / "run", config)

    with started(body, folder, size=size) as processes:
        ended = processes.wait(SOON + 60.0)
        since = float((folder / "failed").read_text()) - processes.began
    print(f"{moment}, ranks {ranks}")
    for each in ended:
        shown = [line for line in each.lines if not line.startswith(("  ", "Traceback"))]
        print(f"rank {each.rank}: status {each.status} after {each.seconds - since:.1f} s", *shown)
        assert each.seconds - since < SOON
    return ended


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run").glob("checkpoint-*"))


def raises(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def sends(signum: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signum)


def count(ended: list[Ended], text: str) -> list[int]:
    """How often each process has printed a text."""
    return [each.stderr.count(text) for each in ended]


def goes_on(folder: Path, step: int | None) -> str:
    assert step is not None
    return f"resume_from_checkpoint=True goes on from {folder / 'run' / f'checkpoint-{step}'}"


def test_two_processes_train_and_print_once(tiny_model: Path, tmp_path: Path) -> None:
    """Twice in one launch."""

    def body(rank: int) -> None:
        for number in range(2):
            train(tiny_model, tmp_path / f"run-{number}")
            print(f"rank {rank}: {number}")

    ended = launch(body, tmp_path)
    assert [each.status for each in ended] == [0, 0], ended
    assert [each.stdout for each in ended] == ["rank 0: 0\nrank 0: 1\n", "rank 1: 0\nrank 1: 1\n"]
    assert ended[1].lines == []
    assert same_bits(tmp_path / "run-0/final", tmp_path / "run-1/final")
    assert [row["step"] for row in lines(tmp_path / "run-0")] == [1, 2, 3]


# ---- errors


def check_error(ended: list[Ended], folder: Path, rank: int, message: str, step: int | None):
    """One process has shown an error, and the others nothing but the last checkpoint."""
    assert [each.status for each in ended] == [1] * len(ended)
    told = [0] * len(ended)
    told[rank] = 1
    assert count(ended, f"rank {rank} of {len(ended)}: {message}") == told
    assert [min(1, n) for n in count(ended, "Traceback")] == told
    if step is not None:
        assert count(ended, goes_on(folder, step))[0] == 1
    assert len(ended[0].lines) < 3 or rank == 0


def test_a_reward_that_raises_ends_all_with_one_message(tiny_model: Path, tmp_path: Path) -> None:
    ended = fail(tiny_model, tmp_path, raises(ValueError("broken")), moment="reward")
    check_error(ended, tmp_path, 1, "reward scores raised ValueError: broken", 1)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("moment", MOMENTS)
def test_an_error_anywhere_ends_all_with_one_message(
    moment: str, rank: int, tiny_model: Path, tmp_path: Path
) -> None:
    error = raises(ValueError("broken"))
    ended = fail(tiny_model, tmp_path, error, moment=moment, ranks=[rank])
    assert [each.status for each in ended] == [1, 1]
    told = count(ended, f"rank {rank} of 2")
    assert told[rank] >= 1
    assert told[1 - rank] == 0
    assert count(ended, "Traceback")[1 - rank] == 0
    # a callback fails in `World.each` behind a step, which all can still save
    last = 2 if moment == "callback" else MOMENTS[moment][3]
    if last is not None:
        assert count(ended, goes_on(tmp_path, last))[0] == 1


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_between_exchanges_is_told_from_a_failed_exchange(
    rank: int, tiny_model: Path, tmp_path: Path
) -> None:
    """Out of memory in one process is a RuntimeError, as is the others' lost connection."""
    error = raises(RuntimeError("CUDA out of memory"))
    ended = fail(tiny_model, tmp_path, error, moment="update", ranks=[rank])
    check_error(ended, tmp_path, rank, "CUDA out of memory", 1)


@pytest.mark.slow
def test_a_reward_that_hangs_past_its_timeout(tiny_model: Path, tmp_path: Path) -> None:
    config = SHORT.replace(reward_timeout=2.0)
    ended = fail(tiny_model, tmp_path, lambda: time.sleep(100), moment="reward", config=config)
    check_error(ended, tmp_path, 1, "reward scores took longer than reward_timeout=2 seconds", 1)


@pytest.mark.slow
def test_a_process_that_keeps_the_others_waiting(tiny_model: Path, tmp_path: Path) -> None:
    """Without a timeout of the reward, that of exchanges ends the run."""
    config = SHORT.replace(ddp_timeout=4.0)
    ended = fail(tiny_model, tmp_path, lambda: time.sleep(100), moment="reward", config=config)
    assert [each.status for each in ended] == [1, 1]
    assert count(ended, "rank 0 of 2 waited longer than ddp_timeout") == [1, 0]
    assert ended[1].lines == []


@pytest.mark.slow
def test_a_reward_of_nan_names_rank_and_row(tiny_model: Path, tmp_path: Path) -> None:
    def body(rank: int) -> None:
        def scores(prompts: Any, completions: Any) -> list[float]:
            values = test_trainer.rarely_equal(prompts, completions)
            return [*values[:2], float("nan"), *values[3:]] if rank == 1 else values

        train(tiny_model, tmp_path / "run", reward=scores)

    ended = launch(body, tmp_path)
    row = DataStream(len(ROWS), SHORT.prompts_per_step, SHORT.seed).batch(0)[1]
    message = f"reward scores returned nan for completion 2 of prompt 1 (row {row}): it must be"
    check_error(ended, tmp_path, 1, message, None)


@pytest.mark.slow
def test_all_processes_fail_alike(tiny_model: Path, tmp_path: Path) -> None:
    ended = fail(
        tiny_model, tmp_path, raises(ValueError("broken")), moment="reward", ranks=[1, 2], size=3
    )
    check_error(ended, tmp_path, 1, "reward scores raised ValueError: broken", 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong",
    [{"dataset": []}, {"resume_from_checkpoint": "nowhere"}, {"callbacks": [3]}, {"model": 5}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_wrong_arguments_are_reported_once(wrong, tiny_model: Path, tmp_path: Path) -> None:
    def body(rank: int) -> None:
        options = dict(wrong)
        train(options.pop("model", tiny_model), tmp_path / "run", **options)

    ended = launch(body, tmp_path)
    assert [each.status for each in ended] == [1, 1]
    assert count(ended, "rank 0 of 2: ") == [1, 0]
    assert ended[1].lines == []


@pytest.mark.slow
def test_a_full_disk_on_rank_0(tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    """The failed step is saved elsewhere, where the error says."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()

    def body(rank: int) -> None:
        import tempfile

        tempfile.tempdir = None
        if rank == 0:
            _no_room_in(tmp_path / "run", once=tmp_path / "run/checkpoint-1")
        train(tiny_model, tmp_path / "run")

    ended = launch(body, tmp_path)
    print([each.lines[-1:] for each in ended])
    assert [each.status for each in ended] == [1, 1]
    assert [min(1, n) for n in count(ended, "No space left on device")] == [1, 0]
    assert ended[1].lines == []
    assert checkpoints(tmp_path) == ["checkpoint-1"]
    rescued = list((tmp_path / "elsewhere").glob("*/checkpoint-2"))
    assert len(rescued) == 1
    assert count(ended, f"step 2 is in '{rescued[0]}'") == [1, 0]


def _no_room_in(folder: Path, *, once: Path) -> None:
    """Refuse to make files in a folder once another exists."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and once.exists() and isinstance(args[0], (str, Path)):
            writes = args[2] & (os.O_WRONLY | os.O_RDWR)
            if writes and str(args[0]).startswith(f"{folder}/.grao-fast-new-checkpoint"):
                raise OSError(28, "No space left on device")

    sys.addaudithook(hook)


@pytest.mark.slow
def test_code_that_catches_the_error_trains_again(tiny_model: Path, tmp_path: Path) -> None:
    def body(rank: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                at_call(patch, test_trainer, "rarely_equal", 2, raises(ValueError("broken")))
            with pytest.raises(BaseException, match="broken"):
                train(tiny_model, tmp_path / "one")
        train(tiny_model, tmp_path / "other")

    ended = launch(body, tmp_path)
    assert [each.status for each in ended] == [0, 0], ended
    assert (tmp_path / "other/final").is_dir()


# ---- deaths


def check_death(ended: list[Ended], rank: int, folder: Path, step: int | None) -> None:
    """All others have ended, of which one has told of the death and of the last checkpoint."""
    assert all(each.status == 1 for each in ended if each.rank != rank)
    teller = 0 if rank else 1
    told = [0] * len(ended)
    told[teller] = 1
    assert count(ended, f"rank {rank} of {len(ended)} died without an error of its own") == told
    if step is not None:
        assert goes_on(folder, step) in ended[teller].stderr
    assert all(not each.lines for each in ended if each.rank not in (0, teller))


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_process_ends_the_others(rank: int, tiny_model: Path, tmp_path: Path) -> None:
    """Rank 0 holds the connections by which the others learn of each other."""
    ended = fail(tiny_model, tmp_path, sends(signal.SIGKILL), moment="reward", ranks=[rank])
    assert ended[rank].status == -signal.SIGKILL
    check_death(ended, rank, tmp_path, 1)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_process_that_exits_at_any_moment_ends_the_others(
    moment: str, rank: int, tiny_model: Path, tmp_path: Path
) -> None:
    ended = fail(tiny_model, tmp_path, lambda: os._exit(1), moment=moment, ranks=[rank])
    check_death(ended, rank, tmp_path, MOMENTS[moment][3])


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_two_survivors_report_once(rank: int, tiny_model: Path, tmp_path: Path) -> None:
    ended = fail(tiny_model, tmp_path, sends(signal.SIGKILL), moment="update", ranks=[rank], size=3)
    check_death(ended, rank, tmp_path, 1)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("elsewhere", ["exchange", "reward"])
def test_a_suspended_process_ends_the_others(
    rank: int, elsewhere: str, tiny_model: Path, tmp_path: Path
) -> None:
    config = SHORT.replace(heartbeat_timeout=5.0)

    def body(own: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if own == rank:
                at_call(patch, test_trainer, "rarely_equal", 2, sends(signal.SIGSTOP))
            elif elsewhere == "reward":
                at_call(patch, test_trainer, "rarely_equal", 2, lambda: time.sleep(100))
            train(tiny_model, tmp_path / "run", config)

    with started(body, tmp_path) as processes:
        processes.wait_for_rank(1 - rank, SOON + 60.0)
        processes.send(rank, signal.SIGCONT)
        ended = processes.wait(SOON)
    other = ended[1 - rank]
    print(other.lines)
    assert other.status == 1
    assert other.stderr.count(f"rank {rank} of 2 is suspended or cut off") == 1
    assert goes_on(tmp_path, 1) in other.stderr


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_death_ends_another_process_in_a_long_reward(
    rank: int, tiny_model: Path, tmp_path: Path
) -> None:
    def body(own: int) -> None:
        act = sends(signal.SIGKILL) if own == rank else lambda: time.sleep(100)
        with pytest.MonkeyPatch.context() as patch:
            at_call(patch, test_trainer, "rarely_equal", 2, act)
            train(tiny_model, tmp_path / "run")

    ended = launch(body, tmp_path)
    assert ended[1 - rank].seconds - ended[rank].seconds < SOON
    check_death(ended, rank, tmp_path, 1)


# ---- signals


@pytest.mark.parametrize("ranks", [(1,), pytest.param((0, 1), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(
    "moment", ["reward", *(pytest.param(name, marks=pytest.mark.slow) for name in MOMENTS)]
)
def test_sigterm_saves_on_all_processes(
    moment: str, ranks: tuple[int, ...], tiny_model: Path, tmp_path: Path
) -> None:
    config = SHORT.replace(save_steps=2)
    ended = fail(
        tiny_model, tmp_path, sends(signal.SIGTERM), moment=moment, ranks=ranks, config=config
    )
    assert [each.status for each in ended] == [143, 143]
    assert count(ended, "Traceback") == [0, 0]
    assert ended[1].lines == []
    if moment == "load":
        assert checkpoints(tmp_path) == []
        return
    # an update of a single micro-batch is finished
    last = {"sampling": 1, "reward": 1, "save": 3, "final": 3}.get(moment, 2)
    assert checkpoints(tmp_path)[-1] == f"checkpoint-{last}"
    if moment != "final":
        assert count(ended, goes_on(tmp_path, last)) == [1, 0]


@pytest.mark.slow
def test_ctrl_c_is_shown_once(tiny_model: Path, tmp_path: Path) -> None:
    ended = fail(tiny_model, tmp_path, sends(signal.SIGINT), moment="update", ranks=[0, 1])
    assert [each.status for each in ended] == [-signal.SIGINT, 130]
    assert count(ended, "KeyboardInterrupt: stopped by Ctrl-C") == [1, 0]
    assert ended[1].lines == []
    assert checkpoints(tmp_path)[-1] == "checkpoint-2"


# ---- killed and resumed


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_a_killed_run_resumes_to_the_bits_of_an_uninterrupted_one(
    seed: int, tiny_model: Path, tmp_path: Path
) -> None:
    """One of two processes is killed at a random moment, and again while it resumes."""
    draw = random.Random(seed)
    config = SHORT.replace(ddp_timeout=20.0)  # of a process that waits for one killed at the start

    def body(rank: int) -> None:
        train(tiny_model, tmp_path / "run", config, resume_from_checkpoint="auto")

    def uninterrupted(rank: int) -> None:
        train(tiny_model, tmp_path / "whole", config)

    whole = launch(uninterrupted, tmp_path)
    assert [each.status for each in whole] == [0, 0], whole
    longest = whole[0].seconds
    for _ in range(2):
        with started(body, tmp_path) as processes:
            moment, rank = draw.uniform(0.0, longest), draw.randrange(2)
            processes.sleep(moment)
            processes.send(rank)
            ended = processes.wait(moment + SOON)
        latest = max(each.seconds for each in ended)
        print(f"rank {rank} killed after {moment:.1f} s, the end after {latest:.1f} s,", end=" ")
        print(f"{checkpoints(tmp_path)[-1:]}:", *(each.lines[-1:] for each in ended))
        assert latest - moment < SOON
    ended = launch(body, tmp_path)
    assert [each.status for each in ended] == [0, 0], ended
    assert same_bits(tmp_path / "run/final", tmp_path / "whole/final")
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
