"""What all tests share."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Before transformers is imported: a name that is no path must fail at once, not after time-outs.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before torch is imported: on tiny tensors threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell's background job and nohup start a process that ignores these signals; a run stops on
# them, and the child processes of the tests inherit what is set here.
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


def pytest_collection_finish() -> None:
    """Exempt objects that imports made from garbage collection, which TRL starts in every run."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each file to one of the processes of `pytest -n`: its tests share what they set up.

    None leaves the choice to pytest-xdist, where `--dist` is not its default.
    """
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Replace fsync by nothing: it waits for the disk, so that data survives a power cut, which no
    test simulates."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model and its tokenizer; shared, so not to be written to."""
    from tiny import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks that every model passes at the start, which take most of a short test's time."""
    monkeypatch.setattr("grao_fast.sampling.loading.check_parity", lambda *args, **options: None)
    monkeypatch.setattr("grao_fast.sampling.loading.check_sampler", lambda *args, **options: None)
