"""How much of a slow reward is hidden behind sampling where it scores group by group (`per_group`).

    python benchmarks/reward_overlap.py MODEL [--server URL] [--output FILE]

A reward that sleeps for some seconds for each prompt scores a rollout of MODEL, a folder: after
sampling, in one call; and marked by `per_group`, while others are sampled, as a plain function and
as an async one. Samples are the same in all. Prints the medians of seconds of each, and writes them
as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from grao_fast.config import GRAOConfig
from grao_fast.data.examples import load_examples
from grao_fast.rewards import per_group, resolve_reward
from grao_fast.sampling.loading import load_policy
from grao_fast.training.rollout import sample_and_score
from grao_fast.training.state import versions

PROMPTS, SAMPLES, NEW_TOKENS, AT_ONCE = 12, 4, 200, 16
SLEEPS = (0.0, 0.3)  # seconds for each prompt
REPEATS = 1


def rewards_of(seconds: float) -> dict[str, Callable[..., Any]]:
    """The same reward, called in three ways."""

    def lengths(completions: Sequence[Any]) -> list[float]:
        return [float(len(completion[0]["content"])) for completion in completions]

    def afterwards(completions: Sequence[Any]) -> list[float]:
        time.sleep(seconds * len(completions) / (SAMPLES + 1))
        return lengths(completions)

    @per_group
    def plain(completions: Sequence[Any]) -> list[float]:
        time.sleep(seconds)
        return lengths(completions)

    @per_group
    async def concurrent(completions: Sequence[Any]) -> list[float]:
        await asyncio.sleep(seconds)
        return lengths(completions)

    return {"after sampling": afterwards, "per_group": plain, "per_group, async": concurrent}


def measure(model: Path, server: str | None) -> list[dict[str, Any]]:
    """One row for each reward and sleep: the medians over rollouts of the same prompts."""
    options = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server}
    config = GRAOConfig(
        num_generations=SAMPLES,
        max_new_tokens=NEW_TOKENS,
        generation_batch_size=AT_ONCE,
        device="cpu",
        **(options if server else {}),
    )
    loaded = load_policy(model, config=config)
    loaded.sampler.sync(loaded.policy)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Tell me {n + 2} things about {word}."}],
            "reference": "No.",
        }
        for n, word in enumerate(("rain", "bread", "maps", "glass") * (PROMPTS // 4))
    ]
    prompts = loaded.encode(load_examples(rows), config.sampling)
    found: dict[tuple[float, str], list[dict[str, float]]] = {}
    scores = set()
    for _ in range(REPEATS):
        for seconds in SLEEPS:
            for name, function in rewards_of(seconds).items():
                began = time.perf_counter()
                rollout = sample_and_score(
                    loaded,
                    resolve_reward(function),
                    prompts,
                    sampling=config.sampling,
                    objective=config.objective_options,
                    seed=0,
                )
                whole = {"rollout": time.perf_counter() - began}
                found.setdefault((seconds, name), []).append({**rollout.seconds, **whole})
                scores.add(tuple(rollout.rewards_NK.flatten().tolist()))
    if not server and len(scores) > 1:
        raise SystemExit("the rewards differ with the way in which they are called")
    return [
        {
            "seconds_per_prompt": seconds,
            "reward": name,
            "sample": _median(runs, "sample"),
            "waited": _median(runs, "reward"),
            "overlapped": _median(runs, "reward_overlapped"),
            "rollout": _median(runs, "rollout"),
        }
        for (seconds, name), runs in found.items()
    ]


def _median(runs: Sequence[dict[str, float]], phase: str) -> float:
    return round(statistics.median(run.get(phase, 0.0) for run in runs), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--server", help="URL of a vLLM server that serves MODEL")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    rows = measure(options.model, options.server)
    print(f"{'s a prompt':>10} {'reward':>18} {'sample':>8} {'+ wait':>8} {'hidden':>8} {'all':>8}")
    for row in rows:
        print(
            f"{row['seconds_per_prompt']:>10} {row['reward']:>18} {row['sample']:>8.2f} "
            f"{row['waited']:>8.2f} "
            f"{row['overlapped']:>8.2f} {row['rollout']:>8.2f}"
        )
    if options.output:
        about = {
            "sampler": "vLLM server" if options.server else "transformers",
            "prompts": PROMPTS,
            "samples": SAMPLES,
            "new_tokens": NEW_TOKENS,
            "generation_batch_size": AT_ONCE,
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }
        options.output.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
