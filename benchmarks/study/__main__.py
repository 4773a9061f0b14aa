"""Starts the study from a checkout: `python benchmarks/study`, or `python -m study` beside it."""

import sys
from pathlib import Path

if not __package__:  # run as a folder: modules are found from the one above it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from study.command import main

if __name__ == "__main__":
    main()
