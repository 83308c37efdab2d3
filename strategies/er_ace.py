r"""ER with asymmetric cross-entropy (Caccia et al. 2022, "New Insights on Reducing Abrupt Representation Change").

Incoming rows B compete only among the classes that stand in B, so that new classes do not push old ones away; rows
drawn from the memory M compete among all classes seen:

.. math:: L = \frac{1}{|B|} \sum_{(x, y) \in B} \mathrm{CE}(f(x), y; C_B)
          + \frac{1}{|B_M|} \sum_{(x, y) \in B_M} \mathrm{CE}(f(x), y; C_{seen})

Both terms stand from the first step on, in the first task too: no boundary is used, but for the classes that compete on
remembered rows, which are those of a task from its first step on.

Differences from the paper: the head is linear, where the paper's has a cosine and a scale. With several epochs an
example is offered to the reservoir in the first one only. Rows of other replays in the batch count as drawn from M.
Differences from the reference code: it has one forward pass for B and one for the memory's rows, so batch norm sees
them apart; here both are in one batch. Classes not seen yet compete there on incoming rows (those above the highest
label seen, which is right only for an ascending order of classes): `train_mask=domain` does so in any order. Mammoth
does neither, masking nor replay, in the first task.

State: the memory, M rows with labels. Scenarios: all; in the domain-incremental the mask bites only where a batch
lacks a class. Refuses targets other than labels.
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
    """Send the logits (B, C) of some classes, bool (C,), to minus infinity.

    Example:
        >>> import torch.nn.functional as F
        >>> logits = torch.tensor([[2.0, 1.0, 0.5, 0.0]])
        >>> old = torch.tensor([True, True, False, False])
        >>> round(float(F.cross_entropy(without(logits, old), torch.tensor([2]))), 4)
        0.4741
    """
    return logits.masked_fill(classes, -torch.inf)


class ERACE(Strategy):
    """Appends remembered rows to every batch, and keeps the old classes out of the incoming rows' loss.

    Args:
        memory_size: Exemplars in all, |M|.
        batch_size: Remembered rows a step, of all processes together; None means as many as come in.
        every_epoch: Offer each example to the memory in every epoch, not in the first only.
        storage: Where the exemplars lie: on the "device", on the "host", or on "disk".

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
        """Append remembered rows, once there are any."""
        if len(self.memory) == 0:
            return batch
        return batch.append(self.memory.sample(self.batch_size or batch.num_incoming))

    def criterion(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor:
        """Return the sum of both cross-entropies."""
        n = batch.num_incoming
        present = total(logits.new_zeros(logits.shape[1]).index_fill(0, batch.y[:n], 1.0)) > 0
        incoming = without(logits[:n], learner.seen & ~present)
        loss = learner.criterion(incoming, batch.take(slice(n)))
        return loss if n == len(batch) else loss + learner.criterion(logits[n:], batch.take(slice(n, None)))

    def after_step(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> None:
        """Offer the incoming rows to the memory; after the step, so that none is replayed in its own."""
        if self.every_epoch or learner.current_epoch == 0:
            self.memory.insert(batch)
