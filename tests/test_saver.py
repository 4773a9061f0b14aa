"""Whatever fails when a run saves, what it has learnt is left behind, and can be gone on with."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kills import exit_status, fork
from short_runs import CONFIG, run
from test_trainer import ROWS, same_bits
from tiny import character_tokenizer
from transformers import LlamaForCausalLM

from grao_fast.callbacks import Callback
from grao_fast.distributed.world import World
from grao_fast.system.lines import LineFile
from grao_fast.training.checkpoint import choose_checkpoint, list_checkpoints, verify
from grao_fast.training.saver import SaveError

NO_CHECKPOINTS = CONFIG.replace(max_steps=2, save_steps=0)
OWN = LlamaForCausalLM.save_pretrained


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("whole")
    run(tiny_model, output, config=NO_CHECKPOINTS)
    return output


class BreakSaving(Callback):
    """From the first step on, saving the model fails in folders whose path holds a word."""

    def __init__(self, patch: pytest.MonkeyPatch, error: Exception, where: str = "") -> None:
        self.patch, self.error, self.where = patch, error, where

    def on_step_end(self, step: int, metrics: dict[str, float]) -> None:
        def fails(model: Any, folder: Path, **options: Any) -> None:
            if self.where in str(folder):
                (Path(folder) / "half").write_text("half")
                raise self.error
            OWN(model, folder, **options)

        self.patch.setattr(LlamaForCausalLM, "save_pretrained", fails)


@pytest.mark.parametrize("save_steps", [0, 2])
def test_a_final_model_that_cannot_be_saved_is_left_as_a_checkpoint(
    tiny_model, tmp_path: Path, whole: Path, monkeypatch, caplog, save_steps: int
):
    config = NO_CHECKPOINTS.replace(save_steps=save_steps)
    broken = BreakSaving(monkeypatch, RuntimeError("a library's\nreason"), where="new-final")
    with pytest.raises(SaveError) as failure:
        run(tiny_model, tmp_path, config=config, callbacks=[broken])
    left = tmp_path / "checkpoint-2"
    assert str(failure.value) == (
        f"final/ could not be saved (a library's reason); step 2 is in '{left}'"
    )
    said = [r.message for r in caplog.records if "ended early" in r.message]
    assert said == [f"the run ended early; resume_from_checkpoint=True goes on from {left}"]
    assert not (tmp_path / "final").exists()
    assert same_bits(left, whole / "final")


@pytest.mark.parametrize("adapter", [False, True])
def test_weights_are_left_bare_where_the_library_cannot_save(
    tiny_model, tmp_path: Path, monkeypatch, caplog, adapter: bool
):
    options: dict[str, Any] = {"config": NO_CHECKPOINTS.replace(save_steps=1)}
    if adapter:
        peft = pytest.importorskip("peft", reason="peft is not installed")
        options["peft_config"] = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])

    class BreakTokenizer(Callback):
        def on_train_begin(self, policy, config) -> None:
            def fails(*_: Any, **__: Any) -> None:
                raise TypeError("no tokenizer today")

            monkeypatch.setattr(type(policy.tokenizer), "save_pretrained", fails)

    run(tiny_model, tmp_path / "whole", **options)
    with pytest.raises(SaveError, match=r"^checkpoint-1 could not be saved \(no tokenizer today\)"):
        run(tiny_model, tmp_path / "broken", **options, callbacks=[BreakTokenizer()])
    assert "step 1 could not be saved in" in caplog.text
    verify(tmp_path / "broken" / "checkpoint-1")
    monkeypatch.undo()
    run(tiny_model, tmp_path / "broken", **options, resume_from_checkpoint=True)
    for name in ("adapter_model.safetensors",) if adapter else ("model.safetensors",):
        ours, theirs = (tmp_path / kind / "final" / name for kind in ("whole", "broken"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_where_the_folder_takes_nothing_the_weights_are_left_elsewhere(
    tiny_model, tmp_path: Path, whole: Path, monkeypatch, caplog
):
    output, temporary = tmp_path / "run", tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    broken = BreakSaving(monkeypatch, OSError("no more room"), where=str(output))
    with pytest.raises(SaveError, match=r"no more room.*step 2 is in '.*rescued.*checkpoint-2'"):
        run(tiny_model, output, config=NO_CHECKPOINTS, callbacks=[broken])
    (left,) = temporary.glob("grao-fast-rescued-*/checkpoint-2")
    assert f"move {left} to {output} to go on from it" in caplog.text
    monkeypatch.undo()
    os.rename(left, output / "checkpoint-2")
    run(tiny_model, output, config=NO_CHECKPOINTS, resume_from_checkpoint="auto")
    assert same_bits(output / "final", whole / "final")


def test_where_nothing_can_be_written_that_is_said(tiny_model, tmp_path: Path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr("grao_fast.training.weights.save_tensors", lambda *_: [][0])
    broken = BreakSaving(monkeypatch, RuntimeError("broken"))
    with pytest.raises(SaveError, match=r"final/ could not .* \(broken\); no step has been saved$"):
        run(tiny_model, tmp_path / "run", config=NO_CHECKPOINTS, callbacks=[broken])
    assert list((tmp_path / "tmp").iterdir()) == []


def test_where_there_is_no_room_for_temporary_files_either_that_is_said(
    tiny_model, tmp_path: Path, monkeypatch, caplog
):
    """A full disk that holds both: Python finds no folder for temporary files on it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    broken = BreakSaving(monkeypatch, OSError("no more room"))
    with pytest.raises(SaveError, match=r"final/ could not .* \(no more room\); no step has been"):
        run(tiny_model, tmp_path / "run", config=NO_CHECKPOINTS, callbacks=[broken])
    assert "step 2 could not be saved among temporary files: " in caplog.text


# Disks that fill up ----------------------------------------------------------------------------


def command(model: Path, output: Path, folder: Path, *more: str) -> list[str]:
    """A run of the command line: two steps, a checkpoint after each."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "own.py").write_text(
        "def letters(prompts, completions, target, **columns):\n"
        "    return [float(t.count(a)) for t, a in zip(completions, target)]\n"
    )
    small = "--num_generations 3 --max_new_tokens 8 --prompts_per_step 4 --device cpu --max_steps 2"
    return [
        "train", "--model", str(model), "--dataset", str(folder / "rows.jsonl"),
        "--reward", f"{folder / 'own.py'}:letters", "--output_dir", str(output),
        "--save_steps", "1", *small.split(), *more,
    ]  # fmt: skip


def run_command(argv: list[str], errors: Path) -> int:
    """Its exit status; what it printed on stderr is in `errors`."""
    from grao_fast.cli.commands import main

    def body() -> None:
        with errors.open("w") as sys.stderr:
            status = main(argv)
        os._exit(status)

    return exit_status(fork(body))


@pytest.fixture
def small_disk(tmp_path: Path):
    """A disk on which one checkpoint and a half fit."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=1400k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up(tiny_model, tmp_path: Path, small_disk: Path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    argv = command(tiny_model, small_disk / "run", tmp_path)
    assert run_command(argv, tmp_path / "errors") == 2
    said = (tmp_path / "errors").read_text().splitlines()
    errors = [line for line in said if "error:" in line]
    assert len(errors) == 1
    assert "Traceback" not in "\n".join(said)
    assert "(No space left on device while checkpoint-2" in errors[0]
    assert f"was written in '{small_disk / 'run'}' (" in errors[0]
    assert "MiB are free without it" in errors[0]
    for path in list_checkpoints(small_disk / "run"):
        verify(path)
    assert choose_checkpoint(small_disk / "run", True).name == "checkpoint-1"

    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    resumed = [*argv, "--resume_from_checkpoint", "auto"]
    assert run_command(resumed, tmp_path / "errors") == 0, (tmp_path / "errors").read_text()
    assert choose_checkpoint(small_disk / "run", True).name == "checkpoint-2"


def test_a_limit_of_file_size_is_named_as_such(tiny_model, tmp_path: Path):
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match=r"File too large while checkpoint-1 was written in"):
            run(tiny_model, tmp_path, config=CONFIG.replace(max_steps=1))

    assert exit_status(fork(limited)) == 0
    assert list_checkpoints(tmp_path) == []


def test_what_a_killed_run_left_for_its_sampler_is_cleared(tiny_model, tmp_path: Path):
    from grao_fast.sampling.weights import WeightFolder

    def killed() -> None:
        held = WeightFolder(str(tmp_path), character_tokenizer(), World())  # noqa: F841
        os.kill(os.getpid(), signal.SIGKILL)

    assert exit_status(fork(killed)) == -signal.SIGKILL
    (left_over,) = tmp_path.iterdir()
    (left_over / "weights-0").mkdir()
    theirs = tmp_path / "grao-fast-weights-notes"
    theirs.mkdir()
    living = WeightFolder(str(tmp_path), character_tokenizer(), World())
    own = Path(living._root.name)
    assert set(tmp_path.iterdir()) == {theirs, own}
    another = WeightFolder(str(tmp_path), character_tokenizer(), World())
    assert own.exists()
    del living, another
    assert set(tmp_path.iterdir()) == {theirs}


def test_a_line_that_finds_no_room_leaves_those_before_it(tmp_path: Path):
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        file = LineFile(tmp_path / "metrics.jsonl", keep_to=0)
        file.write({"step": 1, "loss": 0.5})
        with pytest.raises(OSError, match=r"File too large while a line was written to '.*MiB"):
            file.write({"step": 2, "text": "x" * 100})
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n'

    assert exit_status(fork(limited)) == 0
