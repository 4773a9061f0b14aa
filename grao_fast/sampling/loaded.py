"""A policy that is ready for training or sampling, with its tokenizer and its sampler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grao_fast.config import SamplingOptions
from grao_fast.data.decoding import completion_texts, ending_ids
from grao_fast.data.encoding import Encoded, Limits, encode_examples
from grao_fast.data.examples import Example
from grao_fast.data.streaming import StreamedExamples, draw_prompts
from grao_fast.models.beginning import Beginning
from grao_fast.models.policy import Policy
from grao_fast.models.sharding import gathered
from grao_fast.sampling import Completion, ConcurrentSampler, Sampler
from grao_fast.sampling.model_sampler import ModelSampler
from grao_fast.sampling.seeds import prompt_seeds


@dataclass(eq=False)
class LoadedPolicy:
    """A policy with its tokenizer, its sampler, and what it began as.

    eos_token_ids: tokens that end a completion.
    beginning: the trainable parameters as training began, for the KL term, and to resume where an
        adapter has altered its base; None where neither needs them.
    base_digest: of the base model before an adapter's first weights altered it; None: they did not,
        or it is unknown.
    """

    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: frozenset[int]
    sampler: Sampler
    beginning: Beginning | None = None
    base_digest: str | None = None
    _stale: bool = field(default=True, init=False, repr=False)  # the sampler's weights

    @property
    def model(self) -> nn.Module:
        """The model as it is trained and saved; a PeftModel where an adapter is trained."""
        return self.policy.model

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The Transformers model inside `model`."""
        return self.policy.causal_lm

    @property
    def context_length(self) -> int | None:
        """Tokens of a prompt and its completion that model and sampler hold; None: unlimited."""
        limits = (self.policy.context_length, self.sampler.context_length)
        return min(filter(None, limits), default=None)

    @property
    def embedding_rows(self) -> int:
        """Tokens that the model can read and write; its tokenizer may know more."""
        model: Any = self.causal_lm
        embeddings = model.get_input_embeddings(), model.get_output_embeddings()
        return min(embedding.weight.shape[0] for embedding in embeddings)

    def encode(
        self,
        examples: Sequence[Example] | StreamedExamples,
        sampling: SamplingOptions,
        *,
        trained: bool = True,
    ) -> Sequence[Encoded]:
        """Token ids of examples that fit model and sampler; see `encode_examples`.

        Those to train on are encoded as they are drawn; see `grao_fast.data.prompts`.
        """
        limits = Limits(
            max_new_tokens=sampling.max_new_tokens,
            context_length=self.context_length,
            max_prompt_length=sampling.max_prompt_length,
            max_reference_length=sampling.max_reference_length,
            embedding_rows=self.embedding_rows,
            samples_drawn=sampling.samples_drawn or not trained,
        )
        ends = self.eos_token_ids
        if trained:
            return draw_prompts(examples, self.tokenizer, limits, eos_token_ids=ends)
        assert not isinstance(examples, StreamedExamples), "streaming datasets are trained on"
        return encode_examples(examples, self.tokenizer, limits, eos_token_ids=ends, trained=False)

    def decode(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Completion]
    ) -> list[str]:
        """Texts of completions, each behind its own prompt; see `completion_texts`."""
        ids = [completion.token_ids for completion in completions]
        return completion_texts(self.tokenizer, prompts, ids, self._ending_ids)

    @cached_property
    def _ending_ids(self) -> frozenset[int]:
        return ending_ids(self.tokenizer, self.eos_token_ids)

    def changed(self) -> None:
        """Note that the policy's weights are no longer the sampler's."""
        self._stale = True

    def sync(self) -> None:
        """Give the sampler the policy's weights unless it has them. Every process must call it.

        `answer` and `complete` do so themselves; only what uses `sampler` directly needs it.
        """
        if self._stale:
            self.sampler.sync(self.policy)
            self._stale = False

    @contextmanager
    def ready_to_sample(self) -> Iterator[None]:
        """A context in which the sampler needs no other process: all must enter it together."""
        if self.policy.world.size > 1 and isinstance(self.sampler, ConcurrentSampler):
            self.sampler.recover()
        with gathered(self.causal_lm) if isinstance(self.sampler, ModelSampler) else nullcontext():
            yield

    def answer(self, prompts: list[list[int]], *, max_new_tokens: int, seed: int) -> list[str]:
        """The policy's greedy completion of every prompt, as text. Every process must call it."""
        texts = self.complete(
            prompts, num_generations=1, temperature=0.0, max_new_tokens=max_new_tokens, seed=seed
        )
        return [text for (text,) in texts]

    def complete(
        self,
        prompts: list[list[int]],
        *,
        num_generations: int,
        temperature: float,
        max_new_tokens: int,
        seed: int,
    ) -> list[list[str]]:
        """Completions of every prompt by the policy as it is now, as texts.

        Every process must call it. What is sampled for a prompt depends on `seed` and its place,
        not on the other prompts.
        """
        self.sync()
        seeds = prompt_seeds(seed, len(prompts))

        def complete_own(places: Sequence[int]) -> list[list[str]]:
            own = [prompts[place] for place in places]
            groups = self.sampler.sample(
                own,
                num_generations=num_generations,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seeds=[seeds[place] for place in places],
            )
            return [
                self.decode([prompt] * len(group), group)
                for prompt, group in zip(own, groups, strict=True)
            ]

        with self.ready_to_sample():
            return self.policy.world.map(complete_own, range(len(prompts)))
