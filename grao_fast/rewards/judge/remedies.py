"""Says, in one line, why a judge has no verdict, and what to do about it."""

from __future__ import annotations

from grao_fast.rewards.judge.endpoint import (
    MALFORMED,
    NO_CONNECTION,
    TIMEOUT,
    UNPARSABLE,
    Endpoint,
    Failure,
)
from grao_fast.system.errors import first_of

_REMEDIES = {
    NO_CONNECTION: "start the server, or correct base_url",
    TIMEOUT: "raise timeout, or lower max_concurrency",
    MALFORMED: "check that base_url is that of an OpenAI-compatible endpoint",
    UNPARSABLE: "judge with a model that follows instructions, raise max_tokens, or hold it to "
    "the words A, B and EQUAL by extra_body",
    "status 429": "lower max_concurrency, raise max_retries or backoff, or see to the quota",
}
_SERVER = "look into the server's log; max_retries and backoff bridge a short outage"
_REQUEST = (
    "if the server names an option, change max_tokens, temperature or extra_body; if the "
    "request is too long for it, lower max_prompt_length, max_new_tokens or max_reference_length"
)
_SHOWN = 5  # names of models


def explained(endpoint: Endpoint, failure: Failure) -> str:
    """Return the failure and its remedy on one line, with the model and the URL."""
    remedy = _remedy(endpoint, failure)
    return (
        f"judge {endpoint.model!r} at {endpoint.base_url}: {failure.message.rstrip('.')}; {remedy}"
    )


def _remedy(endpoint: Endpoint, failure: Failure) -> str:
    if failure.kind in _REMEDIES:
        return _REMEDIES[failure.kind]
    if failure.kind in ("status 401", "status 403"):
        if endpoint.api_key_env is None:
            return "name the environment variable that holds the API key by api_key_env"
        return f"correct the key in the environment variable {endpoint.api_key_env!r}"
    if failure.kind == "status 404":
        return _not_found(endpoint)
    return _SERVER if failure.kind.startswith("status 5") else _REQUEST


def _not_found(endpoint: Endpoint) -> str:
    names = endpoint.models()
    if names is None:
        return "correct base_url: it ends with /v1 for most servers"
    if endpoint.model in names:
        return "the server lists the model: check that it is one for chat"
    return f"set model to one that is served: {first_of(names, _SHOWN)}"
