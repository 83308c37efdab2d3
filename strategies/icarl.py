r"""iCaRL, incremental classifier and representation learning (Rebuffi et al. 2017, algorithms 1 to 5).

A network with one sigmoid output per class is trained on the examples of the task and all exemplars. For the classes of
the task the targets are the labels; for older classes they are the outputs q of the network as it was before the task,
the teacher (algorithm 3). With :math:`g_c` the output for class c:

.. math:: L = -\frac{1}{C |B|} \sum_{x \in B} \Big( \sum_{c\ \mathrm{new}} \delta_{c=y} \log g_c + (1 - \delta_{c=y})
          \log (1 - g_c) + \sum_{c\ \mathrm{old}} q_c \log g_c + (1 - q_c) \log (1 - g_c) \Big)

After the task each of the t classes seen has :math:`m = \lfloor K / t \rfloor` exemplars. Of an older class the first m
in its ranking are retained; those of a new class are chosen and ranked by herding (algorithms 4 and 5,
`cl.toolkit.exemplars.Exemplars`). An input is assigned to the class with the nearest mean of exemplars, where all
features are scaled to length 1 (algorithm 1):

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

from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor

from cl.engine.batch import Batch
from cl.engine.strategy import LearnerLike, Strategy
from cl.toolkit.exemplars import Exemplars, check_room, old_classes
from cl.toolkit.herding import class_means, nearness, unit_features
from cl.toolkit.teacher import Teacher

if TYPE_CHECKING:
    from cl.data.task import Stream, Task, TaskData


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
        check_room("icarl.memory_size", self.memory_size, stream)
        self.memory = Exemplars(self.memory_size, stream, self.storage)
        self.teacher = Teacher(learner, "iCaRL")
        self.register_buffer("means", torch.zeros(stream.num_classes, int(learner.backbone.num_features)))  # type: ignore[arg-type]

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Copy backbone and head into the teacher, and list the old classes, whose targets it gives."""
        self.teacher.copy_from(learner)
        self._old = old_classes(learner, task)

    def training_data(self, learner: LearnerLike, task: Task) -> TaskData:
        """Return the examples of the task together with all exemplars."""
        return self.memory.with_exemplars(task.train)

    def criterion(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor:
        """Return the binary cross-entropy of the classes seen with their targets (algorithm 3), a scalar."""
        targets = F.one_hot(batch.y, logits.shape[1]).to(logits.dtype)
        if learner.tasks_learned > 0:
            assert batch.view is not None
            targets = torch.where(self._old, self.teacher(batch.view).sigmoid(), targets)
        terms = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return (terms * learner.seen).sum() / terms.numel()

    @torch.no_grad()
    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Drop exemplars of old classes beyond the first m, choose those of new classes, and compute the means."""
        exemplars = self.memory.renew(learner, task.train)
        features = unit_features(learner, exemplars)
        self.means.copy_(class_means(features, exemplars.labels, len(self.means)))

    def predict(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the negative squared distance of each feature to each class's mean, (B, C)."""
        return nearness(learner.backbone(view), self.means)
