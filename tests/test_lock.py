"""Tests that one run at a time holds a folder, whichever process dies at whatever moment."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from grao_fast.system import heartbeat, lock
from grao_fast.system.interruption import Interruption, at_once
from grao_fast.system.lock import LOCK_FILE, _me, _write, only_run_in

REFUSED = 3


def fork(body: Callable[[], None]) -> int:
    """Run `body` in a child, which exits with 0, or with REFUSED for a ValueError."""
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
    """Return the id of a process that took the lock, ran `inside`, and was killed."""

    def hold() -> None:
        with only_run_in(folder):
            inside()
            os.kill(os.getpid(), signal.SIGKILL)

    pid = fork(hold)
    assert exit_status(pid) == -signal.SIGKILL
    return pid


def test_of_two_runs_that_start_at_once_one_runs(tmp_path: Path):
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


def test_runs_one_after_another_all_run_whatever_the_moment(tmp_path: Path):
    """A released lock is never taken on a file that has been deleted."""

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


def test_the_holder_is_named(tmp_path: Path):
    with only_run_in(tmp_path):
        with pytest.raises(ValueError, match=rf"another run of this process \({os.getpid()}\)"):
            only_run_in(tmp_path).__enter__()
        assert exit_status(fork(lambda: only_run_in(tmp_path).__enter__())) == REFUSED
    with only_run_in(tmp_path):  # released, also by the refused attempt
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
    (tmp_path / LOCK_FILE).write_text("")  # killed before it wrote its name
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


def written(folder: Path, **changes: Any) -> dict[str, Any]:
    """Write a lock file of another holder; returns the holder."""
    holder = _me() | changes
    (folder / LOCK_FILE).write_text(json.dumps(holder))
    return holder


ELSEWHERE = {"host": "elsewhere", "boot": "another", "pid": 7}
OTHER_CONTAINER = {"pid_namespace": "pid:[1]", "started": "1"}  # where that number is another's


def no_flock(*_: Any) -> None:
    raise OSError(errno.ENOTSUP, "Operation not supported")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beats, and the wait for one, in hundredths of seconds."""
    for name, seconds in {"BEAT": 0.02, "SILENCE": 0.2, "LOOK": 0.01}.items():
        monkeypatch.setattr(heartbeat, name, seconds)


@contextmanager
def beating(folder: Path, **changes: Any) -> Iterator[None]:
    """A holder that lives elsewhere, whose flock does not reach here."""
    holder, released = written(folder, **changes), threading.Lock()
    released.acquire()
    thread = threading.Thread(target=heartbeat.beat, args=(folder / LOCK_FILE, holder, released))
    thread.start()
    try:
        yield
    finally:
        released.release()
        thread.join()


def test_this_machine_before_it_started_anew_gives_way(tmp_path: Path):
    written(tmp_path, boot="another")
    with only_run_in(tmp_path):
        pass
    written(tmp_path, host="another-container")  # on this machine, where the lock decides
    with only_run_in(tmp_path):
        pass


@pytest.mark.parametrize("flock", [fcntl.flock, no_flock])
def test_a_dead_holder_on_another_machine_gives_way(tmp_path, quick, flock, monkeypatch, caplog):
    monkeypatch.setattr(fcntl, "flock", flock)
    written(tmp_path, **ELSEWHERE)  # without a beat
    with only_run_in(tmp_path):
        assert "whether process 7 on elsewhere is alive: waiting up to 0.2 s" in caplog.text
        assert "taken over from process 7 on elsewhere, which is dead" in caplog.text
    with beating(tmp_path, **ELSEWHERE):
        time.sleep(0.05)
    with only_run_in(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flock", [fcntl.flock, no_flock])
def test_a_living_holder_on_another_machine_is_named(tmp_path, quick, flock, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(heartbeat, "SILENCE", 30.0)  # a loaded machine may be slow
    with beating(tmp_path, **ELSEWHERE):
        with pytest.raises(ValueError, match=r"process 7 on elsewhere, since 20.*: wait for it"):
            only_run_in(tmp_path).__enter__()
        before = (tmp_path / LOCK_FILE).read_bytes()
        with pytest.raises(ValueError, match="delete"):  # at once
            only_run_in(tmp_path, watch=False).__enter__()
        wait_until(
            lambda: (tmp_path / LOCK_FILE).read_bytes() != before
        )  # it still belongs to its holder


def test_a_lock_released_while_it_is_watched_is_taken(tmp_path, quick, monkeypatch, caplog):
    monkeypatch.setattr(heartbeat, "SILENCE", 30.0)
    written(tmp_path, **ELSEWHERE)
    threading.Timer(0.05, (tmp_path / LOCK_FILE).unlink).start()
    with only_run_in(tmp_path):
        assert "taken over" not in caplog.text
        assert json.loads((tmp_path / LOCK_FILE).read_bytes())["pid"] == os.getpid()


def test_of_two_machines_that_take_over_at_once_one_runs(tmp_path, quick, monkeypatch):
    written(tmp_path, **ELSEWHERE)

    def write_after(descriptor: int, path: Path, mine: dict[str, Any]) -> None:
        _write(descriptor, path, mine)
        written(tmp_path, **ELSEWHERE | {"pid": 8})

    monkeypatch.setattr(lock, "_write", write_after)
    with pytest.raises(ValueError, match="in use by process 8 on elsewhere"):
        only_run_in(tmp_path).__enter__()
    assert json.loads((tmp_path / LOCK_FILE).read_bytes())["pid"] == 8


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait(tmp_path: Path, signum: signal.Signals):
    written(tmp_path, **ELSEWHERE)
    before = (tmp_path / LOCK_FILE).read_bytes()
    reader, writer = os.pipe()

    def wait() -> None:
        logging.getLogger("grao_fast.system.heartbeat").addFilter(lambda _: os.write(writer, b"."))
        with Interruption(), at_once():
            only_run_in(tmp_path).__enter__()

    def wait_for_signal() -> None:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            wait()

    start, pid = time.monotonic(), fork(wait_for_signal)
    os.read(reader, 1)
    os.kill(pid, signum)
    assert exit_status(pid) == 0
    assert time.monotonic() - start < heartbeat.SILENCE / 2
    assert (tmp_path / LOCK_FILE).read_bytes() == before


def test_the_beat_goes_on_until_the_release(tmp_path: Path, quick, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    others = hearts()
    with only_run_in(Path()):
        monkeypatch.chdir(elsewhere)
        (thread,) = hearts() - others
        seen = [count_of(tmp_path)]
        for _ in range(2):
            wait_until(lambda: count_of(tmp_path) > seen[-1])
            seen.append(count_of(tmp_path))
        # a forked child holds no lock and beats no heart
        assert exit_status(fork(show_no_life)) == 0
    thread.join(10)
    assert not thread.is_alive()
    assert list(tmp_path.iterdir()) == [elsewhere]
    monkeypatch.setattr(heartbeat, "BEAT", 600.0)
    with only_run_in(tmp_path):
        (thread,) = hearts() - others
    thread.join(10)  # it does not wait for the next beat
    assert not thread.is_alive()


def show_no_life() -> None:
    assert hearts() == set()


@pytest.mark.parametrize("taken", [True, False])
def test_a_holder_that_lost_its_file_warns_once_and_leaves_the_next_one_alone(
    tmp_path: Path, quick, taken: bool, caplog: pytest.LogCaptureFixture
):
    others = hearts()
    with only_run_in(tmp_path):
        (thread,) = hearts() - others
        if taken:
            replacement = tmp_path / "replacement"
            replacement.write_text(json.dumps(_me() | ELSEWHERE))
            replacement.rename(tmp_path / LOCK_FILE)
        else:
            (tmp_path / LOCK_FILE).unlink()
        thread.join(10)
        assert not thread.is_alive()
    lost = "was taken over by process 7 on elsewhere" if taken else "was deleted"
    (line,) = (each for each in caplog.messages if str(tmp_path) in each)
    assert f"{lost}: two runs may write to this folder" in line
    assert [json.loads(path.read_bytes())["pid"] for path in tmp_path.iterdir()] == [7] * taken


def test_a_full_disk_is_logged_once(tmp_path, quick, monkeypatch, caplog):
    tried: list[int] = []

    def full(descriptor: int) -> None:
        tried.append(descriptor)
        raise OSError(errno.ENOSPC, "No space left on device")

    with only_run_in(tmp_path):
        monkeypatch.setattr(os, "fsync", full)
        wait_until(lambda: len(tried) > 2)
    (line,) = (each for each in caplog.messages if str(tmp_path) in each)
    assert "(No space left on device): a run on another machine may take this one for dead" in line


def test_a_process_ends_while_it_holds_a_lock(tmp_path: Path):
    """Python's exit releases the lock."""
    code = (
        "import sys; from pathlib import Path; from grao_fast.system import heartbeat, lock\n"
        "heartbeat.BEAT = 0.001; held = lock.only_run_in(Path(sys.argv[1])); held.__enter__()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], timeout=60, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def hearts() -> set[threading.Thread]:
    return {each for each in threading.enumerate() if "(beat)" in each.name}


def count_of(folder: Path) -> int:
    return json.loads((folder / LOCK_FILE).read_bytes())["beat"]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_without_locks_the_process_is_looked_up(tmp_path, quick, monkeypatch, caplog):
    monkeypatch.setattr(fcntl, "flock", no_flock)
    with only_run_in(tmp_path):
        assert "runs that start at the same moment may share the folder" in caplog.text
        assert exit_status(fork(lambda: only_run_in(tmp_path).__enter__())) == REFUSED
    taken_and_killed(tmp_path)
    with only_run_in(tmp_path):
        pass
    written(tmp_path, started="1")  # a process with the same id that started at another time
    with only_run_in(tmp_path):
        pass
    written(tmp_path, **OTHER_CONTAINER)
    with only_run_in(tmp_path):
        assert "which is dead" in caplog.text
    monkeypatch.setattr(heartbeat, "SILENCE", 30.0)
    with beating(tmp_path, **OTHER_CONTAINER), pytest.raises(ValueError, match="in use"):
        only_run_in(tmp_path).__enter__()
