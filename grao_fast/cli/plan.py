"""Builds the options of `grao-fast plan`."""

from __future__ import annotations

from grao_fast.cli.options import Command, Run, add_fields, add_lora_options

# The fields of GRAOConfig that memory and traffic depend on.
PLAN_FIELDS = (
    "objective",
    "num_generations",
    "kl_coef",
    "sampler",
    "max_new_tokens",
    "max_prompt_length",
    "max_reference_length",
    "generation_batch_size",
    "use_vllm",
    "vllm_mode",
    "vllm_gpu_memory_utilization",
    "prompts_per_step",
    "num_iterations",
    "max_tokens_per_microbatch",
    "share_prefix",
    "gradient_checkpointing",
    "bf16",
    "workspace_mib",
    "sharding",
    "replicas",
    "cpu_offload",
)
_PROMPT = 512  # tokens, where max_prompt_length is not given


def plan_command(run: Run) -> Command:
    """Build `grao-fast plan`, with the PLAN_FIELDS of GRAOConfig, and LoRA's under --peft."""
    command = Command.new(
        run,
        "plan --model DIR --processes N [options]",
        "Print the memory, the traffic and the bounds of a training step, from a model's config "
        "alone. Every prompt and every sequence is taken to be as long as the options allow.",
    )
    command.add("--model", str, "hub id or folder of a model", required=True)
    command.add("--processes", int, "number of processes, one on each device", required=True)
    command.add("--processes_per_node", int, "of them in a node", default=8)
    rates = command.parser.add_argument_group("Devices", "the defaults are an H100's data sheet's")
    for name, default, help in (
        ("device_memory_gib", 80.0, "memory of a device"),
        ("device_tflops", 989.0, "10^12 operations a second of matrix products"),
        ("memory_gb_per_s", 3350.0, "10^9 bytes a second of a device's memory"),
        ("link_gb_per_s", 450.0, "10^9 bytes a second from a device to others of its node"),
        ("network_gb_per_s", 50.0, "10^9 bytes a second from a device to other nodes"),
    ):
        command.add(f"--{name}", float, help, group=rates, default=default)
    add_fields(command, PLAN_FIELDS)
    command.parser.set_defaults({"max_prompt_length": _PROMPT})
    add_lora_options(command)
    return command
