"""Packing: every target stands behind its own predecessor, and dead sequences cost nothing."""

from __future__ import annotations

import dataclasses

import torch

from grao_fast.data.packing import Group, MicroBatch, Size, pack, pad, split_by_tokens


def group(prompt: list[int], *sequences: list[int], live: list[bool] | None = None) -> Group:
    terms_CK = None if live is None else torch.tensor([live]).double()
    return Group(prompt, list(sequences), terms_CK)


GROUPS = [group([1, 2], [3, 4, 5], [6]), group([7], [8, 9], [10, 11, 12])]


def predicting(batch: MicroBatch) -> list[tuple[int, int]]:
    """(token in the predicting row, token predicted)"""
    tokens = batch.input_ids_BL.flatten()
    return list(zip(tokens[batch.row_T].tolist(), batch.target_T.tolist(), strict=True))


EXPECTED = [(2, 3), (3, 4), (4, 5), (2, 6), (7, 8), (8, 9), (7, 10), (10, 11), (11, 12)]


def test_pack_lays_every_prompt_out_once():
    batch = pack(GROUPS)
    assert batch.input_ids_BL.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]]
    assert batch.position_ids_BL.tolist() == [[0, 1, 2, 3, 4, 2, 0, 1, 2, 1, 2, 3]]
    assert [(s.start, s.prefix_length, s.suffix_lengths) for s in batch.segments] == [
        (0, 2, (3, 1)),
        (6, 1, (2, 3)),
    ]
    assert predicting(batch) == EXPECTED


def test_pad_gives_the_same_rows_in_the_same_order():
    batch = pad(GROUPS, pad_token_id=0)
    assert batch.input_ids_BL.shape == (4, 5)
    assert batch.attention_mask_BL.sum(1).tolist() == [5, 3, 3, 4]
    assert predicting(batch) == EXPECTED
    packed = pack(GROUPS)
    assert torch.equal(batch.target_T, packed.target_T)
    assert torch.equal(batch.sequence_T, packed.sequence_T)


def test_sequence_numbers_count_dead_and_absent_sequences():
    batch = pack([group([1], [2, 3], [4], [], live=[True, False, True]), group([5], [6], [7], [8])])
    assert batch.sequence_T.tolist() == [0, 0, 3, 4, 5]


def test_dead_groups_are_left_out_and_groups_stay_whole():
    dead = group([1] * 50, [2], [3], live=[False, False])
    parts = list(split_by_tokens([GROUPS[0], dead, GROUPS[1]], max_tokens=6))
    assert parts == [[GROUPS[0]], [GROUPS[1]]]
    assert list(split_by_tokens([GROUPS[0], dead, GROUPS[1]], max_tokens=12)) == [GROUPS]


def test_the_longest_group_comes_first_even_over_the_budget():
    long = group([1] * 9, [2])
    assert list(split_by_tokens([GROUPS[0], long], max_tokens=6)) == [[long], [GROUPS[0]]]


def test_the_budget_counts_the_tokens_of_the_forward_pass():
    """Padding included: one long row makes every row of its micro-batch as long."""
    groups = [group([1] * 30, [2] * 70, [3])] + [group([1] * 3, [2] * 2, [3]) for _ in range(20)]
    for share_prefix, lay_out in ((True, pack), (False, lambda part: pad(part, pad_token_id=0))):
        parts = list(split_by_tokens(groups, 220, share_prefix=share_prefix))
        assert sum(map(len, parts)) == len(groups)
        for part in parts:
            tokens = lay_out(part).input_ids_BL.numel()
            size = sum((each.size for each in part), start=Size(0, 0, 0))
            assert tokens == size.tokens(share_prefix=share_prefix)
            assert tokens <= 220


def test_the_samplers_logprobs_stand_beside_their_tokens():
    """In packed and padded rows alike; the reference has none, and what is dead takes its along."""
    groups = [
        dataclasses.replace(
            group([1], [2, 3], [4], [5, 6], live=[True, False, True]),
            sampler_logprobs=[[-0.2, -0.3], [-0.4]],
        ),
        dataclasses.replace(group([7], [8], [9, 10], [11]), sampler_logprobs=[[-0.8], [-0.9, -1]]),
    ]
    for batch in (pack(groups), pad(groups, pad_token_id=0)):
        assert batch.target_T.tolist() == [2, 3, 5, 6, 8, 9, 10, 11]
        expected = torch.tensor([-0.2, -0.3, torch.nan, torch.nan, -0.8, -0.9, -1, torch.nan])
        assert torch.equal(batch.sampler_logprob_T.nan_to_num(7), expected.nan_to_num(7))
    assert pack(GROUPS).sampler_logprob_T.isnan().all()
