r"""WA, weight aligning (Zhao et al. 2020, "Maintaining discrimination and fairness in class incremental learning").

A task's examples are learned together with exemplars of older classes, of which there are few. So the network prefers
new classes, and the weights of their outputs are longer. First the network is trained with the outputs :math:`\hat o`
of the network as it was before the task, the teacher. With n old classes and m new ones, and :math:`q_c`,
:math:`\hat q_c` the softmax of the old classes' outputs divided by a temperature T:

.. math:: L = (1 - \lambda) \, \mathrm{CE}(f(x), y) - \lambda \sum_{c\ \mathrm{old}} \hat q_c(x) \log q_c(x),
          \qquad \lambda = \frac{n}{n + m}

Then the weights of the new classes are multiplied by a number that makes both groups equally long on average:

.. math:: w_c \leftarrow \gamma w_c \quad (c\ \mathrm{new}), \qquad
          \gamma = \frac{\mathrm{mean}_{c\ \mathrm{old}} \lVert w_c \rVert}
                        {\mathrm{mean}_{c\ \mathrm{new}} \lVert w_c \rVert}

The length of a weight says how large its output is only if all its elements have one sign, since features after a ReLU
are not negative: negative elements of the head's weights are set to 0 after each step. The first task has no teacher,
and nothing is aligned after it. gamma is recorded as record/wa/gamma.

Without the clipping gamma may be above 1, so that new classes are preferred even more: on the digits of scikit-learn in
five tasks (an MLP, 20 epochs, 100 exemplars, two seeds) it was 1.1 to 1.4, and the accuracy at the end 46.5 with
`clip=false norm=2 largest=null`, 81.7 with `clip=false`, and 88.1 with the defaults. So gamma is at most 1.

Defaults: T = 2, lambda as above and the clipping are the paper's; the L1 norm and the bound of gamma are those of the
released code. K = 200 exemplars; the paper has 2000 for CIFAR-100.
Published: 83.5, 75.5, 68.7, 63.1 and 59.2 after each of five tasks of CIFAR-100, and 42.9 at the end without the
alignment, as a reproduction (github.com/hugoycj/Incremental-Learning-with-Weight-Aligning) lists the paper's; its own
end is 58.7. Quoted from memory: Yan et al. 2021 ("DER: dynamically expandable representation") report 72.81, the mean
of the five, with 2000 exemplars and a ResNet-18. The command for such a run is `cl-run strategy=wa
strategy.wa.memory_size=2000 dataset=cifar100 stream.num_tasks=5 backbone=resnet18`, with more than a hundred epochs; it
has not been run here.
Differences from the paper: gamma is at most 1 (`largest=null` drops that). The head may have a bias, which is trained
and not aligned. A class that comes again is treated as new.
Differences from the released code: there gamma multiplies the outputs at test and those of the teacher, while the
weights remain as they were trained, and the head starts each task from random weights. PyCIL aligns the weights as
here, with L2 norms, no bound and no clipping (`norm=2 largest=null clip=false`).

State: K exemplars with their ranks (`cl.toolkit.exemplars.Exemplars`); the teacher, which is as large as the network.
Before a task its examples and the exemplars are copied into one array. Scenarios: class-incremental. Refused: a memory
of less than one exemplar per class, a head that has not one row of weights for each class, targets other than single
labels, and another strategy that implements `encode`, which the teacher would lack.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import Tensor

from cl.data.target import classes_of
from cl.engine.batch import Batch
from cl.engine.strategy import LearnerLike, Strategy
from cl.toolkit.exemplars import Exemplars, check_room, old_classes
from cl.toolkit.proxies import check_proxies, proxies
from cl.toolkit.teacher import Teacher

if TYPE_CHECKING:
    from cl.data.task import Stream, Task, TaskData


def alignment(weight: Tensor, old: Tensor, new: Tensor, norm: float = 1.0) -> Tensor:
    """Return gamma, the mean norm of the old classes' rows over that of the new classes' rows of a weight, a scalar.

    Args:
        weight: One row for each class, (C, D).
        old: Positions of the old classes.
        new: Positions of the new classes.
        norm: The order p of the norm.

    Example:
        >>> weight = torch.tensor([[3.0, 4.0], [1.0, 0.0], [6.0, 8.0]])
        >>> round(float(alignment(weight, torch.tensor([0, 1]), torch.tensor([2]), norm=2)), 4)
        0.3
    """
    lengths: Tensor = weight.norm(p=norm, dim=1)
    return lengths[old].mean() / lengths[new].mean().clamp_min(1e-12)


class WA(Strategy):
    """Distils the outputs for old classes, and after a task scales the new classes' weights to the length of the old.

    Args:
        memory_size: Total number of exemplars, K.
        temperature: T, by which logits are divided.
        norm: The order of the norm of a weight.
        largest: Largest gamma; None for no bound.
        clip: Whether negative elements of the head's weights are set to 0 after each step.
        storage: Where the exemplars are stored: on the "device", on the "host" or on "disk".

    Raises:
        InputError: If a class would have no exemplar, the head has not one row of weights for each class, or another
            strategy implements `encode`.

    Example:
        >>> WA(memory_size=20)
        WA(memory_size=20)
    """

    scenarios = ("class",)
    needs = ("memory", "boundaries")

    def __init__(
        self,
        memory_size: Annotated[int, Ge(1)] = 200,
        temperature: Annotated[float, Gt(0)] = 2.0,
        norm: Annotated[float, Ge(1)] = 1.0,
        largest: Annotated[float, Gt(0)] | None = 1.0,
        clip: bool = True,
        storage: str = "device",
    ) -> None:
        super().__init__()
        self.memory_size, self.temperature, self.norm = memory_size, temperature, norm
        self.largest, self.clip, self.storage = largest, clip, storage

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate the memory and the teacher."""
        check_room("wa.memory_size", self.memory_size, stream)
        check_proxies(learner, "WA")
        self.memory = Exemplars(self.memory_size, stream, self.storage)
        self.teacher = Teacher(learner, "WA")

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Copy backbone and head into the teacher, and list the old and the new classes."""
        self.teacher.copy_from(learner)
        self._old = old_classes(learner, task).nonzero().flatten()
        self._new = torch.tensor(classes_of(task.train.labels), device=self._old.device)
        self._share = len(self._old) / (len(self._old) + len(self._new))  # lambda

    def training_data(self, learner: LearnerLike, task: Task) -> TaskData:
        """Return the examples of the task together with all exemplars."""
        return self.memory.with_exemplars(task.train)

    def criterion(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor:
        """Return the weighted sum of cross-entropy and distillation, a scalar."""
        if not self._share:
            return learner.criterion(logits, batch)
        assert batch.view is not None
        taught = (self.teacher(batch.view)[:, self._old] / self.temperature).softmax(1)
        distilled = F.cross_entropy(logits[:, self._old] / self.temperature, taught)
        return (1 - self._share) * learner.criterion(logits, batch) + self._share * distilled

    def after_step(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> None:
        """Set the negative weights of the head to 0."""
        if self.clip:
            with torch.no_grad():
                proxies(learner).clamp_(min=0)

    def after_epoch(self, learner: LearnerLike, task: Task, epoch: int) -> None:
        """Do so again, in a process that had no example in the epoch's last step, too."""
        if self.clip:
            with torch.no_grad():
                proxies(learner).clamp_(min=0)

    @torch.no_grad()
    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Choose the exemplars, then align the weights of the new classes."""
        self.memory.renew(learner, task.train)
        if self._share:
            gamma = alignment(proxies(learner), self._old, self._new, self.norm).clamp(max=self.largest or torch.inf)
            proxies(learner)[self._new] *= gamma
            learner.record("wa/gamma", gamma)
