r"""Maximally interfered retrieval (Aljundi et al. 2019, section 3.1, algorithm 1).

Like ER, but the replayed examples are chosen: candidates are drawn at random from the memory M, and those k are
replayed whose loss would rise the most if a plain SGD step were made on the incoming examples B alone:

.. math:: \theta^v = \theta - \eta \nabla_\theta L(B; \theta), \qquad
          s(x, y) = \mathrm{CE}(f_{\theta^v}(x), y) - \mathrm{CE}(f_\theta(x), y)

.. math:: L = \mathrm{CE}(f(B), y) + \frac1k \sum_{(x', y') \in \mathrm{top}_k(s)} \mathrm{CE}(f(x'), y')

:math:`\eta` is the present learning rate of the optimizer, for each parameter its own. The scores s are computed on
images without augmentation and in training mode, as the losses are, but leave the running statistics of batch norm
unchanged.

Defaults: 50 candidates per step, as in the released code; 200 exemplars are the smallest memory in the experiments of
Buzzega et al. 2020.
Differences from the paper: the means over B and over the chosen examples are added, as in the released code; one mean
over their union, as in `er`, is half as large, so halve the learning rate to compare with `er`. With several epochs an
example is offered to the reservoir in the first epoch only.
Differences from the reference code: candidates are drawn from the first step on and from the whole memory, where the
code leaves out examples of the present task. The code's MNIST scripts subtract the lowest loss that an example has had
so far instead of its present loss, and its forward passes for the scores change the running statistics of batch norm.

State: the memory, |M| examples with their labels. A step costs one backward pass on B and two forward passes on the
candidates more than a step of ER. Scenarios: all. Refused: targets other than single labels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor

from cl.distributed import share
from cl.engine.batch import Batch
from cl.engine.preflight import check_draws
from cl.engine.strategy import LearnerLike, Strategy
from cl.toolkit.lookahead import after_a_step, check_candidates, logits_at
from cl.toolkit.memory import Memory

if TYPE_CHECKING:
    from cl.data.task import Stream


def most_raised(before: Tensor, after: Tensor, size: int) -> Tensor:
    """Return the indices of the losses (n,) that rise the most, at most `size`, the largest rise first.

    Example:
        >>> import torch
        >>> most_raised(torch.tensor([0.2, 0.5, 0.1]), torch.tensor([0.9, 0.6, 0.7]), 2).tolist()
        [0, 2]
    """
    return (after - before).topk(min(size, len(before))).indices


class MIR(Strategy):
    """Replays the stored examples whose loss a step on the incoming examples would raise the most.

    Args:
        memory_size: Total number of exemplars, |M|.
        batch_size: Replayed examples per step, k, over all processes; None means as many as are incoming.
        num_candidates: Examples per step, over all processes, among which the replayed ones are chosen.
        every_epoch: Offer each example to the memory in every epoch instead of in the first epoch only.
        storage: Where the exemplars are stored: on the "device", on the "host" or on "disk".

    Raises:
        InputError: If there are fewer candidates than replayed examples.

    Example:
        >>> MIR(memory_size=20)
        MIR(memory_size=20)
    """

    needs = ("memory",)

    def __init__(
        self,
        memory_size: Annotated[int, Ge(1)] = 200,
        batch_size: Annotated[int, Ge(1)] | None = None,
        num_candidates: Annotated[int, Ge(1)] = 50,
        every_epoch: bool = False,
        storage: str = "device",
    ) -> None:
        super().__init__()
        self.memory_size, self.batch_size, self.num_candidates = memory_size, batch_size, num_candidates
        self.every_epoch, self.storage = every_epoch, storage

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate the memory."""
        check_draws("mir", learner, stream, memory_size=self.memory_size, batch_size=self.batch_size)
        check_candidates("mir", learner, self.num_candidates, self.batch_size)
        if self.batch_size is not None:
            self.batch_size = share("mir.batch_size", self.batch_size)
        self.num_candidates = share("mir.num_candidates", self.num_candidates)
        self.memory = Memory(self.memory_size, stream, storage=self.storage)

    def loss(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor | None:
        """Return the mean loss of the chosen candidates, or None while the memory is empty."""
        if len(self.memory) == 0:
            return None
        candidates = self.memory.sample(self.num_candidates)
        n = batch.num_incoming
        virtual = after_a_step(learner, learner.criterion(logits[:n], batch.take(slice(n))), n)
        here, there = logits_at(learner, candidates, {}), logits_at(learner, candidates, virtual)
        before, after = (F.cross_entropy(part, candidates.y, reduction="none") for part in (here, there))
        chosen = candidates.take(most_raised(before, after, self.batch_size or n))
        return learner.criterion(learner(learner.prepare(chosen.x, True), chosen.task), chosen)

    def after_step(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> None:
        """Offer the incoming examples to the memory, after the step, so that none is replayed in the same step."""
        if self.every_epoch or learner.current_epoch == 0:
            self.memory.insert(batch)
