r"""Averaged Gradient Episodic Memory (Chaudhry et al. 2019, equation 11).

The gradient g of the incoming batch may not raise the loss of a batch drawn from the memory of earlier tasks, whose
gradient is :math:`g_{ref}`:

.. math:: \tilde g = g - \frac{\min(g^\top g_{ref}, 0)}{g_{ref}^\top g_{ref}} g_{ref}

Differences from the paper: a task's exemplars, as many of each class of the task, are drawn from its training set when
it ends, where the paper fills a ring buffer while it passes (the same number, another sample).
Differences from reference code: Mammoth keeps one batch a task, far less than its buffer size says.
Permuted-MNIST ends two points above the reference, whose memory is drawn at random: with the even share of each class
the reference itself, after three tasks, rises from 92.6 to 93.6, where this one stands at 93.5. The published figure
needs pixels in [0, 1] (dataset.normalize=false): with centred ones the reference implementation, too, ends 16 points
lower at the same learning rate. Other optimizers than SGD rescale what is projected, which a remark says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from cl.distributed import from_first, mean_gradients, own, share
from cl.engine.batch import Batch
from cl.engine.preflight import check_draws
from cl.engine.strategy import LearnerLike, Strategy
from cl.toolkit.memory import Memory
from cl.toolkit.subspace import remark_rescaled

if TYPE_CHECKING:
    from cl.data.task import Stream, Task


def project(g: Tensor, reference: Tensor) -> Tensor:
    """Return the vector nearest to g that has no negative product with the reference.

    Example:
        >>> project(torch.tensor([1.0, -2.0, 0.0]), torch.ones(3)).tolist()
        [1.3333333730697632, -1.6666666269302368, 0.3333333432674408]
    """
    square = (reference @ reference).clamp_min(1e-12)
    return g - (g @ reference).clamp_max(0) / square * reference


class AGEM(Strategy):
    """Projects gradients against a batch of remembered examples.

    Args:
        memory_size: Exemplars in all, shared out evenly among the classes of all tasks.
        batch_size: Exemplars whose gradient is the reference.
        storage: Where the exemplars lie: on the "device", on the "host", or on "disk".

    Raises:
        InputError: If the memory is smaller than one exemplar a class.

    Example:
        >>> AGEM(memory_size=40)
        AGEM(memory_size=40)
    """

    needs = ("memory", "boundaries")

    def __init__(
        self, memory_size: Annotated[int, Ge(1)] = 200, batch_size: Annotated[int, Ge(1)] = 256, storage: str = "device"
    ) -> None:
        super().__init__()
        self.memory_size, self.batch_size, self.storage = memory_size, batch_size, storage

    def remark(self, learner: LearnerLike) -> str | None:
        """Say so where steps do not follow the projected gradient."""
        return remark_rescaled("A-GEM", learner)

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate the memory."""
        check_draws("agem", learner, stream, memory_size=self.memory_size, batch_size=self.batch_size)
        self.batch_size = share("agem.batch_size", self.batch_size)
        self.memory = Memory(self.memory_size, stream, policy="ring", storage=self.storage)

    def project_gradients(self, learner: LearnerLike) -> None:
        """Project the whole gradient, as one vector."""
        if len(self.memory) == 0:
            return
        parameters = [p for p in learner.parameters() if p.grad is not None]
        batch = self.memory.sample(self.batch_size)
        loss = learner.criterion(learner(learner.prepare(batch.x, True), batch.task), batch)
        own_part = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        reference = mean_gradients(own_part, len(batch))
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = project(torch.cat([g.flatten() for g in grads]), torch.cat([g.flatten() for g in reference]))
        for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Remember examples of the task; a ring that is offered them all keeps the last of a random order."""
        order = from_first(lambda: self.memory.random.generator.permutation(len(task.train)))
        rows = torch.from_numpy(order)[own(len(order))]
        for some in rows.split(4096):  # a task that stays in its file is not read at once
            x, y, label = (column.to(learner.device) for column in task.train.take(some).tensors())
            self.memory.insert(Batch(x, y, label))
