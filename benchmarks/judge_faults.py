"""The judge's fault table: what a server does, what the judge does, and its metrics.

    python benchmarks/judge_faults.py

prints the table of docs/rewards.md, measured at a local server. Every row is a call with four
completions, of which two are better and two worse than their references, asked in both orders:
eight questions, with max_retries=2 and backoff=0.05.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from judge_server import JudgeServer, Question, Reply, chat, refusal, serving, verdict

from grao_fast.rewards import Judge, RewardError
from grao_fast.rewards.measured import join_metrics

COMPLETIONS = ["good 0", "bad 1", "good 2", "bad 3"]
REFERENCES = ["fair 0", "fair 1", "fair 2", "fair 3"]
SHOWN = ("requests", "retries", "failed", "unparsable", "disagreements")
HEAD = "| the server | rewards, or the error | " + " | ".join(SHOWN) + " |\n"
HEAD += "| --- | --- |" + " ---: |" * len(SHOWN)

Rule = Callable[[Question], Reply]


@dataclass(frozen=True)
class Fault:
    """A fault: what the server does, in words and as a rule, and what differs from the usual."""

    what: str
    rule: Rule = verdict
    model: str = "judge-model"
    key: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    listening: bool = True


def first(reply: Reply) -> Rule:
    """The reply to the first try of every question."""
    return lambda question: verdict(question) if question.tries else reply


def at(text: str, reply: Reply) -> Rule:
    """The reply to every question with this text in an answer."""
    return lambda question: reply if question.holds(text) else verdict(question)


def always(reply: Reply) -> Rule:
    return lambda question: reply


NOT_JSON = Reply(200, b'{"choices": [')
PAGE = Reply(200, b"<html>Bad gateway</html>", {"Content-Type": "text/html"})
FAULTS = [
    Fault("answers"),
    Fault("429 and Retry-After: 0.2 at every first try", first(refusal(429, retry_after="0.2"))),
    Fault("429 at every first try", first(refusal(429))),
    Fault("500 at every first try", first(refusal(500))),
    Fault(
        "no answer within `timeout` to every first try",
        first(Reply(delay=1.5)),
        options={"timeout": 1.0},
    ),
    Fault("drops the connection at every first try", first(Reply(body=None))),
    Fault("truncated JSON at every first try", first(NOT_JSON)),
    Fault("an HTML page, status 200, at every first try", first(PAGE)),
    Fault("answers after 0.2 s", lambda q: Reply(200, verdict(q).body, delay=0.2)),
    Fault("500 to one completion, always", at("good 0", refusal(500))),
    Fault("400 to one completion: too long", at("good 0", refusal(400, "too many tokens"))),
    Fault("429 and Retry-After: 3600 to one", at("good 0", refusal(429, retry_after="3600"))),
    Fault("truncated JSON to one, always", at("good 0", NOT_JSON)),
    Fault('"They are both fine." to one', at("good 0", chat("They are both fine."))),
    Fault("a verdict cut at max_tokens to one", at("good 0", chat("A", finish="length"))),
    Fault("an answer without content to one", at("good 0", chat(None))),
    Fault("prefers answer A, of one, in both orders", at("good 0", chat("A"))),
    Fault("500, always", always(refusal(500))),
    Fault('"They are both fine.", always', always(chat("They are both fine."))),
    Fault("401: another key", key="sk-other"),
    Fault("404: no such model", model="gpt-0"),
    Fault("is not there", listening=False),
]


@dataclass(frozen=True)
class Measured:
    """rewards: of the completions; an error's message in their place. seconds: of the call."""

    outcome: list[float | None] | str
    metrics: dict[str, float]
    seconds: float


def measure(fault: Fault) -> Measured:
    """Call a judge while the server has this fault."""
    server = JudgeServer(fault.rule)
    server.key = fault.key
    with serving(server) as url:
        if not fault.listening:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        options = {"timeout": 20.0, "backoff": 0.05, "max_retries": 2} | fault.options
        judge = Judge("the better answer", model=fault.model, base_url=url, **options)
        started = time.perf_counter()
        try:
            prompts = ["Is it good?"] * len(COMPLETIONS)
            outcome = asyncio.run(judge(prompts, COMPLETIONS, REFERENCES))
            metrics = join_metrics([judge.take_metrics()])
        except RewardError as error:
            outcome, metrics = str(error).replace(url, "URL"), {}
        seconds = time.perf_counter() - started
    return Measured(outcome, metrics, seconds)


def row(fault: Fault, measured: Measured) -> str:
    """A row of the table. Counts of a run that an error ends depend on how its threads ran."""
    outcome, failed = measured.outcome, isinstance(measured.outcome, str)
    said = f"error: {outcome}" if failed else _words(outcome)
    counts = ["" if failed else f"{measured.metrics[name]:g}" for name in SHOWN]
    return f"| {fault.what} | {said} | " + " | ".join(counts) + " |"


def _words(rewards: Any) -> str:
    return ", ".join("None" if each is None else f"{each:+g}" if each else "0" for each in rewards)


def main() -> None:
    print(HEAD)
    for fault in FAULTS:
        measured = measure(fault)
        print(row(fault, measured))
        print(f"{measured.seconds:5.2f} s  {fault.what}", file=sys.stderr)


if __name__ == "__main__":
    main()
