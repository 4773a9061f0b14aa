"""`check`: what can be known about a run before it is started."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from grao_fast.callbacks import Callback, check_callbacks
from grao_fast.checkup.findings import Finding
from grao_fast.checkup.folder import look_at
from grao_fast.checkup.groups import GroupFacts, sample_and_try, unsampled
from grao_fast.checkup.held_out import try_metric
from grao_fast.checkup.on_groups import on_groups, on_stored
from grao_fast.checkup.on_rewards import on_rewards
from grao_fast.checkup.on_rows import on_held_out, on_rows
from grao_fast.checkup.on_step import on_step
from grao_fast.checkup.result import CheckResult
from grao_fast.checkup.rows import RowFacts, drawn, read_rows
from grao_fast.checkup.step import measure
from grao_fast.config import GRAOConfig
from grao_fast.data.encoding import Encoded
from grao_fast.distributed.world import World
from grao_fast.evaluation.compare import RewardSpec
from grao_fast.models.attention.frequencies import hold_frequencies_of
from grao_fast.models.checks import check_given, restores_models
from grao_fast.models.placement import Placement, world_of
from grao_fast.reporting.tracking import check_trackers
from grao_fast.sampling import Sampler
from grao_fast.sampling.loaded import LoadedPolicy
from grao_fast.sampling.loading import load_policy
from grao_fast.system import interruption
from grao_fast.system.errors import UserError, one_line
from grao_fast.system.streams import lenient_streams
from grao_fast.system.visible import get_logger, visible_errors
from grao_fast.training.checkpoint import read_state
from grao_fast.training.identity import PolicyIdentity, RunIdentity, check_same_run
from grao_fast.training.inputs import Inputs, read_inputs, sampled_by
from grao_fast.training.optim import adamw, count_steps
from grao_fast.training.state import resume_policy

if TYPE_CHECKING:
    from datasets import Dataset

logger = get_logger(__name__)


@interruption.stoppable
@lenient_streams()
@visible_errors()
@restores_models
def check(
    model: str | Path | nn.Module,
    dataset: str | Path | Dataset | Sequence[Mapping[str, Any]],
    reward: RewardSpec | None = None,
    *,
    config: GRAOConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    eval_dataset: str | Path | Dataset | Sequence[Mapping[str, Any]] | None = None,
    metric: RewardSpec | None = None,
    peft_config: Any = None,
    sampler: Sampler | Literal["dataset"] | None = None,
    callbacks: Sequence[Callback] = (),
    output_dir: str | Path = "grao-output",
    resume_from_checkpoint: str | Path | bool | None = None,
    check_prompts: int = 8,
) -> CheckResult:
    """Tell what can be known about a run before it is started.

    It takes the arguments of `grao_fast.train`, reads and loads as that does, samples a few
    prompts, scores samples and references, and measures an update without applying it. Nothing is
    written to output_dir, and a model that is given as a module is left as it was.

    Args:
        model, dataset, reward, config, tokenizer, eval_dataset, metric, peft_config, sampler,
            callbacks, output_dir: as `grao_fast.train` takes them.
        resume_from_checkpoint: likewise; the checkpoint's weights are loaded and checked.
        check_prompts: the number of prompts that are sampled; at least one for each process.

    Returns:
        CheckResult; with several processes, that of rank 0 in all.

    Raises:
        ValueError: nothing could be measured: an argument, the dataset or the model cannot be used.
        Preempted: SIGTERM or SIGHUP came. It is a SystemExit, of status 143 or 129.
        KeyboardInterrupt: Ctrl-C.
        PeerFailed: another process failed, which raises its error. It is a SystemExit, of status 1.
    """
    config, sampler = sampled_by(config, sampler)
    if type(check_prompts) is not int or check_prompts < 1:
        raise UserError(
            f"check_prompts must be a whole number of at least 1, got {check_prompts!r}"
        )
    with world_of(config) as world:
        world.together(lambda: check_given("model", model))
        world.together(lambda: check_callbacks(callbacks))
        in_folder, checkpoint = world.main(lambda: look_at(output_dir, resume_from_checkpoint))
        inputs = world.together(
            lambda: read_inputs(
                dataset,
                reward,
                config=config,
                eval_dataset=eval_dataset,
                metric=metric,
                sampler=sampler,
            )
        )
        config = inputs.config
        world.together(lambda: check_trackers(config.report_to))
        set_seed(config.seed)  # for an adapter's first weights
        if isinstance(model, nn.Module) and _is_changed(
            model, config, world, by_training=peft_config is not None or checkpoint is not None
        ):
            model = copy.deepcopy(model)
        loaded = load_policy(
            model,
            config=config,
            tokenizer=tokenizer,
            peft_config=peft_config,
            sampler=sampler,
            world=world,
        )
        world.together(lambda: adamw(loaded.model, config.optimisation))  # refuses what is trained
        inputs.place_rewards(loaded.policy)
        done, resumed = _resume(loaded, inputs, checkpoint, config)
        checked = _Check(loaded, inputs, config, max(check_prompts, world.size))
        findings = [_on_model(loaded), in_folder, *resumed, *checked.findings(steps_done=done)]
        return world.gather(CheckResult(tuple(findings)))[0]


def _is_changed(model: nn.Module, config: GRAOConfig, world: World, *, by_training: bool) -> bool:
    """Whether loading a module for training changes more of it than is restored."""
    device = Placement.of(config, world).device
    elsewhere = any(parameter.device != device for parameter in model.parameters())
    return by_training or elsewhere or config.use_liger_kernel or world.size > 1


def _resume(
    loaded: LoadedPolicy, inputs: Inputs, checkpoint: Path | None, config: GRAOConfig
) -> tuple[int, list[Finding]]:
    """Load a checkpoint's weights; returns its step, and a finding if that is impossible."""
    if checkpoint is None:
        return 0, []
    try:
        state = read_state(checkpoint)
        run = RunIdentity.of(inputs.examples, inputs.reward)
        check_same_run(checkpoint, state, run, config=config, scores=inputs.scores)
        resume_policy(loaded, PolicyIdentity.of(loaded), checkpoint, state)
    except UserError as error:
        return 0, [Finding("run", "checkpoint", "failure", one_line(error))]
    return state["step"], []


def _on_model(loaded: LoadedPolicy) -> Finding:
    policy = loaded.policy
    parameters = list(policy.model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters)
    kind = "the parameters' own precision" if policy.autocast_dtype is None else "bfloat16"
    value = f"{total:,} parameters, {trained:,} of them trained, on {policy.device} in {kind}"
    if policy.world.size > 1:
        value += f", in {policy.world.size} processes"
    return Finding("run", "model", "ok", value)


@dataclass(frozen=True)
class _Check:
    """The check of a loaded policy. prompts: how many are sampled."""

    loaded: LoadedPolicy
    inputs: Inputs
    config: GRAOConfig
    prompts: int

    def findings(self, *, steps_done: int) -> list[Finding]:
        """Measure all that can be measured, part by part."""
        config, sampling, world = self.config, self.config.sampling, self.loaded.policy.world
        facts = world.together(
            lambda: read_rows(self.inputs.known, self.loaded, sampling, seed=config.seed)
        )
        held_out = None
        if self.inputs.eval_examples is not None:
            rows = self.inputs.eval_examples
            held_out = world.together(
                lambda: read_rows(rows, self.loaded, sampling, seed=config.seed, trained=False)
            )
        batch, steps = _steps(facts, config)
        formula = config.objective_options.formula
        findings = [_on_steps(batch, steps, config), *on_rows(facts, sampling, formula)]
        if held_out is not None:
            findings.append(on_held_out(held_out, sampling))
        if not facts.that("fits"):
            return findings
        rows = self._rows(facts)
        asked = [] if held_out is None else [row.encoded for row in held_out.that("fits")]
        hold_frequencies_of(self.loaded.causal_lm, rows, asked, sampling)
        steps = max(0, steps - steps_done)
        return [*findings, *self._sampled(facts, rows, held_out, batch, steps)]

    def _sampled(
        self,
        facts: RowFacts,
        rows: Sequence[Encoded],
        held_out: RowFacts | None,
        batch: int,
        steps: int,
    ) -> list[Finding]:
        """The findings on samples, rewards and an update."""
        loaded, config, sampling = self.loaded, self.config, self.config.sampling
        loaded.sync()
        groups, findings = self._groups(facts, rows)
        metric = self.inputs.metric
        if metric is not None and held_out is not None and held_out.that("fits"):
            answered = drawn(held_out, self.prompts, config.seed)
            findings.append(
                try_metric(
                    loaded,
                    metric,
                    answered,
                    max_new_tokens=sampling.max_new_tokens,
                    seed=config.seed,
                )
            )
        logger.info("measuring the memory and the time of an update")
        step = measure(loaded, rows, groups, config=config, batch_size=batch)
        return [*findings, *on_step(step, steps=steps)]

    def _rows(self, facts: RowFacts) -> Sequence[Encoded]:
        """The rows that fit, with the completions that they store."""
        fitting = facts.that("fits")
        if self.config.sampler != "dataset":
            return [row.encoded for row in fitting]
        return self.loaded.encode([row.example for row in fitting], self.config.sampling)

    def _groups(self, facts: RowFacts, rows: Sequence[Encoded]) -> tuple[GroupFacts, list[Finding]]:
        """A few groups as a step of training has them, and the findings on what was sampled."""
        config, sampling = self.config, self.config.sampling
        objective = config.objective_options
        prompts = drawn(facts, self.prompts, config.seed)
        if not objective.formula.needs_samples:
            return unsampled(prompts, objective), []
        stored = config.sampler == "dataset"
        if stored:
            of_example = {id(row.example): row for row in rows}
            prompts = [of_example[id(prompt.example)] for prompt in prompts]
        else:
            logger.info(
            "sampling %d completions of each of %d prompts, of up to %d tokens",
            sampling.num_generations, len(prompts), sampling.max_new_tokens,
        )  # fmt: skip
        groups = sample_and_try(
            self.loaded,
            self.inputs.reward,
            prompts,
            sampling=sampling,
            objective=objective,
            seed=config.seed,
            stored=stored,
        )
        on_samples = (on_stored if stored else on_groups)(groups, sampling, facts.ends.keys())
        return groups, [*on_samples, *on_rewards(groups, objective)]


def _steps(facts: RowFacts, config: GRAOConfig) -> tuple[int, int]:
    """The prompts of a step and the steps of the run, by the share of rows that is not dropped."""
    prompts = max(1, round((1 - facts.share("dropped")) * facts.total))
    batch = min(config.prompts_per_step, prompts)
    return batch, count_steps(config.optimisation, prompts=prompts, prompts_per_step=batch)


def _on_steps(batch: int, steps: int, config: GRAOConfig) -> Finding:
    value = f"{steps:,} of {batch} prompts"
    if config.objective_options.formula.needs_samples:
        count = batch * config.num_generations
        stored = config.sampler == "dataset"
        value += f", up to {count} stored completions" if stored else f", {count} samples"
    if batch == config.prompts_per_step:
        return Finding("run", "steps", "ok", value)
    value = f"{value}; prompts_per_step={config.prompts_per_step}"
    remedy = "lower prompts_per_step, or add prompts: every step takes all of them"
    return Finding("run", "steps", "warning", value, remedy)
