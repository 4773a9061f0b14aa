"""What torchrun, srun or accelerate tells a process that it starts, by environment variables.

SLURM's names, which srun sets, count only in a job step, as a batch script of several tasks has
them too. This module does not import torch.
"""

from __future__ import annotations

import os

_SLURM = {
    "WORLD_SIZE": "SLURM_NTASKS",
    "RANK": "SLURM_PROCID",
    "LOCAL_RANK": "SLURM_LOCALID",
}


def size() -> int:
    """The number of processes started; 1 without a launcher."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """The number of this process; 0 without a launcher."""
    return _number("RANK", 0)


def local_rank() -> int:
    """The number of this process on its machine."""
    return _number("LOCAL_RANK", 0)


def local_size() -> int | None:
    """The number of processes on this machine; None if the launcher does not tell."""
    value = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE")
    return int(value) if value else None


def missing() -> str | None:
    """The first variable that processes need to find each other and is not set."""
    names = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    return next((name for name in names if _value(name) is None), None)


def _number(name: str, default: int) -> int:
    value = _value(name)
    return default if value is None else int(value)


def _value(name: str) -> str | None:
    value = os.environ.get(name)
    if value is None and name in _SLURM and "SLURM_STEP_ID" in os.environ:
        return os.environ.get(_SLURM[name])
    return value
