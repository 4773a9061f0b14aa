"""Shows a run on the console: a progress bar, tables, messages. A failure here stops no run.

Where the console is no terminal, as in a log file, it gets plain lines: one for each step that is
logged, one for each evaluation, and messages. There are no escape sequences and no tables.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from grao_fast.reporting.tables import completions_table, evaluation_line
from grao_fast.system.streams import lenient
from grao_fast.system.visible import get_logger, visible_lines

logger = get_logger(__name__)

_SHOWN = ("reward", "loss")  # metrics beside the bar, and in the line of a step
_EVALUATION = "eval/"


class Display:
    """Shows progress bar, tables and messages on stderr; lines of text if that is not a terminal.

    Control characters in text are escaped.

    name: of the objective, before the bar.
    shown: False to send messages to `logging` and show nothing else.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        start_step: int,
        shown: bool,
        name: str = "grao",
        console: Console | None = None,
    ) -> None:
        self._console = console or stderr_console()
        # rich raises SystemExit for a broken pipe
        self._console.file = cast(IO[str], lenient(self._console.file, "the console"))
        self._total_steps, self._shown = total_steps, shown
        self._live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._failed = False
        self._progress = Progress(
            TextColumn(name.upper().replace("_", " ")),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("reward [bold]{task.fields[reward]}[/]  loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (shown and self._live),
            speed_estimate_period=24 * 3600,  # seconds; steps may take minutes
        )
        self._task = self._progress.add_task(
            "", total=total_steps, completed=start_step, reward="-", loss="-"
        )
        self._try(self._progress.start)

    def advance(self, step: int) -> None:
        """Count a step as done, for the bar and the time that is left."""
        self._try(lambda: self._progress.update(self._task, completed=step))

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a step's reward and loss, or the means of an evaluation.

        They stand beside the bar, or without a terminal in a line with the time that is left. The
        means of an evaluation always get a line.
        """
        live: dict[str, Any] = {name: f"{metrics[name]:.4g}" for name in _SHOWN if name in metrics}
        self._try(lambda: self._progress.update(self._task, completed=step, **live))
        if live and not self._live:
            texts = [f"{name} {value}" for name, value in live.items()]
            self._print_shown("  ".join([self._place(step), *texts, *self._time_left(step)]))
        means = {
            name.removeprefix(_EVALUATION): value
            for name, value in metrics.items()
            if name.startswith(_EVALUATION)
        }
        if means:
            self._print_shown(f"{self._place(step)}  evaluation: {evaluation_line(means)}")

    def _place(self, step: int) -> str:
        return f"step {step}/{self._total_steps}"

    def _time_left(self, step: int) -> list[str]:
        """The time left, by the pace since the second step of this process; [] if unknown."""
        seconds = self._progress.tasks[self._task].time_remaining
        if seconds is None or step >= self._total_steps:
            return []
        return [f"{timedelta(seconds=int(seconds))} left"]

    def completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show a table of a few samples on a terminal."""
        if self._shown and self._live and rows:
            self._try(lambda: self._console.print(completions_table(step, rows)))

    def message(self, text: str) -> None:
        """Print a line above the bar, or log it as a warning if nothing is shown."""
        if self._shown:
            self._print(visible_lines(text))
        else:
            logger.warning("%s", text)

    def close(self) -> None:
        """Stop the bar; calling it again does nothing."""
        if self._progress.live.is_started:  # otherwise rich before 14.3 prints an empty line
            self._try(self._progress.stop)

    def _print_shown(self, text: str) -> None:
        if self._shown:
            self._print(text)

    def _print(self, text: str) -> None:
        self._try(
            lambda: self._console.print(
                text, markup=False, emoji=False, highlight=False, soft_wrap=True
            )
        )

    def _try(self, show: Callable[[], Any]) -> None:
        try:
            show()
        except Exception as error:  # of any kind: the console may be of any class
            if not self._failed:
                self._failed = True
                logger.warning("the console fails, and is ignored from now on: %s", error)


def stderr_console() -> Console:
    """Return a console on stderr; what is no terminal is none, even where FORCE_COLOR is set."""
    return Console(stderr=True, force_terminal=None if sys.stderr.isatty() else False)
