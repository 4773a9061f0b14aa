"""Runs that several processes must train as one process does, and what they are compared by.

As a script, prints the differences of 1, 2 and 4 processes, over 40 steps and for each family:

    python tests/parity.py FOLDER
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES, family_model
from processes import launch
from tiny import character_tokenizer, save_tiny_model

import grao_fast
from grao_fast.config import GRAOConfig

CONFIG = GRAOConfig(
    num_generations=4,
    max_new_tokens=8,
    prompts_per_step=6,
    max_tokens_per_microbatch=150,
    learning_rate=1e-3,
    temperature=1.0,
    save_steps=0,
    log_completions_steps=1,
    disable_tqdm=True,
    device="cpu",
    sharding="full",
    reference_advantage="signed",  # as in docs/results/processes.md
)
ROWS = [
    {
        "prompt": "abcdefg"[: 1 + i % 7] * (1 + i % 4),
        "reference": "gfedcba"[: 1 + i % 5],
        "place": i,
    }
    for i in range(20)
]


@dataclass(frozen=True)
class Variant:
    """A kind of run.

    model: "tied", "untied" or the name of a family in `families`.
    dead: the share of prompts whose rewards are all equal.
    steps: of a long run; until then, no token is sampled whose random number lies within rounding
        of a boundary.
    """

    options: dict[str, Any] = field(default_factory=dict)
    model: str = "tied"
    lora: bool = False
    dead: float = 0.0
    steps: int = 40


OTHER = {"reference_advantage": GRAOConfig.reference_advantage}  # of objectives without it

VARIANTS = {
    "tied": Variant(),
    "untied": Variant(model="untied"),
    "none": Variant({"sharding": "none"}),
    "hybrid": Variant({"sharding": "hybrid", "replicas": 2}),
    "LoRA": Variant(lora=True),
    "KL, two updates": Variant(
        {"kl_coef": 0.1, "num_iterations": 2, "num_generations_eval": 3, "eval_steps": 2}
    ),
    "LoRA, KL, two updates": Variant({"kl_coef": 0.1, "num_iterations": 2}, lora=True),
    "DPO, two updates": Variant(OTHER | {"objective": "dpo", "num_iterations": 2}),
    "SFT": Variant(
        OTHER
        | {
            "objective": "sft",
            "num_generations": GRAOConfig.num_generations,  # of none
            "log_completions_steps": 0,
        }
    ),
    "half dead": Variant(dead=0.5),
    "nine tenths dead": Variant(dead=0.9),
    "refilled": Variant({"dynamic_sampling": 2, "curriculum": True}, dead=0.5),
    "odd counts": Variant({"prompts_per_step": 5, "max_tokens_per_microbatch": 60}),
    "three prompts": Variant({"prompts_per_step": 3}),
    "padded": Variant({"share_prefix": False}),
    "mixture": Variant(model="Qwen3Moe"),
    "mixture, odd": Variant(
        {"prompts_per_step": 5, "max_tokens_per_microbatch": 60}, "Mixtral", steps=30
    ),
}
FAMILY = {f"family {name}": Variant(model=name) for name in FAMILIES}
# bfloat16 passes differ with the size of a micro-batch, so runs drift apart: "halves" is what that
# does in one process.
BFLOAT16 = {
    "bfloat16": Variant({"bf16": True}),
    "bfloat16, halves": Variant({"bf16": True, "max_tokens_per_microbatch": 75}),
}
ALL = VARIANTS | FAMILY | BFLOAT16


def reward_of(dead: float) -> Any:
    """A reward that is the same for all samples of a share of the prompts."""

    def vowels(completions: list[str], place: list[int], **columns: Any) -> list[float]:
        pairs = zip(completions, place, strict=True)
        return [
            0.5 if (7 * n) % 20 < 20 * dead else sum(map(text.count, "aeiou")) / (1 + len(text))
            for text, n in pairs
        ]

    return vowels


def model_of(kind: str, folder: Path) -> tuple[Any, Any]:
    """A model, as a folder or in memory, and its tokenizer."""
    if kind in ("tied", "untied"):
        if not folder.exists():
            save_tiny_model(folder, tied=kind == "tied")
        return folder, None
    tokenizer = character_tokenizer(chat_template=None)
    return family_model(kind, vocab_size=len(tokenizer), max_position_embeddings=128), tokenizer


def run(variant: Variant, output: Path, models: Path, *, steps: int) -> dict[str, torch.Tensor]:
    """Train in this process, or as one of several; returns the whole weights."""
    model, tokenizer = model_of(variant.model, models / variant.model)
    peft_config = None
    if variant.lora:
        from peft import LoraConfig

        peft_config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    held_out: dict[str, Any] = {}
    if "num_generations_eval" in variant.options:
        held_out = {"eval_dataset": ROWS[:5], "metric": reward_of(0.0)}
    result = grao_fast.train(
        model,
        ROWS,
        reward_of(variant.dead) if variant.options.get("objective") != "sft" else None,
        config=CONFIG.replace(max_steps=steps, **variant.options),
        tokenizer=tokenizer,
        peft_config=peft_config,
        output_dir=output,
        **held_out,
    )
    return {name: tensor.detach() for name, tensor in result.model.state_dict().items()}


def differences(one: Path, other: Path) -> dict[str, float]:
    """The largest differences of two runs in rewards, losses and weights; where samples differ."""
    ours, theirs = (
        [row for row in _lines(folder / "metrics.jsonl") if "loss" in row]
        for folder in (one, other)
    )
    texts = [
        [row["completions"] for row in _lines(folder / "completions.jsonl")] + _held_out(folder)
        for folder in (one, other)
    ]
    assert len(ours) == len(theirs) and len(texts[0]) == len(texts[1])

    def off(name: str) -> float:
        return max(
            abs((a.get(name) or 0) - (b.get(name) or 0)) for a, b in zip(ours, theirs, strict=True)
        )

    weights, others = _weights(one), _weights(other)
    assert weights.keys() == others.keys()
    pairs = list(zip(*texts, strict=True))
    return {
        "samples": sum(a != b for a, b in pairs) / max(1, len(pairs)),  # SFT has none
        "reward": off("reward"),
        "loss": off("loss"),
        "grad_norm": off("grad_norm"),
        "tokens": off("tokens"),
        "weights": max(float((weights[k] - others[k]).abs().max()) for k in weights),
    }


def _held_out(folder: Path) -> list[list[str]]:
    """The greedy answers and samples of a run's evaluations."""
    rows = [row for path in sorted(folder.glob("eval-*.jsonl")) for row in _lines(path)]
    return [[row["completion"], *row["samples"]] for row in rows]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _weights(output: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    files = sorted((output / "final").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def run_all(
    names: list[str],
    folder: Path,
    size: int,
    *,
    steps: int | None = None,
    options: dict[str, Any] | None = None,
) -> None:
    """Run variants one after another in `size` processes that are started once."""

    def body(rank: int) -> None:
        for name in names:
            variant = ALL[name]
            chosen = replace(variant, options=variant.options | (options or {}))
            output = folder / f"{name} {size}"
            run(chosen, output, folder / "models", steps=steps or variant.steps)

    (folder / "printed").mkdir(parents=True, exist_ok=True)
    for kind in ("tied", "untied"):
        model_of(kind, folder / "models" / kind)
    ended = launch(body, folder / "printed", size=size, timeout=3600)
    assert all(process.status == 0 for process in ended), [process.stderr for process in ended]


def main(folder: Path) -> None:
    for size in (1, 2, 4):
        skipped = {"hybrid"} if size < 4 else set()
        names = [name for name in (*VARIANTS, *BFLOAT16) if name not in skipped]
        run_all(names, folder, size)
        run_all(list(FAMILY), folder, size, steps=1)
    for name in ALL:
        one = folder / f"{'tied' if name == 'hybrid' else name} 1"
        for size in (2, 4):
            other = folder / f"{name} {size}"
            if other.exists():
                show(f"{name}, {size} processes", differences(one, other))
    show("bfloat16, halves", differences(folder / "bfloat16 1", folder / "bfloat16, halves 1"))


def show(name: str, off: dict[str, float]) -> None:
    print(f"{name:36}", *(f"{what} {value:.2g} " for what, value in off.items()), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
