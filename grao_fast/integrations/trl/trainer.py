"""`GRAOTrainer`: TRL's GRPOTrainer with references and GRAO's objective.

TRL samples, scores, shuffles, splits, accumulates and launches as it does for GRPO, with two
differences: each group's reference, scored by the same rewards, is attached to one row of the group
through TRL's shuffle and split, and a micro-batch's loss is made in one pass at the LM head.

Suffixes: N prompts of all processes, G samples and K = G + 1 sequences of each, the reference
last; F reward functions; the rest as in `rows.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import pad, split_tensor_dict

from grao_fast.data.encoder import Encoder
from grao_fast.integrations.trl.config import GRAOTrainerConfig, objective_options
from grao_fast.integrations.trl.datasets import check_datasets
from grao_fast.integrations.trl.head import (
    embedding_rows_of,
    logit_transform_of,
    loss_of,
    scores_of,
)
from grao_fast.integrations.trl.options import check_kl_policy, check_options
from grao_fast.integrations.trl.references import (
    References,
    carriers,
    in_order,
    most_carriers,
    read_references,
    ride,
    to_score,
)
from grao_fast.integrations.trl.rows import (
    Rows,
    lay_out,
    model_inputs,
    row_terms,
    shuffle_groups,
)
from grao_fast.kernels import OffPolicy, PolicyLoss, Shaping, sequence_weights
from grao_fast.kernels.advantage import (
    advantages_and_terms,
    check_finite_rewards,
    tapered_rows,
)
from grao_fast.models.objective import answer_objectives, run_at_head
from grao_fast.models.policy import causal_lm_of
from grao_fast.system.errors import UserError
from grao_fast.system.visible import get_logger
from grao_fast.training.loss import clipped_ratios
from grao_fast.training.metrics import group_metrics

logger = get_logger(__name__)

PAPER = "Learning to Align, Aligning to Learn: A Unified Approach for Self-Optimized Alignment"


class GRAOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer, with the objective of arXiv 2508.07750.

    The reference is the dataset's column `reference`, `completion` or `chosen`: text, or messages
    that end in the assistant's turn; blank counts as absent, and is not scored. It gets an
    end-of-sequence token and is never cut. A pairwise reward compares it with itself, and should
    find a tie. Data for evaluation may have no references.

    If a step holds whole generation batches (`steps_per_generation` divides
    `gradient_accumulation_steps`), its gradient is GRAO's up to rounding. If a generation batch is
    spread over several steps, each gets a part of the sum: of whole groups if `num_generations`
    divides `per_device_train_batch_size`, else of single sequences, as TRL shuffles them.

    Args:
        model, reward_funcs, args, train_dataset, options: as for GRPOTrainer. `args` is a
            `GRAOTrainerConfig` or a plain `GRPOConfig`. Its `beta` is a KL penalty on samples, its
            `epsilon` clips the ratios of off-policy samples; references have neither.
        grao_beta, grao_lam, statistics, reference_advantage: as in `GRAOTrainerConfig`, for a plain
            `GRPOConfig`; None: its defaults.

    Metrics, besides TRL's of the samples: `objective/exploration`, `/imitation` and `/alignment`,
    `reference/reward`, `/advantage`, `/frac_negative`, `/logprob` and `/logprob_gap` (to the
    samples'), `frac_dead`. `loss` is -J, plus TRL's beta times `kl`; off policy, it has ratios in
    place of the samples' log-probs. The only metric of ratios is `clip_ratio/region_mean`.
    Log-probs and `entropy` are over sequences of non-zero weight.

    Raises:
        ValueError: an option, a model or a dataset is not supported; the message names it.
    """

    # For the model card that TRL writes.
    _name = "GRAO"
    _tag_names = ["trl", "grao"]  # noqa: RUF012
    _paper = {"title": PAPER, "id": "2508.07750"}  # noqa: RUF012

    def __init__(
        self,
        model: str | nn.Module,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        *,
        grao_beta: float | None = None,
        grao_lam: float | None = None,
        statistics: str | None = None,
        reference_advantage: str | None = None,
        **options: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = GRAOTrainerConfig(f"{name.split('/')[-1]}-GRAO")
        given = {
            "grao_beta": grao_beta,
            "grao_lam": grao_lam,
            "statistics": statistics,
            "reference_advantage": reference_advantage,
        }
        self._objective = objective_options(args, given)
        check_options(args, options)
        check_kl_policy(model, args, options)
        check_datasets(train_dataset, options.get("eval_dataset"))
        super().__init__(model, reward_funcs, args, train_dataset, **options)
        if self._is_vlm:
            raise UserError("GRAOTrainer is for text: pass a tokenizer as processing_class")
        if self.aux_loss_enabled:
            raise UserError(
                f"router_aux_loss_coef is {self.router_aux_loss_coef}, and GRAOTrainer has no "
                "auxiliary loss for a router: set router_aux_loss_coef=0.0"
            )
        self._embedding_rows = embedding_rows_of(self.model, self._tokenizer)
        self._samples: tuple[list, ...] = ()
        self._sample_rewards_SF: Tensor | None = None
        self._has_scored = False
        self._groups_are_whole = args.per_device_train_batch_size % args.num_generations == 0
        if not self._groups_are_whole:
            logger.info(
                "micro-batches of %d rows split groups of %d: set per_device_train_batch_size to a "
                "multiple of num_generations to keep them whole",
                args.per_device_train_batch_size, args.num_generations,
            )  # fmt: skip
        self._encoder = Encoder(
            self._tokenizer,
            self.eos_token_ids,
            continues=False,  # TRL opens another turn
            template_options={"chat_template": self.chat_template}
            | dict(self.chat_template_kwargs),
        )
        transform = logit_transform_of(
            self.model,
            self._tokenizer,
            autocast_dtype=torch.bfloat16 if self.args.bf16 else None,
            compare=self.accelerator.is_main_process,  # others may not have weights yet
        )
        self._logits = {
            "temperature": self.temperature,
            "logit_scale": transform.logit_scale,
            "softcap": transform.softcap,
        }
        for each in (self.model, self.ref_model):
            if each is not None:
                answer_objectives(causal_lm_of(self.accelerator.unwrap_model(each)))

    @property
    def _group_size(self) -> int:
        return self.num_generations if self.model.training else self.num_generations_eval

    # The rollout: TRL's, with references.

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

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        G, B, process = self._group_size, len(inputs), self.accelerator.process_index
        rows = [inputs[b] for b in carriers(process, B, G)]
        references = read_references(rows, self._encoder, self._embedding_rows)
        output = super()._generate_and_score_completions(inputs)
        reference_rewards_N = self._score_references(rows, references, B, G)
        samples_NG = self._total(self._sample_rewards_SF).view(-1, G)
        rewards_NK = torch.cat([samples_NG, reference_rewards_N[:, None]], dim=1)
        check_finite_rewards("rewards", rewards_NK)
        self._has_scored |= not bool(rewards_NK.isnan().all())
        if not self._has_scored:
            raise UserError(
                f"{', '.join(self.reward_func_names)} gave None or NaN for every sample and every "
                "reference of the first batch: return numbers, and None where there is none to give"
            )
        advantages_NK, terms_3NK = advantages_and_terms(rewards_NK, **self._objective)
        self._log_rollout(rewards_NK, advantages_NK)

        terms_B23, ids_B = ride(terms_3NK, references.token_ids, process, B)
        lengths_B = torch.tensor([len(ids) for ids in ids_B])
        lengths_B2 = torch.stack([output["completion_mask"].sum(1).cpu(), lengths_B], dim=1)
        reference_ids_BC = pad(
            ids_B, self._tokenizer.pad_token_id, pad_to_multiple_of=self.pad_to_multiple_of
        )
        output["reference_ids"] = reference_ids_BC.to(output["prompt_ids"].device)
        # On the CPU, where the loss reads them without a device sync.
        output |= {"terms_B23": terms_B23, "lengths_B2": lengths_B2}
        for name in ("importance_sampling_ratio", "tool_mask"):
            if name in output:
                output[name] = output[name].cpu()
        micro_batches = self.args.steps_per_generation * self.num_iterations
        if self.args.gradient_accumulation_steps % micro_batches == 0:
            output.pop("old_per_token_logps", None)  # for vLLM's correction; of this policy
        del output["advantages"]  # GRPO's
        return output

    def _score_references(
        self, rows: list[dict[str, Any]], references: References, B: int, G: int
    ) -> Tensor:
        """rewards_N of the references of all processes; this one scores those of `rows`."""
        processes = self.accelerator.num_processes
        present_C = torch.zeros(most_carriers(B, G), dtype=torch.bool)
        present_C[: len(rows)] = torch.tensor(references.present, dtype=torch.bool)
        present_PC = self.accelerator.gather(present_C.to(self.accelerator.device)).cpu()
        present_PC = present_PC.view(processes, -1)
        most = int(present_PC.sum(1).max())
        rewards_PR = torch.zeros(processes, 0, dtype=torch.float64)
        if most:
            scored = to_score(rows, references, self._samples, most)
            rewards_PR = self._total(super()._calculate_rewards(*scored)).view(processes, most)
            # Rewards may log to the completions table and metrics, which are of samples alone.
            self._pending_extra_logs.clear()
            self._pending_metrics.clear()
        return in_order(present_PC, rewards_PR, B, G)

    def _total(self, rewards_SF: Tensor) -> Tensor:
        """(S,) float64 on the CPU, weighted as TRL does; NaN where every function gave None."""
        rewards_SF = rewards_SF.double().cpu()
        total_S = (rewards_SF * self.reward_weights.double()).nansum(1)
        return total_S.where(~rewards_SF.isnan().all(1), torch.nan)

    def _log_rollout(self, rewards_NK: Tensor, advantages_NK: Tensor) -> None:
        of_weights = {k: v for k, v in self._objective.items() if k != "statistics"}
        weights_NK = sequence_weights(advantages_NK, **of_weights)
        self._record(group_metrics(rewards_NK, advantages_NK, weights_NK))
        # Replaces GRPO's advantages in the table of completions.
        table, advantages = self._logs["advantages"], advantages_NK[:, :-1].flatten().tolist()
        for _ in range(min(len(table), len(advantages))):
            table.pop()
        table.extend(advantages)

    # The loss.

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """-J of a micro-batch of B rows, which count as B / G prompts, plus TRL's KL term."""
        B, training = inputs["prompt_ids"].shape[0], self.model.training
        rows = lay_out(
            inputs, pad_token_id=self._tokenizer.pad_token_id, all_samples=self.beta != 0.0
        )
        terms_3T = row_terms(rows, inputs, num_prompts=B / self._group_size)
        old_T, ref_T = (
            rows.of_samples(inputs.get(name))
            for name in ("old_per_token_logps", "ref_per_token_logps")
        )
        off_policy = None
        if "old_per_token_logps" in inputs or self.beta != 0.0:
            # TRL's KL is a mean over a sample's tokens, then over all samples.
            kl_coef_T = self.beta / (B * rows.length_S[rows.sequence_T])
            off_policy = OffPolicy(
                old_logprob_T=old_T,
                ref_logprob_T=ref_T,
                kl_coef_T=kl_coef_T.where(rows.is_sample_T, 0.0),
                clip=(min(self.epsilon_low, 1.0), self.epsilon_high),  # a ratio is never negative
            )
        shaping = None
        if self._objective["reference_advantage"] == "tapered":
            shaping = Shaping("dft", tapered_rows(terms_3T, ~rows.is_sample_T))
        with self.accelerator.autocast():
            result = run_at_head(
                model,
                model_inputs(rows.input_ids_SL, rows.attention_mask_SL),
                rows.row_T.to(rows.input_ids_SL.device),
                loss_of(rows, terms_3T, self._logits, off_policy, shaping),
            )
        self._log_loss(rows, terms_3T.sum(0), old_T, result)
        return result.loss / (self.current_gradient_accumulation_steps if training else 1)

    def _log_loss(self, rows: Rows, weight_T: Tensor, old_T: Tensor, result: PolicyLoss) -> None:
        terms_4 = torch.stack([*result.terms_C, result.kl])
        exploration, imitation, alignment, kl = self.accelerator.reduce(terms_4, reduction="mean")
        mean_S = rows.sequence_means(result.logprob_T)
        clip = (self.epsilon_low, self.epsilon_high)
        values = [
            mean_S[: rows.samples],
            mean_S[rows.samples :],
            result.entropy_T[rows.is_sample_T.to(mean_S.device)],
            clipped_ratios(weight_T, result.logprob_T, old_T, clip),
        ]
        sums_42 = torch.stack([torch.stack([v.nansum(), (~v.isnan()).sum()]) for v in values])
        total_4, count_4 = self.accelerator.reduce(sums_42, reduction="sum").unbind(1)
        sample, reference, entropy, clipped = total_4 / count_4
        self._record(
            {
                "objective/exploration": exploration,
                "objective/imitation": imitation,
                "objective/alignment": alignment,
                "reference/logprob": reference,
                "reference/logprob_gap": reference - sample,
                "entropy": entropy,
                "clip_ratio/region_mean": clipped,
                "kl": kl / self.beta if self.beta else torch.tensor(torch.nan),
            }
        )

    def _record(self, metrics: dict[str, Tensor]) -> None:
        """Add metrics to TRL's log, which averages them; NaN is left out."""
        mode = "train" if self.model.training else "eval"
        for name, value in metrics.items():
            if not value.isnan():
                self._metrics[mode][name].append(float(value))

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **of_images: Any,
    ) -> tuple[Tensor, None, None]:
        """(B, logits_to_keep) log-probs as the loss makes them, 0 on padding.

        TRL calls this for old policies, and for the reference policy of its KL term.
        """
        logprobs = []
        size = batch_size or len(input_ids)
        for ids_BL, mask_BL in zip(input_ids.split(size), attention_mask.split(size), strict=True):
            with self.accelerator.autocast():
                logprobs.append(scores_of(model, ids_BL, mask_BL, logits_to_keep, self._logits))
        return torch.cat(logprobs), None, None
