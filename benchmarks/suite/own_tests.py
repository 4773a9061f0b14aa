"""The repository's own tests of the kernels, on the device."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from suite.checkout import ROOT, load
from suite.runner import Run

FOLDER = ROOT / "tests" / "kernels"
TINY = "test_rows.py"
HYPOTHESIS = importlib.util.find_spec("hypothesis") is not None


def own_tests(run: Run) -> str:
    """`pytest tests/kernels`, a process a file; a failure there is a failure here.

    On CUDA, where its Triton kernels must have run on the device, no test of them may skip.
    """
    cuda = run.device.type == "cuda"
    if cuda:
        assert load("kernels_conftest", "tests/kernels/conftest.py").device_for("triton") == "cuda"
    files = sorted(FOLDER.glob("test_*.py"))
    if run.tiny:
        run.leave_out(f"all but {TINY}", "--tiny")
        files = [FOLDER / TINY]
    if not HYPOTHESIS:
        run.leave_out("the properties", "hypothesis is not installed")

    # Each needs a core or two, and on a GPU half a GiB; together they take as long as the longest.
    workers = max(1, (os.cpu_count() or 1) // 2)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(_run_file, each, Path(folder), run) for each in files]
        outcomes = [job.result() for job in jobs]

    counts: Counter[str] = Counter()
    bad: list[str] = []
    for file, (output, cases) in zip(files, outcomes, strict=True):
        run.log.append(f"== {file.name}\n{output[-100_000:]}")
        here = Counter(cases.values())
        run.report[file.name] = dict(here)
        counts += here
        bad += [name for name, outcome in cases.items() if outcome == "failed"]
        if not cases:
            last = (output.strip() or "nothing printed").splitlines()[-1]
            bad.append(f"{file.name} (no result: {last})")
        if cuda:
            on_triton = [name for name in cases if "triton" in name.partition("[")[2]]
            bad += [f"{name} (skipped)" for name in on_triton if cases[name] == "skipped"]
    run.report["failed"] = bad
    summary = f"{counts['passed']} passed, {counts['skipped']} skipped"
    if bad:
        raise AssertionError(f"{len(bad)} not passed, {summary}; the first: {bad[0]}")
    return summary


def _run_file(file: Path, folder: Path, run: Run) -> tuple[str, dict[str, str]]:
    """What pytest printed, and the outcome of every test; none if it did not come to its end."""
    junit, printed = folder / f"{file.stem}.xml", folder / f"{file.stem}.txt"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), f"--junitxml={junit}"]
    environment = dict(os.environ)
    if not HYPOTHESIS:
        command += ["-p", "suite.without_hypothesis"]
        paths = [*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT / "benchmarks")]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    limit = max(1.0, run.left())
    with printed.open("w") as output:
        # Not from the root: `-m` would put a grao_fast without its kernels on the path.
        options = {"cwd": folder, "env": environment, "stdout": output, "stderr": output}
        try:
            subprocess.run([*command, str(file)], timeout=limit, check=False, **options)
        except subprocess.TimeoutExpired:
            output.write(f"\nno end within {limit:.0f} s\n")
    return printed.read_text(), _outcomes(junit) if junit.exists() else {}


def _outcomes(junit: Path) -> dict[str, str]:
    outcomes: dict[str, str] = {}
    for case in ET.parse(junit).iter("testcase"):
        tags = {child.tag for child in case}
        what = "failed" if tags & {"failure", "error"} else "passed"
        name = f"{case.get('classname', '').rsplit('.', 1)[-1]}::{case.get('name')}"
        outcomes[name] = "skipped" if "skipped" in tags else what
    return outcomes
