"""Turns examples into token ids that fit the model, or says which example does not and why."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from grao_fast.data.encoder import Encoder, TokenIds
from grao_fast.data.examples import Example
from grao_fast.system.errors import UserError, first_of
from grao_fast.system.visible import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = get_logger(__name__)


@dataclass(frozen=True)
class Encoded:
    """An example as token ids.

    reference_ids: empty if the example has no reference.
    reference_text: the reference as its tokens decode, the text that rewards see; None without one.
    """

    example: Example
    prompt_ids: list[int]
    reference_ids: list[int]
    reference_text: str | None

    @property
    def scored(self) -> Example:
        """The example for rewards, whose reference is `reference_text`."""
        return replace(self.example, reference=self.reference_text)


@dataclass(frozen=True)
class Limits:
    """What the tokens of an example must fit.

    max_new_tokens: tokens sampled after a prompt.
    context_length: tokens that the model can hold, prompt and continuation; None: no limit.
    max_prompt_length: longer prompts are dropped, with a warning; None: none is dropped.
    max_reference_length: longer references are cut; None: none is cut.
    embedding_rows: the size of the model's embedding, which no token id may reach; None: any may.
    """

    max_new_tokens: int
    context_length: int | None = None
    max_prompt_length: int | None = None
    max_reference_length: int | None = None
    embedding_rows: int | None = None


def check_templates(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError for examples that the chat template refuses; needs no model."""
    Encoder(tokenizer).check(
        [example.prompt for example in examples], [example.reference for example in examples]
    )


def encode_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    *,
    eos_token_ids: Collection[int] = (),
    trained: bool = True,
) -> list[Encoded]:
    """Tokenise examples and check that they fit the model.

    Messages go through the tokenizer's chat template, see `grao_fast.data.chat`; text is tokenised
    as it is. See `Encoder` for references.

    Args:
        eos_token_ids: all tokens that end a completion of the model.
        trained: False if the model does not read the references: they are neither cut nor checked.

    Raises:
        ValueError: the tokenizer has no EOS or chat template; the template refuses a prompt or
            reference, or it does not fit the model (the message names the example, counted from 0,
            and what to set); no example is left.
    """
    if not examples:
        raise UserError("there are no examples to encode")
    if limits.context_length is not None and limits.max_new_tokens >= limits.context_length:
        raise UserError(
            f"max_new_tokens={limits.max_new_tokens} leaves no room for a prompt in the model's "
            f"context of {limits.context_length} tokens: lower it"
        )
    cut_to = limits.max_reference_length if trained else None
    encoder = Encoder(tokenizer, eos_token_ids, max_reference_length=cut_to)
    ids = encoder.encode(
        [example.prompt for example in examples], [example.reference for example in examples]
    )
    encoder.report()
    if limits.embedding_rows is not None:
        check_tokens(ids, tokenizer, limits.embedding_rows, references=trained)
    encoded = []
    for index, (example, of_example) in enumerate(zip(examples, ids, strict=True)):
        if _is_kept(index, of_example, limits, trained):
            text = of_example.text if of_example.reference else None
            encoded.append(Encoded(example, of_example.prompt, of_example.reference, text))
    if len(encoded) < len(examples):
        logger.warning(
            "dropped %d of %d prompts of more than max_prompt_length=%d tokens",
            len(examples) - len(encoded), len(examples), limits.max_prompt_length,
        )  # fmt: skip
    if not encoded:
        raise UserError(
            f"none of {len(examples)} prompts has at most max_prompt_length="
            f"{limits.max_prompt_length} tokens: the shortest has "
            f"{min(len(of_example.prompt) for of_example in ids)}; raise it"
        )
    return encoded


def check_tokens(
    ids: Sequence[TokenIds],
    tokenizer: PreTrainedTokenizerBase,
    embedding_rows: int,
    *,
    references: bool,
) -> None:
    """Raise UserError for token ids beyond the model's embedding, as of a tokenizer that grew."""
    largest = [
        max([*each.prompt, *(each.reference if references else ())], default=0) for each in ids
    ]
    beyond = [index for index, token in enumerate(largest) if token >= embedding_rows]
    if beyond:
        token = largest[beyond[0]]
        raise UserError(
            f"example {first_of(beyond)} of {len(ids)}: token {token}, "
            f"{tokenizer.convert_ids_to_tokens(token)!r}, is beyond the model's embedding of "
            f"{embedding_rows} rows: call model.resize_token_embeddings({len(tokenizer)}) and save "
            "the model, or use the tokenizer that belongs to it"
        )


def _is_kept(index: int, ids: TokenIds, limits: Limits, trained: bool) -> bool:
    """Whether a prompt is short enough to be kept; raises ValueError if a kept one does not fit."""
    prompt, reference = len(ids.prompt), len(ids.reference) if trained else 0
    if limits.max_prompt_length is not None and prompt > limits.max_prompt_length:
        return False
    if prompt == 0:
        raise UserError(f"example {index}: the prompt has no tokens")
    context, new = limits.context_length, limits.max_new_tokens
    if context is not None and prompt + new > context:
        raise UserError(
            f"example {index}: a prompt of {prompt} tokens and max_new_tokens={new} do not fit the "
            f"model's context of {context}: lower max_new_tokens, or set "
            f"max_prompt_length={context - new} to drop such prompts"
        )
    if context is not None and prompt + reference > context:
        raise UserError(
            f"example {index}: a prompt of {prompt} tokens and a reference of {reference} do not "
            f"fit the model's context of {context}: set max_reference_length={new} to cut "
            "references"
        )
    return True
