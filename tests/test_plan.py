"""Plans of runs: figures worked out by hand from a tiny model's shapes, and what the command says.

The model has D=64, two layers, four heads of 16 with two for keys and values, and V=100:

    layer   q, o 64 x 64; k, v 32 x 64; gate, up, down 128 x 64; two norms      36,992 elements
    root    embeddings 100 x 64, a norm; a head of 100 x 64 where it is untied   6,464 or 12,864
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from families import family_model
from processes import launch
from traffic import count_traffic
from transformers import AutoConfig, AutoModelForCausalLM

from grao_fast.cli.commands import main
from grao_fast.config import GRAOConfig
from grao_fast.distributed.world import World
from grao_fast.system.errors import UserError
from grao_fast.training.plan import Cluster, Rates, plan, skeleton
from grao_fast.training.plan.memory import activations, memory
from grao_fast.training.plan.size import ModelSize
from grao_fast.training.plan.wire import Traffic, wire
from grao_fast.training.plan.work import Layout, Workload, layouts

LAYER = 36_992
TIED, UNTIED = 6_464, 12_864
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 100,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 1,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# A prompt of 10 tokens, two samples of 5 and a reference of 3: 23 tokens, 13 of them predicted.
CONFIG = GRAOConfig(
    prompts_per_step=8,
    num_generations=2,
    max_prompt_length=10,
    max_new_tokens=5,
    max_reference_length=3,
    workspace_mib=1,
)
FULL = CONFIG.replace(sharding="full")
WORK = Workload.of(CONFIG)
LARGE = 2.0**40  # bytes of a device on which everything fits


def write_config(folder: Path, kind: str = "llama", **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    AutoConfig.for_model(kind, **(SHAPE | changes)).save_pretrained(folder)
    return folder


def size_of(folder: Path, kind: str = "llama", **changes: Any) -> ModelSize:
    model = skeleton(write_config(folder, kind, **changes))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    return ModelSize.of(model, recompute=True)


@pytest.mark.parametrize(("tied", "root"), [(True, TIED), (False, UNTIED)])
def test_elements_of_a_llama(tmp_path: Path, tied: bool, root: int) -> None:
    size = size_of(tmp_path, tie_word_embeddings=tied)
    assert (size.layers, size.layer.all, size.root.all) == (2, LAYER, root)
    assert size.model == (2 * LAYER + root, 0)
    assert size.matrix_io == 2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128)
    assert size.cache == 2 * 2 * 16


def test_elements_of_a_mixture_of_experts(tmp_path: Path) -> None:
    size = size_of(tmp_path, "qwen3_moe", tie_word_embeddings=False, **EXPERTS)
    attention = 2 * 64 * 64 + 2 * 32 * 64 + 2 * 16
    experts = 4 * (64 * 64 + 64 * 32)
    assert size.layer.all == attention + experts + 4 * 64 + 2 * 64
    assert size.model.all == 2 * size.layer.all + UNTIED
    chosen = 2 * ((64 + 64) + (64 + 32))  # two experts' matrices
    assert size.matrix_io == 2 * (64 + 64) + 2 * (64 + 32) + (4 + 64) + chosen


def test_an_adapter_is_trained_on_a_frozen_base(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "k_proj"])
    size = ModelSize.of(skeleton(write_config(tmp_path), lora), recompute=True)
    trained = 2 * 3 * ((64 + 64) + (64 + 32))
    assert size.model.trained == trained
    held = memory(size, Layout(1, 2, 2), WORK, LARGE)
    assert held.parameters == (4 * trained + 2 * size.model.frozen) / 2
    assert held.moments == 8 * trained / 2


def test_memory_of_shards(tmp_path: Path) -> None:
    size = size_of(tmp_path, tie_word_embeddings=False)
    P = 2 * LAYER + UNTIED  # 86,848
    work = dataclasses.replace(WORK, kl=True)
    held = memory(size, Layout(1, 4, 4), work, LARGE)
    assert held.parameters == 86_848
    assert held.moments == 173_696
    assert held.reference == held.gradients == 86_848
    assert held.in_flight == (2 + 4) * LAYER
    assert held.gathered == 2 * (UNTIED + 2 * LAYER)
    assert held.workspace == 2**20
    assert held.sampling == 2 * P
    # eight prompts on four processes, in one micro-batch of two: T = 46, R = 26
    assert (held.groups, held.micro_batches, held.reduced_once) == (2, 1, True)
    layer = 2 * 2 * 46 * 1024
    assert held.activations == 2 * 46 * 64 * 2 + layer + 2 * 2 * 26 * 64
    # four sequences of 15 tokens, each with 64 elements in each of two layers
    assert held.cache == 2 * 4 * 15 * 64 * 2
    assert held.held == 4 * 86_848
    assert held.update == sum(
        (held.held, held.gradients, held.in_flight, held.gathered, held.activations, 2**20)
    )
    assert held.rollout == held.held + held.sampling + held.cache


def test_memory_of_replicas(tmp_path: Path) -> None:
    size = size_of(tmp_path, tie_word_embeddings=True)
    P = 2 * LAYER + TIED
    whole = memory(size, Layout(4, 1, 4), WORK, LARGE)
    hybrid = memory(size, Layout(2, 2, 2), WORK, LARGE)
    assert (whole.parameters, whole.moments, whole.gradients) == (4 * P, 8 * P, 4 * P)
    assert (hybrid.parameters, hybrid.moments, hybrid.gradients) == (2 * P, 4 * P, 2 * P)
    assert whole.gathered == hybrid.gathered == 2 * P  # root and both layers
    assert whole.reference == 0


def test_one_process_computes_under_autocast(tmp_path: Path) -> None:
    size = size_of(tmp_path)
    alone = memory(size, Layout(1, 1, 1), WORK, LARGE)
    assert alone.gathered == 2 * size.model.all  # all casts
    T, R = 8 * 23, 8 * 13
    assert alone.activations == 4 * T * 64 * 2 + 2 * 2 * T * 1024 + 2 * 2 * R * 64
    exact = dataclasses.replace(WORK, compute_bytes=4)
    assert memory(size, Layout(1, 1, 1), exact, LARGE).gathered == 0


def test_micro_batches_hold_what_fits(tmp_path: Path) -> None:
    size = size_of(tmp_path)
    layout = Layout(1, 2, 2)  # of four prompts each
    two = activations(size, WORK, 2, layout)
    roomy = memory(size, layout, WORK, LARGE)
    passing = roomy.in_flight + roomy.gathered + roomy.workspace
    tight = (passing + two) / 0.9 + roomy.held + roomy.gradients + 1000
    # whole gradients, 4 bytes an element, take more than a tenth of so little
    assert 4 * size.model.all > tight / 10
    fits = memory(size, layout, WORK, tight)
    assert (fits.fits, fits.groups, fits.micro_batches, fits.reduced_once) == (True, 2, 2, False)
    assert fits.gradients == 2 * size.model.all
    less = memory(size, layout, WORK, (passing + 1000) / 0.9 + roomy.held + roomy.gradients)
    assert (less.fits, less.groups, less.micro_batches) == (False, 1, 4)


def test_gradients_kept_whole_until_the_last_micro_batch(tmp_path: Path) -> None:
    size, layout = size_of(tmp_path), Layout(1, 2, 2)
    one_group = dataclasses.replace(WORK, max_tokens=1)
    several, single = (memory(size, layout, work, LARGE) for work in (one_group, WORK))
    assert (several.micro_batches, several.reduced_once) == (4, True)
    assert several.gradients == 4 * size.model.all
    assert (single.micro_batches, single.gradients) == (1, 2 * size.model.all)


def test_a_token_budget_limits_micro_batches(tmp_path: Path) -> None:
    size, layout = size_of(tmp_path), Layout(1, 2, 2)
    for tokens, groups in ((1, 1), (45, 1), (46, 2), (1000, 4)):
        limited = dataclasses.replace(WORK, max_tokens=tokens)
        assert memory(size, layout, limited, LARGE).groups == groups


@pytest.mark.parametrize("kind", ["llama", "qwen3", "olmo2", "phi3", "qwen3_moe"])
def test_activations_of_a_layer_bound_what_autograd_keeps(kind: str) -> None:
    """Backward needs the rest for gradients: peaks are 1.7 to 2.1 times inputs and outputs."""
    changes = EXPERTS if kind == "qwen3_moe" else {}
    config = AutoConfig.for_model(kind, **(SHAPE | {"intermediate_size": 224} | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    T, kept = 256, {}
    position_1T = torch.arange(T)[None]
    hidden_1TD = torch.randn(1, T, 64, dtype=torch.bfloat16, requires_grad=True)
    angles = model.base_model.rotary_emb(hidden_1TD, position_1T)
    of_model = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in of_model:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.base_model.layers[0](
            hidden_1TD,
            attention_mask=None,
            position_ids=position_1T,
            position_embeddings=angles,
        )
    size = ModelSize.of(model, recompute=True)
    formula = 2 * 2 * T * size.matrix_io
    assert 0.5 * formula < sum(kept.values()) < formula, output


def test_traffic_of_shards_in_one_node(tmp_path: Path) -> None:
    size, layout = size_of(tmp_path, tie_word_embeddings=False), Layout(1, 4, 4)
    work = dataclasses.replace(WORK, kl=True, updates=3, max_tokens=23)  # two micro-batches
    P = 86_848
    held = memory(size, layout, work, LARGE)
    assert (held.micro_batches, held.reduced_once) == (2, True)
    sent = wire(size, layout, work, held)
    assert sent.gather_forward == Traffic(6 * 2 * P * 3 / 4)
    assert sent.gather_backward == Traffic(6 * 2 * 2 * LAYER * 3 / 4)
    assert sent.reduction == Traffic(3 * 4 * P * 3 / 4)
    assert sent.reference == Traffic(2 * 2 * P * 3 / 4)
    assert sent.sampling == Traffic(2 * P * 3 / 4)
    assert sent.rollout == Traffic(18 * 8 * 2 * 5 * 3 / 4)
    often = wire(size, layout, work, dataclasses.replace(held, reduced_once=False))
    assert often.reduction == sent.reduction.times(2)
    assert sent.total.process == sum(
        getattr(sent, field.name).process for field in dataclasses.fields(sent)
    )


@pytest.mark.parametrize(
    ("sharding", "layout", "once"),
    [
        ("full", Layout(1, 2, 2), False),
        ("full", Layout(1, 2, 2), True),
        ("none", Layout(2, 1, 2), True),
        ("hybrid", Layout(2, 2, 2), True),
    ],
    ids=str,
)
def test_traffic_is_what_fsdp_sends(sharding, layout, once, tmp_path: Path) -> None:
    """Collectives, counted, in two micro-batches and in gathering to sample."""
    size = size_of(tmp_path, tie_word_embeddings=False)

    def body(rank: int) -> None:
        world = World(rank, layout.processes, local_size=layout.per_node)
        count_traffic(world, tmp_path, sharding, once=once)

    ended = launch(body, tmp_path, size=layout.processes)
    assert [each.status for each in ended] == [0] * layout.processes, ended
    counts = json.loads((tmp_path / "counts.json").read_text())
    update, sampling = (Counter(counts[name]) for name in ("update", "sampling"))
    work = dataclasses.replace(WORK, prompts=2 * layout.processes, max_tokens=23)
    held = dataclasses.replace(memory(size, layout, work, LARGE), reduced_once=once)
    assert held.micro_batches == 2
    sent = wire(size, layout, work, held)
    # of two processes, each sends half of what is gathered or scattered, and all of what is reduced
    gathers = sent.gather_forward + sent.gather_backward
    assert gathers.process == update["_allgather_base_"] / 2
    assert sent.reduction.process == update["_reduce_scatter_base_"] / 2 + update["allreduce_"] > 0
    assert sent.sampling.process == sampling["_allgather_base_"] / 2


def test_traffic_between_nodes(tmp_path: Path) -> None:
    """Two nodes of four: a ring over both leaves each once, four rings of two four times."""
    size = size_of(tmp_path, tie_word_embeddings=False)
    P = 86_848
    forward, gradients = {}, {}
    for sharding, layout in layouts(8, 4, None).items():
        sent = wire(size, layout, WORK, memory(size, layout, WORK, LARGE))
        forward[sharding], gradients[sharding] = sent.gather_forward, sent.reduction
    assert forward["none"] == Traffic()
    assert forward["full"] == Traffic(2 * P * 7 / 8, 2 * P * 7 / 8)
    assert forward["hybrid"] == Traffic(2 * P * 3 / 4)
    assert gradients["none"] == Traffic(2 * 4 * P * 7 / 8, 2 * 4 * P * 7 / 8)
    assert gradients["full"] == Traffic(4 * P * 7 / 8, 4 * P * 7 / 8)
    # 3/4 of 4 P within the node; then each process's quarter of 4 P with its like in the other one
    assert gradients["hybrid"] == Traffic(4 * P * 3 / 4 + 2 * P / 2, 4 * (2 * P / 2))


def test_offloaded_shards_are_in_the_memory_of_the_cpu(tmp_path: Path) -> None:
    size, layout = size_of(tmp_path), Layout(1, 2, 2)
    away = dataclasses.replace(WORK, offload=True, kl=True)
    held = memory(size, layout, away, LARGE)
    assert held.held == held.gradients == 0
    assert held.on_cpu == (4 + 8 + 4 + 4) * size.model.all / 2
    assert held.update == held.in_flight + held.gathered + held.activations + held.workspace
    alone = memory(size, Layout(1, 1, 1), away, LARGE)
    assert (alone.on_cpu, alone.held) == (0, 16 * size.model.all)
    result = plan(skeleton(tmp_path), FULL.replace(cpu_offload=True), cluster())
    assert [phase.name for phase in result.phases if phase.name == "AdamW"] == []
    assert "AdamW runs on the CPU" in result.notes[0]


def test_layouts() -> None:
    assert layouts(1, 8, None) == {"none": Layout(1, 1, 1)}
    assert layouts(4, 8, None).keys() == {"none", "full"}
    assert layouts(16, 8, None)["hybrid"] == Layout(2, 8, 8)
    assert layouts(16, 8, 4)["hybrid"] == Layout(4, 4, 8)
    assert layouts(16, 1, None).keys() == {"none", "full"}  # a node's one process shares nothing


def cluster(**changes: Any) -> Cluster:
    options = {"processes": 2, "per_node": 8, "device_memory": LARGE}
    return Cluster(**(options | changes), rates=Rates(1e6, 1e5, 1e4, 1e3))


def test_bounds_of_phases(tmp_path: Path) -> None:
    model = skeleton(write_config(tmp_path, tie_word_embeddings=False))
    result = plan(model, FULL, cluster())
    assert result.auto == "none"
    phases = {phase.name: phase for phase in result.phases}
    sampling, adam = phases["sampling"], phases["AdamW"]
    P = 86_848
    # four prompts each: one batch of eight sequences, five steps, in which all weights are read
    pairs = 11 + 12 + 13 + 14 + 15
    assert sampling.memory == pytest.approx((5 * 2 * P + 8 * 2 * 64 * 2 * pairs) / 1e5)
    assert sampling.links == pytest.approx(2 * P / 2 / 1e4)
    assert sampling.network == 0
    assert adam.memory == pytest.approx(28 * P / 2 / 1e5)
    assert adam.bound == "device memory"
    update = phases["forward and backward"]
    assert update.products == pytest.approx(
        4 * result.size.cost.updates(WORK.group(result.size)) / 1e6
    )
    assert update.links == pytest.approx((2 * P + 2 * 2 * LAYER + 4 * P) / 2 / 1e4)
    assert update.bound == "matrix products"
    assert "KL pass" not in phases


def test_vllm_samples_elsewhere(tmp_path: Path) -> None:
    model = skeleton(write_config(tmp_path))
    config = FULL.replace(use_vllm=True, vllm_mode="server", kl_coef=0.1)
    result = plan(model, config, cluster(processes=16))
    names = [phase.name for phase in result.phases]
    assert names == [
        "exchange of samples", "KL pass", "forward and backward", "AdamW", "weights to vLLM",
    ]  # fmt: skip
    assert result.phases[-1].network > 0
    assert result.memory["full"].sampling == result.memory["full"].cache == 0
    colocated = plan(model, config.replace(vllm_mode="colocate"), cluster())
    assert colocated.memory["full"].engine == pytest.approx(0.3 * LARGE)


@pytest.mark.parametrize("options", [{"sampler": "dataset"}, {"objective": "sft"}], ids=str)
def test_what_is_not_sampled_costs_nothing(options: dict[str, Any], tmp_path: Path) -> None:
    """Stored completions are trained on like samples; their texts alone are exchanged."""
    model = skeleton(write_config(tmp_path, tie_word_embeddings=False))
    drawn, config = FULL.replace(num_generations=8), FULL.replace(num_generations=8, **options)
    result, beside = (plan(model, each, cluster()) for each in (config, drawn))
    stored = "sampler" in options
    exchange = ["exchange of samples"] if stored else []
    names = [*exchange, "forward and backward", "AdamW"]
    assert [phase.name for phase in result.phases] == names
    held, sent = result.memory["full"], result.wire["full"]
    assert held.sampling == held.cache == 0 and sent.sampling == Traffic()
    assert sent.rollout.process == (4 * 8 * 8 * 5 / 2 if stored else 0)
    assert (held.activations == beside.memory["full"].activations) == stored
    assert (result.phases[-2].products == beside.phases[-2].products) == stored
    tiny = plan(model, config, cluster(device_memory=2**16)).notes
    assert "Sampling" not in " ".join(tiny)


def test_notes_name_what_does_not_fit(tmp_path: Path) -> None:
    model = skeleton(write_config(tmp_path))
    assert plan(model, CONFIG, cluster()).notes == []
    small = plan(model, CONFIG, cluster(processes=16, device_memory=2**20)).notes
    assert [re.sub(r"[^\w ].*", "", note) for note in small] == [
        "An update of one prompt does not fit",
        "8 processes have no prompt to learn from",
    ]
    tiny = plan(model, CONFIG, cluster(device_memory=2**16)).notes
    assert "Sampling with Transformers does not fit" in " ".join(tiny)
    config = CONFIG.replace(use_vllm=True)
    notes = plan(model, config, cluster(device_memory=2**18)).notes
    assert "raise vllm_gpu_memory_utilization" in " ".join(notes)


PLAN = "plan --model {folder} --processes 8 --processes_per_node 4 --max_prompt_length 10"


def test_command_prints_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_config(tmp_path / "model", tie_word_embeddings=False)
    assert main(PLAN.format(folder=folder).split()) == 0
    out = capsys.readouterr().out
    assert "86,848 parameters, in 2 layers of 36,992 and a root of 12,864" in out
    assert "8 processes in 2 nodes; sharding='auto' is 'none'" in out
    assert re.search(r"none +full +hybrid 2 x 4", out)
    assert re.search(r"an update fits 80 GiB +yes +yes +yes", out)
    assert re.search(r"logits \(workspace_mib\) +2\.00 +2\.00 +2\.00", out)
    assert re.search(r"AdamW +- +\S+ +- +- +device memory", out)
    assert max(map(len, out.splitlines()[1:])) <= 80


def test_command_plans_stored_completions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_config(tmp_path / "model")
    assert main([*PLAN.format(folder=folder).split(), "--sampler", "dataset"]) == 0
    out = capsys.readouterr().out
    assert "exchange of samples" in out and "an update fits" in out
    assert not re.search("sampling|to sample|keys and values", out)


def test_command_plans_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    folder = write_config(tmp_path / "model")
    lora = " --peft.r 3 --peft.target_modules [q_proj]"
    assert main((PLAN.format(folder=folder) + lora).split()) == 0
    assert f"{2 * 3 * 128:,} of them trained" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("--model ./absent", "model folder './absent' does not exist"),
        ("--model {folder}/../empty", "cannot read the config of model '.*/empty'"),
        ("--model {folder}/../adapter", "is an adapter: plan with its base model"),
        ("--processes 0", "processes must be at least 1, got 0"),
        ("--processes_per_node 0", "processes_per_node must be at least 1, got 0"),
        ("--processes 6", "processes_per_node=4 does not divide processes=6"),
        ("--sharding hybrid --replicas 3", "replicas=3 does not divide processes=8"),
        ("--sharding hybrid --replicas 0", "replicas must be at least 1, got 0"),
        ("--processes 4 --sharding hybrid", "sharding='hybrid' is impossible with processes=4"),
        ("--processes 1 --sharding full", "sharding='full' is impossible with processes=1"),
        ("--processes 1 --cpu_offload true", "cpu_offload=True needs several processes"),
        ("--device_memory_gib 0", "device_memory_gib must be above 0, got 0.0"),
        ("--max_prompt_length null", "max_prompt_length must be given"),
        ("--learning_rate 1", "unknown option --learning_rate"),
    ],
    ids=lambda value: value if value.startswith("--") else "",
)
def test_errors_of_the_command(
    wrong: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_config(tmp_path / "model")
    for name in ("empty", "adapter"):
        (tmp_path / name).mkdir()
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(folder)}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(adapter))
    argv = f"{PLAN} {wrong}".format(folder=folder)
    assert main(argv.split()) == 2
    assert re.search(said, capsys.readouterr().err)


DOCUMENTED = re.compile(
    r"`([\w.-]+)/config\.json`:\n\n```json\n(.*?)```\n\n"
    r"(?:<!-- skip[^\n]*\n)?```bash\ngrao-fast (plan [^\n]*)\n```\n\n```text\n(.*?)\n```",
    re.DOTALL,
)


def test_tables_of_the_documentation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path(__file__).parents[1] / "docs/scaling.md"
    shown = DOCUMENTED.findall(page.read_text(encoding="utf-8"))
    assert len(shown) == 2
    monkeypatch.chdir(tmp_path)
    for name, config, command, tables in shown:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        assert main(command.split()) == 0
        out = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
        assert "\n".join(out).strip() == tables.strip()


def test_families_have_layers() -> None:
    for kind in ("Gemma3Text", "Granite"):
        size = ModelSize.of(family_model(kind), recompute=True)
        assert size.layers == family_model(kind).config.num_hidden_layers
        assert size.model.all == size.layers * size.layer.all + size.root.all
    with pytest.raises(UserError):
        skeleton("./absent")
