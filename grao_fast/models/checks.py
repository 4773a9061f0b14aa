"""Checks of a user's model before it computes, and restoring it afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from grao_fast.models.attention.frequencies import release_frequencies
from grao_fast.models.sharding import local, own_class
from grao_fast.system.errors import UserError
from grao_fast.system.visible import get_logger

logger = get_logger(__name__)

# Errors that the code of a model raises for inputs it does not support, or when it is incomplete.
MODEL_ERRORS = (
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)

P = ParamSpec("P")
R = TypeVar("R")


def restores_models(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function of a model, its first argument, with `restored` and `plain_torch`.

    A `base_model` argument is restored likewise.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        model, base = args[0] if args else kwargs.get("model"), kwargs.get("base_model")
        with restored(model), restored(base), plain_torch():
            return function(*args, **kwargs)

    return run


def check_given(name: str, model: object) -> None:
    """Raise UserError unless an argument is a model or names one."""
    if not isinstance(model, (str, Path, nn.Module)):
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise UserError(
            f"{name} must be a folder, a hub id or a causal language model of Transformers, got "
            f"{what}"
        )


@contextmanager
def plain_torch() -> Iterator[None]:
    """Enable gradients, disable autocast and default to the CPU, whatever the caller has set."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device_type in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


def plain_model(model: nn.Module) -> nn.Module:
    """Unwrap a user's module from `torch.compile`.

    Raises UserError if it is not a usable causal language model of Transformers.
    """
    # Packed rows differ in length, and a compiled model would recompile for each.
    model = getattr(model, "_orig_mod", model)
    name = type(model).__name__
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, PreTrainedModel):
        inside = getattr(model, "module", None)
        remedy = (
            f"pass the {type(inside).__name__} inside it"
            if isinstance(inside, nn.Module)
            else "load one with AutoModelForCausalLM"
        )
        raise UserError(f"model is a {name}, not a causal language model of Transformers: {remedy}")
    if inner.config.is_encoder_decoder:
        raise UserError(
            f"{name} has an encoder and a decoder, where a causal language model is needed"
        )
    if inner.get_output_embeddings() is None:
        raise UserError(f"{name} has no language-model head: load it with AutoModelForCausalLM")
    compiled = [path for path, layer in model.named_modules() if hasattr(layer, "_orig_mod")]
    if compiled:
        raise UserError(
            f"{compiled[0]} of {name} is compiled, and weights saved from within torch.compile's "
            "wrapper have other names: pass the model before its layers are compiled"
        )
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise UserError(
            f"parameters of {name} have no values (device meta): load it with from_pretrained"
        )
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise UserError(
            f"the parameters of {name} were made inside torch.inference_mode, and cannot be "
            "trained: load it outside"
        )
    return model


def check_weights(model: nn.Module) -> None:
    """Raise UserError for the first parameter that holds NaN or infinite numbers.

    Of sharded parameters, this process's shards are checked.
    """
    shards = {name: local(parameter.detach()) for name, parameter in model.named_parameters()}
    extremes = {
        name: torch.stack(shard.aminmax()).float()
        for name, shard in shards.items()
        if shard.is_floating_point() and shard.element_size() > 1 and shard.numel()
    }
    for name, extreme_2 in extremes.items():
        if not bool(extreme_2.isfinite().all()):
            raise UserError(
                f"parameter {name!r} of {own_class(model).__name__} holds NaN or infinite numbers: "
                "the model would answer with them alone; load weights that are whole"
            )


def warn_of_dropout(causal_lm: PreTrainedModel) -> None:
    """Warn that dropout makes the log-probs of updates differ from those of sampling."""
    layers = [m.p for m in causal_lm.modules() if isinstance(m, nn.Dropout) and m.p > 0]
    config: Any = causal_lm.config.get_text_config()
    of_scores = getattr(config, "attention_dropout", None) or 0.0
    if layers or of_scores:
        logger.warning(
            "%s has dropout (%g), in updates and not in sampling: sampling/logp_diff is more than "
            "rounding. Set it to 0 in the config of the model or the adapter to be on-policy",
            type(causal_lm).__name__,
            max([*layers, of_scores]),
        )


@contextmanager
def restored(model: Any) -> Iterator[None]:
    """Restore a user's module at the end of the block, also after an error.

    Restored are its mode, recomputation, attention, rotary frequencies and gradients. Inside,
    modules compiled by `module.compile()` run uncompiled, since they would recompile for every
    length. Anything but a module is ignored: a model given as a path is loaded for the run alone.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    recomputing = [
        (module, module.gradient_checkpointing)
        for module in model.modules()
        if hasattr(module, "gradient_checkpointing")
    ]
    compiled = [
        (module, module._compiled_call_impl)
        for module in model.modules()
        if module._compiled_call_impl is not None
    ]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    hooked = hasattr(inner, "_require_grads_hook")
    attention = getattr(getattr(inner, "config", None), "_attn_implementation", None)
    for module, _ in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module in model.modules():
            release_frequencies(module)
        for module, training in modes:
            module.training = training
        for module, implementation in compiled:
            module._compiled_call_impl = implementation
        if attention is not None and inner.config._attn_implementation != attention:
            inner.set_attn_implementation(attention)
        for module, recomputes in recomputing:
            module.gradient_checkpointing = recomputes
        for parameter, gradient in gradients:
            if gradient is None or gradient.device == parameter.device:
                parameter.grad = gradient
        if hasattr(inner, "_require_grads_hook") and not hooked:
            inner.disable_input_require_grads()
