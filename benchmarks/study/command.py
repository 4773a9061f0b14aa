"""The paper's tables, small: SFT, DPO, PPO, GRPO and GRAO from one base model on four tasks.

python benchmarks/study [--workers 2] [--folder FOLDER]      runs what is left
python benchmarks/study --tables                             prints the page's tables
python benchmarks/study --curves docs/results                draws the page's curves
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from study import plan
from study.runner import json_of, read_records, record_of, run_all
from study.tables import Runs, all_tables

RESULTS = Path(__file__).parents[1] / "results" / "study-cpu.json"


def main() -> None:
    parser = argparse.ArgumentParser(prog="study", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--folder", type=Path, default=Path("grao-output/study"),
                        help="keeps finished runs and base models")  # fmt: skip
    parser.add_argument("--workers", type=int, default=2, help="processes, each of one thread")
    parser.add_argument("--stages", default="tuning,main,variants,terms,groups")
    parser.add_argument("--seeds", type=int, default=len(plan.SEEDS), help="of each method")
    parser.add_argument("--tasks", help="only these, separated by semicolons")
    parser.add_argument("--methods", help="only these, separated by semicolons")
    parser.add_argument("--tables", action="store_true", help="print the tables of --output")
    parser.add_argument("--curves", type=Path, help="draw the curves of --output in this folder")
    parser.add_argument("--collect", action="store_true", help="write --output, and run nothing")
    options = parser.parse_args()
    if options.tables or options.curves:
        show(options)
        return
    if not options.collect:
        run(options)
    collect(options.folder, options.output)


def run(options: argparse.Namespace) -> None:
    """Run the stages in order; learning rates follow from the first."""
    stages = {"main": plan.MAIN, "variants": plan.VARIANTS, "terms": plan.TERMS,
              "groups": plan.GROUPS}  # fmt: skip
    for stage in options.stages.split(","):
        if stage == "tuning":
            runs = plan.tuning()
        else:
            rates = plan.chosen_rates(read_records(options.folder))
            runs = plan.reported(stages[stage], rates, seeds=plan.SEEDS[: options.seeds])
        if options.tasks:
            runs = [each for each in runs if each.task in options.tasks.split(";")]
        if options.methods:
            runs = [each for each in runs if each.method in options.methods.split(";")]
        run_all(runs, options.folder, workers=options.workers)


def show(options: argparse.Namespace) -> None:
    """Print the tables, or draw the curves."""
    results = json.loads(options.output.read_text())
    runs = Runs([record_of(each) for each in results["runs"]])
    if options.curves:
        from study import curves  # imports Matplotlib

        for path in curves.draw(runs, options.curves):
            print(path)
    if options.tables:
        for title, table in all_tables(runs).items():
            print(f"{title}\n\n{table}\n")


def collect(folder: Path, output: Path) -> None:
    """Write the finished runs, and what they ran on, to one file."""
    from measure import machine_facts  # imports Triton

    kept = read_records(folder)
    planned = {*plan.tuning(), *plan.reported(plan.METHODS, plan.chosen_rates(kept))}
    records = [record for record in kept if record.run in planned]
    facts = machine_facts("cpu") | {"threads": 1}
    lines = ",\n".join(json.dumps(json_of(record)) for record in records)
    output.write_text(f'{{"facts": {json.dumps(facts)},\n"runs": [\n{lines}\n]}}\n')
