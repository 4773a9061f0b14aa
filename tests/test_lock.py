"""One run in a folder at a time, whoever dies when."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grao_fast.lock import LOCK_FILE, _me, only_run_in

REFUSED = 3


def fork(body: Callable[[], None]) -> int:
    """Run `body` in a child; it exits with 0, or with REFUSED where a ValueError ends it."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        body()
        status = 0
    except ValueError:
        status = REFUSED
    finally:
        os._exit(status)


def exit_status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def taken_and_killed(folder: Path, inside: Callable[[], None] = lambda: None) -> int:
    """The id of a process that took the lock, ran `inside`, and was killed."""

    def hold() -> None:
        with only_run_in(folder):
            inside()
            os.kill(os.getpid(), signal.SIGKILL)

    pid = fork(hold)
    assert exit_status(pid) == -signal.SIGKILL
    return pid


def test_of_two_that_start_at_once_one_runs(tmp_path: Path):
    for number in range(15):
        folder = tmp_path / str(number)
        folder.mkdir()
        start, (reader, writer) = time.monotonic() + 0.01, os.pipe()

        def run(folder=folder, start=start, reader=reader, writer=writer) -> None:
            while time.monotonic() < start:
                pass
            try:
                with only_run_in(folder):
                    refused, _, _ = select.select([reader], [], [], 20)
                    assert refused, "the other one holds it as well"
            except ValueError:
                os.write(writer, b".")
                raise

        assert sorted(map(exit_status, [fork(run), fork(run)])) == [0, REFUSED]
        assert list(folder.iterdir()) == []


def test_one_after_the_other_both_run_whatever_the_moment(tmp_path: Path):
    """A lock that is let go is not taken on a file that is no longer there."""

    def run() -> None:
        deadline = time.monotonic() + 0.3
        while time.monotonic() < deadline:
            try:
                with only_run_in(tmp_path):
                    (tmp_path / "alone").mkdir()
                    (tmp_path / "alone").rmdir()
            except ValueError:
                pass

    assert [exit_status(pid) for pid in [fork(run) for _ in range(3)]] == [0, 0, 0]


def test_who_holds_it_is_named(tmp_path: Path):
    with only_run_in(tmp_path):
        with pytest.raises(ValueError, match=rf"another run of this process \({os.getpid()}\)"):
            only_run_in(tmp_path).__enter__()
        assert exit_status(fork(lambda: only_run_in(tmp_path).__enter__())) == REFUSED
    with only_run_in(tmp_path):  # let go, by the refusal as well
        pass
    reader, writer = os.pipe()

    def hold() -> None:
        with only_run_in(tmp_path):
            os.write(writer, b".")
            time.sleep(60)

    pid = fork(hold)
    os.read(reader, 1)
    with pytest.raises(ValueError, match=f"in use by process {pid} on .*, since 20.*: wait for it"):
        only_run_in(tmp_path).__enter__()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_dead_holder_gives_way(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    pid = taken_and_killed(tmp_path)
    assert (tmp_path / LOCK_FILE).exists()
    with caplog.at_level(logging.WARNING), only_run_in(tmp_path):
        assert f"taken over from process {pid}" in caplog.text
    (tmp_path / LOCK_FILE).write_text("")  # killed before it was written down
    with only_run_in(tmp_path):
        pass


def test_a_child_that_outlives_its_dead_parent_does_not_hold_on(tmp_path: Path):
    reader, writer = os.pipe()

    def live_on() -> None:
        os.write(writer, os.getpid().to_bytes(4, "big"))
        time.sleep(60)

    def fork_and_wait() -> None:
        fork(live_on)
        os.write(writer, os.read(reader, 4))  # the child is there

    taken_and_killed(tmp_path, fork_and_wait)
    orphan = int.from_bytes(os.read(reader, 4), "big")
    with only_run_in(tmp_path):
        os.kill(orphan, 0)  # it lives
    os.kill(orphan, signal.SIGKILL)


def test_a_child_that_leaves_does_not_let_go(tmp_path: Path):
    lock = only_run_in(tmp_path)
    with lock:
        # the child leaves through the parent's `with`, as an exception in a forked worker does
        assert exit_status(fork(lambda: lock.__exit__(None, None, None))) == 0
        with pytest.raises(ValueError, match="in use"):
            only_run_in(tmp_path).__enter__()


def written(folder: Path, **changes: Any) -> None:
    (folder / LOCK_FILE).write_text(json.dumps(_me() | changes))


def test_a_holder_on_another_machine_may_live(tmp_path: Path):
    written(tmp_path, host="elsewhere", boot="another", pid=7)
    match = rf"process 7 on elsewhere, .* delete '.*{LOCK_FILE}'"
    with pytest.raises(ValueError, match=match):
        only_run_in(tmp_path).__enter__()
    written(tmp_path, boot="another")  # this machine, before it started anew
    with only_run_in(tmp_path):
        pass
    written(tmp_path, host="another-container")  # of this machine, where the lock is the truth
    with only_run_in(tmp_path):
        pass


def test_without_locks_the_process_is_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with only_run_in(tmp_path):
        assert "runs that start at once are not kept apart" in caplog.text
        assert exit_status(fork(lambda: only_run_in(tmp_path).__enter__())) == REFUSED
    taken_and_killed(tmp_path)
    with only_run_in(tmp_path):
        pass
    written(tmp_path, started="1")  # a process of the same number that began at another time
    with only_run_in(tmp_path):
        pass
    written(tmp_path, pid_namespace="pid:[1]", started="1")  # where that number is another process
    with pytest.raises(ValueError, match="in use"):
        only_run_in(tmp_path).__enter__()
