"""What a model must be before anything is computed with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from grao_fast.attention.frequencies import release_frequencies

P = ParamSpec("P")
R = TypeVar("R")


def gives_models_back(function: Callable[P, R]) -> Callable[P, R]:
    """A function of a model, its first argument: run with gradients, and `as_it_was` around it.

    A caller's `torch.no_grad` or `torch.inference_mode` does not reach inside.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        model = args[0] if args else kwargs.get("model")
        with as_it_was(model), torch.inference_mode(False), torch.enable_grad():
            return function(*args, **kwargs)

    return run


def plain_model(model: nn.Module) -> nn.Module:
    """A module of the user's, taken out of `torch.compile`'s wrapper.

    Raises ValueError, in one line, where it is not a causal language model of Transformers.
    """
    # packed rows have a length each: what was compiled for one would be compiled anew for all
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
        raise ValueError(
            f"model is a {name}, not a causal language model of Transformers: {remedy}"
        )
    if inner.config.is_encoder_decoder:
        raise ValueError(
            f"{name} has an encoder and a decoder, where a causal language model is needed"
        )
    if inner.get_output_embeddings() is None:
        raise ValueError(f"{name} has no language-model head: load it with AutoModelForCausalLM")
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            f"the parameters of {name} were made inside torch.inference_mode, and cannot be "
            "trained: load it outside"
        )
    return model


def check_weights(model: nn.Module) -> None:
    """ValueError, naming the first parameter that holds a NaN or an infinite number."""
    extremes = {
        name: torch.stack(parameter.detach().aminmax()).float()
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and parameter.element_size() > 1 and parameter.numel()
    }
    for name, extreme_2 in extremes.items():
        if not bool(extreme_2.isfinite().all()):
            raise ValueError(
                f"parameter {name!r} of {type(model).__name__} holds NaN or infinite numbers: the "
                "model would answer with them alone; load weights that are whole"
            )


@contextmanager
def as_it_was(model: Any) -> Iterator[None]:
    """A user's module, when the block ends in whatever way: mode, recomputation, gradients, ropes.

    What else the block gets, as a path, is loaded for the run and needs no care.
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
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    hooked = hasattr(inner, "_require_grads_hook")
    try:
        yield
    finally:
        for module in model.modules():
            release_frequencies(module)
        for module, training in modes:
            module.training = training
        for module, recomputes in recomputing:
            module.gradient_checkpointing = recomputes
        for parameter, gradient in gradients:
            if gradient is None or gradient.device == parameter.device:
                parameter.grad = gradient
        if hasattr(inner, "_require_grads_hook") and not hooked:
            inner.disable_input_require_grads()
