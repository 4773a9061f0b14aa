"""Tests that a process may be killed at any moment: whole files stay whole, and are found again.

Tests marked slow kill whole runs; the others kill the functions that a run writes with.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from kills import exit_status, fork, killed_at_change
from short_runs import CONFIG, run
from test_trainer import ROWS, lines, same_bits

from grao_fast.distributed.folders import write_folder
from grao_fast.distributed.world import World
from grao_fast.system.files import clear_left_overs, verify_folder, write_file
from grao_fast.system.lines import LineFile, read_lines
from grao_fast.training.checkpoint import checkpoint_path, delete_old, list_checkpoints


def fill(text: str):
    def into(folder: Path) -> None:
        (folder / "weights").write_text(text)
        (folder / "sub").mkdir()
        (folder / "sub" / "tokenizer").write_text("{}")

    return into


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_folder_is_the_old_one_or_the_new_one(tmp_path: Path):
    """Killed while final/ is replaced, and again while the leftovers are deleted."""
    number, seen, killed = 0, [], True
    while killed:
        output = tmp_path / str(number)
        output.mkdir()
        final = output / "final"
        write_folder(final, fill("old"), World())
        killed = killed_at_change(
            number, output, lambda final=final: write_folder(final, fill("new"), World())
        )
        if number % 4 == 0:
            killed_at_change(number // 8, output, lambda output=output: clear_left_overs(output))
        clear_left_overs(output)
        verify_folder(final)
        assert names(output) == {"final"}
        seen.append((final / "weights").read_text())
        number += 1
    assert number > 15  # the number of places of a kill
    assert seen == sorted(seen, reverse=True)  # the old folder up to some place, then the new one
    assert set(seen) == {"old", "new"}


def test_a_checkpoint_is_deleted_at_once(tmp_path: Path):
    number, killed = 0, True
    while killed:
        output = tmp_path / str(number)
        for step in (1, 2):
            write_folder(checkpoint_path(output, step), fill(str(step)), World())
        newest = checkpoint_path(output, 2)
        killed = killed_at_change(number, output, lambda newest=newest: delete_old(newest, 1))
        for path in list_checkpoints(output):
            verify_folder(path)
        clear_left_overs(output)
        assert names(output) in ({"checkpoint-2"}, {"checkpoint-1", "checkpoint-2"})
        number += 1
    assert number > 4
    assert names(output) == {"checkpoint-2"}


def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path):
    number, killed = 0, True
    while killed:
        output = tmp_path / str(number)
        output.mkdir()
        path = output / "baseline.json"
        write_file(path, "old")
        killed = killed_at_change(number, output, lambda path=path: write_file(path, "new"))
        clear_left_overs(output)
        assert names(output) == {"baseline.json"}
        assert path.read_text() in ("old", "new")
        number += 1
    assert number > 3
    assert path.read_text() == "new"


def test_lines_up_to_the_step_stay(tmp_path: Path):
    number, killed = 0, True
    while killed:
        output = tmp_path / str(number)
        output.mkdir()
        path = output / "metrics.jsonl"
        before = LineFile(path, keep_to=0)
        for step in range(1, 4):
            before.write({"step": step})
        before.close()
        killed = killed_at_change(number, output, lambda path=path: LineFile(path, keep_to=2))
        clear_left_overs(output)
        assert read_lines(path)[:2] == [{"step": 1}, {"step": 2}]
        number += 1
    assert number > 4
    assert read_lines(path) == [{"step": 1}, {"step": 2}]


# Whole runs ------------------------------------------------------------------------------------

# Evaluates during the run, and deletes checkpoints during the run and at its end.
SHORT = CONFIG.replace(
    max_steps=3, save_steps=1, eval_steps=2, save_total_limit=1, log_completions_steps=1
)
OPTIONS = {"config": SHORT, "eval_dataset": ROWS[:2]}


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory) -> Path:
    """An undisturbed run."""
    output = tmp_path_factory.mktemp("whole")
    run(tiny_model, output, **OPTIONS)
    return output


def assert_same(output: Path, whole: Path) -> None:
    assert same_bits(output / "final", whole / "final")
    assert lines(output) == lines(whole)
    for name in (
        "completions.jsonl",
        "eval-0.jsonl",
        "eval-2.jsonl",
        "eval-3.jsonl",
        "baseline.json",
    ):
        assert (output / name).read_text() == (whole / name).read_text(), name
    assert names(output) == names(whole)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")  # the checks at the start change nothing in the folder
@pytest.mark.parametrize("finished, places", [(False, 100), (True, 30)], ids=["new", "finished"])
def test_a_run_is_killed_before_every_change_of_its_folder(
    finished: bool, places: int, tiny_model, whole: Path, tmp_path: Path
):
    number, killed = 0, True
    while killed:
        output = tmp_path / str(number)
        if finished:
            shutil.copytree(whole, output)
        else:
            output.mkdir()

        def go_on(output: Path = output) -> None:
            resume = True if finished else "auto"
            run(tiny_model, output, **OPTIONS, resume_from_checkpoint=resume)

        killed = killed_at_change(number, output, go_on)
        assert exit_status(fork(go_on)) == 0, f"change {number}"
        assert_same(output, whole)
        shutil.rmtree(output)
        number += 1
    print(f"killed at {number - 1} places")
    assert number > places


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_runs_are_killed_at_random_moments(tiny_model, whole: Path, tmp_path: Path):
    """Kill runs at random, and resume each until it ends: 50 kills or more, in 30 runs or more."""
    start = time.monotonic()
    assert exit_status(fork(lambda: run(tiny_model, tmp_path / "timed", **OPTIONS))) == 0
    longest = time.monotonic() - start  # later, the run would have ended
    draw, kills, runs = random.Random(0), 0, 0
    while kills < 50 or runs < 30:
        output = tmp_path / str(runs)
        output.mkdir()

        def go_on(output: Path = output) -> None:
            run(tiny_model, output, **OPTIONS, resume_from_checkpoint="auto")

        status = -signal.SIGKILL
        while status:
            child = fork(go_on)
            deadline = time.monotonic() + draw.uniform(0.0, longest)
            while time.monotonic() < deadline and not ended(child):
                time.sleep(0.002)
            if not ended(child):
                os.kill(child, signal.SIGKILL)
            status = exit_status(child)
            assert status in (0, -signal.SIGKILL)
            kills += status != 0
        assert_same(output, whole)
        shutil.rmtree(output)
        runs += 1
    print(f"{kills} kills in {runs} runs")


def ended(child: int) -> bool:
    """Return whether a child has ended, without reaping it."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
