r"""Supervised contrastive replay (Mai et al. 2021, section 3; loss of Khosla et al. 2020, equation 2).

A batch of N incoming and replayed examples is used in two views: as it is, and augmented once more. The loss draws
views of the same label together. Let z be the 2N projected features, scaled to length 1, P(i) the other views with the
label of view i, and A(i) all views but i (`cl.toolkit.contrast.supervised_contrastive`):

.. math:: L = \frac{1}{2N} \sum_i \frac{-1}{|P(i)|} \sum_{p \in P(i)}
          \log \frac{\exp(z_i \cdot z_p / \tau)}{\sum_{a \in A(i)} \exp(z_i \cdot z_a / \tau)}

The projection is a layer of D units with ReLU, followed by a linear layer of `dim` units. It is used in training only.
An input is assigned to the class with the nearest mean of the exemplars' features before the projection, scaled to
length 1 (equation 2 of the paper). The linear head is not used.

The means are computed when a task ends, so what is measured inside a task uses those of the task's beginning. A class
without an exemplar is never the nearest.

Defaults: tau = 0.07, a projection of width 128, 100 replayed examples and the strengths of the augmentation are those
of the paper and its released code.
Differences from the paper: none known in the loss. With several epochs an example is offered to the reservoir in the
first epoch only. The very first batch, when the memory is still empty, is trained on without replayed examples.
Differences from the reference code: the code makes no step while the memory is empty, and draws a random mean for a
class without an exemplar. Here the first view is augmented as the stream says; in the code it is not augmented. In the
second view, changes of hue and the order of the changes of colour differ a little (`cl.data.augment.ContrastiveView`).

State: the memory, M examples with their labels; the projection, D x D + D x dim weights; the means, C x D. A step has
two forward passes over the incoming and the replayed examples. Scenarios: all. Refused: inputs that are not images,
targets other than single labels, several processes, another strategy that implements `encode` or `predict`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn

from cl.data.augment import ContrastiveView
from cl.data.task import TaskData
from cl.engine.batch import Batch
from cl.engine.strategy import LearnerLike, Strategy
from cl.errors import InputError
from cl.random import Random
from cl.toolkit.contrast import supervised_contrastive
from cl.toolkit.herding import class_means, nearness, unit_features
from cl.toolkit.memory import Memory

if TYPE_CHECKING:
    from cl.data.task import Stream, Task


class SCR(Strategy):
    """Draws features of one label together, and predicts the class with the nearest mean of exemplars.

    Args:
        memory_size: Total number of exemplars, M.
        batch_size: Replayed examples per step.
        temperature: tau, which divides the products of features.
        dim: Width of the projection's output.
        scale: Smallest share of the image's area that a crop of the second view covers.
        flip: Whether the second view may be mirrored.
        jitter: Largest relative change of the second view's colours.
        storage: Where the exemplars are stored: on the "device", on the "host" or on "disk".

    Raises:
        InputError: If the inputs are not images, (C, H, W).

    Example:
        >>> SCR(memory_size=20)
        SCR(memory_size=20)
    """

    needs = ("memory", "boundaries")
    needs_inputs = True
    distributed = False  # the loss contrasts each example with all others of the batch
    means: Tensor

    def __init__(
        self,
        memory_size: Annotated[int, Ge(1)] = 200,
        batch_size: Annotated[int, Ge(1)] = 100,
        temperature: Annotated[float, Gt(0)] = 0.07,
        dim: Annotated[int, Ge(1)] = 128,
        scale: Annotated[float, Interval(gt=0, le=1)] = 0.2,
        flip: bool = True,
        jitter: Annotated[float, Interval(ge=0, le=1)] = 0.4,
        storage: str = "device",
    ) -> None:
        super().__init__()
        self.memory_size, self.batch_size, self.storage = memory_size, batch_size, storage
        self.temperature, self.dim = temperature, dim
        self.augment, self.random = ContrastiveView(scale, flip, jitter), Random()

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate the memory, the projection and the means."""
        if len(stream.input_shape) != 3:
            raise InputError(f"SCR crops images, but the inputs of {stream.name!r} are {stream.input_shape}: use er.")
        self.memory = Memory(self.memory_size, stream, storage=self.storage)
        width = int(learner.backbone.num_features)  # type: ignore[arg-type]
        self.projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, self.dim))
        self.register_buffer("means", torch.zeros(stream.num_classes, width))

    def extend_batch(self, learner: LearnerLike, batch: Batch) -> Batch:
        """Append replayed examples, if the memory holds any."""
        return self.memory.extend(batch, self.batch_size)

    def encode(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the backbone's features, (B, D), and keep them for the loss."""
        features: Tensor = learner.backbone(view)
        self._features = features
        return features

    def criterion(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor:
        """Return the contrastive loss of both views, a scalar, which replaces the cross-entropy."""
        other = learner.backbone(learner.prepare(self.augment(batch.x, self.random.generator)))
        z = F.normalize(self.projection(torch.cat([self._features, other])).float(), dim=1)
        return supervised_contrastive(z, batch.y.repeat(2), self.temperature)

    def after_step(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> None:
        """Offer the incoming examples to the memory, after the step, so that none is replayed in the same step."""
        if learner.current_epoch == 0:
            self.memory.insert(batch)

    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Compute the mean feature of each class over the exemplars."""
        held = self.memory.rows()
        features = unit_features(learner, TaskData(held.x, held.y, held.task))
        self.means.copy_(class_means(features, held.y, len(self.means)))

    def predict(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the negative squared distance from every class's mean, (B, C)."""
        return nearness(learner.backbone(view), self.means)
