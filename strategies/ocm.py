r"""Online continual learning by mutual information maximization (Guo, Liu and Zhao 2022, "OCM", ICML 2022).

A projection z of the features, scaled to length 1, is trained by InfoNCE bounds of mutual information, so that the
features hold all that tells the examples apart, and not only what tells the classes of one task apart:

.. math:: L = L_{CE} + L_{new}(B) + L_{old}(M') + L_{pre}(M') + d\, L_{dis}

Each image of the incoming examples B, or of replayed ones M', is used in 16 copies, four turns of the whole and four of
its halves. S(i) are those that agree with i in class and copy, i itself included. For new examples the N vectors are
those of the copies and of an augmented view of each, i' being the other view of i:

.. math:: L_{new} = \frac{-1}{N} \sum_i \Big( \frac{2}{|S(i)|} \sum_{j \in S(i), j \ne i} \log p_{ij}
                    + \log p_{ii'} \Big) \qquad
          p_{ij} = \frac{\exp(z_i \cdot z_j / \tau)}{\sum_{k \ne i} \exp(z_i \cdot z_k / \tau)}

For replayed ones each vector is contrasted with itself as well, and for :math:`L_{pre}` the copies without their
augmented views with the projections :math:`\bar z` of the network as it was before the task:

.. math:: L_{old} = \frac{-1}{N} \sum_i \frac{1}{|S(i)|} \sum_{j \in S(i)} \log q_{ij}(z, z), \quad
          L_{pre} = \frac{-1}{N'} \sum_i \frac{1}{|S(i)|} \sum_{j \in S(i)} \log q_{ij}(z, \bar z), \quad
          q_{ij}(z, v) = \frac{\exp(z_i \cdot v_j / \tau)}{\sum_k \exp(z_i \cdot v_k / \tau)}

:math:`L_{CE}` is on one augmented view of replayed examples alone; in the first task, which has only
:math:`L_{CE} + L_{new}`, on that of B. :math:`L_{dis}` is the mean squared difference of the logits of earlier classes
from those of the network before the task, each on a view of its own.

Crops and changes of colour are part of the method: an `er` without them is no control; one with the same `second_view`
is. With 32 views of each example a step costs more than ten times one of `er`; `rotate=false` uses two.

Defaults: those of the released code; d = 0 in its MNIST script. It takes batches of 10, one epoch, and Adam with a
learning rate of 1e-3 and a weight decay of 1e-4. Published: 77.2 % on CIFAR-10 (from the paper's abstract).
Differences from the paper: the equations are those of the released code. With several epochs an example is offered to
the reservoir in the first epoch only. The stream's augmentation is not used.
Differences from the reference code: in the code the products of projections have products of a projection with a random
part of the features added to them; its README leaves them out, too. The network before the task is in evaluation mode.
Each term has a forward pass of its own, so that batch norm is over each. Views of bytes are bytes. Colours change as in
`cl.data.augment.ContrastiveView`; in the code one image in four becomes grey, and none else changes.

State: the memory, |M| examples with their labels; the projection, D x dim weights; a copy of the network and of the
projection. Scenarios: all. Refused: inputs that are not images, oblong images if they are turned, targets other than
single labels, several processes, another strategy that implements `encode`, `classify` or `criterion`.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn

from cl.data.augment import ContrastiveView
from cl.engine.batch import Batch
from cl.engine.preflight import check_draws
from cl.engine.strategy import LearnerLike, Strategy
from cl.random import Random
from cl.toolkit.memory import Memory
from cl.toolkit.teacher import Teacher
from cl.toolkit.views import another_view, check_images, check_square, with_another_view, with_turned_copies

if TYPE_CHECKING:
    from cl.data.task import Stream, Task


def new_information(z: Tensor, y: Tensor, temperature: float) -> Tensor:
    """Return L_new of unit vectors (N, d) with labels (N,), the second half being other views of the first, a scalar.

    Example:
        >>> round(float(new_information(torch.eye(2)[[0, 1, 0, 1]], torch.tensor([0, 1, 0, 1]), 0.5)), 6)
        0.47909
    """
    itself, half = torch.eye(len(z), dtype=torch.bool, device=z.device), len(z) // 2
    log_p = (z @ z.T / temperature).masked_fill(itself, -torch.inf).log_softmax(1).masked_fill(itself, 0)
    same = y[:, None] == y
    other_view = torch.cat([log_p.diagonal(half), log_p.diagonal(-half)])
    return -(2 * (log_p * same).sum(1) / same.sum(1) + other_view).mean()


def old_information(z: Tensor, others: Tensor, y: Tensor, temperature: float) -> Tensor:
    """Return L_old or L_pre of unit vectors contrasted with others, (N, d) each, both with the labels (N,), a scalar.

    Example:
        >>> round(float(old_information(torch.eye(2), torch.eye(2), torch.tensor([0, 1]), 0.5)), 6)
        0.126928
    """
    same = y[:, None] == y
    return -(((z @ others.T / temperature).log_softmax(1) * same).sum(1) / same.sum(1)).mean()


class OCM(Strategy):
    """Maximizes bounds of mutual information between views, examples of a class, and the network before the task.

    Args:
        memory_size: Total number of exemplars, |M|.
        batch_size: Largest number of replayed examples per step, from the second task on.
        per_class: Largest number of replayed examples per step and class seen.
        temperature: tau.
        distil: Weight of the distance from the logits of the network before the task, d.
        dim: Width of the projection's output.
        rotate: Whether the contrasts use 16 turned copies of each image.
        scale: Smallest share of the image's area that a crop of an augmented view covers.
        flip: Whether an augmented view may be mirrored.
        jitter: Largest relative change of an augmented view's colours.
        storage: Where the exemplars are stored: on the "device", on the "host" or on "disk".

    Raises:
        InputError: If the inputs are not images, (C, H, W), or are oblong and turned, or another strategy implements
            `encode`.

    Example:
        >>> OCM(memory_size=20)
        OCM(memory_size=20)
    """

    needs = ("memory", "boundaries")
    needs_inputs = True
    distributed = False  # the losses contrast each example with all others

    def __init__(
        self,
        memory_size: Annotated[int, Ge(1)] = 200,
        batch_size: Annotated[int, Ge(1)] = 64,
        per_class: Annotated[int, Ge(1)] = 7,
        temperature: Annotated[float, Gt(0)] = 0.07,
        distil: Annotated[float, Ge(0)] = 1.0,
        dim: Annotated[int, Ge(1)] = 128,
        rotate: bool = True,
        scale: Annotated[float, Interval(gt=0, le=1)] = 0.3,
        flip: bool = True,
        jitter: Annotated[float, Interval(ge=0, le=1)] = 0.4,
        storage: str = "device",
    ) -> None:
        super().__init__()
        self.memory_size, self.batch_size, self.per_class, self.dim = memory_size, batch_size, per_class, dim
        self.temperature, self.distil, self.rotate, self.storage = temperature, distil, rotate, storage
        self.augment, self.random = ContrastiveView(scale, flip, jitter), Random()

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate the memory, the projection, and the copy of the network before the task."""
        check_images(stream, "OCM")
        check_draws("ocm", learner, stream, memory_size=self.memory_size, batch_size=self.batch_size)
        if self.rotate:
            check_square(stream, "OCM", "ocm.rotate")
        self.memory = Memory(self.memory_size, stream, storage=self.storage)
        self.projection = nn.Linear(int(learner.backbone.num_features), self.dim)  # type: ignore[arg-type]
        self.before = Teacher(learner, "OCM")
        self.projection_before = deepcopy(self.projection).requires_grad_(False)

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Copy the network and the projection."""
        self.before.copy_from(learner)
        self.projection_before.load_state_dict(self.projection.state_dict())

    def classify(self, learner: LearnerLike, features: Tensor) -> Tensor:
        """Return the head's logits, (B, C), and keep the features for the projection."""
        self._features = features
        logits: Tensor = learner.head(features)
        return logits

    def criterion(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor:
        """Return the sum of the terms, each from a forward pass of its own; the batch's logits are not used."""
        copies, z = self._copies(learner, batch)
        loss = new_information(z, copies.y.repeat(2), self.temperature)
        if learner.task_index == 0 or len(self.memory) == 0:
            return loss + learner.criterion(self._logits(learner, batch), batch)
        old = self.memory.sample(min(self.batch_size, self.per_class * int(learner.seen.sum())))
        copies, z = self._copies(learner, old)
        loss = loss + old_information(z, z, copies.y.repeat(2), self.temperature)
        with torch.no_grad():
            then = self.projection_before(self.before["backbone"](learner.prepare(copies.x))).float()
        loss = loss + old_information(z[: len(then)], F.normalize(then, dim=1), copies.y, self.temperature)
        now = self._logits(learner, old)
        return loss + learner.criterion(now, old) + self._distillation(learner, old, now)

    def _copies(self, learner: LearnerLike, batch: Batch) -> tuple[Batch, Tensor]:
        """Return N turned copies, and the projections of them and of an augmented view of each, (2 N, dim)."""
        copies = with_turned_copies(batch, learner.num_classes) if self.rotate else batch
        views = with_another_view(copies, self.augment, self.random.generator)
        learner(learner.prepare(views.x), views.task)
        return copies, F.normalize(self.projection(self._features).float(), dim=1)

    def _logits(self, learner: LearnerLike, batch: Batch) -> Tensor:
        """Return the logits of an augmented view of images, (B, C)."""
        return learner(learner.prepare(another_view(batch.x, self.augment, self.random.generator)), batch.task)

    def _distillation(self, learner: LearnerLike, batch: Batch, now: Tensor) -> Tensor | float:
        """Return the weighted L_dis."""
        if self.distil == 0:
            return 0.0
        then = self.before(learner.prepare(another_view(batch.x, self.augment, self.random.generator)))
        earlier = learner.membership[: learner.task_index].any(0)
        return self.distil * F.mse_loss(now[:, earlier], then[:, earlier])

    def after_step(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> None:
        """Offer the incoming examples to the memory, after the step, so that none is replayed in the same step."""
        if learner.current_epoch == 0:
            self.memory.insert(batch)
