"""Turns of a form with a real vLLM: `trl_vllm_tools_worker.py MODEL FOLDER PART... [--port PORT]`.

Run as trl_vllm_worker.py is. vLLM holds what the model says to a regular expression: a turn calls a
tool, whose arguments the model chooses, or says a few letters.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import regex
import torch
import torch.distributed as dist
from torch import Tensor
from trl_runs import TEMPERATURE, Keeper, config, run, token_ids, truth
from trl_tools import Purse, add, groups_of, rows, said, turns
from trl_vllm_worker import COLOCATED, LR, bounded, by_host, main, policies

CALL = r'<tool_call>\n\{"name": "NAME", "arguments": \{ARGUMENTS\}\}\n</tool_call>'
ADD = CALL.replace("NAME", "add").replace("ARGUMENTS", '"a": [0-9], "b": [0-9]')
PUT = CALL.replace("NAME", "put").replace("ARGUMENTS", '"amount": [1-9]')
WORDS = "a[a-f]{0,5}"
LETTERS = "([a-f]|[g-z][a-z]{3})"
STEPS = 2
# Modes of importance weights with bounds that some weights of LETTERS are beyond, and none is near.
MODES = {
    "token_mask": (0.05, 0.9),
    "sequence_mask": (0.001, 0.9),
    "sequence_truncate": (0.001, 0.9),
}


def train(
    model: Path,
    folder: Path,
    form: str,
    args: dict[str, Any],
    reference: list[dict],
    *,
    columns: dict[str, Any] | None = None,
    **options: Any,
) -> Keeper:
    """Steps of 3 groups of 2 in each process, of turns of a form."""
    given = config(
        folder,
        use_vllm=True,
        lr_scheduler_type="constant",
        max_steps=STEPS,
        max_completion_length=400,
        max_tool_calling_iterations=2,
        vllm_max_model_length=2048,
        vllm_structured_outputs_regex=form,
        ddp_backend="gloo" if "RANK" in os.environ else None,
        **args,
    )
    number = 3 * STEPS * int(os.environ.get("WORLD_SIZE", "1"))
    data = rows(reference, number=number, **columns or {})
    return run(model, given, data, lr=LR, **options)


@cache
def allowed(form: str, alphabet: tuple[str, ...], text: str) -> list[int]:
    """The tokens after which a turn that began with `text` can still be of the form."""
    pattern = regex.compile(form)
    ends = pattern.fullmatch(text) is not None
    return [
        token
        for token, letter in enumerate(alphabet)
        if (ends if letter == "<|im_end|>" else pattern.fullmatch(text + letter, partial=True))
    ]


def masses_of(trainer: Keeper, double: torch.nn.Module, sample: tuple, form: str) -> Tensor:
    """The probability of all tokens that vLLM could have sampled, at each that it did; else NaN.

    It is the importance weight of a token sampled from these alone.
    """
    prompt, ids, own = sample
    alphabet = tuple(trainer._tokenizer.convert_ids_to_tokens(range(len(trainer._tokenizer))))
    with torch.no_grad():
        logits_LV = double(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    probability_LV = (logits_LV / TEMPERATURE).softmax(1)
    found, text = [], ""
    for place, (token, sampled) in enumerate(zip(ids, own, strict=True)):
        if not sampled:
            found.append(torch.nan)
            text = ""
            continue
        found.append(float(probability_LV[place, allowed(form, alphabet, text)].sum()))
        text += alphabet[token]
    return torch.tensor(found)


def samples_of(batch: dict[str, Tensor]) -> list[tuple[list[int], list[int], list[bool]]]:
    """Prompt and completion of each row, and which tokens of the latter the model said."""
    mask_BC = batch.get("tool_mask", batch["completion_mask"]).bool()
    return [
        (prompt, ids, mask_BC[b][: len(ids)].tolist())
        for b, (prompt, ids) in enumerate(token_ids(batch))
    ]


def weight_gaps(trainer: Keeper, doubles: list, form: str) -> list[float]:
    """How far TRL's importance weights are from those of the policy, relatively, in each step.

    Infinitely far where only one of the two is 0.
    """
    gaps = []
    for (_, batch), double in zip(trainer.rollouts, doubles, strict=False):
        worst = 0.0
        for b, sample in enumerate(samples_of(batch)):
            mass_C = masses_of(trainer, double, sample, form)
            expected = bounded(trainer.args, mass_C[~mass_C.isnan()])
            ratio = batch["importance_sampling_ratio"][b]
            if len(expected) > 1:
                ratio = ratio[: len(mass_C)][~mass_C.isnan()]
            worst = max(worst, float((ratio / expected).log().nan_to_num(0.0).abs().max()))
        gaps.append(worst)
    return gaps


def gradient_gaps(trainer: Keeper, doubles: list, rewards: list[Tensor]) -> list[float]:
    """The largest error of each step's gradient, in units of its parameter's largest."""
    gaps = []
    for step, double in enumerate(doubles[:STEPS]):
        specify(double, trainer.rollouts[step][1], rewards[step])
        gaps.append(gradient_gap(trainer.gradients[step], double))
    return gaps


def gradient_gap(gradients: Iterable[Tensor], double: torch.nn.Module) -> float:
    return max(
        float((ours - p.grad).abs().max()) / max(1e-2, float(p.grad.abs().max()))
        for ours, p in zip(gradients, double.parameters(), strict=True)
    )


def specify(double: torch.nn.Module, batch: dict[str, Tensor], rewards_NK: Tensor) -> None:
    """Give a policy the specification's gradient of the rollouts of all processes."""
    batches, options = gathered(batch), {}
    groups, learned = groups_of(batches)
    rewards_NK = torch.cat(gathered(rewards_NK))
    if "importance_sampling_ratio" in batch:
        factor_T = torch.cat(factors_of(batches, learned)).double()
        logprob_T = truth(double, groups, rewards_NK, learned=learned).logprob_T.detach()
        options = {"sampler_logprob_T": logprob_T - factor_T.log()}
    double.zero_grad()
    truth(double, groups, rewards_NK, learned=learned, **options).loss.backward()


def factors_of(batches: list[dict[str, Tensor]], learned: list) -> list[Tensor]:
    """Importance weights of the tokens that are learned, in the order of groups; a reference's: 1.

    A process has whole groups here.
    """
    factors, references = [], iter([sum(group[2]) for group in learned])
    for batch in batches:
        ratio_BC = batch["importance_sampling_ratio"].expand_as(batch["completion_ids"])
        for b, (_, ids, own) in enumerate(samples_of(batch)):
            factors.append(ratio_BC[b][: len(ids)][torch.tensor(own)])
            if b % 2:
                factors.append(torch.ones(next(references)))
    return factors


def gathered(mine: Any) -> list[Any]:
    """What each process has."""
    if not dist.is_initialized():
        return [mine]
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


class Watched:
    """A reward that keeps what it scored: in each rollout samples, and then references."""

    __name__ = "said"

    def __init__(self) -> None:
        self.scored: list[list] = []

    def __call__(self, completions: list, **_: Any) -> list[float]:
        self.scored.append(completions)
        return said(completions)


def rewards_of(samples: list, of_references: list[float], more: list[float]) -> Tensor:
    """rewards_NK of a process's groups of 2; more: what samples get besides."""
    own_N2 = torch.tensor([a + b for a, b in zip(said(samples), more, strict=True)]).view(-1, 2)
    return torch.cat([own_N2, torch.tensor(of_references).view(-1, 1)], dim=1).double()


def results_of(completion: list[dict[str, Any]]) -> list[str]:
    """What tools answered to a sample."""
    return [turn["content"] for turn in completion if turn["role"] == "tool"]


def calls(samples: list[list], trainer: Keeper) -> dict[str, Any]:
    """How often the samples of each rollout called a tool, and which share of calls failed."""
    failed = "tools/failure_frequency"
    return {
        "calls": [sum(len(results_of(each)) for each in rollout) for rollout in samples],
        "failures": [entry[failed] for entry in trainer.state.log_history if failed in entry],
    }


def tools(model: Path, folder: Path, port: int | None) -> dict[str, Any]:
    """With importance weights."""
    args = (by_host(port) if port else COLOCATED) | weights("token_truncate", 0.015, 0.9)
    watched, form = Watched(), f"({ADD}|{WORDS})"
    trainer = train(model, folder, form, args, turns(a=3, b=4), reward_funcs=watched, tools=[add])
    samples, references = watched.scored[::2], watched.scored[1::2]
    rewards = [
        rewards_of(scored, said(of_references), [0.0] * len(scored))
        for scored, of_references in zip(samples, references, strict=True)
    ]
    doubles = policies(trainer, model)
    facts = {
        "weights": weight_gaps(trainer, doubles, form),
        "gradient": gradient_gaps(trainer, doubles, rewards),
    }
    return facts | calls(samples, trainer)


def modes(model: Path, folder: Path, port: int | None) -> dict[str, Any]:
    """Without tools: the other modes of importance weights."""
    found = {}
    for mode, bounds in MODES.items():
        args, watched = COLOCATED | weights(mode, *bounds), Watched()
        trainer = train(model, folder / mode, LETTERS, args, turns()[-1:], reward_funcs=watched)
        scored = zip(watched.scored[::2], watched.scored[1::2], strict=True)
        rewards = [rewards_of(each, said(other), [0.0] * len(each)) for each, other in scored]
        doubles = policies(trainer, model)
        beyond = torch.tensor([0.0, bounds[0]])
        ratios = [batch["importance_sampling_ratio"] for _, batch in trainer.rollouts]
        found[mode] = {
            "weights": weight_gaps(trainer, doubles, LETTERS),
            "gradient": gradient_gaps(trainer, doubles, rewards),
            "bounded": [float(torch.isin(each, beyond).float().mean()) for each in ratios],
        }
    return found


def weights(mode: str, low: float, high: float) -> dict[str, Any]:
    """Options of importance weights."""
    return {
        "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_min": low,
        "vllm_importance_sampling_clip_max": high,
    }


def environment(model: Path, folder: Path, port: int | None) -> dict[str, Any]:
    """With a reward of its own, and without importance weights."""
    args = COLOCATED | {"vllm_importance_sampling_correction": False}
    watched = Watched()
    trainer = train(
        model,
        folder,
        f"({PUT}|{WORDS})",
        args,
        turns("put", amount=6),
        columns={"reference_reward": 30.0},
        reward_funcs=watched,
        environment_factory=Purse,
    )
    rewards = [
        rewards_of(scored, [30.0] * 3, [float([1, *results_of(each)][-1]) for each in scored])
        for scored in watched.scored
    ]
    facts = {"gradient": gradient_gaps(trainer, policies(trainer, model), rewards)}
    return facts | calls(watched.scored, trainer)


if __name__ == "__main__":
    main({each.__name__: each for each in (tools, environment, modes)})
