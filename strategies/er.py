r"""Experience Replay (Rolnick et al. 2019; Chaudhry et al. 2019, "On Tiny Episodic Memories", algorithm 1).

Each step trains on the incoming rows B and as many drawn from a memory M:

.. math:: L = \frac{1}{|B| + |B_M|} \sum_{(x, y) \in B \cup B_M} \mathrm{CE}(f(x), y)

Differences from the papers: none for one epoch. With several, an example is offered to the reservoir in the first
epoch only, so that each is stored with the textbook's probability |M| / n.
Differences from reference code: Mammoth offers every example again in each epoch (`every_epoch=true` does so), and
computes the loss over all classes of the head instead of those that compete.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge
from torch import Tensor

from cl.distributed import share
from cl.engine.batch import Batch
from cl.engine.strategy import LearnerLike, Strategy
from cl.toolkit.memory import Memory

if TYPE_CHECKING:
    from cl.data.task import Stream


class ER(Strategy):
    """Appends remembered rows to every batch.

    Args:
        memory_size: Exemplars in all, |M|.
        batch_size: Remembered rows a step, of all processes together; None means as many as come in.
        policy: What the memory keeps: "reservoir", "class_balanced" or "ring".
        every_epoch: Offer each example to the memory in every epoch, not in the first only.
        storage: Where the exemplars lie: on the "device", on the "host", or on "disk".

    Example:
        >>> ER(memory_size=20)
        ER(memory_size=20)
    """

    targets = ("label", "multilabel", "regression")
    needs = ("memory",)

    def __init__(
        self,
        memory_size: Annotated[int, Ge(1)] = 200,
        batch_size: Annotated[int, Ge(1)] | None = None,
        policy: str = "reservoir",
        every_epoch: bool = False,
        storage: str = "device",
    ) -> None:
        super().__init__()
        self.memory_size, self.batch_size = memory_size, batch_size
        self.policy, self.every_epoch, self.storage = policy, every_epoch, storage

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate the memory."""
        if self.batch_size is not None:
            self.batch_size = share("er.batch_size", self.batch_size)
        self.memory = Memory(self.memory_size, stream, self.policy, storage=self.storage)

    def extend_batch(self, learner: LearnerLike, batch: Batch) -> Batch:
        """Append remembered rows, once there are any."""
        if len(self.memory) == 0:
            return batch
        return batch.append(self.memory.sample(self.batch_size or batch.num_incoming))

    def after_step(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> None:
        """Offer the incoming rows to the memory; after the step, so that none is replayed in its own."""
        if self.every_epoch or learner.current_epoch == 0:
            self.memory.insert(batch)
