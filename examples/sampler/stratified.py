"""A sampler whose G completions of a prompt begin apart: stratified sampling of the first token.

    python examples/sampler/stratified.py --model MODEL --data problems.jsonl --output run

Independent samples often begin alike, and then end alike, with equal rewards that teach nothing.
Here the random numbers of the first token are spread evenly over [0, 1), in a random order. A
completion is still drawn from the policy, exactly as without it, so that its log-probs and GRAO's
objective hold; only completions of one prompt depend on each other.
"""

from __future__ import annotations

import argparse

import torch
from transformers import DynamicCache

import grao_fast
from grao_fast.models.policy import Policy
from grao_fast.sampling import Completion, OnGroup
from grao_fast.sampling.cache import cache_name


class StratifiedSampler:
    """A `grao_fast.sampling.Sampler` over the policy's own model, one prompt at a time."""

    context_length = None  # the model's

    def sync(self, policy: Policy) -> None:
        """Take the policy's model, which is trained in place: there are no weights to copy."""
        self.model = policy.causal_lm
        ends = self.model.generation_config.eos_token_id
        self.eos_token_ids = set(ends) if isinstance(ends, list) else {ends}

    @torch.no_grad()
    def sample(
        self,
        prompts: list[list[int]],
        *,
        num_generations: int,
        max_new_tokens: int,
        temperature: float,
        seeds: list[int],
        on_group: OnGroup | None = None,
    ) -> list[list[Completion]]:
        """Sample completions of every prompt, from a generator of its own."""
        training = self.model.training
        self.model.eval()
        groups = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            generator = torch.Generator().manual_seed(seed)
            groups.append(
                self._group(prompt, num_generations, max_new_tokens, temperature, generator)
            )
            if on_group is not None:  # a slow reward may score it while the next are sampled
                on_group(len(groups) - 1, groups[-1])
        self.model.train(training)
        return groups

    def _group(
        self,
        prompt: list[int],
        num_generations: int,
        max_new_tokens: int,
        temperature: float,
        generator: torch.Generator,
    ) -> list[Completion]:
        """The completions of one prompt, which is read once for all of them."""
        G = num_generations
        cache = DynamicCache(config=self.model.config)
        logits = self._next_logits([prompt], cache)
        cache.batch_repeat_interleave(G)
        logits = logits.repeat_interleave(G, dim=0)
        tokens: list[list[int]] = [[] for _ in range(G)]
        logprobs: list[list[float]] = [[] for _ in range(G)]
        live = set(range(G))
        for step in range(max_new_tokens):
            u_G = torch.rand(G, generator=generator, dtype=torch.float64)
            if step == 0:
                u_G = (torch.randperm(G, generator=generator) + u_G) / G
            token_G, logprob_G = draw(logits, temperature, u_G.to(logits.device))
            for g in sorted(live):
                tokens[g].append(token_G[g])
                logprobs[g].append(logprob_G[g])
                if token_G[g] in self.eos_token_ids:
                    live.remove(g)
            if not live or step + 1 == max_new_tokens:
                break
            logits = self._next_logits([[token] for token in token_G], cache)
        return [
            Completion(token_ids=tokens[g], logprobs=logprobs[g], finished=g not in live)
            for g in range(G)
        ]

    def _next_logits(self, token_ids: list[list[int]], cache: DynamicCache) -> torch.Tensor:
        """Read tokens into the cache; returns the logits (B, V) behind the last."""
        ids = torch.tensor(token_ids, device=self.model.device)
        read = {cache_name(self.model): cache, "use_cache": True, "logits_to_keep": 1}
        return self.model(input_ids=ids, **read).logits[:, -1].float()


def draw(
    logits_GV: torch.Tensor, temperature: float, u_G: torch.Tensor
) -> tuple[list[int], list[float]]:
    """Return each row's token by inverse-transform sampling, and its log-prob as it was sampled.

    temperature 0 takes the likeliest token; its log-prob is then at temperature 1.
    """
    logprob_GV = torch.log_softmax(logits_GV.double() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        token_G = logprob_GV.argmax(-1)
    else:
        cumulative_GV = logprob_GV.exp().cumsum(-1)
        point_G1 = ((1 - u_G) * cumulative_GV[:, -1]).unsqueeze(1)
        token_G = torch.searchsorted(cumulative_GV, point_G1).squeeze(1)
        token_G = token_G.clamp(max=logits_GV.shape[1] - 1)
    return token_G.tolist(), logprob_GV.gather(1, token_G[:, None]).squeeze(1).tolist()


def correct(completions: list, answer: list[str]) -> list[float]:
    """1 where a completion ends with its row's answer, else 0."""
    texts = [turns if isinstance(turns, str) else turns[-1]["content"] for turns in completions]
    return [float(text.strip().endswith(right)) for text, right in zip(texts, answer, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--data", required=True, help="rows with prompt, reference and answer")
    parser.add_argument("--output", default="stratified-run")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    arguments = parser.parse_args()

    result = grao_fast.train(
        model=arguments.model,
        dataset=arguments.data,
        reward=correct,
        sampler=StratifiedSampler(),
        config=grao_fast.GRAOConfig(
            prompts_per_step=4,
            max_new_tokens=arguments.max_new_tokens,
            max_steps=arguments.steps,
            temperature=1.0,
        ),
        output_dir=arguments.output,
    )
    print(f"{result.steps} steps; groups with equal rewards: {result.metrics['frac_dead']:.2f}")


if __name__ == "__main__":
    main()
