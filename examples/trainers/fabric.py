"""Offline GRAO by Lightning Fabric: python fabric.py MODEL STEP.safetensors OUTPUT"""

import sys

import torch
from lightning_fabric import Fabric
from plain import EPOCHS, WithLoss, micro_batches

from grao_fast.objectives import WeightedTokens


def main(path: str, data: str, output: str) -> None:
    fabric = Fabric(devices=1)
    model = WithLoss(path)
    wrapped, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-5))
    for epoch in range(EPOCHS):
        total = 0.0
        for batch in micro_batches(WeightedTokens.load(data)):
            input_ids, labels, weights = fabric.to_device(batch[:1]) + batch[1:]
            loss = wrapped(input_ids, labels, weights)
            fabric.backward(loss)
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        fabric.print(f"epoch {epoch}: loss {total:.6f}")
    model.model.save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
