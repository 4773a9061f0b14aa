"""TRL's micro-batches, samples and attached references, as rows for one pass.

Suffixes: B rows of TRL's micro-batch, 2 for the sample of a row and its attached reference,
3 for the terms of the objective (exploration, imitation, alignment), S sequences that are
computed, P, C and L columns (prompt, what follows it, both), T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Sequences of one forward pass, samples first, and the tokens that the head predicts.

    input_ids_SL, attention_mask_SL: int64, on the device of TRL's batch.
    samples: how many of the S sequences are samples; the rest are references.
    source_S: int64 on the CPU, the row of the micro-batch that each sequence is in.
    length_S: int64 on the CPU, tokens of each sequence that enter the loss.
    sequence_T, token_T: int64 on the CPU, the sequence of each of them, and its place behind the
        prompt.
    """

    input_ids_SL: Tensor
    attention_mask_SL: Tensor
    prompt_columns: int
    samples: int
    source_S: Tensor
    length_S: Tensor
    sequence_T: Tensor
    token_T: Tensor

    @property
    def column_T(self) -> Tensor:
        """The column of each token that enters the loss."""
        return self.prompt_columns + self.token_T

    @property
    def target_T(self) -> Tensor:
        return self.input_ids_SL[self.sequence_T, self.column_T]

    @property
    def is_sample_T(self) -> Tensor:
        return self.sequence_T < self.samples

    def of_samples(self, values_BC: Tensor | None) -> Tensor:
        """(T,) of TRL's per-token values of samples; NaN for references, or without values."""
        if values_BC is None:
            return torch.full(self.token_T.shape, torch.nan, device=self.input_ids_SL.device)
        column_T = self.token_T.clamp(max=values_BC.shape[1] - 1)  # references may be longer
        values_T = values_BC[self.source_S[self.sequence_T], column_T]
        return values_T.where(self.is_sample_T.to(values_T.device), torch.nan)

    def sequence_means(self, logprob_T: Tensor) -> Tensor:
        """(S,) mean log-prob of each sequence over computed tokens; NaN if there are none."""
        sequence_T = self.sequence_T.to(logprob_T.device)
        sums_2S = logprob_T.new_zeros(2, len(self.source_S))
        sums_2S[0].index_add_(0, sequence_T, logprob_T.nan_to_num())
        sums_2S[1].index_add_(0, sequence_T, (~logprob_T.isnan()).to(logprob_T.dtype))
        return sums_2S[0] / sums_2S[1]


def shuffle_groups(batch: Mapping[str, Any], G: int) -> dict[str, Any]:
    """A generation batch of whole groups of G rows, the groups in random order."""
    B = len(batch["prompt_ids"])
    row_B = torch.arange(B).view(-1, G)[torch.randperm(B // G)].flatten()
    return {
        name: value[row_B] if isinstance(value, Tensor) and value.dim() else value
        for name, value in batch.items()
    }


def rows_of(batch: Mapping[str, Tensor], *, pad_token_id: int, all_samples: bool) -> Rows:
    """The sequences of a micro-batch that enter the objective or, with `all_samples`, the KL.

    batch: TRL's prompt_ids, prompt_mask and completion_ids; and reference_ids (B, C'), and on the
        CPU lengths_B2 and terms_B23, 0 without a reference, and reference_mask (B, C'), 0 for
        tokens that are not learned; and there, if tools or an environment wrote some of the
        samples' tokens, tool_mask (B, C), 0 for these. A sequence whose terms are all 0 is left
        out. If none is left, the first row is computed all the same, since the other processes
        would wait for this one's backward pass.
    """
    lengths_B2, terms_B23 = batch["lengths_B2"], batch["terms_B23"]
    live_B2 = (terms_B23.sum(2) != 0) & (lengths_B2 > 0)
    if all_samples:
        live_B2[:, 0] = lengths_B2[:, 0] > 0
    samples, references = live_B2[:, 0].nonzero()[:, 0], live_B2[:, 1].nonzero()[:, 0]
    length_S = torch.cat([lengths_B2[samples, 0], lengths_B2[references, 1]])
    if not length_S.numel():
        samples, length_S = torch.tensor([0]), torch.tensor([0])
    source_S = torch.cat([samples, references])

    prompt_ids_BP, device = batch["prompt_ids"], batch["prompt_ids"].device
    sample_ids_BC, reference_ids_BC = batch["completion_ids"], batch["reference_ids"]
    C = max(sample_ids_BC.shape[1], reference_ids_BC.shape[1])
    ids_SC = prompt_ids_BP.new_full((len(source_S), C), pad_token_id)
    ids_SC[: len(samples), : sample_ids_BC.shape[1]] = sample_ids_BC[samples]
    ids_SC[len(samples) :, : reference_ids_BC.shape[1]] = reference_ids_BC[references]
    mask_SC = torch.arange(C) < length_S[:, None]
    scored_SC = mask_SC.clone()
    if "tool_mask" in batch:
        scored_SC[: len(samples), : sample_ids_BC.shape[1]] &= batch["tool_mask"][samples].bool()
    learned_SC = batch["reference_mask"][references].bool()
    scored_SC[len(samples) :, : reference_ids_BC.shape[1]] &= learned_SC
    sequence_T, token_T = scored_SC.nonzero().unbind(1)
    return Rows(
        input_ids_SL=torch.cat([prompt_ids_BP[source_S], ids_SC], dim=1),
        attention_mask_SL=torch.cat([batch["prompt_mask"][source_S], mask_SC.to(device)], dim=1),
        prompt_columns=prompt_ids_BP.shape[1],
        samples=len(samples),
        source_S=source_S,
        length_S=scored_SC.sum(1),
        sequence_T=sequence_T,
        token_T=token_T,
    )


def row_terms(rows: Rows, batch: Mapping[str, Tensor], *, num_prompts: float) -> Tensor:
    """terms_3T: the coefficient of each token's log-prob in each of the objective's terms.

    batch: as in `rows_of`; importance_sampling_ratio (B, C) or (B, 1), if TRL gives one, is a
        factor of the samples' tokens.
    """
    kind_S = (torch.arange(len(rows.source_S)) >= rows.samples).long()
    terms_S3 = batch["terms_B23"][rows.source_S, kind_S]
    terms_S3 = terms_S3 / (rows.length_S.clamp(min=1) * num_prompts)[:, None]
    terms_3T = terms_S3[rows.sequence_T].T
    if "importance_sampling_ratio" in batch:
        ratio_T = rows.of_samples(batch["importance_sampling_ratio"])
        terms_3T = terms_3T * ratio_T.nan_to_num(1.0)  # 1 for references
    # Rows whose terms cancel are not computed; their terms are zeroed, so terms sum to the loss.
    return terms_3T.where(terms_3T.sum(0) != 0, 0.0).float()
