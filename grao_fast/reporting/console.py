"""Shows a run on the console: a progress bar, tables, messages. A failure here stops no run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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

from grao_fast.reporting.tables import completions_table
from grao_fast.system.streams import lenient
from grao_fast.system.visible import get_logger, visible_lines

logger = get_logger(__name__)


class Display:
    """Shows progress bar, tables and messages on stderr; lines of text if that is not a terminal.

    Control characters in text are escaped.

    shown: False to send messages to `logging` and show nothing else.
    """

    def __init__(
        self, *, total_steps: int, start_step: int, shown: bool, console: Console | None = None
    ) -> None:
        self._console = console or Console(stderr=True)
        # rich raises SystemExit for a broken pipe
        self._console.file = cast(IO[str], lenient(self._console.file, "the console"))
        self._total_steps, self._shown = total_steps, shown
        self._failed = False
        self._progress = Progress(
            TextColumn("GRAO"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("reward [bold]{task.fields[reward]}[/]  loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (shown and self._console.is_terminal),
            speed_estimate_period=24 * 3600,  # seconds; steps may take minutes
        )
        self._task = self._progress.add_task(
            "", total=total_steps, completed=start_step, reward="-", loss="-"
        )
        self._try(self._progress.start)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Advance the bar; without a terminal, print a line if there is a reward or a loss."""
        live: dict[str, Any] = {
            name: f"{metrics[name]:.4g}" for name in ("reward", "loss") if name in metrics
        }
        self._try(lambda: self._progress.update(self._task, completed=step, **live))
        if self._shown and not self._console.is_terminal and live:
            shown = "  ".join(f"{name} {value}" for name, value in live.items())
            self._print(f"step {step}/{self._total_steps}  {shown}")

    def completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show a table of a few samples."""
        if self._shown and rows:
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

    def _print(self, text: str) -> None:
        self._try(lambda: self._console.print(text, markup=False, highlight=False, soft_wrap=True))

    def _try(self, show: Callable[[], Any]) -> None:
        try:
            show()
        except Exception as error:  # of any kind: the console may be of any class
            if not self._failed:
                self._failed = True
                logger.warning("the console fails, and is ignored from now on: %s", error)
