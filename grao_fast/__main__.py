"""Runs `python -m grao_fast`, the same program as `grao-fast`."""

from __future__ import annotations

from grao_fast.cli.commands import main

if __name__ == "__main__":
    raise SystemExit(main())
