"""The repository's tests that are marked cuda, run by pytest on the device."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from suite.checkout import ROOT
from suite.runner import Run

FILES = [*sorted((ROOT / "tests" / "kernels").glob("test_*.py")), ROOT / "tests/test_gpu_model.py"]
TINY = [ROOT / "tests" / "kernels" / "test_rows.py"]
_NO_TESTS_COLLECTED = 5  # pytest's exit status
_ABSENT = re.compile("could not import|not installed")  # the one reason to skip on a GPU


def gpu_tests(run: Run) -> str:
    """Run `pytest -m cuda`, one process a file; a test that fails, or skips although what it
    imports is installed, fails the section."""
    # Each needs a core or two. A device error ends with the process of its file.
    workers = max(1, (os.cpu_count() or 1) // 2)
    counts: Counter[str] = Counter()
    bad: list[str] = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        files = TINY if run.tiny else FILES
        for file, (output, outcomes) in zip(
            files, pool.map(lambda file: _pytest(file, Path(folder), run), files), strict=True
        ):
            run.log.append(f"== {file.name}\n{output[-100_000:]}")
            here = Counter(outcome for outcome, _ in outcomes.values())
            run.report[file.name] = dict(here)
            counts += here
            bad += [
                f"{name} ({reason})"
                for name, (outcome, reason) in outcomes.items()
                if outcome == "failed" or (outcome == "skipped" and not _ABSENT.search(reason))
            ]
    run.report["failed"] = bad
    summary = f"{counts['passed']} passed, {counts['skipped']} skipped"
    if bad or not counts["passed"]:
        raise AssertionError(
            f"{len(bad)} not passed, {summary}; the first: {[*bad, 'none ran'][0]}"
        )
    return summary


def _pytest(file: Path, folder: Path, run: Run) -> tuple[str, dict[str, tuple[str, str]]]:
    """What pytest printed, and each test's outcome with the reason of a failure or a skip."""
    junit = folder / f"{file.stem}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", str(file)]
    command += ["-p", "no:cacheprovider", f"--junitxml={junit}"]
    command += ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    limit = max(1.0, run.left())
    try:
        # Not from the root, where `-m` would put a grao_fast without its kernels on the path.
        done = subprocess.run(
            command,
            cwd=folder,
            timeout=limit,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    except subprocess.TimeoutExpired as error:
        printed = (error.stdout or b"").decode(errors="replace")  # bytes, whatever `text` says
        return printed, {file.name: ("failed", f"no end within {limit:.0f} s")}
    outcomes = _outcomes(junit) if junit.exists() else {}
    if not outcomes and done.returncode != _NO_TESTS_COLLECTED:
        outcomes = {file.name: ("failed", f"pytest ended with status {done.returncode}")}
    return done.stdout, outcomes


def _outcomes(junit: Path) -> dict[str, tuple[str, str]]:
    outcomes: dict[str, tuple[str, str]] = {}
    for case in ET.parse(junit).iter("testcase"):
        name = f"{case.get('classname', '').rsplit('.', 1)[-1]}::{case.get('name')}"
        outcomes[name] = ("passed", "")
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome = "skipped" if child.tag == "skipped" else "failed"
                outcomes[name] = (outcome, (child.get("message") or "")[:200])
    return outcomes
