"""Asks for verdicts: from the cache or the endpoint, several at a time, until it is in vain."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from grao_fast.rewards.finding import RewardError
from grao_fast.rewards.judge.cache import VerdictCache, request_key
from grao_fast.rewards.judge.endpoint import UNPARSABLE, Answer, Endpoint, Failure
from grao_fast.rewards.judge.record import Record
from grao_fast.rewards.judge.remedies import explained
from grao_fast.rewards.judge.verdicts import VERDICTS, Verdict, read_verdict
from grao_fast.system.threads import DaemonExecutor
from grao_fast.system.visible import get_logger, squeezed

logger = get_logger(__name__)

_SHOWN = 80  # characters of an answer that cannot be read


class Asker:
    """Gets verdicts from a model. Several calls may run at once; they share its threads.

    Args:
        options: of every request: the model, and what decides its answers.
        cache: of verdicts; None: every question is asked.
        record: takes the metrics.
        max_concurrency: the most requests at a time.
        give_up_after: answers in succession without a verdict, after which it raises.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        options: Mapping[str, Any],
        cache: VerdictCache | None,
        record: Record,
        max_concurrency: int,
        give_up_after: int,
    ) -> None:
        self._endpoint, self._options, self._cache = endpoint, dict(options), cache
        self._record, self._give_up_after = record, give_up_after
        self._threads = DaemonExecutor(max_concurrency)
        self._lock = threading.Lock()
        self._in_vain = 0  # answers in succession without a verdict
        self._ever = False  # whether a question has had a verdict
        self._last: Failure | None = None
        self._failures: dict[str, Failure] = {}  # the first of each kind
        self._warned: set[str] = set()

    async def ask_all(self, questions: Sequence[str]) -> dict[str, Verdict | None]:
        """Return the verdict on each question, None where there is none; each is asked once.

        Raises RewardError if the endpoint refuses, or if it is in vain.
        """
        questions = list(dict.fromkeys(questions))
        stop = threading.Event()
        waiting = [
            asyncio.wrap_future(self._threads.submit(self._ask, question, stop))
            for question in questions
        ]
        try:
            verdicts = await asyncio.gather(*waiting)
        finally:
            stop.set()  # the threads, after an error or a time limit
            for each in waiting:
                each.cancel()
        self._warn()
        return dict(zip(questions, verdicts, strict=True))

    def check_any(self) -> None:
        """Raise RewardError if questions have been asked, and none has ever had a verdict."""
        if self._last is not None and not self._ever:
            raise RewardError(
                f"none of the first {self._in_vain} answers gave a verdict; the last: "
                f"{explained(self._endpoint, self._last)}"
            )

    def check(self, question: str) -> None:
        """Ask a question whose verdict does not matter.

        Raises RewardError if no answer comes; one that cannot be read is a warning.
        """
        outcome, _ = self._endpoint.ask(self._body(question), threading.Event(), silent_once=True)
        if isinstance(outcome, Failure):
            raise RewardError(explained(self._endpoint, outcome))
        if _verdict_of(outcome) is None:
            self._failures[UNPARSABLE] = _unparsable(outcome)
            self._warn()

    def _body(self, question: str) -> dict[str, Any]:
        return {**self._options, "messages": [{"role": "user", "content": question}]}

    def _ask(self, question: str, stop: threading.Event) -> Verdict | None:
        if stop.is_set():
            return None
        body = self._body(question)
        key = request_key(self._endpoint.base_url, body)
        known: Any = None if self._cache is None else self._cache.get(key)
        if known in VERDICTS:
            self._record.count(cached=1)
            self._ever = True
            return known
        outcome, tries = self._endpoint.ask(body, stop)
        self._record.count(requests=tries, retries=max(0, tries - 1))
        if stop.is_set():
            return None
        verdict = self._settle(outcome)
        if verdict is not None and self._cache is not None:
            self._cache.put(key, verdict)
        return verdict

    def _settle(self, outcome: Answer | Failure) -> Verdict | None:
        """Count an outcome; returns its verdict. Raises RewardError if to go on is in vain."""
        if isinstance(outcome, Failure):
            self._record.count(failed=1)
            failure = outcome
        else:
            self._record.answer(outcome)
            if (verdict := _verdict_of(outcome)) is not None:
                with self._lock:
                    self._in_vain, self._ever = 0, True
                return verdict
            self._record.count(unparsable=1)
            failure = _unparsable(outcome)
        with self._lock:
            self._in_vain += 1
            in_vain, self._last = self._in_vain, failure
            self._failures.setdefault(failure.kind, failure)
        if failure.refused:
            raise RewardError(explained(self._endpoint, failure))
        if in_vain >= self._give_up_after:
            raise RewardError(
                f"{in_vain} answers in succession gave no verdict; the last: "
                f"{explained(self._endpoint, failure)}"
            )
        return None

    def _warn(self) -> None:
        """Log the first failure of each kind."""
        with self._lock:
            new = {kind: each for kind, each in self._failures.items() if kind not in self._warned}
            self._warned.update(new)
        for failure in new.values():
            logger.warning(
                "%s. The reward is None where a verdict is missing; the metrics count how often",
                explained(self._endpoint, failure),
            )


def _verdict_of(answer: Answer) -> Verdict | None:
    return read_verdict(answer.text) if answer.whole else None


def _unparsable(answer: Answer) -> Failure:
    text = squeezed(answer.text)
    shown = f"{text[:_SHOWN]}..." if len(text) > _SHOWN else text
    cut = "" if answer.whole else ", cut at the limit of tokens"
    return Failure(UNPARSABLE, f"an answer holds no verdict: {shown!r}{cut}", transient=False)
