"""The result of a check: its findings, as a table and as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from grao_fast.checkup.findings import Finding, Verdict
from grao_fast.system.visible import squeezed

_NAME = 15  # characters of a name on one line
_STYLES = {"ok": "green", "warning": "yellow", "failure": "bold red"}


@dataclass(frozen=True)
class CheckResult:
    """What a check has found, in the order of the table."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is a failure; there may be warnings."""
        return not self.of("failure")

    def of(self, verdict: Verdict) -> list[Finding]:
        """Return the findings with this verdict."""
        return [finding for finding in self.findings if finding.verdict == verdict]

    def table(self) -> Table:
        """Return a table for a console: of each finding the verdict, the value and the remedy."""
        table = Table(box=box.SIMPLE, pad_edge=False, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(max_width=_NAME)
        table.add_column(overflow="fold")
        part = self.findings[0].part if self.findings else ""
        for finding in self.findings:
            if finding.part != part:
                table.add_section()
                part = finding.part
            measured = Text(squeezed(finding.value))
            if finding.remedy:
                measured.append(f"\n-> {squeezed(finding.remedy)}", style="italic")
            verdict = Text(finding.verdict, style=_STYLES[finding.verdict])
            table.add_row(verdict, Text(finding.name), measured)
        table.caption, table.caption_justify = self.summary(), "left"
        return table

    def summary(self) -> str:
        """Return the number of failures and warnings, in a sentence."""
        counts = [_counted(self.of(kind), kind) for kind in ("failure", "warning")]
        told = " and ".join(filter(None, counts))
        if not told:
            return f"All {len(self.findings)} findings are ok."
        return f"{told} among {len(self.findings)} findings."

    def to_dict(self) -> dict[str, Any]:
        """Return the result as data for JSON."""
        return {"ok": self.ok, "findings": [asdict(finding) for finding in self.findings]}


def _counted(findings: list[Finding], kind: str) -> str:
    count = len(findings)
    return f"{count} {kind}{'s' if count > 1 else ''}" if count else ""
