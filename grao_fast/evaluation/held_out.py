"""The held-out prompts of a run: answered before, during and after training, and compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from grao_fast.config import RewardType
from grao_fast.data.encoding import Encoded
from grao_fast.data.fingerprint import fingerprint
from grao_fast.distributed.world import World
from grao_fast.evaluation.baseline import read_baseline, write_baseline
from grao_fast.evaluation.compare import evaluate_completions
from grao_fast.evaluation.result import EvaluationResult
from grao_fast.rewards import Reward
from grao_fast.system.lines import METRICS_FILE, read_lines


class HeldOut:
    """Evaluates a policy on held-out prompts, against their references and its first answers.

    Args:
        answer: token ids of prompts -> the policy's greedy answers, as it is now.
        prompts: to answer.
        reward, metric: score the answers; metric None: the reward alone.
        reward_type: "pointwise" or "pairwise".
        eval_steps: evaluate every so many steps; None: before and after training only.
        seed: of the bootstrap.
        output_dir: of the run, where the answers from before training are kept.
        world: the processes of the run, all of which answer; rank 0 scores.

    before: the evaluation from before training; None until `begin` or `recall` has set it, and if
        `recall` finds no answers.
    """

    def __init__(
        self,
        answer: Callable[[list[list[int]]], list[str]],
        prompts: Sequence[Encoded],
        *,
        reward: Reward,
        metric: Reward | None,
        reward_type: RewardType,
        eval_steps: int | None,
        seed: int,
        output_dir: Path,
        world: World,
    ) -> None:
        self._answers_of, self.prompts, self._world = answer, prompts, world
        self.reward, self.metric, self.reward_type = reward, metric, reward_type
        self.eval_steps, self.seed, self.output_dir = eval_steps, seed, output_dir
        self.digest = fingerprint([prompt.example for prompt in prompts])
        self.before: EvaluationResult | None = None
        self._first_texts: list[str] | None = None

    def begin(self) -> EvaluationResult:
        """Evaluate the policy before training, and keep its answers."""
        texts = self._answer()
        self._world.main(
            lambda: write_baseline(self.output_dir, texts, data=self.digest), held=True
        )
        self._first_texts, self.before = texts, self._compare(texts, None)
        return self.before

    def recall(self) -> None:
        """Restore the evaluation from before training, from the answers that the run has kept."""
        texts = self._world.main(
            lambda: read_baseline(self.output_dir, data=self.digest, prompts=len(self.prompts))
        )
        if texts is not None:
            self._first_texts, self.before = texts, self._compare(texts, None)

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

    def _answer(self) -> list[str]:
        with self._world.at_once():
            return self._answers_of([prompt.prompt_ids for prompt in self.prompts])

    def _compare(self, texts: list[str], baseline: list[str] | None) -> EvaluationResult:
        return self._world.main(
            lambda: evaluate_completions(
                self.reward,
                [prompt.scored for prompt in self.prompts],
                texts,
                baseline=baseline,
                reward_type=self.reward_type,
                metric=self.metric,
                seed=self.seed,
            )
        )
