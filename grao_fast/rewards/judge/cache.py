"""The verdicts of earlier requests, in a file that several processes may share."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grao_fast.rewards.finding import RewardError

_LOCKED = 30.0  # seconds to wait while another process writes


def request_key(base_url: str, body: Mapping[str, Any]) -> str:
    """Return a digest of all that decides an answer: the endpoint and the whole request."""
    return hashlib.sha256(json.dumps([base_url, body], sort_keys=True).encode()).hexdigest()


class VerdictCache:
    """Verdicts by the digest of their request, in a file of SQLite. It holds no texts.

    Threads and processes may use it at once, on a local disk; SQLite's locks are not safe on every
    network file system.

    Raises RewardError where the file cannot be opened, read or written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self._lock = threading.Lock()
        with self._explained():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # closed with the object; threads take turns
            self._file = sqlite3.connect(
                self.path, timeout=_LOCKED, isolation_level=None, check_same_thread=False
            )
            self._file.execute(
                "CREATE TABLE IF NOT EXISTS verdicts (request TEXT PRIMARY KEY, verdict TEXT)"
            )

    def get(self, key: str) -> str | None:
        """Return the verdict of a request; None if it is not known."""
        with self._lock, self._explained():
            found = self._file.execute("SELECT verdict FROM verdicts WHERE request = ?", (key,))
            row = found.fetchone()
        return None if row is None else row[0]

    def put(self, key: str, verdict: str) -> None:
        """Keep the verdict of a request; one that another process has kept already stays."""
        with self._lock, self._explained():
            self._file.execute("INSERT OR IGNORE INTO verdicts VALUES (?, ?)", (key, verdict))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise RewardError(
                f"the judge's cache {str(self.path)!r} cannot be used: {error}; name another file, "
                "delete this one, or leave cache out"
            ) from error
