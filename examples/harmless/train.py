"""Align SmolLM2-135M-Instruct on HH harmless-base with GRAO, on a CPU.

    python examples/harmless/train.py --model smollm2 --data harmless-base --output harmless-run

The reward is a learned, pairwise comparison with the reference, in `reward.py` beside this file.
With --resume, the run continues from its latest checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

import grao_fast

MIN_WORDS = 12
REWARD = Path(__file__).with_name("reward.py")


def words(completions: list[list[dict[str, str]]]) -> list[float]:
    """Count the words of answers, a held-out metric that training does not see."""
    return [float(len(messages[-1]["content"].split())) for messages in completions]


def long_enough(
    completions: list[list[dict[str, str]]], references: list[list[dict[str, str]]]
) -> list[float]:
    """Return -2, more than a win is worth, for an answer of fewer than MIN_WORDS words, else 0."""
    return [-2.0 * (count < MIN_WORDS) for count in words(completions)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder written by prepare.py")
    parser.add_argument("--data", type=Path, required=True, help="with train and test .jsonl.gz")
    parser.add_argument("--output", type=Path, default=Path("harmless-run"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--guard", action="store_true", help="add the reward `long_enough`")
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()

    result = grao_fast.train(
        model=arguments.model,
        dataset=arguments.data / "train.jsonl.gz",
        eval_dataset=arguments.data / "test.jsonl.gz",
        reward=[f"{REWARD}:reward", long_enough] if arguments.guard else f"{REWARD}:reward",
        metric=words,
        config=grao_fast.GRAOConfig(
            reward_type="pairwise",
            reference_advantage="signed",  # the paper's, as in docs/results/harmless.md
            num_generations=8,
            prompts_per_step=4,
            max_steps=arguments.steps,
            learning_rate=2e-5,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=4,
            temperature=1.0,
            max_new_tokens=64,
            max_prompt_length=160,
            max_reference_length=64,
            gradient_checkpointing=False,  # groups are short and fit in memory
            max_tokens_per_microbatch=2048,
            save_steps=10,
            save_total_limit=1,
        ),
        output_dir=arguments.output,
        resume_from_checkpoint=arguments.resume or None,
    )
    console = Console()
    for name, evaluation in (("before", result.before), ("after", result.after)):
        console.print(f"{name} {result.steps} steps of GRAO")
        console.print(evaluation.table())
    for path in grao_fast.plot_run(arguments.output):
        console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
