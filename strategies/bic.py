r"""BiC, bias correction (Wu et al. 2019, "Large scale incremental learning").

A task's examples are learned together with exemplars of older classes, of which there are few, so that the network
prefers new classes. The paper finds that two numbers for all new classes correct that, and fits them on examples that
are held out of the training: as many of each class, old and new.

Stage 1 trains the network with the outputs :math:`\hat o` of the network as it was before the task, the teacher,
corrected as below. With n old classes and m new ones, and :math:`\pi_c`, :math:`\hat \pi_c` the softmax of the old
classes' outputs o and :math:`\hat o` divided by a temperature T:

.. math:: L = (1 - \lambda) \, \mathrm{CE}(o(x), y) - \lambda \sum_{c\ \mathrm{old}} \hat \pi_c(x) \log \pi_c(x),
          \qquad \lambda = \frac{n}{n + m}

Stage 2 fits alpha and beta by the cross-entropy on the examples held out, while the network remains as it is:

.. math:: q_c = o_c \quad (c\ \mathrm{old}), \qquad q_c = \alpha o_c + \beta \quad (c\ \mathrm{new}), \qquad
          \min_{\alpha, \beta} \mathrm{CE}(q(x), y) + \tfrac{r}{2} \big( (\alpha - 1)^2 + \beta^2 \big)

Predictions are those of q. The outputs are not corrected in and after the first task, and not inside of a task. alpha
and beta are recorded as record/bic/alpha and record/bic/beta.

Of K exemplars, a share is never trained on: neither as exemplars nor in their own task. Both parts have as many
exemplars of each class. Those of a new class are drawn at random for the held-out part (at most half of its examples),
and chosen by herding for the other (`cl.toolkit.exemplars.Exemplars`).

Defaults: T = 2, a held-out share of 1/10 and lambda as above are the paper's. K = 200 exemplars; the paper has 2000 for
CIFAR-100. Published: 84.0, 74.7, 67.9, 61.3 and 56.7 after each of five tasks of CIFAR-100, as LibContinual
(github.com/RL-VIG/LibContinual, reproduce/bic) lists the paper's; its own are 89.0, 72.5, 68.7, 62.8 and 57.8. Quoted
from memory: Yan et al. 2021 ("DER: dynamically expandable representation") report 73.10, the mean of the five, with
2000 exemplars and a ResNet-18. The command for such a run is `cl-run strategy=bic strategy.bic.memory_size=2000
dataset=cifar100 stream.num_tasks=5 backbone=resnet18`, with more than a hundred epochs; it has not been run here.
Differences from the paper: stage 2 is a convex problem in two unknowns, which is solved to its minimum on outputs
without augmentation (`cl.toolkit.bias.affine_correction`), where the paper makes some epochs of SGD; hence the penalty
with r = 0.1, since without it there may be no minimum (`decay=0` drops it). A class that comes again is treated as new.
Differences from the released code: it penalises beta alone, with the same r. PyCIL draws what is held out anew in each
task from all exemplars, so the network has been trained on it; it also corrects the outputs of all tasks in turn, and
in training, while here, as in the released code, those of the last task are.

State: K exemplars with their ranks; the teacher, which is as large as the network; two corrections, 2 x C each. Before
a task its examples and the exemplars are copied into one array. Scenarios: class-incremental. Refused: a memory of less
than two exemplars per class, targets other than single labels, and another strategy that implements `encode`, which the
teacher would lack.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Interval
from torch import Tensor

from cl.data.target import classes_of
from cl.engine.batch import Batch
from cl.engine.loader import EvalLoader
from cl.engine.strategy import LearnerLike, Strategy
from cl.random import Random
from cl.toolkit.bias import affine_correction
from cl.toolkit.exemplars import Exemplars, check_room, old_classes
from cl.toolkit.teacher import Teacher

if TYPE_CHECKING:
    from cl.data.task import Stream, Task, TaskData


class BiC(Strategy):
    """Distils the outputs for old classes, and corrects those for new ones by two numbers fitted on held-out examples.

    Args:
        memory_size: Total number of exemplars, K.
        held_out: Share of the exemplars that is never trained on; at least one of each class is.
        temperature: T, by which logits are divided.
        decay: Weight r of the penalty of alpha - 1 and beta.
        storage: Where the exemplars are stored: on the "device", on the "host" or on "disk".

    Raises:
        InputError: If a class would have less than two exemplars, or another strategy implements `encode`.

    Example:
        >>> BiC(memory_size=20)
        BiC(memory_size=20)
    """

    scenarios = ("class",)
    needs = ("memory", "boundaries")
    correction: Tensor
    of_teacher: Tensor

    def __init__(
        self,
        memory_size: Annotated[int, Ge(1)] = 200,
        held_out: Annotated[float, Interval(gt=0, le=0.5)] = 0.1,
        temperature: Annotated[float, Gt(0)] = 2.0,
        decay: Annotated[float, Ge(0)] = 0.1,
        storage: str = "device",
    ) -> None:
        super().__init__()
        self.memory_size, self.held_out, self.temperature = memory_size, held_out, temperature
        self.decay, self.storage, self.random = decay, storage, Random()

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate both parts of the memory, the teacher, and the corrections: factors and summands of the outputs."""
        check_room("bic.memory_size", self.memory_size, stream, each=2)
        apart = max(stream.num_classes, int(self.held_out * self.memory_size))
        self.memory = Exemplars(self.memory_size - apart, stream, self.storage)
        self.apart = Exemplars(apart, stream, self.storage)
        self.teacher = Teacher(learner, "BiC")
        identity = torch.tensor([[1.0], [0.0]]).repeat(1, stream.num_classes)
        self.register_buffer("correction", identity)
        self.register_buffer("of_teacher", identity.clone())

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Copy backbone, head and correction into the teacher, and list the old and the new classes."""
        self.teacher.copy_from(learner)
        self.of_teacher.copy_(self.correction)
        self.correction[0], self.correction[1] = 1.0, 0.0
        self._old = old_classes(learner, task)
        self._new = torch.zeros_like(self._old)
        self._new[list(classes_of(task.train.labels))] = True
        self._share = int(self._old.sum()) / int((self._old | self._new).sum())  # lambda

    def training_data(self, learner: LearnerLike, task: Task) -> TaskData:
        """Return the examples of the task that are not held out, together with the exemplars that are not."""
        labels, size = task.train.labels, self.apart.total // int((self._old | self._new).sum())
        order = torch.from_numpy(self.random.generator.permutation(len(labels)))
        rows = [order[labels[order] == c] for c in classes_of(labels)]
        self._apart = task.train.take(torch.cat([some[: min(size, len(some) // 2)] for some in rows]))
        self._rest = task.train.take(torch.cat([some[min(size, len(some) // 2) :] for some in rows]).sort().values)
        return self.memory.with_exemplars(self._rest)

    def criterion(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor:
        """Return the weighted sum of cross-entropy and distillation, a scalar."""
        if not self._share:
            return learner.criterion(logits, batch)
        assert batch.view is not None
        taught = (self.teacher(batch.view) * self.of_teacher[0] + self.of_teacher[1])[:, self._old]
        distilled = F.cross_entropy(logits[:, self._old] / self.temperature, (taught / self.temperature).softmax(1))
        return (1 - self._share) * learner.criterion(logits, batch) + self._share * distilled

    @torch.no_grad()
    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Choose the exemplars of both parts, and fit the correction on what was held out."""
        self.memory.renew(learner, self._rest)
        if len(self._apart) == 0:
            return
        data = self.apart.renew(learner, self._apart)
        if not self._share:
            return
        with learner.evaluating():
            batches = list(EvalLoader([data], learner.device, learner.eval_batch_size))
            logits = torch.cat([learner(learner.prepare(batch.x), batch.task) for batch in batches])
        seen = learner.seen.nonzero().flatten()
        y = torch.searchsorted(seen, torch.cat([batch.y for batch in batches]))
        alpha, beta = affine_correction(logits[:, seen], y, self._new[seen], self.decay).to(self.correction.dtype)
        self.correction[0, self._new], self.correction[1, self._new] = alpha, beta
        learner.record("bic/alpha", alpha)
        learner.record("bic/beta", beta)

    def predict(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the corrected logits, (B, C)."""
        logits: Tensor = learner(view)
        return logits * self.correction[0] + self.correction[1]
