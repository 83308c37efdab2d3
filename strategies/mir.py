r"""Maximally interfered retrieval (Aljundi et al. 2019, section 3.1, algorithm 1).

Of candidates drawn from the memory M those are replayed whose loss a plain SGD step on the incoming rows B alone would
raise the most:

.. math:: \theta^v = \theta - \eta \nabla_\theta L(B; \theta), \qquad
          s(x, y) = \mathrm{CE}(f_{\theta^v}(x), y) - \mathrm{CE}(f_\theta(x), y)

.. math:: L = \mathrm{CE}(f(B), y) + \frac1k \sum_{(x', y') \in \mathrm{top}_k(s)} \mathrm{CE}(f(x'), y')

:math:`\eta` is the optimizer's present rate, of each parameter its own. The scores are taken of plain images and in
training mode, as the losses are, but leave no trace in what batch norm keeps.

Differences from the paper: the means over B and over the chosen rows are added, as the released code does, where one
mean over the union would be half of it: halve the learning rate to compare with `er`. With several epochs an example is
offered to the reservoir in the first one only.
Differences from the reference code: candidates are drawn from the first step on and from the whole memory, where it
leaves out the present task's rows. Its MNIST scripts compare with the lowest loss of a row so far, and its forward
passes for the scores move the running statistics of batch norm.

State: the memory, M rows with labels. A step costs one backward pass on B and two forward passes on the candidates
more than ER. Scenarios: all. Refuses targets other than labels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor

from cl.distributed import mean_gradients, share
from cl.engine.batch import Batch
from cl.engine.preflight import check_draws
from cl.engine.strategy import LearnerLike, Strategy
from cl.errors import InputError
from cl.toolkit.memory import Memory

if TYPE_CHECKING:
    from cl.data.task import Stream


def most_raised(before: Tensor, after: Tensor, size: int) -> Tensor:
    """Return the places of the losses (n,) that rise most, at most `size`, the most first.

    Example:
        >>> most_raised(torch.tensor([0.2, 0.5, 0.1]), torch.tensor([0.9, 0.6, 0.7]), 2).tolist()
        [0, 2]
    """
    return (after - before).topk(min(size, len(before))).indices


class MIR(Strategy):
    """Replays what the incoming rows are about to spoil.

    Args:
        memory_size: Exemplars in all, |M|.
        batch_size: Rows replayed a step, of all processes together; None means as many as come in.
        num_candidates: Rows drawn a step, of which these are chosen.
        every_epoch: Offer each example to the memory in every epoch, not in the first only.
        storage: Where the exemplars lie: on the "device", on the "host", or on "disk".

    Raises:
        InputError: If fewer candidates are drawn than chosen.

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
        size = self.batch_size or learner.batch_size
        if self.num_candidates < size:
            raise InputError(
                f"mir.num_candidates={self.num_candidates} leaves nothing to choose of {size} rows a step: raise it."
            )
        if self.batch_size is not None:
            self.batch_size = share("mir.batch_size", self.batch_size)
        self.num_candidates = share("mir.num_candidates", self.num_candidates)
        self.memory = Memory(self.memory_size, stream, storage=self.storage)

    def loss(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor | None:
        """Return the loss of the candidates that are interfered with most, once there are any."""
        if len(self.memory) == 0:
            return None
        candidates = self.memory.sample(self.num_candidates)
        n = batch.num_incoming
        virtual = _after_a_step(learner, learner.criterion(logits[:n], batch.take(slice(n))), n)
        before, after = _losses(learner, candidates, {}), _losses(learner, candidates, virtual)
        chosen = candidates.take(most_raised(before, after, self.batch_size or n))
        return learner.criterion(learner(learner.prepare(chosen.x, True), chosen.task), chosen)

    def after_step(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> None:
        """Offer the incoming rows to the memory; after the step, so that none is replayed in its own."""
        if self.every_epoch or learner.current_epoch == 0:
            self.memory.insert(batch)


def _after_a_step(learner: LearnerLike, loss: Tensor, rows: int) -> dict[str, Tensor]:
    """Return the parameters by name after a step of plain SGD on a loss of some rows, whose graph stays."""
    rates = learner.learning_rates()
    named = [(name, p) for name, p in learner.named_parameters() if p in rates]
    own = torch.autograd.grad(loss, [p for _, p in named], retain_graph=True, allow_unused=True, materialize_grads=True)
    steps = zip(named, mean_gradients(own, rows), strict=True)
    return {name: p.detach() - rates[p] * gradient for (name, p), gradient in steps}


@torch.no_grad()
def _losses(learner: LearnerLike, batch: Batch, parameters: dict[str, Tensor]) -> Tensor:
    """Return each row's loss (n,) with some parameters in place of the learner's; its buffers stay as they are."""
    apart = {name: buffer.clone() for name, buffer in learner.trunk().named_buffers()}
    with torch.compiler.set_stance("force_eager"):
        logits = learner.with_weights({**apart, **parameters}, learner.prepare(batch.x), batch.task)
    return F.cross_entropy(learner.mask(logits, batch.task, learner.train_mask), batch.y, reduction="none")
