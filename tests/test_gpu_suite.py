"""benchmarks/gpu_suite.py: whole on a CPU, from a bare checkout; and whatever its sections do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SUITE = BENCHMARKS / "gpu_suite.py"
PACKAGES = Path(torch.__file__).parents[1]  # its .pth files, of installs, do not count on a path
NAMES = [
    "facts",
    "tests",
    "shapes",
    "occupancy",
    "tokens",
    "train_step",
    "objectives",
    "rows",
    "attention",
]


def python(*arguments: object, executable: object = sys.executable, path: object, cwd: Path):
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [str(executable), *map(str, arguments)],
        env=kept | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"},
        cwd=cwd,
        capture_output=True,
        text=True,
    )


def read(out: Path) -> dict[str, dict]:
    return json.loads((out / "suite.json").read_text())["sections"]


@pytest.mark.slow
def test_runs_to_its_end_where_another_checkout_is_installed(tmp_path: Path) -> None:
    """In an environment with torch, triton and pytest; `table.py` takes what was measured."""
    venv.create(tmp_path / "bare", with_pip=False)
    other = tmp_path / "other" / "grao_fast"
    (other / "kernels").mkdir(parents=True)
    for package in (other, other / "kernels"):
        (package / "__init__.py").touch()
    done = python(
        SUITE,
        tmp_path / "out",
        "--tiny",
        executable=tmp_path / "bare" / "bin" / "python",
        path=os.pathsep.join([str(tmp_path / "other"), str(PACKAGES)]),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "grao_fast: bare checkout" in done.stdout
    sections = read(tmp_path / "out")
    assert {name: entry["status"] for name, entry in sections.items()} == dict.fromkeys(NAMES, "ok")
    table = done.stdout.splitlines()[-len(NAMES) :]
    assert [line.split()[0] for line in table] == NAMES

    # What an empty section could not have.
    assert sections["tests"]["report"]["test_rows.py"]["passed"] >= 10
    ours = sections["shapes"]["report"]["T=512 D=64 V=1031"]["grao"]
    assert ours["rounds"] == 2 and ours["median"] > 0 and max(ours["errors"].values()) < 1e-4
    for objective in ("grpo", "luffy", "dpo"):
        ours = sections["objectives"]["report"][objective]["ours"]
        assert ours["median"] > 0 and max(ours["errors"].values()) < 1e-5
    whole = sections["train_step"]["report"]
    assert whole["step"]["ours"]["useful_tokens"] == 64
    assert whole["sampling"]["ours"]["rounds"] == 2
    backends = sections["attention"]["report"]
    errors = backends["errors, 2 x (prompt 190, responses (65, 1, 300)), window 100"]
    assert max(errors["varlen (SDPA)"].values()) < 1e-5 > max(errors["sdpa"].values())
    timed = backends["1 x (prompt 20, responses 3 of 9)"]
    assert timed["varlen (SDPA)"]["rounds"] == 2 and timed["varlen (SDPA)"]["median"] > 0
    assert set(backends["left_out"]) == {"flex"}
    assert_tables_can_be_made(tmp_path)


def assert_tables_can_be_made(tmp_path: Path) -> None:
    script = (
        "import sys, json, pathlib, keep_suite, table\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "for path in keep_suite.keep(folder / 'out' / 'suite.json', 'here', folder)[1:]:\n"
        "    result = json.loads(path.read_text())\n"
        "    print(table.MAKERS[path.stem.split('-')[0]](path.stem, result))\n"
    )
    done = python("-c", script, tmp_path, path=BENCHMARKS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| T=512 D=64 V=1031" in done.stdout and "| `linear_grao_loss` |" in done.stdout
    assert "| `grpo` | 1 | 50% |" in done.stdout
    assert "25% over 100%" in done.stdout and "seconds over tokens" in done.stdout
    assert (tmp_path / "suite-here.json").exists()


SECTIONS = """
import os, sys, time
import gpu_suite, suite.sections
from suite.runner import Section, Skipped

def raising(run):
    run.report["before"] = 1
    raise ValueError("no such thing\\nand more")

def dying(run):
    os.abort()

def hanging(run):
    run.report["before"] = 2
    run.in_time("what hangs")
    time.sleep(60)

def inapplicable(run):
    raise Skipped("needs CUDA")

def late(run):
    time.sleep(0.8)
    return "done" if run.in_time("the rest") else "in time"

def good(run):
    run.report["figure"] = 1.5
    return "fine"

suite.sections.SECTIONS = [
    Section(f.__name__, f, 1.0 if f in (hanging, late) else 5)
    for f in (raising, dying, hanging, inapplicable, late, good)
]
sys.exit(gpu_suite.main())
"""


@pytest.mark.slow
def test_what_one_section_does_does_not_lose_the_others(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = python("-c", SECTIONS, out, "--tiny", path=BENCHMARKS, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    sections = read(out)
    statuses = [entry["status"] for entry in sections.values()]
    assert statuses == ["failed", "failed", "failed", "skipped", "ok", "ok"]
    assert sections["raising"]["headline"] == "ValueError: no such thing"
    assert sections["raising"]["report"] == {"before": 1}
    assert "exit code" in sections["dying"]["headline"]
    assert "past its limit of 1 s" in sections["hanging"]["headline"]
    assert sections["hanging"]["report"] == {"before": 2} and sections["hanging"]["seconds"] < 30
    for name, text in (("raising", "Traceback"), ("dying", "in dying"), ("hanging", "in hanging")):
        assert text in (out / f"{name}.log").read_text()
    assert sections["late"]["report"]["left_out"] == {"the rest": "no time left"}
    assert sections["good"]["report"] == {"figure": 1.5}
    lines = done.stdout.splitlines()[-6:]
    assert "skipped: needs CUDA" in lines[3] and " ok " not in lines[3]
    assert lines[4].endswith("[1 left out]") and lines[5].split()[:2] == ["good", "ok"]

    again = python("-c", SECTIONS, out, "--tiny", path=BENCHMARKS, cwd=tmp_path)
    assert "holds an earlier run" in again.stderr and read(out) == sections


def test_an_unknown_section_is_refused(tmp_path: Path) -> None:
    done = python(SUITE, tmp_path, "--sections", "nonsense", path=BENCHMARKS, cwd=tmp_path)
    assert "no section 'nonsense'" in done.stderr
