"""Requests to an OpenAI-compatible endpoint, with retries; what goes wrong is returned in words."""

from __future__ import annotations

import os
import random
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from grao_fast.rewards.finding import RewardError
from grao_fast.system.errors import one_line
from grao_fast.system.optional import import_optional

_LONGEST_PAUSE = 120.0  # seconds; a server that asks for more is not waited for
_LONGEST_BACKOFF = 30.0
_LONGEST_MESSAGE = 300  # characters of a server's message
_CONNECT = 10.0  # seconds
_TRANSIENT = (408, 409, 425, 429)  # and 500 and above
_REFUSED = (401, 403, 404)  # what will not change from one request to the next

NO_CONNECTION, TIMEOUT = "no connection", "timeout"
MALFORMED, UNPARSABLE = "malformed reply", "unparsable"
SILENT = (NO_CONNECTION, TIMEOUT)


@dataclass(frozen=True)
class Answer:
    """A model's answer.

    whole: False if it was cut at the limit of tokens.
    seconds: that the request took, without earlier tries.
    """

    text: str
    whole: bool
    prompt_tokens: int
    completion_tokens: int
    seconds: float


@dataclass(frozen=True)
class Failure:
    """Why there is no answer.

    kind: NO_CONNECTION, TIMEOUT, MALFORMED, UNPARSABLE, or "status N".
    message: on one line.
    transient: whether another try may succeed.
    refused: whether every further request will fail likewise.
    pause: seconds that the server asks to wait; None: it does not say.
    """

    kind: str
    message: str
    transient: bool
    refused: bool = False
    pause: float | None = None


class Endpoint:
    """A model at an OpenAI-compatible server, asked for chat completions. Threads may share it.

    Args:
        base_url: with its /v1.
        model: its name there.
        api_key_env: the environment variable that holds the API key; None: the server asks for
            none. The key is read at the first request, and kept by the client alone.
        timeout: seconds for one try.
        max_retries: tries after the first, of requests that failed for a reason that may pass.
        backoff: seconds before the first retry, doubled before each further one; a server's
            Retry-After comes before it.

    The retries are not those of the client, which draw from Python's global random generator, so
    that a run would no longer be reproducible.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str | None,
        timeout: float,
        max_retries: int,
        backoff: float,
    ) -> None:
        check_base_url(base_url)
        if not re.fullmatch(r"[A-Za-z_]\w*", api_key_env or "_"):
            raise RewardError(
                "api_key_env takes the name of an environment variable that holds the key, not the "
                "key itself"
            )
        self.base_url, self.model = base_url.rstrip("/"), model
        self.api_key_env, self._timeout = api_key_env, timeout
        self._max_retries, self._backoff = max_retries, backoff
        self._random = random.Random()
        self._lock = threading.Lock()
        self._client: Any = None

    def ask(
        self, body: Mapping[str, Any], stop: threading.Event, *, silent_once: bool = False
    ) -> tuple[Answer | Failure, int]:
        """Return the answer to a request, or why there is none, and the number of tries.

        stop: set when the answer is no longer wanted; it ends the pauses between tries.
        silent_once: whether a server that is silent, or not there, is tried only once.
        """
        done = 0
        while True:
            outcome, done = self._try(body), done + 1
            if isinstance(outcome, Answer) or not outcome.transient or done > self._max_retries:
                return outcome, done
            pause = self._pause(done) if outcome.pause is None else outcome.pause
            silent = silent_once and outcome.kind in SILENT
            if silent or pause > _LONGEST_PAUSE or stop.wait(pause):
                return outcome, done

    def _pause(self, done: int) -> float:
        """Seconds to wait after a number of tries, if the server does not say."""
        backoff = min(self._backoff * 2 ** (done - 1), _LONGEST_BACKOFF)
        return backoff * self._random.uniform(0.75, 1.0)

    def models(self) -> list[str] | None:
        """Return the names of the models that the server lists; None if it lists none."""
        openai, client = self._openai_and_client()
        try:
            listed = client.get("/models", cast_to=object)
            return [str(model["id"]) for model in listed["data"]]
        except (openai.OpenAIError, ValueError, KeyError, TypeError):
            return None

    def _try(self, body: Mapping[str, Any]) -> Answer | Failure:
        openai, client = self._openai_and_client()
        started = time.monotonic()
        try:
            reply = client.post("/chat/completions", cast_to=object, body=dict(body))
            return _read_answer(reply, time.monotonic() - started)
        except openai.APITimeoutError:
            message = f"no answer within {self._timeout:g} seconds"
            return Failure(TIMEOUT, message, transient=True)
        except openai.APIConnectionError as error:
            cause = self._shown(error.__cause__ or error)
            return Failure(NO_CONNECTION, f"the connection failed ({cause})", transient=True)
        except openai.APIStatusError as error:
            return self._of_status(error)
        except (openai.OpenAIError, ValueError, LookupError, TypeError) as error:
            message = f"the reply is not that of a chat completion ({self._shown(error)})"
            return Failure(MALFORMED, message, transient=True)

    def _of_status(self, error: Any) -> Failure:
        status = error.status_code
        # a quota that is used up is told as 429 too
        transient = status in _TRANSIENT or status >= 500
        transient &= getattr(error, "code", None) != "insufficient_quota"
        return Failure(
            f"status {status}",
            self._shown(error),
            transient=transient,
            refused=status in _REFUSED,
            pause=_retry_after(error.response.headers),
        )

    def _shown(self, error: BaseException) -> str:
        """A library's or server's message, in which a server may have repeated the key."""
        text, client = one_line(error), self._client
        if self.api_key_env and client is not None:
            text = text.replace(client.api_key, "[API key]")
        return text[:_LONGEST_MESSAGE]

    def _key(self) -> str:
        """The key, or a word in its place where none is asked for: the client wants one."""
        if self.api_key_env is None:
            return "none"
        if not (key := os.environ.get(self.api_key_env)):
            raise RewardError(
                f"api_key_env names the environment variable {self.api_key_env!r}, which is not "
                f"set: set it to the API key of {self.base_url}"
            )
        return key

    def _openai_and_client(self) -> tuple[Any, Any]:
        openai = import_optional("openai", extra="judge", option="Judge")
        with self._lock:
            if self._client is None:
                self._client = openai.OpenAI(
                    base_url=self.base_url,
                    api_key=self._key(),
                    max_retries=0,
                    timeout=openai.Timeout(self._timeout, connect=min(_CONNECT, self._timeout)),
                )
            return openai, self._client


def check_base_url(base_url: str) -> None:
    """Raise RewardError for what is no http URL, or holds a password, which would be logged."""
    parts = urlsplit(base_url)
    if parts.username or parts.password or parts.query:
        raise RewardError(
            "base_url holds a user, a password or a query: leave them out, and name the "
            "environment variable that holds the key by api_key_env"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RewardError(
            f"base_url={base_url!r} is no URL of a server: write it as 'http://host:port/v1'"
        )


def _read_answer(reply: Any, seconds: float) -> Answer:
    """Raises ValueError, LookupError or TypeError for what is no chat completion."""
    if not isinstance(reply, dict):
        raise TypeError("it is no JSON object")
    choice = reply["choices"][0]
    text, usage = choice["message"].get("content"), reply.get("usage") or {}
    return Answer(
        text=text if isinstance(text, str) else "",  # None for a refusal
        whole=choice.get("finish_reason") != "length",
        prompt_tokens=int(usage.get("prompt_tokens") or 0),
        completion_tokens=int(usage.get("completion_tokens") or 0),
        seconds=seconds,
    )


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait; None if it does not say, or not readably."""
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        said = headers.get("retry-after", "")
        if re.fullmatch(r"[\d.]+", said):
            return float(said)
        return max(0.0, parsedate_to_datetime(said).timestamp() - time.time()) if said else None
    except (ValueError, TypeError):
        return None
