"""Liger's layers: what is asked of the library, which runs on CUDA only, and where they are off."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from grao_fast.config import GRAOConfig
from grao_fast.models.liger import use_liger_layers
from grao_fast.sampling.loading import load_policy


def on_cuda(model_type: str) -> SimpleNamespace:
    """What `use_liger_layers` reads of a model."""
    return SimpleNamespace(config=SimpleNamespace(model_type=model_type))


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """A library that keeps what it was called with, under the names of liger-kernel 0.8."""
    calls: list[dict] = []
    package, top = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    patch = ModuleType("liger_kernel.transformers.monkey_patch")
    top._apply_liger_kernel_to_instance = lambda **options: calls.append(options)
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
    for module in (package, top, patch):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def test_its_layers_go_into_the_model_and_its_losses_do_not(liger: list[dict]):
    model = on_cuda("llama")
    use_liger_layers(model, torch.device("cuda"))
    assert liger == [{"model": model, "cross_entropy": False, "fused_linear_cross_entropy": False}]


def test_a_type_it_does_not_know_is_refused(liger: list[dict]):
    with pytest.raises(ValueError, match="no layers for model type 'opt'"):
        use_liger_layers(on_cuda("opt"), torch.device("cuda"))
    assert not liger


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    with pytest.raises(ValueError, match=r"grao-fast\[liger\]"):
        use_liger_layers(on_cuda("llama"), torch.device("cuda"))


def test_it_is_off_on_a_cpu_and_said_to_be(tiny_model, liger: list[dict], caplog):
    with caplog.at_level("INFO"):
        load_policy(tiny_model, config=GRAOConfig(use_liger_kernel=True, device="cpu"))
    assert caplog.text.count("use_liger_kernel is off") == 1
    assert not liger
