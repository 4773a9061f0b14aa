"""Keeps the progress bars of libraries out of log files, and out of the run's own bar.

A bar is drawn by carriage returns, which a log file keeps as one line of many kilobytes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_bar(*, unless: bool = False) -> Iterator[None]:
    """Disable the progress bars of Transformers, unless a condition holds."""
    from transformers.utils import logging

    if unless or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


@contextmanager
def no_dataset_bar(*, unless: bool = False) -> Iterator[None]:
    """Disable the progress bars of `datasets`, unless a condition holds."""
    import datasets

    if unless or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def on_terminal() -> bool:
    """Return whether standard error is a terminal, where bars are drawn."""
    return sys.stderr is not None and sys.stderr.isatty()
