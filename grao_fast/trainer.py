"""`train`: the run from a dataset and a reward to an aligned model, read from top to bottom."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase, get_scheduler, set_seed

from grao_fast.callbacks import Callback, check_callbacks
from grao_fast.config import GRAOConfig
from grao_fast.data.encoding import Encoded, Limits, check_templates, encode_examples
from grao_fast.data.examples import Example, load_examples
from grao_fast.evaluation.evaluate import EvaluationResult
from grao_fast.evaluation.held_out import HeldOut
from grao_fast.models.attention.frequencies import (
    hold_frequencies,
    longest_context,
    release_frequencies,
)
from grao_fast.models.checks import gives_models_back
from grao_fast.models.loading import load_tokenizer
from grao_fast.models.policy import Policy, load_policy
from grao_fast.models.saving import prove_saving, save_model
from grao_fast.reporting.tracking import Tracker, check_trackers
from grao_fast.rewards import Reward, resolve_reward
from grao_fast.system import interruption
from grao_fast.system.errors import one_line
from grao_fast.system.files import clear_left_overs, write_file, write_folder
from grao_fast.system.lines import METRICS_FILE, read_lines, write_lines
from grao_fast.system.lock import only_run_in
from grao_fast.system.streams import lenient_streams
from grao_fast.system.visible import get_logger, visible_errors
from grao_fast.training.checkpoint import FINAL, choose_checkpoint, read_state
from grao_fast.training.identity import (
    PolicyIdentity,
    RunIdentity,
    check_same_run,
    check_steps,
    digest_frozen,
)
from grao_fast.training.inputs import (
    check_evaluation,
    check_one_process,
    check_references,
    writable_folder,
)
from grao_fast.training.memory import token_budget
from grao_fast.training.metrics import rollout_metrics
from grao_fast.training.optim import adamw, count_steps
from grao_fast.training.results import TrainResult, samples, write_summary
from grao_fast.training.saver import SaveError, Saver
from grao_fast.training.state import (
    DataStream,
    load_optimizer,
    resume_policy,
    save_checkpoint,
    step_seed,
)
from grao_fast.training.step import Rollout, sample_and_score, update
from grao_fast.training.watch import Watch

if TYPE_CHECKING:
    from datasets import Dataset

logger = get_logger(__name__)

RewardSpec = Callable[..., Any] | str | Sequence[Callable[..., Any] | str]


@interruption.stoppable
@lenient_streams()
@visible_errors()
@gives_models_back
def train(
    model: str | Path | nn.Module,
    dataset: str | Path | Dataset | Sequence[Mapping[str, Any]],
    reward: RewardSpec,
    *,
    config: GRAOConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    eval_dataset: str | Path | Dataset | Sequence[Mapping[str, Any]] | None = None,
    metric: RewardSpec | None = None,
    peft_config: Any = None,
    callbacks: Sequence[Callback] = (),
    output_dir: str | Path = "grao-output",
    resume_from_checkpoint: str | Path | bool | None = None,
) -> TrainResult:
    """Align a causal language model by GRAO (arXiv 2508.07750).

    Args:
        model: a folder or hub id of a model, or of an adapter, which is continued on the base that
            it names; or a Transformers causal language model, or a PeftModel.
        dataset: prompts with reference answers; see `grao_fast.data.examples` for columns.
        reward: f(prompts, completions, **columns) -> list of float or None; or "module:function",
            "file.py:function", or a list of these. See `GRAOConfig.reward_type`.
        config: options; the paper's by default.
        tokenizer: of the model; None loads the one beside it.
        eval_dataset: held-out prompts; evaluated before, after and every `eval_steps`.
        metric: a held-out measure, called as a reward is, that training never sees.
        peft_config: a peft config, to train a new adapter.
        callbacks: see `grao_fast.callbacks.Callback`.
        output_dir: made if needed; one run at a time holds it.
        resume_from_checkpoint: True for the latest whole checkpoint in output_dir, "auto" for that
            one or, where there is none yet, to begin; or a checkpoint's path. None: output_dir must
            hold no results of another run.

    Returns:
        TrainResult; the model is also in `output_dir/final`.

    Raises:
        ValueError: an argument, the dataset, a reward or the model is not usable; said before the
            model is loaded where that can be known.
        RewardError: a reward failed or returned something else than one number a completion.
        CheckpointError: nothing whole to resume from, or results that would be overwritten.
        OSError: something could not be written; what was saved before is whole.
        FloatingPointError: the gradient became NaN or infinite.
        Preempted: SIGTERM or SIGHUP came. It is a SystemExit, of status 143 or 129.
        KeyboardInterrupt: Ctrl-C.

    A run that ends early, by a signal or an error, leaves a checkpoint of the steps that are done,
    also with save_steps=0. A signal ends sampling, rewards, evaluations and gradients at once; an
    optimiser's step and a save it waits for. A second Ctrl-C waits for nothing. Signals are looked
    after in the main thread alone, and as long as `train` runs.
    """
    config = config or GRAOConfig()
    check_one_process()
    check_callbacks(callbacks)
    output = writable_folder(output_dir)
    with only_run_in(output):
        clear_left_overs(output)
        checkpoint = choose_checkpoint(output, resume_from_checkpoint)
        interruption.resumes_from(checkpoint)
        examples = load_examples(dataset, split="train", require_references=True)
        eval_examples = None if eval_dataset is None else load_examples(eval_dataset, split="test")
        limit = config.reward_timeout
        reward_function = resolve_reward(reward, weights=config.reward_weights, timeout=limit)
        metric_function = None if metric is None else resolve_reward(metric, timeout=limit)
        for rows in filter(None, (examples, eval_examples)):
            reward_function.check(rows, reward_type=config.reward_type)
        if metric_function and eval_examples:
            metric_function.check(eval_examples, reward_type="pointwise")
        check_references(examples, eval_examples, config)
        check_evaluation(
            has_eval_dataset=eval_dataset is not None, has_metric=metric is not None, config=config
        )
        check_trackers(config.report_to)
        identity = RunIdentity.of(examples, reward_function)
        if checkpoint is not None:
            check_same_run(checkpoint, read_state(checkpoint), identity, config=config)
        if not isinstance(model, nn.Module):
            tokenizer = tokenizer or load_tokenizer(model)
            for rows in filter(None, (examples, eval_examples)):
                check_templates(rows, tokenizer)
        set_seed(config.seed)  # of an adapter's first weights
        policy = load_policy(model, config=config, tokenizer=tokenizer, peft_config=peft_config)
        prove_saving(policy, output, merged=config.use_vllm)
        run = _Run(
            config=config,
            identity=identity,
            policy=policy,
            reward=reward_function,
            metric=metric_function,
            prompts=_encode(policy, examples, config),
            eval_prompts=eval_examples and _encode(policy, eval_examples, config, trained=False),
            output=output,
            callbacks=callbacks,
        )
        return run.train(checkpoint)


class _Run:
    """One run: everything that lives as long as its loop."""

    def __init__(
        self,
        *,
        config: GRAOConfig,
        identity: RunIdentity,
        policy: Policy,
        reward: Reward,
        metric: Reward | None,
        prompts: list[Encoded],
        eval_prompts: list[Encoded] | None,
        output: Path,
        callbacks: Sequence[Callback],
    ) -> None:
        self.config, self.policy, self.reward, self.prompts = config, policy, reward, prompts
        self.output, self.callbacks = output, callbacks
        self.identity, self.policy_identity = identity, PolicyIdentity.of(policy)
        if config.prompts_per_step > len(prompts):
            logger.warning("prompts_per_step %d > %d prompts: every step takes all of them",
                           config.prompts_per_step, len(prompts))  # fmt: skip
        batch_size = min(config.prompts_per_step, len(prompts))
        self.stream = DataStream(len(prompts), batch_size, config.seed)
        self.total_steps = count_steps(config, prompts=len(prompts), prompts_per_step=batch_size)
        self.optimizer = adamw(policy.model, config)
        self.scheduler: LambdaLR = get_scheduler(
            config.lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=self.total_steps,
        )
        self.optimizer.register_step_pre_hook(self._no_way_back)
        self.whole: int | None = 0  # steps done; None within an update, which cannot be saved
        self.rescued = False
        self.saver = Saver(output, self._write_checkpoint, keep=config.save_total_limit)
        longest = longest_context(prompts, eval_prompts or (), config.max_new_tokens)
        hold_frequencies(policy.causal_lm, longest)
        self.held_out: HeldOut | None = None
        if eval_prompts:
            self.held_out = HeldOut(
                policy, eval_prompts, reward=reward, metric=metric, config=config, output_dir=output
            )

    def train(self, checkpoint: Path | None) -> TrainResult:
        """The loop."""
        config, started = self.config, time.perf_counter()
        first_step = 0 if checkpoint is None else self._resume(checkpoint)
        self.frozen = digest_frozen(self.policy.model)
        self.policy.sampler.sync(self.policy)
        # kept apart: what a user left open stays open in the files of the run
        tokens = token_budget(self.policy, self.optimizer, self.prompts, config)
        self.step_config = config.replace(max_tokens_per_microbatch=tokens, memory_budget_mib=None)
        with interruption.held():
            return self._loop(first_step, started)

    def _loop(self, first_step: int, started: float) -> TrainResult:
        config = self.config
        write_file(self.output / "config.json", json.dumps(config.to_dict(), indent=1))
        self.tracker = Tracker(
            self.output,
            report_to=config.report_to,
            config=config.to_dict(),
            total_steps=self.total_steps,
            show_progress=not config.disable_tqdm,
            start_step=first_step,
        )
        watch, metrics = self._recall_metrics()
        try:
            with interruption.at_once():
                for callback in self.callbacks:
                    callback.on_train_begin(self.policy, config)
            step, after = first_step, self._evaluate_again(first_step)
            while step < self.total_steps:
                rollout, metrics = self._step(step)
                step += 1
                last = step == self.total_steps
                try:
                    with interruption.at_once():
                        self._sync(metrics)
                        last |= any([c.on_step_end(step, metrics) for c in self.callbacks])
                finally:  # a sampler or callback that fails takes nothing from what was done
                    if step % config.logging_steps == 0 or last:
                        self.tracker.log(step, metrics)
                    for message in watch.messages(step, metrics):
                        self.tracker.message(message)
                    if config.log_completions_steps and step % config.log_completions_steps == 0:
                        self.tracker.log_completions(step, samples(rollout))
                if self.held_out and self.held_out.is_due(step, last=last):
                    after = self._evaluate(step)
                if config.save_steps and (last or step % config.save_steps == 0):
                    self._save(step)
                if last:
                    break
            with self._saving(f"{FINAL}/"):
                write_folder(self.output / FINAL, lambda folder: save_model(self.policy, folder))
        except BaseException:
            self._rescue()
            raise
        finally:
            self.tracker.close()
            release_frequencies(self.policy.causal_lm)
        before = self.held_out and self.held_out.before
        result = TrainResult(step, metrics, before, after, self.output, self.policy.model)
        write_summary(result, config, seconds=time.perf_counter() - started)
        return result

    def _step(self, step: int) -> tuple[Rollout, dict[str, float]]:
        """Sample, score, update. The seed of a step makes it the same after a resume."""
        seed = step_seed(self.config.seed, step)
        set_seed(seed)
        prompts = [self.prompts[i] for i in self.stream.batch(step)]
        policy, config = self.policy, self.step_config
        with interruption.at_once():
            rollout = sample_and_score(policy, self.reward, prompts, config, seed=seed)
            metrics = update(policy, self.optimizer, self.scheduler, rollout, config)
        self.whole = step + 1
        epoch = (step + 1) * self.stream.batch_size / self.stream.size
        return rollout, {**rollout_metrics(rollout), **metrics, "epoch": epoch}

    def _sync(self, metrics: dict[str, float]) -> None:
        """Give the sampler the weights of a step that is whole, and so is kept if this fails."""
        started = time.perf_counter()
        self.policy.sampler.sync(self.policy)
        metrics["time/sync"] = time.perf_counter() - started

    def _no_way_back(self, *_: Any) -> None:
        """Before the optimiser changes weights: from here on the step can only be finished."""
        interruption.hold()  # first: a signal in between would leave nothing to save
        self.whole = None

    @contextmanager
    def _saving(self, name: str) -> Iterator[None]:
        """An error of what is done inside says where the weights are."""
        try:
            yield
        except Exception as error:  # of any kind: of a disk, of a library, of a model's own
            self._rescue()
            kept = "no step has been saved"
            if self.saver.checkpoint is not None:
                kept = f"step {self.saver.step} is in {str(self.saver.checkpoint)!r}"
            raise SaveError(f"{name} could not be saved ({one_line(error)}); {kept}") from error

    def _rescue(self) -> None:
        """When the run ends early: save the steps that are done, and say where they are."""
        if self.rescued:
            return
        self.rescued = True
        if self.whole not in (None, self.saver.step) and not interruption.is_aborted():
            with suppress(OSError):  # a full disk; the weights may find room elsewhere
                self.tracker.flush()
            self.saver.rescue(self.whole)
        interruption.resumes_from(self.saver.checkpoint)
        if where := self.saver.where():
            logger.warning("the run ended early; %s", where)

    def _evaluate(self, step: int, *, log: bool = True) -> EvaluationResult | None:
        """Evaluate on the held-out prompts, where there are any; step 0 is before training."""
        if self.held_out is None:
            return None
        result = self.held_out.begin() if step == 0 else self.held_out.evaluate()
        if not log:
            return result
        write_lines(self.output / f"eval-{step}.jsonl", result.rows)
        self.tracker.log(step, {f"eval/{name}": value for name, value in result.metrics().items()})
        with interruption.at_once():
            for callback in self.callbacks:
                callback.on_evaluate(step, result)
        return result

    def _evaluate_again(self, step: int) -> EvaluationResult | None:
        """What a run that resumes after `step` knew then; what it was stopped before, made up."""
        if self.held_out is None or step == 0:
            return self._evaluate(step)
        self.held_out.recall()
        last = step >= self.total_steps
        lacks = self.held_out.is_due(step, last=last) and not self.held_out.was_logged(step)
        return self._evaluate(step, log=lacks) if last or lacks else self.held_out.before

    def _save(self, step: int) -> None:
        with self._saving(f"checkpoint-{step}"):
            self.tracker.flush()
            path = self.saver.save(step)
        interruption.resumes_from(path)
        with interruption.at_once():
            for callback in self.callbacks:
                callback.on_save(step, path)

    def _write_checkpoint(self, path: Path, step: int, bare: bool) -> None:
        save_checkpoint(
            path,
            self.policy,
            self.optimizer,
            self.scheduler,
            step=step,
            config=self.config,
            belongs_to={
                "run": asdict(self.identity),
                "policy": asdict(self.policy_identity),
                "frozen": self.frozen,
                "prompts": len(self.prompts),
            },
            bare=bare,
        )

    def _resume(self, checkpoint: Path) -> int:
        """Load a checkpoint; returns the number of steps it has done."""
        state = read_state(checkpoint)
        check_steps(checkpoint, state["step"], self.total_steps)
        self.policy_identity = resume_policy(self.policy, self.policy_identity, checkpoint, state)
        if state["prompts"] != len(self.prompts):
            logger.warning(
                "%d prompts are short enough here and %d were: their order is another one",
                len(self.prompts), state["prompts"],
            )  # fmt: skip
        load_optimizer(checkpoint, self.optimizer, self.scheduler)
        logger.info("resuming from %s", checkpoint)
        self.whole = state["step"]
        self.saver.resumed(checkpoint, self.whole)
        return state["step"]

    def _recall_metrics(self) -> tuple[Watch, dict[str, float]]:
        """What the steps before a resume have reported, to the watch; and the last of them."""
        watch, metrics = Watch(), {}
        for row in read_lines(self.output / METRICS_FILE):
            if "loss" in row:
                metrics = {k: math.nan if v is None else v for k, v in row.items() if k != "step"}
                for _said_before in watch.messages(row["step"], metrics):
                    pass
        return watch, metrics


def _encode(
    policy: Policy, examples: list[Example], config: GRAOConfig, *, trained: bool = True
) -> list[Encoded]:
    return encode_examples(
        examples,
        policy.tokenizer,
        Limits(
            max_new_tokens=config.max_new_tokens,
            context_length=policy.context_length,
            max_prompt_length=config.max_prompt_length,
            max_reference_length=config.max_reference_length,
            embedding_rows=policy.embedding_rows,
        ),
        eos_token_ids=policy.eos_token_ids,
        trained=trained,
    )
