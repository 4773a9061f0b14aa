"""Variable-length attention over packed groups: values, gradients, and how kernels are called."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from families import family_model
from packed_attention import SEGMENTS, dense_attention, seen_pairs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer

from grao_fast.config import GRAOConfig
from grao_fast.data.packing import Segment
from grao_fast.models.attention import varlen, varlen_kernels
from grao_fast.models.parity import check_parity
from grao_fast.sampling.loading import load_policy
from grao_fast.system.errors import UserError

CPU = torch.device("cpu")
# Suffixes that are absent, and a prompt without any.
WITH_HOLES = (Segment(0, 5, (0, 3, 0)), Segment(8, 4, ()), Segment(12, 2, (6, 1, 4)))


def qkv(segments: tuple[Segment, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    L = segments[-1].stop
    return [torch.randn(1, heads, L, 8, generator=generator).to(dtype) for heads in (6, 2, 2)]


def with_gradients(attend: Any, tensors: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = attend(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """To the rounding of float64; in a window of 1, gradients of queries and keys are 0."""
    for actual, expected in zip(ours, theirs, strict=True):
        assert float((actual - expected).abs().max()) <= 1e-12 * float(expected.abs().max() + 1)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 33, 3, 1])
@pytest.mark.parametrize("segments", [SEGMENTS, WITH_HOLES], ids=["groups", "holes"])
def test_values_and_gradients_are_those_of_dense_masks(
    segments: tuple[Segment, ...], window: int | None, softcap: float | None
) -> None:
    options: dict[str, Any] = {"scaling": 0.7, "softcap": softcap}
    ours = with_gradients(
        lambda q, k, v: varlen.attend(q, k, v, segments, window=window, dropout=0.0, **options),
        qkv(segments),
    )
    seen = seen_pairs(window, segments)
    theirs = with_gradients(
        lambda q, k, v: dense_attention(q[0], k[0], v[0], seen, **options)[None], qkv(segments)
    )
    assert_same(ours, theirs)


def test_a_window_copies_no_more_of_a_prompt_than_suffixes_see() -> None:
    def keys(window: int | None) -> tuple[int, ...]:
        return varlen.plan_of(SEGMENTS[:1], window, CPU).sequences.lengths_k

    assert keys(None) == (150, 290, 157)
    assert keys(33) == (150, 172, 39)
    assert keys(1) == (150, 140, 7)
    assert keys(10**6) == keys(None)


def test_a_plan_is_made_once_for_a_micro_batch() -> None:
    assert varlen.plan_of(SEGMENTS, 5, CPU) is varlen.plan_of(SEGMENTS, 5, CPU)


class Operators(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_the_gathers_gradient_is_summed_in_a_fixed_order_and_rounded_once() -> None:
    """Sums of 1 to 9 copies in bfloat16, where a running sum would be rounded 8 times."""
    segments = (Segment(0, 40, (3,) * 8), Segment(64, 7, (5, 2)), Segment(78, 3, (1,)))
    plan = varlen.plan_of(segments, 20, CPU)
    assert [tuple(places.shape) for places in plan.copies] == [
        (53, 1),
        (3, 2),
        (7, 3),
        (19, 9),
    ]
    x_LJd = torch.zeros(segments[-1].stop, 2, 8, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(len(plan.place_K), 2, 8).exp().bfloat16()
    with Operators() as operators:
        varlen.gather(x_LJd, plan).backward(grad)
    # None of those that on CUDA add in any order.
    assert not {"index_add", "index_put_", "scatter_add", "scatter_add_"} & operators.names
    assert {"index_select", "sum"} <= operators.names

    summed, running = (
        torch.zeros(x_LJd.shape, dtype=dtype) for dtype in (torch.float64, torch.bfloat16)
    )
    for place, copy in zip(plan.place_K, grad, strict=True):
        summed[place] += copy
        running[place] += copy

    def off(sums: Tensor | None) -> float:
        assert sums is not None
        return float(((sums - summed) / summed).abs().max())

    once = torch.finfo(torch.bfloat16).eps / 2
    assert off(x_LJd.grad) <= 1.001 * once
    assert off(running) > 1.5 * once


# ---- how the kernels are called


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """What flash-attn documents: a query sees the keys from window_size[0] before its own place, at
    the bottom right, to window_size[1] after it, and with `causal` none after it."""
    assert dropout_p == 0.0 and softmax_scale > 0.0
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    outputs = []
    for n in range(len(cu_seqlens_q) - 1):
        queries = q[cu_seqlens_q[n] : cu_seqlens_q[n + 1]].transpose(0, 1)
        keys, values = (x[cu_seqlens_k[n] : cu_seqlens_k[n + 1]].transpose(0, 1) for x in (k, v))
        Q, K = queries.shape[1], keys.shape[1]
        assert 0 < Q <= max_seqlen_q and Q <= K <= max_seqlen_k
        offset = torch.arange(K)[None, :] - (torch.arange(Q)[:, None] + K - Q)
        left, right = window_size
        seen = torch.ones(Q, K, dtype=torch.bool)
        if left >= 0:
            seen &= offset >= -left
        if right >= 0 or causal:
            seen &= offset <= (0 if causal else right)
        outputs.append(
            dense_attention(queries, keys, values, seen, scaling=softmax_scale, softcap=softcap)
        )
    return torch.cat(outputs, dim=1).transpose(0, 1)


def varlen_attn(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    """What PyTorch documents, beside flash-attn: no `causal`, and grouped heads if told so."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        softmax_scale=scale,
        window_size=window_size,
    )


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch):
    """Installs such functions, under the modules that have them, or their absence."""

    def install(flash: Any = None, pytorch: Any = varlen_attn) -> None:
        for module, name, function in (
            ("flash_attn", "flash_attn_varlen_func", flash),
            ("torch.nn.attention.varlen", "varlen_attn", pytorch),
        ):
            stand_in = ModuleType(module)
            if function is not None:
                setattr(stand_in, name, function)
            monkeypatch.setitem(sys.modules, module, stand_in)
        for cached in (varlen_kernels._flash_attn, varlen_kernels._pytorch):
            cached.cache_clear()

    yield install
    for cached in (varlen_kernels._flash_attn, varlen_kernels._pytorch):
        cached.cache_clear()


@pytest.mark.parametrize("window", [None, 33, 1])
@pytest.mark.parametrize("kernel", ["flash-attn's", "flash-attn's, capped", "PyTorch's"])
def test_kernels_are_given_what_they_document(
    kernel: str, window: int | None, install, monkeypatch: pytest.MonkeyPatch
) -> None:
    flash = kernel != "PyTorch's"
    install(flash=flash_attn_varlen_func if flash else None)
    assert varlen_kernels.kernel_name() == kernel.split(",")[0]
    options: dict[str, Any] = {"window": window, "scaling": 0.7, "dropout": 0.0}
    options["softcap"] = 2.0 if "capped" in kernel else None
    theirs = with_gradients(
        lambda q, k, v: varlen.attend(q, k, v, WITH_HOLES, **options), qkv(WITH_HOLES)
    )
    call = varlen_kernels._by_flash_attn if flash else varlen_kernels._by_pytorch
    monkeypatch.setattr(varlen_kernels, "_by_sdpa", call)
    ours = with_gradients(
        lambda q, k, v: varlen.attend(q, k, v, WITH_HOLES, **options), qkv(WITH_HOLES)
    )
    assert_same(ours, theirs)


def test_the_stand_in_has_the_signature_of_pytorchs_own() -> None:
    theirs = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
    parameters = inspect.signature(theirs).parameters
    if "enable_gqa" not in parameters:
        pytest.skip("an earlier release, which is not used")
    assert list(parameters) == list(inspect.signature(varlen_attn).parameters)
    assert varlen_kernels._pytorch() is theirs


@pytest.mark.parametrize(
    ("width", "dtype", "softcap", "installed", "message"),
    [
        (64, torch.bfloat16, None, {}, None),
        (64, torch.float16, None, {}, None),
        (64, torch.float32, None, {}, "in 16 bits, and this run in float32"),
        (264, torch.bfloat16, None, {}, "heads are 264 wide, and its kernels take 256"),
        (20, torch.bfloat16, None, {}, r"heads are 20 wide.*multiples of 8.*grao-fast\[flash\]"),
        (64, torch.bfloat16, 50.0, {}, r"no cap on scores, which is 50.0 here.*\[flash\]"),
        (64, torch.bfloat16, None, {"pytorch": None}, r"has none that serves.*\[flash\]"),
        (64, torch.bfloat16, None, {"pytorch": lambda query, is_causal: 0}, "has none that"),
        (20, torch.bfloat16, 50.0, {"flash": flash_attn_varlen_func}, None),
        (64, torch.bfloat16, 50.0, {"flash": lambda q, causal: 0}, "no cap on scores"),
    ],
)
def test_what_no_kernel_serves_is_named(
    width: int, dtype: torch.dtype, softcap: float | None, installed: dict, message, install
) -> None:
    install(**installed)
    why_not = varlen_kernels.why_not(width, dtype, softcap)
    if message is None:
        assert why_not is None
    else:
        assert why_not is not None and re.search(message, why_not)


def test_dropout_is_refused() -> None:
    with pytest.raises(UserError, match=r"dropout is 0\.1.*set attention_backend"):
        varlen.attend(
            *qkv(WITH_HOLES), WITH_HOLES, window=None, scaling=1.0, dropout=0.1, softcap=None
        )


def test_a_kernel_of_another_alignment_is_refused_at_the_start(tiny_model, monkeypatch) -> None:
    """Aligned at the top left, as flash-attn was before 2.1, a suffix sees too little."""

    def top_left(q, k, v, sequences, *, window, scaling, softcap):
        parts = zip(
            q.split(sequences.lengths_q),
            k.split(sequences.lengths_k),
            v.split(sequences.lengths_k),
            strict=True,
        )
        outputs = []
        for queries, keys, values in parts:
            seen = torch.ones(len(queries), len(keys), dtype=torch.bool).tril()
            heads = (x.transpose(0, 1) for x in (queries, keys, values))
            outputs.append(dense_attention(*heads, seen, scaling=scaling, softcap=softcap))
        return torch.cat(outputs, dim=1).transpose(0, 1)

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = family_model("Llama", max_position_embeddings=256)
    policy = load_policy(model, config=GRAOConfig(), tokenizer=tokenizer).policy
    on_varlen = dataclasses.replace(policy, attention="grao_varlen")
    check_parity(on_varlen)
    monkeypatch.setattr(varlen_kernels, "_by_sdpa", top_left)
    with pytest.raises(ValueError, match=r"logits .* differ"):
        check_parity(on_varlen)
