r"""ER with asymmetric cross-entropy (Caccia et al. 2022, "New Insights on Reducing Abrupt Representation Change").

In the loss of the incoming examples B only the classes present in B compete, so that learning new classes does not push
the features of old classes away. In the loss of the examples :math:`B_M` replayed from the memory all classes seen so
far compete:

.. math:: L = \frac{1}{|B|} \sum_{(x, y) \in B} \mathrm{CE}(f(x), y; C_B)
          + \frac{1}{|B_M|} \sum_{(x, y) \in B_M} \mathrm{CE}(f(x), y; C_{seen})

Both terms are used from the first step on, also in the first task. The method does not need task boundaries, except
that the classes of a task count as seen from the first step of this task on.

Defaults: 200 exemplars are the smallest memory in the experiments of Buzzega et al. 2020.
Differences from the paper: the head is linear; the paper uses a cosine classifier with a scale factor. With several
epochs an example is offered to the reservoir in the first epoch only. Examples that another strategy replays in the
same batch are treated like those from the memory.
Differences from the reference code: the code makes one forward pass for B and another for the replayed examples, so
that batch norm normalises them separately; here both are in one batch. In the code, classes that have not been seen yet
compete for incoming examples. It takes them to be those above the highest label seen, which is right only if classes
arrive in ascending order; `train_mask=domain` lets them compete in any order. Mammoth neither masks nor replays in the
first task.

State: the memory, |M| examples with their labels. Scenarios: all; in the domain-incremental one the mask has an effect
only where a batch lacks a class. Refused: targets other than single labels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from cl.distributed import share, total
from cl.engine.batch import Batch
from cl.engine.strategy import LearnerLike, Strategy
from cl.toolkit.memory import Memory

if TYPE_CHECKING:
    from cl.data.task import Stream


def without(logits: Tensor, classes: Tensor) -> Tensor:
    """Return the logits (B, C) with minus infinity for the given classes, bool (C,), so that they do not compete.

    Example:
        >>> import torch.nn.functional as F
        >>> logits = torch.tensor([[2.0, 1.0, 0.5, 0.0]])
        >>> old = torch.tensor([True, True, False, False])
        >>> round(float(F.cross_entropy(without(logits, old), torch.tensor([2]))), 4)
        0.4741
    """
    return logits.masked_fill(classes, -torch.inf)


class ERACE(Strategy):
    """Replays examples from a memory, and keeps absent old classes out of the loss of incoming examples.

    Args:
        memory_size: Total number of exemplars, |M|.
        batch_size: Replayed examples per step, over all processes; None means as many as there are incoming examples.
        every_epoch: Offer each example to the memory in every epoch instead of in the first epoch only.
        storage: Where the exemplars are stored: on the "device", on the "host" or on "disk".

    Example:
        >>> ERACE(memory_size=20)
        ERACE(memory_size=20)
    """

    needs = ("memory",)

    def __init__(
        self,
        memory_size: Annotated[int, Ge(1)] = 200,
        batch_size: Annotated[int, Ge(1)] | None = None,
        every_epoch: bool = False,
        storage: str = "device",
    ) -> None:
        super().__init__()
        self.memory_size, self.batch_size = memory_size, batch_size
        self.every_epoch, self.storage = every_epoch, storage

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate the memory."""
        if self.batch_size is not None:
            self.batch_size = share("er_ace.batch_size", self.batch_size)
        self.memory = Memory(self.memory_size, stream, storage=self.storage)

    def extend_batch(self, learner: LearnerLike, batch: Batch) -> Batch:
        """Append replayed examples, if the memory holds any."""
        return self.memory.extend(batch, self.batch_size)

    def criterion(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor:
        """Return the cross-entropy of the incoming examples plus that of the replayed examples, a scalar."""
        n = batch.num_incoming
        present = total(logits.new_zeros(logits.shape[1]).index_fill(0, batch.y[:n], 1.0)) > 0
        incoming = without(logits[:n], learner.seen & ~present)
        loss = learner.criterion(incoming, batch.take(slice(n)))
        return loss if n == len(batch) else loss + learner.criterion(logits[n:], batch.take(slice(n, None)))

    def after_step(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> None:
        """Offer the incoming examples to the memory, after the step, so that none is replayed in the same step."""
        if self.every_epoch or learner.current_epoch == 0:
            self.memory.insert(batch)
