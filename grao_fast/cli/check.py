"""Builds the options of `grao-fast check`, and prints what it finds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grao_fast.cli.options import Command, Run, add_train_options
from grao_fast.distributed import launcher

if TYPE_CHECKING:
    from grao_fast.checkup.result import CheckResult

EXIT_FAILURES = 1
_PROMPTS = 8

_EXIT_STATUS = (
    "Exit status: 0, no failure was found, though there may be warnings; 1, a failure was found, "
    "or there is a traceback; 2, nothing could be measured, for a reason explained in one line; "
    "143, 130 or 129, stopped by SIGTERM, Ctrl-C or SIGHUP."
)


def check_command(run: Run) -> Command:
    """Build `grao-fast check`, with the options of `grao-fast train` and one more."""
    command = Command.new(
        run,
        "check [options]",
        "Tell what is wrong with a training run before it is started, and what it will cost: the "
        "same options as those of train. Samples and scores a few prompts, measures an update "
        "without applying it, and writes nothing.",
        exit_status=_EXIT_STATUS,
    )
    command.add("--check_prompts", int, "prompts that are sampled", default=_PROMPTS)
    add_train_options(command)
    return command


def show(result: CheckResult) -> int:
    """Print the table of a check; returns the exit status."""
    from rich.console import Console

    if launcher.rank() == 0:
        Console().print(result.table())
    return 0 if result.ok else EXIT_FAILURES
