"""Compiles the row kernel ahead of time with every form, and prints its registers and accesses.

    python tests/kernels/compile_kernels.py > before.json          # on an older commit
    python benchmarks/registers.py [--before before.json COMMIT]

Devices need not be present. Results are written to benchmarks/results/registers-compiled.json, with
`--before` also whether the kernels that the older commit had are what they were.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import triton

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests" / "kernels"))

from compile_kernels import TARGETS, compile_for, facts, rows  # noqa: E402
from objective_tables import registers_table  # noqa: E402

from grao_fast.kernels.rows.forms import RATIOS, SHAPINGS  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "registers-compiled.json"
V = 49152
COMPARED = ("registers", "spilled", "shared", "accesses")


def forms_of(device: str) -> list[dict[str, Any]]:
    """A row for each form: of a training step, with bfloat16 gradients and entropies."""
    made = []
    for ratio, shaping in (("", None), *product(RATIOS, (None, *SHAPINGS))):
        options = {"forms": True, "ratio": ratio, "shaping": shaping} if ratio else {}
        found = facts(rows(TARGETS[device], "bf16", V, False, True, True, **options))
        accesses = found["accesses"]
        made.append(
            {
                "device": device,
                "form": f"{ratio} {shaping}",
                "ratio": ratio or None,
                "shaping": shaping,
                "registers": found["registers"],
                "spilled": found["spilled"],
                "loads": accesses["ld128"],
                "stores": accesses["st128"],
            }
        )
    return made


def changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """How many kernels both have, and what differs in those that are not alike."""
    both = before.keys() & now.keys()
    differing = {
        name: {
            key: [before[name][key], dict(now[name])[key]]
            for key in COMPARED
            if before[name][key] != now[name][key]
        }
        for name in sorted(both)
    }
    return {
        "kernels": len(both),
        "gone": sorted(before.keys() - now.keys()),
        "differing": {name: each for name, each in differing.items() if each},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", nargs=2, metavar=("BEFORE_JSON", "COMMIT"))
    arguments = parser.parse_args()
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 1) - 1)) as pool:
        made = [row for own in pool.map(forms_of, TARGETS) for row in own]
        result = {
            "command": "python benchmarks/registers.py",
            "date": datetime.date.today().isoformat(),
            "machine": {"triton": triton.__version__},
            "kernel": f"V={V}, bfloat16 gradients, with entropies",
            "rows": made,
        }
        if arguments.before:
            older = json.loads(Path(arguments.before[0]).read_text())
            now = {
                name: each
                for found in pool.map(compile_for, TARGETS)
                for name, each in found.items()
            }
            result["before"] = {"commit": arguments.before[1]} | changes(older, now)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(registers_table("registers-compiled", result))
    print(f"wrote {RESULT}")


if __name__ == "__main__":
    main()
