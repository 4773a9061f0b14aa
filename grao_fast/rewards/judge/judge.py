"""`Judge`: a language model compares every completion with its reference."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grao_fast.rewards.finding import RewardError
from grao_fast.rewards.judge.asking import Asker
from grao_fast.rewards.judge.cache import VerdictCache
from grao_fast.rewards.judge.endpoint import Endpoint
from grao_fast.rewards.judge.record import Record
from grao_fast.rewards.judge.verdicts import (
    Verdict,
    answer_text,
    conversation_text,
    preference,
    request_text,
)
from grao_fast.rewards.measured import Metrics
from grao_fast.rewards.named import NamedReward

Text = str | Sequence[Mapping[str, Any]]
_Order = tuple[str, bool]  # a question, and whether the reference is answer A in it


class Judge(NamedReward):
    """A language model that compares completions with references: +1 better, 0 equal, -1 worse.

    It is the paper's pairwise judge, a reward for `reward_type="pairwise"`, where the reference has
    reward 0. With "pointwise" it serves too, beside rewards of that kind, and scores the reference
    0 itself. It gives None, no reward, where it has no verdict: for a prompt without a reference,
    for a request that failed in the end, and for an answer that cannot be read.

    Args:
        criterion: what makes an answer better, such as "the more helpful and accurate answer".
        model: its name at the endpoint.
        base_url: of an OpenAI-compatible endpoint, with its /v1.
        api_key_env: the name of the environment variable that holds the API key; None: the endpoint
            asks for none.
        name: of the reward in metrics and messages.
        both_orders: ask twice, with the completion as answer A and as answer B; verdicts that
            disagree count as equal. False: ask once, in an order that the texts decide.
        max_concurrency: the most requests at a time from this process.
        timeout: seconds for one try of a request.
        max_retries: further tries of a request that met a busy or failing server, or none.
        backoff: seconds before the first further try, doubled before each that follows; a server's
            Retry-After comes before it.
        max_tokens: of an answer, thoughts included; an answer that is cut there has no verdict.
        temperature: of the model; None: the endpoint's own, for models that take none.
        extra_body: further fields of the requests, which the endpoint knows.
        cache: a file that keeps the verdicts, which other processes and runs may share; None: every
            question is asked anew.
        prices: of a million prompt tokens and of a million completion tokens, for the metric
            `cost`.
        give_up_after: answers in succession without a verdict that end the run.

    Raises:
        RewardError: an argument or the cache cannot be used; or, when it is called, the endpoint
            refuses the requests or `give_up_after` answers in succession held no verdict; or, at
            the end of the first step or evaluation, none did.
    """

    per_group = True  # it asks while other groups are sampled

    def __init__(
        self,
        criterion: str,
        *,
        model: str,
        base_url: str,
        api_key_env: str | None = None,
        name: str = "judge",
        both_orders: bool = True,
        max_concurrency: int = 16,
        timeout: float = 60.0,
        max_retries: int = 5,
        backoff: float = 0.5,
        max_tokens: int = 1024,
        temperature: float | None = 0.0,
        extra_body: Mapping[str, Any] | None = None,
        cache: str | Path | None = None,
        prices: tuple[float, float] | None = None,
        give_up_after: int = 32,
    ) -> None:
        if not criterion.strip():
            raise RewardError("criterion is empty: say what makes an answer better")
        _check_least(1, max_concurrency=max_concurrency, max_tokens=max_tokens)
        _check_least(1, give_up_after=give_up_after)
        _check_least(0, max_retries=max_retries, backoff=backoff)
        if timeout <= 0:
            raise RewardError(f"timeout={timeout}: it must be positive")
        super().__init__(
            name,
            takes=("prompts", "completions", "references"),
            settings={"criterion": criterion, "model": model, "both_orders": both_orders},
        )
        self.criterion, self.model, self.base_url = criterion, model, base_url
        self._both_orders = both_orders
        options: dict[str, Any] = {"model": model, "max_completion_tokens": max_tokens}
        if temperature is not None:
            options["temperature"] = temperature
        self._record = Record(prices)
        self._asker = Asker(
            Endpoint(
                base_url,
                model,
                api_key_env=api_key_env,
                timeout=timeout,
                max_retries=max_retries,
                backoff=backoff,
            ),
            options=options | dict(extra_body or {}),
            cache=None if cache is None else VerdictCache(cache),
            record=self._record,
            max_concurrency=max_concurrency,
            give_up_after=give_up_after,
        )

    def __repr__(self) -> str:
        return f"Judge({self.criterion!r}, model={self.model!r}, base_url={self.base_url!r})"

    async def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        references: Sequence[Text | None],
    ) -> list[float | None]:
        """Compare every completion with its reference; see the class."""
        orders = [
            None if other is None else self._orders(prompt, mine, other)
            for prompt, mine, other in zip(prompts, completions, references, strict=True)
        ]
        questions = [question for some in orders for question, _ in some or ()]
        verdicts = await self._asker.ask_all(questions)
        return [None if some is None else self._score(some, verdicts) for some in orders]

    def check_ready(self) -> None:
        """Ask one question, whose verdict does not matter; see `grao_fast.rewards.measured`.

        Raises RewardError if no answer comes; one that cannot be read is a warning.
        """
        self._asker.check(request_text(self.criterion, "What is 2 + 2?", "4", "5"))

    def take_metrics(self) -> Metrics:
        """See `grao_fast.rewards.measured`; raises RewardError if no answer has held a verdict."""
        self._asker.check_any()
        return self._record.take()

    def _orders(self, prompt: Text, completion: Text, reference: Text) -> list[_Order]:
        """The questions to ask about a pair: none if its answers are the same."""
        asked, mine, other = (
            conversation_text(prompt),
            answer_text(completion),
            answer_text(reference),
        )
        if mine == other:
            return []
        orders = [
            (request_text(self.criterion, asked, mine, other), False),
            (request_text(self.criterion, asked, other, mine), True),
        ]
        if self._both_orders:
            return orders
        digest = hashlib.sha256(orders[0][0].encode(errors="replace")).digest()
        return [orders[digest[0] % 2]]

    def _score(
        self, orders: Sequence[_Order], verdicts: Mapping[str, Verdict | None]
    ) -> float | None:
        """The reward of a completion, from the verdicts in each order."""
        self._record.count(comparisons=1)
        scores = []
        for question, swapped in orders:
            verdict = verdicts[question]
            if verdict is None:
                return None
            scores.append(preference(verdict, swapped=swapped))
            if verdict != "EQUAL":
                self._record.value(frac_first=float(verdict == "A"))
        if len(scores) == 2:
            self._record.value(frac_disagreement=float(scores[0] != scores[1]))
            self._record.count(disagreements=scores[0] != scores[1])
        return scores[0] if len(set(scores)) == 1 else 0.0


def _check_least(least: float, **values: float) -> None:
    for name, value in values.items():
        if value < least:
            raise RewardError(f"{name}={value}: it must be at least {least}")
