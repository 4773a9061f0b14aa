"""Runs of several processes that fail: all end soon, with one message, and can be resumed."""

from __future__ import annotations

from pathlib import Path

from processes import launch
from test_trainer import CONFIG, rarely_equal, run

SHORT = CONFIG.replace(max_steps=3, save_steps=1, prompts_per_step=3)


def test_two_processes_train_and_print_once(tiny_model: Path, tmp_path: Path) -> None:
    def body(rank: int) -> None:
        result = run(tiny_model, tmp_path / "run", reward=rarely_equal, config=SHORT)
        print(f"rank {rank}: {result.steps} steps")

    ended = launch(body, tmp_path)
    assert [each.status for each in ended] == [0, 0], ended
    assert [each.stdout for each in ended] == ["rank 0: 3 steps\n", "rank 1: 3 steps\n"]
    assert (tmp_path / "run/final/model.safetensors.index.json").is_file()
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 3
    assert ended[1].lines == []
