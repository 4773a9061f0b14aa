"""`Math`: answers that are equal as mathematics, by math-verify."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from grao_fast.rewards.finding import RewardError
from grao_fast.rewards.named import CountedReward, accepted_answers, check_column, texts_of
from grao_fast.system.optional import import_optional
from grao_fast.system.visible import get_logger, visible

logger = get_logger(__name__)

_WORKER = Path(__file__).with_name("math_worker.py")
_START = 60.0  # seconds in which a worker imports SymPy, on a busy machine
_LONGEST = 80  # characters of an answer in a warning


class Math(CountedReward):
    r"""1 where a completion's answer equals that in a column as mathematics, else 0.

    math-verify looks for the answer in the completion: the last \boxed{...}, else the last formula
    or number. The column holds a number, LaTeX with or without its delimiters, or a list of answers
    that all count. A row whose answer is None or cannot be read has no reward, nor has a completion
    that cannot be compared in time, such as 9^{9^{9^9}}; warnings count both, and the metrics
    rewards/NAME/unread and rewards/NAME/late.
    Needs math-verify: `pip install "grao-fast[rules]"`.

    Comparisons run in a process of their own, since math-verify can limit its time in a main
    thread alone. If it does not heed the limit, it is killed.

    Args:
        column: of the dataset; "references" compares with the references.
        seconds: time limit of each stage: reading the completion, and comparing.
        name: in metrics.

    Raises:
        RewardError: the column or the limit is not valid.
        UserError: math-verify is not installed.
    """

    per_group = True  # it compares one group while the next is sampled

    def __init__(self, column: str = "answer", *, seconds: int = 5, name: str = "math") -> None:
        if not isinstance(seconds, int) or isinstance(seconds, bool) or seconds < 1:
            raise RewardError(f"seconds must be a whole number of at least 1, got {seconds!r}")
        self._column, self._seconds = check_column(column), seconds
        import_optional("math_verify", extra="rules", option="Math")
        self._worker: _Worker | None = None
        self._lock = threading.Lock()  # one question at a time
        super().__init__(
            name,
            takes=["completions", column],
            settings={"column": column},
            counts=["late", "unread"],
        )

    def __call__(self, completions: Any, **columns: Any) -> list[float | None]:
        """Score completions."""
        where = f"reward {self.__name__}: column {self._column!r}"
        scores: list[float | None] = []
        late, unread = 0, []
        for text, value in zip(texts_of(completions), columns[self._column], strict=True):
            answers = accepted_answers(value, where)
            score, why = self._compare(answers, text) if answers else (None, None)
            scores.append(None if score is None else float(score))
            late += why == "time"
            unread += [answers[0]] if why == "answer" else []
        self.counts["late"] += late
        self.counts["unread"] += len(unread)
        if late:
            logger.warning(
                "reward %s: %d of %d completions could not be compared within %d seconds, and have "
                "no reward", self.__name__, late, len(scores), self._seconds,
            )  # fmt: skip
        if unread:
            logger.warning(
                "%s: math-verify cannot read the answers of %d of %d completions, which have no "
                "reward: %s",
                where, len(unread), len(scores), visible(unread[0][:_LONGEST]),
            )  # fmt: skip
        return scores

    def _compare(self, answers: Sequence[str], text: str) -> tuple[int | None, str | None]:
        with self._lock:
            if self._worker is None or not self._worker.is_usable():
                self._worker = _Worker()
            question = {"answers": list(answers), "text": text, "seconds": self._seconds}
            # two readings of each answer, one of the text, and two comparisons of each pair
            stages = 4 * len(answers) + 2
            answer = self._worker.ask(question, limit=self._seconds * stages + 1)
        return (None, "time") if answer is None else (answer["score"], answer["why"])


class _Worker:
    """A process that compares. It ends with this object, and with this process."""

    def __init__(self) -> None:
        """Start it. Raises RewardError if it cannot compare 1 with 1."""
        self._owner = os.getpid()
        self._process: Any = subprocess.Popen(
            [sys.executable, str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for this process, at whose end the pipe is closed
        )
        self._end = weakref.finalize(self, _kill, self._process, self._owner)
        if self.ask({"answers": ["1"], "text": "1", "seconds": int(_START)}, limit=_START) is None:
            raise RewardError("math-verify does not work: try `python -c 'import math_verify'`")

    def is_usable(self) -> bool:
        """Whether it runs, and was not started by a process that has forked this one."""
        return self._owner == os.getpid() and self._process.poll() is None

    def ask(self, question: dict[str, Any], *, limit: float) -> dict[str, Any] | None:
        """Its answer; None if there is none within the limit, and then it is killed."""
        try:
            self._process.stdin.write(json.dumps(question).encode("ascii") + b"\n")
            self._process.stdin.flush()
            return json.loads(self._line(time.monotonic() + limit))
        except (BrokenPipeError, EOFError, TimeoutError):
            self._end()
            return None

    def _line(self, until: float) -> bytes:
        said, channel = b"", self._process.stdout
        while not said.endswith(b"\n"):
            if not select.select([channel], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError
            part = os.read(channel.fileno(), 4096)
            if not part:
                raise EOFError
            said += part
        return said


def _kill(process: Any, owner: int) -> None:
    if os.getpid() == owner:
        process.kill()
        process.wait()
        process.stdout.close()
        with suppress(BrokenPipeError):  # what it has not read
            process.stdin.close()
