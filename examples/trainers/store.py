"""Turns stored samples into weighted tokens: python store.py MODEL SAMPLES.jsonl STEP.safetensors

A line of SAMPLES has a prompt, its completions, their rewards, a reference and reference_reward.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from grao_fast.objectives import GRAO, export


def main(model: str, samples: str, output: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line) for line in Path(samples).read_text(encoding="utf-8").splitlines()]
    answers = [[*row["completions"], row["reference"]] for row in rows]
    tokens = export(
        [tokenizer(row["prompt"])["input_ids"] for row in rows],
        [
            [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in group]
            for group in answers
        ],
        torch.tensor([[*row["rewards"], row["reference_reward"]] for row in rows]),
        GRAO(reference_advantage="clip"),
        max_new_tokens=1024,
    )
    tokens.save(output)
    print(f"{len(tokens.cu_seqlens) - 1} sequences with a weight, {len(tokens.input_ids)} tokens")


if __name__ == "__main__":
    main(*sys.argv[1:])
