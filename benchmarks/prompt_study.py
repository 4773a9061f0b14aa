"""What `dynamic_sampling` and `curriculum` save: the demo's task, by tokens sampled and trained.

    python benchmarks/prompt_study.py [--output FILE] [--seeds 2] [--table]

Each run aligns the demo's model on the demo's task with few prompts, so that several epochs pass.
There are two rewards. The demo's own compares the digits in place with those of the reference. The
other is 1 only if all digits are in place; a model that has imitated references, which are flawed,
would never get it, so the model imitates right answers first, briefly, and lam is 0, since such
references are not to be pushed down either. Finished runs are kept in FILE; --table prints the
page's table from it.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import grao_fast
from grao_fast.demo.base_model import imitate, make_model, make_tokenizer
from grao_fast.demo.run import demo_config
from grao_fast.demo.task import better_sorted, in_place, make_rows, solution
from grao_fast.training.state import versions

KINDS = ("sampled", "trained")
SHOWN, PROMPTS, HELD_OUT = 4000, 320, 200  # prompts that are imitated, aligned on, evaluated
STEPS, EVAL_STEPS = 80, 10
ARMS: dict[str, dict[str, Any]] = {
    "off": {},
    "dynamic_sampling=2": {"dynamic_sampling": 2},
    "curriculum": {"curriculum": True},
    "both": {"dynamic_sampling": 2, "curriculum": True},
}


def all_in_place(
    prompts: Sequence[str], completions: Sequence[str], references: Sequence[str]
) -> list[float]:
    """Pairwise reward: whether all digits are in place; references never have them."""
    pairs = zip(prompts, completions, strict=True)
    return [float(completion == solution(prompt)) for prompt, completion in pairs]


@dataclass(frozen=True)
class Task:
    """A reward, what is imitated before it, and options.

    imitation_steps: of right answers, or else of the flawed references.
    """

    reward: Callable[..., list[float]]
    imitation_steps: int
    of_solutions: bool = False
    options: dict[str, Any] = field(default_factory=dict)


SPARSE = "all or nothing"
TASKS = {
    SPARSE: Task(all_in_place, 60, True, {"lam": 0.0, "learning_rate": 2e-4}),
    "as in the demo": Task(better_sorted, 25),
}


def train(task: str, arm: str, seed: int) -> dict[str, Any]:
    """One run: of every evaluation, the score, and the tokens until then."""
    of = TASKS[task]
    rows = make_rows(SHOWN + HELD_OUT, seed=seed)
    shown, held_out = rows[:SHOWN], rows[SHOWN:]
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed=seed)
    if of.of_solutions:
        shown = [{**row, "reference": solution(row["prompt"])} for row in shown]
    imitate(model, tokenizer, shown, steps=range(of.imitation_steps), seed=seed)
    config = demo_config(max_steps=STEPS, seed=seed).replace(
        eval_steps=EVAL_STEPS,
        log_completions_steps=0,
        max_tokens_per_microbatch=8000,
        disable_tqdm=True,
        **of.options,
        **ARMS[arm],
    )
    with tempfile.TemporaryDirectory() as folder:
        grao_fast.train(
            model,
            rows[:PROMPTS],
            of.reward,
            config=config,
            tokenizer=tokenizer,
            eval_dataset=held_out,
            metric=in_place,
            output_dir=folder,
        )
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return {"task": task, "arm": arm, "seed": seed} | _curve(
        [json.loads(line) for line in lines], config.prompts_per_step * config.num_generations
    )


def _curve(rows: Sequence[dict[str, Any]], samples: int) -> dict[str, Any]:
    """Scores and tokens at the evaluations, and the share of dead groups of every step.

    samples: of a step without further rounds.
    """
    curve, sampled, trained = [], 0.0, 0.0
    dead = {"sampled": [], "trained": []}
    for row in rows:
        if "loss" in row:
            of_one_round = samples * row["completions/mean_length"]
            sampled += row.get("dynamic_sampling/tokens", of_one_round)
            trained += row["tokens"]
            dead["trained"].append(round(row["frac_dead"], 4))
            dead["sampled"].append(
                round(row.get("dynamic_sampling/frac_dead", row["frac_dead"]), 4)
            )
        elif "eval/metric" in row:
            curve.append(
                {
                    "step": row["step"],
                    "sampled": round(sampled),
                    "trained": round(trained),
                    "in_place": row["eval/metric"],
                    "reward": row["eval/reward"],
                }
            )
    return {"curve": curve, "dead": dead}


def at_tokens(run: dict[str, Any], budget: float, kind: str) -> float:
    """The held-out reward at a budget of tokens, interpolated between evaluations."""
    for before, after in pairwise(run["curve"]):
        if after[kind] >= budget:
            share = (budget - before[kind]) / (after[kind] - before[kind])
            return before["reward"] + share * (after["reward"] - before["reward"])
    raise AssertionError("the budget is at most what the run used")


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Of the task with dead groups, every way of drawing: means over seeds, and their range."""
    lines = [
        "| | dead groups | tokens sampled | tokens trained | all in place at the end "
        "| at equal tokens sampled | at equal tokens trained |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    runs = [run for run in runs if run["task"] == SPARSE]
    for arm in ARMS:
        own = [run for run in runs if run["arm"] == arm]
        ends = [run["curve"][-1] for run in own]
        cells = [
            _percent([statistics.mean(run["dead"]["sampled"]) for run in own]),
            *(f"{statistics.mean(e[kind] for e in ends) / 1e3:.0f}k" for kind in KINDS),
            _percent([end["reward"] for end in ends]),
            *(_percent([at_tokens(run, _budget(runs, run, kind), kind) for run in own])
              for kind in KINDS),
        ]  # fmt: skip
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _budget(runs: Sequence[dict[str, Any]], run: dict[str, Any], kind: str) -> float:
    """The least tokens that any way of drawing used with a run's seed: all are compared there."""
    return min(each["curve"][-1][kind] for each in runs if each["seed"] == run["seed"])


def _percent(shares: Sequence[float]) -> str:
    mean = f"{100 * statistics.mean(shares):.1f}"
    return f"{mean} ({100 * min(shares):.1f} to {100 * max(shares):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parent / "results" / "prompts-cpu.json"
    parser.add_argument("--output", type=Path, default=default)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="print the table, and run nothing")
    options = parser.parse_args()
    kept = json.loads(options.output.read_text()) if options.output.exists() else {"runs": []}
    if options.table:
        print(table(kept["runs"]))
        return
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    done = {(run["task"], run["arm"], run["seed"]) for run in kept["runs"]}
    wanted = [(SPARSE, arm, seed) for seed in range(options.seeds) for arm in ARMS]
    wanted.append(("as in the demo", "off", 0))  # without a dead group, all ways are the same
    for task, arm, seed in (each for each in wanted if each not in done):
        run = train(task, arm, seed)
        kept["runs"].append(run)
        kept["about"] = {
            "prompts": PROMPTS,
            "steps": STEPS,
            "processor": platform.processor() or platform.machine(),
            "threads": 1,
            "held_out": HELD_OUT,
            "versions": versions(),
        }
        options.output.write_text(json.dumps(kept, indent=1) + "\n")
        last = run["curve"][-1]
        print(f"{task}, {arm}, seed {seed}: {last['in_place']:.3f} in place")


if __name__ == "__main__":
    main()
