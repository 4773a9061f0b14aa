"""Keep what a benchmark measured, and write the README's tables from what was kept.

    pytest benchmarks/ --benchmark-only --benchmark-json=run.json
    python benchmarks/table.py --keep run.json cpu     # -> benchmarks/results/linear_grao-cpu.json
    python benchmarks/table.py                         # results/*.json -> README.md

A table stands in README.md between `<!-- table: NAME -->` and `<!-- end -->`, NAME being a file of
benchmarks/results. No figure in it is written by hand.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
README = HERE.parent / "README.md"
NAMES = {
    "naive": "naive: full logits, `F.cross_entropy`",
    "grao_512_mib": "`linear_grao_loss`, 512 MiB workspace",
    "grao_64_mib": "`linear_grao_loss`, 64 MiB workspace",
}
_TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def keep(run: Path, machine: str) -> Path:
    """Reduce pytest-benchmark's JSON to what was measured, on what, with which versions."""
    report = json.loads(run.read_text())
    rows = report["benchmarks"]
    if not rows:
        raise SystemExit(f"{run} holds no benchmark")
    files = {row["fullname"].split("::")[0] for row in rows}
    if len(files) != 1:
        raise SystemExit(f"{run} holds several files' benchmarks ({sorted(files)}); run one file")
    name = Path(files.pop()).stem.removeprefix("test_")
    info = report["machine_info"]
    shared = ("shape_TDV", "dtype", "torch", "threads")
    result = {
        "command": f"pytest benchmarks/test_{name}.py --benchmark-only",
        "date": report["datetime"][:10],
        "machine": {"processor": info["cpu"]["brand_raw"], "python": info["python_version"]},
        **{key: rows[0]["extra_info"][key] for key in shared},
        "variants": {row["params"]["variant"]: _measured(row, shared) for row in rows},
    }
    path = RESULTS / f"{name}-{machine}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def _measured(row: dict[str, Any], shared: tuple[str, ...]) -> dict[str, Any]:
    stats = row["stats"]
    figures = {key: stats[key] for key in ("median", "q1", "q3", "rounds")}
    return figures | {key: v for key, v in row["extra_info"].items() if key not in shared}


def table(result: dict[str, Any]) -> str:
    """A result as Markdown."""
    T, D, V = result["shape_TDV"]
    lines = [
        "| forward and backward | seconds (quartiles) | over its three GEMMs | extra memory, MiB |",
        "| --- | --- | --- | --- |",
    ]
    for variant, row in result["variants"].items():
        lines.append(
            f"| {NAMES.get(variant, variant)} | {row['median']:.2f} ({row['q1']:.2f} to "
            f"{row['q3']:.2f}) | {row['gemm_ratio']:.2f} | {row['peak_extra_mib']:.0f} |"
        )
    machine = result["machine"]
    lines += [
        "",
        f"T={T} D={D} V={V}, {result['dtype'].removeprefix('torch.')}, {result['threads']} threads "
        f"of {machine['processor']}; torch {result['torch']}, Python {machine['python']}, "
        f"{result['date']}. Median of {next(iter(result['variants'].values()))['rounds']} rounds, "
        f"the GEMMs timed before every one. `{result['command']}`",
    ]
    return "\n".join(lines)


def write_tables(text: str) -> str:
    """The README with every table made anew."""

    def fill(match: re.Match[str]) -> str:
        result = json.loads((RESULTS / f"{match[2]}.json").read_text())
        return f"{match[1]}{table(result)}\n{match[3]}"

    return _TABLE.sub(fill, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", nargs=2, metavar=("RUN_JSON", "MACHINE"))
    arguments = parser.parse_args()
    if arguments.keep:
        print(f"wrote {keep(Path(arguments.keep[0]), arguments.keep[1])}")
        return
    README.write_text(write_tables(README.read_text()))
    print(f"wrote {README}")


if __name__ == "__main__":
    main()
