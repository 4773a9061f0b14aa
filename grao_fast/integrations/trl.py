"""GRAO inside TRL: `GRAOTrainer` is TRL's GRPOTrainer with references and GRAO's objective.

    from grao_fast.integrations.trl import GRAOTrainer

TRL samples, scores, shuffles, splits, accumulates and launches as it does for GRPO. What differs:
each group's reference, scored by the same rewards, rides on one row of the group through TRL's
shuffle and split, and a micro-batch's loss is made in one pass at the LM head.

Suffixes: N prompts of all processes, G samples and K = G + 1 sequences of each, the reference
last; F reward functions; the rest as in `trl_rows.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import pad

from grao_fast.data import REFERENCE_COLUMNS
from grao_fast.encoding import encode_references, end_of_turn
from grao_fast.fields import read_reference
from grao_fast.head import LogitTransform, check_head
from grao_fast.integrations.trl_rows import Rows, lay_out, model_inputs, row_terms
from grao_fast.kernels import linear_logprobs
from grao_fast.kernels.advantage import (
    REFERENCE_ADVANTAGES,
    STATISTICS,
    advantages_and_terms,
    check_finite_rewards,
)
from grao_fast.kernels.checks import check_choice, check_number, choose_backend, logit_transform
from grao_fast.kernels.linear_ce import WeightedTerms, weighted_terms
from grao_fast.kernels.vocab_parallel import local_parts
from grao_fast.parity import check_parity
from grao_fast.policy import Policy

# Options of GRPOConfig that GRAO's objective leaves no room for, or that are not written here.
_ONLY = {
    "loss_type": "grpo",  # a sequence counts by its mean log-prob, a step by its prompts
    "scale_rewards": "group",
    "multi_objective_aggregation": "sum_then_normalize",
    "importance_sampling_level": "token",
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "delta": None,
    "off_policy_mask_threshold": None,
    "cast_lm_head_to_fp32": False,  # the logits are summed in float32 as it is
    "torch_compile": False,
    "remove_unused_columns": False,  # the reference is in one of them
}


class GRAOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer, with the objective of arXiv 2508.07750.

    The reference is the dataset's column `reference`, `completion` or `chosen`: text, or messages
    that end in the assistant's turn; blank counts as absent. It gets an end-of-sequence token and
    is never cut. A pairwise reward compares it with itself, and should find a tie.

    Where a step holds whole generation batches (`steps_per_generation` divides
    `gradient_accumulation_steps`), its gradient is GRAO's to rounding; where a generation batch is
    spread over several steps, each has the part of the sum that TRL's shuffle dealt it.

    Args:
        model, reward_funcs, args, train_dataset, and by name all others: GRPOTrainer's. `args`
            needs loss_type="grpo". Its `beta` is a KL penalty on samples, its `epsilon` clips the
            ratios of samples where they are off policy; a reference has neither.
        grao_beta, grao_lam: weights of imitation and of the alignment regulariser.
        statistics, reference_advantage: as in `grao_fast.kernels.group_advantages`.

    Metrics, beside TRL's of the samples: `objective/exploration`, `/imitation` and `/alignment`,
    `reference/reward`, `/advantage`, `/frac_negative`, `/logprob` and `/logprob_gap` (to the
    samples'), `frac_dead`. `loss` is -J, plus TRL's beta times `kl`. Of ratios there is
    `clip_ratio/region_mean` alone. Log-probs and `entropy` are over sequences of some weight.

    Raises:
        ValueError: an option, a model or a dataset that does not fit, by name.
    """

    _tag_names = ["trl", "grao"]  # noqa: RUF012
    _name = "GRAO"
    _paper = {  # noqa: RUF012  TRL reads it for the model card
        "title": "Group Relative Alignment Optimization",
        "id": "2508.07750",
        "citation": "@article{wang2025grao, eprint={arXiv:2508.07750}, year={2025}}",
    }

    def __init__(
        self,
        model: str | nn.Module,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        *,
        grao_beta: float = 0.5,
        grao_lam: float = 0.6,
        statistics: str = "group",
        reference_advantage: str = "signed",
        **options: Any,
    ) -> None:
        check_number("grao_beta", grao_beta)
        check_number("grao_lam", grao_lam)
        check_choice("statistics", statistics, STATISTICS)
        check_choice("reference_advantage", reference_advantage, REFERENCE_ADVANTAGES)
        _check_options(args, options)
        columns = getattr(train_dataset, "column_names", None)
        if columns is not None:
            _reference_column(columns)
        self._objective = {
            "statistics": statistics,
            "reference_advantage": reference_advantage,
            "beta": grao_beta,
            "lam": grao_lam,
        }
        super().__init__(model, reward_funcs, args, train_dataset, **options)
        if self._is_vlm:
            raise ValueError("GRAOTrainer is for text: pass a tokenizer as processing_class")
        if self.aux_loss_enabled:
            raise ValueError(
                f"router_aux_loss_coef is {self.router_aux_loss_coef}, and GRAOTrainer has no "
                "auxiliary loss for a router: set router_aux_loss_coef=0.0"
            )
        causal_lm = _causal_lm(self.model)
        check_head(causal_lm)
        transform = LogitTransform.from_config(causal_lm.config.get_text_config())
        self._logits = {
            "temperature": self.temperature,
            "logit_scale": transform.logit_scale,
            "softcap": transform.softcap,
        }
        self._sample_rewards_SF: Tensor | None = None
        if self.accelerator.is_main_process:  # a sharded model may have its weights there only
            self._check_parity(causal_lm, transform)
        for each in (self.model, self.ref_model):
            if each is not None:
                _answer_objectives(_causal_lm(self.accelerator.unwrap_model(each)))

    def _check_parity(self, causal_lm: PreTrainedModel, transform: LogitTransform) -> None:
        policy = Policy(
            model=self.model,
            causal_lm=causal_lm,
            tokenizer=self._tokenizer,
            eos_token_ids=frozenset(self.eos_token_ids),
            pad_token_id=self._tokenizer.pad_token_id,
            transform=transform,
            autocast_dtype=torch.bfloat16 if self.args.bf16 else None,
            share_prefix=False,
            attention=None,
            router=None,
            sampler=cast(Any, None),  # TRL samples
        )
        check_parity(policy, gradient=False)  # its layers run as they are

    @property
    def _group_size(self) -> int:
        return self.num_generations if self.model.training else self.num_generations_eval

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    # A rollout: TRL's, and the references beside it.

    def _calculate_rewards(self, *arguments: Any) -> Tensor:
        """TRL's rewards of the samples of all processes, (N * G, F), which it does not hand on."""
        self._sample_rewards_SF = super()._calculate_rewards(*arguments)
        return self._sample_rewards_SF

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if "tool_mask" in output:
            raise ValueError("rollout_func gave an env_mask, which GRAOTrainer does not know: "
                             "leave it out")  # fmt: skip
        G, B = self._group_size, len(inputs)
        before = self.accelerator.process_index * B  # rows of the processes before this one
        carriers = torch.tensor(_carriers(self.accelerator.process_index, B, G), dtype=torch.int64)

        reference_ids, reference_rewards_N = self._score_references(inputs, G)
        samples_NG = self._total(self._sample_rewards_SF).view(-1, G)
        rewards_NK = torch.cat([samples_NG, reference_rewards_N[:, None]], dim=1)
        check_finite_rewards("rewards", rewards_NK)
        advantages_NK, terms_3NK = advantages_and_terms(
            rewards_NK, backend="torch", **self._objective
        )
        self._log_rollout(rewards_NK, advantages_NK)

        terms_B23 = torch.zeros(B, 2, 3, dtype=torch.float64)
        terms_B23[:, 0] = terms_3NK[:, :, :-1].flatten(1)[:, before : before + B].T
        terms_B23[carriers, 1] = terms_3NK[:, (before + carriers) // G, -1].T
        lengths_B2 = torch.zeros(B, 2, dtype=torch.int64)
        lengths_B2[:, 0] = output["completion_mask"].sum(1)
        ids_B = [torch.tensor([], dtype=torch.int64)] * B
        for b, ids in zip(carriers.tolist(), reference_ids, strict=True):
            ids_B[b] = torch.tensor(ids, dtype=torch.int64)
            lengths_B2[b, 1] = len(ids)
        reference_ids_BC = pad(
            ids_B, self._tokenizer.pad_token_id, pad_to_multiple_of=self.pad_to_multiple_of
        )
        output["reference_ids"] = reference_ids_BC.to(output["prompt_ids"].device)
        # On the CPU, where the loss reads them without waiting for a device.
        output |= {"terms_B23": terms_B23, "lengths_B2": lengths_B2}
        if "importance_sampling_ratio" in output:
            output["importance_sampling_ratio"] = output["importance_sampling_ratio"].cpu()
        if self.args.gradient_accumulation_steps % self._updates_per_rollout == 0:
            output.pop("old_per_token_logps", None)  # vLLM's correction made it: it is this policy
        del output["advantages"]  # GRPO's
        return output

    @property
    def _updates_per_rollout(self) -> int:
        """Micro-batches that are computed on one rollout, repetitions counted."""
        return self.args.steps_per_generation * self.num_iterations

    def _score_references(
        self, inputs: list[dict[str, Any]], G: int
    ) -> tuple[list[list[int]], Tensor]:
        """Token ids of the references of this process's carriers; rewards_N of all processes'.

        Every process scores as many rows, as TRL's gathering needs: one with fewer groups fills up
        with its first row, to no effect.
        """
        B, process = len(inputs), self.accelerator.process_index
        mine = _carriers(process, B, G)
        most = -(-B // G)
        rows = [inputs[b] for b in [*mine, *[0] * most][:most]]
        column = _reference_column(rows[0])
        texts = [read_reference(row[column], f"column `{column}`") for row in rows]
        prompts = [row["prompt"] for row in rows]
        end_of_text = self._tokenizer.eos_token_id
        end_of_chat = end_of_turn(self._tokenizer, self.eos_token_ids)
        ids = encode_references(
            texts,
            self._tokenizer,
            end_ids=[end_of_text if isinstance(p, str) else end_of_chat for p in prompts],
            max_length=None,
        )
        completions = [
            text or ""
            if isinstance(prompt, str)
            else [{"role": "assistant", "content": text or ""}]
            for text, prompt in zip(texts, prompts, strict=True)
        ]
        rewards_S = self._total(super()._calculate_rewards(rows, prompts, completions, ids))
        # What a reward has to say to the table of completions and to the metrics is of samples.
        self._pending_extra_logs.clear()
        self._pending_metrics.clear()
        absent = torch.tensor([text is None for text in texts], device=self.accelerator.device)
        rewards_S[self.accelerator.gather(absent).cpu()] = torch.nan
        of_groups = [
            other * most + place
            for other in range(self.accelerator.num_processes)
            for place in range(len(_carriers(other, B, G)))
        ]
        return ids[: len(mine)], rewards_S[of_groups]

    def _total(self, rewards_SF: Tensor) -> Tensor:
        """(S,) float64 on the CPU, weighted as TRL does; NaN where every function gave None."""
        rewards_SF = rewards_SF.double().cpu()
        total_S = (rewards_SF * self.reward_weights.double()).nansum(1)
        return total_S.where(~rewards_SF.isnan().all(1), torch.nan)

    def _log_rollout(self, rewards_NK: Tensor, advantages_NK: Tensor) -> None:
        reference_N = advantages_NK[:, -1]
        present_N = reference_N[~reference_N.isnan()]
        self._record(
            {
                "frac_dead": (advantages_NK.nan_to_num() == 0).all(1).double().mean(),
                "reference/reward": rewards_NK[:, -1].nanmean(),
                "reference/advantage": reference_N.nanmean(),
                "reference/frac_negative": (present_N < 0).double().mean(),
            }
        )
        # The table of completions has GRPO's.
        table, advantages = self._logs["advantages"], advantages_NK[:, :-1].flatten().tolist()
        for _ in range(min(len(table), len(advantages))):
            table.pop()
        table.extend(advantages)

    def _record(self, metrics: dict[str, Tensor]) -> None:
        for name, value in metrics.items():
            self._metrics[self._mode][name].append(float(value))

    # The loss.

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """-J of a micro-batch of B rows, which stand for B / G prompts, and TRL's KL term."""
        B = inputs["prompt_ids"].shape[0]
        rows = lay_out(
            inputs, pad_token_id=self._tokenizer.pad_token_id, all_samples=self.beta != 0.0
        )
        terms_3T = row_terms(rows, inputs, num_prompts=B / self._group_size)
        old_T, off_policy = None, {}
        if "old_per_token_logps" in inputs or self.beta != 0.0:
            old_T, off_policy = self._off_policy(rows, inputs, B)

        def objective(causal_lm: PreTrainedModel, hidden_SLD: Tensor) -> WeightedTerms:
            head = causal_lm.get_output_embeddings()
            row_T = rows.row_T.to(hidden_SLD.device)
            hidden_TD = hidden_SLD.flatten(0, 1).index_select(0, row_T)
            return weighted_terms(
                local_parts(hidden_TD, head.weight, head.bias, None),
                rows.target_T,
                terms_3T,
                logit_transform(**self._logits),
                None,
                choose_backend(None, hidden_TD.device),
                None,
                entropy=True,
                **off_policy,
            )

        with self.accelerator.autocast():
            result = model(**rows.model_inputs(), objective=objective)
        self._log_loss(rows, terms_3T, old_T, result)
        divisor = self.current_gradient_accumulation_steps if self._mode == "train" else 1
        return result.loss / divisor

    def _off_policy(
        self, rows: Rows, inputs: dict[str, Any], B: int
    ) -> tuple[Tensor, dict[str, Any]]:
        """Old log-probs of the tokens, NaN where there is none, and what the pass is told."""
        none_T = torch.full(rows.row_T.shape, torch.nan, device=rows.input_ids_SL.device)
        old_T = ref_T = none_T
        if "old_per_token_logps" in inputs:
            old_T = rows.of_samples(inputs["old_per_token_logps"], absent=torch.nan)
        if self.beta != 0.0:
            ref_T = rows.of_samples(inputs["ref_per_token_logps"], absent=torch.nan)
        share_T = self.beta / (B * rows.length_S[rows.sequence_T])  # of the mean of means
        return old_T, {
            "policy_3T": torch.stack([old_T, none_T, ref_T]),
            "kl_coef_T": share_T.where(rows.is_sample_T, 0.0),
            "bounds": (1 - self.epsilon_low, 1 + self.epsilon_high, torch.inf),
        }

    def _log_loss(
        self, rows: Rows, terms_3T: Tensor, old_T: Tensor | None, result: WeightedTerms
    ) -> None:
        parts_4 = torch.stack([*result.parts_C, result.kl])
        exploration, imitation, alignment, kl = self.accelerator.reduce(parts_4, reduction="mean")
        mean_S = rows.sequence_means(result.logprob_T)
        is_sample_T = rows.is_sample_T.to(mean_S.device)
        values = [
            mean_S[: rows.samples],
            mean_S[rows.samples :],
            result.entropy_T[is_sample_T],
            rows.held(
                terms_3T, result.logprob_T, old_T, clip=(self.epsilon_low, self.epsilon_high)
            ),
        ]
        sums_42 = torch.stack([torch.stack([v.nansum(), (~v.isnan()).sum()]) for v in values])
        total_4, count_4 = self.accelerator.reduce(sums_42, reduction="sum").unbind(1)
        sample, reference, entropy, held = total_4 / count_4  # NaN, which TRL's log leaves out
        metrics = {
            "objective/exploration": exploration,
            "objective/imitation": imitation,
            "objective/alignment": alignment,
            "reference/logprob": reference,
            "reference/logprob_gap": reference - sample,
            "entropy": entropy,
        }
        if old_T is not None:
            metrics["clip_ratio/region_mean"] = held
        if self.beta != 0.0:
            metrics["kl"] = kl / self.beta
        self._record(metrics)

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **of_images: Any,
    ) -> tuple[Tensor, None, None]:
        """Log-probs (B, logits_to_keep) as the loss makes them, 0 on padding, for scoring.

        TRL asks for them of an old policy and of the one that its KL term holds to.
        """

        def objective(causal_lm: PreTrainedModel, hidden_BLD: Tensor) -> Tensor:
            head = causal_lm.get_output_embeddings()
            counts_BC = mask_BL[:, -logits_to_keep:].bool()
            logprob_BC = hidden_BLD.new_zeros(counts_BC.shape, dtype=torch.float32)
            logprob_BC[counts_BC] = linear_logprobs(
                hidden_BLD[:, -logits_to_keep - 1 : -1][counts_BC],
                head.weight,
                ids_BL[:, -logits_to_keep:][counts_BC],
                bias_V=head.bias,
                **self._logits,
            ).logprob_T
            return logprob_BC

        logprobs = []
        size = batch_size or len(input_ids)
        for ids_BL, mask_BL in zip(input_ids.split(size), attention_mask.split(size), strict=True):
            with self.accelerator.autocast():
                logprobs.append(model(**model_inputs(ids_BL, mask_BL), objective=objective))
        return torch.cat(logprobs), None, None


def _carriers(process: int, B: int, G: int) -> range:
    """The rows of a process that begin a group of G, where every process has B rows."""
    return range(-process * B % G, B, G)


def _check_options(args: GRPOConfig | None, options: dict[str, Any]) -> None:
    if args is None:
        raise ValueError('GRAOTrainer needs args=GRPOConfig(loss_type="grpo", ...)')
    for name, only in _ONLY.items():
        if getattr(args, name) != only:
            raise ValueError(
                f"{name}={getattr(args, name)!r} has no place in GRAO's objective as GRAOTrainer "
                f"computes it: set {name}={only!r}"
            )
    if args.beta != 0.0 and args.use_bias_correction_kl:
        raise ValueError(
            f"beta={args.beta} asks for a KL term, and use_bias_correction_kl=True for its product "
            "with the ratio, which is not written here: set use_bias_correction_kl=False"
        )
    if args.deepspeed is not None:
        raise ValueError("deepspeed is not supported by GRAOTrainer: use DDP or FSDP")
    for name in ("tools", "environment_factory"):
        if options.get(name):
            raise ValueError(f"{name} is not supported by GRAOTrainer: leave it out")
    peft_config = options.get("peft_config")
    if getattr(peft_config, "is_prompt_learning", False):
        raise ValueError(
            f"{type(peft_config).__name__} prepends virtual tokens, for which GRAOTrainer's rows "
            "leave no room: use a LoRA-like adapter"
        )


def _reference_column(columns: Iterable[str]) -> str:
    columns = list(columns)
    for name in REFERENCE_COLUMNS:
        if name in columns:
            return name
    raise ValueError(
        f"the dataset has no reference answers: it has {', '.join(columns)}; add a column "
        f"{', '.join(REFERENCE_COLUMNS[:-1])} or {REFERENCE_COLUMNS[-1]}"
    )


def _causal_lm(model: nn.Module) -> PreTrainedModel:
    """The Transformers model inside an adapter, or the model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _answer_objectives(causal_lm: PreTrainedModel) -> None:
    """Let `causal_lm(..., objective=f)` return f(causal_lm, last hidden states).

    f runs inside the forward pass, which DDP and FSDP watch, and where the head's weight is whole.
    Without it the forward pass is what it was.
    """
    without = causal_lm.forward

    @functools.wraps(without)  # `generate` reads the signature
    def forward(
        self: PreTrainedModel,
        *arguments: Any,
        objective: Callable[[PreTrainedModel, Tensor], Any] | None = None,
        **named: Any,
    ) -> Any:
        if objective is None:
            return without(*arguments, **named)
        named = {name: value for name, value in named.items() if value is not None}  # of PEFT
        output = self.base_model(*arguments, **named, use_cache=False)
        return objective(self, output.last_hidden_state)

    causal_lm.forward = MethodType(forward, causal_lm)
