"""Runs the tests and timings that need a GPU, in one command and under 10 minutes on an H100.

    python benchmarks/gpu_suite.py OUT                    # on a GPU; the results go to OUT
    python benchmarks/gpu_suite.py OUT --tiny             # tiny shapes; on a CPU too
    python benchmarks/gpu_suite.py OUT --sections facts,tests

It needs torch, triton and pytest, and neither an install of this package nor the network; peers are
timed where they are installed. OUT gets suite.json, written again after every section, and a log of
each section that has one. A short table comes last. The exit status is 1 if any section failed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from suite.checkout import use_checkout
from suite.runner import run_sections, table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the results")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, the same code")
    parser.add_argument("--sections", metavar="A,B", help="only these")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(f"grao_fast: {use_checkout(Path(folder))}")
        from suite.sections import chosen

        suite = run_sections(chosen(arguments.sections), arguments.out, arguments.tiny)
    print(table(suite))
    return int(any(entry["status"] == "failed" for entry in suite["sections"].values()))


if __name__ == "__main__":
    sys.exit(main())
