"""`train`: a run from a dataset and a reward to an aligned model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from grao_fast.callbacks import Callback, check_callbacks
from grao_fast.config import GRAOConfig
from grao_fast.data.encoding import Encoded
from grao_fast.distributed.folders import write_folder
from grao_fast.evaluation.compare import RewardSpec
from grao_fast.evaluation.held_out import HeldOut
from grao_fast.evaluation.result import EvaluationResult
from grao_fast.models.attention.frequencies import hold_frequencies_of, release_frequencies
from grao_fast.models.checks import check_given, restores_models
from grao_fast.models.placement import world_of
from grao_fast.models.saving import prove_saving, save_model
from grao_fast.reporting.tracking import check_trackers
from grao_fast.sampling import Sampler
from grao_fast.sampling.loaded import LoadedPolicy
from grao_fast.sampling.loading import load_policy
from grao_fast.system import interruption
from grao_fast.system.files import clear_left_overs, writable_folder
from grao_fast.system.lock import only_run_in
from grao_fast.system.streams import lenient_streams
from grao_fast.system.visible import get_logger, visible_errors
from grao_fast.training.ahead import SamplingAhead
from grao_fast.training.checkpoint import FINAL, choose_checkpoint, read_state, step_of
from grao_fast.training.draws import PromptDraws
from grao_fast.training.group_shape import GroupShape
from grao_fast.training.identity import RunIdentity, check_same_run
from grao_fast.training.inputs import Inputs, read_inputs, sampled_by, tokenizer_for
from grao_fast.training.memory import token_budget
from grao_fast.training.metrics import rollout_metrics
from grao_fast.training.optim import adamw, count_steps, lr_schedule
from grao_fast.training.progress import Progress
from grao_fast.training.report import Report
from grao_fast.training.results import TrainResult, write_summary
from grao_fast.training.rollout import Rollout
from grao_fast.training.rollouts import Rollouts
from grao_fast.training.state import step_seed, stream_of
from grao_fast.training.step import update

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = get_logger(__name__)


@interruption.stoppable
@lenient_streams()
@visible_errors()
@restores_models
def train(
    model: str | Path | nn.Module,
    dataset: str | Path | Dataset | IterableDataset | Sequence[Mapping[str, Any]],
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
) -> TrainResult:
    """Align a causal language model by GRAO (arXiv 2508.07750), or another objective.

    Args:
        model: a folder or hub id of a model, or of an adapter, which is continued on the base that
            it names; or a Transformers causal language model, or a PeftModel.
        dataset: prompts with reference answers, streaming or not; see `grao_fast.data.examples`.
        reward: f(prompts, completions, **columns) -> list of float or None; or "module:function",
            "file.py:function", or a list of these. See `GRAOConfig.reward_type`. None if the
            objective needs no samples, and nothing is evaluated.
        config: options; None: the defaults.
        tokenizer: of the model; None loads the one beside it.
        eval_dataset: held-out prompts; evaluated before, after and every `eval_steps`.
        metric: a held-out measure, called as a reward is, that training never sees.
        peft_config: a peft config, to train a new adapter.
        sampler: a `grao_fast.sampling.Sampler`; "dataset": stored completions; None: config's.
        callbacks: see `grao_fast.callbacks.Callback`.
        output_dir: made if needed; one run at a time holds it.
        resume_from_checkpoint: True for the latest whole checkpoint in output_dir, "auto" for that
            one or, if there is none yet, to start anew; or a checkpoint's path. None: output_dir
            must hold no results of another run.

    Returns:
        TrainResult; the model is also in `output_dir/final`.

    Raises:
        ValueError: an argument, the dataset, a reward or the model is not usable; raised before the
            model is loaded if possible.
        RewardError: a reward failed or did not return one number per completion.
        CheckpointError: nothing whole to resume from, or results that would be overwritten.
        OSError: something could not be written; earlier checkpoints are whole.
        FloatingPointError: the gradient became NaN or infinite.
        Preempted: SIGTERM or SIGHUP came. It is a SystemExit, of status 143 or 129.
        KeyboardInterrupt: Ctrl-C.
        PeerFailed: another process of the run failed, which raises its error and shows it. It is a
            SystemExit, of status 1.

    With several processes, started by torchrun, srun or accelerate, all call this function alike;
    see docs/scaling.md.

    A run that ends early, by a signal or an error, leaves a checkpoint of the steps that are done,
    even with save_steps=0. A signal interrupts sampling, rewards, evaluations and gradients at
    once, but lets an optimiser step or a save finish. A second Ctrl-C waits for nothing. Signals
    are handled in the main thread only, and only while `train` runs.
    """
    config, sampler = sampled_by(config, sampler)
    with ExitStack() as stack:
        world = stack.enter_context(world_of(config))
        world.together(lambda: check_given("model", model))
        world.together(lambda: check_callbacks(callbacks))
        output, checkpoint = world.main(
            lambda: _open_output(stack, output_dir, resume_from_checkpoint)
        )
        interruption.resumes_from(checkpoint)
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
        world.together(lambda: check_trackers(config.report_to))
        config, identity = inputs.config, RunIdentity.of(inputs.examples, inputs.reward)
        if checkpoint is not None:
            state = read_state(checkpoint)
            world.together(
                lambda: check_same_run(
                    checkpoint, state, identity, config=config, scores=inputs.scores
                )
            )
        if not isinstance(model, nn.Module):
            tokenizer = world.together(lambda: tokenizer_for(model, tokenizer, inputs))
        set_seed(config.seed)  # for an adapter's first weights
        loaded = load_policy(
            model,
            config=config,
            tokenizer=tokenizer,
            peft_config=peft_config,
            sampler=sampler,
            world=world,
        )
        inputs.place_rewards(loaded.policy)
        world.main(
            lambda: prove_saving(loaded.model, loaded.tokenizer, output, merged=config.use_vllm)
        )
        run = _Run(
            loaded, inputs, identity=identity, config=config, output=output, callbacks=callbacks
        )
        return run.train(checkpoint)


def _open_output(
    stack: ExitStack, output_dir: str | Path, resume_from_checkpoint: str | Path | bool | None
) -> tuple[Path, Path | None]:
    """Lock the folder of a run; returns its path and the checkpoint to resume from."""
    output = writable_folder(output_dir)
    stack.enter_context(only_run_in(output))
    clear_left_overs(output)
    return output, choose_checkpoint(output, resume_from_checkpoint)


class _Run:
    """The state of one run, and its loop."""

    def __init__(
        self,
        loaded: LoadedPolicy,
        inputs: Inputs,
        *,
        identity: RunIdentity,
        config: GRAOConfig,
        output: Path,
        callbacks: Sequence[Callback],
    ) -> None:
        self.loaded, self.config = loaded, config
        self.samples = config.sampling.samples_drawn
        self.world = loaded.policy.world
        self.output, self.callbacks = output, callbacks
        self.prompts = prompts = loaded.encode(inputs.examples, config.sampling)
        eval_prompts: Sequence[Encoded] = []
        if inputs.eval_examples:
            eval_prompts = loaded.encode(inputs.eval_examples, config.sampling, trained=False)
        hold_frequencies_of(loaded.causal_lm, prompts, eval_prompts, config.sampling)
        self.held_out: HeldOut | None = None
        if eval_prompts:
            self.held_out = HeldOut(
                loaded,
                eval_prompts,
                reward=inputs.reward,
                metric=inputs.metric,
                reward_type=config.reward_type,
                sampling=config.sampling,
                eval_steps=config.eval_steps,
                seed=config.seed,
                output_dir=output,
            )
        stream, optimisation = stream_of(prompts, config), config.optimisation
        self.draws = PromptDraws(stream, curriculum=config.curriculum)
        self.rollouts = Rollouts(loaded, inputs.reward, prompts, self.draws, config)
        self.total_steps = count_steps(
            optimisation, prompts=stream.size, prompts_per_step=stream.batch_size
        )
        self.ahead = SamplingAhead(
            self.rollouts.share,
            loaded.sampler,
            ahead=config.async_rollouts,
            steps=self.total_steps,
            world=self.world,
        )
        self.optimizer = adamw(loaded.model, optimisation)
        self.scheduler = lr_schedule(self.optimizer, optimisation, total_steps=self.total_steps)
        self.progress = Progress(
            loaded,
            self.optimizer,
            self.scheduler,
            identity=identity,
            draws=self.draws,
            config=config,
            output_dir=output,
        )

    def train(self, checkpoint: Path | None) -> TrainResult:
        """Prepare the first step, and run the loop."""
        started = time.perf_counter()
        first_step = self.progress.begin(checkpoint, total_steps=self.total_steps)
        objective = self.config.objective_options
        if self.samples:
            self.loaded.sync()
        self.max_tokens = self.config.max_tokens_per_microbatch or token_budget(
            self.loaded.policy,
            self.optimizer,
            GroupShape.largest(self.prompts, self.config.sampling, objective.formula),
            objective,
            most=self.draws.stream.batch_size,
            memory_budget_mib=self.config.memory_budget_mib,
            workspace_mib=self.config.workspace_mib,
        )
        with interruption.held():
            return self._loop(first_step, started)

    def _loop(self, first_step: int, started: float) -> TrainResult:
        self.report = report = Report(
            self.output,
            self.config,
            total_steps=self.total_steps,
            start_step=first_step,
            world=self.world,
        )
        self.progress.flush = report.flush
        metrics = report.metrics
        try:
            self._call_back(lambda callback: callback.on_train_begin(self.loaded, self.config))
            self.ahead.begin(first_step)
            step, after = first_step, self._evaluate_again(first_step)
            while step < self.total_steps:
                rollout, metrics = self._step(step)
                step += 1
                last = step == self.total_steps
                try:
                    if self.samples:
                        with self.world.at_once():
                            self._sync(step, metrics)
                    last |= self._call_back(partial(_ends_run, step, metrics))
                finally:  # a sampler or callback that fails does not undo the step
                    report.step(step, metrics, rollout, last=last)
                if self.held_out and self.held_out.is_due(step, last=last):
                    after = self._evaluate(step)
                save_steps = self.config.save_steps
                if save_steps and (last or step % save_steps == 0):
                    self._saved(self.progress.save(step))
                if last:
                    break
            self._saved(self.progress.finish())
            with self.progress.saving(f"{FINAL}/"):
                write_folder(self.output / FINAL, self._write_final, self.world)
        except BaseException as error:
            self.progress.rescue(together=self.world.is_shared(error))
            raise
        finally:
            self.ahead.close()
            report.close()
            release_frequencies(self.loaded.causal_lm)
        before = self.held_out and self.held_out.before
        result = TrainResult(step, metrics, before, after, self.output, self.loaded.model)
        seconds = time.perf_counter() - started
        self.world.main(lambda: write_summary(result, self.config, seconds=seconds), held=True)
        return result

    def _call_back(self, call: Callable[[Callback], bool | None]) -> bool:
        """Call all callbacks in every process; returns whether any has returned True."""
        answers = self.world.each(lambda: any([call(callback) for callback in self.callbacks]))
        return any(answers)

    def _step(self, step: int) -> tuple[Rollout, dict[str, float]]:
        """Sample, score, update. Seeding each step makes it the same after a resume."""
        set_seed(step_seed(self.config.seed, step))
        with self.world.at_once():
            rollout = self.rollouts.make(step, self.ahead.take(step))
            rollout = replace(rollout, progress=step / self.total_steps)
            metrics = update(
                self.loaded.policy,
                self.optimizer,
                self.scheduler,
                rollout,
                objective=self.config.objective_options,
                optimisation=self.config.optimisation,
                max_tokens=self.max_tokens,
                beginning=self.loaded.beginning,
            )
        self.loaded.changed()
        self.draws.done(step)
        self.progress.done = step + 1
        metrics |= {"epoch": self.draws.epochs(step + 1)}
        return rollout, rollout_metrics(rollout, self.config.objective_options) | metrics

    def _sync(self, step: int, metrics: dict[str, float]) -> None:
        """Give the sampler the weights of a finished step, which is not lost if this fails."""
        self.ahead.settle()
        started = time.perf_counter()
        self.loaded.sync()
        metrics["time/sync"] = time.perf_counter() - started
        self.ahead.begin(step)

    def _evaluate(self, step: int, *, log: bool = True) -> EvaluationResult | None:
        """Evaluate on the held-out prompts, if any; step 0 is before training."""
        if self.held_out is None:
            return None
        result = self.held_out.begin() if step == 0 else self.held_out.evaluate()
        if not log:
            return result
        self.report.evaluation(step, result)
        self._call_back(lambda callback: callback.on_evaluate(step, result))
        return result

    def _evaluate_again(self, step: int) -> EvaluationResult | None:
        """The latest evaluation of a run that resumes after `step`, made now if it is missing."""
        if self.held_out is None or step == 0:
            return self._evaluate(step)
        self.held_out.recall()
        last = step >= self.total_steps
        lacks = self.held_out.is_due(step, last=last) and not self.held_out.was_logged(step)
        return self._evaluate(step, log=lacks) if last or lacks else self.held_out.before

    def _saved(self, checkpoints: list[Path]) -> None:
        for path in checkpoints:
            self._call_back(lambda callback, path=path: callback.on_save(step_of(path), path))

    def _write_final(self, folder: Path) -> None:
        save_model(self.loaded.model, self.loaded.tokenizer, folder, self.world)


def _ends_run(step: int, metrics: dict[str, float], callback: Callback) -> bool | None:
    return callback.on_step_end(step, metrics)
