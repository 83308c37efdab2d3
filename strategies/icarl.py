r"""iCaRL, incremental classifier and representation learning (Rebuffi et al. 2017, algorithms 1 to 5).

A network with one sigmoid output per class is trained on the examples of the task and all exemplars. For the classes of
the task the targets are the labels; for older classes they are the outputs q of the network as it was before the task,
the teacher (algorithm 3). With :math:`g_c` the output for class c:

.. math:: L = -\frac{1}{C |B|} \sum_{x \in B} \Big( \sum_{c\ \mathrm{new}} \delta_{c=y} \log g_c + (1 - \delta_{c=y})
          \log (1 - g_c) + \sum_{c\ \mathrm{old}} q_c \log g_c + (1 - q_c) \log (1 - g_c) \Big)

After the task each of the t classes seen has :math:`m = \lfloor K / t \rfloor` exemplars. Of an older class the first m
in its ranking are retained; those of a new class are chosen and ranked by herding (algorithms 4 and 5,
`cl.toolkit.herding.herding`). An input is assigned to the class with the nearest mean of exemplars, where all features
are scaled to length 1 (algorithm 1):

.. math:: \hat y = \arg\min_c \lVert \phi(x) - \mu_c \rVert, \qquad \mu_c \propto \sum_{p \in P_c} \phi(p)

R is measured with this nearest-mean rule, not with the sigmoids. The means are computed when a task ends, with the
network of that time, so what is measured inside a task uses those of the task's beginning.

Defaults: K = 200 exemplars; the paper has 2000 for CIFAR-100.
Differences from the paper: the loss is divided by the batch size |B| and by the number C of all classes of the stream,
as in the released code, whose learning rate of 2 fits that scale; weight decay is left to the optimizer. K / t is
rounded down; the paper rounds it up. A class that comes again is treated as new: its targets are the labels, and its
exemplars are chosen among its present examples.
Differences from the reference code: the released code (and Mammoth) also trains the sigmoids of classes to come towards
0, and computes the means over the exemplars and their mirror images. The augmentation here is that of the stream. The
code of van de Ven et al. divides the teacher's logits by 2 before the sigmoid, but not the student's.

State: K exemplars with their ranks; the teacher, which is as large as the network; the means, C x D. Before a task its
examples and the exemplars are copied into one array. Scenarios: class- and task-incremental. Refused: the
domain-incremental scenario, targets other than single labels, a memory of less than one exemplar per class, and another
strategy that implements `encode`, which the teacher would lack.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor

from cl.data.target import classes_of
from cl.data.task import TaskData
from cl.distributed import gathered, own
from cl.engine.batch import Batch
from cl.engine.strategy import LearnerLike, Strategy
from cl.errors import InputError
from cl.toolkit.herding import class_means, herding, nearness, unit_features
from cl.toolkit.memory import Memory

if TYPE_CHECKING:
    from cl.data.task import Stream, Task


class ICaRL(Strategy):
    """Predicts the class with the nearest mean of herded exemplars, and distils the outputs for old classes.

    Args:
        memory_size: Total number of exemplars, K.
        storage: Where the exemplars are stored: on the "device", on the "host" or on "disk".

    Raises:
        InputError: If every task has the same classes, a class would have no exemplar, or another strategy implements
            `encode`.

    Example:
        >>> ICaRL(memory_size=20)
        ICaRL(memory_size=20)
    """

    scenarios = ("class", "task")
    needs = ("memory", "boundaries")
    means: Tensor

    def __init__(self, memory_size: Annotated[int, Ge(1)] = 200, storage: str = "device") -> None:
        super().__init__()
        self.memory_size, self.storage = memory_size, storage

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate the memory, the teacher and the means."""
        if learner.strategies.owned("encode"):
            raise InputError("iCaRL distils backbone and head, but another strategy owns encode: drop one of the two.")
        if self.memory_size < stream.num_classes:
            raise InputError(
                f"icarl.memory_size={self.memory_size} leaves some of the {stream.num_classes} classes without an "
                f"exemplar: set it to {stream.num_classes} or more."
            )
        self.memory = Memory(self.memory_size, stream, extras={"rank": ()}, storage=self.storage)
        self.teacher = deepcopy(learner.trunk()).requires_grad_(False)
        self.register_buffer("means", torch.zeros(stream.num_classes, int(learner.backbone.num_features)))  # type: ignore[arg-type]

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Copy backbone and head into the teacher, and list the old classes, whose targets it gives."""
        self.teacher.load_state_dict(learner.trunk().state_dict())
        self.teacher.eval()
        self._old = learner.seen.clone()
        self._old[list(classes_of(task.train.labels))] = False

    def training_data(self, learner: LearnerLike, task: Task) -> TaskData:
        """Return the examples of the task together with all exemplars."""
        if len(self.memory) == 0:
            return task.train
        x, y, label, _ = self._exemplars()
        return TaskData.concat([task.train, TaskData(x.cpu(), y.cpu(), label.cpu())])

    def criterion(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor:
        """Return the binary cross-entropy of the classes seen with their targets (algorithm 3), a scalar."""
        targets = F.one_hot(batch.y, logits.shape[1]).to(logits.dtype)
        if learner.tasks_learned > 0:
            with torch.no_grad():
                taught = self.teacher["head"](self.teacher["backbone"](batch.view)).sigmoid()
            targets = torch.where(self._old, taught, targets)
        terms = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return (terms * learner.seen).sum() / terms.numel()

    @torch.no_grad()
    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Drop exemplars of old classes beyond the first m, choose those of new classes, and compute the means."""
        labels, features = task.train.labels, unit_features(learner, task.train)
        size = self.memory_size // int(learner.seen.sum())
        rows = [(labels == c).nonzero().flatten() for c in classes_of(labels)]
        chosen = [some[herding(features[some.to(features.device)], size).cpu()] for some in rows]
        ranks = torch.cat([torch.arange(len(some), dtype=torch.float32) for some in chosen])
        new = [column.to(learner.device) for column in (*task.train.take(torch.cat(chosen)).tensors(), ranks)]
        old = self._exemplars()
        kept = (old[3] < size) & ~torch.isin(old[1], new[1])
        x, y, label, rank = (torch.cat([a[kept], b]) for a, b in zip(old, new, strict=True))
        self.memory.fill(Batch(x, y, label, {"rank": rank}).take(own(len(y)).to(y.device)))
        self.means.copy_(class_means(unit_features(learner, TaskData(x, y, label)), y, len(self.means)))

    def _exemplars(self) -> list[Tensor]:
        """Return inputs, labels, task labels and ranks of the exemplars of all processes."""
        held = self.memory.rows()
        return gathered([held.x, held.y, held.task, held.extras["rank"]])

    def predict(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the negative squared distance of each feature to each class's mean, (B, C)."""
        return nearness(learner.backbone(view), self.means)
