"""Builds the options of `grao-fast report`, and runs it."""

from __future__ import annotations

from typing import Any

from grao_fast.cli.options import Command
from grao_fast.system.visible import visible


def report_command() -> Command:
    """Build `grao-fast report`."""
    command = Command.new(
        _report,
        "report DIR [DIR ...] [options]",
        "Write curves, answers and options of runs as one HTML file that needs no network.",
    )
    command.parser.add_argument(
        "output_dirs",
        nargs="+",
        type=str,
        metavar="DIR",
        help="folders of runs, whose curves are laid over each other",
    )
    command.add("--path", str | None, "file to write; null: report.html beside a single run's "
                "results, grao-report.html here for several", default=None)  # fmt: skip
    command.add("--samples", int, "the most prompts of a run whose answers are shown", default=6)
    return command


def _report(options: dict[str, Any]) -> None:
    from grao_fast.reporting.page.report import report

    print(visible(str(report(*options.pop("output_dirs"), **options))))
