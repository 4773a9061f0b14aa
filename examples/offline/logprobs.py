"""Adds log-probs to stored completions: python logprobs.py MODEL GROUPS.jsonl OUTPUT.jsonl

MODEL is what sampled them, at TEMPERATURE. Where the sampler returned token ids and log-probs, as
vLLM does, store those: a text may have been sampled by other tokens than it is tokenised into here.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TEMPERATURE = 0.7


@torch.no_grad()
def logprobs(model, prompt: list[int], completion: list[int]) -> list[float]:
    """The log-prob of each token of a completion, its end-of-sequence token included."""
    tokens_1L = torch.tensor([prompt + completion], device=model.device)
    logits_TV = model(tokens_1L).logits[0, len(prompt) - 1 : -1].float() / TEMPERATURE
    return logits_TV.log_softmax(-1)[range(len(completion)), completion].tolist()


def main(path: str, groups: str, output: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()
    lines = []
    for line in Path(groups).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"])["input_ids"]
        row["completion_ids"] = [
            [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            for text in row.pop("completions")
        ]
        row["logprobs"] = [logprobs(model, prompt, ids) for ids in row["completion_ids"]]
        lines.append(json.dumps(row) + "\n")
    Path(output).write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines)} groups in {output}")


if __name__ == "__main__":
    main(*sys.argv[1:])
