"""Defines the options of a run, in one flat frozen dataclass.

Options have the names of TRL and Transformers if these have them, and the defaults of the GRAO
paper (arXiv 2508.07750, section 4) if it states them.
"""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from grao_fast.config.rules import (
    AT_LEAST,
    CHOICES,
    check_at_least,
    check_effect,
    check_objective,
    every,
)
from grao_fast.config.views import (
    AttentionBackend,
    CacheImplementation,
    ObjectiveOptions,
    OptimisationOptions,
    ReferenceAdvantage,
    RewardType,
    SamplerChoice,
    SamplingOptions,
    Scheduler,
    ShardingOption,
    Statistics,
    VLLMMode,
    same_named,
)
from grao_fast.system.errors import UserError
from grao_fast.system.field_types import check_types

if TYPE_CHECKING:
    from grao_fast.objectives import Objective

_LARGEST_SEED = 2**32 - 1  # NumPy's


@dataclass(frozen=True)
class GRAOConfig:
    """Configuration of a GRAO run.

    Objective:
        objective: the name of an objective, "grao" or another of `grao_fast.objectives.OBJECTIVES`,
            with options of its own in parentheses: "dpo(beta=0.1)".
        num_generations: G, the number of completions sampled for every prompt; objectives that
            learn from references alone sample none. Of stored completions, as many as the row with
            the most of them has.
        beta: weight of GRAO's imitation term, beta in Eq. 3.
        lam: weight of GRAO's alignment regulariser, lambda in Eq. 3.
        statistics: the rewards whose mean and standard deviation normalise GRAO's advantages: all
            G+1 ("group"), or those of the G samples ("samples", the literal Eq. 4).
        reference_advantage: what becomes of a reference that the samples beat. "floor": it has no
            part in the objective, as its weight is kept at or above 0; docs/results/study.md says
            why this is the default. "signed", as in the paper: its probability is lowered. "clip":
            A_y is kept at or above 0, so that only the regulariser, weighted by lam, lowers it.
            "tapered": a token's probability is lowered in proportion to itself.
        reward_type: "pointwise" if the reward scores samples and references alike; "pairwise" if it
            compares a completion with its reference (+1, 0, -1), whose own reward is then 0.
        reward_weights: one weight for each reward function; None: all 1.
        reward_timeout: the most seconds that a call of a reward function may take, after which the
            run ends with an error; or one number for each, None for one without a limit. A metric
            has the longest of them. None: no limit.
        kl_coef: weight of the KL divergence from the initial policy; 0: none. A copy of the initial
            trained parameters is kept in memory and, for an adapter, in checkpoints.

    Generation:
        sampler: where the completions of training come from: "policy" samples them; "dataset" takes
            those that the rows store, with their rewards and, if known, log-probs.
        temperature: temperature of sampling, and of log pi in the objective.
        max_new_tokens: the most tokens sampled for a completion.
        max_prompt_length: prompts with more tokens are dropped, with a warning; None: a prompt that
            does not fit the model is an error.
        max_reference_length: references are cut to this many tokens before they are scored; None:
            not cut.
        generation_batch_size: the number of sequences that Transformers decodes at once.
        cache_implementation: "dynamic" removes finished samples from the batch; "static" keeps them
            in a cache of fixed size, for which a decoding step is compiled to CUDA graphs on CUDA.

    Sampling with vLLM:
        use_vllm: sample with vLLM instead of Transformers. It receives the weights before the first
            step and after every step.
        vllm_mode: "server" for a running `vllm serve`; "colocate" for an engine in each process.
        vllm_server_base_url: URL of the server.
        vllm_server_model: the name under which the server serves the policy; None: the model's.
        vllm_server_api_key_env: the environment variable that holds the server's API key (never the
            key itself, which would be saved in configurations and checkpoints); None: no key.
        vllm_sync_dir: folder through which weights are transferred, with the same path on the
            server, or on all machines whose processes have engines; None: a temporary folder. A
            folder in memory (/dev/shm) is fastest.
        vllm_gpu_memory_utilization: share of the device's memory for a colocated engine.
        vllm_tensor_parallel_size: neighbouring processes that share one colocated engine, which
            divides the model among their devices.
        vllm_max_model_length: the most tokens of a prompt and its completion in a colocated engine;
            None: the model's limit.
        vllm_importance_sampling_clip_max: cap of the importance weight pi / pi_sampler of every
            sampled token, which corrects for vLLM's different numerics, or for what sampled the
            stored completions, where their log-probs are stored; None: no weight.
        async_rollouts: N, the most steps that the policy may be ahead of the weights which began to
            sample a rollout. The server samples the rollouts of the next N steps while the policy
            is updated; 0 waits for each. Needs vllm_mode="server".

    Optimisation:
        prompts_per_step: the number of prompts in a step.
        dynamic_sampling: the most further rounds of sampling in a step. Each replaces the groups
            whose rewards are all equal, from which nothing is learned, by groups of the next
            prompts; 0: none. Epochs then take fewer steps, but num_train_epochs counts as without.
        curriculum: draw prompts less often whose groups had equal rewards: not in the next epoch,
            then in two, four, and eight, until a group has different ones.
        num_iterations: the number of updates on the samples of a step, all at its learning rate.
            From the second on, the log-prob of a sampled token is replaced by its clipped ratio to
            the policy at the start of the step.
        epsilon, epsilon_high: the ratio is clipped to [1 - epsilon, 1 + epsilon_high]; epsilon
            None: the objective's own bounds, 0.2 for GRAO; epsilon_high None: equal to epsilon.
        max_tokens_per_microbatch: token budget of a forward and backward pass over whole groups;
            None: as many as fit in memory, measured before the first step.
        memory_budget_mib: memory in MiB for such a pass, besides parameters, gradients and AdamW's
            moments; None: 8192 on a CPU, and nine tenths of the free memory on CUDA.
        share_prefix: compute each prompt once for its G+1 continuations; False repeats it in padded
            rows, as models with recurrent layers require.
        attention_backend: attention of updates. With a shared prefix: "flex" (FlexAttention, CUDA
            only), "varlen" (flash-attn's variable-length attention where it is installed, else
            PyTorch's; CUDA and 16 bits only) or "sdpa" (group by group), and "auto" for flex on
            CUDA, else sdpa. Without one: "sdpa" or "flash_attention_2" (CUDA only), and "auto" to
            keep the model's.
        use_liger_kernel: replace the model's norms, rotary embeddings and MLPs by Liger's on CUDA;
            ignored on a CPU, with a log line.
        learning_rate, weight_decay, adam_beta1, adam_beta2, adam_epsilon: options of AdamW.
        lr_scheduler_type, warmup_steps: schedule of the learning rate.
        max_grad_norm: the norm to which gradients are clipped.
        num_train_epochs: passes over the dataset; ignored if max_steps is positive.
        max_steps: the number of steps; -1 to use num_train_epochs.
        gradient_checkpointing: recompute activations in the backward pass.
        bf16: autocast to bfloat16; None: if a CUDA device supports it. Parameters stay float32.
        workspace_mib: memory in MiB for logits and their gradient; None: 512 on a CPU, else 2048.
        device: "cpu", "cuda", "cuda:1"...; None: CUDA if available.
        seed: seed of the data order, of sampling and of dropout.

    Processes, where torchrun, srun or accelerate starts several; see docs/scaling.md:
        sharding: "full" shards parameters, gradients and AdamW's moments over all processes
            (FSDP2); "none" keeps them whole in each, and sums gradients (as DDP does); "hybrid"
            shards within groups of processes and replicates over the groups; "auto": by size.
        replicas: groups of "hybrid"; None: one for each machine.
        cpu_offload: keep shards, gradients and moments in the CPU's memory between their uses.
        ddp_timeout: the seconds that a process waits for another in one exchange: more than the
            slowest sampling of a step takes longer than the fastest.
        heartbeat_timeout: the seconds without a sign of life after which a process is taken for
            dead, and the run ends.

    Evaluation, logging and saving:
        eval_steps: steps between evaluations, besides those at start and end; None: only those.
        num_generations_eval: samples of each held-out prompt, at `temperature`, whose pass@k by the
            held-out metric is reported beside that of the greedy answer; None: greedy answers only.
        logging_steps: steps between lines of metrics.
        log_completions_steps: steps between tables of samples; 0: none.
        log_completions: write the samples of these steps as parquet too, in `completions/`.
        save_steps: steps between checkpoints; 0: only the final model is saved.
        save_total_limit: the number of checkpoints to keep; None: all.
        async_save: copy a checkpoint into the CPU's memory, and write it while training goes on.
        report_to: experiment trackers of accelerate: "tensorboard", "wandb"...
        disable_tqdm: do not show a progress bar.
    """

    objective: str = "grao"
    num_generations: int = 8
    beta: float = 0.5
    lam: float = 0.6
    statistics: Statistics = "group"
    reference_advantage: ReferenceAdvantage = "floor"
    reward_type: RewardType = "pointwise"
    reward_weights: tuple[float, ...] | None = None
    reward_timeout: float | tuple[float | None, ...] | None = None
    kl_coef: float = 0.0

    sampler: SamplerChoice = "policy"
    temperature: float = 0.7
    max_new_tokens: int = 2048
    max_prompt_length: int | None = None
    max_reference_length: int | None = None
    generation_batch_size: int = 64
    cache_implementation: CacheImplementation = "dynamic"

    use_vllm: bool = False
    vllm_mode: VLLMMode = "colocate"
    vllm_server_base_url: str = "http://localhost:8000"
    vllm_server_model: str | None = None
    vllm_server_api_key_env: str | None = None
    vllm_sync_dir: str | None = None
    vllm_gpu_memory_utilization: float = 0.3
    vllm_tensor_parallel_size: int = 1
    vllm_max_model_length: int | None = None
    vllm_importance_sampling_clip_max: float | None = 3.0
    async_rollouts: int = 0

    prompts_per_step: int = 64
    dynamic_sampling: int = 0
    curriculum: bool = False
    num_iterations: int = 1
    epsilon: float | None = None
    epsilon_high: float | None = None
    max_tokens_per_microbatch: int | None = None
    memory_budget_mib: int | None = None
    share_prefix: bool = True
    attention_backend: AttentionBackend = "auto"
    use_liger_kernel: bool = False
    learning_rate: float = 1e-6
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    lr_scheduler_type: Scheduler = "linear"
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    num_train_epochs: float = 1.0
    max_steps: int = -1
    gradient_checkpointing: bool = True
    bf16: bool | None = None
    workspace_mib: int | None = None
    device: str | None = None
    seed: int = 42

    sharding: ShardingOption = "auto"
    replicas: int | None = None
    cpu_offload: bool = False
    ddp_timeout: float = 1800.0
    heartbeat_timeout: float = 60.0

    eval_steps: int | None = None
    num_generations_eval: int | None = None
    logging_steps: int = 1
    log_completions_steps: int = 10
    log_completions: bool = False
    save_steps: int = 100
    save_total_limit: int | None = None
    async_save: bool = False
    report_to: tuple[str, ...] = ()
    disable_tqdm: bool = False

    def __post_init__(self) -> None:
        for name in ("vllm_sync_dir", "vllm_server_model"):
            if isinstance(getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(getattr(self, name)))
        check_types(self)
        for field in AT_LEAST:
            check_at_least(field, getattr(self, field), AT_LEAST[field])
        for field, choices in CHOICES.items():
            if getattr(self, field) not in choices:
                raise UserError(
                    f"{field} must be one of {', '.join(choices)}; got {getattr(self, field)!r}"
                )
        for tracker in self.report_to:
            if not isinstance(getattr(tracker, "name", tracker), str):
                raise UserError(f"report_to takes trackers of accelerate, got {tracker!r}")
        if not re.fullmatch(r"[A-Za-z_]\w*", self.vllm_server_api_key_env or "_"):
            raise UserError(  # the value is not quoted, since it may be the key
                "vllm_server_api_key_env takes the name of an environment variable, not the key"
            )
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device or "cpu"):
            raise UserError(f'device must be "cpu", "cuda" or "cuda:N"; got {self.device!r}')
        for name in ("adam_beta1", "adam_beta2"):
            if not getattr(self, name) < 1:
                raise UserError(f"{name} must be below 1, got {getattr(self, name)}")
        for name in ("epsilon", "vllm_gpu_memory_utilization"):
            if (getattr(self, name) or 0) > 1:
                raise UserError(f"{name} must be at most 1, got {getattr(self, name)}")
        for name in (
            "reward_timeout",
            "vllm_gpu_memory_utilization",
            "vllm_importance_sampling_clip_max",
        ):
            if 0 in every(getattr(self, name)):
                raise UserError(f"{name} must be above 0, got 0")
        for name in ("ddp_timeout", "heartbeat_timeout"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be above 0, got {getattr(self, name)}")
        check_effect(self)
        if self.warmup_steps and self.lr_scheduler_type == "constant":
            raise UserError(
                f"warmup_steps={self.warmup_steps} has no effect on lr_scheduler_type='constant'; "
                "use 'constant_with_warmup'"
            )
        if self.temperature <= 0:
            raise UserError(
                f"temperature must be above 0, got {self.temperature}: greedy samples of a prompt "
                "are all equal, and so are their rewards, so that nothing is learned"
            )
        if self.seed > _LARGEST_SEED:
            raise UserError(f"seed must be at most {_LARGEST_SEED}, got {self.seed}")
        if self.max_steps == 0 or self.max_steps < -1:
            raise UserError(
                f"max_steps must be positive, or -1 for num_train_epochs; got {self.max_steps}"
            )
        check_objective(self)  # imports torch

    def replace(self, **changes: Any) -> GRAOConfig:
        """Return a copy with some fields changed. Raises TypeError for unknown fields."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as data for JSON, with trackers by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        trackers = (t if isinstance(t, str) else t.name for t in self.report_to)
        return values | {"report_to": tuple(trackers)}

    @cached_property  # its types are checked as it is made, and a step asks several times
    def objective_options(self) -> ObjectiveOptions:
        """The view of what the loss is made of."""
        formula = self._formula
        sampled_elsewhere = self.use_vllm or self.sampler == "dataset"
        weighs = sampled_elsewhere and not formula.two_passes
        return ObjectiveOptions(
            **same_named(self, ObjectiveOptions),
            formula=formula,
            clip=self._clip(formula),
            sampler_cap=self.vllm_importance_sampling_clip_max if weighs else None,
        )

    @property
    def _formula(self) -> Objective:
        """The objective; GRAO's options are fields of this configuration."""
        from grao_fast.objectives import make_objective
        from grao_fast.objectives.grao import GRAO

        formula = make_objective(self.objective)
        return GRAO(**same_named(self, GRAO)) if isinstance(formula, GRAO) else formula

    def _clip(self, formula: Objective) -> tuple[float, float] | None:
        if formula.clip is None:
            return None
        low, high = formula.clip if self.epsilon is None else (self.epsilon, self.epsilon)
        return low, high if self.epsilon_high is None else self.epsilon_high

    @property
    def sampling(self) -> SamplingOptions:
        """The view of how many completions are sampled, and how long."""
        samples = self.objective_options.formula.needs_samples
        return SamplingOptions(
            **same_named(self, SamplingOptions),
            samples_drawn=samples and self.sampler == "policy",
        )

    @property
    def optimisation(self) -> OptimisationOptions:
        """The view of the optimiser, its schedule and its updates."""
        return OptimisationOptions(**same_named(self, OptimisationOptions))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GRAOConfig:
        """Make a GRAOConfig of the result of `to_dict`. Raises ValueError for unknown keys."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise UserError(
                f"unknown key {unknown[0]!r} in GRAOConfig; it takes {', '.join(known)}"
            )
        return cls(**values)
