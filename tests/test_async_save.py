"""`async_save`: a checkpoint is written by a thread, and is what it would be without one."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import test_checkpoints
from short_runs import CONFIG, run
from test_checkpoints import fail_on_rank_1, run_all
from transformers import LlamaForCausalLM

from grao_fast.callbacks import Callback
from grao_fast.training.checkpoint import choose_checkpoint, list_checkpoints, verify
from grao_fast.training.saver import SaveError

ASYNC = CONFIG.replace(max_steps=3, save_steps=1, async_save=True)
OWN = LlamaForCausalLM.save_pretrained
# They say when and by which options they were written.
OTHER = {"manifest.json", "optimizer/.metadata", "state.json"}


class Saves(Callback):
    """Keeps the steps whose checkpoints were whole."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_save(self, step: int, path: Path) -> None:
        verify(path)
        self.steps.append(step)


def contents(output: Path) -> dict[str, bytes]:
    files = [file for part in ("checkpoint-*", "final") for file in output.glob(f"{part}/**/*")]
    of = {file.relative_to(output).as_posix(): file for file in files if file.is_file()}
    return {n: f.read_bytes() for n, f in of.items() if n.split("/", 1)[1] not in OTHER}


@pytest.mark.parametrize("adapter", [False, True])
def test_it_writes_the_same_files(tiny_model: Path, tmp_path: Path, adapter: bool) -> None:
    options: dict[str, Any] = {}
    if adapter:
        peft = pytest.importorskip("peft", reason="peft is not installed")
        options["peft_config"] = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    saves = Saves()
    at_once = ASYNC.replace(async_save=False)
    run(tiny_model, tmp_path / "at once", config=at_once, **options)
    run(tiny_model, tmp_path / "later", config=ASYNC, callbacks=[saves], **options)
    assert saves.steps == [1, 2, 3]
    assert contents(tmp_path / "later") == contents(tmp_path / "at once")


@pytest.mark.slow
def test_so_do_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["untied", "LoRA, KL, two updates"]
    test_checkpoints.model_of("untied", tmp_path / "models" / "untied")
    test_checkpoints.model_of("tied", tmp_path / "models" / "tied")
    run_all([(name, tmp_path / name) for name in names], tmp_path, 2)
    config = test_checkpoints.SHORT.replace(async_save=True)
    monkeypatch.setattr(test_checkpoints, "SHORT", config)
    run_all([(name, tmp_path / f"{name} later") for name in names], tmp_path, 2)
    for name in names:
        assert contents(tmp_path / f"{name} later") == contents(tmp_path / name)


class Waiting(Callback):
    """The first checkpoint is written when the second step has ended."""

    def __init__(self, patch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.went_on = threading.Event()
        self.error = error

        def waits(model: Any, folder: Path, **options: Any) -> None:
            if "checkpoint-1" in str(folder):
                assert self.went_on.wait(30), "training waits for the checkpoint"
                if self.error is not None:
                    raise self.error
            OWN(model, folder, **options)

        patch.setattr(LlamaForCausalLM, "save_pretrained", waits)

    def on_step_end(self, step: int, metrics: dict[str, float]) -> None:
        if step == 2:
            self.went_on.set()


def test_training_goes_on_meanwhile(tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    at_once = ASYNC.replace(async_save=False)
    run(tiny_model, tmp_path / "at once", config=at_once)
    run(tiny_model, tmp_path / "later", config=ASYNC, callbacks=[Waiting(monkeypatch)])
    assert contents(tmp_path / "later") == contents(tmp_path / "at once")


def test_what_fails_in_the_thread_ends_the_run_at_the_next_save(
    tiny_model: Path, tmp_path: Path, monkeypatch
) -> None:
    fails = Waiting(monkeypatch, OSError("no more room"))
    with pytest.raises(SaveError, match=r"^checkpoint-1 could not be saved \(no more room\); step"):
        run(tiny_model, tmp_path, config=ASYNC, callbacks=[fails])
    assert choose_checkpoint(tmp_path, True).name == "checkpoint-2"
    assert not (tmp_path / "checkpoint-1").exists()


def test_a_run_that_ends_early_waits_for_the_thread(
    tiny_model: Path, tmp_path: Path, monkeypatch
) -> None:
    class Fails(Callback):
        def on_step_end(self, step: int, metrics: dict[str, float]) -> None:
            if step == 2:
                raise RuntimeError("at step 2")

    with pytest.raises(RuntimeError, match="at step 2"):
        run(tiny_model, tmp_path, config=ASYNC, callbacks=[Waiting(monkeypatch), Fails()])
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-1"]
    for path in list_checkpoints(tmp_path):
        verify(path)


@pytest.mark.slow
def test_a_thread_that_fails_in_one_process_ends_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = test_checkpoints.SHORT.replace(async_save=True)
    monkeypatch.setattr(test_checkpoints, "SHORT", config)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    ended = fail_on_rank_1(tmp_path, "checkpoint-1")
    assert [each.status for each in ended] == [1, 1], ended
    said = [line for each in ended for line in each.lines if "SaveError: " in line]
    assert len(said) == 1, ended
    assert "checkpoint-1 could not be saved" in said[0] and "No space left" in said[0]
    assert choose_checkpoint(tmp_path / "run", True).name == "checkpoint-2"
