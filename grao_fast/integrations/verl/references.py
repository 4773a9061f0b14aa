"""The agent loop for verl whose last response to a prompt is the prompt's reference."""

from __future__ import annotations

from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput, register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

from grao_fast.data.encoder import Encoder
from grao_fast.integrations.verl.advantages import NAME
from grao_fast.system.visible import get_logger

logger = get_logger(__name__)


@register(NAME)
class GRAOAgentLoop(SingleTurnAgentLoop):
    """verl's single turn, but for the last of a prompt's `rollout.n` responses: its reference.

    The reference is text or messages in the dataset's column `reference`, or in `extra_info`. It is
    scored like a sample, ends in an end-of-sequence token, and counts in verl's metrics of
    responses. A prompt without one gets a sample in its place.

    The response of a reference begins with the last token of its prompt, which does not count, and
    its prompt ends a token earlier. The model reads the same tokens in the same order, and whoever
    sees the response's mask knows that it is a reference: a sample's first token counts.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        rollout = self.rollout_config
        if rollout.n < 2:
            raise ValueError(
                f"rollout.n is {rollout.n}, but a group has at least one sample and its reference: "
                "set actor_rollout_ref.rollout.n to G + 1"
            )
        if rollout.val_kwargs.n >= rollout.n:
            raise ValueError(
                f"rollout.val_kwargs.n is {rollout.val_kwargs.n} and rollout.n is {rollout.n}: the "
                "last of n responses is the reference, so validation must have fewer"
            )
        if rollout.calculate_log_probs:
            raise ValueError(
                "references have no log-probs of a sampler: set "
                "actor_rollout_ref.rollout.calculate_log_probs=False"
            )
        self._encoder = Encoder(
            self.tokenizer,
            continues=False,
            template_options=dict(self.apply_chat_template_kwargs),
        )

    async def run(
        self, sampling_params: dict[str, Any], priority: int = 0, **columns: Any
    ) -> AgentLoopOutput:
        """Sample a response, or return the reference. `columns` are the dataset's and verl's."""
        if "session_id" not in columns:
            raise ValueError("GRAO needs verl's V1 trainer: set trainer.use_v1=True")
        reference = columns.get("reference") or (columns.get("extra_info") or {}).get("reference")
        if not reference or columns["session_id"] != self.rollout_config.n - 1:
            # verl's decorator of `run` hides from type checkers that it is implemented.
            return await super().run(  # pyright: ignore[reportAbstractUsage]
                sampling_params, priority=priority, **columns
            )
        messages = list(columns["raw_prompt"])
        prompt_ids = await self.ct_build_initial_tokens(messages)
        (encoded,) = self._encoder.encode([messages], [reference])
        return self._of_reference(prompt_ids, encoded.reference, step=columns.get("global_steps"))

    def _of_reference(
        self, prompt_ids: list[int], ids: list[int], *, step: int | None
    ) -> AgentLoopOutput:
        """The output of a session that answers with the reference, as if sampled in this step."""
        most = self.response_length - 1
        if len(ids) > most:
            logger.warning(
                "a reference of %d tokens is cut to %d: set data.max_response_length higher",
                len(ids),
                most,
            )
            ids = ids[:most]
        return AgentLoopOutput(
            prompt_ids=prompt_ids[:-1],
            response_ids=[prompt_ids[-1], *ids],
            response_mask=[0] + [1] * len(ids),
            num_turns=2,
            metrics=AgentLoopMetrics(),
            extra_fields={
                "turn_scores": [],
                "tool_rewards": [],
                "min_global_steps": step,
                "max_global_steps": step,
            },
        )
