"""Contenders: ours and every peer, each at its best and used as its documentation says.

All compute loss = -sum_t weight_t log p(target_t) of a Batch, differentiable in hidden_TD and
head_VD, but for those that cannot weigh tokens (`weighted=False`), whose labels say that they do
less: the mean of -log p over the rows that count. Peers that ignore rows by an index are given it
for rows of weight 0; the others compute those rows and multiply them by 0.

No peer has to be installed. `absence` says why one cannot run.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import shutil
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from batches import REFERENCE_ADVANTAGE, SEQUENCE_ROWS, Batch
from packaging.version import Version
from torch import Tensor

from grao_fast.kernels import linear_grao_loss

IGNORE = -100  # every peer's default


class Peer(NamedTuple):
    """A contender: `loss(batch)` is a 0-d tensor, `absence(batch)` why it cannot run, or None."""

    name: str
    label: str
    loss: Callable[[Batch], Tensor]
    absence: Callable[[Batch], str | None]
    weighted: bool = True


def _ours(workspace_mib: int | None) -> Callable[[Batch], Tensor]:
    options = {"reference_advantage": REFERENCE_ADVANTAGE, "workspace_mib": workspace_mib}
    return lambda batch: linear_grao_loss(*batch[:5], **options).loss


def _naive(batch: Batch) -> Tensor:
    return _naive_loss(batch.hidden_TD, batch.head_VD, batch.target_T, batch.weight_T)


def _naive_loss(hidden_TD: Tensor, head_VD: Tensor, target_T: Tensor, weight_T: Tensor) -> Tensor:
    logits_TV = hidden_TD @ head_VD.T
    return (weight_T * F.cross_entropy(logits_TV.float(), target_T, reduction="none")).sum()


@functools.cache
def _compiled_naive() -> Callable[..., Tensor]:
    return torch.compile(_naive_loss, dynamic=False)


def _torch_compile(batch: Batch) -> Tensor:
    arguments = batch.hidden_TD, batch.head_VD, batch.target_T, batch.weight_T
    return _compiled_naive()(*arguments)


def _torch_linear_ce(batch: Batch) -> Tensor:
    losses_T = F.linear_cross_entropy(
        batch.hidden_TD, batch.head_VD, _ignoring_dead(batch), reduction="none"
    )
    return (batch.weight_T * losses_T).sum()


def _torch_linear_ce_chunked(batch: Batch) -> Tensor:
    """Use chunks of 512 MiB of float32 logits, like ours: its default of a few rows is many times
    slower where V is much larger than D."""
    from torch.nn import LinearCrossEntropyOptions

    rows = min(batch.hidden_TD.shape[0], 512 * 2**20 // (4 * batch.head_VD.shape[0]))
    losses_T = F.linear_cross_entropy(
        batch.hidden_TD,
        batch.head_VD,
        _ignoring_dead(batch),
        reduction="none",
        options=LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None),
    )
    return (batch.weight_T * losses_T).sum()


def _trl(batch: Batch) -> Tensor:
    """Call it as TRL's chunked SFT loss does: in tiles of 32768 tokens of the vocabulary, and on
    CUDA for live rows only."""
    from trl.kernels import ChunkedLogProbFunction

    hidden_TD, target_T, weight_T = batch.hidden_TD, batch.target_T, batch.weight_T
    if hidden_TD.is_cuda:
        live_T = weight_T != 0
        hidden_TD, target_T, weight_T = hidden_TD[live_T], target_T[live_T], weight_T[live_T]
    logprob_T, *_ = ChunkedLogProbFunction.apply(
        hidden_TD, batch.head_VD, None, target_T, 1.0, 32768, None, 1.0, ()
    )
    return -(weight_T * logprob_T).sum()


def _liger_grpo(batch: Batch) -> Tensor:
    """Use CISPO, whose on-policy loss is -advantage log p, with one advantage a sequence.

    `chunk_size` counts sequences; one chunk is fastest, as the logits are chunked in any case.
    `compiled` would only compile the arithmetic on (S, R) log-probs.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    mask_SR = (batch.weight_T != 0).view(-1, SEQUENCE_ROWS)
    weight_SR = batch.weight_T.view(-1, SEQUENCE_ROWS)
    S = mask_SR.shape[0]
    loss_function = LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=False,
        use_ref_model=False,
        chunk_size=S,
        epsilon_high=5.0,
        loss_type="cispo",
    )
    loss, _ = loss_function(
        batch.hidden_TD.view(S, SEQUENCE_ROWS, -1),
        batch.head_VD,
        batch.target_T.view(S, SEQUENCE_ROWS),
        mask_SR.float(),
        weight_SR[:, -1] * mask_SR.sum(),  # prompt rows come first; the loss divides by live rows
    )
    return loss


def _liger_scaled_ce(batch: Batch) -> Tensor:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    losses_T = LigerFusedLinearScaledCrossEntropyFunction.apply(
        batch.hidden_TD, batch.head_VD, _ignoring_dead(batch)
    )
    return (batch.weight_T * losses_T).sum()


def _liger_flce(reduction: str) -> Callable[[Batch], Tensor]:
    def loss(batch: Batch) -> Tensor:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss_function = LigerFusedLinearCrossEntropyLoss(reduction=reduction)
        result = loss_function(batch.head_VD, batch.hidden_TD, _ignoring_dead(batch))
        return (batch.weight_T * result).sum() if reduction == "none" else result

    return loss


def _cce(implementation: str) -> Callable[[Batch], Tensor]:
    def loss(batch: Batch) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        losses_T = linear_cross_entropy(
            batch.hidden_TD,
            batch.head_VD,
            _ignoring_dead(batch),
            reduction="none",
            impl=implementation,
        )
        return (batch.weight_T * losses_T).sum()

    return loss


def _quack_weighted(batch: Batch) -> Tensor:
    from quack.linear_cross_entropy import linear_cross_entropy_func

    losses_T = linear_cross_entropy_func(
        batch.hidden_TD,
        batch.head_VD,
        None,
        _ignoring_dead(batch),
        reduction="none",
        inplace_backward=True,
    )
    return (batch.weight_T * losses_T).sum()


def _quack_mean(batch: Batch) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(
        batch.hidden_TD, batch.head_VD, _ignoring_dead(batch), reduction="mean"
    )


def _ignoring_dead(batch: Batch) -> Tensor:
    return batch.target_T.masked_fill(batch.weight_T == 0, IGNORE)


def _never(batch: Batch) -> None:
    return None


def _is_the_default(batch: Batch) -> str | None:
    return None if batch.hidden_TD.is_cuda else "a CPU's default workspace"


def _without_compiler(batch: Batch) -> str | None:
    if batch.hidden_TD.is_cuda or shutil.which("g++") or shutil.which("clang++"):
        return None
    return "torch.compile wants a C++ compiler: install g++"


def _without_torch_linear_ce(batch: Batch) -> str | None:
    if hasattr(F, "linear_cross_entropy"):
        return None
    return f"torch {torch.__version__} has no F.linear_cross_entropy: 2.13 has"


def _not_installed(distribution: str, minimum: str) -> str | None:
    """Return what to install if the distribution is missing or older than `minimum`."""
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed: pip install '{distribution}>={minimum}'"
    if Version(version) < Version(minimum):
        return f"{distribution} {version} is too old: pip install '{distribution}>={minimum}'"
    return None


def _without(distribution: str, minimum: str) -> Callable[[Batch], str | None]:
    return lambda batch: _not_installed(distribution, minimum)


def _without_cuda(distribution: str, minimum: str) -> Callable[[Batch], str | None]:
    def absence(batch: Batch) -> str | None:
        if not batch.hidden_TD.is_cuda:
            return "its kernels run on GPUs only"
        return _not_installed(distribution, minimum)

    return absence


def _without_cce_compile(batch: Batch) -> str | None:
    return _without_compiler(batch) or _not_installed("cut-cross-entropy", "25.1")


def _without_liger_scaled_ce(batch: Batch) -> str | None:
    """Return why it cannot run: on Hopper it needs CuTe kernels, elsewhere chunked PyTorch."""
    missing = _not_installed("liger-kernel", "0.8.5")
    if missing or not _is_hopper(batch):
        return missing
    if importlib.util.find_spec("cutlass") is None:
        return "its Hopper kernel wants CuTe: pip install 'nvidia-cutlass-dsl>=4.6'"
    if batch.hidden_TD.dtype != torch.bfloat16:
        return f"its Hopper kernel takes bfloat16, not {batch.hidden_TD.dtype}"
    return None


def _without_quack(batch: Batch) -> str | None:
    if not _is_hopper(batch):
        return "it is run on Hopper only"
    if batch.hidden_TD.dtype not in (torch.bfloat16, torch.float16):
        return f"its kernels take 16-bit operands, not {batch.hidden_TD.dtype}"
    return _not_installed("quack-kernels", "0.6")


def _is_hopper(batch: Batch) -> bool:
    device = batch.hidden_TD.device
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


_LIGER = ("liger-kernel", "0.8.5")
OURS = ("grao", "grao_512_mib", "grao_64_mib")
PEERS = {
    peer.name: peer
    for peer in (
        Peer("grao", "`linear_grao_loss`", _ours(None), _never),
        Peer("grao_512_mib", "`linear_grao_loss`, 512 MiB workspace", _ours(512), _is_the_default),
        Peer("grao_64_mib", "`linear_grao_loss`, 64 MiB workspace", _ours(64), _never),
        Peer("naive", "naive: full logits, `F.cross_entropy`", _naive, _never),
        Peer("torch_compile", "naive under `torch.compile`", _torch_compile, _without_compiler),
        Peer(
            "torch_linear_ce",
            "torch `F.linear_cross_entropy`",
            _torch_linear_ce,
            _without_torch_linear_ce,
        ),
        Peer(
            "torch_linear_ce_chunked",
            "torch `F.linear_cross_entropy` in chunks",
            _torch_linear_ce_chunked,
            _without_torch_linear_ce,
        ),
        Peer("trl", "TRL chunked log-probs", _trl, _without("trl", "1.16")),
        Peer("liger_grpo", "Liger GRPO loss", _liger_grpo, _without(*_LIGER)),
        Peer("liger_scaled_ce", "Liger scaled CE", _liger_scaled_ce, _without_liger_scaled_ce),
        Peer("liger_flce", "Liger FLCE per token", _liger_flce("none"), _without_cuda(*_LIGER)),
        Peer(
            "liger_flce_mean",
            "Liger FLCE (unweighted mean)",
            _liger_flce("mean"),
            _without_cuda(*_LIGER),
            weighted=False,
        ),
        Peer(
            "cce",
            "CCE (drops small gradients)",
            _cce("cce"),
            _without_cuda("cut-cross-entropy", "25.1"),
        ),
        Peer(
            "cce_torch_compile",
            "CCE's `torch_compile`",
            _cce("torch_compile"),
            _without_cce_compile,
        ),
        Peer("quack", "quack, full logits", _quack_weighted, _without_quack),
        Peer(
            "quack_mean",
            "quack in chunks (unweighted mean)",
            _quack_mean,
            _without_quack,
            weighted=False,
        ),
    )
}
