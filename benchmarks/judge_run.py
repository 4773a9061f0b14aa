"""A run whose judge is served by vLLM, and the judge's metrics.

    vllm serve MODEL --served-model-name judge --max-model-len 1024 --port 8001
    python benchmarks/judge_run.py --model MODEL --url http://localhost:8001/v1 --output run

trains MODEL with the questions of examples/judge, judged by what the server serves, and prints the
table of docs/results/judge.md. Then it asks about the last prompts again, without holding the judge
to the words A, B and EQUAL.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grao_fast
from grao_fast.rewards import Judge, RewardError
from grao_fast.rewards.measured import join_metrics

QUESTIONS = Path(__file__).parents[1] / "examples" / "judge" / "questions.jsonl"
CRITERION = "the answer that is correct and to the point"
WORDS = {"structured_outputs": {"choice": ["A", "B", "EQUAL"]}}
PRICES = (0.1, 0.4)  # of a million tokens; an assumption, for the metric `cost`
AMOUNTS = (
    "comparisons", "requests", "retries", "failed", "unparsable", "disagreements",
    "prompt_tokens", "completion_tokens", "cost",
)  # fmt: skip
MEANS = ("frac_disagreement", "frac_first", "latency", "mean")


def judge_at(url: str, **options: Any) -> Judge:
    return Judge(
        CRITERION, model="judge", base_url=url, timeout=300.0, max_concurrency=8, **options
    )


def train(arguments: argparse.Namespace) -> float:
    """Train, and return the seconds that it took."""
    started = time.perf_counter()
    grao_fast.train(
        model=arguments.model,
        dataset=QUESTIONS,
        reward=judge_at(arguments.url, extra_body=WORDS, prices=PRICES),
        config=grao_fast.GRAOConfig(
            reward_type="pairwise",
            num_generations=2,
            prompts_per_step=2,
            max_new_tokens=12,
            max_steps=arguments.steps,
            save_steps=0,
            learning_rate=1e-5,
            temperature=1.0,
            log_completions_steps=1,
            max_tokens_per_microbatch=512,
            disable_tqdm=True,
            device="cpu",
            bf16=False,
        ),
        output_dir=arguments.output,
    )
    return time.perf_counter() - started


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def table(steps: Sequence[dict[str, Any]]) -> str:
    """The judge's metrics: sums of amounts and means of the others, over the steps."""
    rows = []
    for name in AMOUNTS + MEANS:
        values = [step.get(f"rewards/judge/{name}") for step in steps]
        values = [value for value in values if value is not None]
        amount = sum(values) if name in AMOUNTS else sum(values) / max(1, len(values))
        first, last = values[0], values[-1]
        rows.append(f"| `{name}` | {first:.4g} | {last:.4g} | {amount:.6g} |")
    head = (
        "| metric | first step | last step | sum, or mean of the steps |\n| --- |" + " ---: |" * 3
    )
    return "\n".join([head, *rows])


def ask_freely(url: str, output: Path, prompts: int) -> str:
    """The same comparisons of the last steps, without constraints; in words."""
    rows = read(output / "completions.jsonl")[-prompts:]
    triples = [(r["prompt"], text, r["reference"]) for r in rows for text in r["completions"]]
    judge = judge_at(url, max_tokens=24, give_up_after=10_000)
    rewards = asyncio.run(judge(*map(list, zip(*triples, strict=True))))
    try:
        found = join_metrics([judge.take_metrics()])
    except RewardError as error:
        return f"{len(triples)} comparisons, no verdict: {error}"
    none = sum(each is None for each in rewards)
    return (
        f"{len(triples)} comparisons, {found['requests']:g} requests, {found['unparsable']:g} "
        f"answers without a verdict, {none} comparisons without a reward, "
        f"{found['disagreements']:g} disagreements, latency {found['latency']:.2f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--freely", type=int, default=8, help="prompts that are asked again")
    arguments = parser.parse_args()
    seconds = train(arguments)
    steps = [row for row in read(arguments.output / "metrics.jsonl") if "loss" in row]
    print(table(steps))
    parts = {
        name: sum(step[f"time/{name}"] for step in steps) for name in ("sample", "reward", "step")
        if f"time/{name}" in steps[0]
    }  # fmt: skip
    print(f"\n{seconds:.0f} s in all; " + ", ".join(f"{k} {v:.0f} s" for k, v in parts.items()))
    print("freely:", ask_freely(arguments.url, arguments.output, arguments.freely))


if __name__ == "__main__":
    main()
