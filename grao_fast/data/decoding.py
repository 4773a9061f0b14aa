"""Decodes the token ids of samples and references into the text that rewards score."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, cast

from grao_fast.data.chat import Chat, TemplateRefusal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A completion is decoded after this many last tokens of its prompt. One token decides whether the
# first word keeps its space; four hold most characters that are several byte tokens.
_CONTEXT = 4


def ending_ids(
    tokenizer: PreTrainedTokenizerBase, eos_token_ids: Collection[int]
) -> frozenset[int]:
    """Tokens that end a completion, and those that end an assistant's turn in the chat template.

    The template of a base model may end turns with a token that is not among the model's
    end-of-sequence tokens. A completion then runs on past it, usually to the tokenizer's EOS.
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
    """Decode completions without the tokens of `end_ids` at their end.

    Rewards see this text, of samples and references alike. Other special tokens, such as `<think>`
    and the tags of tool calls, stay in it. A completion is decoded after the end of its prompt, so
    that its first word keeps the space that SentencePiece drops at the start of a text.
    """
    contexts = [tuple(prompt[-_CONTEXT:]) for prompt in prompts]
    before = _decode_distinct(tokenizer, contexts)
    # if the context starts inside a character, decode after the whole prompt
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
        else:  # the decoder rewrites the context too, as WordPiece turns "do not" into "don't"
            texts += _decode(tokenizer, [body])
    return texts


def _decode_distinct(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[tuple[int, ...]]
) -> dict[tuple[int, ...], str]:
    distinct = list(dict.fromkeys(ids))
    return dict(zip(distinct, _decode(tokenizer, distinct), strict=True))


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]]) -> list[str]:
    return tokenizer.batch_decode(
        [list(row) for row in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
