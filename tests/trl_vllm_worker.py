"""Trains by GRAOTrainer with a real vLLM: `trl_vllm_worker.py MODEL FOLDER PART... [--port PORT]`.

Run by vLLM's Python for test_vllm_real_trl.py, which reads what was measured in FOLDER/PART.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tcp_transfer
import torch
from peft import LoraConfig
from torch import Tensor
from trl import GRPOConfig
from trl.generation import vllm_client, vllm_generation
from trl_runs import TEMPERATURE, Keeper, config, double_of, kept, prompts, run, token_ids, truth

STEPS, LR, TOP_K = 3, 0.05, 20
WEIGHTS = {
    "top_k": TOP_K,
    "vllm_importance_sampling_mode": "token_truncate",
    "vllm_importance_sampling_clip_min": 0.39,
    "vllm_importance_sampling_clip_max": 0.9,
}
COLOCATED = {"vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.05}


def train(model: Path, folder: Path, *, lora: LoraConfig | None = None, **options: Any) -> Keeper:
    """Steps of 3 groups of 2, each of which moves the policy far."""
    args = config(
        folder,
        use_vllm=True,
        lr_scheduler_type="constant",
        learning_rate=0.02,  # of an adapter
        max_steps=STEPS,
        **{"vllm_max_model_length": 64} | options,
    )
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rows = prompts(["live"] * 3 * STEPS * size)
    return run(model, args, rows, lr=None if lora else LR, peft_config=lora)


def policies(trainer: Keeper, model: Path) -> list[torch.nn.Module]:
    """The policy of each step, and the last one, in float64: of the gradients before it."""
    found = [double_of(model)]
    for gradients in trainer.gradients:
        found.append(copy.deepcopy(found[-1]))
        with torch.no_grad():
            for parameter, gradient in zip(found[-1].parameters(), gradients, strict=True):
                parameter -= LR * gradient.double()
    return found


def mass_of(double: torch.nn.Module, prompt: list[int], ids: list[int]) -> Tensor:
    """The probability of the likeliest TOP_K tokens, at each token of a sample.

    It is the importance weight of a token sampled from these alone.
    """
    with torch.no_grad():
        logits_LV = double(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return (logits_LV / TEMPERATURE).softmax(1).topk(TOP_K).values.sum(1)


def ratio_gap(args: GRPOConfig, batch: dict[str, Tensor], double: torch.nn.Module) -> float:
    """The largest difference between TRL's importance weights and those of the policy given."""
    gaps = []
    for ratio_C, pair in zip(batch["importance_sampling_ratio"], token_ids(batch), strict=True):
        expected_C = bounded(args, mass_of(double, *pair))
        gaps.append(float((ratio_C[: len(expected_C)] - expected_C).abs().max()))
    return max(gaps)


def bounded(args: GRPOConfig, mass_C: Tensor) -> Tensor:
    """The importance weights of a sample's tokens, or of the sample, by the mode of `args`."""
    low, high = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
    of, way = args.vllm_importance_sampling_mode.split("_")
    ratio_C = mass_C if of == "token" else mass_C.prod().view(1)
    if way == "truncate":
        return ratio_C.clamp(low, high)
    return ratio_C.where((ratio_C >= low) & (ratio_C <= high), 0.0)


def weighed(trainer: Keeper, model: Path) -> dict[str, list[float]]:
    """Importance weights and gradients of each step against the specification."""
    doubles, args = policies(trainer, model), trainer.args
    batches = [batch for _, batch in trainer.rollouts]
    bounds = torch.tensor(
        [args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max]
    )
    ratios = [batch["importance_sampling_ratio"] for batch in batches]
    return {
        "ratio": [ratio_gap(args, *each) for each in zip(batches, doubles, strict=False)],
        "bounded": [float(torch.isin(each, bounds).float().mean()) for each in ratios],
    }


def gradient_gaps(trainer: Keeper, model: Path) -> list[float]:
    doubles = policies(trainer, model)
    return [gradient_gap(trainer, step, doubles[step]) for step in range(STEPS)]


def gradient_gap(trainer: Keeper, step: int, double: torch.nn.Module) -> float:
    """The largest error of a gradient, in units of its parameter's largest."""
    groups, rewards_NK = kept(trainer)[step]
    ratio_BC = trainer.rollouts[step][1].get("importance_sampling_ratio")
    options = {}
    if ratio_BC is not None:
        factors = []
        for n, (_, sequences) in enumerate(groups):
            for b, ids in enumerate(sequences[:-1], 2 * n):
                factors.append(ratio_BC[b].double().expand(6)[: len(ids)])
            factors.append(torch.ones(len(sequences[-1])))
        logprob_T = truth(double, groups, rewards_NK).logprob_T.detach()
        options = {"sampler_logprob_T": logprob_T - torch.cat(factors).log()}
    double.zero_grad()
    truth(double, groups, rewards_NK, **options).loss.backward()
    return max(
        float((ours - p.grad).abs().max()) / max(1e-2, float(p.grad.abs().max()))
        for ours, p in zip(trainer.gradients[step], double.parameters(), strict=True)
    )


def arrived(trainer: Keeper, model: Path) -> dict[str, float]:
    policy = copy.deepcopy(trainer.accelerator.unwrap_model(trainer.model)).double()
    return arrived_of(trainer, policy, double_of(model))


def arrived_of(
    trainer: Keeper, policy: torch.nn.Module, first: torch.nn.Module
) -> dict[str, float]:
    """How far log-probs of greedy sampling by vLLM are from the policy's and the first one's."""
    backend = trainer.vllm_generation
    backend.sync_weights()
    backend.temperature, backend.top_k, backend.structured_outputs_regex = 0.0, 0, None
    prompt = token_ids(trainer.rollouts[0][1])[0][0]
    _, (ids,), (logprobs,), _ = backend.generate([prompt], None, 1)
    gaps = {}
    for name, each in {"greedy": policy, "stale_greedy": first}.items():
        with torch.no_grad():
            logits_LV = each(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        expected_L = logits_LV.log_softmax(1)[torch.arange(len(ids)), torch.tensor(ids)]
        gaps[name] = float((torch.tensor(logprobs)[:, 0] - expected_L).abs().max())
    return gaps


def engine_of(trainer: Keeper) -> dict[str, Any]:
    """What vLLM's engine in this process was made of."""
    engine = trainer.vllm_generation.llm.llm_engine
    return {
        "length": engine.model_config.max_model_len,
        "share": engine.vllm_config.cache_config.gpu_memory_utilization,
        "model": type(engine.model_executor.driver_worker.model_runner.model).__name__,
    }


# The parts, each a run with an engine in this process or with the server at a port.


def by_host(port: int) -> dict[str, Any]:
    where = {"vllm_server_host": "127.0.0.1", "vllm_server_port": port, "vllm_group_port": free()}
    return {"vllm_mode": "server", "vllm_server_timeout": 60.0} | where


def by_url(port: int) -> dict[str, Any]:
    url = f"http://127.0.0.1:{port}"
    return {"vllm_mode": "server", "vllm_server_base_url": url, "vllm_group_port": free()}


def free() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def plain(model: Path, folder: Path, port: int | None) -> dict[str, Any]:
    """Importance weights of tokens, from samples of the likeliest tokens alone."""
    where = by_host(port) if port else COLOCATED | {"vllm_model_impl": "vllm"}
    trainer = train(model, folder, **WEIGHTS, **where)
    facts = weighed(trainer, model) | {"gradient": gradient_gaps(trainer, model)}
    return facts | arrived(trainer, model) | ({} if port else engine_of(trainer))


def regex(model: Path, folder: Path, port: int | None) -> dict[str, Any]:
    """Completions of one form, without a correction."""
    trainer = train(
        model,
        folder,
        vllm_structured_outputs_regex="[a-f]{3}",
        vllm_importance_sampling_correction=False,
        **(by_url(port) if port else COLOCATED),
    )
    batches = [batch for _, batch in trainer.rollouts]
    texts = {
        trainer._tokenizer.decode(ids[:3]) for each in batches for ids in each["completion_ids"]
    }
    facts = {"texts": sorted(texts), "gradient": gradient_gaps(trainer, model)}
    return facts | arrived(trainer, model) | ({} if port else engine_of(trainer))


def lora(model: Path, folder: Path, port: int | None) -> dict[str, Any]:
    """An adapter, which TRL merges to send it and takes out again."""
    adapter = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])
    trainer = train(model, folder, lora=adapter, **by_url(port) if port else COLOCATED)
    ratios = [batch["importance_sampling_ratio"] for _, batch in trainer.rollouts]
    return arrived(trainer, model) | {
        "ratio": [float((each - 1).abs().max()) for each in ratios],
        "merged": any(getattr(each, "merged", False) for each in trainer.model.modules()),
    }


def two(model: Path, folder: Path, port: int | None) -> dict[str, Any]:
    """An engine of two parts, in the two processes that train."""
    trainer = train(
        model, folder, ddp_backend="gloo", vllm_tensor_parallel_size=2, **WEIGHTS, **COLOCATED
    )
    engine = trainer.vllm_generation.llm.llm_engine
    return (
        weighed(trainer, model)
        | arrived(trainer, model)
        | {
            "parts": engine.vllm_config.parallel_config.tensor_parallel_size,
            "completions": [batch["completion_ids"].tolist() for _, batch in trainer.rollouts],
        }
    )


def refused(model: Path, folder: Path, port: int | None) -> dict[str, Any]:
    """What vLLM refuses on a CPU, and TRL where no server is."""
    nobody = {"vllm_mode": "server", "vllm_server_port": free(), "vllm_server_timeout": 0.5}
    return {
        "asleep": error_of(lambda: train(model, folder, vllm_enable_sleep_mode=True, **COLOCATED)),
        "nobody": error_of(lambda: train(model, folder, **nobody)),
    }


def without_nccl(model: Path, folder: Path, port: int | None) -> dict[str, Any]:
    """What TRL's own client says of a CPU, before `send_over_tcp` has one in its place."""
    client = vllm_client.VLLMClient(f"http://127.0.0.1:{port}")
    return {"error": error_of(lambda: client.init_communicator(torch.device("cpu")))}


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except (ValueError, OSError, NotImplementedError) as error:
        return str(error)
    return ""


def send_over_tcp() -> None:
    """Have TRL's client of a server send weights by tcp_transfer.py in place of NCCL."""

    class Client(vllm_client.VLLMClient):
        def init_communicator(self, device: Any) -> None:
            super().init_communicator(torch.device("cuda"))  # TRL refuses others

    vllm_client.open_trainer_endpoint = tcp_transfer.open_endpoint
    vllm_client.packed_nccl_broadcast_producer = tcp_transfer.send
    vllm_generation.VLLMClient = Client


def main(parts: dict[str, Callable]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("parts", nargs="+", choices=parts)
    parser.add_argument("--port", type=int)
    given = parser.parse_args()
    tcp_transfer.keep_weights_in_place()
    send_over_tcp()
    for part in given.parts:
        facts = parts[part](given.model, given.folder / part, given.port)
        rank = os.environ.get("RANK", "0")
        (given.folder / f"{part}-{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main({each.__name__: each for each in (plain, regex, lora, two, refused, without_nccl)})
