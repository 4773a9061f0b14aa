"""Adds the machine and absent contenders to pytest-benchmark's JSON and to its summary."""

from __future__ import annotations

import replay
from batches import DEVICE
from measure import load_average, machine_facts

LOAD = load_average()  # before the benchmarks make their own


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["facts"] = machine_facts(DEVICE) | {"load": LOAD}


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["absent"] = replay.ABSENT


def pytest_terminal_summary(terminalreporter):
    if not (replay.PRESENT or replay.ABSENT):
        return
    terminalreporter.section("contenders")
    for label in sorted(replay.PRESENT):
        terminalreporter.line(f"ran     {label}")
    for label, reason in sorted(replay.ABSENT.items()):
        terminalreporter.line(f"absent  {label}: {reason}")
