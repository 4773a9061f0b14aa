"""Token ids of prompts with completions, as a reward model reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2.exceptions import TemplateError

from grao_fast.data.fields import Messages
from grao_fast.rewards.named import texts_of
from grao_fast.system.errors import UserError, explained

Layout = Literal["chat", "joined", "pair"]

# What a template, or Transformers around it, raises for messages that it cannot render.
_REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)


@dataclass(frozen=True)
class Ids:
    """Token ids of one text.

    kinds: of each token, 0 in the first text of a pair and 1 in the second; None: no such kinds.
    """

    tokens: tuple[int, ...]
    kinds: tuple[int, ...] | None = None


class Conversations:
    """Renders and tokenises prompts with completions.

    layout: "chat", by the tokenizer's chat template: a prompt that is text is the user's turn;
        "joined": the text of the prompt followed by that of the completion; "pair": both as the
        two texts of a pair, as the tokenizer joins these.
    """

    def __init__(self, tokenizer: Any, layout: Layout) -> None:
        self.tokenizer, self.layout = tokenizer, layout

    def ids(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[Ids]:
        """Token ids, not cut. Raises UserError for messages that cannot be rendered."""
        if not prompts:
            return []
        options = {"verbose": False, "return_attention_mask": False}
        if self.layout == "chat":
            texts = [self.render(*both) for both in zip(prompts, completions, strict=True)]
            encoded = self.tokenizer(texts, add_special_tokens=False, **options)
        else:
            firsts = [self._text(prompt) for prompt in prompts]
            seconds = texts_of(completions)
            if self.layout == "joined":
                joined = [first + second for first, second in zip(firsts, seconds, strict=True)]
                encoded = self.tokenizer(joined, **options)
            else:
                encoded = self.tokenizer(firsts, seconds, **options)
        kinds = encoded.get("token_type_ids") or [None] * len(prompts)
        return [
            Ids(tuple(tokens), None if kind is None else tuple(kind))
            for tokens, kind in zip(encoded["input_ids"], kinds, strict=True)
        ]

    def render(self, prompt: str | Messages, completion: str | Messages) -> str:
        """The conversation in the words of the chat template."""
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        turns = completion
        if isinstance(turns, str):
            turns = [{"role": "assistant", "content": turns}]
        if prompt[-1]["role"] == "assistant" and turns:  # the completion continues that turn
            content = prompt[-1].get("content", "") + (turns[0].get("content") or "")
            turns = [{**prompt[-1], **turns[0], "content": content}, *turns[1:]]
            prompt = prompt[:-1]
        with explained("the reward model's chat template cannot render a prompt", *_REFUSALS):
            return str(self.tokenizer.apply_chat_template([*prompt, *turns], tokenize=False))

    def _text(self, prompt: str | Messages) -> str:
        if isinstance(prompt, str):
            return prompt
        raise UserError(
            f"prompts are messages, which the reward model's layout {self.layout!r} cannot join: "
            'pass chat_template=..., and layout="chat"'
        )
