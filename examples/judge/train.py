"""Align a model with a language model as the judge, at any OpenAI-compatible endpoint.

    python examples/judge/train.py --model MODEL --judge_model NAME --judge_url URL --output run

The judge compares each completion with the reference of its prompt: better +1, equal 0, worse -1.
The questions and references are in questions.jsonl beside this file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import grao_fast
from grao_fast.rewards import Judge

QUESTIONS = Path(__file__).with_name("questions.jsonl")
CRITERION = "the answer that is correct, to the point, and easy to follow for somebody in a hurry"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub id of the policy")
    parser.add_argument("--judge_model", required=True, help="the judge's name at the endpoint")
    parser.add_argument("--judge_url", required=True, help="the endpoint, with its /v1")
    parser.add_argument("--judge_key_env", help="environment variable that holds the API key")
    parser.add_argument("--output", type=Path, default=Path("judge-run"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--max_new_tokens", type=int, default=96)
    parser.add_argument("--prompts_per_step", type=int, default=4)
    arguments = parser.parse_args()

    judge = Judge(
        CRITERION,
        model=arguments.judge_model,
        base_url=arguments.judge_url,
        api_key_env=arguments.judge_key_env,
        cache=arguments.output.with_suffix(".verdicts"),  # a question is asked once, in all runs
    )
    result = grao_fast.train(
        model=arguments.model,
        dataset=QUESTIONS,
        reward=judge,
        config=grao_fast.GRAOConfig(
            reward_type="pairwise",
            prompts_per_step=arguments.prompts_per_step,
            max_new_tokens=arguments.max_new_tokens,
            max_steps=arguments.steps,
            learning_rate=1e-5,
            temperature=1.0,
        ),
        output_dir=arguments.output,
    )
    print(f"{result.steps} steps; mean reward of the last: {result.metrics['reward']:.2f}")


if __name__ == "__main__":
    main()
