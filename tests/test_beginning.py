"""Whatever is trained: the KL is from the policy at the start, and a checkpoint holds all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import save_tiny_model
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from grao_fast.config import GRAOConfig
from grao_fast.data.packing import Group
from grao_fast.kernels import PolicyLoss
from grao_fast.models.policy import Policy
from grao_fast.sampling.loaded import LoadedPolicy
from grao_fast.sampling.loading import load_policy
from grao_fast.training.checkpoint import CheckpointError, read_state
from grao_fast.training.identity import PolicyIdentity, digest_frozen
from grao_fast.training.optim import adamw
from grao_fast.training.state import resume_policy, save_checkpoint
from grao_fast.training.step import micro_batch_loss, reference_logprobs

pytestmark = pytest.mark.usefixtures("unchecked")

CONFIG = GRAOConfig(kl_coef=0.1, device="cpu", gradient_checkpointing=False)
# Of bias="all" the biases, of "modules_to_save" the copies, of DoRA the magnitudes are trained too;
# PiSSA and OLoRA take what the adapter begins with out of the base model.
LORA = {
    "plain": {},
    "named": {},
    "two": {},
    "both active": {},
    "bias of the adapter": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "saved modules": {"modules_to_save": ["embed_tokens", "o_proj"]},
    "tokens": {"trainable_token_indices": [9, 4]},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "random": {"init_lora_weights": False},
    "of the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "resized and saved": {"modules_to_save": ["embed_tokens"]},
    "continued": {},
}
BY_HAND = ("layers frozen by hand", "frozen in 16 bits")
KINDS = [*LORA, "IA3", "VeRA", "all parameters", *BY_HAND]


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with nonzero biases and an untied head."""
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / "biased")
    config = AutoModelForCausalLM.from_pretrained(folder).config
    config.attention_bias = config.mlp_bias = True
    config.tie_word_embeddings = False
    torch.manual_seed(3)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(folder)
    return folder


def build(kind: str, folder: Path, config: GRAOConfig = CONFIG) -> LoadedPolicy:
    """The policy that a run would begin with; the seed makes every call return the same."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(5)
    if kind in BY_HAND:
        model.requires_grad_(False)
        trained = model.model.norm if kind == "frozen in 16 bits" else model.model.layers[1]
        trained.requires_grad_(True)
    if kind == "frozen in 16 bits":
        model.model.embed_tokens.bfloat16().register_forward_hook(lambda *args: args[-1].float())
    if kind in ("all parameters", *BY_HAND):
        return load_policy(model, config=config, tokenizer=tokenizer)
    peft = pytest.importorskip("peft", reason="peft is not installed")
    if kind == "resized and saved":
        torch.seed()  # new rows are drawn otherwise each time, as by who sets no seed
        model.resize_token_embeddings(90, mean_resizing=False)
        torch.manual_seed(5)
    targets = {"target_modules": ["q_proj", "down_proj"]}
    common = {"task_type": "CAUSAL_LM"} | targets
    if kind == "IA3":
        adapter = peft.IA3Config(**common, feedforward_modules=["down_proj"])
    elif kind == "VeRA":
        adapter = peft.VeraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "o_proj"])
    else:
        adapter = peft.LoraConfig(**common | {"r": 2} | LORA[kind])
    if kind in ("named", "two", "both active"):
        model = peft.get_peft_model(model, adapter, adapter_name="policy")
        if kind != "named":
            torch.seed()  # of no account: a checkpoint holds every adapter
            model.add_adapter("other", peft.LoraConfig(**common, r=3, init_lora_weights=False))
            torch.manual_seed(5)
        if kind == "both active":
            model.base_model.set_adapter(["policy", "other"])
            model.base_model.set_requires_grad("other", False)
        return load_policy(model, config=config, tokenizer=tokenizer)
    if kind == "continued":
        base = peft.get_peft_model(model, adapter)
        for name, parameter in base.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.2)
        return load_policy(base, config=config, tokenizer=tokenizer)
    return load_policy(model, config=config, tokenizer=tokenizer, peft_config=adapter)


def move(loaded: LoadedPolicy) -> None:
    """Change the trainable parameters, by more than a step of training would."""
    generator = torch.Generator().manual_seed(7)
    for parameter in loaded.model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(0.05 * noise)


def batch_of(policy: Policy):
    terms_CK = torch.tensor([[0.5, 0.0], [0.0, -0.25]]).double()
    kl_coef_K = torch.tensor([0.1, 0.0]).double()
    return policy.lay_out([Group([9, 8, 7], [[4, 5, 6], [9, 4]], terms_CK, kl_coef_K)])


def start_logprobs(loaded: LoadedPolicy) -> torch.Tensor:
    policy = loaded.policy
    assert loaded.beginning is not None
    with policy.updating():
        return reference_logprobs(
            policy, loaded.beginning, batch_of(policy), temperature=CONFIG.temperature
        )


def loss_of(loaded: LoadedPolicy, ref_logprob_T: torch.Tensor | None = None) -> PolicyLoss:
    policy = loaded.policy
    with policy.updating():
        return micro_batch_loss(
            policy,
            batch_of(policy),
            CONFIG.objective_options,
            num_prompts=1,
            ref_logprob_T=ref_logprob_T,
        ).policy


def write(
    loaded: LoadedPolicy, path: Path, begun: PolicyIdentity, config: GRAOConfig = CONFIG
) -> Path:
    optimizer = adamw(loaded.model, config.optimisation)
    belongs_to = {"policy": vars(begun), "frozen": digest_frozen(loaded.model)}
    save_checkpoint(path, loaded, optimizer, LambdaLR(optimizer, lambda step: 1.0), step=1,
                    config=config, belongs_to=belongs_to)  # fmt: skip
    return path


def saves_lora_only_biases() -> bool:
    """Whether this peft saves what `bias="lora_only"` trains; 0.18 trains biases and drops them."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model = peft.get_peft_model(layer, peft.LoraConfig(target_modules=["0"], bias="lora_only"))
    return any("bias" in key for key in peft.get_peft_model_state_dict(model))


@pytest.mark.parametrize("kind", KINDS)
def test_the_kl_is_from_the_start_also_after_a_resume(kind: str, biased: Path, tmp_path: Path):
    if kind == "bias of the adapter" and not saves_lora_only_biases():
        with pytest.raises(ValueError, match=r"bias and 3 more would be trained, and is not saved"):
            build(kind, biased)
        return
    loaded = build(kind, biased)
    loss = loss_of(loaded, start_logprobs(loaded))
    expected = loss.logprob_T.detach()
    assert float(loss.kl) == 0.0
    begun = PolicyIdentity.of(loaded)
    move(loaded)
    moved = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    assert torch.equal(start_logprobs(loaded), expected)
    assert all(torch.equal(value, moved[n]) for n, value in loaded.model.state_dict().items())
    assert not torch.equal(loss_of(loaded, expected).logprob_T, expected)

    path = write(loaded, tmp_path / "checkpoint-1", begun)
    again = build(kind, biased)
    assert resume_policy(again, PolicyIdentity.of(again), path, read_state(path)) == begun
    resumed = again.model.state_dict()
    assert resumed.keys() == moved.keys()
    assert all(torch.equal(resumed[name], value) for name, value in moved.items())
    assert torch.equal(start_logprobs(again), expected)


def test_weights_that_autocast_has_cast_are_not_kept(biased: Path):
    """Autocast caches casts until its outermost context ends, which here spans both passes."""
    loaded = build("all parameters", biased, CONFIG.replace(bf16=True))
    expected = start_logprobs(loaded)
    move(loaded)
    with loaded.policy.updating(), loaded.policy.autocast():
        moved = loss_of(loaded).logprob_T.detach()
        assert torch.equal(start_logprobs(loaded), expected)
        again = loss_of(loaded).logprob_T
    assert torch.equal(again, moved)
    assert not torch.equal(again, expected)


def test_a_failure_inside_leaves_the_policy_as_it_is(biased: Path):
    loaded = build("plain", biased)
    move(loaded)
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), loaded.beginning.restored():
        raise KeyboardInterrupt
    assert all(torch.equal(value, before[n]) for n, value in loaded.model.state_dict().items())


def test_what_would_be_trained_and_not_saved_is_refused(biased: Path):
    """A norm unfrozen by hand is refused, since peft saves the adapter alone."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = AutoModelForCausalLM.from_pretrained(biased)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    model.base_model.model.model.norm.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model\.norm\.weight would be .*modules_to_save"):
        load_policy(model, config=CONFIG, tokenizer=AutoTokenizer.from_pretrained(biased))


def test_a_kl_that_begins_late_is_from_the_same_start_or_refused(biased: Path, tmp_path: Path):
    """Without a copy in the checkpoint, the first weights are drawn again from the same seed."""
    loaded = build("random", biased, CONFIG.replace(kl_coef=0.0))
    expected = start_logprobs(build("random", biased))
    begun = PolicyIdentity.of(loaded)
    move(loaded)
    path = write(loaded, tmp_path / "checkpoint-1", begun, CONFIG.replace(kl_coef=0.0))
    again = build("random", biased)
    assert resume_policy(again, PolicyIdentity.of(again), path, read_state(path)) == begun
    assert torch.equal(start_logprobs(again), expected)
    other = build("random", biased)
    move(other)
    with pytest.raises(CheckpointError, match=r"kl_coef=0 .*seed 42 there"):
        resume_policy(other, PolicyIdentity.of(other), path, read_state(path))
    without = build("random", biased, CONFIG.replace(kl_coef=0.0))
    move(without)
    assert resume_policy(without, PolicyIdentity.of(without), path, read_state(path)) == begun


@pytest.mark.parametrize("kind", ["PiSSA", "OLoRA"])
def test_what_was_taken_out_of_the_base_is_put_back_alike(kind, biased, tmp_path, monkeypatch):
    """A resumed run restores the base even if its decomposition rounds differently, as a coarse
    rounding simulates here, and without a KL term too."""
    config = CONFIG.replace(kl_coef=0.0)
    loaded = build(kind, biased, config)
    begun = PolicyIdentity.of(loaded)
    move(loaded)
    path = write(loaded, tmp_path / "checkpoint-1", begun, config)
    with monkeypatch.context() as patch:
        for name in ("svd", "qr"):
            exact = getattr(torch.linalg, name)

            def rounded(matrix, *args, exact=exact, **options):
                return exact(matrix.bfloat16().float(), *args, **options)

            patch.setattr(torch.linalg, name, rounded)
        again = build(kind, biased, config)
    here, there = loaded.model.state_dict(), again.model.state_dict()
    off = max(float((here[n] - there[n]).abs().max()) for n in here if "base_layer.weight" in n)
    assert off > 1e-5
    assert resume_policy(again, PolicyIdentity.of(again), path, read_state(path)) == begun
    resumed = again.model.state_dict()
    assert max(float((here[n] - resumed[n]).abs().max()) for n in here) < 1e-7


def test_another_base_is_refused_where_the_adapter_alters_it(biased: Path, tmp_path: Path):
    loaded = build("PiSSA", biased)
    path = write(loaded, tmp_path / "checkpoint-1", PolicyIdentity.of(loaded))
    model = AutoModelForCausalLM.from_pretrained(biased)
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] += 0.01
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(biased).save_pretrained(tmp_path / "other")
    other = build("PiSSA", tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"the base model was .*biased \(weights of digest"):
        resume_policy(other, PolicyIdentity.of(other), path, read_state(path))
