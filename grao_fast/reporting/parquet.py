"""Writes samples as parquet: a file for each step, one row for each sample.

Columns: step, prompt, completion, rewards/NAME for each reward function, reward, advantage,
reference, reference_reward, reference_advantage. A prompt or reference of messages is JSON. What is
absent is null. Paths are those of TRL: completions/completions_00010.parquet.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grao_fast.system.files import write_bytes

FOLDER = "completions"
_NAME = re.compile(r"completions_(\d+)\.parquet")
_OF_GROUP = ("reference", "reference_reward", "reference_advantage")
_TEXTS = ("prompt", "completion", "reference")


class SampleFiles:
    """The parquet files of a run.

    Args:
        output_dir: of the run; `completions/` is made in it.
        keep_to: the last step whose file is kept; a run that resumes there writes the later ones
            again.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, output_dir: Path, *, keep_to: int) -> None:
        self._folder = output_dir / FOLDER
        self._folder.mkdir(exist_ok=True)
        for path in self._folder.iterdir():
            name = _NAME.fullmatch(path.name)
            if name and int(name[1]) > keep_to:
                path.unlink()

    def write(self, step: int, groups: Sequence[Mapping[str, Any]]) -> None:
        """Write the samples of a step; an existing file of that step is replaced.

        groups: as in `Tracker.log_completions`.
        """
        import pyarrow as pa
        from pyarrow import parquet

        rows = list(_rows(step, groups))
        if not rows:
            return
        types = {"step": pa.int64(), **dict.fromkeys(_TEXTS, pa.string())}
        table = pa.table(
            {
                name: pa.array([row[name] for row in rows], types.get(name, pa.float64()))
                for name in rows[0]
            }
        )
        data = io.BytesIO()
        parquet.write_table(table, data, compression="zstd")
        write_bytes(self._folder / f"completions_{step:05d}.parquet", data.getvalue())


def _rows(step: int, groups: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for group in groups:
        scores = group.get("scores") or {}
        for number, completion in enumerate(group["completions"]):
            row = {
                "step": step,
                "prompt": group["prompt"],
                "completion": completion,
                **{f"rewards/{name}": of_group[number] for name, of_group in scores.items()},
                "reward": group["rewards"][number],
                "advantage": group["advantages"][number],
                **{name: group[name] for name in _OF_GROUP},
            }
            yield {name: _plain(value) for name, value in row.items()}


def _plain(value: Any) -> Any:
    """Return a value that parquet holds: text without lone surrogates, no NaN."""
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if value is None or isinstance(value, int):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
