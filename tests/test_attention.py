"""Backends of packed attention: what they see, what they give, and which is chosen."""

from __future__ import annotations

import dataclasses
from itertools import accumulate

import pytest
import torch
from families import FAMILIES, GROUPS, assert_same, family_model, gradients
from packed_attention import SEGMENTS, seen_pairs
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import flex_attention as torch_flex
from transformers import AutoTokenizer

from grao_fast.config import GRAOConfig
from grao_fast.data.packing import Segment, pack
from grao_fast.models.attention import choose_attention, flex, sdpa, varlen
from grao_fast.models.parity import check_parity
from grao_fast.sampling.loading import load_policy

CPU = torch.device("cpu")
WINDOWS = [None, 33]


@pytest.fixture
def flex_with_gradients(monkeypatch: pytest.MonkeyPatch):
    """PyTorch refuses FlexAttention's gradients on a CPU; its uncompiled code has them."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)


@pytest.mark.parametrize("window", WINDOWS)
def test_the_mask_is_the_definition(window: int | None):
    L = SEGMENTS[-1].stop
    mask = torch_flex.create_mask(flex.mask_of(SEGMENTS, window, CPU), None, None, L, L, "cpu")
    assert torch.equal(mask[0, 0], seen_pairs(window))


@pytest.mark.parametrize("window", WINDOWS)
def test_the_table_of_blocks_is_pytorchs_own(window: int | None):
    """Every block with a visible pair is listed, and blocks that need no mask are listed apart."""
    mask, L = flex.block_mask(SEGMENTS, window, CPU), SEGMENTS[-1].stop
    theirs = torch_flex.create_block_mask(mask.mask_mod, None, None, L, L, "cpu", BLOCK_SIZE=128)
    assert mask.shape == theirs.shape
    assert torch.equal(mask.to_dense(), theirs.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(mask, name), getattr(theirs, name)), name
    assert int(mask.full_kv_num_blocks.sum()) == (1 if window is None else 0)


def test_the_mask_is_made_once_for_a_micro_batch():
    assert flex.block_mask(SEGMENTS, 5, CPU) is flex.block_mask(SEGMENTS, 5, CPU)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", WINDOWS)
def test_backends_agree(window: int | None, softcap: float | None, flex_with_gradients):
    """Compares values and gradients with grouped heads and with scores that reach the cap."""
    L = SEGMENTS[-1].stop
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, L, 16, generator=generator) for heads in (6, 2, 2))
    grad = torch.randn(q.shape, generator=generator)
    options = {"window": window, "scaling": 0.7, "dropout": 0.0, "softcap": softcap}
    results = []
    for backend in (sdpa, flex, varlen):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = backend.attend(*leaves, SEGMENTS, **options)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    for parts, *others in zip(*results, strict=True):
        for other in others:
            assert float((other - parts).abs().max()) <= 1e-5 * float(parts.abs().max())


@pytest.mark.parametrize("pairs", [1, 2**16])
def test_groups_of_one_shape_are_attended_together(pairs: int, monkeypatch):
    """Bits are those of each group alone, whatever its suffixes' lengths and its neighbours."""
    monkeypatch.setattr(sdpa, "_PAIRS", pairs)
    sdpa._plan.cache_clear()
    shapes = [(4, (3, 5, 2)), (2, (3, 5)), (4, (5, 1, 1)), (4, (5, 5, 5)), (4, (3, 4, 2))]
    starts = [0, *accumulate(P + sum(lengths) for P, lengths in shapes)]
    segments = tuple(
        Segment(start, *shape) for start, shape in zip(starts[:-1], shapes, strict=True)
    )
    assert len(sdpa._plan(segments, CPU).parts) == (5 if pairs == 1 else 3)
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(1, 2, starts[-1], 8, generator=generator) for _ in range(3)]
    toward = torch.randn(1, 2, starts[-1], 8, generator=generator)
    options = {"window": None, "scaling": 0.3, "dropout": 0.0, "softcap": None}

    def run(first: int, stop: int, segments: tuple[Segment, ...]) -> list[torch.Tensor]:
        leaves = [x[:, :, first:stop].clone().requires_grad_() for x in qkv]
        out = sdpa.attend(*leaves, segments, **options)
        return [out, *torch.autograd.grad(out, leaves, toward[:, :, first:stop])]

    alone = [run(s.start, s.stop, (dataclasses.replace(s, start=0),)) for s in segments]
    for together, parts in zip(run(0, starts[-1], segments), zip(*alone, strict=True), strict=True):
        assert torch.equal(together, torch.cat(parts, 2))
    sdpa._plan.cache_clear()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_gradients_of_parts(family, tiny_model, flex_with_gradients):
    """Layers are recomputed, except where a score cap rules that out for FlexAttention."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config = GRAOConfig(gradient_checkpointing=family != "Gemma2")
    policy = load_policy(family_model(family), config=config, tokenizer=tokenizer).policy
    assert policy.attention == "grao_parts"
    in_parts = gradients(policy, pack(GROUPS))
    for attention in ("grao_flex", "grao_varlen"):
        other = dataclasses.replace(policy, attention=attention)
        assert_same(gradients(other, pack(GROUPS)), in_parts)


def test_flex_is_checked_beyond_its_first_block(tiny_model, flex_with_gradients, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = family_model("Llama", max_position_embeddings=256)
    policy = load_policy(model, config=GRAOConfig(), tokenizer=tokenizer).policy
    on_flex = dataclasses.replace(policy, attention="grao_flex")
    check_parity(on_flex)

    def wrong(*args):
        sees = mask_of(*args)
        return lambda b, h, q, k: sees(b, h, q, k) & ((q < flex.BLOCK) | (k > 0))

    mask_of = flex.mask_of
    monkeypatch.setattr(flex, "mask_of", wrong)
    flex.block_mask.cache_clear()
    with pytest.raises(ValueError, match=r"logits .* differ"):
        check_parity(on_flex)
    flex.block_mask.cache_clear()


def test_a_new_length_compiles_nothing(flex_with_gradients, monkeypatch):
    """PyTorch's guards, which are alike on all devices; no code is generated.

    The first row has three blocks of 128 tokens, like that of the check at the start.
    """
    counter, compile_for = CompileCounter(), torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda *args, **options: compile_for(*args, backend=counter, **options)
    )
    compiled = flex._compiled.__wrapped__()

    def compilations(*lengths: tuple[int, ...], window: int | None = None) -> int:
        start, segments = 0, []
        for P, *suffixes in lengths:
            segments.append(Segment(start, P, tuple(suffixes)))
            start = segments[-1].stop
        heads = (6, 2, 2)
        q, k, v = (torch.randn(1, start, H, 16).transpose(1, 2).requires_grad_() for H in heads)
        mask = flex.block_mask(tuple(segments), window, CPU)
        compiled(q, k, v, block_mask=mask, scale=0.3, enable_gqa=True)
        return counter.frame_count

    torch._dynamo.reset()
    assert compilations((140, 50, 90)) == 1
    for row in ((140, 50, 91), (500, 1), (128, 128), (64, 64, 64, 64, 256), (1000, 24)):
        assert compilations(row) == compilations(row, window=33) == 1, row
    assert compilations((150, 140, 7), (3, 1, 130, 64), (1, 2)) == 1
    assert compilations((20, 30)) == 2  # of one block, which PyTorch compiles apart
    for row in ((1, 1), (100, 28), (60, 2, 5)):
        assert compilations(row) == 2, row


@pytest.mark.slow
@pytest.mark.parametrize("window", WINDOWS)
def test_compiled_code_walks_the_table_of_blocks(window: int | None):
    """Only compiled FlexAttention uses the table; uncompiled, it reads the mask alone.

    On CPUs it compiles for values only, and not with dynamic shapes, for which torch 2.13 writes
    C++ that does not compile.
    """
    L = SEGMENTS[-1].stop
    q, k, v = (torch.randn(1, heads, L, 16) for heads in (4, 2, 2))
    options = {"window": window, "scaling": 0.3, "dropout": 0.0, "softcap": 3.0}
    compiled = torch.compile(torch_flex.flex_attention, dynamic=False)
    ours = compiled(
        q,
        k,
        v,
        score_mod=flex.softcap_of(3.0, CPU),
        block_mask=flex.block_mask(SEGMENTS, window, CPU),
        scale=0.3,
        enable_gqa=True,
    )
    theirs = sdpa.attend(q, k, v, SEGMENTS, **options)
    assert float((ours - theirs).abs().max()) <= 1e-5


def test_the_backend_is_chosen_by_device_and_model():
    def choice(backend: str, device: str = "cuda", *, share_prefix=True, recompute=True):
        return choose_attention(
            model,
            torch.device(device),
            backend=backend,
            share_prefix=share_prefix,
            recompute=recompute,
            dtype=torch.bfloat16,
        )

    model = family_model("Llama", head_dim=8)
    assert choice("auto") == "grao_parts"  # too narrow
    model = family_model("Llama", head_dim=16)
    assert choice("auto") == choice("flex") == "grao_flex"
    assert choice("varlen") == "grao_varlen"
    assert choice("sdpa") == choice("auto", "cpu") == "grao_parts"
    assert choice("auto", share_prefix=False) is None
    assert choice("sdpa", share_prefix=False) == "sdpa"
    model.config.attention_dropout = 0.1
    assert choice("auto") == "grao_parts"
    model = family_model("Gemma2", head_dim=16)
    assert choice("auto") == "grao_parts"
    assert choice("auto", recompute=False) == "grao_flex"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "flex", "device": "cpu"}, r'no gradients on device .cpu.; use "sdpa"'),
        ({"backend": "flex", "dropout": 0.1}, r"attention_dropout=0.1.*no dropout"),
        ({"backend": "flex", "family": "Gemma2"}, r"cap on scores .*gradient_checkpointing"),
        ({"backend": "flex"}, r"heads are 8 wide.*take 16 or more"),
        ({"backend": "varlen", "device": "cpu"}, r'needs CUDA.*device .cpu.; use "sdpa"'),
        ({"backend": "varlen", "dropout": 0.1}, r"attention_dropout=0.1.*not given any"),
        ({"backend": "varlen", "dtype": torch.float32}, r"in 16 bits, and this run in float32"),
        (
            {"backend": "flash_attention_2"},
            r'share_prefix is True; use "varlen".*share_prefix=False',
        ),
        ({"backend": "flex", "share_prefix": False}, r'"flex" serves.*share_prefix is False'),
        ({"backend": "varlen", "share_prefix": False}, r'"varlen" serves.*share_prefix is False'),
        ({"backend": "flash_attention_2", "share_prefix": False}, r"grao-fast\[flash\]"),
    ],
)
def test_a_backend_that_cannot_serve_is_refused(options, message: str):
    options = {
        "family": "Llama",
        "device": "cuda",
        "dropout": 0.0,
        "share_prefix": True,
        "dtype": torch.bfloat16,
    } | options
    model = family_model(options["family"])
    model.config.attention_dropout = options["dropout"]
    with pytest.raises(ValueError, match=message):
        choose_attention(
            model,
            torch.device(options["device"]),
            backend=options["backend"],
            share_prefix=options["share_prefix"],
            recompute=True,
            dtype=options["dtype"],
        )


def test_flash_attn_is_off_on_a_cpu_and_said_to_be(caplog):
    with caplog.at_level("INFO"):
        chosen = choose_attention(
            family_model("Llama"),
            CPU,
            backend="flash_attention_2",
            share_prefix=False,
            recompute=True,
            dtype=torch.float32,
        )
    assert chosen is None
    assert caplog.text.count("flash_attention_2 is off") == 1
