"""The sections, in the order they run in, and seconds each may take: under 10 minutes in all."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable

from suite.runner import Run, Section


def _later(where: str) -> Callable[[Run], str]:
    """A section whose module is imported in its own process: imports may touch CUDA."""
    return lambda run: pkgutil.resolve_name(where)(run)


SECTIONS = [
    Section("facts", _later("suite.facts:facts"), 30),
    Section("tests", _later("suite.own_tests:own_tests"), 115),
    Section("widths", _later("suite.widths:widths"), 45),
    Section("addressing", _later("suite.addressing:addressing"), 20),
    Section("shapes", _later("suite.heads:shapes"), 65),
    Section("occupancy", _later("suite.heads:occupancy"), 25),
    Section("tokens", _later("suite.heads:tokens"), 30),
    Section("step", _later("suite.step:step"), 30),
    Section("attention", _later("suite.attention:attention"), 70),
    Section("train_step", _later("suite.train_step:train_step"), 90),
    Section("rows", _later("suite.rows:rows"), 15),
    Section("determinism", _later("suite.guarantees:determinism"), 15),
    Section("sync", _later("suite.guarantees:sync"), 15),
    Section("compile", _later("suite.guarantees:compiled"), 25),
]
assert sum(section.limit_s for section in SECTIONS) < 600


def chosen(names: str | None) -> list[Section]:
    """All, or those of the names between commas; SystemExit names one that there is not."""
    if names is None:
        return SECTIONS
    known = {section.name: section for section in SECTIONS}
    wanted = names.split(",")
    if unknown := [name for name in wanted if name not in known]:
        raise SystemExit(f"no section {unknown[0]!r}; there are {', '.join(known)}")
    return [known[name] for name in wanted]
