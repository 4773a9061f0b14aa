"""GRAOTrainer in two processes under DeepSpeed or FSDP2, as `accelerate launch` starts them.

As a script, one of these processes: trl_clusters.py KIND MODEL FOLDER.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import GradientState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, training_args
from trl_runs import Keeper, config, prompts, reward, token_ids

from grao_fast.integrations.trl.head import scores_of
from grao_fast.models.objective import HeadInputs, run_at_head
from grao_fast.models.sharding import local

LR = 100.0  # so large that rounding of the weights does not hide the gradient
LORA = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
SAMPLES = {"first": ["one", "two three"], "second": ["t", "no one"], "third": ["5", "six 6 six"]}


def zero(stage: int, folder: Path, *, offload: bool = False) -> dict[str, str]:
    """What `accelerate launch` sets for DeepSpeed; every weight is split, the smallest too.

    offload: whether the optimiser works in the host's memory, by DeepSpeed's own AdamW for CPUs.
    """
    settings = {
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    if offload:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    path = folder / "deepspeed.json"
    path.write_text(json.dumps(settings))
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path),
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true" if stage == 3 else "false",
    }


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def arguments(folder: Path, make: Callable[..., Any] = config, **options: Any) -> Any:
    """Options of a run in this process, sharded if the environment asks for it.

    With a configuration for FSDP, accelerate 1.15 takes DDP on CPUs without a word. Told that these
    processes have GPUs, it shards, by the same code; the device stays the CPU. Transformers is told
    so too, since it has no bfloat16 on CPUs under DeepSpeed.
    """
    GradientState._reset_state()  # an error in an earlier test leaves optimisers that do not step
    on_deepspeed = "ACCELERATE_USE_DEEPSPEED" in os.environ
    with patch.object(training_args, "is_torch_bf16_gpu_available", return_value=True):
        args = make(folder, use_cpu=not on_deepspeed, ddp_backend="gloo", **options)
    if "ACCELERATE_USE_FSDP" in os.environ:
        PartialState().distributed_type = DistributedType.MULTI_GPU
    return args


def one_step(model_folder: Path, folder: Path, *, lora: bool = False, **options: Any) -> None:
    """Take a step of plain SGD; save the weights after it, and what was sampled."""
    args = arguments(folder, steps_per_generation=1, optim="sgd", learning_rate=LR, **options)
    rows = prompts(["live", "live", "dead", "dead"] * 2).to_list()
    for row in rows[1::2]:  # so that now and then one process has no reference, and the other does
        row["reference"][0]["content"] = " "
    trainer = Keeper(
        AutoModelForCausalLM.from_pretrained(model_folder),
        reward,
        args,
        Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        peft_config=LORA if lora else None,
    )
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    saved = {
        "rollouts": [(rows, token_ids(batch)) for rows, batch in trainer.rollouts],
        "loss": trainer.state.log_history[0]["loss"],
        "shares": trainer._policy.share_prefix,
    }
    saved |= division(trainer) | outputs(trainer)
    torch.save(saved, folder / f"rank-{dist.get_rank()}.pt")


def outputs(trainer: Keeper) -> dict[str, Any]:
    """What leaves the wrapped model: 1/3, and log-probs, also of the policy of a KL term."""
    ids_BL = torch.arange(8).view(2, 4)
    mask_BL, row_T = torch.ones_like(ids_BL), torch.arange(2)
    inputs = {"input_ids": ids_BL, "attention_mask": mask_BL}
    policies = [each for each in (trainer.model_wrapped, trainer.ref_model) if each is not None]
    with trainer.accelerator.autocast(), torch.no_grad():
        return {
            "third": run_at_head(policies[0], inputs, row_T, third_of),
            "scores": [
                scores_of(each, ids_BL, mask_BL, 3, trainer._logits, share_prefix=False)
                for each in policies
            ],
        }


def third_of(head: HeadInputs) -> torch.Tensor:
    """1/3 in float32, which bfloat16 rounds."""
    return torch.full((), 1 / 3, device=head.hidden_TD.device)


def division(trainer: Any) -> dict[str, Any]:
    """How accelerate divides a model over the processes, and what this one has of it."""
    kind = trainer.accelerator.distributed_type.value
    return {"kind": kind, "held": held(trainer.model)}


def held(model: torch.nn.Module) -> int:
    """How many numbers of the model's weights this process holds between two steps."""
    return sum(local(getattr(weight, "ds_tensor", weight)).numel() for weight in model.parameters())


def given(prompts: list, trainer: Any) -> dict[str, list]:
    """Completions that depend on the prompt and on which sample of it this is."""
    tokenizer, ids, completions = trainer.processing_class, [], []
    for place, prompt in enumerate(prompts):
        ids.append(tokenizer(prompt)["input_ids"])
        text = SAMPLES[prompt][place % 2]
        completions.append([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}


def marks(completions: list[str], **columns: Any) -> list[float]:
    return [float(sum(map(ord, completion)) % 7) for completion in completions]


def some_steps(model_folder: Path, folder: Path, *, resume: bool = False) -> None:
    """Train two steps by AdamW with a KL penalty, on the same samples in any number of processes.

    resume: from the checkpoint after the first.
    """
    args = arguments(
        folder,
        per_device_train_batch_size=6 // int(os.environ["WORLD_SIZE"]),
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        learning_rate=1e-2,
        adam_epsilon=1e-3,  # against rounding, which AdamW makes as large as a gradient
        max_grad_norm=0.5,
        beta=0.1,
        use_bias_correction_kl=False,
        activation_checkpointing=True,
    )
    rows = [{"prompt": name, "reference": "one or six"} for name in SAMPLES] * 4
    trainer = Keeper(
        str(model_folder),
        marks,
        args,
        Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        rollout_func=given,
    )
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1") if resume else None)
    trainer.save_model(str(folder / "saved"))
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    engine = trainer.model_wrapped
    optimiser = getattr(engine, "basic_optimizer", trainer.optimizer.optimizer)
    write_run(folder, trainer, norms=norms, optimiser=type(optimiser).__name__)


def write_run(folder: Path, trainer: Any, **found: Any) -> None:
    run = json.dumps(division(trainer) | found)
    (folder / f"run-{trainer.args.process_index}.json").write_text(run)


def supervised_step(model_folder: Path, folder: Path) -> None:
    """Take a step of plain SGD by the example for Transformers' Trainer; save the weights."""
    import huggingface as example  # of examples/trainers

    rows = [
        {"input_ids": [5, 6, *range(7, 9 + n), 1], "labels": [-100, 6, *range(7, 9 + n), 1]}
        for n in range(16)
    ]
    args = arguments(
        folder,
        example.TrainingArguments,
        per_device_train_batch_size=8 // int(os.environ["WORLD_SIZE"]),
        gradient_accumulation_steps=2,
        max_steps=1,
        max_grad_norm=0.0,
        optim="sgd",
        learning_rate=1.0,
        report_to="none",
        save_strategy="no",
    )
    trainer = example.OnePassTrainer(
        AutoModelForCausalLM.from_pretrained(model_folder),
        args,
        train_dataset=Dataset.from_list(rows),
        data_collator=example.Collator(AutoTokenizer.from_pretrained(model_folder)),
    )
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    write_run(folder, trainer)


def main() -> None:
    kind, model_folder, folder = sys.argv[1], *map(Path, sys.argv[2:])
    {"step": one_step, "steps": some_steps}[kind](model_folder, folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
