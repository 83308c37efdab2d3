r"""Meta-Experience Replay (MER; Riemer et al. 2019, ICLR, algorithm 1) with steps on minibatches.

Replay makes steps on minibatches of incoming and remembered examples. MER then goes back part of the way, which by the
argument of Reptile (Nichol et al. 2018) adds a term that aligns the gradients of different examples: the meta-gradient
of transfer and interference. With s updates on each incoming minibatch (`updates_per_batch=s`), each on newly drawn
exemplars, from the weights :math:`\theta_{i-1}` to :math:`\tilde\theta_i` by the optimizer:

.. math:: \theta_i = \theta_{i-1} + \beta \, (\tilde\theta_i - \theta_{i-1}) \quad (i = 1, ..., s), \qquad
          \theta \leftarrow \theta_0 + \gamma \, (\theta_s - \theta_0)

With beta = gamma = 1 it is `er`. The memory is a reservoir; neither task labels nor boundaries are used.

Published, quoted from memory: 89.56 % on Rotated-MNIST and 85.50 % on Permuted-MNIST, the mean of the last row of R
(domain-incremental, 20 tasks, one pass; from the authors' script mer_examples.sh: 1000 examples a task, two layers of
100 units, 5120 exemplars, algorithm 1 with single examples).

Defaults: beta = 1 and gamma = 0.1 are those of algorithm 6 of the authors' code with 5120 exemplars (with fewer, gamma
is 0.03 to 0.3), which goes back once, after the steps on a minibatch. For algorithm 1 it has beta = 0.01 to 0.03, gamma
= 1 and 5 to 10 minibatches of 5 to 100 exemplars.
Differences from the paper: one step on a minibatch of the incoming and the replayed examples takes the place of a step
on each of its examples in turn, so that alignment comes from the s minibatches; this is how Mammoth has it, too. With
s = 1 and plain SGD, beta and gamma only scale the rate. With several epochs an example is offered in the first only.
Differences from the reference code: the authors' code moves the statistics of batch norm back as well; here they stay.

State: the memory, |M| examples with their labels. A minibatch costs s steps. Scenarios: all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Ge, Interval
from torch import Tensor, nn

from cl.distributed import share
from cl.engine.batch import Batch
from cl.engine.strategy import LearnerLike, Strategy
from cl.toolkit.memory import Memory

if TYPE_CHECKING:
    from cl.data.task import Stream, Task


@torch.no_grad()
def move_back(weights: list[nn.Parameter], start: list[Tensor], part: float) -> None:
    """Set weights to start + part * (weights - start), in place.

    Example:
        >>> w = nn.Parameter(torch.tensor([3.0]))
        >>> move_back([w], [torch.tensor([1.0])], 0.25)
        >>> w.item()
        1.5
    """
    if part != 1:
        for w, begin in zip(weights, start, strict=True):
            w.copy_(torch.lerp(begin, w, part))


class MER(Strategy):
    """Replays, and goes back part of the way after each step and after each incoming minibatch.

    Args:
        memory_size: Total number of exemplars, |M|.
        batch_size: Replayed examples per step, over all processes; None means as many as there are incoming examples.
        beta: Part of each step that is kept.
        gamma: Part of the way over all steps on an incoming minibatch that is kept.
        storage: Where the exemplars are stored: on the "device", on the "host" or on "disk".

    Example:
        >>> MER(memory_size=20)
        MER(memory_size=20)
    """

    targets = ("label", "multilabel", "regression")
    needs = ("memory",)

    def __init__(
        self,
        memory_size: Annotated[int, Ge(1)] = 200,
        batch_size: Annotated[int, Ge(1)] | None = None,
        beta: Annotated[float, Interval(gt=0, le=1)] = 1.0,
        gamma: Annotated[float, Interval(gt=0, le=1)] = 0.1,
        storage: str = "device",
    ) -> None:
        super().__init__()
        self.memory_size, self.batch_size, self.storage = memory_size, batch_size, storage
        self.beta, self.gamma = beta, gamma

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate the memory."""
        if self.batch_size is not None:
            self.batch_size = share("mer.batch_size", self.batch_size)
        self.memory = Memory(self.memory_size, stream, storage=self.storage)
        self._first: list[Tensor] = []  # weights before the steps on an incoming minibatch; [] between minibatches
        self._start: list[Tensor] = []  # weights before a step; [] between steps
        self._again = False

    def extend_batch(self, learner: LearnerLike, batch: Batch) -> Batch:
        """Note the weights before the step, and append replayed examples."""
        self._finish(learner)
        self._start, self._again = [w.detach().clone() for w in _weights(learner)], batch.again
        self._first = self._first or self._start
        return self.memory.extend(batch, self.batch_size)

    def _finish(self, learner: LearnerLike) -> None:
        """Go back part of the last step, and after the last step on a minibatch part of the whole way."""
        if self._start:
            move_back(_weights(learner), self._start, self.beta)
            if not self._again:
                move_back(_weights(learner), self._first, self.gamma)
                self._first = []
            self._start = []

    def after_step(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> None:
        """Go back, and offer the incoming examples to the memory."""
        self._finish(learner)
        if learner.current_epoch == 0:
            self.memory.insert(batch)

    def after_epoch(self, learner: LearnerLike, task: Task, epoch: int) -> None:
        """Go back in a process that had no example in the epoch's last step, too."""
        self._finish(learner)


def _weights(learner: LearnerLike) -> list[nn.Parameter]:
    return [p for p in learner.parameters() if p.requires_grad]
