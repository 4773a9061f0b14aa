"""The identity of a run and its policy: written into checkpoints, and compared on resuming."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grao_fast.config import GRAOConfig
from grao_fast.data.examples import Example
from grao_fast.data.fingerprint import fingerprint
from grao_fast.data.streaming import StreamedExamples
from grao_fast.models.adapters import adapter_configs, is_peft_model, saved_names
from grao_fast.models.beginning import trainable
from grao_fast.models.sharding import own_class
from grao_fast.objectives import split_objective
from grao_fast.rewards import Reward
from grao_fast.rewards.named import identity
from grao_fast.sampling.loaded import LoadedPolicy
from grao_fast.system.digests import digest_rows, digest_tensors
from grao_fast.system.errors import first_of
from grao_fast.system.visible import get_logger
from grao_fast.training.checkpoint import FORMAT, CheckpointError

logger = get_logger(__name__)

# Options of a model that do not change what it computes from token ids.
_NOT_COMPUTED = (
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "id2label",
    "label2id",
    "name_or_path",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)


@dataclass(frozen=True)
class RunIdentity:
    """What stays the same for a whole run, and is known before a model is loaded.

    data: `fingerprint` of the dataset.
    reward: names of the reward functions, with the settings of ready-made ones.
    """

    data: str
    reward: list[str]

    @classmethod
    def of(
        cls, examples: Sequence[Example] | StreamedExamples, reward: Reward | None
    ) -> RunIdentity:
        functions = [] if reward is None else reward.functions
        return cls(fingerprint(examples), [identity(f) for f in functions])


@dataclass(frozen=True)
class PolicyIdentity:
    """What stays the same about a policy while it is trained.

    model: its class and name, for messages only.
    config: the options of its class that decide what it computes.
    adapters: by name, the options that decide what an adapter computes.
    trained: dtype and shape of every trained parameter.
    tokenizer: digest of vocabulary, chat template and special tokens.
    start: digest of the weights that checkpoints hold, from before training: all weights of a
        model, or the trained ones if an adapter is trained.
    base: `LoadedPolicy.base_digest`.
    """

    model: str
    config: dict[str, Any]
    adapters: dict[str, dict[str, Any]]
    trained: dict[str, str]
    tokenizer: str
    start: str
    base: str | None

    @classmethod
    def of(cls, loaded: LoadedPolicy) -> PolicyIdentity:
        """The identity of a policy before its first step, or before a checkpoint is loaded."""
        return cls(
            model=_described(loaded.causal_lm),
            config=_computed(loaded.causal_lm.config.to_dict()),
            adapters=adapter_configs(loaded.model),
            trained={
                name: f"{str(p.dtype).removeprefix('torch.')} {tuple(p.shape)}"
                for name, p in trainable(loaded.model).items()
            },
            tokenizer=_tokenizer_digest(loaded.tokenizer),
            start=digest_tensors(_held(loaded.model)),
            base=loaded.base_digest,
        )


def _described(causal_lm: PreTrainedModel) -> str:
    name = getattr(causal_lm, "name_or_path", "")
    return f"{own_class(causal_lm).__name__} {name}".strip()


def digest_weights(model: nn.Module) -> str:
    """An exact digest of the weights that checkpoints hold of a model."""
    return digest_tensors(_held(model), exact=True)


def _held(model: nn.Module) -> Mapping[str, Tensor]:
    """The tensors that checkpoints hold: all of a model, or the trained ones with an adapter."""
    return trainable(model) if is_peft_model(model) else tensors_of(model)


def digest_frozen(model: nn.Module) -> str | None:
    """A digest of all weights that an adapter's checkpoint does not hold; None without adapters."""
    if not is_peft_model(model):
        return None
    held = saved_names(model)
    return digest_tensors({name: t for name, t in tensors_of(model).items() if name not in held})


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors in a model's state, in which modules may keep other objects."""
    return {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}


def _computed(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that decides what the model computes."""
    return {
        key: _computed(value) if isinstance(value, dict) else value
        for key, value in json.loads(json.dumps(config, default=str)).items()
        if not (key.startswith("_") or key in _NOT_COMPUTED)
    }


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return digest_rows([tokenizer.get_vocab(), getattr(tokenizer, "chat_template", None), special])


def check_same_run(
    path: Path, state: Mapping[str, Any], run: RunIdentity, *, config: GRAOConfig, scores: bool
) -> None:
    """Refuse a checkpoint of other data, another reward or objective; log which options changed.

    scores: whether the reward scores anything in training; else it may be another one, or none.

    Raises:
        CheckpointError: it is of another format; or it names what differs, and both sides.
    """
    written = state.get("format", 1)
    if written != FORMAT:
        raise CheckpointError(
            f"checkpoint {str(path)!r} is of format {written}, and this version of grao-fast reads "
            f"{FORMAT}: resume with the version that wrote it, or start anew in another output_dir"
        )
    if state["run"]["data"] != run.data:
        raise CheckpointError(
            f"checkpoint {str(path)!r} was written on another dataset (digest "
            f"{state['run']['data']}, now {run.data}); resume with the dataset of that run"
        )
    objectives = [split_objective(each)[0] for each in (_objective(state), config.objective)]
    if objectives[0] != objectives[1]:
        raise _other(path, "the objective", *objectives)
    if scores and state["run"]["reward"] != run.reward:
        both = (", ".join(names) or "none" for names in (state["run"]["reward"], run.reward))
        raise _other(path, "the reward", *both)
    if config.max_steps > 0:
        check_steps(path, state["step"], config.max_steps)
    now = json.loads(json.dumps(config.to_dict()))
    before = {"objective": _objective(state)} | state["config"]
    changed = [key for key, value in now.items() if before.get(key) != value]
    if changed:
        logger.warning("resuming with other options than the checkpoint's: %s", ", ".join(changed))


def _objective(state: Mapping[str, Any]) -> str:
    """The objective that a checkpoint was trained by; the option was not always there."""
    return state["config"].get("objective", "grao")


def check_steps(path: Path, done: int, total: int) -> None:
    """Refuse a run that would end before the checkpoint's step."""
    if done > total:
        raise CheckpointError(
            f"checkpoint {str(path)!r} has done {done} steps, and this run has {total}: raise "
            "max_steps (or num_train_epochs), or resume from an earlier checkpoint"
        )


def check_same_policy(
    path: Path, state: Mapping[str, Any], policy: PolicyIdentity, *, as_far: bool
) -> None:
    """Refuse a checkpoint of another model, adapter or tokenizer, or that trains other parameters.

    as_far: the model already has the checkpoint's weights (it is the same object again, or was
        loaded from the checkpoint's folder), so its weights need not be those the run began with.

    Raises:
        CheckpointError: names what differs, and both sides.
    """
    now, before = json.loads(json.dumps(asdict(policy))), state["policy"]
    _check_adapters(path, before["adapters"], now["adapters"])
    _check_trained(path, before["trained"], now["trained"])
    _check_options(path, "the model's configuration", before["config"], now["config"])
    if before["tokenizer"] != now["tokenizer"]:
        sides = (f"of digest {side['tokenizer']}" for side in (before, now))
        raise _other(path, "the tokenizer, or its chat template,", *sides)
    # An adapter's first weights are random and replaced by the checkpoint's; `check_base` compares
    # its base.
    if not now["adapters"] and before["start"] != now["start"] and not as_far:
        sides = (f"{side['model']} (weights of digest {side['start']})" for side in (before, now))
        raise _other(path, "the model that training began with", *sides)


def check_base(path: Path, state: Mapping[str, Any], loaded: LoadedPolicy) -> None:
    """Refuse a checkpoint, once loaded, whose adapter was trained on another base.

    Raises:
        CheckpointError: names both.
    """
    kind = "weights"
    before, now = state["policy"]["base"], loaded.base_digest
    if before is None or now is None:
        kind, before, now = "frozen weights", state["frozen"], digest_frozen(loaded.model)
    if before != now:
        both = ((state["policy"]["model"], before), (_described(loaded.causal_lm), now))
        sides = (f"{model} ({kind} of digest {digest})" for model, digest in both)
        raise _other(path, "the base model", *sides)


def _check_adapters(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    if before.keys() != now.keys():
        raise _other(path, "the adapter", _named(before), _named(now))
    for name, options in before.items():
        _check_options(path, f"adapter {name!r}", options, now[name])


def _named(adapters: dict[str, Any]) -> str:
    kinds = (f"{name!r} ({options['peft_type']})" for name, options in sorted(adapters.items()))
    return ", ".join(kinds) or "none"


def _check_options(path: Path, what: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    # Options that only one version of a library has are ignored.
    changed = [key for key in before if key in now and before[key] != now[key]]
    if changed:
        sides = (", ".join(f"{key}={side[key]}" for key in changed) for side in (before, now))
        raise _other(path, what, *sides)


def _check_trained(path: Path, before: dict[str, str], now: dict[str, str]) -> None:
    alone = (
        [name for name in before if name not in now],
        [name for name in now if name not in before],
    )
    if any(alone):
        raise _other(path, "what is trained", *map(_first, alone))
    differ = [name for name in before if before[name] != now[name]]
    if differ:
        sides = (side[differ[0]] for side in (before, now))
        raise _other(path, f"what is trained, {differ[0]},", *sides)


def _first(names: list[str]) -> str:
    return f"with {first_of(names)}" if names else "without"


def _other(path: Path, what: str, before: str, now: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {str(path)!r} is of another run: {what} was {before}, and is {now} here; "
        "resume with what that run had, or start anew in another output_dir"
    )
