"""Reports a run to metrics.jsonl, completions.jsonl, the console and experiment trackers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from grao_fast.reporting.console import Display
from grao_fast.reporting.parquet import SampleFiles
from grao_fast.system.errors import UserError, one_line
from grao_fast.system.lines import COMPLETIONS_FILE, METRICS_FILE, LineFile
from grao_fast.system.visible import get_logger

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker
    from rich.console import Console

logger = get_logger(__name__)

_PROJECT = "grao-fast"
_PIP_NAME = {"comet_ml": "comet-ml"}  # where pip's name differs from accelerate's


class Tracker:
    """Writes a run's metrics and samples to files and trackers, and shows them.

    Args:
        output_dir: folder for metrics.jsonl and completions.jsonl; created if it is missing.
        report_to: accelerate's experiment trackers, by name ("tensorboard", "wandb"...) or as
            GeneralTracker objects.
        config: hyperparameters for those trackers.
        total_steps: length of the progress bar.
        show_progress: whether to show the bar and tables of samples on stderr, or only lines of
            text if stderr is not a terminal. False: messages go to `logging`, and nothing else is
            shown.
        start_step: the step that a resumed run starts from, after which lines are removed from the
            files; 0 starts the files afresh.
        parquet: whether to write samples as parquet too.
        objective: its name, shown before the bar.

    Raises:
        ValueError: a tracker is unknown or does not start, or its package is not installed.
        OSError: output_dir cannot be written.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        report_to: Sequence[str | GeneralTracker],
        config: Mapping[str, Any],
        total_steps: int,
        show_progress: bool,
        start_step: int = 0,
        parquet: bool = False,
        objective: str = "grao",
        console: Console | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self._trackers = _make_trackers(report_to, self.output_dir)
        self._metrics = LineFile(self.output_dir / METRICS_FILE, keep_to=start_step)
        self._completions = LineFile(self.output_dir / COMPLETIONS_FILE, keep_to=start_step)
        self._samples = SampleFiles(self.output_dir, keep_to=start_step) if parquet else None
        for tracker in self._trackers:
            _start(tracker, _hyperparameters(config))
        self._failed: set[int] = set()
        self._display = Display(
            total_steps=total_steps,
            start_step=start_step,
            shown=show_progress,
            name=objective,
            console=console,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write a line of metrics; NaN and infinity become null."""
        self._metrics.write({"step": step, **metrics})
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        named = {_plain_name(name): value for name, value in finite.items()}
        self._tell(lambda tracker: tracker.log(named, step=step))
        self._display.step(step, metrics)

    def advance(self, step: int) -> None:
        """Count a step whose metrics are not logged as done."""
        self._display.advance(step)

    def log_completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write samples, one line for each prompt, and show a few in a table.

        A row holds `prompt`, `reference` (text or None), `reference_reward`,
        `reference_advantage`, the lists `completions`, `rewards` and `advantages`, and may hold
        `scores`, such a list for each reward function by its name.
        """
        for row in rows:
            self._completions.write({"step": step, **row})
        if self._samples is not None:
            self._samples.write(step, rows)
        self._display.completions(step, rows)

    def message(self, text: str) -> None:
        """Show a line of text."""
        self._display.message(text)

    def flush(self) -> None:
        """Flush the files to the disk, so that they are as complete as the checkpoint."""
        self._metrics.flush()
        self._completions.flush()

    def close(self) -> None:
        """Stop the bar, finish the trackers, close the files; calling it again does nothing."""
        self._display.close()
        self._tell(lambda tracker: tracker.finish())
        self._trackers = []
        self._metrics.close()
        self._completions.close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _tell(self, tell: Callable[[GeneralTracker], Any]) -> None:
        """Call the experiment trackers; the failure of one is logged once, and ignored."""
        for number, tracker in enumerate(self._trackers):
            try:
                tell(tracker)
            except Exception as error:  # of any kind: trackers are not ours, and are not essential
                if number not in self._failed:
                    self._failed.add(number)
                    logger.warning(
                        "the tracker %s fails (%s: %s); %s has all metrics",
                        type(tracker).__name__, type(error).__name__, error,
                        METRICS_FILE,
                    )  # fmt: skip


def check_trackers(report_to: Sequence[str | GeneralTracker]) -> None:
    """Raise UserError if `report_to` names an unknown tracker, or one that is not installed."""
    names = [item for item in report_to if isinstance(item, str)]
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(
                f"report_to does not know {name!r}: use one of "
                f"{', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"
            )
        if name not in available:
            raise UserError(
                f"report_to={name!r} needs its package: pip install {_PIP_NAME.get(name, name)}"
            )


def _make_trackers(
    report_to: Sequence[str | GeneralTracker], output_dir: Path
) -> list[GeneralTracker]:
    if not report_to:
        return []
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    check_trackers(report_to)
    PartialState()  # without it, those for wandb and trackio fail when they log that they started
    trackers = []
    for item in report_to:
        if not isinstance(item, str):
            trackers.append(item)
            continue
        kind = LOGGER_TYPE_TO_CLASS[item]
        where = [str(output_dir)] if kind.requires_logging_directory else []
        trackers.append(kind(_PROJECT, *where))
    return trackers


def _start(tracker: GeneralTracker, hyperparameters: Mapping[str, Any]) -> None:
    """Start a tracker, or raise UserError with the reason in one line."""
    try:
        tracker.start()
        tracker.store_init_configuration(dict(hyperparameters))
    except Exception as error:  # of any kind: trackers are not ours
        raise UserError(
            f"report_to: {type(tracker).__name__} cannot start ({type(error).__name__}: "
            f"{one_line(error)}): set it up, or leave it out"
        ) from error


def _plain_name(metric: str) -> str:
    """Return a metric's name in the characters that every tracker takes."""
    return re.sub(r"[^\w./ -]", "_", metric, flags=re.ASCII)


def _hyperparameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keep values of types that every tracker accepts; convert the others to text."""
    return {
        name: value if isinstance(value, (bool, int, float, str)) else str(value)
        for name, value in config.items()
    }
