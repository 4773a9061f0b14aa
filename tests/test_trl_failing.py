"""GRAOTrainer in two processes of which one fails: all end, soon, and one shows why."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from processes import Ended, launch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

pytest.importorskip("trl")

import test_trl_tools
from test_trl_tools import Purse, called, rows, speak, turns
from trl_runs import config, prompts, reward, run

from grao_fast.distributed import links
from grao_fast.system.errors import UserError

Act = Callable[[], Any]
tool_model = test_trl_tools.tool_model  # a fixture
SOON = 30.0  # seconds in which all processes have to end


def rewards_of(completions: list, **_: Any) -> list[float]:
    return [float(len(each[0]["content"])) for each in completions]


def by_function(act: Act, model: Path) -> dict[str, Any]:
    def scores(completions: list, **columns: Any) -> list[float]:
        act()
        return rewards_of(completions)

    return {"reward_funcs": [rewards_of, scores]}


def by_coroutine(act: Act, model: Path) -> dict[str, Any]:
    async def scores(completions: list, **columns: Any) -> list[float]:
        act()
        return rewards_of(completions)

    return {"reward_funcs": [scores, rewards_of]}


def by_model(act: Act, model: Path) -> dict[str, Any]:
    scorer = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    scorer.config._name_or_path = "a/judge"
    scorer.register_forward_pre_hook(lambda *_: act())
    tokenizer = AutoTokenizer.from_pretrained(model)
    return {"reward_funcs": scorer, "reward_processing_classes": tokenizer}


def by_rollout(act: Act, model: Path) -> dict[str, Any]:
    def rollout(prompts: list, trainer: Any) -> dict[str, list]:
        act()
        number = len(prompts)
        return {
            "prompt_ids": [[5, 6]] * number,
            "completion_ids": [[10 + b, 20, 1] for b in range(number)],
            "logprobs": [[-1.0] * 3] * number,
        }

    return {"rollout_func": rollout}


def by_callback(act: Act, model: Path) -> dict[str, Any]:
    class Fails(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            act()

    return {"callbacks": [Fails()]}


WAYS = [by_function, by_coroutine, by_model, by_rollout, by_callback]


def fail(
    model: Path,
    folder: Path,
    act: Act,
    *,
    way: Callable[[Act, Path], dict[str, Any]] = by_function,
    ranks: tuple[int, ...] = (1,),
    data: Any = None,
    steps: int = 4,
    stays: float = 0.0,
) -> list[Ended]:
    """Train and evaluate in two processes, some of which act at the third call; returns their ends.

    stays: seconds for which these are there after their run.
    """

    def body(rank: int) -> None:
        calls = []

        def timed() -> None:
            calls.append(None)
            if rank in ranks and len(calls) == 3:
                (folder / f"failed-{rank}").write_text("")
                act()

        options = {"reward_funcs": reward} | way(timed, model)
        length = 400 if data else 6  # for calls of tools
        args = config(
            folder,
            max_steps=steps,
            gradient_accumulation_steps=1,
            max_completion_length=length,
            ddp_backend="gloo",
        )
        try:
            trainer = run(model, args, data or prompts(["live"] * 12), **options)
            trainer.evaluate(prompts(["live"] * 4))
        finally:
            time.sleep(stays if rank in ranks else 0.0)
        torch.distributed.destroy_process_group()

    ended = launch(body, folder, timeout=90.0)
    for each in ended:
        print(f"rank {each.rank}: status {each.status}", *each.lines[-1:])
    began = min((folder / f"failed-{rank}").stat().st_mtime for rank in ranks)
    seconds = time.time() - began
    print(f"{way.__name__}, ranks {ranks}: all had ended after {seconds:.1f} s")
    assert seconds < SOON
    return ended


def raises(error: BaseException) -> Act:
    def act() -> None:
        raise error

    return act


def assert_shown_by(rank: int, ended: list[Ended], message: str) -> None:
    """Both processes ended with status 1, and one of them alone printed a traceback."""
    assert [each.status for each in ended] == [1, 1], [each.stderr[-2000:] for each in ended]
    told = [each.stderr.count(message) for each in ended]
    assert told == [int(each.rank == rank) for each in ended]
    assert "Traceback" not in ended[1 - rank].stderr


def test_a_reward_that_raises_in_one_process_ends_both(tiny_model: Path, tmp_path: Path) -> None:
    ended = fail(tiny_model, tmp_path, raises(ValueError("broken")))
    assert_shown_by(1, ended, "ValueError: rank 1 of 2: broken\n")
    assert "in scores\n" in ended[1].stderr  # the traceback is the error's own


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("way", WAYS)
def test_an_error_anywhere_ends_both(
    way: Callable[[Act, Path], dict[str, Any]], rank: int, tiny_model: Path, tmp_path: Path
) -> None:
    """A RuntimeError too, which a lost connection to the other raises as well."""
    error = RuntimeError("broken") if way is by_rollout else ValueError("broken")
    ended = fail(tiny_model, tmp_path, raises(error), way=way, ranks=(rank,))
    assert_shown_by(rank, ended, f"{type(error).__name__}: rank {rank} of 2: broken\n")


@pytest.mark.slow
def test_processes_that_cannot_be_connected_train_as_trls(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(world: Any) -> dict:
        return world.together(raises(UserError("no way")) if world.is_main else dict)

    monkeypatch.setattr(links, "_connect", refuse)
    (tmp_path / "failed-1").touch()
    ended = fail(tiny_model, tmp_path, lambda: None)
    assert [each.status for each in ended] == [0, 0], [each.stderr[-2000:] for each in ended]
    told = "if one process fails, the others may wait for it: rank 0 of 2: no way"
    assert [told in each.stderr for each in ended] == [True, False]


@pytest.mark.slow
def test_an_error_in_an_evaluation_after_training(tiny_model: Path, tmp_path: Path) -> None:
    ended = fail(tiny_model, tmp_path, raises(ValueError("broken")), steps=1)
    assert_shown_by(1, ended, "ValueError: rank 1 of 2: broken\n")
    assert "in evaluate\n" in ended[1].stderr


class Fragile(Purse):
    """An environment whose reward and tool act as a test has them act."""

    _act_in_reward = _act_in_tool = staticmethod(lambda: None)

    def put(self, amount: int) -> int:
        """Puts money into the purse.

        Args:
            amount: How much.
        """
        self._act_in_tool()
        return super().put(amount)

    def get_reward(self) -> float:
        self._act_in_reward()
        return super().get_reward()


@pytest.mark.slow
@pytest.mark.parametrize("part", ["_act_in_reward", "_act_in_tool"])
def test_an_environment_that_fails(
    part: str, tool_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL tells the policy of the exceptions of tools; a SystemExit is none of these."""

    def within(act: Act, model: Path) -> dict[str, Any]:
        monkeypatch.setattr(Fragile, part, staticmethod(act))
        return {"environment_factory": Fragile, "reward_funcs": []}

    in_tool = part == "_act_in_tool"
    error = SystemExit(3) if in_tool else ValueError("broken")
    speak(monkeypatch, called("put", amount=6))
    data = rows(turns("put", amount=6), reference_reward=60.0)
    data = Dataset.from_list(data.to_list() * 4)
    ended = fail(tool_model, tmp_path, raises(error), way=within, data=data)
    if in_tool:
        assert [each.status for each in ended] == [1, 3]
        assert all("Traceback" not in each.stderr for each in ended)
    else:
        assert_shown_by(1, ended, "ValueError: rank 1 of 2: broken\n")


@pytest.mark.slow
def test_a_process_that_stays_after_its_error_does_not_keep_the_other(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Its connections are open, so that the other waits in its exchange, as under NCCL."""
    ended = fail(tiny_model, tmp_path, raises(ValueError("broken")), stays=15.0)
    assert_shown_by(1, ended, "ValueError: rank 1 of 2: broken\n")
    assert ended[0].seconds < ended[1].seconds - 2.0


@pytest.mark.slow
def test_both_fail_alike(tiny_model: Path, tmp_path: Path) -> None:
    ended = fail(tiny_model, tmp_path, raises(ValueError("broken")), ranks=(0, 1))
    assert [each.status for each in ended] == [1, 1]
    assert sum("ValueError: rank" in each.stderr for each in ended) == 1


@pytest.mark.slow
def test_a_process_that_is_killed(tiny_model: Path, tmp_path: Path) -> None:
    ended = fail(tiny_model, tmp_path, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert [each.status for each in ended] == [1, -signal.SIGKILL]
    assert "ProcessDied: rank 1 of 2 died without an error of its own" in ended[0].stderr


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "statuses"), [((0, 1), [-2, -2]), ((1,), [1, -2])])
def test_ctrl_c_interrupts_as_in_one_process(
    ranks: tuple[int, ...], statuses: list[int], tiny_model: Path, tmp_path: Path
) -> None:
    ended = fail(tiny_model, tmp_path, lambda: signal.raise_signal(signal.SIGINT), ranks=ranks)
    assert [each.status for each in ended] == statuses
    assert ["KeyboardInterrupt" in each.stderr for each in ended] == [s == -2 for s in statuses]
    assert all("PeerFailed" not in each.stderr for each in ended)


def test_a_single_process_raises_as_trl_does(tiny_model: Path, tmp_path: Path) -> None:
    error = ValueError("broken")
    with pytest.raises(ValueError, match=r"^broken$") as raised:
        run(
            tiny_model,
            config(tmp_path),
            prompts(["live"] * 6),
            **by_function(raises(error), tiny_model),
        )
    assert raised.value is error
