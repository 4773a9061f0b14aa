"""From prompts and references to token ids."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from grao_fast.fields import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 1024


def encode_prompts(
    prompts: Sequence[str | Messages], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Text as it is, messages through the chat template with the generation prompt."""
    ids: list[list[int]] = [[] for _ in prompts]
    texts = {n: prompt for n, prompt in enumerate(prompts) if isinstance(prompt, str)}
    chats = {
        n: _render(n, prompt, tokenizer)
        for n, prompt in enumerate(prompts)
        if not isinstance(prompt, str)
    }
    encoded = _encode(tokenizer, list(texts.values()), add_special_tokens=True)
    for (n, text), prompt_ids in zip(texts.items(), encoded, strict=True):
        # Some tokenizers close every text with an EOS; nothing could follow such a prompt.
        closed = prompt_ids and prompt_ids[-1] == tokenizer.eos_token_id
        if closed and not text.endswith(str(tokenizer.eos_token)):
            prompt_ids = prompt_ids[:-1]
        ids[n] = prompt_ids
    # The template writes BOS itself.
    encoded = _encode(tokenizer, list(chats.values()), add_special_tokens=False)
    for n, prompt_ids in zip(chats, encoded, strict=True):
        ids[n] = prompt_ids
    return ids


def encode_references(
    references: Sequence[str | None],
    tokenizer: PreTrainedTokenizerBase,
    *,
    end_ids: Sequence[int],
    max_length: int | None,
) -> list[list[int]]:
    """Text and its end_ids, cut to max_length; empty where the reference is absent."""
    ids: list[list[int]] = [[] for _ in references]
    texts = {n: text for n, text in enumerate(references) if text is not None}
    encoded = _encode(tokenizer, list(texts.values()), add_special_tokens=False)
    for n, reference_ids in zip(texts, encoded, strict=True):
        ids[n] = [*reference_ids, end_ids[n]][:max_length]
    return ids


def end_of_turn(tokenizer: PreTrainedTokenizerBase, eos_token_ids: Collection[int]) -> int:
    """The end-of-sequence token that the chat template writes behind an assistant's turn.

    Gemma and Phi-3 end a turn with another token than the tokenizer's eos_token; a model samples
    the former. The tokenizer's own where the template writes none.
    """
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    (ids,) = _encode(tokenizer, [text], add_special_tokens=False)
    written = [token for token in ids if token in eos_token_ids]
    return written[-1] if written else tokenizer.eos_token_id


def _render(n: int, prompt: Messages, tokenizer: PreTrainedTokenizerBase) -> str:
    from jinja2.exceptions import TemplateError

    if tokenizer.chat_template is None:
        raise ValueError(
            f"example {n}: the prompt is a list of messages, and the tokenizer has no chat "
            "template: set tokenizer.chat_template, or give the prompts as text"
        )
    try:
        return str(
            tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        )
    except TemplateError as error:
        raise ValueError(f"example {n}: the chat template refuses the prompt: {error}") from error


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], *, add_special_tokens: bool
) -> list[list[int]]:
    ids: list[list[int]] = []
    for start in range(0, len(texts), _BATCH):
        # verbose=False: the tokenizer's own warning about length names no row; ours is an error.
        batch = tokenizer(
            texts[start : start + _BATCH],
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            verbose=False,
        )
        ids += batch["input_ids"]
    return ids
