"""The held-out prompts of a run: answered before, during and after training, and compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from grao_fast.config import RewardType, SamplingOptions
from grao_fast.data.encoding import Encoded
from grao_fast.data.fingerprint import fingerprint
from grao_fast.evaluation.answers import Answers, answers_of
from grao_fast.evaluation.baseline import read_baseline, write_baseline
from grao_fast.evaluation.compare import evaluate_completions
from grao_fast.evaluation.result import EvaluationResult
from grao_fast.rewards import Reward
from grao_fast.rewards.functions import ready
from grao_fast.sampling.loaded import LoadedPolicy
from grao_fast.system.lines import METRICS_FILE, read_lines


class HeldOut:
    """Evaluates a policy on held-out prompts, against their references and its first answers.

    Args:
        loaded: the policy, with the processes of the run: all answer, and rank 0 scores.
        prompts: to answer.
        reward, metric: score the answers; metric None: the reward alone.
        reward_type: "pointwise" or "pairwise".
        sampling: of the answers.
        eval_steps: evaluate every so many steps; None: before and after training only.
        seed: of the samples, and of the bootstrap.
        output_dir: of the run, where the answers from before training are kept.

    before: the evaluation from before training; None until `begin` or `recall` has set it, and if
        `recall` finds no answers.
    """

    def __init__(
        self,
        loaded: LoadedPolicy,
        prompts: Sequence[Encoded],
        *,
        reward: Reward,
        metric: Reward | None,
        reward_type: RewardType,
        sampling: SamplingOptions,
        eval_steps: int | None,
        seed: int,
        output_dir: Path,
    ) -> None:
        self._loaded, self.prompts, self._world = loaded, prompts, loaded.policy.world
        self._sampling = sampling
        self.reward, self.metric, self.reward_type = reward, metric, reward_type
        self.eval_steps, self.seed, self.output_dir = eval_steps, seed, output_dir
        self.digest = fingerprint([prompt.example for prompt in prompts])
        self.before: EvaluationResult | None = None
        self._first_texts: list[str] | None = None

    def begin(self) -> EvaluationResult:
        """Evaluate the policy before training, and keep its answers."""
        answers = self._answer()
        self._world.main(
            lambda: write_baseline(self.output_dir, answers, data=self.digest), held=True
        )
        self._first_texts, self.before = answers.greedy, self._compare(answers, None)
        return self.before

    def recall(self) -> None:
        """Restore the evaluation from before training, from the answers that the run has kept."""
        answers = self._world.main(
            lambda: read_baseline(self.output_dir, data=self.digest, prompts=len(self.prompts))
        )
        if answers is not None:
            self._first_texts, self.before = answers.greedy, self._compare(answers, None)

    def evaluate(self) -> EvaluationResult:
        """Evaluate the policy as it is, and compare it with the one from before training."""
        return self._compare(self._answer(), self._first_texts)

    def is_due(self, step: int, *, last: bool) -> bool:
        """Whether the policy is evaluated after a step."""
        return last or bool(self.eval_steps and step % self.eval_steps == 0)

    def was_logged(self, step: int) -> bool:
        """Whether metrics.jsonl has the evaluation after a step."""
        return self._world.main(
            lambda: any(
                row["step"] == step and any(name.startswith("eval/") for name in row)
                for row in read_lines(self.output_dir / METRICS_FILE)
            )
        )

    def _answer(self) -> Answers:
        with self._world.at_once():
            return answers_of(self._loaded, self.prompts, self._sampling, seed=self.seed)

    def _compare(self, answers: Answers, baseline: list[str] | None) -> EvaluationResult:
        with ready(self.reward, self.metric):
            return self._world.main(
                lambda: evaluate_completions(
                    self.reward,
                    [prompt.scored for prompt in self.prompts],
                    answers.greedy,
                    baseline=baseline,
                    reward_type=self.reward_type,
                    metric=self.metric,
                    samples=None if self.metric is None else answers.samples,
                    seed=self.seed,
                )
            )
