"""Compares answers by math-verify: a line of JSON on stdin is answered by one on stdout.

A program of its own, which imports nothing of this package: math-verify limits its time by SIGALRM,
which works in a main thread alone.

Request: {"answers": [text, ...], "text": the completion, "seconds": limit of each stage}.
Answer: {"score": 0, 1 or null, "why": null, "answer" (it cannot be read) or "time"}.
"""

from __future__ import annotations

import json
import os
import re
import sys
from functools import lru_cache
from typing import Any

_WORD = re.compile(r"(?:^|\s)[A-Za-z]{2,}[.,:;!?]?(?:\s|$)")


def compare(answers: list[str], text: str, seconds: int) -> dict[str, Any]:
    """Whether a text gives one of the answers."""
    from math_verify.errors import TimeoutException

    try:
        wanted = [read for read in (read_answer(answer, seconds) for answer in answers) if read]
        if not wanted:
            return {"score": None, "why": "answer"}
        given = read(text, seconds)
        equal = any(is_equal(each, given, seconds) for each in wanted)
    except TimeoutException:
        return {"score": None, "why": "time"}
    return {"score": int(equal), "why": None}


@lru_cache(maxsize=1024)
def read_answer(answer: str, seconds: int) -> Any:
    """What an answer says.

    A formula may stand without the delimiters of LaTeX. Without them, math-verify would look for a
    number in it, and read 2 in "2x+3".
    """
    prose = "$" in answer or "\\boxed" in answer or _WORD.search(answer)
    first, second = (answer, f"${answer}$") if prose else (f"${answer}$", answer)
    return read(first, seconds, formulas_only=True) or read(second, seconds, formulas_only=True)


def read(text: str, seconds: int, *, formulas_only: bool = False) -> Any:
    """What math-verify reads in a text; empty: nothing. Raises its TimeoutException.

    formulas_only: whether what it finds but cannot read counts as nothing.
    """
    from math_verify import parse

    mode = "no_fallback" if formulas_only else "first_match"
    try:
        return parse(text, fallback_mode=mode, parsing_timeout=seconds, raise_on_error=True)
    except Exception:  # of any kind: SymPy raises many for texts that are no mathematics
        return []


def is_equal(wanted: Any, given: Any, seconds: int) -> bool:
    """Whether two parsed answers are equal; a pair that cannot be compared is not."""
    from math_verify import verify
    from math_verify.errors import TimeoutException

    try:
        return verify(wanted, given, timeout_seconds=seconds, raise_on_error=True)
    except TimeoutException:
        raise
    except Exception:  # of any kind, for one of several readings of a text
        return verify(wanted, given, timeout_seconds=seconds)


def main() -> None:
    """Answer until stdin ends."""
    # libraries that print must not write into the answers
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(compare(**json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this file
    main()
