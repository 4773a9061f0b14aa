"""`RewardModel`: a sequence classifier that scores completions."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grao_fast.data.examples import Example
from grao_fast.distributed.world import World
from grao_fast.models.classifier import freeze
from grao_fast.models.placement import Placement
from grao_fast.models.sharding import gathered, sharded_modules
from grao_fast.rewards.batches import Output, batches, label_values
from grao_fast.rewards.conversations import Conversations, Ids, Layout
from grao_fast.rewards.finding import RewardError
from grao_fast.rewards.model_arguments import (
    device_of,
    label_number,
    most_tokens,
    outline_of,
    read_template,
    tokenizer_of,
)
from grao_fast.rewards.placed import PlacedReward
from grao_fast.system.visible import get_logger

logger = get_logger(__name__)

TooLong = Literal["none", "cut", "error"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class RewardModel(PlacedReward):
    """A sequence classifier: the score of a completion is the value of one of its labels.

    Args:
        model: a folder or hub id of a sequence classifier; or one of Transformers as an object,
            with its tokenizer.
        label: the label whose value is the score, by number or name; None: the only one.
        output: "logit", or "probability": softmax over several labels, sigmoid of a single one, or
            where the model's problem_type is multi_label_classification. None: logit of a single
            label, probability of one among several.
        layout: how a prompt and a completion are joined: "chat" by the chat template, a prompt that
            is text being the user's turn; "joined" as one text; "pair" as the two texts of a pair.
            None: "chat" if there is a template, else "joined".
        chat_template: a Jinja template, or the path of a file with one; None: the tokenizer's.
        tokenizer: of the model, or its folder; None: the one beside the model.
        max_length: the most tokens of prompt and completion; None: as many as the model takes.
        too_long: what becomes of longer ones: "none": no reward; "cut": they lose their beginning;
            "error". A warning and the metric rewards/NAME/too_long count them.
        tokens_per_batch: tokens that are scored at once, padding included; one text that is longer
            is scored alone.
        device: "cpu", "cuda", "cuda:1"...; None: the policy's.
        dtype: "float32", "bfloat16" or "float16"; None: bfloat16 on a CUDA device that supports it,
            else float32.
        name: in metrics; None: the last part of the model's name.

    The model is looked at when this object is made, and loaded when a run begins, or when it is
    first called. With several processes it is sharded as the policy is, and each scores its share.
    Equal texts have equal scores, whatever is scored beside them.

    Raises:
        UserError: there is no such model, it is no sequence classifier (its head would be random),
            or it is an adapter or quantised.
        RewardError: another argument does not fit the model.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        *,
        label: int | str | None = None,
        output: Output | None = None,
        layout: Layout | None = None,
        chat_template: str | Path | None = None,
        tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
        max_length: int | None = None,
        too_long: TooLong = "none",
        tokens_per_batch: int = 16384,
        device: str | None = None,
        dtype: str | None = None,
        name: str | None = None,
    ) -> None:
        for argument, value, choices in (
            ("output", output, get_args(Output)),
            ("layout", layout, get_args(Layout)),
            ("too_long", too_long, get_args(TooLong)),
            ("dtype", dtype, tuple(_DTYPES)),
        ):
            if value not in choices and not (value is None and argument != "too_long"):
                raise RewardError(f"{argument} must be one of {', '.join(choices)}; got {value!r}")
        for argument, value in (("max_length", max_length), ("tokens_per_batch", tokens_per_batch)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise RewardError(f"{argument} must be a whole number above 0, got {value!r}")
        self._classifier, outline, digest = outline_of(model)
        config: Any = outline.config
        self._label = label_number(config, label)
        self._output = output or ("logit" if config.num_labels == 1 else "probability")
        loaded = tokenizer_of(tokenizer, self._classifier)
        if chat_template is not None:
            loaded = copy.copy(loaded)
            loaded.chat_template = read_template(chat_template)
        if layout == "chat" and not loaded.chat_template:
            raise RewardError(
                'layout="chat" needs a chat template, which the tokenizer lacks: pass '
                "chat_template=..."
            )
        layout = layout or ("chat" if loaded.chat_template else "joined")
        self._conversations = Conversations(loaded, layout)
        self._max_length = most_tokens(config, loaded, max_length)
        self._too_long, self._tokens_per_batch = too_long, tokens_per_batch
        self._device, self._dtype = device, dtype
        self._model: Any = None if self._classifier else outline
        self._world: World | None = None  # for which it was placed
        self._gathered = False
        self._lock = threading.Lock()
        if name is None:
            name = Path(outline.name_or_path).name or type(outline).__name__
        settings = {"weights": digest, "label": self._label, "output": self._output,
                    "layout": layout, "max_length": self._max_length}  # fmt: skip
        takes = ["prompts", "completions"]
        super().__init__(name, takes=takes, settings=settings, counts=["too_long"])

    def check(self, examples: Sequence[Example]) -> None:
        """See `NamedReward.check`. The first prompt stands for all."""
        for example in examples[:1]:
            self._conversations.ids([example.prompt], ["a"])

    def place(self, placement: Placement) -> None:
        """See `PlacedReward.place`."""
        world, device, classifier = placement.world, self._on(placement), self._classifier
        shards = placement.sharding != "none" and device.type == placement.device.type
        if classifier is None or not shards:
            world.together(lambda: self._hold(self._whole(device)))
        elif self._world is not world:
            self._model = None  # frees it before the next is loaded
            self._hold(classifier.load_sharded(device, self._dtype_on(device), placement))
        self._world = world

    @contextmanager
    def ready(self) -> Iterator[None]:
        """See `PlacedReward.ready`."""
        if self._model is None:
            yield
            return
        with gathered(self._model):
            self._gathered = True
            try:
                yield
            finally:
                self._gathered = False

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        """Score completions."""
        ids = self._conversations.ids(prompts, completions)
        limit = self._max_length
        long = 0 if limit is None else sum(len(each.tokens) > limit for each in ids)
        if long:
            self.counts["too_long"] += long
            self._tell(long, len(ids))
        fitting = [self._fitted(each) for each in ids]
        with self._lock:
            scores = self._scores(list(dict.fromkeys(each for each in fitting if each)))
        return [None if each is None else scores[each] for each in fitting]

    def _tell(self, long: int, count: int) -> None:
        if self._too_long == "error":
            raise RewardError(
                f"reward {self.__name__}: {long} of {count} conversations have more than "
                f"{self._max_length} tokens: lower max_new_tokens or max_prompt_length, or set "
                'too_long="none" or "cut"'
            )
        logger.warning(
            "reward %s: %d of %d conversations have more than %d tokens, and %s",
            self.__name__, long, count, self._max_length,
            "have no reward" if self._too_long == "none" else "are scored without their beginning",
        )  # fmt: skip

    def _fitted(self, ids: Ids) -> Ids | None:
        """The ids that are scored; None: there are too many."""
        if self._max_length is None or len(ids.tokens) <= self._max_length:
            return ids
        if self._too_long == "none":
            return None
        kinds = None if ids.kinds is None else ids.kinds[-self._max_length :]
        return Ids(ids.tokens[-self._max_length :], kinds)

    def _scores(self, texts: Sequence[Ids]) -> dict[Ids, float]:
        """The scores of different texts."""
        if self._model is None:
            self._hold(self._whole(device_of(self._device)))
        if sharded_modules(self._model) and not self._gathered:
            raise RewardError(
                f"reward {self.__name__} is sharded over the processes of a run, and scores within "
                "it alone: make another RewardModel"
            )
        scores: dict[Ids, float] = {}
        for batch in batches(texts, self._tokens_per_batch):
            values_SL = label_values(self._model, batch, output=self._output)
            scores.update(zip(batch, values_SL[:, self._label].tolist(), strict=True))
        return scores

    def _whole(self, device: torch.device) -> Any:
        """The model, not sharded, on a device."""
        if self._model is not None and not sharded_modules(self._model):
            return self._model.to(device)
        assert self._classifier is not None  # a model that was given is there, and never sharded
        return self._classifier.load(device, self._dtype_on(device))

    def _hold(self, model: Any) -> None:
        freeze(model)
        model.config.get_text_config().use_cache = False
        self._model = model

    def _on(self, placement: Placement) -> torch.device:
        """The device beside a policy."""
        if self._device is None:
            return placement.device
        if placement.world.size > 1 and ":" in self._device:
            raise RewardError(
                f"device={self._device!r} of reward {self.__name__} would put all "
                f'{placement.world.size} reward models on one GPU: leave it out, or set "cpu"'
            )
        device, beside = device_of(self._device), placement.device
        return beside if device.type == beside.type and device.index is None else device

    def _dtype_on(self, device: torch.device) -> torch.dtype:
        if self._dtype is not None:
            return _DTYPES[self._dtype]
        halves = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if halves else torch.float32
