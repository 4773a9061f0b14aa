"""`GRAOTrainer`: TRL's GRPOTrainer with references and GRAO's objective.

TRL samples, scores, shuffles, splits, accumulates and launches as it does for GRPO, with two
differences: each group's reference, scored by the same rewards, is attached to one row of the group
through TRL's shuffle and split (`rollout.py`), and a micro-batch's loss is made in one pass at the
LM head (here).

Suffixes: as in `rows.py`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from trl.trainer.grpo_config import GRPOConfig

from grao_fast.integrations.trl.config import GRAOTrainerConfig, objective_of, own_options
from grao_fast.integrations.trl.datasets import check_datasets
from grao_fast.integrations.trl.head import loss_of, scores_of
from grao_fast.integrations.trl.layout import lay_out
from grao_fast.integrations.trl.options import check_kl_policy, check_options
from grao_fast.integrations.trl.policy import policy_of
from grao_fast.integrations.trl.rollout import RolloutTrainer
from grao_fast.integrations.trl.rows import Rows, row_terms, rows_of
from grao_fast.kernels import OffPolicy, PolicyLoss, Shaping
from grao_fast.kernels.advantage import tapered_rows
from grao_fast.models.attention import attending
from grao_fast.models.objective import answer_objectives, run_at_head
from grao_fast.models.policy import causal_lm_of
from grao_fast.system.errors import UserError
from grao_fast.training.loss import clipped_ratios

PAPER = "Learning to Align, Aligning to Learn: A Unified Approach for Self-Optimized Alignment"


class GRAOTrainer(RolloutTrainer):
    """TRL's GRPOTrainer, with the objective of arXiv 2508.07750.

    The reference is the dataset's column `reference`, `completion` or `chosen`: text, or messages
    that end in the assistant's turn; blank counts as absent, and is not scored. It gets an
    end-of-sequence token and is never cut. A pairwise reward compares it with itself, and should
    find a tie. Data for evaluation may have no references. Results of tools in a reference are read
    and not learned. It has been in no environment: where a reward needs `environments`, or a field
    of `rollout_func`, the column `reference_reward` holds the references' rewards.

    If a step holds whole generation batches (`steps_per_generation` divides
    `gradient_accumulation_steps`), its gradient is GRAO's up to rounding. If a generation batch is
    spread over several steps, each gets a part of the sum: of whole groups if `num_generations`
    divides `per_device_train_batch_size`, else of single sequences, as TRL shuffles them.

    Args:
        model, reward_funcs, args, train_dataset, options: as for GRPOTrainer. `args` is a
            `GRAOTrainerConfig` or a plain `GRPOConfig`. Its `beta` is a KL penalty on samples, its
            `epsilon` clips the ratios of off-policy samples; references have neither.
        grao_beta, grao_lam, statistics, reference_advantage, share_prefix: as in
            `GRAOTrainerConfig`, for a plain `GRPOConfig`; None: its defaults.

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
        share_prefix: bool | None = None,
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
            "share_prefix": share_prefix,
        }
        own = own_options(args, given)
        check_options(args, options)
        check_kl_policy(model, args, options)
        environment = options.get("environment_factory") is not None
        check_datasets(train_dataset, options.get("eval_dataset"), environment=environment)
        super().__init__(model, reward_funcs, args, train_dataset, **options)
        if self._is_vlm:
            raise UserError("GRAOTrainer is for text: pass a tokenizer as processing_class")
        if self.aux_loss_enabled:
            raise UserError(
                f"router_aux_loss_coef is {self.router_aux_loss_coef}, and GRAOTrainer has no "
                "auxiliary loss for a router: set router_aux_loss_coef=0.0"
            )
        if (
            getattr(self.model, "is_loaded_in_4bit", False)
            and self.accelerator.device.type == "cpu"
        ):
            raise UserError(
                "a model in 4 bits does not train on a CPU: bitsandbytes packs its weights for "
                "sampling, and passes no gradient through them from then on; use load_in_8bit=True"
            )
        self._begin_rollouts(objective_of(own))
        # Restores the model's own attention: after the backward pass, which recomputes layers, or,
        # where a loss was called outside of a step, before the next loss, step or rollout.
        self._until_backward = ExitStack()
        self._policy = policy_of(
            self.model,
            self._tokenizer,
            self._world,
            share_prefix=own["share_prefix"],
            autocast_dtype=torch.bfloat16 if self.args.bf16 else None,
            recompute=self.args.gradient_checkpointing
            or getattr(self._fsdp_plugin, "activation_checkpointing", False),
        )
        self._logits = {
            "temperature": self.temperature,
            "logit_scale": self._policy.transform.logit_scale,
            "softcap": self._policy.transform.softcap,
        }
        for each in (self.model, self.ref_model):
            if each is not None:
                answer_objectives(causal_lm_of(self.accelerator.unwrap_model(each)))

    def create_accelerator_and_postprocess(self) -> None:
        """Create Transformers' accelerator, under which FSDP2 casts no output of a model.

        With bf16, accelerate has it cast outputs to bfloat16. Here they are the loss and log-probs,
        whose differences are ratios and KL terms.
        """
        super().create_accelerator_and_postprocess()
        policy = getattr(self._fsdp_plugin, "mixed_precision_policy", None)
        if isinstance(policy, MixedPrecisionPolicy):
            self._fsdp_plugin.mixed_precision_policy = replace(policy, output_dtype=None)

    @property
    def _fsdp_plugin(self) -> Any:
        """accelerate's options of FSDP; None without FSDP."""
        return self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None

    def training_step(self, *arguments: Any, **named: Any) -> Tensor:
        """TRL's step; the attention of its loss stays until the backward pass is over."""
        with self._until_backward:
            return super().training_step(*arguments, **named)

    def prediction_step(self, *arguments: Any, **named: Any) -> tuple:
        """TRL's step of evaluation."""
        with self._until_backward:
            return super().prediction_step(*arguments, **named)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._until_backward.close()
        return super()._generate_and_score_completions(inputs)

    def _attending(self, model: nn.Module) -> AbstractContextManager[None]:
        """Run `model`, which may be the reference policy, with the attention of this policy."""
        if self._policy.attention is None:
            return nullcontext()
        causal_lm = causal_lm_of(self.accelerator.unwrap_model(model))
        return attending(causal_lm, self._policy.attention)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """-J of a micro-batch of B rows, which count as B / G prompts, plus TRL's KL term."""
        B, training = inputs["prompt_ids"].shape[0], self.model.training
        rows = rows_of(
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
                kl_times_ratio=self.beta != 0.0 and self.args.use_bias_correction_kl,
            )
        shaping = None
        if self._objective["reference_advantage"] == "tapered":
            shaping = Shaping("dft", tapered_rows(terms_3T, ~rows.is_sample_T))
        layout = lay_out(
            rows.input_ids_SL,
            rows.attention_mask_SL,
            rows.prompt_columns,
            share_prefix=self._policy.share_prefix,
        )
        self._until_backward.close()
        self._until_backward.enter_context(self._attending(model))
        with self.accelerator.autocast():
            result = run_at_head(
                model,
                layout.inputs,
                layout.before(rows.sequence_T, rows.column_T),
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
        share_prefix, size = self._policy.share_prefix, batch_size or len(input_ids)
        batches = zip(input_ids.split(size), attention_mask.split(size), strict=True)
        with self._attending(model):
            for ids_BL, mask_BL in batches:
                ids = ids_BL, mask_BL, logits_to_keep
                with self.accelerator.autocast():
                    found = scores_of(model, *ids, self._logits, share_prefix=share_prefix)
                logprobs.append(found)
        return torch.cat(logprobs), None, None
