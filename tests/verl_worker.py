"""A verl worker that computes its share of a loss, as a Ray actor does."""

from __future__ import annotations

from test_verl import Problem, verl_loss
from torch import Tensor
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register


class LossWorker(Worker):
    """Computes the gradients of its sequences' loss, as one of `world_size` processes."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def gradients(self, order: list[int], advantages: list[Tensor]) -> list[Tensor]:
        share = slice(self.rank, None, self.world_size)
        problem = Problem(off_policy=True)
        loss = verl_loss(
            problem, order[share], advantages[share], len(order), processes=self.world_size
        )
        return problem.gradients(loss)
