"""Runs sections one after another and keeps each result whatever the other sections do.

Each section runs in a forked process. A crash, a hang, or a device error, after which CUDA fails in
that process, ends with it, and its memory is freed. The parent must not initialise CUDA, since a
process forked afterwards could not use it.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

Value = TypeVar("Value")
# Share of its limit that a section plans to use; it checks the clock between pieces of work.
_PLANNED = 0.7
_LOG_CHARACTERS = 2**20


@dataclass
class Run:
    """The conditions of a section's run, and the report that it fills."""

    device: torch.device
    tiny: bool
    deadline: float  # of time.monotonic()
    kept: Path
    report: dict[str, Any] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)

    def left(self) -> float:
        """Return the seconds that the section may still plan for."""
        return self.deadline - time.monotonic()

    def in_time(self, what: str) -> bool:
        """Return whether there is time for one more piece of work; if not, report it as left out.

        The report so far is saved first, whatever that piece of work does.
        """
        if self.left() <= 0:
            self.leave_out(what, "no time left")
        write_json(self.kept, self.report)
        return self.left() > 0

    def leave_out(self, what: str, why: str) -> None:
        self.report.setdefault("left_out", {})[what] = why


class Section(NamedTuple):
    name: str
    run: Callable[[Run], str]  # fills run.report, returns the headline
    limit_s: float


class Skipped(Exception):
    """Raised by a section that does not apply here; its message is the reason."""


def run_sections(sections: Sequence[Section], out: Path, tiny: bool) -> dict[str, Any]:
    """Run all sections, and write status, time, headline and report of each to `out`/suite.json."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / "suite.json").exists():
        raise SystemExit(f"{out} holds an earlier run: name another folder, or remove it")
    suite: dict[str, Any] = {"tiny": tiny, "sections": {}}
    for section in sections:
        print(f"-- {section.name}", flush=True)
        suite["sections"][section.name] = _run_section(section, out, tiny)
        write_json(out / "suite.json", suite)
    return suite


def _run_section(section: Section, out: Path, tiny: bool) -> dict[str, Any]:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (section, Path(folder), tiny)
        process = multiprocessing.get_context("fork").Process(target=_work, args=arguments)
        process.start()
        process.join(section.limit_s)
        hung = process.exitcode is None
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the process and whatever it has started
        process.kill()
        process.join()
        entry = _read_json(Path(folder, "entry"))
        if entry is None:
            how = f"ran past its limit of {section.limit_s:.0f} s"
            if not hung:
                how = f"its process died with exit code {process.exitcode}"
            report = _read_json(Path(folder, "report")) or {}
            log = f"{how}\n{Path(folder, 'stack').read_text()}"
            entry = {"status": "failed", "headline": how, "log": log, "report": report}
    log = entry.pop("log")
    if log:
        entry["log"] = f"{section.name}.log"
        (out / entry["log"]).write_text(log[-_LOG_CHARACTERS:])
    return {"status": entry["status"], "seconds": round(time.monotonic() - start, 2), **entry}


def _work(section: Section, folder: Path, tiny: bool) -> None:
    """Write the section's entry to a file, from within its process."""
    os.setsid()  # a process group, to be killed as a whole
    with (folder / "stack").open("w") as stack:  # at a crash, or shortly before the limit
        faulthandler.enable(stack)
        faulthandler.dump_traceback_later(0.95 * section.limit_s, file=stack)
        entry = _entry(section, folder, tiny)
        faulthandler.disable()
        faulthandler.cancel_dump_traceback_later()
    write_json(folder / "entry", entry)


def _entry(section: Section, folder: Path, tiny: bool) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    deadline = time.monotonic() + _PLANNED * section.limit_s
    run = Run(device, tiny, deadline, folder / "report")
    try:
        if device.type == "cpu":
            if not tiny:
                raise RuntimeError("torch sees no CUDA device; on a CPU there is only --tiny")
            torch.set_num_threads(1)  # more threads are slower on tiny tensors
        entry = {"status": "ok", "headline": section.run(run)}
    except Skipped as reason:
        entry = {"status": "skipped", "headline": str(reason)}
    # An error of any kind is the result of its section. The other sections still run, since the
    # device may not be available a second time.
    except Exception as error:
        entry = {"status": "failed", "headline": first_line(error)}
        run.log.append(traceback.format_exc())
    return entry | {"log": "\n".join(run.log), "report": run.report}


def attempt(function: Callable[[], Value]) -> tuple[Value | None, str | None]:
    """Return the value, or the reason for a failure: a peer may raise anything."""
    try:
        return function(), None
    except Exception as error:
        # Triton and cuBLAS raise errors of their own when memory runs out.
        full = any(sign in str(error) for sign in ("out of memory", "ALLOC_FAILED"))
        reason = "out of memory" if full else f"failed: {first_line(error)}"
    free_memory()  # after the traceback, which holds the peer's tensors, is gone
    return None, reason


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def first_line(error: BaseException) -> str:
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text.splitlines()[0]}"[:300]


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(value, indent=1, default=str))
    os.replace(new, path)


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def table(suite: dict[str, Any]) -> str:
    """Return a table with one line a section."""
    lines = [f"{'section':<12} {'status':<7} {'seconds':>7}  headline"]
    for name, entry in suite["sections"].items():
        status, headline = entry["status"], entry["headline"]
        if status == "skipped":
            status, headline = "-", f"skipped: {headline}"
        if left_out := entry["report"].get("left_out"):
            headline += f" [{len(left_out)} left out]"
        lines.append(f"{name:<12} {status:<7} {entry['seconds']:>7.1f}  {headline}")
    return "\n".join(lines)
