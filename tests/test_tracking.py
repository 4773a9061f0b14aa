"""Tests of metrics.jsonl, completions.jsonl, trackers and the console."""

from __future__ import annotations

import io
import json
import logging
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.tracking import GeneralTracker
from pyarrow import parquet
from rich.console import Console
from tiny import sums

import grao_fast
from grao_fast import GRAOConfig
from grao_fast.reporting.console import stderr_console
from grao_fast.reporting.tables import head, tail
from grao_fast.reporting.tracking import Tracker
from grao_fast.system.bars import no_bar, no_dataset_bar
from grao_fast.system.lines import read_lines

ROW = {
    "prompt": [{"role": "user", "content": "first " + "x" * 500 + " last"}],
    "reference": "the [bold]reference[/bold]\nin two lines",
    "reference_reward": 0.5,
    "reference_advantage": 0.25,
    "completions": ["poor", "fine", "absent"],
    "rewards": [-1.0, 2.0, math.nan],
    "advantages": [-1.5, 1.25, math.nan],
}


def tracker(output_dir: Path, **options: Any) -> Tracker:
    defaults = {"report_to": (), "config": {}, "total_steps": 4, "show_progress": False}
    return Tracker(output_dir, **{**defaults, **options})


def console(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=100, force_terminal=terminal)


def test_lines_are_flushed_exact_and_valid_json(tmp_path: Path) -> None:
    run = tracker(tmp_path / "new" / "folder")
    third = 1 / 3
    run.log(1, {"loss": third, "reward": math.nan, "grad_norm": math.inf, "tokens": 7})
    text = (tmp_path / "new" / "folder" / "metrics.jsonl").read_text()  # before close
    (line,) = text.splitlines()
    row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert row == {"step": 1, "loss": third, "reward": None, "grad_norm": None, "tokens": 7}
    assert next(iter(row)) == "step"
    run.log_completions(1, [ROW])
    (row,) = read_lines(tmp_path / "new" / "folder" / "completions.jsonl")
    assert row == {"step": 1, **ROW, "rewards": [-1.0, 2.0, None], "advantages": [-1.5, 1.25, None]}
    run.close()
    run.close()


def test_a_new_run_starts_new_files_and_a_resumed_one_continues(tmp_path: Path) -> None:
    for _ in range(2):
        with tracker(tmp_path) as run:
            for step in range(4):
                run.log(step, {"loss": step / 3})
                run.log_completions(step, [ROW])
    path = tmp_path / "metrics.jsonl"
    assert [row["step"] for row in read_lines(path)] == [0, 1, 2, 3]
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a line
    with tracker(tmp_path, start_step=2) as run:
        run.log(3, {"loss": 9.0})
    assert read_lines(path) == [
        *({"step": step, "loss": step / 3} for step in range(3)),
        {"step": 3, "loss": 9.0},
    ]
    assert [row["step"] for row in read_lines(tmp_path / "completions.jsonl")] == [0, 1, 2]
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "completions.jsonl"}


@pytest.mark.parametrize("text", ["\u2028 \x85 \x0b \r\n", "\ud800"])
def test_any_text_survives_a_resume(tmp_path: Path, text: str) -> None:
    with tracker(tmp_path) as run:
        run.log_completions(1, [{"prompt": text}])
    tracker(tmp_path, start_step=1).close()
    assert read_lines(tmp_path / "completions.jsonl") == [{"step": 1, "prompt": text}]


BROKEN = {
    "cut": b'{"st',
    "inside a character": '{"step": 2, "prompt": "\u00e9'.encode()[:-1],
    "no row": b"[1, 2]",
    "no step": b'{"loss": 1}',
    "zeros of a lost block": bytes(100),
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("line", BROKEN.values(), ids=list(BROKEN))
def test_broken_lines_are_left_out_with_a_warning(tmp_path, line, caplog) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b"\n" + b'{"step": 2}\n' + line)
    tracker(tmp_path, start_step=2).close()
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    assert "metrics.jsonl: line 2 cannot be read: left out" in caplog.text
    assert len(caplog.records) == 1


class Recorder(GeneralTracker):
    name = "recorder"
    requires_logging_directory = False
    main_process_only = False
    tracker = None

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def start(self) -> None:
        self.calls.append("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.calls.append(values)

    def log(self, values: dict[str, float], step: int | None = None, **options: Any) -> None:
        self.calls.append((step, values))

    def finish(self) -> None:
        self.calls.append("finish")


def test_trackers_receive_metrics(tmp_path: Path) -> None:
    recorder = Recorder()
    config = {"beta": 0.5, "report_to": ("a", "b"), "device": None}
    with tracker(tmp_path, report_to=[recorder], config=config) as run:
        run.log(1, {"loss": 0.5, "reward": math.nan})
    run.close()
    assert recorder.calls == [
        "start",
        {"beta": 0.5, "report_to": "('a', 'b')", "device": "None"},
        (1, {"loss": 0.5}),
        "finish",
    ]


def test_unknown_and_missing_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate.tracking

    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: [])
    (tmp_path / "metrics.jsonl").write_text("kept")
    with pytest.raises(ValueError, match="'comet_ml' needs its package: pip install comet-ml"):
        tracker(tmp_path, report_to=("comet_ml",))
    with pytest.raises(ValueError, match="does not know 'tensorbored': use one of aim, clearml"):
        tracker(tmp_path, report_to=("tensorbored",))
    assert (tmp_path / "metrics.jsonl").read_text() == "kept"


def test_nothing_is_shown_without_progress(tmp_path, capfd, caplog) -> None:
    with caplog.at_level(logging.INFO), tracker(tmp_path) as run:
        run.log(1, {"loss": 0.5, "reward": 0.25})
        run.log_completions(1, [ROW])
        run.message("all groups are dead")
    assert capfd.readouterr() == ("", "")
    assert "all groups are dead" in caplog.text


def test_lines_of_text_without_a_terminal(tmp_path: Path) -> None:
    screen = console()
    with tracker(tmp_path, show_progress=True, console=screen) as run:
        run.log(1, {"loss": 0.5, "reward": 0.123456})
        run.log(1, {"eval/reward": -0.25, "eval/ras": 0.5, "eval/ras_win_or_tie": 0.75})
        run.log_completions(1, [ROW])
        run.message("look [here] :warning:\x1b[2J")
    assert screen.file.getvalue() == (
        "step 1/4  reward 0.1235  loss 0.5\n"
        "step 1/4  evaluation: mean reward -0.250, RAS 50.0%\n"
        "look [here] :warning:\\x1b[2J\n"
    )


def test_lines_say_the_time_left_by_all_steps_of_the_process(tmp_path, monkeypatch) -> None:
    clock = iter(range(0, 100_000, 10))  # seconds at each look
    screen = console()
    monkeypatch.setattr(screen, "get_time", lambda: next(clock))
    with tracker(tmp_path, show_progress=True, console=screen, total_steps=9, start_step=2) as run:
        for step in (3, 4, 5, 8, 9):
            run.log(step, {"loss": 0.5})
    lines = screen.file.getvalue().splitlines()
    assert lines[0] == "step 3/9  loss 0.5"  # the first step of a process says nothing about pace
    assert lines[-1] == "step 9/9  loss 0.5"
    left = [line.rpartition("  ")[2] for line in lines[1:-1]]
    assert all(re.fullmatch(r"0:\d\d:\d\d left", text) for text in left)
    assert left == sorted(left, reverse=True)


def test_steps_that_are_not_logged_advance_the_bar_without_a_line(tmp_path: Path) -> None:
    screen = console()
    with tracker(tmp_path, show_progress=True, console=screen) as run:
        run.advance(1)
        assert run._display._progress.tasks[0].completed == 1
    assert screen.file.getvalue() == ""


@pytest.mark.parametrize(
    "text", ["[red]x[/red]", "[/nope]", "[link=file:///etc]x[/link]", ":bomb:"]
)
def test_markup_in_a_table_is_text(tmp_path: Path, text: str) -> None:
    screen = console(terminal=True)
    hostile = text + "\x1b]0;title\x07\u202e"
    row = {**ROW, "prompt": hostile, "reference": hostile, "completions": [hostile] * 3}
    with tracker(tmp_path, show_progress=True, console=screen) as run:
        run.log_completions(1, [row])
    shown = screen.file.getvalue()
    assert shown.count(text + "\\x1b]0;title\\x07\\u202e") == 4
    assert "\x1b]" not in shown and "\u202e" not in shown


def test_bars_of_libraries_are_off_only_within() -> None:
    import datasets
    from transformers.utils import logging as transformers_logging

    for kept, closed in ((True, False), (False, True)):
        with no_bar(unless=kept), no_dataset_bar(unless=kept):
            assert transformers_logging.is_progress_bar_enabled() is kept
            assert datasets.are_progress_bars_disabled() is closed
        assert transformers_logging.is_progress_bar_enabled()
        assert not datasets.are_progress_bars_disabled()


def test_a_log_file_is_no_terminal_for_any_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("sys.stderr", io.StringIO())
    screen = stderr_console()
    assert not screen.is_terminal
    screen.print("[red]plain[/red]")
    assert screen.file.getvalue() == "plain\n"


def test_progress_bar_on_a_terminal(tmp_path: Path) -> None:
    screen = console(terminal=True)
    options = {"show_progress": True, "console": screen, "start_step": 2, "objective": "dr_grpo"}
    with tracker(tmp_path, **options) as run:
        run.log(3, {"loss": 0.5, "reward": 0.25})
    shown = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", screen.file.getvalue())
    assert re.search(r"2/4 +reward - +loss -", shown)
    assert re.search(r"3/4 +reward 0\.25 +loss 0\.5 +\d:\d\d:\d\d left", shown)
    assert "step 3" not in shown  # the bar shows it
    assert "DR GRPO" in shown


def test_table_of_samples(tmp_path: Path) -> None:
    screen = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    tie = {**ROW, "reference": None, "completions": ["same", "same"], "rewards": [1.0, 1.0]}
    with tracker(tmp_path, show_progress=True, console=screen) as run:
        run.log_completions(7, [ROW, tie, ROW, {**ROW, "reference": "fourth"}])
    shown = screen.file.getvalue()
    assert "samples of step 7" in shown
    assert "the [bold]reference[/bold] in two lines" in shown  # as text, not as markup
    assert " last" in shown
    assert "first" not in shown  # the end of a long prompt is shown
    assert shown.count("best") == shown.count("worst") == 2
    assert shown.count("sample ") == 1
    assert "fourth" not in shown
    lines = {line.split()[1]: line.split() for line in shown.splitlines() if "│" in line}
    assert lines["best"][3:8:2] == ["2.000", "1.250", "fine"]
    assert lines["worst"][3:8:2] == ["-1.000", "-1.500", "poor"]


def test_texts_are_cut_to_length() -> None:
    assert head("a  b\nc", 5) == tail("a  b\nc", 5) == "a b c"
    assert head("abcdefgh", 5) == "ab..."
    assert tail("abcdefgh", 5) == "...gh"


def test_samples_as_parquet(tmp_path: Path) -> None:
    scores = {"near": [-1.0, 2.0, math.nan], "f(x, most=3)": [0.0, 0.0, 0.0]}
    odd = {**ROW, "prompt": "\ud800 \u2028", "reference": None, "reference_reward": math.nan}
    with tracker(tmp_path, parquet=True) as run:
        run.log_completions(7, [{**ROW, "scores": scores}, {**odd, "scores": scores}])
        run.log_completions(8, [])
    (path,) = (tmp_path / "completions").iterdir()
    assert path.name == "completions_00007.parquet"
    rows = parquet.read_table(path).to_pylist()
    assert len(rows) == 6
    assert rows[1] == {
        "step": 7,
        "prompt": json.dumps(ROW["prompt"]),
        "completion": "fine",
        "rewards/near": 2.0,
        "rewards/f(x, most=3)": 0.0,
        "reward": 2.0,
        "advantage": 1.25,
        "reference": ROW["reference"],
        "reference_reward": 0.5,
        "reference_advantage": 0.25,
    }
    assert rows[2]["rewards/near"] is rows[2]["reward"] is rows[2]["advantage"] is None
    assert rows[3]["prompt"] == "\\ud800 \u2028"
    assert rows[3]["reference"] is rows[3]["reference_reward"] is None


def test_a_resumed_run_keeps_no_later_parquet(tmp_path: Path) -> None:
    (tmp_path / "completions").mkdir()
    (tmp_path / "completions/notes.txt").write_text("kept")
    for start in (0, 4, 0):
        with tracker(tmp_path, parquet=True, start_step=start) as run:
            for step in range(start + 2, 9, 2):
                run.log_completions(step, [ROW])
            names = sorted(path.name for path in (tmp_path / "completions").iterdir())
            assert names == [*(f"completions_{n:05d}.parquet" for n in (2, 4, 6, 8)), "notes.txt"]
        table = parquet.read_table(tmp_path / "completions/completions_00008.parquet")
        assert table.num_rows == 3
    tracker(tmp_path, parquet=True, start_step=4).close()
    assert len(list((tmp_path / "completions").iterdir())) == 3


def test_a_run_in_a_log_file_with_parquet(tiny_model: Path, tmp_path: Path, capfd) -> None:
    def length(completions):
        return [len(text[0]["content"]) / 10 for text in completions]

    def nothing(completions):
        return [None for _ in completions]

    config = GRAOConfig(
        num_generations=2, max_new_tokens=4, prompts_per_step=2, max_steps=2, save_steps=1,
        log_completions_steps=1, log_completions=True, device="cpu",
    )  # fmt: skip
    for resumed in (None, tmp_path / "checkpoint-1"):
        if resumed:
            for name in ("checkpoint-2", "final"):
                shutil.rmtree(tmp_path / name)
        grao_fast.train(
            tiny_model, sums(4), [length, nothing], config=config, output_dir=tmp_path,
            resume_from_checkpoint=resumed,
        )  # fmt: skip
    shown = capfd.readouterr().err
    assert len(re.findall(r"^step 2/2  reward .*  loss .*$", shown, re.MULTILINE)) == 2
    assert "\r" not in shown and "\x1b" not in shown
    tables = [parquet.read_table(p) for p in sorted((tmp_path / "completions").iterdir())]
    assert [table.column("step").to_pylist() for table in tables] == [[1] * 4, [2] * 4]
    assert tables[0].schema == tables[1].schema
    rows = tables[0].to_pylist()
    assert all(
        row["rewards/length"] == len(row["completion"]) / 10 == row["reward"] for row in rows
    )
    assert all(row["rewards/nothing"] is None for row in rows)
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["total_steps"] == 2 and "log_completions" in facts["changed"]
    assert "beta" not in facts["changed"] and facts["versions"]["torch"]


def test_samples_of_no_step_are_refused() -> None:
    with pytest.raises(ValueError, match="log_completions=True has no effect without"):
        GRAOConfig(log_completions=True, log_completions_steps=0)


class Failing(Recorder):
    def start(self) -> None:
        raise RuntimeError("no key\nlog in first")


def test_a_tracker_that_cannot_start_is_told_in_a_line(tmp_path: Path) -> None:
    message = r"Failing cannot start \(RuntimeError: no key.*\): set it up, or leave it out"
    with pytest.raises(ValueError, match=message):
        tracker(tmp_path, report_to=[Failing()])


class Loud(Recorder):
    def start(self) -> None:
        get_logger("accelerate.tracking").debug("as accelerate's own trackers do")


def test_trackers_may_log_through_accelerate(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(PartialState, "_shared_state", {})
    recorder = Loud()
    with tracker(tmp_path, report_to=[recorder]) as run:
        run.log(1, {'rewards/Near("a", most=3)/mean': 1.0, "completions/mean_length": 2.0})
    names = {"rewards/Near__a__ most_3_/mean": 1.0, "completions/mean_length": 2.0}
    assert recorder.calls[-2] == (1, names)  # in characters that MLflow takes
