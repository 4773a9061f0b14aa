"""The sections in order, with the seconds that each may take: under 10 minutes in all."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable

from suite.runner import Run, Section


def _later(where: str) -> Callable[[Run], str]:
    """A section whose module is imported in its own process, since imports may touch CUDA."""
    return lambda run: pkgutil.resolve_name(where)(run)


SECTIONS = [
    Section("facts", _later("suite.facts:facts"), 30),
    Section("tests", _later("suite.gpu_tests:gpu_tests"), 235),
    Section("shapes", _later("suite.heads:shapes"), 55),
    Section("occupancy", _later("suite.heads:occupancy"), 25),
    Section("tokens", _later("suite.heads:tokens"), 30),
    Section("train_step", _later("suite.train_step:train_step"), 90),
    Section("objectives", _later("suite.objectives:objectives"), 45),
    Section("rows", _later("suite.rows:rows"), 15),
    Section("attention", _later("suite.attention:attention"), 70),
]
assert sum(section.limit_s for section in SECTIONS) < 600


def chosen(names: str | None) -> list[Section]:
    """Return all sections, or those named in a comma-separated list; SystemExit if unknown."""
    if names is None:
        return SECTIONS
    known = {section.name: section for section in SECTIONS}
    wanted = names.split(",")
    if unknown := [name for name in wanted if name not in known]:
        raise SystemExit(f"no section {unknown[0]!r}; there are {', '.join(known)}")
    return [known[name] for name in wanted]
