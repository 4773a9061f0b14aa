"""From rewards to advantages to the coefficient of every token, before the LM head runs.

J is linear in the log-probs (arXiv 2508.07750, equations 2-4). With L(s) the mean log-prob of s,

    J = sum_i w_i L(o_i) + w_y L(y),    w_i = (1 + lam) A_i / G,
                                        w_y = beta A_y - (lam / G) sum_i A_i

and each of its three terms is linear too. So a row t of sequence s has three coefficients, one a
term; their sum c_t = w_s / (|s| * prompts) is all that the gradient needs.

Shapes: N prompts, G samples a prompt, K = G + 1 with the reference last, S = N * K sequences, T
rows. Terms are in the order exploration, imitation, alignment. NaN is an absent sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_choice, check_constant, check_floating, check_number

STATISTICS = ("group", "samples")
REFERENCE_ADVANTAGES = ("signed", "clip", "floor", "tapered")


def group_advantages(
    rewards_NK: Tensor, *, statistics: str = "group", reference_advantage: str = "floor"
) -> Tensor:
    """A = (r - mu) / sigma within each group.

    Args:
        rewards_NK: (N, K) floats, the reference's reward last; NaN where the sequence is absent.
        statistics: the rewards behind mu and the population's sigma: all present ones ("group"),
            or only the samples' ("samples", the literal Eq. 4).
        reference_advantage: "clip" to hold A_y at or above 0; else A_y keeps its sign, as "floor"
            is a matter of `sequence_weights`, and "tapered" of `linear_grao_loss`.

    Returns:
        (N, K), float64 for float64 rewards and float32 for others. NaN where absent; 0 throughout
        a group whose rewards in the statistics are all equal or all absent.

    Raises:
        ValueError: wrong shape, dtype or option, or an infinite reward in a CPU tensor.

    Source: arXiv 2508.07750, Eq. 4.
    """
    check_rewards("rewards_NK", rewards_NK)
    check_finite_rewards("rewards_NK", rewards_NK)
    check_choice("statistics", statistics, STATISTICS)
    check_choice("reference_advantage", reference_advantage, REFERENCE_ADVANTAGES)
    return _group_advantages(rewards_NK, statistics, reference_advantage)


def sequence_weights(
    advantages_NK: Tensor,
    *,
    beta: float = 0.5,
    lam: float = 0.6,
    reference_advantage: str = "floor",
) -> Tensor:
    """w_i and w_y of J = sum_i w_i L(o_i) + w_y L(y).

    Args:
        advantages_NK: (N, K) floats from `group_advantages`, NaN where absent.
        beta: weight of the imitation term.
        lam: weight of the alignment regulariser.
        reference_advantage: "floor" to hold w_y at or above 0; the others leave it as it is.

    Returns:
        (N, K), float64 for float64 advantages and float32 for others; 0 where absent. G is the
        number of samples present. Not divided by lengths or prompts.

    Raises:
        ValueError: wrong shape, dtype or option.

    Source: arXiv 2508.07750, Eq. 3, its terms collected.
    """
    check_rewards("advantages_NK", advantages_NK)
    check_finite_rewards("advantages_NK", advantages_NK)
    check_number("beta", beta)
    check_number("lam", lam)
    check_choice("reference_advantage", reference_advantage, REFERENCE_ADVANTAGES)
    return _sequence_terms(advantages_NK, beta, lam, reference_advantage).sum(0)


def advantages_and_terms(
    rewards_NK: Tensor,
    *,
    statistics: str,
    reference_advantage: str,
    beta: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Advantages (N, K) and every sequence's three coefficients (3, N, K).

    With `reference_advantage="floor"`, the three coefficients of a reference whose sum w_y is
    negative are all 0, so that the terms still sum to the loss.
    """
    advantages_NK = _group_advantages(rewards_NK, statistics, reference_advantage)
    return advantages_NK, _sequence_terms(advantages_NK, beta, lam, reference_advantage)


def tapered_rows(terms_3T: Tensor, is_reference_T: Tensor) -> Tensor:
    """(T,) bool: the rows that "tapered" shapes: those of references with w_y < 0."""
    return is_reference_T & (terms_3T.sum(0) < 0)


def sample_shares(rewards_NK: Tensor) -> Tensor:
    """1 / G for each of a prompt's G present samples; 0 for absent ones and references."""
    present_NK = ~rewards_NK.isnan()
    present_NK[:, -1] = False
    return present_NK / present_NK.sum(1, keepdim=True).clamp(min=1)


def row_coefficients(terms_CNK: Tensor, sequence_T: Tensor, num_prompts: float) -> Tensor:
    """Each row's coefficients (C, T), float32: its sequence's, divided by |s| * num_prompts.

    They are 0 for a row of no sequence. A row whose coefficients cancel has no gradient and is not
    computed; its coefficients are all set to 0, so that the terms still sum to the loss.
    """
    C, S = terms_CNK.shape[0], terms_CNK[0].numel()
    sequence_T = sequence_T.to(device=terms_CNK.device, dtype=torch.int64)
    # Lengths without atomics, and without the device sync of bincount.
    edges_S1 = torch.arange(S + 1, device=sequence_T.device)
    ends_S1 = torch.searchsorted(sequence_T.sort().values, edges_S1)
    length_S = ends_S1.diff().clamp(min=1)
    terms_CS = terms_CNK.reshape(C, S) / (length_S * num_prompts)
    terms_CT = terms_CS[:, sequence_T.clamp(min=0)].float()
    counts_T = (sequence_T >= 0) & (terms_CT.sum(0) != 0)
    return torch.where(counts_T, terms_CT, 0.0)


def check_rewards(name: str, rewards_NK: Tensor) -> None:
    if rewards_NK.ndim != 2 or rewards_NK.shape[1] < 2:
        raise ValueError(
            f"{name} must be (N, G + 1) with G >= 1 samples and the reference last, "
            f"got {tuple(rewards_NK.shape)}"
        )
    check_floating(name, rewards_NK)
    check_constant(name, rewards_NK)


def check_finite_rewards(name: str, rewards_NK: Tensor) -> None:
    """ValueError for an infinite reward on the CPU; elsewhere the host would have to wait."""
    if rewards_NK.device.type == "cpu" and rewards_NK.isinf().any():
        n, k = rewards_NK.isinf().nonzero()[0].tolist()
        raise ValueError(
            f"{name} must be finite, or NaN for an absent sequence; "
            f"got {rewards_NK[n, k].item()} for sequence {k} of prompt {n}"
        )


def _group_advantages(rewards_NK: Tensor, statistics: str, reference_advantage: str) -> Tensor:
    rewards_NK = _to_statistics_dtype(rewards_NK)
    present_NK = ~rewards_NK.isnan()
    basis_NK = present_NK.clone()
    if statistics == "samples":
        basis_NK[:, -1] = False
    count_N1 = basis_NK.sum(1, keepdim=True).clamp(min=1)
    mean_N1 = rewards_NK.where(basis_NK, 0).sum(1, keepdim=True) / count_N1
    high_N1 = rewards_NK.where(basis_NK, -torch.inf).amax(1, keepdim=True)
    low_N1 = rewards_NK.where(basis_NK, torch.inf).amin(1, keepdim=True)
    # In units of the range, so that no square under- or overflows.
    centred_NK = (rewards_NK - mean_N1) / (high_N1 - low_N1)
    variance_N1 = centred_NK.where(basis_NK, 0).square().sum(1, keepdim=True) / count_N1
    # high > low is false for a constant basis and for an empty one (-inf > inf).
    advantages_NK = torch.where(high_N1 > low_N1, centred_NK / variance_N1.sqrt(), 0)
    if reference_advantage == "clip":
        advantages_NK[:, -1].clamp_(min=0)
    return advantages_NK.where(present_NK, torch.nan)


def _sequence_terms(
    advantages_NK: Tensor, beta: float, lam: float, reference_advantage: str
) -> Tensor:
    advantages_NK = _to_statistics_dtype(advantages_NK)
    present_NK = ~advantages_NK.isnan()
    advantages_NK = advantages_NK.nan_to_num(0)
    samples_NG = advantages_NK[:, :-1]
    reference_N = advantages_NK[:, -1]
    count_N = present_NK[:, :-1].sum(1).clamp(min=1)
    terms_3NK = advantages_NK.new_zeros(3, *advantages_NK.shape)
    terms_3NK[0, :, :-1] = samples_NG / count_N[:, None]
    terms_3NK[1, :, -1] = beta * reference_N
    terms_3NK[2, :, :-1] = lam * terms_3NK[0, :, :-1]
    terms_3NK[2, :, -1] = -lam * samples_NG.sum(1) / count_N
    if reference_advantage == "floor":
        reference_3N = terms_3NK[:, :, -1]
        terms_3NK[:, :, -1] = reference_3N.where(reference_3N.sum(0) > 0, 0)
    return terms_3NK.where(present_NK, 0)


def _to_statistics_dtype(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
