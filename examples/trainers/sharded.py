"""Offline GRAO in a loop like torchtitan's, by FSDP2: torchrun --nproc-per-node 2 sharded.py ...

sharded.py MODEL STEP.safetensors OUTPUT
"""

import sys

import torch
import torch.distributed as dist
from plain import EPOCHS, WithLoss, micro_batches
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from grao_fast.objectives import WeightedTokens


def main(path: str, data: str, output: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = WithLoss(path).to(device)
    for layer in model.model.base_model.layers:
        fully_shard(layer)
    fully_shard(model)  # the root holds the head, whole while the loss is made
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    batches = micro_batches(WeightedTokens.load(data))
    batches += [[b[0], b[1], 0 * b[2]] for b in batches[: -len(batches) % world_size]]
    for epoch in range(EPOCHS):
        total = torch.zeros((), device=device)
        for input_ids, labels, weights in batches[rank::world_size]:
            loss = model(input_ids.to(device), labels, weights)
            (loss * world_size).backward()  # FSDP averages, but the weights hold all means
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        if rank == 0:
            print(f"epoch {epoch}: loss {total.item():.6f}")
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        whole = {name.removeprefix("model."): tensor for name, tensor in state.items()}
        model.model.save_pretrained(output, state_dict=whole)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
