"""The arguments of a reward model, read and compared with the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grao_fast.models.classifier import Classifier
from grao_fast.rewards.finding import RewardError

_UNLIMITED = 10**9  # tokenizers without a limit have a larger one


def outline_of(model: Any) -> tuple[Classifier | None, PreTrainedModel, str | None]:
    """A named classifier, its outline and a digest of its head; of an object, only itself."""
    if isinstance(model, (str, Path)):
        classifier = Classifier.named(model)
        outline = classifier.outline()
        return classifier, outline, classifier.head_digest(outline)
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel) or "SequenceClassification" not in kind:
        raise RewardError(
            "model must be a folder, a hub id or a model of AutoModelForSequenceClassification, "
            f"got {kind}"
        )
    return None, model, None


def label_number(config: Any, label: int | str | None) -> int:
    """The number of the label that is asked for; of a single one, 0."""
    names = [str(config.id2label.get(n, n)) for n in range(config.num_labels)]
    if label is None and len(names) == 1:
        return 0
    if isinstance(label, str) and label in names:
        return names.index(label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(names):
        return label
    listed = ", ".join(f"{n} ({name})" for n, name in enumerate(names))
    problem = "label must be chosen" if label is None else f"there is no label {label!r}"
    raise RewardError(f"{problem}: the reward model has {listed}")


def tokenizer_of(
    tokenizer: PreTrainedTokenizerBase | str | Path | None, classifier: Classifier | None
) -> PreTrainedTokenizerBase:
    """The tokenizer that is given or named, or the one beside the model."""
    if isinstance(tokenizer, (str, Path)):
        return Classifier.named(tokenizer).tokenizer()
    if tokenizer is not None:
        return tokenizer
    if classifier is None:
        raise RewardError(
            "a reward model that is an object needs its tokenizer: pass tokenizer=..."
        )
    return classifier.tokenizer()


def read_template(template: str | Path) -> str:
    """A template, or what its file holds: no template is the name of a file."""
    if isinstance(template, str) and "{" in template:
        return template
    try:
        return Path(template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RewardError(f"the chat template {str(template)!r} cannot be read: {error}") from error


def most_tokens(config: Any, tokenizer: Any, asked: int | None) -> int | None:
    """The most tokens of a text: as asked for, else as many as model and tokenizer take."""
    limits = [getattr(config.get_text_config(), "max_position_embeddings", None)]
    limits += [tokenizer.model_max_length]
    limit = min((each for each in limits if each and 0 < each < _UNLIMITED), default=None)
    if asked is not None and limit is not None and asked > limit:
        raise RewardError(f"max_length={asked} is more than the {limit} tokens of the reward model")
    return limit if asked is None else asked


def device_of(name: str | None) -> torch.device:
    """The device of that name; None: CUDA if available."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise RewardError(f'device must be "cpu", "cuda" or "cuda:N"; got {name!r}') from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RewardError(f"device of a reward model is {name!r} but no CUDA device is available")
    return device
