"""Keeps what the GPU suite measured in the form from which `table.py` makes tables and plots.

    python benchmarks/gpu_suite.py OUT
    python benchmarks/keep_suite.py OUT/suite.json h100    # -> benchmarks/results/*-h100.json
    python benchmarks/table.py

and in README.md `<!-- table: linear_grao-h100 -->`, likewise occupancy and tokens. The whole report
is kept as benchmarks/results/suite-h100.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from measure import PACKAGES
from peers import PEERS

RESULTS = Path(__file__).parent / "results"
_MACHINE = ("device", "threads", "load", "python", "torch", "cuda", *PACKAGES)
# Sections of the suite -> benchmarks that measure the same.
SECTIONS = {
    "shapes": "linear_grao",
    "occupancy": "occupancy",
    "tokens": "tokens",
    "objectives": "objectives",
}


def keep(suite: Path, machine: str, folder: Path = RESULTS) -> list[Path]:
    """Write the whole report and a file for each of `SECTIONS`; return their paths."""
    report = json.loads(suite.read_text())
    facts = report["sections"]["facts"]["report"]
    written = [folder / f"suite-{machine}.json"]
    written[0].write_text(json.dumps(report, indent=1) + "\n")
    for section, name in SECTIONS.items():
        contests = report["sections"].get(section, {}).get("report", {})
        rows, absent = _rows(contests)
        if not rows:
            continue
        result = {
            "command": f"python benchmarks/gpu_suite.py OUT --sections facts,{section}",
            "date": facts["date"],
            "machine": {key: facts[key] for key in facts if key in _MACHINE},
            "absent": absent,
            "rows": rows,
        }
        written.append(folder / f"{name}-{machine}.json")
        written[-1].write_text(json.dumps(result, indent=1) + "\n")
    return written


def _rows(contests: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return a row for each timing, and the reason for each contender that has none.

    Of a contender that runs twice at a shape, the first run counts: the second one only stands
    beside the compiled contenders.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    absent: dict[str, str] = {}
    for where, found in contests.items():
        if where == "left_out" or not isinstance(found, dict):
            continue
        place = where.removesuffix(", compiled")
        for variant, figures in found.items():
            label = figures.get("label") or PEERS[variant].label
            if "median" not in figures:
                absent[label] = figures.get("reason", "not timed")
                continue
            row = {"variant": variant, "label": label, **figures}
            if place.endswith("% live"):
                row["live"] = int(place.split("%")[0]) / 100
            rows.setdefault((place, variant), row)
    timed = {row["label"] for row in rows.values()}
    return list(rows.values()), {
        label: reason for label, reason in absent.items() if label not in timed
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", type=Path)
    parser.add_argument("machine")
    arguments = parser.parse_args()
    for path in keep(arguments.suite, arguments.machine):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
