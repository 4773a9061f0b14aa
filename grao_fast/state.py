"""What a run needs to go on exactly where it was.

All randomness of a step is a function of (seed, step), and the data cursor is a function of the
step, so that weights, optimiser and scheduler are the whole state.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from grao_fast.checkpoint import OPTIMIZER, STATE, CheckpointError
from grao_fast.config import GRAOConfig
from grao_fast.data import Encoded
from grao_fast.files import write_folder
from grao_fast.policy import Policy
from grao_fast.rollout.weights import no_bar

logger = logging.getLogger(__name__)


def step_seed(seed: int, step: int) -> int:
    """The seed of everything random in a step: sampling, dropout, a reward's own draws."""
    digest = hashlib.sha256(f"{seed}/{step}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


@dataclass(frozen=True)
class DataStream:
    """An endless stream of shuffled epochs, of which step s takes the s-th batch."""

    size: int
    batch_size: int
    seed: int

    def batch(self, step: int) -> list[int]:
        """Indices of the examples of a step."""
        start = step * self.batch_size
        places = range(start, start + self.batch_size)
        orders = {epoch: self._order(epoch) for epoch in {p // self.size for p in places}}
        return [orders[p // self.size][p % self.size] for p in places]

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(step_seed(self.seed, -1 - epoch))
        return torch.randperm(self.size, generator=generator).tolist()


def fingerprint(prompts: Sequence[Encoded]) -> str:
    """A digest of tokens and columns of a dataset, to know it again when a run resumes."""
    digest = hashlib.sha256()
    for prompt in prompts:
        row = [prompt.prompt_ids, prompt.reference_ids, prompt.example.columns]
        digest.update(json.dumps(row, default=str).encode())
    return digest.hexdigest()[:16]


def save_model(policy: Policy, folder: Path) -> None:
    """Weights, of the adapter alone where one is trained, and tokenizer, for `from_pretrained`."""
    with no_bar():
        policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


def save_checkpoint(
    path: Path,
    policy: Policy,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    *,
    step: int,
    config: GRAOConfig,
    data: str,
) -> None:
    """Write a whole checkpoint, or none."""

    def fill(folder: Path) -> None:
        save_model(policy, folder)
        state = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        torch.save(state, folder / OPTIMIZER)
        facts = {"step": step, "data": data, "config": config.to_dict(), "versions": versions()}
        (folder / STATE).write_text(json.dumps(facts, indent=1))

    write_folder(path, fill)


def check_same_run(path: Path, state: dict[str, Any], *, config: GRAOConfig, data: str) -> None:
    """Refuse a checkpoint of another dataset; say which options have changed."""
    if state["data"] != data:
        raise CheckpointError(
            f"checkpoint {str(path)!r} was written on another dataset (digest {state['data']}, now "
            f"{data}); resume with the dataset, tokenizer and lengths of that run"
        )
    now = json.loads(json.dumps(config.to_dict()))
    changed = [key for key, value in now.items() if state["config"].get(key) != value]
    if changed:
        logger.warning("resuming with other options than the checkpoint's: %s", ", ".join(changed))


def load_weights(policy: Policy, path: Path) -> None:
    """Load a checkpoint's weights into the model as it stands."""
    if hasattr(policy.model, "peft_config"):
        from peft import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(policy.model, load_peft_weights(str(path)))
        return
    saved = type(policy.causal_lm).from_pretrained(path, dtype=policy.causal_lm.dtype)
    policy.causal_lm.load_state_dict(saved.state_dict())


def load_optimizer(path: Path, optimizer: Optimizer, scheduler: LambdaLR) -> None:
    """Load a checkpoint's moments and place in the schedule; options stay the config's own."""
    # to the CPU: AdamW moves its moments to their parameters, and its step counts where it, fused
    # or not, wants them, which it reads from the options that are loaded
    state = torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True)
    own_groups = optimizer.state_dict()["param_groups"]
    for group, own in zip(state["optimizer"]["param_groups"], own_groups, strict=True):
        group.update(own, params=group["params"])
    base_lrs = scheduler.base_lrs
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    scheduler.base_lrs = base_lrs
    factor = scheduler.lr_lambdas[0](scheduler.last_epoch)
    for group, base_lr in zip(optimizer.param_groups, base_lrs, strict=True):
        group["lr"] = base_lr * factor
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def versions() -> dict[str, str]:
    """Versions of what computes."""
    return {name: version(name) for name in ("grao-fast", "torch", "transformers")}
