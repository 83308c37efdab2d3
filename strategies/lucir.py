r"""LUCIR (Hou et al. 2019, "Learning a unified classifier incrementally via rebalancing").

A task's examples are learned together with exemplars of older classes, of which there are few. Three parts rebalance
old and new classes. Let f(x) be the features, :math:`\bar v` a vector scaled to length 1, and :math:`\theta_c` the
weight of class c in the head, its embedding.

First, the outputs are scaled cosines, so that neither long weights nor large biases favour new classes; eta is learned:

.. math:: o_c(x) = \eta \, \langle \bar\theta_c, \bar f(x) \rangle

Second, the less-forget constraint holds the directions of features at those of the network as it was before the task,
:math:`f^*`, the teacher. The embeddings of old classes keep their directions. With n old classes and m new ones:

.. math:: L_{dis}(x) = 1 - \langle \bar f^*(x), \bar f(x) \rangle, \qquad
          \lambda = \lambda_{base} \sqrt{n / m}

Third, examples of old classes are kept nearer to the embedding of their class than to those k of the K new classes that
are nearest to them, by a margin:

.. math:: L_{mr}(x) = \sum_{k=1}^{K} \max\big(\mathrm{margin} - \langle \bar\theta_y, \bar f(x) \rangle
          + \langle \bar\theta_k, \bar f(x) \rangle, \, 0\big)

The loss of a batch B, whose examples of old classes are :math:`B_o`, is

.. math:: L = \frac{1}{|B|} \sum_{x \in B} \big(\mathrm{CE}(o(x), y) + \lambda L_{dis}(x)\big)
          + \frac{1}{|B_o|} \sum_{x \in B_o} L_{mr}(x)

The embedding of a new class starts at the mean of the unit features of its examples, with the mean length of the old
classes' embeddings (`imprint`). The first task is learned by the cross-entropy alone. eta is recorded as
record/lucir/eta.

Defaults: lambda_base = 5, margin = 0.5, K = 2 as in the paper for CIFAR-100, and eta from 1. 200 exemplars; the paper
has 20 of each class. Published: for five tasks of CIFAR-100 with 2000 exemplars LibContinual
(github.com/RL-VIG/LibContinual, reproduce/lucir) lists 48.91 as reported and 47.40 as its own, and does not say of
which accuracy. Quoted from memory: Yan et al. 2021 ("DER: dynamically expandable representation") report 62.77, the
mean of the accuracies after each of these tasks, with a ResNet-18. The command for such a run is `cl-run strategy=lucir
strategy.lucir.memory_size=2000 dataset=cifar100 stream.num_tasks=5 backbone=resnet18`, with more than a hundred epochs;
it has not been run here.
Differences from the paper: lambda is that of the released code. The paper removes the last ReLU of the backbone, so
that features may be negative; here the backbone is what it is. The memory has a fixed number of exemplars in total
(`cl.toolkit.exemplars.Exemplars`). The bias of the head is not used. A class that comes again is treated as new. In
several processes :math:`B_o` is a process's part of it.
Differences from the released code: it divides the third term by K, too, and its weight decay leaves out the embeddings
of old classes; here it may shorten them, which no output depends on.

State: the exemplars with their ranks; the teacher, which is as large as the network; eta. Before a task its examples
and the exemplars are copied into one array, and it is passed once through the network. Scenarios: class-incremental.
Refused: a memory of less than one exemplar per class, a head that has not one row of weights for each class, targets
other than single labels, and another strategy that implements `encode`, which the teacher would lack.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from cl.data.target import classes_of
from cl.engine.batch import Batch
from cl.engine.strategy import LearnerLike, Strategy
from cl.toolkit.exemplars import Exemplars, check_room, old_classes
from cl.toolkit.herding import class_means, unit_features
from cl.toolkit.proxies import check_proxies, cosine_logits, proxies
from cl.toolkit.teacher import Teacher

if TYPE_CHECKING:
    from cl.data.task import Stream, Task, TaskData


def margin_ranking(cosines: Tensor, y: Tensor, old: Tensor, new: Tensor, margin: float, nearest: int) -> Tensor:
    """Return the mean of L_mr over the examples of old classes, a scalar; 0 if there are none.

    Args:
        cosines: Of each example and each class's embedding, (B, C).
        y: Labels (B,).
        old: Which classes are old, bool (C,).
        new: Positions of the new classes, (m,).
        margin: The margin.
        nearest: The number K of new classes.

    Example:
        >>> cosines = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.9, 0.3]])
        >>> old, new = torch.tensor([True, False, False]), torch.tensor([1, 2])
        >>> round(float(margin_ranking(cosines, torch.tensor([0, 1]), old, new, 0.5, nearest=2)), 4)
        0.1
    """
    own = cosines.gather(1, y[:, None])
    rivals = cosines[:, new].topk(min(nearest, len(new)), dim=1).values
    terms = (margin - own + rivals).relu().sum(1)
    return (terms * old[y]).sum() / old[y].sum().clamp_min(1)


class LUCIR(Strategy):
    """Classifies by cosines, holds the directions of features, and keeps new classes away from old examples.

    Args:
        memory_size: Total number of exemplars.
        weight: lambda_base, the weight of the less-forget constraint.
        margin: The margin between an old example's class and new classes.
        nearest: K, the number of new classes from which an old example is kept away.
        imprint: Whether embeddings of new classes start at mean features.
        storage: Where the exemplars are stored: on the "device", on the "host" or on "disk".

    Raises:
        InputError: If a class would have no exemplar, the head has not one row of weights for each class, or another
            strategy implements `encode`.

    Example:
        >>> LUCIR(memory_size=20)
        LUCIR(memory_size=20)
    """

    scenarios = ("class",)
    needs = ("memory", "boundaries")
    old: Tensor

    def __init__(
        self,
        memory_size: Annotated[int, Ge(1)] = 200,
        weight: Annotated[float, Ge(0)] = 5.0,
        margin: Annotated[float, Ge(0)] = 0.5,
        nearest: Annotated[int, Ge(1)] = 2,
        imprint: bool = True,
        storage: str = "device",
    ) -> None:
        super().__init__()
        self.memory_size, self.weight, self.margin = memory_size, weight, margin
        self.nearest, self.imprint, self.storage = nearest, imprint, storage

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate the memory, the teacher and eta."""
        check_room("lucir.memory_size", self.memory_size, stream)
        check_proxies(learner, "LUCIR")
        self.memory = Exemplars(self.memory_size, stream, self.storage)
        self.teacher = Teacher(learner, "LUCIR")
        self.eta = nn.Parameter(torch.ones(()))
        self.register_buffer("old", torch.zeros(stream.num_classes, dtype=torch.bool))

    @torch.no_grad()
    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Copy the network into the teacher, list old and new classes, and imprint the embeddings of the new ones."""
        self.teacher.copy_from(learner)
        self.old.copy_(old_classes(learner, task))
        self._new = torch.tensor(classes_of(task.train.labels), device=self.old.device)
        self._weight = self.weight * math.sqrt(int(self.old.sum()) / len(self._new))  # lambda; 0 in the first task
        self._first = not bool(self.old.any())
        if self.imprint and not self._first:
            embeddings, y = proxies(learner), task.train.labels.to(self.old.device)
            means = class_means(unit_features(learner, task.train), y, len(embeddings))
            embeddings[self._new] = (means * embeddings[self.old].norm(dim=1).mean())[self._new].to(embeddings.dtype)

    def training_data(self, learner: LearnerLike, task: Task) -> TaskData:
        """Return the examples of the task together with all exemplars."""
        return self.memory.with_exemplars(task.train)

    def classify(self, learner: LearnerLike, features: Tensor) -> Tensor:
        """Return the scaled cosines (B, C), and keep the features for the loss; embeddings of old classes are fixed."""
        self._features, embeddings = features, proxies(learner)
        embeddings = torch.where(self.old[:, None], embeddings.detach(), embeddings)
        logits: Tensor = self.eta * cosine_logits(features, embeddings, 1.0)
        return logits

    def criterion(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor:
        """Return the cross-entropy plus both constraints, a scalar."""
        entropy = learner.criterion(logits, batch)
        if self._first:
            return entropy
        with torch.no_grad():
            taught = self.teacher["backbone"](batch.view)
        kept = 1 - F.cosine_similarity(self._features, taught).mean()
        apart = margin_ranking(logits / self.eta, batch.y, self.old, self._new, self.margin, self.nearest)
        return entropy + self._weight * kept + apart

    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Choose the exemplars."""
        self.memory.renew(learner, task.train)
        learner.record("lucir/eta", self.eta)
