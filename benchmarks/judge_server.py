"""A local server of chat completions that judges as it is told, and fails as it is told.

It prefers "good" to "fair" to "bad". Tests and `judge_faults.py` share it.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ANSWERS = re.compile(r"--- answer A \w+ ---\n(.*)\n--- answer B \w+ ---\n(.*)\n--- end", re.DOTALL)
RANKS = {"good": 2, "fair": 1, "bad": 0}


@dataclass(frozen=True)
class Question:
    """A request for a verdict: the two answers, in order, and how often it has come before."""

    first: str
    second: str
    tries: int

    def holds(self, text: str) -> bool:
        return text in self.first or text in self.second


@dataclass(frozen=True)
class Reply:
    """What is sent: a status and a body, after a delay in seconds; the body None: no answer."""

    status: int = 200
    body: bytes | None = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0


def chat(text: str | None, *, finish: str = "stop", delay: float = 0.0) -> Reply:
    """A chat completion of 100 prompt tokens and 10 completion tokens."""
    message = {"role": "assistant", "content": text}
    body = {
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }
    return Reply(200, json.dumps(body).encode(), delay=delay)


def refusal(status: int, message: str = "as the test wants", **headers: str) -> Reply:
    """An error as OpenAI's, with headers such as retry_after="1"."""
    body = json.dumps({"error": {"message": message, "type": "error", "code": None}}).encode()
    return Reply(status, body, {name.replace("_", "-"): text for name, text in headers.items()})


def verdict(question: Question) -> Reply:
    """The answer that is asked for: A, B or EQUAL."""
    first, second = (RANKS[text.split()[0]] for text in (question.first, question.second))
    return chat("EQUAL" if first == second else "A" if first > second else "B")


class JudgeServer:
    """The server's rules and what it has seen; a test may change `reply` while it runs.

    models: listed at /v1/models; requests for others are refused.
    key: asked for, if not None.
    """

    def __init__(self, reply: Callable[[Question], Reply] = verdict) -> None:
        self.reply = reply
        self.models, self.key = ["judge-model"], None
        self.bodies: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0
        self._tries: Counter[str] = Counter()
        self._lock = threading.Lock()

    def answer(self, path: str, body: dict[str, Any] | None, key: str | None) -> Reply:
        if self.key is not None and key != f"Bearer {self.key}":
            return refusal(401, f"Incorrect API key: {key}")
        if path == "/v1/models":
            return Reply(200, json.dumps({"data": [{"id": name} for name in self.models]}).encode())
        if path != "/v1/chat/completions" or body is None:
            return Reply(404, b'{"detail": "Not Found"}')
        if body["model"] not in self.models:
            return refusal(404, f"The model `{body['model']}` does not exist.")
        text = body["messages"][0]["content"]
        found = ANSWERS.search(text)
        assert found is not None
        with self._lock:
            self.bodies.append(body)
            tries = self._tries[text]
            self._tries[text] += 1
        if "What is 2 + 2?" in text:  # the question before a run
            return chat("A")
        return self.reply(Question(found[1], found[2], tries))


def _handler(server: JudgeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(server.answer(self.path, None, self.headers.get("Authorization")))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server._lock:
                server.at_once += 1
                server.most_at_once = max(server.most_at_once, server.at_once)
            try:
                self._send(server.answer(self.path, body, self.headers.get("Authorization")))
            finally:
                with server._lock:
                    server.at_once -= 1

        def _send(self, reply: Reply) -> None:
            time.sleep(reply.delay)
            if reply.body is None:
                self.close_connection = True
                return
            self.send_response(reply.status)
            headers = {"Content-Type": "application/json", **reply.headers}
            for name, text in (headers | {"Content-Length": str(len(reply.body))}).items():
                self.send_header(name, text)
            try:
                self.end_headers()
                self.wfile.write(reply.body)
            except ConnectionError:  # the client has given up
                self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # the usual 5 lets some of many connections wait for a second


@contextmanager
def serving(server: JudgeServer) -> Iterator[str]:
    """Serve on a port of this machine; gives the base_url."""
    http = _Http(("127.0.0.1", 0), _handler(server))
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1"
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
