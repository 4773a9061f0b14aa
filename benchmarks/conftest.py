"""Adds --quick, and the machine and absent contenders to pytest-benchmark's JSON and summary."""

from __future__ import annotations

import batches
import replay
from measure import load_average, machine_facts

LOAD = load_average()  # before the benchmarks make their own


def pytest_addoption(parser):
    parser.addoption(
        "--quick",
        action="store_true",
        help="benchmarks on tiny inputs, in two rounds: they run and check as the others do, but "
        "their times say nothing",
    )


def pytest_configure(config):
    if config.getoption("--quick"):
        batches.SIZE = "tiny"


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["facts"] = machine_facts(batches.DEVICE) | {"load": LOAD}


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["absent"] = replay.ABSENT
    output_json["quick"] = config.getoption("--quick")


def pytest_terminal_summary(terminalreporter):
    if not (replay.PRESENT or replay.ABSENT):
        return
    terminalreporter.section("contenders")
    for label in sorted(replay.PRESENT):
        terminalreporter.line(f"ran     {label}")
    for label, reason in sorted(replay.ABSENT.items()):
        terminalreporter.line(f"absent  {label}: {reason}")
