"""Train a LoRA on word problems in arithmetic, with a rule as the reward.

    python examples/math/train.py --model MODEL --data problems --output math-run

The reward is 1 where the last number of a completion equals the row's answer as mathematics, and
a little for brevity. With --resume, the run continues from its latest checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from peft import LoraConfig
from rich.console import Console

import grao_fast
from grao_fast.rewards import Length, Math


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--data", type=Path, required=True, help="folder written by problems.py")
    parser.add_argument("--output", type=Path, default=Path("math-run"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA matrices")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--prompts_per_step", type=int, default=8)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()

    result = grao_fast.train(
        model=arguments.model,
        dataset=arguments.data / "train.jsonl",
        eval_dataset=arguments.data / "test.jsonl",
        reward=[Math("answer"), Length(30, slack=30)],
        metric=Math("answer"),
        peft_config=LoraConfig(
            r=arguments.rank,
            lora_alpha=2 * arguments.rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
        config=grao_fast.GRAOConfig(
            reward_weights=(1.0, 0.1),
            prompts_per_step=arguments.prompts_per_step,
            max_new_tokens=arguments.max_new_tokens,
            max_steps=arguments.steps,
            learning_rate=2e-4,
            temperature=1.0,
            save_steps=20,
            save_total_limit=1,
        ),
        output_dir=arguments.output,
        resume_from_checkpoint=arguments.resume or None,
    )
    console = Console()
    for name, evaluation in (("before", result.before), ("after", result.after)):
        console.print(f"{name} {result.steps} steps of GRAO")
        console.print(evaluation.table())


if __name__ == "__main__":
    main()
