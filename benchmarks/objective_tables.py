"""Tables of the objectives: their head passes beside others', and the kernels' machine code."""

from __future__ import annotations

from typing import Any

from table_parts import (
    Result,
    Row,
    absent_text,
    by_value,
    facts_text,
    mib,
    number,
    shape_text,
    unit_of,
)

SIDES = ("ours", "trl", "liger", "naive")


def objectives_table(name: str, result: Result) -> str:
    """Return a row an objective: our time, the others' over it, memory and the largest errors."""
    rows = result["rows"]
    unit, times = unit_of([row for row in rows if row["variant"] == "ours"])
    heads = ["objective", "passes", "live rows", f"ours, {unit} (quartiles)"]
    heads += [f"{side} over ours" for side in ("TRL", "Liger", "naive")]
    heads += [f"{what}: ours, TRL, Liger, naive" for what in ("extra memory, MiB", "largest error")]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for text, own in by_value(rows, "objective"):
        by_side = {row["variant"]: row for row in own}
        ours = by_side["ours"]
        quartiles = f"{number(ours['q1'] * times)} to {number(ours['q3'] * times)}"
        cells = [
            f"`{text}`",
            str(ours["passes"]),
            f"{ours['live']:.0%}",
            f"{number(ours['median'] * times)} ({quartiles})",
            *(_over(by_side, side) for side in SIDES[1:]),
            ", ".join(mib(by_side[side]) if side in by_side else "-" for side in SIDES),
            ", ".join(_largest_error(by_side.get(side)) for side in SIDES),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    first = rows[0]
    note = (
        f"{shape_text(first['shape_TDV'], rows)}. Median of {first['rounds']} rounds, in which all "
        f"took turns; the three bare GEMMs over all rows take "
        f"{number(first['gemm_seconds'] * times)} {unit}."
    )
    return "\n".join([*lines, "", f"{note} {facts_text(result)}{absent_text(result)}"])


def _over(by_side: dict[str, Row], side: str) -> str:
    if side not in by_side:
        return "-"
    return f"{by_side[side]['median'] / by_side['ours']['median']:.2f}"


def _largest_error(row: Row | None) -> str:
    return "-" if row is None else f"{max(row['errors'].values()):.0e}"


def registers_table(name: str, result: Result) -> str:
    """Return a row a form and a column a device, and whether older kernels are what they were."""
    devices = [device for device, _ in by_value(result["rows"], "device")]
    lines = [f"| ratio | shaping | {' | '.join(devices)} |", "| --- " * (2 + len(devices)) + "|"]
    for _, own in by_value(result["rows"], "form"):
        code = {row["device"]: _code(row) for row in own}
        names = [f'`"{own[0][kind]}"`' if own[0][kind] else "none" for kind in ("ratio", "shaping")]
        lines.append(f"| {' | '.join([*names, *(code[device] for device in devices)])} |")
    note = (
        f"{result['kernel']}. Registers a thread; bytes spilled; 16-byte loads and stores in the "
        f"code. Triton {result['machine']['triton']}; {result['date']}; `{result['command']}`."
    )
    return "\n".join([*lines, "", note + _since(result.get("before"))])


def _since(before: dict[str, Any] | None) -> str:
    """What has become of an older commit's kernels."""
    if before is None:
        return ""
    changed = before["gone"] + list(before["differing"])
    kept = f"{before['kernels'] - len(before['differing'])} of {before['kernels']}"
    what = "registers, spills, shared memory and accesses"
    found = (
        f" Of the kernels compiled before there were other objectives ({before['commit']}), {kept}"
    )
    return f"{found} have the same {what}" + (f"; not {', '.join(changed)}." if changed else ".")


def _code(row: Row) -> str:
    return f"{row['registers']}; {row['spilled']}; {row['loads']} + {row['stores']}"
