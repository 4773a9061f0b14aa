"""A run goes on after whatever happened to its folder, and loses neither a bit nor a line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from short_runs import CONFIG, run
from test_trainer import ROWS, StopAt, lines, same_bits

from grao_fast.evaluation.baseline import read_baseline
from grao_fast.reporting.plots import plot_run
from grao_fast.rewards.calling import RewardError
from grao_fast.system.lock import only_run_in
from grao_fast.training.checkpoint import CheckpointError, choose_checkpoint, list_checkpoints


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory) -> Path:
    """A run that nothing happened to: 6 steps, checkpoints at 2, 4 and 6."""
    output = tmp_path_factory.mktemp("whole")
    run(tiny_model, output, eval_dataset=ROWS[:3])
    return output


@pytest.fixture
def stopped(tiny_model, whole: Path, tmp_path: Path) -> Path:
    """The folder of that run as it was after step 4."""
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    for name in ("checkpoint-6", "final", "summary.json", "eval-6.jsonl"):
        (shutil.rmtree if (output / name).is_dir() else os.unlink)(output / name)
    return output


class FailAt(StopAt):
    """Dies as a killed process does, as far as the run's own code goes on."""

    def on_step_end(self, step: int, metrics: dict[str, float]) -> bool:
        if super().on_step_end(step, metrics):
            raise RuntimeError(f"died at step {step}")
        return False


def same_run(output: Path, whole: Path) -> bool:
    return same_bits(output / "final", whole / "final") and lines(output) == lines(whole)


def change_manifest(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps(change(manifest["files"])))

    return damage


def change_state(text: str) -> Callable[[Path], None]:
    """Another state.json, to which the manifest is true."""

    def damage(path: Path) -> None:
        (path / "state.json").write_text(text)
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"]["state.json"] = {
            "bytes": len(text),
            "sha256": sha256(text.encode()).hexdigest(),
        }
        (path / "manifest.json").write_text(json.dumps(manifest))

    return damage


def flip(path: Path) -> None:
    moments = path / "optimizer" / "__0_0.distcp"
    data = bytearray(moments.read_bytes())
    data[len(data) // 2] ^= 1
    moments.write_bytes(data)


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def folder_for_file(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").mkdir()


def file_for_folder(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("not a folder")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a file is cut": lambda path: os.truncate(path / "model.safetensors", 100),
    "a file is missing": lambda path: (path / "tokenizer.json").unlink(),
    "a bit is flipped": flip,
    "a folder in place of a file": folder_for_file,
    "a file in place of the folder": file_for_folder,
    "an empty folder": empty,
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "a cut manifest": lambda path: os.truncate(path / "manifest.json", 40),
    "a manifest of zeros": lambda path: (path / "manifest.json").write_bytes(bytes(300)),
    "a manifest that is no text": lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe{"),
    "a nested manifest": lambda path: (path / "manifest.json").write_text("[" * 100_000),
    "a manifest of []": change_manifest(lambda files: []),
    "a manifest of null": change_manifest(lambda files: None),
    "a manifest of 3": change_manifest(lambda files: 3),
    "files are a list": change_manifest(lambda files: {"files": list(files)}),
    "files are null": change_manifest(lambda files: {"files": None}),
    "no files": change_manifest(lambda files: {"files": {}}),
    "a file's facts are null": change_manifest(lambda files: {"files": files | {"a": None}}),
    "a size is text": change_manifest(
        lambda files: {"files": files | {"state.json": {"bytes": "9", "sha256": None}}}
    ),
    "a name outside": change_manifest(
        lambda files: {"files": files | {"../metrics.jsonl": files["state.json"]}}
    ),
    "a state that is no JSON": change_state("{"),
    "a state of []": change_state("[]"),
    "a state without a step": change_state('{"config": {}}'),
    "a state of another step": change_state('{"step": 5, "config": {}}'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_a_torn_checkpoint_is_passed_over(stopped, damage, caplog):
    damage(stopped / "checkpoint-4")
    for resume in (True, "auto", stopped / "checkpoint-2"):
        assert choose_checkpoint(stopped, resume) == stopped / "checkpoint-2"
    assert "checkpoint-4' is torn" in caplog.text or "checkpoint-4' does not exist" in caplog.text
    with pytest.raises(CheckpointError, match="checkpoint-4"):
        choose_checkpoint(stopped, stopped / "checkpoint-4")


def test_a_run_goes_on_from_the_one_before_a_torn_checkpoint(tiny_model, stopped, whole):
    """And once more, when it is stopped before it has come as far as the torn one."""
    DAMAGES["a manifest of null"](stopped / "checkpoint-4")
    options = {"eval_dataset": ROWS[:3], "callbacks": [FailAt(3)]}
    with pytest.raises(RuntimeError, match="step 3"):
        run(tiny_model, stopped, **options, resume_from_checkpoint=True)
    run(tiny_model, stopped, eval_dataset=ROWS[:3], resume_from_checkpoint="auto")
    assert same_run(stopped, whole)
    assert same_bits(stopped / "checkpoint-4", whole / "checkpoint-4")


def test_auto_begins_and_goes_on(tiny_model, whole: Path, tmp_path: Path):
    """One script serves the first start, the starts after kills, and the one after the end."""
    options = {"eval_dataset": ROWS[:3], "resume_from_checkpoint": "auto"}
    for step in (1, 3):  # before the first checkpoint, and after it
        with pytest.raises(RuntimeError, match=f"step {step}"):
            run(tiny_model, tmp_path, **options, callbacks=[FailAt(step)])
    first = run(tiny_model, tmp_path, **options)
    again = run(tiny_model, tmp_path, **options)
    assert same_run(tmp_path, whole)
    assert first.steps == again.steps == 6
    assert first.after.metrics() == again.after.metrics()


def test_auto_begins_where_every_checkpoint_is_torn(tiny_model, whole, tmp_path, caplog):
    shutil.copytree(whole / "checkpoint-2", tmp_path / "checkpoint-2")
    flip(tmp_path / "checkpoint-2")
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        run(tiny_model, tmp_path, resume_from_checkpoint=True)
    run(tiny_model, tmp_path, eval_dataset=ROWS[:3], resume_from_checkpoint="auto")
    assert "checkpoint-2' is torn: optimizer/__0_0.distcp differs" in caplog.text
    assert same_run(tmp_path, whole)


def test_results_are_not_overwritten(tiny_model, tmp_path: Path):
    config = CONFIG.replace(max_steps=2, save_steps=0)

    def fails(prompts, completions):
        raise RuntimeError("at once")

    run(tiny_model, tmp_path, config=config)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for resume in (None, False, True, "auto"):
        with pytest.raises(CheckpointError, match=r"already holds final|no whole|holds the final/"):
            run(tiny_model, tmp_path, reward=fails, config=config, resume_from_checkpoint=resume)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    for name in ("metrics.jsonl", "eval-0.jsonl", "summary.json", "completions.jsonl"):
        other = tmp_path / name.partition(".")[0]
        other.mkdir()
        (other / name).write_text("{}\n")
        with pytest.raises(CheckpointError, match=f"already holds {name}"):
            run(tiny_model, other)


def test_a_run_that_failed_before_its_first_result_can_be_started_again(tiny_model, tmp_path: Path):
    def fails(prompts, completions):
        raise RuntimeError("at once")

    with pytest.raises(RewardError, match="at once"):
        run(tiny_model, tmp_path, reward=fails)
    run(tiny_model, tmp_path, config=CONFIG.replace(max_steps=1))


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"null", b"\xff", b'{"data": "x", "tex', b'{"data": 1, "texts": [3]}'],
)
def test_a_damaged_baseline_costs_the_nag_alone(tiny_model, stopped, whole, content, caplog):
    (stopped / "baseline.json").write_bytes(content)
    assert read_baseline(stopped, data="1", prompts=1) is None
    (record,) = caplog.records
    assert "baseline.json is damaged" in record.message
    assert "no NAG in this run" in record.message


def test_damaged_side_files_do_not_stop_a_resume(tiny_model, stopped: Path, whole: Path, caplog):
    (stopped / "baseline.json").write_text("")
    for name in ("config.json", "eval-0.jsonl"):
        (stopped / name).write_bytes(b"\xff")
    for name in ("metrics.jsonl", "completions.jsonl"):
        with (stopped / name).open("ab") as file:
            file.write('\n{\n{"step": 5, "prompt": "é'.encode()[:-1])
    result = run(tiny_model, stopped, eval_dataset=ROWS[:3], resume_from_checkpoint=True)
    assert same_bits(stopped / "final", whole / "final")
    assert result.before is None
    assert result.after.nag is None
    steps = [row for row in lines(stopped) if "loss" in row]
    assert steps == [row for row in lines(whole) if "loss" in row]
    for said in ("metrics.jsonl: line ", "completions.jsonl: line ", "baseline.json is damaged"):
        assert said in caplog.text


def test_what_the_user_keeps_there_is_left_alone(tiny_model, tmp_path: Path):
    theirs = {"notes.partial": "folder", "data.partial": "file", "x.replaced": "folder",
              "metrics.jsonl.tmp": "file", ".grao-fast-notes": "file"}  # fmt: skip
    for name, kind in theirs.items():
        (tmp_path / name).mkdir() if kind == "folder" else (tmp_path / name).write_text("mine")
    (tmp_path / "notes.partial" / "a").write_text("mine")
    left_over = tmp_path / ".grao-fast-new-checkpoint-2"
    left_over.mkdir()
    (left_over / "model.safetensors").write_text("half")
    run(tiny_model, tmp_path, config=CONFIG.replace(max_steps=2))
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= theirs.keys()
    assert (tmp_path / "notes.partial" / "a").read_text() == "mine"
    assert {name for name in names if name.startswith(".")} == {".grao-fast-notes"}


def test_a_home_folder_is_found(stopped: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(stopped.parent))
    assert choose_checkpoint(stopped, "~/run/checkpoint-4") == stopped / "checkpoint-4"
    assert plot_run("~/run")


def test_what_a_kill_kept_too_long_goes_at_the_resume(tiny_model, stopped: Path):
    """One that came between the writing of a checkpoint and the deleting of an old one."""
    config = CONFIG.replace(save_total_limit=1, max_steps=4)
    run(tiny_model, stopped, config=config, resume_from_checkpoint=True)
    assert [path.name for path in list_checkpoints(stopped)] == ["checkpoint-4"]


def test_the_folder_of_a_living_run_is_refused(tiny_model, tmp_path: Path):
    with only_run_in(tmp_path), pytest.raises(ValueError, match="in use by another run of this"):
        run(tiny_model, tmp_path)
    run(tiny_model, tmp_path, config=CONFIG.replace(max_steps=1))


@pytest.mark.parametrize("resume", ["", 1, 0.5])
def test_a_checkpoint_is_named_in_words_that_are_known(tmp_path: Path, resume):
    with pytest.raises(
        ValueError, match=r"takes a checkpoint's folder, True, \"auto\" or None, got"
    ):
        choose_checkpoint(tmp_path, resume)
