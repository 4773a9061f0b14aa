"""The connections by which processes learn why a run ends."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from processes import launch

from grao_fast.distributed import links as module
from grao_fast.distributed.launch import launched
from grao_fast.distributed.links import Links
from grao_fast.distributed.watch import _is_timeout
from grao_fast.distributed.world import World


def test_a_heartbeat_is_sent_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It is not an answer to the others', which would go back and forth without rest."""
    sent: list[bytes] = []
    send = Links._send
    monkeypatch.setattr(module, "_BEAT", 0.2)
    monkeypatch.setattr(
        Links, "_send", lambda own, message: sent.append(message) or send(own, message)
    )

    def body(rank: int) -> None:
        with launched("cpu", timeout=60, heartbeat_timeout=60):
            began = time.monotonic()
            time.sleep(1.0)
            beats, passed = sent.count(b""), time.monotonic() - began
        assert 2 <= beats <= 2 + passed / 0.2, beats

    ended = launch(body, tmp_path)
    assert [each.status for each in ended] == [0, 0], [each.stderr[-2000:] for each in ended]


def test_a_rank_0_that_cannot_be_reached_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_TO_CONNECT", 0.5)

    def body(rank: int) -> None:
        dist.init_process_group("gloo")
        os.environ["MASTER_ADDR"] = "nowhere.invalid"
        with Links(World(rank, 2), heartbeat_timeout=60):
            pass

    ended = launch(body, tmp_path)
    assert [each.status for each in ended] == [1, 1]
    assert "rank 0 of 2: not all processes reach rank 0 at nowhere.invalid:" in ended[0].stderr
    assert "set MASTER_ADDR to a name of its machine" in ended[0].stderr
    assert "Traceback" not in ended[1].stderr


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[tcp/pair.cc:553] Timed out waiting 2000ms for recv operation to"), True),
        (dist.DistBackendError("wait timeout after 10ms, keys: /0"), True),
        (RuntimeError("the judge timed out"), False),
        (TimeoutError("timed out waiting 10 ms for recv operation"), False),
        (dist.DistBackendError("unhandled cuda error"), False),
    ],
)
def test_only_an_exchange_of_processes_times_out(error: Exception, expected: bool):
    assert _is_timeout(error) == expected
