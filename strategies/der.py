r"""Dark Experience Replay (Buzzega et al. 2020, equation 4).

Each example is stored in the memory M together with the logits z that the network gave for it at that time. Training
keeps the present logits of replayed examples near the stored ones:

.. math:: L = \mathrm{CE}(f(B), y) + \alpha \, \mathbb{E}_{(x', z') \sim M} \lVert f(x') - z' \rVert^2_{\text{mean}}

The method uses neither labels of past examples nor task boundaries.

Defaults: alpha = 0.3 is Mammoth's value for Split-CIFAR-10 with 200 exemplars.
Differences from the paper: the squared distance is averaged over the classes as well as over the examples, as in the
released code, for which alpha is tuned. With the squared norm of the paper it would have to be alpha / C.
Differences from the reference code (Mammoth): the cross-entropy runs over the classes that compete, not over the whole
head. As in Mammoth, the replayed examples have a forward pass of their own, so that batch norm sees two batches per
step; and every epoch offers its examples to the reservoir, which gradually replaces the poor logits of the first epoch.

State: the memory, |M| examples with C logits each. Scenarios: all. DER++ (`derpp`) with beta = 0 gives the same bits.
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
from cl.toolkit.memory import Memory

if TYPE_CHECKING:
    from cl.data.task import Stream


class DER(Strategy):
    """Keeps the logits of replayed examples near those stored with them.

    Args:
        memory_size: Total number of exemplars, |M|.
        alpha: Weight of the distance from the stored logits.
        batch_size: Replayed examples per step, over all processes; None means as many as there are incoming examples.
        storage: Where the exemplars are stored: on the "device", on the "host" or on "disk".

    Example:
        >>> DER(memory_size=20)
        DER(memory_size=20)
    """

    targets = ("label", "multilabel", "regression")
    needs = ("memory",)

    def __init__(
        self,
        memory_size: Annotated[int, Ge(1)] = 200,
        alpha: Annotated[float, Ge(0)] = 0.3,
        batch_size: Annotated[int, Ge(1)] | None = None,
        storage: str = "device",
    ) -> None:
        super().__init__()
        self.memory_size, self.alpha, self.batch_size, self.storage = memory_size, alpha, batch_size, storage

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate the memory, with C logits beside each exemplar."""
        check_draws("der", learner, stream, memory_size=self.memory_size, batch_size=self.batch_size)
        if self.batch_size is not None:
            self.batch_size = share("der.batch_size", self.batch_size)
        self.memory = Memory(self.memory_size, stream, extras={"logits": (stream.num_classes,)}, storage=self.storage)

    def loss(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor | None:
        """Return the weighted distance from the stored logits, or None while the memory is empty or alpha is 0."""
        if len(self.memory) == 0 or self.alpha == 0:
            return None
        old = self.memory.sample(self.batch_size or batch.num_incoming)
        again = learner(learner.prepare(old.x, True), old.task)
        return self.alpha * F.mse_loss(again, old.extras["logits"])

    def after_step(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> None:
        """Offer the incoming examples to the memory, with the logits that they had before the step."""
        batch.extras["logits"] = logits
        self.memory.insert(batch)
