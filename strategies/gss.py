r"""Gradient-based sample selection, the greedy variant (GSS-Greedy; Aljundi et al. 2019, NeurIPS, algorithm 2).

Like ER, but the memory M keeps examples whose gradients point in different directions. The score of an incoming example
with the gradient g of its loss is 1 plus the largest cosine with the gradients of n random exemplars:

.. math:: c = 1 + \max_{j \le n} \frac{\langle g, g_j \rangle}{\lVert g \rVert \, \lVert g_j \rVert} \in [0, 2]

While there is room every example is stored with its score. Afterwards an example with c < 1, whose gradient points away
from all n, may replace one exemplar i, which is drawn in proportion to the stored scores:

.. math:: i \sim \frac{C_i}{\sum_j C_j}, \qquad P(\text{replace}) = \frac{C_i}{C_i + c}

Neither task labels nor boundaries are used. Published, quoted from memory: 82.6 % on Split-MNIST in one pass
(class-incremental; from the authors' script Disjoint_Mnist.sh: 1000 examples a task, two layers of 100 units,
|M| = 300, batches of 10, three updates each, plain SGD with rate 0.05). Avalanche's reproductions
(github.com/ContinualAI/continual-learning-baselines) list 78 % as the paper's and 82 % as their own.

Defaults: n = 10, as in the paper's experiments and Mammoth; 200 exemplars are the smallest memory in the experiments of
Buzzega et al. 2020. `updates_per_batch=3` gives the three updates.
Differences from the paper: incoming and replayed examples share one mean, as in `er`; all examples of a minibatch are
compared with the same n exemplars, those stored before it. With several epochs an example is offered in the first only.
Differences from the reference code: each g_j is the gradient of one exemplar, as in Mammoth; in the authors' code it is
the mean gradient of ten. Both codes ask c < 1 of the whole minibatch's gradient first, the authors' code rescales the
scores before it draws i, and it makes a step on the incoming examples and another on the replayed ones. The first
examples, with nothing to compare to, get the score 0.1, as in both.

State: the memory, |M| examples with their labels and scores. A step costs B + n backward passes of single examples, in
evaluation mode, without augmentation, after its update. Scenarios: all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor

from cl.distributed import share
from cl.engine.batch import Batch
from cl.engine.strategy import LearnerLike, Strategy
from cl.random import Random
from cl.toolkit.memory import Memory, Rows
from cl.toolkit.weights import flat

if TYPE_CHECKING:
    from cl.data.task import Stream

_FIRST = 0.1  # the score of an example that has nothing to be compared with


def largest_cosine(g: Tensor, others: Tensor) -> Tensor:
    """Return 1 + the largest cosine of each gradient (B, P) with others (n, P), in [0, 2], (B,).

    Example:
        >>> largest_cosine(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 3.0], [-1.0, 0.0]])).tolist()
        [1.0, 2.0]
    """
    return 1 + (F.normalize(g, dim=1) @ F.normalize(others, dim=1).T).amax(1)


class GSS(Strategy):
    """Replays examples from a memory that keeps those whose gradients differ.

    Args:
        memory_size: Total number of exemplars, |M|.
        batch_size: Replayed examples per step, over all processes; None means as many as there are incoming examples.
        num_compared: Exemplars with whose gradients an incoming example's is compared, n.
        storage: Where the exemplars are stored: on the "device", on the "host" or on "disk".

    Example:
        >>> GSS(memory_size=20)
        GSS(memory_size=20)
    """

    targets = ("label", "multilabel", "regression")
    needs = ("memory",)

    def __init__(
        self,
        memory_size: Annotated[int, Ge(1)] = 200,
        batch_size: Annotated[int, Ge(1)] | None = None,
        num_compared: Annotated[int, Ge(1)] = 10,
        storage: str = "device",
    ) -> None:
        super().__init__()
        self.memory_size, self.batch_size = memory_size, batch_size
        self.num_compared, self.storage = num_compared, storage

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate the memory, with a score beside each exemplar."""
        if self.batch_size is not None:
            self.batch_size = share("gss.batch_size", self.batch_size)
        self.memory = Memory(self.memory_size, stream, extras={"score": ()}, storage=self.storage)
        self.random = Random(by_rank=True)

    def extend_batch(self, learner: LearnerLike, batch: Batch) -> Batch:
        """Append replayed examples, if the memory holds any."""
        return self.memory.extend(batch, self.batch_size)

    def after_step(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> None:
        """Score the incoming examples, and store some of them."""
        if batch.again or learner.current_epoch > 0:
            return
        scores = torch.full((len(batch),), _FIRST, dtype=torch.float32)
        if len(self.memory):
            others = _gradients(learner, self.memory.sample(self.num_compared))
            scores = largest_cosine(_gradients(learner, batch), others).cpu()
        batch.extras["score"] = scores
        self.memory.put(batch, self._slots(scores.numpy()))

    def _slots(self, scores: Rows) -> Rows:
        """Return the slot of each incoming example, -1 where it is not stored; a later one sees those before it."""
        stored = self.memory.column("score")[: len(self.memory)].cpu().double().tolist()
        slots = np.full(len(scores), -1)
        for row, c in enumerate(scores.tolist()):
            if len(stored) < self.memory.capacity:
                slots[row] = len(stored)
                stored.append(c)
            elif c < 1 and sum(stored) > 0:
                i = int(self.random.generator.choice(len(stored), p=np.array(stored) / sum(stored)))
                if self.random.generator.random() < stored[i] / (stored[i] + c):
                    slots[row], stored[i] = i, c
        return slots


def _gradients(learner: LearnerLike, batch: Batch) -> Tensor:
    """Return the gradient of each example's loss, in evaluation mode and without augmentation, (B, P)."""
    weights = [p for p in learner.parameters() if p.requires_grad]
    found = []
    with learner.evaluating(), torch.enable_grad():
        for row in range(len(batch)):
            one = batch.take(slice(row, row + 1))
            loss = learner.criterion(learner(learner.prepare(one.x), one.task), one)
            gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
            found.append(flat(gradients))
    return torch.stack(found).float()
