r"""Experience Replay (Rolnick et al. 2019; Chaudhry et al. 2019, "On Tiny Episodic Memories", algorithm 1).

Each step trains on the incoming minibatch B together with a minibatch :math:`B_M` of the same size, drawn at random
from a memory M of stored examples:

.. math:: L = \frac{1}{|B| + |B_M|} \sum_{(x, y) \in B \cup B_M} \mathrm{CE}(f(x), y)

By default the memory is a reservoir: after n examples each of them is stored with the same probability |M| / n. It
needs neither task labels nor task boundaries.

Defaults: 200 exemplars are the smallest memory in the experiments of Buzzega et al. 2020.
Differences from the papers: none for one epoch. With several epochs, an example is offered to the reservoir in the
first epoch only, so that the probability above stays right.
Differences from the reference code: Mammoth offers every example again in each epoch (`every_epoch=true` does so), and
computes the loss over all classes of the head instead of over the classes that compete.

With `second_view` each incoming and replayed example is used twice, as it is and augmented: the control for methods of
which a second view is a part (`scr`, `pcr`, `hpcr`, `onpro`).

State: the memory, |M| examples with their labels. Scenarios: all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge
from torch import Tensor, nn

from cl.distributed import share
from cl.engine.batch import Batch
from cl.engine.strategy import LearnerLike, Strategy
from cl.toolkit.memory import Memory
from cl.toolkit.views import check_images, with_another_view

if TYPE_CHECKING:
    from cl.data.task import Stream


class ER(Strategy):
    """Trains on each incoming batch together with examples replayed from a memory.

    Args:
        memory_size: Total number of exemplars, |M|.
        batch_size: Replayed examples per step, over all processes; None means as many as there are incoming examples.
        policy: Rule by which the memory chooses what it stores: "reservoir", "class_balanced" or "ring".
        every_epoch: Offer each example to the memory in every epoch instead of in the first epoch only.
        storage: Where the exemplars are stored: on the "device", on the "host" or on "disk".
        second_view: Augmentation `(x, numpy generator) -> x` of a second view of each example, trained on as well,
            such as `cl.data.augment.ContrastiveView`; None for one view.

    Raises:
        InputError: If the inputs are not images, (C, H, W), and there is a second view.

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
        second_view: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.memory_size, self.batch_size = memory_size, batch_size
        self.policy, self.every_epoch, self.storage, self.second_view = policy, every_epoch, storage, second_view

    @property
    def needs_inputs(self) -> bool:  # type: ignore[override]
        """Whether a second view augments them."""
        return self.second_view is not None

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate the memory."""
        if self.second_view is not None:
            check_images(stream, "er.second_view")
        if self.batch_size is not None:
            self.batch_size = share("er.batch_size", self.batch_size)
        self.memory = Memory(self.memory_size, stream, self.policy, storage=self.storage)

    def extend_batch(self, learner: LearnerLike, batch: Batch) -> Batch:
        """Append replayed examples, if the memory holds any, then the second views."""
        batch = self.memory.extend(batch, self.batch_size)
        if self.second_view is None:
            return batch
        return with_another_view(batch, self.second_view, learner.augment_random.generator)

    def after_step(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> None:
        """Offer the incoming examples to the memory, after the step, so that none is replayed in the same step."""
        if self.every_epoch or learner.current_epoch == 0:
            self.memory.insert(batch)
