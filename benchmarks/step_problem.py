"""Inputs of the benchmark of a whole step: a model, prompts, completions and their rewards.

Everything is made here from a seed: no download. Suffixes: N prompts, G samples, K = G + 1
sequences of a prompt with the reference last.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grao_fast.kernels import group_advantages

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from grao_fast.training.rollout import Rollout

PAD, EOS = 0, 1
FIRST = 2  # the first token that is neither
DEAD_REWARD = 0.5
NEVER = -1e4  # a logit

# Qwen3 from its config, random weights. "cuda" is Qwen3-0.6B, and "attention" has heads like it.
MODELS: dict[str, dict[str, int]] = {
    "tiny": {"vocab": 211, "width": 32, "layers": 2, "heads": 4, "kv": 2, "head": 8, "mlp": 64},
    "cpu": {"vocab": 4096, "width": 192, "layers": 4, "heads": 6, "kv": 2, "head": 32, "mlp": 512},
    "attention": {
        "vocab": 512,
        "width": 256,
        "layers": 4,
        "heads": 16,
        "kv": 8,
        "head": 128,
        "mlp": 512,
    },
    "cuda": {
        "vocab": 151936,
        "width": 1024,
        "layers": 28,
        "heads": 16,
        "kv": 8,
        "head": 128,
        "mlp": 3072,
    },
}


@dataclass(frozen=True)
class Case:
    """A batch of groups, whose lengths are spread evenly from 1/2 to 3/2 of their means.

    prompts, samples: N and G.
    prompt_tokens, response_tokens: mean lengths; a reference is as long as a response.
    dead: share of groups whose rewards are all equal.
    """

    prompts: int
    samples: int
    prompt_tokens: int
    response_tokens: int
    dead: float = 0.0

    @property
    def longest_response(self) -> int:
        return self.response_tokens + self.response_tokens // 2

    def replace(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)


def make_model(
    size: str, device: str, *, mean_length: float | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a Qwen3 of `MODELS[size]` and a tokenizer to match, the same at every call.

    mean_length: give the head a bias that makes each sampled token an EOS with a chance of about
        1 / mean_length, or never where it is inf; None: no bias, as Qwen3 has none.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    s = MODELS[size]
    config = Qwen3Config(
        vocab_size=s["vocab"],
        hidden_size=s["width"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"],
        num_key_value_heads=s["kv"],
        head_dim=s["head"],
        intermediate_size=s["mlp"],
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3ForCausalLM(config)
    if mean_length is not None:
        bias_V = torch.zeros(s["vocab"], device=device)
        odds = 1 / (mean_length - 1)
        bias_V[EOS] = math.log(odds * s["vocab"]) if odds else NEVER
        model.lm_head.bias = nn.Parameter(bias_V)
    return model, _tokenizer(s["vocab"])


def _tokenizer(vocab: int) -> PreTrainedTokenizerBase:
    """Return a tokenizer of words w2, w3, ..., one token each."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(FIRST, vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    )


def make_prompts(case: Case, vocab: int, *, seed: int = 0) -> list[list[int]]:
    """Return N prompts of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = _lengths(case.prompts, case.prompt_tokens, generator)
    return [_tokens(length, vocab, generator) for length in lengths]


def make_rollout(case: Case, vocab: int, *, eos: int = EOS, seed: int = 0) -> Rollout:
    """Return groups of G samples and a reference with rewards, as a rollout holds them."""
    from grao_fast.data.encoding import Encoded
    from grao_fast.data.examples import Example
    from grao_fast.sampling import Completion
    from grao_fast.training.rollout import Rollout

    N, K = case.prompts, case.samples + 1
    prompts = make_prompts(case, vocab, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    lengths = iter(_lengths(N * K, case.response_tokens, generator))
    sequences = [
        [[*_tokens(next(lengths) - 1, vocab, generator), eos] for _ in range(K)] for _ in range(N)
    ]
    rewards_NK = _rewards(N, K, case.dead, generator)
    return Rollout(
        prompts=[
            Encoded(Example("", "", {}), ids, group[-1], "")
            for ids, group in zip(prompts, sequences, strict=True)
        ],
        completions=[
            [Completion(ids, [math.nan] * len(ids), finished=True) for ids in group[:-1]]
            for group in sequences
        ],
        texts=[[""] * case.samples for _ in range(N)],
        rewards_NK=rewards_NK,
        advantages_NK=group_advantages(rewards_NK),
        per_function={},
        seconds={},
    )


def useful_tokens(rollout: Rollout) -> int:
    """Count the tokens of samples and references, each with its EOS, dead groups included."""
    samples = sum(len(each.token_ids) for group in rollout.completions for each in group)
    return samples + sum(len(prompt.reference_ids) for prompt in rollout.prompts)


def _lengths(count: int, mean: int, generator: torch.Generator) -> list[int]:
    """Return shuffled lengths that are spread evenly from mean / 2 to 3 mean / 2."""
    spread = torch.linspace(mean / 2, mean + mean // 2, count).round().long()
    return spread[torch.randperm(count, generator=generator)].tolist()


def _tokens(length: int, vocab: int, generator: torch.Generator) -> list[int]:
    return torch.randint(FIRST, vocab, (length,), generator=generator).tolist()


def _rewards(N: int, K: int, dead: float, generator: torch.Generator) -> Tensor:
    rewards_NK = torch.randn(N, K, generator=generator, dtype=torch.float64)
    rewards_NK[: round(dead * N)] = DEAD_REWARD
    return rewards_NK
