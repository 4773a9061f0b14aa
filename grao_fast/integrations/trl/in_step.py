"""Turns behind tools' results, sampled by all processes together where one waits for the others.

TRL 1.16 samples these turns in each process for itself, as often as its own samples call tools.
Where weights are sharded, or an engine of vLLM serves several processes, a turn is an exchange of
all of them: those that sample different numbers of turns would wait for ever. vLLM's completions
are handed out by the number of a process's own prompts, so with different numbers of these a
process would be given another's.
"""

from __future__ import annotations

from typing import Any

import torch

from grao_fast.integrations.trl.joint import JointTrainer

TokenIds = list[int]


class InStepTrainer(JointTrainer):
    """TRL's GRPOTrainer, in which all processes sample the same number of turns."""

    _in_step = False

    @property
    def _samples_together(self) -> bool:
        """Whether no process can sample a turn alone."""
        if self.accelerator.num_processes == 1:
            return False
        sharded = self._dist.is_zero3 or self._dist.is_fsdp
        if not self.use_vllm:
            return sharded
        # An engine that sleeps between turns is given the weights again at each, gathered by all.
        given = sharded and self.args.vllm_enable_sleep_mode
        return given or self.vllm_mode == "server" or self.args.vllm_tensor_parallel_size > 1

    def _tool_call_loop(
        self, prompts: list, prompt_ids: list[TokenIds], *others: Any
    ) -> tuple[Any, ...]:
        """TRL's loop of tool calls, which ends where the samples of no process call any more."""
        if not self._samples_together:
            return super()._tool_call_loop(prompts, prompt_ids, *others)
        self._in_step = True
        try:
            found = super()._tool_call_loop(prompts, prompt_ids, *others)
            while number := self._prompts_of_turn(0):
                self._in_step = False  # this turn has all of its prompts
                self._generate_single_turn(prompt_ids[:1] * number, None, {}, 1)
                self._in_step = True
        finally:
            self._in_step = False
        return found

    def _generate_single_turn(
        self,
        prompt_ids: list[TokenIds],
        images: list | None,
        multimodal_fields: dict[str, Any],
        num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list[TokenIds], list[list[float]] | None]:
        """TRL's turn; behind tools' results, of as many prompts as the other processes need."""
        own = len(prompt_ids)
        if self._in_step:
            prompt_ids = prompt_ids + prompt_ids[:1] * (self._prompts_of_turn(own) - own)
        completion_ids, logprobs = super()._generate_single_turn(
            prompt_ids, images, multimodal_fields, num_generations, has_tool_images
        )
        return completion_ids[:own], None if logprobs is None else logprobs[:own]

    def _prompts_of_turn(self, own: int) -> int:
        """How many prompts to sample from in a turn for which this process has `own`.

        It is 0 in all processes if none has any, and with vLLM the same in all.
        """
        count = torch.tensor([own], device=self.accelerator.device)
        most = int(self.accelerator.gather(count).max())
        return most if self.use_vllm else min(most, max(own, 1))
