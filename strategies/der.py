r"""Dark Experience Replay (Buzzega et al. 2020, equation 4).

With the logits z that the network gave when an example was stored, of rows drawn from the memory M:

.. math:: L = \mathrm{CE}(f(B), y) + \alpha \, \mathbb{E}_{(x', z') \sim M} \lVert f(x') - z' \rVert^2_{\text{mean}}

No label of the past is used and no boundary between tasks.

Differences from the paper: the squared distance is averaged over the classes as well as the rows, as the released
code does; its alpha is tuned for that (the paper's norm would need alpha / C).
Differences from the reference code (Mammoth): the cross-entropy runs over the classes that compete, not over the
whole head. Like there, the draw has a forward pass of its own, so batch norm sees two batches a step, and every epoch
offers its rows to the reservoir, which replaces the poor logits of the first.

State: the memory, M rows with C logits each. Scenarios: all. DER++ (`derpp`) with beta = 0 is the same to the bit.
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
    """Replays stored logits beside the incoming rows.

    Args:
        memory_size: Exemplars in all, |M|.
        alpha: Weight of the stored logits.
        batch_size: Rows of the draw, of all processes together; None means as many as come in.
        storage: Where the exemplars lie: on the "device", on the "host", or on "disk".

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
        """Allocate the memory, with a row of logits beside each exemplar."""
        check_draws("der", learner, stream, memory_size=self.memory_size, batch_size=self.batch_size)
        if self.batch_size is not None:
            self.batch_size = share("der.batch_size", self.batch_size)
        self.memory = Memory(self.memory_size, stream, extras={"logits": (stream.num_classes,)}, storage=self.storage)

    def loss(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor | None:
        """Return the distance from stored logits, once something is remembered."""
        if len(self.memory) == 0 or self.alpha == 0:
            return None
        old = self.memory.sample(self.batch_size or batch.num_incoming)
        again = learner(learner.prepare(old.x, True), old.task)
        return self.alpha * F.mse_loss(again, old.extras["logits"])

    def after_step(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> None:
        """Offer the incoming rows with the logits that they had before the step."""
        batch.extras["logits"] = logits
        self.memory.insert(batch)
