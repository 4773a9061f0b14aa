"""Forward passes over sequences that TRL has padded: a row each, or one row with shared prompts.

Suffixes: S sequences of L columns, of which P are the prompt's, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grao_fast.data.packing import Segment
from grao_fast.kernels.devices import to_device


@dataclass(frozen=True)
class Layout:
    """One forward pass.

    inputs: arguments of the model's forward. Positions count from each prompt's first token, as in
        `generate`.
    place_SL: int64 on the CPU, where the flattened pass computes each column of each sequence;
        0 for padding that it leaves out.
    """

    inputs: dict[str, Any]
    place_SL: Tensor

    def before(self, sequence_T: Tensor, column_T: Tensor) -> Tensor:
        """Places whose hidden states predict the tokens in these columns, on the device."""
        place_T = self.place_SL[sequence_T.cpu(), column_T.cpu() - 1]
        return to_device(place_T, self.inputs["input_ids"].device)


def lay_out(
    input_ids_SL: Tensor, attention_mask_SL: Tensor, prompt_columns: int, *, share_prefix: bool
) -> Layout:
    """A pass over prompts padded on the left, with continuations padded on the right.

    share_prefix: compute equal prompts once; the pass needs an attention of `choose_attention`.
    """
    position_SL = (attention_mask_SL.cumsum(1) - 1).clamp(min=0)
    if share_prefix:
        return _packed(input_ids_SL, attention_mask_SL, position_SL, prompt_columns)
    inputs = {
        "input_ids": input_ids_SL,
        "attention_mask": attention_mask_SL,
        "position_ids": position_SL,
    }
    return Layout(inputs, torch.arange(input_ids_SL.numel()).view(input_ids_SL.shape))


def _packed(input_ids_SL: Tensor, attention_mask_SL: Tensor, position_SL: Tensor, P: int) -> Layout:
    """One row without padding: each prompt, then its continuations."""
    L = input_ids_SL.shape[1]
    mask_SL = attention_mask_SL.cpu().bool()
    length_S = mask_SL[:, P:].sum(1).tolist()
    taken: list[Tensor] = []  # places in the flattened (S, L) rows, in the order of the pass
    segments: list[Segment] = []
    place_SL = torch.zeros_like(mask_SL, dtype=torch.int64)
    start = 0
    for sequences in _of_equal_prompts(input_ids_SL[:, :P].cpu(), mask_SL[:, :P]):
        first, prompt = sequences[0], int(mask_SL[sequences[0], :P].sum())
        taken.append(first * L + torch.arange(P - prompt, P))
        place_SL[sequences, P - prompt : P] = start + torch.arange(prompt)
        stop = start + prompt
        present = [s for s in sequences if length_S[s]]
        for s in present:
            taken.append(s * L + torch.arange(P, P + length_S[s]))
            place_SL[s, P : P + length_S[s]] = stop + torch.arange(length_S[s])
            stop += length_S[s]
        if not present:  # an attention needs a continuation: the prompt's last token again
            taken.append(torch.tensor([first * L + P - 1]))
            stop += 1
        lengths = tuple(length_S[s] for s in present) or (1,)
        segments.append(Segment(start, prompt, lengths))
        start = stop
    taken_T = to_device(torch.cat(taken), input_ids_SL.device)
    inputs = {
        "input_ids": input_ids_SL.flatten()[taken_T][None],
        "position_ids": position_SL.flatten()[taken_T][None],
        "segments": tuple(segments),
    }
    return Layout(inputs, place_SL)


def _of_equal_prompts(prompt_ids_SP: Tensor, mask_SP: Tensor) -> list[list[int]]:
    """Indices of sequences, those with the same prompt together."""
    members: dict[tuple[int, ...], list[int]] = {}
    for s, (ids_P, mask_P) in enumerate(zip(prompt_ids_SP, mask_SP, strict=True)):
        members.setdefault(tuple(ids_P[mask_P].tolist()), []).append(s)
    return list(members.values())
