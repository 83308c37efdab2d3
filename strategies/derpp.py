r"""Dark Experience Replay++ (Buzzega et al. 2020, equation 6).

DER stores each example in the memory M with the logits z that the network gave for it at that time, and keeps the
present logits near them. DER++ also trains on the labels of replayed examples, from a second, independent draw:

.. math:: L = \mathrm{CE}(f(B), y) + \alpha \, \mathbb{E}_{(x', z') \sim M} \lVert f(x') - z' \rVert^2_{\text{mean}}
          + \beta \, \mathbb{E}_{(x'', y'') \sim M} \mathrm{CE}(f(x''), y'')

With beta = 0 it is DER. It does not need task boundaries.

Defaults: alpha = 0.1 and beta = 0.5 are Mammoth's values for Split-CIFAR-10 with 200 exemplars.
Differences from the paper: the squared distance is averaged over the classes as well as over the examples, as in the
released code, for which alpha is tuned. With the squared norm of the paper it would have to be alpha / C.
Differences from the reference code (Mammoth): the cross-entropies run over the classes that compete, not over the whole
head. As in Mammoth, each draw has a forward pass of its own, so that batch norm sees three batches per step; and every
epoch offers its examples to the reservoir, which gradually replaces the poor logits of the first epoch.

State: the memory, |M| examples with their labels and C logits each. Scenarios: all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
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


def dark_knowledge(logits: Tensor, stored: Tensor) -> Tensor:
    """Return the squared distance of logits (B, C) from stored ones, averaged over examples and classes.

    Example:
        >>> float(dark_knowledge(torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1, 3)))
        1.6666666269302368
    """
    return F.mse_loss(logits, stored)


class DERpp(Strategy):
    """Replays examples from a memory with their labels and with the logits stored with them.

    Args:
        memory_size: Total number of exemplars, |M|.
        alpha: Weight of the distance from the stored logits.
        beta: Weight of the cross-entropy of replayed examples; 0 is DER.
        batch_size: Examples per draw, over all processes; None means as many as there are incoming examples.
        storage: Where the exemplars are stored: on the "device", on the "host" or on "disk".

    Example:
        >>> DERpp(memory_size=20)
        DERpp(memory_size=20)
    """

    targets = ("label", "multilabel", "regression")
    needs = ("memory",)

    def __init__(
        self,
        memory_size: Annotated[int, Ge(1)] = 200,
        alpha: Annotated[float, Ge(0)] = 0.1,
        beta: Annotated[float, Ge(0)] = 0.5,
        batch_size: Annotated[int, Ge(1)] | None = None,
        storage: str = "device",
    ) -> None:
        super().__init__()
        self.memory_size, self.alpha, self.beta, self.batch_size = memory_size, alpha, beta, batch_size
        self.storage = storage

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate the memory, with C logits beside each exemplar."""
        check_draws("derpp", learner, stream, memory_size=self.memory_size, batch_size=self.batch_size)
        if self.batch_size is not None:
            self.batch_size = share("derpp.batch_size", self.batch_size)
        logits = {"logits": (stream.num_classes,)}
        self.memory = Memory(self.memory_size, stream, extras=logits, storage=self.storage)

    def loss(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor | None:
        """Return the sum of both replay terms, or None while the memory is empty or both weights are 0."""
        if len(self.memory) == 0 or (self.alpha == 0 and self.beta == 0):
            return None
        size = self.batch_size or batch.num_incoming
        terms = []
        if self.alpha:
            first = self.memory.sample(size)
            again = learner(learner.prepare(first.x, True), first.task)
            terms.append(self.alpha * dark_knowledge(again, first.extras["logits"]))
        if self.beta:
            second = self.memory.sample(size)
            again = learner(learner.prepare(second.x, True), second.task)
            terms.append(self.beta * learner.criterion(again, second))
        return torch.stack(terms).sum()

    def after_step(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> None:
        """Offer the incoming examples to the memory, with the logits that they had before the step."""
        batch.extras["logits"] = logits
        self.memory.insert(batch)
