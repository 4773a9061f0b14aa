"""Loading models and tokenizers: from folders, from hub ids, and adapters on their base models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationMethod

from grao_fast.distributed.world import World
from grao_fast.models.adapter_folders import (
    AdapterFolder,
    find_adapter,
    holds_lora_alone,
    open_adapter,
    open_outline,
    read_config,
)
from grao_fast.models.adapters import (
    DEFAULT,
    alters_base,
    check_adapter_config,
    check_module,
    is_drawn_alone,
    new_adapter,
    outline_adapter,
)
from grao_fast.models.checks import plain_model
from grao_fast.models.liger import use_liger_layers
from grao_fast.models.sharded_loading import Outline
from grao_fast.models.weight_files import NONE_IF_ABSENT, safetensors_of
from grao_fast.system.bars import no_bar, on_terminal
from grao_fast.system.digests import digest_tensors
from grao_fast.system.errors import UserError, first_line, first_of


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


@dataclass(frozen=True)
class LoadedModel:
    """A model with its adapter and its tokenizer.

    model: a PeftModel where an adapter is trained.
    base_digest: of the base model before a new adapter's first weights alter it; None if they do
        not.
    outline: of several processes, to be filled once the model is sharded; None: it has its weights.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    base_digest: str | None = None
    outline: Outline | None = None


def load_model(
    model: str | Path | nn.Module,
    *,
    device: torch.device,
    bf16: bool,
    tokenizer: PreTrainedTokenizerBase | None,
    peft_config: Any,
    trained: bool,
    liger: bool,
    world: World,
) -> LoadedModel:
    """Load a model, with its adapter if it has one, and its tokenizer.

    A folder or hub id of an adapter gives that adapter on the base model that it names, to
    continue training. A frozen base is loaded in bfloat16 if `bf16` is set, all else in float32.
    With several processes, a model given by its name has no weights until its outline is filled.

    Raises:
        UserError: see `load_policy` on models, tokenizers and adapters.
    """
    if peft_config is not None:
        check_adapter_config(peft_config)
    if isinstance(model, nn.Module):
        check_module(model, peft_config=peft_config, trained=trained)
        given: nn.Module | None = plain_model(model)
        tokenizer = _checked(tokenizer or _tokenizer_of_module(given))
        name, base, adapter = model_name(model), "", None
    else:
        name, given = existing_path(model), None
        adapter = find_adapter(name)
        if adapter is not None and peft_config is not None:
            raise UserError(
                f"model {name!r} is an adapter, and peft_config would put another on its base and "
                "lose it: leave peft_config out to continue the adapter, or merge it first "
                "(merge_and_unload, save_pretrained) and give the merged model"
            )
        if adapter is not None:
            peft_config = read_config(adapter, trained=trained)
        base = name if adapter is None else _base_of(adapter)
        tokenizer = _checked(tokenizer or _load_tokenizer(name, base))
    loader = _Loader(
        name=name,
        base_name=base,
        given=given,
        dtype=torch.bfloat16 if bf16 and peft_config is not None else torch.float32,
        device=device,
        liger=liger,
        adapter=adapter,
        peft_config=peft_config,
        digests=trained and peft_config is not None and alters_base(peft_config),
    )
    if world.size > 1 and given is None:
        outline = Outline(loader, world)
        return LoadedModel(outline.model, tokenizer, outline.base_digest, outline)
    module = loader.base(device)
    if world.size > 1 and _is_quantised(module):
        raise _cannot_shard(name)
    base_digest = loader.digest(module)
    return LoadedModel(loader.adapted(module), tokenizer, base_digest)


@dataclass(frozen=True)
class _Loader:
    """How this process loads a model and puts its adapter on it.

    base_name: name or path of the model without its adapter.
    given: that model, or one with its adapter, if it is in memory.
    device: that computes.
    adapter: that is continued; None: `peft_config`, if there is one, is of a new one.
    digests: whether the base's digest is kept.
    """

    name: str
    base_name: str
    given: nn.Module | None
    dtype: torch.dtype
    device: torch.device
    liger: bool
    adapter: AdapterFolder | None
    peft_config: Any
    digests: bool

    def base(self, device: torch.device) -> Any:
        module: Any = self.given
        if module is None:
            revision = None if self.adapter is None else self.adapter.revision
            module = _load(self.base_name, revision, self.dtype, outline=device.type == "meta")
        if device.type != "meta" and not _is_quantised(module):
            module = module.to(device)  # a quantised one stays where it was loaded
        if self.liger:
            plain = module.get_base_model() if hasattr(module, "get_base_model") else module
            use_liger_layers(plain, self.device)
        return module

    def files(self) -> list[str]:
        revision = None if self.adapter is None else self.adapter.revision
        return safetensors_of(self.base_name, revision)

    def adapted(self, base: nn.Module) -> nn.Module:
        if self.adapter is not None:
            return open_adapter(base, self.adapter, self.peft_config)
        if self.peft_config is not None:
            return new_adapter(base, self.peft_config, name=self.name)
        return base

    def adapted_outline(self, base: nn.Module) -> nn.Module:
        if self.adapter is not None:
            return open_outline(base, self.adapter, self.peft_config)
        return outline_adapter(base, self.peft_config, name=DEFAULT)

    def reads_base(self) -> bool:
        if self.adapter is not None and not holds_lora_alone(self.adapter):
            return True
        return self.peft_config is not None and not is_drawn_alone(self.peft_config)

    def digest(self, base: nn.Module) -> str | None:
        return digest_tensors(base.state_dict()) if self.digests else None


def model_name(model: str | Path | nn.Module) -> str:
    """The name of a model in messages."""
    return type(model).__name__ if isinstance(model, nn.Module) else str(model)


def _load(name: str, revision: str | None, dtype: torch.dtype, *, outline: bool) -> nn.Module:
    at: dict[str, Any] = {} if revision is None else {"revision": revision}
    if outline:
        with _loading(name):
            config = AutoConfig.from_pretrained(name, trust_remote_code=False, **at)
        if getattr(config, "quantization_config", None) is not None:
            raise _cannot_shard(name)
        at["device_map"] = {"": "meta"}  # which reads shapes from the files, and no values
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


def _cannot_shard(name: str) -> UserError:
    return UserError(
        f"model {name!r} is quantised, and cannot be sharded over several processes: start one "
        "process, or give its unquantised weights"
    )


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
    if path != base and cached_file(path, TOKENIZER_CONFIG_FILE, **NONE_IF_ABSENT) is None:
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
        with no_bar(unless=on_terminal()):
            yield
    except (ImportError, OSError, SafetensorError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"model {name!r} brings code of its own, which is not run from a name: load model "
                "and tokenizer yourself with trust_remote_code=True, and pass both"
            ) from error
        raise UserError(f"cannot load model {name!r}: {first_line(error)}") from error
