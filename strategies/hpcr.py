r"""Holistic proxy-based contrastive replay (Lin et al. 2023, "HPCR", arXiv 2309.15038).

PCR (see `pcr`) with a factor that changes from step to step and, from the second task on, two distillations that hold
the replayed examples where they were when they were stored:

.. math:: L = t(i) \, L_{PCR} + a \, L_{PCD} + b \, L_{SCD} \qquad
          t(i) = \frac{t_{max} - t_{min}}{2} \Big(1 - \cos\frac{2 \pi i}{500}\Big) + t_{min}

Here i is the number of the step within its task. :math:`L_{PCD}` is the mean squared distance of the replayed examples'
logits from those stored with them, over the classes of all N examples of the batch, each as often as it occurs. For
:math:`L_{SCD}`, each replayed example has a distribution over the others, by the similarity of their features scaled to
length 1, now z and when they were stored :math:`\bar z`; over the R replayed views it is

.. math:: L_{SCD} = \frac{-1}{R} \sum_i \sum_{j \ne i} p_{ij}(\bar z) \log p_{ij}(z) \qquad
          p_{ij}(z) = \frac{\exp(z_i \cdot z_j / \tau)}{\sum_{k \ne i} \exp(z_i \cdot z_k / \tau)}

Both views of a replayed example have the same stored logits and features, those of the unaugmented view. With
a = b = 0 and t_min = t_max = 1 it gives the bits of `pcr`.

Crops and changes of colour are part of the method: an `er` without them is no control; one with the same `second_view`
is. The bias of the head, if it has one, is not used. Which classes compete follows from the batch alone, in every
scenario: `train_mask` has no effect.

Defaults: those of the released code for CIFAR-100; a = 0.01 for CIFAR-10. It takes batches of 10, one epoch, and SGD
with a learning rate of 0.1.
Differences from the paper: its contrast of anchors with examples is not in it, as it is not active in the released
code. With several epochs an example is offered to the reservoir in the first epoch only, and the steps of a task are
counted on.
Differences from the reference code: those of `pcr`. In the code, features and examples are shifted against each other
in the batch in which the memory becomes full.

State: the memory, |M| examples with their labels, C logits and D features each. A step has two forward passes, of twice
the incoming and twice the replayed examples. Scenarios: all. Refused: inputs that are not images, targets other than
single labels, several processes, a head without a weight (C, D), another strategy that implements `classify` or
`criterion`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Interval
from torch import Tensor

from cl.data.augment import ContrastiveView
from cl.engine.batch import Batch
from cl.engine.strategy import LearnerLike, Strategy
from cl.random import Random
from cl.toolkit.memory import Memory
from cl.toolkit.proxies import check_proxies, cosine_logits, proxies, proxy_contrast
from cl.toolkit.views import check_images, with_another_view

if TYPE_CHECKING:
    from cl.data.task import Stream


def factor(step: int, least: float, most: float, period: int = 500) -> float:
    """Return t(i) for a step of its task: from the least value to the most and back within a period.

    Example:
        >>> [round(factor(i, 0.5625, 1.8), 5) for i in (0, 125, 250, 500)]
        [0.5625, 1.18125, 1.8, 0.5625]
    """
    return (most - least) / 2 * (1 - math.cos(2 * math.pi * step / period)) + least


def structure_distillation(features: Tensor, stored: Tensor, temperature: float) -> Tensor:
    """Return L_SCD for two examples or more, features (R, D) beside stored ones (R, D), a scalar.

    Example:
        >>> old, new = torch.tensor([[1.0, 0], [0.6, 0.8], [0, 1]]), torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1]])
        >>> round(float(structure_distillation(new, old, 0.09)), 6)
        0.707155
    """

    def to_others(vectors: Tensor) -> Tensor:
        z = F.normalize(vectors, dim=1, eps=1e-6)
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        return (z @ z.T / temperature)[~itself].view(len(z), -1)

    return F.cross_entropy(to_others(features), to_others(stored.to(features.dtype)).softmax(1))


class HPCR(Strategy):
    """Contrasts examples with the weights of the classes in the batch, and holds stored logits and similarities.

    Args:
        memory_size: Total number of exemplars, |M|.
        a: Weight of the distance from the stored logits, L_PCD.
        b: Weight of the distillation of similarities, L_SCD.
        t_min: Least factor of the contrastive loss.
        t_max: Largest factor of the contrastive loss.
        batch_size: Replayed examples per step; None means as many as there are incoming examples.
        temperature: tau, which divides the cosines and the similarities.
        scale: Smallest share of the image's area that a crop of the second view covers.
        flip: Whether the second view may be mirrored.
        jitter: Largest relative change of the second view's colours.
        storage: Where the exemplars are stored: on the "device", on the "host" or on "disk".

    Raises:
        InputError: If the inputs are not images, (C, H, W), or the head has no row of weights for each class.

    Example:
        >>> HPCR(memory_size=20)
        HPCR(memory_size=20)
    """

    needs = ("memory",)
    needs_inputs = True
    distributed = False  # which classes compete depends on all examples of the batch

    def __init__(
        self,
        memory_size: Annotated[int, Ge(1)] = 200,
        a: Annotated[float, Ge(0)] = 0.1,
        b: Annotated[float, Ge(0)] = 0.5,
        t_min: Annotated[float, Ge(0)] = 0.5625,
        t_max: Annotated[float, Ge(0)] = 1.8,
        batch_size: Annotated[int, Ge(1)] | None = None,
        temperature: Annotated[float, Gt(0)] = 0.09,
        scale: Annotated[float, Interval(gt=0, le=1)] = 0.2,
        flip: bool = True,
        jitter: Annotated[float, Interval(ge=0, le=1)] = 0.4,
        storage: str = "device",
    ) -> None:
        super().__init__()
        self.memory_size, self.batch_size, self.temperature = memory_size, batch_size, temperature
        self.a, self.b, self.t_min, self.t_max = a, b, t_min, t_max
        self.storage, self.augment, self.random = storage, ContrastiveView(scale, flip, jitter), Random()

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate the memory, with C logits and D features beside each exemplar; refuse what `pcr` refuses."""
        check_images(stream, "HPCR")
        check_proxies(learner, "HPCR")
        extras = {"logits": (stream.num_classes,), "features": (int(learner.backbone.num_features),)}  # type: ignore[arg-type]
        self.memory = Memory(self.memory_size, stream, extras=extras, storage=self.storage)

    def extend_batch(self, learner: LearnerLike, batch: Batch) -> Batch:
        """Append the second views of the examples."""
        return with_another_view(batch, self.augment, self.random.generator)

    def classify(self, learner: LearnerLike, features: Tensor) -> Tensor:
        """Return the cosines of features and classes' weights, divided by tau, (B, C), and keep the features."""
        self._features = features
        return cosine_logits(features, proxies(learner), 1 / self.temperature)

    def criterion(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor:
        """Return the weighted contrastive loss and, from the second task on, both distillations; 0 without a memory."""
        self._incoming = self._features[: batch.num_incoming].detach()
        if len(self.memory) == 0:
            return 0 * logits.sum()
        drawn = self.memory.sample(self.batch_size or batch.num_incoming)
        old = with_another_view(drawn, self.augment, self.random.generator)
        again = learner(learner.prepare(old.x, True), old.task)
        y = torch.cat([batch.y, old.y])
        loss = factor(learner.step, self.t_min, self.t_max) * proxy_contrast(torch.cat([logits, again]), y)
        if learner.task_index == 0:
            return loss
        stored = {name: values.repeat(2, 1) for name, values in drawn.extras.items()}  # the same for both views
        if self.a:
            loss = loss + self.a * F.mse_loss(again[:, y], stored["logits"][:, y])
        if self.b:
            loss = loss + self.b * structure_distillation(self._features, stored["features"], self.temperature)
        return loss

    def after_step(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> None:
        """Offer the incoming examples to the memory, with logits and features from before the step."""
        if learner.current_epoch == 0:
            batch.extras |= {"logits": logits, "features": self._incoming}
            self.memory.insert(batch)
