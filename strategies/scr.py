r"""Supervised contrastive replay (Mai et al. 2021, section 3; loss of Khosla et al. 2020, equation 2).

The incoming rows and rows drawn from the memory stand in a batch in two views each, as they come and augmented. With
the 2N projections z, of length 1, the views P(i) of the same label as i, and all others A(i):

.. math:: L = \frac{1}{2N} \sum_i \frac{-1}{|P(i)|} \sum_{p \in P(i)}
          \log \frac{\exp(z_i \cdot z_p / \tau)}{\sum_{a \in A(i)} \exp(z_i \cdot z_a / \tau)}

The projection, a layer of D units with ReLU and one of `dim`, serves training alone. The class of an input is that of
the nearest mean of the memory's features before it, of length 1 (equation 2 of the paper). The linear head is not used.

Means are taken when a task ends; what is measured inside a task still uses those of its beginning. A class without
an exemplar is the farthest.

Differences from the paper: none known in the loss. With several epochs an example is offered to the reservoir in the
first one only; the first batch, which finds an empty memory, is trained on alone.
Differences from the reference code: that makes no step before the memory holds something, and draws a mean at random
for a class without exemplar. The first view is as the stream augments it, there plain. Of the second, hue and order
of the colours' changes differ a little (`cl.data.augment.ContrastiveView`).

State: the memory, M rows with labels; the projection, D x D + D x dim weights; the means, C x D. A step has two forward
passes over both incoming and replayed rows. Scenarios: all. Refuses inputs that are no images, targets other than
labels, several processes, and another owner of `encode` or `predict`.
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
from cl.toolkit.herding import class_means, nearness, unit_features
from cl.toolkit.memory import Memory

if TYPE_CHECKING:
    from cl.data.task import Stream, Task


def supervised_contrastive(z: Tensor, y: Tensor, temperature: float) -> Tensor:
    """Return the loss above of unit vectors (N, D) with labels (N,); a row without another of its label adds nothing.

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
        >>> round(float(supervised_contrastive(z, torch.tensor([0, 0, 1, 1]), 0.5)), 4)
        0.5276
    """
    similarity = z @ z.T / temperature
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_p = similarity - similarity.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    positive = (y[:, None] == y) & ~itself
    return -((log_p * positive).sum(1) / positive.sum(1).clamp_min(1)).mean()


class SCR(Strategy):
    """Draws rows of one label together, and predicts the nearest mean of remembered rows.

    Args:
        memory_size: Exemplars in all, M.
        batch_size: Remembered rows a step.
        temperature: tau.
        dim: Width of the projection.
        scale: Least part of the area that the second view is cropped to.
        flip: Whether it may be mirrored.
        jitter: How much its colours change.
        storage: Where the exemplars lie: on the "device", on the "host", or on "disk".

    Raises:
        InputError: If inputs are no images.

    Example:
        >>> SCR(memory_size=20)
        SCR(memory_size=20)
    """

    needs = ("memory", "boundaries")
    distributed = False  # every row is contrasted with all others of the batch
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
        """Allocate memory, projection and means."""
        if len(stream.input_shape) != 3:
            raise InputError(f"SCR crops images, but the inputs of {stream.name!r} are {stream.input_shape}: use er.")
        self.memory = Memory(self.memory_size, stream, storage=self.storage)
        width = int(learner.backbone.num_features)  # type: ignore[arg-type]
        self.projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, self.dim))
        self.register_buffer("means", torch.zeros(stream.num_classes, width))

    def extend_batch(self, learner: LearnerLike, batch: Batch) -> Batch:
        """Append remembered rows, once there are any."""
        return batch.append(self.memory.sample(self.batch_size)) if len(self.memory) else batch

    def encode(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the backbone's features, (B, D), and keep them for the loss."""
        features: Tensor = learner.backbone(view)
        self._features = features
        return features

    def criterion(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor:
        """Return the contrastive loss of both views in place of the cross-entropy."""
        other = learner.backbone(learner.prepare(self.augment(batch.x, self.random.generator)))
        z = F.normalize(self.projection(torch.cat([self._features, other])).float(), dim=1)
        return supervised_contrastive(z, batch.y.repeat(2), self.temperature)

    def after_step(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> None:
        """Offer the incoming rows to the memory; after the step, so that none is replayed in its own."""
        if learner.current_epoch == 0:
            self.memory.insert(batch)

    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Take the means of what is remembered."""
        held = self.memory.rows()
        features = unit_features(learner, TaskData(held.x, held.y, held.task))
        self.means.copy_(class_means(features, held.y, len(self.means)))

    def predict(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the negative squared distance from every class's mean, (B, C)."""
        return nearness(learner.backbone(view), self.means)
