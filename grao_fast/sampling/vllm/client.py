"""An HTTP client of `vllm serve`, whose errors are one line."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from grao_fast.distributed.world import World
from grao_fast.sampling.vllm.requests import LOGPROBS_MODE
from grao_fast.system.errors import UserError, first_line
from grao_fast.system.optional import import_optional

SERVE = f"VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode {LOGPROBS_MODE}"

PauseMode = Literal["wait", "abort", "keep"]

_RETRIES = 3
_TIMEOUT = 3600.0  # seconds for the samples of one prompt, which may queue


class VLLMClient:
    """A running `vllm serve`.

    Args:
        base_url: of the server, without /v1.
        api_key: what it was started with as --api-key; None: it asks for none.

    Raises ValueError where openai, the client, is not installed.
    """

    def __init__(self, base_url: str, *, api_key: str | None) -> None:
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self._openai = import_optional("openai", extra="vllm-server", option='vllm_mode="server"')
        self._client = self._openai.OpenAI(
            base_url=f"{self.base_url}/v1",
            api_key=api_key or "none",
            max_retries=_RETRIES,
            timeout=self._openai.Timeout(_TIMEOUT, connect=10.0),
        )

    def call(self, verb: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The server's answer as JSON; transient failures are retried with growing pauses.

        Raises:
            ConnectionError: no server answers there, or one that fails after retries.
            ValueError: it has no such route, refuses the key, or refuses the request.
        """
        url = self.base_url + path
        body = {} if body is None else {"body": body}
        try:
            return getattr(self._client, verb)(url, cast_to=object, **body)
        except self._openai.NotFoundError as error:
            raise UserError(
                f"{url} is not there; start the server as: {SERVE} ({first_line(error)})"
            ) from error
        except self._openai.AuthenticationError as error:
            raise UserError(
                f"{url} asks for another API key: set vllm_server_api_key_env to the name of the "
                "environment variable that holds the server's --api-key"
            ) from error
        except self._openai.APIConnectionError as error:
            raise ConnectionError(
                f"no vLLM server answers at {url} ({error.__cause__ or error}); start one as: "
                f"{SERVE}, or set vllm_server_base_url"
            ) from error
        except self._openai.APIStatusError as error:
            failure = ConnectionError if error.status_code >= 500 else UserError
            raise failure(f"{url}: {first_line(error)}") from error

    def has(self, path: str) -> bool:
        """Whether the server has a GET route at a path."""
        try:
            self._client.get(self.base_url + path, cast_to=object)
        except self._openai.NotFoundError:
            return False
        except self._openai.APIStatusError:
            return True
        except self._openai.APIConnectionError as error:
            raise ConnectionError(f"no vLLM server answers at {self.base_url}") from error
        return True

    def info(self) -> dict[str, Any]:
        """The server's configuration: `vllm_config` and `vllm_env`."""
        return self.call("get", "/server_info?config_format=json")


class HeldVersion:
    """Recognises a server that has lost or changed the weights that it was given.

    Every process of the server has an id; where it has /weight_info (vLLM 0.32 has), the weights
    have a version too.

    world: the processes that sample from the server.
    """

    def __init__(self, client: VLLMClient, world: World) -> None:
        self._client, self._world = client, world
        self._has_version = client.has("/weight_info")
        self._run, self._count = uuid.uuid4().hex[:12], 0
        self._given: tuple[Any, Any] | None = None

    def mark(self) -> None:
        """Record that the server now has the policy's weights; every process must call it."""
        self._given = self._world.main(self._renewed)

    def is_lost(self) -> bool:
        """Whether the server was restarted or given other weights since the last mark."""
        return self._given is not None and self._now() != self._given

    def _renewed(self) -> tuple[Any, Any]:
        self._count += 1
        if self._has_version:
            version = f"grao-fast-{self._run}-{self._count}"
            self._client.call("post", "/update_weight_version", {"new_version": version})
        return self._now()

    def _now(self) -> tuple[Any, Any]:
        version = self._client.call("get", "/weight_info") if self._has_version else None
        return self._client.info()["vllm_config"].get("instance_id"), version


@contextmanager
def paused(
    client: VLLMClient, *, can_pause: bool, mode: PauseMode, world: World | None = None
) -> Iterator[None]:
    """Pause the server for the block; it resumes afterwards, also after an error.

    Args:
        mode: what becomes of requests in flight. The server finishes them before it pauses
            ("wait"), ends them with the tokens that they have ("abort"), or goes on with them
            afterwards, with an empty cache ("keep"): tokens that are sampled then come from the
            weights of then.
        world: processes that all enter the block, for which rank 0 pauses and resumes.
    """
    if not can_pause:
        yield
        return
    world = World() if world is None else world
    world.main(lambda: client.call("post", f"/pause?mode={mode}"))
    try:
        yield
    finally:
        if world.is_main:
            client.call("post", "/resume")


def api_key(variable: str | None) -> str | None:
    """The API key in an environment variable; UserError if it is unset or empty."""
    if variable is None:
        return None
    if not (key := os.environ.get(variable)):
        raise UserError(
            f"vllm_server_api_key_env names the environment variable {variable!r}, which is not "
            "set: set it to the server's --api-key"
        )
    return key
