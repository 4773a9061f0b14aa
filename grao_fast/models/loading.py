"""Loading models and tokenizers: from folders, from hub ids, and adapters on their base models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationMethod

from grao_fast.models.adapter_folders import AdapterFolder, find_adapter, open_adapter, read_config
from grao_fast.models.adapters import alters_base, check_adapter_config, check_module, new_adapter
from grao_fast.models.checks import plain_model
from grao_fast.models.liger import use_liger_layers
from grao_fast.system.digests import digest_tensors
from grao_fast.system.errors import UserError, first_line, first_of

_NONE_IF_ABSENT = {
    "_raise_exceptions_for_gated_repo": False,
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}


def existing_path(name: str | Path) -> str:
    """Return a hub id unchanged; raise UserError for a path that is not a folder."""
    text = str(Path(name).expanduser()) if str(name).startswith("~") else str(name)
    looks_like_path = isinstance(name, Path) or text.startswith((".", "/")) or text.count("/") > 1
    if looks_like_path and not Path(text).is_dir():
        raise UserError(f"model folder {text!r} does not exist; give a folder or a hub id")
    return text


def load_tokenizer(model: str | Path | nn.Module) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, or of an adapter's base, without loading the model."""
    if isinstance(model, nn.Module):
        return _checked(_tokenizer_of_module(plain_model(model)))
    path = existing_path(model)
    adapter = find_adapter(path)
    return _checked(_load_tokenizer(path, path if adapter is None else _base_of(adapter)))


def load_model(
    model: str | Path | nn.Module,
    *,
    device: torch.device,
    bf16: bool,
    tokenizer: PreTrainedTokenizerBase | None,
    peft_config: Any,
    trained: bool,
    liger: bool,
) -> tuple[nn.Module, PreTrainedTokenizerBase, str | None]:
    """Load a model, with its adapter if it has one; returns model, tokenizer and base digest.

    The digest is of the base model before a new adapter's first weights alter it; None if they do
    not. A folder or hub id of an adapter gives that adapter on the base model that it names, to
    continue training. A frozen base is loaded in bfloat16 if `bf16` is set, all else in float32.

    Raises:
        UserError: see `load_policy` on models, tokenizers and adapters.
    """
    if peft_config is not None:
        check_adapter_config(peft_config)
    if isinstance(model, nn.Module):
        check_module(model, peft_config=peft_config, trained=trained)
        model = plain_model(model)
        tokenizer = _checked(tokenizer or _tokenizer_of_module(model))
        module, adapter = model, None
    else:
        path = existing_path(model)
        adapter = find_adapter(path)
        if adapter is not None and peft_config is not None:
            raise UserError(
                f"model {path!r} is an adapter, and peft_config would put another on its base and "
                "lose it: leave peft_config out to continue the adapter, or merge it first "
                "(merge_and_unload, save_pretrained) and give the merged model"
            )
        if adapter is not None:
            peft_config = read_config(adapter, trained=trained)
        base = path if adapter is None else _base_of(adapter)
        tokenizer = _checked(tokenizer or _load_tokenizer(path, base))
        module = _load(
            base,
            revision=None if adapter is None else adapter.revision,
            dtype=torch.bfloat16 if bf16 and peft_config is not None else torch.float32,
        )
    if not _is_quantised(module):  # which lies where it was loaded, and stays as it is
        module = module.to(device)
    if liger:
        use_liger_layers(module.get_base_model() if hasattr(module, "get_base_model") else module)
    altered = trained and peft_config is not None and alters_base(peft_config)
    base_digest = digest_tensors(module.state_dict()) if altered else None
    if adapter is not None:
        module = open_adapter(module, adapter, peft_config)
    elif peft_config is not None:
        module = new_adapter(module, peft_config, name=model_name(model))
    return module, tokenizer, base_digest


def model_name(model: str | Path | nn.Module) -> str:
    """The name of a model in messages."""
    return type(model).__name__ if isinstance(model, nn.Module) else str(model)


def _load(name: str, *, dtype: torch.dtype, revision: str | None) -> nn.Module:
    at = {} if revision is None else {"revision": revision}
    with _loading(name):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, in one line
            **at,
        )
    model, info = loaded
    # Transformers would draw them at random
    absent = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
    if absent:
        raise UserError(
            f"model {name!r} holds no {first_of(absent)} of the shapes that its config.json wants: "
            "give the folder of a whole causal language model"
        )
    return model


def _is_quantised(model: nn.Module) -> bool:
    """Whether bitsandbytes has quantised the model or its base, which then cannot be moved."""
    return getattr(model, "quantization_method", None) == QuantizationMethod.BITS_AND_BYTES


def _base_of(adapter: AdapterFolder) -> str:
    try:
        base = existing_path(adapter.base)
    except ValueError:
        raise UserError(
            f"adapter {adapter.path!r} is of base model {adapter.base!r}, which does not exist "
            "here: name its place as base_model_name_or_path in adapter_config.json"
        ) from None
    if find_adapter(base) is not None:
        raise UserError(
            f"adapter {adapter.path!r} is of base model {base!r}, which is itself an adapter: "
            "merge that one first (merge_and_unload, save_pretrained) and name the merged model "
            "as base_model_name_or_path in adapter_config.json"
        )
    return base


def _tokenizer_of_module(model: nn.Module) -> PreTrainedTokenizerBase:
    name = getattr(model, "name_or_path", "")
    if not name:
        raise UserError("a model given as a module needs its tokenizer: pass tokenizer=...")
    return _load_tokenizer(name, name)


def _load_tokenizer(path: str, base: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of `path`, or of the base model if an adapter has none."""
    if path != base and cached_file(path, TOKENIZER_CONFIG_FILE, **_NONE_IF_ABSENT) is None:
        path = base
    with _loading(path):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def _checked(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path!r} has no eos_token; set tokenizer.eos_token"
        )
    return tokenizer


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Turn Transformers' loading errors, many lines long, into one line that names the model."""
    try:
        yield
    except (ImportError, OSError, SafetensorError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"model {name!r} brings code of its own, which is not run from a name: load model "
                "and tokenizer yourself with trust_remote_code=True, and pass both"
            ) from error
        raise UserError(f"cannot load model {name!r}: {first_line(error)}") from error
