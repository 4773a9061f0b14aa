"""Runs what is left of the study in worker processes, and keeps what is done in a file.

Every finished run is a line of FOLDER/runs.jsonl, so that a study which was stopped goes on where
it was.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import torch

from study.arms import Meter
from study.plan import METHODS, Record, Run
from study.tasks import TASKS

RUNS_FILE = "runs.jsonl"


def run_all(runs: Sequence[Run], folder: Path, *, workers: int) -> None:
    """Run those of `runs` that are not done, and add them to the file."""
    done = {record.run for record in read_records(folder)}
    left = [run for run in runs if run not in done]
    if not left:
        return
    print(f"{len(runs) - len(left)} of {len(runs)} runs are done", flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker) as pool:
        started = time.monotonic()
        futures = [pool.submit(partial(execute, folder=folder), run) for run in left]
        for count, future in enumerate(as_completed(futures), 1):
            record = future.result()
            _append(record, folder)
            minutes = (time.monotonic() - started) / count * (len(left) - count) / 60
            print(f"{_line(record)}; {len(left) - count} left, {minutes:.0f} min", flush=True)


def execute(run: Run, *, folder: Path) -> Record:
    """Run one method on one task and seed."""
    method = METHODS[run.method]
    problem = TASKS[run.task].problem(run.seed, method.budget, folder=folder / "weights")
    meter = Meter(problem)
    try:
        method.arm(problem, learning_rate=run.learning_rate, meter=meter)
    except FloatingPointError as error:  # too high a learning rate
        return Record(run, error=str(error))
    return Record(run, [_rounded(point._asdict()) for point in meter.curve])


def read_records(folder: Path) -> list[Record]:
    """The finished runs."""
    path = folder / RUNS_FILE
    lines = path.read_text().splitlines() if path.exists() else []
    return [record_of(json.loads(line)) for line in lines]


def record_of(data: dict) -> Record:
    """A record from `json_of` it."""
    return Record(Run(**data["run"]), data["curve"], data["error"])


def json_of(record: Record) -> dict:
    """Plain data for JSON."""
    return {"run": record.run._asdict(), "curve": record.curve, "error": record.error}


def _append(record: Record, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / RUNS_FILE).open("a") as file:
        file.write(json.dumps(json_of(record)) + "\n")


def _line(record: Record) -> str:
    run = record.run
    what = record.error or f"{record.last['in_place']:.3f} in place"
    return f"{run.task}, {run.method}, seed {run.seed}, {run.learning_rate:g}: {what}"


def _rounded(point: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in point.items()}


def _begin_worker() -> None:
    """One thread for each worker, and no messages of libraries."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
