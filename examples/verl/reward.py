"""The reward of the sums, as verl calls it: samples and references alike."""

import re
from typing import Any


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None
) -> float:
    """1 if the last number of an answer is right, else 0.

    The text of a reference begins with the last token of its prompt, often a line break.
    """
    numbers = re.findall(r"-?\d+", solution_str)
    return float(bool(numbers) and numbers[-1] == ground_truth)
