r"""Online prototype learning (Wei et al. 2023, "OnPro", arXiv 2308.00301).

A projection z of the features, scaled to length 1, is trained by two contrasts, and replay is steered by the first:

.. math:: L = L_{CE} + L_{OPE}(B) + L_{OPE}(M') + L_{ins}(B) + L_{ins}(\tilde M)

Equilibrium: for K classes in the incoming examples B, or in examples M' drawn from the memory, the prototypes
:math:`p_c` are the mean projections, scaled to length 1, of the images, and :math:`p_{K+c}` those of augmented views.
With i' the same class in the other view,

.. math:: L_{OPE} = \frac{-1}{2K} \sum_{i=1}^{2K} \log \frac{\exp(p_i \cdot p_{i'} / \tau)}
          {\sum_{j \ne i} \exp(p_i \cdot p_j / \tau)}

Instances: :math:`L_{ins}` is the supervised contrastive loss (see `scr`) with a temperature of its own. Each image is
used in 16 copies, four turns of the whole and four of its halves, and an augmented view of each. Examples have the same
label if they agree in class and copy.

Feedback: from the second task on, :math:`L_{CE}` is on replayed examples :math:`\tilde M` alone, with one augmented
view of each; in the first task on B. A share of M' is mixed at random. The others are drawn from the whole memory in
pairs of classes, a pair with a probability proportional to exp(1 / d), where d is the distance of the class means of
M', over both views: classes that are near each other are mixed more often. A mixture :math:`(1 - s) x + s x'` has the
loss (1 - s) CE(y) + s CE(y'), where the classes that compete for either of the two compete; in :math:`L_{ins}` it has
the label of the larger part.

Crops and changes of colour are part of the method: an `er` without them is no control; one with the same `second_view`
is. With 32 views of each example in :math:`L_{ins}` a step costs more than ten times one of `er`; `instance=0` leaves
them out.

Defaults: those of the released code for CIFAR-100. It takes batches of 10, one epoch, and Adam with a learning rate of
5e-4 and a weight decay of 1e-4.
Differences from the paper: the mixing share and the temperatures are those of the code. With several epochs an example
is offered to the reservoir in the first epoch only. The stream's augmentation is not used.
Differences from the reference code: in the code a mixture's label in L_ins is a number between those of the two
classes, which may be that of a third; L_ins gives the two views of a copy three times the weight, adds products with a
random part of the features, and contrasts replayed examples with themselves; and the distances are those of the step
before, so that the first step of a task mixes nothing. Here they are those of M' itself. In the code the numbers of
pairs are rounded expectations; here pairs are drawn. Each term has a forward pass of its own, so that batch norm is
over each. Views and mixtures of
bytes are bytes. Colours change as in `cl.data.augment.ContrastiveView`; in the code one image in four becomes grey.

State: the memory, |M| examples with their labels; the projection, D x dim weights. Scenarios: all. Refused: inputs that
are not images, oblong images if they are turned, targets other than single labels, several processes, another strategy
that implements `classify` or `criterion`.
"""

from __future__ import annotations

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
from cl.toolkit.contrast import prototype_contrast, supervised_contrastive
from cl.toolkit.memory import Memory
from cl.toolkit.mixing import mixture, pairs_to_mix
from cl.toolkit.views import another_view, check_images, check_square, with_another_view, with_turned_copies

if TYPE_CHECKING:
    from cl.data.task import Stream


class OnPro(Strategy):
    """Contrasts prototypes of classes and turned copies of images, and mixes replayed examples of near classes.

    Args:
        memory_size: Total number of exemplars, |M|.
        batch_size: Largest number of replayed examples per step.
        per_class: Largest number of replayed examples per step and class seen, from the second task on.
        prototype: Weight of the contrast of prototypes, L_OPE.
        instance: Weight of the contrast of instances, L_ins; 0 leaves out its forward passes.
        temperature: tau of L_OPE.
        instance_temperature: The temperature of L_ins.
        dim: Width of the projection's output.
        base: Share of the replayed examples that is not drawn by pairs of classes.
        mix: Probability that a replayed example is mixed with another one.
        rotate: Whether L_ins uses 16 turned copies of each image.
        scale: Smallest share of the image's area that a crop of an augmented view covers.
        flip: Whether an augmented view may be mirrored.
        jitter: Largest relative change of an augmented view's colours.
        storage: Where the exemplars are stored: on the "device", on the "host" or on "disk".

    Raises:
        InputError: If the inputs are not images, (C, H, W), or are oblong and turned.

    Example:
        >>> OnPro(memory_size=20)
        OnPro(memory_size=20)
    """

    needs = ("memory",)
    needs_inputs = True
    distributed = False  # the losses contrast each example with all others

    def __init__(
        self,
        memory_size: Annotated[int, Ge(1)] = 200,
        batch_size: Annotated[int, Ge(1)] = 64,
        per_class: Annotated[int, Ge(1)] = 7,
        prototype: Annotated[float, Ge(0)] = 1.0,
        instance: Annotated[float, Ge(0)] = 1.0,
        temperature: Annotated[float, Gt(0)] = 0.5,
        instance_temperature: Annotated[float, Gt(0)] = 0.07,
        dim: Annotated[int, Ge(1)] = 128,
        base: Annotated[float, Interval(ge=0, le=1)] = 0.9,
        mix: Annotated[float, Interval(ge=0, le=1)] = 0.2,
        rotate: bool = True,
        scale: Annotated[float, Interval(gt=0, le=1)] = 0.3,
        flip: bool = True,
        jitter: Annotated[float, Interval(ge=0, le=1)] = 0.4,
        storage: str = "device",
    ) -> None:
        super().__init__()
        self.memory_size, self.batch_size, self.per_class, self.dim = memory_size, batch_size, per_class, dim
        self.prototype, self.instance, self.base, self.mix, self.rotate = prototype, instance, base, mix, rotate
        self.temperature, self.instance_temperature, self.storage = temperature, instance_temperature, storage
        self.augment, self.random = ContrastiveView(scale, flip, jitter), Random()

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate the memory and the projection."""
        check_images(stream, "OnPro")
        check_draws("onpro", learner, stream, memory_size=self.memory_size, batch_size=self.batch_size)
        if self.rotate:
            check_square(stream, "OnPro", "onpro.rotate")
        self.memory = Memory(self.memory_size, stream, storage=self.storage)
        self.projection = nn.Linear(int(learner.backbone.num_features), self.dim)  # type: ignore[arg-type]

    def classify(self, learner: LearnerLike, features: Tensor) -> Tensor:
        """Return the head's logits, (B, C), and keep the features for the projection."""
        self._features = features
        return learner.head(features)  # type: ignore[no-any-return]

    def criterion(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor:
        """Return the sum of the terms, each from a forward pass of its own; the batch's logits are not used."""
        loss = self._equilibrium(learner, batch)[0] + self._instances(learner, batch)
        if len(self.memory) == 0:
            return loss + self._cross_entropy(learner, batch, batch, batch)
        first_task = learner.task_index == 0
        size = self.batch_size if first_task else self.per_class * int(learner.seen.sum())
        old = self.memory.sample(min(self.batch_size, size))
        term, means = self._equilibrium(learner, old)
        if first_task:
            return loss + term + self._cross_entropy(learner, batch, batch, batch)
        one, two, part = pairs_to_mix(old, means, self.memory, self.base, self.mix, self.random.generator)
        mixed = mixture(one, two, part)
        loss = loss + term + self._instances(learner, mixed)
        return loss + self._cross_entropy(learner, mixed, one, two, part)

    def _projections(self, learner: LearnerLike, batch: Batch) -> Tensor:
        """Return the projections of images and of an augmented view of each, (2 B, dim)."""
        views = with_another_view(batch, self.augment, self.random.generator)
        learner(learner.prepare(views.x), views.task)
        return F.normalize(self.projection(self._features).float(), dim=1)

    def _equilibrium(self, learner: LearnerLike, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the weighted L_OPE, and the class means over both views, (C, dim), zeros where there is no example."""
        member = F.one_hot(batch.y, learner.num_classes).float()
        present, count = member.any(0), member.sum(0).clamp_min(1)[:, None]
        first, second = (member.T @ z / count for z in self._projections(learner, batch).chunk(2))
        loss = self.prototype * prototype_contrast(first[present], second[present], self.temperature)
        return loss, (first + second).detach() / 2

    def _instances(self, learner: LearnerLike, batch: Batch) -> Tensor | float:
        """Return the weighted L_ins."""
        if self.instance == 0:
            return 0.0
        copied = with_turned_copies(batch, learner.num_classes) if self.rotate else batch
        z = self._projections(learner, copied)
        return self.instance * supervised_contrastive(z, copied.y.repeat(2), self.instance_temperature)

    def _cross_entropy(
        self, learner: LearnerLike, mixed: Batch, one: Batch, two: Batch, part: Tensor | float = 0.0
    ) -> Tensor:
        """Return the loss of mixtures in one augmented view, where `part` is the share of the second batch."""
        view = another_view(mixed.x, self.augment, self.random.generator)
        logits = learner(learner.prepare(view), mixed.task)
        logits = logits.masked_fill(~(learner.competing(one.task) | learner.competing(two.task)), -torch.inf)
        first, second = (F.cross_entropy(logits, batch.y, reduction="none") for batch in (one, two))
        return ((1 - part) * first + part * second).mean()

    def after_step(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> None:
        """Offer the incoming examples to the memory, after the step, so that none is replayed in the same step."""
        if learner.current_epoch == 0:
            self.memory.insert(batch)
