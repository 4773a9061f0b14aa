"""The sections, in the order they run in, and the seconds each may take: under 8 minutes in all."""

from __future__ import annotations

from suite.addressing import addressing
from suite.facts import facts
from suite.guarantees import compiled, determinism, sync
from suite.heads import occupancy, shapes, tokens
from suite.own_tests import own_tests
from suite.rows import rows
from suite.runner import Section
from suite.step import step
from suite.widths import widths

SECTIONS = [
    Section("facts", facts, 35),
    Section("tests", own_tests, 110),
    Section("widths", widths, 60),
    Section("addressing", addressing, 20),
    Section("shapes", shapes, 85),
    Section("occupancy", occupancy, 30),
    Section("tokens", tokens, 45),
    Section("step", step, 35),
    Section("rows", rows, 20),
    Section("determinism", determinism, 15),
    Section("sync", sync, 10),
    Section("compile", compiled, 15),
]
assert sum(section.limit_s for section in SECTIONS) <= 480


def chosen(names: str | None) -> list[Section]:
    """All, or those of the names between commas; SystemExit names one that there is not."""
    if names is None:
        return SECTIONS
    known = {section.name: section for section in SECTIONS}
    wanted = names.split(",")
    if unknown := [name for name in wanted if name not in known]:
        raise SystemExit(f"no section {unknown[0]!r}; there are {', '.join(known)}")
    return [known[name] for name in wanted]
