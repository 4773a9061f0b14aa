"""Checkpoints are whole or not there, whatever moment the process dies at."""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path

import pytest

from grao_fast.distributed.folders import write_folder
from grao_fast.distributed.world import World
from grao_fast.system.files import clear_left_overs
from grao_fast.training.checkpoint import (
    FORMAT,
    CheckpointError,
    checkpoint_path,
    choose_checkpoint,
    delete_old,
    list_checkpoints,
    verify,
)


def write(output: Path, step: int, text: str = "weights") -> Path:
    path = checkpoint_path(output, step)

    def fill(folder: Path) -> None:
        (folder / "model.bin").write_text(text)
        (folder / "sub").mkdir()
        (folder / "sub" / "tokenizer.json").write_text("{}")
        (folder / "optimizer").mkdir()
        (folder / "optimizer" / ".metadata").write_text("where moments are")
        (folder / "state.json").write_text(json.dumps({"step": step, "format": FORMAT}))

    write_folder(path, fill, World())
    return path


def test_a_written_checkpoint_verifies(tmp_path: Path):
    verify(write(tmp_path, 3))


@pytest.mark.parametrize("damage", ["truncate", "change", "delete", "manifest"])
def test_a_torn_checkpoint_is_refused_and_the_one_before_it_used(tmp_path, damage, caplog):
    good, torn = write(tmp_path, 9), write(tmp_path, 10)
    file = torn / "model.bin"
    if damage == "truncate":
        os.truncate(file, 3)
    elif damage == "change":
        file.write_text("weightz")
    elif damage == "delete":
        file.unlink()
    else:
        os.truncate(torn / "manifest.json", 10)
    with pytest.raises(CheckpointError, match="checkpoint-10"):
        choose_checkpoint(tmp_path, torn)
    with caplog.at_level(logging.WARNING):
        assert choose_checkpoint(tmp_path, True) == good
    assert "checkpoint-10" in caplog.text


def test_nothing_to_resume_from_is_an_error(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        choose_checkpoint(tmp_path, True)
    with pytest.raises(CheckpointError, match="does not exist"):
        choose_checkpoint(tmp_path, tmp_path / "checkpoint-7")


def test_a_failed_write_leaves_no_checkpoint(tmp_path: Path):
    def fill(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_folder(checkpoint_path(tmp_path, 1), fill, World())
    assert list_checkpoints(tmp_path) == []
    verify(write(tmp_path, 1))


def test_the_oldest_are_deleted_by_step_not_by_name(tmp_path: Path):
    for step in (9, 10, 100):
        write(tmp_path, step)
    delete_old(checkpoint_path(tmp_path, 100), 2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-100", "checkpoint-10"]


def test_an_old_checkpoint_that_a_reader_holds_open_stops_no_run(tmp_path, monkeypatch, caplog):
    """Files that are open keep their folder from being deleted on NFS."""

    def busy(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    with monkeypatch.context() as patch:
        patch.setattr("grao_fast.system.files.shutil.rmtree", busy)
        for step in (1, 2, 3, 3):
            path = write(tmp_path, step)
            delete_old(path, 1)
        verify(path)
        assert list_checkpoints(tmp_path) == [path]
    assert "checkpoint-1 cannot be deleted (Directory not empty)" in caplog.text
    clear_left_overs(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_what_was_just_written_is_kept_beside_later_leftovers(tmp_path: Path):
    for step in (100, 5, 10):
        write(tmp_path, step)
    delete_old(checkpoint_path(tmp_path, 10), 1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-100", "checkpoint-10"]


def test_a_folder_with_later_checkpoints_is_refused(tmp_path: Path):
    earlier, later = write(tmp_path, 4), write(tmp_path, 6)
    with pytest.raises(CheckpointError, match="already holds checkpoint-6"):
        choose_checkpoint(tmp_path, earlier)
    with pytest.raises(CheckpointError, match="already holds checkpoint-6"):
        choose_checkpoint(tmp_path, None)
    os.truncate(later / "model.bin", 1)
    assert choose_checkpoint(tmp_path, earlier) == earlier  # a torn one stands in nobody's way


def test_a_checkpoint_can_be_written_again(tmp_path: Path):
    write(tmp_path, 4)
    path = write(tmp_path, 4, text="newer")
    verify(path)
    assert (path / "model.bin").read_text() == "newer"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-4"]
