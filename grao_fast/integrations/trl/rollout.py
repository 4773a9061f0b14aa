"""A generation batch with references: TRL's rollout, and one more sequence in each group.

Suffixes: N prompts of all processes, G samples and K = G + 1 sequences of each, the reference
last; B rows of this process, S rows of all processes, F reward functions; the rest as in
`references.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from trl.chat_template_utils import parse_response
from trl.trainer.utils import pad, split_tensor_dict

from grao_fast.data.encoder import Encoder
from grao_fast.integrations.trl.datasets import (
    check_have_tokens,
    check_is_messages,
    check_rows_for_rewards,
)
from grao_fast.integrations.trl.in_step import InStepTrainer
from grao_fast.integrations.trl.policy import embedding_rows_of
from grao_fast.integrations.trl.references import (
    References,
    attach,
    carriers,
    in_order,
    most_carriers,
    read_references,
    ride,
    to_score,
)
from grao_fast.integrations.trl.rewards import (
    equal_to_rounding,
    names_needing,
    refuse_unscored,
    totals,
)
from grao_fast.integrations.trl.rows import shuffle_groups
from grao_fast.integrations.trl.turns import Tools, TurnEncoder
from grao_fast.kernels import sequence_weights
from grao_fast.kernels.advantage import advantages_and_terms, check_finite_rewards
from grao_fast.system.errors import UserError
from grao_fast.system.visible import get_logger
from grao_fast.training.metrics import group_metrics

logger = get_logger(__name__)


class RolloutTrainer(InStepTrainer):
    """TRL's GRPOTrainer with references in its generation batches, and no loss for them yet."""

    def _begin_rollouts(self, objective: dict[str, Any]) -> None:
        """Set what rollouts need. objective: options of `advantages_and_terms`."""
        self._objective = objective
        self._samples: tuple[list, ...] = ()
        self._sample_rewards_SF: Tensor | None = None
        self._has_scored = False
        args = self.args
        self._groups_are_whole = args.per_device_train_batch_size % args.num_generations == 0
        if not self._groups_are_whole:
            logger.info(
                "micro-batches of %d rows split groups of %d: set per_device_train_batch_size to a "
                "multiple of num_generations to keep them whole",
                args.per_device_train_batch_size, args.num_generations,
            )  # fmt: skip
        encoder = Encoder(
            self._tokenizer,
            self.eos_token_ids,
            continues=False,  # TRL opens another turn
            template_options={"chat_template": self.chat_template}
            | dict(self.chat_template_kwargs),
        )
        self._turns = TurnEncoder(
            encoder,
            embedding_rows_of(self.model, self._tokenizer),
            self._get_tool_suffix_ids,
            self._parse,
        )
        # What samples have and references have not; a batch adds the fields of rollout_func.
        self._of_samples = ["environments"] if self.environment_factories is not None else []
        check_rows_for_rewards(
            self.train_dataset,
            self.eval_dataset,
            names_needing(self._of_samples, self.reward_funcs, self.reward_func_names),
            tools=bool(self.tools),
        )

    @property
    def _group_size(self) -> int:
        return self.num_generations if self.model.training else self.num_generations_eval

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """TRL's micro-batch; where groups fit into one, they are shuffled whole."""
        if not (self._groups_are_whole and self.model.training):
            return super()._prepare_inputs(generation_batch)
        parts = self.args.steps_per_generation
        if self._step % (parts * self.num_iterations) == 0 or self._buffered_inputs is None:
            rows = self._generate_and_score_completions(generation_batch)
            rows = shuffle_groups(rows, self.num_generations)
            self._buffered_inputs = split_tensor_dict(rows, parts)
        return self._buffered_inputs[self._step % parts]

    def _calculate_rewards(self, *arguments: Any) -> Tensor:
        """TRL's rewards of all processes' samples, (N * G, F), kept since TRL discards them."""
        self._samples = arguments
        self._sample_rewards_SF = super()._calculate_rewards(*arguments)
        return self._sample_rewards_SF

    def _parse(self, ids: list[int], prefix: list[int], tools: Tools) -> dict[str, Any]:
        """The message that TRL makes of a turn's tokens."""
        for parser in ("response_template", "response_schema"):
            if getattr(self._tokenizer, parser, None) is not None:
                return parse_response(self._tokenizer, ids, prefix=prefix, tools=tools)
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        return {"role": "assistant", "content": text}

    def _tools_of(self, b: int) -> Tools:
        """The tools of a row of the batch that was sampled last."""
        if self.environment_factories is None:
            return self.tools
        return self._env_tools[self._batch_environments[b]]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.tools:  # of a stream, or of other data for evaluation, no row has been seen yet
            prompt = inputs[0].get("prompt")
            self._world.together(lambda: check_is_messages(prompt, "a row"))
        G, B, process = self._group_size, len(inputs), self.accelerator.process_index
        rows = [dict(row) for row in inputs]  # TRL adds the fields of rollout_func to `inputs`
        output = super()._generate_and_score_completions(inputs)
        self._samples = (rows, *self._samples[1:])
        of_samples = [*self._of_samples, *sorted(inputs[0].keys() - rows[0].keys())]
        references = self._world.together(
            lambda: self._read_references(of_samples, output["prompt_mask"])
        )
        reference_rewards_N = self._score_references(references, of_samples, B)
        samples_S, size_S = totals(self._sample_rewards_SF, self.reward_weights)
        rewards_NK = torch.cat([samples_S.view(-1, G), reference_rewards_N[:, None]], dim=1)
        check_finite_rewards("rewards", rewards_NK)
        rewards_NK = equal_to_rounding(rewards_NK, size_S.view(-1, G).amax(1))
        self._has_scored |= not bool(rewards_NK.isnan().all())
        if not self._has_scored:
            raise UserError(
                f"{', '.join(self.reward_func_names)} gave None or NaN for every sample and every "
                "reference of the first batch: return numbers, and None where there is none to give"
            )
        advantages_NK, terms_3NK = advantages_and_terms(rewards_NK, **self._objective)
        self._log_rollout(rewards_NK, advantages_NK)
        return self._with_references(output, references, ride(terms_3NK, process, B))

    def _with_references(
        self, output: dict[str, Any], references: References, terms_B23: Tensor
    ) -> dict[str, Any]:
        """TRL's generation batch with what `rows.rows_of` reads."""
        B = len(terms_B23)
        riding = carriers(self.accelerator.process_index, B, self._group_size)
        ids_B = attach(references.token_ids, riding, B)
        lengths_B = torch.tensor([len(ids) for ids in ids_B])
        lengths_B2 = torch.stack([output["completion_mask"].sum(1).cpu(), lengths_B], dim=1)
        reference_ids_BC = pad(
            ids_B, self._tokenizer.pad_token_id, pad_to_multiple_of=self.pad_to_multiple_of
        )
        learned_BC = pad(
            attach(references.learned, riding, B), 0, pad_to_multiple_of=self.pad_to_multiple_of
        )
        output["reference_ids"] = reference_ids_BC.to(output["prompt_ids"].device)
        # On the CPU, where the loss reads them without a device sync.
        output |= {"terms_B23": terms_B23, "lengths_B2": lengths_B2, "reference_mask": learned_BC}
        for name in ("importance_sampling_ratio", "tool_mask"):
            if name in output:
                output[name] = output[name].cpu()
        micro_batches = self.args.steps_per_generation * self.num_iterations
        if self.args.gradient_accumulation_steps % micro_batches == 0:
            output.pop("old_per_token_logps", None)  # for vLLM's correction; of this policy
        del output["advantages"]  # GRPO's
        return output

    def _read_references(self, of_samples: list[str], prompt_mask_BP: Tensor) -> References:
        """The references of this process's groups.

        of_samples: names of fields that references lack.

        Raises:
            UserError: a prompt has no tokens, or no reward can score a reference.
        """
        check_have_tokens(prompt_mask_BP)
        rows, prompts, *_ = self._samples
        riding = carriers(self.accelerator.process_index, len(rows), self._group_size)
        references = read_references(
            [rows[b] for b in riding],
            [prompts[b] for b in riding],
            [self._tools_of(b) for b in riding],
            self._turns,
        )
        needing = names_needing(of_samples, self.reward_funcs, self.reward_func_names)
        if needing and any(references.to_score):
            refuse_unscored(needing, "references")
        if needing and not self._has_scored:  # the first batch shows the fields of rollout_func
            check_rows_for_rewards(self.train_dataset, self.eval_dataset, needing, tools=False)
        return references

    def _score_references(self, references: References, of_samples: list[str], B: int) -> Tensor:
        """rewards_N of the references of all processes; this one scores its own."""
        G, processes = self._group_size, self.accelerator.num_processes
        scored_PC, given_PC = self._gather_known(references, most_carriers(B, G))
        most = int(scored_PC.sum(1).max())
        rewards_PR = torch.zeros(processes, 0, dtype=torch.float64)
        if most:
            riding = carriers(self.accelerator.process_index, B, G)
            rows = [self._samples[0][b] for b in riding]
            with self._without_environments(), _missing(of_samples):
                rewards_RF = super()._calculate_rewards(
                    *to_score(rows, references, self._samples, most)
                )
            rewards_PR = totals(rewards_RF, self.reward_weights)[0].view(processes, most)
            # Rewards may log to the completions table and metrics, which are of samples alone.
            self._pending_extra_logs.clear()
            self._pending_metrics.clear()
        return in_order(scored_PC, rewards_PR, B, G, given_PC)

    def _gather_known(self, references: References, most: int) -> tuple[Tensor, Tensor]:
        """scored_PC and given_PC: which references are to be scored, and the others' rewards."""
        # In float32, as the rewards of samples, and since some devices have no float64.
        known_C2 = torch.zeros(most, 2, dtype=torch.float32)
        known_C2[: len(references.rewards)] = torch.tensor(
            [references.to_score, references.rewards], dtype=torch.float32
        ).T
        known_PC2 = self.accelerator.gather(known_C2.to(self.accelerator.device))
        scored_PC, given_PC = known_PC2.cpu().view(-1, most, 2).unbind(2)
        return scored_PC.bool(), given_PC.double()

    @contextmanager
    def _without_environments(self) -> Iterator[None]:
        """Call rewards as for references, which have been in no environment."""
        environments, self.environments = self.environments, None
        try:
            yield
        finally:
            self.environments = environments

    def _log_rollout(self, rewards_NK: Tensor, advantages_NK: Tensor) -> None:
        of_weights = {k: v for k, v in self._objective.items() if k != "statistics"}
        weights_NK = sequence_weights(advantages_NK, **of_weights)
        self._record(group_metrics(rewards_NK, advantages_NK, weights_NK))
        # Replaces GRPO's advantages in the table of completions.
        table, advantages = self._logs["advantages"], advantages_NK[:, :-1].flatten().tolist()
        for _ in range(min(len(table), len(advantages))):
            table.pop()
        table.extend(advantages)

    def _record(self, metrics: dict[str, Tensor]) -> None:
        """Add metrics to TRL's log, which averages them; NaN is left out."""
        mode = "train" if self.model.training else "eval"
        for name, value in metrics.items():
            if not value.isnan():
                self._metrics[mode][name].append(float(value))


@contextmanager
def _missing(of_samples: list[str]) -> Iterator[None]:
    """Say what to do where a reward function looks for a field that only samples have."""
    try:
        yield
    except KeyError as error:
        if error.args and error.args[0] in of_samples:
            refuse_unscored({error.args[0]: ["a reward function"]}, "references")
        raise
