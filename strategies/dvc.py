r"""Dual view consistency (Gu et al. 2022, "Not Just Selection, but Exploration", CVPR 2022).

Each example is learned in two views, as it is and augmented. Let p and q be their predictions, softmax of the logits
z and z', and r the joint prediction, softmax of :math:`Q(z, z')` of a small network Q. With bars for means over the
N examples and H for the entropy, the loss of the incoming examples, and again of replayed ones, is

.. math:: L = L_{CE} + a L_{MI} + b L_{DL} \qquad L_{MI} = -\frac{H(\bar p) + H(\bar q) + H(\bar r)}{3} \qquad
          L_{DL} = \frac{1}{2NC} \sum_i \big(\lVert r_i - p_i \rVert_1 + \lVert r_i - q_i \rVert_1\big)

:math:`L_{CE}` is the mean cross-entropy of both views. :math:`L_{MI}` stands for the mutual information of the views:
each of the three predictions is to spread over the classes, while :math:`L_{DL}` makes them agree.

Replayed are, of candidates drawn at random, those k to whose gradient the incoming examples are the largest
interference: those where the length of the gradient with respect to the head's weight would rise the most by a plain
SGD step to :math:`\theta^v` on the incoming loss alone. With features h it has a closed form:

.. math:: s(x, y) = g_{\theta^v}(x, y) - g_\theta(x, y) \qquad
          g(x, y) = \left\lVert \frac{\partial\, \mathrm{CE}}{\partial W} \right\rVert_1
                  = \lVert p - e_y \rVert_1 \lVert h \rVert_1 = 2 (1 - p_y) \lVert h \rVert_1

Crops and changes of colour are part of the method: an `er` without them is no control; one with the same `second_view`
is. Q is not used at test.

Defaults: those of the released code for CIFAR-100 and Mini-ImageNet; b = 2 for CIFAR-10. It takes batches of 10, one
epoch, and SGD with a learning rate of 0.1. Published: the figures are in the paper's tables for CIFAR-10, CIFAR-100 and
Mini-ImageNet; they are not repeated here, because they could not be checked.
Differences from the paper: the equations are those of the released code. With several epochs an example is offered to
the reservoir in the first epoch only.
Differences from the reference code: classes compete as in other strategies, where there all classes of the stream do
from the start; `train_mask` decides. Each view has a forward pass of its own, so that batch norm is over each; passes
for the scores use the first view alone and leave the running statistics of batch norm unchanged. The code drops the
last, smaller batch of a task. Changes of colour differ a little, see `pcr`.

State: the memory, |M| examples with their labels; Q, some 3 C `width` weights. A step costs one backward pass on the
incoming examples, two forward passes on the candidates and one on each second view more than a step of ER. Scenarios:
all. Refused: inputs that are not images, targets other than single labels, several processes, another strategy that
implements `classify` or `criterion`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval
from torch import Tensor, nn

from cl.data.augment import ContrastiveView
from cl.engine.batch import Batch
from cl.engine.preflight import check_draws
from cl.engine.strategy import LearnerLike, Strategy
from cl.random import Random
from cl.toolkit.lookahead import after_a_step, check_candidates, logits_at
from cl.toolkit.memory import Memory
from cl.toolkit.views import another_view, check_images

if TYPE_CHECKING:
    from cl.data.task import Stream


def information_loss(*predictions: Tensor) -> Tensor:
    """Return L_MI, minus the mean entropy of the mean of each of some predictions, (N, C) each, a scalar.

    Example:
        >>> sure, unsure = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> round(float(information_loss(sure, unsure, unsure)), 6)
        -0.462098
    """
    means = [p.mean(0).clamp_min(torch.finfo(torch.float64).eps) for p in predictions]
    return torch.stack([(mean * mean.log()).sum() for mean in means]).mean()


def distance_loss(first: Tensor, second: Tensor, joint: Tensor) -> Tensor:
    """Return L_DL, the mean absolute difference of a joint prediction and those of both views, (N, C) each, a scalar.

    Example:
        >>> view = torch.tensor([[0.75, 0.25]])
        >>> float(distance_loss(view, view, torch.tensor([[0.5, 0.5]])))
        0.25
    """
    return (F.l1_loss(first, joint) + F.l1_loss(second, joint)) / 2


def gradient_length(logits: Tensor, y: Tensor, features: Tensor) -> Tensor:
    """Return g, the 1-norm of the gradient of each example's cross-entropy for the weight of a linear head, (B,).

    Example:
        >>> gradient_length(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([[3.0, -4.0]])).tolist()
        [7.0]
    """
    own = logits.softmax(1).gather(1, y[:, None])[:, 0]
    return 2 * (1 - own) * features.abs().sum(1)


class DVC(Strategy):
    """Makes the predictions of two views agree, and replays the examples whose gradients a step would raise the most.

    Args:
        memory_size: Total number of exemplars, |M|.
        batch_size: Replayed examples per step, k; None means as many as there are incoming examples.
        num_candidates: Examples per step among which the replayed ones are chosen.
        information: Weight of L_MI, a.
        distance: Weight of L_DL, b.
        width: Hidden units of Q.
        scale: Smallest share of the image's area that a crop of the second view covers.
        flip: Whether the second view may be mirrored.
        jitter: Largest relative change of the second view's colours.
        storage: Where the exemplars are stored: on the "device", on the "host" or on "disk".

    Raises:
        InputError: If the inputs are not images, (C, H, W), or there are fewer candidates than replayed examples.

    Example:
        >>> DVC(memory_size=20)
        DVC(memory_size=20)
    """

    needs = ("memory",)
    needs_inputs = True
    distributed = False  # the entropies are of the mean prediction of all examples

    def __init__(
        self,
        memory_size: Annotated[int, Ge(1)] = 200,
        batch_size: Annotated[int, Ge(1)] | None = None,
        num_candidates: Annotated[int, Ge(1)] = 50,
        information: Annotated[float, Ge(0)] = 1.0,
        distance: Annotated[float, Ge(0)] = 4.0,
        width: Annotated[int, Ge(1)] = 128,
        scale: Annotated[float, Interval(gt=0, le=1)] = 0.2,
        flip: bool = True,
        jitter: Annotated[float, Interval(ge=0, le=1)] = 0.4,
        storage: str = "device",
    ) -> None:
        super().__init__()
        self.memory_size, self.batch_size, self.num_candidates = memory_size, batch_size, num_candidates
        self.information, self.distance, self.width, self.storage = information, distance, width, storage
        self.augment, self.random = ContrastiveView(scale, flip, jitter), Random()

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate the memory and the network of the joint prediction, Q."""
        check_images(stream, "DVC")
        check_draws("dvc", learner, stream, memory_size=self.memory_size, batch_size=self.batch_size)
        check_candidates("dvc", learner, self.num_candidates, self.batch_size)
        self.memory, C = Memory(self.memory_size, stream, storage=self.storage), stream.num_classes
        self.joint = nn.Sequential(nn.Linear(2 * C, self.width), nn.ReLU(), nn.Linear(self.width, C))

    def classify(self, learner: LearnerLike, features: Tensor) -> Tensor:
        """Return the head's logits, (B, C), and keep the features for the scores."""
        self._features = features.detach()
        logits: Tensor = learner.head(features)
        return logits

    def criterion(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor:
        """Return the loss of the batch plus, if the memory holds any, that of the chosen exemplars."""
        loss = self._of_both_views(learner, batch, logits)
        if len(self.memory) == 0:
            return loss
        candidates = self.memory.sample(self.num_candidates)
        before = self._gradients(learner, candidates, {})
        after = self._gradients(learner, candidates, after_a_step(learner, loss, batch.num_incoming))
        size = min(self.batch_size or batch.num_incoming, len(candidates))
        old = candidates.take((after - before).topk(size).indices)
        return loss + self._of_both_views(learner, old, learner(learner.prepare(old.x, True), old.task))

    def _of_both_views(self, learner: LearnerLike, batch: Batch, first: Tensor) -> Tensor:
        """Return the loss of examples with the logits of their first views, after a forward pass of second ones."""
        view = another_view(batch.x, self.augment, self.random.generator)
        second = learner(learner.prepare(view), batch.task)
        joint = self.joint(torch.cat([first, second], 1))
        logits = [learner.mask(part, batch.task, learner.train_mask) for part in (first, second, joint)]
        p, q, r = (part.softmax(1) for part in logits)
        loss = F.cross_entropy(torch.cat(logits[:2]), batch.y.repeat(2))
        return loss + self.information * information_loss(p, q, r) + self.distance * distance_loss(p, q, r)

    def _gradients(self, learner: LearnerLike, batch: Batch, weights: dict[str, Tensor]) -> Tensor:
        """Return g of each example, (B,), under the given weights."""
        return gradient_length(logits_at(learner, batch, weights), batch.y, self._features)

    def after_step(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> None:
        """Offer the incoming examples to the memory, after the step, so that none is replayed in the same step."""
        if learner.current_epoch == 0:
            self.memory.insert(batch)
