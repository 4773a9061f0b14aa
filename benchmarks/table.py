"""Keeps what the benchmarks measured, and writes the tables and plots of the documents from it.

    pytest benchmarks/ --benchmark-only --benchmark-json=run.json
    python benchmarks/table.py --keep run.json cpu  # -> benchmarks/results/*-cpu.json
    python benchmarks/table.py  # results/*.json -> README.md, docs/**/*.md, docs/results/*.png

A table stands in README.md, or in a page of docs, between `<!-- table: NAME -->` and
`<!-- end -->`, where benchmarks/results/NAME.json holds what was measured: NAME is that of the
benchmark and of the machine. No figure in it is written by hand.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from objective_tables import objectives_table, registers_table
from table_parts import (
    Result,
    Row,
    absent_text,
    by_value,
    facts_text,
    mib,
    number,
    ratio,
    shape_text,
    source_text,
    unit_of,
)
from token_plots import PANELS, draw
from trainer_tables import curves_table, draw_curves, trainers_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
DOCS = ROOT / "docs"
_BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
_LINK = re.compile(r"\]\(((?:docs|benchmarks)/[^)]+)\)")

# From pytest-benchmark's JSON to benchmarks/results


def keep(run: Path, machine: str) -> list[Path]:
    """Write a file for each benchmark of the run, with hardware and versions; return the paths."""
    report = json.loads(run.read_text())
    if not report["benchmarks"]:
        raise SystemExit(f"{run} holds no benchmark")
    if report.get("quick"):
        raise SystemExit(f"{run} is of tiny inputs: run the benchmarks without --quick")
    rows: dict[str, list[Row]] = {}
    for row in report["benchmarks"]:
        name = Path(row["fullname"].split("::")[0]).stem.removeprefix("bench_")
        rows.setdefault(name, []).append(row["extra_info"])
    written = []
    for name, own in rows.items():
        result = {
            "command": f"pytest benchmarks/bench_{name}.py --benchmark-only",
            "date": report["datetime"][:10],
            "machine": report["machine_info"]["facts"],
            "absent": report["absent"],
            "rows": own,
        }
        path = RESULTS / f"{name}-{machine}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        written.append(path)
    return written


# From benchmarks/results to Markdown, with links from the repository's root


def time_table(name: str, result: Result) -> str:
    """Return a table for each shape, the fastest contender first."""
    tables = []
    for shape_TDV, rows in by_value(result["rows"], "shape_TDV"):
        unit, times = unit_of(rows)
        lines = [
            f"| {shape_text(shape_TDV, rows)} | {unit} (quartiles) | over the three GEMMs "
            "| extra memory, MiB |",
            "| --- | --- | --- | --- |",
        ]
        for row in sorted(rows, key=lambda row: row["median"]):
            quartiles = f"{number(row['q1'] * times)} to {number(row['q3'] * times)}"
            lines.append(
                f"| {row['label']} | {number(row['median'] * times)} ({quartiles}) "
                f"| {row['gemm_ratio']:.2f} | {mib(row)} |"
            )
        tables.append("\n".join(lines))
    rounds = result["rows"][0]["rounds"]
    note = f"Median of {rounds} rounds, in each of which all took turns after the bare GEMMs."
    return "\n\n".join([*tables, f"{facts_text(result)} {note}{absent_text(result)}"])


def occupancy_table(name: str, result: Result) -> str:
    """Return a table with a row a contender and a column a share of live rows."""
    rows = result["rows"]
    shares = sorted({row["live"] for row in rows}, reverse=True)
    unit, times = unit_of(rows)
    heads = [f"{share:.0%} live, {unit}" for share in shares]
    heads += [f"{share:.0%} over {shares[0]:.0%}" for share in shares[1:]]
    lines = [
        f"| {shape_text(rows[0]['shape_TDV'], rows)} | {' | '.join(heads)} |",
        "| --- " * (1 + len(heads)) + "|",
    ]
    for _, own in by_value(rows, "variant"):
        median = {row["live"]: row["median"] for row in own}
        cells = [number(median[share] * times) if share in median else "-" for share in shares]
        cells += [ratio(median, share, shares[0]) for share in shares[1:]]
        lines.append(f"| {own[0]['label']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", source_text(name, result)])


def accuracy_table(name: str, result: Result) -> str:
    """Return a row a contender, a column an output and kind of logits; the least error in bold."""
    kinds = [kind for kind, _ in by_value(result["rows"], "logits")]
    columns = [(kind, output) for kind in kinds for output in result["rows"][0]["errors"]]
    errors = {
        own[0]["label"]: {
            (row["logits"], output): error for row in own for output, error in row["errors"].items()
        }
        for _, own in by_value(result["rows"], "variant")
    }
    written = {label: [f"{own[column]:.1e}" for column in columns] for label, own in errors.items()}
    least = [min(column, key=float) for column in zip(*written.values(), strict=True)]
    shape = shape_text(result["rows"][0]["shape_TDV"], result["rows"])
    lines = [
        f"| {shape} | {' | '.join(f'{kind}: {output}' for kind, output in columns)} |",
        "| --- " * (1 + len(columns)) + "|",
    ]
    for label, cells in written.items():
        marked = [f"**{c}**" if c == best else c for c, best in zip(cells, least, strict=True)]
        lines.append(f"| {label} | {' | '.join(marked)} |")
    return "\n".join([*lines, "", source_text(name, result)])


def token_plots(name: str, result: Result) -> str:
    """Return links to the plots of `draw`, and what they were measured on."""
    images = [f"![{title}](docs/results/{name}-{kind}.png)" for kind, title in PANELS]
    return "\n".join([*images, "", source_text(name, result)])


def step_tables(name: str, result: Result) -> str:
    """Return a table for each phase and model: in each case, ours beside the better of TRL's."""
    tables = []
    for title, rows in by_value(result["rows"], "title"):
        lines = [
            f"| {title} | grao-fast, tokens a second | TRL, tokens a second "
            "| grao-fast over TRL | extra memory, MiB | TRL's, MiB |",
            "| --- " * 6 + "|",
        ]
        for case, own in by_value(rows, "case"):
            ours = next(row for row in own if row["variant"] == "ours")
            peers = [row for row in own if row is not ours]
            cells = [case, f"{ours['tokens_per_s']:.0f}", "-", "-", mib(ours), "-"]
            if peers:
                best = max(peers, key=lambda row: row["tokens_per_s"])
                cells[2] = f"{best['tokens_per_s']:.0f}"
                cells[3] = f"{ours['tokens_per_s'] / best['tokens_per_s']:.2f}"
                cells[5] = mib(best)
            lines.append(f"| {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join([*tables, f"{facts_text(result)}{absent_text(result)}"])


def processes_table(name: str, result: Result) -> str:
    """Return a row a contender; the bytes that a process sends, counted and by the arithmetic."""
    rows = result["rows"]
    lines = [
        f"| {rows[0]['case']} | processes | `sharding` | micro-batches "
        "| seconds a step (quartiles) | peak memory, MiB | parameters and moments, MiB "
        "| sent, MiB | by the arithmetic |",
        "| --- " * 9 + "|",
    ]
    for row in rows:
        peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        alone = row["processes"] == 1
        cells = [
            row["label"],
            str(row["processes"]),
            "-" if alone else row["sharding"],
            str(row["micro_batches"]),
            f"{number(row['median'])} ({number(row['q1'])} to {number(row['q3'])})",
            peak,
            f"{row['held_mib']:.1f}",
            *("-" if alone else f"{row[kind]:.2f}" for kind in ("sent_mib", "planned_mib")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    note = (
        f"{rows[0]['title']}. Median of {rows[0]['rounds']} rounds, in which all took turns; each "
        f"process computes with one thread, of {rows[0]['cores']} cores. Memory and traffic are of "
        "the process with the most: its resident memory above that with which it began, and the "
        "part of the parameters and of AdamW's moments that it holds."
    )
    return "\n".join([*lines, "", f"{note} {facts_text(result)}{absent_text(result)}"])


def families_table(name: str, result: Result) -> str:
    """Return a row a family: the errors of each pair, and the tokens computed."""
    rows = [
        own[0] for _, own in by_value(result["rows"], "family")
    ]  # both of its rows hold the same
    columns = [(pair, what) for pair, errors in rows[0]["errors"].items() for what in errors]
    lines = [
        f"| {rows[0]['dtype']} | {' | '.join(f'{pair}: {what}' for pair, what in columns)} "
        "| tokens packed, repeated (less padding) |",
        "| --- " * (2 + len(columns)) + "|",
    ]
    for row in rows:
        errors = [f"{row['errors'][pair][what]:.1e}" for pair, what in columns]
        packed, repeated = row["tokens"]["packed"], row["tokens"]["repeated"]
        tokens = f"{packed}, {repeated} ({repeated - row['padding']})"
        lines.append(f"| {row['family']} | {' | '.join(errors)} | {tokens} |")
    return "\n".join([*lines, "", facts_text(result)])


MAKERS: dict[str, Callable[[str, Result], str]] = {
    "linear_grao": time_table,
    "occupancy": occupancy_table,
    "accuracy": accuracy_table,
    "tokens": token_plots,
    "step": step_tables,
    "processes": processes_table,
    "families": families_table,
    "objectives": objectives_table,
    "registers": registers_table,
    "trainers": trainers_table,
    "trainer_curves": curves_table,
}


def write_tables(text: str, folder: Path = ROOT) -> str:
    """The text of a document in `folder`, with every table made anew."""

    def relative(link: re.Match[str]) -> str:
        return f"]({Path(os.path.relpath(ROOT / link[1], folder)).as_posix()})"

    def fill(match: re.Match[str]) -> str:
        name = match[2]
        result = json.loads((RESULTS / f"{name}.json").read_text())
        table = MAKERS[name.split("-")[0]](name, result)
        return f"{match[1]}{_LINK.sub(relative, table)}\n{match[3]}"

    return _BLOCK.sub(fill, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", nargs=2, metavar=("RUN_JSON", "MACHINE"))
    arguments = parser.parse_args()
    if arguments.keep:
        written = keep(Path(arguments.keep[0]), arguments.keep[1])
    else:
        written = [p for p in (README, *DOCS.rglob("*.md")) if _BLOCK.search(p.read_text())]
        for path in written:
            path.write_text(write_tables(path.read_text(), path.parent))
        for path in RESULTS.glob("tokens-*.json"):
            written += draw(path.stem, json.loads(path.read_text()), DOCS / "results")
        for path in RESULTS.glob("trainer_curves-*.json"):
            written += draw_curves(path.stem, json.loads(path.read_text()), DOCS / "results")
    for path in written:
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
