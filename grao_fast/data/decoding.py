"""From token ids to the text that is scored, of samples and of references."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, cast

from grao_fast.data.chat import Chat, TemplateRefusal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens of a prompt that a completion is decoded behind. One tells whether a word begins with a
# space; a few more hold most characters whose bytes are tokens.
_CONTEXT = 4


def ending_ids(
    tokenizer: PreTrainedTokenizerBase, eos_token_ids: Collection[int]
) -> frozenset[int]:
    """Tokens that end a completion, or, by the chat template, an assistant's turn.

    A base model's template may end turns with a token that is no end-of-sequence token of the
    model: a completion then goes on behind it, mostly to that token.
    """
    ends = {*eos_token_ids, cast(int, tokenizer.eos_token_id)}
    if tokenizer.chat_template is None:
        return frozenset(ends)
    chat, turn = Chat(tokenizer, ()), {"role": "user", "content": "a"}
    for messages in ([turn], [{"role": "system", "content": "a"}, turn]):
        try:
            closing = chat.closing(messages)
        except TemplateRefusal:
            continue
        ids = tokenizer(closing, add_special_tokens=False)["input_ids"]
        return frozenset(ends.union(ids) & {*ends, *tokenizer.added_tokens_decoder})
    return frozenset(ends)


def completion_texts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    end_ids: Collection[int],
) -> list[str]:
    """What completions say behind their prompts, without the tokens of `ending_ids` at their end.

    Samples and references are scored as this text. Other special tokens stay in it, `<think>` and
    the tags of tool calls among them. It is what a completion adds to its prompt's text, so that a
    first word keeps the space that SentencePiece drops at the beginning of a text.
    """
    contexts = [tuple(prompt[-_CONTEXT:]) for prompt in prompts]
    before = _decode_distinct(tokenizer, contexts)
    # a context that begins within a character gives way to the whole prompt
    torn = {context for context, text in before.items() if "\ufffd" in text}
    if torn:
        pairs = zip(prompts, contexts, strict=True)
        contexts = [tuple(prompt) if context in torn else context for prompt, context in pairs]
        before |= _decode_distinct(tokenizer, [c for c in contexts if c not in before])
    bodies = []
    for ids in completions:
        length = len(ids)
        while length and ids[length - 1] in end_ids:
            length -= 1
        bodies.append(list(ids[:length]))
    whole = _decode(tokenizer, [[*c, *b] for c, b in zip(contexts, bodies, strict=True)])
    texts = []
    for context, body, text in zip(contexts, bodies, whole, strict=True):
        prefix = before[context]
        if text.startswith(prefix):
            texts.append(text[len(prefix) :])
        else:  # a decoder that rewrites what comes before, as WordPiece's "do not" to "don't"
            texts += _decode(tokenizer, [body])
    return texts


def _decode_distinct(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[tuple[int, ...]]
) -> dict[tuple[int, ...], str]:
    distinct = list(dict.fromkeys(rows))
    return dict(zip(distinct, _decode(tokenizer, distinct), strict=True))


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]]) -> list[str]:
    return tokenizer.batch_decode(
        [list(row) for row in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
