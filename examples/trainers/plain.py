"""Offline GRAO in plain PyTorch: python plain.py MODEL STEP.safetensors OUTPUT"""

import sys

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from grao_fast.kernels import linear_weighted_cross_entropy
from grao_fast.objectives import WeightedTokens

EPOCHS, SEQUENCES = 4, 8  # passes over the file, sequences of a micro-batch


class WithLoss(torch.nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    def forward(self, input_ids, labels, weights):
        hidden = self.model.base_model(input_ids=input_ids).last_hidden_state
        rows = hidden.flatten(0, 1), self.model.lm_head.weight, labels.flatten(), weights.flatten()
        return linear_weighted_cross_entropy(*rows).loss


def micro_batches(tokens: WeightedTokens) -> list[list[torch.Tensor]]:
    """Input ids, labels and weights of a few sequences, padded on the right with weight 0."""
    columns = [column.split(tokens.cu_seqlens.diff().tolist()) for column in tokens[:3]]
    starts = range(0, len(columns[0]), SEQUENCES)
    return [[pad_sequence(c[i : i + SEQUENCES], True) for c in columns] for i in starts]


def main(path: str, data: str, output: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = WithLoss(path).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    for epoch in range(EPOCHS):
        total = 0.0
        for input_ids, labels, weights in micro_batches(WeightedTokens.load(data)):
            loss = model(input_ids.to(device), labels, weights)
            loss.backward()  # weights hold all means: micro-batches add up
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        print(f"epoch {epoch}: loss {total:.6f}")
    model.model.save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
