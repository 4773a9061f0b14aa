"""The two sides of the benchmark of a step: ours, and TRL's GRPOTrainer by its own methods.

Both are given the same model, prompts, sequences and rewards. TRL has no references: it is handed
each group's as one more completion, and as advantages the weights that make its loss,
`loss_type="grpo"`, GRAO's. Both then make the same gradient, to which the gate of `step_race.py`
holds them. TRL 1.16 has one path for its loss, in chunks; Liger's is gone from it. On a CPU it
scores the prompts' positions too.

Suffixes: N prompts, G samples, K = G + 1 sequences of a prompt with the reference last.
"""

from __future__ import annotations

import math
import tempfile
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from step_problem import useful_tokens
from torch import Tensor

from grao_fast.config import GRAOConfig
from grao_fast.kernels import sequence_weights
from grao_fast.models.sharding import whole
from grao_fast.sampling.seeds import prompt_seeds

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from grao_fast.config.views import ShardingOption
    from grao_fast.distributed.world import World
    from grao_fast.training.rollout import Rollout

CONFIG = GRAOConfig(
    temperature=1.0,
    gradient_checkpointing=False,
    generation_batch_size=4096,
    max_tokens_per_microbatch=16384,
    reference_advantage="signed",  # every reference takes part, on all sides
)


class Ours:
    """One policy with its sampler, updated by `grao_fast.training.step.update`.

    loss, grad_norm: of the last step.
    """

    loss = grad_norm = math.nan

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        sharding: ShardingOption = "auto",
        world: World | None = None,
    ) -> None:
        from torch.optim.lr_scheduler import LambdaLR

        from grao_fast.sampling.loading import load_policy
        from grao_fast.training.optim import adamw

        self.config = CONFIG.replace(device=model.device.type, sharding=sharding)
        self.loaded = load_policy(model, config=self.config, tokenizer=tokenizer, world=world)
        self.policy = self.loaded.policy
        self.optimizer = adamw(self.policy.model, self.config.optimisation)
        self.scheduler = LambdaLR(self.optimizer, lambda step: 1.0)

    def step(self, rollout: Rollout) -> int:
        """Take one optimiser step and return the useful tokens."""
        from grao_fast.training.step import update

        metrics = update(
            self.policy,
            self.optimizer,
            self.scheduler,
            rollout,
            objective=self.config.objective_options,
            optimisation=self.config.optimisation,
            max_tokens=self.config.max_tokens_per_microbatch,
        )
        self.loss, self.grad_norm = metrics["loss"], metrics["grad_norm"]
        return useful_tokens(rollout)

    def gradient(self, rollout: Rollout) -> tuple[float, list[Tensor]]:
        """Return the loss and its gradient in every parameter."""
        from grao_fast.data.packing import split_by_tokens
        from grao_fast.training.coefficients import to_groups
        from grao_fast.training.step import micro_batch_loss

        groups = to_groups(rollout, self.config.objective_options)
        loss = 0.0
        with self.policy.updating():
            for part in split_by_tokens(groups, self.config.max_tokens_per_microbatch):
                batch = self.policy.lay_out(part)
                result = micro_batch_loss(
                    self.policy, batch, self.config.objective_options, num_prompts=len(groups)
                )
                result.loss.backward()
                loss += float(result.loss.detach())
        return loss, take_gradients(self.policy.model)

    def sample(self, prompts: list[list[int]], samples: int, longest: int, seed: int) -> int:
        """Sample completions of every prompt and return their number of tokens."""
        groups = self.loaded.sampler.sample(
            prompts,
            num_generations=samples,
            max_new_tokens=longest,
            temperature=self.config.temperature,
            seeds=prompt_seeds(seed, len(prompts)),
        )
        return sum(len(each.token_ids) for group in groups for each in group)


class TRL:
    """GRPOTrainer with the same settings: no recomputation, no KL, one update a rollout.

    Outside the clock it does what it does before a step: `_generate_and_score_completions`, with
    completions given by its `rollout_func`, pads and moves them.

    loss, grad_norm: of the last step; the loss is that of this process's sequences.
    """

    loss = grad_norm = math.nan

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        K: int,
        longest: int,
        fsdp2: bool = False,
    ) -> None:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        on_cuda = model.device.type == "cuda"
        self.K = K
        self._given: Rollout | None = None
        self._folder = tempfile.TemporaryDirectory()
        arguments = GRPOConfig(
            self._folder.name,
            num_generations=K,
            per_device_train_batch_size=K,
            max_completion_length=longest,
            temperature=CONFIG.temperature,
            beta=0.0,
            num_iterations=1,
            loss_type="grpo",
            gradient_checkpointing=False,
            learning_rate=CONFIG.learning_rate,
            weight_decay=CONFIG.weight_decay,
            max_grad_norm=CONFIG.max_grad_norm,
            bf16=on_cuda,
            use_cpu=not on_cuda,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        self.trainer = trainer = GRPOTrainer(
            model,
            reward_funcs=self._rewards,
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": "w2"}]),
            processing_class=tokenizer,
            rollout_func=self._rollout,
        )
        if fsdp2:
            _use_fsdp2(trainer)
        # As `Trainer.train` does before its first step.
        trainer.create_optimizer()
        trainer.model, trainer.optimizer = trainer.accelerator.prepare(
            trainer.model, trainer.optimizer
        )
        trainer.model_wrapped = trainer.model
        trainer.model.train()

    def _rollout(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        assert self._given is not None
        prompt_ids, completion_ids = [], []
        for prompt, group in zip(self._given.prompts, self._given.completions, strict=True):
            prompt_ids += [prompt.prompt_ids] * self.K
            completion_ids += [*(each.token_ids for each in group), prompt.reference_ids]
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}

    def _rewards(self, prompts: list[str], **unused: Any) -> list[float]:
        assert self._given is not None
        return self._given.rewards_NK.flatten().tolist()

    def score(self, rollout: Rollout) -> dict[str, Any]:
        """Return the batch that TRL makes of a rollout, with its own advantages."""
        self._given = rollout
        rows = [{"prompt": "w2"} for _ in range(rollout.rewards_NK.numel())]
        return self.trainer._generate_and_score_completions(rows)

    def load(self, rollout: Rollout, parts: int) -> list[dict[str, Any]]:
        """Return micro-batches whose advantages make TRL's loss GRAO's: mean_s -K w_s L(s)."""
        from trl.trainer.utils import split_tensor_dict

        inputs = self.score(rollout)
        advantages_S = (self.K * grao_weights(rollout)).flatten()
        inputs["advantages"] = advantages_S.to(inputs["advantages"])
        return split_tensor_dict(inputs, parts)

    def backward(self, parts: list[dict[str, Any]]) -> float:
        """Add up loss and gradients of all micro-batches and return the loss.

        As in `Trainer`, processes exchange gradients in the last of them only.
        """
        trainer = self.trainer
        trainer.current_gradient_accumulation_steps = len(parts)
        loss = 0.0
        for part in parts:
            last = part is parts[-1]
            # Of all accelerators of the process: another run that was broken off may have left it.
            trainer.accelerator.gradient_state._set_sync_gradients(last)
            with nullcontext() if last else trainer.accelerator.no_sync(trainer.model):
                with trainer.compute_loss_context_manager():
                    value = trainer.compute_loss(trainer.model, part)
                trainer.accelerator.backward(value)
            loss += value.detach()
        return float(loss)

    def step(self, parts: list[dict[str, Any]]) -> int:
        """Take one optimiser step and return the useful tokens."""
        self.loss = self.backward(parts)
        trainer = self.trainer
        parameters = trainer.model.parameters()
        norm = trainer.accelerator.clip_grad_norm_(parameters, CONFIG.max_grad_norm)
        self.grad_norm = float(whole(norm))
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return sum(int(part["completion_mask"].sum()) for part in parts)

    def gradient(self, rollout: Rollout, parts: int = 1) -> tuple[float, list[Tensor]]:
        """Return the loss and its gradient in every parameter.

        The value of its loss is that of ratios, which are 1: only its gradient is GRAO's.
        """
        loss = self.backward(self.load(rollout, parts))
        return loss, take_gradients(self.trainer.model)

    def sample(self, prompts: list[list[int]], samples: int, longest: int, seed: int) -> int:
        """Sample completions of every prompt with `generate` and return their tokens."""
        assert longest == self.trainer.max_completion_length
        torch.manual_seed(seed)
        repeated = [ids for ids in prompts for _ in range(samples)]
        completions, _ = self.trainer._generate_single_turn(repeated, None, {}, samples)
        return sum(len(ids) for ids in completions)


def _use_fsdp2(trainer: Any) -> None:
    """Have accelerate shard the trainer's model by FSDP2, which it does for GPUs only.

    With a plugin for FSDP, accelerate 1.15 takes DDP on CPUs without a word. If its state names
    FSDP, it shards there too, by the same code as on GPUs.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = trainer.accelerator.state
    for each in (PartialState(), state):  # the first is copied into the other now and then
        each.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True
    )
    trainer.is_fsdp_enabled = True


def take_gradients(model: torch.nn.Module) -> list[Tensor]:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    for parameter in model.parameters():
        parameter.grad = None
    return gradients


def grao_weights(rollout: Rollout) -> Tensor:
    """Return w of every sequence, (N, K), where GRAO's loss is -(1/N) sum_s w_s L(s)."""
    return sequence_weights(
        rollout.advantages_NK,
        beta=CONFIG.beta,
        lam=CONFIG.lam,
        reference_advantage=CONFIG.reference_advantage,
    )


def naive_gradient(
    model: PreTrainedModel, rollout: Rollout, weight_NK: Tensor
) -> tuple[float, list[Tensor]]:
    """Return -(1/N) sum_s w_s L(s) and its gradient from full logits, one sequence at a time."""
    N = len(rollout.prompts)
    total = 0.0
    for n, (prompt, group) in enumerate(zip(rollout.prompts, rollout.completions, strict=True)):
        sequences = [*(each.token_ids for each in group), prompt.reference_ids]
        for ids, weight in zip(sequences, weight_NK[n].tolist(), strict=True):
            tokens = torch.tensor([prompt.prompt_ids + ids], device=model.device)
            logits = model(tokens).logits[0, len(prompt.prompt_ids) - 1 : -1].float()
            logprobs = (logits / CONFIG.temperature).log_softmax(-1)
            mean = logprobs.gather(1, tokens[0, -len(ids) :, None]).mean()
            loss = -weight / N * mean
            loss.backward()
            total += float(loss.detach())
    return total, take_gradients(model)
