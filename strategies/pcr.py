r"""Proxy-based contrastive replay (Lin et al. 2023, "PCR: Proxy-Based Contrastive Replay", arXiv 2304.04408).

A contrastive loss in which an example is not contrasted with the other examples of the batch but with their proxies,
the classes' rows of the head's weight W. So only classes in the batch compete, and classes that are absent are not
pushed away. Let z be features and u the rows of W, both scaled to length 1, and i and j run over the N examples of the
batch: the incoming and the replayed ones, each in two views, as it is and augmented. P(i) are those with the label of
i, itself included:

.. math:: L = \frac{1}{N} \sum_i \frac{-1}{|P(i)|} \sum_{p \in P(i)}
          \log \frac{\exp(z_i \cdot u_{y_p} / \tau)}{\sum_j \exp(z_i \cdot u_{y_j} / \tau)}

Classes count as often as they occur: see `cl.toolkit.proxies.proxy_contrast`. Predictions are by the largest cosine.
The incoming views pass the network together, and so do the replayed ones: batch norm is over each of the two.

Crops and changes of colour are part of the method: an `er` without them is no control; one with the same `second_view`
is. The bias of the head, if it has one, is not used. Which classes compete follows from the batch alone, in every
scenario: `train_mask` has no effect.

Defaults: tau = 0.09, as many replayed as incoming examples, and the strengths of the augmentation are those of the
released code. It takes batches of 10, one epoch, and SGD with a learning rate of 0.1.
Differences from the paper: none known in the loss. With several epochs an example is offered to the reservoir in the
first epoch only. The stream's augmentation, if any, is applied to both views.
Differences from the reference code: as there, the loss is 0 while the memory is empty, so the first batch is lost; here
a step is made all the same, in which weight decay acts. The code drops the last, smaller batch of a task. The second
view of bytes is rounded to bytes; changes of hue and their order differ a little (`cl.data.augment.ContrastiveView`).

State: the memory, |M| examples with their labels. A step has two forward passes, of twice the incoming and twice the
replayed examples. Scenarios: all. Refused: inputs that are not images, targets other than single labels, several
processes, a head without a weight (C, D), another strategy that implements `classify` or `criterion`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
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


class PCR(Strategy):
    """Contrasts examples with the weights of the classes in the batch, and predicts by the largest cosine.

    Args:
        memory_size: Total number of exemplars, |M|.
        batch_size: Replayed examples per step; None means as many as there are incoming examples.
        temperature: tau, which divides the cosines.
        scale: Smallest share of the image's area that a crop of the second view covers.
        flip: Whether the second view may be mirrored.
        jitter: Largest relative change of the second view's colours.
        storage: Where the exemplars are stored: on the "device", on the "host" or on "disk".

    Raises:
        InputError: If the inputs are not images, (C, H, W), or the head has no row of weights for each class.

    Example:
        >>> PCR(memory_size=20)
        PCR(memory_size=20)
    """

    needs = ("memory",)
    needs_inputs = True
    distributed = False  # which classes compete depends on all examples of the batch

    def __init__(
        self,
        memory_size: Annotated[int, Ge(1)] = 200,
        batch_size: Annotated[int, Ge(1)] | None = None,
        temperature: Annotated[float, Gt(0)] = 0.09,
        scale: Annotated[float, Interval(gt=0, le=1)] = 0.2,
        flip: bool = True,
        jitter: Annotated[float, Interval(ge=0, le=1)] = 0.4,
        storage: str = "device",
    ) -> None:
        super().__init__()
        self.memory_size, self.batch_size, self.temperature = memory_size, batch_size, temperature
        self.storage, self.augment, self.random = storage, ContrastiveView(scale, flip, jitter), Random()

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate the memory; refuse what is no image, and a head without a row of weights for each class."""
        check_images(stream, "PCR")
        check_proxies(learner, "PCR")
        self.memory = Memory(self.memory_size, stream, storage=self.storage)

    def extend_batch(self, learner: LearnerLike, batch: Batch) -> Batch:
        """Append the second views of the examples."""
        return with_another_view(batch, self.augment, self.random.generator)

    def classify(self, learner: LearnerLike, features: Tensor) -> Tensor:
        """Return the cosines of features and classes' weights, divided by tau, (B, C)."""
        return cosine_logits(features, proxies(learner), 1 / self.temperature)

    def criterion(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor:
        """Return the contrastive loss of the batch and of replayed examples in two views; 0 with an empty memory."""
        if len(self.memory) == 0:
            return 0 * logits.sum()
        drawn = self.memory.sample(self.batch_size or batch.num_incoming)
        old = with_another_view(drawn, self.augment, self.random.generator)
        again = learner(learner.prepare(old.x, True), old.task)
        return proxy_contrast(torch.cat([logits, again]), torch.cat([batch.y, old.y]))

    def after_step(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> None:
        """Offer the incoming examples to the memory, after the step, so that none is replayed in the same step."""
        if learner.current_epoch == 0:
            self.memory.insert(batch)
