"""The answers from before training, kept in the folder of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grao_fast.evaluation.answers import Answers
from grao_fast.system.files import write_file
from grao_fast.system.visible import get_logger

logger = get_logger(__name__)

_BASELINE = "baseline.json"


def write_baseline(output_dir: Path, answers: Answers, *, data: str) -> None:
    """Write the answers from before training, which a resumed run could not reproduce.

    Args:
        data: digest of the prompts that they answer.
    """
    kept = {"data": data, "texts": answers.greedy, "samples": answers.samples}
    write_file(output_dir / _BASELINE, json.dumps(kept))


def read_baseline(output_dir: Path, *, data: str, prompts: int) -> Answers | None:
    """Read the answers that `write_baseline` wrote; None, with a log line, if there are none.

    Args:
        data: digest of the prompts to be answered.
        prompts: how many there are.
    """
    path = output_dir / _BASELINE
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        digest, texts, samples = kept["data"], kept["texts"], kept.get("samples")
        if not (_are_texts(texts) and all(map(_are_texts, samples or ()))):
            raise TypeError("its texts are none")
    except FileNotFoundError:
        reason = f"{_BASELINE} is not in {output_dir}"
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        reason = f"{path} is damaged"
    else:
        if digest == data and {len(texts), len(samples or texts)} == {prompts}:
            return Answers(texts, samples)
        reason = "eval_dataset is not the one this run began with"
    logger.warning(
        "%s, and the answers from before training cannot be made again: no NAG in this run", reason
    )
    return None


def _are_texts(texts: Any) -> bool:
    return isinstance(texts, list) and all(isinstance(text, str) for text in texts)
