"""The choice of a sampler for a model of this process."""

from __future__ import annotations

from transformers import PreTrainedModel

from grao_fast.models.checks import MODEL_ERRORS
from grao_fast.models.sharding import own_class
from grao_fast.sampling.cache import Kept
from grao_fast.sampling.generate import GenerateSampler, supports_left_padding
from grao_fast.sampling.model_sampler import Decoding, ModelSampler
from grao_fast.sampling.transformers import TransformersSampler
from grao_fast.system.errors import UserError, first_line
from grao_fast.system.visible import get_logger

logger = get_logger(__name__)


def choose_sampler(
    model: PreTrainedModel, kept: Kept, decoding: Decoding, *, static_cache: bool
) -> ModelSampler:
    """Our own decoding if the cache holds keys and values only, else Transformers' `generate`.

    Args:
        kept: of `kept_by(model)`.

    Raises ValueError where a cache of fixed size is asked for and cannot serve.
    """
    if kept.keys_and_values:
        return TransformersSampler(model, decoding, static_cache=static_cache)
    name, what = own_class(model).__name__, kept.state or "no keys and values"
    if static_cache:
        raise UserError(
            f"{name} keeps {what}, which a cache of fixed size is not made for here: set "
            'cache_implementation="dynamic"'
        )
    try:
        pads = supports_left_padding(model)
    except MODEL_ERRORS as error:
        raise UserError(f"{name} cannot be sampled by generate: {first_line(error)}") from error
    logger.info(
        "%s keeps %s: it samples by Transformers' generate, %s",
        name,
        what,
        "prompts padded on the left" if pads else "a batch for each length of a prompt",
    )
    return GenerateSampler(model, decoding, pads=pads)


def check_sharing(model: PreTrainedModel, kept: Kept) -> None:
    """Raise UserError if state would leak between the sequences of a packed row."""
    if kept.state is not None:
        raise UserError(
            f"{own_class(model).__name__} carries a state from token to token ({kept.state}), "
            "which would run through all that is packed in one row: set share_prefix=False"
        )


def check_own_sampler(sampler: object, *, use_vllm: bool) -> None:
    """Raise UserError if a sampler lacks a part of the protocol, or vLLM is asked for as well."""
    if isinstance(sampler, type):
        raise UserError(f"sampler is the class {sampler.__name__}: pass an instance of it")
    lacking = [name for name in ("context_length", "sync", "sample") if not hasattr(sampler, name)]
    if lacking:
        raise UserError(
            f"sampler {type(sampler).__name__} has no {lacking[0]}: see grao_fast.sampling.Sampler"
        )
    if use_vllm:
        raise UserError("use_vllm=True and sampler= ask for two samplers: leave one out")
