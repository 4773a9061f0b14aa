"""The processes of a planned run, and the work of its steps."""

from __future__ import annotations

from dataclasses import dataclass

from grao_fast.config import GRAOConfig
from grao_fast.distributed.choice import Sharding
from grao_fast.system.errors import UserError
from grao_fast.training.flops import Work, group_work
from grao_fast.training.plan.size import ModelSize

_WORKSPACE_MIB = 2048  # the kernels' default on CUDA
_MIB = 2**20


@dataclass(frozen=True)
class Layout:
    """How processes are arranged: `replicas` of a model that `shards` processes hold together."""

    replicas: int
    shards: int
    per_node: int

    @property
    def processes(self) -> int:
        return self.replicas * self.shards

    @property
    def nodes(self) -> int:
        return self.processes // self.per_node


def layouts(processes: int, per_node: int, replicas: int | None) -> dict[Sharding, Layout]:
    """Return the layout of each sharding that is possible.

    Args:
        per_node: processes of a node; where there are fewer in all, those.
        replicas: of "hybrid"; None: one in each node.

    Raises:
        UserError: a number is not positive, or does not divide `processes`.
    """
    for name, value in (("processes", processes), ("processes_per_node", per_node)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    per_node = min(per_node, processes)
    if processes % per_node:
        raise UserError(
            f"processes_per_node={per_node} does not divide processes={processes}: all nodes run "
            "the same number"
        )
    if replicas is not None and processes % replicas:
        raise UserError(
            f"replicas={replicas} does not divide processes={processes}: all replicas have the "
            "same number of shards"
        )
    copies = processes // per_node if replicas is None else replicas
    found: dict[Sharding, Layout] = {"none": Layout(processes, 1, per_node)}
    if processes > 1:
        found["full"] = Layout(1, processes, per_node)
    if 1 < copies < processes:
        found["hybrid"] = Layout(copies, processes // copies, per_node)
    return found


@dataclass(frozen=True)
class Workload:
    """The work of a step, with every prompt and sequence at its longest.

    prompts: of a step, over all processes.
    samples, prompt, completion, reference: G, and tokens of each kind of text.
    updates: on the samples of a step.
    kl: whether the policy that training began with is kept and scored.
    two_passes: whether an update computes the logits once more, before its loss.
    recompute: whether layers' activations are recomputed.
    offload: whether shards, gradients and moments are in the CPU's memory.
    compute_bytes: of an element of weights and activations in computing: 2 for bfloat16.
    max_tokens: token budget of a micro-batch; None: what fits.
    decoded: sequences that Transformers decodes at once.
    samples_drawn: whether training samples; not from stored completions, or references alone.
    vllm: who samples: "" is Transformers, else vLLM's mode.
    engine_share: of a device's memory, that a colocated engine takes.
    """

    prompts: int
    samples: int
    prompt: int
    completion: int
    reference: int
    updates: int
    kl: bool
    two_passes: bool
    share_prefix: bool
    recompute: bool
    offload: bool
    compute_bytes: int
    workspace: int
    max_tokens: int | None
    decoded: int
    samples_drawn: bool
    vllm: str
    engine_share: float

    @classmethod
    def of(cls, config: GRAOConfig) -> Workload:
        """The work that a configuration asks for on GPUs, where None for bf16 means bfloat16."""
        if config.max_prompt_length is None:
            raise UserError("max_prompt_length must be given: a plan takes it for every prompt")
        objective = config.objective_options
        return cls(
            prompts=config.prompts_per_step,
            samples=config.num_generations if objective.formula.needs_samples else 0,
            prompt=config.max_prompt_length,
            completion=config.max_new_tokens,
            reference=config.max_reference_length or config.max_new_tokens,
            updates=config.num_iterations,
            kl=objective.needs_beginning,
            two_passes=objective.formula.two_passes,
            share_prefix=config.share_prefix,
            recompute=config.gradient_checkpointing,
            offload=config.cpu_offload,
            compute_bytes=4 if config.bf16 is False else 2,
            workspace=(config.workspace_mib or _WORKSPACE_MIB) * _MIB,
            max_tokens=config.max_tokens_per_microbatch,
            decoded=config.generation_batch_size,
            samples_drawn=config.sampling.samples_drawn,
            vllm=config.vllm_mode if config.use_vllm else "",
            engine_share=config.vllm_gpu_memory_utilization,
        )

    @property
    def decodes(self) -> bool:
        """Whether Transformers samples in training."""
        return self.samples_drawn and not self.vllm

    def group(self, size: ModelSize) -> Work:
        """The work of the updates on one prompt and its sequences."""
        lengths = [self.completion] * self.samples + [self.reference]
        return group_work(self.prompt, lengths, size.windows, share_prefix=self.share_prefix)

    def sampled(self, size: ModelSize) -> Work:
        """The work of sampling for one prompt, which is prefilled once."""
        lengths = [self.completion] * self.samples
        return group_work(self.prompt, lengths, size.windows, share_prefix=True)

    def groups(self, processes: int) -> int:
        """Prompts of the process that has the most."""
        return -(-self.prompts // processes)
