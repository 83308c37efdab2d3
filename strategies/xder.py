r"""Extended Dark Experience Replay (X-DER; Boschini et al. 2022, TPAMI, section 4), without a fixed classifier.

The paper is "Class-Incremental Continual Learning into the eXtended DER-verse"; its variant X-DER-RPC, whose classifier
is a fixed simplex, is not here.

Let the classes of task t be head t, c the present task and M a memory of examples of the tasks before it, with their
labels y and stored logits z. Each step minimises

.. math:: L = \mathrm{CE}(f(B)_{[c]}, y) + \alpha \, \mathbb{E}_M \lVert f(x') - z' \rVert^2_{\text{mean}}
          + \beta \, \mathbb{E}_M \, \mathrm{CE}(f(x'')_{[<c]}, y'') + \lambda L_{FP} + \eta L_{FC}

where :math:`f_{[c]}` are the logits of head c. With :math:`\bar f_{[t]}(v)` scaled to length 1 over `num_views`
augmented views v of B and of `num_contrasted` exemplars, the future heads are prepared by the supervised contrastive
loss, and none of their logits may come within a margin m of the example's own head y:

.. math:: L_{FP} = \frac{1}{T - c} \sum_{t > c} \mathrm{SupCon}_\tau(\bar f_{[t]}), \qquad
          L_{FC} = \mathbb{E} \, [ \max f_{[>c]}(x) + m - \max f_{[y]}(x) ]_+

the latter over those examples of B and of the draws for which it is not 0. What is stored is kept up to date: for a
replayed exemplar, the logits of heads c and later are replaced by the present ones, divided so that their largest is at
most :math:`\gamma z_y` where it exceeded :math:`z_y`. In a task the k-th time happens with probability 1/k, and once
more for all when the task ends. Then the memory takes in examples of the task, as many of each class, with the logits
of the earlier heads divided in the same way.

Published: 49.93 % on Split-CIFAR-100 (class-incremental, 10 tasks, 500 exemplars, 50 epochs a task), as Mammoth
(github.com/aimagelab/mammoth, scripts/reproduce.json) lists it, with the two terms that are left out here (see below).

Defaults: those of the released code for Split-CIFAR-100 with 500 exemplars.
Differences from the paper: the constraint on the logits of past heads is left out; the released code has it off.
Differences from the reference code (Mammoth): its distance-preserving term and its alignment of batch norm are left
out; logits at the end of a task are computed in evaluation mode without augmentation; an example that is drawn twice in
a step counts twice in L_FC; where z_y is not positive, larger logits are set to 0 instead of changing their sign.

State: the memory, |M| examples with C logits and a count each. A step passes `num_views` times as many views as there
are incoming and contrasted examples. Scenarios: class, task. Refused: inputs that are not images, tasks that share
classes or examples, several processes, another strategy that owns `criterion`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import Tensor

from cl.data.augment import ContrastiveView
from cl.engine.batch import Batch
from cl.engine.preflight import check_draws
from cl.engine.strategy import LearnerLike, Strategy
from cl.errors import InputError
from cl.random import Random
from cl.toolkit.contrast import supervised_contrastive
from cl.toolkit.exemplars import check_room
from cl.toolkit.logit_memory import LogitMemory
from cl.toolkit.memory import Rows
from cl.toolkit.views import check_images

if TYPE_CHECKING:
    from cl.data.task import Stream, Task


class XDER(Strategy):
    """Prepares the outputs of future tasks, and keeps the stored logits of past ones up to date.

    Args:
        memory_size: Total number of exemplars, |M|.
        batch_size: Exemplars per draw, of which a step makes two; None means as many as there are incoming examples.
        alpha: Weight of the distance from the stored logits.
        beta: Weight of the cross-entropy of replayed examples, over the classes of past tasks.
        gamma: Largest renewed logit as a multiple of that of the label.
        weight: lambda, the weight of the preparation of future heads.
        eta: Weight of the constraint on future heads.
        margin: m of that constraint.
        temperature: tau, which divides the products of normalised heads.
        num_views: Augmented views of each contrasted example.
        num_contrasted: Exemplars that are contrasted in a step, together with the incoming examples.
        storage: Where the exemplars are stored: on the "device", on the "host" or on "disk".

    Raises:
        InputError: If the inputs are no images, tasks share classes, or there are fewer exemplars than classes.

    Example:
        >>> XDER(memory_size=20)
        XDER(memory_size=20)
    """

    scenarios = ("class", "task")
    needs = ("memory", "boundaries")
    needs_inputs = True
    distributed = False  # contrasts each example with all others of the batch

    def __init__(
        self,
        memory_size: Annotated[int, Ge(1)] = 500,
        batch_size: Annotated[int, Ge(1)] | None = None,
        alpha: Annotated[float, Ge(0)] = 0.3,
        beta: Annotated[float, Ge(0)] = 0.8,
        gamma: Annotated[float, Ge(0)] = 0.85,
        weight: Annotated[float, Ge(0)] = 0.05,
        eta: Annotated[float, Ge(0)] = 0.1,
        margin: Annotated[float, Ge(0)] = 0.3,
        temperature: Annotated[float, Gt(0)] = 5.0,
        num_views: Annotated[int, Ge(2)] = 4,
        num_contrasted: Annotated[int, Ge(1)] = 64,
        storage: str = "device",
    ) -> None:
        super().__init__()
        self.memory_size, self.batch_size, self.storage = memory_size, batch_size, storage
        self.alpha, self.beta, self.gamma, self.weight = alpha, beta, gamma, weight
        self.eta, self.margin, self.temperature = eta, margin, temperature
        self.num_views, self.num_contrasted = num_views, num_contrasted
        self.view, self.random = ContrastiveView(), Random()

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate the memory, with C logits and a count of their renewals beside each exemplar."""
        check_images(stream, "XDER")
        if learner.shared_outputs or learner.mixed:
            raise InputError(
                f"XDER gives each task classes of its own, and tasks of {stream.name!r} share some: use der."
            )
        check_room("xder.memory_size", self.memory_size, stream)
        check_draws("xder", learner, stream, batch_size=self.batch_size)
        self.memory = LogitMemory(self.memory_size, stream, self.gamma, self.storage)

    def criterion(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor:
        """Return the cross-entropy over the classes of each example's own task, a scalar."""
        return F.cross_entropy(learner.mask(logits, batch.task, "task"), batch.y)

    def loss(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor | None:
        """Return the sum of the replay terms, and of those for future heads, a scalar."""
        n, future = batch.num_incoming, ~learner.seen
        outputs, tasks, total = [logits[:n]], [batch.task[:n]], logits.new_zeros(())
        self._drawn: list[tuple[Rows, Tensor]] = []
        for term in ("logits", "labels") if len(self.memory) else ():
            where = self.memory.draw(self.batch_size or n)
            old = self.memory.at(where)
            again = learner(learner.prepare(old.x, True), old.task)
            if term == "logits":
                total = total + self.alpha * F.mse_loss(again, old.extras["logits"].to(again))
            else:
                past = learner.membership[: learner.task_index].any(0)
                total = total + self.beta * F.cross_entropy(again.masked_fill(~past, -torch.inf), old.y)
            outputs, tasks = [*outputs, again], [*tasks, old.task]
            self._drawn.append((where, again.detach()))
        if future.any():
            total = total + self.weight * self._preparation(learner, batch.take(slice(n)))
            total = total + self.eta * self._constraint(learner, torch.cat(outputs), torch.cat(tasks), future)
        return total

    def _preparation(self, learner: LearnerLike, batch: Batch) -> Tensor:
        batch = self.memory.extend(batch, self.num_contrasted)
        views = [learner.prepare(self.view(batch.x, self.random.generator)) for _ in range(self.num_views)]
        z, y = learner(torch.cat(views), batch.task.repeat(self.num_views)).float(), batch.y.repeat(self.num_views)
        heads = learner.membership[learner.task_index + 1 :]
        each = [supervised_contrastive(F.normalize(z[:, head], dim=1), y, self.temperature) for head in heads]
        return torch.stack(each).mean()

    def _constraint(self, learner: LearnerLike, logits: Tensor, tasks: Tensor, future: Tensor) -> Tensor:
        own = logits.masked_fill(~learner.membership[tasks], -torch.inf).amax(1)
        gap = (logits[:, future].amax(1) + self.margin - own).relu()
        return gap.sum() / (gap > 0).sum().clamp_min(1)

    def after_step(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> None:
        """Renew the stored logits of some of the replayed exemplars."""
        if self._drawn:
            self.memory.renew_some(learner, self._drawn, self.random)

    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Renew all stored logits, and take in examples of the task, so that each class has as many."""
        self.memory.take_in(learner, task, self.random)
