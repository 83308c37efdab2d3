r"""iCaRL, incremental classifier and representation learning (Rebuffi et al. 2017, algorithms 1 to 5).

A network with one sigmoid a class is trained on the task's rows and all exemplars. Its targets are the labels for the
classes of the task, and for older ones the sigmoids q that the network of before the task gives (algorithm 3):

.. math:: L = -\frac{1}{C |B|} \sum_{x \in B} \Big( \sum_{c\ \mathrm{new}} \delta_{c=y} \log g_c + (1 - \delta_{c=y})
          \log (1 - g_c) + \sum_{c\ \mathrm{old}} q_c \log g_c + (1 - q_c) \log (1 - g_c) \Big)

After the task each of the t classes seen keeps :math:`m = \lfloor K / t \rfloor` exemplars: the first m of an older
one, and of a new one those that herding chooses (algorithms 4 and 5, `cl.toolkit.herding.herding`). The class of an
input is that of the nearest mean of exemplars, of features of length 1 (algorithm 1).

.. math:: \hat y = \arg\min_c \lVert \phi(x) - \mu_c \rVert, \qquad \mu_c \propto \sum_{p \in P_c} \phi(p)

The scores in R are those of the means, not of the sigmoids. Means are taken when a task ends, with the network of then;
what is measured inside a task still uses those of its beginning.

Differences from the paper: its sums over rows and classes are divided by |B| and by the number C of all classes of
the stream, as in the released code, whose learning rate of 2 belongs to that; weight decay is the optimizer's. K / t is
rounded down, there up. A class that comes again is new: it is labelled, and herded among its present rows.
Differences from the reference code: that (and Mammoth) trains the sigmoids of classes to come towards 0 as well, and
takes the means over exemplars and their mirror images; its augmentation is the stream's here. Van de Ven's divides
the teacher's logits by 2 before the sigmoid, but not the student's.

State: K exemplars with their ranks; the teacher, once the network's size; the means, C x D. Between tasks the task's
rows and the exemplars are copied into one array. Scenarios: class- and task-incremental. Refuses the
domain-incremental, targets other than labels, a memory of less than one exemplar a class, and another owner of
`encode`, which the teacher would not have.
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
    """Predicts the nearest mean of herded exemplars, and distils the sigmoids of old classes.

    Args:
        memory_size: Exemplars in all, K.
        storage: Where the exemplars lie: on the "device", on the "host", or on "disk".

    Raises:
        InputError: If every task has the same classes, or a class would have no exemplar, or another strategy owns
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
        """Allocate exemplars, teacher and means."""
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
        """Copy what has been learned into the teacher, and list the classes that it is asked for."""
        self.teacher.load_state_dict(learner.trunk().state_dict())
        self.teacher.eval()
        self._old = learner.seen.clone()
        self._old[list(classes_of(task.train.labels))] = False

    def training_data(self, learner: LearnerLike, task: Task) -> TaskData:
        """Return the task's rows and the exemplars."""
        if len(self.memory) == 0:
            return task.train
        x, y, label, _ = self._exemplars()
        return TaskData.concat([task.train, TaskData(x.cpu(), y.cpu(), label.cpu())])

    def criterion(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor:
        """Return the binary cross-entropy of the classes seen with labels and, for old ones, the teacher's sigmoids."""
        targets = F.one_hot(batch.y, logits.shape[1]).to(logits.dtype)
        if learner.tasks_learned > 0:
            with torch.no_grad():
                taught = self.teacher["head"](self.teacher["backbone"](batch.view)).sigmoid()
            targets = torch.where(self._old, taught, targets)
        terms = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return (terms * learner.seen).sum() / terms.numel()

    @torch.no_grad()
    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Shorten the old classes' lists, herd those of the new ones, and take the means."""
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
        """Return inputs, labels, task labels and ranks of all exemplars."""
        held = self.memory.rows()
        return gathered([held.x, held.y, held.task, held.extras["rank"]])

    def predict(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the negative squared distance from every class's mean, (B, C)."""
        return nearness(learner.backbone(view), self.means)
